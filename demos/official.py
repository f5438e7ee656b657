"""LIBERO's published demonstrations (Liu et al., 2023) as our data files: the reading and checking.

    python extract.py --suite libero_spatial --source official --download

The files, data/official/<suite>/<task>_demo.hdf5, as LIBERO's create_dataset.py wrote them (S state
numbers; T steps; what we do not need is left out):

    data/demo_k  actions (T, 7) . states (T, S) before each action: time, positions, velocities
                 attrs: model_file, MJCF with the places of fixtures and cameras
      obs/       agentview_rgb, eye_in_hand_rgb (T, H, H, 3) u1 . joint_states (T, 7) radians
                 gripper_states (T, 2) metres . ee_states (T, 6) metres and axis-angle
                 pictures upright or, as robosuite renders, upside down: whichever agrees

Masks, tracks and the robot's states come from setting the simulator to `states`; nothing is
simulated, so no version of mujoco or robosuite changes them.  That script stores the state before
an action and the observation after it: picture t belongs to state t + 1 (to the last 2 ms, for
which robosuite does not move what it draws).  It observed by playing the actions again, and went on
where that strayed from the recorded states; such a demonstration is left out.
"""

import re
import shutil
import time
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import ParseError

import h5py
import numpy as np

import sims
from core.episodes import CAMERAS, HELD_OUT, write_episode
from core.files import fail, one_line
from demos import record
from sims import libero

HUB = "yifengzhu-hf/LIBERO-datasets"
VIEWS = tuple(f"obs/{camera}_rgb" for camera in CAMERAS)
# largest deviation of the observed robot states from the replayed ones: it moves the hand by less
# than a pixel of 128 (8 mm on the table); a step moves it by up to 13 mm, the joints by 0.06 rad
TOLERANCE = {"joint_states": (0.01, "rad"), "gripper_states": (0.004, "m"),
             "ee_states": (0.004, "m")}
# rows of what is read; of states as many numbers as the simulator has, of pictures (H, H, 3)
ROWS = {"actions": (7,), "states": ("S",), "obs/joint_states": (7,), "obs/gripper_states": (2,),
        "obs/ee_states": (6,)} | dict.fromkeys(VIEWS)


def choose_tasks(suite, chosen):
    """As sims.choose_tasks; fails on suites that are not LIBERO's."""
    if suite not in libero.HORIZONS:
        fail(f"--source official: no demonstrations of {suite} were published, choose one of "
             + ", ".join(libero.HORIZONS))
    return sims.choose_tasks(suite, chosen)


