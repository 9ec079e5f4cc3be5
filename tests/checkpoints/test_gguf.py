"""Gains in GGUF files: absorbed there, the files read by transformers and by llama.cpp compute what the gained model does."""

import copy
import dataclasses
import re
import sys

import gguf
import numpy as np
import pytest
import torch

import gain_ops
from gain_ops.checkpoints.edits import CheckpointError, Rounding
from gain_ops.checkpoints.formats.gguf import open_gguf
from gain_ops.checkpoints.formats.gguf_blocks import BLOCKS, decode
from gain_ops.gainfiles.file import GainFile, read_gains
from gain_ops.models.files import save_gains
from gain_ops.models.record import gained_modules
from gain_ops.testing import assert_no_worse_than_torch, relative_error
from gain_ops.training.loading import bundled_model

from support.gguf_files import (
    finish,
    gpt2_fields,
    llama_fields,
    load,
    random_blocks,
    tiny_gpt2,
    tiny_llama,
    write_model,
    write_tensors,
)

IDS = torch.arange(24).view(2, 12)
QK = ["q_proj", "k_proj"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Gaining models, and absorbing as the engine does


def gain(model, path, targets="gain-ffn", side="output", spread=0.1):
    """Put random gains on a model and save them."""
    gain_ops.apply(model, targets, side=side)
    for layer in gained_modules(model).values():
        torch.nn.init.normal_(layer.delta, std=spread)
    save_gains(model, path)
    return read_gains(path)


def absorb(path, out, gains, *, requantize=False, check_base=True, rows=50):
    checkpoint = open_gguf(path)
    edits = checkpoint.edits(gains, requantize=requantize, check_base=check_base)
    assert [edit.layer for edit in edits] == list(gains.deltas)
    rounding = Rounding()
    for file in checkpoint.files:
        content = bytearray(file.read_bytes())
        for edit in (edit for edit in edits if edit.region.file == file):
            region, old = edit.region, edit.region.read()
            for start in range(0, region.rows, rows):
                new, found = edit.rewrite(old[start : start + rows], start)
                at = region.offset + start * region.row_bytes
                content[at : at + new.numel()] = new.numpy().tobytes()
                rounding |= found
        (out if len(checkpoint.files) == 1 else out / file.name).write_bytes(content)
    return rounding


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@torch.no_grad()
def folded(model, path):
    """The gained model's plain twin, with each term of each gained weight rounded once to the precision of the file.

    A term is what one scale of a block stands for: a weight in Q4_1 is the sum of two, one in Q4_0 has one.
    """
    checkpoint, twin = open_gguf(path), copy.deepcopy(model)
    layers = gained_modules(twin)
    gains = file_of_gains({name: len(layer.delta) for name, layer in layers.items()})
    for edit in checkpoint.edits(gains, requantize=False, check_base=False):
        layer, kind = layers[edit.layer], checkpoint.tensors[edit.tensor].kind
        terms = terms_of(kind, edit.region.read()) if kind in BLOCKS else [layer.weight]
        torch.testing.assert_close(sum(terms), layer.weight)
        layer.weight.copy_(sum((term * layer.gain[:, None]).to(precision(kind)).float() for term in terms))
        layer.delta.zero_()
    return twin


def terms_of(kind, rows):
    block = BLOCKS[kind]
    blocks = rows.view(len(rows), -1, block.size)
    scales = block.scales(blocks)
    alone = torch.eye(scales.shape[-1], dtype=torch.float16)
    return [decode(kind, block.replaced(blocks, scales * only).view_as(rows)) for only in alone]


def precision(kind):
    """What a weight, or the scales of a block, are rounded to."""
    return torch.bfloat16 if kind == "BF16" else torch.float16


def file_of_gains(sizes):
    """A gain file's content, without fingerprints: so many output gains for each layer."""
    deltas = {name: torch.full((size,), 0.25) for name, size in sizes.items()}
    return GainFile(deltas, dict.fromkeys(sizes, "output"), dict.fromkeys(sizes), tuple(sizes), "the-base", "0")


def on_the_input_side(gains):
    return dataclasses.replace(gains, sides=dict.fromkeys(gains.sides, "input"))


# What an absorbed file computes


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ1_M", "IQ3_S", "TQ2_0"])
def test_an_absorbed_file_is_the_gained_model(tmp_path, kind):
    sizes = (256, 512) if gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 256 else (96, 160)
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(*sizes), "llama", llama_fields(model.config), kind)
    model = load(base)
    gains = gain(model, tmp_path / "gains.safetensors")
    rounding = absorb(base, tmp_path / "absorbed.gguf", gains)

    found, truth = logits(load(tmp_path / "absorbed.gguf")), logits(copy.deepcopy(model).double())
    assert_no_worse_than_torch("logits", found, logits(folded(model, base)), truth, unit=precision(kind))
    assert relative_error(logits(load(base)), truth) > 20 * relative_error(found, truth)
    assert rounding.relative > 0


