"""Episodes in the simulator: success rates with intervals, films, results, tables.

    python rollout.py runs/libero_spatial/mask_executor.pt              # 10 tasks x 10 bundled initial states
    python rollout.py --policy expert --suite libero_spatial            # the upper bound
    python rollout.py --table                                           # README's table and plot from results/*.json

An episode succeeds when LIBERO's goal predicates hold at any step within the horizon, as LIBERO itself counts; for
the expert, which lets go and retreats, they must still hold at the end.  The bundled initial states are never
trained on.  A crash ends the evaluation: it is an error, not a failed episode.
"""
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import core
import executor
import experts
import extract
import mask_planner
import sims
import track_planner
from core import fail, flag

FILM_SCALE = 3  # films are enlarged by this factor
COLOURS = {"none": "#888888", "mask": "#d62728", "mask-explicit": "#1f77b4", "expert": "#2ca02c",
           "track": "#9467bd", "track-latent": "#e377c2", "ee": "#ff7f0e"}


@dataclass
class Config:
    policy: str = flag("executor", "executor: the given checkpoints; expert: the scripted demonstrator",
                       choices=["executor", "expert"])
    suite: str = flag("libero_spatial", "suite, for --policy expert; otherwise the executor's")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: the executor's, or all")
    episodes: int = flag(10, "episodes per task", minimum=1)
    scenes: int | None = flag(None, "use sampled scenes with seeds from this one on, instead of the bundled states",
                              minimum=0)
    noise: float = flag(0.0, "standard deviation of noise on the executed motion, for --policy expert", minimum=0)
    films: bool = flag(True, "write an mp4 of each task's first success and first failure")
    unseen: str | None = flag(None, "what is new in the scenes of libero_spatial", choices=list(sims.UNSEEN))
    render: str | None = flag(None, "fast or faithful, as for extract.py; by default what the executor was trained on",
                              choices=["fast", "faithful"])
    workers: int = flag(2, "processes", minimum=1)
    results: str = flag("results", "folder of the results")
    device: str | None = flag(None, "cpu or cuda")
    table: bool = flag(False, "only make README's table and the plot from the results")
    cost: bool = flag(False, "only count the floating point operations of 600 steps of each executor (ATM, Table IV)")


# ---------------------------------------------------------------------------------------------- episodes

def film_frame(frame, policy, sim):
    """One picture of a film: third-person view, with the plan's masks decoded at two horizons, and the wrist view."""
    planner = policy.executor.planner if policy else None
    views = [("now", frame["agentview_rgb"])]
    if planner and planner.kind == "track_planner":
        views.append(("plan", draw_plan(policy, frame)))
    elif planner:
        now = mask_planner.binary_masks(torch.as_tensor(mask_planner.half(frame["masks"]))[None].long(),
                                        planner.config.objects)  # (1, N, H/2, W/2)
        history = torch.stack(policy.frames, 1)  # (1, h, H, W, 3): what the policy has just seen
        with torch.no_grad():
            prob = planner.predict(history, policy.goal[None], now.to(policy.device))
        label = mask_planner.soft_aggregate(prob).argmax(1)[0].cpu().numpy()  # (K, H/2, W/2)
        for k in (1, 3):
            views.append((f"plan +{mask_planner.HORIZONS[k]}", extract.draw_masks(
                frame["agentview_rgb"], mask_planner.double(label[k], frame["masks"].shape))))
    views.append(("wrist", frame["eye_in_hand_rgb"]))
    large = [np.kron(v, np.ones((FILM_SCALE, FILM_SCALE, 1), np.uint8)) for _, v in views]
    return np.concatenate([extract.caption(v, name, 16) for (name, _), v in zip(views, large)], 1)


def draw_plan(policy, frame, side=8):
    """The third-person picture with where the track planner says that a grid of points, or the hand, will go."""
    planner = policy.executor.planner
    grid = track_planner.grid_points(side) if planner.config.points == "any" else torch.tensor(frame["hand"].astype(np.float32))[None]
    image, grid = policy.frames[-1], grid.to(policy.device)[None]  # (1, H, W, 3), (1, N, 2)
    with torch.no_grad():
        tracks = torch.cat([grid[:, None], planner(image, grid, policy.goal[None])[0]], 1)[0].cpu().numpy()  # (1 + S, N, 2)
    return extract.draw_tracks(frame["agentview_rgb"], tracks, np.ones(tracks.shape[:2], bool))


