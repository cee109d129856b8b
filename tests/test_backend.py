import ast
import contextlib
import sys
from pathlib import Path

import pytest
import torch

import dmsa_kernels
from dmsa_kernels import backend, compat
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


def test_warmup_measures_launches_of_iterations(monkeypatch):
    """Where all iterations are one launch, tiles are not those that are measured."""
    module = sys.modules["dmsa_kernels.refine.warmup"]
    asked = []
    monkeypatch.setattr(module, "resolve", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(module, "_measured_configs", lambda *_: asked.append(backend.wants_resident()) or {})
    with backend.resident(True):
        dmsa_kernels.warmup(torch.rand(1, 3, 6, 6), torch.rand(1, 2, 6, 6), [1], 1)
        assert backend.wants_resident()
    assert asked == [False]


@pytest.mark.parametrize("version", [None, (2, 3), OLDEST_TRITON])
def test_the_triton_that_is_needed_is_named(monkeypatch, version):
    monkeypatch.setattr(backend, "triton_version", lambda: version)
    reason = backend.why_not_triton()
    assert reason is None if version == OLDEST_TRITON else "triton is" in reason
    if version == (2, 3):
        assert "triton is 2.3; the kernels need 3.0 or newer, which torch 2.4" in reason


def test_one_launch_for_all_iterations_is_asked_for(monkeypatch):
    monkeypatch.delenv("DMSA_RESIDENT", raising=False)
    assert not backend.wants_resident()
    for value, wanted in (("1", True), ("true", True), ("ON", True), ("0", False), ("no", False), ("", False)):
        monkeypatch.setenv("DMSA_RESIDENT", value)
        assert backend.wants_resident() == wanted, value
    monkeypatch.setenv("DMSA_RESIDENT", "1")
    with backend.resident(False):
        assert not backend.wants_resident()
        with backend.resident(True):
            assert backend.wants_resident()
        assert not backend.wants_resident()
    assert backend.wants_resident()


def test_the_processor_runs_no_programs_at_once(monkeypatch):
    assert compat.cooperative_programs(torch.device("cpu")) == 0
    properties = type("Properties", (), {"multi_processor_count": 108})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    for version, programs in (((3, 3), 0), ((3, 4), 108), (None, 0)):
        monkeypatch.setattr(compat, "triton_version", lambda version=version: version)
        assert compat.cooperative_programs(torch.device("cuda")) == programs
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert compat.cooperative_programs(torch.device("cuda")) == 0


@pytest.mark.parametrize("module", ["backend", "compat", "tuning"])
def test_the_ground_floor_imports_no_operator(module):
    path = Path(dmsa_kernels.__file__).parent / f"{module}.py"
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own = {node.module for node in imported if node.module.startswith("dmsa_kernels")}
    assert own <= {"dmsa_kernels.compat"}
