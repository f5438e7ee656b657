"""Stage 1 of AVDC and UniPi (AVDC section 3.1): imagine the video of the task being done.

    python video_planner.py --suite mt10                    # makes the data first if there is none
    python video_planner.py --suite mt10 --show             # imagined beside true videos
    python video_planner.py --suite avdc,avdc_view1,avdc_view2 --goal language  # AVDC: 3 cameras

A diffusion model, conditioned on the present picture and the task, generates the next seven
pictures of a clip that ends when the task is done.  `video_control` turns them into motion (AVDC
without any action label, UniPi by inverse dynamics); `executor.py` reads the denoiser's features as
a latent plan (UniPi as Mask2Act compares it).

Sizes: B batch, F future pictures, H W pixels, n cells of the bottleneck, E numbers per sentence.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training
from core.draw import caption
from core.flags import PlannerConfig, flag, parse
from core.planners import load_planner

FRAMES = 7              # future pictures.  differs: as the authors' code; the paper has eight
GAMMA = 5.0             # the largest weight of a loss, as in the authors' code
RESIDUAL_STD = 0.25     # of the change from the present picture where there is some, roughly


@dataclass
class Config(PlannerConfig):
    # differs: by default the goal picture, as for the other planners; AVDC and UniPi: the sentence
    goal: str = flag("image", "task conditioning: the goal picture, or language (AVDC, UniPi)",
                     choices=["image", "language"])
    sample_steps: int = flag(20, "denoising steps of one video (DDIM)", minimum=1)
    guidance: float = flag(0.0, "weight of classifier-free guidance", minimum=0)

    channels: int = 64                              # of the U-Net's first level
    channel_multipliers: tuple[int, ...] = (1, 2, 3)    # of these, at each level
    res_blocks: int = 1                             # per level
    attention: tuple[int, ...] = (8, 16)            # at these reductions of the picture
    downsample: int = 4                             # p: means over p x p pixels are diffused
    noise_steps: int = 100                          # T of the noise schedule
    condition_dropout: float = 0.1                  # share of samples without the task
    val_clips: int = 60                             # held-out clips to be scored by

    # differs: warm-up and cosine as for all planners, the average moves at every step; the authors:
    # a constant rate, every tenth step
    weight_decay, ema, save_every, log_every = 0.0, 0.999, 250, 50
    PRESETS = {
        "tiny": dict(demos=2, steps=5, size=64, channels=16, channel_multipliers=(1, 2), batch=4,
                     lr=1e-3, sample_steps=2, val_clips=3),
        "laptop": dict(demos=20, steps=1500, size=96, batch=8, lr=1e-3, sample_steps=10),
        "paper": dict(demos=50, steps=60000, size=128, channels=128, res_blocks=2, downsample=1,
                      channel_multipliers=(1, 2, 3, 4, 5), batch=16, lr=1e-4)}


# --- pictures and noise ---------------------------------------------------------------------------

def to_bytes(x):
    """Clipped, (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) uint8: `networks.to_unit`'s inverse."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def to_residual(pictures, now):
    """Future pictures (B, F, 3, H, W), the present one (B, 3, H, W) in [-1, 1] -> what is diffused.
    differs: the change from the present picture, 0 where nothing moves, which is most of it."""
    return (pictures - now[:, None]) / RESIDUAL_STD


def from_residual(x, now):
    """The inverse, clipped."""
    return (x * RESIDUAL_STD + now[:, None]).clamp(-1, 1)


def means(pictures, p):
    """(B, F, 3, H, W) -> means over p x p pixels (B, F, 3, H/p, W/p)."""
    return F.avg_pool2d(pictures.flatten(0, 1), p).unflatten(0, pictures.shape[:2])


def cosine_schedule(T):
    """alpha_bar, the share of the signal's variance left after each of T steps (Nichol and
    Dhariwal, 2021, eq. 17) -> (T,) falling from about 1 to about 0."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - beta, 0).float()


def add_noise(x0, noise, alpha_bar):
    """The forward process (Ho et al., 2020, eq. 4): clean x0 and noise -> x_t."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def loss_weight(alpha_bar):
    """Weight of the squared error of x0: min(1 + SNR, gamma) (Salimans and Ho, 2022, limited).
    differs: the paper has the error of the noise, its code that of the velocity by min-SNR weights
    (Hang et al., 2023): near 0 at the noisiest steps, which a short training then never learns."""
    return (1 / (1 - alpha_bar)).clamp(max=GAMMA)


