"""Videos -> masks of objects and tracks of points (Mask2Act, section 3.1; ATM, section IV-A).

    python extract.py --suite libero_spatial                # recorded; the simulator's exact ones
    python extract.py --suite libero_spatial --show         # the data as a picture
    python extract.py --suite libero_spatial --masks sam --tracks cotracker --weights weights
    python extract.py --video clip.mp4 --objects "arm. bowl. plate." --suite my_videos --tracks flow
    python extract.py --suite libero_spatial --source official --download   # LIBERO's own videos

Masks   Grounding DINO finds the named objects, Segment Anything turns their boxes in one frame into
        masks, and a video segmenter carries these through all frames.
Tracks  CoTracker, or dense optical flow (DIS), which needs no weights, follows points around what
        moves, in both cameras.

Missing episodes are recorded first.  Masks or tracks that are not the simulator's make a suite of
their own, such as data/libero_spatial_sam_flow.  Weights come from --weights DIR or, but for
CoTracker's, the usual caches; only --download fetches any.  So far run with random weights only.

Sizes: T frames, H W pixels, N objects, K points; frames are (T, H, W, 3) uint8.
"""

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import sims
from core.draw import save_picture, sheet
from core.episodes import HELD_OUT, Episodes
from core.files import fail, one_line
from core.flags import flag, parse
from demos import annotated, official, record
from sims.camera import TRIES, around_what_moves

# differs: Mask2Act does not say which sizes it took; of Segment Anything the largest that is there
DETECTOR, FOLLOWER = "IDEA-Research/grounding-dino-tiny", "facebook/sam2.1-hiera-tiny"
SEGMENTERS = {"vit_h": "sam_vit_h_4b8939.pth", "vit_l": "sam_vit_l_0b3195.pth",
              "vit_b": "sam_vit_b_01ec64.pth"}
SEGMENTERS_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
# differs: ATM took CoTracker 2
TRACKER, TRACKER_FILE = "facebookresearch/co-tracker", "scaled_online.pth"
CANDIDATES = 8  # frames in which the objects are looked for
BOX, TEXT = 0.35, 0.25  # least scores of a box and of its words, Grounding DINO's own


# --- networks -------------------------------------------------------------------------------------

def pretrained(kind, processor, name, config):
    """A transformers model and its processor: from <weights>/<last part of name>, cache, or hub."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = Path(config.weights) / name.split("/")[-1]
    where = str(local) if config.weights and local.is_dir() else name
    try:
        model, prepare = (getattr(transformers, k).from_pretrained(
            where, local_files_only=not config.download) for k in (kind, processor))
    except OSError:
        fail(f"no weights of {name} in {local if config.weights else 'the cache'}: give "
             f"--download, or fetch them with hf download {name} --local-dir DIR/{local.name} "
             "and give --weights DIR")
    return model.to(config.device).eval(), prepare


def segment_anything(config):
    """The largest Segment Anything in <weights>, else in torch.hub's cache -> SamPredictor."""
    import torch
    from segment_anything import SamPredictor, sam_model_registry
    folder = Path(config.weights or Path(torch.hub.get_dir()) / "checkpoints")
    kind = next((k for k, file in SEGMENTERS.items() if (folder / file).exists()), "vit_b")
    path, source = folder / SEGMENTERS[kind], SEGMENTERS_URL + SEGMENTERS[kind]
    if not path.exists() and not config.download:
        fail(f"no Segment Anything in {folder}: give --download, or fetch {source} (or vit_l, "
             "vit_h) into DIR and give --weights DIR")
    try:    # fetches what is not there
        weights = torch.hub.load_state_dict_from_url(source, folder, "cpu", weights_only=True)
        network = sam_model_registry[kind]()
        network.load_state_dict(weights)
    except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError):
        fail(f"{path} is no whole checkpoint of Segment Anything {kind}: fetch {source} again")
    return SamPredictor(network.to(config.device).eval())


def cotracker(config):
    """CoTracker 3 from <weights>/co-tracker, a clone that holds its checkpoint, or, as the user
    wishes, through torch.hub: its licence (CC-BY-NC) is not this repository's."""
    import torch
    code = Path(config.weights) / "co-tracker"
    if (code / "hubconf.py").exists() and (code / TRACKER_FILE).exists():
        tracker = torch.hub.load(str(code), "cotracker3_online", source="local", pretrained=False)
        tracker.model.load_state_dict(torch.load(code / TRACKER_FILE, map_location="cpu",
                                                 weights_only=True))
    elif config.download:
        tracker = torch.hub.load(TRACKER, "cotracker3_online", trust_repo=True)
    else:
        fail(f"no CoTracker in {code}: give --download, or put a clone of {TRACKER} and "
             f"https://huggingface.co/facebook/cotracker3/resolve/main/{TRACKER_FILE} in "
             "DIR/co-tracker and give --weights DIR; --tracks flow needs no weights")
    return tracker.to(config.device)


