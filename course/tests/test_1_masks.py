"""Assignment 1: masks and their losses, against loops, definitions and invariances."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mask_planner

grades = pytest.mark.grades


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- binary_masks ---------------------------------------------------------------------------------

@grades("binary_masks")
def test_binary_masks_equal_a_loop():
    """Mask2Act 3.2: mask M of integers -> N binary masks m^n; 0 is the background, no object."""
    masks = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 4, 1]], dtype=torch.uint8)
    found = mask_planner.binary_masks(masks, 3)
    assert found.shape == (3, 3, 4), "(H, W) -> (N, H, W)"
    for n, y, x in np.ndindex(3, 3, 4):
        assert found[n, y, x] == (masks[y, x] == n + 1), "m^n is 1 where M is n, n = 1..N"


@grades("binary_masks")
def test_binary_masks_are_numbers_that_losses_can_use():
    found = mask_planner.binary_masks(torch.tensor([[0, 1], [2, 9]]), 2)
    assert found.dtype == torch.float32, "Mask2Act 3.2: masks of 0.0 and 1.0, for D and the losses"
    assert found.sum() == 2, "an object beyond N (9 here) belongs to no mask"


@grades("binary_masks")
def test_binary_masks_keep_the_leading_dimensions():
    """Mask2Act 3.2: (..., H, W) -> (..., N, H, W), each picture on its own."""
    masks = torch.randint(0, 4, (2, 5, 3, 4), generator=torch.Generator().manual_seed(0))
    found = mask_planner.binary_masks(masks, 3)
    assert found.shape == (2, 5, 3, 3, 4), "Mask2Act 3.2: (..., H, W) -> (..., N, H, W)"
    for b, t in np.ndindex(2, 5):
        assert torch.equal(found[b, t], mask_planner.binary_masks(masks[b, t], 3)), \
            "Mask2Act 3.2: each picture's masks depend on that picture alone"


# --- soft_aggregate -------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [1, 2, 4])
@grades("soft_aggregate")
def test_soft_aggregate_equals_a_loop(N):
    """Mask2Act eq. 3 (STM): background prod (1 - p_n); softmax of the logits is in proportion to
    the odds p / (1 - p) of background and objects."""
    p = 0.02 + 0.96 * random(2, N, 3, 5)
    logits = mask_planner.soft_aggregate(p)
    assert logits.shape == (2, N + 1, 3, 5), "Mask2Act eq. 3: N objects -> N + 1 classes"
    share = logits.softmax(1)
    for b, y, x in np.ndindex(2, 3, 5):
        one = p[b, :, y, x].tolist()
        one = [math.prod(1 - q for q in one), *one]
        odds = [q / (1 - q) for q in one]
        wanted = torch.tensor([o / sum(odds) for o in odds])
        torch.testing.assert_close(share[b, :, y, x], wanted, atol=1e-4, rtol=1e-3,
                                   msg=lambda found: "Mask2Act eq. 3: shares in proportion to the "
                                   "odds p / (1 - p), background prod (1 - p): " + found)


@grades("soft_aggregate")
def test_soft_aggregate_is_finite_at_the_ends():
    """Mask2Act eq. 3: p = 0 and p = 1 would give infinite logits; a clamp prevents it."""
    p = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])[None].requires_grad_()
    logits = mask_planner.soft_aggregate(p)
    assert logits.isfinite().all(), \
        "Mask2Act eq. 3: the logits of p = 0 or 1 must be finite (in float32 1 - 1e-8 is 1)"
    logits.softmax(1).square().sum().backward()
    assert p.grad.isfinite().all(), "Mask2Act eq. 3: so must the gradients"
    label = logits.argmax(1)[0].tolist()
    assert label[:3] == [0, 1, 2], "Mask2Act eq. 3: no object -> class 0, the background, is first"


@grades("soft_aggregate")
def test_soft_aggregate_treats_objects_alike():
    """Mask2Act eq. 3: objects in another order are classes in that order; absent ones change
    nothing."""
    p, order = 0.02 + 0.9 * random(2, 3, 4, 4), [2, 0, 1]
    share = mask_planner.soft_aggregate(p).softmax(1)
    other = mask_planner.soft_aggregate(p[:, order]).softmax(1)
    torch.testing.assert_close(other[:, 1:], share[:, 1:][:, order], msg="Mask2Act eq. 3: order")
    more = mask_planner.soft_aggregate(torch.cat([p, 0 * p[:, :1]], 1)).softmax(1)
    torch.testing.assert_close(more[:, :4], share, atol=1e-4, rtol=1e-3,
                               msg="Mask2Act eq. 3: an object with p = 0 changes the others")


@grades("soft_aggregate")
def test_soft_aggregate_of_any_shape():
    """Mask2Act eq. 3 holds pixel by pixel: (B, N, ...) of one pixel or with horizons."""
    p = 0.1 + 0.8 * random(2, 3, 4, 5, 6)
    whole = mask_planner.soft_aggregate(p)
    one = mask_planner.soft_aggregate(p[:, :, 2, 3, 4])
    assert whole.shape == (2, 4, 4, 5, 6) and one.shape == (2, 4)
    torch.testing.assert_close(whole[:, :, 2, 3, 4], one, msg="Mask2Act eq. 3: pixels are mixed")


# --- hardest_fraction -----------------------------------------------------------------------------

@pytest.mark.parametrize("progress, wanted", [(0, 1), (0.1, 1), (0.2, 1), (0.45, 0.575),
                                              (0.6, 0.32), (0.7, 0.15), (1, 0.15), (1.5, 0.15)])
@grades("hardest_fraction")
def test_hardest_fraction(progress, wanted):
    """XMem's bootstrapping: all pixels until 20 % of the training, then fewer, linearly, to 15 % of
    them at 70 %; it stays there."""
    assert mask_planner.hardest_fraction(progress) == pytest.approx(wanted, abs=1e-6), \
        f"XMem's bootstrapping: at {progress} of the training {wanted} of the pixels count"


# --- bootstrapped_cross_entropy -------------------------------------------------------------------

def one_loop(logits, target, hardest):
    """XMem's bootstrapping written out: the mean of the largest losses of each picture."""
    means = []
    for b in range(len(logits)):
        losses = [-math.log(logits[b, :, y, x].softmax(0)[target[b, y, x]])
                  for y, x in np.ndindex(*target.shape[1:])]
        count = max(1, int(hardest * len(losses)))
        means.append(sum(sorted(losses)[-count:]) / count)
    return sum(means) / len(means)


