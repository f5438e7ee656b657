"""results/: tables, figures and a page of made-up results, the page in a real browser; annotators'
measures against their definitions."""

import ast
import base64
import json
import re
import shutil
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest

from conftest import SUITE
from core.draw import write_film
from results import annotators, figures, page, tables

NOBODY = dict.fromkeys(["preset", "action_demos", "seed", "config"]) | {"plan": "demonstrator"}


def made_up(folder, seed=0, success=3, planner_seed=0, **fields):
    """One evaluation of 2 tasks x 5 scenes, as rollout.py writes it."""
    tasks = {name: {"success": k, "episodes": 5} for name, k in zip("ab", (success - 1, 1))}
    r = {"suite": "mt10", "plan": "mask" + f"_s{planner_seed}" * bool(planner_seed), "videos": 20,
         "preset": "laptop", "action_demos": 2, "seed": seed, "differs": "", "scenes": "test",
         "unseen": None, "counts": "ever succeeded", "success": success, "episodes": 10,
         "interval": [0.1, 0.6], "config": {"planner_config": {"seed": planner_seed}},
         "seconds": {"rollout": 90}, "commit": "abc", "tasks": tasks} | fields
    of = f"_laptop_d2_s{seed}" * bool(r["preset"])
    name = f"{r['suite']}_{r['plan']}{of}{r['differs']}.json"
    (folder / name).write_text(json.dumps(r))


def test_seeds_are_the_unit(tmp_path):
    """Mean and t-interval over seeds, each with a planner of its own; one seed keeps its file's,
    seeds that are alike have none; a shared planner or whatever else differs is another row."""
    for seed, success in enumerate((3, 5, 4)):
        made_up(tmp_path, seed, success, planner_seed=seed)
        made_up(tmp_path, seed, success=1, planner_seed=seed, differs="_late")
    made_up(tmp_path, seed=1, success=5)
    made_up(tmp_path, differs="_early")
    rows = {r["plan"]: r for r in tables.cells(tmp_path)}
    assert set(rows) == {"mask", "mask, planner of seed 0", "mask_early", "mask_late"}
    row, half = rows["mask"], 4.302653 * 0.1 / 3 ** 0.5     # t of 2 degrees of freedom, sd 0.1
    assert row["interval"] == pytest.approx((0.4 - half, 0.4 + half), abs=1e-6)
    assert rows["mask_early"]["interval"] == (0.1, 0.6) and rows["mask"]["between"] == "15.2 - 64.8"
    head, _, *lines = tables.overview(tmp_path)
    assert head == "| plan | mt10, laptop, 2 demonstrations |" and len(lines) == 5
    assert lines[-1] == "| mask_late | 10.0 (3 seeds: alike) |"
    a, b = ({"by_seed": dict(enumerate(rates))} for rates in ((0.6, 0.6, 0.4), (0.5, 0.5, 0.3)))
    assert tables.compared(a, b) == "+10.0", "all differ by the same"
    assert lines[:2] == ["| demonstrator |  |", "| mask | 40.0 (3 seeds: 15.2 - 64.8) |"]
    assert tables.tasks(tmp_path)[2] == "| a | 9/15 | 4/5 | 2/5 | 0/15 |"       # 2 + 4 + 3, ...
    made_up(tmp_path, suite="a"), made_up(tmp_path, plan="none")
    order = [line.split()[1] for line in tables.overview(tmp_path)[2:5]]
    assert order == ["demonstrator", "none", "mask"], "of all suites, by plan"


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
    assert "libero_spatial, laptop, 2 demonstrations, unseen layout, code abc" in lines[0]
    assert lines[3].startswith("| ee | 45.0 % |") and "| +20.0 (-4.8 to +44.8) |" in lines[3]
    assert "mt10, laptop, 2 demonstrations, code abc" in lines[5] and len(lines) == 10
    assert lines[7].startswith("| none | 20.0 % |") and lines[7].count("|  |") == 1
    assert lines[8].startswith("| mask | 45.0 % |") and "| +20.0 (-4.8 to +44.8) |" in lines[8]
    assert lines[9] == "| mask minus none |  |  |  | +20.0 (-4.8 to +44.8) |  |"
    made_up(tmp_path, differs="_tasks0", tasks=dict.fromkeys("ac", {"success": 1, "episodes": 5}))
    assert len(tables.comparison(tmp_path)) == 14, "other tasks are another table"
    made_up(tmp_path, 9, 2, planner_seed=9, code="other")
    assert "code mixed" in tables.comparison(tmp_path)[5]
    (tmp_path / "mt10_none_laptop_d2_s0.json").unlink()
    assert tables.comparison(tmp_path)[9] == "| mask minus none |  |  |  |  |  |", "of two seeds"
    assert tables.comparison(tmp_path)[7].startswith("| none | 25.0 % | too few | 2 |")
    assert all(np.isnan(r["interval"]).all() for r in tables.cells(tmp_path) if r["seeds"] == 2)
    figures.main(["curve", "--results", str(tmp_path)])     # and no interval stops it
    assert (tmp_path / "curve.png").exists()


