"""Adapts a language model to a domain by gains, and measures the result: the work of ``gain-ops adapt``."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Protocol

import torch
from torch import Tensor, nn

from gain_ops.measure import environment
from gain_ops.measure.marks import unmarked
from gain_ops.measure.perplexity import largest_difference, logits, perplexity
from gain_ops.measure.step_bytes import backward_bytes, lora_backward_bytes
from gain_ops.models.absorb import absorb
from gain_ops.models.apply import apply, remove
from gain_ops.models.check import check
from gain_ops.models.files import save_gains
from gain_ops.models.record import Applied
from gain_ops.models.sites import PRESETS
from gain_ops.training import domains
from gain_ops.training.documents import Chat, Document, Tokenizer, tokens
from gain_ops.training.domains import Domain
from gain_ops.training.loading import bundled_model, check_length, load_model, resolve_device, resolve_dtype
from gain_ops.training.loop import Step, draw_batches, train
from gain_ops.training.report import (
    AbsorbFigures,
    BackwardBytes,
    DomainFigures,
    GainFigures,
    Report,
    TrainingFigures,
    to_markdown,
    write_json,
    write_plot,
    written_here,
)
from gain_ops.training.settings import Settings
from gain_ops.utils.errors import FileError, MissingPackageError, UsageError, file_errors
from gain_ops.utils.files import PART, locked_folder, naming, regular_file, replace_file
from gain_ops.utils.wording import first_of

__all__ = ["FILES", "Settings", "Watcher", "adapt"]

GAINS, FIGURES, TABLE, PLOT = FILES = ("gains.safetensors", "report.json", "report.md", "plot.png")
"""The files that :func:`adapt` writes into its folder."""

_VALIDATION_WINDOWS = 12
_VALIDATION_SEED = 0  # not the user's: runs with different seeds are measured on the same windows
_LOGIT_WINDOWS = 4
_POOL = 16  # windows tokenised for each window drawn, so that a draw meets many documents


class Watcher(Protocol):
    """Follows an adaptation, and may stop its training."""

    def phase(self, text: str) -> None:
        """What begins now."""

    def notice(self, text: str) -> None:
        """A note that a reader of the figures should know."""

    def training(self, steps: int) -> AbstractContextManager[object]:
        """Entered for the time of the training."""

    def step(self, step: Step) -> None:
        """A training step is done."""

    def should_stop(self) -> bool:
        """Whether to end the training after this step."""

    def saved(self, path: Path, steps: int) -> None:
        """The gain file is written, after so many steps."""


def adapt(settings: Settings, watcher: Watcher) -> Report:
    """Put gains on a model, train them on a domain, and measure perplexity, memory and absorption.

    The gain file is written as soon as the training ends, so a run that is stopped while it measures has one too. Until then
    the files of an earlier run in ``settings.out`` stay as they are.

    Returns:
        The figures, as in ``report.json``; not ``finished`` where ``watcher`` stopped the training.

    Raises:
        UsageError: settings or data that do not fit; a folder that holds a gain file, without ``force``; or a folder with
            files of these names from something else.
        BusyError: another adaptation is at work in the folder.
        FileError: files that cannot be read or written; the trained gains are kept, and the error says where.
        MissingPackageError: a package that the plot or the model needs is missing.
        DivergedError: the loss stopped being finite.
    """
    with ExitStack() as held:
        with file_errors():
            held.enter_context(locked_folder(settings.out, "another adaptation"))
            _check_folder(settings.out, force=settings.force)
        return _adapt(settings, watcher)


def _adapt(settings: Settings, watcher: Watcher) -> Report:
    clock = _Clock()
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError('the plot needs matplotlib: pip install "gain-ops[cli]"')
    device, dtype = resolve_device(settings.device), resolve_dtype(settings.dtype)
    source = settings.model or bundled_model()

    watcher.phase("reading the text")
    with file_errors():
        target = (
            domains.python_source()
            if settings.data is None
            else domains.from_path(settings.data, text_field=settings.text_field)
        )
    if target.read:
        watcher.notice(target.read)
    held_out = [domains.licence_texts(), domains.readme_bodies()]
    watcher.phase(f"loading {source.name}")
    loaded = load_model(
        source,
        dtype=dtype,
        device=device,
        trust_remote_code=settings.trust_remote_code,
        before_weights=lambda tokenizer: _check_chats(target, tokenizer),
    )
    model = loaded.model
    check_length(model, settings.sequence_length)
    model_parameters = sum(parameter.numel() for parameter in model.parameters())
    _apply(model, settings)  # to see that it can be done, before minutes of measuring
    remove(model)
    texts = _tokenised(target, held_out, loaded.tokenizer, settings, watcher)
    train_windows = texts[0].train
    batches = draw_batches(train_windows, batch_size=settings.batch_size, steps=settings.steps, seed=settings.seed)
    clock.lap("loading")

    watcher.phase("measuring perplexity before")
    figures = [_figures_before(model, text) for text in texts]
    clock.lap("perplexity before")

    applied = _apply(model, settings)
    for without in applied.left_out:
        watcher.notice(f"no gains on {without}")
    unused = check(model, unmarked(batches[0][:1]).to(device)).unused
    if unused:
        watcher.notice(f"not called by this model on the first text, so not trained by it: {first_of(unused)}")
    watcher.phase(f"training gains on {len(applied.names)} layers")
    torch.manual_seed(settings.seed)  # dropout draws from the global generator
    gains = settings.out / GAINS
    with watcher.training(settings.steps):
        history = train(model, batches, lr=settings.lr, on_step=watcher.step, should_stop=watcher.should_stop)
        clock.lap("training")
        _save(model, gains, force=settings.force)  # a signal waits for it
        watcher.saved(gains, len(history.steps))
    stopped = history.stopped or watcher.should_stop()
    report = Report(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        model=loaded.name,
        device=environment.describe_device(device),
        arguments={name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()},
        environment=environment.versions(),
        domains=figures,
        training=TrainingFigures(stopped, settings.batch_tokens, clock.laps["training"], history.losses),
        gains=GainFigures(
            layers=list(applied.names),
            parameters=applied.trained,
            model_parameters=model_parameters,
            file_bytes=gains.stat().st_size,
        ),
        seconds=clock.laps,
    )
    _write(report, settings.out)
    if not stopped:
        watcher.phase("measuring perplexity after")
        for domain, text in zip(figures, texts, strict=True):
            domain.after = perplexity(model, text.validation)
        clock.lap("perplexity after")
        watcher.phase("absorbing the gains, and counting what a step saves for backward")
        _measure_the_rest(report, model, unmarked(texts[0].validation[:_LOGIT_WINDOWS]), unmarked(batches[0]))
        clock.lap("absorbing and memory")
        report.finished = True
        _write(report, settings.out)
    return report


@dataclass(frozen=True)
class _Text:
    """A domain in tokens: int64 [windows, length] each; the training part of a held-out domain has no windows."""

    domain: Domain
    train: Tensor
    validation: Tensor


class _Clock:
    """Seconds of each part of a run, and in total."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {"total": 0.0}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self.laps["total"] = round(self.laps["total"] + now - self._last, 2)
        self._last = now