@pytest.mark.parametrize(
    ("targets", "side"), [("gain-ffn", "output"), ("gain-ffn", "input"), (QK, "output"), (QK, "input")]
)
def test_an_absorbed_float32_llama_has_the_bits_of_absorbing_in_memory(tmp_path, targets, side):
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(), "llama", llama_fields(model.config))
    model = load(base)
    gains = gain(model, tmp_path / "gains.safetensors", targets, side)
    for check_base in (True, False):
        absorb(base, tmp_path / "absorbed.gguf", gains, check_base=check_base)
        assert_same_weights(load(tmp_path / "absorbed.gguf"), model)
    gain_ops.absorb(model)
    assert_same_weights(load(tmp_path / "absorbed.gguf"), model)


@pytest.mark.parametrize(
    ("targets", "side"), [("gain-ffn", "output"), ("gain-ffn", "input"), (["c_attn", "c_fc"], "output")]
)
def test_an_absorbed_gpt2_whose_weights_lie_transposed(tmp_path, targets, side):
    base = write_model(tmp_path / "base.gguf", model := tiny_gpt2(), "gpt2", gpt2_fields(model.config))
    model = load(base)
    gains = gain(model, tmp_path / "gains.safetensors", targets, side)
    absorb(base, tmp_path / "absorbed.gguf", gains)
    gain_ops.absorb(model)
    assert_same_weights(load(tmp_path / "absorbed.gguf"), model)


def assert_same_weights(one, other):
    gain_names = {name for name, _ in other.named_parameters() if name.endswith(".delta")}
    if gain_names:
        gain_ops.absorb(other := copy.deepcopy(other))
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_zero_and_negative_gains(tmp_path):
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(), "llama", llama_fields(model.config), "Q4_0")
    model = load(base)
    gain(model, tmp_path / "gains.safetensors")
    for layer in gained_modules(model).values():
        layer.delta.data[:7] = -1
        layer.delta.data[7:14] = -2
    save_gains(model, tmp_path / "gains.safetensors")
    absorb(base, tmp_path / "absorbed.gguf", read_gains(tmp_path / "gains.safetensors"))
    before, after = load(base).state_dict(), load(tmp_path / "absorbed.gguf").state_dict()
    for name in gained_modules(model):
        assert not after[f"{name}.weight"][:7].any()
        assert torch.equal(after[f"{name}.weight"][7:14], -before[f"{name}.weight"][7:14])


def test_only_scales_change(tmp_path):
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(), "llama", llama_fields(model.config), "Q4_1")
    gains = gain(load(base), tmp_path / "gains.safetensors")
    absorb(base, tmp_path / "absorbed.gguf", gains)
    old, new = (np.fromfile(path, np.uint8) for path in (base, tmp_path / "absorbed.gguf"))
    checkpoint = open_gguf(base)
    edits = checkpoint.edits(gains, requantize=False, check_base=True)
    scales = np.zeros(len(old), bool)
    for edit in edits:
        size = edit.region.rows * edit.region.row_bytes
        scales[edit.region.offset : edit.region.offset + size].reshape(-1, 20)[:, :4] = True
    assert not (old != new)[~scales].any()
    assert (old != new)[scales].mean() > 0.3
    assert checkpoint.describe(edits[1]) == "Q4_1 [96, 160]"


