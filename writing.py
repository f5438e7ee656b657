"""Data files are written: an episode each at first, then joined to one per task; all or nothing."""
import json
import os
import shutil

import h5py
import numpy as np

import sims
from episodes import HELD_OUT
from language import embed


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
            cameras=list(sims.CAMERAS),
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
