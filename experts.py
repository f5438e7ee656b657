"""Scripted demonstrators: given a simulator's privileged state, the next action.

    expert = demonstrator(sim, seed=0)        # after sim.reset
    while not expert.done:
        action = expert(sim)                  # (A,) float32 in [-1, 1]: motion, then gripper (-1 open, +1 closed)
        sim.step(action)

Meta-World brings its own policies.  In LIBERO the task is read from the goal predicates, the scene from the collision
boxes; there is no code per task.  The plan
is a generator: its body reads as the story of one demonstration (reach, squeeze, lift, carry, let go), and each
`yield` is one control step of 50 ms.  Every target follows the object as it is now, so the plan survives noise on
the executed action; an object that slipped or was missed is simply picked up again.
"""
import numpy as np
from scipy.spatial.transform import Rotation

DOWN = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, -1]])  # hand pointing down, its fingers opening along world y

# ---- the Panda hand, metres from the grip site (between the finger pads)
OPENING = 0.076  # widest thing to pinch; the fingers open to 0.080
PALM = 0.031  # height of the palm above the grip site
PADS = (-0.0045, 0.0117)  # vertical extent of the finger pads
# ---- where to grasp, metres
BITE = 0.033  # a tall object is aimed at this far below its top; ARRIVED stops the hand before the palm touches it
FLOOR_GAP = 0.012  # the fingertips reach 9 mm below the grip site and must not scrape what the object stands on
# A thing wider than the opening is held by its rim: (cost, bite below the rim, distance inside it).  A deep bite slips
# least; the shallow ones keep the palm above a drawer's walls, the last one brings the outer finger close to the rim.
RIMS = ((0.0, 0.030, 0.006), (0.3, 0.020, 0.006), (0.5, 0.020, 0.015))
MARGIN = 0.006  # a hand nearer than this to something is charged for it ...
TOUCH = 0.003  # ... and nearer than this all but excluded
# ---- how to move
GAIN = 25.0  # action per metre: full speed (13 mm per step) beyond 4 cm, no overshoot
TURN = 1.0  # action per radian.  Weak on purpose: the controller treats position and orientation as independent, which
#             they are not for an outstretched arm; a firm wrist then holds the hand centimetres from its target
STEEP = 3.0  # metres of height per metre of sideways error, when closing in on a target from above
NEAR = 0.010  # metres of sideways error from which the hand comes straight down
ARRIVED = 0.008  # metres
PATIENCE = 30  # steps; then both tolerances grow: an outstretched arm creeps over the last centimetre
HOVER = 0.060  # metres above the grasp at which the hand arrives
CLEAR = (0.050, 0.030)  # metres above everything on the way: of the empty hand, of the carried object's underside
STUCK = 12  # steps without coming 2 mm closer: the hand stands on something
SLIPPED = 0.035  # metres between hand and grasp point: the object was missed or lost
SQUEEZE = 9  # steps; the gripper's command needs 8 from fully open to fully closed
LET_GO = 0.008  # metres the fingers must open before the hand rises, or a wide object comes along
RETREAT = 0.070  # metres
ATTEMPTS = 4


def grid(x, y, z):
    """All combinations, (len(x) len(y) len(z), 3)."""
    return np.stack(np.meshgrid(x, y, z, indexing="ij"), -1).reshape(-1, 3)


def open_hand():
    """Points on the open hand in the frame of the grip site, metres: x opening axis, y width, z towards the tips.

    Returns fingers (36, 3) and palm with flange (165, 3).
    """
    finger = np.concatenate([grid([0.039, x], [-0.01, 0, 0.01], [z])
                             for x, z in ((0.053, 0.009), (0.059, -0.009), (0.064, -0.026))])  # (18, 3)
    palm = np.concatenate([grid(np.linspace(-0.1, 0.1, 11), [-y, 0, y], [-z])
                           for y, z in ((0.019, PALM), (0.021, 0.06), (0.032, 0.095), (0.032, 0.12), (0.05, 0.15))])
    return np.concatenate([finger, finger * [-1, 1, 1]]), palm


