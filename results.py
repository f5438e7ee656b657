"""The results of evaluations: one JSON each with its interval, README's tables, the plot.

`python rollout.py` writes the JSON files, `python rollout.py --table` makes the rest from them.
"""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import core
import executor
import sims
import tables
import train
import unipi

COLOURS = {"none": "#888888", "mask": "#d62728", "mask-explicit": "#1f77b4", "expert": "#2ca02c",
           "track": "#9467bd", "track-latent": "#e377c2", "ee": "#ff7f0e",
           "video-latent": "#8c564b", "feature": "#17becf", "unipi": "#bcbd22",
           "unipi-replan": "#7f7f00"}


def wilson(k, n, z=1.96):
    """95 % Wilson interval of k successes in n episodes -> (low, high)."""
    p, zz = k / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * np.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def commit():
    """The source's git commit, '+' if the code was changed since; None outside a repository."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True,
                                        cwd=Path(__file__).parent).stdout.strip()
    changed = bool(git("status", "--porcelain", "-uno", "*.py"))
    return git("rev-parse", "--short", "HEAD") + "+" * changed or None


def command():
    """The command that is running, as in README."""
    return "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def of_checkpoint(checkpoint, replan=0):
    """What an executor's checkpoint says of itself: plan, preset, demonstrations, seed, steps; and
    the seconds that data, planner and executor took."""
    content = train.load(checkpoint, kind=unipi.KINDS)
    c = core.from_dict(executor.Config, content["config"])
    again = "-replan" * bool(replan)            # UniPi only
    plan = content["extra"].get("plan", executor.plan_name(c)) + again
    about = {"plan": plan, "preset": c.preset, "videos": c.demos, "action_demos": c.action_demos,
             "seed": c.seed, "steps": content["step"]}
    return about, content["extra"]["seconds"] | {"executor": train.last_seconds(checkpoint)}


def write_cost(folder, suite, checkpoint, replan, flops, parameters):
    """results/<suite>_<plan>_<preset>_cost.json: what 600 steps of an executor cost -> its path."""
    about, _ = of_checkpoint(checkpoint, replan)
    r = {"cost_of": about["plan"], "suite": suite, "preset": about["preset"],
         "tflops": flops / 1e12, "parameters": parameters, "command": command(), "commit": commit()}
    path = Path(folder) / f"{suite}_{about['plan']}_{about['preset']}_cost.json"
    core.write(path, json.dumps(r, indent=1) + "\n")
    return path


def counted(outcome):
    """One task's [(success, steps), ...], of a demonstrator with success at any step as the third
    -> what the JSON says of it."""
    success, steps, *ever = zip(*outcome)
    return {"success": sum(success), "episodes": len(outcome),
            "steps": round(float(np.mean(steps)), 1)} | {"ever": sum(count) for count in ever}


def result(config, checkpoint, suite, outcomes, seconds):
    """The JSON of one evaluation; design and names as in README."""
    tasks = {t: counted(o) for t, o in outcomes.items()}
    k, n = (sum(t[key] for t in tasks.values()) for key in ("success", "episodes"))
    about = {"suite": suite, "plan": "expert", "preset": None, "videos": None, "action_demos": None,
             "seed": None}
    spent = {}
    if checkpoint:
        said, spent = of_checkpoint(checkpoint, config.replan)
        about |= said
    # the bundled states do not fit the objects of most unseen variants
    seeded = sims.is_metaworld(suite) or config.unseen not in (None, "background")
    kept = f"seeds from {sims.EVALUATION}" if seeded else "bundled initial states"
    about["scenes"] = kept if config.scenes is None else f"seeds from {config.scenes}"
    ever = sims.is_metaworld(suite) or checkpoint
    about["counts"] = "ever succeeded" if ever else "success at the end"
    if config.noise:
        about["noise"] = config.noise
    return about | {
        "success": k, "episodes": n, "interval": [round(x, 4) for x in wilson(k, n)],
        "tasks": tasks, "unseen": config.unseen,
        "command": command(), "commit": commit(), "versions": sims.versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {config.device}",
        "seconds": spent | {"rollout": round(seconds)}}


def result_path(folder, r):
    """results/<suite>_<plan>_<preset>_d<action demos>_s<seed>.json; the expert's has neither demos
    nor seed.

    What is not all tasks on the bundled states says so in its name, and never takes a full result's
    place.
    """
    name = f"{r['suite']}_{r['plan']}"
    if r["plan"] != "expert":
        name += f"_{r['preset']}_d{r['action_demos']}_s{r['seed']}"
    if len(r["tasks"]) < len(sims.tasks(r["suite"])):
        name += f"_{len(r['tasks'])}tasks"
    if "bundled" not in r["scenes"] and str(sims.EVALUATION) not in r["scenes"]:
        name += "_" + r["scenes"].replace(" ", "_")
    if r["unseen"]:
        name += f"_unseen_{r['unseen']}"
    return Path(folder) / f"{name}.json"


def evaluations(folder):
    """What the JSON files of evaluations hold; other results, such as extract.py's grades, are not
    of policies."""
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return [r for r in found if "plan" in r]


def pooled(folder):
    """All results, training seeds pooled -> list of dicts with suite, plan, ..., seeds, success,
    episodes, interval."""
    rows = {}
    for r in evaluations(folder):
        # another version of it is another simulator
        r |= {"of": len(r["tasks"]), "mujoco": r["versions"]["mujoco"]}
        names = ("suite", "plan", "preset", "videos", "action_demos", "scenes", "of", "unseen",
                 "mujoco")
        key = tuple(r[name] for name in names)
        row = rows.setdefault(key, dict(zip(names, key))
                              | {"seeds": 0, "success": 0, "episodes": 0})
        row["seeds"] += 1
        row["success"] += r["success"]
        row["episodes"] += r["episodes"]
    for row in rows.values():
        row["interval"] = wilson(row["success"], row["episodes"])
    return sorted(rows.values(), key=lambda r: (r["suite"], r["action_demos"] or 99, r["plan"]))


def make_table(folder, readme="README.md"):
    """Prints the results as a table, writes it between README's markers, and draws the plot."""
    rows = pooled(folder)
    if not rows:
        core.fail(f"no results in {folder}/: python rollout.py <checkpoint> makes one")
    lines = ["| suite | plan | tasks | videos per task | action demos per task | seeds | success "
             "| 95 % interval | mujoco |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        low, high = r["interval"]
        new = f", unseen {r['unseen']}" if r["unseen"] else ""
        seeds = r["seeds"] if r["preset"] else "-"
        rate = f"{r['success']}/{r['episodes']} = {100 * r['success'] / r['episodes']:.1f} %"
        lines.append(f"| {r['suite']} | {r['plan']}{new} | {r['of']} | {r['videos'] or '-'} | "
                     f"{r['action_demos'] or '-'} | {seeds} | {rate} | "
                     f"{100 * low:.1f} - {100 * high:.1f} | {r['mujoco']} |")
    print("\n".join(lines))
    insert(readme, "results", lines)
    insert(readme, "times", times(folder))
    insert(readme, "experts", tables.experts_table(folder))
    insert(readme, "avdc", tables.flow_table(folder))
    insert(readme, "costs", tables.cost_table(folder))
    insert(readme, "paces", tables.pace_table(folder))
    insert(readme, "grade", tables.grade_table(folder))
    plot(rows, Path(folder) / "curve.png")


def times(folder):
    """What the steps took, as lines of a table: medians over the results, minutes."""
    spent = {}
    for r in evaluations(folder):
        for step, seconds in r["seconds"].items():
            if seconds and r["preset"] and len(r["tasks"]) == len(sims.tasks(r["suite"])):
                of = {"data": "data, one core",
                      "planner": "planner"}.get(step, f"{step}, {r['plan']}")
                of += f", {r['episodes']} episodes" * (step == "rollout")
                spent.setdefault((r["suite"], r["preset"], of), []).append(seconds / 60)
    lines = ["| suite | preset | step | minutes |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(key)} | {np.median(minutes):.1f} |"
                    for key, minutes in spent.items()]


def insert(readme, name, lines):
    """Replaces what stands between README's markers of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = Path(readme).read_text() if Path(readme).exists() else ""
    if begin in page and end in page:
        core.write(readme,
                   "\n".join([page.split(begin)[0] + begin, *lines, end + page.split(end)[1]]))


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
