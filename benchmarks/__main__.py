"""Lists and runs the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import ENTRIES
from benchmarks.harness import Entry, Row, Settings, machine, table, write_json


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("entry", nargs="*", help="entries to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list entries and their workloads, and stop")
    parser.add_argument("--workload", action="append", help="only this workload; may be repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns each contestant takes")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--no-slow", action="store_true", help="leave out what takes seconds a call")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="also write the rows, the machine and the versions here")
    parser.add_argument("--profile", action="store_true", help="show where our time goes instead of timing")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[tuple[Entry, str]]:
    known = {entry.name: entry for entry in ENTRIES}
    unknown = [name for name in options.entry if name not in known]
    if unknown:
        raise SystemExit(f"no benchmark named {', '.join(unknown)}; there are {', '.join(known)}")
    entries = [known[name] for name in options.entry] or ENTRIES
    return [
        (entry, workload)
        for entry in entries
        for workload in entry.workloads
        if not options.workload or workload in options.workload
    ]


def show_profile(entry: Entry, workload: str) -> None:
    call = entry.profile(workload)
    call()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        for _ in range(10):
            call()
    print(f"\n{entry.name} {workload}, 10 calls")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12))


def main() -> None:
    options = arguments()
    if options.list:
        for entry in ENTRIES:
            print(f"{entry.name:20} {', '.join(entry.workloads)}")
        return
    torch.set_num_threads(options.threads)
    for key, value in machine().items():
        print(f"{key}: {value}")
    settings = Settings(options.rounds, options.seconds, not options.no_slow, not options.no_compile)
    rows: list[Row] = []
    for entry, workload in chosen(options):
        if options.profile:
            show_profile(entry, workload)
            continue
        new = entry.run(workload, settings)
        print("\n" + table(new), flush=True)
        rows += new
        if options.json:  # after each workload: a run that is cut off keeps what it has
            write_json(options.json, rows)


if __name__ == "__main__":
    main()
