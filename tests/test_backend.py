import pytest
import torch

from dmsa_kernels.backend import resolve, why_not_triton


def test_auto_takes_eager_on_the_cpu():
    assert resolve("auto", torch.zeros(1)) == "eager"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend='cuda'"):
        resolve("cuda", torch.zeros(1))


def test_triton_on_cpu_tensors_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="cannot run: tensors are on the CPU"):
        resolve("triton", torch.zeros(1))


def test_double_is_not_for_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in why_not_triton(torch.zeros(1, dtype=torch.float64))


def test_warmup_off_the_gpu_runs_once_and_measures_nothing():
    from dmsa_kernels.backend import warmup

    image, masks = torch.rand(1, 3, 6, 6, requires_grad=True), torch.rand(1, 2, 6, 6, requires_grad=True)
    valid = torch.tensor([[True, False]])
    for options in ({}, {"valid_classes": valid}, {"return_labels": True}, {"precision": "fast", "spec": "pamr"}):
        assert warmup(image, masks, [1], 1, **options) == {}
    assert warmup(image, masks, iter([1]), 0) == {}
    assert image.grad is masks.grad is None
