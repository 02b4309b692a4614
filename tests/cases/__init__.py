"""What tests/test_ops.py runs for each op: arguments for opcheck, and bad input with its error."""

from __future__ import annotations

from tests.cases import (
    associative_embedding,
    cosine_margin,
    deep_metric,
    discriminative,
    gather_at,
    group_keypoints,
    group_on_sphere,
    instance_pool,
    label_statistics,
    location_maps,
    mean_shift,
    recurrent_mean_shift,
    seeds,
)
from tests.cases.common import BadInput, OpCases

_FAMILIES = (
    associative_embedding,
    cosine_margin,
    deep_metric,
    discriminative,
    gather_at,
    group_keypoints,
    group_on_sphere,
    instance_pool,
    label_statistics,
    location_maps,
    mean_shift,
    recurrent_mean_shift,
    seeds,
)

OPCHECK: OpCases = {}
BAD_INPUT: dict[str, list[BadInput]] = {}
for _family in _FAMILIES:
    OPCHECK.update(getattr(_family, "OPCHECK", {}))
    BAD_INPUT.update(_family.BAD_INPUT)
