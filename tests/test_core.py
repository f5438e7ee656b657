"""core: attention, image encoder, training and its continuation, checkpoints, command lines."""

import dataclasses
import os
import shutil
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn as nn

from conftest import ROOT, equal, python
from core import networks, training
from core.flags import PlannerConfig, fast_products, flag, flags_of, from_dict, parse


@dataclasses.dataclass
class Config:
    PRESETS: ClassVar = {"laptop": {"width": 8}, "paper": {"width": 512}}
    steps: int = flag(12, "gradient steps", minimum=1)
    lr: float = flag(3e-3, "peak learning rate", minimum=0)
    weight_decay: float = flag(0.01, "of matrices")
    warmup: int = flag(2, "steps")
    ema: float = flag(0.9, "decay per step, 0 = off")
    seed: int = flag(0, "random seed")
    mode: str = flag("noisy", "what it trains, or what goes wrong",
                     choices=["noisy", "quiet", "linear", "nan", "steep"])
    width: int | None = flag(None, "width in channels")
    device: str | None = flag("cpu", "cpu or cuda")
    bf16: bool | None = flag(False, "bf16 autocast")
    preset: str | None = flag(None, "sizes", choices=["laptop", "paper"])
    sample_steps: int = flag(4, "how it is sampled")
    show: bool = flag(False, "score and draw")
    files: tuple[str, ...] = flag((), "what is read", positional=True)
    sizes: tuple[int, ...] = (1, 2)
    save_every: int = 4
    clip, log_every = 1.0, 4


class Toy(nn.Module):
    """Noise, dropout, a frozen part and a buffer: what a continued run can get wrong."""
    kind = "toy"

    def __init__(self, config):
        super().__init__()
        self.config, self.calls = config, 0
        self.noise = 0.0 if config.mode in ("quiet", "linear") else 0.1
        torch.manual_seed(config.seed)
        self.body = (nn.Identity() if config.mode == "linear" else
                     networks.Transformer(16, 1, 2, dropout=self.noise))
        self.frozen, self.head = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16)
        if os.environ.get("RANK") == "1":
            nn.init.ones_(self.head.weight)         # rank 0's weights must win
        self.register_buffer("mean", torch.ones(16))

    def loss(self, batch):
        self.calls += 1
        noise = self.noise * torch.randn(batch["x"].shape)
        y = self.head(self.body(self.frozen(batch["x"]) + noise)) + self.mean
        loss = (y - batch["y"]).square().mean()
        if self.calls == 6 and self.config.mode in ("nan", "steep"):
            loss = loss * float("nan") if self.config.mode == "nan" else \
                loss + (0 * self.head.bias[0]).sqrt()       # finite, its gradient is not
        return loss, {"noise": noise.abs().mean().item()}


def batches(step):
    x = np.random.default_rng(step).standard_normal((4, 3, 16), dtype=np.float32)
    return {"x": x, "y": x[:, ::-1].copy()}


def trained(path, batches=batches, picture=None, note="", **changes):
    config = Config(**changes)
    return training.fit(Toy(config), batches, config, path, picture, note)


@pytest.mark.parametrize("mask", [None, networks.block_causal_mask(2, 2)])
def test_attention_is_the_formula(mask):
    """q, k and v of the normalised input; without a mask the order of the tokens plays no part."""
    block, x = networks.Block(8, 2).eval(), torch.randn(1, 4, 8)
    q, k, v = block.qkv(block.norm1(x))[0].split(8, dim=-1)
    hidden = torch.zeros(4, 4, dtype=bool) if mask is None else ~mask
    heads = []
    for h in range(2):
        s = slice(4 * h, 4 * h + 4)
        score = (q[:, s] @ k[:, s].T / 2).masked_fill(hidden, -torch.inf)
        heads.append(score.softmax(-1) @ v[:, s])
    y = x + block.out(torch.cat(heads, -1))
    y = y + block.down(nn.functional.gelu(block.up(block.norm2(y))))
    torch.testing.assert_close(block(x, mask), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x, mask).float(), y, atol=0.05, rtol=0.05)


