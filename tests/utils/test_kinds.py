"""What a file is, by its contents before its name."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from gain_ops.utils.kinds import kind_of, pickled

CONTENTS = {
    "gguf": b"GGUF\3\0\0\0",
    "safetensors": save({"a": torch.ones(2)}),
    "pickle": pickle.dumps({"a": 1}),
    None: b"anything else",
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["sha256-0123", "x.bin", "x.gguf", "x.safetensors", "x.GGUF"])
def test_the_contents_come_before_the_name(tmp_path: Path, kind: str | None, name: str) -> None:
    by_name = {".bin": "pickle", ".gguf": "gguf", ".safetensors": "safetensors"}
    (tmp_path / name).write_bytes(CONTENTS[kind])
    assert kind_of(tmp_path / name) == (kind or by_name.get(Path(name).suffix.lower()))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_a_pickle(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "model", _use_new_zipfile_serialization=zipped)
    assert kind_of(tmp_path / "model") == "pickle"
    assert "model is a pickle: " in str(pickled(tmp_path / "model"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["pytorch_model.bin", "config.json"], True),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], True),
        (["model.ckpt"], True),
        (["consolidated.00.pth"], True),
        (["pytorch_model.bin", "model.safetensors"], False),
        (["pytorch_model.bin", "model.safetensors.index.json"], False),
        (["pytorch_model.bin", "a.gguf"], False),
        (["training_args.bin", "optimizer.pt", "rng_state.pth"], False),
        ([], False),
    ],
)
def test_a_folder_whose_weights_are_pickles_alone(tmp_path: Path, files: list[str], said: bool) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert ("holds its weights as pickles" in (pickled(tmp_path) or "")) == said
