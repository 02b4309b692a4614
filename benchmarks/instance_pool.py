"""Pooling 64-channel features by instance against PyTorch's scatters. The floor reads and writes features."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import WORKLOADS, instances_of, labels_of
from instembed import reference

CHANNELS = 64
# (features, labels, reduce) -> rows (B, rows, C) and their ids, (B, rows) or (rows,), 0 where there is none
Pool = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


def random_features(workload: str) -> Tensor:
    shape = WORKLOADS[workload]
    return torch.randn(shape.batch, CHANNELS, *shape.size, generator=torch.Generator().manual_seed(1))


def ours(features: Tensor, labels: Tensor, reduce: Any, room: int | None) -> tuple[Tensor, Tensor]:
    pooled = instembed.instance_pool(features, labels, reduce=reduce, max_instances=room, return_ids=True)
    return pooled.features, pooled.ids


def loop(features: Tensor, labels: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """The usual implementation: a mask an instance."""
    pooled = reference.instance_pool(features, labels, reduce=reduce)
    return pooled.features, pooled.ids


def scatter(features: Tensor, slots: Tensor, reduce: str, count: int) -> Tensor:
    """Along the lines of the features as they lie; slots are 0..count, 0 the background."""
    flat, channels = features.flatten(2), features.shape[1]
    index = slots.flatten(1)[:, None].expand(-1, channels, -1)
    zeros = flat.new_zeros(len(flat), channels, count + 1)
    if reduce == "max":
        pooled = zeros.scatter_reduce(2, index, flat, "amax", include_self=False)
    else:
        pooled = zeros.scatter_add(2, index, flat)
    return _finished(pooled.transpose(1, 2), slots, reduce)


def index_add(features: Tensor, slots: Tensor, reduce: str, count: int) -> Tensor:
    """Pixel by pixel over all images at once, which transposes the features first."""
    points = features.flatten(2).mT.reshape(-1, features.shape[1])
    shift = (count + 1) * torch.arange(len(features), device=slots.device)[:, None]
    index = (slots.flatten(1) + shift).flatten()
    zeros = points.new_zeros(len(features) * (count + 1), points.shape[1])
    if reduce == "max":
        pooled = zeros.index_reduce(0, index, points, "amax", include_self=False)
    else:
        pooled = zeros.index_add(0, index, points)
    return _finished(pooled.view(len(features), count + 1, -1), slots, reduce)


def _finished(pooled: Tensor, slots: Tensor, reduce: str) -> Tensor:
    if reduce == "mean":
        columns = pooled.shape[1]
        shift = columns * torch.arange(len(slots), device=slots.device)[:, None]
        counts = torch.bincount((slots.flatten(1) + shift).flatten(), minlength=len(slots) * columns)
        pooled = pooled / counts.view(len(slots), columns, 1).clamp(min=1)
    return pooled[:, 1:]


def known(how: Callable[[Tensor, Tensor, str, int], Tensor], count: int) -> Pool:
    """For ids that are known to be 0..count, 0 the background: more than instembed may assume."""
    return lambda features, labels, reduce: (
        how(features, labels, reduce, count),
        torch.arange(1, count + 1, device=labels.device),
    )


def compacted(how: Callable[[Tensor, Tensor, str, int], Tensor]) -> Pool:
    """For any ids, as instembed has them: `unique`, which is a sort, makes slots of them."""

    def pool(features: Tensor, labels: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
        ids, slots = torch.unique(labels, return_inverse=True)
        if ids[0] != 0:  # the smallest id of the workloads is the background
            ids, slots = torch.cat([ids.new_zeros(1), ids]), slots + 1
        return how(features, slots, reduce, len(ids) - 1), ids[1:]

    return pool


def forward_and_backward(pool: Pool, features: Tensor, labels: Tensor, reduce: str) -> Callable[[], Tensor]:
    leaf = features.detach().requires_grad_()

    def call() -> Tensor:
        leaf.grad = None
        pool(leaf, labels, reduce)[0].sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return call


def forward_only(pool: Pool, features: Tensor, labels: Tensor, reduce: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return pool(features, labels, reduce)[0]

    return call


def contestants(labels: Tensor, settings: Settings) -> dict[str, Pool]:
    count = int(labels.max())
    pools: dict[str, Pool] = {
        OURS: functools.partial(ours, room=settings.room(instances_of(labels))),
        "unique, scatter": compacted(scatter),
        "scatter, ids known": known(scatter, count),
        "index_add, ids known": known(index_add, count),
    }
    if settings.compile:
        torch._dynamo.reset()
        pools["compiled, ids known"] = torch.compile(known(scatter, count))
    if settings.slow and count <= 100:
        pools["loop over instances"] = loop
    return pools


def check(pools: dict[str, Pool], features: Tensor, labels: Tensor, reduce: str) -> None:
    """All contestants pool the same and give the same gradients."""
    expected: tuple[Tensor, Tensor] | None = None
    for name, pool in pools.items():
        rows, ids = pool(features, labels, reduce)
        by_id = features.new_zeros(len(features), int(labels.max()) + 1, CHANNELS)
        by_id.scatter_(1, ids.expand(rows.shape[:2])[:, :, None].expand_as(rows), rows)
        gradient = forward_and_backward(pool, features, labels, reduce)()
        if reduce == "max":  # PyTorch's scatter shares it out among equal maxima
            gradient = pools[OURS](gradient, labels, "sum")[0]
        expected = expected or (by_id, gradient)
        torch.testing.assert_close(by_id, expected[0], rtol=1e-4, atol=1e-3, msg=name)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5, msg=f"{name}: gradient")


def run(workload: str, settings: Settings) -> list[Row]:
    features, labels = data = settings.place((random_features(workload), labels_of(workload)))
    pools = contestants(labels, settings)
    rows = []
    for reduce in ("mean", "sum", "max"):
        check(pools, features, labels, reduce)
        for what, make, passes in (("forward", forward_only, 1), ("both", forward_and_backward, 2)):

            def calls(
                data: tuple[Tensor, Tensor],
                make: Callable[..., Call] = make,
                passes: int = passes,
                reduce: str = reduce,
            ) -> dict[str, Call]:
                features, _ = data
                floor = features.sum if passes == 1 else lambda: (features.sum(), torch.zeros_like(features))
                return {**{name: make(pool, *data, reduce) for name, pool in pools.items()}, FLOOR: floor}

            # The features are read, their gradient is written, and there is an addition for each.
            work = Work(passes * features.nbytes + labels.nbytes, features.numel())
            rows += compare(("instance_pool", workload, f"{reduce}, {what}"), calls, data, settings, work)
    return rows


def profile(workload: str, settings: Settings) -> Call:
    labels = labels_of(workload)
    pool = contestants(labels, replace(settings, compile=False))[OURS]
    return forward_and_backward(pool, *settings.place((random_features(workload), labels)), "mean")


ENTRIES = [Entry("instance_pool", ("instance_pool",), ("cells", "city", "volume", "noise"), run, profile)]
