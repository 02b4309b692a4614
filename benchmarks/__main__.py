"""Lists and runs the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch

import instembed
from benchmarks import ENTRIES
from benchmarks.harness import Entry, Row, Settings, table, write_json
from benchmarks.machine import ceilings, machine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("entry", nargs="*", help="entries to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list entries and their workloads, and stop")
    parser.add_argument("--workload", action="append", help="only this workload; may be repeated")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns each contestant takes")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--no-slow", action="store_true", help="leave out what takes seconds a call")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--compile-only", action="append", help="torch.compile in this entry; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="also write the rows, the machine and the versions here")
    parser.add_argument("--profile", action="store_true", help="show where our time goes instead of timing")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[tuple[Entry, str]]:
    gpu = options.device.type != "cpu"
    known = {entry.name: entry for entry in ENTRIES if entry.cuda or not gpu}
    unknown = [name for name in options.entry if name not in known]
    if unknown:
        raise SystemExit(
            f"no benchmark named {', '.join(unknown)} on {options.device}; there are {', '.join(known)}"
        )
    asked = options.workload or []
    return [
        (entry, workload)
        for entry in ([known[name] for name in options.entry] or known.values())
        for workload in (*entry.workloads, *entry.gpu_workloads)
        if (workload in asked if asked else gpu or workload in entry.workloads)
    ]


def show_profile(entry: Entry, workload: str, settings: Settings) -> None:
    call = entry.profile(workload, settings)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(10):
            call()
    print(f"\n{entry.name} {workload}, 10 calls")
    by = "self_cuda_time_total" if settings.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=12))


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        options.rounds,
        options.seconds,
        slow=not options.no_slow,
        compile=not options.no_compile,
        device=options.device,
    )


def main() -> None:
    options = arguments()
    if options.list:
        for entry in ENTRIES:
            only = f"; on a GPU also {', '.join(entry.gpu_workloads)}" if entry.gpu_workloads else ""
            print(f"{entry.name:24} {', '.join(entry.workloads)}{only if entry.cuda else '; CPU only'}")
        return
    torch.set_num_threads(options.threads)
    if options.device.type == "cuda" and not instembed.cuda_available():
        raise SystemExit("no GPU, or a core without CUDA kernels: instembed.cuda_available() is False")
    if options.device.index is not None:
        torch.cuda.set_device(options.device)
    settings, chosen_ones = settings_of(options), chosen(options)
    if options.profile:
        for entry, workload in chosen_ones:
            show_profile(entry, workload, settings)
        return
    limits = ceilings(settings.device, settings.rounds, settings.seconds)
    about = machine(settings.device) | asdict(limits)
    for key, value in about.items():
        print(f"{key}: {value}")
    rows: list[Row] = []
    failed = []
    for entry, workload in chosen_ones:
        compiles = settings.compile and entry.name in (options.compile_only or [entry.name])
        try:
            new = entry.run(workload, replace(settings, compile=compiles, ceilings=limits))
        except Exception:  # an entry that fails leaves the others their turn, and the exit status says so
            traceback.print_exc()
            failed.append(f"{entry.name} {workload}")
            continue
        print("\n" + table(new), flush=True)
        rows += new
        if options.json:  # after each workload: a run that is cut off keeps what it has
            write_json(options.json, rows, about)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
