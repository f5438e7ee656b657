"""extract.py: the data file, its making in spite of interruptions, its reader."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from conftest import EXTRACT, ROOT, SIZE, SUITE

import extract
import mask_planner
import sims
from core.draw import COLOURS, draw_masks
from core.episodes import Episodes, HELD_OUT, assemble, split_assembled, write_episode
from core.files import fail, stop_if_full
from core.flags import parse
from demos import record
from demos.language import TEXTS, embed, text_model
from sims.camera import CAMERAS


@pytest.fixture
def copied(data, tmp_path, task):
    """A copy of the data that a test may break -> its folder, its file."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data", tmp_path / "data" / SUITE / f"{task}.hdf5"


def everything(path, skip=("seconds",)):
    """All datasets and attributes of a file as {name: plain values}; `skip`: attributes that are measured times."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item.dtype.str, item.shape, item[()].tobytes()
        found.update({f"{name}@{k}": np.asarray(v).tolist() for k, v in item.attrs.items() if k not in skip})

    with h5py.File(path) as f:
        f.visititems(visit)
    return found


# --- the file -------------------------------------------------------------------------------------


def test_layout(data_file, task):
    with h5py.File(data_file) as f:
        demos = f["data"]
        assert sorted(demos) == [f"demo_{i}" for i in range(4)]
        assert demos.attrs["total"] == sum(demos[d].attrs["num_samples"] for d in demos)
        assert demos.attrs["language_instruction"] == task.replace("_", " ")
        assert list(demos.attrs["objects"]) == ["robot", "akita_black_bowl_1", "plate_1"]
        assert list(demos.attrs["cameras"]) == ["agentview", "eye_in_hand"]
        assert (demos.attrs["size"], demos.attrs["source"], demos.attrs["render"]) == (SIZE, "scripted", "fast")
        info = json.loads(demos.attrs["env_args"])      # robomimic rebuilds the environment from it
        assert {"env_name", "type", "env_kwargs"} <= info.keys()
        assert json.loads(demos.attrs["problem_info"])["language_instruction"] == task.replace("_", " ")
        assert "mujoco" in json.loads(demos.attrs["versions"])
        filters = {k: [n.decode() for n in f["mask"][k]] for k in f["mask"]}
        assert filters == {"valid": ["demo_0", "demo_1"], "train": ["demo_2", "demo_3"]}


def test_episodes_have_the_documented_shapes(data_file, sim):
    picture = (SIZE, SIZE, 3), np.uint8
    wanted = {"actions": ((7,), np.float32), "states": (sim.state().shape, np.float64), "rewards": ((), np.float64),
              "dones": ((), np.uint8), "masks": ((SIZE, SIZE), np.uint8), "obs/agentview_rgb": picture,
              "obs/eye_in_hand_rgb": picture, "obs/ee_states": ((6,), np.float32),
              "obs/joint_states": ((7,), np.float32), "obs/gripper_states": ((2,), np.float32)}
    wanted |= {f"tracks/{c}": ((256, 2), np.float16) for c in CAMERAS}
    wanted["hand"] = (2,), np.float16
    wanted |= {f"visible/{c}": ((256,), np.bool_) for c in CAMERAS}
    with h5py.File(data_file) as f:
        for demo in f["data"].values():
            T = demo.attrs["num_samples"]
            found = {}
            demo.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
            assert {k: (v.shape[1:], v.dtype) for k, v in found.items()} == wanted
            assert 20 < T <= 2 * sim.horizon and all(len(v) == T for v in found.values())
            assert demo["rewards"][-1] == 1 and demo["dones"][:].tolist() == [0] * (T - 1) + [1]
            assert np.isfinite(demo["states"]).all() and np.isfinite(demo["actions"]).all()
            assert set(np.unique(demo["masks"])) == {0, 1, 2, 3}


def test_replaying_actions_and_noise_gives_the_states(data_file, sim):
    """Row t is what is seen before action t; recorded is the clean action, executed was the noisy one."""
    with h5py.File(data_file) as f:
        demo = f["data/demo_2"]
        seed, noise = int(demo.attrs["seed"]), float(demo.attrs["noise"])
        actions, states = demo["actions"][:], demo["states"][:]
        assert seed % record.RETRY == 2 and noise == extract.Config.noise
        rng, frame = np.random.default_rng(seed), sim.reset(seed=seed)
        assert all(np.array_equal(demo[key][0], frame[name]) for key, name in
                   (("obs/agentview_rgb", "agentview_rgb"), ("obs/eye_in_hand_rgb", "eye_in_hand_rgb"),
                    ("masks", "masks"), ("obs/ee_states", "ee_states")))
        for t, action in enumerate(actions):
            assert np.array_equal(sim.state(), states[t]), t
            if t == 30:
                assert np.array_equal(sim.frame()["agentview_rgb"], demo["obs/agentview_rgb"][t])
            sim.step(action + np.append(rng.normal(0, noise, 6), 0), observe=False)
        assert sim.success()


# --- making it ------------------------------------------------------------------------------------


def processes(marker):
    """Running processes with `marker` in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in environ.read_bytes() and (environ.parent / "cmdline").read_bytes():
                found.append(environ.parent.name)
        except OSError:     # it has ended meanwhile
            continue
    return found


