"""Mean-shift grouping against its definition in instembed.reference, and against scikit-learn."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import sklearn.cluster
import torch
from torch import Tensor

import instembed
from benchmarks.workloads import ellipses, trained_embeddings
from instembed import Grouping, reference
from tests.comparing import as_on_cpu, on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def assert_same(found: Grouping, expected: Grouping) -> None:
    found, expected = as_on_cpu(found, expected), on_cpu(expected)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.num_instances, expected.num_instances)
    assert torch.equal(found.counts, expected.counts)
    assert found.centers.dtype == expected.centers.dtype
    torch.testing.assert_close(found.centers, expected.centers, rtol=1e-6, atol=1e-6)


def check(embeddings: Tensor, bandwidth: float, **options: object) -> Grouping:
    expected = reference.mean_shift(embeddings.cpu(), bandwidth, **on_cpu(options))
    if embeddings.is_cuda and expected.centers.shape[1] > 64:
        options.setdefault("max_instances", expected.centers.shape[1])
    found = instembed.mean_shift(embeddings, bandwidth, **options)
    assert_same(found, expected)
    check_consistent(found)
    return found


def check_consistent(found: Grouping) -> None:
    """What holds for any input: the fields agree with each other."""
    for counts, number in zip(found.counts, found.num_instances.tolist(), strict=True):
        assert not counts[number:].any() and (counts[:number] >= 0).all()
    assert found.counts.sum() == (found.labels > 0).sum()
    assert (found.labels >= 0).all()
    assert not found.centers.requires_grad


def patches(*size: int, channels: int, spread: float = 0.3, seed: int = 0) -> Tensor:
    """(2, channels, *size): rectangles of nearby embeddings."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(2, *size, dtype=torch.int64)
    for axis, n in enumerate(size):
        shape = [1] * (1 + len(size))
        shape[axis + 1] = n
        ids = ids * 3 + (torch.arange(n) * 3 // n).view(shape)
    centers = 3 * torch.randn(int(ids.max()) + 1, channels, generator=generator)
    noise = spread * torch.randn(*ids.shape, channels, generator=generator)
    return (centers[ids] + noise).movedim(-1, 1).contiguous()


def clusters(n: int, channels: int, count: int, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 4 * torch.randn(count, channels, generator=generator)
    return centers[torch.randint(count, (n,), generator=generator)] + spread * torch.randn(
        n, channels, generator=generator
    )


# Peeling against the definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1,), (257,), (7, 13), (33, 65), (3, 5, 31)])
def test_peel_sizes_and_types(size: tuple[int, ...], dtype: torch.dtype) -> None:
    for channels in (1, 3, 8):
        check(patches(*size, channels=channels).to(dtype), 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peel_layouts(dtype: torch.dtype) -> None:
    embeddings = patches(20, 37, channels=4).to(dtype)
    expected = check(embeddings, 1.5)
    assert_same(instembed.mean_shift(embeddings.contiguous(memory_format=torch.channels_last), 1.5), expected)
    turned = embeddings.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(instembed.mean_shift(turned, 1.5), expected)
    wide = torch.stack([embeddings, -embeddings], -1).flatten(3)[..., ::2]
    assert_same(instembed.mean_shift(wide, 1.5), expected)
    volume = patches(4, 9, 10, channels=3).to(dtype)
    expected = check(volume, 1.5)
    assert_same(instembed.mean_shift(volume.contiguous(memory_format=torch.channels_last_3d), 1.5), expected)


@pytest.mark.parametrize("leftovers", ["noise", "nearest"])
@pytest.mark.parametrize("min_size", [1, 2, 5, 40, 10**6])
def test_peel_small_clusters_and_leftovers(min_size: int, leftovers: str) -> None:
    for seed in range(3):
        check(patches(20, 37, channels=2, spread=0.8, seed=seed), 0.9, min_size=min_size, leftovers=leftovers)


@pytest.mark.parametrize("points", [50, 1500])
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 33])
def test_peel_points(points: int, channels: int) -> None:
    for spread in (0.05, 2.0, 0.4):
        embeddings = clusters(points, channels, 7, spread)
        check(embeddings, 1.5, min_size=3, leftovers="nearest")
    check(embeddings.double(), 1.5)
    check(embeddings.t().contiguous().t(), 1.5)


@pytest.mark.parametrize("kind", ["bool", "int8", "int64", "uint8", "strided"])
def test_peel_masks(kind: str) -> None:
    embeddings = patches(30, 41, channels=3)
    classes = torch.randint(-2, 3, (2, 30, 41))
    if kind == "bool":
        mask = classes > 0
    elif kind == "strided":
        mask = torch.stack([classes, classes], -1).flatten(2)[..., ::2]
    else:
        mask = (classes + (2 if kind == "uint8" else 0)).to(getattr(torch, kind))
    for leftovers in ("noise", "nearest"):
        found = check(embeddings, 1.2, mask=mask, min_size=4, leftovers=leftovers)
        assert (found.labels[mask == 0] == 0).all()


def test_classes_never_share_an_instance_and_come_in_order() -> None:
    embeddings = torch.zeros(1, 2, 4, 6)
    classes = torch.tensor([30, 0, -5, 30, 2**40, 7]).repeat(4, 1)[None]
    found = check(embeddings, 1.0, mask=classes)
    assert found.labels[0, 0].tolist() == [3, 0, 1, 3, 4, 2]


def test_offsets() -> None:
    points = clusters(2000, 4, 5, 0.2)
    offsets = torch.tensor([0, 0, 3, 900, 900, 2000])
    mask = torch.randint(0, 3, (2000,))
    found = check(points, 1.5, offsets=offsets, mask=mask)
    assert found.num_instances.tolist()[::3] == [0, 0]
    for b in range(5):
        alone = slice(offsets[b], offsets[b + 1])
        single = instembed.mean_shift(points[alone], 1.5, mask=mask[alone])
        assert torch.equal(single.labels, found.labels[alone])
    assert_same(instembed.mean_shift(points, 1.5, offsets=offsets.int(), mask=mask), found)


@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_nothing_to_group(seeding: str) -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0), (0, 3)):
        found = check(torch.zeros(shape), 1.0, seeding=seeding)
        assert found.centers[:, :0].shape == (1 if len(shape) == 2 else shape[0], 0, 3)
        assert not found.centers.any() and (found.centers.is_cuda or found.centers.shape[1] == 0)
    found = check(torch.zeros(2, 3, 4, 5), 1.0, mask=torch.zeros(2, 4, 5, dtype=torch.bool), seeding=seeding)
    assert not found.labels.any()
    found = check(torch.zeros(0, 3), 1.0, offsets=torch.tensor([0]), max_instances=4, seeding=seeding)
    assert found.centers.shape == (0, 4, 3)


