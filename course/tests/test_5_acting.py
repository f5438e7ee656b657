"""Assignment 5, acting (Mask2Act 3.3, ATM IV-B): executor, waypoints, closed loop, intervals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import executor
from executor import FOLLOW, OFFSET_SCALE, WAYPOINT_NOISE
from results import tables


@pytest.mark.grades("waypoints")
def test_waypoints_are_where_the_gripper_next_changes():
    """ATM IV-B, differs: the waypoint of step t is the hand's place at the first step with the new
    command; at the last step if none comes; FOLLOW steps long its own place after a change."""
    changes, T = (3, 3 + FOLLOW + 5), 30
    gripper = np.where((np.arange(T) >= changes[0]) & (np.arange(T) < changes[1]), 1.0, -1.0)
    position = np.random.default_rng(0).normal(size=(T, 3))
    found = executor.waypoints(position, gripper)
    assert found.shape == (T, 3)
    for t in range(T):
        step = next((c for c in changes if t < c + FOLLOW), T - 1)
        assert np.array_equal(found[t], position[step]), f"step {t}"


@pytest.mark.grades("waypoints")
def test_only_the_sign_of_the_gripper_counts():
    """ATM IV-B, differs: a command that varies without changing its sign opens or closes nothing;
    a demonstration without any change has its end as its only waypoint."""
    position = np.arange(12.0)[:, None] * np.ones(3)
    for sign in (1, -1):
        found = executor.waypoints(position, sign * np.random.default_rng(1).uniform(0.1, 1, 12))
        assert np.array_equal(found, np.full((12, 3), 11))


class Plan(torch.nn.Module):
    """A frozen planner whose plan are three tokens of five numbers."""
    kind, forms, frozen, history, stride = "plan", ["latent"], True, 1, 1

    def sets(self, form):
        return {"plan": (torch.tensor([[0, 0.2, 0.3], [0, 0.7, 0.4], [1, 0.5, 0.9]]), 5)}


def small(fusion="both"):
    """An executor on this plan, in training, and a batch of two looks of three samples."""
    torch.manual_seed(0)
    c = executor.Config(form="latent", fusion=fusion, history=2, width=16, depth=1, blocks=(),
                        chunk=4, A=3, E=6, size=32, goals=1, task_names=("a",))
    model, rng = executor.Executor(c, Plan()), np.random.default_rng(0)
    model.scale["state"].fit(rng.normal(2, 3, (50, c.S)))
    model.scale["plan"].fit(rng.normal(-1, 2, (50, 5)))
    for p in (*model.waypoint.parameters(), *model.action.parameters(), model.cls, model.when):
        torch.nn.init.normal_(p, std=0.5)       # far from 0, so that each part shows
    batch = {k: torch.randint(256, (3, 2, 32, 32, 3), dtype=torch.uint8)
             for k in ("picture", "wrist")}
    batch |= {"set/plan": torch.randn(3, 2, 3, 5), "moved": 0.1 * torch.randn(3, 2, 3, 2),
              "state": torch.randn(3, 2, c.S) + 1, "text": torch.randn(3, 2, c.E),
              "waypoint": torch.randn(3, 2, 3), "action": torch.rand(3, 2, 4, 3) * 2 - 1}
    return model, batch


def one_look(model, batch, b, t, moved):
    """The tokens of one look, one by one -> CLS (D,), the plan's token if it joins late (.,)."""
    sets = model.sets_of({k: v[b:b + 1, t:t + 1] for k, v in batch.items()})    # (1, n, .) each
    tokens = [model.cls, model.state(model.scale["state"](batch["state"][b, t])),
              model.text(batch["text"][b, t])]
    far = lambda name: (batch["moved"][b, t] if name == "plan" else moved[b])[None]
    pooled = {name: pool(sets[name], far(name))[0] for name, pool in model.pool.items()}
    plan, fusion = pooled["plan"], model.config.fusion
    tokens += [x for x in pooled.values() if x is not plan or fusion in ("early", "both")]
    return model.space(torch.stack(tokens)[None])[0, 0], plan[:16 * (fusion in ("late", "both"))]


