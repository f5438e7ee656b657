"""What all files share: the end of a run with bad input, writing files, networks, flags.

    class Config:                                   config = parse(Config, "Stage 1 of ...")
        steps: int = flag(2000, "gradient steps")   model = Planner(config)

Sizes: B batch, L tokens, D width, H W pixels, h w cells of the feature map.
"""

import argparse
import dataclasses
import errno
import math
import os
import sys
import types
import typing

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock


def fail(message):
    """One line on stderr and exit code 2: the end of every run with a bad input."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def write(path, content, append=False):
    """Bytes or text to a file, all or nothing: a run killed here leaves the previous file whole.
    `append`: behind what is there, instead."""
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path if append else path + ".tmp"
    try:
        with open(part, "ab" if append else "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if not append:
                # else a power cut can leave the new name without its data
                os.fsync(file.fileno())
    except OSError as error:
        if not append:
            os.remove(part)
        if error.errno != errno.ENOSPC:
            raise
        fail(f"disk full while writing {path}, what was there is untouched; free space, run again")
    if not append:
        os.replace(part, path)


# --- networks -------------------------------------------------------------------------------------


def drop(x, share):
    """Dropout.  ours: on a CPU each byte of a draw decides once, by which `share` is rounded to a
    256th: drawing was a sixth of a step."""
    if not share or x.is_cuda:
        return F.dropout(x, share)
    least = round(256 * share)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2 ** 63, None)
    kept = draws.view(torch.uint8)[:x.numel()].view(x.shape) >= least
    return x * kept.to(x.dtype).div_(1 - least / 256)


def attend(q, k, v, mask=None, dropout=0.0):
    """Attention: q (B, heads, Q, d), k, v (B, heads, L, d), mask (Q, L) bool
    -> (B, heads, Q, d)."""
    if q.is_cuda or q.dtype != torch.bfloat16 and not dropout:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    # The same, written out: in bf16 on a CPU 2.9 times faster, forward and backward; autocast would
    # take the softmax in float32, between two copies, a quarter slower
    with torch.autocast(q.device.type, enabled=False):
        score = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)            # (B, heads, Q, L)
        score = score if mask is None else score.masked_fill(~mask, -math.inf)
        return drop(score.softmax(-1), dropout) @ v


class Block(nn.Module):
    """Pre-norm transformer block.  x (B, L, D) -> (B, Q, D): all L tokens, or the first Q."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        if dim % heads:
            fail(f"width {dim} is not divisible by {heads} heads; choose a multiple")
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def split(self, x, first=None):
        """x (B, L, D) -> queries (B, heads, Q, d), keys and values (B, heads, L, d)."""
        # q, k and v all come from the normalised input: with the norm on q alone, k and v would be
        # the raw residuals, which grow with depth.
        x, D = self.norm1(x), x.shape[-1]
        if first is None:
            parts = self.qkv(x).chunk(3, -1)
        else:
            w, b = self.qkv.weight, self.qkv.bias
            parts = F.linear(x[:, :first], w[:D], b[:D]), *F.linear(x, w[D:], b[D:]).chunk(2, -1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def forward(self, x, mask=None, first=None):
        """x (B, L, D) float; mask (L, L) bool, True = row may attend to column; first: how many of
        the tokens are wanted, None: all -> (B, Q, D)."""
        q, k, v = self.split(x, first)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, None if mask is None else mask[:first], dropout)
        x = x[:, :first] + drop(self.out(y.transpose(1, 2).flatten(2)), dropout)  # (B, Q, D)
        return x + drop(self.down(F.gelu(self.up(self.norm2(x)))), dropout)


