"""sims/camera.py: pictures are upright, masks exact, points where the renderer draws them."""

import os
import subprocess
from itertools import islice
from unittest.mock import Mock

import numpy as np
import pytest

from conftest import SIZE, simulator
import sims
from core.episodes import CAMERAS
from demos.libero import demonstrator
from sims import libero
from sims.camera import K, MOVES, OPENGL, Camera, Replay, choose_opengl, project, simplified, track

ROBOT, BOWL, PLATE = 1, 2, 3  # labels in the masks of task 0 of libero_spatial
drawer = simulator("mt10", "drawer-open", SIZE)


@pytest.fixture(scope="module", params=["sim", "drawer"], ids=["libero", "metaworld"])
def played(request):
    """A simulator and the states, every third, of an episode in it."""
    sim = request.getfixturevalue(request.param)
    sim.reset(seed=2)
    states = [sim.step(action, observe=False) and sim.state()
              for action in islice(demonstrator(sim, 2), 100)]
    return sim, np.array(states[::3])


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("camera", libero.Libero.cameras)
def test_pictures_and_masks_agree(sim, camera):
    """They hold robot and objects, seen from above.  A bowl painted red is red where its mask is:
    upright or not, both are the same way."""
    masks = sim.reset(seed=7)["masks"]
    count, (rows, _) = np.bincount(masks.ravel()), np.nonzero(masks == ROBOT)
    assert len(count) == 4 and (count > 15).all() and count[0] > count[1:].sum()
    assert rows.mean() < SIZE / 2 and rows.min() == 0 and rows.max() < SIZE - 1
    model, bowl = sim.model, np.flatnonzero(sim.label == BOWL)
    colours, materials = model.geom_rgba.copy(), model.geom_matid.copy()
    before = sim.camera.picture(sim.data, camera).astype(int)
    model.geom_rgba[bowl], model.geom_matid[bowl] = [1, 0, 0, 1], -1
    after = sim.camera.picture(sim.data, camera).astype(int)
    model.geom_rgba[:], model.geom_matid[:] = colours, materials
    mask = sim.camera.mask(sim.data, camera, sim.label) == BOWL
    red = (after[..., 0] - after[..., 1:].max(-1) > 40) & (np.abs(after - before).max(-1) > 20)
    assert mask.sum() > 15 and iou(red, mask) > 0.8
    assert iou(red[::-1], mask) < 0.5 and iou(red[:, ::-1], mask) < 0.5


def test_metaworlds_picture_is_upright_and_not_mirrored(drawer):
    """The hand rises: the robot goes up in the picture.  It goes away from its base, at y = 0: to
    the right, where the camera, which looks along -x, has +y."""
    places = []
    for motion in ([0, 0, 0], [0, 0, 1], [0, 1, 0]):
        drawer.reset(seed=7)
        for _ in range(12):
            drawer.step([*motion, -1], observe=False)
        y, x = np.nonzero(drawer.frame()["masks"] == ROBOT)
        places.append([x[y > y.max() - 3].mean(), y.max()])  # the fingertips
    still, up, away = places
    assert up[1] < still[1] - 2 and abs(up[0] - still[0]) < 2 and away[0] > still[0] + 2


@pytest.mark.slow
def test_fast_rendering_shows_what_the_faithful_one_shows(sim):
    """The model is simplified only for a moment, and physics does not notice that it is drawn."""
    fast, state = sim.reset(seed=7), sim.state()
    faces, count = sim.model.mesh_face.copy(), sim.model.mesh_facenum.sum()
    with simplified(sim.model):
        assert sim.model.mesh_facenum.sum() < 0.5 * count
    assert sim.model.mesh_facenum.sum() == count and (sim.model.mesh_face == faces).all()
    camera = Camera(sim.model, SIZE, "faithful", [0, 1, 0, 0, 0, 0])
    mask = camera.mask(sim.data, "agentview", sim.label)
    picture = camera.picture(sim.data, "agentview")
    camera.close()
    assert all(iou(mask == k, fast["masks"] == k) > 0.9 for k in (ROBOT, BOWL, PLATE))
    assert np.abs(picture.astype(int) - fast["agentview_rgb"]).mean() < 10
    assert np.array_equal(sim.state(), state)


