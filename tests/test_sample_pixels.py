"""Sampled pixels: the definition's, uniform, and the same from the same generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from benchmarks.workloads import ellipses
from instembed import reference
from tests.comparing import assert_compiles

pytestmark = pytest.mark.usefixtures("each_device")


def seeded(seed: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def check(labels: Tensor, samples: int, **options: object) -> Tensor:
    """Our indices, which are the definition's, on the same device: each draws random numbers of its own. Rows
    that a GPU has beyond an image's instances are cut off."""
    device = labels.device
    indices, valid = instembed.sample_pixels(labels, samples, generator=seeded(0, device), **options)
    assert torch.equal(valid, indices >= 0)
    expected, _ = reference.sample_pixels(labels, samples, generator=seeded(0, device), **options)
    if device.type != "cpu":
        assert not valid[:, expected.shape[1] :].any()
        indices = indices[:, : expected.shape[1]]
    assert torch.equal(indices, expected)
    return indices


def scene(*size: int, images: int = 2) -> Tensor:
    return torch.stack([ellipses(size, 8, seeded(b)) for b in range(images)])


@pytest.mark.parametrize("samples", [1, 3, 16, 500])
@pytest.mark.parametrize("size", [(1,), (1000,), (31, 33), (1, 1), (3, 5, 9), (40, 2000)])
def test_equals_the_definition(size: tuple[int, ...], samples: int) -> None:
    labels = torch.randint(0, 5, (2, *size))
    expected = check(labels, samples)
    check(labels.sort(-1).values, samples)
    strided = torch.stack([labels, labels], -1).flatten(-2)[..., ::2]
    assert torch.equal(check(strided, samples), expected)


@pytest.mark.parametrize(
    "options", [{}, {"background": None}, {"background": 3, "ignore_index": 0}, {"max_instances": 11}]
)
def test_options(options: dict[str, int | None]) -> None:
    labels = scene(60, 70)
    indices = check(labels, 5, **options)
    for b, ids in enumerate(labels.flatten(1)):
        found = ids[indices[b].clamp(min=0)]
        assert all(len(row[chosen >= 0].unique()) <= 1 for row, chosen in zip(found, indices[b], strict=True))
        left_out = options.get("background", 0), options.get("ignore_index")
        expected = [k for k in ids.unique().tolist() if k not in left_out]
        assert found[:, 0][indices[b, :, 0] >= 0].tolist() == expected


