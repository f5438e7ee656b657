"""mask_planner.py: losses equal loops, plans are causal, nothing leaks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mask_planner
from core import networks
from core.draw import draw_masks

K = len(mask_planner.HORIZONS)


def small(**changes):
    """A new planner of the tiny preset."""
    torch.manual_seed(0)
    values = mask_planner.Config.PRESETS["tiny"] | dict(preset="tiny", history=1) | changes
    return mask_planner.MaskPlanner(mask_planner.Config(**values))


def batch_of(B=2, T=1):
    """Random pictures; masks of robot, bowl and plate are rectangles that wander."""
    torch.manual_seed(0)
    picture = lambda *shape: torch.randint(0, 256, (*shape, 64, 64, 3), dtype=torch.uint8)
    masks = torch.zeros(B, 1 + K, 32, 32, dtype=torch.uint8)
    for b, label, k in np.ndindex(B, 3, 1 + K):
        y, x = k + (7 * b + 5 * label) % 20, k + 9 * label
        masks[b, k, y:y + 8, x:x + 7] = label + 1
    return {"frames": picture(B, T), "goal": picture(B), "masks": masks}


@pytest.mark.parametrize("N", [1, 3])       # N = 1: p^2 / (p^2 + (1 - p)^2)
def test_soft_aggregate_is_proportional_to_the_odds(N):
    p = torch.rand(2, N, 4, 5) * 0.98 + 0.01
    p[:, 1:2] = 1e-6    # an object that is nowhere changes nothing
    share = mask_planner.soft_aggregate(p).softmax(1)
    for b, y, x in np.ndindex(2, 4, 5):
        own = torch.stack([(1 - p[b, :, y, x]).prod(), *p[b, :, y, x]])
        odds = own / (1 - own)
        torch.testing.assert_close(share[b, :, y, x], odds / odds.sum(), atol=1e-5, rtol=1e-4)
    p = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, N, 1, 1).requires_grad_()
    logits = mask_planner.soft_aggregate(p)     # finite at the ends
    logits.softmax(1).square().sum().backward()
    assert logits.isfinite().all() and p.grad.isfinite().all()


@pytest.mark.parametrize("grounded", [False, True])
def test_loss_equals_a_loop(grounded):
    """From what the networks predict, picture by picture, object by object."""
    planner, batch = small(steps=100, grounded=grounded).train(), batch_of()
    masks, tracked = batch["masks"], ((1, 3), (1, 2))
    masks[0, 0][masks[0, 0] == 2] = 0       # object 2 of the first sample is hidden now,
    masks[1][masks[1] == 3] = 0             # object 3 of the second one is nowhere
    planner.progress.fill_(0.45)
    loss, parts = planner.loss(batch)
    with torch.no_grad():
        (ce, dices, cells), now = ([], [], []), mask_planner.binary_masks(masks[:, 0], 3)
        prob = planner.predict(batch["frames"], batch["goal"], now)         # (B, N, K, H, W)
        for b, k in np.ndindex(2, K):
            logits = mask_planner.soft_aggregate(prob[b:b + 1, :, k])[0]
            truth = masks[b, 1 + k].long()
            truth[~torch.isin(truth, torch.tensor(tracked[b]))] = 0
            pixels = F.cross_entropy(logits[None], truth[None], reduction="none").flatten()
            ce.append(pixels.sort(descending=True).values[:int(0.575 * len(pixels))].mean())
            for n in tracked[b]:
                m, g = logits.softmax(0)[n], (truth == n).float()
                dices.append(1 - (2 * (m * g).sum() + 1) / (m.sum() + g.sum() + 1))
        if grounded:        # all objects; a point of a cell holds 2 x 2 pixels of the masks
            plan = planner(batch["frames"], batch["goal"])[:, -1]
            predicted = planner.predict_cells(plan).log_softmax(2)
            for b, k, y, x in np.ndindex(2, 1 + K, 16, 16):
                point = masks[b, k, 2 * y:2 * y + 2, 2 * x:2 * x + 2].flatten().long()
                cells.append(-predicted[b, k, point, y, x].mean())
    assert parts["ce"] == pytest.approx(np.mean(ce), rel=1e-4)
    assert parts["dice"] == pytest.approx(np.mean(dices), rel=1e-4)
    assert parts.get("cells", 0) == pytest.approx(np.mean(cells or 0), rel=1e-4)
    total = parts["ce"] + parts["dice"] + 3 * parts.get("cells", 0)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert planner.progress.item() == pytest.approx(0.46), "one of 100 steps further"
    found = [mask_planner.hardest_fraction(p) for p in (0, 0.2, 0.45, 0.7, 1, 2)]
    assert found == pytest.approx([1, 1, 0.575, 0.15, 0.15, 0.15])


def test_tokens_are_cells_and_know_their_picture():
    """A map with h != w becomes tokens, tokens a map; each token predicts for its own cell."""
    planner, feature, seen = small(grounded=True), torch.arange(960.0).view(2, 32, 3, 5), {}
    planner.encoder.forward = lambda images: feature
    tokens = planner.encode(torch.zeros(2, 48, 80, 3, dtype=torch.uint8))
    assert tokens.shape == (2, 15, 32) and torch.equal(tokens[:, 7], feature[:, :, 1, 2])
    assert networks.to_map(torch.arange(16)[None, :, None])[0, 0, 1].tolist() == [4, 5, 6, 7]
    plan = torch.randn(2, 16, 32)
    cells, other = planner.predict_cells(plan), plan.clone()
    other[:, 6] += 1        # row 1, column 2 of 4 x 4
    changed = (planner.predict_cells(other) != cells).flatten(0, 2).any(0).nonzero()
    assert cells.shape == (2, 1 + K, 4, 16, 16) and len(changed) == 16
    assert changed.amin(0).tolist() == [4, 8] and changed.amax(0).tolist() == [7, 11]
    planner, batch = small(history=2).eval(), batch_of(T=2)
    planner.gpt.forward = lambda x, mask: seen.setdefault("x", x)
    planner(batch["frames"], batch["goal"])
    for i, picture in enumerate((batch["goal"], *batch["frames"].unbind(1))):
        wanted = planner.encode(picture) + planner.position + planner.time[i]
        found = seen["x"].unflatten(1, (3, planner.n))[:, i]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_plans_are_causal_over_the_history():
    planner, batch = small(history=3).eval(), batch_of(T=3)
    frames, goal = batch["frames"], batch["goal"]
    plan, later = planner(frames, goal), frames.clone()
    later[:, 2] = 255 - later[:, 2]
    changed = planner(later, goal)
    assert plan.shape == (2, 3, planner.n, 32) and torch.equal(plan[:, :2], changed[:, :2])
    assert not torch.allclose(plan[:, 2], changed[:, 2])
    assert not torch.allclose(plan[:, 0], planner(frames, goal.flip(1))[:, 0])
    torch.testing.assert_close(planner(frames[:, :2], goal), plan[:, :2], atol=1e-4, rtol=1e-4)
    made, (places, _) = planner.plan(batch, "latent"), planner.sets("latent")["plan"]
    assert places[6].tolist() == [0, 2.5 / 4, 1.5 / 4], "third person; row 1, column 2 of 4 x 4"
    torch.testing.assert_close(made["plan"], plan[:, -1])
    torch.testing.assert_close(made["picture"], planner.encode(frames[:, -1]))


def test_the_future_does_not_leak():
    """Masks of later times change the loss and nothing predicted; the plan depends on no mask."""
    planner, batch, seen = small(grounded=True).eval(), batch_of(), []
    for module in (planner.decoder, planner.ground):
        module.register_forward_hook(lambda module, given, made: seen.append(made))
    later = batch["masks"].clone()
    later[:, 1:] = later[:, 1:].flip(-1)
    losses = [planner.loss(batch | {"masks": m})[0] for m in (batch["masks"], later, 0 * later)]
    assert torch.equal(seen[0], seen[2]) and losses[0] != losses[1]
    assert torch.equal(seen[1], seen[3]) and torch.equal(seen[1], seen[5])
    assert planner.progress == 0, "it moves in training only"


def test_masks_as_measured():
    """Form masks: middle and size of what the plan's own cells show, a shift of the picture undone;
    of an object that is nowhere the picture's middle."""
    planner, obs = small(grounded=True).eval(), batch_of()
    logits = torch.full((2, 1 + K, 4, 16, 16), -20.0)
    logits[:, :, 0] = 0
    logits[1, 2, 3, 4:8, 1:3] = 20      # rows 4..7, columns 1 and 2 of 16
    planner.predict_cells = lambda plan: logits
    plan = planner.plan(obs, "masks")["plan"]
    assert plan.shape == (2, 1, planner.sets("masks")["plan"][1])
    plan = plan.view(2, 1 + K, 3, 3)
    assert plan[1, 2, 2].tolist() == pytest.approx([2 / 16, 6 / 16, (8 / 256) ** 0.5])
    assert plan[0, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-3)
    moved = planner.plan(obs | {"moved": torch.full((2, 3, 2), 0.1)}, "masks")["plan"]
    change = plan - moved.view_as(plan)
    torch.testing.assert_close(change, torch.tensor([0.1, 0.1, 0]).expand_as(plan))


