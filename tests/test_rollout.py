"""rollout.py: what counts as a success, what is written, and that a crash is no failed episode."""

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from conftest import SIZE, SUITE

import executor
import rollout
import sims
from core import training
from core.draw import FILM_SCALE, write_film
from core.flags import parse
from demos import record
from demos.libero import demonstrator
from results import tables

WORKER = ["--workers", "1", "--device", "cpu"]


class Short:
    """The real simulator with a short horizon; `close` leaves it open for the next test."""

    def __init__(self, sim, horizon):
        self.sim, self.horizon = sim, horizon

    def __getattr__(self, name):
        return getattr(self.sim, name)

    def close(self):
        pass


class Scripted:
    action_dim = 7
    """Stands in for a simulator: success at the given steps."""

    def __init__(self, *successes):
        self.successes, self.actions = list(successes), []
        self.horizon = self.patience = len(successes)

    def step(self, action, observe=True):
        self.actions.append(action)
        return None, self.successes[len(self.actions) - 1]


class Still(executor.Policy):
    wants_frame = False

    def __init__(self):
        pass

    def __call__(self, frame):
        return np.zeros(7, np.float32)


class Demonstrator:
    def __init__(self, length):
        self.left, self.done = length, False

    def __call__(self, sim):
        self.left -= 1
        self.done = self.left == 0
        return np.zeros(7, np.float32)


@pytest.fixture
def alone(monkeypatch, sim):
    """run_task in this process, with the session's simulator."""
    monkeypatch.setattr(rollout.run_task, "progress", type("Queue", (), {"put": lambda self, one: None})(), raising=False)

    def alone(horizon, **changes):
        short = Short(sim, horizon)
        for name, value in changes.items():
            setattr(short, name, value)
        monkeypatch.setattr(sims, "make", lambda *arguments: short)

    return alone


def copied(path, folder):
    """A copy of a checkpoint and its log, so that films come into `folder`."""
    for source in (path, path.with_suffix(".jsonl")):
        shutil.copy(source, folder)
    return folder / path.name


def config(*flags):
    return parse(rollout.Config, "", [*WORKER, *flags])


# --- what is a success ----------------------------------------------------------------------------


def test_policy_succeeds_as_soon_as_the_goal_holds():
    assert rollout.play(Scripted(False, False, True, False), Still(), {}, False)[:2] == (True, 3)
    assert rollout.play(Scripted(False, False, False, False), Still(), {}, False)[:2] == (False, 4)
    assert rollout.play(Scripted(False, False, False, True), Still(), {}, False)[:2] == (True, 4)


def test_expert_succeeds_if_the_goal_still_holds_when_it_has_let_go():
    rng = np.random.default_rng(0)
    play = lambda *successes: rollout.play(Scripted(*successes), (Demonstrator(4), 0.0, rng), {}, False)[:2]
    assert play(False, True, True, False, True) == (False, 4)
    assert play(False, False, True, True, False) == (True, 4)


@pytest.mark.parametrize("successes, ever", [((False, True, False, False), True), ((False,) * 4, False)])
def test_success_at_any_step_is_counted_beside_that_at_the_end(successes, ever):
    actor = (Demonstrator(4), 0.0, np.random.default_rng(0))
    success, steps, _, any_step = rollout.play(Scripted(*successes), actor, {}, False)
    assert (success, any_step) == (False, ever)
    said = rollout.counted([(success, steps, any_step), (True, 6, True)])
    assert said == {"success": 1, "episodes": 2, "steps": 5.0, "ever": 1 + ever}
    assert "ever" not in rollout.counted([(True, 6)])


@pytest.mark.parametrize("suite", ["libero_90", "mt10", "libero_spatial_ur5e"])
def test_a_suite_without_unseen_variants_is_refused_before_anything_starts(suite, capsys, monkeypatch):
    monkeypatch.setattr(rollout, "evaluate", None)
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--policy", "expert", "--suite", suite, "--unseen", "layout", "--device", "cpu"])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and "libero_spatial has background" in said[0]


def test_noise_moves_the_hand_and_not_the_gripper():
    sim = Scripted(*[False] * 50)
    rollout.play(sim, (Demonstrator(50), 0.3, np.random.default_rng(0)), {}, False)
    actions = np.array(sim.actions)
    assert 0.2 < actions[:, :6].std() < 0.4 and (actions[:, 6] == 0).all()


