"""The configuration: frozen dataclasses, filled from defaults, then a preset file, then the command line.

`parse(argv)` is what `train.py` calls. A preset is a YAML file with only what differs from the defaults below; the
ones that ship lie in `dmsa/presets`, and the `config.yaml` of a run folder is one too. `Config.to_yaml` and
`Config.from_yaml` convert between a file and a checked `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PRESET_FOLDER = Path(__file__).parent / "presets"
DEFAULT_PRESET = "shapes"


DataName = Literal["shapes", "voc", "voc_aug", "coco80", "coco_stuff27", "folder"]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and scored."""

    name: DataName = "shapes"
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
    classes: int = 27
    """Number of classes of a `folder` that has neither masks nor `classes.txt`."""
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
    """Teacher is replaced by the student at intervals (TransFGU), or follows it as a moving average, which is then what
    is scored and used."""
    ema_momentum: float = 0.99
    """Momentum of the `ema` teacher, per step."""
    refine: Literal["off", "par"] = "off"
    """Score and use predictions as they are, or refined by PAR along the picture. Exported files never refine."""


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

    cam: Literal["attention_grad", "feature", "single_patch"] = "attention_grad"
    """Gradient of the class-token attention (Eq. 5); or cosine with the centroids: of patch features, or (times the
    attention) of the class token that attends to one patch alone."""
    par: Literal["on", "off"] = "on"
    """Refine the fused scores with PAR (Eq. 4)."""
    par_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    """Dilations of PAR, in pixels of the refinement grid."""
    par_iterations: int = 10
    """Iterations of PAR."""
    par_resolution: Literal["half", "full"] = "half"
    """Side of the refinement, as a share of the crop's."""
    label_grid: Literal["pixels", "tokens"] = "pixels"
    """Resolution at which the pseudo label is compared with the prediction: the refinement's, or the token grid."""
    bank_scales: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2)
    """Window sides of the feature bank, as fractions of the image."""
    bank_crop: int | None = None
    """Side in pixels to which the feature bank's windows are resized; `data.size` if unset."""
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
    """Evaluate every so many epochs (and after the last one)."""
    log_every: int = 10
    """Read the losses back, check them and log them every so many steps."""
    panels: int = 4
    """Validation images drawn as panels after every evaluation."""
    keep_checkpoints: int = 2
    """Checkpoints kept besides the best one."""
    checkpoint_minutes: float = 10.0
    """Also write a checkpoint after so many minutes inside an epoch, at the next logging step (0: at every one)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the networks; the refinement is fp32 inside in every case."""
    compile: bool = False
    """Compile the frozen blocks and the decoder with torch.compile."""
    deterministic: bool = False
    """Refuse operators that are not deterministic."""
    step_timeout: float = 60.0
    """Seconds without a sign of life from another process after which a step ends the run."""
    alone_timeout: float = 300.0
    """The same outside steps, where one process may work alone: feature bank, k-means, evaluation, checkpoints."""
    baselines: bool = False
    """Close with baselines that share the run's data and budget: clusterings, labels before training, TransFGU."""
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

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the configuration as YAML text, and write it to `path` if one is given."""
        import yaml

        text = yaml.safe_dump(to_dict(self), sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Config:
        """Read a YAML file (or a preset by name), check it against the fields above and fill in the defaults.

        Raises:
            FileNotFoundError: there is no such file or preset; the message lists the presets.
            ValueError: unknown key (the nearest one is suggested), or a value outside its choices.
            TypeError: a value of the wrong type.
        """
        return load_preset(str(source))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain dicts and lists, as they stand in YAML files and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Any], *, source: str = "the configuration", base: Config | None = None) -> Config:
    """Build a checked `Config` from nested dicts; keys that are missing keep the value of `base` (or the default)."""
    return _build(Config, values, base or Config(), "", source)


def presets() -> dict[str, Path]:
    """Return the presets that ship with the package: name to file."""
    return {path.stem: path for path in sorted(PRESET_FOLDER.glob("*.yaml"))}


def load_preset(name: str) -> Config:
    """Return the preset called `name`, or the one in the YAML file at that path, over the defaults."""
    import yaml

    known = presets()
    path = known.get(name, Path(name))
    if name not in known and not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FileNotFoundError(
            f"preset={name!r} is neither a preset nor a YAML file{hint}; the presets are {', '.join(known)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise TypeError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    return from_dict(values or {}, source=str(path))


def _build(cls: type, values: Mapping[str, Any], base: Any, prefix: str, source: str) -> Any:
    hints = get_type_hints(cls)
    changes = {}
    for key, value in values.items():
        where = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(hints)}"
            raise ValueError(f"{source}: unknown option {where}{hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise TypeError(f"{source}: {where} must be a mapping of options, got {value!r}")
            changes[key] = _build(hints[key], value, getattr(base, key), f"{where}.", source)
        else:
            changes[key] = _convert(value, hints[key], where, source)
    return dataclasses.replace(base, **changes)


def _convert(value: Any, kind: Any, where: str, source: str) -> Any:
    """Check `value` against the type annotation `kind` and return it as that type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (item for item in arguments if item is not type(None))
        return _convert(value, kind, where, source)
    if origin is Literal:
        # YAML 1.1 reads a bare on / off as a truth value.
        if isinstance(value, bool) and {"on", "off"} <= set(arguments):
            value = "on" if value else "off"
        if value not in arguments or type(value) not in {type(item) for item in arguments}:
            near = difflib.get_close_matches(str(value), [str(item) for item in arguments], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{source}: {where}={value!r} must be one of {', '.join(map(str, arguments))}{hint}")
        return value
    if origin is tuple:
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        if not isinstance(value, (list, tuple)) or not (variadic or len(value) == len(arguments)):
            expected = "a list" if variadic else f"a list of {len(arguments)}"
            raise TypeError(f"{source}: {where}={value!r} must be {expected}")
        kinds = [arguments[0]] * len(value) if variadic else arguments
        items = zip(value, kinds, strict=True)
        return tuple(_convert(item, item_kind, f"{where}[{i}]", source) for i, (item, item_kind) in enumerate(items))
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-4, without a point, as text.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    raise TypeError(f"{source}: {where}={value!r} must be of type {kind.__name__}, got {type(value).__name__}")


def resolve_method(config: Config) -> Config:
    """Return `config` with the switches that `config.method` stands for.

    `transfgu` is the baseline row of the paper's tables: no pyramid, PAR or segmentation loss, labels at the tokens.
    `dmsa_plus` scales the rates to the grid and, on the data where that was measured to help (docs/shapes.md), takes
    the map of single patches: on `shapes` it also refines predictions and has a moving average of the student, from
    the second epoch on, as teacher and as what is scored; on `voc` it gives the segmentation loss ten times the weight.
    Whatever else differs from the paper is the user's choice; `deviations` lists all of it.
    """
    if config.method == "transfgu":
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, aspp="off"),
            labels=dataclasses.replace(config.labels, par="off", label_grid="tokens"),
            losses=dataclasses.replace(config.losses, seg=0.0),
        )
    if config.method == "dmsa_plus":
        config = dataclasses.replace(config, rates=dataclasses.replace(config.rates, grid_aware=True))
        if config.data.name == "shapes":
            labels = dataclasses.replace(config.labels, cam="single_patch", background_threshold=0.5)
            model = dataclasses.replace(config.model, teacher="ema", ema_momentum=0.97, refine="par")
            train = dataclasses.replace(config.train, teacher_start=1)
            config = dataclasses.replace(config, labels=labels, model=model, train=train)
        elif config.data.name == "voc":
            labels = dataclasses.replace(config.labels, cam="single_patch")
            config = dataclasses.replace(config, labels=labels, losses=dataclasses.replace(config.losses, seg=1.0))
    return config


