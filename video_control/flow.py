"""AVDC section 3.2: the flow between the far-apart pictures of a video.

    python -m video_control.flow --suite avdc       # makes the data first if there is none

differs: AVDC takes GMFlow with published weights; here a small network learns from the simulator,
which knows where every point of a picture is in the next one.  Classical flow (OpenCV's DIS) fails
between pictures this far apart.

Sizes: B batch, N pairs of pictures, H W pixels, h w cells of a flow.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import sims
from core import networks, training
from core.draw import caption
from core.episodes import HELD_OUT, open_data
from core.files import fail
from core.flags import PlannerConfig, flag, from_dict, parse, run_path
from sims import metaworld
from sims.camera import Replay
from video_planner import FRAMES, clip_times, to_unit

STRIDE = 2      # pixels between the points where the network's flow is compared with the true one


@dataclass
class Config(PlannerConfig):
    suite: str = flag("avdc", "suite of Meta-World, or a task")
    network: str = "own"    # or raft
    pairs: int = 27         # pairs of pictures per video, of each camera a third
    width: int = 96         # of the features that are matched
    depth: int = 3          # transformer blocks over both pictures

    PRESETS = {
        "tiny": dict(demos=2, steps=5, size=64, batch=4, lr=1e-3, width=32, depth=1, pairs=3),
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
        if config.size % 8:
            fail(f"--size {config.size} is not divisible by 8: choose a multiple")
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
        """batch: a, b (B, H, W, 3) uint8, flow (B, h, w, 2) in pictures, object (B, h, w) bool
        -> mean distance in pixels, parts.  Half of the pairs are blurred and noisy, as imagined
        pictures are."""
        a, b, true = batch["a"], batch["b"], batch["flow"].float().permute(0, 3, 1, 2)
        if self.training:
            a, b = degrade(a), degrade(b)
        known = true.isfinite().all(1, keepdim=True) & (true.abs() < 1).all(1, keepdim=True)
        total, parts, own = 0.0, {}, batch["object"][:, None].float()
        for k, flow in enumerate(self(a, b)):
            here = lambda x: F.interpolate(x, size=flow.shape[-2:])
            true_here = here(true.nan_to_num(0))
            # ours: what moves counts ten times, the object as much again; most of a picture is
            # neither
            moves = true_here.norm(dim=1, keepdim=True) > 0.005
            weight = here(known.float()) * (1 + 9 * moves + 10 * here(own))
            off = (flow - true_here).square().sum(1, keepdim=True).add(1e-8).sqrt()
            loss = self.config.size * (off * weight).sum() / weight.sum()
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


def degrade(images, share=0.5):
    """A share of the pictures (B, H, W, 3) uint8 at half the resolution and back, with noise."""
    x = images.permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = blurred + 6 * torch.randn_like(blurred)
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < share
    return torch.where(chosen, blurred, x).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# --- flow of two pictures -------------------------------------------------------------------------

def sample_flow(flow, places):
    """flow (H, W, 2) in pictures, read between the pixels at places (P, 2) in [0, 1] -> (P, 2)."""
    grid = torch.as_tensor(2 * places - 1, dtype=torch.float32)[None, None]     # (1, 1, P, 2)
    x = torch.as_tensor(flow).permute(2, 0, 1)[None].float()
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)[0, :, 0].T.numpy()


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
    content = training.load(source, FlowNet.kind, "python -m video_control.flow --suite avdc")
    net = FlowNet(from_dict(Config, content["config"]))
    net.load_state_dict(content["model"])
    return net.to(device).eval().requires_grad_(False).flow


# --- training on the simulator's own flow ---------------------------------------------------------

def recorded(config, name, split):
    """The states (T, S) and the seed of each of a task's episodes, of 'train' or 'valid'."""
    numbers = range(HELD_OUT) if split == "valid" else range(HELD_OUT, HELD_OUT + config.demos)
    with open_data(Path(config.data) / config.suite / f"{name}.hdf5") as f:
        return [(f[f"data/demo_{i}/states"][:], int(f[f"data/demo_{i}"].attrs["seed"]))
                for i in numbers]


def make_pairs(config, names, split):
    """Pairs of pictures as far apart as AVDC's videos have them, from all three cameras, with the
    true flow -> dict a, b (N, H, W, 3) uint8, flow (N, h, w, 2) f2 in pictures, nan where unknown,
    object (N, h, w) bool.  Made once and kept in <out>/<suite>/flow_<split>.npz."""
    path = Path(config.out) / config.suite / f"flow_{split}.npz"
    count, each = (config.pairs, config.demos) if split == "train" else (30, HELD_OUT)
    total = count * each * len(names)
    if path.exists() and len((kept := dict(np.load(path)))["a"]) == total:
        return kept
    rows, rng = [], np.random.default_rng(config.seed)
    bar = tqdm(total=total, desc=f"exact flow, {split}", mininterval=10)
    for name in names:
        sim, views = sims.make(config.suite, name, config.size), metaworld.views()
        for states, seed in recorded(config, name, split):
            sim.reset(seed=seed)
            qpos = states[:, 1:1 + sim.model.nq]
            for k in range(count):
                times = clip_times(rng.integers(len(qpos) - 1), len(qpos))
                i = rng.integers(FRAMES)
                rows.append(exact_pair(sim, views[k % 3], qpos[times[i:i + 2]]))
                bar.update()
        sim.close()
    kept = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".tmp.npz"), **kept)
    path.with_suffix(".tmp.npz").replace(path)
    return kept


