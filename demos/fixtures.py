"""What is done to LIBERO's fixtures: drawers and doors opened and shut, knobs turned, and things
brought out of a drawer's way.

Each function is a part of the expert's plan (`experts.py`): a generator of actions, which looks at
the fixture's joint as it is now and gives up when the hand has lost it; the expert tries again.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from demos.grasp import corners, leaning, pose, solid, turned, yaw_of

UP = np.array([0.0, 0, 1])
# radians off the vertical at which a handle is pulled: one with nothing above it, another
PULL_LEAN = (1.2, 1.4)
PUSH_LEAN = 0.5  # radians: a leaning hand keeps clear of the handles above the one it pushes
HALF_OPEN = 4  # steps of closing after which the hand passes between two handles
# metres of a drawer's joint: open to its end, open (LIBERO: beyond -0.14), open enough to put in
WIDE, OPEN, AJAR = -0.158, -0.150, -0.105
IN_FRONT = 0.09  # metres before the handle from which the hand comes
# metres that the hand's target is ahead of the drawer it moves: slowly, or a handle slips out
LEAD = 0.03
SIDE = 0.2  # metres from its hinge at which a door is pushed
SWUNG = -1.45  # radians of a door's joint: open (LIBERO: beyond -1.3)


class Part:
    """The part of a fixture that a goal speaks of: its joint, its body's geoms, as they are now."""

    def __init__(self, sim, target):
        region = sim.env.object_sites_dict.get(target)
        self.sim, self.target = sim, target
        self.fixture = region.parent_name if region else target
        self.joint = sim.model.joint((region or sim.env.get_object(target)).joints[0])
        m = sim.model
        body = self.joint.bodyid[0]
        collides = (m.geom_contype | m.geom_conaffinity) > 0
        self.geoms = np.flatnonzero((m.geom_bodyid == body) & collides)
        self.others = np.flatnonzero((m.body_rootid[m.geom_bodyid] == m.body_rootid[body])
                                     & (m.geom_bodyid != body) & collides)

    @property
    def q(self):
        """Position of the joint, metres or radians."""
        return self.sim.data.qpos[self.joint.qposadr[0]]

    @property
    def anchor(self):
        return self.sim.data.xanchor[self.joint.id].copy()

    @property
    def outward(self):
        """Where a drawer opens to, (3,): its joint's negative side in all of LIBERO's cabinets."""
        return -self.sim.data.xaxis[self.joint.id]

    def handle(self):
        """Centre (3,) of a drawer's handle and half its depth along the drawer's way, metres."""
        boxed = corners(self.sim, self.geoms)  # (G, 8, 3)
        along = boxed @ self.outward
        bar = along.max(1).argmax()
        return boxed[bar].mean(0), np.ptp(along[bar]) / 2

    def ceiling(self):
        """Height, metres, of the underside of the lowest handle above this one, else infinite."""
        boxed = corners(self.sim, self.others)
        bar = self.handle()[0] + self.q * self.outward  # where it is when the drawer is shut
        near = np.abs(boxed.mean(1) - bar) @ np.abs(self.outward) < 0.02
        above = near & (boxed[..., 2].mean(1) > bar[2] + 0.03)
        return boxed[above][..., 2].min(initial=np.inf)


def open_drawer(expert, target, far):
    """Pulls a drawer by its handle until its joint is below `far`, metres (< 0), then lets go."""
    part = Part(expert.sim, target)
    out, low = part.outward, bool(np.isfinite(part.ceiling()))
    R = leaning(out, out, PULL_LEAN[low])
    yield from expert.travel(lambda: part.handle()[0] + IN_FRONT * out, R, -1)
    for _ in range(HALF_OPEN * low):
        yield expert.towards(part.handle()[0] + IN_FRONT * out, R, 1)
    opened = 0 if low else -1
    yield from expert.approach(lambda: part.handle()[0], R, opened)
    yield from expert.squeeze(R)
    for _ in range(90):
        bar, _ = part.handle()
        if part.q < far or np.linalg.norm(bar - expert.grip) > 0.04:
            break
        yield expert.towards(bar + np.clip(part.q - far + 0.012, 0.012, LEAD) * out, R, 1)
    yield from expert.leave(out, R)


def widen_drawer(expert, target):
    """Pushes a drawer that is nearly open to its end, the closed hand being inside of its front."""
    part = Part(expert.sim, target)
    out = part.outward
    R = turned(yaw_of(np.cross(UP, out)))
    top = corners(expert.sim, part.geoms)[..., 2].max()

    def inside(ahead):
        return (part.handle()[0] + (ahead - 0.055) * out) * [1, 1, 0] + (top - 0.012) * UP
    yield from expert.travel(lambda: inside(0), R, 1)
    for _ in range(30):
        if part.q < WIDE + 0.002:
            break
        yield expert.towards(inside(LEAD), R, 1)
    yield from expert.rise(R, 1)


def close_drawer(expert, target):
    """Pushes a drawer shut by its handle with the closed hand."""
    part = Part(expert.sim, target)
    out = part.outward
    R = leaning(np.cross(UP, out), out, PUSH_LEAN)
    yield from expert.travel(lambda: part.handle()[0] + IN_FRONT * out, R, 1)
    still = 0
    for _ in range(120):
        bar, depth = part.handle()
        before = part.q
        yield expert.towards(bar - LEAD * out, R, 1)
        still = still + 1 if part.q - before < 0.0002 else 0
        if part.q > 0.004 or still > 30:
            break
    yield from expert.leave(out, R, 1)


