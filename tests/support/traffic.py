"""What processes send each other: every collective, with the bytes of the largest tensor that it has to do with."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Within it ``seen`` gets (operation, bytes) of each collective, those of the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func.overloadpacket.__name__.strip("_")
            if not name.startswith(("wait", "wrap")):
                tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self.seen.append((name, max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))

    def of(self, *words: str) -> list[int]:
        """The bytes of the operations whose names have one of these words in them."""
        return [size for name, size in self.seen if any(word in name for word in words)]


class DeltaDtypes(TorchDispatchMode):
    """Within it ``seen`` gets the dtype of delta in every call of one of our ops, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gain_ops":
            names = [argument.name for argument in func._schema.arguments]
            self.seen |= {given.dtype for name, given in zip(names, args, strict=False) if name == "delta"}
        return func(*args, **(kwargs or {}))
