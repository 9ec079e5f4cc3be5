"""The layout of an FFN, read from its forward: the names of its projections, and whether it has a gate.

The statements of the forward are put into each other until one expression of x is left, which is one of::

    down(act(gate(x)) * up(x))        gate and up may be the halves of one projection
    down(act(gate(x)))                without a gate
    dropout(down(...))                either, with a dropout after it
"""

import ast
import copy
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The names of an FFN's parts; ``up`` is None where gate is packed and holds both, or where there is no gate.

    ``activation`` is the name of a module of it, or of a function of torch.nn.functional where ``functional`` says so.
    """

    gate: str
    up: str | None
    down: str
    activation: str
    packed: bool = False
    dropout: str | None = None
    functional: bool = False

    @property
    def gated(self) -> bool:
        """Whether h is a product of act(gate) and up."""
        return self.packed or self.up is not None


_FUNCTIONS = frozenset(f"{prefix}functional.{name}" for prefix in ("nn.", "torch.nn.") for name in ("gelu", "silu"))
_FUNCTIONS |= {"F.gelu", "F.silu"}


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
    result = _returned(function)
    return None if result is None else _layout(result, function.args.args[1].arg)


def _returned(function: ast.FunctionDef) -> ast.expr | None:
    """What a function returns as one expression of its arguments; None if it does more than assign names before."""
    known: dict[str, ast.expr] = {}
    for index, statement in enumerate(function.body):
        match statement:
            case ast.Expr(value=ast.Constant()) if index == 0:  # the docstring
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                known[name] = _inlined(value, known)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=value) if all(
                isinstance(n, ast.Name) for n in names
            ):
                whole = _inlined(value, known)
                for position, target in enumerate(names):
                    item = ast.Subscript(value=whole, slice=ast.Constant(position), ctx=ast.Load())
                    known[cast(ast.Name, target).id] = item
            case ast.Return(value=value) if value is not None:
                return _inlined(value, known)
            case _:
                return None
    return None


def _inlined(value: ast.expr, known: dict[str, ast.expr]) -> ast.expr:
    class Inline(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return known.get(node.id, node)

    return cast(ast.expr, Inline().visit(copy.deepcopy(value)))


def _layout(result: ast.expr, argument: str) -> Layout | None:
    dropout = None
    outer = _call_of_child(result)
    if outer is not None and "dropout" in outer[0] and _call_of_child(outer[1]) is not None:
        dropout, result = outer
        outer = _call_of_child(result)
    if outer is None:
        return None
    down, hidden = outer
    x = ast.unparse(ast.Name(argument))
    if isinstance(hidden, ast.BinOp) and isinstance(hidden.op, ast.Mult):
        for activated, other in ((hidden.left, hidden.right), (hidden.right, hidden.left)):
            found = _gated(activated, other, down, dropout, x)
            if found is not None:
                return found
        return None
    activation = _activation(hidden)
    gate = None if activation is None else _call_of_child(activation[2])
    if activation is None or gate is None or ast.unparse(gate[1]) != x:
        return None
    return Layout(gate[0], None, down, activation[0], dropout=dropout, functional=activation[1])


def _gated(activated: ast.expr, other: ast.expr, down: str, dropout: str | None, x: str) -> Layout | None:
    activation = _activation(activated)
    if activation is None:
        return None
    name, functional, inner = activation
    gate, up = _call_of_child(inner), _call_of_child(other)
    if gate is not None and up is not None and ast.unparse(gate[1]) == ast.unparse(up[1]) == x:
        return Layout(gate[0], up[0], down, name, dropout=dropout, functional=functional)
    match inner, other:
        case (
            ast.Subscript(
                value=ast.Call(func=ast.Attribute(value=packed, attr="chunk")) as halves, slice=ast.Constant(value=0)
            ),
            ast.Subscript(value=second, slice=ast.Constant(value=1)),
        ):
            both = _call_of_child(packed)
            same = ast.unparse(halves) == ast.unparse(second)
            if both is not None and same and ast.unparse(both[1]) == x and _halves_the_last_dim(halves):
                return Layout(both[0], None, down, name, packed=True, dropout=dropout, functional=functional)
    return None


def _halves_the_last_dim(chunk: ast.Call) -> bool:
    given = [ast.unparse(value) for value in (*chunk.args, *(keyword.value for keyword in chunk.keywords))]
    return given == ["2", "-1"]


def _activation(node: ast.expr) -> tuple[str, bool, ast.expr] | None:
    """(name, whether it is a function, what it is applied to) of an activation."""
    child = _call_of_child(node)
    if child is not None:
        return child[0], False, child[1]
    match node:
        case ast.Call(func=function, args=[inner], keywords=[]) if ast.unparse(function) in _FUNCTIONS:
            return ast.unparse(function).rpartition(".")[2], True, inner
    return None


def _call_of_child(node: ast.expr) -> tuple[str, ast.expr] | None:
    """(name, argument) of ``self.name(argument)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[inner], keywords=[]):
            return name, inner
    return None
