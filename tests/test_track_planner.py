"""track_planner.py: patches and their inverse, what the network may not know, augmentation, batches, scores, resumption."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from conftest import COMMON, EXECUTOR, SIZE, SUITE, equal, run_and_kill

import executor
import track_planner
from core import networks, training
from core.episodes import Episodes
from core.flags import parse
from demos import record
from sims.camera import CAMERAS

NETWORK = "--width 32 --depth 1 --batch 4 --device cpu --no-bf16".split()
COMMAND = [*COMMON, "--steps", "5", *NETWORK]
PAPER = ["--mask-ratio", "0.5", "--jitter", "0.3", "--blocks", "0"]


def config(*flags):
    c = parse(track_planner.Config, "", [*COMMAND, *flags])
    c.goal = c.goal or "language"
    return c


def small(*flags):
    torch.manual_seed(0)
    return track_planner.TrackPlanner(config(*flags), 384)


def tensors(batch):
    return {k: torch.as_tensor(v) for k, v in batch.items()}


# --- patches --------------------------------------------------------------------------------------


def test_track_patches_and_back():
    tracks = torch.randn(2, track_planner.STEPS, 5, 2)
    patches = track_planner.track_patches(tracks)
    assert patches.shape == (2, 4, 5, 8)
    assert torch.equal(patches[1, 2, 3], tracks[1, 8:12, 3].flatten())
    assert torch.equal(track_planner.track_from_patches(patches), tracks)


def test_image_patches_are_squares_row_by_row():
    images = torch.randn(2, 3, 32, 48)
    patches = track_planner.image_patches(images, 16)
    assert patches.shape == (2, 6, 768)
    assert torch.equal(patches[1, 4].view(3, 16, 16), images[1, :, 16:32, 16:32])


def test_grid_points():
    points = networks.grid_points(3)
    assert torch.allclose(points[5], torch.tensor([5 / 6, 0.5])) and points.shape == (9, 2)


# --- network --------------------------------------------------------------------------------------


@pytest.fixture(params=[["--goal", "language", *PAPER], ["--goal", "image"]], ids=["paper", "laptop"])
def asked(request, videos):
    planner = small(*request.param)
    return planner, tensors(track_planner.training_batch(videos, 0, planner.config))


def test_loss_equals_a_loop(asked):
    planner, batch = asked
    with torch.no_grad():
        loss, parts = planner.eval().loss(batch)
        said, painted = planner(batch["image"], batch["tracks"][:, 0], batch["goal"])
    track = []
    for b, s, n in np.ndindex(*said.shape[:3]):
        true = batch["tracks"][b, 1 + s, n]
        if -0.25 < true.min() and true.max() < 1.25:    # far outside the picture it does not count
            track.append(((said[b, s, n] - true) ** 2).mean().item())
    track = np.mean(track)
    assert parts["track"] == pytest.approx(track, rel=1e-3)
    if painted is not None:
        squares = []
        for b, y, x, c in np.ndindex(2, SIZE, SIZE, 3):
            cell, inside = y // 16 * (SIZE // 16) + x // 16, c * 256 + y % 16 * 16 + x % 16
            squares.append((painted[b, cell, inside].item() - (batch["image"][b, y, x, c].item() / 127.5 - 1)) ** 2)
        assert planner.loss({k: v[:2] for k, v in batch.items()})[1]["image"] == pytest.approx(np.mean(squares), rel=1e-3)
    assert loss.item() == pytest.approx(10 * parts["track"] + parts.get("image", 0), rel=1e-5)


def test_every_parameter_gets_a_gradient(asked):
    planner, batch = asked
    torch.manual_seed(0)
    planner.train().loss(batch)[0].backward()
    assert not [n for n, p in planner.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_the_future_is_not_known(asked):
    """Changing it changes the loss and not what is said."""
    planner, batch = asked
    planner.eval()
    changed = batch | {"tracks": batch["tracks"].clone()}
    changed["tracks"][:, 1:] += 0.3
    said = []
    tokens = planner.tokens
    planner.tokens = lambda *arguments: said.append(arguments) or tokens(*arguments)
    assert planner.loss(batch)[0] != planner.loss(changed)[0]
    assert all(torch.equal(a, b) for a, b in zip(said[0][:3], said[1][:3]))


def test_points_may_come_in_any_order_and_number(asked):
    planner, batch = asked
    order = torch.randperm(32)
    with torch.no_grad():
        said = planner.eval()(batch["image"], batch["tracks"][:, 0], batch["goal"])[0]
        mixed = planner(batch["image"], batch["tracks"][:, 0, order], batch["goal"])[0]
        one = planner(batch["image"], batch["tracks"][:, 0, :1], batch["goal"])[0]
    torch.testing.assert_close(mixed, said[:, :, order], atol=1e-5, rtol=1e-4)
    assert one.shape == (4, track_planner.STEPS, 1, 2)


def test_task_and_picture_matter(asked):
    planner, batch = asked
    with torch.no_grad():
        for head in (planner.track_head,):
            torch.nn.init.normal_(head.weight)
        said = planner.eval()(batch["image"], batch["tracks"][:, 0], batch["goal"])[0]
        for key in ("goal", "image"):
            other = batch[key].flip(-1) if key == "goal" else 255 - batch["image"]
            changed = batch | {key: other}
            assert not torch.allclose(planner(changed["image"], batch["tracks"][:, 0], changed["goal"])[0], said, atol=1e-5)


def test_masked_patches_are_not_seen(videos):
    planner = small(*PAPER)
    batch = tensors(track_planner.training_batch(videos, 0, planner.config))
    with torch.no_grad():
        a = planner.eval()(batch["image"], batch["tracks"][:, 0], batch["goal"], mask_ratio=1.0)
        b = planner(255 - batch["image"], batch["tracks"][:, 0], batch["goal"], mask_ratio=1.0)
    assert torch.equal(a[0], b[0])


def test_latent_plan(videos):
    planner = small()
    batch = tensors(track_planner.training_batch(videos, 0, planner.config))
    plan, pixels = planner.eval().plan(batch["image"], networks.grid_points(6).expand(4, -1, -1), batch["goal"])
    assert plan.shape == (4, 36, 4 * 32) and pixels.shape == (4, planner.n, 32) and not plan.requires_grad


def test_one_batch_is_overfitted(videos, tmp_path):
    c = config("--steps", "300", "--lr", "3e-3")
    torch.manual_seed(0)
    planner = track_planner.TrackPlanner(c, 384)
    batch = track_planner.training_batch(videos, 0, c)
    planner.train = lambda mode=True: torch.nn.Module.train(planner, False)     # without augmentation
    before = planner.loss(tensors(batch))[1]["track"]
    training.fit(planner, lambda step: batch, c, tmp_path / "t.pt")
    assert planner.loss(tensors(batch))[1]["track"] < 0.05 * before


# --- augmentation ---------------------------------------------------------------------------------


def test_the_dot_stays_on_its_track():
    """A white dot and its track, moved together; H != W."""
    rng = np.random.default_rng(0)
    B, H, W = 64, 40, 56
    x, y = rng.integers(8, W - 8, B), rng.integers(8, H - 8, B)
    images = np.zeros((B, H, W, 3), np.uint8)
    images[np.arange(B), y, x] = 255
    place = np.stack([(x + 0.5) / W, (y + 0.5) / H], -1)
    tracks = torch.as_tensor(np.repeat(place[:, None, None], 3, 1), dtype=torch.float32)    # (B, 3, 1, 2)
    moved, after = track_planner.augment(torch.as_tensor(images), tracks, 0.0)
    shifts = set()
    for b in range(B):
        row, column = np.argwhere(moved[b, :, :, 0].numpy())[0]
        assert np.allclose(after[b, 2, 0].numpy() * [W, H], [column + 0.5, row + 0.5], atol=0.5)
        shifts.add((column - x[b], row - y[b]))
    assert len(shifts) > 20


def test_colours_are_jittered(videos):
    planner = small()
    batch = tensors(track_planner.training_batch(videos, 0, planner.config))
    torch.manual_seed(1)
    images, _ = track_planner.augment(batch["image"], batch["tracks"], 0.3)
    assert images.shape == batch["image"].shape and images.dtype == torch.uint8
    assert (images.float().mean((1, 2)) - batch["image"].float().mean((1, 2))).abs().max() > 5


# --- data -----------------------------------------------------------------------------------------


def test_batch_is_what_the_file_holds(videos):
    c = config("--number", "16")
    episode, t = np.array([0, 1]), np.array([5, videos.length[1] - 3])
    for camera in CAMERAS:
        batch = track_planner.make_batch(videos, camera, episode, t, np.random.default_rng(0), c)
        assert batch["tracks"].shape == (2, 1 + track_planner.STEPS, 16, 2) and batch["goal"].shape == (2, 384)
        for b in range(2):
            assert np.array_equal(batch["image"][b], videos.arrays[f"obs/{camera}_rgb"][b][t[b]])
            true = videos.arrays[f"tracks/{camera}"][b].astype(np.float32)
            seen = videos.arrays[f"visible/{camera}"][b]
            for n in range(16):
                k = np.flatnonzero((true[t[b]] == batch["tracks"][b, 0, n]).all(-1))
                assert seen[t[b], k].any(), "only points visible now"
                times = np.minimum(t[b] + np.arange(1 + track_planner.STEPS), videos.length[b] - 1)
                assert any(np.array_equal(true[times, i], batch["tracks"][b, :, n]) for i in k)
                assert any(np.array_equal(true[t[b] - 1, i], batch["before"][b, 0, n]) for i in k)


def test_both_cameras_are_trained(videos):
    batch = track_planner.training_batch(videos, 0, config())
    frames = {c: np.concatenate([np.asarray(a) for a in videos.arrays[f"obs/{c}_rgb"]]) for c in CAMERAS}
    found = [[(frames[c] == picture).all((1, 2, 3)).any() for c in CAMERAS] for picture in batch["image"]]
    assert np.sum(found, 0).tolist() == [2, 2]


def test_the_hand_is_where_the_robot_ends(videos):
    """MimicPlay's one point lies at the lower end of the robot's mask, in the third-person picture."""
    c = config("--points", "ee")
    episode, t = np.repeat([0, 1], 5), np.tile(np.arange(5) * 8, 2)
    batch = track_planner.make_batch(videos, "agentview", episode, t, np.random.default_rng(0), c)
    assert batch["tracks"].shape == (10, 1 + track_planner.STEPS, 1, 2)
    for b in range(10):
        y, x = np.nonzero(videos.arrays["masks"][episode[b]][t[b]] == 1)
        gap = np.hypot(x + 0.5 - SIZE * batch["tracks"][b, 0, 0, 0], y + 0.5 - SIZE * batch["tracks"][b, 0, 0, 1])
        assert gap.min() < 6
    assert track_planner.cameras_of(c, videos) == ["agentview"]


def test_scores_of_points_that_stay(videos):
    """The trivial tracks, from their definition."""
    planner = small()
    torch.nn.init.zeros_(planner.track_head.weight)     # says that points stay
    torch.nn.init.zeros_(planner.track_head.bias)
    scores = track_planner.validate(planner, videos, samples=50)
    for rows in scores.values():
        np.testing.assert_allclose(rows["planner"]["distance"], rows["stay"]["distance"], rtol=1e-5)
        assert rows["stay"]["distance"][2] > rows["stay"]["distance"][0] > 0
        assert rows["keep on"]["distance"][0] < rows["stay"]["distance"][0]
    text = track_planner.table(scores)
    assert "agentview" in text and "keep on" in text and f"{scores['agentview']['stay']['within']:.1f} %" in text


# --- other bodies ---------------------------------------------------------------------------------


@pytest.fixture
def two_bodies(data, data_file, tmp_path):
    """two_bodies(change) -> folder with the shared data and, as Meta-World's door-open, a changed copy of it."""

    def two_bodies(change):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data, folder)
        (folder / "door-open").mkdir()
        copy = shutil.copy(data_file, folder / "door-open" / "door-open.hdf5")
        with h5py.File(copy, "r+") as f:
            change(f["data"])
        return folder

    return two_bodies


