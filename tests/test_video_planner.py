"""video_planner.py: diffusion, the factorised U-Net, the interface, clips, scores, resumption."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import SIZE, SUITE, TRAIN, equal, run_and_kill

import video_planner
from core import training
from core.flags import parse
from core.planners import load_planner
from video_planner import FRAMES, to_residual, to_unit


def small(*flags, **fields):
    config = parse(video_planner.Config, "", [*TRAIN, *flags])
    for name, value in (dict(E=384) | fields).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return video_planner.VideoPlanner(config)


def observation(B=2, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (B, 1 + FRAMES, size, size, 3), dtype=torch.uint8, generator=generator)
    return {"clip": clip, "frames": clip[:, :1], "goal": clip[:, 3],
            "text": torch.randn(B, 384, generator=generator)}


# --- diffusion ------------------------------------------------------------------------------------

def test_schedule_falls_from_signal_to_noise_and_weights_rise():
    alpha_bar = video_planner.cosine_schedule(100)
    assert alpha_bar.shape == (100,) and (alpha_bar[1:] < alpha_bar[:-1]).all()
    assert alpha_bar[0] > 0.999 and alpha_bar[-1] < 1e-4
    alpha_bar = torch.tensor([0.0, 0.5, 0.9])       # signal to noise 0, 1 and 9
    assert torch.allclose(video_planner.loss_weight(alpha_bar), torch.tensor([1.0, 2, 5]))


def test_a_step_of_ddim_leads_along_the_same_noise():
    x0, noise = torch.randn(2, 3, 4)
    alpha_bar = video_planner.cosine_schedule(100)
    x, then = (video_planner.add_noise(x0, noise, alpha_bar[t]) for t in (80, 30))
    assert torch.allclose(video_planner.ddim_step(x, x0, alpha_bar[80], alpha_bar[30]), then, atol=1e-5)


def test_sampling_a_gaussian_with_its_exact_denoiser():
    alpha_bar, mu, s = video_planner.cosine_schedule(100), 0.4, 0.5
    torch.manual_seed(0)
    x = torch.randn(20000)
    for t in range(99, -1, -1):
        a, before = alpha_bar[t], alpha_bar[t - 1] if t else torch.tensor(1.0)
        x0 = mu + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (x - a.sqrt() * mu)    # E[x0 | x]
        x = video_planner.ddim_step(x, x0, a, before)
    assert abs(x.mean() - mu) < 0.02 and abs(x.std() - s) < 0.02


# --- network --------------------------------------------------------------------------------------

@pytest.mark.parametrize("downsample", [1, 2])
def test_starts_as_an_image_network(downsample):
    """Dirac in time: at first a picture does not depend on the others of its clip."""
    net = small(channels=32, downsample=downsample, attention=(4,)).net
    torch.nn.init.normal_(net.last[-1].weight)      # else it predicts zeros
    for block in net.modules():
        if isinstance(block, video_planner.ResBlock):
            torch.nn.init.normal_(block.conv2.space.weight, std=0.1)
    x, pictures = torch.randn(1, FRAMES, 3, 16, 24), torch.randn(1, 6, 16, 24)
    forward = lambda x: net(x, pictures, torch.zeros(1, 0), torch.tensor([5]))
    whole = forward(x)
    for f in (0, 3):
        alone = forward(x[:, f:f + 1].expand(-1, FRAMES, -1, -1, -1))
        assert torch.allclose(whole[:, f], alone[:, f], atol=1e-5)
    conv = next(m for m in net.modules() if isinstance(m, video_planner.VideoConv))
    torch.nn.init.normal_(conv.time.weight)
    assert not torch.allclose(whole[:, 0], forward(x)[:, 0], atol=1e-3)


def test_convolution_in_time_is_conv1d():
    conv = video_planner.VideoConv(4, 6)
    torch.nn.init.normal_(conv.time.weight)
    x = torch.randn(2 * FRAMES, 4, 5, 3)
    y = conv.space(x).unflatten(0, (2, FRAMES))                             # (B, F, C, H, W)
    kernel = conv.time.weight[:, :, 0, 0].unflatten(1, (3, 6)).transpose(1, 2)  # (o, C, 3)
    y = y.permute(0, 3, 4, 2, 1).flatten(0, 2)                              # (B H W, C, F)
    true = F.conv1d(y, kernel, conv.time.bias, padding=1)
    true = true.unflatten(0, (2, 5, 3)).permute(0, 4, 3, 1, 2).flatten(0, 1)
    assert torch.allclose(conv(x), true, atol=1e-5)


@pytest.mark.parametrize("goal", ["image", "language"])
def test_every_parameter_gets_a_gradient(goal):
    planner = small("--goal", goal)
    for p in planner.parameters():
        torch.nn.init.normal_(p, std=0.05)      # zeros at the start hide what lies before them
    planner.loss(observation())[0].backward()
    assert [n for n, p in planner.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- planner --------------------------------------------------------------------------------------

def test_loss_is_the_weighted_error_of_the_clean_clip():
    planner, batch = small(condition_dropout=0.0), observation()
    torch.manual_seed(3)
    loss, parts = planner.loss(batch)
    torch.manual_seed(3)
    torch.rand(2)
    alpha_bar = planner.alpha_bar[torch.randint(100, (2,))]
    clip = to_unit(batch["clip"])
    x0 = to_residual(clip[:, 1:], clip[:, 0])           # an untrained network predicts zeros
    errors = [x0[b].square().mean() / (1 - alpha_bar[b]).clamp(min=0.2) for b in range(2)]
    assert torch.allclose(loss, sum(errors) / 2) and abs(parts["plain"] - x0.square().mean()) < 1e-4


def test_pictures_have_one_range_and_are_clipped_not_wrapped():
    planner, obs = small(), observation()
    obs = {k: torch.full_like(v, 255) for k, v in obs.items()}
    assert planner.condition(obs)[0].eq(1).all() and to_unit(0 * obs["goal"]).eq(-1).all()
    x = torch.tensor([-3.0, -1, 0, 1, 3]).view(1, 5, 1).expand(3, 5, 1)
    assert video_planner.to_bytes(x)[:, 0, 0].tolist() == [0, 0, 128, 255, 255]
    clip = to_unit(observation()["clip"])
    residual = to_residual(clip[:, 1:], clip[:, 0])
    assert torch.allclose(video_planner.from_residual(residual, clip[:, 0]), clip[:, 1:], atol=1e-6)


def test_untrained_it_imagines_that_nothing_changes():
    obs = observation()
    imagined = small("--guidance", "1").eval().imagine(obs)
    assert torch.equal(imagined, obs["clip"][:, :1].expand(-1, FRAMES, -1, -1, -1))


def test_one_clip_is_overfitted(steps=200):
    """A square that moves: PSNR above 30 dB in every picture."""
    planner = small("--size", "32", "--goal", "language", "--sample-steps", "10", E=4,
                    condition_dropout=0.0, attention=(8,))
    clip = torch.full((1, 1 + FRAMES, 32, 32, 3), 60, dtype=torch.uint8)
    for f in range(1 + FRAMES):
        clip[:, f, 8:16, 2 * f:2 * f + 8] = torch.tensor([220, 40, 160], dtype=torch.uint8)
    obs = {"clip": clip, "frames": clip[:, :1], "text": torch.ones(1, 4)}
    batch = {k: v.expand(2, *v.shape[1:]) for k, v in obs.items()}
    optimizer = torch.optim.AdamW(planner.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.zero_grad()
        planner.loss(batch)[0].backward()
        optimizer.step()
    imagined = planner.eval().imagine(obs, torch.Generator().manual_seed(1))
    error = (imagined.float() - clip[:, 1:].float()).square().mean((0, 2, 3, 4))
    assert (10 * torch.log10(255 ** 2 / error) > 30).all(), error


@pytest.mark.parametrize("goal", ["image", "language"])
def test_plan_depends_on_the_task_and_the_picture_does_not(goal):
    planner, obs = small("--goal", goal).eval(), observation()
    for p in planner.parameters():
        torch.nn.init.normal_(p, std=0.1)
    sets, made = planner.sets("latent"), planner.plan(obs)
    assert {k: (2, len(places), width) for k, (places, width) in sets.items()} == {
        k: tuple(v.shape) for k, v in made.items()}
    assert all(places.shape[1] == 3 and (places[:, 0] == 0).all() for places, _ in sets.values())
    other = planner.plan(obs | {"goal": 255 - obs["goal"], "text": -obs["text"]})
    assert torch.equal(made["picture"], other["picture"])
    assert made["plan"].isfinite().all() and not torch.allclose(made["plan"], other["plan"])
    later = planner.plan(obs | {"frames": 255 - obs["frames"]})
    assert not torch.allclose(made["picture"], later["picture"])
    with pytest.raises(ValueError):
        planner.sets("tracks")


# --- data, scores and the command -----------------------------------------------------------------

def test_clips_end_with_the_episode():
    times = video_planner.clip_times(np.array([0, 60, 98]), np.array([71, 100, 100]))
    assert times.shape == (3, 1 + FRAMES)
    assert times[:, 0].tolist() == [0, 60, 98] and times[:, -1].tolist() == [70, 99, 99]
    assert times[0].tolist() == video_planner.clip_times(0, 71).tolist() == list(range(0, 71, 10))


def test_ssim_is_the_mean_of_eq_13_over_windows():
    a = torch.randint(256, (1, 3, 9, 8)).double()
    b = (a + 20 * torch.randn(1, 3, 9, 8)).clamp(0, 255)
    found = []
    for c, i, j in np.ndindex(3, 3, 2):
        x, y = (z[0, c, i:i + 7, j:j + 7].flatten().numpy() for z in (a, b))
        (vx, cov), (_, vy) = np.cov(x, y)
        c1, c2 = 2.55 ** 2, 7.65 ** 2
        found.append((2 * x.mean() * y.mean() + c1) * (2 * cov + c2)
                     / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (vx + vy + c2)))
    assert abs(video_planner.ssim(a, b).item() - np.mean(found)) < 1e-6
    assert video_planner.ssim(a, a) == 1 and video_planner.psnr(a, a) == 60
    assert abs(video_planner.psnr(a, a + 255 / 10).item() - 20) < 1e-6


def test_command_resumes_after_a_kill(data, tmp_path):
    command = [*TRAIN, "--data", str(data), "--name", "video"]
    video_planner.main([*command, "--out", str(tmp_path / "whole")])
    run_and_kill("video_planner", "step", [*command, "--out", str(tmp_path / "killed")])
    video_planner.main([*command, "--out", str(tmp_path / "killed")])
    whole, killed = (training.load(tmp_path / k / SUITE / "video.pt") for k in ("whole", "killed"))
    assert equal(whole["ema"], killed["ema"]) and equal(whole["model"], killed["model"])
    folder = tmp_path / "whole" / SUITE
    assert "SSIM" in (folder / "video.txt").read_text() and (folder / "video.png").stat().st_size
    planner = load_planner(folder / "video.pt")
    assert equal(planner.state_dict(), dict(whole["ema"]))
    assert [p.shape for _, p in planner.draw(observation())] == [(SIZE, SIZE, 3)] * 3
