"""baselines: cloning, R3M's encoder behind the planners' interface, VPT's labelled suite."""

import h5py
import numpy as np
import pytest
import torch
import torchvision

from conftest import EXECUTOR, SUITE, TRAIN

import executor
from baselines import cloning, vpt
from core import planners, training
from core.episodes import Episodes
from core.flags import parse


def published(folder, depth, **changes):
    """A file as R3M's authors publish it, with random weights -> path, the ResNet's state."""
    net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    net.fc = torch.nn.Identity()
    state = {f"module.convnet.{k}": v for k, v in net.state_dict().items()} | changes
    path = folder / f"r3m_{depth}.pt"
    torch.save({"r3m": state | {"module.lang.weight": torch.zeros(3)}, "global_step": 1}, path)
    return path, net.state_dict()


def test_r3m_is_the_published_encoder(data, tmp_path):
    """Both cameras' weights are the file's, the executor trains them, BatchNorm keeps its
    statistics, and its checkpoint needs no other file."""
    path, state = published(tmp_path, 18)
    cloning.main(["--r3m", str(path), "--size", "64", "--out", str(tmp_path / "r3m.pt")])
    planner = planners.load_planner(tmp_path / "r3m.pt")
    for encoder in (planner.encoder, planner.wrist):
        assert all(torch.equal(v, state[k]) for k, v in encoder.convnet.state_dict().items())
    executor.main([*EXECUTOR, "--planner", str(tmp_path / "r3m.pt"), "--suite", SUITE, "--tasks",
                   "0", "--data", str(data), "--out", str(tmp_path)])
    path.unlink(), (tmp_path / "r3m.pt").unlink()
    trained = executor.load_executor(tmp_path / SUITE / "r3m_executor_tasks0.pt")
    assert not trained.encoders, "R3M's encoders serve both cameras"
    for name, v in trained.planner.encoder.convnet.state_dict().items():
        kept = "running" in name or "batches" in name
        assert torch.equal(v, state[name]) == kept, name


@pytest.mark.parametrize("depth", [34, 50])
def test_the_depth_is_read_off_the_file(tmp_path, depth):
    path, state = published(tmp_path, depth)
    weights, found = cloning.read_r3m(path)
    assert found == depth and weights.keys() == state.keys()


def test_a_wrong_file_is_one_line(tmp_path, refused):
    refused(lambda: cloning.R3MCloning(cloning.Config()), "--r3m")
    refused(lambda: cloning.main(["--out", str(tmp_path / "r3m.pt")]), "--r3m")
    refused(lambda: cloning.read_r3m(tmp_path / "no.pt"), "no.pt", "R3M's authors")
    torch.save({"model": {}}, tmp_path / "other.pt")
    refused(lambda: cloning.read_r3m(tmp_path / "other.pt"), "module.convnet.")
    path, _ = published(tmp_path, 18, **{"module.convnet.conv1.weight": torch.zeros(3)})
    refused(lambda: cloning.read_r3m(path), "ResNet-18", "conv1.weight")


def test_cloning_encodes_both_pictures_alike(data):
    planner = cloning.Cloning(cloning.Config(size=64, width=32, channels=16)).eval()
    picture = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    sets = planner.plan({"frames": picture[:, None], "goal": picture}, "goal")
    torch.testing.assert_close(sets["picture"], sets["goal"], atol=1e-5, rtol=1e-4)
    places, width = planner.sets("goal")["goal"]
    assert sets["goal"].shape == (2, len(places), width)


def test_the_sentence_is_one_token():
    planner = cloning.LanguageCloning(cloning.Config(size=64, E=7))
    text = torch.randn(2, 7)
    assert torch.equal(planner.plan({"text": text}, "sentence")["sentence"], text[:, None])
    places, width = planner.sets("sentence")["sentence"]
    assert places.shape == (1, 3) and width == 7


# --- VPT ------------------------------------------------------------------------------------------


def test_inverse_dynamics_looks_ahead_and_not_beyond_the_end(videos):
    config = parse(vpt.Config, "", TRAIN)
    labels = np.concatenate([np.concatenate(videos.arrays[k]) for k in vpt.LABELS], 1)
    model = vpt.InverseDynamics(config, labels.mean(0), labels.std(0).clip(1e-3)).eval()
    pictures = [videos.arrays[k][0][:20] for k in vpt.PICTURES]
    whole = model.label(pictures)
    changed = [p.copy() for p in pictures]
    for p in changed:
        p[10] = 255
    same = np.isclose(whole, model.label(changed), atol=1e-4).all(1)
    assert np.flatnonzero(~same).tolist() == [2, 8, 10]
    np.testing.assert_allclose(model.label([p[:13] for p in pictures])[:5], whole[:5], atol=1e-4)


def test_a_labelled_suite(data, task, tmp_path, refused):
    """Actions and states of all videos are the model's, nothing else changes; the executor takes
    the suite, and its simulator is the parent's."""
    import shutil
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    argv = [*TRAIN, "--data", str(folder), "--out", str(tmp_path), "--action-demos", "1"]
    vpt.main(argv)
    with (h5py.File(folder / SUITE / f"{task}.hdf5") as a,
          h5py.File(folder / f"{SUITE}_vpt1" / f"{task}.hdf5") as b):
        for name in a["data"]:
            for key in ("actions", "obs/ee_states", "obs/gripper_states"):
                assert not np.allclose(a["data"][name][key], b["data"][name][key])
            for key in ("obs/agentview_rgb", "masks", "obs/joint_states"):
                assert np.array_equal(a["data"][name][key], b["data"][name][key])
    labelled = Episodes(folder, f"{SUITE}_vpt1", [task], 2)
    assert labelled.env == SUITE and labelled.suite == f"{SUITE}_vpt1"
    executor.main([*EXECUTOR, "--planner", "none", "--suite", f"{SUITE}_vpt1", "--data",
                   str(folder), "--out", str(tmp_path)])
    content = training.load(tmp_path / f"{SUITE}_vpt1" / "none_executor.pt")
    assert content["config"]["env"] == SUITE
    refused(lambda: vpt.main(argv), "exists", "--data")


@pytest.mark.slow
def test_labels_are_close_to_the_true_actions(videos):
    """On what the model was trained on."""
    config = parse(vpt.Config, "", [*TRAIN, "--steps", "300", "--batch", "16"])
    labels = np.concatenate([np.concatenate(videos.arrays[k]) for k in vpt.LABELS], 1)
    torch.manual_seed(0)
    model = vpt.InverseDynamics(config, labels.mean(0), labels.std(0).clip(1e-3))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(300):
        batch = vpt.make_batch(videos, labels, step, config)
        loss, _ = model.loss({k: torch.as_tensor(v) for k, v in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval().label([videos.arrays[k][0] for k in vpt.PICTURES])[:, :7]
    true = videos.arrays["actions"][0]
    assert np.square(found - true).mean() < 0.5 * np.square(true - true.mean(0)).mean()