def test_killed_extraction_continues_and_ends_with_the_same_file(tmp_path, data_file, task):
    """Killed with two processes at work; the unbroken extraction had one process, and made an episode more."""
    marker = f"MARK={tmp_path}"
    command = [sys.executable, os.path.join(ROOT, "extract.py"), *EXTRACT, "--demos", "1", "--workers", "2", "--data", str(tmp_path)]
    run = lambda: subprocess.Popen(command, env=os.environ | {"MARK": str(tmp_path)}, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
    broken, folder = run(), tmp_path / SUITE / task
    while not list(folder.glob("demo_*.hdf5")) and broken.poll() is None:
        time.sleep(0.02)
    assert len(processes(marker)) >= 3
    broken.send_signal(signal.SIGKILL)
    broken.wait()
    deadline = time.time() + 180
    while processes(marker) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes(marker), "workers outlive their parent"
    done = len(list(folder.glob("demo_*.hdf5")))
    assert 1 <= done < 3 and not folder.with_suffix(".hdf5").exists()
    out, err = run().communicate()
    assert f"data: {3 - done} scripted episodes" in out, err
    broken, whole = everything(tmp_path / SUITE / f"{task}.hdf5"), everything(data_file)
    for i in range(3):
        episode = {k: v for k, v in whole.items() if k.startswith(f"data/demo_{i}")}
        assert len(episode) > 10 and episode == {k: v for k, v in broken.items() if k.startswith(f"data/demo_{i}")}
    assert os.listdir(tmp_path / SUITE) == [f"{task}.hdf5"], "nothing else is left"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["second episode", "before the old file goes", "before the new file comes",
                                  "before the parts go"])
def test_a_kill_while_joining_or_splitting_loses_nothing(copied, task, monkeypatch, when, data_file):
    folder, path = copied
    parts, calls = path.with_suffix(""), []

    def kill(*arguments):
        calls.append(arguments)
        if when != "second episode" or len(calls) == 2:
            raise Killed
        return real(*arguments)

    owner, name = {"before the old file goes": (os, "remove"), "before the parts go": (shutil, "rmtree")}.get(
        when, (os, "replace"))
    if when in ("before the new file comes", "before the parts go"):
        split_assembled(path, parts)
    real = getattr(owner, name)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill)
        if path.exists():
            split_assembled(path, parts)
        assemble(path, parts, SUITE, task, SIZE, "fast")
    if path.exists():
        split_assembled(path, parts)        # as `ensure` does when more episodes are wanted
    assemble(path, parts, SUITE, task, SIZE, "fast")
    assert everything(path, skip=()) == everything(data_file, skip=())


def test_nothing_is_made_twice(copied, capsys):
    folder, path = copied
    before = path.stat().st_mtime_ns
    extract.main([*EXTRACT, "--data", str(folder), "--show"])
    assert "scripted episodes" not in capsys.readouterr().out and path.stat().st_mtime_ns == before
    import imageio.v3 as iio
    assert iio.imread(folder / f"{SUITE}.png").shape[1:] == (12 * SIZE, 3)