def ddim_step(x, x0, alpha_bar, alpha_bar_prev):
    """DDIM (Song et al., 2021, eq. 12, sigma = 0): x at alpha_bar, its x0 -> at alpha_bar_prev."""
    noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    return add_noise(x0, noise, alpha_bar_prev)


# --- network --------------------------------------------------------------------------------------

def norm(channels):
    return nn.GroupNorm(math.gcd(8, channels), channels)


def zeroed(layer):
    """A layer whose output is 0 at first, as in guided-diffusion."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class VideoConv(nn.Module):
    """Factorised convolution (Fig. 3b), 3 x 3 in space, 3 in time: (B F, i, H, W) -> (B F, o, .).
    The one in time starts as the identity (Dirac), so the network starts as an image network.  It
    is a 1 x 1 convolution over each picture beside its neighbours: the same sum, without carrying
    the pixels to another order and back."""

    def __init__(self, i, o):
        super().__init__()
        self.space, self.time = nn.Conv2d(i, o, 3, 1, 1), zeroed(nn.Conv2d(3 * o, o, 1))
        with torch.no_grad():
            self.time.weight[:, o:2 * o, 0, 0] = torch.eye(o)

    def forward(self, x):
        clip = self.space(x).unflatten(0, (-1, FRAMES))                     # (B, F, o, H, W)
        clip = F.pad(clip, (0, 0, 0, 0, 0, 0, 1, 1))                        # (B, F + 2, o, H, W)
        near = torch.cat([clip[:, k:k + FRAMES] for k in range(3)], 2)      # (B, F, 3 o, H, W)
        return self.time(near.flatten(0, 1))


class ResBlock(nn.Module):
    """Two factorised convolutions, the noise level's and task's embedding between, a shortcut."""

    def __init__(self, i, o, D):
        super().__init__()
        self.norm1, self.conv1 = norm(i), VideoConv(i, o)
        self.embed, self.norm2, self.conv2 = nn.Linear(D, o), norm(o), VideoConv(o, o)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        zeroed(self.conv2.space)

    def forward(self, x, embedding):
        """x (B F, i, H, W), embedding (B F, D) -> (B F, o, H, W)."""
        y = self.conv1(F.silu(self.norm1(x))) + self.embed(F.silu(embedding))[..., None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Among the cells of one picture, never between pictures.  (B F, C, H, W) -> the same."""

    def __init__(self, C):
        super().__init__()
        self.heads, self.norm = max(1, C // 32), norm(C)
        self.qkv, self.out = nn.Conv2d(C, 3 * C, 1), zeroed(nn.Conv2d(C, C, 1))

    def forward(self, x, embedding):
        B, C, H, W = x.shape
        q, k, v = (y.reshape(B, self.heads, -1, H * W).transpose(2, 3)
                   for y in self.qkv(self.norm(x)).chunk(3, 1))         # (B, heads, H W, C/heads)
        y = networks.attend(q, k, v).transpose(2, 3).reshape(B, C, H, W)
        return x + self.out(y)


class Resize(nn.Module):
    """Between two levels of the U-Net: half or twice the resolution, and a convolution."""

    def __init__(self, C, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(C, C, 3, 1 if up else 2, 1)

    def forward(self, x, embedding):
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else x)


class Layers(nn.ModuleList):
    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding)
        return x


