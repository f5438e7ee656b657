"""mask_planner.py: losses equal loops, tokens know their place, plans in numbers, scores."""

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
    planner.eval().loss(batch)
    assert planner.progress.item() == pytest.approx(0.46), "a step of 100, in training alone"


def test_shuffled_learns_the_other_videos_future():
    batch, own, shuffled = batch_of(), small().eval(), small(shuffled=True).eval()
    shuffled.load_state_dict(own.state_dict())
    now, later = batch["masks"].split((1, K), 1)
    other = own.loss(batch | {"masks": torch.cat([now, later.flip(0)], 1)})[0]      # B = 2
    assert shuffled.loss(batch)[0] == other != own.loss(batch)[0]


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
def test_the_plan_is_that_of_the_last_frame():
    planner, batch = small(history=3).eval(), batch_of(T=3)
    plan, last = planner(batch["frames"], batch["goal"]), batch["frames"][:, -1]
    made, (places, _) = planner.plan(batch, "latent"), planner.sets("latent")["plan"]
    assert plan.shape == (2, 3, planner.n, 32)
    assert places[6].tolist() == [0, 2.5 / 4, 1.5 / 4], "third person; row 1, column 2 of 4 x 4"
    torch.testing.assert_close(made["plan"], plan[:, -1])
    torch.testing.assert_close(made["picture"], planner.encode(last))


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
    there = torch.zeros(2, 1 + K, 3, 1)
    there[1, 2, 2] = 1
    torch.testing.assert_close(change, torch.tensor([0.1, 0.1, 0]) * there, atol=1e-5, rtol=1e-4)
    now = planner.plan(obs, "now")["plan"]
    assert torch.equal(now[:, 0], plan[:, 0].flatten(1))
    assert now.shape[2] == planner.sets("now")["plan"][1]


def test_films_show_two_horizons():
    """Of a planner that copies: the present masks, which obs holds at the pictures' resolution."""
    planner, obs = small(objects=2).eval(), batch_of()
    masks = obs.pop("masks")[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert planner.draw(obs) == []
    planner.predict = lambda frames, goal, m: m[:, :, None].expand(-1, -1, K, -1, -1)
    (a, one), (b, other) = planner.draw(obs | {"masks": masks})
    now = draw_masks(obs["frames"][0, -1].numpy(), (masks[0] * (masks[0] <= 2)).numpy())
    assert (a, b) == ("plan +8", "plan +32") and (one == now).all() and (other == now).all()


def test_masks_of_every_second_pixel_are_drawn_over_all():
    for shape in ((6, 8), (5, 7)):
        masks, (y, x) = np.random.default_rng(0).integers(4, size=shape), np.indices(shape)
        full, image = masks[y - y % 2, x - x % 2], np.zeros((*shape, 3), np.uint8)
        assert np.array_equal(draw_masks(image, masks[::2, ::2]), draw_masks(image, full))


def test_validation_compares_with_copying_the_mask(videos):
    """A planner that copies scores what `copy` scores; no task has the fourth object."""
    planner = small(size=videos.size, objects=4)
    planner.predict = lambda frames, goal, m: 0.99 * m[:, :, None].expand(-1, -1, K, -1, -1)
    scores = mask_planner.validate(planner, videos, samples=50)
    for group in scores.values():
        assert group["planner"] == pytest.approx(group["copy"])
    assert sum(group["n"][0] for group in scores.values()) == 3 * 50
    assert scores["moving"]["n"][-1] > 0 and (scores["moving"]["copy"] < 0.7).all()
    assert (scores["static"]["copy"] > 0.7).all() and "copy" in mask_planner.table(scores)
