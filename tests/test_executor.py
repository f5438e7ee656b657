"""executor.py: one network for any plan; what it sees in training is what it sees when acting."""

import errno
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from conftest import ROOT, SUITE, TRAIN, equal, overfit, tensors, without_gradient
import executor
from core import files, networks, planners, training
from rollout import play

PLANNERS = {"none": [], "none-language": [], "mask": [], "track": [],
            "latent": ["--form", "latent"]}
VARIANTS = [[name] for name in PLANNERS] + [["mask", "--fusion", x] for x in ("late", "both")]
VARIANTS += [["mask", "--form", x] for x in ("goal", "latent+goal")]


@pytest.fixture
def build(untrained, mask_path, track_path):
    """build(name, *flags) -> a new executor, its first batch, its data, its checkpoint's path."""
    paths = {"mask": mask_path, "track": track_path, "latent": track_path}

    def build(name="mask", *flags):
        model, batches, *rest = untrained("executor", "--planner", paths.get(name, name),
                                          *PLANNERS[name], *flags)
        return model, batches(0), *rest
    return build


def out(model, batch):
    """Actions and waypoint in eval()."""
    with torch.no_grad():
        return model.eval()(batch)[1:]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_shapes_and_gradients(build, flags):
    """Every trainable parameter gets a gradient; a frozen planner none, and it stays in eval()."""
    model, batch, *_ = build(*flags)
    action, waypoint = out(model, batch)
    assert action.shape == (4, 2, 8, 7) and waypoint.shape == (4, 2, 3)
    torch.manual_seed(0)
    model.train().loss(batch)[0].backward()
    assert not without_gradient(model)
    if model.planner.frozen:
        assert all(p.grad is None for p in model.planner.parameters())
        assert not model.planner.training and model.encoders.training


def test_the_hands_place_has_noise_as_a_token_in_training_alone(build):
    """The action head reads the offset from where the hand is."""
    model, batch, *_ = build()
    model.look, model.act = Mock(wraps=model.look), Mock(wraps=model.act)
    for training in (False, *[True] * 50):
        model.train(training)(batch)
    assert all(torch.equal(call.args[2], batch["state"]) for call in model.act.call_args_list)
    off = torch.stack([x.args[0]["state"] - batch["state"] for x in model.look.call_args_list])
    assert not off[0].any() and not off[..., 3:].any()
    assert off[1:, ..., :3].std().item() == pytest.approx(executor.STATE_NOISE, rel=0.1)


@pytest.mark.parametrize("form", ["goal", "latent+goal"])
def test_controls_see_what_they_say(build, obs, form):
    """goal: the goal through the planner's encoder, no plan; latent+goal: the plan, and picture and
    goal through trained encoders, not the planner's picture."""
    e, batch, _, path = build("mask", "--form", form)
    plan = e.planner.plan(obs, e.form)
    assert form in path.stem
    if form == "goal":
        torch.testing.assert_close(plan["plan"], e.planner.encode(obs["goal"]))
        assert {*e.encoders} == {"wrist"} and "picture" in e.scale
    else:
        assert {*e.encoders} == {"picture", "wrist", "goal"} and "picture" not in e.scale
        assert e.encoders["goal"] is e.encoders["picture"], "as in cloning, and at its places"
        assert torch.equal(e.pool["goal"].places, e.pool["picture"].places)
        assert e.plans == ["plan", "goal"] and batch["goal"].shape == batch["picture"].shape
        assert torch.equal(plan["plan"], e.planner.plan(obs, "latent")["plan"])


@pytest.mark.parametrize("name, views", [("track", (["picture"], ["wrist"])),
                                         ("none", (["frames", "goal"], ["wrist"]))])
def test_pictures_are_shifted_in_training_alone_and_alike_in_a_window(build, name, views):
    """The goal with the third-person picture; tokens have their places in the pictures as they
    were, those of kept plans by the shift of the pictures that these were made from."""
    model, batch, *_ = build(name)
    same, moved = executor.shifted(batch, False)
    assert same is batch and not moved.any()
    torch.manual_seed(1)
    after, moved = executor.shifted(batch)
    assert {k for k in batch if not torch.equal(batch[k], after[k])} - {"hand"} == {*views[0],
                                                                                    *views[1]}
    assert ("hand" in batch) == (name == "none") and ("hand" not in batch or torch.allclose(
        after["hand"] - batch["hand"], moved[:, :1].expand(-1, 2, -1)))
    assert moved[:, :2].any() and not moved[:, 2].any()
    inner = lambda x, dx=0, dy=0: x[..., 8 - dy:56 - dy, 8 - dx:56 - dx, :]     # away from edges
    for b, (k, names) in itertools.product(range(4), enumerate(views)):
        found = [[shift for shift in itertools.product(range(-4, 5), repeat=2) if torch.equal(
            inner(after[view][b]), inner(batch[view][b], *shift))] for view in names]
        assert len(found[0]) == 1 and all(shifts == found[0] for shifts in found)
        assert found[0][0] == tuple((moved[b, k] * 64).round().int().tolist())
    seen = {}
    for k, pool in model.pool.items():
        pool.register_forward_pre_hook(lambda _, inputs, k=k: seen.update({k: inputs[1]}))
    torch.manual_seed(1)
    model.train().look(batch)
    assert seen.keys() == model.pool.keys()
    for k, far in seen.items():
        kept = batch["moved"].flatten(0, 1) if k == "plan" and name == "track" else None
        assert torch.equal(far, moved.repeat_interleave(2, 0) if kept is None else kept)


