"""The comparison by one command: runs what is missing of a cell, then prints its table.

    python -m results.compare A --workers 2             # continues after an interruption
    python -m results.compare A --seeds 1 --scenes development      # to choose settings by
    python -m results.compare A --list planners | xargs -P 2 -I{} sh -c "{}"
                                                        # then --list executors, then rollouts
Each stage is a command that a person could type, and a file, never made twice.  Executors of a seed
share their planner; an interruption loses what each worker did since its last checkpoint.
"""

import contextlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import rollout
import sims
from core import training
from core.episodes import open_data
from core.files import alone, code, fail
from core.flags import differences, flag, flags_of, parse
from core.planners import PLANNERS
from results import tables

# A plan: the planner's kind, flags of its stage 1, of its executors.  Controls: none-frozen sees
# through the mask planner's encoder, mask-now+goal is mask+goal without the future, mask-shuffled
# mask-explicit by other videos' futures, which tell no goal.  ours: all that is grounded
ROWS = {
    "none": ("none", {}, {}),
    "none-frozen": ("mask", {}, {"form": "goal"}),
    "feature": ("feature", {}, {}),
    "ee": ("track", {"track": "ee"}, {}),
    "video": ("video", {}, {}),
    "track-latent": ("track", {}, {"form": "latent"}),
    "track": ("track", {}, {}),
    "mask": ("mask", {}, {}),
    "mask-grounded": ("mask", {"grounded": True}, {}),
    "mask-explicit": ("mask", {"grounded": True}, {"form": "masks"}),
    "mask+goal": ("mask", {"grounded": True}, {"form": "masks+goal"}),
    "mask-now+goal": ("mask", {"grounded": True}, {"form": "now+goal"}),
    "mask-shuffled": ("mask", {"grounded": True, "shuffled": True}, {"form": "masks"}),
    "mask-both": ("mask", {}, {"fusion": "both"}),
    "mask-late": ("mask", {}, {"fusion": "late"}),
    "track-both": ("track", {}, {"fusion": "both"}),
    "track-late": ("track", {}, {"fusion": "late"}),
    "track-8": ("track", {}, {"form": "tracks-8"}),
    "track-4": ("track", {}, {"form": "tracks-4"}),
    "track-masked": ("track", {"mask_ratio": 0.5}, {}),
    "mask-1": ("mask", {"objects": 1}, {}),
    "mask-2": ("mask", {"objects": 2}, {}),
}
FEW = ["none", "track", "mask", "mask-grounded"]
SPATIAL = ["libero_spatial"]
# Cells: rows, suites to act in, demonstrations with actions, seeds, scenes per task, and what is
# unseen.  A: the claim (Mask2Act 4.2); B: breadth (Table 1); C: unseen scenes (Fig. 7); D: how many
# demonstrations (4.3); E: ablations (ATM, Tables II, III, Fig. 9); G: other tasks' videos (Fig. 6)
CELLS = {
    "A": ([*FEW, "mask-explicit", "mask+goal", "mask-now+goal", "none-frozen", "mask-shuffled"],
          [*SPATIAL, "mt10"], [2], 5, 10, [""]),
    "B": ([*ROWS][:13], [*SPATIAL, "libero_object", "libero_goal", "libero_10", "mt10"], [10], 1,
          10, [""]),
    "C": (FEW, SPATIAL, [2], 3, 5, ["", *sims.UNSEEN]),
    "D": (FEW, SPATIAL, [1, 2, 5, 10, 20], 3, 10, [""]),
    "E": ([*ROWS][13:], SPATIAL, [2], 1, 10, [""]),
    "G": (["none", "track-latent", "video", "mask"], ["ml10_test", "libero_10"], [10], 1, 10, [""]),
}
# cell G: suite to act in -> videos that its planners learn from, which are of other tasks
VIDEOS = {"ml10_test": {"suite": "ml10"}, "libero_10": {"suite": "libero_90", "demos": 5}}
STAGES = "planners", "executors", "rollouts"


