"""Named gain sets: a switch gives each file's model, loses nothing, replaces nothing, and refuses what would."""

import copy
import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops import add_gains, set_gains
from gain_ops.gainfiles.file import GainFileError, read_gains
from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.models.record import gained_modules
from gain_ops.models.sets import active_gains, list_gains, using_gains

IDS = torch.arange(1, 9)[None]


def build(**extra):
    torch.manual_seed(0)
    options = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**options, "vocab_size": 50, **extra})).eval()


def gained(seed, targets="gain-ffn", side="output"):
    """A model with random gains."""
    model = build()
    gain_ops.apply(model, targets, side=side)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in gained_modules(model).values():
            layer.delta.normal_(std=0.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def files(tmp_path):
    """A gain file on attention and FFN, one on attention alone, one on the other side of it."""
    paths = {}
    for seed, (name, targets, side) in enumerate(
        [("code", "gain-ffn", "output"), ("law", "gain", "output"), ("other", "gain", "input")]
    ):
        paths[name] = tmp_path / f"{name}.safetensors"
        gain_ops.save_gains(gained(seed, targets, side), paths[name])
    return paths


@pytest.fixture
def two(files):
    return {name: files[name] for name in ("code", "law")}


@pytest.fixture
def expected(files):
    """The logits of the base and of each file by itself."""
    found = {None: logits(build())}
    for name, path in files.items():
        gain_ops.load_gains(model := build(), path)
        found[name] = logits(model)
    return found


def contents(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("names", [("code", "law"), ("law", "code")])
def test_a_switch_gives_the_model_of_each_file(two, expected, names):
    model = build()
    applied = add_gains(model, {name: two[name] for name in names}, memory="lean", backend="eager")
    assert (applied.side, len(applied.names), applied.trained) == ("output", 4, 64)
    assert applied.names == tuple(gained_modules(model))
    assert set(applied.targets) == set(applied.names)
    assert (list_gains(model), active_gains(model)) == (names, None)
    layer = model.model.layers[0].self_attn.o_proj
    assert (layer.save, layer.backend) == ("input", "eager")
    for name in (None, "code", "law", "law", None, "law", "code", None):
        set_gains(model, name)
        assert active_gains(model) == name
        assert torch.equal(logits(model), expected[name]), name


def test_the_state_dict_is_that_of_one_set(two):
    model = build()
    add_gains(model, two)
    set_gains(model, "law")
    assert list(model.state_dict()) == list(gained(0).state_dict())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{name}.delta" for name in gained_modules(model)
    ]


def test_both_sides(files, expected):
    model = build()
    add_gains(model, {"other": files["other"]})
    assert model.model.layers[0].self_attn.o_proj.side == "input"
    before = contents(model)
    with pytest.raises(GainFileError, match="has its gain on the input side, in the file on the output side"):
        add_gains(model, {"law": files["law"]})
    assert_unchanged(model, before)
    set_gains(model, "other")
    assert torch.equal(logits(model), expected["other"])


def test_what_was_trained_is_kept(two, expected):
    model = build()
    add_gains(model, two)
    layers = gained_modules(model).values()
    deltas = [layer.delta for layer in layers]
    addresses = [delta.data_ptr() for delta in deltas]
    optimizer = torch.optim.AdamW(deltas, lr=0.1)
    trained = {}
    for name in ("code", "law"):
        set_gains(model, name)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained[name] = logits(model)
        assert not torch.equal(trained[name], expected[name])
    for name in ("code", "law", None):
        set_gains(model, name)
        assert torch.equal(logits(model), trained.get(name, expected[None]))
    assert all(layer.delta is delta for layer, delta in zip(layers, deltas, strict=True))
    assert [delta.data_ptr() for delta in deltas] == addresses


def test_a_switch_compiles_nothing_again(two, expected):
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = build()
    add_gains(model, two)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    logits(compiled)
    before = len(graphs)
    assert before == 1
    for name in ("code", "law", None):
        set_gains(compiled, name)
        assert torch.equal(logits(compiled), expected[name])
    add_gains(compiled, {"third": two["law"]})
    set_gains(compiled, "third")
    assert torch.equal(logits(compiled), expected["law"])
    assert len(graphs) == before


def test_on_a_model_with_gains(two, expected):
    model = gained(7)
    mine = logits(model)
    with pytest.raises(GainFileError, match=r"does not have: model\.layers\.0\.mlp\.down_proj"):
        add_gains(gained(7, "gain"), two)
    assert add_gains(model, {"law": two["law"], "mine": None, "code": two["code"]}).targets == "gain-ffn"
    assert (list_gains(model), active_gains(model)) == (("law", "mine", "code"), "mine")
    for name in ("law", "mine", "code", "mine"):
        set_gains(model, name)
        assert torch.equal(logits(model), mine if name == "mine" else expected[name])
    set_gains(model, "law")
    add_gains(model, {"fork": None})
    assert active_gains(model) == "law"
    set_gains(model, "fork")
    assert torch.equal(logits(model), expected["law"])


def test_gains_that_no_set_has_are_not_lost(two, expected):
    model = gained(7)
    mine = logits(model)
    add_gains(model, two)
    with pytest.raises(ValueError, match=r"gains that no set has, and the switch would lose them: name them first"):
        set_gains(model, "law")
    assert torch.equal(logits(model), mine)
    add_gains(model, {"mine": None})
    for name in ("law", "mine"):
        set_gains(model, name)
        assert torch.equal(logits(model), mine if name == "mine" else expected[name])
    set_gains(model, None)
    next(iter(gained_modules(model).values())).delta.data[3] = 1e-3  # trained while the base was active
    with pytest.raises(ValueError, match="gains that no set has"):
        set_gains(model, "law")
    assert active_gains(model) is None


def test_saving_and_loading(two, files, tmp_path):
    model = build()
    add_gains(model, two)
    out = tmp_path / "out.safetensors"
    for action in (gain_ops.save_gains, gain_ops.load_gains):
        with pytest.raises(ValueError, match=r"while the base is active: choose one of the gain sets code, law with"):
            action(model, out)
    set_gains(model, "law")
    gain_ops.save_gains(model, out)
    law, saved = read_gains(two["law"]), read_gains(out)
    assert saved.deltas.keys() == read_gains(two["code"]).deltas.keys()
    for name, delta in saved.deltas.items():
        assert torch.equal(delta, law.deltas.get(name, torch.zeros(16)))
    assert saved.targets == tuple(saved.deltas)
    gain_ops.load_gains(model, two["code"])  # into the active set
    set_gains(model, None)
    set_gains(model, "law")
    gain_ops.load_gains(twin := build(), two["code"])
    assert torch.equal(logits(model), logits(twin))


def test_absorb_folds_in_the_active_set(two, expected):
    model = build()
    keys = list(model.state_dict())
    add_gains(model, two)
    before = contents(model)
    with pytest.raises(ValueError, match="cannot absorb while the base is active"):
        gain_ops.absorb(model)
    assert_unchanged(model, before)
    set_gains(model, "law")
    gain_ops.absorb(model)
    torch.testing.assert_close(logits(model), expected["law"])
    assert list(model.state_dict()) == keys
    assert list_gains(model) == ()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no gain sets"):
        set_gains(model, "code")
    gain_ops.apply(model)  # the next domain starts from here


def test_remove_drops_all(two, expected):
    model = build()
    before, flags = contents(model), [p.requires_grad for p in model.parameters()]
    add_gains(model, two)
    set_gains(model, "code")
    gain_ops.remove(model)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list_gains(model) == ()
    assert not any("gain_ops" in key for module in model.modules() for key in vars(module))
    add_gains(model, {"law": two["law"]})
    assert list_gains(model) == ("law",)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled])
