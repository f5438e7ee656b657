"""Episodes -> HDF5 with masks and point tracks; the reader of that file.

    python extract.py --suite libero_spatial --demos 20     # continues where it was stopped
    python extract.py --suite libero_spatial --show         # the data as a picture
    python extract.py --video clip.mp4 --objects "arm. bowl. plate." --suite my_videos --tracks flow
    python extract.py --suite libero_spatial --source official --download  # LIBERO's own

One file per task, data/<suite>/<task>.hdf5, in the robomimic/LIBERO layout (A action, S state
numbers):

    data.attrs   env_args, problem_info, total, task, language_instruction, text_embedding (D,) f4,
                 objects (robot first), cameras, size, source
    data/demo_i  actions (T, A) f4 . states (T, S) f8 . rewards, dones (T,)
                 attrs: num_samples; seed, noise or, of official ones, original
      obs/       agentview_rgb, eye_in_hand_rgb (T, H, W, 3) u1 upright
                 ee_states, joint_states, gripper_states
      masks      (T, H, W) u1 of agentview: 0 background, 1 robot, 2.. the task's objects
      tracks/    agentview, eye_in_hand (T, K, 2) f2 places x, y of points on surfaces, in [0, 1]
                 inside the picture
      visible/   agentview, eye_in_hand (T, K) bool
      hand       (T, 2) f2 of agentview: the place of the robot's hand, in the same units
    mask/        train, valid: names of demos (robomimic's filter keys)

Row t holds what is seen before action t.  demo_0 .. demo_1 are held out for validation, the next
`--demos` are the videos, and of these the first `--action-demos` also lend their actions.  Pictures
are stored uncompressed and contiguous, so that training maps them into memory instead of reading
them.  `writing.py` writes these files, `episodes.py` reads them; `films.py` is about `--video`,
`official.py` about `--source official`.
"""
import errno
import gc
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import TimeoutError, active_children, get_context, parent_process
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
from tqdm import tqdm

import annotate
import cameras
import core
import experts
import grade
import official
import sims
from core import fail, flag
from episodes import COLOURS, caption, draw_heat, draw_masks, draw_tracks  # also extract.NAME
from episodes import HELD_OUT, Episodes, open_data, sheet, source_of
from films import annotate_video, choose_tasks
from language import TEXTS, embed, text_model  # also extract.NAME for other files
from writing import assemble, split_assembled, write_episode

NOISE = 0.1  # on the executed motion, see `record`
# episode i is sampled with seed i; if the expert fails there, with i + RETRY, and so on
RETRY = 100_000


