"""PLEX as Mask2Act compares it (section 4.1): the plan predicts the features of future pictures.

    python -m baselines.plex --suite mt10               # makes the data first if there is none
    python -m baselines.plex --suite mt10 --show        # the plan, as the most similar pictures

The network P of mask_planner.py, without masks.  PLEX stops its loss's gradient at the target and
at the inputs, so the encoder learns from something else: to predict the actions between two
pictures of demonstrations.  To be fair, give its executor no fewer --action-demos than this has.

Sizes as in mask_planner.py; C actions of A numbers, H W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import mask_planner
from core import networks, training
from core.episodes import Episodes, look_times
from core.files import fail
from core.flags import PlannerConfig, flag, parse
from core.planners import load_planner
from mask_planner import HORIZONS, K

BETWEEN = 8     # C, control steps between the two pictures of the inverse dynamics
PICTURE = "obs/agentview_rgb"


@dataclass
class Config(PlannerConfig):
    action_demos: int | None = flag(None, "demonstrations with actions per task", minimum=1)
    PRESETS = {name: values | dict(action_demos=min(10, values["demos"]))
               for name, values in mask_planner.Config.PRESETS.items()}


def standard(x):
    """Features (..., D), each token's with mean 0 and variance 1."""
    return F.layer_norm(x.float(), x.shape[-1:])


class FeaturePlanner(mask_planner.Planner):
    """P, a head for the features to come, and the inverse dynamics by which its encoder learns."""
    kind, Config = "feature", Config

    def __init__(self, config):
        super().__init__(config)
        self.future = nn.Linear(self.width, K * self.width)
        self.thin = nn.Linear(self.width, 16)
        self.inverse = networks.mlp(2 * self.n * 16, BETWEEN * config.A)

    def predict(self, plan):
        """Plan (B, n, D) -> estimates of the pictures' features to come, standard (B, K, n, D)."""
        # differs: all horizons at once; PLEX predicts the next step's
        return self.future(plan).unflatten(-1, (K, -1)).transpose(1, 2)

    def actions(self, pair):
        """Pictures (B, 2, H, W, 3) uint8, BETWEEN steps apart -> the actions between (B, C, A)."""
        x = self.thin(self.encode(pair)).flatten(1)  # (B, 2 n 16)
        return self.inverse(F.gelu(x)).unflatten(1, (BETWEEN, -1))

    def loss(self, batch):
        """batch: frames (B, T, H, W, 3), future (B, K, H, W, 3), goal (B, H, W, 3) uint8; of the
        demonstrations pair (B', 2, H, W, 3) uint8, action (B', C, A) -> scalar, parts."""
        seen = torch.cat([batch["goal"][:, None], batch["frames"], batch["future"]], 1)
        with torch.no_grad():  # PLEX: neither inputs nor target teach the encoder
            x = self.encode(seen)  # (B, 1 + T + K, n, D)
        plan = self.plan_from(x[:, :-K])[:, -1]  # (B, n, D)
        # differs: features of unit variance; else a small change of all of them is a small loss
        future = F.mse_loss(self.predict(plan).float(), standard(x[:, -K:]))
        # differs: at once, with a head of its own; PLEX trains encoder and executor first, and
        # Mask2Act, whose stage 1 has no actions, does not say what trains the encoder
        inverse = F.mse_loss(self.actions(batch["pair"]).float(), batch["action"])
        return future + inverse, {"future": future.item(), "inverse": inverse.item()}

    def draw(self, obs):
        return []  # features are nothing to look at


