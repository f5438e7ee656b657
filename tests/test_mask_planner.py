"""mask_planner.py: losses equal loops, plans are causal, training continues exactly."""

import os
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import PLANNER, SIZE, SUITE, equal, run_and_kill

import mask_planner
from baselines import explicit
from core import training
from core.flags import from_dict

K = len(mask_planner.HORIZONS)


def small(**changes):
    torch.manual_seed(0)
    values = dict(demos=2, steps=5, preset="laptop", size=64, width=32, depth=1, blocks=(1, 1, 1), channels=16,
                  history=1, batch=2, device="cpu", bf16=False) | changes
    return mask_planner.MaskPlanner(mask_planner.Config(**values))


def blobs(B, H=32, W=32, seed=0):
    """Masks (B, 1 + K, H, W): robot, bowl and plate are rectangles that wander."""
    rng, masks = np.random.default_rng(seed), np.zeros((B, 1 + K, H, W), np.uint8)
    for b in range(B):
        for label in (1, 2, 3):
            y, x = rng.integers(0, H - 16), rng.integers(0, W - 16)
            for k in range(1 + K):
                masks[b, k, y + k:y + k + 8, x + 2 * k // 2:x + k + 7] = label
    return torch.from_numpy(masks)


def batch_of(B=2, T=1, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    picture = lambda *shape: torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8, generator=generator)
    return {"frames": picture(B, T), "goal": picture(B), "masks": blobs(B, size // 2, size // 2, seed)}


# --- losses ---------------------------------------------------------------------------------------


def test_soft_aggregate_of_one_object():
    p = torch.linspace(0.01, 0.99, 50).view(1, 1, 5, 10)
    share = mask_planner.soft_aggregate(p).softmax(1)
    assert share.shape == (1, 2, 5, 10)
    torch.testing.assert_close(share[:, 1:], p ** 2 / (p ** 2 + (1 - p) ** 2), atol=1e-5, rtol=1e-4)


def test_soft_aggregate_is_proportional_to_the_odds():
    p = torch.rand(2, 3, 4, 5) * 0.98 + 0.01
    share = mask_planner.soft_aggregate(p).softmax(1)
    torch.testing.assert_close(share.sum(1), torch.ones(2, 4, 5))
    for b, y, x in np.ndindex(2, 4, 5):
        own = [(1 - p[b, :, y, x]).prod(), *p[b, :, y, x]]
        odds = torch.tensor([q / (1 - q) for q in own])
        torch.testing.assert_close(share[b, :, y, x], odds / odds.sum(), atol=1e-5, rtol=1e-4)


def test_soft_aggregate_treats_objects_alike():
    p = torch.rand(2, 3, 4, 5)
    share = mask_planner.soft_aggregate(p).softmax(1)
    order = [2, 0, 1]
    torch.testing.assert_close(mask_planner.soft_aggregate(p[:, order]).softmax(1), share[:, [0, 3, 1, 2]])
    more = mask_planner.soft_aggregate(torch.cat([p, torch.zeros(2, 1, 4, 5)], 1)).softmax(1)
    torch.testing.assert_close(more[:, :4], share, atol=1e-5, rtol=1e-5)
    assert more[:, 4].max() < 1e-5


def test_soft_aggregate_is_finite_at_the_ends():
    p = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, 2, 1, 1).requires_grad_()
    logits = mask_planner.soft_aggregate(p)
    logits.softmax(1).square().sum().backward()
    assert logits.isfinite().all() and p.grad.isfinite().all()


def test_bootstrapped_cross_entropy():
    logits, target = torch.randn(3, 4, 5, 6), torch.randint(0, 4, (3, 5, 6))
    everything = mask_planner.bootstrapped_cross_entropy(logits, target, 1.0)
    torch.testing.assert_close(everything, F.cross_entropy(logits, target))
    total = 0
    for b in range(3):
        pixels = sorted(-logits[b].log_softmax(0)[target[b, y, x], y, x].item() for y in range(5) for x in range(6))
        total += sum(pixels[-9:]) / 9       # 30 % of 30 pixels of each picture
    assert mask_planner.bootstrapped_cross_entropy(logits, target, 0.3).item() == pytest.approx(total / 3, rel=1e-5)


def test_hardest_fraction():
    found = [mask_planner.hardest_fraction(p) for p in (0, 0.2, 0.45, 0.7, 1, 2)]
    assert found == pytest.approx([1, 1, 0.575, 0.15, 0.15, 0.15])


def test_dice():
    m, g = torch.rand(2, 3, 8, 9), (torch.rand(2, 3, 8, 9) > 0.5).float()
    loss = mask_planner.dice(m, g)
    for b, n in np.ndindex(2, 3):
        pairs = list(zip(m[b, n].flatten().tolist(), g[b, n].flatten().tolist()))
        wanted = 1 - (2 * sum(p * q for p, q in pairs) + 1) / (sum(p + q for p, q in pairs) + 1)
        assert loss[b, n].item() == pytest.approx(wanted, abs=1e-5)
    assert mask_planner.dice(g, g).abs().max() < 1e-6
    assert mask_planner.dice(1 - g, g).min() > 0.9


def test_loss_equals_a_loop():
    """From the decoder's probabilities, object by object and horizon by horizon."""
    planner, batch = small(steps=100).train(), batch_of()
    batch["masks"][1][batch["masks"][1] == 3] = 0      # an object that is nowhere
    planner.progress.fill_(0.45)
    loss, parts = planner.loss(batch)
    with torch.no_grad():
        now = torch.stack([(batch["masks"][:, 0] == n).float() for n in (1, 2, 3)], 1)
        prob = planner.predict(batch["frames"], batch["goal"], now)         # (B, N, K, H, W)
        plan, fine = planner(batch["frames"], batch["goal"], fine=True)
        drawn = planner.locator.draw(planner.as_map(plan[:, -1]), fine)         # (B, N + 1, 1 + K, 16, 16)
        where = planner.locator(planner.as_map(plan[:, -1]), fine)
        ce, dices, errors, draw = [], [], [], []
        for b, k, y, x in np.ndindex(2, 1 + K, 16, 16):     # a cell holds 2 x 2 pixels of the masks
            cell = batch["masks"][b, k, 2 * y:2 * y + 2, 2 * x:2 * x + 2].flatten().long()
            draw.append(-drawn[b, :, k, y, x].log_softmax(0)[cell].mean())
        for b, k in np.ndindex(2, K):
            logits = mask_planner.soft_aggregate(prob[b:b + 1, :, k])[0]
            truth = batch["masks"][b, 1 + k].long()
            pixels = F.cross_entropy(logits[None], truth[None], reduction="none").flatten()
            ce.append(pixels.sort(descending=True).values[:int(0.575 * len(pixels))].mean())
            for n in (1, 2, 3):
                if (truth == n).any() or now[b, n - 1].any():
                    m, g = logits.softmax(0)[n], (truth == n).float()
                    dices.append(1 - (2 * (m * g).sum() + 1) / (m.sum() + g.sum() + 1))
        for b, n, k in np.ndindex(2, 3, 1 + K):
            true, present = explicit.locate((batch["masks"][b, k] == n + 1).float())
            if present:
                d = (where[b, n, k] - true).abs()
                errors += torch.where(d < 0.02, d ** 2 / 0.04, d - 0.01).tolist()
    assert len(dices) == 5 * K
    assert parts["ce"] == pytest.approx(np.mean(ce), rel=1e-4)
    assert parts["dice"] == pytest.approx(np.mean(dices), rel=1e-4)
    assert parts["located"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert parts["draw"] == pytest.approx(np.mean(draw), rel=1e-4)
    total = parts["ce"] + parts["dice"] + 5 * parts["draw"] + 10 * parts["located"]
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_objects_beyond_the_tracked_ones_are_background():
    planner, batch = small(objects=1).eval(), batch_of()
    alone = batch | {"masks": batch["masks"] * (batch["masks"] == 1)}
    assert torch.equal(planner.loss(batch)[0], planner.loss(alone)[0])


def test_progress_moves_in_training_only():
    planner, batch = small(steps=10).train(), batch_of()
    planner.loss(batch)
    planner.loss(batch)
    assert planner.progress.item() == pytest.approx(0.2)
    planner.eval().loss(batch)
    assert planner.progress.item() == pytest.approx(0.2) and "progress" in planner.state_dict()


# --- geometry -------------------------------------------------------------------------------------


def test_binary_masks():
    masks = torch.randint(0, 4, (2, 5, 6, 7))
    m = mask_planner.binary_masks(masks, 3)
    assert m.shape == (2, 5, 3, 6, 7) and all(torch.equal(m[:, :, n - 1], (masks == n).float()) for n in (1, 2, 3))


def test_locate():
    """H != W, so that exchanged axes show."""
    m = torch.zeros(20, 40)
    m[4:8, 10:20] = 1
    where, present = explicit.locate(m)
    assert present
    torch.testing.assert_close(where, torch.tensor([15 / 40, 6 / 20, (40 / 800) ** 0.5, 15 / 40, 7.5 / 20]))
    m = torch.zeros(2, 20, 40)
    m[0, 0:15, 8:20] = 1
    m[0, 15:19, 30:33] = 1      # a finger that reaches down
    where, present = explicit.locate(m)
    assert present.tolist() == [True, False] and where.isfinite().all()
    assert where[0, 3].item() * 40 == pytest.approx(31.5) and where[0, 4].item() * 20 > 16
    assert where[0, 0].item() * 40 < 16


def test_iou():
    a, b = torch.zeros(3, 4, 5, dtype=torch.bool), torch.zeros(3, 4, 5, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True        # rows 0, 1 and 1, 2: one of three
    a[1, 0, 0] = True
    values = mask_planner.iou(a, b)
    assert values[0].item() == pytest.approx(1 / 3) and values[1] == 0 and values[2].isnan()
    assert mask_planner.iou(a, a)[0] == 1


def test_half_keeps_every_second_pixel():
    masks = np.arange(48).reshape(6, 8)
    assert np.array_equal(mask_planner.half(masks), masks[[0, 2, 4]][:, [0, 2, 4, 6]])


# --- networks -------------------------------------------------------------------------------------


def test_tokens_and_map_are_inverse():
    """A map with h != w through encode() and back."""
    planner = small()
    feature = torch.arange(2 * 32 * 3 * 5).view(2, 32, 3, 5).float()
    planner.encoder.forward = lambda images, fine: (feature, feature)
    tokens = planner.encode(torch.zeros(2, 48, 80, 3, dtype=torch.uint8))
    assert tokens.shape == (2, 15, 32) and torch.equal(tokens[:, 7], feature[:, :, 1, 2])
    planner = small()
    planner.side = 4
    square = torch.randn(2, 32, 4, 4)
    assert torch.equal(planner.as_map(square.flatten(2).transpose(1, 2)), square)


def test_every_token_knows_its_picture():
    """Frames and goal are not exchanged, and no token belongs to the other picture."""
    planner = small(history=2).eval()
    frames, goal = batch_of(T=2)["frames"], batch_of(seed=1)["goal"]
    seen = {}
    planner.gpt.forward = lambda x, mask: seen.setdefault("x", x)
    planner(frames, goal)
    x = seen["x"].unflatten(1, (3, planner.n))
    for i, picture in enumerate((goal, frames[:, 0], frames[:, 1])):
        wanted = planner.encode(picture) + planner.place + planner.time[i]
        torch.testing.assert_close(x[:, i], wanted, atol=1e-4, rtol=1e-4)


def test_plans_are_causal_over_the_history():
    planner, batch = small(history=3).eval(), batch_of(T=3)
    with torch.no_grad():
        plan = planner(batch["frames"], batch["goal"])
        assert plan.shape == (2, 3, planner.n, 32)
        later = batch["frames"].clone()
        later[:, 2] = 255 - later[:, 2]
        changed = planner(later, batch["goal"])
        assert torch.equal(plan[:, :2], changed[:, :2]) and not torch.allclose(plan[:, 2], changed[:, 2])
        assert not torch.allclose(plan[:, 0], planner(batch["frames"], batch["goal"].flip(1))[:, 0])
        torch.testing.assert_close(planner(batch["frames"][:, :2], batch["goal"]), plan[:, :2], atol=1e-4, rtol=1e-4)


def test_the_future_does_not_leak():
    """Masks of later times change the loss and nothing that is predicted."""
    planner, batch = small().eval(), batch_of()
    seen = []
    decode = planner.decoder.forward
    planner.decoder.forward = lambda plan, masks: seen.append(decode(plan, masks)) or seen[-1]
    planner.loss(batch)
    other = batch["masks"].clone()
    other[:, 1:] = other[:, 1:].flip(-1)
    planner.loss(batch | {"masks": other})
    assert torch.equal(*seen)


def test_decoder_treats_objects_alike():
    planner, batch = small().eval(), batch_of()
    m = mask_planner.binary_masks(batch["masks"][:, 0].long(), 3)
    with torch.no_grad():
        prob = planner.predict(batch["frames"], batch["goal"], m)
        assert prob.shape == (2, 3, K, 32, 32) and prob.min() >= 0 and prob.max() <= 1
        order = [1, 2, 0]
        torch.testing.assert_close(planner.predict(batch["frames"], batch["goal"], m[:, order]), prob[:, order])
        torch.testing.assert_close(planner.predict(batch["frames"], batch["goal"], m[:, :1]), prob[:, :1])


def test_decoder_takes_masks_that_are_not_square():
    decoder = small().decoder
    assert decoder(torch.randn(2, 32, 3, 4), torch.zeros(2, 5, 22, 30)).shape == (2, 5, K, 22, 30)


def test_locator_reads_what_it_draws():
    """A rectangle drawn for one object at one time is where, and as large as, it was drawn; faint cells do not pull."""
    locator = small().locator
    logits = torch.zeros(1, 4, 1 + K, 24, 24)
    logits[:, 0] = 4        # background everywhere, the rest about 2 % each
    logits[0, 2, 1, 10:14, 3:9] = 14
    where = locator.read(logits)
    assert where.shape == (1, 3, 1 + K, 5)
    # rows 10..13, columns 3..8 of 24; the lowest row holds more than a twentieth of it
    truth = torch.tensor([6 / 24, 12 / 24, 24 ** 0.5 / 24, 6 / 24, 13.5 / 24])
    torch.testing.assert_close(where[0, 1, 1], truth, atol=0.01, rtol=0)


@pytest.mark.parametrize("history", [1, 2])
def test_every_parameter_gets_a_gradient(history):
    planner = small(history=history).train()
    planner.loss(batch_of(T=history))[0].backward()
    idle = [name for name, p in planner.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle


def test_one_batch_is_overfitted():
    planner, batch = small(lr=2e-3).train(), batch_of()
    optimizer = torch.optim.AdamW(planner.parameters(), 2e-3)
    losses = []
    for _ in range(120):
        planner.progress.zero_()        # all pixels, so that the first loss and the last compare
        loss, _ = planner.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0], (losses[0], losses[-1])


# --- data and training ----------------------------------------------------------------------------


def test_batch_is_what_the_file_holds(videos):
    config = mask_planner.Config(history=3, stride=4, size=SIZE)
    episode, t = np.array([0, 1]), np.array([6, videos.length[1] - 2])
    batch = mask_planner.make_batch(videos, episode, t, np.random.default_rng(0), config)
    pictures, masks = videos.arrays["obs/agentview_rgb"], videos.arrays["masks"]
    assert np.array_equal(batch["frames"][0], pictures[0][[0, 2, 6]]), "oldest first, the start repeated"
    assert np.array_equal(batch["goal"], np.stack([pictures[1][-1], pictures[0][-1]]))
    assert np.array_equal(batch["masks"][0], masks[0][[6, 10, 14, 22, 38], ::2, ::2])
    last = videos.length[1] - 1
    assert np.array_equal(batch["masks"][1], masks[1][[last - 1] + [last] * K, ::2, ::2])


def test_one_training_frame_in_four_is_an_early_one(videos):
    """Before the hand has moved only the goal image tells which of two bowls is meant."""
    config = mask_planner.Config(size=SIZE, batch=400, seed=3)
    early = videos.draw(7, 400, 3)[1]
    _, t, _ = mask_planner.draw_frames(videos, 7, config)
    assert np.array_equal(t[100:], early[100:]) and set(t[:100]) == set(range(mask_planner.EARLY))
    assert np.array_equal(t, mask_planner.draw_frames(videos, 7, config)[1])


def test_validation_compares_with_copying_the_mask(videos):
    """A planner that copies the mask scores what `copy` scores, and moving objects are worse than static ones."""
    planner = small(size=SIZE)
    planner.predict = lambda frames, goal, masks: masks[:, :, None].expand(-1, -1, K, -1, -1) * 0.98 + 0.01
    scores = mask_planner.validate(planner, videos, samples=50)
    for group in scores.values():
        assert group["planner"] == pytest.approx(group["copy"])
    assert scores["moving"]["n"][-1] > 0 and (scores["moving"]["copy"] < 0.7).all()
    assert (scores["static"]["copy"] > 0.7).all() and "copy" in mask_planner.table(scores)


def test_checkpoint_gives_the_same_planner(planner_path):
    content = training.load(planner_path, kind="mask_planner")
    planner = mask_planner.load_planner(planner_path)
    assert not planner.training and not any(p.requires_grad for p in planner.parameters())
    rebuilt = mask_planner.MaskPlanner(from_dict(mask_planner.Config, content["config"])).eval()
    rebuilt.load_state_dict(content["model"])
    batch = batch_of(size=SIZE)
    with torch.no_grad():
        assert torch.equal(planner(batch["frames"], batch["goal"]), rebuilt(batch["frames"], batch["goal"]))
    assert planner.progress.item() == pytest.approx(1)
    assert (planner_path.with_suffix(".png")).exists()


def test_seed_decides_weights_and_batches(data, tmp_path):
    start = {}

    def fit(model, batches, *rest):
        key = len(start)
        start[key] = deepcopy(model.state_dict()), batches(0)
        raise KeyboardInterrupt

    for seed in ("0", "1", "0"):
        torch.rand(7)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "fit", fit)
            mask_planner.main([*PLANNER, "--seed", seed, "--data", str(data), "--out", str(tmp_path)])
    (a, x), (b, y), (c, z) = start.values()
    assert all(torch.equal(a[k], c[k]) for k in a) and not torch.equal(a["place"], b["place"])
    assert np.array_equal(x["frames"], z["frames"]) and not np.array_equal(x["frames"], y["frames"])


@pytest.mark.parametrize("when", ["step", "save"])
def test_killed_training_continues_exactly(data, tmp_path, monkeypatch, capsys, when):
    argv = [*PLANNER, "--steps", "6", "--data", str(data)]
    monkeypatch.setattr(mask_planner, "validate", lambda *arguments: {})
    mask_planner.main([*argv, "--out", str(tmp_path / "whole")])
    run_and_kill("mask_planner", when, [*argv, "--out", str(tmp_path / "broken")])
    whole, broken = (tmp_path / name / SUITE / "mask.pt" for name in ("whole", "broken"))
    assert training.load(broken)["step"] == 2
    capsys.readouterr()
    mask_planner.main([*argv, "--out", str(tmp_path / "broken")])
    assert "at step 2: continuing" in capsys.readouterr().out
    one, other = training.load(whole), training.load(broken)
    assert other["step"] == 6 and equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--suite", "libero_space"], ["libero_space"]), (["--tasks", "77"], ["77"]), (["--demos", "0"], ["--demos 0"]),
    (["--seed", "-1"], ["--seed -1"]), (["--channels", "20"], ["20"]), (["--width", "30"], ["30"]),
    (["--size", "64"], ["96 px", "64 px"]), (["--lr", "-1"], ["--lr -1"])])
def test_bad_flags(data, tmp_path, refused, flags, words):
    refused(lambda: mask_planner.main([*PLANNER, "--data", str(data), "--out", str(tmp_path / "runs"), *flags]), *words)
    assert not (tmp_path / "runs").exists()


def test_nothing_to_show(data, tmp_path, refused):
    refused(lambda: mask_planner.main([*PLANNER, "--data", str(data), "--out", str(tmp_path), "--show"]),
            tmp_path, "python mask_planner.py")


@pytest.mark.parametrize("damage", ["cut", "changed in the middle", "text", "other kind"])
def test_broken_checkpoint_is_one_line_and_stays(data, planner_path, tmp_path, refused, damage):
    path = tmp_path / SUITE / "mask.pt"
    path.parent.mkdir()
    whole = planner_path.read_bytes()
    middle = len(whole) // 2
    if damage == "other kind":
        training.save(path, kind="executor", model={}, config={}, step=1, version=training.VERSION)
    else:
        path.write_bytes({"cut": whole[:middle], "text": b"hello",
                          "changed in the middle": whole[:middle] + bytes(64) + whole[middle + 64:]}[damage])
    before = path.read_bytes()
    refused(lambda: mask_planner.main([*PLANNER, "--data", str(data), "--out", str(tmp_path)]), path)
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["mask.pt.tmp", "mask.jsonl.tmp", "mask.png.tmp"])
def test_full_disk_is_one_line(data, tmp_path, refused, name):
    """Whichever of the run's files meets it first: checkpoint, log, picture."""
    (tmp_path / SUITE).mkdir()
    os.symlink("/dev/full", tmp_path / SUITE / name)
    (tmp_path / SUITE / "mask.jsonl").write_text('{"step": 0, "seconds": 0}\n')
    refused(lambda: mask_planner.main([*PLANNER, "--data", str(data), "--out", str(tmp_path)]), "full")
