"""The networks of flow: ours, learned from the simulator, and others to compare it with.

Our own goes from coarse to fine; `flow.py` trains it.  Flow is said in pictures: a way of 1 crosses
the whole of it, x right, y down.
Sizes: B batch, P points, H W pixels, n cells at an eighth of the resolution, D width.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import core
from video_planner import to_unit


def sample_flow(flow, places):
    """flow (H, W, 2) in pictures, read between the pixels at places (P, 2) in [0, 1] -> (P, 2)."""
    grid = torch.as_tensor(2 * places - 1, dtype=torch.float32)[None, None]  # (1, 1, P, 2)
    x = torch.as_tensor(flow).permute(2, 0, 1)[None].float()
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)[0, :, 0].T.numpy()


def pixel_grid(side, device=None):
    """The middles of side x side cells in [0, 1], x right, y down -> (side side, 2)."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).reshape(-1, 2)


def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU())


def alike(x):
    """Features (B, C, h, w) -> the same of mean 0 and length 4: their products say how much two
    places look alike."""
    return 4 * F.normalize(x - x.mean(1, keepdim=True), dim=1)


def local_products(a, b, radius):
    """How much a looks like b there and around: a, b (B, C, h, h) -> (B, K K, h, h), K = 2 radius
    + 1, products with b at up to `radius` cells away, 0 outside of it."""
    K, side = 2 * radius + 1, a.shape[-1]
    wide = F.pad(b, (radius,) * 4)                                          # (B, C, h + K - 1, .)
    rows = torch.stack([wide[:, :, i:i + side] for i in range(K)], 3)       # (B, C, h, K, h + K - 1)
    # a matrix product per row, with all of its K rows of b; of column x only x to x + K - 1 count
    x = a.permute(0, 2, 3, 1) @ rows.transpose(1, 2).flatten(3)             # (B, h, h, K (h + K - 1))
    batch, row, column, _ = x.stride()
    x = x.as_strided((len(a), K, K, side, side), (batch, side + K - 1, 1, row, column + 1))
    return x.flatten(1, 2)


