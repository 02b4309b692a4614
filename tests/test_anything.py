"""Random shapes, strides, types and ids at every public function: a right answer or a clear error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import instembed
from instembed import reference
from tests.comparing import as_on_cpu, on_cpu, there

pytestmark = pytest.mark.usefixtures("each_device")

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
IDS = st.one_of(st.integers(-3, 6), st.integers(-(2**63), 2**63 - 1))
EXAMPLES = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a shape, in a memory order and with gaps and an offset of hypothesis's choice."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(1, 2)) for _ in shape]
    start = draw(st.integers(0, 1))
    base = torch.zeros([shape[k] * gaps[k] + start for k in order])
    view = base[tuple(slice(start, start + shape[k] * gaps[k], gaps[k]) for k in order)]
    return view.permute([order.index(k) for k in range(len(shape))])


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Embeddings and labels that fit each other."""
    spatial = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    while torch.Size(spatial).numel() > 3000:
        spatial = tuple(max(1, n // 2) for n in spatial)
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 18))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    embeddings = draw(strided((batch, channels, *spatial)))
    scale = draw(st.sampled_from([0.01, 1.0, 100.0]))
    embeddings.copy_(scale * torch.randn(embeddings.shape, generator=generator))
    embeddings = embeddings.to(draw(st.sampled_from(FLOATS)))
    ids = torch.tensor(draw(st.lists(IDS, min_size=1, max_size=8)))
    labels = draw(strided((batch, *spatial))).to(torch.int64)
    labels.copy_(ids[torch.randint(0, len(ids), labels.shape, generator=generator)])
    if draw(st.booleans()) and labels.numel():
        labels = labels.flatten().sort().values.view(labels.shape)
    return embeddings, labels


def room(labels: Tensor) -> dict[str, int]:
    """On a GPU, where an op does not find out how many instances there are: as many as there are pixels."""
    return {"max_instances": max(labels[:1].numel(), 1)} if labels.is_cuda else {}


@EXAMPLES
@given(batches(), st.sampled_from([1, 2]), st.none() | IDS, st.none() | IDS, st.sampled_from([0.0, 1.0]))
def test_discriminative(
    batch: tuple[Tensor, Tensor], norm: int, background: int | None, ignore: int | None, push: float
) -> None:
    embeddings, labels = batch
    options = {"norm": norm, "background": background, "ignore_index": ignore, "background_push": push}
    ours, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    loss = instembed.discriminative_loss(ours, labels, **room(labels), **options)
    expected = reference.discriminative_loss(exact, labels, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    if embeddings.dtype in (torch.float32, torch.float64) and embeddings.numel():
        scale = exact.grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours.grad.double() / scale, exact.grad / scale, rtol=0, atol=1e-3)


@EXAMPLES
@given(
    batches(),
    st.sampled_from([0.05, 1.0, 30.0]),
    st.sampled_from(["peel", "all"]),
    st.sampled_from(["noise", "nearest"]),
    st.integers(1, 5),
    st.booleans(),
)
def test_mean_shift(
    batch: tuple[Tensor, Tensor], bandwidth: float, seeding: str, leftovers: str, min_size: int, masked: bool
) -> None:
    embeddings, labels = batch
    embeddings = embeddings[..., :200]
    mask = labels[..., :200] if masked else None
    options = {"seeding": seeding, "leftovers": leftovers, "min_size": min_size, **room(labels)}
    grouping = instembed.mean_shift(embeddings, bandwidth, mask=mask, **options)
    assert grouping.labels.shape == embeddings.shape[:1] + embeddings.shape[2:]
    assert grouping.centers.isfinite().all()
    for b in range(len(embeddings)):
        counts = torch.bincount(grouping.labels[b].flatten(), minlength=grouping.counts.shape[1] + 1)[1:]
        assert torch.equal(counts, grouping.counts[b])
        assert int((counts > 0).sum()) <= int(grouping.num_instances[b])


@EXAMPLES
@given(batches(), st.sampled_from([0.05, 0.5, 30.0]), st.sampled_from([0.3, 1.0]), st.booleans())
def test_recurrent_mean_shift(
    batch: tuple[Tensor, Tensor], bandwidth: float, step: float, masked: bool
) -> None:
    embeddings, labels = batch
    embeddings = embeddings[..., :200]
    options = {"iterations": 2, "step": step, "mask": labels[..., :200] if masked else None}
    ours, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    shifted = instembed.recurrent_mean_shift(ours, bandwidth, **options)
    norms = torch.linalg.vector_norm(shifted, dim=1)
    assert shifted.shape == embeddings.shape and (((norms - 1).abs() < 1e-5) | (norms == 0)).all()
    shifted.sum().backward()
    assert ours.grad.isfinite().all()
    if embeddings.dtype == torch.float64 and bandwidth < 30:  # where points may cancel up to rounding
        expected = reference.recurrent_mean_shift(exact, bandwidth, **options)
        torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)


