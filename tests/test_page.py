"""results/page.py: what it embeds and refuses; in a real browser its slider and its keys."""

import ast
import base64
import json
import re
import shutil
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest

from conftest import SUITE, trained
from core.draw import write_film
from results import page
from test_results import made_up

video_path = trained("video_planner", "video")
DRIVE = """<script>         // leaves what a reader would see as the page's title
const seen = {}, images = [...document.querySelectorAll("main img")]
const look = name => seen[name] = [+slider.value, images.map(image => image.src)]
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}))
look("start"), slider.value = 3, slider.dispatchEvent(new Event("input")), look("moved")
press("ArrowRight"), look("right"), press("ArrowLeft"), press("ArrowLeft"), look("left"), press(" ")
setTimeout(() => { press(" "), look("played") }, 1100)
setTimeout(() => {
  look("paused"), seen.overflow = document.documentElement.scrollWidth - innerWidth
  seen.widths = images.map(image => image.naturalWidth), document.title = JSON.stringify(seen)
}, 2200)
</script>"""


@pytest.fixture(scope="module")
def html(data, task, mask_path, track_path, video_path, tmp_path_factory):
    """The page of an episode, of planners of the tiny preset, with results and films."""
    made_up(folder := tmp_path_factory.mktemp("page"))
    films = folder / SUITE / "mask_executor_films"
    write_film(films / f"{task}_success.mp4", [np.zeros((64, 64, 3), np.uint8)] * 4)
    (films / "z_failure.mp4").write_bytes(bytes(4_000_001))
    page.main([*map(str, (mask_path, track_path, video_path)), "--data", str(data), "--results",
               str(folder), "--runs", str(folder), "--page", str(folder / "page.html")])
    return (folder / "page.html").read_text()


def test_it_holds_everything(html, data, task, mask_path, tmp_path, refused):
    plain = re.sub(r"data:[\w/]+;base64,[\w+/=]+", "DATA", html)
    assert len(html) < 15e6 and "http" not in plain and "<link" not in plain and "$" not in plain
    assert plain.count("<video src='DATA'") == 1 and "left out" in plain
    assert "<img alt='success' src='DATA'>" in plain and plain.count("<figure><img") == 5
    found = re.search(r"shots = (\[\[.*\]\]), steps = (\[.*?\])", html)
    shots, steps = map(ast.literal_eval, found.groups())
    held_out = page.Episodes(data, SUITE, [task], 1, "valid")
    assert steps == [*range(0, held_out.length[0], 4)] and {*map(len, shots)} == {len(steps)}
    for card, t, e in ((0, 20, 1), (4, 52, 0)):     # now and the other's end; later and its own
        picture = iio.imread(base64.b64decode(shots[card][5].split(",")[1])).astype(int)
        true = np.concatenate(held_out.gather("obs/agentview_rgb", [0, e], [t, 999]), 1)
        assert np.abs(picture - true).mean() < 6
    run = lambda *words: lambda: page.main([*map(str, words)])
    refused(run("--runs", tmp_path), "no planner", "python mask_planner.py")
    refused(run(mask_path, "--data", tmp_path), "no data", "python extract.py --suite " + SUITE)
    refused(run(mask_path, "--data", data, "--episode", 2), "--episode 2", "has 2")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_in_a_browser(html, tmp_path):
    """On a phone's screen: slider, arrows and space change all pictures, without any message."""
    (tmp_path / "page.html").write_text(html + DRIVE)
    flags = "headless=new no-sandbox disable-gpu enable-logging=stderr window-size=390,844 dump-dom"
    run = subprocess.run(["chromium", *(f"--{flag}" for flag in flags.split()), "page.html",
                          "--virtual-time-budget=9000", f"--user-data-dir={tmp_path}/user"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr, run.stderr
    seen = json.loads(re.search("<title>(.*?)</title>", run.stdout)[1])
    at = {name: seen[name][0] for name in ("start", "moved", "right", "left", "played", "paused")}
    assert at == {"start": 0, "moved": 3, "right": 4, "left": 2, "played": 6, "paused": 6}
    assert min(seen["widths"]) > 0 >= seen["overflow"], "an empty picture, or wider than the screen"
    for a, b in (("start", "moved"), ("moved", "right"), ("left", "played")):
        assert all(x != y for x, y in zip(seen[a][1], seen[b][1], strict=True)), (a, b)
