"""One thread, here and in child processes: on small tensors more threads are slower.

What takes seconds to make is made once: a simulator, the data of one task, a planner and three executors.
"""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"     # before torch is imported
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch  # noqa: E402

import executor
import extract
import mask_planner
import sims
import track_planner
from core.episodes import Episodes

torch.set_num_threads(1)

SUITE, SIZE = "libero_spatial", 96
NETWORK = "--width 32 --depth 1 --channels 16 --blocks 1 1 1 --batch 4 --device cpu --no-bf16".split()
COMMON = ["--preset", "laptop", "--suite", SUITE, "--tasks", "0", "--demos", "2"]
EXTRACT = [*COMMON, "--size", str(SIZE), "--workers", "1"]
PLANNER = [*COMMON, "--steps", "5", *NETWORK]
EXECUTOR = ["--preset", "laptop", "--demos", "2", "--action-demos", "2", "--steps", "5", *NETWORK]
TRACKS = [*COMMON, "--steps", "5", *"--width 32 --depth 1 --batch 4 --device cpu --no-bf16".split()]
PLANS = {"none": ["--planner", "none", "--tasks", "0"], "mask": [], "mask-explicit": ["--plan-form", "explicit"],
         "track": ["--planner", "{runs}/track.pt"], "ee": ["--planner", "{runs}/ee.pt"],
         "track-latent": ["--planner", "{runs}/track.pt", "--plan-form", "latent"]}


KILLED = """
import os, signal, sys
import {module}, core, extract
{module}.Config.save_every = 2
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
draw, replace, saves = extract.Episodes.draw, os.replace, []
def draw_or_die(self, step, *rest):
    if "{when}" == "step" and step == 3 and len(saves):
        die()
    return draw(self, step, *rest)
def replace_or_die(a, b):
    if str(b).endswith(".pt"):
        saves.append(b)
        if "{when}" == "save" and len(saves) == 2:
            die()
    return replace(a, b)
extract.Episodes.draw, os.replace = draw_or_die, replace_or_die
{module}.main(sys.argv[1:])
"""


def run_and_kill(module, when, argv):
    """The command, killed in its fourth step or while its second checkpoint replaces the first (saved every 2 steps)."""
    run = subprocess.run([sys.executable, "-c", KILLED.format(module=module, when=when), *argv],
                         env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def shapes_of_a_frame():
    """What a frame of any simulator holds: {name: (shape, dtype)}."""
    picture, f4 = ((SIZE, SIZE, 3), np.uint8), np.float32
    return {"agentview_rgb": picture, "eye_in_hand_rgb": picture, "masks": ((SIZE, SIZE), np.uint8), "hand": ((2,), np.float16),
            "ee_states": ((6,), f4), "joint_states": ((7,), f4), "gripper_states": ((2,), f4)}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="session")
def sim():
    """Task 0 of libero_spatial; every test starts with its own reset."""
    sim = sims.make(SUITE, 0, SIZE)
    yield sim
    sim.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of real data: task 0, demo_0 and demo_1 held out, demo_2 and demo_3 the videos.  Read only."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    extract.main([*EXTRACT, "--data", str(folder)])
    return folder


@pytest.fixture(scope="session")
def task():
    return sims.tasks(SUITE)[0]


@pytest.fixture(scope="session")
def data_file(data, task):
    return data / SUITE / f"{task}.hdf5"


@pytest.fixture(scope="session")
def videos(data, task):
    return Episodes(data, SUITE, [task], 2)


@pytest.fixture(scope="session")
def planner_path(data):
    """Checkpoint of a mask planner trained for 5 steps; track.pt and ee.pt beside it."""
    out = data.parent / "runs"
    mask_planner.main([*PLANNER, "--data", str(data), "--out", str(out)])
    for points in ("any", "ee"):
        track_planner.main([*TRACKS, "--points", points, "--data", str(data), "--out", str(out)])
    return out / SUITE / "mask.pt"


def with_planners(flags, planner_path):
    """Flags of PLANS with the folder of the planners filled in."""
    return [flag.format(runs=planner_path.parent) for flag in flags]


@pytest.fixture(scope="session")
def executor_paths(data, planner_path):
    """Checkpoints of executors trained for 5 steps: {plan: path}."""
    out, paths = data.parent / "runs", {}
    for plan, flags in PLANS.items():
        executor.main([*EXECUTOR, "--planner", str(planner_path), *with_planners(flags, planner_path), "--data", str(data), "--out", str(out)])
        paths[plan] = out / SUITE / f"{plan}_executor_d2.pt"
    return paths


@pytest.fixture
def refused(capfd):
    """refused(function, *words): the call ends with exit code 2 and one line on stderr that holds the words."""

    def check(function, *words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            function()
        # a progress bar that was running is no second line
        lines = [line for line in capfd.readouterr().err.strip().splitlines() if not re.search(r"(it|episode)/s", line)]
        assert stop.value.code == 2 and len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], lines[0]

    return check
