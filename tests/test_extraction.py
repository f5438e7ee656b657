"""extract.py on a suite: what is kept, what is made anew, what is refused."""

import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from conftest import COMMON, ROOT, SUITE

import extract
import mask_planner
from core.episodes import Episodes, split_assembled
from core.flags import parse
from demos import annotated


class Oracle:
    """In Annotator's place: all is robot, and points are where the episode's number says."""
    calls = []

    def __init__(self, config):
        pass

    def __call__(self, views, names, seed, title):
        self.calls.append((seed, names))
        T, H, W = views["agentview"].shape[:3]
        return {"masks": np.ones((T, H, W), np.uint8)} | {
            f"tracks/{camera}": np.full((T, 256, 2), seed, np.float16) for camera in views}


@pytest.fixture
def go(data, tmp_path, monkeypatch):
    """extract.py with --masks sam --tracks flow by the oracle, in this process, on a copy."""
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.setattr(Oracle, "calls", [])
    monkeypatch.setattr(extract, "Annotator", Oracle)
    monkeypatch.setattr(annotated, "run_jobs", lambda function, jobs, *rest, **more: [
        made for job in jobs for made in function(job)])
    argv = [*COMMON, "--masks", "sam", "--tracks", "flow", "--data", str(tmp_path / "data")]
    return lambda *flags: extract.main([*argv, *flags])


def content(path):
    with h5py.File(path) as f:
        found = {}
        f["data"].visititems(lambda name, x: found.update({name: x[()]} if hasattr(x, "dtype") else {}))
        return found, dict(f["data"].attrs), {k: dict(demo.attrs) for k, demo in f["data"].items()}


def test_all_but_masks_and_tracks_is_kept(go, data_file, tmp_path, task):
    go()
    path = tmp_path / "data" / f"{SUITE}_sam_flow" / data_file.name
    (old, about, _), (new, now, demos) = content(data_file), content(path)
    differ = {name.split("/", 1)[1] for name in old if not np.array_equal(old[name], new[name])}
    assert differ == {"masks", "tracks/agentview", "tracks/eye_in_hand"} and old.keys() == new.keys()
    assert (new["demo_3/tracks/agentview"] == 3).all() and demos["demo_3"]["seed"] == 3
    assert {k for k in about if str(about[k]) != str(now[k])} == {"mask_source", "track_source"}
    assert (now["mask_source"], now["track_source"], now["env"]) == ("sam", "flow", SUITE)
    assert Oracle.calls == [(i, ["robot arm", "akita black bowl", "plate"]) for i in range(4)]
    assert Episodes(tmp_path / "data", f"{SUITE}_sam_flow", [task], 2).env == SUITE
    go()
    assert len(Oracle.calls) == 4, "nothing is made twice"
    split_assembled(path, path.with_suffix(""))     # as an interrupted run leaves it
    os.remove(path.with_suffix("") / "demo_2.hdf5")
    go("--objects", "arm. bowl. dish.", "--show")
    assert Oracle.calls[4:] == [(2, ["arm", "bowl", "dish"])]
    assert str(content(path)[:2]) == str((new, now)) and path.parent.with_suffix(".png").exists()


def test_what_is_refused(go, data_file, tmp_path, refused, monkeypatch):
    empty = ["--data", str(tmp_path / "none")]
    refused(lambda: go("--objects", "arm.", *empty), "names 1 objects", "akita_black_bowl_1, plate_1")
    refused(lambda: go("--suite", "libero_spatial_sam", *empty), "libero_spatial_sam", "mt10")
    with monkeypatch.context() as patch:
        patch.undo()
        refused(lambda: go("--weights", str(tmp_path), *empty), extract.DETECTOR, "--download")
    assert not (tmp_path / "none").exists(), "before anything is recorded"
    go()
    with h5py.File(tmp_path / "data" / SUITE / data_file.name, "a") as f:
        f["data/demo_0/obs/agentview_rgb"][-1] += 1
    refused(go, f"{SUITE}_sam_flow", "other pictures", "--data")


def test_data_has_the_size_that_stage_1_trains_on():
    """Else `extract.py --show` after `mask_planner.py` would find pictures of another size."""
    for preset in ("tiny", "laptop", "paper"):
        ours, theirs = (parse(program.Config, "", ["--preset", preset, "--device", "cpu"])
                        for program in (extract, mask_planner))
        assert (ours.size, ours.demos) == (theirs.size, theirs.demos)


@pytest.mark.slow
def test_the_command_annotates_in_processes(data, tmp_path, task):
    shutil.copytree(data, tmp_path / "data")
    run = subprocess.run([sys.executable, os.path.join(ROOT, "extract.py"), *COMMON, "--tracks", "flow",
                          "--data", str(tmp_path / "data")], capture_output=True, text=True)
    assert run.returncode == 0 and "2 processes" in run.stdout, run.stderr
    new = content(tmp_path / "data" / f"{SUITE}_flow" / f"{task}.hdf5")[0]
    assert new["demo_1/tracks/eye_in_hand"].shape[1:] == (256, 2)
