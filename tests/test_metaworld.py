"""Meta-World behind the same interface: scenes follow from their seed, goals stay hidden, masks, camera, demonstrations."""

import numpy as np
import pytest

from conftest import SIZE, shapes_of_a_frame

import executor
import extract
import mask_planner
import rollout
import sims
from demos.libero import demonstrator
from sims import metaworld
from sims.camera import choose_opengl

ROBOT, OBJECT = 1, 2


@pytest.fixture(scope="module")
def push():
    sim = sims.make("mt10", "push", SIZE)
    yield sim
    sim.close()


def actions(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 4))


def test_the_suites_are_the_packages():
    choose_opengl()    # mujoco reads its choice once, at import
    from metaworld import env_dict
    names = lambda envs: [name.removesuffix("-v3") for name in envs]
    assert metaworld.METAWORLD == names(env_dict.ALL_V3_ENVIRONMENTS)
    assert sims.tasks("mt10") == names(env_dict.MT10_V3)
    assert sims.tasks("ml10") == names(env_dict.ML10_V3["train"]) and sims.tasks("ml10_test") == names(env_dict.ML10_V3["test"])
    assert len(sims.tasks("avdc")) == 11 and set(sims.tasks("avdc")) < set(metaworld.METAWORLD)
    assert sims.tasks("door-open") == ["door-open"] and not set(sims.tasks("ml10")) & set(sims.tasks("ml10_test"))


@pytest.mark.parametrize("task", ["push", "handle-press"])
def test_an_episode_follows_from_seed_and_actions(task):
    """In one simulator after another scene, and in a new one; handle-press is one of the six tasks that keep traces of
    what was drawn before."""
    runs = []
    sim = sims.make("mt10" if task == "push" else task, task, observe=False)
    for fresh in (False, False, True):
        if fresh:
            sim = sims.make(sim.suite, task, observe=False)
        sim.reset(seed=7)
        runs.append([sim.env._target_pos.copy(), *(sim.step(a, observe=False) and sim.state() for a in actions(20))])
        sim.reset(seed=8)
    for run in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], run))
    assert np.abs(runs[0][1] - runs[0][-1]).max() > 1e-3, "nothing moved"


def test_a_view_is_another_picture_of_the_same_episode(push):
    assert sims.tasks("avdc_view1") == sims.tasks("avdc") and sims.tasks("push_view2") == ["push"]
    assert sims.is_metaworld("avdc_view2") and not sims.is_metaworld("avdc_view3") and not sims.is_metaworld("libero_spatial_view1")
    other = sims.make("mt10_view2", "push", SIZE)
    here, there = push.reset(seed=4), other.reset(seed=4)
    assert np.array_equal(push.state(), other.state())
    assert np.array_equal(here["eye_in_hand_rgb"], there["eye_in_hand_rgb"])
    assert np.abs(here["agentview_rgb"].astype(int) - there["agentview_rgb"]).mean() > 10
    assert set(np.unique(there["masks"])) == {0, 1, 2}, "masks are of the same camera"
    assert np.abs(here["hand"].astype(float) - there["hand"]).max() > 0.02
    other.close()


def test_goals_differ_between_seeds(push):
    goals = [push.reset(seed=k) and push.env._target_pos.copy() for k in range(5)]
    assert np.std(goals, axis=0)[:2].min() > 0.01


def test_evaluation_scenes_have_seeds_of_their_own(push):
    push.reset(init=3)
    state = push.state()
    push.reset(seed=metaworld.EVALUATION + 3)
    assert np.array_equal(push.state(), state)


def test_frame(push):
    frame = push.reset(seed=7)
    shapes = {k: (v.shape, v.dtype) for k, v in frame.items()}
    assert shapes == shapes_of_a_frame()
    assert frame["agentview_rgb"].std() > 20 and frame["eye_in_hand_rgb"].std() > 20


def test_actions_are_clipped_and_checked(push):
    results = []
    for scale in (1, 50):
        push.reset(seed=0)
        push.step(scale * np.sign(actions(1)[0]), observe=False)
        results.append(push.state())
    assert np.array_equal(*results)
    with pytest.raises(ValueError):
        push.step(np.zeros(7))


def test_the_picture_is_upright_and_not_mirrored(push):
    """The hand rises: the robot goes up in the picture.  It goes away from its base, at y = 0: to the right, where the
    camera, which looks along -x, has +y."""
    def tip(mask):
        y, x = np.nonzero(mask == ROBOT)
        low = y > y.max() - 4
        return np.array([x[low].mean(), y[low].mean()])

    places = []
    for motion in ([0, 0, 0], [0, 0, 1], [0, 1, 0]):
        push.reset(seed=7)
        for _ in range(12):
            frame, _ = push.step([*motion, -1])
        places.append(tip(frame["masks"]))
    still, up, away = places
    assert up[1] < still[1] - 3 and abs(up[0] - still[0]) < 3
    assert away[0] > still[0] + 3


