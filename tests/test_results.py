"""results/tables.py and figures.py: made-up results, intervals computed anew, key points."""

import json

import pytest

from results import figures, tables

NOBODY = {"plan": "expert", "preset": None, "action_demos": None, "seed": None, "config": None}


def made_up(folder, seed=0, success=3, planner_seed=0, **fields):
    """One evaluation of 2 tasks x 5 scenes, as rollout.py writes it."""
    tasks = {name: {"success": k, "episodes": 5} for name, k in zip("ab", (success - 1, 1))}
    r = {"suite": "mt10", "plan": "mask" + f"_s{planner_seed}" * bool(planner_seed), "videos": 20,
         "preset": "laptop", "action_demos": 2, "seed": seed, "differs": "", "scenes": "test",
         "unseen": None, "counts": "ever succeeded", "success": success, "episodes": 10,
         "interval": [0.1, 0.6], "config": {"planner_config": {"seed": planner_seed}},
         "seconds": {"rollout": 90}, "commit": "abc", "tasks": tasks} | fields
    name = f"{r['suite']}_{r['plan']}_laptop_d2_s{seed}{r['differs']}.json"
    (folder / name).write_text(json.dumps(r))


def test_seeds_are_the_unit(tmp_path):
    """Mean and t-interval over seeds, each with a planner of its own; one seed keeps the interval
    of its file; a shared planner and whatever else differs is a row of its own."""
    for seed, success in enumerate((3, 5, 4)):
        made_up(tmp_path, seed, success, planner_seed=seed)
    made_up(tmp_path, seed=1, success=5)
    made_up(tmp_path, differs="_early")
    rows = {r["plan"]: r for r in tables.cells(tmp_path)}
    assert set(rows) == {"mask", "mask, planner of seed 0", "mask_early"}
    row, half = rows["mask"], 4.302653 * 0.1 / 3 ** 0.5     # t of 2 degrees of freedom, sd 0.1
    assert row["seeds"] == 3 and row["rate"] == pytest.approx(0.4)
    assert row["interval"] == pytest.approx((0.4 - half, 0.4 + half), abs=1e-6)
    assert rows["mask_early"]["interval"] == (0.1, 0.6) and rows["mask"]["between"] == "15.2 - 64.8"
    head, _, *lines = tables.overview(tmp_path)
    assert head == "| plan | mt10, laptop, 2 demonstrations |" and len(lines) == 4
    assert lines[:2] == ["| demonstrator |  |", "| mask | 40.0 (3 seeds: 15.2 - 64.8) |"]


def test_differences_are_paired_by_seed(tmp_path):
    """The interval of a mean difference, from a table of t and sums written out; seeds that one of
    the two lacks do not count, fewer than three give no interval; contrasts are those named."""
    of = {"config": {"planner_config": {}}}
    for seed, (a, b) in enumerate([(3, 1), (5, 4), (4, 1), (6, None)]):
        made_up(tmp_path, seed, a, planner_seed=seed)
        made_up(tmp_path, seed, a, plan="ee", unseen="layout", suite="libero_spatial", **of)
        if b:
            made_up(tmp_path, seed, b, plan="none", **of)
            made_up(tmp_path, seed, b, plan="none", unseen="layout", suite="libero_spatial", **of)
    (tmp_path / "contrasts.md").write_text("* mask minus none: more.\n* mask minus ee: more.\n")
    d = [0.2, 0.1, 0.3]
    mean = sum(d) / 3
    half = 4.302653 * (sum((x - mean) ** 2 for x in d) / 2) ** 0.5 / 3 ** 0.5
    assert tables.difference_interval([0.3, 0.5, 0.4], [0.1, 0.4, 0.1]) == pytest.approx(
        (mean - half, mean + half), abs=1e-6)
    lines = tables.comparison(tmp_path)
    assert "libero_spatial layout, laptop, 2 demonstrations, code abc" in lines[0]
    assert lines[3].startswith("| ee | 45.0 % |") and "| +20.0 (-4.8 to +44.8) |" in lines[3]
    assert "mt10, laptop, 2 demonstrations, code abc" in lines[5] and len(lines) == 10
    assert lines[7].startswith("| none | 20.0 % |") and lines[7].count("|  |") == 1
    assert lines[8].startswith("| mask | 45.0 % |") and "| +20.0 (-4.8 to +44.8) |" in lines[8]
    assert lines[9] == "| mask minus none |  |  |  | +20.0 (-4.8 to +44.8) |  |"
    made_up(tmp_path, 9, 2, planner_seed=9, code="other")
    assert "code mixed" in tables.comparison(tmp_path)[5]
    (tmp_path / "mt10_none_laptop_d2_s0.json").unlink()
    assert tables.comparison(tmp_path)[9] == "| mask minus none |  |  |  |  |  |", "of two seeds"
    assert tables.comparison(tmp_path)[7].startswith("| none | 25.0 % | too few | 2 |")
    figures.main(["curve", "--results", str(tmp_path)])     # draws no interval there


def test_pages(tmp_path, refused):
    """Tables go between the markers of both pages, and again; the rest of a page stays."""
    folder, mark = tmp_path / "results", "<!-- {0} -->\nold\n<!-- /{0} -->\nz\n"
    folder.mkdir()
    refused(lambda: tables.main(["--results", str(folder)]), "no results", "rollout.py")
    for fields in ({}, NOBODY, NOBODY | {"unseen": "layout", "suite": "libero_spatial"}):
        made_up(folder, **fields)
    (folder / "trials/one").mkdir(parents=True)
    made_up(folder / "trials/one", differs="_early")
    (tmp_path / "README.md").write_text("a\n" + mark.format("overview"))
    (folder / "README.md").write_text("".join(mark.format(f.__name__) for f in tables.TABLES))
    for _ in range(2):
        tables.main(["--results", str(folder)])
        page, own = (tmp_path / "README.md").read_text(), (folder / "README.md").read_text()
        assert page.startswith("a\n<!-- overview -->\n| plan |") and page.endswith("-->\nz\n")
        assert "| demonstrator | 30.0 (10.0 - 60.0) |\n| mask | 30.0 (one seed" in page
        assert "old" not in page
        for part in ("annotators -->\nNone yet.", "**one**\n\n| suite", "| mt10 | mask_early |",
                     "| libero_spatial | demonstrator, unseen layout |\n|---|---|\n| a | 2/5 |",
                     "| 3/10 = 30.0 % | 10.0 - 60.0 | 1 | 2 | abc |"):
            assert part in own, part
    figures.main(["curve", "--results", str(folder)])
    assert (folder / "curve.png").exists()


@pytest.mark.slow
def test_keypoints(executor_path):
    figures.main(["keypoints", str(executor_path), "--tasks", "0"])
    assert executor_path.with_name(f"{executor_path.stem}_keypoints.png").exists()
