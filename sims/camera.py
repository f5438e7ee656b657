"""What a camera sees of a mujoco simulation: pictures, masks, exact tracks; which OpenGL draws it.

`render="fast"` has no mirror reflections, shadows and multisampling and simplifies LIBERO's visual
meshes, because software OpenGL pays per vertex and per shadow; "faithful" keeps the simulators'
look.  Training and evaluation must use the same one.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np

from core.files import fail


# variables of the user's that decide which OpenGL is found
OPENGL = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES")


def choose_opengl(needed=True):
    """Sets MUJOCO_GL, which mujoco reads at import and children inherit, to a backend that works
    here: the user's choice, or EGL, else OSMesa; if there is none, fails if `needed`.  Tried in a
    child process: a driver that hangs or crashes must not take the caller along."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and os.environ.get("PLAN2ACT_GL") == chosen:
        return  # tried before, by this process or its parent
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        if renders(os.environ | {"MUJOCO_GL": backend}):
            os.environ["MUJOCO_GL"] = os.environ["PLAN2ACT_GL"] = backend
            return
    theirs = " ".join(f"{name}={os.environ[name]}" for name in OPENGL if name in os.environ)
    if needed:
        fail(f"no OpenGL for rendering with {theirs}: unset it, and a working one is looked for"
             if theirs else "no OpenGL for rendering: neither EGL nor OSMesa works here; on Debian "
             "or Ubuntu: apt-get install libegl1 or libosmesa6")


def renders(environment):
    """Whether a picture can be rendered in a process with these variables."""
    trial = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 64, 64)"
    try:
        return not subprocess.run([sys.executable, "-c", trial], env=environment, timeout=60,
                                  capture_output=True).returncode
    except subprocess.TimeoutExpired:
        return False


def simplify_mesh(vertices, faces, cell):
    """Vertex clustering: vertices in one cube of side `cell` (metres) become the one nearest their
    mean; faces that collapse, or are there twice, are dropped.  vertices (V, 3), faces (F, 3)
    -> faces (F', 3) on the same vertices, kept rows' indices (F',)."""
    code = np.array([1, 1 << 20, 1 << 40])  # three small integers -> one
    cube = np.floor((vertices - vertices.min(0)) / cell).astype(np.int64)  # (V, 3)
    _, cluster, count = np.unique(cube @ code, return_inverse=True, return_counts=True)  # (V,)
    centre = np.stack([np.bincount(cluster, x) for x in vertices.T], 1) / count[:, None]  # (C, 3)
    offset = np.linalg.norm(vertices - centre[cluster], axis=1)
    order = np.lexsort((offset, cluster))  # each cluster's vertices, the nearest its centre first
    nearest = order[np.cumsum(count) - count]  # (C,)
    new = nearest[cluster][faces]  # (F, 3)
    kept = np.flatnonzero((new != np.roll(new, 1, 1)).all(1))
    _, once = np.unique(np.sort(new[kept], 1).astype(np.int64) @ code, return_index=True)
    kept = kept[np.sort(once)]
    return new[kept], kept


@contextmanager
def simplified(model):
    """LIBERO's MjModel has 70 instead of 298 thousand faces while a renderer is made, which keeps
    them: software OpenGL, on one core, takes 75 ms for a faithful picture of 128 px, under 10 for a
    fast one."""
    tables = model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord, model.mesh_facenum
    whole = [table.copy() for table in tables]
    for k in range(model.nmesh):
        body = model.body(model.geom_bodyid[np.argmax(model.geom_dataid == k)]).name
        # metres; the arm's large smooth links bear 10 mm, hand and objects 3 (4: specks on rims)
        cell = 0.010 if body.startswith(("robot0", "mount0")) else 0.003
        f, v = model.mesh_faceadr[k], model.mesh_vertadr[k]
        faces = slice(f, f + model.mesh_facenum[k])
        vertices = model.mesh_vert[v:v + model.mesh_vertnum[k]].astype(np.float64)
        new, kept = simplify_mesh(vertices, model.mesh_face[faces], cell)
        if len(kept):  # each corner keeps its own normal and texture
            for table in (model.mesh_facenormal, model.mesh_facetexcoord):
                table[f:f + len(kept)] = table[faces][kept]
            model.mesh_face[f:f + len(kept)] = new
            model.mesh_facenum[k] = len(kept)
    yield
    for table, faces in zip(tables, whole):
        table[:] = faces


class Camera:
    """Renders pictures and instance masks of a simulation that runs on this MjModel or another of
    the same layout.  groups (6,): the geoms that are seen; Meta-World's goal marks are not."""

    def __init__(self, model, size, render, groups):
        import mujoco
        if render == "fast":
            model.vis.quality.offsamples = 0
        canvas = model.vis.global_
        canvas.offwidth, canvas.offheight = max(canvas.offwidth, size), max(canvas.offheight, size)
        self.renderer = mujoco.Renderer(model, size, size)
        self.option = mujoco.MjvOption()
        self.option.geomgroup[:], self.option.sitegroup[:] = groups, 0
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


TOLERANCE = 0.003  # metres before a point within which what a ray meets does not hide it
MOVES = 10 / 128 ** 2  # ATM keeps points whose places vary by over 10 square pixels of 128
JITTER = 0.05  # of the picture; ATM draws new points this far around those that move
# points tried at first; points kept; rows and columns of those kept whether or not they move
TRIES, K, GRID = 1000, 256, 7


