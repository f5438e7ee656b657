"""Pictures of masks, tracks and key points; captions; films. H W pixels, T steps, K points."""

from pathlib import Path

import numpy as np

from core.files import one_line, write

COLOURS = np.array([[0, 0, 0], [70, 130, 255], [255, 150, 0], [60, 220, 90], [230, 60, 200]],
                   np.uint8)


def draw_masks(image, masks):
    """images (..., H, W, 3) uint8, masks (..., h, w) of 0..N, of all their pixels or of each k-th,
    laid over them in colours -> (..., H, W, 3)."""
    H, W = image.shape[-3:-1]
    k = -(-H // masks.shape[-2])
    masks = masks.repeat(k, -2).repeat(k, -1)[..., :H, :W]
    colour, alpha = COLOURS[masks % len(COLOURS)], 0.55 * (masks > 0)[..., None]
    return (image * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8)


def draw_tracks(image, tracks, visible, scale=1):
    """image (H, W, 3) uint8, tracks (T, K, 2) in [0, 1], visible (T, K) -> (scale H, scale W, 3):
    the points' ways as tails, dark to bright, without the points that are hidden at first."""
    import cv2
    from matplotlib import colormaps
    image = np.kron(image, np.ones((scale, scale, 1), np.uint8)).copy()
    places = np.rint(8 * tracks.astype(np.float32) * len(image)).astype(int)   # in 1/8 of a pixel
    for k in np.flatnonzero(visible[0]):
        colour = 255 * np.array(colormaps["hsv"](k * 0.618 % 1)[:3])
        for t in range(len(tracks) - 1):
            shade = 0.35 + 0.65 * (t + 1) / len(tracks)
            here, there = places[t, k].tolist(), places[t + 1, k].tolist()
            cv2.line(image, here, there, (shade * colour).tolist(), 1, cv2.LINE_AA, 3)
    return image


def draw_heat(image, weights):
    """image (H, W, 3) uint8, weights (h w,) of its patches over it, largest red -> (H, W, 3)."""
    import cv2
    from matplotlib import colormaps
    side = round(len(weights) ** 0.5)
    heat = cv2.resize(weights.reshape(side, side) / weights.max(), image.shape[1::-1])  # (H, W)
    colour = 255 * colormaps["jet"](heat)[..., :3]
    return (0.4 * image + 0.6 * colour).clip(0, 255).astype(np.uint8)


def caption(image, text, height=14):
    """image (H, W, 3) uint8 -> (H + height, W, 3): a line of text above it."""
    import cv2
    bar = np.full((height, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, text, (2, height - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1,
                cv2.LINE_AA)
    return np.concatenate([bar, image])


def sheet(episodes):
    """One row per task: its first video at six times, masks drawn, beside the wrist camera, 16
    steps of tracks drawn in both -> (., ., 3) uint8."""
    rows = []
    for k, name in enumerate(episodes.tasks):
        e = int(np.flatnonzero(episodes.task == k)[0])
        t, views = np.linspace(0, episodes.length[e] - 1, 6).astype(int), []
        for camera in episodes.views:
            pictures = episodes.gather(f"obs/{camera}_rgb", e, t)       # (6, H, W, 3)
            if camera == "agentview":
                pictures = map(draw_masks, pictures, episodes.gather("masks", e, t))
            ways = [episodes.gather(f"{what}/{camera}", e, t[:, None] + np.arange(16))[:, :, ::4]
                    for what in ("tracks", "visible")]                  # each (6, 16, K / 4, ...)
            views.append(np.stack([*map(draw_tracks, pictures, *ways)]))
        title = f"{k} {name.replace('_', ' ')} ({episodes.length[e]} steps)"
        rows.append(caption(np.concatenate(np.concatenate(views, 2), 1), title))
    return np.concatenate(rows)


def row(views, scale=3):
    """[(caption, (H, W, 3) uint8)] -> the pictures side by side, enlarged, with their captions."""
    large = [(name, np.kron(v, np.ones((scale, scale, 1), np.uint8))) for name, v in views]
    return np.concatenate([caption(picture, name, 16) for name, picture in large], 1)


def save_picture(path, picture):
    """(H, W, 3) uint8 -> png."""
    import imageio.v3 as iio
    write(path, iio.imwrite("<bytes>", picture, extension=".png"))


def write_film(path, pictures):
    """Pictures (list of (H, W, 3) uint8) -> mp4, 5 per second; and a still of four, .png."""
    import imageio.v2 as iio
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (side // 2 * 2 for side in pictures[0].shape[:2])   # the codec wants even ones
    with one_line(path), iio.get_writer(path, fps=5, macro_block_size=2, quality=7) as film:
        for picture in pictures:
            film.append_data(picture[:height, :width])
    chosen = np.linspace(0, len(pictures) - 1, min(4, len(pictures))).astype(int)
    save_picture(path.with_suffix(".png"), np.concatenate([pictures[k] for k in chosen]))
