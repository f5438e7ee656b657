"""Assignment 6, motion (AVDC section 3.3): from where points are seen to subgoals of the hand."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from sims import camera
from video_control import flow, motion

# eye (3,); right, down, ahead as rows (3, 3); focal length in pictures
VIEW = np.array([0.1, -0.9, 0.8]), Rotation.from_euler("x", -2.2).as_matrix(), 1.1
TURN, WAY = Rotation.from_rotvec([0.1, -0.2, 0.3]).as_matrix(), np.array([0.03, -0.05, 0.04])
POINTS = VIEW[0] + VIEW[1][2] + np.random.default_rng(0).uniform(-0.25, 0.25, (300, 3))


def seen(points):
    """Where the picture shows points, from a pinhole's definition."""
    eye, (right, down, ahead), focal = VIEW
    place = lambda p: (0.5 + focal * (p - eye) @ right / ((p - eye) @ ahead),
                       0.5 + focal * (p - eye) @ down / ((p - eye) @ ahead))
    return np.array([place(p) for p in points]).reshape(-1, 2)


@pytest.mark.grades("project")
def test_a_pinhole_projects():
    """AVDC 3.3, L_trans (K T x): right and down of the eye over the depth ahead, times the focal
    length, from the middle of the picture."""
    places, depth = camera.project(POINTS, *VIEW)
    assert places.shape == (300, 2) and depth.shape == (300,)
    assert np.allclose(places, seen(POINTS), atol=1e-6)
    assert np.allclose(depth, (POINTS - VIEW[0]) @ VIEW[1][2], atol=1e-6)
    middle, one = camera.project(VIEW[0] + VIEW[1][2], *VIEW)
    assert np.allclose(middle, 0.5) and np.allclose(one, 1)


@pytest.mark.grades("project")
def test_a_camera_that_moves_projects_each_moment_on_its_own():
    """AVDC 3.3, L_trans: eye, axes and focal length of each moment broadcast against its points, as
    `Replay.follow` gives them."""
    turns = Rotation.from_euler("x", [[-2.2], [-2.0], [-1.8]]).as_matrix().reshape(3, 1, 3, 3)
    eyes, focals = VIEW[0] + np.arange(3)[:, None, None] * 0.01, np.array([1.1, 1.2, 1.3])
    points = np.stack([POINTS[:5], POINTS[5:10], POINTS[10:15]])
    places, depth = camera.project(points, eyes, turns, focals[:, None, None])
    assert places.shape == (3, 5, 2) and depth.shape == (3, 5)
    for k in range(3):
        one, ahead = camera.project(points[k], eyes[k, 0], turns[k, 0], focals[k])
        assert np.allclose(places[k], one) and np.allclose(depth[k], ahead)


@pytest.mark.grades("project")
def test_what_is_behind_the_eye_has_no_place():
    """AVDC 3.3, L_trans: nan behind the camera, and a negative depth; others are unchanged."""
    both = np.stack([VIEW[0] + VIEW[1].T @ [0.1, 0.2, z] for z in (2, -2)])
    places, depth = camera.project(both, *VIEW)
    assert np.isfinite(places[0]).all() and np.isnan(places[1]).all()
    assert np.allclose(depth, [2, -2])


