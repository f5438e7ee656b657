"""Scripted demonstrations are recorded, in processes that other programs use, too.

    ensure("libero_spatial", names, demos=20, data="data")    # makes the episodes that are missing
    videos, held_out, note = load_videos(config)              # the same, then a planner's videos

`Demonstrator` is the scripted policy as `rollout.py` plays it: what can be reached.
"""

import gc
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
from tqdm import tqdm

import sims
from core import draw
from core.episodes import (CAMERAS, HELD_OUT, Episodes, assemble, join, open_data, split_assembled,
                           write_episode)
from core.files import alone, fail, one_line
from core.flags import suites
from demos.language import embed
from demos.libero import UNSOLVED, demonstrator
from sims.camera import choose_opengl

# Standard deviation of what is added to the executed motion (of 1) while recording, as in DART
# (Laskey et al., 2017): states stray as a learner's will, and the recorded, clean actions lead back
NOISE = 0.1
# episode i is sampled with seed i; if the demonstrator fails there, with i + RETRY, and so on
RETRY = 100_000


def perturbed(action, noise, rng):
    """An action (A,) with normal noise on its motion, not on its last number, the gripper's."""
    return action + np.append(rng.normal(0, noise, len(action) - 1), 0)


class Demonstrator:
    """The scripted policy as an actor, see `rollout.play`; noise: of its motion, as NOISE."""

    def __init__(self, sim, noise=0.0):
        self.noise = noise

    def reset(self, sim, scene):
        """scene {"seed": s} or {"init": k}: the number decides height of approach and noise."""
        number, = scene.values()
        self.plan, self.ahead = demonstrator(sim, number), []
        self.rng = np.random.default_rng([number, 1])

    def __call__(self, sim):
        """The action for the current state, (A,): in [-1, 1] without the noise."""
        action = self.ahead.pop() if self.ahead else next(self.plan)
        return perturbed(action, self.noise, self.rng)

    def finished(self, success):
        """Whether the hand has let go and withdrawn; success alone does not end a demonstration."""
        self.ahead = self.ahead or [*islice(self.plan, 1)]
        return not self.ahead

    def draw(self, sim):
        """Both cameras' pictures side by side, (., ., 3) uint8."""
        frame = sim.frame(masks=False)
        return draw.row([("now", frame["agentview_rgb"]), ("wrist", frame["eye_in_hand_rgb"])])

    def limit(self, sim):
        """Steps at most: as when recorded."""
        return sim.max_demo_steps


def record(sim, seed):
    """Plays one scripted episode with NOISE.  Returns its arrays, each (T, ...), the actions
    without the noise; or None if the goal did not hold at the end."""
    rng, rows, frame = np.random.default_rng(seed), [], sim.reset(seed=seed)
    for action in islice(demonstrator(sim, seed), sim.max_demo_steps):  # (A,)
        row = frame | {"actions": action, "states": sim.state()}
        frame, success = sim.step(perturbed(action, NOISE, rng))
        rows.append(row | {"rewards": float(success)})
    if not sim.success():
        return None
    episode = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return episode | sims.tracks(sim, episode["states"], seed=seed)


# --- processes ------------------------------------------------------------------------------------


