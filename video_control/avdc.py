"""AVDC section 3.3: acting from the flow of a video, without any action label.

    python avdc.py --future oracle          # true future, exact correspondence: the upper bound
    python avdc.py --future true            # true pictures of the future, learned flow
    python avdc.py --future generated       # imagined pictures, learned flow: AVDC

Points of the task's object are followed through the video; where the picture shows them says how
the object moves, a rigid motion in space, from their depth in the first picture alone.  A hand that
holds or pushes the object must go there, too.  Needs runs/avdc/flow.pt (`flow.py`) for all but
oracle, and a video planner for generated.

Sizes: P points, K pictures to come, H W pixels.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import rollout
import sims
import video_planner
from core import training
from core.draw import caption, write_film
from core.files import fail, write
from core.flags import flag, from_dict, parse
from demos import record
from demos.language import embed
from sims import metaworld
from sims.camera import Replay, cast, copy_state, project
from video_control import flow
from video_control.motion import grasp_point, infer_motions, subgoals


@dataclass
class Config:
    future: str = flag("generated", "where the video comes from",
                       choices=["oracle", "true", "generated"])
    flow: str = flag("learned", "between its pictures: learned (flow.py), dis (OpenCV's) or raft "
                     "(torchvision's, its weights in torch.hub's folder)",
                     choices=["learned", "dis", "raft"])
    suite: str = flag("avdc", "suite of Meta-World, or a task")
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    planner: str = flag("", "checkpoint of video_planner.py, for generated; empty: "
                            "<out>/<suite>/video.pt")
    views: str = flag("", "cameras, 0, 1 or 2; empty: all three, for generated those that its "
                          "planner has seen")
    episodes: int = flag(25, "episodes per task and camera", minimum=1)
    scenes: int = flag(2000, "seed of the first scene; videos have small ones", minimum=0)
    horizon: int = flag(500, "steps of an episode", minimum=1)
    replans: int = flag(5, "times to imagine again when the hand stands still", minimum=0)
    films: bool = flag(True, "write an mp4 of each task's first episode")
    workers: int = flag(2, "processes", minimum=1)
    out: str = flag("runs", "folder of the runs")
    results: str = flag("results", "folder of the results")
    device: str | None = flag(None, "unused here; the same flags everywhere")


POINTS = 300        # of the object that are followed
NOISE = {"oracle": 0.1, "true": 0.7, "generated": 1.0}      # of a target, pixels
LIFTS = 0.1         # metres: an object that rises this far is held, any other pushed
HOVER, BACK, LOWER = 0.2, 0.08, 0.03    # metres: above a point; behind it and below it, to push
SINK = 0.01         # metres below the points seen, which are of the upper side, to hold
REACHED = {"grasp": 0.04, "push": 0.12}     # metres from a subgoal
SQUEEZE = 15        # steps in which the fingers close
STILL, PATIENCE = 0.001, 15         # metres per step, steps so until it imagines again


# --- acting ---------------------------------------------------------------------------------------

def true_future(sim, seed):
    """Joint positions (T, nq) from now on until the package's own policy is done, from now (T = 1
    if it does not get there).  A second simulator plays them."""
    other = getattr(sim, "shadow", None)
    if other is None:
        other = sim.shadow = sims.make(sim.suite, sim.task, observe=False)
    other.reset(**seed)
    copy_state(other.model, sim.data, other.data)
    other.observation = other.env._get_obs()    # its script goes by the last one
    way, left = [sim.data.qpos.copy()], other.linger
    for _ in range(other.horizon):
        _, success = other.step(other.script(), observe=False)
        way.append(other.data.qpos.copy())
        left -= success
        if left <= 0:
            break
    return np.stack(way)


class Actor:
    """AVDC in a freshly reset Meta-World simulator: `actor(sim)` -> the next action (4,); `done`
    once the task has succeeded.

    future: what the video is, "oracle" and "true": of the package's own policy from now on, or
    "generated"; where: the scene, as given to sim.reset; view: the camera; between: the flow from
    one picture to another, as flow.dis_flow, for all but oracle; planner: a VideoPlanner told by
    language, and text (E,), for generated.
    """

    def __init__(self, sim, future, where, view, between=None, planner=None, text=None,
                 replans=5, seed=0):
        self.sim, self.future, self.where, self.view = sim, future, where, view
        self.between, self.planner, self.text = between, planner, text
        self.plans_left, self.mode, self.done = 1 + replans, None, False
        self.rng = np.random.default_rng(seed)
        self.plan()

    def plan(self):
        """Imagines a video from now on and infers subgoals."""
        self.plans_left -= 1
        self.still = PATIENCE
        places, points, picture, fixed = self.object_points()
        correspond, view = self.correspondence(picture, fixed)
        noise = NOISE[self.future] / len(picture)
        motions = infer_motions(places, points, correspond, view, video_planner.FRAMES, noise)
        way = subgoals(grasp_point(points), motions)                        # (1 + K, 3)
        if self.mode is None:
            rise = np.abs(way[1:-1, 2] - way[0, 2]).max()
            self.mode = "grasp" if rise > LIFTS else "push"
        if self.mode == "push":
            self.contact, way = self.push(points, motions, way)
            self.stage = "over"
        else:
            # ours: the points seen lie on the near side; the middle is half the width behind
            across = np.ptp(points @ view[1][0])
            behind = view[1][2] * [1, 1, 0] / np.linalg.norm(view[1][2][:2])
            way = way + min(across / 2, 0.02) * behind - [0, 0, SINK]
            self.contact = way[0]
            self.stage = "follow" if getattr(self, "stage", "over") == "follow" else "over"
        self.way, self.planned = list(way[1:]), way
        self.before, self.steps = self.hand, 0

    def push(self, points, motions, way):
        """Where to put the closed hand to push the object on its way, and that way.

        points (P, 3), way (1 + K, 3) of the medoid -> contact (3,), way.  ours: of the object's
        points the one nearest to the medoid behind which the depth picture shows room for a hand.
        """
        def direction(way):
            ahead = way[1:] - way[0]
            far = np.flatnonzero(np.linalg.norm(ahead[:, :2], axis=1) > 0.1)
            return ahead[far[0] if len(far) else -1]

        d = direction(way)
        if np.linalg.norm(d[:2]) < abs(d[2]):               # differs: down, from straight above
            return way[0] - [0, 0, LOWER], way - [0, 0, LOWER]
        for point in sorted(points, key=lambda p: np.linalg.norm(p - way[0]))[::10]:
            here = subgoals(point, motions)
            d = direction(here) * [1, 1, 0]
            contact = point - BACK * d / max(np.linalg.norm(d), 1e-6) - [0, 0, LOWER]
            if self.room(contact):
                return contact, here - [0, 0, LOWER]
        d = direction(way) * [1, 1, 0]
        return way[0] - BACK * d / max(np.linalg.norm(d), 1e-6) - [0, 0, LOWER], way - [0, 0, LOWER]

    def room(self, point):
        """Whether the first picture shows nothing but robot before this point and above it."""
        column = point + np.outer([0.0, 0.04, 0.08, 0.12, 0.16], [0, 0, 1])  # (5, 3)
        sim = self.sim
        eye, axes, focal = sim.camera.pose(sim.data, self.view)
        local = (column - eye) @ axes.T
        ray = (local / local[:, 2:]) @ axes
        groups = np.array(sim.camera.option.geomgroup, np.uint8)
        geom, far = cast(sim.model, sim.data, groups, eye, ray)
        robot = (geom >= 0) & (sim.label[geom] == 1)
        return bool((robot | (geom < 0) | (far > local[:, 2])).all())

    def object_points(self):
        """What the first picture shows of the object: places (P, 2), points (P, 3), the picture;
        and the bodies that they are on and where, (P,), (P, 3), for the exact correspondence."""
        sim = self.sim
        picture = sim.camera.picture(sim.data, self.view)
        rows, columns = np.nonzero(sim.camera.mask(sim.data, self.view, sim.label) == 2)
        if not len(rows):       # hidden: nothing to follow; the middle of the picture's object
            rows, columns = np.array([len(picture) // 2]), np.array([len(picture) // 2])
        chosen = self.rng.integers(len(rows), size=POINTS)
        jitter = self.rng.uniform(size=(POINTS, 2))
        places = (np.stack([columns[chosen], rows[chosen]], 1) + jitter) / len(picture)
        replay = Replay(sim.camera, self.view, sim.model, sim.data.qpos[None])
        body, local = replay.pick(np.zeros(POINTS, int), places)
        own = np.isin(body, np.unique(sim.model.geom_bodyid[sim.label == 2]))
        own = own if own.any() else body >= 0
        points = replay.follow(body[own], local[own])[0][0]
        return places[own], points, picture, (body[own], local[own])

    def correspondence(self, picture, fixed):
        """-> correspond(k, places, kept) as for `infer_motions`; eye, axes, focal length."""
        sim = self.sim
        view = sim.camera.pose(sim.data, self.view)
        if self.future == "generated":
            imagined = self.planner.imagine(torch.as_tensor(picture)[None],
                                            torch.as_tensor(self.text)[None],
                                            torch.Generator().manual_seed(self.plans_left))
            pictures = [picture, *imagined[0].cpu().numpy()]
        else:
            way = true_future(sim, self.where)
            times = video_planner.clip_times(np.array([0]), np.array([len(way)]))[0]
            replay = Replay(sim.camera, self.view, sim.model, way[times])
            if self.future == "oracle":
                exact = replay.follow(*fixed)[1]                            # (1 + K, P, 2)
                return lambda k, places, kept: exact[k + 1, kept], view
            pictures = []
            for t in range(len(times)):
                replay.at(t)
                pictures.append(sim.camera.picture(replay.data, self.view))
        self.pictures = pictures

        def learned(k, places, kept):
            return places + flow.sample_flow(self.between(pictures[k], pictures[k + 1]), places)
        return learned, view

    @property
    def hand(self):
        """The middle between the fingertips (3,), metres."""
        return self.sim.env.tcp_center.copy()

    def __call__(self, sim):
        """The action for the current state, (4,) float32 in [-1, 1]."""
        self.done = sim.success()
        self.still -= np.linalg.norm(self.hand - self.before) < STILL
        self.before, self.steps = self.hand, self.steps + 1
        if self.still <= 0 and self.plans_left:
            self.plan()
        hand, target = self.hand, self.contact
        if self.stage == "over":
            if np.linalg.norm((hand - target)[:2]) < 0.02:
                self.stage = "down"
            target = target + [0, 0, HOVER]
        if self.stage == "down" and abs(hand[2] - self.contact[2]) < 0.015:
            self.stage, self.steps = "hold", 0
        if self.stage == "hold" and (self.mode == "push" or self.steps > SQUEEZE):
            self.stage = "follow"
        if self.stage == "follow":
            while len(self.way) > 1 and np.linalg.norm(hand - self.way[0]) < REACHED[self.mode]:
                self.way.pop(0)
            target = self.way[0]
        closed = self.mode == "push" or self.stage in ("hold", "follow")
        move = np.clip(20 * (target - hand), -1, 1)
        return np.append(move, 1 if closed else -1).astype(np.float32)


# --- episodes -------------------------------------------------------------------------------------

def film_picture(actor, step):
    """What happens, with the subgoals drawn in, beside the imagined picture of about now."""
    import cv2
    sim = actor.sim
    picture = np.kron(sim.camera.picture(sim.data, actor.view), np.ones((3, 3, 1), np.uint8)).copy()
    places = project(actor.planned, *sim.camera.pose(sim.data, actor.view))[0]
    for k, place in enumerate(np.nan_to_num(places, nan=-1).clip(-1, 2)):
        centre = np.rint(place * len(picture)).astype(int).tolist()
        cv2.circle(picture, centre, 4, (40 + 30 * k, 255 - 30 * k, 60), -1 if k else 2, cv2.LINE_AA)
    cells = [caption(picture, f"{actor.mode}, {actor.stage}, step {step}", 16)]
    if getattr(actor, "pictures", None):
        k = video_planner.FRAMES - len(actor.way) if actor.stage == "follow" else 0
        imagined = actor.pictures[min(k, len(actor.pictures) - 1)]
        imagined = np.kron(imagined, np.ones((3, 3, 1), np.uint8))
        cells.append(caption(imagined, f"{actor.future} {k}", 16))
    return np.concatenate(cells, 1)


def run_task(job):
    """Worker: one task and camera -> task, [(success, steps), ...]."""
    config, task, view = job
    torch.set_num_threads(1)
    runs, size = Path(config.out) / config.suite, flow.Config.size
    between = planner = text = None
    if config.future != "oracle":
        between = flow.estimator(config.flow, runs / "flow.pt")
    if config.future == "generated":
        planner = video_planner.load_planner(config.planner)
        size = planner.config.size
        text = embed(sims.describe(config.suite, task)[0])
    sim = sims.make(config.suite, task, size)
    camera, outcomes = metaworld.views()[view], []
    for seed in range(config.scenes, config.scenes + config.episodes):
        sim.reset(seed=seed)
        actor = Actor(sim, config.future, {"seed": seed}, camera, between, planner, text,
                      config.replans, seed)
        pictures = []
        for step in range(1, config.horizon + 1):
            if config.films and seed == config.scenes and step % 4 == 1:
                pictures.append(film_picture(actor, step))
            _, success = sim.step(actor(sim), observe=False)
            if success:
                break
        if pictures:
            name = f"{task}_{view}_{'success' if success else 'failure'}.mp4"
            write_film(runs / f"flow-{config.future}_films" / name, pictures)
        outcomes.append((bool(success), step))
        run_task.progress.put(1)
    sim.close()
    return task, outcomes


def choose_views(config):
    """The cameras to act from; fails where the networks are missing that this needs."""
    asked = {v.strip() for v in config.views.split(",") if v.strip()}
    if asked - {"0", "1", "2"}:
        fail(f"--views {config.views}: choose among 0, 1 and 2, comma-separated")
    runs, seen = Path(config.out) / config.suite, [0, 1, 2]
    if config.future != "oracle":
        if config.flow == "learned":
            training.load(runs / "flow.pt", made_by=f"python flow.py --suite {config.suite}")
        else:
            flow.estimator(config.flow, None)   # its weights may be missing
    if config.future == "generated":
        config.planner = config.planner or str(runs / "video.pt")
        made_by = f"python video_planner.py --suite {config.suite}"
        about = training.load(config.planner, video_planner.VideoPlanner.kind, made_by)["config"]
        about = from_dict(video_planner.Config, about)
        seen = [metaworld.view_of(suite)[1] for suite in record.sources(about)]
    return sorted(map(int, asked)) or sorted(seen)


def main(argv=None):
    """Command line: episodes of every task from every camera, a JSON as rollout.py's."""
    config = parse(Config, "Act from the flow of a video, without action labels.", argv)
    names = sims.choose_tasks(config.suite, config.tasks)
    if not sims.is_metaworld(config.suite):
        fail(f"--suite {config.suite}: AVDC acts in Meta-World; give avdc, mt10 or a task")
    chosen = choose_views(config)
    begin, found = time.time(), {name: [] for name in names}
    jobs = [(config, name, view) for name in names for view in chosen]
    with record.pool(config.workers, run_task) as (workers, queue):
        results = workers.imap_unordered(run_task, jobs)
        total = len(jobs) * config.episodes
        for task, outcomes in record.watch(results, queue, len(jobs), total, "avdc"):
            found[task] += outcomes
    seconds = time.time() - begin
    about = rollout.Config(scenes=config.scenes, policy="expert", device="cpu")
    other = f"-{config.flow}" * (config.flow != "learned" and config.future != "oracle")
    plan = f"flow-{config.future}{other}" + "-once" * (not config.replans)
    plan += f"-view{''.join(map(str, chosen))}" * (len(chosen) < 3)
    r = rollout.result(about, None, config.suite, found, seconds)
    r |= {"plan": plan, "action_demos": 0, "views": ",".join(map(str, chosen)),
          "counts": "ever succeeded"}
    for task, count in r["tasks"].items():
        print(f"  {count['success']:3d}/{count['episodes']:<3d} {task}")
    # a trial never takes a full result's place
    part = f"_{len(names)}tasks" * (len(names) < len(sims.tasks(config.suite)))
    part += f"_{config.episodes}scenes" * (config.episodes != Config.episodes)
    path = Path(config.results) / f"{config.suite}_{plan}{part}.json"
    write(path, json.dumps(r, indent=1) + "\n")
    low, high = r["interval"]
    share = f"{r['success']}/{r['episodes']} = {100 * r['success'] / r['episodes']:.1f} %"
    print(f"{config.suite} {plan}: {share} [{100 * low:.1f}, {100 * high:.1f}] -> {path}")


if __name__ == "__main__":
    main()
