"""Grouping on the sphere against scipy's connected components and the plain definition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from instembed import reference
from instembed._sphere import unit_vectors
from tests.comparing import on_cpu

pytestmark = pytest.mark.usefixtures("each_device")


def directions(count: int, channels: int, clusters: int = 6, noise: float = 0.1) -> Tensor:
    centers = normalize(torch.randn(clusters, channels), dim=1)
    return centers[torch.randint(0, clusters, (count,))] + noise * torch.randn(count, channels)


def by_scipy(points: Tensor, threshold: float) -> Tensor:
    """Labels 1..K in the order of the first points."""
    x = normalize(points, dim=1).double()
    count, labels = connected_components(csr_matrix((x @ x.T >= threshold).cpu().numpy()), directed=False)
    labels = torch.from_numpy(labels).to(points.device, torch.int64)
    first = torch.stack([(labels == k).nonzero()[0, 0] for k in range(count)])
    return 1 + first.argsort().argsort()[labels]


def assert_matches_reference(embeddings: Tensor, **options: object) -> instembed.Grouping:
    labels, centers = reference.group_on_sphere(embeddings.cpu(), **on_cpu(options))
    most = max([len(image) for image in centers], default=0)
    room = {"max_instances": max(most, 1)} if embeddings.is_cuda else {}
    grouping = on_cpu(instembed.group_on_sphere(embeddings, **room, **options))
    assert torch.equal(grouping.labels, labels)
    assert grouping.num_instances.tolist() == [len(image) for image in centers]
    assert grouping.centers.shape[1] == max(most, *room.values(), 0)
    for k, image in enumerate(centers):
        torch.testing.assert_close(
            grouping.centers[k, : len(image)].double(), image, rtol=0, atol=1e-6 if len(image) else 0
        )
        assert not grouping.centers[k, len(image) :].any() and not grouping.counts[k, len(image) :].any()
    return grouping


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 16, 17, 40])
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_scipy(channels: int, noise: float, dtype: torch.dtype, two_threads: None) -> None:
    for count in (1, 5, 64, 300, 1500):
        points = directions(count, channels, noise=noise).to(dtype)
        for threshold in (0.5, 0.9, 0.99, 0.9999):
            grouping = instembed.group_on_sphere(points, threshold=threshold, max_instances=count)
            assert torch.equal(grouping.labels, by_scipy(points, threshold)), threshold


@pytest.mark.parametrize("count", [2, 65, 700, 3000])
@pytest.mark.parametrize("shuffled", [False, True])
def test_chains(count: int, shuffled: bool, two_threads: None) -> None:
    """Arcs whose neighbours alone are connected: one instance, or two where a link is missing."""
    step = math.pi / count  # half a circle
    angles = torch.arange(count, dtype=torch.float64) * step
    angles[count // 2 :] += 0.02 * step
    arc = torch.stack([angles.cos(), angles.sin(), torch.zeros(count, dtype=torch.float64)], 1)
    if shuffled:
        arc = arc[torch.randperm(count)]
    for wider, instances in ((1.03, 1), (1.01, 2)):
        grouping = instembed.group_on_sphere(arc, threshold=math.cos(wider * step))
        assert grouping.num_instances.item() == instances
        assert torch.equal(grouping.labels, by_scipy(arc, math.cos(wider * step)))


def test_spirals() -> None:
    """Two chains that wind about each other, tile by tile side by side."""
    t = torch.linspace(0, 6 * math.pi, 2000, dtype=torch.float64)
    height = torch.linspace(-0.9, 0.9, 2000, dtype=torch.float64)
    radius = (1 - height.square()).sqrt()
    spirals = [
        torch.stack([radius * (t + turn).cos(), radius * (t + turn).sin(), height], 1)
        for turn in (0, math.pi)
    ]
    points = torch.cat(spirals)[torch.randperm(4000)]
    grouping = instembed.group_on_sphere(points, threshold=math.cos(0.03))
    assert grouping.num_instances.item() == 2
    assert torch.equal(grouping.labels, by_scipy(points, math.cos(0.03)))


@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.3])
def test_low_thresholds(threshold: float) -> None:
    for channels in (2, 5):
        assert_matches_reference(torch.randn(200, channels), threshold=threshold)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert instembed.group_on_sphere(apart, threshold=-1).labels.tolist() == [1, 1, 1]
    assert instembed.group_on_sphere(apart[:2], threshold=-0.99).labels.tolist() == [1, 2]


def test_similarities_at_the_threshold_are_exact() -> None:
    """What float32 cannot tell from the threshold is multiplied in double."""
    points = normalize(torch.randn(400, 16), dim=1)
    x = points.double()
    similarities = (x @ x.T).triu(1)
    pairs = (similarities > 0.7).nonzero()
    assert len(pairs)
    for i, j in pairs[:40].tolist():
        two = points[[i, j]]
        y = unit_vectors(two).double()
        threshold = float(y[0] @ y[1])
        assert instembed.group_on_sphere(two, threshold=threshold - 1e-12).num_instances.item() == 1
        assert instembed.group_on_sphere(two, threshold=threshold + 1e-12).num_instances.item() == 2


@pytest.mark.parametrize("shape", [(2, 5, 70), (2, 5, 7, 11), (3, 4, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("leftovers", ["noise", "nearest"])
@pytest.mark.parametrize("min_size", [1, 3, 10, 10**6])
def test_images_masks_and_leftovers(shape: tuple[int, ...], leftovers: str, min_size: int) -> None:
    embeddings = torch.randn(shape, dtype=torch.float64)
    flags = torch.randint(0, 3, (shape[0], *shape[2:]))
    for mask in (None, flags, flags > 0, flags.to(torch.uint8)):
        options = {"threshold": 0.8, "mask": mask, "leftovers": leftovers, "min_size": min_size}
        grouping = assert_matches_reference(embeddings, **options)
        for b in range(shape[0]):
            sizes = grouping.labels[b].flatten().bincount(minlength=grouping.counts.shape[1] + 1)
            assert torch.equal(sizes[1:], grouping.counts[b])


def test_layouts() -> None:
    base = torch.randn(2, 8, 13, 17)
    for embeddings in (
        base.contiguous(memory_format=torch.channels_last),
        torch.randn(2, 8, 20, 30)[:, :, 3:16, 5:22],
        torch.randn(2, 8, 17, 13).transpose(2, 3),
        torch.randn(2, 8, 13, 1).expand(2, 8, 13, 17),
    ):
        mask = (torch.rand(2, 17, 13) < 0.8).transpose(1, 2)
        assert_matches_reference(embeddings, threshold=0.75, mask=mask)


def test_ragged_points() -> None:
    points, mask = directions(400, 5), torch.rand(400) < 0.7
    offsets = torch.tensor([0, 150, 150, 151, 400], dtype=torch.int32)
    assert_matches_reference(points, threshold=0.95, offsets=offsets, mask=mask)


def test_many_small_images(two_threads: None) -> None:
    assert_matches_reference(torch.randn(9, 4, 6, 7), threshold=0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types(dtype: torch.dtype) -> None:
    points = directions(300, 6, noise=0.01).to(dtype)
    grouping = assert_matches_reference(points, threshold=0.9)
    assert grouping.centers.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 1e-13, math.nan, math.inf, -math.inf])
def test_points_without_a_direction(value: float) -> None:
    points = directions(100, 4)
    points[10:20] = 0
    points[10:20, 2] = value
    grouping = instembed.group_on_sphere(points, threshold=0.9, leftovers="nearest")
    others = torch.ones(100, dtype=torch.bool)
    others[10:20] = False
    assert not grouping.labels[~others].any() and grouping.centers.isfinite().all()
    assert torch.equal(
        grouping.labels[others], instembed.group_on_sphere(points[others], threshold=0.9).labels
    )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_points(shape: tuple[int, ...]) -> None:
    grouping = assert_matches_reference(torch.zeros(shape), threshold=0.9)
    assert not grouping.num_instances.any()


def test_empty_mask_identical_and_antipodal_points() -> None:
    points = torch.randn(1, 6).expand(300, 6)
    mask = torch.zeros(300, dtype=torch.bool)
    assert not instembed.group_on_sphere(points, threshold=0.5, mask=mask).labels.any()
    assert (instembed.group_on_sphere(points, threshold=0.9999).labels == 1).all()
    both = torch.cat([points, -points])
    grouping = instembed.group_on_sphere(both, threshold=0.9)
    assert grouping.num_instances.tolist() == [2] and grouping.counts[:, :2].tolist() == [[300, 300]]
    together = instembed.group_on_sphere(both[299:301].double(), threshold=-1)  # a sum of zero
    assert together.counts[:, :1].tolist() == [[2]] and not together.centers.any()


def test_max_instances() -> None:
    points = torch.eye(5)
    grouping = instembed.group_on_sphere(points, threshold=0.9, max_instances=8)
    assert grouping.centers.shape == (1, 8, 5) and grouping.num_instances.tolist() == [5]
    assert torch.equal(grouping.centers[0, :5], points) and not grouping.centers[0, 5:].any()


@pytest.mark.cpu_only
@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_same_bits_on_any_number_of_threads(noise: float) -> None:
    points = directions(20_000, 8, 30, noise)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(instembed.group_on_sphere(points, threshold=0.97))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reads_off_converged_points() -> None:
    """What recurrent mean shift is for: each mode becomes one instance."""
    ids = torch.arange(900).remainder(6)
    points = torch.eye(6)[ids] + 0.1 * torch.randn(900, 6)
    moved = instembed.recurrent_mean_shift(points, 0.3, iterations=10)
    grouping = instembed.group_on_sphere(moved, threshold=math.cos(0.3))
    assert torch.equal(grouping.labels, ids + 1) and grouping.counts[:, :6].tolist() == [[150] * 6]


def test_memory_is_linear() -> None:
    """The graph of 100,000 points in two clusters would have 5 billion edges."""
    points = directions(100_000, 4, 2, 0.001)
    assert instembed.group_on_sphere(points, threshold=0.99).num_instances.item() <= 2


def test_has_no_gradient() -> None:
    grouping = instembed.group_on_sphere(torch.randn(20, 3, requires_grad=True), threshold=0.9)
    assert not any(output.requires_grad for output in grouping)
