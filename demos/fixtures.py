"""LIBERO's fixtures: drawers and doors are opened and shut, knobs turned, and things brought out of
a drawer's way.

Each function is a part of the demonstrator's plan (`libero.py`): a generator of actions, which
follows the fixture's joint as it is now and gives up when the hand has lost it; the plan then tries
again.  arm: `libero.Arm`; part: what the goal names.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from demos.grasp import UP, all_but, corners, leaning, pose, solid, turned, yaw_of

# radians off the vertical at which a handle is pulled, one below another, and pushed: a leaning
# hand keeps clear of the handles above
PULL_LEAN, LOW_LEAN, PUSH_LEAN = 1.2, 1.4, 0.5
HALF_OPEN = 4  # steps of closing after which the hand passes between two handles
# metres of a drawer's joint: open to its end, open (LIBERO: beyond -0.14), open enough to put in
WIDE, OPEN, AJAR = -0.158, -0.150, -0.105
IN_FRONT = 0.09  # metres before the handle from which the hand comes
LEAD = 0.03  # metres from what is moved to the hand's target: slowly, or a handle slips out
LOST = 0.04  # metres between hand and handle
SIDE = 0.2  # metres from its hinge at which a door is pushed
SWUNG = -1.45  # radians of a door's joint: open (LIBERO: beyond -1.3)


class Part:
    """The part of a fixture that a goal names: its joint, its body's geoms, as they are now."""

    def __init__(self, sim, target):
        region, m = sim.env.object_sites_dict.get(target), sim.model
        self.sim, self.fixture = sim, region.parent_name if region else target
        self.joint = m.joint((region or sim.env.get_object(target)).joints[0])
        whole = solid(sim, self.fixture)
        own = m.geom_bodyid[whole] == self.joint.bodyid[0]
        self.geoms, self.others = whole[own], whole[~own]

    @property
    def q(self):
        """Position of the joint, metres or radians."""
        return self.sim.data.qpos[self.joint.qposadr[0]]

    @property
    def frame(self):
        """Where the joint is (3,), metres, and the rotation of the fixture (3, 3)."""
        return self.sim.data.xanchor[self.joint.id].copy(), pose(self.sim, self.fixture)[1]

    @property
    def outward(self):
        """Where a drawer opens to, (3,): its joint's negative side in all of LIBERO's cabinets."""
        return -self.sim.data.xaxis[self.joint.id]

    def handle(self):
        """Centre (3,) of a drawer's handle, metres."""
        boxed = corners(self.sim, self.geoms)  # (G, 8, 3)
        return boxed[(boxed @ self.outward).max(1).argmax()].mean(0)

    def ceiling(self):
        """Height, metres, of the underside of the lowest handle above this one, else infinite."""
        boxed = corners(self.sim, self.others)
        bar = self.handle() + self.q * self.outward  # where it is when the drawer is shut
        near = np.abs(boxed.mean(1) - bar) @ np.abs(self.outward) < 0.02
        above = near & (boxed[..., 2].mean(1) > bar[2] + 0.03)
        return boxed[above][..., 2].min(initial=np.inf)


def open_drawer(arm, part, far=OPEN):
    """Pulls a drawer by its handle until its joint is below `far`, metres (< 0), then lets go."""
    out, low = part.outward, bool(np.isfinite(part.ceiling()))
    R, bar = leaning(out, out, LOW_LEAN if low else PULL_LEAN), part.handle
    before = lambda: bar() + IN_FRONT * out
    yield from arm.travel(before, R, -1)
    yield from arm.follow(before, R, 1, HALF_OPEN * low)
    yield from arm.approach(bar, R, 0 if low else -1)
    yield from arm.squeeze(R)
    ahead = lambda: np.clip(part.q - far + 0.012, 0.012, LEAD) * out
    yield from arm.follow(lambda: bar() + ahead(), R, 1, 90,
                          lambda: part.q < far or arm.away(bar()) > LOST)
    yield from arm.leave(out, R)


