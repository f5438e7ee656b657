"""The assignments: what a student reads, writes and should see.  Functions stand in the order in
which their tests pass; each is worth its points if all tests that grade it pass."""

from dataclasses import dataclass, field


@dataclass
class Assignment:
    number: int
    name: str
    title: str
    read: list  # sections of papers, in words
    functions: dict  # {file: {qualified name: points}}
    command: str  # shows the result
    expect: str  # what it then prints or draws
    minutes: int  # of two CPU cores
    questions: list  # two, whose answers need a measurement
    # {qualified name: paper and equation} of functions whose docstring does not start with them
    where: dict = field(default_factory=dict)

    @property
    def tests(self):
        """Name of the file of its public tests."""
        return f"test_{self.number}_{self.name}.py"

    @property
    def keys(self):
        """{"file:qualified name": points}."""
        return {f"{file}:{name}": points for file, names in self.functions.items()
                for name, points in names.items()}


def find(tree, name):
    """The function of a qualified name in a syntax tree, or None."""
    for part in name.split("."):
        tree = next((n for n in getattr(tree, "body", []) if getattr(n, "name", "") == part), None)
    return tree


ASSIGNMENTS = [
    Assignment(
        1, "masks", "Masks: objects that share the pixels, and how to score them",
        ["Mask2Act 3.2 from eq. 2 to the losses", "STM (Oh et al., 2019), soft aggregation",
         "XMem (Cheng and Schwing, 2022), supplement: bootstrapped cross-entropy and dice"],
        {"mask_planner.py": {"binary_masks": 15, "soft_aggregate": 25, "hardest_fraction": 10,
                             "bootstrapped_cross_entropy": 20, "dice": 20, "iou": 10}},
        "python mask_planner.py --suite libero_spatial --tasks 0 --demos 2 --preset tiny "
        "--steps 300",
        "`ce` and `dice` fall, then a table of held-out IoU beside copying the present mask, and "
        "a picture of predicted beside true masks", 3,
        ["Let `soft_aggregate` return log p where eq. 3 has log-odds. What happens to the IoU "
         "where two objects touch? Measure it over the pixels near both.",
         "Replace the schedule of the hardest pixels by a constant 1, and then 0.15. How does the "
         "logged `ce` change, how the IoU of `moving`, and why does the loss not rank the three?"],
        {"binary_masks": "Mask2Act 3.2, binary masks m^n", "soft_aggregate": "Mask2Act eq. 3 (STM)",
         "hardest_fraction": "XMem, schedule of the bootstrapping",
         "bootstrapped_cross_entropy": "Mask2Act 3.2, bootstrapped cross-entropy (XMem)",
         "dice": "Mask2Act 3.2, dice loss (XMem)", "iou": "intersection over union, the score"}),
    Assignment(
        2, "planner", "Planner: tokens of pictures, and where masks will be",
        ["Mask2Act 3.2, eq. 1 and 2, Fig. 3", "Mask2Act 3.4, architecture",
         "PLEX (Thomas et al., 2023), planner"],
        {"core/networks.py": {"block_causal_mask": 20},
         "mask_planner.py": {"Planner.plan_from": 30, "Decoder.forward": 30, "make_batch": 20}},
        "python mask_planner.py --suite libero_spatial --tasks 0 --demos 5 --preset laptop "
        "--steps 300",
        "in the picture predicted masks that have left the present ones; a held-out IoU of `robot` "
        "and `moving` above that of copying at +16 and +32", 8,
        ["Score the trained planner on the held-out episodes with the usual goal picture, and with "
         "the present frame in its place. How much of the IoU at +32 depends on the goal?",
         "Train with four frames of history (the preset has one). How do the held-out IoU and the "
         "time of a step change, and how, if the mask is causal by token and not by picture?"],
        {"block_causal_mask": "Mask2Act 3.4, attention over pictures",
         "Planner.plan_from": "Mask2Act eq. 1, planner P",
         "Decoder.forward": "Mask2Act eq. 2, decoder D",
         "make_batch": "Mask2Act eq. 1 and 2, goals of 4.1"}),
]
