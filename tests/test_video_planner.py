"""video_planner.py: diffusion, the factorised U-Net, clips, scores, resumption."""

import json

import numpy as np
import pytest
import torch

from conftest import COMMON, SIZE, equal, run_and_kill

import video_planner
from core import training
from core.flags import parse

NETWORK = "--channels 32 --multiples 1 2 --attention 8 --batch 2 --device cpu --no-bf16".split()
COMMAND = [*COMMON, "--steps", "5", *NETWORK]


def config(*flags):
    c = parse(video_planner.Config, "", [*COMMAND, *flags])
    c.goal = c.goal or "language"
    return c


def small(*flags):
    torch.manual_seed(0)
    return video_planner.VideoPlanner(config(*flags), 384)


def clip(B=2, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (B, 1 + video_planner.FRAMES, size, size, 3), dtype=torch.uint8, generator=generator)


# --- diffusion ------------------------------------------------------------------------------------


def test_schedule_falls_from_signal_to_noise():
    kept = video_planner.cosine_schedule(100)
    assert kept.shape == (100,) and (kept[1:] < kept[:-1]).all()
    assert kept[0] > 0.999 and kept[-1] < 1e-4


@pytest.mark.parametrize("t", [0, 50, 90])
def test_velocity_and_back(t):
    x0, noise, a = torch.randn(3, 4), torch.randn(3, 4), video_planner.cosine_schedule(100)[t]
    x = video_planner.add_noise(x0, noise, a)
    v = video_planner.velocity(x0, noise, a)
    for found, true in zip(video_planner.from_velocity(x, v, a), (x0, noise)):
        assert torch.allclose(found, true, atol=1e-5)
    assert torch.allclose(video_planner.from_noise(x, noise, a)[0], x0, atol=1e-3)


def test_loss_weight():
    a = torch.tensor([0.0, 0.5, 0.9])    # signal to noise 0, 1 and 9
    weight = video_planner.loss_weight
    assert torch.allclose(weight(a, "v"), torch.tensor([0, 0.5, 0.5]))
    assert torch.allclose(weight(a, "x0"), torch.tensor([1.0, 2, 5]))
    assert torch.equal(weight(a, "eps"), torch.ones(3))


