"""Run the trainer in child processes and kill them with SIGKILL at chosen moments.

Started as a script, this imports everything once, runs no parallel code, and then forks a child for every attempt: an
attempt costs no import. It reads a JSON plan from the command line and writes one JSON result to stdout.

    {"config": {...}, "out": "...", "attempts": [attempt, ...], "processes": 1}

An attempt is null (run to the end), {"operation": n} (rank 0 dies just before the n-th opening, renaming or removing of
a file of the run folder), {"seconds": s} (all die after so long), or {"rank": r, "step": n} (one rank dies, in step n).
With "processes", "out" or "train" (options of that section) an attempt has its own.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _arm(attempt: dict, out: str, rank: int) -> None:
    if "operation" in attempt and rank == 0:
        left = [attempt["operation"]]
        folder = os.path.abspath(out)

        def watch(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.remove", "os.link", "os.truncate") and os.path.abspath(
                str(arguments[0])
            ).startswith(folder):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
    if attempt.get("rank") == rank:
        from dmsa.training.trainer import Trainer

        step = Trainer._step

        def fatal(self, batch):
            if self.state.step == attempt["step"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch)

        Trainer._step = fatal


def _child(config, attempt: dict | None, out: str, rank: int, processes: int, port: int) -> None:
    status = 1
    try:
        sys.stdout = sys.stderr
        if processes > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if attempt:
            _arm(attempt, out, rank)
        from dmsa.training.session import train

        train(config, ["train.py"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(config, attempt: dict | None, out: str, processes: int) -> dict:
    port = free_port()
    started = time.monotonic()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _child(config, attempt, out, rank, processes, port)
        children.append(child)
    deadline = started + attempt["seconds"] if attempt and "seconds" in attempt else None
    statuses: dict[int, int] = {}
    died = None
    while len(statuses) < processes:
        for rank, child in enumerate(children):
            if rank not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
                    died = died or time.monotonic()
        killed = -signal.SIGKILL in statuses.values() and not (attempt and "rank" in attempt)
        if killed or (deadline and time.monotonic() > deadline):
            for rank, child in enumerate(children):
                if rank not in statuses:
                    os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)
    return {
        "statuses": [statuses[rank] for rank in range(processes)],
        "seconds": time.monotonic() - started,
        "last_after_first": time.monotonic() - died,
    }


def main() -> None:
    plan = json.loads(sys.argv[1])
    import torch

    from dmsa.config import from_dict

    torch.set_num_threads(1)
    for module in (
        "dmsa.data.shapes",
        "dmsa.training.session",
        "dmsa.models.conv_stem",
        "dmsa_kernels",
        "scipy.optimize",
        "sklearn.cluster",
        "timm.models.vision_transformer",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "tqdm",
    ):
        importlib.import_module(module)
    results = []
    for attempt in plan["attempts"]:
        own = attempt or {}
        out = own.get("out", plan["out"])
        values = {**plan["config"], "train": {**plan["config"]["train"], **own.get("train", {})}, "out": out}
        results.append(run(from_dict(values), attempt, out, own.get("processes", plan.get("processes", 1))))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
