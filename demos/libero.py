"""Scripted demonstrators: given a simulator's privileged state, the next action.

    expert = demonstrator(sim, seed=0)        # after sim.reset
    while not expert.done:
        action = expert(sim)                  # (A,) float32 in [-1, 1]: motion, then gripper
        sim.step(action)

The gripper's number is -1 to open, +1 to close.  Meta-World brings its own policies.  In LIBERO the
task is read from the goal predicates, the scene from the collision boxes; there is no code per
task.  The plan is a generator: its body reads as the story of one demonstration (reach, squeeze,
lift, carry, let go), and each `yield` is one control step of 50 ms.  Every target follows the
object as it is now, so the plan survives noise on the executed action; an object that slipped or
was missed is simply picked up again.  What is done to drawers, doors and knobs is in `fixtures.py`,
where things are put in `placing.py`.
"""

import numpy as np
from scipy.spatial.transform import Rotation

from demos import fixtures, place
from demos.grasp import (PALM, SLIPPED, STRETCHED, choose_grasp, corners, handle_of, pose, solid,
                         top_beside, turned, yaw_of)


# ---- how to move
GAIN = 25.0  # action per metre: full speed (13 mm per step) beyond 4 cm, no overshoot
# action per radian.  Weak on purpose: the controller treats position and orientation as
# independent, which they are not for an outstretched arm; a firm wrist then holds the hand
# centimetres from its target
TURN = 1.0
STEEP = 3.0  # metres of height per metre of sideways error, when closing in on a target from above
# of full speed, with a thing that hangs from its handle: jerked, it swings, and falls over when put
# down (both moka pots on the stove: 21 of 24 scenes at full speed, 23 like this)
GENTLE = 0.4
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
ATTEMPTS = 4
SKILLS = ("on", "in", "open", "close", "turnon", "turnoff")


def in_order(goals):
    """The goals in an order that works: what a thing is put on comes to its own place first; full
    drawers are shut last."""
    moved = [goal[1] for goal in goals if goal[0] in ("on", "in")]
    filled = [goal[2] for goal in goals if goal[0] == "in"]

    def rank(goal):
        if goal[0] in ("on", "in"):
            # the table first: less is in the way
            return 3 if goal[2] in moved else 1 if "_table_" in goal[2] else 2
        return 4 if goal[0] == "close" and any(f.startswith(goal[1]) for f in filled) else 0
    return sorted(goals, key=rank)


def demonstrator(sim, seed=0):
    """Whoever can demonstrate the task of a freshly reset simulator."""
    return Script(sim) if hasattr(sim, "script") else Expert(sim, seed)