FINGERS, FLANGE = open_hand()
HAND = np.concatenate([FINGERS, FLANGE])  # (201, 3)
CORNERS = grid([-1, 1], [-1, 1], [-1, 1])  # (8, 3)


# ---------------------------------------------------------------------------------------------- geometry

def solid(sim, name):
    """Indices of the colliding geoms of an object or fixture, its moving parts included, (G,)."""
    m = sim.model
    root = m.body_rootid[sim.env.obj_body_id[name]]
    return np.flatnonzero((m.body_rootid[m.geom_bodyid] == root) & ((m.geom_contype | m.geom_conaffinity) > 0))


def boxes(sim, geoms):
    """geoms (G,) -> their bounding boxes: centres (G, 3), rotations (G, 3, 3), half sizes (G, 3); metres."""
    R = sim.data.geom_xmat[geoms].reshape(-1, 3, 3)
    centre = sim.data.geom_xpos[geoms] + np.einsum("gij,gj->gi", R, sim.model.geom_aabb[geoms, :3])
    return centre, R, sim.model.geom_aabb[geoms, 3:]


def corners(sim, geoms):
    """geoms (G,) -> corners of their boxes in the world, (G, 8, 3), metres."""
    centre, R, half = boxes(sim, geoms)
    return centre[:, None] + np.einsum("gij,gkj->gki", R, half[:, None] * CORNERS)


def distance(sim, points, geoms):
    """points (..., 3), geoms (G,) -> distance to the nearest of their boxes, 0 inside, (...); metres."""
    centre, R, half = boxes(sim, geoms)
    local = np.einsum("gij,...gi->...gj", R, points[..., None, :] - centre)  # (..., G, 3)
    return np.linalg.norm(np.maximum(np.abs(local) - half, 0), axis=-1).min(-1)


def top_beside(sim, geoms, start, end, radius):
    """Highest point, metres, of the boxes within `radius` of the straight way from start to end, seen from above."""
    centre, R, half = boxes(sim, geoms)
    way = start[:2] + np.linspace(0, 1, 25)[:, None] * (end - start)[:2]  # (25, 2)
    level = np.concatenate([way[:, None] - centre[:, :2], np.zeros((25, len(geoms), 1))], -1)  # (25, G, 3)
    gap = np.linalg.norm(np.maximum(np.abs(np.einsum("gij,sgi->sgj", R, level)) - half, 0), axis=-1).min(0)  # (G,)
    return corners(sim, geoms)[gap < radius, :, 2].max(initial=-np.inf)


def turned(yaw):
    """The hand pointing down, turned about the vertical by `yaw` radians, (3, 3)."""
    return Rotation.from_euler("z", yaw).as_matrix() @ DOWN


def yaw_of(axis):
    """The turn, radians, that lays the fingers along a horizontal axis (3,).

    The hand is symmetric, so half a circle is enough; it is cut at -77.5 degrees because objects are often grasped at
    90, where a cut would make the hand waver between two opposite turns.
    """
    cut = np.radians(-77.5)
    return (np.arctan2(axis[1], axis[0]) - np.pi / 2 - cut) % np.pi + cut


# ---------------------------------------------------------------------------------------------- grasps

def pinches(boxed, yaws, axes):
    """Ways to pinch an object across.  boxed (G, 8, 3) corners, yaws (Y,), axes (Y, 3).

    Yields (cost, yaw, axis, grip point).  The cost prefers the narrow side, 1 rad of turning to 33 mm of width, and
    avoids seams: where two stacked boxes lie flush under a pad it wedges between them and does not come free.
    """
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
            touched = held & (reach > reach[held].max(initial=-np.inf) - 0.0006)  # flush: within 0.6 mm
            seam |= touched.any() and bottom[touched].max() > top[touched].min() - 0.005  # stacked, not side by side
        if width < OPENING:
            yield 30 * (width - widths.min()) + 2 * seam, yaw, axis, np.array([*(low + high)[:2] / 2, z])


