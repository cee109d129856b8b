import importlib

import pytest

from dmsa import cli
from dmsa_kernels import __version__


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dmsa {__version__}\n"


def test_misspelt_command_suggests(capsys):
    assert cli.main(["docter"]) == 2
    assert "did you mean 'doctor'?" in capsys.readouterr().err


def lacking(name):
    def load(_module):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return load


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lacking("tyro.conf"))
    assert cli.main(["predict"]) == 1
    needs = "needs tyro, which the base install does not have: pip install 'dmsa-kernels[train]'"
    assert capsys.readouterr().err == f"dmsa predict: {needs}\n"


def test_a_module_of_our_own_that_is_missing_is_a_fault(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lacking("dmsa.commands.predict"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["predict"])