def test_goal_markers_are_hidden_unless_asked_for(push):
    hidden, shown = push.reset(seed=7), sims.make("mt10", "push", SIZE, "fast+goal")
    marked = shown.reset(seed=7)
    assert (np.abs(marked["agentview_rgb"].astype(int) - hidden["agentview_rgb"]).max(-1) > 40).sum() > 10
    shown.close()
    for site in range(push.model.nsite):
        push.data.site_xpos[site] = [0, 0.7, 0.1]
    assert np.array_equal(push.frame()["agentview_rgb"], hidden["agentview_rgb"])


def test_every_task_shows_robot_and_object():
    """A puck has more than a handful of pixels."""
    few = {}
    for task in metaworld.METAWORLD:
        sim = sims.make(task, task, SIZE)
        count = np.bincount(sim.reset(init=0)["masks"].ravel(), minlength=3)
        sim.close()
        if count[ROBOT] < 300 or count[OBJECT] < 20 or len(count) > 3:
            few[task] = count.tolist()
    assert not few


def test_the_button_is_what_coffee_button_is_about():
    moved = {}
    for task in ("coffee-button", "coffee-pull"):
        sim = sims.make(task, task, SIZE, observe=False)
        moved[task] = {sim.model.body(sim.model.geom_bodyid[g]).name for g in np.flatnonzero(sim.label == OBJECT)}
    assert moved == {"coffee-button": {"cmbutton"}, "coffee-pull": {"mug"}}


@pytest.mark.parametrize("task", ["door-open", "window-close"])
def test_script_succeeds_and_success_lasts(task):
    sim = sims.make("mt10", task, observe=False)
    sim.reset(seed=2)
    script, first = demonstrator(sim), None
    for step in range(sim.horizon):
        action = script(sim)
        assert action.shape == (4,) and action.dtype == np.float32 and np.abs(action).max() <= 1
        _, success = sim.step(action, observe=False)
        first = step if success and first is None else first
        if script.done:
            break
    assert success and step - first == metaworld.LINGER
    for _ in range(30):
        _, success = sim.step([0, 0, 1, -1], observe=False)
    assert success, "it has succeeded"


def test_goal_image_is_of_this_scene(push):
    """Where the puck has arrived there, the goal is."""
    picture = push.goal_image(init=1)
    assert push.success() and picture.shape == (SIZE, SIZE, 3)
    puck = push.data.body("obj").xpos.copy()
    push.reset(init=1)
    assert not push.success() and np.linalg.norm(puck - push.env._target_pos) < 0.05
    assert np.linalg.norm(push.data.body("obj").xpos - puck) > 0.05


def test_a_command_from_data_to_success_rate(tmp_path, monkeypatch, capsys):
    """Every program on a Meta-World task, with tiny numbers."""
    from conftest import NETWORK
    monkeypatch.chdir(tmp_path)
    common = ["--preset", "laptop", "--demos", "2"]
    extract.main([*common, "--suite", "reach", "--size", str(SIZE), "--workers", "1", "--show"])
    mask_planner.main([*common, "--suite", "reach", "--steps", "3", *NETWORK])
    paths = []
    for plan, flags in {"mask": [], "mask-explicit": ["--plan-form", "explicit"], "none": ["--planner", "none"]}.items():
        flags = ["--planner", "runs/reach/mask.pt", "--suite", "reach", *flags]
        executor.main([*common, "--action-demos", "2", "--steps", "3", *NETWORK, *flags])
        paths.append(f"runs/reach/{plan}_executor_d2.pt")
        model = executor.load_executor(paths[-1])
        assert model.own_goal and model.extra["action_dim"] == 4 and not model.goals.numel()
    monkeypatch.setattr(metaworld.MetaWorld, "horizon", 120)
    rollout.run_task.progress = type("Queue", (), {"put": lambda self, n: None})()
    config = rollout.core.parse(rollout.Config, "", ["--episodes", "1"])
    name, done = rollout.run_task((config, paths, "reach", "reach", [0], SIZE, "fast"))
    assert name == "reach" and all(len(outcomes) == 1 for outcomes in done.values()) and len(done) == 3
    assert len(list(tmp_path.rglob("*.mp4"))) == 3
    outcome = rollout.result(config, paths[0], "reach", {"reach": done[paths[0]]}, 1.0)
    assert outcome["scenes"] == f"seeds from {metaworld.EVALUATION}" and outcome["counts"] == "ever succeeded"
    assert rollout.result_path("r", outcome).name == "reach_mask_laptop_d2_s0.json"