def test_expert_succeeds_in_the_simulator(sim):
    frame = sim.reset(seed=2)
    success, steps, *_ = rollout.play(sim, (demonstrator(sim, seed=2), 0.0, np.random.default_rng(0)), frame, False)
    assert success and steps < sim.horizon


def test_wilson():
    known = {(8, 10): (0.4902, 0.9433), (0, 10): (0, 0.2775), (10, 10): (0.7225, 1), (50, 100): (0.4038, 0.5962)}
    for (k, n), interval in known.items():
        assert rollout.wilson(k, n) == pytest.approx(interval, abs=1e-4)


# --- episodes -------------------------------------------------------------------------------------


def test_crash_is_an_error(alone, executor_paths, task):
    """Neither a failed episode nor exit code 0."""

    def step(action, observe=True):
        raise RuntimeError("the simulator has exploded")

    alone(10, step=step)
    with pytest.raises(RuntimeError, match="exploded"):
        rollout.run_task((config("--no-films"), [str(executor_paths["none"])], SUITE, task, [0], SIZE, "fast"))


def crash(job):
    raise RuntimeError(f"the simulator has exploded on {job}")


def test_crash_in_a_worker_reaches_the_command():
    with pytest.raises(RuntimeError, match="exploded on 7"), record.pool(1, crash) as (workers, queue):
        list(record.watch(workers.imap_unordered(crash, [7]), queue, 1, 1, "test"))


def test_run_task_plays_each_scene_with_each_checkpoint(alone, executor_paths, task, tmp_path):
    resets = []
    alone(9)
    short = sims.make()
    short.reset = lambda **where: resets.append(where) or short.sim.reset(**where)
    paths = [str(copied(executor_paths[plan], tmp_path)) for plan in ("mask", "mask-explicit")]
    name, done = rollout.run_task((config(), paths, SUITE, task, [3, 4], SIZE, "fast"))
    assert name == task and {p: d for p, d in done.items()} == {p: [(False, 9), (False, 9)] for p in paths}
    assert resets == [{"init": 3}, {"init": 4}] * 2
    films = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.mp4"))
    assert films == [f"{p}_executor_d2_films/{task}_failure.mp4" for p in ("mask-explicit", "mask")]
    rollout.run_task((config("--scenes", "1000", "--no-films"), paths[:1], SUITE, task, [1000], SIZE, "fast"))
    assert resets[-1] == {"seed": 1000}


def test_episodes_are_the_same_whatever_was_played_before(alone, executor_paths, task, sim):
    """Each scene starts from nothing: no action, history or picture of the last episode."""
    alone(12)
    states = {}
    short = sims.make()
    short.step = lambda action, observe: states.setdefault(tuple(order), []).append(np.array(action)) or \
        sim.step(action, observe)
    for order in ([1], [0, 1]):
        rollout.run_task((config("--no-films"), [str(executor_paths["none"])], SUITE, task, order, SIZE, "fast"))
    assert np.array_equal(states[1,], states[0, 1][12:])


def test_film_shows_what_the_policy_saw(alone, executor_paths, sim):
    model = executor.load_executor(executor_paths["mask"])
    policy, frame = executor.Policy(model), sim.reset(seed=2)
    policy.reset(model.goals[0, 0])
    _, _, pictures, _ = rollout.play(Short(sim, 9), policy, frame, True)
    assert len(pictures) == 3, "one per look"
    scale = FILM_SCALE * SIZE
    assert all(p.shape == (scale + 16, 4 * scale, 3) and p.dtype == np.uint8 for p in pictures)
    assert np.array_equal(pictures[0][16::FILM_SCALE, :scale:FILM_SCALE], frame["agentview_rgb"])


def test_attention_is_drawn(alone, executor_paths, tmp_path, refused):
    """A row per task; in it looks, each the picture and the attention with tracks and without."""
    import imageio.v3 as iio
    alone(9)
    path = copied(executor_paths["track"], tmp_path)
    rollout.main([str(path), "--show-attention", *WORKER])
    picture = iio.imread(tmp_path / "track_executor_d2_attention.png")
    assert picture.shape == (2 * SIZE + 2 * 14, 3 * 3 * 2 * SIZE, 3)
    now, heard, deaf = (picture[28:, k * 2 * SIZE:(k + 1) * 2 * SIZE].astype(int) for k in range(3))
    assert np.abs(heard - now).mean() > 10 and np.abs(deaf - now).mean() > 10
    assert list(tmp_path.glob("*.json")) == []
    refused(lambda: rollout.main([str(executor_paths["mask"]), "--show-attention", *WORKER]), "--show-attention", "track.pt")


