"""executor.py: one network for any plan; what it sees in training is what it sees when acting."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn as nn

from conftest import EXECUTOR, SUITE, TRAIN, equal, run_and_kill

import executor
from core import networks, planners, training
from core.episodes import Episodes, look_times
from core.flags import parse

PLANNERS = {"none": [], "none-language": [], "mask": [], "track": [],
            "latent": ["--form", "latent"]}
VARIANTS = {**{name: (name, flags) for name, flags in PLANNERS.items()},
            **{f"{read} {fusion}": ("mask", ["--read", read, "--fusion", fusion])
               for read, fusion in (("pooled", "early"), ("attention", "late"), ("both", "early"),
                                    ("pooled", "late"), ("attention", "early"))}}


@pytest.fixture
def build(data, mask_path, track_path, tmp_path):
    """build(name, *flags) -> a new executor, its data, the path of its checkpoint."""
    paths = {"mask": mask_path, "track": track_path, "latent": track_path}

    def build(name="mask", *flags):
        where = ["--data", str(data), "--out", str(tmp_path)]
        tasks = [] if name in paths else ["--suite", SUITE, "--tasks", "0"]
        config = parse(executor.Config, "", [*EXECUTOR, "--planner", str(paths.get(name, name)),
                                             *tasks, *where, *PLANNERS.get(name, []), *flags])
        model, demos, videos, path = executor.prepare(config)
        return model, executor.ActionData(config, model, demos, videos), path

    return build


def tensors(batch):
    return {k: torch.as_tensor(v) for k, v in batch.items()}


def out(model, batch):
    """Actions and waypoint in eval()."""
    with torch.no_grad():
        return model.eval()(batch)[1:]


# --- network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, flags", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_gradients(build, name, flags):
    """Every trainable parameter gets a gradient, no frozen one does."""
    model, actions, _ = build(name, *flags)
    batch = tensors(actions(0))
    action, waypoint = out(model, batch)
    assert action.shape == (4, 2, 8, 7) and waypoint.shape == (4, 2, 3)
    torch.manual_seed(0)
    model.train().loss(batch)[0].backward()
    idle = [n for n, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert not idle
    frozen = [p for n, p in model.named_parameters() if n.startswith("planner.")]
    assert not model.planner.frozen or all(p.grad is None for p in frozen)


def test_loss_equals_a_loop(build):
    model, actions, _ = build()
    batch = tensors(actions(0))
    with torch.no_grad():
        loss, parts = model.eval().loss(batch)
    action, there = out(model, batch)
    squares = {"motion": [], "gripper": []}
    for b, t, c, k in np.ndindex(*action.shape):
        error = (action[b, t, c, k] - batch["action"][b, t, c, k]).item()
        squares["motion" if k < 6 else "gripper"].append(error ** 2)
    offset = (((there - batch["waypoint"]) / 0.1) ** 2).flatten().tolist()
    wanted = {k: np.mean(v) for k, v in squares.items()} | {"waypoint": np.mean(offset)}
    assert parts == pytest.approx(wanted, rel=1e-3)
    both = np.mean(squares["motion"] + squares["gripper"])
    assert loss.item() == pytest.approx(both + 0.3 * np.mean(offset), rel=1e-3)


def test_actions_are_causal_over_the_looks(build):
    """A later look changes no earlier action; without it the earlier ones are the same."""
    model, actions, _ = build()
    batch = tensors(actions(0))
    changed = {k: v.clone() for k, v in batch.items()}
    for k in batch.keys() - {"action", "waypoint"}:
        changed[k][:, 1] = changed[k][:, 1].flip(0)
    a, b = out(model, batch)[0], out(model, changed)[0]
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 1], b[:, 1])
    first = out(model, {k: v[:, :1] for k, v in batch.items()})[0]
    torch.testing.assert_close(first, a[:, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["early", "late", "both"])
@pytest.mark.parametrize("name", ["mask", "track"])
def test_fusion_is_where_the_plan_joins(build, name, fusion):
    """ATM, Table III: late, the tokens of a look hold no plan; early, the heads get none."""
    model, actions, _ = build(name, "--fusion", fusion)
    batch = tensors(actions(0))
    changed = batch | {"set/plan": torch.randn(batch["set/plan"].shape)}
    with torch.no_grad():
        (cls, late), (cls2, late2) = (model.eval().look(b) for b in (batch, changed))
    assert torch.equal(cls, cls2) == (fusion == "late")
    assert (late.shape[-1] == 0) == (fusion == "early")
    assert fusion == "early" or not torch.allclose(late, late2)
    assert not torch.allclose(out(model, batch)[0], out(model, changed)[0])


def test_pictures_are_shifted_in_training_alone_and_alike_in_a_window(build, monkeypatch):
    model, actions, _ = build("track")
    batch, calls, shift = tensors(actions(0)), [], networks.random_shift
    monkeypatch.setattr(networks, "random_shift", lambda x: calls.append(shift(x)) or calls[-1])
    model.eval()(batch)
    assert not calls
    torch.manual_seed(1)
    after, moved = model.shifted(batch)
    assert len(calls) == 2 and (moved[:, :2] != 0).any() and (moved[:, 2] == 0).all()
    for view, k in (("picture", 0), ("wrist", 1)):
        for b in range(4):
            x, y = (moved[b, k] * 64).round().int().tolist()
            for t in range(2):      # away from the edges the looks are the same, moved
                whole = batch[view][b, t, 8 - y:56 - y, 8 - x:56 - x]
                assert torch.equal(after[view][b, t, 8:56, 8:56], whole)


def test_points_move_with_the_picture_of_their_own_view(build):
    """Shifted by a sixteenth, a view's tokens have the code of places a sixteenth further; those of
    the other view stay, and differ by the views' ids alone where content and places are equal."""
    model, _, _ = build("track", "--read", "attention")
    embed, x = model.embed["plan"].eval(), torch.randn(1, 64, 32)
    moved = torch.zeros(1, 3, 2)
    moved[0, 1, 0] = 1 / 16         # the wrist's picture, in widths
    with torch.no_grad():
        still, there = embed(x, 0 * moved), embed(x, moved)
    view = embed.places[:, 0]
    assert (view == 0).sum() == (view == 1).sum() == 32
    assert torch.equal(still[:, view == 0], there[:, view == 0])
    xy = embed.places[view == 1, 1:]
    code = networks.sincos(16 * xy + torch.tensor([1.0, 0]), 32) - networks.sincos(16 * xy, 32)
    moves = there[0, view == 1] - still[0, view == 1]
    torch.testing.assert_close(moves, code, atol=1e-5, rtol=1e-4)
    same = x[:, :1].expand_as(x)
    with torch.no_grad():
        embed.view.normal_()
        tokens = embed(same, 0 * moved)[0]
    ids = (embed.view[0] - embed.view[1]).expand(32, -1)
    assert torch.equal(embed.places[view == 0, 1:], embed.places[view == 1, 1:])
    torch.testing.assert_close(tokens[view == 0] - tokens[view == 1], ids, atol=1e-5, rtol=1e-4)


