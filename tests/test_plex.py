"""baselines/plex.py: the features to come teach the planner, the actions teach the encoder."""

import numpy as np
import pytest
import torch

from baselines import plex
from conftest import TRAIN
from core.planners import load_planner
from test_mask_planner import overfit


@pytest.fixture
def planner():
    torch.manual_seed(0)
    values = plex.Config.PRESETS["tiny"] | dict(preset="tiny", A=7)
    return plex.FeaturePlanner(plex.Config(**values)).train()


@pytest.fixture
def batch(videos, planner):
    return plex.tensors(plex.make_batch(videos, 5, planner.config, 3, videos), planner)


def test_batch_is_what_the_file_holds(videos, batch):
    rows = lambda key, e, t: videos.arrays[key][e][np.clip(t, 0, videos.length[e] - 1)]
    for b, (e, t) in enumerate(zip(*videos.sample_frames(5, 4, 3)[:2])):
        for name, times in (("frames", [-4, 0]), ("future", [4, 8, 16, 32])):
            assert np.array_equal(batch[name][b], rows(plex.PICTURE, e, np.add(t, times)))
        assert np.array_equal(batch["goal"][b], videos.last_frames(1 - e)), "another one's end"
    for b, (e, t) in enumerate(zip(*videos.sample_frames(5, 2, 1)[:2])):
        assert np.array_equal(batch["pair"][b], rows(plex.PICTURE, e, np.add(t, [0, 8])))
        assert np.array_equal(batch["action"][b], rows("actions", e, t + np.arange(8)))


def test_the_future_teaches_the_planner_and_not_the_encoder(planner, batch):
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
    gradients = lambda loss, module: torch.autograd.grad(
        loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    for a, b in zip(gradients(whole, planner.encoder), gradients(inverse, planner.encoder)):
        torch.testing.assert_close(a, b)
    whole.backward()
    assert not [n for n, p in planner.named_parameters() if p.grad is None or not p.grad.any()]


def test_program(data, tmp_path):
    plex.main(where := [*TRAIN, "--data", str(data), "--out", str(tmp_path)])
    planner = load_planner(path := next(tmp_path.glob("*/feature*.pt")))
    assert "stay" in path.with_suffix(".txt").read_text() and path.with_suffix(".png").exists()
    assert planner.config.A == 7 and planner.sets("latent").keys() == {"picture", "plan"}
    plex.main([*where, "--show"])


@pytest.mark.slow
def test_one_batch_is_overfitted(planner, batch):
    first, last = overfit(planner, batch, 100)
    assert all(last[k] < 0.5 * first[k] for k in first), (first, last)
