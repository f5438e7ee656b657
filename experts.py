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

import fixtures
from grasps import PALM, choose_grasp, handle_of, leaning, corners, pose, solid, top_beside, turned, yaw_of

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
LEAN = 1.0  # radians by which the hand leans back to reach into a microwave or shelf
INSIDE = 0.03  # metres before a region's centre at which a thing is put down inside
OPEN, AJAR = -0.150, -0.105  # metres of the joint: what is open (LIBERO: beyond -0.14), what is open enough to put in
SLOPE = 0.9  # radians by which a bottle is laid down on the wine rack
SKILLS = ("on", "in", "open", "close", "turnon", "turnoff")


def in_order(goals):
    """The goals in an order that works: what a thing is put on comes to its own place first; full drawers shut last."""
    moved = [goal[1] for goal in goals if goal[0] in ("on", "in")]
    filled = [goal[2] for goal in goals if goal[0] == "in"]

    def rank(goal):
        if goal[0] in ("on", "in"):
            return 3 if goal[2] in moved else 1 if "_table_" in goal[2] else 2  # the table first: less is in the way
        return 4 if goal[0] == "close" and any(f.startswith(goal[1]) for f in filled) else 0
    return sorted(goals, key=rank)



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
            if predicate not in SKILLS:
                raise ValueError(f"no script for the goal '{predicate}': the expert can do {', '.join(SKILLS)}")
        self.sim, self.done, self.opened = sim, False, False
        # ours: in the first two suites, measured without it, the scenes have room for the hand
        self.careful = sim.suite not in ("libero_spatial", "libero_object")
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

    def destination(self, target, name=None):
        """Position (3,) of the region or object to go to, and the name of the object it is part of."""
        region = self.sim.env.object_sites_dict.get(target)
        if region is None:
            return pose(self.sim, target)[0], target
        where = self.sim.data.site(target).xpos.copy()
        if target.startswith("wine_rack"):
            where[0] += 0.045  # beside the rod in its middle
        sharing = [g[1] for g in self.sim.goal if g[-1] == target and g[0] == "on"]
        if name in sharing and len(sharing) > 1:  # side by side
            where[0] += 0.09 * (sharing.index(name) / (len(sharing) - 1) - 0.5)
        if region.joints:  # the middle of what is open of the drawer
            part = fixtures.Part(self.sim, target)
            boxed, out = corners(self.sim, part.others), part.outward
            boxed = boxed[boxed[..., 2].max(1) > corners(self.sim, part.geoms)[..., 2].max()]
            front, back = where @ out + 0.076, (boxed @ out).max(initial=where @ out - 0.076)
            where += out * np.clip((front + back) / 2 - where @ out, 0, 0.06)
            if name and corners(self.sim, solid(self.sim, name))[..., 2].max() < part.ceiling() - 0.002 < np.inf:
                where -= 0.025 * out  # once it is below the other handles
        return where, region.parent_name

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
        for goal in 2 * in_order(self.sim.goal):  # twice: a later one may have undone an earlier one
            for _ in range(ATTEMPTS):
                if not self.holds(goal):
                    yield from self.achieve(goal)

    def achieve(self, goal):
        """One attempt at a goal."""
        predicate, target = goal[0], goal[-1]
        if predicate == "open":
            self.opened = True
            yield from fixtures.open_drawer(self, target, OPEN)
        elif predicate == "close" and target in self.sim.env.object_sites_dict:
            yield from fixtures.close_drawer(self, target)
        elif predicate == "close":
            yield from fixtures.close_door(self, target)
        elif predicate in ("turnon", "turnoff"):
            yield from fixtures.turn_knob(self, target, predicate == "turnon")
        else:
            if self.is_drawer(target) and fixtures.Part(self.sim, target).q > AJAR:
                yield from self.clear(goal[1], target)
                self.opened = True
                for _ in range(3):
                    if fixtures.Part(self.sim, target).q > AJAR:
                        yield from fixtures.open_drawer(self, target, AJAR - 0.02)
            part = fixtures.Part(self.sim, target) if self.is_drawer(target) else None
            if part and fixtures.WIDE + 0.005 < part.q <= AJAR and part.ceiling() < np.inf:
                yield from fixtures.widen_drawer(self, target)
            within = predicate == "in" and self.is_cave(target) and handle_of(self.sim, goal[1]) is not None
            yield from (self.insert(goal) if within else self.pick_and_place(goal))

    def is_cave(self, target):
        """Whether a region is reached from the front only."""
        region = self.sim.env.object_sites_dict.get(target)
        return region is not None and region.parent_name.startswith(("microwave", "wooden_two_layer_shelf"))

    def insert(self, goal):
        """One attempt at putting a thing with a handle into a microwave or shelf: held by the handle, from the front."""
        _, name, target = goal
        where, container = self.destination(target)
        out = pose(self.sim, container)[1] @ [0, -1, 0]
        local = handle_of(self.sim, name)

        def handle():
            p, R = pose(self.sim, name)
            return p + R @ local
        away = handle() - pose(self.sim, name)[0]
        away = np.append(away[:2], 0) / np.linalg.norm(away[:2])
        R = leaning(np.cross([0, 0, 1], away), away, LEAN)
        yield from self.travel(lambda: handle() + 0.05 * away + [0, 0, 0.03], R, -1)
        yield from self.approach(handle, R, -1)
        yield from self.squeeze(R)
        R = leaning(np.cross([0, 0, 1], out), out, LEAN)
        level = self.floor_of(target, where) + 0.025
        for stage, far in enumerate((0.16, 0.16, INSIDE)):
            for step in range(70):
                if np.linalg.norm(handle() - self.grip) > SLIPPED:
                    return
                shift = where + far * out - pose(self.sim, name)[0]
                shift[2] = level - self.lowest(name)
                if stage == 0:
                    shift[:2] *= np.linalg.norm(shift[:2]) > 0.3
                    shift[:2] = 0
                twist = Rotation.from_matrix(R @ self.hand.T).magnitude()
                if np.linalg.norm(shift) < 0.015 and (stage == 0 or twist < 0.2 or step > 50):
                    break
                yield self.towards(self.grip + shift, R if stage else self.hand, 1)
        for _ in range(25):
            before = self.lowest(name)
            yield self.towards(self.grip + [0, 0, -0.02], R, 1)
            if before - self.lowest(name) < 0.0005:
                break
        yield from self.leave(out, R)

    def floor_of(self, target, where):
        """Height, metres, of what is below a region's centre (3,)."""
        boxed = corners(self.sim, solid(self.sim, self.sim.env.object_sites_dict[target].parent_name))
        low, high = boxed.min(1), boxed.max(1)
        under = ((low[:, :2] < where[:2]) & (high[:, :2] > where[:2])).all(1) & (high[:, 2] < where[2])
        return high[under, 2].max(initial=0.9)

    def is_drawer(self, target):
        """Whether a destination is inside of a drawer."""
        region = self.sim.env.object_sites_dict.get(target)
        return bool(region is not None and region.joints)

    def is_region(self, target):
        """Whether a destination is a part of a thing without joints, such as a caddy's compartment."""
        region = self.sim.env.object_sites_dict.get(target)
        return region is not None and not region.joints and region.parent_name in self.sim.env.obj_body_id

    def travel(self, point, R, gripper):
        """Over everything on the way to above `point()` (3,), and down to it, along a funnel."""
        start = self.grip
        level = max(self.highest_on_way(None, start, point(), 0.12) + CLEAR[0], start[2], point()[2] + 0.03)
        while self.grip[2] < level - 0.02 and np.linalg.norm((point() - self.grip)[:2]) > 0.05 and start is not None:
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

    def frame_of(self, name):
        """Position (3,) and rotation (3, 3) of an object."""
        return pose(self.sim, name)

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

        here, there = pose(self.sim, name)[0], self.destination(target, name)[0]
        level = self.highest_on_way(name, here, there, 0.08) + CLEAR[1]
        if self.careful:  # the palm too, which may be far to one side of the object
            beside = self.highest_on_way(name, self.grip, self.grip + there - here, 0.12)
            level = max(level, beside + 0.01 - PALM - (self.grip[2] - self.lowest(name)))
        yield from self.lift(name, level, R, lost)
        R = self.laid_down(target, self.aligned(name, target, R))
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
        if self.opened:
            yield from self.slide_out(name, R)
        start = self.grip
        for _ in range(60):
            rise = level - self.lowest(name)
            if rise < 0.01 or lost():
                break
            yield self.towards(np.array([*start[:2], self.grip[2] + rise + 0.02]), R, 1)

    def slide_out(self, name, R):
        """From under what would be in the way of lifting the object, such as an open drawer, along the table."""
        shift = self.uncovered(name)
        goal = self.grip + shift
        for _ in range(40 if np.any(shift) else 0):
            if np.linalg.norm((goal - self.grip)[:2]) < 0.008:
                break
            yield self.towards(goal + [0, 0, 0.004], R, 1)

    def clear(self, name, target):
        """Moves an object, along the table, from where a drawer will be over it when it is open."""
        part = fixtures.Part(self.sim, target)
        drawer = corners(self.sim, part.geoms) + (part.q - AJAR + 0.04) * part.outward
        if not np.any(self.uncovered(name, drawer, 0.0)):
            return
        shift = self.uncovered(name, drawer, 0.04)
        grasp, blocked = yield from self.reach(name)
        R = self.grasp_pose(name, grasp)[1]
        if not blocked:
            yield from self.squeeze(R)
            goal = self.grip + shift
            for _ in range(25):
                if np.linalg.norm((goal - self.grip)[:2]) < 0.015:
                    break
                yield self.towards(goal + [0, 0, 0.004], R, 1)
        yield from self.let_go(R)

    def uncovered(self, name, more=np.zeros((0, 8, 3)), spare=0.01):
        """The shortest horizontal way (3,) on which an object comes out from under all else, `more` boxes too; metres."""
        own = corners(self.sim, solid(self.sim, name)).reshape(-1, 3)
        others = [solid(self.sim, other) for other in self.sim.env.obj_body_id if other != name]
        boxed = np.concatenate([corners(self.sim, np.concatenate(others)), more])
        low, high = boxed.min(1), boxed.max(1)  # (G, 3)
        over = low[:, 2] > own[:, 2].min() + 0.015

        def touches(shift, which, gap):
            return ((low[which, :2] < own.max(0)[:2] + shift + gap) & (high[which, :2] > own.min(0)[:2] + shift - gap)).all(1).any()
        beside = ~over & (high[:, 2] > own[:, 2].min() + 0.01)
        for far in np.arange(0, 0.25, 0.01):
            for angle in np.arange(0, 2 * np.pi, np.pi / 8):
                shift = far * np.array([np.cos(angle), np.sin(angle)])
                if not touches(shift, over, spare) and (far == 0 or not touches(shift, beside, 0.005)):
                    return np.append(shift, 0)
        return np.zeros(3)

    def aligned(self, name, target, R):
        """The hand's rotation (3, 3) that turns a held object's long side along that of the region it is put in."""
        if not self.careful or not self.is_region(target):
            return R
        region = self.sim.env.object_sites_dict[target]
        boxed = corners(self.sim, solid(self.sim, name)).reshape(-1, 3)
        size = np.abs(self.sim.data.site(target).xmat.reshape(3, 3) @ region.size)[:2]  # half sides
        if (np.ptp(boxed[:, :2], axis=0) < 2 * size - 0.01).all():
            return R
        turns = np.radians(np.arange(-90, 91, 5))
        flat = (boxed - boxed.mean(0))[:, :2]
        spare = [(2 * size - np.ptp(flat @ [[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]], axis=0)).min() for t in turns]
        return Rotation.from_euler("z", turns[np.argmax(spare - 0.002 * np.abs(turns))]).as_matrix() @ R

    def laid_down(self, target, R):
        """The hand's rotation (3, 3) at which a bottle lies on the slope of the wine rack; elsewhere R itself."""
        if not target.startswith("wine_rack"):
            return R
        where, rack = self.destination(target)
        back = (pose(self.sim, rack)[0] - where) * [0, 1, 0]
        return Rotation.from_rotvec(SLOPE * np.cross([0, 0, 1], back / np.linalg.norm(back))).as_matrix() @ R

    def carry(self, goal, level, R, lost):
        """Across and down: the object's centre over the destination's, then until it rests on it or hangs in it."""
        _, name, target = goal
        still, before = 0, np.inf
        for _ in range(150):
            where, container = self.destination(target, name)
            walls = self.walls(target, container)
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
            still = still + 1 if aside < 0.02 and abs(before - bottom) < 0.0005 else 0  # it stands on something
            before = bottom
            if arrived or lost() or still > 6:
                break
            if self.careful and self.is_region(target):  # turned first
                aside += max(Rotation.from_matrix(R @ self.hand.T).magnitude() - 0.06, 0)
            near = NEAR / 2 if self.careful else NEAR
            fall = min(end + STEEP * max(aside - near, 0), level) - bottom
            yield self.towards(self.grip + [*shift, fall], R, 1)

    def walls(self, target, container):
        """Heights, metres, of the corners of what a destination is part of."""
        if container not in self.sim.env.obj_body_id:
            return np.zeros(1)
        geoms = fixtures.Part(self.sim, target).geoms if self.is_drawer(target) else solid(self.sim, container)
        return corners(self.sim, geoms)[..., 2]

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
