"""The workloads that people run, with what each must move and compute at the least.

Two ceilings bound a refinement whatever its implementation (`element` bytes an element, 4 in float32):

- device memory: read the image, read and write the masks; if the affinity is stored, write it once and read it in every
  iteration. `floor_bytes` counts the former alone, `stored_affinity_bytes` the latter.
- first-level cache: every product of a tap loads one plane element, B*C*P*H*W*T of them (`cache_bytes`); weights that
  stay in registers over the classes are loaded B*P*H*W*T / (classes held together) times more.

Operations: one multiplication and one addition a product; the affinity adds about 11 a neighbour and channel (a
difference and two accumulations for sigma; a difference, a square and its sum for the score; the exponential's share).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SIX = (1, 2, 4, 8, 12, 24)
OPEN_VOCABULARY = (8, 16)


@dataclass(frozen=True)
class RefineCase:
    """One row of the workload table: masks `[B, C, H, W]`, guide `[B, 3, H, W]`."""

    name: str
    batch: int
    classes: int
    height: int
    width: int
    dilations: tuple[int, ...]
    num_iter: int
    spec: str = "par"
    launch_bound: bool = False
    """Small enough that on a GPU the launches dominate."""
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.classes, self.height, self.width

    @property
    def neighbours(self) -> int:
        return 8 * len(self.dilations)

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width

    def floor_bytes(self, element: int = 4) -> int:
        """Bytes that must pass device memory: guide and masks read once, result written once."""
        return element * self.pixels * (3 + 2 * self.classes)

    def stored_affinity_bytes(self, element: int = 4) -> int:
        """Bytes of device memory beyond :meth:`floor_bytes` if the affinity is stored: a write and T reads."""
        return element * self.pixels * self.neighbours * (1 + self.num_iter)

    def cache_bytes(self, element: int = 4) -> int:
        """Bytes loaded from the first-level cache: one plane element for every product."""
        return element * self.pixels * self.classes * self.neighbours * self.num_iter

    @property
    def operations(self) -> int:
        """Floating-point operations of propagation and affinity."""
        products = self.pixels * self.classes * self.neighbours * self.num_iter
        return 2 * products + 11 * 3 * self.neighbours * self.pixels

    def materialised_bytes(self, element: int = 4) -> int:
        """The tensor B*C*P*H*W that the materialising implementation makes in every iteration."""
        return element * self.pixels * self.classes * self.neighbours

    def scaled(self, batch: int, classes: int, height: int, width: int) -> RefineCase:
        """The same case on a smaller map, batch or class set."""
        return replace(self, batch=batch, classes=classes, height=height, width=width)


CASES = (
    RefineCase("afa_train", 1, 3, 256, 256, SIX, 10, launch_bound=True, note="8 calls an iteration"),
    RefineCase("toco_train", 1, 3, 224, 224, SIX, 10, launch_bound=True),
    RefineCase("weclip_train", 1, 4, 320, 320, SIX, 20, launch_bound=True),
    RefineCase("weclip_eval", 1, 4, 375, 500, SIX, 20),
    RefineCase("one_stage", 16, 21, 81, 81, SIX, 10, "pamr"),
    RefineCase("dmsa_voc", 32, 21, 160, 160, SIX, 10),
    RefineCase("dmsa_coco", 32, 81, 160, 160, SIX, 10),
    RefineCase("openvoc_voc", 1, 56, 375, 500, OPEN_VOCABULARY, 10, "pamr"),
    RefineCase("openvoc_ade", 1, 150, 512, 683, OPEN_VOCABULARY, 10, "pamr"),
    RefineCase("openvoc_stuff", 1, 171, 480, 640, OPEN_VOCABULARY, 10, "pamr"),
    RefineCase("openvoc_city", 1, 19, 1024, 2048, OPEN_VOCABULARY, 10, "pamr"),
    RefineCase("openvoc_ade847", 1, 1281, 512, 683, OPEN_VOCABULARY, 10, "pamr"),
    RefineCase("diffcut", 1, 15, 1024, 1024, (1, 2, 4, 8, 12, 24, 32, 64), 15, "pamr"),
    RefineCase("remote_sensing", 1, 6, 6000, 6000, (1, 2, 4), 10),
)

# On a CPU these shapes run instead, so that the suite ends in minutes; the others run as they are.
CPU_SHAPES = {
    "one_stage": (1, 21, 81, 81),
    "dmsa_voc": (1, 21, 160, 160),
    "dmsa_coco": (1, 81, 80, 80),
    "openvoc_voc": (1, 56, 94, 125),
    "openvoc_ade": (1, 150, 64, 85),
    "openvoc_stuff": (1, 171, 60, 80),
    "openvoc_city": (1, 19, 128, 256),
    "openvoc_ade847": (1, 1281, 32, 43),
    "diffcut": (1, 15, 128, 128),
    "remote_sensing": (1, 6, 375, 375),
    "weclip_eval": (1, 4, 188, 250),
}
# The second target of the CPU path, beside afa_train.
CPU_TARGET = RefineCase("classes21", 2, 21, 320, 320, SIX, 10, note="target of the CPU path")