def locate(data, suite, task, download):
    """Path of a task's published file, which is fetched if it is missing and `download`."""
    path = Path(data) / "official" / suite / f"{task}_demo.hdf5"
    if path.exists():
        return path
    address = f"https://huggingface.co/datasets/{HUB}/resolve/main/{suite}/{path.name}"
    if not download:
        fail(f"no {path}: give --download, or fetch it from {address}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # else a line for each try
    try:
        hf_hub_download(HUB, f"{suite}/{path.name}", repo_type="dataset", local_dir=path.parents[1])
    except OSError as error:  # all that it raises without a network, or where there is no such file
        fail(f"cannot fetch {address} ({type(error).__name__}): is there a network?  "
             f"Or put it there by hand as {path}")
    return path


def check(path):
    """Names of a published file's demonstrations in its order, height of the first one's pictures;
    one line if the file is not whole or has another layout."""
    try:
        with one_line(path), h5py.File(path, "r") as f:
            demos = f["data"] if isinstance(f.get("data"), h5py.Group) else {}
            names = sorted((name for name in demos if re.fullmatch(r"demo_\d+", name)),
                           key=lambda name: int(name[5:]))
            wrong = next(filter(None, (misfit(demos[name]) for name in names)),
                         None if names else "lacks data/demo_0")
            size = wrong or demos[names[0]][VIEWS[0]].shape[1]
    except OSError as error:
        wrong = f"is not a whole HDF5 file ({str(error)[:60]})"
    if wrong:
        fail(f"{path} {wrong}: delete it and fetch it again with --source official --download")
    return names, size


def misfit(demo):
    """What a demonstration lacks of the layout above, as text, or None."""
    lacks = [f"/{key}" for key in ROWS if not isinstance(demo.get(key), h5py.Dataset)]
    lacks += ["@model_file"] * ("model_file" not in demo.attrs)
    if lacks:
        return f"lacks {demo.name[1:]}{lacks[0]}"
    T, H, *_ = *demo[VIEWS[0]].shape, 0, 0
    for key, row in ROWS.items():
        shape, wanted = demo[key].shape, (T, *(row or (H, H, 3)))
        if shape != wanted and key != "states" or len(demo[key]) != T or (
                key in VIEWS and demo[key].dtype != np.uint8):
            return f"has {demo.name[1:]}/{key} {shape} {demo[key].dtype}, not {wanted}"
    return None


def picture_offset(observed, joints):
    """Steps from a row's state to its picture (files that others made may pair them otherwise): the
    joints (T, J) in the pictures and in the states, radians -> 0 or 1, whichever agrees better."""
    off = [np.nanmean(np.abs(observed[:-1] - joints[k:len(joints) - 1 + k])) for k in (0, 1)]
    return int(off[1] < off[0])


def replay_error(demo, found):
    """How far the observed robot states are from the replay -> text about the largest deviation, or
    None if all are within TOLERANCE.  found {name: (T', ...)} of the replayed frames, T' <= T."""
    errors = []
    for name, (limit, unit) in TOLERANCE.items():
        n = 3 if name == "ee_states" else None  # the hand's turn follows from the joints
        off = np.abs(demo[f"obs/{name}"][:len(found[name])] - found[name])[:, :n].max(1)  # (T',)
        t = int(off.argmax())
        if not off[t] <= limit:  # nan is no agreement
            errors.append((off[t] / limit, f"{name} off by {off[t]:.3g} {unit} at step {t}, "
                                           f"more than {limit:g}"))
    return max(errors)[1] if errors else None


def convert_demo(sim, demo, seed):
    """A published demonstration, an open group -> its arrays as `record.record` has them, and None;
    or None and why it cannot be used."""
    try:
        lacks = sim.restore_fixtures(demo.attrs["model_file"])
    except ParseError as error:
        return None, f"its model_file is no XML, {error}"
    if lacks:
        return None, f"its model_file has no body {lacks}"
    states, frames, S = demo["states"][:], [], len(sim.state())
    if states.shape[1] != S:
        return None, f"{states.shape[1]} numbers, the simulator's have {S}"
    actions = demo["actions"][:]
    if len(actions) < 2:
        return None, f"it has {len(actions)} rows"
    if not np.isfinite(states).all() or not (np.abs(actions) <= 1.01).all():
        return None, "a state is no number, or an action is beyond [-1, 1]"
    offset = picture_offset(demo["obs/joint_states"][:], states[:, 1 + sim.joints])
    states = states[offset:]  # (T', S), T' = T or, without the last picture's, T - 1
    for state in states:
        sim.set_state(state)
        frames.append(sim.frame(pictures=False))
    episode = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}  # (T', ...)
    if error := replay_error(demo, episode):
        return None, error
    sim.set_state(states[0])
    seen, first, T = sim.frame()["agentview_rgb"].astype(int), demo[VIEWS[0]][0], len(states)
    if seen.shape != first.shape:
        return None, f"its pictures are {first.shape}, the first one's {seen.shape}"
    way = min((-1, 1), key=lambda step: np.abs(seen - first[::step]).mean())    # rows, upright
    episode |= {view[4:]: demo[view][:T][:, ::way] for view in VIEWS}  # (T', H, W, 3)
    episode |= {"states": states, "actions": actions[offset:],
                "rewards": np.append(np.zeros(T - 1), 1.0)}  # each ends with its success
    return episode | sims.tracks(sim, states, seed=seed), None


def import_episodes(job):
    """Worker: the first demonstrations of one task that the replay reproduces, a file each; yields
    each one's number when it is made."""
    suite, task, path, names, size, folder, indices = job
    made, left, why = len([*folder.glob("demo_*.hdf5")]), iter(names), ""
    if made:  # in an earlier run, in order
        with h5py.File(folder / f"demo_{made - 1}.hdf5") as one:
            left = iter(names[1 + names.index(one.attrs["original"]):])
    sim = sims.make(suite, task, size, "faithful")
    with h5py.File(path) as f:
        while made <= indices[-1] and (name := next(left, None)):
            begin = time.time()
            episode, error = convert_demo(sim, f["data"][name], seed=made)
            if error:
                why = f"{path}: {name} is not what its states give: {error}"
                print(f"left out, {why}")
                continue
            write_episode(folder / f"demo_{made}.hdf5", episode, original=name, render="faithful",
                          seconds=time.time() - begin)
            yield made
            made += 1
    sim.close()
    if made <= HELD_OUT:
        shutil.rmtree(folder)
        fail(f"{why or path}; of {len(names)} demonstrations {made} can be used, {HELD_OUT + 1} or "
             "more are needed: fetch the file again, or was it made with another LIBERO?")


def import_official(config, tasks):
    """Makes whatever data files are missing of the tasks from LIBERO's published ones; before
    anything is written, all of these must be there and whole."""
    suite, wanted, files = config.suite, config.demos + HELD_OUT, {}
    for task in tasks:
        path = Path(config.data) / suite / f"{task}.hdf5"
        ready, about = record.made_so_far(path)
        if about and about["source"] != "official":
            holds = (f" holds {about['source']} episodes, not official ones" if ready else
                     "/ holds an interrupted extraction of scripted episodes")
            fail(f"{path if ready else path.with_suffix('')}{holds}: choose another --data folder "
                 "or delete it")
        if ready < wanted and not about.get("exhausted"):
            source = locate(config.data, suite, task, config.download)
            names, size = check(source)
            files[path] = ((suite, task, source, names, size), wanted, partial(
                record.attributes, suite, task, size, "faithful", "official"))
    record.make_files("official", import_episodes, files, config.workers, split=False)