@EXAMPLES
@given(
    batches(),
    st.sampled_from([0.3, 0.5, 0.9]),
    st.booleans(),
    st.none() | IDS,
    st.none() | IDS,
    st.sampled_from([None, 0.5, 7, (0.7, 50)]),
)
def test_cosine_margin(
    batch: tuple[Tensor, Tensor],
    margin: float,
    squared: bool,
    background: int | None,
    ignore: int | None,
    samples: object,
) -> None:
    embeddings, labels = batch
    options = {"margin": margin, "squared": squared, "background": background, "ignore_index": ignore}
    ours, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    loss, expected = (
        function(
            leaf, labels, samples=samples, generator=torch.Generator(labels.device).manual_seed(0), **options
        )
        for function, leaf in (
            (instembed.cosine_margin_loss, ours),
            (reference.cosine_margin_loss, exact),
        )
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    if embeddings.dtype == torch.float64:
        torch.testing.assert_close(ours.grad, exact.grad)


@EXAMPLES
@given(
    batches(),
    st.sampled_from([-0.2, 0.5, 0.9, 0.999]),
    st.booleans(),
    st.sampled_from([1, 4]),
    st.sampled_from(["noise", "nearest"]),
)
def test_group_on_sphere(
    batch: tuple[Tensor, Tensor], threshold: float, masked: bool, min_size: int, leftovers: str
) -> None:
    embeddings, labels = batch
    options = {
        "threshold": threshold,
        "mask": labels if masked else None,
        "min_size": min_size,
        "leftovers": leftovers,
    }
    if embeddings.shape[1] == 1:  # cosines of 1 and -1 alone: ties of centres
        options["leftovers"] = "noise"
    grouping = instembed.group_on_sphere(embeddings, **room(labels), **options)
    assert torch.equal(grouping.labels, reference.group_on_sphere(embeddings, **options)[0])


@EXAMPLES
@given(batches(), st.integers(1, 20), st.none() | IDS, st.none() | IDS)
def test_pairwise_similarity_loss(
    batch: tuple[Tensor, Tensor], samples: int, background: int | None, ignore: int | None
) -> None:
    embeddings, labels = batch
    rules = {"background": background, "ignore_index": ignore, **room(labels)}
    drawn, same = (torch.Generator(labels.device).manual_seed(1) for _ in range(2))
    found = instembed.sample_pixels(labels, samples, generator=drawn, **rules)
    expected = reference.sample_pixels(labels, samples, generator=same, **rules)
    assert torch.equal(found.indices, expected[0]) and torch.equal(found.valid, expected[1])
    options = {"samples": samples, "reduction": "none", **rules}
    ours, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    loss = instembed.pairwise_similarity_loss(ours, labels, generator=drawn, **options)
    definition = reference.pairwise_similarity_loss(exact, labels, generator=same, **options)
    torch.testing.assert_close(loss.double(), definition, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    definition.sum().backward()
    if embeddings.dtype in (torch.float32, torch.float64) and embeddings.numel():
        scale = exact.grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours.grad.double() / scale, exact.grad / scale, rtol=0, atol=1e-4)


@EXAMPLES
@given(batches(), st.none() | IDS, st.none() | IDS)
def test_label_statistics(batch: tuple[Tensor, Tensor], background: int | None, ignore: int | None) -> None:
    labels = batch[1]
    ours = instembed.label_statistics(labels, background=background, ignore_index=ignore, **room(labels))
    exact = reference.label_statistics(labels.cpu(), background=background, ignore_index=ignore)
    for name, value in as_on_cpu(ours, exact)._asdict().items():
        torch.testing.assert_close(value, getattr(exact, name), rtol=1e-6, atol=1e-5, check_dtype=False)


@EXAMPLES
@given(batches(), st.sampled_from(["mean", "sum", "max"]), st.none() | IDS, st.none() | IDS)
def test_instance_pool(
    batch: tuple[Tensor, Tensor], reduce: str, background: int | None, ignore: int | None
) -> None:
    features, labels = batch
    options = {"reduce": reduce, "background": background, "ignore_index": ignore}
    ours, exact = features.detach().requires_grad_(), features.detach().double().requires_grad_()
    expected = reference.instance_pool(exact.cpu(), labels.cpu(), **options)
    pooled = instembed.instance_pool(ours, labels, return_ids=True, **room(labels), **options)
    pooled = as_on_cpu(pooled, expected)
    assert torch.equal(pooled.ids, expected.ids) and torch.equal(pooled.counts, expected.counts)
    assert torch.equal(pooled.valid, expected.valid)
    size = exact.abs().sum().item() if reduce == "sum" else 1.0
    torch.testing.assert_close(pooled.features.double(), expected.features, rtol=1e-5, atol=1e-6 * (1 + size))
    weights = torch.randn_like(pooled.features)
    (pooled.features * weights).sum().backward()
    (expected.features * weights).sum().backward()
    tolerance = 1e-2 if features.dtype in (torch.float16, torch.bfloat16) else 1e-6
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@EXAMPLES
@given(batches(), st.booleans(), st.booleans())
def test_detections(batch: tuple[Tensor, Tensor], masks: bool, rle: bool) -> None:
    labels = batch[1]
    if labels.dim() != 3:
        return
    for image, ids in zip(instembed.detections(labels, masks=masks, rle=rle), labels, strict=True):
        present = ids[ids != 0].unique()
        assert len(image["boxes"]) == len(image["labels"]) == len(image["scores"]) == len(present)
        if masks and len(present):
            assert torch.equal(image["masks"].cpu(), (ids == present[:, None, None]).cpu())


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Tag maps of any layout, and people whose joints may be anywhere."""
    images, people, joints = draw(st.integers(0, 3)), draw(st.integers(0, 20)), draw(st.integers(1, 5))
    height, width = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tags = draw(strided((images, joints * draw(st.integers(1, 4)), height, width)))
    tags.copy_(torch.randn(tags.shape, generator=generator))
    keypoints = draw(strided((images, people, joints, 2)))
    keypoints.copy_(12 * torch.rand(keypoints.shape, generator=generator) - 1)
    strange = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -0.5, 2.5])
    keypoints[torch.rand(keypoints.shape, generator=generator) < 0.1] = draw(strange)
    visible = draw(strided((images, people, joints))).to(torch.int64)
    visible.copy_(torch.randint(-1, 3, visible.shape, generator=generator))
    return tags.to(draw(st.sampled_from(FLOATS))), keypoints, visible


@EXAMPLES
@given(crowds(), st.sampled_from(["exp", "hinge"]), st.sampled_from([0.01, 1.0, 100.0]))
def test_associative_embedding(crowd: tuple[Tensor, Tensor, Tensor], kind: str, scale: float) -> None:
    tags, keypoints, visible = crowd
    options = {"kind": kind, "sigma": scale, "margin": scale}
    ours, exact = tags.detach().requires_grad_(), tags.detach().double().requires_grad_()
    loss = instembed.associative_embedding_loss(ours, keypoints, visible, **options)
    expected = reference.associative_embedding_loss(exact, keypoints, visible, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    atol = 1e-2 if tags.dtype in (torch.float16, torch.bfloat16) else 1e-6
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=atol, atol=atol)


@EXAMPLES
@given(batches(), st.data(), st.sampled_from(["nearest", "bilinear"]))
def test_gather_at(batch: tuple[Tensor, Tensor], data: st.DataObject, mode: str) -> None:
    features = batch[0]
    sizes = torch.tensor(features.shape[:1:-1])
    points = data.draw(strided((len(features), data.draw(st.integers(0, 30)), len(sizes))))
    points.copy_(torch.rand(points.shape) * (sizes + 2) - 1)
    points[torch.rand(points.shape) < 0.3] = data.draw(st.sampled_from([-0.5, 0.0, 1.0, 1e30, float("nan")]))
    valid = torch.randint(-1, 3, points.shape[:-1]) if data.draw(st.booleans()) else None
    ours, exact = features.detach().requires_grad_(), features.detach().double().requires_grad_()
    values = instembed.gather_at(ours, points, valid=valid, mode=mode)
    expected = reference.gather_at(exact, points.double(), valid=valid, mode=mode)
    rounding = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(features.dtype, 1e-5)
    scale = features.detach().double().abs().max().item() if features.numel() else 1.0
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=rounding * scale)
    values.double().sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=rounding, atol=rounding)


@EXAMPLES
@given(batches(), st.none() | IDS, st.none() | IDS, st.floats(1e-3, 1.0), st.integers(0, 20))
def test_seed_mask_iou(
    batch: tuple[Tensor, Tensor], background: int | None, ignore: int | None, threshold: float, count: int
) -> None:
    embeddings, labels = batch
    seeds = torch.randint(-1, max(labels[:1].numel(), 1), (len(labels), count))
    seeds = seeds.clamp(max=labels[:1].numel() - 1)
    options = {"background": background, "ignore_index": ignore}
    ours = instembed.seed_mask_iou(embeddings, labels, seeds, (threshold, 0.5), **options)
    exact = reference.seed_mask_iou(*on_cpu((embeddings, labels, seeds)), (threshold, 0.5), **options)
    assert torch.equal(ours.cpu(), exact.to(ours.dtype))


@EXAMPLES
@given(batches(), st.integers(1, 30), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_grow_seeds(batch: tuple[Tensor, Tensor], num_seeds: int, diversity: float, overlap: float) -> None:
    embeddings, labels = batch
    seediness = torch.rand(len(labels), 2, 3, *labels.shape[1:])
    options = {"thresholds": (0.3, 0.9), "num_seeds": num_seeds, "diversity": diversity, "overlap": overlap}
    ours = instembed.grow_seeds(embeddings, seediness, mask=labels, **options)
    exact = reference.grow_seeds(*on_cpu((embeddings, seediness)), mask=labels.cpu(), **options)
    assert all(torch.equal(a, b) for a, b in zip(as_on_cpu(ours, exact), exact, strict=True))


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5)]),
    st.sampled_from([torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, 5, dtype=torch.uint8)]),
    st.sampled_from([torch.zeros(2, 3, 4, dtype=torch.complex64), torch.zeros(2, 3, 4, device="meta")]),
)
FUNCTIONS = {
    "associative_embedding_loss": ["kind", "sigma", "margin", "pull_weight", "push_weight", "reduction"],
    "cosine_margin_loss": [
        "margin",
        "samples",
        "squared",
        "background",
        "ignore_index",
        "offsets",
        "normalize",
        "generator",
    ],
    "discriminative_loss": [
        "offsets",
        "delta_var",
        "norm",
        "alpha",
        "background",
        "ignore_index",
        "variance",
    ],
    "discriminative_terms": ["offsets", "delta_dist", "norm", "background"],
    "gather_at": ["valid", "mode"],
    "read_location_maps": ["limbs", "root"],
    "location_read_points": ["limbs", "root"],
    "mean_shift": ["mask", "offsets", "seeding", "min_size", "max_instances", "leftovers", "max_iter", "tol"],
    "recurrent_mean_shift": ["iterations", "step", "mask", "offsets", "tolerance", "backprop_iterations"],
    "label_statistics": ["background", "ignore_index", "max_instances"],
    "instance_pool": ["reduce", "max_instances", "background", "ignore_index", "offsets", "return_ids"],
    "detections": ["scores", "classes", "masks", "rle"],
    "grow_seeds": ["thresholds", "num_seeds", "diversity", "min_seediness", "min_size", "overlap", "mask"],
    "group_on_sphere": ["threshold", "min_size", "mask", "offsets", "max_instances", "leftovers"],
    "seed_mask_iou": ["thresholds", "background", "ignore_index"],
    "seediness_loss": ["seeds", "classes", "thresholds", "iou", "reduction"],
    "select_seeds": ["diversity", "min_seediness", "mask"],
    "group_keypoints": ["peak_threshold", "tag_threshold", "nms", "joint_order", "adjust"],
}


COUNTS = {  # positional arguments, where they are not two
    "associative_embedding_loss": 3,
    "detections": 1,
    "group_on_sphere": 1,
    "label_statistics": 1,
    "location_read_points": 3,
    "read_location_maps": 3,
    "seed_mask_iou": 3,
    "seediness_loss": 3,
    "select_seeds": 3,
}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(sorted(FUNCTIONS)))
def test_nonsense_is_refused(each_device: str, data: st.DataObject, name: str) -> None:
    """Whatever comes, a function returns or raises ValueError or TypeError."""
    count = COUNTS.get(name, 2)
    positional = [there(data.draw(ANYTHING), each_device) for _ in range(count)]
    options = {
        key: there(data.draw(ANYTHING), each_device)
        for key in data.draw(st.lists(st.sampled_from(FUNCTIONS[name])))
    }
    if any(isinstance(value, Tensor) and value.is_meta for value in [*positional, *options.values()]):
        return  # a fake tensor has no values: what runs then is the op's fake
    try:
        getattr(instembed, name)(*positional, **options)
    except (ValueError, TypeError) as error:
        assert str(error)
