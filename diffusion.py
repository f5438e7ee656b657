"""The diffusion model of videos (AVDC section 3.1): noise schedule, sampler step, U-Net.

`video_planner.py` trains it.  Sizes: B batch, F pictures to come, H W pixels, C channels, D numbers
that say noise level and task.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import core

FRAMES = 7      # to come; with the present one the eight of AVDC
SNR = 5.0       # gamma of the min-SNR weights (Hang et al., 2023)


# --- diffusion ------------------------------------------------------------------------------------

def cosine_schedule(T):
    """Share of the signal's variance that is left after each of T steps (Nichol and Dhariwal,
    2021, eq. 17) -> (T,) falling from about 1 to about 0."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0).float()


def add_noise(x0, noise, a):
    """The forward process: clean x0 and noise -> x_t.  a = `cosine_schedule` at t, broadcast."""
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def velocity(x0, noise, a):
    """v of Salimans and Ho (2022): what to learn instead of the noise."""
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def from_velocity(x, v, a):
    """Noisy x and v -> x0, noise: the inverse of `add_noise` and `velocity`."""
    return a.sqrt() * x - (1 - a).sqrt() * v, (1 - a).sqrt() * x + a.sqrt() * v


def from_noise(x, noise, a):
    """Noisy x and its noise -> x0, noise."""
    return (x - (1 - a).sqrt() * noise) / a.sqrt(), noise


def loss_weight(a, objective):
    """Weight of the squared error at signal share a (B,) -> (B,): 1 of eps (the paper), min-SNR of
    v (its authors' code), min(1 + SNR, gamma) of x0.

    differs: min-SNR leaves next to no weight to the noisiest steps, with which sampling begins; a
    short training then never learns them (one clip overfitted in 250 steps: 17 instead of 30 dB).
    """
    snr = a / (1 - a)
    if objective == "eps":
        return torch.ones_like(a)
    return snr.clamp(max=SNR) / (snr + 1) if objective == "v" else (1 + snr).clamp(max=SNR)


def ddim_step(x, x0, noise, a, before, eta, fresh):
    """One step of DDIM (Song et al., 2021, eq. 12) from signal share a to `before`; eta 1: DDPM."""
    sigma = eta * ((1 - before) / (1 - a) * (1 - a / before)).clamp(min=0).sqrt()
    kept = (1 - before - sigma ** 2).clamp(min=0).sqrt()
    return before.sqrt() * x0 + kept * noise + sigma * fresh


# --- network --------------------------------------------------------------------------------------

def norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)


class VideoConv(nn.Module):
    """Factorised convolution (Fig. 3b): 3 x 3 in space, 3 in time.  (B F, C, H, W) -> the same.

    The one in time starts as the identity (Dirac), so the network starts as an image network.  It
    is written as a 1 x 1 convolution over each picture beside its neighbours: the same sum, without
    carrying the pixels to another order and back.
    """

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.space, self.time = nn.Conv2d(i, o, 3, stride, 1), nn.Conv2d(3 * o, o, 1)
        nn.init.zeros_(self.time.bias)
        with torch.no_grad():
            self.time.weight.zero_()[:, o:2 * o, 0, 0] = torch.eye(o)

    def forward(self, x):
        x = self.space(x)
        clip = x.unflatten(0, (-1, FRAMES))                                 # (B, F, C, H, W)
        none = torch.zeros_like(clip[:, :1])
        before, after = torch.cat([none, clip[:, :-1]], 1), torch.cat([clip[:, 1:], none], 1)
        return self.time(torch.cat([before.flatten(0, 1), x, after.flatten(0, 1)], 1))