# --- masks (Mask2Act, section 3.1) ----------------------------------------------------------------

def detect(frame, names, detector):
    """Grounding DINO: frame (H, W, 3) -> scores (N,), -1 where nothing is found, and boxes (N, 4)
    x0 y0 x1 y1 in pixels; those of objects of one name overlap by less than half."""
    import torch
    from torchvision.ops import box_iou
    (model, processor), N = detector, len(names)
    scores, boxes = np.full(N, -1.0), torch.zeros(N, 4, device=detector[0].device)
    for k, name in enumerate(names):  # one by one: a box belongs to one name, not to words of two
        asked = processor(images=frame, text=name + ".", return_tensors="pt").to(model.device)
        with torch.no_grad():
            output = model(**asked)
        seen = processor.post_process_grounded_object_detection(
            output, asked["input_ids"], threshold=BOX, text_threshold=TEXT,
            target_sizes=[frame.shape[:2]])[0]
        same = [other == name for other in names[:k]]
        for i in seen["scores"].argsort(descending=True):
            box = seen["boxes"][i]
            if not (box_iou(box[None], boxes[:k][same]) >= 0.5).any():
                scores[k], boxes[k] = float(seen["scores"][i]), box
                break
    return scores, boxes


def find_boxes(frames, names, detector, title):
    """-> of some frames the number of that in which the least sure of the objects is found most
    surely, and its boxes (N, 4)."""
    times = np.unique(np.linspace(0, len(frames) - 1, CANDIDATES).astype(int))
    scores, boxes = zip(*(detect(frames[t], names, detector) for t in times))
    best = int(np.argmax([s.min() for s in scores]))
    if scores[best].min() < 0:
        most = max(scores, key=lambda s: (s >= 0).sum())
        fail(f"{title}: not found in any of {CANDIDATES} frames with a score above {BOX:g}: "
             f"{', '.join(np.array(names)[most < 0])}; name them otherwise in --objects")
    return int(times[best]), boxes[best]


def box_masks(frame, boxes, segmenter):
    """Segment Anything: frame (H, W, 3), boxes (N, 4) pixels -> (N, H, W) bool."""
    segmenter.set_image(frame)
    boxes = segmenter.transform.apply_boxes_torch(boxes, frame.shape[:2])  # of the resized frame
    masks, *_ = segmenter.predict_torch(None, None, boxes=boxes, multimask_output=False)
    return masks[:, 0].cpu().numpy()  # of (N, 1, H, W)


def follow_masks(frames, t, masks, follower):
    """Masks (N, H, W) bool of frame t, carried through all -> (T, H, W) uint8, 0 none, 1..N.  Where
    two objects claim a pixel, the surer has it; an object out of the picture has no pixels.
    differs: SAM 2's video predictor in place of XMem, which is on no package index."""
    import torch
    import torch.nn.functional as F
    (model, processor), labels = follower, np.zeros(frames.shape[:3], np.uint8)
    for order in (range(t, len(frames)), range(t, -1, -1)):
        video = processor.init_video_session(inference_device=model.device)
        processor.add_inputs_to_inference_session(
            video, frame_idx=t, obj_ids=list(range(1, len(masks) + 1)), input_masks=list(masks))
        for i in order:
            pixels = processor(images=frames[i], return_tensors="pt").pixel_values
            with torch.no_grad():
                output = model(video, i, pixels, reverse=order.step < 0)
            score = F.interpolate(output.pred_masks.float(), frames.shape[1:3], mode="bilinear")
            top, which = score[:, 0].max(0)  # of (N, H, W)
            named = np.array(output.object_ids, np.uint8)[which.cpu().numpy()]  # (H, W)
            labels[i] = np.where((top > 0).cpu().numpy(), named, 0)
            video.processed_frames.clear()  # what no later frame attends to: memory stays bounded
            old = i - order.step * model.config.max_object_pointers_in_encoder
            for made in video.output_dict_per_obj.values():
                made["non_cond_frame_outputs"].pop(old, None)
    return labels


# --- tracks (ATM, section IV-A) -------------------------------------------------------------------

