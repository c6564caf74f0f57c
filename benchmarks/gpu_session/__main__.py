"""The command line of scripts/gpu_session.sh.

Exit status: 0 only if every stage about correctness that could run passed; 1 otherwise; 2 for wrong arguments; 130
after Ctrl-C, with what was found until then.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.report import table
from benchmarks.gpu_session.session import Session
from benchmarks.gpu_session.stages import LIMIT, ORDINARY, STAGES


def print_list() -> None:
    width = max(len(stage.name) for stage in STAGES)
    for stage in STAGES:
        print(f"{stage.name:<{width}}  {stage.seconds:>4} s  {stage.answers}")
    print(f"{'in all':<{width}}  {sum(stage.seconds for stage in ORDINARY):>4} s  at most, without quality")


def interrupt(*_: Any) -> None:
    """What ends a session from outside ends it as Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("scripts/gpu_session.sh", description=__doc__, add_help=True)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="the folder that takes what is found")
    parser.add_argument("kit", type=Path, nargs="?", metavar="KIT", help="a folder with an offline kit")
    parser.add_argument("--list", action="store_true", help="stages, seconds, and what each answers")
    parser.add_argument("--rehearse", action="store_true", help="every stage, small, on a CPU")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole session (default: %(default)s)")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help="these stages, and prepare")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print_list()
        return 0
    if chosen.out is None:
        parser.error("OUT is missing: the folder that takes what is found")
    if chosen.kit is not None and not chosen.kit.is_dir():
        parser.error(f"KIT is {chosen.kit}; accepted is a folder")
    if chosen.out.exists() and not chosen.out.is_dir():
        parser.error(f"OUT is {chosen.out}, a file; accepted is a folder")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if (chosen.out / "session.json").exists():
        parser.error(f"OUT is {chosen.out}, which holds an earlier session; name another folder")
    stages = ORDINARY
    if chosen.only is not None:
        stages = tuple(stage for stage in STAGES if stage.name in ("prepare", *chosen.only))
    for number in (signal.SIGTERM, signal.SIGINT):  # shells start background jobs with SIGINT ignored
        signal.signal(number, interrupt)
    session = Session(
        chosen.out.resolve(), chosen.kit and chosen.kit.resolve(), stages, rehearsal=chosen.rehearse,
        seconds=chosen.seconds, say=lambda text: print(text, flush=True),
    )  # fmt: skip
    session.run()
    print("\n" + table(session.records))
    print(f"written: {chosen.out}/session.log, session.json, README.md, results.tar.gz (unpack it in the repository)")
    if session.interrupted:
        return 130
    return 0 if session.passed else 1


if __name__ == "__main__":
    sys.exit(main())
