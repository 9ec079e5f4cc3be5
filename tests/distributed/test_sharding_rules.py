"""Every op on DTensors: each row of the table gives what one process gives, no row moves anything, all else raises.

The tensors hold small whole numbers, of which float32 makes no rounding: results are equal to the bit, whatever was summed
where.
"""

import itertools
import operator
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import gain_ops
from gain_ops.backends.interface import OPS
from gain_ops.ops import linear

T, IN, OUT = 5, 6, 7  # no multiples of the number of ranks
TOKENS = (2, 4)  # where torch 2.10 accumulates the gradient of an uneven leaf it gathers it
RAW = sorted(OPS)


def whole(*shape: int, limit: int = 2) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape).float()


def signs(*shape: int) -> torch.Tensor:
    return torch.ones(shape) - 2 * (whole(*shape) > 0)


def balanced(*shape: int) -> torch.Tensor:
    return signs(*shape, 1) * torch.tensor([1.0, -1.0] * (IN // 2))


def raw_operands(op: str) -> dict[str, torch.Tensor]:
    """Operands by name, flat; what a norm reads is 1 or -1 (a LayerNorm half of each), so that r is 1, and means are whole."""
    if op.startswith(("grouped", "combine")):
        return expert_operands(op)
    out = OUT if "linear" in op or "recompute" in op or op == "backward_input" else IN
    shapes = {
        "x": (T, IN), "z": (T, IN), "dy": (T, out), "dh": (T, IN), "gate": (T, IN), "up": (T, IN), "residual": (T, IN),
        "weight": (IN,) if "norm" in op else (OUT, IN), "bias": (IN,) if "add" in op else (OUT,), "shift": (IN,),
        "delta": (IN,) if op in ("linear_input", "backward_input") else (out,),
    }  # fmt: skip
    operands = {name: whole(*shape) for name, shape in shapes.items()}
    if "norm" in op:
        ones = balanced(T) if "layer" in op else signs(T, IN)
        operands |= {
            "x": ones,
            "h": ones,
            "r": torch.ones(T),
            "mean": torch.zeros(T),
            "weight": IN * operands["weight"],
        }
        if "norm_add" in op:
            operands |= {"z": ones, "delta": signs(IN) - 1}
        operands["residual"] = ones - ((1 + operands["delta"]) * operands["z"] + operands["bias"][:IN])
    return operands


def expert_operands(op: str) -> dict[str, torch.Tensor]:
    """Operands of the ops on rows by expert: the second of three experts has no rows, and one row belongs to nobody."""
    rows, experts, out = 2 * T, 3, OUT if op.startswith(("grouped_mm", "grouped_linear")) else IN
    shapes = {
        "x": (rows, IN), "z": (rows, IN), "dy": (T if op.startswith("combine") else rows, IN), "dh": (rows, IN),
        "gate": (rows, IN), "up": (rows, IN), "weight": (experts, OUT, IN), "bias": (experts, out), "weights": (T, 2),
        "delta": (experts, out if "output" in op else IN),
    }  # fmt: skip
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    return {name: whole(*shape) for name, shape in shapes.items()} | {"order": torch.randperm(rows), "offsets": ends}


def call(op: str, operands: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    options = {"backend": "eager"}
    options |= {"activation": "relu2"} if "glu" in op else {}
    options |= {"eps": 0.0} if "norm" in op and "backward" not in op else {}
    return several(getattr(torch.ops.gain_ops, op)(**operands, **options))


def placement(name: str, tensor: torch.Tensor, letter: str) -> Placement:
    if letter in "RP":
        return Replicate() if letter == "R" else Partial()
    return Shard({"T": 0, "F": tensor.dim() - 1, "0": 0, "1": 1, "2": 2}[letter])


def distribute(tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """A DTensor whose sum is the tensor where it is Partial: rank 0 of the dimension has one part, the last the rest."""
    for i, p in enumerate(placements):
        if p.is_partial():
            part = whole(*tensor.shape)
            coordinate = mesh.get_local_rank(i)
            tensor = part if coordinate == 0 else tensor - part if coordinate == mesh.size(i) - 1 else 0 * part
    kept = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(tensor, mesh, kept, src_data_rank=None).to_local()
    stride = torch.empty(tensor.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=stride)


def check_raw(op: str, dims: int) -> int:
    """Every combination of rows over the dimensions of the mesh."""
    from gain_ops.ops.sharding import _TABLE

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,) if dims == 1 else (2, size // 2))
    checked = 0
    for rows in itertools.product(_TABLE[op], repeat=dims):
        absent = {name for row in rows for name, letter in row.operands.items() if letter == "-"}
        given = raw_operands(op)
        plain = {name: None if name in absent else given[name] for name in rows[0].operands}
        letters = {name: [row.operands[name] for row in rows] for name in plain}
        sharded = {
            name: tensor
            if tensor is None
            else distribute(tensor, mesh, [placement(name, tensor, x) for x in letters[name]])
            for name, tensor in plain.items()
        }
        with CommDebugMode() as communication:
            results = call(op, sharded)
        assert communication.get_total_counts() == 0, (op, rows)
        for i, (result, expected) in enumerate(zip(results, call(op, plain), strict=True)):
            assert result.placements == tuple(placement("", expected, row.results[i]) for row in rows), (op, rows)
            assert torch.equal(result.full_tensor(), expected), (op, rows)
        checked += 1
    return checked


@pytest.mark.parametrize("op", RAW)
def test_every_row_is_the_op(two, op):
    assert min(two(check_raw, op, 1)) >= 2


@pytest.mark.parametrize("op", RAW)
def test_rows_combine_over_two_dimensions_of_a_mesh(four, op):
    assert min(four(check_raw, op, 2)) >= 4


MANY = 1000
"""Of more placements than these, only those are tried that differ from some row in at most two operands."""


def refused(op: str) -> tuple[int, int]:
    """How many of all placements of an op's operands run and how many raise."""
    from gain_ops.ops.sharding import _TABLE

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    operands = {name: tensor for name, tensor in raw_operands(op).items() if name in _TABLE[op][0].operands}
    # whole numbers are no terms of a sum
    choices = [
        [Replicate(), *[Partial()] * t.is_floating_point(), *map(Shard, range(t.dim()))] for t in operands.values()
    ]
    tried = list(itertools.product(*choices))
    if len(tried) > MANY:
        rows = [[placement(name, t, row.operands[name]) for name, t in operands.items()] for row in _TABLE[op]]
        tried = [one for one in tried if any(sum(map(operator.ne, one, row)) <= 2 for row in rows)]
    taken = rejected = 0
    for chosen in tried:
        sharded = {
            name: distribute(tensor, mesh, [p]) for (name, tensor), p in zip(operands.items(), chosen, strict=True)
        }
        with CommDebugMode() as communication:
            try:
                call(op, sharded)
            except ValueError as error:
                rejected += "No operand is gathered" in str(error)
            else:
                taken += 1
        assert communication.get_total_counts() == 0
    assert taken + rejected == len(tried)
    return taken, rejected


@pytest.mark.parametrize("op", RAW)
def test_all_other_placements_raise(two, op):
    from gain_ops.ops.sharding import _TABLE

    rows = [row for row in _TABLE[op] if "-" not in row.operands.values()]
    # beside the rows a replicated bias, which belongs to one term of a sum
    more = sum(row.operands.get("bias") == "P" for row in rows)
    for taken, rejected in two(refused, op):
        assert taken == len(rows) + more
        assert rejected > taken


def layer_norm(shift: torch.Tensor, **operands: object) -> tuple[torch.Tensor, torch.Tensor]:
    """gain_add_layer_norm by the names of the rule."""
    return gain_ops.gain_add_layer_norm(norm_bias=shift, **operands)


def public_case(name: str, **options: object) -> tuple[object, dict[str, torch.Tensor], str]:
    """A public function, its operands by name, and the rule for it."""
    x = whole(*TOKENS, IN)
    n, wide = OUT, 2 * OUT
    if name == "linear":
        side = options["side"]
        delta = whole(OUT if side == "output" else IN)
        operands = {"x": x, "weight": whole(OUT, IN), "delta": delta, "bias": whole(OUT)}
        return partial(gain_ops.gain_linear, **options), operands, "linear" if side == "output" else "linear_input"
    if name == "scale":
        return gain_ops.gain_scale, {"x": x, "delta": whole(IN)}, "scale"
    if name == "glu":
        operands = {"gate": x, "up": whole(*TOKENS, IN), "delta": whole(IN)}
        return partial(gain_ops.gain_glu, activation="relu2"), operands, "glu"
    if name == "glu_packed":
        operands = {"gate": x, "up": None, "delta": whole(IN // 2)}
        return partial(gain_ops.gain_glu, activation="relu2"), operands, "glu_packed"
    if name.startswith("grouped_glu"):
        operands = expert_operands("grouped_glu")
        packed = name == "grouped_glu_packed"
        operands = {
            "gate": operands["gate"], "up": None if packed else operands["up"],
            "delta": operands["delta"][:, : IN // 2] if packed else operands["delta"], "offsets": operands["offsets"],
        }  # fmt: skip
        return partial(gain_ops.gain_glu, activation="relu2"), operands, name
    if name.startswith("grouped_linear"):
        operands = expert_operands(name)
        chosen = {key: operands[key] for key in ("x", "weight", "delta", "bias", "offsets")}
        return partial(gain_ops.gain_grouped_linear, side=name.removeprefix("grouped_linear_")), chosen, name
    if name == "gain_combine":
        operands = expert_operands("combine")
        chosen = {key: operands[key] for key in ("weights", "z", "delta", "bias", "order", "offsets")}
        return gain_ops.gain_combine, chosen, name
    if name == "rms_norm":
        ones = signs(*TOKENS, IN)
        return (
            partial(gain_ops.gain_rms_norm, eps=0.0),
            {"x": ones, "weight": whole(IN), "delta": whole(IN)},
            "rms_norm",
        )
    if "add" in name:
        ones = balanced(*TOKENS) if "layer" in name else signs(*TOKENS, IN)
        operands = {"z": whole(*TOKENS, IN), "delta": whole(IN), "bias": whole(IN)}
        operands = {"residual": ones - ((1 + operands["delta"]) * operands["z"] + operands["bias"])} | operands
        if name == "add":
            return gain_ops.gain_add, operands, name
        if name == "rms_norm_add":
            operands |= {"z": ones, "delta": signs(IN) - 1}
            del operands["bias"]
            return partial(gain_ops.gain_rms_norm_add, eps=0.0), operands | {"weight": IN * whole(IN)}, name
        operands["weight"] = IN * whole(IN)
        if name == "add_layer_norm":
            return partial(layer_norm, eps=0.0), operands | {"shift": whole(IN)}, name
        return partial(gain_ops.gain_add_rms_norm, eps=0.0), operands, name
    packed, gated = name == "mlp_packed", name == "mlp"
    operands = {
        "x": x, "gate_weight": whole(wide if packed else n, IN, limit=1), "up_weight": whole(n, IN) if gated else None,
        "down_weight": whole(IN, n), "delta": whole(n), "gate_bias": whole(wide if packed else n),
        "up_bias": whole(n) if gated else None, "down_bias": whole(IN),
    }  # fmt: skip
    return partial(gain_ops.gain_mlp, activation="relu2", **options), operands, "mlp_packed" if packed else "mlp"


PUBLIC = [
    ("linear", {"side": "output", "save": "output"}),
    ("linear", {"side": "output", "save": "input"}),
    ("linear", {"side": "input"}),
    ("scale", {}),
    ("glu", {}),
    ("glu_packed", {}),
    ("grouped_glu", {}),
    ("grouped_glu_packed", {}),
    ("grouped_linear_output", {}),
    ("grouped_linear_input", {}),
    ("gain_combine", {}),
    ("rms_norm", {}),
    ("add", {}),
    ("add_rms_norm", {}),
    ("add_layer_norm", {}),
    ("rms_norm_add", {}),
    ("mlp", {}),
    ("mlp", {"recompute": True, "chunk": 3}),
    ("mlp_packed", {}),
    ("mlp_ungated", {}),
]
FROZEN = {
    "order",
    "offsets",
    "weight",
    "shift",
    "gate_weight",
    "up_weight",
    "down_weight",
    "gate_bias",
    "up_bias",
    "down_bias",
}


def several(results: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else results


def check_public(name: str, options: dict[str, object], trained: set[str] | None) -> int:
    """y and all gradients, over every row and every token dimension; what is communicated in backward."""
    from gain_ops.ops.sharding import _TABLE

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checked = 0
    rule = public_case(name, **options)[2]
    for row, token_dim in itertools.product(_TABLE[rule], (0, 1)):
        function, plain, _ = public_case(name, **options)
        wanted = {
            n for n, t in plain.items() if t is not None and n not in FROZEN and (trained is None or n in trained)
        }
        sharded = {}
        for n, tensor in plain.items():
            letter = "R" if n.endswith("bias") and row.operands[n] == "P" else row.operands[n]
            if tensor is not None:
                placed = Shard(token_dim) if letter == "T" else placement(n, tensor, letter)
                sharded[n] = distribute(tensor, mesh, [placed]).requires_grad_(n in wanted)
                tensor.requires_grad_(n in wanted)
        with CommDebugMode() as communication:
            results = several(function(**{n: sharded.get(n) for n in plain}))
        assert communication.get_total_counts() == 0, row
        expected = several(function(**plain))
        for y, wanted_y in zip(results, expected, strict=True):
            assert torch.equal(y.detach().full_tensor(), wanted_y), row

        dys = [whole(*y.shape) for y in expected]
        torch.autograd.backward(expected, dys)
        kept = [[Replicate() if p.is_partial() else p for p in y.placements] for y in results]
        dys = [distribute(dy, mesh, placements) for dy, placements in zip(dys, kept, strict=True)]
        with CommDebugMode() as communication:
            torch.autograd.backward(results, dys)
        parameters = wanted & {"delta", "bias"}
        sums = sum(sharded[n].placements == (Replicate(),) for n in parameters) if row.shards else 0
        assert communication.get_total_counts() == sums, (row, communication.get_comm_counts())
        for n, tensor in sharded.items():
            if n not in wanted:
                assert tensor.grad is None
                continue
            assert torch.equal(tensor.grad.full_tensor(), plain[n].grad), (row, n)
            if n in parameters:
                assert tensor.grad.placements == tensor.placements, (row, n)
        checked += 1
    return checked


@pytest.mark.parametrize(("name", "options"), PUBLIC)
def test_every_public_function_and_its_gradients(two, name, options):
    assert min(two(check_public, name, options, None)) >= 2


@pytest.mark.parametrize("trained", ["x", "delta"])
def test_gradients_that_are_not_wanted_are_not_made(two, trained):
    for options in ({"side": "output"}, {"side": "input"}):
        two(check_public, "linear", options, {trained})


def no_gradient_wanted() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x, weight, delta = whole(*TOKENS, IN), whole(OUT, IN), whole(OUT)
    sharded = [distribute(t, mesh, [p]) for t, p in ((x, Shard(2)), (weight, Shard(1)), (delta, Replicate()))]
    sharded[2].requires_grad_()
    with torch.no_grad():
        y = gain_ops.gain_linear(*sharded)
    assert not y.requires_grad
    assert torch.equal(y.full_tensor(), gain_ops.gain_linear(x, weight, delta))


def test_no_grad(two):
    two(no_gradient_wanted)


def one_token() -> None:
    mesh = init_device_mesh("cpu", (2,))
    plain = {"x": whole(IN), "weight": whole(OUT, IN), "delta": whole(OUT)}
    for placements, result in (
        ((Shard(0), Shard(1), Replicate()), Partial()),
        ((Replicate(), Shard(0), Shard(0)), Shard(0)),
    ):
        sharded = {n: distribute(t, mesh, [p]) for (n, t), p in zip(plain.items(), placements, strict=True)}
        y = gain_ops.gain_linear(**sharded)
        assert y.placements == (result,)
        assert torch.equal(y.full_tensor(), gain_ops.gain_linear(**plain))


def test_x_of_one_dimension(two):
    two(one_token)


def under_autocast() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for side, letters in (("output", "F1R"), ("output", "R00"), ("input", "F10"), ("input", "R0R")):
        plain = {"x": whole(*TOKENS, IN), "weight": whole(OUT, IN), "delta": whole(OUT if side == "output" else IN)}
        sharded = {
            n: distribute(t, mesh, [placement(n, t, letter)])
            for (n, t), letter in zip(plain.items(), letters, strict=True)
        }
        for operands in (plain, sharded):
            operands["x"].requires_grad_(), operands["delta"].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = gain_ops.gain_linear(**sharded, side=side), gain_ops.gain_linear(**plain, side=side)
        assert y.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(y.full_tensor(), expected)
        y.full_tensor().sum().backward(), expected.sum().backward()
        for n in ("x", "delta"):
            assert sharded[n].grad.dtype == torch.float32
            assert torch.equal(sharded[n].grad.full_tensor(), plain[n].grad), (side, letters, n)


def test_autocast(two):
    two(under_autocast)


def errors() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    x, weight, delta = (distribute(t, mesh, [Replicate()]) for t in (whole(T, IN), whole(OUT, IN), whole(OUT)))
    packed = distribute(whole(T, 2 * OUT), mesh, [Shard(1)])
    tokens = [distribute(whole(4, 4, OUT), mesh, [Shard(dim)]) for dim in (0, 1)]
    strided = DTensor.from_local(whole(T, IN), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    elsewhere = distribute(whole(OUT), init_device_mesh("cpu", (1, 2)), [Replicate(), Replicate()])
    calls = [
        lambda: gain_ops.gain_linear(x, weight, whole(OUT)),
        lambda: gain_ops.gain_linear(whole(T, IN), weight, delta),
        lambda: gain_ops.gain_linear(x, weight, elsewhere),
        lambda: gain_ops.gain_linear(x, weight.redistribute(placements=[Shard(0)]), delta),
        lambda: gain_ops.gain_swiglu(packed, None, delta),
        lambda: gain_ops.gain_swiglu(*tokens, delta),
        lambda: gain_ops.gain_linear(x, weight.detach().requires_grad_(), delta),
        lambda: gain_ops.gain_linear(strided, weight, delta),
    ]
    messages = []
    for wrong in calls:
        with pytest.raises(ValueError, match=" ") as caught:
            wrong()
        messages.append(str(caught.value))
    return messages


def test_errors_say_what_came_and_what_to_do(two):
    mixed, plain_x, meshes, placements, packed, tokens, trained, strided = two(errors)[0]
    assert "got x, weight as DTensor and delta as a plain tensor" in mixed
    assert "place_gains" in mixed
    assert "DTensor.from_local" in plain_x
    assert "different meshes" in meshes
    assert "x Replicate, weight Shard(0), delta Replicate" in placements
    assert "x Replicate, weight Shard(0), delta Shard(0)\n" in placements
    assert "gate Shard(1)" in packed
    assert "gate Shard(0), up Shard(1)" in tokens
    assert "requires_grad_(False)" in trained
    assert "x _S" in strided


def checks_of_one_call() -> int:
    mesh = init_device_mesh("cpu", (2,))
    x, weight, delta = (distribute(t, mesh, [Replicate()]) for t in (whole(T, IN), whole(OUT, IN), whole(OUT)))
    with mock.patch.object(linear, "_check", wraps=linear._check) as check:
        gain_ops.gain_linear(x, weight, delta)
    return check.call_count


def test_shards_are_not_checked_again(two):
    assert two(checks_of_one_call) == [1, 1]


def twice() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x, weight, delta = (distribute(t, mesh, [Replicate()]) for t in (whole(T, IN), whole(OUT, IN), whole(OUT)))
    y = gain_ops.gain_linear(x.requires_grad_(), weight, delta)
    with pytest.raises(RuntimeError, match="create_graph=True reached a gain on DTensors"):
        torch.autograd.grad(y.to_local().square().sum(), x, create_graph=True)


def test_double_backward_raises(two):
    two(twice)


def test_importing_the_package_imports_no_dtensor():
    code = "import sys, gain_ops; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