@pytest.mark.parametrize(
    ("kind", "side", "targets"),
    [
        ("Q4_1", "input", ["o_proj"]),
        ("Q8_0", "input", ["o_proj"]),
        ("MXFP4", "input", "gain-ffn"),
        ("MXFP4", "output", "gain-ffn"),
    ],
)
def test_requantising_what_no_scale_can_take(tmp_path, kind, side, targets):
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(), "llama", llama_fields(model.config), kind)
    model = load(base)
    gains = gain(model, tmp_path / "gains.safetensors", targets, side)
    with pytest.raises(CheckpointError, match=f"on the {side} side exactly.*--requantize, or absorb into an F16"):
        open_gguf(base).edits(gains, requantize=False, check_base=True)
    rounding = absorb(base, tmp_path / "absorbed.gguf", gains, requantize=True)

    absorbed = load(tmp_path / "absorbed.gguf").state_dict()
    worst = 0.0
    for name, layer in gained_modules(model).items():
        factor = layer.gain[:, None] if side == "output" else layer.gain
        product = (layer.weight * factor).detach().numpy()
        type_ = gguf.GGMLQuantizationType[kind]
        expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(product, type_), type_))
        assert torch.equal(absorbed[f"{name}.weight"], expected)
        exact = layer.weight.double() * factor.double()
        worst = max(worst, (expected.double() - exact).abs().max().item())
    assert rounding.absolute == worst > 0


def test_a_split_file(tmp_path):
    model = tiny_llama()
    single = write_model(tmp_path / "single.gguf", model, "llama", llama_fields(model.config), "Q4_1")
    write_model(tmp_path / "m.gguf", model, "llama", llama_fields(model.config), "Q4_1", split_max_tensors=5)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 5
    gains = gain(load(single), tmp_path / "gains.safetensors")
    (tmp_path / "out").mkdir()
    absorb(shards[1], tmp_path / "out", gains)
    absorb(single, tmp_path / "absorbed.gguf", gains)
    assert open_gguf(shards[2]).files == tuple(shards)
    expected = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "absorbed.gguf").tensors}
    found = {t.name: t.data for shard in shards for t in gguf.GGUFReader(tmp_path / "out" / shard.name).tensors}
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        np.testing.assert_array_equal(found[name], data)

    shards[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"part of a split file, of which m-00003-of-00005\.gguf are missing"):
        open_gguf(shards[0])
    with pytest.raises(CheckpointError, match="part of a split file under another name"):
        open_gguf(tmp_path / "elsewhere.gguf")


# Names and orders

