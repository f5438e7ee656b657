"""record.py: data files are made in spite of interruptions, and what is refused; language.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from tqdm import tqdm

from conftest import COMMON, FRAME, ROOT, SIZE, SUITE, arrays, everything
import sims
from core.episodes import CAMERAS, split_assembled
from core.files import fail
from demos import record
from demos.language import embed
from demos.libero import UNSOLVED


def test_layout(data_file, task, sim):
    wanted = {"actions": ((7,), np.float32), "states": (sim.state().shape, np.float64),
              "rewards": ((), np.float64), "dones": ((), np.uint8)}
    wanted |= {k if k in ("masks", "hand") else f"obs/{k}": v for k, v in FRAME.items()}
    for c in CAMERAS:
        wanted |= {f"tracks/{c}": ((256, 2), np.float16), f"visible/{c}": ((256,), np.bool_)}
    with h5py.File(data_file) as f:
        about, demos, language = f["data"].attrs, f["data"], task.replace("_", " ")
        assert [about[k] for k in ("env", "size", "source", "render", "language_instruction")] == [
            SUITE, SIZE, "scripted", "fast", language]
        assert list(about["objects"]) == ["robot", "akita_black_bowl_1", "plate_1"]
        assert list(about["cameras"]) == list(CAMERAS) and not about["goal_varies"]
        # robomimic rebuilds the environment from it
        assert {"env_name", "type", "env_kwargs"} <= json.loads(about["env_args"]).keys()
        assert json.loads(about["problem_info"])["language_instruction"] == language
        assert "mujoco" in json.loads(about["versions"])
        assert {k: [n.decode() for n in f["mask"][k]] for k in f["mask"]} == {
            "valid": ["demo_0", "demo_1"], "train": ["demo_2", "demo_3"]}
        assert len(demos) == 4
        for demo in demos.values():
            T = demo.attrs["num_samples"]
            assert {k: (v.shape, v.dtype) for k, v in arrays(demo).items()} == {
                k: ((T, *shape), dtype) for k, (shape, dtype) in wanted.items()}
            assert 20 < T <= 2 * sim.horizon
            assert demo["rewards"][-1] == 1 and demo["dones"][:].tolist() == [0] * (T - 1) + [1]
            assert np.isfinite(demo["states"]).all() and np.isfinite(demo["actions"]).all()
            assert set(np.unique(demo["masks"])) == {0, 1, 2, 3}


def test_replaying_actions_and_noise_gives_the_states(data_file, sim):
    """Row t is what is seen before action t; recorded is the clean action, executed the noisy."""
    with h5py.File(data_file) as f:
        demo = f["data/demo_2"]
        seed, noise = int(demo.attrs["seed"]), float(demo.attrs["noise"])
        assert seed % record.RETRY == 2 and noise == record.NOISE
        rng, _ = np.random.default_rng(seed), sim.reset(seed=seed)
        for t, action in enumerate(demo["actions"][:]):
            assert np.array_equal(sim.state(), demo["states"][t]), t
            for name, value in sim.frame().items() if t in (0, 30) else ():
                there = demo[name if name in demo else f"obs/{name}"][t]
                assert np.array_equal(there, value), name
            sim.step(action + np.append(rng.normal(0, noise, 6), 0), observe=False)
        assert sim.success()


def processes(marker):
    """Running processes with `marker` in their environment, which of a zombie is empty."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile
            found += [environ] * (marker.encode() in environ.read_bytes())
    return found


