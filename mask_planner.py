"""Mask2Act stage 1 (section 3.2, Fig. 3): learn from action-free video where the masks will be.

    python mask_planner.py --suite libero_spatial           # makes the data first if there is none
    python mask_planner.py --suite libero_spatial --show    # predicted beside true masks (Fig. 8)
    python mask_planner.py --suite libero_spatial --grounded    # ours, see cell_cross_entropy
    python executor.py --planner runs/libero_spatial/mask_grounded.pt --form masks  # ours, see plan

The planner P encodes the goal picture and the last h frames and predicts a plan (eq. 1); the
decoder D moves any binary mask of now into the future, given the plan (eq. 2); soft aggregation
makes the objects share the pixels (eq. 3).  At test time the plan is all that is needed: no masks.

Sizes: B batch, T frames of history, n tokens per picture, D width, N objects, K horizons, H W
pixels, of masks half as many, h w cells of the encoder's feature map (n = h w).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training
from core.draw import caption, draw_masks
from core.episodes import look_times
from core.files import fail
from core.flags import PlannerConfig, flag, parse
from core.planners import load_planner

# Control steps (50 ms in LIBERO, 12.5 ms in Meta-World) ahead at which masks are predicted.  ours:
# the paper names no set of delta t; an episode of LIBERO takes about 110 steps, so the last one
# reaches across one phase of it (approach, carry).  In a comparison every plan looks as far.
HORIZONS = (4, 8, 16, 32)
K = len(HORIZONS)


@dataclass
class Config(PlannerConfig):
    # differs: the first ones, robot first; the paper's ablation picks one or two at random
    objects: int = flag(3, "tracked objects, robot first (the paper's ablation: 1, 2 or 3)",
                        minimum=1)
    shuffled: bool = flag(False, "control: the future to learn is another video's")
    grounded: bool = flag(False, "ours: each plan token also predicts, without being given any "
                          "mask, the masks in its own cell of the picture")

    # paper: 50 videos, ResNet-18; width and history are GR-1's.  ours: depth, 128 px
    PRESETS = {"tiny": dict(demos=2, steps=5, size=64, batch=4, lr=1e-3, width=32, depth=1,
                            blocks=(1, 1, 1), channels=16, history=2),
               "laptop": dict(demos=20, steps=2000, size=96, batch=32, lr=1e-3, width=128, depth=3,
                              blocks=(1, 1, 1), channels=32, history=1),
               "paper": dict(demos=50, steps=20000, size=128, batch=32, lr=5e-4, width=384, depth=6,
                             blocks=(2, 2, 2, 2), channels=64, history=10)}


# --- losses and masks -----------------------------------------------------------------------------

def soft_aggregate(prob):
    """Mask2Act eq. 3 (after STM): one probability per object -> logits over background and objects.
    The background, first, has p_0 = prod_n (1 - p_n); logits log p - log(1-p), finite at 0 and 1.
    prob (B, N, ...) in [0, 1] -> (B, N + 1, ...)."""
    background = (1 - prob).prod(1, keepdim=True)  # (B, 1, ...)
    p = torch.cat([background, prob], 1).clamp(1e-7, 1 - 1e-7)  # (B, N + 1, ...)
    return torch.log(p / (1 - p))


def bootstrapped_cross_entropy(logits, target, hardest):
    """Mean cross-entropy of each picture's hardest pixels (XMem): hardest H W, rounded down, at
    least one; it rises as their fraction `hardest` in (0, 1] falls, by design.
    logits (B, C, H, W), target (B, H, W) integers -> scalar."""
    loss = F.cross_entropy(logits, target, reduction="none").flatten(1)  # (B, H W)
    count = max(1, int(hardest * loss.shape[1]))
    return loss.topk(count, 1).values.mean()


def hardest_fraction(progress):
    """XMem's schedule of 100,000 steps, as shares: progress, 0 at the training's start, 1 at its
    end or later -> fraction of pixels: 1 until 0.2, then linearly down to 0.15 at 0.7."""
    return 1 - 0.85 * min(1.0, max(0.0, (progress - 0.2) / 0.5))


def dice(prob, target):
    """1 - (2 |m g| + 1) / (|m| + |g| + 1), |.| the sum over pixels, for each object (XMem).
    prob (B, N, H, W) in [0, 1], target (B, N, H, W) of 0 and 1 -> (B, N)."""
    m, g = prob.flatten(2), target.flatten(2)  # (B, N, H W)
    return 1 - (2 * (m * g).sum(2) + 1) / (m.sum(2) + g.sum(2) + 1)


def cell_cross_entropy(logits, masks):
    """ours, `--grounded`: cross-entropy of what the plan's tokens predict without any mask, each
    for its own cell.  D is given where the objects are, so the paper's losses let the plan hold
    only how they move; with this one it also holds where they are.  logits (B, C, H', W') over
    background and objects, masks (B, C - 1, H, W) of 0 and 1 -> scalar."""
    share = F.adaptive_avg_pool2d(with_background(masks), logits.shape[-2:])  # (B, C, H', W')
    return F.cross_entropy(logits, share)


def binary_masks(masks, N):
    """Masks (..., H, W) of integers, 0 background -> of objects 1..N (..., N, H, W) float of 0 and
    1; a larger number is in no mask."""
    number = torch.arange(1, N + 1, device=masks.device)
    return (masks.unsqueeze(-3) == number[:, None, None]).float()


def with_background(m):
    """Masks of 0 and 1 that share no pixel (B, N, H, W) -> (B, N + 1, H, W), background first."""
    return torch.cat([1 - m.sum(1, keepdim=True), m], 1)


def iou(m, g):
    """Intersection over union of boolean masks (..., H, W) -> (...); 1 where both are empty."""
    both, union = (m & g).sum((-1, -2)), (m | g).sum((-1, -2))
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


# --- networks -------------------------------------------------------------------------------------

class Decoder(nn.Module):
    """D of eq. 2: one object's binary mask now, and the plan -> its mask at every horizon.  Objects
    pass independently, so there may be any number of them.
    ours: convolutions; the paper says only that the features of masks and plan are concatenated."""

    def __init__(self, width):
        super().__init__()
        conv = lambda i, o, stride: nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o),
                                                  nn.GELU())
        self.down1, self.down2, self.down3 = conv(1, 32, 2), conv(32, 64, 2), conv(64, 64, 2)
        self.plan = nn.Conv2d(width, 128, 1)
        self.fuse = nn.Sequential(conv(64 + 128, 128, 1), conv(128, 128, 1))
        self.up2, self.up1 = conv(128 + 64, 64, 1), conv(64 + 32, 32, 1)
        # differs: all horizons in one pass; the paper repeats eq. 2 for each
        self.out = nn.Conv2d(32, K, 1)

    def forward(self, plan, masks):
        """plan (B, D, h, w), masks (B, N, H, W) of 0 and 1 -> probabilities (B, N, K, H, W); 0 for
        an object whose mask is empty, hidden or not of the task, as with XMem's selector."""
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
        prob = logit.float().sigmoid().unflatten(0, (B, N))  # (B, N, K, H, W)
        return prob * masks.amax((2, 3))[:, :, None, None, None]


