"""torch.compile with fullgraph=True: the values of eager, forward and backward, for ops and for whole models.

And CUDA graphs: what an op or a layer does, forward and backward, is captured and replayed on other values.
"""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gain_ops
from gain_ops import (
    GainLinear,
    gain_activation,
    gain_add,
    gain_add_layer_norm,
    gain_add_rms_norm,
    gain_glu,
    gain_linear,
    gain_mlp,
    gain_rms_norm,
    gain_rms_norm_add,
    gain_scale,
)
from gain_ops.models.record import gained_modules
from gain_ops.testing import assert_no_worse_than_torch

SIDE_AND_SAVE = [("output", "output"), ("output", "input"), ("input", "auto")]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _parameters(side: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    delta = (0.1 * torch.randn(8 if side == "output" else 16)).requires_grad_()
    return torch.randn(8, 16).to(dtype), delta, torch.randn(8).to(dtype)


def _check(compiled, eager, x: Tensor, delta: Tensor) -> None:
    x = x.detach().requires_grad_()
    dy = torch.randn_like(eager(x))
    got, expected = compiled(x), eager(x)
    # the GEMMs are the same library calls; what inductor fuses round them may differ in the last place
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, (x, delta), dy), torch.autograd.grad(expected, (x, delta), dy))


# inductor's C++ takes a minute on two cores: once is enough for what it does to an opaque op
@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "save", "compiler"), [(*each, "aot_eager") for each in SIDE_AND_SAVE] + [("output", "output", "inductor")]
)
def test_fullgraph_for_every_rank_and_changing_t(side: str, save: str, compiler: str) -> None:
    weight, delta, bias = _parameters(side)

    def block(x: Tensor) -> Tensor:
        return torch.tanh(gain_linear(x, weight, delta, bias, side=side, save=save)) * 2

    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for shape in ((5, 16), (7, 16), (2, 3, 16), (2, 1, 2, 16)):
        _check(compiled, block, torch.randn(shape), delta)


@pytest.mark.parametrize(("side", "save"), SIDE_AND_SAVE)
def test_dynamic_t_compiles_once(side: str, save: str) -> None:
    weight, delta, _ = _parameters(side)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: gain_linear(x, weight, delta, side=side, save=save), fullgraph=True, dynamic=True, backend=count
    )
    for t in (3, 4, 17, 30):
        compiled(torch.randn(t, 16))
    assert len(graphs) == 1


@pytest.mark.parametrize(("side", "save"), SIDE_AND_SAVE)
def test_under_autocast(side: str, save: str) -> None:
    weight, delta, bias = _parameters(side)

    def block(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gain_linear(x, weight, delta, bias, side=side, save=save)

    _check(torch.compile(block, fullgraph=True, backend="aot_eager"), block, torch.randn(5, 16), delta)


def test_under_checkpointing() -> None:
    weight, delta, _ = _parameters("output")

    def block(x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(gain_linear(x, weight, delta)), x, use_reentrant=False)

    _check(torch.compile(block, fullgraph=True, backend="aot_eager"), block, torch.randn(5, 16), delta)


def test_gain_scale() -> None:
    delta = torch.randn(16, requires_grad=True)
    compiled = torch.compile(lambda x: gain_scale(x, delta), fullgraph=True, backend="aot_eager")
    for shape in ((5, 16), (2, 3, 16)):
        _check(compiled, lambda x: gain_scale(x, delta), torch.randn(shape), delta)


def test_the_kept_tensors_are_those_of_eager() -> None:
    weight, delta, _ = _parameters("output")
    x = torch.randn(5, 16, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    compiled = torch.compile(lambda x: gain_linear(x, weight, delta, save="input"), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compiled(x)
    assert (5, 8) not in kept, "z was kept though save='input'"
    assert (5, 16) in kept


def test_export_holds_no_backend_of_the_machine() -> None:
    weight, delta, _ = _parameters("output")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", weight)
            self.register_buffer("delta", delta.detach())

        def forward(self, x: Tensor) -> Tensor:
            return gain_linear(x, self.weight, self.delta)

    program = torch.export.export(Layer(), (torch.randn(5, 16),))
    calls = [node for node in program.graph.nodes if node.target == torch.ops.gain_ops.linear.default]
    assert [node.args[-1] for node in calls] == ["auto"]
    x = torch.randn(5, 16)
    assert torch.equal(program.module()(x), gain_linear(x, weight, delta))


def test_no_call_asks_what_torch_2_10_cannot_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo of torch 2.10 breaks the graph at this question; later ones trace it, so it is made to fail here."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", None)
    weight, delta, bias = _parameters("output")
    gain_linear(torch.randn(3, 16), weight, delta, bias).sum().backward()
    assert delta.grad is not None


# whole models of transformers

IDS = torch.arange(24).view(2, 12)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=24, initializer_range=0.2, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 24, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.2, **sizes, **tokens, **dropout))


OPTIONS = {
    "output side": {},
    "input side": {"side": "input"},
    "input side, fused FFN": {"side": "input", "fuse_mlp": True},
}


def gained(model: nn.Module, **options: object) -> nn.Module:
    gain_ops.apply(model.train(), "gain-ffn", **options)
    for layer in gained_modules(model).values():
        nn.init.normal_(layer.delta, std=0.3)
    return model