NOT_THE_METHOD = (
    "method",
    "out",
    "data.name",
    "data.root",
    "data.classes",
    "data.workers",
    "model.weights",
    "train.micro_batch",
    "train.eval_every",
    "train.log_every",
    "train.panels",
    "train.keep_checkpoints",
    "train.checkpoint_minutes",
    "train.step_timeout",
    "train.alone_timeout",
    "train.compile",
    "train.deterministic",
    "train.baselines",
    "train.seed",
)
"""Options that leave the method as it is; `deviations` compares all others."""
IF_UNSET = {"data.train_images": "all", "data.val_images": "all", "labels.bank_images": "all"}


def deviations(config: Config) -> list[str]:
    """Return what differs from the paper's setting, as `option: value (paper: value)`, for the report.

    The paper's setting is the preset of the data set; where the paper has none, the defaults, which are VOC's.
    """
    paper = Config(data=DataConfig(name=config.data.name))
    if config.data.name in presets() and config.data.name != DEFAULT_PRESET:
        paper = load_preset(config.data.name)
    paper = resolve_method(dataclasses.replace(paper, method="transfgu" if config.method == "transfgu" else "dmsa"))
    values, wanted = flatten(to_dict(config)), flatten(to_dict(paper))

    def show(key: str, value: Any) -> str:
        return IF_UNSET.get(key, _show(value)) if value is None else _show(value)

    found = [
        f"{key}: {show(key, values[key])} (paper: {show(key, wanted[key])})"
        for key in values
        if key not in NOT_THE_METHOD and values[key] != wanted[key]
    ]
    return [*found, *["model.weights: random (paper: DINO's)"] * (config.model.weights == "random")]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, ignore: Sequence[str] = (), labels: tuple[str, str]
) -> list[str]:
    """Return the options on which two configurations (as nested dicts) differ, with both values."""
    a, b = flatten(before), flatten(now)
    missing = object()
    return [
        f"{key}: {_show(a[key]) if key in a else 'not set'} {labels[0]}, "
        f"{_show(b[key]) if key in b else 'not set'} {labels[1]}"
        for key in dict.fromkeys([*a, *b])
        if key not in ignore and a.get(key, missing) != b.get(key, missing)
    ]


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def validate(config: Config) -> None:
    """Check the values that a type cannot express.

    Raises:
        ValueError: names the option and its value, and says what was expected.
    """
    flat = flatten(to_dict(config))

    def require(key: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}={_show(flat[key])} must be {expected}")

    positive = ["data.size", "data.crop", "data.repeat", "data.train_images", "data.val_images"]
    positive += ["labels.bank_images", "labels.bank_crop"]
    positive += ["model.decoder_layers", "model.decoder_heads", "train.epochs", "train.batch", "train.micro_batch"]
    positive += ["train.eval_every", "train.log_every", "train.keep_checkpoints"]
    for key in positive:
        require(key, flat[key] is None or flat[key] >= 1, "at least 1")
    require("data.classes", 1 <= config.data.classes <= 254, "between 1 and 254")
    for key in ("data.workers", "labels.par_iterations", "train.panels", "train.teacher_start", "train.seed"):
        require(key, flat[key] >= 0, "at least 0")
    weights = [f"losses.{name}" for name in to_dict(config.losses)]
    for key in ("train.weight_decay", "train.checkpoint_minutes", *weights):
        require(key, 0 <= flat[key] < float("inf"), "a number that is not negative")
    for key in ("train.lr", "train.clip_value", "train.step_timeout", "train.alone_timeout"):
        require(key, 0 < flat[key] < float("inf"), "a positive number")
    low, high = config.data.crop_scale
    require("data.crop_scale", 0 < low <= high <= 1, "two fractions, 0 < low <= high <= 1")
    require("data.crop", config.data.crop <= config.data.size, f"at most data.size={config.data.size}")
    require("model.ema_momentum", 0 <= config.model.ema_momentum < 1, "in [0, 1)")
    for key in ("train.teacher_interval", "labels.par_dilations", "rates.fixed_rates"):
        require(key, len(flat[key]) > 0 and min(flat[key]) >= 1, "one or more integers of at least 1")
    require(
        "labels.bank_scales",
        len(flat["labels.bank_scales"]) > 0 and all(0 < scale <= 1 for scale in flat["labels.bank_scales"]),
        "one or more fractions in (0, 1]",
    )


