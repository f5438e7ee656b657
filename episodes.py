"""The reader of the data files (`extract.py` has their layout), and pictures of what is in them.

    episodes = Episodes("data", "libero_spatial", names, demos=20)
    episode, t, rng = episodes.draw(step, batch=32, seed=0)
    frames = episodes.gather("obs/agentview_rgb", episode, t)  # (32, H, W, 3)
"""
import copy
from pathlib import Path

import h5py
import numpy as np

import sims
from core import fail

HELD_OUT = 2  # validation episodes per task
ABOUT = ("source", "size", "render", "objects", "text_embedding")  # attributes that readers need
COLOURS = np.array([[0, 0, 0], [70, 130, 255], [255, 150, 0], [60, 220, 90], [230, 60, 200]],
                   np.uint8)


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
            *(f"{what}/{camera}" for what in ("tracks", "visible") for camera in sims.CAMERAS),
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


# --- pictures -------------------------------------------------------------------------------------

def draw_masks(image, masks, opacity=0.55):
    """image (H, W, 3) uint8 with masks (H, W) of 0..N laid over it in colours -> (H, W, 3)."""
    colour = COLOURS[masks % len(COLOURS)].astype(np.float32)
    alpha = opacity * (masks > 0)[..., None]
    return (image * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8)


def draw_tracks(image, tracks, visible, scale=1):
    """image (H, W, 3) uint8, tracks (T, K, 2) in [0, 1], visible (T, K) -> (scale H, scale W, 3).

    The points' ways from the first step on are drawn as tails, dark to bright, each point in a
    colour of its own; points hidden at first are left out.
    """
    import cv2
    from matplotlib import colormaps
    image = np.kron(image, np.ones((scale, scale, 1), np.uint8)).copy()
    # in eighths of a pixel
    places = np.rint(8 * tracks.astype(np.float32) * image.shape[0]).astype(np.int32)
    for k in np.flatnonzero(visible[0]):
        colour = 255 * np.array(colormaps["hsv"](k * 0.618 % 1)[:3])
        for t in range(len(tracks) - 1):
            shade = 0.35 + 0.65 * (t + 1) / len(tracks)
            here, there = places[t, k].tolist(), places[t + 1, k].tolist()
            cv2.line(image, here, there, (shade * colour).tolist(), 1, cv2.LINE_AA, 3)
    return image


def draw_heat(image, weights, opacity=0.6):
    """image (H, W, 3) uint8 with weights (h w,) of its patches laid over it, the largest red
    -> (H, W, 3)."""
    import cv2
    from matplotlib import colormaps
    side = round(len(weights) ** 0.5)
    heat = cv2.resize(weights.reshape(side, side) / weights.max(), image.shape[1::-1])  # (H, W)
    colour = 255 * colormaps["jet"](heat)[..., :3]
    return (image * (1 - opacity) + colour * opacity).clip(0, 255).astype(np.uint8)


def caption(image, text, height=14):
    """image (H, W, 3) uint8 -> (H + height, W, 3): a line of text above it."""
    import cv2
    bar = np.full((height, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, text, (2, height - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1,
                cv2.LINE_AA)
    return np.concatenate([bar, image])


def sheet(episodes, columns=6):
    """One row per task: its first video at `columns` times, masks drawn, and the wrist camera, 16
    steps of tracks drawn in both -> (., ., 3) uint8."""
    rows = []
    for k, name in enumerate(episodes.tasks):
        e = int(np.flatnonzero(episodes.task == k)[0])
        t = np.linspace(0, episodes.length[e] - 1, columns).astype(int)
        seen = episodes.gather("obs/agentview_rgb", e, t)  # (columns, H, W, 3)
        masks = episodes.gather("masks", e, t)
        # a video has no camera on the hand
        views = [c for c in sims.CAMERAS if episodes.arrays[f"obs/{c}_rgb"]]
        pictures = [[draw_masks(a, m) for a, m in zip(seen, masks)]]
        pictures += [episodes.gather(f"obs/{c}_rgb", e, t) for c in views[1:]]
        then = t[:, None] + np.arange(16)
        ways = {(what, c): episodes.gather(f"{what}/{c}", e, then)[:, :, ::4]
                for what in ("tracks", "visible") for c in views}  # each (columns, 16, K / 4, ...)
        pairs = [np.concatenate([draw_tracks(picture, ways["tracks", c][i], ways["visible", c][i])
                                 for c, picture in zip(views, both)], 1)
                 for i, both in enumerate(zip(*pictures))]
        title = f"{k} {name.replace('_', ' ')} ({episodes.length[e]} steps)"
        rows.append(caption(np.concatenate(pairs, 1), title))
    return np.concatenate(rows)