class Refine(nn.Module):
    """A better flow from a guess: what picture b shows where the guess leads, and how much a looks
    like b there and around (a local cost volume), say how far the guess is off."""

    def __init__(self, channels, said, radius):
        super().__init__()
        self.radius, around = radius, (2 * radius + 1) ** 2
        self.net = nn.Sequential(conv(2 * channels + around + 2 + said, 96), conv(96, 64),
                                 conv(64, 64), nn.Conv2d(64, 2, 3, 1, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, a, b, flow, said):
        """Features a, b (B, C, h, h), flow (B, 2, h, h) in pictures, what else is known of a (B,
        S, h, h) -> flow (B, 2, h, h)."""
        side = a.shape[-1]
        there = pixel_grid(side, a.device).view(1, side, side, 2) + flow.movedim(1, -1)
        found = F.grid_sample(b.float(), 2 * there - 1, padding_mode="border",
                              align_corners=False).to(a.dtype)              # b as seen from a
        cost = local_products(alike(a), alike(found), self.radius)
        x = torch.cat([a, found, cost, 10 * flow.to(a.dtype), said], 1)
        return flow + self.net(x).float() / side


class FlowNet(nn.Module):
    """From coarse to fine (after PWC-Net, Sun et al., 2018), small: at an eighth of the resolution,
    where the features of both pictures have looked at each other in a transformer (as in GMFlow, Xu
    et al., 2022), then at a quarter and at half of it, a guess of the flow, at first none, is
    refined.
    """
    kind = "flow"

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        self.fine = nn.Sequential(conv(3, 32, 2), conv(32, 32))             # half resolution
        self.middle = nn.Sequential(conv(32, 64, 2), conv(64, 64))          # a quarter
        self.coarse = nn.Sequential(conv(64, D, 2), nn.Conv2d(D, D, 3, 1, 1))   # an eighth
        if config.size % 8:
            core.fail(f"--size {config.size} is not divisible by 8: choose a multiple")
        self.place = nn.Parameter(torch.randn((config.size // 8) ** 2, D) * 0.02)
        self.which = nn.Parameter(torch.randn(2, 1, D) * 0.02)
        self.gpt = core.Transformer(D, config.depth, 4)
        self.refine = nn.ModuleList([Refine(D, D, 4), Refine(64, D, 3), Refine(32, D, 1)])

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flow from a to b in pictures, x right, y down: twice at an
        eighth of the resolution, three times at a quarter, at half (B, 2, H/2, W/2), each better
        than the one before."""
        B = len(a)
        grow = lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")
        fine = self.fine(to_unit(torch.cat([a, b])))          # (2 B, 32, H/2, W/2)
        middle = self.middle(fine)                                          # (2 B, 64, H/4, W/4)
        coarse = self.coarse(middle)                                        # (2 B, D, H/8, W/8)
        x = coarse.flatten(2).transpose(1, 2) + self.place                  # (2 B, n, D)
        x = torch.cat([x[:B] + self.which[0], x[B:] + self.which[1]], 1)    # (B, 2 n, D)
        x = torch.cat(self.gpt(x).chunk(2, 1)).transpose(1, 2)              # (2 B, D, n)
        x = coarse + x.unflatten(2, coarse.shape[2:])
        said = x[:B]
        flow, flows = torch.zeros_like(x[:B, :2], dtype=torch.float32), []
        for times, refine, level in zip((2, 3, 1), self.refine, (x, middle, fine)):
            if flows:
                flow, said = grow(flow), grow(said)
            for _ in range(times):
                flow = refine(level[:B], level[B:], flow.detach(), said)
                flows.append(flow)
        return flows

    def loss(self, batch):
        """batch: a, b (B, H, W, 3) uint8, flow (B, h, w, 2) in pictures -> mean distance, parts.

        Half of the pairs are blurred and noisy, as imagined pictures are.
        """
        a, b, true = batch["a"], batch["b"], batch["flow"].float().permute(0, 3, 1, 2)
        if self.training:
            a, b = degrade(a), degrade(b)
        known = true.isfinite().all(1, keepdim=True) & (true.abs() < 1).all(1, keepdim=True)
        total, parts = 0.0, {}
        own = batch["object"][:, None].float()
        for k, said in enumerate(self(a, b)):
            true_here = F.interpolate(true.nan_to_num(0), size=said.shape[-2:])
            seen = F.interpolate(known.float(), size=said.shape[-2:])
            # ours: what moves counts ten times, the object as much again; most of a picture is
            # neither
            moves = true_here.norm(dim=1, keepdim=True) > 0.005
            weight = seen * (1 + 9 * moves + 10 * F.interpolate(own, size=said.shape[-2:]))
            off = (said - true_here).square().sum(1, keepdim=True).add(1e-8).sqrt()
            loss = self.config.size * (off * weight).sum() / weight.sum()
            parts[f"pixels {k}"] = loss.item()
            total = total + loss
        return total, parts

    @torch.no_grad()
    def flow(self, a, b):
        """a, b (H, W, 3) uint8 -> (H/2, W/2, 2) in pictures.

        ours: the mean of what is said of them and of their mirror images, on the object a tenth
        less off.
        """
        pair = torch.as_tensor(np.stack([a, b]), device=next(self.parameters()).device)
        a, b = torch.stack([pair, pair.flip(2)], 1)                         # each (2, H, W, 3)
        said, mirrored = self(a, b)[-1]                                     # (2, H/2, W/2)
        mirrored = torch.stack([-mirrored[0], mirrored[1]]).flip(2)
        return ((said + mirrored) / 2).permute(1, 2, 0).cpu().numpy()


def degrade(images, share=0.5):
    """A share of the pictures (B, H, W, 3) uint8 at half the resolution and back, with noise."""
    x = images.permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = blurred + 6 * torch.randn_like(blurred)
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < share
    return torch.where(chosen, blurred, x).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# --- others ---------------------------------------------------------------------------------------

def dis_flow(a, b):
    """OpenCV's DIS optical flow: a, b (H, W, 3) uint8 -> (H, W, 2) in pictures."""
    import cv2
    grey = [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in (a, b)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    return dis.calc(*grey, None) / a.shape[0]


def raft_flow(work=256):
    """torchvision's RAFT (Teed and Deng, 2020) with its published weights from torch.hub's folder
    -> a function as `dis_flow`; pictures are brought to `work` pixels."""
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
    address = Raft_Large_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / address.split("/")[-1]
    if not file.exists():
        core.fail(f"no weights of RAFT: put {address} into {file.parent}; or --flow learned, which "
                  "flow.py trains")
    model = raft_large().eval()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def raft(a, b):
        pair = to_unit(torch.as_tensor(np.stack([a, b])))     # (2, 3, H, W)
        pair = F.interpolate(pair, size=(work, work), mode="bilinear")
        return model(pair[:1], pair[1:])[-1][0].permute(1, 2, 0).numpy() / work
    return raft
