"""One HTML file to look at: what planners predict at every time of a held-out episode.

    python -m results.page                              # of all planners of a suite in runs/
    python -m results.page runs/libero_spatial/mask.pt --episode 3

Arrow keys move through time, the space bar plays; below are success rates and films of rollouts.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch

import mask_planner
import track_planner
import video_planner
from core import training
from core.draw import draw_tracks
from core.episodes import Episodes
from core.files import fail, write
from core.flags import flag, parse, suites
from core.planners import load_planner
from results import figures, tables


@dataclass
class Config(tables.Config):
    planners: tuple[str, ...] = flag((), "checkpoints of mask, track and video planners of one "
                                     "suite; none: those that are in --runs", positional=True)
    suite: str = flag("", "suite of the episode; empty: the planners' own")
    episode: int = flag(0, "which of the suite's held-out episodes", minimum=0)
    data: str = flag("data", "folder of the data files")
    runs: str = flag("runs", "folder of the runs")
    page: str = flag("page.html", "the file that is written")


def rows(*parts):
    """Each (B, k, H, W, 3), pictures side by side -> (B, rows H, k W, 3)."""
    return np.concatenate([np.concatenate(x.swapaxes(0, 1), 2) for x in parts], 1)


def tracks(planner, episodes, e, t, rng):
    """Predicted and true tracks of frames t (B,) on their pictures -> (B, 2 H, 4 W, 3) uint8."""
    batch = track_planner.make_batch(episodes, "agentview", e, t, rng, planner.config)
    true, guess = batch["tracks"], track_planner.predicted(planner, batch)
    guess = np.concatenate([true[:, :1], guess], 1)                     # (B, 1 + S, N, 2)
    return np.concatenate([[draw_tracks(*x, 2) for x in zip(batch["image"], w, batch["visible"])]
                           for w in (guess, true)], 2)                  # (B, 2 H, 4 W, 3)


def imagined(planner, episodes, e, t, rng):
    """Imagined pictures above the true ones, of frames t (B,) -> (B, 2 H, 4 W, 3) uint8."""
    batch = video_planner.make_batch(episodes, e, t, rng)
    generator, obs = torch.Generator().manual_seed(0), training.tensors(batch, planner)
    pictures = planner.imagine(obs, generator).cpu().numpy()            # (B, F, H, W, 3)
    return rows(pictures[:, ::2], batch["clip"][:, 1::2])               # 1, 3, 5 and 7 of them


PLANS = {   # kind -> caption, pictures of frames (B,) -> (B, ., ., 3) uint8
    "mask": ("Mask2Act: masks 4, 8, 16 and 32 steps later, predicted above, true below",
             lambda planner, *frames: rows(*mask_planner.compare(planner, *frames)[2:])),
    "track": ("ATM: tracks of the next 32 steps, predicted left, true right", tracks),
    "video": ("AVDC: pictures 1, 3, 5 and 7 of 7 to the end, imagined above, true below", imagined)}


def cards(planners, episodes, e, t):
    """(caption, pictures (B, ., ., 3) uint8) of steps t (B,) of the episode e (B,)."""
    frames, seed = lambda t: episodes.gather("obs/agentview_rgb", e, t), np.random.default_rng
    goal, end = (episodes.last_frames(x) for x in (episodes.goal_of(e, seed(0)), e))
    yield "What planners see: now left, the goal right", np.concatenate([frames(t), goal], 2)
    for planner in planners:
        caption, pictures = PLANS[planner.kind]
        yield caption, pictures(planner, episodes, e, t, seed(0))
    yield "What happened: 32 steps later, and at the end", np.concatenate([frames(t + 32), end], 2)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>What planners predict</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { max-width: 1240px; margin: auto; padding: 0 12px 40px }
nav, main, section { display: flex; flex-wrap: wrap; gap: 1em } figure { width: 400px; margin: 0 }
nav { position: sticky; top: 0; padding: 8px 0; background: Canvas } input { flex: 1; width: 0 }
section:empty::after { content: "None yet: python rollout.py makes some" } output { min-width: 8em }
img, video { max-width: 100%; background: white } main img { width: 100%; aspect-ratio: 2 }
</style><h1>What planners predict</h1>$ABOUT<nav><button>play / pause</button>
<input type="range" value="0" aria-label="time"><output></output></nav><main>$CARDS</main>
<h2>Success</h2><section>$SUCCESS</section><h2>Films</h2><section>$FILMS</section><script>
const shots = $SHOTS, steps = $STEPS, get = name => document.querySelector(name)
let slider = get("input"), last = slider.max = steps.length - 1, timer
function show() {
  document.querySelectorAll("main img").forEach((img, i) => img.src = shots[i][slider.value])
  get("output").value = "step " + steps[slider.value] + " of " + steps[last]
}
function move(by) { slider.value = (+slider.value + by + steps.length) % steps.length; show() }
function play() { timer = timer ? clearInterval(timer) : setInterval(move, 250, 1) }
get("button").onclick = play, slider.oninput = show
onkeydown = event => {
  const by = {ArrowLeft: -1, ArrowRight: 1, " ": 0}[event.key]
  if (by === undefined || event.altKey || event.target.matches("button, video")) return
  event.preventDefault(), by ? move(by) : play()
}
show()</script>"""


