"""Compile kernels for GPUs that are not there, and read what the compiler made of them.

A Triton module joins by being named in ``MODULES`` and by offering ``offline_cases() -> Iterable[OfflineCase]`` (from
``dmsa_kernels.tuning``): one case a launch, with the argument types, the compile-time constants and the number of warps
that the launcher uses. All pointers are taken as 16-byte aligned. Cases run for every target; a case with
``every_target=False`` (another tile of a kernel that is listed for all) only for sm_90.

Run it for the report::

    python -m tests.offline [--targets sm_90 gfx942] [--match propagate]

It prints one JSON line a compilation: registers, bytes of stack, spills, instructions, how many global loads there are
of each width, and what orders memory where programs wait for each other. ``TRITON_INTERPRET`` must be unset: under it
``triton.jit`` gives interpreted functions. The tests therefore run this module in a process of its own.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator

from benchmarks.modelling import machine_code

MODULES = (
    "dmsa_kernels.refine.triton.affinity",
    "dmsa_kernels.refine.triton.propagate",
    "dmsa_kernels.refine.triton.resident",
    "dmsa_kernels.refine.triton.backward",
    "dmsa_kernels.aspp.triton.forward",
    "dmsa_kernels.aspp.triton.backward",
    "dmsa_kernels.aspp.triton.project",
)
TARGETS = ("sm_90", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942")


def _source(case):
    """Describe a case's launch to the compiler, in the words of the Triton that is installed."""
    import triton.compiler

    names = list(case.kernel.arg_names)
    unknown = (set(case.types) | set(case.constants)) - set(names)
    if unknown:
        raise ValueError(f"{case.name}: {sorted(unknown)} are not arguments of the kernel; it has {names}")
    types = {n: case.types.get(n, "i32") for n in names if n not in case.constants}
    aligned = [i for i, n in enumerate(names) if str(types.get(n)).startswith("*")]  # a tuple is none
    if "constexprs" in inspect.signature(triton.compiler.ASTSource).parameters:  # 3.3 and later
        return triton.compiler.ASTSource(
            fn=case.kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): value for n, value in case.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
    if not hasattr(triton.compiler, "AttrsDescriptor"):  # 3.2
        from triton.backends.compiler import AttrsDescriptor

        attrs = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    else:
        attrs = triton.compiler.AttrsDescriptor(divisible_by_16=set(aligned))
    return triton.compiler.ASTSource(fn=case.kernel, signature=types, constants=dict(case.constants), attrs=attrs)


def compile_case(case, target: str) -> dict:
    """Compile one case for one target and return its report."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(case)
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    num_warps = max(1, case.num_warps * 32 // gpu.warp_size)
    # The code is the same without the sums in 64 bits, which an assertion that nobody asked for would compare.
    fixed = {"enable_fp_fusion": True, "sanitize_overflow": False}
    options = {"num_warps": num_warps, **fixed, **dict(case.options)}
    compiled = triton.compile(source, target=gpu, options=options)
    report = {"case": case.name, "target": target}
    if not nvidia:
        # the assembly's metadata; 64-bit global loads and up are the wide ones
        assembly = compiled.asm["amdgcn"]
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
        report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly).group(1))
        report["loads"] = dict(collections.Counter(re.findall(r"(?:global|buffer)_load_\w+", assembly)))
        return report
    code = machine_code.read(compiled.asm["cubin"])
    loads = {bits: code.total[f"load{bits}"] for bits in ("8", "16", "32", "64", "128") if code.total[f"load{bits}"]}
    if any(opcode.startswith("MEMBAR") for opcode in code.ordering):
        report["ordering"] = code.ordering
    return report | {
        "registers": code.registers,
        "stack": code.stack,
        "spills": code.spills,
        "instructions": sum(code.total.values()),
        "loads": loads,
    }


def cases(match: str = "") -> Iterator:
    """Yield the cases of all modules whose name contains ``match``."""
    for module in MODULES:
        for case in importlib.import_module(module).offline_cases():
            if match in case.name:
                yield case


def main(argv: list[str]) -> None:
    """Compile and print; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th compilation, starting at i")
    parser.add_argument("--each", action="store_true", help="one case a kernel, and report what does not compile")
    arguments = parser.parse_args(argv)
    index, count = map(int, arguments.share.split("/"))
    listed = list(cases(arguments.match))
    if arguments.each:  # the last one: the longest dilation list of those that are compiled for every target
        listed = list({case.kernel: case for case in listed if case.every_target}.values())
    work = [
        (c, t) for c in listed for t in arguments.targets if t not in c.but_for and (c.every_target or t == TARGETS[0])
    ]
    for case, target in work[index::count]:
        try:
            report = compile_case(case, target)
        except Exception as error:
            if not arguments.each:
                raise
            lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip(" ^")]
            report = {"case": case.name, "target": target, "error": lines[-1].strip()}
        if "HOLD_WEIGHTS" in case.constants:
            report["holds_weights"] = case.constants["HOLD_WEIGHTS"]
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
