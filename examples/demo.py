"""Trains a small network on crowded scenes, groups its embeddings into instances and draws what happened.

    pip install "instembed[demo,sklearn]"
    python examples/demo.py                            # about two minutes on two CPU cores
    python examples/demo.py --seconds 20 --output quick.png

The scenes are what boxes fail at: shapes that hide each other, rings around other shapes, thin bars that cut
each other in pieces, all in similar colours. Nothing is downloaded. All figures printed come from this run.
"""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import instembed
from instembed import reference

SIZE = 128
DELTA_VAR, DELTA_DIST = 0.5, 1.5  # the paper's margins; the second is also the bandwidth of the grouping
DIMENSIONS = 8
ROUGH_BANDWIDTH = 1.25  # a minute leaves pixels between the centres; the exact grouping may cut closer
PIXELS_PER_UNIT = 12.0
MIN_VISIBLE = 60  # pixels: what shows less of itself is left out of a scene
MIN_SIZE = 40  # pixels: smaller clusters are no instances
BATCH = 4
POOL = 320
HELD_OUT = 64
PEAK_LR = 6e-3
MIDDLE = 0.15  # of the training: the moment of the middle scatter

Array = npt.NDArray[np.float32]
Loss = Callable[[Tensor, Tensor], Tensor]


# Scenes


class Shape(NamedTuple):
    kind: str
    x: float
    y: float
    angle: float
    color: Array


COMPACT = ("ellipse", "rectangle", "ring", "star")
REACH = {"ellipse": 20, "rectangle": 26, "ring": 24, "star": 24, "bar": 66}  # pixels from the middle, at most


def signed_distance(shape: Shape, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """How far pixels lie outside of a shape (inside: negative), roughly in pixels. x, y: from its middle."""
    u = x * np.cos(shape.angle) + y * np.sin(shape.angle)
    v = y * np.cos(shape.angle) - x * np.sin(shape.angle)
    if shape.kind == "bar":
        return np.maximum(abs(u) - rng.uniform(28, 60), abs(v) - rng.uniform(1.8, 3.2))
    if shape.kind == "rectangle":
        return np.maximum(abs(u) - rng.uniform(7, 20), abs(v) - rng.uniform(6, 13))
    radius = rng.uniform(9, 18)
    if shape.kind == "ellipse":
        squeeze = rng.uniform(0.45, 1)
        return (np.hypot(u, v / squeeze) - radius) * squeeze
    if shape.kind == "ring":
        return abs(np.hypot(u, v) - radius) - rng.uniform(2.2, 3.5)
    arms = rng.integers(4, 7)
    return np.hypot(u, v) - radius * (0.9 + 0.32 * np.cos(arms * np.arctan2(v, u)))


def random_shapes(palette: list[Array], rng: np.random.Generator) -> list[Shape]:
    """Front to back."""
    shapes = []
    for _ in range(rng.integers(6, 12)):
        x, y = rng.uniform(6, SIZE - 6, 2)
        shapes.append(Shape(str(rng.choice(COMPACT)), x, y, rng.uniform(0, np.pi), palette[rng.integers(3)]))
    for _ in range(rng.integers(1, 3)):  # pairs of crossing bars in one colour: the lower one is cut in two
        x, y = rng.uniform(25, SIZE - 25, 2)
        angle, color = rng.uniform(0, np.pi), palette[rng.integers(3)]
        dx, dy = rng.uniform(-6, 6, 2)
        shapes.append(Shape("bar", x, y, angle, color))
        shapes.append(Shape("bar", x + dx, y + dy, angle + rng.uniform(0.5, 2.6), color))
    return [shapes[i] for i in rng.permutation(len(shapes))]


def random_scene(rng: np.random.Generator) -> tuple[Array, npt.NDArray[np.int64]]:
    """Image (SIZE, SIZE, 3) in 0..1 and labels (SIZE, SIZE): 0 is background."""
    hue = rng.uniform()
    palette = [
        np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), np.float32)
        for turn, saturation, value in rng.uniform((-0.13, 0.3, 0.5), (0.13, 0.75, 0.95), (3, 3)).tolist()
    ]
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    image = np.zeros((SIZE, SIZE, 3), np.float32)
    labels = np.zeros((SIZE, SIZE), np.int64)
    light = np.ones((SIZE, SIZE, 1), np.float32)  # the part of each pixel that nothing covers yet
    for shape in random_shapes(palette, rng):
        reach = REACH[shape.kind]
        window = tuple(slice(max(int(c) - reach, 0), int(c) + reach) for c in (shape.y, shape.x))
        x, y = xs[window] - np.float32(shape.x), ys[window] - np.float32(shape.y)
        distance = signed_distance(shape, x, y, rng)
        visible = (distance < 0) & (labels[window] == 0)
        if visible.sum() < MIN_VISIBLE:
            continue
        labels[window][visible] = labels.max() + 1
        tilt, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.012)
        shade = np.clip(1 + slope * (x * np.cos(tilt) + y * np.sin(tilt)), 0.6, 1.3)
        rim = 0.62 + 0.38 * np.clip(-distance / 1.6, 0, 1)  # darker: edges show between equal colours
        cover = np.clip(0.5 - distance, 0, 1)[..., None] * light[window]
        image[window] += cover * (shade * rim * rng.uniform(0.88, 1.12))[..., None] * shape.color
        light[window] -= cover
    tilt = rng.uniform(0, 2 * np.pi)
    ground = 1 + 0.004 * ((xs - SIZE / 2) * np.cos(tilt) + (ys - SIZE / 2) * np.sin(tilt))
    image += light * ground[..., None] * palette[rng.integers(3)] * rng.uniform(0.25, 0.6)
    image += rng.normal(0, 0.04, image.shape)
    return np.clip(image, 0, 1), labels


