"""The bytes that one decoder block of true size moves, forward and backward, outside its matrix products and its attention.

    python -m benchmarks.suites.moved

These passes are bound by bandwidth, so their bytes are their time. "predicted" is bytes / (the copy's bandwidth * what a pass
reaches of it), with the constants of gain_ops/backends/prediction.py; what is saved for backward is counted in the same block.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from benchmarks.contestants import liger_norm, liger_swiglu, models
from benchmarks.contestants.sites import ARCHITECTURES, Architecture
from benchmarks.suites.blocks import TOKENS, VOCABULARY, Given
from gain_ops.backends import prediction
from gain_ops.measure.moved_bytes import moved_bytes
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.apply import apply
from gain_ops.planning.methods import DORA, FROZEN, IA3, IN_MODEL_DTYPE, LORA, METHODS

Put = Callable[[nn.Module], object]

LIGER = f"{FROZEN}, with Liger's RMSNorm and SwiGLU"
FOLDED = "gain-ffn, folded"


@dataclasses.dataclass(frozen=True)
class Line:
    """What one way moves and saves: bytes an element of [tokens, hidden], and how many matrix products it runs."""

    name: str
    passes: float
    products: int
    saved: float

    def milliseconds(self, architecture: Architecture, tokens: int) -> float:
        """The passes' predicted time."""
        return 1e3 * self.passes * tokens * architecture.hidden / (prediction.BYTES * prediction.PASS)


def _liger(model: nn.Module) -> None:
    model.requires_grad_(False)
    liger_norm.put(model)
    liger_swiglu.put(model)


def ways(architecture: Architecture) -> dict[str, Put]:
    """The ways to adapt a block of it, frozen ones first."""
    found: dict[str, Put] = {FROZEN: METHODS[FROZEN].put}
    gated = architecture.model_type in models.GATED
    if gated:
        found[LIGER] = _liger
    names = ("gain", "gain-ffn", "gain-ffn, lean", "gain-ffn, input side", "gain-ffn, fused", "gain-ffn, fused, lean")
    found |= {name: METHODS[name].put for name in names}
    if gated:
        found["gain, folded"] = lambda model: apply(model, "gain", fuse_residual=True)
        found[FOLDED] = lambda model: apply(model, "gain-ffn", side="mixed", fuse_mlp=True, fuse_residual=True)
    peft = (IA3, LORA, LORA + IN_MODEL_DTYPE, DORA, DORA + IN_MODEL_DTYPE)
    return found | {f"PEFT {name}": METHODS[name].put for name in peft}


def lines(architecture: Architecture, tokens: int = TOKENS) -> Iterator[Line]:
    """A line for each way, counted on the meta device at bf16."""
    element = tokens * architecture.hidden
    for name, put in ways(architecture).items():
        block, given = _block(architecture, put, tokens, "meta")
        moved = moved_bytes(_step(block, given))
        x = given.x.detach().requires_grad_()
        inputs = [part for pair in given.shared.values() for part in pair]
        saved = saved_bytes(lambda: given.through(block, x), exclude=block, inputs=inputs)  # noqa: B023 (called at once)
        yield Line(name, moved.passes / element, moved.n_products, saved.new / element)


def _block(architecture: Architecture, put: Put, tokens: int, device: str) -> tuple[nn.Module, Given]:
    model = models.build(architecture, device, layers=1, vocabulary=VOCABULARY)
    put(model)
    return models.blocks(model)[0], Given.draw(model, architecture, tokens)


def _step(block: nn.Module, given: Given) -> Callable[[], object]:
    x = given.x.detach().requires_grad_()
    return lambda: torch.autograd.grad(given.through(block, x), [x, *models.trained(block)], given.dy)


def table(architecture: Architecture, rows: Sequence[Line]) -> str:
    """Markdown."""
    frozen = rows[0].passes
    text = [
        f"| {architecture.name} block, {TOKENS} tokens, bf16 | bytes moved | / frozen | predicted ms | GEMMs | bytes saved |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        time = row.milliseconds(architecture, TOKENS)
        text.append(
            f"| {row.name} | {row.passes:.1f} | {row.passes / frozen:.2f} | {time:.2f} | {row.products} | {row.saved:.4g} |"
        )
    return "\n".join(text)


def main() -> None:
    """Print a table for each architecture; bytes are those an element of [tokens, hidden]."""
    for name in ("Llama-3-8B", "GPT-2 Large"):
        architecture = ARCHITECTURES[name]
        print(table(architecture, list(lines(architecture))), end="\n\n")


if __name__ == "__main__":
    main()
