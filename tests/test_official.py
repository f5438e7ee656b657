"""official.py: a file as LIBERO publishes them becomes ours; what is wrong with it is one line."""

import json
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from conftest import COMMON, SIZE, SUITE, arrays, python
import sims
from core.episodes import CAMERAS, Episodes, split_assembled
from demos import official, record
from demos.language import embed
from demos.libero import demonstrator

STEPS, DEMOS, make = 16, 3, sims.make


@pytest.fixture(scope="module", autouse=True)
def in_this_process(sim):
    """Episodes are imported without processes of their own, in this process's simulator, whose
    cameras then are as they were; of that made last MuJoCo gives the XML."""
    m = sim.model
    cameras = m.cam_pos.copy(), m.cam_quat.copy(), m.cam_fovy.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim, "close", lambda: None)
        patch.setattr(sims, "make", lambda *arguments: sim)
        patch.setattr(record, "run_jobs", lambda function, jobs, *rest: (
            result for job in jobs for result in function(job)))
        yield
    m.cam_pos[:], m.cam_quat[:], m.cam_fovy[:] = cameras


@pytest.fixture(scope="module")
def played(sim):
    """The start of some scripted episodes as create_dataset.py plays them: the state before an
    action, the action, what robosuite observes after it, upright pictures of that; the model."""
    import mujoco
    import robosuite.utils.transform_utils as T
    env, episodes = sim.env, []
    mujoco.MjModel.from_xml_string(env.model.get_xml())     # of what is compiled last MuJoCo saves
    for seed in range(DEMOS):
        sim.reset(seed=seed)
        for name in ("joint_pos", "gripper_qpos", "eef_pos", "eef_quat"):
            env._observables[f"robot0_{name}"].set_enabled(True)
        # as in env.reset: it decides when within a step they measure
        env._get_observations(force_update=True)
        rows = []
        for action in islice(demonstrator(sim, seed), STEPS):
            state, (seen, *_) = sim.state(), env.step(action)
            turn = T.quat2axisangle(seen["robot0_eef_quat"])
            rows.append({"actions": action, "states": state,
                         "joint_states": seen["robot0_joint_pos"],
                         "gripper_states": seen["robot0_gripper_qpos"],
                         "ee_states": np.append(seen["robot0_eef_pos"], turn)})
            rows[-1] |= {f"{c}_rgb": sim.camera.picture(sim.data, view)
                         for c, view in zip(CAMERAS, sim.cameras)}
        for observable in env._observables.values():
            observable.set_enabled(False)
        episodes.append({k: np.stack([row[k] for row in rows]) for k in rows[0]}
                        | {"model": env.sim.model.get_xml()})
    mujoco.MjModel.from_xml_string("<mujoco/>")             # and keeps, with its textures
    return episodes