def rims(boxed, yaws, axes):
    """Ways to hold an object by its rim, one finger inside.  Arguments and results as for `pinches`.

    A tilted bowl is held where its rim is raised: there its wall stands steep; elsewhere it slips (first attempts at a
    bowl tipped by 50 degrees: 110 of 120 held within 60 degrees of its highest point, 35 of 120 opposite).
    """
    points = boxed.reshape(-1, 3)
    middle = (points.min(0) + points.max(0)) / 2
    flat, highest = points - middle, points[:, 2].max()
    for yaw, axis in zip(yaws, axes):
        for side in (axis, -axis):
            along = flat @ side
            sector = (along > 0) & (np.abs(flat[:, :2] @ [-side[1], side[0]]) < 0.36 * along)  # within 20 degrees
            top = points[sector, 2].max()  # of the rim on this side: the object may be tilted
            radius = along[sector & (points[:, 2] > top - 0.01)].max()
            lowered = max(highest - top - 0.01, 0)
            for cost, bite, inset in RIMS:
                point = np.array([*(middle + side * (radius - inset))[:2], top - bite])
                yield cost + 30 * lowered + 0.02 * (side[1] < 0), yaw, side, point  # equals: always the same side


def choose_grasp(sim, name, last=None):
    """The best grasp of an object as it lies now, as grip point (3,) and finger axis (3,) in the object's frame.

    Turning the wrist by 1 rad costs 1; a hand closer than MARGIN to anything else costs 0.3 per mm; going to the other
    side than the finger axis chosen `last` (3,), in the world, costs 0.6: the hand does not dither.
    """
    own = solid(sim, name)
    others = np.concatenate([solid(sim, other) for other in sim.env.obj_body_id if other != name])
    boxed = corners(sim, own)
    middle = boxed.reshape(-1, 3).mean(0)
    others = others[np.linalg.norm(sim.data.geom_xpos[others] - middle, axis=1) < 0.25 + sim.model.geom_rbound[others]]
    yaws = np.radians(np.arange(-75, 105, 5))  # (Y,)
    axes = np.stack([-np.sin(yaws), np.cos(yaws), 0 * yaws], -1)  # (Y, 3)
    narrow = np.ptp(boxed.reshape(-1, 3) @ axes.T, axis=0).min() < OPENING
    found = pinches(boxed, yaws, axes) if narrow else rims(boxed, yaws[1::2], axes[1::2])
    cost, yaw, axis, point = map(np.array, zip(*found))  # (N,), (N,), (N, 3), (N, 3)
    hands = point[:, None] + np.einsum("nij,kj->nki", np.stack([turned(y) for y in yaw]), HAND)  # (N, K, 3)
    gap = np.full(len(yaw), np.inf)
    if len(others):
        gap = distance(sim, hands, others).min(1)
    if not narrow:  # the inner finger must not stand on the bottom, which a tilted bowl turns towards it
        gap = np.minimum(gap, distance(sim, hands[:, :len(FINGERS)], own).min(1))
    if last is not None:
        cost = cost + 0.3 * np.linalg.norm(axis - last, axis=1)
    best = np.argmin(cost + np.abs(yaw) + 300 * np.maximum(MARGIN - gap, 0) + 5 * (gap < TOUCH))
    p, R = pose(sim, name)
    return R.T @ (point[best] - p), R.T @ axis[best]


def pose(sim, name):
    """Position (3,) in metres and rotation (3, 3) of an object."""
    body = sim.env.obj_body_id[name]
    return sim.data.xpos[body].copy(), sim.data.xmat[body].reshape(3, 3).copy()


# ---------------------------------------------------------------------------------------------- the demonstrator

def demonstrator(sim, seed=0):
    """Whoever can demonstrate the task of a freshly reset simulator."""
    return Script(sim) if hasattr(sim, "script") else Expert(sim, seed)


class Script:
    """Meta-World's own policy.  done: a little after the first success, at which most tasks are on the edge of failure."""

    def __init__(self, sim):
        self.left, self.done = sim.linger, False

    def __call__(self, sim):
        """The action for the current state, (4,) float32 in [-1, 1]."""
        self.left -= sim.success()
        self.done = self.left <= 0
        return sim.script()


