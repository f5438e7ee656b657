"""Tracks as numbers: ATM's patches of tracks and pictures, places as sines, its augmentation
(section IV-A).

Sizes: B batch, S steps of a track, N points, P patches of a track, n patches of the picture, D
width, H W pixels.
"""
import torch
import torch.nn.functional as F

import core

# differs: the 16 steps are those to come; ATM's first is the present one, which is known
STEPS, PATCH = 16, 4


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


def augment(images, tracks, strength, often=0.9):
    """ATM's: jitter of colours, then each picture shifted by up to 4 pixels, the tracks with it.

    images (B, H, W, 3) uint8, tracks (B, T, N, 2) -> the same. ours: one draw of the jitter for an
    eighth of the batch.
    """
    if strength:
        from torchvision.transforms import v2
        jitter = v2.RandomApply([v2.ColorJitter(*[strength] * 4)], often)
        images = torch.cat([jitter(part) for part in images.permute(0, 3, 1, 2).chunk(8)]).permute(
            0, 2, 3, 1)
    images, move = core.random_shift(images)  # (B, 2) pixels x, y
    size = torch.tensor([images.shape[2], images.shape[1]], device=move.device)
    return images, tracks + (move / size)[:, None, None]
