"""What the simulators share: the seeds of scenes, what a frame holds, checks of reset and step."""

import numpy as np

from core.episodes import CAMERAS
from core.files import fail
from sims.camera import project

# A scene, its fixtures and goal included, follows from its seed; the ranges of seeds do not meet.
# Training scenes lie below EVALUATION: video i has seed i or, where the demonstrator failed,
# i + k * 100_000.
EVALUATION = 10_000_000  # + i: test scene i, as of reset(init=i)
DEVELOPMENT = 20_000_000  # + k: development scene k, as of reset(seed=DEVELOPMENT + k)
INITS = 50  # test scenes per task


def scene_seed(seed, init):
    """The seed of a scene that is given by its seed or by its number among the test scenes: both or
    neither is a ValueError, a test scene that does not exist fails."""
    if (seed is None) == (init is None):
        raise ValueError("reset needs either seed or init")
    if init is not None and not 0 <= init < INITS:
        fail(f"initial state {init} does not exist: choose 0 to {INITS - 1}")
    return EVALUATION + init if seed is None else seed


def checked(action, A):
    """action: A finite numbers, else ValueError -> clipped to [-1, 1], (A,) float64."""
    action = np.asarray(action, np.float64)
    if action.shape != (A,) or not np.isfinite(action).all():
        raise ValueError(f"an action is {A} finite numbers, got {action}")
    return np.clip(action, -1, 1)


def observation(sim, states, masks, wrist, pictures=True):
    """A frame: the robot's states, a dict of sequences, as float32, with both cameras' pictures,
    the masks, and the hand's place in the third-person picture."""
    frame = {k: np.asarray(v, np.float32) for k, v in states.items()}
    if not sim.camera:
        return frame
    third = sim.cameras[0]
    if pictures:
        frame |= {f"{ours}_rgb": sim.camera.picture(sim.data, theirs)
                  for ours, theirs in zip(CAMERAS, sim.cameras) if wrist or theirs is third}
    place, _ = project(frame["ee_states"][:3], *sim.camera.pose(sim.data, third))
    frame["hand"] = place.astype(np.float16)  # (2,)
    if masks:
        frame["masks"] = sim.camera.mask(sim.data, third, sim.label)
    return frame


def axis_angle(R):
    """Rotation matrix (3, 3) -> axis times angle (3,), radians, the axis' x >= 0, the angle in
    [0, 2 pi): continuous at the half turn by which the hand points down, where v and -v are one."""
    from scipy.spatial.transform import Rotation
    v = Rotation.from_matrix(R).as_rotvec()
    angle = np.linalg.norm(v)
    return v if v[0] >= 0 or angle < 1e-6 else v * (1 - 2 * np.pi / angle)
