"""AVDC section 3.3: acting from the flow of a video, without any action label.

    python -m video_control.avdc oracle             # true future, exact motion: the upper bound
    python -m video_control.avdc true               # true pictures of the future, learned flow
    python -m video_control.avdc runs/avdc/video_language.pt    # imagined pictures: AVDC

Points of the task's object are followed through the video; where the picture shows them gives the
object's motion, rigid in space, from their depth in the first picture alone.  A hand that holds or
pushes the object must go there, too.

differs: as the authors' code, not the paper: seven future frames (eight), the simulator's mask (a
segmenter's), the most central point as grasp (a random one), motion from each picture to the next
(from the first), steps of standing still counted in all until a new video (consecutive).  ours: the
fingers close within 15 mm of the grasp (the code: on the way, from 80 mm), SQUEEZE, SINK.

Sizes: P points, K future pictures, H W pixels.
"""

from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import rollout
import sims
from core import training
from core.draw import draw_tracks, row
from core.files import fail
from core.flags import FREE, differences, flag, parse, suites
from core.planners import load_planner
from sims.camera import Replay, cast, project
from video_control import flow
from video_control.motion import grasp_point, infer_motions, subgoals
from video_planner import FRAMES, VideoPlanner, clip_times

TRUE = "oracle", "true"     # futures of the package's own policy, not imagined
POINTS = 300        # of the object that are followed; differs: the authors take 500
NOISE = {"oracle": 0.1, "true": 0.7, "generated": 1.0}      # of a target, pixels
LIFTS = 0.1         # metres: an object that rises or falls this far is held, any other pushed
HOVER, BACK, LOWER = 0.2, 0.08, 0.03    # metres: above a point; behind it and below it, to push
SINK = 0.01         # metres below the points seen, which are of the upper side, to hold
REACHED = {"grasp": 0.04, "push": 0.12}     # metres from a subgoal
SQUEEZE = 15        # steps in which the fingers close
STILL, PATIENCE = 0.001, 15         # metres per step, steps so until it imagines again
LIMIT = 500         # steps of an episode, as AVDC's


@dataclass
class Config(rollout.Config):
    checkpoints: tuple[str, ...] = flag((), "futures: oracle, true, or checkpoints of "
                                        "video_planner.py", positional=True)
    suite: str = flag("", "suites of Meta-World, each from its camera, such as avdc,avdc_view1; "
                      "empty: the video planner's, or all three of avdc")
    flow: str = flag("learned", "between pictures: learned (flow.py's <out>/avdc/flow.pt) or dis "
                     "(OpenCV's)", choices=["learned", "dis"])
    replans: int = flag(5, "videos imagined anew when the hand stands still", minimum=0)
    out: str = flag("runs", "folder of the runs")


