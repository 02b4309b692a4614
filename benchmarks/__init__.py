"""Throughput against pure-PyTorch references and the hardware's limit: `python -m benchmarks`."""

from benchmarks import discriminative, instance_pool, label_statistics, mean_shift

ENTRIES = [*discriminative.ENTRIES, *mean_shift.ENTRIES, *label_statistics.ENTRIES, *instance_pool.ENTRIES]
