"""Writes docs/architectures.md: what works on a tiny model of every architecture of the installed transformers.

    python tests/list_architectures.py              all of them, some three minutes
    python tests/list_architectures.py NAME ...     prints the rows of these

Each cell is measured: a model with random gains must move, train every gain, and compute the same once they are absorbed.
tests/models/test_architecture_table.py holds the committed page to this.
"""

import contextlib
import copy
import functools
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
COLUMNS = ("gain", "gain-ffn", "input side", "fused MLP", "absorbed", "absorbed on disk")
YES = "yes"

# What a refusal says, and the words of a cell for it.
_REFUSALS = {
    r"no attention output projection found": "no attention found",
    r"no FFN down projection found": "no FFN found",
    r"no layout of experts": "other experts",
    r"has gains of experts": "experts in memory",
    r"would be ignored": "not called",
    r"fuse_mlp cannot serve|fuse_mlp found no FFN": "other FFN",
    r"does not know the activation": "other activation",
    r"returns a tuple|is called with|delta must be": "other linear map",
    r"it has no layer|no tensor": "other names on disk",
    r"Class validation error": "tiny one not loaded",
}

_HEAD = """\
# Architectures

Measured on a tiny random model of every architecture of {versions}, by `tests/list_architectures.py`.
Of {built} that could be built, {served} take the gains of the preset `"gain"`.

- **gain**, **gain-ffn**: the preset finds its gains; they change nothing at delta = 0, and move the output when drawn.
- **input side**, **absorbed**, **absorbed on disk**: the gains of gain-ffn, or of gain where gain-ffn is refused.
- On disk, models that generate text were tried.
- **fused MLP**: gain-ffn on the input side with `fuse_mlp=True`.

Other words than yes say why a way is refused:
no such projection was found; the layout of the experts is not known (other experts), or their gains are absorbed in
memory alone (experts in memory); the model computes from a projection without calling it
(not called); an FFN or an activation is not known; a linear map takes or returns more than one tensor.
A tiny config may fail the model's own checks when it is loaded again (tiny one not loaded).
A dash stands where nothing was left to try.
Where a tiny model was saved without gains and transformers loaded other weights again, nothing can be compared (plain one
not reloaded); where the maps with a gain get only zeros on a CPU (MRA, whose attention is a CUDA kernel), nothing can move.
"No effect" and "other output" are no refusals, and open: drawn gains did not move the tiny model, or its output differed.
"""


ENDLESS = ("vits",)  # a gain on the durations that it predicts makes minutes of speech


class Wrong(Exception):
    """A result that is not that of the gains."""


def row(model_type: str) -> list[str] | None:
    """The cells of an architecture, or None where no tiny model of it can be built."""
    from support.tiny_architectures import CannotBuild, build, quiet

    try:
        if model_type in ENDLESS:
            return None
        model, inputs = build(model_type)
    except CannotBuild:
        return None
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        cells = {
            "gain": _cell(lambda: _moves(model, inputs, "gain")),
            "gain-ffn": _cell(lambda: _moves(model, inputs, "gain-ffn")),
        }
        targets = next((name for name in ("gain-ffn", "gain") if cells[name] == YES), None)
        ways: dict[str, Callable[[str], None]] = {
            "input side": lambda targets: _moves(model, inputs, targets, side="input"),
            "fused MLP": lambda targets: _moves(model, inputs, "gain-ffn", side="input", fuse_mlp=True),
            "absorbed": lambda targets: _absorbs(model, inputs, targets),
            "absorbed on disk": lambda targets: _absorbs_on_disk(model, inputs, targets),
        }
        for name, way in ways.items():
            usable = targets == "gain-ffn" or (targets is not None and name != "fused MLP")
            usable &= name != "absorbed on disk" or model.can_generate()
            cells[name] = _cell(functools.partial(way, str(targets))) if usable else "-"
    return [cells[name] for name in COLUMNS]


def _cell(way: Callable[[], None]) -> str:
    try:
        way()
    except Wrong as error:
        return str(error)
    except Exception as error:  # whatever a model or a refusal raises is what the cell says
        text = str(error)
        return next(
            (words for said, words in _REFUSALS.items() if re.search(said, text)),
            f"{type(error).__name__}: {text[:90]}",
        )
    return YES


