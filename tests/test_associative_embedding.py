"""Associative embedding against its float64 reference, and everything autograd asks of an op."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import instembed
from instembed import reference
from instembed._native import core
from tests.comparing import assert_close, assert_compiles, on_cpu
from tests.layouts import layouts

pytestmark = pytest.mark.usefixtures("each_device")

# Relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}

OPTIONS = [
    {},
    {"kind": "hinge"},
    {"kind": "hinge", "margin": 0.1, "pull_weight": 2.0, "push_weight": 2.0, "reduction": "sum"},
    {"sigma": 3.0, "push_weight": 0.5},
    {"sigma": 0.05},
    {"pull_weight": 0.0, "push_weight": -1.0},
]

People = tuple[Tensor, Tensor, Tensor]  # tags, keypoints, visible


def people(
    images: int = 2,
    count: int = 5,
    joints: int = 4,
    dimensions: int = 1,
    size: tuple[int, int] = (13, 17),
    dtype: torch.dtype = torch.float32,
) -> People:
    """Tag maps and joints of which some lie outside the map, share a pixel or are not visible."""
    height, width = size
    tags = torch.randn(images, joints * dimensions, height, width).to(dtype)
    keypoints = torch.rand(images, count, joints, 2) * torch.tensor([width + 4, height + 4]) - 2
    if count > 2:
        keypoints[:, 1] = keypoints[:, 0]  # two people on the same pixels
        keypoints[:, 2, 0] = float("nan")
    return tags, keypoints, torch.randint(0, 3, (images, count, joints))


def gather(tags: Tensor, keypoints: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P, K, L) tags at the joints, and which of them count."""
    images, _, joints = visible.shape
    height, width = tags.shape[2:]
    x, y = (keypoints.nan_to_num(-9.0) + 0.5).floor().long().unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    maps = tags.unflatten(1, (joints, -1))
    b = torch.arange(images)[:, None, None].expand(x.shape)
    k = torch.arange(joints).expand(x.shape)
    found = maps[b, k, :, y.clamp(0, height - 1), x.clamp(0, width - 1)]
    return found, inside & (visible > 0)


def assert_matches_reference(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor, **options: object
) -> None:
    options = {"reduction": "none", **options}
    ours = tags.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    exact = tags.detach().cpu().double().requires_grad_()
    loss = instembed.associative_embedding_loss(ours, keypoints, visible, **options)
    expected = reference.associative_embedding_loss(exact, *on_cpu((keypoints, visible)), **options)
    assert loss.shape == expected.shape
    assert loss.dtype == (torch.float64 if tags.dtype == torch.float64 else torch.float32)
    weights = torch.randn_like(expected)
    (loss.cpu().double() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(loss, expected, 1e-12 if tags.dtype == torch.float64 else 3e-7)
    assert ours.grad.dtype == tags.dtype
    assert_close(ours.grad, exact.grad, TOLERANCE[tags.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dimensions", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", ["exp", "hinge"])
def test_types_and_dimensions(dtype: torch.dtype, dimensions: int, kind: str) -> None:
    tags, keypoints, visible = people(dimensions=dimensions, dtype=dtype)
    assert_matches_reference(tags, keypoints, visible, kind=kind)
    found, counts = gather(tags, keypoints, visible)
    assert_matches_reference(found, None, counts, kind=kind)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict) -> None:
    assert_matches_reference(*people(images=3, count=9, dimensions=2), **options)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 15, 16, 17, 100])
@pytest.mark.parametrize("joints", [1, 2, 17])
def test_numbers_of_people_and_joints(count: int, joints: int, two_threads: None) -> None:
    for kind in ("exp", "hinge"):
        assert_matches_reference(*people(count=count, joints=joints), kind=kind)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (128, 1), (40, 50)])
def test_map_sizes(size: tuple[int, int]) -> None:
    assert_matches_reference(*people(size=size, dimensions=2))


@pytest.mark.parametrize("name", layouts(8, 13, 17))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(name: str, dtype: torch.dtype) -> None:
    tags = layouts(8, 13, 17)[name].to(dtype)
    _, keypoints, visible = people(dimensions=2)
    leaf, exact = tags.detach().requires_grad_(), tags.detach().cpu().double().contiguous().requires_grad_()
    instembed.associative_embedding_loss(leaf, keypoints, visible).backward()
    reference.associative_embedding_loss(exact, *on_cpu((keypoints, visible))).backward()
    assert_close(leaf.grad, exact.grad, TOLERANCE[dtype])


