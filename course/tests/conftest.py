"""Public tests of any implementation.

    python -m pytest course/tests --impl handout --assignment 1 --points

--impl: a folder with the project's files, the student's; without it, those here.  --assignment: its
number; without it, that of a handout, which holds the tests of one, or all.  A test marked
`grades(function)` decides on that function's points, and `-k function` selects it.
"""

import ast
import json
import os
import sys
from pathlib import Path

import pytest

from course.assignments import ASSIGNMENTS, find

RESULTS = {}  # (file of tests, function) -> {test: what went wrong, or ""}
BROKEN = {}  # file of tests that could not be imported -> why


def pytest_addoption(parser):
    parser.addoption("--impl", help="folder of the implementation")
    parser.addoption("--assignment", type=int, help="its number")
    parser.addoption("--points", action="store_true", help="points per function, and as JSON")


def implementation(config):
    """The folder, and the assignments that are graded in it."""
    given, number = config.getoption("impl"), config.getoption("assignment")
    if given == "":
        raise pytest.UsageError("--impl is empty: give the folder of the implementation")
    impl = Path(config.rootpath if given is None else given).resolve()
    own = {path.name for path in impl.glob("course/tests/test_*.py")}
    return impl, [a for a in ASSIGNMENTS if a.number == number or number is None and (
        not own or a.tests in own)]


def check(impl, assignments):
    """Refuses, in one line, what cannot be graded."""
    if not impl.is_dir():
        raise pytest.UsageError(f"--impl {impl}: no such folder")
    if not assignments:
        raise pytest.UsageError(f"--assignment: give a number from 1 to {len(ASSIGNMENTS)}")
    for file, name in (key.split(":") for a in assignments for key in a.keys):
        if not (impl / file).is_file():
            raise pytest.UsageError(f"--impl {impl}: it has no {file}")
        try:
            tree = ast.parse((impl / file).read_bytes())
        except SyntaxError as error:
            raise pytest.UsageError(f"{impl / file}, line {error.lineno}: {error.msg}") from None
        if not find(tree, name):
            raise pytest.UsageError(f"{impl / file} has no function {name}")


def pytest_configure(config):
    """Puts the implementation first on the path, before anything of it is imported."""
    config.addinivalue_line("markers", "grades(function): decides on this function's points")
    impl, assignments = implementation(config)
    check(impl, assignments)
    # a program that grades has imported modules of its own of the same names
    ours = {p.stem for p in impl.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    for name in [name for name in sys.modules if name.split(".")[0] in ours - {"course"}]:
        del sys.modules[name]
    sys.path.insert(0, str(impl))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small tensors more threads are slower


def pytest_ignore_collect(collection_path, config):
    names = {a.tests for a in implementation(config)[1]}
    return collection_path.suffix == ".py" and collection_path.name not in names or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        item.extra_keyword_matches.update(m.args[0] for m in item.iter_markers("grades"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes what each test decides, and prints its docstring, paper and equation, if it fails."""
    report = yield
    wrong = call.excinfo and f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[0]
    if report.failed and item.obj.__doc__:
        report.sections.insert(0, ("What it tests", item.obj.__doc__))
    for mark in item.iter_markers("grades"):
        if not report.passed or call.when == "call":  # a skipped test is not a passed one
            RESULTS.setdefault((item.path.name, mark.args[0]), {})[item.name] = wrong or ""
    return report


def pytest_collectreport(report):
    """What cannot be imported is the cause of all lost points."""
    if report.failed:
        BROKEN[Path(report.nodeid).name] = str(report.longrepr).splitlines()[-1]


def pytest_terminal_summary(terminalreporter, config):
    """With --points: points per function, and as one line of JSON."""
    if not config.getoption("points"):
        return
    functions = {}
    for a, key in ((a, key) for a in implementation(config)[1] for key in a.keys):
        tests, points = RESULTS.get((a.tests, key.split(":")[1]), {}), a.keys[key]
        failed = {test: wrong for test, wrong in tests.items() if wrong}
        failed |= {"import": BROKEN[a.tests]} if a.tests in BROKEN else {}
        functions[key] = {"points": points * (bool(tests) and not failed), "of": points,
                          "tests": len(tests), "failed": failed}
        terminalreporter.line(f"{functions[key]['points']:4d} of {points:3d}  {key}  "
                              f"({len(tests) - len(failed)} of {len(tests)} tests)")
    total = {word: sum(f[word] for f in functions.values()) for word in ("points", "of")}
    terminalreporter.line(f"{total['points']:4d} of {total['of']:3d}  in all")
    terminalreporter.line(json.dumps(total | {"functions": functions}))