@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_one_point_and_identical_points(seeding: str) -> None:
    found = check(torch.tensor([[3.0, 4.0]]), 1.0, seeding=seeding)
    assert found.labels.tolist() == [1] and found.centers[:, :1].tolist() == [[[3.0, 4.0]]]
    found = check(torch.full((1000, 3), 0.1), 1e-3, seeding=seeding)
    assert found.num_instances.tolist() == [1] and found.counts[:, :1].tolist() == [[1000]]


@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_distance_of_exactly_the_bandwidth_is_within(seeding: str) -> None:
    """On a grid, ties are everywhere; the float tests must hand them to the exact one."""
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 3)
    for bandwidth in (1.0, math.sqrt(2.0), 2.0, 3.0):
        check(grid, bandwidth, seeding=seeding)
        check(0.1 * grid, 0.1 * bandwidth, seeding=seeding)
        check((0.1 * grid).double(), 0.1 * bandwidth, seeding=seeding)
    pair = torch.tensor([[0.0], [1.0]])
    assert check(pair, 1.0, seeding=seeding).num_instances.tolist() == [1]
    assert check(pair, 0.999999, seeding=seeding).num_instances.tolist() == [2]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e6, 1e15, 1e30])
def test_scale(scale: float) -> None:
    embeddings = scale * clusters(500, 3, 5, 0.2)
    check(embeddings, 1.5 * scale)
    check(embeddings.double(), 1.5 * scale, seeding="all")


