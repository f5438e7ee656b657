"""What both simulators share: what a frame holds, what an action is, where an episode starts."""
import numpy as np

from cameras import fail, project

CAMERAS = ("agentview", "eye_in_hand")  # third person and hand
INITS = 50  # evaluation scenes per task: LIBERO's bundled states, Meta-World's EVALUATION seeds


def look(sim, states, masks, wrist, pictures=True):
    """The robot's states, a dict of sequences, as float32 with the pictures of both cameras, the
    masks, and where the third-person picture has the hand: a frame."""
    frame = {k: np.asarray(v, np.float32) for k, v in states.items()}
    if sim.camera and pictures:
        frame |= {f"{ours}_rgb": sim.camera.picture(sim.data, theirs)
                  for ours, theirs in zip(CAMERAS, sim.cameras)
                  if wrist or ours != "eye_in_hand"}
    if sim.camera:
        view = sim.camera.pose(sim.data, sim.cameras[0])
        frame["hand"] = project(frame["ee_states"][:3], *view)[0].astype(np.float16)
    if sim.camera and masks:
        frame["masks"] = sim.camera.mask(sim.data, sim.cameras[0], sim.label)
    return frame


def axis_angle(R):
    """Rotation matrix (3, 3) -> axis times angle (3,), radians, with the angle in [0, 2 pi) turning
    about +x.

    The hand points down, half a turn from the identity, where an axis-angle of angle in [0, pi]
    jumps between +v and -v; fixing the sign of the first component keeps it continuous.
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


def check_start(seed, init):
    """Whether a reset was given one start, and one that exists: else ValueError, or fails."""
    if (seed is None) == (init is None):
        raise ValueError("reset needs either seed or init")
    if init is not None and not 0 <= init < INITS:
        fail(f"initial state {init} does not exist: choose 0 to {INITS - 1}")