def open_door(expert, target):
    """Pinches the upright bar of the microwave's door from above and swings it open, the hand
    turning with it."""
    part = Part(expert.sim, target)
    _, base = pose(expert.sim, part.fixture)
    front = base @ [np.sin(part.q), -np.cos(part.q), 0]
    bar = part.geoms[(corners(expert.sim, part.geoms).mean(1) @ front).argmax()]

    def place(ahead=0.0):
        boxed = corners(expert.sim, [bar])[0]
        swing = Rotation.from_euler("z", ahead).as_matrix()
        point = part.anchor + swing @ (boxed.mean(0) - part.anchor)
        return np.array([*point[:2], boxed[:, 2].max() - 0.02])

    began, start = part.q, yaw_of(np.cross(UP, front))
    yield from expert.travel(place, turned(start), -1)
    yield from expert.squeeze(turned(start))
    for _ in range(150):
        if part.q < SWUNG or np.linalg.norm(place() - expert.grip) > 0.04:
            break
        yield expert.towards(place(-LEAD / SIDE), turned(start + part.q - began), 1)
    yield from expert.let_go(expert.hand)


def close_door(expert, target):
    """Pushes the microwave's door shut with the closed hand, at its upper edge."""
    part = Part(expert.sim, target)
    top = corners(expert.sim, part.geoms)[..., 2].max()
    R = turned(0)

    def before_door(ahead, gap):
        q = min(part.q + ahead, 0)
        along, front = np.array([np.cos(q), np.sin(q), 0]), np.array([np.sin(q), -np.cos(q), 0])
        _, base = pose(expert.sim, part.fixture)
        point = part.anchor + base @ (SIDE * along + gap * front)
        return np.array([*point[:2], top - 0.02])

    yield from expert.travel(lambda: before_door(0, 0.1), R, 1)
    for _ in range(160):
        yield expert.towards(before_door(0.35, 0.0), R, 1)
        if part.q > -0.002:
            break
    yield from expert.leave(pose(expert.sim, part.fixture)[1] @ [0, -1, 0], R, 1)


def turn_knob(expert, target, on):
    """Turns the stove's knob by its fin, to on or off."""
    part = Part(expert.sim, target)
    fin = corners(expert.sim, part.geoms)
    fin = part.geoms[fin[..., 2].max(1).argmax()]

    def place():
        top = corners(expert.sim, [fin])[..., 2].max()
        return np.array([*part.anchor[:2], top - 0.018])

    def across(ahead=0.0):
        _, base = pose(expert.sim, part.fixture)
        q = part.q + ahead
        axis = base @ [-np.sin(q), np.cos(q), 0]
        return axis

    start = yaw_of(across())
    yield from expert.travel(place, turned(start), -1)
    yield from expert.squeeze(turned(start))
    began = part.q
    for _ in range(70):
        turned_far = part.q > 1.0 if on else part.q < -0.0035
        if np.linalg.norm(place() - expert.grip) > 0.04 or turned_far:
            break
        lead = 0.5 if on else -0.5
        yield expert.towards(place(), turned(start + part.q - began + lead), 1)
    yield from expert.let_go(expert.hand)


# --- out of a drawer's way ------------------------------------------------------------------------


def uncovered(sim, name, more=np.zeros((0, 8, 3)), spare=0.01):
    """The shortest horizontal way (3,), metres, on which an object comes out from under all else.

    more (G, 8, 3) boxes that are in the way, too; spare  metres left between it and what is above
    """
    own = corners(sim, solid(sim, name)).reshape(-1, 3)
    others = [solid(sim, other) for other in sim.env.obj_body_id if other != name]
    boxed = np.concatenate([corners(sim, np.concatenate(others)), more])
    low, high = boxed.min(1), boxed.max(1)  # (G, 3)
    over = low[:, 2] > own[:, 2].min() + 0.015
    beside = ~over & (high[:, 2] > own[:, 2].min() + 0.01)

    def touches(shift, which, gap):
        before = low[which, :2] < own.max(0)[:2] + shift + gap
        behind = high[which, :2] > own.min(0)[:2] + shift - gap
        return (before & behind).all(1).any()
    for far in np.arange(0, 0.25, 0.01):
        for angle in np.arange(0, 2 * np.pi, np.pi / 8):
            shift = far * np.array([np.cos(angle), np.sin(angle)])
            if not touches(shift, over, spare) and (far == 0 or not touches(shift, beside, 0.005)):
                return np.append(shift, 0)
    return np.zeros(3)


def slide_out(expert, name, R):
    """A held thing out from under what is above it, such as an open drawer, along the table."""
    shift = uncovered(expert.sim, name)
    goal = expert.grip + shift
    for _ in range(40 if np.any(shift) else 0):
        if np.linalg.norm((goal - expert.grip)[:2]) < 0.008:
            break
        yield expert.towards(goal + [0, 0, 0.004], R, 1)


def clear(expert, name, target):
    """Moves an object, along the table, from where a drawer will be over it when it is open."""
    part = Part(expert.sim, target)
    drawer = corners(expert.sim, part.geoms) + (part.q - AJAR + 0.04) * part.outward
    if not np.any(uncovered(expert.sim, name, drawer, 0.0)):
        return
    shift = uncovered(expert.sim, name, drawer, 0.04)
    grasp, blocked = yield from expert.reach(name)
    R = expert.grasp_pose(name, grasp)[1]
    if not blocked:
        yield from expert.squeeze(R)
        goal = expert.grip + shift
        for _ in range(25):
            if np.linalg.norm((goal - expert.grip)[:2]) < 0.015:
                break
            yield expert.towards(goal + [0, 0, 0.004], R, 1)
    yield from expert.let_go(R)
