"""What a linear map of a model is: an attention output projection, an FFN down projection, a mixer's output, or another.

Two sources say it, in this order. The tensor-parallel plan of the model's config (``base_model_tp_plan``) names the
row-parallel projections. Names and shapes say the rest: a projection has a usual name, and leads back to the width that its
layer works at. No architecture needs an entry of its own.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from gain_ops.layers.linears import sizes
from gain_ops.models.parts import Part

ATTENTION, DOWN, MIXER = "attention output", "FFN down", "mixer output"

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(
    r"mamba|linear_?att|lightning|delta_?(net|att|rule)|recurrent_?block|rg_?lru|short_?conv|retention|rwkv|lstm",
    re.IGNORECASE,
)
_FFN = re.compile(r"mlp|ffn|feed_?forward|expert", re.IGNORECASE)
_ATTENTION_LEAF = re.compile(
    r"c_proj|dense|linear_proj|o|o_b_proj|o_proj|out_lin|out_proj|output_proj|proj|to_out|wo", re.IGNORECASE
)
_DOWN_LEAF = re.compile(
    r"c_proj|dense|dense_4h_to_h|down_proj|fc2|fc_out|ffn_output|lin2|linear2|linear_fc2|output_dense|output_linear"
    r"|proj_down|w2|wo",
    re.IGNORECASE,
)
_MIXER_LEAF = re.compile(r"dense|linear_out|o_proj|out_proj|output_proj", re.IGNORECASE)


@dataclass(frozen=True)
class Linear:
    """A linear map, its name in the model, and the module that holds it."""

    name: str
    module: nn.Module
    parent: nn.Module

    @property
    def features(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return cast(tuple[int, int], sizes(self.module))


@dataclass(frozen=True)
class Recognised:
    """A projection with what it is; ``fits`` is false where its name says so and its shape does not."""

    linear: Linear
    kind: str
    fits: bool


def recognise(part: Part, linears: Sequence[Linear]) -> list[Recognised]:
    """The projections of the three kinds among the linear maps of a part, in their order."""
    plan = _row_parallel(part.config)
    named = [(linear, named_kind(linear)) for linear in linears]
    width = _width(part, [linear for linear, kind in named if kind is not None])
    blocks = _blocks(linears)
    found = []
    for linear, kind in named:
        if linear.features[1] == width and any(ends_in(pattern, linear.name) for pattern in plan):
            found.append(Recognised(linear, kind or (ATTENTION if _in_attention(linear) else DOWN), True))
        elif kind is not None:
            found.append(Recognised(linear, kind, _fits(linear, kind, width, _is_closed(linear, blocks, kind))))
    return found


def _fits(linear: Linear, kind: str, width: int, closed: bool) -> bool:
    n_in, n_out = linear.features
    if kind != DOWN:
        return n_out == width or (closed and n_in >= n_out)
    if n_out == width:
        return n_in > n_out or (closed and _in_ffn(linear))  # an expert may be narrower than the model
    return n_in > n_out and closed and "adapter" not in linear.name  # whose down projection leads off the stream


def names_attention_output(name: str) -> bool:
    """Whether a module's name alone is that of an attention output projection."""
    *path, leaf = name.split(".")
    return _ATTENTION_LEAF.fullmatch(leaf) is not None and any(map(_ATTENTION.search, path))


def ends_in(pattern: str, name: str) -> bool:
    """Whether a name ends in a match of a regular expression, by full components."""
    starts = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
    return any(re.compile(pattern).fullmatch(name, start) for start in starts)


def _row_parallel(config: object) -> list[str]:
    """Patterns of the row-parallel projections of a plan, by their names within a layer."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    rows = [name for name, style in plan.items() if str(style).startswith("rowwise") and ".*." in name]
    inside = (name.partition(".*.")[2].removesuffix(".linear") for name in rows)
    return [re.escape(name).replace(r"\*", r"[^.]+") for name in inside]


def named_kind(linear: Linear) -> str | None:
    """What a linear map is by its name and the class around it."""
    *path, leaf = linear.name.split(".")
    around = [*path[-3:], type(linear.parent).__name__]
    if any(map(_MIXER.search, around)) and _MIXER_LEAF.fullmatch(leaf):
        return MIXER
    if _in_attention(linear):
        return ATTENTION if _ATTENTION_LEAF.fullmatch(leaf) else None
    return DOWN if _DOWN_LEAF.fullmatch(leaf) or (leaf == "proj" and _in_ffn(linear)) else None


def _in_attention(linear: Linear) -> bool:
    around = type(linear.parent).__name__
    # a layer named after its attention, as MaskedAttentionDecoderLayer, holds its FFN too
    return any(map(_ATTENTION.search, linear.name.split(".")[:-1])) or (
        _ATTENTION.search(around) is not None and not around.endswith("Layer")
    )


def _in_ffn(linear: Linear) -> bool:
    return any(map(_FFN.search, [*linear.name.split(".")[-3:-1], type(linear.parent).__name__]))


def _blocks(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """The linear maps below each name that holds some, at most two levels down."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        path = linear.name.split(".")[:-1]
        for length in {len(path), len(path) - 1} - {-1}:
            found.setdefault(".".join(path[:length]), []).append(linear)
    return found


def _is_closed(linear: Linear, blocks: dict[str, list[Linear]], kind: str) -> bool:
    """Whether a map beside it takes what it gives: q, k, v for an attention output, gate and up for a down projection."""
    n_in, n_out = linear.features
    path = linear.name.split(".")[:-1]
    beside = (other for around in (path, path[:-1]) for other in blocks.get(".".join(around), ()))
    return any(
        other.features[0] == n_out and (kind != DOWN or other.features[1] in (n_in, 2 * n_in))
        for other in beside
        if other.module is not linear.module
    )


def _width(part: Part, named: Sequence[Linear]) -> int:
    """Of the residual stream: the config's ``hidden_size``, or the widest vocabulary's, or the most common output."""
    hidden_size = getattr(part.config, "hidden_size", None)
    if isinstance(hidden_size, int):
        return hidden_size
    embeddings = [module for module in part.module.modules() if isinstance(module, nn.Embedding)]
    if embeddings:
        return max(embeddings, key=lambda module: module.num_embeddings).embedding_dim
    outputs = [linear.features[1] for linear in named]
    return max(outputs, key=outputs.count, default=0)
