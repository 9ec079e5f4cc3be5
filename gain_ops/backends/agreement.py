"""Whether an op's results are those of reference.py, by the rule of the tests, for tensors of any size and device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gain_ops import reference
from gain_ops.testing import assert_no_worse_than_torch


class Judge:
    """Holds ways to compute an op to the equations in fp64: a result may err at most twice what plain torch errs."""

    def __init__(self, op: str, arguments: Sequence[Any]) -> None:
        self.op, self.arguments = op, arguments
        # line (5) may round W in the place of x
        self._unit = arguments[0].dtype if op == "linear_input" else None
        self._plain = self._referenced(lambda a: a)
        self._truth = self._referenced(Tensor.double)
        self._size = self._referenced(lambda a: a.double().abs())

    def mismatch(self, run: Callable[..., Any]) -> str | None:
        """What is wrong with ``run(*arguments)``, or None; what it raises is wrong too, but for memory that lacks."""
        # memory that the results are likely to get holds NaN: what nobody writes is seen
        poisoned = [torch.full_like(t, torch.nan) for t in self._plain]
        del poisoned
        try:
            results = _listed(run(*self.arguments))
            of = zip(results, self._plain, self._truth, self._size, strict=True)
            for position, (result, plain, truth, size) in enumerate(of):
                assert_no_worse_than_torch(f"{self.op}[{position}]", result, plain, truth, size, self._unit)
        except torch.OutOfMemoryError:
            raise
        except AssertionError as reason:
            return str(reason)
        except Exception as error:  # a compiler's refusal has no common type across Triton's versions
            return f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return None

    def _referenced(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        changed = [change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in self.arguments]
        return _listed(getattr(reference, self.op)(*changed))


def _listed(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