def play(sim, actor, start, film):
    """One episode from the frame after reset.  actor: a Policy, or (demonstrator, noise, rng).

    -> success, steps, list of film pictures (empty unless `film`).
    """
    policy = actor if isinstance(actor, executor.Policy) else None
    frame, pictures, success = start, [], False
    # ours: the expert may try again, as when it records demonstrations; a policy has LIBERO's horizon
    for steps in range(1, (sim.horizon if policy else sim.patience) + 1):
        if policy:
            look = policy.wants_frame
            if look and frame is None:
                frame = sim.frame(film, film or not policy.executor.places)
            action = policy(frame)
            if film and look:
                pictures.append(film_frame(frame, policy, sim))
        else:
            expert, noise, rng = actor
            action = expert(sim)
            if film and steps % 4 == 1:
                pictures.append(film_frame(sim.frame(), None, sim))
            action = action + np.append(rng.normal(0, noise, sim.action_dim - 1), 0)
        _, success = sim.step(action, observe=False)
        frame = None
        if success if policy else actor[0].done:
            break
    return success, steps, pictures


def cost(checkpoint, steps=600):
    """Floating point operations of planner and executor in an episode of that length (ATM, Table IV), by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode
    policy = executor.Policy(executor.load_executor(checkpoint))
    side = policy.executor.extra["size"]
    black = np.zeros((side, side, 3), np.uint8)
    frame = {"agentview_rgb": black, "eye_in_hand_rgb": black, "hand": np.zeros(2, np.float16),
             "ee_states": np.zeros(6, np.float32), "gripper_states": np.zeros(2, np.float32)}
    policy.reset(black)
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            policy(frame)
    return counter.get_total_flops()


def write_film(path, pictures):
    """Pictures (list of (H, W, 3) uint8) -> mp4 at 5 per second, real time for looks 4 steps apart; and a still, .png."""
    import imageio.v2 as iio
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures[0].shape[0] // 2 * 2, pictures[0].shape[1] // 2 * 2  # the codec wants even numbers
    with iio.get_writer(path, fps=5, macro_block_size=2, quality=7) as film:
        for picture in pictures:
            film.append_data(picture[:height, :width])
    chosen = np.linspace(0, len(pictures) - 1, min(4, len(pictures))).astype(int)
    iio.imwrite(path.with_suffix(".png"), np.concatenate([pictures[k] for k in chosen]))


def run_task(job):
    """Worker: all checkpoints on some scenes of one task -> {checkpoint: [success, ...]}, in the scenes' order."""
    config, checkpoints, suite, task, scenes, size, render = job
    torch.set_num_threads(1)
    observe = config.policy == "executor" or config.films
    sim = sims.make(suite, task, size, config.render or render, observe, config.unseen)
    done = {}
    for checkpoint in checkpoints:
        policy = executor.Policy(executor.load_executor(checkpoint, config.device)) if checkpoint else None
        done[checkpoint], filmed = [], set()
        for scene in scenes:
            where = {"seed": scene} if config.scenes is not None else {"init": scene}
            film = config.films and len(filmed) < 2
            if policy:
                k = policy.executor.extra["tasks"].index(task)
                carried = policy.executor.goals[k]  # (goals, H, W, 3)
                policy.reset(sim.goal_image(**where) if policy.executor.own_goal else carried[scene % len(carried)], k)
            frame = sim.reset(**where)
            actor = policy or (experts.demonstrator(sim, seed=scene), config.noise, np.random.default_rng([scene, 1]))
            success, steps, pictures = play(sim, actor, frame, film)
            done[checkpoint].append((bool(success), steps))
            if film and success not in filmed:
                filmed.add(success)
                folder = Path(str(checkpoint or f"runs/{suite}/expert").removesuffix(".pt") + "_films")
                write_film(folder / f"{task}_{'success' if success else 'failure'}.mp4", pictures)
            run_task.progress.put(1)
    sim.close()
    return task, done


