"""Instance pooling against its float64 reference, its gradients, and what boxes would have mixed in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from instembed import InstanceFeaturesWithIds, reference
from tests.comparing import as_on_cpu, assert_compiles, on_cpu
from tests.layouts import layouts

pytestmark = pytest.mark.usefixtures("each_device")

REDUCTIONS = ["mean", "sum", "max"]
# Of sums, relative to the sum of magnitudes; of gradients, relative to the value.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
IDS = [0, 2**62, -(2**63), 2**63 - 1, 26005, -7, 2**24 - 1, 2**32, 1]


def blobs(*shape: int, ids: int = 6, size: int = 5) -> Tensor:
    """Labels with runs of many lengths; `size` 1 is noise."""
    coarse = torch.randint(0, ids, [-(-n // size) for n in shape[1:]])
    for axis in range(coarse.dim()):
        coarse = coarse.repeat_interleave(size, axis)
    coarse = coarse[tuple(slice(n) for n in shape[1:])]
    return torch.where(torch.rand(shape) < 0.05, torch.randint(0, ids, shape), coarse)


def assert_matches_reference(features: Tensor, labels: Tensor, **options: object) -> InstanceFeaturesWithIds:
    ours, exact = features.detach().requires_grad_(), features.detach().cpu().double().requires_grad_()
    expected = reference.instance_pool(exact, labels.cpu(), **on_cpu(options))
    pooled = as_on_cpu(instembed.instance_pool(ours, labels, return_ids=True, **options), expected)
    for name in ("valid", "ids", "counts"):
        assert getattr(pooled, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(pooled, name), getattr(expected, name)), name
    double = features.dtype == torch.float64
    assert pooled.features.dtype == (torch.float64 if double else torch.float32)
    if options.get("reduce") == "max":
        assert torch.equal(pooled.features.double(), expected.features)
    else:
        sizes = reference.instance_pool(exact.detach().abs(), labels.cpu(), **on_cpu(options)).features
        error = (pooled.features.double() - expected.features).abs()
        assert (error <= (1e-14 if double else 1e-6) * sizes + 1e-30).all()
    weights = torch.randn_like(expected.features)
    (pooled.features.double() * weights).sum().backward()
    (expected.features * weights).sum().backward()
    assert ours.grad is not None and ours.grad.dtype == features.dtype
    tolerance = TOLERANCE[features.dtype]
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=tolerance, atol=1e-7)
    return pooled


def test_a_case_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0, 4.0, 9.0]], [[0.0, 5.0, 5.0, 9.0]]]], requires_grad=True)
    labels = torch.tensor([[[7, -3, -3, 0]]])
    mean = instembed.instance_pool(features, labels, max_instances=3, return_ids=True)
    pooled, valid = instembed.instance_pool(features, labels, max_instances=3)
    assert torch.equal(pooled, mean.features) and torch.equal(valid, mean.valid)
    assert mean.features.tolist() == [[[3, 5], [1, 0], [0, 0]]]
    assert mean.valid.tolist() == [[True, True, False]]
    assert mean.ids.tolist() == [[-3, 7, 0]] and mean.counts.tolist() == [[2, 1, 0]]
    total = instembed.instance_pool(features, labels, reduce="sum", max_instances=2).features
    assert total.tolist() == [[[6, 10], [1, 0]]]
    largest = instembed.instance_pool(features, labels, reduce="max", max_instances=2).features
    assert largest.tolist() == [[[4, 5], [1, 0]]]
    (gradient,) = torch.autograd.grad(mean.features[0, 0].sum(), features)
    assert gradient.tolist() == [[[[0, 0.5, 0.5, 0]], [[0, 0.5, 0.5, 0]]]]
    (gradient,) = torch.autograd.grad(largest[0, 0].sum(), features)
    assert gradient.tolist() == [[[[0, 0, 1, 0]], [[0, 1, 0, 0]]]]  # of equal maxima the first


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 8, 17])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_types_and_channels(dtype: torch.dtype, channels: int, reduce: str) -> None:
    features = torch.randn(2, channels, 37, 43).to(dtype)
    for size in (1, 9):
        labels = blobs(2, 37, 43, size=size)
        assert_matches_reference(features, labels, reduce=reduce)
        last = features.contiguous(memory_format=torch.channels_last)
        assert_matches_reference(last, labels, reduce=reduce)


@pytest.mark.parametrize(
    "spatial",
    [(1,), (1025,), (1, 1), (17, 1), (1, 40), (63, 65), (128, 128), (3, 5, 7), (1, 1, 1), (16, 16, 16)],
    ids=str,
)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_spatial_sizes(spatial: tuple[int, ...], reduce: str) -> None:
    features = torch.randn(2, 5, *spatial)
    for size in (1, 20):
        labels = blobs(2, *spatial, size=size)
        assert_matches_reference(features, labels, reduce=reduce)
        assert_matches_reference(features, labels, reduce=reduce, background=None, ignore_index=2)


@pytest.mark.parametrize("channels", [512, 1000])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_many_channels(channels: int, reduce: str) -> None:
    assert_matches_reference(torch.randn(2, channels, 8, 9), blobs(2, 8, 9), reduce=reduce)
    last = torch.randn(2, channels, 8, 9).contiguous(memory_format=torch.channels_last)
    assert_matches_reference(last, blobs(2, 8, 9), reduce=reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_several_bands(two_threads: None, reduce: str) -> None:
    features = torch.randn(1, 3, 400, 401)
    assert_matches_reference(features, blobs(1, 400, 401, ids=20, size=31), reduce=reduce)
    assert_matches_reference(features, torch.randint(0, 30, (1, 400, 401)), reduce=reduce)
    rows = features.contiguous(memory_format=torch.channels_last)
    assert_matches_reference(rows, blobs(1, 400, 401, ids=20, size=31), reduce=reduce)


def pool_layouts() -> dict[str, Tensor]:
    return layouts(6, 34, 38) | {
        "channels_last_slice": torch.randn(2, 34, 38, 9)[..., 2:8].movedim(-1, 1),
        "expanded_channels": torch.randn(2, 1, 34, 38).expand(2, 6, 34, 38),
        "all_one": torch.randn(1, 1, 1, 1).expand(2, 6, 34, 38),
        "channels_last_step": torch.randn(2, 34, 38, 12)[..., ::2].movedim(-1, 1),
    }


@pytest.mark.parametrize("name", pool_layouts())
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_layouts(name: str, reduce: str) -> None:
    for size in (1, 6):
        assert_matches_reference(pool_layouts()[name], blobs(2, 34, 38, size=size), reduce=reduce)
        assert_matches_reference(pool_layouts()[name].half(), blobs(2, 34, 38, size=size), reduce=reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradient_keeps_the_memory_format(reduce: str) -> None:
    for shape, memory_format in (
        ((2, 16, 20, 24), torch.contiguous_format),
        ((2, 16, 20, 24), torch.channels_last),
        ((1, 8, 5, 6, 7), torch.channels_last_3d),
    ):
        features = torch.randn(shape).contiguous(memory_format=memory_format).requires_grad_()
        labels = blobs(shape[0], *shape[2:])
        instembed.instance_pool(features, labels, reduce=reduce).features.sum().backward()
        assert features.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", instembed._arguments.INTEGER, ids=str)
def test_label_types(dtype: torch.dtype) -> None:
    assert_matches_reference(torch.randn(2, 4, 30, 31), blobs(2, 30, 31).to(dtype), ignore_index=2)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ids_of_any_value(reduce: str) -> None:
    features = torch.randn(2, 4, 40, 45)
    for size in (1, 7):
        labels = torch.tensor(IDS)[blobs(2, 40, 45, ids=len(IDS), size=size)]
        pooled = assert_matches_reference(features, labels, reduce=reduce)
        assert (pooled.ids.diff(dim=1) > 0).all()
        assert_matches_reference(features, labels, reduce=reduce, background=-(2**63), ignore_index=2**62)


def test_rows_are_those_of_label_statistics() -> None:
    labels = torch.tensor(IDS)[blobs(3, 40, 45, ids=len(IDS))]
    pooled = instembed.instance_pool(torch.randn(3, 2, 40, 45), labels, return_ids=True)
    found = instembed.label_statistics(labels)
    assert torch.equal(pooled.ids, found.ids) and torch.equal(pooled.counts, found.areas)
    assert torch.equal(pooled.valid.sum(1), found.num_instances)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("instances", [300, 40000, 70000])
def test_many_instances(instances: int, reduce: str) -> None:
    """Every code that label runs have, up to an id a pixel."""
    features = torch.randn(1, 3, 280, 300)
    labels = torch.randint(1, instances + 1, (1, 280, 300))
    ids, slot = torch.unique(labels.cpu(), return_inverse=True)
    pooled = instembed.instance_pool(
        features.requires_grad_(), labels, reduce=reduce, max_instances=len(ids), return_ids=True
    )
    assert torch.equal(pooled.ids[0].cpu(), ids)
    points = features.detach().cpu().flatten(2)[0].t().contiguous().requires_grad_()
    how = {"mean": "mean", "sum": "sum", "max": "amax"}[reduce]
    expected = points.new_zeros(len(ids), 3).scatter_reduce(
        0, slot.flatten()[:, None].expand(-1, 3), points, how, include_self=False
    )
    torch.testing.assert_close(pooled.features[0].cpu(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    (pooled.features[0].cpu() * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(features.grad.cpu().flatten(2)[0].t(), points.grad, rtol=1e-5, atol=1e-6)


def test_strided_labels() -> None:
    features = torch.randn(2, 4, 30, 40)
    assert_matches_reference(features, blobs(2, 60, 40)[:, ::2])
    assert_matches_reference(features, blobs(2, 40, 30).transpose(1, 2))
    assert_matches_reference(features, blobs(1, 30, 40).expand(2, 30, 40))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_points_with_offsets(each_device: str, reduce: str) -> None:
    labels = torch.randint(0, 9, (1500,))
    offsets = torch.tensor([0, 0, 10, 10, 700, 1500, 1500])
    for features in (torch.randn(1500, 5), torch.randn(1500, 1), torch.randn(5, 1500).t()):
        pooled = assert_matches_reference(features, labels, offsets=offsets, reduce=reduce)
        assert pooled.features.shape == (6, 8, features.shape[1])
        assert not pooled.valid[[0, 2, 5]].any()
        assert_matches_reference(features, labels.sort().values, offsets=offsets.int(), reduce=reduce)
        assert_matches_reference(features, labels, reduce=reduce)
        alone = instembed.instance_pool(features[10:700], labels[10:700], reduce=reduce, max_instances=8)
        torch.testing.assert_close(alone.features[0].cpu(), pooled.features[3])
    none = instembed.instance_pool(torch.zeros(0, 3), labels[:0], offsets=offsets[:1], reduce=reduce)
    assert none.features.shape == (0, 0 if each_device == "cpu" else 64, 3)


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4), (0, 3), (5, 3)],
    ids=["batch", "pixels", "background", "no points", "points"],
)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("capacity", [None, 4])
def test_no_instance(each_device: str, shape: tuple[int, ...], reduce: str, capacity: int | None) -> None:
    features = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:1] if len(shape) == 2 else shape[:1] + shape[2:], dtype=torch.int64)
    pooled = instembed.instance_pool(features, labels, reduce=reduce, max_instances=capacity)
    images = 1 if len(shape) == 2 else shape[0]
    assert pooled.features.shape == (images, capacity or (0 if each_device == "cpu" else 64), 3)
    assert not pooled.features.any() and not pooled.valid.any()
    grad = torch.ones_like(pooled.features, requires_grad=True)
    (gradient,) = torch.autograd.grad(pooled.features, features, grad, create_graph=True)
    assert gradient.shape == shape and not gradient.any()
    gradient.sum().backward()
    assert grad.grad is not None and not grad.grad.any()


def test_everything_ignored() -> None:
    labels = torch.full((2, 8, 8), 255)
    assert_matches_reference(torch.randn(2, 3, 8, 8), labels, ignore_index=255, max_instances=2)


def test_capacity(each_device: str, overflow_checks: None) -> None:
    features, labels = torch.randn(2, 3, 20, 20), blobs(2, 20, 20, ids=5)
    rows, found = (4, "4") if each_device == "cpu" else (64, "more")
    assert instembed.instance_pool(features, labels).features.shape == (2, rows, 3)
    for reduce in REDUCTIONS:
        padded = assert_matches_reference(features, labels, max_instances=9, reduce=reduce)
        assert padded.features.shape == (2, 9, 3) and not padded.features[:, 4:].any()
    with pytest.raises(ValueError, match=f"max_instances=3 .* {found} instances"):
        instembed.instance_pool(features, labels, max_instances=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 6])
def test_a_bad_value_stays_where_it_is(value: float, layout: torch.memory_format, size: int) -> None:
    features = torch.randn(2, 9, 20, 20)
    features[0, 2, 3, 4] = value
    features = features.contiguous(memory_format=layout)
    labels = blobs(2, 20, 20, ids=4, size=size)
    for own in (0, 2):
        labels[0, 3, 4] = own
        for reduce in REDUCTIONS:
            pooled = instembed.instance_pool(features, labels, reduce=reduce, background=0, max_instances=3)
            expected = reference.instance_pool(
                features.cpu().double(), labels.cpu(), reduce=reduce, max_instances=3
            ).features
            torch.testing.assert_close(
                pooled.features.cpu().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maximum_of_special_values(layout: torch.memory_format) -> None:
    """NaN is larger than anything; an instance of nothing but -inf has a first pixel too."""
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, nan, 5.0, nan, inf], [-inf] * 5, [-inf, -inf, inf, inf, 0.0], [0.0, -0.0, -1.0, -2.0, -3.0]]
    expected = [1, 0, 2, 0]
    for length in (5, 40):  # within a vector, and beyond
        features = torch.full((1, 9, 1, length), -inf)
        features[0, :4, 0, :5] = torch.tensor(rows)
        features = features.contiguous(memory_format=layout).requires_grad_()
        labels = torch.full((1, 1, length), 3)
        labels[..., 5:] = torch.arange(length - 5) % 2 * 4 + 3
        pooled = instembed.instance_pool(features, labels, reduce="max").features
        assert pooled[0, 0, 0].isnan() and pooled[0, 0, 1:4].tolist() == [-inf, inf, 0.0]
        pooled[0, 0].sum().backward()
        for channel, pixel in enumerate(expected):
            assert features.grad[0, channel, 0].nonzero().tolist() == [[pixel]]


@pytest.mark.parametrize("labels_of", ["runs", "random"])
def test_ties_go_to_the_first_pixel(two_threads: None, labels_of: str) -> None:
    features = torch.randint(0, 3, (2, 9, 300, 301)).float()
    labels = blobs(2, 300, 301, ids=9, size=25 if labels_of == "runs" else 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_matches_reference(features.contiguous(memory_format=memory_format), labels, reduce="max")


def test_ascending_features() -> None:
    """Every pixel beats the maximum so far."""
    features = torch.arange(2 * 9 * 70 * 80.0).reshape(2, 9, 70, 80)
    assert_matches_reference(features, blobs(2, 70, 80), reduce="max")


def test_sums_do_not_overflow_16_bits() -> None:
    features = torch.ones(1, 1, 512, 512, dtype=torch.float16)
    labels = torch.ones(1, 512, 512, dtype=torch.int32)
    total = instembed.instance_pool(features, labels, reduce="sum", max_instances=1)
    assert total.features.item() == 512 * 512
    assert instembed.instance_pool(features, labels, max_instances=1).features.item() == 1.0


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["planar", "channels_last", "points", "half"])
def test_same_bits_on_any_number_of_threads(two_threads: None, reduce: str, layout: str) -> None:
    labels = blobs(2, 300, 310, ids=40, size=17)
    features = torch.randn(2, 12, 300, 310)
    if layout == "points":
        features, labels = features.flatten(2).mT.reshape(-1, 12), torch.randint(0, 300, (2 * 300 * 310,))
    elif layout == "half":
        features = features.half()
    elif layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)

    def run() -> tuple[Tensor, ...]:
        leaf = features.detach().requires_grad_()
        pooled = instembed.instance_pool(leaf, labels, reduce=reduce)
        (pooled.features.square().sum()).backward()
        return *pooled, leaf.grad

    both = run()
    torch.set_num_threads(1)
    for a, b in zip(run(), both, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradcheck(each_device: str, reduce: str) -> None:
    few = {} if each_device == "cpu" else {"max_instances": 3}
    labels = torch.tensor([[[0, 3, 3, 0, -4], [3, 3, 0, 9, 9]], [[0, 0, 0, 0, 0], [7, 7, 7, 7, 7]]])
    images = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    points = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    ids, offsets = torch.arange(12) % 3, torch.tensor([0, 0, 5, 12])
    calls = [
        (lambda f: instembed.instance_pool(f, labels, reduce=reduce, **few).features, images),
        (lambda f: instembed.instance_pool(f, ids, reduce=reduce, offsets=offsets, **few).features, points),
        (lambda f: instembed.instance_pool(f, ids, reduce=reduce, max_instances=5).features, points),
    ]
    for call, features in calls:
        assert torch.autograd.gradcheck(call, features)
        assert torch.autograd.gradgradcheck(call, features)


def test_reference_can_be_differentiated_twice() -> None:
    labels = torch.randint(0, 3, (1, 3, 3))
    features = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    call = lambda f: reference.instance_pool(f, labels).features.square()  # noqa: E731
    assert torch.autograd.gradgradcheck(call, features)


def test_nothing_of_the_features_is_kept() -> None:
    features, labels = torch.randn(2, 4, 10, 10, requires_grad=True), blobs(2, 10, 10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pooled = instembed.instance_pool(features * 2, labels)
    assert not any(t.is_floating_point() and t.dim() == 4 for t in kept)
    pooled.features.sum().backward()


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("layout", ["planar", "channels_last", "points"])
def test_compile_fullgraph(reduce: str, layout: str) -> None:
    offsets = None
    if layout == "points":
        features, labels, offsets = torch.randn(90, 4), torch.randint(0, 5, (90,)), torch.tensor([0, 40, 90])
    else:
        features, labels = torch.randn(2, 4, 16, 18), blobs(2, 16, 18)
    if layout == "channels_last":
        features = features.contiguous(memory_format=torch.channels_last)

    def step(f: Tensor) -> Tensor:
        pooled = instembed.instance_pool(f * 2, labels, reduce=reduce, max_instances=8, offsets=offsets)
        return (pooled.features.square() * pooled.valid[..., None]).sum()

    assert_compiles(step, features)


def test_compile_dynamic_shapes() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda f, n: instembed.instance_pool(f.tanh(), n, max_instances=8).features.square().sum(),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for size in (12, 17):
        ours, exact = (torch.ones(2, 4, size, size).mul_(0.3).requires_grad_() for _ in range(2))
        labels = blobs(2, size, size)
        step(ours, labels).backward()
        instembed.instance_pool(exact.tanh(), labels).features.square().sum().backward()
        torch.testing.assert_close(ours.grad, exact.grad)


def test_autocast(each_device: str) -> None:
    conv, labels = torch.nn.Conv2d(3, 8, 3, padding=1), blobs(2, 20, 20)
    head = torch.nn.Linear(8, 5)
    with torch.autocast(each_device, dtype=torch.bfloat16):
        features = conv(torch.randn(2, 3, 20, 20))
        pooled = instembed.instance_pool(features, labels).features
        assert features.dtype == torch.bfloat16 and pooled.dtype == torch.float32
        head(pooled).square().sum().backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


@pytest.mark.parametrize("stride", [1, 4])
def test_instances_instead_of_boxes(stride: int) -> None:
    """Crossing bars whose features say who they are: a box holds both, an instance only itself."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    labels[0, (y - x).abs() < 6] = 1
    labels[0, (y + x - 63).abs() < 6] = 2
    features = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    features, labels = features[..., ::stride, ::stride], labels[:, ::stride, ::stride]
    pooled = instembed.instance_pool(features, labels, max_instances=2).features
    assert torch.equal(pooled, torch.eye(3)[None, 1:])
    boxes = instembed.label_statistics(labels, max_instances=2).boxes[0].int().tolist()
    for own, (x1, y1, x2, y2) in enumerate(boxes, 1):
        by_box = features[0, :, y1:y2, x1:x2].mean((1, 2))
        assert by_box[3 - own] > 0.9 * by_box[own] and by_box[0] > 0.6