def carry(place, there, back):
    """Points (K, 2) pixels through dense flows (H, W, 2) to the next frame and back -> new places
    (K, 2), and whether each was kept (K,): it is in the picture and the way back returns to it."""
    import cv2
    H, W = there.shape[:2]

    def sample(flow, p):
        x, y = p.T[:, None].astype(np.float32)  # (1, K) each
        return cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]  # (K, 2)
    ahead = sample(there, place)
    new = place + ahead
    home = sample(back, new)
    error, length = ((ahead + home) ** 2).sum(1), (ahead ** 2).sum(1) + (home ** 2).sum(1)
    inside = ((new >= 0) & (new <= [W - 1, H - 1])).all(1)
    return new, inside & (error < 0.01 * length + 0.5)  # Sundaram et al. (2010), eq. 5


def flow_tracks(frames, when, where):
    """Points of frames `when` (K,), places `where` (K, 2) in [0, 1], followed both ways by DIS
    optical flow -> tracks (T, K, 2) in [0, 1], visible (T, K) bool.
    ours: a point once lost stays where it was, hidden: what hides it would drag it along."""
    import cv2
    T, H, W = frames.shape[:3]
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pixel = np.asarray(where, np.float64) * [W, H] - 0.5  # the middle of the first pixel is at 0
    tracks, visible = np.tile(pixel, (T, 1, 1)), np.zeros((T, len(pixel)), bool)
    visible[when, np.arange(len(pixel))] = True
    for order in (range(T - 1), range(T - 1, 0, -1)):  # after the query, then before it
        for t in order:
            run, new_t = when <= t if order.step > 0 else when >= t, t + order.step
            if run.any():
                there = dis.calc(grey[t], grey[new_t], None)  # (H, W, 2)
                back = dis.calc(grey[new_t], grey[t], None)
                new, kept = carry(tracks[t, run], there, back)
                kept &= visible[t, run]
                tracks[new_t, run] = np.where(kept[:, None], new, tracks[t, run])
                visible[new_t, run] = kept
    return (tracks + 0.5) / [W, H], visible


def cotracker_tracks(tracker, frames, when, where):
    """As flow_tracks, by CoTracker, window by window; earlier frames in the reversed film."""
    import torch
    (T, H, W), k, step = frames.shape[:3], range(len(when)), tracker.step
    device, pixel = next(tracker.parameters()).device, np.asarray(where) * [W, H] - 0.5

    def follow(frames, when):
        """-> tracks (T, K, 2) in pixels, visible (T, K)."""
        queries = torch.as_tensor(np.c_[when, pixel], device=device)[None].float()  # (1, K, 3)
        tracker(queries.new_empty(1, 1, 3, H, W), is_first_step=True, queries=queries)
        for i in range(0, max(1, T - step), step):
            window = np.float32(frames[i:i + 2 * step]).transpose(0, 3, 1, 2)[None]  # 1 t 3 H W
            found = tracker(torch.as_tensor(window, device=device))  # in all frames so far
        return [array[0].cpu().numpy() for array in found]
    (tracks, seen), (back, seen_back) = follow(frames, when), follow(frames[::-1], T - 1 - when)
    before = np.arange(T)[:, None] < when  # (T, K)
    tracks[before], seen[before] = back[::-1][before], seen_back[::-1][before]
    tracks[when, k], seen[when, k] = pixel, True
    return (tracks + 0.5) / [W, H], seen


def video_tracks(frames, track, rng):
    """Points are tried everywhere; those drawn around what moves are followed by `track`
    -> tracks (T, K, 2) in [0, 1], visible (T, K)."""
    when, where = rng.integers(len(frames), size=TRIES), rng.random((TRIES, 2))
    varies = track(frames, when, where)[0].var(0).sum(1)  # (TRIES,)
    return track(frames, *around_what_moves(when, where, varies, len(frames), rng)[1:])


# --- the program ----------------------------------------------------------------------------------

class Annotator:
    """The networks of --masks and --tracks; missing weights end the run."""

    def __init__(self, config):
        self.detector = self.track = None
        if config.masks == "sam":
            self.detector = pretrained("GroundingDinoForObjectDetection", "GroundingDinoProcessor",
                                       DETECTOR, config)
            self.segmenter = segment_anything(config)
            self.follower = pretrained("Sam2VideoModel", "Sam2VideoProcessor", FOLLOWER, config)
        if config.tracks == "flow":
            self.track = flow_tracks
        elif config.tracks == "cotracker":
            self.track = partial(cotracker_tracks, cotracker(config))

    def masks(self, frames, names, title):
        """names: what the N objects look like, the robot first; title: of the video, for messages
        -> (T, H, W) uint8, 0 background, 1..N in their order."""
        t, boxes = find_boxes(frames, names, self.detector, title)
        masks = box_masks(frames[t], boxes, self.segmenter)  # (N, H, W)
        if empty := [name for name, mask in zip(names, masks) if not mask.any()]:
            fail(f"{title}: Segment Anything finds nothing in the box of {', '.join(empty)}: "
                 "name it otherwise in --objects")
        return follow_masks(frames, t, masks, self.follower)

    def __call__(self, views, names, seed, title):
        """views: {camera: frames} of one video -> those arrays of an episode that are not to be the
        simulator's: masks of the first camera, tracks of all."""
        made = {}
        if self.detector:
            made["masks"] = self.masks(views["agentview"], names, title)
        for k, camera in enumerate(views if self.track else ()):
            rng = np.random.default_rng([seed, k])
            tracks, made[f"visible/{camera}"] = video_tracks(views[camera], self.track, rng)
            made[f"tracks/{camera}"] = tracks.clip(-9, 9).astype(np.float16)  # (T, K, 2)
        return made