def _moves(model: nn.Module, inputs: dict[str, Any], targets: str, **options: Any) -> None:
    """The gains leave the model as it is at delta = 0, and move it when they are drawn; remove() undoes them."""
    plain = _outputs(model, inputs)
    with _gained(model, targets, **options) as draw:
        _same(plain, _outputs(model, inputs), "at delta = 0")
        draw()
        if all(torch.equal(a, b) for a, b in zip(plain, _outputs(model, inputs), strict=True)):
            raise Wrong("only zeros there" if _get_zeros(model, inputs) else "no effect")
    _same(plain, _outputs(model, inputs), "after remove()")


def _get_zeros(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the linear maps with a gain get nothing but zeros: MRA computes its attention by a CUDA kernel alone."""
    gained = [module for module in model.modules() if hasattr(module, "delta")]
    seen: list[bool] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(not args[0].any())) for m in gained]
    _outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return bool(seen) and all(seen)


def _absorbs(model: nn.Module, inputs: dict[str, Any], targets: str) -> None:
    import gain_ops

    other = copy.deepcopy(model)
    with _gained(other, targets, kept=True) as draw:
        draw()
        gained = _outputs(other, inputs)
        gain_ops.absorb(other)
        _same(gained, _outputs(other, inputs), "absorbed")


def _absorbs_on_disk(model: nn.Module, inputs: dict[str, Any], targets: str) -> None:
    import gain_ops
    from gain_ops.checkpoints.absorb import absorb
    from gain_ops.checkpoints.plan import plan

    with tempfile.TemporaryDirectory() as folder, _gained(copy.deepcopy(model), targets, kept=True) as draw:
        base, file, out = Path(folder, "base"), Path(folder, "g.safetensors"), Path(folder, "out")
        model.save_pretrained(base)
        draw()
        gained = _outputs(draw.model, inputs)
        gain_ops.save_gains(draw.model, file)
        absorb(plan(base, file), out, verified=False)
        try:
            _same(gained, _reloaded(model, out, inputs), "absorbed on disk")
        except Wrong as error:
            try:
                _same(_outputs(model, inputs), _reloaded(model, base, inputs), "")
            except Wrong:
                raise Wrong("plain one not reloaded") from error
            raise


def _reloaded(model: nn.Module, folder: Path, inputs: dict[str, Any]) -> list[torch.Tensor]:
    return _outputs(type(model).from_pretrained(folder).float().eval(), inputs)


class _Draw:
    """Draws the gains of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if name.endswith("delta") and parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@contextlib.contextmanager
def _gained(model: nn.Module, targets: str, *, kept: bool = False, **options: Any) -> Iterator[_Draw]:
    import gain_ops

    gain_ops.apply(model, targets, **options)
    try:
        yield _Draw(model)
    finally:
        if not kept:
            gain_ops.remove(model)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    output = model(**inputs)
    leaves = tree_leaves(output if isinstance(output, tuple | dict | torch.Tensor) else vars(output))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _same(expected: list[torch.Tensor], results: list[torch.Tensor], when: str) -> None:
    for one, other in zip(expected, results, strict=True):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise Wrong(f"other output {when}")


def rows(names: list[str], workers: int = 1) -> dict[str, list[str] | None]:
    """The rows of some architectures."""
    if workers == 1:
        return {name: row(name) for name in names}
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return dict(zip(names, pool.map(row, names, chunksize=8), strict=True))


def header() -> str:
    """The versions that the page is of."""
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def line(name: str, cells: list[str]) -> str:
    """A row as Markdown."""
    return f"| `{name}` | {' | '.join(cells)} |"


def page(found: dict[str, list[str] | None]) -> str:
    """The whole page."""
    built = {name: cells for name, cells in found.items() if cells is not None}
    served = sum(cells[0] == YES for cells in built.values())
    left = ", ".join(f"`{name}`" for name, cells in found.items() if cells is None)
    head = _HEAD.format(versions=header(), built=len(built), served=served)
    table = [f"| model_type | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    table += [line(name, cells) for name, cells in built.items()]
    return "\n".join((head, *table, "", f"Not tried, since no tiny model of it could be built here: {left}.", ""))


def main() -> None:
    """Write the page, or print some rows."""
    from support.tiny_architectures import model_types

    if sys.argv[1:]:
        print("\n".join(line(name, cells or ["not built"]) for name, cells in rows(sys.argv[1:]).items()))
    else:
        PAGE.write_text(page(rows(model_types(), workers=2)), encoding="utf-8")


if __name__ == "__main__":
    main()
