"""Assignment 4, video (AVDC section 3.1 and what its diffusion rests on): pictures and noise."""

import math

import pytest
import torch

import video_planner
from video_planner import GAMMA, RESIDUAL_STD


@pytest.mark.grades("to_bytes")
def test_bytes_are_the_nearest_of_all_256():
    """AVDC 3.1 (pictures in [-1, 1]): byte k is k / 127.5 - 1, and what lies between goes to the
    nearest."""
    k = torch.arange(256)
    for off in (0.0, 0.4, -0.4):
        x = ((k + off) / 127.5 - 1).clamp(-1, 1).view(1, 16, 16).expand(3, 16, 16)
        found = video_planner.to_bytes(x)
        assert found.dtype == torch.uint8
        assert found[..., 1].flatten().tolist() == k.tolist()


@pytest.mark.grades("to_bytes")
def test_bytes_are_clipped_and_axes_kept():
    """AVDC 3.1: a generated picture beyond white or black is white or black, no speckle; (..., 3,
    H, W) -> (..., H, W, 3), whatever comes before."""
    x = torch.tensor([-30.0, -1.01, 1.01, 30.0]).view(1, 1, 2, 2).expand(5, 3, 2, 2)
    assert video_planner.to_bytes(x)[4, :, :, 2].tolist() == [[0, 0], [255, 255]]
    x = torch.rand(2, 5, 3, 4, 6) * 2 - 1
    assert torch.equal(video_planner.to_bytes(x)[1, 3, 2, 5].float(),
                       ((x[1, 3, :, 2, 5] + 1) * 127.5).round())
    square = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]).expand(3, 2, 2)
    assert video_planner.to_bytes(square)[:, :, 0].tolist() == [[0, 255], [0, 255]]


def clip(B=4, F=4):
    torch.manual_seed(0)
    return torch.rand(B, F, 3, 6, 8) * 2 - 1, torch.rand(B, 3, 6, 8) * 2 - 1


@pytest.mark.grades("to_residual")
def test_what_is_diffused_is_the_change_from_the_present_picture():
    """AVDC 3.1 (x_0), here the change from the frame that the video is conditioned on: of every
    picture from the present one, in units of RESIDUAL_STD."""
    pictures, now = clip()
    found = video_planner.to_residual(pictures, now)
    assert found.shape == pictures.shape
    for b in range(4):
        for f in range(4):
            wanted = (pictures[b, f] - now[b]) / RESIDUAL_STD
            torch.testing.assert_close(found[b, f], wanted, atol=1e-4, rtol=1e-4)
    assert not video_planner.to_residual(now[:, None].repeat(1, 7, 1, 1, 1), now).any()


@pytest.mark.grades("from_residual")
def test_pictures_come_back_from_what_is_diffused():
    """AVDC 3.1 (x_0): the change from the present picture is added to it."""
    pictures, now = clip()
    change = torch.stack([torch.stack([(pictures[b, f] - now[b]) / RESIDUAL_STD
                                       for f in range(4)]) for b in range(4)])
    found = video_planner.from_residual(change, now)
    torch.testing.assert_close(found, pictures, atol=1e-4, rtol=1e-4)