@pytest.mark.slow
def test_killed_recording_continues_and_ends_with_the_same_file(tmp_path, data_file, task):
    """Killed with two processes at work; the unbroken one had one, and made an episode more."""
    command = [sys.executable, os.path.join(ROOT, "extract.py"), *COMMON, "--demos", "1",
               "--workers", "2", "--data", str(tmp_path)]
    run = lambda: subprocess.Popen(command, env=os.environ | {"MARK": str(tmp_path)}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    broken, folder, marker = run(), tmp_path / SUITE / task, f"MARK={tmp_path}"
    while not list(folder.glob("demo_*.hdf5")) and broken.poll() is None:
        time.sleep(0.02)
    assert len(processes(marker)) >= 3
    broken.kill()
    broken.wait()
    deadline = time.time() + 180
    while processes(marker) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes(marker), "workers outlive their parent"
    done = len(list(folder.glob("demo_*.hdf5")))
    assert 1 <= done < 3 and not folder.with_suffix(".hdf5").exists()
    out, err = run().communicate()
    assert f"data: {3 - done} scripted episodes" in out, err
    whole, again = everything(data_file), everything(folder.with_suffix(".hdf5"))
    assert all(whole[key] == value for key, value in again.items() if key.startswith("data/demo"))
    assert os.listdir(tmp_path / SUITE) == [f"{task}.hdf5"], "nothing else is left"


def test_a_scene_on_which_the_demonstrator_fails_is_replaced(tmp_path, monkeypatch):
    rows = {"actions": np.zeros((3, 7)), "masks": np.zeros((3, 5)), "rewards": np.zeros(3)}
    monkeypatch.setattr(sims, "make", lambda *_, **look: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(record, "record", lambda sim, seed: (
        rows if seed > 2 * record.RETRY else None))
    job = SUITE, "x", {"size": SIZE, "render": "fast"}, tmp_path, [1]
    assert list(record.record_episodes(job)) == [1]
    with h5py.File(tmp_path / "demo_1.hdf5") as f:
        assert f.attrs["seed"] == 1 + 2 * record.RETRY
    monkeypatch.setattr(record, "record", lambda sim, seed: None)
    with pytest.raises(RuntimeError, match="20 scenes"):
        list(record.record_episodes(job))


def play(job):
    """A worker's job: what it yields, and how it ends."""
    for k in job[1:]:
        yield k, os.environ["OMP_NUM_THREADS"]
    if job[0] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif job[0] == "refused":
        fail("no such thing: choose another")
    elif job[0] == "crashed":
        raise RuntimeError("exploded")


@pytest.mark.slow
def test_processes(refused, monkeypatch):
    """One thread each; one that ends ends the run."""
    run = lambda *jobs: list(record.run_jobs(play, jobs, 2, 3, "test", opengl=False))
    assert sorted(run(("", 1, 2), ("", 3))) == [(1, "1"), (2, "1"), (3, "1")]
    refused(lambda: run(("killed", 1)), "killed", "--workers")
    # a worker's line does not end the bar's
    monkeypatch.setattr(record, "tqdm", lambda **given: tqdm(**given | {"disable": True}))
    refused(lambda: run(("refused", 1)), "no such thing")
    with pytest.raises(RuntimeError, match="exploded"):
        run(("crashed", 1))


def test_other_settings_are_not_mixed(copied, task, refused):
    """Neither with a file nor with what an interrupted run left; and nothing is made twice."""
    again = lambda **other: record.ensure(SUITE, [task], 2, copied[0], **{"size": SIZE} | other)
    path, before = copied[1], copied[1].stat().st_mtime_ns
    again()
    assert path.stat().st_mtime_ns == before
    for _ in range(2):
        refused(lambda: again(size=96), f"--size {SIZE}", "--size 96", "--data")
        refused(lambda: again(render="faithful"), "fast", "faithful", "--data")
        if path.exists():
            split_assembled(path, path.with_suffix(""))
    assert os.listdir(path.parent) == [path.stem]
    os.symlink("/dev/full", path.with_suffix(".tmp"))
    refused(again, "No space", copied[0])
    assert len(os.listdir(path.with_suffix(""))) == 4 and not path.exists()


def test_unsolved_tasks_are_left_out_unless_named(tmp_path, data_file, capfd):
    everyone, poor = sims.tasks("libero_90"), sorted(UNSOLVED)
    assert UNSOLVED < set(everyone)
    names = record.task_names("libero_90", "", tmp_path)
    assert names == [name for name in everyone if name not in UNSOLVED] and len(names) == 83
    assert all(name in out for out in [capfd.readouterr().out] for name in poor)
    assert record.task_names("libero_90", f"{poor[1]},0", tmp_path) == [everyone[0], poor[1]]
    (tmp_path / "libero_90").mkdir()
    with h5py.File(shutil.copy(data_file, tmp_path / "libero_90" / f"{poor[0]}.hdf5"), "a") as f:
        f["data"].attrs["source"] = "official"
    assert poor[0] in record.task_names("libero_90", "", tmp_path), "others demonstrate it"


def test_a_suite_of_files_and_two_suites_mixed(copied, task, refused):
    """Pictures and goal of a sample are of one suite; what is held out is of the first alone."""
    folder = copied[0]
    shutil.copytree(folder / SUITE, folder / "mine")
    for chosen in ("", "0", task):
        assert record.task_names("mine", chosen, folder) == [task], "those of its files"
    record.ensure("mine", [task], 2, folder, SIZE)
    refused(lambda: record.task_names("mine", "1", folder), "unknown task '1'", task)
    (folder / "door-open").mkdir()
    with h5py.File(shutil.copy(copied[1], folder / "door-open" / "door-open.hdf5"), "a") as f:
        f["data"].attrs.update(env="door-open", goal_varies=True)
        for demo in f["data"].values():
            demo["obs/agentview_rgb"][:] //= 2
    config = SimpleNamespace(suite=f"{SUITE}:1,door-open", tasks="0", demos=2, data=folder,
                             size=SIZE)
    videos, held_out, note = record.load_videos(config)
    assert videos.tasks == [task, "door-open"] and held_out.tasks == [task]
    assert videos.task.tolist() == [0, 1, 1] and note.startswith("3 videos of 2 tasks")
    bright, dark = videos.gather("obs/agentview_rgb", np.array([0, 1]), 0)
    assert np.array_equal(bright // 2, dark)
    goals = videos.goal_of(np.arange(3), np.random.default_rng(0))
    assert goals.tolist() == [0, 1, 2], "in Meta-World the scene's own"


def test_sentences_that_mean_the_same_are_near(videos, task):
    put, same, other = map(embed, ("pick up the black bowl and place it on the plate",
                                   "put the black bowl on the plate", "open the door"))
    assert put.shape == (384,) and np.linalg.norm(put) == pytest.approx(1, abs=1e-5)
    assert put @ same > 0.9 > 0.5 > put @ other
    np.testing.assert_allclose(videos.text, [embed(task.replace("_", " "))], atol=1e-4)
