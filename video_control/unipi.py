"""UniPi (ATM's appendix A-B): imagine the video of the task being done, then follow its pictures.

    python -m video_control.unipi --planner runs/mt10/video.pt  # the inverse dynamics model
    python -m video_control.unipi runs/mt10/video_unipi.pt      # evaluated: a video per episode
    python -m video_control.unipi runs/mt10/video_unipi.pt --replan 8       # UniPi-Replan

An inverse dynamics model pi(action, done | observation, picture to reach) learns from a few
action-labelled demonstrations; when it predicts done, the next picture of the imagined video is the
one to reach.  The network is the executor on cloning, that picture in the goal picture's place.
differs: the video model, too, is conditioned on the goal picture unless it is of --goal language.

Sizes: B batch, T looks, F future pictures, H W pixels.
"""

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import rollout
from baselines.cloning import Cloning
from core import training
from core.flags import flag, parse
from executor import ActionData, Config, Executor, Policy, prepare

# Steps to a picture to reach, at most: ATM's t_max; ours: libero_90 as the other long ones
FAR, FURTHER = 16, dict.fromkeys(("libero_goal", "libero_10", "libero_90"), 50)
NEXT = 0.1      # share of the samples in which it is the next
SURE = 0.5      # probability of done at which the next picture is the one to reach


@dataclass
class Rollout(rollout.Config):
    replan: int = flag(0, "steps after which a new video is imagined; 0: never", minimum=0)


class InverseDynamics(Executor):
    """pi(action, done | observation, picture to reach), beside the video planner to follow."""
    kind, made_by = "unipi", "python -m video_control.unipi --planner runs/<suite>/video.pt"

    def __init__(self, config, video):
        super().__init__(config, Cloning(Cloning.Config(
            size=config.size, width=config.width, blocks=config.blocks, channels=config.channels)))
        self.video = video.requires_grad_(False)
        self.done = nn.Linear(self.waypoint[0].in_features, 1)

    def train(self, mode=True):
        super().train(mode)
        self.video.eval()
        return self

    def act(self, *inputs):
        """As Executor's, keeping the features for the done head."""
        self.features, *rest = super().act(*inputs)
        return self.features, *rest

    def loss(self, batch):
        """batch: as Executor's, goal (B, T, H, W, 3) the picture to reach, arrived (B, T) bool
        -> MSE of actions and waypoint, cross-entropy of done; parts."""
        loss, parts = super().loss(batch)
        logit = self.done(self.features)[..., 0].float()                    # (B, T)
        # differs: cross-entropy, weighted by 0.1, where ATM has a squared error of done, too
        done = F.binary_cross_entropy_with_logits(logit, batch["arrived"].float())
        return loss + 0.1 * done, parts | {"done": done.item()}


class SubgoalData(ActionData):
    """Cloning's batches with a later frame of the same demonstration in the goal's place."""

    def __call__(self, step):
        c, demos, rng = self.c, self.demos, np.random.default_rng([self.c.seed, step, 1])
        episode, t, _ = demos.sample_frames(step, c.batch, c.seed)          # the batch's own
        # differs: reached within one look, as the policy looks every few steps only; ATM: one step
        far = FURTHER.get(c.env, FAR)
        span = np.where(rng.random(c.batch) < NEXT, self.execute, far)
        then = np.minimum(t + rng.integers(1, span + 1), demos.length[episode] - 1)     # (B,)
        goal = demos.gather("obs/agentview_rgb", episode, then)             # (B, H, W, 3)
        return super().__call__(step) | {"goal": goal[:, None],
                                         "arrived": (then - t <= self.execute)[:, None]}


class UniPi(Policy):
    """The closed loop of `Policy` from picture to picture of imagined videos; replan: steps after
    which a new one is imagined, 0: never.  differs: UniPi-Replan imagines the rest of the task, as
    UniPi does, but anew; ATM trains another video model, one picture, 8 steps ahead."""

    def __init__(self, model, replan):
        super().__init__(model)
        self.replan = replan

    def reset(self, sim, scene):
        super().reset(sim, scene)
        self.video, self.age, self.seed = [], 0, 0

    def observe(self, frame):
        """As Policy's, with the picture to reach in the goal picture's place: the next one of the
        video if at the last look the present one was predicted to be reached, done."""
        obs, model = super().observe(frame), self.executor
        self.age += self.execute
        if len(self.video) > 1 and model.done(model.features)[0, -1, 0].sigmoid() > SURE:
            self.video.pop(0)
        if not self.video or self.replan and self.age >= self.replan:
            generator = torch.Generator().manual_seed(self.seed)
            self.video = list(model.video.imagine(obs, generator)[0])       # F of (H, W, 3)
            self.age, self.seed = 0, self.seed + 1
        return obs | {"goal": self.video[0][None]}


def evaluate(argv):
    """Command line: success rates of inverse dynamics models, a JSON each."""
    config = parse(Rollout, "UniPi: follow the pictures of imagined videos.", argv)
    jobs = rollout.executor_jobs(config, InverseDynamics, partial(UniPi, replan=config.replan))
    for _, about, *_ in jobs:
        name = "unipi-replan" if config.replan else "unipi"
        about["plan"] = name + about["plan"].removeprefix("video")
    rollout.run(config, jobs)


def main(argv=None):
    """Command line: trains an inverse dynamics model; given checkpoints, evaluates them instead."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        return evaluate(argv)
    config = parse(Config, "UniPi: learn to reach the pictures of imagined videos.", argv)
    config.history = 1      # as the model's: earlier looks had other pictures to reach
    training.load(config.planner, "video", "python video_planner.py --suite mt10")
    model, demos, videos, path = prepare(config, InverseDynamics)
    data = SubgoalData(config, model, demos, videos)
    note = f"{config.action_demos} action demonstrations per task, {len(demos)} frames"
    training.fit(model, data, config, path, note=note)
    print(f"next: python -m video_control.unipi {path}")


if __name__ == "__main__":
    main()
