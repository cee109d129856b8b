"""What tests of runs share."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (folder / "deeper").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 256, (50 + 10 * i, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if i % 2 else ".") / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """A network with random weights: name and file."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("strong") / "test_efficientnet.pth"
    torch.save(timm.create_model("test_efficientnet", pretrained=False).state_dict(), path)
    return {"teacher": "test_efficientnet", "teacher_weights": str(path)}