def random_scenes(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, SIZE, SIZE) and labels (count, SIZE, SIZE)."""
    images, labels = zip(*(random_scene(rng) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        np.stack(labels)
    )


def augmented(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One of the 8 flips and turns, and another order of the colour channels."""
    turns, flip = int(rng.integers(4)), bool(rng.integers(2))
    images = images[:, torch.from_numpy(rng.permutation(3))].rot90(turns, (-2, -1))
    labels = labels.rot90(turns, (-2, -1))
    if flip:
        images, labels = images.flip(-1), labels.flip(-1)
    return images, labels.contiguous()


# Network


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Network(nn.Module):
    """A small U-Net: images to DIMENSIONS embedding channels and a foreground logit.

    It works at half resolution, with 2x2 pixels in the channels: four times as many steps in a minute, and
    thin bars keep their edges.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 32, 48, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(4 * 3 + 2, widths[0]), block(widths[0], widths[0]))
        self.down = nn.ModuleList(
            nn.Sequential(block(a, b, stride=2), block(b, b)) for a, b in pairwise(widths)
        )
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Sequential(block(a, a), block(a, a)) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 4 * (DIMENSIONS + 1), 1)
        axis = torch.arange(SIZE).float()
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")) - (SIZE - 1) / 2
        self.register_buffer("grid", grid[None])
        self.grid: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        position = F.avg_pool2d(self.grid, 2).expand(len(images), -1, -1, -1) / SIZE
        x = self.stem(torch.cat([F.pixel_unshuffle(images - 0.5, 2), position], dim=1))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for narrow, up, skip in zip(reversed(self.narrow), reversed(self.up), reversed(skips), strict=True):
            x = up(skip + F.interpolate(narrow(x), scale_factor=2.0))
        outputs = F.pixel_shuffle(self.head(x), 2)
        # A convolution cannot tell two equal shapes apart: the pixel's place, added to two channels, does. A
        # shape is larger than the margins on that scale: the network still has to pull its pixels together.
        place = F.pad(self.grid / PIXELS_PER_UNIT, (0, 0, 0, 0, 0, DIMENSIONS - 2))
        return outputs[:, :DIMENSIONS] + place, outputs[:, DIMENSIONS]


def train(
    network: Network,
    images: Tensor,
    labels: Tensor,
    seconds: float,
    rng: np.random.Generator,
    watch: Callable[[float], None],
) -> int:
    """Trains by the clock and returns the number of steps. ``watch`` is called with the progress, 0 to 1."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=1e-2)
    criterion = instembed.DiscriminativeLoss(delta_var=DELTA_VAR, delta_dist=DELTA_DIST)
    network.train()
    start, progress, steps = perf_counter(), 0.0, 0
    with tqdm(total=round(seconds), desc="training", unit="s", bar_format=BAR) as bar:
        while progress < 1:
            watch(progress)
            for group in optimizer.param_groups:  # up over the first 5 %, then a cosine down to zero
                group["lr"] = PEAK_LR * min(progress / 0.05 + 0.05, 0.5 + 0.5 * np.cos(np.pi * progress))
            picked = torch.from_numpy(rng.choice(len(images), BATCH, replace=False))
            x, target = augmented(images[picked], labels[picked], rng)
            embeddings, foreground = network(x.contiguous(memory_format=torch.channels_last))
            loss = criterion(embeddings, target)
            loss = loss + F.binary_cross_entropy_with_logits(foreground, (target > 0).float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            steps += 1
            progress = (perf_counter() - start) / seconds
            bar.n = min(round(progress * seconds), round(seconds))
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    watch(1.0)
    return steps


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s, {postfix}"


@torch.inference_mode()
def predict(network: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D, H, W) and foreground (B, H, W) bool."""
    network.eval()
    outputs = [network(x.contiguous(memory_format=torch.channels_last)) for x in images.split(16)]
    network.train()
    embeddings, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return embeddings.contiguous(), logits > 0


def group(embeddings: Tensor, foreground: Tensor, exact: bool = False) -> instembed.Grouping:
    """Peeled clusters, the fast way, or exact: every pixel is shifted, which cleans up rough embeddings."""
    return instembed.mean_shift(
        embeddings,
        ROUGH_BANDWIDTH if exact else DELTA_DIST,
        mask=foreground,
        seeding="all" if exact else "peel",
        min_size=MIN_SIZE,
        leftovers="nearest",
    )


# Scores


def matches(found: Tensor, truth: Tensor) -> Tensor:
    """(found instances, true instances) bool: IoU above 0.5, which pairs each with at most one other."""
    n, m = int(found.max()) + 1, int(truth.max()) + 1
    overlap = torch.bincount((found * m + truth).flatten(), minlength=n * m).view(n, m).double()
    union = overlap.sum(1, keepdim=True) + overlap.sum(0, keepdim=True) - overlap
    return (overlap / union.clamp(min=1))[1:, 1:] > 0.5


class Score(NamedTuple):
    ap50: float
    counting_error: float


def score(found: Tensor, truth: Tensor) -> Score:
    hits = total = 0
    errors = []
    for a, b in zip(found, truth, strict=True):
        hit = matches(a, b)
        hits += int(hit.sum())
        total += sum(hit.shape) - int(hit.sum())
        errors.append(abs(hit.shape[0] - hit.shape[1]))
    return Score(hits / max(total, 1), sum(errors) / max(len(errors), 1))


# Timing: the same batch through each implementation


def eager_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The loss as vectorised eager PyTorch writes it best: one index_add per sum, no loop over instances.

    It needs what the op does not: dense ids, known beforehand.
    """
    images, dimensions = embeddings.shape[:2]
    slots = int(labels.max()) + 1
    ids = (labels.flatten(1) + slots * torch.arange(images)[:, None]).flatten()
    counts = torch.bincount(ids, minlength=images * slots).to(embeddings.dtype)
    present = (counts > 0).view(images, slots)[:, 1:]
    number = present.sum(1).clamp(min=1)  # (B,)

    points = embeddings.flatten(2).transpose(1, 2).reshape(-1, dimensions)
    sums = points.new_zeros(images * slots, dimensions).index_add(0, ids, points)
    means = sums / counts.clamp(min=1)[:, None]
    hinges = ((points - means[ids]).norm(dim=1) - DELTA_VAR).clamp(min=0).square()
    spread = points.new_zeros(images * slots).index_add(0, ids, hinges) / counts.clamp(min=1)
    variance = (spread.view(images, slots)[:, 1:] * present).sum(1) / number

    centers = means.view(images, slots, dimensions)[:, 1:]
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(slots - 1, dtype=torch.bool)
    b, i, j = pairs.nonzero(as_tuple=True)
    gaps = (2 * DELTA_DIST - (centers[b, i] - centers[b, j]).norm(dim=1)).clamp(min=0).square()
    distance = points.new_zeros(images).index_add(0, b, gaps) / (number * (number - 1)).clamp(min=1)
    lengths = torch.where(present, centers.square().sum(2), 1.0).sqrt() * present
    return (variance + distance + 0.001 * lengths.sum(1) / number).mean()


def median_ms(call: Callable[[], object], seconds: float = 1.5) -> float:
    call()
    times: list[float] = []
    end = perf_counter() + seconds
    while perf_counter() < end or len(times) < 3:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return 1e3 * float(np.median(times))


def time_losses(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Milliseconds a frame, forward and backward, of implementations that give the same value."""
    x = embeddings.clone().requires_grad_()
    losses: dict[str, Loss] = {
        "instembed": instembed.discriminative_loss,
        "vectorised PyTorch": eager_loss,
        "loop over instances": reference.discriminative_loss,
    }
    expected = eager_loss(x, labels)
    for name, loss in losses.items():
        torch.testing.assert_close(loss(x, labels), expected, rtol=1e-4, atol=1e-5, msg=f"{name} differs")

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(x, labels), x)

    return {name: median_ms(step(loss)) / len(x) for name, loss in losses.items()}


class Comparison(NamedTuple):
    """scikit-learn's mean shift beside ours (peeling, same bandwidth), on the same frames."""

    frames: int
    milliseconds: float  # scikit-learn's, a frame
    agreement: float  # adjusted Rand index of the two partitions
    theirs: Score
    ours: Score


def compare_groupings(
    embeddings: Tensor, foreground: Tensor, truth: Tensor, seconds: float
) -> Comparison | None:
    """As many frames as fit in the time; None without scikit-learn."""
    try:
        from sklearn.cluster import MeanShift
        from sklearn.metrics import adjusted_rand_score
    except ImportError:
        return None
    theirs: list[Tensor] = []
    times: list[float] = []
    ours = group(embeddings, foreground).labels
    end = perf_counter() + seconds
    for frame, mask in zip(embeddings, foreground, strict=True):
        points = frame[:, mask].t().double().numpy()
        start = perf_counter()
        labels = MeanShift(bandwidth=DELTA_DIST, bin_seeding=True).fit_predict(points) if len(points) else []
        times.append(1e3 * (perf_counter() - start))
        found = torch.as_tensor(labels, dtype=torch.int64) + 1
        theirs.append(torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, found))
        if perf_counter() > end:
            break
    n = len(times)
    agreement = [
        adjusted_rand_score(a[mask].numpy(), b[mask].numpy())
        for a, b, mask in zip(ours[:n], theirs, foreground[:n], strict=True)
    ]
    return Comparison(
        n,
        float(np.median(times)),
        float(np.mean(agreement)),
        score(torch.stack(theirs), truth[:n]),
        score(ours[:n], truth[:n]),
    )


# Picture


class Moment(NamedTuple):
    """The watched scene's embeddings at one point of the training."""

    seconds: float
    embeddings: Tensor  # (D, H, W)


INK, DIM, PAPER = "#f2f2ee", "#9aa0a8", "#15171c"


def distinct_colors(count: int) -> Array:
    """(count, 3) RGB, bright enough for a dark page, each as far from the others as can be in CIELAB."""
    from skimage.color import rgb2lab

    levels = np.linspace(0.1, 1, 10)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = rgb2lab(candidates[:, None])[:, 0]
    keep = (lab[:, 0] > 50) & (lab[:, 0] < 88) & (np.hypot(lab[:, 1], lab[:, 2]) > 38)
    candidates, lab = candidates[keep], lab[keep]
    picked = [0]
    nearest = np.full(len(lab), np.inf)
    while len(picked) < count:
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[picked[-1]], axis=1))
        picked.append(int(nearest.argmax()))
    return candidates[picked].astype(np.float32)


