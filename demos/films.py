"""Films of any make as frames, for `extract.py --video`."""

import os
import subprocess
from pathlib import Path

import numpy as np

from core.episodes import HELD_OUT
from core.files import fail

PIECES, SHORTEST = 10, 8  # a single film is cut into so many episodes of at least so many frames
LONGEST, OVERLAP = 300, 30  # frames of a window at most; before it, that the networks also see
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def episodes_of(path):
    """A folder of films -> those, by their names; a film -> itself, to be cut."""
    if not os.path.isdir(path):
        return [path]
    # without hidden files, which macOS puts beside each
    films = sorted(p for p in Path(path).glob("[!.]*") if p.suffix.lower() in FILMS)
    if len(films) <= HELD_OUT:
        fail(f"{path} holds {len(films)} films ({' '.join(FILMS)}): {HELD_OUT} are held out, so "
             f"give {HELD_OUT + 1} or more, or one film; of a folder of pictures ffmpeg makes one")
    return films


def windows_of(length, pieces):
    """How a film of `length` frames is cut: into windows, in each of which objects are found and
    points are chosen, and these into episodes, at least `pieces` in all -> per window the lengths
    of its episodes."""
    windows = -(-length // LONGEST)
    return [[len(piece) for piece in np.array_split(window, -(-pieces // windows))]
            for window in np.array_split(np.arange(length), windows)]


def square(picture, size):
    """(H, W, 3) uint8 -> (size, size, 3): the middle, cut to a square, then resized."""
    import cv2
    H, W = picture.shape[:2]
    side = min(H, W)
    y, x, how = (H - side) // 2, (W - side) // 2, (cv2.INTER_LINEAR, cv2.INTER_AREA)[side > size]
    return cv2.resize(picture[y:y + side, x:x + side], (size, size), interpolation=how)


def opened(path):
    """A film to be read; its faults are reported here, not by ffmpeg."""
    import cv2
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return cv2.VideoCapture(str(path))


def frames_of(path, size):
    """Yields the frames of a film, (size, size, 3) uint8 RGB: one is in memory."""
    film = opened(path)
    while (found := film.read())[0]:
        yield square(found[1][..., ::-1], size)


def count_frames(path):
    """Reads a film to its end -> number of its frames."""
    import cv2
    if not os.path.exists(path):
        fail(f"no video {path}: --video wants a film or a folder of films")
    film, times = opened(path), []  # milliseconds
    while film.grab():
        times.append(film.get(cv2.CAP_PROP_POS_MSEC))
    if not times:
        fail(f"{path} holds no frames that can be read: it is empty, cut short, or no video")
    # containers round their number of frames; a trimmed film announces those that it hides, too
    announced = int(film.get(cv2.CAP_PROP_FRAME_COUNT))
    if len(times) < 0.9 * announced and (why := broken(path)):
        fail(f"{path} is cut short: {len(times)} of {announced} frames can be read ({why}); copy "
             "it again")
    gaps = np.diff(times)
    if len(gaps) and gaps.max() > 1.5 * np.median(gaps):
        print(f"{path}: frames are {np.median(gaps):.0f} to {gaps.max():.0f} ms apart and are taken"
              f" as equally far apart; ffmpeg -i {path} -vf fps=10 new.mp4 makes them so")
    return len(times)


def broken(path):
    """What ffmpeg finds wrong with a film when it decodes all of it; "" if nothing."""
    import imageio_ffmpeg
    run = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f",
                          "null", "-"], capture_output=True, text=True, errors="replace")
    return " ".join(run.stderr.split())[:80]