def evaluate(config, checkpoints, suite, names, size, render="fast"):
    """-> {checkpoint: {task: [(success, steps), ...]}} over config.episodes scenes of each task."""
    first = config.scenes if config.scenes is not None else 0
    if config.scenes is None and config.episodes > sims.INITS:
        fail(f"--episodes {config.episodes}: there are {sims.INITS} evaluation scenes; or give --scenes 1000")
    scenes = list(range(first, first + config.episodes))
    pieces = config.workers if len(names) < 2 * config.workers else 1  # few tasks: split each among the processes
    jobs = [(config, checkpoints, suite, name, scenes[k::pieces], size, render)
            for name in names for k in range(pieces) if scenes[k::pieces]]
    total = len(names) * len(scenes) * len(checkpoints)
    found = {c: {name: [] for name in names} for c in checkpoints}
    observe = config.policy == "executor" or config.films
    with extract.pool(config.workers, run_task, observe) as (workers, queue):
        results = workers.imap_unordered(run_task, jobs)
        for task, done in extract.watch(results, queue, len(jobs), total, "rollout"):
            for checkpoint, outcome in done.items():
                found[checkpoint][task] += outcome
    return found


# ---------------------------------------------------------------------------------------------- results

def wilson(k, n, z=1.96):
    """95 % Wilson interval of k successes in n episodes -> (low, high)."""
    p, zz = k / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * np.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def commit():
    """The source's git commit, '+' if the code was changed since; None outside a repository."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True,
                                        cwd=Path(__file__).parent).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno", "*.py")) or None


def result(config, checkpoint, suite, outcomes, seconds):
    """The JSON of one evaluation; design and names as in README."""
    tasks = {t: {"success": sum(s for s, _ in o), "episodes": len(o), "steps": round(float(np.mean([n for _, n in o])), 1)}
             for t, o in outcomes.items()}
    k, n = (sum(t[key] for t in tasks.values()) for key in ("success", "episodes"))
    about = {"suite": suite, "plan": "expert", "preset": None, "videos": None, "action_demos": None, "seed": None}
    spent = {}
    if checkpoint:
        content = core.load(checkpoint, kind=executor.Executor.kind)
        c = core.from_dict(executor.Config, content["config"])
        about |= {"plan": executor.plan_name(c), "preset": c.preset, "videos": c.demos,
                  "action_demos": c.action_demos, "seed": c.seed, "steps": content["step"]}
        spent = content["extra"]["seconds"] | {"executor": core.last_seconds(checkpoint)}
    kept = f"seeds from {sims.EVALUATION}" if sims.is_metaworld(suite) else "bundled initial states"
    about["scenes"] = kept if config.scenes is None else f"seeds from {config.scenes}"
    about["counts"] = "ever succeeded" if sims.is_metaworld(suite) or checkpoint else "success at the end"
    if config.noise:
        about["noise"] = config.noise
    return about | {
        "success": k, "episodes": n, "interval": [round(x, 4) for x in wilson(k, n)], "tasks": tasks, "unseen": config.unseen,
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit(),
        "versions": sims.versions(), "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {config.device}",
        "seconds": spent | {"rollout": round(seconds)}}


def result_path(folder, r):
    """results/<suite>_<plan>_<preset>_d<action demos>_s<seed>.json; the expert's has neither demos nor seed.

    What is not all tasks on the bundled states says so in its name, and never takes a full result's place.
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


