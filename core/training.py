"""Training, the same for all models: checkpoints, steps, continuation, the log.  A model is an
nn.Module with `kind` (str), `config` (its dataclass), `loss(batch) -> (scalar, dict of floats)`.

    fit(model, data.batch, config, "runs/mask.pt")      # writes mask.pt, mask.jsonl, mask.png
"""

import atexit
import copy
import ctypes
import io
import json
import math
import os
import pickle
import resource
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from core.draw import save_picture
from core.episodes import Episodes
from core.files import code, fail, one_line, write
from core.flags import FREE, SAMPLING, differences, flags_of, suites

VERSION = 4     # of the checkpoint's layout


def save(path, **content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load(path, kind=None, made_by=None):
    """The content of a checkpoint as a dict, on the CPU. `kind` = what it must hold, a name or
    several; `made_by` = the command that makes it."""
    path, kinds = os.fspath(path), [kind] if isinstance(kind, str) else kind
    if not os.path.isfile(path):
        fail(f"{path} does not exist" + f"; make it with: {made_by}" * bool(made_by))
    broken = (f"{path} is damaged or no checkpoint; delete it and make it again"
              + f" with: {made_by}" * bool(made_by))
    try:
        # a truncated file lacks the zip's directory, which is its end
        with one_line(path), zipfile.ZipFile(path) as file:
            if file.testzip():      # torch.load checks no checksum: changed bytes would be weights
                fail(broken)
        # weights_only runs no code that the file brings
        content = {**torch.load(path, map_location="cpu", weights_only=True)}
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError, zipfile.BadZipFile) as error:
        fail(f"{broken} ({type(error).__name__})")
    if kinds and content.get("kind") not in kinds:
        fail(f"{path} holds a model of kind '{content.get('kind')}', and one of kind "
             f"'{' or '.join(kinds)}' is needed here")
    if content.get("version", VERSION) != VERSION:
        fail(f"{path} has layout {content['version']}, this code reads {VERSION}; train it again")
    return content


def check_whole(path, content):
    """Refuses a checkpoint whose training has not ended."""
    steps = content["config"].get("steps", 0)
    if content.get("step", 0) < steps:
        fail(f"{path} is at step {content.get('step', 0)} of {steps}: run again what makes it, "
             "which continues")


def run_path(config, base):
    """The run's checkpoint, <out>/<suite>/<name>.pt; the name is `base` and what differs from the
    preset, or --name.  One that is there, of other flags, is refused before any data are made."""
    first, *_ = chosen = suites(config)
    if "/" in config.name:
        fail(f"--name {config.name}: give a name without /, and a folder by --out")
    sources = "" if chosen == {first: config.demos} else "_from-" + "+".join(
        suite + f"-{count}" * (count != config.demos) for suite, count in chosen.items())
    name = config.name or base + sources + differences(config, SAMPLING)
    path = Path(config.out) / first / f"{name}.pt"
    if path.exists() and not getattr(config, "show", False):
        # of these the data or the planner may decide
        given = {f.name for f in flags_of(config)} - {"objects", "form", "suite", "size"}
        check_same(path, load(path)["config"], asdict(config), given)
    return path


def check_same(path, old, new, fields):
    """Refuses to continue a checkpoint whose configuration differs in these fields."""
    differing = [f"{k} {old.get(k)} there, {new.get(k)} here" for k in fields
                 if k not in FREE | SAMPLING and old.get(k) != new.get(k)]
    if differing:
        fail(f"{path} was trained with another configuration ({'; '.join(differing)}); "
             "choose another --name or --out, or delete that file")


def resume(model, config, path):
    """Load the weights at `path` into the model, if there are any. -> that checkpoint, or {}."""
    if not os.path.exists(path):
        return {}
    content = load(path, kind=model.kind)
    check_same(path, content["config"], new := asdict(config), content["config"] | new)
    model.load_state_dict(content["model"])
    return content