def darker(file):
    for demo in file.values():
        for camera in CAMERAS:
            demo[f"obs/{camera}_rgb"][:] //= 2


def test_videos_of_two_bodies_are_mixed(two_bodies, tmp_path, task):
    """Pictures, tracks, sentence and goal of a sample are of one body; scores are of the suite alone."""
    folder = two_bodies(darker)
    c = config("--videos", f"{SUITE},door-open", "--data", str(folder), "--out", str(tmp_path))
    path = record.run_path(c, "track")
    assert path == tmp_path / SUITE / f"track-from-{SUITE}+door-open.pt"
    videos, held_out, note = record.prepare(c, path, "track_planner")
    assert videos.tasks == [task, "door-open"] and held_out.tasks == [task] and note.startswith("4 videos of 2 tasks")
    bright, dark = Episodes(folder, SUITE, [task], 2), Episodes(folder, "door-open", ["door-open"], 2)
    assert len(videos) == len(bright) + len(dark) and videos.text.shape == (2, 384)
    for e in range(4):
        part, i = (bright, e) if e < 2 else (dark, e - 2)
        for key in ("obs/agentview_rgb", "tracks/eye_in_hand", "hand"):
            assert np.array_equal(videos.gather(key, e, 7), part.gather(key, i, 7))
    goals = videos.goal_of(np.arange(4), np.random.default_rng(0))
    assert goals.tolist() == [1, 0, 2, 3], "in Meta-World the goal is the scene's own"
    drawn = np.concatenate([videos.draw(step, 32, 0)[0] for step in range(4)])
    assert 0.3 < (drawn >= 2).mean() < 0.7


