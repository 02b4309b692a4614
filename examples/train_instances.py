"""Train instance segmentation by pixel embeddings on a folder of images, in minutes, on a CPU.

A folder holds pairs ``X_image.png`` (8-bit grey or RGB, any size) and ``X_labels.png`` (8- or 16-bit
instance ids, 0 = background). To train, evaluate and keep the model:

    python train_instances.py --train DIR --val DIR --report report.json --checkpoint model.pt

and to segment one image with it:

    python train_instances.py --predict image.png --checkpoint model.pt --output DIR

The recipe: a small U-Net gives every pixel an embedding, a foreground score and what else the method wants to
know. Two channels of the embedding may start as the pixel's own coordinates, so that the network only learns
by how much to move each pixel towards the middle of its instance, and far instances are apart from the first
step. ``--method`` names the loss of the embedding and the grouping that suits it: one module each in
``methods``. ``discriminative`` is ``instembed.discriminative_loss`` and ``instembed.mean_shift``;
``deep-metric`` is ``instembed.pairwise_similarity_loss``, ``instembed.seediness_loss`` and
``instembed.grow_seeds``.

Needs ``pip install instembed[demo]``.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from methods import METHODS, Batch, Instances, Maps, Method
from methods.common import cross_entropy
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area as mask_area
from scipy import ndimage
from skimage.color import label2rgb
from skimage.measure import label as connected_components
from skimage.segmentation import mark_boundaries
from torch import Tensor, nn
from tqdm import tqdm

import instembed

# ----------------------------------------------------------------------------------------------- settings


@dataclass
class Settings:
    """What the methods have in common. Lengths are in pixels of the input image."""

    minutes: float
    seed: int = 0
    precision: str = "float32"  # of the convolutions in training
    # network
    widths: tuple[int, ...] = (32, 48, 64, 96, 96)
    # training
    crop: int = 192
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05  # fraction of the training time
    zoom: tuple[float, float] = (0.7, 1.5)
    clip_gradient: float = 5.0
    # inference
    foreground: float = 0.5  # least probability of a foreground pixel
    min_size: int = 24  # least number of pixels of an instance
    fill_holes: bool = False


# --------------------------------------------------------------------------------------------------- data


class Sample(NamedTuple):
    name: str
    image: Tensor  # (H, W) in 0..1
    labels: Tensor  # (H, W) int64, 0 = background, 1..K
    depth: Tensor  # (H, W) in 0..1


def read_image(path: Path) -> Tensor:
    """Grey values in 0..1 between the image's own percentiles, bright objects on a dark background."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32).mean(axis=2)
    low, high = np.percentile(pixels, [1, 99.8])
    scaled = np.clip((pixels - low) / max(high - low, 1), 0, 1)
    if np.median(scaled) > 0.5:  # a bright field: objects are the dark part
        scaled = 1 - scaled
    return torch.from_numpy(scaled.astype(np.float32))


def read_labels(path: Path) -> np.ndarray:
    """Instance ids, renumbered 1..K."""
    raw = np.asarray(Image.open(path))
    if raw.ndim != 2:
        raise ValueError(f"{path}: instance ids need one channel, this image has shape {raw.shape}")
    ids = np.unique(raw[raw != 0])
    return np.where(raw == 0, 0, 1 + np.searchsorted(ids, raw))


def depth_map(labels: np.ndarray) -> np.ndarray:
    """Distance to the border of the pixel's instance, over the largest such distance in the instance."""
    padded = np.pad(labels, 1, mode="edge")  # the edge of the image is not a border
    inside = padded > 0
    for axis in (0, 1):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis) == padded
    distance = ndimage.distance_transform_edt(inside)[1:-1, 1:-1] + 0.5  # border pixels: half a pixel
    largest = ndimage.maximum(distance, labels, np.arange(labels.max() + 1))
    return np.where(labels > 0, distance / largest[labels], 0).astype(np.float32)