def test_a_scene_on_which_the_expert_fails_is_replaced(tmp_path, monkeypatch):
    episode = {"actions": np.zeros((3, 7)), "states": np.zeros((3, 5)), "rewards": np.zeros(3)}
    monkeypatch.setattr(sims, "make", lambda *arguments: type("Stand", (), {"close": lambda self: None})())
    monkeypatch.setattr(extract, "record", lambda sim, seed, noise: episode if seed > 2 * record.RETRY else None)
    monkeypatch.setattr(record.extract_chunk, "progress", type("Queue", (), {"put": print}), raising=False)
    job = [SUITE, "x", [1], str(tmp_path), SIZE, 0.1, "fast"]
    record.extract_chunk(job)
    with h5py.File(tmp_path / "demo_1.hdf5") as f:
        assert f.attrs["seed"] == 1 + 2 * record.RETRY
    monkeypatch.setattr(extract, "record", lambda sim, seed, noise: None)
    with pytest.raises(RuntimeError, match="20 scenes"):
        record.extract_chunk(job)
    del record.extract_chunk.sim, record.extract_chunk.key


def test_episodes_of_another_size_are_not_mixed(copied, task, refused):
    """Left by an interrupted run with other flags."""
    folder, path = copied
    split_assembled(path, path.with_suffix(""))
    before = sorted(os.listdir(path.with_suffix("")))
    refused(lambda: record.ensure(SUITE, [task], 2, folder, size=64), "96 px", "64 px", "--data")
    assert sorted(os.listdir(path.with_suffix(""))) == before


def test_other_peoples_or_other_noise_is_refused(copied, task, refused):
    folder, path = copied
    refused(lambda: record.ensure(SUITE, [task], 2, folder, SIZE, noise=0.3), "--noise 0.1", "0.3", "--data")
    with h5py.File(path, "a") as f:
        del f["data/demo_0/masks"]
    refused(lambda: Episodes(folder, SUITE, [task], 2), path, "lacks masks", "--data")


@pytest.mark.parametrize("missing", [*Episodes.KEYS, "obs", "tracks"])
def test_a_missing_group_is_named(copied, task, refused, missing):
    """In an episode that is read; the file stays."""
    folder, path = copied
    with h5py.File(path, "a") as f:
        del f[f"data/demo_3/{missing}"]
    before = path.read_bytes()
    refused(lambda: Episodes(folder, SUITE, [task], 2), path, f"data/demo_3/{missing}", "delete", f"python extract.py --suite {SUITE}")
    assert path.read_bytes() == before


@pytest.mark.parametrize("missing", ["source", "size", "render", "objects", "text_embedding"])
def test_a_missing_attribute_is_named(copied, task, refused, missing):
    folder, path = copied
    with h5py.File(path, "a") as f:
        del f["data"].attrs[missing]
    refused(lambda: extract.main([*EXTRACT, "--data", str(folder)]), path, f"lacks {missing}", "delete")


def die(how):
    os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else fail("no such thing: choose another")


@pytest.mark.parametrize("how, word", [("killed", "killed"), ("refused", "no such thing")])
def test_a_worker_that_ends_ends_the_run(refused, how, word):
    """multiprocessing.Pool alone would wait for its result for ever."""

    def run():
        with record.pool(1, die) as (workers, queue):
            list(record.watch(workers.imap_unordered(die, [how]), queue, 1, 1, "test"))

    from tqdm import tqdm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "tqdm", lambda **keywords: tqdm(**keywords | {"disable": True}))
        refused(run, word)


# --- a full disk ----------------------------------------------------------------------------------

full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@full
def test_full_disk_while_joining(copied, task, refused):
    folder, path = copied
    split_assembled(path, path.with_suffix(""))
    os.symlink("/dev/full", path.with_suffix(".tmp"))
    whole = sorted(os.listdir(path.with_suffix("")))
    refused(lambda: record.ensure(SUITE, [task], 2, folder, SIZE, workers=1), "full", folder, "--data")
    assert sorted(os.listdir(path.with_suffix(""))) == whole and not path.exists()