@pytest.mark.grades("read")
@pytest.mark.parametrize("h, w", [(4, 4), (3, 5)])
def test_flow_is_read_between_its_cells(h, w):
    """AVDC 3.2, 3.3 (flow at the object's points): bilinear between the middles of the cells, x
    right, y down, beyond the last middles as at the edge."""
    torch.manual_seed(0)
    field, places = torch.randn(2, 2, h, w), torch.rand(2, 9, 2)
    found = flow.read(field, places)
    assert found.shape == (2, 9, 2)
    for b, p in np.ndindex(2, 9):
        x, y = (places[b, p] * torch.tensor([w, h]) - 0.5).tolist()
        wanted, left, top = torch.zeros(2), int(np.floor(x)), int(np.floor(y))
        for i, j in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            share = (1 - abs(x - j)) * (1 - abs(y - i))
            wanted += share * field[b, :, min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
        torch.testing.assert_close(found[b, p], wanted, atol=1e-4, rtol=1e-4)


def off(R, t, points, turn, way):
    """Largest distance between where two motions bring the points, metres."""
    assert np.allclose(R @ R.T, np.eye(3), atol=1e-6) and np.linalg.det(R) > 0, "a rotation"
    return np.linalg.norm(points @ R.T + t - points @ turn.T - way, axis=1).max()


@pytest.mark.grades("fit_motion")
@pytest.mark.parametrize("turn, way", [
    (np.eye(3), np.zeros(3)), (np.eye(3), WAY), (TURN, np.zeros(3)), (TURN, WAY),
    (TURN.T, -WAY), (Rotation.from_rotvec([0, 0.5, -0.4]).as_matrix(), np.array([0, 0.1, -0.1]))],
    ids=["still", "way", "turn", "both", "back", "far"])
def test_a_rigid_motion_is_found_from_one_picture(turn, way):
    """AVDC 3.3, L_trans: the rotation and way that bring points with a known depth to where the
    next picture shows them; exact targets give it to 5 mm (the prior pulls a little)."""
    R, t, good = motion.fit_motion(POINTS, seen(POINTS @ turn.T + way), VIEW, 1e-3)
    assert R.shape == (3, 3) and t.shape == (3,) and good.shape == (300,)
    assert off(R, t, POINTS, turn, way) < 0.005
    assert good.all()


@pytest.mark.grades("fit_motion")
def test_bad_targets_are_left_out():
    """AVDC 3.3, L_trans with outliers (the authors: RANSAC): 30 % of the points went elsewhere;
    the motion is that of the rest, and `good` says which these are."""
    rng = np.random.default_rng(1)
    targets = seen(POINTS @ TURN.T + WAY) + rng.normal(0, 1e-3, (300, 2))
    wrong = np.arange(300) < 90
    targets[wrong] = 0.3 + 0.4 * rng.random((90, 2))
    R, t, good = motion.fit_motion(POINTS, targets, VIEW, 1e-3)
    assert off(R, t, POINTS, TURN, WAY) < 0.02
    assert good[~wrong].mean() > 0.95 and good[wrong].mean() < 0.1


@pytest.mark.grades("fit_motion")
def test_outliers_on_one_side_do_not_pull():
    """AVDC 3.3, L_trans with outliers: a quarter, all moved the same way as by a hand, is a robust
    minimum's outlier, too, and shifts the motion of the rest by at most 5 mm."""
    targets = seen(POINTS @ TURN.T + WAY)
    targets[:75] += [0.2, 0.1]
    R, t, good = motion.fit_motion(POINTS, targets, VIEW, 1e-3)
    assert off(R, t, POINTS, TURN, WAY) < 0.005 and good[75:].all() and not good[:75].any()


@pytest.mark.grades("fit_motion")
def test_a_small_object_does_not_fly_off():
    """AVDC 3.3, differs (the prior): ten points within a centimetre, seen with the noise of a
    pixel of 96, hardly show their depth; that they stand still is found to 15 cm."""
    small = VIEW[0] + VIEW[1][2] + np.random.default_rng(0).uniform(-0.005, 0.005, (10, 3))
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0, 1 / 96, (10, 2))
        R, t, _ = motion.fit_motion(small, seen(small) + noise, VIEW, 1 / 96)
        assert off(R, t, small, np.eye(3), np.zeros(3)) < 0.15


@pytest.mark.grades("fit_motion")
def test_motions_do_not_depend_on_where_the_world_begins():
    """AVDC 3.3, L_trans: camera and points moved together by c: the same rotation, and points end
    moved by c."""
    c, targets = np.array([3.0, -2.0, 1.0]), seen(POINTS @ TURN.T + WAY)
    R, t, _ = motion.fit_motion(POINTS + c, targets, (VIEW[0] + c, *VIEW[1:]), 1e-3)
    assert off(R, t, POINTS + c, TURN, WAY + c - TURN @ c) < 0.005


