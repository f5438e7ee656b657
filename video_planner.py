"""AVDC and UniPi stage 1 (AVDC section 3.1): imagine the video of the task being done.

    python video_planner.py --suite mt10                # makes the data first if there is none
    python video_planner.py --suite mt10 --show         # imagined beside true videos, as a picture
    python video_planner.py --suite avdc                # told by a sentence
    python video_planner.py --suite avdc --videos avdc,avdc_view1,avdc_view2    # three cameras

A diffusion model sees the present picture and the task and paints the next seven pictures of a clip
that ends when the task is done.  What to do with the video: `flow.py` turns it into motion (AVDC,
no action label at all), `executor.py` hears the denoiser's features as a latent plan (UniPi as
Mask2Act compares it).  The network and its noise are in `diffusion.py`.
Sizes: B batch, F pictures to come, H W pixels, n cells of the feature map, E numbers per sentence.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sims
from core import networks, training
from core.draw import caption
from core.files import fail
from core.flags import flag, from_dict, parse
from demos import record

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
        y = networks.attend(q, k, v).transpose(2, 3).reshape(B, C, H, W)
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


SPREAD = 0.25   # of the change from the present picture, about its standard deviation where it is


@dataclass
class Config:
    suite: str = flag("mt10", "suite: " + ", ".join(sims.SUITES) + ", or a Meta-World task")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    videos: str = flag("", "suites whose videos it learns from, comma-separated, such as those of "
                       "AVDC's three cameras, avdc,avdc_view1,avdc_view2; empty: its own alone")
    goal: str | None = flag(None, "what says the task: language (AVDC) or image, the goal picture "
                            "(Mask2Act's comparison); by default image in Meta-World but for avdc",
                            choices=["language", "image"])
    demos: int | None = flag(None, "action-free videos per task", minimum=1)
    steps: int | None = flag(None, "gradient steps", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU",
                              choices=["laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    channels: int | None = flag(None, "channels of the U-Net's first level", minimum=32)
    multiples: tuple[int, ...] | None = flag(None, "channels of each level, in multiples of these")
    repeats: int | None = flag(None, "residual blocks per level", minimum=1)
    attention: tuple[int, ...] | None = flag(None, "reductions of the picture with attention")
    shrink: int | None = flag(None, "diffuse pictures this many times smaller, and enlarge them "
                              "afterwards", minimum=1)
    objective: str | None = flag(None, "what the network says: the noise eps (the paper's loss), v "
                                 "(its authors' code), or the clean clip x0",
                                 choices=["x0", "v", "eps"])
    change: bool | None = flag(None, "paint the change from the present picture, not the picture")
    noise_steps: int = flag(100, "steps T of the noise schedule", minimum=2)
    sample_steps: int | None = flag(None, "steps of DDIM; T and --eta 1: DDPM", minimum=1)
    eta: float = flag(0.0, "noise added in sampling (DDIM, eq. 16): 0 none, 1 as DDPM", minimum=0)
    guidance: float = flag(0.0, "weight of classifier-free guidance", minimum=0)
    drop: float = flag(0.1, "share of samples whose task is not told, for guidance",
                       minimum=0, maximum=1)
    batch: int | None = flag(None, "clips per step", minimum=1)
    clips: int = flag(60, "held-out clips that it imagines to be scored by", minimum=1)
    lr: float | None = flag(None, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    show: bool = flag(False, "only draw imagined beside true videos of the trained planner")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    weight_decay, warmup, clip, ema, save_every, log_every = 0.0, 100, 1.0, 0.999, 250, 50
    PRESETS = {
        # differs: a cascade, as in UniPi.  At full size what is imagined was still noise after
        # this many steps, in the right places, and further from the truth than the present picture
        "laptop": dict(demos=20, steps=1500, size=96, channels=64, multiples=(1, 2, 3),
                       repeats=1, attention=(8, 16), shrink=4, sample_steps=10, batch=8,
                       lr=1e-3, objective="x0", change=True),
        "paper": dict(demos=50, steps=60000, size=128, channels=128, multiples=(1, 2, 3, 4, 5),
                      repeats=2, attention=(8, 16), shrink=1, sample_steps=20, batch=16,
                      lr=1e-4, objective="v", change=False)}


# --- planner --------------------------------------------------------------------------------------

def to_unit(images):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).float() / 127.5 - 1


def to_bytes(x):
    """The inverse, clipped: (..., 3, H, W) -> (..., H, W, 3) uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


