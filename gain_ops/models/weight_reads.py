"""Which projections a model's own code reads the weight of, instead of calling them: a gain there would be ignored.

The forward of each module is read as source, with the module itself at hand: ``self.attn.out_proj`` is looked up in it, a
condition on its configuration is decided, and a projection or weight that is passed on is followed into methods, properties and
functions. docs/decisions/0002-ignored-gains.md says why, and what this cannot see.
"""

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_DEPTH = 8  # calls that are followed into each other

_QUESTIONS = """
    data_ptr device dim dtype element_size get_device grad is_contiguous is_cpu is_cuda is_floating_point is_inference is_meta
    is_quantized is_sparse layout names nbytes ndim new_empty new_full new_ones new_tensor new_zeros numel requires_grad
    requires_grad_ shape size storage_offset stride untyped_storage
"""
_TEMPLATES = "empty_like full_like is_floating_point ones_like rand_like randn_like to type_as zeros_like"

QUESTIONS = frozenset(_QUESTIONS.split())
"""What is asked of a weight without computing with it."""

VIEWS = frozenset(("data", "T", "mT", "H", "mH"))
"""The attributes of a weight that are the weight again."""

LIKE = frozenset(_TEMPLATES.split())
"""Functions that take a weight as a template, for its dtype, device or shape."""

_ASKS = frozenset(("callable", "getattr", "hasattr", "id", "isinstance", "len", "print", "type"))
_PARAMETERS = frozenset(["buffers", "named_parameters", "parameters", "state_dict", "values"])
_ITERATORS = frozenset(["dict", "enumerate", "iter", "list", "next", "reversed", "set", "sorted", "tuple", "zip"])

# What may be another when the model runs than when the gains are put on.
_CHANGING = frozenset(("training", "gradient_checkpointing", "_attn_implementation"))


@dataclass(frozen=True)
class Weight:
    """The weight of a linear map, as a forward gets at it."""

    layer: nn.Module


class _Bound(NamedTuple):
    """A function with the module that it is called on; ``owner`` is the class that defines it, for super()."""

    function: Callable[..., Any]
    module: Any
    owner: type | None


class _Super(NamedTuple):
    module: nn.Module
    owner: type


class _Local(NamedTuple):
    """A function or lambda inside the one that is being read, with its names."""

    tree: ast.FunctionDef | ast.Lambda


# What an expression may be: the modules, weights, functions and constants that are known. A list stands for its elements.
_Values = tuple[Any, ...]
_UNKNOWN: _Values = ()


class _Frame(NamedTuple):
    """A function that is being read."""

    function: Any  # a plain function
    owner: type | None
    names: dict[str, _Values]
    depth: int


def weight_reads(model: nn.Module, layers: Iterable[nn.Module]) -> dict[int, str]:
    """For each of some linear maps that the model's code reads the weight of without calling it: where it does, by id."""
    wanted = {id(layer): layer for layer in layers}
    reader = _Reader(wanted, _untied(model, wanted))
    for module in _around(model, wanted.keys()):
        reader.read_forward(module)
    return reader.found


