"""What the simulators share: the seeds of scenes, a step's checks, what a frame holds."""

import numpy as np

from core.episodes import CAMERAS
from core.files import fail
from sims.camera import project

# A scene, its fixtures and goal included, follows from its seed; the ranges do not meet: video i
# has seed i or, where the demonstrator failed, i + k * 100_000, below EVALUATION
EVALUATION = 10_000_000  # + i: test scene i, as of reset(init=i)
DEVELOPMENT = 20_000_000  # + k: development scene k, as of reset(seed=DEVELOPMENT + k)
INITS = 50  # test scenes per task


def scene_seed(seed, init):
    """The seed of a scene, given by it or by its number among the test scenes, checked."""
    if init is not None and not 0 <= init < INITS:
        fail(f"initial state {init} does not exist: choose 0 to {INITS - 1}")
    return EVALUATION + init if seed is None else seed


def axis_angle(R):
    """Rotation matrix (3, 3) -> axis times angle (3,), radians, the axis' x + y >= 0, the angle in
    [0, 2 pi): continuous where hands are, a half turn about (1, 1, 0) in LIBERO, where v and -v are
    one, a quarter turn about y in Meta-World."""
    from scipy.spatial.transform import Rotation
    v = Rotation.from_matrix(R).as_rotvec()
    angle = np.linalg.norm(v)
    return v if v[0] + v[1] >= 0 or angle < 1e-6 else v * (1 - 2 * np.pi / angle)


class Simulator:
    """One task; `Libero` and `MetaWorld` add what differs: reset, advance (by a control step),
    success (now; in Meta-World ever since reset), robot_state (the hand's position (3,), in
    Meta-World between the fingertips, its rotation (3, 3), joints, fingers (2,)), goal_image.

    model, data   MuJoCo's, the same ones after every reset
    camera        a Camera, or None: no pictures; cameras: what it calls our two
    label         (number of geoms,) uint8: 0 background, 1 robot, 2.. objects
    """

    def labels(self, objects, robot):
        """`label`, from objects {body: label}, which parts inherit, and robot (bodies,) bool."""
        label = np.zeros(self.model.ngeom, np.uint8)
        for geom, body in enumerate(self.model.geom_bodyid):
            whole = body
            while whole and whole not in objects:
                whole = self.model.body_parentid[whole]
            label[geom] = objects.get(whole, robot[body])
        return label

    def step(self, action, observe=True):
        """action: A finite numbers, else ValueError, clipped to [-1, 1] -> (frame, or None if not
        `observe`; success, bool)."""
        action = np.asarray(action, np.float64)
        if action.shape != (self.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"an action is {self.action_dim} finite numbers, got {action}")
        self.advance(np.clip(action, -1, 1))
        return (self.frame() if observe else None), self.success()

    def state(self):
        """(S,) float64: time, positions, velocities; not fixtures and goal: the seed gives them."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def frame(self, masks=True, pictures=True):
        """The current frame as a dict, named as in the data file; without `masks` a third quicker.

        agentview_rgb, eye_in_hand_rgb (H, W, 3) uint8 upright; masks (H, W) uint8 and hand (2,)
        float16, its place in [0, 1], x right, y down, of agentview; ee_states (6,) position in
        metres and axis-angle in radians; joint_states (7,) radians; gripper_states (2,) metres.
        """
        position, R, joints, gripper = self.robot_state()
        frame = {"ee_states": np.float32([*position, *axis_angle(R)]),
                 "joint_states": np.float32(joints), "gripper_states": np.float32(gripper)}
        if not self.camera:
            return frame
        if pictures:
            frame |= {f"{ours}_rgb": self.camera.picture(self.data, theirs)
                      for ours, theirs in zip(CAMERAS, self.cameras)}
        view = self.camera.pose(self.data, self.cameras[0])
        frame["hand"] = project(frame["ee_states"][:3], *view)[0].astype(np.float16)
        if masks:
            frame["masks"] = self.camera.mask(self.data, self.cameras[0], self.label)
        return frame

    def close(self):
        if self.camera:
            self.camera.close()
        self.env.close()
