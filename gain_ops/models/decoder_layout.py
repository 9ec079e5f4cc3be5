"""Where a decoder layer adds to the residual stream, read from its forward, and that forward with other adds.

Nothing is guessed: a statement that is not one of the known ones is not replaced, and what it adds cannot be folded.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Fold:
    """What follows the call of a part of a layer (attention, the FFN); h is the stream, z what the part returns.

    ``order`` is "add" for ``h + z``, "add_norm" for the norm of ``h + z``, "norm_add" for ``h + norm(z)``.
    """

    part: str
    order: str
    norm: str | None
    first: int
    count: int
    stream: str
    value: str

    @property
    def statement(self) -> str:
        """The one statement that takes the place of the ``count`` statements from ``first`` on."""
        call = f"self._gain_{self.order}({self.part!r}, {self.stream}, {self.value})"
        return f"{self.stream}, {self.value} = {call}" if self.order == "add_norm" else f"{self.value} = {call}"


@dataclass(frozen=True)
class NormForm:
    """How an RMSNorm says its eps, whether it multiplies by one plus its weight, and whether the weight may widen y."""

    eps: str
    one_plus: bool = False
    widens: bool = False


_LLAMA_NORM = """
input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
"""

# The known forwards of an RMSNorm, with x for the argument: some 165 classes of transformers.
_NORMS = {
    f"{_LLAMA_NORM}return self.weight * x.to(input_dtype)": NormForm("variance_epsilon", widens=True),
    f"{_LLAMA_NORM}return (self.weight * x).to(input_dtype)": NormForm("variance_epsilon"),
    """
output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)
""": NormForm("eps", one_plus=True),
}
_GEMMA_NORM = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"


def folds_of(kind: type[nn.Module]) -> dict[str, Fold]:
    """The folds that a layer's forward allows, by the name of the part; none for a forward that cannot be read."""
    function = _function(kind, "forward")
    if function is None:
        return {}
    body = function.body
    found = (_fold(body, index) for index in range(len(body)))
    return {fold.part: fold for fold in found if fold is not None}


@functools.cache
def last_projection(kind: Any) -> str | None:
    """The name of the child whose output a part's forward returns, alone or first of a tuple, or None."""
    function = _function(kind, "forward")
    if function is None:
        return None
    *before, last = function.body
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    if len(returns) != 1 or not isinstance(last, ast.Return):
        return None
    value = last.value.elts[0] if isinstance(last.value, ast.Tuple) and last.value.elts else last.value
    if isinstance(value, ast.Name) and before and isinstance(before[-1], ast.Assign):
        value = before[-1].value if ast.unparse(before[-1].targets[0]) == value.id else None
    name = _called(value)
    reads = sum(isinstance(node, ast.Attribute) and node.attr == name for node in ast.walk(function))
    return name if reads == 1 else None


@functools.cache
def norm_form(kind: Any) -> NormForm | None:
    """How a norm's class computes, or None for one that is not known."""
    form = _norms().get(_said(_function(kind, "forward")))
    return None if form is not None and form.one_plus and _said(_function(kind, "_norm")) != _GEMMA_NORM else form


@functools.cache
def folded_forward(kind: Any, parts: tuple[str, ...]) -> Callable[..., Any]:
    """The forward of a class, with the adds after these parts replaced by calls of self's ``_gain_`` methods."""
    function = _function(kind, "forward")
    assert function is not None
    folds = folds_of(kind)
    for fold in sorted((folds[part] for part in parts), key=lambda fold: -fold.first):
        statement = ast.parse(fold.statement).body[0]
        where = function.body[fold.first]
        for node in ast.walk(statement):
            ast.copy_location(node, where)
        function.body[fold.first : fold.first + fold.count] = [statement]
    for argument in ast.walk(function):
        if isinstance(argument, ast.arg):
            argument.annotation = None  # it may name what is imported for type checkers alone
    function.returns = None
    original: Any = inspect.unwrap(kind.forward)
    code = compile(ast.Module([function], []), original.__code__.co_filename, "exec", dont_inherit=True)
    names: dict[str, Any] = {}
    exec(code, original.__globals__, names)
    made: Callable[..., Any] = names["forward"]
    made.__qualname__ = f"{kind.__qualname__}.forward"
    return made


def _fold(body: list[ast.stmt], index: int) -> Fold | None:
    """The fold after the call of a part at ``body[index]``."""
    call, follows = body[index], body[index + 1 : index + 4]
    if not isinstance(call, ast.Assign):
        return None
    part, target = _called(call.value), call.targets[0]
    value = target.elts[0] if isinstance(target, ast.Tuple) else target
    if part is None or len(call.targets) != 1 or not isinstance(value, ast.Name):
        return None
    v = value.id
    said = [ast.unparse(statement) for statement in follows]
    norms = [_called(s.value) if isinstance(s, ast.Assign) else None for s in follows]
    norm = next((name for s, name in zip(said, norms, strict=True) if s == f"{v} = self.{name}({v})"), None)
    for order, count in (("add_norm", 3), ("norm_add", 2), ("add", 1)):
        added = said[1 if order == "norm_add" else 0] if len(said) >= count else ""
        stream = added.removeprefix(f"{v} = ").removesuffix(f" + {v}")
        add, normed = f"{v} = {stream} + {v}", f"{v} = self.{norm}({v})"
        forms = {"add_norm": [add, f"{stream} = {v}", normed], "norm_add": [normed, add], "add": [add]}
        if stream.isidentifier() and stream != v and said[:count] == forms[order]:
            return Fold(part, order, None if order == "add" else norm, index + 1, count, stream, v)
    return None


def _called(value: ast.expr | None) -> str | None:
    """The name in ``self.name(...)``."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        owner = value.func.value
        return value.func.attr if isinstance(owner, ast.Name) and owner.id == "self" else None
    return None


def _function(kind: Any, name: str) -> ast.FunctionDef | None:
    """The source of a method, parsed anew for each caller; None where it cannot be read or needs its class's cell."""
    method = inspect.unwrap(getattr(kind, name, None) or (lambda: None))
    try:
        lines, start = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or method.__code__.co_freevars:
        return None
    ast.increment_lineno(function, start - 1)  # so that tracebacks show the class's own lines
    if isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant):
        function.body = function.body[1:]
    return function


def _said(function: ast.FunctionDef | None) -> str:
    """The body as text, with x for the one argument; empty for another number of arguments."""
    if function is None or len(function.args.args) != 2:
        return ""
    argument = function.args.args[1].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == argument:
            node.id = "x"
    return ast.unparse(ast.Module(function.body, []))


@functools.cache
def _norms() -> dict[str, NormForm]:
    return {ast.unparse(ast.parse(text)): form for text, form in _NORMS.items()}
