"""Boxes, areas and centroids against their definition, over everything that labels may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import instembed
from instembed import LabelStatistics, reference
from instembed._arguments import INTEGER
from tests.comparing import as_on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

HUGE = torch.tensor([0, 7, 26005, 2**24 - 1, 2**62 + 1, -1, -(2**63), 2**63 - 1])


def assert_same(ours: LabelStatistics, expected: LabelStatistics) -> None:
    for name, a, b in zip(LabelStatistics._fields, as_on_cpu(ours, expected), expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), f"{name}: {a} instead of {b}"


def blobs(*shape: int, ids: int = 6) -> Tensor:
    """Labels with runs of many lengths."""
    coarse = torch.randint(0, ids, [(n + 3) // 4 for n in shape[1:]])
    for axis in range(coarse.dim()):
        coarse = coarse.repeat_interleave(4, axis)
    coarse = coarse[tuple(slice(n) for n in shape[1:])]
    return torch.where(torch.rand(shape) < 0.1, torch.randint(0, ids, shape), coarse)


def test_a_case_by_hand() -> None:
    labels = torch.tensor([[[0, 9, 9, 0], [0, 9, 0, 0], [0, 0, 0, -4]]])
    found = instembed.label_statistics(labels, max_instances=3)
    assert found.ids.tolist() == [[-4, 9, 0]]
    assert found.boxes.tolist() == [[[3, 2, 4, 3], [1, 0, 3, 2], [0, 0, 0, 0]]]
    assert found.areas.tolist() == [[1, 3, 0]]
    torch.testing.assert_close(found.centroids, torch.tensor([[[3, 2], [4 / 3, 1 / 3], [0, 0]]]))
    assert found.num_instances.tolist() == [2]


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
def test_equals_reference_for_every_dtype(dtype: torch.dtype) -> None:
    labels = blobs(3, 17, 29).to(dtype)
    assert_same(instembed.label_statistics(labels), reference.label_statistics(labels.cpu()))


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 9), (2, 70_000), (1, 1, 1), (2, 7, 1), (2, 1, 7), (2, 63, 65), (1, 300, 301), (2, 3, 5, 7),
     (1, 20, 41, 43), (2, 2, 5000), (3, 0, 4), (2, 4, 0), (0, 4, 5), (2, 0)],
    ids=str,
)  # fmt: skip
def test_equals_reference_for_every_shape(shape: tuple[int, ...]) -> None:
    labels = blobs(*shape)
    assert_same(instembed.label_statistics(labels), reference.label_statistics(labels.cpu()))


@pytest.mark.parametrize("background", [0, None, 26005, 2**63 - 1])
@pytest.mark.parametrize("ignore_index", [None, 0, -1])
def test_ids_of_any_value(background: int | None, ignore_index: int | None) -> None:
    ids = blobs(2, 33, 40, ids=len(HUGE))
    labels = HUGE.to(ids.device)[ids]
    options = {"background": background, "ignore_index": ignore_index}
    assert_same(
        instembed.label_statistics(labels, **options), reference.label_statistics(labels.cpu(), **options)
    )


def test_unsigned_ids_keep_their_bits() -> None:
    labels = torch.tensor([[[2**63 + 5, 1, 0]]], dtype=torch.uint64)
    assert instembed.label_statistics(labels, max_instances=2).ids.tolist() == [[5 - 2**63, 1]]


def test_more_ids_than_pixels_a_chunk() -> None:
    labels = torch.randperm(50_000).reshape(1, 200, 250)
    found = instembed.label_statistics(labels, max_instances=49_999)
    place = labels.flatten().argsort()[1:]  # without the background
    assert found.ids[0].tolist() == list(range(1, 50_000))
    assert torch.equal(found.boxes[0, :, :2], torch.stack([place % 250, place // 250], 1).float())
    assert (found.areas == 1).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(1, 2),
        lambda t: t[:, ::2, 1::3],
        lambda t: t[:, :, :1].expand(-1, -1, 50),
        lambda t: t[::2],
        lambda t: t.flip(2),
        lambda t: t[:, 3:, 5:-2],
    ],
)
def test_strided_labels(view) -> None:
    labels = view(blobs(3, 40, 37))
    assert_same(instembed.label_statistics(labels), reference.label_statistics(labels.cpu().contiguous()))


@pytest.mark.cpu_only
def test_same_bits_for_any_number_of_threads(two_threads) -> None:
    labels = blobs(2, 300, 500, ids=40)
    both = instembed.label_statistics(labels)
    torch.set_num_threads(1)
    assert_same(instembed.label_statistics(labels), both)
    assert_same(both, reference.label_statistics(labels.cpu()))


def test_capacity(each_device: str, overflow_checks: None) -> None:
    labels = blobs(2, 20, 20, ids=5)
    rows, found = (4, "4") if each_device == "cpu" else (64, "more")
    assert instembed.label_statistics(labels).ids.shape == (2, rows)
    padded = instembed.label_statistics(labels, max_instances=9)
    assert_same(padded, reference.label_statistics(labels.cpu(), max_instances=9))
    assert padded.boxes.shape == (2, 9, 4)
    with pytest.raises(ValueError, match=f"max_instances=3 .* {found} instances"):
        instembed.label_statistics(labels, max_instances=3)


def test_rows_of_a_grouping() -> None:
    embeddings = torch.zeros(1, 2, 6, 8)
    embeddings[:, 0, :, 4:] = 10
    grouping = instembed.mean_shift(embeddings, 1.0)
    found = instembed.label_statistics(grouping.labels)
    assert torch.equal(found.areas[:, :2], grouping.counts[:, :2])
    assert found.boxes[:, :2].tolist() == [[[0, 0, 4, 6], [4, 0, 8, 6]]]


def test_compiles_into_one_graph() -> None:
    labels = blobs(2, 9, 11)
    compiled = torch.compile(
        lambda t: instembed.label_statistics(t, max_instances=8), fullgraph=True, backend="eager"
    )
    assert_same(LabelStatistics(*compiled(labels)), reference.label_statistics(labels.cpu(), max_instances=8))


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), min_size=2, max_size=4),
    dtype=st.sampled_from(INTEGER),
    seed=st.integers(0, 2**16),
    background=st.sampled_from([None, 0, 1, 255]),
    step=st.integers(1, 3),
)
def test_random_labels(
    shape: list[int], dtype: torch.dtype, seed: int, background: int | None, step: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-3, 5, shape, generator=generator).to(dtype)[..., ::step]
    assert_same(
        instembed.label_statistics(labels, background=background),
        reference.label_statistics(labels.cpu().contiguous(), background=background),
    )