def test_a_copy_has_its_own_sets(two, expected, twin_of):
    model = build()
    add_gains(model, two)
    set_gains(model, "code")
    twin = twin_of(model)
    assert (list_gains(twin), active_gains(twin)) == (("code", "law"), "code")
    with torch.no_grad():
        for layer in gained_modules(twin).values():
            layer.delta.add_(1)
    changed = logits(twin)
    for name in ("law", "code"):
        set_gains(twin, name)
        assert torch.equal(logits(twin), changed if name == "code" else expected[name])
    set_gains(model, "law")
    set_gains(model, "code")
    assert torch.equal(logits(model), expected["code"])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_inside_another_module(two, expected, where):
    model = build()
    outer = nn.ModuleDict({"module": model})
    add_gains(model, {"code": two["code"]})
    inside, outside = (model, outer) if where == "inside" else (outer, model)
    add_gains(inside, {"law": two["law"]})
    set_gains(outside, "law")
    assert active_gains(inside) == "law"
    assert torch.equal(logits(model), expected["law"])
    gain_ops.remove(outer)
    assert list_gains(model) == ()


def test_gains_put_on_by_hand(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), GainLinear(6, 4, side="input"))

    model, path = make(), tmp_path / "hand.safetensors"
    model[1].delta.data.fill_(0.5)
    gain_ops.save_gains(model, path)
    twin = make()
    outer = nn.Sequential(twin)
    assert add_gains(twin, {"half": path}) is None
    add_gains(outer, {"half again": path})  # the names stay those of the first call
    for name in ("half", "half again"):
        set_gains(outer, name)
        assert (twin[1].delta == 0.5).all()
        set_gains(outer, None)
        assert (twin[1].delta == 0).all()
    gain_ops.remove(outer)
    assert list_gains(twin) == ()


