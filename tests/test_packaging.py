"""What a user gets from `pip install`: the wheel's contents, the base install's dependencies, help without extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dmsa_kernels import __version__

ROOT = Path(__file__).parents[1]
BASE = {"torch", "numpy"}
# What people have beside each other: PyTorch, the Triton that it brought, a NumPy of its time.
INSTALLED = [
    {"torch": "2.1.2", "triton": "2.1.0", "numpy": "1.26.4"},
    {"torch": "2.4.1", "triton": "3.0.0", "numpy": "1.26.4"},
    {"torch": "2.6.0", "triton": "3.2.0", "numpy": "2.1.3"},
]
BUILD = "from setuptools import build_meta as b; print(b.build_wheel('dist')); print(b.build_sdist('dist'))"


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheel and the source archive, built without isolation from a copy of the sources."""
    found = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(found.partition(".")[0]) < 77:
        pytest.skip(f"the build backend is setuptools >= 77, here is {found}; pip would fetch its own")
    copy = tmp_path_factory.mktemp("source")
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("dmsa", "dmsa_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=caches)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, copy)
    (copy / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return copy / "dist"


def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_the_packages_and_their_data_and_nothing_else(dist):
    with wheel(dist) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"dmsa_kernels-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dmsa", "dmsa_kernels", info}
    wanted = set()
    for package in ("dmsa", "dmsa_kernels"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(ROOT).as_posix() for path in files}
    assert wanted <= names, f"not in the wheel: {sorted(wanted - names)}"
    for file in ("dmsa_kernels/py.typed", "dmsa/py.typed", "dmsa/tables/voc.json", "dmsa/presets/shapes.yaml"):
        assert file in names
    assert any(name.startswith("dmsa/weights/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in names)


def metadata_of(dist: Path) -> Message:
    with wheel(dist) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        return HeaderParser().parsestr(archive.read(path).decode())


def requirements(dist: Path, extra: str = "") -> list[Requirement]:
    """What pip would resolve here: the base install's requirements, or with those of an extra."""
    listed = [Requirement(line) for line in metadata_of(dist).get_all("Requires-Dist")]
    return [r for r in listed if r.marker is None or r.marker.evaluate({"extra": extra})]


def test_base_install_needs_two_packages(dist):
    metadata = metadata_of(dist)
    assert {requirement.name for requirement in requirements(dist)} == BASE
    assert set(metadata.get_all("Provides-Extra")) == {"train", "test", "bench"}
    assert metadata["License-Expression"] == "MIT"


@pytest.mark.parametrize("installed", INSTALLED, ids=lambda installed: f"torch-{installed['torch']}")
def test_installing_replaces_nothing(dist, installed):
    """Every requirement is met by what is there, so that pip has nothing to fetch; triton is torch's business."""
    for requirement in requirements(dist):
        assert requirement.specifier.contains(installed[requirement.name]), str(requirement)
    assert "triton" not in {requirement.name for requirement in requirements(dist)}


def test_training_may_ask_for_more(dist):
    (torch, *_) = (r for r in requirements(dist, "train") if r.name == "torch" and r.marker)
    assert not torch.specifier.contains("2.6.0")
    assert torch.specifier.contains("2.14.1")


def test_the_kernels_are_python_3_9():
    """Syntax and library use; ruff, whose target for this package is the same, sees the syntax."""
    if importlib.util.find_spec("vermin") is None:
        pytest.skip("vermin, which reads from sources what they need, is not installed (it comes with the extra test)")
    main = "from vermin import main; main()"
    command = [sys.executable, "-c", main, "--target=3.9-", "--violations", "--no-tips", "dmsa_kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_source_archive_can_build_the_same(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    with wheel(dist) as built:
        code = {name for name in built.namelist() if ".dist-info" not in name}
    assert code <= names


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
import dmsa_kernels
from dmsa import cli
import train

assert cli.main(["--help"]) == 0 and cli.main(["--version"]) == 0
for command in cli.COMMANDS:
    assert cli.main([command, "--help"]) == 1, command
assert train.main([]) == 2
"""


def test_base_install_imports_and_names_the_extra():
    extras = ["timm", "pycocotools", "sklearn", "scipy", "tyro", "tqdm", "tensorboard", "safetensors", "PIL", "yaml"]
    code = BLOCKED.format(blocked={*extras, "matplotlib"})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = re.findall(
        r"needs (\w+), which the base install does not have: pip install 'dmsa-kernels\[train\]'", done.stderr
    )
    from dmsa import cli

    assert len(told) == len(cli.COMMANDS) + 1
    assert set(told) <= {*extras, "matplotlib"}
