"""LIBERO's published demonstrations (Liu et al., 2023) as our data files: the reading and checking.

    python extract.py --suite libero_spatial --source official --download

The files, data/official/<suite>/<task>_demo.hdf5, as LIBERO's create_dataset.py wrote them (S state
numbers; T steps; attributes that we do not need are left out):

    data.attrs   macros_image_convention: "opengl", pictures upside down, or "opencv", upright
    data/demo_k  actions (T, 7) . states (T, S) before each action: time, positions, velocities
                 attrs: model_file, MJCF with the places of fixtures and cameras
      obs/       agentview_rgb, eye_in_hand_rgb (T, H, W, 3) u1 . joint_states (T, 7) radians
                 gripper_states (T, 2) metres . ee_states (T, 6) metres and axis-angle

Masks, tracks and the robot's states come from putting the simulator where `states` says; nothing is
simulated, so neither mujoco's version nor robosuite's changes them.  Whether pictures and states
belong together is checked by what the robot felt when the pictures were taken.

That script stores the state before an action and what is observed after it: picture t belongs to
state t + 1 (to the last 2 ms, for which robosuite does not move what it draws), and what is seen
before action t + 1 is picture t.  It observed by playing the actions again, and where that strayed
from the recorded states, it went on; such a demonstration is left out.  Files that others made anew
may pair pictures and states otherwise; `lag` finds out.
"""

import shutil
import time
from pathlib import Path
from xml.etree.ElementTree import ParseError

import h5py
import numpy as np

import sims
from core.episodes import HELD_OUT, assemble, open_data, split_assembled, write_episode
from core.files import fail, stop_if_full
from demos import record
from sims import libero
from sims.camera import CAMERAS

HUB = "yifengzhu-hf/LIBERO-datasets"
VIEWS = tuple(f"obs/{camera}_rgb" for camera in CAMERAS)
UPRIGHT = {"opengl": -1, "opencv": 1}  # step through the rows of a picture
# Largest deviation of what the robot felt from the replayed states: it moves the hand by less than
# a pixel of 128 (8 mm on the table); a step moves it by up to 13 mm, the joints by up to 0.06 rad.
TOLERANCE = {"joint_states": (0.01, "rad"), "gripper_states": (0.004, "m"),
             "ee_states": (0.004, "m")}
NEEDED = ("actions", "states", *VIEWS, *(f"obs/{name}" for name in TOLERANCE))


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
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        fail(f"--download needs pip install huggingface_hub; or fetch {address} as {path}")
    logging.set_verbosity_error()  # else a line for each try
    try:
        hf_hub_download(HUB, f"{suite}/{path.name}", repo_type="dataset", local_dir=path.parents[1])
    except OSError as error:  # all that it raises without a network, or where there is no such file
        fail(f"cannot fetch {address} ({type(error).__name__}): is there a network?  "
             f"Or put it there by hand as {path}")
    return path


def check(path):
    """Names of a published file's demonstrations in its order, height and width of its pictures;
    one line if the file is not whole or has another layout."""
    again = "delete it and fetch it again with --source official --download"
    try:
        with h5py.File(path, "r") as f:
            demos = f["data"] if isinstance(f.get("data"), h5py.Group) else {}
            names = sorted((n for n in demos if n[:5] == "demo_" and n[5:].isdigit()),
                           key=lambda n: int(n[5:]))
            if not names:
                fail(f"{path} lacks data/demo_0: {again}")
            if demos.attrs.get("macros_image_convention") not in UPRIGHT:
                fail(f"{path} lacks data@macros_image_convention (opengl or opencv), which says "
                     f"whether pictures are upside down: {again}")
            for name in names:
                check_demo(path, demos[name], again)
            kinds = {(*demos[name][view].shape[1:], str(demos[name][view].dtype))
                     for name in names for view in VIEWS}
    except OSError as error:
        fail(f"{path} is not a whole HDF5 file ({str(error)[:60]}): {again}")
    size = next(iter(kinds))[0]
    if kinds != {(size, size, 3, "uint8")}:
        fail(f"{path} holds pictures of {sorted(kinds)}, not square ones of one size: {again}")
    return names, size


def check_demo(path, demo, again):
    """Whether a demonstration holds what is needed, in arrays of one length; else one line."""
    for key in NEEDED:
        if not isinstance(demo.get(key), h5py.Dataset):
            fail(f"{path} lacks {demo.name[1:]}/{key}: {again}")
    if "model_file" not in demo.attrs:
        fail(f"{path} lacks {demo.name[1:]}@model_file, where its fixtures stand: {again}")
    lengths = {key: len(demo[key]) for key in NEEDED}
    if len(set(lengths.values())) > 1 or lengths["states"] < 2:
        fail(f"{path}: {demo.name[1:]} has rows {lengths}, not as many of each: {again}")
    numbers = {"actions": 7, "obs/joint_states": 7, "obs/gripper_states": 2, "obs/ee_states": 6}
    for key, n in numbers.items():
        if demo[key].shape[1:] != (n,):
            fail(f"{path}: {demo.name[1:]}/{key} is {demo[key].shape}, not (T, {n}): {again}")


def lag(felt, joints):
    """Steps from a row's state to its picture: the joints (T, J) in the pictures and in the states,
    radians -> 0 or 1, whichever agrees better."""
    off = [np.nanmean(np.abs(felt[:-1] - joints[k:len(joints) - 1 + k])) for k in (0, 1)]
    return int(off[1] < off[0])


