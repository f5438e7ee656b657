"""PLEX as Mask2Act compares it: the plan says what the encoder will see in the future picture.

    python feature_planner.py --suite mt10              # makes the data first if there is none
    python feature_planner.py --suite mt10 --show       # the plan, as the most similar pictures

The same network P as in `mask_planner.py`, without masks: from goal picture and frames it predicts
the features of the frames to come.  PLEX stops this loss's gradient at its target and at its
inputs, so the encoder learns from something else: to tell from two pictures which actions lie
between them, which needs the few action-labelled demonstrations, as in PLEX's first stage.

Sizes: B batch, n tokens per picture, D width, K horizons, C actions, H W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import mask_planner
from core import training
from core.draw import caption
from core.episodes import Episodes
from core.flags import flag, from_dict, parse
from demos import record

BETWEEN = 8     # control steps between the two pictures that tell the actions, C


@dataclass
class Config(mask_planner.PlannerConfig):
    action_demos: int = flag(10, "action-labelled demonstrations per task (the first of the "
                             "videos), for the encoder", minimum=1)


# --- planner --------------------------------------------------------------------------------------

class FeaturePlanner(mask_planner.Planner):
    """P, its word on the features to come, and the inverse dynamics that its encoder learns by."""
    kind, forms = "feature_planner", ["latent"]

    def __init__(self, config, A):
        """A  numbers per action"""
        super().__init__(config)
        self.arguments = [A]
        D = config.width
        self.future = nn.Linear(D, len(mask_planner.HORIZONS) * D)
        self.inverse = nn.Sequential(nn.Linear(2 * self.n * 16, 256), nn.GELU(),
                                     nn.Linear(256, BETWEEN * A))
        self.thin = nn.Linear(D, 16)

    def predict(self, plan):
        """Plan tokens (B, n, D) -> features of the pictures to come (B, K, n, D), unit variance."""
        return self.future(plan).unflatten(-1, (len(mask_planner.HORIZONS), -1)).transpose(1, 2)

    def actions(self, now, then):
        """Features of two pictures (B, n, D), BETWEEN steps apart -> the actions between them
        (B, C, A)."""
        x = self.thin(torch.cat([now, then], 1)).flatten(1)                 # (B, 2 n 16)
        return self.inverse(F.gelu(x)).unflatten(1, (BETWEEN, -1))

    def loss(self, batch):
        """batch: frames (B, T, H, W, 3), future (B, K, H, W, 3), goal (B, H, W, 3) uint8; pair
        (B, 2, H, W, 3) uint8 of the demonstrations and the action (B, C, A) between -> scalar,
        parts."""
        seen = torch.cat([batch["goal"][:, None], batch["frames"], batch["future"]], 1)
        with torch.no_grad():               # PLEX: neither inputs nor target teach the encoder
            x = self.encode(seen)                                           # (B, 1 + T + K, n, D)
        K = len(mask_planner.HORIZONS)
        plan = self.plan_from(x[:, :-K])[:, -1]                             # (B, n, D)
        # differs: features of unit variance; else a small change of all of them is a small loss
        target = standard(x[:, -K:])
        future = F.mse_loss(self.predict(plan).float(), target)
        now, then = self.encode(batch["pair"]).unbind(1)
        inverse = F.mse_loss(self.actions(now, then).float(), batch["action"])
        return future + inverse, {"future": future.item(), "inverse": inverse.item()}


def standard(x):
    """Features (..., D), each token's with mean 0 and variance 1."""
    return F.layer_norm(x.float(), x.shape[-1:])


# --- data -----------------------------------------------------------------------------------------

