"""What cloning is compared with, beside plans: R3M's encoder and VPT's labels (ATM, section V-A).

    python executor.py --planner none --goal language                    # ATM's BC
    python executor.py --planner none --encoder r3m --weights r3m_18.pt  # R3M, fine-tuned
    python executor.py --planner none --labels vpt                       # VPT

R3M: the clone's image encoders start from R3M's published ResNet and are trained on with it.
VPT: a model that sees what comes after, trained on the action demonstrations, says what was done in
all videos; the clone learns from that.

Sizes: B batch, K pictures that the inverse dynamics model sees, F frames, n tokens per picture, D
width, H W pixels.
"""

import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training

# ours: steps at which the inverse dynamics model looks: what moves in two steps is what is done
# now, and fingers follow their command within eight
TIMES = (0, 2, 8)
PICTURES = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")


# --- VPT ------------------------------------------------------------------------------------------

class InverseDynamics(nn.Module):
    """What was done in a picture, and the robot's state, from it and from what came after.

    The state too, as a video without actions has none: the clone's own comes from here.
    """
    kind = "vpt_inverse_dynamics"

    def __init__(self, config, size, mean, std):
        """mean, std (A + S,) of what it says: actions, then states."""
        super().__init__()
        self.config, D = config, config.width
        encoder = lambda: networks.ImageEncoder(D, config.blocks, config.channels)
        self.encoders = nn.ModuleList(encoder() for _ in PICTURES)
        n = self.encoders[0].cells(size) ** 2
        self.head = nn.Sequential(nn.LayerNorm(2 * len(TIMES) * n * D),
                                  nn.Linear(2 * len(TIMES) * n * D, 256), nn.GELU(),
                                  nn.Linear(256, len(mean)))
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("std", torch.as_tensor(std))

    def see(self, view, images):
        """(F, H, W, 3) uint8 of a camera, 0 or 1 -> (F, n D)."""
        return self.encoders[view](images).flatten(1)

    def forward(self, seen):
        """seen (B, 2, K, n D) -> (B, A + S), standardised."""
        return self.head(seen.flatten(1))

    def loss(self, batch):
        """batch: pictures (B, 2, K, H, W, 3) uint8, said (B, A + S) -> MSE, parts."""
        B, _, K = batch["pictures"].shape[:3]
        seen = [self.see(view, networks.random_shift(batch["pictures"][:, view].flatten(0, 1))[0])
                for view in range(2)]
        said = self(torch.stack([x.unflatten(0, (B, K)) for x in seen], 1))
        loss = F.mse_loss(said.float(), (batch["said"] - self.mean) / self.std)
        return loss, {"inverse": loss.item()}

    @torch.no_grad()
    def label(self, views, size=64):
        """views: pictures (F, H, W, 3) of an episode in each camera -> (F, A + S)."""
        device, at = self.mean.device, np.arange(len(views[0]))[:, None] + TIMES
        at = at.clip(max=len(views[0]) - 1)
        seen = [torch.cat([self.see(view, torch.tensor(part, device=device)) for part in
                           np.array_split(pictures, -(-len(pictures) // size))])
                for view, pictures in enumerate(views)]
        said = self(torch.stack([x[at] for x in seen], 1))  # (F, A + S)
        return (said * self.std + self.mean).cpu().numpy()


def vpt(demos, videos, config, path, keys):
    """VPT: trains the inverse dynamics model on `demos` (Episodes; its checkpoint is `path`) -> the
    videos with its actions in place of theirs, and its states, of `keys`."""
    names = ("actions", *keys)
    everything = [np.concatenate(demos.arrays[name]) for name in names]
    widths = np.cumsum([x.shape[1] for x in everything])[:-1]
    everything = np.concatenate(everything, 1)

    def batch(step):
        episode, t, _ = demos.draw(step, config.batch, config.seed)
        pictures = [demos.gather(k, episode[:, None], t[:, None] + TIMES) for k in PICTURES]
        return {"pictures": np.stack(pictures, 1), "said": everything[demos.start[episode] + t]}

    torch.manual_seed(config.seed)
    model = InverseDynamics(config, demos.size, everything.mean(0), everything.std(0).clip(1e-3))
    model = training.fit(model, batch, config, path, note="VPT's inverse dynamics")
    labelled = copy.copy(videos)
    labelled.arrays = videos.arrays | {name: [] for name in names}
    for pair in zip(*(videos.arrays[k] for k in PICTURES)):
        for name, value in zip(names, np.split(model.label(pair), widths, 1)):
            labelled.arrays[name].append(value)
    return labelled
