"""Mask2Act stage 2 (section 3.3): from plans and a few action-labelled demonstrations to actions.

    python executor.py --planner runs/libero_spatial/mask.pt                          # the paper: latent plan
    python executor.py --planner runs/libero_spatial/mask.pt --plan-form explicit     # ours: the plan in numbers
    python executor.py --planner none --suite libero_spatial                          # behavioural cloning

The executor E (eq. 4) sees the last h steps of third-person picture (through the frozen planner's encoder), wrist
picture (through its own), robot state and plan, and says the next actions.  Frozen outputs are computed once.

Measured at the laptop preset on libero_spatial, 3,000 steps on one CPU core: explicit 0.8 minutes, latent 2.3, cloning
5.4; success with ten demonstrations per task 86, 74 and 64 %, with two 47, 35 and 27 % (README has the intervals).

Sizes: B batch, T steps of history, n tokens per picture, D width, C actions per chunk, G goals per frame.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import core
import extract
import mask_planner
import sims
from core import flag
from places import Places

STATE = ("obs/ee_states", "obs/gripper_states")  # position 3, axis-angle 3, finger positions 2
GOALS = 10  # goal pictures per task that the checkpoint carries for evaluation
FOLLOW = 8  # steps in which the fingers follow a changed command
AIM = 0.005  # metres, noise on the waypoint that the action head hears in training
# metres, noise on the hand's place as the transformer hears it in training, with the explicit plan.  Without it some
# networks go by the few absolute paths they have seen: two demonstrations, second training seed, 19 of 100, with it 51
FEEL = 0.01
NEAR = 0.1  # metres, the unit in which the heads hear and say ways
DRAWS = 3  # goals per training frame for which the frozen planner's plan is cached


@dataclass
class Config:
    planner: str = flag("", "checkpoint of stage 1, or none: behavioural cloning")
    plan_form: str = flag("latent", "latent: the plan tokens (the paper); explicit: where the objects are, in metres",
                          choices=["latent", "explicit"])
    suite: str = flag("libero_spatial", "suite, for --planner none; otherwise the planner's")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: the planner's, or all")
    demos: int | None = flag(None, "videos per task, as for the planner: goal pictures come from them", minimum=1)
    action_demos: int | None = flag(None, "action-labelled demonstrations per task (the first of the videos)", minimum=1)
    steps: int | None = flag(None, "gradient steps", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU", choices=["laptop", "paper"])
    width: int | None = flag(None, "width of the transformer", minimum=8)
    depth: int | None = flag(None, "transformer blocks", minimum=1)
    blocks: tuple[int, ...] | None = flag(None, "residual blocks in each stage of its own image encoders")
    channels: int | None = flag(None, "channels of their first stage, doubled at each next one", minimum=16)
    history: int | None = flag(None, "looks h that the executor remembers", minimum=1)
    blur: float = flag(1.0, "noise on the explicit plan in training, percent of the picture's width", minimum=0)
    # ours: chunks.  In a prototype on one task, executing 1, 4 or 8 of 8 actions solved 5, 7 and 1 of 10 scenes
    chunk: int = flag(8, "actions predicted at once (1: the paper)", minimum=1)
    execute: int = flag(4, "of these, actions executed before the next look", minimum=1)
    dropout: float = flag(0.0, "in the transformer", minimum=0)
    # 46 ms per step with the latent plan on one core, 85 without: the wrist's own encoder is trained in both
    cache: bool = flag(True, "compute the frozen planner's outputs once instead of at every step")
    batch: int | None = flag(None, "samples per step; by default 32 with pictures, 128 without", minimum=1)
    lr: float | None = flag(None, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    # Cloning was tried with others too (two demonstrations, one seed): learning rate 3e-4 14, dropout 0.1 25, as here 20 of 100
    weight_decay, warmup, clip, ema, save_every, log_every = 1e-2, 100, 1.0, 0.0, 500, 100
    PRESETS = {"laptop": dict(demos=20, action_demos=10, steps=3000, width=128, depth=3, blocks=(1, 1, 1), channels=32,
                           history=1, lr=1e-3),
               "paper": dict(demos=50, action_demos=10, steps=30000, width=256, depth=4, blocks=(2, 2, 2, 2),
                          channels=64, history=10, lr=5e-4)}


def plan_name(config):
    """none, mask or mask-explicit, as in results and file names."""
    return "none" if config.planner == "none" else "mask" + "-explicit" * (config.plan_form == "explicit")


# ---------------------------------------------------------------------------------------------- network

class MapToken(nn.Module):
    """A map of features -> one token: spatial-softmax key points, which say where, beside a thin flattened map."""

    def __init__(self, width, n, dim, points=32, channels=8):
        super().__init__()
        self.side = round(n ** 0.5)
        self.norm = nn.LayerNorm(width)
        self.points, self.thin = nn.Linear(width, points), nn.Linear(width, channels)
        self.out = nn.Linear(2 * points + n * channels, dim)

    def forward(self, x):
        """x (..., n, D) -> (..., dim)."""
        x = self.norm(x)
        centre = torch.linspace(-1, 1, self.side, device=x.device)
        grid = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).reshape(-1, 2)  # (n, 2) x, y
        share = self.points(x).softmax(-2)  # (..., n, points)
        where = (share.transpose(-1, -2) @ grid.to(share.dtype)).flatten(-2)  # (..., 2 points)
        return self.out(torch.cat([where, self.thin(x).flatten(-2)], -1))  # (..., dim)


class Executor(nn.Module):
    """E of eq. 4, one network for every plan."""
    kind = "executor"

    def __init__(self, config, extra):
        """extra  what else the checkpoint holds: planner's config or None, suite, tasks, size, render, A, goals per task."""
        super().__init__()
        self.config, self.extra = config, extra
        c, size, D, A = config, extra["size"], config.width, extra["action_dim"]
        self.own_goal = sims.is_metaworld(extra["suite"])  # else the goal picture is of another scene
        if extra["planner"]:
            self.planner = mask_planner.MaskPlanner(core.from_dict(mask_planner.Config, extra["planner"]))
            self.planner.requires_grad_(False)
            W, n = self.planner.config.width, self.planner.n
        else:  # behavioural cloning: the same encoder, trained; the goal picture beside the present one says the task
            self.planner = None
            self.encoder = core.ImageEncoder(D, c.blocks, c.channels)
            W, n = 2 * D, self.encoder.cells(size) ** 2
        self.places = None
        if self.planner and c.plan_form == "explicit":
            # ours: no pictures beside the plan in numbers: they are more to overfit, and nine tenths of the time
            self.places = Places(self.planner.locator.N, self.own_goal, c.blur)
            self.explicit = nn.Sequential(nn.Linear(5 * self.places.M, D), nn.GELU(), nn.Linear(D, D))
            self.goal = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, D))
        else:
            self.image = MapToken(W, n, D)
            self.wrist_encoder = core.ImageEncoder(D, c.blocks, c.channels)
            self.wrist = MapToken(D, self.wrist_encoder.cells(size) ** 2, D)
            self.latent = MapToken(W, n, D) if self.planner else None
        self.state = nn.Linear(8, D)
        self.tokens = 4 if self.places else 5  # goal, or image and wrist; state, plan, action
        self.kinds = nn.Parameter(torch.randn(self.tokens, D) * 0.02)
        self.times = nn.Parameter(torch.randn(c.history, 1, D) * 0.02)
        self.gpt = core.Transformer(D, c.depth, max(4, D // 64), c.dropout)
        mlp = lambda i, o: nn.Sequential(nn.Linear(i, 256), nn.GELU(), nn.Linear(256, o))
        self.reach = mlp(D, 3 + (self.places.M if self.places else 0))
        self.head = mlp(D + 3, c.chunk * A)
        self.register_buffer("mask", core.block_causal_mask(c.history, self.tokens), persistent=False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("std", torch.ones(8))
        self.register_buffer("goals", torch.zeros(len(extra["tasks"]), extra["goals"], size, size, 3, dtype=torch.uint8))

    def train(self, mode=True):
        super().train(mode)
        if self.planner:
            self.planner.eval()  # frozen is more than no gradient
        return self

    @torch.no_grad()
    def features(self, frames, goal):
        """What the frozen planner says.  frames (B, h, H, W, 3) uint8 as it wants them, goal (B, H, W, 3) uint8 ->
        {"image", of the last frame, "plan": (B, n, D)}, or {"numbers": (B, N, 5), "goal_code": (B, D)}."""
        x, fine = self.planner.encode(frames, fine=True)
        return self.features_of(torch.cat([self.planner.encode(goal)[:, None], x], 1), fine[:, -1])

    @torch.no_grad()
    def features_of(self, x, fine):
        """The same from encoded pictures x (B, 1 + h, n, D), the goal first; fine (B, C, h', w') of the last frame."""
        plan = self.planner.plan_from(x)[:, -1]  # (B, n, D)
        if not self.places:
            return {"image": x[:, -1], "plan": plan}
        return {"numbers": self.planner.locator(self.planner.as_map(plan), fine)[:, :, 0], "goal_code": x[:, 0].mean(1)}

    def target(self, goal):
        """Where robot and objects are in goal pictures of this scene, (B, H, W, 3) uint8 -> (B, N, 5), as "numbers"."""
        return self.features(goal[:, None].expand(-1, self.planner.config.history, -1, -1, -1), goal)["numbers"]

    def forward(self, batch):
        """batch: state (B, T, 8) and, in training, waypoint (B, T, 3); for the explicit plan numbers, first and, if the goal
        is of this scene, target (B, T, N, 5), goal_code (B, T, D); else wrist (B, T, H, W, 3) uint8 and image, plan
        (B, T, n, D) or, for cloning, frames, goal (B, T, H, W, 3) uint8
        -> actions (B, T, C, A) in about [-1, 1], waypoint (B, T, 3) in metres."""
        B, T = batch["state"].shape[:2]
        state, heard = batch["state"], None
        if self.places:
            if self.training:  # roughly where the hand is: how far from the waypoint, the head hears exactly
                state = state + F.pad(FEEL * torch.randn_like(state[..., :3]), (0, 5))
            heard = self.places.hear(batch["first"], batch["numbers"], batch.get("target"))  # (B, T, M, 5)
            # ours: the goal picture's mean token; a place in the picture is another height in another task
            tokens, plan = [self.goal(batch["goal_code"])], self.explicit(self.places(heard))  # (B, T, D) each
        else:
            shift = (lambda images: core.random_shift(images)[0]) if self.training else lambda images: images
            encode = lambda net, images: net(shift(images.flatten(0, 1))).flatten(2).transpose(1, 2)  # (B T, n, D)
            if self.planner:
                image, plan = batch["image"], self.latent(batch["plan"])
            else:
                both = torch.cat([batch["frames"], batch["goal"]], 1)  # (B, 2 T, H, W, 3)
                x = encode(self.encoder, both).unflatten(0, (B, 2, T))
                image, plan = torch.cat([x[:, 0], x[:, 1]], -1), torch.zeros(B, T, self.config.width, device=x.device)
            tokens = [self.image(image), self.wrist(encode(self.wrist_encoder, batch["wrist"]).unflatten(0, (B, T)))]
        tokens += [self.state((state - self.mean) / self.std), plan]
        tokens.append(torch.zeros_like(tokens[-1]))  # the action's place
        x = torch.stack(tokens, 2) + self.kinds + self.times[:T]  # (B, T, tokens, D)
        L = T * self.tokens
        x = self.gpt(x.flatten(1, 2), self.mask[:L, :L]).unflatten(1, (T, self.tokens))[:, :, -1]  # (B, T, D)
        # ours: first where to, in metres, then how: an action is clipped at a few centimetres' way and says little about
        # a target further off.  The place is the demonstration's own, where its hand next opens or closes.
        there = self.reach(x).float()  # (B, T, 3 + M)
        there, pointer = there[..., :3] * NEAR + self.mean[:3], there[..., 3:].softmax(-1)  # (B, T, 3) metres, (B, T, M)
        if self.places:  # beside one of the things that the plan names, as seen at the waypoint's height
            there = there + F.pad(self.places.beside(heard, pointer, there[..., 2]) - self.mean[:2], (0, 1))  # (B, T, 3)
        # In training the true one, with noise: a head that hears a poor guess learns to do without it.
        # differs: ATM's late fusion would give the head the plan's numbers again; with two demonstrations it then learns
        # paths by heart and does not go to the waypoint (success 16 of 50; without the numbers 27 of 50)
        aim = batch["waypoint"] + AIM * torch.randn_like(there) if self.training else there
        way = (aim - batch["state"][..., :3]) / NEAR  # (B, T, 3)
        action = self.head(torch.cat([x, way.to(x.dtype)], -1)).unflatten(-1, (self.config.chunk, -1))  # (B, T, C, A)
        return action, there

    def loss(self, batch):
        """batch as for forward (or frames and goal for the planner, if not cached), action (B, T, C, A), and waypoint
        (B, T, 3): the hand's position where it next opens or closes, metres -> MSE of both, parts."""
        if self.planner and "frames" in batch:
            B, T = batch["state"].shape[:2]
            said = self.features(batch["frames"].flatten(0, 1), batch["goal"].flatten(0, 1))
            batch = batch | {k: v.unflatten(0, (B, T)) for k, v in said.items()}
        action, there = self(batch)
        error = F.mse_loss(action.float(), batch["action"], reduction="none")  # (B, T, C, A)
        waypoint = F.mse_loss(there / NEAR, batch["waypoint"] / NEAR)
        parts = {"motion": error[..., :-1].mean().item(), "gripper": error[..., -1].mean().item(), "waypoint": waypoint.item()}
        return error.mean() + 0.3 * waypoint, parts


def waypoints(position, gripper):
    """Where the hand is when its gripper's command next changes, at the end if it does not.  While the fingers still
    follow a change, its own place is the waypoint: whether to close now is often open, where to be then is not.

    position (T, 3) metres, gripper (T,) commands -> (T, 3) metres.
    """
    changes = np.flatnonzero(np.diff(gripper > 0)) + 1
    passed = np.searchsorted(changes + FOLLOW, np.arange(len(gripper)), "right")  # (T,)
    return position[np.append(changes, len(gripper) - 1)[passed]]


# ---------------------------------------------------------------------------------------------- data

class ActionData:
    """Batches for stage 2: frames of the action demonstrations, actions, and goals from the videos."""

    def __init__(self, config, executor, demos, videos):
        self.c, self.executor, self.demos, self.videos = config, executor, demos, videos
        planner = executor.planner
        self.h, self.stride = (planner.config.history, planner.config.stride) if planner else (1, 1)
        state = np.concatenate([demos.gather(k, *self.every()) for k in STATE], -1)  # (frames, 8)
        executor.mean.copy_(torch.from_numpy(state.mean(0)))
        executor.std.copy_(torch.from_numpy(state.std(0).clip(1e-3)))
        position, gripper = demos.gather("obs/ee_states", *self.every())[:, :3], demos.gather("actions", *self.every())[:, -1]
        self.waypoint = np.concatenate([waypoints(position[a:b], gripper[a:b]) for a, b in zip(demos.start, demos.start[1:])])
        cached = planner and (config.cache or executor.places)  # numbers are too few to be worth saving memory
        self.draws = 1 if executor.own_goal else DRAWS
        self.cached = self.compute(f"frozen planner, goals per frame: {self.draws}") if cached else None
        if executor.places:
            target = self.cached["target"].float() if executor.own_goal else None
            executor.places.fit(self.cached["numbers"].float(), target, position, self.waypoint[:, 2].mean())

    def every(self):
        """All frames of the demonstrations: episode (frames,), t (frames,)."""
        episode = np.repeat(np.arange(len(self.demos.length)), self.demos.length)
        return episode, np.arange(len(self.demos)) - self.demos.start[episode]

    def goal_of(self, row, draw):
        """Goal number `draw` (...) of demonstration frame `row` (...): which video ends in it, see Episodes.goal_of."""
        episode = np.searchsorted(self.demos.start, row, "right") - 1
        task = self.demos.task[episode]
        per_task = len(self.videos.length) // len(self.videos.tasks)
        own = episode % (len(self.demos.length) // len(self.demos.tasks))
        if self.executor.own_goal:
            return task * per_task + own
        # a hash of the row: cached and uncached training, and every resumption, see the same goals
        other = (own + 1 + (row * 7919 + draw * 104729) % max(1, per_task - 1)) % per_task
        return task * per_task + other

    def frames(self, row):
        """What the planner sees at demonstration frame `row` (...): frames (..., h, H, W, 3) uint8."""
        episode = np.searchsorted(self.demos.start, row, "right") - 1
        t = (row - self.demos.start[episode])[..., None] + self.stride * np.arange(1 - self.h, 1)
        return self.demos.gather("obs/agentview_rgb", episode[..., None], t)

    def compute(self, what, size=64):
        """The frozen planner's outputs for all frames and their goals -> dict of (draws, frames, ...) float16."""
        device, planner = next(self.executor.parameters()).device, self.executor.planner
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=bool(self.c.bf16))
        rows, out = np.arange(len(self.demos)), [[] for _ in range(self.draws)]
        with torch.no_grad(), autocast:
            last = self.videos.gather("obs/agentview_rgb", np.arange(len(self.videos.length)), self.videos.length - 1)
            parts = [torch.as_tensor(part, device=device) for part in np.array_split(last, -(-len(last) // size))]
            goals = torch.cat([planner.encode(part) for part in parts])  # (videos, n, D)
            if self.executor.places and self.executor.own_goal:
                targets = torch.cat([self.executor.target(part) for part in parts])  # (videos, N, 5)
            for part in tqdm(np.array_split(rows, -(-len(rows) // size)), desc=what, mininterval=5):
                frames, fine = planner.encode(torch.as_tensor(self.frames(part), device=device), fine=True)  # (size, h, ...)
                for draw in range(self.draws):
                    video = torch.as_tensor(self.goal_of(part, draw))  # (size,)
                    said = self.executor.features_of(torch.cat([goals[video][:, None], frames], 1), fine[:, -1])
                    if self.executor.places and self.executor.own_goal:
                        said["target"] = targets[video]
                    out[draw].append({k: v.half().cpu() for k, v in said.items()})
        return {k: torch.stack([torch.cat([piece[k] for piece in pieces]) for pieces in out]) for k in out[0][0]}

    def __call__(self, step):
        """The batch of one training step, a function of (seed, step)."""
        c = self.c
        episode, t, rng = self.demos.draw(step, c.batch, c.seed)
        draw = rng.integers(self.draws, size=len(t))
        past = np.maximum(t[:, None] + c.execute * np.arange(1 - c.history, 1), 0)  # (B, T): the times of the looks
        e = episode[:, None]
        row = self.demos.start[e] + past  # (B, T)
        ahead = past[..., None] + np.arange(c.chunk)  # (B, T, C)
        batch = {"state": np.concatenate([self.demos.gather(k, e, past) for k in STATE], -1),
                 "action": self.demos.gather("actions", e[..., None], ahead), "waypoint": self.waypoint[row]}
        if not self.executor.places:
            batch["wrist"] = self.demos.gather("obs/eye_in_hand_rgb", e, past)
        if self.cached:
            # float16 in memory; the networks expect what autocast or float32 gives
            batch |= {k: v[draw[:, None], row].float() for k, v in self.cached.items()}
            if self.executor.places:
                first = self.cached["numbers"][draw, self.demos.start[episode]].float()  # (B, N, 5)
                batch["first"] = first[:, None].expand_as(batch["numbers"])
            return batch
        frames, goal = self.frames(row), self.goal_of(row, draw[:, None])
        return batch | {"frames": frames if self.executor.planner else frames[:, :, -1],
                        "goal": self.videos.gather("obs/agentview_rgb", goal, self.videos.length[goal] - 1)}


# ---------------------------------------------------------------------------------------------- acting

class Policy:
    """A trained executor as a closed loop: `wants_frame`, then `policy(frame)` -> the next action (A,)."""

    def __init__(self, executor):
        self.executor, self.c = executor.eval(), executor.config
        self.device = next(executor.parameters()).device

    def reset(self, goal):
        """Starts an episode.  goal (H, W, 3) uint8: the goal picture; `executor.goals` (tasks, goals, H, W, 3) are some."""
        self.goal = torch.as_tensor(goal, device=self.device)
        self.looks, self.queue, self.frames, self.first = [], [], [], None

    @property
    def wants_frame(self):
        """Whether the next call looks at its frame; in between, actions of the last chunk are executed."""
        return not self.queue

    @torch.no_grad()
    def __call__(self, frame):
        if self.queue:
            return self.queue.pop(0)
        tensor = lambda x: torch.as_tensor(np.asarray(x), device=self.device)[None]
        state = np.concatenate([frame[k.removeprefix("obs/")] for k in STATE])
        now = {"state": tensor(state)} | ({} if self.executor.places else {"wrist": tensor(frame["eye_in_hand_rgb"])})
        picture = tensor(frame["agentview_rgb"])
        if self.executor.planner:
            # the planner's own history, at its own stride, when this executor looks that often
            h = self.executor.planner.config.history
            self.frames = (self.frames or [picture] * h)[1 - h:] + [picture] if h > 1 else [picture]
            now |= self.executor.features(torch.stack(self.frames, 1), self.goal[None])
            if self.executor.places:
                self.first = now["numbers"] if self.first is None else self.first
                now["first"] = self.first
                if self.executor.own_goal:
                    self.target = self.executor.target(self.goal[None]) if not self.looks else self.target
                    now["target"] = self.target
        else:
            now |= {"frames": picture, "goal": self.goal[None]}
        self.looks = (self.looks + [now])[-self.c.history:]
        batch = {k: torch.stack([look[k] for look in self.looks], 1) for k in now}  # (1, T, ...)
        chunk = self.executor(batch)[0][0, -1].float().clamp(-1, 1).cpu().numpy()  # (C, A)
        self.queue = list(chunk[:min(self.c.execute, self.c.chunk)])
        return self.queue.pop(0)


def load_executor(path, device="cpu"):
    """A trained executor with its planner, from its checkpoint alone."""
    content = core.load(path, kind=Executor.kind, made_by="python executor.py --planner runs/<suite>/mask.pt")
    executor = Executor(core.from_dict(Config, content["config"]), content["extra"])
    executor.load_state_dict(content["model"])
    return executor.to(device).eval().requires_grad_(False)


def build(config):
    """Planner, data and a new executor -> executor, ActionData, path of its checkpoint."""
    if not config.planner:
        core.fail("no --planner: give a checkpoint of stage 1 (python mask_planner.py makes runs/<suite>/mask.pt), or none")
    planner = None
    if config.planner != "none":
        planner = mask_planner.load_planner(config.planner, config.device)
        config.suite, config.demos = planner.config.suite, planner.config.demos
        config.tasks = config.tasks or planner.config.tasks
    config.batch = config.batch or (128 if planner and config.plan_form == "explicit" else 32)
    if config.action_demos > config.demos:
        core.fail(f"--action-demos {config.action_demos} is more than the {config.demos} videos: give --demos {config.action_demos}")
    names = sims.choose_tasks(config.suite, config.tasks)
    if not planner:
        extract.ensure(config.suite, names, config.demos, config.data, extract.Config.PRESETS[config.preset]["size"])
    videos = extract.Episodes(config.data, config.suite, names, config.demos)
    demos = extract.Episodes(config.data, config.suite, names, config.action_demos)
    if planner and planner.config.size != videos.size:
        core.fail(f"{config.planner} was trained on {planner.config.size} px, {config.data}/ holds {videos.size} px: "
                  "give the --data folder it was trained on")
    goals = 0 if sims.is_metaworld(config.suite) else min(GOALS, config.demos)
    extra = {"planner": core.as_dict(planner.config) if planner else None, "suite": config.suite, "tasks": names,
             "size": videos.size, "render": videos.render, "action_dim": videos.arrays["actions"][0].shape[1], "goals": goals,
             "seconds": {"data": round(videos.seconds), "planner": core.last_seconds(config.planner)}}
    torch.manual_seed(config.seed)
    executor = Executor(config, extra).to(config.device)
    if planner:
        executor.planner.load_state_dict(planner.state_dict())
    for k in range(len(names) if goals else 0):
        last = np.flatnonzero(videos.task == k)[-goals:]  # the latest videos: the first ones lend their actions
        executor.goals[k] = torch.as_tensor(videos.gather("obs/agentview_rgb", last, videos.length[last] - 1))
    default = Config.PRESETS[config.preset]["action_demos"]
    name = f"{plan_name(config)}_executor" + f"_d{config.action_demos}" * (config.action_demos != default)
    path = Path(config.out) / config.suite / (name + f"_s{config.seed}" * (config.seed > 0) + ".pt")
    return executor, ActionData(config, executor, demos, videos), path


def main(argv=None):
    """Command line: trains one executor."""
    config = core.parse(Config, "Stage 2 of Mask2Act: learn actions from plans and a few demonstrations.", argv)
    executor, data, path = build(config)
    note = f"plan {plan_name(config)}, {config.action_demos} action demonstrations per task, {len(data.demos)} frames"
    core.fit(executor, data, config, path, note=note, extra=executor.extra)
    print(f"next: python rollout.py {path}")


if __name__ == "__main__":
    main()
