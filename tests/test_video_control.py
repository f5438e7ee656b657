"""video_control: the flow network, AVDC, UniPi; motions and subgoals are tested by course/."""

import json

import numpy as np
import pytest
import torch

from conftest import EXECUTOR, SIZE, simulator, tensors, without_gradient
import executor
import rollout
import video_planner
from video_control import avdc, flow, unipi
from video_planner import FRAMES

button = simulator("avdc", "button-press", 96)


def test_network_learns_a_shift():
    """Noise moved by (6, -2) pixels of 32; every parameter gets a gradient.  The flow of mirror
    images is mirrored, and read between pixels."""
    torch.manual_seed(0)
    net, generator = flow.FlowNet(flow.Config(size=32, updates=2)), torch.Generator().manual_seed(0)
    a = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=generator)
    left, right = a.numpy()
    found, mirrored = net.eval().flow(left, right), net.flow(left[:, ::-1], right[:, ::-1])
    assert found.shape == (128, 128, 2) and abs(found).max() > 1e-4
    assert np.allclose(mirrored[:, ::-1] * [-1, 1], found, atol=1e-5)
    batch = {"a": a, "b": a.roll((-2, 6), (1, 2)), "object": torch.zeros(2, 200),
             "flow": torch.tensor([6 / 32, -2 / 32]).expand(2, 200, 2)}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for step in range(21):
        places = torch.rand(2, 200, 2, generator=generator)
        inside = (places[..., 0] < 0.8) & (places[..., 1] > 0.1)    # the rest goes round the edge
        optimizer.zero_grad()
        net.train(step == 0).loss(batch | {"places": places, "known": inside})[0].backward()
        assert not without_gradient(net)
        if step:            # neither blurred nor noisy
            optimizer.step()
    found = net(a, batch["b"])[-1].detach()[0, :, 48:80, 24:64] * 32
    assert abs(found - torch.tensor([6, -2]).view(2, 1, 1)).mean() < 1
    field = np.zeros((4, 6, 2), np.float32)
    field[1, 2] = [0.5, -0.25]
    middle = np.array([[2.5 / 6, 1.5 / 4], [3.0 / 6, 1.5 / 4]])
    assert np.allclose(flow.sample_flow(field, middle), [[0.5, -0.25], [0.25, -0.125]])


def test_pictures_look_alike_where_points_go(videos):
    """Of what moves by over two pixels, in colour; so do mirrored pairs."""
    pairs = flow.make_pairs(videos, 3, 64, 0)
    for pairs in map(tensors, (pairs, flow.mirrored(pairs))):
        a, b = (pairs[k].float().movedim(-1, 1) for k in "ab")      # (B, 3, H, W)
        places, way = pairs["places"], pairs["flow"]
        off = lambda there: (flow.read(b, places + there) - flow.read(a, places)).abs().mean(-1)
        moving = pairs["known"] & (way.norm(dim=-1) * SIZE > 2)
        assert moving.sum() > 500 and pairs["object"].any()
        assert off(way)[moving].mean() < 0.6 * off(0 * way)[moving].mean()


def test_degraded_pictures_are_blurred_and_noisy():
    """Stripes of one pixel, black and white, become grey; a mean stays."""
    stripes = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    for share in (0.0, 1.0):
        rough = flow.degrade(stripes, share)
        assert rough.dtype == torch.uint8 and abs(rough.float().mean() - 127.5) < 1
        assert (rough.float().std((1, 2, 3)) < 10).float().mean() == share


def test_exact_correspondence_solves_a_scene(button):
    actor = avdc.Actor(button, "oracle", None, replans=5)
    success, ever, steps, pictures = rollout.play(button, actor, {"seed": 7}, film=True)
    assert success and ever and steps < 200 and actor.mode == "push"
    assert len(pictures) > 10 and pictures[0].shape[1] == 3 * 96


def test_imagined_pictures_are_followed_by_their_flow(button):
    """A video in which nothing moves: the subgoals stay in place, and it imagines again."""
    def imagine(obs, generator):
        assert obs["goal"].shape == (1, 96, 96, 3) and obs["text"].shape == (1, 384)
        return obs["frames"].expand(1, FRAMES, 96, 96, 3)

    still = torch.nn.Linear(1, 1)
    still.imagine = imagine
    actor = avdc.Actor(button, still, flow.dis_flow, replans=1)
    actor.reset(button, {"seed": 7})
    button.reset(seed=7)
    assert actor(button).shape == (4,) and actor.plans_left == 1
    assert len(actor.pictures) == 1 + FRAMES and np.ptp(actor.planned, 0).max() < 0.01
    for _ in range(avdc.PATIENCE):      # a hand that stands still
        actor(button)
    assert actor.plans_left == 0


