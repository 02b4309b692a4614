"""Seeds and what grows from them, against the best PyTorch: matrix products over chunks of the pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import ellipses, trained_embeddings

THRESHOLDS = (0.25, 0.5, 0.75, 0.9)
RADII = [math.log(2 - t) - math.log(t) for t in THRESHOLDS]
SEEDS = {"iou": 128, "select": 100, "grow": 100}
CHUNKS = (1024, 4096, 16384)  # pixels: from what stays in the cache to what keeps all threads busy

# Trained embeddings are clusters with clean or mixed borders; noise has no structure; in a "dense" image
# every pixel is in the masks of most seeds at some threshold, so that nothing can be skipped.
KINDS = ("trained", "rough", "noise", "dense")


def scene(kind: str, size: tuple[int, int], channels: int, instances: int) -> tuple[Tensor, Tensor]:
    """Embeddings (1, D, H, W) and labels (1, H, W)."""
    generator = torch.Generator().manual_seed(0)
    labels = ellipses(size, instances, generator)[None]
    if kind in ("trained", "rough"):
        return trained_embeddings(labels, channels, rough=kind == "rough"), labels
    scale = 1.0 if kind == "noise" else math.sqrt(RADII[1] / (2 * channels))
    return scale * torch.randn(1, channels, *size, generator=generator), labels


# Intersection over union ------------------------------------------------------------------------------------


def iou_task(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    embeddings, labels = scene(kind, (512, 512), 64, 100)
    foreground = (labels.flatten() > 0).nonzero()[:, 0]
    chosen = torch.randperm(len(foreground), generator=torch.Generator().manual_seed(1))[: SEEDS["iou"]]
    return embeddings, labels, foreground[chosen][None]


def chunked_iou(embeddings: Tensor, labels: Tensor, seeds: Tensor, chunk: int) -> Tensor:
    """Squared distances by a matrix product, a chunk of pixels at a time; for seeds on instances."""
    points, ids = embeddings[0].flatten(1), labels[0].flatten()
    at_seeds, own = points[:, seeds[0]], ids[seeds[0]]
    norms = at_seeds.square().sum(0)[:, None]
    members = points.new_zeros(len(own), len(RADII))
    common, area = torch.zeros_like(members), points.new_zeros(len(own), 1)
    for start in range(0, points.shape[1], chunk):
        part = points[:, start : start + chunk]
        squared = torch.addmm(norms + part.square().sum(0), at_seeds.t(), part, alpha=-2)
        same = own[:, None] == ids[start : start + chunk]
        area += same.sum(1, keepdim=True)
        for k, radius in enumerate(RADII):
            mask = squared <= radius
            members[:, k] += mask.sum(1)
            common[:, k] += (mask & same).sum(1)
    return (common / (members + area - common))[None]


def weighted_iou(embeddings: Tensor, labels: Tensor, seeds: Tensor, chunk: int) -> Tensor:
    """The same with sums of float masks, which eager PyTorch does faster than counting bools."""
    points, ids = embeddings[0].flatten(1), labels[0].flatten()
    at_seeds, own = points[:, seeds[0]], ids[seeds[0]]
    norms = at_seeds.square().sum(0)[:, None]
    members = points.new_zeros(len(own), len(RADII))
    common, area = torch.zeros_like(members), points.new_zeros(len(own), 1)
    for start in range(0, points.shape[1], chunk):
        part = points[:, start : start + chunk]
        squared = torch.addmm(norms + part.square().sum(0), at_seeds.t(), part, alpha=-2)
        same = (own[:, None] == ids[start : start + chunk]).float()
        area += same.sum(1, keepdim=True)
        for k, radius in enumerate(RADII):
            mask = (squared <= radius).float()
            members[:, k] += mask.sum(1)
            common[:, k] += torch.linalg.vecdot(mask, same)
    return (common / (members + area - common))[None]


def run_iou(workload: str, settings: Settings) -> list[Row]:
    task = settings.place(iou_task(workload))
    functions: dict[str, Callable[..., Tensor]] = {OURS: instembed.seed_mask_iou}
    for chunk in CHUNKS:
        functions[f"eager, bools, {chunk}"] = functools.partial(chunked_iou, chunk=chunk)
        functions[f"eager, floats, {chunk}"] = functools.partial(weighted_iou, chunk=chunk)
        if settings.compile:
            torch._dynamo.reset()
            step = torch.compile(chunk_counts)
            functions[f"torch.compile, {chunk}"] = functools.partial(compiled_iou, chunk=chunk, step=step)
    expected = functions[OURS](*task)
    for name, function in functions.items():
        # Where a distance is the radius but for rounding, the product's rounding decides otherwise.
        difference = (function(*task) - expected).abs().mean().item()
        assert difference < 1e-3, f"{name}: IoU off by {difference:.1e} on average"
    return _rows("seed_mask_iou", workload, functions, task, settings)


def chunk_counts(
    part: Tensor, ids: Tensor, at_seeds: Tensor, own: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    squared = torch.addmm(norms + part.square().sum(0), at_seeds.t(), part, alpha=-2)
    same = own[:, None] == ids
    masks = [squared <= radius for radius in RADII]
    members = torch.stack([mask.sum(1) for mask in masks], 1)
    return members, torch.stack([(mask & same).sum(1) for mask in masks], 1), same.sum(1)


def compiled_iou(
    embeddings: Tensor, labels: Tensor, seeds: Tensor, chunk: int, step: Callable[..., tuple[Tensor, ...]]
) -> Tensor:
    """The step of a chunk is compiled: a loop of all chunks would be unrolled."""
    points, ids = embeddings[0].flatten(1), labels[0].flatten()
    at_seeds, own = points[:, seeds[0]].contiguous(), ids[seeds[0]]
    norms = at_seeds.square().sum(0)[:, None]
    parts = [
        step(points[:, start : start + chunk], ids[start : start + chunk], at_seeds, own, norms)
        for start in range(0, points.shape[1], chunk)
    ]
    members, common, area = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
    return (common / (members + area[:, None] - common))[None]


# Choice of seeds --------------------------------------------------------------------------------------------


def select_task(kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings, and a seediness that is high inside instances, as a trained head has it."""
    embeddings, labels = scene(kind, (512, 1024), 8, 30)
    noise = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    return embeddings, torch.where(labels > 0, 0.7 + 0.3 * noise, 0.3 * noise) if kind != "noise" else noise


