"""What a camera sees of a mujoco simulation: pictures, masks, exact point tracks; and an OpenGL.

By default LIBERO's visual meshes are simplified and mirror reflections, shadows and multisampling
are off, because software OpenGL pays per vertex and per shadow; `render="faithful"` keeps the
simulators' look. Training and evaluation must use the same one.
"""

import os
import subprocess
import sys
from copy import copy as copy_of

import numpy as np

from core.files import fail


def choose_opengl(needed=True):
    """Sets MUJOCO_GL to a backend that works here: the user's choice, or EGL, else OSMesa, else
    fails if `needed`.

    mujoco reads it once, at import; children inherit it. Tried in a child process: a driver that
    hangs or crashes must not take the caller along.
    """
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and os.environ.get("PLAN2ACT_GL") == chosen:
        return  # tried before, by this process or its parent
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        trial = [sys.executable, "-c", "import mujoco; mujoco.GLContext(64, 64).make_current()"]
        try:
            run = subprocess.run(trial, env={**os.environ, "MUJOCO_GL": backend},
                                 capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            continue
        if run.returncode == 0:
            os.environ["MUJOCO_GL"] = os.environ["PLAN2ACT_GL"] = backend
            return
    if needed and chosen:
        fail(f"MUJOCO_GL={chosen} does not work here: unset it, and a working one is looked for")
    if needed:
        fail("no OpenGL for rendering: neither EGL nor OSMesa works here; on Debian or Ubuntu: "
             "apt-get install libosmesa6")


def simplify_mesh(vertices, faces, cell):
    """Vertex clustering: vertices in one cube of side `cell` (metres) become one; faces that
    collapse are dropped.

    vertices (V, 3), faces (F, 3) -> faces (F', 3) on the same vertices, and the kept rows' indices
    (F',).
    """
    cube = np.floor((vertices - vertices.min(0)) / cell).astype(np.int64)  # (V, 3)
    _, cluster = np.unique(cube @ [1, 1 << 20, 1 << 40], return_inverse=True)  # (V,)
    centre = np.stack([np.bincount(cluster, vertices[:, k]) for k in range(3)], 1)  # (clusters, 3)
    centre /= np.bincount(cluster)[:, None]
    offset = np.linalg.norm(vertices - centre[cluster], axis=1)
    # within each cluster the vertex nearest its centre comes first
    order = np.lexsort((offset, cluster))
    first = np.unique(cluster[order], return_index=True)[1]
    representative = order[first][cluster]  # (V,)
    new = representative[faces]  # (F, 3)
    solid = (new[:, 0] != new[:, 1]) & (new[:, 1] != new[:, 2]) & (new[:, 2] != new[:, 0])
    kept = np.flatnonzero(solid)
    _, once = np.unique(np.sort(new[kept], 1).astype(np.int64) @ [1, 1 << 20, 1 << 40],
                        return_index=True)
    kept = kept[np.sort(once)]
    return new[kept], kept


def fast_copy(model):
    """A copy of LIBERO's MjModel for rendering only, with simpler meshes; physics keeps the
    original.

    Measured on one core at 128 px with software OpenGL: LIBERO's look 75 ms per picture, with this,
    no multisampling and no mirrors under 10 ms; 298 thousand faces become about 70 thousand.
    """
    copy = copy_of(model)
    body = copy.geom_bodyid[[int(np.flatnonzero(copy.geom_dataid == k)[0])
                             if (copy.geom_dataid == k).any() else 0 for k in range(copy.nmesh)]]
    for k in range(copy.nmesh):
        # the arm's large smooth links and its pedestal bear 10 mm, hand and objects 3 mm (4: specks
        # on bowl rims)
        coarse = copy.body(body[k]).name.startswith(("robot0", "mount0"))
        f, n = copy.mesh_faceadr[k], copy.mesh_facenum[k]
        v, w = copy.mesh_vertadr[k], copy.mesh_vertnum[k]
        new, kept = simplify_mesh(copy.mesh_vert[v:v + w].astype(np.float64),
                                  copy.mesh_face[f:f + n], 0.010 if coarse else 0.003)
        if not len(new):
            continue
        # each corner keeps its own normal and texture
        for table in (copy.mesh_facenormal, copy.mesh_facetexcoord):
            table[f:f + len(kept)] = table[f:f + n][kept]
        copy.mesh_face[f:f + len(kept)] = new
        copy.mesh_facenum[k] = len(kept)
    return copy


class Camera:
    """Renders pictures and instance masks of a simulation that runs on this MjModel or another of
    the same layout.

    groups, sites (6,)  which groups of geoms are seen and which of marks, such as Meta-World's
                        goals
    """

    def __init__(self, model, size, render, groups, sites=0):
        import mujoco
        if render not in ("fast", "faithful"):
            fail(f"unknown rendering '{render}': choose fast or faithful, with +goal to see "
                 f"Meta-World's goals")
        self.model = model
        if render == "fast":
            model.vis.quality.offsamples = 0
        canvas = model.vis.global_
        canvas.offwidth, canvas.offheight = max(canvas.offwidth, size), max(canvas.offheight, size)
        self.renderer = mujoco.Renderer(model, size, size)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[:] = groups
        self.option.sitegroup[:] = sites
        for flag in (mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SHADOW):
            self.renderer.scene.flags[flag] = render == "faithful"

    def picture(self, data, camera):
        """(H, W, 3) uint8, upright."""
        self.renderer.update_scene(data, camera, self.option)
        return self.renderer.render().copy()

    def mask(self, data, camera, label):
        """label (number of geoms,) uint8 -> (H, W) uint8; pixels of no geom are 0."""
        self.renderer.update_scene(data, camera, self.option)
        self.renderer.enable_segmentation_rendering()
        geom, kind = np.moveaxis(self.renderer.render(), -1, 0)  # (H, W) each; kind 5 = geom
        self.renderer.disable_segmentation_rendering()
        return np.where((kind == 5) & (geom >= 0), label[geom], 0).astype(np.uint8)

    def pose(self, data, camera):
        """Where the camera is: eye (3,) metres, its axes right, down, ahead (3, 3), focal length in
        picture heights."""
        self.renderer.update_scene(data, camera, self.option)
        left, right = self.renderer.scene.camera  # of a stereo pair
        axes = np.stack([np.cross(left.forward, left.up), -left.up, left.forward])
        focal = left.frustum_near / (left.frustum_top - left.frustum_bottom)
        return (left.pos + right.pos) / 2.0, axes, focal

    def close(self):
        self.renderer.close()


def free(lookat, distance, azimuth, elevation):
    """A camera of MuJoCo's that is fixed to nothing: what it looks at (3,) and from how far,
    metres; degrees."""
    import mujoco
    view = mujoco.MjvCamera()
    view.lookat[:], view.distance = lookat, distance
    view.azimuth, view.elevation = azimuth, elevation
    return view


def copy_state(model, source, target):
    """Everything that a simulation's future depends on, from one MjData to another."""
    import mujoco
    everything = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, everything))
    mujoco.mj_getState(model, source, state, everything)
    mujoco.mj_setState(model, target, state, everything)
    mujoco.mj_forward(model, target)


