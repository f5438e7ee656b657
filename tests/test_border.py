"""What people type, hold and lose ends in one line: a table of real runs of the real programs.

A row: what goes wrong, the command, words of the line that names the way out.  Exit code 2.
"""

import fcntl
import importlib
import shlex
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest

from conftest import SIZE, SUITE

PLANNERS = ["mask_planner", "track_planner", "video_planner", "baselines.plex"]
TINY = "--preset tiny --device cpu --tasks 0 --data {data} --out {out}"
# planner: every planner's program
FILM = "--data {out} --objects 'arm. bowl.' --video "
RUN = TINY.replace("{out}", "{runs}").replace("{data}", "{out}")
ROWS = [
    # numbers
    ("planner", TINY + " --seed 99999999999999999999", "--seed at most"),
    ("planner", TINY + " --seed -1", "--seed at least 0"),
    ("planner", TINY + " --steps 0", "--steps at least 1"),
    ("planner", TINY + " --lr nan", "--lr nan"),
    ("planner", TINY + " --lr inf", "--lr inf"),
    ("planner", TINY + " --batch 0", "--batch at least 1"),
    ("planner", TINY + " --size 31", "--size at least 32"),
    ("planner", TINY + " --size 100", "--size multiple of 16"),
    ("mask_planner", TINY + " --steps 1e3", "--steps invalid int --help"),
    ("mask_planner", TINY + " --objects 0", "--objects at least 1"),
    ("mask_planner", TINY + " --objects 9", "--objects 9 robot akita_black_bowl_1"),
    ("track_planner", TINY + " --mask-ratio 2", "--mask-ratio at most 1"),
    ("video_planner", TINY + " --sample-steps 0", "--sample-steps at least"),
    ("executor", TINY + " --planner none --chunk 0", "--chunk at least 1"),
    ("executor", TINY + " --planner none --chunk 999999", "--chunk at most"),
    ("executor", TINY + " --planner none --action-demos 3", "--action-demos 3 --demos 3"),
    ("rollout", "demonstrator --tasks 0 --episodes 0", "--episodes at least 1"),
    ("rollout", "demonstrator --tasks 0 --episodes 51", "50 test scenes"),
    ("rollout", "demonstrator --tasks 0 --noise -1", "--noise at least 0"),
    ("rollout", "demonstrator --tasks 0 --noise nan", "--noise nan"),
    ("rollout", "demonstrator --tasks 0 --scenes 9999999999999", "--scenes seed such as 2000"),
    ("rollout", "demonstrator --tasks 0 --scenes ²", "--scenes development"),
    ("rollout", "demonstrator --tasks 0 --workers 0", "--workers at least 1"),
    ("extract", "--demos 0", "--demos at least 1"),
    # words
    ("planner", TINY.replace(" 0 ", " ² "), "unknown task 0 to 9"),
    ("planner", TINY.replace(" 0 ", " 77 "), "unknown task '77' 0 to 9"),
    ("planner", TINY.replace(" 0 ", " , "), "unknown task '' 0 to 9"),
    ("planner", TINY + " --suite libero_space", "libero_space libero_spatial mt10"),
    ("planner", TINY + " --suite ''", "--suite is empty"),
    ("planner", TINY + " --suite libero_spatial:0", "libero_spatial:0 libero_spatial:2"),
    ("planner", TINY + " --name ../x", "--name ../x"),
    ("planner", TINY + " --name a/b", "--name a/b"),
    ("planner", TINY + " --device tpu", "--device tpu cpu"),
    ("planner", "--preset huge", "--preset tiny laptop paper"),
    ("planner", TINY + " --nothing 1", "--nothing --help"),
    ("planner", TINY + " --step 5", "--step --help"),
    ("executor", TINY, "--planner none python mask_planner.py"),
    ("executor", TINY + " --planner no", "no none-language"),
    ("executor", TINY + " --planner {mask} --form tracks", "--form tracks latent"),
    ("executor", TINY + " --planner {mask} --chunk 3", "multiple --chunk"),
    ("executor", TINY + " --planner {mask} --fusion all", "--fusion early late both"),
    ("executor", TINY + " --planner none --suite libero_space", "libero_space libero_spatial"),
    ("rollout", "", "no checkpoint demonstrator"),
    ("rollout", "demonstrator {executor}", "demonstrator checkpoint"),
    ("rollout", "{executor} --suite mt10", "--suite demonstrator"),
    ("rollout", "{executor} --noise 0.1", "--noise demonstrator"),
    ("rollout", "{executor} --tasks 1", "was not trained on"),
    ("rollout", "{executor} --tasks 77", "unknown task '77'"),
    ("rollout", "{executor} {executor}", "two of --results"),
    ("rollout", "demonstrator --suite mt10 --unseen layout", "mt10 libero_spatial"),
    ("rollout", "demonstrator --suite libero_90 --unseen layout", "libero_90 libero_spatial"),
    ("rollout", "demonstrator --suite libero_spatial_ur5e --unseen layout", "libero_spatial_ur5e"),
    ("rollout", "{executor} --unseen weather", "--unseen layout"),
    ("extract", "--suite ../x --data {out}", "../x libero_spatial"),
    ("extract", "--suite mt10 --source official --data {out}", "mt10 libero_spatial"),
    # flags that contradict, or that would be ignored
    ("extract", FILM + "{text} --suite mine --masks sim", "no simulator --masks sam"),
    ("extract", FILM + "{text} --suite {suite} --tracks flow", "--suite libero_spatial my_videos"),
    ("extract", FILM + "{text} --suite libero_spatial_ur5e --tracks flow", "simulator my_videos"),
    ("extract", FILM + "{text} --suite ../x --tracks flow", "../x my_videos"),
    ("extract", FILM + "{text} --suite '' --tracks flow", "--suite is empty"),
    ("extract", "--objects 'arm. bowl.' --data {out}", "--objects --masks sam"),
    ("extract", "--video {text} --suite mine --tracks flow", "--video needs --objects"),
    ("extract", "--masks sam --tasks 0 --data {data} --weights {out}", "grounding-dino --download"),
    ("extract", "--tracks cotracker --tasks 0 --data {data} --weights {out}",
     "CoTracker --tracks flow"),
    # places
    ("planner", TINY.replace("{out}", "{text}"), "{text} folder"),
    ("planner", TINY.replace("{data}", "{text}"), "{text} file"),
    ("planner", TINY.replace("{out}", "''"), "--out is empty"),
    ("planner", TINY.replace("{data}", "''"), "--data is empty"),
    ("rollout", "{executor} --results {text}", "{text} folder"),
    ("rollout", "{executor} --results ''", "--results is empty"),
    ("rollout", "{out}/no.pt", "no.pt python executor.py"),
    ("rollout", "{text}", "note.txt damaged"),
    ("rollout", "{cut}", "cut.pt damaged"),
    ("rollout", "{mask}", "mask executor"),
    ("executor", TINY + " --planner {out}/no.pt", "no.pt python mask_planner.py"),
    ("executor", TINY + " --planner {cut}", "cut.pt python mask_planner.py"),
    ("executor", TINY + " --planner {executor}", "executor mask"),
    ("executor", TINY + " --planner {out}", "mask_planner.py"),
    ("extract", "--data {text} --tasks 0", "{text} file"),
    ("extract", FILM + "{out}/no.mp4 --suite mine --tracks flow", "no.mp4 film"),
    # films and data files
    ("extract", FILM + "{text} --suite mine --tracks flow", "note.txt no frames"),
    ("extract", FILM + "{two} --suite mine --tracks flow", "two 2 films 3 or more"),
    ("extract", FILM + "{two}/a.mp4 --suite mine --tracks flow", "a.mp4 1 frames 24 longer"),
    ("extract", FILM + "{none} --suite mine --tracks flow", "none 0 films"),
    ("planner", TINY.replace("{data}", "{broken}"), "hdf5 not a whole data file delete extract.py"),
    ("executor", TINY.replace("{data}", "{broken}") + " --planner none", "hdf5 not whole delete"),
    ("planner", TINY.replace("{data}", "{locked}"), "hdf5 another program is writing it"),
    ("planner", TINY + " --size 96", "--size 64 --size 96"),
    ("planner", TINY + " --show", "_tasks0.pt python mask_planner.py"),
    # a run that is there, of other flags: before any data are made
    ("mask_planner", RUN + " --name mask_tasks0 --lr 0.5", "lr 0.5 another configuration --name"),
    ("executor", RUN + " --planner {mask} --name mask_tasks0_executor --fusion late",
     "fusion late another configuration --name"),
    ("baselines.plex", TINY + " --action-demos 5", "--action-demos 5 --demos 5"),
    ("baselines.vpt", TINY + " --action-demos 5", "--action-demos 5 --demos 5"),
    # the programs in folders
    ("baselines.vpt", TINY + " --show", "--show --help"),
    ("baselines.vpt", TINY + " --suite libero_space", "libero_space libero_spatial"),
    ("baselines.cloning", "--out {out}/r3m.pt", "--r3m published"),
    ("baselines.cloning", "--r3m {mask} --out {out}/r3m.pt", "module.convnet. r3m published"),
    ("baselines.cloning", "--r3m {out}/no.pt", "no.pt load_r3m"),
    ("video_control.flow", "--preset tiny --size 65 --out {out}", "--size 65 multiple of 16"),
    ("video_control.flow", TINY + " --suite libero_space", "libero_space libero_spatial"),
    ("video_control.unipi", TINY + " --planner {mask}", "mask video"),
    ("video_control.unipi", TINY + " --planner none", "video_planner.py"),
    ("video_control.avdc", "", "oracle true video_planner.py"),
    ("video_control.avdc", "oracle --suite libero_spatial --out {out}", "Meta-World"),
    ("video_control.avdc", "true --out {out}", "flow.pt video_control.flow"),
    ("video_control.avdc", "{out}/no.pt --out {out}", "no.pt video_planner.py"),
    ("results.tables", "--results {none}", "no results rollout.py"),
    ("results.figures", "", "curve keypoints"),
    ("results.figures", "curve --results {none}", "no success rates rollout.py"),
    ("results.figures", "keypoints {mask}", "mask executor"),
    ("results.annotators", "--suite libero_space --data {none}", "libero_space libero_spatial"),
    ("results.annotators", "--tracks flow --data {none}", "no data file extract.py"),
]
ALL = [(p, argv, words) for program, argv, words in ROWS
       for p in (PLANNERS if program == "planner" else [program])]


@pytest.fixture(scope="module")
def places(data, data_file, runs, mask_path, executor_path, tmp_path_factory):
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
                       "text": folder / "note.txt", "cut": folder / "cut.pt", "runs": runs,
                       "out": folder / "out"}


@pytest.mark.parametrize("program, argv, words", ALL,
                         ids=[f"{p} {argv.replace(TINY, '')}"[:60] for p, argv, _ in ALL])
def test_one_line(places, refused, monkeypatch, program, argv, words):
    monkeypatch.chdir(places["text"].parent)
    argv = shlex.split(argv.format(**places))
    refused(lambda: importlib.import_module(program).main(argv), *words.format(**places).split())
    left = [*places["out"].glob("*")]
    shutil.rmtree(places["out"], ignore_errors=True)
    assert not left, "nothing is left behind"
