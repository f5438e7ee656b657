"""The planners that an executor can be trained on. A planner of your own is one file and one line.

Every planner (there is no base class) has a `kind`, a key of PLANNERS; a dataclass `Config`, from
which alone it is built; and what README's "Your own plan" lists: `sets`, `plan`, `draw`, `loss`.
"""

import importlib

from core import training
from core.files import fail
from core.flags import from_dict

PLANNERS = {  # kind -> module and class
    "mask": "mask_planner:MaskPlanner",
    "track": "track_planner:TrackPlanner",
    "video": "video_planner:VideoPlanner",
    "feature": "baselines.plex:FeaturePlanner",
    "none": "baselines.cloning:Cloning",
    "none-language": "baselines.cloning:LanguageCloning",
    "r3m": "baselines.cloning:R3MCloning",
}


def planner_class(kind):
    module, name = PLANNERS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def build(kind, config):
    """An untrained planner from the fields of its configuration, a dict."""
    Planner = planner_class(kind)
    return Planner(from_dict(Planner.Config, config))


def load_planner(path, device="cpu"):
    """A trained planner from its checkpoint, in eval() and frozen, with averaged weights if any."""
    content = training.load(path, [*PLANNERS], "python mask_planner.py, track_planner.py or "
                            "video_planner.py --suite <suite>")
    training.check_whole(path, content)
    planner = build(content["kind"], content["config"])
    planner.load_state_dict(content["ema"] or content["model"])
    planner.codes = content.get("code", ())
    return planner.to(device).eval().requires_grad_(False)


def untrained(kind):
    """The class of a planner that has no loss of its own, no stage 1, such as cloning."""
    without = {k: planner_class(k) for k in PLANNERS if not hasattr(planner_class(k), "loss")}
    return without.get(kind) or fail(
        f"--planner {kind}: give a checkpoint of stage 1 (python mask_planner.py makes "
        f"runs/<suite>/mask.pt), or {', '.join(without)}")
