"""Training, the same for all models: checkpoints, steps, continuation, the log.

    fit(model, data.batch, config, "runs/mask.pt")      # writes mask.pt, mask.jsonl, mask.png

A model is an nn.Module with `kind` (a string), `config` (its dataclass) and
`loss(batch) -> (scalar, dict of floats)`.
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
import sys
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from core.draw import save_picture
from core.files import fail, write
from core.flags import as_dict, default_device, fast_products
from core.networks import count

VERSION = 2     # of the checkpoint's layout
# Fields that may change between a run and its continuation; every other field shapes the weights.
FREE_FIELDS = {"device", "data", "out", "name", "preset", "show", "seconds", "planner"}


# --- checkpoints ----------------------------------------------------------------------------------


def save(path, **content):
    """Write a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def load(path, kind=None, made_by=None):
    """The content of a checkpoint as a dict, on the CPU. `kind` = what it must hold, a name or
    several; `made_by` = the command that makes it."""
    path = os.fspath(path)
    kinds = (kind,) if isinstance(kind, str) else kind
    if not os.path.isfile(path):
        fail(f"{path} does not exist" + (f"; make it with: {made_by}" if made_by else ""))
    broken = f"{path} is damaged or no checkpoint; delete it and make it again"
    broken += f" with: {made_by}" if made_by else ""
    try:
        # a truncated file too: a zip's directory is at its end
        with zipfile.ZipFile(path) as file:
            if file.testzip():      # torch.load checks no checksum: changed bytes would be weights
                fail(broken)
        # weights_only runs no code that the file brings
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        fail(f"{broken} ({type(error).__name__})")
    if not isinstance(content, dict):
        fail(broken)
    if kinds and content.get("kind") not in kinds:
        fail(f"{path} holds a model of kind '{content.get('kind')}', and one of kind "
             f"'{' or '.join(kinds)}' is needed here")
    if "version" in content and content["version"] != VERSION:
        fail(f"{path} has layout {content['version']}, this code reads {VERSION}; train it again")
    return content


def resume(model, config, path):
    """Load the weights at `path` into the model, if there are any. -> that checkpoint or None."""
    if not os.path.exists(path):
        return None
    content = load(path, kind=model.kind)
    old, new = content["config"], as_dict(config)
    differing = [f"{k} {old.get(k)} there, {new.get(k)} here" for k in old | new
                 if k not in FREE_FIELDS and old.get(k) != new.get(k)]
    if differing:
        fail(f"{path} was trained with another configuration ({'; '.join(differing)}); "
             "choose another --name or --out, or delete that file")
    model.load_state_dict(content["model"])
    return content


# --- training -------------------------------------------------------------------------------------


def learning_rate(done, config):
    """Linear warm-up over `warmup` steps, then a cosine to 0; `done` = steps already made."""
    if done < config.warmup:
        return config.lr * (done + 1) / config.warmup
    progress = (done - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, config, fused):
    """AdamW over the trainable parameters, without decay on biases and norms (the 1-D ones)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=config.lr, fused=fused)


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
    device = torch.device(config.device or default_device())
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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
    """Tells glibc to keep what a step frees for the next one, instead of giving it back to the
    kernel, which clears every page anew: a step of ATM's policy at the paper's sizes takes a tenth
    less on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:                 # not outside of Linux
        mallopt(-4, 0)          # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, -1)         # M_TRIM_THRESHOLD: never


def log_line(line):
    tqdm.write(line)        # above the progress bar, not through it
    sys.stdout.flush()


def read_log(path):
    """The rows of <run>.jsonl, as dicts; none without one. A kill can have cut the last line."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


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
        self.path, self.config, self.rows, self.samples = path, config, [], 0
        kept = [row for row in read_log(path) if row["step"] <= done]
        if os.path.exists(path):
            write(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.first, self.begin = done, time.time() - (kept[-1]["seconds"] if kept else 0)

    def step(self, done, row, samples):
        """After every step: `row` = loss and parts, `samples` = size of the batch."""
        left, now = self.config.steps - done, time.time()
        self.rows.append(row)
        self.samples += samples
        if done == self.first + 1:      # the first step also pays for kernels and caches
            self.warm, self.core = now, time.process_time()
        if done == self.first + 11 and left:
            pace = (now - self.warm) / 10
            log_line(f"{pace:.3g} s per step: about {pace * left / 60:.1f} minutes to go")
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
        log_line(f"step {done}  " + "  ".join(parts))
        write(self.path, json.dumps(line) + "\n", append=True)


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


def announce(model, config, path, device, world, done, note):
    """The first lines of a run: what is trained, where and how long; where it continues."""
    where = f"{device}" + f" x {world}" * (world > 1) + ", bf16" * bool(config.bf16)
    log_line(f"{model.kind} on {where}: {count(model):,} trainable parameters, {config.steps} steps"
             + (f", {note}" if note else "") + f" -> {path}")
    if done:
        log_line(f"{path} is at step {done}: "
                 + ("continuing" if done < config.steps else "finished, nothing to do"))


def fit(model, batches, config, path, picture=None, note=""):
    """Train `model` for config.steps; return it in eval(), with averaged weights if config.ema > 0.

    batches(step) -> dict of arrays, a function of the step alone. Run again with the same config
    after an interruption, it continues from `path` and ends with the weights of an unbroken run.
    Writes <run>.pt (= path), <run>.jsonl (log) and <run>.png (picture(model): (H, W, 3) uint8).
    """
    path = os.fspath(path)
    keep_memory()
    fast_products()
    rank, world, device = join_processes(config)
    model.to(device).train()
    content = resume(model, config, path)
    done = content["step"] if content else 0
    compute_loss = Loss(model)
    if world > 1:   # gives all processes the first one's weights, and averages their gradients
        compute_loss = nn.parallel.DistributedDataParallel(compute_loss, broadcast_buffers=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config, fused=device.type == "cuda")
    average = copy.deepcopy(model).eval() if config.ema else None
    if content:
        optimizer.load_state_dict(content["optimizer"])
        if average:
            average.load_state_dict(content["ema"])
    if rank == 0:
        announce(model, config, path, device, world, done, note)
    run = path.removesuffix(".pt")
    log = Log(run + ".jsonl", done, config) if rank == 0 and done < config.steps else None
    quiet = not log or not sys.stderr.isatty()
    bar = tqdm(total=config.steps, initial=done, unit="step", disable=quiet)
    while done < config.steps:
        # Seeded per step, dropout and noise leave no generator state to store in the checkpoint.
        torch.manual_seed((config.seed << 32) + done * world + rank)
        batch = {k: torch.as_tensor(v).to(device) for k, v in batches(done * world + rank).items()}
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
            save(path, kind=model.kind, config=as_dict(config), model=model.state_dict(),
                 optimizer=optimizer.state_dict(), ema=average and average.state_dict(), step=done,
                 version=VERSION)
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
    with --show also picture() -> (H, W, 3) uint8, which training has drawn itself."""
    path = os.fspath(path).removesuffix(".pt")
    print(scores)
    write(path + ".txt", scores + "\n")
    if config.show:
        save_picture(path + ".png", picture())
    print(f"picture: {path}.png   next: python executor.py --planner {path}.pt")
