import ast
from pathlib import Path

import pytest
import torch

import dmsa_kernels
from dmsa_kernels import backend
from dmsa_kernels.backend import resolve, why_not_triton
from dmsa_kernels.compat import OLDEST_TRITON


def test_auto_takes_eager_on_the_cpu():
    assert resolve("auto", torch.zeros(1)) == "eager"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='cuda'"):
        resolve("cuda", torch.zeros(1))


def test_triton_on_cpu_tensors_says_why(monkeypatch):
    monkeypatch.setattr(backend, "triton_version", lambda: OLDEST_TRITON)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="cannot run: tensors are on the CPU"):
        resolve("triton", torch.zeros(1))


def test_double_is_not_for_triton(monkeypatch):
    monkeypatch.setattr(backend, "triton_version", lambda: OLDEST_TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in why_not_triton(torch.zeros(1, dtype=torch.float64))


def test_warmup_off_the_gpu_runs_once_and_measures_nothing():
    image, masks = torch.rand(1, 3, 6, 6, requires_grad=True), torch.rand(1, 2, 6, 6, requires_grad=True)
    valid = torch.tensor([[True, False]])
    for options in ({}, {"valid_classes": valid}, {"return_labels": True}, {"precision": "fast", "spec": "pamr"}):
        assert dmsa_kernels.warmup(image, masks, [1], 1, **options) == {}
    assert dmsa_kernels.warmup(image, masks, iter([1]), 0) == {}
    assert image.grad is masks.grad is None


@pytest.mark.parametrize("version", [None, (2, 3), OLDEST_TRITON])
def test_the_triton_that_is_needed_is_named(monkeypatch, version):
    monkeypatch.setattr(backend, "triton_version", lambda: version)
    reason = backend.why_not_triton()
    assert reason is None if version == OLDEST_TRITON else "triton is" in reason
    if version == (2, 3):
        assert "triton is 2.3; the kernels need 3.0 or newer, which torch 2.4" in reason


@pytest.mark.parametrize("module", ["backend", "compat", "tuning"])
def test_the_ground_floor_imports_no_operator(module):
    path = Path(dmsa_kernels.__file__).parent / f"{module}.py"
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own = {node.module for node in imported if node.module.startswith("dmsa_kernels")}
    assert own <= {"dmsa_kernels.compat"}
