"""Which images each process gets in each step: reshuffled every epoch, resumable inside one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from dmsa.distributed import part
from dmsa.random import mix


class EpochBatches(Sampler[list[int]]):
    """Batches of one process. All processes draw the same permutation and take their part of every global batch.

    The permutation depends on `seed` and the epoch alone, so the images of a step do not depend on the number of
    processes, and an epoch can be entered at any step. Parts differ by one image at most. The images that do not fill a
    last batch are left out (others in every epoch).

    Args:
        length: number of samples of the data set.
        batch: images of a step over all processes.
        seed: seed of the permutations.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: more processes than images in a batch, or fewer samples than a batch.
    """

    def __init__(self, length: int, batch: int, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        check_shares(batch, world_size)
        if length < batch:
            raise ValueError(
                f"train.batch={batch} is more than the {length} training samples of an epoch; choose a smaller batch, "
                "more images, or a larger data.repeat"
            )
        self.length, self.batch, self.seed = length, batch, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.length // self.batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the step in it to begin with."""
        self.epoch, self.start = epoch, start

    def permutation(self) -> torch.Tensor:
        """Return the order of all samples in this epoch, int64 `[length]`."""
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        return torch.randperm(self.length, generator=generator)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order = self.permutation()
        own = part(self.batch, self.rank, self.world_size)
        for step in range(self.start, self.steps):
            begin = step * self.batch
            yield order[begin + own.start : begin + own.stop].tolist()


def check_shares(batch: int, world_size: int) -> None:
    """Check that every process gets an image of every batch.

    Raises:
        ValueError: more processes than images in a batch.
    """
    if world_size > batch:
        raise ValueError(
            f"{world_size} processes cannot share train.batch={batch}, the images of a step over all of them: start at "
            f"most {batch}, or choose a larger batch"
        )
