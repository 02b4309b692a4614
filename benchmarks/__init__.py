"""Throughput against pure-PyTorch references and the hardware's limit: `python -m benchmarks`."""

from benchmarks import associative_embedding, discriminative, gather_at, label_statistics, mean_shift

ENTRIES = [
    *discriminative.ENTRIES,
    *associative_embedding.ENTRIES,
    *mean_shift.ENTRIES,
    *label_statistics.ENTRIES,
    *gather_at.ENTRIES,
]
