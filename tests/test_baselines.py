"""baselines.py: R3M's published file becomes the encoders, VPT's labels become the actions, a sentence the task."""

import numpy as np
import pytest
import torch
import torchvision

from conftest import EXECUTOR, SIZE
from test_executor import frame_of, tensors

import executor
from baselines import cloning, vpt
from core import training
from core.flags import parse

CLONE = ["--planner", "none", "--tasks", "0"]


@pytest.fixture
def build(data, tmp_path):
    """build(*flags) -> a new clone, its data, the path of its checkpoint."""

    def build(*flags):
        argv = [*EXECUTOR, *CLONE, "--data", str(data), "--out", str(tmp_path), *flags]
        return executor.build(parse(executor.Config, "", argv))

    return build


def published(path, depth=18, **changes):
    """A file as R3M's authors publish it, with random weights -> path, the ResNet's state."""
    torch.manual_seed(depth)
    net = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    net.fc = torch.nn.Identity()
    state = {f"module.convnet.{k}": v for k, v in net.state_dict().items()}
    state |= {"module.lang_rew.pred.0.weight": torch.zeros(2, 2)} | changes
    torch.save({"r3m": {k: v for k, v in state.items() if v is not None}, "global_step": 7}, path)
    return path, net.eval()


# --- R3M ------------------------------------------------------------------------------------------


