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

from conftest import SUITE
from core.draw import write_film
from results import page
from test_results import made_up

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


def test_it_holds_everything(html, data, task, mask_path, tmp_path, refused):
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
def test_in_a_browser(html, tmp_path):
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