@dataclass
class Config:
    suite: str = flag("libero_spatial", "suite: " + ", ".join(sims.SUITES))
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    source: str = flag("scripted", "scripted, or official: LIBERO's published demonstrations, from "
                       "<data>/official/<suite>/ and at their own --size", ["scripted", "official"])
    demos: int | None = flag(None, "videos per task", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU",
                              choices=["laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    noise: float = flag(NOISE, "standard deviation of the noise on the executed action (of 1); the "
                        "clean one is recorded", minimum=0)
    render: str = flag("fast", "fast, or faithful: the simulators' own look, ten times slower",
                       choices=["fast", "faithful"])
    show_goal: bool = flag(False, "draw Meta-World's goal markers, which tell a policy where to go")
    text: str = flag("minilm", "what puts the instruction into numbers; bert and clip must be in "
                     "Hugging Face's cache", choices=list(TEXTS))
    workers: int = flag(2, "processes", minimum=1)
    data: str = flag("data", "folder of the data files")
    video: str = flag("", "a film, a folder of its pictures, or a folder of films: no simulator, "
                      "see annotate.py")
    objects: str = flag("", "with --video: what to segment, the robot first, each name with a full "
                        "stop")
    masks: str = flag("sam", "of --video and --grade: sam is Grounding DINO, Segment Anything and "
                      "SAM 2; sim is the simulator's truth", choices=["sam", "sim"])
    tracks: str = flag("cotracker", "of --video and --grade: flow needs no weights; sim is the "
                       "simulator's truth", choices=["cotracker", "flow", "sim"])
    threshold: float = flag(annotate.BOX, "with --video: least score of a found object", minimum=0)
    weights: str = flag("", "with --video: folder of the models, before the usual caches")
    download: bool = flag(False, "fetch what is missing: --video's weights, the official files")
    grade: bool = flag(False, "compare --masks and --tracks (sim: leave out) with the truth; "
                       "writes results/<suite>_grade.json")
    show: bool = flag(False, "write data/<suite>.png, a picture of the data, one row per task")
    unseen: str | None = flag(None, "with --show: data/<suite>_unseen.png instead, scenes of "
                              "libero_spatial as in training and with this new",
                              choices=[*sims.UNSEEN, "all"])
    device: str | None = flag(None, "of the models that --video needs")
    # as the planner's
    PRESETS = {"laptop": {"demos": 20, "size": 96}, "paper": {"demos": 50, "size": 128}}


def record(sim, seed, noise):
    """Plays one scripted episode.  Returns its arrays, or None if the goal did not hold at the end.

    noise  standard deviation of what is added to the motion numbers of the executed action (after
           DART, Laskey et al. 2017): the states stray as a learner's will, the recorded actions say
           how to come back
    """
    rng = np.random.default_rng(seed)
    frame, expert = sim.reset(seed=seed), experts.demonstrator(sim, seed)
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


def import_official(config, tasks):
    """Makes whatever data files are missing of the tasks from LIBERO's published ones."""
    jobs = official.plan(config.data, config.suite, tasks, config.demos, config.download)
    if not jobs:
        return
    print(f"data: official demonstrations of {len(jobs)} tasks of {config.suite}, "
          f"{config.workers} processes -> {config.data}/")
    try:
        with pool(config.workers, official.import_task) as (processes, queue):
            made = processes.imap_unordered(official.import_task, jobs)
            total = sum(wanted for *_, wanted in jobs)
            for task, size, exhausted in watch(made, queue, len(jobs), total, "import"):
                path = Path(config.data) / config.suite / f"{task}.hdf5"
                assemble(path, path.with_suffix(""), config.suite, task, size, "faithful",
                         config.text, "official", exhausted)
    except OSError as error:
        stop_if_full(error, config.data)


def stop_if_full(error, folder):
    """A full disk is the user's to solve; any other error is ours to show."""
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        fail(f"the disk of {folder} is full: free some space or choose another --data folder; "
             "what is done is kept")
    raise error


@contextmanager
def pool(workers, function, opengl=True):
    """Processes of one thread each for `function`, and the queue on which they report episodes."""
    cameras.choose_opengl(needed=opengl)
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


def unseen_sheet(config, names):
    """One row per task: the same scene as in training and in unseen variants -> (., ., 3) uint8."""
    variants = sims.UNSEEN if config.unseen == "all" else [config.unseen]
    rows = []
    for name in names:
        cells = []
        for unseen in (None, *variants):
            sim = sims.make(config.suite, name, config.size, config.render, unseen=unseen)
            cells.append(caption(sim.reset(seed=0)["agentview_rgb"], unseen or "as in training"))
            sim.close()
        rows.append(np.concatenate(cells, 1))
    return np.concatenate(rows)


def show(config, picture):
    """Writes a picture (., ., 3) uint8 beside the suite's data."""
    import imageio.v3 as iio
    path = Path(config.data) / f"{config.suite}{'_unseen' if config.unseen else ''}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, picture)
    print(f"picture: {path}")


def main(argv=None):
    """Command line: makes the episodes that are missing; with --show draws them."""
    about = "Scripted demonstrations with exact masks, as HDF5 in the robomimic layout."
    config = core.parse(Config, about, argv)
    if config.video:
        annotate_video(config)
    if config.unseen:
        return show(config, unseen_sheet(config, sims.choose_tasks(config.suite, config.tasks)))
    if config.source == "official":
        names = official.choose_tasks(config.suite, config.tasks)
        import_official(config, names)
    else:
        names = choose_tasks(config.suite, config.tasks, config.data)
        ensure(config.suite, names, config.demos, config.data, config.size, config.noise,
               config.render + "+goal" * config.show_goal, config.workers, config.text)
    episodes = Episodes(config.data, config.suite, names, config.demos)
    print(f"{config.data}/{config.suite}: {len(names)} tasks, {len(episodes.length)} videos of "
          f"{episodes.length.mean():.0f} steps on average, {HELD_OUT} more per task held out; "
          f"{episodes.seconds / len(episodes.length):.2f} s of one core each")
    if config.grade:
        grade.grade_annotators(config, episodes)
    if config.show:
        show(config, sheet(episodes))


if __name__ == "__main__":
    main()