def widen_drawer(arm, part):
    """Pushes a drawer that is nearly open to its end, the closed hand being inside of its front."""
    out, top = part.outward, corners(arm.sim, part.geoms)[..., 2].max()
    R = turned(yaw_of(np.cross(UP, out)))
    inside = lambda ahead: ((part.handle() + (ahead - 0.055) * out) * [1, 1, 0]
                            + (top - 0.012) * UP)
    yield from arm.travel(lambda: inside(0), R, 1)
    yield from arm.follow(lambda: inside(LEAD), R, 1, 30, lambda: part.q < WIDE + 0.002)
    yield from arm.withdraw(R, 1)


def close_drawer(arm, part):
    """Pushes a drawer shut by its handle with the closed hand."""
    still, out = 0, part.outward
    R = leaning(np.cross(UP, out), out, PUSH_LEAN)
    yield from arm.travel(lambda: part.handle() + IN_FRONT * out, R, 1)
    for _ in range(120):
        before = part.q
        yield arm.towards(part.handle() - LEAD * out, R, 1)
        still = still + 1 if part.q - before < 0.0002 else 0
        if part.q > 0.004 or still > 30:
            break
    yield from arm.leave(out, R, 1)


def open_door(arm, part):
    """Swings the microwave's door open by its upright bar."""
    anchor, base = part.frame
    front = base @ [np.sin(part.q), -np.cos(part.q), 0]
    bar = part.geoms[(corners(arm.sim, part.geoms).mean(1) @ front).argmax()]

    def point(lead=0.0):
        boxed = corners(arm.sim, [bar])[0]
        swing = Rotation.from_euler("z", lead).as_matrix()
        return np.array([*(anchor + swing @ (boxed.mean(0) - anchor))[:2],
                         boxed[:, 2].max() - 0.02])

    began, start = part.q, yaw_of(np.cross(UP, front))
    yield from arm.travel(point, turned(start), -1)
    yield from arm.squeeze(turned(start))
    yield from arm.follow(lambda: point(-LEAD / SIDE), lambda: turned(start + part.q - began), 1,
                          150, lambda: part.q < SWUNG or arm.away(point()) > LOST)
    yield from arm.let_go(arm.hand)


def close_door(arm, part):
    """Pushes the microwave's door shut with the closed hand, at its upper edge."""
    (anchor, base), R = part.frame, turned(0)
    top = corners(arm.sim, part.geoms)[..., 2].max()

    def before_door(ahead, gap):
        q = min(part.q + ahead, 0)
        along, front = np.array([np.cos(q), np.sin(q), 0]), np.array([np.sin(q), -np.cos(q), 0])
        return np.array([*(anchor + base @ (SIDE * along + gap * front))[:2], top - 0.02])

    yield from arm.travel(lambda: before_door(0, 0.1), R, 1)
    yield from arm.follow(lambda: before_door(0.35, 0), R, 1, 160, lambda: part.q > -0.002)
    yield from arm.leave(base @ [0, -1, 0], R, 1)


def turn_knob(arm, part, on):
    """Turns the stove's knob by its fin, pinched from above, to on or off."""
    anchor, base = part.frame  # a fixture that stands still
    fin = part.geoms[corners(arm.sim, part.geoms)[..., 2].max(1).argmax()]
    point = lambda: np.array([*anchor[:2], corners(arm.sim, [fin])[..., 2].max() - 0.018])
    start = yaw_of(base @ [-np.sin(part.q), np.cos(part.q), 0])
    yield from arm.travel(point, turned(start), -1)
    yield from arm.squeeze(turned(start))
    began, lead = part.q, 0.5 if on else -0.5
    yield from arm.follow(
        point, lambda: turned(start + part.q - began + lead), 1, 70,
        lambda: arm.away(point()) > LOST or (part.q > 1.0 if on else part.q < -0.0035))
    yield from arm.let_go(arm.hand)


def uncovered(sim, name, more=np.zeros((0, 8, 3)), spare=0.01):
    """The shortest horizontal way (3,), metres, on which an object comes out from under all else,
    and from boxes `more` (G, 8, 3); spare: metres left between it and what is above."""
    own = corners(sim, solid(sim, name)).reshape(-1, 3)
    boxed = np.concatenate([corners(sim, all_but(sim, name)), more])
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


def slide(arm, shift, R, near, steps):
    """A held thing along the table by `shift` (3,), to within `near`; metres."""
    goal = arm.grip + shift
    yield from arm.follow(lambda: goal + 0.004 * UP, R, 1, steps,
                          lambda: np.linalg.norm((goal - arm.grip)[:2]) < near)
