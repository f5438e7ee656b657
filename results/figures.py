"""Figures of results.

    python -m results.figures curve         # success against action demonstrations
    python -m results.figures unseen        # scenes of libero_spatial, as in training and unseen
    python -m results.figures keypoints runs/libero_spatial/mask_executor.pt    # ATM, Fig. 10
"""

from dataclasses import dataclass

import numpy as np
import torch

import rollout
import sims
from core.draw import draw_heat, row, save_picture
from core.files import fail
from core.flags import flag, parse
from executor import Policy, load_executor
from results import tables


@dataclass
class Config(tables.Config):
    what: tuple[str, ...] = flag((), "curve, unseen, or keypoints and an executor's "
                                 "checkpoint", positional=True)
    tasks: str = flag("0,4", "numbers or names of tasks, comma-separated; empty: all")


def curve(config, _):
    """Success on test scenes, a line per plan with 95 % intervals, a panel per suite."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    if not (rows := tables.main_rows(config.results)):
        fail(f"no success rates in {config.results}/: python rollout.py <checkpoint> makes one")
    suites, plans = (sorted({r[key] for r in rows}) for key in ("suite", "plan"))
    figure, axes = plt.subplots(1, len(suites), squeeze=False, sharey=True, layout="constrained",
                                figsize=(4.5 * len(suites) + 1.5, 3.6))
    for axis, suite in zip(axes[0], suites):
        for k, plan in enumerate(plans):
            line = [r for r in rows if (r["suite"], r["plan"]) == (suite, plan)]
            x = [r["action_demos"] * 1.02 ** (k - len(plans) / 2) for r in line]    # bars apart
            y = np.array([r["rate"] for r in line])                                 # (points,)
            low, high = np.array([r["interval"] for r in line]).reshape(-1, 2).T
            axis.errorbar(x, y, [y - low, high - y], fmt=f"C{k % 10}o-", capsize=3, label=plan)
        axis.set(title=suite, xlabel="action demonstrations per task", ylim=(0, 1), xscale="log")
        axis.set_xticks(ticks := sorted({r["action_demos"] for r in rows}), ticks)
        axis.minorticks_off()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path := f"{config.results}/curve.png", dpi=110)
    return path


def unseen(config, _):
    """A row per task: a scene as in training and in all unseen variants (Mask2Act, Fig. 7)."""
    rows = []
    for task in sims.choose_tasks("libero_spatial", config.tasks):
        views = []
        for variant in (None, *sims.UNSEEN):
            sim = sims.make("libero_spatial", task, 192, unseen=variant)
            views.append((variant or "as in training", sim.reset(seed=0)["agentview_rgb"]))
            sim.close()
        rows.append(row(views, 1))
    save_picture(path := f"{config.results}/unseen.png", np.concatenate(rows))
    return path


@torch.no_grad()
def keypoints(config, path):
    """Where on the third-person picture the executor's key points lie, the mean of their shares, in
    a task's first test scene up to about the grasp, a row per task.  differs: ATM's Fig. 10 has the
    attention of its CLS token, which also depends on the plan."""
    actor, looks, rows = Policy(load_executor(path)), [], []
    c, e = actor.c, actor.executor
    e.pool["picture"].register_forward_pre_hook(
        lambda pool, inputs: looks.append(pool.shares(inputs[0]).mean(-1)[0].cpu().numpy()))  # (n,)
    for task in sims.choose_tasks(c.env, config.tasks):
        sim, views = sims.make(c.env, task, c.size, c.render), []
        looks.clear()
        rollout.play(sim, actor, {"init": 0})
        sim.close()
        for k in np.linspace(0, len(looks) // 2, 3).astype(int):
            image = actor.pictures[k][0].cpu().numpy()
            views += [(f"look {k}", image), (task, draw_heat(image, looks[k]))]
        rows.append(row(views, 2))
    save_picture(path := path.removesuffix(".pt") + "_keypoints.png", np.concatenate(rows))
    return path


def main(argv=None):
    """Command line: makes one figure."""
    config = parse(Config, "Figures of results.", argv)
    makers = {f.__name__: f for f in (curve, unseen, keypoints)}
    name, path = (*config.what, "", "")[:2]
    if name not in makers:
        fail("give curve, unseen or keypoints <checkpoint>")
    print(f"{name}: {makers[name](config, path)}")


if __name__ == "__main__":
    main()