def test_layouts_of_people() -> None:
    tags, keypoints, visible = people(dimensions=2)
    expected = instembed.associative_embedding_loss(tags, keypoints, visible)
    spread = torch.zeros(2, 5, 8, 3)
    spread[:, :, ::2, :2] = keypoints  # as COCO has them: x, y, v
    strided = visible.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(instembed.associative_embedding_loss(tags, spread[:, :, ::2, :2], strided), expected)
    found, counts = gather(tags, keypoints, visible)
    expected = instembed.associative_embedding_loss(found, None, counts)
    turned = found.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    loss = instembed.associative_embedding_loss(turned, None, counts)
    assert torch.equal(loss, expected)
    loss.backward()
    assert turned.grad.any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    tags, keypoints, visible = people(dimensions=2)
    tags = tags.contiguous(memory_format=memory_format).requires_grad_()
    instembed.associative_embedding_loss(tags, keypoints, visible).backward()
    assert tags.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bool, *instembed._arguments.INTEGER], ids=str)
def test_types_of_visible(dtype: torch.dtype) -> None:
    tags, keypoints, visible = people()
    expected = instembed.associative_embedding_loss(tags, keypoints, visible)
    assert torch.equal(instembed.associative_embedding_loss(tags, keypoints, visible.to(dtype)), expected)


def test_negative_visibility_is_not_visible() -> None:
    tags, keypoints, visible = people()
    expected = instembed.associative_embedding_loss(tags, keypoints, visible)
    visible[visible == 0] = -1
    assert torch.equal(instembed.associative_embedding_loss(tags, keypoints, visible), expected)


@pytest.mark.parametrize(
    "dtype", [*instembed._arguments.FLOATING, torch.int64, torch.int16, torch.uint8], ids=str
)
def test_types_of_keypoints(dtype: torch.dtype) -> None:
    tags, keypoints, visible = people()
    whole = keypoints.nan_to_num().round().clamp(min=0)
    expected = instembed.associative_embedding_loss(tags, whole, visible)
    assert torch.equal(instembed.associative_embedding_loss(tags, whole.to(dtype), visible), expected)


def test_keypoints_are_x_and_y_and_nearest() -> None:
    tags = torch.zeros(1, 2, 4, 6)  # K = 2 joints of L = 1
    tags[0, 0, 3, 5], tags[0, 1, 0, 2] = 1.0, 5.0
    corner = torch.tensor([[[[5.49, 2.5], [1.5, -0.5]]]])
    visible = torch.ones(1, 1, 2, dtype=torch.bool)
    assert instembed.associative_embedding_terms(tags, corner, visible).pull.item() == pytest.approx(4.0)
    for place in ((5.5, 3.0), (-0.51, 3.0), (5.0, 3.5), (math.inf, 3.0), (math.nan, 3.0), (-1e30, 3.0)):
        outside = corner.clone()
        outside[0, 0, 0] = torch.tensor(place)
        leaf = tags.clone().requires_grad_()
        terms = instembed.associative_embedding_terms(leaf, outside, visible)
        assert terms.pull.item() == 0  # of one joint that is left
        terms.pull.sum().backward()
        assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_not_rounded_itself(dtype: torch.dtype) -> None:
    """x + 0.5 of the number before 0.5 is 1."""
    below = torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    tags = torch.tensor([[[[3.0, 7.0]]], [[[3.0, 7.0]]]])
    keypoints = torch.stack([below, torch.tensor(0.5, dtype=dtype)]).view(2, 1, 1, 1).expand(2, 1, 1, 2) * 1
    keypoints[..., 1] = 0
    leaf = tags.double().requires_grad_()
    other = torch.zeros_like(keypoints)  # a second person, so that there is a gradient
    both = torch.cat([keypoints, other], 1)
    instembed.associative_embedding_loss(leaf, both, torch.ones(2, 2, 1, dtype=torch.bool)).backward()
    assert not leaf.grad[0].any() and leaf.grad[1].all()


