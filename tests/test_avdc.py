"""motion.py, flow.py and avdc.py: rigid motion from a picture, subgoals, the flow network, a scene solved."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import sims
import video_planner
from core import training
from core.flags import as_dict, parse
from sims import metaworld
from sims.camera import project
from video_control import avdc, flow
from video_control.motion import (camera_motion, fit_motion, grasp_point, infer_motions, subgoals,
                                  unproject)


VIEW = (np.array([0.1, -0.9, 0.8]), Rotation.from_euler("x", -2.2).as_matrix(), 1.1)    # eye, axes, focal length


def scene(spread=0.25, P=1500, seed=0):
    """Points (P, 3) about a metre before the camera, and where it shows them."""
    rng = np.random.default_rng(seed)
    points = VIEW[0] + VIEW[1][2] + rng.uniform(-spread, spread, (P, 3))
    return points, project(points, *VIEW)[0], rng


def moves():
    return Rotation.from_rotvec([0.1, -0.2, 0.3]).as_matrix(), np.array([0.03, -0.05, 0.04])


def test_unproject_is_the_inverse_of_project():
    points, places, _ = scene()
    depth = project(points, *VIEW)[1]
    assert np.allclose(unproject(places, depth, VIEW), points)


def test_motion_is_recovered():
    points, _, _ = scene()
    R, t = moves()
    targets = project(points @ R.T + t, *VIEW)[0]
    found_R, found_t, good = fit_motion(points, targets, VIEW, 1e-4)
    assert np.allclose(found_R, R, atol=1e-3) and np.allclose(found_t, t, atol=1e-3) and good.all()


def test_motion_is_recovered_from_noise_and_outliers():
    """Half a pixel of noise (of 480) and 30 % outliers: turn and way to 1e-3."""
    points, _, rng = scene(P=20000)
    R, t = moves()
    targets = project(points @ R.T + t, *VIEW)[0] + rng.normal(0, 0.5 / 480, (len(points), 2))
    wrong = rng.random(len(points)) < 0.3
    targets[wrong] = rng.random((wrong.sum(), 2))
    found_R, found_t, good = fit_motion(points, targets, VIEW, 0.5 / 480)
    middle = points.mean(0)
    assert Rotation.from_matrix(found_R @ R.T).magnitude() < 1e-3
    assert np.linalg.norm(found_R @ middle + found_t - R @ middle - t) < 1e-3
    assert good[~wrong].mean() > 0.95 and good[wrong].mean() < 0.05


def test_camera_motion_is_recovered():
    points, _, rng = scene(P=20000)
    R, t = moves()
    eye, axes, focal = VIEW
    moved = (R @ eye + t, axes @ R.T, focal)        # the camera after its own rigid motion
    targets = project(points, *moved)[0] + rng.normal(0, 0.5 / 480, (len(points), 2))
    wrong = rng.random(len(points)) < 0.3
    targets[wrong] = rng.random((wrong.sum(), 2))
    found_R, found_t, _ = camera_motion(points, targets, VIEW, 0.5 / 480)
    assert Rotation.from_matrix(found_R @ R.T).magnitude() < 1e-3
    assert np.linalg.norm(found_R @ eye + found_t - moved[0]) < 2e-3


def test_a_small_object_does_not_fly_off():
    """Fifty points within 2 cm and a pixel of noise of 96: the prior holds depth within 10 cm."""
    points, places, rng = scene(spread=0.01, P=50)
    R, t, _ = fit_motion(points, places + rng.normal(0, 1 / 96, places.shape), VIEW, 1 / 96)
    assert np.linalg.norm(points @ R.T + t - points, axis=1).max() < 0.1


def test_integration_follows_the_object_and_loses_covered_points():
    points, places, _ = scene(spread=0.1, P=200)
    steps = [moves()] * 3
    world = [points]
    for R, t in steps:
        world.append(world[-1] @ R.T + t)
    exact = [project(w, *VIEW)[0] for w in world]

    def correspond(k, here, kept):
        there = exact[k + 1][kept].copy()
        there[kept < 60 * (k == 1)] = 0.5         # a hand covers some in the second step
        return there

    found = infer_motions(places, points, correspond, VIEW, 3, 1e-4)
    way = subgoals(grasp_point(points), found)
    true = subgoals(grasp_point(points), steps)
    assert way.shape == (4, 3) and np.allclose(way, true, atol=1e-3)


def test_grasp_point_is_the_medoid():
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.2, 0.2, 0], [9, 9, 9]], float)
    assert grasp_point(points).tolist() == [0.2, 0.2, 0]


def test_sample_flow_reads_between_pixels():
    field = np.zeros((4, 6, 2), np.float32)
    field[1, 2] = [0.5, -0.25]
    middle = np.array([[2.5 / 6, 1.5 / 4], [3.0 / 6, 1.5 / 4]])
    assert np.allclose(flow.sample_flow(field, middle), [[0.5, -0.25], [0.25, -0.125]])


# --- the network ----------------------------------------------------------------------------------


def net(*flags):
    torch.manual_seed(0)
    return flow.FlowNet(parse(flow.Config, "", ["--size", "32", "--width", "32", "--depth", "1", *flags]))


def test_every_parameter_of_the_network_gets_a_gradient():
    model = net()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pair = torch.randint(256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    batch = {"a": pair[0], "b": pair[1], "flow": torch.randn(2, 16, 16, 2) * 0.1,
             "object": torch.rand(2, 16, 16) < 0.2}
    model.loss(batch)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_local_products_are_those_of_shifted_pictures():
    a, b = torch.randn(2, 2, 5, 6, 6)
    near = flow.local_products(a, b, 2).view(2, 5, 5, 6, 6)
    for i, j in ((0, 0), (2, 2), (4, 1)):
        there = torch.nn.functional.pad(b, (2,) * 4)[:, :, i:i + 6, j:j + 6]
        assert torch.allclose(near[:, i, j], (a * there).sum(1), atol=1e-5)


def test_flow_of_mirror_images_is_mirrored():
    model = net().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    a, b = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    said, mirrored = model.flow(a, b), model.flow(a[:, ::-1], b[:, ::-1])
    assert said.shape == (16, 16, 2) and abs(said).max() > 1e-3
    assert np.allclose(mirrored[:, ::-1] * [-1, 1], said, atol=1e-5)


def test_network_learns_a_shift():
    """Noise moved by (6, -2) pixels of 32; the first guess is that nothing moves."""
    model, generator = net(), torch.Generator().manual_seed(0)
    a = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    b = a.roll((-2, 6), (1, 2))
    true = torch.tensor([6 / 32, -2 / 32]).expand(4, 16, 16, 2).clone()
    true[:, :2], true[:, :, 12:] = torch.nan, torch.nan     # what has gone round the edge
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.eval()        # neither blur nor noise
    losses = []
    for step in range(150):
        loss, _ = model.loss({"a": a, "b": b, "flow": true, "object": torch.zeros(4, 16, 16)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    said = model(a, b)[-1].detach()[0, :, 6:10, 3:8] * 32
    assert abs(said - torch.tensor([6, -2]).view(2, 1, 1)).mean() < 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_degraded_pictures_are_blurred_and_noisy(share):
    """Stripes of one pixel, black and white, become grey; a mean stays."""
    stripes = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    rough = flow.degrade(stripes, share)
    assert rough.dtype == torch.uint8 and abs(rough.float().mean() - 127.5) < 1
    assert (rough.float().std((1, 2, 3)) < 10).float().mean() == share


def test_raft_needs_its_weights_and_then_runs(tmp_path, monkeypatch, capsys):
    """With random weights of the same network, in the place of the published ones."""
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit):
        flow.estimator("raft", None)
    assert "raft_large" in capsys.readouterr().err
    file = tmp_path / "checkpoints" / Raft_Large_Weights.DEFAULT.url.split("/")[-1]
    file.parent.mkdir()
    torch.save(raft_large().state_dict(), file)
    a = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    said = flow.estimator("raft", None)(a, np.roll(a, 2, 1))
    assert said.shape == (256, 256, 2) and np.isfinite(said).all()


# --- in the simulator -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def door():
    sim = sims.make("avdc", "button-press", 96)
    yield sim
    sim.close()


def test_exact_flow_is_where_the_points_go(door):
    door.reset(seed=5)
    way = avdc.true_future(door, {"seed": 5})
    assert len(way) > 20
    view, grid = metaworld.views()[0], flow.pixel_grid(48).numpy()
    row = flow.exact_pair(door, view, way[[0, len(way) - 1]], grid)
    known = np.isfinite(row["flow"]).all(-1)
    moved = np.linalg.norm(np.nan_to_num(row["flow"]), axis=-1) > 0.01
    robot = door.camera.mask(door.data, view, door.label)[::2, ::2] == 1    # now, as the simulator is
    assert known[robot].mean() > 0.95 and moved[row["object"]].mean() > 0.5
    assert (moved & robot).sum() > 0.8 * robot.sum() and not moved[~robot & ~row["object"]].mean() > 0.05
    assert not np.array_equal(row["a"], row["b"])


@pytest.mark.parametrize("view", [0, 1])
def test_exact_correspondence_solves_a_scene(door, view):
    door.reset(seed=7)
    actor = avdc.Actor(door, "oracle", {"seed": 7}, metaworld.views()[view])
    for _ in range(200):
        _, success = door.step(actor(door), observe=False)
        if success:
            break
    assert success and actor.mode == "push"


def test_imagined_videos_are_of_cameras_that_the_planner_has_seen(tmp_path, capsys):
    made = {}
    for videos in ("", "avdc,avdc_view2"):
        config = parse(video_planner.Config, "", ["--suite", "avdc", "--goal", "language", "--size", "32", "--channels", "32",
                                                       "--multiples", "1", "--shrink", "1", "--videos", videos])
        made[videos] = tmp_path / f"{len(made)}.pt"
        training.save(made[videos], kind="video_planner", config=as_dict(config), model={}, extra={"E": 4}, version=training.VERSION)
    training.save(tmp_path / "avdc/flow.pt", kind="flow", version=training.VERSION)
    choose = lambda *words: avdc.choose_views(parse(avdc.Config, "", ["--out", str(tmp_path), *words]))
    assert choose("--future", "oracle") == choose("--future", "true") == [0, 1, 2]
    assert choose("--planner", str(made[""])) == [0] and choose("--planner", str(made["avdc,avdc_view2"])) == [0, 2]
    assert choose("--planner", str(made[""]), "--views", "1") == [1]
    with pytest.raises(SystemExit):
        choose("--future", "true", "--views", "0,7")
    with pytest.raises(SystemExit):
        choose()
    assert "video_planner.py --suite avdc" in capsys.readouterr().err