def test_the_encoders_are_the_published_ones(build, tmp_path):
    path, net = published(tmp_path / "r3m.pt")
    model, actions, made = build("--encoder", "r3m", "--weights", str(path))
    assert made.name == "r3m_executor_d2.pt"
    for encoder in (model.encoder, model.wrist_encoder):
        state = encoder.convnet.state_dict()
        assert state.keys() == net.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    images = torch.randint(256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    maps = torch.nn.Sequential(*list(net.children())[:-2])
    with torch.no_grad():
        said = model.train().encoder(images)    # in training, too, with the published statistics
        torch.testing.assert_close(said, model.encoder.head(maps(x)), atol=1e-4, rtol=1e-4)
    assert said.shape == (2, 32, 3, 3) and model.encoder.cells(SIZE) == 3
    model.loss(tensors(actions(0)))[0].backward()
    assert all(p.grad.abs().max() > 0 for p in model.encoder.convnet.parameters()), "they are trained on"


def test_the_checkpoint_needs_no_weights_file(build, tmp_path):
    path, _ = published(tmp_path / "r3m.pt")
    model, actions, made = build("--encoder", "r3m", "--weights", str(path), "--steps", "2")
    model = training.fit(model, actions, model.config, made, extra=model.extra)
    path.unlink()
    again, batch = executor.load_executor(made), tensors(actions(0))
    with torch.no_grad():
        assert torch.equal(model(batch)[0], again(batch)[0])


@pytest.mark.parametrize("depth", [34, 50])
def test_the_depth_is_read_off_the_file(tmp_path, depth):
    weights, found = cloning.read_r3m(published(tmp_path / "r3m.pt", depth)[0])
    assert found == depth
    cloning.R3M(8, depth).convnet.load_state_dict(weights)


def test_a_wrong_file_is_one_line(build, tmp_path, refused):
    asked = lambda path: lambda: build("--encoder", "r3m", "--weights", str(path))
    refused(asked(tmp_path / "none.pt"), "none.pt", "R3M")
    (tmp_path / "text.pt").write_text("no weights")
    refused(asked(tmp_path / "text.pt"), "text.pt", "R3M")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    refused(asked(tmp_path / "other.pt"), "other.pt", "module.convnet.", "published")
    name = "module.convnet.layer3.0.conv1.weight"
    for value in (None, torch.zeros(3)):
        refused(asked(published(tmp_path / "cut.pt", **{name: value})[0]), "cut.pt", "ResNet-18", "layer3.0.conv1.weight")
    refused(lambda: build("--encoder", "r3m"), "--encoder r3m", "--weights")
    refused(lambda: build("--weights", "r3m.pt"), "--encoder r3m", "--weights")


# --- VPT ------------------------------------------------------------------------------------------


def test_labels_are_close_to_the_true_actions(videos, data, tmp_path):
    """On what the inverse dynamics model was trained on; what it is not asked for stays."""
    c = parse(executor.Config, "", [*EXECUTOR, *CLONE, "--steps", "200", "--batch", "16", "--lr", "3e-3"])
    labelled = vpt.vpt(videos, videos, c, tmp_path / "inverse.pt", executor.STATE)
    for name in ("actions", *executor.STATE):
        said, true = (np.concatenate(e.arrays[name]) for e in (labelled, videos))
        assert said.shape == true.shape and not np.array_equal(said, true)
        error, spread = np.square(said - true).mean(), np.square(true - true.mean(0)).mean()
        assert error < 0.3 * spread, (name, error, spread)
    assert labelled.arrays["masks"] is videos.arrays["masks"] and len(labelled) == len(videos)


def test_it_looks_ahead_and_not_beyond_the_end(videos):
    c = parse(executor.Config, "", [*EXECUTOR, *CLONE])
    model = vpt.InverseDynamics(c, SIZE, np.zeros(15, np.float32), np.ones(15, np.float32)).eval()
    views = [videos.arrays[k][0][:20] for k in vpt.PICTURES]
    said = model.label(views)
    assert said.shape == (20, 15)
    last = [np.concatenate([v, np.repeat(v[-1:], 8, 0)]) for v in views]
    np.testing.assert_allclose(model.label(last)[:20], said, atol=1e-4)
    np.testing.assert_allclose(model.label([v[:9] for v in views])[0], said[0], atol=1e-4)
    changed = [v.copy() for v in views]
    changed[1][8] = 255 - changed[1][8]
    assert np.flatnonzero(np.abs(model.label(changed) - said).max(1) > 1e-4).tolist() == [0, 6, 8]


def test_the_clone_learns_from_the_labels_alone(build, videos, monkeypatch):
    """Actions, states and waypoints of all videos are the model's; none of the file's is used."""
    model, actions, path = build("--labels", "vpt", "--action-demos", "1")
    assert path.name == "vpt_executor_d1.pt" and path.with_stem("vpt_executor_d1_inverse").exists()
    assert len(actions.demos.length) == 2, "both videos, not the one demonstration"
    said = np.concatenate(actions.demos.arrays["actions"])
    assert not np.allclose(said, np.concatenate(videos.arrays["actions"]), atol=1e-3)
    state = np.concatenate([np.concatenate(actions.demos.arrays[k]) for k in executor.STATE], 1)
    np.testing.assert_allclose(model.mean, state.mean(0), atol=1e-4)
    episode, row = actions(0)["state"], {tuple(np.round(s, 4)) for s in state}
    assert all(tuple(np.round(s, 4)) in row for s in episode[:, 0])


# --- language -------------------------------------------------------------------------------------


def test_a_clone_told_by_language(build, videos):
    model, actions, path = build("--goal", "language")
    assert path.name == "none-language_executor_d2.pt"
    batch = tensors(actions(0))
    assert batch["goal"].shape == (4, 1, 384) and np.array_equal(batch["goal"][0, 0], videos.text[0])
    with torch.no_grad():
        said = model.eval()(batch)[0]
        other = model(batch | {"goal": -batch["goal"]})[0]
    assert not torch.allclose(said, other)
    policy = executor.Policy(model)
    policy.reset(model.goals[0, 0])
    first = policy(frame_of(videos, 0, 0))
    policy.reset(255 - model.goals[0, 0])
    assert np.array_equal(first, policy(frame_of(videos, 0, 0))), "the goal picture is not looked at"


def test_flags_of_cloning_are_refused_beside_a_plan(data, planner_path, tmp_path, refused):
    for flag, value in (("--goal", "language"), ("--labels", "vpt"), ("--encoder", "r3m")):
        argv = [*EXECUTOR, "--planner", str(planner_path), "--data", str(data), "--out", str(tmp_path), flag, value]
        refused(lambda: executor.main(argv), f"{flag} {value}", "--planner none", planner_path)
