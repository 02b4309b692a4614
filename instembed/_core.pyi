"""The native core. Arrays are anything that exports DLPack: torch tensors, numpy arrays."""

from typing import Any, TypeAlias

Array: TypeAlias = Any

version: str
cuda: bool

# Only where `cuda` is true: arrays live on one device, `stream` is the handle of one of its streams, and
# `workspace` is uint8 of the size that the function beside it tells.
def cuda_device_count() -> int: ...
def associative_embedding_cuda_workspace(images: int, people: int) -> int: ...
def associative_embedding_forward_cuda(
    tags: Array,
    keypoints: Array | None,
    visible: Array,
    terms: Array,
    pixels: Array,
    means: Array,
    pushes: Array,
    workspace: Array,
    *,
    hinge: bool,
    sigma: float,
    margin: float,
    stream: int,
) -> None: ...
def associative_embedding_backward_cuda(
    grad_terms: Array,
    tags: Array,
    pixels: Array,
    means: Array,
    pushes: Array,
    grad: Array,
    workspace: Array,
    *,
    gathered: bool,
    stream: int,
) -> None: ...
def cosine_margin_cuda_workspace(
    points: Array, offsets: Array | None, keys: Array | None, *, fraction: float, most: int, gradient: bool
) -> int: ...
def cosine_margin_forward_cuda(
    points: Array,
    labels: Array,
    offsets: Array | None,
    keys: Array | None,
    losses: Array,
    gradient: Array | None,
    workspace: Array,
    *,
    fraction: float,
    most: int,
    margin: float,
    squared: bool,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def discriminative_cuda_workspace(
    embeddings: Array,
    offsets: Array | None,
    options: DiscriminativeOptions,
    capacity: int,
    *,
    backward: bool,
) -> int: ...
def discriminative_forward_cuda(
    embeddings: Array,
    labels: Array,
    offsets: Array | None,
    options: DiscriminativeOptions,
    terms: Array,
    images: Array,
    counts: Array,
    vectors: Array,
    slots: Array,
    workspace: Array,
    *,
    stream: int,
) -> None: ...
def discriminative_backward_cuda(
    embeddings: Array,
    offsets: Array | None,
    options: DiscriminativeOptions,
    grad_terms: Array,
    images: Array,
    counts: Array,
    vectors: Array,
    slots: Array,
    grad: Array,
    workspace: Array,
    *,
    stream: int,
) -> None: ...
def gather_at_forward_cuda(
    features: Array, points: Array, valid: Array | None, values: Array, *, linear: bool, stream: int
) -> None: ...
def gather_at_cuda_workspace(features: Array, points: Array, valid: Array | None, *, linear: bool) -> int: ...
def gather_at_backward_cuda(
    grad_values: Array,
    features: Array,
    points: Array,
    valid: Array | None,
    grad_features: Array | None,
    grad_points: Array | None,
    workspace: Array,
    *,
    linear: bool,
    stream: int,
) -> None: ...
def group_keypoints_cuda_workspace(heatmaps: Array) -> int: ...
def find_candidates_cuda(
    heatmaps: Array,
    tags: Array,
    max_people: int,
    peak_threshold: float,
    nms: int,
    candidates: Array,
    workspace: Array,
    *,
    stream: int,
) -> None: ...
def finish_people_cuda(
    heatmaps: Array,
    tags: Array,
    max_people: int,
    adjust: bool,
    refine: bool,
    pixels: Array,
    people: Array,
    num_people: Array,
    keypoints: Array,
    keypoint_scores: Array,
    visibility: Array,
    *,
    stream: int,
) -> None: ...
def group_on_sphere_cuda_workspace(points: Array, offsets: Array | None) -> int: ...
def group_on_sphere_cuda(
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    labels: Array,
    centers: Array,
    counts: Array,
    num_instances: Array,
    workspace: Array,
    *,
    threshold: float,
    min_size: int,
    nearest: bool,
    stream: int,
) -> None: ...
def instance_pool_workspace(features: Array, offsets: Array | None, reduce: Reduce, capacity: int) -> int: ...
def instance_pool_cuda(
    features: Array,
    labels: Array,
    offsets: Array | None,
    reduce: Reduce,
    pooled: Array,
    valid: Array,
    ids: Array,
    counts: Array,
    argmax: Array | None,
    num_instances: Array,
    workspace: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def instance_spread_workspace(features: Array, offsets: Array | None, capacity: int) -> int: ...
def instance_spread_cuda(
    grad: Array,
    labels: Array,
    offsets: Array | None,
    reduce: Reduce,
    grad_features: Array,
    workspace: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def instance_spread_max_cuda(
    grad: Array, argmax: Array, offsets: Array | None, grad_features: Array, *, stream: int
) -> None: ...
def label_statistics_cuda_workspace(labels: Array, capacity: int) -> int: ...
def label_statistics_cuda(
    labels: Array,
    ids: Array,
    boxes: Array,
    areas: Array,
    centroids: Array,
    num_instances: Array,
    workspace: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def mean_shift_cuda_workspace(
    embeddings: Array, mask: Array | None, offsets: Array | None, capacity: int, *, all_points: bool
) -> int: ...
def mean_shift_cuda(
    embeddings: Array,
    mask: Array | None,
    offsets: Array | None,
    labels: Array,
    centers: Array,
    counts: Array,
    num_instances: Array,
    iterations: Array,
    workspace: Array,
    *,
    bandwidth: float,
    all_points: bool,
    nearest: bool,
    min_size: int,
    max_iter: int,
    tol: float,
    stream: int,
) -> None: ...
def pairwise_similarity_cuda_workspace(embeddings: Array, indices: Array) -> int: ...
def pairwise_similarity_forward_cuda(
    embeddings: Array, indices: Array, losses: Array, slopes: Array | None, workspace: Array, *, stream: int
) -> None: ...
def pairwise_similarity_backward_cuda(
    grad_losses: Array, slopes: Array, indices: Array, grad: Array, *, stream: int
) -> None: ...
def recurrent_mean_shift_cuda_workspace(points: Array, offsets: Array | None, *, backward: bool) -> int: ...
def recurrent_mean_shift_forward_cuda(
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    shifted: Array,
    norms: Array,
    denominators: Array,
    workspace: Array,
    *,
    bandwidth: float,
    step: float,
    tolerance: float,
    stream: int,
) -> None: ...
def recurrent_mean_shift_backward_cuda(
    grad_shifted: Array,
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    shifted: Array,
    norms: Array,
    denominators: Array,
    grad: Array,
    workspace: Array,
    *,
    bandwidth: float,
    step: float,
    tolerance: float,
    stream: int,
) -> None: ...
def sample_pixels_cuda_workspace(
    labels: Array, offsets: Array | None, capacity: int, samples: int
) -> int: ...
def sample_pixels_cuda(
    labels: Array,
    offsets: Array | None,
    words: Array,
    indices: Array,
    valid: Array,
    workspace: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def seed_mask_iou_cuda_workspace(embeddings: Array, seeds: Array) -> int: ...
def seed_mask_iou_cuda(
    embeddings: Array,
    labels: Array,
    seeds: Array,
    squared_radii: list[float],
    iou: Array,
    workspace: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    stream: int,
) -> None: ...
def select_seeds_cuda_workspace(embeddings: Array) -> int: ...
def select_seeds_cuda(
    embeddings: Array,
    seediness: Array,
    mask: Array | None,
    indices: Array,
    scores: Array,
    workspace: Array,
    *,
    diversity: float,
    min_seediness: float,
    stream: int,
) -> None: ...
def grow_seeds_cuda_workspace(embeddings: Array, seeds: Array) -> int: ...
def grow_seeds_cuda(
    embeddings: Array,
    mask: Array | None,
    seeds: Array,
    scores: Array,
    squared_radii: Array,
    labels: Array,
    order: Array,
    counts: Array,
    num_instances: Array,
    workspace: Array,
    *,
    min_size: int,
    overlap: float,
    stream: int,
) -> None: ...

class DiscriminativeOptions:
    def __init__(
        self,
        *,
        delta_var: float,
        delta_dist: float,
        norm: int,
        pooled_variance: bool,
        background_push: bool,
        background: int | None,
        ignore_index: int | None,
        threads: int,
    ) -> None: ...

def discriminative_forward(
    embeddings: Array,
    labels: Array,
    offsets: Array | None,
    options: DiscriminativeOptions,
    terms: Array,
    first: Array | None = None,
    counts: Array | None = None,
    vectors: Array | None = None,
    runs: Array | None = None,
) -> None: ...
def discriminative_backward(
    embeddings: Array,
    labels: Array,
    offsets: Array | None,
    options: DiscriminativeOptions,
    grad_terms: Array,
    first: Array,
    counts: Array,
    vectors: Array,
    runs: Array,
    grad: Array,
) -> None: ...
def associative_embedding_forward(
    tags: Array,
    keypoints: Array | None,
    visible: Array,
    terms: Array,
    pixels: Array,
    means: Array,
    pushes: Array,
    *,
    hinge: bool,
    sigma: float,
    margin: float,
    threads: int,
) -> None: ...
def associative_embedding_backward(
    grad_terms: Array,
    tags: Array,
    pixels: Array,
    means: Array,
    pushes: Array,
    grad: Array,
    *,
    gathered: bool,
    threads: int,
) -> None: ...
def cosine_margin_forward(
    points: Array,
    labels: Array,
    offsets: Array | None,
    keys: Array | None,
    losses: Array,
    gradient: Array | None,
    *,
    fraction: float,
    most: int,
    margin: float,
    squared: bool,
    background: int | None,
    ignore_index: int | None,
    threads: int,
) -> None: ...

class MeanShiftResult:
    @property
    def largest(self) -> int: ...
    def copy(self, centers: Array, counts: Array, num_instances: Array, iterations: Array) -> None: ...

def mean_shift(
    embeddings: Array,
    mask: Array | None,
    offsets: Array | None,
    labels: Array,
    *,
    bandwidth: float,
    all_points: bool,
    nearest: bool,
    min_size: int,
    max_iter: int,
    tol: float,
    threads: int,
) -> MeanShiftResult: ...
def group_on_sphere(
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    labels: Array,
    *,
    threshold: float,
    min_size: int,
    nearest: bool,
    threads: int,
) -> MeanShiftResult: ...
def recurrent_mean_shift_forward(
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    shifted: Array,
    norms: Array,
    denominators: Array,
    *,
    bandwidth: float,
    step: float,
    tolerance: float,
    threads: int,
) -> None: ...
def recurrent_mean_shift_backward(
    grad_shifted: Array,
    points: Array,
    mask: Array | None,
    offsets: Array | None,
    shifted: Array,
    norms: Array,
    denominators: Array,
    grad: Array,
    *,
    bandwidth: float,
    step: float,
    tolerance: float,
    threads: int,
) -> None: ...
def group_keypoints(
    heatmaps: Array,
    tags: Array,
    max_people: int,
    peak_threshold: float,
    tag_threshold: float,
    nms: int,
    joint_order: list[int],
    adjust: bool,
    refine: bool,
    keypoints: Array,
    scores: Array,
    person_tags: Array,
    num_people: Array,
    keypoint_scores: Array,
    visibility: Array,
    *,
    threads: int,
) -> None: ...
def group_candidates(
    candidates: Array,
    max_people: int,
    tag_threshold: float,
    joint_order: list[int],
    pixels: Array,
    people: Array,
    num_people: Array,
    *,
    threads: int,
) -> None: ...
def match_keypoints(distances: list[float], scores: list[float], tag_threshold: float) -> list[int]: ...

class LabelStatisticsResult:
    @property
    def largest(self) -> int: ...
    def copy(
        self, ids: Array, boxes: Array, areas: Array, centroids: Array, num_instances: Array
    ) -> None: ...

def label_statistics(
    labels: Array, *, background: int | None, ignore_index: int | None, threads: int
) -> LabelStatisticsResult: ...

class Reduce:
    mean: Reduce
    sum: Reduce
    max: Reduce

class PoolInstances:
    def __init__(
        self,
        labels: Array,
        offsets: Array | None,
        *,
        background: int | None,
        ignore_index: int | None,
        threads: int,
    ) -> None: ...
    @property
    def largest(self) -> int: ...
    def pool(
        self,
        features: Array,
        offsets: Array | None,
        reduce: Reduce,
        pooled: Array,
        valid: Array,
        ids: Array,
        counts: Array,
        argmax: Array | None,
        *,
        threads: int,
    ) -> None: ...
    def spread(
        self, grad: Array, offsets: Array | None, reduce: Reduce, grad_features: Array, *, threads: int
    ) -> None: ...

def spread_max(
    grad: Array, argmax: Array, offsets: Array | None, grad_features: Array, *, threads: int
) -> None: ...
def fill_masks(labels: Array, ids: Array, masks: Array, *, threads: int) -> None: ...
def encode_masks(labels: Array, ids: Array, *, threads: int) -> list[bytes]: ...
def gather_at_forward(
    features: Array, points: Array, valid: Array | None, values: Array, *, linear: bool, threads: int
) -> None: ...
def gather_at_backward(
    grad_values: Array,
    features: Array,
    points: Array,
    valid: Array | None,
    grad_features: Array | None,
    grad_points: Array | None,
    *,
    linear: bool,
    threads: int,
) -> None: ...
def pairwise_similarity_forward(
    embeddings: Array, indices: Array, losses: Array, slopes: Array | None, *, threads: int
) -> None: ...
def pairwise_similarity_backward(
    grad_losses: Array, slopes: Array, indices: Array, grad: Array, *, threads: int
) -> None: ...

class SampleInstances:
    def __init__(
        self,
        labels: Array,
        offsets: Array | None,
        *,
        background: int | None,
        ignore_index: int | None,
        threads: int,
    ) -> None: ...
    @property
    def largest(self) -> int: ...
    def sample(self, words: Array, indices: Array, valid: Array, *, threads: int) -> None: ...

def seed_mask_iou(
    embeddings: Array,
    labels: Array,
    seeds: Array,
    squared_radii: list[float],
    iou: Array,
    *,
    background: int | None,
    ignore_index: int | None,
    threads: int,
) -> None: ...
def select_seeds(
    embeddings: Array,
    seediness: Array,
    mask: Array | None,
    indices: Array,
    scores: Array,
    *,
    diversity: float,
    min_seediness: float,
    threads: int,
) -> None: ...
def grow_seeds(
    embeddings: Array,
    mask: Array | None,
    seeds: Array,
    scores: Array,
    squared_radii: Array,
    labels: Array,
    order: Array,
    counts: Array,
    num_instances: Array,
    *,
    min_size: int,
    overlap: float,
    threads: int,
) -> None: ...
