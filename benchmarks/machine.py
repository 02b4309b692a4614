"""What the figures were measured on, and how fast it copies and multiplies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import instembed
from benchmarks.timing import Call, measure


@dataclass(frozen=True)
class Work:
    """What a workload takes at least, whoever does it, with each input read once from memory."""

    bytes: float  # that must move, reads and writes
    flops: float = 0  # 0: nothing beside the bytes


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run as the rows, float32."""

    copy_gb_s: float  # read and written
    product_gflop_s: float
    product_tf32_gflop_s: float | None = None  # the same with TF32 allowed, on a GPU

    def limit_ms(self, work: Work) -> float:
        """The time that the hardware takes for the bytes or the flops, whichever is longer.

        A row can be below it: where data stays in a cache, or a method gets by with fewer flops.
        """
        return 1e3 * max(work.bytes / (1e9 * self.copy_gb_s), work.flops / (1e9 * self.product_gflop_s))


class _Operands(NamedTuple):
    source: Tensor
    target: Tensor
    square: Tensor
    product: Tensor


def ceilings(device: torch.device, rounds: int, seconds: float) -> Ceilings:
    """A copy of 256 MiB (GPU: 1 GiB), the product of matrices of 2048 (8192) rows and columns."""
    elements, rows = (2**28, 8192) if device.type == "cuda" else (2**26, 2048)
    source = torch.ones(elements, device=device)
    square = torch.ones(rows, rows, device=device)
    operands = _Operands(source, torch.zeros_like(source), square, torch.zeros_like(square))

    def calls(at: _Operands) -> dict[str, Call]:
        return {
            "copy": lambda: at.target.copy_(at.source),
            "product": lambda: torch.mm(at.square, at.square, out=at.product),
        }

    with tf32(allowed=False):
        times = measure(calls, operands, device, rounds, seconds)
    flops = 2e-6 * rows**3  # of a millisecond, G
    copy, product = 2e-6 * source.nbytes / times["copy"], flops / times["product"]
    if device.type != "cuda":
        return Ceilings(copy, product)
    with tf32(allowed=True):
        times = measure(calls, operands, device, rounds, seconds)
    return Ceilings(copy, product, flops / times["product"])


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    commit = _output("git", "describe", "--always", "--dirty")
    about = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "instembed": instembed.__version__,
        "commit": commit,
    }
    return about | _gpu(device) if device.type == "cuda" else about


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_l2_bytes": properties.L2_cache_size,
        "gpu_driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
            "\n"
        )[0],
        "cuda": torch.version.cuda,
        "tf32_allowed": torch.backends.cuda.matmul.allow_tf32,  # to the contestants
    }


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return ran.stdout.strip()
