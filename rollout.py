"""Episodes in the simulator: success rates with intervals, films, one JSON each.

    python rollout.py runs/libero_spatial/mask_executor.pt      # 10 tasks x 10 test scenes
    python rollout.py demonstrator --suite libero_spatial       # the scripted policy
    python rollout.py runs/libero_spatial/mask_executor.pt --scenes development     # to choose by

An actor's episode succeeds when the goal holds at any step within the horizon, as LIBERO and
Meta-World count; of a demonstrator, which lets go and retreats, LIBERO's must hold at the end.
Test scenes are never trained on and nothing is chosen on them. A crash ends the evaluation: it is
an error, not a failed episode.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sims
from core import training
from core.draw import write_film
from core.files import check_folder, code, fail, write
from core.flags import FREE, differences, flag, parse
from demos.record import Demonstrator, run_jobs, shares
from executor import Executor, Policy, load_executor


@dataclass
class Config:
    checkpoints: tuple[str, ...] = flag((), "executors' checkpoints, or demonstrator: the scripted "
                                        "policy", positional=True)
    suite: str = flag("", "suite of the demonstrator; an executor's is its own")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: the executor's")
    episodes: int = flag(10, "episodes per task", minimum=1)
    scenes: str = flag("test", "test: LIBERO's bundled states, Meta-World's test seeds; "
                       "development: scenes to choose by; or the first of other seeds")
    noise: float = flag(0.0, "standard deviation of noise on the demonstrator's motion", minimum=0)
    unseen: str = flag("", "what is new in libero_spatial's scenes", choices=["", *sims.UNSEEN])
    films: bool = flag(True, "an mp4 of each task's first success and first failure")
    workers: int = flag(2, "processes", minimum=1)
    results: str = flag("results", "folder of the results")
    device: str | None = flag(None, "cpu or cuda")


# --- episodes -------------------------------------------------------------------------------------

def play(sim, actor, scene, film=False):
    """One episode of any actor.  scene: what sim.reset takes, {"seed": s} or {"init": k}
    -> success at the end, success at any step, steps, pictures (`film`: of every fourth step)."""
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
    if config.scenes != "development" and not (
            config.scenes.isdecimal() and int(config.scenes) < 2 ** 31):
        fail(f"--scenes {config.scenes}: give test, development or a seed such as 2000")
    first = sims.DEVELOPMENT if config.scenes == "development" else int(config.scenes)
    return [{"seed": first + k} for k in count]


def play_scenes(job):
    """Worker: an actor on some scenes of one task; yields task, (scene, success at the end, at any
    step, steps) after each.  filmed: which outcomes have a film already."""
    make_actor, config, suite, task, scenes, size, render, folder, filmed = job
    torch.set_num_threads(1)
    sim = sims.make(suite, task, size, render, unseen=config.unseen or None)
    actor = make_actor(sim)
    for scene in scenes:
        film = config.films and len(filmed) < 2
        success, ever, steps, pictures = play(sim, actor, scene, film)
        if film and ever not in filmed:
            filmed = {*filmed, ever}
            write_film(Path(folder) / f"{task}_{'success' if ever else 'failure'}.mp4", pictures)
        yield task, (*scene.values(), success, ever, steps)
    sim.close()


def evaluate(make_actor, config, about, log, tasks, size, render, folder):
    """make_actor(sim) -> actor, called in each process; about: see `report`; log: a file of the
    outcomes so far, which an interrupted evaluation has left; folder of the films
    -> {task: [(scene, success at the end, at any step, steps), ...]}, scenes in order; seconds."""
    begin, scenes, found = time.time(), scenes_of(config), {task: [] for task in tasks}
    # what the outcomes depend on is the log's first row
    rows = [[about, code(), {k: v for k, v in asdict(config).items() if k not in FREE}]]
    if training.read_log(log)[:1] == json.loads(json.dumps(rows)):
        rows = training.read_log(log)
    for task, outcome, seconds in rows[1:]:
        found[task].append(tuple(outcome))
        begin = time.time() - seconds
    jobs, total = [], len(tasks) * len(scenes)
    for task, outcomes in found.items():
        played, filmed = {scene for scene, *_ in outcomes}, {ever for _, _, ever, _ in outcomes}
        left = [scene for scene in scenes if not played & {*scene.values()}]
        jobs += [(make_actor, config, about["suite"], task, share, size, render, folder, filmed)
                 for share in shares(left, len(tasks), config.workers)]
    left = sum(len(job[4]) for job in jobs)
    if left < total:
        print(f"{log} has {total - left} of {total} episodes: continuing")
    for task, outcome in run_jobs(play_scenes, jobs, config.workers, left, "rollout"):
        found[task].append(outcome)
        rows.append([task, outcome, time.time() - begin])
        write(log, "".join(json.dumps(row) + "\n" for row in rows))
    return {task: sorted(outcomes) for task, outcomes in found.items()}, time.time() - begin


# --- results --------------------------------------------------------------------------------------

def commit():
    """The source's git commit, '+' if the code was changed since; None outside a repository."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True,
                                        cwd=Path(__file__).parent).stdout.strip()
    changed = bool(git("status", "--porcelain", "-uno", "*.py"))
    return git("rev-parse", "--short", "HEAD") + "+" * changed or None


def result_name(config, about):
    """Where a result is written: its name holds suite, plan, preset, demonstrations, seed and all
    that differs from the presets."""
    name = f"{about['suite']}_{about['plan']}"
    if about["preset"]:
        name += f"_{about['preset']}_d{about['action_demos']}_s{about['seed']}{about['differs']}"
    return Path(config.results) / f"{name}{differences(config)}.json"


