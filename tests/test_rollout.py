"""rollout.py: what is a success, every scene once, films, results that nothing overwrites."""

import json

import numpy as np
import pytest

from conftest import SUITE

import rollout
import sims
from core import training
from core.flags import parse
from executor import Policy, load_executor

WORKER = ["--workers", "1", "--device", "cpu"]
config = lambda *flags: parse(rollout.Config, "", [*WORKER, *flags])


class Scripted:
    """Stands in for a simulator: success at the given steps."""

    def __init__(self, *successes):
        self.successes, self.calls = successes, []

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
        self.steps = 0
        sim.calls.append(("actor", scene))

    def __call__(self, sim):
        self.steps += 1

    def finished(self, success):
        return self.steps == 4 if self.patient else success

    def limit(self, sim):
        return len(sim.successes)

    def draw(self, sim):
        return self.steps


def test_an_episode():
    """An actor ends it; success at the end and at any step, however it ends.  The actor is reset
    before the scene, so it may use the simulator; every fourth step is drawn for a film."""
    play = lambda actor, *successes: rollout.play(Scripted(*successes), actor, {"init": 3})
    assert play(Still(), False, False, True, False) == (True, True, 3, [])
    assert play(Still(), False, False, False, False) == (False, False, 4, [])
    assert play(Still(), False, False, False, True) == (True, True, 4, [])
    assert play(Still(patient=True), False, True, True, False, True) == (False, True, 4, [])
    assert play(Still(patient=True), False, False, True, True, False) == (True, True, 4, [])
    sim, scene = Scripted(*[False] * 9), {"seed": 5}
    assert rollout.play(sim, Still(), scene, film=True) == (False, False, 9, [1, 5, 9])
    assert sim.calls[:3] == [("actor", scene), scene, "step"]


def test_scenes(refused):
    """Test scenes are bundled or evaluation ones, development scenes have seeds of their own."""
    scenes = lambda *flags: rollout.scenes_of(config("--episodes", "2", *flags))
    assert scenes() == [{"init": 0}, {"init": 1}]
    assert scenes("--scenes", "development")[0] == {"seed": sims.DEVELOPMENT}
    assert scenes("--scenes", "70") == [{"seed": 70}, {"seed": 71}]
    refused(lambda: scenes("--scenes", "new"), "development")


@pytest.mark.parametrize("tasks, workers", [(1, 1), (1, 3), (2, 2), (5, 2)])
def test_every_scene_is_played_once(monkeypatch, tmp_path, tasks, workers):
    """However the scenes are split among the processes, and though a kill comes between."""
    played, c = [], config("--episodes", "7", "--workers", str(workers))

    def run_jobs(function, jobs, *rest):
        for _, _, _, task, scenes, *_ in jobs[::-1]:
            for scene in scenes:
                if len(played) == 5:
                    played.append("killed")
                    raise KeyboardInterrupt
                played.append((task, scene["init"]))
                yield task, (scene["init"], True, True, 9)
    monkeypatch.setattr(rollout, "run_jobs", run_jobs)
    names = [f"task{k}" for k in range(tasks)]
    evaluate = lambda c: rollout.evaluate(None, c, {"suite": SUITE}, tmp_path / "log", names, 64,
                                          "fast", "films")
    with pytest.raises(KeyboardInterrupt):
        evaluate(c)
    played[5:] = [None]     # no second kill
    found, seconds = evaluate(c)
    assert found == {name: [(k, True, True, 9) for k in range(7)] for name in names}
    assert len(played) == 1 + 7 * tasks and seconds >= 0
    assert evaluate(c)[0] == found and len(played) == 1 + 7 * tasks
    evaluate(config("--episodes", "6"))         # another evaluation starts anew
    assert len(played) == 1 + 13 * tasks


def test_crash_is_an_error(executor_path, task, sim, monkeypatch):
    """Neither a failed episode nor exit code 0."""
    def step(*arguments, **rest):
        raise RuntimeError("unstable")
    monkeypatch.setattr(sims, "make", lambda *arguments, **rest: sim)
    monkeypatch.setattr(sim, "step", step)
    job = (lambda sim: Policy(load_executor(executor_path)), config("--no-films"), SUITE, task,
           [{"init": 0}], 64, "fast", "films", set())
    with pytest.raises(RuntimeError, match="unstable"):
        list(rollout.play_scenes(job))


