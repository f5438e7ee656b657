"""Data files whose masks or tracks are networks': of a recorded suite, or of films.

config is extract.py's, `annotator` its Annotator: annotator(config) loads the networks and returns
what makes the arrays of one video.
"""

import json
import re
import time
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

import sims
from core.episodes import CAMERAS, HELD_OUT, assemble, open_data, write_episode
from core.files import fail
from demos import films
from demos.language import embed
from demos.record import make_files

WORK = 384  # pixels: films are annotated at this size or at --size, the larger


def annotated_suite(config):
    """The suite of these masks and tracks: libero_spatial; of networks: libero_spatial_sam_flow."""
    return "_".join([config.suite, *(m for m in (config.masks, config.tracks) if m != "sim")])


def prompts(objects, asked):
    """What the objects of a suite are looked for by: --objects, or their names in words, such as
    akita black bowl for akita_black_bowl_1.  No objects: those of a film."""
    names = [word.strip().lower() for word in re.split("[.,;]", asked) if word.strip()]
    if not names and not objects:
        fail('--video needs --objects, such as --objects "robot arm. black bowl. plate."')
    if names and objects and len(names) != len(objects):
        fail(f"--objects names {len(names)} objects, the data has {len(objects)}: say what "
             f"{', '.join(objects)} look like, such as --objects \"robot arm. black bowl. plate.\"")
    return names or ["robot arm"] + [" ".join(word for word in name.split("_")
                                              if not word.isdigit()) for name in objects[1:]]


def annotate_suite(config, names, annotator):
    """The recorded episodes of some tasks once more, as suite `annotated_suite`: masks and tracks
    are networks', all else is kept.  Episodes that are there stay.  names: {task: what its objects
    look like, the robot first}."""
    files = {}
    for task in names:
        source, path = (Path(config.data) / suite / f"{task}.hdf5"
                        for suite in (config.suite, annotated_suite(config)))
        with open_data(source) as f:
            demos, about = f["data"], dict(f["data"].attrs)
            wanted = min(len(demos), HELD_OUT + config.demos)
            if path.exists():
                with open_data(path) as old:
                    check_same(path, old["data/demo_0"], demos["demo_0"], names[task])
                    if len(old["data"]) >= wanted:
                        continue
            for part in path.with_suffix("").glob("demo_*.hdf5"):
                with h5py.File(part) as old:
                    check_same(part, old, demos[part.stem], names[task])
        about |= {"mask_source": config.masks, "track_source": config.tracks}
        files[path] = (annotator, config, source, names[task]), wanted, about.copy
    make_files("annotated", annotate_episodes, files, config.workers, opengl=False)


def check_same(path, old, new, names):
    """Fails if an episode was annotated by other names, or is of another recording: then the suite
    was recorded anew meanwhile."""
    a, b = (demo["obs/agentview_rgb"] for demo in (old, new))
    if a.shape != b.shape or (a[-1] != b[-1]).any():
        fail(f"{path} was made from other pictures: delete it or choose another --data folder")
    if (there := list(old.attrs["prompts"])) != names:
        fail(f"{path} was made with --objects '{'. '.join(there)}.': give the same, choose another "
             "--data folder or delete it")


def annotate_episodes(job):
    """Worker: some episodes of one task, a file each; yields each one's number when it is made."""
    annotator, config, source, names, parts, indices = job
    annotate = annotator(config)
    with open_data(source) as f:
        for i in indices:
            begin, demo, kept = time.time(), f[f"data/demo_{i}"], {}
            demo.visititems(lambda key, item: kept.update(
                {key: item[()]} if isinstance(item, h5py.Dataset) else {}))
            kept.pop("dones", None)  # write_episode adds it
            views = {camera: kept[f"obs/{camera}_rgb"] for camera in CAMERAS}
            made = annotate(views, names, i, f"{source.stem}, demo_{i}")
            about = {key: value for key, value in demo.attrs.items() if key != "num_samples"}
            about["seconds"] = about.get("seconds", 0) + time.time() - begin
            write_episode(parts / f"demo_{i}.hdf5", kept | made, **about | {"prompts": names})
            yield i