# --- point tracks ---------------------------------------------------------------------------------

NEAR = 0.003  # metres; what a ray meets later than this before a point hides it
# ATM keeps points whose places vary by more than 10 square pixels of 128 over the episode
MOVES = 10 / 128 ** 2
JITTER = 0.05  # of the picture; ATM draws new points this far around those that move
# points tried at first; rows and columns of points that are kept whether or not they move
TRIES, GRID = 1000, 7


def project(points, eye, axes, focal):
    """points (..., 3) metres -> (..., 2) in [0, 1] of the picture if it shows them, x right, y
    down; depth (...) metres."""
    local = np.einsum("...ij,...j->...i", axes, points - eye)
    depth = np.where(local[..., 2:] > 1e-3, local[..., 2:], np.nan)
    return 0.5 + focal * local[..., :2] / depth, local[..., 2]


def cast(model, data, groups, eye, directions):
    """First geom that each ray meets, -1 for none (P,), and its distance in lengths of `directions`
    (P, 3), (P,)."""
    import mujoco
    geom, distance = np.full(len(directions), -1), np.zeros(len(directions))
    met = np.zeros(1, np.int32)
    # one by one: mj_multiRay of mujoco 3.3.0 misses geoms close to the eye
    for k, direction in enumerate(directions):
        distance[k] = mujoco.mj_ray(model, data, eye, direction, groups, 1, -1, met)
        geom[k] = met[0]
    return geom, distance