@dataclass
class Config:
    cells: tuple[str, ...] = flag((), f"cells: {', '.join(CELLS)}", positional=True)
    seeds: int | None = flag(None, "first seeds (default: the cell's)", minimum=1)
    scenes: str = flag("test", "of rollout.py", choices=["test", "development"])
    rows: str = flag("", "plans, comma-separated; empty: the cell's")
    suites: str = flag("", "suites to act in, comma-separated; empty: the cell's")
    preset: str = flag("laptop", "of rollout.py's programs", choices=["tiny", "laptop", "paper"])
    bf16: bool = flag(False, "train in bf16, as --preset paper does: faster where the CPU has it")
    workers: int = flag(2, "commands at a time, of one thread each", minimum=1)
    list: str = flag("", "print a stage's missing commands, one a line", choices=["", *STAGES])
    any_code: bool = flag(False, "print the table of what is there, whatever code made it")
    data: str = flag("data", "folder of the data files")
    out: str = flag("runs", "folder of the runs")
    results: str = flag("results", "folder of the results")


def stage(program, config, words=(), **given):
    """A program's flags -> the command, its configuration.  config: compare's."""
    module = importlib.import_module(program)
    usual = {f.name: f.default for f in flags_of(module.Config)}
    given |= {k: getattr(config, k) for k in ("preset", "data", "out", "results")}
    given |= {"bf16": config.bf16 or config.preset == "paper"}  # on all machines alike
    flags = [part for k, v in given.items() if k in usual and (v != usual[k] or k == "preset")
             for part in (f"--{'no-' * (v is False)}{k.replace('_', '-')}",
                          *([] if isinstance(v, bool) else [str(v)]))]
    start = f"-m {program}" if "." in program else f"{program}.py"
    with contextlib.redirect_stdout(io.StringIO()):
        of = parse(module.Config, "", [*words, *flags])
    return shlex.join(["python", *start.split(), *words, *flags]), of


def chain(config, row, suite, demos, seed, episodes, unseen, videos):
    """One result's stages [(of STAGES, command, path of what it makes)], in order."""
    kind, first, second = ROWS[row]
    program, stages, planner, seeds = PLANNERS[kind].split(":")[0], [], kind, {"seed": seed}
    if kind != "none":
        # PLEX's stage 1 sees no more actions than its executor
        command, of = stage(program, config, **{"suite": suite, "action_demos": demos} | videos
                            | first | seeds)
        planner = training.run_path(of, kind)
        stages.append(("planners", command, planner))
    command, of = stage("executor", config, planner=str(planner), suite=suite, action_demos=demos,
                        **second, **seeds)
    away = f"_of-{videos['suite']}" if videos and kind != "none" else ""
    path = training.run_path(of, f"{Path(planner).stem}{away}_executor")
    stages.append(("executors", command, path))
    about = {"suite": suite, "plan": Path(planner).stem + away, "preset": config.preset,
             "seed": seed, "action_demos": demos,
             "differs": differences(of, {"action_demos", "seed"})}
    command, of = stage("rollout", config, [str(path)], episodes=episodes, scenes=config.scenes,
                        unseen=unseen, films=False, workers=1)
    return [*stages, ("rollouts", command, rollout.result_name(of, about))]


def chosen(flag, words, known):
    """What a flag names, comma-separated, of what is known."""
    words = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [word for word in words if word not in known]:
        fail(f"--{flag} {unknown[0]}: give {', '.join(known)}")
    return words


def chains_of(config):
    """All stages of the cells, in lists of what shares a planner, each stage once."""
    groups, known = {}, set()
    for letter in config.cells or fail(f"no cell: give {', '.join(CELLS)}"):
        if letter not in CELLS:
            fail(f"no cell {letter}: give {', '.join(CELLS)}")
        rows, suites, numbers, seeds, episodes, variants = CELLS[letter]
        rows = chosen("rows", config.rows, ROWS) or rows
        suites = chosen("suites", config.suites, suites) or suites
        for seed in range(config.seeds or seeds):
            for suite in suites:
                for row in rows:
                    for demos in numbers:
                        for unseen in variants:
                            stages = chain(config, row, suite, demos, seed, episodes, unseen,
                                           VIDEOS.get(suite, {}) if letter == "G" else {})
                            group = groups.setdefault(stages[0][2], [])
                            if stages[-1][2].exists():  # finished: it needs no checkpoints
                                stages = stages[-1:]
                            group += [s for s in stages if s[2] not in known]
                            known |= {s[2] for s in stages}
    return [*groups.values()]


