"""core/episodes.py: a kill loses nothing, what is wrong with a file is one line, the reader."""

import os
import pickle
import shutil
from itertools import product

import h5py
import numpy as np
import pytest

from conftest import SUITE, everything
from core.episodes import HELD_OUT, Episodes, assemble, split_assembled, write_episode
from core.files import one_line


@pytest.mark.parametrize("owner, name, count, split", [
    (os, "replace", 2, False), (os, "remove", 1, False), (os, "replace", 1, True),
    (shutil, "rmtree", 1, True)], ids=["second episode", "before the old file goes",
                                       "before the new file comes", "before the parts go"])
def test_a_kill_while_joining_or_splitting_loses_nothing(copied, data_file, monkeypatch, owner,
                                                         name, count, split):
    path, calls, real = copied[1], [], getattr(owner, name)
    with h5py.File(path) as f:
        about = dict(f["data"].attrs)

    def kill(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments)

    def join_again():
        if path.exists():
            split_assembled(path, path.with_suffix(""))  # `ensure`, when more episodes are wanted
        assemble(path, path.with_suffix(""), about)

    if split:
        split_assembled(path, path.with_suffix(""))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, kill)
        join_again()
    join_again()
    assert everything(path, skip=()) == everything(data_file, skip=())


def test_objects_are_of_the_task_with_the_most(copied):
    """Wherever it stands among the tasks."""
    folder, path = copied
    shutil.copy(path, path.with_stem("another"))
    with h5py.File(path.with_stem("another"), "r+") as f:
        f["data"].attrs["objects"] = more = [*f["data"].attrs["objects"], "lid", "pan"]
    for names in ([path.stem, "another"], ["another", path.stem]):
        assert Episodes(folder, SUITE, names, 1).objects == more


def test_full_disk_while_writing_an_episode(tmp_path, refused):
    """The error crosses from the worker to its parent by pickle."""
    episode = {"actions": np.zeros((30, 7)), "masks": np.zeros((30, 64, 64), np.uint8)}
    os.symlink("/dev/full", tmp_path / "demo_0.part")
    with pytest.raises(OSError) as error:
        write_episode(tmp_path / "demo_0.hdf5", episode, seed=0)
    assert not (tmp_path / "demo_0.hdf5").exists()
    carried = pickle.loads(pickle.dumps(error.value))

    def carry():
        with one_line("data"):
            raise carried
    refused(carry, "No space", "data")


def test_what_is_broken_or_lacks_something_is_one_line_and_stays(copied, task, refused):
    folder, path = copied
    whole = path.read_bytes()

    def check(*words):
        before = path.read_bytes()
        refused(lambda: Episodes(folder, SUITE, [task], 2), path, "delete", *words)
        assert path.read_bytes() == before

    for content in (whole[:len(whole) // 2], b"hello" * 1000, b""):
        path.write_bytes(content)
        check()
    for missing in (*Episodes.KEYS, "obs", "tracks", "size", "env", "data"):
        path.unlink()       # what was refused may still be open
        path.write_bytes(whole)
        with h5py.File(path, "a") as f:
            del (f if missing == "data" else f["data"].attrs if missing in f["data"].attrs
                 else f["data/demo_3"])[missing]
        check(missing)


def test_gather_is_the_file(videos, data, data_file, task, tmp_path, refused):
    """Rows in any shape, ends repeated; pictures stay on disk; none is held out and trained on."""
    last, held_out = videos.length - 1, Episodes(data, SUITE, [task], 2, split="valid")
    episode, t = np.array([[0, 1], [1, 0]]), np.array([[5, -3], [10_000, 0]])
    with h5py.File(data_file) as f:
        for key in Episodes.KEYS:
            zero, one = f["data/demo_2"][key], f["data/demo_3"][key]
            wanted = [[zero[5], one[0]], [one[last[1]], zero[0]]]
            assert np.array_equal(videos.gather(key, episode, t), wanted), key
    for key in ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks"):
        for array in videos.arrays[key]:
            assert isinstance(array, np.memmap) and not array.flags.writeable
    assert len(held_out.length) == HELD_OUT and len(videos.length) == 2
    for a, b in product(videos.arrays["obs/agentview_rgb"], held_out.arrays["obs/agentview_rgb"]):
        assert not np.array_equal(a[0], b[0])
    command = f"python extract.py --suite {SUITE}"
    refused(lambda: Episodes(tmp_path, SUITE, [task], 1), tmp_path, command)
    refused(lambda: Episodes(data, SUITE, [task], 3), "2 videos, not 3", f"{command} --demos 3")


def test_every_frame_is_sampled_equally_often_and_by_seed_and_step(videos):
    episode, t, rng = videos.sample_frames(0, 40_000, 0)
    assert (t >= 0).all() and (t < videos.length[episode]).all()
    count = np.bincount(videos.start[episode] + t, minlength=len(videos))
    assert len(count) == len(videos) and count.min() > 0.75 * 40_000 / len(videos)
    same, other, later = (videos.sample_frames(k, 40_000, s) for k, s in ((0, 0), (0, 1), (1, 0)))
    assert np.array_equal(same[:2], (episode, t)) and same[2].random() == rng.random()
    assert not np.array_equal(other[1], t) and not np.array_equal(later[1], t)


def test_goal_is_another_episode_of_the_task():
    """Each of the others, or its own where goals differ between scenes or it is the only one."""
    some = Episodes.__new__(Episodes)
    some.task, some.own_goal = np.array([0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 4]), np.zeros(15, bool)
    some.own_goal[-2:] = True
    episode = np.tile(np.arange(15), 20)
    goal = some.goal_of(episode, np.random.default_rng(0))
    found = [sorted(set(goal[episode == e])) for e in range(15)]
    assert found == [[o for o in range(12) if o // 4 == e // 4 if o != e] or [e] for e in range(15)]
