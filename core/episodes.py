"""The data file: one HDF5 file per task, in the robomimic/LIBERO layout; its writer and reader.

    episodes = Episodes("data", "libero_spatial", names, demos=20)
    episode, t, rng = episodes.sample_frames(step, batch=32, seed=0)
    frames = episodes.gather("obs/agentview_rgb", episode, t)  # (32, H, W, 3)

data/<suite>/<task>.hdf5 (T steps, A action numbers, S state numbers, K points):

    data.attrs   env: the simulator's suite; task, language_instruction, text_embedding (E,) f4,
                 objects (robot first), cameras, size, render, goal_varies: each scene has a goal of
                 its own; source: scripted, official or video; mask_source, track_source; versions
    data/demo_i  actions (T, A) f4 . states (T, S) f8 . rewards, dones (T,)
                 attrs: num_samples, seconds, code: see files.code; seed, noise or, of official
                 ones, original
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
are stored uncompressed and contiguous, so that training maps them into memory.
"""

import copy
import os
import shutil
from pathlib import Path

import h5py
import numpy as np

from core.files import code, fail, one_line

CAMERAS = ("agentview", "eye_in_hand")  # third person and hand
HELD_OUT = 2  # validation episodes per task
ABOUT = ("source", "size", "render", "objects", "text_embedding", "env", "goal_varies")  # at least


def write_episode(path, episode, **attrs):
    """Writes one episode to a file of its own: a `.part` is renamed when it is whole."""
    part = path.with_suffix(".part")
    made_by = "+".join(sorted({code(), *attrs.get("code", code()).split("+")}))
    with h5py.File(part, "w") as f:
        f.attrs.update(attrs | {"num_samples": len(episode["masks"]), "code": made_by})
        for key, value in episode.items():
            where = f"obs/{key}" if key.endswith(("_rgb", "_states")) and "/" not in key else key
            f.create_dataset(where, data=value.astype(np.float32) if key == "actions" else value)
        if "actions" in episode:
            f["dones"] = np.append(np.zeros(len(episode["actions"]) - 1, np.uint8), np.uint8(1))
    os.replace(part, path)


def assemble(path, parts, attrs):
    """Joins the episodes' files of the folder `parts` into the task's file, with the attributes
    `attrs` (dict), and deletes them."""
    tmp = path.with_suffix(".tmp")
    names = sorted((p.stem for p in parts.glob("demo_*.hdf5")), key=lambda n: int(n[5:]))
    with h5py.File(tmp, "w") as f:
        data = f.create_group("data")
        for name in names:
            with h5py.File(parts / f"{name}.hdf5") as one:
                one.copy(one, data, name)
        data.attrs.update(attrs, total=sum(int(data[name].attrs["num_samples"]) for name in names))
        f["mask/valid"] = np.array(names[:HELD_OUT], "S")
        f["mask/train"] = np.array(names[HELD_OUT:], "S")
    os.replace(tmp, path)
    shutil.rmtree(parts)


def split_assembled(path, parts):
    """The inverse: a finished file that is to get more episodes becomes one per episode again."""
    parts.mkdir(parents=True, exist_ok=True)
    with h5py.File(path) as f:
        for name in f["data"]:
            with h5py.File(parts / f"{name}.part", "w") as one:
                for key in f["data"][name]:
                    f.copy(f"data/{name}/{key}", one)
                one.attrs.update(f["data"][name].attrs)
            os.replace(parts / f"{name}.part", parts / f"{name}.hdf5")
    os.remove(path)


def open_data(path):
    """Opens a data file for reading; one line that names the way out if it is missing or broken."""
    path = Path(path)
    command = f"python extract.py --suite {path.parent.name}"
    if not path.exists():
        fail(f"no data file {path}: make it with {command}")
    try:
        with one_line(path):    # no permission, or written by another program
            f = h5py.File(path, "r")
        if not isinstance(f.get("data"), h5py.Group) or not len(f["data"]):
            raise OSError("no episodes")
        lacks = [name for name in ABOUT if name not in f["data"].attrs]
    except OSError as error:
        fail(f"{path} is not a whole data file ({str(error)[:60]}): delete it and run {command}")
    if lacks:
        fail(f"{path} lacks {', '.join(lacks)}, so this extract.py has not made it: choose another "
             "--data folder or delete it")
    return f


def mapped(dataset, whole):
    """A dataset as an array: what lies contiguous in the file is a view of `whole`, the file mapped
    into memory as bytes (one map per file: the kernel limits their number); the rest is read."""
    offset = dataset.id.get_offset()
    if offset is None or not dataset.nbytes:
        return dataset[:]
    return whole[offset:offset + dataset.nbytes].view(dataset.dtype).reshape(dataset.shape)


def look_times(t, count, stride):
    """The steps of a window of `count` looks, `stride` steps apart, that ends at step t (...), none
    before the episode's first -> (..., count), oldest first."""
    return np.maximum(np.asarray(t)[..., None] + stride * np.arange(1 - count, 1), 0)