@pytest.mark.grades("Executor.look")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fusion", ["both", "late", "early"])
@torch.no_grad()
def test_tokens_of_a_look(fusion, training, monkeypatch):
    """Mask2Act eq. 4 as ATM IV-B, Table III: each look alone gives one CLS token of all of its
    tokens: CLS, state (standardised), sentence, and of each set one, pooled by the shifts of the
    picture that it is of, kept or now; the plan's goes round it if it joins late."""
    model, batch = small(fusion)
    moved = 0.1 * torch.randn(3, 3, 2) * training
    monkeypatch.setattr(executor, "shifted",
                        lambda batch, training=True: (batch, moved * training))
    model.train(training)
    cls, late = model.look(batch)
    assert cls.shape == (3, 2, 16) and late.shape == (3, 2, 0 if fusion == "early" else 16)
    for b, t in np.ndindex(3, 2):
        wanted, beside = one_look(model, batch, b, t, moved)
        torch.testing.assert_close(cls[b, t], wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(late[b, t], beside, atol=1e-3, rtol=1e-3)


def acted(model, T, waypoint=False):
    """Executor.act of T random looks: what it was given, what it returned."""
    torch.manual_seed(1)
    given = [torch.randn(3, T, 16), torch.randn(3, T, 16), torch.randn(3, T, model.config.S)]
    given += [torch.randn(3, T, 3)] * waypoint
    return given, model.act(*given)


@pytest.mark.grades("Executor.act")
@pytest.mark.parametrize("T", [2, 1])
@torch.no_grad()
def test_where_to_and_then_how(T):
    """Mask2Act eq. 4, ATM IV-B: looks through time, the late plan beside them; then the waypoint,
    metres in units of OFFSET_SCALE about the mean place of the hand, and from its offset to the
    hand's present place the chunk of actions; of fewer looks than usual the first."""
    model, _ = small()
    (cls, late, state), (x, action, there) = acted(model.eval(), T)
    assert x.shape == (3, T, 32) and action.shape == (3, T, 4, 3) and there.shape == (3, T, 3)
    for b in range(3):
        steps = torch.stack([cls[b, t] + model.when[t] for t in range(T)])[None]
        through = model.time(steps, torch.ones(T, T).tril().bool())[0]
        for t in range(T):
            wanted = torch.cat([through[t], late[b, t]])
            torch.testing.assert_close(x[b, t], wanted, atol=1e-3, rtol=1e-3)
            place = OFFSET_SCALE * model.waypoint(wanted) + model.scale["state"].mean[:3]
            torch.testing.assert_close(there[b, t], place, atol=1e-3, rtol=1e-3)
            offset = (there[b, t] - state[b, t, :3]) / OFFSET_SCALE
            numbers = model.action(torch.cat([wanted, offset]))
            for c, a in np.ndindex(4, 3):
                assert action[b, t, c, a].item() == pytest.approx(numbers[3 * c + a].item(),
                                                                  rel=1e-2, abs=1e-2)


@pytest.mark.grades("Executor.act")
@torch.no_grad()
def test_a_later_look_changes_no_earlier_action():
    """ATM IV-B (causal attention through time)."""
    model, _ = small()
    (cls, late, state), (_, action, _) = acted(model.eval(), 2)
    other = torch.cat([cls[:, :1], torch.randn(3, 1, 16)], 1)
    again = model.act(other, late, state)[1]
    torch.testing.assert_close(action[:, 0], again[:, 0])
    assert not torch.allclose(action[:, 1], again[:, 1])


@pytest.mark.grades("Executor.act")
@torch.no_grad()
def test_the_true_waypoint_leads_with_noise_in_training():
    """ATM IV-B, differs (teacher forcing): given the true waypoint, actions follow from it, with
    noise of WAYPOINT_NOISE metres, and the predicted one is returned all the same."""
    model, _ = small()
    heads, T = [], 2
    model.action.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0][..., -3:]))
    off = []
    for _ in range(20):
        given, (_, _, there) = acted(model, T, waypoint=True)
        aim = heads.pop() * OFFSET_SCALE + given[2][..., :3]
        off.append(aim - given[3])
        torch.manual_seed(len(off))
        model.act(*given)
        off.append(heads.pop() * OFFSET_SCALE + given[2][..., :3] - given[3])
    assert torch.stack(off).abs().max() < 10 * WAYPOINT_NOISE, "the aim is the true waypoint"
    assert torch.stack(off[1::2]).std().item() == pytest.approx(WAYPOINT_NOISE, rel=0.2)
    torch.testing.assert_close(there, model.act(*given[:3])[2])


