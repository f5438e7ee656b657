"""Mask2Act stage 1 (section 3.2): learn from action-free video where the masks will be.

    python mask_planner.py --suite libero_spatial           # makes the data first if there is none
    python mask_planner.py --suite libero_spatial --show    # predicted beside true masks

The planner P sees the goal image and the last h frames and writes a plan (eq. 1); the decoder D
moves any binary mask of now into the future, given the plan (eq. 2); soft aggregation makes the
objects share the pixels (eq. 3). The executor later sees the plan only: no masks are needed at test
time.

Sizes: B batch, T frames of history, n tokens per picture, D width, N objects, K horizons, H W mask
pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sims
from baselines import explicit
from core import networks, training
from core.draw import caption, draw_masks
from core.flags import flag, from_dict, parse
from demos import record


def soft_aggregate(prob):
    """Mask2Act eq. 3 (after STM): one probability per object -> logits over background and objects.

    prob (B, N, ...) in [0, 1] -> (B, N + 1, ...); softmax over dim 1 is proportional to the odds p
    / (1 - p).
    """
    background = (1 - prob).prod(1, keepdim=True)  # (B, 1, ...)
    p = torch.cat([background, prob], 1).clamp(1e-7, 1 - 1e-7)  # (B, N + 1, ...)
    return torch.log(p / (1 - p))


def bootstrapped_cross_entropy(logits, target, hardest):
    """Cross-entropy of the hardest pixels of each mask (XMem). The curve rises while `hardest`
    falls: by design.

    logits (B, C, H, W), target (B, H, W) integers, hardest in (0, 1]: the fraction of pixels kept
    -> scalar.
    """
    loss = F.cross_entropy(logits, target, reduction="none").flatten(1)  # (B, H W)
    kept = max(1, int(hardest * loss.shape[1]))
    return loss.topk(kept, 1).values.mean()


def dice(prob, target):
    """1 - 2 |m g| / (|m| + |g|) over the foreground, smoothed by 1 (XMem).

    prob (B, N, H, W), target (B, N, H, W) of 0 and 1 -> (B, N).
    """
    m, g = prob.flatten(2), target.flatten(2)  # (B, N, H W)
    return 1 - (2 * (m * g).sum(2) + 1) / (m.sum(2) + g.sum(2) + 1)


def hardest_fraction(progress):
    """XMem's schedule as fractions of the training: all pixels until 20 %, then falling to 15 % of
    them at 70 %."""
    return 1 - 0.85 * min(1.0, max(0.0, (progress - 0.2) / 0.5))


# --- geometry -------------------------------------------------------------------------------------

def binary_masks(masks, N):
    """masks (..., H, W) of 0..N integers -> (..., N, H, W) float of 0 and 1; one map per object."""
    return (masks.unsqueeze(-3) == torch.arange(1, N + 1,
                                                device=masks.device)[:, None, None]).float()


def iou(m, g):
    """Intersection over union of boolean masks (..., H, W) -> (...); nan where both are empty."""
    union = (m | g).sum((-1, -2)).float()
    return torch.where(union > 0, (m & g).sum((-1, -2)) / union, torch.nan)


def half(masks):
    """Masks (..., H, W) at half the resolution: every second pixel."""
    return masks[..., ::2, ::2]


def double(masks, shape):
    """The inverse, for drawing: masks (h, w) at full resolution, shape (H, W)."""
    return masks.repeat(2, 0).repeat(2, 1)[:shape[0], :shape[1]]


# Control steps (of 50 ms) ahead of which masks are predicted.  ours: the paper names no set of
# delta t; an episode takes about 110 steps, so the longest horizon reaches across one phase of it
# (approach, carry).
HORIZONS = (4, 8, 16, 32)
EARLY = 10  # control steps in which the hand has hardly moved


@dataclass
class PlannerConfig:
    """What the planners of masks and of features have in common."""
    suite: str = flag("libero_spatial", "suite: " + ", ".join(sims.SUITES))
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    videos: str = flag("", "suites whose videos it learns from, comma-separated, of other bodies "
                       "too (ATM, V-B), such as libero_spatial:2,libero_spatial_ur5e; empty: its "
                       "own alone")
    demos: int | None = flag(None, "action-free videos per task", minimum=1)
    steps: int | None = flag(None, "gradient steps", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU",
                              choices=["laptop", "paper"])
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    width: int | None = flag(None, "width of the transformer", minimum=8)
    depth: int | None = flag(None, "transformer blocks", minimum=1)
    blocks: tuple[int, ...] | None = flag(None,
                                          "residual blocks in each stage of the image encoder")
    channels: int | None = flag(None, "channels of its first stage, doubled at each next one",
                                minimum=16)
    history: int | None = flag(None, "frames h that the planner sees", minimum=1)
    stride: int = flag(4, "control steps between these frames", minimum=1)
    batch: int = flag(32, "samples per step", minimum=1)
    lr: float | None = flag(None, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    show: bool = flag(False, "only draw predicted against true masks of the trained planner")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    weight_decay, warmup, clip, ema, save_every, log_every = 1e-4, 100, 1.0, 0.0, 500, 100
    # 50 videos, ResNet-18 and 128 px are the paper's; depth, width and history are GR-1's and ATM's
    PRESETS = {"laptop": dict(demos=20, steps=2000, size=96, width=128, depth=3, blocks=(1, 1, 1),
                              channels=32, history=1, lr=1e-3),
               "paper": dict(demos=50, steps=20000, size=128, width=384, depth=6,
                             blocks=(2, 2, 2, 2), channels=64, history=10, lr=5e-4)}


@dataclass
class Config(PlannerConfig):
    objects: int = flag(3, "tracked objects, robot first (the paper's ablation: 1, 2 or 3)",
                        minimum=1)


# --- networks -------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """D of eq. 2: one object's binary mask now, and the plan -> its mask at every horizon.

    Objects pass independently, so there may be any number of them.
    """

    def __init__(self, width, K):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o),
                                                  nn.GELU())
        self.down1, self.down2, self.down3 = conv(1, 32, 2), conv(32, 64, 2), conv(64, 64, 2)
        self.plan = nn.Conv2d(width, 128, 1)
        self.fuse = nn.Sequential(conv(64 + 128, 128, 1), conv(128, 128, 1))
        self.up2, self.up1 = conv(128 + 64, 64, 1), conv(64 + 32, 32, 1)
        self.out = nn.Conv2d(32, K, 1)

    def forward(self, plan, masks):
        """plan (B, D, h, w), masks (B, N, H, W) of 0 and 1 -> probabilities (B, N, K, H, W)."""
        B, N, H, W = masks.shape
        grow = lambda x, like: F.interpolate(x, size=like.shape[-2:], mode="bilinear")
        d1 = self.down1(masks.flatten(0, 1)[:, None])  # (B N, 32, H/2, W/2)
        d2 = self.down2(d1)  # (B N, 64, H/4, W/4)
        d3 = self.down3(d2)  # (B N, 64, H/8, W/8)
        p = grow(self.plan(plan), d3).repeat_interleave(N, 0)  # (B N, 128, H/8, W/8)
        x = self.fuse(torch.cat([d3, p], 1))  # (B N, 128, H/8, W/8)
        x = self.up2(torch.cat([grow(x, d2), d2], 1))  # (B N, 64, H/4, W/4)
        x = self.up1(torch.cat([grow(x, d1), d1], 1))  # (B N, 32, H/2, W/2)
        logit = grow(self.out(x), masks)  # (B N, K, H, W)
        return logit.float().sigmoid().unflatten(0, (B, N))  # (B, N, K, H, W)


class Planner(nn.Module):
    """P of section 3.2: what the planners of masks and of features have in common."""
    arguments = []

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = networks.ImageEncoder(config.width, config.blocks, config.channels)
        self.side = self.encoder.cells(config.size)  # the feature map is side x side
        self.n, self.width = self.side ** 2, config.width
        self.place = nn.Parameter(torch.randn(self.n, config.width) * 0.02)
        # goal first
        self.time = nn.Parameter(torch.randn(1 + config.history, 1, config.width) * 0.02)
        self.gpt = networks.Transformer(config.width, config.depth, max(4, config.width // 64))
        self.register_buffer("mask", networks.block_causal_mask(1 + config.history, self.n),
                             persistent=False)

    def encode(self, images, fine=False):
        """images (..., H, W, 3) uint8 -> tokens (..., n, D); with `fine` also finer features (...,
        C, h', w')."""
        x, y = self.encoder(images.flatten(0, -4), fine=True)  # (B, D, h, w), (B, C, h', w')
        x = x.flatten(2).transpose(1, 2).unflatten(0, images.shape[:-3])  # (..., n, D)
        return (x, y.unflatten(0, images.shape[:-3])) if fine else x

    def forward(self, frames, goal, fine=False):
        """Eq. 1: frames (B, T, H, W, 3) uint8, oldest first, goal (B, H, W, 3) uint8 -> plan (B, T,
        n, D).

        fine: also the last frame's finer features (B, C, h', w'), for the locator.
        """
        # differs: n tokens per picture (a map), where PLEX has one; pooling to one token loses
        # where things are
        x, y = self.encode(frames, fine=True)  # (B, T, n, D), (B, T, C, h', w')
        plan = self.plan_from(torch.cat([self.encode(goal)[:, None], x], 1))
        return (plan, y[:, -1]) if fine else plan

    def plan_from(self, x):
        """x (B, 1 + T, n, D): encoded goal, then frames -> plan (B, T, n, D)."""
        L = x.shape[1] * self.n
        x = x + self.place + self.time[:x.shape[1]]
        x = self.gpt(x.flatten(1, 2), self.mask[:L, :L])  # (B, (1 + T) n, D)
        return x.unflatten(1, (-1, self.n))[:, 1:]  # (B, T, n, D)

    def as_map(self, tokens):
        """tokens (B, n, D) -> map (B, D, h, w)."""
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))


class MaskPlanner(Planner):
    """P and D of section 3.2."""
    # forms: what an executor can hear
    kind, forms = "mask_planner", ["latent", "explicit"]

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Decoder(config.width, len(HORIZONS))
        self.locator = explicit.Locator(config.width, self.encoder.fine, config.objects, len(HORIZONS))
        # share of the training done, for the bootstrapping
        self.register_buffer("progress", torch.zeros(()))

    def predict(self, frames, goal, masks):
        """masks (B, N, H, W) of 0 and 1 at the last frame -> probabilities (B, N, K, H, W)."""
        return self.decoder(self.as_map(self(frames, goal)[:, -1]), masks)

    def loss(self, batch):
        """batch: frames (B, T, H, W, 3), goal (B, H, W, 3) uint8, masks (B, 1 + K, H/2, W/2) of
        0..N: now, then future.

        -> scalar, parts.  ours: the loss covers the last frame of the history only.
        """
        N, K = self.config.objects, len(HORIZONS)
        masks = batch["masks"].long()
        masks = masks * (masks <= N)  # objects beyond the tracked ones are background
        m = binary_masks(masks, N)  # (B, 1 + K, N, H, W)
        plan, fine = self(batch["frames"], batch["goal"], fine=True)
        plan = self.as_map(plan[:, -1])  # (B, D, h, w)
        prob = self.decoder(plan, m[:, 0])  # (B, N, K, H, W)
        logits = soft_aggregate(prob).transpose(1, 2).flatten(0, 1)  # (B K, N + 1, H, W)
        # (B K, N, H, W)
        future, now = m[:, 1:].flatten(0, 1), m[:, :1].expand(-1, K, -1, -1, -1).flatten(0, 1)
        ce = bootstrapped_cross_entropy(logits, masks[:, 1:].flatten(0, 1),
                                        hardest_fraction(float(self.progress)))
        # (B K, N); an object seen in neither picture would count as solved
        seen = torch.maximum(future, now).amax((2, 3))
        d = (dice(logits.softmax(1)[:, 1:], future) * seen).sum() / seen.sum().clamp(min=1)
        # differs: the plan also has to say without any mask where the masks are, and its gradient
        # reaches the planner
        drawn = self.locator.draw(plan, fine)  # (B, N + 1, K + 1, 2 h', 2 w')
        # (B, 1 + K, N, ...)
        share = F.adaptive_avg_pool2d(m.flatten(0, 1), drawn.shape[-2:]).unflatten(0, m.shape[:2])
        # (B, N + 1, 1 + K, 2 h', 2 w')
        share = torch.cat([1 - share.sum(2, keepdim=True), share], 2).transpose(1, 2)
        draw = -(share * drawn.log_softmax(1)).sum(1).mean()
        where, present = explicit.locate(m)  # (B, 1 + K, N, 5), (B, 1 + K, N)
        error = F.smooth_l1_loss(self.locator.read(drawn), where.transpose(1, 2), reduction="none",
                                 beta=0.02)
        shown = present.transpose(1, 2)[..., None].float()  # (B, N, 1 + K, 1)
        located = (error * shown).sum() / shown.sum().clamp(min=1) / explicit.LOCATIONS
        if self.training:
            self.progress += 1 / self.config.steps
        loss = ce + d + 5 * draw + 10 * located
        return loss, {"ce": ce.item(), "dice": d.item(), "draw": draw.item(),
                      "located": located.item()}


# --- data -----------------------------------------------------------------------------------------

def draw_frames(episodes, step, config):
    """Random frames for one training step -> episode (B,), t (B,), rng.

    ours: every fourth sample is from an episode's first EARLY steps. There the picture alone does
    not tell which of two bowls will move, and a planner that has seen little of it reads that from
    the hand later and not from the goal.
    """
    episode, t, rng = episodes.draw(step, config.batch, config.seed)
    t[:config.batch // 4] = rng.integers(EARLY, size=config.batch // 4)
    return episode, t, rng


def make_batch(episodes, episode, t, rng, config):
    """The planner's view of frames t (B,) of some episodes, as a dict of arrays (see
    MaskPlanner.loss)."""
    past = t[:, None] + config.stride * np.arange(1 - config.history, 1)  # (B, T)
    ahead = t[:, None] + np.array([0, *HORIZONS])  # (B, 1 + K)
    goal = episodes.goal_of(episode, rng)
    return {"frames": episodes.gather("obs/agentview_rgb", episode[:, None], past),
            "goal": episodes.gather("obs/agentview_rgb", goal, episodes.length[goal] - 1),
            "masks": half(episodes.gather("masks", episode[:, None], ahead))}


@torch.no_grad()
def validate(planner, episodes, samples=600, seed=1):
    """Mask IoU per horizon beside copying the last mask, on held-out episodes.

    Returns {group: {"planner": (K,), "copy": (K,), "n": (K,)}} for robot, moving and static: an
    object is moving at a horizon if its mask then overlaps the present one by less than 0.7.
    """
    config, device = planner.config, next(planner.parameters()).device
    planner.eval()
    total = {g: np.zeros((3, len(HORIZONS))) for g in ("robot", "moving", "static")}
    for step in range(-(-samples // 50)):
        episode, t, rng = episodes.draw(step, 50, seed)
        batch = {k: torch.as_tensor(v, device=device)
                 for k, v in make_batch(episodes, episode, t, rng, config).items()}
        m = binary_masks(batch["masks"].long(), config.objects)  # (B, 1 + K, N, H, W)
        prob = planner.predict(batch["frames"], batch["goal"], m[:, 0])  # (B, N, K, H, W)
        label = soft_aggregate(prob).argmax(1)  # (B, K, H, W) in 0..N
        ours = iou(binary_masks(label, config.objects).bool(), m[:, 1:].bool())  # (B, K, N)
        copied = iou(m[:, :1].bool().expand_as(m[:, 1:]), m[:, 1:].bool())  # (B, K, N)
        robot = torch.zeros_like(copied, dtype=torch.bool)
        robot[..., 0] = True
        groups = {"robot": robot, "moving": ~robot & (copied < 0.7),
                  "static": ~robot & (copied >= 0.7)}
        for g, chosen in groups.items():
            chosen = chosen & ~copied.isnan()
            for row, value in enumerate((ours, copied, torch.ones_like(ours))):
                total[g][row] += torch.where(chosen, value, 0).sum((0, 2)).cpu().numpy()
    return {g: {"planner": a / np.maximum(n, 1), "copy": b / np.maximum(n, 1), "n": n}
            for g, (a, b, n) in total.items()}


def table(scores):
    """The scores of `validate` as lines of text."""
    lines = ["held-out mask IoU    " + "".join(f"   +{k:<3d} copy" for k in HORIZONS)]
    for group, s in scores.items():
        cells = "".join(f"   {a:.2f} {b:.2f}" for a, b in zip(s["planner"], s["copy"]))
        lines.append(f"  {group:18s} {cells}   (n {int(s['n'][-1])})")
    return "\n".join(lines)


@torch.no_grad()
def show(planner, episodes, columns=4, seed=3):
    """Rows of (now; predicted | true at every horizon), masks drawn on the frames -> (., ., 3)
    uint8."""
    config, device = planner.config, next(planner.parameters()).device
    episode, t, rng = episodes.draw(0, columns, seed)
    batch = make_batch(episodes, episode, t, rng, config)
    tensor = {k: torch.as_tensor(v, device=device) for k, v in batch.items()}
    m = binary_masks(tensor["masks"][:, 0].long(), config.objects)  # (B, N, H, W)
    prob = planner.predict(tensor["frames"], tensor["goal"], m)
    label = soft_aggregate(prob).argmax(1).cpu().numpy()  # (B, K, H, W)
    full = lambda masks: double(masks, (config.size, config.size))
    rows = []
    for b in range(columns):
        # (K, H, W, 3)
        future = episodes.gather("obs/agentview_rgb", episode[b], t[b] + np.array(HORIZONS))
        cells = [batch["goal"][b],
                 draw_masks(batch["frames"][b, -1], full(batch["masks"][b, 0]))]
        for k in range(len(HORIZONS)):
            cells += [draw_masks(batch["frames"][b, -1], full(label[b, k])),
                      draw_masks(future[k], full(batch["masks"][b, 1 + k]))]
        rows.append(np.concatenate(cells, 1))
    titles = ["goal", "now"] + [f"{w} +{k}" for k in HORIZONS for w in ("plan", "true")]
    head = np.concatenate([caption(np.full((1, config.size, 3), 255, np.uint8), w)
                           for w in titles], 1)
    return np.concatenate([head, *rows])


def load_planner(path, device="cpu"):
    """A trained MaskPlanner, frozen."""
    content = training.load(path, kind=MaskPlanner.kind,
                         made_by="python mask_planner.py --suite libero_spatial")
    planner = MaskPlanner(from_dict(Config, content["config"]))
    planner.load_state_dict(content["model"])
    return planner.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    config = parse(Config, "Stage 1 of Mask2Act: learn from video where the masks will be.",
                        argv)
    path = record.run_path(config, "mask")
    videos, held_out, note = record.prepare(config, path, "mask_planner")
    config.objects = min(config.objects, len(videos.objects))
    torch.manual_seed(config.seed)
    batches = lambda step: make_batch(videos, *draw_frames(videos, step, config), config)
    if config.show:
        planner = load_planner(path, config.device)
    else:
        planner = training.fit(MaskPlanner(config), batches, config, path,
                            lambda p: show(p, held_out), note)
    record.report(config, path, table(validate(planner, held_out)),
                  lambda: show(planner, held_out, columns=8))


if __name__ == "__main__":
    main()
