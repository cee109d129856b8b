"""No circles, and imports go one way: the order of rooms is that of docs/extending.md."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.imports import arrows_against, circle, import_graph, room

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    ["dmsa_kernels"],
    ["dmsa_kernels.refine", "dmsa_kernels.aspp"],
    ["dmsa_kernels.plans"],
    ["dmsa_kernels.tuning", "dmsa_kernels.backend"],
    ["dmsa_kernels.compat", "dmsa_kernels._version"],
)
FAMILY = (
    ["warmup"],
    ["modules", "convert"],
    ["fitted"],
    ["functional", "certainty"],
    ["ops"],
    ["eager", "reference", "triton", "resize"],
    ["padded"],
)
"""What a family's files are; any other is ground that these stand on."""
METHOD = (
    ["dmsa.cli"],
    ["dmsa.commands"],
    ["dmsa.training", "dmsa.pretrain", "dmsa.refinement"],
    ["dmsa.scoring"],
    ["dmsa.labels"],
    ["dmsa.visualize"],
    ["dmsa.models", "dmsa.data"],
    ["dmsa.checkpoint", "dmsa.distributed"],
    ["dmsa.config", "dmsa.files", "dmsa.random"],
    ["dmsa"],
)
PUBLIC = {"dmsa_kernels", "dmsa_kernels.refine", "dmsa_kernels.aspp"}


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT, ["dmsa", "dmsa_kernels"])


def inside(graph, package):
    """The modules of a package, and what they import of it."""
    own = {name: targets for name, targets in graph.items() if f"{name}.".startswith(f"{package}.")}
    return {name: {target for target in targets if target in own} for name, targets in own.items()}


def test_there_is_no_circle(graph):
    assert circle(graph) == []


def test_the_method_imports_downwards(graph):
    assert arrows_against(inside(graph, "dmsa"), METHOD) == []


def test_the_kernels_import_downwards(graph):
    assert arrows_against(inside(graph, "dmsa_kernels"), KERNELS) == []


@pytest.mark.parametrize("family", ["refine", "aspp"])
def test_a_family_of_operators_imports_downwards(graph, family):
    package = f"dmsa_kernels.{family}"
    modules = {name: targets for name, targets in inside(graph, package).items() if name != package}
    known = {name for row in FAMILY for name in row}
    ground = {name.split(".")[2] for name in modules} - known
    assert known & {name.split(".")[2] for name in modules}
    assert arrows_against(modules, [[f"{package}.{name}" for name in row] for row in (*FAMILY, [*ground])]) == []


def test_reference_and_kernels_do_not_know_each_other(graph):
    for family in ("refine", "aspp"):
        reference = f"dmsa_kernels.{family}.reference"
        assert not any(".triton" in target or ".eager" in target for target in graph[reference])
        assert not any(reference in graph[name] for name in graph if f"{family}.triton" in name)


def test_the_method_uses_public_names_of_the_kernels_and_they_none_of_it(graph):
    used = {t for name, targets in graph.items() if name.split(".")[0] == "dmsa" for t in targets}
    assert {target for target in used if target.split(".")[0] == "dmsa_kernels"} <= PUBLIC
    assert used & PUBLIC
    kernels = [targets for name, targets in graph.items() if name.split(".")[0] == "dmsa_kernels"]
    assert not any(target.split(".")[0] == "dmsa" for targets in kernels for target in targets)


def test_every_command_is_an_arrow(graph):
    commands = {name for name in graph if name.startswith("dmsa.commands.")}
    assert commands
    assert commands <= graph["dmsa.cli"]


TREE = {
    "house/__init__.py": "",
    "house/roof.py": "from house import wall",
    "house/wall/__init__.py": "",
    "house/wall/brick.py": "from ..ground import stone",
    "house/ground.py": "stone = 1",
}
HOUSE = (["house.roof"], ["house.wall"], ["house.ground"], ["house"])


def drawn(tmp_path, **changed):
    for name, text in {**TREE, **{key.replace("_", "/") + ".py": text for key, text in changed.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return import_graph(tmp_path, ["house"])


def test_the_checker_reads_a_tree(tmp_path):
    graph = drawn(tmp_path)
    assert graph["house.roof"] == {"house.wall"}
    assert graph["house.wall.brick"] == {"house.ground"}
    assert circle(graph) == []
    assert arrows_against(graph, HOUSE) == []


@pytest.mark.parametrize(
    "import_",
    [
        "import house.roof",
        "import house.roof as top",
        "from house.roof import chimney",
        "from house import roof",
        "from . import roof",
        "from .roof import chimney",
        """
        def later():
            from house.roof import chimney
        """,
        """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import house.roof
        """,
        """
        import importlib
        importlib.import_module("house.roof")
        """,
    ],
)
def test_the_checker_finds_arrows_up_and_circles(tmp_path, import_):
    graph = drawn(tmp_path, house_ground=import_)
    assert arrows_against(graph, HOUSE) == ["house.ground -> house.roof"]
    assert circle(graph) == []
    (tmp_path / "house/roof.py").write_text("from house.wall.brick import clay")
    found = circle(import_graph(tmp_path, ["house"]))
    assert found[0] == found[-1]
    assert set(found) == {"house.roof", "house.wall.brick", "house.ground"}


def test_the_checker_finds_arrows_sideways_and_homeless_modules(tmp_path):
    graph = drawn(tmp_path, house_roof="", house_ground="import house.cellar", house_cellar="")
    sideways = (["house.roof"], ["house.wall"], ["house.ground", "house.cellar"], ["house"])
    assert arrows_against(graph, sideways) == ["house.ground -> house.cellar"]
    assert arrows_against(graph, (*HOUSE[:3], ["house.cellar", "house"])) == []
    with pytest.raises(ValueError, match=r"house\.shed is in no room"):
        room("house.shed", HOUSE[:3])
