"""The Triton backend, installed as ``gain_ops.kernels``: the functions of gain_ops.reference, fused.

linear_forward.py   y = gain * (x @ W.T) + b in a GEMM's epilogue
matmul_reduce.py   a GEMM that writes dz or dx and the partials of ddelta: the backwards from a saved x
fused_backward.py  dx and ddelta from a saved z in one GEMM: measured by benchmarks/, not yet chosen
activations.py     the gain in an FFN's activation, forward and backward
norm.py            the gain in an RMSNorm, forward and backward
norm_wide.py       the same for rows that do not fit the registers
rows.py            one bandwidth-bound pass: the backward from a saved z, and the scaling of an operand
partials.py        the second stage of every ddelta, in fixed order
config.py          launch configurations and their heuristics
devices.py         the device that a kernel is launched on
tables.py          the configuration of a launch: tuned, or the heuristic's
tuning.py          opt-in tuning, cached as JSON
recording.py       a driver with no device, which records launches
aot.py             every configuration compiled ahead of time, as a launch compiles it, with no GPU
"""

from gain_ops.kernels.activations import glu, glu_backward, glu_ddelta
from gain_ops.kernels.linear_forward import linear, linear_z
from gain_ops.kernels.matmul_reduce import backward_input, backward_recompute, ddelta_recompute
from gain_ops.kernels.norm import rms_norm, rms_norm_backward
from gain_ops.kernels.rows import backward, ddelta, linear_input, scale

__all__ = [
    "backward",
    "backward_input",
    "backward_recompute",
    "ddelta",
    "ddelta_recompute",
    "glu",
    "glu_backward",
    "glu_ddelta",
    "linear",
    "linear_input",
    "linear_z",
    "rms_norm",
    "rms_norm_backward",
    "scale",
]
