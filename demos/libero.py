"""Scripted demonstrators: given a simulator's privileged state, the next action.

    for action in demonstrator(sim, seed=0):  # after sim.reset
        sim.step(action)                      # motion, then gripper: -1 to open, +1 to close

Meta-World brings its own policies.  In LIBERO the task is read from the goal predicates, the scene
from the collision boxes; there is no code per task.  The plan is a generator of actions: it reads
as the story of one demonstration (reach, squeeze, lift, carry, let go), and each `yield` is one
control step of 50 ms.  Every target follows the object as it is now, so the plan survives noise on
the executed action; an object that slipped or was missed is simply picked up again.  What is done
to drawers, doors and knobs is in `fixtures.py`, how an object is held in `grasp.py`, where it is
put in `place.py`.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from demos import fixtures, place
from demos.grasp import (PALM, SLIPPED, STRETCHED, UP, choose_grasp, corners, handle_of, pose,
                         solid, top_beside, turned, yaw_of)

# tasks of LIBERO-90 that are solved in fewer than half of their scenes (in none)
UNSOLVED = {
    "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet",
    "KITCHEN_SCENE5_put_the_ketchup_in_the_top_drawer_of_the_cabinet",
    "KITCHEN_SCENE9_put_the_frying_pan_on_the_cabinet_shelf",
    "KITCHEN_SCENE9_put_the_frying_pan_under_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_in_the_middle_and_place_it_on_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_on_the_cabinet_shelf",
    "STUDY_SCENE4_pick_up_the_book_on_the_right_and_place_it_under_the_cabinet_shelf"}
GAIN = 25.0  # action per metre: full speed (13 mm per step) beyond 4 cm, no overshoot
# action per radian; weak, as the controller treats position and orientation as independent: for an
# outstretched arm they are not, and a firm wrist holds the hand centimetres from its target
TURN = 1.0
STEEP = 3.0  # metres of height per metre of sideways error, when closing in on a target from above
GENTLE = 0.4  # of full speed: jerked, a thing that hangs from its handle swings, and falls over
NEAR = 0.010  # metres of sideways error from which the hand comes straight down
ARRIVED = 0.008  # metres
PATIENCE = 30  # steps; then both tolerances grow: an outstretched arm creeps at the end
HOVER = 0.060  # metres above the grasp at which the hand arrives
# metres above everything on the way: of the empty hand, of the carried object's underside
CLEAR = (0.050, 0.030)
STUCK = 12  # steps without coming 2 mm closer: the hand stands on something
SQUEEZE = 9  # steps; the gripper's command needs 8 from fully open to fully closed
LET_GO = 0.008  # metres the fingers must open before the hand rises, or a wide object comes along
RETREAT = 0.070  # metres
SETTLE = 20  # steps at most, until what was let go is at rest
ATTEMPTS = 4  # at each goal


def demonstrator(sim, seed=0):
    """Demonstrates the task of a freshly reset simulator: a generator of actions (A,) float32 in
    [-1, 1], each for the state at which it is asked for.  It ends when all is released and the hand
    withdrawn; Meta-World's own policy, a little after its first success.
    seed: varies the height of approach by +-1 cm; all else follows from the scene."""
    if hasattr(sim, "demonstration"):
        yield from sim.demonstration()
    else:
        for action in demonstrate(Arm(sim, seed)):
            yield action.astype(np.float32)
        yield np.float32([0, 0, 0, 0, 0, 0, -1])  # stands still


class Arm:
    """The arm in its scene, as it is now, and its motions: generators of actions (7,).  point: a
    function that gives a target (3,) as it is now, metres; R (3, 3) the rotation of the hand;
    gripper -1 open, +1 closed."""

    def __init__(self, sim, seed):
        # the scenes of the first two suites have room for the hand
        self.sim, self.careful = sim, sim.suite not in ("libero_spatial", "libero_object")
        limited = sim.robot == "Panda" and (self.careful or sim.unseen)
        self.reach_limit = STRETCHED if limited else np.inf
        self.hover = HOVER + np.random.default_rng(seed).uniform(-0.01, 0.01)
        self.pace, self.opened = 1.0, False  # opened: there is a drawer that may cover things

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

    def away(self, point):
        """Metres from the grip to a point (3,)."""
        return np.linalg.norm(point - self.grip)

    def turn_to(self, R):
        """The turn that is left to a rotation of the hand."""
        return Rotation.from_matrix(R @ self.hand.T)

    def holds(self, goal):
        """Whether one goal predicate is true."""
        return bool(self.sim.env._eval_predicate(goal))

    def lowest(self, name):
        """Height of the object's underside, metres."""
        return corners(self.sim, solid(self.sim, name))[..., 2].min()

    def grasp_pose(self, name, grasp):
        """Where the hand must be to hold the object: grip point (3,), rotation (3, 3)."""
        p, R = pose(self.sim, name)
        return p + R @ grasp[0], turned(yaw_of(R @ grasp[1]))

    def towards(self, point, R, gripper):
        """Action (7,) to bring the grip straight to a point (3,), the hand to a rotation."""
        move = GAIN * (point - self.grip)
        move = self.pace * move / max(self.pace, np.abs(move).max())
        turn = np.clip(TURN * self.turn_to(R).as_rotvec(), -0.5, 0.5)
        return np.concatenate([move, turn, [gripper]])

    def funnel(self, point, R, gripper, level, step):
        """Action (7,) to below `level`, metres, and above a point (3,), and down to it the nearer
        the hand is sideways; None when it is there.  step  of the motion: patience is limited."""
        slack = 1 + max(0, step - PATIENCE) / 20
        aside, twist = np.linalg.norm((point - self.grip)[:2]), self.turn_to(R).magnitude()
        if self.away(point) < ARRIVED * slack and twist < 0.15 * slack:  # 9 degrees
            return None
        aside += 0.05 * max(twist - 0.1, 0)  # the fingertips swing by some 5 cm per rad
        above = np.clip(STEEP * (aside - NEAR * slack), 0, max(level - point[2], 0))
        return self.towards(point + above * UP, R, gripper)

    def follow(self, point, R, gripper, steps, done=lambda: False):
        """Straight to the point, at most so many steps, until done().  R may be a function, too."""
        for _ in range(steps):
            if done():
                break
            yield self.towards(point(), R() if callable(R) else R, gripper)

    def travel(self, point, R, gripper):
        """Over everything on the way to above the point, and down to it, along a funnel."""
        start = self.grip
        highest = top_beside(self.sim, None, start, point(), 0.12)
        level = max(highest + CLEAR[0], start[2], point()[2] + 0.03)
        while self.grip[2] < level - 0.02 and np.linalg.norm((point() - self.grip)[:2]) > 0.05:
            before = self.grip[2]
            yield self.towards(np.array([*start[:2], level + 0.02]), self.hand, gripper)
            if self.grip[2] < before + 0.001:
                break
        for step in range(120):
            if (action := self.funnel(point(), R, gripper, level, step)) is None:
                break
            yield action

    def approach(self, point, R, gripper):
        """Straight to the point."""
        nearest, since = np.inf, 0
        for step in range(60):
            error = self.away(point())
            nearest, since = (error, step) if error < nearest - 0.002 else (nearest, since)
            if error < ARRIVED or step > since + STUCK:
                break
            yield self.towards(point(), R, gripper)

    def squeeze(self, R):
        """Closes the hand where it is: following the object, which the fingers now move, would
        chase it."""
        point = self.grip
        yield from self.follow(lambda: point, R, 1, SQUEEZE)

    def let_go(self, R):
        """Opens the hand until it holds nothing, then straight up."""
        point, free = self.grip, self.aperture + LET_GO * (3 if self.careful else 1)
        yield from self.follow(lambda: point, R, -1, 12, lambda: self.aperture > free)
        yield from self.withdraw(R)

    def leave(self, out, R, gripper=-1):
        """Opens the hand, unless it is to stay closed, and goes back along `out` (3,), then up."""
        point = self.grip
        if gripper < 0:
            yield from self.follow(lambda: point, R, gripper, 12, lambda: self.aperture > 0.06)
        yield from self.withdraw(R, gripper, out, steps=15)
        yield from self.withdraw(R, gripper, steps=15)

    def withdraw(self, R, gripper=-1, way=UP, steps=20):
        """Straight along `way` (3,)."""
        start = self.grip
        yield from self.follow(lambda: start + 2 * RETREAT * way, R, gripper, steps,
                               lambda: (self.grip - start) @ way > RETREAT)


