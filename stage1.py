"""What every planner's program does around its training: data before, scores after."""
from pathlib import Path

import core
import episodes
import extract


def sources(config):
    """The suites whose videos a planner learns from, of other bodies too (ATM, section V-B)."""
    named = [word.strip() for word in getattr(config, "videos", "").split(",")]
    return [suite for suite in named if suite] or [config.suite]


def run_path(config, name):
    """<out>/<suite>/<name>.pt; what is learned from other videos than the suite's says so."""
    if sources(config) != [config.suite]:
        name += "-from-" + "+".join(sources(config))
    return Path(config.out) / config.suite / f"{name}.pt"


def prepare(config, path, program):
    """Makes the data that is missing -> training episodes, of all sources, held-out ones, of the
    suite, a line about them."""
    names = extract.choose_tasks(config.suite, config.tasks, config.data)
    if config.show and not path.exists():
        core.fail(f"no planner {path} to show: "
                  f"train it with python {program}.py --suite {config.suite}")
    parts = []
    for suite in dict.fromkeys([config.suite, *sources(config)]):
        chosen = names if suite == config.suite else extract.choose_tasks(suite, "", config.data)
        extract.ensure(suite, chosen, config.demos, config.data, config.size)
        parts.append(extract.Episodes(config.data, suite, chosen, config.demos))
    videos = episodes.join([part for part in parts if part.suite in sources(config)])
    held_out = extract.Episodes(config.data, config.suite, names, config.demos, split="valid")
    note = f"{len(videos.length)} videos of {len(videos.tasks)} tasks, {len(videos)} frames"
    return videos, held_out, note


def report(config, path, scores, picture):
    """Prints the scores (text) and writes them beside the checkpoint; of a trained planner that
    is shown, also `picture()`, (H, W, 3) uint8, which training draws itself."""
    print(scores)
    core.write(path.with_suffix(".txt"), scores + "\n")
    if config.show:
        import imageio.v3 as iio
        iio.imwrite(path.with_suffix(".png"), picture())
    print(f"picture: {path.with_suffix('.png')}   next: python executor.py --planner {path}")
