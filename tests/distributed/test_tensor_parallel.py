"""Whole Llamas with gains under tensor parallelism train as one process does, and send what the frozen model sends.

The rule: both train in float64, where rounding hides nothing, for ten steps of AdamW, and every loss and every gradient of a
delta differs by less than one float32 rounding (2^-23, relative to the norm). A gradient that lacks a rank's term, or has one
twice, is off by a part of itself.
"""

import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.integrations.tensor_parallel import FusedMlpParallel, place_gains

EPS = torch.finfo(torch.float32).eps
STEPS = 10
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Norm(nn.RMSNorm):
    """In float64: transformers' computes in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm.weight.shape[0], norm.variance_epsilon)
        self.weight = norm.weight


def llama(targets: str | tuple[str, ...] | None, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    for parent in (model.model, *model.model.layers):
        for name, child in list(parent.named_children()):
            if name.endswith("norm"):
                setattr(parent, name, Norm(child))
    if targets is not None:
        gain_ops.apply(model, targets, **options)
        with torch.no_grad():
            for delta in deltas(model).values():
                delta.normal_(std=0.3)
    return model


def deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    names = (
        (n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""), p) for n, p in model.named_parameters()
    )
    return {name: parameter for name, parameter in names if name.endswith("delta")}


def parallelize(model: LlamaForCausalLM, mesh: DeviceMesh, *, sequence: bool = False, fused: bool = False) -> None:
    """The plan that torch's tutorial has for a Llama, then place_gains."""
    tokens, whole = Shard(1), Replicate()
    out = tokens if sequence else whole
    if sequence:
        outside = {
            "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
            "model.norm": SequenceParallel(use_local_output=True),
            "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=whole),
        }
        parallelize_module(model, mesh, outside)
    for layer in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan["self_attn.o_proj"] = RowwiseParallel(output_layouts=out)
        if fused:
            plan["mlp"] = FusedMlpParallel(input_layouts=out, output_layouts=out)
        else:
            plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
            plan["mlp.down_proj"] = RowwiseParallel(output_layouts=out)
        if sequence:
            plan |= {
                name: SequenceParallel(use_local_output=True)
                for name in ("input_layernorm", "post_attention_layernorm")
            }
            plan["self_attn"] = PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": tokens},
                desired_input_kwarg_layouts={"hidden_states": whole},
                use_local_output=True,
            )
            if not fused:
                plan["mlp"] = PrepareModuleInput(
                    input_layouts=(tokens,), desired_input_layouts=(whole,), use_local_output=True
                )
        parallelize_module(layer, mesh, plan)
    place_gains(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("delta"))  # SequenceParallel makes a norm's weight trainable


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: nn.Module, part: slice = slice(None), group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Ten steps on one batch a step, of which this process takes a part: losses, and gradients of the first and last step."""
    optimizer = torch.optim.AdamW(deltas(model).values(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], {}
    for step in range(STEPS):
        ids = torch.randint(0, 32, (4, 8), generator=generator)[part]
        positions = torch.arange(ids.shape[1])[None]  # under sequence parallelism the model sees a part of them
        logits = model(ids, position_ids=positions).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        loss = loss.detach().clone()
        if group is not None:
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
        losses.append(loss)
        if step in (0, STEPS - 1):
            gradients |= {f"{name}, step {step}": full(delta.grad) for name, delta in deltas(model).items()}
        nn.utils.clip_grad_norm_(deltas(model).values(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), **gradients, **{name: full(delta) for name, delta in deltas(model).items()}}


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, name
        difference = (result[name] - tensor).norm() / tensor.norm()
        assert difference <= EPS, f"{name}: {difference:.2e}"


def trained(targets: str | tuple[str, ...], options: dict[str, object], plan: dict[str, bool]) -> None:
    expected = train(llama(targets, **options))
    model = llama(targets, **options)
    parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)), **plan)
    assert_equal(train(model), expected)


CASES = [
    ("gain-ffn", {"side": "output", "memory": "fast"}, {}),
    ("gain-ffn", {"side": "output", "memory": "lean"}, {"sequence": True}),
    ("gain-ffn", {"side": "input"}, {}),
    (EVERYWHERE, {"side": "output", "memory": "fast"}, {"sequence": True}),
    (EVERYWHERE, {"side": "output", "memory": "lean"}, {}),
    (EVERYWHERE, {"side": "input"}, {"sequence": True}),
    (("down_proj",), {"side": "input", "fuse_mlp": True}, {"fused": True}),
    (
        ("down_proj",),
        {"side": "input", "fuse_mlp": True, "memory": "lean", "mlp_chunk": 5},
        {"fused": True, "sequence": True},
    ),
]


@pytest.mark.parametrize(("targets", "options", "plan"), CASES)
def test_two_ranks_train_as_one(two, targets, options, plan):
    two(trained, targets, options, plan)


@pytest.mark.parametrize("side", ["output", pytest.param("input", marks=pytest.mark.slow)])
def test_four_ranks_train_as_one(four, side):
    four(trained, EVERYWHERE, {"side": side}, {"sequence": side == "output"})


def trained_with_fsdp(side: str) -> None:
    expected = train(llama(EVERYWHERE, side=side))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = llama(EVERYWHERE, side=side)
    parallelize(model, mesh["tp"])
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["dp"])
    first = 2 * mesh["dp"].get_local_rank()
    assert_equal(train(model, slice(first, first + 2), mesh["dp"].get_group()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["output", "input"])
def test_with_fsdp2(four, side):
    four(trained_with_fsdp, side)


def collectives(model: nn.Module) -> Counter[str]:
    """Of one forward and backward, down to the embeddings."""
    embeddings = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = embeddings
    if isinstance(model.model.norm.weight, DTensor):  # under sequence parallelism the layers get a part of the tokens
        x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    with CommDebugMode() as communication:
        logits = model(inputs_embeds=x, position_ids=torch.arange(8)[None]).logits
        logits.square().mean().backward()
    return Counter({str(kind): count for kind, count in communication.get_comm_counts().items()})


def communicates(side: str, sequence: bool, summed: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    frozen, gained = llama(None), llama(EVERYWHERE, side=side)
    parallelize(frozen, mesh, sequence=sequence)
    parallelize(gained, mesh, sequence=sequence)
    before = collectives(frozen)
    assert before.total() > 0
    reductions = sum(name.split(".")[-2] in summed for name in deltas(gained))
    assert collectives(gained) - before == {"c10d_functional.all_reduce": reductions}
    assert before - collectives(gained) == {}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("side", "summed"),
    [("output", ("o_proj", "down_proj")), ("input", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))],
)
def test_a_step_sends_what_the_frozen_model_does_and_sums_of_gains(two, side, sequence, summed):
    two(communicates, side, sequence, summed)


def with_checkpointing() -> None:
    expected = train(llama(EVERYWHERE))
    model = llama(EVERYWHERE)
    parallelize(model, init_device_mesh("cpu", (2,)), sequence=True)
    apply_activation_checkpointing(model, check_fn=lambda module: module in set(model.model.layers))
    assert_equal(train(model), expected)


def test_activation_checkpointing(two):
    two(with_checkpointing)


class Pair(nn.Module):
    def __init__(self, side: str, save: str, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"side": side, "save": save, "dtype": torch.float64}
        self.up = gain_ops.GainLinear(6, 10, bias, **options)
        self.down = gain_ops.GainLinear(10, 6, bias, **options)
        for delta in deltas(self).values():
            nn.init.normal_(delta)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def step(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: full(delta.grad) for name, delta in deltas(model).items()}}


def compiled(side: str, save: str) -> None:
    pair = Pair(side, save, bias=True)
    expected = step(pair)
    mesh = init_device_mesh("cpu", (2,))
    sharded = Pair(side, save, bias=True)
    parallelize_module(sharded, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    place_gains(sharded)
    assert_equal(step(sharded), expected)
    sharded.zero_grad()
    torch._dynamo.reset()
    assert_equal(step(torch.compile(sharded, backend="aot_eager", fullgraph=True)), expected)


@pytest.mark.parametrize(("side", "save"), [("output", "output"), ("output", "input"), ("input", "input")])
def test_compiled(two, side, save):
    two(compiled, side, save)


def placed() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for side, up, down in (("output", Shard(0), Replicate()), ("input", Replicate(), Shard(0))):
        pair = Pair(side, "auto", bias=True)
        expected = {name: delta.detach().clone() for name, delta in deltas(pair).items()}
        parallelize_module(pair, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for linear in (pair.up, pair.down):
            linear.weight.requires_grad_(False)  # the styles of torch 2.10 lose it
        if side == "input":
            with pytest.raises(ValueError, match=r"delta Shard\(0\)(?s:.)*place_gains"):
                pair(torch.randn(2, 6, dtype=torch.float64))
        place_gains(pair)
        place_gains(pair)  # again changes nothing
        assert pair.up.delta.placements == (up,)
        assert pair.down.delta.placements == (down,)
        assert [name for name, p in pair.named_parameters() if p.requires_grad] == ["up.delta", "down.delta"]
        assert list(pair.up.state_dict()) == ["weight", "bias", "delta"]
        assert all(torch.equal(full(delta), expected[name]) for name, delta in deltas(pair).items())


def test_place_gains(two):
    two(placed)


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    pair = Pair("output", "auto", bias=False)
    fully_shard(pair, mesh=mesh)
    with pytest.raises(ValueError, match="cannot place the gains after fully_shard"):
        place_gains(pair)

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    wrapper = gain_ops.layers.make.gain_layer(Odd(6, 10, dtype=torch.float64))
    both = nn.ModuleDict({"plain": Pair("input", "auto", bias=False), "odd": wrapper})
    parallelize_module(both, mesh, {"plain.up": ColwiseParallel(), "odd.base": ColwiseParallel()})
    with pytest.raises(ValueError, match="a gain around Odd"):
        place_gains(both)
    assert both["plain"].up.delta.placements == (Shard(0),)  # as the style left it

    fused = llama(("down_proj",), side="input", fuse_mlp=True).model.layers[0].mlp
    parallelize_module(fused, mesh, {"gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()})
    with pytest.raises(ValueError, match="GainLlamaMLP reads the weights of its projections"):
        place_gains(fused)

    with pytest.raises(TypeError, match="got LlamaMLP"):
        parallelize_module(llama(("down_proj",), side="input"), mesh, {"model.layers.0.mlp": FusedMlpParallel()})


def test_refusals(two):
    two(refusals)


def wrapped(bias: bool, letter: str) -> None:
    """A gain around a base that works on DTensors."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    linear = nn.Linear(4, 6, bias, dtype=torch.float64)
    placements = {"row": ([Shard(1)], [Replicate()], [Shard(1)]), "column": ([Replicate()], [Shard(0)], [Shard(0)])}
    of_x, of_delta, of_weight = placements[letter]
    x, delta = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    class Base(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    def wrapper() -> gain_ops.layers.gained.Gained:
        base = Base(4, 6, bias, dtype=torch.float64)
        base.load_state_dict(linear.state_dict())
        return gain_ops.layers.make.gain_layer(base)

    plain, sharded = wrapper(), wrapper()
    plain.delta.data.copy_(delta)
    sharded.delta = nn.Parameter(distribute_tensor(delta, mesh, of_delta))
    base = sharded.base
    base.weight = nn.Parameter(distribute_tensor(base.weight.data, mesh, of_weight), requires_grad=False)
    if bias:
        base.bias = nn.Parameter(distribute_tensor(base.bias.data, mesh, of_delta), requires_grad=False)
    expected = plain(x)
    expected.square().sum().backward()
    y = sharded(distribute_tensor(x, mesh, of_x))
    y.full_tensor().square().sum().backward()
    assert_equal({"y": full(y), "delta": full(sharded.delta.grad)}, {"y": expected.detach(), "delta": plain.delta.grad})


@pytest.mark.parametrize(("bias", "letter"), [(False, "row"), (False, "column"), (True, "column")])
def test_a_gain_round_another_linear_map(two, bias, letter):
    two(wrapped, bias, letter)


def open_sum() -> None:
    mesh = init_device_mesh("cpu", (2,))

    class Base(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return DTensor.from_local(super().forward(x), mesh, [Partial()], run_check=False)

    with pytest.raises(ValueError, match="Base returns a Partial sum over ranks"):
        gain_ops.layers.make.gain_layer(Base(4, 6))(torch.randn(3, 4))


def test_a_bias_is_not_taken_out_of_an_open_sum(two):
    two(open_sum)


def by_transformers(side: str) -> None:
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    expected = train(llama(EVERYWHERE, side=side))
    model = llama(EVERYWHERE, side=side)
    mesh = init_device_mesh("cpu", (2,))
    styles = {pattern: re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in model.tp_plan}
    plan, parameters = {}, dict(model.named_parameters())
    for name in dict(model.named_modules()):
        for pattern, expression in styles.items():
            if expression.fullmatch(name):
                own = [name, f"{name}.weight", f"{name}.bias"]
                plan |= {key: model.tp_plan[pattern] for key in own if key == name or key in parameters}
    model = apply_tensor_parallelism(model, mesh, plan)
    place_gains(model)
    assert_equal(train(model), expected)

    with pytest.raises(ValueError, match="already sharded"):  # what from_pretrained(tp_plan="auto") gives
        gain_ops.apply(apply_tensor_parallelism(llama(None), mesh, plan), "gain-ffn")


@pytest.mark.parametrize("side", ["output", "input"])
def test_sharded_by_transformers(two, side):
    two(by_transformers, side)


def saved_and_loaded(path: str) -> None:
    model = llama(EVERYWHERE)
    parallelize(model, init_device_mesh("cpu", (2,)))
    gain_ops.save_gains(model, path)
    plain = llama(None)
    gain_ops.load_gains(plain, path)
    for name, delta in deltas(plain).items():
        assert torch.equal(delta, deltas(llama(EVERYWHERE))[name].float().double())
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.zero_()
    gain_ops.load_gains(model, path)
    ids = torch.arange(8)[None]
    assert_equal({"logits": model(ids).logits}, {"logits": plain(ids).logits})


def test_a_gain_file_of_a_sharded_model(two, tmp_path):
    two(saved_and_loaded, str(tmp_path / "gains.safetensors"))


def partly(foreach: bool) -> None:
    """The attention's layers stay whole; as docs/howto/tensor_parallel.md says."""
    model = llama(EVERYWHERE)
    styles = {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), styles)
    place_gains(model)
    trained = list(deltas(model).values())
    groups = [[p for p in trained if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    together = torch.optim.AdamW(trained, lr=1e-2, foreach=foreach)
    apart = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2, foreach=foreach)

    alone = llama(EVERYWHERE)
    expected = torch.optim.AdamW(deltas(alone).values(), lr=1e-2)
    ids = torch.arange(8)[None]
    for either in (alone, model):
        F.cross_entropy(either(ids).logits[0], ids[0]).backward()
    norm = nn.utils.clip_grad_norm_(deltas(alone).values(), 1e-3)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        nn.utils.clip_grad_norm_(trained, 1e-3)
    sharded, whole = (nn.utils.get_total_norm([p.grad for p in group]) for group in groups)
    both = torch.stack([sharded.full_tensor(), whole]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, 1e-3, both)
    gradients = {name: full(delta.grad) for name, delta in deltas(model).items()}
    assert_equal(
        {"norm": both, **gradients}, {"norm": norm, **{name: delta.grad for name, delta in deltas(alone).items()}}
    )
    expected.step()
    if foreach:
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            together.step()
        apart.step()
    else:
        together.step()
    assert_equal({name: full(delta) for name, delta in deltas(model).items()}, deltas(alone))


@pytest.mark.parametrize("foreach", [False, True])
def test_layers_that_stay_whole_are_clipped_and_stepped_in_a_group_of_their_own(two, foreach):
    two(partly, foreach)
