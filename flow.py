"""AVDC section 3.2: the flow between the far-apart pictures of a video.

    python flow.py --suite avdc             # makes the data first if there is none

AVDC takes GMFlow with downloaded weights; classical flow (OpenCV's DIS) fails between pictures this
far apart.  Here a small network of the same idea learns from the simulator, which knows where every
point of a picture is in the next one; `avdc.py` acts by its flow.

Sizes: B batch, P points, H W pixels, N cells of a picture at a quarter of its resolution, D width.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import cameras
import core
import extract
import sims
import train
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
    pairs: int = flag(9, "pairs of pictures per video, of each camera a third", minimum=1)
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
    """Global matching (after GMFlow, Xu et al., 2022), small: features of both pictures look at
    each other at an eighth of the resolution; at a quarter, each finds itself in the other picture
    by a softmax over all its cells; convolutions over what then lies together say the rest, at
    half of it.
    """
    kind = "flow"

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        conv = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.GroupNorm(8, o),
                                             nn.ReLU())
        self.fine = nn.Sequential(conv(3, 32, 2), conv(32, 32, 1))          # half resolution
        self.middle = nn.Sequential(conv(32, 64, 2), conv(64, D, 1))        # a quarter
        self.coarse = nn.Conv2d(D, D, 3, 2, 1)                              # an eighth
        if config.size % 8:
            core.fail(f"--size {config.size} is not divisible by 8: choose a multiple")
        n, self.side = (config.size // 8) ** 2, config.size // 4
        self.place = nn.Parameter(torch.randn(n, D) * 0.02)
        self.which = nn.Parameter(torch.randn(2, 1, D) * 0.02)
        self.gpt = core.Transformer(D, config.depth, 4)
        self.norm = nn.LayerNorm(D)
        # where a cell is counts at first more than what it shows: everything is where it was
        self.where = nn.Parameter(torch.randn(self.side ** 2, D))
        self.refine = nn.Sequential(conv(32 * 3 + 2 + D, 96, 1), conv(96, 64, 1), conv(64, 64, 1),
                                    nn.Conv2d(64, 2, 3, 1, 1))
        nn.init.zeros_(self.refine[-1].weight)
        nn.init.zeros_(self.refine[-1].bias)

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flow from a to b in pictures, x right, y down, at a quarter
        (B, 2, H/4, W/4) and at half resolution (B, 2, H/2, W/2)."""
        B, side = len(a), self.side
        grow = lambda y: F.interpolate(y.float(), scale_factor=2, mode="bilinear")
        fine = self.fine(video_planner.to_unit(torch.cat([a, b])))          # (2 B, 32, H/2, W/2)
        middle = self.middle(fine)                                          # (2 B, D, H/4, W/4)
        x = self.coarse(middle).flatten(2).transpose(1, 2) + self.place     # (2 B, n, D)
        x = torch.cat([x[:B] + self.which[0], x[B:] + self.which[1]], 1)    # (B, 2 n, D)
        x = torch.cat(self.gpt(x).chunk(2, 1)).transpose(1, 2)              # (2 B, D, n)
        x = middle + grow(x.unflatten(2, (side // 2, side // 2)))           # (2 B, D, H/4, W/4)
        x = self.norm(x.flatten(2).transpose(1, 2)) + self.where            # (2 B, N, D)
        match = x[:B] @ x[B:].transpose(1, 2) / x.shape[-1] ** 0.5          # (B, N, N)
        grid = pixel_grid(side, a.device)                                   # (N, 2)
        first = match.float().softmax(-1) @ grid - grid                     # (B, N, 2)
        first = first.transpose(1, 2).unflatten(2, (side, side))            # (B, 2, H/4, W/4)
        flow = grow(first)
        there = pixel_grid(2 * side, a.device).view(1, 2 * side, 2 * side, 2) + flow.movedim(1, -1)
        found = F.grid_sample(fine[B:].float(), 2 * there - 1, padding_mode="border",
                              align_corners=False)                          # b as seen from a
        said = x[:B].transpose(1, 2).unflatten(2, (side, side))
        near = torch.cat([fine[:B], found.to(fine.dtype), fine[B:], flow.to(fine.dtype),
                          grow(said).to(fine.dtype)], 1)
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
    return [cameras.free(*sims.VIEW[:2], *angles) for angles in ANGLES]


# --- training on the simulator's own flow ---------------------------------------------------------

def recorded(config, name, split):
    """The states (T, S) and the seed of each of a task's episodes, of 'train' or 'valid'."""
    chosen = slice(extract.HELD_OUT, None) if split == "train" else slice(extract.HELD_OUT)
    numbers = range(extract.HELD_OUT + config.demos)[chosen]
    with extract.open_data(Path(config.data) / config.suite / f"{name}.hdf5") as f:
        return [(f[f"data/demo_{i}/states"][:], int(f[f"data/demo_{i}"].attrs["seed"]))
                for i in numbers]


def make_pairs(config, names, split):
    """Pairs of pictures as far apart as AVDC's videos have them, from all three cameras, with the
    true flow -> dict a, b (N, H, W, 3) uint8, flow (N, h, w, 2) f2 in pictures, nan where unknown,
    object (N, h, w) bool.  Made once and kept in runs/<suite>/flow_<split>.npz."""
    path = Path(config.out) / config.suite / f"flow_{split}.npz"
    count, each = (config.pairs, config.demos) if split == "train" else (30, extract.HELD_OUT)
    if path.exists():
        kept = dict(np.load(path))
        if len(kept["a"]) == count * each * len(names):
            return kept
    grid = pixel_grid(config.size // STRIDE).numpy()
    rows, rng = [], np.random.default_rng(config.seed)
    bar = tqdm(total=count * each * len(names), desc=f"exact flow, {split}", mininterval=10)
    for name in names:
        sim, angles = sims.make(config.suite, name, config.size), None
        for states, seed in recorded(config, name, split):
            sim.reset(seed=seed)
            qpos = states[:, 1:1 + sim.model.nq]
            angles = angles or views()
            for k in range(count):
                times = video_planner.clip_times(rng.integers(len(qpos) - 1, size=1),
                                                 np.array([len(qpos)]))[0]
                pair = times[(i := rng.integers(video_planner.FRAMES)):i + 2]
                rows.append(exact_pair(sim, angles[k % 3], qpos[pair], grid))
                bar.update()
        sim.close()
    kept = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".tmp.npz"), **kept)
    path.with_suffix(".tmp.npz").replace(path)
    return kept


def exact_pair(sim, view, qpos, grid):
    """Two moments qpos (2, nq) as a row of `make_pairs`; grid (h w, 2) where flow is told."""
    replay, side = cameras.Replay(sim.camera, view, sim.model, qpos), int(len(grid) ** 0.5)
    body, local = replay.pick(np.zeros(len(grid), int), grid.astype(float))
    flow = replay.follow(np.maximum(body, 0), local)[1][1] - grid           # (h w, 2)
    flow[body < 0] = np.nan
    own = np.isin(body, np.unique(sim.model.geom_bodyid[sim.label == 2]))
    pictures = []
    for t in range(2):
        replay.at(t)
        pictures.append(sim.camera.picture(replay.data, view))
    return {"a": pictures[0], "b": pictures[1], "object": own.reshape(side, side),
            "flow": flow.reshape(side, side, 2).astype(np.float16)}


def end_point_error(net, pairs, config):
    """Mean distance in pixels between a method's flow and the true one.

    -> {method: {where: pixels}}: everywhere, on the object, and on the object where it moves, by
    more than a pixel.
    """
    true, side = pairs["flow"].astype(np.float32), config.size
    known = np.isfinite(true).all(-1) & (np.abs(np.nan_to_num(true)) < 1).all(-1)
    moves = known & (np.linalg.norm(np.nan_to_num(true), axis=-1) * side > 1)
    where = {"all": known, "object": known & pairs["object"],
             "moving object": moves & pairs["object"]}
    grid = pixel_grid(side // STRIDE).numpy()
    said = {"none": np.zeros_like(true), "DIS": [], "learned": []}
    for a, b in zip(pairs["a"], pairs["b"]):
        for name, flow in (("DIS", dis_flow(a, b)), ("learned", net.flow(a, b))):
            said[name].append(sample_flow(flow, grid).reshape(true.shape[1:]))
    off = {name: side * np.linalg.norm(np.stack(list(f)) - true, axis=-1)
           for name, f in said.items()}  # pixels
    return {name: {place: float(far[chosen].mean()) for place, chosen in where.items()}
            for name, far in off.items()}


def table(errors):
    """The errors of `end_point_error` as lines of text."""
    lines = ["held-out end-point error, pixels" + "".join(f"{w:>15s}" for w in errors["none"])]
    return "\n".join(lines + [f"  {name:30s}" + "".join(f"{x:15.2f}" for x in row.values())
                              for name, row in errors.items()])


def colours(flow):
    """flow (H, W, 2) -> (H, W, 3) uint8: direction as hue, length as strength."""
    import cv2
    length, angle = cv2.cartToPolar(*np.nan_to_num(flow.astype(np.float32)).transpose(2, 0, 1))
    strong = np.clip(length * 255 / 0.15, 0, 255)
    hsv = np.stack([angle * 90 / np.pi, np.full_like(strong, 255), strong], -1).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def show(net, pairs, rows=8):
    """Rows of both pictures and the flow: true, learned, DIS -> (., ., 3) uint8."""
    lines, size = [], pairs["a"].shape[1]
    chosen = np.linspace(0, len(pairs["a"]) - 1, rows).astype(int)
    for k in chosen:
        a, b = pairs["a"][k], pairs["b"][k]
        flows = [pairs["flow"][k], net.flow(a, b), dis_flow(a, b)]
        cells = [np.kron(colours(f), np.ones((size // len(f),) * 2 + (1,), np.uint8))
                 for f in flows]
        lines.append(np.concatenate([a, b, *cells], 1))
    titles = ("now", "then", "true", "learned", "DIS")
    head = [extract.caption(np.full((1, size, 3), 255, np.uint8), title) for title in titles]
    return np.concatenate([np.concatenate(head, 1), *lines])


def load_net(path, device="cpu"):
    """A trained FlowNet, frozen."""
    content = train.load(path, kind=FlowNet.kind, made_by="python flow.py --suite avdc")
    net = FlowNet(core.from_dict(Config, content["config"]))
    net.load_state_dict(content["model"])
    return net.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: trains the flow network and compares it with DIS."""
    config = core.parse(Config, "Flow between far-apart pictures, from the simulator's own.", argv)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not sims.is_metaworld(config.suite):
        core.fail(f"--suite {config.suite}: AVDC acts in Meta-World; give avdc, mt10 or a task")
    extract.ensure(config.suite, names, config.demos, config.data, config.size)
    pairs = {split: make_pairs(config, names, split) for split in ("train", "valid")}
    tensors = {k: pairs["train"][k] for k in ("a", "b", "flow")}

    def batches(step):
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.integers(len(tensors["a"]), size=config.batch)
        return {k: v[chosen] for k, v in tensors.items()}

    torch.manual_seed(config.seed)
    path = Path(config.out) / config.suite / "flow.pt"
    net = train.fit(FlowNet(config), batches, config, path, lambda n: show(n, pairs["valid"]),
                   f"{len(tensors['a'])} pairs of pictures")
    errors = table(end_point_error(net, pairs["valid"], config))
    print(errors)
    core.write(path.with_suffix(".txt"), errors + "\n")
    print(f"picture: {path.with_suffix('.png')}   "
          f"next: python rollout.py --policy flow-true {path}")


if __name__ == "__main__":
    main()