NAMES = [
    ("llama", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
    ("llama", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"),
    ("llama", "module.model.layers.1.self_attn.o_proj", "module.model.layers.1.mlp.down_proj"),  # DDP's
    ("gemma3", "model.language_model.layers.1.self_attn.o_proj", "model.language_model.layers.1.mlp.down_proj"),
    ("qwen2vl", "language_model.model.layers.1.self_attn.o_proj", "language_model.model.layers.1.mlp.down_proj"),
    *(
        (name, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
        for name in ("qwen2", "qwen3", "gemma2")
    ),
    *(
        (name, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
        for name in ("phi3", "command-r", "olmo2")
    ),
    ("starcoder2", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.c_proj"),
    ("phi2", "model.layers.1.self_attn.dense", "model.layers.1.mlp.fc2"),
    ("gpt2", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"),
    ("gptneox", "gpt_neox.layers.1.attention.dense", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    ("bloom", "transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"),
    ("falcon", "transformer.h.1.self_attention.dense", "transformer.h.1.mlp.dense_4h_to_h"),
    ("mpt", "transformer.blocks.1.attn.out_proj", "transformer.blocks.1.ffn.down_proj"),
]


@pytest.mark.parametrize(("architecture", "attention", "down"), NAMES)
def test_the_names_of_the_presets(tmp_path, architecture, attention, down):
    tensors = {"blk.1.attn_output.weight": ("Q8_0", 4, 64), "blk.1.ffn_down.weight": ("Q8_0", 4, 96)}
    checkpoint = open_gguf(write_tensors(tmp_path / "a.gguf", architecture, tensors))
    gains = file_of_gains({attention: 4, down: 4})
    edits = checkpoint.edits(gains, requantize=False, check_base=True)
    assert [(edit.layer, edit.tensor) for edit in edits] == list(zip((attention, down), tensors, strict=True))


def test_an_order_that_is_not_known_needs_a_fingerprint(tmp_path):
    tensors = {f"blk.0.{leaf}.weight": ("F16", 32, 32) for leaf in ("attn_q", "attn_output")}
    layer = "model.layers.0.self_attn.q_proj"
    path = write_tensors(tmp_path / "qwen2.gguf", "qwen2", tensors)
    gains = file_of_gains({layer: 32})
    with pytest.raises(
        CheckpointError, match=r"q_proj may have its features in another order in blk\.0\.attn_q\.weight"
    ):
        open_gguf(path).edits(gains, requantize=False, check_base=True)

    linear = torch.nn.Linear(32, 32)
    linear.weight.data = torch.from_numpy(gguf.GGUFReader(path).tensors[0].data.astype(np.float32))
    known = dataclasses.replace(gains, fingerprints={layer: gain_ops.models.files.fingerprint(linear)})
    (edit,) = open_gguf(path).edits(known, requantize=False, check_base=True)
    assert edit.tensor == "blk.0.attn_q.weight"
    with pytest.raises(CheckpointError, match="in another order"):
        open_gguf(path).edits(known, requantize=False, check_base=False)

    plamo = write_tensors(tmp_path / "plamo.gguf", "plamo", tensors)
    output = file_of_gains({"model.layers.0.self_attn.o_proj": 32})
    open_gguf(plamo).edits(output, requantize=False, check_base=True)
    with pytest.raises(CheckpointError, match="in another order"):
        open_gguf(plamo).edits(on_the_input_side(output), requantize=False, check_base=True)


def test_queries_need_the_number_of_heads(tmp_path):
    gains = file_of_gains({"model.layers.0.self_attn.k_proj": 32})
    tensors = {"blk.0.attn_k.weight": ("F32", 32, 64)}
    path = write_tensors(tmp_path / "a.gguf", "llama", tensors, **{"attention.head_count_kv": [2, 4]})
    with pytest.raises(CheckpointError, match="an order by heads, and the file does not say how many"):
        open_gguf(path).edits(gains, requantize=False, check_base=False)
    path = write_tensors(
        tmp_path / "b.gguf", "llama", tensors, **{"attention.head_count": 2}
    )  # as many keys as queries
    (edit,) = open_gguf(path).edits(gains, requantize=False, check_base=False)
    assert edit.tensor == "blk.0.attn_k.weight"


# What is refused


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    tensors = {
        "blk.0.attn_output.weight": ("F16", 32, 64),
        "blk.0.ffn_down.weight": ("Q4_K", 32, 256),
        "blk.1.ffn_down.weight": ("F32", 2, 32, 64),
        "token_embd.weight": ("F32", 64, 32),
    }
    layers = {"lm_head": 64, "model.layers.0.self_attn.o_proj": 33, "model.layers.1.mlp.down_proj": 32}
    with pytest.raises(CheckpointError) as error:
        open_gguf(write_tensors(tmp_path / "a.gguf", "llama", tensors)).edits(
            file_of_gains(layers), requantize=False, check_base=True
        )
    assert re.search(
        r"a\.gguf cannot take these gains: it has no layer lm_head \(architecture llama\): an output head that shares the "
        r"embedding's weight is not stored; model\.layers\.0\.self_attn\.o_proj takes 32 gains on the output side, the "
        r"file has 33; model\.layers\.1\.mlp\.down_proj is not a linear layer: blk\.1\.ffn_down\.weight is F32 \[2, 32, 64\]$",
        str(error.value),
    )


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize(
    ("kind", "side", "why"),
    [
        (
            "Q4_K",
            "input",
            "a block of Q4_K has one scale for 256 input features; the package gguf cannot quantise to Q4_K",
        ),
        ("I8", "output", "I8 has no scales"),
    ],
)
def test_what_can_neither_be_scaled_nor_requantised(tmp_path, kind, side, why, requantize):
    data = np.zeros((32, 32), np.int8) if kind == "I8" else random_blocks(kind, 32, 256)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("blk.0.ffn_down.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    finish(writer)
    gains = file_of_gains({"model.layers.0.mlp.down_proj": 32 if side == "output" else 256})
    gains = gains if side == "output" else on_the_input_side(gains)
    with pytest.raises(CheckpointError, match=f"{why}.*absorb into an F16 or BF16 file"):
        open_gguf(tmp_path / "a.gguf").edits(gains, requantize=requantize, check_base=True)


def test_other_weights_are_refused(tmp_path):
    base = write_model(tmp_path / "base.gguf", model := tiny_llama(), "llama", llama_fields(model.config))
    gains = gain(load(base), tmp_path / "gains.safetensors")
    quantised = write_model(tmp_path / "q.gguf", model, "llama", llama_fields(model.config), "Q4_1")
    with pytest.raises(
        CheckpointError, match=r"not those that the gains were trained on .* in 4 of 4 layers, .*with --no-check-base"
    ):
        open_gguf(quantised).edits(gains, requantize=False, check_base=True)
    assert len(open_gguf(quantised).edits(gains, requantize=False, check_base=False)) == 4


def test_a_layer_with_further_terms_is_refused(tmp_path):
    tensors = {f"blk.0.ffn_down.{end}": ("F32", 8, 32) for end in ("weight", "scale", "bias", "lora_b")}
    path = write_tensors(tmp_path / "a.gguf", "granite", tensors)
    with pytest.raises(CheckpointError, match=r"further terms, .*: blk\.0\.ffn_down\.lora_b$"):
        open_gguf(path).edits(file_of_gains({"model.layers.0.mlp.down_proj": 8}), requantize=False, check_base=True)


def test_an_overflow_names_its_layer(tmp_path):
    path = write_tensors(tmp_path / "a.gguf", "llama", {"blk.0.ffn_down.weight": ("Q8_0", 8, 32)})
    gains = file_of_gains({"model.layers.0.mlp.down_proj": 8})
    gains.deltas["model.layers.0.mlp.down_proj"][5] = 1e9
    (edit,) = open_gguf(path).edits(gains, requantize=False, check_base=True)
    edit.rewrite(edit.region.read()[:5], 0)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.down_proj: scales of its Q8_0 blocks overflow"):
        edit.rewrite(edit.region.read()[5:], 5)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    whole = write_tensors(tmp_path / "whole.gguf", "llama", {"blk.0.ffn_down.weight": ("Q8_0", 64, 64)})
    content = whole.read_bytes()

    def refused(data, match):
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=match):
            open_gguf(tmp_path / "bad.gguf")

    for end in (0, 3, 10, 30, 60, len(content) // 2, len(content) - 33):
        refused(content[:end], r"bad\.gguf is not a whole GGUF file")
    refused(b"version https://git-lfs.github.com/spec/v1\n", "is not a whole GGUF file")
    refused(
        content.replace(b"llama", b"mamma"), r"no language model that the installed gguf knows \(architecture mamma\)"
    )
    refused(content.replace(b"llama", b"ll\xffma", 1), r"no language model .* \(architecture ll\ufffdma\)")

    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", 1)
    finish(writer)
    with pytest.raises(CheckpointError, match="the other byte order"):
        open_gguf(tmp_path / "big.gguf")

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'needs the package gguf: pip install "gain-ops\[cli\]"'):
        open_gguf(whole)


# A real model, in independent readers

# "The quick brown fox jumps over the lazy dog, and the dog does not mind. It was a bright cold day"
TEXT = torch.tensor(
    [
        [
            504,
            2365,
            6354,
            16438,
            27003,
            690,
            260,
            23790,
            2767,
            28,
            284,
            260,
            2767,
            1072,
            441,
            1945,
            30,
            657,
            436,
            253,
            5681,
            4011,
            1194,
        ]
    ]
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M's file, the file with gains absorbed, and on TEXT: the base's logits, and the model with the gains."""
    from gain_ops.checkpoints.absorb import absorb
    from gain_ops.checkpoints.plan import plan

    folder = tmp_path_factory.mktemp("smollm2")
    base = bundled_model()
    model = load(base)
    before = logits(model, TEXT)
    gain(model, folder / "gains.safetensors", spread=0.05)
    report = absorb(plan(base, folder / "gains.safetensors"), folder / "absorbed")
    assert report.layers == 60
    assert 2**-12 < report.rounding.relative <= 2**-11 * 1.001
    return base, folder / "absorbed" / base.name, before, model


@pytest.mark.slow
def test_transformers_reads_an_absorbed_smollm2_as_the_gained_model(smollm2):
    base, absorbed, before, gained = smollm2
    assert absorbed.stat().st_size == base.stat().st_size
    found, truth = logits(load(absorbed), TEXT), logits(gained, TEXT)
    assert_no_worse_than_torch("logits", found, logits(folded(gained, base), TEXT), truth)
    assert relative_error(before, truth) > 20 * relative_error(found, truth)


@pytest.mark.slow
def test_llama_cpp_reads_an_absorbed_smollm2_as_the_gained_model(smollm2):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base, absorbed, before, gained = smollm2

    def by_llama_cpp(path):
        model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
        model.eval(TEXT[0].tolist())
        return torch.from_numpy(np.array(model.scores[: TEXT.numel()]))[None]

    # It rounds activations to eight bits, so that it differs from transformers on the base already.
    found, truth = by_llama_cpp(absorbed), logits(gained, TEXT)
    assert relative_error(found, truth) <= 2 * relative_error(by_llama_cpp(base), before)
    assert relative_error(before, truth) > 3 * relative_error(found, truth)
