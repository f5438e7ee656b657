"""Figures of results, and what an executor costs.

    python -m results.figures curve     # success against action demonstrations, results/curve.png
    python -m results.figures attention runs/libero_spatial/track_executor.pt   # ATM, Fig. 10
    python -m results.figures cost runs/libero_spatial/track_executor.pt        # ATM, Table IV
    python -m results.figures unseen --tasks 0,4    # Mask2Act, Fig. 7: results/unseen.png
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import rollout
import sims
from core import training
from core.draw import caption, draw_heat, row, save_picture
from core.files import fail, write
from core.flags import flag, parse
from executor import Executor, Policy, load_executor
from results import tables
from video_control.unipi import InverseDynamics, UniPi


@dataclass
class Config:
    what: tuple[str, ...] = flag((), "curve, attention, cost or unseen; then checkpoints of "
                                 "executors", positional=True)
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    replan: int = flag(0, "UniPi's cost: steps after which it imagines anew; 0: never", minimum=0)
    size: int = flag(192, "height and width of pictures of unseen variants, pixels", minimum=32)
    results: str = flag("results", "folder of the results")


def curve(config):
    """Success against action demonstrations, one line per plan, one panel per suite, 95 %
    intervals; of all evaluations on test scenes as they were trained on -> path of the picture."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    rows = [r for r in tables.cells(config.results)
            if r["action_demos"] and r["scenes"] == "test" and not r["unseen"]]
    suites, plans = (sorted({r[key] for r in rows}) for key in ("suite", "plan"))
    if not rows:
        fail(f"no success rates in {config.results}/: python rollout.py <checkpoint> makes one")
    figure, axes = plt.subplots(1, len(suites), figsize=(4.5 * len(suites) + 1.5, 3.6),
                                squeeze=False, layout="constrained")
    for axis, suite in zip(axes[0], suites):
        for k, plan in enumerate(plans):
            line = [r for r in rows if (r["suite"], r["plan"]) == (suite, plan)]
            x = [r["action_demos"] * 1.02 ** (k - len(plans) / 2) for r in line]    # bars apart
            y = 100 * np.array([r["rate"] for r in line])                           # (points,)
            low, high = 100 * np.array([r["interval"] for r in line]).reshape(-1, 2).T
            axis.errorbar(x, y, [y - low, high - y], marker="o", capsize=3, color=f"C{k}", label=plan)
        axis.set(title=suite, xlabel="action demonstrations per task", ylabel="success, %",
                 ylim=(0, 100), xscale="log")
        ticks = sorted({r["action_demos"] for r in rows})
        axis.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path := Path(config.results) / "curve.png", dpi=110)
    return path


def shares(transformer, x):
    """How much the first token attends to each, mean over blocks and heads: x (1, L, D) -> (L,)."""
    found = []
    for block in transformer.blocks:
        q, k, _ = block.split(x, 1)                                     # (1, heads, 1 or L, d)
        score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        found.append(score.softmax(-1)[0, :, 0])                        # (heads, L)
        x = block(x)
    return torch.stack(found).mean((0, 1))


class Attention(Policy):
    """A policy whose films show where on the third-person picture its CLS token attends, with all
    tokens and without the plan's (ATM, Fig. 10)."""

    def __init__(self, executor):
        super().__init__(executor)
        executor.space.register_forward_pre_hook(lambda _, x: setattr(self, "tokens", x[0]))

    @torch.no_grad()
    def draw(self, sim):
        e = self.executor
        names = ["CLS", "state", *e.pool]                               # of each token (L,)
        names += [k + "'s" for k, m in e.embed.items() for _ in m.places]
        views = [("now", image := self.pictures[-1][0].cpu().numpy())]
        for title, hidden in (("with the plan", ()), ("without", e.plans)):
            kept = [i for i, name in enumerate(names) if name.removesuffix("'s") not in hidden]
            share = shares(e.space, self.tokens[:, kept]).cpu().numpy()
            cells = share[[names[i] == "picture's" for i in kept]]      # (n,)
            views.append((title, draw_heat(image, cells)))
        return row(views, 2)