def _check_folder(out: Path, *, force: bool) -> None:
    """Refuse a folder in which writing would replace files that an adaptation did not write, or gains without ``force``.

    Refuse as well what could not be written to, now and not after the training.
    """
    present = [name for name in FILES if regular_file(out / name) is not None]
    if present and not written_here(out / FIGURES):
        raise UsageError(
            f"{out} holds {', '.join(present)}, not written by gain-ops adapt: name another folder (--out)"
        )
    if GAINS in present and not force:
        raise UsageError(
            f"{out} holds the {GAINS} of an earlier run: name another folder (--out), or replace it with --force"
        )
    with naming(out), TemporaryFile(dir=out, prefix=PART):
        pass


def _apply(model: nn.Module, settings: Settings) -> Applied:
    text = settings.targets
    targets = text if text in PRESETS else [pattern.strip() for pattern in text.split(",")]
    return apply(model, targets, side=settings.side, memory=settings.memory)


def _check_chats(target: Domain, tokenizer: Tokenizer) -> None:
    """Refuse conversations that the tokenizer cannot render, before the model's weights are loaded."""
    for document in target.train[:1]:
        if isinstance(document, Chat):
            tokens(document, tokenizer)


def _tokenised(
    target: Domain, held_out: list[Domain], tokenizer: Tokenizer, settings: Settings, watcher: Watcher
) -> list[_Text]:
    """The domain to adapt to, then the held-out ones that have enough text."""
    length = settings.sequence_length
    wanted = settings.steps * settings.batch_size
    came, train_windows = _windows(target.train, tokenizer, length, wanted, settings.seed)
    held, validation = _windows(target.validation, tokenizer, length, _VALIDATION_WINDOWS, _VALIDATION_SEED)
    if came < settings.batch_tokens or held < length:
        raise UsageError(
            f"too little text in {target.source}: got {came} tokens to train on and {held} to measure on, at least "
            f"{settings.batch_tokens} and {length} are needed: give more text, or lower --batch-tokens and "
            "--sequence-length"
        )
    if len(train_windows) < settings.batch_size or not len(validation):
        raise UsageError(
            f"{target.source} has {len(train_windows)} windows of {length} tokens to train on and {len(validation)} to measure "
            f"on with a completion in them, at least {settings.batch_size} and 1 are needed: its prompts are long; raise "
            "--sequence-length, or give more records"
        )
    texts = [_Text(target, train_windows, validation)]
    for domain in held_out:
        held, validation = _windows(domain.validation, tokenizer, length, _VALIDATION_WINDOWS, _VALIDATION_SEED)
        if len(validation):
            texts.append(_Text(domain, train_windows[:0], validation))
        else:
            watcher.notice(f"{domain.name} not measured: {held} tokens in the {domain.source}, {length} are needed")
    return texts