def test_for_the_time_of_a_block(two, expected):
    model = build()
    add_gains(model, two)
    set_gains(model, "law")
    with using_gains(model, None):
        assert torch.equal(logits(model), expected[None])
        with using_gains(model, "code"):
            assert torch.equal(logits(model), expected["code"])
        assert active_gains(model) is None
    assert active_gains(model) == "law"
    with pytest.raises(KeyError), using_gains(model, "code"):
        raise KeyError
    assert torch.equal(logits(model), expected["law"])


def test_the_model_may_change_its_dtype(two, expected):
    model = build()
    add_gains(model, two)
    set_gains(model, "code")
    model.double()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.delta[0] = 0.1  # not a float32
    before = logits(model)
    for name in ("law", "code"):
        set_gains(model, name)
        got = logits(model)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, before if name == "code" else expected[name].double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(got, before)


def test_shared_modules(tmp_path):
    def make():
        torch.manual_seed(0)
        shared = nn.Linear(4, 4)
        return nn.ModuleDict({"a": shared, "b": shared})

    model, path = make(), tmp_path / "shared.safetensors"
    gain_ops.apply(model, ["a"])
    model["b"].delta.data.fill_(0.5)
    gain_ops.save_gains(model, path)
    add_gains(twin := make(), {"half": path})
    set_gains(twin, "half")
    assert twin["a"] is twin["b"]
    assert (twin["b"].delta == 0.5).all()


def test_other_base_weights(two):
    model = build()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    before = contents(model)
    with pytest.raises(GainFileError, match=r"code.safetensors was trained on other weights .* 1 of 4 layers"):
        add_gains(model, two)
    assert_unchanged(model, before)
    add_gains(model, two, check_base=False)
    assert list_gains(model) == ("code", "law")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (
            lambda files: {"other": files["other"]},
            GainFileError,
            "output side in law .* and on the input side in other",
        ),
        (lambda files: {"none": files["law"].with_name("none")}, FileNotFoundError, "none"),
        (lambda files: {"mine": None}, ValueError, "the set mine should be the model's gains, and the model has none"),
    ],
)
def test_refusals_on_a_plain_model_change_nothing(files, more, error, message):
    model = build()
    before, flags = contents(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        add_gains(model, {"law": files["law"], **more(files)})
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(module, Gained) for module in model.modules())
    assert list_gains(model) == ()


def test_refusals_on_a_model_with_sets_change_nothing(files, two):
    model = build()
    add_gains(model, two)
    set_gains(model, "law")
    before = contents(model)
    for more, error, message in (
        ({"third": two["law"], "code": two["law"]}, ValueError, "already has a gain set code: give another name"),
        ({}, ValueError, "give at least one gain file"),
        ({"third": two["law"], "none": files["law"].with_name("none")}, FileNotFoundError, "none"),
        ({"third": two["law"], "other": files["other"]}, GainFileError, "has its gain on the output side"),
    ):
        with pytest.raises(error, match=message):
            add_gains(model, more)
    with pytest.raises(ValueError, match="no gain set 'LAW', it has code, law"):
        set_gains(model, "LAW")
    for options in ({"backend": "fast"}, {"memory": "low"}):
        with pytest.raises(ValueError, match="is not one of"):
            add_gains(build(), two, **options)
    assert (list_gains(model), active_gains(model)) == (("code", "law"), "law")
    assert_unchanged(model, before)


def test_deltas_that_are_not_there(two):
    model = build()
    add_gains(model, two)
    set_gains(model, "law")
    layer = model.model.layers[0].mlp.down_proj
    whole, layer.delta.data = layer.delta.data, torch.empty(0)
    with pytest.raises(
        ValueError, match=r"delta of model.layers.0.mlp.down_proj is partitioned: use deepspeed.*Gathered"
    ):
        set_gains(model, "code")
    layer.delta.data = whole
    set_gains(model, "code")
    with pytest.raises(ValueError, match="is on the meta device"):
        set_gains(model.to("meta"), "law")
    assert active_gains(model) == "code"


def test_sharded_model(two, expected, tmp_path):
    model, early = build(), build()
    add_gains(early, two)
    set_gains(early, "law")
    gain_ops.apply(model, "gain-ffn")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for sharded in (model, early):
            torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
        optimizers = {
            sharded: torch.optim.AdamW([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
            for sharded in (model, early)
        }
        add_gains(model, two)
        for sharded in optimizers:
            for name in ("code", "law", None, "code"):
                set_gains(sharded, name)
                torch.testing.assert_close(logits(sharded), expected[name])  # and leaves the parameters gathered
            sharded(IDS, labels=IDS).loss.backward()
            optimizers[sharded].step()
            trained = logits(sharded)
            assert (trained - expected["code"]).abs().max() > 1e-3
            for name in ("law", "code"):
                set_gains(sharded, name)
            assert all(type(layer.delta).__name__ == "DTensor" for layer in gained_modules(sharded).values())
            assert torch.equal(logits(sharded), trained)
    finally:
        torch.distributed.destroy_process_group()
