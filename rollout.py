"""Episodes in the simulator: success rates with intervals, films, one JSON each.

    python rollout.py runs/libero_spatial/mask_executor.pt      # 10 tasks x 10 test scenes
    python rollout.py demonstrator --suite libero_spatial       # the scripted upper bound
    python rollout.py runs/libero_spatial/mask_executor.pt --scenes development     # to choose by

An actor's episode succeeds when the goal holds at any step within the horizon, as LIBERO and
Meta-World count; of a demonstrator, which lets go and retreats, it must still hold at the end.
Test scenes are never trained on and nothing is chosen on them. A crash ends the evaluation: it is
an error, not a failed episode.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sims
from core import training
from core.draw import write_film
from core.files import fail, write
from core.flags import differences, flag, parse
from demos.record import Demonstrator, run_jobs, shares
from executor import load_policy

MADE_BY = "python executor.py --planner runs/<suite>/mask.pt"


@dataclass
class Config:
    checkpoints: tuple[str, ...] = flag((), "executors' checkpoints, or demonstrator: the scripted "
                                        "policy", positional=True)
    suite: str = flag("libero_spatial", "suite of the demonstrator; otherwise the executor's")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: the executor's")
    episodes: int = flag(10, "episodes per task", minimum=1)
    scenes: str = flag("test", "test: LIBERO's bundled states, Meta-World's test seeds; "
                       "development: scenes to choose by; or the first of other seeds")
    noise: float = flag(0.0, "standard deviation of noise on the demonstrator's motion", minimum=0)
    unseen: str = flag("", "what is new in the scenes of libero_spatial",
                       choices=["", *sims.UNSEEN])
    films: bool = flag(True, "an mp4 of each task's first success and first failure")
    workers: int = flag(2, "processes", minimum=1)
    results: str = flag("results", "folder of the results")
    device: str | None = flag(None, "cpu or cuda")


# --- episodes -------------------------------------------------------------------------------------

def play(sim, actor, scene, film=False):
    """One episode of any actor.  scene: what sim.reset takes, {"seed": s} or {"init": k}
    -> success at the end, success at any step, steps, pictures (of every fourth step, if `film`).
    """
    actor.reset(sim, scene)     # may use the simulator, so the scene is set after it
    sim.reset(**scene)
    ever, pictures = False, []
    for step in range(1, actor.limit(sim) + 1):
        action = actor(sim)     # renders a frame only when it wants to look
        if film and step % 4 == 1:
            pictures.append(actor.draw(sim))
        _, success = sim.step(action, observe=False)
        ever = ever or bool(success)
        if actor.finished(success):
            break
    return bool(success), ever, step, pictures


def scenes_of(config):
    """The scenes of each task, what sim.reset takes."""
    count = range(config.episodes)
    if config.scenes == "test":
        if config.episodes > sims.INITS:
            fail(f"--episodes {config.episodes}: there are {sims.INITS} test scenes per task")
        return [{"init": k} for k in count]
    if config.scenes != "development" and not config.scenes.isdigit():
        fail(f"--scenes {config.scenes}: give test, development or a seed such as 2000")
    first = sims.DEVELOPMENT if config.scenes == "development" else int(config.scenes)
    return [{"seed": first + k} for k in count]


def play_scenes(job):
    """Worker: an actor on some scenes of one task; yields task, (scene, success at the end, at any
    step, steps) after each."""
    make_actor, config, suite, task, scenes, size, render, folder = job
    torch.set_num_threads(1)
    sim = sims.make(suite, task, size, render, unseen=config.unseen or None)
    actor, filmed = make_actor(sim), set()
    for scene in scenes:
        film = config.films and len(filmed) < 2
        success, ever, steps, pictures = play(sim, actor, scene, film)
        if film and ever not in filmed:
            filmed.add(ever)
            write_film(Path(folder) / f"{task}_{'success' if ever else 'failure'}.mp4", pictures)
        yield task, (*scene.values(), success, ever, steps)
    sim.close()


def evaluate(make_actor, config, suite, tasks, size, render, folder):
    """make_actor(sim) -> actor, called in each process; folder of the films
    -> {task: [(scene, success at the end, at any step, steps), ...]}, scenes in order."""
    scenes = scenes_of(config)
    jobs = [(make_actor, config, suite, task, share, size, render, folder)
            for task in tasks for share in shares(scenes, len(tasks), config.workers)]
    found, total = {task: [] for task in tasks}, len(tasks) * len(scenes)
    for task, outcome in run_jobs(play_scenes, jobs, config.workers, total, "rollout"):
        found[task].append(outcome)
    return {task: sorted(outcomes) for task, outcomes in found.items()}


# --- results --------------------------------------------------------------------------------------

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


def result_path(config, about):
    """Where a result is written: its name holds suite, plan, preset, demonstrations, seed and all
    that differs from the presets. Fails if the file is of another configuration."""
    name = f"{about['suite']}_{about['plan']}"
    if about["preset"]:
        name += f"_{about['preset']}_d{about['action_demos']}_s{about['seed']}{about['differs']}"
    path = Path(config.results) / f"{name}{differences(config)}.json"
    if path.exists():
        there = json.loads(path.read_text()).get("config")
        if there != json.loads(json.dumps(about["config"])):
            fail(f"{path} is of another configuration: choose another --results, or delete it")
    return path


def report(config, about, found, seconds):
    """Prints and writes the result of an evaluation.

    about: suite, plan, preset, videos, action_demos, seed, differs and config (of the executor),
    seconds of data and training; found: see `evaluate`.
    """
    counts = about.get("counts", "ever succeeded")
    at_end = counts == "success at the end"
    tasks = {}
    for task, outcomes in found.items():
        _, end, ever, steps = zip(*outcomes)
        tasks[task] = {"success": sum(end if at_end else ever), "episodes": len(end),
                       "steps": round(float(np.mean(steps)), 1), "ever": sum(ever)}
    k, n = (sum(t[key] for t in tasks.values()) for key in ("success", "episodes"))
    path, (low, high) = result_path(config, about), wilson(k, n)
    r = about | {
        "scenes": config.scenes, "unseen": config.unseen or None,
        "counts": counts,
        "success": k, "episodes": n, "interval": [round(low, 4), round(high, 4)], "tasks": tasks,
        "outcomes": [[task, *map(int, row)] for task, rows in found.items() for row in rows],
        "command": command(), "commit": commit(), "versions": sims.versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {config.device}",
        "seconds": about["seconds"] | {"rollout": round(seconds)}}
    for task, count in tasks.items():
        print(f"  {count['success']:3d}/{count['episodes']:<3d} {task}   "
              f"({count['steps']:.0f} steps)")
    write(path, json.dumps(r, indent=1) + "\n")
    print(f"{about['suite']} {about['plan']}: {k}/{n} = {100 * k / n:.1f} % [{100 * low:.1f}, "
          f"{100 * high:.1f}]   {seconds / 60:.1f} minutes -> {path}")


# --- command --------------------------------------------------------------------------------------

def about_executor(checkpoint, content):
    """What an executor's checkpoint holds of itself, for its result."""
    c = content["config"]
    return {"suite": c["env"], "plan": Path(c["planner"]).stem, "preset": c["preset"],
            "videos": c["demos"], "action_demos": c["action_demos"], "seed": c["seed"],
            "steps": content["step"], "differs": c["differs"], "config": c,
            "seconds": c["seconds"] | {"executor": training.last_seconds(checkpoint)}}


