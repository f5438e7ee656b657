"""course/: handouts fail function by function and pass with the reference's bodies, tests pass a
second implementation, catch mistakes and refuse in one line what they cannot grade."""

import ast
import json
import re
from pathlib import Path

import pytest

from conftest import ROOT, python
from course import make, mutate
from course.assignments import ASSIGNMENTS, find

SLOW = [pytest.param(a, marks=pytest.mark.slow) for a in ASSIGNMENTS]
SECOND = [a for a in ASSIGNMENTS if Path(ROOT, f"course/tests/second/{a.name}.py").exists()]
name_of = lambda a: a.name


def paste(folder, key, code):
    """The function `key` of the handout is from now on the one of the source `code`."""
    path, name = folder / key.split(":")[0], key.split(":")[1]
    path.write_text(make.paste(path.read_text(), name, make.segment(code, name)))


@pytest.mark.parametrize("a", ASSIGNMENTS, ids=name_of)
def test_a_handout_holds_no_solution(a, tmp_path):
    """Every point is lost, for want of what was taken out and of nothing else."""
    make.main([str(a.number), "--out", str(tmp_path / "handout")])
    for file, name in (key.split(":") for key in a.keys):
        node = find(ast.parse((tmp_path / "handout" / file).read_text()), name)
        assert ast.get_docstring(node) and len(node.body) == 2, name
    report = mutate.grade(tmp_path / "handout", a.tests)
    assert report["points"] == 0 and report["functions"].keys() == a.keys.keys()
    for result in report["functions"].values():
        assert len(result["failed"]) == result["tests"] > 0, result
        assert all(re.match(r"NotImplementedError: \S+\.py, \S+: \w", wrong)
                   for wrong in result["failed"].values()), result
    text = " ".join((tmp_path / "handout/README.md").read_text().split())
    wanted = (a.title, a.command, *a.read, a.expect, *a.questions)
    assert all(" ".join(words.split()) in text for words in wanted)


@pytest.mark.parametrize("a", ASSIGNMENTS[:1] + SLOW[1:], ids=name_of)
def test_functions_pass_one_by_one(a, tmp_path):
    """In the order of README, with the reference's bodies: what is written passes, the rest not."""
    make.make(a, tmp_path)
    for done, key in enumerate(a.keys, 1):
        paste(tmp_path, key, Path(ROOT, key.split(":")[0]).read_text())
        results = mutate.grade(tmp_path, a.tests)["functions"]
        assert [k for k in a.keys if results[k]["points"]] == [*a.keys][:done], results


@pytest.mark.parametrize("a", ASSIGNMENTS, ids=name_of)
def test_the_reference_passes_and_what_mistakes_change_stands_there_once(a):
    found = mutate.grade(ROOT, a.tests)["functions"]
    assert all(found[key]["points"] for key in a.keys), found
    for key, changes in mutate.mutants(a).items():
        code = make.segment(Path(ROOT, key.split(":")[0]).read_text(), key.split(":")[1])
        assert all(code.count(old) == 1 for old, _ in changes), key


@pytest.mark.parametrize("a", SECOND, ids=name_of)
def test_another_style_passes(a, tmp_path):
    make.make(a, tmp_path, emptied=[])
    code = Path(ROOT, f"course/tests/second/{a.name}.py").read_text()
    for key in a.keys:
        paste(tmp_path, key, code)
    for file in a.functions:
        (tmp_path / file).open("a").writelines(re.findall("(?m)^(?:import|from) .*\n", code))
    report = mutate.grade(tmp_path, a.tests)
    assert report["points"] == report["of"], report


@pytest.mark.parametrize("a", ASSIGNMENTS[:1] + SLOW[1:], ids=name_of)
def test_mistakes_are_caught(a, tmp_path):
    """Of the first function; `python -m course.mutate` makes those of all."""
    mutate.copy(tmp_path)
    assert mutate.mutants(a).keys() == a.keys.keys()
    for key, changes in [*mutate.mutants(a).items()][:1]:
        assert len({*changes}) >= 5 and all(mutate.catch(a, key, changes, tmp_path)), key


def test_points_are_lost_by_what_is_skipped_or_cannot_be_imported(tmp_path):
    """And a handout that holds the tests of another assignment is graded as the number says."""
    make.make(ASSIGNMENTS[0], tmp_path, emptied=[])
    (tmp_path / "course/tests/test_1_masks.py").rename(tmp_path / "course/tests/test_4_video.py")
    file, good = tmp_path / "mask_planner.py", Path(ROOT, "mask_planner.py").read_text()
    skips = good.replace("    m, g = prob", "    import pytest\n    pytest.skip()\n    m, g = prob")
    for text, wrong in ((skips, "Skipped"), (f"import nowhere\n{good}", "No module named")):
        file.write_text(text)
        run = python("-m", "pytest", "course/tests", "--impl", tmp_path, "--assignment", "1",
                     "--points", "-k", "dice or iou")
        lost = json.loads(run.stdout[run.stdout.index('{"points"'):].splitlines()[0])
        of = [f for key, f in lost["functions"].items() if key.endswith((":dice", ":iou"))]
        assert {*lost["functions"]} == {*ASSIGNMENTS[0].keys}
        assert any(wrong in why for f in of for why in f["failed"].values()), run.stdout
        assert 0 in [f["points"] for f in of]


def test_what_cannot_be_graded_ends_in_one_line(tmp_path, refused):
    refused(lambda: make.main(["0", "--out", str(tmp_path / "x")]), "1, 2")
    refused(lambda: make.main(["1", "--out", ROOT]), ROOT, "empty")
    make.make(ASSIGNMENTS[0], tmp_path, emptied=[])
    file, good = tmp_path / "mask_planner.py", Path(ROOT, "mask_planner.py").read_text()
    for impl, text, words in ((tmp_path / "nowhere", good, "no such folder"),
                              ("", good, "--impl is empty"),
                              (tmp_path, good.replace("def dice(", "def nice("), "function dice"),
                              (tmp_path, good.replace("def dice(", "def dice"), "line"),
                              (tmp_path / "core", good, "has no mask_planner.py")):
        file.write_text(text)
        run = python("-m", "pytest", "course/tests", "--impl", impl)
        lines = (run.stdout + run.stderr).strip().splitlines()
        assert run.returncode not in (0, 1) and len(lines) == 1 and words in lines[0], lines