def demonstrate(arm):
    """The whole plan: every goal in turn, again if it does not hold."""
    for goal in 2 * in_order(arm.sim.goal):  # twice: a later one may undo an earlier one
        for _ in range(ATTEMPTS):
            if not arm.holds(goal):
                yield from achieve(arm, goal)
                yield from settle(arm, goal)


def in_order(goals):
    """The goals in an order that works: what a thing is put on comes to its own place first; full
    drawers are shut last."""
    moved = [goal[1] for goal in goals if goal[0] in ("on", "in")]
    filled = [goal[2] for goal in goals if goal[0] == "in"]

    def rank(goal):
        if goal[0] in ("on", "in"):  # onto the table first: less is in the way
            return 3 if goal[2] in moved else 1 if "_table_" in goal[2] else 2
        return 4 if goal[0] == "close" and any(f.startswith(goal[1]) for f in filled) else 0
    return sorted(goals, key=rank)


def achieve(arm, goal):
    """One attempt at a goal, a generator of actions."""
    predicate, target = goal[0], goal[-1]
    if predicate in ("on", "in"):
        return put(arm, goal)
    part, drawer = fixtures.Part(arm.sim, target), target in arm.sim.env.object_sites_dict
    arm.opened |= predicate == "open" and drawer
    if predicate == "open":
        return (fixtures.open_drawer if drawer else fixtures.open_door)(arm, part)
    if predicate == "close":
        return (fixtures.close_drawer if drawer else fixtures.close_door)(arm, part)
    return fixtures.turn_knob(arm, part, predicate == "turnon")