def jobs_of(config):
    """What is to be evaluated: [(make_actor, about, suite, tasks, size, render, film folder)]."""
    if config.checkpoints == ("demonstrator",):
        about = {"suite": config.suite, "plan": "demonstrator", "preset": None, "config": None,
                 "videos": None, "action_demos": None, "seed": None, "seconds": {}, "differs": "",
                 "counts": "success at the end"}
        return [(partial(Demonstrator, noise=config.noise), about, config.suite,
                 sims.choose_tasks(config.suite, config.tasks), 128, "fast",
                 Path("runs") / config.suite / "demonstrator_films")]
    if not config.checkpoints:
        fail("no checkpoint: python rollout.py runs/<suite>/mask_executor.pt, or demonstrator")
    jobs = []
    for path in config.checkpoints:
        content = training.load(path, "executor", MADE_BY)
        c = content["config"]
        tasks = sims.choose_tasks(c["env"], config.tasks or ",".join(c["task_names"]))
        unknown = [t for t in tasks if t not in c["task_names"]]
        if unknown:
            fail(f"{path} was not trained on {unknown[0]}")
        jobs.append((partial(make_policy, path, config.device), about_executor(path, content),
                     c["env"], tasks, c["size"], c["render"], path.removesuffix(".pt") + "_films"))
    return jobs


def make_policy(path, device, sim):
    return load_policy(path, device)


def main(argv=None):
    """Command line: evaluates checkpoints or the demonstrator and writes one JSON each."""
    config = parse(Config, "Success rates in the simulator.", argv)
    jobs = jobs_of(config)
    for make_actor, about, suite, tasks, size, render, folder in jobs:
        sims.check_unseen(suite, config.unseen or None)
        scenes_of(config)
        result_path(config, about)      # whatever can be refused is refused before the first scene
    for make_actor, about, suite, tasks, size, render, folder in jobs:
        begin = time.time()
        found = evaluate(make_actor, config, suite, tasks, size, render, folder)
        report(config, about, found, time.time() - begin)


if __name__ == "__main__":
    main()
