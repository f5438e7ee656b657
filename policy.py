"""The executor E: the network that hears any plan and says actions, and how it acts.

E (Mask2Act section 3.3, eq. 4) sees the last h steps of third-person picture (through the frozen
planner's encoder), wrist picture (through its own), robot state and plan, and says the next
actions. ATM's policy (section IV-B) is the same with encoders of its own for both pictures and the
tracks fused in. `executor.py` trains it.

Sizes: B batch, T steps of history, n tokens per picture, D width, C actions per chunk; of tracks S
steps, N points.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import core
import feature_planner
import mask_planner
import sims
import track_planner
import video_planner
from places import Places
from tracks import PATCH, POINTS, STEPS, Spatial, Stem, grid_points, jitter, ways

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
             (feature_planner.FeaturePlanner, feature_planner))}


def make_planner(about):
    """An untrained planner from what a checkpoint says about it: kind, config and arguments."""
    Planner, module = PLANNERS[about["kind"]]
    return Planner(core.from_dict(module.Config, about["config"]), *about["arguments"])


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
        return (baselines.R3M(c.width, resnet) if resnet
                else core.ImageEncoder(c.width, c.blocks, c.channels))

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
        self.places = Places(self.planner.locator.N, self.own_goal, self.config.blur)
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
            W, n = W * (STEPS // PATCH), 1 if planner.config.points == "ee" else n
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
        self.gpt = core.Transformer(D, c.depth, max(4, D // 64), c.dropout)
        mlp = lambda i, o: nn.Sequential(nn.Linear(i, 256), nn.GELU(), nn.Linear(256, o))
        self.late, M = None, self.places.M if self.places else 0
        if self.spatial and c.late:
            # differs: as many numbers as the action's token has; ATM's 2,048 would drown it.  The
            # waypoint's head hears them too
            self.late = nn.Linear(2 * c.track_length * len(POINTS) * 2, D)
        W = D + D * bool(self.late)
        self.reach, self.head = mlp(W, 3 + M), mlp(W + 3, c.chunk * self.extra["action_dim"])
        mask = core.block_causal_mask(c.history, self.tokens)
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
            grid = grid_points(self.planner.cells).to(frames.device).expand(B, -1, -1)
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
                images = jitter(images, self.config.jitter)
            images, pixels = core.random_shift(images)
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
