"""results/annotators.py: measures against their definitions, and the command on real data."""

import json

import numpy as np
import pytest

from conftest import SUITE
from results import annotators


def test_region_and_boundary():
    """A pixel's shift is tolerated by F alone; the picture's border is no boundary."""
    def box(x, y, side=20):
        mask = np.zeros((64, 64), bool)
        mask[y:y + side, x:x + side] = True
        return mask

    a, none = box(10, 10), np.zeros((64, 64), bool)
    for found, true, J, F in ((a, a, 1, 1), (a, box(40, 40), 0, 0), (none, none, 1, 1),
                              (none, a, 0, 0), (a, box(11, 10), 380 / 420, 1), (~none, none, 0, 1)):
        assert annotators.region(found, true) == pytest.approx(J)
        assert annotators.boundary(found, true) == pytest.approx(F)


def test_tracks_against_a_loop_over_points():
    rng, T, K = np.random.default_rng(0), 12, 30
    true = rng.random((T, K, 2))
    found = true + rng.normal(0, 6 / 256, (T, K, 2))
    visible, seen, when = *(rng.random((2, T, K)) < 0.7), rng.integers(T - 1, size=K)
    later = [(t, k) for k in range(K) for t in range(when[k] + 1, T)]
    shown, delta, jaccard = sum(visible[at] for at in later), [], []
    for limit in (1, 2, 4, 8, 16):
        near = [at for at in later if np.hypot(*(256 * (found[at] - true[at]))) < limit]
        hit = sum(visible[at] and seen[at] for at in near)
        wrong = sum(seen[at] and not (visible[at] and at in near) for at in later)
        delta.append(sum(visible[at] for at in near) / shown)
        jaccard.append(hit / (shown + wrong))
    right = np.mean([seen[at] == visible[at] for at in later])
    grade = annotators.grade_tracks(found, seen, true, visible, when)
    assert list(grade.values()) == pytest.approx([np.mean(delta), right, np.mean(jaccard)])
    assert set(annotators.grade_tracks(true, visible, true, visible, when).values()) == {1}
    kept, when = annotators.queries(np.array([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]], bool))
    assert (kept.tolist(), when.tolist()) == ([0, 1], [1, 0]), "at the first sight, not at the last"


def test_flow_beats_points_that_stay(data, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    argv = ["--suite", SUITE, "--tasks", "0", "--data", str(data), "--device", "cpu"]
    annotators.main([*argv, "--tracks", "flow"])
    grades = json.loads((tmp_path / "results" / f"{SUITE}_grade.json").read_text())
    assert grades["episodes"] == 1 and grades["points"] > 100 and grades["masks"]["first mask"]
    stay, flow = (grades["tracks"]["moving"][name]["average_jaccard"] for name in ("stay", "flow"))
    assert 0 <= stay < flow <= 1
    refused(lambda: annotators.main([*argv, "--masks", "sam", "--objects", "arm."]), "--objects",
            "akita_black_bowl_1")