def painted(labels: npt.NDArray[np.int64], colors: Array) -> Array:
    """Label map to RGB with dark outlines; drawn at four times the size so that outlines stay thin."""
    from skimage.segmentation import find_boundaries

    large = np.kron(labels, np.ones((4, 4), np.int64))
    picture = np.concatenate([hex_rgb("#0c0d10")[None], colors])[large]
    picture[find_boundaries(large, mode="inner") & (large > 0)] *= 0.45
    return picture


def hex_rgb(text: str) -> Array:
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32)


def principal_axes(points: Tensor, count: int) -> Tensor:
    """(D, count) orthonormal: a projection on them never enlarges a distance."""
    return torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:count].t()


def embedding_colors(embeddings: Tensor, mask: Tensor) -> Array:
    """(H, W, 3): the three principal components as red, green and blue; background dark."""
    points = embeddings[:, mask].t()
    parts = points @ principal_axes(points, 3)
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    picture = torch.from_numpy(hex_rgb("#0c0d10")).repeat(*mask.shape, 1)
    picture[mask] = ((parts - low) / (high - low)).clamp(0, 1) * 0.85 + 0.12
    return picture.numpy()


def found_colors(found: Tensor, truth: Tensor, colors: Array) -> tuple[Array, int]:
    """Each found instance in its true match's colour, else in light grey; and the number of matches."""
    hit = matches(found, truth).numpy()
    picked = np.where(hit.any(1, keepdims=True), colors[hit.argmax(1)], np.float32(0.82))
    return picked.astype(np.float32), int(hit.sum())


