"""The configuration: frozen dataclasses, filled from defaults, then a preset file, then the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and scored."""

    name: Literal["shapes", "voc", "voc_aug", "coco80", "coco_stuff27", "folder"] = "shapes"
    """Data set."""
    root: str | None = None
    """Folder of the data set in its official layout (`dmsa doctor` checks it); unused by `shapes`."""
    size: int = 320
    """Side in pixels to which images are squashed, for training and for evaluation."""
    crop: int = 160
    """Side in pixels of a training crop."""
    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Area of a training crop as a fraction of the squashed image, drawn uniformly from this range."""
    repeat: int = 1
    """How often an epoch visits every training image."""
    train_images: int | None = None
    """Use only this many training images (`shapes`: how many are drawn); all if unset."""
    val_images: int | None = None
    """Use only this many validation images (`shapes`: how many are drawn); all if unset."""
    workers: int = 2
    """Data-loader worker processes of every rank."""


@dataclass(frozen=True)
class ModelConfig:
    """Student and teacher."""

    encoder: str = "vit_small_patch8_224.dino"
    """Any timm ViT by name, or `shapes_vit_tiny`, the backbone that ships with the package."""
    weights: str | None = None
    """Encoder weights: a local DINO `.pth` or safetensors file; if unset, timm's hub (or the shipped file)."""
    aspp: Literal["mhsa", "neck", "off"] = "mhsa"
    """Where the atrous pyramid sits: on the last block's attention output, after the encoder, or nowhere."""
    aspp_image_pooling: bool = False
    """Add the global average branch to the pyramid."""
    decoder_layers: int = 2
    """Transformer blocks of the mask decoder."""
    decoder_heads: int = 6
    """Attention heads of the mask decoder."""
    teacher: Literal["snapshot", "ema"] = "snapshot"
    """Teacher is replaced by the student at intervals (TransFGU), or follows it as a moving average."""
    ema_momentum: float = 0.99
    """Momentum of the `ema` teacher, per step."""


@dataclass(frozen=True)
class RatesConfig:
    """The epoch-dependent dilation rates of the pyramid (the paper's Table 1)."""

    epoch_base: Literal[0, 1] = 0
    """Number of the first epoch in the rate table."""
    eval_rates: Literal["checkpoint", "fixed"] = "checkpoint"
    """Evaluate with the rates of the checkpoint's epoch, or with `fixed_rates`."""
    fixed_rates: tuple[int, int, int, int] = (1, 1, 2, 3)
    """Rates used by `eval_rates=fixed`."""
    grid_aware: bool = False
    """Scale the rates so that their taps fall inside the token grid."""


@dataclass(frozen=True)
class LabelConfig:
    """From the class activation map to the pseudo label."""

    cam: Literal["attention_grad", "feature"] = "attention_grad"
    """Gradient of the class-token attention (Eq. 5), or cosine of patch features with the centroids."""
    par: Literal["on", "off"] = "on"
    """Refine the fused scores with PAR (Eq. 4)."""
    par_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """Dilations of PAR, in pixels of the refinement grid."""
    par_iterations: int = 10
    """Iterations of PAR."""
    label_grid: Literal["tokens", "pixels"] = "tokens"
    """Resolution at which the pseudo label is compared with the prediction."""
    bank_scales: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2)
    """Window sides of the feature bank, as fractions of the image."""
    bank_images: int | None = None
    """Use only this many training images for the feature bank; all if unset."""
    background_threshold: float = 0.1
    """CAM value below which a pixel counts as background (data sets of things)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the four losses (Eq. 6)."""

    seg: float = 0.1
    """Weight of the segmentation loss."""
    ce: float = 1.0
    """Weight of the bootstrapping cross-entropy."""
    un: float = 0.3
    """Weight of the uncertainty loss."""
    cls: float = 1.0
    """Weight of the class-embedding loss."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and schedule."""

    epochs: int = 100
    """Number of epochs."""
    batch: int = 512
    """Images per optimiser step, over all processes and accumulation steps."""
    micro_batch: int | None = None
    """Images per forward pass of one process; the rest of its share is accumulated. All at once if unset."""
    lr: float = 1e-4
    """Learning rate of Adam (constant)."""
    weight_decay: float = 5e-4
    """Weight decay, not applied to biases and norms."""
    clip_value: float = 1.0
    """Gradient values are clipped to plus and minus this."""
    teacher_start: int = 5
    """Epoch of the first teacher snapshot."""
    teacher_interval: tuple[int, ...] = (5, 5, 5, 5, 4, 4, 4, 4, 4, 3)
    """Epochs between snapshots, indexed by epoch // 10; the last entry holds from there on."""
    eval_every: int = 1
    """Evaluate every so many epochs."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the best one."""
    checkpoint_minutes: float = 10.0
    """Also write a checkpoint after so many minutes inside an epoch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the networks; the refinement is fp32 inside in every case."""
    compile: bool = False
    """Compile the frozen blocks and the decoder with torch.compile."""
    deterministic: bool = False
    """Refuse operators that are not deterministic."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    method: Literal["dmsa", "transfgu", "dmsa_plus"] = "dmsa"
    """The paper; its baseline (pyramid, PAR and segmentation loss off); or the paper with listed improvements."""
    out: str = "runs/shapes"
    """Run folder: config, metrics, checkpoints, panels, report."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rates: RatesConfig = field(default_factory=RatesConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