@pytest.mark.parametrize("hardest", [1, 0.75, 0.25])
@grades("bootstrapped_cross_entropy")
def test_bootstrapped_cross_entropy_equals_a_loop(hardest):
    """Mask2Act 3.2, bootstrapped cross-entropy (XMem): the mean over each picture's hardest
    pixels, then over pictures."""
    logits = 3 * random(3, 4, 4, 6) - 1
    target = torch.randint(0, 4, (3, 4, 6), generator=torch.Generator().manual_seed(1))
    loss = mask_planner.bootstrapped_cross_entropy(logits, target, hardest)
    assert loss.shape == (), "a scalar"
    assert loss.item() == pytest.approx(one_loop(logits, target, hardest), rel=1e-3), \
        f"Mask2Act 3.2: bootstrapped cross-entropy of the hardest {hardest} of 24 pixels"


@grades("bootstrapped_cross_entropy")
def test_every_picture_has_hardest_pixels_of_its_own():
    """Mask2Act 3.2 (XMem): an easy picture counts as much as one that is wrong all over."""
    logits, target = torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)
    logits[0, 1], logits[1, 0] = 5, 5  # the first all wrong, the second all right
    loss = mask_planner.bootstrapped_cross_entropy(logits, target, 0.5).item()
    assert loss == pytest.approx(F.softplus(torch.tensor([5.0, -5.0])).mean().item(), rel=1e-4), \
        "Mask2Act 3.2: the hardest pixels are chosen per picture, not per batch"


@grades("bootstrapped_cross_entropy")
def test_one_pixel_is_the_least():
    """Mask2Act 3.2 (XMem): a fraction of less than one pixel is one pixel, the hardest."""
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 1, 0] = 4
    target = torch.zeros(1, 2, 2, dtype=torch.long)
    loss = mask_planner.bootstrapped_cross_entropy(logits, target, 0.01).item()
    assert loss == pytest.approx(math.log(1 + math.exp(4)), rel=1e-4), \
        "Mask2Act 3.2: at least one pixel counts, or the mean is of nothing"