def run_jobs(function, jobs, workers, total, desc, opengl=True):
    """Plays episodes in `workers` processes of one thread each, which end when this one is killed,
    and yields their results as they come.  Errors of a worker are raised here; a worker that was
    killed ends the program in one line.

    function  a generator: function(job) makes one simulator, plays the job's episodes and yields a
              (small) result after each
    total     number of episodes of all jobs, for the progress bar that `desc` names
    opengl    whether the simulators render
    """
    choose_opengl(needed=opengl)
    # inherited; the libraries of this process have read theirs already
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", LP_NUM_THREADS="0")
    context = get_context("spawn")  # a fork would share OpenGL and torch's threads
    queue, often = context.SimpleQueue(), 0.5 if sys.stderr.isatty() else 30
    with (ProcessPoolExecutor(workers, context, start_worker, (queue,)) as pool,
          tqdm(total=total, unit="episode", desc=desc, mininterval=often) as bar):
        try:
            left = [pool.submit(work, function, job) for job in jobs]
            while left or not queue.empty():
                done, left = wait(left, timeout=0.3, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what the worker raised
                while not queue.empty():
                    bar.update()
                    yield queue.get()
        except BrokenProcessPool:
            bar.close()  # which ends its line
            fail("a worker process was killed, perhaps for lack of memory: run again with fewer "
                 "--workers; finished episodes are kept")
        finally:  # interrupted, they would play all their jobs first
            for process in active_children():
                process.terminate()


def start_worker(queue):
    """Initialises a worker: where it reports; a thread ends it when its parent is killed."""
    work.queue = queue
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def work(function, job):
    """Worker: plays the episodes of one job and reports each."""
    for result in function(job):
        work.queue.put(result)
    gc.collect()  # a simulator with its textures takes over a gigabyte: never two at a time


def shares(episodes, tasks, workers):
    """A task's episodes in pieces, a job each: those of few tasks are split among all processes."""
    pieces = workers if tasks < 2 * workers else 1
    return [episodes[k::pieces] for k in range(pieces) if episodes[k::pieces]]


# --- data files -----------------------------------------------------------------------------------


def ensure(suite, tasks, demos, data, size=128, render=None, workers=2):
    """Makes whatever episodes are missing so that each task has `demos` videos and HELD_OUT more.
    Episode i depends on (task, i) alone: neither interruptions nor the number of processes change
    the data.

    size    height and width of the pictures, pixels
    render  as of sims.make; None: that of the episodes that are there, else fast
    """
    with alone(Path(data) / suite), one_line(data):     # another program may be making them
        files = {}
        for task in tasks:
            path = Path(data) / suite / f"{task}.hdf5"
            ready, about = made_so_far(path)
            # to films, official ones, a suite derived from this one none can be added
            closed = about and (about["source"], about.get("env", suite)) != ("scripted", suite)
            if closed and not ready:
                fail(f"{path.with_suffix('')}/ holds an interrupted import: finish it with "
                     "--source official, choose another --data folder or delete it")
            asked = {"size": size} if closed else {"size": size, "render": render}
            other = [key for key in asked if about and asked[key] not in (None, about[key])]
            if other:
                there, wish = ([f"--{key} {of[key]}" for key in other] for of in (about, asked))
                fail(f"{path} holds episodes of {', '.join(there)}, not {', '.join(wish)}: give "
                     f"{' '.join(there)}, choose another --data folder or delete it")
            if closed or ready >= demos + HELD_OUT:
                continue
            look = {"size": size, "render": about.get("render", render or "fast")}
            files[path] = ((suite, task, look), demos + HELD_OUT,
                           partial(attributes, suite, task, **look))
        make_files("scripted", record_episodes, files, workers)


def make_files(kind, function, files, workers, split=True, opengl=True):
    """Makes what is missing of data files, in processes.

    kind      of the episodes, for messages
    function  as of `run_jobs`; its jobs (*job, folder, numbers) are episodes to make, a file each
    files     {path: (job, number of episodes, about)}; about() -> attributes
    split     whether several processes may make episodes of one file
    """
    jobs = [(*job, path.with_suffix(""), share) for path, (job, count, _) in files.items()
            for share in shares(missing(path, count), len(files), workers if split else 1)]
    if jobs:
        path, total = next(iter(files)), sum(len(job[-1]) for job in jobs)
        print(f"data: {total} {kind} episodes of {len(files)} tasks of {path.parent.name}, "
              f"{workers} processes -> {path.parents[1]}/")
        for _ in run_jobs(function, jobs, workers, total, kind, opengl):
            pass
    for path, (_, count, about) in files.items():
        short = len(list(path.with_suffix("").glob("demo_*.hdf5"))) < count
        assemble(path, path.with_suffix(""), {"exhausted": short} | about())


def made_so_far(path):
    """How many episodes a task's data file has, and its attributes; of what an interrupted run left
    of it 0, and those known; 0, {} if there is nothing."""
    if path.exists():
        with open_data(path) as f:
            about = dict(f["data"].attrs)
            return len(f["data"]), about | {"size": int(about["size"])}
    for part in path.with_suffix("").glob("demo_*.hdf5"):
        with h5py.File(part) as one:
            return 0, {"source": "scripted" if "noise" in one.attrs else "official",
                       "size": one["masks"].shape[1], "render": one.attrs["render"]}
    return 0, {}


def missing(path, count):
    """Numbers of those of a task's first episodes that are to be made, each a file in the folder of
    the data file's name; a data file that has some is taken apart into this folder."""
    parts = path.with_suffix("")
    if path.exists():
        split_assembled(path, parts)
    parts.mkdir(parents=True, exist_ok=True)
    return [i for i in range(count) if not (parts / f"demo_{i}.hdf5").exists()]


def record_episodes(job):
    """Worker: some episodes of one task, a file each; yields each one's number when it is made."""
    suite, task, look, folder, indices = job
    sim = sims.make(suite, task, **look)
    for i in indices:
        begin = time.time()
        for seed in range(i, i + 20 * RETRY, RETRY):
            if episode := record(sim, seed):
                break
        else:
            raise RuntimeError(f"{task}: the demonstrator failed 20 scenes in a row")
        write_episode(folder / f"demo_{i}.hdf5", episode, seed=seed, noise=NOISE,
                      render=look["render"], seconds=time.time() - begin)
        yield i
    sim.close()


def attributes(suite, task, size, render, source="scripted"):
    """The attributes of a simulator's data file, a dict, see core/episodes.py."""
    language, objects, _ = sims.describe(suite, task)
    arguments = {"env_name": suite, "type": 1, "env_kwargs": {"suite": suite, "task": task}}
    return {"env": suite, "env_args": json.dumps(arguments), "task": task, "size": size,
            "render": render, "source": source, "objects": objects,
            "language_instruction": language, "text_embedding": embed(language),
            "problem_info": json.dumps({"language_instruction": language}),
            "cameras": list(CAMERAS), "goal_varies": sims.goal_varies(suite), "mask_source": "sim",
            "track_source": "sim", "versions": json.dumps(sims.versions())}


def task_names(suite, chosen, data):
    """Names of a suite's tasks; of a folder of data files that no simulator makes, its files'.
    chosen: '': all but those of UNSOLVED that are not there as official; see sims.choose_tasks."""
    known, folder = sims.simulator_of(suite).tasks(suite), Path(data) / suite
    there = [path.stem for path in sorted(folder.glob("*.hdf5"))]
    names = sims.choose_tasks(suite, chosen, known or there)
    poor = [name for name in names if known and not chosen and name in UNSOLVED
            and made_so_far(folder / f"{name}.hdf5")[1].get("source") != "official"]
    if poor:
        print(f"left out, as the demonstrator does not solve them: {', '.join(poor)}")
    return [name for name in names if name not in poor]


def load_videos(config):
    """What a planner learns from; the episodes that are missing are made first.  config.suite: "a",
    or "a:2,b", see `flags.suites`; config.tasks: the first's and, where these have them, others'
    -> training episodes of all suites, held-out ones of the first, a line about them."""
    first, *_ = wanted = suites(config)  # {suite: videos per task}
    names, parts = task_names(first, config.tasks, config.data), []
    for suite, number in wanted.items():
        known = names if suite == first else task_names(suite, "", config.data)
        chosen = names if set(names) <= set(known) else known
        ensure(suite, chosen, number, config.data, config.size)
        parts.append(Episodes(config.data, suite, chosen, number))
    videos = join(parts)
    held_out = Episodes(config.data, first, names, wanted[first], split="valid")
    note = f"{len(videos.length)} videos of {len(videos.tasks)} tasks, {len(videos)} frames"
    if not videos.arrays["actions"]:
        note += "; films have no actions: give executor.py a --suite to act in"
    return videos, held_out, note


def load_demos(config, tasks):
    """What an executor learns from; the episodes that are missing are made first.  tasks: numbers
    or names, comma-separated; empty: all -> Episodes of the demonstrations, of the videos."""
    suite, data, size = config.suite, config.data, config.size
    names = task_names(suite, tasks, data)
    ensure(suite, names, config.demos, data, size)
    demos, videos = (Episodes(data, suite, names, n) for n in (config.action_demos, config.demos))
    if not demos.arrays["actions"]:
        fail(f"the videos of {suite} have no actions to learn from: give the --suite to act in")
    if size != videos.size:
        fail(f"pictures of {size} px are asked for, {data}/ holds {videos.size} px: give another "
             "--data folder")
    return demos, videos
