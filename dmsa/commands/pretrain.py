"""`dmsa pretrain`: make a backbone for people without DINO weights."""

from __future__ import annotations

from dmsa import distributed
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.run import pretrain


def main(argv: list[str]) -> int:
    """``dmsa pretrain``: parse, train, report."""
    import tyro

    config = tyro.cli(PretrainConfig, args=argv, prog="dmsa pretrain", description=PretrainConfig.__doc__)
    try:
        pretrain(config)
    except (ValueError, FileNotFoundError) as error:
        distributed.complain(error, "dmsa pretrain")
        return 1
    return 0
