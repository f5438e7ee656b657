"""The reader of the data files (`extract.py` has their layout), and pictures of what is in them.

    episodes = Episodes("data", "libero_spatial", names, demos=20)
    episode, t, rng = episodes.draw(step, batch=32, seed=0)
    frames = episodes.gather("obs/agentview_rgb", episode, t)  # (32, H, W, 3)
"""

import copy
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np

import sims
from core.files import fail
from demos.language import embed
from sims.camera import CAMERAS

HELD_OUT = 2  # validation episodes per task
ABOUT = ("source", "size", "render", "objects", "text_embedding")  # attributes that readers need


def open_data(path):
    """Opens a data file for reading; one line that names the way out if it is missing or broken."""
    path = Path(path)
    if not path.exists():
        fail(f"no data file {path}: make it with python extract.py --suite {path.parent.name}")
    try:
        f = h5py.File(path, "r")
        if not isinstance(f.get("data"), h5py.Group) or not len(f["data"]):
            raise OSError("no episodes")
        first = f["data"].get("demo_0", {})
        lacks = [name for name in ABOUT if name not in f["data"].attrs]
        lacks += [name for name in ("masks", "tracks") if name not in first]
        if lacks:
            fail(f"{path} lacks {', '.join(lacks)}, so this extract.py has not made it: "
                 "choose another --data folder or delete it")
        return f
    except OSError as error:
        fail(f"{path} is not a whole data file ({str(error)[:60]}): delete it and run "
             f"python extract.py --suite {path.parent.name}")


def source_of(path):
    """What a data file's episodes are: scripted, official or video; "" if there is no file."""
    if not path.exists():
        return ""
    with open_data(path) as f:
        return f["data"].attrs["source"]


def mapped(dataset, whole):
    """A dataset as an array: what lies contiguous in the file is a view of `whole`, the file mapped
    into memory as bytes (one map per file: the kernel limits their number, and each costs memory);
    the rest is read."""
    offset = dataset.id.get_offset()
    if offset is None or not dataset.nbytes:
        return dataset[:]
    return whole[offset:offset + dataset.nbytes].view(dataset.dtype).reshape(dataset.shape)


class Episodes:
    """Read-only episodes of some tasks of a suite.

    split 'train' -> the first `demos` videos per task, 'valid' -> the held-out ones.
    length (E,) steps, task (E,) index into `tasks`, text (tasks, D) their instructions' embeddings,
    seconds of one core that the episodes took to make; pictures stay on disk until gathered.
    """
    KEYS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks", "actions",
            "obs/ee_states", "obs/joint_states", "obs/gripper_states",
            *(f"{what}/{camera}" for what in ("tracks", "visible") for camera in CAMERAS),
            "hand")
    OF_VIDEOS = ("obs/agentview_rgb", "masks", "tracks/agentview", "visible/agentview", "hand")

    def __init__(self, data, suite, tasks, demos, split="train"):
        self.suite, self.tasks, self.seconds, wanted = suite, tasks, 0.0, demos
        self.arrays, length, task, text = {key: [] for key in self.KEYS}, [], [], []
        for k, name in enumerate(tasks):
            path = Path(data) / suite / f"{name}.hdf5"
            with open_data(path) as f:
                whole = np.memmap(path, np.uint8, "r")
                about, demos = f["data"].attrs, wanted
                video = about["source"] == "video"
                if video or about.get("exhausted"):  # as many as there are: nothing makes more
                    demos = min(wanted, len(f["data"]) - HELD_OUT)
                names = [f"demo_{i}" for i in (range(HELD_OUT) if split == "valid" else
                                               range(HELD_OUT, HELD_OUT + demos))]
                if any(n not in f["data"] for n in names):
                    fail(f"{path} holds {len(f['data']) - HELD_OUT} videos, not {demos}: "
                         f"python extract.py --suite {suite} --demos {demos}"
                         + " --source official" * (about["source"] == "official"))
                for n in names:
                    demo = f["data"][n]
                    # a video has one camera and no robot
                    keys = self.OF_VIDEOS if video else self.KEYS
                    lacks = [key for key in keys if key not in demo]
                    if lacks or "num_samples" not in demo.attrs:
                        fail(f"{path} lacks data/{n}/{(lacks or ['num_samples'])[0]}: delete it "
                             f"and run python extract.py --suite {suite}")
                    for key in keys:
                        self.arrays[key].append(mapped(demo[key], whole))
                    length.append(int(demo.attrs["num_samples"]))
                    self.seconds += float(demo.attrs.get("seconds", 0))
                    task.append(k)
                text.append(about["text_embedding"])
                self.objects = list(about["objects"])
                self.size, self.render = int(about["size"]), about["render"]
        self.length, self.task, self.text = np.array(length), np.array(task), np.stack(text)
        # in Meta-World each scene has a goal of its own
        self.own_goal = np.full(len(self.length), sims.is_metaworld(suite))
        # (E + 1,) rows before each episode
        self.start = np.concatenate([[0], np.cumsum(self.length)])

    def __len__(self):
        return int(self.start[-1])

    def gather(self, key, episode, t):
        """Rows of `key`.  episode (...), t (...) integers, t beyond an episode's ends taken there
        -> (..., row)."""
        episode, t = np.broadcast_arrays(episode, t)
        t = np.clip(t, 0, self.length[episode] - 1)
        rows = [self.arrays[key][e][i] for e, i in zip(episode.ravel(), t.ravel())]
        return np.stack(rows).reshape(*episode.shape, *rows[0].shape)

    def draw(self, step, batch, seed):
        """Random frames for one training step, the same for the same (seed, step) -> episode (B,),
        t (B,), rng."""
        rng = np.random.default_rng([seed, step])
        row = rng.integers(len(self), size=batch)
        episode = np.searchsorted(self.start, row, "right") - 1
        return episode, row - self.start[episode], rng

    def goal_of(self, episode, rng):
        """For each episode one whose last frame is the goal image: a random other one of its task
        (PLEX) -> (B,).

        differs: in Meta-World the episode itself, since each scene has a goal of its own.
        """
        goal = episode.copy()
        for k, e in enumerate(episode):
            if self.own_goal[e]:
                continue
            others = np.flatnonzero(self.task == self.task[e])
            others = others[others != e] if len(others) > 1 else others
            goal[k] = rng.choice(others)
        return goal


