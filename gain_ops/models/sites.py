"""Where the gains go: the attention output projections (GAIN) and the FFN down projections (GAIN-FFN), by architecture.

A model is recognised by the ``model_type`` of its own transformers config, or of the config of a part of it (the
language model inside a multimodal one); the table below then has the names of the projections. In any other model they are
found by name and shape, see ``_by_name_and_shape``. Names are matched at their end and by full components:
"self_attn.o_proj" fits "model.layers.3.self_attn.o_proj".
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from gain_ops.layers.experts import ExpertsLinear
from gain_ops.layers.linears import sizes
from gain_ops.models.experts import down_linears, expert_linears, expert_sums
from gain_ops.models.weight_reads import weight_reads
from gain_ops.utils.errors import UsageError


@dataclass(frozen=True)
class Architecture:
    """The names of the two kinds of projection: regular expressions for the end of a module's name."""

    attention: str
    down: str


@dataclass(frozen=True)
class Site:
    """A linear module that gets a gain."""

    name: str
    module: nn.Module
    attention: bool  # an attention output projection, whose input attention already holds for backward


_LLAMA = Architecture(r"self_attn\.o_proj", r"mlp\.down_proj")
_SHARED_EXPERTS = Architecture(r"self_attn\.o_proj", r"mlp\.(shared_experts?\.)?down_proj")
_FAIRSEQ = Architecture(r"self_attn\.out_proj", r"fc2")
_GPT2 = Architecture(r"attn\.c_proj", r"mlp\.c_proj")
_GPTJ = Architecture(r"attn\.out_proj", r"mlp\.fc_out")
_BLOOM = Architecture(r"self_attention\.dense", r"mlp\.dense_4h_to_h")

# Experts that are 3-D parameters are found by their sizes: experts.py.
_LLAMA_TYPES = """
    apertus arcee cohere cohere2 cohere2_moe cwm diffllama ernie4_5 exaone4 flex_olmo gemma gemma2 gemma3_text
    gemma4_text glm glm4 gpt_oss granite granitemoe helium hunyuan_v1_dense llama minicpm3 minimax_m2 ministral
    ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe phi3 phimoe qwen2 qwen2_5_vl_text qwen2_vl_text
    qwen3 qwen3_moe qwen3_vl_text seed_oss smollm3 stablelm vaultgemma
"""
_SHARED_EXPERTS_TYPES = "deepseek_v2 deepseek_v3 ernie4_5_moe glm4_moe qwen2_moe"

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(_LLAMA_TYPES.split(), _LLAMA),
    **dict.fromkeys(_SHARED_EXPERTS_TYPES.split(), _SHARED_EXPERTS),
    **dict.fromkeys(("biogpt", "opt", "xglm"), _FAIRSEQ),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), _GPT2),
    **dict.fromkeys(("codegen", "gptj"), _GPTJ),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "gpt_neo": Architecture(r"attn\.attention\.out_proj", r"mlp\.c_proj"),
    "gpt_neox": Architecture(r"attention\.dense", r"mlp\.dense_4h_to_h"),
    "mllama_text_model": Architecture(r"(self|cross)_attn\.o_proj", r"mlp\.down_proj"),
    "mpt": Architecture(r"attn\.out_proj", r"ffn\.down_proj"),
    "persimmon": Architecture(r"self_attn\.dense", r"mlp\.dense_4h_to_h"),
    "phi": Architecture(r"self_attn\.dense", r"mlp\.fc2"),
    "starcoder2": Architecture(r"self_attn\.o_proj", r"mlp\.c_proj"),
}

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ATTENTION_LEAF = re.compile(r"c_proj|dense|o|o_proj|out_lin|out_proj|proj|to_out|wo")
_DOWN_LEAF = re.compile(r"c_proj|dense|dense_4h_to_h|down_proj|fc2|fc_out|lin2|linear2|proj_down|w2|wo")


