"""All tables, made from the files in results/, between the markers of results/README.md and README.

    python -m results.tables

The unit is the training seed: of three or more, a row is the mean of their success rates with a
95 % t-interval; of two, or of any that are alike (it would be 0 points wide), the mean alone; of
one, k of n episodes with the file's own interval (Wilson's), which ranks nothing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.files import fail, write
from core.flags import flag, parse

# What results/compare.py calls the plans of these files, in the tables' order; expert: older files
NAMES = {"expert": "demonstrator", "none": "none", "mask_formgoal": "none-frozen",
         "feature": "feature", "track_ee": "ee", "video": "video",
         "track_formlatent": "track-latent", "track": "track", "mask": "mask",
         "mask_grounded": "mask-grounded", "mask_grounded_formmasks": "mask-explicit",
         "mask_grounded_formmasks+goal": "mask+goal", "mask_grounded_formnow+goal": "mask-now+goal",
         "mask_shuffled_grounded_formmasks": "mask-shuffled"}


@dataclass
class Config:
    results: str = flag("results", "folder of the results")


def read(folder, pattern="*.json"):
    """The JSON files of this pattern -> their contents, each with its file's name as `file`."""
    return [json.loads(path.read_text()) | {"file": path.stem}
            for path in sorted(Path(folder).glob(pattern))]


def t_interval(rates):
    """95 % t-interval of the mean of success rates (n,) -> (low, high), within [0, 1]."""
    from scipy.stats import t
    half = t.ppf(0.975, len(rates) - 1) * np.std(rates, ddof=1) / np.sqrt(len(rates))
    return float(max(0, np.mean(rates) - half)), float(min(1, np.mean(rates) + half))


def difference_interval(a, b):
    """95 % t-interval of the mean difference of two plans' success rates, (n,) each, seed by seed
    on the same scenes -> (low, high), within [-1, 1]."""
    from scipy.stats import t
    d = np.subtract(a, b)  # (n,)
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return float(max(-1, d.mean() - half)), float(min(1, d.mean() + half))


def cells(folder):
    """One row of all evaluations that differ in the training seed alone: the first one's content,
    with plan (its full name), setting, seeds (how many), rate, interval (nan: seeds too few or
    alike), count, between (both in words).  Names of files that agree but for the seed are of one
    configuration, as they hold all that differs from the presets.  Executors that share a planner
    of one seed are marked.  by_seed: {seed: success rate}; tasks, {name: (successes, episodes)},
    and minutes, of all stages, are sums over the seeds."""
    groups, rows = {}, []
    for r in (r for r in read(folder) if "plan" in r):
        seed, of = r["seed"], ((r.get("config") or {}).get("planner_config") or {}).get("seed")
        plain = lambda name: re.sub(rf"_s{seed}(?=_|$)", "", name)
        shared = f", planner of seed {of}" if of not in (None, seed) else ""
        variant = f", unseen {r['unseen']}" if r["unseen"] else ""
        plan = plain(r["plan"]) + r.get("differs", "")
        r["plan"] = NAMES.get(plan, plan) + shared + variant
        r["setting"] = r["suite"] + (f", {r['preset']}, {r['action_demos']} demonstrations"
                                     if r["action_demos"] else "")
        groups.setdefault((plain(r["file"]), shared), []).append(r)
    for seeds in groups.values():
        r, rates = seeds[0], [x["success"] / x["episodes"] for x in seeds]
        spent = sum(s or 0 for x in seeds for k, s in x["seconds"].items() if k != "data")
        lacks = {1: "", 2: "too few"}.get(len(seeds), "alike" * (len({*rates}) == 1))
        low, high = (np.nan,) * 2 if lacks else t_interval(rates) if rates[1:] else r["interval"]
        count = f"{r['success']}/{r['episodes']} = " * (len(seeds) == 1)
        rows.append(r | {"seeds": len(rates), "rate": np.mean(rates), "interval": (low, high),
                         "by_seed": {x["seed"]: rate for x, rate in zip(seeds, rates)},
                         "code": "+".join(sorted({x.get("code", x["commit"]) for x in seeds})),
                         "tasks": {t: [sum(x["tasks"][t][k] for x in seeds)
                                       for k in ("success", "episodes")] for t in r["tasks"]},
                         "minutes": spent / 60, "count": f"{count}{100 * np.mean(rates):.1f} %",
                         "between": lacks or f"{100 * low:.1f} - {100 * high:.1f}"})
    place = lambda plan: [*NAMES.values(), plan].index(plan)
    return sorted(rows, key=lambda r: (r["suite"], r["action_demos"] or 0,
                                       place(r["plan"].partition(",")[0]), r["plan"]))


def table(head, rows):
    """Titles "a | b" and rows of cells -> lines of Markdown, none of no rows."""
    line = lambda row: f"| {' | '.join('-' if x is None else str(x) for x in row)} |"
    return [f"| {head} |", "|---" * (1 + head.count(" | ")) + "|", *map(line, rows)] * bool(rows)


def main_rows(folder):
    """The rows of `cells` of whole evaluations of policies on the usual test scenes."""
    return [r for r in cells(folder) if r["action_demos"] and r["scenes"] == "test"
            and not r["unseen"] and "_tasks" not in r["file"] and "_episodes" not in r["file"]]


