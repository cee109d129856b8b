"""Any shape, type, layout and constants for the operators; any damage for what is read from files.

The operators' property tests compare the eager backend with float64 inside a bound derived from the number of roundings
and the conditioning of each element. The readers see 10,000 damaged inputs (:data:`CASES`): every one is either read or
refused with an error that names the file or the option, and nothing is written.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmsa_kernels import AffinitySpec, local_affinity, multi_dilation_dwconv, propagate

UNIT = 2.0**-24  # half an ulp of float32, relative
EXAMPLES = settings(max_examples=60, derandomize=True, deadline=None, database=None)
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")
HALF_UNIT = {torch.float32: UNIT, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}


# --- operators --------------------------------------------------------------------------------------------------------


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x [B, C, H, W] in another memory layout ("expanded" repeats the first image)."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def photographs(batch: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """8-bit values as a camera gives, exact in every floating type but bfloat16: noise, and a constant left half."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (batch, channels, height, width), generator=generator)
    values[..., : width // 2] = values[..., :1, :1]
    return values / 256


def neighbours(x: Tensor, dilations: list[int]) -> Tensor:
    """The 8 * D clamped neighbours of x [..., H, W], [P, ..., H, W], by index arithmetic."""
    rows, columns = torch.arange(x.shape[-2]), torch.arange(x.shape[-1])
    found = []
    for d in dilations:
        for tap in range(9):
            if tap != 4:
                i = (rows + (tap // 3 - 1) * d).clamp(0, len(rows) - 1)
                j = (columns + (tap % 3 - 1) * d).clamp(0, len(columns) - 1)
                found.append(x[..., i[:, None], j[None, :]])
    return torch.stack(found)


def affinity_and_bound(image: Tensor, dilations: list[int], spec: AffinitySpec) -> tuple[Tensor, Tensor]:
    """Float64 weights [B, P, H, W] from the formula, and what float32 arithmetic may differ by.

    A score is `e` powers of a quotient whose denominator sums over P + D samples: its relative error is at most
    e * (P + D + 8) roundings. Through the softmax, an error of the scores moves a weight w by at most
    w * (|s| + sum w|s|) of it; the sum over P exponentials adds P + 8 roundings of its own.
    """
    image = image.double()
    near = neighbours(image, dilations)  # [P, B, K, H, W]
    count = len(near)
    centres = {"neighbours": 0, "centred": len(dilations), "centre_once": 1, "none": 0}[spec.sigma]
    samples = torch.cat([near, image.expand(centres, *image.shape)])
    sigma = torch.ones_like(image) if spec.sigma == "none" else samples.std(0)
    scores = -(((near - image).abs() / (spec.alpha * sigma + spec.eps)) ** spec.exponent).mean(2)
    soft = scores.softmax(0)
    distance = torch.tensor([d * (2**0.5 if t % 2 == 0 else 1) for d in dilations for t in range(9) if t != 4]).double()
    position = (-((distance / (distance.std() * spec.alpha + spec.eps)) ** 2)).softmax(0) * spec.position_weight
    roundings = spec.exponent * (len(samples) + 8)
    bound = roundings * soft * (scores.abs() + (soft * scores.abs()).sum(0)) + (count + 8) * soft
    bound = bound + 4 * position[:, None, None, None]
    return (soft + position[:, None, None, None]).transpose(0, 1), (UNIT * bound + 1e-37).transpose(0, 1)


specs = st.builds(
    AffinitySpec,
    exponent=st.sampled_from([1.0, 2.0]),
    alpha=st.sampled_from([0.05, 0.1, 0.3, 1.0, 3.0]),
    sigma=st.sampled_from(["neighbours", "centred", "centre_once", "none"]),
    eps=st.sampled_from([1e-8, 0.3e-8, 1e-4]),
    position_weight=st.sampled_from([0.0, 0.01, 0.5]),
)
dilation_lists = st.lists(st.sampled_from([1, 2, 3, 4, 8, 24, 64]), min_size=1, max_size=4)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 13), st.integers(1, 13))


@EXAMPLES
@given(
    size=sizes,
    dilations=dilation_lists,
    spec=specs,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    precision=st.sampled_from(["exact", "fast"]),
    seed=st.integers(0, 999),
)
def test_affinity_of_anything(size, dilations, spec, layout, dtype, precision, seed):
    image = lay_out(photographs(*size, seed).to(dtype), layout)
    found = local_affinity(image, dilations, spec=spec, precision=precision, backend="eager").weights
    expected, bound = affinity_and_bound(image, dilations, spec)
    if precision == "fast":
        assert found.dtype == torch.float16
        bound = bound + expected * 2.0**-11 + 2.0**-25
    else:
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()


@EXAMPLES
@given(
    size=sizes,
    dilations=dilation_lists,
    classes=st.integers(1, 5),
    num_iter=st.integers(0, 4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    ragged=st.booleans(),
    seed=st.integers(0, 999),
)
def test_propagation_of_anything(size, dilations, classes, num_iter, layout, dtype, ragged, seed):
    batch, _, height, width = size
    generator = torch.Generator().manual_seed(seed)
    affinity = local_affinity(photographs(*size, seed), dilations, backend="eager")
    masks = lay_out(torch.randn(batch, classes, height, width, generator=generator).to(dtype), layout)
    valid = torch.rand(batch, classes, generator=generator) > 0.4 if ragged else None
    found = propagate(affinity, masks, num_iter, valid_classes=valid, backend="eager")

    weights, expected, size_of_terms = affinity.weights.double(), masks.double(), masks.double().abs()
    if valid is not None:
        expected, size_of_terms = (x * valid[:, :, None, None] for x in (expected, size_of_terms))
    for _ in range(num_iter):
        taps = weights.transpose(0, 1).unsqueeze(2)  # [P, B, 1, H, W]
        expected, size_of_terms = ((taps * neighbours(x, dilations)).sum(0) for x in (expected, size_of_terms))
    # P products and sums an iteration, each one rounding; then one rounding to the masks' type.
    bound = num_iter * (8 * len(dilations) + 2) * UNIT * size_of_terms + HALF_UNIT[dtype] * expected.abs() + 2.0**-25
    assert (found.dtype, found.shape) == (dtype, masks.shape)
    assert ((found.double() - expected).abs() <= bound).all()

    labels, values = propagate(affinity, masks, num_iter, valid_classes=valid, return_labels=True, backend="eager")
    allowed = expected if valid is None else expected.masked_fill(~valid[:, :, None, None], -torch.inf)
    best = allowed.amax(1).clamp_min(-1e300)
    chosen = allowed.gather(1, labels[:, None])[:, 0].clamp_min(-1e300)
    some = torch.ones(batch, dtype=torch.bool) if valid is None else valid.any(1)
    assert (best - chosen <= 2 * bound.amax(1))[some].all()
    assert ((values.double() - best).abs() <= bound.amax(1))[some].all()
    assert not labels[~some].any()
    assert not values[~some].any()


@EXAMPLES
@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    dilations=st.lists(st.sampled_from([1, 2, 3, 6, 18, 64]), min_size=1, max_size=4),
    kernel_size=st.sampled_from([3, 5, 7]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    reduce=st.sampled_from(["stack", "concat", "sum"]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_dilated_convolution_of_anything(size, dilations, kernel_size, layout, dtype, reduce, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    _, channels, height, width = size
    branches = len(dilations)
    x = lay_out(torch.randn(size, generator=generator).to(dtype), layout)
    weight = torch.randn(branches, channels, kernel_size, kernel_size, generator=generator).to(dtype)
    offset = torch.randn(branches, channels, generator=generator).to(dtype) if bias else None
    found = multi_dilation_dwconv(x, weight, dilations, offset, reduce, backend="eager")

    half = kernel_size // 2
    expected, size_of_terms = [], []
    for r, d in enumerate(dilations):
        padded = torch.nn.functional.pad(x.double(), (half * d,) * 4)
        y, terms = torch.zeros(2, *size, dtype=torch.float64)
        for i in range(kernel_size):
            for j in range(kernel_size):
                view = padded[..., i * d : i * d + height, j * d : j * d + width]
                product = weight[r, :, i, j].double()[:, None, None] * view
                y, terms = y + product, terms + product.abs()
        if offset is not None:
            shift = offset[r].double()[:, None, None]
            y, terms = y + shift, terms + shift.abs()
        expected.append(y)
        size_of_terms.append(terms)
    join = {"stack": lambda v: torch.stack(v, 1), "concat": lambda v: torch.cat(v, 1), "sum": sum}[reduce]
    expected, size_of_terms = join(expected), join(size_of_terms)
    operations = kernel_size**2 + 2 + (branches if reduce == "sum" else 0)
    accumulation = HALF_UNIT[torch.float64] if dtype == torch.float64 else UNIT
    bound = operations * accumulation * size_of_terms + HALF_UNIT[dtype] * expected.abs() + 2.0**-25
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert ((found.double() - expected).abs() <= bound).all()


# --- readers ----------------------------------------------------------------------------------------------------------

CASES = {
    "configuration mappings": 3500,
    "configuration files": 1000,
    "checkpoints": 1000,
    "checkpoints of wrong types": 500,
    "backbone .pth": 300,
    "backbone .safetensors": 300,
    "centroids": 700,
    "masks": 1200,
    "images": 500,
    "instances": 500,
    "class names": 500,
}
CLEAR = (ValueError, TypeError, OSError)
JUNK = [
    None,
    True,
    -1,
    0,
    3,
    1e400,
    float("nan"),
    "",
    "x",
    "../../x",
    "-1e9",
    [],
    [None],
    {},
    {"a": 1},
    b"\xff",
    10**30,
]


def test_ten_thousand():
    assert sum(CASES.values()) == 10_000


def damage(data: bytes, rng: random.Random) -> bytes:
    """Truncate, flip bits, overwrite, insert, repeat, or replace."""
    kind = rng.randrange(7)
    at = rng.randrange(len(data))
    some = rng.randbytes(rng.randint(1, 16))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + some + data[at + len(some) :]
    if kind == 2:
        return data[:at] + some + data[at:]
    if kind == 3:
        return data[:at] + data[max(0, at - 20) :]
    if kind == 4 and rng.random() < 0.1:
        return rng.choice([b"", some, b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"{}", b"[[[[", b"\xff\xd8\xff", b"null"])
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    return bytes(broken)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where the damaged file lies; the working directory is another, empty one, and both stay as they were."""
    elsewhere, here = tmp_path / "cwd", tmp_path / "run"
    elsewhere.mkdir()
    here.mkdir()
    monkeypatch.chdir(elsewhere)
    yield here
    assert not list(elsewhere.iterdir())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cwd", "run"]


def refused(path: Path, read: Callable[[], object]) -> bool:
    """Run `read`; whatever it raises must be clear and name `path`."""
    try:
        read()
    except CLEAR as error:
        demand(path.name in str(error), error)
        return True
    return False


def demand(clear: bool, error: Exception) -> None:
    """Fail, with the error that was not clear enough."""
    assert clear, f"{type(error).__name__} names neither file nor option: {error}"


def attack(path: Path, original: bytes, count: int, read: Callable[[], object]) -> None:
    """Let `read` see `count` damaged versions of the file `path`; most of them cannot be read, the original can."""
    path.write_bytes(original)
    assert not refused(path, read)
    before = sorted(path.parent.rglob("*"))
    rng = random.Random(path.name)
    failures = 0
    for _ in range(count):
        path.write_bytes(damage(original, rng))
        failures += refused(path, read)
    assert failures > count // 20
    assert sorted(path.parent.rglob("*")) == before


def test_configuration_mappings():
    from dmsa.config import Config, from_dict, resolve_method, to_dict, validate

    rng = random.Random(0)
    failures = 0
    for _ in range(CASES["configuration mappings"]):
        values = copy.deepcopy(to_dict(Config()))
        for _ in range(rng.choice([1, 1, 3])):
            section = rng.choice([values, *(v for v in values.values() if isinstance(v, dict) and v)])
            key = rng.choice(list(section))
            if rng.random() < 0.2:
                section[key + rng.choice(["", "s", "_"])] = section.pop(key)
            else:
                section[key] = copy.deepcopy(rng.choice(JUNK))
        try:
            validate(resolve_method(from_dict(values, source="here.yaml")))
        except (ValueError, TypeError) as error:
            failures += 1
            demand(bool(re.search(r"here\.yaml|\w=", str(error))), error)
    assert failures > 1500


def test_configuration_files(folder):
    from dmsa.config import PRESET_FOLDER, load_preset, validate

    path = folder / "config.yaml"

    def read() -> None:
        config = load_preset(str(path))
        try:
            validate(config)
        except (ValueError, TypeError) as error:
            demand(bool(re.search(r"[a-z_]+\.[a-z_]+=", str(error))), error)

    text = re.sub(rb"(?m)^ *#.*\n", b"", (PRESET_FOLDER / "shapes.yaml").read_bytes())
    attack(path, text, CASES["configuration files"], read)


def small_checkpoint() -> dict:
    from dmsa.checkpoint import VERSION
    from dmsa.config import Config, to_dict

    return {
        "version": VERSION,
        "config": to_dict(Config()),
        "dataset": {"name": "shapes", "classes": ["a", "b"], "palette": [[0, 0, 0]], "things_only": True},
        "student": {"weight": torch.arange(12.0).view(3, 4), "steps": torch.tensor(3)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 1,
        "step": 7,
    }


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_checkpoints(folder):
    from dmsa import checkpoint
    from dmsa.config import Config

    path = folder / "step-00000007.pt"

    def read() -> None:
        state = checkpoint.load(path)
        checkpoint.check_config(state, Config(), path)

    attack(path, saved(small_checkpoint()), CASES["checkpoints"], read)


def test_checkpoints_of_wrong_types(folder):
    from dmsa import checkpoint
    from dmsa.config import Config

    path = folder / "step-00000007.pt"
    rng = random.Random(1)
    failures = 0
    for case in range(CASES["checkpoints of wrong types"]):
        content = small_checkpoint()
        key = rng.choice(list(content))
        if case % 10 == 0:
            content = rng.choice([*JUNK[:9], torch.zeros(3), [content], tuple(content)])
        elif rng.random() < 0.3:
            del content[key]
        else:
            content[key] = copy.deepcopy(rng.choice(JUNK))
        path.write_bytes(saved(content))

        def read() -> None:
            state = checkpoint.load(path)
            checkpoint.check_config(state, Config(), path)

        failures += refused(path, read)
    assert failures > 200


class Hostile:
    """Unpickled, it would make a file."""

    def __reduce__(self):
        return os.mkdir, ("made by a checkpoint",)


@pytest.mark.parametrize("place", ["student", "config", "extra"])
def test_a_checkpoint_cannot_run_code(folder, place):
    from dmsa import checkpoint

    path = folder / "step-00000007.pt"
    path.write_bytes(saved({**small_checkpoint(), place: Hostile()}))
    assert refused(path, lambda: checkpoint.load(path))  # the fixture finds whatever it made


def test_nothing_is_unpickled():
    sources = [
        f for package in ("dmsa", "dmsa_kernels") for f in Path(__file__).parents[1].joinpath(package).rglob("*.py")
    ]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    loads = re.findall(r"torch\.load\([^\n]*", text)
    calls = [call for call in loads if not call.startswith("torch.load(...")]
    assert calls
    assert all("weights_only=True" in call for call in calls)
    assert not re.search(
        r"allow_pickle=True|pickle\.loads?\(|yaml\.load\(|\beval\(|\bexec\(", text.replace(".eval(", "")
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbones(folder, suffix):
    from dmsa.models.encoder import load_weights
    from tests.dmsa.tiny import tiny_encoder

    encoder = tiny_encoder(depth=1, embed_dim=12, patch_size=16)
    state = encoder.vit.state_dict()
    if suffix == ".pth":
        original = saved(state)
    else:
        from safetensors.torch import save

        original = save(state)
    path = folder / f"backbone{suffix}"
    attack(path, original, CASES[f"backbone {suffix}"], lambda: load_weights(encoder, path, "tiny"))


def test_centroids(folder):
    from dmsa.labels.clustering import Centroids

    path = folder / "centroids-0.npz"
    Centroids(torch.randn(3, 4), 2, 1, {"seed": 0}).save(path)
    attack(path, path.read_bytes(), CASES["centroids"], lambda: Centroids.load(path))


def png(ids: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(ids).save(stream, "PNG")
    return stream.getvalue()


def test_masks_and_images(folder):
    from PIL import Image

    from dmsa.config import DataConfig
    from dmsa.data import build
    from dmsa.data.base import label_lookup, map_label
    from dmsa.data.images import as_rgb, open_image, read_mask

    ids = np.arange(256, dtype=np.uint8).reshape(16, 16) % 5
    (folder / "masks").mkdir()
    mask = folder / "masks" / "a.png"
    lut = label_lookup({i: i for i in range(5)})
    attack(mask, png(ids), CASES["masks"], lambda: map_label(read_mask(mask), lut, mask))

    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "JPEG")
    image = folder / "a.jpg"
    attack(
        image,
        stream.getvalue(),
        CASES["images"],
        lambda: np.array(as_rgb(open_image(image))),
    )

    image.write_bytes(stream.getvalue()[:200])
    mask.write_bytes(png(ids))
    with pytest.raises(ValueError, match=r"none of the 1 images"), pytest.warns(UserWarning, match="a.jpg"):
        build(DataConfig(name="folder", root=str(folder), size=16, crop=16), "val")[0]


def test_instances(folder):
    from dmsa.data.coco import Instances

    path = folder / "instances_val2017.json"
    content = {
        "images": [{"id": 1, "file_name": "000000000001.jpg", "height": 16, "width": 16}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "area": 64},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 18,
                "segmentation": {"counts": [100, 20, 136], "size": [16, 16]},
                "area": 20,
            },
        ],
    }

    def read() -> None:
        instances = Instances(path, {1: 1, 18: 2})
        for i in range(len(instances.names)):
            assert instances.draw(i).max() <= 255

    attack(path, json.dumps(content).encode(), CASES["instances"], read)


def test_class_names_and_lists(folder):
    from dmsa.data.folder import read_classes
    from dmsa.data.listing import read_list

    path = folder / "classes.txt"

    def read() -> None:
        read_classes(path)
        read_list(path)

    attack(path, "cat, thing\nsofa, thing\nsky, stuff\nWände, stuff\n".encode(), CASES["class names"], read)
