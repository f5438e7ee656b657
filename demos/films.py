"""Films of any make as frames, for `extract.py --video`."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np

from core.episodes import HELD_OUT
from core.files import fail

PIECES, SHORTEST = 10, 8  # a single film is cut into so many episodes of at least so many frames
LONGEST = 300  # frames that the networks are given at once
FILMS = (".mp4", ".avi", ".mov", ".mkv", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


def files_in(folder, kinds):
    """The files of a folder with one of these suffixes, in the order of their names, frame2 before
    frame10; without hidden ones, which macOS puts beside each."""
    natural = lambda p: [(not w.isdecimal(), int(w) if w.isdecimal() else w)
                         for w in re.split(r"(\d+)", p.name) if w]
    return sorted((p for p in Path(folder).glob("[!.]*")
                   if p.is_file() and p.suffix.lower() in kinds), key=natural)


def episodes_of(path):
    """A folder of films -> those, an episode each; else the path itself, to be cut into pieces."""
    films = files_in(path, FILMS)
    if films and len(films) <= HELD_OUT:
        fail(f"{path} holds {len(films)} films: {HELD_OUT} are held out, "
             f"so give {HELD_OUT + 1} or more, or one film itself")
    return films or [path]


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


def frames_of(path, size):
    """Yields the frames of a film, or the pictures of a folder in the order of their names,
    (size, size, 3) uint8 RGB: of a film of any length, one frame is in memory."""
    import cv2
    if os.path.isdir(path):
        yield from pictures_of(path, size)
        return
    film = cv2.VideoCapture(str(path))
    while (found := film.read())[0]:
        yield square(found[1][..., ::-1], size)


def count_frames(path):
    """Reads a film, or a folder of pictures, to its end -> number of its frames."""
    import cv2
    if not os.path.exists(path):
        fail(f"no video {path}: --video wants a film, a folder of films, or a folder of pictures")
    if os.path.isdir(path):
        return sum(1 for _ in pictures_of(path, 32))
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # errors are reported here
    film, times = cv2.VideoCapture(str(path)), []  # milliseconds
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


def pictures_of(folder, size):
    """Yields a folder's pictures, all of one size, (size, size, 3) uint8 RGB."""
    import cv2
    first = None
    for path in files_in(folder, PICTURES):
        picture = cv2.imread(str(path))
        if picture is None:
            fail(f"{path} is no picture that can be read: delete it or copy it again")
        first = first or picture.shape
        if picture.shape != first:
            fail(f"{folder} mixes sizes: {path.name} is {picture.shape[1]} x {picture.shape[0]}, "
                 f"the first {first[1]} x {first[0]}: a video's frames have one size")
        yield square(picture[..., ::-1], size)
    if not first:
        fail(f"{folder} holds no pictures (.png, .jpg) and no films")
