"""The loss over pairs of pixels: values and gradients of the definition, for any finite input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import instembed
from benchmarks.workloads import ellipses, trained_embeddings
from instembed import reference
from tests.comparing import assert_close, assert_compiles

pytestmark = pytest.mark.usefixtures("each_device")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-6, 2e-6)}  # of values, of gradients


def scene(channels: int = 6, kind: str = "noise", size: tuple[int, ...] = (37, 53)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.stack([ellipses(size, 9, generator) for _ in range(2)])
    if kind == "trained":
        return trained_embeddings(labels, channels), labels
    scale, shift = {"noise": (0.5, 0.0), "near": (0.003, 0.0), "away": (0.5, 300.0)}[kind]
    return shift + scale * torch.randn(2, channels, *size, generator=generator), labels


def check(embeddings: Tensor, labels: Tensor, **options: object) -> Tensor:
    """Our loss and its gradient, which are the definition's in float64, on the same device: each draws random
    numbers of its own. Returns the gradient."""
    ours = embeddings.detach().requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    with_seed = {"generator": torch.Generator(embeddings.device).manual_seed(4)}
    loss = instembed.pairwise_similarity_loss(ours, labels, **options, **with_seed)
    with_seed["generator"].manual_seed(4)
    expected = reference.pairwise_similarity_loss(exact, labels, **options, **with_seed)
    value, gradient = TOLERANCE.get(embeddings.dtype, (1e-6, 1e-2))
    assert loss.dtype == (torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    # A pair that is far costs exp(-d): an error of d by a part in a million is d times that of the cost. And
    # float32 has no numbers below 1e-38.
    condition = max(1.0, -math.log(max(expected.max().item(), 1e-300))) if expected.numel() else 1.0
    least = 0.0 if embeddings.dtype == torch.float64 else 1e-30
    assert_close(loss, expected, condition * value, least)
    weights = torch.arange(1, 1 + loss.numel()).view(loss.shape)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad.dtype == embeddings.dtype
    if embeddings.dtype in (torch.float16, torch.bfloat16):  # the gradient is rounded to the type
        least = torch.finfo(embeddings.dtype).tiny / gradient
    else:
        gradient *= condition
    assert_close(ours.grad, exact.grad, gradient, least)
    with_seed["generator"].manual_seed(4)
    with torch.no_grad():
        assert torch.equal(instembed.pairwise_similarity_loss(ours, labels, **options, **with_seed), loss)
    return ours.grad


@pytest.mark.parametrize("kind", ["noise", "near", "away", "trained"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_definition(dtype: torch.dtype, kind: str) -> None:
    for channels in (1, 2, 8, 17, 64):
        embeddings, labels = scene(channels, kind)
        for samples in (1, 3, 16, 50):
            check(embeddings.to(dtype), labels, samples=samples)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(reduction: str) -> None:
    embeddings, labels = scene()
    for options in (
        {"background": None},
        {"background": 3, "ignore_index": 0},
        {"max_instances": 30},
        {"samples": 2},
    ):
        check(embeddings, labels, reduction=reduction, **options)


@pytest.mark.parametrize("shape", [(1,), (17,), (1, 1), (31, 33), (7, 300), (3, 5, 9)])
def test_sizes_and_layouts(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 4, (2, *shape))
    embeddings = torch.randn(2, 5, *shape)
    expected = check(embeddings, labels, samples=7)
    last = embeddings.movedim(1, -1).contiguous().movedim(-1, 1)  # channels-last, for every rank
    gaps = torch.stack([embeddings, embeddings], -1).flatten(-2)[..., ::2]
    for other in (last, gaps, embeddings.transpose(0, -1).contiguous().transpose(0, -1)):
        torch.testing.assert_close(check(other, labels, samples=7), expected)


def test_many_points_and_ranges() -> None:
    """More tiles than a task takes, and an image of none."""
    labels = torch.arange(40).repeat_interleave(60).view(1, 40, 60).repeat(3, 1, 1)
    labels[1] = 0
    labels[2, 5:] = 0
    for dtype in (torch.float32, torch.float64):
        check(0.5 * torch.randn(3, 9, 40, 60, dtype=dtype), labels, samples=37)


def test_points_and_offsets() -> None:
    labels = torch.randint(0, 4, (500,))
    embeddings = torch.randn(500, 6)
    check(embeddings, labels)
    offsets = torch.tensor([0, 100, 100, 101, 500])
    for reduction in ("mean", "none"):
        check(embeddings, labels, offsets=offsets, samples=9, reduction=reduction)
    check(embeddings.t().contiguous().t(), labels, offsets=offsets)


def test_labels_of_any_kind() -> None:
    embeddings, labels = scene()
    expected = check(embeddings, labels)
    assert torch.equal(check(embeddings, labels.to(torch.uint8)), expected)
    assert torch.equal(check(embeddings, labels * (2**62 // 10)), expected)


def test_by_hand() -> None:
    """Two pixels of one instance at d = 0.7, one of another at d = 0.4 from both."""
    labels = torch.tensor([[1, 1, 2]])
    half, height = math.sqrt(0.7) / 2, math.sqrt(0.4 - 0.7 / 4)
    embeddings = torch.tensor([[[-half, half, 0.0], [0.0, 0.0, height]]], dtype=torch.float64)
    same = -math.log(2 / (1 + math.exp(0.7)))
    different = -math.log(1 - 2 / (1 + math.exp(0.4)))
    expected = (same / 4 + 2 * different / 2) / (1 / 4 + 2 / 2)
    assert instembed.pairwise_similarity_loss(embeddings, labels).item() == pytest.approx(expected, rel=1e-12)


def test_every_two_instances_count_alike() -> None:
    """A large instance, a small one and one of a single pixel, each at one place: distances alone decide."""
    labels = torch.tensor([[1] * 50 + [2] * 3 + [3]])
    places = torch.tensor([0.0, 0.3, 1.1], dtype=torch.float64)
    loss = instembed.pairwise_similarity_loss(places[labels - 1][:, None], labels)
    pairs = [-math.log(math.tanh(d**2 / 2)) for d in (0.3, 1.1, 0.8)]
    inside = sum((n - 1) / (2 * n) for n in (16, 3, 1))
    assert loss.item() == pytest.approx(sum(pairs) / (3 + inside), rel=1e-12)


def test_without_pairs_is_zero_and_attached() -> None:
    for shape in ((2, 3, 4, 5), (0, 3, 4, 5), (2, 3, 0, 5)):
        for labels in (torch.zeros(shape[0], *shape[2:]).long(), torch.full((shape[0], *shape[2:]), 255)):
            embeddings = torch.randn(shape, requires_grad=True)
            loss = instembed.pairwise_similarity_loss(embeddings, labels, ignore_index=255)
            loss.backward()
            assert loss.item() == 0 and not embeddings.grad.any()
    single = torch.zeros(1, 4, 5, dtype=torch.int64)
    single[0, 2, 2] = 9
    assert not check(torch.randn(1, 3, 4, 5), single).any()
    check(torch.randn(1, 3, 4, 5), single + 7)


NUMBERS = st.sampled_from(
    [0.0, -0.0, 1e-45, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 9.0, 13.0, 1e3, 1e8, 1e14, 1e16, 1e30, 3e38]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(NUMBERS, st.booleans()), min_size=24, max_size=24),
    st.lists(st.integers(1, 4), min_size=8, max_size=8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_finite_for_any_finite_embeddings(
    numbers: list[tuple[float, bool]], ids: list[int], dtype: torch.dtype
) -> None:
    values = torch.tensor([-x if minus else x for x, minus in numbers], dtype=torch.float64)
    embeddings = values.view(1, 3, 8).clamp(-3e38, 3e38).to(dtype).requires_grad_()
    assert embeddings.isfinite().all()
    loss = instembed.pairwise_similarity_loss(embeddings, torch.tensor([ids]), samples=8)
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()
    exact = embeddings.detach().cpu().double().requires_grad_()
    expected = reference.pairwise_similarity_loss(exact, torch.tensor([ids]).cpu(), samples=8)
    expected.backward()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    if dtype != torch.bfloat16:  # up to the rounding of what cancels, and of what float32 cannot hold
        scale = exact.detach().abs().max().clamp(max=1e15) + exact.grad.abs().max()
        atol = 1e-5 * scale.item() + 1e-30
        torch.testing.assert_close(embeddings.grad.cpu().double(), exact.grad, rtol=0, atol=atol)


def test_largest_numbers_of_each_type() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for size in (torch.finfo(dtype).max, 1e4 * torch.finfo(dtype).tiny):
            embeddings = torch.zeros(1, 2, 6, dtype=dtype)
            embeddings[0, 0] = torch.tensor([size, -size, size, 0, -size, size], dtype=dtype)
            assert check(embeddings, torch.tensor([[1, 1, 2, 2, 3, 3]])).isfinite().all()


def test_not_finite_embeddings_show() -> None:
    embeddings, labels = scene()
    for value in (math.nan, math.inf):
        bad = embeddings.clone()
        bad[0, 2][labels[0] == 1] = value
        bad[1, 2][labels[1] == 0] = value  # nobody looks there
        losses = instembed.pairwise_similarity_loss(bad, labels, reduction="none")
        assert losses[0].isnan() and losses[1].isfinite()


@pytest.mark.parametrize("samples", [2, 9])
def test_gradcheck(samples: int) -> None:
    embeddings, labels = scene(3, size=(6, 7))
    generator = torch.Generator(labels.device)

    def loss(values: Tensor) -> Tensor:
        return instembed.pairwise_similarity_loss(
            values, labels, samples=samples, reduction="none", generator=generator.manual_seed(1)
        )

    torch.autograd.gradcheck(loss, embeddings.double().requires_grad_())


def test_second_derivative_is_refused() -> None:
    embeddings, labels = scene()
    embeddings.requires_grad_()
    loss = instembed.pairwise_similarity_loss(embeddings, labels)
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.pairwise_similarity_loss"):
        gradient.sum().backward()


@pytest.mark.cpu_only
def test_same_bits_whatever_the_threads(two_threads: None) -> None:
    labels = torch.arange(50).repeat_interleave(40).view(1, 50, 40).repeat(2, 1, 1)
    embeddings = 0.3 * torch.randn(2, 20, 50, 40)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = embeddings.clone().requires_grad_()
        loss = instembed.pairwise_similarity_loss(leaf, labels, generator=torch.Generator().manual_seed(0))
        loss.backward()
        found.append((loss, leaf.grad))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("capacity", [None, 12])
def test_compiles(capacity: int | None) -> None:
    embeddings, labels = scene(5, size=(12, 20))

    def step(values: Tensor) -> Tensor:
        return instembed.pairwise_similarity_loss(2 * values, labels, max_instances=capacity)

    assert_compiles(step, embeddings)


def test_module() -> None:
    embeddings, labels = scene()
    module = instembed.PairwiseSimilarityLoss(samples=5, background=None, reduction="sum")
    seeded = torch.Generator(embeddings.device).manual_seed
    expected = instembed.pairwise_similarity_loss(
        embeddings, labels, samples=5, background=None, reduction="sum", generator=seeded(3)
    )
    assert torch.equal(module(embeddings, labels, generator=seeded(3)), expected)
    assert "samples=5" in repr(module)
    with pytest.raises(ValueError, match=r"samples .* 0"):
        instembed.PairwiseSimilarityLoss(samples=0)
    with pytest.raises(ValueError, match=r"reduction .* 'max'"):
        instembed.PairwiseSimilarityLoss(reduction="max")


def test_learns_to_tell_instances_apart() -> None:
    _, labels = scene()
    free = (0.1 * torch.randn(2, 8, *labels.shape[1:])).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(300):
        loss = instembed.pairwise_similarity_loss(free, labels, samples=64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
