"""Tracks as numbers: ATM's patches of tracks and pictures, places as sines, its augmentation
(section IV-A); and how its policy hears them (section IV-B).

Sizes: B batch, S steps of a track, N points, P patches of a track, n patches of the picture, D
width, H W pixels.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import core

# differs: the 16 steps are those to come; ATM's first is the present one, which is known
STEPS, PATCH = 16, 4
# ATM's 32 points per picture: two lattices of 4 x 4
POINTS = [[x, y] for side in (np.linspace(0.05, 0.85, 4), np.linspace(0.15, 0.95, 4))
          for y in side.tolist() for x in side.tolist()]
FAR = (0.04, 0.2)  # widths of the picture, what points go in 16 steps: third person, wrist


def track_patches(tracks):
    """(B, S, N, 2) -> (B, P, N, 2 PATCH): each point's places in pieces of PATCH steps."""
    B, S, N, _ = tracks.shape
    return tracks.view(B, S // PATCH, PATCH, N, 2).transpose(2, 3).flatten(3)


def track_from_patches(patches):
    """The inverse: (B, P, N, 2 PATCH) -> (B, S, N, 2)."""
    return patches.unflatten(3, (PATCH, 2)).transpose(2, 3).flatten(1, 2)


def image_patches(images, side):
    """(B, 3, H, W) -> (B, n, 3 side side), row by row."""
    B, C, H, W = images.shape
    x = images.view(B, C, H // side, side, W // side, side)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * side * side)


def sincos(places, D):
    """places (..., k) -> (..., D): sines and cosines of each of the k numbers, as in ViT and
    MAE."""
    half = D // (2 * places.shape[-1])
    # (..., k, half)
    angle = places[..., None] / 10000 ** (torch.arange(half, device=places.device) / half)
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1).flatten(-2),
                 (0, D - 2 * half * places.shape[-1]))


def grid_points(side):
    """Points in the middles of side x side cells, row by row, (side side, 2)."""
    middle = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).reshape(-1, 2)


def jitter(images, strength, often=0.9):
    """images (B, H, W, 3) uint8 in other colours. ours: one draw for an eighth of the batch."""
    from torchvision.transforms import v2
    colours = v2.RandomApply([v2.ColorJitter(*[strength] * 4)], often)
    parts = images.permute(0, 3, 1, 2).chunk(8)
    return torch.cat([colours(part) for part in parts]).permute(0, 2, 3, 1)


def augment(images, tracks, strength):
    """ATM's: jitter of colours, then each picture shifted by up to 4 pixels, the tracks with it.

    images (B, H, W, 3) uint8, tracks (B, T, N, 2) -> the same.
    """
    if strength:
        images = jitter(images, strength)
    images, move = core.random_shift(images)  # (B, 2) pixels x, y
    size = torch.tensor([images.shape[2], images.shape[1]], device=move.device)
    return images, tracks + (move / size)[:, None, None]


def ways(tracks):
    """Tracks from POINTS, third person and wrist (..., 2, S, N, 2) -> how far each point has gone,
    in FAR.

    differs: ATM's policy hears places.  In these, what a point does is 3 % of where it is, and the
    policy learns it last: it did not know at its first look which of two bowls the plan means (12
    cm off, even in training), although the nearest neighbour by `ways` knows it in 9 of 10.
    """
    points = torch.tensor(POINTS, device=tracks.device)
    return (tracks - points) / torch.tensor(FAR, device=tracks.device)[:, None, None, None]


class Stem(nn.Module):
    """ATM's image encoder (Fig. 11): two convolutions, one token per 16 x 16 pixels, in place of
    core.ImageEncoder, whose norm it takes."""
    stride = 16
    cells = core.ImageEncoder.cells

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.GroupNorm(4, 64), nn.ReLU(),
                                 nn.Conv2d(64, dim, 8, 8), nn.GroupNorm(8, dim))

    def forward(self, images):
        """(B, H, W, 3) uint8 -> (B, D, h, w) float."""
        return self.net(images.permute(0, 3, 1, 2) / 127.5 - 1)


class Spatial(nn.Module):
    """ATM's spatial encoder (section IV-B, Fig. 11): patches of both pictures and, by early fusion,
    tracks -> one token."""

    def __init__(self, n, D, length, early, depth):
        """n  patches per picture; length  S, steps of the tracks"""
        super().__init__()
        self.n, self.early, self.side = n, early, round(n ** 0.5)
        self.cls = nn.Parameter(torch.randn(1, D) * 0.02)
        self.view, self.kind = (nn.Parameter(torch.randn(2, 1, D) * 0.02) for _ in range(2))
        # differs: sines, the same for patches and points, as in the planner; ATM learns both
        self.register_buffer("place", self.code(grid_points(self.side), D), persistent=False)
        self.track = nn.Linear(2 * length, D) if early else None
        self.gpt = core.Transformer(D, depth, max(4, D // 64))

    def code(self, points, D):
        """Places (..., 2) in [0, 1] -> (..., D)."""
        return sincos(points.flip(-1) * self.side - 0.5, D)

    def tokens(self, pictures, tracks, moved=None):
        """-> (B, 1 + 2 n (+ 2 N), D): the CLS token, patches of third person and wrist, tracks."""
        x = (pictures + self.view + self.kind[0] + self.place).flatten(1, 2)  # (B, 2 n, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        if self.early and tracks is not None:
            # (B, 2, N, D); each token with the id of its own view: ATM's code mixes them up
            t = self.track(ways(tracks).transpose(2, 3).flatten(3)) + self.view + self.kind[1]
            points = torch.tensor(POINTS, device=x.device)
            points = points if moved is None else points + moved[:, :, None]  # (B, 2, N, 2)
            x = torch.cat([x, (t + self.code(points, x.shape[-1])).flatten(1, 2)], 1)
        return x

    def forward(self, pictures, tracks, moved=None):
        """pictures (B, 2, n, D), third person first; tracks (B, 2, S, N, 2) of the pictures before
        they were `moved` (B, 2, 2), in widths -> (B, D)."""
        return self.gpt(self.tokens(pictures, tracks, moved), first=1)[:, 0]

    @torch.no_grad()
    def attention(self, pictures, tracks):
        """How much the CLS token attends to each patch (Fig. 10), mean over blocks and heads, from
        what forward takes, or without tracks (None) -> (B, 2, n)."""
        x, shares = self.tokens(pictures, tracks), []
        for block in self.gpt.blocks:
            q, k, _ = block.split(x)  # (B, heads, L, d)
            score = q[:, :, :1] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            shares.append(score.softmax(-1)[:, :, 0])  # (B, heads, L)
            x = block(x)
        return torch.stack(shares).mean((0, 2))[:, 1:1 + 2 * self.n].unflatten(1, (2, -1))