def check_data(config, mine):
    """Refuses data files that other code made."""
    suites = {suite for letter in config.cells
              for suite in chosen("suites", config.suites, CELLS[letter][1]) or CELLS[letter][1]}
    suites |= {VIDEOS[suite]["suite"] for suite in suites & {*VIDEOS}}
    for path in (p for suite in suites for p in Path(config.data, suite).glob("*.hdf5")):
        with open_data(path) as f:
            of = {demo.attrs.get("code", "unknown") for demo in f["data"].values()}
        if of != {mine}:
            fail(f"{path} is of code {'+'.join(sorted(of))}, and this is {mine}: choose another "
                 "--data, or look with --any-code")


def state(path):
    """A stage's file -> whether it is whole, the code that made it and what it computed in; None if
    it is not there."""
    if not path.exists():
        return False, None
    content = json.loads(path.read_text()) if path.suffix == ".json" else training.load(path)
    of, about = content.get("code", ()), content["config"]
    whole = content.get("step", about["steps"]) >= about["steps"]
    return whole, (of if isinstance(of, str) else "+".join(of)) + ", bf16" * bool(about["bf16"])


def run(stages, lock, note, stopped):
    """Runs the stages of one planner, one after the other, until stopped (a list) holds something;
    note(stage, command, seconds) after each; lock: see files.alone."""
    for what, command, path in stages:
        if stopped:
            return
        begin, (_, *words) = time.time(), shlex.split(command)
        log = path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:    # goes on with the lock if this process is killed
            child = subprocess.run(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, pass_fds=[lock],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parent.parent)
        if child.returncode or not path.exists():
            stopped.append(True)        # before this worker begins another planner's
            fail(f"{command}: exit code {child.returncode}, see {log}")
        log.unlink()
        note(what, command, time.time() - begin)


def run_all(config, groups, lock):
    """Runs all missing stages and prints the time left, by what the stages so far took."""
    begin, done, stopped = time.time(), {what: [] for what in STAGES}, []
    left = [what for stages in groups for what, *_ in stages]
    print(", ".join(f"{left.count(what)} {what}" for what in STAGES) + " to run", flush=True)

    def note(what, command, seconds):
        """Called when a stage has ended: prints it and the time left."""
        done[what].append(seconds)
        left.remove(what)
        known = all(done[what] for what in left)
        rest = sum(sum(done[what]) / max(1, len(done[what])) for what in left) / config.workers
        print(f"{(time.time() - begin) / 60:.0f} min: {command} took {seconds / 60:.1f}; "
              f"{len(left)} left, {'about' if known else 'more than'} {rest / 60:.0f} min",
              flush=True)
    with ThreadPoolExecutor(config.workers) as pool:
        try:
            for future in as_completed([pool.submit(run, stages, lock, note, stopped)
                                        for stages in groups]):
                future.result()
        finally:        # an error or an interruption: what has not begun never will
            stopped.append(True)


def main(argv=None):
    """Command line: see the top of this file."""
    config = parse(Config, "The comparison's cells: what is missing is run, then the table.", argv)
    groups, mine, missing = chains_of(config), code(), []
    if not config.any_code:
        check_data(config, mine)
    mine += ", bf16" * (config.bf16 or config.preset == "paper")
    for stages in () if config.any_code else groups:
        there = {path: state(path) for _, _, path in stages}
        for path, (_, of) in there.items():
            if path.exists() and of != mine:
                fail(f"{path} is of code {of}, and this is {mine}: choose another --out and "
                     "--results, or look with --any-code")
        if left := [stage for stage in stages if not there[stage[2]][0]]:
            missing.append(left)
    if config.list:
        print("\n".join(s[1] for stages in missing for s in stages if s[0] == config.list))
        return
    if missing:
        with alone(config.out) as lock:
            run_all(config, missing, lock)
    print("\n".join(tables.comparison(config.results, config.scenes)))


if __name__ == "__main__":
    main()
