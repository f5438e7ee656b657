"""Do the public tests catch plausible mistakes?  Each is made in a copy, and the tests that grade
its function are run.

    python -m course.mutate
    python -m course.mutate --assignment 1

Caught is what an assertion refuses, not what crashes.  Ends with exit code 1 if a mistake passes;
a run of all assignments writes the table of course/mutants/README.md.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from core.files import fail, write
from core.flags import flag, parse
from course.assignments import ASSIGNMENTS
from course.make import ROOT, paste, segment, tracked


@dataclass
class Config:
    assignment: int = flag(0, "its number; 0: all", maximum=len(ASSIGNMENTS))


@functools.cache
def forks():
    """Makes processes forked from one without threads, which has imported what is graded."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", *(
        file.removesuffix(".py").replace("/", ".") for a in ASSIGNMENTS for file in a.functions)])
    return context


def run(impl, tests, select):
    """Worker: what pytest --points prints."""
    sys.dont_write_bytecode = True  # a stale file of it would hide the next mistake
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        pytest.main([str(ROOT / "course/tests" / tests), "-k", select, "--points",
                     "--impl", str(impl), "-p", "no:cacheprovider"])
    return out.getvalue()


def grade(impl, tests, select=""):
    """The public tests of an implementation, those that match `select` (pytest's -k), in a process
    of their own, which need not import torch again -> what --points writes."""
    with forks().Pool(1) as pool:
        text = pool.apply(run, (str(impl), tests, select))
    found = re.search(r"^\{.*\}$", text, re.M) or fail(f"{tests} cannot be run: {text}")
    return json.loads(found[0])


def mutants(assignment):
    """{"file:function": [(text, its replacement)]}."""
    word = "zero one two three four five six seven eight nine".split()[assignment.number]
    return importlib.import_module(f"course.mutants.{word}").MUTANTS


def copy(folder):
    """The project's Python files in a folder of their own."""
    for path in tracked():
        if path.endswith(".py"):
            os.makedirs((folder / path).parent, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)


def catch(assignment, key, changes, impl):
    """Each change of one function in turn -> the names of the tests that catch it."""
    file, name = key.split(":")
    source = (impl / file).read_text()
    code = segment(source, name)
    for old, new in changes:
        if code.count(old) != 1:
            fail(f"{key}: {old!r} is there {code.count(old)} times, and must be once")
        (impl / file).write_text(paste(source, name, code.replace(old, new)))
        failed = grade(impl, assignment.tests, name)["functions"][key]["failed"]
        (impl / file).write_text(source)
        yield [test for test, wrong in failed.items() if wrong.startswith(("Assert", "Failed"))]


def main(argv=None):
    """Command line: a line per mistake, then the table; exit code 1 if one passes."""
    config = parse(Config, "Do the public tests catch plausible mistakes?", argv)
    rows, alive = ["| assignment | function | caught | by the tests |", "|---|---|---|---|"], 0
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        for a in ASSIGNMENTS:
            if config.assignment not in (0, a.number):
                continue
            for key, changes in mutants(a).items():
                caught = []
                for change, tests in zip(changes, catch(a, key, changes, Path(folder))):
                    print(key, "%r -> %r:" % change, ", ".join(tests) or "SURVIVED", flush=True)
                    caught += [{test[5:].split("[")[0] for test in tests}] * bool(tests)
                alive += len(changes) - len(caught)
                count = Counter(sorted(test for tests in caught for test in tests)).most_common()
                tests = ", ".join(f"{test} {times}" for test, times in count)
                rows.append(f"| {a.number} | `{key.split(':')[1]}` | {len(caught)} of "
                            f"{len(changes)} | {tests} |")
    print("\n".join(rows))
    if not config.assignment:
        page = ROOT / "course/mutants/README.md"
        write(page, re.sub("(?s)(?<=<!-- mutants -->\n).*(?=<!-- /mutants -->)",
                           "".join(row + "\n" for row in rows), page.read_text()))
    raise SystemExit(1 if alive else 0)


if __name__ == "__main__":
    main()
