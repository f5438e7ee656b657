"""README's tables by task or annotator, from the JSON files: what the scripted demonstrators solve,
what acting from flow does, what executors cost and how fast they train, how good annotators are."""

import json
from pathlib import Path

import numpy as np

import rollout
import sims
from core.files import fail, write
from results import figures


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
        row["interval"] = rollout.wilson(row["success"], row["episodes"])
    return sorted(rows.values(), key=lambda r: (r["suite"], r["action_demos"] or 99, r["plan"]))


def make_table(folder, readme="README.md"):
    """Prints the results as a table, writes it between README's markers, and draws the plot."""
    rows = pooled(folder)
    if not rows:
        fail(f"no results in {folder}/: python rollout.py <checkpoint> makes one")
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
    insert(readme, "experts", experts_table(folder))
    insert(readme, "avdc", flow_table(folder))
    insert(readme, "costs", cost_table(folder))
    insert(readme, "paces", pace_table(folder))
    insert(readme, "grade", grade_table(folder))
    figures.plot(rows, Path(folder) / "curve.png")


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
        write(readme,
                   "\n".join([page.split(begin)[0] + begin, *lines, end + page.split(end)[1]]))


def expert_results(folder="results"):
    """Full results of LIBERO's expert -> {suite or 'suite, unseen variant': result}; of several of
    a suite the one with the most episodes."""
    found = {}
    for path in sorted(Path(folder).glob("libero_*_expert_*.json")):
        r = json.loads(path.read_text())
        name = f"{r['suite']}, unseen {r['unseen']}" if r["unseen"] else r["suite"]
        if name not in found or r["episodes"] > found[name]["episodes"]:
            found[name] = r
    return found


def experts_table(folder="results"):
    """Each task of the suites of ten, of LIBERO-90 all and those not always solved, of unseen
    variants all and the worst -> lines of a table."""
    lines = ["| suite | task | solved at the end | solved at any step | mean steps |",
             "|---|---|---|---|---|"]
    rate = lambda t, key="success": f"{t[key]}/{t['episodes']}" if key in t else ""
    for name, r in expert_results(folder).items():
        tasks = r["tasks"]
        worst = min(tasks.values(), key=lambda t: t["success"] / t["episodes"])
        if r["unseen"] or len(tasks) > 10:
            lines.append(f"| {name} | all {len(tasks)} | {rate(r)}, worst task {rate(worst)} | | |")
        if not r["unseen"]:
            lines += [f"| {name} | {task.replace('_', ' ')} | {rate(t)} | {rate(t, 'ever')} | "
                      f"{t['steps']:.0f} |" for task, t in tasks.items()
                      if len(tasks) <= 10 or t["success"] < t["episodes"]]
    return lines


def flow_table(folder="results"):
    """Success of acting from flow, a row per task and a column per kind of video -> lines."""
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("avdc_flow-*.json"))]
    found = [r for r in found if len(r["tasks"]) == 11]
    if not found:
        return []
    head = "| task | " + " | ".join(r["plan"] for r in found) + " |"
    lines = [head, "|---" * (1 + len(found)) + "|"]
    for task in found[0]["tasks"]:
        cells = [f"{r['tasks'][task]['success']}/{r['tasks'][task]['episodes']}" for r in found]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return lines


def cost_table(folder="results"):
    """What 600 steps of each executor cost, from `rollout.py --cost` -> lines."""
    lines = ["| suite | preset | plan | parameters, planner and executor | TFLOPs of 600 steps |",
             "|---" * 5 + "|"]
    for path in sorted(Path(folder).glob("*_cost.json")):
        r = json.loads(path.read_text())
        lines.append(f"| {r['suite']} | {r['preset']} | {r['cost_of']} | "
                     f"{r['parameters'] / 1e6:.1f} million | {r['tflops']:.3f} |")
    return lines if len(lines) > 2 else []


def pace_table(folder="results"):
    """How fast the paper preset trains, from the last lines of results/paper_<network>_<precision>
    .jsonl, which are logs of training -> lines."""
    lines = ["| network | precision | samples per core-second | peak memory, GB |",
             "|---" * 4 + "|"]
    for path in sorted(Path(folder).glob("paper_*.jsonl")):
        name, _, precision = path.stem.removeprefix("paper_").rpartition("_")
        last = json.loads(path.read_text().splitlines()[-1])
        lines.append(f"| {name.replace('_', ' ')} | {precision} | "
                     f"{last['samples_per_core_second']:.3g} | {last['gigabytes']:.1f} |")
    return lines if len(lines) > 2 else []


def grade_table(folder="results"):
    """Annotators beside the trivial answers, from `extract.py --grade` -> lines."""
    known = {"sam": "Grounding DINO, SAM, SAM 2", "cotracker": "CoTracker",
             "stay": "points that stay"}
    lines = ["| suite | annotator | J | F | delta_avg, all / moving points | occlusion accuracy | "
             "average Jaccard |", "|---" * 7 + "|"]
    for path in sorted(Path(folder).glob("*_grade.json")):
        r = json.loads(path.read_text())
        about = f"{r['suite']}: {r['frames']} frames of {r['size']} px, {r['points']} points"
        for name, s in r["masks"].items():
            lines.append(f"| {about} | {known.get(name, name)} | {s['J']:.3f} | {s['F']:.3f} |"
                         " | | |")
        for name in r["tracks"]["all"]:
            both = [r["tracks"][which].get(name) for which in ("all", "moving")]
            cells = [" / ".join(f"{s[measure]:.3f}" if s else "-" for s in both)
                     for measure in ("delta_avg", "occlusion_accuracy", "average_jaccard")]
            lines.append(f"| {about} | {known.get(name, name)} | | | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


if __name__ == "__main__":
    make_table("results")