class VideoPlanner(nn.Module):
    """The diffusion model.  What an executor can hear: the denoiser's features, as latent plan."""
    kind, forms = "video_planner", ["latent"]

    def __init__(self, config, E):
        """E  numbers that say a sentence"""
        super().__init__()
        c, self.config, self.arguments = config, config, [E]
        whole = c.shrink * 2 ** (len(c.multiples) - 1)
        if c.size % whole:
            fail(f"--size {c.size} is not divisible by {whole} (--shrink and --multiples): "
                      "choose a multiple")
        told = c.goal == "language"
        self.net = VideoUNet(c, (3 if told else 6) * c.shrink ** 2, E if told else 0)
        self.enlarge = Enlarge(c.shrink) if c.shrink > 1 else None
        self.side = c.size // whole
        self.n, self.width = self.side ** 2, self.net.width     # of the map in the middle
        self.register_buffer("kept", cosine_schedule(c.noise_steps), persistent=False)  # (T,)

    def condition(self, now, goal):
        """now (B, H, W, 3) uint8; goal (B, E), or (B, H, W, 3) uint8 -> what the U-Net sees
        (B, 3 or 6, H, W) in [-1, 1], what it is told (B, E) or None."""
        # differs: in [-1, 1] as the pictures to paint; the authors' code leaves it in [0, 1]
        if self.config.goal == "language":
            return to_unit(now), goal.float()
        return torch.cat([to_unit(now), to_unit(goal)], 1), None

    def untold(self, seen, task):
        """The condition without the task: zeros in its place."""
        if task is not None:
            return seen, torch.zeros_like(task)
        return torch.cat([seen[:, :3], torch.zeros_like(seen[:, 3:])], 1), None

    def paint(self, pictures, now):
        """Pictures to come (B, F, 3, H, W) in [-1, 1], the present one (B, 3, H, W) -> what is
        diffused."""
        # differs: the change from the present picture; what stays as it is, most of it, is 0
        return (pictures - now[:, None]) / SPREAD if self.config.change else pictures

    def unpaint(self, x, now):
        """The inverse, clipped to [-1, 1]."""
        return (x * SPREAD + now[:, None] if self.config.change else x).clamp(-1, 1)

    def small(self, pictures):
        """(..., H, W) -> means over squares of `shrink` x `shrink` pixels."""
        p = self.config.shrink
        return F.avg_pool2d(pictures.flatten(0, -4), p).unflatten(0, pictures.shape[:-3])

    def say(self, x, seen, t, task):
        """The network on noisy small pictures x, with the condition in its own resolution."""
        return self.net(x, F.pixel_unshuffle(seen, self.config.shrink), t, task).float()

    def loss(self, batch):
        """batch: clip (B, 1 + F, H, W, 3) uint8, now and to come; goal -> scalar, parts."""
        c, clip = self.config, batch["clip"]
        seen, task = self.condition(clip[:, 0], batch["goal"])
        now = seen[:, :3]
        large, B = self.paint(to_unit(clip[:, 1:]), now), len(clip)
        x0, blurred = self.small(large), torch.zeros(())
        if self.enlarge:        # from true small pictures, a little noisy, as imagined ones are
            rough = x0 + 0.1 * torch.rand(B, 1, 1, 1, 1, device=x0.device) * torch.randn_like(x0)
            blurred = (self.enlarge(rough, now).float() - large).abs().mean()
        if c.drop:
            hide = torch.rand(B, device=x0.device) < c.drop
            nothing, silence = self.untold(seen, task)
            seen = torch.where(hide[:, None, None, None], nothing, seen)
            task = task if task is None else torch.where(hide[:, None], silence, task)
        t = torch.randint(c.noise_steps, (B,), device=x0.device)
        noise, a = torch.randn_like(x0), self.kept[t].view(-1, 1, 1, 1, 1)
        said = self.say(add_noise(x0, noise, a), seen, t, task)
        target = {"x0": x0, "v": velocity(x0, noise, a), "eps": noise}[c.objective]
        error = (said - target).square().mean((1, 2, 3, 4))                 # (B,)
        loss = (loss_weight(self.kept[t], c.objective) * error).mean()
        return loss + blurred, {"plain": error.mean().item(), "enlarge": blurred.item()}

    def clean(self, x, seen, task, t):
        """The network's word on noisy x (B, F, 3, h, w) at step t (int) -> x0, noise."""
        c, B, a = self.config, len(x), self.kept[t]
        when = torch.full((B,), t, device=x.device)
        said = self.say(x, seen, when, task)
        if c.guidance:
            blank, silence = self.untold(seen, task)
            said = (1 + c.guidance) * said - c.guidance * self.say(x, blank, when, silence)
        x0 = {"x0": lambda: said, "v": lambda: from_velocity(x, said, a)[0],
              "eps": lambda: from_noise(x, said, a)[0]}[c.objective]()
        now = self.small(seen[:, :3])
        x0 = self.paint(self.unpaint(x0, now), now)         # no picture is brighter than white
        return x0, (x - a.sqrt() * x0) / (1 - a).sqrt()

    @torch.no_grad()
    def imagine(self, now, goal, generator=None):
        """now (B, H, W, 3) uint8, goal as for `condition` -> pictures to come (B, F, H, W, 3)."""
        c, side = self.config, now.shape[1] // self.config.shrink
        seen, task = self.condition(now, goal)
        x = torch.randn(len(now), FRAMES, 3, side, side, generator=generator).to(now.device)
        times = torch.linspace(c.noise_steps - 1, 0, c.sample_steps).round().long().tolist()
        one = torch.ones((), device=now.device)
        for t, then in zip(times, times[1:] + [None]):
            x0, noise = self.clean(x, seen, task, t)
            before = one if then is None else self.kept[then]
            fresh = torch.randn(x.shape, generator=generator).to(x) if c.eta else 0.0
            x = ddim_step(x, x0, noise, self.kept[t], before, c.eta, fresh)
        x = self.enlarge(x, seen[:, :3]) if self.enlarge else x
        return to_bytes(self.unpaint(x, seen[:, :3]))

    @torch.no_grad()
    def plan(self, now, goal):
        """The latent plan: what the denoiser's middle says of a video of pure noise, its mean, of
        what will be painted in each picture, (B, n, F width); its mean over them, (B, n, width)."""
        seen, task = self.condition(now, goal)
        seen = F.pixel_unshuffle(seen, self.config.shrink)
        x = torch.zeros(len(now), FRAMES, 3, *seen.shape[2:], device=now.device)
        t = torch.full((len(now),), self.config.noise_steps - 1, device=now.device)
        x = self.net(x, seen, t, task, features=True).flatten(3)            # (B, F, width, n)
        return x.permute(0, 3, 1, 2).flatten(2), x.mean(1).transpose(1, 2)