def learning_rate(done, config):
    """Linear warm-up over `warmup` steps, then a cosine to 0; `done` = steps already made."""
    if done < config.warmup:
        return config.lr * (done + 1) / config.warmup
    progress = (done - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(parameters, config):
    """AdamW, without decay on biases and norms (the 1-D ones)."""
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=config.lr, fused=parameters[0].is_cuda)


@torch.no_grad()
def update_average(average, model, decay, done):
    """Move the averaged copy of the model towards it, after step `done`."""
    # The plain formula would leave a short run with an average of mostly its random start.
    decay = min(decay, (done + 1) / (done + 10))
    for slow, p in zip(average.parameters(), model.parameters()):
        slow.lerp_(p, 1 - decay)
    for slow, value in zip(average.buffers(), model.buffers()):
        slow.copy_(value)


def join_processes(config):
    """Join the other processes if torchrun started this one. -> (rank, world, device)."""
    device = torch.device(config.device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():       # once per process: a second group can race with the first
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)     # else its threads can abort the exit
    return dist.get_rank(), dist.get_world_size(), device


class Loss(nn.Module):
    """The module that DistributedDataParallel wraps: its forward is the model's loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)


def keep_memory():
    """Lets glibc keep what a step frees for the next one: the kernel would clear every page anew. A
    step of ATM's policy at the paper's sizes takes a tenth less on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:                 # not outside of Linux
        mallopt(-4, 0)          # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, -1)         # M_TRIM_THRESHOLD: never


def tensors(batch, model):
    """A dict of arrays as tensors on the model's device."""
    device = next(model.parameters()).device
    return {k: torch.as_tensor(v, device=device) for k, v in batch.items()}


def read_log(path):
    """The rows of <run>.jsonl, as dicts; none without one."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def last_seconds(checkpoint):
    """Training time in seconds, from the log beside a checkpoint; None without one."""
    rows = read_log(os.fspath(checkpoint).removesuffix(".pt") + ".jsonl")
    return rows[-1]["seconds"] if rows else None


def peak_memory():
    """The most that this process has held so far, of the GPU's memory if it uses one, gigabytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)   # of kB


class Log:
    """The printed lines and <run>.jsonl, the same keys; values are means since the last line."""

    def __init__(self, path, done, config):
        """Keep the lines up to step `done`: a resumed run writes the later ones again."""
        self.path, self.config, self.rows, self.samples, self.first = path, config, [], 0, done
        self.lines = [line for line in read_log(path) if line["step"] <= done]
        self.begin = time.time() - (self.lines[-1]["seconds"] if self.lines else 0)

    def step(self, done, row, samples):
        """After every step: `row` = loss and parts, `samples` = size of the batch."""
        left, now = self.config.steps - done, time.time()
        self.rows.append(row)
        self.samples += samples
        if done == self.first + 1:      # the first step also pays for kernels and caches
            self.warm, self.core = now, time.process_time()
        if done == self.first + 11 and left:
            pace = (now - self.warm) / 10
            tqdm.write(f"{pace:.3g} s per step: about {pace * left / 60:.1f} minutes to go")
        if done % self.config.log_every and left:
            return
        line = {"step": done} | {k: float(np.mean([r[k] for r in self.rows])) for k in row}
        per = lambda seconds: float(f"{(self.samples - samples) / max(seconds, 1e-9):.4g}")
        line |= {"lr": learning_rate(done - 1, self.config), "seconds": round(now - self.begin, 2),
                 "samples_per_second": per(now - self.warm),
                 "samples_per_core_second": per(time.process_time() - self.core),
                 "gigabytes": peak_memory()}
        self.rows = []
        parts = (f"{k} {v:.4g}" for k, v in line.items() if k != "step")
        tqdm.write(f"step {done}  " + "  ".join(parts))
        self.lines.append(line)
        write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def take_step(compute_loss, batch, optimizer, parameters, config, done):
    """One gradient step, step `done` + 1 -> the loss and its parts, floats."""
    with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=bool(config.bf16)):
        loss, parts = compute_loss(batch)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    row = {"loss": float(loss.detach())} | {k: float(v) for k, v in parts.items()}
    # The gradient too: a finite loss with an infinite gradient writes NaN into the weights.
    if not math.isfinite(row["loss"]) or not math.isfinite(float(norm)):
        fail(f"not finite at step {done + 1}: {row}, gradient norm {float(norm)}; the last "
             f"checkpoint is untouched: try a lower --lr (now {config.lr}) or --no-bf16")
    optimizer.step()
    return row


