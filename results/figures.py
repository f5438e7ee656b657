"""The plot of success against demonstrations."""

import numpy as np

import sims

COLOURS = {"none": "#888888", "mask": "#d62728", "mask-explicit": "#1f77b4", "expert": "#2ca02c",
           "track": "#9467bd", "track-latent": "#e377c2", "ee": "#ff7f0e",
           "video-latent": "#8c564b", "feature": "#17becf", "unipi": "#bcbd22",
           "unipi-replan": "#7f7f00"}


def plot(rows, path):
    """Success against action demonstrations per task, one line per plan and suite, with 95 %
    intervals; of the plans in COLOURS, their variants being in the table."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    learned = [r for r in rows if r["action_demos"] and r["plan"] in COLOURS and not r["unseen"]
               and r["of"] == len(sims.tasks(r["suite"]))]
    suites = sorted({r["suite"] for r in learned})
    if not suites:
        return
    figure, axes = plt.subplots(1, len(suites), figsize=(4.5 * len(suites) + 1.5, 3.6),
                                squeeze=False, layout="constrained")
    lines, plans = {}, sorted({r["plan"] for r in learned})
    for axis, suite in zip(axes[0], suites):
        for k, plan in enumerate(plans):
            line = [r for r in learned if (r["suite"], r["plan"]) == (suite, plan)]
            if not line:
                continue
            # a little apart, or bars hide each other
            x = [r["action_demos"] * 1.02 ** (k - len(plans) / 2) for r in line]
            y = [100 * r["success"] / r["episodes"] for r in line]
            low, high = np.array([r["interval"] for r in line]).T * 100
            lines[plan] = axis.errorbar(x, y, [y - low, high - y], marker="o", capsize=3,
                                        color=COLOURS.get(plan))
        axis.set(title=suite, xlabel="action demonstrations per task", ylabel="success, %",
                 ylim=(0, 100), xscale="log")
        ticks = sorted({r["action_demos"] for r in learned if r["suite"] == suite})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend([lines[p] for p in plans], plans, loc="outside right center")
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")
