"""The instructions, a family a file. A translator reads an instruction's text once and returns what it does to a gang."""

from ptx.instructions import (
    accesses,
    bulk,
    conversions,
    copies,
    matrices,
    mbarriers,
    scalar,
    warp,
    wgmma,
)

__all__ = ["accesses", "bulk", "conversions", "copies", "matrices", "mbarriers", "scalar", "warp", "wgmma"]
