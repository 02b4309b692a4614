"""Throughput against pure-PyTorch references and the hardware's limit: `python -m benchmarks`."""

from benchmarks import (
    associative_embedding,
    cosine_margin,
    deep_metric,
    discriminative,
    gather_at,
    group_keypoints,
    group_on_sphere,
    instance_pool,
    label_statistics,
    mean_shift,
    recurrent_mean_shift,
    seeds,
)

ENTRIES = [
    *discriminative.ENTRIES,
    *associative_embedding.ENTRIES,
    *mean_shift.ENTRIES,
    *cosine_margin.ENTRIES,
    *recurrent_mean_shift.ENTRIES,
    *group_on_sphere.ENTRIES,
    *group_keypoints.ENTRIES,
    *label_statistics.ENTRIES,
    *instance_pool.ENTRIES,
    *gather_at.ENTRIES,
    *deep_metric.ENTRIES,
    *seeds.ENTRIES,
]
