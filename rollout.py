"""Episodes in the simulator: success rates with intervals, films, results, tables.

    python rollout.py runs/libero_spatial/mask_executor.pt     # 10 tasks x 10 bundled states
    python rollout.py --policy expert --suite libero_spatial   # the upper bound
    python rollout.py --table                                  # README's table and plot

An episode succeeds when LIBERO's goal predicates hold at any step within the horizon, as LIBERO
itself counts; for the expert, which lets go and retreats, they must still hold at the end. The
bundled initial states are never trained on. A crash ends the evaluation: it is an error, not a
failed episode.
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

import executor
import mask_planner
import sims
import video_planner
from core import networks, training
from core.draw import FILM_SCALE, caption, draw_heat, draw_masks, draw_tracks, write_film
from core.files import fail, write
from core.flags import flag, from_dict, parse
from demos import record
from demos.libero import demonstrator
from sims import libero, metaworld
from sims.camera import INITS
from video_control import unipi


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
    content = training.load(checkpoint, kind=unipi.KINDS)
    c = from_dict(executor.Config, content["config"])
    again = "-replan" * bool(replan)            # UniPi only
    plan = content["extra"].get("plan", executor.plan_name(c)) + again
    about = {"plan": plan, "preset": c.preset, "videos": c.demos, "action_demos": c.action_demos,
             "seed": c.seed, "steps": content["step"]}
    return about, content["extra"]["seconds"] | {"executor": training.last_seconds(checkpoint)}


def write_cost(folder, suite, checkpoint, replan, flops, parameters):
    """results/<suite>_<plan>_<preset>_cost.json: what 600 steps of an executor cost -> its path."""
    about, _ = of_checkpoint(checkpoint, replan)
    r = {"cost_of": about["plan"], "suite": suite, "preset": about["preset"],
         "tflops": flops / 1e12, "parameters": parameters, "command": command(), "commit": commit()}
    path = Path(folder) / f"{suite}_{about['plan']}_{about['preset']}_cost.json"
    write(path, json.dumps(r, indent=1) + "\n")
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
    kept = f"seeds from {metaworld.EVALUATION}" if seeded else "bundled initial states"
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
    if "bundled" not in r["scenes"] and str(metaworld.EVALUATION) not in r["scenes"]:
        name += "_" + r["scenes"].replace(" ", "_")
    if r["unseen"]:
        name += f"_unseen_{r['unseen']}"
    return Path(folder) / f"{name}.json"


@dataclass
class Config:
    policy: str = flag("executor", "executor: the given checkpoints; expert: the scripted "
                                   "demonstrator", choices=["executor", "expert"])
    suite: str = flag("libero_spatial", "suite, for --policy expert; otherwise the executor's")
    tasks: str = flag("",
                      "numbers or names of tasks, comma-separated; empty: the executor's, or all")
    episodes: int = flag(10, "episodes per task", minimum=1)
    scenes: int | None = flag(None, "use sampled scenes with seeds from this one on, instead of "
                                    "the bundled states", minimum=0)
    noise: float = flag(0.0,
                        "standard deviation of noise on the executed motion, for --policy expert",
                        minimum=0)
    films: bool = flag(True, "write an mp4 of each task's first success and first failure")
    unseen: str | None = flag(None, "what is new in the scenes of libero_spatial",
                              choices=list(libero.UNSEEN))
    render: str | None = flag(None, "fast or faithful, as for extract.py; by default what the "
                                    "executor was trained on", choices=["fast", "faithful"])
    replan: int = flag(0, "UniPi: steps after which a new video is imagined; 0: never", minimum=0)
    workers: int = flag(2, "processes", minimum=1)
    results: str = flag("results", "folder of the results")
    device: str | None = flag(None, "cpu or cuda")
    show_attention: bool = flag(False, "only draw what ATM's policy attends to, with and without "
                                       "tracks (ATM, Fig. 10)")
    cost: bool = flag(False, "only count the floating point operations of 600 steps of each "
                             "executor (ATM, Table IV)")


# --- episodes -------------------------------------------------------------------------------------

def film_frame(frame, policy, sim):
    """One picture of a film: third-person view, with the plan's masks decoded at two horizons, and
    the wrist view."""
    planner = policy.executor.planner if policy else None
    views = [("now", frame["agentview_rgb"])]
    if isinstance(policy, unipi.UniPi):
        views += [("to reach", policy.video[0].cpu().numpy()),
                  ("the last", policy.video[-1].cpu().numpy())]
    elif planner and planner.kind == "video_planner":
        imagined = planner.imagine(policy.frames[-1], policy.goal[None])[0].cpu().numpy()
        views += [(f"imagined {k}", imagined[k - 1]) for k in (1, 4, video_planner.FRAMES)]
    elif planner and planner.kind == "track_planner":
        views.append(("plan", draw_plan(policy, frame)))
    elif planner and planner.kind == "mask_planner":    # features are nothing to look at
        now = mask_planner.binary_masks(torch.as_tensor(mask_planner.half(frame["masks"]))[None].long(),
                                        planner.config.objects)  # (1, N, H/2, W/2)
        history = torch.stack(policy.frames, 1)  # (1, h, H, W, 3): what the policy has just seen
        with torch.no_grad():
            prob = planner.predict(history, policy.goal[None], now.to(policy.device))
        label = mask_planner.soft_aggregate(prob).argmax(1)[0].cpu().numpy()  # (K, H/2, W/2)
        for k in (1, 3):
            views.append((f"plan +{mask_planner.HORIZONS[k]}", draw_masks(
                frame["agentview_rgb"], mask_planner.double(label[k], frame["masks"].shape))))
    views.append(("wrist", frame["eye_in_hand_rgb"]))
    large = [np.kron(v, np.ones((FILM_SCALE, FILM_SCALE, 1), np.uint8)) for _, v in views]
    return np.concatenate([caption(v, name, 16) for (name, _), v in zip(views, large)], 1)


def draw_plan(policy, frame, side=8):
    """The third-person picture with where the track planner says that a grid of points, or the
    hand, will go."""
    planner = policy.executor.planner
    hand = torch.tensor(frame["hand"].astype(np.float32))[None]
    grid = networks.grid_points(side) if planner.config.points == "any" else hand
    image, grid = policy.frames[-1], grid.to(policy.device)[None]  # (1, H, W, 3), (1, N, 2)
    with torch.no_grad():
        tracks = torch.cat([grid[:, None], planner(image, grid, policy.goal[None])[0]], 1)
    tracks = tracks[0].cpu().numpy()  # (1 + S, N, 2)
    return draw_tracks(frame["agentview_rgb"], tracks, np.ones(tracks.shape[:2], bool))


def attended(frame, policy, sim):
    """The third-person picture, and where on it the CLS token looks, with tracks and without."""
    executor, look, image = policy.executor, policy.looks[-1], frame["agentview_rgb"]
    views = [("now", np.kron(image, np.ones((2, 2, 1), np.uint8)))]
    with torch.no_grad():
        both = [net(look[k]).flatten(2).transpose(1, 2) for net, k in
                ((executor.encoder, "picture"), (executor.wrist_encoder, "wrist"))]
        for name, tracks in (("with tracks", look["tracks"]), ("without", None)):
            heat = executor.spatial.attention(torch.stack(both, 1), tracks)[0, 0].cpu().numpy()
            views.append((name, draw_heat(views[0][1], heat)))
    return np.concatenate([caption(v, name) for name, v in views], 1)


def show_attention(checkpoint, config, tasks=4, columns=3):
    """Plays the first bundled state of some tasks -> a picture of `attended` over time, a row per
    task (ATM, Fig. 10); its path."""
    policy, rows = unipi.load_policy(checkpoint, config.device), []
    extra = policy.executor.extra
    if not (policy.executor.spatial and policy.executor.config.early):
        fail(f"{checkpoint} does not hear tracks beside patches: --show-attention is for python "
             "executor.py --planner runs/<suite>/track.pt")
    for name in sims.choose_tasks(extra["suite"], config.tasks or ",".join(extra["tasks"]))[:tasks]:
        sim = sims.make(extra["suite"], name, extra["size"], config.render or extra["render"])
        k = extra["tasks"].index(name)
        policy.reset(sim.goal_image(init=0) if policy.executor.own_goal
                     else policy.executor.goals[k, 0], k)
        pictures = play(sim, policy, sim.reset(init=0), True, attended)[2]
        sim.close()
        # up to about the grasp
        chosen = np.linspace(0, len(pictures) // 2, columns).astype(int)
        rows.append(caption(np.concatenate([pictures[i] for i in chosen], 1),
                                    name.replace("_", " ")))
    import imageio.v3 as iio
    path = Path(checkpoint).with_name(Path(checkpoint).stem + "_attention.png")
    iio.imwrite(path, np.concatenate(rows))
    return path


def play(sim, actor, start, film, draw=film_frame):
    """One episode from the frame after reset.  actor: a Policy, or (demonstrator, noise, rng).

    -> success (of a policy at the first moment, of a demonstrator at the end), steps, list of what
    `draw` makes of each look (empty unless `film`), whether there was success at any step.
    """
    policy = actor if isinstance(actor, executor.Policy) else None
    frame, pictures, success, ever = start, [], False, False
    # ours: the expert may try again, as when it records; a policy has LIBERO's horizon
    for steps in range(1, (sim.horizon if policy else sim.patience) + 1):
        if policy:
            look = policy.wants_frame
            if look and frame is None:
                frame = sim.frame(film, film or not policy.executor.places)
            action = policy(frame)
            if film and look:
                pictures.append(draw(frame, policy, sim))
        else:
            expert, noise, rng = actor
            action = expert(sim)
            if film and steps % 4 == 1:
                pictures.append(draw(sim.frame(), None, sim))
            action = action + np.append(rng.normal(0, noise, sim.action_dim - 1), 0)
        _, success = sim.step(action, observe=False)
        frame, ever = None, ever or success
        if success if policy else actor[0].done:
            break
    return success, steps, pictures, ever


def cost(checkpoint, replan=0, steps=600):
    """Floating point operations of planner and executor in an episode of that length (ATM, Table
    IV), by torch's counter; parameters of both."""
    from torch.utils.flop_counter import FlopCounterMode
    policy = unipi.load_policy(checkpoint, replan=replan)
    side = policy.executor.extra["size"]
    black = np.zeros((side, side, 3), np.uint8)
    numbers = {"ee_states": 6, "gripper_states": 2, "joint_states": 7}
    frame = {"agentview_rgb": black, "eye_in_hand_rgb": black, "hand": np.zeros(2, np.float16)}
    frame |= {k: np.zeros(n, np.float32) for k, n in numbers.items()}
    policy.reset(black)
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            policy(frame)
    return counter.get_total_flops(), sum(p.numel() for p in policy.executor.parameters())