def pooled(folder):
    """All results, training seeds pooled -> list of dicts with suite, plan, ..., seeds, success, episodes, interval."""
    rows = {}
    for path in sorted(Path(folder).glob("*.json")):
        r = json.loads(path.read_text())
        r |= {"of": len(r["tasks"]), "mujoco": r["versions"]["mujoco"]}  # another version of it is another simulator
        names = ("suite", "plan", "preset", "videos", "action_demos", "scenes", "of", "mujoco")
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
        fail(f"no results in {folder}/: python rollout.py <checkpoint> makes one")
    lines = ["| suite | plan | tasks | videos per task | action demos per task | seeds | success | 95 % interval | mujoco |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        low, high = r["interval"]
        lines.append(f"| {r['suite']} | {r['plan']} | {r['of']} | {r['videos'] or '-'} | {r['action_demos'] or '-'} | "
                     f"{r['seeds'] if r['preset'] else '-'} | {r['success']}/{r['episodes']} = "
                     f"{100 * r['success'] / r['episodes']:.1f} % | {100 * low:.1f} - {100 * high:.1f} | {r['mujoco']} |")
    print("\n".join(lines))
    insert(readme, "results", lines)
    insert(readme, "times", times(folder))
    plot(rows, Path(folder) / "curve.png")


def times(folder):
    """What the steps took, as lines of a table: medians over the results, minutes."""
    spent = {}
    for path in sorted(Path(folder).glob("*.json")):
        r = json.loads(path.read_text())
        for step, seconds in r["seconds"].items():
            if seconds and r["preset"] and len(r["tasks"]) == len(sims.tasks(r["suite"])):
                of = {"data": "data, one core", "planner": "planner"}.get(step, f"{step}, {r['plan']}")
                of += f", {r['episodes']} episodes" * (step == "rollout")
                spent.setdefault((r["suite"], r["preset"], of), []).append(seconds / 60)
    lines = ["| suite | preset | step | minutes |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(key)} | {np.median(minutes):.1f} |" for key, minutes in spent.items()]


def insert(readme, name, lines):
    """Replaces what stands between README's markers of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = Path(readme).read_text() if Path(readme).exists() else ""
    if begin in page and end in page:
        core.write(readme, "\n".join([page.split(begin)[0] + begin, *lines, end + page.split(end)[1]]))


def plot(rows, path):
    """Success against action demonstrations per task, one line per plan and suite, with 95 % intervals."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    learned = [r for r in rows if r["action_demos"] and r["of"] == len(sims.tasks(r["suite"]))]
    suites = sorted({r["suite"] for r in learned})
    if not suites:
        return
    figure, axes = plt.subplots(1, len(suites), figsize=(5 * len(suites), 3.6), squeeze=False)
    for axis, suite in zip(axes[0], suites):
        for plan in sorted({r["plan"] for r in learned if r["suite"] == suite}):
            line = [r for r in learned if (r["suite"], r["plan"]) == (suite, plan)]
            x, y = [r["action_demos"] for r in line], [100 * r["success"] / r["episodes"] for r in line]
            low, high = np.array([r["interval"] for r in line]).T * 100
            axis.errorbar(x, y, [y - low, high - y], marker="o", capsize=3, label=plan, color=COLOURS.get(plan))
        axis.set(title=suite, xlabel="action demonstrations per task", ylabel="success, %", ylim=(0, 100), xscale="log")
        ticks = sorted({r["action_demos"] for r in learned if r["suite"] == suite})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"plot: {path}")


def main(argv=None):
    """Command line: evaluates checkpoints or the expert and writes one JSON each, or makes README's tables."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    checkpoints, rest = argv[:first_flag], argv[first_flag:]
    config = core.parse(Config, "rollout.py CHECKPOINT [CHECKPOINT ...]: success rates in the simulator.", rest)
    if config.table:
        return make_table(config.results)
    size, suite, render = 128, config.suite, "fast"
    if config.policy == "executor":
        if not checkpoints:
            fail("no checkpoint: python rollout.py runs/<suite>/mask_executor.pt, or --policy expert")
        extras = [core.load(c, kind=executor.Executor.kind, made_by="python executor.py --planner runs/<suite>/mask.pt")
                  ["extra"] for c in checkpoints]
        if any(e[k] != extras[0][k] for e in extras for k in ("suite", "tasks", "size", "render")):
            fail("these checkpoints are of different suites, tasks, sizes or rendering: evaluate them one by one")
        suite, size, render = (extras[0][k] for k in ("suite", "size", "render"))
        if config.cost:
            for checkpoint in checkpoints:
                print(f"{checkpoint}: {cost(checkpoint) / 1e12:.3f} TFLOPs in 600 steps (paper: ATM 1.56, UniPi 39.29)")
            return
        names = sims.choose_tasks(suite, config.tasks or ",".join(extras[0]["tasks"]))
        unknown = [n for n in names if n not in extras[0]["tasks"]]
        if unknown:
            fail(f"{checkpoints[0]} was not trained on {unknown[0]}")
    else:
        checkpoints, names = [None], sims.choose_tasks(suite, config.tasks)
    begin = time.time()
    found = evaluate(config, checkpoints, suite, names, size, render)
    seconds = (time.time() - begin) / len(checkpoints)
    for checkpoint in checkpoints:
        r = result(config, checkpoint, suite, found[checkpoint], seconds)
        for task, count in r["tasks"].items():
            print(f"  {count['success']:3d}/{count['episodes']:<3d} {task}   ({count['steps']:.0f} steps)")
        path = result_path(config.results, r)
        path.parent.mkdir(parents=True, exist_ok=True)
        core.write(path, json.dumps(r, indent=1) + "\n")
        low, high = r["interval"]
        print(f"{suite} {r['plan']}: {r['success']}/{r['episodes']} = {100 * r['success'] / r['episodes']:.1f} % "
              f"[{100 * low:.1f}, {100 * high:.1f}]   {seconds / 60:.1f} minutes -> {path}")


if __name__ == "__main__":
    main()
