"""baselines: cloning, R3M's encoder behind the planners' interface, PLEX, VPT's labelled suite."""

import numpy as np
import pytest
import torch
import torchvision

from conftest import EXECUTOR, SUITE, TRAIN, equal, overfit
import executor
from baselines import cloning, plex, vpt
from core import planners, training
from core.episodes import Episodes


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
        assert equal(dict(encoder.convnet.state_dict()), dict(state))
    executor.main([*TRAIN, "--planner", str(tmp_path / "r3m.pt"), "--data", str(data), "--out",
                   str(tmp_path)])
    path.unlink(), (tmp_path / "r3m.pt").unlink()
    trained = executor.load_executor(tmp_path / SUITE / "r3m_executor_tasks0.pt")
    assert not trained.encoders, "R3M's encoders serve both cameras"
    for name, v in trained.planner.encoder.convnet.state_dict().items():
        kept = "running" in name or "batches" in name
        assert torch.equal(v, state[name]) == kept, name


def test_the_depth_is_read_off_the_file_and_a_wrong_file_is_one_line(tmp_path, refused):
    for depth in (34, 50):
        path, state = published(tmp_path, depth)
        weights, found = cloning.read_r3m(path)
        assert found == depth and weights.keys() == state.keys()
    refused(lambda: cloning.R3MCloning(cloning.Config()), "--r3m")
    torch.save({"r3m": 1}, tmp_path / "other.pt")
    refused(lambda: cloning.read_r3m(tmp_path / "other.pt"), "module.convnet.")
    path, _ = published(tmp_path, 18, **{"module.convnet.conv1.weight": torch.zeros(3)})
    refused(lambda: cloning.read_r3m(path), "ResNet-18", "conv1.weight")


def test_plans_of_cloning():
    """Both pictures through one encoder; the sentence is one token."""
    picture, text = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8), torch.randn(2, 7)
    obs = {"frames": picture[:, None], "goal": picture, "text": text}
    for Planner in (cloning.Cloning, cloning.LanguageCloning):
        planner, form = Planner(cloning.Config(size=64, E=7)).eval(), Planner.forms[0]
        plan = planner.plan(obs, form)
        for name, (places, width) in planner.sets(form).items():
            assert plan[name].shape == (2, len(places), width)
            torch.testing.assert_close(plan[name], plan.get("goal", text[:, None]), atol=1e-5,
                                       rtol=1e-4)


def test_plex(untrained, videos):
    """Its batch is what the file holds; the future teaches its planner and not its encoder."""
    planner, batches, *_ = untrained("baselines.plex", "--seed", "3")
    batch, rows = batches(5), lambda key, e, t: videos.arrays[key][e][
        np.clip(t, 0, videos.length[e] - 1)]
    assert planner.config.A == 7
    for b, (e, t) in enumerate(zip(*videos.sample_frames(5, 4, 3)[:2])):
        for name, times in (("frames", [-4, 0]), ("future", [4, 8, 16, 32])):
            assert np.array_equal(batch[name][b], rows(plex.PICTURE, e, np.add(t, times)))
        assert np.array_equal(batch["goal"][b], videos.last_frames(1 - e)), "another one's end"
    for b, (e, t) in enumerate(zip(*videos.sample_frames(5, 2, 4)[:2])):
        assert np.array_equal(batch["pair"][b], rows(plex.PICTURE, e, np.add(t, [0, 8])))
        assert np.array_equal(batch["action"][b], rows("actions", e, t + np.arange(8)))
    for p in planner.parameters():
        torch.nn.init.normal_(p, std=0.05)
    whole, parts = planner.loss(batch)
    inverse = (planner.actions(batch["pair"]) - batch["action"]).square().mean()
    with torch.no_grad():
        plan = planner.predict(planner(batch["frames"], batch["goal"])[:, -1])
        x = planner.encode(batch["future"])
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert parts["future"] == pytest.approx((plan - x).square().mean().item(), rel=1e-4)
    assert whole.item() == pytest.approx(parts["future"] + inverse.item(), rel=1e-4)
    gradients = lambda loss: torch.autograd.grad(
        loss, list(planner.encoder.parameters()), retain_graph=True, allow_unused=True)
    for a, b in zip(gradients(whole), gradients(inverse)):
        torch.testing.assert_close(a, b)


def test_inverse_dynamics_looks_ahead_and_not_beyond_the_end(untrained, videos):
    model = untrained("baselines.vpt")[0].eval()
    pictures = [videos.arrays[k][0][:20] for k in vpt.PICTURES]
    whole = model.label(pictures)
    changed = [np.concatenate([p[:10], p[10:11] | 255, p[11:]]) for p in pictures]
    same = np.isclose(whole, model.label(changed), atol=1e-4).all(1)
    assert np.flatnonzero(~same).tolist() == [2, 8, 10]
    np.testing.assert_allclose(model.label([p[:13] for p in pictures])[:5], whole[:5], atol=1e-4)


def test_a_labelled_suite(copied, task, tmp_path, refused):
    """Actions and states of all videos are the model's, nothing else changes; the executor takes
    the suite, and its simulator is the parent's."""
    folder = copied[0]
    argv = [*TRAIN, "--data", str(folder), "--out", str(tmp_path), "--action-demos", "1"]
    vpt.main(argv)
    old, new = (Episodes(folder, suite, [task], 2) for suite in (SUITE, f"{SUITE}_vpt1"))
    assert old.env == new.env == SUITE
    for key in old.arrays:
        for a, b in zip(old.arrays[key], new.arrays[key], strict=True):
            assert np.allclose(a, b) != (key in vpt.LABELS), key
    executor.main([*EXECUTOR, "--planner", "none", "--suite", f"{SUITE}_vpt1", "--data",
                   str(folder), "--out", str(tmp_path)])
    content = training.load(tmp_path / f"{SUITE}_vpt1" / "none_executor.pt")
    assert [content["config"][k] for k in ("env", "plan")] == [SUITE, "none_vpt1"], "tabled apart"
    refused(lambda: vpt.main(argv), "exists", "--data")


@pytest.mark.slow
def test_labels_are_close_to_the_true_actions(untrained, videos):
    """Of an episode of which the model was trained on a third of the frames."""
    model, batches, *_ = untrained("baselines.vpt", "--batch", "48")
    overfit(model, batches(0), 100)
    found = model.eval().label([videos.arrays[k][0] for k in vpt.PICTURES])[:, :7]
    true = videos.arrays["actions"][0]
    assert np.square(found - true).mean() < 0.5 * np.square(true - true.mean(0)).mean()
