"""The choice of seeds and the instances that grow from them, against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import instembed
from benchmarks.workloads import ellipses, trained_embeddings
from instembed import SeededGrouping, Seeds, reference
from tests.comparing import on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def scene(
    height: int = 37, width: int = 53, channels: int = 6, images: int = 2, kind: str = "trained"
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels, and random seediness (B, 4, 3, H, W)."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.stack([ellipses((height, width), 6, generator) for _ in range(images)])
    if kind == "noise":
        embeddings = 0.5 * torch.randn(images, channels, height, width, generator=generator)
    else:
        embeddings = trained_embeddings(labels, channels, rough=kind == "rough")
    seediness = torch.randn(images, 4, 3, height, width, generator=generator).softmax(2)
    return embeddings, labels, seediness


def strength(seediness: Tensor) -> Tensor:
    return seediness[:, :, 1:].amax((1, 2))


def check_seeds(embeddings: Tensor, seediness: Tensor, num_seeds: int, **options: object) -> Seeds:
    found = instembed.select_seeds(embeddings, seediness, num_seeds, **options)
    expected = reference.select_seeds(*on_cpu((embeddings, seediness)), num_seeds, **on_cpu(options))
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.equal(found.scores.cpu(), expected.scores)
    return found


def check_grown(embeddings: Tensor, seediness: Tensor, **options: object) -> SeededGrouping:
    found = instembed.grow_seeds(embeddings, seediness, **options)
    expected = reference.grow_seeds(*on_cpu((embeddings, seediness)), **on_cpu(options))
    for name, value in on_cpu(found)._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=0, atol=0, msg=name)
    return found


# Seeds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "rough", "noise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seeds_equal_the_greedy_rule(dtype: torch.dtype, kind: str) -> None:
    for channels in (1, 3, 8, 33):
        embeddings, labels, seediness = scene(channels=channels, kind=kind)
        for diversity in (0.0, 0.3, 4.0):
            values = strength(seediness).to(dtype)
            check_seeds(embeddings.to(dtype), values, 25, diversity=diversity, mask=labels > 0)
    check_seeds(embeddings.to(dtype), strength(seediness).double(), 25, min_seediness=0.8)


@pytest.mark.parametrize("shape", [(1,), (17,), (1000,), (1, 1), (31, 33), (64, 64), (3, 5, 9)])
def test_seeds_sizes_and_layouts(shape: tuple[int, ...]) -> None:
    embeddings, seediness = torch.randn(2, 5, *shape), torch.rand(2, *shape)
    found = check_seeds(embeddings, seediness, 20)
    last = embeddings.movedim(1, -1).contiguous().movedim(-1, 1)
    gaps = torch.stack([embeddings, embeddings], -1).flatten(-2)[..., ::2]
    strided = torch.stack([seediness, seediness], -1).flatten(-2)[..., ::2]
    for other, values in ((last, seediness), (gaps, seediness), (embeddings, strided)):
        assert torch.equal(instembed.select_seeds(other, values, 20).indices, found.indices)


def test_ties_go_to_the_lowest_index() -> None:
    """Two embeddings at many pixels, equal seediness: everything is a tie."""
    embeddings = torch.zeros(1, 2, 40, 40)
    embeddings[:, 0, 17, 5:] = 3.0
    embeddings[:, 1, 30:] = 3.0
    seediness = torch.full((1, 40, 40), 0.5)
    assert check_seeds(embeddings, seediness, 9).indices[0, :4].tolist() == [0, 17 * 40 + 5, 30 * 40, -1]
    grid = torch.randint(0, 4, (2, 3, 40, 40)).float()
    values = torch.randint(1, 4, (2, 40, 40)) / 4
    for diversity in (0.0, 0.3):
        check_seeds(grid, values, 80, diversity=diversity)
    if not grid.is_cuda:  # whose logarithms differ in the last bits, by which sums of them tie or not
        check_seeds(grid, values, 80, diversity=1.0)


def test_more_seeds_than_pixels() -> None:
    embeddings, _, seediness = scene(3, 4)
    found = check_seeds(embeddings, strength(seediness), 30)
    assert (found.indices >= 0).sum(1).tolist() == [12, 12]
    assert found.indices[0, :12].unique().numel() == 12 and not found.scores[:, 12:].any()


def test_nothing_to_choose() -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0)):
        found = check_seeds(torch.zeros(shape), torch.zeros(shape[0], *shape[2:]), 3)
        assert found.indices.shape == (shape[0], 3)
    embeddings, labels, seediness = scene()
    assert (check_seeds(embeddings, strength(seediness), 3, mask=0 * labels).indices == -1).all()
    assert (check_seeds(embeddings, 0 * strength(seediness), 3).indices == -1).all()
    assert (check_seeds(embeddings, strength(seediness), 3, min_seediness=2.0).indices == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_is_never_chosen(dtype: torch.dtype) -> None:
    embeddings, _, seediness = scene(20, 20, kind="noise")
    values = strength(seediness).to(dtype)
    strange = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0], dtype=dtype)
    bad = torch.rand(values.shape) < 0.3
    values[bad] = strange[torch.randint(0, 5, (int(bad.sum()),))]
    lost = torch.rand(values.shape) < 0.2
    embeddings = embeddings.to(dtype).movedim(1, -1).clone()
    embeddings[lost, 2] = strange[torch.randint(0, 3, (int(lost.sum()),))]
    found = check_seeds(embeddings.movedim(-1, 1), values, 500)
    for b in range(2):
        chosen = found.indices[b][found.indices[b] >= 0]
        assert len(chosen) and not (bad | lost)[b].flatten()[chosen].any()
    assert (check_seeds(embeddings.movedim(-1, 1), values * math.nan, 5).indices == -1).all()


@pytest.mark.parametrize("scale", [1e-160, 1e-30, 1e30, 1e160])
def test_seeds_of_any_scale(scale: float) -> None:
    """Squares that leave the range of normal numbers included."""
    embeddings, _, seediness = scene(20, 20, kind="noise")
    check_seeds(scale * embeddings.double(), strength(seediness).double(), 40)
    check_seeds(embeddings.double(), (strength(seediness).double() * scale), 40)
    check_seeds(embeddings, strength(seediness), 40, diversity=1e-3)


@pytest.mark.cpu_only
def test_seeds_same_bits_whatever_the_threads(two_threads: None) -> None:
    for kind in ("rough", "noise"):
        embeddings, _, seediness = scene(150, 201, 8, kind=kind)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(instembed.select_seeds(embeddings, strength(seediness), 60))
            found.append(instembed.select_seeds(embeddings[:1], strength(seediness)[:1], 60))
        for k in (2, 4):
            assert torch.equal(found[k].indices, found[0].indices)
            assert torch.equal(found[k + 1].indices, found[1].indices)


# Instances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trained", "rough", "noise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instances_equal_the_definition(dtype: torch.dtype, kind: str) -> None:
    for channels in (2, 8, 33):
        embeddings, labels, seediness = scene(channels=channels, kind=kind)
        embeddings = 0.5 * embeddings.to(dtype)
        check_grown(embeddings, seediness, min_size=4)
        check_grown(embeddings, seediness.to(dtype), overlap=1.0, num_seeds=30, mask=labels > 0)
        check_grown(embeddings, seediness, overlap=0.0, min_seediness=0.7, min_size=30)


@pytest.mark.parametrize("shape", [(1,), (17,), (1000,), (1, 1), (31, 33), (3, 5, 9)])
def test_instances_sizes_and_layouts(shape: tuple[int, ...]) -> None:
    embeddings, seediness = torch.randn(2, 5, *shape), torch.rand(2, 4, 3, *shape)
    mask = torch.randint(0, 3, (2, *shape))
    found = check_grown(embeddings, seediness, mask=mask, overlap=0.9)
    last = embeddings.movedim(1, -1).contiguous().movedim(-1, 1)
    gaps = torch.stack([embeddings, embeddings], -1).flatten(-2)[..., ::2]
    for other in (last, gaps):
        again = instembed.grow_seeds(other, seediness, mask=mask, overlap=0.9)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_ties_between_accepted_seeds_go_to_the_better_one() -> None:
    """Points on a grid lie halfway between seeds."""
    for _ in range(5):
        embeddings = torch.randint(0, 5, (2, 2, 24, 24)) * 0.5
        seediness = torch.rand(2, 2, 2, 24, 24)
        check_grown(embeddings, seediness, thresholds=(0.3, 0.6), overlap=1.0)
        check_grown(embeddings.double() + 1e3, seediness, thresholds=(0.3, 0.6), overlap=0.8)


def test_instances_that_keep_too_little_are_given_up() -> None:
    """In a row of seeds on a line, the one between two better ones is left with nothing but itself."""
    embeddings = torch.cat([torch.full((30,), v) for v in (0.0, 1.0)] + [torch.tensor([0.5])])[None, None]
    seediness = torch.zeros(1, 1, 2, 61)
    seediness[0, 0, 1, [0, 30, 60]] = torch.tensor([0.9, 0.8, 0.7])
    found = check_grown(embeddings, seediness, thresholds=(0.7,), overlap=1.0)
    assert found.counts[0, :3].tolist() == [30, 30, 1]
    found = check_grown(embeddings, seediness, thresholds=(0.7,), overlap=1.0, min_size=2)
    assert found.num_instances.item() == 2 and found.counts[0, :2].tolist() == [31, 30]


def test_trained_embeddings_give_back_the_instances() -> None:
    """A good head: seediness high in instances, of the class of their parity, low on the background."""
    embeddings, labels, _ = scene(90, 120, 8)
    classes = labels % 2 + 1
    seediness = torch.zeros(2, 4, 3, 90, 120)
    seediness.scatter_(2, torch.where(labels > 0, classes, 0)[:, None, None].expand(-1, 4, -1, -1, -1), 0.9)
    seediness *= torch.tensor([1.0, 0.9, 0.8, 0.7]).view(4, 1, 1, 1)
    found = check_grown(embeddings, seediness, num_seeds=40)
    for b in range(2):
        pairs = torch.stack([labels[b], found.labels[b]]).flatten(1).unique(dim=1)
        assert pairs.shape[1] == len(labels[b].unique()) == found.num_instances[b] + 1
        for truth, label in pairs.t().tolist():
            assert (truth == 0) == (label == 0)
            assert label == 0 or found.classes[b, label - 1] == truth % 2 + 1


def test_scores_rank_detections() -> None:
    embeddings, _, seediness = scene(kind="rough")
    found = instembed.grow_seeds(embeddings, seediness)
    for b, image in enumerate(instembed.detections(found, rle=True)):
        number = int(found.num_instances[b])
        assert number > 1 and len(image["scores"]) == number
        assert torch.equal(image["scores"], found.scores[b, :number])
        assert torch.equal(image["labels"], found.classes[b, :number])
        assert (image["scores"].diff() <= 0).all()
        assert torch.equal(image["masks"].sum((1, 2)), found.counts[b, :number])
    chosen = instembed.detections(found, scores=0 * found.scores)
    assert not chosen[0]["scores"].any() and torch.equal(
        chosen[0]["labels"], found.classes[0, : int(found.num_instances[0])]
    )


def test_not_finite_pixels_are_background() -> None:
    embeddings, _, seediness = scene(20, 20)
    embeddings[:, 1, ::3] = math.nan
    embeddings[:, 0, 1::3] = math.inf
    seediness[:, 2, 1, :, :10] = math.nan
    found = check_grown(embeddings, seediness)
    assert found.num_instances.all() and not found.labels[:, ::3].any() and not found.labels[:, 1::3].any()
    assert (found.seeds[found.seeds >= 0] % 20 >= 10).all()
    assert not check_grown(embeddings * math.nan, seediness).num_instances.any()


def test_nothing_to_grow() -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0)):
        found = check_grown(torch.zeros(shape), torch.zeros(shape[0], 4, 2, *shape[2:]))
        assert found.centers.shape == (shape[0], 100, 3)
    embeddings, labels, seediness = scene()
    for mask in (0 * labels, labels < 0):
        found = check_grown(embeddings, seediness, mask=mask)
        assert not found.labels.any() and not found.num_instances.any() and (found.seeds == -1).all()


def test_one_instance() -> None:
    found = check_grown(torch.zeros(1, 2, 9, 9), torch.rand(1, 4, 2, 9, 9), num_seeds=7)
    assert found.num_instances.item() == 1 and (found.labels == 1).all() and found.counts[0, 0] == 81


@pytest.mark.cpu_only
def test_instances_same_bits_whatever_the_threads(two_threads: None) -> None:
    for kind in ("rough", "noise"):
        embeddings, _, seediness = scene(150, 201, 8, kind=kind)
        for images in (slice(0, 1), slice(0, 2)):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(instembed.grow_seeds(embeddings[images], seediness[images], overlap=0.9))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_gradient() -> None:
    embeddings, _, seediness = scene(9, 11)
    found = instembed.grow_seeds(embeddings.requires_grad_(), seediness.requires_grad_())
    assert not any(output.requires_grad for output in found)


def test_compile() -> None:
    def grouped(embeddings: Tensor, seediness: Tensor) -> Tensor:
        found = instembed.grow_seeds(2 * embeddings, seediness.softmax(2), num_seeds=9)
        return found.labels + found.classes.sum() + found.seeds.sum()

    embeddings, _, seediness = scene(12, 20)
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(embeddings, seediness), grouped(embeddings, seediness))
