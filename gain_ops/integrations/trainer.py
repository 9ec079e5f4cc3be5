"""Hugging Face's Trainer and the trainers built on it, such as TRL's: GainCallback and GainTrainerMixin.

GainCallback works with any trainer: it logs and plots the distribution of the gains, and puts a gain file into every
checkpoint. The rest of a checkpoint is then Trainer's own, with the full model, and resumes as usual.

GainTrainerMixin adapts a trainer to gains: the trainer accepts a quantised base, and its checkpoints hold the gains alone::

    class GainTrainer(GainTrainerMixin, Trainer): ...

    trainer = GainTrainer(model, arguments, train_dataset=dataset)
    trainer.add_callback(GainCallback(trainer))
    trainer.train(resume_from_checkpoint=...)
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gain_ops.models.check import watch
from gain_ops.models.files import load_gains, save_gains
from gain_ops.models.plots import write_gain_plot
from gain_ops.models.quantized import forget_quantizer
from gain_ops.models.record import gained_modules
from gain_ops.models.statistics import DEAD_BELOW, GainStatistics, gain_statistics
from gain_ops.utils.dtensors import is_sharded
from gain_ops.utils.errors import MissingPackageError, UsageError
from gain_ops.utils.files import replace_file
from gain_ops.utils.wording import first_of

__all__ = ["GAIN_FILE", "GAIN_PLOT", "GainCallback", "GainTrainerMixin", "gain_metrics"]

GAIN_FILE = "gains.safetensors"
GAIN_PLOT = "gains.png"


def gain_metrics(statistics: GainStatistics) -> dict[str, float]:
    """The figures of the gains in a training log, by their names there."""
    overall = statistics.overall
    return {
        "gains/rms_from_one": overall.rms_from_one,
        "gains/largest_from_one": overall.largest_from_one,
        "gains/minimum": overall.minimum,
        "gains/maximum": overall.maximum,
        "gains/dead": overall.dead,
        "gains/negative": overall.negative,
    }


class GainCallback(TrainerCallback):
    """Logs the distribution of the gains, plots them layer by layer, and puts a gain file into every checkpoint.

    ::

        trainer.add_callback(GainCallback(trainer))

    - After each loss that the trainer logs, it logs a row of gain_metrics(). So the row is in ``state.log_history`` and
      reaches TensorBoard, W&B and every other callback, in any order.
    - Each checkpoint gets a gain file, ``gains.safetensors``; at the end ``output_dir`` gets one too. A hyperparameter
      search has its checkpoints elsewhere, and gets only the one at the end.
    - The first forward of the training is watched, and raises if the model reads a weight whose layer it does not call: the
      gain of that layer would be ignored.
    - ``gains.png`` in ``output_dir`` is drawn at each checkpoint and at the end.

    Only the world's process zero writes.

    Args:
        trainer: the trainer that it is added to; its model has gains.
        plot: whether to draw ``gains.png``.
        dead_below: as in gain_ops.models.statistics.gain_statistics().

    Raises:
        ImportError: matplotlib is not installed, and plot is on.
        ValueError: a gain is not finite when it should be saved: the training has diverged.

    """

    def __init__(self, trainer: Trainer, *, plot: bool = True, dead_below: float = DEAD_BELOW) -> None:
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise MissingPackageError(
                'the plot needs matplotlib: pip install "gain-ops[cli]", or turn it off with plot=False'
            )
        self._trainer, self._plot, self._dead_below = trainer, plot, dead_below

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the first forward of the training be watched: gain_ops.models.check.watch()."""
        if model is not None and not args.torch_compile:
            _watch_first_loss(self._trainer, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the gains after a loss."""
        if model is not None and logs is not None and "loss" in logs:  # this row itself, and evaluations, have no loss
            # transformers' own log(): TRL's would add the metrics of the step a second time
            Trainer.log(self._trainer, gain_metrics(self._statistics(model)))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the gain file into the checkpoint, and draw the plot."""
        folder = _output_dir(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if model is not None and not state.is_hyper_param_search:
            self._write(model, folder, state)
            self._draw(model, args, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the gain file into ``output_dir``, and draw the plot."""
        if model is not None:
            self._write(model, _output_dir(args), state)
            self._draw(model, args, state)

    def _statistics(self, model: nn.Module) -> GainStatistics:
        return gain_statistics(model, dead_below=self._dead_below)

    def _write(self, model: nn.Module, folder: Path, state: TrainerState) -> None:
        _save_gains(model, folder / GAIN_FILE, writes=state.is_world_process_zero)

    def _draw(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        if self._plot:
            statistics = self._statistics(model)  # on every process: sharded gains are gathered
            if state.is_world_process_zero:
                write_gain_plot(statistics, _output_dir(args) / GAIN_PLOT, title=f"step {state.global_step}")


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class GainTrainerMixin(_Trainer):
    """A mixin that goes before a trainer's class and adapts it to gains.

    ::

        class GainTrainer(GainTrainerMixin, Trainer): ...
        class GainSFTTrainer(GainTrainerMixin, trl.SFTTrainer): ...

    - **Quantised bases.** Trainer refuses a quantised model without PEFT adapters. With this mixin gains are enough, if
      transformers can train on the quantisation at all; a GGUF that was unpacked on loading no longer counts as quantised.
      TRL's trainers round the trained parameters of a 4 or 8 bit base to bfloat16; delta stays float32.
    - **Lean checkpoints.** A checkpoint, and the output of save_model(), has a gain file instead of the full model, beside
      Trainer's optimizer, scheduler, random and trainer state: kilobytes. Resuming, and load_best_model_at_end, load the
      gains exactly into the model that the trainer was built with, and refuse other frozen weights. FSDP and DeepSpeed have
      checkpoints of their own, which are not changed.

    Warns:
        UserWarning: on building, if TRL takes the base as reference and the gains have learned something already.

    Raises:
        ValueError: on building, if the model has no gains, if a parameter is trained that is not a gain, or if transformers
            cannot train on this quantisation; on resuming, if the checkpoint has no gain file.
        gain_ops.gainfiles.file.GainFileError: on resuming, if the gain file does not fit the model or its frozen weights.

    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with _counts_as_adapted(model):
            super().__init__(model, *args, **kwargs)
        _refuse_other_trained(self._gained())
        if not any(isinstance(given, nn.Module) for given in (*args, kwargs.get("ref_model"))):
            _warn_of_reference(self, self._gained())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._keeps_its_own():
            super()._save(output_dir, state_dict=state_dict)
            return
        folder = Path(output_dir) if output_dir is not None else _output_dir(self.args)
        if self.args.should_save:
            replace_file(folder / TRAINING_ARGS_NAME, lambda beside: torch.save(self.args, beside))
        _save_gains(self._gained(), folder / GAIN_FILE, writes=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._keeps_its_own():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_gains(self._gained(), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._keeps_its_own():
            super()._load_best_model()
        else:
            _load_gains(self._gained(), Path(cast(str, self.state.best_model_checkpoint)))

    def _keeps_its_own(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _gained(self) -> nn.Module:
        return cast(nn.Module, self.model)


def _watch_first_loss(trainer: Trainer, model: nn.Module) -> None:
    own = vars(trainer).get("compute_loss")
    compute_loss = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        vars(trainer).pop("compute_loss")
        if own is not None:
            vars(trainer)["compute_loss"] = own
        with watch(model):
            return compute_loss(*args, **kwargs)

    vars(trainer)["compute_loss"] = watched


def _warn_of_reference(trainer: Trainer, model: nn.Module) -> None:
    """Warn if TRL has loaded the base as the reference of a model whose gains have learned something already."""
    reference = getattr(trainer, "ref_model", None)
    layers = gained_modules(model).values()
    if reference is None or gained_modules(reference) or not any(layer.delta.any() for layer in layers):
        return
    warnings.warn(
        f"{type(trainer).__name__} compares with the base as it lies on disk, without the gains that this model has: absorb "
        "them, save the model, and start from that folder with new gains; or give the trainer a ref_model",
        stacklevel=3,  # the caller of the trainer
    )


def _output_dir(args: TrainingArguments) -> Path:
    return Path(cast(str, args.output_dir))  # TrainingArguments fills it in


@contextmanager
def _counts_as_adapted(model: object) -> Iterator[None]:
    """While a trainer is built, mark a quantised model with gains as one with adapters, and leave its deltas in float32."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(model, PreTrainedModel) or quantizer is None or forget_quantizer(model):
        yield
        return
    if not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise UsageError(
            f"the base is quantised with {getattr(method, 'value', method)}, and transformers cannot train on that: "
            "load it unquantised, or quantised with bitsandbytes"
        )
    deltas = [(layer.delta, layer.delta.data) for layer in gained_modules(model).values()]
    marked = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = marked
    for delta, before in deltas:
        if delta.dtype != before.dtype:
            delta.data = before.to(delta.device)


def _refuse_other_trained(model: nn.Module) -> None:
    layers = gained_modules(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no gains: put them on with gain_ops.apply() before the trainer")
    gains = {id(layer.delta) for layer in layers.values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in gains]
    if others:
        raise UsageError(
            "parameters are trained that are not gains, and checkpoints of gains would lose them: "
            f"{first_of(others)}. Freeze them, or use the trainer without GainTrainerMixin, which saves the full model."
        )


def _save_gains(model: nn.Module, path: Path, *, writes: bool) -> None:
    """save_gains() on the process that writes, and on all processes where gathering needs them."""
    if writes or any(is_sharded(layer.delta) for layer in gained_modules(model).values()):
        save_gains(model, path)


def _load_gains(model: nn.Module, checkpoint: Path) -> None:
    path = checkpoint / GAIN_FILE
    if not path.is_file():
        raise UsageError(
            f"{checkpoint} has no {GAIN_FILE}: it is not a checkpoint of gains. One of the full model is resumed by the "
            "trainer without GainTrainerMixin."
        )
    load_gains(model, path)
