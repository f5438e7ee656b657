"""How good imagined videos are: beside the true ones, and beside a present picture that stays.

Sizes: B batch, F pictures to come, H W pixels.
"""
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Silhouette(nn.Module):
    """Which pixels of a picture are the robot: a few convolutions, judging imagined pictures."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for stride, new in ((1, 16), (2, 32), (2, 64), (1, 64)):
            layers += [nn.Conv2d(width, new, 3, stride, 1), nn.GroupNorm(8, new), nn.ReLU()]
            width = new
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 16, 1), nn.PixelShuffle(4))

    def forward(self, images):
        """(B, H, W, 3) uint8 -> logits (B, H, W)."""
        return self.net(images.permute(0, 3, 1, 2).float() / 127.5 - 1)[:, 0]


def train_silhouette(episodes, steps=400, batch=32, seed=0):
    """-> a Silhouette that has learned from true pictures and masks, about a minute."""
    torch.manual_seed(seed)
    net = Silhouette()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        episode, t, _ = episodes.draw(step, batch, seed)
        images = torch.as_tensor(episodes.gather("obs/agentview_rgb", episode, t))
        robot = torch.as_tensor(episodes.gather("masks", episode, t) == 1).float()
        loss = F.binary_cross_entropy_with_logits(net(images), robot)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def validate(planner, samples, silhouette, seed=1):
    """Imagined beside true pictures to come.

    samples: some of (clip (B, 1 + F, H, W, 3) uint8, goal, the robot's true masks (B, F, H, W))
    -> {"imagined" | "stay": {"PSNR" dB, "SSIM", "robot IoU": (F,)}}; stay: the present picture;
    what one plan costs, in words.
    The robot's outline: what `silhouette` finds in an imagined picture; the true, the simulator's.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    device, found, seconds, plans = next(planner.parameters()).device, {}, 0.0, 0
    generator = torch.Generator().manual_seed(seed)
    clock, unit = ((time.perf_counter, "seconds") if device.type == "cuda" else
                   (time.process_time, "core-seconds"))
    for clip, goal, robot in samples:
        now, goal = (torch.as_tensor(x, device=device) for x in (clip[:, 0], goal))
        begin = clock()
        imagined = planner.eval().imagine(now, goal, generator).cpu()
        seconds, plans = seconds + clock() - begin, plans + len(clip)
        stay = torch.as_tensor(clip[:, :1]).expand_as(imagined)
        for name, guess in (("imagined", imagined), ("stay", stay)):
            outline = (silhouette(guess.flatten(0, 1)) > 0).numpy().reshape(robot.shape)
            iou = (outline & robot).sum((2, 3)) / np.maximum((outline | robot).sum((2, 3)), 1)
            rows = found.setdefault(name, {"PSNR": [], "SSIM": [], "robot IoU": []})
            for b in range(len(guess)):
                pairs = list(zip(clip[b, 1:], guess[b].numpy()))
                with np.errstate(divide="ignore"):      # equal pictures: no noise at all
                    psnr = [min(60, peak_signal_noise_ratio(*p)) for p in pairs]
                rows["PSNR"].append(psnr)
                rows["SSIM"].append([structural_similarity(*p, channel_axis=2) for p in pairs])
                rows["robot IoU"].append(iou[b])
    means = {name: {k: np.mean(v, 0) for k, v in rows.items()} for name, rows in found.items()}
    return means, f"{seconds / plans:.3g} {unit}"


def table(scores):
    """The scores of `validate` as lines of text."""
    pictures = range(1, 1 + len(scores["stay"]["PSNR"]))
    lines = ["held-out videos, picture   " + "".join(f"{k:7d}" for k in pictures)]
    for measure in ("PSNR", "SSIM", "robot IoU"):
        for name, row in scores.items():
            lines.append(f"  {measure:10s} {name:13s}" + "".join(f"{x:7.2f}" for x in row[measure]))
    return "\n".join(lines)
