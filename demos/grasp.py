"""Where to hold an object: LIBERO's scenes as boxes, and the choice of a grasp by clearance."""

import numpy as np
from scipy.spatial.transform import Rotation

UP = np.array([0.0, 0, 1])
# hand pointing down, its fingers opening along world y
DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])
# of the Panda hand, metres; the grip site is between the finger pads
OPENING = 0.076  # widest thing to pinch; the fingers open to 0.080
TIGHT = 0.066  # a thing wider than this is held by its handle if it has one and is not hollow
PALM = 0.031  # height of the palm above the grip site
PADS = (-0.0045, 0.0117)  # vertical extent of the finger pads
SLIPPED = 0.035  # between hand and grasp point: the object was missed or lost
BITE = 0.033  # below the top of a tall object; ARRIVED stops the hand before the palm touches
FLOOR_GAP = 0.012  # the fingertips, 9 mm below the grip site, must not scrape over a table
# A thing wider than the opening is held by its rim: (cost, bite below the rim, distance inside it).
# A deep bite slips least; the shallow ones keep the palm above a drawer's walls, the last one
# brings the outer finger close to the rim.
RIMS = ((0.0, 0.030, 0.006), (0.3, 0.020, 0.006), (0.5, 0.020, 0.015))
MARGIN = 0.006  # a hand nearer than this to something is charged for it ...
TOUCH = 0.003  # ... and nearer than this all but excluded, ...
STRETCHED = 0.77  # ... as is one further from the shoulder: the elbow locks straight, for good


def grid(x, y, z):
    """All combinations, (len(x) len(y) len(z), 3)."""
    return np.stack(np.meshgrid(x, y, z, indexing="ij"), -1).reshape(-1, 3)


def open_hand():
    """Points on the open hand in the frame of the grip site (x opening axis, y width, z towards the
    tips), metres, (201, 3): 36 of the fingers, then palm with flange."""
    levels = (0.053, 0.009), (0.059, -0.009), (0.064, -0.026)
    finger = np.concatenate([grid([0.039, x], [-0.01, 0, 0.01], [z]) for x, z in levels])  # (18, 3)
    levels = (0.019, PALM), (0.021, 0.06), (0.032, 0.095), (0.032, 0.12), (0.05, 0.15)
    palm = [grid(np.linspace(-0.1, 0.1, 11), [-y, 0, y], [-z]) for y, z in levels]
    return np.concatenate([finger, finger * [-1, 1, 1], *palm])


HAND = open_hand()
CORNERS = grid([-1, 1], [-1, 1], [-1, 1])  # (8, 3)


def solid(sim, name):
    """Indices of the colliding geoms of an object or fixture, its moving parts included, (G,)."""
    m, body = sim.model, sim.env.obj_body_id[name]
    own = m.body_rootid[m.geom_bodyid] == m.body_rootid[body]
    return np.flatnonzero(own & ((m.geom_contype | m.geom_conaffinity) > 0))


def all_but(sim, name):
    """Indices of the colliding geoms of all objects and fixtures but one (None: of all), (G,)."""
    return np.concatenate([solid(sim, other) for other in sim.env.obj_body_id if other != name])


def pose(sim, name):
    """Position (3,) in metres and rotation (3, 3) of an object."""
    body = sim.env.obj_body_id[name]
    return sim.data.xpos[body].copy(), sim.data.xmat[body].reshape(3, 3).copy()


def boxes(sim, geoms):
    """geoms (G,) -> their boxes: centres (G, 3), rotations (G, 3, 3), half sizes (G, 3); metres."""
    R = sim.data.geom_xmat[geoms].reshape(-1, 3, 3)
    centre = sim.data.geom_xpos[geoms] + np.einsum("gij,gj->gi", R, sim.model.geom_aabb[geoms, :3])
    return centre, R, sim.model.geom_aabb[geoms, 3:]


def corners(sim, geoms):
    """geoms (G,) -> corners of their boxes in the world, (G, 8, 3), metres."""
    centre, R, half = boxes(sim, geoms)
    return centre[:, None] + np.einsum("gij,gkj->gki", R, half[:, None] * CORNERS)


def distance(sim, points, geoms, axes=1):
    """points (..., 3), geoms (G,) -> metres to each of their boxes, 0 inside, (..., G).  axes: of
    the world, 1 if it counts, else 0."""
    centre, R, half = boxes(sim, geoms)
    way = (points[..., None, :] - centre) * axes  # (..., G, 3)
    local = np.einsum("gij,...gi->...gj", R, way)
    return np.linalg.norm(np.maximum(np.abs(local) - half, 0), axis=-1)