def nearest_step(points: Tensor, seed: Tensor, nearest: Tensor, log_seediness: Tensor) -> Tensor:
    """Updates the nearest distances in place; the next seed."""
    squared = (points - points[:, seed, None]).square().sum(0)
    torch.minimum(nearest, squared, out=nearest)
    return torch.add(log_seediness, nearest.log(), alpha=0.3).argmax()


def product_step(points: Tensor, norms: Tensor, seed: Tensor, nearest: Tensor, weight: Tensor) -> Tensor:
    """The same by a matrix-vector product, and without logarithms: S^(1 / 0.3) d2 has its maximum there."""
    at_seed = points[:, seed]
    squared = torch.addmv(norms + norms[seed], points.t(), at_seed, alpha=-2).clamp_(min=0)
    torch.minimum(nearest, squared, out=nearest)
    return (nearest * weight).argmax()


def compilable_step(
    points: Tensor, at_seed: Tensor, nearest: Tensor, log_seediness: Tensor
) -> tuple[Tensor, Tensor]:
    nearest = torch.minimum(nearest, (points - at_seed).square().sum(0))
    return (log_seediness + 0.3 * nearest.log()).argmax(), nearest


def selected(
    embeddings: Tensor, seediness: Tensor, how: str, step: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    points, values = embeddings[0].flatten(1), seediness[0].flatten()
    log_seediness, weight = values.log(), values.pow(1 / 0.3)
    norms = points.square().sum(0)
    nearest = torch.full_like(values, torch.inf)
    seed = values.argmax()
    seeds = [seed]
    for _ in range(SEEDS["select"] - 1):
        if how == "product":
            seed = product_step(points, norms, seed, nearest, weight)
        elif how == "compiled":
            seed, nearest = step(points, points[:, seed, None], nearest, log_seediness)
        else:
            seed = nearest_step(points, seed, nearest, log_seediness)
        seeds.append(seed)
    return torch.stack(seeds)[None]


def run_select(workload: str, settings: Settings) -> list[Row]:
    task = settings.place(select_task(workload))
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: lambda embeddings, seediness: (
            instembed.select_seeds(embeddings, seediness, SEEDS["select"]).indices
        ),
        "eager": functools.partial(selected, how="eager", step=compilable_step),
        "eager, product": functools.partial(selected, how="product", step=compilable_step),
    }
    if settings.compile:
        torch._dynamo.reset()
        step = torch.compile(compilable_step)
        functions["torch.compile"] = functools.partial(selected, how="compiled", step=step)
    expected = functions[OURS](*task)
    for name, function in functions.items():
        if name != "eager, product":  # whose rounding may pick others of nearly the same objective
            assert torch.equal(function(*task), expected), name
    return _rows("select_seeds", workload, functions, task, settings)


