"""Run an alignment for long, and see that nothing grows: memory and open files of every role, and the object store.

    python -m pipelines.soak --steps 1000
    python -m pipelines.soak configs/shapes/bridge.yaml --minutes 30

The alignment is a small one unless more is given. At the end there is a table of each role's memory, with its slope over the
second half, when all has warmed up; it is written to soak/ beside the runs, with every sample.
"""

import argparse
import json
import math
import re
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from pipelines import check_lasts, checking, interrupt
from pipelines.machines import Command, kept_in, newest, small

EVERY = 5.0  # seconds between samples
#: A role is what Ray calls the process, without the method that it is in.
TITLE = re.compile(r"ray::(ServeReplica:[^:]+:\w+|[\w.]+(?:\(.*\))?)")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "given", nargs="*", metavar="config | section.setting=value", help="YAML files (default: sparse.yaml), and what to change"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of the alignment (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so many, whatever the steps")
    parser.add_argument("--output", type=Path, help="where a folder of results is made (default: soak/ beside the runs)")
    return parser.parse_intermixed_args()


def main() -> None:
    """Run, look, tell."""
    args = arguments()
    longer = ("train.checkpoint_every=50", "train.keep_checkpoints=2", "evaluation.preview_every=50")
    with checking():
        config = small(args.given, f"train.steps={args.steps}", *longer)
        folder = (args.output or config.output.parent / "soak").expanduser().absolute() / time.strftime("%Y%m%d-%H%M%S")
        check_lasts("--output", folder)
    folder.mkdir(parents=True)
    kept_in(folder, config)
    print(f"samples go to {folder / 'samples.jsonl'}")
    run = Command(folder).process
    signal.signal(signal.SIGTERM, interrupt)
    began = time.monotonic()
    try:
        while run.poll() is None and (args.minutes is None or time.monotonic() - began < 60 * args.minutes):
            time.sleep(EVERY)
            if newest(folder) >= 0:  # from the first step on
                with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"second": time.monotonic() - began, "step": newest(folder), **look(run.pid)}) + "\n")
    except KeyboardInterrupt:
        print("\nended early", file=sys.stderr)
    finally:
        failed = bool(run.poll())
        if run.returncode is None:
            run.terminate()  # which ends it as Ctrl-C does
        run.wait()
    if failed or not (folder / "samples.jsonl").exists():
        sys.exit(f"the run ended before it was long enough: see {folder / 'output.txt'}")
    text = table(folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {folder / 'table.md'}")


def look(root: int) -> dict[str, dict[str, float]]:
    """By role, of all that descends from a process: megabytes of its own, open files and number; and what the store has."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"MB": 0.0, "files": 0, "processes": 0})
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            line = " ".join(process.cmdline())
            memory = process.memory_info()
            role = role_of(line)
            found[role]["MB"] += (memory.rss - memory.shared) / 2**20
            found[role]["files"] += process.num_fds()
            found[role]["processes"] += 1
            if role == "raylet":
                found["object store"]["MB"] += memory.shared / 2**20
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended meanwhile
    return dict(found)


def role_of(line: str) -> str:
    """What a process is for."""
    if title := TITLE.match(line):
        return re.sub(r"rewards-\w+", "rewards", title[1].partition(".")[0] if "(" not in title[1] else title[1])
    known = {"pipelines.align": "driver", "raylet/raylet": "raylet", "gcs_server": "gcs_server"}
    return next((role for part, role in known.items() if part in line), "other")


def table(folder: Path) -> str:
    """Each role's memory and files over the second half of the samples: mean, slope, and how far a step of noise is from it."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["step"] < lines[-1]["step"]] or lines  # after the last step all else ends too
    half = lines[len(lines) // 2 :]
    rows = [
        "| role | processes | MB | MB per 1,000 steps | files | files per 1,000 steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    roles = sorted({role for line in half for role in line} - {"second", "step", "other", "IDLE"})
    for role in roles:
        there = [line for line in half if role in line]
        if len(there) < 0.9 * len(half):
            continue  # it came and went, or is of the end alone
        steps, columns = np.array([line["step"] for line in there], dtype=float), []
        for what in ("MB", "files"):
            values = np.array([line[role][what] for line in there], dtype=float)
            slope, error = slope_of(steps, values)
            columns += [f"{values.mean():,.0f}", f"{1000 * slope:+,.1f} ± {1000 * error:,.1f}"]
        rows.append(f"| {role} | {there[-1][role]['processes']:g} | {' | '.join(columns)} |")
    minutes = (lines[-1]["second"] - lines[0]["second"]) / 60
    what = f"{lines[-1]['step'] + 1} steps, {minutes:.0f} minutes, {len(lines)} samples"
    return "\n".join([*rows, "", f"{what}; slopes over the second half, ± one standard error."]) + "\n"


def slope_of(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """A line's slope and its standard error, of the residuals; NaN where all is at one step."""
    apart = x - x.mean()
    spread = float((apart**2).sum())
    if spread == 0:
        return math.nan, math.nan
    slope = float((apart * (y - y.mean())).sum()) / spread
    residuals = y - y.mean() - slope * apart
    return slope, float(np.sqrt((residuals**2).sum() / max(1, len(x) - 2) / spread))


if __name__ == "__main__":
    main()