def attention(config, count=4, columns=3):
    """A row per task, its first test scene up to about the grasp -> paths of the pictures."""
    paths = [path.removesuffix(".pt") + "_attention.png" for path in config.what[1:]]
    for path, made in zip(config.what[1:], paths):
        actor, rows = Attention(load_executor(path)), []
        if "picture" not in actor.executor.embed or not actor.executor.plans:
            fail(f"{path} has no attention from a plan to a picture: train it with --read both")
        known = ",".join(actor.c.task_names)
        for task in sims.choose_tasks(actor.c.env, config.tasks or known)[:count]:
            sim = sims.make(actor.c.env, task, actor.c.size, actor.c.render)
            pictures = rollout.play(sim, actor, {"init": 0}, film=True)[3]
            sim.close()
            chosen = np.linspace(0, len(pictures) // 2, columns).astype(int)
            rows.append(caption(np.concatenate([pictures[i] for i in chosen], 1), task))
        save_picture(made, np.concatenate(rows))
    return ", ".join(paths)


def operations(path, replan=0, steps=600):
    """Floating point operations of planner and executor in an episode of that length, counted by
    torch, a multiplication and an addition as two -> operations, parameters of both."""
    from torch.utils.flop_counter import FlopCounterMode
    kind = training.load(path, ["executor", "unipi"], rollout.MADE_BY)["kind"]
    policy = (Policy(load_executor(path)) if kind == Executor.kind else
              UniPi(load_executor(path, Kind=InverseDynamics), replan))
    black = np.zeros((policy.c.size, policy.c.size, 3), np.uint8)
    seen = {"agentview_rgb": black, "eye_in_hand_rgb": black, "hand": np.zeros(2, np.float16),
            "ee_states": np.zeros(6, np.float32), "gripper_states": np.zeros(2, np.float32)}
    sim = SimpleNamespace(task=policy.c.task_names[0], goal_varies=True,
                          goal_image=lambda **scene: black, frame=lambda masks: seen)
    policy.reset(sim, {"init": 0})
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            policy(sim)
    return counter.get_total_flops(), sum(p.numel() for p in policy.executor.parameters())


def cost(config):
    """A JSON for each checkpoint -> their paths."""
    paths = []
    for path in config.what[1:]:
        (flops, parameters), c = operations(path, config.replan), training.load(path)["config"]
        name = Path(path).stem + f"-replan{config.replan}" * bool(config.replan)
        made = {"suite": c["env"], "preset": c["preset"], "cost_of": name, "tflops": flops / 1e12,
                "parameters": parameters, "command": rollout.command(), "commit": rollout.commit()}
        paths.append(f"{config.results}/{c['env']}_{name}_{c['preset']}_cost.json")
        write(paths[-1], json.dumps(made, indent=1) + "\n")
    return ", ".join(paths)


def unseen(config):
    """A row per task of libero_spatial: one scene as in training and in the unseen variants."""
    rows = []
    for task in sims.choose_tasks("libero_spatial", config.tasks):
        views = []
        for variant in (None, *sims.UNSEEN):
            sim = sims.make("libero_spatial", task, config.size, unseen=variant)
            views.append((variant or "as in training", sim.reset(seed=0)["agentview_rgb"]))
            sim.close()
        rows.append(row(views, 1))
    save_picture(path := f"{config.results}/unseen.png", np.concatenate(rows))
    return path


def main(argv=None):
    """Command line: makes one kind of figure."""
    config, kinds = parse(Config, "Figures of results.", argv), (curve, attention, cost, unseen)
    makers = {f.__name__: f for f in kinds}
    name, *checkpoints = config.what or [""]
    if name not in makers or bool(checkpoints) != (name in ("attention", "cost")):
        fail(f"give {', '.join(makers)}; the two in the middle with executors' checkpoints")
    print(f"{name}: {makers[name](config)}")


if __name__ == "__main__":
    main()
