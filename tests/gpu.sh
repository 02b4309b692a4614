#!/usr/bin/env bash
# On a machine with a GPU: builds into the environment of $PYTHON without fetching anything (torch, numpy,
# pytest, pybind11, scikit-build-core, cmake and ninja must be there), runs the GPU half of the tests, small
# ones again under compute-sanitizer, and the benchmarks. Never run so far: no GPU was at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e . \
  --config-settings=cmake.define.INSTEMBED_CUDA=ON --config-settings=cmake.define.INSTEMBED_CUDA_ARCHITECTURES=native
"$PYTHON" -c 'import instembed, torch; assert instembed.cuda_available(), "no GPU"; print(torch.cuda.get_device_name())'
status=0  # what fails does not keep the rest from running
failed() { echo "*** FAILED: $1"; status=1; }
# Files of tests that compare with a library which is not here.
mapfile -t left_out < <("$PYTHON" - << 'END'
import importlib, pathlib
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    try:
        importlib.import_module(f"tests.{path.stem}")
    except ImportError:
        print(f"--ignore={path}")
END
)
[ ${#left_out[@]} = 0 ] || echo "*** NOT run: ${left_out[*]}"
"$PYTHON" -m pytest -m cuda "${left_out[@]}" || failed tests
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    # Without torch's cache of memory, what lies behind a tensor is not a tensor of before.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --report-api-errors no \
      --error-exitcode 1 "$PYTHON" -m pytest -m cuda tests/test_cuda*.py \
      -k 'types or options or sizes or shapes or offsets or tag_loss' || failed "$tool"
  done
else
  echo 'compute-sanitizer was not found: memory and races were NOT checked'
fi
# Short turns, nothing that takes seconds a call, and torch.compile against the loss only, because it compiles
# for longer than everything else takes: minutes in all. `python -m benchmarks --device cuda` has it all.
results=benchmarks/results/$("$PYTHON" -c 'import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))').json
"$PYTHON" -m benchmarks --device cuda --rounds 3 --seconds 0.05 --no-slow --compile-only discriminative \
  --json "$results" || failed benchmarks
echo "results: $results"
exit "$status"