@pytest.mark.grades("Executor.loss")
@torch.no_grad()
def test_loss_equals_a_loop():
    """ATM IV-B (behavioural cloning, MSE): the mean over all numbers of all actions of the chunk,
    and 0.3 times that over the waypoint's in units of OFFSET_SCALE; what is logged are these:
    motion and gripper (an action's last number) apart."""
    model, batch = small()
    loss, parts = model.eval().loss(batch)
    _, action, there = model(batch)
    square = lambda a, b: (a.item() - b.item()) ** 2
    errors = {"motion": [], "gripper": [], "waypoint": []}
    for b, t, c, a in np.ndindex(3, 2, 4, 3):
        errors["gripper" if a == 2 else "motion"].append(
            square(action[b, t, c, a], batch["action"][b, t, c, a]))
    for b, t, k in np.ndindex(3, 2, 3):
        errors["waypoint"].append(
            square(there[b, t, k] / OFFSET_SCALE, batch["waypoint"][b, t, k] / OFFSET_SCALE))
    means = {k: np.mean(v) for k, v in errors.items()}
    assert {k: float(v) for k, v in parts.items()} == pytest.approx(means, rel=1e-3)
    wanted = np.mean(errors["motion"] + errors["gripper"]) + 0.3 * means["waypoint"]
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.grades("Executor.loss")
def test_every_parameter_gets_a_gradient():
    """Mask2Act 3.3, ATM IV-B: all of the executor learns from the loss."""
    model, batch = small()
    model.train().loss(batch)[0].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


