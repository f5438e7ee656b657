"""official.py: a file as LIBERO publishes them becomes one of ours; what is wrong with it is one line."""

import json
import shutil
import sys

import h5py
import numpy as np
import pytest

from conftest import NETWORK, SUITE

import extract
import mask_planner
import sims
from core.episodes import Episodes, split_assembled
from demos import official, record
from demos.language import embed
from demos.libero import demonstrator
from sims.camera import CAMERAS

SIZE, STEPS, DEMOS = 64, 16, 3
ASKED = ["--preset", "laptop", "--suite", SUITE, "--tasks", "0", "--source", "official", "--workers", "1"]


@pytest.fixture(scope="module")
def sim():
    """LIBERO's own look, as in the published pictures."""
    sim = sims.make(SUITE, 0, SIZE, "faithful")
    yield sim
    sim.close()


@pytest.fixture(scope="module")
def played(sim):
    """The start of some scripted episodes as create_dataset.py plays them: rows of the state before an action, the
    action, what robosuite observes after it, and upright pictures of that; and the model with its fixtures."""
    import robosuite.utils.transform_utils as T
    env, episodes = sim.env, []
    for seed in range(DEMOS):
        sim.reset(seed=seed)
        for name in ("joint_pos", "gripper_qpos", "eef_pos", "eef_quat"):
            env._observables[f"robot0_{name}"].set_enabled(True)
        env._get_observations(force_update=True)  # as in env.reset: it says when within a step they measure
        expert, rows = demonstrator(sim, seed), []
        for _ in range(STEPS):
            row = {"actions": expert(sim), "states": sim.state()}
            seen, *_ = env.step(row["actions"])
            row |= {"joint_states": seen["robot0_joint_pos"], "gripper_states": seen["robot0_gripper_qpos"],
                    "ee_states": np.append(seen["robot0_eef_pos"], T.quat2axisangle(seen["robot0_eef_quat"])),
                    "robot_states": env.get_robot_state_vector(seen)}
            rows.append(row | {f"{c}_rgb": sim.camera.picture(sim.data, v) for c, v in zip(CAMERAS, sim.cameras)})
        for observable in env._observables.values():
            observable.set_enabled(False)
        episodes.append({k: np.stack([row[k] for row in rows]) for k in rows[0]} | {"model": env.sim.model.get_xml()})
    return episodes


def publish(path, episodes, task):
    """Writes what LIBERO's create_dataset.py writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        data = f.create_group("data")
        for k, episode in enumerate(episodes):
            demo, T = data.create_group(f"demo_{k}"), len(episode["actions"])
            for camera in CAMERAS:
                demo[f"obs/{camera}_rgb"] = episode[f"{camera}_rgb"][:, ::-1]
            for name in ("ee_states", "gripper_states", "joint_states"):
                demo[f"obs/{name}"] = episode[name]
            demo["obs/ee_pos"], demo["obs/ee_ori"] = np.split(episode["ee_states"], 2, 1)
            for name in ("actions", "states", "robot_states"):
                demo[name] = episode[name]
            demo["rewards"] = demo["dones"] = np.append(np.zeros(T - 1, np.uint8), np.uint8(1))
            demo.attrs.update(num_samples=T, model_file=episode["model"], init_state=episode["states"][0])
        name = "libero_tabletop_manipulation"
        language = {"problem_name": name, "domain_name": "robosuite", "language_instruction": task.replace("_", " ")}
        kwargs = {"robots": ["Panda"], "camera_heights": SIZE, "camera_widths": SIZE, "control_freq": 20}
        bddl = f"libero/libero/bddl_files/{SUITE}/{task}.bddl"
        data.attrs.update(
            env_name=name, problem_info=json.dumps(language), macros_image_convention="opengl", bddl_file_name=bddl,
            bddl_file_content="(define ...)", num_demos=len(episodes), total=sum(len(e["actions"]) for e in episodes), tag="libero-v1",
            env_args=json.dumps({"type": 1, "env_name": name, "problem_name": name, "bddl_file": bddl, "env_kwargs": kwargs}))
    return path


@pytest.fixture(scope="module")
def imported(played, task, tmp_path_factory):
    """Folder in which the command has made our file from the published one."""
    folder = tmp_path_factory.mktemp("official") / "data"
    publish(folder / "official" / SUITE / f"{task}_demo.hdf5", played, task)
    extract.main([*ASKED, "--data", str(folder), "--show"])
    return folder


@pytest.fixture
def copied(imported, tmp_path, task):
    """A copy that a test may break -> its folder, the published file, ours."""
    shutil.copytree(imported, tmp_path / "data")
    folder = tmp_path / "data"
    return folder, folder / "official" / SUITE / f"{task}_demo.hdf5", folder / SUITE / f"{task}.hdf5"


@pytest.fixture
def here(sim, monkeypatch):
    """import_task without a process of its own: the module's simulator."""
    class Kept:
        close = lambda self: None
        __getattr__ = lambda self, name: getattr(sim, name)

    monkeypatch.setattr(sims, "make", lambda *arguments: Kept())
    monkeypatch.setattr(official.import_task, "progress", type("Queue", (), {"put": lambda self, n: None})(), raising=False)