@pytest.mark.cpu_only
def test_the_core_guards_its_own_boundary() -> None:
    core = instembed._native.core
    labels = torch.ones(2, 50, dtype=torch.int64)
    instances = core.PoolInstances(labels, None, background=0, ignore_index=None, threads=1)

    def pool(**changes: object) -> None:
        arguments = {
            "features": torch.zeros(2, 3, 50), "offsets": None, "reduce": core.Reduce.max,
            "pooled": torch.zeros(2, 1, 3), "valid": torch.zeros(2, 1, dtype=torch.bool),
            "ids": torch.zeros(2, 1, dtype=torch.int64), "counts": torch.zeros(2, 1, dtype=torch.int64),
            "argmax": torch.zeros(2, 1, 3, dtype=torch.int64),
        }  # fmt: skip
        instances.pool(**(arguments | changes), threads=1)

    pool()
    for changes in (
        {"features": torch.zeros(2, 3, 51)}, {"features": torch.zeros(1, 3, 50)}, {"features": labels},
        {"features": torch.zeros(3, 50)}, {"offsets": torch.tensor([0, 50])}, {"argmax": None},
        {"reduce": core.Reduce.sum}, {"pooled": torch.zeros(2, 0, 3)}, {"pooled": torch.zeros(2, 1, 4)},
        {"pooled": torch.zeros(2, 1, 3).double()}, {"ids": torch.zeros(2, 2, dtype=torch.int64)},
        {"argmax": torch.zeros(2, 1, 3, dtype=torch.int32)}, {"valid": torch.zeros(2, 1)},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            pool(**changes)
    grad, target = torch.zeros(2, 1, 3), torch.zeros(2, 3, 50)
    instances.spread(grad, None, core.Reduce.sum, target, threads=1)
    for bad in ((grad[:, :0], target), (grad, target[..., 1:]), (grad, torch.zeros(2, 6, 100)[:, ::2, ::2])):
        with pytest.raises(ValueError):
            instances.spread(bad[0], None, core.Reduce.sum, bad[1], threads=1)
    with pytest.raises(ValueError, match="argmax"):
        instances.spread(grad, None, core.Reduce.max, target, threads=1)
    for pixel in (50, 2**62):
        with pytest.raises(ValueError, match="argmax"):
            core.spread_max(grad, torch.full((2, 1, 3), pixel), None, target, threads=1)
