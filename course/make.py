"""Makes the repository that students start from: the project's files with the bodies of an
assignment's functions taken out, its README.md and its public tests.

    python -m course.make 1 --out handout

Everything else is the reference's, what earlier assignments ask for included, so that each can be
done alone.  Bodies are found in the syntax tree: the reference has no marks.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

from core.files import fail
from core.flags import flag, parse
from course.assignments import ASSIGNMENTS, find

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    number: tuple[str, ...] = flag((), "the assignment's", positional=True)
    out: str = flag("handout", "the student's repository: a new or an empty folder")


def function(source, name):
    """A function's node, and the numbers of its first line and of the line after its last."""
    node = find(ast.parse(source), name)
    first = min(n.lineno for n in [node, *node.decorator_list])
    return node, first - 1, node.end_lineno


def segment(source, name):
    """The lines of a function, decorators included."""
    _, first, end = function(source, name)
    return "".join(source.splitlines(True)[first:end])


def paste(source, name, text):
    """source with the lines of one function replaced."""
    _, first, end = function(source, name)
    lines = source.splitlines(True)
    return "".join([*lines[:first], text, *lines[end:]])


def empty(source, name, why):
    """source with the body of a function replaced by its docstring and an error."""
    node, first, _ = function(source, name)
    kept = source.splitlines(True)[first:node.body[0].end_lineno]  # up to the docstring's end
    error = f"{' ' * node.body[0].col_offset}raise NotImplementedError({json.dumps(why)})\n"
    return paste(source, name, "".join([*kept, error]))


def tracked():
    """Paths of the project's files, without the course's."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        fail(f"{ROOT} is no git repository: {run.stderr}")
    return [p for p in run.stdout.split("\0")[:-1] if (ROOT / p).exists()
            and not p.startswith(("course/", "tests/", ".ci/"))]


def readme(assignment):
    """The student's page."""
    a, lines, tasks = assignment, "\n".join, []
    fill = lambda text: textwrap.fill(text, 100, break_on_hyphens=False)
    for k, (key, points) in enumerate(a.keys.items(), 1):
        file, name = key.split(":")
        tasks.append(f"{k}. `{file}`: `{name}`, {points} points: {a.where[name]}")
    return f"""# Assignment {a.number}. {a.title}

**Read** first, with the papers open beside the code:
{lines(f"* {where}" for where in a.read)}

**Fill in** the functions below, in this order, in which their tests pass; each docstring has the
shapes. All else works and stays as it is. What the project is about: PROJECT.md.

{lines(tasks)}

**Test** one function, by its name as above, then all, then count the points; a function has its
points if all of its tests pass. `pip install -r requirements.txt` installs all that is needed.
```
python -m pytest course/tests -k {[*a.keys][0].split(":")[1]}
python -m pytest course/tests
python -m pytest course/tests --points
```

**Run** (about {a.minutes} minutes of one core, with the data, where it makes any):
```
{a.command}
```
{fill(f"You should see: {a.expect}. PROJECT.md says what is measured.")}
A finished run is not trained again: after a change of the code give a `--name`, or delete `runs`.

**Answer** in writing; each answer needs a measurement of your own, with its number of samples:
{lines(fill(f"{k}. {question}") for k, question in enumerate(a.questions, 1))}
"""


def make(assignment, folder, emptied=None):
    """Writes the handout; `emptied`: "file:function" of those to take out, without it all."""
    folder, emptied = Path(folder), assignment.keys if emptied is None else emptied
    for path in tracked():
        if not path.endswith((".json", ".jsonl")):
            os.makedirs((folder / path).parent, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    for key in emptied:
        file, name = key.split(":")
        source = (folder / file).read_text()
        why = f"{file}, {name}: {assignment.where[name]}"
        (folder / file).write_text(empty(source, name, why))
    (folder / "PROJECT.md").write_text("*The project's own page; its tests, its history and the "
                                       "course's page are not in a handout.*\n\n"
                                       + (folder / "README.md").read_text())
    (folder / "README.md").write_text(readme(assignment))
    ini = (ROOT / "pytest.ini").read_text()
    (folder / "pytest.ini").write_text(re.sub("--durations=\\d+ ?", "", ini.replace(
        "testpaths = tests", "testpaths = course/tests")))
    os.makedirs(folder / "course/tests")
    for path in ("__init__.py", "assignments.py", "tests/conftest.py", f"tests/{assignment.tests}"):
        shutil.copy(ROOT / "course" / path, folder / "course" / path)


def main(argv=None):
    """Command line: one assignment's handout, into a new or an empty folder."""
    config = parse(Config, "Makes the repository that students start from.", argv)
    chosen = [a for a in ASSIGNMENTS if config.number == (str(a.number),)]
    if not chosen:
        fail(f"give one number of {', '.join(str(a.number) for a in ASSIGNMENTS)}")
    if os.path.exists(config.out) and (not os.path.isdir(config.out) or os.listdir(config.out)):
        fail(f"--out {config.out}: it is there and not an empty folder; choose another")
    make(chosen[0], config.out)
    print(f"{config.out}: {len(chosen[0].keys)} functions to write; start with its README.md")


if __name__ == "__main__":
    main()