def test_as_many_videos_of_a_body_as_asked(two_bodies, tmp_path, task, refused):
    folder = two_bodies(darker)
    c = config("--videos", f"{SUITE}:1,door-open", "--data", str(folder), "--out", str(tmp_path))
    path = record.run_path(c, "track")
    assert path.stem == f"track-from-{SUITE}-1+door-open"
    videos, held_out, note = record.prepare(c, path, "track_planner")
    assert videos.task.tolist() == [0, 1, 1] and note.startswith("3 videos")
    usual = config("--videos", f"{SUITE}:2")
    assert record.run_path(usual, "track").stem == "track" and usual.videos == ""
    for bad in (f"{SUITE}:0", f"{SUITE}:many"):
        refused(lambda: record.sources(config("--videos", bad)), bad)


@pytest.mark.parametrize("sources", [f"{SUITE}, door-open", "door-open"])
def test_training_on_another_body(two_bodies, tmp_path, sources):
    folder = two_bodies(darker)
    track_planner.main([*COMMAND, "--data", str(folder), "--out", str(tmp_path), "--videos", sources])
    path = tmp_path / SUITE / f"track-from-{sources.replace(', ', '+')}.pt"
    planner = track_planner.load_planner(path)
    argv = [*EXECUTOR, "--planner", str(path), "--data", str(folder), "--out", str(tmp_path)]
    model, actions, made = executor.build(parse(executor.Config, "", argv))
    assert model.extra["suite"] == planner.config.suite == SUITE and len(actions.demos.length) == 2
    assert made.name == f"{path.stem}_executor_d2.pt"