def test_channels_are_joint_after_joint() -> None:
    tags = torch.zeros(1, 6, 1, 1)
    tags[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 5.0])  # two joints with L = 3
    visible = torch.ones(1, 1, 2, dtype=torch.bool)
    pull, _ = instembed.associative_embedding_terms(tags, torch.zeros(1, 1, 2, 2), visible)
    assert pull.item() == pytest.approx(1.0)  # only the last dimension differs, by 1 from its mean


def test_terms_by_hand() -> None:
    """Means 0, 1 and 3 of people with two joints 0.5 from them; a fourth person is not visible."""
    means = torch.tensor([0.0, 1.0, 3.0, 7.0])
    tags = torch.stack([means - 0.5, means + 0.5], -1)[None, ..., None]
    visible = torch.tensor([[[1, 2], [2, 2], [1, 1], [0, 0]]])
    pull, push = instembed.associative_embedding_terms(tags, None, visible)
    pairs = math.exp(-1.0) + math.exp(-4.0) + math.exp(-9.0)
    assert pull.item() == pytest.approx(0.25) and push.item() == pytest.approx(pairs / 6)
    _, push = instembed.associative_embedding_terms(tags, None, visible, kind="hinge", margin=2.5)
    assert push.item() == pytest.approx((1.5 + 0.5) / 6)
    loss = instembed.associative_embedding_loss(tags, None, visible, pull_weight=100, push_weight=10)
    assert loss.item() == pytest.approx(25 + 10 * pairs / 6)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 4, 4)], ids=str
)
def test_nobody_is_zero(shape: tuple[int, ...]) -> None:
    """No image, no person, no pixel, nobody visible."""
    images, count, height, width = shape
    tags = torch.randn(images, 4, height, width, requires_grad=True)
    visible = torch.ones(images, count, 2, dtype=torch.bool)
    if 0 not in shape:
        visible.zero_()
    keypoints = torch.zeros(images, count, 2, 2)
    for reduction in ("mean", "sum"):
        loss = instembed.associative_embedding_loss(tags, keypoints, visible, reduction=reduction)
        assert loss.item() == 0 and loss.requires_grad
        (gradient,) = torch.autograd.grad(loss, tags)
        assert gradient.shape == tags.shape and not gradient.any()


def test_one_person_has_no_push() -> None:
    tags, keypoints, visible = people(count=2, joints=17)
    visible[:, 0], visible[:, 1] = 1, 0
    for kind in ("exp", "hinge"):
        pull, push = instembed.associative_embedding_terms(tags, keypoints, visible, kind=kind)
        assert (push == 0).all() and (pull > 0).all()


def test_images_without_people_count_in_the_mean() -> None:
    tags, keypoints, visible = people()
    alone = instembed.associative_embedding_loss(tags[:1], keypoints[:1], visible[:1])
    visible[1] = 0
    assert instembed.associative_embedding_loss(tags, keypoints, visible).item() == pytest.approx(
        alone.item() / 2
    )


@pytest.mark.parametrize("kind", ["exp", "hinge"])
def test_ties_have_finite_gradients(kind: str) -> None:
    """All tags equal: the distance of every pair is 0, where its subgradient is 0."""
    tags = torch.full((1, 4, 5, 5), 2.0, requires_grad=True)
    _, keypoints, visible = people(images=1)
    loss = instembed.associative_embedding_loss(tags, keypoints.clamp(0, 4), visible.clamp(min=1), kind=kind)
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and not tags.grad.any()


def test_joints_on_one_pixel_add_up_once() -> None:
    """In bfloat16 a running sum of many small gradients would stop growing."""
    tags = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    tags[..., 1] = 0.5
    keypoints = torch.zeros(1, 1001, 1, 2)
    keypoints[0, 1000, 0, 0] = 1
    assert_matches_reference(tags, keypoints, torch.ones(1, 1001, 1, dtype=torch.bool))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["exp", "hinge"])
