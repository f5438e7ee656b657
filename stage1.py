"""What every planner's program does around its training: data before, scores after."""
import core
import extract


def prepare(config, path, program):
    """Makes the data that is missing -> training and held-out episodes, a line about them."""
    names = extract.choose_tasks(config.suite, config.tasks, config.data)
    if config.show and not path.exists():
        core.fail(f"no planner {path} to show: "
                  f"train it with python {program}.py --suite {config.suite}")
    extract.ensure(config.suite, names, config.demos, config.data, config.size)
    videos = extract.Episodes(config.data, config.suite, names, config.demos)
    held_out = extract.Episodes(config.data, config.suite, names, config.demos, split="valid")
    note = f"{len(videos.length)} videos of {len(names)} tasks, {len(videos)} frames"
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
