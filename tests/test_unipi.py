"""unipi.py and feature_planner.py: pictures to reach, done, the features to come; what the gradient may teach."""

import numpy as np
import pytest
import torch

from conftest import COMMON, EXECUTOR, PLANNER, SIZE, SUITE, equal, run_and_kill

import executor
import rollout
import video_planner
from baselines import plex
from core import training
from core.episodes import Episodes
from core.flags import from_dict, parse
from video_control import unipi

VIDEO = [*COMMON, *"--steps 2 --channels 32 --multiples 1 2 --attention 8 --batch 2 --device cpu --no-bf16 "
                   "--sample-steps 2 --clips 3".split()]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A video planner, UniPi on it, a feature planner and an executor on that."""
    out = tmp_path_factory.mktemp("unipi")
    folder = out / SUITE
    where = ["--data", str(data), "--out", str(out)]
    quick = pytest.MonkeyPatch()
    silhouette = video_planner.train_silhouette
    quick.setattr(video_planner, "train_silhouette", lambda e: silhouette(e, steps=5))
    video_planner.main([*VIDEO, *where])
    quick.undo()
    unipi.main([*EXECUTOR, "--planner", str(folder / "video.pt"), *where])
    plex.main([*PLANNER, "--action-demos", "2", *where])
    executor.main([*EXECUTOR, "--planner", str(folder / "feature.pt"), *where])
    return folder


def frame():
    picture = np.random.default_rng(0).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
    return {"agentview_rgb": picture, "eye_in_hand_rgb": picture, "hand": np.zeros(2, np.float16),
            "ee_states": np.zeros(6, np.float32), "gripper_states": np.zeros(2, np.float32)}


# --- UniPi ----------------------------------------------------------------------------------------


def test_pictures_to_reach_lie_ahead_and_done_means_near(runs, data):
    config = parse(executor.Config, "", [*EXECUTOR, "--planner", "none", "--tasks", "0", "--data", str(data),
                                              "--batch", "64", "--out", str(runs.parent)])
    clone, plain, _ = executor.build(config)
    batches = unipi.SubgoalData(config, clone, plain.demos, plain.videos)
    episode, t, _ = plain.demos.draw(3, 64, 0)
    batch, again = batches(3), batches(3)
    assert batch["goal"].shape == (64, 1, SIZE, SIZE, 3) and np.array_equal(batch["goal"], again["goal"])
    near = 0
    for b in range(64):
        ahead = plain.demos.gather("obs/agentview_rgb", episode[b], t[b] + np.arange(1, unipi.FAR + 1))
        which = [k + 1 for k in range(len(ahead)) if np.array_equal(ahead[k], batch["goal"][b, 0])]
        assert which
        left = plain.demos.length[episode[b]] - 1 - t[b]
        assert batch["arrived"][b, 0] == (min(which[0], left) <= config.execute)
        near += batch["arrived"][b, 0]
    assert 10 <= near <= 40     # a tenth, and a quarter of the others


def test_done_goes_on_to_the_next_picture_and_open_loop_imagines_once(runs):
    model = unipi.load_policy(runs / "unipi_executor_d2.pt")
    imagined = []
    def imagine(now, goal, generator):
        imagined.append(goal)
        return torch.arange(video_planner.FRAMES).view(1, -1, 1, 1, 1).expand(-1, -1, SIZE, SIZE, 3).to(torch.uint8)
    model.executor.video.imagine = imagine
    model.reset(frame()["agentview_rgb"], 0)
    for sure, reached in ((-9.0, 0), (9.0, 3)):         # never done, then at every look
        torch.nn.init.constant_(model.executor.done.bias, sure)
        torch.nn.init.zeros_(model.executor.done.weight)
        for _ in range(3 * model.c.execute):
            model(frame())
        assert model.video[0][0, 0, 0] == reached
    assert len(imagined) == 1
    for _ in range(10 * model.c.execute):
        action = model(frame())
    assert len(model.video) == 1 and len(imagined) == 1 and action.shape == (7,)    # the last one stays
    model.replan = 2 * model.c.execute
    model.step = model.replan
    for _ in range(5 * model.c.execute):
        model(frame())
    assert len(imagined) == 4


def test_unipi_follows_the_picture_and_hears_done(runs):
    model = unipi.load_policy(runs / "unipi_executor_d2.pt").executor
    batch = {"state": torch.zeros(2, 1, 8), "picture": torch.zeros(2, 1, SIZE, SIZE, 3, dtype=torch.uint8)}
    batch |= {"wrist": batch["picture"], "goal": torch.randint(256, batch["picture"].shape, dtype=torch.uint8)}
    one = model(batch)[0]
    batch["goal"] = 255 - batch["goal"]
    assert not torch.allclose(one, model(batch)[0])
    batch |= {"action": torch.zeros(2, 1, model.config.chunk, 7), "waypoint": torch.zeros(2, 1, 3)}
    losses = [model.loss(batch | {"arrived": torch.full((2, 1), x)})[1]["done"] for x in (True, False)]
    assert abs(losses[0] - losses[1]) > 1e-6


def test_unipi_and_features_are_evaluated_and_counted(runs, tmp_path, capsys):
    checkpoint = str(runs / "unipi_executor_d2.pt")
    features = str(runs / "feature_executor_d2.pt")
    rollout.main([checkpoint, features, "--episodes", "1", "--workers", "1", "--replan", "100", "--results", str(tmp_path)])
    assert list((runs / "unipi_executor_d2_films").glob("*.mp4")) and list((runs / "feature_executor_d2_films").glob("*.mp4"))
    assert (tmp_path / f"{SUITE}_unipi-replan_laptop_d2_s0_1tasks.json").exists()
    rollout.main([checkpoint, "--cost", "--results", str(tmp_path)])
    rollout.main([checkpoint, "--cost", "--replan", "100", "--results", str(tmp_path)])
    once, often = (float(line.split(":")[1].split()[0]) for line in capsys.readouterr().out.splitlines()
                   if "TFLOPs" in line)
    assert often > once > 0
    with pytest.raises(SystemExit):
        unipi.main(["--planner", str(runs / "feature.pt")])
    assert "video_planner" in capsys.readouterr().err


def test_unipi_resumes_after_a_kill(runs, data, tmp_path):
    command = [*EXECUTOR, "--planner", str(runs / "video.pt"), "--data", str(data)]
    run_and_kill("unipi", "step", [*command, "--out", str(tmp_path)])
    unipi.main([*command, "--out", str(tmp_path)])
    whole, killed = (training.load(p / "unipi_executor_d2.pt") for p in (runs, tmp_path / SUITE))
    assert equal(whole["model"], killed["model"])


# --- features -------------------------------------------------------------------------------------


def batch_of(runs, data):
    planner = plex.load_planner(runs / "feature.pt").requires_grad_(True)
    episodes = Episodes(data, SUITE, planner_tasks(data), 2)
    made = plex.make_batch(episodes, 0, planner.config, episodes)
    return planner, {k: torch.as_tensor(v) for k, v in made.items()}


def planner_tasks(data):
    return [next(p.stem for p in (data / SUITE).glob("*.hdf5"))]


def test_the_future_teaches_the_planner_and_not_the_encoder(runs, data):
    planner, batch = batch_of(runs, data)
    for p in planner.parameters():
        torch.nn.init.normal_(p, std=0.05)
    weights = list(planner.encoder.parameters())
    none = lambda loss, params: all(g is None or not g.any() for g in torch.autograd.grad(
        loss, params, retain_graph=True, allow_unused=True))
    seen = torch.cat([batch["goal"][:, None], batch["frames"]], 1)
    whole, parts = planner.loss(batch)
    inverse = torch.nn.functional.mse_loss(planner.actions(*planner.encode(batch["pair"]).unbind(1)), batch["action"])
    future = whole - inverse
    assert abs(future.item() - parts["future"]) < 1e-4
    grads = [torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True) for x in (whole, inverse)]
    for a, b in zip(*grads):        # what teaches the encoder is the inverse dynamics alone
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))
    assert none(inverse, list(planner.gpt.parameters())) and not none(whole, list(planner.gpt.parameters()))
    whole.backward()
    assert [n for n, p in planner.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert seen.shape[1] == 1 + planner.config.history


def test_feature_plan_reaches_the_executor(runs, data):
    content = training.load(runs / "feature_executor_d2.pt")
    assert content["extra"]["planner"]["kind"] == "feature_planner"
    acting = unipi.load_policy(runs / "feature_executor_d2.pt")
    assert type(acting) is executor.Policy and acting.executor.config.plan_form == "latent"
    acting.reset(frame()["agentview_rgb"])
    assert acting(frame()).shape == (7,)
    config = from_dict(executor.Config, content["config"])
    assert executor.plan_name(config) == "feature"
    assert "stay" in (runs / "feature.txt").read_text() and (runs / "feature.png").stat().st_size


def test_features_taught_by_more_demonstrations_are_refused(runs, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        executor.main([*EXECUTOR, "--planner", str(runs / "feature.pt"), "--action-demos", "1", "--data", str(data), "--out", str(tmp_path)])
    assert "feature_planner.py" in capsys.readouterr().err and not list(tmp_path.iterdir())