# --- data -----------------------------------------------------------------------------------------

def clip_times(t, length):
    """AVDC's clips: from step t (B,) to the end of an episode of `length` (B,) steps, evenly
    -> (B, 1 + F) steps; the last picture means done."""
    share = np.arange(1 + FRAMES) / FRAMES
    return np.rint(t[:, None] + share * (length - 1 - t)[:, None]).astype(int)


def make_batch(episodes, episode, t, rng, config):
    """Clips from frames t (B,) of some episodes, as a dict of arrays (see VideoPlanner.loss)."""
    times = clip_times(t, episodes.length[episode])
    if config.goal == "language":
        goal = episodes.text[episodes.task[episode]]                        # (B, E)
    else:
        source = episodes.goal_of(episode, rng)
        goal = episodes.gather("obs/agentview_rgb", source, episodes.length[source] - 1)
    return {"clip": episodes.gather("obs/agentview_rgb", episode[:, None], times), "goal": goal}


def held_out_samples(episodes, config, seed=1, most=20):
    """Clips from random frames, at most twenty at a time, as scores.validate wants them."""
    for step, first in enumerate(range(0, config.clips, most)):
        episode, t, rng = episodes.draw(step, min(most, config.clips - first), seed)
        batch = make_batch(episodes, episode, t, rng, config)
        times = clip_times(t, episodes.length[episode])[:, 1:]
        yield batch["clip"], batch["goal"], episodes.gather("masks", episode[:, None], times) == 1