# --- what is made ---------------------------------------------------------------------------------


def test_our_file_holds_the_published_episodes(imported, played, sim, task):
    with h5py.File(imported / SUITE / f"{task}.hdf5") as f:
        about, T = f["data"].attrs, STEPS - 1
        assert (about["source"], about["size"], about["render"], about["mask_source"]) == ("official", SIZE, "faithful", "sim")
        assert about["language_instruction"] == task.replace("_", " ") and about["total"] == DEMOS * T and about["exhausted"]
        assert np.array_equal(about["text_embedding"], embed(task.replace("_", " ")))
        assert [n.decode() for n in f["mask/valid"]] == ["demo_0", "demo_1"]
        for k, episode in enumerate(played):
            demo = f[f"data/demo_{k}"]
            assert demo.attrs["original"] == f"demo_{k}" and demo.attrs["num_samples"] == T
            for camera in CAMERAS:
                assert demo[f"obs/{camera}_rgb"].dtype == np.uint8
                assert np.array_equal(demo[f"obs/{camera}_rgb"], episode[f"{camera}_rgb"][:-1]), "upright, byte for byte"
            assert np.array_equal(demo["states"], episode["states"][1:]), "before the action"
            np.testing.assert_allclose(demo["actions"], episode["actions"][1:], atol=1e-7)
            assert demo["rewards"][:].tolist() == demo["dones"][:].tolist() == [0] * (T - 1) + [1]
            sim.reset(seed=k)  # its fixtures
            for t in (0, T // 2, T - 1):
                sim.env.sim.set_state_from_flattened(episode["states"][1 + t])
                sim.env.sim.forward()
                frame = sim.frame()
                off = [np.abs(episode["agentview_rgb"][i].astype(int) - frame["agentview_rgb"]).mean() for i in (t, t + 1)]
                assert off[0] < 1 and off[0] < 0.5 * off[1], "the state is the picture's, to 2 ms, not the next one's"
                assert np.array_equal(demo["masks"][t], frame["masks"]) and set(np.unique(frame["masks"])) == {0, 1, 2, 3}
                for name in ("ee_states", "joint_states", "gripper_states"):
                    np.testing.assert_allclose(demo[f"obs/{name}"][t], frame[name], atol=1e-5)
                np.testing.assert_allclose(demo["hand"][t], frame["hand"], atol=1e-3)


def test_tracks_stay_on_the_robot(imported, task):
    """A point that starts on the arm is, wherever it is seen later, on the arm: its mask and its tracks are of the same instant."""
    with h5py.File(imported / SUITE / f"{task}.hdf5") as f:
        for demo in f["data"].values():
            masks, tracks, seen = demo["masks"][:], demo["tracks/agentview"][:].astype(float), demo["visible/agentview"][:]
            T = len(masks)
            assert tracks.shape == (T, 256, 2) and demo["visible/eye_in_hand"].shape == (T, 256)
            x, y = np.moveaxis((tracks * SIZE).astype(int).clip(0, SIZE - 1), -1, 0)  # (T, K)
            on = masks[np.arange(T)[:, None], y, x] == 1
            robots = on[0] & seen[0] & (tracks.var(0).sum(1) > 1e-4)
            assert robots.sum() >= 10
            assert on[:, robots][seen[:, robots]].mean() > 0.9
            hand = np.linalg.norm(tracks[:, robots] - demo["hand"][:][:, None], axis=-1)  # (T, K')
            assert hand.min() < 0.1, "some on the hand"


def test_planners_train_on_it_unchanged(imported, task, tmp_path, refused):
    """With as many videos as there are, and at the pictures' size."""
    videos = Episodes(imported, SUITE, [task], 20)
    episode, t, _ = videos.draw(0, 8, seed=0)
    assert len(videos.length) == 1 and videos.gather("obs/agentview_rgb", episode, t).shape == (8, SIZE, SIZE, 3)
    argv = ["--preset", "laptop", "--suite", SUITE, "--tasks", "0", "--data", str(imported), "--out", str(tmp_path), "--steps", "2", *NETWORK]
    mask_planner.main([*argv, "--size", str(SIZE)])
    assert (tmp_path / SUITE / "mask.pt").exists()
    refused(lambda: mask_planner.main([*argv, "--size", "96"]), f"{SIZE} px", "96 px", f"--size {SIZE}")


# --- upright --------------------------------------------------------------------------------------


def test_a_row_flip_turns_robosuites_observation_upright(sim, played):
    """robosuite's renderer and ours on the same state: equal after [::-1], and in no other way."""
    from robosuite.utils.binding_utils import MjRenderContextOffscreen
    sim.reset(seed=0)
    sim.env.sim.set_state_from_flattened(played[0]["states"][9])
    sim.env.sim.forward()
    context = MjRenderContextOffscreen(sim.env.sim, device_id=-1)
    context.vopt.geomgroup[0] = 0
    seen = sim.frame()
    for camera, view in zip(CAMERAS, sim.cameras):
        raw = sim.env.sim.render(camera_name=view, width=SIZE, height=SIZE)
        ours = seen[f"{camera}_rgb"].astype(int)
        off = lambda picture: np.abs(picture - ours).mean()
        assert off(raw[::-1]) < 0.5 and min(off(raw), off(raw[::-1, ::-1]), off(raw[:, ::-1])) > 5, camera


def test_pictures_that_are_upright_already_stay_so(copied, played, sim, task, here):
    folder, source, ours = copied
    with h5py.File(source, "a") as f:
        f["data"].attrs["macros_image_convention"] = "opencv"
    ours.unlink()
    job, = official.plan(folder, SUITE, [task], 1, False)
    official.import_task(job)
    with h5py.File(folder / SUITE / task / "demo_0.hdf5") as f:
        assert np.array_equal(f["obs/agentview_rgb"], played[0]["agentview_rgb"][:-1, ::-1])


# --- which picture goes with which state ----------------------------------------------------------


def test_lag():
    joints = np.cumsum(np.random.default_rng(0).normal(size=(30, 7)), 0)
    near = joints + 0.1 * np.random.default_rng(1).normal(size=joints.shape)
    assert official.lag(near, joints) == 0 and official.lag(near[1:], joints[:-1]) == 1
    assert official.lag(0 * joints, 0 * joints) == 0, "a robot at rest says nothing"


def test_pictures_of_the_state_before_the_action(played, sim, tmp_path, task):
    """As in files that others made anew: nothing is lost."""
    whole = played[1]
    paired = {k: v if isinstance(v, str) else v[1:] if k in ("actions", "states") else v[:-1] for k, v in whole.items()}
    publish(tmp_path / "x.hdf5", [paired], task)
    with h5py.File(tmp_path / "x.hdf5") as f:
        episode, why = official.annotate(sim, f["data/demo_0"], -1, seed=0)
    assert why is None and len(episode["actions"]) == STEPS - 1
    for name in ("agentview_rgb", "states", "actions"):
        assert np.array_equal(episode[name], paired[name]), name


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, row, off", [("joint_states", 5, 0.05), ("gripper_states", STEPS - 2, -0.01), ("ee_states", 0, 0.02),
                                            ("joint_states", 3, np.nan)])