@torch.no_grad()
def test_decoder_treats_objects_alike():
    planner, batch = small().eval(), batch_of()
    m = mask_planner.binary_masks(batch["masks"][:, 0], 3)
    predict = lambda masks: planner.predict(batch["frames"], batch["goal"], masks)
    prob, order = predict(m), [1, 2, 0]
    assert prob.shape == (2, 3, K, 32, 32)
    torch.testing.assert_close(predict(m[:, order]), prob[:, order])
    torch.testing.assert_close(predict(m[:, :1]), prob[:, :1])
    m[0, 1] = 0
    assert not predict(m)[0, 1].any() and predict(m)[1, 1].any(), "without a mask: nowhere"
    assert planner.decoder(torch.randn(2, 32, 3, 4), m[:, :1, :22, :30]).shape[3:] == (22, 30)


def test_films_show_two_horizons():
    """Of a planner that copies: the present masks, which obs holds at the pictures' resolution."""
    planner, obs = small(objects=2).eval(), batch_of()
    masks = obs.pop("masks")[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert planner.draw(obs) == []
    planner.predict = lambda frames, goal, m: m[:, :, None].expand(-1, -1, K, -1, -1)
    (a, one), (b, other) = planner.draw(obs | {"masks": masks})
    now = draw_masks(obs["frames"][0, -1].numpy(), (masks[0] * (masks[0] <= 2)).numpy())
    assert (a, b) == ("plan +8", "plan +32") and (one == now).all() and (other == now).all()


def test_batch_is_what_the_file_holds(videos):
    config = mask_planner.Config(history=3, stride=4)
    episode, t = np.array([0, 1]), np.array([6, videos.length[1] - 2])
    batch = mask_planner.make_batch(videos, episode, t, np.random.default_rng(0), config)
    pictures, masks = videos.arrays["obs/agentview_rgb"], videos.arrays["masks"]
    assert np.array_equal(batch["frames"][0], pictures[0][[0, 2, 6]]), "oldest first"
    assert np.array_equal(batch["goal"], np.stack([pictures[1][-1], pictures[0][-1]]))
    assert np.array_equal(batch["masks"][0], masks[0][[6, 10, 14, 22, 38], ::2, ::2])
    assert np.array_equal(batch["masks"][1], masks[1][[-2] + [-1] * K, ::2, ::2])
    for shape in ((6, 8), (5, 7)):
        masks, (y, x) = np.random.default_rng(0).integers(4, size=shape), np.indices(shape)
        full, image = masks[y - y % 2, x - x % 2], np.zeros((*shape, 3), np.uint8)
        assert np.array_equal(draw_masks(image, masks[::2, ::2]), draw_masks(image, full))


def test_validation_compares_with_copying_the_mask(videos):
    """A planner that copies scores what `copy` scores; no task has the fourth object."""
    a, b = torch.zeros(2, 3, 4, 5, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True        # rows 0, 1 and 1, 2: one of three
    a[1, 0, 0] = True                       # and the last ones are both empty
    assert mask_planner.iou(a, b).tolist() == pytest.approx([1 / 3, 0, 1])
    planner = small(size=videos.size, objects=4)
    planner.predict = lambda frames, goal, m: 0.99 * m[:, :, None].expand(-1, -1, K, -1, -1)
    scores = mask_planner.validate(planner, videos, samples=50)
    for group in scores.values():
        assert group["planner"] == pytest.approx(group["copy"])
    assert sum(group["n"][0] for group in scores.values()) == 3 * 50
    assert scores["moving"]["n"][-1] > 0 and (scores["moving"]["copy"] < 0.7).all()
    assert (scores["static"]["copy"] > 0.7).all() and "copy" in mask_planner.table(scores)
