"""Masks and point tracks for videos without a simulator: the pipeline of Mask2Act and ATM.

Masks   Grounding DINO finds the named objects in the frame where it is surest of all of them,
        Segment Anything turns its boxes into masks, and SAM 2's video predictor carries these
        through all frames, forwards and backwards.
        differs: SAM 2 in XMem's place.  XMem is on no package index, and its successor Cutie only
        as a fork that fetches weights whenever it is built; SAM 2 comes with transformers, which is
        kept up and already here for Grounding DINO.  Segment Anything, too, is transformers': the
        package `segment-anything` has had one release.
Tracks  CoTracker through torch.hub (CC-BY-NC: not part of this repository), or dense optical flow
        (OpenCV's DIS), which needs no weights: points are carried from frame to frame, and one is
        lost where the flow there and back does not return to it (Sundaram et al., 2010).

Weights are looked for in `--weights DIR`, then in the usual caches, and fetched with --download
only.  Sizes: T frames, H W pixels, K points, N objects.  Frames are (T, H, W, 3) uint8.
"""
import os
from pathlib import Path

import numpy as np

from core import fail

DETECTOR, SEGMENTER, FOLLOWER = ("IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-base",
                                 "facebook/sam2.1-hiera-tiny")
TRACKER, TRACKER_FILE = "facebookresearch/co-tracker", "scaled_offline.pth"
CANDIDATES = 8  # frames in which the objects are looked for
BOX, TEXT = 0.35, 0.25  # thresholds on box and words, Grounding DINO's own
WORK = 384  # pixels: annotators see at least this; masks and tracks are then brought to --size
PICTURES = {".png", ".jpg", ".jpeg", ".bmp"}


# --- reading videos -------------------------------------------------------------------------------


def square(picture, size):
    """(H, W, 3) uint8 -> (size, size, 3): the middle, cut to a square, then resized."""
    import cv2
    H, W = picture.shape[:2]
    side = min(H, W)
    y, x = (H - side) // 2, (W - side) // 2
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(picture[y:y + side, x:x + side], (size, size), interpolation=how)


def read_video(path, size):
    """A film, or a folder of pictures in the order of their names -> (T, size, size, 3) uint8 RGB.

    Each frame is cut and resized as it is read, so that a large film takes no more memory than its
    result.
    """
    import cv2
    path = Path(path)
    if not path.exists():
        fail(f"no video {path}: --video wants a film, a folder of films, or a folder of pictures")
    if path.is_dir():
        return read_pictures(path, size)
    # quiet: we say ourselves what is wrong with a film
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    film, frames = cv2.VideoCapture(str(path)), []
    said = int(film.get(cv2.CAP_PROP_FRAME_COUNT))
    while True:
        there, picture = film.read()
        if not there:
            break
        frames.append(square(picture[..., ::-1], size))
    film.release()
    if not frames:
        fail(f"{path} holds no frames that can be read: it is empty, cut short, or no video")
    if len(frames) < 0.9 * said:  # containers round their number of frames
        fail(f"{path} is cut short: {len(frames)} of {said} frames can be read; copy it again")
    return np.stack(frames)


def read_pictures(folder, size):
    """A folder of pictures of one size -> (T, size, size, 3) uint8 RGB."""
    import cv2
    frames, first = [], None
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        picture = cv2.imread(str(path))
        if picture is None:
            fail(f"{path} is no picture that can be read: delete it or copy it again")
        first = first or picture.shape
        if picture.shape != first:
            fail(f"{folder} mixes sizes: {path.name} is {picture.shape[1]} x {picture.shape[0]}, "
                 f"the first {first[1]} x {first[0]}: a video's frames have one size")
        frames.append(square(picture[..., ::-1], size))
    if not frames:
        fail(f"{folder} holds no pictures (.png, .jpg) and no films")
    return np.stack(frames)


# --- weights --------------------------------------------------------------------------------------


