"""Episodes -> HDF5 with masks and point tracks; the reader of that file.

    python extract.py --suite libero_spatial --demos 20     # continues where it was stopped
    python extract.py --suite libero_spatial --show         # the data as a picture
    python extract.py --video clip.mp4 --objects "arm. bowl. plate." --suite my_videos --tracks flow
    python extract.py --suite libero_spatial --source official --download  # LIBERO's own

One file per task, data/<suite>/<task>.hdf5, in the robomimic/LIBERO layout (A action, S state
numbers):

    data.attrs   env_args, problem_info, total, task, language_instruction, text_embedding (D,) f4,
                 objects (robot first), cameras, size, source
    data/demo_i  actions (T, A) f4 . states (T, S) f8 . rewards, dones (T,)
                 attrs: num_samples; seed, noise or, of official ones, original
      obs/       agentview_rgb, eye_in_hand_rgb (T, H, W, 3) u1 upright
                 ee_states, joint_states, gripper_states
      masks      (T, H, W) u1 of agentview: 0 background, 1 robot, 2.. the task's objects
      tracks/    agentview, eye_in_hand (T, K, 2) f2 places x, y of points on surfaces, in [0, 1]
                 inside the picture
      visible/   agentview, eye_in_hand (T, K) bool
      hand       (T, 2) f2 of agentview: the place of the robot's hand, in the same units
    mask/        train, valid: names of demos (robomimic's filter keys)

Row t holds what is seen before action t.  demo_0 .. demo_1 are held out for validation, the next
`--demos` are the videos, and of these the first `--action-demos` also lend their actions.  Pictures
are stored uncompressed and contiguous, so that training maps them into memory instead of reading
them.  `writing.py` writes these files, `episodes.py` reads them; `films.py` is about `--video`,
`official.py` about `--source official`.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sims
from core.draw import caption, sheet
from core.episodes import Episodes, HELD_OUT, write_videos
from core.files import fail
from core.flags import flag, parse
from demos import official, record
from demos.films import PIECES, SHORTEST, episodes_of, read_video
from demos.language import TEXTS
from sims import libero, metaworld

DETECTOR, SEGMENTER, FOLLOWER = ("IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-base",
                                 "facebook/sam2.1-hiera-tiny")
TRACKER, TRACKER_FILE = "facebookresearch/co-tracker", "scaled_offline.pth"
CANDIDATES = 8  # frames in which the objects are looked for
BOX, TEXT = 0.35, 0.25  # thresholds on box and words, Grounding DINO's own
WORK = 384  # pixels: annotators see at least this; masks and tracks are then brought to --size


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


def annotate_video(config):
    """--video: all is computed first, then the file is written: nothing is left of a failed run.

    config  of `extract.py`
    """
    objects = [word.strip() for word in config.objects.split(".") if word.strip()]
    path = target(config, objects)
    films, made = episodes_of(config.video), []
    for film in films:
        begin, frames = time.time(), read_video(film, max(config.size, WORK))
        if len(films) == 1 and len(frames) < (HELD_OUT + 1) * SHORTEST:
            fail(f"{film} has {len(frames)} frames, which make no {HELD_OUT + 1} episodes of "
                 f"{SHORTEST}: give a longer one")
        rest = config.weights, config.download, config.device
        masks = video_masks(frames, objects, *rest, config.threshold)  # (T, H, W)
        tracks, visible = video_tracks(frames, config.tracks, 256, 0, *rest)
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
    if config.suite in sims.SUITES or config.suite in metaworld.METAWORLD:
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


@dataclass
class Config:
    suite: str = flag("libero_spatial", "suite: " + ", ".join(sims.SUITES))
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    source: str = flag("scripted", "scripted, or official: LIBERO's published demonstrations, from "
                       "<data>/official/<suite>/ and at their own --size", ["scripted", "official"])
    demos: int | None = flag(None, "videos per task", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU",
                              choices=["laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    noise: float = flag(record.NOISE, "standard deviation of the noise on the executed action (of 1); the "
                        "clean one is recorded", minimum=0)
    render: str = flag("fast", "fast, or faithful: the simulators' own look, ten times slower",
                       choices=["fast", "faithful"])
    show_goal: bool = flag(False, "draw Meta-World's goal markers, which tell a policy where to go")
    text: str = flag("minilm", "what puts the instruction into numbers; bert and clip must be in "
                     "Hugging Face's cache", choices=list(TEXTS))
    workers: int = flag(2, "processes", minimum=1)
    data: str = flag("data", "folder of the data files")
    video: str = flag("", "a film, a folder of its pictures, or a folder of films: no simulator, "
                      "see annotate.py")
    objects: str = flag("", "with --video: what to segment, the robot first, each name with a full "
                        "stop")
    masks: str = flag("sam", "of --video and --grade: sam is Grounding DINO, Segment Anything and "
                      "SAM 2; sim is the simulator's truth", choices=["sam", "sim"])
    tracks: str = flag("cotracker", "of --video and --grade: flow needs no weights; sim is the "
                       "simulator's truth", choices=["cotracker", "flow", "sim"])
    threshold: float = flag(BOX, "with --video: least score of a found object", minimum=0)
    weights: str = flag("", "with --video: folder of the models, before the usual caches")
    download: bool = flag(False, "fetch what is missing: --video's weights, the official files")
    grade: bool = flag(False, "compare --masks and --tracks (sim: leave out) with the truth; "
                       "writes results/<suite>_grade.json")
    show: bool = flag(False, "write data/<suite>.png, a picture of the data, one row per task")
    unseen: str | None = flag(None, "with --show: data/<suite>_unseen.png instead, scenes of "
                              "libero_spatial as in training and with this new",
                              choices=[*libero.UNSEEN, "all"])
    device: str | None = flag(None, "of the models that --video needs")
    # as the planner's
    PRESETS = {"laptop": {"demos": 20, "size": 96}, "paper": {"demos": 50, "size": 128}}


def unseen_sheet(config, names):
    """One row per task: the same scene as in training and in unseen variants -> (., ., 3) uint8."""
    variants = libero.UNSEEN if config.unseen == "all" else [config.unseen]
    rows = []
    for name in names:
        cells = []
        for unseen in (None, *variants):
            sim = sims.make(config.suite, name, config.size, config.render, unseen=unseen)
            cells.append(caption(sim.reset(seed=0)["agentview_rgb"], unseen or "as in training"))
            sim.close()
        rows.append(np.concatenate(cells, 1))
    return np.concatenate(rows)


def show(config, picture):
    """Writes a picture (., ., 3) uint8 beside the suite's data."""
    import imageio.v3 as iio
    path = Path(config.data) / f"{config.suite}{'_unseen' if config.unseen else ''}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, picture)
    print(f"picture: {path}")


def main(argv=None):
    """Command line: makes the episodes that are missing; with --show draws them."""
    about = "Scripted demonstrations with exact masks, as HDF5 in the robomimic layout."
    config = parse(Config, about, argv)
    if config.video:
        annotate_video(config)
    if config.unseen:
        return show(config, unseen_sheet(config, sims.choose_tasks(config.suite, config.tasks)))
    if config.source == "official":
        names = official.choose_tasks(config.suite, config.tasks)
        official.import_official(config, names)
    else:
        names = record.choose_tasks(config.suite, config.tasks, config.data)
        record.ensure(config.suite, names, config.demos, config.data, config.size, config.noise,
               config.render + "+goal" * config.show_goal, config.workers, config.text)
    episodes = Episodes(config.data, config.suite, names, config.demos)
    print(f"{config.data}/{config.suite}: {len(names)} tasks, {len(episodes.length)} videos of "
          f"{episodes.length.mean():.0f} steps on average, {HELD_OUT} more per task held out; "
          f"{episodes.seconds / len(episodes.length):.2f} s of one core each")
    if config.grade:
        from results import annotators
        annotators.grade_annotators(config, episodes)
    if config.show:
        show(config, sheet(episodes))


if __name__ == "__main__":
    main()
