"""UniPi (ATM's appendix A-B): imagine the video of the task being done, then follow its pictures.

    python video_planner.py --suite mt10                        # first the video planner
    python unipi.py --planner runs/mt10/video.pt
    python rollout.py runs/mt10/unipi_executor.pt               # open loop: one video per episode
    python rollout.py runs/mt10/unipi_executor.pt --replan 40   # UniPi-Replan: one every 40

A goal-conditioned inverse dynamics model pi(action, done | observation, picture to reach) learns
from the few action-labelled demonstrations; when it says done, the next picture of the imagined
video is the one to reach.  The network is cloning's (`policy.py`), with the picture to reach in the
goal picture's place.

Sizes: B batch, F pictures to come, H W pixels.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import executor
import video_planner
from core import training
from core.files import fail
from core.flags import as_dict, from_dict, parse

FAR = 16        # steps to a picture to reach, at most: about the distance in imagined videos
NEXT = 0.1      # share of the samples in which it is reached
SURE = 0.5      # probability of done at which the next picture is the one to reach


class InverseDynamics(executor.Executor):
    """pi(action, done | observation, picture to reach), beside the video planner to follow."""
    kind = "inverse_dynamics"

    def __init__(self, config, extra):
        """extra  as for Executor, and video: what the video planner's checkpoint says about it."""
        super().__init__(config, extra)
        self.done = nn.Linear(config.width, 1)
        self.video = executor.make_planner(extra["video"]).requires_grad_(False)
        self.told = self.video.config.goal

    def train(self, mode=True):
        super().train(mode)
        self.video.eval()
        return self

    def listen(self, batch):
        """As Executor's; keeps what it says for `done`."""
        said = super().listen(batch)
        self.said = said[0]
        return said

    def loss(self, batch):
        """batch: as Executor's of cloning, goal (B, T, H, W, 3): the picture to reach, arrived
        (B, T) bool -> MSE of actions and waypoint, cross-entropy of done; parts."""
        loss, parts = super().loss(batch)
        logit = self.done(self.said)[..., 0].float()                        # (B, T)
        # differs: cross-entropy, where ATM's text has a squared error of done, too
        done = F.binary_cross_entropy_with_logits(logit, batch["arrived"].float())
        return loss + 0.1 * done, parts | {"done": done.item()}


class SubgoalData(executor.ActionData):
    """Cloning's batches with a later frame of the same demonstration in the goal's place.

    Tried: frames made small and enlarged as imagined ones are.  On mt10 with ten demonstrations 40
    instead of 48 of 100, one run each, intervals overlapping: no gain to keep it for.
    """

    def __call__(self, step):
        batch, c = super().__call__(step), self.c
        episode, t, _ = self.demos.draw(step, c.batch, c.seed)              # the batch's own
        generator = torch.Generator().manual_seed((c.seed << 32) + step)
        near = torch.rand(c.batch, generator=generator) < NEXT
        # differs: reached within one look, as the policy looks every few steps only; ATM: one step
        span = torch.where(near, c.execute, FAR)
        ahead = 1 + (torch.rand(c.batch, generator=generator) * span).long()    # (B,) 1..FAR
        then = np.minimum(t + ahead.numpy(), self.demos.length[episode] - 1)
        goal = self.demos.gather("obs/agentview_rgb", episode, then)
        past = np.maximum(t[:, None] + c.execute * np.arange(1 - c.history, 1), 0)  # (B, T)
        batch["goal"] = goal[:, None].repeat(c.history, 1)
        batch["arrived"] = then[:, None] - past <= c.execute
        return batch


class UniPi(executor.Policy):
    """The closed loop of `Policy` from picture to picture of imagined videos; replan: steps after
    which a new one is imagined, 0: never."""

    def __init__(self, model, replan=0):
        super().__init__(model)
        self.replan = replan

    def reset(self, goal, task=0):
        super().reset(goal, task)
        self.task_said, self.video, self.step, self.seed = self.goal, [], 0, 0

    @torch.no_grad()
    def imagine(self, picture):
        """picture (H, W, 3) uint8 -> the pictures to reach, a list of F (H, W, 3)."""
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        now = torch.as_tensor(picture, device=self.device)[None]
        return list(self.executor.video.imagine(now, self.task_said[None], generator)[0])

    @torch.no_grad()
    def __call__(self, frame):
        if self.wants_frame:
            if not self.video or (self.replan and self.step >= self.replan):
                self.video, self.step = self.imagine(frame["agentview_rgb"]), 0
            self.goal = self.video[0]
            for look in self.looks:
                look["goal"] = self.goal[None]
        action = super().__call__(frame)
        if len(self.queue) == min(self.c.execute, self.c.chunk) - 1:        # it has just looked
            done = self.executor.done(self.executor.said)[0, -1, 0].sigmoid()
            if done > SURE and len(self.video) > 1:     # this chunk still goes to the old picture
                self.video.pop(0)
        self.step += 1
        return action


def load_policy(path, device="cpu", replan=0):
    """A trained executor or inverse dynamics model as a closed loop."""
    content = training.load(path, KINDS, "python executor.py --planner runs/<suite>/mask.pt")
    if content["kind"] == executor.Executor.kind:
        return executor.Policy(executor.load_executor(path, device))
    model = InverseDynamics(from_dict(executor.Config, content["config"]), content["extra"])
    model.load_state_dict(content["model"])
    return UniPi(model.to(device).eval().requires_grad_(False), replan)


KINDS = (executor.Executor.kind, InverseDynamics.kind)


def main(argv=None):
    """Command line: trains the inverse dynamics model of one video planner."""
    config = parse(executor.Config, "UniPi: learn to reach the pictures of imagined videos.",
                        argv)
    if config.goal or config.encoder != "own" or config.labels != "true":
        fail("--goal, --encoder and --labels are for executor.py --planner none")
    if not config.planner or config.planner == "none":
        fail("no --planner: give a video planner (python video_planner.py makes "
                  "runs/<suite>/video.pt)")
    video = video_planner.load_planner(config.planner, config.device)
    about = {"kind": video.kind, "config": as_dict(video.config), "arguments": video.arguments}
    seconds = training.last_seconds(config.planner)
    config.suite, config.demos = video.config.suite, video.config.demos
    config.tasks, config.planner = config.tasks or video.config.tasks, "none"
    clone, data, path = executor.build(config)
    torch.manual_seed(config.seed)
    extra = clone.extra | {"video": about, "plan": "unipi",
                           "seconds": clone.extra["seconds"] | {"planner": seconds}}
    model = InverseDynamics(config, extra).to(config.device)
    model.load_state_dict(clone.state_dict(), strict=False)
    model.video.load_state_dict(video.state_dict())
    path = path.with_name(path.name.replace("none", "unipi", 1))
    data = SubgoalData(config, model, data.demos, data.videos)
    note = f"UniPi, {config.action_demos} action demonstrations per task, {len(data.demos)} frames"
    training.fit(model, data, config, path, note=note, extra=model.extra)
    print(f"next: python rollout.py {path}")


if __name__ == "__main__":
    main()
