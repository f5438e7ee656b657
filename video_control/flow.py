"""AVDC section 3.2: the flow between the far-apart pictures of a video.

    python -m video_control.flow        # of AVDC's tasks and cameras; makes the data first if none

differs: AVDC takes GMFlow with published weights; here torchvision's small RAFT (Teed and Deng,
2020) learns, from random weights, from the simulator's exact tracks of points.  Classical flow
(OpenCV's DIS) fails between pictures this far apart.

Sizes: B batch, P points, H W pixels, h w cells of a flow.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.optical_flow import raft_small

from core import networks, training
from core.files import write
from core.flags import TrainingConfig, flag, from_dict, parse
from video_planner import FRAMES, clip_times


@dataclass
class Config(TrainingConfig):
    suite: str = flag("avdc,avdc_view1,avdc_view2", "suites of videos with tracks")
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    batch: int | None = flag(None, "pairs of pictures per step", minimum=1)
    name: str = flag("flow", "name of the run")

    val_pairs: int = 300    # held-out pairs to be scored by
    updates: int = 6        # of a flow, at first none
    PRESETS = {"tiny": dict(demos=2, steps=5, size=64, batch=4, lr=6e-4, updates=2, val_pairs=9),
               "laptop": dict(demos=20, steps=8000, size=96, batch=8, lr=6e-4),
               "paper": dict(demos=50, steps=30000, size=128, batch=32, lr=4e-4, updates=12)}


class FlowNet(nn.Module):
    """A network for the flow from one picture to another, its loss and its use."""
    kind = "flow"

    def __init__(self, config):
        super().__init__()
        self.config, self.net = config, raft_small(weights=None)

    def forward(self, a, b):
        """a, b (B, H, W, 3) uint8 -> flows from a to b in pictures, x right, y down, each better
        than the one before, [(B, 2, h, w)]."""
        side = max(128, self.config.size)                                   # RAFT takes no less
        pair = networks.to_unit(torch.cat([a, b]))                          # (2 B, 3, H, W)
        pair = F.interpolate(pair, size=(side, side), mode="bilinear")
        return [x / side for x in self.net(*pair.chunk(2), num_flow_updates=self.config.updates)]

    def loss(self, batch):
        """batch: as `make_pairs` -> mean distance in pixels, parts.  Half of the pictures are
        blurred and noisy, as imagined ones are."""
        a, b = (degrade(batch[k], 0.5) if self.training else batch[k] for k in "ab")
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
    """flow (B, 2, h, w) read at places (B, P, 2) in [0, 1], x right, y down: bilinear between its
    cells' middles, beyond the last ones as there -> (B, P, 2)."""
    grid = 2 * places[:, None] - 1                                          # (B, 1, P, 2)
    x = F.grid_sample(flow, grid, padding_mode="border", align_corners=False)
    return x[:, :, 0].transpose(1, 2)


def sample_flow(flow, places):
    """As `read`, of one flow (h, w, 2) at places (P, 2), arrays -> (P, 2)."""
    flow, places = (torch.as_tensor(x).float()[None] for x in (flow, places))
    return read(flow.permute(0, 3, 1, 2), places)[0].numpy()


