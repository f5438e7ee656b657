"""Programs killed at random moments and started again end with what an unbroken run ends with.

    KILLS=20 python -m pytest -m slow tests/test_kills.py -s        # twenty moments of each
"""

import json
import os
import random
import re
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


# suffix of a file -> what it holds, but for times
HELD = {".pt": lambda path: {k: v for k, v in training.load(path).items() if k != "config"},
        ".json": lambda path: [json.loads(path.read_text())[k] for k in ("outcomes", "tasks")],
        ".hdf5": everything}


def contents(folder):
    return {str(p.relative_to(folder)): HELD[p.suffix](p) for p in folder.rglob("*")
            if p.suffix in HELD}


@pytest.mark.slow
@pytest.mark.parametrize("name, words", [
    ("extract", f"--suite {SUITE} --tasks 0 --demos 1 --size {SIZE} --data"),
    ("mask_planner", " ".join(TRAIN) + " --steps 40 --data {data} --out"),
    ("executor", " ".join(EXECUTOR) + " --planner {mask_path} --steps 40 --data {data} --out"),
    ("rollout", "{executor_path} --episodes 6 --no-films --results")])
def test_killed_programs_continue(name, words, tmp_path, request):
    argv = re.sub("{(.*?)}", lambda of: str(request.getfixturevalue(of[1])), words).split()
    start = lambda folder: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name, *argv, str(tmp_path / folder)], cwd=tmp_path,
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