class VideoUNet(nn.Module):
    """The U-Net of Fig. 3a over all pictures of a clip at once.
    differs: small noisy pictures in, from means over p x p pixels, and clean ones of full size out:
    UniPi's cascade in one network.  p = 1 is the paper's; a laptop needs larger ones."""

    def __init__(self, config, C, E):
        """C channels of the pictures that it is conditioned on, E numbers per sentence or 0."""
        super().__init__()
        c, p, base = config, config.downsample, config.channels
        self.p, self.base, D = p, base, 4 * base
        # one vector of the sentence, beside the noise level.  differs: MiniLM's; the paper: CLIP's
        self.embed = nn.Sequential(nn.Linear(base + E, D), nn.SiLU(), nn.Linear(D, D))
        self.frame = nn.Parameter(torch.zeros(FRAMES, D))   # ours: which picture; at first nothing
        self.first = nn.Conv2d(3 + C * p * p, base, 3, 1, 1)
        self.down, self.up, widths, width = nn.ModuleList(), nn.ModuleList(), [base], base
        levels = [(base * multiplier, p * 2 ** k in c.attention)
                  for k, multiplier in enumerate(c.channel_multipliers)]
        for k, (wide, attends) in enumerate(levels):
            for _ in range(c.res_blocks):
                self.down.append(Layers([ResBlock(width, wide, D)] + [Attention(wide)] * attends))
                widths.append(width := wide)
            if k < len(levels) - 1:
                self.down.append(Resize(width, up=False))
                widths.append(width)
        self.width = width      # of the features at the bottleneck
        self.middle = Layers([ResBlock(width, width, D), Attention(width),
                              ResBlock(width, width, D)])
        for k, (wide, attends) in reversed(list(enumerate(levels))):
            for _ in range(c.res_blocks + 1):
                self.up.append(Layers([ResBlock(width + widths.pop(), wide, D)]
                                      + [Attention(wide)] * attends))
                width = wide
            if k:
                self.up[-1].append(Resize(width, up=True))
        self.last = nn.Sequential(norm(width), nn.SiLU(),
                                  zeroed(nn.Conv2d(width, 3 * p * p, 3, 1, 1)))

    def forward(self, x, pictures, text, t, features=False):
        """x (B, F, 3, H/p, W/p) noisy; condition: pictures (B, C, H, W) in [-1, 1], text (B, E);
        t (B,) in 0..T-1 -> (B, F, 3, H, W); features: the bottleneck's, (B, F, width, h, w)."""
        level = networks.sincos(t[:, None].float(), self.base)              # (B, base)
        embedding = self.embed(torch.cat([level, text], 1))[:, None] + self.frame   # (B, F, D)
        embedding = embedding.flatten(0, 1)                                 # (B F, D)
        pictures = F.pixel_unshuffle(pictures, self.p)                      # (B, C p p, H/p, W/p)
        x = torch.cat([x, pictures[:, None].expand(-1, FRAMES, -1, -1, -1)], 2).flatten(0, 1)
        skips = [x := self.first(x)]                                        # (B F, base, H/p, W/p)
        for layers in self.down:
            skips.append(x := layers(x, embedding))
        x = self.middle(x, embedding)                                       # (B F, width, h, w)
        if features:
            return x.unflatten(0, (-1, FRAMES))
        for layers in self.up:
            x = layers(torch.cat([x, skips.pop()], 1), embedding)
        x = F.pixel_shuffle(self.last(x), self.p)                           # (B F, 3, H, W)
        return x.unflatten(0, (-1, FRAMES))


