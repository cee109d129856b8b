"""Every command in README.md, docs/ and docstrings runs, on small data in the official formats.

The commands of a page run in its order, in a folder of their own, exactly as they stand but for the names of data in
`NAMES` and the options in `SHORTER`, which are appended to keep them short. What is not run is in `NOT_RUN`, with why;
a command of several pages runs on the first of them.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import fixtures
from tests.dmsa.crash import free_port
from tests.dmsa.runs import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
START = r"(?:python|torchrun|dmsa|pytest)"
TINY = "--data.size 48 --data.crop 48 --data.workers 0 --labels.bank-images 6 --train.epochs 1 --train.batch 12"
TINY += " --train.panels 1 --train.no-baselines --data.train-images 12 --data.val-images 2"
BACKBONE = "--model.encoder shapes_vit_tiny --model.decoder-heads 4 --data.repeat 1"

NOT_RUN = {
    r"pip install": "needs the package index",
    r"tests\.triton_versions": "needs the package index, an environment for each version of Triton",
    r"^pytest": "the tests themselves; tests/benchmarks runs the benchmarks' rows at the smallest size",
    r"benchmarks\.gpu_suite": "needs a GPU; tests/benchmarks runs its sections on the CPU",
    r"(distil|hybrid)": "need a network's weights from timm's hub; tests/dmsa/test_pretrain.py runs them without",
    r"benchmarks\.(learning|quality)": "hours; tests/benchmarks and tests/test_quality.py run their parts",
}
"""Pattern of a command → why it is not run here."""

SHORTER = {
    r"train\.py(?!.*(--preset|--data\.name))": TINY,
    r"train\.py .*(--preset|--data\.name) ": f"{TINY} {BACKBONE}",
    r"train\.py --help": "",
    r"dmsa ablate": "--seeds 0 --epochs 1 --train-images 32 --val-images 4 --results tables",
    r"pretrain --recipe formula": "--steps 2 --batch 4 --report-pictures 0",
    r"pretrain --recipe dino": "--steps 2 --batch 2 --size 48 --report-pictures 0",
    r"dmsa predict|dmsa refine|dmsa doctor|dmsa prepare|dmsa(\.cli)? eval|dmsa export": "",
    r"dmsa doctor --decode$": "--root data/voc",
    r"dmsa\.cli eval$": "--predictions masks --name voc --root data/voc",
    r"bench_step": "--batch 1 --classes 2 --repeats 1",
    r"bench_data": "--images 2 --masks 2 --repeats 1",
    r"bench_cam": "--batch 1 --classes 2 --loop-classes 1 --repeats 1 --bank-images 1 --bank-repeats 1",
    r"measuring\.resident": "--device cpu",
    r"aspp_cpu": "--seconds 0.01 --match 384,20,20",
    r"cost_model": "",
    r"examples/refine_photo\.py|docs/img/make\.py": "",
}
"""Pattern of a command → options that make it short; the last pattern that matches counts."""

NAMES = {
    r"(?<![\w/.])/?data/(voc|coco)\b": r"data/\1",
    r"(voc[^\n]*--data\.root) ROOT": r"\1 data/voc",
    r"(coco[^\n]*--data\.root) ROOT": r"\1 data/coco",
    r"--root FOLDER": "--root data/voc",
    r"--name NAME": "--name voc",
    r"--images FOLDER": "--images photos",
    r"--checkpoint RUN\b": "--checkpoint runs/shapes",
    r"--nproc_per_node=(8|N|6(?=.*--preset))\b": "--nproc_per_node=2",  # six start in the lines without a preset
    r" \.\.\.$": "",
}
"""Name in a command → what it is called here."""


def plain(line: str) -> str:
    return re.sub(r"\s+#\s.*$", "", line).strip()


def in_blocks(text: str) -> list[str]:
    """The lines of bash blocks, continued ones and quoted ones joined."""
    found = []
    for indent, body in re.findall(r"^( *)```bash\n(.*?)^ *```", text, re.S | re.M):
        body = re.sub(rf"(?m)^{indent}", "", body).replace("\\\n", " ")
        found += [plain(line) for line in body.splitlines() if plain(line)]
    return found


def in_sentences(text: str) -> list[str]:
    """Commands between backquotes that say enough to be run: with an option or an argument."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    found = [" ".join(command.split()) for command in re.findall(rf"`({START}\s[^`]+)`", prose)]
    return [c for c in found if re.match(r"python|torchrun|pytest", c) or (" --" in c and re.match(r"dmsa \w+", c))]


def in_docstrings(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = (ast.get_docstring(node) or "").replace("\\\n", " ")
            found += [plain(line) for line in text.splitlines() if re.match(rf"\s*{START} [\w.-]", line)]
    return found


def documented() -> dict[str, list[str]]:
    """Page → its commands, in order, each once."""
    pages = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        pages[page.relative_to(ROOT).as_posix()] = in_blocks(text) + in_sentences(text)
    folders = ("dmsa", "dmsa_kernels", "examples")
    sources = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    for source in [ROOT / "train.py", *sources, ROOT / "docs" / "img" / "make.py"]:
        pages[source.relative_to(ROOT).as_posix()] = in_docstrings(source)
    return {page: list(dict.fromkeys(commands)) for page, commands in pages.items() if commands}


def reason_not_to_run(command: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


def to_run() -> dict[str, list[str]]:
    """Page → its commands that run and are on no page before it, but for the names of data."""
    pages, seen = {}, set()
    for page, commands in documented().items():
        own = [c for c in commands if not reason_not_to_run(c) and (is_setting(c) or renamed(c) not in seen)]
        seen.update(map(renamed, own))
        if not all(map(is_setting, own)):
            pages[page] = own
    return pages


def is_setting(line: str) -> bool:
    return re.match(r"[A-Z]+=", line) is not None


def renamed(command: str) -> str:
    for pattern, name in NAMES.items():
        command = re.sub(pattern, name, command)
    return command


def shortened(command: str) -> str:
    command = renamed(command).replace("HOST:29400", f"127.0.0.1:{free_port()}")
    options = [options for pattern, options in SHORTER.items() if re.search(pattern, command)]
    assert options, f"nothing in SHORTER or NOT_RUN fits: {command}"
    command = f"{command} {options[-1]}".strip()
    if "--nnodes=2" in command:  # the same line on both hosts
        command = f"{{ {command} & }}; other=$!; {command}; own=$?; wait $other && exit $own"
    return command


def output_folder(command: str) -> str | None:
    """The folder that a command fills: its own choice, or its preset's."""
    if found := re.search(r"--out (\S+)", command):
        return found.group(1)
    if " pretrain" in command:
        return "runs/pretrain"
    if "train.py" not in command or "--help" in command:
        return None
    preset = re.search(r"--preset (\w+)", command)
    return f"runs/{preset.group(1) if preset else 'shapes'}"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run of the embedded set, for pages that speak of one which they do not train."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "train.py", *TINY.split(), "--out", str(folder / "run")]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return folder / "run"


@pytest.fixture
def workplace(tmp_path, finished_run):
    """A folder that looks like a checkout with data: programs, data roots, photographs, masks, two finished runs."""
    for name in ("shapes", "voc"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    for name in ("train.py", "dmsa", "dmsa_kernels", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("examples", "docs"):  # these write beside themselves
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path / name)], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, words in {
        "python": "", "torchrun": "-m torch.distributed.run", "dmsa": "-m dmsa.cli",
    }.items():  # fmt: skip
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    data = tmp_path / "data"
    fixtures.voc(data / "voc", train=12)
    with tarfile.open(data / "voc" / "VOCtrainval_11-May-2012.tar", "w") as archive:
        archive.add(data / "voc" / "VOCdevkit", "VOCdevkit")
    (tmp_path / "downloads").symlink_to(data / "voc")
    for split in ("train2017", "val2017"):
        fixtures.coco(data / "coco", split, images=12)
    for number in range(12):
        fixtures.write_image(tmp_path / "photos" / f"{number}.jpg", seed=number)
        for folder in ("masks", "true_masks"):
            fixtures.write_palette(tmp_path / "mask_set" / folder / f"{number}.png", fixtures.blocks([0, 1, 2]))
        (tmp_path / "mask_set" / "cams").mkdir(parents=True, exist_ok=True)
        cams = np.random.default_rng(number).random((2, 12, 16)).astype(np.float32)
        np.save(tmp_path / "mask_set" / "cams" / f"{number}.npy", cams)
    for name in ("true_masks", "cams"):
        (tmp_path / name).symlink_to(tmp_path / "mask_set" / name)
    (tmp_path / "images").symlink_to(tmp_path / "photos")
    return tmp_path


def predictions(workplace: Path, page: str) -> None:
    """Fill masks/ with what the page means by it: class indices of photographs, or predictions of VOC's images."""
    if page == "docs/masks.md":
        (workplace / "masks").symlink_to(workplace / "mask_set" / "masks")
    elif page != "docs/training.md":  # which makes its own
        for number in range(2):
            image = Image.open(workplace / f"data/voc/VOCdevkit/VOC2012/SegmentationClass/2007_val{number}.png")
            ids = np.where(np.array(image) == 255, 0, np.array(image))
            fixtures.write_palette(workplace / "masks" / f"2007_val{number}.png", ids)


def test_what_is_not_run_is_still_documented():
    everything = [command for commands in documented().values() for command in commands]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for command in everything), pattern


def test_every_page_has_its_commands():
    found = documented()
    assert "torchrun --nproc_per_node=6 train.py" in found["train.py"]
    assert sum("torchrun" in command for command in found["docs/training.md"]) >= 4
    assert sum(map(len, found.values())) > 50
    everything = [command for commands in found.values() for command in commands]
    run = [command for commands in to_run().values() for command in commands]
    assert {renamed(c) for c in everything if not reason_not_to_run(c)} == set(map(renamed, run))


@pytest.mark.slow
@pytest.mark.parametrize("page", list(to_run()))
def test_every_command_of_a_page_runs(workplace, page):
    predictions(workplace, page)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{workplace / 'programs'}:{ENVIRONMENT['PATH']}",
        "PYTHONPATH": str(workplace),
    }
    variables = ""
    for command in to_run()[page]:
        if is_setting(command):
            variables += f"{command}\n"
            continue
        # The lines of a page are alternatives: what one left would make the next one go on, or refuse.
        if out := output_folder(command):
            shutil.rmtree(workplace / out, ignore_errors=True)
        done = subprocess.run(
            ["bash", "-c", variables + shortened(command)],
            cwd=workplace, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