def exact_pair(sim, view, qpos):
    """Two moments qpos (2, nq) as a row of `make_pairs`."""
    replay, side = Replay(sim.camera, view, sim.model, qpos), sim.camera.renderer.height // STRIDE
    grid = networks.grid_points(side).numpy().astype(float)                 # (h w, 2)
    body, local = replay.pick(np.zeros(len(grid), int), grid)
    flow = replay.follow(np.maximum(body, 0), local)[1][1] - grid           # (h w, 2)
    flow[body < 0] = np.nan
    own = np.isin(body, np.unique(sim.model.geom_bodyid[sim.label == 2]))
    a, b = (replay.at(t) or sim.camera.picture(replay.data, view) for t in range(2))
    return {"a": a, "b": b, "object": own.reshape(side, side),
            "flow": flow.reshape(side, side, 2).astype(np.float16)}


def end_point_error(net, pairs, size):
    """Mean distance in pixels between a method's flow and the true one -> {method: {where:
    pixels}}: everywhere, on the object, and where the object moves by over a pixel."""
    true = pairs["flow"].astype(np.float32)                                 # (N, h, w, 2)
    length = np.abs(np.nan_to_num(true, nan=9)).max(-1)
    known = length < 1
    moving = known & pairs["object"] & (size * np.linalg.norm(np.nan_to_num(true), axis=-1) > 1)
    where = {"all": known, "object": known & pairs["object"], "moving object": moving}
    grid, errors = networks.grid_points(true.shape[1]).numpy(), {}
    for name, between in (("none", lambda a, b: np.zeros((1, 1, 2))), ("DIS", dis_flow),
                          ("learned", net.flow)):
        flows = [sample_flow(between(a, b), grid) for a, b in zip(pairs["a"], pairs["b"])]
        off = size * np.linalg.norm(np.stack(flows).reshape(true.shape) - true, axis=-1)
        errors[name] = {place: float(off[chosen].mean()) for place, chosen in where.items()}
    return errors


def table(errors, what):
    """The errors of `end_point_error` as lines of text; what: of which pictures, in a few words."""
    lines = [f"{what + ', pixels off':32s}" + "".join(f"{w:>15s}" for w in errors["none"])]
    return "\n".join(lines + [f"  {name:30s}" + "".join(f"{x:15.2f}" for x in row.values())
                              for name, row in errors.items()])


def colours(flow, size):
    """flow (h, w, 2) -> (size, size, 3) uint8: direction as hue, length as strength."""
    import cv2
    flow = cv2.resize(np.nan_to_num(flow.astype(np.float32)), (size, size))
    length, angle = cv2.cartToPolar(*flow.transpose(2, 0, 1))
    strong = np.clip(length * 255 / 0.15, 0, 255)
    hsv = np.stack([angle * 90 / np.pi, np.full_like(strong, 255), strong], -1).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def show(net, pairs, rows=8):
    """Rows of both pictures and the flow: true, learned, DIS -> (., ., 3) uint8."""
    titles, size, lines = ("now", "then", "true", "learned", "DIS"), pairs["a"].shape[1], []
    for k in np.linspace(0, len(pairs["a"]) - 1, rows).astype(int):
        a, b = pairs["a"][k], pairs["b"][k]
        flows = [colours(f, size) for f in (pairs["flow"][k], net.flow(a, b), dis_flow(a, b))]
        lines.append(np.concatenate([a, b, *flows], 1))
    head = [caption(np.full((1, size, 3), 255, np.uint8), title) for title in titles]
    return np.concatenate([np.concatenate(head, 1), *lines])


def main(argv=None):
    """Command line: trains the flow network and compares it with DIS."""
    from demos.record import ensure
    config = parse(Config, "Flow between far-apart pictures, from the simulator's own.", argv)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not sims.goal_varies(config.suite):
        fail(f"--suite {config.suite}: AVDC acts in Meta-World; give avdc, mt10 or a task")
    ensure(config.suite, names, config.demos, config.data, config.size)
    train, held_out = (make_pairs(config, names, split) for split in ("train", "valid"))

    def batches(step):
        """The pairs of one training step, half of the steps mirrored, given (seed, step)."""
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.integers(len(train["a"]), size=config.batch)
        batch = {k: v[chosen] for k, v in train.items()}
        if rng.random() < 0.5:                  # as in a mirror
            batch = {k: np.flip(v, 2).copy() for k, v in batch.items()}
            batch["flow"][..., 0] *= -1
        return batch

    torch.manual_seed(config.seed)
    path = run_path(config, "flow")
    net = training.fit(FlowNet(config), batches, config, path, lambda n: show(n, held_out),
                       f"{len(train['a'])} pairs of pictures")
    rough = {k: degrade(torch.as_tensor(held_out[k]), 1.0).numpy() for k in ("a", "b")}
    errors = [table(end_point_error(net, pairs, config.size), what) for what, pairs in
              (("held out", held_out), ("blurred and noisy", held_out | rough))]
    training.report(config, path, "\n".join(errors), lambda: show(net, held_out))


if __name__ == "__main__":
    main()