def main(argv=None):
    """Command line: writes the page."""
    import imageio.v3 as iio
    config = parse(Config, "A page to look at: plans at every time of a held-out episode.", argv)
    there = [[path for kind in PLANS if (path := folder / f"{kind}.pt").exists()]
             for folder in sorted(Path(config.runs).glob(config.suite or "*"))]
    paths = config.planners or max(there, key=len, default=()) or fail(
        f"no planner in {config.runs}/: python mask_planner.py (track_planner.py, video_planner.py)"
        f" --suite {config.suite or 'libero_spatial'} makes one, and its data")
    planners = [load_planner(path) for path in paths]
    suite = config.suite or next(iter(suites(planners[0].config)))
    tasks = sorted(path.stem for path in Path(config.data, suite).glob("*.hdf5")) or fail(
        f"no data in {config.data}/{suite}/: python extract.py --suite {suite} makes it")
    episodes = Episodes(config.data, suite, tasks, 1, "valid")
    for path, planner in zip(paths, planners):
        if planner.kind not in PLANS or planner.size != episodes.size:
            fail(f"{path} is a {planner.kind} planner of {planner.size} px: give mask, track or "
                 f"video of {episodes.size}, the size of {config.data}/{suite}")
    if config.episode >= len(episodes.length):
        fail(f"--episode {config.episode}: {suite} has {len(episodes.length)} held-out ones")
    length, task = episodes.length[config.episode], tasks[episodes.task[config.episode]]
    t, shots, html, films = np.arange(0, length, max(4, length // 40)), [], "", ""
    inline = lambda content, kind: f"data:{kind};base64,{base64.b64encode(content).decode()}"
    for caption, pictures in cards(planners, episodes, np.full(len(t), config.episode), t):
        shots.append([inline(iio.imwrite("<bytes>", picture, extension=".webp"), "image/webp")
                      for picture in pictures])
        html += f"<figure><img alt='{caption}'><figcaption>{caption}</figcaption></figure>"
    room, found = 4e6, Path(config.runs, suite).glob("*_films/*.mp4")   # bytes: below 15 MB in all
    for path in sorted(found, key=lambda p: task not in p.stem):
        room -= path.stat().st_size
        film = (f"<video src='{inline(path.read_bytes(), 'video/mp4')}' controls></video>"
                if room > 0 else "left out, for the page's size: ")
        films += f"<figure>{film}{path.parent.name}: {path.stem.replace('_', ' ')}</figure>"
    curve = tables.main_rows(config.results) and Path(figures.curve(config, "")).read_bytes()
    write(config.page, Template(PAGE).substitute(
        ABOUT=f"{suite}: {task.replace('_', ' ')}, held-out episode {config.episode}", CARDS=html,
        SUCCESS=f"<img alt='success' src='{inline(curve, 'image/png')}'>" if curve else "",
        FILMS=films, SHOTS=shots, STEPS=t.tolist()))
    print(f"page: {config.page}, {Path(config.page).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