def join(parts):
    """Episodes of several suites, such as of two bodies, as one: a task of each suite stays a task
    of its own, and what one of them lacks (a camera) the whole lacks."""
    alike = (("pictures of", lambda p: f"{p.size} px"),
             ("sentences of", lambda p: f"{p.text.shape[1]} numbers (--text)"),
             ("tracks of", lambda p: f"{p.arrays['tracks/agentview'][0].shape[1]} points"))
    whole = copy.copy(parts[0])
    for other in parts[1:]:
        for what, of in alike:
            if of(whole) != of(other):
                fail(f"{whole.suite} has {what} {of(whole)}, {other.suite} {of(other)}: make one "
                     "of them again in another --data folder")
    whole.tasks = [task for p in parts for task in p.tasks]
    whole.seconds = sum(p.seconds for p in parts)
    whole.objects = min((p.objects for p in parts), key=len)
    first = np.cumsum([0] + [len(p.tasks) for p in parts])
    whole.task = np.concatenate([p.task + k for p, k in zip(parts, first)])
    for name in ("length", "text", "own_goal"):
        setattr(whole, name, np.concatenate([getattr(p, name) for p in parts]))
    whole.arrays = {key: [one for p in parts for one in p.arrays[key]]
                    if all(p.arrays[key] for p in parts) else [] for key in whole.arrays}
    whole.start = np.concatenate([[0], np.cumsum(whole.length)])
    return whole


def write_episode(path, episode, **attrs):
    """Writes one episode to a file of its own: a `.part` is renamed when it is whole."""
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as f:
        f.attrs.update(num_samples=len(episode["actions"]), **attrs)
        for key, value in episode.items():
            where = f"obs/{key}" if key.endswith(("_rgb", "_states")) else key
            f.create_dataset(where, data=value.astype(np.float32) if key == "actions" else value)
        f["dones"] = np.append(np.zeros(len(episode["actions"]) - 1, np.uint8), np.uint8(1))
    os.replace(part, path)


def assemble(path, parts, suite, task, size, render, text="minilm", source="scripted",
             exhausted=False):
    """Joins the episodes' files into the task's file and deletes them.

    exhausted  whether its source has no more episodes
    """
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
        info = {"env_name": name, "type": 1, "env_kwargs": {"suite": suite, "task": task},
                "env_version": "1.4.0"}
        data.attrs.update(
            env=suite, env_args=json.dumps(info), total=total, task=task, size=size,
            source=source, exhausted=exhausted, language_instruction=language,
            text_embedding=embed(language, text), text=text, objects=objects,
            cameras=list(CAMERAS),
            problem_info=json.dumps({"language_instruction": language}), render=render,
            mask_source="sim", track_source="sim", versions=json.dumps(sims.versions()))
        hold_out(f, names)
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


def write_videos(path, made, size, objects, masks, tracks, text):
    """Episodes of annotated videos as one data file.

    made           arrays and seconds of each, see `films.annotate_video`
    objects        their names, the robot first
    masks, tracks  what annotated them
    text           one of `language.TEXTS`
    """
    language = path.stem.replace("_", " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path.with_suffix(".tmp"), "w") as f:
        for i, episode in enumerate(made):
            demo = f.create_group(f"data/demo_{i}")
            demo.attrs.update(num_samples=len(episode["masks"]), seconds=episode.pop("seconds"))
            for key, value in episode.items():
                demo[key] = value
        f["data"].attrs.update(
            total=sum(len(e["masks"]) for e in made), task=path.stem, size=size, source="video",
            language_instruction=language, text_embedding=embed(language, text), text=text,
            objects=objects, cameras=["agentview"], render="video", mask_source=masks,
            track_source=tracks, problem_info=json.dumps({"language_instruction": language}))
        hold_out(f, [f"demo_{i}" for i in range(len(made))])
    os.replace(path.with_suffix(".tmp"), path)


def hold_out(f, names):
    """Robomimic's filter keys: the first demos are for validation, the rest for training."""
    f["mask/valid"] = np.array(names[:HELD_OUT], "S")
    f["mask/train"] = np.array(names[HELD_OUT:], "S")