class Script:
    """Meta-World's own policy.

    done  a little after the first success, at which most tasks are on the edge of failure
    """

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
            if predicate not in SKILLS:
                raise ValueError(f"no script for the goal '{predicate}': "
                                 f"the expert can do {', '.join(SKILLS)}")
        self.sim, self.done, self.opened = sim, False, False
        # ours: in the first two suites, measured without it, the scenes have room for the hand
        self.careful = sim.suite not in ("libero_spatial", "libero_object")
        limited = sim.robot == "Panda" and (self.careful or sim.unseen)
        self.arm = STRETCHED if limited else np.inf
        self.hover = HOVER + np.random.default_rng(seed).uniform(-0.01, 0.01)
        self.pace = 1.0
        self.plan = self.demonstrate()

    def __call__(self, sim):
        """The action for the current state, (7,) float32 in [-1, 1]; in the end, to stand still."""
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

    def grasp_pose(self, name, grasp):
        """Where the hand must be to hold the object: grip point (3,), rotation (3, 3)."""
        p, R = pose(self.sim, name)
        return p + R @ grasp[0], turned(yaw_of(R @ grasp[1]))

    def highest_on_way(self, name, start, end, radius):
        """Height, metres, of the highest thing but the object near the straight way between two
        points (3,)."""
        others = [solid(self.sim, other) for other in self.sim.env.obj_body_id if other != name]
        return top_beside(self.sim, np.concatenate(others), start, end, radius)

    def towards(self, point, R, gripper):
        """Action to bring the grip straight to a point (3,), the hand to a rotation (3, 3)."""
        move = GAIN * (point - self.grip)
        turn = TURN * Rotation.from_matrix(R @ self.hand.T).as_rotvec()
        move = self.pace * move / max(self.pace, np.abs(move).max())
        return np.concatenate([move, np.clip(turn, -0.5, 0.5), [gripper]])

    # ---- the plan; each method yields actions

    def demonstrate(self):
        """The whole plan: every goal in turn, again if it does not hold."""
        for goal in 2 * in_order(self.sim.goal):  # twice: a later one may undo an earlier one
            for _ in range(ATTEMPTS):
                if not self.holds(goal):
                    yield from self.achieve(goal)
                    yield from self.settle(goal)

    def achieve(self, goal):
        """One attempt at a goal."""
        predicate, target = goal[0], goal[-1]
        if predicate == "open" and target in self.sim.env.object_sites_dict:
            self.opened = True
            yield from fixtures.open_drawer(self, target, fixtures.OPEN)
        elif predicate == "open":
            yield from fixtures.open_door(self, target)
        elif predicate == "close" and target in self.sim.env.object_sites_dict:
            yield from fixtures.close_drawer(self, target)
        elif predicate == "close":
            yield from fixtures.close_door(self, target)
        elif predicate in ("turnon", "turnoff"):
            yield from fixtures.turn_knob(self, target, predicate == "turnon")
        else:
            if place.is_drawer(self.sim, target) and fixtures.Part(self.sim, target).q > fixtures.AJAR:
                yield from fixtures.clear(self, goal[1], target)
                self.opened = True
                for _ in range(3):
                    if fixtures.Part(self.sim, target).q > fixtures.AJAR:
                        yield from fixtures.open_drawer(self, target, fixtures.AJAR - 0.02)
            part = fixtures.Part(self.sim, target) if place.is_drawer(self.sim, target) else None
            if part and fixtures.WIDE + 0.005 < part.q <= fixtures.AJAR and part.ceiling() < np.inf:
                yield from fixtures.widen_drawer(self, target)
            within = (predicate == "in" and place.is_cave(self.sim, target)
                      and handle_of(self.sim, goal[1]) is not None)
            yield from (place.insert(self, goal) if within else self.pick_and_place(goal))

    def settle(self, goal):
        """Waits as long as what was put somewhere still moves: a bottle that bounces on its rack
        does not touch it at every step."""
        for _ in range(SETTLE if goal[0] in ("on", "in") else 0):
            speed = np.abs(self.sim.data.cvel[self.sim.env.obj_body_id[goal[1]]]).max()
            if self.holds(goal) or speed < 0.02:
                break
            yield self.towards(self.grip, self.hand, -1)

    def travel(self, point, R, gripper):
        """Over everything on the way to above `point()` (3,), and down to it, along a funnel."""
        start = self.grip
        highest = self.highest_on_way(None, start, point(), 0.12)
        level = max(highest + CLEAR[0], start[2], point()[2] + 0.03)
        while self.grip[2] < level - 0.02 and np.linalg.norm((point() - self.grip)[:2]) > 0.05:
            before = self.grip[2]
            yield self.towards(np.array([*start[:2], level + 0.02]), self.hand, gripper)
            if self.grip[2] < before + 0.001:
                break
        for step in range(120):
            slack = 1 + max(0, step - PATIENCE) / 20
            goal = point()
            aside = np.linalg.norm((goal - self.grip)[:2])
            twist = Rotation.from_matrix(R @ self.hand.T).magnitude()
            if np.linalg.norm(goal - self.grip) < ARRIVED * slack and twist < 0.15 * slack:
                break
            aside += 0.05 * max(twist - 0.1, 0)
            above = np.clip(STEEP * (aside - NEAR * slack), 0, max(level - goal[2], 0))
            yield self.towards(goal + [0, 0, above], R, gripper)

    def approach(self, point, R, gripper):
        """Straight to `point()` (3,)."""
        nearest, since = np.inf, 0
        for step in range(60):
            error = np.linalg.norm(point() - self.grip)
            nearest, since = (error, step) if error < nearest - 0.002 else (nearest, since)
            if error < ARRIVED or step > since + STUCK:
                break
            yield self.towards(point(), R, gripper)

    def leave(self, out, R, gripper=-1):
        """Opens the hand, unless it is to stay closed, and goes back along `out` (3,), then up."""
        point = self.grip
        for _ in range(12 if gripper < 0 else 0):
            if self.aperture > 0.06:
                break
            yield self.towards(point, R, gripper)
        for way in (out, np.array([0, 0, 1.0])):
            point = self.grip
            for _ in range(15):
                if (self.grip - point) @ way > RETREAT:
                    break
                yield self.towards(point + 2 * RETREAT * way, R, gripper)

    def pick_and_place(self, goal):
        """One attempt at ['on', object, object] or ['in', object, region]; it ends early if the
        object is missed or lost."""
        _, name, target = goal
        grasp, blocked = yield from self.reach(name)
        R = self.grasp_pose(name, grasp)[1]
        if blocked:
            yield from self.rise(R)
            return
        yield from self.squeeze(R)
        hangs = self.careful and handle_of(self.sim, name) is not None
        self.pace = GENTLE if hangs else 1.0

        def lost():
            return np.linalg.norm(self.grasp_pose(name, grasp)[0] - self.grip) > SLIPPED

        here, there = pose(self.sim, name)[0], place.destination(self.sim, target, name)[0]
        level = self.highest_on_way(name, here, there, 0.08) + CLEAR[1]
        if self.careful:  # the palm too, which may be far to one side of the object
            beside = self.highest_on_way(name, self.grip, self.grip + there - here, 0.12)
            level = max(level, beside + 0.01 - PALM - (self.grip[2] - self.lowest(name)))
        yield from self.lift(name, level, R, lost)
        R = R if hangs else place.aligned(self, name, target, R)
        R = place.laid_down(self.sim, target, R)
        yield from self.carry(goal, level, R, lost)
        self.pace = 1.0
        yield from self.let_go(R)

    def reach(self, name):
        """Over the object and down to it, along a funnel.

        Returns the grasp and whether something was in the way.
        """
        planned, axis, nearest, since = np.zeros((3, 3)), None, np.inf, 0
        for step in range(100):
            slack = 1 + max(0, step - PATIENCE) / 20
            p, R = pose(self.sim, name)
            # planned again if the object moved of itself, as one still falling into place does
            moved = np.abs(R - planned).max() > 0.03 and np.linalg.norm(self.grip - p) > 0.1
            if axis is None or moved:
                planned, grasp = R, choose_grasp(self.sim, name, axis, self.arm)
                axis = R @ grasp[1]
                point, _ = self.grasp_pose(name, grasp)
                highest = self.highest_on_way(name, self.grip, point, 0.1)
                level = max(highest + CLEAR[0], point[2] + self.hover)
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
        """Closes the hand where it is: following the object, which the fingers now move, would
        chase it."""
        point = self.grip
        for _ in range(SQUEEZE):
            yield self.towards(point, R, 1)

    def lift(self, name, level, R, lost):
        """Straight up until the object's underside is nearly at `level` (metres)."""
        if self.opened:
            yield from fixtures.slide_out(self, name, R)
        start = self.grip
        for _ in range(60):
            rise = level - self.lowest(name)
            if rise < 0.01 or lost():
                break
            yield self.towards(np.array([*start[:2], self.grip[2] + rise + 0.02]), R, 1)

    def carry(self, goal, level, R, lost):
        """Across and down: the object's centre over the destination's, then until it rests on it
        or hangs in it."""
        _, name, target = goal
        shared = sum(g[-1] == target for g in self.sim.goal) > 1 and goal[0] == "on"
        still, before = 0, np.inf
        for _ in range(150):
            where, container = place.destination(self.sim, target, name)
            walls = place.walls(self.sim, target, container)
            shift = (where - pose(self.sim, name)[0])[:2]
            aside, bottom = np.linalg.norm(shift), self.lowest(name)
            if container not in self.sim.env.obj_body_id or container.startswith("wine_rack"):
                end = where[2] - 0.01
                arrived = False
            elif target != container:  # into a region: the palm stays above the container's walls
                end = max(walls.max() - 0.01 - (self.grip[2] - bottom), walls.min() + 0.02)
                arrived = aside < 0.02 and bottom < end + 0.015
            else:  # onto an object: aim below its surface and stop at contact
                end = walls.min()
                arrived = self.holds(goal)
            stands = aside < 0.02 and abs(before - bottom) < 0.0005
            still, before = still + 1 if stands else 0, bottom
            if arrived or lost() or still > 6:
                break
            if self.careful and place.is_region(self.sim, target):  # turned first
                aside += max(Rotation.from_matrix(R @ self.hand.T).magnitude() - 0.06, 0)
            near = NEAR / 2 if self.careful else NEAR
            steep = 2 * STEEP if shared else STEEP  # past what already stands there
            fall = min(end + steep * max(aside - near, 0), level) - bottom
            yield self.towards(self.grip + [*shift, fall], R, 1)

    def let_go(self, R):
        """Opens the hand until it holds nothing, then straight up."""
        point, held = self.grip, self.aperture
        for _ in range(12):
            yield self.towards(point, R, -1)
            if self.aperture > held + LET_GO * (3 if self.careful else 1):
                break
        yield from self.rise(R)

    def rise(self, R, gripper=-1):
        """Straight up."""
        point = self.grip
        for _ in range(20):
            if self.grip[2] > point[2] + RETREAT:
                break
            yield self.towards(point + [0, 0, 2 * RETREAT], R, gripper)