def draw(
    path: Path, image: Tensor, truth: Tensor, found: Tensor, mask: Tensor, moments: list[Moment]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = distinct_colors(int(truth.max()))
    found_palette, hits = found_colors(found, truth, colors)
    final = moments[-1].embeddings
    panels = [
        ("Image", "a scene the network never saw", image.permute(1, 2, 0).numpy()),
        ("Embedding", f"{DIMENSIONS} channels a pixel, as colour", embedding_colors(final, mask)),
        (
            "Instances found",
            f"{hits} of {int(truth.max())} right (IoU > 0.5)",
            painted(found.numpy(), found_palette),
        ),
        ("Ground truth", "one colour an instance", painted(truth.numpy(), colors)),
    ]
    figure = plt.figure(figsize=(16, 10.4), facecolor=PAPER)
    top = figure.add_gridspec(1, 4, left=0.012, right=0.988, top=0.925, bottom=0.565, wspace=0.04)
    low = figure.add_gridspec(1, 3, left=0.012, right=0.988, top=0.475, bottom=0.055, wspace=0.03)
    for i, (title, note, picture) in enumerate(panels):
        axes = figure.add_subplot(top[i])
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        caption(axes, title, note)
    centers = torch.stack([final[:, truth == c].mean(1) for c in range(1, len(colors) + 1)])
    plane = principal_axes(centers, 2)
    all_axes = [figure.add_subplot(low[i]) for i in range(3)]
    for axes, moment in zip(all_axes, moments, strict=True):
        scatter(axes, moment, truth, colors, plane, centers.mean(0))
        caption(axes, "Before training" if moment.seconds == 0 else f"After {moment.seconds:.0f} s", "")
    frame_alike(all_axes)
    legend(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor=PAPER)
    plt.close(figure)


def caption(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=20, weight="bold", pad=30 if note else 10)
    axes.annotate(note, (0, 1), (1, 9), "axes fraction", "offset points", color=DIM, fontsize=14)


def scatter(axes: Any, moment: Moment, truth: Tensor, colors: Array, plane: Tensor, origin: Tensor) -> None:
    """One dot a pixel in the plane of the final centres, and the margins round each instance's mean."""
    from matplotlib.patches import Circle

    axes.set_facecolor("#0c0d10")
    inside = truth > 0
    dots = (moment.embeddings[:, inside].t() - origin) @ plane
    order = torch.randperm(len(dots), generator=torch.Generator().manual_seed(0))  # no instance on top
    owners = truth[inside] - 1
    axes.scatter(*dots[order].t(), s=3, c=colors[owners[order]], alpha=0.45, linewidths=0, rasterized=True)
    for c, color in enumerate(colors):
        x, y = dots[owners == c].mean(0).tolist()
        axes.add_patch(Circle((x, y), DELTA_DIST, fill=False, ec=color, ls=(0, (4, 3)), lw=1.0, alpha=0.75))
        axes.add_patch(Circle((x, y), DELTA_VAR, fill=False, ec="white", lw=1.1, alpha=0.9))
        axes.plot(x, y, "o", ms=6, mfc=color, mec="white", mew=1.2)
    axes.set(xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_color("#343841")


def frame_alike(all_axes: list[Any]) -> None:
    """The same limits everywhere, so that the circles have one size, in the panels' shape."""
    boxes = np.stack([[axes.get_xlim(), axes.get_ylim()] for axes in all_axes])
    low, high = boxes[:, :, 0].min(0), boxes[:, :, 1].max(0)
    middle, half = (low + high) / 2, (high - low) / 2
    width, height = all_axes[0].get_window_extent().size
    half = max(half[0], half[1] * width / height) * np.array([1, height / width])
    for axes in all_axes:
        axes.set(
            xlim=(middle[0] - half[0], middle[0] + half[0]), ylim=(middle[1] - half[1], middle[1] + half[1])
        )


def legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], ls="", marker="o", ms=4, color=DIM, label="pixel, in its instance's colour"),
        Line2D([], [], ls="", marker="o", ms=8, mfc=DIM, mec="white", mew=1.2, label="instance mean"),
        Line2D([], [], color="white", lw=1.4, label=f"delta_var {DELTA_VAR}: pixels are pulled inside"),
        Line2D(
            [],
            [],
            color=DIM,
            lw=1.4,
            ls=(0, (4, 3)),
            label=f"delta_dist {DELTA_DIST}: kept apart (in all 8-D)",
        ),
    ]
    figure.legend(
        handles=marks,
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=12.5,
        labelcolor=INK,
        columnspacing=2.4,
    )