@pytest.mark.parametrize("shift", [1e3, 1e5, 1e7])
def test_far_from_zero(shift: float) -> None:
    embeddings = clusters(800, 3, 5, 0.3) + shift
    check(embeddings, 1.5)
    check(embeddings.double(), 1.5)
    check(patches(20, 37, channels=3) - shift, 1.5)


@pytest.mark.parametrize("seeding", ["peel", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype: torch.dtype, seeding: str) -> None:
    for embeddings in (patches(12, 17, channels=3).to(dtype), clusters(400, 3, 5, 0.3).to(dtype)):
        bad = torch.rand(embeddings[:, 0].shape if embeddings.dim() > 2 else embeddings.shape[:1]) < 0.1
        values = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        spoiled = embeddings.movedim(1, -1).clone()
        spoiled[bad] = torch.where(torch.rand(int(bad.sum()), 3) < 0.5, values, spoiled[bad])
        spoiled = spoiled.movedim(-1, 1)
        found = check(spoiled, 1.5, seeding=seeding, leftovers="nearest", min_size=3)
        not_finite = ~spoiled.isfinite().all(1)
        assert not_finite.any() and (found.labels[not_finite] == 0).all()
    everything = check(torch.full((1, 2, 5, 5), math.nan).to(dtype), 1.0, seeding=seeding)
    assert everything.num_instances.tolist() == [0]


def test_nearest_of_centres_at_distances_that_overflow_is_the_first() -> None:
    points = torch.tensor(
        [[0.0, 0], [0, 0], [9, 9], [9, 9], [1e200, 0], [-1e200, 1e200]], dtype=torch.float64
    )
    for classes in (torch.ones(6, dtype=torch.int64), torch.tensor([1, 1, 2, 2, 2, 2])):
        found = check(points, 1.0, mask=classes, min_size=2, leftovers="nearest")
        assert found.labels.tolist() == [1, 1, 2, 2] + 2 * [int(classes[4])]


def test_sums_that_overflow_end() -> None:
    largest = torch.finfo(torch.float64).max
    for seeding in ("peel", "all"):
        equal = torch.full((10, 2), largest, dtype=torch.float64)
        check_consistent(instembed.mean_shift(equal, 1.0, seeding=seeding))
        mixed = torch.tensor([[largest], [largest], [-largest], [0.0]], dtype=torch.float64)
        check_consistent(instembed.mean_shift(mixed, 1.0, seeding=seeding))


@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_points_beside_some_whose_sum_overflows(seeding: str) -> None:
    huge = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64)
    for seed in range(10):
        points = clusters(200, 3, 16, 0.2, seed).double()
        points = torch.where(torch.rand(points.shape) < 0.1, huge[torch.randint(2, points.shape)], points)
        check(points, 1.5, seeding=seeding, min_size=4, leftovers="nearest")


def test_max_iter_and_tol() -> None:
    embeddings = clusters(600, 2, 4, 1.0)
    for max_iter in (1, 2, 5):
        for tol in (0.0, 1e-3, 0.5):
            check(embeddings, 1.0, max_iter=max_iter, tol=tol)
            check(embeddings[:200], 1.0, max_iter=max_iter, tol=tol, seeding="all")


@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_random_settings(seeding: str) -> None:
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(0, 10**6, (40, 8), generator=generator).tolist()
    for a, b, c, d, e, f, g, h in draws:
        n = 20 + a % (1000 if seeding == "peel" else 120)
        embeddings = clusters(n, 1 + b % 9, 1 + c % 8, (0.05, 0.5, 3.0)[d % 3], seed=e).to(DTYPES[f % 4])
        mask = torch.randint(0, 3, (n,), generator=generator) if g % 2 else None
        check(
            embeddings,
            (0.4, 1.0, 2.5)[h % 3],
            mask=mask,
            seeding=seeding,
            min_size=(1, 1, 4)[a % 3],
            leftovers=("noise", "nearest")[b % 2],
        )


