"""AVDC section 3.2: the flow between the far-apart pictures of a video.

    python flow.py --suite avdc             # makes the data first if there is none

AVDC takes GMFlow with downloaded weights; classical flow (OpenCV's DIS) fails between pictures this
far apart.  Here a small network (`flownet.py`) learns from the simulator, which knows where every
point of a picture is in the next one; `avdc.py` acts by its flow.

Sizes: B batch, N pairs of pictures, H W pixels, h w places in a picture where flow is told.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import sims
import video_planner
from core import networks, training
from core.draw import caption
from core.episodes import HELD_OUT, open_data
from core.files import fail, write
from core.flags import flag, from_dict, parse
from demos import record
from sims import metaworld
from sims.camera import Replay


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
            fail(f"--size {config.size} is not divisible by 8: choose a multiple")
        self.place = nn.Parameter(torch.randn((config.size // 8) ** 2, D) * 0.02)
        self.which = nn.Parameter(torch.randn(2, 1, D) * 0.02)
        self.gpt = networks.Transformer(D, config.depth, 4)
        self.refine = nn.ModuleList([Refine(D, D, 4), Refine(64, D, 3), Refine(32, D, 1)])

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flow from a to b in pictures, x right, y down: twice at an
        eighth of the resolution, three times at a quarter, at half (B, 2, H/2, W/2), each better
        than the one before."""
        B = len(a)
        grow = lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")
        fine = self.fine(video_planner.to_unit(torch.cat([a, b])))          # (2 B, 32, H/2, W/2)
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
        fail(f"no weights of RAFT: put {address} into {file.parent}; or --flow learned, which "
                  "flow.py trains")
    model = raft_large().eval()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def raft(a, b):
        pair = video_planner.to_unit(torch.as_tensor(np.stack([a, b])))     # (2, 3, H, W)
        pair = F.interpolate(pair, size=(work, work), mode="bilinear")
        return model(pair[:1], pair[1:])[-1][0].permute(1, 2, 0).numpy() / work
    return raft


STRIDE = 2      # pixels between the points where the network's flow is compared with the true one


@dataclass
class Config:
    suite: str = flag("avdc", "suite of Meta-World, or a task")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    demos: int = flag(20, "videos per task", minimum=1)
    size: int = flag(96, "height and width of the pictures, pixels", minimum=32)
    width: int = flag(96, "of the features that are matched", minimum=16)
    depth: int = flag(3, "transformer blocks over both pictures", minimum=1)
    pairs: int = flag(27, "pairs of pictures per video, of each camera a third", minimum=1)
    # on the object 1.13 pixels off after 3,000 steps; after 8,000 0.8 (0.64 s of a core each)
    steps: int = flag(8000, "gradient steps", minimum=1)
    batch: int = flag(8, "pairs per step", minimum=1)
    lr: float = flag(1e-3, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    weight_decay, warmup, clip, ema, save_every, log_every = 1e-4, 100, 1.0, 0.0, 500, 100


# --- flow of two pictures -----------------------------------------------------------------------

def estimator(name, path):
    """learned (the network at `path`), dis or raft -> a function from two pictures to their flow,
    as `dis_flow`."""
    make = {"learned": lambda: load_net(path).flow, "dis": lambda: dis_flow, "raft": raft_flow}
    return make[name]()


# --- training on the simulator's own flow ---------------------------------------------------------

def recorded(config, name, split):
    """The states (T, S) and the seed of each of a task's episodes, of 'train' or 'valid'."""
    chosen = slice(HELD_OUT, None) if split == "train" else slice(HELD_OUT)
    numbers = range(HELD_OUT + config.demos)[chosen]
    with open_data(Path(config.data) / config.suite / f"{name}.hdf5") as f:
        return [(f[f"data/demo_{i}/states"][:], int(f[f"data/demo_{i}"].attrs["seed"]))
                for i in numbers]


def make_pairs(config, names, split):
    """Pairs of pictures as far apart as AVDC's videos have them, from all three cameras, with the
    true flow -> dict a, b (N, H, W, 3) uint8, flow (N, h, w, 2) f2 in pictures, nan where unknown,
    object (N, h, w) bool.  Made once and kept in runs/<suite>/flow_<split>.npz."""
    path = Path(config.out) / config.suite / f"flow_{split}.npz"
    count, each = (config.pairs, config.demos) if split == "train" else (30, HELD_OUT)
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
            angles = angles or metaworld.views()
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
    replay, side = Replay(sim.camera, view, sim.model, qpos), int(len(grid) ** 0.5)
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


def table(errors, what):
    """The errors of `end_point_error` as lines of text; what: of which pictures, in a few words."""
    lines = [f"{what + ', pixels off':32s}" + "".join(f"{w:>15s}" for w in errors["none"])]
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
    head = [caption(np.full((1, size, 3), 255, np.uint8), title) for title in titles]
    return np.concatenate([np.concatenate(head, 1), *lines])


def load_net(path, device="cpu"):
    """A trained FlowNet, frozen."""
    content = training.load(path, kind=FlowNet.kind, made_by="python flow.py --suite avdc")
    net = FlowNet(from_dict(Config, content["config"]))
    net.load_state_dict(content["model"])
    return net.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: trains the flow network and compares it with DIS."""
    config = parse(Config, "Flow between far-apart pictures, from the simulator's own.", argv)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not sims.is_metaworld(config.suite):
        fail(f"--suite {config.suite}: AVDC acts in Meta-World; give avdc, mt10 or a task")
    record.ensure(config.suite, names, config.demos, config.data, config.size)
    pairs = {split: make_pairs(config, names, split) for split in ("train", "valid")}

    def batches(step):
        """The pairs of one training step, half of these mirrored, given (seed, step)."""
        rng = np.random.default_rng([config.seed, step])
        chosen = rng.integers(len(pairs["train"]["a"]), size=config.batch)
        batch = {k: v[chosen] for k, v in pairs["train"].items()}
        if rng.random() < 0.5:                  # as in a mirror
            batch = {k: np.flip(v, 2).copy() for k, v in batch.items()}
            batch["flow"][..., 0] *= -1
        return batch

    torch.manual_seed(config.seed)
    path = Path(config.out) / config.suite / "flow.pt"
    net = training.fit(FlowNet(config), batches, config, path, lambda n: show(n, pairs["valid"]),
                   f"{len(pairs['train']['a'])} pairs of pictures")
    held_out, found = pairs["valid"], []
    rough = {k: degrade(torch.as_tensor(held_out[k]), 1.0).numpy() for k in ("a", "b")}
    for what, chosen in (("held out", held_out), ("blurred and noisy", held_out | rough)):
        found += [table(end_point_error(net, chosen, config), what)]
    errors = "\n".join(found)
    print(errors)
    write(path.with_suffix(".txt"), errors + "\n")
    print(f"picture: {path.with_suffix('.png')}   "
          f"next: python avdc.py --future true")


if __name__ == "__main__":
    main()
