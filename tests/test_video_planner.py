"""video_planner.py: diffusion, the factorised U-Net, clips, scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import SIZE, TRAIN
import video_planner as vp
from core.flags import parse
from core.networks import to_unit
from video_planner import FRAMES, to_residual


def small(*flags, **fields):
    config = parse(vp.Config, "", [*TRAIN, *flags])
    torch.manual_seed(0)
    return vp.VideoPlanner(replace(config, **dict(E=384, condition_dropout=0) | fields))


def observation(B=2, size=SIZE):
    torch.manual_seed(0)
    clip = torch.randint(256, (B, 1 + FRAMES, size, size, 3), dtype=torch.uint8)
    return {"clip": clip, "frames": clip[:, :1], "goal": clip[:, 3], "text": torch.randn(B, 384)}


@pytest.mark.parametrize("downsample", [1, 2])
def test_starts_as_an_image_network(downsample):
    """Dirac in time: at first a picture does not depend on the others of its clip."""
    net = small(channels=32, downsample=downsample, attention=(4,)).net
    torch.nn.init.normal_(net.last[-1].weight)      # else it predicts zeros
    for block in (m for m in net.modules() if isinstance(m, vp.ResBlock)):
        torch.nn.init.normal_(block.conv2.space.weight, std=0.1)
    x = torch.randn(1, FRAMES, 3, 16, 24)
    pictures = torch.randn(1, 6, 16 * downsample, 24 * downsample)
    forward = lambda x: net(x, pictures, torch.zeros(1, 0), torch.tensor([5]))
    whole = forward(x)                                      # (1, F, 3, 16 p, 24 p)
    alone = forward(x[:, 3:4].expand(-1, FRAMES, -1, -1, -1))
    assert torch.allclose(whole[:, 3], alone[:, 3], atol=1e-5)


def test_convolution_in_time_is_conv1d():
    conv = vp.VideoConv(4, 6)
    torch.nn.init.normal_(conv.time.weight)
    x = torch.randn(2 * FRAMES, 4, 5, 3)
    y = conv.space(x).unflatten(0, (2, FRAMES))                             # (B, F, C, H, W)
    kernel = conv.time.weight[:, :, 0, 0].unflatten(1, (3, 6)).transpose(1, 2)  # (o, C, 3)
    y = y.permute(0, 3, 4, 2, 1).flatten(0, 2)                              # (B H W, C, F)
    true = F.conv1d(y, kernel, conv.time.bias, padding=1).unflatten(0, (2, 5, 3))
    assert torch.allclose(conv(x), true.permute(0, 4, 3, 1, 2).flatten(0, 1), atol=1e-5)


def test_loss_is_the_weighted_error_of_the_clean_clip():
    planner, batch = small(), observation()
    torch.manual_seed(3)
    loss, parts = planner.loss(batch)
    torch.manual_seed(3)
    torch.rand(2)
    alpha_bar, clip = planner.alpha_bar[torch.randint(100, (2,))], to_unit(batch["clip"])
    x0 = to_residual(clip[:, 1:], clip[:, 0])           # an untrained network predicts zeros
    errors = [x0[b].square().mean() / (1 - alpha_bar[b]).clamp(min=0.2) for b in range(2)]
    assert torch.allclose(loss, sum(errors) / 2) and abs(parts["plain"] - x0.square().mean()) < 1e-4


def test_clips_have_one_range_and_at_first_nothing_changes():
    white = {k: torch.full_like(v, 255) for k, v in observation().items()}
    assert small().condition(white)[0].eq(1).all() and to_unit(0 * white["goal"]).eq(-1).all()
    planner, obs = small("--guidance", "1").eval(), observation()
    still = planner.imagine(obs)        # untrained it imagines that nothing changes
    assert torch.equal(still, obs["clip"][:, :1].expand_as(still))
    assert all((picture == obs["clip"][0, 0].numpy()).all() for _, picture in planner.draw(obs))
    times = vp.clip_times(np.array([0, 60, 98]), np.array([71, 100, 100]))  # to the episode's end
    assert times[:, 0].tolist() == [0, 60, 98] and times[:, -1].tolist() == [70, 99, 99]
    assert times[0].tolist() == vp.clip_times(0, 71).tolist() == list(range(0, 71, 10))


@pytest.mark.slow
def test_one_clip_is_overfitted(steps=200):
    """A square that moves: PSNR above 30 dB in every picture."""
    planner = small("--size", "32", "--goal", "language", "--sample-steps", "10", E=4)
    clip = torch.full((1, 1 + FRAMES, 32, 32, 3), 60, dtype=torch.uint8)
    for f in range(1 + FRAMES):
        clip[:, f, 8:16, 2 * f:2 * f + 8] = torch.tensor([220, 40, 160], dtype=torch.uint8)
    obs = {"clip": clip, "frames": clip[:, :1], "text": torch.ones(1, 4)}
    optimizer = torch.optim.AdamW(planner.parameters(), 5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] -= 5e-3 / steps
        optimizer.zero_grad()
        planner.loss({k: torch.cat([v, v]) for k, v in obs.items()})[0].backward()
        optimizer.step()
    imagined = planner.eval().imagine(obs, torch.Generator().manual_seed(1))
    pictures = (x[0].movedim(-1, 1).float() for x in (imagined, clip[:, 1:]))   # (F, 3, 32, 32)
    assert (vp.psnr(*pictures) > 30).all()


def test_ssim_is_the_mean_of_eq_13_over_windows():
    a, found = torch.randint(256, (1, 3, 9, 8)).double(), []
    b = (a + 20 * torch.randn(1, 3, 9, 8)).clamp(0, 255)
    for c, i, j in np.ndindex(3, 3, 2):
        x, y = (z[0, c, i:i + 7, j:j + 7].flatten().numpy() for z in (a, b))
        (vx, cov), (_, vy) = np.cov(x, y)
        found.append((2 * x.mean() * y.mean() + 2.55 ** 2) * (2 * cov + 7.65 ** 2)
                     / ((x.mean() ** 2 + y.mean() ** 2 + 2.55 ** 2) * (vx + vy + 7.65 ** 2)))
    assert abs(vp.ssim(a, b).item() - np.mean(found)) < 1e-6
    assert vp.ssim(a, a) == 1 and vp.psnr(a, a) == 60
    assert abs(vp.psnr(a, a + 255 / 10).item() - 20) < 1e-6