def preset_sites(model: nn.Module, *, ffn: bool, experts: bool | str = True) -> list[Site]:
    """The attention output projections of a model and, with ``ffn``, its FFN down projections, in the model's order.

    ``experts`` says what is done with those of a mixture that are 3-D parameters, as in apply().

    Raises:
        ValueError: one of the kinds was not found, or with ``ffn`` and ``experts`` parameters of experts that are not known.

    """
    of_experts = _expert_sites(model, experts) if ffn else []
    if ffn and experts is not False:
        _refuse_fused_experts(model)
    parts = _known_parts(model)
    sites = [*(_by_table(parts) if parts else _by_name_and_shape(model)), *of_experts]
    for kind, attention in (("attention output", True), ("FFN down", False)):
        elsewhere = not attention and bool(expert_linears(model))  # experts=False leaves out what there is
        if (attention or ffn) and not elsewhere and not any(site.attention == attention for site in sites):
            model_types = ", ".join(sorted({model_type for _, _, model_type in parts}))
            how = f"model_type {model_types}" if parts else "no known architecture, so searched by name and shape"
            raise UsageError(f"no {kind} projection found in {type(model).__name__} ({how}). {_name_them(model)}")
    return in_order(model, [site for site in sites if site.attention or ffn])


def pattern_sites(model: nn.Module, patterns: Iterable[str]) -> list[Site]:
    """The linear modules whose name ends in a match of a regular expression, by full components, in the model's order.

    Raises:
        ValueError: a pattern that is no regular expression, or one that matches no linear module.

    """
    modules = [*linear_modules(model), *expert_linears(model)]
    matched: set[str] = set()
    for pattern in patterns:
        _refuse_no_regex(pattern)
        found = {name for name, _ in modules if _ends_in(pattern, name)}
        if not found:
            raise UsageError(
                f"the target {pattern!r} matches no linear module{_matched_instead(model, pattern)}. {candidates(model)}"
            )
        matched |= found
    sites = [Site(name, module, names_attention_output(name)) for name, module in modules if name in matched]
    return in_order(model, sites)


def in_order(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of their modules in the model, the parameters of experts where their owner is."""
    places = {id(module): place for place, module in enumerate(model.modules())}

    def place(site: Site) -> int:
        module = site.module
        return places[id(module.owner if isinstance(module, ExpertsLinear) else module)]

    return sorted(sites, key=place)


def refuse_ignored(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise ValueError for a site whose weight the model's code reads without calling the module: a gain would do nothing."""
    reads = weight_reads(model, (site.module for site in sites))
    ignored = [site for site in sites if id(site.module) in reads]
    if ignored:
        more = f" The same holds for {len(ignored) - 1} other layers." if len(ignored) > 1 else ""
        raise UsageError(
            f"a gain on {ignored[0].name} would be ignored: {reads[id(ignored[0].module)]}. Leave it out of the "
            f"targets.{more}"
        )


def linear_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of every linear map below the root, by its first name; not those inside another linear map."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = bool(found) and name.startswith(f"{found[-1][0]}.")
        if name and not inside and sizes(module) is not None:
            found.append((name, module))
    return found


def candidates(model: nn.Module) -> str:
    """A sentence that names some of the linear modules, one of each kind, for an error message."""
    if sizes(model) is not None:
        return "The model is itself the linear map: use gain_ops.GainLinear.from_linear()."
    kinds = _kinds(model)
    more = f" and {len(kinds) - 12} more kinds" if len(kinds) > 12 else ""
    return (
        f"Linear modules here: {', '.join(map(repr, kinds[:12]))}{more}."
        if kinds
        else "The model has no linear modules."
    )


def _kinds(model: nn.Module) -> list[str]:
    """The names of the linear modules, of each kind the first: of those in a list of blocks that agree in the rest and in size.

    A number that is all of a name's part counts the blocks; one at the end of a name ("w2", "fc2", "net.2") does not.
    """
    found: dict[object, str] = {}
    for name, module in [*linear_modules(model), *expert_linears(model)]:
        found.setdefault((re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name), sizes(module)), name)
    return list(found.values())


def _name_them(model: nn.Module) -> str:
    """What to do where a preset finds nothing: name modules that the model has."""
    kinds = [] if sizes(model) is not None else _kinds(model)
    likely = [name for name in kinds if names_attention_output(name) or _names_ffn_down(name)] or kinds
    ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in likely)
    return f"Name them instead, as in targets={list(ends)[:2]}. {candidates(model)}" if ends else candidates(model)


def _matched_instead(model: nn.Module, pattern: str) -> str:
    """What a target matches that is no linear module: another module, or a parameter, such as experts fused into one."""
    for name, module in model.named_modules():
        if name and sizes(module) is None and _ends_in(pattern, name):
            return f", but {name}, which is a {type(module).__name__}"
    for name, parameter in model.named_parameters():
        if _ends_in(pattern, name):
            experts = ", the experts in one tensor" if parameter.dim() >= 3 else ""
            return f", but {name}, which is a parameter of shape {tuple(parameter.shape)}{experts}"
    return ""


