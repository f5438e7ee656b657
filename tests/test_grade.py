"""grade.py: measures against their definitions, and the command on real data."""

import json
import os

import numpy as np
import pytest

from conftest import COMMON, ROOT, SIZE

import extract
from results import annotators, tables


def box(x, y, side=20, size=64):
    mask = np.zeros((size, size), bool)
    mask[y:y + side, x:x + side] = True
    return mask


def test_region_and_boundary():
    a = box(10, 10)
    assert annotators.region(a, a) == annotators.boundary(a, a) == 1
    assert annotators.region(a, box(20, 10)) == pytest.approx(200 / 600)
    assert annotators.region(a, box(40, 40)) == annotators.boundary(a, box(40, 40)) == 0
    assert annotators.boundary(a, box(11, 10)) == 1 and annotators.region(a, box(11, 10)) < 1, "a pixel off is within tolerance"
    none = np.zeros_like(a)
    assert annotators.region(none, none) == annotators.boundary(none, none) == 1 and annotators.boundary(none, a) == 0


def test_tracks_against_a_loop_over_points():
    rng = np.random.default_rng(0)
    T, K = 12, 30
    true = rng.random((T, K, 2))
    found = true + rng.normal(0, 6 / 256, (T, K, 2))
    visible, seen, when = rng.random((T, K)) < 0.7, rng.random((T, K)) < 0.7, rng.integers(T - 1, size=K)
    delta, jaccard, right, count = [], [], 0, 0
    for limit in (1, 2, 4, 8, 16):
        within = shown = hit = wrong = 0
        for k in range(K):
            for t in range(when[k] + 1, T):
                near = np.hypot(*(256 * (found[t, k] - true[t, k]))) < limit
                shown += visible[t, k]
                within += visible[t, k] and near
                hit += visible[t, k] and near and seen[t, k]
                wrong += seen[t, k] and not (visible[t, k] and near)
                if limit == 1:
                    right, count = right + (seen[t, k] == visible[t, k]), count + 1
        delta.append(within / shown)
        jaccard.append(hit / (shown + wrong))
    assert annotators.grade_tracks(found, seen, true, visible, when) == pytest.approx(
        (np.mean(delta), right / count, np.mean(jaccard)))
    assert annotators.grade_tracks(true, visible, true, visible, when) == (1, 1, 1)


def test_queries_are_at_the_first_sight():
    visible = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
    kept, when = annotators.queries(visible)
    assert kept.tolist() == [0, 1] and when.tolist() == [1, 0], "never seen, or in the last frame only: no query"


def test_flow_beats_points_that_stay(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*COMMON, "--size", str(SIZE), "--data", str(data), "--grade", "--masks", "sim", "--tracks", "flow"]
    extract.main(argv)
    found = json.loads((tmp_path / "results" / "libero_spatial_grade.json").read_text())
    assert found["episodes"] == 1 and found["points"] > 100 and "first mask" in capsys.readouterr().out
    moving = found["tracks"]["moving"]
    assert all(0 <= value <= 1 for row in moving.values() for value in row.values())
    assert moving["flow"]["average_jaccard"] > moving["stay"]["average_jaccard"]


def test_readmes_table_is_made_from_the_grades(tmp_path):
    lines = tables.grade_table(os.path.join(ROOT, "results"))
    with open(os.path.join(ROOT, "README.md")) as file:
        assert "\n".join(["<!-- grade -->", *lines, "<!-- /grade -->"]) in file.read()
    measures = {"delta_avg": 0.5, "occlusion_accuracy": 0.25, "average_jaccard": 0.125}
    found = {"suite": "s", "frames": 7, "size": 96, "points": 9, "masks": {"sam": {"J": 0.75, "F": 1}},
             "tracks": {"all": {"cotracker": measures}, "moving": {"cotracker": measures | {"delta_avg": 1}}}}
    (tmp_path / "s_grade.json").write_text(json.dumps(found))
    *_, masks, tracks = lines = tables.grade_table(tmp_path)
    assert masks == "| s: 7 frames of 96 px, 9 points | Grounding DINO, SAM, SAM 2 | 0.750 | 1.000 | | | |"
    assert tracks.endswith("| CoTracker | | | 0.500 / 1.000 | 0.250 / 0.250 | 0.125 / 0.125 |")
    (tmp_path / "README.md").write_text("before\n<!-- grade -->\nold\n<!-- /grade -->\nafter")
    tables.insert(tmp_path / "README.md", "grade", lines)
    assert (tmp_path / "README.md").read_text() == "\n".join(["before", "<!-- grade -->", *lines, "<!-- /grade -->", "after"])


def test_sam_wants_the_names_of_the_objects(data, refused):
    argv = [*COMMON, "--size", str(SIZE), "--data", str(data), "--grade"]
    refused(lambda: extract.main(argv), "--objects", "akita_black_bowl_1", "--masks sim")