def test_bad_tags_show_in_their_own_image_and_only_where_read(value: float, kind: str) -> None:
    tags, keypoints, visible = people()
    keypoints[:, :, :, :] = torch.tensor([3.0, 4.0])
    visible[:] = 1
    tags[0, 2, 4, 3] = value
    losses = instembed.associative_embedding_loss(tags, keypoints, visible, kind=kind, reduction="none")
    assert losses[0].isnan() and losses[1].isfinite()
    visible[0, :, 2] = 0
    losses = instembed.associative_embedding_loss(tags, keypoints, visible, kind=kind, reduction="none")
    assert losses.isfinite().all()


@pytest.mark.parametrize("sigma", [1e-200, 1e-20, 1e200])
def test_any_sigma_is_finite(sigma: float) -> None:
    tags, keypoints, visible = people()
    tags.requires_grad_()
    loss = instembed.associative_embedding_loss(tags, keypoints, visible, sigma=sigma)
    loss.backward()
    assert loss.isfinite() and tags.grad.isfinite().all()


def test_large_tags_do_not_overflow() -> None:
    tags, keypoints, visible = people()
    assert_matches_reference(1e15 * tags, keypoints, visible)
    assert_matches_reference(30000 * tags.half().clamp(-1, 1), keypoints, visible)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    tags, keypoints, visible = people(images=3, count=50, joints=17, size=(90, 80), dtype=dtype)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = tags.clone().requires_grad_()
            loss = instembed.associative_embedding_loss(leaf, keypoints, visible)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("kind", ["exp", "hinge"])
@pytest.mark.parametrize("dimensions", [1, 3])
def test_gradcheck(kind: str, dimensions: int) -> None:
    tags, keypoints, visible = people(dimensions=dimensions, size=(3, 4), dtype=torch.float64)
    options = {"kind": kind, "margin": 2.0, "reduction": "none"}
    found, counts = gather(tags, keypoints, visible)
    for leaf, places, flags in ((tags, keypoints, visible), (found, None, counts)):
        assert torch.autograd.gradcheck(
            lambda t, p=places, v=flags: instembed.associative_embedding_loss(t, p, v, **options),
            leaf.detach().clone().requires_grad_(),
        )


def test_gradient_of_each_term() -> None:
    tags, keypoints, visible = people(dimensions=2, dtype=torch.float64)
    for column, name in enumerate(instembed.AssociativeEmbeddingTerms._fields):
        ours, exact = tags.clone().requires_grad_(), tags.cpu().clone().requires_grad_()
        getattr(instembed.associative_embedding_terms(ours, keypoints, visible), name).sum().backward()
        expected = reference.associative_embedding_terms(exact, *on_cpu((keypoints, visible)))
        expected[:, column].sum().backward()
        assert_close(ours.grad, exact.grad, 1e-12)


# Other implementations, as their published code computes an image's (pull, push) of one-dimensional tags that
# are all visible, (N, K). docs/associative_embedding.md has these rows.


def newell_paper(tags: Tensor) -> tuple[Tensor, Tensor]:
    means = tags.mean(1)
    pairs = torch.exp(-(means[:, None] - means).square())
    return (tags - means[:, None]).square().sum() / len(tags), pairs.sum() / len(tags) ** 2


def higher_hrnet(tags: Tensor) -> tuple[Tensor, Tensor]:
    count, means = len(tags), tags.mean(1)
    pairs = torch.exp(-(means[:, None] - means).square()).sum() - count
    return (tags - means[:, None]).square().mean(1).sum() / count, 0.5 * pairs / (count * (count - 1))


def higher_hrnet_max(tags: Tensor) -> tuple[Tensor, Tensor]:
    count, means = len(tags), tags.mean(1)
    pairs = (1 - (means[:, None] - means).abs()).clamp(min=0).sum() - count
    return (tags - means[:, None]).square().mean(1).sum() / count, 0.5 * pairs / (count * (count - 1))


def pose_ae_train(tags: Tensor) -> tuple[Tensor, Tensor]:
    """Of tags (N, K, L)."""
    count, means = len(tags), tags.mean(1)
    pairs = torch.exp(-(means[:, None] - means).square().sum(-1)).sum() - count
    pull = (tags - means[:, None]).square().mean((1, 2)).sum() / count
    return pull, 0.5 * pairs / (count * (count - 1))


def mmpose(tags: Tensor) -> tuple[Tensor, Tensor]:
    count, means = len(tags), tags.mean(1)
    pairs = torch.exp(-(means[:, None] - means).square()).sum()  # with the diagonal
    return (tags - means[:, None]).square().mean(1).sum() / count, pairs / (count * (count - 1))


