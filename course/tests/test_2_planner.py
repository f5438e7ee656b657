"""Assignment 2: the planner's tokens, decoder and batches, against loops and invariances."""

import numpy as np
import pytest
import torch

import mask_planner
from core import networks
from core.episodes import Episodes

K = len(mask_planner.HORIZONS)
grades = pytest.mark.grades


# --- block_causal_mask ----------------------------------------------------------------------------

@pytest.mark.parametrize("steps, tokens", [(3, 4), (4, 3), (2, 5)])
@grades("block_causal_mask")
def test_block_causal_mask_equals_a_loop(steps, tokens):
    """Mask2Act 3.4, GPT over pictures: row (step i, token a) may attend to column (step j, token b)
    if j <= i, whatever a and b; tokens of one step lie side by side."""
    mask, L = networks.block_causal_mask(steps, tokens), steps * tokens
    assert mask.shape == (L, L) and mask.dtype == torch.bool, "Mask2Act 3.4: (L, L) of True, False"
    for i, a, j, b in np.ndindex(steps, tokens, steps, tokens):
        assert mask[i * tokens + a, j * tokens + b] == (j <= i), \
            f"Mask2Act 3.4: step {i} and step {j} of a block-causal mask"


@grades("block_causal_mask")
def test_block_causal_mask_of_one():
    """Mask2Act 3.4: one step sees all of itself; one token per step is the usual causal mask."""
    assert networks.block_causal_mask(1, 4).all(), "Mask2Act 3.4: a step attends to all of its own"
    assert torch.equal(networks.block_causal_mask(5, 1), torch.ones(5, 5).tril().bool()), \
        "Mask2Act 3.4: with one token per step the mask is lower triangular"


# --- Planner.plan_from ----------------------------------------------------------------------------

def planner(history=3):
    torch.manual_seed(0)
    values = mask_planner.Config.PRESETS["tiny"] | dict(history=history)
    return mask_planner.MaskPlanner(mask_planner.Config(**values)).eval()


