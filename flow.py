"""AVDC sections 3.2 and 3.3: from a video to actions, without any action label.

    python flow.py --suite avdc             # trains a small flow network on the simulator's own flow

The flow of a video, picture to picture, carries points of the task's object; where they go says how
the object moves (a rigid motion in space, from their depth in the first picture alone); a hand that
holds or pushes the object must go there, too.  `rollout.py --policy flow-oracle | flow-true |
flow-generated` acts so: on true future and exact flow, on true pictures, on imagined ones.

Sizes: B batch, P points, H W pixels, h w cells of the feature map, K pictures to come.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import cameras
import core
import extract
import sims
import video_planner
from core import flag

# Three cameras, degrees of turn and height around sims.VIEW's middle; the first is the data's.
# differs: AVDC's corner, corner2 and corner3 are mounted upside down and see a puck as two pixels
ANGLES = ((148, -32), (212, -32), (125, -40))
STRIDE = 2      # pixels between the points where the network's flow is compared with the true one


@dataclass
class Config:
    suite: str = flag("avdc", "suite of Meta-World, or a task")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    demos: int = flag(20, "videos per task", minimum=1)
    size: int = flag(96, "height and width of the pictures, pixels", minimum=32)
    width: int = flag(96, "of the features that are matched", minimum=16)
    depth: int = flag(3, "transformer blocks over both pictures", minimum=1)
    pairs: int = flag(20, "pairs of pictures per video, per camera a third of them", minimum=1)
    steps: int = flag(2000, "gradient steps", minimum=1)
    batch: int = flag(8, "pairs per step", minimum=1)
    lr: float = flag(5e-4, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    weight_decay, warmup, clip, ema, save_every, log_every = 1e-4, 100, 1.0, 0.0, 500, 100


def sample_flow(flow, places):
    """flow (H, W, 2) in pictures, read between the pixels at places (P, 2) in [0, 1] -> (P, 2)."""
    grid = torch.as_tensor(2 * places - 1, dtype=torch.float32)[None, None]  # (1, 1, P, 2)
    x = torch.as_tensor(flow).permute(2, 0, 1)[None].float()
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)[0, :, 0].T.numpy()


# --- the flow network -----------------------------------------------------------------------------

def pixel_grid(side, device=None):
    """The middles of side x side cells in [0, 1], x right, y down -> (side side, 2)."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).reshape(-1, 2)


class FlowNet(nn.Module):
    """Global matching (after GMFlow, Xu et al., 2022), small: features of both pictures at a quarter
    of the resolution look at each other, each finds itself in the other picture by a softmax over
    all its cells, and convolutions over what then lies together say the rest at half resolution."""
    kind = "flow"

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        conv = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.GroupNorm(8, o), nn.ReLU())
        self.fine = nn.Sequential(conv(3, 32, 2), conv(32, 32, 1))          # half resolution
        self.coarse = nn.Sequential(conv(32, 64, 2), conv(64, 64, 1), nn.Conv2d(64, D, 1))
        side = config.size // 4
        self.place = nn.Parameter(torch.randn(side * side, D) * 0.02)
        self.which = nn.Parameter(torch.randn(2, 1, D) * 0.02)
        self.gpt = core.Transformer(D, config.depth, 4)
        self.refine = nn.Sequential(conv(32 * 3 + 2 + D, 96, 1), conv(96, 64, 1), conv(64, 64, 1),
                                    nn.Conv2d(64, 2, 3, 1, 1))
        nn.init.zeros_(self.refine[-1].weight)
        nn.init.zeros_(self.refine[-1].bias)

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flow from a to b in pictures, x right, y down, at a quarter
        (B, 2, H/4, W/4) and at half resolution (B, 2, H/2, W/2)."""
        B, side = len(a), self.config.size // 4
        fine = self.fine(video_planner.to_unit(torch.cat([a, b])))          # (2 B, 32, H/2, W/2)
        x = self.coarse(fine).flatten(2).transpose(1, 2) + self.place       # (2 B, n, D)
        x = torch.cat([x[:B] + self.which[0], x[B:] + self.which[1]], 1)    # (B, 2 n, D)
        x = self.gpt(x)
        n = side * side
        match = x[:, :n] @ x[:, n:].transpose(1, 2) / x.shape[-1] ** 0.5    # (B, n, n)
        grid = pixel_grid(side, a.device)                                   # (n, 2)
        first = match.float().softmax(-1) @ grid - grid                     # (B, n, 2)
        first = first.transpose(1, 2).unflatten(2, (side, side))            # (B, 2, H/4, W/4)
        grow = lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")
        flow = grow(first)
        there = pixel_grid(2 * side, a.device).view(1, 2 * side, 2 * side, 2) + flow.movedim(1, -1)
        found = F.grid_sample(fine[B:].float(), 2 * there - 1, padding_mode="border",
                              align_corners=False)                          # b as seen from a
        said = x[:, :n].transpose(1, 2).unflatten(2, (side, side))
        near = torch.cat([fine[:B], found.to(fine.dtype), fine[B:], flow.to(fine.dtype),
                          grow(said.float()).to(fine.dtype)], 1)
        return first, flow + 0.1 * self.refine(near).float()

    def loss(self, batch):
        """batch: a, b (B, H, W, 3) uint8, flow (B, h, w, 2) in pictures -> mean distance, parts.

        Half of the pairs are blurred and noisy, as imagined pictures are.
        """
        a, b, true = batch["a"], batch["b"], batch["flow"].float().permute(0, 3, 1, 2)
        if self.training:
            a, b = degrade(a), degrade(b)
        known = true.isfinite().all(1, keepdim=True) & (true.abs() < 1).all(1, keepdim=True)
        total, parts = 0.0, {}
        for name, said in zip(("coarse", "fine"), self(a, b)):
            true_here = F.interpolate(true.nan_to_num(0), size=said.shape[-2:])
            seen = F.interpolate(known.float(), size=said.shape[-2:])
            # ours: what moves counts ten times; most of a picture stands still
            weight = seen * (1 + 9 * (true_here.norm(dim=1, keepdim=True) > 0.005))
            off = (said - true_here).square().sum(1, keepdim=True).add(1e-8).sqrt()
            parts[name] = (loss := (off * weight).sum() / weight.sum()) * self.config.size
            total = total + self.config.size * loss
        return total, {k: v.item() for k, v in parts.items()}

    @torch.no_grad()
    def flow(self, a, b):
        """a, b (H, W, 3) uint8 -> (H/2, W/2, 2) in pictures."""
        device = next(self.parameters()).device
        pair = [torch.as_tensor(np.ascontiguousarray(x), device=device)[None] for x in (a, b)]
        return self(*pair)[1][0].permute(1, 2, 0).cpu().numpy()


def degrade(images):
    """Half of the pictures (B, H, W, 3) uint8 at half the resolution and back, with noise."""
    x = images.permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = blurred + 6 * torch.randn_like(blurred)
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, blurred, x).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def dis_flow(a, b):
    """OpenCV's DIS optical flow: a, b (H, W, 3) uint8 -> (H, W, 2) in pictures."""
    import cv2
    grey = [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in (a, b)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    return dis.calc(*grey, None) / a.shape[0]


def views():
    """The three cameras, as MuJoCo's free ones."""
    import mujoco
    made = []
    for azimuth, elevation in ANGLES:
        view = mujoco.MjvCamera()
        view.lookat[:], view.distance = sims.VIEW[0], sims.VIEW[1]
        view.azimuth, view.elevation = azimuth, elevation
        made.append(view)
    return made
