"""results/compare.py: each stage once, in order, continued, of one code; rows are what they say."""

import dataclasses
import importlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import EXECUTOR, SUITE, equal
import executor
import rollout
from core import training
from core.files import code
from core.flags import parse
from results import compare

CELL = {"T": (["none", "mask", "none-frozen", "mask-late"], [SUITE], [2], 2, 1, [""])}
config = lambda *argv: parse(compare.Config, "", ["T", *argv])
result = lambda code: {"code": code, "config": {"steps": 1, "bf16": False}}


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that are run, of which each only writes its file; `stop`: one that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "CELLS", CELL)
    ran = SimpleNamespace(all=[], stop="")

    def run(words, stdout, **rest):
        ran.all.append(" ".join(words[1:]))
        if ran.stop and ran.stop in ran.all[-1]:
            return SimpleNamespace(returncode=1)
        path = Path(stdout.name).with_suffix(".json")
        if "rollout.py" in words:
            path.write_text(json.dumps(result(code())))
        else:
            c = parse(importlib.import_module(words[1].removesuffix(".py")).Config, "", words[2:])
            training.save(path.with_suffix(".pt"), step=c.steps, code=[code()],
                          config=dataclasses.asdict(c))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare.tables, "comparison", lambda *rest: ["the table"])
    return ran


def test_tables_name_the_rows(tmp_path, monkeypatch):
    """By the names of their files, the rows of A and B in their order."""
    monkeypatch.chdir(tmp_path)     # where no runs are
    chains = [compare.chain(config(), row, SUITE, 10, 0, 10, "", {}) for row in compare.ROWS]
    names = [c[-1][2].stem.removeprefix(f"{SUITE}_").replace("_laptop_d10_s0", "") for c in chains]
    assert [*compare.tables.NAMES.items()][1:] == [*zip(names, compare.CELLS["B"][0])]


def test_every_stage_once_and_in_order(commands, refused, capfd):
    """A planner that three rows share is trained once per seed; a failure stops; the same command
    continues; other code is refused but for a look."""
    commands.stop = "rollout.py runs/libero_spatial/none_executor_s1"
    refused(lambda: compare.main(["T", "--workers", "1"]), "none_executor_s1", "code 1", ".log")
    assert commands.stop in commands.all[-1], "nothing is begun after a failure"
    commands.stop = ""
    compare.main(["T", "--workers", "1"])
    assert capfd.readouterr().out.strip().endswith("the table")
    failed = next(c for c in commands.all if commands.all.count(c) == 2)
    commands.all.remove(failed)
    assert "none_executor_s1" in failed and len({*commands.all}) == len(commands.all) == 2 + 2 * 8
    for stages in compare.chains_of(config()):
        made = [commands.all.index(c.removeprefix("python ")) for _, c, _ in stages]
        assert made == sorted(made)
    compare.main(["T"])
    assert len(commands.all) == 18, "nothing is made twice"
    shutil.rmtree("runs")
    refused(lambda: compare.main(["T", "--bf16"]), code(), "bf16", "--any-code")
    compare.main(["T"])
    assert len(commands.all) == 18, "what is finished needs no checkpoints"
    path, = Path("results").glob("*_none_*_s0_*.json")
    path.write_text(json.dumps(result("old")))
    refused(lambda: compare.main(["T"]), path.name, "old", "--any-code")
    compare.main(["T", "--any-code"])
    assert len(commands.all) == 18


def test_the_list_is_for_xargs(commands, capfd, refused):
    compare.main(["T", "--list", "planners"])
    assert capfd.readouterr().out.splitlines() == [
        f"python mask_planner.py{seed} --preset laptop --no-bf16" for seed in ("", " --seed 1")]
    compare.main(["T", "--seeds", "1", "--rows", "none", "--list", "rollouts"])
    assert capfd.readouterr().out.split()[:2] == ["python", "rollout.py"]
    for argv, *words in (([], "no cell"), (["Z"], "no cell Z", "give T"),
                         (["T", "--rows", "maks"], "maks", "mask-grounded"),
                         (["T", "--suites", "mt10"], "mt10", SUITE)):
        refused(lambda: compare.main(argv), *words)


@pytest.mark.parametrize("letter", compare.CELLS)
def test_no_two_results_share_a_name(letter, tmp_path):
    """And each differs from every other in its command."""
    config = parse(compare.Config, "", [letter, "--out", str(tmp_path)])
    stages = [s for group in compare.chains_of(config) for s in group]
    for of in compare.STAGES:
        commands, paths = zip(*((c, p) for what, c, p in stages if what == of))
        assert len({*commands}) == len({*paths}) == len(paths) or of != "rollouts"
    rows, suites, demos, seeds, _, unseen = compare.CELLS[letter]
    assert len(paths) == len(rows) * len(suites) * len(demos) * seeds * len(unseen)


def test_no_future_is_seen(executor_path, sim):
    """Two worlds with the same observations and goal, but another future: the actions are the same
    until the observations differ, and not after."""
    policy, actions = executor.Policy(executor.load_executor(executor_path)), []
    frames = [sim.reset(init=k) for k in (0, 1)]
    for changed in (0, 1):
        world = SimpleNamespace(task=sim.task, goal_varies=False)
        policy.reset(world, {"init": 0})
        actions.append([])
        for step in range(12):
            world.frame = lambda masks: frames[changed if step >= 8 else 0]
            actions[-1].append(tuple(policy(world)))
    assert actions[0][:8] == actions[1][:8] and actions[0][8:] != actions[1][8:]


def test_exchanged_names_exchange_rows(mask_path, executor_path, data, tmp_path):
    """The mask planner under the track planner's name: that row is now what mask's was, exactly."""
    named = shutil.copy(mask_path, tmp_path / "track.pt")
    executor.main([*EXECUTOR, "--planner", str(named), "--data", str(data), "--out", str(tmp_path)])
    path = tmp_path / SUITE / "track_executor.pt"
    here, there = training.load(path), training.load(executor_path)
    assert equal(here["model"], there["model"]) and here["config"]["seed"] == 0
    assert rollout.about_executor(path, here)["plan"] == "track"


@pytest.mark.slow
def test_a_real_cell(data, tmp_path, monkeypatch, capfd):
    """Real commands make the cell's files and table; anew, with the same outcomes."""
    stage = compare.stage
    monkeypatch.setattr(compare, "CELLS", {"T": (["mask"], [SUITE], [2], 1, 1, [""])})
    monkeypatch.setattr(compare, "stage", lambda program, config, words=(), **given: stage(
        program, config, words, **given | {"tasks": "0"}))
    argv = ["T", "--preset", "tiny", "--workers", "1", "--data", str(data)]
    for folder in "ab":
        compare.main([*argv, "--out", str(tmp_path / folder), "--results", str(tmp_path / folder)])
    assert "| mask_tasks0_tasks0 |" in capfd.readouterr().out
    for path in (tmp_path / "a").glob("*.json"):
        first, again = (json.loads((tmp_path / k / path.name).read_text()) for k in "ab")
        assert first["outcomes"] == again["outcomes"] and first["code"] == code()
        assert shlex.split(first["command"])[0] == "python"
    assert len(list((tmp_path / "a").glob("*.json"))) == 1