# Growing ----------------------------------------------------------------------------------------------------


def grow_task(kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings and seediness (1, 4, 2, H, W)."""
    embeddings, strength = select_task(kind)
    shares = torch.tensor([1.0, 0.95, 0.9, 0.85]).view(4, 1, 1)
    foreground = strength[:, None] * shares
    return embeddings, torch.stack([1 - foreground, foreground], 2)


def grown(embeddings: Tensor, seediness: Tensor) -> Tensor:
    """The labels of instembed.grow_seeds from the same seeds, with S x N masks."""
    seeds = instembed.select_seeds(embeddings, seediness[:, :, 1:].amax((1, 2)), SEEDS["grow"])
    indices, points = seeds.indices[0], embeddings[0].flatten(1)
    best = seediness[0, :, 1].flatten(1)[:, indices].argmax(0)
    order = seeds.scores[0].argsort(descending=True, stable=True)
    indices, radii = indices[order], torch.tensor(RADII, device=points.device)[best[order]]
    at_seeds = points[:, indices]
    norms = at_seeds.square().sum(0)[:, None] + points.square().sum(0)
    squared = torch.addmm(norms, at_seeds.t(), points, alpha=-2)
    masks = squared <= radii[:, None]
    floats = masks.float()
    shared = floats @ floats.t()
    sizes = shared.diag()
    accepted = torch.zeros_like(indices, dtype=torch.bool)
    limit = 0.5 * torch.minimum(sizes, sizes[:, None])
    for k in range(len(indices)):
        accepted[k] = not (accepted & (shared[k] > limit[k])).any()
    nearest, owner = torch.where(masks[accepted], squared[accepted], torch.inf).min(0)
    return torch.where(nearest < torch.inf, owner + 1, 0).view(embeddings[:, 0].shape)


def run_grow(workload: str, settings: Settings) -> list[Row]:
    task = settings.place(grow_task(workload))
    functions: dict[str, Callable[..., Tensor]] = {
        OURS: lambda *task: instembed.grow_seeds(*task, num_seeds=SEEDS["grow"]).labels,
        "eager, seeds given": grown,
    }
    different = (functions[OURS](*task) != grown(*task)).double().mean().item()
    assert different < 1e-3, f"labels differ at {different:.2%} of the pixels"
    return _rows("grow_seeds", workload, functions, task, settings)


def _rows(
    op: str,
    workload: str,
    functions: dict[str, Callable[..., Tensor]],
    task: tuple[Tensor, ...],
    settings: Settings,
) -> list[Row]:
    """The limit is of reading the inputs: the flops depend on how many pixels are near a seed."""
    work = Work(sum(tensor.nbytes for tensor in task))
    return compare((op, workload, "forward"), each(functools.partial, functions), task, settings, work)


def _profile(
    op: Callable[..., object], task: Callable[[str], tuple[Tensor, ...]]
) -> Callable[[str, Settings], Call]:
    def profile(workload: str, settings: Settings) -> Call:
        return functools.partial(op, *settings.place(task(workload)))

    return profile


ENTRIES = [
    Entry(
        "seed_mask_iou",
        ("seed_mask_iou", "seediness_loss"),
        KINDS,
        run_iou,
        _profile(instembed.seed_mask_iou, iou_task),
    ),
    Entry(
        "select_seeds",
        ("select_seeds",),
        KINDS[:3],
        run_select,
        _profile(functools.partial(instembed.select_seeds, num_seeds=SEEDS["select"]), select_task),
    ),
    Entry("grow_seeds", ("grow_seeds",), KINDS[:3], run_grow, _profile(instembed.grow_seeds, grow_task)),
]