def publish(path, episodes):
    """Writes what LIBERO's create_dataset.py writes, as far as anybody reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for k, episode in enumerate(episodes):
            demo, T = f.create_group(f"data/demo_{k}"), len(episode["actions"])
            for key in official.ROWS:
                demo[key] = episode[Path(key).name][:, ::-1 if key in official.VIEWS else 1]
            demo["rewards"] = demo["dones"] = np.append(np.zeros(T - 1, np.uint8), np.uint8(1))
            demo.attrs.update(num_samples=T, model_file=episode["model"])
        f["data"].attrs.update(num_demos=len(episodes), env_args=json.dumps({"type": 1}))
    return path


def make_from(folder, task, demos=20):
    official.import_official(SimpleNamespace(data=str(folder), suite=SUITE, demos=demos, workers=1,
                                             download=False), [task])


@pytest.fixture(scope="module")
def imported(played, task, tmp_path_factory):
    """Folder in which our file was made from the published one."""
    folder = tmp_path_factory.mktemp("official") / "data"
    publish(folder / "official" / SUITE / f"{task}_demo.hdf5", played)
    make_from(folder, task)
    return folder


@pytest.fixture
def copied(imported, tmp_path, task):
    """A copy that a test may break -> the published file, ours."""
    folder = shutil.copytree(imported, tmp_path / "data")
    return folder / "official" / SUITE / f"{task}_demo.hdf5", folder / SUITE / f"{task}.hdf5"


@pytest.fixture
def again(copied, task, monkeypatch):
    """Imports the task with one video, so three episodes, without following points."""
    none = {f"{what}/{camera}": np.zeros(1) for what in ("tracks", "visible") for camera in CAMERAS}
    monkeypatch.setattr(sims, "tracks", lambda *arguments, seed: none)
    return lambda: make_from(copied[1].parents[1], task, demos=1)


def test_our_file_holds_the_published_episodes(imported, played, sim, task, tmp_path):
    with h5py.File(imported / SUITE / f"{task}.hdf5") as f:
        about, T, language = dict(f["data"].attrs), STEPS - 1, task.replace("_", " ")
        wanted = {"source": "official", "size": SIZE, "render": "faithful", "mask_source": "sim",
                  "language_instruction": language, "total": DEMOS * T, "exhausted": True}
        assert {key: about[key] for key in wanted} == wanted
        assert np.array_equal(about["text_embedding"], embed(language))
        for k, episode in enumerate(played):
            demo = f[f"data/demo_{k}"]
            assert demo.attrs["original"] == f"demo_{k}" and demo.attrs["num_samples"] == T
            for name in (f"{camera}_rgb" for camera in CAMERAS):
                assert np.array_equal(demo[f"obs/{name}"], episode[name][:-1]), "upright, exactly"
            assert np.array_equal(demo["states"], episode["states"][1:]), "before the action"
            np.testing.assert_allclose(demo["actions"], episode["actions"][1:], atol=1e-7)
            for key in ("rewards", "dones"):
                assert demo[key][:].tolist() == [0] * (T - 1) + [1]
            sim.reset(seed=k)  # its fixtures
            for t in (0, T // 2, T - 1):
                sim.set_state(episode["states"][1 + t])
                frame = sim.frame()
                off = [np.abs(episode["agentview_rgb"][i].astype(int)
                              - frame["agentview_rgb"]).mean() for i in (t, t + 1)]
                assert off[0] < 1 and off[0] < 0.5 * off[1], "of the picture's state, to 2 ms"
                for name in frame.keys() - {"agentview_rgb", "eye_in_hand_rgb"}:
                    there = demo[name if name in demo else f"obs/{name}"][t]
                    np.testing.assert_allclose(there, frame[name], atol=1e-3 * (name == "hand"))
    # in files that others made anew, the pictures are of the state before the action
    paired = {k: v if isinstance(v, str) else v[1:] if k in ("actions", "states") else v[:-1]
              for k, v in played[1].items()}
    with h5py.File(publish(tmp_path / "x.hdf5", [paired])) as f:
        episode, error = official.convert_demo(sim, f["data/demo_0"], seed=0)
    assert error is None
    for name in ("agentview_rgb", "states", "actions"):
        assert np.array_equal(episode[name], paired[name]), name


@pytest.mark.slow
def test_the_command(copied):
    copied[1].unlink()
    run = python("extract.py", *COMMON, "--source", "official", "--workers", "1", "--data",
                 copied[1].parents[1])
    assert run.returncode == 0 and "1 tasks, 1 videos of 15 steps" in run.stdout, run.stderr


@pytest.mark.slow
def test_a_row_flip_turns_robosuites_observation_upright():
    """robosuite's renderer and ours on the same state: equal after [::-1], and in no other way."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen
    sim = make(SUITE, 0, SIZE, "faithful")
    frame, context = sim.reset(seed=0), MjRenderContextOffscreen(sim.env.sim, device_id=-1)
    context.vopt.geomgroup[0] = 0
    for camera, view in zip(CAMERAS, sim.cameras):
        raw = sim.env.sim.render(camera_name=view, width=SIZE, height=SIZE)
        ours = frame[f"{camera}_rgb"].astype(int)
        off = lambda picture: np.abs(picture - ours).mean()
        assert off(raw[::-1]) < 0.5 and min(off(raw), off(raw[::-1, ::-1]), off(raw[:, ::-1])) > 5
    sim.close()


def test_what_cannot_be_used_is_left_out_by_name(copied, played, again, capfd):
    """A replay that strays, one row, no numbers; pictures that are upright already stay so."""
    source, ours = copied
    ours.unlink()
    with h5py.File(source, "a") as f:
        f["data"].copy("demo_2", "demo_10")
        f["data/demo_1/obs/joint_states"][5] += 0.05
        for name, key, value in (("demo_3", "actions", 20), ("demo_4", "states", np.nan)):
            f["data"].copy("demo_2", name)
            f["data"][name][key][3] = value
        short = f["data"].create_group("demo_5")
        short.attrs.update(f["data/demo_2"].attrs)
        for key, rows in arrays(f["data/demo_2"]).items():
            short[key] = rows[:1]
        for key in (f"data/{name}/{view}" for name in f["data"] for view in official.VIEWS):
            f[key][:] = f[key][:][:, ::-1]
    again()
    out = capfd.readouterr().out
    assert "left out" in out and all(f"demo_{k} " in out for k in (1, 3, 4, 5))
    with h5py.File(ours) as f:
        made = [f[f"data/demo_{k}"].attrs["original"] for k in range(3)]
        assert made == ["demo_0", "demo_2", "demo_10"], "in the order of their numbers"
        upright = played[0]["agentview_rgb"][:-1]
        assert np.array_equal(f["data/demo_0/obs/agentview_rgb"], upright)