class ResBlock(nn.Module):
    """Two factorised convolutions around the embedding of noise level and task, and a shortcut."""

    def __init__(self, i, o, D):
        super().__init__()
        self.norm1, self.conv1 = norm(i), VideoConv(i, o)
        self.said, self.norm2, self.conv2 = nn.Linear(D, o), norm(o), VideoConv(o, o)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        # as guided-diffusion: a block starts as nothing
        nn.init.zeros_(self.conv2.space.weight)
        nn.init.zeros_(self.conv2.space.bias)

    def forward(self, x, said):
        """x (B F, i, H, W), said (B F, D) -> (B F, o, H, W)."""
        y = self.conv1(F.silu(self.norm1(x))) + self.said(F.silu(said))[..., None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Among the cells of one picture, never between pictures.  (B F, C, H, W) -> the same."""

    def __init__(self, C):
        super().__init__()
        self.heads, self.norm = max(1, C // 32), norm(C)
        self.qkv, self.out = nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = (y.reshape(B, self.heads, -1, H * W).transpose(2, 3)
                   for y in self.qkv(self.norm(x)).chunk(3, 1))  # (B, heads, H W, C/heads)
        y = core.attend(q, k, v).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(y)


class VideoUNet(nn.Module):
    """The U-Net of Fig. 3a over all pictures of a clip at once."""

    def __init__(self, config, seen, E):
        """seen: channels of the condition beside the noisy picture's 3; E numbers per sentence."""
        super().__init__()
        c, p, base = config, config.shrink, config.channels
        D = 4 * base
        self.base = base
        self.noise = nn.Sequential(nn.Linear(base, D), nn.SiLU(), nn.Linear(D, D))
        self.task = nn.Linear(E, D) if E else None
        # ours: which picture of the clip, of no effect at first
        self.when = nn.Parameter(torch.zeros(FRAMES, D))
        self.first = nn.Conv2d(3 + seen, base, 3, 1, 1)
        self.down, self.up, widths, width = nn.ModuleList(), nn.ModuleList(), [base], base
        for level, multiple in enumerate(c.multiples):
            looks = p * 2 ** level in c.attention
            for _ in range(c.repeats):
                self.down.append(self.block(width, base * multiple, D, looks))
                widths.append(width := base * multiple)
            if level < len(c.multiples) - 1:
                self.down.append(nn.Conv2d(width, width, 3, 2, 1))
                widths.append(width)
        self.middle = nn.ModuleList([ResBlock(width, width, D), Attention(width),
                                     ResBlock(width, width, D)])
        self.width = width      # of the features in the middle
        for level, multiple in reversed(list(enumerate(c.multiples))):
            looks = p * 2 ** level in c.attention
            for _ in range(c.repeats + 1):
                self.up.append(self.block(width + widths.pop(), base * multiple, D, looks))
                width = base * multiple
            if level:
                self.up.append(nn.Conv2d(width, width, 3, 1, 1))
        self.last = nn.Sequential(norm(width), nn.SiLU(), nn.Conv2d(width, 3, 3, 1, 1))
        nn.init.zeros_(self.last[-1].weight)            # the first guess is nothing, not noise
        nn.init.zeros_(self.last[-1].bias)

    def block(self, i, o, D, looks):
        return nn.ModuleList([ResBlock(i, o, D)] + [Attention(o)] * looks)

    def forward(self, x, seen, t, task=None, features=False):
        """x (B, F, 3, H, W) noisy, seen (B, C, H, W), both in [-1, 1]; t (B,) in 0..T-1; task
        (B, E)
        -> (B, F, 3, H, W); features: what the middle says instead (B, F, width, h, w)."""
        wave = torch.exp(-math.log(10000) * torch.arange(self.base // 2, device=x.device)
                         / (self.base // 2))
        angle = t[:, None].float() * wave                                   # (B, base/2)
        said = self.noise(torch.cat([angle.cos(), angle.sin()], 1))         # (B, D)
        if self.task is not None:
            said = said + self.task(task)
        said = (said[:, None] + self.when).flatten(0, 1)                    # (B F, D)
        x = torch.cat([x, seen[:, None].expand(-1, FRAMES, -1, -1, -1)], 2).flatten(0, 1)
        x = self.first(x)                                                   # (B F, base, H, W)
        kept = [x]
        for part in self.down:
            x = run(part, x, said)
            kept.append(x)
        for part in self.middle:
            x = part(x, said) if isinstance(part, ResBlock) else part(x)
        if features:
            return x.unflatten(0, (-1, FRAMES))
        for part in self.up:
            if isinstance(part, nn.Conv2d):
                x = part(F.interpolate(x, size=kept[-1].shape[-2:]))
            else:
                x = run(part, torch.cat([x, kept.pop()], 1), said)
        return self.last(x).unflatten(0, (-1, FRAMES))                      # (B, F, 3, H, W)


class Enlarge(nn.Module):
    """Small pictures of a clip -> large ones, with what the present picture shows: the second stage
    of a cascade, as in UniPi, by regression."""

    def __init__(self, p, width=96):
        super().__init__()
        self.p = p
        layers, i = [], 3 + 3 * p * p
        for _ in range(3):
            layers += [nn.Conv2d(i, width, 3, 1, 1), norm(width), nn.SiLU()]
            i = width
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 3 * p * p, 3, 1, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, now):
        """x (B, F, 3, h, w), the present picture (B, 3, H, W) -> (B, F, 3, H, W)."""
        now = F.pixel_unshuffle(now, self.p)[:, None].expand(-1, x.shape[1], -1, -1, -1)
        small, now = x.flatten(0, 1), now.flatten(0, 1)                     # (B F, ., h, w)
        large = F.interpolate(small, scale_factor=self.p, mode="bilinear")
        more = F.pixel_shuffle(self.net(torch.cat([small, now], 1)), self.p)
        return (large + more).unflatten(0, x.shape[:2])


def run(part, x, said):
    """A level's step: convolution between levels, or residual block and perhaps attention."""
    if isinstance(part, nn.Conv2d):
        return part(x)
    for layer in part:
        x = layer(x, said) if isinstance(layer, ResBlock) else layer(x)
    return x
