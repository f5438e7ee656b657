"""README's tables by task or annotator, from the JSON files: what the scripted demonstrators solve,
what acting from flow does, what executors cost and how fast they train, how good annotators are."""
import json
from pathlib import Path


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


def unreliable(suite, folder="results", least=0.5):
    """{task: rate} of the tasks that the expert solves in fewer than `least` of the scenes."""
    result = expert_results(folder).get(suite, {"tasks": {}})
    rates = {task: t["success"] / t["episodes"] for task, t in result["tasks"].items()}
    return {task: rate for task, rate in rates.items() if rate < least}


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