def test_ddim_with_all_steps_and_eta_1_is_ddpm():
    """The mean and variance of every step are those of the posterior (Ho et al., 2020, eq. 6-7)."""
    kept = video_planner.cosine_schedule(50)
    for t in (49, 20, 1):
        a, before, x, x0 = kept[t], kept[t - 1], torch.tensor(0.7), torch.tensor(-0.3)
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        step = lambda fresh: video_planner.ddim_step(x, x0, noise, a, before, 1.0, fresh)
        alpha = a / before
        mean = (before.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - before) * x) / (1 - a)
        spread = ((1 - before) / (1 - a) * (1 - alpha)).sqrt()
        assert torch.allclose(step(0.0), mean, atol=1e-5)
        assert torch.allclose(step(1.0) - step(0.0), spread, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_a_gaussian_with_its_exact_denoiser(eta):
    kept, mu, s = video_planner.cosine_schedule(100), 0.4, 0.5
    torch.manual_seed(0)
    x = torch.randn(20000)
    for t in range(99, -1, -1):
        a, before = kept[t], kept[t - 1] if t else torch.tensor(1.0)
        x0 = mu + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (x - a.sqrt() * mu)    # E[x0 | x]
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        x = video_planner.ddim_step(x, x0, noise, a, before, eta, torch.randn_like(x))
    assert abs(x.mean() - mu) < 0.02 and abs(x.std() - s) < 0.02


# --- network --------------------------------------------------------------------------------------


def test_starts_as_an_image_network():
    """Dirac in time: at first a picture does not depend on the others of its clip."""
    torch.manual_seed(0)
    net = small("--shrink", "1").net
    torch.nn.init.normal_(net.last[-1].weight)      # else it says zeros
    for block in net.modules():
        if isinstance(block, video_planner.ResBlock):
            torch.nn.init.normal_(block.conv2.space.weight, std=0.1)
    x, seen, t, task = torch.randn(1, video_planner.FRAMES, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.tensor([5]), torch.randn(1, 384)
    whole = net(x, seen, t, task)
    for f in (0, 3):
        alone = net(x[:, f:f + 1].expand(-1, video_planner.FRAMES, -1, -1, -1).contiguous(), seen, t, task)
        assert torch.allclose(whole[:, f], alone[:, f], atol=1e-5)
    conv = next(m for m in net.modules() if isinstance(m, video_planner.VideoConv))
    torch.nn.init.normal_(conv.time.weight)
    assert not torch.allclose(whole[:, 0], net(x, seen, t, task)[:, 0], atol=1e-3)


def test_convolution_in_time_is_conv1d():
    conv = video_planner.VideoConv(4, 6)
    torch.nn.init.normal_(conv.time.weight)
    x = torch.randn(2 * video_planner.FRAMES, 4, 5, 3)
    y = conv.space(x).unflatten(0, (2, video_planner.FRAMES))                             # (B, F, C, H, W)
    kernel = conv.time.weight[:, :, 0, 0].unflatten(1, (3, 6)).transpose(1, 2)  # (o, C, 3)
    y = y.permute(0, 3, 4, 2, 1).flatten(0, 2)                              # (B H W, C, F)
    true = torch.nn.functional.conv1d(y, kernel, conv.time.bias, padding=1)
    true = true.unflatten(0, (2, 5, 3)).permute(0, 4, 3, 1, 2).flatten(0, 1)
    assert torch.allclose(conv(x), true, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--goal", "image", "--objective", "v", "--no-change"]])
def test_every_parameter_gets_a_gradient(flags):
    planner = small(*flags)
    for p in planner.parameters():
        torch.nn.init.normal_(p, std=0.05)      # zeros at the start hide what lies before them
    goal = torch.randn(2, 384) if planner.config.goal == "language" else clip()[:, 0]
    planner.loss({"clip": clip(), "goal": goal})[0].backward()
    assert [n for n, p in planner.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_loss_of_eps_is_the_papers():
    planner = small("--objective", "eps", "--no-change", "--drop", "0", "--shrink", "1")
    batch = {"clip": clip(), "goal": torch.randn(2, 384)}
    torch.manual_seed(3)
    loss, _ = planner.loss(batch)
    torch.manual_seed(3)
    t, noise = torch.randint(100, (2,)), torch.randn_like(video_planner.to_unit(batch["clip"][:, 1:]))
    # an untrained network says zeros
    assert torch.allclose(loss, noise.square().mean(), atol=1e-5) and t.shape == (2,)


def test_condition_and_target_have_the_same_range():
    planner = small("--no-change")
    white = torch.full((1, SIZE, SIZE, 3), 255, dtype=torch.uint8)
    seen, _ = planner.condition(white, torch.zeros(1, 384))
    assert seen.max() == 1 and video_planner.to_unit(white).max() == 1
    assert planner.condition(0 * white, torch.zeros(1, 384))[0].min() == -1


def test_pictures_are_clipped_not_wrapped():
    x = torch.tensor([-3.0, -1, 0, 1, 3]).view(1, 5, 1).expand(3, 5, 1)
    assert video_planner.to_bytes(x)[:, 0, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("change", ["--change", "--no-change"])
def test_paint_and_back(change):
    planner = small(change)
    pictures, now = video_planner.to_unit(clip()[:, 1:]), video_planner.to_unit(clip()[:, 0])
    assert torch.allclose(planner.unpaint(planner.paint(pictures, now), now), pictures, atol=1e-6)
    means = pictures.unflatten(4, (-1, 4)).unflatten(3, (-1, 4)).mean((4, 6))
    assert planner.config.shrink == 4 and torch.allclose(planner.small(pictures), means, atol=1e-6)


def test_untrained_it_imagines_that_nothing_changes():
    planner = small().eval()
    now = clip()[:, 0]
    assert torch.equal(planner.imagine(now, torch.zeros(2, 384)), now[:, None].expand(-1, video_planner.FRAMES, -1, -1, -1))


def test_one_clip_is_overfitted(steps=600):
    """A square that moves to where the sentence says: PSNR above 30 dB in every picture."""
    torch.manual_seed(0)
    planner = video_planner.VideoPlanner(config("--size", "32", "--drop", "0", "--objective", "x0"), 4)
    x = torch.full((1, 1 + video_planner.FRAMES, 32, 32, 3), 60, dtype=torch.uint8)
    for f in range(1 + video_planner.FRAMES):
        x[:, f, 8:16, 2 * f:2 * f + 8] = torch.tensor([220, 40, 160], dtype=torch.uint8)
    batch = {"clip": x.expand(2, -1, -1, -1, -1), "goal": torch.ones(2, 4)}
    optimizer = torch.optim.AdamW(planner.parameters(), 2e-3)
    for step in range(steps):
        loss, _ = planner.loss(batch)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    imagined = planner.eval().imagine(x[:, 0], torch.ones(1, 4), torch.Generator().manual_seed(1))
    error = (imagined.float() - x[:, 1:].float()).square().mean((0, 2, 3, 4))
    assert (10 * torch.log10(255 ** 2 / error) > 30).all(), error


def test_plan_is_a_map_that_says_the_task():
    planner = small("--goal", "image").eval()
    torch.nn.init.normal_(planner.net.first.weight, std=0.1)
    plan, image = planner.plan(clip()[:, 0], clip()[:, 1])
    assert plan.shape == (2, planner.n, video_planner.FRAMES * planner.width) and image.shape == (2, planner.n, planner.width)
    other, _ = planner.plan(clip()[:, 0], clip()[:, 2])
    assert torch.isfinite(plan).all() and not torch.allclose(plan, other)


# --- data and the command -------------------------------------------------------------------------


def test_clips_end_with_the_episode():
    times = video_planner.clip_times(np.array([0, 60, 98]), np.array([71, 100, 100]))
    assert times.shape == (3, 1 + video_planner.FRAMES)
    assert times[:, 0].tolist() == [0, 60, 98] and times[:, -1].tolist() == [70, 99, 99]
    assert times[0].tolist() == list(range(0, 71, 10))


def test_command_resumes_after_a_kill(data, tmp_path, monkeypatch):
    command = [*COMMAND, "--data", str(data), *"--sample-steps 2 --clips 3".split()]
    silhouette = video_planner.train_silhouette
    monkeypatch.setattr(video_planner, "train_silhouette", lambda e: silhouette(e, steps=5))
    video_planner.main([*command, "--out", str(tmp_path / "whole")])
    run_and_kill("video_planner", "step", [*command, "--out", str(tmp_path / "killed")])
    video_planner.main([*command, "--out", str(tmp_path / "killed")])
    whole, killed = (training.load(tmp_path / k / "libero_spatial" / "video.pt") for k in ("whole", "killed"))
    assert equal(whole["ema"], killed["ema"]) and equal(whole["model"], killed["model"])
    folder = tmp_path / "whole" / "libero_spatial"
    assert "robot IoU" in (text := (folder / "video.txt").read_text()) and "one plan, 2 steps: " in text
    assert (folder / "video.png").stat().st_size and (folder / "video.mp4").stat().st_size
    assert json.loads((folder / "video.jsonl").read_text().splitlines()[-1])["step"] == 5
