"""The ``dmsa`` command: one table of subcommands, each implemented (and imported) in its own module."""

from __future__ import annotations

import importlib
import io
import sys

COMMANDS = {
    "doctor": (
        "dmsa.commands.doctor",
        "look at a data root: what is there, what is missing, where it comes from",
    ),
    "prepare": ("dmsa.commands.prepare", "unpack the official archives into the expected layout"),
    "pretrain": ("dmsa.commands.pretrain", "make a backbone for people without DINO weights"),
    "eval": ("dmsa.commands.eval", "score a checkpoint, or a folder of predicted masks of any method"),
    "predict": ("dmsa.commands.predict", "segment images with a checkpoint: palette PNGs and overlays"),
    "refine": ("dmsa.commands.refine", "refine a folder of pseudo masks along the edges of their photographs"),
    "export": ("dmsa.commands.export", "write a checkpoint's segmenter for deployment"),
    "ablate": ("dmsa.commands.ablate", "run the paper's ablation on the embedded set"),
}


def usage() -> str:
    """Return the text of ``dmsa --help``."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: dmsa COMMAND [OPTIONS]\n\n"
        "Unsupervised semantic segmentation with DMSA. Training is `python train.py`.\n\n"
        f"commands:\n{rows}\n\n"
        "`dmsa COMMAND --help` describes a command's options; `dmsa --version` prints the version."
    )


def needs_extra(error: ModuleNotFoundError) -> str:
    """Return what to install when a package of the extra `train` is missing; any other missing module is a fault."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "dmsa", "dmsa_kernels"):
        raise error
    return f"needs {package}, which the base install does not have: pip install 'dmsa-kernels[train]'"


def main(argv: list[str] | None = None) -> int:
    """Run ``dmsa`` with ``argv`` (default: the process's arguments) and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8, or terminals that are not
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from dmsa_kernels import __version__

        print(f"dmsa {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"dmsa: unknown command {argv[0]!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    except ModuleNotFoundError as error:
        print(f"dmsa {argv[0]}: {needs_extra(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        from dmsa import distributed

        told = (ValueError, OSError, distributed.ElsewhereError, distributed.LostRankError)
        if not isinstance(error, told):
            raise
        distributed.complain(error, f"dmsa {argv[0]}")  # its message says what to do, a traceback would bury it
        return 1


if __name__ == "__main__":
    sys.exit(main())
