"""How good is an annotator?  Its masks and tracks beside the simulator's truth on the same frames.

    python extract.py --suite libero_spatial --grade --tracks flow  # -> results/<suite>_grade.json

Masks by DAVIS' measures (Perazzi et al., 2016): J is the intersection over union, F the harmonic
mean of precision and recall of the boundary, within 0.8 % of the picture's diagonal; mean over
frames and objects.  Tracks by TAP-Vid's (Doersch et al., 2022), queried at the first frame in which
a point is seen, on places in pixels of 256: delta_avg, the share of visible points within 1, 2, 4,
8, 16 pixels; occlusion accuracy; average Jaccard.  Beside them the trivial answers: the first mask
for ever, points that stay and are always seen.
"""

import json
import time
from pathlib import Path

import numpy as np

import extract
import sims
from core.episodes import Episodes
from core.files import fail, write
from demos import record

WITHIN = (1, 2, 4, 8, 16)  # pixels of 256


def region(found, true):
    """J: found, true (H, W) bool -> intersection over union, 1 if both are empty."""
    union = (found | true).sum()
    return (found & true).sum() / union if union else 1.0


def edge(mask):
    """(H, W) bool -> the mask's pixels that touch its outside, the picture's border not counted."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def boundary(found, true, tolerance=0.008):
    """F: found, true (H, W) bool -> harmonic mean of the boundary's precision and recall."""
    import cv2
    reach = max(1, int(np.ceil(tolerance * np.hypot(*true.shape))))
    grid = np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1])
    disc = (grid <= reach).astype(np.uint8)
    a, b = edge(found), edge(true)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    near = lambda x: cv2.dilate(x.astype(np.uint8), disc) > 0
    precision, recall = (a & near(b)).sum() / a.sum(), (b & near(a)).sum() / b.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def grade_masks(found, true, objects):
    """found, true (T, H, W) of 0..N, numbers of the objects that count -> J, F.

    Both are means over the frames after the first.
    """
    pairs = [(f == k, t == k) for k in objects for f, t in zip(found[1:], true[1:])]
    return tuple(float(np.mean([measure(*p) for p in pairs])) for measure in (region, boundary))


def grade_tracks(found, seen, true, visible, when):
    """Places (T, K, 2) in [0, 1] and visibility (T, K) beside the truth.

    Points are queried at frames `when` (K,); later ones count.
    -> delta_avg, occlusion accuracy, average Jaccard, each in [0, 1]
    """
    later = np.arange(len(true))[:, None] > when  # (T, K)
    off = 256 * np.linalg.norm(found.astype(np.float64) - true, axis=-1)  # (T, K)
    shown, delta, jaccard = later & visible, [], []
    for pixels in WITHIN:
        near = off < pixels
        hit = (shown & seen & near).sum()
        # a point said to be seen that is hidden, or is far from there, is one too many
        extra = (later & seen & ~(visible & near)).sum()
        delta.append((shown & near).sum() / max(1, shown.sum()))
        jaccard.append(hit / max(1, shown.sum() + extra))
    return float(np.mean(delta)), float((seen == visible)[later].mean()), float(np.mean(jaccard))


def queries(visible):
    """(T, K) bool -> the points seen at all before the last frame, and when first: (K',), (K',)."""
    when = visible.argmax(0)
    kept = np.flatnonzero(visible.any(0) & (when < len(visible) - 1))
    return kept, when[kept]