def load_folder(folder: Path) -> list[Sample]:
    """Every pair of the folder, in memory. Raises FileNotFoundError for no pairs or half a pair."""
    images = {path.name.removesuffix("_image.png"): path for path in folder.glob("*_image.png")}
    labels = {path.name.removesuffix("_labels.png"): path for path in folder.glob("*_labels.png")}
    if not images and not labels:
        raise FileNotFoundError(f"{folder}: no X_image.png / X_labels.png pairs found")
    for name in sorted(images.keys() ^ labels.keys()):
        kind = "labels" if name in images else "image"
        raise FileNotFoundError(f"{folder}: {name}_{kind}.png is missing")
    samples = []
    for name in sorted(images):
        image, ids = read_image(images[name]), read_labels(labels[name])
        if image.shape != ids.shape:
            raise ValueError(f"{images[name]}: image is {tuple(image.shape)} but its labels are {ids.shape}")
        samples.append(Sample(name, image, torch.from_numpy(ids), torch.from_numpy(depth_map(ids))))
    return samples


def crop_grid(sample: Sample, size: int, zoom: float, rng: np.random.Generator) -> Tensor:
    """A sampling grid (1, size, size, 2) of a turned, mirrored and zoomed square, mostly near an instance."""
    height, width = sample.labels.shape
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    foreground = sample.labels.flatten().nonzero()
    if len(foreground) and rng.random() < 0.7:
        y, x = divmod(int(foreground[rng.integers(len(foreground))]), width)
    reach = size / 2 / zoom
    y, x = (
        np.clip(
            centre + rng.uniform(-reach, reach) * 2 / 3,
            min(reach, extent / 2),
            max(extent - reach, extent / 2),
        )
        for centre, extent in ((y, height), (x, width))
    )
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    steps = torch.arange(size) - (size - 1) / 2
    v, u = torch.meshgrid(steps, steps * rng.choice([-1.0, 1.0]), indexing="ij")
    grid_y, grid_x = y + cos * v + sin * u, x - sin * v + cos * u
    return torch.stack([(2 * grid_x + 1) / width - 1, (2 * grid_y + 1) / height - 1], dim=-1)[None].float()


