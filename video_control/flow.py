"""AVDC section 3.2: the flow between the far-apart pictures of a video.

    python -m video_control.flow        # of AVDC's tasks and cameras; makes the data first if none

differs: AVDC takes GMFlow with published weights; here a small network learns from the simulator's
exact tracks of points.  Classical flow (OpenCV's DIS) fails between pictures this far apart.

Sizes: B batch, P points, H W pixels, h w cells of a flow.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training
from core.draw import draw_tracks, row
from core.files import fail
from core.flags import PlannerConfig, flag, from_dict, parse, run_path
from video_planner import FRAMES, clip_times, to_unit


@dataclass
class Config(PlannerConfig):
    suite: str = flag("avdc,avdc_view1,avdc_view2", "suites of videos with tracks")
    name: str = flag("flow", "name of the run")

    network: str = "own"    # or raft
    width: int = 96         # of the features that are matched
    val_pairs: int = 300    # held-out pairs to be scored by
    PRESETS = {"tiny": dict(demos=2, steps=5, size=64, batch=4, lr=1e-3, width=32, depth=1,
                            val_pairs=9),
               "laptop": dict(demos=20, steps=8000, size=96, batch=8, lr=1e-3),
               "paper": dict(demos=50, steps=30000, size=128, batch=32, lr=5e-4)}


# --- network --------------------------------------------------------------------------------------

def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU())


def normalise_features(x):
    """Features (B, C, h, w) -> the same of mean 0 and length 4: products measure likeness."""
    return 4 * F.normalize(x - x.mean(1, keepdim=True), dim=1)


def cost_volume(a, b, radius):
    """Products of a with b at up to `radius` cells away, 0 outside of it: a, b (B, C, h, h)
    -> (B, K K, h, h), K = 2 radius + 1."""
    K, side = 2 * radius + 1, a.shape[-1]
    wide = F.pad(b, (radius,) * 4)                                          # (B, C, h + K - 1, .)
    rows = torch.stack([wide[:, :, i:i + side] for i in range(K)], 3)   # (B, C, h, K, h + K - 1)
    # a matrix product per row, with all of its K rows of b; of column x only x to x + K - 1 count
    x = a.permute(0, 2, 3, 1) @ rows.transpose(1, 2).flatten(3)         # (B, h, h, K (h + K - 1))
    batch, row, column, _ = x.stride()
    x = x.as_strided((len(a), K, K, side, side), (batch, side + K - 1, 1, row, column + 1))
    return x.flatten(1, 2)


class Refine(nn.Module):
    """A better flow from a guess: the features of picture b where the guess leads, and a local cost
    volume around there, show how far the guess is off."""

    def __init__(self, channels, context, radius):
        super().__init__()
        self.radius, around = radius, (2 * radius + 1) ** 2
        self.net = nn.Sequential(conv(2 * channels + around + 2 + context, 96), conv(96, 64),
                                 conv(64, 64), nn.Conv2d(64, 2, 3, 1, 1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, a, b, flow, context):
        """Features a, b (B, C, h, h), flow (B, 2, h, h) in pictures, context: what else is known of
        a (B, S, h, h) -> flow (B, 2, h, h)."""
        side = a.shape[-1]
        there = networks.grid_points(side).to(a.device).view(1, side, side, 2) + flow.movedim(1, -1)
        found = F.grid_sample(b.float(), 2 * there - 1, padding_mode="border",
                              align_corners=False).to(a.dtype)              # b as seen from a
        cost = cost_volume(normalise_features(a), normalise_features(found), self.radius)
        x = torch.cat([a, found, cost, 10 * flow.to(a.dtype), context], 1)
        return flow + self.net(x).float() / side


class CoarseToFine(nn.Module):
    """After PWC-Net (Sun et al., 2018), small: at an eighth of the resolution, where the features
    of both pictures have attended to each other in a transformer (as in GMFlow, Xu et al., 2022),
    then at a quarter and at half of it, a guess of the flow, at first none, is refined."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.fine = nn.Sequential(conv(3, 32, 2), conv(32, 32))             # half resolution
        self.middle = nn.Sequential(conv(32, 64, 2), conv(64, 64))          # a quarter
        self.coarse = nn.Sequential(conv(64, D, 2), nn.Conv2d(D, D, 3, 1, 1))   # an eighth
        self.place = nn.Parameter(torch.randn((config.size // 8) ** 2, D) * 0.02)
        self.picture = nn.Parameter(torch.randn(2, 1, D) * 0.02)
        self.gpt = networks.Transformer(D, config.depth, 4)
        self.refine = nn.ModuleList([Refine(D, D, 4), Refine(64, D, 3), Refine(32, D, 1)])

    def forward(self, a, b):
        """a, b (B, 3, H, W) in [-1, 1] -> flows (B, 2, h, w): twice at an eighth of the resolution,
        three times at a quarter, once at half."""
        B, grow = len(a), lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")
        fine = self.fine(torch.cat([a, b]))                                 # (2 B, 32, H/2, W/2)
        middle = self.middle(fine)                                          # (2 B, 64, H/4, W/4)
        coarse = self.coarse(middle)                                        # (2 B, D, H/8, W/8)
        x = coarse.flatten(2).transpose(1, 2) + self.place                  # (2 B, n, D)
        x = torch.cat([x[:B] + self.picture[0], x[B:] + self.picture[1]], 1)    # (B, 2 n, D)
        x = torch.cat(self.gpt(x).chunk(2, 1)).transpose(1, 2)              # (2 B, D, n)
        x = coarse + x.unflatten(2, coarse.shape[2:])
        context = x[:B]
        flow, flows = torch.zeros_like(x[:B, :2], dtype=torch.float32), []
        for times, refine, level in zip((2, 3, 1), self.refine, (x, middle, fine)):
            if flows:
                flow, context = grow(flow), grow(context)
            for _ in range(times):
                flow = refine(level[:B], level[B:], flow.detach(), context)
                flows.append(flow)
        return flows


class Raft(nn.Module):
    """torchvision's RAFT (Teed and Deng, 2020), the small one, from random weights."""

    def __init__(self, config):
        from torchvision.models.optical_flow import raft_small
        super().__init__()
        self.net = raft_small(weights=None)

    def forward(self, a, b):
        """a, b (B, 3, H, W) in [-1, 1] -> six flows (B, 2, H, W)."""
        side = max(128, a.shape[-1])                                        # it takes no less
        a, b = (F.interpolate(x, size=(side, side), mode="bilinear") for x in (a, b))
        return [flow / side for flow in self.net(a, b, num_flow_updates=6)]


class FlowNet(nn.Module):
    """A network for the flow from one picture to another, its loss and its use."""
    kind = "flow"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = {"own": CoarseToFine, "raft": Raft}[config.network](config)

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flows from a to b in pictures, x right, y down, each better
        than the one before, [(B, 2, h, w)]."""
        pair = F.interpolate(to_unit(torch.cat([a, b])), size=(self.config.size,) * 2,
                             mode="bilinear")                               # (2 B, 3, H, W)
        return self.net(*pair.chunk(2))

    def loss(self, batch):
        """batch: as `make_pairs` -> mean distance in pixels, parts.  Half of the pairs are blurred
        and noisy, as imagined pictures are."""
        a, b = (degrade(batch[k]) if self.training else batch[k] for k in "ab")
        # ours: what moves counts ten times, the object as much again; most of a picture is neither
        moves = batch["flow"].norm(dim=-1) > 0.005                          # (B, P)
        weight = batch["known"] * (1 + 9 * moves + 10 * batch["object"])
        total, parts = 0.0, {}
        for k, flow in enumerate(self(a, b)):
            off = (read(flow.float(), batch["places"]) - batch["flow"]).square().sum(-1)   # (B, P)
            loss = self.config.size * ((off + 1e-8).sqrt() * weight).sum() / weight.sum()
            total, parts[f"pixels {k}"] = total + loss, loss.item()
        return total, parts

    @torch.no_grad()
    def flow(self, a, b):
        """a, b (H, W, 3) uint8 -> (h, w, 2) in pictures.  ours: the mean with what is predicted of
        their mirror images, which is more exact."""
        pair = torch.as_tensor(np.stack([a, b]), device=next(self.parameters()).device)
        a, b = torch.stack([pair, pair.flip(2)], 1)                         # each (2, H, W, 3)
        flow, mirrored = self(a, b)[-1]                                     # (2, h, w)
        mirrored = torch.stack([-mirrored[0], mirrored[1]]).flip(2)
        return ((flow + mirrored) / 2).permute(1, 2, 0).cpu().numpy()


def read(flow, places):
    """flow (B, 2, h, w) read between its cells at places (B, P, 2) in [0, 1] -> (B, P, 2)."""
    grid = 2 * places[:, None] - 1                                          # (B, 1, P, 2)
    x = F.grid_sample(flow, grid, padding_mode="border", align_corners=False)
    return x[:, :, 0].transpose(1, 2)


def degrade(images, share=0.5):
    """A share of the pictures (B, H, W, 3) uint8 at half the resolution and back, with noise."""
    x = images.permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = blurred + 6 * torch.randn_like(blurred)
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < share
    return torch.where(chosen, blurred, x).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# --- flow of two pictures -------------------------------------------------------------------------

def sample_flow(flow, places):
    """As `read`, of one flow (h, w, 2) at places (P, 2), arrays -> (P, 2)."""
    flow, places = (torch.as_tensor(x).float()[None] for x in (flow, places))
    return read(flow.permute(0, 3, 1, 2), places)[0].numpy()


def dis_flow(a, b):
    """OpenCV's DIS optical flow: a, b (H, W, 3) uint8 -> (H, W, 2) in pictures."""
    import cv2
    grey = [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in (a, b)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    return dis.calc(*grey, None) / a.shape[0]


def estimator(source, device="cpu"):
    """dis, or the checkpoint of a FlowNet -> a function from two pictures to their flow."""
    if source == "dis":
        return dis_flow
    content = training.load(source, FlowNet.kind, "python -m video_control.flow")
    net = FlowNet(from_dict(Config, content["config"]))
    net.load_state_dict(content["model"])
    return net.to(device).eval().requires_grad_(False).flow


# --- data -----------------------------------------------------------------------------------------

def make_pairs(episodes, step, batch, seed):
    """Pairs of pictures that follow each other in AVDC's clips, with the exact tracks -> dict a, b
    (B, H, W, 3) uint8, places (B, P, 2) in [0, 1] of points in a, flow (B, P, 2) to where they are
    in b, known (B, P) bool: visible in a; object (B, P) bool: on the task's object."""
    episode, t, rng = episodes.sample_frames(step, batch, seed)
    times = clip_times(t, episodes.length[episode])                         # (B, 1 + F)
    k = rng.integers(FRAMES, size=(batch, 1)) + [0, 1]
    times = np.take_along_axis(times, k, 1)                                 # (B, 2)
    a, b = episodes.gather("obs/agentview_rgb", episode[:, None], times).swapaxes(0, 1)
    tracks = episodes.gather("tracks/agentview", episode[:, None], times).astype(np.float32)
    places, flow = tracks[:, 0], tracks[:, 1] - tracks[:, 0]                # (B, P, 2)
    masks = episodes.gather("masks", episode, times[:, 0])                  # (B, H, W)
    x, y = (places * len(a[0])).astype(int).clip(0, len(a[0]) - 1).transpose(2, 0, 1)
    return {"a": a, "b": b, "places": places, "flow": flow,
            "known": episodes.gather("visible/agentview", episode, times[:, 0])
            & (np.abs(flow) < 1).all(-1),
            "object": masks[np.arange(batch)[:, None], y, x] == 2}


def mirrored(pairs):
    """The pairs as in a mirror."""
    flip, edge = np.array([[-1, 1], [1, 0]], np.float32)
    return pairs | {"a": pairs["a"][:, :, ::-1].copy(), "b": pairs["b"][:, :, ::-1].copy(),
                    "places": edge + flip * pairs["places"], "flow": flip * pairs["flow"]}


def end_point_error(net, pairs):
    """Mean distance in pixels between a method's flow and the true one, as lines of text: of all
    points, on the object, and where the object moves by over a pixel."""
    known, size = pairs["known"], pairs["a"].shape[1]
    own = known & pairs["object"]
    where = {"all": known, "object": own,
             "moving object": own & (size * np.linalg.norm(pairs["flow"], axis=-1) > 1)}
    lines = ["pixels off" + " " * 14 + "".join(f"{name:>15s}" for name in where)]
    for name, between in (("none", lambda a, b: np.zeros((1, 1, 2))), ("DIS", dis_flow),
                          ("learned", net.flow)):
        flow = [sample_flow(between(a, b), places) for a, b, places in
                zip(pairs["a"], pairs["b"], pairs["places"])]
        off = size * np.linalg.norm(np.stack(flow) - pairs["flow"], axis=-1)    # (B, P)
        lines.append(f"  {name:22s}" + "".join(f"{off[x].mean():15.2f}" for x in where.values()))
    return lines


def show(net, pairs, rows=6):
    """Rows of both pictures and where points go: truly, learned, DIS -> (., ., 3) uint8."""
    lines = []
    for a, b, places, flow, known in list(zip(*(pairs[k] for k in (
            "a", "b", "places", "flow", "known"))))[:rows]:
        flows = {"true": flow, "learned": sample_flow(net.flow(a, b), places),
                 "DIS": sample_flow(dis_flow(a, b), places)}
        drawn = [(name, draw_tracks(a, np.stack([places, places + way]), known[None]))
                 for name, way in flows.items()]
        lines.append(row([("now", a), ("then", b), *drawn], scale=2))
    return np.concatenate(lines)


def main(argv=None):
    """Command line: trains the flow network and compares it with DIS."""
    from demos.record import load_videos
    config = parse(Config, "Flow between far-apart pictures, from the simulator's tracks.", argv)
    if config.size % 8:
        fail(f"--size {config.size} is not divisible by 8: choose a multiple")
    path = run_path(config, "flow")
    videos, held_out, note = load_videos(config)
    held_out = make_pairs(held_out, 0, config.val_pairs, 1)

    def batches(step):
        pairs = make_pairs(videos, step, config.batch, config.seed)
        return mirrored(pairs) if step % 2 else pairs

    torch.manual_seed(config.seed)
    net = training.fit(FlowNet(config), batches, config, path, lambda n: show(n, held_out), note)
    rough = {k: degrade(torch.as_tensor(held_out[k]), 1.0).numpy() for k in "ab"}
    scores = ["held out", *end_point_error(net, held_out),
              "blurred and noisy", *end_point_error(net, held_out | rough)]
    training.report(config, path, "\n".join(scores), lambda: show(net, held_out))


if __name__ == "__main__":
    main()
