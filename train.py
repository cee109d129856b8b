"""Train DMSA.

The embedded data set and backbone, with one process (minutes on two CPU cores) or six:

    python train.py
    torchrun --nproc_per_node=6 train.py

The same with any number of processes up to the global batch, and the same result. PASCAL VOC 2012 on six GPUs:

    torchrun --nproc_per_node=6 train.py --preset voc --data.root /data/voc

Two hosts; run it on both, HOST is one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py --preset coco80 \\
        --data.root /data/coco

The same command again goes on from the run folder's last checkpoint.
"""

from __future__ import annotations

import os
import sys
import traceback

from dmsa import distributed
from dmsa.cli import needs_extra
from dmsa.config import parse
from dmsa.training.run import NotScoredError

SAY_ENOUGH = (OSError, FloatingPointError, NotScoredError, distributed.ElsewhereError)
"""Errors of a run whose line needs no traceback; while it is built, wrong values and types are the user's."""


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; return the exit status."""
    trainer = None
    try:
        with distributed.first_of_host_speaks():
            config = parse(argv, prog="train.py", description=__doc__ or "")
        from dmsa.training.session import complete, started

        with started(config, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]) as trainer:
            complete(trainer)
    except ModuleNotFoundError as error:
        print(f"train.py: error: {needs_extra(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        newest = trainer and trainer.store.newest()
        goes_on = f"goes on from {newest}" if newest else "begins again: there is no checkpoint yet"
        print(f"\ntrain.py: stopped; the same command {goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        distributed.complain(error, "train.py: error")
        if isinstance(error, distributed.LostRankError):
            os._exit(1)  # a backend that still waits for the lost rank would not let the process end
        if not isinstance(error, SAY_ENOUGH if trainer else (*SAY_ENOUGH, ValueError, TypeError)):
            traceback.print_exc()
        return 1 if trainer else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