def test_film_opens(tmp_path):
    import imageio.v3 as iio
    pictures = [np.full((51, 65, 3), 20 * k, np.uint8) for k in range(6)]
    write_film(tmp_path / "films" / "x.mp4", pictures)
    film = iio.imread(tmp_path / "films" / "x.mp4")
    assert film.shape == (6, 50, 64, 3) and abs(int(film[5].mean()) - 100) < 8 and film[0].mean() < 8


def test_every_scene_is_played_once(monkeypatch, task):
    """However the scenes are split among the processes."""
    jobs = []

    @contextmanager
    def pool(workers, function, opengl):
        yield type("Pool", (), {"imap_unordered": lambda self, f, js: jobs.extend(js) or [
            (j[3], {"c": [(True, s) for s in j[4]]}) for j in js]})(), None

    monkeypatch.setattr(extract, "pool", pool)
    monkeypatch.setattr(extract, "watch", lambda results, *rest: results)
    for names, episodes, workers in ((["a"], 5, 2), (["a", "b", "c"], 4, 3), (list("abcdef"), 3, 2), (["a"], 1, 4)):
        jobs.clear()
        found = rollout.evaluate(config("--episodes", str(episodes), "--workers", str(workers)), ["c"], SUITE, names, 96)
        assert {n: sorted(s for _, s in found["c"][n]) for n in names} == {n: list(range(episodes)) for n in names}
        assert len(jobs) >= min(workers, len(names) * episodes)


def test_a_real_evaluation(executor_paths, tmp_path, task, capsys):
    """One scene, two executors, in a process of its own -> results, films, table."""
    import imageio.v3 as iio
    paths = [copied(executor_paths[plan], tmp_path) for plan in ("mask", "none")]
    rollout.main([*map(str, paths), *WORKER, "--episodes", "1", "--results", str(tmp_path / "results")])
    results = {p.name: json.loads(p.read_text()) for p in (tmp_path / "results").glob("*.json")}
    assert sorted(results) == [f"{SUITE}_{plan}_laptop_d2_s0_1tasks.json" for plan in ("mask", "none")]
    for path, r in zip(paths, (results[k] for k in sorted(results))):
        plan = path.name.split("_")[0]
        assert (r["suite"], r["plan"], r["preset"], r["videos"], r["action_demos"], r["seed"]) == (
            SUITE, plan, "laptop", 2, 2, 0)
        assert (r["success"], r["episodes"], r["steps"], r["unseen"]) == (r["tasks"][task]["success"], 1, 5, None)
        assert r["interval"] == pytest.approx(rollout.wilson(r["success"], 1), abs=1e-4)
        assert r["scenes"] == "bundled initial states" and {"command", "commit", "machine"} <= r.keys()
        assert {"mujoco", "robosuite", "torch", "python"} <= r["versions"].keys()
        assert {"data", "planner", "executor", "rollout"} == r["seconds"].keys() and r["seconds"]["data"] > 0
        outcome = "success" if r["success"] else "failure"
        film = iio.imread(tmp_path / f"{path.stem}_films" / f"{task}_{outcome}.mp4")
        assert len(film) > 3 and film.std() > 10
    assert "0/1" in capsys.readouterr().out or r["success"]


# --- results --------------------------------------------------------------------------------------


def written(folder, plan, seed, success, demos=10, **changes):
    r = {"suite": SUITE, "plan": plan, "preset": "laptop", "videos": 20, "unseen": None, "action_demos": demos, "seed": seed,
         "success": success, "episodes": 100, "scenes": "bundled initial states", "versions": {"mujoco": "3.3.0"},
         "seconds": {"data": 600, "planner": None, "executor": 120, "rollout": 90},
         "tasks": dict.fromkeys(sims.tasks(SUITE), {})} | changes
    folder.mkdir(exist_ok=True)
    rollout.result_path(folder, r).write_text(json.dumps(r))


def test_training_seeds_are_pooled(tmp_path):
    folder = tmp_path / "results"
    for seed, success in enumerate((60, 70, 80)):
        written(folder, "mask", seed, success)
    written(folder, "mask", 0, 30, demos=2)
    written(folder, "none", 0, 50)
    rows = {(r["plan"], r["action_demos"]): r for r in tables.pooled(folder)}
    assert len(rows) == 3
    row = rows["mask", 10]
    assert (row["seeds"], row["success"], row["episodes"]) == (3, 210, 300)
    assert row["interval"] == pytest.approx(rollout.wilson(210, 300))
    assert rows["mask", 2]["success"] == 30