def step(model: nn.Module, forward: nn.Module) -> dict[str, Tensor]:
    """The logits of a training step, and the gradient of every delta by name; ``forward`` is the model or compiled of it."""
    model.zero_grad()
    logits = forward(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = {name: layer.delta.grad.clone() for name, layer in gained_modules(model).items()}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_whole_model_is_one_graph_with_the_results_of_eager(make: Callable[[], nn.Module], options: dict) -> None:
    model = gained(make(), **options)
    exact = copy.deepcopy(model).double()
    expected, truth = step(model, model), step(exact, exact)
    assert len(expected) == 3
    got = step(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name, value in expected.items():
        if (
            "fuse_mlp" in options
        ):  # a graph lays its operands out otherwise, and a CPU's sums and sigmoids differ by that
            assert_no_worse_than_torch(name, got[name], value, truth[name])
        else:
            assert torch.equal(got[name], value), name
        assert value.any(), name


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_a_whole_model_by_inductor() -> None:
    model = gained(llama(), side="input", fuse_mlp=True)
    exact = copy.deepcopy(model).double()
    expected, truth = step(model, model), step(exact, exact)
    got = step(model, torch.compile(model, fullgraph=True, backend="inductor"))
    for name, value in truth.items():
        assert_no_worse_than_torch(name, got[name], expected[name], value)


# CUDA graphs

WIDTH, HIDDEN = 128, 256
# an op of the tensors t by a backend, and the delta that it takes
OPS: dict[str, tuple[str, Callable[[dict[str, Tensor], str], Tensor]]] = {
    "linear, keeps z": ("wide", lambda t, b: gain_linear(t["x"], t["up"], t["wide"], save="output", backend=b)),
    "linear, keeps x": ("wide", lambda t, b: gain_linear(t["x"], t["up"], t["wide"], save="input", backend=b)),
    "linear, input side": ("narrow", lambda t, b: gain_linear(t["x"], t["up"], t["narrow"], side="input", backend=b)),
    "scale": ("narrow", lambda t, b: gain_scale(t["x"], t["narrow"], backend=b)),
    "glu": ("narrow", lambda t, b: gain_glu(t["x"], t["x"].flip(-1), t["narrow"], backend=b)),
    "activation": ("narrow", lambda t, b: gain_activation(t["x"], t["narrow"], activation="relu2", backend=b)),
    "rms_norm": ("narrow", lambda t, b: gain_rms_norm(t["x"], t["up"][0], t["narrow"], backend=b)),
    "add": ("narrow", lambda t, b: gain_add(t["x"], t["x"].flip(-1), t["narrow"], t["up"][1], backend=b)),
    "add and norm": (
        "narrow",
        lambda t, b: sum(gain_add_rms_norm(t["x"], t["x"] / 2, t["narrow"], t["up"][0], backend=b)),
    ),
    "add and layer norm": (
        "narrow",
        lambda t, b: sum(gain_add_layer_norm(t["x"], t["x"] / 2, t["narrow"], *t["up"][:2], backend=b)),
    ),
    "norm and add": ("narrow", lambda t, b: gain_rms_norm_add(t["x"], t["x"] / 2, t["narrow"], t["up"][0], backend=b)),
    **{
        f"mlp, recompute={again}": (
            "wide",
            lambda t, b, again=again: gain_mlp(
                t["x"], t["gate"], t["up"], t["down"], t["wide"], recompute=again, backend=b
            ),
        )
        for again in (False, True)
    },
}


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def capture(work: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of some work, and the tensors that a replay fills; skips where the backend is not built."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and workspaces made before, on another stream, as torch asks
        for _ in range(2):
            try:
                work()
            except gain_ops.BackendUnavailable as error:
                pytest.skip(str(error))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("name", OPS)
def test_an_op_and_its_backward_are_captured_and_replayed_on_other_values(name: str, backend: str) -> None:
    tensors = {
        "x": on_gpu(64, WIDTH).requires_grad_(),
        "gate": on_gpu(HIDDEN, WIDTH),
        "up": on_gpu(HIDDEN, WIDTH),
        "down": on_gpu(WIDTH, HIDDEN),
        "wide": on_gpu(HIDDEN, dtype=torch.float32).requires_grad_(),
        "narrow": on_gpu(WIDTH, dtype=torch.float32).requires_grad_(),
    }
    delta, op = tensors[OPS[name][0]], OPS[name][1]
    dy = torch.randn_like(op(tensors, "eager"))

    def work() -> tuple[Tensor, ...]:
        y = op(tensors, backend)
        return y, *torch.autograd.grad(y, (tensors["x"], delta), dy)

    graph, results = capture(work)
    for _ in range(2):
        for tensor in (tensors["x"], delta, dy):
            tensor.data.normal_()
        graph.replay()
        replayed = [result.clone() for result in results]
        assert all(torch.equal(got, wanted) for got, wanted in zip(replayed, work(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_layer_in_training_is_captured_and_replayed_on_other_values(side: str, backend: str) -> None:
    layer = GainLinear(WIDTH, HIDDEN, side=side, backend=backend, device="cuda", dtype=torch.bfloat16)
    x, dy = on_gpu(64, WIDTH), on_gpu(64, HIDDEN)

    def work() -> tuple[Tensor, ...]:
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        y.backward(dy)
        return y, layer.delta.grad

    graph, results = capture(work)
    for _ in range(2):
        for tensor in (x, dy, layer.delta.data):
            tensor.normal_()
        graph.replay()
        replayed = [result.clone() for result in results]
        assert all(torch.equal(got, wanted) for got, wanted in zip(replayed, work(), strict=True))
