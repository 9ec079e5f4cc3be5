"""Where the gains go: the attention output projections (GAIN), the FFN down projections (GAIN-FFN), mixers' outputs.

A model is taken part by part (parts.py), each with a width of its own, and projections.py says what its linear maps are.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gain_ops.layers.experts import ExpertsLinear
from gain_ops.layers.linears import sizes
from gain_ops.models.experts import down_linears, expert_linears, expert_sums
from gain_ops.models.parts import Part, chosen_kinds, part_around, parts_of
from gain_ops.models.projections import (
    ATTENTION,
    DOWN,
    MIXER,
    Linear,
    Recognised,
    ends_in,
    named_kind,
    names_attention_output,
    recognise,
)
from gain_ops.models.weight_reads import weight_reads
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of

PRESETS = {"gain": (ATTENTION,), "gain-ffn": (ATTENTION, DOWN), "gain-mixer": (MIXER,)}
"""The kinds of projection that each preset takes."""

_PLACES = {
    "language": "the language model",
    "vision": "a vision tower",
    "audio": "an audio tower",
    "projector": "a projector",
}


@dataclass(frozen=True)
class Site:
    """A linear module that gets a gain."""

    name: str
    module: nn.Module
    attention: bool  # an attention output projection, whose input attention already holds for backward


@dataclass(frozen=True)
class Found:
    """The sites of a model in its order, and in words what was left out and why."""

    sites: list[Site]
    left_out: tuple[str, ...]


def preset_sites(
    model: nn.Module,
    presets: str | Sequence[str],
    parts: str | Sequence[str] | None = None,
    experts: bool | str = True,
) -> Found:
    """The projections of a model that some presets take, in the parts of these kinds (``parts``, see apply()).

    ``experts`` says what is done with those of a mixture that are 3-D parameters, as in apply().

    Raises:
        ValueError: an unknown preset or part, a kind of which none was found, or parameters of experts whose
            layout is not known.

    """
    named = [presets] if isinstance(presets, str) else list(presets)
    wanted = {kind for preset in named for kind in PRESETS[preset]}
    all_parts = parts_of(model)
    taken = chosen_kinds(all_parts, parts)
    here_parts = [part for part in all_parts if part.kind in taken]
    if DOWN in wanted and experts is not False:
        _refuse_unknown_experts(model, here_parts, all_parts)
    of_experts = (
        [one for one in down_linears(model) if part_around(one[0], all_parts) in here_parts] if DOWN in wanted else []
    )
    recognised = list(_recognised(model, all_parts))
    here = [one for part, one in recognised if part.kind in taken and one.fits]
    uncalled = weight_reads(model, (one.linear.module for one in here if one.kind == MIXER))
    here = [one for one in here if id(one.linear.module) not in uncalled]
    left_out = (*_left_out(recognised, taken, wanted, uncalled), *_bare_layers(model, all_parts, taken, recognised))
    if of_experts and experts is False:
        left_out += (f"the down projections of experts, since experts=False: {first_of([n for n, _ in of_experts])}",)
    for kind in sorted(wanted):
        if not any(one.kind == kind for one in here) and not (kind == DOWN and of_experts):
            types = ", ".join(sorted({part.model_type for part in all_parts if part.model_type and part.kind in taken}))
            raise UsageError(
                f"no {kind} projection found in {type(model).__name__} ({types or 'no model_type'}). "
                f"{''.join(f'Left out: {text}. ' for text in left_out)}{_name_them(model)}"
            )
    kinds = {id(one.linear.module): one.kind for one in here if one.kind in wanted}
    sites = [
        Site(name, module, kinds[id(module)] == ATTENTION)
        for name, module in linear_modules(model)
        if id(module) in kinds
    ]
    given = expert_sums(model) if experts == "shared" else of_experts if experts else []
    taken_experts = [Site(name, linear, attention=False) for name, linear in given if of_experts]
    return Found(in_order(model, [*sites, *taken_experts]), left_out)


def named_sites(
    model: nn.Module, targets: Sequence[str], parts: str | Sequence[str] | None = None, experts: bool | str = True
) -> Found:
    """The sites of presets and patterns together, in the model's order; ``parts`` and ``experts`` are for the presets.

    Raises:
        ValueError: as preset_sites() and pattern_sites(), or ``parts`` without a preset.

    """
    presets = [target for target in targets if target in PRESETS]
    patterns = [target for target in targets if target not in PRESETS]
    if parts is not None and not presets:
        raise UsageError(
            f"parts={parts!r} is for the presets {', '.join(map(repr, PRESETS))}; patterns look everywhere"
        )
    found = preset_sites(model, presets, parts, experts) if presets else Found([], ())
    by_name = {site.name: site for site in [*pattern_sites(model, patterns), *found.sites]}
    return Found(in_order(model, by_name.values()), found.left_out)


def pattern_sites(model: nn.Module, patterns: Iterable[str]) -> list[Site]:
    """The linear modules whose name ends in a match of a regular expression, by full components, in the model's order.

    Raises:
        ValueError: a pattern that is no regular expression, or one that matches no linear module.

    """
    modules = [*linear_modules(model), *expert_linears(model)]
    matched: set[str] = set()
    for pattern in patterns:
        _refuse_no_regex(pattern)
        found = {name for name, _ in modules if ends_in(pattern, name)}
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
    likely = [name for name in kinds if _kind_of(model, name) is not None] or kinds
    ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in likely)
    return f"Name them instead, as in targets={list(ends)[:2]}. {candidates(model)}" if ends else candidates(model)


def _kind_of(model: nn.Module, name: str) -> str | None:
    parent, _, leaf = name.rpartition(".")
    around = model.get_submodule(parent)
    return named_kind(Linear(name, getattr(around, leaf), around))


def _matched_instead(model: nn.Module, pattern: str) -> str:
    """What a target matches that is no linear module: another module, or a parameter, such as experts fused into one."""
    for name, module in model.named_modules():
        if name and sizes(module) is None and ends_in(pattern, name):
            return f", but {name}, which is a {type(module).__name__}"
    for name, parameter in model.named_parameters():
        if ends_in(pattern, name):
            experts = ", the experts in one tensor" if parameter.dim() >= 3 else ""
            return f", but {name}, which is a parameter of shape {tuple(parameter.shape)}{experts}"
    return ""


def _refuse_no_regex(pattern: object) -> None:
    """Raise ValueError for a target that is no regular expression, at the position in it that is wrong."""
    if not isinstance(pattern, str):
        raise UsageError(f"targets holds {pattern!r}, a {type(pattern).__name__}, and takes regular expressions as str")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the target {pattern!r} is not a regular expression: {error}") from error


def linears_of(model: nn.Module) -> list[Linear]:
    """The linear maps of a model with the modules around them."""
    modules = dict(model.named_modules())
    return [Linear(name, module, modules[name.rpartition(".")[0]]) for name, module in linear_modules(model)]


def _recognised(model: nn.Module, parts: Sequence[Part]) -> Iterator[tuple[Part, Recognised]]:
    by_part: dict[str, list[Linear]] = {part.name: [] for part in parts}
    for linear in linears_of(model):
        by_part[part_around(linear.name, parts).name].append(linear)
    for part in parts:
        yield from ((part, one) for one in recognise(part, by_part[part.name]))


def _left_out(
    recognised: Sequence[tuple[Part, Recognised]], taken: frozenset[str], wanted: set[str], uncalled: Mapping[int, str]
) -> Iterator[str]:
    """What looks like a place for a gain and gets none, a sentence for each reason."""
    others: dict[str, list[Recognised]] = {}
    for part, one in recognised:
        if part.kind not in taken and one.kind in wanted and one.fits:
            others.setdefault(part.kind, []).append(one)
    for kind, found in others.items():
        both = [*sorted(taken), kind]
        yield f"{_some(found)} in {_PLACES[kind]}: parts={both} takes them too"
    here = [one for part, one in recognised if part.kind in taken]
    fitting = {(_layer(one.linear.name), one.kind) for one in here if one.fits}
    fitting.add(("", DOWN))  # a pooler or a head, outside of the layers, has such a name too
    odd = [
        one
        for one in here
        if one.kind in wanted and not one.fits and (_layer(one.linear.name), one.kind) not in fitting
    ]
    if odd:
        yield f"{_some(odd)}, so named, but with a shape that does not lead back to the residual stream"
    mixers = [one for one in here if one.kind == MIXER and one.fits]
    called = [one for one in mixers if id(one.linear.module) not in uncalled]
    if called and MIXER not in wanted:
        yield f"{_some(called)} of layers that mix without softmax attention: the preset 'gain-mixer' takes them"
    silent = [one for one in mixers if id(one.linear.module) in uncalled]
    if silent:
        yield f"{_some(silent)}, where a gain would be ignored: {uncalled[id(silent[0].linear.module)]}"


def _bare_layers(
    model: nn.Module, parts: Sequence[Part], taken: frozenset[str], recognised: Sequence[tuple[Part, Recognised]]
) -> Iterator[str]:
    """The layers of a stack in which nothing is recognised while it is in others."""
    known = {_layer(one.linear.name) for _, one in recognised}
    stacks = {layer.rpartition(".")[0] for layer in known}
    here = (name for name, _ in linear_modules(model) if part_around(name, parts).kind in taken)
    layers = dict.fromkeys(map(_layer, here))
    bare = [layer for layer in layers if layer and layer not in known and layer.rpartition(".")[0] in stacks]
    if bare:
        yield f"the layers {first_of(bare)}, in which no projection is recognised"


def _layer(name: str) -> str:
    """The layer of a stack that a module is in, "" for none."""
    found = re.match(r"((?:.*?\.)?\d+)\.", name)
    return found[1] if found else ""


def _some(found: Sequence[Recognised]) -> str:
    kinds = " and ".join(sorted({one.kind for one in found}))
    return f"{len(found)} {kinds} projection{'s' * (len(found) > 1)} ({first_of([one.linear.name for one in found])})"


def _refuse_unknown_experts(model: nn.Module, taken: Sequence[Part], parts: Sequence[Part]) -> None:
    known = {id(linear.weight) for _, linear in expert_linears(model)}
    for name, module in model.named_modules():
        if part_around(name, parts) not in taken:
            continue
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
