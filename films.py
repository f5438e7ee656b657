"""Videos without a simulator: annotated by `annotate.py`, written as a data file without actions.

    python extract.py --video clip.mp4 --objects "robot arm. black bowl. plate." --suite my_videos
"""
import time
from pathlib import Path

import numpy as np

import annotate
import sims
import tables
from core import fail
from episodes import HELD_OUT, source_of
from writing import write_videos

PIECES, SHORTEST = 10, 8  # a single film is cut into so many episodes of at least so many frames
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def is_video(path):
    """Whether a data file holds annotated videos: no actions, no states, one camera."""
    return source_of(path) == "video"


def choose_tasks(suite, chosen, data):
    """As sims.choose_tasks, without those that the expert mostly fails unless they are named; and
    for a folder of annotated videos the names of its files."""
    files = sorted((Path(data) / suite).glob("*.hdf5"))
    if suite in sims.SUITES or suite in sims.METAWORLD or not files or not is_video(files[0]):
        poor = {} if chosen else tables.unreliable(suite)
        # of those there may be other demonstrations
        poor = {task: rate for task, rate in poor.items()
                if source_of(Path(data) / suite / f"{task}.hdf5") != "official"}
        for task, rate in poor.items():
            print(f"skipped, as the expert solves {100 * rate:.0f} % of its scenes: {task}")
        return [task for task in sims.choose_tasks(suite, chosen) if task not in poor]
    names, picked = [p.stem for p in files], [w.strip() for w in chosen.split(",") if w.strip()]
    picked = [names[int(w)] if w.isdigit() and int(w) < len(names) else w for w in picked]
    for word in picked:
        if word not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} "
                 f"or a name such as {names[0]}")
    return picked or names


def episodes_of(path):
    """A folder of films -> those, an episode each; else the path itself, to be cut into pieces."""
    path, films = Path(path), []
    if path.is_dir():
        films = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in FILMS)
    if films and len(films) <= HELD_OUT:
        fail(f"{path} holds {len(films)} films: {HELD_OUT} are held out, "
             f"so give {HELD_OUT + 1} or more, or one film itself")
    return films or [path]


def annotate_video(config):
    """--video: all is computed first, then the file is written: nothing is left of a failed run.

    config  of `extract.py`
    """
    objects = [word.strip() for word in config.objects.split(".") if word.strip()]
    path = target(config, objects)
    films, made = episodes_of(config.video), []
    for film in films:
        begin, frames = time.time(), annotate.read_video(film, max(config.size, annotate.WORK))
        if len(films) == 1 and len(frames) < (HELD_OUT + 1) * SHORTEST:
            fail(f"{film} has {len(frames)} frames, which make no {HELD_OUT + 1} episodes of "
                 f"{SHORTEST}: give a longer one")
        rest = config.weights, config.download, config.device
        masks = annotate.video_masks(frames, objects, *rest, config.threshold)  # (T, H, W)
        tracks, visible = annotate.video_tracks(frames, config.tracks, 256, 0, *rest)
        episode = reduced(frames, masks, tracks, visible, config.size)
        pieces = min(PIECES, len(frames) // SHORTEST) if len(films) == 1 else 1
        seconds = (time.time() - begin) / pieces
        for rows in np.array_split(np.arange(len(frames)), pieces):
            made.append({k: v[rows] for k, v in episode.items()} | {"seconds": seconds})
        print(f"{film}: {len(frames)} frames, " + ", ".join(
            f"{name} in {(masks == k).any((1, 2)).mean():.0%}"
            for k, name in enumerate(objects, 1)))
    write_videos(path, made, config.size, objects, config.masks, config.tracks, config.text)
    print(f"videos: {len(made)} episodes -> {path}   "
          f"next: python mask_planner.py --suite {config.suite}")


def target(config, objects):
    """The file to be made; fails on flags that make none."""
    if not objects:
        fail('--video needs --objects, such as --objects "robot arm. black bowl. plate."')
    if "sim" in (config.masks, config.tracks):
        fail("a video has no simulator: --masks sam, --tracks cotracker or flow")
    if config.suite in sims.SUITES or config.suite in sims.METAWORLD:
        fail(f"--suite {config.suite} is a simulator's: give the videos a name of their own, "
             "such as --suite my_videos")
    name = Path(config.video).stem.replace(" ", "_")
    path = Path(config.data) / config.suite / f"{name}.hdf5"
    if path.exists():
        fail(f"{path} exists: delete it, or choose another --suite or --data folder")
    return path


def reduced(frames, masks, tracks, visible, size):
    """Frames (T, H, W, 3) and what annotates them -> arrays of an episode, pictures at `size`."""
    import cv2
    small = lambda pictures, how: np.stack(
        [cv2.resize(p, (size, size), interpolation=how) for p in pictures])
    # differs: the middle of the robot's mask, as nothing says where its hand is
    hand = np.stack([np.argwhere(m == 1).mean(0)[::-1] / len(m) if (m == 1).any() else [-9, -9]
                     for m in masks])
    return {"obs/agentview_rgb": small(frames, cv2.INTER_AREA),
            "masks": small(masks, cv2.INTER_NEAREST),
            "tracks/agentview": tracks.clip(-9, 9).astype(np.float16),
            "visible/agentview": visible, "hand": hand.astype(np.float16)}