class Expert:
    """Demonstrates the task of a freshly reset LIBERO simulator.

    done  turns true, with an action that stands still, once all is released and the hand withdrawn
    seed  varies the height of approach by +-1 cm; all else follows from the scene
    """

    def __init__(self, sim, seed=0):
        for predicate, *_ in sim.goal:
            if predicate not in ("on", "in"):
                raise ValueError(f"no script for the goal '{predicate}': the expert can do 'on' and 'in'")
        self.sim, self.done = sim, False
        self.hover = HOVER + np.random.default_rng(seed).uniform(-0.01, 0.01)
        self.plan = self.demonstrate()

    def __call__(self, sim):
        """The action for the current state, (7,) float32 in [-1, 1]; after the end, one that stands still."""
        self.sim = sim
        action = next(self.plan, None)
        self.done = action is None
        return np.float32([0, 0, 0, 0, 0, 0, -1]) if self.done else action.astype(np.float32)

    # ---- what the plan looks at, all of it as it is now

    @property
    def grip(self):
        """Position of the grip site (3,), metres."""
        return self.sim.data.site("gripper0_grip_site").xpos.copy()

    @property
    def hand(self):
        """Rotation of the hand (3, 3)."""
        return self.sim.data.site("gripper0_grip_site").xmat.reshape(3, 3).copy()

    @property
    def aperture(self):
        """Distance between the fingers, metres."""
        return np.ptp([self.sim.data.joint(f"gripper0_finger_joint{k}").qpos[0] for k in (1, 2)])

    def holds(self, goal):
        """Whether one goal predicate is true."""
        return bool(self.sim.env._eval_predicate(goal))

    def lowest(self, name):
        """Height of the object's underside, metres."""
        return corners(self.sim, solid(self.sim, name))[..., 2].min()

    def destination(self, target):
        """Position (3,) of the region or object to go to, and the name of the object it is part of."""
        region = self.sim.env.object_sites_dict.get(target)
        if region is None:
            return pose(self.sim, target)[0], target
        return self.sim.data.site(target).xpos.copy(), region.parent_name

    def grasp_pose(self, name, grasp):
        """Where the hand must be to hold the object: grip point (3,), rotation (3, 3)."""
        p, R = pose(self.sim, name)
        return p + R @ grasp[0], turned(yaw_of(R @ grasp[1]))

    def highest_on_way(self, name, start, end, radius):
        """Height, metres, of the highest thing other than the object near the straight way from start to end (3,)."""
        others = [solid(self.sim, other) for other in self.sim.env.obj_body_id if other != name]
        return top_beside(self.sim, np.concatenate(others), start, end, radius)

    def towards(self, point, R, gripper):
        """The action that brings the grip to a point (3,) and the hand to a rotation (3, 3), along a straight line."""
        move = GAIN * (point - self.grip)
        turn = TURN * Rotation.from_matrix(R @ self.hand.T).as_rotvec()
        return np.concatenate([move / max(1, np.abs(move).max()), np.clip(turn, -0.5, 0.5), [gripper]])

    # ---- the plan; each method yields actions

    def demonstrate(self):
        """The whole plan: every goal in turn, again if it does not hold."""
        for goal in self.sim.goal:
            for _ in range(ATTEMPTS):
                if not self.holds(goal):
                    yield from self.pick_and_place(goal)

    def pick_and_place(self, goal):
        """One attempt at ['on', object, object] or ['in', object, region]; a missed or lost object ends it early."""
        _, name, target = goal
        grasp, blocked = yield from self.reach(name)
        R = self.grasp_pose(name, grasp)[1]
        if blocked:
            yield from self.rise(R)
            return
        yield from self.squeeze(R)

        def lost():
            return np.linalg.norm(self.grasp_pose(name, grasp)[0] - self.grip) > SLIPPED

        level = self.highest_on_way(name, pose(self.sim, name)[0], self.destination(target)[0], 0.08) + CLEAR[1]
        yield from self.lift(name, level, R, lost)
        yield from self.carry(goal, level, R, lost)
        yield from self.let_go(R)

    def reach(self, name):
        """Over the object and down to it, along a funnel.  Returns the grasp and whether something was in the way."""
        planned, axis, nearest, since = np.zeros((3, 3)), None, np.inf, 0
        for step in range(100):
            slack = 1 + max(0, step - PATIENCE) / 20
            p, R = pose(self.sim, name)
            # planned again if the object moved of itself, as one that is still falling into place does
            if axis is None or np.abs(R - planned).max() > 0.03 and np.linalg.norm(self.grip - p) > 0.1:
                planned, grasp = R, choose_grasp(self.sim, name, axis)
                axis = R @ grasp[1]
                point, _ = self.grasp_pose(name, grasp)
                level = max(self.highest_on_way(name, self.grip, point, 0.1) + CLEAR[0], point[2] + self.hover)
            point, R = self.grasp_pose(name, grasp)
            aside = np.linalg.norm((point - self.grip)[:2])
            twist = Rotation.from_matrix(R @ self.hand.T).magnitude()
            error = np.linalg.norm(point - self.grip)
            if error < ARRIVED * slack and twist < 0.15 * slack:  # 9 degrees
                return grasp, False
            nearest, since = (error, step) if error < nearest - 0.002 else (nearest, since)
            if step > max(since, PATIENCE) + STUCK:
                return grasp, True
            aside += 0.05 * max(twist - 0.1, 0)  # the fingertips swing by some 5 cm per rad
            above = np.clip(STEEP * (aside - NEAR * slack), 0, max(level - point[2], 0))
            yield self.towards(point + [0, 0, above], R, -1)
        return grasp, True

    def squeeze(self, R):
        """Closes the hand where it is: following the object, which the fingers now move, would chase it."""
        point = self.grip
        for _ in range(SQUEEZE):
            yield self.towards(point, R, 1)

    def lift(self, name, level, R, lost):
        """Straight up until the object's underside is nearly at `level` (metres)."""
        start = self.grip
        for _ in range(60):
            rise = level - self.lowest(name)
            if rise < 0.01 or lost():
                break
            yield self.towards(np.array([*start[:2], self.grip[2] + rise + 0.02]), R, 1)

    def carry(self, goal, level, R, lost):
        """Across and down: the object's centre over the destination's, then until it rests on it or hangs in it."""
        _, name, target = goal
        still, before = 0, np.inf
        for _ in range(150):
            where, container = self.destination(target)
            walls = corners(self.sim, solid(self.sim, container))[..., 2]
            shift = (where - pose(self.sim, name)[0])[:2]
            aside, bottom = np.linalg.norm(shift), self.lowest(name)
            if target != container:  # into a region: the palm stays above the container's walls
                end = max(walls.max() - 0.01 - (self.grip[2] - bottom), walls.min() + 0.02)
                arrived = aside < 0.02 and bottom < end + 0.015
            else:  # onto an object: aim below its surface and stop at contact
                end = walls.min()
                arrived = self.holds(goal)
            still = still + 1 if aside < 0.02 and abs(before - bottom) < 0.0005 else 0  # it stands on something
            before = bottom
            if arrived or lost() or still > 6:
                break
            fall = min(end + STEEP * max(aside - NEAR, 0), level) - bottom
            yield self.towards(self.grip + [*shift, fall], R, 1)

    def let_go(self, R):
        """Opens the hand until it holds nothing, then straight up."""
        point, held = self.grip, self.aperture
        for _ in range(12):
            yield self.towards(point, R, -1)
            if self.aperture > held + LET_GO:
                break
        yield from self.rise(R)

    def rise(self, R):
        """Straight up, the hand open."""
        point = self.grip
        for _ in range(20):
            if self.grip[2] > point[2] + RETREAT:
                break
            yield self.towards(point + [0, 0, 2 * RETREAT], R, -1)