def test_episodes_are_the_same_whatever_was_played_before(executor_path, sim, monkeypatch):
    """Each scene starts from nothing: no action, look or picture of the last episode; a film shows
    plan and wrist beside what happens."""
    policy, step, actions, taken = Policy(load_executor(executor_path)), sim.step, {}, []
    monkeypatch.setattr(sim, "horizon", 6)
    monkeypatch.setattr(sim, "step", lambda *a, **more: taken.append(a) or step(*a, **more))
    for init in (0, 1, 1, 0):
        taken.clear()
        pictures = rollout.play(sim, policy, {"init": init}, film=init == 0)[3]
        actions.setdefault(init, []).append(np.array(taken))
    assert all(np.array_equal(*both) for both in actions.values())
    assert pictures and pictures[0].shape[1] >= 3 * 3 * 64


@pytest.fixture
def about(executor_path):
    return rollout.about_executor(str(executor_path), training.load(executor_path))


def test_result_holds_every_episode(about, tmp_path, capsys, monkeypatch):
    c = config("--results", str(tmp_path), "--episodes", "2")
    rollout.report(c, about, {"a": [(0, False, True, 8), (1, False, False, 20)]}, 60)
    path, = tmp_path.glob("*.json")
    r = json.loads(path.read_text())
    wanted = {"outcomes": [["a", 0, 0, 1, 8], ["a", 1, 0, 0, 20]], "plan": "mask_tasks0",
              "success": 1, "episodes": 2, "counts": "ever succeeded",
              "tasks": {"a": {"success": 1, "episodes": 2, "steps": 14.0, "ever": 1}},
              "interval": [0.0945, 0.9055]}     # Wilson's
    assert r | wanted == r and r["config"]["action_demos"] == 2
    assert {"command", "commit", "versions", "machine", "seconds"} <= r.keys()
    assert "1/2" in capsys.readouterr().out
    # of a demonstrator, which lets go and retreats, success at the end counts
    monkeypatch.setattr(rollout, "evaluate", lambda *job: (
        {"a": [(0, False, True, 8), (1, True, True, 20)]}, 60))
    rollout.main([*WORKER, "demonstrator", "--noise", "0.1", "--results", str(tmp_path)])
    r = json.loads(next(tmp_path.glob("*demonstrator_noise0.1*")).read_text())
    assert (r["success"], r["counts"]) == (1, "success at the end")
    assert (r["evaluation"]["noise"], r["evaluation"]["suite"]) == (0.1, SUITE)


def test_no_result_overwrites_another(about, tmp_path, refused):
    """Names hold whatever differs; a file of another configuration is left alone."""
    path = lambda changes={}, *flags: rollout.result_path(
        config("--results", str(tmp_path), *flags), about | changes)
    assert path().name == "libero_spatial_mask_tasks0_tiny_d2_s0.json"
    paths = {path(), path({"seed": 1}), path({"differs": "_late"}), path({"action_demos": 1}),
             path({}, "--episodes", "1"), path({}, "--scenes", "development"),
             path({}, "--unseen", "layout"), path({}, "--tasks", "0")}
    assert len(paths) == 8
    path().write_text(json.dumps({"config": about["config"] | {"seconds": {}, "device": "cuda"}}))
    path().write_text(json.dumps({"config": about["config"] | {"lr": 0.5}}))    # measured again
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
    cut = tmp_path / "cut.pt"
    cut.write_bytes(executor_path.read_bytes()[:1000])
    for argv, *words in (
            ([], "no checkpoint", "demonstrator"), ([mask_path], "mask", "executor"),
            ([tmp_path / "no.pt"], "no.pt", "python executor.py"), ([cut], "cut.pt", "damaged"),
            ([executor_path, "--tasks", "1"], "was not trained on"),
            ([executor_path, "--tasks", "77"], "77"), ([executor_path] * 2, "two of", "--results"),
            ([executor_path, "--episodes", "51"], "50 test scenes"),
            *((["demonstrator", "--unseen", "layout", "--suite", suite], suite)
              for suite in ("libero_90", "mt10", "libero_spatial_ur5e"))):
        refused(lambda: rollout.main([*WORKER, *map(str, argv)]), *words)