@torch.no_grad()
def show(planner, episodes, rows=4, seed=3):
    """Rows of pictures, imagined above true, the present one first -> (., ., 3) uint8, the frames
    of a film of the same (1 + F, ., ., 3) uint8."""
    device = next(planner.parameters()).device
    episode, t, rng = episodes.draw(0, rows, seed)
    t = t // 2                                      # rather early: more is to come
    batch = make_batch(episodes, episode, t, rng, planner.config)
    now, goal = (torch.as_tensor(x, device=device) for x in (batch["clip"][:, 0], batch["goal"]))
    generator = torch.Generator().manual_seed(seed)
    imagined = planner.eval().imagine(now, goal, generator).cpu().numpy()
    imagined = np.concatenate([batch["clip"][:, :1], imagined], 1)          # (rows, 1 + F, H, W, 3)
    lines = []
    for b in range(rows):
        name = episodes.tasks[episodes.task[episode[b]]].replace("_", " ")
        for clip, what in ((imagined[b], "imagined"), (batch["clip"][b], "true")):
            lines.append(caption(np.concatenate(clip, 1), f"{what}: {name}"))
    film = np.concatenate([np.concatenate([imagined, batch["clip"]], 2)[b] for b in range(rows)], 2)
    return np.concatenate(lines), film


def write_film(path, frames, scale=2):
    """(T, H, W, 3) uint8 -> mp4, two pictures per second."""
    import imageio.v3 as iio
    frames = np.kron(frames, np.ones((1, scale, scale, 1), np.uint8))
    iio.imwrite(path, frames, fps=2, macro_block_size=2)


def load_planner(path, device="cpu"):
    """A trained VideoPlanner, frozen, with its averaged weights."""
    content = training.load(path, VideoPlanner.kind, "python video_planner.py --suite mt10")
    planner = VideoPlanner(from_dict(Config, content["config"]), content["extra"]["E"])
    planner.load_state_dict(content["ema"] or content["model"])
    return planner.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    config = parse(Config, "Stage 1 of AVDC and UniPi: learn to imagine videos.", argv)
    pictured = sims.is_metaworld(config.suite) and config.suite != "avdc"
    usual = "image" if pictured else "language"
    config.goal = config.goal or usual
    name = "video" + f"-{config.goal}" * (config.goal != usual)
    path = record.run_path(config, name)
    videos, held_out, note = record.prepare(config, path, "video_planner")
    torch.manual_seed(config.seed)
    E = videos.text.shape[1]

    def batches(step):
        return make_batch(videos, *videos.draw(step, config.batch, config.seed), config)

    def picture(planner):
        sheet, film = show(planner, held_out, min(4, config.clips))
        write_film(path.with_suffix(".mp4"), film)
        return sheet

    if config.show:         # sampled as the flags say
        planner = load_planner(path, config.device)
        for name in ("sample_steps", "eta", "guidance"):
            setattr(planner.config, name, getattr(config, name))
    else:
        planner = training.fit(VideoPlanner(config, E), batches, config, path, picture,
                            f"{note}, told by {config.goal}", {"E": E})
    silhouette = train_silhouette(videos)
    found, cost = validate(planner, held_out_samples(held_out, config), silhouette)
    text = f"{table(found)}\none plan, {config.sample_steps} steps: {cost}"
    record.report(config, path, text, lambda: picture(planner))


