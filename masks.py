"""Masks as numbers: Mask2Act's soft aggregation and losses (section 3.2), overlap, halves.

Sizes: B batch, N objects, H W mask pixels.
"""
import torch
import torch.nn.functional as F


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