def make_batch(episodes, step, config, demos=None):
    """Frames, goals and frames to come of a step, as a dict of arrays (see FeaturePlanner.loss);
    demos: Episodes whose actions are known, half as many samples of these."""
    episode, t, rng = mask_planner.draw_frames(episodes, step, config)
    past = t[:, None] + config.stride * np.arange(1 - config.history, 1)    # (B, T)
    goal = episodes.goal_of(episode, rng)
    picture = "obs/agentview_rgb"
    batch = {"frames": episodes.gather(picture, episode[:, None], past),
             "goal": episodes.gather(picture, goal, episodes.length[goal] - 1),
             "future": episodes.gather(picture, episode[:, None], t[:, None] + np.array(mask_planner.HORIZONS))}
    if demos:
        e, t, _ = demos.draw(step, config.batch // 2, config.seed + 1)
        batch |= {"pair": demos.gather(picture, e[:, None], t[:, None] + np.array([0, BETWEEN])),
                  "action": demos.gather("actions", e[:, None], t[:, None] + np.arange(BETWEEN))}
    return batch


@torch.no_grad()
def validate(planner, episodes, samples=300):
    """Mean squared error of the predicted features, of unit variance, on held-out episodes ->
    {"plan" | "stay": (K,)}; stay: the present picture's features."""
    device, found = next(planner.parameters()).device, {"plan": [], "stay": []}
    planner.eval()
    for step in range(-(-samples // planner.config.batch)):
        batch = make_batch(episodes, 10 ** 6 + step, planner.config)
        batch = {k: torch.as_tensor(v, device=device) for k, v in batch.items()}
        target = standard(planner.encode(batch["future"]))                  # (B, K, n, D)
        plan = planner(batch["frames"], batch["goal"])[:, -1]
        for name, guess in (("plan", planner.predict(plan)),
                            ("stay", standard(planner.encode(batch["frames"][:, -1:])))):
            found[name].append((guess - target).square().mean((0, 2, 3)).cpu().numpy())
    return {name: np.mean(rows, 0) for name, rows in found.items()}


def table(scores):
    """The scores of `validate` as lines of text."""
    lines = ["held-out error of features" + "".join(f"{f'+{k}':>7s}" for k in mask_planner.HORIZONS)]
    return "\n".join(lines + [f"  {name:24s}" + "".join(f"{x:7.3f}" for x in row)
                              for name, row in scores.items()])


@torch.no_grad()
def show(planner, episodes, rows=6, seed=3, bank=400):
    """Rows of (goal, now; and for every horizon the picture, among `bank` others, whose features
    are the most like those predicted, and the true one) -> (., ., 3) uint8."""
    device = next(planner.parameters()).device
    tensor = lambda x: torch.as_tensor(x, device=device)
    others, t, _ = episodes.draw(1, bank, seed)
    pictures = episodes.gather("obs/agentview_rgb", others, t)
    known = torch.cat([standard(planner.encode(tensor(p))) for p in np.array_split(pictures, 8)])
    batch = make_batch(episodes, seed, planner.config)
    batch = {k: v[-rows:] for k, v in batch.items()}    # the first ones are of early frames
    said = planner.predict(planner(tensor(batch["frames"]), tensor(batch["goal"]))[:, -1])
    lines = []
    for b in range(len(said)):
        cells = [batch["goal"][b], batch["frames"][b, -1]]
        for k in range(len(mask_planner.HORIZONS)):
            off = (known - said[b, k]).square().mean((1, 2))                # (bank,)
            cells += [pictures[off.argmin().item()], batch["future"][b, k]]
        lines.append(np.concatenate(cells, 1))
    titles = ["goal", "now"] + [f"{w} +{k}" for k in mask_planner.HORIZONS for w in ("plan", "true")]
    blank = np.full((1, pictures.shape[2], 3), 255, np.uint8)
    return np.concatenate([np.concatenate([caption(blank, w) for w in titles], 1), *lines])


def load_planner(path, device="cpu"):
    """A trained FeaturePlanner, frozen."""
    content = training.load(path, FeaturePlanner.kind, "python feature_planner.py --suite mt10")
    planner = FeaturePlanner(from_dict(Config, content["config"]), content["extra"]["A"])
    planner.load_state_dict(content["model"])
    return planner.to(device).eval().requires_grad_(False)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    config = parse(Config, "PLEX: learn from video what the future picture's features are.",
                        argv)
    path = record.run_path(config, "feature")
    videos, held_out, note = record.prepare(config, path, "feature_planner")
    demos = Episodes(config.data, config.suite, held_out.tasks, config.action_demos)
    torch.manual_seed(config.seed)
    if config.show:
        planner = load_planner(path, config.device)
    else:
        A = demos.arrays["actions"][0].shape[1]
        planner = training.fit(FeaturePlanner(config, A),
                            lambda step: make_batch(videos, step, config, demos), config, path,
                            lambda p: show(p, held_out), note, {"A": A})
    record.report(config, path, table(validate(planner, held_out)), lambda: show(planner, held_out))


if __name__ == "__main__":
    main()
