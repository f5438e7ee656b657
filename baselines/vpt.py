"""VPT (ATM, section V-A): actions predicted for all videos, from which a clone then learns.

    python -m baselines.vpt --suite libero_spatial --action-demos 2     # writes libero_spatial_vpt2
    python executor.py --planner none --suite libero_spatial_vpt2 --action-demos 20

An inverse dynamics model, which sees what comes after, learns from the few action demonstrations
and labels all videos. The labelled suite is rolled out and tabled in its parent, as none_vpt2.
differs: the clone's task is the goal picture, unless --planner none-language; ATM's: the sentence.

Sizes: B batch, V cameras, K pictures that the model sees, T frames, n tokens per picture, D width,
A action and S state numbers, H W pixels.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training
from core.episodes import CAMERAS, Episodes
from core.files import fail
from core.flags import PlannerConfig, flag, parse

# ours: steps at which the model looks: what moves in two steps is what is done now, and fingers
# follow their command within eight
TIMES = (0, 2, 8)
PICTURES = [f"obs/{camera}_rgb" for camera in CAMERAS]
# differs: of all videos, those with actions too, and states besides, which a video lacks; ATM's
# VPT labels the rest with actions alone
LABELS = ("actions", "obs/ee_states", "obs/gripper_states")


@dataclass
class Config(PlannerConfig):
    action_demos: int | None = flag(None, "demonstrations with actions per task", minimum=1)
    show: bool = False                  # no flag: there is nothing to draw
    PRESETS = {"tiny": dict(demos=2, action_demos=2, steps=5, size=64, batch=4, lr=1e-3, width=32,
                            blocks=(1, 1, 1), channels=16),
               "laptop": dict(demos=20, action_demos=10, steps=3000, size=96, batch=32, lr=1e-3),
               "paper": dict(demos=50, action_demos=10, steps=10000, size=128, batch=128, lr=5e-4,
                             blocks=(2, 2, 2, 2), channels=64)}


class InverseDynamics(nn.Module):
    """Action and robot state at a picture, from it and from pictures that come after."""
    kind = "vpt"

    def __init__(self, config, labels):
        """labels (frames, A + S): what is predicted, actions, then states."""
        super().__init__()
        self.config, D = config, config.width
        self.encoders = nn.ModuleList(networks.ImageEncoder(D, config.blocks, config.channels)
                                      for _ in CAMERAS)
        n = len(CAMERAS) * len(TIMES) * self.encoders[0].cells(config.size) ** 2
        self.head = nn.Sequential(nn.LayerNorm(n * D), nn.Linear(n * D, 256), nn.GELU(),
                                  nn.Linear(256, labels.shape[1]))
        self.register_buffer("mean", torch.as_tensor(labels.mean(0)))
        self.register_buffer("std", torch.as_tensor(labels.std(0).clip(1e-3)))

    def forward(self, x):
        """Each camera's encoded pictures [(B, K, D, h, w)] -> actions and states (B, A + S)."""
        return self.head(torch.stack(x, 1).flatten(1))                  # standardised

    def loss(self, batch):
        """batch: pictures (B, V, K, H, W, 3) uint8, label (B, A + S) -> MSE, parts."""
        size, views = batch["pictures"].shape[:3:2], batch["pictures"].unbind(1)
        # one shift for a sample's pictures: what moves between them is what is asked for
        predicted = self([encode(networks.shift_together(x)[0].flatten(0, 1)).unflatten(0, size)
                          for encode, x in zip(self.encoders, views)])
        loss = F.mse_loss(predicted.float(), (batch["label"] - self.mean) / self.std)
        return loss, {"inverse": loss.item()}

    @torch.no_grad()
    def label(self, views):
        """An episode's pictures (T, H, W, 3) of each camera -> actions and states (T, A + S)."""
        T, device = len(views[0]), self.mean.device
        at = (np.arange(T)[:, None] + TIMES).clip(max=T - 1)            # (T, K)
        parts = [torch.tensor(x, device=device).tensor_split(-(-T // 64)) for x in views]
        predicted = self([torch.cat([*map(encode, few)])[at]
                          for encode, few in zip(self.encoders, parts)])
        return (predicted * self.std + self.mean).cpu().numpy()


def make_batch(demos, step, config):
    """A step's pictures of demonstrations (Episodes), actions and states, see loss."""
    episode, t, _ = demos.sample_frames(step, config.batch, config.seed)
    pictures = [demos.gather(k, episode[:, None], t[:, None] + TIMES) for k in PICTURES]
    return {"pictures": np.stack(pictures, 1),
            "label": np.concatenate([demos.gather(k, episode, t) for k in LABELS], 1)}


def main(argv=None):
    """Command line: trains the inverse dynamics model; copies the data files with predicted actions
    and states in place of their own."""
    from demos.record import load_videos
    config = parse(Config, "VPT: actions for all videos from a few demonstrations.", argv)
    path = training.run_path(config, "vpt")
    target = Path(config.data) / f"{path.parent.name}_vpt{config.action_demos}"
    if target.exists():
        fail(f"{target} exists: delete it, or choose another --data folder")
    videos, _, _ = load_videos(config)
    demos = Episodes(config.data, videos.suite, videos.tasks, config.action_demos)
    labels = np.concatenate([np.concatenate(demos.arrays[key]) for key in LABELS], 1)
    torch.manual_seed(config.seed)
    model = training.fit(InverseDynamics(config, labels),
                         lambda step: make_batch(demos, step, config), config, path)
    target.mkdir()
    for task in videos.tasks:
        part = target / f"{task}.tmp"
        shutil.copy(target.with_name(videos.suite) / f"{task}.hdf5", part)
        with h5py.File(part, "r+") as f:
            for demo in f["data"].values():
                found = model.label([demo[k][:] for k in PICTURES])     # (T, A + S)
                for key in LABELS:
                    demo[key][:], found = np.split(found, [demo[key].shape[1]], 1)
            f["data"].attrs["source"] = "vpt"
        os.replace(part, part.with_suffix(".hdf5"))
    print(f"next: python executor.py --planner none --suite {target.name} --action-demos "
          f"{config.demos}")


if __name__ == "__main__":
    main()
