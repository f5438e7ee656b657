"""How good is an annotator?  Its masks and tracks beside the simulator's truth on the same frames.

    python -m results.annotators --suite libero_spatial --tracks flow   # results/<suite>_grade.json

Masks by DAVIS' J and F (Perazzi et al., 2016), tracks by TAP-Vid's measures (Doersch et al., 2022),
queried where a point is first seen, in pixels of 256: delta_avg, the share of visible points within
1, 2, 4, 8, 16; occlusion accuracy; average Jaccard.  Beside them the trivial answers: the first
mask for ever, points that stay and are always seen.  T frames, H W pixels, N objects, K points.
"""

import json
import time
from dataclasses import dataclass

import numpy as np

import sims
from core.episodes import Episodes
from core.files import write
from core.flags import flag, parse
from demos.annotated import prompts
from demos.record import task_names
from extract import Annotator


def region(found, true):
    """J: found, true (H, W) bool -> intersection over union, 1 if both are empty."""
    union = (found | true).sum()
    return (found & true).sum() / union if union else 1.0


def boundary(found, true):
    """F: found, true (H, W) bool -> harmonic mean of the boundary's precision and recall."""
    import cv2
    reach = int(np.ceil(0.008 * np.hypot(*true.shape)))  # DAVIS' share of the diagonal
    disc = (np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1]) <= reach).astype(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    a, b = (mask & ~(cv2.erode(np.uint8(mask), cross) > 0) for mask in (found, true))
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision, recall = ((x & (cv2.dilate(np.uint8(y), disc) > 0)).sum() / x.sum()
                         for x, y in ((a, b), (b, a)))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def grade_masks(found, true, N):
    """found, true (T, H, W) of 0..N -> J and F, means over objects and frames after the first."""
    pairs = [(f == k, t == k) for k in range(1, N + 1) for f, t in zip(found[1:], true[1:])]
    return {"J": np.mean([region(*pair) for pair in pairs]),
            "F": np.mean([boundary(*pair) for pair in pairs])}


def grade_tracks(found, seen, true, visible, when):
    """Places (T, K, 2), visibility (T, K), the truth; frames after the queries at `when` (K,)."""
    later = np.arange(len(true))[:, None] > when  # (T, K)
    off = 256 * np.linalg.norm(found.astype(np.float64) - true, axis=-1)  # (T, K)
    shown, near = later & visible, off < np.reshape([1, 2, 4, 8, 16], (-1, 1, 1))  # (5, T, K)
    false = (later & seen & ~(visible & near)).sum((1, 2))  # (5,) hidden, or elsewhere
    jaccard = (shown & seen & near).sum((1, 2)) / np.maximum(1, shown.sum() + false)
    return {"delta_avg": (shown & near).sum((1, 2)).mean() / max(1, shown.sum()),
            "occlusion_accuracy": (seen == visible)[later].mean(),
            "average_jaccard": jaccard.mean()}


def queries(visible):
    """(T, K) bool -> the points seen at all before the last frame, and when first: (K',), (K',)."""
    when = visible.argmax(0)
    kept = np.flatnonzero(visible.any(0) & (when < len(visible) - 1))
    return kept, when[kept]


def grade(episodes, annotator, config, names):
    """Means over the episodes, {"masks": {annotator: {J, F}}, "tracks": {"all" | "moving": ...}},
    and counts.  names: {task: what its objects look like, the robot first}"""
    of_masks, of_tracks, points = {}, {"all": {}, "moving": {}}, 0
    for e, T in enumerate(episodes.length):
        task = episodes.tasks[episodes.task[e]]
        frames, true, place, visible = (episodes.gather(key, e, range(T)) for key in (
            "obs/agentview_rgb", "masks", "tracks/agentview", "visible/agentview"))
        kept, when = queries(visible)
        place, visible = place[:, kept].astype(np.float64), visible[:, kept]
        where = place[when, np.arange(len(when))]  # (K', 2)
        masks = {"first mask": np.broadcast_to(true[0], true.shape)}
        tracks = {"stay": (np.broadcast_to(where, place.shape), np.ones_like(visible))}
        if config.masks != "sim":
            masks[config.masks] = annotator.masks(frames, names[task], task)
        if config.tracks != "sim":
            tracks[config.tracks] = annotator.track(frames, when, where)
        for name, found in masks.items():
            of_masks.setdefault(name, []).append(grade_masks(found, true, len(names[task])))
        for which, k in (("all", when >= 0), ("moving", place.var(0).sum(1) > sims.camera.MOVES)):
            for name, (found, seen) in tracks.items() if k.any() else ():
                of_tracks[which].setdefault(name, []).append(grade_tracks(
                    found[:, k], seen[:, k], place[:, k], visible[:, k], when[k]))
        points += len(when)
    mean = lambda grades: {name: {key: round(float(np.mean([row[key] for row in rows])), 4)
                                  for key in rows[0]} for name, rows in grades.items()}
    return {"masks": mean(of_masks), "tracks": {k: mean(v) for k, v in of_tracks.items()},
            "episodes": len(episodes.length), "points": points, "frames": len(episodes)}


@dataclass
class Config:
    suite: str = flag("libero_spatial", "suite of which there is data")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    masks: str = flag("sim", "whose masks; sim: nobody's", choices=["sim", "sam"])
    tracks: str = flag("sim", "whose tracks; sim: nobody's", choices=["sim", "flow", "cotracker"])
    objects: str = flag("", "as of extract.py, like the next three")
    weights: str = flag("", "as of extract.py")
    download: bool = flag(False, "as of extract.py")
    data: str = flag("data", "folder of the data files")
    device: str | None = flag(None, "of the networks")


def main(argv=None):
    """Grades on the first video of each task."""
    config, begin = parse(Config, "Annotators beside the truth.", argv), time.time()
    sims.tasks(config.suite)  # only a simulator's suite holds the truth
    names = {task: prompts(sims.describe(config.suite, task)[1], config.objects)
             for task in task_names(config.suite, config.tasks, config.data)}
    annotator, episodes = Annotator(config), Episodes(config.data, config.suite, list(names), 1)
    about = {"suite": config.suite, "size": episodes.size, "tasks": len(names),
             "command": f"python -m results.annotators --suite {config.suite} --masks "
             f"{config.masks} --tracks {config.tracks}", "versions": sims.versions()}
    about |= grade(episodes, annotator, config, names) | {"seconds": round(time.time() - begin, 1)}
    print(text := json.dumps(about, indent=1))
    write(f"results/{config.suite}_grade.json", text + "\n")


if __name__ == "__main__":
    main()
