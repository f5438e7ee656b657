"""cameras.py: tracks are exact: where the renderer draws a point, on the body that it is fixed to, hidden when it is hidden."""

import numpy as np
import pytest

from conftest import SIZE

import sims
from demos.libero import demonstrator
from sims.camera import CAMERAS, Camera, MOVES, project, track

K = 256


@pytest.fixture(scope="module", params=[("libero_spatial", 0), ("mt10", "drawer-open")], ids=["libero", "metaworld"])
def played(request):
    """A simulator and the states of an episode in it."""
    sim = sims.make(*request.param, SIZE)
    sim.reset(seed=2)
    expert, states = demonstrator(sim, 2), [sim.state()]
    while not expert.done and len(states) < 120:
        sim.step(expert(sim), observe=False)
        states.append(sim.state())
    yield sim, np.array(states)
    sim.close()


def put(sim, state):
    import mujoco
    sim.data.qpos[:] = state[1:1 + sim.model.nq]
    mujoco.mj_kinematics(sim.model, sim.data)
    mujoco.mj_camlight(sim.model, sim.data)


def follow(sim, states, camera, moving=True, seed=0):
    view = sim.cameras[CAMERAS.index(camera)]
    qpos = states[:, 1:1 + sim.model.nq]
    return track(sim.camera, view, sim.model, qpos, K, np.random.default_rng(seed), moving)


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_point_is_where_the_renderer_draws_it(played, camera):
    """Balls are added to the scene, some 4 px across; their centroids lie within 0.1 px of the projected centres."""
    import mujoco
    sim, states = played
    put(sim, states[10])
    large = Camera(sim.model, 512, "fast", [0] * 6)
    view = sim.cameras[CAMERAS.index(camera)]
    eye, axes, focal = large.pose(sim.data, view)
    rng, errors = np.random.default_rng(0), []
    for _ in range(12):
        ray = np.array([*rng.uniform(-0.35, 0.35, 2) / focal, 1]) @ axes
        point = eye + 0.7 * ray
        large.renderer.update_scene(sim.data, view, large.option)
        scene = large.renderer.scene
        scene.ngeom += 1
        mujoco.mjv_initGeom(scene.geoms[scene.ngeom - 1], mujoco.mjtGeom.mjGEOM_SPHERE, np.full(3, 0.006), point,
                            np.eye(3).ravel(), np.float32([1, 1, 1, 1]))
        scene.geoms[scene.ngeom - 1].objtype, scene.geoms[scene.ngeom - 1].objid = 5, 7
        scene.geoms[scene.ngeom - 1].segid = scene.ngeom - 1
        large.renderer.enable_segmentation_rendering()
        y, x = np.nonzero(large.renderer.render()[..., 0] == 7)
        large.renderer.disable_segmentation_rendering()
        assert len(x) > 10
        seen = (np.array([x.mean(), y.mean()]) + 0.5) / 512
        errors.append(np.abs(seen - project(point, eye, axes, focal)[0]).max() * 128)
    large.close()
    assert max(errors) < 0.1, errors


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("moving", [True, False])
def test_tracks_stay_on_their_body_and_know_when_they_are_hidden(played, camera, moving):
    """Where a point is said to be visible, the picture shows its body; where hidden, another."""
    sim, states = played
    place, visible = follow(sim, states, camera, moving)
    assert place.shape == (len(states), K, 2) and visible.shape == (len(states), K) and np.isfinite(place).all()
    assert visible.any(0).all(), "each was seen once"
    inside = (np.abs(place - 0.5) < 0.5).all(-1)
    assert not (visible & ~inside).any()
    view, body_of = sim.cameras[CAMERAS.index(camera)], sim.model.geom_bodyid.astype(np.uint8) + 1
    shown, near = [], []
    for t in range(0, len(states), 10):
        put(sim, states[t])
        drawn = sim.camera.mask(sim.data, view, body_of)
        x, y = (place[t] * SIZE).astype(int).clip(1, SIZE - 2).T
        shown.append(drawn[y, x])
        near.append([drawn[y + j, x + i] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    shown, near, seen, inside = np.array(shown), np.array(near), visible[::10], inside[::10]
    own = np.array([np.bincount(shown[seen[:, k], k], minlength=2).argmax() if seen[:, k].any() else 255 for k in range(K)])
    known = own < 255
    # within a pixel: the picture's meshes are simpler than those that the rays meet
    assert (near == own).any(1)[seen & known].mean() > 0.98
    hidden = ~seen & inside & known
    if hidden.sum() > 50:
        assert (shown == own)[hidden].mean() < 0.35, "a body may hide its own far side"


def test_points_are_where_something_moves(played):
    sim, states = played
    spread = lambda moving: (follow(sim, states, "agentview", moving)[0].var(0).sum(-1) > MOVES).mean()
    assert spread(True) > 0.4 > spread(False)


def test_tracks_follow_from_the_seed(played):
    sim, states = played
    one, two, other = (sims.tracks(sim, states, seed=s) for s in (3, 3, 4))
    assert one.keys() == {f"{w}/{c}" for w in ("tracks", "visible") for c in CAMERAS}
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one["tracks/agentview"], other["tracks/agentview"])
    assert one["tracks/agentview"].dtype == np.float16 and one["visible/agentview"].dtype == bool


def test_an_episode_in_which_nothing_moves_has_tracks_too(played):
    sim, states = played
    place, visible = follow(sim, np.repeat(states[:1], 5, 0), "agentview")
    assert np.abs(np.diff(place, axis=0)).max() < 1e-6 and visible.all()
