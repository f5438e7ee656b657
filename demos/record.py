"""What every planner's program does around its training: data before, scores after."""

import gc
import os
import sys
import time
from contextlib import contextmanager
from multiprocessing import TimeoutError, active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
from tqdm import tqdm

import sims
from core.episodes import (Episodes, HELD_OUT, assemble, join, open_data, source_of,
                           split_assembled, write_episode)
from core.files import fail, stop_if_full, write
from demos.libero import demonstrator
from sims import metaworld
from sims.camera import choose_opengl

# tasks of LIBERO-90 that the demonstrator solves in fewer than half of their scenes (in none)
UNSOLVED = {
    "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet",
    "KITCHEN_SCENE5_put_the_ketchup_in_the_top_drawer_of_the_cabinet",
    "KITCHEN_SCENE9_put_the_frying_pan_on_the_cabinet_shelf",
    "KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf",
}
NOISE = 0.1  # on the executed motion, see `record`
# episode i is sampled with seed i; if the expert fails there, with i + RETRY, and so on
RETRY = 100_000


def record(sim, seed, noise):
    """Plays one scripted episode.  Returns its arrays, or None if the goal did not hold at the end.

    noise  standard deviation of what is added to the motion numbers of the executed action (after
           DART, Laskey et al. 2017): the states stray as a learner's will, the recorded actions say
           how to come back
    """
    rng = np.random.default_rng(seed)
    frame, expert = sim.reset(seed=seed), demonstrator(sim, seed)
    rows = []
    while not expert.done and len(rows) < sim.patience:
        action = expert(sim)  # (7,)
        row = frame | {"actions": action, "states": sim.state()}
        strayed = action + np.append(rng.normal(0, noise, sim.action_dim - 1), 0)
        frame, success = sim.step(strayed)
        rows.append(row | {"rewards": float(success)})
    if not sim.success():
        return None
    episode = {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # each (T, ...)
    return episode | sims.tracks(sim, episode["states"], seed=seed)


def extract_chunk(job):
    """Worker: makes some episodes of one task.  The simulator is kept for the task's next chunk."""
    suite, task, indices, folder, size, noise, render = job
    key = suite, task, size, render
    if getattr(extract_chunk, "key", None) != key:
        if hasattr(extract_chunk, "sim"):
            # a simulator with its textures takes over a gigabyte: never two at a time
            extract_chunk.sim.close()
            del extract_chunk.sim
            gc.collect()
        extract_chunk.sim, extract_chunk.key = sims.make(suite, task, size, render), key
    for i in indices:
        begin = time.time()
        for seed in range(i, i + 20 * RETRY, RETRY):
            episode = record(extract_chunk.sim, seed, noise)
            if episode:
                break
        else:
            raise RuntimeError(f"{task}: the expert failed 20 scenes in a row")
        write_episode(Path(folder) / f"demo_{i}.hdf5", episode, seed=seed, noise=noise,
                      render=render, seconds=time.time() - begin)
        extract_chunk.progress.put(1)


def start_worker(function, queue):
    """Pool initialiser: where `function`'s worker reports; it ends when its parent is killed."""
    function.progress = queue
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def ensure(suite, tasks, demos, data, size=128, noise=None, render=None, workers=2, text="minilm"):
    """Makes whatever episodes are missing so that each task has `demos` videos and HELD_OUT more.

    Episode i depends on (task, i) alone, so neither interruptions nor the number of processes
    change the data.
    noise, render  None: those of the episodes that are there, else 0.1 and fast
    """
    jobs, open_tasks = [], []
    for task in tasks:
        path = Path(data) / suite / f"{task}.hdf5"
        parts = path.with_suffix("")
        there, look = NOISE if noise is None else noise, render or "fast"
        if source_of(path) in ("video", "official"):
            with open_data(path) as f:
                found = f["data"].attrs["size"]
            if found != size:
                fail(f"{path} holds {found} px pictures, not {size} px: give --size {found}")
            continue
        if path.exists():
            with open_data(path) as f:
                have, attrs = len(f["data"]), dict(f["data"].attrs)
                there = float(f["data/demo_0"].attrs["noise"])
            if noise not in (None, there):
                fail(f"{path} was made with --noise {there:g}, not {noise:g}: "
                     "choose another --data folder or delete it")
            if attrs["size"] != size or render not in (None, attrs["render"]):
                fail(f"{path} holds {attrs['size']} px {attrs['render']} pictures, not {size} px "
                     f"{render or ''}: choose another --data folder or delete it")
            look = attrs["render"]
            if have >= demos + HELD_OUT:
                continue
            split_assembled(path, parts)
        parts.mkdir(parents=True, exist_ok=True)
        there, look = unfinished(parts, size, noise, render) or (there, look)
        open_tasks.append((task, look))
        missing = [i for i in range(demos + HELD_OUT) if not (parts / f"demo_{i}.hdf5").exists()]
        # few tasks: split each among the processes
        pieces = workers if len(tasks) < 2 * workers else 1
        jobs += [(suite, task, missing[k::pieces], str(parts), size, there, look)
                 for k in range(pieces) if missing[k::pieces]]
    if open_tasks:
        count = sum(len(job[2]) for job in jobs)
        print(f"data: {count} scripted episodes of {len(open_tasks)} tasks of {suite}, "
              f"{workers} processes -> {data}/")
        try:
            with pool(workers, extract_chunk) as (processes, queue):
                made = processes.imap_unordered(extract_chunk, jobs)
                for _ in watch(made, queue, len(jobs), count, "extract"):
                    pass
            for task, look in open_tasks:
                path = Path(data) / suite / f"{task}.hdf5"
                assemble(path, path.with_suffix(""), suite, task, size, look, text)
        except OSError as error:
            stop_if_full(error, data)


def unfinished(parts, size, noise, render):
    """Noise and rendering of the episodes of an interrupted run, None if there are none; fails if
    it had other flags."""
    for part in sorted(parts.glob("demo_*.hdf5"))[:1]:
        with h5py.File(part) as one:
            if "noise" not in one.attrs:
                fail(f"{parts}/ holds an interrupted import: finish it with --source official, "
                     "choose another --data folder or delete it")
            found, look = one["masks"].shape[1], one.attrs["render"]
            there = float(one.attrs["noise"])
        if found != size or noise not in (None, there) or render not in (None, look):
            fail(f"{parts}/ holds an interrupted extraction of {found} px, {look} and noise "
                 f"{there:g}, not {size} px, {render or look} and {noise or there:g}: "
                 "choose another --data folder or delete it")
        return there, look


@contextmanager
def pool(workers, function, opengl=True):
    """Processes of one thread each for `function`, and the queue on which they report episodes."""
    choose_opengl(needed=opengl)
    # inherited by the children
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}
    before = {k: os.environ.get(k) for k in one}
    os.environ.update(one)
    context = get_context("spawn")  # a fork would share OpenGL and torch's threads
    queue = context.SimpleQueue()
    try:
        with context.Pool(workers, start_worker, (function, queue)) as processes:
            yield processes, queue
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def watch(results, queue, jobs, total, what):
    """Yields the results of `jobs` jobs as they come, with a progress bar over `total` episodes."""
    workers = active_children()
    often = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=total, unit="episode", desc=what, mininterval=often) as bar:
        while jobs:
            try:
                yield results.next(timeout=0.3)  # an exception of the worker is raised here
                jobs -= 1
            except TimeoutError:
                # the pool itself would wait for ever
                dead = [w.exitcode for w in workers if w.exitcode]
                if 2 in dead:
                    raise SystemExit(2)  # it has said why
                if dead:
                    fail(f"a worker process was killed (exit code {dead[0]}), perhaps for lack of "
                         "memory: run again with fewer --workers; finished episodes are kept")
            while not queue.empty():
                bar.update(queue.get())


