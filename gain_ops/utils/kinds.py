"""What a file of weights is, by its first bytes and then by its name: caches of downloads keep no extension."""

from __future__ import annotations

import re
from pathlib import Path

from gain_ops.utils.wording import some_of

__all__ = ["kind_of", "pickled"]

_PICKLES = frozenset([".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"])
_KINDS = {".gguf": "gguf", ".safetensors": "safetensors"} | dict.fromkeys(_PICKLES, "pickle")
_TRAINING = re.compile(r"(optimizer|rng_state|scaler|scheduler|training_args).*")  # pickles of transformers' Trainer
_LONGEST_HEADER = 100 << 20  # of a safetensors file, in bytes


def kind_of(file: Path) -> str | None:
    """The kind of a file: "gguf", "safetensors", "pickle", or None for anything else.

    Raises:
        OSError: it cannot be read.

    """
    with file.open("rb") as opened:
        start = opened.read(512)
    if start.startswith(b"GGUF"):
        return "gguf"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if start[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
        return "pickle"
    if start.startswith(b"PK\3\4") and b"data.pkl" in start:  # of torch.save
        return "pickle"
    return _KINDS.get(file.suffix.lower())


def pickled(path: Path) -> str | None:
    """What to say of a pickle, and of a model folder whose weights are in pickles alone; None of anything else.

    Raises:
        OSError: the file cannot be read.

    """
    what = _pickles(path)
    if what is None:
        return None
    return (
        f"{path} {what}: reading a pickle can run any code, so none is read here. Convert it with "
        'AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(other), and give the other folder'
    )


def _pickles(path: Path) -> str | None:
    if path.is_file():
        return "is a pickle" if kind_of(path) == "pickle" else None
    if not path.is_dir() or any(path.glob("*.safetensors*")) or any(path.glob("*.gguf")):
        return None
    files = [file.name for file in path.iterdir() if file.suffix in _PICKLES and not _TRAINING.fullmatch(file.name)]
    return f"holds its weights as pickles ({some_of(files)})" if files else None
