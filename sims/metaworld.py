"""Meta-World (Yu et al., 2019), through the package `metaworld`.

`avdc_view1` is avdc seen by the second of its three cameras; so for each suite and each task.
"""

import warnings
from itertools import islice

import numpy as np

from sims.camera import Camera
from sims.scene import Simulator, scene_seed

# the 50 tasks, the package's names without "-v3"
METAWORLD = """assembly basketball bin-picking box-close button-press-topdown
button-press-topdown-wall button-press button-press-wall coffee-button coffee-pull coffee-push
dial-turn disassemble door-close door-lock door-open door-unlock hand-insert drawer-close
drawer-open faucet-open faucet-close hammer handle-press-side handle-press handle-pull-side
handle-pull lever-pull pick-place-wall pick-out-of-hole pick-place plate-slide plate-slide-side
plate-slide-back plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull
push push-wall push-back reach reach-wall shelf-place sweep-into sweep window-open window-close
""".split()
# ML10 trains on ten tasks and tests on five others; the last are those of AVDC (Ko et al., 2023)
BENCHMARKS = {
    "mt10": "reach push pick-place door-open drawer-open drawer-close button-press-topdown "
            "peg-insert-side window-open window-close",
    "ml10": "reach push pick-place door-open drawer-close button-press-topdown peg-insert-side "
            "window-open sweep basketball",
    "ml10_test": "drawer-open door-close shelf-place sweep-into lever-pull",
    "avdc": "door-open door-close basketball shelf-place button-press button-press-topdown "
            "faucet-close faucet-open handle-press hammer assembly"}
# Meta-World's third-person cameras: what they look at, metres away; degrees of turn and height of
# each, the usual one first.  differs: AVDC's corner, corner2 and corner3 are mounted upside down
# and further away: a puck has 4 pixels of 96 x 96 in corner2, here 26
VIEW, ANGLES = ((-0.02, 0.66, 0.14), 0.98), ((148, -32), (212, -32), (125, -40))


def view_of(suite):
    """'avdc_view1' -> ('avdc', 1); without a view: (suite, 0)."""
    name, _, view = suite.rpartition("_view")
    return (name, int(view)) if view in ("1", "2") else (suite, 0)


def tasks(suite):
    """Names of a suite's tasks; of one of the 50 tasks, itself; None for what is not Meta-World."""
    name = view_of(suite)[0]
    if name in BENCHMARKS:
        return BENCHMARKS[name].split()
    return [name] if name in METAWORLD else None


def describe(suite, task):
    """-> language instruction, as AVDC has it; objects; goal predicates: there are none."""
    return task.replace("-", " "), ["robot", "object"], []  # the object: what the task moves


class MetaWorld(Simulator):
    """One Meta-World task; arguments as for `make`.  Actions: xyz, gripper; a control step is
    12.5 ms (80 Hz).  Success is *ever succeeded* since reset: it need not last (a door swings on).

    The object's mask is of what the task moves: the link of the first joint that is not the
    robot's, so the door without its frame; of the six tasks with two such things also in
    coffee-pull, coffee-push (the mug), hammer, stick-push, stick-pull, not in coffee-button.
    """
    action_dim, horizon, max_demo_steps, goal_varies = 4, 300, 300, True
    steps_after_success = 10  # of a demonstration; at its first success most of it is on an edge

    def __init__(self, suite, task, size, render, observe):
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
        warnings.filterwarnings("ignore", "Constant")  # its policies mean to ask for more than 1
        self.suite, self.task = suite, task
        self.language, self.objects, self.goal = describe(suite, task)
        self.env, self.policy = ALL_V3_ENVIRONMENTS[f"{task}-v3"](), ENV_POLICY_MAP[f"{task}-v3"]()
        self.env._partially_observable = False  # the script needs the goal; pictures do not show it
        self.env.__dict__.pop("sawyer_observation_space", None)  # computed with a goal of zeros
        self.env.seeded_rand_vec = self.env._set_task_called = True
        self.model, self.data = self.env.model, self.env.data
        view = mujoco.MjvCamera()  # a free one, fixed to nothing
        view.lookat[:], view.distance = VIEW
        view.azimuth, view.elevation = ANGLES[view_of(suite)[1]]
        self.cameras = view, "gripperPOV"
        self.camera = Camera(self.model, size, render, [1, 1, 1, 0, 0, 0]) if observe else None
        robot = [self.model.body(b).name in ("base", "mocap") for b in self.model.body_rootid]
        moving = [b for b in self.model.jnt_bodyid if not robot[b]][task == "coffee-button"]
        # of the robot what can move
        self.label = self.labels({moving: 2}, robot & (self.model.body_weldid > 0))

    def reset(self, seed=None, init=None):
        """Starts an episode, its goal and objects drawn from a seed >= 0; or a test scene, init
        0..49, of the seed EVALUATION + init.  Returns the first frame."""
        self.env.seed(scene_seed(seed, init))
        # drawn, and set again: the first time leaves traces of what was drawn before
        for frozen in (False, True):
            self.env._freeze_rand_vec = frozen
            self.observation, _ = self.env.reset()
        self.succeeded = False
        return self.frame()

    def advance(self, action):
        """One control step."""
        self.observation, _, _, _, info = self.env.step(action)
        self.succeeded |= bool(info["success"])

    def demonstration(self):
        """The package's own policy, from now on: yields actions (4,) in [-1, 1], each for the state
        at which it is asked for, until a little after the first success."""
        left = self.steps_after_success
        while left > 0:
            left -= self.success()
            yield np.clip(self.policy.get_action(self.observation), -1, 1).astype(np.float32)

    def success(self):
        """Whether the task has succeeded since reset."""
        return self.succeeded

    def robot_state(self):
        """As LIBERO's; the hand's position is midway between the fingertips."""
        joints = [self.data.joint(name).qpos[0]
                  for name in (*(f"right_j{k}" for k in range(7)), "r_close", "l_close")]
        R = self.data.body("hand").xmat.reshape(3, 3)
        return self.env.tcp_center, R, joints[:7], joints[7:]

    def goal_image(self, seed=None, init=None):
        """(H, W, 3) uint8: where the package's own policy gets to here.  Resets the simulation."""
        self.reset(seed, init)
        for action in islice(self.demonstration(), self.horizon + self.steps_after_success):
            self.step(action, observe=False)
        return self.camera.picture(self.data, self.cameras[0])