@pytest.mark.grades("from_residual")
def test_pictures_from_what_is_diffused_lie_in_range():
    """AVDC 3.1: no picture beyond black or white; large changes that end inside stay as they
    are."""
    now = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    for change, wanted in ((1.5, (0.5, 1, 1)), (-1.5, (-1, -1, -0.5)), (9, (1, 1, 1)),
                           (-9, (-1, -1, -1)), (0, (-1, 0, 1))):
        x = torch.full((1, 2, 3, 1, 3), change / RESIDUAL_STD)
        found = video_planner.from_residual(x, now)[0, 1, 2, 0].tolist()
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.grades("cosine_schedule")
@pytest.mark.parametrize("T", [10, 100, 1000])
def test_schedule_equals_its_definition(T):
    """Nichol and Dhariwal eq. 17 (AVDC 3.1): alpha_bar_t = f(t) / f(0), t = 1 .. T, with
    beta_t = 1 - alpha_bar_t / alpha_bar_(t - 1) of at most 0.999."""
    f = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    found = video_planner.cosine_schedule(T)
    assert found.shape == (T,) and found.dtype == torch.float32
    wanted = torch.tensor([f(t) / f(0) for t in range(1, T)])
    torch.testing.assert_close(found[:-1], wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.grades("cosine_schedule")
def test_schedule_falls_from_one_to_nearly_zero():
    """Nichol and Dhariwal eq. 17 (AVDC 3.1): strictly, and beta_T is clipped to 0.999, so that the
    last step has a finite signal-to-noise ratio above 0."""
    found = video_planner.cosine_schedule(100).double()
    assert 0.99 < found[0] < 1 and (found[1:] < found[:-1]).all() and 0 < found[-1] < 1e-5
    assert (found[-1] / found[-2]).item() == pytest.approx(0.001, rel=0.01)


def noisy():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 7, 3, 4, 4)
    return x0, noise, torch.tensor([0.9, 0.5, 0.2, 0.01, 1.0]).view(5, 1, 1, 1, 1)


@pytest.mark.grades("add_noise")
def test_noisy_clips_by_definition():
    """Ho et al. eq. 4 (AVDC 3.1): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon."""
    x0, noise, alpha_bar = noisy()
    found = video_planner.add_noise(x0, noise, alpha_bar)
    assert found.shape == x0.shape
    for b, a in enumerate(alpha_bar.flatten().tolist()):
        wanted = math.sqrt(a) * x0[b] + math.sqrt(1 - a) * noise[b]
        torch.testing.assert_close(found[b], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.grades("add_noise")
def test_noise_keeps_the_variance():
    """Ho et al. eq. 4 (AVDC 3.1): clean and noise of variance 1 give variance 1 at every step."""
    x0, noise = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for a in (0.0, 0.3, 0.7, 1.0):
        found = video_planner.add_noise(x0, noise, torch.tensor(a)).var().item()
        assert found == pytest.approx(1, abs=0.02)


@pytest.mark.grades("loss_weight")
def test_weights_of_the_loss():
    """Salimans and Ho (2022), "SNR + 1", here at most gamma, SNR = alpha_bar / (1 -
    alpha_bar): an error of x_0 costs 1 where all is noise, at most GAMMA where all is signal."""
    alpha_bar = torch.tensor([1e-6, 0.1, 0.5, 0.75, 0.79, 0.81, 0.99, 0.999999])
    wanted = [min(1 + a / (1 - a), GAMMA) for a in alpha_bar.tolist()]
    assert video_planner.loss_weight(alpha_bar).tolist() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.grades("ddim_step")
def test_a_ddim_step_keeps_the_noise():
    """Song et al. eq. 12, sigma = 0 (AVDC 3.1): x = sqrt(a) x_0 + sqrt(1 - a) epsilon goes to
    sqrt(a') x_0 + sqrt(1 - a') epsilon with the same epsilon."""
    x0, noise, _ = noisy()
    at = lambda a: math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    for a, then in ((0.1, 0.3), (0.01, 0.99), (0.5, 0.5), (0.4, 0.2)):
        found = video_planner.ddim_step(at(a), x0, torch.tensor(a), torch.tensor(then))
        torch.testing.assert_close(found, at(then), atol=1e-4, rtol=1e-3)


@pytest.mark.grades("ddim_step")
def test_ddim_steps_to_the_clean_clip():
    """Song et al. eq. 12, sigma = 0 (AVDC 3.1): to alpha_bar = 1 it is x_0 itself; two steps with
    one x_0 are one step."""
    x0, x, _ = noisy()
    step = lambda x, a, then: video_planner.ddim_step(x, x0, torch.tensor(a), torch.tensor(then))
    torch.testing.assert_close(step(x, 0.2, 1.0), x0)
    torch.testing.assert_close(step(step(x, 0.2, 0.4), 0.4, 0.8), step(x, 0.2, 0.8),
                               atol=1e-4, rtol=1e-3)