def tokens(p, T, B=2):
    return torch.randn(B, 1 + T, p.n, p.width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@grades("Planner.plan_from")
def test_each_token_has_its_place_and_time():
    """Mask2Act eq. 1: the transformer's input is token + position + time, step by step, goal first;
    its outputs for the frames are the plans."""
    p = planner()
    p.gpt.forward = lambda x, mask=None: x  # what comes out is then what goes in
    x = tokens(p, 3)
    plan = p.plan_from(x)
    assert plan.shape == (2, 3, p.n, p.width), "Mask2Act eq. 1: (B, 1 + T, n, D) -> (B, T, n, D)"
    for t, i in np.ndindex(3, p.n):
        wanted = x[:, 1 + t, i] + p.position[i] + p.time[1 + t, 0]
        torch.testing.assert_close(plan[:, t, i], wanted, atol=1e-5, rtol=1e-4,
                                   msg=f"Mask2Act eq. 1: token {i} of frame {t}")


@torch.no_grad()
@grades("Planner.plan_from")
def test_no_plan_depends_on_a_later_frame():
    """Mask2Act eq. 1: the plan of step t is made from the goal and from frames up to t."""
    p = planner()
    x = tokens(p, 3)
    later = x.clone()
    later[:, 3] += torch.randn(later[:, 3].shape)
    plan, changed = p.plan_from(x), p.plan_from(later)
    torch.testing.assert_close(plan[:, :2], changed[:, :2], atol=1e-5, rtol=1e-4,
                               msg="Mask2Act eq. 1: the last frame leaks into earlier plans")
    assert not torch.allclose(plan[:, 2], changed[:, 2], atol=1e-3), \
        "Mask2Act eq. 1: the last plan depends on the last frame"


@torch.no_grad()
@grades("Planner.plan_from")
def test_every_plan_depends_on_the_goal_and_on_the_past():
    """Mask2Act eq. 1: p = P(g, o): goal and earlier frames are attended to."""
    p = planner()
    x = tokens(p, 3)
    plan = p.plan_from(x)
    for step, name in ((0, "goal"), (1, "first frame")):
        other = x.clone()
        other[:, step] += 3 * torch.randn(other[:, step].shape)
        changed = (p.plan_from(other) - plan).abs().amax((0, 2, 3))
        assert (changed > 1e-5).all(), f"Mask2Act eq. 1: plans without the {name}"


@torch.no_grad()
@grades("Planner.plan_from")
def test_tokens_of_one_picture_attend_to_each_other():
    """Mask2Act 3.4, block-causal attention: also the first token of a picture depends on its
    last."""
    p = planner(history=1)
    x = tokens(p, 1)
    other = x.clone()
    other[:, 1, -1] += 3 * torch.randn(other[:, 1, -1].shape)
    assert not torch.allclose(p.plan_from(x)[:, 0, 0], p.plan_from(other)[:, 0, 0], atol=1e-5), \
        "Mask2Act 3.4: causal by picture, not by token"


@torch.no_grad()
@grades("Planner.plan_from")
def test_a_shorter_history_is_a_beginning():
    """Mask2Act eq. 1: with fewer frames than `history` the plans are those of the first frames."""
    p = planner()
    x = tokens(p, 3)
    short = p.plan_from(x[:, :3])
    assert short.shape[1] == 2, "Mask2Act eq. 1: one plan per frame"
    torch.testing.assert_close(short, p.plan_from(x)[:, :2], atol=1e-4, rtol=1e-3,
                               msg="Mask2Act eq. 1: times and mask of the first steps are needed")


# --- Decoder.forward ------------------------------------------------------------------------------

def decoder(bias=None):
    """A decoder; with a bias, its last layer outputs that and nothing else."""
    torch.manual_seed(0)
    d = mask_planner.Decoder(32).eval()
    if bias is not None:
        d.out.weight.data.zero_()
        d.out.bias.data.copy_(bias)
    return d


def scene(B=2, N=3, H=32, W=40):
    """Plans, and masks of a rectangle per object."""
    masks = torch.zeros(B, N, H, W)
    for b, n in np.ndindex(B, N):
        masks[b, n, 3 * n:3 * n + 12, 5 * b:5 * b + 9] = 1
    return torch.randn(B, 32, 4, 5, generator=torch.Generator().manual_seed(2)), masks


@torch.no_grad()
@pytest.mark.parametrize("H, W", [(32, 40), (22, 30), (8, 8)])
@grades("Decoder.forward")
def test_decoder_outputs_probabilities_of_the_masks_size(H, W):
    """Mask2Act eq. 2: a probability per pixel, for every object and horizon."""
    plan, masks = scene(H=H, W=W)
    prob = decoder()(plan, masks)
    assert prob.shape == (2, 3, K, H, W), "Mask2Act eq. 2: (B, N, K, H, W)"
    assert 0 <= prob.min() and prob.max() <= 1, "Mask2Act eq. 2: probabilities lie in [0, 1]"


@torch.no_grad()
@grades("Decoder.forward")
def test_each_horizon_has_a_sigmoid_of_its_own():
    """Mask2Act eq. 2: a pixel belongs to an object, or not, at each horizon: independent
    probabilities, which compete in eq. 3 only."""
    bias = torch.linspace(-3, 4, K)
    prob = decoder(bias)(*scene())
    torch.testing.assert_close(prob, bias.sigmoid()[:, None, None].expand_as(prob), atol=1e-4,
                               rtol=1e-3, msg="Mask2Act eq. 2: sigmoid of the last layer's output")


@torch.no_grad()
@grades("Decoder.forward")
def test_an_object_without_a_mask_is_nowhere():
    """Mask2Act eq. 2 and 3.2: hidden now, it is not tracked (XMem's selector): probability 0."""
    plan, masks = scene()
    masks[0, 1] = 0
    prob = decoder(torch.ones(K))(plan, masks)
    assert not prob[0, 1].any(), "Mask2Act eq. 2: no mask now, none in the future"
    assert (prob.flatten(2).amin(2) > 0.5).sum() == 5, "Mask2Act eq. 2: the others are untouched"


@torch.no_grad()
@grades("Decoder.forward")
def test_objects_pass_independently():
    """Mask2Act eq. 2 is of one object n: others, their order and number change nothing."""
    d, (plan, masks) = decoder(), scene()
    prob = d(plan, masks)
    for order in ([2, 0, 1], [1], [0, 2]):
        torch.testing.assert_close(d(plan, masks[:, order]), prob[:, order], atol=1e-5, rtol=1e-3,
                                   msg=f"Mask2Act eq. 2: objects {order} alone or in this order")


@torch.no_grad()
@grades("Decoder.forward")
def test_each_sample_is_moved_by_its_own_plan():
    """Mask2Act eq. 2: m(t + 1) = D(p_t, m_t); of a batch each sample has its own p."""
    d, (plan, masks) = decoder(), scene()
    other = plan.clone()
    other[1] += torch.randn(other[1].shape)
    change = (d(other, masks) - d(plan, masks)).abs().amax((2, 3, 4))
    assert change[0].max() < 1e-5, "Mask2Act eq. 2: another sample's plan moves these masks"
    assert change[1].min() > 1e-4, "Mask2Act eq. 2: an object is not moved by its sample's plan"


@torch.no_grad()
@pytest.mark.parametrize("y, x", [(0, 0), (0, -1), (-1, 0)])
@grades("Decoder.forward")
def test_plan_and_masks_are_maps_of_one_picture(y, x):
    """Mask2Act eq. 2: a plan's cell stands over the pixels of its place, neither mirrored nor
    transposed."""
    d, (plan, masks) = decoder(), scene(1, 1, 64, 64)
    plan = torch.zeros(1, 32, 4, 4)
    other = plan.clone()
    other[..., y, x] = 3
    change = (d(other, masks) - d(plan, masks)).abs().mean((0, 1, 2))
    quarter = change.unflatten(1, (2, 32)).unflatten(0, (2, 32)).mean((1, 3))
    assert quarter.argmax() == 2 * (y % 4 // 2) + x % 4 // 2, \
        f"Mask2Act eq. 2: a change of the plan at row {y}, column {x} appears elsewhere"


@grades("Decoder.forward")
def test_everything_in_the_decoder_is_used():
    """Mask2Act eq. 2: features of masks and plan, skips included, all get a gradient."""
    d, (plan, masks) = decoder(), scene()
    plan.requires_grad_()
    d(plan, masks).square().sum().backward()
    unused = [name for name, p in [*d.named_parameters(), ("plan", plan)]
              if p.grad is None or not p.grad.any()]
    assert not unused, f"Mask2Act eq. 2: no gradient for {unused}"


# --- make_batch -----------------------------------------------------------------------------------

def episodes(lengths=(50, 41), tasks=(0, 0)):
    """Made-up ones in the file's shapes, with pictures and masks of random numbers."""
    rng, e = np.random.default_rng(0), Episodes.__new__(Episodes)
    e.length, e.task = np.array(lengths), np.array(tasks)
    e.own_goal, e.start = np.zeros(len(lengths), bool), np.concatenate([[0], np.cumsum(lengths)])
    e.arrays = {"obs/agentview_rgb": [rng.integers(256, size=(n, 6, 8, 3), dtype=np.uint8)
                                      for n in lengths],
                "masks": [rng.integers(4, size=(n, 6, 8), dtype=np.uint8) for n in lengths]}
    return e


def batch(e, episode, t, history=3, stride=4):
    config = mask_planner.Config(history=history, stride=stride)
    return mask_planner.make_batch(e, np.array(episode), np.array(t), np.random.default_rng(0),
                                   config)


@grades("make_batch")
def test_frames_are_the_last_ones_oldest_first():
    """Mask2Act eq. 1: o from t - h to t, `stride` steps apart; before the start the first frame."""
    e = episodes()
    found, pictures = batch(e, [0, 1], [20, 5])["frames"], e.arrays["obs/agentview_rgb"]
    assert found.shape == (2, 3, 6, 8, 3) and found.dtype == np.uint8, "Mask2Act eq. 1: frames"
    assert np.array_equal(found[0], pictures[0][[12, 16, 20]]), "Mask2Act eq. 1: oldest first"
    assert np.array_equal(found[1], pictures[1][[0, 1, 5]]), "Mask2Act eq. 1: none before the start"


@grades("make_batch")
def test_masks_are_of_now_and_of_every_horizon():
    """Mask2Act eq. 2: m at t, then at t + delta t for each of HORIZONS; after the end, the last."""
    e = episodes()
    found, masks = batch(e, [0, 1], [3, 30])["masks"], e.arrays["masks"]
    assert found.shape == (2, 1 + K, 3, 4), "Mask2Act eq. 2: (B, 1 + K, H / 2, W / 2)"
    for k, ahead in enumerate([0, *mask_planner.HORIZONS]):
        assert np.array_equal(found[0, k], masks[0][3 + ahead, ::2, ::2]), \
            f"Mask2Act eq. 2: masks {ahead} steps ahead, every second pixel"
        assert np.array_equal(found[1, k], masks[1][min(30 + ahead, 40), ::2, ::2]), \
            f"Mask2Act eq. 2: {ahead} steps ahead, at most the episode's last"


@grades("make_batch")
def test_goal_is_how_another_episode_of_the_task_ends():
    """Mask2Act 4.1 (PLEX): the goal picture is another demonstration's last frame."""
    e = episodes((30, 41, 25, 33), (0, 0, 1, 1))
    found = batch(e, [0, 1, 2, 3], [3, 30, 7, 2])["goal"]
    for b, other in enumerate([1, 0, 3, 2]):
        assert np.array_equal(found[b], e.arrays["obs/agentview_rgb"][other][-1]), \
            "Mask2Act 4.1: the last frame of the task's other episode"


@grades("make_batch")
def test_no_picture_of_the_future_is_an_input():
    """Mask2Act eq. 1: what happens after t is in `masks` and in the goal, never in the frames."""
    e = episodes()
    before = batch(e, [0], [10], history=2)["frames"]
    e.arrays["obs/agentview_rgb"][0][11:] = 0
    assert np.array_equal(batch(e, [0], [10], history=2)["frames"], before), \
        "Mask2Act eq. 1: frames after t are an input"
