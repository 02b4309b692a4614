"""Mean-shift grouping by its definition, one point and one cluster at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from instembed.grouping.mean_shift import Grouping


def mean_shift(
    embeddings: Tensor,
    bandwidth: float,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    seeding: str = "peel",
    min_size: int = 1,
    max_instances: int | None = None,
    leftovers: str = "noise",
    max_iter: int = 300,
    tol: float = 1e-3,
) -> Grouping:
    """The definition of :func:`instembed.mean_shift`, for tests and devices without a kernel."""
    images = _split(embeddings, offsets)
    masks = _split_mask(mask, embeddings, offsets)
    labels, centers = [], []
    for points, classes in zip(images, masks, strict=True):
        image_labels, image_centers = _group_image(
            points, classes, bandwidth, seeding, min_size, leftovers, max_iter, tol
        )
        labels.append(image_labels)
        centers.append(image_centers)
    largest = max((c.shape[0] for c in centers), default=0)
    if max_instances is not None and largest > max_instances:
        raise ValueError(f"max_instances={max_instances} is too small: an image has {largest} instances")
    return _pack(embeddings, labels, centers, largest if max_instances is None else max_instances)


def _group_image(
    points: Tensor,
    classes: Tensor,
    bandwidth: float,
    seeding: str,
    min_size: int,
    leftovers: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor]:
    """points (N, D) in float64, classes (N,) -> labels (N,), centers (K, D)."""
    labels = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    all_centers = [points[:0]]
    instances = 0
    foreground = (classes != 0) & points.isfinite().all(dim=1)
    for one_class in classes[foreground].unique().tolist():
        members = torch.nonzero(foreground & (classes == one_class)).flatten()
        find = peel if seeding == "peel" else all_points
        owner, centers = find(points[members], bandwidth, max_iter, tol)  # owner -1: nobody
        sizes = torch.bincount(owner[owner >= 0], minlength=centers.shape[0])
        # A mode of "all" may end without points: scikit-learn keeps it, and so does min_size=1.
        kept = sizes >= (0 if seeding == "all" and min_size == 1 else min_size)
        number = torch.cumsum(kept, dim=0) - 1
        owner = torch.where((owner >= 0) & kept[owner], number[owner], -1) if len(centers) else owner
        centers = centers[kept]
        if leftovers == "nearest" and centers.shape[0] > 0:
            rest = torch.nonzero(owner < 0).flatten()
            owner[rest] = squared_distances(points[members[rest]], centers).argmin(dim=1)
        labels[members] = torch.where(owner >= 0, owner + 1 + instances, 0)
        instances += centers.shape[0]
        all_centers.append(centers)
    return labels, torch.cat(all_centers)


def peel(points: Tensor, bandwidth: float, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Mean shift from the first unassigned point; its mode claims what is within the bandwidth; repeat."""
    owner = torch.full((points.shape[0],), -1, dtype=torch.int64, device=points.device)
    unassigned = torch.ones_like(owner, dtype=torch.bool)
    centers: list[Tensor] = []
    while unassigned.any():
        seed = int(torch.nonzero(unassigned)[0])
        center = points[seed]
        for _ in range(max_iter):
            members = unassigned & within(points, center, bandwidth)
            if not members.any():
                break
            previous, center = center, points[members].mean(dim=0)
            if torch.linalg.vector_norm(center - previous) <= tol * bandwidth:
                break
        claimed = unassigned & within(points, center, bandwidth)
        if claimed.any():
            owner[claimed] = len(centers)
            unassigned[claimed] = False
            centers.append(center)
        else:  # only rounding or overflow can do this: the seed is given up, so that the loop ends
            unassigned[seed] = False
    return owner, torch.stack(centers) if centers else points[:0]


def all_points(points: Tensor, bandwidth: float, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """scikit-learn's rules: every point climbs; modes are ranked; a mode suppresses those in its ball."""
    members_of_mode: dict[tuple[float, ...], int] = {}
    for seed in range(points.shape[0]):
        center, count = points[seed], 0
        for _ in range(max_iter + 1):
            members = within(points, center, bandwidth)
            count = int(members.sum())
            if count == 0:
                break
            previous, center = center, points[members].mean(dim=0)
            if torch.linalg.vector_norm(center - previous) <= tol * bandwidth:
                break
        if count > 0:
            members_of_mode[tuple(center.tolist())] = count
    ranked = sorted(members_of_mode, key=lambda mode: (members_of_mode[mode], mode), reverse=True)
    centers: list[Tensor] = []
    for mode in ranked:
        candidate = points.new_tensor(mode)
        if not any(bool(within(candidate[None], kept, bandwidth)) for kept in centers):
            centers.append(candidate)
    if not centers:
        return torch.full((points.shape[0],), -1, dtype=torch.int64, device=points.device), points[:0]
    kept_centers = torch.stack(centers)
    distance, owner = squared_distances(points, kept_centers).min(dim=1)
    return torch.where(distance <= bandwidth**2, owner, -1), kept_centers


def within(points: Tensor, center: Tensor, bandwidth: float) -> Tensor:
    """Membership: the squared distance, channels added in order, is at most the squared bandwidth."""
    return squared_distances(points, center[None])[:, 0] <= bandwidth * bandwidth


def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N, K). Channels are added in order, so that ties fall alike everywhere."""
    total = points.new_zeros(points.shape[0], centers.shape[0])
    for channel in range(points.shape[1]):
        total = total + (points[:, channel, None] - centers[None, :, channel]) ** 2
    return total


def _split(embeddings: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """The (N, D) float64 points of each image."""
    values = embeddings.detach().to(torch.float64)
    if embeddings.dim() == 2:
        if offsets is None:
            return [values]
        bounds = offsets.tolist()
        return [values[bounds[b] : bounds[b + 1]] for b in range(len(bounds) - 1)]
    return [image.flatten(1).T for image in values]


def _split_mask(mask: Tensor | None, embeddings: Tensor, offsets: Tensor | None) -> list[Tensor]:
    if mask is None:
        points = embeddings.dim() == 2
        shape = embeddings.shape[:1] if points else embeddings.shape[:1] + embeddings.shape[2:]
        mask = torch.ones(shape, dtype=torch.int64, device=embeddings.device)
    mask = mask.to(torch.int64)
    if embeddings.dim() == 2:
        if offsets is None:
            return [mask]
        bounds = offsets.tolist()
        return [mask[bounds[b] : bounds[b + 1]] for b in range(len(bounds) - 1)]
    return [image.flatten() for image in mask]


def _pack(embeddings: Tensor, labels: list[Tensor], centers: list[Tensor], capacity: int) -> Grouping:
    points = embeddings.dim() == 2
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    images = len(labels)
    table = embeddings.new_zeros((images, capacity, embeddings.shape[1]), dtype=dtype).detach()
    counts = table.new_zeros((images, capacity), dtype=torch.int64)
    for b in range(images):
        k = centers[b].shape[0]
        table[b, :k] = centers[b].to(dtype)
        counts[b, :k] = torch.bincount(labels[b], minlength=k + 1)[1 : k + 1]
    shape = embeddings.shape[:1] if points else embeddings.shape[:1] + embeddings.shape[2:]
    flat = torch.cat(labels) if labels else counts.new_zeros(0)
    number = counts.new_tensor([c.shape[0] for c in centers])
    return Grouping(flat.reshape(shape), table, counts, number)