def pretrained(kind, processor, name, weights, download, device):
    """A transformers model and its processor: from `weights`/<last part of name>, cache, or hub."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(weights or "") / name.split("/")[-1]
    where = str(local) if weights and local.is_dir() else name
    try:
        ready = [getattr(transformers, k).from_pretrained(where, local_files_only=not download)
                 for k in (kind, processor)]
    except OSError:
        fail(f"no weights of {name} in {local if weights else 'the cache'}: give --download, or "
             f"fetch them with hf download {name} --local-dir DIR/{name.split('/')[-1]} "
             "and give --weights DIR")
    return ready[0].to(device).eval(), ready[1]


def cotracker(weights, download, device):
    """CoTracker 3 from `weights`/co-tracker, torch.hub's cache, or the net."""
    import torch
    local, hub = Path(weights or "") / "co-tracker", Path(torch.hub.get_dir())
    cached = hub / (TRACKER.replace("/", "_") + "_main")
    if weights and (local / "hubconf.py").exists():
        name, source, file = str(local), "local", local / TRACKER_FILE
    else:
        name, source, file = str(cached), "local", hub / "checkpoints" / TRACKER_FILE
        if download:
            name, source = TRACKER, "github"
    if source == "local" and not (Path(name, "hubconf.py").exists() and file.exists()):
        fail(f"no CoTracker ({TRACKER} and {TRACKER_FILE}) in {local if weights else hub}: give "
             "--download, or put a clone and "
             f"https://huggingface.co/facebook/cotracker3/resolve/main/{TRACKER_FILE} in "
             "DIR/co-tracker and give --weights DIR; or --tracks flow, which needs no weights")
    if source == "github":
        return torch.hub.load(name, "cotracker3_offline").to(device)
    tracker = torch.hub.load(name, "cotracker3_offline", source="local", pretrained=False)
    tracker.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return tracker.to(device)


# --- masks ----------------------------------------------------------------------------------------


def find_boxes(frames, objects, weights, download, device, threshold=BOX):
    """Grounding DINO on some frames -> the frame where all are found most surely, and boxes (N, 4)
    x0 y0 x1 y1."""
    import torch
    model, processor = pretrained("GroundingDinoForObjectDetection", "GroundingDinoProcessor",
                                  DETECTOR, weights, download, device)
    best, missing = (-1.0, None, None), objects
    for t in np.unique(np.linspace(0, len(frames) - 1, CANDIDATES).astype(int)):
        found = []
        for name in objects:  # one by one, so that a box belongs to one name, not to words of two
            asked = processor(images=frames[t], text=name + ".", return_tensors="pt").to(device)
            with torch.no_grad():
                said = model(**asked)
            seen = processor.post_process_grounded_object_detection(
                said, asked["input_ids"], threshold=threshold, text_threshold=min(TEXT, threshold),
                target_sizes=[frames[t].shape[:2]])[0]
            if len(seen["scores"]):
                k = int(seen["scores"].argmax())
                found.append((name, float(seen["scores"][k]), seen["boxes"][k].cpu().numpy()))
        absent = [n for n in objects if n not in [f[0] for f in found]]
        missing = absent if len(absent) < len(missing) else missing
        if not absent and min(f[1] for f in found) > best[0]:
            best = min(f[1] for f in found), int(t), np.stack([f[2] for f in found])
    if best[1] is None:
        fail(f"not found in any of {CANDIDATES} frames with a score above {threshold:g}: "
             f"{', '.join(missing)}; name them otherwise in --objects, or lower --threshold")
    return best[1], best[2]


def box_masks(frame, boxes, weights, download, device):
    """Segment Anything: frame (H, W, 3), boxes (N, 4) pixels -> (N, H, W) bool."""
    import torch
    model, processor = pretrained("SamModel", "SamProcessor", SEGMENTER, weights, download, device)
    asked = processor(images=frame, input_boxes=[boxes.tolist()], return_tensors="pt")
    sizes = asked["original_sizes"], asked["reshaped_input_sizes"]
    given = {k: asked[k].to(device).float() for k in ("pixel_values", "input_boxes")}
    with torch.no_grad():
        said = model(**given, multimask_output=False)
    masks = processor.image_processor.post_process_masks(said.pred_masks.cpu(), *sizes)
    return masks[0][:, 0].numpy()


def follow_masks(frames, t, masks, weights, download, device):
    """SAM 2: masks (N, H, W) bool of frame t carried through all -> (T, H, W) uint8, 0 none, 1..N.

    Where two objects claim a pixel, the surer has it; an object out of the picture has no pixels.
    """
    import torch
    import torch.nn.functional as F
    model, processor = pretrained("Sam2VideoModel", "Sam2VideoProcessor", FOLLOWER, weights,
                                  download, device)
    session = processor.init_video_session(video=frames, inference_device=device)
    names = list(range(1, len(masks) + 1))
    processor.add_inputs_to_inference_session(session, frame_idx=t, obj_ids=names,
                                              input_masks=list(masks))
    labels = np.zeros(frames.shape[:3], np.uint8)
    with torch.no_grad():
        for reverse in (False, True):
            for said in model.propagate_in_video_iterator(session, start_frame_idx=t,
                                                          reverse=reverse):
                score = said.pred_masks.float()  # (N, 1, H', W')
                score = F.interpolate(score, frames.shape[1:3], mode="bilinear")[:, 0]  # (N, H, W)
                top, which = score.max(0)
                order = np.array(said.object_ids, np.uint8)[which.cpu().numpy()]  # (H, W)
                labels[said.frame_idx] = np.where((top > 0).cpu().numpy(), order, 0)
    return labels