def run_task(job):
    """Worker: all checkpoints on some scenes of one task -> {checkpoint: [success, ...]}, in the
    scenes' order."""
    config, checkpoints, suite, task, scenes, size, render = job
    torch.set_num_threads(1)
    observe = config.policy == "executor" or config.films
    sim = sims.make(suite, task, size, config.render or render, observe, config.unseen)
    done = {}
    for checkpoint in checkpoints:
        policy = unipi.load_policy(checkpoint, config.device, config.replan) if checkpoint else None
        done[checkpoint], filmed = [], set()
        for scene in scenes:
            where = {"seed": scene} if config.scenes is not None else {"init": scene}
            film = config.films and len(filmed) < 2
            if policy:
                k = policy.executor.extra["tasks"].index(task)
                carried = policy.executor.goals[k]  # (goals, H, W, 3)
                policy.reset(sim.goal_image(**where) if policy.executor.own_goal
                             else carried[scene % len(carried)], k)
            frame = sim.reset(**where)
            actor = policy or (demonstrator(sim, seed=scene), config.noise,
                               np.random.default_rng([scene, 1]))
            success, steps, pictures, ever = play(sim, actor, frame, film)
            done[checkpoint].append((bool(success), steps, bool(ever))[:2 if policy else 3])
            if film and success not in filmed:
                filmed.add(success)
                folder = Path(str(checkpoint or f"runs/{suite}/expert").removesuffix(".pt")
                              + "_films")
                write_film(folder / f"{task}_{'success' if success else 'failure'}.mp4", pictures)
            run_task.progress.put(1)
    sim.close()
    return task, done