def settle(arm, goal):
    """Waits as long as what was put somewhere still moves: a bottle that bounces on its rack does
    not touch it at every step."""
    for _ in range(SETTLE if goal[0] in ("on", "in") else 0):
        speed = np.abs(arm.sim.data.cvel[arm.sim.env.obj_body_id[goal[1]]]).max()
        if arm.holds(goal) or speed < 0.02:
            break
        yield arm.towards(arm.grip, arm.hand, -1)


def put(arm, goal):
    """One attempt at ['on', object, object] or ['in', object, region]; a drawer is opened first."""
    predicate, name, target = goal
    kind = place.kind_of(arm.sim, target)
    if kind == "drawer":
        part = fixtures.Part(arm.sim, target)
        if part.q > fixtures.AJAR:
            yield from clear(arm, name, part)
            arm.opened = True
        for _ in range(3):
            if part.q > fixtures.AJAR:
                yield from fixtures.open_drawer(arm, part, fixtures.AJAR - 0.02)
        if fixtures.WIDE + 0.005 < part.q <= fixtures.AJAR and part.ceiling() < np.inf:
            yield from fixtures.widen_drawer(arm, part)
    if predicate == "in" and kind == "cave" and handle_of(arm.sim, name) is not None:
        yield from place.insert(arm, goal)
    else:
        yield from pick_and_place(arm, goal)


def clear(arm, name, part):
    """Moves an object, along the table, from where a drawer will be over it when it is open."""
    ahead = part.q - fixtures.AJAR + 0.04
    drawer = corners(arm.sim, part.geoms) + ahead * part.outward  # (G, 8, 3)
    if not np.any(fixtures.uncovered(arm.sim, name, drawer, 0.0)):
        return
    shift = fixtures.uncovered(arm.sim, name, drawer, 0.04)
    grasp, blocked = yield from reach(arm, name)
    R = arm.grasp_pose(name, grasp)[1]
    if not blocked:
        yield from arm.squeeze(R)
        yield from fixtures.slide(arm, shift, R, 0.015, 25)
    yield from arm.let_go(R)


