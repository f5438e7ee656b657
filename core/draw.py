"""Pictures of masks, tracks and attention; captions; films. H W pixels, T steps, K points."""

from pathlib import Path

import numpy as np

from core.files import write

COLOURS = np.array([[0, 0, 0], [70, 130, 255], [255, 150, 0], [60, 220, 90], [230, 60, 200]],
                   np.uint8)

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
        views = episodes.views
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


def row(views, scale=3, height=16):
    """[(caption, (H, W, 3) uint8)] -> the pictures side by side, enlarged, with their captions."""
    large = [np.kron(v, np.ones((scale, scale, 1), np.uint8)) for _, v in views]
    return np.concatenate([caption(v, name, height) for (name, _), v in zip(views, large)], 1)


def save_picture(path, picture):
    """(H, W, 3) uint8 -> png."""
    import imageio.v3 as iio
    write(path, iio.imwrite("<bytes>", picture, extension=".png"))


def write_film(path, pictures, fps=5):
    """Pictures (list of (H, W, 3) uint8) -> mp4, `fps` per second; and a still of four, .png."""
    import imageio.v2 as iio
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the codec wants even numbers
    height, width = pictures[0].shape[0] // 2 * 2, pictures[0].shape[1] // 2 * 2
    with iio.get_writer(path, fps=fps, macro_block_size=2, quality=7) as film:
        for picture in pictures:
            film.append_data(picture[:height, :width])
    chosen = np.linspace(0, len(pictures) - 1, min(4, len(pictures))).astype(int)
    save_picture(path.with_suffix(".png"), np.concatenate([pictures[k] for k in chosen]))
