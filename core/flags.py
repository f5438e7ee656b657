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
import re
import sys
import typing

import torch

from core.files import check_folder, code, end_quietly, fail

# Neither weights nor scores depend on these: they are in no name, and a run goes on with others.
FREE = {"device", "data", "out", "name", "preset", "show", "planner", "seconds", "films", "workers",
        "results"}
# Only scores depend on these, how a trained model samples: they are in names of results alone.
SAMPLING = {"sample_steps", "guidance", "val_clips"}


def flag(default, help, choices=None, minimum=0, maximum=2**31 - 1, positional=False):
    """A dataclass field that is a flag (`positional`: words before the flags)."""
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": choices, "range": (minimum, maximum), "positional": positional})


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

    stride: int = 4     # control steps between the frames that it sees.  differs: the papers' 1


def flags_of(Config):
    """The fields that are flags."""
    return [f for f in dataclasses.fields(Config) if "help" in f.metadata]


def word(field):
    """A field's name on the command line."""
    return "--" * (not field.metadata["positional"]) + field.name.replace("_", "-")


def fast_products():
    """fp32 matrix products on the CPU by oneDNN: MKL, torch's own choice, leaves half of the width
    of an AMD core idle (103 instead of 250 billion operations a second).  torch asks oneDNN only if
    products may be rounded to bf16 first; a CPU without AMX does not round (a sum of 384 is 1e-4
    off, with MKL 5e-5), one with AMX would, and is left alone."""
    cpu = torch.cpu.get_capabilities()
    if cpu.get("avx512_f") and not cpu.get("amx_bf16"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} ({self.prog} --help lists the flags)")


def make_parser(Config, description, presets):
    """One --kebab-case flag per field; what is not given stays out of the parser's result."""
    hints, spec = typing.get_type_hints(Config), sys.modules["__main__"].__spec__
    start = f"python -m {spec.name}" if spec else f"python {os.path.basename(sys.argv[0])}"
    parser = OneLineParser(start, description=description, allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)
    for field in flags_of(Config):
        about, default = field.metadata, field.default
        kind = (*typing.get_args(hints[field.name]), hints[field.name])[0]      # int of int | None
        options = ({"nargs": "*"} if about["positional"] else
                   {"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"type": kind, "choices": about["choices"]})
        if default is None:
            default = ", ".join(f"{name} {values[field.name]}" for name, values in presets.items()
                                if field.name in values) or "what suits the machine"
        text = about["help"] + f" (default: {default})" * (default not in ("", ()))
        parser.add_argument(word(field), help=text.replace("%", "%%"), **options)
    return parser


def parse(Config, description, argv=None):
    """Command line -> Config: the given flags, else the preset's values, else the defaults."""
    end_quietly()
    code()      # kept: the files may be edited before a long run ends
    presets, cuda = getattr(Config, "PRESETS", {}), torch.cuda.is_available()
    given = vars(make_parser(Config, description, presets).parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if presets:
        preset = given.setdefault("preset", "paper" if cuda else "laptop")
        print(f"preset {preset} (of {', '.join(presets)}; CUDA: {'yes' if cuda else 'no'})")
    config = Config(**presets.get(given.get("preset"), {}) | given)
    for field in flags_of(Config):
        check_value(config, field)
    settle(config)
    return config


def check_value(config, field):
    """Refuses a value that no program can use; writes paths and numbers of tasks in one way."""
    value, name, (low, high) = getattr(config, field.name), field.name, field.metadata["range"]
    if isinstance(value, int | float) and not low <= value <= high:
        fail(f"{word(field)} {value}: must be at least {low} and at most {high}")
    if name == "size" and (value or 0) % 16:
        fail(f"{word(field)} {value}: must be a multiple of 16, as all planners need")
    if isinstance(value, str):
        value = re.sub(r"\s|\b0+(?=\d)", "", value) if name == "tasks" else value
        setattr(config, name, value := os.path.expanduser(value))
        if not value and field.default:
            fail(f"{word(field)} is empty: {field.metadata['help']}")
    if name in ("out", "results"):
        check_folder(word(field), value)


def settle(config):
    """What no flag decides alone: numbers of videos that agree, the machine's device and
    precision."""
    lent, demos = (getattr(config, name, 0) for name in ("action_demos", "demos"))
    if lent > demos:
        fail(f"--action-demos {lent} is more than the {demos} videos: give --demos {lent}")
    if not hasattr(config, "device"):
        return
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    config.device = config.device or usual
    if config.device.partition(":")[0] not in ("cpu", usual):
        fail(f"--device {config.device}: this machine has {usual}")
    if config.device == "cuda":     # of several processes each has its own
        config.device += f":{os.environ.get('LOCAL_RANK', 0)}"
    if getattr(config, "bf16", True) is None:
        # a gain on a GPU with bf16, and on a CPU with products of it
        cpu = torch.cpu.get_capabilities()
        config.bf16 = (torch.cuda.is_bf16_supported() if config.device != "cpu" else
                       any(map(cpu.get, ("avx512_bf16", "amx_bf16"))))
    fast_products()     # here: what is computed before training is then the same after a kill


def from_dict(Config, values):
    """Plain dict -> Config; refuses fields that it does not know."""
    if unknown := sorted({*values} - {f.name for f in dataclasses.fields(Config)}):
        fail(f"{Config.__name__} has no field {', '.join(unknown)}: the checkpoint is from another "
             "version of this code; train it again")
    return Config(**values)


def differences(config, free=()):
    """What of a configuration is not its preset's, but for the fields `free`, as part of a file
    name: two configurations that compute different things never share a name."""
    preset, words = getattr(config, "PRESETS", {}).get(getattr(config, "preset", None), {}), []
    for field in flags_of(config):
        usual = preset.get(field.name, field.default)
        value, about = getattr(config, field.name), field.metadata
        # a run's folder is its suite, and bf16 is the machine's
        if value == usual or about["positional"] or field.name in {*FREE, "suite", "bf16", *free}:
            continue
        if isinstance(value, bool):
            words.append(field.name if value else f"no-{field.name}")
        elif about["choices"] and isinstance(value, str):
            words.append(value)
        else:
            short = {"action_demos": "d", "seed": "s"}.get(field.name, field.name)
            words.append(short + str(value).replace(",", "+"))
    name = "".join(f"_{word}" for word in words)
    return name if len(name) < 80 else "_" + hashlib.sha1(name.encode()).hexdigest()[:10]


def suites(config):
    """--suite a:2,b -> {suite: videos per task}."""
    chosen = {}
    for word in filter(None, (w.strip() for w in config.suite.split(","))):
        suite, _, count = word.partition(":")
        if count and not (count.isdecimal() and int(count)):
            fail(f"--suite {word}: give a suite, or a suite and a number of videos per task such "
                 "as libero_spatial:2")
        chosen[suite] = int(count or config.demos)
    return chosen or fail("--suite is empty: give one such as libero_spatial")
