"""core: attention, image encoder, training and its continuation, checkpoints, command lines."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn as nn

from core import networks, training
from core.flags import (PlannerConfig, as_dict, fast_products, flag, flags_of, from_dict, parse,
                        run_path)


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass
class Config:
    PRESETS: ClassVar = {"laptop": {"width": 8}, "paper": {"width": 512}}
    steps: int = flag(12, "gradient steps", minimum=1)
    lr: float = flag(3e-3, "peak learning rate", minimum=0)
    weight_decay: float = flag(0.01, "of matrices, 5 % at most")
    warmup: int = flag(2, "steps")
    clip: float = flag(1.0, "largest gradient norm, 0 = off")
    ema: float = flag(0.9, "decay per step, 0 = off")
    seed: int = flag(0, "random seed")
    save_every: ClassVar = 4
    log_every: ClassVar = 4
    mode: str = flag("plain", "what goes wrong", choices=["plain", "nan", "steep", "slow"])
    width: int | None = flag(None, "width in channels")
    device: str | None = flag("cpu", "cpu or cuda")
    bf16: bool | None = flag(False, "bf16 autocast")
    preset: str | None = flag(None, "sizes", choices=["laptop", "paper"])
    files: tuple[str, ...] = flag((), "what is read", positional=True)
    sizes: tuple[int, ...] = (1, 2)


class Toy(nn.Module):
    """Noise, dropout, a frozen part and a buffer: what a continued run can get wrong."""

    kind = "toy"

    def __init__(self, config):
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        self.body = networks.Transformer(8, 1, 2, dropout=0.1)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("mean", torch.ones(8))
        self.calls = 0

    def loss(self, batch):
        self.calls += 1
        if self.config.mode == "slow":
            time.sleep(0.2)
        noise = 0.1 * torch.randn(batch["x"].shape)
        loss = (self.body(self.frozen(batch["x"]) + noise) - batch["y"] - self.mean).square().mean()
        if self.config.mode == "nan" and self.calls == 6:
            loss = loss * float("nan")
        if self.config.mode == "steep" and self.calls == 6:
            loss = loss + (0 * self.body.norm.weight[0]).sqrt()     # finite, its gradient is not
        return loss, {"noise": noise.abs().mean().item()}


def batches(step):
    x = np.random.default_rng(step).standard_normal((4, 3, 8), dtype=np.float32)
    return {"x": x, "y": x[:, ::-1].copy()}


def trained(path, **changes):
    config = Config(**changes)
    return training.fit(Toy(config), batches, config, str(path))


def child(path, processes=0, **changes):
    """Train in another process, or in several under torchrun. -> Popen"""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [__file__, str(path), json.dumps(changes)]
    command = [sys.executable, *(torchrun if processes else []), *script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT}, **pipes)


def equal(a, b):
    """torch.equal over nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def refused(capsys, *words):
    """The one line on stderr, which must contain `words`."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


# --- networks -------------------------------------------------------------------------------------


def test_block_without_mask_does_not_know_the_order():
    block, x = networks.Block(16, 4).eval(), torch.randn(2, 6, 16)
    order = torch.randperm(6)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]), atol=1e-5, rtol=1e-5)


def test_block_normalises_q_k_and_v():
    # Scale and offset of the input must not reach the attention branch through any of the three.
    block, x = networks.Block(16, 4).eval(), torch.randn(2, 6, 16)
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    torch.testing.assert_close(block(5 * x + 3) - (5 * x + 3), block(x) - x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_tokens_alone_are_those_of_all(bf16):
    model, x = networks.Transformer(16, 3, 4).eval(), torch.randn(2, 12, 16)
    mask = networks.block_causal_mask(4, 3)
    nn.init.normal_(model.blocks[-1].qkv.weight)        # attention that matters
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for m in (None, mask):
            for first in (1, 5, 12):
                torch.testing.assert_close(model(x, m, first), model(x, m)[:, :first])


def test_attention_in_bf16_is_about_that_in_fp32():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    exact = networks.attend(q, k, v, networks.block_causal_mask(3, 3))
    rough = networks.attend(*(x.bfloat16() for x in (q, k, v)), networks.block_causal_mask(3, 3))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


def test_fast_products_are_not_rounded():
    """As exact as fp32 is: bf16 would be a thousand times further off."""
    a, b = torch.randn(100, 384), torch.randn(384, 200)
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this torch has no such choice")
    before = torch.backends.mkldnn.matmul.fp32_precision
    fast_products()
    try:
        torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), atol=3e-4, rtol=1e-5)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(share):
    x = torch.ones(101, 999, requires_grad=True)
    y = networks.drop(x, share)
    y.sum().backward()
    assert abs((y == 0).float().mean().item() - share) < 0.01 and abs(y.mean().item() - 1) < 0.02
    assert torch.equal(x.grad, y), "what is dropped learns nothing"
    torch.manual_seed(5)
    once = networks.drop(x, share)
    torch.manual_seed(5)
    assert torch.equal(once, networks.drop(x, share))


def test_attention_is_the_formula():
    block, x = networks.Block(8, 2).eval(), torch.randn(1, 4, 8)
    mask = networks.block_causal_mask(2, 2)
    q, k, v = block.qkv(block.norm1(x))[0].split(8, dim=-1)
    heads = []
    for h in range(2):
        s = slice(4 * h, 4 * h + 4)
        score = (q[:, s] @ k[:, s].T / 2).masked_fill(~mask, -torch.inf)
        heads.append(score.softmax(-1) @ v[:, s])
    y = x + block.out(torch.cat(heads, -1))
    y = y + block.down(nn.functional.gelu(block.up(block.norm2(y))))
    torch.testing.assert_close(block(x, mask), y)


def test_block_causal_mask_hides_later_steps():
    mask = networks.block_causal_mask(3, 2)
    assert mask.shape == (6, 6) and mask.dtype == torch.bool
    assert all(mask[i, j] == (i // 2 >= j // 2) for i in range(6) for j in range(6))
    model, x = networks.Transformer(16, 2, 4).eval(), torch.randn(2, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 100
    assert torch.equal(model(x, mask)[:, :4], model(changed, mask)[:, :4])
    assert not torch.equal(model(x, mask)[:, 4:], model(changed, mask)[:, 4:])


def test_transformer_trains_every_parameter():
    model = networks.Transformer(16, 2, 4)
    model(torch.randn(2, 5, 16)).square().mul(torch.randn(16)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("blocks, stride", [((1, 1, 1), 16), ((2, 2, 2, 2), 32)])
def test_encoder(blocks, stride):
    encoder = networks.ImageEncoder(12, blocks)
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    features = encoder.train()(images)
    assert features.shape == (2, 12, 64 // stride, 96 // stride)
    (features * torch.randn_like(features)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(encoder.eval()(images), features)
        assert equal(before, dict(encoder.state_dict())), "something moved in forward()"
        torch.testing.assert_close(encoder(images[:1]), features[:1], atol=1e-4, rtol=1e-4)
        floats = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        assert floats.min() == -1 and floats.max() == 1
        assert torch.equal(encoder(floats), features)


def test_encoder_refuses_a_hole_in_the_stages(capsys):
    with pytest.raises(SystemExit):
        networks.ImageEncoder(12, (2, 0, 2, 2))
    refused(capsys, "(2, 0, 2, 2)")


# --- training -------------------------------------------------------------------------------------


class Regression(nn.Module):
    kind = "regression"

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.body = nn.Sequential(networks.Transformer(16, 1, 2), nn.Linear(16, 16))

    def loss(self, batch):
        return (self.body(batch["x"]) - batch["y"]).square().mean(), {}


def test_fit_overfits_one_batch(tmp_path, capsys):
    config = Config(steps=300, lr=1e-2, ema=0.0, warmup=10, weight_decay=0.0)
    config.save_every = 300
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    pictures = []

    def picture(model):
        assert not model.training
        pictures.append(model)
        return np.zeros((4, 6, 3), np.uint8)

    model = Regression(config)
    path = tmp_path / "run.pt"
    batch = {"x": x, "y": y}
    model = training.fit(model, lambda step: batch, config, path, picture, "9 episodes")
    assert training.load(path, kind="regression")["config"] == as_dict(config)
    lines = capsys.readouterr().out.splitlines()
    trainable = f"{networks.count(model):,} trainable"
    for word in ("cpu", trainable, "300 steps", "9 episodes", str(path)):
        assert word in lines[0]
    assert any("minutes to go" in line for line in lines[:5])
    assert not model.training and model.loss({"x": x, "y": y})[0] < 0.01
    assert len(pictures) == 1 and (tmp_path / "run.png").exists()
    rows = [json.loads(line) for line in open(tmp_path / "run.jsonl")]
    assert [row["step"] for row in rows] == list(range(4, 301, 4))
    assert {"loss", "lr", "seconds", "samples_per_second", "samples_per_core_second",
            "gigabytes"} <= rows[0].keys()


def test_frozen_parts_and_decay(tmp_path):
    before = Toy(Config())
    model = trained(tmp_path / "run.pt")
    assert torch.equal(model.frozen.weight, before.frozen.weight)
    assert not torch.equal(model.body.blocks[0].up.weight, before.body.blocks[0].up.weight)
    decayed, plain = training.load(tmp_path / "run.pt")["optimizer"]["param_groups"]
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert len(decayed["params"]) == 4 and len(plain["params"]) == 10


def test_learning_rate():
    config = Config(steps=100, warmup=10, lr=2.0)
    rates = [training.learning_rate(done, config) for done in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01


def test_average_of_the_weights(tmp_path):
    config, seen = Config(), []
    model = Toy(config)
    plain_loss = model.loss

    def loss(batch):
        seen.append(model.body.norm.weight.detach().clone())    # before step 0, 1, ...
        return plain_loss(batch)

    model.loss = loss
    training.fit(model, batches, config, tmp_path / "run.pt")
    content = training.load(tmp_path / "run.pt")
    average = seen[0]
    for done, weight in enumerate([*seen[1:], content["model"]["body.norm.weight"]]):
        decay = min(0.9, (done + 1) / (done + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(content["ema"]["body.norm.weight"], average)
    assert equal(dict(model.state_dict()), content["ema"])
    assert not torch.equal(average, content["model"]["body.norm.weight"])


@pytest.mark.slow
def test_killed_run_continues_exactly(tmp_path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    trained(whole)
    # "slow" sleeps in every step and changes nothing else: there is time to kill it between saves.
    process = child(broken, mode="slow")
    while not broken.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)                                 # into the steps that will be made again
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = training.load(broken)["step"]
    assert 0 < step < 12
    with open(tmp_path / "broken.jsonl", "a") as file:
        file.write('{"step": 11, "lo')              # a line that the kill cut
    out, err = child(broken, mode="slow").communicate()
    assert f"at step {step}: continuing" in out, err
    assert err == ""                                # no terminal, no progress bar
    one, other = training.load(whole), training.load(broken)
    assert other["step"] == 12
    for key in ("model", "ema", "optimizer"):
        assert equal(one[key], other[key]), key
    rows = [json.loads(line) for line in open(tmp_path / "broken.jsonl")]
    assert [row["step"] for row in rows] == [4, 8, 12]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_finished_run_is_left_alone(tmp_path, capsys):
    model = trained(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes(), (tmp_path / "run.jsonl").read_bytes()
    again = trained(tmp_path / "run.pt", device=None)
    assert "finished" in capsys.readouterr().out
    assert before == ((tmp_path / "run.pt").read_bytes(), (tmp_path / "run.jsonl").read_bytes())
    assert equal(dict(model.state_dict()), dict(again.state_dict()))


def test_another_configuration_is_refused(tmp_path, capsys):
    trained(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "run.pt", lr=0.5)
    assert stop.value.code == 2
    refused(capsys, "lr 0.003 there, 0.5 here", "--out", "delete")
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("mode", ["nan", "steep"])
def test_non_finite_loss_or_gradient_stops_the_run(tmp_path, capsys, mode):
    with pytest.raises(SystemExit) as stop:
        trained(tmp_path / "run.pt", mode=mode)
    assert stop.value.code == 2
    refused(capsys, "step 6", "--lr")
    content = training.load(tmp_path / "run.pt")
    assert content["step"] == 4
    assert all(v.isfinite().all() for v in content["model"].values())


@pytest.mark.slow
def test_two_processes_share_one_model(tmp_path):
    """Two processes with 4 samples each = one process with the 8 samples, without noise."""
    process = child(tmp_path / "two.pt", processes=2, seed=3)
    out, err = process.communicate()
    assert process.returncode == 0, err
    ranks = [torch.load(tmp_path / f"two.pt.rank{r}", weights_only=True) for r in range(2)]
    assert equal(*ranks), err
    assert out.count("step 12 ") == 1, out
    config = Config(seed=3, ema=0.0, steps=3)

    def both(step):
        parts = [batches(2 * step), batches(2 * step + 1)]
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    training.fit(Linear(config), both, config, tmp_path / "one.pt")
    one, two = training.load(tmp_path / "one.pt"), training.load(tmp_path / "two.pt.linear")
    torch.testing.assert_close(one["model"], two["model"], atol=1e-5, rtol=1e-5)


class Linear(nn.Module):
    kind = "linear"

    def __init__(self, config):
        super().__init__()
        self.config = config
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        if os.environ.get("RANK") == "1":
            nn.init.ones_(self.body.weight)         # rank 0's weights must win

    def loss(self, batch):
        return (self.body(batch["x"]) - batch["y"]).square().mean(), {}


# --- checkpoints ----------------------------------------------------------------------------------


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruded",)


def test_load_refuses_what_it_should(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.save("deep/er/good.pt", kind="toy", model={"w": torch.ones(1000)}, step=3)
    assert training.load("deep/er/good.pt", kind="toy")["step"] == 3
    assert os.listdir("deep/er") == ["good.pt"]
    whole = (tmp_path / "deep/er/good.pt").read_bytes()
    torch.save({"kind": "toy", "model": Intruder()}, "evil.pt")
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", whole[:-200])):
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in ("missing", "empty", "text", "cut", "evil"):
        with pytest.raises(SystemExit) as stop:
            training.load(f"{name}.pt", kind="toy", made_by="python toy.py --suite x")
        assert stop.value.code == 2
        refused(capsys, f"{name}.pt", "python toy.py --suite x")
    assert not os.path.exists("intruded")
    with pytest.raises(SystemExit):
        training.load("deep/er/good.pt", kind="video_planner")
    refused(capsys, "toy", "video_planner")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("size", [10, 3_000_000])
def test_full_disk_leaves_the_old_file(tmp_path, capsys, size):
    path = tmp_path / "run.pt"
    training.save(path, step=1)
    os.symlink("/dev/full", f"{path}.tmp")
    with pytest.raises(SystemExit) as stop:
        training.save(path, step=2, model=torch.zeros(size))
    assert stop.value.code == 2
    refused(capsys, "disk full", "run.pt")
    assert training.load(path)["step"] == 1 and os.listdir(tmp_path) == ["run.pt"]


# --- command line ---------------------------------------------------------------------------------


def test_preset_fills_what_is_not_given(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse(Config, "", []).width == 8
    assert capsys.readouterr().out.splitlines() == [
        "preset laptop (no CUDA device; --preset paper for the paper's sizes)"]
    assert parse(Config, "", ["--preset", "paper"]).width == 512
    assert capsys.readouterr().out.splitlines() == ["preset paper (asked for)"]
    config = parse(Config, "", ["a.pt", "b.pt", "--width", "3", "--bf16", "--lr", "0.5"])
    assert (config.width, config.bf16, config.files, config.lr) == (3, True, ("a.pt", "b.pt"), 0.5)


@pytest.mark.parametrize("argv, words", [
    (["--steps", "0"], ["--steps 0", "at least 1"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--speed", "3"], ["--speed", "--help"]),
    (["--step", "3"], ["--step", "--help"]),            # no abbreviations
    (["--steps", "many"], ["--steps", "many"]),
    (["--mode", "fast"], ["fast", "plain"]),
    (["--device", "abacus"], ["abacus"]),
    (["--sizes", "3"], ["--sizes"]),                    # only presets set it
])
def test_bad_flags_are_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        parse(Config, "", argv)
    assert stop.value.code == 2
    refused(capsys, *words)


def test_help_tells_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, "what it does", ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in flags_of(Config):
        assert ("" if field.name == "files" else "--") + field.name.replace("_", "-") in text
        assert field.metadata["help"] in text
    assert "(default: laptop 8, paper 512)" in text and "(default: 12)" in text
    assert "--sizes" not in text


def test_names_hold_what_differs_from_the_preset(monkeypatch):
    """Two configurations that train differently never share a name; where the data lie and the
    like is in none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @dataclasses.dataclass
    class Planner(PlannerConfig):
        objects: int = flag(3, "objects")
        grounded: bool = flag(False, "a switch")
        PRESETS: ClassVar = {"laptop": dict(demos=20, steps=2000, size=96, batch=32, lr=1e-3)}

    def path(*argv):
        return str(run_path(parse(Planner, "", ["--device", "cpu", *argv]), "mask"))

    assert path() == path("--data", "elsewhere", "--demos", "20") == "runs/libero_spatial/mask.pt"
    argvs = [["--objects", "1"], ["--objects", "2"], ["--grounded"], ["--seed", "1"], ["--lr", "1"],
             ["--tasks", "0,1"], ["--steps", "9"], ["--demos", "5"], ["--size", "64"],
             ["--suite", "libero_spatial:2,libero_goal"], ["--suite", "libero_spatial:2"],
             ["--suite", "mt10"], ["--tasks", ",".join(map(str, range(90)))]]
    names = [path(*argv) for argv in argvs]
    assert len({path(), *names}) == len(names) + 1 and max(map(len, names)) < 120
    assert names[0] == "runs/libero_spatial/mask_objects1.pt" and names[3].endswith("mask_s1.pt")
    assert path("--name", "mine", "--lr", "1") == "runs/libero_spatial/mine.pt"


def test_config_to_dict_and_back(capsys):
    config = Config(lr=0.1, sizes=(3,))
    assert from_dict(Config, as_dict(config)) == config
    with pytest.raises(SystemExit):
        from_dict(Config, {"lr": 0.1, "horizon": 5})
    refused(capsys, "horizon")


if __name__ == "__main__":      # a child process of the tests above: path, changed fields as JSON
    torch.set_num_threads(1)
    out, changes = sys.argv[1], json.loads(sys.argv[2])
    result = trained(out, **changes)
    if "RANK" in os.environ:
        torch.save(dict(result.state_dict()), f"{out}.rank{os.environ['RANK']}")
        linear = Config(seed=3, ema=0.0, steps=3)
        training.fit(Linear(linear), batches, linear, f"{out}.linear")
