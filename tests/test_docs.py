"""What the documentation says is so: quoted messages, commands, options, links, code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dmsa import cli, config
from dmsa_kernels.refine import PAMR, PAR, LocalConsistencyModule

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.S | re.M)
    return [re.sub(rf"(?m)^{indent}", "", body) for indent, body in found]


def source() -> str:
    """All Python sources, with adjacent string literals joined and backslashes of quotes removed."""
    files = [file for package in ("dmsa", "dmsa_kernels") for file in sorted((ROOT / package).rglob("*.py"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_quoted_messages_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(messages) == 21
    text = source()
    for message in messages:
        pieces = [re.escape(piece) for piece in message.split("…") if piece.strip(" :.,;")]
        assert pieces, message
        assert re.search(r"[^\n]{0,120}?".join(pieces), text), f"no source for: {message}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:tests|dmsa|dmsa_kernels|benchmarks|docs|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def commands(text: str) -> list[list[str]]:
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(.*)"$', joined, re.M):
        joined = joined.replace(f"${name}", value)
    return [shlex.split(line, comments=True) for line in joined.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_parse(page):
    for words in commands(page.read_text(encoding="utf-8")):
        if "train.py" in words and "..." not in words:
            arguments = words[words.index("train.py") + 1 :]
            assert config.parse(arguments).data.name
        if words and words[0] == "dmsa":
            assert words[1] in cli.COMMANDS


def test_ci_runs_the_readme_command():
    (command,) = [line for block in blocks(README, "bash") for line in block.splitlines() if "&& pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_code_runs():
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), {})


def test_readme_replacements_are_callable():
    image, masks = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 9, 9)
    names = {"PAR": PAR, "PAMR": PAMR, "LocalConsistencyModule": LocalConsistencyModule}
    calls = re.findall(rf"`((?:{'|'.join(names)})\(\w+=[^`]+\))`", README)
    assert len(calls) == 4
    page = (ROOT / "docs" / "dropin.md").read_text(encoding="utf-8")
    for call in calls + re.findall(rf"`((?:{'|'.join(names)})\(num_iter=\d[^`]+\))`", page):
        module = eval(call, names)
        assert module(image, masks).shape == masks.shape


def test_pages_name_no_unknown_option():
    known = {f"--{key}".replace("_", "-").replace(".", "-") for key in config.flatten(config.to_dict(config.Config()))}
    for page in PAGES:
        found = re.findall(
            r"`--((?:data|model|rates|labels|losses|train)[.-][a-z_.-]+)", page.read_text(encoding="utf-8")
        )
        for option in found:
            assert f"--{option}".replace("_", "-").replace(".", "-") in known, f"{page.name}: --{option}"
