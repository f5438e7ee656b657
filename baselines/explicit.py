"""The explicit plan (ours): where things are, in numbers, from the picture into metres.

Mask2Act hands the executor the plan's tokens and drops its masks at test time. `--plan-form
explicit` instead hands it what the planner says about places. Three steps: `locate` puts a mask
into numbers; a `Locator`, trained with the planner, says them from the plan alone, without any
mask; `Places` hears them in metres, by the camera that `calibrate` finds from the robot's own hand.

Sizes: B batch, T steps, N objects (robot first), K horizons, M things heard of, H W pixels.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# numbers per object and time that say where it is: centroid x y, size, lowest point x y
LOCATIONS = 5


# --- in the picture -------------------------------------------------------------------------------

def locate(m):
    """Where a mask is, in numbers (ours). m (..., H, W) of 0 and 1 -> (..., 5) in [0, 1], and
    present (...) bool.

    centroid x, y; size = square root of its share of the picture; lowest point x, y (for the robot,
    which reaches in from above: its fingertips): the mean of its lowest rows, which hold about a
    twentieth of its pixels.
    """
    H, W = m.shape[-2:]
    y = (torch.arange(H, device=m.device) + 0.5).div(H)[:, None].expand(H, W)
    x = (torch.arange(W, device=m.device) + 0.5).div(W).expand(H, W)
    area = m.sum((-1, -2))
    total = lambda weight: weight.sum((-1, -2))
    mean = lambda weight: (torch.stack([total(weight * v) for v in (x, y)], -1)
                           / total(weight).clamp(min=1e-6)[..., None])  # (..., 2)
    row = m.sum(-1)  # (..., H) pixels per row
    lower = row.flip(-1).cumsum(-1).flip(-1) - row  # (..., H) pixels in the rows below it
    lowest = m * (lower < 0.05 * area[..., None])[..., None]  # (..., H, W)
    size = (area / (H * W)).sqrt()[..., None]
    return torch.cat([mean(m), size, mean(lowest)], -1), area > 0


class Locator(nn.Module):
    """Says the plan in numbers (ours): draws from the plan, without any mask, where each object is
    now and at every horizon, on a grid of a quarter of the picture, and takes centroid, size and
    lowest point of what it has drawn.

    Regressed from the plan's tokens instead, the bowl was misplaced by a median of 1.8 pixels of 96
    in the first frame of held-out scenes (3,000 steps); drawn, by 0.5 (2,000 steps).
    """

    def __init__(self, width, fine, N, K):
        super().__init__()
        self.N, self.K1 = N, K + 1
        conv = lambda i, o: nn.Sequential(nn.GroupNorm(8, i), nn.GELU(), nn.Conv2d(i, o, 3, 1, 1))
        self.plan, self.seen = nn.Conv2d(width, 128, 1), nn.Conv2d(fine, 128, 1)
        self.fuse, self.refine = conv(128, 64), conv(64, 64)
        self.out = nn.Sequential(nn.GroupNorm(8, 64), nn.GELU(),
                                 nn.Conv2d(64, (N + 1) * (K + 1), 1))

    def draw(self, plan, fine):
        """plan (B, D, h, w), fine (B, C, h', w') of the last frame -> logits (B, N + 1, K + 1, 2
        h', 2 w')."""
        grow = lambda x, size: F.interpolate(x, size=size, mode="bilinear")
        h, w = fine.shape[-2:]
        x = self.fuse(grow(self.plan(plan), (h, w)) + self.seen(fine))  # (B, 64, h', w')
        x = self.out(self.refine(grow(x, (2 * h, 2 * w))))
        return x.float().unflatten(1, (self.N + 1, self.K1))

    def forward(self, plan, fine):
        """-> (B, N, K + 1, 5), as `locate` says it, of what `draw` draws."""
        return self.read(self.draw(plan, fine))

    def read(self, logits):
        """logits of `draw` -> (B, N, K + 1, 5); many cells of little probability must not weigh as
        much as the object."""
        p = logits.softmax(1)[:, 1:]  # (B, N, K + 1, 2 h', 2 w')
        return locate(p ** 2 / (p ** 2 + (1 - p) ** 2))[0]


# --- in metres ------------------------------------------------------------------------------------

def calibrate(felt, seen):
    """The camera by which the robot sees its hand where it feels it (ours), a pinhole with its axis
    in the middle.

    felt (F, 3) metres, seen (F, 2) in 0..1, x right, y down -> eye (3,) metres and rays (3, 3): the
    picture's point (x, y) lies in the direction [x - 1/2, y - 1/2, 1] @ rays. Robust, since the
    lowest point of the robot in the picture is not always its fingertips; 0.2 s.
    """
    from scipy.optimize import least_squares
    from scipy.spatial.transform import Rotation

    def error(c):  # place 3, turn 3, focal length in picture widths
        # (F, 3) right, down, ahead
        there = (felt - c[:3]) @ Rotation.from_rotvec(c[3:6]).as_matrix().T
        return (0.5 + c[6] * there[:, :2] / np.maximum(there[:, 2:], 1e-3) - seen).ravel()

    middle, fits = felt.mean(0), []
    # from a metre off on each side and a metre above, looking at the hand
    for yaw in np.arange(4) * np.pi / 2:
        offset = np.array([np.cos(yaw), np.sin(yaw), 1.0])
        ahead, right = -offset / np.linalg.norm(offset), np.array([-np.sin(yaw), np.cos(yaw), 0])
        turn = Rotation.from_matrix([right, np.cross(ahead, right), ahead]).as_rotvec()
        fits.append(least_squares(error, [*(middle + offset), *turn, 1.0], loss="soft_l1",
                                  f_scale=0.01))
    c = min(fits, key=lambda fit: fit.cost).x
    return c[:3], Rotation.from_rotvec(c[3:6]).as_matrix() / np.array([c[6], c[6], 1])[:, None]


def ground(points, eye, rays, level):
    """Points of the picture (..., 2) in 0..1 -> where they are if they lie at height `level`
    (metres), (..., 2) metres."""
    x, y = points.float().sub(0.5).split(1, -1)
    # (..., 3); not as a matrix product, which autocast would round
    ray = x * rays[0] + y * rays[1] + rays[2]
    # a point above the horizon lies far away, not behind the camera
    far = (level - eye[2]) / ray[..., 2:].clamp(max=-0.1)
    return eye[:2] + far * ray[..., :2]


class Places(nn.Module):
    """The explicit plan (ours): what the planner's locator says about places in the picture, heard
    in metres.

    N  objects, robot first;  own_goal  whether the goal picture is of this very scene
    blur  noise in training, percent of the picture's width

    M things are heard of: the task's objects as seen at the first look and as seen now, 2 (N - 1),
    and where robot and objects are in the goal picture, N, if it is of this scene. The robot's own
    place now and the planner's future are left out: with them the policy follows its own echo.
    """

    def __init__(self, N, own_goal, blur):
        super().__init__()
        self.blur, self.M = blur, 2 * (N - 1) + own_goal * N
        self.register_buffer("mean", torch.zeros(self.M, LOCATIONS))
        self.register_buffer("std", torch.ones(self.M, LOCATIONS))
        self.register_buffer("eye", torch.tensor([0.0, 0, 1]))
        self.register_buffer("rays", torch.diag(torch.tensor([1.0, 1, -1])))
        self.register_buffer("level", torch.zeros(()))

    def fit(self, said, target, hand, level):
        """Finds the camera and the spread of the numbers on the demonstrations.

        said (draws, frames, N, 5), target the same or None, hand (frames, 3) metres, level: usual
        height of a waypoint, metres.
        """
        # the robot's lowest point is its fingertips
        eye, rays = calibrate(hand, said[0, :, 0, 3:].numpy())
        for buffer, value in ((self.eye, eye), (self.rays, rays), (self.level, level)):
            buffer.copy_(torch.as_tensor(value))
        heard = torch.cat([said[:, :, 1:], said[:, :, 1:]] + ([] if target is None else [target]),
                          2)  # (draws, frames, M, 5)
        heard = self.in_metres(heard.to(self.eye.device)).flatten(0, 1)  # (draws frames, M, 5)
        self.mean.copy_(heard.mean(0))
        self.std.copy_(heard.std(0).clamp(min=1e-3))

    def in_metres(self, numbers):
        """(..., 5) in picture units -> the same with both points in metres, as if they lay at the
        usual height."""
        points = [ground(numbers[..., k:k + 2], self.eye, self.rays, self.level) for k in (0, 3)]
        return torch.cat([points[0], numbers[..., 2:3], points[1]], -1)

    def hear(self, first, now, target=None):
        """What the planner said at the first look, when no arm was in front of anything, says now,
        and says of the goal picture, (B, T, N, 5) each -> (B, T, M, 5) in picture units.

        With noise in training, or the policy trusts the planner to a fraction of a pixel. Most of
        it is shared by all an object's numbers, as the planner's own errors are; else they would
        average out.
        """
        views = [torch.stack([first, now], 2)[..., 1:, :]]  # (B, T, 2, N - 1, 5)
        views += [] if target is None else [target[:, :, None]]  # (B, T, 1, N, 5)
        for k, x in enumerate(views):
            if self.training:
                share = torch.randn_like(x[:, :1, :1])  # (B, 1, 1, objects, 5)
                share[..., 3:] = share[..., :2]  # centroid and lowest point move together ...
                share[..., 2] = 0  # ... and the size stays
                views[k] = x + self.blur / 100 * (share + torch.randn_like(x) / 2)
        return torch.cat([x.flatten(2, 3) for x in views], 2)

    def forward(self, heard):
        """heard (B, T, M, 5) -> standardised numbers (B, T, 5 M)."""
        return ((self.in_metres(heard) - self.mean) / self.std).flatten(2)

    def beside(self, heard, pointer, height):
        """Where the thing is that `pointer` (B, T, M), which sums to one, points at, seen at
        `height` (B, T) -> (B, T, 2)."""
        # (B, T, M, 2) metres
        things = ground(heard[..., :2], self.eye, self.rays, height[..., None, None])
        return (pointer[..., None] * things).sum(2)