def project(points, eye, axes, focal):
    """A pinhole: points (..., 3) metres; eye (..., 3), axes (..., 3, 3), rows right, down, ahead,
    and focal () or (..., 1), in heights of the picture, broadcast -> places (..., 2) x right, y
    down, in [0, 1] if the picture shows them, nan behind the eye; depth (...) ahead, metres."""
    local = np.einsum("...ij,...j->...i", axes, points - eye)
    depth = np.where(local[..., 2:] > 1e-3, local[..., 2:], np.nan)
    return 0.5 + focal * local[..., :2] / depth, local[..., 2]


def cast(model, data, groups, eye, directions):
    """First geom that each ray meets (P,), -1 for none; its distance in lengths of `directions`
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
    """An episode's bodies and a camera at every step, to follow P points that are fixed to bodies.
    qpos (T, nq) the joint positions; camera, view: a Camera and what it calls the camera."""

    def __init__(self, camera, view, model, qpos):
        import mujoco
        self.model, self.data, self.qpos = model, mujoco.MjData(model), qpos
        self.groups = np.array(camera.option.geomgroup, np.uint8)
        rows = []
        for t in range(len(qpos)):
            self.at(t)
            rows.append((self.data.xpos.copy(), self.data.xmat.reshape(-1, 3, 3).copy(),
                         *camera.pose(self.data, view)))
        # (T, nbody, 3), (T, nbody, 3, 3); (T, 3), (T, 3, 3), (T,)
        self.position, self.rotation, self.eye, self.axes, self.focal = map(np.stack, zip(*rows))

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
            ray = np.column_stack([(where[chosen] - 0.5) / self.focal[t], np.ones(len(chosen))])
            ray = ray @ self.axes[t]  # (P', 3)
            geom, far = cast(self.model, self.data, self.groups, self.eye[t], ray)
            body[chosen] = b = np.where(geom >= 0, self.model.geom_bodyid[geom], -1)
            point = self.eye[t] + far[:, None] * ray - self.position[t, b]  # (P', 3)
            local[chosen] = np.einsum("pji,pj->pi", self.rotation[t, b], point)
        return body, local

    def follow(self, body, local):
        """Points on bodies (P,), (P, 3) -> in the world (T, P, 3), in the picture (T, P, 2), their
        depth (T, P)."""
        world = self.position[:, body] + np.einsum("tpij,pj->tpi", self.rotation[:, body], local)
        return world, *project(world, self.eye[:, None], self.axes[:, None],
                               self.focal[:, None, None])

    def visible(self, world, place, depth):
        """Whether the picture shows them (T, P): they lie in it and are what a ray meets first."""
        shown = (depth > 1e-3) & (np.abs(np.nan_to_num(place, nan=9) - 0.5) < 0.5).all(-1)
        for t in range(len(shown)):
            self.at(t)
            chosen = np.flatnonzero(shown[t])
            ray = world[t, chosen] - self.eye[t]
            geom, far = cast(self.model, self.data, self.groups, self.eye[t], ray)
            before = (1 - far) * np.linalg.norm(ray, axis=1)  # metres
            shown[t, chosen] = (geom < 0) | (before < TOLERANCE)
        return shown


def around_what_moves(when, where, varies, T, rng):
    """K points of a film of T frames, where ATM (section IV-A) has them: around what moves, and a
    grid.  Of points tried: when and where they are seen (P,), (P, 2) in [0, 1], the variance of
    their places, -1 of no point (P,) -> which of these each is near (K,), when, where (K,), (K, 2).
    differs: ATM has 1,098 points, and stops if nothing moves; here they are drawn uniformly."""
    moves = np.flatnonzero(varies > MOVES)
    near = rng.choice(moves if len(moves) else np.flatnonzero(varies >= 0), K)
    when, where = when[near], where[near]
    grid = np.stack(np.meshgrid(*[(np.arange(GRID) + 0.5) / GRID] * 2), -1).reshape(-1, 2)
    when[:len(grid)], where[:len(grid)] = rng.integers(T, size=len(grid)), grid
    return near, when, (where + JITTER * rng.normal(size=(K, 2))).clip(0.001, 0.999)


def track(camera, view, model, qpos, rng):
    """K points, fixed to bodies, followed exactly through an episode.  qpos, camera, view: as of
    `Replay` -> places (T, K, 2) in [0, 1], x right, y down, outside if out of the picture; visible
    (T, K) bool, by ray casting.  differs: ATM tracks pixels by CoTracker."""
    replay, T = Replay(camera, view, model, qpos), len(qpos)
    when, where = rng.integers(T, size=TRIES), rng.random((TRIES, 2))
    body, local = replay.pick(when, where)
    varies = replay.follow(body, local)[1].var(0).sum(1)  # (P,) nan behind the camera
    varies = np.where(body < 0, -1, np.nan_to_num(varies, nan=np.inf))
    near, when, where = around_what_moves(when, where, varies, T, rng)
    new_body, new_local = replay.pick(when, where)
    # past the edge of the world there is nothing: then the point that was drawn first
    hit = new_body >= 0  # (K,)
    body = np.where(hit, new_body, body[near])
    local = np.where(hit[:, None], new_local, local[near])
    world, place, depth = replay.follow(body, local)
    return np.nan_to_num(place.clip(-9, 9), nan=-9), replay.visible(world, place, depth)
