"""What people type, hold and lose ends in one line that names the way out, and exit code 2: a table
of real runs of the real programs."""

import fcntl
import importlib
import shlex
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest

from conftest import SIZE, SUITE

PLANNERS = "mask_planner track_planner video_planner baselines.plex"
TINY = "--preset tiny --device cpu --tasks 0 --data {data} --out {out} "
# with these a run is there already, of other flags: refused before any data are made
RUN = TINY.replace("{out}", "{runs}").replace("{data}", "{out}")
FILM = "--data {out} --objects 'arm. bowl.' --tracks flow --video "
# programs, how their command starts, {how it goes on: words of the line}
ROWS = [
    (PLANNERS, TINY, {
        "--seed 99999999999999999999": "--seed at most", "--seed -1": "--seed at least 0",
        "--steps 0": "--steps at least 1", "--lr nan": "--lr nan", "--lr inf": "--lr inf",
        "--batch 0": "--batch at least 1", "--size 31": "--size at least 32",
        "--size 100": "--size multiple of 16", "--size 96": "--size 64 --size 96",
        "--tasks ²": "unknown task 0 to 9", "--tasks 77": "unknown task '77' 0 to 9",
        "--tasks ,": "unknown task '' 0 to 9", "--suite ''": "--suite is empty",
        "--suite libero_space": "libero_space libero_spatial mt10",
        "--suite libero_spatial:0": "libero_spatial:0 libero_spatial:2",
        "--name ../x": "--name ../x", "--name a/b": "--name a/b",
        "--device tpu": "--device tpu cpu", "--preset huge": "--preset tiny laptop paper",
        "--nothing 1": "--nothing --help", "--step 5": "--step --help",
        "--out {text}": "{text} folder", "--data {text}": "{text} file",
        "--out ''": "--out is empty", "--data ''": "--data is empty",
        "--data {broken}": "hdf5 not a whole data file delete extract.py",
        "--data {locked}": "hdf5 another program is writing it",
        "--show": "_tasks0.pt python mask_planner.py"}),
    ("mask_planner", TINY, {
        "--steps 1e3": "--steps invalid int --help", "--objects 0": "--objects at least 1",
        "--objects 9": "--objects 9 robot akita_black_bowl_1"}),
    ("mask_planner", RUN, {"--name mask_tasks0 --lr 0.5": "lr 0.5 another configuration --name"}),
    ("track_planner", TINY, {"--mask-ratio 2": "--mask-ratio at most 1"}),
    ("video_planner", TINY, {"--sample-steps 0": "--sample-steps at least"}),
    ("executor", TINY, {"": "--planner none python mask_planner.py"}),
    ("executor", TINY + "--planner ", {
        "none --chunk 0": "--chunk at least 1", "none --chunk 999999": "--chunk at most",
        "none --action-demos 3": "--action-demos 3 --demos 3", "no": "no none-language",
        "{mask} --form tracks": "--form tracks latent", "{mask} --chunk 3": "multiple --chunk",
        "{mask} --fusion all": "--fusion early late both",
        "none --suite libero_space": "libero_space libero_spatial",
        "{out}/no.pt": "no.pt python mask_planner.py", "{cut}": "cut.pt python mask_planner.py",
        "{executor}": "executor mask", "{out}": "mask_planner.py",
        "none --data {broken}": "hdf5 not whole delete"}),
    ("executor", RUN + "--planner {mask} --name mask_tasks0_executor ", {
        "--fusion late": "fusion late another configuration --name"}),
    ("rollout", "demonstrator ", {
        "--episodes 0": "--episodes at least 1", "--episodes 51": "50 test scenes",
        "--noise -1": "--noise at least 0", "--noise nan": "--noise nan",
        "--scenes 9999999999999": "--scenes seed such as 2000",
        "--scenes ²": "--scenes development", "--workers 0": "--workers at least 1",
        "{executor}": "demonstrator checkpoint",
        "--suite mt10 --unseen layout": "mt10 libero_spatial",
        "--suite libero_90 --unseen layout": "libero_90 libero_spatial",
        "--suite libero_spatial_ur5e --unseen layout": "libero_spatial_ur5e"}),
    ("rollout", "", {
        "": "no checkpoint demonstrator", "{out}/no.pt": "no.pt python executor.py",
        "{text}": "note.txt damaged", "{cut}": "cut.pt damaged", "{mask}": "mask executor"}),
    ("rollout", "{executor} ", {
        "--suite mt10": "--suite demonstrator", "--noise 0.1": "--noise demonstrator",
        "--tasks 1": "was not trained on", "--tasks 77": "unknown task '77'",
        "{executor}": "two of --results", "--unseen weather": "--unseen layout",
        "--results {text}": "{text} folder", "--results ''": "--results is empty"}),
    ("extract", "--data {out} ", {
        "--demos 0": "--demos at least 1", "--suite ../x": "../x libero_spatial",
        "--suite mt10 --source official": "mt10 libero_spatial",
        "--objects 'arm. bowl.'": "--objects --masks sam",
        "--video {text} --suite mine --tracks flow": "--video needs --objects",
        "--tasks 0 --data {text}": "{text} file"}),
    ("extract", "--tasks 0 --data {data} --weights {out} ", {
        "--masks sam": "{out} grounding-dino-tiny --download",
        "--tracks cotracker": "CoTracker --tracks flow"}),
    ("extract", FILM + "{text} --suite ", {
        "mine --masks sim": "no simulator --masks sam",
        "{suite}": "--suite libero_spatial my_videos", "libero_spatial_ur5e": "simulator my_videos",
        "../x": "../x my_videos", "''": "--suite is empty", "mine": "note.txt no frames"}),
    ("extract", FILM, {
        "{out}/no.mp4 --suite mine": "no.mp4 film", "{two} --suite mine": "two 2 films 3 or more",
        "{none} --suite mine": "none 0 films",
        "{two}/a.mp4 --suite mine": "a.mp4 1 frames 24 longer"}),
    ("baselines.plex baselines.vpt", TINY, {"--action-demos 5": "--action-demos 5 --demos 5"}),
    ("baselines.vpt", TINY, {"--show": "--show --help"}),
    ("baselines.vpt video_control.flow", TINY, {
        "--suite libero_space": "libero_space libero_spatial"}),
    ("baselines.cloning", "--out {out}/r3m.pt ", {
        "": "--r3m published", "--r3m {mask}": "module.convnet. r3m published",
        "--r3m {out}/no.pt": "no.pt load_r3m"}),
    ("video_control.flow", TINY, {"--size 65": "--size 65 multiple of 16"}),
    ("video_control.unipi", TINY + "--planner ", {
        "{mask}": "mask video", "none": "video_planner.py"}),
    ("video_control.avdc", "--out {out} ", {
        "": "oracle true video_planner.py", "oracle --suite libero_spatial": "Meta-World",
        "true": "flow.pt video_control.flow", "{out}/no.pt": "no.pt video_planner.py"}),
    ("results.tables", "--results {none}", {"": "no results rollout.py"}),
    ("results.figures", "", {
        "": "curve keypoints", "curve --results {none}": "no success rates rollout.py",
        "keypoints {mask}": "mask executor"}),
    ("results.annotators", "--data {none} ", {
        "--suite libero_space": "libero_space libero_spatial",
        "--tracks flow": "no data file extract.py",
        "--tasks 0 --masks sam --objects arm.": "--objects akita_black_bowl_1"}),
]
ALL = [(program, start + rest, words) for programs, start, cases in ROWS
       for rest, words in cases.items() for program in programs.split()]