def degrade(images, share):
    """A share of the pictures (B, H, W, 3) uint8 at half the resolution and back, with noise."""
    x = images.permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    blurred = blurred + 6 * torch.randn_like(blurred)
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < share
    return torch.where(chosen, blurred, x).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def dis_flow(a, b):
    """OpenCV's DIS optical flow: a, b (H, W, 3) uint8 -> (H, W, 2) in pictures."""
    import cv2
    grey = [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in (a, b)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    return dis.calc(*grey, None) / a.shape[0]


def load_flow(out):
    """The trained network <out>/avdc/flow.pt."""
    path = Path(out) / "avdc" / "flow.pt"
    content = training.load(path, FlowNet.kind, "python -m video_control.flow")
    training.check_whole(path, content)
    net = FlowNet(from_dict(Config, content["config"]))
    net.load_state_dict(content["model"])
    net.codes = content["code"]
    return net.eval().requires_grad_(False)


def make_pairs(episodes, step, batch, seed):
    """Pairs of pictures that follow each other in AVDC's clips, with the exact tracks -> dict a, b
    (B, H, W, 3) uint8, places (B, P, 2) in [0, 1] of points in a, flow (B, P, 2) to where they are
    in b, known (B, P) bool: visible in a and in reach; object (B, P) bool: on the task's object."""
    episode, t, rng = episodes.sample_frames(step, batch, seed)
    times = clip_times(t, episodes.length[episode])                         # (B, 1 + F)
    k = rng.integers(FRAMES, size=(batch, 1)) + [0, 1]
    times = np.take_along_axis(times, k, 1)                                 # (B, 2)
    a, b = episodes.gather("obs/agentview_rgb", episode[:, None], times).swapaxes(0, 1)
    tracks = episodes.gather("tracks/agentview", episode[:, None], times).astype(np.float32)
    places, flow = tracks[:, 0], tracks[:, 1] - tracks[:, 0]                # (B, P, 2)
    visible, masks = (episodes.gather(key, episode, times[:, 0])            # (B, P), (B, H, W)
                      for key in ("visible/agentview", "masks"))
    x, y = (places * len(a[0])).astype(int).clip(0, len(a[0]) - 1).transpose(2, 0, 1)
    return {"a": a, "b": b, "places": places, "flow": flow,
            "known": visible & (np.abs(flow) < 1).all(-1),
            "object": masks[np.arange(batch)[:, None], y, x] == 2}


def mirrored(pairs):
    """The pairs as in a mirror."""
    flip, edge = np.array([[-1, 1], [1, 0]], np.float32)
    return pairs | {"a": pairs["a"][:, :, ::-1].copy(), "b": pairs["b"][:, :, ::-1].copy(),
                    "places": edge + flip * pairs["places"], "flow": flip * pairs["flow"]}


def end_point_error(net, pairs):
    """Mean distance in pixels between a method's flow and the true one, as lines of text: of all
    points, on the object, and where the object moves by over a pixel."""
    known, true, size = pairs["known"], pairs["flow"], pairs["a"].shape[1]
    own = known & pairs["object"]
    where = {"all": known, "object": own,
             "moving object": own & (size * np.linalg.norm(true, axis=-1) > 1)}
    lines = ["pixels off" + " " * 14 + "".join(f"{name:>15s}" for name in where)]
    for name, between in (("none", lambda a, b: np.zeros((1, 1, 2))), ("DIS", dis_flow),
                          ("learned", net.flow)):
        flows = map(between, pairs["a"], pairs["b"])
        found = np.stack([*map(sample_flow, flows, pairs["places"])])       # (B, P, 2)
        off = size * np.linalg.norm(found - true, axis=-1)                  # (B, P)
        lines.append(f"  {name:22s}" + "".join(f"{off[x].mean():15.2f}" for x in where.values()))
    return lines


def main(argv=None):
    """Command line: trains the flow network and compares it with DIS."""
    from demos.record import load_videos
    config = parse(Config, "Flow between far-apart pictures, from the simulator's tracks.", argv)
    path = training.run_path(config, "flow")
    videos, held_out, note = load_videos(config)

    def batches(step):
        pairs = make_pairs(videos, step, config.batch, config.seed)
        return mirrored(pairs) if step % 2 else pairs

    torch.manual_seed(config.seed)
    net = training.fit(FlowNet(config), batches, config, path, note=note)
    pairs = make_pairs(held_out, 0, config.val_pairs, 1)
    rough = {k: degrade(torch.as_tensor(pairs[k]), 1.0).numpy() for k in "ab"}
    scores = "\n".join(["held out", *end_point_error(net, pairs),
                        "blurred and noisy", *end_point_error(net, pairs | rough)])
    print(scores + "\nnext: python -m video_control.avdc true")
    write(path.with_suffix(".txt"), scores + "\n")


if __name__ == "__main__":
    main()