def corner_net(tags: Tensor) -> tuple[Tensor, Tensor]:
    count, means = len(tags), tags.mean(1)
    pairs = (1 - (means[:, None] - means).abs()).clamp(min=0) - 1 / count
    return (tags - means[:, None]).square().sum() / count, pairs.sum() / (count * (count - 1))


def test_coming_from() -> None:
    tags = 0.5 * torch.randn(3, 6, 17, 1, dtype=torch.float64)
    visible = torch.ones(3, 6, 17, dtype=torch.bool)
    count, joints = 6, 17

    def sums(implementation, joints: int = joints) -> tuple[float, float]:
        terms = [implementation(image[:, :joints, 0]) for image in tags]
        return sum(t[0] for t in terms).item(), sum(t[1] for t in terms).item()

    pull, push = (term.sum().item() for term in instembed.associative_embedding_terms(tags, None, visible))
    assert sums(newell_paper) == pytest.approx(
        (joints * pull, 2 * (count - 1) / count * push + 3 / count), rel=1e-12
    )
    assert sums(higher_hrnet) == pytest.approx((pull, push), rel=1e-12)
    assert sums(mmpose) == pytest.approx((pull, 2 * push + 3 / (count - 1)), rel=1e-12)
    corners, both = tags[:, :, :2], visible[:, :, :2]
    pull, push = (
        term.sum().item() for term in instembed.associative_embedding_terms(corners, None, both, kind="hinge")
    )
    assert sums(corner_net, joints=2) == pytest.approx((2 * pull, 2 * push), rel=1e-12)
    pull, push = (
        term.sum().item() for term in instembed.associative_embedding_terms(tags, None, visible, kind="hinge")
    )
    assert sums(higher_hrnet_max) == pytest.approx((pull, push), rel=1e-12)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_coming_from_pose_ae_train(dimensions: int) -> None:
    tags = 0.5 * torch.randn(2, 6, 17, dimensions, dtype=torch.float64)
    visible = torch.ones(2, 6, 17, dtype=torch.bool)
    a, b = 0.7, 1.3
    theirs = [pose_ae_train(image) for image in tags]
    loss = instembed.associative_embedding_loss(
        tags, None, visible, pull_weight=a / dimensions, push_weight=b
    )
    assert loss.item() == pytest.approx(
        sum(a * pull + b * push for pull, push in theirs).item() / 2, rel=1e-12
    )


def test_double_backward_says_so() -> None:
    tags, keypoints, visible = people()
    loss = instembed.associative_embedding_loss(tags.requires_grad_(), keypoints, visible)
    (gradient,) = torch.autograd.grad(loss, tags, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("gathered", [False, True])
def test_compile_fullgraph(gathered: bool) -> None:
    tags, keypoints, visible = people(dimensions=2)
    if gathered:
        (tags, visible), keypoints = gather(tags, keypoints, visible), None

    def step(t: Tensor) -> Tensor:
        return instembed.associative_embedding_loss(t * 2, keypoints, visible, kind="hinge") * 3

    assert_compiles(step, tags)


def test_compile_with_inductor_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda t, k, v: instembed.associative_embedding_loss(t.tanh(), k, v), fullgraph=True, dynamic=True
    )
    for count, size in ((5, (12, 14)), (7, (17, 11))):
        tags, keypoints, visible = people(count=count, size=size)
        loss = step(tags.requires_grad_(), keypoints, visible)
        loss.backward()
        torch.testing.assert_close(
            loss, instembed.associative_embedding_loss(tags.tanh(), keypoints, visible)
        )


def test_autocast() -> None:
    _, keypoints, visible = people(dimensions=2)
    conv = torch.nn.Conv2d(3, 8, 3, padding=1).to(visible.device)
    with torch.autocast(visible.device.type, dtype=torch.bfloat16):
        tags = conv(torch.randn(2, 3, 13, 17))
        assert tags.dtype == torch.bfloat16
        loss = instembed.associative_embedding_loss(tags, keypoints, visible)
    assert loss.dtype == torch.float32
    loss.backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