@full
def test_full_disk_while_writing_an_episode(tmp_path, refused):
    """The error crosses from the worker to its parent by pickle."""
    episode = {"actions": np.zeros((30, 7)), "masks": np.zeros((30, 64, 64), np.uint8)}
    os.symlink("/dev/full", tmp_path / "demo_0.part")
    with pytest.raises(OSError) as error:
        write_episode(tmp_path / "demo_0.hdf5", episode, seed=0)
    assert not (tmp_path / "demo_0.hdf5").exists()
    carried = pickle.loads(pickle.dumps(error.value))
    refused(lambda: stop_if_full(carried, "data"), "full", "--data")


def test_other_errors_are_shown():
    with pytest.raises(OSError):
        stop_if_full(OSError(errno.EACCES, "denied"), "data")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "no episodes"])
def test_broken_file_is_one_line_and_stays(copied, refused, damage):
    folder, path = copied
    whole = path.read_bytes()
    if damage == "no episodes":
        with h5py.File(path, "w") as f:
            f.attrs["made by"] = "somebody else"
    else:
        path.write_bytes({"cut": whole[:len(whole) // 2], "text": b"hello" * 1000, "empty": b""}[damage])
    before = path.read_bytes()
    refused(lambda: extract.main([*EXTRACT, "--data", str(folder)]), path, "delete")
    assert path.read_bytes() == before


def test_missing_file(tmp_path, refused, task):
    refused(lambda: Episodes(tmp_path, SUITE, [task], 1), tmp_path, f"python extract.py --suite {SUITE}")


def test_too_few_videos(data, refused, task):
    refused(lambda: Episodes(data, SUITE, [task], 3), "2 videos, not 3", "--demos 3")


def test_other_size_or_rendering(data, refused):
    where = ["--data", str(data)]
    refused(lambda: extract.main([*EXTRACT, *where, "--size", "64"]), "96 px", "64 px", "--data")
    refused(lambda: extract.main([*EXTRACT, *where, "--render", "faithful"]), "fast", "faithful", "--data")


@pytest.mark.parametrize("flags, words", [
    (["--suite", "libero_space"], ["libero_space", *sims.SUITES]), (["--tasks", "77"], ["77", "0 to 9"]),
    (["--demos", "0"], ["--demos 0", "1 or more"]), (["--workers", "0"], ["--workers 0"]),
    (["--size", "8"], ["--size 8"]), (["--noise", "-1"], ["--noise -1"]), (["--noise", "nan"], ["--noise nan"])])
def test_bad_flags(tmp_path, refused, flags, words):
    refused(lambda: extract.main([*EXTRACT, "--data", str(tmp_path / "data"), *flags]), *words)
    assert not (tmp_path / "data").exists()


def test_data_has_the_size_that_stage_1_trains_on():
    """Else `extract.py --show` after `mask_planner.py` would find pictures of another size."""
    for preset in ("laptop", "paper"):
        argv = ["--preset", preset, "--device", "cpu"]
        ours, theirs = parse(extract.Config, "", argv), parse(mask_planner.Config, "", argv)
        assert (ours.size, ours.demos) == (theirs.size, theirs.demos)


# --- reading --------------------------------------------------------------------------------------


def test_pictures_are_mapped_into_memory(videos):
    for key in ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks"):
        assert all(isinstance(a, np.memmap) and not a.flags.writeable for a in videos.arrays[key])


def test_gather_is_the_file(videos, data_file):
    """Rows in any shape, ends repeated."""
    last = videos.length - 1
    episode, t = np.array([[0, 1], [1, 0]]), np.array([[5, -3], [10_000, 0]])
    with h5py.File(data_file) as f:
        for key in Episodes.KEYS:
            zero, one = f["data/demo_2"][key], f["data/demo_3"][key]
            wanted = np.stack([np.stack([zero[5], one[0]]), np.stack([one[last[1]], zero[0]])])
            assert np.array_equal(videos.gather(key, episode, t), wanted), key


def test_draw_is_a_function_of_seed_and_step(videos):
    first = [videos.draw(step, 8, 0)[:2] for step in range(5)]
    again = [videos.draw(step, 8, 0)[:2] for step in (4, 3, 2, 1, 0)][::-1]
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], videos.draw(0, 8, 1)[:2])
    assert videos.draw(3, 8, 0)[2].random() == videos.draw(3, 8, 0)[2].random()


def test_draw_takes_every_frame_equally_often(videos):
    episode, t, _ = videos.draw(0, 40_000, 0)
    assert (t >= 0).all() and (t < videos.length[episode]).all()
    count = np.bincount(videos.start[episode] + t, minlength=len(videos))
    assert len(count) == len(videos) and count.min() > 0.75 * 40_000 / len(videos)


def test_goal_is_another_episode_of_the_task(videos):
    many = Episodes.__new__(Episodes)
    many.task, many.own_goal = np.repeat(np.arange(3), 4), np.zeros(12, bool)
    episode = np.tile(np.arange(12), 20)
    goal = many.goal_of(episode, np.random.default_rng(0))
    assert (many.task[goal] == many.task[episode]).all() and (goal != episode).all()
    assert all(len(set(goal[episode == e])) == 3 for e in range(12)), "each of the others"
    assert videos.goal_of(np.array([0, 1]), np.random.default_rng(0)).tolist() == [1, 0]
    many.task = np.array([0])
    assert many.goal_of(np.array([0]), np.random.default_rng(0)).tolist() == [0], "the only one there is"
    many.task, many.own_goal = np.zeros(4), np.ones(4, bool)
    assert many.goal_of(np.array([2, 0]), np.random.default_rng(0)).tolist() == [2, 0], "its own: goals differ between scenes"


def test_training_and_validation_are_disjoint(videos, data, task):
    held_out = Episodes(data, SUITE, [task], 2, split="valid")
    assert len(held_out.length) == HELD_OUT and len(videos.length) == 2
    for a in videos.arrays["obs/agentview_rgb"]:
        assert not any(np.array_equal(a[0], b[0]) for b in held_out.arrays["obs/agentview_rgb"])


def test_draw_masks():
    image = np.full((2, 3, 3), 255, np.uint8)
    masks = np.array([[0, 1, 2], [3, 4, 5]])
    drawn = draw_masks(image, masks, opacity=0.5)
    assert drawn.dtype == np.uint8 and (drawn[0, 0] == 255).all()
    for k in range(1, 5):
        assert (drawn.reshape(-1, 3)[k] == (127.5 + COLOURS[k] / 2).astype(np.uint8)).all()
    assert np.array_equal(image, np.full((2, 3, 3), 255)), "the picture itself stays"


# --- language -------------------------------------------------------------------------------------


def test_sentences_that_mean_the_same_are_near(videos, task):
    said = [embed(s) for s in ("pick up the black bowl and place it on the plate", "put the black bowl on the plate",
                                       "open the door")]
    assert said[0].shape == (384,) and np.linalg.norm(said[0]) == pytest.approx(1, abs=1e-5)
    assert said[0] @ said[1] > 0.9 > 0.5 > said[0] @ said[2]
    assert np.array_equal(videos.text, embed(task.replace("_", " "))[None])


def test_other_text_models(tmp_path, monkeypatch, refused):
    """Of the same classes, small, with random weights; without weights one line says how to get them."""
    import transformers
    text_model.cache_clear()
    tokenizer, _ = text_model("minilm")
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    networks = {"bert": transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **small)),
                "clip": transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, text_config=dict(
                    vocab_size=len(tokenizer), eos_token_id=102, **small), vision_config=small | dict(image_size=32, patch_size=16)))}
    for name, network in networks.items():
        refused(lambda: embed("open", name), TEXTS[name], "hf download", "--text minilm")
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        monkeypatch.setitem(TEXTS, name, str(tmp_path / name))
    assert embed("open", "bert").shape == (32,) and embed("open", "clip").shape == (24,)
    text_model.cache_clear()


def test_tasks_that_the_expert_fails_are_skipped_by_name(tmp_path, monkeypatch, capsys):
    names = sims.tasks(SUITE)
    tasks = {name: {"success": 10 if k else 4, "episodes": 10, "steps": 9} for k, name in enumerate(names)}
    result = {"suite": SUITE, "unseen": None, "episodes": 100, "success": 94, "tasks": tasks}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{SUITE}_expert_seeds_from_2000.json").write_text(json.dumps(result))
    monkeypatch.chdir(tmp_path)
    assert record.choose_tasks(SUITE, "", "data") == names[1:]
    assert "40 %" in (said := capsys.readouterr().out) and names[0] in said
    assert record.choose_tasks(SUITE, "0", "data") == names[:1]