# All points against scikit-learn ---------------------------------------------------------------------------


def family(name: str, n: int, channels: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    if name == "separated":
        centers = 4 * generator.normal(size=(12, channels))
        return centers[generator.integers(12, size=n)] + 0.15 * generator.normal(size=(n, channels)), 1.5
    if name == "touching":
        centers = generator.normal(size=(6, channels))
        noise = 0.4 * generator.normal(size=(n, channels))
        return centers[generator.integers(6, size=n)] + noise, 1.2 + 0.05 * channels
    if name == "heavy tailed":
        return generator.standard_t(1.5, size=(n, channels)), 2.0 + 0.1 * channels
    return generator.uniform(size=(n, channels)), 0.15 + 0.05 * channels


def all_points(points: np.ndarray, bandwidth: float, device: str) -> Grouping:
    """With as many rows as there are instances."""
    found = instembed.mean_shift(
        torch.from_numpy(points).to(device), bandwidth, seeding="all", max_instances=len(points)
    )
    return found._replace(centers=found.centers[:, : found.num_instances.max()])


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 16, 32])
@pytest.mark.parametrize("name", ["separated", "touching", "heavy tailed", "uniform"])
def test_all_equals_scikit_learn(name: str, channels: int, each_device: str) -> None:
    n = 350 if channels < 16 else 120
    points, bandwidth = family(name, n, channels, np.random.default_rng(channels))
    for dtype in (np.float64, np.float32):
        values = points.astype(dtype)
        theirs = sklearn.cluster.MeanShift(bandwidth=bandwidth, cluster_all=False)
        theirs.fit(values.astype(np.float64))
        ours = on_cpu(all_points(values, bandwidth, each_device))
        np.testing.assert_array_equal(ours.labels.numpy() - 1, theirs.labels_)
        np.testing.assert_allclose(ours.centers[0].double(), theirs.cluster_centers_, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "n"), [("separated", 3000), ("touching", 700)])
def test_all_equals_scikit_learn_on_many_points(name: str, n: int, each_device: str) -> None:
    points, bandwidth = family(name, n, 8, np.random.default_rng(0))
    theirs = sklearn.cluster.MeanShift(bandwidth=bandwidth, cluster_all=False).fit(points)
    ours = on_cpu(all_points(points, bandwidth, each_device))
    np.testing.assert_array_equal(ours.labels.numpy() - 1, theirs.labels_)
    np.testing.assert_allclose(ours.centers[0], theirs.cluster_centers_, rtol=1e-5)


def test_all_in_an_image_equals_all_on_points() -> None:
    embeddings = patches(24, 40, channels=4, spread=0.5)
    found = instembed.mean_shift(embeddings, 1.5, seeding="all")
    for b in range(2):
        alone = instembed.mean_shift(embeddings[b].flatten(1).t().contiguous(), 1.5, seeding="all")
        assert torch.equal(alone.labels.view(24, 40), found.labels[b])


# Threads, layouts of the work, and the rest ----------------------------------------------------------------


@pytest.mark.cpu_only
@pytest.mark.parametrize("seeding", ["peel", "all"])
def test_same_bits_whatever_the_threads(seeding: str, two_threads: None) -> None:
    ids = ellipses((160, 240), 12, torch.Generator().manual_seed(0))[None]
    rough = trained_embeddings(ids, 8, rough=True)
    inputs = [
        (rough, {"mask": ids > 0}),
        (rough.repeat(5, 1, 1, 1), {"mask": (ids > 0).repeat(5, 1, 1)}),
        (clusters(30_000 if seeding == "peel" else 4000, 8, 20, 0.4), {}),
        (torch.randn(1, 3, 60, 70), {}),
    ]
    for embeddings, options in inputs:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(instembed.mean_shift(embeddings, 1.5, seeding=seeding, min_size=2, **options))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["planar", "channels last", "half"])