def result_path(config, about):
    """Where a result is written; fails if the file is there, of another configuration."""
    path = result_name(config, about)
    plain = lambda c: {k: v for k, v in (c or {}).items() if k not in FREE}
    if path.exists():
        there = json.loads(path.read_text()).get("config")
        if plain(there) != plain(json.loads(json.dumps(about["config"]))):
            fail(f"{path} is of another configuration: choose another --results, or delete it")
    return path


def report(config, about, found, seconds):
    """Prints and writes the result of an evaluation.  about: suite, plan, preset, videos,
    action_demos, seed, differs and config (of the executor), seconds of data and training; and
    counts, which success, if not at any step, code, what trained it; found: see `evaluate`."""
    from scipy.stats import binomtest
    counts = about.get("counts", "ever succeeded")
    tasks = {}
    for task, outcomes in found.items():
        _, end, ever, steps = zip(*outcomes)
        tasks[task] = {"success": sum(end if counts == "success at the end" else ever),
                       "episodes": len(end), "steps": round(float(np.mean(steps)), 1),
                       "ever": sum(ever)}
    k, n = (sum(t[key] for t in tasks.values()) for key in ("success", "episodes"))
    low, high = binomtest(k, n).proportion_ci(method="wilson")
    path = result_path(config, about)
    r = about | {
        "scenes": config.scenes, "unseen": config.unseen or None, "counts": counts,
        "success": k, "episodes": n, "interval": [round(low, 4), round(high, 4)], "tasks": tasks,
        "outcomes": [[task, *map(int, row)] for task, rows in found.items() for row in rows],
        "evaluation": asdict(config) | {"suite": about["suite"]},
        "code": "+".join(sorted({code(), *about.get("code", ())})),
        "command": " ".join(["python", *sys.orig_argv[1:]]), "commit": commit(),
        "versions": sims.versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {config.device}",
        "seconds": about["seconds"] | {"rollout": round(seconds)}}
    for task, t in tasks.items():
        print(f"  {t['success']:3d}/{t['episodes']:<3d} {task}   ({t['steps']:.0f} steps)")
    write(path, json.dumps(r, indent=1) + "\n")
    print(f"{about['suite']} {about['plan']}: {k}/{n} = {100 * k / n:.1f} % [{100 * low:.1f}, "
          f"{100 * high:.1f}]   {seconds / 60:.1f} minutes -> {path}")


def run(config, jobs):
    """Evaluates jobs [(make_actor, about, tasks, size, render, folder)], see `evaluate` and
    `report`; whatever can be refused is refused before the first scene is played."""
    scenes_of(config)
    paths = []
    for _, about, *_, films in jobs:
        if config.films:
            check_folder("--films", films)
        sims.check_unseen(about["suite"], config.unseen or None)
        paths.append(path := result_path(config, about))
        if paths.count(path) > 1:
            fail(f"{path} would be of two of these: evaluate them apart, with another --results")
    for path, (make_actor, about, *where) in zip(paths, jobs):
        log = path.with_suffix(".part")
        report(config, about, *evaluate(make_actor, config, about, log, *where))
        log.unlink(missing_ok=True)


# --- command --------------------------------------------------------------------------------------

def about_executor(checkpoint, content):
    """What an executor's checkpoint holds of itself, for its result."""
    c = content["config"]
    return {"suite": c["env"], "plan": c["plan"], "preset": c["preset"],
            "videos": c["demos"], "action_demos": c["action_demos"], "seed": c["seed"],
            "steps": content["step"], "differs": c["differs"], "config": c,
            "code": content.get("code", ()),
            "seconds": c["seconds"] | {"executor": training.last_seconds(checkpoint)}}


def executor_jobs(config, Kind, Actor):
    """Jobs for `run` of the trained executors config.checkpoints, of class Kind;
    acted with by Actor(executor)."""
    jobs = []
    if config.suite or config.noise:
        fail("--suite and --noise are the demonstrator's: python rollout.py demonstrator")
    for path in config.checkpoints:
        content = training.load(path, Kind.kind, Kind.made_by)
        training.check_whole(path, content)
        c = content["config"]
        tasks = sims.choose_tasks(c["env"], config.tasks or ",".join(c["task_names"]))
        if unknown := [task for task in tasks if task not in c["task_names"]]:
            fail(f"{path} was not trained on {unknown[0]}")
        jobs.append((partial(make_policy, Kind, Actor, path, config.device),
                     about_executor(path, content), tasks, c["size"], c["render"],
                     path.removesuffix(".pt") + "_films"))
    return jobs


def demonstrator_jobs(config):
    """The one job for `run` of the scripted policy."""
    suite = config.suite or "libero_spatial"
    about = dict.fromkeys(("preset", "videos", "action_demos", "seed", "config"))
    about |= {"suite": suite, "plan": "demonstrator", "differs": "", "seconds": {}}
    about |= {} if sims.goal_varies(suite) else {"counts": "success at the end"}
    return [(partial(Demonstrator, noise=config.noise), about,
             sims.choose_tasks(suite, config.tasks), 128, "fast",
             Path("runs") / suite / "demonstrator_films")]


def make_policy(Kind, Actor, path, device, sim):
    return Actor(load_executor(path, device, Kind))


def main(argv=None):
    """Command line: evaluates checkpoints or the demonstrator and writes one JSON each."""
    config = parse(Config, "Success rates in the simulator.", argv)
    if not config.checkpoints:
        fail("no checkpoint: python rollout.py runs/<suite>/mask_executor.pt, or demonstrator")
    scripted = "demonstrator" in config.checkpoints
    if scripted and len(config.checkpoints) > 1:
        fail("demonstrator beside a checkpoint: evaluate them one after the other")
    run(config, demonstrator_jobs(config) if scripted else
        executor_jobs(config, Executor, Policy))


if __name__ == "__main__":
    main()
