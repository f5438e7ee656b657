"""All tables, made from the files in results/, between the markers of results/README.md and README.

    python -m results.tables

The unit is the training seed: with several, a row is the mean of their success rates with a 95 %
t-interval; with one, k of n episodes with the file's own interval (Wilson's), which ranks nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.files import fail, write
from core.flags import flag, parse


@dataclass
class Config:
    results: str = flag("results", "folder of the results")


# --- evaluations ----------------------------------------------------------------------------------


def read(folder, pattern):
    """The JSON files of this pattern -> their contents, each with its file's name as `file`."""
    return [json.loads(path.read_text()) | {"file": path.stem}
            for path in sorted(Path(folder).glob(pattern))]


def evaluations(folder):
    """Results of rollouts; the demonstrator's have another word in files of older code."""
    return [r | {"plan": "demonstrator" if r["plan"] == "expert" else r["plan"]}
            for r in read(folder, "*.json") if "plan" in r]


def t_interval(rates):
    """95 % t-interval of the mean of success rates (n,) -> (low, high), within [0, 1]."""
    from scipy.stats import t
    half = t.ppf(0.975, len(rates) - 1) * np.std(rates, ddof=1) / np.sqrt(len(rates))
    return float(max(0, np.mean(rates) - half)), float(min(1, np.mean(rates) + half))


def cells(folder):
    """One row of all evaluations that differ in the training seed alone: the first one's content,
    with plan (its full name), seeds (how many), rate, interval, count, between (both in words).

    A file's name holds all that differs from the presets, so names that agree but for the seed are
    of one configuration.  Executors that share a planner of one seed are marked.
    """
    groups, rows = {}, []
    for r in evaluations(folder):
        seed, of = r["seed"], ((r.get("config") or {}).get("planner_config") or {}).get("seed")
        plain = lambda name: re.sub(rf"_s{seed}(?=_|$)", "", name)
        shared = f", planner of seed {of}" if of not in (None, seed) else ""
        variant = f", unseen {r['unseen']}" if r["unseen"] else ""
        r["plan"] = plain(r["plan"]) + r.get("differs", "") + shared + variant
        groups.setdefault((plain(r["file"]), shared), []).append(r)
    for r, *others in groups.values():
        rates = [x["success"] / x["episodes"] for x in (r, *others)]
        low, high = t_interval(rates) if others else r["interval"]
        count = "" if others else f"{r['success']}/{r['episodes']} = "
        rows.append(r | {"seeds": len(rates), "rate": np.mean(rates), "interval": (low, high),
                         "count": f"{count}{100 * np.mean(rates):.1f} %",
                         "between": f"{100 * low:.1f} - {100 * high:.1f}"})
    return sorted(rows, key=lambda r: (r["suite"], r["action_demos"] or 0, r["plan"]))


# --- tables: the folder's files -> lines, none where there is nothing -----------------------------


def table(head, rows):
    """Titles "a | b" and rows of cells -> lines of Markdown."""
    line = lambda row: f"| {' | '.join('-' if x is None else str(x) for x in row)} |"
    return [f"| {head} |", "|---" * (1 + head.count(" | ")) + "|", *map(line, rows)] * bool(rows)


def overview(folder):
    """A row per plan, preset and number of demonstrations, a column per suite, all of its tasks."""
    found, suites = {}, []
    for r in cells(folder):
        if not r["unseen"] and r["scenes"] != "development" and "_tasks" not in r["file"]:
            suites += [r["suite"]] * (r["suite"] not in suites)
            seeds = f"{r['seeds']} seeds: " if r["seeds"] > 1 else "one seed: " * bool(r["preset"])
            found.setdefault((r["plan"], r["preset"], r["action_demos"]), {})[r["suite"]] = \
                f"{100 * r['rate']:.1f} ({seeds}{r['between']})"
    return table(" | ".join(["plan", "preset", "action demos", *suites]), [
        (*key, *(row.get(suite, "") for suite in suites)) for key, row in found.items()])


def policies(folder):
    """Every evaluation but the demonstrator's, those of unseen variants and some tasks, too."""
    columns = "suite", "plan", "preset", "videos", "action_demos", "scenes", "count", "between"
    return table(
        "suite | plan | preset | videos | action demos | scenes | success | 95 % interval | seeds",
        [(*(r[k] for k in columns), r["seeds"] if r["preset"] else None)
         for r in cells(folder) if not r["plan"].startswith("demonstrator")])


