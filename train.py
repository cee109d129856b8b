"""Train DMSA.

One process, the embedded data set and backbone (minutes on two CPU cores):

    python train.py

PASCAL VOC 2012 on one host with six GPUs (the same global batch whatever their number):

    torchrun --nproc_per_node=6 train.py --preset voc --data.root /data/voc

Two hosts; run it on both, HOST is one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 train.py --preset coco80 \\
        --data.root /data/coco

The same command again goes on from the run folder's last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import record

from dmsa.cli import needs_extra
from dmsa.config import parse


@record
def main(argv: list[str] | None = None) -> int:
    """Parse, build, run; return the exit status."""
    try:
        config = parse(argv, prog="train.py", description=__doc__ or "")
    except ModuleNotFoundError as error:
        print(f"train.py: error: {needs_extra(error)}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    from dmsa.training.session import CANNOT_START, complete, started

    with contextlib.ExitStack() as stack:
        try:
            trainer = stack.enter_context(started(config, [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]))
        except CANNOT_START as error:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                raise  # the launcher shows which process failed, and with what
            print(f"train.py: error: {error}", file=sys.stderr)
            return 2
        try:
            complete(trainer)
        except KeyboardInterrupt:
            newest = trainer.store.newest()
            goes_on = f"goes on from {newest}" if newest else "begins again: there is no checkpoint yet"
            print(f"\ntrain.py: stopped; the same command {goes_on}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