def _windows(
    documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int
) -> tuple[int, Tensor]:
    """How many tokens the text has, and the windows drawn from them."""
    stream = domains.token_stream(documents, tokenizer, limit=_POOL * count * length)
    return stream.numel(), domains.cut_windows(stream, length=length, count=count, seed=seed)


def _figures_before(model: nn.Module, text: _Text) -> DomainFigures:
    return DomainFigures(
        name=text.domain.name,
        source=text.domain.source,
        train_windows=len(text.train),
        validation_windows=len(text.validation),
        window_tokens=text.validation.shape[1],
        sha256=hashlib.sha256(text.train.numpy().tobytes() + text.validation.numpy().tobytes()).hexdigest(),
        before=perplexity(model, text.validation),
    )


def _measure_the_rest(report: Report, model: nn.Module, ids: Tensor, batch: Tensor) -> None:
    """Memory of a step and the error of absorbing. The model ends with its gains absorbed, and with LoRA on it."""
    gain_bytes = backward_bytes(model, batch)
    with torch.no_grad():
        gained = logits(model, ids)
        absorbed = absorb(model)
        difference = largest_difference(gained, logits(model, ids))
    report.absorbing = AbsorbFigures(absorbed.max_abs_error, difference, gained.abs().max().item())
    lora_bytes = lora_backward_bytes(model, report.gains.layers, batch)
    report.backward = BackwardBytes(batch.numel(), gain_bytes, lora_bytes)


def _save(model: nn.Module, path: Path, *, force: bool) -> None:
    """Write the gain file; where that fails, into a folder for temporary files, so that the training is not lost."""
    try:
        with file_errors():
            if path.exists() and not force:  # some file systems have no locks
                raise FileError(f"{path} was written by another run meanwhile")
            save_gains(model, path)
    except FileError as error:
        try:
            elsewhere = Path(mkdtemp(prefix="gain-ops-")) / path.name
            save_gains(model, elsewhere)
        except OSError:
            raise error from None
        raise FileError(f"{error}; the trained gains are in {elsewhere}") from error


def _write(report: Report, out: Path) -> None:
    try:
        with file_errors():
            _write_all(report, out)
    except FileError as error:
        raise FileError(f"{error}; the trained gains are in {out / GAINS}") from error


def _write_all(report: Report, out: Path) -> None:
    """Write the figures, and for a finished run its table and plot; otherwise remove those of an earlier run."""
    replace_file(out / FIGURES, lambda path: write_json(report, path))
    if report.finished:
        replace_file(out / TABLE, lambda path: path.write_text(to_markdown(report), encoding="utf-8"))
        replace_file(out / PLOT, lambda path: write_plot(report, path))
    else:
        for name in (TABLE, PLOT):
            (out / name).unlink(missing_ok=True)