@pytest.mark.parametrize("view", [0, 1])
def test_key_points_lie_where_the_feature_is(view):
    """Of a set in two views, such as tracks: in the feature's view, by the shift of its picture."""
    places = torch.cat([networks.grid_places(4, 0), networks.grid_places(4, 1)])
    pool = networks.SpatialSoftmaxPool(places, 8, 6).eval()
    pool.points.weight.data.zero_()
    pool.points.weight.data[:, 0] = 100
    seen, x = {}, torch.zeros(1, 32, 8)
    pool.out.forward = lambda x: seen.setdefault("x", x)
    x[0, 16 * view + 1 * 4 + 3, 0] = 1      # row 1, column 3 of 4
    assert pool.shares(x)[0, :, 0].argmax() == 16 * view + 7
    torch.testing.assert_close(pool.shares(x).sum(1), torch.ones(1, 32))
    moved = torch.rand(1, 3, 2)     # of the view's own picture, undone
    for far in 0 * moved, moved:
        pool(x, far)
        wanted = torch.tensor([2 * view - 1, *(torch.tensor([0.75, -0.25]) - 2 * far[0, view])])
        torch.testing.assert_close(seen.pop("x")[0, -96:], wanted.repeat(32), atol=1e-4, rtol=1e-4)


def test_goals_are_of_another_video_of_the_same_task(build):
    """Also where tasks have unequal numbers of videos, and of one video its own."""
    _, _, actions, _ = build("none-language")
    actions.videos.task = np.repeat(np.arange(4), [5, 9, 3, 1])
    actions.demos.task = np.repeat(np.arange(4), [2, 2, 2, 1])
    actions.episode = np.repeat(np.arange(7), 50)
    goals = lambda: actions.goal_of(np.arange(350)[:, None], np.arange(3)).reshape(7, -1).tolist()
    assert [{*row} for row in goals()] == [         # all others of the task serve
        {1, 2, 3, 4}, {0, 2, 3, 4}, {*range(6, 14)}, {5, *range(7, 14)}, {15, 16}, {14, 16}, {17}]
    actions.demos.goal_varies = True
    assert [{*row} for row in goals()] == [{0}, {1}, {5}, {6}, {14}, {15}, {17}]


def test_batch_is_what_the_file_holds(build, videos):
    model, _, actions, _ = build("none")
    batch = actions(3)
    episode, t, _ = videos.sample_frames(3, 4, 0)
    for b, (e, now) in enumerate(zip(episode, t)):
        of = {key: arrays[e] for key, arrays in videos.arrays.items()}
        for k, then in enumerate((max(now - 4, 0), now)):
            rows = np.minimum(then + np.arange(8), videos.length[e] - 1)
            assert np.array_equal(batch["action"][b, k], of["actions"][rows])
            assert np.array_equal(batch["wrist"][b, k], of["obs/eye_in_hand_rgb"][then])
            assert np.array_equal(batch["state"][b, k, :6], of["obs/ee_states"][then])
            assert np.array_equal(batch["goal"][b, k], videos.last_frames(1 - e))
    state = np.concatenate([np.concatenate(videos.arrays[k]) for k in executor.STATE], -1)
    scaled = model.scale["state"](torch.as_tensor(state)).numpy()
    np.testing.assert_allclose([scaled.mean(0), scaled.std(0)], [[0] * 8, [1] * 8], atol=1e-3)
    assert np.array_equal(model.texts, videos.text)
    # a task of fewer videos shows some twice
    assert np.array_equal(model.goals[0], videos.last_frames(np.array([1, 0] * 5)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "mask", "track"])
def test_one_batch_is_overfitted(build, name):
    model, batch, *_ = build(name, "--seed", "1")
    overfit(model, batch, 200)
    assert (out(model, batch)[0] - batch["action"]).square().mean() < 0.05


@pytest.mark.parametrize("name", PLANNERS)
def test_checkpoint_alone_gives_the_same_executor(build, name, mask_path):
    """And a frozen planner's weights are, after training, those of its own checkpoint."""
    model, batch, actions, path = build(name)
    training.fit(model, actions, model.config, path)
    other = executor.load_executor(path)
    assert all(torch.equal(a, b) for a, b in zip(out(model, batch), out(other, batch)))
    assert not any(p.requires_grad for p in other.parameters())
    if name == "mask":
        assert equal(dict(other.planner.state_dict()), dict(training.load(mask_path)["model"]))