class Fake(torch.nn.Module):
    """An executor that notes what it is asked; number c of the chunk after look k is (k, c) / 100
    and a number out of range; as a planner it brings the newest picture's brightness."""
    frozen = True

    def __init__(self, history, execute, frames=1, stride=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(history=history, execute=execute, chunk=6, goals=1,
                                      task_names=("a",))
        self.form = "latent"
        self.planner = SimpleNamespace(history=frames, stride=stride, plan=lambda obs, form: {
            "plan": obs["frames"][:, -1, :1, :1, 0].float()})
        self.goals, self.texts = torch.full((1, 1, 4, 4, 3), 7), torch.full((1, 6), 8.0)
        self.seen, self.acted = [], []

    def look(self, batch):
        self.seen.append(batch)
        return torch.full((1, 1, 2), float(len(self.seen) - 1)), torch.zeros(1, 1, 0)

    def act(self, cls, late, state):
        """Notes its looks and states; actions that say of which look and step they are."""
        self.acted.append((cls[0, :, 0].tolist(), state[0, :, 0].tolist()))
        actions = torch.zeros(1, cls.shape[1], 6, 3)
        actions[..., 0] = cls[:, :, :1] / 100
        actions[..., 1] = torch.arange(6) / 100
        actions[..., 2] = torch.tensor([-3, 3] * 3)
        return cls, actions, None


class Sim:
    """A simulator whose pictures and state tell the step; it has one task, with videos' goals."""
    task, goal_varies, t = "a", False, 0

    def frame(self, masks=True):
        picture = np.full((4, 4, 3), self.t, np.uint8)
        return {"agentview_rgb": picture, "eye_in_hand_rgb": picture + 100,
                "hand": np.full(2, self.t / 50), "ee_states": np.full(6, self.t, np.float32),
                "gripper_states": np.full(2, self.t, np.float32)}


def started(*sizes):
    model, sim = Fake(*sizes), Sim()
    policy = executor.Policy(model)
    policy.reset(sim, {"init": 0})
    return policy, sim, model


@pytest.mark.grades("Policy.observe")
@pytest.mark.parametrize("execute, frames, stride", [(2, 3, 4), (1, 2, 3), (4, 1, 1)])
def test_planners_see_live_what_they_saw_in_data(execute, frames, stride):
    """Mask2Act 3.2, 3.3: the planner's frames are `stride` control steps apart, oldest first, the
    last of now, before the start the first one; there is a look every `execute` steps."""
    policy, sim, _ = started(1, execute, frames, stride)
    for k in range(8):
        sim.t = k * execute
        obs = policy.observe(sim.frame())
        assert obs["frames"].shape == (1, frames, 4, 4, 3) and obs["frames"].dtype == torch.uint8
        wanted = [max(sim.t - stride * back, 0) for back in range(frames)[::-1]]
        assert obs["frames"][0, :, 0, 0, 0].tolist() == wanted


@pytest.mark.grades("Policy.observe")
def test_observations_are_batches_of_one():
    """Mask2Act 3.3, ATM IV-B: wrist picture and hand are of now, goal and sentence the task's."""
    policy, sim, _ = started(1, 2, 2, 2)
    for sim.t in (0, 2):
        obs = policy.observe(sim.frame())
    assert obs["wrist"].shape == (1, 4, 4, 3)
    assert (obs["wrist"] == 102).all()
    assert obs["hand"].dtype == torch.float32 and obs["hand"].shape == (1, 2)
    assert obs["hand"][0].tolist() == pytest.approx([0.04, 0.04])
    assert obs["goal"].shape == (1, 4, 4, 3) and (obs["goal"] == 7).all()
    assert obs["text"].shape == (1, 6) and (obs["text"] == 8).all()


def steps(policy, sim, count):
    return np.array([policy(sim) for sim.t in range(count)])


@pytest.mark.grades("Policy.__call__")
def test_half_a_chunk_is_executed_then_it_looks_again():
    """ATM IV-B, differs (action chunks): the first `execute` of the newest look's chunk, in order
    and clipped to [-1, 1], then a new look; no look in between."""
    policy, sim, model = started(2, 3)
    found = steps(policy, sim, 8)
    wanted = [[t // 3 / 100, t % 3 / 100, (-1, 1, -1)[t % 3]] for t in range(8)]
    assert found.shape == (8, 3)
    assert np.allclose(found, wanted, atol=1e-6)
    assert [batch["state"][0, 0, 0].item() for batch in model.seen] == [0, 3, 6]


@pytest.mark.grades("Policy.__call__")
def test_actions_follow_from_the_last_looks():
    """ATM IV-B (a history of T looks): oldest first with their states; before the first look it is
    repeated, as in training; what is older than T looks is forgotten."""
    policy, sim, model = started(3, 2)
    steps(policy, sim, 8)
    assert model.acted == [([0, 0, 0], [0, 0, 0]), ([0, 0, 1], [0, 0, 2]),
                           ([0, 1, 2], [0, 2, 4]), ([1, 2, 3], [2, 4, 6])]


@pytest.mark.grades("Policy.__call__")
def test_a_look_is_of_now():
    """Mask2Act eq. 4, ATM IV-B: state, both pictures and the plan, a batch of one look."""
    policy, sim, model = started(1, 2, 2, 2)
    steps(policy, sim, 3)
    look = model.seen[-1]
    assert look["state"].shape == (1, 1, 8) and (look["state"] == 2).all()
    assert look["picture"].shape == look["wrist"].shape == (1, 1, 4, 4, 3)
    assert (look["picture"] == 2).all()
    assert (look["wrist"] == 102).all()
    assert look["set/plan"].tolist() == [[[[2]]]]


# of the t-distribution at 97.5 %
QUANTILES = {2: 12.7062, 3: 4.3027, 5: 2.7764}


@pytest.mark.grades("t_interval")
@pytest.mark.parametrize("n", QUANTILES)
def test_interval_of_a_mean_over_seeds(n):
    """ATM Table I (mean over seeds); Student (1908): mean -+ t(0.975, n - 1) s / sqrt(n)."""
    rates = 0.5 + 0.01 * np.random.default_rng(n).normal(size=n)
    mean = sum(rates) / n
    half = QUANTILES[n] * (sum((r - mean) ** 2 for r in rates) / (n - 1) / n) ** 0.5
    assert tables.t_interval(rates) == pytest.approx((mean - half, mean + half), rel=1e-3)


@pytest.mark.grades("t_interval")
def test_interval_of_rates_lies_within_0_and_1():
    """Student (1908), of success rates: none below 0 or above 1; equal ones have no width."""
    assert tables.t_interval([0.1, 0.9]) == (0, 1)
    assert tables.t_interval([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


@pytest.mark.grades("difference_interval")
@pytest.mark.parametrize("n", QUANTILES)
def test_interval_of_a_difference_over_seeds(n):
    """ATM Table I (two methods, several seeds); Student (1908): of the n differences a - b of the
    same seed, mean -+ t(0.975, n - 1) s / sqrt(n)."""
    rng = np.random.default_rng(n)
    a, b = 0.6 + 0.01 * rng.normal(size=n), 0.4 + 0.01 * rng.normal(size=n)
    gap = [x - y for x, y in zip(a, b)]
    mean = sum(gap) / n
    half = QUANTILES[n] * (sum((g - mean) ** 2 for g in gap) / (n - 1) / n) ** 0.5
    low, high = tables.difference_interval(list(a), list(b))
    assert (low, high) == pytest.approx((mean - half, mean + half), rel=1e-3)
    assert tables.difference_interval(list(b), list(a)) == pytest.approx((-high, -low))


@pytest.mark.grades("difference_interval")
def test_what_all_methods_share_in_a_seed_cancels():
    """Student (1908), paired: seeds that are easy for both widen nothing; within [-1, 1]."""
    a, b = [0.9, 0.5, 0.2], [0.8, 0.4, 0.1]
    assert tables.difference_interval(a, b) == pytest.approx((0.1, 0.1))
    assert tables.difference_interval([1.0, 0.0], [0.0, 1.0]) == (-1, 1)