class Planner(nn.Module):
    """P of section 3.2, shared by baselines/plex.py; it plans for the third-person picture alone,
    as the paper does (section 4.1)."""
    frozen, forms = True, ["latent", "goal"]

    def __init__(self, config):
        super().__init__()
        self.config, self.width = config, config.width
        self.size, self.history, self.stride = config.size, config.history, config.stride
        self.encoder = networks.ImageEncoder(config.width, config.blocks, config.channels)
        self.side = self.encoder.cells(config.size)  # the feature map is side x side
        self.n, steps = self.side ** 2, 1 + config.history  # goal first
        self.position = nn.Parameter(torch.randn(self.n, config.width) * 0.02)
        self.time = nn.Parameter(torch.randn(steps, 1, config.width) * 0.02)
        self.gpt = networks.Transformer(config.width, config.depth, max(4, config.width // 64))
        self.register_buffer("mask", networks.block_causal_mask(steps, self.n), persistent=False)

    def encode(self, images):
        """Pictures (..., H, W, 3) uint8 -> tokens (..., n, D)."""
        x = networks.to_tokens(self.encoder(images.flatten(0, -4)))  # (., n, D)
        return x.unflatten(0, images.shape[:-3])  # (..., n, D)

    def forward(self, frames, goal):
        """Eq. 1: frames (B, T, H, W, 3), oldest first, goal (B, H, W, 3) uint8 -> (B, T, n, D)."""
        return self.plan_from(torch.cat([self.encode(goal)[:, None], self.encode(frames)], 1))

    def plan_from(self, x):
        """x (B, 1 + T, n, D): encoded goal, then frames -> plan (B, T, n, D)."""
        # differs: n tokens per picture (a map); PLEX has one, which loses where things are
        steps, L = x.shape[1], x.shape[1] * self.n
        x = x + self.position + self.time[:steps]
        x = self.gpt(x.flatten(1, 2), self.mask[:L, :L])  # (B, (1 + T) n, D)
        return x.unflatten(1, (steps, self.n))[:, 1:]  # (B, T, n, D)

    def sets(self, form):
        """What `plan` brings: {name: (places (n, 3): view 0, x, y in [0, 1]; width)}."""
        places = networks.grid_places(self.side, view=0)  # (n, 3)
        return {"picture": (places, self.width), "plan": (places, self.width)}

    @torch.no_grad()
    def plan(self, obs, form):
        """obs with frames (B, T, H, W, 3), goal (B, H, W, 3) uint8 -> {"picture": what P's encoder
        makes of the last frame, "plan": what P predicts}, (B, n, D) each.  Form goal, a control:
        the encoded goal is the plan; are the features enough?"""
        seen, goal = self.encode(obs["frames"]), self.encode(obs["goal"])  # (B, T, n, D), (B, n, D)
        if form != "goal":
            goal = self.plan_from(torch.cat([goal[:, None], seen], 1))[:, -1]  # (B, n, D)
        return {"picture": seen[:, -1], "plan": goal}


class MaskPlanner(Planner):
    """P and D of section 3.2."""
    kind, Config = "mask", Config
    CELL, WEIGHT = 4, 3  # ours, --grounded: CELL x CELL points per token; weight of the loss

    def __init__(self, config):
        super().__init__(config)
        self.decoder = Decoder(config.width)
        if config.grounded:
            self.forms = [*self.forms, "masks", "now"]
            self.ground = nn.Linear(config.width, (1 + K) * (config.objects + 1) * self.CELL ** 2)
        # share of the training done, for the bootstrapping; a buffer, so that a checkpoint has it
        self.register_buffer("progress", torch.zeros(()))

    def predict(self, frames, goal, masks):
        """masks (B, N, H, W) of 0 and 1 at the last frame -> probabilities (B, N, K, H, W)."""
        return self.decoder(networks.to_map(self(frames, goal)[:, -1]), masks)

    def predict_cells(self, plan):
        """ours: plan (B, n, D) -> logits (B, 1 + K, N + 1, CELL h, CELL w) of background and
        objects, now and at every horizon, from each token for its own cell."""
        x = networks.to_map(self.ground(plan))  # (B, (1 + K) (N + 1) CELL CELL, h, w)
        return F.pixel_shuffle(x, self.CELL).unflatten(1, (1 + K, -1))

    def sets(self, form):
        """As Planner.sets; of forms masks and now the plan is one token, in no view."""
        times = {"masks": 1 + K, "now": 1}.get(form)
        one = times and {"plan": (torch.tensor([[2, 0.5, 0.5]]), 3 * times * self.config.objects)}
        return super().sets(form) | (one or {})

    @torch.no_grad()
    def plan(self, obs, form):
        """As Planner.plan.  ours, form masks of a grounded plan: of each object's predicted mask,
        now and at every horizon, the middle (x, y in [0, 1] of the picture as it was before a
        random shift: obs may hold moved (B, 3, 2), in widths per view) and the root of its share
        of the picture, (B, 1, 3 N (1 + K)).  An object that is in no cell is in the middle.  Form
        now, a control: the present masks alone, (B, 1, 3 N)."""
        sets = super().plan(obs, form)
        if form in ("masks", "now"):
            prob = self.predict_cells(sets["plan"]).float().softmax(2)[:, :, 1:]
            points = networks.grid_points(prob.shape[-1]).to(prob.device)   # (cells, 2)
            prob = prob.flatten(3)[..., None]       # (B, 1 + K, N, cells, 1)
            area = prob.sum(3)                      # (B, 1 + K, N, 1)
            # (B, 1 + K, N, 2); autocast would round a matrix product to a third of a pixel
            middle = ((prob * points).sum(3) + 0.5 * (1 - area).clamp(min=0)) / area.clamp(min=1)
            if "moved" in obs:
                middle = middle - obs["moved"][:, :1, None] * area.clamp(max=1)
            measured = torch.cat([middle, (area / len(points)).sqrt()], 3)  # (B, 1 + K, N, 3)
            sets["plan"] = (measured if form == "masks" else measured[:, :1]).flatten(1)[:, None]
        return sets

    def loss(self, batch):
        """batch: frames (B, T, H, W, 3), goal (B, H, W, 3) uint8, masks (B, 1 + K, H, W) of
        integers: now, then future -> scalar, parts."""
        masks = batch["masks"]
        if self.config.shuffled:
            masks = torch.cat([masks[:, :1], masks[:, 1:].roll(1, 0)], 1)
        shown = binary_masks(masks, self.config.objects)  # (B, 1 + K, N, H, W)
        tracked = shown[:, :1].amax((-1, -2), keepdim=True)  # (B, 1, N, 1, 1)
        m = shown * tracked  # (B, 1 + K, N, H, W)
        # differs: trained is the plan of the last frame alone; eq. 1 has one for each
        plan = self(batch["frames"], batch["goal"])[:, -1]  # (B, n, D)
        prob = self.decoder(networks.to_map(plan), m[:, 0])  # (B, N, K, H, W)
        logits = soft_aggregate(prob).transpose(1, 2).flatten(0, 1)  # (B K, N + 1, H, W)
        future = m[:, 1:].flatten(0, 1)  # (B K, N, H, W)
        number = torch.arange(1, self.config.objects + 1, device=future.device)
        label = (future * number[:, None, None]).sum(1).long()  # (B K, H, W), 0 background
        ce = bootstrapped_cross_entropy(logits, label, hardest_fraction(float(self.progress)))
        # differs: the mean over tracked objects; XMem also counts the others, as solved
        counts = tracked[..., 0, 0].expand(-1, K, -1).flatten(0, 1)  # (B K, N)
        d = (dice(logits.softmax(1)[:, 1:], future) * counts).sum() / counts.sum().clamp(min=1)
        loss, parts = ce + d, {"ce": ce.item(), "dice": d.item()}
        if self.config.grounded:
            cells = cell_cross_entropy(self.predict_cells(plan).flatten(0, 1), shown.flatten(0, 1))
            loss, parts["cells"] = loss + self.WEIGHT * cells, cells.item()
        if self.training:
            self.progress += 1 / self.config.steps
        return loss, parts

    @torch.no_grad()
    def draw(self, obs):
        """[(caption, (H, W, 3) uint8)] of an observation's first: its masks (B, H, W) of integers,
        moved to two horizons, on the last frame; none where obs has no masks."""
        if "masks" not in obs:
            return []
        masks = binary_masks(obs["masks"][:1, ::2, ::2], self.config.objects)
        prob = self.predict(obs["frames"][:1], obs["goal"][:1], masks)  # (1, N, K, H/2, W/2)
        label = soft_aggregate(prob).argmax(1)[0].cpu().numpy()  # (K, H/2, W/2)
        frame = obs["frames"][0, -1].cpu().numpy()  # (H, W, 3)
        return [(f"plan +{HORIZONS[k]}", draw_masks(frame, label[k])) for k in (1, 3)]


# --- data -----------------------------------------------------------------------------------------

def make_batch(episodes, episode, t, rng, config):
    """The planner's view of frames t (B,) of some episodes, as a dict of arrays (see
    MaskPlanner.loss); what lies beyond an episode's end is its last frame."""
    past = look_times(t, config.history, config.stride)  # (B, T)
    ahead = t[:, None] + np.array([0, *HORIZONS])  # (B, 1 + K)
    # differs: every second pixel of the masks; with all of them a step takes three times as long
    return {"frames": episodes.gather("obs/agentview_rgb", episode[:, None], past),
            "goal": episodes.last_frames(episodes.goal_of(episode, rng)),
            "masks": episodes.gather("masks", episode[:, None], ahead)[..., ::2, ::2]}


@torch.no_grad()
def validate(planner, episodes, samples=600, seed=1):
    """IoU of tracked objects' masks, beside copying the present mask, on held-out episodes
    -> {group: {"planner" | "copy" | "n": (K,)}} for robot, moving and static: an object is moving
    at a horizon if its mask then overlaps the present one by less than 0.7."""
    N = planner.eval().config.objects
    total = {g: np.zeros((3, K)) for g in ("robot", "moving", "static")}
    for step in range(-(-samples // 50)):
        batch = make_batch(episodes, *episodes.sample_frames(step, 50, seed), planner.config)
        batch = training.tensors(batch, planner)
        m = binary_masks(batch["masks"], N)  # (B, 1 + K, N, H, W)
        prob = planner.predict(batch["frames"], batch["goal"], m[:, 0])  # (B, N, K, H, W)
        label = soft_aggregate(prob).argmax(1)  # (B, K, H, W) in 0..N
        m, tracked = m.bool(), m[:, :1].amax((-1, -2)).bool()  # (B, 1, N)
        found = iou(binary_masks(label, N).bool(), m[:, 1:])  # (B, K, N)
        copied = iou(m[:, :1], m[:, 1:])  # (B, K, N)
        values = torch.stack([found, copied, torch.ones_like(found)])  # (3, B, K, N)
        robot = torch.arange(N, device=m.device) == 0  # (N,)
        groups = {"robot": robot, "moving": ~robot & (copied < 0.7),
                  "static": ~robot & (copied >= 0.7)}
        for g, chosen in groups.items():
            total[g] += (values * (chosen & tracked)).sum((1, 3)).cpu().numpy()  # (3, K)
    return {g: {"planner": a / np.maximum(n, 1), "copy": b / np.maximum(n, 1), "n": n}
            for g, (a, b, n) in total.items()}


def table(scores):
    """The scores of `validate` as lines of text."""
    lines = ["held-out mask IoU    " + "".join(f"   +{k:<3d} copy" for k in HORIZONS)]
    for group, s in scores.items():
        cells = "".join(f"   {a:.2f} {b:.2f}" for a, b in zip(s["planner"], s["copy"]))
        lines.append(f"  {group:18s} {cells}   (n {int(s['n'][-1])})")
    return "\n".join(lines)


def sheet(goal, now, plan, true):
    """goal, now (B, H, W, 3); plan, true (B, K, H, W, 3) uint8 -> one picture of B rows."""
    columns = [goal, now] + [x[:, k] for k in range(K) for x in (plan, true)]
    titles = ["goal", "now"] + [f"{word} +{k}" for k in HORIZONS for word in ("plan", "true")]
    return np.concatenate([caption(np.concatenate(x), word) for x, word in zip(columns, titles)], 1)


@torch.no_grad()
def compare(planner, episodes, episode, t, rng):
    """Of frames t (B,) of some episodes: goal, present masks (B, H, W, 3), predicted masks on the
    present, true ones on the future frames (B, K, H, W, 3), all uint8."""
    batch = make_batch(episodes, episode, t, rng, planner.config)
    tensor, now, masks = training.tensors(batch, planner), batch["frames"][:, -1], batch["masks"]
    m = binary_masks(tensor["masks"][:, 0], planner.config.objects)  # (B, N, H/2, W/2)
    prob = planner.predict(tensor["frames"], tensor["goal"], m)
    label = soft_aggregate(prob).argmax(1).cpu().numpy()  # (B, K, H/2, W/2)
    ahead = t[:, None] + np.array(HORIZONS)  # (B, K)
    future = episodes.gather("obs/agentview_rgb", episode[:, None], ahead)  # (B, K, H, W, 3)
    return (batch["goal"], draw_masks(now, masks[:, 0]), draw_masks(now[:, None], label),
            draw_masks(future, masks[:, 1:]))


def show(planner, episodes, rows=6, seed=3):
    """Predicted beside true masks of random frames -> (., ., 3) uint8."""
    return sheet(*compare(planner, episodes, *episodes.sample_frames(0, rows, seed)))


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    from demos.record import load_videos
    config = parse(Config, "Stage 1 of Mask2Act: learn from video where the masks will be.", argv)
    path = training.run_path(config, "mask")
    planner = load_planner(path, config.device) if config.show else None
    videos, held_out, note = load_videos(config)
    picture = lambda trained: show(trained, held_out)
    if not planner:
        # of the task with the most objects; what the others lack is never tracked
        if len(videos.objects) < config.objects != Config.objects:
            fail(f"--objects {config.objects}: the videos have {', '.join(videos.objects)}")
        config.objects = min(config.objects, len(videos.objects))
        torch.manual_seed(config.seed)
        frames = lambda step: videos.sample_frames(step, config.batch, config.seed)
        batches = lambda step: make_batch(videos, *frames(step), config)
        planner = training.fit(MaskPlanner(config), batches, config, path, picture, note)
    training.report(config, path, table(validate(planner, held_out)), lambda: picture(planner))


if __name__ == "__main__":
    main()
