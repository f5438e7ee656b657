"""Command lines: one dataclass per program, one flag per field, presets of sizes.

    @dataclass
    class Config(PlannerConfig):                              config = parse(Config, "Stage 1 ...")
        objects: int = flag(3, "objects whose masks are predicted", minimum=1)

A field made by `flag` is a flag. A plain field is a number that only presets set, and that
checkpoints keep. Default None: the preset, or the machine, decides.
"""

import argparse
import dataclasses
import hashlib
import os
import types
import typing
from pathlib import Path

import torch

from core.files import fail

# what does not shape a model: it may differ between a run and its continuation, and is in no name
FREE = {"device", "data", "out", "name", "preset", "show", "planner", "suite", "bf16", "films",
        "workers", "results"}
SHORT = {"action_demos": "d", "seed": "s"}     # in names of runs


def flag(default, help, choices=None, minimum=None, maximum=None, positional=False):
    """A dataclass field that is a flag (`positional`: words before the flags)."""
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "minimum": minimum, "maximum": maximum,
        "positional": positional})


@dataclasses.dataclass
class TrainingConfig:
    """What all programs that train have in common."""
    tasks: str = flag("", "numbers or names of tasks, comma-separated; empty: all")
    demos: int | None = flag(None, "action-free videos per task", minimum=1)
    preset: str | None = flag(None, "sizes: for a test, for two CPU cores, for one GPU",
                              choices=["tiny", "laptop", "paper"])
    steps: int | None = flag(None, "gradient steps", minimum=1)
    lr: float | None = flag(None, "peak learning rate", minimum=0)
    seed: int = flag(0, "seed of weights and batches", minimum=0)
    name: str = flag("", "name of the run; empty: made from the flags that were given")
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    device: str | None = flag(None, "cpu or cuda")
    bf16: bool | None = flag(None, "train in bf16 where the machine is faster that way")

    width: int = 128                    # of the transformer
    depth: int = 3                      # its blocks
    blocks: tuple[int, ...] = (1, 1, 1)     # residual blocks per stage of the image encoder
    channels: int = 32                  # of its first stage, doubled at each next one
    history: int = 1                    # frames that the network sees
    E: int = 0                          # numbers per sentence, from the data
    A: int = 0                          # numbers per action, from the data
    weight_decay, warmup, clip, ema, save_every, log_every = 1e-4, 100, 1.0, 0.0, 500, 100


@dataclasses.dataclass
class PlannerConfig(TrainingConfig):
    """What all planners' programs have in common."""
    suite: str = flag("libero_spatial", "suite of videos (README lists them), or several, a:2,b: "
                      "two videos per task of a, all of b; validated on the first")
    size: int | None = flag(None, "height and width of the pictures, pixels", minimum=32)
    batch: int | None = flag(None, "samples per step", minimum=1)
    show: bool = flag(False, "only score and draw the trained planner on held-out videos")

    stride: int = 4                     # control steps between the frames that it sees


def flags_of(Config):
    """The fields that are flags."""
    return [f for f in dataclasses.fields(Config) if "help" in f.metadata]


# --- the machine ----------------------------------------------------------------------------------


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_flags():
    """What the CPU can do, as Linux names it; elsewhere nothing."""
    if not os.path.exists("/proc/cpuinfo"):
        return []
    with open("/proc/cpuinfo") as file:
        return next((line.split() for line in file if line.startswith("flags")), [])


def default_bf16(device):
    """Is bf16 autocast a gain: a GPU with bf16, or a CPU with avx512_bf16 or amx_bf16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags()))


def fast_products():
    """fp32 matrix products on the CPU by oneDNN: MKL, torch's own choice, leaves half of the width
    of an AMD core idle (103 instead of 250 billion operations a second).

    torch asks oneDNN only if products may be rounded to bf16 first; a CPU without AMX does not
    round (a sum of 384 is 1e-4 off, with MKL 5e-5), one with AMX would, and is left alone.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)       # of torch 2.9 and later
    if products and "avx512f" in cpu_flags() and "amx_bf16" not in cpu_flags():
        products.fp32_precision = "bf16"


# --- command line ---------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the flags)")