def test_a_changed_robot_state_is_no_replay(copied, refused, here, task, name, row, off):
    folder, source, ours = copied
    with h5py.File(source, "a") as f:
        f[f"data/demo_1/obs/{name}"][row, 1] += off
    ours.unlink()
    job, = official.plan(folder, SUITE, [task], 1, False)
    refused(lambda: official.import_task(job), source, "demo_1", f"{name} off by", f"step {row}")
    assert not ours.exists() and not ours.with_suffix("").exists()


def test_a_demonstration_that_strays_is_left_out_where_others_are(copied, played, here, task, capsys):
    folder, source, ours = copied
    with h5py.File(source, "a") as f:
        f["data"].copy("demo_2", "demo_10")
        f["data/demo_1/obs/joint_states"][5] += 0.05
    ours.unlink()
    job, = official.plan(folder, SUITE, [task], 1, False)
    assert official.import_task(job) == (task, SIZE, True)
    assert "left out" in (said := capsys.readouterr().out) and "demo_1 " in said
    made = []
    for k in range(3):
        with h5py.File(folder / SUITE / task / f"demo_{k}.hdf5") as one:
            made.append(one.attrs["original"])
    assert made == ["demo_0", "demo_2", "demo_10"], "in the order of their numbers"


def test_an_interrupted_import_goes_on(copied, here, task, refused):
    folder, source, ours = copied
    parts = ours.with_suffix("")
    split_assembled(ours, parts)
    (parts / "demo_2.hdf5").unlink()
    kept = [(parts / f"demo_{k}.hdf5").stat().st_mtime_ns for k in range(2)]
    refused(lambda: record.ensure(SUITE, [task], 1, folder, SIZE), parts, "--source official")
    job, = official.plan(folder, SUITE, [task], 1, False)
    official.import_task(job)
    assert [(parts / f"demo_{k}.hdf5").stat().st_mtime_ns for k in range(2)] == kept
    with h5py.File(parts / "demo_2.hdf5") as again, h5py.File(source) as f:
        assert again.attrs["original"] == "demo_2" and np.array_equal(again["states"], f["data/demo_2/states"][1:])