def make_batch(episodes, step, config, seed, demos=None):
    """A dict of arrays: a step's frames, goals and frames to come, and of demonstrations, Episodes,
    half as many pairs of pictures and the actions between (see FeaturePlanner.loss)."""
    episode, t, rng = episodes.sample_frames(step, config.batch, seed)
    past, ahead = look_times(t, config.history, config.stride), np.add.outer(t, HORIZONS)
    batch = {"frames": episodes.gather(PICTURE, episode[:, None], past),        # (B, T, H, W, 3)
             "future": episodes.gather(PICTURE, episode[:, None], ahead),       # (B, K, H, W, 3)
             "goal": episodes.last_frames(episodes.goal_of(episode, rng))}
    if demos:
        episode, t, _ = demos.sample_frames(step, config.batch // 2, config.seed + 1)
        t = np.minimum(t, demos.length[episode] - 1 - BETWEEN).clip(0)     # pairs end in it
        times = np.add.outer(t, np.arange(1 + BETWEEN))
        batch["pair"] = demos.gather(PICTURE, episode[:, None], times[:, [0, BETWEEN]])
        batch["action"] = demos.gather("actions", episode[:, None], times[:, :BETWEEN])
    return batch


@torch.no_grad()
def validate(planner, episodes):
    """Mean squared error of the predicted features, of unit variance, on held-out episodes, beside
    the present picture's -> lines of text."""
    config, errors = planner.eval().config, []
    for step in range(-(-300 // config.batch)):
        batch = training.tensors(make_batch(episodes, step, config, 1), planner)
        target = standard(planner.encode(batch["future"]))  # (B, K, n, D)
        plan = planner.predict(planner(batch["frames"], batch["goal"])[:, -1])  # (B, K, n, D)
        stay = standard(planner.encode(batch["frames"][:, -1:]))  # (B, 1, n, D)
        error = torch.stack([plan, stay.expand_as(plan)]) - target  # (2, B, K, n, D)
        errors.append(error.square().mean((1, 3, 4)).cpu().numpy())  # (2, K)
    lines = ["held-out error of features" + "".join(f"{f'+{k}':>7s}" for k in HORIZONS)]
    return "\n".join(lines + [f"  {name:24s}" + "".join(f"{x:7.3f}" for x in row)
                              for name, row in zip(("plan", "stay"), np.mean(errors, 0))])


@torch.no_grad()
def show(planner, episodes):
    """For every horizon the picture, among 400 others, whose features are most like the predicted
    ones, beside the true one -> (., ., 3) uint8."""
    others = episodes.gather(PICTURE, *episodes.sample_frames(1, 400, seed=3)[:2])  # (400, H, W, 3)
    batch = {k: v[:6] for k, v in make_batch(episodes, 0, planner.config, seed=3).items()}
    tensor = training.tensors(batch | {"others": others}, planner)
    known = standard(planner.encode(tensor["others"]))  # (400, n, D)
    plan = planner.predict(planner(tensor["frames"], tensor["goal"])[:, -1])  # (6, K, n, D)
    off = torch.stack([(known - x).square().mean((1, 2)) for x in plan.flatten(0, 1)])  # (6 K, 400)
    nearest = others[off.argmin(1).cpu().numpy()].reshape(batch["future"].shape)
    return mask_planner.sheet(batch["goal"], batch["frames"][:, -1], nearest, batch["future"])


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    from demos.record import load_videos
    config = parse(Config, "PLEX: learn from video what the future pictures' features are.", argv)
    path = training.run_path(config, "feature")
    planner = load_planner(path, config.device) if config.show else None
    videos, held_out, note = load_videos(config)
    picture = lambda trained: show(trained, held_out)
    if not planner:
        demos = Episodes(config.data, held_out.suite, held_out.tasks, config.action_demos)
        if not demos.arrays["actions"]:
            fail(f"the videos of {held_out.suite} have no actions, of which PLEX learns some: give "
                 "a simulator's suite first")
        config.A = demos.arrays["actions"][0].shape[1]
        torch.manual_seed(config.seed)
        batches = lambda step: make_batch(videos, step, config, config.seed, demos)
        planner = training.fit(FeaturePlanner(config), batches, config, path, picture, note)
    training.report(config, path, validate(planner, held_out), lambda: picture(planner))


if __name__ == "__main__":
    main()
