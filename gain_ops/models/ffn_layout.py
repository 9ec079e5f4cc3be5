"""The layout of an FFN, read from its forward: the names of its projections, and whether it has a gate."""

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The names of an FFN's parts; ``up`` is None where gate is packed and holds both, or where there is no gate."""

    gate: str
    up: str | None
    down: str
    activation: str
    packed: bool = False
    dropout: str | None = None

    @property
    def gated(self) -> bool:
        """Whether h is a product of act(gate) and up."""
        return self.packed or self.up is not None


# The known forwards of an FFN, with x for the argument. About 240 classes of transformers have one of these.
_FORWARDS = {
    """
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
    """: Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    """
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    """: Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    """
    up_states = self.gate_up_proj(x)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)
    """: Layout("gate_up_proj", None, "down_proj", "activation_fn", packed=True),
    """
    return self.down_proj(self.act_fn(self.up_proj(x)))
    """: Layout("up_proj", None, "down_proj", "act_fn"),
    """
    x = self.fc1(x)
    x = self.activation_fn(x)
    x = self.fc2(x)
    return x
    """: Layout("fc1", None, "fc2", "activation_fn"),
    """
    x = self.c_fc(x)
    x = self.act(x)
    x = self.c_proj(x)
    x = self.dropout(x)
    return x
    """: Layout("c_fc", None, "c_proj", "act", dropout="dropout"),
}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module whose forward is one of the known ones, or None."""
    return _layout_of_class(cast(Any, type(module)))


@functools.cache
def _layout_of_class(kind: Any) -> Layout | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (AttributeError, OSError, SyntaxError, TypeError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return None
    return _layouts().get(_said(function.body, function.args.args[1].arg))


@functools.cache
def _layouts() -> dict[str, Layout]:
    return {_said(ast.parse(textwrap.dedent(text)).body, "x"): layout for text, layout in _FORWARDS.items()}


def _said(body: list[ast.stmt], argument: str) -> str:
    """Statements as text, without a docstring and with x for the argument."""
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    module = ast.Module(body=body, type_ignores=[])
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id == argument:
            node.id = "x"
    return ast.unparse(module)