class VideoPlanner(nn.Module):
    """The diffusion model; its latent plan is the features at the bottleneck."""
    kind, Config, frozen, forms = "video", Config, True, ["latent"]
    history, stride = 1, 1

    def __init__(self, config):
        super().__init__()
        c, self.config, self.size = config, config, config.size
        cell = c.downsample * 2 ** (len(c.channel_multipliers) - 1)
        self.net = VideoUNet(c, 3, c.E) if c.goal == "language" else VideoUNet(c, 6, 0)
        self.side, side = c.size // cell, c.size // c.downsample
        self.small = FRAMES, 3, side, side      # shape of what is diffused
        self.register_buffer("alpha_bar", cosine_schedule(c.noise_steps), persistent=False)  # (T,)

    def condition(self, obs):
        """obs: frames (B, h, H, W, 3) uint8, the last of now, goal (B, H, W, 3) uint8, text (B, E)
        -> the condition: pictures (B, 3 or 6, H, W) in [-1, 1], text (B, E or 0)."""
        now = obs["frames"][:, -1]
        # differs: in [-1, 1] as the pictures to generate; the authors' code leaves it in [0, 1]
        if self.config.goal == "language":
            return networks.to_unit(now), obs["text"].float()
        both = torch.cat([now, obs["goal"]], -1)                            # (B, H, W, 6)
        return networks.to_unit(both), torch.zeros(len(now), 0, device=now.device)

    def unconditional(self, pictures, text, keep=0.0):
        """The condition without the task, zeros in its place; keep (B,): 1 where it stays."""
        keep = torch.as_tensor(keep, device=text.device).view(-1, 1)        # (B, 1) or (1, 1)
        task = pictures[:, 3:] * keep[..., None, None]
        return torch.cat([pictures[:, :3], task], 1), text * keep

    def loss(self, batch):
        """batch: an observation, and clip (B, 1 + F, H, W, 3) uint8, now and to come -> weighted
        squared error of the clean clip, parts."""
        c, B, (pictures, text) = self.config, len(batch["clip"]), self.condition(batch)
        x0 = to_residual(networks.to_unit(batch["clip"][:, 1:]), pictures[:, :3])
        keep = (torch.rand(B, device=x0.device) >= c.condition_dropout).float()
        t = torch.randint(c.noise_steps, (B,), device=x0.device)
        alpha_bar, small = self.alpha_bar[t], means(x0, c.downsample)
        x = add_noise(small, torch.randn_like(small), alpha_bar.view(-1, 1, 1, 1, 1))
        # differs: the network predicts the clean clip; noise (the paper) and velocity (its code)
        # have as many dimensions as pixels, which a small network takes long to learn
        prediction = self.net(x, *self.unconditional(pictures, text, keep), t)
        error = (prediction.float() - x0).square().mean((1, 2, 3, 4))       # (B,)
        return (loss_weight(alpha_bar) * error).mean(), {"plain": error.mean().item()}

    def predict(self, x, pictures, text, t):
        """Noisy x, step t (int) -> clean x0 (B, F, 3, H, W), guided (Ho and Salimans, eq. 6)."""
        when = torch.full((len(x),), t, device=x.device)
        x0 = self.net(x, pictures, text, when).float()
        if self.config.guidance:
            w, unconditional = self.config.guidance, self.unconditional(pictures, text)
            x0 = (1 + w) * x0 - w * self.net(x, *unconditional, when).float()
        return to_residual(from_residual(x0, pictures[:, :3]), pictures[:, :3])     # no x0 > white

    @torch.no_grad()
    def imagine(self, obs, generator=None):
        """obs as for `condition` -> the future pictures, the last when the task is done,
        (B, F, H, W, 3) uint8.  differs: few steps of DDIM; the authors take 100 of DDPM."""
        c, (pictures, text) = self.config, self.condition(obs)
        x = torch.randn(len(pictures), *self.small, generator=generator).to(pictures)
        times = torch.linspace(c.noise_steps - 1, 0, c.sample_steps).round().long().tolist()
        for t, then in zip(times, times[1:]):
            x0 = means(self.predict(x, pictures, text, t), c.downsample)
            x = ddim_step(x, x0, self.alpha_bar[t], self.alpha_bar[then])
        return to_bytes(from_residual(self.predict(x, pictures, text, times[-1]), pictures[:, :3]))

    def sets(self, form):
        """What `plan` brings: {name: (places (n, 3): view 0, x, y in [0, 1]; width)}."""
        places = networks.grid_places(self.side, view=0)                    # (n, 3)
        return {"picture": (places, self.net.width), "plan": (places, FRAMES * self.net.width)}

    @torch.no_grad()
    def plan(self, obs, form):
        """ours (Mask2Act does not say which features): the U-Net's bottleneck at t = T, x_T = 0, a
        map per future picture, plan (B, n, F width), and their mean without task (B, n, width)."""
        pictures, text = self.condition(obs)
        x = pictures.new_zeros(len(pictures), *self.small)
        t = torch.full((len(x),), self.config.noise_steps - 1, device=x.device)
        features = lambda *condition: self.net(x, *condition, t, features=True).flatten(3)
        picture = features(*self.unconditional(pictures, text)).mean(1)     # (B, width, n)
        plan = features(pictures, text).permute(0, 3, 1, 2).flatten(2)      # (B, n, F width)
        return {"picture": picture.transpose(1, 2), "plan": plan}

    def draw(self, obs):
        """[(caption, (H, W, 3) uint8)] of an observation's first: imagined pictures."""
        imagined = self.imagine(obs, torch.Generator().manual_seed(0))[0].cpu().numpy()
        return [(f"imagined {k}", imagined[k - 1]) for k in (1, 4, FRAMES)]


# --- data -----------------------------------------------------------------------------------------

def clip_times(t, length):
    """AVDC's clips: evenly from step t (...) to the end of an episode of `length` (...) steps, when
    the task is done -> (..., 1 + F) steps."""
    return np.rint(np.linspace(t, np.asarray(length) - 1, 1 + FRAMES, axis=-1)).astype(int)


