"""Programs killed at random moments and started again end with what an unbroken run ends with.

    KILLS=20 python -m pytest -m slow tests/test_kills.py -s        # twenty moments of each
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import EXECUTOR, ROOT, SIZE, SUITE, TRAIN, equal, everything
from core import training

KILLS = int(os.environ.get("KILLS", 2))
PROGRAM = """if True:
    import importlib, sys
    program = importlib.import_module(sys.argv[1])
    program.Config.save_every = 4       # so that most kills find a checkpoint
    program.main(sys.argv[2:])"""


def content(path):
    """What a file holds, but for times."""
    if path.suffix == ".pt":
        return {k: v for k, v in training.load(path).items() if k != "config"}
    if path.suffix == ".json":
        whole = json.loads(path.read_text())
        return {k: whole[k] for k in ("outcomes", "tasks", "success", "interval")}
    return everything(path)


def contents(folder):
    files = [p for p in folder.rglob("*") if p.suffix in (".pt", ".json", ".hdf5")]
    return {str(p.relative_to(folder)): content(p) for p in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extract", "mask_planner", "executor", "rollout"])
def test_killed_programs_continue(name, tmp_path, request):
    of = request.getfixturevalue
    argv, out = {
        "extract": lambda: (["--suite", SUITE, "--tasks", "0", "--demos", "1", "--size", f"{SIZE}"],
                            "--data"),
        "mask_planner": lambda: ([*TRAIN, "--steps", "40", "--data", f"{of('data')}"], "--out"),
        "executor": lambda: ([*EXECUTOR, "--planner", f"{of('mask_path')}", "--steps", "40",
                              "--data", f"{of('data')}"], "--out"),
        "rollout": lambda: ([f"{of('executor_path')}", "--episodes", "6", "--no-films"],
                            "--results")}[name]()
    start = lambda folder: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name, *argv, out, str(tmp_path / folder)], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True)
    begin = time.time()
    assert start("whole").wait() == 0
    usual, draw, kills, endings = time.time() - begin, random.Random(0), 0, 0
    whole = contents(tmp_path / "whole")
    assert whole
    while kills < KILLS or not endings:
        run = start("broken")
        try:
            run.wait(draw.uniform(0.1, usual) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
            continue
        assert run.returncode == 0, run.stderr.read().decode()
        assert equal(whole, contents(tmp_path / "broken"))
        shutil.rmtree(tmp_path / "broken")
        endings += 1
    print(f"{name}: {kills} kills within {usual:.0f} s, {endings} times ended: all equal")
