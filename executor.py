"""Stage 2, for every plan: from plans and a few action-labelled demonstrations to actions.

    python executor.py --planner runs/libero_spatial/mask.pt          # Mask2Act: section 3.3, eq. 4
    python executor.py --planner runs/libero_spatial/track.pt         # ATM: section IV-B
    python executor.py --planner none --suite libero_spatial          # cloning: the goal picture

The executor E predicts the next actions from the last looks: robot state, sentence, wrist picture
and the token sets that the planner brings (its plan, perhaps its view of the third-person picture),
each pooled into one token; these attend within a look, then one token per look through time, the
same network for every plan. What a frozen planner brings is computed before training, for DRAWS
goals and shifts of each frame.

Sizes: B batch, T looks, n tokens of a set, D width, C actions per chunk, A numbers per action, S of
the state, E per sentence, H W pixels.
"""

import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from core import networks, training
from core.episodes import look_times
from core.files import fail, mapped_array
from core.flags import TrainingConfig, differences, flag, from_dict, parse, suites
from core.planners import build, load_planner, untrained

# differs: the hand's pose and the fingers, for every plan; ATM gives joint angles and fingers
STATE = ("obs/ee_states", "obs/gripper_states")     # position 3, axis-angle 3, fingers 2
STATE_NOISE = 0.02      # metres, in training, on the hand's position in the state token
WAYPOINT_NOISE = 0.005  # metres, in training, on the waypoint that the action head reads
OFFSET_SCALE = 0.1      # metres, the unit of what waypoint head and action head compute with
FOLLOW = 8              # steps in which the fingers follow a changed command
DRAWS = 6               # goals and shifts of each frame for which a frozen planner's plan is kept
CAMERA_OF = {"picture": "obs/agentview_rgb", "wrist": "obs/eye_in_hand_rgb"}    # views 0 and 1


@dataclass
class Config(TrainingConfig):
    planner: str = flag("", "checkpoint of stage 1; or none (cloning: the goal picture is the plan)"
                        " or none-language (the sentence is)")
    form: str | None = flag(None, "which of the planner's plans, such as latent, tracks or masks "
                            "(empty: its paper's); ours, latent+goal: and picture and goal, as "
                            "cloning")
    # differs: ATM joins it at both
    fusion: str = flag("early", "where the plan joins: early among the tokens, late at the heads, "
                       "or both (ATM, Table III)", choices=["early", "late", "both"])
    suite: str = flag("", "suite to act in; empty: the planner's (another: Mask2Act, Fig. 6)")
    action_demos: int | None = flag(None, "action-labelled videos per task (the first)", minimum=1)
    # differs: action chunks (ACT), of which half are executed; the papers predict one action
    chunk: int = flag(8, "actions C predicted at once (1: the papers)", minimum=1, maximum=100)

    batch: int = 32
    time_depth: int = 1                 # blocks over the looks; `depth`: over the tokens of each
    execute: int = 4                    # actions executed before the next look, at most a chunk
    goals: int = 10                     # goal pictures per task that the checkpoint keeps
    size: int = 0                       # of the pictures, pixels
    # of the planner and the data, so that a checkpoint can be rebuilt from itself alone
    plan: str = ""                      # its name in results
    kind: str = ""
    planner_config: dict | None = None
    env: str = ""
    task_names: tuple[str, ...] = ()
    render: str = ""
    S: int = 8
    differs: str = ""                   # from the preset, for names of results
    seconds: dict | None = None

    weight_decay, warmup, clip, ema, save_every, log_every = 1e-2, 100, 1.0, 0.0, 500, 100
    # paper: looks and learning rate of ATM's Table VII, Mask2Act's ResNet-18.  differs from that
    # table: batch 128 (512), weight decay 1e-2 (1e-4), clip 1 (100), warm-up, no colour jitter
    PRESETS = {
        "tiny": dict(demos=2, action_demos=2, steps=5, lr=1e-3, batch=4, width=32, depth=1,
                     time_depth=1, blocks=(1, 1, 1), channels=16, history=2, size=64),
        "laptop": dict(demos=20, action_demos=10, steps=3000, lr=1e-3, batch=32, width=128,
                       depth=2, time_depth=1, blocks=(1, 1, 1), channels=32, history=1, size=96),
        "paper": dict(demos=50, action_demos=10, steps=10000, lr=5e-4, batch=128, width=128,
                      depth=7, time_depth=4, blocks=(2, 2, 2, 2), channels=64, history=10,
                      size=128)}