def test_a_point_is_where_the_renderer_draws_it(played):
    """Balls some 4 px across: centroids lie within 0.1 px, of 128, of the projected centres."""
    import mujoco
    sim, _ = played
    large = Camera(sim.model, 512, "fast", [0] * 6)
    rng, errors = np.random.default_rng(0), []
    for view in 6 * sim.cameras:
        eye, axes, focal = large.pose(sim.data, view)
        ray = np.array([*rng.uniform(-0.35, 0.35, 2) / focal, 1]) @ axes
        point = eye + 0.7 * ray
        large.renderer.update_scene(sim.data, view, large.option)
        scene = large.renderer.scene
        scene.ngeom += 1
        ball = scene.geoms[scene.ngeom - 1]
        mujoco.mjv_initGeom(ball, mujoco.mjtGeom.mjGEOM_SPHERE, np.full(3, 0.006), point,
                            np.eye(3).ravel(), np.float32([1, 1, 1, 1]))
        ball.objtype, ball.objid, ball.segid = 5, 7, scene.ngeom - 1
        large.renderer.enable_segmentation_rendering()
        y, x = np.nonzero(large.renderer.render()[..., 0] == 7)
        large.renderer.disable_segmentation_rendering()
        seen = (np.array([x.mean(), y.mean()]) + 0.5) / 512
        errors.append(np.abs(seen - project(point, eye, axes, focal)[0]).max() * 128)
    large.close()
    assert max(errors) < 0.1, errors


@pytest.mark.parametrize("camera", CAMERAS)
def test_tracks_stay_on_their_body_and_know_when_they_are_hidden(played, camera):
    """Where a point is visible, the picture shows its body, so that it is upright and not mirrored;
    where it is hidden, another.  Points are where something moves, if anything does."""
    sim, states = played
    view, body_of = sim.cameras[CAMERAS.index(camera)], sim.model.geom_bodyid.astype(np.uint8) + 1
    qpos, rng = states[:, 1:1 + sim.model.nq], np.random.default_rng(0)
    place, visible = track(sim.camera, view, sim.model, qpos, rng)
    assert place.shape == (len(states), K, 2) and visible.shape == (len(states), K)
    assert np.isfinite(place).all() and visible.any(0).all(), "each was seen once"
    inside = (np.abs(place - 0.5) < 0.5).all(-1)
    assert not (visible & ~inside).any()
    near, replay = [], Replay(sim.camera, view, sim.model, qpos)
    for t in range(0, len(states), 3):
        replay.at(t)
        drawn = sim.camera.mask(replay.data, view, body_of)
        x, y = (place[t] * SIZE).astype(int).clip(1, SIZE - 2).T
        near.append([drawn[y + j, x + i] for j in (-1, 0, 1) for i in (-1, 0, 1)])
    near, seen, inside = np.array(near), visible[::3], inside[::3]  # (t, 9, K), (t, K), (t, K)
    shown, known = near[:, 4], seen.any(0)
    own = np.array([np.bincount(shown[seen[:, k], k], minlength=1).argmax() for k in range(K)])
    # within a pixel: the picture's meshes are simpler than those that the rays meet
    assert (near == own).any(1)[seen].mean() > 0.98
    hidden = ~seen & inside & known
    if hidden.sum() > 50:
        assert (shown == own)[hidden].mean() < 0.35, "a body may hide its own far side"
    if camera == "agentview":
        moves = place.var(0).sum(-1) > MOVES    # (K,), the grid first
        assert moves[49:].mean() > 0.6 > moves[:49].mean()
        place, visible = track(sim.camera, view, sim.model, np.repeat(qpos[:1], 5, 0), rng)
        assert np.abs(np.diff(place, axis=0)).max() < 1e-6 and visible.all()
    one, two, other = (sims.tracks(sim, states[:6], seed=s) for s in (3, 3, 4))
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one[f"tracks/{camera}"], other[f"tracks/{camera}"])


def test_no_opengl_is_one_line(tmp_path, monkeypatch, refused):
    """Where Python's OpenGL cannot be imported, or hangs."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['OpenGL'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in OPENGL:
        monkeypatch.delenv(name, raising=False)
    refused(choose_opengl, "apt-get install", "OSMesa")
    choose_opengl(needed=False)
    assert "MUJOCO_GL" not in os.environ
    monkeypatch.setenv("MUJOCO_GL", "nonsense")  # the user's choice is tried, and no other
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=subprocess.TimeoutExpired("", 60)))
    refused(choose_opengl, "MUJOCO_GL=nonsense", "unset")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")       # is named, though not ours
    refused(choose_opengl, "PYOPENGL_PLATFORM=osmesa", "unset")