def augmented_crop(sample: Sample, settings: Settings, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """The fields of one Batch entry, each (n, n)."""
    low, high = np.log(settings.zoom)
    grid = crop_grid(sample, settings.crop, math.exp(rng.uniform(low, high)), rng)

    def resample(values: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
        return F.grid_sample(values[None, None].float(), grid, mode, padding, align_corners=False)[0, 0]

    labels = resample(sample.labels, "nearest").long()
    depth = resample(sample.depth) * (labels > 0)
    valid = (grid[0].abs() <= 1).all(dim=-1).float()
    image = resample(sample.image, padding="reflection").clamp(0, 1)
    image = image ** math.exp(rng.uniform(-0.5, 0.5)) * math.exp(rng.uniform(-0.35, 0.15))
    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    image = (image + noise * rng.uniform(0, 0.03)).clamp(0, 1)
    return image, labels, depth, valid


class Crops:
    """Draws training batches. Images with many instances come more often, by the root of their number."""

    def __init__(self, samples: list[Sample], settings: Settings) -> None:
        self.samples, self.settings = samples, settings
        self.rng = np.random.default_rng(settings.seed)
        weights = np.sqrt([max(1, int(sample.labels.max())) for sample in samples])
        self.probabilities = weights / weights.sum()

    def draw(self) -> Batch:
        chosen = self.rng.choice(len(self.samples), self.settings.batch, p=self.probabilities)
        crops = [augmented_crop(self.samples[i], self.settings, self.rng) for i in chosen]
        return Batch(*(torch.stack(field) for field in zip(*crops, strict=True)))


# ------------------------------------------------------------------------------------------------ network


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class EmbeddingNet(nn.Module):
    """A U-Net on 2x2 blocks of pixels: four times fewer positions than pixels, and full-size maps out."""

    def __init__(self, method: Method, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.coordinate_unit = method.coordinate_unit
        self.split = [1, method.own_maps, method.channels]
        self.multiple = 2 ** len(widths)  # sides of the input must be a multiple of this
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip((8, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(double_conv(a + b, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(widths[0], 4 * sum(self.split), 1)

    def features(self, image: Tensor) -> Tensor:
        # The root lifts dim instances beside bright ones.
        x = F.pixel_unshuffle(torch.stack([image, image.sqrt()], dim=1), 2)
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        for block in reversed(self.up):
            x = block(torch.cat([skips.pop(), F.interpolate(x, scale_factor=2.0)], dim=1))
        return x

    def forward(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Maps:
        """Image (B, H, W) in 0..1; dtype is the precision of the convolutions."""
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = self.features(image)
        maps = F.pixel_shuffle(self.head(features.float()), 2)
        foreground, own, embeddings = maps.split(self.split, dim=1)
        if self.coordinate_unit is not None:
            rows, columns = ((torch.arange(n) - n / 2) / self.coordinate_unit for n in image.shape[1:])
            coordinates = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
            embeddings = torch.cat([embeddings[:, :2] + coordinates, embeddings[:, 2:]], dim=1)
        return Maps(embeddings, foreground[:, 0], own)


# ----------------------------------------------------------------------------------------------- training


def faster_precision(model: nn.Module, settings: Settings) -> str:
    """bfloat16 doubles the speed where the hardware has it, and is slower where it is emulated: try both."""
    trial = copy.deepcopy(model)  # so that the trial leaves no trace in the batch norm's statistics
    image = torch.full((settings.batch, settings.crop, settings.crop), 0.5)
    seconds: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        for _ in range(3):
            start = time.perf_counter()
            maps = trial(image, getattr(torch, precision))
            torch.stack([output.sum() for output in maps]).sum().backward()
            elapsed = time.perf_counter() - start
            seconds[precision] = min(elapsed, seconds.get(precision, elapsed))
    return min(seconds, key=lambda precision: seconds[precision])


def learning_rate(progress: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine to zero. Progress is the elapsed fraction of the training time."""
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * min(rest, 1))) / 2


def train(samples: list[Sample], method: Method, settings: Settings) -> tuple[EmbeddingNet, dict[str, float]]:
    """A model trained for settings.minutes of wall time, and what it took."""
    torch.manual_seed(settings.seed)
    model = EmbeddingNet(method, settings.widths)
    start = time.perf_counter()
    settings.precision = faster_precision(model, settings)
    dtype = getattr(torch, settings.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=settings.weight_decay)
    crops = Crops(samples, settings)
    budget, steps, elapsed = 60 * settings.minutes, 0, 0.0
    with tqdm(total=round(budget), unit="s", desc="training") as bar:
        while (elapsed := time.perf_counter() - start) < budget or not steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(elapsed / budget, settings)
            batch = crops.draw()
            maps = model(batch.image, dtype)
            terms = method.losses(maps, batch, elapsed / budget)
            target = (batch.labels > 0).float()
            terms["foreground"] = 2 * cross_entropy(maps.foreground, target, batch.valid)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_gradient)
            optimizer.step()
            steps += 1
            bar.update(int(elapsed) - bar.n)
            if steps % 20 == 0:
                bar.set_postfix({name: f"{term.item():.3f}" for name, term in terms.items()}, steps=steps)
        bar.update(bar.total - bar.n)
    return model.eval(), {"training_seconds": elapsed, "training_steps": steps}


# ---------------------------------------------------------------------------------------------- inference


def predict_maps(model: EmbeddingNet, image: Tensor) -> Maps:
    """The maps of one image (H, W) of any size, without a batch dimension."""
    height, width = image.shape
    padding = (0, -width % model.multiple, 0, -height % model.multiple)
    # "replicate", since "reflect" refuses images smaller than the padding
    maps = model(F.pad(image[None, None], padding, mode="replicate")[0])
    return Maps(*(output[0, ..., :height, :width] for output in maps))


def clean_up(instances: Instances, settings: Settings) -> Instances:
    """Splits instances into their connected parts, drops the small ones, numbers the others 1..K."""
    labels = instances.labels.numpy()
    parts = connected_components(labels, background=0, connectivity=1)
    origin = np.zeros(parts.max() + 1, dtype=np.int64)
    origin[parts] = labels
    if settings.fill_holes:
        for index, box in enumerate(ndimage.find_objects(parts), start=1):
            holes = ndimage.binary_fill_holes(parts[box] == index) & (parts[box] == 0)
            parts[box][holes] = index
    keep = np.bincount(parts.ravel()) >= settings.min_size
    keep[0] = False
    numbered = (np.cumsum(keep) * keep)[parts]
    return Instances(torch.from_numpy(numbered), instances.scores[origin[keep] - 1])


class Segmentation(NamedTuple):
    instances: Instances
    maps: Maps
    network_ms: float
    grouping_ms: float


@torch.no_grad()
def segment(model: EmbeddingNet, method: Method, image: Tensor, settings: Settings) -> Segmentation:
    start = time.perf_counter()
    maps = predict_maps(model, image)
    after_network = time.perf_counter()
    instances = method.group(maps, maps.foreground.sigmoid() > settings.foreground)
    after_grouping = time.perf_counter()
    network_ms, grouping_ms = 1e3 * (after_network - start), 1e3 * (after_grouping - after_network)
    return Segmentation(clean_up(instances, settings), maps, network_ms, grouping_ms)


# --------------------------------------------------------------------------------------------- evaluation


def count_matches(predicted: np.ndarray, truth: np.ndarray, threshold: float = 0.5) -> tuple[int, int, int]:
    """TP, FP, FN of two label maps 0..K. Only one partner can have IoU > 0.5, so nothing needs assigning."""
    assert threshold >= 0.5
    rows, columns = int(truth.max()) + 1, int(predicted.max()) + 1
    pairs = truth.ravel().astype(np.int64) * columns + predicted.ravel()
    overlap = np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)
    union = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0, keepdims=True) - overlap
    matched = int((overlap > threshold * union)[1:, 1:].sum())
    return matched, columns - 1 - matched, rows - 1 - matched


def average_precision(tp: int, fp: int, fn: int) -> float:
    return tp / max(1, tp + fp + fn)


def coco_scores(predicted: Sequence[Instances], truth: Sequence[Tensor]) -> dict[str, float]:
    """COCO's average precision of masks: over IoU 0.5 to 0.95, at 0.5 and at 0.75; -1 without any truth.

    COCO looks at the 100 best detections of an image; an image of cells has more, and here all count.
    """

    def rows(labels: Sequence[Tensor], scores: Sequence[Tensor | None]) -> list[dict[str, Any]]:
        found = [
            instembed.detections(image, of_image, masks=False, rle=True)[0]
            for image, of_image in zip(labels, scores, strict=True)
        ]
        return instembed.coco_results(found, range(len(found)))

    annotations = rows(truth, [None] * len(truth))
    for number, row in enumerate(annotations, start=1):
        row |= {"id": number, "area": int(mask_area(row["segmentation"])), "iscrowd": 0}
    results = rows([image.labels for image in predicted], [image.scores for image in predicted])
    if not results:
        return dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it talks a lot
        coco = COCO()
        images = [{"id": b, "height": len(labels), "width": len(labels[0])} for b, labels in enumerate(truth)]
        coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.maxDets = [max(len(image.scores) for image in predicted)]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 0]  # (IoU thresholds, recalls)
    means = {"AP": precision.mean(), "AP50": precision[0].mean(), "AP75": precision[5].mean()}
    return {name: float(mean) for name, mean in means.items()}


def evaluate(
    model: EmbeddingNet, method: Method, samples: list[Sample], settings: Settings
) -> dict[str, Any]:
    """AP50 over all instances and for every image, COCO's average precision, counting errors and times."""
    per_image, totals = [], np.zeros(3, dtype=np.int64)
    predicted: list[Instances] = []
    network_ms, grouping_ms = [], []
    for sample in tqdm(samples, unit="image", desc="evaluation"):
        result = segment(model, method, sample.image, settings)
        predicted.append(result.instances)
        tp, fp, fn = count_matches(result.instances.labels.numpy(), sample.labels.numpy())
        totals += (tp, fp, fn)
        network_ms.append(result.network_ms)
        grouping_ms.append(result.grouping_ms)
        ap50 = average_precision(tp, fp, fn) if tp + fp + fn else 1.0  # nothing there, nothing found
        counts = {"instances": tp + fn, "predicted": tp + fp}
        per_image.append({"name": sample.name, "ap50": ap50, "tp": tp, "fp": fp, "fn": fn, **counts})
    tp, fp, fn = (int(total) for total in totals)
    errors = [abs(entry["predicted"] - entry["instances"]) for entry in per_image]
    return {
        "ap50": average_precision(tp, fp, fn),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "coco": coco_scores(predicted, [sample.labels for sample in samples]),
        "mean_count_error": float(np.mean(errors)),  # instances per image, absolute
        "relative_count_error": sum(errors) / max(1, tp + fn),
        "network_ms_per_frame": float(np.median(network_ms)),
        "grouping_ms_per_frame": float(np.median(grouping_ms)),
        "per_image": per_image,
    }


# ------------------------------------------------------------------------------------------- command line


def describe(name: str, method: Method, settings: Settings) -> dict[str, Any]:
    """What a checkpoint must remember beside the weights, and a report shows."""
    return {"method": {"name": name, **asdict(method)}, "settings": asdict(settings)}


def load_checkpoint(path: Path) -> tuple[EmbeddingNet, Method, Settings]:
    checkpoint = torch.load(path, weights_only=True)
    settings = Settings(**checkpoint["settings"])
    method = METHODS[checkpoint["method"].pop("name")](**checkpoint["method"])
    model = EmbeddingNet(method, settings.widths)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), method, settings


def save_prediction(path: Path, image: Tensor, labels: Tensor, shown: Sequence[Tensor], folder: Path) -> None:
    """NAME_labels.png, 16-bit ids, and NAME_overlay.png: instances in colour on the image, then the maps."""
    folder.mkdir(parents=True, exist_ok=True)
    name = path.stem.removesuffix("_image")
    ids = labels.numpy()
    Image.fromarray(ids.astype(np.uint16)).save(folder / f"{name}_labels.png")
    colours = label2rgb(ids, image.sqrt().numpy(), alpha=0.35, bg_label=0)
    panels = [mark_boundaries(colours, ids, color=(1, 1, 1)), *map(heat, shown)]
    picture = (255 * np.concatenate(panels, axis=1)).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(folder / f"{name}_overlay.png")


def heat(values: Tensor) -> np.ndarray:
    """(H, W) in 0..1 to colours (H, W, 3), from black over red and yellow to white."""
    return (3 * values[..., None] - torch.arange(3)).clamp(0, 1).numpy()


def train_and_report(args: argparse.Namespace) -> None:
    method = METHODS[args.method]()
    settings = Settings(args.minutes or method.minutes, args.seed, fill_holes=args.fill_holes)
    train_samples, val_samples = load_folder(args.train), load_folder(args.val)
    print(f"{len(train_samples)} training images, {len(val_samples)} validation images")
    model, effort = train(train_samples, method, settings)
    if args.checkpoint:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        described = describe(args.method, method, settings)
        torch.save({**described, "model": model.state_dict()}, args.checkpoint)
    result = evaluate(model, method, val_samples, settings)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    report = {**result, **effort, **describe(args.method, method, settings), "machine": machine}
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"AP50 {result['ap50']:.3f} (TP {result['tp']}, FP {result['fp']}, FN {result['fn']}), "
        f"COCO AP {result['coco']['AP']:.3f} "
        f"after {effort['training_seconds']:.0f} s of training, "
        f"{result['grouping_ms_per_frame']:.1f} ms per frame for grouping; report in {args.report}"
    )


def predict(args: argparse.Namespace) -> None:
    model, method, settings = load_checkpoint(args.checkpoint)
    settings.fill_holes |= args.fill_holes
    image = read_image(args.predict)
    result = segment(model, method, image, settings)
    labels = result.instances.labels
    save_prediction(args.predict, image, labels, method.shown(result.maps), args.output)
    print(f"{labels.max()} instances in {args.predict}; labels and overlay in {args.output}")


def parse_arguments() -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, metavar="DIR", help="training pairs")
    parser.add_argument("--val", type=Path, metavar="DIR", help="validation pairs")
    parser.add_argument("--report", type=Path, metavar="JSON", help="where to write the results")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="model to write, or to predict with")
    parser.add_argument("--predict", type=Path, metavar="IMAGE", help="image to segment, instead of training")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the labels and the overlay")
    parser.add_argument("--method", choices=sorted(METHODS), default="discriminative")
    parser.add_argument("--minutes", type=float, help="wall time of training (default: the method's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--fill-holes", action="store_true", help="fill background holes in instances")
    args = parser.parse_args()
    needed = ("checkpoint", "output") if args.predict else ("train", "val", "report")
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"{'prediction' if args.predict else 'training'} also needs {', '.join(missing)}")
    if args.minutes is not None and args.minutes <= 0:
        parser.error("--minutes must be positive")
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        (predict if args.predict else train_and_report)(args)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