def evaluate(config, checkpoints, suite, names, size, render="fast"):
    """-> {checkpoint: {task: [(success, steps), ...]}} over config.episodes scenes of each task; of
    a demonstrator (success at the end, steps, success at any step)."""
    first = config.scenes if config.scenes is not None else 0
    if config.scenes is None and config.episodes > INITS:
        fail(f"--episodes {config.episodes}: there are {INITS} evaluation scenes; or give "
             f"--scenes 1000")
    scenes = list(range(first, first + config.episodes))
    # few tasks: split each among the processes
    pieces = config.workers if len(names) < 2 * config.workers else 1
    jobs = [(config, checkpoints, suite, name, scenes[k::pieces], size, render)
            for name in names for k in range(pieces) if scenes[k::pieces]]
    total = len(names) * len(scenes) * len(checkpoints)
    found = {c: {name: [] for name in names} for c in checkpoints}
    observe = config.policy == "executor" or config.films
    with record.pool(config.workers, run_task, observe) as (workers, queue):
        finished = workers.imap_unordered(run_task, jobs)
        for task, done in record.watch(finished, queue, len(jobs), total, "rollout"):
            for checkpoint, outcome in done.items():
                found[checkpoint][task] += outcome
    return found


# --- command --------------------------------------------------------------------------------------

