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
from tqdm import tqdm

import cameras
import core
import extract
import sims
import train
import video_planner
from core import flag
from flownet import FlowNet, degrade, dis_flow, pixel_grid, raft_flow, sample_flow

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
            angles = angles or sims.views()
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
    net = train.fit(FlowNet(config), batches, config, path, lambda n: show(n, pairs["valid"]),
                   f"{len(pairs['train']['a'])} pairs of pictures")
    held_out, found = pairs["valid"], []
    rough = {k: degrade(torch.as_tensor(held_out[k]), 1.0).numpy() for k in ("a", "b")}
    for what, chosen in (("held out", held_out), ("blurred and noisy", held_out | rough)):
        found += [table(end_point_error(net, chosen, config), what)]
    errors = "\n".join(found)
    print(errors)
    core.write(path.with_suffix(".txt"), errors + "\n")
    print(f"picture: {path.with_suffix('.png')}   "
          f"next: python avdc.py --future true")


if __name__ == "__main__":
    main()
