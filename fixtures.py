"""What is done to LIBERO's fixtures: drawers and doors opened and shut, knobs turned.

Each function is a part of the expert's plan (`experts.py`): a generator of actions, which looks at the fixture's joint
as it is now and gives up when the hand has lost it; the expert then tries again.
"""
import numpy as np
from scipy.spatial.transform import Rotation

from grasps import corners, leaning, turned, yaw_of

UP = np.array([0.0, 0, 1])
PULL_LEAN = (1.2, 1.4)  # radians off the vertical at which a handle is pulled: one with nothing above it, another
PUSH_LEAN = 0.5  # radians: a leaning hand keeps clear of the handles above the one it pushes
HALF_OPEN = 4  # steps of closing after which the hand passes between two handles
WIDE = -0.158  # metres of the joint of a drawer that is open to its end
IN_FRONT = 0.09  # metres before the handle from which the hand comes
LEAD = 0.03  # metres that the hand's target is ahead of the drawer it pulls or pushes: slowly, or a handle slips out
SIDE = 0.2  # metres from its hinge at which a door is pushed


class Part:
    """The part of a fixture that a goal speaks of: its joint, its body's geoms, all as they are now."""

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
        """Centre (3,) of a drawer's handle, and half its depth along the way the drawer moves, metres."""
        boxed = corners(self.sim, self.geoms)  # (G, 8, 3)
        along = boxed @ self.outward
        bar = along.max(1).argmax()
        return boxed[bar].mean(0), np.ptp(along[bar]) / 2

    def ceiling(self):
        """Height, metres, of the underside of the lowest handle above this one; infinite if there is none."""
        boxed = corners(self.sim, self.others)
        bar = self.handle()[0] + self.q * self.outward  # where it is when the drawer is shut
        near = np.abs(boxed.mean(1) - bar) @ np.abs(self.outward) < 0.02
        above = near & (boxed[..., 2].mean(1) > bar[2] + 0.03)
        return boxed[above][..., 2].min(initial=np.inf)


def open_drawer(expert, target, far):
    """Pulls a drawer by its handle until its joint is below `far`, metres (negative), then lets go."""
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
    """Pushes a drawer that is nearly open to its end, with the closed hand from inside of its front."""
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


def close_door(expert, target):
    """Pushes the microwave's door shut with the closed hand, at its upper edge, around its hinge."""
    part = Part(expert.sim, target)
    top = corners(expert.sim, part.geoms)[..., 2].max()
    R = turned(0)

    def before_door(ahead, gap):
        q = min(part.q + ahead, 0)
        along, front = np.array([np.cos(q), np.sin(q), 0]), np.array([np.sin(q), -np.cos(q), 0])
        _, base = expert.frame_of(part.fixture)
        point = part.anchor + base @ (SIDE * along + gap * front)
        return np.array([*point[:2], top - 0.02])

    yield from expert.travel(lambda: before_door(0, 0.1), R, 1)
    for _ in range(160):
        yield expert.towards(before_door(0.35, 0.0), R, 1)
        if part.q > -0.002:
            break
    yield from expert.leave(expert.frame_of(part.fixture)[1] @ [0, -1, 0], R, 1)


def turn_knob(expert, target, on):
    """Turns the stove's knob by its fin, to on or off."""
    part = Part(expert.sim, target)
    fin = corners(expert.sim, part.geoms)
    fin = part.geoms[fin[..., 2].max(1).argmax()]

    def place():
        centre = expert.sim.data.geom_xpos[fin]
        top = corners(expert.sim, [fin])[..., 2].max()
        return np.array([*part.anchor[:2], top - 0.018])

    def across(ahead=0.0):
        _, base = expert.frame_of(part.fixture)
        q = part.q + ahead
        axis = base @ [-np.sin(q), np.cos(q), 0]
        return axis

    start = yaw_of(across())
    yield from expert.travel(place, turned(start), -1)
    yield from expert.squeeze(turned(start))
    began = part.q
    for _ in range(70):
        if np.linalg.norm(place() - expert.grip) > 0.04 or (part.q > 1.0 if on else part.q < -0.0035):
            break
        lead = 0.5 if on else -0.5
        yield expert.towards(place(), turned(start + part.q - began + lead), 1)
    yield from expert.let_go(expert.hand)