def test_pages(tmp_path, refused):
    """Tables go between the markers of both pages, and again; the rest of a page stays."""
    folder, mark = tmp_path / "results", "<!-- {0} -->\nold\n<!-- /{0} -->\nz\n"
    folder.mkdir()
    refused(lambda: tables.main(["--results", str(folder)]), "no results", "rollout.py")
    for fields in ({}, NOBODY, NOBODY | {"differs": "_tasks0", "success": 9},
                   NOBODY | {"plan": "expert", "unseen": "layout", "suite": "libero_spatial"}):
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


@pytest.mark.slow
def test_keypoints(executor_path):
    figures.main(["keypoints", str(executor_path), "--tasks", "0"])
    assert executor_path.with_name(f"{executor_path.stem}_keypoints.png").exists()


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


def test_flow_beats_points_that_stay(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    annotators.main(["--tasks", "0", "--data", str(data), "--device", "cpu", "--tracks", "flow"])
    grades = json.loads((tmp_path / "results" / f"{SUITE}_grade.json").read_text())
    assert grades["episodes"] == 1 and grades["points"] > 100 and grades["masks"]["first mask"]
    stay, flow = (grades["tracks"]["moving"][name]["average_jaccard"] for name in ("stay", "flow"))
    assert 0 <= stay < flow <= 1


DRIVE = """<script>         // leaves what a reader would see as the page's title
const seen = [], images = [...document.querySelectorAll("main img")]
const look = () => seen.push([+slider.value, images.map(x => x.src)])
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))
look(), slider.value = 4, slider.dispatchEvent(new Event("input")), look()
press("ArrowRight"), look(), press("ArrowLeft"), press("ArrowLeft"), look(), press(" ")
setTimeout(() => { press(" "), look() }, 1100)
setTimeout(() => { look(), document.title = JSON.stringify([
  seen, images.map(x => x.naturalWidth), document.body.scrollWidth]) }, 2200)</script>"""


@pytest.fixture(scope="module")
def html(data, task, mask_path, track_path, video_path, tmp_path_factory):
    """The page of an episode, of planners of the tiny preset, with results and films."""
    made_up(folder := tmp_path_factory.mktemp("page"))
    write_film(folder / SUITE / "a_films" / f"{task}.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4)
    (folder / SUITE / "a_films" / "z.mp4").write_bytes(bytes(4_000_001))
    page.main([*map(str, [mask_path, track_path, video_path, "--data", data, "--results", folder,
                          "--runs", folder, "--page", folder / "page.html"])])
    return (folder / "page.html").read_text()


def test_the_page_holds_everything(html, data, task, mask_path, tmp_path, refused):
    plain = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "DATA", html)
    assert len(html) < 15e6 and not re.search("http|<link|\\$", plain) and "left out" in plain
    assert re.findall("<([^<]*) src='DATA'", plain) == ["img alt='success'", "video"]
    shots, steps = map(ast.literal_eval, re.search("ts = (.*), steps = (.*), get", html).groups())
    held_out = page.Episodes(data, SUITE, [task], 1, "valid")
    assert steps == [*range(0, held_out.length[0], 4)] and [*map(len, shots)] == [len(steps)] * 5
    for card, t, e in ((0, 20, 1), (4, 52, 0)):     # now and the other's end; later and its own
        picture = iio.imread(base64.b64decode(shots[card][5].split(",")[1])).astype(int)
        true = np.concatenate(held_out.gather("obs/agentview_rgb", [0, e], [t, 999]), 1)
        assert np.abs(picture - true).mean() < 6
    run = lambda *words: lambda: page.main([*map(str, words)])
    refused(run("--runs", tmp_path), "no planner", "python mask_planner.py")
    refused(run(mask_path, "--data", tmp_path), "no data", "python extract.py")
    refused(run(mask_path, "--data", data, "--episode", 2), "--episode 2", "has 2")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_the_page_in_a_browser(html, tmp_path):
    """As wide as a phone: slider, arrows and space change all pictures, without any message."""
    (tmp_path / "page.html").write_text(html + "<style>html { width: 360px }</style>" + DRIVE)
    run = subprocess.run("""chromium --headless=new --no-sandbox --disable-gpu --dump-dom page.html
        --enable-logging=stderr --user-data-dir=user --virtual-time-budget=9000""".split(),
        cwd=tmp_path, capture_output=True, text=True)
    assert "CONSOLE" not in run.stderr, run.stderr
    seen, widths, wide = json.loads(re.search("<title>(.*?)</title>", run.stdout)[1])
    assert wide <= 360 and min(widths) > 0, "wider than the screen, or an empty picture"
    assert [at for at, _ in seen] == [0, 4, 5, 3, 7, 7], "slid, right, left twice, played, paused"
    assert all(len({*card}) == 5 for card in zip(*(pictures for _, pictures in seen)))