# The job


def fragmentation(labels: Tensor) -> int:
    """Instances of a scene that others have cut in pieces of some size."""
    from skimage.measure import label

    cut = 0
    for c in range(1, int(labels.max()) + 1):
        sizes = np.sort(np.bincount(label((labels == c).numpy(), connectivity=2).flat)[1:])[::-1]
        cut += len(sizes) > 1 and int(sizes[1]) >= MIN_SIZE
    return cut


def connected_components(foreground: Tensor) -> Tensor:
    from skimage.measure import label

    return torch.from_numpy(np.stack([label(mask.numpy(), connectivity=1) for mask in foreground])).long()


def print_scores(found: dict[str, Tensor], truth: Tensor) -> None:
    print(f"\n{len(truth)} held-out scenes, {int(truth.amax((1, 2)).sum())} instances")
    print(f"{'':40}{'AP50':>8}{'counting error':>17}")
    for name, labels in found.items():
        ap50, error = score(labels, truth)
        print(f"{name:40}{ap50:8.3f}{error:17.2f}")


def print_times(rows: list[tuple[str, float, float]]) -> None:
    print(f"\nmilliseconds a {SIZE} x {SIZE} frame, {DIMENSIONS}-D, {torch.get_num_threads()} threads")
    for name, ms, best in rows:
        print(f"{name:46}{ms:9.2f}{ms / best:9.1f}x")