def main(argv=None):
    """Command line: evaluates checkpoints or the expert and writes one JSON each, or makes README's
    tables."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    checkpoints, rest = argv[:first_flag], argv[first_flag:]
    config = parse(Config,
                        "rollout.py CHECKPOINT [CHECKPOINT ...]: success rates in the simulator.",
                        rest)
    size, suite, render = 128, config.suite, "fast"
    if config.policy == "executor":
        if not checkpoints:
            fail("no checkpoint: python rollout.py runs/<suite>/mask_executor.pt, or --policy "
                 "expert")
        made_by = "python executor.py --planner runs/<suite>/mask.pt"
        extras = [training.load(c, unipi.KINDS, made_by)["extra"] for c in checkpoints]
        if any(e[k] != extras[0][k] for e in extras for k in ("suite", "tasks", "size", "render")):
            fail("these checkpoints are of different suites, tasks, sizes or rendering: evaluate "
                 "them one by one")
        suite, size, render = (extras[0][k] for k in ("suite", "size", "render"))
        if config.cost:
            for checkpoint in checkpoints:
                flops, parameters = cost(checkpoint, config.replan)
                path = write_cost(config.results, suite, checkpoint, config.replan, flops,
                                          parameters)
                print(f"{checkpoint}: {flops / 1e12:.3f} TFLOPs in 600 steps (paper: ATM 1.56, "
                      f"UniPi 39.29) -> {path}")
            return
        if config.show_attention:
            for checkpoint in checkpoints:
                print(f"picture: {show_attention(checkpoint, config)}")
            return
        names = sims.choose_tasks(suite, config.tasks or ",".join(extras[0]["tasks"]))
        unknown = [n for n in names if n not in extras[0]["tasks"]]
        if unknown:
            fail(f"{checkpoints[0]} was not trained on {unknown[0]}")
    else:
        checkpoints, names = [None], sims.choose_tasks(suite, config.tasks)
    sims.check_unseen(suite, config.unseen)
    begin = time.time()
    found = evaluate(config, checkpoints, suite, names, size, render)
    seconds = (time.time() - begin) / len(checkpoints)
    for checkpoint in checkpoints:
        r = result(config, checkpoint, suite, found[checkpoint], seconds)
        for task, count in r["tasks"].items():
            print(f"  {count['success']:3d}/{count['episodes']:<3d} {task}   "
                  f"({count['steps']:.0f} steps)")
        path = result_path(config.results, r)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(r, indent=1) + "\n")
        low, high = r["interval"]
        print(f"{suite} {r['plan']}: {r['success']}/{r['episodes']} = "
              f"{100 * r['success'] / r['episodes']:.1f} % "
              f"[{100 * low:.1f}, {100 * high:.1f}]   {seconds / 60:.1f} minutes -> {path}")


if __name__ == "__main__":
    main()