@pytest.mark.slow
def test_true_and_imagined_videos_are_evaluated(tmp_path):
    where = ["--suite", "avdc", "--tasks", "button-press", "--out", str(tmp_path)]
    train = [*EXECUTOR, *where, "--data", str(tmp_path / "data")]
    flow.main(train)
    assert "moving object" in (tmp_path / "avdc/flow.txt").read_text()
    video_planner.main([*train, "--goal", "language", "--name", "video"])
    avdc.main(["oracle", "true", str(tmp_path / "avdc/video.pt"), *where, "--episodes", "1",
               "--workers", "1", "--results", str(tmp_path)])
    about = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    of = "_tasksbutton-press"       # of the flow network, too
    assert [r["plan"] for r in about] == [f"flow-generated{of}", "flow-oracle", f"flow-true{of}"]
    assert [r["config"]["flow"]["steps"] for r in about[::2]] == [5, 5] and not about[1]["config"]
    flow.main([*train, "--steps", "6", "--out", str(tmp_path / "other")])
    config = avdc.Config(out=str(tmp_path / "other"), results=str(tmp_path))
    longer, *_ = avdc.about_future("true", config)
    path = rollout.result_path(config, longer | {"suite": "avdc"})
    assert path.name == f"avdc_flow-true{of}_steps6.json"


def test_pictures_to_reach_lie_ahead_and_done_is_near(untrained, video_path, videos, monkeypatch):
    monkeypatch.setitem(executor.Config.PRESETS["tiny"], "batch", 64)
    model, batches, *_ = untrained("video_control.unipi", "--planner", video_path)
    (episode, t, _), batch = videos.sample_frames(3, 64, 0), batches(3)
    assert torch.equal(batch["goal"], batches(3)["goal"])
    ahead = videos.gather("obs/agentview_rgb", episode[:, None], t[:, None] + np.arange(1, 17))
    same = (ahead == batch["goal"][:, :1].numpy()).all((2, 3, 4))       # (64, 16)
    assert same.any(1).all()
    steps = np.minimum(1 + same.argmax(1), videos.length[episode] - 1 - t)
    arrived = batch["arrived"][:, -1].numpy()
    assert np.array_equal(arrived, steps <= 4)
    assert 10 <= arrived.sum() <= 40        # a tenth, and a quarter of the others
    few = {k: v[:4] for k, v in batch.items()}
    seen = [model.eval()(b)[1] for b in (few, few | {"goal": few["goal"].flip(0)})]
    assert not torch.allclose(*seen)
    done = [model.eval().loss(few | {"arrived": torch.full((4, 1), x)})[1]["done"] for x in (0, 1)]
    assert abs(done[0] - done[1]) > 1e-6
    assert not model.train().video.training
    assert not any(p.requires_grad for p in model.video.parameters())


def test_done_goes_on_to_the_next_picture_and_open_loop_imagines_once(unipi_path, sim):
    model = executor.load_executor(unipi_path, Kind=unipi.InverseDynamics)
    actor, imagined = unipi.UniPi(model, 0), []

    def imagine(obs, generator):
        imagined.append(obs)
        count = torch.arange(FRAMES, dtype=torch.uint8).view(1, -1, 1, 1, 1)
        return count.expand(1, FRAMES, SIZE, SIZE, 3)

    model.video.imagine, execute = imagine, actor.execute
    actor.reset(sim, {"seed": 0})
    sim.reset(seed=0)
    for sure, reached in ((-9.0, 0), (9.0, 3)):         # never done, then at every look
        torch.nn.init.constant_(model.done.bias, sure)
        torch.nn.init.zeros_(model.done.weight)
        for _ in range(3 * execute):
            actor(sim)
        assert actor.video[0][0, 0, 0] == reached
    assert len(imagined) == 1
    for _ in range(10 * execute):
        action = actor(sim)
    assert len(actor.video) == 1 and len(imagined) == 1 and action.shape == (7,)    # the last stays
    actor.replan = 2 * execute
    for _ in range(5 * execute):
        actor(sim)
    assert len(imagined) == 4


@pytest.mark.slow
def test_unipi_is_evaluated(unipi_path, tmp_path):
    words = ["--episodes", "1", "--workers", "1", "--results", str(tmp_path)]
    for more in ([], ["--replan", "100"]):
        unipi.main([str(unipi_path), *words, *more])
    names = sorted(path.name.split("_")[2] for path in tmp_path.glob("*.json"))
    assert names == ["unipi", "unipi-replan"]