def test_nothing_is_made_twice(imported, task, capsys):
    assert official.plan(imported, SUITE, [task], 20, False) == [], "the published file holds no more"


def test_other_episodes_are_not_mixed(copied, task, refused):
    folder, source, ours = copied
    with h5py.File(ours, "a") as f:
        f["data"].attrs["source"] = "scripted"
    before = ours.read_bytes()
    refused(lambda: extract.main([*ASKED, "--data", str(folder)]), ours, "scripted", "--data")
    assert ours.read_bytes() == before


@pytest.mark.parametrize("missing", [*official.NEEDED, "obs", "model_file", "macros_image_convention", "demos", "data"])
def test_a_missing_group_is_named_and_nothing_is_written(copied, refused, missing):
    folder, source, ours = copied
    with h5py.File(source, "a") as f:
        if missing == "model_file":
            del f["data/demo_1"].attrs[missing]
        elif missing == "macros_image_convention":
            del f["data"].attrs[missing]
        elif missing == "data":
            del f["data"]
        else:
            for k in range(DEMOS) if missing == "demos" else [1]:
                del f[f"data/demo_{k}" + f"/{missing}" * (missing != "demos")]
    with h5py.File(ours, "a") as f:  # more are wanted than there are
        del f["data/demo_2"]
        f["data"].attrs["exhausted"] = False
    before = ours.read_bytes()
    words = {"demos": "data/demo_0", "data": "data/demo_0", "obs": "data/demo_1/obs"}.get(missing, missing)
    refused(lambda: extract.main([*ASKED, "--data", str(folder)]), source, f"lacks", words, "--download")
    assert ours.read_bytes() == before and not ours.with_suffix("").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "rows", "actions", "sizes", "floats", "data"])
def test_a_broken_file_is_one_line(copied, refused, damage):
    folder, source, ours = copied
    ours.unlink()
    whole = source.read_bytes()
    if damage in ("cut", "text"):
        source.write_bytes({"cut": whole[:len(whole) // 2], "text": b"hello" * 1000}[damage])
    elif damage == "data":
        with h5py.File(source, "w") as f:
            f["data"] = np.arange(5)
    else:
        with h5py.File(source, "a") as f:
            demo = f["data/demo_2"]
            key = {"rows": "states", "actions": "actions"}.get(damage, "obs/eye_in_hand_rgb")
            value = demo[key][:]
            del demo[key]
            demo[key] = {"rows": value[:-1], "floats": value / 255}.get(damage, value[:, :-1])
    refused(lambda: extract.main([*ASKED, "--data", str(folder)]), source, "fetch it again")
    assert not ours.exists()


def test_states_of_another_scene(copied, refused, here, task):
    folder, source, ours = copied
    ours.unlink()
    with h5py.File(source, "a") as f:
        for k in range(DEMOS):
            states = f[f"data/demo_{k}/states"][:, :-3]
            del f[f"data/demo_{k}/states"]
            f[f"data/demo_{k}/states"] = states
    job, = official.plan(folder, SUITE, [task], 1, False)
    refused(lambda: official.import_task(job), source, "demo_2", "numbers")


def test_only_libero_has_published_demonstrations(refused, tmp_path):
    refused(lambda: extract.main(["--preset", "laptop", "--suite", "mt10", "--source", "official", "--data", str(tmp_path)]), "mt10", SUITE)


# --- fetching -------------------------------------------------------------------------------------


def test_without_download_nothing_is_fetched(tmp_path, refused, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    argv = [*ASKED, "--data", str(tmp_path)]
    refused(lambda: extract.main(argv), f"{task}_demo.hdf5", "--download", f"https://huggingface.co/datasets/{official.HUB}")
    refused(lambda: extract.main([*argv, "--download"]), f"{task}_demo.hdf5", "pip install huggingface_hub", "https://")
    assert not list(tmp_path.rglob("*.hdf5"))


def test_download(tmp_path, refused, task, monkeypatch):
    hub, calls = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: official.locate(tmp_path, SUITE, task, True), f"{task}_demo.hdf5", "https://huggingface.co", "network")
    assert not list(tmp_path.rglob("*.hdf5"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a, **k: calls.append((a, k)))
    path = official.locate(tmp_path, SUITE, task, True)
    assert path == tmp_path / "official" / SUITE / f"{task}_demo.hdf5"
    assert calls == [((official.HUB, f"{SUITE}/{path.name}"), {"repo_type": "dataset", "local_dir": tmp_path / "official"})]
