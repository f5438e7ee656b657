"""One thread, here and in child processes: on small tensors more threads are slower.

What takes seconds to make is made once: a simulator, the data of one task, planners and executors
of the tiny preset.
"""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing

import h5py
import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"     # before torch is imported
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch  # noqa: E402
import torchvision  # noqa: E402, F401: imported after an OpenGL context, its libraries can crash

import sims  # noqa: E402
from core import training  # noqa: E402
from core.episodes import Episodes  # noqa: E402
from demos.record import ensure  # noqa: E402

torch.set_num_threads(1)
# What a test frees leaves the process: kept, as `fit` does, it is a gigabyte beside a simulator's 2
training.keep_memory = lambda: None
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-3, 1 << 17)           # M_MMAP_THRESHOLD, bytes

SUITE, SIZE = "libero_spatial", 64
CPU = ["--preset", "tiny", "--device", "cpu"]
COMMON = [*CPU, "--suite", SUITE, "--tasks", "0"]
TRAIN = [*COMMON, "--no-bf16"]          # every planner's program
EXECUTOR = [*CPU, "--no-bf16"]
# what a frame of any simulator holds: shape, dtype
FRAME = dict.fromkeys(("agentview_rgb", "eye_in_hand_rgb"), ((SIZE, SIZE, 3), np.uint8)) | {
    "masks": ((SIZE, SIZE), np.uint8), "hand": ((2,), np.float16), "ee_states": ((6,), np.float32),
    "joint_states": ((7,), np.float32), "gripper_states": ((2,), np.float32)}


def simulator(*scene, scope="module", **look):
    """A fixture: a simulator; every test starts with its own reset."""
    @pytest.fixture(scope=scope)
    def sim():
        with closing(sims.make(*scene, **look)) as sim:
            yield sim
    return sim


def equal(a, b):
    """Whether two checkpoints' contents are the same, tensors bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b) if isinstance(a, (np.ndarray, torch.Tensor)) else a == b


def tensors(batch):
    return {k: torch.as_tensor(v) for k, v in batch.items()}


def overfit(model, batch, steps):
    """Steps on one batch -> the parts of the first loss and of the last."""
    optimizer, all_parts = torch.optim.AdamW(model.train().parameters(), 2e-3), []
    for _ in range(steps):
        loss, parts = model.loss(batch)
        all_parts.append(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return all_parts[0], parts


def without_gradient(model):
    """Names of its parameters that no loss.backward() has reached."""
    return [name for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.any())]


def arrays(group):
    """All datasets of a group by their names."""
    found = {}
    group.visititems(lambda name, item: found.update(
        {name: item} if isinstance(item, h5py.Dataset) else {}))
    return found


def everything(path, skip=("seconds",)):
    """All datasets and attributes of a file as {name: plain values}; `skip`: measured times."""
    with h5py.File(path) as f:
        found = {name: (item.dtype.str, item.shape, item[()].tobytes())
                 for name, item in arrays(f).items()}
        f.visititems(lambda name, item: found.update({
            f"{name}@{k}": np.asarray(v).tolist() for k, v in item.attrs.items() if k not in skip}))
    return found


def python(*words, cwd=ROOT, **variables):
    """Python in a process of its own that can import the project -> what subprocess.run returns."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": ROOT} | variables)


def pytest_collection_modifyitems(items):
    """Before the simulator below is opened: what needs much memory, or another one of LIBERO's."""
    items.sort(key=lambda item: item.path.name not in ("test_baselines.py", "test_official.py"))


sim = simulator(SUITE, 0, SIZE, scope="session")      # task 0 of libero_spatial


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of task 0's real data: two episodes held out, two videos.  Read only."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    ensure(SUITE, sims.tasks(SUITE)[:1], 2, folder, SIZE, workers=1)
    return folder


@pytest.fixture(scope="session")
def task():
    return sims.tasks(SUITE)[0]


@pytest.fixture(scope="session")
def data_file(data, task):
    return data / SUITE / f"{task}.hdf5"


@pytest.fixture
def copied(data, tmp_path, task):
    """A copy of the data that a test may break -> its folder, its file."""
    folder = shutil.copytree(data, tmp_path / "data")
    return folder, folder / SUITE / f"{task}.hdf5"


@pytest.fixture(scope="session")
def videos(data, task):
    return Episodes(data, SUITE, [task], 2)


@pytest.fixture
def obs(videos):
    """What planners see in two frames."""
    gather = lambda key: videos.gather(key, np.arange(2), np.array([3, 40]))
    return tensors({"frames": gather("obs/agentview_rgb")[:, None], "hand": gather("hand"),
                    "wrist": gather("obs/eye_in_hand_rgb"), "text": videos.text[[0, 0]],
                    "goal": videos.last_frames(np.arange(2))})


def trained(program, name, of=None):
    """A session's fixture: a checkpoint of the tiny preset, of a planner or on the planner `of`."""
    @pytest.fixture(scope="session")
    def path(request, data):
        runs = data.parent / "runs"
        argv = [*EXECUTOR, "--planner", str(request.getfixturevalue(of))] if of else TRAIN
        importlib.import_module(program).main([*argv, "--data", str(data), "--out", str(runs)])
        return runs / SUITE / f"{name}.pt"
    return path


mask_path = trained("mask_planner", "mask_tasks0")
track_path = trained("track_planner", "track_tasks0")
video_path = trained("video_planner", "video_tasks0")
executor_path = trained("executor", "mask_tasks0_executor", "mask_path")
unipi_path = trained("video_control.unipi", "video_tasks0_unipi", "video_path")


@pytest.fixture
def untrained(data, tmp_path, monkeypatch):
    """untrained(program, *flags) -> the model that the program would train now, its batches(step)
    as tensors, what makes them, the checkpoint's path."""
    def build(program, *flags):
        made = []

        def fit(*arguments, **named):
            made.extend(arguments)
            raise KeyboardInterrupt

        argv = [*TRAIN, "--data", str(data), "--out", str(tmp_path), *map(str, flags)]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "fit", fit)
            importlib.import_module(program).main(argv)
        model, batches, _, path, *_ = made
        return model, lambda step: tensors(batches(step)), batches, path
    return build


@pytest.fixture
def refused(capfd):
    """refused(function, *words): it ends with exit code 2 and one line on stderr with the words."""
    def check(function, *words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            function()
        # a progress bar that was running is no second line
        lines = [line for line in capfd.readouterr().err.strip().splitlines()
                 if not re.search(r"(it|episode)/s|s/(it|episode)", line)]
        assert stop.value.code == 2 and len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0], lines[0]
    return check