def demonstrators(folder):
    """A row per result, and one per task that was not always solved."""
    rows = []
    for r in (r for r in cells(folder) if r["plan"].startswith("demonstrator")):
        name = r["suite"] + r["plan"].removeprefix("demonstrator")
        rows.append((name, f"all {len(r['tasks'])}", r["counts"],
                     f"{r['count']} ({r['between']})", None))
        for task, t in r["tasks"].items() if not r["unseen"] else ():
            ever = f", at any step {t['ever']}" if t.get("ever", 0) > t["success"] else ""
            if t["success"] < t["episodes"]:
                rows.append((name, task.replace("_", " "), "",
                             f"{t['success']}/{t['episodes']}{ever}", f"{t['steps']:.0f}"))
    return table("suite | task | counts | solved (95 % interval) | mean steps", rows)


def avdc(folder):
    """Acting from flow: a row per task, a column per result over all of AVDC's tasks."""
    found = [r for r in cells(folder) if r["plan"].startswith("flow-") and len(r["tasks"]) == 11]
    rate = lambda r, task: f"{r['tasks'][task]['success']}/{r['tasks'][task]['episodes']}"
    return table(" | ".join(["task", *(f"{r['plan']}, {r['suite']}" for r in found)]), [
        (task, *(rate(r, task) for r in found)) for task in found[0]["tasks"]] if found else [])


def annotators(folder):
    """Annotators beside the trivial answers, from `python -m results.annotators`."""
    rows, measures = [], ("delta_avg", "occlusion_accuracy", "average_jaccard")
    for r in read(folder, "*_grade.json"):
        about = f"{r['suite']}: {r['frames']} frames of {r['size']} px, {r['points']} points"
        rows += [(about, name, f"{s['J']:.3f}", f"{s['F']:.3f}", "", "", "")
                 for name, s in r["masks"].items()]
        for name in r["tracks"]["all"]:
            both = [r["tracks"][which].get(name) for which in ("all", "moving")]
            rows.append((about, name, "", "", *(
                " / ".join(f"{s[m]:.3f}" if s else "-" for s in both) for m in measures)))
    return table("suite | annotator | J | F | delta_avg, all / moving points | occlusion accuracy "
                 "| average Jaccard", rows)


def costs(folder):
    """What 600 steps of each executor cost, from `python -m results.figures cost`."""
    return table("suite | preset | executor | parameters, with planner | TFLOPs of 600 steps", [
        (r["suite"], r["preset"], r["cost_of"], f"{r['parameters'] / 1e6:.1f} million",
         f"{r['tflops']:.3f}") for r in read(folder, "*_cost.json")])


def times(folder):
    """Minutes of each step, medians over the results."""
    spent = {}
    for r in (r for r in evaluations(folder) if r["preset"]):
        for step, seconds in r["seconds"].items():
            of = step if step == "data" else f"{step}, {r['plan']}"
            of += f", {r['episodes']} episodes" * (step == "rollout")
            spent.setdefault((r["suite"], r["preset"], of), []).append((seconds or 0) / 60)
    return table("suite | preset | step | minutes", [
        (*key, f"{np.median(minutes):.1f}") for key, minutes in spent.items() if any(minutes)])


def speeds(folder):
    """How fast programs train: the last lines of their logs, speed_<program>_<where>.jsonl."""
    rows, keys = [], ("samples_per_second", "gigabytes")
    for path in sorted(Path(folder).glob("speed_*.jsonl")):
        last = json.loads(path.read_text().splitlines()[-1])
        rows.append((path.stem[6:].replace("_", " "), last["step"], *(f"{last[k]:.3g}" for k in keys)))
    return table("program and machine | steps | samples per second | peak memory, GB", rows)


TABLES = overview, policies, demonstrators, avdc, annotators, costs, times, speeds


def main(argv=None):
    """Command line: writes all tables into both pages, where these have markers for them."""
    folder = Path(parse(Config, "Tables of the results.", argv).results).resolve()
    made = {f.__name__: f(folder) for f in TABLES}
    if not any(made.values()):
        fail(f"no results in {folder}: python rollout.py <checkpoint> makes one")
    for path in (p for p in (folder / "README.md", folder.parent / "README.md") if p.exists()):
        page = path.read_text()
        for name, lines in made.items():
            text = "\n".join(lines or ["None yet."]) + "\n"
            page = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                          lambda found: found[1] + text + found[2], page, flags=re.S)
        write(path, page)
        print(f"tables: {path}")


if __name__ == "__main__":
    main()
