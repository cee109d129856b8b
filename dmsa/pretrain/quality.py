"""How good are the features? Figures on ``shapes``, whose classes pre-training never saw, and on photographs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmsa import data
from dmsa.config import DataConfig
from dmsa.data.base import IGNORE, table
from dmsa.data.shapes import THINGS, render
from dmsa.data.transforms import MEAN, STD, ValTransform
from dmsa.models.encoder import before_last


@dataclass(frozen=True)
class Figures:
    """What a measurement gives, by name."""

    def table(self) -> dict[str, float]:
        """The figures, rounded to two digits, by name."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Quality(Figures):
    """Figures in percent, higher is better."""

    probe_miou: float
    """mIoU of a linear classifier on the patch tokens, trained on 200 training pictures (7 classes)."""
    patch_kmeans_miou: float
    """mIoU of k-means with 7 clusters on the patch tokens, matched to the classes at best."""
    crop_accuracy: float
    """Accuracy of k-means with 6 clusters on the class tokens of the objects' crops, matched to the classes at best."""
    attention_auc: float
    """Probability that a patch on an object gets more class-token attention than one on the background."""
    attention_iou: float
    """IoU of the patches with attention above the picture's mean, against the objects."""


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1], ``[B, 3, H, W]``, with ImageNet's mean and standard deviation."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def tokens_and_attention(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final tokens ``[B, T, D]`` and the last block's class-token attention ``[B, N]`` (mean over the heads)."""
    x = before_last(vit, images)
    last = vit.blocks[-1]
    attention = last.attn
    qkv = attention.qkv(last.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))  # [B, 1 + N, 3, heads, d]
    query, key = attention.q_norm(qkv[:, :1, 0]), attention.k_norm(qkv[:, :, 1])
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scale
    return vit.norm(last(x)), weights.float().softmax(-1)[:, :, 0, vit.num_prefix_tokens :].mean(1)


def mean_iou(predicted: np.ndarray, label: np.ndarray, classes: int, *, match: bool) -> float:
    """mIoU in percent of flat integer arrays; ``match`` first assigns predicted ids to classes at best."""
    counts = np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)
    if match:
        rows, columns = linear_sum_assignment(counts, maximize=True)
        counts = counts[:, columns[np.argsort(rows)]]
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return 100 * float(np.mean(counts.diagonal()[union > 0] / union[union > 0]))


def _pictures(split: str, count: int, size: int, seed: int) -> tuple[Tensor, np.ndarray]:
    pairs = [render(seed, split, index, size) for index in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2).float() / 255
    return normalise(images), np.stack([label for _, label in pairs])


def patch_labels(label: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """Most frequent class of every patch: ``[B, H, W]`` → int64 ``[B, H / patch, W / patch]``."""
    counts = np.eye(classes, dtype=np.float32)[label]  # [B, H, W, K]
    batch, height, width, _ = counts.shape
    tiles = counts.reshape(batch, height // patch, patch, width // patch, patch, classes)
    return tiles.sum((2, 4)).argmax(-1)


@torch.enable_grad()
def _linear_probe(x: Tensor, y: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression, by L-BFGS."""
    probe = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=60, history_size=10)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return probe


