"""Where LIBERO's things are put: the place, how the hand turns for it, as the scene is now; and
`insert`, a part of the demonstrator's plan (`libero.py`): the way in from the front."""

import numpy as np
from scipy.spatial.transform import Rotation

from demos import fixtures
from demos.grasp import SLIPPED, UP, corners, covers, handle_of, leaning, pose, solid

LEAN = 1.0  # radians by which the hand leans back to reach into a microwave or shelf
INSIDE = 0.03  # metres before a region's centre at which a thing is put down inside
BESIDE = 0.09  # metres, each way, between two things on one stove
SLOPE = 0.9  # radians by which a bottle is laid down on the wine rack


def kind_of(sim, target):
    """What a destination is: an object; or a region, of a drawer, of a cave (it is reached from the
    front only), another part of a thing (such as a caddy's compartment), or of the table."""
    region = sim.env.object_sites_dict.get(target)
    if region is None or region.joints:
        return "object" if region is None else "drawer"
    if region.parent_name not in sim.env.obj_body_id:
        return "table"
    cave = region.parent_name.startswith(("microwave", "wooden_two_layer_shelf"))
    return "cave" if cave else "part"


def destination(sim, target, name=None):
    """Position (3,) of the region or object to go to, and the name of the object it is part of."""
    region = sim.env.object_sites_dict.get(target)
    if region is None:
        return pose(sim, target)[0], target
    where = sim.data.site(target).xpos.copy()
    if target.startswith("wine_rack"):
        where[0] += 0.045  # beside the rod in its middle
    sharing = [g[1] for g in sim.goal if g[-1] == target and g[0] == "on"]
    if name in sharing and len(sharing) > 1:
        # side by side, the last one to where its handle points: the hand stays off the others
        last, R = handle_of(sim, sharing[-1]), pose(sim, sharing[-1])[1]
        side = 0 if last is None else np.sign((R @ last)[1])
        where += BESIDE * (sharing.index(name) / (len(sharing) - 1) - 0.5) * np.array([1, side, 0])
    if region.joints:  # the middle of what is open of the drawer
        part = fixtures.Part(sim, target)
        boxed, out = corners(sim, part.others), part.outward
        boxed = boxed[boxed[..., 2].max(1) > corners(sim, part.geoms)[..., 2].max()]
        front, back = where @ out + 0.076, (boxed @ out).max(initial=where @ out - 0.076)
        where += out * np.clip((front + back) / 2 - where @ out, 0, 0.06)
        if name and corners(sim, solid(sim, name))[..., 2].max() < part.ceiling() - 0.002 < np.inf:
            where -= 0.025 * out  # once it is below the other handles
    return where, region.parent_name


def walls(sim, target, container):
    """Heights, metres, of the corners of what a destination is part of."""
    if container not in sim.env.obj_body_id:
        return np.zeros(1)
    drawer = kind_of(sim, target) == "drawer"
    geoms = fixtures.Part(sim, target).geoms if drawer else solid(sim, container)
    return corners(sim, geoms)[..., 2]


def aligned(arm, name, target, R):
    """The hand's rotation (3, 3) that turns a held object's long side along that of its region."""
    sim = arm.sim
    if not arm.careful or kind_of(sim, target) not in ("cave", "part"):
        return R
    region = sim.env.object_sites_dict[target]
    boxed = corners(sim, solid(sim, name)).reshape(-1, 3)
    size = np.abs(sim.data.site(target).xmat.reshape(3, 3) @ region.size)[:2]  # half sides
    if (np.ptp(boxed[:, :2], axis=0) < 2 * size - 0.01).all():
        return R
    turns, flat = np.radians(np.arange(-90, 91, 5)), (boxed - boxed.mean(0))[:, :2]
    across = lambda t: np.ptp(flat @ [[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]], axis=0)
    spare = [(2 * size - across(t)).min() for t in turns]
    best = turns[np.argmax(spare - 0.002 * np.abs(turns))]
    return Rotation.from_euler("z", best).as_matrix() @ R


def laid_down(sim, target, R):
    """The hand's rotation (3, 3) at which a bottle lies on the wine rack's slope, else R."""
    if not target.startswith("wine_rack"):
        return R
    where, rack = destination(sim, target)
    back = (pose(sim, rack)[0] - where) * [0, 1, 0]
    axis = np.cross(UP, back / np.linalg.norm(back))
    return Rotation.from_rotvec(SLOPE * axis).as_matrix() @ R


def insert(arm, goal):
    """One attempt at putting a thing with a handle into a microwave or shelf, from the front: held
    by its handle, lifted to the height of the floor inside, turned, pushed in and set down."""
    sim, (_, name, target) = arm.sim, goal
    where, container = destination(sim, target)
    out, local = pose(sim, container)[1] @ [0, -1, 0], handle_of(sim, name)

    def handle():
        p, R = pose(sim, name)
        return p + R @ local
    away = (handle() - pose(sim, name)[0])[:2]
    away = np.append(away, 0) / np.linalg.norm(away)
    R = leaning(np.cross(UP, away), away, LEAN)
    yield from arm.travel(lambda: handle() + 0.05 * away + [0, 0, 0.03], R, -1)
    yield from arm.approach(handle, R, -1)
    yield from arm.squeeze(R)
    R = leaning(np.cross(UP, out), out, LEAN)
    boxed = corners(sim, solid(sim, container))
    below = covers(boxed, where) & (boxed[..., 2].max(1) < where[2])
    level = boxed[below, :, 2].max(initial=0.9) + 0.025     # above the floor inside
    for stage, far in enumerate((0.16, 0.16, INSIDE)):
        for step in range(70):
            if arm.away(handle()) > SLIPPED:
                return
            shift = where + far * out - pose(sim, name)[0]
            shift[2] = level - arm.lowest(name)
            if stage == 0:
                shift[:2] = 0
            turned = stage == 0 or arm.turn_to(R).magnitude() < 0.2 or step > 50
            if np.linalg.norm(shift) < 0.015 and turned:
                break
            yield arm.towards(arm.grip + shift, R if stage else arm.hand, 1)
    for _ in range(25):
        before = arm.lowest(name)
        yield arm.towards(arm.grip - 0.02 * UP, R, 1)
        if before - arm.lowest(name) < 0.0005:
            break
    yield from arm.leave(out, R)