def strays(demo, found):
    """How far what the robot felt is from the replay -> text about the largest deviation, or None
    if all are within TOLERANCE.  found {name: (T', ...)} of the replayed frames, T' <= T."""
    said = []
    for name, (limit, unit) in TOLERANCE.items():
        n = 3 if name == "ee_states" else None  # the hand's turn follows from the joints
        felt = demo[f"obs/{name}"][:len(found[name])]
        off = np.abs(felt - found[name])[:, :n].max(1)  # (T',)
        t = int(off.argmax())
        if not off[t] <= limit:  # nan is no agreement
            said.append((off[t] / limit, f"{name} off by {off[t]:.3g} {unit} at step {t}, "
                                         f"more than {limit:g}"))
    return max(said)[1] if said else None


def annotate(sim, demo, rows_step, seed):
    """A published demonstration -> its arrays as `extract.record` has them, and None; or None and
    how far it is from the replay.

    demo  an open group; rows_step  see UPRIGHT
    """
    try:
        missing = sim.furnish(demo.attrs["model_file"])
    except ParseError as error:
        return None, f"its model_file is no XML, {error}"
    if missing:
        return None, f"its model_file has no body {missing}"
    states, frames, S = demo["states"][:], [], len(sim.state())
    if states.shape[1] != S:
        return None, f"{states.shape[1]} numbers, the simulator's have {S}"
    later = lag(demo["obs/joint_states"][:], states[:, 1 + sim.joints])
    states = states[later:]  # (T', S), T' = T or, without the last picture's, T - 1
    for state in states:
        sim.place(state)
        frames.append(sim.frame(pictures=False))
    episode = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}  # (T', ...)
    off = strays(demo, episode)
    if off:
        return None, off
    T = len(states)
    episode |= {view[4:]: demo[view][:T][:, ::rows_step] for view in VIEWS}  # (T', H, W, 3)
    episode |= {"states": states, "actions": demo["actions"][later:],
                "rewards": np.append(np.zeros(T - 1), 1.0)}  # each ends with its success
    return episode | sims.tracks(sim, states, seed=seed), None


def plan(data, suite, tasks, demos, download):
    """Jobs for `import_task` of the tasks that have fewer than `demos` videos; before anything is
    written, all files must be there and whole."""
    jobs = []
    for task in tasks:
        path = Path(data) / suite / f"{task}.hdf5"
        if path.exists():
            with open_data(path) as f:
                have, about = len(f["data"]), dict(f["data"].attrs)
            if about["source"] != "official":
                fail(f"{path} holds {about['source']} episodes, not official ones: "
                     "choose another --data folder or delete it")
            if have >= demos + HELD_OUT or about["exhausted"]:
                continue
        source = locate(data, suite, task, download)
        check(source)
        parts = path.with_suffix("")
        for part in sorted(parts.glob("demo_*.hdf5"))[:1]:
            with h5py.File(part) as one:
                if "original" not in one.attrs:
                    fail(f"{parts}/ holds an interrupted extraction of scripted episodes: "
                         "choose another --data folder or delete it")
        jobs.append((suite, task, source, parts, demos + HELD_OUT))
    for *_, parts, _ in jobs:
        if parts.with_suffix(".hdf5").exists():
            split_assembled(parts.with_suffix(".hdf5"), parts)
        parts.mkdir(parents=True, exist_ok=True)
    return jobs


def import_task(job):
    """Worker: the first demonstrations of one task that the replay reproduces, an episode file
    each -> task, size, whether the published file holds no more."""
    suite, task, path, folder, wanted = job
    names, size = check(path)
    parts = [folder / f"demo_{i}.hdf5" for i in range(wanted)]
    done = [part for part in parts if part.exists()]  # of an earlier run; in order
    position = 0
    if done:
        with h5py.File(done[-1]) as one:
            position = 1 + names.index(one.attrs["original"])
    sim, made, off = sims.make(suite, task, size, "faithful"), len(done), None
    with h5py.File(path) as f:
        rows_step = UPRIGHT[f["data"].attrs["macros_image_convention"]]
        while made < wanted and position < len(names):
            begin, name = time.time(), names[position]
            demo, position = f["data"][name], position + 1
            episode, why = annotate(sim, demo, rows_step, seed=made)
            if episode is None:
                off = f"{path}: {name} is not what its states say: {why}"
                print(f"left out, {off}")
                continue
            write_episode(parts[made], episode, original=name, render="faithful",
                          seconds=time.time() - begin)
            made += 1
            import_task.progress.put(1)
    sim.close()
    if made <= HELD_OUT:
        shutil.rmtree(folder)
        fail(f"{off or path}; of {len(names)} demonstrations {made} can be used, {HELD_OUT} are "
             f"held out, so {HELD_OUT + 1} or more are needed: fetch the file again, or was it "
             "made with another version of LIBERO?")
    return task, size, position == len(names)


def import_official(config, tasks):
    """Makes whatever data files are missing of the tasks from LIBERO's published ones."""
    jobs = plan(config.data, config.suite, tasks, config.demos, config.download)
    if not jobs:
        return
    print(f"data: official demonstrations of {len(jobs)} tasks of {config.suite}, "
          f"{config.workers} processes -> {config.data}/")
    try:
        with record.pool(config.workers, import_task) as (processes, queue):
            made = processes.imap_unordered(import_task, jobs)
            total = sum(wanted for *_, wanted in jobs)
            for task, size, exhausted in record.watch(made, queue, len(jobs), total, "import"):
                path = Path(config.data) / config.suite / f"{task}.hdf5"
                assemble(path, path.with_suffix(""), config.suite, task, size, "faithful",
                         config.text, "official", exhausted)
    except OSError as error:
        stop_if_full(error, config.data)
