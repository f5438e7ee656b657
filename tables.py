"""README's table of the scripted demonstrators, made from the results (`experts_table`), and which tasks they fail."""
import json
from pathlib import Path

MARKERS = "<!-- experts -->", "<!-- /experts -->"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def expert_results(folder="results"):
    """Full results of the expert under noise -> {suite or 'suite, unseen variant': result}; the most episodes win."""
    found = {}
    for path in sorted(Path(folder).glob("libero_*_expert_*.json")):
        r = json.loads(path.read_text())
        name = r["suite"] if not r["unseen"] else f"{r['suite']}, unseen {r['unseen']}"
        if name not in found or r["episodes"] > found[name]["episodes"]:
            found[name] = r
    return found


def unreliable(suite, folder="results", least=0.5):
    """{task: measured rate} of the tasks that the expert solves in fewer than `least` of the scenes."""
    result = expert_results(folder).get(suite, {"tasks": {}})
    rates = {task: t["success"] / t["episodes"] for task, t in result["tasks"].items()}
    return {task: rate for task, rate in rates.items() if rate < least}


def experts_table(folder="results", readme="README.md"):
    """Writes the per-task table between README's markers, and prints it."""
    found = expert_results(folder)
    lines = ["| suite | task | solved | mean steps |", "|---|---|---|---|"]
    for name, r in found.items():
        if name in SUITES:
            lines += [f"| {name} | {task.replace('_', ' ')} | {t['success']}/{t['episodes']} | {t['steps']:.0f} |"
                      for task, t in r["tasks"].items()]
        else:
            worst = min(r["tasks"].values(), key=lambda t: t["success"] / t["episodes"])
            lines.append(f"| {name} | all {len(r['tasks'])} | {r['success']}/{r['episodes']}, "
                         f"worst task {worst['success']}/{worst['episodes']} | |")
    text = Path(readme).read_text()
    start, end = MARKERS
    if start in text:
        before, rest = text.split(start)
        Path(readme).write_text(before + start + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1])
    print("\n".join(lines))