@grades("bootstrapped_cross_entropy")
def test_easy_pixels_get_no_gradient():
    """Mask2Act 3.2 (XMem): the gradient goes to the hardest pixels, and to no others."""
    logits = (3 * random(2, 3, 4, 4)).requires_grad_()
    target = torch.zeros(2, 4, 4, dtype=torch.long)
    mask_planner.bootstrapped_cross_entropy(logits, target, 0.25).backward()
    assert (logits.grad.abs().sum(1) > 0).flatten(1).sum(1).tolist() == [4, 4], \
        "Mask2Act 3.2: a quarter of 16 pixels of each picture has a gradient"


# --- dice -----------------------------------------------------------------------------------------

@grades("dice")
def test_dice_equals_a_loop():
    """Mask2Act 3.2, dice loss (XMem): 1 - (2 |m g| + 1) / (|m| + |g| + 1) per object."""
    m, g = random(2, 3, 4, 5), (random(2, 3, 4, 5, seed=1) > 0.6).float()
    found = mask_planner.dice(m, g)
    assert found.shape == (2, 3), "Mask2Act 3.2: one dice loss per sample and object, (B, N)"
    for b, n in np.ndindex(2, 3):
        both = sum(m[b, n, y, x] * g[b, n, y, x] for y, x in np.ndindex(4, 5))
        wanted = 1 - (2 * both + 1) / (m[b, n].sum() + g[b, n].sum() + 1)
        assert found[b, n].item() == pytest.approx(wanted.item(), abs=1e-5), \
            "Mask2Act 3.2: dice is 1 - (2 |m g| + 1) / (|m| + |g| + 1), plain sums"


@grades("dice")
def test_dice_is_nought_where_all_is_right():
    """Mask2Act 3.2, dice: 0 for equal masks, also where both are empty; near 1 for disjoint."""
    g = torch.zeros(1, 3, 20, 30)
    g[0, 0, :, :10], g[0, 1, 3, 4] = 1, 1  # many pixels, one, none
    assert mask_planner.dice(g, g).abs().max() < 1e-6, "Mask2Act 3.2: dice of equal masks is 0"
    apart = mask_planner.dice(g.flip(-1), g)[0, 0].item()
    assert apart == pytest.approx(1 - 1 / 401, abs=1e-5), "Mask2Act 3.2: dice of disjoint masks"


@grades("dice")
def test_dice_goes_down_towards_the_target():
    """Mask2Act 3.2, dice: its gradient raises pixels of the object and lowers the others."""
    g = torch.zeros(1, 1, 4, 4)
    g[..., :2] = 1
    m = torch.full((1, 1, 4, 4), 0.5).requires_grad_()
    mask_planner.dice(m, g).sum().backward()
    assert (m.grad[g > 0] < 0).all() and (m.grad[g == 0] > 0).all(), "Mask2Act 3.2: dice, sign"


# --- iou ------------------------------------------------------------------------------------------

@grades("iou")
def test_iou_equals_a_loop():
    """Intersection over union |m & g| / |m | g|, the score beside Mask2Act 3.2's losses."""
    m, g = random(2, 3, 4, 5) > 0.5, random(2, 3, 4, 5, seed=1) > 0.4
    found = mask_planner.iou(m, g)
    assert found.shape == (2, 3) and found.is_floating_point(), "IoU: (..., H, W) -> (...), float"
    for b, n in np.ndindex(2, 3):
        pairs = list(zip(m[b, n].flatten().tolist(), g[b, n].flatten().tolist()))
        wanted = sum(x and y for x, y in pairs) / sum(x or y for x, y in pairs)
        assert found[b, n].item() == pytest.approx(wanted), "IoU = intersection / union"


@grades("iou")
def test_iou_of_corner_cases():
    """IoU (Mask2Act 3.2's masks): no object, one pixel, all pixels, disjoint."""
    none = torch.zeros(4, 5, dtype=torch.bool)
    one = none.clone()
    one[2, 3] = True
    for m, g, wanted, case in ((none, none, 1, "both empty"), (none, one, 0, "one empty"),
                               (one, one, 1, "the same pixel"), (~none, one, 1 / 20, "one of all"),
                               (one, one.flip(0), 0, "disjoint"), (~none, ~none, 1, "all")):
        assert mask_planner.iou(m, g).item() == pytest.approx(wanted, abs=1e-4), f"IoU: {case}"
        assert mask_planner.iou(g, m).item() == pytest.approx(wanted, abs=1e-4), f"{case}, swap"