def codes(model, content):
    """By which code a model was made: this, its data's, its planner's, an interrupted run's."""
    parts = [code(), *Episodes.codes, *content.get("code", ())]
    return sorted({*parts}.union(*(getattr(part, "codes", ()) for part in model.modules())))


def fit(model, batches, config, path, picture=None, note=""):
    """Train `model` for config.steps; return it in eval(), with averaged weights if config.ema > 0.

    batches(step) -> dict of arrays, a function of the step alone: after an interruption the same
    call continues from `path` and ends with the weights of an unbroken run.  Writes <run>.pt (=
    path), <run>.jsonl (log) and <run>.png (picture(model): (H, W, 3) uint8)."""
    run = os.fspath(path).removesuffix(".pt")
    keep_memory()
    rank, world, device = join_processes(config)
    model.to(device).train()
    content = resume(model, config, path)
    done = content.get("step", 0)
    compute_loss = Loss(model)
    if world > 1:   # gives all processes the first one's weights, and averages their gradients
        compute_loss = nn.parallel.DistributedDataParallel(compute_loss, forward_sync_buffers=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, config)
    average = copy.deepcopy(model).eval() if config.ema else None
    if content:
        optimizer.load_state_dict(content["optimizer"])
        if average:
            average.load_state_dict(content["ema"])
    if rank == 0:
        tqdm.write(f"{model.kind} on {device}" + f" x {world}" * (world > 1)
                 + ", bf16" * bool(config.bf16) + f": {sum(p.numel() for p in parameters):,} "
                 f"trainable parameters, {config.steps} steps" + f", {note}" * bool(note)
                 + f" -> {path}")
        if done:
            tqdm.write(f"{path} is at step {done}: "
                     + ("continuing" if done < config.steps else "finished, nothing to do"))
    log = Log(run + ".jsonl", done, config) if rank == 0 and done < config.steps else None
    # None: a bar on a terminal, none elsewhere
    bar = tqdm(total=config.steps, initial=done, unit="step", disable=None if log else True)
    while done < config.steps:
        # Seeded per step, dropout and noise leave no generator state to store in the checkpoint.
        torch.manual_seed((config.seed << 32) + done * world + rank)
        batch = tensors(batches(done * world + rank), model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, config)
        row = take_step(compute_loss, batch, optimizer, parameters, config, done)
        if average:
            update_average(average, model, config.ema, done)
        done += 1
        bar.update()
        if log:
            log.step(done, row, world * len(next(iter(batch.values()))))
        if log and (done % config.save_every == 0 or done == config.steps):
            save(path, kind=model.kind, config=asdict(config), version=VERSION,
                 step=done, code=codes(model, content), model=model.state_dict(),
                 ema=average and average.state_dict(), optimizer=optimizer.state_dict())
            if picture:
                with torch.no_grad():
                    save_picture(run + ".png", picture((average or model).eval()))
                model.train()
    bar.close()
    if dist.is_initialized():
        dist.barrier()          # nobody reads the file before it is written
    if average:
        model.load_state_dict(average.state_dict())
    return model.eval()


def report(config, path, scores, picture):
    """Prints a planner's scores on held-out videos (text) and writes them beside its checkpoint;
    with --show also picture() -> (H, W, 3) uint8, which training has drawn itself. Names of both
    hold how it was sampled, where not as in its preset. Of several processes the first does."""
    if dist.is_initialized() and dist.get_rank():
        return
    run = os.fspath(path).removesuffix(".pt")
    name = run + differences(config, {*asdict(config)} - SAMPLING)
    print(scores)
    write(name + ".txt", scores + "\n")
    if config.show:
        save_picture(name + ".png", picture())
    print(f"picture: {name if config.show else run}.png   "
          f"next: python executor.py --planner {run}.pt")