@pytest.mark.grades("infer_motions")
def test_motions_are_chained_from_picture_to_picture(monkeypatch):
    """AVDC 3.3: step k fits the points, moved by all motions before, to where the flow from
    picture k to k + 1 brings the places at which picture k shows them; without motion, none."""
    truth = [(TURN, WAY), (TURN.T, WAY), (np.eye(3), -WAY), (TURN, 2 * WAY)]
    world, asked = [POINTS[:40]], []
    for R, t in truth:
        world.append(world[-1] @ R.T + t)

    def correspond(k, places, kept):
        assert np.allclose(places, seen(world[k]), atol=1e-6), f"places in picture {k}"
        assert np.array_equal(kept, np.arange(40))
        asked.append(k)
        return seen(world[k + 1])

    def fit(points, targets, view, noise):
        k = asked[-1]
        assert np.allclose(points, world[k], atol=1e-6), f"points of picture {k}"
        assert np.allclose(targets, seen(world[k + 1])) and view is VIEW and noise == 0.01
        return *truth[k], np.ones(len(points), bool)

    monkeypatch.setattr(motion, "fit_motion", fit)
    found = motion.infer_motions(world[0], world[0], correspond, VIEW, 0, 0.01)
    assert list(found) == []
    found = motion.infer_motions(seen(world[0]), world[0], correspond, VIEW, 4, 0.01)
    assert asked == [0, 1, 2, 3] and len(found) == 4
    for (R, t), (turn, way) in zip(found, truth):
        assert np.allclose(R, turn) and np.allclose(t, way)


@pytest.mark.grades("infer_motions")
def test_points_that_went_another_way_are_lost_for_good(monkeypatch):
    """AVDC 3.3, differs: bad targets leave with their places and numbers, as long as over a fifth
    of all points is left; a step that would leave a fifth or fewer loses none."""
    stays, kept_at = ([0, 1, 2, 3, 5, 7, 9], [1, 2, 5, 7], [2, 5], [1, 5, 7], [1, 5, 7]), []

    def correspond(k, places, kept):
        assert np.allclose(places, seen(POINTS[kept])), "places and numbers of the same points"
        kept_at.append(kept.tolist())
        return seen(POINTS[kept])

    def fit(points, targets, view, noise):
        assert np.allclose(points, POINTS[kept_at[-1]]) and len(targets) == len(points)
        return np.eye(3), np.zeros(3), np.isin(kept_at[-1], stays[len(kept_at) - 1])

    monkeypatch.setattr(motion, "fit_motion", fit)
    points = POINTS[:10]
    assert len(motion.infer_motions(seen(points), points, correspond, VIEW, 5, 0.01)) == 5
    assert kept_at == [[*range(10)], stays[0], stays[1], stays[1], stays[3]]


@pytest.mark.grades("grasp_point")
def test_the_grasp_point_is_the_medoid():
    """AVDC 3.3, differs: that of the points with the least sum of distances to all others; one
    far off moves it little, unlike the mean."""
    rng = np.random.default_rng(0)
    for P in (1, 2, 7, 40):
        points = rng.normal(size=(P, 3)) * [1, 3, 0.2]
        points[P // 2:] += [4, 1, 0]
        sums = [sum(np.linalg.norm(p - q) for q in points) for p in points]
        assert np.array_equal(motion.grasp_point(points), points[int(np.argmin(sums))])
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.2, 0.2, 0], [9, 9, 9]])
    assert motion.grasp_point(points).tolist() == [0.2, 0.2, 0]
    # nearest in all, though another has the nearest furthest point
    line = np.array([0, 0.1, 0.2, 0.3, 5])[:, None] * [0.6, 0, 0.8]
    assert np.allclose(motion.grasp_point(line), line[2])


@pytest.mark.grades("subgoals")
def test_subgoals_follow_the_motions():
    """AVDC 3.3: the grasp point, and where each motion takes the one before it."""
    motions = [(TURN, WAY), (TURN.T, 2 * WAY), (TURN, -WAY)]
    grasp = np.array([0.4, -0.2, 0.3])
    path = motion.subgoals(grasp, motions)
    assert path.shape == (4, 3) and np.allclose(path[0], grasp)
    for k, (R, t) in enumerate(motions):
        wanted = [sum(R[i, j] * path[k, j] for j in range(3)) + t[i] for i in range(3)]
        assert np.allclose(path[k + 1], wanted)
    assert motion.subgoals(grasp, []).tolist() == [grasp.tolist()]
    assert grasp.tolist() == [0.4, -0.2, 0.3], "the given point is left alone"