def grade(episodes, tracks, masks, names, weights, download, device, threshold):
    """Mean over the episodes of each measure.

    episodes  an Episodes
    tracks    'flow', 'cotracker', or 'sim': not graded
    masks     'sam', or 'sim': not graded
    -> {"masks": {annotator: {"J", "F"}}, "tracks": {"all" | "moving": {annotator: {...}}}}, counts
    """
    rows, number = {}, {"episodes": len(episodes.length), "points": 0, "frames": 0}
    add = lambda key, values: rows.setdefault(key, []).append(values)
    for e, T in enumerate(episodes.length):
        t = np.arange(T)
        frames, true = episodes.gather("obs/agentview_rgb", e, t), episodes.gather("masks", e, t)
        there = range(1, 1 + len(episodes.objects))
        add(("masks", "first mask"), grade_masks(np.broadcast_to(true[0], true.shape), true, there))
        if masks == "sam":
            mask = extract.video_masks(frames, names, weights, download, device, threshold)
            add(("masks", "sam"), grade_masks(mask, true, there))
        place, visible = (episodes.gather(f"{what}/agentview", e, t)
                          for what in ("tracks", "visible"))
        kept, when = queries(visible)
        place, visible = place[:, kept].astype(np.float64), visible[:, kept]
        where = place[when, np.arange(len(when))]  # (K, 2)
        moving = place.var(0).sum(1) > 10 / 128 ** 2  # as ATM
        said = {"stay": (np.broadcast_to(where, place.shape), np.ones_like(visible))}
        if tracks == "flow":
            said["flow"] = extract.flow_tracks(frames, when, where)
        if tracks == "cotracker":
            said["cotracker"] = extract.cotracker_tracks(frames, when, where, weights, download,
                                                          device)
        for name, (found, seen) in said.items():
            for which, chosen in (("all", slice(None)), ("moving", moving)):
                if which == "all" or moving.any():
                    beside = (a[:, chosen] for a in (found, seen, place, visible))
                    add(("tracks", which, name), grade_tracks(*beside, when[chosen]))
        number["points"] += len(when)
        number["frames"] += int(T)
    mean = lambda key, what: dict(zip(what, np.mean(rows[key], 0).round(4).tolist()))
    found = {"masks": {}, "tracks": {"all": {}, "moving": {}}}
    for key in rows:
        if key[0] == "masks":
            found["masks"][key[1]] = mean(key, ("J", "F"))
        else:
            measures = "delta_avg", "occlusion_accuracy", "average_jaccard"
            found["tracks"][key[1]][key[2]] = mean(key, measures)
    return found | number


def table(found):
    """The grades as lines of text."""
    lines = [f"{found['episodes']} episodes, {found['frames']} frames, {found['points']} points",
             "masks            J     F"]
    lines += [f"  {name:12s} {s['J']:5.3f} {s['F']:5.3f}" for name, s in found["masks"].items()]
    lines.append("tracks        delta_avg  occlusion accuracy  average Jaccard")
    for which, rows in found["tracks"].items():
        lines.append(f"  {which} points")
        lines += [f"    {n:10s} {s['delta_avg']:6.3f} {s['occlusion_accuracy']:16.3f} "
                  f"{s['average_jaccard']:18.3f}" for n, s in rows.items()]
    return "\n".join(lines)


def grade_annotators(config, episodes):
    """--grade, with `extract.py`'s flags: the first video of each task and the trivial answers."""
    if record.is_video(Path(config.data) / config.suite / f"{episodes.tasks[0]}.hdf5"):
        fail(f"{config.suite} holds videos without truth: grade on a simulator's suite, "
                  "such as --suite libero_spatial")
    names = [word.strip() for word in config.objects.split(".") if word.strip()]
    if config.masks == "sam" and len(names) != len(episodes.objects):
        fail(f"--objects names {len(names)} objects, the data has {len(episodes.objects)}: "
                  f"say what {', '.join(episodes.objects)} look like, "
                  'such as --objects "robot arm. black bowl. plate.", or give --masks sim')
    begin, episodes = time.time(), Episodes(config.data, config.suite, episodes.tasks, 1)
    found = grade(episodes, config.tracks, config.masks, names, config.weights, config.download,
                  config.device, config.threshold)
    command = (f"python extract.py --suite {config.suite} --grade --masks {config.masks} "
               f"--tracks {config.tracks}")
    about = {"suite": config.suite, "size": episodes.size, "tasks": len(episodes.tasks),
             "seconds": round(time.time() - begin, 1), "command": command,
             "versions": sims.versions()}
    print(table(found))
    path = Path("results") / f"{config.suite}_grade.json"
    path.parent.mkdir(exist_ok=True)
    write(path, json.dumps(about | found, indent=1) + "\n")
    print(f"grades: {path}")
