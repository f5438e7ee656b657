"""Command lines: a dataclass field is a flag."""

import argparse
import dataclasses
import os
import types
import typing

import torch

from core.files import fail


# --- command line ---------------------------------------------------------------------------------


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


def flag(default, help, choices=None, minimum=None, maximum=None):
    """A dataclass field that is a flag. Default None: the preset (or the machine) decides."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the flags)")


def default_text(field, presets):
    """What --help says is the default of a field: its own, each preset's, or what the machine
    decides."""
    if field.default is not None:
        return str(field.default)
    if any(field.name in preset for preset in presets.values()):
        return ", ".join(f"{name}: {preset.get(field.name)}" for name, preset in presets.items())
    machine = {"device": "cuda if available, else cpu", "bf16": "on where the hardware has it"}
    return machine.get(field.name, "none")


def make_parser(Config, description):
    """One --kebab-case flag per field; what is not given stays out of the parser's result."""
    presets, hints = getattr(Config, "PRESETS", {}), typing.get_type_hints(Config)
    parser = OneLineParser(description=description, allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="sizes for all fields that are "
                            "not given (default: paper with a CUDA device, else laptop)")
    for field in dataclasses.fields(Config):
        if field.name == "preset":
            continue
        hint, options = hints[field.name], {}
        if types.NoneType in typing.get_args(hint):         # int | None
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) is tuple:                # tuple[int, ...]: --blocks 2 2 2 2
            hint, options = typing.get_args(hint)[0], {"nargs": "+"}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": hint, "choices": field.metadata["choices"]}
        text = f"{field.metadata['help']} (default: {default_text(field, presets)})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, help=text.replace("%", "%%"), **options)
    return parser


def parse(Config, description, argv=None):
    """Command line -> Config: the given flags, else the preset's values, else the defaults."""
    given = vars(make_parser(Config, description).parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    presets, values = getattr(Config, "PRESETS", {}), {}
    if presets:
        preset, why = given.pop("preset", None), "asked for"
        if preset is None and torch.cuda.is_available():
            preset, why = "paper", "CUDA device found; --preset laptop for a quick look"
        elif preset is None:
            preset, why = "laptop", "no CUDA device; --preset paper for the paper's sizes"
        print(f"preset {preset} ({why})", flush=True)
        values = presets[preset] | ({"preset": preset} if "preset" in fields else {})
    config = Config(**(values | given))
    if "device" in fields and config.device is None:
        config.device = default_device()
    if "device" in fields and config.device != "cpu" and not (
            config.device.startswith("cuda") and torch.cuda.is_available()):
        fail(f"--device {config.device}: this machine has {default_device()}")
    if "bf16" in fields and config.bf16 is None:
        config.bf16 = default_bf16(config.device)
    fast_products()     # here, so that what is computed before training is the same after a kill
    for name, field in fields.items():
        value, most = getattr(config, name), field.metadata.get("maximum")
        minimum = field.metadata.get("minimum")
        if None not in (value, minimum) and not value >= minimum:       # "not >=" refuses nan too
            fail(f"--{name.replace('_', '-')} {value} is too small: give {minimum} or more")
        if None not in (value, most) and value > most:
            fail(f"--{name.replace('_', '-')} {value} is too large: give {most} or less")
    return config


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
