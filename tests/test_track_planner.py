"""track_planner.py: the plan's tokens, augmentation, batches, scores."""

import copy

import numpy as np
import pytest
import torch

from conftest import SIZE, equal
import mask_planner
import track_planner
from core.episodes import CAMERAS
from track_planner import SPACING, STEPS

CASES = {"paper": ["--goal", "language", "--mask-ratio", "0.5"], "any": [], "ee": ["--track", "ee"]}


@pytest.fixture(params=CASES.values(), ids=CASES)
def asked(request, untrained):
    """A planner, its first batch."""
    planner, batches, *_ = untrained("track_planner", *request.param)
    return planner.eval(), batches(0)


def test_points_are_predicted_alone(asked):
    """No point depends on another; a picture whose patches are all masked is not seen."""
    planner, batch = asked
    assert not planner.config.mask_ratio or planner.image_head.kernel_size == (16, 16)
    images, points, goal = batch["image"], batch["tracks"][:, 0], batch["goal"]
    predicted, order = planner.predict(images, points, goal), torch.randperm(points.shape[1])
    torch.testing.assert_close(planner.predict(images, points[:, order], goal),
                               predicted[:, :, order], atol=1e-5, rtol=1e-4)
    assert planner.predict(images, points[:, :1], goal).shape == (4, STEPS, 1, 2)
    assert torch.equal(planner.encode(images, 1.0), planner.encode(255 - images, 1.0))


def test_track_tokens_carry_their_own_view_and_place(untrained, obs):
    """A view's tokens are how far its points will go, predicted in the picture of that view."""
    planner = untrained("track_planner")[0].eval()
    torch.nn.init.normal_(planner.track_head.weight, std=0.1)
    (places, width), tokens = planner.sets("tracks")["plan"], planner.plan(obs, "tracks")["plan"]
    assert width == 2 * STEPS and len(places.unique(dim=0)) == 64
    for view, picture in enumerate((obs["frames"][:, -1], obs["wrist"])):
        mine = torch.nonzero(places[:, 0] == view).flatten()[torch.randperm(32)]
        points = places[mine, 1:].expand(2, 32, 2)
        with torch.no_grad():
            far = planner.predict(picture, points, obs["goal"]) - points[:, None]   # (B, S, N, 2)
        far = far.transpose(1, 2).flatten(2) / track_planner.DISPLACEMENT_SCALE[view]
        torch.testing.assert_close(tokens[:, mine], far, atol=1e-4, rtol=1e-3)
    for form, length in (("tracks-8", 8), ("tracks-4", 4)):
        assert torch.equal(planner.plan(obs, form)["plan"], tokens[..., :2 * length])
    assert STEPS * SPACING == max(mask_planner.HORIZONS), "all plans look equally far ahead"


def test_the_latent_plan_is_of_the_hand_or_of_every_cell(asked, obs):
    planner, hand = asked[0], asked[0].config.track == "ee"
    plan, moved = (planner.plan(seen, "latent")["plan"]
                   for seen in (obs, obs | {"hand": obs["hand"] / 2}))
    assert plan.shape[1] == (1 if hand else (SIZE // 16) ** 2) and torch.equal(plan, moved) != hand
    assert planner.draw(obs)[0][1].shape == (SIZE, SIZE, 3)


def test_colours_are_jittered_if_asked():
    images, tracks = torch.full((16, 32, 32, 3), 100, dtype=torch.uint8), torch.zeros(16, 1, 1, 2)
    same, other = (track_planner.augment(images, tracks, strength)[0] for strength in (0.0, 0.3))
    assert torch.equal(same, images)    # shifts do not show in a plain picture
    assert other.dtype == torch.uint8 and (other.float() - images).abs().max() > 5


def test_batch_is_what_the_file_holds(untrained, videos):
    planner, batches, *_ = untrained("track_planner", "--goal", "language")
    episode, t, rng = np.arange(2), np.array([5, videos.length[1] - 3]), np.random.default_rng(0)
    for camera in CAMERAS:
        batch = track_planner.make_batch(videos, camera, episode, t, rng, planner.config)
        assert np.array_equal(batch["goal"], videos.text[[0, 0]])
        assert np.array_equal(batch["image"], videos.gather(f"obs/{camera}_rgb", episode, t))
        for b, n in np.ndindex(2, 32):
            true, now = videos.arrays[f"tracks/{camera}"][b].astype(np.float32), t[b]
            times = np.minimum(now + SPACING * np.arange(1 + STEPS), videos.length[b] - 1)
            k = np.flatnonzero((true[now] == batch["tracks"][b, 0, n]).all(-1))
            assert videos.arrays[f"visible/{camera}"][b][now, k].any(), "only points visible now"
            assert any(np.array_equal(true[times, i], batch["tracks"][b, :, n]) for i in k)
            assert any(np.array_equal(true[now - 1, i], batch["before"][b, 0, n]) for i in k)
    batch = batches(3)
    assert equal(batch, batches(3)), "it depends on the step alone, and holds both cameras"
    for camera, images in zip(CAMERAS, batch["image"].numpy().reshape(2, 2, SIZE, SIZE, 3)):
        frames = np.concatenate(videos.arrays[f"obs/{camera}_rgb"])
        assert all((frames == image).all((1, 2, 3)).any() for image in images)


def test_the_hands_path(videos):
    """MimicPlay's one point lies near the robot's mask, in the third-person picture."""
    config, t = track_planner.Config(track="ee", goal="language"), np.arange(0, 40, 8)
    assert track_planner.views_of(config, videos) == ["agentview"]
    batch = track_planner.make_batch(videos, "agentview", 0 * t, t, None, config)
    assert batch["tracks"].shape == (5, 1 + STEPS, 1, 2)
    for mask, (place,) in zip(videos.gather("masks", 0, t), batch["tracks"][:, 0]):
        gap = np.argwhere(mask == 1)[:, ::-1] + 0.5 - SIZE * place      # x, y
        assert np.linalg.norm(gap, axis=1).min() < SIZE / 16


@pytest.mark.filterwarnings("error")
def test_scores_of_points_that_stay(untrained, videos):
    """The trivial tracks, from their definition; nothing is scored beyond a short episode's end."""
    planner, short = untrained("track_planner")[0], copy.copy(videos)
    short.length, short.start = np.array([12, 12]), np.array([0, 12, 24])
    planner.track_head.requires_grad_(False).weight.zero_()     # predicts that points stay
    planner.track_head.bias.zero_()
    scores = track_planner.validate(planner, videos, samples=50)
    for rows in scores.values():
        stay = rows["stay"]["distance"]
        np.testing.assert_allclose(rows["planner"]["distance"], stay, rtol=1e-5)
        assert stay[2] > stay[0] > 0
    within = scores["agentview"]["stay"]["within"]
    assert f"{within:.1f} %" in track_planner.table(scores)
    scores = track_planner.validate(planner, short, samples=50)
    row = track_planner.table(scores).splitlines()[3].split()
    assert row[:2] == ["stay", f"{scores['agentview']['stay']['distance'][0]:.2f}"]
    assert row[2:4] == ["-", "-"]