def _known_parts(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, module, model_type) of the outermost modules whose config names an architecture of the table."""
    parts: list[tuple[str, nn.Module, str]] = []
    for name, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _, _ in parts)
        if model_type in ARCHITECTURES and not inside:
            parts.append((name, module, cast(str, model_type)))
    return parts


def _by_table(parts: Iterable[tuple[str, nn.Module, str]]) -> list[Site]:
    sites = []
    for prefix, part, model_type in parts:
        architecture = ARCHITECTURES[model_type]
        for name, module in linear_modules(part):
            attention = _ends_in(architecture.attention, name)
            if attention or _ends_in(architecture.down, name):
                sites.append(Site(f"{prefix}.{name}" if prefix else name, module, attention))
    return sites


def _by_name_and_shape(model: nn.Module) -> list[Site]:
    """Sites of a model that the table does not know.

    Attention output: the last component of the name is an _ATTENTION_LEAF, and one before it contains "attn" or
    "attention". FFN down: the last is a _DOWN_LEAF, none before it contains these, and in_features > out_features.
    Both: out_features is the width of the residual stream. This is ``config.hidden_size`` if there is one, otherwise the
    width of the largest embedding, otherwise the most common out_features of the modules with these names.
    """
    named = [
        Site(name, module, names_attention_output(name))
        for name, module in linear_modules(model)
        if names_attention_output(name) or _names_ffn_down(name)
    ]
    width = _width(model, named)
    return [site for site in named if _fits(site, width)]


def _fits(site: Site, width: int) -> bool:
    n_in, n_out = cast(tuple[int, int], sizes(site.module))
    return n_out == width and (site.attention or n_in > n_out)


def _width(model: nn.Module, named: list[Site]) -> int:
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(hidden_size, int):
        return hidden_size
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if embeddings:
        return max(embeddings, key=lambda module: module.num_embeddings).embedding_dim
    outputs = Counter(cast(tuple[int, int], sizes(site.module))[1] for site in named)
    return outputs.most_common(1)[0][0] if outputs else 0


def names_attention_output(name: str) -> bool:
    """Whether a module's name alone is that of an attention output projection."""
    *path, leaf = name.split(".")
    return _ATTENTION_LEAF.fullmatch(leaf) is not None and any(map(_ATTENTION.search, path))


def _names_ffn_down(name: str) -> bool:
    *path, leaf = name.split(".")
    return _DOWN_LEAF.fullmatch(leaf) is not None and not any(map(_ATTENTION.search, path))


def _ends_in(pattern: str, name: str) -> bool:
    """Whether a module's name ends in a match, from its start or from a dot on."""
    starts = (0, *(dot.end() for dot in re.finditer(r"\.", name)))
    return any(re.compile(pattern).fullmatch(name, start) for start in starts)


def _refuse_no_regex(pattern: object) -> None:
    """Raise ValueError for a target that is no regular expression, at the position in it that is wrong."""
    if not isinstance(pattern, str):
        raise UsageError(f"targets holds {pattern!r}, a {type(pattern).__name__}, and takes regular expressions as str")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the target {pattern!r} is not a regular expression: {error}") from error


def _expert_sites(model: nn.Module, experts: bool | str) -> list[Site]:
    found = expert_sums(model) if experts == "shared" else down_linears(model) if experts else []
    return [Site(name, linear, attention=False) for name, linear in found]


def _refuse_fused_experts(model: nn.Module) -> None:
    known = {id(linear.weight) for _, linear in expert_linears(model)}
    for name, module in model.named_modules():
        if not re.search("expert|moe", f"{name} {type(module).__name__}", re.IGNORECASE):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 3 and id(parameter) not in known:
                raise UsageError(
                    f"targets='gain-ffn' cannot serve {type(model).__name__}: {name}.{parameter_name}, of shape "
                    f"{tuple(parameter.shape)} and {parameter.dtype}, is no layout of experts that is known "
                    "(gain_ops/models/experts.py). Use experts=False to leave them out, targets='gain' for the attention "
                    "output projections alone, or patterns that name its dense layers."
                )
