"""VPT (ATM, section V-A): actions predicted for all videos, from which a clone then learns.

    python -m baselines.vpt --suite libero_spatial --action-demos 2     # writes libero_spatial_vpt2
    python executor.py --planner none --suite libero_spatial_vpt2 --action-demos 20

An inverse dynamics model, which sees what comes after, learns from the few action demonstrations
and labels all videos. The labelled suite is rolled out and tabled as its parent.

Sizes: B batch, V cameras, K pictures that the model sees, F frames, n tokens per picture, D width,
A action and S state numbers, H W pixels.
"""

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
from core.flags import PlannerConfig, flag, parse, run_path

# ours: steps at which the model looks: what moves in two steps is what is done now, and fingers
# follow their command within eight
TIMES = (0, 2, 8)
PICTURES = [f"obs/{camera}_rgb" for camera in CAMERAS]
# the state too, as a video without actions has none
LABELS = ("actions", "obs/ee_states", "obs/gripper_states")


@dataclass
class Config(PlannerConfig):
    action_demos: int | None = flag(None, "action-labelled demonstrations per task (the first of "
                                    "the videos)", minimum=1)

    PRESETS = {"tiny": dict(demos=2, action_demos=2, steps=5, size=64, batch=4, lr=1e-3, width=32,
                            blocks=(1, 1, 1), channels=16),
               "laptop": dict(demos=20, action_demos=10, steps=3000, size=96, batch=32, lr=1e-3,
                              width=128, blocks=(1, 1, 1), channels=32),
               "paper": dict(demos=50, action_demos=10, steps=10000, size=128, batch=128, lr=5e-4,
                             width=128, blocks=(2, 2, 2, 2), channels=64)}


class InverseDynamics(nn.Module):
    """Action and robot state at a picture, from it and from pictures that come after."""
    kind = "vpt"

    def __init__(self, config, mean, std):
        """mean, std (A + S,) of what is predicted: actions, then states."""
        super().__init__()
        self.config, D = config, config.width
        self.encoders = nn.ModuleList(networks.ImageEncoder(D, config.blocks, config.channels)
                                      for _ in CAMERAS)
        n = len(CAMERAS) * len(TIMES) * self.encoders[0].cells(config.size) ** 2
        self.head = nn.Sequential(nn.LayerNorm(n * D), nn.Linear(n * D, 256), nn.GELU(),
                                  nn.Linear(256, len(mean)))
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))

    def encode(self, view, images):
        """(F, H, W, 3) uint8 of camera 0 or 1 -> (F, n D)."""
        return self.encoders[view](images).flatten(1)

    def forward(self, x):
        """Encoded pictures (B, V, K, n D) -> actions and states (B, A + S), standardised."""
        return self.head(x.flatten(1))

    def loss(self, batch):
        """batch: pictures (B, V, K, H, W, 3) uint8, label (B, A + S) -> MSE, parts."""
        B, _, K = batch["pictures"].shape[:3]
        x = [self.encode(view, networks.random_shift(batch["pictures"][:, view].flatten(0, 1))[0])
             for view in range(len(CAMERAS))]
        predicted = self(torch.stack([y.unflatten(0, (B, K)) for y in x], 1))
        loss = F.mse_loss(predicted.float(), (batch["label"] - self.mean) / self.std)
        return loss, {"inverse": loss.item()}

    @torch.no_grad()
    def label(self, views, size=64):
        """An episode's pictures (F, H, W, 3) of each camera -> actions and states (F, A + S)."""
        device, at = self.mean.device, np.arange(len(views[0]))[:, None] + TIMES
        at = at.clip(max=len(views[0]) - 1)
        x = [torch.cat([self.encode(view, torch.tensor(part, device=device)) for part in
                        np.array_split(pictures, -(-len(pictures) // size))])
             for view, pictures in enumerate(views)]
        predicted = self(torch.stack([y[at] for y in x], 1))            # (F, A + S)
        return (predicted * self.std + self.mean).cpu().numpy()


def make_batch(demos, labels, step, config):
    """Pictures of demonstrations (Episodes) and their `labels` (frames, A + S), see loss."""
    episode, t, _ = demos.sample_frames(step, config.batch, config.seed)
    pictures = [demos.gather(k, episode[:, None], t[:, None] + TIMES) for k in PICTURES]
    return {"pictures": np.stack(pictures, 1), "label": labels[demos.start[episode] + t]}


def write_labelled(source, target, model, widths):
    """A copy of the task's data file with predicted actions and states in place of its own."""
    import os
    import shutil
    target.parent.mkdir(parents=True, exist_ok=True)
    tmp = target.with_suffix(".tmp")
    shutil.copy(source, tmp)
    with h5py.File(tmp, "r+") as f:
        for name, demo in f["data"].items():
            parts = np.split(model.label([demo[k][:] for k in PICTURES]), widths, 1)
            for key, value in zip(LABELS, parts):
                demo[key][:] = value
        f["data"].attrs["source"] = "vpt"
    os.replace(tmp, target)


def main(argv=None):
    """Command line: trains the inverse dynamics model, labels all videos."""
    from demos.record import load_videos
    config = parse(Config, "VPT: actions for all videos from a few demonstrations.", argv)
    path = run_path(config, f"vpt{config.action_demos}")
    videos, _, _ = load_videos(config)
    target = Path(config.data) / f"{videos.suite}_vpt{config.action_demos}"
    if target.exists():
        fail(f"{target} exists: delete it, or choose another --data folder")
    demos = Episodes(config.data, videos.suite, videos.tasks, config.action_demos)
    labels = [np.concatenate(demos.arrays[name]) for name in LABELS]
    widths, labels = np.cumsum([x.shape[1] for x in labels])[:-1], np.concatenate(labels, 1)
    torch.manual_seed(config.seed)
    model = InverseDynamics(config, labels.mean(0), labels.std(0).clip(1e-3))
    model = training.fit(model, lambda step: make_batch(demos, labels, step, config), config, path)
    for task in videos.tasks:
        write_labelled(Path(config.data) / videos.suite / f"{task}.hdf5", target / f"{task}.hdf5",
                       model, widths)
    print(f"next: python executor.py --planner none --suite {target.name} --action-demos "
          f"{config.demos}")


if __name__ == "__main__":
    main()