if __name__ == "__main__":
    main()


class Silhouette(nn.Module):
    """Which pixels of a picture are the robot: a few convolutions, judging imagined pictures."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for stride, new in ((1, 16), (2, 32), (2, 64), (1, 64)):
            layers += [nn.Conv2d(width, new, 3, stride, 1), nn.GroupNorm(8, new), nn.ReLU()]
            width = new
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 16, 1), nn.PixelShuffle(4))

    def forward(self, images):
        """(B, H, W, 3) uint8 -> logits (B, H, W)."""
        return self.net(images.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 0]


def train_silhouette(episodes, steps=400, batch=32, seed=0):
    """-> a Silhouette that has learned from true pictures and masks, about a minute."""
    torch.manual_seed(seed)
    net = Silhouette()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        episode, t, _ = episodes.draw(step, batch, seed)
        images = torch.as_tensor(episodes.gather("obs/agentview_rgb", episode, t))
        robot = torch.as_tensor(episodes.gather("masks", episode, t) == 1).float()
        loss = F.binary_cross_entropy_with_logits(net(images), robot)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def validate(planner, samples, silhouette, seed=1):
    """Imagined beside true pictures to come.

    samples: some of (clip (B, 1 + F, H, W, 3) uint8, goal, the robot's true masks (B, F, H, W))
    -> {"imagined" | "stay": {"PSNR" dB, "SSIM", "robot IoU": (F,)}}; stay: the present picture;
    what one plan costs, in words.
    The robot's outline: what `silhouette` finds in an imagined picture; the true, the simulator's.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    device, found, seconds, plans = next(planner.parameters()).device, {}, 0.0, 0
    generator = torch.Generator().manual_seed(seed)
    clock, unit = ((time.perf_counter, "seconds") if device.type == "cuda" else
                   (time.process_time, "core-seconds"))
    for clip, goal, robot in samples:
        now, goal = (torch.as_tensor(x, device=device) for x in (clip[:, 0], goal))
        begin = clock()
        imagined = planner.eval().imagine(now, goal, generator).cpu()
        seconds, plans = seconds + clock() - begin, plans + len(clip)
        stay = torch.as_tensor(clip[:, :1]).expand_as(imagined)
        for name, guess in (("imagined", imagined), ("stay", stay)):
            outline = (silhouette(guess.flatten(0, 1)) > 0).numpy().reshape(robot.shape)
            iou = (outline & robot).sum((2, 3)) / np.maximum((outline | robot).sum((2, 3)), 1)
            rows = found.setdefault(name, {"PSNR": [], "SSIM": [], "robot IoU": []})
            for b in range(len(guess)):
                pairs = list(zip(clip[b, 1:], guess[b].numpy()))
                with np.errstate(divide="ignore"):      # equal pictures: no noise at all
                    psnr = [min(60, peak_signal_noise_ratio(*p)) for p in pairs]
                rows["PSNR"].append(psnr)
                rows["SSIM"].append([structural_similarity(*p, channel_axis=2) for p in pairs])
                rows["robot IoU"].append(iou[b])
    means = {name: {k: np.mean(v, 0) for k, v in rows.items()} for name, rows in found.items()}
    return means, f"{seconds / plans:.3g} {unit}"


def table(scores):
    """The scores of `validate` as lines of text."""
    pictures = range(1, 1 + len(scores["stay"]["PSNR"]))
    lines = ["held-out videos, picture   " + "".join(f"{k:7d}" for k in pictures)]
    for measure in ("PSNR", "SSIM", "robot IoU"):
        for name, row in scores.items():
            lines.append(f"  {measure:10s} {name:13s}" + "".join(f"{x:7.2f}" for x in row[measure]))
    return "\n".join(lines)
