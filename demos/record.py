"""Scripted demonstrations are recorded, in processes that other programs use, too.

    ensure("libero_spatial", names, demos=20, data="data")    # makes the episodes that are missing
    videos, held_out, note = load_videos(config)              # the same, then a planner's videos

`Demonstrator` is the scripted policy as `rollout.py` plays it: the upper bound of every plan.
"""

import gc
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
from tqdm import tqdm

import sims
from core import draw
from core.episodes import (CAMERAS, HELD_OUT, Episodes, assemble, join, open_data, source_of,
                           split_assembled, write_episode)
from core.files import fail, stop_if_full
from core.flags import suites
from demos.language import embed
from demos.libero import UNSOLVED, demonstrator
from sims.camera import choose_opengl

# Standard deviation of what is added to the executed motion (of 1) while recording, as in DART
# (Laskey et al., 2017): states stray as a learner's will, and the recorded, clean actions lead back
NOISE = 0.1
# episode i is sampled with seed i; if the demonstrator fails there, with i + RETRY, and so on
RETRY = 100_000


# --- one episode ----------------------------------------------------------------------------------


def perturbed(action, noise, rng):
    """An action (A,) with normal noise on its motion, not on its last number, the gripper's."""
    return action + np.append(rng.normal(0, noise, len(action) - 1), 0)


class Demonstrator:
    """The scripted policy as an actor, see `rollout.play`.

    noise  standard deviation of what is added to the motion numbers of each action
    """

    def __init__(self, sim, noise=0.0):
        self.noise = noise

    def reset(self, sim, scene):
        """scene {"seed": s} or {"init": k}: the number decides the height of approach and the
        noise."""
        number, = scene.values()
        self.policy, self.rng = demonstrator(sim, number), np.random.default_rng([number, 1])

    def __call__(self, sim):
        """The action for the current state, (A,): in [-1, 1] without the noise."""
        return perturbed(self.policy(sim), self.noise, self.rng)

    def finished(self, success):
        """Whether the hand has let go and withdrawn; success alone does not end a demonstration."""
        return self.policy.done

    def draw(self, sim):
        """Both cameras' pictures side by side, (., ., 3) uint8."""
        frame = sim.frame()
        return draw.row([("now", frame["agentview_rgb"]), ("wrist", frame["eye_in_hand_rgb"])])

    def limit(self, sim):
        """Steps at most: as when recorded, enough for a second attempt."""
        return sim.max_demo_steps


def record(sim, seed):
    """Plays one scripted episode with NOISE.  Returns its arrays, each (T, ...), the actions
    without the noise; or None if the goal did not hold at the end."""
    rng, rows = np.random.default_rng(seed), []
    frame, policy = sim.reset(seed=seed), demonstrator(sim, seed)
    while not policy.done and len(rows) < sim.max_demo_steps:
        action = policy(sim)  # (A,)
        row = frame | {"actions": action, "states": sim.state()}
        frame, success = sim.step(perturbed(action, NOISE, rng))
        rows.append(row | {"rewards": float(success)})
    if not sim.success():
        return None
    episode = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return episode | sims.tracks(sim, episode["states"], seed=seed)


# --- processes ------------------------------------------------------------------------------------


def run_jobs(function, jobs, workers, total, desc, opengl=True):
    """Plays episodes in processes of one thread each and yields their results as they come.

    function  a generator: function(job) makes one simulator, plays the job's episodes and yields a
              (small) result after each
    workers   number of processes, which end when this one is killed
    total     number of episodes of all jobs, for the progress bar that `desc` names
    opengl    whether the simulators render

    Errors of a worker are raised here; a worker that was killed ends the program in one line.
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
    global reports
    reports = queue
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def work(function, job):
    """Worker: plays the episodes of one job and reports each."""
    for result in function(job):
        reports.put(result)
    gc.collect()  # a simulator with its textures takes over a gigabyte: never two at a time


def shares(episodes, tasks, workers):
    """A task's episodes in pieces, a job each: those of few tasks are split among all processes."""
    pieces = workers if tasks < 2 * workers else 1
    return [episodes[k::pieces] for k in range(pieces) if episodes[k::pieces]]


# --- data files -----------------------------------------------------------------------------------