def recorded(videos, goal_varies=False):
    """A simulator that shows the frames of the first episode, whatever the actions are."""
    of = {k.removeprefix("obs/"): v[0] for k, v in videos.arrays.items() if k != "masks"}
    sim = SimpleNamespace(task=videos.tasks[0], goal_varies=goal_varies)
    sim.frame = lambda masks: {k: v[sim.t] for k, v in of.items()}
    sim.goal_image = lambda seed: np.full_like(of["agentview_rgb"][0], seed)
    return sim


def run(policy, sim, steps, scene={"init": 0}):
    policy.reset(sim, scene)
    return np.array([policy(sim) for sim.t in range(steps)])


def test_policy_forgets_the_last_episode(executor_path, videos):
    policy, sim = executor.Policy(executor.load_executor(executor_path)), recorded(videos)
    assert np.array_equal(run(policy, sim, 9), run(policy, sim, 9))
    policy.reset(recorded(videos, goal_varies=True), {"seed": 7})
    assert (policy.fixed["goal"] == 7).all(), "the scene's own, where goals vary"
    policy.reset(sim, {"init": 13})
    assert torch.equal(policy.fixed["goal"][0], policy.executor.goals[0, 3])


@pytest.mark.parametrize("chunk, t", [(8, 12), (8, 4), (1, 6), (1, 0)])
@pytest.mark.parametrize("name", PLANNERS)
def test_policy_sees_what_training_saw(build, videos, name, chunk, t):
    """Looks, the planner's history and token sets, live, from the data, and as kept, in float16;
    also with one action per chunk, when it looks at every step."""
    model, _, actions, _ = build(name, "--chunk", chunk)
    first = SimpleNamespace(integers=lambda *rest, size: np.zeros(size, int))
    seen, look, drawn = [], model.look, (np.array([0]), np.array([t]), first)
    model.look = lambda batch: seen.append(batch) or look(batch)
    run(executor.Policy(model), recorded(videos), t + 1)
    actions.demos.sample_frames = lambda *rest: drawn
    kept, actions.kept = actions.kept, {}
    trained, looks = tensors(actions(0)), seen[-2:] if t else [seen[-1]] * 2
    for k in {"state", "wrist", *model.encoders}:
        assert torch.equal(torch.cat([look[k] for look in looks], 1), trained[k])
    with torch.no_grad():
        flat = {k: v.flatten(0, 1) for k, v in trained.items()}
        plan = model.planner.plan(flat, model.config.form)
    assert not kept or kept.keys() == plan.keys()
    for k, v in plan.items():
        live = torch.cat([look[f"set/{k}"] for look in looks], 1)[0]
        torch.testing.assert_close(live, v, atol=1e-4, rtol=1e-4)
    rows = np.maximum([t - actions.execute, t], 0)
    for k, x in kept.items():       # first as it is, then shifted
        np.testing.assert_allclose(x[0, rows], plan[k], atol=5e-3, rtol=5e-3)
        assert len(x) == 6 and (name == "none-language" or not np.allclose(x[1, rows], plan[k]))
    if kept:        # one shift for the two looks of a window
        (a, b), moved = actions.demos.start[:2], actions.moved
        assert not moved[0].any() and moved[1:].any((1, 2, 3)).all()
        assert (moved[:, a:b] == moved[:, a:a + 1]).all() and (moved[:, a] != moved[:, b]).any()


def test_one_look_per_window_has_shifts_of_its_own(build, monkeypatch):
    """A laptop's executor has seen 5 shifts of each frame, not of each episode."""
    monkeypatch.setitem(executor.Config.PRESETS["tiny"], "history", 1)
    actions = build("mask")[2]
    assert len(np.unique(actions.moved[1, :20, 0], axis=0)) > 10


def test_a_full_disk_is_refused_before_plans_are_computed(monkeypatch, refused):
    full = Mock(side_effect=OSError(errno.ENOSPC, ""))
    monkeypatch.setattr(files.os, "posix_fallocate", full)
    refused(lambda: executor.mapped_array((2, 3)), "No space left")
    assert full.call_args.args[1:] == (0, 12)


def test_a_planner_of_your_own(data, tmp_path, sim, monkeypatch):
    """README's "Your own plan", as it stands there, trains an executor and acts."""
    code, = re.findall(r"```python\n(.*?)```", Path(ROOT, "README.md").read_text(), re.S)
    start = "import torch\nfrom torch import nn\nfrom baselines import cloning\n"
    (tmp_path / "brightness.py").write_text(start + code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(planners.PLANNERS, "brightness", "brightness:Brightness")
    executor.main([*TRAIN, "--planner", "brightness", "--data", str(data), "--out", str(tmp_path)])
    model = executor.load_executor(tmp_path / SUITE / "brightness_executor_tasks0.pt")
    policy = executor.Policy(model)
    monkeypatch.setattr(policy, "limit", lambda sim: 9)
    success, ever, steps, pictures = play(sim, policy, {"init": 0}, film=True)
    assert (success, ever, steps, len(pictures)) == (False, False, 9, 3)
