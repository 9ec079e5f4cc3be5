"""Checkpoints in safetensors: what is read of them, which edits they ask for, and what is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gain_ops.checkpoints.edits import CheckpointError, Edit, InexactError, Layer
from gain_ops.checkpoints.formats import sampling
from gain_ops.checkpoints.formats.headers import read_header
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.gainfiles.file import read_gains
from gain_ops.models.files import fingerprint

from support.small_checkpoints import fingerprint_of, save_folder, save_gain_file

O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"
TIE = {"vocab_size": 12, "tie_word_embeddings": True}


def _edits(
    path: Path, deltas: dict[str, Tensor], *, side: str = "output", check_base: bool = False, requantize: bool = False
) -> list[Edit]:
    gains = read_gains(save_gain_file(path.parent / "g.safetensors", deltas, side=side))
    return SafetensorsCheckpoint(path).edits(gains, requantize=requantize, check_base=check_base)


def _folder(path: Path, **tensors: Tensor) -> Path:
    """One shard with an o_proj [4, 6] of the tensors given: weight=..., bias=..."""
    return save_folder(path, [{f"{O_PROJ}.{name}": tensor for name, tensor in tensors.items()}])


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]),
        min_size=6,
        max_size=6,
    ),
)
def test_a_header_says_where_every_tensor_is(tmp_path_factory: pytest.TempPathFactory, shapes, dtypes):
    file = tmp_path_factory.mktemp("header") / "a.safetensors"
    tensors = {
        f"t{number}": torch.randint(0, 2, shape).to(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    save_file(tensors, file, metadata={"format": "pt", "of": "hypothesis"})
    header = read_header(file)
    assert header.metadata == {"format": "pt", "of": "hypothesis"}
    assert header.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = header.entries[name].stored()
        assert stored.dtype == tensor.dtype
        if tensor.numel():
            assert torch.equal(stored.read().flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
            assert stored.read().shape == tensor.shape
        rows = torch.cat([piece.read() for _, piece in stored.region.blocks(5)] or [torch.empty(0)])
        assert rows.numel() == tensor.numel() * tensor.itemsize
        starts = [start for start, _ in stored.region.blocks(5)]
        assert starts == sorted(set(starts))


@pytest.mark.parametrize("shape", [(4, 6), (64, 64), (65, 64), (97, 331), (3000, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("near", [0, 4096], ids=["value by value", "all at once"])
def test_the_fingerprint_of_a_file_is_that_of_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype, near: int
):
    monkeypatch.setattr(sampling, "_NEAR", near)
    weight = torch.randn(shape).to(dtype)
    stored = (
        read_header(_folder(tmp_path / "m", weight=weight) / "model.safetensors").entries[f"{O_PROJ}.weight"].stored()
    )
    assert sampling.fingerprint({"weight": stored}) == fingerprint_of(weight)


def test_a_file_that_was_cut_after_its_header_was_read_has_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = _folder(tmp_path / "m", weight=torch.ones(97, 331)) / "model.safetensors"
    stored = read_header(file).entries[f"{O_PROJ}.weight"].stored()
    os.truncate(file, file.stat().st_size - 1000)
    for near in (0, 4096):
        monkeypatch.setattr(sampling, "_NEAR", near)
        with pytest.raises(CheckpointError, match="it is cut"):
            sampling.fingerprint({"weight": stored})


def test_the_fingerprint_of_many_tensors_is_that_of_the_module(tmp_path: Path):
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(8))
            self.register_buffer("qweight", torch.randint(-9, 9, (700, 60), dtype=torch.int32))
            self.register_buffer("few", torch.tensor(3))

    module = Packed()
    folder = _folder(tmp_path / "m", **dict(module.named_buffers()))
    entries = read_header(folder / "model.safetensors").entries
    tensors = {name: entries[f"{O_PROJ}.{name}"].stored() for name in ("few", "qweight", "scale")}
    assert sampling.fingerprint(tensors) == fingerprint(module)


def test_what_is_copied_and_what_is_not(tmp_path: Path):
    folder = save_folder(tmp_path / "m", [{f"{O_PROJ}.weight": torch.ones(4, 6)}, {"a.weight": torch.ones(2, 2)}])
    for name in (".gitattributes", ".cache/x", "checkpoint-50/model.safetensors", "__pycache__/m.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "adapter_config.json",  # PEFT's, whose weights are not copied either
        "adapter_model.safetensors",
        "model.gguf",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
    ):
        (folder / name).touch()
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "model.safetensors").touch()
    (folder / "linked.txt").symlink_to(folder / "tokenizer.json")
    copied = {str(file.relative_to(folder)) for file in SafetensorsCheckpoint(folder).files}
    assert copied == {
        "2_Dense/model.safetensors",
        "config.json",
        "extra/chat.jinja",
        "linked.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }


def test_of_a_bare_file_only_that_is_copied(tmp_path: Path):
    folder = _folder(tmp_path / "m", weight=torch.ones(4, 6))
    checkpoint = SafetensorsCheckpoint(folder / "model.safetensors")
    assert checkpoint.files == (folder / "model.safetensors",)
    assert checkpoint.root == folder


def test_a_relative_path_gives_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = _folder(tmp_path / "m", weight=torch.ones(4, 6))
    monkeypatch.chdir(tmp_path)
    checkpoint = SafetensorsCheckpoint(Path("m"))
    assert checkpoint.root == folder
    assert all(file.is_absolute() for file in checkpoint.files)
    assert {edit.region.file for edit in _edits(Path("m"), {O_PROJ: torch.zeros(4)})} <= set(checkpoint.files)


def test_an_edit_names_layer_and_tensor_and_describes_it(tmp_path: Path):
    folder = save_folder(tmp_path / "m", [{f"{O_PROJ.removeprefix('model.')}.weight": torch.ones(4, 6).bfloat16()}])
    (edit,) = _edits(folder, {O_PROJ: torch.zeros(4)})
    assert (edit.layer, edit.tensor) == (O_PROJ, "layers.0.self_attn.o_proj.weight")
    assert SafetensorsCheckpoint(folder).describe(edit) == "BF16 [4, 6]"


def test_gains_of_the_other_side_are_told_by_their_number(tmp_path: Path):
    folder = _folder(tmp_path / "m", weight=torch.ones(4, 6))
    assert _edits(folder, {O_PROJ: torch.zeros(6)}, side="input")
    with pytest.raises(CheckpointError, match="takes 4 gains on the output side, the file has 6"):
        _edits(folder, {O_PROJ: torch.zeros(6)})


@pytest.mark.parametrize(
    ("config", "leaf", "conv1d"),
    [
        ({"model_type": "gpt2"}, "c_proj", True),
        ({"model_type": "gpt2"}, "lm_head", False),
        ({"model_type": "openai-gpt"}, "c_proj", True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, "c_proj", True),
        ({"model_type": "clvp", "decoder_config": {"model_type": "clvp_decoder"}}, "out_proj", False),
        ({"model_type": "starcoder2"}, "c_proj", False),
        ({"model_type": "gpt_bigcode"}, "c_proj", False),
    ],
)
def test_the_architecture_says_what_is_a_conv1d_also_for_a_square_weight(
    tmp_path: Path, config, leaf: str, conv1d: bool
):
    name, weight, delta = f"transformer.h.0.attn.{leaf}", torch.randn(5, 5), torch.randn(5)
    folder = save_folder(tmp_path / "m", [{f"{name}.weight": weight}], config)
    (edit,) = _edits(folder, {name: delta})
    rows, _ = edit.rewrite(edit.region.read(), 0)
    gain = 1 + delta
    assert torch.equal(rows.view(torch.float32), weight * (gain if conv1d else gain[:, None]))


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_a_square_weight_that_code_of_its_own_may_use_as_a_conv1d_is_refused(tmp_path: Path, where: tuple[str, ...]):
    config: dict[str, object] = {"model_type": "btlm", "auto_map": {"AutoModel": "modeling.BTLM"}}
    for key in where:
        config = {key: config}
    square, wide, other = "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.o_proj"
    tensors = {square: torch.ones(5, 5), wide: torch.ones(5, 8), other: torch.ones(5, 5)}
    folder = save_folder(tmp_path / "m", [{f"{name}.weight": weight for name, weight in tensors.items()}], config)
    assert len(_edits(folder, {wide: torch.zeros(5), other: torch.zeros(5)})) == 2
    with pytest.raises(
        CheckpointError, match=r"attn\.c_proj is square, .*auto_map in .*config\.json.*gain_ops\.absorb"
    ):
        _edits(folder, {square: torch.zeros(5)})


def test_without_a_config_a_possible_conv1d_is_refused(tmp_path: Path):
    folder = save_folder(tmp_path / "m", [{"h.0.mlp.c_proj.weight": torch.ones(5, 5)}])
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"may be stored as \[in, out\].*config\.json"):
        _edits(folder / "model.safetensors", {"h.0.mlp.c_proj": torch.zeros(5)})


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (TIE, True),
        ({"text_config": TIE}, True),
        ({"vocab_size": 12}, True),
        (TIE | {"tie_word_embeddings": False}, False),
    ],
)
def test_an_output_head_that_may_be_the_embedding_is_refused(tmp_path: Path, config, tied: bool):
    folder = save_folder(tmp_path / "m", [{"lm_head.weight": torch.ones(12, 4)}], config)
    if not tied:
        assert len(_edits(folder, {"lm_head": torch.zeros(12)})) == 1
        return
    with pytest.raises(CheckpointError, match=r"lm_head may share the embedding's weight.*tie_word_embeddings"):
        _edits(folder, {"lm_head": torch.zeros(12)})


def test_an_output_head_that_is_not_stored_is_said_to_be_tied(tmp_path: Path):
    folder = save_folder(tmp_path / "m", [{"model.embed_tokens.weight": torch.ones(12, 4)}], TIE)
    with pytest.raises(CheckpointError, match=r"no layer lm_head.*shares the embedding's weight is not stored"):
        _edits(folder, {"lm_head": torch.zeros(12)})


def test_all_that_does_not_fit_is_said_at_once(tmp_path: Path):
    folder = save_folder(
        tmp_path / "m",
        [
            {
                f"{O_PROJ}.weight": torch.ones(4, 6),
                f"{DOWN}.weight": torch.ones(4, 6),
                f"{DOWN}.weight_scale": torch.ones(1),
            }
        ],
    )
    gone = {f"model.layers.{number}.mlp.down_proj": torch.zeros(4) for number in range(1, 8)}
    with pytest.raises(CheckpointError) as caught:
        _edits(folder, {O_PROJ: torch.zeros(5), DOWN: torch.zeros(4), **gone})
    assert "no layer model.layers.1.mlp.down_proj, " in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert f"{O_PROJ} takes 4 gains" in str(caught.value)
    assert f"{DOWN} is not a plain linear layer: it has weight float32 [4, 6], weight_scale" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"weight": torch.ones(4, 6, dtype=torch.int8)}, "weight int8"),
        ({"weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}, "weight_scale float32"),
        ({"weight": torch.ones(4, 6), "delta": torch.ones(4)}, "delta float32"),
        ({"weight": torch.ones(24)}, r"weight float32 \[24\]"),
        ({"qweight": torch.ones(4, 6, dtype=torch.int32)}, "qweight int32"),
    ],
)
def test_what_is_not_plain_and_has_no_quantization_config_is_refused(tmp_path: Path, tensors, found: str):
    with pytest.raises(CheckpointError, match=rf"not a plain linear layer: it has .*{found}"):
        _edits(_folder(tmp_path / "m", **tensors), {O_PROJ: torch.zeros(4)})


@pytest.mark.parametrize("where", [(), ("text_config",)])
@pytest.mark.parametrize(("exact", "asked"), [(True, False), (True, True), (False, True)])
def test_quantised_layers_go_to_their_scheme_and_others_stay_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[str, ...], exact: bool, asked: bool
):
    calls = []

    def edits(config: object, metadata: object, layer: Layer, *, requantize: bool) -> list[Edit]:
        calls.append((config, metadata, layer.name, layer.side, sorted(layer.tensors), layer.gain.tolist(), requantize))
        if not (exact or requantize):
            raise InexactError("its scales cannot")
        tensor = layer.tensors["weight_scale"]
        return [Edit(layer.name, tensor.name, tensor.region, lambda block, start: (block, None))]

    scheme = ModuleType("gain_ops.checkpoints.schemes")
    scheme.edits = edits
    monkeypatch.setitem(sys.modules, scheme.__name__, scheme)
    monkeypatch.setattr("gain_ops.checkpoints.schemes", scheme, raising=False)
    config: dict[str, object] = {"quantization_config": {"quant_method": "fp8"}}
    for key in where:
        config = {key: config}
    packed = {"weight": torch.ones(4, 6).to(torch.float8_e4m3fn), "weight_scale": torch.ones(4, 1)}
    tensors = {f"{O_PROJ}.{name}": tensor for name, tensor in packed.items()} | {f"{DOWN}.weight": torch.ones(4, 6)}
    folder = save_folder(tmp_path / "m", [tensors], config)
    found = _edits(folder, {O_PROJ: torch.ones(4), DOWN: torch.zeros(4)}, requantize=asked)
    assert [edit.tensor for edit in found] == [f"{O_PROJ}.weight_scale", f"{DOWN}.weight"]
    tensors_given = ["weight", "weight_scale"]
    fp8 = {"quant_method": "fp8"}
    given = (fp8, {"format": "pt"}, O_PROJ, "output", tensors_given, [2.0] * 4)
    assert calls == [(*given, False), *([] if exact else [(*given, True)])]


BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize(
    ("quantization", "layer", "anew"),
    [
        (BITNET, O_PROJ, True),
        (BITNET | {"modules_to_not_convert": ["lm_head"]}, O_PROJ, True),
        (BITNET | {"modules_to_not_convert": ["o_proj"]}, O_PROJ, False),
        (BITNET | {"modules_to_not_convert": ["model.layers.0"]}, O_PROJ, False),
        (BITNET | {"modules_to_not_convert": ["model.layers.*.self_attn"]}, O_PROJ, False),
        (BITNET | {"modules_to_not_convert": ["model.layers.0.self"]}, O_PROJ, True),
        (BITNET, "lm_head", False),
        (BITNET | {"modules_to_not_convert": None}, "lm_head", False),
        (BITNET | {"modules_to_not_convert": []}, "lm_head", True),
        (BITNET | {"modules_to_not_convert": ["o_proj"]}, "lm_head", True),
        (BITNET | {"quantization_mode": "offline"}, O_PROJ, False),
        ({"quant_method": "fouroversix", "keep_master_weights": True}, O_PROJ, True),
        ({"quant_method": "fouroversix", "keep_master_weights": False}, O_PROJ, False),
        ({"quant_method": "fp_quant", "store_master_weights": True}, O_PROJ, True),
        ({"quant_method": "fp8"}, O_PROJ, False),
    ],
)
def test_plain_weights_that_the_forward_quantises_are_refused(
    tmp_path: Path, quantization: dict[str, object], layer: str, anew: bool, side: str, requantize: bool
):
    config = {"tie_word_embeddings": False, "quantization_config": quantization}
    folder = save_folder(tmp_path / "m", [{f"{layer}.weight": torch.ones(4, 4)}], config)
    if not anew:
        assert len(_edits(folder, {layer: torch.zeros(4)}, side=side, requantize=requantize)) == 1
        return
    why = rf"{layer} is quantised again by its forward \({quantization['quant_method']}\).*keep the gain file"
    with pytest.raises(CheckpointError, match=why):
        _edits(folder, {layer: torch.zeros(4)}, side=side, requantize=requantize)


def test_another_base_is_told_by_its_fingerprint(tmp_path: Path):
    weights = {O_PROJ: torch.randn(4, 6), DOWN: torch.randn(4, 9)}
    deltas = {name: torch.zeros(4) for name in weights}
    gains = read_gains(save_gain_file(tmp_path / "g.safetensors", deltas, weights=weights))
    right = save_folder(tmp_path / "right", [{f"{name}.weight": weight for name, weight in weights.items()}])
    weights[DOWN][3, 8] *= 2
    wrong = save_folder(tmp_path / "wrong", [{f"{name}.weight": weight for name, weight in weights.items()}])
    assert len(SafetensorsCheckpoint(right).edits(gains, requantize=False, check_base=True)) == 2
    assert len(SafetensorsCheckpoint(wrong).edits(gains, requantize=False, check_base=False)) == 2
    with pytest.raises(CheckpointError, match=rf"base model some-base\), in 1 of 2 layers, {DOWN}: .*--no-check-base"):
        SafetensorsCheckpoint(wrong).edits(gains, requantize=False, check_base=True)


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _lengthen(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"??")


def _cut_in_the_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")


def _header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _both(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _two_files(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{'single': 'quotes'}")


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _dangling(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "blobs" / "gone")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, r"model\.safetensors ends 1 bytes early: it is cut; fetch it again"),
        (_lengthen, "is 2 bytes too long"),
        (_cut_in_the_header, "is not a safetensors file, or is cut in its header"),
        (_empty, "is not a safetensors file"),
        (_pointer, "Git LFS pointer.*git lfs pull"),
        (_header(lambda header: header[f"{O_PROJ}.weight"].pop("shape")), "damaged header"),
        (
            _header(lambda header: header[f"{O_PROJ}.weight"].update(shape=[4, 7])),
            r"takes 96 bytes, not those of F32 \[4, 7\]",
        ),
        (_header(lambda header: header[f"{O_PROJ}.weight"].update(shape=[-4, -6])), "damaged header"),
        (
            _header(lambda header: header.update(b={"dtype": "F32", "shape": [1], "data_offsets": [8, 12]})),
            r"b overlaps another tensor",
        ),
        (_pickled, r"pickles \(pytorch_model\.bin\).*save_pretrained"),
        (_both, "holds model.safetensors and model.safetensors.index.json: remove the one"),
        (_two_files, "holds 2 safetensors files and no model.safetensors.index.json"),
        (_bad_config, "config.json is not JSON"),
        (_list_config, "config.json holds list, expected an object"),
        (_dangling, "tokenizer.json is a link to nothing"),
        (_no_weights, "no weights in safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str):
    folder = _folder(tmp_path / "m", weight=torch.ones(4, 6))
    SafetensorsCheckpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(folder)


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def _exchange(weight_map: dict[str, str]) -> None:
    weight_map["a.weight"], weight_map["b.weight"] = weight_map["b.weight"], weight_map["a.weight"]


def _twice(folder: Path) -> None:
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(tensors | {"b.weight": torch.ones(2, 2)}, folder / "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
            "lacks model-00002-of-00002.safetensors",
        ),
        (_twice, "a.weight is in .*00001-of-00002.safetensors and in .*00002-of-00002.safetensors"),
        (
            _index(lambda index: index["weight_map"].update({"c.weight": "model-00001-of-00002.safetensors"})),
            "wrong about c",
        ),
        (
            _index(lambda index: index["weight_map"].update({"a.weight": "model-00002-of-00002.safetensors"})),
            "wrong about a",
        ),
        (_index(lambda index: _exchange(index["weight_map"])), r"wrong about a\.weight, b\.weight"),
        (
            _index(lambda index: index["weight_map"].update({"a.weight": "../secret.safetensors"})),
            "no weight_map to files",
        ),
        (_index(lambda index: index["weight_map"].update({"a.weight": 7})), "no weight_map to files"),
        (_index(lambda index: index.pop("weight_map")), "no weight_map to files"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "2 safetensors files and no"),
    ],
)
def test_a_damaged_sharded_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str):
    folder = save_folder(tmp_path / "m", [{"a.weight": torch.ones(2, 2)}, {"b.weight": torch.ones(2, 2)}])
    SafetensorsCheckpoint(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(folder)


def test_an_unknown_dtype_matters_only_where_a_gain_goes(tmp_path: Path):
    folder = save_folder(tmp_path / "m", [{f"{O_PROJ}.weight": torch.ones(4, 6), "a.weight": torch.ones(2, 2)}])
    _header(lambda header: header["a.weight"].update(dtype="F4", shape=[4, 8]))(folder)
    assert len(_edits(folder, {O_PROJ: torch.zeros(4)})) == 1
    with pytest.raises(CheckpointError, match=r"a\.weight has dtype F4"):
        _edits(folder, {"a": torch.zeros(2)})