def object_crops(count: int, side: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Square crops around the single visible objects of validation pictures, and their classes.

    Returns:
        Normalised crops ``[count, 3, side, side]`` and class indices ``[count]`` (0 is the first object class).
    """
    crops: list[Tensor] = []
    kinds: list[int] = []
    index = 0
    while len(crops) < count:
        image, label = render(seed, "val", index, 128)
        index += 1
        for kind in np.unique(label[label > 0]):
            rows, columns = np.nonzero(label == kind)
            half = max(np.ptp(rows), np.ptp(columns)) // 2 + 1
            if not 14 <= half <= 44:
                continue
            y = int(np.clip((rows.min() + rows.max()) // 2, half, 128 - half))
            x = int(np.clip((columns.min() + columns.max()) // 2, half, 128 - half))
            window = np.s_[y - half : y + half, x - half : x + half]
            if np.mean(label[window] == kind) < 0.35:
                continue
            crop = torch.from_numpy(image[window]).permute(2, 0, 1)[None].float() / 255
            crops.append(F.interpolate(crop, size=(side, side), mode="bilinear", align_corners=False))
            kinds.append(int(kind) - 1)
    return normalise(torch.cat(crops[:count])), np.array(kinds[:count])


def _features(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Final tokens and attention, as `tokens_and_attention`, of any number of images."""
    device = next(vit.parameters()).device
    done = [tokens_and_attention(vit, chunk.to(device)) for chunk in images.split(40)]
    return torch.cat([d[0] for d in done]).float().cpu(), torch.cat([d[1] for d in done]).float().cpu()


def _attention_scores(attention: Tensor, thing: Tensor) -> dict[str, float]:
    """Compare class-token attention ``[B, N]`` with where the objects are, bool ``[B, N]``."""
    score = attention / attention.mean(1, keepdim=True)
    objects, order = thing.flatten(), score.flatten().argsort().argsort().double() + 1
    n = int(objects.sum())
    auc = (order[objects].sum() - n * (n + 1) / 2) / max(n * (objects.numel() - n), 1)
    above = (score > 1).flatten()
    iou = (above & objects).sum() / (above | objects).sum().clamp(min=1)
    return {"attention_auc": 100 * float(auc), "attention_iou": 100 * float(iou)}


def _probe_and_clusters(
    train: tuple[Tensor, np.ndarray], val: tuple[Tensor, np.ndarray], classes: int, seed: int
) -> dict[str, float]:
    """mIoU on `val` of a linear classifier trained on `train`, and of k-means; tokens ``[M, D]`` and labels each."""
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    probe = _linear_probe((train[0] - mean) / std, torch.from_numpy(train[1]), classes)
    predicted = probe((val[0] - mean) / std).argmax(-1).numpy()
    clusters = KMeans(classes, n_init=3, random_state=seed).fit_predict(F.normalize(val[0], dim=-1).numpy())
    return {
        "probe_miou": mean_iou(predicted, val[1], classes, match=False),
        "patch_kmeans_miou": mean_iou(clusters.astype(np.int64), val[1], classes, match=True),
    }


@torch.no_grad()
def measure(vit: VisionTransformer, *, size: int = 96, pictures: int = 120, crops: int = 300, seed: int = 0) -> Quality:
    """Measure a timm vision transformer on ``shapes``.

    Args:
        vit: The network, with ``dynamic_img_size``.
        size: Side of the pictures in pixels, a multiple of the patch size.
        pictures: Number of validation pictures; the linear probe trains on as many training pictures (200 at most).
        crops: Number of object crops for the clustering of class tokens.
        seed: Seed of pictures and clusterings.
    """
    training = vit.training
    vit.eval()
    patch = vit.patch_embed.patch_size[0]
    classes = len(THINGS) + 1

    images, label = _pictures("val", pictures, size, seed)
    tokens, attention = _features(vit, images)
    val = tokens[:, vit.num_prefix_tokens :].flatten(0, 1), patch_labels(label, patch, classes).reshape(-1)
    images, label = _pictures("train", min(pictures, 200), size, seed)
    tokens = _features(vit, images)[0][:, vit.num_prefix_tokens :].flatten(0, 1)
    train = tokens, patch_labels(label, patch, classes).reshape(-1)
    images, kinds = object_crops(crops, 64, seed)
    class_tokens = _features(vit, images)[0][:, 0]
    groups = KMeans(len(THINGS), n_init=5, random_state=seed).fit_predict(F.normalize(class_tokens, dim=-1).numpy())
    counts = np.bincount(kinds * len(THINGS) + groups, minlength=len(THINGS) ** 2).reshape(len(THINGS), -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    vit.train(training)
    return Quality(
        **_probe_and_clusters(train, val, classes, seed),
        crop_accuracy=100 * float(counts[rows, columns].sum() / counts.sum()),
        **_attention_scores(attention, torch.from_numpy(val[1] > 0).view(attention.shape)),
    )


@dataclass(frozen=True)
class PhotoQuality(Figures):
    """Figures on photographs with COCO's outlines, 12 super-categories and background; percent, higher is better."""

    probe_miou: float
    """mIoU on the validation photographs of a linear classifier of patch tokens, trained on the training ones."""
    patch_kmeans_miou: float
    """mIoU of k-means with 13 clusters on the patch tokens of the validation photographs, matched at best."""
    attention_auc: float
    """As in `Quality`."""
    attention_iou: float
    """As in `Quality`."""


PROBE_TOKENS = 30_000
"""Tokens of photographs that the linear classifier is trained on, at most."""


def super_categories() -> np.ndarray:
    """Return a uint8 table [256] from ids of `coco80` to background (0) and COCO's 12 super-categories; 255 stays."""
    found = np.full(256, IGNORE, dtype=np.uint8)
    found[0] = 0
    coarse = table("coco_stuff27")["fine_to_coarse"]
    for category, number in table("coco80")["category_id_to_contiguous"].items():
        found[number] = 1 + coarse[str(int(category) - 1)]  # COCO-Stuff counts the same categories from 0
    return found


@torch.no_grad()
def measure_photos(vit: VisionTransformer, root: str, *, size: int = 320, seed: int = 0) -> PhotoQuality:
    """Measure a timm vision transformer on photographs.

    Args:
        vit: The network, with ``dynamic_img_size``.
        root: A COCO root (2017), any number of photographs; see `dmsa doctor`.
        size: Side to which photographs are squashed, rounded to a multiple of the patch size.
        seed: Seed of the clustering and of the choice of `PROBE_TOKENS`.

    Raises:
        FileNotFoundError: The root lacks photographs or annotations.
    """
    training = vit.training
    vit.eval()
    patch = vit.patch_embed.patch_size[0]
    side = max(1, round(size / patch)) * patch
    config = DataConfig(name="coco80", root=root, size=side, crop=side)
    groups, squash = super_categories(), ValTransform(config)
    classes = int(groups[groups != IGNORE].max()) + 1
    found = {}
    for split in ("train", "val"):
        photos = data.build(config, split, seed)
        tokens, attention, labels = [], [], []
        for index in range(photos.images):
            sample = squash(*photos.raw(index))
            of_photo = _features(vit, sample["image"][None])
            tokens.append(of_photo[0][0, vit.num_prefix_tokens :])
            attention.append(of_photo[1][0])
            label = np.minimum(groups[sample["label"].numpy()[None]], classes)  # what is ignored is one class more
            labels.append(patch_labels(label, patch, classes + 1).reshape(-1))
        found[split] = torch.cat(tokens), torch.stack(attention), np.concatenate(labels)
    known = {split: np.flatnonzero(parts[2] < classes) for split, parts in found.items()}
    chosen = np.random.default_rng(seed).permutation(known["train"])[:PROBE_TOKENS]
    x, _, y = found["train"]
    train = x[chosen], y[chosen]
    x, seen, y = found["val"]
    vit.train(training)
    return PhotoQuality(
        **_probe_and_clusters(train, (x[known["val"]], y[known["val"]]), classes, seed),
        **_attention_scores(seen, torch.from_numpy((y > 0) & (y < classes)).view(seen.shape)),
    )