@dataclass
class Config:
    suite: str = flag("libero_spatial", "suite: " + ", ".join(sims.SUITES))
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    source: str = flag("scripted", "scripted, or official: LIBERO's published demonstrations, from "
                       "<data>/official/<suite>/ and at their own --size", ["scripted", "official"])
    demos: int | None = flag(None, "videos per task", minimum=1)
    preset: str | None = flag(None, "sizes: for a test, for two CPU cores, for one GPU",
                              choices=["tiny", "laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    render: str = flag("fast", "fast, or faithful: the simulators' own look, slow without a GPU",
                       choices=["fast", "faithful"])
    masks: str = flag("", "sim: the simulator's, exact (default of a suite); sam: Grounding DINO, "
                      "Segment Anything and SAM 2 (of a film)", choices=["sim", "sam"])
    tracks: str = flag("", "sim: the simulator's, exact (default of a suite); cotracker (of a "
                       "film); flow needs no weights", choices=["sim", "cotracker", "flow"])
    objects: str = flag("", "what to segment, the robot first, each name with a full stop; empty: "
                        "as the suite names them")
    video: str = flag("", "a film, or a folder of films: no simulator")
    weights: str = flag("", "folder of the networks' weights, before the usual caches")
    download: bool = flag(False, "fetch what is missing: weights, the official files")
    workers: int = flag(2, "processes, each with networks of its own", minimum=1)
    data: str = flag("data", "folder of the data files")
    show: bool = flag(False, "write <data>/<suite>.png, a picture of the data, one row per task")
    device: str | None = flag(None, "of the networks")
    PRESETS = {"tiny": {"demos": 2, "size": 64}, "laptop": {"demos": 20, "size": 96},
               "paper": {"demos": 50, "size": 128}}     # as the planners'


def make_data(config):
    """What the flags ask for and is not there -> the suite that holds it, its tasks."""
    if config.video:
        config.masks, config.tracks = config.masks or "sam", config.tracks or "cotracker"
        names, path = annotated.prompts((), config.objects), annotated.film_path(config)
        annotated.annotate_films(config, path, names, Annotator)
        return config.suite, [path.stem]
    config.masks, config.tracks = config.masks or "sim", config.tracks or "sim"
    if config.objects and config.masks != "sam":
        fail("--objects is for --masks sam: the simulator's masks have the suite's own objects")
    suite, names = annotated.annotated_suite(config), {}
    tasks = (official.choose_tasks(config.suite, config.tasks) if config.source == "official" else
             record.task_names(config.suite, config.tasks, config.data))
    if suite != config.suite:
        sims.tasks(config.suite)    # only a simulator's suite can be annotated anew
        names = {k: annotated.prompts(sims.describe(config.suite, k)[1], config.objects)
                 for k in tasks}
        Annotator(config)   # what is missing ends the run here, before anything is recorded
    if config.source == "official":
        official.import_official(config, tasks)
    else:
        record.ensure(config.suite, tasks, config.demos, config.data, config.size,
                      render=config.render, workers=config.workers)
    annotated.annotate_suite(config, names, Annotator)
    return suite, tasks


def main(argv=None):
    """Command line: makes the episodes that are missing; with --show draws them."""
    config = parse(Config, "Videos with masks and tracks, as HDF5 in the robomimic layout.", argv)
    with one_line(config.data):
        suite, tasks = make_data(config)
    episodes = Episodes(config.data, suite, tasks, config.demos)
    print(f"{config.data}/{suite}: {len(tasks)} tasks, {len(episodes.length)} videos of "
          f"{episodes.length.mean():.0f} steps on average, {HELD_OUT} more per task held out; "
          f"{episodes.seconds / len(episodes.length):.2f} s of one core each   "
          f"next: python mask_planner.py --suite {suite}")
    if config.show:
        save_picture(path := f"{config.data}/{suite}.png", sheet(episodes))
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
