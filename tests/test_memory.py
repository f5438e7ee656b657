"""Memory stays bounded as data grows: a reader's batches over 200 and 2,000 episodes."""

import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

from conftest import ROOT

from core.episodes import CAMERAS

T, SIDE = 20, 32
READ = """
import sys
from core.episodes import Episodes
videos = Episodes(sys.argv[1], "big", ["task"], int(sys.argv[2]))
for step in range(400):
    episode, t, _ = videos.sample_frames(step, 32, 0)
    for key in ("obs/agentview_rgb", "obs/eye_in_hand_rgb", "masks", "actions", "tracks/agentview"):
        videos.gather(key, episode, t)
print([line for line in open("/proc/self/status") if line.startswith("RssAnon")])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux only")
@pytest.mark.slow
def test_data_stay_on_disk(tmp_path):
    """RssAnon: pages of the program's own, here the index of the arrays.  Mapped pages of the
    files, which the kernel takes back when it needs them, count in RSS but not there."""
    rng, picture = np.random.default_rng(0), (T, SIDE, SIDE, 3)
    (tmp_path / "big").mkdir()
    with h5py.File(tmp_path / "big" / "task.hdf5", "w") as f:
        for i in range(2002):
            demo = f.create_group(f"data/demo_{i}")
            demo.attrs["num_samples"] = T
            for camera in CAMERAS:
                demo[f"obs/{camera}_rgb"] = rng.integers(256, size=picture, dtype=np.uint8)
                demo[f"tracks/{camera}"] = np.zeros((T, 256, 2), np.float16)
                demo[f"visible/{camera}"] = np.ones((T, 256), bool)
            demo["masks"] = rng.integers(3, size=picture[:3], dtype=np.uint8)
            for key, width in (("actions", 7), ("obs/ee_states", 6), ("obs/joint_states", 7),
                               ("obs/gripper_states", 2)):
                demo[key] = np.zeros((T, width), np.float32)
            demo["hand"] = np.zeros((T, 2), np.float16)
        f["data"].attrs.update(size=SIDE, source="scripted", render="fast", objects=["robot"],
                               env="big", goal_varies=False, text_embedding=np.zeros(4))
    used = []
    for count in ("200", "2000"):
        run = subprocess.run([sys.executable, "-c", READ, str(tmp_path), count],
                             env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        used.append(int(re.search(r"\d+", run.stdout)[0]))
    grown = 0.9 * (tmp_path / "big" / "task.hdf5").stat().st_size / 1000  # kB that are read more
    assert used[1] - used[0] < 0.1 * grown, f"kB: {used}"