@pytest.fixture(scope="module")
def places(data, data_file, mask_path, executor_path, tmp_path_factory):
    """What rows name in braces."""
    folder = tmp_path_factory.mktemp("border")
    named = {name: folder / name for name in ("none", "two", "broken", "locked")}
    for name in ("none", "two", f"broken/{SUITE}", f"locked/{SUITE}"):
        (folder / name).mkdir(parents=True)
    for name in "ab":       # films of one frame
        picture = np.zeros((1, SIZE, SIZE, 3), np.uint8)
        imageio.imwrite(folder / "two" / f"{name}.mp4", picture, fps=5)
    whole = data_file.read_bytes()
    (folder / "broken" / SUITE / data_file.name).write_bytes(whole[:len(whole) // 2])
    (folder / "locked" / SUITE / data_file.name).write_bytes(whole)
    (folder / "note.txt").write_text("no film, no folder, no checkpoint\n")
    (folder / "cut.pt").write_bytes(mask_path.read_bytes()[:-100])
    with open(folder / "locked" / SUITE / data_file.name, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)        # as a program that writes it does
        yield named | {"data": data, "mask": mask_path, "executor": executor_path, "suite": SUITE,
                       "text": folder / "note.txt", "cut": folder / "cut.pt", "out": folder / "out",
                       "runs": mask_path.parents[1]}


@pytest.mark.parametrize("program, argv, words", ALL,
                         ids=[f"{p} {argv.replace(TINY, '')}"[:60] for p, argv, _ in ALL])
def test_one_line(places, refused, monkeypatch, program, argv, words):
    monkeypatch.chdir(places["text"].parent)
    argv = shlex.split(argv.format(**places))
    refused(lambda: importlib.import_module(program).main(argv), *words.format(**places).split())
    left = [*places["out"].glob("*")]
    shutil.rmtree(places["out"], ignore_errors=True)
    assert not left, "nothing is left behind"