def video_masks(frames, objects, weights=None, download=False, device="cpu", threshold=BOX):
    """The whole path.  objects: names, the robot first -> (T, H, W) uint8, 0 background, 1.. in
    their order."""
    t, boxes = find_boxes(frames, objects, weights, download, device, threshold)
    first = box_masks(frames[t], boxes, weights, download, device)
    empty = [name for name, mask in zip(objects, first) if not mask.any()]
    if empty:
        fail(f"Segment Anything sees nothing in the box of {', '.join(empty)}: "
             "name it otherwise in --objects")
    return follow_masks(frames, t, first, weights, download, device)


# --- tracks ---------------------------------------------------------------------------------------


def carry(place, there, back):
    """One step of points through dense flow.

    place (K, 2) pixels; flows (H, W, 2) to the next frame and back -> new places (K, 2), and
    whether each was kept (K,): it stays in the picture and the way back returns to it.
    """
    import cv2
    H, W = there.shape[:2]

    def sample(flow, p):
        x, y = (p[None, :, k].astype(np.float32) for k in (0, 1))  # each (1, K)
        return cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]  # (K, 2)
    ahead = sample(there, place)
    new = place + ahead
    home = sample(back, new)
    error, length = ((ahead + home) ** 2).sum(1), (ahead ** 2).sum(1) + (home ** 2).sum(1)
    inside = ((new >= 0) & (new <= [W - 1, H - 1])).all(1)
    return new, inside & (error < 0.01 * length + 0.5)  # Sundaram et al., eq. 5


def flow_tracks(frames, when, where):
    """Points seen at frames `when` (K,), places `where` (K, 2) in [0, 1], followed both ways by DIS
    optical flow -> tracks (T, K, 2) in [0, 1], visible (T, K) bool.

    ours: a point once lost stays where it was, hidden: what hides it would drag it along.
    """
    import cv2
    T, H, W = frames.shape[:3]
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pixel = np.asarray(where, np.float64) * [W, H] - 0.5  # the middle of the first pixel is at 0
    tracks, visible = np.tile(pixel, (T, 1, 1)), np.zeros((T, len(pixel)), bool)
    visible[when, np.arange(len(pixel))] = True
    for order in (range(T - 1), range(T - 1, 0, -1)):  # after the query, then before it
        step = order.step
        for t in order:
            run = when <= t if step > 0 else when >= t
            if run.any():
                there = dis.calc(grey[t], grey[t + step], None)  # (H, W, 2)
                back = dis.calc(grey[t + step], grey[t], None)
                new, kept = carry(tracks[t, run], there, back)
                kept &= visible[t, run]
                tracks[t + step, run] = np.where(kept[:, None], new, tracks[t, run])
                visible[t + step, run] = kept
    return (tracks + 0.5) / [W, H], visible


def cotracker_tracks(frames, when, where, weights=None, download=False, device="cpu"):
    """The same by CoTracker 3."""
    import torch
    tracker, (T, H, W) = cotracker(weights, download, device), frames.shape[:3]
    pixel = np.asarray(where) * [W, H] - 0.5
    asked = np.concatenate([when[:, None], pixel], 1)  # (K, 3)
    asked = torch.tensor(asked, dtype=torch.float32, device=device)
    film = torch.from_numpy(frames).permute(0, 3, 1, 2)[None]  # (1, T, 3, H, W) 0..255
    film = film.float().to(device)
    with torch.no_grad():
        tracks, visible = tracker(film, queries=asked[None], backward_tracking=True)
    seen = visible[0].cpu().numpy().astype(bool).reshape(T, -1)
    return (tracks[0].cpu().numpy() + 0.5) / [W, H], seen


def video_tracks(frames, how, K=256, seed=0, weights=None, download=False, device="cpu"):
    """K points where something moves (ATM IV-A), and everywhere if nothing does -> tracks, visible
    as above.

    ours: four times as many points are tried by flow, and those kept whose places vary most, but
    for a quarter.
    """
    rng = np.random.default_rng(seed)
    when, where = rng.integers(len(frames), size=4 * K), rng.random((4 * K, 2))
    spread = flow_tracks(frames, when, where)[0].var(0).sum(1)  # (4 K,)
    kept = np.concatenate([np.arange(K // 4), K // 4 + np.argsort(-spread[K // 4:])[:K - K // 4]])
    if how == "flow":
        return flow_tracks(frames, when[kept], where[kept])
    return cotracker_tracks(frames, when[kept], where[kept], weights, download, device)