class Transformer(nn.Module):
    """`depth` blocks and a final LayerNorm.  x (B, L, D) -> (B, Q, D): all L tokens, or the
    first Q."""

    def __init__(self, dim, depth, heads, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # GPT-2: 2 * depth branches add up in the residual; scaled, their sum starts as one.
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x, mask=None, first=None):
        """x (B, L, D) float; mask (L, L) bool, True = may attend; first: how many of the tokens are
        wanted, None: all.  What the last block would say of the others is not computed
        -> (B, Q, D)."""
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.norm(self.blocks[-1](x, mask, first))


def block_causal_mask(steps, tokens):
    """A token sees all of its own and of earlier steps.  -> (L, L) bool, L = steps * tokens."""
    step = torch.arange(steps * tokens) // tokens                           # (L,)
    return step[:, None] >= step[None, :]                                   # (L, L)


class ImageEncoder(nn.Module):
    """ResNet with GroupNorm.  Images -> feature map (B, D, h, w).

    `blocks` = residual blocks per stage, `channels` = width of the first stage, doubled at each
    next one: (2, 2, 2, 2) and 64 is ResNet-18 with stride 32; (1, 1, 1) has stride 16. Weights
    start at random: nothing is downloaded.
    """

    def __init__(self, dim, blocks=(2, 2, 2, 2), channels=64):
        super().__init__()
        if not blocks or min(blocks) < 1 or channels % 16:
            fail(f"image encoder of {blocks} blocks and {channels} channels: at least one block "
                 "per stage, channels a multiple of 16")
        # differs: GroupNorm, where ResNet has BatchNorm: its statistics go on moving in a "frozen"
        # encoder, and rollout batches of one differ from training batches.
        norm = lambda width: nn.GroupNorm(width // 16, width)
        stem = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), norm(channels), nn.ReLU(inplace=True),
                nn.MaxPool2d(3, 2, 1)]
        body, width = [], channels
        for stage, count in enumerate(blocks):
            for block in range(count):
                new, stride = channels * 2 ** stage, 2 if stage and not block else 1
                shortcut = nn.Sequential(nn.Conv2d(width, new, 1, stride, bias=False), norm(new))
                body.append(BasicBlock(width, new, stride, None if new == width else shortcut,
                                       norm_layer=norm))
                width = new
        self.body, self.head = nn.Sequential(*stem, *body), nn.Conv2d(width, dim, 1)
        # see forward
        self.cut, self.fine = len(stem) + sum(blocks[:2]), channels * 2 ** (len(blocks[:2]) - 1)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.stride = 2 ** (1 + len(blocks))
        self.to(memory_format=torch.channels_last)      # the faster layout, on CPUs as on GPUs

    def cells(self, size):
        """Height or width of the feature map of a picture of `size` pixels."""
        return -(-size // self.stride)

    def forward(self, images, fine=False):
        """(B, H, W, 3) uint8 in 0..255, or (B, 3, H, W) float in [-1, 1] -> (B, D, h, w) float.

        fine: also what the second stage says, of stride 8 (B, `self.fine`, h', w').
        """
        if images.dtype == torch.uint8:
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1         # (B, 3, H, W), -1..1
        # (B, C, h', w')
        x = self.body[:self.cut](images.contiguous(memory_format=torch.channels_last))
        y = self.head(self.body[self.cut:](x))                              # (B, D, h, w)
        return (y, x) if fine else y


def random_shift(images, pad=4):
    """Shifts each picture by up to `pad` pixels, edges repeated (DrQ).

    images (B, H, W, 3) -> the same shape, and by how many pixels what they show has moved, (B, 2) x
    right, y down.
    """
    B, H, W, _ = images.shape
    move = torch.randint(-pad, pad + 1, (2, B, 1))
    rows = (torch.arange(H) - move[0]).clamp(0, H - 1).to(images.device)    # (B, H)
    columns = (torch.arange(W) - move[1]).clamp(0, W - 1).to(images.device)  # (B, W)
    b = torch.arange(B, device=images.device)[:, None, None]
    return images[b, rows[:, :, None], columns[:, None, :]], move[[1, 0], :, 0].T.to(images.device)


def count(model):
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
