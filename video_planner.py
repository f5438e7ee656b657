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
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import core
import extract
import scores
import sims
import stage1
import train
from core import flag
from diffusion import (FRAMES, Enlarge, VideoUNet, add_noise, cosine_schedule, ddim_step,
                       from_noise, from_velocity, loss_weight, velocity)

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
            core.fail(f"--size {c.size} is not divisible by {whole} (--shrink and --multiples): "
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
            lines.append(extract.caption(np.concatenate(clip, 1), f"{what}: {name}"))
    film = np.concatenate([np.concatenate([imagined, batch["clip"]], 2)[b] for b in range(rows)], 2)
    return np.concatenate(lines), film


def write_film(path, frames, scale=2):
    """(T, H, W, 3) uint8 -> mp4, two pictures per second."""
    import imageio.v3 as iio
    frames = np.kron(frames, np.ones((1, scale, scale, 1), np.uint8))
    iio.imwrite(path, frames, fps=2, macro_block_size=2)


def load_planner(path, device="cpu"):
    """A trained VideoPlanner, frozen, with its averaged weights."""
    content = train.load(path, VideoPlanner.kind, "python video_planner.py --suite mt10")
    planner = VideoPlanner(core.from_dict(Config, content["config"]), content["extra"]["E"])
    planner.load_state_dict(content["ema"] or content["model"])
    return planner.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    config = core.parse(Config, "Stage 1 of AVDC and UniPi: learn to imagine videos.", argv)
    pictured = sims.is_metaworld(config.suite) and config.suite != "avdc"
    usual = "image" if pictured else "language"
    config.goal = config.goal or usual
    name = "video" + f"-{config.goal}" * (config.goal != usual)
    path = stage1.run_path(config, name)
    videos, held_out, note = stage1.prepare(config, path, "video_planner")
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
        planner = train.fit(VideoPlanner(config, E), batches, config, path, picture,
                            f"{note}, told by {config.goal}", {"E": E})
    silhouette = scores.train_silhouette(videos)
    found, cost = scores.validate(planner, held_out_samples(held_out, config), silhouette)
    text = f"{scores.table(found)}\none plan, {config.sample_steps} steps: {cost}"
    stage1.report(config, path, text, lambda: picture(planner))


if __name__ == "__main__":
    main()
