"""The Triton kernels: the functions of gain_ops.reference, fused.

backend.py           the functions that this package offers
linear_forward.py    y = gain * (x @ W.T) + b in a GEMM's epilogue
linear_backward.py   a GEMM that writes dz or dx and the partial sums of ddelta: the backward passes from a saved x
rows.py              one bandwidth-bound pass: the backward from a saved z, and the scaling of an operand
glu.py               the gain in an FFN's activation, forward and backward
rms_norm.py          the gain in an RMSNorm, forward and backward
rms_norm_wide.py     the same for rows that do not fit the registers
add.py               the gain on the way into the residual stream
add_norm.py          the same and the norm that reads the stream next, forward and backward
add_norm_wide.py     the same for rows that do not fit the registers
norm_add.py          the gain, an RMSNorm and the add, forward and backward
norm_add_wide.py     the same for rows that do not fit the registers
partials.py          the second stage of every ddelta, in fixed order
config.py            launch configurations and their heuristics
devices.py           the device that a kernel is launched on
tables.py            the configuration of a launch: a table's, or the heuristic's
tuning.py            opt-in timing of every way to run a GEMM
recording.py         a Triton driver without a device, which records launches
aot.py               every configuration compiled ahead of time, as a launch compiles it, without a GPU

The folder is installed as ``gain_ops.kernels``. ``glu`` and ``rms_norm`` are modules here, so only backend.py has the functions
of these names.
"""