def pick_and_place(arm, goal):
    """From above; it ends early if the object is missed or lost."""
    _, name, target = goal
    grasp, blocked = yield from reach(arm, name)
    R = arm.grasp_pose(name, grasp)[1]
    if blocked:
        yield from arm.withdraw(R)
        return
    yield from arm.squeeze(R)
    hangs = arm.careful and handle_of(arm.sim, name) is not None
    arm.pace = GENTLE if hangs else 1.0
    lost = lambda: arm.away(arm.grasp_pose(name, grasp)[0]) > SLIPPED
    here, there = pose(arm.sim, name)[0], place.destination(arm.sim, target, name)[0]
    level = top_beside(arm.sim, name, here, there, 0.08) + CLEAR[1]
    if arm.careful:  # the palm too, which may be far to one side of the object
        beside = top_beside(arm.sim, name, arm.grip, arm.grip + there - here, 0.12)
        level = max(level, beside + 0.01 - PALM - (arm.grip[2] - arm.lowest(name)))
    yield from lift(arm, name, level, R, lost)
    R = place.laid_down(arm.sim, target, R if hangs else place.aligned(arm, name, target, R))
    yield from carry(arm, goal, level, R, lost)
    arm.pace = 1.0
    yield from arm.let_go(R)


def reach(arm, name):
    """Over the object and down to it, along a funnel -> its grasp, whether something barred it."""
    planned, axis, nearest, since = np.zeros((3, 3)), None, np.inf, 0
    for step in range(100):
        p, R = pose(arm.sim, name)
        # planned again if the object moved of itself, as one still falling into place does
        if axis is None or np.abs(R - planned).max() > 0.03 and arm.away(p) > 0.1:
            planned, grasp = R, choose_grasp(arm.sim, name, axis, arm.reach_limit)
            axis = R @ grasp[1]
            point, _ = arm.grasp_pose(name, grasp)
            level = max(top_beside(arm.sim, name, arm.grip, point, 0.1) + CLEAR[0],
                        point[2] + arm.hover)
        point, R = arm.grasp_pose(name, grasp)
        action, error = arm.funnel(point, R, -1, level, step), arm.away(point)
        if action is None:
            return grasp, False
        nearest, since = (error, step) if error < nearest - 0.002 else (nearest, since)
        if step > max(since, PATIENCE) + STUCK:
            break
        yield action
    return grasp, True


def lift(arm, name, level, R, lost):
    """Straight up until the object's underside is nearly at `level` (metres)."""
    if arm.opened:  # out from under what is above it, such as a drawer
        shift = fixtures.uncovered(arm.sim, name)
        yield from fixtures.slide(arm, shift, R, 0.008, 40 if np.any(shift) else 0)
    start, rise = arm.grip, lambda: level - arm.lowest(name)
    yield from arm.follow(lambda: np.array([*start[:2], arm.grip[2] + rise() + 0.02]), R, 1, 60,
                          lambda: rise() < 0.01 or lost())


def carry(arm, goal, level, R, lost):
    """Across and down, the object's centre over the destination's, until it rests or hangs."""
    sim, (predicate, name, target) = arm.sim, goal
    shared = sum(g[-1] == target for g in sim.goal) > 1 and predicate == "on"
    steep = 2 * STEEP if shared else STEEP  # past what already stands there
    near = NEAR / 2 if arm.careful else NEAR
    kind, still, before = place.kind_of(sim, target), 0, np.inf
    for _ in range(150):
        where, container = place.destination(sim, target, name)
        walls = place.walls(sim, target, container)
        shift = (where - pose(sim, name)[0])[:2]
        aside, bottom = np.linalg.norm(shift), arm.lowest(name)
        if container not in sim.env.obj_body_id or container.startswith("wine_rack"):
            end, arrived = where[2] - 0.01, False
        elif target != container:  # into a region: the palm stays above the container's walls
            end = max(walls.max() - 0.01 - (arm.grip[2] - bottom), walls.min() + 0.02)
            arrived = aside < 0.02 and bottom < end + 0.015
        else:  # onto an object: aim below its surface and stop at contact
            end, arrived = walls.min(), arm.holds(goal)
        stands = aside < 0.02 and abs(before - bottom) < 0.0005
        still, before = still + 1 if stands else 0, bottom
        if arrived or lost() or still > 6:
            break
        if arm.careful and kind in ("cave", "part"):  # turned first
            aside += max(arm.turn_to(R).magnitude() - 0.06, 0)
        fall = min(end + steep * max(aside - near, 0), level) - bottom
        yield arm.towards(arm.grip + [*shift, fall], R, 1)