def make_parser(Config, description):
    """One --kebab-case flag per field; what is not given stays out of the parser's result."""
    presets, hints = getattr(Config, "PRESETS", {}), typing.get_type_hints(Config)
    parser = OneLineParser(description=description, allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)
    for field in flags_of(Config):
        hint, about = hints[field.name], field.metadata
        if types.NoneType in typing.get_args(hint):         # int | None
            hint = typing.get_args(hint)[0]
        options = {"type": hint, "choices": about["choices"]}
        if hint is bool:
            options = {"action": argparse.BooleanOptionalAction}
        default = field.default if field.default is not None else ", ".join(
            f"{name} {preset[field.name]}" for name, preset in presets.items()
            if field.name in preset) or "what suits the machine"
        name = "--" + field.name.replace("_", "-")
        if about["positional"]:
            name, options = field.name, {"nargs": "*"}
        default = "" if default in ("", ()) else f" (default: {default})"
        parser.add_argument(name, help=(about["help"] + default).replace("%", "%%"), **options)
    return parser


def parse(Config, description, argv=None):
    """Command line -> Config: the given flags, else the preset's values, else the defaults."""
    given = vars(make_parser(Config, description).parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    presets, values = getattr(Config, "PRESETS", {}), {}
    if presets:
        cuda = torch.cuda.is_available()
        preset = given.get("preset") or ("paper" if cuda else "laptop")
        why = ("asked for" if "preset" in given else "CUDA device found" if cuda else
               "no CUDA device; --preset paper for the paper's sizes")
        print(f"preset {preset} ({why})", flush=True)
        values = presets[preset] | {"preset": preset}
    config = Config(**(values | given))
    for field in flags_of(Config):
        value, about = getattr(config, field.name), field.metadata
        low, high = about["minimum"], about["maximum"]
        if value is not None and ((low is not None and not value >= low)
                                  or (high is not None and not value <= high)):
            fail(f"--{field.name.replace('_', '-')} {value}: must be at least {low}"
                 + (f" and at most {high}" if high is not None else ""))
    settle_machine(config)
    return config


def settle_machine(config):
    """Device and precision that the machine decides; refuses a device that it does not have."""
    if not hasattr(config, "device"):
        return
    config.device = config.device or default_device()
    if config.device != "cpu" and not (config.device.startswith("cuda")
                                       and torch.cuda.is_available()):
        fail(f"--device {config.device}: this machine has {default_device()}")
    if getattr(config, "bf16", True) is None:
        config.bf16 = default_bf16(config.device)
    fast_products()     # here, so that what is computed before training is the same after a kill


def as_dict(config):
    """Config -> plain dict, for checkpoints."""
    return dataclasses.asdict(config)


def from_dict(Config, values):
    """Plain dict -> Config; refuses fields that it does not know."""
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(Config)})
    if unknown:
        fail(f"{Config.__name__} has no field {', '.join(unknown)}: the checkpoint is from another "
             "version of this code; train it again")
    return Config(**values)


# --- names of runs --------------------------------------------------------------------------------


def differences(config, free=()):
    """What of a configuration is not its preset's, but for the fields `free`, as part of a file
    name: two configurations that compute different things never share a name."""
    presets, words = getattr(config, "PRESETS", {}), []
    for field in flags_of(type(config)):
        usual = presets.get(getattr(config, "preset", None), {}).get(field.name, field.default)
        value = getattr(config, field.name)
        if field.name in {*FREE, *free} or value == usual or field.metadata["positional"]:
            continue
        if isinstance(value, bool):
            words.append(field.name if value else f"no-{field.name}")
        elif field.metadata["choices"] and isinstance(value, str):
            words.append(value)
        else:
            words.append(SHORT.get(field.name, field.name) + str(value).replace(",", "+"))
    name = "".join(f"_{word}" for word in words)
    return name if len(name) < 80 else "_" + hashlib.sha1(name.encode()).hexdigest()[:10]


def suites(config):
    """--suite a:2,b -> {suite: videos per task}."""
    chosen = {}
    for word in filter(None, (w.strip() for w in config.suite.split(","))):
        suite, _, number = word.partition(":")
        if number and not (number.isdigit() and int(number)):
            fail(f"--suite {word}: give a suite, or a suite and a number of videos per task such "
                 "as libero_spatial:2")
        chosen[suite] = int(number or config.demos)
    return chosen or fail("--suite is empty: give one such as libero_spatial")


def run_path(config, base):
    """The run's checkpoint, <out>/<suite>/<name>.pt; the name is `base` and what differs from the
    preset, or --name."""
    first, *_ = chosen = suites(config)
    sources = "" if chosen == {first: config.demos} else "_from-" + "+".join(
        suite + f"-{number}" * (number != config.demos) for suite, number in chosen.items())
    return Path(config.out) / first / f"{config.name or base + sources + differences(config)}.pt"
