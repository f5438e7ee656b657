"""executor.py and policy.py: what it sees in training is what it sees when acting; the planner stays frozen."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from conftest import EXECUTOR, PLANS, SIZE, SUITE, equal, run_and_kill, with_planners

import executor
import mask_planner
import track_planner
from baselines import explicit
from core import networks, training
from core.flags import as_dict, from_dict, parse

VARIANTS = {**PLANS, "explicit, two looks": [*PLANS["mask-explicit"], "--history", "2"], "four looks": ["--history", "4"],
            "cloning, two looks": [*PLANS["none"], "--history", "2"], "tracks, two looks": [*PLANS["track"], "--history", "2"],
            "early": [*PLANS["track"], "--no-late"], "late": [*PLANS["track"], "--no-early"],
            "unfused": [*PLANS["track"], "--no-late", "--no-early"], "four steps": [*PLANS["track"], "--track-length", "4"],
            "language": [*PLANS["none"], "--goal", "language"]}


@pytest.fixture
def build(data, planner_path, tmp_path):
    """build(*flags) -> a new executor, its data, the path of its checkpoint."""

    def build(*flags, planner=planner_path):
        argv = [*EXECUTOR, "--planner", str(planner), "--data", str(data), "--out", str(tmp_path),
                *with_planners(flags, planner_path)]
        return executor.build(parse(executor.Config, "", argv))

    return build


def tensors(batch):
    return {k: torch.as_tensor(v) for k, v in batch.items()}


def frame_of(videos, episode, t):
    """A row of the data file as the simulator would give it live."""
    frame = {k: videos.arrays[f"obs/{k}"][episode][t] for k in
             ("agentview_rgb", "eye_in_hand_rgb", "ee_states", "gripper_states", "joint_states")}
    return frame | {"hand": videos.arrays["hand"][episode][t], "masks": videos.arrays["masks"][episode][t]}


# --- network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_shapes_and_gradients(build, flags):
    """Every trainable parameter gets a gradient, no frozen one does."""
    model, actions, _ = build(*flags)
    batch, c = tensors(actions(0)), model.config
    with torch.no_grad():
        action, waypoint = model.eval()(batch)
    assert action.shape == (4, c.history, 8, 7) and waypoint.shape == (4, c.history, 3)
    torch.manual_seed(0)
    loss, _ = model.train().loss(batch)
    loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert not idle
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("planner."))


def test_loss_equals_a_loop(build):
    model, actions, _ = build()
    batch = tensors(actions(0))
    with torch.no_grad():
        loss, parts = model.eval().loss(batch)
        said, there = model(batch)
    squares = {"motion": [], "gripper": []}
    for b, t, c, k in np.ndindex(*said.shape):
        squares["motion" if k < 6 else "gripper"].append((said[b, t, c, k] - batch["action"][b, t, c, k]).item() ** 2)
    way = [((there[b, t, k] - batch["waypoint"][b, t, k]) / executor.NEAR).item() ** 2 for b, t, k in np.ndindex(there.shape)]
    assert parts == pytest.approx({k: np.mean(v) for k, v in squares.items()} | {"waypoint": np.mean(way)}, rel=1e-3)
    assert loss.item() == pytest.approx(np.mean(squares["motion"] + squares["gripper"]) + 0.3 * np.mean(way), rel=1e-3)


def test_actions_are_causal_over_the_history(build):
    model, actions, _ = build("--history", "3")
    batch = tensors(actions(0))
    changed = {k: v.clone() for k, v in batch.items()}
    for k in ("image", "plan", "wrist", "state"):
        changed[k][:, 2] = changed[k][:, 2].flip(0)
    with torch.no_grad():
        a, b = model.eval()(batch)[0], model(changed)[0]
        assert torch.equal(a[:, :2], b[:, :2]) and not torch.allclose(a[:, 2], b[:, 2])
        first = {k: v[:, :1] for k, v in batch.items()}
        torch.testing.assert_close(model(first)[0], a[:, :1], atol=1e-4, rtol=1e-4)


def test_random_shift():
    """Each picture by its own whole number of pixels, up to 4 each way, edges repeated; H != W."""
    B, H, W = 300, 13, 17
    y, x = np.mgrid[:H, :W]
    picture = torch.from_numpy(np.stack([y, x, y + x], -1).astype(np.uint8))
    shifted, moved = (x.numpy().astype(int) for x in networks.random_shift(picture.expand(B, H, W, 3)))
    assert shifted.shape == (B, H, W, 3)
    moves = set()
    for one, move in zip(shifted, moved):
        dy, dx = one[6, 8, :2] - [6, 8]
        moves.add((dy, dx))
        assert move.tolist() == [-dx, -dy]
        rows, columns = np.clip(y + dy, 0, H - 1), np.clip(x + dx, 0, W - 1)
        assert np.array_equal(one, np.stack([rows, columns, rows + columns], -1))
    assert {dy for dy, _ in moves} == {dx for _, dx in moves} == set(range(-4, 5)) and len(moves) > 60


def test_pictures_are_shifted_in_training_only(build, monkeypatch):
    model, actions, _ = build()
    batch, calls = tensors(actions(0)), []
    monkeypatch.setattr(core, "random_shift", lambda images: (calls.append(images.shape) or images, torch.zeros(4, 2)))
    model.eval()(batch)
    assert not calls
    model.train()(batch)
    assert calls == [(4, SIZE, SIZE, 3)]


def test_key_points_lie_where_the_feature_is():
    token = executor.MapToken(8, 16, 6).eval()
    token.norm.forward = lambda x: x
    token.points.weight.data.zero_()
    token.points.weight.data[:, 0] = 100
    seen = {}
    token.out.forward = lambda x: seen.setdefault("x", x)
    x = torch.zeros(1, 16, 8)
    x[0, 1 * 4 + 3, 0] = 1      # row 1, column 3 of 4
    token(x)
    where = seen["x"][0, :64].view(32, 2)
    torch.testing.assert_close(where, torch.tensor([1.0, -1 / 3]).expand(32, 2), atol=1e-4, rtol=1e-4)


def test_the_explicit_plan_in_numbers(build):
    """The task's objects, not the robot; noise only in training, the same for the first look and now."""
    model, actions, _ = build("--plan-form", "explicit", "--blur", "2")
    said = actions.cached["numbers"].float()[0, :, None]  # (frames, 1, N, 5)
    heard = model.eval().places.hear(said, said)  # (frames, 1, M, 5)
    assert heard.shape[2] == 2 * 2 == model.places.M
    first, now = heard.chunk(2, 2)
    assert torch.equal(first, now) and torch.equal(first, said[:, :, 1:])
    same = said[:1].expand(4000, 1, -1, -1)
    noise = model.train().places.hear(same, same) - heard[:1]
    noise = 100 * noise.view(4000, 2, 2, 5).numpy()  # percent of the picture
    x, lowest, size = noise[..., 0], noise[..., 3], noise[..., 2]
    assert x.std(0).mean() == pytest.approx(np.hypot(2, 1), rel=0.1) and size.std(0).mean() == pytest.approx(1, rel=0.1)
    between = lambda a, b: np.corrcoef(a, b)[0, 1]
    assert between(x[:, 0, 0], lowest[:, 1, 0]) > 0.7, "an object's places move together"
    assert abs(between(x[:, 0, 0], x[:, 0, 1])) < 0.1 and abs(between(x[:, 0, 0], noise[:, 0, 0, 1])) < 0.1


