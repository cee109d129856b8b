"""GPUs and the rates that the models assume for them; none of these was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU: from its public data sheet or architecture paper, unless marked as assumed.

    Attributes:
        name: as its vendor calls it.
        capability: of NVIDIA's instruction sets; 0 for others, which only the cost model knows.
        multiprocessors: or compute units.
        clock_hz: the boost clock; of an H100 or H200 what is sustained under load (assumed), 1.98 GHz at most.
        l1_bytes_per_clock: of a multiprocessor.
        l2_bytes_per_s: assumed; NVIDIA does not publish it. Of an MI300X the Infinity Cache's.
        memory_bytes_per_s: of device memory.
        fp32_flops: of the vector units.
        bf16_flops: of the matrix units, dense, with float32 accumulation.
        l2_bytes: size of the last cache before the memory.
        l1_bytes: size of a multiprocessor's first-level cache.
        memory_bytes: size of the device memory.
        warps: most that are resident on a multiprocessor.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_hz: float
    l1_bytes_per_clock: int
    l2_bytes_per_s: float
    memory_bytes_per_s: float
    fp32_flops: float
    bf16_flops: float
    l2_bytes: int
    l1_bytes: int
    memory_bytes: float
    warps: int

    @property
    def l1_bytes_per_s(self) -> float:
        return self.l1_bytes_per_clock * self.multiprocessors * self.clock_hz

    @property
    def copy_bytes_per_s(self) -> float:
        """What a copy reaches of the device memory's rate: nine tenths, assumed."""
        return 0.9 * self.memory_bytes_per_s

    def resident_warps(self, registers: int, num_warps: int) -> int:
        """Return the warps of whole programs that fit a multiprocessor's registers, handed out 256 at a time a warp."""
        a_warp = -(-registers * 32 // 256) * 256
        programs = min(65536 // 4 // a_warp * 4 // num_warps, self.warps // num_warps, 32 if self.warps == 64 else 24)
        return max(1, programs) * num_warps


_MB, _KB = 1 << 20, 1 << 10
GPUS = {
    "3090": Gpu("RTX 3090", 86, 82, 1.70e9, 128, 2.2e12, 0.936e12, 35.6e12, 71e12, 6 * _MB, 96 * _KB, 24e9, 48),
    "4090": Gpu("RTX 4090", 89, 128, 2.52e9, 128, 5.0e12, 1.008e12, 82.6e12, 165e12, 72 * _MB, 96 * _KB, 24e9, 48),
    "A100": Gpu("A100 80GB", 80, 108, 1.41e9, 128, 4.0e12, 2.039e12, 19.5e12, 312e12, 40 * _MB, 160 * _KB, 80e9, 64),
    "H100": Gpu("H100 SXM", 90, 132, 1.755e9, 128, 5.5e12, 3.35e12, 67e12, 989e12, 50 * _MB, 224 * _KB, 80e9, 64),
    "H200": Gpu("H200", 90, 132, 1.755e9, 128, 5.5e12, 4.8e12, 67e12, 989e12, 50 * _MB, 224 * _KB, 141e9, 64),
    "MI300X": Gpu("MI300X", 0, 304, 2.10e9, 64, 17e12, 5.3e12, 163.4e12, 1307e12, 256 * _MB, 32 * _KB, 192e9, 32),
}
LAUNCH_GAP_S = 1e-6
"""Assumed time between two launches of one stream that wait for each other."""
DRIVER_LAUNCH_S = 1.5e-6
"""Assumed time of the driver's own part of a launch, which the stub leaves out."""
MEETING_S = 1.5e-6
"""Assumed time in which all programs of a launch wait for each other: about four trips to L2, one after another (stores
out, count, ask, and half a question in vain), and three block barriers."""
L1_LINE_BYTES = 128
"""Of a line of the first-level cache; one clock moves as many to the registers (NVIDIA's forum, 77228)."""
L1_TAGS_A_CLOCK = 4
"""Lines, of four sectors, that the tag stage resolves in a clock, from Volta on (NVIDIA's forum, 49571 and 273699)."""
L1_BANKS = 32
"""Banks of four bytes, by the lowest bits of an address: assumed to be those of the shared memory, which is the same
memory. Its conflicts are counted for global loads, too (``l1tex__data_bank_conflicts_pipe_lsu_mem_global_op_ld``), but
how addresses fall on banks is not published."""