def test_module() -> None:
    options = {"kind": "hinge", "margin": 0.3, "pull_weight": 2.0, "push_weight": 0.1, "reduction": "sum"}
    loss = instembed.AssociativeEmbeddingLoss(**options)
    batch = people()
    expected = instembed.associative_embedding_loss(*batch, **options)
    for module in (loss, copy.deepcopy(loss), torch.nn.Sequential(loss)[0]):
        assert torch.equal(module(*batch), expected)
    assert "margin=0.3" in repr(loss) and not list(loss.parameters()) and not loss.state_dict()
    with pytest.raises(ValueError, match="sigma"):
        instembed.AssociativeEmbeddingLoss(sigma=-1)


def test_checkpointing_and_frozen_inputs() -> None:
    tags, keypoints, visible = people()
    tags.requires_grad_()
    plain = torch.autograd.grad(instembed.associative_embedding_loss(tags, keypoints, visible), tags)[0]
    loss = checkpoint(instembed.associative_embedding_loss, tags, keypoints, visible, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, tags)[0], plain)
    assert not instembed.associative_embedding_loss(tags.detach(), keypoints, visible).requires_grad
    with torch.no_grad():
        assert not instembed.associative_embedding_loss(tags, keypoints, visible).requires_grad
    with torch.inference_mode():
        instembed.associative_embedding_loss(*people())


def test_inputs_are_left_alone() -> None:
    batch = people()
    before = [value.clone() for value in batch]
    batch[0].requires_grad_()
    instembed.associative_embedding_loss(*batch).backward()
    for value, copy_of in zip(batch, before, strict=True):
        torch.testing.assert_close(value.detach(), copy_of, rtol=0, atol=0, equal_nan=True)


def test_reference_can_be_differentiated_twice() -> None:
    tags, keypoints, visible = people(size=(3, 4), dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda t: reference.associative_embedding_loss(t, keypoints, visible), tags.requires_grad_()
    )


def test_push_needs_no_square_of_people() -> None:
    """20 000 people: pairs would take 3 GiB."""
    tags = torch.arange(20_000.0).view(1, -1, 1, 1).requires_grad_()
    visible = torch.ones(1, 20_000, 1, dtype=torch.bool)
    push = instembed.associative_embedding_terms(tags, None, visible, kind="hinge", margin=1.5).push
    push.sum().backward()
    assert push.item() == pytest.approx(0.5 * 19_999 / (20_000 * 19_999), rel=1e-6)
    assert not tags.grad[0, 1:-1].any() and tags.grad[0, 0].item() > 0 > tags.grad[0, -1].item()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": np.zeros((2, 6, 4, 5), np.int32)}, "tags"),
        ({"tags": np.zeros((2, 5, 4, 5), np.float32)}, "tags"),
        ({"tags": np.zeros((2, 6, 4), np.float32)}, "tags"),
        ({"tags": np.zeros((1, 6, 4, 5), np.float32)}, "tags"),
        ({"keypoints": np.zeros((2, 7, 3, 1), np.float32)}, "keypoints"),
        ({"visible": np.zeros((2, 7), np.uint8)}, "visible"),
        ({"terms": np.zeros((2, 3), np.float32)}, "terms"),
        ({"means": np.zeros((2, 7, 3))}, "means"),
        ({"pushes": np.zeros((2, 7, 2), np.float32)}, "pushes"),
        ({"pixels": np.zeros((2, 7, 3), np.int32)}, "pixels"),
    ],
)
def test_core_guards_its_own_boundary(change: dict, message: str) -> None:
    arrays = {
        "tags": np.zeros((2, 6, 4, 5), np.float32),
        "keypoints": np.zeros((2, 7, 3, 2), np.float32),
        "visible": np.zeros((2, 7, 3), np.uint8),
        "terms": np.zeros((2, 2), np.float32),
        "pixels": np.zeros((2, 7, 3), np.int64),
        "means": np.zeros((2, 7, 2)),
        "pushes": np.zeros((2, 7, 2)),
    }
    options = {"hinge": False, "sigma": 1.0, "margin": 1.0, "threads": 1}
    core.associative_embedding_forward(**arrays, **options)
    with pytest.raises(ValueError, match=message):
        core.associative_embedding_forward(**(arrays | change), **options)