def ensure(suite, tasks, demos, data, size=128, render=None, workers=2, text="minilm"):
    """Makes whatever episodes are missing so that each task has `demos` videos and HELD_OUT more.

    Episode i depends on (task, i) alone, so neither interruptions nor the number of processes
    change the data.
    size    height and width of the pictures, pixels
    render  as of sims.make; None: that of the episodes that are there, else fast
    text    what embeds the instruction, one of `language.TEXTS`
    """
    asked, jobs, unfinished = {"size": size, "render": render}, [], {}
    for task in tasks:
        path = Path(data) / suite / f"{task}.hdf5"
        parts, (ready, made_with) = path.with_suffix(""), made_so_far(path, suite)
        other = {key: f"--{key} {value}" for key, value in made_with.items()
                 if asked[key] not in (None, value)}
        if other:
            fail(f"{path} holds episodes of {', '.join(other.values())}, not "
                 f"{', '.join(f'--{key} {asked[key]}' for key in other)}: give "
                 f"{' '.join(other.values())}, choose another --data folder or delete it")
        if ready >= demos + HELD_OUT:
            continue
        if path.exists():
            split_assembled(path, parts)
        parts.mkdir(parents=True, exist_ok=True)
        unfinished[task] = {"size": size, "render": render or "fast"} | made_with
        missing = [i for i in range(demos + HELD_OUT) if not (parts / f"demo_{i}.hdf5").exists()]
        jobs += [(suite, task, share, parts, unfinished[task])
                 for share in shares(missing, len(tasks), workers)]
    if not unfinished:
        return
    total = sum(len(job[2]) for job in jobs)
    print(f"data: {total} scripted episodes of {len(unfinished)} tasks of {suite}, "
          f"{workers} processes -> {data}/")
    try:
        for _ in run_jobs(record_episodes, jobs, workers, total, "record"):
            pass
        for task, look in unfinished.items():
            path = Path(data) / suite / f"{task}.hdf5"
            about = attributes(suite, task, **look, text=text, source="scripted")
            assemble(path, path.with_suffix(""), about)
    except OSError as error:
        stop_if_full(error, data)


def made_so_far(path, suite):
    """Of a task's data file, or of what an interrupted run left of it: how many episodes are ready,
    infinitely many if none can be added (films, official ones, a suite derived from this one); and
    what they look like, {size, render}, without episodes {}."""
    if path.exists():
        with open_data(path) as f:
            about = f["data"].attrs
            if about["source"] != "scripted" or about["env"] != suite:
                return np.inf, {"size": int(about["size"])}
            return len(f["data"]), {"size": int(about["size"]), "render": about["render"]}
    for part in sorted(path.with_suffix("").glob("demo_*.hdf5"))[:1]:
        with h5py.File(part) as one:
            if "noise" not in one.attrs:
                fail(f"{part.parent}/ holds an interrupted import: finish it with --source "
                     "official, choose another --data folder or delete it")
            return 0, {"size": one["masks"].shape[1], "render": one.attrs["render"]}
    return 0, {}


def record_episodes(job):
    """Worker: some episodes of one task, a file each; yields each one's number when it is made."""
    suite, task, indices, folder, look = job
    sim = sims.make(suite, task, **look)
    for i in indices:
        begin = time.time()
        for seed in range(i, i + 20 * RETRY, RETRY):
            episode = record(sim, seed)
            if episode:
                break
        else:
            raise RuntimeError(f"{task}: the demonstrator failed 20 scenes in a row")
        write_episode(folder / f"demo_{i}.hdf5", episode, seed=seed, noise=NOISE,
                      render=look["render"], seconds=time.time() - begin)
        yield i
    sim.close()


def attributes(suite, task, size, render, text, source, exhausted=False):
    """The attributes of a simulator's data file, a dict, see core/episodes.py.

    text       what embeds the instruction, one of `language.TEXTS`
    source     scripted or official
    exhausted  whether the source has no more episodes
    """
    language, objects, _ = sims.describe(suite, task)
    arguments = {"env_name": suite, "type": 1, "env_kwargs": {"suite": suite, "task": task}}
    return {"env": suite, "env_args": json.dumps(arguments), "task": task, "size": size,
            "render": render, "source": source, "exhausted": exhausted, "objects": objects,
            "language_instruction": language, "text": text, "text_embedding": embed(language, text),
            "problem_info": json.dumps({"language_instruction": language}),
            "cameras": list(CAMERAS), "goal_varies": sims.goal_varies(suite), "mask_source": "sim",
            "track_source": "sim", "versions": json.dumps(sims.versions())}


# --- what there is --------------------------------------------------------------------------------


def task_names(suite, chosen, data):
    """Names of a suite's tasks; of a folder of data files that no simulator makes, its files'.

    chosen  numbers or names, comma-separated; empty: all but those of UNSOLVED of which there are
            no other demonstrations
    """
    known = sims.simulator_of(suite).tasks(suite)
    files = [path.stem for path in sorted((Path(data) / suite).glob("*.hdf5"))]
    names = known or files or sims.tasks(suite)  # which fails, with a list of suites
    words = [word.strip() for word in chosen.split(",") if word.strip()]
    words = [names[int(w)] if w.isdigit() and int(w) < len(names) else w for w in words]
    for word in words:
        if word not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} "
                 f"or a name such as {names[0]}")
    poor = [name for name in names if known and not words and name in UNSOLVED
            and source_of(Path(data) / suite / f"{name}.hdf5") != "official"]
    if poor:
        print(f"left out, as the demonstrator does not solve them: {', '.join(poor)}")
    return [name for name in names if name not in poor and (not words or name in words)]


def load_videos(config):
    """What a planner learns from; the episodes that are missing are made first.

    config.suite  "a", or "a:2,b": two videos per task of a and config.demos of b; config.tasks are
                  the first's and, where they have these, the others'
    -> training episodes of all suites, held-out ones of the first, a line about them
    """
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
    return videos, held_out, note
