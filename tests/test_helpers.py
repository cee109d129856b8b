import pytest
import torch

from dmsa_kernels.refine.spec import PAMR, PAR
from tests.helpers import (
    LargestTensor,
    border,
    brute_affinity,
    brute_propagate,
    golden,
    relative_norm,
    require_backend,
)


def test_border_marks_the_band_and_nothing_else():
    assert border(4, 5, 1).tolist() == [
        [True] * 5,
        [True, False, False, False, True],
        [True, False, False, False, True],
        [True] * 5,
    ]
    assert border(3, 3, 2).all()
    assert not border(3, 3, 0).any()


def test_relative_norm():
    assert relative_norm(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_brute_affinity_of_a_flat_image_is_uniform():
    weights = brute_affinity(torch.full((1, 2, 3, 3), 0.7), [1, 2], PAMR)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 16), rtol=0, atol=1e-15)


def test_brute_affinity_by_hand():
    # A single pixel that differs: for the pixel itself all neighbours are equally far.
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 1
    weights = brute_affinity(image, [1], PAMR)
    assert torch.allclose(weights[0, :, 1, 1], torch.full((8,), 1 / 8, dtype=torch.float64))
    # For its left neighbour, the pixel on the right is the only one that differs.
    assert weights[0, 4, 1, 0] < 1e-6
    assert weights[0, 0, 1, 0] == pytest.approx(1 / 7, abs=1e-6)


def test_brute_affinity_sums_to_one_and_the_position_weight():
    weights = brute_affinity(torch.rand(1, 1, 4, 3), [1], PAR)
    assert torch.allclose(weights.sum(1), torch.full((1, 4, 3), 1.01, dtype=torch.float64))


def test_brute_propagate_moves_a_plane_and_clamps():
    weights = torch.zeros(1, 8, 2, 3)
    weights[:, 3] = 1  # the left neighbour
    masks = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    assert brute_propagate(weights, masks, [1], 1).tolist() == [[[[1, 1, 2], [4, 4, 5]]]]
    assert brute_propagate(weights, masks, [1], 2).tolist() == [[[[1, 1, 1], [4, 4, 4]]]]


def test_largest_tensor_sees_storage_and_operators():
    x = torch.zeros(10, 10)
    with LargestTensor() as largest:
        (x[:2] + 1).sum()
    assert largest.elements == 100
    with LargestTensor() as largest:
        torch.ones(7)
    assert largest.elements == 7
    assert "aten.ones.default" in largest.operators


def test_golden_has_settings_and_arrays():
    data = golden("pamr_small")
    assert (data["kind"], data["dilations"], data["num_iter"]) == ("pamr", [1, 2, 4], 4)
    assert data["refined_fp64"].dtype == torch.float64


def test_require_backend_skips_only_what_cannot_run(monkeypatch):
    require_backend("eager")
    monkeypatch.setattr("tests.helpers.why_not_triton", lambda *tensors: "no device")
    with pytest.raises(pytest.skip.Exception, match="no device"):
        require_backend("triton")
