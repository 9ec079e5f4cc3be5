"""The layout of an FFN, read from its forward: the names of its projections, and whether it has a gate.

The statements of the forward are put into each other until one expression of x is left, which is one of::

    down(act(gate(x)) * up(x))        gate and up may be the halves of one projection
    down(act(gate(x)))                without a gate
    dropout(down(...))                either, with a dropout after it

chains_of() reads more: ``down(act(gate(x)))`` in the middle of any expression (Bloom), and over two modules that a layer calls
one after the other (BERT's intermediate and output).
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


@dataclass(frozen=True)
class Chain:
    """The names, from a module that holds all three, of an activation module and the linear maps before and after it.

    What the activation returns goes to ``down`` and nowhere else, and ``down`` is called on nothing else.
    """

    gate: str
    activation: str
    down: str


_FUNCTIONS = frozenset(f"{prefix}functional.{name}" for prefix in ("nn.", "torch.nn.") for name in ("gelu", "silu"))
_FUNCTIONS |= {"F.gelu", "F.silu"}


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module whose forward is one of the known ones, or None."""
    return _layout_of_class(cast(Any, type(module)))


def chains_of(module: nn.Module) -> list[Chain]:
    """The chains in a module's forward, or in the two modules of its feed_forward_chunk (BERT and its family)."""
    result = _result(module, "forward")
    if result is not None:
        found = [_chain(node) for node in ast.walk(result) if isinstance(node, ast.Call)]
        return [c for c in found if c is not None and _once(result, c.gate, c.activation, c.down)]
    result = _result(module, "feed_forward_chunk")
    match result:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=second),
            args=[ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=first), args=[_], keywords=[]), *_],
            keywords=[],
        ) if isinstance(module._modules.get(first), nn.Module) and isinstance(module._modules.get(second), nn.Module):
            chain = _over_two(module, first, second)
            return [] if chain is None else [chain]
    return []


def _over_two(module: nn.Module, first: str, second: str) -> Chain | None:
    """The chain in ``second(first(x), ...)``: first is act(gate(x)), and second reads what it gets by down alone."""
    before = _result(module.get_submodule(first), "forward")
    after = _result(module.get_submodule(second), "forward")
    activated = None if before is None else _call_of_child(before)
    gate = None if activated is None else _call_of_child(activated[1])
    if activated is None or gate is None or not isinstance(gate[1], ast.Name) or after is None:
        return None
    function = _function(cast(Any, type(module.get_submodule(second))), "forward")
    assert function is not None  # its result was read
    h = function.args.args[1].arg
    readers = [call for node in ast.walk(after) if isinstance(node, ast.Call) and (call := _call_of_child(node))]
    downs = [name for name, argument in readers if isinstance(argument, ast.Name) and argument.id == h]
    reads = sum(isinstance(node, ast.Name) and node.id == h for node in ast.walk(after))
    if len(downs) != 1 or reads != 1 or not _once(after, downs[0]):
        return None
    return Chain(f"{first}.{gate[0]}", f"{first}.{activated[0]}", f"{second}.{downs[0]}")


def _chain(node: ast.expr) -> Chain | None:
    """The chain that an expression is."""
    down = _call_of_child(node)
    activation = None if down is None else _call_of_child(down[1])
    if activation is not None and "dropout" in activation[0]:  # a gain goes through it
        activation = _call_of_child(activation[1])
    gate = None if activation is None else _call_of_child(activation[1])
    if down is None or activation is None or gate is None:
        return None
    return Chain(gate[0], activation[0], down[0])


def _once(result: ast.expr, *children: str) -> bool:
    """Whether an expression names each of these children of self once."""
    named = [n.attr for n in ast.walk(result) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"]
    return all(named.count(child) == 1 for child in children)


def _result(module: nn.Module, method: str) -> ast.expr | None:
    """What a method returns, as one expression of its arguments, where conditions on the module's settings hold as now."""
    function = _function(cast(Any, type(module)), method)
    if function is None or len(function.args.args) < 2:
        return None
    return _returned(_decided(function, module))


def _decided(function: ast.FunctionDef, module: nn.Module) -> ast.FunctionDef:
    """A function with the branches that a module takes, in the place of each ``if`` on its settings alone."""
    decided = copy.copy(function)
    body: list[ast.stmt] = []
    for statement in decided.body:
        if isinstance(statement, ast.If) and _on_settings(statement.test, module):
            truth = eval(ast.unparse(statement.test), {"__builtins__": {}}, {"self": module})  # settings and constants
            body += statement.body if truth else statement.orelse
        else:
            body.append(statement)
    decided.body = body
    return decided


def _on_settings(test: ast.expr, module: nn.Module) -> bool:
    """Whether a condition is of a module's own numbers, flags and words."""
    kinds = (ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.cmpop, ast.UnaryOp, ast.Not, ast.Constant, ast.Load)
    for node in ast.walk(test):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                if name == "training" or not isinstance(vars(module).get(name), int | float | str | bool | None):
                    return False
            case ast.Name(id="self"):
                pass
            case _ if not isinstance(node, kinds):
                return False
    return True


@functools.cache
def _layout_of_class(kind: Any) -> Layout | None:
    function = _function(kind, "forward")
    if function is None or len(function.args.args) != 2:
        return None
    result = _returned(function)
    return None if result is None else _layout(result, function.args.args[1].arg)


@functools.cache
def _function(kind: Any, method: str) -> ast.FunctionDef | None:
    """The source of a class's method."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
    except (AttributeError, OSError, SyntaxError, TypeError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


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
