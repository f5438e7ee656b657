"""What every planner keeps to: gradients, token sets, one batch overfitted, its program."""

import importlib

import pytest
import torch

from conftest import EXECUTOR, SIZE, TRAIN, equal, overfit, without_gradient
import executor
import rollout
from core import training
from core.episodes import Episodes
from core.planners import load_planner

CASES = {"mask": ["mask_planner"], "grounded": ["mask_planner", "--grounded"],
         "points": ["track_planner", "--goal", "language", "--mask-ratio", "0.5"],
         "hand": ["track_planner", "--track", "ee"], "video": ["video_planner"],
         "sentence": ["video_planner", "--goal", "language"], "feature": ["baselines.plex"]}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_plans(name, untrained, obs):
    """Every parameter learns.  The plan depends on what is seen and on the task, the picture's
    tokens on the former; the encoded goal, a control, on the task alone."""
    planner, batches, *_ = untrained(*CASES[name])
    torch.manual_seed(0)
    for p in planner.parameters():      # no zeros at the start hide what lies before them
        torch.nn.init.normal_(p, std=0.1)
    planner.train().loss(batches(0))[0].backward()
    assert not without_gradient(planner)
    tasks = obs | {"goal": obs["goal"].flip(0), "text": -obs["text"]}
    seen = obs | {k: 255 - obs[k] for k in ("frames", "wrist")}
    assert planner.eval().forms[0] == ("tracks" if name == "points" else "latent")
    for form in planner.forms:
        sets, (plan, other, later) = planner.sets(form), (planner.plan(o, form)
                                                          for o in (obs, tasks, seen))
        brought = {"plan"} if form.startswith("tracks") else {"plan", "picture"}
        assert {*plan} == {*sets} == brought
        for k, (places, width) in sets.items():
            assert plan[k].shape == (2, len(places), width) and not plan[k].requires_grad
            assert places.shape[1] == 3 and 0 <= places[:, 1:].min() <= places[:, 1:].max() <= 1
            assert torch.equal(plan[k], other[k]) == (k == "picture")
            assert plan[k].isfinite().all()
            assert torch.equal(plan[k], later[k]) == (form == "goal" and k == "plan")


@pytest.mark.slow
@pytest.mark.parametrize("name, share", [("grounded", 0.3), ("hand", 0.1), ("feature", 0.5)])
def test_one_batch_is_overfitted(untrained, name, share):
    """In so long a run that all pixels count from the first step to the last."""
    planner, batches, *_ = untrained(*CASES[name], "--batch", "2", "--steps", "1000000")
    if name == "hand":
        planner.eval().train = lambda mode=True: planner    # not augmented
    first, last = overfit(planner, batches(0), 120)
    assert all(last[k] < share * first[k] for k in first), (first, last)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["mask_planner", "track_planner", "video_planner", "executor",
                                     "baselines.plex", "baselines.vpt", "video_control.flow"])
def test_the_papers_preset_steps(untrained, monkeypatch, program):
    """Its networks, on two samples of the pictures that are there."""
    presets = importlib.import_module(program).Config.PRESETS
    few = {"size": SIZE, "batch": 2, "demos": 2, "action_demos": 2}
    monkeypatch.setitem(presets, "paper", {k: few.get(k, v) for k, v in presets["paper"].items()})
    model, batches, *_ = untrained(program, "--preset", "paper",
                                   *["--planner", "none"] * (program == "executor"))
    loss, _ = model.train().loss(batches(0))
    loss.backward()
    assert loss.isfinite() and sum(p.grad is not None for p in model.parameters()) > 20


@pytest.mark.parametrize("name", ["grounded", "points", "hand", "video", "feature"])
def test_program(data, mask_path, tmp_path, capfd, name):
    """What training and --show print and leave."""
    program, *flags = CASES[name]
    flags += ["--objects", "2", "--seed", "1"] if name == "grounded" else []
    for more in ([], ["--show"]):
        importlib.import_module(program).main(
            [*TRAIN, "--data", str(data), "--out", str(tmp_path), *flags, *more])
        path, out = next(tmp_path.glob("*/*.pt")), capfd.readouterr().out
        assert path.with_suffix(".txt").read_text() in out and f"--planner {path}" in out
        path.with_suffix(".png").unlink()
    planner, content = load_planner(path), training.load(path)
    assert equal(dict(planner.state_dict()), dict(content["ema"] or content["model"]))
    assert not planner.training and not any(p.requires_grad for p in planner.parameters())
    if name == "grounded":
        assert planner.progress.item() == pytest.approx(1) and planner.config.objects == 2
        assert not planner.position.equal(load_planner(mask_path).position), "of another seed"


@pytest.mark.parametrize("program, of", [
    ("mask_planner", ""), ("track_planner", ""), ("video_planner", ""), ("baselines.plex", ""),
    ("executor", "none"), ("executor", "mask"), ("video_control.unipi", "video")])
def test_interrupted_training_continues_exactly(data, tmp_path, request, monkeypatch, program, of,
                                                refused):
    """Saved after two steps, interrupted in the fourth: nothing can be made on that."""
    path = request.getfixturevalue(f"{of}_path") if of not in ("", "none") else of
    argv = [*TRAIN, "--data", str(data), *["--planner", str(path)] * bool(of), "--out"]
    module, sample = importlib.import_module(program), Episodes.sample_frames
    monkeypatch.setattr(module.Config, "save_every", 2)

    def interrupted(self, step, *rest, **named):
        if step == 3:
            raise KeyboardInterrupt
        return sample(self, step, *rest, **named)

    module.main([*argv, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Episodes, "sample_frames", interrupted)
        module.main([*argv, str(tmp_path / "broken")])
    load = lambda folder: training.load(next(tmp_path.glob(f"{folder}/*/*.pt")))
    assert load("broken")["step"] == 2
    half = str(next(tmp_path.glob("broken/*/*.pt")))
    of_it = {"executor": rollout.main, "video_control.unipi": module.main}.get(
        program, lambda argv: executor.main([*EXECUTOR, "--planner", *argv]))
    refused(lambda: of_it([half]), "at step 2 of 5", "continues")
    torch.rand(7)       # --seed alone decides
    module.main([*argv, str(tmp_path / "broken")])
    one, other = load("whole"), load("broken")
    assert all(equal(one[k], other[k]) for k in ("model", "ema", "optimizer", "step"))