def test_standardised_by_the_demonstrations(build):
    model, actions, _ = build("--plan-form", "explicit")
    said = actions.cached["numbers"].float()[:, :, [1, 2, 1, 2]]  # of the task's objects, at the first look and now
    said = model.places.in_metres(said).flatten(0, 1)  # (DRAWS frames, M, 5)
    torch.testing.assert_close(model.places.mean, said.mean(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.places.std, said.std(0).clamp(min=1e-3), atol=1e-4, rtol=1e-3)
    now = actions.cached["numbers"].float()[0, :, None]
    numbers = model.eval().places(model.places.hear(now, now))  # (frames, 1, 5 M)
    assert numbers.shape[-1] == 5 * model.places.M and numbers.mean(0).abs().max() < 0.5


def test_a_waypoint_is_beside_what_is_pointed_at(build):
    """Looking straight down from 2 m, the picture as wide as 1 m on the ground."""
    model, _, _ = build("--plan-form", "explicit")
    places = model.places
    places.eye.copy_(torch.tensor([0.0, 0, 2]))
    places.rays.copy_(torch.tensor([[0.5, 0, 0], [0, 0.5, 0], [0, 0, -1]]))
    heard = torch.rand(1, 1, places.M, 5)
    pointer = torch.eye(places.M)[2].expand(1, 1, -1)
    for height, scale in ((0.0, 1.0), (1.0, 0.5)):
        there = places.beside(heard, pointer, torch.tensor([[height]]))
        torch.testing.assert_close(there[0, 0], (heard[0, 0, 2, :2] - 0.5) * scale)


def test_the_camera_is_found_by_the_hand():
    """A hand that moves in front of a known camera, seen with noise and now and then elsewhere altogether."""
    rng = np.random.default_rng(0)
    eye, ahead, right = np.array([0.7, 0.1, 1.6]), np.array([-0.8, 0, -0.6]), np.array([0, 1.0, 0])
    turn = np.stack([right, np.cross(ahead, right), ahead], 1)  # (3, 3) columns: right, down, ahead
    hand = rng.uniform([-0.3, -0.3, 0.9], [0.2, 0.3, 1.3], (2000, 3))
    there = (hand - eye) @ turn
    assert there[:, 2].min() > 0.3
    seen = 0.5 + 1.2 * there[:, :2] / there[:, 2:] + rng.normal(0, 0.005, (2000, 2))
    seen[::10] = rng.uniform(0, 1, (200, 2))
    found, rays = (torch.as_tensor(x, dtype=torch.float32) for x in explicit.calibrate(hand, seen))
    assert np.linalg.norm(found.numpy() - eye) < 0.03
    exact = torch.as_tensor(0.5 + 1.2 * there[:, :2] / there[:, 2:], dtype=torch.float32)
    back = explicit.ground(exact, found, rays, torch.as_tensor(hand[:, 2:], dtype=torch.float32))
    assert np.linalg.norm(back.numpy() - hand[:, :2], axis=1).max() < 0.015


def test_the_ground_of_a_real_scene(build, videos):
    """By its own hand alone, from two demonstrations, the executor knows where the plate is to a few centimetres."""
    eye, rays = (torch.as_tensor(x, dtype=torch.float32) for x in explicit.calibrate(*hand_and_fingertips(videos)))
    masks = torch.as_tensor(videos.arrays["masks"][0][:1].copy()).long()
    plate = explicit.locate(mask_planner.binary_masks(masks, 3))[0][0, 2, :2]  # (2,)
    there = explicit.ground(plate, eye, rays, torch.tensor(0.9)).numpy()
    assert np.linalg.norm(there - videos.arrays["obs/ee_states"][0][-1, :2]) < 0.15, "where the bowl was set down"


def hand_and_fingertips(videos):
    """Where the hand was felt (F, 3) and, in the true masks, seen (F, 2)."""
    seen = [explicit.locate(mask_planner.binary_masks(torch.as_tensor(m.copy()).long(), 1))[0][:, 0, 3:].numpy()
            for m in videos.arrays["masks"]]
    return np.concatenate([s[:, :3] for s in videos.arrays["obs/ee_states"]]), np.concatenate(seen)


def test_the_hand_is_felt_with_noise_in_training_only(build):
    for flags, noise in ((["--plan-form", "explicit"], executor.FEEL), ([], 0)):
        model, actions, _ = build(*flags, "--batch", "64")
        heard = []
        model.state.register_forward_pre_hook(lambda _, x: heard.append(x[0] * model.std + model.mean))
        batch = tensors(actions(0))
        with torch.no_grad():
            model.eval()(batch)
            model.train()(batch)
        off = heard[1] - heard[0]
        torch.testing.assert_close(heard[0], batch["state"], atol=1e-5, rtol=0)
        assert off[..., :3].std().item() == pytest.approx(noise, rel=0.3, abs=1e-6) and off[..., 3:].abs().max() < 1e-5


def test_what_the_action_head_hears(build):
    """In training the true waypoint with AIM of noise, when acting its own."""
    model, actions, _ = build("--plan-form", "explicit")
    heard = []
    model.head.register_forward_pre_hook(lambda _, x: heard.append(x[0][..., -3:].detach()))
    batch = tensors(actions(0))
    with torch.no_grad():
        _, there = model.eval()(batch)
        model.train()(batch)
    own, true = heard
    torch.testing.assert_close(own, (there - batch["state"][..., :3]) / executor.NEAR)
    off = true * executor.NEAR + batch["state"][..., :3] - batch["waypoint"]
    assert 0 < off.abs().max() < 5 * executor.AIM


# --- the frozen planner ---------------------------------------------------------------------------


def test_planner_stays_in_eval(build):
    model, _, _ = build()
    model.train()
    assert model.training and model.wrist_encoder.training
    assert not any(m.training for m in model.planner.modules())
    assert not any(p.requires_grad for p in model.planner.parameters())


@pytest.mark.parametrize("plan", ["mask", "mask-explicit", "track", "ee"])
def test_training_leaves_the_planner_unchanged(executor_paths, planner_path, plan):
    planner, trained = training.load(planner_path.with_stem(plan.split("-")[0]))["model"], training.load(executor_paths[plan])["model"]
    for name, value in planner.items():
        assert torch.equal(trained[f"planner.{name}"], value), name


@pytest.mark.parametrize("flags", [[], ["--history", "2"]])
def test_cached_and_uncached_training_see_the_same(build, flags):
    (model, cached, _), (_, live, _) = build(*flags), build(*flags, "--no-cache")
    assert cached.cached and not live.cached
    for step in (0, 3):
        a, b = tensors(cached(step)), tensors(live(step))
        assert all(torch.equal(a[k], b[k]) for k in a.keys() & b.keys()) and {"state", "action", "wrist"} <= a.keys()
        for mode in (True, False):
            losses = []
            for batch in (a, b):
                torch.manual_seed(step)
                losses.append(model.train(mode).loss(batch)[0].item())
            assert losses[0] == pytest.approx(losses[1], rel=0.01)
    for k, v in model.features({k: b[k].flatten(0, 1) for k in executor.LOOK}).items():
        torch.testing.assert_close(a[k].flatten(0, 1), v, atol=0.01, rtol=0.01)


def test_goals_are_of_another_video_of_the_task(build):
    _, actions, _ = build("--action-demos", "1")
    row = np.arange(len(actions.demos))
    goals = np.stack([actions.goal_of(row, draw) for draw in range(executor.DRAWS)])
    assert (goals == 1).all(), "episode 0 is the demonstration, 1 the only other video"
    actions.videos, actions.demos = deepcopy(actions.videos), deepcopy(actions.demos)
    actions.videos.length, actions.videos.tasks = np.full(12, 10), ["a", "b"]       # 6 videos of each of 2 tasks
    actions.demos.length, actions.demos.tasks = np.full(4, 10), ["a", "b"]          # 2 demonstrations of each
    actions.demos.task, actions.demos.start = np.array([0, 0, 1, 1]), np.arange(5) * 10
    row = np.arange(40)
    goals = np.stack([actions.goal_of(row, draw) for draw in range(executor.DRAWS)])
    own = np.array([0, 1, 6, 7])[row // 10]
    assert (goals // 6 == row // 20).all() and (goals != own).all() and len(set(goals[:, :10].ravel())) == 5


# --- data -----------------------------------------------------------------------------------------


def test_batch_is_what_the_file_holds(build, videos):
    _, actions, _ = build("--history", "2", "--chunk", "6", "--no-cache")
    last = videos.length[1] - 1
    actions.demos.draw = lambda *rest: (np.array([0, 1]), np.array([3, last]), np.random.default_rng(0))
    batch = actions(0)
    at = np.array([[0, 3], [last - 4, last]])     # looks are 4 steps apart, and none is before the start
    for i, e in np.ndindex(2, 2):
        frame = frame_of(videos, i, at[i, e])
        assert np.array_equal(batch["wrist"][i, e], frame["eye_in_hand_rgb"])
        assert np.array_equal(batch["state"][i, e], np.append(frame["ee_states"], frame["gripper_states"]))
        assert np.array_equal(batch["frames"][i, e, 0], frame["agentview_rgb"])
        ahead = np.minimum(at[i, e] + np.arange(6), last if i else 10 ** 6)
        assert np.array_equal(batch["action"][i, e], videos.arrays["actions"][i][ahead])
        assert np.array_equal(batch["goal"][i, e], videos.arrays["obs/agentview_rgb"][1 - i][-1])


def test_waypoints():
    """Closes at 2, opens at 12, ends at 23; the fingers follow for 8 steps each time."""
    gripper, position = np.repeat([-1, 1, -1], [2, 10, 12]), np.arange(72.0).reshape(24, 3)
    assert np.array_equal(executor.waypoints(position, gripper)[:, 0] / 3, np.repeat([2, 12, 23], [10, 10, 4]))
    assert np.array_equal(executor.waypoints(position, -np.ones(24))[:, 0] / 3, [23] * 24)


def test_waypoints_are_the_demonstrations_own(build, videos):
    _, actions, _ = build()
    for k in range(2):
        gripper, position = videos.arrays["actions"][k][:, 6], videos.arrays["obs/ee_states"][k][:, :3]
        close = np.flatnonzero(gripper > 0)[0]
        assert np.array_equal(actions.waypoint[actions.demos.start[k]], position[close])
        assert np.array_equal(actions.waypoint[actions.demos.start[k + 1] - 1], position[-1])
    batch = actions(0)
    assert batch["waypoint"].shape == (*batch["state"].shape[:2], 3)


def test_states_are_normalised_by_the_data(build, videos):
    model, _, _ = build("--action-demos", "1")
    state = np.concatenate([videos.arrays[k][0] for k in executor.STATE], 1)
    np.testing.assert_allclose(model.mean, state.mean(0), atol=1e-5)
    np.testing.assert_allclose(model.std, state.std(0).clip(1e-3), atol=1e-5)
    assert {"mean", "std", "goals"} <= model.state_dict().keys()


def test_carried_goals_are_the_videos_last_frames(build, videos):
    model, _, _ = build()
    assert model.goals.shape == (1, 2, SIZE, SIZE, 3)
    for goal, pictures in zip(model.goals[0], videos.arrays["obs/agentview_rgb"]):
        assert np.array_equal(goal, pictures[-1])


def test_one_batch_is_overfitted(build):
    model, actions, _ = build()
    batch = tensors(actions(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    first = model.eval().loss(batch)[0].item()
    torch.manual_seed(0)
    for _ in range(80):
        loss, _ = model.train().loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = model.eval().loss(batch)[0].item()
    assert last < 0.3 * first, (first, last)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_checkpoint_alone_gives_the_same_executor(build, plan):
    model, actions, path = build(*PLANS[plan], "--steps", "2")
    model = training.fit(model, actions, model.config, path, extra=model.extra)
    again, batch = executor.load_executor(path), tensors(actions(0))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        assert torch.equal(model(batch)[0], again(batch)[0])


def test_names_tell_runs_apart(build):
    names = [build(*flags)[2].name for flags in (
        [], PLANS["mask-explicit"], PLANS["none"], ["--action-demos", "1"], ["--seed", "3"])]
    assert names == ["mask_executor_d2.pt", "mask-explicit_executor_d2.pt", "none_executor_d2.pt",
                     "mask_executor_d1.pt", "mask_executor_d2_s3.pt"]


@pytest.mark.parametrize("plan", PLANS)
def test_killed_training_continues_exactly(data, planner_path, tmp_path, capsys, plan):
    argv = [*EXECUTOR, "--steps", "6", "--planner", str(planner_path), "--data", str(data),
            *with_planners(PLANS[plan], planner_path)]
    executor.main([*argv, "--out", str(tmp_path / "whole")])
    run_and_kill("executor", "step", [*argv, "--out", str(tmp_path / "broken")])
    whole, broken = (tmp_path / name / SUITE / f"{plan}_executor_d2.pt" for name in ("whole", "broken"))
    assert training.load(broken)["step"] == 2
    capsys.readouterr()
    executor.main([*argv, "--out", str(tmp_path / "broken")])
    assert "at step 2: continuing" in capsys.readouterr().out
    one, other = training.load(whole), training.load(broken)
    assert other["step"] == 6 and equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])


# --- acting ---------------------------------------------------------------------------------------


def test_policy_executes_its_chunk_in_order(executor_paths, videos):
    model = executor.load_executor(executor_paths["mask"])
    policy, said = executor.Policy(model), []
    forward = model.forward
    model.forward = lambda batch: said.append(forward(batch)) or said[-1]
    policy.reset(model.goals[0, 0])
    looks, actions = [], []
    for t in range(9):
        looks.append(policy.wants_frame)
        actions.append(policy(frame_of(videos, 0, t) if policy.wants_frame else None))
    assert looks == [t % 4 == 0 for t in range(9)] and len(said) == 3
    wanted = [said[k][0][0, -1].clamp(-1, 1).numpy() for k in range(3)]
    assert np.array_equal(actions, np.concatenate([wanted[0][:4], wanted[1][:4], wanted[2][:1]]))
    policy.reset(model.goals[0, 0])
    assert policy.wants_frame, "what is left of the last episode's chunk is forgotten"


@pytest.mark.parametrize("plan, history, look", [("mask", 1, 1), ("mask", 3, 2), ("mask-explicit", 2, 1), ("none", 1, 3),
                                                 ("track", 1, 2), ("track-latent", 1, 1), ("ee", 1, 2)])
def test_policy_sees_what_training_saw(build, videos, tmp_path, plan, history, look):
    """Frames of the data file as live frames: pixels, states and features equal the training batch's.

    history: of the planner, look: of the executor.
    """
    planner = mask_planner.MaskPlanner(mask_planner.Config(
        tasks="0", demos=2, steps=5, preset="laptop", size=SIZE, width=32, depth=1, blocks=(1, 1, 1), channels=16,
        history=history, device="cpu", bf16=False))
    training.save(tmp_path / "p.pt", kind=planner.kind, config=as_dict(planner.config), model=planner.state_dict())
    model, actions, _ = build("--history", str(look), "--no-cache", *PLANS[plan], planner=tmp_path / "p.pt")
    t = 8
    actions.demos.draw = lambda *rest: (np.array([0]), np.array([t]), np.random.default_rng(0))
    trained, live, looks = tensors(actions(0)), {}, []
    model.forward = lambda batch: live.update(batch) or (torch.zeros(1, look, 8, 7), None)
    if model.planner:
        features = model.features
        model.features = lambda seen: looks.append(seen) or features(seen)
    policy = executor.Policy(model)
    policy.reset(model.goals[0, 1])     # the last frame of video 1, as goal_of gives for video 0
    for step in range(t + 1):
        policy(frame_of(videos, 0, step) if policy.wants_frame else None)
    assert torch.equal(live["state"], trained["state"])
    assert plan == "mask-explicit" or torch.equal(live["wrist"], trained["wrist"])
    assert plan == "mask-explicit" or torch.equal(live["picture"], trained["picture"])
    if plan == "none":
        assert torch.equal(live["goal"], trained["goal"])
        return
    rows = np.maximum(t + 4 * np.arange(1 - look, 1), 0)
    for row, seen in zip(rows, looks[-look:]):
        wanted = actions.look(np.array([row]), np.array([0]))
        assert seen.keys() == wanted.keys() == set(executor.LOOK)
        assert all(np.array_equal(seen[k], wanted[k]) for k in wanted)
    if plan == "mask-explicit":  # its few numbers are always cached, in float16
        assert torch.equal(live["first"][0, -1], model.features(looks[0])["numbers"][0])
        for k in ("numbers", "goal_code", "first"):
            torch.testing.assert_close(live[k], trained[k], atol=0.01, rtol=0.01)
        return
    said = features({k: trained[k].flatten(0, 1) for k in executor.LOOK})
    assert said.keys() == ({"tracks"} if plan == "track" else {"image", "plan"}) <= live.keys()
    for k, v in said.items():
        torch.testing.assert_close(live[k][0], v, atol=1e-4, rtol=1e-4)


# --- tracks ---------------------------------------------------------------------------------------


def test_fusions_change_what_they_should(build):
    """Tracks reach the action by early fusion, by late fusion, by both, or not at all; pictures always do."""
    for flags, heard in (([], True), (["--no-late"], True), (["--no-early"], True), (["--no-early", "--no-late"], False)):
        model, actions, path = build(*PLANS["track"], *flags)
        batch = tensors(actions(0))
        with torch.no_grad():
            said = model.eval()(batch)[0]
            other = model(batch | {"tracks": batch["tracks"].flip(0)})[0]
            seen = model(batch | {"picture": 255 - batch["picture"]})[0]
        assert torch.equal(said, other) != heard and not torch.equal(said, seen)
    assert path.name == "track-unfused_executor_d2.pt"


def test_fusions_change_nothing_else(build):
    """Early fusion is one layer more, late fusion another and wider heads, of the waypoint and of the actions."""
    shapes = {}
    for early, late in np.ndindex(2, 2):
        flags = ["--no-early"] * (not early) + ["--no-late"] * (not late)
        state = build(*PLANS["track"], *flags)[0].state_dict()
        shapes[early, late] = {k: tuple(v.shape) for k, v in state.items()}
    for late in range(2):
        assert shapes[1, late].keys() - shapes[0, late].keys() == {"spatial.track.weight", "spatial.track.bias"}
    for early in range(2):
        a, b = shapes[early, 0], shapes[early, 1]
        heads = ["reach.0.weight", "head.0.weight"]
        assert b.keys() - a.keys() == {"late.weight", "late.bias"} and [k for k in a if a[k] != b[k]] == heads
        assert b["late.weight"] == (32, 2 * 16 * 32 * 2) and all(b[k][1] - a[k][1] == 32 for k in heads)


@pytest.mark.parametrize("length", [4, 8])
def test_only_the_first_steps_are_heard(build, length):
    """The policy is given the first steps of what the planner says, and is as much smaller."""
    (whole, long, _), (short, actions, path) = build(*PLANS["track"]), build(*PLANS["track"], "--track-length", str(length))
    assert path.name == f"track-{length}steps_executor_d2.pt"
    a, b = long(0)["tracks"], actions(0)["tracks"]
    assert a.shape == (4, 1, 2, 16, 32, 2) and torch.equal(a[:, :, :, :length], b)
    assert short.spatial.track.in_features * 16 == whole.spatial.track.in_features * length


def test_atm_feels_joints_and_fingers(build, videos):
    """The transformer does not hear where the hand is; the waypoint is still told from there."""
    model, actions, _ = build(*PLANS["track"])
    batch = tensors(actions(0))
    episode, t, _ = actions.demos.draw(0, 4, 0)
    joints = np.stack([videos.arrays["obs/joint_states"][e][i] for e, i in zip(episode, t)])
    assert np.array_equal(batch["state"][:, 0, 8:], joints)
    with torch.no_grad():
        heard = model.eval().listen(batch)[0]
        for part, matters in ((slice(0, 6), False), (slice(6, 8), True), (slice(8, 15), True)):
            state = batch["state"].clone()
            state[..., part] += 0.5
            assert torch.equal(model.listen(batch | {"state": state})[0], heard) != matters


def test_attention_is_that_of_the_cls_token(build):
    """Of patches, a row of the softmax; without tracks the patches and the token itself share all of it."""
    model, actions, _ = build(*PLANS["track"])
    spatial, n = model.spatial.eval(), model.spatial.n
    spatial.gpt.blocks = spatial.gpt.blocks[:1]
    pictures, tracks = torch.randn(3, 2, n, 32), torch.rand(3, 2, 16, 32, 2)
    shares = spatial.attention(pictures, tracks)
    assert shares.shape == (3, 2, n) and (shares > 0).all() and (shares.sum((1, 2)) < 1).all()
    alone = spatial.attention(pictures, None)
    x, block = spatial.tokens(pictures, None), spatial.gpt.blocks[0]
    q, k, _ = block.split(x)
    own = (q[:, :, 0] * k[:, :, 0]).sum(-1) / q.shape[-1] ** 0.5
    rest = (q[:, :, :1] * k[:, :, 1:]).sum(-1) / q.shape[-1] ** 0.5  # (B, heads, 2 n)
    wanted = rest.exp() / (own.exp()[..., None] + rest.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(alone, wanted.mean(1).unflatten(1, (2, n)))


def test_atms_image_encoder(build):
    """Two convolutions, a token per 16 pixels: --blocks 0, as at the paper preset; only for tracks."""
    stem = executor.Stem(16)
    for size, cells in ((128, 8), (96, 6)):
        images = torch.randint(256, (2, size, size, 3), dtype=torch.uint8)
        assert stem(images).shape == (2, 16, cells, cells) and stem.cells(size) == cells
    model, data, _ = build(*PLANS["track"], "--blocks", "0", "--spatial-depth", "3")
    assert isinstance(model.encoder, executor.Stem) and len(model.spatial.gpt.blocks) == 3
    loss, _ = model.train().loss({k: torch.as_tensor(v) for k, v in data(0).items()})
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.wrist_encoder.parameters())


def test_the_paper_preset_is_table_vii(data, planner_path):
    """ATM's batch and optimiser, for tracks only, and only where no flag says otherwise."""
    planner = track_planner.load_planner(planner_path.with_stem("track"))
    parse = lambda *flags: parse(executor.Config, "", ["--preset", "paper", "--planner", "track.pt", "--device", "cpu", *flags])
    settled = lambda c: executor.settle(c, deepcopy(planner)) or c
    planner.config.demos = 50
    c = settled(parse())
    assert (c.batch, c.lr, c.weight_decay, c.warmup, c.clip, c.jitter) == (512, 5e-4, 1e-4, 0, 100.0, 0.3)
    assert (c.history, c.track_length, len(executor.POINTS), c.preset) == (10, 16, 32, "paper")
    assert (c.width, c.blocks, c.spatial_depth) == (128, (0,), 7)
    c = settled(parse("--batch", "8", "--steps", "7"))
    assert (c.batch, c.steps, c.clip) == (8, 7, 100.0)
    c = settled(parse("--plan-form", "latent"))
    assert (c.batch, c.weight_decay, c.jitter, c.width, c.blocks) == (32, 1e-2, 0.0, 256, (2, 2, 2, 2))


def moving(*shape):
    """Tracks from the policy's points, random, of the same ways in units of either view."""
    points, far = torch.tensor(executor.POINTS), torch.tensor(executor.FAR)[:, None, None, None]
    return points + far * torch.randn(*shape, 1, 16, 32, 2).expand(*shape, 2, 16, 32, 2)


def test_a_track_carries_its_own_view(build):
    """Tokens of equal ways in both views differ by the views' ids alone; the order of points is of no matter."""
    model, _, _ = build(*PLANS["track"], "--no-late")
    spatial, pictures, go = model.spatial.eval(), torch.randn(3, 2, model.spatial.n, 32), moving(3)
    with torch.no_grad():
        spatial.view.normal_()
        x = spatial.tokens(pictures, go)[:, 1 + 2 * spatial.n:].unflatten(1, (2, 32))
        ids = (spatial.view[0] - spatial.view[1]).expand(3, 32, -1)
        torch.testing.assert_close(x[:, 0] - x[:, 1], ids, atol=1e-4, rtol=1e-4)
        mixed = torch.cat([x[:, :, torch.randperm(32)].flatten(1, 2)], 1)
        whole = spatial.tokens(pictures, go)
        other = torch.cat([whole[:, :1 + 2 * spatial.n], mixed], 1)
        torch.testing.assert_close(spatial.gpt(other)[:, 0], spatial.gpt(whole)[:, 0], atol=1e-4, rtol=1e-4)


def test_ways_are_those_from_the_points():
    go = torch.randn(3, 2, 16, 32, 2)
    far = torch.tensor(executor.FAR)[:, None, None, None]
    torch.testing.assert_close(executor.ways(torch.tensor(executor.POINTS) + far * go), go, atol=1e-4, rtol=1e-4)


def test_points_move_with_their_picture(build):
    """Shifted by a patch to the right, a picture's points stand where those of the next patch stood; ways stay."""
    model, _, _ = build(*PLANS["track"])
    spatial, pictures, go = model.spatial, torch.randn(1, 2, model.spatial.n, 32), moving(1)
    moved = torch.zeros(1, 2, 2)
    moved[0, 1, 0] = 1 / spatial.side   # the wrist's picture, in widths
    still, there = (spatial.tokens(pictures, go, by)[0, 1 + 2 * spatial.n:].unflatten(0, (2, 32)) for by in (None, moved))
    assert torch.equal(still[0], there[0])
    where = torch.tensor(executor.POINTS) * spatial.side - 0.5
    code = lambda x: networks.sincos(x.flip(-1), 32)
    torch.testing.assert_close(there[1] - still[1], code(where + torch.tensor([1.0, 0])) - code(where), atol=1e-4, rtol=1e-4)
    seen = {}
    spatial.forward = lambda pictures, tracks, moved: seen.update(moved=moved) or torch.zeros(4, 32)
    torch.manual_seed(0)
    batch = tensors(build(*PLANS["track"])[1](0))
    pixels = []
    shift = networks.random_shift
    networks.random_shift = lambda images: pixels.append(shift(images)) or pixels[-1]
    try:
        model.train()(batch)
        assert torch.equal(seen["moved"], torch.stack([p[1] for p in pixels], 1) / SIZE) and len(pixels) == 2
        model.eval()(batch)
        assert (seen["moved"] == 0).all() and len(pixels) == 2
    finally:
        networks.random_shift = shift


def test_a_form_that_the_planner_cannot_give_is_refused(build, refused):
    refused(lambda: build("--plan-form", "tracks"), "--plan-form tracks", "latent or explicit")
    refused(lambda: build(*PLANS["track"], "--plan-form", "explicit"), "explicit", "tracks or latent")


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_line(build, data, planner_path, executor_paths, tmp_path, refused):
    refused(lambda: executor.main(["--preset", "laptop"]), "--planner", "none", "python mask_planner.py")
    refused(lambda: build(planner=tmp_path / "no.pt"), "no.pt", "python mask_planner.py")
    refused(lambda: build(planner=executor_paths["mask"]), executor_paths["mask"], "mask_planner", "executor")
    refused(lambda: build("--action-demos", "3"), "--action-demos 3", "2 videos")
    refused(lambda: build("--action-demos", "0"), "--action-demos 0", "1 or more")
    refused(lambda: build("--plan-form", "poem"), "poem", "explicit")
    refused(lambda: build("--tasks", "77"), "77", "0 to 9")
    refused(lambda: build("--planner", "none", "--suite", "libero_space"), "libero_space")
    refused(lambda: build("--data", str(tmp_path / "nowhere")), "nowhere", "python extract.py")
    (tmp_path / "cut.pt").write_bytes(planner_path.read_bytes()[:1000])
    refused(lambda: build(planner=tmp_path / "cut.pt"), "cut.pt", "python mask_planner.py")


def test_data_of_another_size_is_refused(build, planner_path, tmp_path, refused):
    content = training.load(planner_path)
    planner = mask_planner.MaskPlanner(from_dict(mask_planner.Config, content["config"] | {"size": 64}))
    training.save(tmp_path / "p.pt", **content | {"config": as_dict(planner.config), "model": planner.state_dict()})
    refused(lambda: build(planner=tmp_path / "p.pt"), "64 px", "96 px", "--data")


def test_another_run_is_not_overwritten(data, planner_path, tmp_path, refused):
    argv = [*EXECUTOR, "--planner", str(planner_path), "--steps", "1", "--data", str(data), "--out", str(tmp_path)]
    executor.main(argv)
    path = tmp_path / SUITE / "mask_executor_d2.pt"
    before = path.read_bytes()
    refused(lambda: executor.main([*argv, "--batch", "2"]), path, "batch 4 there, 2 here", "--out")
    assert path.read_bytes() == before