class Replay:
    """An episode's bodies and one camera at every step, to follow points that are fixed to bodies.

    qpos (T, nq) the joint positions; camera, view: a Camera and what it calls the camera. P points.
    """

    def __init__(self, camera, view, model, qpos):
        import mujoco
        self.model, self.data, self.qpos = model, mujoco.MjData(model), qpos
        self.groups = np.array(camera.option.geomgroup, np.uint8)
        bodies, poses = [], []
        for t in range(len(qpos)):
            self.at(t)
            bodies.append((self.data.xpos.copy(), self.data.xmat.reshape(-1, 3, 3).copy()))
            poses.append(camera.pose(self.data, view))
        # (T, nbody, 3), (T, nbody, 3, 3)
        self.position, self.rotation = (np.stack(x) for x in zip(*bodies))
        # (T, 3), (T, 3, 3), (T,)
        self.eye, self.axes, self.focal = (np.stack(x) for x in zip(*poses))

    def at(self, t):
        """Puts everything where it was at step t."""
        import mujoco
        self.data.qpos[:] = self.qpos[t]
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def pick(self, when, where):
        """What is seen at steps (P,), places (P, 2): body (P,), -1 for nothing, and the point in
        its frame (P, 3)."""
        body, local = np.full(len(when), -1), np.zeros((len(when), 3))
        for t in np.unique(when):
            self.at(t)
            chosen = np.flatnonzero(when == t)  # (P',)
            ray = np.concatenate([(where[chosen] - 0.5) / self.focal[t], np.ones((len(chosen), 1))],
                                 1) @ self.axes[t]  # (P', 3)
            geom, far = cast(self.model, self.data, self.groups, self.eye[t], ray)
            body[chosen] = b = np.where(geom >= 0, self.model.geom_bodyid[geom], -1)
            point = self.eye[t] + far[:, None] * ray  # (P', 3)
            local[chosen] = np.einsum("pji,pj->pi", self.rotation[t, b],
                                      point - self.position[t, b])
        return body, local

    def follow(self, body, local):
        """Points on bodies (P,), (P, 3) -> in the world (T, P, 3), in the picture (T, P, 2), their
        depth (T, P)."""
        world = self.position[:, body] + np.einsum("tpij,pj->tpi", self.rotation[:, body], local)
        return world, *project(world, self.eye[:, None], self.axes[:, None],
                               self.focal[:, None, None])

    def visible(self, world, place, depth):
        """Whether the picture shows them (T, P): they lie in it, and a ray from the camera reaches
        them first."""
        shown = (depth > 1e-3) & (np.abs(np.nan_to_num(place, nan=9) - 0.5) < 0.5).all(-1)
        for t in range(len(shown)):
            self.at(t)
            chosen = np.flatnonzero(shown[t])
            ray = world[t, chosen] - self.eye[t]
            geom, far = cast(self.model, self.data, self.groups, self.eye[t], ray)
            shown[t, chosen] = (geom < 0) | ((1 - far) * np.linalg.norm(ray, axis=1) < NEAR)
        return shown


def track(camera, view, model, qpos, K, rng, moving=True):
    """Follows points on surfaces through an episode, exactly: they are fixed to bodies, whose
    places are known.

    qpos (T, nq)  the joint positions at every step; camera, view: a Camera and what it calls the
                  camera
    moving        True: where ATM (section IV-A) looks, around what moves, and a grid; False:
                  uniformly
    -> places (T, K, 2) in [0, 1], x right, y down, outside if out of the picture; visible (T, K)
    bool, by ray casting

    differs: ATM tracks pixels by CoTracker; it crashes if nothing moves, here the points are then
    drawn uniformly.
    """
    replay, T = Replay(camera, view, model, qpos), len(qpos)
    when, where = rng.integers(T, size=TRIES), rng.random((TRIES, 2))
    body, local = replay.pick(when, where)
    when, where, body, local = (x[body >= 0] for x in (when, where, body, local))
    kept = rng.choice(len(when), K)
    if moving:
        spread = replay.follow(body, local)[1].var(0).sum(1)  # (P,) nan behind the camera
        moves = np.flatnonzero(np.nan_to_num(spread, nan=np.inf) > MOVES)
        kept = rng.choice(moves, K) if len(moves) else kept
        grid = np.stack(np.meshgrid(*[(np.arange(GRID) + 0.5) / GRID] * 2), -1).reshape(-1, 2)[:K]
        new_when, new_where = when[kept], where[kept]
        new_when[:len(grid)], new_where[:len(grid)] = rng.integers(T, size=len(grid)), grid
        again, there = replay.pick(new_when, np.clip(new_where + JITTER * rng.normal(size=(K, 2)),
                                                     0.001, 0.999))
        # past the edge of the world there is nothing: the point that it came from, then
        hit = again >= 0
        body, local = np.where(hit, again, body[kept]), np.where(hit[:, None], there, local[kept])
    else:
        body, local = body[kept], local[kept]
    world, place, depth = replay.follow(body, local)
    return np.nan_to_num(place.clip(-9, 9), nan=-9), replay.visible(world, place, depth)


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