def test_labels_of_any_kind() -> None:
    labels = scene(60, 70)
    expected = check(labels, 5)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(check(labels.to(dtype), 5), expected)
    assert torch.equal(check(labels * (2**62 // 10), 5), expected)
    check(torch.where(labels > 0, labels * (2**62 // 10) * (1 - 2 * (labels % 2)), 0), 5)
    check(torch.randint(0, 3000, (2, 90, 100)), 3, max_instances=2999)  # runs of one pixel


def test_small_instances_give_all_their_pixels() -> None:
    labels = torch.tensor([[7, 0, 3, 3, 7, 7, 3, 0]])
    indices = check(labels, 3)
    assert indices.tolist() == [[[2, 3, 6], [0, 4, 5]]]
    assert check(labels, 5).tolist() == [[[2, 3, 6, -1, -1], [0, 4, 5, -1, -1]]]


def test_points_and_offsets() -> None:
    labels = torch.randint(0, 4, (500,))
    whole = check(labels, 4)
    assert whole.shape == (1, 3, 4)
    offsets = torch.tensor([0, 100, 100, 101, 500])
    indices = check(labels, 4, offsets=offsets)
    for b in range(4):
        chosen = indices[b][indices[b] >= 0]
        assert ((chosen >= offsets[b]) & (chosen < offsets[b + 1])).all()


def test_nothing() -> None:
    assert check(torch.zeros(2, 5, 6, dtype=torch.int64), 3).shape == (2, 0, 3)
    assert check(torch.zeros(0, 5, 6, dtype=torch.int64), 3).shape == (0, 0, 3)
    assert check(torch.zeros(2, 0, 6, dtype=torch.int64), 3).shape == (2, 0, 3)
    assert check(torch.full((2, 5), 255), 3, ignore_index=255, max_instances=4).unique().tolist() == [-1]
    assert check(torch.zeros(0, dtype=torch.int64), 3).shape == (1, 0, 3)


def test_every_pixel_and_every_pair_is_as_likely() -> None:
    """Chi-square of how often each pixel is drawn, and each two together, over many draws."""
    draws, pixels, samples = 4000, 12, 5
    labels = torch.ones(draws, 3 * pixels, dtype=torch.int64)
    labels[:, ::3] = 2  # the pixels of interest lie between others
    indices = instembed.sample_pixels(labels, samples, generator=seeded(5, labels.device)).indices[:, 1] // 3
    drawn = torch.zeros(draws, pixels).scatter(1, indices, 1.0)
    assert drawn.sum(1).unique().tolist() == [samples]  # without replacement

    # Counts of pixels drawn without replacement have (pixels - 1) degrees of freedom after scaling.
    share = samples / pixels
    singles = drawn.sum(0)
    variance = draws * share * (1 - share) * pixels / (pixels - 1)
    assert ((singles - draws * share).square().sum() / variance) < 31.3  # 0.1 % of 11 degrees
    pairs = (drawn.T @ drawn)[tuple(torch.triu_indices(pixels, pixels, 1, device=drawn.device))]
    both = share * (samples - 1) / (pixels - 1)
    assert ((pairs - draws * both).square() / (draws * both * (1 - both))).sum() < 1.6 * len(pairs)


def test_large_instances_are_sampled_uniformly() -> None:
    """Of those that are cut into several tasks, in 20 bins."""
    pixels, samples, images = 100_000, 1000, 20
    labels = torch.ones(images, pixels, dtype=torch.int64)
    options = {"generator": seeded(2, labels.device), "max_instances": 1}
    indices = instembed.sample_pixels(labels, samples, **options).indices
    counts = torch.bincount((indices // (pixels // 20)).flatten(), minlength=20).double()
    expected = images * samples / 20
    assert ((counts - expected).square() / expected).sum() < 43.8  # 0.1 % of 19 degrees of freedom


def test_too_few_candidates_are_collected_again() -> None:
    """The first guess of how small the smallest keys are fails now and then in so many instances."""
    labels = torch.arange(20_000).repeat_interleave(60).view(1, -1)
    options = {"background": None, "max_instances": 20_000}
    indices = instembed.sample_pixels(labels, 1, generator=seeded(0, labels.device), **options).indices
    assert torch.equal(indices[0, :, 0] // 60, torch.arange(20_000))
    check(labels[:, :120_000], 1, background=None)


def test_generator_decides() -> None:
    labels = scene(60, 70)
    first, again, other = (
        instembed.sample_pixels(labels, 5, generator=seeded(seed, labels.device)).indices
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(3)
    first = instembed.sample_pixels(labels, 5).indices
    assert not torch.equal(first, instembed.sample_pixels(labels, 5).indices)
    torch.manual_seed(3)
    assert torch.equal(first, instembed.sample_pixels(labels, 5).indices)
    same = instembed.sample_pixels(labels[:1].expand(2, -1, -1), 5).indices
    assert not torch.equal(same[0], same[1])  # images have words of their own


@pytest.mark.cpu_only
def test_same_bits_whatever_the_threads(two_threads: None) -> None:
    for labels in (scene(300, 400), torch.randint(0, 2000, (2, 300, 400))):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(instembed.sample_pixels(labels, 7, generator=seeded()).indices)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("capacity", [None, 9])
def test_compiles(capacity: int | None) -> None:
    labels = scene(20, 30)

    def step(values: Tensor) -> Tensor:
        indices, valid = instembed.sample_pixels(labels, 4, max_instances=capacity)
        return (values.flatten(1).gather(1, indices.flatten(1).clamp(min=0)) * valid.flatten(1)).sum()

    assert_compiles(step, torch.randn(2, 20, 30))
