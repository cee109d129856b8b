"""The model that needs no GPU: its parts by hand, and one row of it over the stub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measuring.results import result_files
from benchmarks.modelling import gpus, lanes, machine_code, stub, table
from benchmarks.modelling.machine_code import Count
from benchmarks.modelling.model import Cost, clocks, predict, wavefronts_of

pytest.importorskip("triton", reason="the model reads what Triton compiles")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the stub is compiled by cc")

USAGE = "Function f:\n  REG:48 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:648\n"
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FFMA R8, R4, R5, R8 ;
        /*0030*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
"""


def test_a_disassembly_is_read():
    code = machine_code.parse_code(USAGE, CODE)
    assert (code.registers, code.stack, code.spills) == (48, 8, 1)
    assert dict(code.loop) == {"load128": 1, "fp32": 1, "predicate": 1, "control": 1}
    assert sum(code.total.values()) == 7  # without the padding
    assert not code.nested
    assert not code.ordering
    assert dict(code.outside) == {"constant": 1, "spill": 1, "control": 1}
    with pytest.raises(ValueError, match="no resource usage"):
        machine_code.parse_usage("")


def test_loops_in_loops_and_what_orders_memory_are_read():
    nested = """
.L_x_1:
        /*0000*/                   MEMBAR.ALL.GPU ;
        /*0010*/                   IMAD R1, R2, R3, R4 ;
.L_x_2:
        /*0020*/                   FFMA R8, R4, R5, R8 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/               @P1 LDG.E.STRONG.GPU R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0060*/                   BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""
    code = machine_code.parse_code(USAGE, nested)
    assert dict(code.nested) == {"fp32": 1, "control": 1}
    assert dict(code.loop - code.nested) == {"control": 2, "multiply": 1, "load32": 2}
    assert code.ordering == ("MEMBAR.ALL.GPU", "LDG.E.STRONG.GPU")


def test_warps_that_fit_by_registers():
    h100, ampere = gpus.GPUS["H100"], gpus.GPUS["3090"]
    assert h100.resident_warps(128, 8) == 16
    assert h100.resident_warps(129, 8) == 8
    assert h100.resident_warps(32, 8) == 64
    assert ampere.resident_warps(32, 8) == 48


def test_a_prediction_adds_launches_and_names_the_longest():
    cost = Cost("kernel", {"L1": 1e-5, "L2": 2e-5}, 1.5, 100, 0, taps_s=1e-5)
    found = predict([cost, cost], stub_host_s=1e-6)
    assert found.device_s == pytest.approx(2 * 3e-5 + 2 * gpus.LAUNCH_GAP_S)
    assert found.bound == "L2"
    late = Cost("kernel", {"L1": 1e-5}, 1.0, 100, 0, taps_s=1e-5, meetings_s=4e-5)
    assert predict([late], 0.0).device_s == pytest.approx(5e-5 + gpus.LAUNCH_GAP_S)
    assert found.share == pytest.approx(2e-5 / found.device_s)
    assert predict([cost], stub_host_s=1.0).bound == "host"


LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], warpsPerCTA = [1, 1], order = [1, 0]}>
#blocked1 = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [1], order = [0]}>
  tt.func public @f(%x_ptr: !tt.ptr<f32> loc("x_ptr"(#loc)), %w_ptr: !tt.ptr<f32> loc("w_ptr"(#loc))) {
    %1 = tt.splat %w_ptr : !tt.ptr<f32> -> tensor<32x!tt.ptr<f32>, #blocked1> loc(#loc1)
    %2 = tt.load %1, %m : tensor<32x!tt.ptr<f32>, #blocked1> loc(#loc1)
    %t = scf.while (%t_9 = %c0) : (i32) -> i32 {
      scf.condition(%0) %t_9 : i32 loc(#loc2)
    } do {
    ^bb0(%t_9: i32 loc("t"(#loc2))):
      %3 = tt.addptr %x_ptr, %t_9 : !tt.ptr<f32>, i32 loc(#loc3)
      %4 = tt.splat %3 : !tt.ptr<f32> -> tensor<64x16x!tt.ptr<f32>, #blocked> loc(#loc3)
      %5 = tt.load %4 : tensor<64x16x!tt.ptr<f32>, #blocked> loc(#loc3)
      %6 = tt.load %w_8 : tensor<16x!tt.ptr<f32>, #ttg.slice<{dim = 0, parent = #blocked}>> loc(#loc3)
      scf.yield %t : i32 loc(#loc2)
    } loc(#loc2)
    tt.store %1, %2 : tensor<32x!tt.ptr<f32>, #blocked1> loc(#loc1)
"""


