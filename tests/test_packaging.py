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
from email.parser import HeaderParser
from pathlib import Path

import pytest

from dmsa_kernels import __version__

ROOT = Path(__file__).parents[1]
BASE = {"torch", "triton", "numpy"}
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


def test_base_install_needs_three_packages(dist):
    with wheel(dist) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    required = metadata.get_all("Requires-Dist")
    base = {re.match(r"[\w.-]+", line).group() for line in required if "extra ==" not in line}
    assert base == BASE
    assert set(metadata.get_all("Provides-Extra")) == {"train", "test", "bench"}
    assert metadata["License-Expression"] == "MIT"


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
