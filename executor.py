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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import baselines
import core
import extract
import sims
import train
from core import flag
from policy import PLANNERS, Executor
from tracks import STEPS

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
    track_length: int = flag(STEPS, "steps of the planned tracks that it hears (ATM, Fig. 9)",
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
        return name + f"-{config.track_length}steps" * (config.track_length != STEPS)
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
    content = train.load(path, kind=Executor.kind,
                         made_by="python executor.py --planner runs/<suite>/mask.pt")
    executor = Executor(core.from_dict(Config, content["config"]), content["extra"])
    executor.load_state_dict(content["model"])
    return executor.to(device).eval().requires_grad_(False)


def settle(config, planner):
    """Fills in what the planner decides; refuses flags that do not go together."""
    for name, usual in (("goal", None), ("encoder", "own"), ("labels", "true")):
        value = getattr(config, name)
        if planner and value != usual:
            core.fail(f"--{name} {value} is for --planner none: {config.planner} brings its own")
    if (config.encoder == "r3m") != bool(config.weights):
        core.fail("--encoder r3m and --weights go together: R3M's encoders start from that file")
    if planner:
        config.suite, config.demos = planner.config.suite, planner.config.demos
        config.tasks = config.tasks or planner.config.tasks
    taught = getattr(planner and planner.config, "action_demos", 0)
    if taught > config.action_demos:
        core.fail(f"--action-demos {config.action_demos}: {config.planner} itself has learned from "
                  f"{taught} demonstrations per task; train one with python feature_planner.py "
                  f"--suite {config.suite} --action-demos {config.action_demos} --out runs/few")
    forms = planner.forms if planner else ["latent"]
    config.plan_form = config.plan_form or forms[0]
    if config.plan_form not in forms:
        core.fail(f"--plan-form {config.plan_form}: {config.planner} can give {' or '.join(forms)}")
    if config.plan_form == "tracks" and config.preset == "paper":
        for name, value in Config.TABLE_VII.items():  # but what a flag says
            if getattr(config, name) in (getattr(Config, name), Config.PRESETS["paper"].get(name)):
                setattr(config, name, value)
    config.batch = config.batch or (128 if planner and config.plan_form == "explicit" else 32)
    if config.action_demos > config.demos:
        core.fail(f"--action-demos {config.action_demos} is more than the {config.demos} videos: "
                  f"give --demos {config.action_demos}")


def build(config):
    """Planner, data and a new executor -> executor, ActionData, path of its checkpoint."""
    if not config.planner:
        core.fail("no --planner: give a checkpoint of stage 1 (python mask_planner.py makes "
                  "runs/<suite>/mask.pt), or none")
    planner, about = None, None
    if config.planner != "none":
        content = train.load(config.planner, made_by="python mask_planner.py (or track_planner.py)")
        if content.get("kind") not in PLANNERS:
            core.fail(f"{config.planner} holds a model of kind '{content.get('kind')}', not a "
                      f"planner: {', '.join(PLANNERS)}")
        planner = PLANNERS[content["kind"]][1].load_planner(config.planner, config.device)
        about = {"kind": planner.kind, "config": core.as_dict(planner.config),
                 "arguments": planner.arguments}
    settle(config, planner)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not planner:
        extract.ensure(config.suite, names, config.demos, config.data,
                       extract.Config.PRESETS[config.preset]["size"])
    videos = extract.Episodes(config.data, config.suite, names, config.demos)
    demos = extract.Episodes(config.data, config.suite, names, config.action_demos)
    if planner and planner.config.size != videos.size:
        core.fail(f"{config.planner} was trained on {planner.config.size} px, {config.data}/ "
                  f"holds {videos.size} px: give the --data folder it was trained on")
    goals = 0 if sims.is_metaworld(config.suite) else min(GOALS, config.demos)
    extra = {"planner": about, "E": videos.text.shape[1], "suite": config.suite, "tasks": names,
             "size": videos.size, "render": videos.render,
             "action_dim": videos.arrays["actions"][0].shape[1], "goals": goals,
             "seconds": {"data": round(videos.seconds),
                         "planner": train.last_seconds(config.planner)}}
    torch.manual_seed(config.seed)
    if config.encoder == "r3m":
        weights, extra["resnet"] = baselines.read_r3m(config.weights)
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
        demos = baselines.vpt(demos, videos, config, path.with_stem(path.stem + "_inverse"),
                              executor.keys)
    return executor, ActionData(config, executor, demos, videos), path


def main(argv=None):
    """Command line: trains one executor."""
    config = core.parse(Config,
                        "Stage 2 of Mask2Act: learn actions from plans and a few demonstrations.",
                        argv)
    executor, data, path = build(config)
    note = (f"plan {plan_name(config)}, {config.action_demos} action demonstrations per task, "
            f"{len(data.demos)} frames")
    train.fit(executor, data, config, path, note=note, extra=executor.extra)
    print(f"next: python rollout.py {path}")


if __name__ == "__main__":
    main()
