"""rollout.py: what is a success, every scene once, films, results that nothing overwrites."""

import json
from unittest.mock import Mock, call

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


def scripted(*successes):
    """Stands in for a simulator: success at the given steps."""
    return Mock(successes=successes, step=Mock(side_effect=[(None, x) for x in successes]))


def still(patient=False):
    """An actor that does nothing; `patient`: it ends at its fourth step, not at success."""
    actor = Mock(reset=lambda sim, scene: sim.begin(scene), limit=lambda sim: len(sim.successes),
                 draw=lambda sim: actor.call_count)
    actor.finished = lambda success: actor.call_count == 4 if patient else success
    return actor


def test_an_episode():
    """An actor ends it; success at the end and at any step, however it ends.  The actor is reset
    before the scene, so it may use the simulator; every fourth step is drawn for a film."""
    play = lambda actor, *successes: rollout.play(scripted(*successes), actor, {"init": 3})
    assert play(still(), False, False, True, False) == (True, True, 3, [])
    assert play(still(), False, False, False, False) == (False, False, 4, [])
    assert play(still(), False, False, False, True) == (True, True, 4, [])
    assert play(still(patient=True), False, True, True, False, True) == (False, True, 4, [])
    assert play(still(patient=True), False, False, True, True, False) == (True, True, 4, [])
    sim, scene = scripted(*[False] * 9), {"seed": 5}
    assert rollout.play(sim, still(), scene, film=True) == (False, False, 9, [1, 5, 9])
    assert sim.mock_calls[:2] == [call.begin(scene), call.reset(**scene)]


def test_scenes():
    """Test scenes are bundled or evaluation ones, development scenes have seeds of their own."""
    scenes = lambda *flags: rollout.scenes_of(config("--episodes", "2", *flags))
    assert scenes() == [{"init": 0}, {"init": 1}]
    assert scenes("--scenes", "development")[0] == {"seed": sims.DEVELOPMENT}
    assert scenes("--scenes", "70") == [{"seed": 70}, {"seed": 71}]


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
    log, names = tmp_path / "log", [f"task{k}" for k in range(tasks)]
    evaluate = lambda c: rollout.evaluate(None, c, {"suite": SUITE}, log, names, 64, "fast", "")
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
    """Each scene starts from nothing; a film shows plan and wrist beside what happens."""
    policy, step, actions, taken = Policy(load_executor(executor_path)), sim.step, {}, []
    monkeypatch.setattr(sim, "horizon", 6)
    monkeypatch.setattr(sim, "step", lambda *a, **more: taken.append(a) or step(*a, **more))
    for init in (0, 1, 1, 0):
        taken.clear()
        pictures = rollout.play(sim, policy, {"init": init}, film=init == 0)[3]
        actions.setdefault(init, []).append(np.array(taken))
    assert all(np.array_equal(*both) for both in actions.values())
    assert pictures and pictures[0].shape[1] >= 3 * 3 * 64


def test_result_holds_every_episode(executor_path, tmp_path, capsys, monkeypatch):
    about = rollout.about_executor(executor_path, training.load(executor_path))
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


def test_no_result_overwrites_another(executor_path, tmp_path, refused):
    """Names hold whatever differs; a file of another configuration is left alone."""
    about = rollout.about_executor(executor_path, training.load(executor_path))
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
