"""What every planner's program does around its training: data before, scores after."""
from pathlib import Path

import core
import episodes
import extract


def sources(config):
    """The suites whose videos a planner learns from, of other bodies too (ATM, section V-B), and
    how many of each task's, {suite: videos}."""
    chosen = {}
    for word in (w.strip() for w in getattr(config, "videos", "").split(",")):
        suite, _, number = word.partition(":")
        if number and not (number.isdigit() and int(number)):
            core.fail(f"--videos {word}: give a suite, or a suite and a number of videos per task "
                      "such as libero_spatial:2")
        if suite:
            chosen[suite] = int(number or config.demos)
    return chosen or {config.suite: config.demos}


def run_path(config, name):
    """<out>/<suite>/<name>.pt; what is learned from other videos than the suite's says so."""
    if sources(config) == {config.suite: config.demos}:
        config.videos = ""  # what is meant without it, in other words
    else:
        name += "-from-" + "+".join(suite + f"-{number}" * (number != config.demos)
                                    for suite, number in sources(config).items())
    return Path(config.out) / config.suite / f"{name}.pt"


def prepare(config, path, program):
    """Makes the data that is missing -> training episodes, of all sources, held-out ones, of the
    suite, a line about them."""
    names = extract.choose_tasks(config.suite, config.tasks, config.data)
    if config.show and not path.exists():
        core.fail(f"no planner {path} to show: "
                  f"train it with python {program}.py --suite {config.suite}")
    wanted, parts = {config.suite: config.demos} | sources(config), []
    known = {suite: extract.choose_tasks(suite, "", config.data) for suite in wanted}
    for suite, number in wanted.items():
        # the same tasks, where it has them
        chosen = names if set(names) <= set(known[suite]) else known[suite]
        extract.ensure(suite, chosen, max(number, config.demos * (suite == config.suite)),
                       config.data, config.size)
        if suite in sources(config):
            parts.append(extract.Episodes(config.data, suite, chosen, number))
    videos = episodes.join(parts)
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
