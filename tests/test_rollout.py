"""rollout.py: what is a success, every scene once, films, results that nothing overwrites."""

import json

import numpy as np
import pytest

from conftest import SUITE

import executor
import rollout
import sims
from core import training
from core.flags import parse

WORKER = ["--workers", "1", "--device", "cpu"]


class Scripted:
    """Stands in for a simulator: success at the given steps."""

    def __init__(self, *successes):
        self.successes, self.calls = list(successes), []

    def reset(self, **scene):
        self.calls.append(scene)

    def step(self, action, observe=True):
        self.calls.append("step")
        return None, self.successes[self.calls.count("step") - 1]


class Still:
    """An actor that does nothing; `patient`: it ends at its fourth step, not at success."""

    def __init__(self, patient=False):
        self.patient = patient

    def reset(self, sim, scene):
        self.steps, self.scene = 0, scene
        sim.calls.append("actor")

    def __call__(self, sim):
        self.steps += 1
        return np.zeros(7, np.float32)

    def finished(self, success):
        return self.steps == 4 if self.patient else success

    def limit(self, sim):
        return len(sim.successes)

    def draw(self, sim):
        return np.full((4, 4, 3), self.steps, np.uint8)


class Short:
    """The real simulator with a short horizon; `close` leaves it open for the next test."""

    def __init__(self, sim, horizon):
        self.sim, self.horizon = sim, horizon

    def __getattr__(self, name):
        return getattr(self.sim, name)

    def close(self):
        pass


def config(*flags):
    return parse(rollout.Config, "", [*WORKER, *flags])


# --- what is a success ----------------------------------------------------------------------------


def test_an_episode():
    """An actor ends it; success at the end and at any step, however it ends."""
    play = lambda actor, *successes: rollout.play(Scripted(*successes), actor, {"init": 3})[:3]
    assert play(Still(), False, False, True, False) == (True, True, 3)
    assert play(Still(), False, False, False, False) == (False, False, 4)
    assert play(Still(), False, False, False, True) == (True, True, 4)
    assert play(Still(patient=True), False, True, True, False, True) == (False, True, 4)
    assert play(Still(patient=True), False, False, True, True, False) == (True, True, 4)


def test_the_actor_is_reset_before_the_scene_and_draws_every_fourth_step():
    """So it may use the simulator (Meta-World's goal picture)."""
    sim, actor = Scripted(*[False] * 9), Still()
    pictures = rollout.play(sim, actor, {"seed": 5}, film=True)[3]
    assert sim.calls[:3] == ["actor", {"seed": 5}, "step"] and actor.scene == {"seed": 5}
    assert [p[0, 0, 0] for p in pictures] == [1, 5, 9]
    assert rollout.play(Scripted(*[False] * 9), actor, {"seed": 5})[3] == []


def test_demonstrator_succeeds_in_the_simulator(sim):
    actor = rollout.Demonstrator(sim)
    success, ever, steps, _ = rollout.play(sim, actor, {"init": 0})
    assert success and ever and 60 < steps < actor.limit(sim)