def test_layouts_of_loads_and_stores_are_read():
    outside, wide, filters, store = lanes.accesses(LAYOUTS)
    assert [(a.kind, a.pointer, a.in_loop, a.adjacent) for a in (outside, wide, store)] == [
        ("load", "w_ptr", False, 1),
        ("load", "x_ptr", True, 4),
        ("store", "w_ptr", False, 1),
    ]
    assert outside.first_values() == [(lane,) for lane in range(32)]
    assert wide.first_values() == [(lane // 4, 4 * (lane % 4)) for lane in range(32)]
    assert filters.first_values() == [(4 * (lane % 4),) for lane in range(32)]  # eight pixels take the same filters


@pytest.mark.parametrize(
    ("offsets", "nbytes", "first", "expected"),
    [
        pytest.param(range(0, 128, 4), 4, 0, (1, 1, 1), id="a line"),
        pytest.param(range(0, 128, 4), 4, 4, (1, 1, 2), id="the same, from inside a line"),
        pytest.param(range(0, 512, 16), 4, 0, (1, 4, 4), id="16 bytes apart"),
        pytest.param([0] * 32, 4, 0, (1, 1, 1), id="one word"),
        pytest.param(range(0, 64, 2), 2, 0, (1, 1, 1), id="16-bit values"),
        pytest.param(range(0, 256, 8), 8, 0, (2, 2, 2), id="64 bits a lane"),
        pytest.param(range(0, 512, 16), 16, 0, (4, 4, 4), id="128 bits a lane"),
        pytest.param(range(0, 512, 16), 16, 16, (4, 4, 8), id="the same, from inside a line"),
        pytest.param([lane // 4 * 1536 + lane % 4 * 16 for lane in range(32)], 16, 0, (4, 8, 8), id="64 bytes a pixel"),
        pytest.param(
            [lane // 2 * 1536 + lane % 2 * 16 for lane in range(32)], 16, 0, (4, 16, 16), id="32 bytes a pixel"
        ),
        pytest.param(range(0, 32 * 128, 128), 4, 0, (8, 32, 32), id="a line each"),
    ],
)
def test_wavefronts_of_a_warp_by_hand(offsets, nbytes, first, expected):
    """By what L1 reads in a clock: any bytes, banks, one line."""
    assert tuple(lanes.wavefronts(tuple(offsets), nbytes, first, reads) for reads in lanes.READS) == expected
    with pytest.raises(ValueError, match="bytes, banks, lines"):
        lanes.wavefronts(tuple(offsets), nbytes, first, "sectors")


def test_first_level_cache_counts_wavefronts():
    count = Count({"load32": 3, "load128": 2, "fp32": 7})
    assert clocks(count, {})["L1"] == 3 + 2 * 4
    assert clocks(count, {"load32": 1.75})["L1"] == 3 * 1.75 + 2 * 4


@pytest.mark.parametrize(("reads", "expected"), [("bytes", 4), ("banks", 8), ("lines", 8)])
def test_channels_last_blocks_of_half_a_line_share_banks(reads, expected):
    """16 float32 channels a pixel, pixels whole lines apart: eight pixels a warp."""
    code = machine_code.Code(32, 0, Count({"load128": 2, "load32": 1}), Count(), Count())
    arguments = {"BLOCK_C": 16, "stride_x_w": 384, "stride_x_c": 1, "stride_x_h": 7680, "width": 20}
    x_only = "\n".join(text for text in LAYOUTS.splitlines() if "%w_8" not in text)
    launch = stub.Launch("dwconv_fwd_kernel", 1, 1, arguments, {}, b"", x_only)
    loop, _ = wavefronts_of(launch, code, (6,), reads)
    assert loop["load128"] == expected


@pytest.mark.parametrize("together", [False, True], ids=["one tap", "eight taps a load"])
@pytest.mark.parametrize(("planar", "reads", "expected"), [(True, "banks", 1), (True, "lines", 2), (False, "lines", 8)])
def test_taps_from_inside_a_line(planar, reads, expected, together):
    """Every tap of dilation 4 that is not in the pixel's own column begins inside a line: six of eight."""
    shape, each, warp, order = "32", "1", "32", "0"
    if together:
        shape, each, warp, order = "8x32", "1, 1", "1, 32", "1, 0"
    if not planar:
        shape, each, warp, order = f"{shape}x4", f"{each}, 4", f"{warp}, 1", f"{2 if together else 1}, {order}"
    each, warp, order, bits = f"[{each}]", f"[{warp}]", f"[{order}]", 32 if planar else 128
    text = f"""
#blocked = #ttg.blocked<{{sizePerThread = {each}, threadsPerWarp = {warp}, warpsPerCTA = [1], order = {order}}}>
    %1 = tt.splat %planes_ptr : !tt.ptr<f32> -> tensor<{shape}x!tt.ptr<f32>, #blocked>
    %2 = tt.load %1 : tensor<{shape}x!tt.ptr<f32>, #blocked>
"""
    arguments = {"BLOCK_C": 4, "BLOCK_H": 1, "BLOCK_W": 32, "row_stride": 1, "width": 160, "DILATIONS": (4,)}
    launch = stub.Launch("propagate_fwd_kernel", 1, 1, arguments, {}, b"", text)
    code = machine_code.Code(32, 0, Count({f"load{bits}": 8}), Count(), Count())
    aligned = 1 if planar else 4
    _, outside = wavefronts_of(launch, code, (), reads)
    assert outside[f"load{bits}"] == pytest.approx((2 * aligned + 6 * expected) / 8)


PREDICTED = {
    "gpu": "H100", "row": "a exact", "launches": 2, "host_s": 1e-5, "device_s": 4e-5, "device_bytes_s": 2e-5,
    "device_lines_s": 5e-5, "device_bound": "L1", "bound": "L1", "ceiling": 1e-5, "registers": 64, "spills": 0,
}  # fmt: skip


def test_predictions_are_written_read_and_shown(tmp_path, capsys):
    path, notes = tmp_path / "predicted.csv", tmp_path / "NOTES.md"
    lines = [table.line(PREDICTED), table.line(PREDICTED | {"row": "a fast"}), table.line(PREDICTED | {"gpu": "A100"})]
    table.write(path, lines)
    assert table.read(path) == lines
    notes.write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n", encoding="utf-8")
    files = ["--file", str(path), "--notes", str(notes)]
    assert table.main(["--check", *files]) == 1
    assert "modelling.table --write" in capsys.readouterr().out
    assert table.main(["--write", *files]) == 0
    assert table.main(["--check", *files]) == 0
    assert "| a exact | 40 L1, 25% (20% to 50%) | 40 L1, 25% (20% to 50%) |" in notes.read_text(encoding="utf-8")
    assert "a fast |" not in notes.read_text(encoding="utf-8")


def test_committed_predictions_are_no_measurements_and_their_table_agrees():
    assert table.main(["--check"]) == 0
    assert table.FILE.exists()
    assert table.FILE not in result_files()
    lines = table.read()
    assert {item["gpu"] for item in lines} == set(table.GPUS)
    assert all(tuple(item) == table.COLUMNS for item in lines)
    rows = [{item["row"] for item in lines if item["gpu"] == gpu} for gpu in table.GPUS]
    assert rows[0]
    for name in set.union(*rows):  # one launch for all iterations needs as many multiprocessors as the map has tiles
        assert all(name in found for found in rows) or name.endswith("resident"), name


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return stub.prepare(tmp_path_factory.mktemp("stub"))


@needs_compiler
def test_a_map_that_fits_is_delivered_once(environment):
    """32 x 32 pixels of 16 bytes, one tile: every sector of the map once, and the weights of its pixels."""
    program = Path(environment["STUB_FOLDER"]) / "cache"
    for weight, expected in ((4, 16 + 8 * 4), (2, 16 + 8 * 2)):
        assert delivered(program, 32, 32, 1, 16, weight, 32, 32, 1, 1, 1, 1 << 20, 1, 1) == pytest.approx(
            expected, abs=0.1
        )


def delivered(program: Path, *arguments: int) -> float:
    """Bytes a pixel that the simulated L2 delivers; arguments as in ``cache.c``."""
    run = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
    return float(run.stdout)


@needs_compiler
@pytest.mark.parametrize("row_stride", [1, 4, 8])
@pytest.mark.parametrize("dilations", [(8, 16), (1, 2, 4, 24)])
def test_sectors_of_distant_rows_are_counted_once(environment, row_stride, dilations):
    """Four tiles on four multiprocessors, their sectors of 32 bytes listed one by one: taps clamped, weights once."""
    program = Path(environment["STUB_FOLDER"]) / "cache"
    height, width, groups, pixel, weight, tile_h, tile_w = 50, 40, 2, 16, 4, 16, 40
    tiles_h = 4
    sectors = 0
    for tile in range(tiles_h):
        first = tile // row_stride * row_stride
        stride = min(row_stride, tiles_h - first)
        rows = [first * tile_h + tile - first + i * stride for i in range(tile_h)]
        met = {
            (group, ((max(0, min(y + dy * d, height - 1)) * width) + max(0, min(x + dx * d, width - 1))) * pixel // 32)
            for group in range(groups)
            for y in rows
            for x in range(tile_w)
            for d in dilations
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if dy or dx
        }
        weights = {
            ((p * height + y) * width + x) * weight // 32
            for p in range(8 * len(dilations))
            for y in rows
            if y < height
            for x in range(tile_w)
        }
        sectors += len(met) + len(weights)
    arguments = (height, width, groups, pixel, weight, tile_h, tile_w, row_stride, 1, 4)
    assert delivered(program, *arguments, 1 << 24, 1, *dilations) == pytest.approx(
        32 * sectors / height / width, abs=0.1
    )
    # a cache of 4 KiB holds less than a tile's taps meet
    assert delivered(program, *arguments, 1 << 12, 1, *dilations) > 32 * sectors / height / width + 1


@pytest.mark.slow
@needs_compiler
def test_a_training_call_over_the_stub(environment):
    """Launches, spills, registers and host time of the refinement of AFA and ToCo, in one process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.modelling.predictions", "--match", "afa_train exact"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr[-4000:]
    row, together = map(json.loads, run.stdout.splitlines())
    assert row["launches"] == 11
    assert row["spills"] == 0
    assert row["kernels"]["propagate_fwd_kernel"]["registers"] <= 128  # sixteen warps
    # all eleven, and everything public around them, against as many of the least launches there are
    assert row["stub_host_s"] < 2 * row["launches"] * row["bare_launch_s"], row
    assert together["row"] == "afa_train exact, resident"
    assert together["launches"] == 3
    assert together["spills"] == 0
    assert together["stub_host_s"] < row["stub_host_s"]


ONE_LAUNCH = """
import torch
from benchmarks.modelling import stub
from dmsa_kernels import backend, local_affinity, propagate, warmup

driver = stub.Driver(multiprocessors=128)
image, masks = torch.empty(1, 3, 256, 256), torch.empty(1, 3, 256, 256)
affinity = local_affinity(image, [1, 2, 4, 8, 12, 24])
call = lambda: propagate(affinity, masks, 10)
for on, launches in ((False, 10), (True, 2), (True, 2), (False, 10), (True, 2)):  # no plan of the other kind is taken
    with backend.resident(on):
        assert driver.launches(call) == launches, on
        assert driver.cooperative_launches(call) == int(on)
leaf = masks.requires_grad_()
with backend.resident(True):
    affinity.weights.requires_grad_()
    out = propagate(affinity, leaf, 10)
    gradients = lambda: torch.autograd.grad(out, (leaf, affinity.weights), torch.ones_like(out), retain_graph=True)
    assert driver.cooperative_launches(gradients) == 1  # the planes are computed again
    # a larger map, an affinity of one more tile: a launch for each iteration
    for height, width in ((512, 512), (256, 257)):
        wide = local_affinity(torch.empty(1, 3, height, width), [1, 2, 4, 8, 12, 24])
        larger = lambda: propagate(wide, torch.empty(1, 3, height, width), 10)
        larger()
        assert driver.cooperative_launches(larger) == 0
    # a share of the device that only the driver knows of
    driver._library.stub_set_room(100)
    with torch.no_grad():
        call()
"""


@needs_compiler
@pytest.mark.slow
def test_one_launch_for_all_iterations_over_the_stub(environment):
    """Asked for, cooperative, with plans of its own; and refused by a driver that cannot run all programs at once."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONE_LAUNCH],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    *_, last = run.stderr.strip().splitlines()
    assert last.startswith("RuntimeError: the driver refuses"), run.stderr[-4000:]
    assert "too many blocks in cooperative launch" in last
    assert "DMSA_RESIDENT" in last


@needs_compiler
@pytest.mark.slow
def test_compile_times_of_a_first_call_add_up(environment):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.modelling.compiling",
        "--dilations",
        "2",
        "--classes",
        "2",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    lines = [(float(line.split()[0]), line[8:]) for line in run.stdout.splitlines()]
    totals = {name: seconds for seconds, name in lines if not name.endswith("_kernel")}
    kernels = [name for _, name in lines if name.endswith("_kernel")]
    assert {"local_affinity_fwd_kernel", "propagate_fwd_kernel", "propagate_bwd_border_kernel"} <= set(kernels)
    # the backward pass' softmax comes from the forward pass' kernel
    assert kernels.count("local_affinity_fwd_kernel") == 1
    forward, gradients, together = totals.values()
    assert together == pytest.approx(forward + gradients, abs=0.02)
    assert 0 < sum(seconds for seconds, name in lines if name in kernels) <= together + 0.1