class Episodes:
    """Read-only episodes of some tasks of a suite, whose pictures stay on disk until gathered.
    split 'train' -> the first `demos` videos per task, 'valid' -> the held-out ones.

    length (episodes,) steps, task (episodes,) index into `tasks`, start (episodes + 1,) rows before
    each, text (tasks, E) embeddings of the instructions, objects: names, of the task with the most,
    views: the cameras that all have, seconds of one core that the episodes took to make; codes: by
    which sources all were made that this process has read."""
    codes = set()
    KEYS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks", "actions",
            "obs/ee_states", "obs/joint_states", "obs/gripper_states",
            *(f"{what}/{camera}" for what in ("tracks", "visible") for camera in CAMERAS), "hand")
    OF_VIDEOS = ("obs/agentview_rgb", "masks", "tracks/agentview", "visible/agentview", "hand")

    def __init__(self, data, suite, tasks, demos, split="train"):
        self.suite, self.tasks, self.seconds, self.objects = suite, tasks, 0.0, []
        self.arrays, length, task, text = {k: [] for k in self.KEYS}, [], [], []
        for k, name in enumerate(tasks):
            path = Path(data) / suite / f"{name}.hdf5"
            with open_data(path) as f:
                whole, about = np.memmap(path, np.uint8, "r"), f["data"].attrs
                # a video has one camera and no robot
                keys = self.OF_VIDEOS if about["source"] == "video" else self.KEYS
                for demo in self.chosen(f, path, demos, split):
                    lacks = [key for key in keys if key not in demo]
                    lacks += ["num_samples"] * ("num_samples" not in demo.attrs)
                    if lacks:
                        fail(f"{path} lacks {demo.name}/{lacks[0]}: delete it and run python "
                             f"extract.py --suite {suite}")
                    for key in keys:
                        self.arrays[key].append(mapped(demo[key], whole))
                    self.codes.update(demo.attrs.get("code", "unknown").split("+"))
                    length.append(int(demo.attrs["num_samples"]))
                    self.seconds += float(demo.attrs.get("seconds", 0))
                    task.append(k)
                text.append(about["text_embedding"])
                self.objects = max(self.objects, list(about["objects"]), key=len)
                self.size, self.render, self.env = int(about["size"]), about["render"], about["env"]
                self.goal_varies = bool(about["goal_varies"])
        self.length, self.task, self.text = np.array(length), np.array(task), np.float32(text)
        self.own_goal = np.full(len(self.length), self.goal_varies)
        self.start = np.concatenate([[0], np.cumsum(self.length)])

    @staticmethod
    def chosen(f, path, demos, split):
        """The episodes of an open file that are wanted, as groups."""
        about, there = f["data"].attrs, len(f["data"]) - HELD_OUT
        if about["source"] == "video" or about.get("exhausted"):
            demos = min(demos, there)   # as many as there are: nothing makes more
        first, last = (0, HELD_OUT) if split == "valid" else (HELD_OUT, HELD_OUT + demos)
        names = [f"demo_{i}" for i in range(first, last)]
        lacks = [n for n in names if n not in f["data"]]
        if lacks:
            fail(f"{path} holds {there} videos, not {demos}, and lacks {lacks[0]}: python "
                 f"extract.py --suite {path.parent.name} --demos {demos}"
                 + " --source official" * (about["source"] == "official"))
        return [f["data"][n] for n in names]

    @property
    def views(self):
        return [c for c in CAMERAS if self.arrays[f"obs/{c}_rgb"]]

    def __len__(self):
        return int(self.start[-1])

    def gather(self, key, episode, t):
        """Rows of `key`: of episode (...) at t (...), beyond its ends those there -> (..., row)."""
        episode, t = np.broadcast_arrays(episode, t)
        t = np.clip(t, 0, self.length[episode] - 1)
        rows = [self.arrays[key][e][i] for e, i in zip(episode.ravel(), t.ravel())]
        return np.stack(rows).reshape(*episode.shape, *rows[0].shape)

    def sample_frames(self, step, batch, seed):
        """Random frames for one training step, all equally likely, the same for the same (seed,
        step) -> episode (B,), t (B,), rng."""
        rng = np.random.default_rng([seed, step])
        row = rng.integers(len(self), size=batch)
        episode = np.searchsorted(self.start, row, "right") - 1
        return episode, row - self.start[episode], rng

    def goal_of(self, episode, rng):
        """For each episode one whose last frame is the goal picture: a random other one of its task
        (PLEX) -> (B,).  differs: where each scene has a goal of its own (Meta-World), itself."""
        goal = episode.copy()
        for k in np.flatnonzero(~self.own_goal[episode]):
            others = np.flatnonzero(self.task == self.task[episode[k]])
            goal[k] = rng.choice(others[others != episode[k]] if len(others) > 1 else others)
        return goal

    def last_frames(self, episode):
        """The goal pictures that episodes (...) end with -> (..., H, W, 3) uint8."""
        return self.gather("obs/agentview_rgb", episode, self.length[episode] - 1)


def join(parts):
    """Episodes of several suites, such as of two bodies, as one: a task of each suite stays a task
    of its own, and what one of them lacks (a camera) the whole lacks."""
    alike = (("pictures of", lambda p: f"{p.size} px"),
             ("tracks of", lambda p: f"{p.arrays['tracks/agentview'][0].shape[1]} points"))
    whole = copy.copy(parts[0])
    for other in parts[1:]:
        for what, of in alike:
            if of(whole) != of(other):
                fail(f"{whole.suite} has {what} {of(whole)}, {other.suite} {of(other)}: make one "
                     "of them again in another --data folder")
    whole.tasks = [task for p in parts for task in p.tasks]
    whole.seconds = sum(p.seconds for p in parts)
    whole.objects = max((p.objects for p in parts), key=len)
    first = np.cumsum([0] + [len(p.tasks) for p in parts])
    whole.task = np.concatenate([p.task + k for p, k in zip(parts, first)])
    for name in ("length", "text", "own_goal"):
        setattr(whole, name, np.concatenate([getattr(p, name) for p in parts]))
    whole.arrays = {key: [one for p in parts for one in p.arrays[key]]
                    if all(p.arrays[key] for p in parts) else [] for key in whole.arrays}
    whole.start = np.concatenate([[0], np.cumsum(whole.length)])
    return whole