def test_key_points_lie_where_the_feature_is():
    pool = networks.SpatialSoftmaxPool(networks.grid_places(4, 0), 8, 6).eval()
    pool.points.weight.data.zero_()
    pool.points.weight.data[:, 0] = 100
    seen, x = {}, torch.zeros(1, 16, 8)
    pool.out.forward = lambda x: seen.setdefault("x", x)
    x[0, 1 * 4 + 3, 0] = 1      # row 1, column 3 of 4
    pool(x)
    where = seen["x"][0, -64:].view(32, 2)
    wanted = torch.tensor([0.75, -0.25]).expand(32, 2)
    torch.testing.assert_close(where, wanted, atol=1e-4, rtol=1e-4)


def test_planner_stays_frozen(build, mask_path):
    """eval() through train(), and its weights as in its own checkpoint after training."""
    model, actions, path = build()
    model.train()
    assert not model.planner.training and model.encoders.training
    training.fit(model, actions, model.config, path)
    own = training.load(mask_path)["model"]
    assert equal(dict(model.planner.state_dict()), own)


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "track", "latent"])
def test_kept_plans_are_the_computed_ones(build, name):
    model, actions, _ = build(name)
    row, draw = np.array([5, 40, 70]), np.array([0, 1, 2])
    plan = model.planner.plan(tensors(actions.obs(row, draw)), model.config.form)
    assert plan.keys() == actions.kept.keys()
    for k, x in plan.items():
        kept = actions.kept[k][draw % len(actions.kept[k]), row]
        np.testing.assert_allclose(kept, x.float().numpy(), atol=5e-3, rtol=5e-3)
    assert "picture" not in plan or len(actions.kept["picture"]) == 1 < len(actions.kept["plan"])