def test_videos_that_do_not_fit_are_one_line(two_bodies, tmp_path, refused):
    def texts(file):
        file.attrs["text_embedding"] = np.zeros(512, np.float32)

    def fewer(file):
        for demo in file.values():
            for what in ("tracks", "visible"):
                kept = demo[f"{what}/agentview"][:, :100]
                del demo[f"{what}/agentview"]
                demo[f"{what}/agentview"] = kept

    def smaller(file):
        file.attrs["size"] = 64

    for change, words in ((texts, ("384", "512", "--text")), (fewer, ("256", "100")), (smaller, ("64 px", "96 px"))):
        c = config("--videos", f"{SUITE},door-open", "--data", str(two_bodies(change)))
        refused(lambda: record.prepare(c, tmp_path / "x.pt", "track_planner"), "door-open", "--data", *words)
    refused(lambda: record.prepare(config("--videos", "door-opener"), tmp_path / "x.pt", "track_planner"), "door-opener")


# --- the command ----------------------------------------------------------------------------------


def test_command(data, tmp_path, capsys):
    where = ["--data", str(data), "--out", str(tmp_path)]
    track_planner.main([*COMMAND, *where])
    path = tmp_path / SUITE / "track.pt"
    out = capsys.readouterr().out
    assert "told by language" in out and f"--planner {path}" in out
    assert path.with_suffix(".txt").read_text() in out and path.with_suffix(".png").exists()
    planner = track_planner.load_planner(path)
    assert not planner.training and not any(p.requires_grad for p in planner.parameters())
    assert [json.loads(line)["step"] for line in open(path.with_suffix(".jsonl"))] == [5]
    track_planner.main([*COMMAND, *where, "--show"])
    for flags, name in ((["--points", "ee"], "ee"), (["--goal", "image"], "track-image")):
        track_planner.main([*COMMAND, *where, *flags])
        assert (tmp_path / SUITE / f"{name}.pt").exists()


def test_bad_input_is_one_line(data, tmp_path, refused):
    where = ["--data", str(data), "--out", str(tmp_path)]
    refused(lambda: track_planner.main([*COMMAND, *where, "--show"]), "track.pt", "python track_planner.py")
    refused(lambda: track_planner.TrackPlanner(config("--size", "100"), 384), "100", "16")


@pytest.mark.parametrize("when", ["step", "save"])
def test_killed_training_continues_exactly(data, tmp_path, capsys, when, monkeypatch):
    monkeypatch.setattr(track_planner.Config, "save_every", 2)
    argv = [*COMMAND, "--steps", "6", "--data", str(data)]
    track_planner.main([*argv, "--out", str(tmp_path / "whole")])
    run_and_kill("track_planner", when, [*argv, "--out", str(tmp_path / "broken")])
    track_planner.main([*argv, "--out", str(tmp_path / "broken")])
    assert "at step 2: continuing" in capsys.readouterr().out
    one, other = (training.load(tmp_path / name / SUITE / "track.pt") for name in ("whole", "broken"))
    assert other["step"] == 6 and equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])
