"""Stage 2, for every plan: from plans and a few action-labelled demonstrations to actions.

    python executor.py --planner runs/libero_spatial/mask.pt                       # latent plan
    python executor.py --planner runs/libero_spatial/mask.pt --plan-form explicit  # in numbers
    python executor.py --planner runs/libero_spatial/track.pt                      # ATM
    python executor.py --planner runs/mt10/video.pt                                # UniPi's latent
    python executor.py --planner none --suite libero_spatial                       # cloning
    python executor.py --planner none --goal language                              # ATM's BC
    python executor.py --planner none --labels vpt                                 # VPT

Trains the network of `policy.py`; what the frozen planner says of the demonstrations is computed
once.

Measured at the laptop preset on libero_spatial, 3,000 steps on one CPU core: explicit 0.8 minutes,
latent 2.3, cloning 5.4; success with ten demonstrations per task 88, 78 and 75 %, with two 51, 53
and 23 % (README has the intervals).

Sizes: B batch, T steps of history, C actions per chunk.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import extract
import mask_planner
import sims
import track_planner
import video_planner
from baselines import cloning, explicit, plex, vpt
from core import networks, training
from core.episodes import Episodes
from core.files import fail
from core.flags import as_dict, flag, from_dict, parse
from demos import record

# ATM's 32 points per picture: two lattices of 4 x 4
POINTS = [[x, y] for side in (np.linspace(0.05, 0.85, 4), np.linspace(0.15, 0.95, 4))
          for y in side.tolist() for x in side.tolist()]
FAR = (0.04, 0.2)  # widths of the picture, what points go in 16 steps: third person, wrist


def ways(tracks):
    """Tracks from POINTS, third person and wrist (..., 2, S, N, 2) -> how far each point has gone,
    in FAR.

    differs: ATM's policy hears places.  In these, what a point does is 3 % of where it is, and the
    policy learns it last: it did not know at its first look which of two bowls the plan means (12
    cm off, even in training), although the nearest neighbour by `ways` knows it in 9 of 10.
    """
    points = torch.tensor(POINTS, device=tracks.device)
    return (tracks - points) / torch.tensor(FAR, device=tracks.device)[:, None, None, None]


class Stem(nn.Module):
    """ATM's image encoder (Fig. 11): two convolutions, one token per 16 x 16 pixels, in place of
    core.ImageEncoder, whose norm it takes."""
    stride = 16
    cells = networks.ImageEncoder.cells

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3), nn.GroupNorm(4, 64), nn.ReLU(),
                                 nn.Conv2d(64, dim, 8, 8), nn.GroupNorm(8, dim))

    def forward(self, images):
        """(B, H, W, 3) uint8 -> (B, D, h, w) float."""
        return self.net(images.permute(0, 3, 1, 2) / 127.5 - 1)


class Spatial(nn.Module):
    """ATM's spatial encoder (section IV-B, Fig. 11): patches of both pictures and, by early fusion,
    tracks -> one token."""

    def __init__(self, n, D, length, early, depth):
        """n  patches per picture; length  S, steps of the tracks"""
        super().__init__()
        self.n, self.early, self.side = n, early, round(n ** 0.5)
        self.cls = nn.Parameter(torch.randn(1, D) * 0.02)
        self.view, self.kind = (nn.Parameter(torch.randn(2, 1, D) * 0.02) for _ in range(2))
        # differs: sines, the same for patches and points, as in the planner; ATM learns both
        self.register_buffer("place", self.code(networks.grid_points(self.side), D), persistent=False)
        self.track = nn.Linear(2 * length, D) if early else None
        self.gpt = networks.Transformer(D, depth, max(4, D // 64))

    def code(self, points, D):
        """Places (..., 2) in [0, 1] -> (..., D)."""
        return networks.sincos(points.flip(-1) * self.side - 0.5, D)

    def tokens(self, pictures, tracks, moved=None):
        """-> (B, 1 + 2 n (+ 2 N), D): the CLS token, patches of third person and wrist, tracks."""
        x = (pictures + self.view + self.kind[0] + self.place).flatten(1, 2)  # (B, 2 n, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        if self.early and tracks is not None:
            # (B, 2, N, D); each token with the id of its own view: ATM's code mixes them up
            t = self.track(ways(tracks).transpose(2, 3).flatten(3)) + self.view + self.kind[1]
            points = torch.tensor(POINTS, device=x.device)
            points = points if moved is None else points + moved[:, :, None]  # (B, 2, N, 2)
            x = torch.cat([x, (t + self.code(points, x.shape[-1])).flatten(1, 2)], 1)
        return x

    def forward(self, pictures, tracks, moved=None):
        """pictures (B, 2, n, D), third person first; tracks (B, 2, S, N, 2) of the pictures before
        they were `moved` (B, 2, 2), in widths -> (B, D)."""
        return self.gpt(self.tokens(pictures, tracks, moved), first=1)[:, 0]

    @torch.no_grad()
    def attention(self, pictures, tracks):
        """How much the CLS token attends to each patch (Fig. 10), mean over blocks and heads, from
        what forward takes, or without tracks (None) -> (B, 2, n)."""
        x, shares = self.tokens(pictures, tracks), []
        for block in self.gpt.blocks:
            q, k, _ = block.split(x)  # (B, heads, L, d)
            score = q[:, :, :1] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            shares.append(score.softmax(-1)[:, :, 0])  # (B, heads, L)
            x = block(x)
        return torch.stack(shares).mean((0, 2))[:, 1:1 + 2 * self.n].unflatten(1, (2, -1))


STATE = ("obs/ee_states", "obs/gripper_states")  # position 3, axis-angle 3, finger positions 2
JOINTS = "obs/joint_states"  # 7 angles, which with the fingers is ATM's state
AIM = 0.005  # metres, noise on the waypoint that the action head hears in training
# metres, noise on the hand's place as the transformer hears it in training, with the explicit plan.
# Without it some networks go by the few absolute paths they have seen: two demonstrations, second
# training seed, 19 of 100, with it 51
FEEL = 0.01
NEAR = 0.1  # metres, the unit in which the heads hear and say ways
LOOK = ("frames", "goal", "wrist", "hand")  # what planners see


# --- network --------------------------------------------------------------------------------------

class MapToken(nn.Module):
    """A map of features -> one token: spatial-softmax key points, which say where, beside a thin
    flattened map."""

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
        # (n, 2) x, y
        grid = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).reshape(-1, 2)
        share = self.points(x).softmax(-2)  # (..., n, points)
        where = (share.transpose(-1, -2) @ grid.to(share.dtype)).flatten(-2)  # (..., 2 points)
        return self.out(torch.cat([where, self.thin(x).flatten(-2)], -1))  # (..., dim)


PLANNERS = {planner.kind: (planner, module) for planner, module in
            ((mask_planner.MaskPlanner, mask_planner), (track_planner.TrackPlanner, track_planner),
             (video_planner.VideoPlanner, video_planner),
             (plex.FeaturePlanner, plex))}


def make_planner(about):
    """An untrained planner from what a checkpoint says about it: kind, config and arguments."""
    Planner, module = PLANNERS[about["kind"]]
    return Planner(from_dict(module.Config, about["config"]), *about["arguments"])


class Executor(nn.Module):
    """E of eq. 4, one network for every plan."""
    kind = "executor"

    def __init__(self, config, extra):
        """extra  what else the checkpoint holds: about the planner or None, suite, tasks, size,
        render, A, goals per task, E numbers per sentence, depth of R3M's ResNet if it is one."""
        super().__init__()
        self.config, self.extra = config, extra
        # else the goal picture is of another scene
        self.own_goal = sims.is_metaworld(extra["suite"])
        self.planner = None     # behavioural cloning
        if extra["planner"]:
            self.planner = make_planner(extra["planner"]).requires_grad_(False)
        # "language", or by a picture
        told = getattr(self.planner.config if self.planner else config, "goal", None)
        self.told = told or "image"
        self.places, self.spatial, self.sentence, self.latent = None, None, None, None
        if config.plan_form == "tracks":
            self.hear_tracks()
        elif self.planner and config.plan_form == "explicit":
            self.hear_numbers()
        else:
            self.hear_features()
        self.speak()
        size, tasks, goals = extra["size"], len(extra["tasks"]), extra["goals"]
        self.register_buffer("texts", torch.zeros(tasks, extra["E"]))
        self.register_buffer("goals", torch.zeros(tasks, goals, size, size, 3, dtype=torch.uint8))

    def new_encoder(self):
        """An image encoder of its own, for training."""
        c, resnet = self.config, self.extra.get("resnet")
        if c.plan_form == "tracks" and not c.blocks[0]:
            return Stem(c.width)
        return (cloning.R3M(c.width, resnet) if resnet
                else networks.ImageEncoder(c.width, c.blocks, c.channels))

    def hear_tracks(self):
        """ATM's policy: pictures through encoders of its own, tracks among their patches."""
        c = self.config
        self.encoder, self.wrist_encoder = self.new_encoder(), self.new_encoder()
        n = self.encoder.cells(self.extra["size"]) ** 2
        self.spatial = Spatial(n, c.width, c.track_length, c.early, c.spatial_depth)

    def hear_numbers(self):
        """The explicit plan and no pictures.  ours: beside the numbers they are more to overfit,
        and 9/10 of the time."""
        D, W = self.config.width, self.planner.width
        self.places = explicit.Places(self.planner.locator.N, self.own_goal, self.config.blur)
        self.explicit = nn.Sequential(nn.Linear(5 * self.places.M, D), nn.GELU(), nn.Linear(D, D))
        self.goal = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, D))

    def hear_features(self):
        """The latent plan beside the frozen planner's features and the wrist picture; for cloning
        the same encoder, trained, and the task in the plan's place."""
        D, size, planner = self.config.width, self.extra["size"], self.planner
        if planner:
            W, n = planner.width, planner.n
        else:
            self.encoder = self.new_encoder()
            W, n = 2 * D, self.encoder.cells(size) ** 2     # the goal picture says the task
            if self.told == "language":
                self.sentence, W = nn.Linear(self.extra["E"], D), D
        self.image = MapToken(W, n, D)
        self.wrist_encoder = self.new_encoder()
        self.wrist = MapToken(D, self.wrist_encoder.cells(size) ** 2, D)
        if not planner:
            return
        if planner.kind == "track_planner":     # a point's tokens of all times are one
            W, n = W * (track_planner.STEPS // track_planner.PATCH), 1 if planner.config.points == "ee" else n
        elif planner.kind == "video_planner":   # as are a cell's of all pictures to come
            W = W * video_planner.FRAMES
        one = lambda: nn.Sequential(nn.Flatten(-2), nn.LayerNorm(W), nn.Linear(W, D))
        self.latent = MapToken(W, n, D) if n > 1 else one()

    def speak(self):
        """The robot's state, the transformer over all tokens, and the heads."""
        c, D = self.config, self.config.width
        # differs: the hand's place, which the waypoint needs, is kept from ATM's transformer only
        self.keys = (*STATE, JOINTS) if self.spatial else STATE
        self.felt = slice(6, 15) if self.spatial else slice(0, 8)  # fingers and joints; else all
        self.state = nn.Linear(self.felt.stop - self.felt.start, D)
        # goal, or image and wrist; state, plan, action; of ATM: spatial, state, action
        self.tokens = 3 if self.spatial else 4 if self.places else 5
        self.kinds = nn.Parameter(torch.randn(self.tokens, D) * 0.02)
        self.times = nn.Parameter(torch.randn(c.history, 1, D) * 0.02)
        self.gpt = networks.Transformer(D, c.depth, max(4, D // 64), c.dropout)
        mlp = lambda i, o: nn.Sequential(nn.Linear(i, 256), nn.GELU(), nn.Linear(256, o))
        self.late, M = None, self.places.M if self.places else 0
        if self.spatial and c.late:
            # differs: as many numbers as the action's token has; ATM's 2,048 would drown it.  The
            # waypoint's head hears them too
            self.late = nn.Linear(2 * c.track_length * len(POINTS) * 2, D)
        W = D + D * bool(self.late)
        self.reach, self.head = mlp(W, 3 + M), mlp(W + 3, c.chunk * self.extra["action_dim"])
        mask = networks.block_causal_mask(c.history, self.tokens)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("mean", torch.zeros(self.felt.stop))
        self.register_buffer("std", torch.ones(self.felt.stop))

    def train(self, mode=True):
        super().train(mode)
        if self.planner:
            self.planner.eval()  # frozen is more than no gradient
        return self

    @torch.no_grad()
    def features(self, look):
        """What the frozen planner says of a look: frames (B, h, H, W, 3) uint8 as it wants them,
        wrist (B, H, W, 3), hand (B, 2), and goal (B, H, W, 3) uint8, or (B, E) if it is told by
        language
        -> {"tracks": (B, 2, S, N, 2)} of the third person and the wrist; {"numbers": (B, N, 5),
        "goal_code": (B, D)}; or {"image": (B, n, D), of the last frame, "plan": (B, n or 1, D or
        P D)}."""
        frames, goal = look["frames"], look["goal"]
        B = len(frames)
        if self.spatial:
            points = torch.tensor(POINTS, device=frames.device).expand(2 * B, -1, -1)
            tracks, _ = self.planner(torch.cat([frames[:, -1], look["wrist"]]), points,
                                     torch.cat([goal, goal]))
            tracks = tracks[:, :self.config.track_length]
            return {"tracks": tracks.unflatten(0, (2, B)).transpose(0, 1)}
        if self.planner.kind == "track_planner":
            grid = networks.grid_points(self.planner.cells).to(frames.device).expand(B, -1, -1)
            points = look["hand"].float()[:, None] if self.planner.config.points == "ee" else grid
            return dict(zip(("plan", "image"), self.planner.plan(frames[:, -1], points, goal)))
        if self.planner.kind == "video_planner":
            return dict(zip(("plan", "image"), self.planner.plan(frames[:, -1], goal)))
        x, fine = self.planner.encode(frames, fine=True)
        x = torch.cat([self.planner.encode(goal)[:, None], x], 1)  # (B, 1 + h, n, D)
        plan = self.planner.plan_from(x)[:, -1]  # (B, n, D)
        if not self.places:
            return {"image": x[:, -1], "plan": plan}
        said = {"numbers": self.planner.locator(self.planner.as_map(plan), fine[:, -1])[:, :, 0],
                "goal_code": x[:, 0].mean(1)}
        # where robot and objects are in the goal picture
        if self.own_goal and "target" not in look:
            still = goal[:, None].expand(-1, self.planner.config.history, -1, -1, -1)
            said["target"] = self.features({"frames": still, "goal": goal,
                                            "target": None})["numbers"]
        return said

    def forward(self, batch):
        """batch: state (B, T, 8 or, of ATM, 15) and, in training, waypoint (B, T, 3); for the
        explicit plan numbers, first and, if the goal is of this scene, target (B, T, N, 5),
        goal_code (B, T, D); else wrist (B, T, H, W, 3) uint8 and image, plan (B, T, n, D), or, for
        tracks, picture (B, T, H, W, 3) and tracks (B, T, 2, S, N, 2), or, for cloning, picture and
        goal, a picture or (B, T, E)
        -> actions (B, T, C, A) in about [-1, 1], waypoint (B, T, 3) in metres."""
        x, heard = self.listen(batch)  # (B, T, D), (B, T, M, 5) or None
        # ours: first where to, in metres, then how: an action is clipped at a few centimetres' way
        # and says little about a target further off.  The place is the demonstration's own, where
        # its hand next opens or closes.
        if self.late:  # ATM's late fusion, for the waypoint too
            x = torch.cat([x, self.late(ways(batch["tracks"]).flatten(2))], -1)  # (B, T, 2 D)
        there = self.reach(x).float()  # (B, T, 3 + M)
        # (B, T, 3) metres, (B, T, M)
        there, pointer = there[..., :3] * NEAR + self.mean[:3], there[..., 3:].softmax(-1)
        # beside one of the things that the plan names, as seen at the waypoint's height
        if self.places:
            there = there + F.pad(self.places.beside(heard, pointer, there[..., 2]) - self.mean[:2],
                                  (0, 1))  # (B, T, 3)
        # In training the true one, with noise: a head that hears a poor guess learns to do without.
        # differs: the explicit plan is not fused late, as ATM's is; with two demonstrations the
        # head then learns paths by heart and does not go to the waypoint (success 16 of 50; without
        # the numbers 27 of 50)
        aim = batch["waypoint"] + AIM * torch.randn_like(there) if self.training else there
        way = (aim - batch["state"][..., :3]) / NEAR  # (B, T, 3)
        action = self.head(torch.cat([x, way.to(x.dtype)], -1))
        return action.unflatten(-1, (self.config.chunk, -1)), there

    def look(self, net, images):
        """images (B, H, W, 3) uint8, in training shifted and, for ATM, recoloured -> tokens (B, n,
        D), by how much (B, 2), in widths."""
        moved = torch.zeros(len(images), 2, device=images.device)
        if self.training:
            if self.spatial and self.config.jitter:
                images = track_planner.jitter(images, self.config.jitter)
            images, pixels = networks.random_shift(images)
            moved = pixels / images.shape[1]
        return net(images).flatten(2).transpose(1, 2), moved

    def listen(self, batch):
        """What the transformer says at the action's place (B, T, D), and what it heard of the
        explicit plan (B, T, M, 5) or None; batch as for forward."""
        B, T = batch["state"].shape[:2]
        state, heard = batch["state"], None
        feel = lambda state: self.state(((state - self.mean) / self.std)[..., self.felt])
        if self.places:
            # roughly where the hand is: how far from the waypoint, the head hears exactly
            if self.training:
                state = state + F.pad(FEEL * torch.randn_like(state[..., :3]), (0, 5))
            # (B, T, M, 5)
            heard = self.places.hear(batch["first"], batch["numbers"], batch.get("target"))
            # ours: the goal picture's mean token; a place in the picture is another height in
            # another task
            # (B, T, D) each
            tokens, plan = [self.goal(batch["goal_code"])], self.explicit(self.places(heard))
        else:
            encode = lambda net, images: self.look(net, images.flatten(0, 1))[0]  # (B T, n, D)
        if self.spatial:
            # ours: tracks move with their pictures; ATM shifts the pictures alone
            both = [self.look(net, batch[k].flatten(0, 1)) for net, k in
                    ((self.encoder, "picture"), (self.wrist_encoder, "wrist"))]
            pictures, moved = (torch.stack(x, 1) for x in zip(*both))
            seen = self.spatial(pictures, batch["tracks"].flatten(0, 1), moved)  # (B T, D)
            tokens = [seen.unflatten(0, (B, T)), feel(state)]
        elif not self.places:
            if self.planner:
                image, plan = batch["image"], self.latent(batch["plan"])
            elif self.sentence:  # ATM's BC
                image = encode(self.encoder, batch["picture"]).unflatten(0, (B, T))
                plan = self.sentence(batch["goal"].float())
            else:
                both = torch.cat([batch["picture"], batch["goal"]], 1)  # (B, 2 T, H, W, 3)
                x = encode(self.encoder, both).unflatten(0, (B, 2, T))
                image = torch.cat([x[:, 0], x[:, 1]], -1)
                plan = torch.zeros(B, T, self.config.width, device=x.device)
            tokens = [self.image(image),
                      self.wrist(encode(self.wrist_encoder, batch["wrist"]).unflatten(0, (B, T)))]
        if not self.spatial:
            tokens += [feel(state), plan]
        tokens.append(torch.zeros_like(tokens[-1]))  # the action's place
        x = torch.stack(tokens, 2) + self.kinds + self.times[:T]  # (B, T, tokens, D)
        L = T * self.tokens
        x = self.gpt(x.flatten(1, 2), self.mask[:L, :L]).unflatten(1, (T, self.tokens))
        return x[:, :, -1], heard

    def loss(self, batch):
        """batch as for forward (or frames and goal for the planner, if not cached), action (B, T,
        C, A), and waypoint (B, T, 3): the hand's position where it next opens or closes, metres ->
        MSE of both, parts."""
        if self.planner and "frames" in batch:
            B, T = batch["state"].shape[:2]
            said = self.features({k: batch[k].flatten(0, 1) for k in LOOK if k in batch})
            batch = batch | {k: v.unflatten(0, (B, T)) for k, v in said.items()}
        action, there = self(batch)
        error = F.mse_loss(action.float(), batch["action"], reduction="none")  # (B, T, C, A)
        waypoint = F.mse_loss(there / NEAR, batch["waypoint"] / NEAR)
        parts = {"motion": error[..., :-1].mean().item(), "gripper": error[..., -1].mean().item(),
                 "waypoint": waypoint.item()}
        return error.mean() + 0.3 * waypoint, parts


# --- acting ---------------------------------------------------------------------------------------

class Policy:
    """A trained executor as a closed loop: `wants_frame`, then `policy(frame)` -> the next action
    (A,)."""

    def __init__(self, executor):
        self.executor, self.c = executor.eval(), executor.config
        self.device = next(executor.parameters()).device

    def reset(self, goal, task=0):
        """Starts an episode. goal (H, W, 3) uint8: the goal picture; `executor.goals` (tasks,
        goals, H, W, 3) are some. task: index into the executor's tasks, for a plan that is told by
        language."""
        if self.executor.told == "language":
            self.goal = self.executor.texts[task]
        else:
            self.goal = torch.as_tensor(goal, device=self.device)
        self.looks, self.queue, self.frames, self.first = [], [], [], None

    @property
    def wants_frame(self):
        """Whether the next call looks at its frame; in between, actions of the last chunk are
        executed."""
        return not self.queue

    @torch.no_grad()
    def __call__(self, frame):
        if self.queue:
            return self.queue.pop(0)
        tensor = lambda x: torch.as_tensor(np.asarray(x), device=self.device)[None]
        state = np.concatenate([frame[k.removeprefix("obs/")] for k in self.executor.keys])
        picture = tensor(frame["agentview_rgb"])
        wrist = tensor(frame["eye_in_hand_rgb"]) if "eye_in_hand_rgb" in frame else None
        now = {"state": tensor(state), "picture": picture} | ({} if self.executor.places
                                                              else {"wrist": wrist})
        if self.executor.planner:
            # the planner's own history, at its own stride, when this executor looks that often
            h = getattr(self.executor.planner.config, "history", 1)
            self.frames = (self.frames or [picture] * h)[1 - h:] + [picture] if h > 1 else [picture]
            now |= self.executor.features({"frames": torch.stack(self.frames, 1),
                                           "goal": self.goal[None], "wrist": wrist,
                                           "hand": tensor(frame["hand"])})
            if self.executor.places:
                self.first = now["numbers"] if self.first is None else self.first
                now["first"] = self.first
        else:
            now["goal"] = self.goal[None]
        self.looks = (self.looks + [now])[-self.c.history:]
        batch = {k: torch.stack([look[k] for look in self.looks], 1) for k in now}  # (1, T, ...)
        chunk = self.executor(batch)[0][0, -1].float().clamp(-1, 1).cpu().numpy()  # (C, A)
        self.queue = list(chunk[:min(self.c.execute, self.c.chunk)])
        return self.queue.pop(0)


GOALS = 10  # goal pictures per task that the checkpoint carries for evaluation
FOLLOW = 8  # steps in which the fingers follow a changed command
DRAWS = 3  # goals per training frame for which the frozen planner's plan is cached


@dataclass
class Config:
    planner: str = flag("", "checkpoint of stage 1, or none: behavioural cloning")
    plan_form: str | None = flag(None, "latent: the plan's tokens (Mask2Act; the default but for "
                                 "any-point tracks); explicit: where the objects are, in metres "
                                 "(masks); tracks: where points will go (ATM)",
                                 choices=["latent", "explicit", "tracks"])
    early: bool = flag(True, "tracks beside the picture's patches (ATM, Table III), "
                       "for --plan-form tracks")
    late: bool = flag(True, "tracks beside the action head (ATM, Table III), "
                      "for --plan-form tracks")
    track_length: int = flag(track_planner.STEPS, "steps of the planned tracks that it hears (ATM, Fig. 9)",
                             choices=[4, 8, 16])
    goal: str | None = flag(None, "what says the task, for --planner none: image (the default) or "
                            "language (ATM's BC)", choices=["language", "image"])
    encoder: str = flag("own", "image encoders, for --planner none: own, or r3m, from --weights",
                        choices=["own", "r3m"])
    weights: str = flag("", "R3M's published checkpoint, for --encoder r3m")
    labels: str = flag("true", "actions, for --planner none: true, or vpt: those that an inverse "
                       "dynamics model, trained on the demonstrations, gives all videos",
                       choices=["true", "vpt"])
    suite: str = flag("libero_spatial", "suite, for --planner none; otherwise the planner's")
    tasks: str = flag("",
                      "numbers or names of tasks, comma-separated; empty: the planner's, or all")
    demos: int | None = flag(None,
                             "videos per task, as for the planner: goal pictures come from them",
                             minimum=1)
    action_demos: int | None = flag(None, "action-labelled demonstrations per task "
                                    "(the first of the videos)", minimum=1)
    steps: int | None = flag(None, "gradient steps", minimum=1)
    preset: str | None = flag(None, "sizes for two CPU cores or for one GPU",
                              choices=["laptop", "paper"])
    width: int | None = flag(None, "width of the transformer", minimum=8)
    depth: int | None = flag(None, "transformer blocks", minimum=1)
    spatial_depth: int | None = flag(None, "transformer blocks over patches and tracks (ATM), for "
                                     "--plan-form tracks", minimum=1)
    blocks: tuple[int, ...] | None = flag(None, "residual blocks in each stage of its own image "
                                          "encoders; 0: ATM's, for --plan-form tracks")
    channels: int | None = flag(None, "channels of their first stage, doubled at each next one",
                                minimum=16)
    history: int | None = flag(None, "looks h that the executor remembers", minimum=1)
    blur: float = flag(1.0,
                       "noise on the explicit plan in training, percent of the picture's width",
                       minimum=0)
    # ours: chunks.  In a prototype on one task, executing 1, 4 or 8 of 8 actions solved 5, 7 and 1
    # of 10 scenes
    chunk: int = flag(8, "actions predicted at once (1: the paper)", minimum=1)
    execute: int = flag(4, "of these, actions executed before the next look", minimum=1)
    dropout: float = flag(0.0, "in the transformer", minimum=0, maximum=1)
    # 46 ms per step with the latent plan on one core, 85 without: the wrist's own encoder is
    # trained in both
    cache: bool = flag(True, "compute the frozen planner's outputs once instead of at every step")
    batch: int | None = flag(None, "samples per step; by default 32 with pictures, 128 without",
                             minimum=1)
    lr: float | None = flag(None, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    # Cloning was tried with others too (two demonstrations, one seed): learning rate 3e-4 14,
    # dropout 0.1 25, as here 20 of 100
    weight_decay, warmup, clip, ema, save_every, log_every = 1e-2, 100, 1.0, 0.0, 500, 100
    jitter = 0.0  # of the pictures' colours, for tracks
    PRESETS = {"laptop": dict(demos=20, action_demos=10, steps=3000, width=128, depth=3,
                              spatial_depth=2, blocks=(1, 1, 1), channels=32, history=1, lr=1e-3),
               "paper": dict(demos=50, action_demos=10, steps=30000, width=256, depth=4,
                             spatial_depth=7, blocks=(2, 2, 2, 2), channels=64, history=10,
                             lr=5e-4)}
    # ATM's policy at the paper preset; 100 epochs of ten demonstrations of each of ten tasks are
    # about 2,500 steps.  Four processes with --batch 128 are ATM's four GPUs
    TABLE_VII = dict(width=128, blocks=(0,), batch=512, steps=2500, lr=5e-4, weight_decay=1e-4,
                     warmup=0, clip=100.0, jitter=0.3)


def plan_name(config):
    """none, none-language, r3m, vpt, mask, mask-explicit, track, track-latent, ee or video-latent,
    as in results and file names; ablations add to it."""
    if config.planner == "none":
        named = ["r3m"] * (config.encoder == "r3m") + ["vpt"] * (config.labels == "vpt")
        return "-".join(named or ["none"]) + "-language" * (config.goal == "language")
    name, form = Path(config.planner).stem, config.plan_form
    if form == "tracks":
        name += {(True, True): "", (True, False): "-early",
                 (False, True): "-late"}.get((config.early, config.late), "-unfused")
        return name + f"-{config.track_length}steps" * (config.track_length != track_planner.STEPS)
    latent = "-latent" * name.startswith(("track", "video"))
    return name + ("-explicit" if form == "explicit" else latent)


def waypoints(position, gripper):
    """Where the hand is when its gripper's command next changes, at the end if it does not. While
    the fingers still follow a change, its own place is the waypoint: whether to close now is often
    open, where to be then is not.

    position (T, 3) metres, gripper (T,) commands -> (T, 3) metres.
    """
    changes = np.flatnonzero(np.diff(gripper > 0)) + 1
    passed = np.searchsorted(changes + FOLLOW, np.arange(len(gripper)), "right")  # (T,)
    return position[np.append(changes, len(gripper) - 1)[passed]]


# --- data -----------------------------------------------------------------------------------------

class ActionData:
    """Batches for stage 2: frames of the action demonstrations, actions, and goals from the
    videos."""

    def __init__(self, config, executor, demos, videos):
        self.c, self.executor, self.demos, self.videos = config, executor, demos, videos
        planner = executor.planner
        self.h, self.stride = (getattr(planner and planner.config, k, 1)
                               for k in ("history", "stride"))
        # (frames, 8 or 15)
        state = np.concatenate([demos.gather(k, *self.every()) for k in executor.keys], -1)
        executor.mean.copy_(torch.from_numpy(state.mean(0)))
        executor.std.copy_(torch.from_numpy(state.std(0).clip(1e-3)))
        position = demos.gather("obs/ee_states", *self.every())[:, :3]
        gripper = demos.gather("actions", *self.every())[:, -1]
        self.waypoint = np.concatenate([waypoints(position[a:b], gripper[a:b])
                                        for a, b in zip(demos.start, demos.start[1:])])
        # numbers are too few to be worth saving memory
        cached = planner and (config.cache or executor.places)
        self.draws = 1 if executor.own_goal or executor.told == "language" else DRAWS
        what = f"frozen planner, goals per frame: {self.draws}"
        self.cached = self.compute(what) if cached else None
        if executor.places:
            target = self.cached["target"].float() if executor.own_goal else None
            executor.places.fit(self.cached["numbers"].float(), target, position,
                                self.waypoint[:, 2].mean())

    def every(self):
        """All frames of the demonstrations: episode (frames,), t (frames,)."""
        episode = np.repeat(np.arange(len(self.demos.length)), self.demos.length)
        return episode, np.arange(len(self.demos)) - self.demos.start[episode]

    def goal_of(self, row, draw):
        """Goal number `draw` (...) of demonstration frame `row` (...): which video ends in it, see
        Episodes.goal_of."""
        episode = np.searchsorted(self.demos.start, row, "right") - 1
        task = self.demos.task[episode]
        per_task = len(self.videos.length) // len(self.videos.tasks)
        own = episode % (len(self.demos.length) // len(self.demos.tasks))
        if self.executor.own_goal:
            return task * per_task + own
        # a hash of the row: cached and uncached training, and every resumption, see the same goals
        other = (own + 1 + (row * 7919 + draw * 104729) % max(1, per_task - 1)) % per_task
        return task * per_task + other

    def look(self, row, draw):
        """What the planner sees at demonstration frames `row` (...) with goal number `draw`, as
        arrays, see LOOK."""
        episode = np.searchsorted(self.demos.start, row, "right") - 1
        t = row - self.demos.start[episode]
        if self.executor.told == "language":
            goal = self.demos.text[self.demos.task[episode]]  # (..., E)
        else:
            video = self.goal_of(row, draw)
            # (..., H, W, 3)
            goal = self.videos.gather("obs/agentview_rgb", video, self.videos.length[video] - 1)
        past = t[..., None] + self.stride * np.arange(1 - self.h, 1)
        return {"frames": self.demos.gather("obs/agentview_rgb", episode[..., None], past),
                "goal": goal, "wrist": self.demos.gather("obs/eye_in_hand_rgb", episode, t),
                "hand": self.demos.gather("hand", episode, t)}

    def compute(self, what, size=64):
        """The frozen planner's outputs for all frames and their goals -> dict of (draws, frames,
        ...) float16."""
        device, out = next(self.executor.parameters()).device, [[] for _ in range(self.draws)]
        parts = np.array_split(np.arange(len(self.demos)), -(-len(self.demos) // size))
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.c.bf16)):
            for part in tqdm(parts, desc=what, mininterval=5):
                for draw in range(self.draws):
                    look = {k: torch.as_tensor(v, device=device)
                            for k, v in self.look(part, draw).items()}
                    out[draw].append({k: v.half().cpu()
                                      for k, v in self.executor.features(look).items()})
        return {k: torch.stack([torch.cat([piece[k] for piece in pieces]) for pieces in out])
                for k in out[0][0]}

    def __call__(self, step):
        """The batch of one training step, a function of (seed, step)."""
        c = self.c
        episode, t, rng = self.demos.draw(step, c.batch, c.seed)
        draw = rng.integers(self.draws, size=len(t))
        # (B, T): the times of the looks
        past = np.maximum(t[:, None] + c.execute * np.arange(1 - c.history, 1), 0)
        e = episode[:, None]
        row = self.demos.start[e] + past  # (B, T)
        ahead = past[..., None] + np.arange(c.chunk)  # (B, T, C)
        keys = self.executor.keys
        batch = {"state": np.concatenate([self.demos.gather(k, e, past) for k in keys], -1),
                 "action": self.demos.gather("actions", e[..., None], ahead),
                 "waypoint": self.waypoint[row]}
        if not self.executor.places:
            batch["wrist"] = self.demos.gather("obs/eye_in_hand_rgb", e, past)
        if self.cached:
            # float16 in memory; the networks expect what autocast or float32 gives
            batch |= {k: v[draw[:, None], row].float() for k, v in self.cached.items()}
            if self.executor.spatial:
                batch["picture"] = self.demos.gather("obs/agentview_rgb", e, past)
            if self.executor.places:
                first = self.cached["numbers"][draw, self.demos.start[episode]].float()  # (B, N, 5)
                batch["first"] = first[:, None].expand_as(batch["numbers"])
            return batch
        look = self.look(row, draw[:, None])
        return batch | look | {"picture": look["frames"][:, :, -1]}


# --- command --------------------------------------------------------------------------------------

def load_executor(path, device="cpu"):
    """A trained executor with its planner, from its checkpoint alone."""
    content = training.load(path, kind=Executor.kind,
                         made_by="python executor.py --planner runs/<suite>/mask.pt")
    executor = Executor(from_dict(Config, content["config"]), content["extra"])
    executor.load_state_dict(content["model"])
    return executor.to(device).eval().requires_grad_(False)


def settle(config, planner):
    """Fills in what the planner decides; refuses flags that do not go together."""
    for name, usual in (("goal", None), ("encoder", "own"), ("labels", "true")):
        value = getattr(config, name)
        if planner and value != usual:
            fail(f"--{name} {value} is for --planner none: {config.planner} brings its own")
    if (config.encoder == "r3m") != bool(config.weights):
        fail("--encoder r3m and --weights go together: R3M's encoders start from that file")
    if planner:
        config.suite, config.demos = planner.config.suite, planner.config.demos
        config.tasks = config.tasks or planner.config.tasks
    taught = getattr(planner and planner.config, "action_demos", 0)
    if taught > config.action_demos:
        fail(f"--action-demos {config.action_demos}: {config.planner} itself has learned from "
                  f"{taught} demonstrations per task; train one with python feature_planner.py "
                  f"--suite {config.suite} --action-demos {config.action_demos} --out runs/few")
    forms = planner.forms if planner else ["latent"]
    config.plan_form = config.plan_form or forms[0]
    if config.plan_form not in forms:
        fail(f"--plan-form {config.plan_form}: {config.planner} can give {' or '.join(forms)}")
    if config.plan_form == "tracks" and config.preset == "paper":
        for name, value in Config.TABLE_VII.items():  # but what a flag says
            if getattr(config, name) in (getattr(Config, name), Config.PRESETS["paper"].get(name)):
                setattr(config, name, value)
    config.batch = config.batch or (128 if planner and config.plan_form == "explicit" else 32)
    if config.action_demos > config.demos:
        fail(f"--action-demos {config.action_demos} is more than the {config.demos} videos: "
                  f"give --demos {config.action_demos}")


def build(config):
    """Planner, data and a new executor -> executor, ActionData, path of its checkpoint."""
    if not config.planner:
        fail("no --planner: give a checkpoint of stage 1 (python mask_planner.py makes "
                  "runs/<suite>/mask.pt), or none")
    planner, about = None, None
    if config.planner != "none":
        content = training.load(config.planner, made_by="python mask_planner.py (or track_planner.py)")
        if content.get("kind") not in PLANNERS:
            fail(f"{config.planner} holds a model of kind '{content.get('kind')}', not a "
                      f"planner: {', '.join(PLANNERS)}")
        planner = PLANNERS[content["kind"]][1].load_planner(config.planner, config.device)
        about = {"kind": planner.kind, "config": as_dict(planner.config),
                 "arguments": planner.arguments}
    settle(config, planner)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not planner:
        record.ensure(config.suite, names, config.demos, config.data,
                       extract.Config.PRESETS[config.preset]["size"])
    videos = Episodes(config.data, config.suite, names, config.demos)
    demos = Episodes(config.data, config.suite, names, config.action_demos)
    if planner and planner.config.size != videos.size:
        fail(f"{config.planner} was trained on {planner.config.size} px, {config.data}/ "
                  f"holds {videos.size} px: give the --data folder it was trained on")
    goals = 0 if sims.is_metaworld(config.suite) else min(GOALS, config.demos)
    extra = {"planner": about, "E": videos.text.shape[1], "suite": config.suite, "tasks": names,
             "size": videos.size, "render": videos.render,
             "action_dim": videos.arrays["actions"][0].shape[1], "goals": goals,
             "seconds": {"data": round(videos.seconds),
                         "planner": training.last_seconds(config.planner)}}
    torch.manual_seed(config.seed)
    if config.encoder == "r3m":
        weights, extra["resnet"] = cloning.read_r3m(config.weights)
    executor = Executor(config, extra).to(config.device)
    if planner:
        executor.planner.load_state_dict(planner.state_dict())
    if config.encoder == "r3m":
        for encoder in (executor.encoder, executor.wrist_encoder):
            encoder.convnet.load_state_dict(weights)
    executor.texts.copy_(torch.as_tensor(videos.text))
    for k in range(len(names) if goals else 0):
        # the latest videos: the first ones lend their actions
        last = np.flatnonzero(videos.task == k)[-goals:]
        executor.goals[k] = torch.as_tensor(videos.gather("obs/agentview_rgb", last,
                                                          videos.length[last] - 1))
    default = Config.PRESETS[config.preset]["action_demos"]
    name = f"{plan_name(config)}_executor" + f"_d{config.action_demos}" * (
        config.action_demos != default)
    path = Path(config.out) / config.suite / (name + f"_s{config.seed}" * (config.seed > 0) + ".pt")
    if config.labels == "vpt":
        demos = vpt.vpt(demos, videos, config, path.with_stem(path.stem + "_inverse"),
                              executor.keys)
    return executor, ActionData(config, executor, demos, videos), path


def main(argv=None):
    """Command line: trains one executor."""
    config = parse(Config,
                        "Stage 2 of Mask2Act: learn actions from plans and a few demonstrations.",
                        argv)
    executor, data, path = build(config)
    note = (f"plan {plan_name(config)}, {config.action_demos} action demonstrations per task, "
            f"{len(data.demos)} frames")
    training.fit(executor, data, config, path, note=note, extra=executor.extra)
    print(f"next: python rollout.py {path}")


if __name__ == "__main__":
    main()
