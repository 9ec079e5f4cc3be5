"""QuACK's GEMM with the gain in its epilogue, on the output side, saving x, by the epilogues that QuACK has.

Forward D = acc * s; backward acc = x @ W.T again, D = dy * s and ds = sum_t acc * dy in one GEMM, then the vendor's dx. It is
written to the interface of quack.epilogue as of August 2026 and has not yet run with the package: the gate will show whether it
is right.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants.scaled import Scaled


@functools.cache
def _epilogues() -> tuple[Any, Any]:
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import RowVecLoad, RowVecReduce

    @gemm_epilogue(ops={"s": RowVecLoad("s")})
    def forward(acc, s):  # type: ignore[no-untyped-def]  # values of its DSL
        return {"D": acc * s}

    @gemm_epilogue(ops={"s": RowVecLoad("s")}, reduces={"ds": RowVecReduce("ds", scaled=True)})
    def backward(acc, dy, s):  # type: ignore[no-untyped-def]
        return {"D": dy * s, "ds": (acc, dy)}

    return forward, backward


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, s)
        y: Tensor = _epilogues()[0](x[None], weight.t()[None], s=s[None])["D"][0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        x, weight, s = ctx.saved_tensors
        made = _epilogues()[1](x[None], weight.t()[None], dy=dy.contiguous()[None], s=s[None])
        return made["D"][0] @ weight, None, made["ds"].view_as(s).to(s.dtype)


class QuackScaled(Scaled):
    """``(x @ W.T) * s`` with s in fp32, which the epilogue reads."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.s = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Recomputed.apply(x, self.linear.weight, self.s)
        return y