def _untied(model: nn.Module, wanted: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """The layers by the id of their weight, where no other module has it too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)
    weights = ((layer._parameters.get("weight"), layer) for layer in wanted.values())
    return {id(weight): layer for weight, layer in weights if weight is not None and owners[id(weight)] == [layer]}


def _around(model: nn.Module, wanted: Set[int]) -> list[nn.Module]:
    """The modules that have a wanted one below them."""
    found: list[nn.Module] = []
    seen: dict[int, bool] = {}

    def holds(module: nn.Module) -> bool:
        if id(module) in wanted:
            return True
        if id(module) not in seen:
            seen[id(module)] = False
            seen[id(module)] = any([holds(child) for child in module.children()])
            if seen[id(module)]:
                found.append(module)
        return seen[id(module)]

    holds(model)
    return found


class _Reader:
    def __init__(self, wanted: Mapping[int, nn.Module], by_weight: Mapping[int, nn.Module]) -> None:
        self._wanted, self._by_weight = wanted, by_weight
        self._returned: dict[tuple[Any, ...], _Values] = {}
        self._conditions: list[str] = []
        self.found: dict[int, str] = {}

    def read_forward(self, module: nn.Module) -> None:
        forward = _attribute(module, "forward")
        if forward and isinstance(forward[0], _Bound):
            self._call(forward[0], [], {}, 0)

    # functions

    def _call(self, bound: _Bound, args: list[_Values], keywords: dict[str, _Values], depth: int) -> _Values | None:
        """What a call may return; None where the function cannot be read."""
        function = _plain(bound.function)
        tree = None if function is None else _source(function.__code__)
        if function is None or tree is None or depth > _DEPTH:
            return None
        known = tuple((i, _key(values)) for i, values in (*enumerate(args), *sorted(keywords.items())) if values)
        key = (function, id(bound.module), known)
        if key in self._returned:
            return self._returned[key]
        self._returned[key] = _UNKNOWN  # for a function that calls itself
        outside, self._conditions = self._conditions, []
        try:
            names = _bind(tree, args if bound.module is None else [(bound.module,), *args], keywords)
            frame = _Frame(function, bound.owner, names, depth)
            returned: list[Any] = []
            if isinstance(tree, ast.Lambda):
                returned.extend(self._value(tree.body, frame))
            else:
                for _ in range(2):  # names that a loop binds late
                    self._block(tree.body, frame, returned)
            self._returned[key] = _union(returned)
        finally:
            self._conditions = outside
        return self._returned[key]

    # statements

    def _block(self, body: list[ast.stmt], frame: _Frame, returned: list[Any]) -> bool:
        """Whether the block surely leaves the function."""
        return any(self._statement(statement, frame, returned) for statement in body)

    def _statement(self, node: ast.stmt, frame: _Frame, returned: list[Any]) -> bool:
        match node:
            case ast.Return(value=value):
                if value is not None:
                    values = self._value(value, frame)
                    returned.extend(values)
                    if not frame.depth:
                        self._use(values, node, frame)
                return True
            case ast.Raise():
                return True
            case ast.If(test=test, body=body, orelse=orelse):
                truth = self._truth(test, frame)
                ends = [
                    self._branch(block, branch, test, frame, returned)
                    for block, branch in ((body, True), (orelse, False))
                    if truth is not (not branch)
                ]
                return all(ends)
            case ast.Assign(targets=targets, value=value):
                values = self._value(value, frame)
                for target in targets:
                    self._assign(target, values, frame)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self._assign(target, self._value(value, frame), frame)
            case ast.For(target=target, iter=source, body=body, orelse=orelse):
                self._assign(target, _elements(self._value(source, frame)), frame)
                for _ in range(2):
                    self._block(body, frame, returned)
                self._block(orelse, frame, returned)
            case ast.FunctionDef(name=name):
                frame.names[name] = (_Local(node),)
                self._local(_Local(node), [], {}, frame)
            case ast.With(items=items, body=body):
                for item in items:
                    values = self._value(item.context_expr, frame)
                    if item.optional_vars is not None:
                        self._assign(item.optional_vars, values, frame)
                return self._block(body, frame, returned)
            case ast.Expr(value=value):
                self._value(value, frame)
            case ast.Assert() | ast.Delete() | ast.Import() | ast.ImportFrom() | ast.ClassDef():
                pass
            case _:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.stmt):
                        self._statement(child, frame, returned)
                    elif isinstance(child, ast.expr):
                        self._use(self._value(child, frame), child, frame)
                    elif isinstance(child, ast.ExceptHandler | ast.match_case):
                        self._block(child.body, frame, returned)
        return False

    def _branch(self, block: list[ast.stmt], branch: bool, test: ast.expr, frame: _Frame, returned: list[Any]) -> bool:
        self._conditions.append(ast.unparse(test) if branch else f"not ({ast.unparse(test)})")
        try:
            return bool(block) and self._block(block, frame, returned)
        finally:
            self._conditions.pop()

    def _assign(self, target: ast.expr, values: _Values, frame: _Frame) -> None:
        match target:
            case ast.Name(id=name):
                # a name with an unknown value, too, may no longer be a known constant
                frame.names[name] = _union((*frame.names.get(name, ()), *(values or (_Anything,))))
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                for element in elements:
                    self._assign(element, _elements(values), frame)
            case ast.Starred(value=value):
                self._assign(value, values, frame)

    # expressions

    def _value(self, node: ast.expr, frame: _Frame) -> _Values:
        values = self._evaluated(node, frame)
        if any(id(value) in self._by_weight for value in values):
            return _union(Weight(self._by_weight[id(v)]) if id(v) in self._by_weight else v for v in values)
        return values

    def _evaluated(self, node: ast.expr, frame: _Frame) -> _Values:
        match node:
            case ast.Constant(value=value):
                return (value,)
            case ast.Name(id=name):
                return frame.names[name] if name in frame.names else _global(name, frame.function)
            case ast.Attribute(value=inner, attr=name):
                return self._attribute(self._value(inner, frame), name, node, frame)
            case ast.Call():
                return self._called(node, frame)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = self._truth(test, frame)
                taken = [part for part, branch in ((body, True), (orelse, False)) if truth is not (not branch)]
                return _union(value for part in taken for value in self._value(part, frame))
            case ast.BoolOp(values=parts):
                truth = self._truth(node, frame)
                return (truth,) if truth is not None else _UNKNOWN
            case ast.Compare() | ast.UnaryOp(op=ast.Not()):
                truth = self._truth(node, frame)
                return (truth,) if truth is not None else _UNKNOWN
            case ast.NamedExpr(target=target, value=inner):
                values = self._value(inner, frame)
                self._assign(target, values, frame)
                return values
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return _holders(value for part in parts for value in self._value(part, frame))
            case ast.Dict(values=parts):
                return _holders(value for part in parts for value in self._value(part, frame))
            case ast.Starred(value=inner):
                return _elements(self._value(inner, frame))
            case ast.Subscript(value=inner, slice=index):
                self._value(index, frame)
                values = self._value(inner, frame)
                # a slice of a weight is a use of it; an item of a list of weights is one of them
                if isinstance(inner, ast.Attribute) and inner.attr == "weight":
                    self._use(values, node, frame)
                return _elements(values)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for generator in node.generators:
                    self._assign(generator.target, _elements(self._value(generator.iter, frame)), frame)
                element = node.value if isinstance(node, ast.DictComp) else node.elt
                return _holders(self._value(element, frame))
            case ast.Lambda():
                self._use(self._local(_Local(node), [], {}, frame), node, frame)
                return (_Local(node),)
        for child in ast.iter_child_nodes(node):  # arithmetic, await, f-strings
            if isinstance(child, ast.expr):
                self._use(self._value(child, frame), child, frame)
        return _UNKNOWN

    def _attribute(self, values: _Values, name: str, node: ast.expr, frame: _Frame) -> _Values:
        found: list[Any] = []
        for value in values:
            if isinstance(value, Weight):
                if name in VIEWS:
                    found.append(value)
                elif name not in QUESTIONS and not isinstance(node, ast.Attribute):
                    self._use((value,), node, frame)
            elif isinstance(value, nn.Module) and id(value) in self._wanted and name in ("weight", "_parameters"):
                found.append(Weight(value))
            elif isinstance(value, _Super):
                found.extend(_inherited(value, name))
            else:
                for inner in _attribute(value, name):
                    if isinstance(inner, property) and inner.fget is not None:
                        owner = _defining(type(value), name)
                        found.extend(self._call(_Bound(inner.fget, value, owner), [], {}, frame.depth + 1) or ())
                    else:
                        found.append(inner)
        return _union(found)

    def _called(self, node: ast.Call, frame: _Frame) -> _Values:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        args = [self._value(arg, frame) for arg in node.args]
        keywords = {keyword.arg or "**": self._value(keyword.value, frame) for keyword in node.keywords}
        given = _union(value for values in (*args, *keywords.values()) for value in values)
        if isinstance(node.func, ast.Name):
            if name == "super":
                return self._super(frame)
            if name == "getattr" and len(args) > 1 and len(args[1]) == 1 and isinstance(args[1][0], str):
                return self._attribute(args[0], args[1][0], node, frame)
            if name in _ASKS:
                return _UNKNOWN
            if name in _ITERATORS:
                return _elements(given) if name == "next" else given
        if isinstance(node.func, ast.Attribute):
            of = self._value(node.func.value, frame)
            weights = tuple(value for value in of if isinstance(value, Weight))
            if weights:
                self._use(given if name not in LIKE else _UNKNOWN, node, frame)
                if name.endswith("_"):  # changes the weight in place, and the layer computes with it as before
                    return weights
                if name not in QUESTIONS:
                    self._use(weights, node, frame)
                return _UNKNOWN
            if name in LIKE:
                return _UNKNOWN
            if name in _PARAMETERS:
                return _holders(Weight(value) if id(value) in self._wanted else value for value in of)
            if name in ("get_parameter", "get_submodule") and len(given) == 1 and isinstance(given[0], str):
                for part in given[0].split("."):
                    of = self._attribute(of, part, node, frame)
                return of
        return self._follow(self._value(node.func, frame), args, keywords, node, frame)

    def _local(self, local: _Local, args: list[_Values], keywords: dict[str, _Values], frame: _Frame) -> _Values:
        """What a function inside the function may return: its names are added to the outer ones."""
        for name, values in _bind(local.tree, args, keywords).items():
            frame.names[name] = _union((*frame.names.get(name, ()), *values))
        if isinstance(local.tree, ast.Lambda):
            return self._value(local.tree.body, frame)
        returned: list[Any] = []
        self._block(local.tree.body, frame._replace(depth=frame.depth + 1), returned)
        return _union(returned)

    def _super(self, frame: _Frame) -> _Values:
        first = next(iter(frame.names.values()), ())
        modules = [value for value in first if isinstance(value, nn.Module)]
        return tuple(_Super(module, frame.owner) for module in modules if frame.owner is not None)

    def _follow(
        self, functions: _Values, args: list[_Values], keywords: dict[str, _Values], node: ast.Call, frame: _Frame
    ) -> _Values:
        """Into what is called, where a linear map or its weight may be passed to it."""
        given = _union(value for values in (*args, *keywords.values()) for value in values)
        passed = any(isinstance(value, Weight | nn.Module) for value in given)
        results: list[Any] = []
        read = False
        for function in functions:
            if isinstance(function, _Local):
                results.extend(self._local(function, args, keywords, frame))
                read = True
                continue
            if isinstance(function, nn.Module):
                bounds = _attribute(function, "forward") if passed and id(function) not in self._wanted else _UNKNOWN
            elif isinstance(function, _Bound):
                bounds = (function,)
            elif isinstance(function, FunctionType) and (passed or function.__closure__):
                bounds = (_Bound(function, None, None),)
            else:
                continue
            for bound in bounds:
                if not isinstance(bound, _Bound) or id(bound.module) in self._wanted:
                    continue
                if _is_followed(bound, passed):
                    returned = self._call(bound, args, keywords, frame.depth + 1)
                    read |= returned is not None
                    results.extend(returned or ())
        if not read:
            self._use(given, node, frame)
        return _union(results)

    def _use(self, values: _Values, node: ast.AST, frame: _Frame) -> None:
        """These values are computed with, at this place."""
        for value in values:
            if isinstance(value, Weight) and id(value.layer) not in self.found:
                where = f"{frame.function.__qualname__} computes with its weight without calling it"
                conditions = " and ".join(self._conditions)
                self.found[id(value.layer)] = where + (f", if {conditions}" if conditions else "")

    # conditions

    def _truth(self, node: ast.expr, frame: _Frame) -> bool | None:
        match node:
            case ast.BoolOp(op=op, values=parts):
                decisive = isinstance(op, ast.Or)
                truths = []
                for part in parts:
                    truths.append(self._truth(part, frame))
                    if truths[-1] is decisive:
                        return decisive
                return None if None in truths else not decisive
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand, frame)
                return None if truth is None else not truth
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _compare(op, self._value(left, frame), self._value(right, frame))
            case ast.Compare():
                return None
        return _constant_truth(self._value(node, frame))


class _Anything:
    """Stands among the values of a name for one that is not known."""


def _compare(op: ast.cmpop, left: _Values, right: _Values) -> bool | None:
    if len(left) != 1 or len(right) != 1 or not all(map(_is_constant, (*left, *right))):
        if isinstance(op, ast.Is | ast.IsNot) and right == (None,) and len(left) == 1 and left[0] is not _Anything:
            return isinstance(op, ast.IsNot) == (left[0] is not None)
        return None
    one, other = left[0], right[0]
    try:
        match op:
            case ast.Eq():
                return bool(one == other)
            case ast.NotEq():
                return bool(one != other)
            case ast.Is():
                return one is other
            case ast.IsNot():
                return one is not other
            case ast.Lt():
                return bool(one < other)
            case ast.LtE():
                return bool(one <= other)
            case ast.Gt():
                return bool(one > other)
            case ast.GtE():
                return bool(one >= other)
    except TypeError:
        pass
    return None


def _constant_truth(values: _Values) -> bool | None:
    return bool(values[0]) if len(values) == 1 and _is_constant(values[0]) else None


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _union(values: Iterable[Any]) -> _Values:
    return tuple({_identity(value): value for value in values}.values())


def _holders(values: Iterable[Any]) -> _Values:
    """What a list of these stands for: the constants in it do not decide a condition."""
    return _union(value for value in values if not _is_constant(value))


def _identity(value: Any) -> Any:
    if isinstance(value, Weight):
        return ("weight", id(value.layer))
    if isinstance(value, _Bound):
        return (value.function, id(value.module))
    return (type(value), value) if _is_constant(value) else id(value)


def _key(values: _Values) -> tuple[Any, ...]:
    return tuple(map(_identity, values))


def _elements(values: _Values) -> _Values:
    """What a loop over these values, or an index into them, may give."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            found.extend(value.children())
        elif isinstance(value, Weight | nn.Module):
            found.append(value)
        elif isinstance(value, Mapping):
            found.extend(value.values())
        elif isinstance(value, list | tuple) and not isinstance(value, _Bound | _Super):
            found.extend(value)
    return _holders(found)


def _attribute(value: Any, name: str) -> _Values:
    """An attribute that is there without running code: of a module, a configuration, a class or a Python module."""
    if name in _CHANGING or isinstance(value, Tensor):
        return _UNKNOWN
    if isinstance(value, nn.Module):
        for held in (value._modules, value._parameters):
            if name in held:
                return (held[name],)
        if name == "forward" and "_hf_hook" in vars(value):
            return _member(type(value), name, value)  # accelerate's, which calls the class's
        if name in vars(value):
            return _instance(vars(value)[name])
        return _member(type(value), name, value)
    if isinstance(value, type):
        return _member(value, name, None)
    if isinstance(value, ModuleType):
        return (vars(value)[name],) if name in vars(value) else _UNKNOWN
    own = getattr(value, "__dict__", {})
    return _instance(own[name]) if name in own else _UNKNOWN


def _instance(value: Any) -> _Values:
    if isinstance(value, MethodType):
        return (_Bound(value.__func__, value.__self__, _defining(type(value.__self__), value.__name__)),)
    return (value,)


def _member(kind: type, name: str, module: nn.Module | None) -> _Values:
    owner = _defining(kind, name)
    if owner is None:
        return _UNKNOWN
    member = vars(owner)[name]
    if isinstance(member, staticmethod):
        return (_Bound(member.__func__, None, owner),)
    if isinstance(member, classmethod):
        return (_Bound(member.__func__, kind, owner),)
    return (_Bound(member, module, owner),) if callable(member) and not isinstance(member, type) else (member,)


def _inherited(value: _Super, name: str) -> _Values:
    kinds = type(value.module).__mro__
    after = kinds[kinds.index(value.owner) + 1 :] if value.owner in kinds else ()
    owner = next((kind for kind in after if name in vars(kind)), None)
    return (_Bound(vars(owner)[name], value.module, owner),) if owner is not None else _UNKNOWN


def _defining(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _is_followed(bound: _Bound, passed: bool) -> bool:
    """Whether a function is followed: not torch's own, which computes with all that it gets, but its modules' methods.

    Nor one that a decorator replaced: the kernel that runs in its place takes what it is given.
    """
    function = _plain(bound.function)
    if function is None or (bound.owner is None and hasattr(bound.function, "__wrapped__")):
        return False
    inside_torch = function.__module__.partition(".")[0] == "torch"
    if inside_torch and not function.__module__.startswith("torch.nn.modules."):
        return False
    return passed or isinstance(bound.module, nn.Module) or bool(function.__closure__)


def _plain(function: Any) -> FunctionType | None:
    function = inspect.unwrap(function) if callable(function) else function
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    return function if isinstance(function, FunctionType) else None


def _global(name: str, function: FunctionType) -> _Values:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            return _instance(cells[name].cell_contents)
        except ValueError:  # not filled yet
            return _UNKNOWN
    if name in function.__globals__:
        return (function.__globals__[name],)
    return (getattr(builtins, name),) if hasattr(builtins, name) else _UNKNOWN


def _bind(tree: ast.FunctionDef | ast.Lambda, args: list[_Values], keywords: dict[str, _Values]) -> dict[str, _Values]:
    """The parameters of a function with what they get; what nobody passes in is unknown."""
    parameters = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
    names: dict[str, _Values] = {name: (_Anything,) for name in parameters}
    names.update({argument.arg: (_Anything,) for argument in tree.args.kwonlyargs})
    names.update({name: values or (_Anything,) for name, values in zip(parameters, args, strict=False)})
    if tree.args.vararg is not None:
        names[tree.args.vararg.arg] = _holders(value for values in args[len(parameters) :] for value in values)
    rest: list[Any] = []
    for name, values in keywords.items():
        if name in names:
            names[name] = values or (_Anything,)
        else:
            rest.extend(values)
    if tree.args.kwarg is not None:
        names[tree.args.kwarg.arg] = _holders(rest)
    return names


@functools.lru_cache(maxsize=4096)
def _source(code: CodeType) -> ast.FunctionDef | ast.Lambda | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    kind = ast.Lambda if code.co_name == "<lambda>" else ast.FunctionDef
    return next((node for node in ast.walk(tree) if isinstance(node, kind)), None)