def report(network: Network, images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Prints the figures; returns the instances of the exact grouping and the foreground."""
    embeddings, foreground = predict(network, images)
    peeled = group(embeddings, foreground).labels
    exact = group(embeddings, foreground, exact=True).labels
    names = 'mean shift, seeding="peel"', 'mean shift, seeding="all"'
    components = connected_components(foreground)
    print_scores(
        {names[0]: peeled, names[1]: exact, "connected components of the foreground": components}, truth
    )

    few = slice(0, 16)
    losses = time_losses(embeddings[few], truth[few])
    rows = [(f"loss and its gradient, {name}", ms, losses["instembed"]) for name, ms in losses.items()]
    peel_ms, all_ms = (
        median_ms(lambda e=e: group(embeddings[few], foreground[few], exact=e)) / 16  # type: ignore[misc]
        for e in (False, True)
    )
    rows += [(names[0], peel_ms, peel_ms), (names[1], all_ms, peel_ms)]
    compared = compare_groupings(embeddings, foreground, truth, seconds=12)
    if compared is None:
        print_times(rows)
        print("scikit-learn is not installed, so there is nothing to compare with: pip install scikit-learn")
    else:
        print_times([*rows, ("scikit-learn's MeanShift, bin_seeding=True", compared.milliseconds, peel_ms)])
        print(
            f"on {compared.frames} frames scikit-learn's AP50 is {compared.theirs.ap50:.3f}, peeling's "
            f"{compared.ours.ap50:.3f}; adjusted Rand index of the two {compared.agreement:.3f}"
        )
    return exact, foreground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="training time (default: 60)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = perf_counter()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    print(f"drawing {POOL} scenes to train on and {HELD_OUT} held-out ones")
    images, labels = random_scenes(POOL, rng)
    held_images, held_labels = random_scenes(HELD_OUT, rng)
    # Chosen before training: of the scenes that a picture has room for, the one most cut in pieces.
    readable = [i for i in range(HELD_OUT) if held_labels[i].max() <= 13]
    shown = max(readable, key=lambda i: fragmentation(held_labels[i]))

    network = Network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    pending = [0.0, MIDDLE, 1.0]
    moments: list[Moment] = []

    def watch(progress: float) -> None:
        if pending and progress >= pending[0]:
            pending.pop(0)
            embeddings, _ = predict(network, held_images[shown : shown + 1])
            moments.append(Moment(progress * options.seconds, embeddings[0]))

    steps = train(network, images, labels, options.seconds, rng, watch)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{steps} steps of {BATCH} scenes, {parameters / 1000:.0f}k parameters")
    found, foreground = report(network, held_images, held_labels)
    draw(options.output, held_images[shown], held_labels[shown], found[shown], foreground[shown], moments)
    print(f"\nwrote {options.output}; {perf_counter() - begin:.0f} s in total")


if __name__ == "__main__":
    main()