def make_batch(episodes, episode, t, rng):
    """Observations of frames t (B,) of episodes, and the clips that begin there, as a dict."""
    times = clip_times(t, episodes.length[episode])
    clip = episodes.gather("obs/agentview_rgb", episode[:, None], times)    # (B, 1 + F, H, W, 3)
    return {"clip": clip, "frames": clip[:, :1], "text": episodes.text[episodes.task[episode]],
            "goal": episodes.last_frames(episodes.goal_of(episode, rng))}


def psnr(a, b):
    """Peak signal-to-noise ratio of pictures a, b (N, 3, H, W) in 0..255 -> (N,) dB, at most 60."""
    return (10 * torch.log10(255 ** 2 / (a - b).square().mean((1, 2, 3)))).clamp(max=60)


def ssim(a, b, window=7):
    """Structural similarity (Wang et al., 2004, eq. 13) of pictures as for psnr -> (N,)."""
    mean, unbiased = lambda x: F.avg_pool2d(x, window, 1), window ** 2 / (window ** 2 - 1)
    mean_a, mean_b, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    var_a, var_b = unbiased * (mean(a * a) - mean_a ** 2), unbiased * (mean(b * b) - mean_b ** 2)
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    same = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (same / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def validate(planner, episodes, seed=1):
    """PSNR and SSIM of imagined pictures, beside the present one repeated, on held-out episodes
    -> {("PSNR" | "SSIM", "imagined" | "stay"): (F,)}."""
    generator, found, clips = torch.Generator().manual_seed(seed), {}, planner.config.val_clips
    for first in range(0, clips, 20):
        chosen = episodes.sample_frames(first, min(20, clips - first), seed)
        batch = make_batch(episodes, *chosen)
        imagined = planner.eval().imagine(training.tensors(batch, planner), generator).cpu()
        clip = torch.as_tensor(batch["clip"])                               # (B, 1 + F, H, W, 3)
        for score in (psnr, ssim):
            for name, guess in (("imagined", imagined), ("stay", clip[:, :1].expand_as(imagined))):
                pair = [x.flatten(0, 1).movedim(-1, 1).double() for x in (guess, clip[:, 1:])]
                row = score(*pair).unflatten(0, (-1, FRAMES))               # (B, F)
                found.setdefault((score.__name__.upper(), name), []).append(row)
    return {key: torch.cat(rows).mean(0).numpy() for key, rows in found.items()}


def table(scores):
    """The scores of `validate` as lines of text."""
    lines = ["held-out videos, picture   " + "".join(f"{k:7d}" for k in range(1, 1 + FRAMES))]
    return "\n".join(lines + [f"  {measure:10s} {name:13s}" + "".join(f"{x:7.2f}" for x in row)
                              for (measure, name), row in scores.items()])


def show(planner, episodes, rows=4, seed=3):
    """Rows of pictures, imagined above true, the present one first -> (., ., 3) uint8."""
    episode, t, rng = episodes.sample_frames(0, rows, seed)
    batch = make_batch(episodes, episode, t // 2, rng)      # early: more is to come
    generator, drawn = torch.Generator().manual_seed(seed), []
    imagined = planner.eval().imagine(training.tensors(batch, planner), generator).cpu()
    imagined = np.concatenate([batch["frames"], imagined], 1)               # (rows, 1 + F, H, W, 3)
    for b in range(rows):
        name = episodes.tasks[episodes.task[episode[b]]].replace("_", " ")
        for clip, what in ((imagined[b], "imagined"), (batch["clip"][b], "true")):
            drawn.append(caption(np.concatenate(clip, 1), f"{what}: {name}"))
    return np.concatenate(drawn)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    from demos.record import load_videos
    config = parse(Config, "Stage 1 of AVDC and UniPi: learn to imagine videos.", argv)
    path = training.run_path(config, "video")
    planner = load_planner(path, config.device) if config.show else None
    videos, held_out, note = load_videos(config)
    picture = lambda trained: show(trained, held_out)
    if not planner:
        config.E = videos.text.shape[1]
        torch.manual_seed(config.seed)
        frames = lambda step: videos.sample_frames(step, config.batch, config.seed)
        batches = lambda step: make_batch(videos, *frames(step))
        planner = training.fit(VideoPlanner(config), batches, config, path, picture, note)
    planner.config.sample_steps = config.sample_steps       # sampled as the flags say
    planner.config.guidance = config.guidance
    training.report(config, path, table(validate(planner, held_out)), lambda: picture(planner))


if __name__ == "__main__":
    main()