def test_wilson():
    """Against the roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    for k, n in ((0, 10), (3, 10), (10, 10), (57, 100)):
        roots = np.roots([1 + 1.96 ** 2 / n, -(2 * k / n + 1.96 ** 2 / n), (k / n) ** 2])
        assert rollout.wilson(k, n) == pytest.approx(sorted(roots.real), abs=1e-6)


# --- evaluation -----------------------------------------------------------------------------------


def test_scenes(refused):
    """Test scenes are bundled or evaluation ones, development scenes have seeds of their own."""
    assert rollout.scenes_of(config("--episodes", "2")) == [{"init": 0}, {"init": 1}]
    first = rollout.scenes_of(config("--scenes", "development"))[0]["seed"]
    assert first == sims.DEVELOPMENT
    assert rollout.scenes_of(config("--scenes", "70"))[1] == {"seed": 71}
    refused(lambda: rollout.scenes_of(config("--episodes", "51")), "50 test scenes")
    refused(lambda: rollout.scenes_of(config("--scenes", "new")), "development")


@pytest.mark.parametrize("tasks, workers", [(1, 1), (1, 3), (2, 2), (5, 2)])
def test_every_scene_is_played_once(monkeypatch, tasks, workers):
    """However the scenes are split among the processes."""
    def run_jobs(function, jobs, count, total, desc):
        assert count == workers and total == 7 * tasks
        for make_actor, _, suite, task, scenes, *_ in jobs[::-1]:
            yield from ((task, (scene["init"], True, True, 9)) for scene in scenes)
    monkeypatch.setattr(rollout, "run_jobs", run_jobs)
    c = config("--episodes", "7", "--workers", str(workers))
    names = [f"task{k}" for k in range(tasks)]
    found = rollout.evaluate(None, c, SUITE, names, 64, "fast", "films")
    assert found == {name: [(k, True, True, 9) for k in range(7)] for name in names}


def test_crash_is_an_error(executor_path, task, sim, monkeypatch):
    """Neither a failed episode nor exit code 0."""
    short = Short(sim, 6)
    monkeypatch.setattr(sims, "make", lambda *arguments, **rest: short)
    def step(*arguments, **rest):
        raise RuntimeError("unstable")
    short.step = step
    job = (lambda sim: executor.load_policy(executor_path), config("--no-films"), SUITE, task,
           [{"init": 0}], 64, "fast", "films")
    with pytest.raises(RuntimeError, match="unstable"):
        list(rollout.play_scenes(job))


def test_episodes_are_the_same_whatever_was_played_before(executor_path, sim, tmp_path):
    """Each scene starts from nothing: no action, look or picture of the last episode; a film shows
    plan and wrist beside what happens."""
    policy = executor.load_policy(executor_path)
    actions = {}
    for order in ((0, 1), (1, 0)):
        for init in order:
            taken, short = [], Short(sim, 6)
            short.step = lambda action, observe: taken.append(action) or sim.step(action, observe)
            pictures = rollout.play(short, policy, {"init": init}, film=init == 0)[3]
            actions.setdefault(init, []).append(np.array(taken))
    assert all(np.array_equal(*both) for both in actions.values())
    assert pictures and pictures[0].shape[1] >= 3 * 3 * 64


# --- results --------------------------------------------------------------------------------------


@pytest.fixture
def about(executor_path):
    content = training.load(executor_path)
    return rollout.about_executor(str(executor_path), content)


def test_result_holds_every_episode(about, tmp_path, capsys):
    c = config("--results", str(tmp_path), "--episodes", "2")
    rollout.report(c, about, {"a": [(0, False, True, 8), (1, False, False, 20)]}, 60)
    path, = tmp_path.glob("*.json")
    r = json.loads(path.read_text())
    assert r["outcomes"] == [["a", 0, 0, 1, 8], ["a", 1, 0, 0, 20]]
    assert (r["success"], r["episodes"], r["counts"]) == (1, 2, "ever succeeded")
    assert r["tasks"] == {"a": {"success": 1, "episodes": 2, "steps": 14.0, "ever": 1}}
    assert r["config"]["action_demos"] == 2 and r["plan"] == "mask_tasks0"
    assert {"command", "commit", "versions", "machine", "seconds"} <= r.keys()
    assert "1/2" in capsys.readouterr().out
    # of a demonstrator, which lets go and retreats, success at the end counts
    (_, about, *_), = rollout.jobs_of(config("demonstrator"))
    rollout.report(c, about, {"a": [(0, False, True, 8), (1, True, True, 20)]}, 60)
    r = json.loads(next(tmp_path.glob("*demonstrator*")).read_text())
    assert (r["success"], r["counts"]) == (1, "success at the end")


def test_no_result_overwrites_another(about, tmp_path, refused):
    """Names hold whatever differs; a file of another configuration is left alone."""
    path = lambda changes={}, *flags: rollout.result_path(
        config("--results", str(tmp_path), *flags), about | changes).name
    assert path() == "libero_spatial_mask_tasks0_tiny_d2_s0.json"
    names = [path(), path({"seed": 1}), path({"differs": "_late"}), path({"action_demos": 1}),
             path({}, "--episodes", "1"), path({}, "--scenes", "development"),
             path({}, "--unseen", "layout"), path({}, "--tasks", "0")]
    assert len(set(names)) == len(names)
    (tmp_path / path()).write_text(json.dumps({"config": about["config"]}))
    assert path() == names[0]       # the same configuration is measured again
    (tmp_path / path()).write_text(json.dumps({"config": about["config"] | {"lr": 0.5}}))
    refused(path, "another configuration")


@pytest.mark.slow
def test_a_real_evaluation(executor_path, tmp_path, task, capsys):
    """One scene in a process of its own -> result and film; again it gives the same."""
    argv = [str(executor_path), *WORKER, "--episodes", "1", "--results", str(tmp_path)]
    rollout.main(argv)
    path, = tmp_path.glob("*.json")
    first = json.loads(path.read_text())
    assert list(first["tasks"]) == [task] and first["episodes"] == 1
    films = executor_path.with_name(executor_path.stem + "_films")
    assert sorted(p.suffix for p in films.iterdir()) == [".mp4", ".png"]
    rollout.main(argv)
    assert json.loads(path.read_text())["outcomes"] == first["outcomes"]


def test_bad_input_is_one_line(executor_path, mask_path, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(rollout, "evaluate", None)      # nothing starts
    main = lambda *argv: lambda: rollout.main([*WORKER, *map(str, argv)])
    cut = tmp_path / "cut.pt"
    cut.write_bytes(executor_path.read_bytes()[:1000])
    refused(main(), "no checkpoint", "demonstrator")
    refused(main(tmp_path / "no.pt"), "no.pt", "python executor.py")
    refused(main(cut), "cut.pt", "damaged")
    refused(main(mask_path), "mask", "executor")
    refused(main(executor_path, "--tasks", "1"), "was not trained on")
    refused(main(executor_path, "--tasks", "77"), "77")
    refused(main(executor_path, "--episodes", "51"), "50 test scenes")
    for suite in ("libero_90", "mt10", "libero_spatial_ur5e"):
        refused(main("demonstrator", "--suite", suite, "--unseen", "layout"), suite)
