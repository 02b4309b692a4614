"""Reads what `nvcc -Xptxas -v` said of each kernel, and fails where one spills or uses local memory.

    python tests/cpp/check_resources.py BUILD_LOG ARCHITECTURE...

Every architecture must have kernels in the log, so that a log of nothing is no success.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def main(log: str, *architectures: str) -> int:
    kernels = [match.groupdict() for match in KERNEL.finditer(Path(log).read_text())]
    bad = [k for k in kernels if any(int(k[size]) > 0 for size in ("stack", "stores", "loads"))]
    for k in bad:
        print(f"{k['architecture']}: {k['stack']} bytes of stack, {k['stores']} spilled: {k['name']}")
    missing = [a for a in architectures if not any(k["architecture"] == f"sm_{a}" for k in kernels)]
    for architecture in missing:
        print(f"{log} tells of no kernel for sm_{architecture}")
    most = max((int(k["registers"]) for k in kernels), default=0)
    print(f"{len(kernels)} kernels, {len(bad)} with local memory, {most} registers at most")
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