def test_an_interrupted_import_goes_on_and_nothing_is_mixed(copied, again, task, refused, capfd):
    (source, ours), parts = copied, copied[1].with_suffix("")
    folder, ensure = ours.parents[1], lambda *rest: record.ensure(SUITE, [task], *rest)
    assert len(Episodes(folder, SUITE, [task], 20).length) == 1, "as many videos as there are"
    make_from(folder, task)
    ensure(20, folder, SIZE)
    assert not capfd.readouterr().out, "nothing is made twice"
    refused(lambda: ensure(1, folder, 96), f"--size {SIZE}", "--size 96")
    split_assembled(ours, parts)
    (parts / "demo_2.hdf5").unlink()
    with h5py.File(parts / "demo_0.hdf5", "a") as f:
        f.attrs["mark"] = "kept"
    refused(lambda: ensure(1, folder, SIZE), parts, "official")
    again()
    with h5py.File(ours, "a") as f, h5py.File(source) as whole:
        demo = f["data/demo_2"]
        assert f["data/demo_0"].attrs["mark"] == "kept" and demo.attrs["original"] == "demo_2"
        assert np.array_equal(demo["states"], whole["data/demo_2/states"][1:])
        f["data"].attrs["source"] = "scripted"
        for demo in f["data"].values():
            demo.attrs["noise"] = 0.1
    before = ours.read_bytes()
    refused(again, ours, "scripted", "--data")
    assert ours.read_bytes() == before
    split_assembled(ours, parts)
    refused(again, f"{parts}/", "scripted", "--data")


def test_a_broken_file_is_one_line_and_nothing_is_written(copied, refused, again):
    source, ours = copied
    with h5py.File(ours, "a") as f:  # more are wanted than there are
        del f["data/demo_2"]
        f["data"].attrs["exhausted"] = False
    whole, before = source.read_bytes(), ours.read_bytes()

    def broken(damage, *words):
        source.write_bytes(whole)
        with h5py.File(source, "a") as f:
            damage(f["data"])
        refused(again, source, *words)
        assert not ours.with_suffix("").exists()
        assert (ours.read_bytes() if ours.exists() else None) == before

    def changed(key, change):
        def damage(demos):
            for demo in demos.values():
                demo[key] = change(demo.pop(key)[:])
        return damage

    for key in (*official.ROWS, "obs"):
        broken(lambda demos: demos.pop(f"demo_1/{key}"), "lacks", f"demo_1/{key}", "--download")
    broken(lambda demos: demos["demo_1"].attrs.pop("model_file"), "lacks", "model_file")
    broken(lambda demos: demos.clear(), "lacks data/demo_0", "fetch it again")
    for key, change, word in (
            ("states", lambda v: v[:-1], "fetch it again"),
            ("actions", lambda v: v[:, 1:], "(16, 7)"),
            ("obs/eye_in_hand_rgb", lambda v: v[:, 1:, 1:], "(16, 64, 64, 3)"),
            ("obs/agentview_rgb", lambda v: v / 255, "float64"),
            ("obs/agentview_rgb", lambda v: v[:, 1:], "(16, 63, 63, 3)")):
        broken(changed(key, change), word)
    source.write_bytes(whole[:len(whole) // 2])
    refused(again, source, "not a whole", "fetch it again")
    ours.unlink()
    with h5py.File(source, "w") as f:
        f["data"] = np.arange(5)
    refused(again, source, "lacks data/demo_0", "fetch it again")
    before = None
    broken(changed("states", lambda v: v[:, :-3]), "numbers")       # of another scene
    for name, row, off in (("joint_states", 5, 0.05), ("gripper_states", STEPS - 2, -0.01),
                           ("ee_states", 0, 0.02), ("joint_states", 3, np.nan)):
        strayed = lambda v: np.where(np.arange(STEPS)[:, None] == row, v + off, v)
        broken(changed(f"obs/{name}", strayed), f"{name} off by", f"step {row}")


def test_download(tmp_path, refused, task, monkeypatch):
    """Only if asked, and LIBERO's; without a network one line is the way out."""
    hub, calls = pytest.importorskip("huggingface_hub"), []
    pytest.importorskip("huggingface_hub.constants")
    fetch = lambda download=True: official.locate(tmp_path, SUITE, task, download)
    name, address = f"{task}_demo.hdf5", f"https://huggingface.co/datasets/{official.HUB}"
    refused(lambda: fetch(False), name, "--download", address)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    refused(fetch, name, address, "network")
    assert not list(tmp_path.rglob("*.hdf5"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: calls.append((a, k)))
    assert fetch() == tmp_path / "official" / SUITE / name
    assert calls == [((official.HUB, f"{SUITE}/{name}"),
                      {"repo_type": "dataset", "local_dir": tmp_path / "official"})]