def is_video(path):
    """Whether a data file holds annotated videos: no actions, no states, one camera."""
    return source_of(path) == "video"


def choose_tasks(suite, chosen, data):
    """As sims.choose_tasks, without those that the expert mostly fails unless they are named; and
    for a folder of annotated videos the names of its files."""
    files = sorted((Path(data) / suite).glob("*.hdf5"))
    if suite in sims.SUITES or suite in metaworld.METAWORLD or not files or not is_video(files[0]):
        # of those there may be other demonstrations
        poor = [] if chosen else [task for task in sims.choose_tasks(suite) if task in UNSOLVED and
                source_of(Path(data) / suite / f"{task}.hdf5") != "official"]
        for task in poor:
            print(f"skipped, as the demonstrator does not solve it: {task}")
        return [task for task in sims.choose_tasks(suite, chosen) if task not in poor]
    names, picked = [p.stem for p in files], [w.strip() for w in chosen.split(",") if w.strip()]
    picked = [names[int(w)] if w.isdigit() and int(w) < len(names) else w for w in picked]
    for word in picked:
        if word not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} "
                 f"or a name such as {names[0]}")
    return picked or names


def sources(config):
    """The suites whose videos a planner learns from, of other bodies too (ATM, section V-B), and
    how many of each task's, {suite: videos}."""
    chosen = {}
    for word in (w.strip() for w in getattr(config, "videos", "").split(",")):
        suite, _, number = word.partition(":")
        if number and not (number.isdigit() and int(number)):
            fail(f"--videos {word}: give a suite, or a suite and a number of videos per task "
                      "such as libero_spatial:2")
        if suite:
            chosen[suite] = int(number or config.demos)
    return chosen or {config.suite: config.demos}


def run_path(config, name):
    """<out>/<suite>/<name>.pt; what is learned from other videos than the suite's says so."""
    if sources(config) == {config.suite: config.demos}:
        config.videos = ""  # what is meant without it, in other words
    else:
        name += "-from-" + "+".join(suite + f"-{number}" * (number != config.demos)
                                    for suite, number in sources(config).items())
    return Path(config.out) / config.suite / f"{name}.pt"


def prepare(config, path, program):
    """Makes the data that is missing -> training episodes, of all sources, held-out ones, of the
    suite, a line about them."""
    names = choose_tasks(config.suite, config.tasks, config.data)
    if config.show and not path.exists():
        fail(f"no planner {path} to show: "
                  f"train it with python {program}.py --suite {config.suite}")
    wanted, parts = {config.suite: config.demos} | sources(config), []
    known = {suite: choose_tasks(suite, "", config.data) for suite in wanted}
    for suite, number in wanted.items():
        # the same tasks, where it has them
        chosen = names if set(names) <= set(known[suite]) else known[suite]
        ensure(suite, chosen, max(number, config.demos * (suite == config.suite)),
                       config.data, config.size)
        if suite in sources(config):
            parts.append(Episodes(config.data, suite, chosen, number))
    videos = join(parts)
    held_out = Episodes(config.data, config.suite, names, config.demos, split="valid")
    note = f"{len(videos.length)} videos of {len(videos.tasks)} tasks, {len(videos)} frames"
    return videos, held_out, note


def report(config, path, scores, picture):
    """Prints the scores (text) and writes them beside the checkpoint; of a trained planner that
    is shown, also `picture()`, (H, W, 3) uint8, which training draws itself."""
    print(scores)
    write(path.with_suffix(".txt"), scores + "\n")
    if config.show:
        import imageio.v3 as iio
        iio.imwrite(path.with_suffix(".png"), picture())
    print(f"picture: {path.with_suffix('.png')}   next: python executor.py --planner {path}")