def test_goals_are_of_another_video_of_the_same_task(build):
    """Also where tasks have unequal numbers of videos, and of one video its own."""
    _, actions, _ = build("none-language")
    counts = [5, 9, 3, 1]
    task = np.repeat(np.arange(4), counts)
    actions.videos.task, actions.videos.length = task, np.full(len(task), 10)
    demos = np.repeat(np.arange(4), [2, 2, 2, 1])
    actions.demos.task, actions.episode = demos, np.repeat(np.arange(7), 50)
    row, draw = np.arange(350)[:, None], np.arange(3)
    goal = actions.goal_of(row, draw)
    assert (task[goal] == demos[row // 50]).all()
    own = np.array([0, 1, 5, 6, 14, 15, 17])[row // 50]
    assert ((goal != own) | (demos[row // 50] == 3)).all()
    for e, others in ((0, 4), (2, 8), (4, 2)):      # all others of the task serve
        assert len(set(goal[row[:, 0] // 50 == e].ravel())) == others
    actions.demos.goal_varies = True
    assert (actions.goal_of(row, draw) == own).all()


def test_batch_is_what_the_file_holds(build, videos):
    model, actions, _ = build("none")
    batch = actions(3)
    episode, t, _ = videos.sample_frames(3, 4, 0)
    for b, (e, now) in enumerate(zip(episode, t)):
        for k, then in enumerate((max(now - 4, 0), now)):
            rows = np.minimum(then + np.arange(8), videos.length[e] - 1)
            assert np.array_equal(batch["action"][b, k], videos.arrays["actions"][e][rows])
            wrist = videos.arrays["obs/eye_in_hand_rgb"][e][then]
            assert np.array_equal(batch["wrist"][b, k], wrist)
            assert np.array_equal(batch["state"][b, k, :6], videos.arrays["obs/ee_states"][e][then])
            other = videos.arrays["obs/agentview_rgb"][1 - e]
            assert np.array_equal(batch["goal"][b, k], other[-1])


def test_waypoints():
    """Closes at 2, opens at 12, ends at 23; the fingers follow for 8 steps each time."""
    gripper = np.r_[-np.ones(2), np.ones(10), -np.ones(12)]
    position = np.arange(24)[:, None] * np.ones(3)
    wanted = np.r_[np.full(10, 2), np.full(10, 12), np.full(4, 23)]
    assert np.array_equal(executor.waypoints(position, gripper)[:, 0], wanted)


def test_look_times():
    """A window ends at t, is `stride` apart and never begins before the episode."""
    assert look_times(9, 3, 4).tolist() == [1, 5, 9] and look_times(5, 3, 4).tolist() == [0, 1, 5]
    assert look_times([0, 20], 2, 8).tolist() == [[0, 0], [12, 20]]


def test_states_and_goals_are_the_datas(build, videos):
    model, _, _ = build()
    state = np.concatenate([np.concatenate(videos.arrays[k]) for k in executor.STATE], -1)
    scaled = model.scale["state"](torch.as_tensor(state)).numpy()
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(0), 1, atol=1e-3)
    assert model.goals.shape[1] == 10, "a task of fewer videos shows some twice"
    for k in range(10):
        last = videos.arrays["obs/agentview_rgb"][1 - k % 2][-1]
        assert np.array_equal(model.goals[0, k], last)
    np.testing.assert_allclose(model.texts, videos.text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "mask", "track"])
def test_one_batch_is_overfitted(build, name):
    model, actions, _ = build(name, "--seed", "1")
    batch = tensors(actions(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    for _ in range(200):
        loss, _ = model.train().loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (out(model, batch)[0] - batch["action"]).square().mean() < 0.05


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANNERS)
def test_checkpoint_alone_gives_the_same_executor(build, name):
    model, actions, path = build(name)
    training.fit(model, actions, model.config, path)
    other, batch = executor.load_executor(path), tensors(actions(0))
    assert all(torch.equal(a, b) for a, b in zip(out(model, batch), out(other, batch)))
    assert not any(p.requires_grad for p in other.parameters())


def test_names_tell_runs_apart(build):
    flags = [[], ["--read", "pooled"], ["--fusion", "late"], ["--seed", "1"], ["--chunk", "4"],
             ["--action-demos", "1"], ["--steps", "7"], ["--lr", "0.5"]]
    names = [build("mask", *f)[2].name for f in flags] + [build("latent")[2].name]
    assert names[0] == "mask_tasks0_executor.pt" and len(set(names)) == len(names)
    assert build("mask", "--name", "mine")[2].name == "mine.pt"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "mask", "track"])
def test_killed_training_continues_exactly(data, mask_path, track_path, tmp_path, capsys, name):
    planner = {"mask": mask_path, "track": track_path}.get(name, name)
    argv = [*EXECUTOR, "--planner", str(planner), "--suite", SUITE, "--tasks", "0",
            "--data", str(data), "--steps", "6", "--name", "x"]
    executor.main([*argv, "--out", str(tmp_path / "whole")])
    run_and_kill("executor", "step", [*argv, "--out", str(tmp_path / "broken")])
    whole, broken = (tmp_path / folder / SUITE / "x.pt" for folder in ("whole", "broken"))
    assert training.load(broken)["step"] == 2
    capsys.readouterr()
    executor.main([*argv, "--out", str(tmp_path / "broken")])
    assert "at step 2: continuing" in capsys.readouterr().out
    one, other = training.load(whole), training.load(broken)
    assert other["step"] == 6
    assert equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])


# --- acting ---------------------------------------------------------------------------------------


class Recorded:
    """A simulator that shows the frames of an episode of the data, whatever the actions are."""

    def __init__(self, videos, episode, goal_varies=False):
        self.videos, self.e, self.task, self.t = videos, episode, videos.tasks[0], 0
        self.goal_varies, self.horizon, self.shown = goal_varies, 99, []

    def goal_image(self, **scene):
        return np.full_like(self.videos.arrays["obs/agentview_rgb"][0][0], scene["seed"])

    def frame(self, masks=True):
        self.shown.append(self.t)
        arrays = {k.removeprefix("obs/"): v[self.e][self.t] for k, v in self.videos.arrays.items()}
        return {k: v for k, v in arrays.items() if masks or k != "masks"}


def run(policy, sim, steps, scene={"init": 0}):
    policy.reset(sim, scene)
    actions = []
    for sim.t in range(steps):
        actions.append(policy(sim))
    return np.array(actions)


def test_policy_executes_its_chunk_in_order(executor_path, videos):
    policy, chunks, looks = executor.load_policy(executor_path), [], []
    act = policy.executor.act
    policy.executor.act = lambda *x: (looks.append(x[0]), chunks.append(act(*x)))[1] or chunks[-1]
    sim = Recorded(videos, 0)
    actions = run(policy, sim, 9)
    assert sim.shown == [0, 4, 8]
    assert torch.equal(looks[0][:, 0], looks[0][:, 1]), "the first look is repeated, as in training"
    assert torch.equal(looks[2][:, 0], looks[1][:, 1])
    wanted = [c[1][0, -1].clamp(-1, 1).numpy() for c in chunks]
    assert np.array_equal(actions, np.concatenate([wanted[0][:4], wanted[1][:4], wanted[2][:1]]))
    again = run(policy, Recorded(videos, 0), 9)
    assert np.array_equal(again, actions), "nothing is left of the last episode"


@pytest.mark.parametrize("chunk, t", [(8, 12), (8, 4), (1, 6), (1, 0)])
@pytest.mark.parametrize("name", ["mask", "track", "none", "none-language"])
def test_policy_sees_what_training_saw(build, videos, name, chunk, t):
    """Looks, the planner's history and token sets, live and from the data; also with one action
    per chunk, when it looks at every step."""
    model, actions, _ = build(name, "--chunk", str(chunk))
    seen, look = [], model.look
    model.look = lambda batch: seen.append(batch) or look(batch)
    run(executor.Policy(model), Recorded(videos, 0), t + 1, {"init": 0})
    actions.demos.sample_frames = lambda *rest: (np.array([0]), np.array([t]),
                                                 np.random.default_rng(0))
    model.planner.frozen, kept = False, actions.kept    # in float32, and goals from the data
    actions.kept = {}
    trained = tensors(actions(0))
    assert len(seen) >= 2 or t == 0
    looks = seen[-2:] if t else [seen[-1]] * 2
    for k in {"state", "wrist", *model.encoders}:
        assert torch.equal(torch.cat([look[k] for look in looks], 1), trained[k])
    with torch.no_grad():
        flat = {k: v.flatten(0, 1) for k, v in trained.items()}
        plan = model.planner.plan(flat, model.config.form)
    assert not kept or kept.keys() == plan.keys()
    for k, v in plan.items():
        live = torch.cat([look[f"set/{k}"] for look in looks], 1)[0]
        torch.testing.assert_close(live, v, atol=1e-4, rtol=1e-4)


def test_the_scenes_own_goal_is_shown_where_goals_vary(executor_path, videos):
    policy = executor.load_policy(executor_path)
    policy.reset(Recorded(videos, 0, goal_varies=True), {"seed": 7})
    assert (policy.fixed["goal"] == 7).all()
    policy.reset(Recorded(videos, 0), {"init": 13})
    assert torch.equal(policy.fixed["goal"][0], policy.executor.goals[0, 3])


# --- a plan of your own ---------------------------------------------------------------------------


@dataclass
class ToyConfig:
    size: int = 64


class Brightness(nn.Module):
    """The plan is how bright the goal picture is, one token."""
    kind, forms, frozen, history, stride = "toy", ["latent"], True, 1, 1
    Config = ToyConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.size = config, config.size

    def sets(self, form):
        return {"plan": (torch.tensor([[2, 0.5, 0.5]]), 1)}     # no view; a width of one number

    def plan(self, obs, form):
        return {"plan": obs["goal"].float().mean((1, 2, 3))[:, None, None]}

    def draw(self, obs):
        return [("goal", obs["goal"][0].cpu().numpy())]


def test_a_planner_of_your_own(data, tmp_path, sim, monkeypatch):
    """README's "Your own plan": a class and one line train an executor and act."""
    from rollout import play
    monkeypatch.setitem(planners.PLANNERS, "toy", "test_executor:Brightness")
    training.save(tmp_path / "toy.pt", kind="toy", config={"size": 64}, model={}, ema=None)
    executor.main([*EXECUTOR, "--planner", str(tmp_path / "toy.pt"), "--suite", SUITE, "--tasks",
                   "0", "--data", str(data), "--out", str(tmp_path)])
    policy = executor.load_policy(tmp_path / SUITE / "toy_executor_tasks0.pt")
    monkeypatch.setattr(policy, "limit", lambda sim: 9)
    success, ever, steps, pictures = play(sim, policy, {"init": 0}, film=True)
    assert (success, ever, steps, len(pictures)) == (False, False, 9, 3)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_line(build, data, mask_path, executor_path, tmp_path, refused):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(mask_path.read_bytes()[:1000])
    main = lambda *argv: lambda: executor.main([*EXECUTOR, "--data", str(data), "--out",
                                                str(tmp_path), *map(str, argv)])
    refused(main(), "--planner", "none", "python mask_planner.py")
    refused(main("--planner", "no"), "no", "none-language")
    refused(main("--planner", tmp_path / "no.pt"), "no.pt", "python mask_planner.py")
    refused(main("--planner", cut), "cut.pt", "python mask_planner.py")
    refused(main("--planner", executor_path), "executor")
    refused(main("--planner", mask_path, "--form", "tracks"), "--form tracks", "latent")
    refused(main("--planner", mask_path, "--action-demos", "3"), "--action-demos 3", "--demos 3")
    refused(main("--planner", mask_path, "--chunk", "3"), "multiple", "--chunk")
    refused(main("--planner", mask_path, "--tasks", "77"), "77")


def test_another_run_is_not_overwritten(data, mask_path, tmp_path, refused):
    argv = [*EXECUTOR, "--planner", str(mask_path), "--data", str(data), "--out", str(tmp_path),
            "--name", "mine"]
    executor.main(argv)
    refused(lambda: executor.main([*argv, "--lr", "0.5"]), "lr", "another configuration")


def test_data_of_another_size_is_refused(data, mask_path, track_path, refused):
    import mask_planner
    refused(lambda: mask_planner.main([*TRAIN, "--data", str(data), "--size", "96"]), "64")


def test_episodes_are_shared_by_name(data, task):
    """Demonstrations are the first of the videos: action number i belongs to video number i."""
    few, many = (Episodes(data, SUITE, [task], n) for n in (1, 2))
    assert np.array_equal(few.arrays["actions"][0], many.arrays["actions"][0])