def test_fast_products_are_not_rounded():
    """As exact as fp32 is: bf16 would be a thousand times further off."""
    a, b = torch.randn(100, 384), torch.randn(384, 200)
    before = torch.backends.mkldnn.matmul.fp32_precision
    fast_products()
    product, torch.backends.mkldnn.matmul.fp32_precision = a @ b, before
    torch.testing.assert_close(product, (a.double() @ b.double()).float(), atol=3e-4, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_dropout_keeps_the_mean_and_drops_its_share(share):
    x = torch.ones(101, 999, requires_grad=True)
    torch.manual_seed(5)
    y = networks.drop(x, share)
    y.sum().backward()
    assert abs((y == 0).float().mean().item() - share) < 0.01 and abs(y.mean().item() - 1) < 0.02
    assert torch.equal(x.grad, y), "what is dropped learns nothing"
    torch.manual_seed(5)
    assert torch.equal(y, networks.drop(x, share))


@pytest.mark.parametrize("blocks, stride", [((1, 1, 1), 16), ((2, 2, 2, 2), 32), ((), 16)])
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
        assert torch.equal(encoder(floats), features)


def test_fit_overfits_one_batch(tmp_path, capsys):
    batch, pictures, path = batches(0), [], tmp_path / "run.pt"
    picture = lambda model: pictures.append(model.training) or np.zeros((4, 6, 3), np.uint8)
    model = trained(path, lambda step: batch, picture, "9 episodes", mode="quiet", steps=300,
                    lr=1e-2, ema=0.0, warmup=10, weight_decay=0.0, save_every=300)
    lines = capsys.readouterr().out.splitlines()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    words = ("cpu", f"{size:,} trainable", "300 steps", "9 episodes", str(path))
    assert all(word in lines[0] for word in words)
    assert any("minutes to go" in line for line in lines)
    batch = {k: torch.as_tensor(v) for k, v in batch.items()}
    assert not model.training and model.loss(batch)[0] < 0.01
    assert training.load(path, kind="toy")["config"] == dataclasses.asdict(model.config)
    assert pictures == [False] and (tmp_path / "run.png").exists()
    rows = training.read_log(tmp_path / "run.jsonl")
    assert [row["step"] for row in rows] == list(range(4, 301, 4))
    assert {"loss", "seconds", "samples_per_second", "samples_per_core_second",
            "gigabytes"} <= rows[0].keys()
    rates = {row["step"]: row["lr"] for row in rows}        # a line up to step 10, then a cosine
    assert rates[8] == pytest.approx(8e-3) and rates[156] == pytest.approx(5e-3)
    assert max(rates.values()) == rates[12] and 0 < rates[300] < 1e-5


def test_average_and_decay_of_the_weights_and_frozen_ones(tmp_path):
    config, seen = Config(), []         # seen: the head before step 0, 1, ...
    model, before = Toy(config), Toy(config)
    loss, weight = model.loss, model.head.weight
    model.loss = lambda batch: seen.append(weight.detach().clone()) or loss(batch)
    training.fit(model, batches, config, tmp_path / "run.pt")
    content = training.load(tmp_path / "run.pt")
    average = seen[0]
    for done, weight in enumerate([*seen[1:], content["model"]["head.weight"]]):
        decay = min(0.9, (done + 1) / (done + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(content["ema"]["head.weight"], average)
    assert equal(dict(model.state_dict()), content["ema"])
    assert not torch.equal(average, content["model"]["head.weight"])
    assert torch.equal(model.frozen.weight, before.frozen.weight)
    groups = content["optimizer"]["param_groups"]
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.01, 5), (0, 11)]


def test_interrupted_run_goes_on_and_so_does_its_log(tmp_path, capsys):
    """In a step that no checkpoint holds yet, though there is a line of it in the log."""
    def until_the_tenth(step):
        if step == 9:
            raise KeyboardInterrupt
        return batches(step)

    broken = tmp_path / "broken.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(broken, until_the_tenth, save_every=5)
    assert [row["step"] for row in training.read_log(tmp_path / "broken.jsonl")] == [4, 8]
    capsys.readouterr()
    trained(broken, save_every=5)
    out, err = capsys.readouterr()
    assert "at step 5: continuing" in out and err == "", "no terminal, no progress bar"
    rows = training.read_log(tmp_path / "broken.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert sorted(rows, key=lambda row: row["seconds"]) == rows


def test_finished_run_is_left_alone(tmp_path, capfd, refused):
    """Asked for with other weights it is refused, sampled in another way it is not."""
    content = lambda: [(tmp_path / f"run.{end}").read_bytes() for end in ("pt", "jsonl")]
    model, before = trained(tmp_path / "run.pt"), content()
    again = trained(tmp_path / "run.pt", sample_steps=2)
    assert "finished" in capfd.readouterr().out
    assert equal(dict(model.state_dict()), dict(again.state_dict()))
    refused(lambda: trained(tmp_path / "run.pt", lr=0.5), "lr 0.003 there, 0.5 here", "--out",
            "delete")
    assert content() == before


@pytest.mark.parametrize("mode", ["nan", "steep"])
def test_non_finite_loss_or_gradient_stops_the_run(tmp_path, refused, mode):
    refused(lambda: trained(tmp_path / "run.pt", mode=mode), "step 6", "--lr")
    content = training.load(tmp_path / "run.pt")
    assert content["step"] == 4
    assert all(v.isfinite().all() for v in content["model"].values())


@pytest.mark.slow
def test_two_processes_share_one_model(tmp_path):
    """Two processes with 4 samples each = one process with the 8 samples, without noise."""
    run = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__,
                 tmp_path / "two.pt")
    assert run.returncode == 0 and run.stdout.count("step 12 ") == 1, run.stderr
    assert equal(*(torch.load(tmp_path / f"two.pt.rank{r}", weights_only=True) for r in range(2)))

    def both(step):
        parts = [batches(2 * step), batches(2 * step + 1)]
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    trained(tmp_path / "one.pt", both, mode="linear", ema=0.0, steps=3)
    one, two = (training.load(tmp_path / name)["model"] for name in ("one.pt", "two.pt.linear"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_load_refuses_what_it_should(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.save("deep/er/good.pt", kind="toy", model={"w": torch.ones(1000)}, step=3)
    assert training.load("deep/er/good.pt", kind="toy")["step"] == 3
    assert os.listdir("deep/er") == ["good.pt"]
    whole = (tmp_path / "deep/er/good.pt").read_bytes()
    intruder = type("Intruder", (), {"__reduce__": lambda self: (os.mkdir, ("intruded",))})
    torch.save({"kind": "toy", "model": intruder()}, "evil.pt")
    torch.save(torch.ones(3), "tensor.pt")
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", whole[:-200])):
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in ("missing", "empty", "text", "cut", "evil", "tensor"):
        refused(lambda: training.load(f"{name}.pt", "toy", "python toy.py --suite x"),
                f"{name}.pt", "python toy.py --suite x")
    assert not os.path.exists("intruded")
    refused(lambda: training.load("deep/er/good.pt", kind="video_planner"), "toy", "video_planner")


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_full_disk_leaves_the_old_file(tmp_path, refused, size):
    path = tmp_path / "run.pt"
    training.save(path, step=1)
    os.symlink("/dev/full", f"{path}.tmp")
    refused(lambda: training.save(path, step=2, model=torch.zeros(size)), "No space left", "run.pt")
    assert training.load(path)["step"] == 1 and os.listdir(tmp_path) == ["run.pt"]


def test_preset_fills_what_is_not_given(capfd, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse(Config, "", []).width == 8
    assert parse(Config, "", ["--preset", "paper"]).width == 512
    assert capfd.readouterr().out.splitlines() == [
        "preset laptop (of laptop, paper; CUDA: no)", "preset paper (of laptop, paper; CUDA: no)"]
    config = parse(Config, "", ["a.pt", "b.pt", "--width", "3", "--bf16", "--lr", "0.5"])
    assert (config.width, config.bf16, config.files, config.lr) == (3, True, ("a.pt", "b.pt"), 0.5)
    refused(lambda: parse(Config, "", ["--sizes", "3"]), "--sizes")     # only presets set it
    assert from_dict(Config, dataclasses.asdict(config)) == config
    refused(lambda: from_dict(Config, {"lr": 0.1, "horizon": 5}), "horizon")


def test_help_tells_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(Config, "what it does", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--sizes" not in text and "(default: laptop 8, paper 512)" in text
    for f in flags_of(Config):
        assert "--" * (f.name != "files") + f.name.replace("_", "-") in text
        assert f.metadata["help"] in text


def test_names_hold_what_differs_from_the_preset(tmp_path):
    """Two configurations that train differently never share a name; where the data lie and the
    like is in none, how a trained model is sampled only in those of its scores and picture."""
    @dataclasses.dataclass
    class Planner(PlannerConfig):
        objects: int = flag(3, "objects")
        grounded: bool = flag(False, "a switch")
        sample_steps: int = flag(20, "how it is sampled")
        PRESETS: ClassVar = {"laptop": dict(demos=20, steps=2000, size=96, batch=32, lr=1e-3)}

    config = lambda words: parse(Planner, "", f"--device cpu --preset laptop {words}".split())
    path = lambda words="": str(training.run_path(config(words), "mask"))
    assert path() == path("--data elsewhere --demos 20") == "runs/libero_spatial/mask.pt"
    names = [path(words) for words in (
        "--objects 1", "--objects 2", "--grounded", "--seed 1", "--lr 1", "--tasks 0,1",
        "--steps 9", "--demos 5", "--size 64", "--suite libero_spatial:2,libero_goal",
        "--suite libero_spatial:2", "--suite mt10", f"--tasks {','.join(map(str, range(90)))}")]
    assert len({path(), *names}) == len(names) + 1 and max(map(len, names)) < 120
    assert names[0] == "runs/libero_spatial/mask_objects1.pt" and names[3].endswith("mask_s1.pt")
    assert path("--name mine --lr 1") == "runs/libero_spatial/mine.pt"
    assert path("--sample-steps 5 --seed 1") == path("--seed 1")
    for words in ("", "--sample-steps 5 --seed 1"):
        training.report(config(f"--show {words}"), tmp_path / "mask.pt", "1 dB",
                        lambda: np.zeros((4, 6, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["mask.png", "mask.txt", "mask_sample_steps5.png",
                                            "mask_sample_steps5.txt"]


if __name__ == "__main__":      # one of two processes, of the test above
    result = trained(sys.argv[1])
    torch.save(dict(result.state_dict()), f"{sys.argv[1]}.rank{os.environ['RANK']}")
    trained(f"{sys.argv[1]}.linear", mode="linear", ema=0.0, steps=3)


@pytest.mark.parametrize("program", [["rollout.py"], ["-m", "results.tables"]])
def test_errors_name_the_command_that_was_given(program):
    stderr = python(*program, "--nothing").stderr
    assert f"(python {' '.join(program)} --help lists the flags)" in stderr


def test_code_is_what_sources_compute(tmp_path):
    """The hash of results: comments and docstrings change nothing, whatever else does."""
    shutil.copytree(f"{ROOT}/core", tmp_path / "core")

    def of(text):
        (tmp_path / "a.py").write_text(text)
        run = python("-c", "from core import files; print(files.code())", cwd=tmp_path)
        assert run.stdout, run.stderr
        return run.stdout
    assert of('"""One."""\nx = 1\n') == of('"""Two."""\nx = 1  # one\n') != of("x = 2\n")
    assert of("x = 1\n") == of('"""One."""\nx = 1\n') and of("x = ") != of("x = 1")