def top_beside(sim, name, start, end, radius):
    """Highest point, metres, of the boxes of all but one object that are within `radius` of the
    straight way from start to end (3,), seen from above."""
    geoms = all_but(sim, name)
    way = start + np.linspace(0, 1, 25)[:, None] * (end - start)  # (25, 3)
    gap = distance(sim, way, geoms, axes=[1, 1, 0]).min(0)  # (G,)
    return corners(sim, geoms)[gap < radius, :, 2].max(initial=-np.inf)


def turned(yaw):
    """The hand pointing down, turned about the vertical by `yaw` radians, (3, 3)."""
    return Rotation.from_euler("z", yaw).as_matrix() @ DOWN


def leaning(axis, out, angle):
    """The hand, its fingers along `axis` (3,), leaning by `angle` radians, its back to `out`."""
    return Rotation.from_rotvec(angle * np.cross(UP, out)).as_matrix() @ turned(yaw_of(axis))


def yaw_of(axis):
    """The turn, radians, that lays the fingers along a horizontal axis (3,).  Half a circle is
    enough, as the hand is symmetric; cut at -77.5 degrees because objects are often grasped at 90,
    where a cut would make the hand waver between two opposite turns."""
    cut = np.radians(-77.5)
    return (np.arctan2(axis[1], axis[0]) - np.pi / 2 - cut) % np.pi + cut


def pinches(boxed, yaws, axes):
    """Ways to pinch an object across.  boxed (G, 8, 3) corners, yaws (Y,), axes (Y, 3); yields
    (cost, yaw, axis, grip point).  The cost prefers the narrow side, 1 rad of turning to 33 mm of
    width, and avoids seams: where two stacked boxes lie flush under a pad it wedges between them
    and does not come free."""
    points = boxed.reshape(-1, 3)
    low, high = points.min(0), points.max(0)
    z = max((low[2] + high[2]) / 2, high[2] - BITE, low[2] + FLOOR_GAP)
    widths = np.ptp(points @ axes.T, axis=0)  # (Y,)
    bottom, top = boxed[..., 2].min(1), boxed[..., 2].max(1)  # (G,)
    held = (bottom < z + PADS[1]) & (top > z + PADS[0])
    for yaw, axis, width in zip(yaws, axes, widths):
        seam = False
        for side in (axis, -axis):
            reach = (boxed @ side).max(1)
            touched = held & (reach > reach[held].max(initial=-np.inf) - 0.0006)  # flush
            # stacked, not side by side
            seam |= touched.any() and bottom[touched].max() > top[touched].min() - 0.005
        if width < OPENING:
            point = np.array([*(low + high)[:2] / 2, z])
            yield 30 * (width - widths.min()) + 2 * seam, yaw, axis, point


def rims(boxed, yaws, axes):
    """Ways to hold an object by its rim, one finger inside; all else as for `pinches`.  A tilted
    bowl is held where its rim is raised: there its wall stands steep; elsewhere it slips."""
    points = boxed.reshape(-1, 3)
    low, high = points.min(0), points.max(0)
    middle, flat = (low + high) / 2, points - (low + high) / 2
    floor = low[2] + min(FLOOR_GAP, 0.35 * (high[2] - low[2]))  # a plate's rim is low
    for yaw, axis in zip(yaws, axes):
        for side in (axis, -axis):
            along, across = flat @ side, flat[:, :2] @ [-side[1], side[0]]
            sector = (along > 0) & (np.abs(across) < 0.36 * along)  # within 20 degrees
            if not sector.any():
                continue
            top = points[sector, 2].max()  # of the rim on this side: the object may be tilted
            radius = along[sector & (points[:, 2] > top - 0.01)].max()
            lowered = max(high[2] - top - 0.01, 0)
            for cost, bite, inset in RIMS:
                point = np.array([*(middle + side * (radius - inset))[:2], max(top - bite, floor)])
                # equals: always the same side
                yield cost + 30 * lowered + 0.02 * (side[1] < 0), yaw, side, point


def without_handle(boxed):
    """Which boxes (G, 8, 3) are of an object's body, (G,) bool: not those far to one side."""
    points, centres = boxed.reshape(-1, 3), boxed.mean(1)
    volume = np.prod([np.linalg.norm(boxed[:, k] - boxed[:, 0], axis=1) for k in (1, 2, 4)], axis=0)
    middle = np.average(centres, axis=0, weights=volume)
    if np.abs((points.min(0) + points.max(0)) / 2 - middle)[:2].max() < 0.012:
        return np.ones(len(boxed), bool)
    away = np.linalg.norm((centres - middle)[:, :2], axis=1)
    order = np.argsort(away)
    usual = away[order][np.searchsorted(np.cumsum(volume[order]), volume.sum() / 2)]
    return away < 1.25 * usual