@dataclass(frozen=True)
class _CommandLine(Config):
    preset: str = DEFAULT_PRESET
    """Preset by name (shapes, voc, voc_aug, coco80, coco_stuff27) or YAML file, such as a run folder's config.yaml."""


def parse(argv: Sequence[str] | None = None, *, prog: str = "train.py", description: str = "") -> Config:
    """Merge defaults, preset and command line into a checked `Config`.

    Every field is an option: `--train.lr 3e-4`. The dot may be written as a hyphen (`--data-root`). A misspelt option,
    a value of the wrong type and `--help` end the process, as command lines do.

    Args:
        argv: arguments without the program's name; the process's own if None.
        prog: name shown by `--help`.
        description: text shown above the options.

    Raises:
        FileNotFoundError, ValueError, TypeError: from the preset or from `validate`, naming the option.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    spelling = {f"--{key}".replace("_", "-").replace(".", "-"): f"--{key}" for key in flatten(to_dict(Config()))}
    for position, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            argv[position] = spelling.get(name.replace("_", "-"), name) + equals + value
    preset = DEFAULT_PRESET
    for position, word in enumerate(argv):
        if word == "--preset" and position + 1 < len(argv):
            preset = argv[position + 1]
        elif word.startswith("--preset="):
            preset = word.partition("=")[2]
    base = load_preset(preset)
    fields = {item.name: getattr(base, item.name) for item in dataclasses.fields(Config)}
    line = tyro.cli(
        _CommandLine, args=argv, prog=prog, description=description, default=_CommandLine(**fields, preset=preset)
    )
    config = resolve_method(Config(**{name: getattr(line, name) for name in fields}))
    validate(config)
    return config