# --- network --------------------------------------------------------------------------------------

def shifted(batch, training=True):
    """In training, random shifts of all pictures (B, ..., H, W, 3): one draw per view for all looks
    of a window; goal and place of the hand move with the third-person picture -> batch; how far
    each view has moved (B, 3, 2), in widths."""
    moved = torch.zeros(len(next(iter(batch.values()))), 3, 2)
    for view, names in enumerate((("picture", "frames", "goal"), ("wrist",))):
        seen = {k: batch[k].flatten(1, -4) if batch[k].ndim > 4 else batch[k][:, None]
                for k in names if k in batch and training}
        if seen:
            images, pixels = networks.shift_together(torch.cat([*seen.values()], 1))
            parts = images.split([x.shape[1] for x in seen.values()], 1)
            batch = batch | {k: x.reshape(batch[k].shape) for k, x in zip(seen, parts)}
            far = pixels / images.shape[3]                              # (B, 2)
            if view == 0 and "hand" in batch:
                batch["hand"] = (batch["hand"].movedim(0, -2) + far).movedim(-2, 0)
            moved[:, view] = far.cpu()
    return batch, moved.to(next(iter(batch.values())).device)


class Executor(nn.Module):
    """E of Mask2Act eq. 4 in the form of ATM's policy (section IV-B): one network, any plan.
    differs: each token set is pooled into one token, by key points; ATM's transformer attends to
    all patches and tracks (tried: results/README.md). ATM's state enters after the tokens of a
    look, its plan is fused early and late, a token per look asks for actions, each step has a look;
    Mask2Act's E: no sentence, no encoder."""
    kind, made_by = "executor", "python executor.py --planner runs/<suite>/mask.pt"

    def __init__(self, config, planner):
        super().__init__()
        c, D = config, config.width
        self.config, self.planner = c, planner.requires_grad_(not planner.frozen)
        self.form, plus, _ = c.form.partition("+goal")
        sets = {k: v for k, v in planner.sets(self.form).items() if not plus or k not in CAMERA_OF}
        widths = {k: width for k, (_, width) in sets.items()} | {"state": c.S}
        self.scale = nn.ModuleDict({k: networks.Standardise(w) for k, w in widths.items()})
        # encoders of its own for the views that the planner does not bring
        self.encoders = nn.ModuleDict({view: networks.ImageEncoder(D, c.blocks, c.channels)
                                       for view in CAMERA_OF if view not in sets})
        if plus:    # as cloning: through one encoder, in one view
            self.encoders["goal"] = self.encoders["picture"]
        for view, encoder in self.encoders.items():
            sets[view] = networks.grid_places(encoder.cells(c.size), int(view == "wrist")), D
        self.plans = [name for name in sets if name not in CAMERA_OF]
        self.pool = nn.ModuleDict({k: networks.SpatialSoftmaxPool(*v, D) for k, v in sets.items()})
        self.state, self.text = nn.Linear(c.S, D), nn.Linear(c.E, D)
        self.cls = nn.Parameter(0.02 * torch.randn(D))
        self.space = networks.Transformer(D, c.depth, max(4, D // 64))
        self.time = networks.Transformer(D, c.time_depth, max(4, D // 64))
        self.when = nn.Parameter(0.02 * torch.randn(c.history, D))
        width = D + D * len(self.plans) * (c.fusion != "early")
        self.waypoint, self.action = networks.mlp(width, 3), networks.mlp(width + 3, c.chunk * c.A)
        self.register_buffer("causal", networks.block_causal_mask(c.history, 1), persistent=False)
        shape = (len(c.task_names), c.goals, c.size, c.size, 3)
        self.register_buffer("goals", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("texts", torch.zeros(len(c.task_names), c.E))

    def train(self, mode=True):
        super().train(mode)
        if self.planner.frozen:
            self.planner.eval()     # frozen is more than no gradient
        return self

    def sets_of(self, batch):
        """The planner's token sets, kept or computed, and the encoders' {name: (B T, n, width)}."""
        flat = {k: v.flatten(0, 1) for k, v in batch.items()}
        sets = {k.removeprefix("set/"): v.float() for k, v in flat.items() if k.startswith("set/")}
        sets = sets or self.planner.plan(flat, self.form)
        sets = {k: self.scale[k](v) for k, v in sets.items() if k in self.scale}
        return sets | {view: networks.to_tokens(encoder(flat[view]))
                       for view, encoder in self.encoders.items()}

    def look(self, batch):
        """What is seen in each look, on its own, as tokens: CLS, state (standardised), sentence,
        one of each set (no plan if it joins late alone), pooled at its picture's shift.
        batch: state (B, T, S), text (B, T, E), wrist and, for encoders of its own, picture (B, T,
        H, W, 3) uint8, and the planner's sets, kept (set/<name> (B, T, n, width), moved (B, T, 3,
        2): how far the pictures were shifted, in widths) or obs to compute them from
        -> CLS token (B, T, D), the plans' tokens if they join late (B, T, D of each; else 0)."""
        B, T = batch["state"].shape[:2]
        batch, moved = shifted(batch, self.training)
        moved = moved.repeat_interleave(T, 0)                           # (B T, 3, 2)
        kept = batch["moved"].flatten(0, 1) if "moved" in batch else moved
        far = lambda name: moved if name in self.encoders else kept
        sets = self.sets_of(batch)                                      # (B T, n, .) each
        state = self.state(self.scale["state"](batch["state"])).flatten(0, 1)   # (B T, D)
        text = self.text(batch["text"]).flatten(0, 1)                   # (B T, D)
        tokens = {k: pool(sets[k], far(k)) for k, pool in self.pool.items()}    # (B T, D) each
        fusion = self.config.fusion
        early = [x for k, x in tokens.items() if fusion != "late" or k not in self.plans]
        late = [tokens[k] for k in self.plans if fusion != "early"]
        x = torch.stack([self.cls.expand_as(state), state, text, *early], 1)    # (B T, tokens, D)
        cls = self.space(x)[:, 0]                                       # (B T, D)
        late = torch.cat([cls[:, :0], *late], 1)                        # (B T, D of each)
        return cls.unflatten(0, (B, T)), late.unflatten(0, (B, T))

    def act(self, cls, late, state, waypoint=None):
        """Looks (B, T, D), late plans (B, T, .), states (B, T, S) -> features (B, T, .), actions
        (B, T, C, A) in about [-1, 1], waypoint (B, T, 3) metres; in training, the true `waypoint`.
        ours: first where to, in metres, then how: an action is clipped at a few centimetres of
        motion and holds little of a target further off. The waypoint, predicted as an offset from
        the hands' mean place, is where the demonstration's gripper next opens or closes; the head
        reads how far it is from the hand now, in training the true one, with WAYPOINT_NOISE."""
        T = cls.shape[1]
        x = self.time(cls + self.when[:T], self.causal[:T, :T])         # (B, T, D)
        x = torch.cat([x, late], -1)                                    # late fusion (ATM)
        there = self.waypoint(x).float() * OFFSET_SCALE + self.scale["state"].mean[:3]  # (B, T, 3)
        # teacher forcing: given poor predictions, the head would learn to ignore them
        aim = there if waypoint is None else waypoint + WAYPOINT_NOISE * torch.randn_like(there)
        offset = (aim - state[..., :3]) / OFFSET_SCALE
        action = self.action(torch.cat([x, offset.to(x.dtype)], -1))
        return x, action.unflatten(-1, (self.config.chunk, -1)), there

    def forward(self, batch):
        """batch as for `look`, in training with waypoint (B, T, 3) metres -> as `act`.
        ours: in training the state token has STATE_NOISE, or the hand's path alone is memorised."""
        state, waypoint = batch["state"], batch["waypoint"] if self.training else None
        noise = STATE_NOISE * self.training * torch.randn_like(state[..., :3])
        seen = batch | {"state": state + F.pad(noise, (0, state.shape[-1] - 3))}
        return self.act(*self.look(seen), state, waypoint)

    def loss(self, batch):
        """batch as for forward, and action (B, T, C, A) -> MSE of actions + 0.3 of waypoints', in
        units of OFFSET_SCALE; parts: motion, gripper (an action's last number), waypoint."""
        _, action, there = self(batch)
        error = F.mse_loss(action.float(), batch["action"], reduction="none")   # (B, T, C, A)
        waypoint = F.mse_loss(there / OFFSET_SCALE, batch["waypoint"] / OFFSET_SCALE)
        return error.mean() + 0.3 * waypoint, {
            "motion": error[..., :-1].mean().item(), "gripper": error[..., -1].mean().item(),
            "waypoint": waypoint.item()}


# --- data -----------------------------------------------------------------------------------------

def waypoints(position, gripper):
    """Where the hand is when its gripper's command next changes its sign (the first row with the
    new one), at the end if it does not. For FOLLOW steps from a change on, still the place of this
    change: the moment of closing is ambiguous, its place is not.
    position (T, 3) metres, gripper (T,) commands, > 0 to close -> (T, 3)."""
    changes = np.flatnonzero(np.diff(gripper > 0)) + 1
    passed = np.searchsorted(changes + FOLLOW, np.arange(len(gripper)), "right")    # (T,)
    return position[np.append(changes, len(gripper) - 1)[passed]]


class ActionData:
    """Batches for stage 2: looks of the action demonstrations, actions, goals from the videos."""

    def __init__(self, config, executor, demos, videos):
        self.c, self.executor, self.demos, self.videos = config, executor, demos, videos
        self.planner, self.execute = executor.planner, min(config.execute, config.chunk)
        self.episode = np.repeat(np.arange(len(demos.length)), demos.length)    # (frames,)
        self.t = np.arange(len(demos)) - demos.start[self.episode]
        gather = lambda key: demos.gather(key, self.episode, self.t)
        state = np.concatenate([gather(key) for key in STATE], -1)              # (frames, S)
        executor.scale["state"].fit(state)
        position, gripper = gather("obs/ee_states")[:, :3], gather("actions")[:, -1]
        self.waypoint = np.concatenate([waypoints(position[a:b], gripper[a:b])
                                        for a, b in zip(demos.start, demos.start[1:])])
        begin = time.time()
        self.kept, self.moved = self.compute() if self.planner.frozen else ({}, None)
        config.seconds["plans"] = round(time.time() - begin)
        for name, x in self.kept.items():
            executor.scale[name].fit(x.reshape(-1, x.shape[-1]))

    def goal_of(self, row, draw):
        """Goal number `draw` (...) of demonstration frame `row` (...): which video ends in it (see
        Episodes.goal_of). A demonstration is the video of the same number of its task."""
        episode = self.episode[row]
        task = self.demos.task[episode]
        first, count = np.searchsorted(self.videos.task, task), np.bincount(self.videos.task)[task]
        own = episode - np.searchsorted(self.demos.task, task)
        # a hash of the row: every run and every resumption use the same goals.  ours: those of one
        # window differ, so that more are seen; in acting an episode has one
        other = (own + 1 + (row * 7919 + draw * 104729) % np.maximum(1, count - 1)) % count
        return first + (own if self.demos.goal_varies else other)

    def obs(self, row, draw):
        """What a planner sees at demonstration frames `row` (...) with goal number `draw` (...)."""
        episode, demos = self.episode[row], self.demos
        past = look_times(self.t[row], self.planner.history, self.planner.stride)   # (..., h)
        return {"frames": demos.gather(CAMERA_OF["picture"], episode[..., None], past),
                "wrist": demos.gather(CAMERA_OF["wrist"], episode, self.t[row]),
                "goal": self.videos.last_frames(self.goal_of(row, draw)),
                "text": demos.text[demos.task[episode]],
                "hand": demos.gather("hand", episode, self.t[row]).astype(np.float32)}

    @torch.no_grad()
    def compute(self):
        """The frozen planner's sets of all frames, for each of DRAWS goals, the pictures shifted as
        an encoder's are, but for the first -> {name: (DRAWS, frames, n, width) float16, a file of
        the system's folder for temporary ones}, how far they have moved (DRAWS, frames, 3, 2)."""
        device, kept, N = next(self.executor.parameters()).device, {}, len(self.demos)
        moved = np.zeros((DRAWS, N, 3, 2), "f4")
        parts = [(episode, part)
                 for episode, rows in enumerate(np.split(np.arange(N), self.demos.start[1:-1]))
                 for part in np.array_split(rows, -(-len(rows) // 64))]
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.c.bf16)):
            for (episode, part), draw in tqdm([*product(parts, range(DRAWS))], "plans"):
                # the looks of a window (B, T) have one shift; where all have one look, each its own
                row, first = ((part[None], self.demos.start[episode]) if self.c.history > 1 else
                              (part[:, None], part[0]))             # (1, T) or (T, 1)
                torch.manual_seed((self.c.seed << 32) + DRAWS * int(first) + draw)
                obs = training.tensors(self.obs(row, np.full_like(row, draw)), self.executor)
                obs, far = shifted(obs, draw > 0)
                obs = {k: x.flatten(0, 1) for k, x in obs.items()}
                obs["moved"] = far.expand(len(part), -1, -1)
                moved[draw, part] = obs["moved"].cpu()
                for name, x in self.planner.plan(obs, self.executor.form).items():
                    if name not in self.executor.scale:
                        continue
                    if name not in kept:
                        kept[name] = mapped_array((DRAWS, N, *x.shape[1:]))
                    kept[name][draw, part] = x.half().cpu().numpy()
        return kept, moved

    def __call__(self, step):
        """The batch of one training step, a function of (seed, step); see Executor.look, loss."""
        c, demos = self.c, self.demos
        episode, t, rng = demos.sample_frames(step, c.batch, c.seed)
        draw = rng.integers(DRAWS, size=len(t))[:, None]                # (B, 1)
        times, e = look_times(t, c.history, self.execute), episode[:, None]     # (B, T)
        row, ahead = demos.start[e] + times, times[..., None] + np.arange(c.chunk)  # (B, T, C)
        batch = {"state": np.concatenate([demos.gather(k, e, times) for k in STATE], -1),
                 "action": demos.gather("actions", e[..., None], ahead),
                 "text": demos.text[demos.task[self.episode[row]]], "waypoint": self.waypoint[row]}
        batch |= {f"set/{k}": v[draw, row] for k, v in self.kept.items()}
        draw = np.broadcast_to(draw, row.shape)
        batch |= {"moved": self.moved[draw, row]} if self.kept else self.obs(row, draw)
        return batch | {view: self.videos.last_frames(self.goal_of(row, draw)) if view == "goal"
                        else demos.gather(CAMERA_OF[view], e, times)
                        for view in self.executor.encoders}


# --- acting ---------------------------------------------------------------------------------------

class Policy:
    """A trained executor as a closed loop, an actor of `rollout.play`."""

    def __init__(self, executor):
        self.executor, self.c, self.planner = executor.eval(), executor.config, executor.planner
        self.device = next(executor.parameters()).device
        self.execute = min(self.c.execute, self.c.chunk)

    def reset(self, sim, scene):
        """Starts an episode of sim's task: its sentence, and a goal picture, of this scene where
        each has a goal of its own, else of a video."""
        k, e = self.c.task_names.index(sim.task), self.executor
        goal = (torch.as_tensor(sim.goal_image(**scene)) if sim.goal_varies else
                e.goals[k, next(iter(scene.values())) % self.c.goals])
        self.fixed = {"goal": goal.to(self.device)[None], "text": e.texts[k][None]}
        self.pictures, self.looks, self.queue = [], [], []

    def observe(self, frame):
        """A frame of the simulator -> obs, a batch of one, as planners see it."""
        tensor = lambda key: torch.as_tensor(frame[key], device=self.device)[None]
        self.pictures.append(tensor("agentview_rgb"))
        now = self.execute * (len(self.pictures) - 1)
        times = look_times(now, self.planner.history, self.planner.stride)
        return self.fixed | {
            "frames": torch.stack([self.pictures[t // self.execute] for t in times], 1),
            "wrist": tensor("eye_in_hand_rgb"), "hand": tensor("hand").float()}

    @torch.no_grad()
    def __call__(self, sim):
        """The next action (A,) in [-1, 1]: looks when the last chunk's actions are used up. Each
        look is encoded once, `Executor.look`; the last `history` of them act, `Executor.act`."""
        if not self.queue:
            frame = sim.frame(masks=False)
            self.obs = obs = self.observe(frame)
            state = np.concatenate([frame[k.removeprefix("obs/")] for k in STATE])
            batch = {"state": torch.as_tensor(state, device=self.device)[None, None],
                     "picture": obs["frames"][:, -1:]}
            batch |= {k: obs[k][:, None] for k in ("wrist", "goal", "text")}
            batch |= {f"set/{k}": v[:, None]
                      for k, v in self.planner.plan(obs, self.executor.form).items()}
            look = *self.executor.look(batch), batch["state"]
            # before an episode's first look there is none: it is repeated, as in training
            self.looks = ((self.looks or [look] * self.c.history) + [look])[-self.c.history:]
            cls, late, states = (torch.cat(x, 1) for x in zip(*self.looks))     # (1, T, .)
            chunk = self.executor.act(cls, late, states)[1][0, -1]              # (C, A)
            self.queue = list(chunk.float().clamp(-1, 1).cpu().numpy()[:self.execute])
        return self.queue.pop(0)

    def finished(self, success):
        return success      # at any step, as LIBERO and Meta-World count

    def limit(self, sim):
        return sim.horizon

    def draw(self, sim):
        """The third-person picture, what the planner draws of its plan, the wrist picture."""
        from core.draw import row
        frame = sim.frame()
        masks = torch.as_tensor(frame["masks"], device=self.device)[None]       # (1, H, W)
        plan = self.planner.draw(self.obs | {"masks": masks})
        return row([("now", frame["agentview_rgb"]), *plan, ("wrist", frame["eye_in_hand_rgb"])])


def load_executor(path, device="cpu", Kind=Executor):
    """A trained executor with its planner, from its checkpoint alone."""
    content = training.load(path, Kind.kind, Kind.made_by)
    config = from_dict(Config, content["config"])
    executor = Kind(config, build(config.kind, config.planner_config))
    executor.load_state_dict(content["model"])
    return executor.to(device).eval().requires_grad_(False)


# --- command --------------------------------------------------------------------------------------

def prepare(config, Kind=Executor):
    """-> a new executor, of class Kind, on its planner, Episodes of the demonstrations and of the
    videos, the path of the checkpoint."""
    from demos.record import load_demos
    c, c.plan = config, Path(config.planner).stem
    c.differs = differences(c, {"action_demos", "seed"})
    trained = c.planner.endswith(".pt")
    planner = load_planner(c.planner, c.device) if trained else untrained(c.planner)
    if (c.form or planner.forms[0]).removesuffix("+goal") not in planner.forms:
        fail(f"--form {c.form}: {c.planner} has {' and '.join(planner.forms)}")
    if planner.history > 1 and planner.stride % (execute := min(c.execute, c.chunk)):
        fail(f"the planner's frames are {planner.stride} steps apart, no multiple of the {execute} "
             "steps between looks: give another --chunk")
    of = asdict(planner.config) if trained else {}
    known = suites(planner.config) if "suite" in of else {}
    c.suite = c.suite or (*known, "libero_spatial")[0]
    if known and c.suite not in known:
        c.plan += f"_of-{of['suite']}"
    path = training.run_path(c, f"{c.plan}_{Kind.kind}")
    c.size = of.get("size", c.size)
    demos, videos = load_demos(c, c.tasks or of.get("tasks", "") * (c.suite in known))
    c.env, c.task_names, c.render = videos.env, tuple(videos.tasks), videos.render
    if c.suite != c.env:    # tabled in the suite that it was made from, as mask_sam
        c.plan += "_" + c.suite.removeprefix(c.env).lstrip("_")
    c.E, c.A = videos.text.shape[1], demos.arrays["actions"][0].shape[1]
    c.goals = 0 if videos.goal_varies else c.goals
    c.seconds = {"data": round(videos.seconds), "planner": training.last_seconds(c.planner)}
    torch.manual_seed(c.seed)
    if not trained:
        planner = planner(planner.Config(size=c.size, E=c.E, width=c.width, blocks=c.blocks,
                                         channels=c.channels))
    c.form, c.kind = c.form or planner.forms[0], planner.kind
    c.planner_config = asdict(planner.config)
    executor = Kind(c, planner).to(c.device)
    executor.texts.copy_(torch.as_tensor(videos.text))
    for k in range(len(c.task_names) if c.goals else 0):
        last = np.flatnonzero(videos.task == k)[::-1]   # the first ones lend their actions
        executor.goals[k] = torch.as_tensor(videos.last_frames(np.resize(last, c.goals)))
    training.resume(executor, c, path)  # refuses another configuration before plans are computed
    return executor, demos, videos, path


def main(argv=None):
    """Command line: trains one executor."""
    config = parse(Config, "Stage 2: learn actions from plans and a few demonstrations.", argv)
    executor, demos, videos, path = prepare(config)
    note = f"{config.planner}, {config.action_demos} demonstrations per task, {len(demos)} frames"
    training.fit(executor, ActionData(config, executor, demos, videos), config, path, note=note)
    print(f"next: python rollout.py {path}")


if __name__ == "__main__":
    main()