def test_a_trial_of_some_tasks_is_kept_apart(tmp_path):
    folder = tmp_path / "results"
    written(folder, "mask", 0, 60)
    written(folder, "mask", 0, 1, tasks=dict.fromkeys(sims.tasks(SUITE)[:2], {}))
    written(folder, "mask", 0, 2, scenes="seeds from 1000")
    assert sorted((r["of"], r["success"]) for r in tables.pooled(folder)) == [(2, 1), (10, 2), (10, 60)]


@pytest.mark.parametrize("old", ["", "old\n"])
def test_table_and_plot(tmp_path, monkeypatch, capsys, old):
    monkeypatch.chdir(tmp_path)
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    for plan, success in (("mask", 70), ("none", 40)):
        written(folder, plan, 0, success)
        written(folder, plan, 0, success - 20, demos=2)
    written(folder, "expert", None, 99, demos=None, preset=None, videos=None)
    readme.write_text(f"before\n<!-- results -->\n{old}<!-- /results -->\n<!-- times -->\n<!-- /times -->\nafter\n")
    for _ in range(2):      # the second time it replaces its own
        rollout.main(["--results", "results", "--table", "--device", "cpu"])
        text = readme.read_text()
        assert text.startswith("before\n<!-- results -->\n| suite") and text.endswith("\n<!-- /times -->\nafter\n")
        assert "old" not in text and text.count("70/100 = 70.0 %") == 1 and "60.4 - 78.1" in text
        results, times = text.split("<!-- /results -->")
        assert results.count(f"| {SUITE} |") == 5
        assert times.count(f"| {SUITE} |") == 5, "data, and executor and rollout of either plan; the expert has no preset"
        assert "| data, one core | 10.0 |" in times and "| rollout, none, 100 episodes | 1.5 |" in times
    import imageio.v3 as iio
    assert iio.imread(folder / "curve.png").std() > 10
    assert "70/100" in capsys.readouterr().out


def test_table_without_results(tmp_path, refused):
    refused(lambda: rollout.main(["--table", "--results", str(tmp_path / "none"), "--device", "cpu"]), "none", "python rollout.py")


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_one_line(executor_paths, planner_path, tmp_path, refused):
    good = str(executor_paths["mask"])
    run = lambda *argv: lambda: rollout.main([*argv, *WORKER, "--results", str(tmp_path / "results")])
    refused(run(), "no checkpoint", "--policy expert")
    refused(run(str(planner_path)), planner_path, "mask_planner", "executor")
    refused(run(str(tmp_path / "no.pt")), "no.pt", "python executor.py")
    refused(run(good, "--tasks", "1"), "was not trained on")
    refused(run(good, "--tasks", "77"), "77", "0 to 9")
    refused(run(good, "--episodes", "51"), "--episodes 51", "50", "--scenes")
    refused(run(good, "--episodes", "0"), "--episodes 0", "1 or more")
    refused(run(good, "--policy", "luck"), "luck", "expert")
    refused(run("--policy", "expert", "--suite", "libero_space"), "libero_space", *sims.SUITES)
    (tmp_path / "cut.pt").write_bytes(executor_paths["mask"].read_bytes()[:5000])
    refused(run(str(tmp_path / "cut.pt")), "cut.pt", "python executor.py")
    content = training.load(good)
    training.save(tmp_path / "small.pt", **content | {"extra": content["extra"] | {"size": 64}})
    refused(run(good, str(tmp_path / "small.pt")), "different", "one by one")
    assert not os.path.exists(tmp_path / "results")


def test_cost_is_that_of_the_looks(executor_paths, tmp_path, capsys):
    """The counter sees planner and executor; 4 of 8 actions are executed, so a quarter of the steps look."""
    paths = [str(executor_paths[plan]) for plan in ("mask", "none", "track")]
    rollout.main([*paths, "--cost", "--device", "cpu", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all(path in line and "TFLOPs" in line for path, line in zip(paths, lines))
    assert len(tables.cost_table(tmp_path)) == 2 + 3 and not tables.evaluations(tmp_path)
    (once, size), (twice, _) = rollout.cost(paths[0], steps=4), rollout.cost(paths[0], steps=5)
    assert once > 1e6 and twice == 2 * once and size > 1e4