def covers(boxed, point):
    """Which boxes (G, 8, 3) are above or below a point (3,), (G,) bool."""
    return ((boxed.min(1) < point) & (boxed.max(1) > point))[:, :2].all(1)


def is_hollow(boxed):
    """Whether nothing fills the upper half of the middle of boxes (G, 8, 3)."""
    middle = (boxed.min((0, 1)) + boxed.max((0, 1))) / 2
    return boxed[covers(boxed, middle), :, 2].max(initial=-np.inf) < middle[2] + 0.005


def handles(boxed, body, yaws, axes):
    """Ways to pinch a handle.  boxed (G, 8, 3), body (G,) bool, the rest as for `pinches`."""
    parts = boxed[~body]
    away = np.linalg.norm((parts.mean(1) - boxed[body].mean((0, 1)))[:, :2], axis=1)
    for part in parts[away > away.max() - 0.012]:
        middle, width = part.mean(0), np.ptp(part @ axes.T, axis=0)
        near = np.linalg.norm((parts.mean(1) - middle)[:, :2], axis=1) < 0.025
        k, z = width.argmin(), parts[near][..., 2].max() - 0.022
        if width[k] < 0.035 and part[:, 2].min() - 0.005 < z < part[:, 2].max() + 0.005:
            yield 0.0, yaws[k], axes[k], np.array([*middle[:2], z])


def handle_of(sim, name):
    """An object's handle, its outermost part: a point (3,) in the object's frame; or None."""
    boxed = corners(sim, solid(sim, name))
    body = without_handle(boxed)
    if body.all():
        return None
    parts, (p, R) = boxed[~body], pose(sim, name)
    out = parts.mean((0, 1)) - boxed[body].mean((0, 1))
    out /= np.linalg.norm(out[:2])
    return R.T @ (parts[(parts.mean(1) @ out).argmax()].mean(0) - p)


def choose_grasp(sim, name, last=None, reach=np.inf):
    """The best grasp of an object as it lies now: grip point (3,), finger axis (3,) in its frame.

    Turning the wrist by 1 rad costs 1; a hand closer than MARGIN to anything else costs 0.3 per mm;
    going to the other side than the finger axis chosen `last` (3,), in the world, costs 0.6: the
    hand does not dither; a cm further than `reach` metres from the shoulder costs 0.5.
    """
    own, others = solid(sim, name), all_but(sim, name)
    boxed = corners(sim, own)
    points = boxed.reshape(-1, 3)
    away = np.linalg.norm(sim.data.geom_xpos[others] - points.mean(0), axis=1)
    others = others[away < 0.25 + sim.model.geom_rbound[others]]
    yaws = np.radians(np.arange(-75, 105, 5))  # (Y,)
    axes = np.stack([-np.sin(yaws), np.cos(yaws), 0 * yaws], -1)  # (Y, 3)
    width, body = np.ptp(points @ axes.T, axis=0).min(), without_handle(boxed)
    handled = width > TIGHT and not body.all() and not is_hollow(boxed[body])
    # the handle of a thing that fell over may be out of reach
    found = list(handles(boxed, body, yaws, axes)) if handled else []
    by_rim = not found and width >= OPENING
    if not found:
        found = rims(boxed[body], yaws[1::2], axes[1::2]) if by_rim else pinches(boxed, yaws, axes)
    cost, yaw, axis, point = map(np.array, zip(*found))  # (N,), (N,), (N, 3), (N, 3)
    hands = point[:, None] + np.einsum("nij,kj->nki", [*map(turned, yaw)], HAND)  # (N, K, 3)
    gap = distance(sim, hands, others).min((1, 2), initial=np.inf)  # (N,)
    if by_rim:  # nor may a finger (of 36 points) stand on the bottom that a tilted bowl turns to it
        gap = np.minimum(gap, distance(sim, hands[:, :36], own).min((1, 2)))
    if last is not None:
        cost = cost + 0.3 * np.linalg.norm(axis - last, axis=1)
    if reach < np.inf:
        stretch = np.linalg.norm(point - sim.data.body("robot0_link2").xpos, axis=1)
        cost = cost + 50 * np.maximum(stretch - reach, 0)
    best = np.argmin(cost + np.abs(yaw) + 300 * np.maximum(MARGIN - gap, 0) + 5 * (gap < TOUCH))
    p, R = pose(sim, name)
    return R.T @ (point[best] - p), R.T @ axis[best]