def overview(folder):
    """A row per plan, the demonstrator's first; columns: suite, preset, action demonstrations."""
    heads = {}
    found = {plan: {} for plan in NAMES.values()} | {"demonstrator": heads}
    scripted = {r["suite"]: f"{100 * r['rate']:.1f} ({r['between']})" for r in cells(folder)
                if r["file"] == f"{r['suite']}_demonstrator"}
    for r in main_rows(folder):
        heads[r["setting"]] = scripted.get(r["suite"], "")
        seeds = f"{r['seeds']} seeds" if r["seeds"] > 1 else "one seed"
        text = f"{100 * r['rate']:.1f} ({seeds}: {r['between']})"
        found.setdefault(r["plan"], {})[r["setting"]] = text
    return table(" | ".join(["plan", *heads]), [
        (plan, *(row.get(head, "") for head in heads)) for plan, row in found.items() if row])


def evaluations(folder):
    """Every evaluation, those of unseen variants and of some tasks, too."""
    columns = "suite plan preset videos action_demos scenes counts count between".split()
    return table("suite | plan | preset | videos | action demos | scenes | counts | success | 95 % "
                 "interval | seeds | minutes | code", [
                     (*(r[k] for k in columns), r["preset"] and r["seeds"], f"{r['minutes']:.0f}",
                      r["code"]) for r in cells(folder)])


def trials(folder):
    """Settings that were tried on development scenes: a table per folder of <results>/trials/."""
    parts = sorted(path for path in Path(folder, "trials").glob("*") if path.is_dir())
    return [line for part in parts for line in ["", f"**{part.name}**", "", *evaluations(part)]]


def compared(a, b):
    """Rows of two plans -> the mean difference in points with its interval, over the seeds that
    both have, in words; "" without three, no interval where all differ by the same."""
    both = sorted({*a["by_seed"]} & {*b["by_seed"]})
    if len(both) < 3:
        return ""
    x, y = ([r["by_seed"][seed] for seed in both] for r in (a, b))
    (low, high), d = difference_interval(x, y), np.subtract(x, y)
    interval = f" ({100 * low:+.1f} to {100 * high:+.1f})" * bool(np.ptp(d) > 1e-9)
    return f"{100 * d.mean():+.1f}{interval}"


def comparison(folder, scenes="test"):
    """Plans of one suite, preset and number of demonstrations beside each other, and beside cloning
    seed by seed; then the contrasts that results/contrasts.md names ("* mask minus none: ..."); one
    code per suite, or the word mixed."""
    lines, groups, page = [], {}, Path(folder, "contrasts.md")
    found = re.findall(r"^\* (\S+) minus (\S+):", page.read_text(), re.M) if page.exists() else []
    named = [tuple(NAMES.get(name, name) for name in pair) for pair in found]
    for r in cells(folder):
        if r["preset"] and r["scenes"] == scenes:
            key = r["setting"], r["unseen"], r["episodes"], *r["tasks"]
            groups.setdefault(key, {})[r["plan"].partition(", unseen")[0]] = r
    for (setting, unseen, *_), rows in groups.items():
        code, *more = {r["code"] for r in rows.values()}
        none = lambda r: rows.get("none" + r.get("differs", "")) or rows.get("none")
        lines += [""] * bool(lines) + table(
            f"{setting}{f', unseen {unseen}' * bool(unseen)}, code "
            f"{'mixed' if more or '+' in code else code} | success | 95 % interval | seeds | "
            "points above cloning | minutes",
            [(plan, f"{100 * r['rate']:.1f} %", r["between"],
              r["seeds"] if r["seeds"] > 1 else "one seed",
              compared(r, none(r)) if none(r) and r is not none(r) else "", f"{r['minutes']:.0f}")
             for plan, r in rows.items()]
            + [(f"{a} minus {b}", "", "", "", compared(rows[a], rows[b]), "")
               for a, b in named if {a, b} <= {*rows}])
    return lines


def tasks(folder):
    """Of the demonstrator and AVDC, then of whole evaluations of policies, a table per suite: a
    column per result, a row per task that is not always solved, its successes in all seeds."""
    lines, of = [], {}
    for r in [*(r for r in cells(folder) if not r["action_demos"]), *main_rows(folder)]:
        of.setdefault(r["setting"], {})[r["plan"]] = r["tasks"]
    for head, plans in of.items():
        found = {t: [tasks.get(t) for tasks in plans.values()] for t in next(iter(plans.values()))}
        lines += [""] * bool(lines) + table(" | ".join([head, *plans]), [
            (task.replace("_", " "), *(counts and "{}/{}".format(*counts) for counts in row))
            for task, row in found.items() if any(t and t[0] < t[1] for t in row)])
    return lines


def annotators(folder):
    """Annotators beside the trivial answers, from `python -m results.annotators`."""
    rows = []
    for r in read(folder, "*_grade.json"):
        about = f"{r['suite']}: {r['frames']} frames of {r['size']} px, {r['points']} points"
        parts = {"masks": r["masks"]} | {f"tracks, {k}": v for k, v in r["tracks"].items()}
        line = lambda grades: ", ".join(f"{k} {x:.3f}" for k, x in grades.items()).replace("_", " ")
        rows += [(about, what, name, line(grades))
                 for what, by_name in parts.items() for name, grades in by_name.items()]
    return table("suite | of | annotator | grades", rows)


TABLES = overview, comparison, trials, evaluations, tasks, annotators


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