def film_path(config):
    """The data file that --video makes; fails on flags that make none."""
    if "sim" in (config.masks, config.tracks):
        fail("a film has no simulator: --masks sam, --tracks cotracker or flow")
    if (not config.suite.strip(".") or Path(config.suite).name != config.suite
            or sims.simulator_of(config.suite).tasks(config.suite)):
        fail(f"--suite {config.suite}: give the films a name of their own, not a simulator's and "
             "without /, such as --suite my_videos")
    path = Path(config.data) / config.suite / f"{Path(config.video).stem.replace(' ', '_')}.hdf5"
    if path.exists():
        fail(f"{path} exists: delete it, or choose another --suite or --data folder")
    return path


def check_alike(path, there, about):
    """Fails if the films of one suite differ in size, objects or what annotates them."""
    for key, value in about.items():
        was = there[key] if np.ndim(there[key]) == 0 else [str(name) for name in there[key]]
        if was != value:
            fail(f"{path} has {key} {was}, and now it would be {value}: give the same, another "
                 "--suite, or delete it")


def annotate_films(config, path, names, annotator):
    """--video -> the data file `path`, without actions.  Films that an interrupted run has done are
    kept.  names: what the objects look like, the robot first."""
    paths, size = films.episodes_of(config.video), config.size
    lengths = [films.count_frames(film) for film in paths]  # each can be read to its end
    least = films.SHORTEST * (HELD_OUT + 1 if len(paths) == 1 else 1)
    for film, length in zip(paths, lengths):
        if length < least:
            fail(f"{film} has {length} frames, and {least} are needed: give a longer one")
    about = {"size": size, "objects": names, "mask_source": config.masks,
             "track_source": config.tracks}
    there = [*path.parent.glob("*.hdf5")][:1]
    if there:   # the films of a suite are alike
        with open_data(there[0]) as f:
            check_alike(there[0], f["data"].attrs, about)
    parts, language, annotate, number = path.with_suffix(""), path.stem.replace("_", " "), None, 0
    pieces = min(films.PIECES, lengths[0] // films.SHORTEST) if len(paths) == 1 else 1
    for film, length in zip(paths, lengths):
        frames, before = films.frames_of(film, max(size, WORK)), []
        of = about | {"film": Path(film).name}      # another film may have these numbers by now
        for window in films.windows_of(length, pieces):
            files = [parts / f"demo_{number + k}.hdf5" for k in range(len(window))]
            number, begin = number + len(window), time.time()
            # from a little before: at its start, too, objects and points have a past (a few points
            # are of frames that are then cut off)
            pictures = np.stack([*before, *islice(frames, sum(window))])
            extra, before = len(before), pictures[-films.OVERLAP:].copy()
            if all(file.exists() for file in files):
                with h5py.File(files[0]) as one:
                    check_alike(files[0], one.attrs, of)
                continue
            annotate = annotate or annotator(config)
            arrays = annotate({"agentview": pictures}, names, number, film)
            episode = {k: v[extra:] for k, v in reduced(pictures, arrays, size).items()}
            parts.mkdir(parents=True, exist_ok=True)
            for file, stop, count in zip(files, np.cumsum(window), window):
                write_episode(file, {k: v[stop - count:stop] for k, v in episode.items()},
                              seconds=(time.time() - begin) / len(window), **of)
            print(f"{film}: {sum(window)} frames, " + ", ".join(
                f"{name} in {(episode['masks'] == k).any((1, 2)).mean():.0%}"
                for k, name in enumerate(names, 1)))
    assemble(path, parts, about | {
        "env": config.suite, "goal_varies": False, "task": path.stem, "source": "video",
        "render": "video", "language_instruction": language,
        "problem_info": json.dumps({"language_instruction": language}),
        "text_embedding": embed(language),
        "cameras": CAMERAS[:1]})


def reduced(frames, arrays, size):
    """Frames (T, H, W, 3) and what annotates them -> arrays of an episode, pictures at `size`."""
    import cv2
    small = lambda pictures, how: np.stack(
        [cv2.resize(p, (size, size), interpolation=how) for p in pictures])
    masks = small(arrays["masks"], cv2.INTER_NEAREST)
    # differs: the middle of the robot's mask, as nothing says where its hand is
    hand = np.stack([(np.argwhere(m == 1).mean(0)[::-1] + 0.5) / size if (m == 1).any()
                     else [-9, -9] for m in masks])
    return arrays | {"obs/agentview_rgb": small(frames, cv2.INTER_AREA), "masks": masks,
                     "hand": hand.astype(np.float16)}