def object_points(sim, rng):
    """What the present picture shows of the object: places (P, 2), points (P, 3); and for the exact
    correspondence the bodies that they are on and where, (P,), (P, 3)."""
    mask = sim.camera.mask(sim.data, sim.cameras[0], sim.label)             # (H, W)
    pixels = np.argwhere(mask == 2)[:, ::-1]                                # (pixels, 2) x, y
    if not len(pixels):     # hidden: nothing to follow but the middle of the picture
        pixels = np.full((1, 2), len(mask) // 2)
    places = pixels[rng.integers(len(pixels), size=POINTS)] + rng.uniform(size=(POINTS, 2))
    places /= len(mask)                                                     # (P, 2)
    replay = Replay(sim.camera, sim.cameras[0], sim.model, sim.data.qpos[None])
    body, local = replay.pick(np.zeros(POINTS, int), places)
    own = np.isin(body, sim.model.geom_bodyid[sim.label == 2])
    own = own if own.any() else body >= 0
    fixed = body[own], local[own]
    return places[own], replay.follow(*fixed)[0][0], fixed


def has_room(sim, view, point):
    """Whether the picture shows nothing but robot before this point and 16 cm above it."""
    column = point + np.outer(np.linspace(0, 0.16, 5), [0, 0, 1])           # (5, 3)
    eye, axes, _ = view
    local = (column - eye) @ axes.T
    groups = np.array(sim.camera.option.geomgroup, np.uint8)
    geom, far = cast(sim.model, sim.data, groups, eye, (local / local[:, 2:]) @ axes)
    robot = (geom >= 0) & (sim.label[geom] == 1)
    return bool((robot | (geom < 0) | (far > local[:, 2])).all())


def true_future(sim, other, scene):
    """Joint positions (T, nq) from now on until the package's own policy is done; another simulator
    of the task plays them."""
    other.reset(**scene)
    for name in ("mocap_pos", "mocap_quat", "ctrl", "qacc_warmstart"):
        getattr(other.data, name)[:] = getattr(sim.data, name)
    other.env.set_state(sim.data.qpos, sim.data.qvel)
    other.observation = other.env._get_obs()    # its script goes by the last one
    path = []
    for action in islice(other.demonstration(), other.horizon + 1):
        path.append(other.data.qpos.copy())
        other.step(action, observe=False)
    return np.stack(path)


class Actor:
    """AVDC in Meta-World: subgoals from a video, and a proportional controller that reaches them.
    future: one of TRUE or a VideoPlanner; between: the flow from one picture to another, as
    flow.dis_flow; replans: videos after the first."""

    def __init__(self, sim, future, between, replans):
        self.sim, self.future, self.between, self.replans = sim, future, between, replans
        self.kind = future if isinstance(future, str) else "generated"
        self.other = sims.make(sim.suite, sim.task, observe=False)      # plays true futures

    def reset(self, sim, scene):
        """Forgets the last episode; for imagined videos, takes the goal picture and sentence."""
        self.scene, self.rng = scene, np.random.default_rng(list(scene.values()))
        self.plans_left, self.still, self.steps = 1 + self.replans, 0, 0
        self.mode, self.stage, self.pictures, self.before = None, "over", [], np.inf
        if self.kind == "generated":
            from demos.language import embed
            self.task = {"goal": sim.goal_image(**scene)[None], "text": embed(sim.language)[None]}

    def correspondence(self, fixed):
        """The video from now on -> correspond(k, places, kept) as for `infer_motions`; `fixed`:
        the bodies of `object_points`."""
        sim = self.sim
        if self.kind == "generated":
            now = sim.camera.picture(sim.data, sim.cameras[0])
            generator = torch.Generator().manual_seed(self.plans_left)
            obs = training.tensors(self.task | {"frames": now[None, None]}, self.future)
            self.pictures = [now, *self.future.imagine(obs, generator)[0].cpu().numpy()]
        else:
            path = true_future(sim, self.other, self.scene)
            replay = Replay(sim.camera, sim.cameras[0], sim.model, path[clip_times(0, len(path))])
            if self.kind == "oracle":
                exact = replay.follow(*fixed)[1]                            # (1 + K, P, 2)
                return lambda k, places, kept: exact[k + 1, kept]
            self.pictures = [replay.at(t) or sim.camera.picture(replay.data, sim.cameras[0])
                             for t in range(1 + FRAMES)]
        return lambda k, places, kept: places + flow.sample_flow(
            self.between(self.pictures[k], self.pictures[k + 1]), places)

    def plan(self):
        """Imagines a video from now on and infers subgoals."""
        self.plans_left, self.still, sim = self.plans_left - 1, PATIENCE, self.sim
        view = sim.camera.pose(sim.data, sim.cameras[0])
        places, points, fixed = object_points(sim, self.rng)
        motions = infer_motions(places, points, self.correspondence(fixed), view, FRAMES,
                                NOISE[self.kind] / sim.camera.renderer.height)
        path = subgoals(grasp_point(points), motions)                       # (1 + K, 3)
        if self.mode is None:
            rise = np.abs(path[1:-1, 2] - path[0, 2]).max()
            self.mode = "grasp" if rise > LIFTS else "push"
        if self.mode == "push":
            self.contact, path = push(sim, view, points, motions, path)
        else:
            # ours: the points seen lie on the near side; the middle is half the width behind
            right, _, ahead = view[1]
            behind = ahead * [1, 1, 0] / np.linalg.norm(ahead[:2])
            path = path + min(np.ptp(points @ right) / 2, 0.02) * behind - [0, 0, SINK]
            self.contact = path[0]
        if self.mode == "push" or self.stage != "follow":       # what is held is carried on
            self.stage = "over"
        self.path, self.planned = list(path[1:]), path

    def __call__(self, sim):
        """The action for the current state, (4,) float32 in [-1, 1]."""
        hand = sim.env.tcp_center.copy()        # the middle between the fingertips (3,), metres
        # ours: but not while the fingers close
        self.still -= self.stage != "hold" and np.linalg.norm(hand - self.before) < STILL
        self.before, self.steps = hand, self.steps + 1
        if self.still <= 0 and self.plans_left:
            self.plan()
        target = self.contact
        if self.stage == "over":
            if np.linalg.norm((hand - target)[:2]) < 0.02:
                self.stage = "down"
            target = target + [0, 0, HOVER]
        if self.stage == "down" and abs(hand[2] - self.contact[2]) < 0.015:
            self.stage, self.steps = "hold", 0
        if self.stage == "hold" and (self.mode == "push" or self.steps > SQUEEZE):
            self.stage = "follow"
        if self.stage == "follow":
            while len(self.path) > 1 and np.linalg.norm(hand - self.path[0]) < REACHED[self.mode]:
                self.path.pop(0)
            target = self.path[0]
        closed = self.mode == "push" or self.stage in ("hold", "follow")
        move = np.clip(20 * (target - hand), -1, 1)
        return np.append(move, 1 if closed else -1).astype(np.float32)

    def finished(self, success):
        return success

    def limit(self, sim):
        return LIMIT

    def draw(self, sim):
        """What happens, with the subgoals' path drawn in, and the imagined picture of about now."""
        picture = sim.camera.picture(sim.data, sim.cameras[0])
        places = project(self.planned, *sim.camera.pose(sim.data, sim.cameras[0]))[0]
        places = np.nan_to_num(places, nan=-1).clip(-1, 2)[:, None]         # (1 + K, 1, 2)
        views = [(f"{self.mode}, {self.stage}", draw_tracks(picture, places, [[True]], scale=3))]
        if self.pictures:
            k = FRAMES - len(self.path) if self.stage == "follow" else 0
            views.append((f"{self.kind} {k}", self.pictures[k].repeat(3, 0).repeat(3, 1)))
        return row(views, scale=1)


def push(sim, view, points, motions, path):
    """Where to put the closed hand to push the object on its way, and that way: points (P, 3), path
    (1 + K, 3) of the medoid -> contact (3,), path.  ours: of the object's points the one nearest to
    the medoid behind which the depth picture shows room for a hand."""
    def direction(path):
        """From a point to its first subgoal over 10 cm away, else to its last (3,)."""
        ahead = path[1:] - path[0]                                          # (K, 3)
        far = np.linalg.norm(ahead[:, :2], axis=1) > 0.1
        return ahead[far.argmax() if far.any() else -1]

    d, low = direction(path), [0, 0, LOWER]
    if np.linalg.norm(d[:2]) < abs(d[2]):               # differs: down, from straight above
        return path[0] - low, path - low
    nearest = sorted(points, key=lambda p: np.linalg.norm(p - path[0]))[::10]
    for point in [*nearest, path[0]]:
        here = subgoals(point, motions)
        d = direction(here) * [1, 1, 0]
        contact = point - BACK * d / max(np.linalg.norm(d), 1e-6) - low
        if has_room(sim, view, contact):
            break
    return contact, here - low


def make_actor(future, config, sim):
    between = (None if future == "oracle" else
               flow.dis_flow if config.flow == "dis" else flow.load_flow(config.out).flow)
    video = future if future in TRUE else load_planner(future, config.device)
    return Actor(sim, video, between, config.replans)


def about_future(future, config):
    """-> what a result holds of where the video and its flow come from, its suites, the pictures'
    size."""
    about = dict.fromkeys(("preset", "videos", "action_demos", "seed", "config"))
    about |= {"differs": "", "seconds": {}, "plan": f"flow-{future}", "code": []}
    known, size = "avdc,avdc_view1,avdc_view2", 96
    if future not in TRUE:
        content = training.load(future, "video",
                                "python video_planner.py --suite avdc --goal language")
        c = VideoPlanner.Config(**content["config"])
        about |= {"preset": c.preset, "videos": c.demos, "action_demos": 0, "seed": c.seed,
                  "config": content["config"], "differs": differences(c, {"seed"}),
                  "code": content.get("code", ()), "plan": "flow-generated",
                  "seconds": {"planner": training.last_seconds(future)}}
        known, size = ",".join(suites(c)), c.size
    if future != "oracle" and config.flow == "learned":     # fails here if there is none
        net = flow.load_flow(config.out)
        learned = {k: v for k, v in asdict(net.config).items() if k not in FREE}
        about |= {"plan": about["plan"] + differences(net.config),
                  "config": (about["config"] or {}) | {"flow": learned},
                  "code": [*about["code"], *net.codes]}
    return about, known, size


def main(argv=None):
    """Command line: episodes of every task from every camera, a JSON for each camera."""
    config = parse(Config, "Act from the flow of a video, without action labels.", argv)
    if not config.checkpoints:
        fail("give oracle, true, or a checkpoint of video_planner.py --suite avdc --goal language")
    jobs = []
    for future in config.checkpoints:
        about, known, size = about_future(future, config)
        for suite in (config.suite or known).split(","):
            if not sims.goal_varies(suite):
                fail(f"--suite {suite}: AVDC acts in Meta-World; give avdc, mt10 or a task")
            jobs.append((partial(make_actor, future, config), about | {"suite": suite},
                         sims.choose_tasks(suite, config.tasks), size, "fast",
                         Path(config.out) / suite / f"{about['plan']}_films"))
    rollout.run(config, jobs)


if __name__ == "__main__":
    main()
