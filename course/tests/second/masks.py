"""Assignment 1 written again, with loops and einsum: the tests must not prescribe a style."""

import torch


def binary_masks(masks, N):
    return torch.stack([torch.where(masks == n, 1.0, 0.0) for n in range(1, N + 1)], -3)


def soft_aggregate(prob):
    background = torch.ones_like(prob[:, 0])
    for p in prob.unbind(1):
        background = background * (1 - p)
    every = [background, *prob.unbind(1)]
    return torch.stack([torch.logit(p, eps=1e-6) for p in every], 1)


def hardest_fraction(progress):
    if progress < 0.2:
        return 1.0
    return max(0.15, 1.34 - 1.7 * progress)


def bootstrapped_cross_entropy(logits, target, hardest):
    log_share, total = logits.log_softmax(1), 0
    for one, truth in zip(log_share, target):
        right = torch.nn.functional.one_hot(truth.long(), len(one)).to(one.dtype)
        losses = -torch.einsum("chw,hwc->hw", one, right).reshape(-1)
        losses, _ = losses.sort(descending=True)
        total = total + losses[:max(1, int(hardest * losses.numel()))].mean()
    return total / len(logits)


def dice(prob, target):
    both = torch.einsum("bnhw,bnhw->bn", prob, target)
    area = torch.einsum("bnhw->bn", prob) + torch.einsum("bnhw->bn", target)
    return 1 - (2 * both + 1) / (area + 1)


def iou(m, g):
    scores = []
    for a, b in zip(m.reshape(-1, *m.shape[-2:]), g.reshape(-1, *g.shape[-2:])):
        union = int((a | b).sum())
        scores.append(int((a & b).sum()) / union if union else 1.0)
    return torch.tensor(scores).reshape(m.shape[:-2])