def test_image_of_many_blocks(layout: str) -> None:
    """Large enough for stray pixels to be sorted, and for blocks to be cut at the ends of tasks."""
    ids = ellipses((150, 220), 9, torch.Generator().manual_seed(1))[None]
    embeddings = trained_embeddings(ids, 4, rough=True)
    if layout == "channels last":
        embeddings = embeddings.contiguous(memory_format=torch.channels_last)
    elif layout == "half":
        embeddings = embeddings.half()
    found = check(embeddings, 1.5, min_size=5, leftovers="nearest")
    assert found.num_instances.item() >= len(ids.unique())


def test_rough_borders_make_no_extra_instances() -> None:
    """With a minimum size below every instance's, the instances are found and nothing else."""
    ids = ellipses((256, 512), 8, torch.Generator().manual_seed(3))[None]
    sizes = torch.bincount(ids.flatten())[1:]
    expected = int((sizes >= 400).sum())
    assert expected >= 6 and not ((sizes > 200) & (sizes < 600)).any()
    for rough in (False, True):
        embeddings = trained_embeddings(ids, 8, rough=rough)
        found = instembed.mean_shift(embeddings, 1.5, mask=ids > 0, min_size=400)
        assert found.num_instances.item() == expected
        for label in range(1, expected + 1):  # each is one true instance, but for border pixels
            inside = ids[found.labels == label]
            assert (inside == inside.mode().values).float().mean() > 0.97


def test_trained_embeddings_give_back_the_instances() -> None:
    ids = ellipses((200, 300), 10, torch.Generator().manual_seed(0))[None]
    embeddings = trained_embeddings(ids, 8)
    for seeding in ("peel", "all"):
        found = instembed.mean_shift(embeddings, 1.5, mask=ids > 0, seeding=seeding)
        pairs = torch.stack([ids, found.labels]).flatten(1).unique(dim=1)
        assert pairs.shape[1] == len(ids.unique()) == len(found.labels.unique())


def test_max_instances(each_device: str, overflow_checks: None) -> None:
    points = clusters(500, 3, 6, 0.1)
    found = instembed.mean_shift(points, 1.5)
    number = found.num_instances.item()
    wide = check(points, 1.5, max_instances=number + 3)
    assert wide.centers.shape == (1, number + 3, 3) and not wide.centers[:, number:].any()
    assert torch.equal(wide.centers[:, :number], found.centers[:, :number])
    check(points, 1.5, max_instances=number)
    told = number if each_device == "cpu" else "more"
    with pytest.raises(ValueError, match=f"max_instances={number - 1} .* {told} instances"):
        instembed.mean_shift(points, 1.5, max_instances=number - 1)


def test_requires_grad() -> None:
    points = clusters(100, 3, 6, 0.1).requires_grad_()
    found = instembed.mean_shift(points, 1.5)
    assert not any(output.requires_grad for output in found)
    with torch.inference_mode():
        instembed.mean_shift(points, 1.5)


def test_inputs_are_left_alone() -> None:
    embeddings, mask = patches(20, 30, channels=3), torch.randint(0, 3, (2, 20, 30))
    before = embeddings.clone(), mask.clone()
    instembed.mean_shift(embeddings, 1.0, mask=mask)
    assert torch.equal(embeddings, before[0]) and torch.equal(mask, before[1])


def test_several_python_threads() -> None:
    inputs = [clusters(3000, 4, 6, 0.3, seed=k) for k in range(6)]
    expected = [instembed.mean_shift(points, 1.5) for points in inputs]
    found: list[Grouping | None] = [None] * len(inputs)

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = instembed.mean_shift(inputs[k], 1.5)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("capacity", [None, 40])
def test_compile(capacity: int | None) -> None:
    def grouped(embeddings: Tensor) -> Tensor:
        found = instembed.mean_shift(2 * embeddings, 1.5, max_instances=capacity)
        return found.labels + found.num_instances.view(-1, 1, 1) + found.counts.sum()

    embeddings = patches(12, 20, channels=3)
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(embeddings), grouped(embeddings))
