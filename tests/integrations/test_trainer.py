"""Gains in Trainer: what is logged, written and plotted, and checkpoints that resume with the same losses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import gain_ops
from gain_ops.gainfiles.file import GainFileError, read_gains
from gain_ops.integrations import trainer as integration
from gain_ops.integrations.trainer import GAIN_FILE, GAIN_PLOT, GainCallback, GainTrainerMixin, gain_metrics
from gain_ops.models.record import gained_modules
from gain_ops.models.statistics import gain_statistics

LEAN_BYTES = 64 * 1024  # optimizer, scheduler, random and trainer state of a few hundred gains


class GainTrainer(GainTrainerMixin, Trainer):
    pass


def llama(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=96, attention_dropout=0.1, initializer_range=0.2, **options)
    return LlamaForCausalLM(config)


def gained(model=None, targets="gain-ffn"):
    model = model or llama()
    gain_ops.apply(model, targets)
    return model


def rows(count=40):
    ids = [(torch.arange(16) * (index % 3 + 1) + index) % 90 for index in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **options):
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **defaults | options)


def build(kind, model, folder, callbacks=(), plot=False, **options):
    trainer = kind(model, arguments(folder, **options), train_dataset=rows(), callbacks=[*callbacks])
    trainer.add_callback(GainCallback(trainer, plot=plot))
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def deltas(model):
    return {name: layer.delta.detach().clone() for name, layer in gained_modules(model).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Recorder(TrainerCallback):
    """Every row that it is given, and the gains' figures at that time."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        self.seen.append((state.global_step, dict(logs), gain_metrics(gain_statistics(model))))


# what is logged


def test_the_gains_are_logged_after_every_loss_to_everyone(tmp_path):
    before, after = Recorder(), Recorder()
    trainer = build(Trainer, gained(), tmp_path, [before], max_steps=5, logging_steps=2, save_strategy="no")
    trainer.add_callback(after)
    trainer.train()

    names = gain_metrics(gain_statistics(trainer.model)).keys()
    history = trainer.state.log_history
    assert [row["step"] for row in history if "loss" in row] == [2, 4]
    for place, row in enumerate(history):
        if "loss" in row:
            assert history[place + 1].keys() == {*names, "epoch", "step"}
            assert history[place + 1]["step"] == row["step"]
    for recorder in (before, after):
        logged = [(step, row, metrics) for step, row, metrics in recorder.seen if names <= row.keys()]
        assert [step for step, _, _ in logged] == [2, 4]
        for _, row, metrics in logged:
            assert {name: row[name] for name in names} == metrics
    assert history[1]["gains/rms_from_one"] > 0


def test_the_names_in_the_log_are_the_figures():
    layer = gain_ops.GainLinear(4, 5)
    layer.delta.data = torch.tensor([0.0, -1.0, 1.0, -1.5, 0.5])
    metrics = gain_metrics(gain_statistics(layer))
    assert metrics.pop("gains/rms_from_one") == pytest.approx(0.9**0.5)
    assert metrics == {
        "gains/largest_from_one": 1.5,
        "gains/minimum": -0.5,
        "gains/maximum": 2.0,
        "gains/dead": 1,
        "gains/negative": 1,
    }
    assert gain_metrics(gain_statistics(layer, dead_below=2.5))["gains/dead"] == 5


# what is written


def test_every_checkpoint_has_its_gain_file_and_the_folder_the_last_and_a_plot(tmp_path):
    class Keep(TrainerCallback):
        def __init__(self):
            self.at = {}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.at[state.global_step] = deltas(model)

    kept = Keep()
    trainer = build(Trainer, gained(), tmp_path, [kept], plot=True)
    trainer.train()
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / "model.safetensors").is_file(), "the rest is Trainer's own"
        fresh = llama()
        gain_ops.load_gains(fresh, folder / GAIN_FILE)
        assert same(deltas(fresh), kept.at[step])
    assert same(read_gains(tmp_path / GAIN_FILE).deltas, kept.at[10])
    assert (tmp_path / GAIN_PLOT).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10", GAIN_FILE, GAIN_PLOT}


def test_the_plot_is_drawn_at_a_checkpoint_already_and_can_be_off(tmp_path):
    trainer = build(Trainer, gained(), tmp_path / "on", plot=True)
    state = TrainerState(global_step=5, is_world_process_zero=True)
    (tmp_path / "on" / "checkpoint-5").mkdir()
    callback = GainCallback(trainer)
    callback.on_save(trainer.args, state, TrainerControl(), model=trainer.model)
    assert (tmp_path / "on" / GAIN_PLOT).is_file()
    build(Trainer, gained(), tmp_path / "off", plot=False, max_steps=1).train()
    assert (tmp_path / "off" / GAIN_FILE).is_file()
    assert not (tmp_path / "off" / GAIN_PLOT).exists()


def test_matplotlib_missing_is_said_before_the_training(tmp_path, monkeypatch):
    trainer = Trainer(gained(), arguments(tmp_path), train_dataset=rows())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(ImportError, match=r'pip install "gain-ops\[cli\]", or turn it off with plot=False'):
        GainCallback(trainer)
    GainCallback(trainer, plot=False)


def test_a_hyperparameter_search_keeps_its_checkpoints_elsewhere(tmp_path):
    trainer = build(Trainer, gained(), tmp_path)
    state = TrainerState(global_step=5, is_world_process_zero=True, is_hyper_param_search=True)
    callback = GainCallback(trainer)
    callback.on_save(trainer.args, state, TrainerControl(), model=trainer.model)
    assert not list(tmp_path.iterdir())
    callback.on_train_end(trainer.args, state, TrainerControl(), model=trainer.model)
    assert {path.name for path in tmp_path.iterdir()} == {GAIN_FILE, GAIN_PLOT}


def test_a_diverged_training_ends_when_it_comes_to_save(tmp_path):
    trainer = build(GainTrainer, gained(), tmp_path)
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.down_proj.delta[3] = float("nan")
    with pytest.raises(ValueError, match=r"its delta is not finite; the training has diverged"):
        trainer.train()
    assert any(str(row.get("gains/rms_from_one")) == "nan" for row in trainer.state.log_history), (
        "the log says so first"
    )


def test_only_process_zero_writes(tmp_path):
    trainer = build(Trainer, gained(), tmp_path, plot=True)
    callback = GainCallback(trainer)
    state = TrainerState(global_step=5, is_world_process_zero=False)
    callback.on_save(trainer.args, state, TrainerControl(), model=trainer.model)
    callback.on_train_end(trainer.args, state, TrainerControl(), model=trainer.model)
    assert not list(tmp_path.iterdir())


def test_where_gains_are_sharded_the_other_processes_gather_too(tmp_path, monkeypatch):
    from torch.distributed.fsdp import fully_shard

    saved = []
    monkeypatch.setattr(integration, "save_gains", lambda model, path: saved.append(path))
    trainer = build(Trainer, gained(), tmp_path)  # before the process group: accelerate has no FSDP on a CPU
    callback = GainCallback(trainer, plot=False)
    state = TrainerState(global_step=5, is_world_process_zero=False)
    callback.on_train_end(trainer.args, state, TrainerControl(), model=trainer.model)
    assert not saved, "nothing to gather"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(trainer.model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        callback.on_train_end(trainer.args, state, TrainerControl(), model=trainer.model)
    finally:
        torch.distributed.destroy_process_group()
    assert saved == [tmp_path / integration.GAIN_FILE]
    assert not list(tmp_path.iterdir())


# checkpoints that resume


def resumed(kind, make, folder, **options):
    """A trainer that went through, and one that went on from the first's checkpoint with a model of its own."""
    through = build(kind, make(), folder / "through", **options)
    through.train()
    again = build(kind, make(), folder / "again", **options)
    again.train(resume_from_checkpoint=str(folder / "through" / "checkpoint-5"))
    return through, again


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Trainer, {}), (GainTrainer, {"bf16": True, "gradient_accumulation_steps": 2})],
    ids=["Trainer-float32", "GainTrainer-bf16"],
)
def test_a_resumed_training_has_the_same_losses_and_gains(tmp_path, kind, options):
    through, again = resumed(kind, gained, tmp_path, **options)
    assert len(losses(through)) == 10
    assert len(set(losses(through))) > 5
    assert losses(again) == losses(through)
    assert same(deltas(again.model), deltas(through.model))


def test_a_lean_checkpoint_is_kilobytes_without_the_model(tmp_path):
    trainer = build(GainTrainer, gained(), tmp_path, max_steps=5)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    checkpoint = tmp_path / "checkpoint-5"
    names = {
        "gains.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
    }
    assert {path.name for path in checkpoint.iterdir()} == names
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < LEAN_BYTES
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {GAIN_FILE, "training_args.bin"}
    assert same(read_gains(tmp_path / "saved" / GAIN_FILE).deltas, deltas(trainer.model))
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 5


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    build(GainTrainer, gained(), tmp_path, max_steps=5).train()
    trainer = build(GainTrainer, gained(), tmp_path, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert len(losses(trainer)) == 6


def test_the_best_gains_come_back_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    worst = {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the last is not the best
    training = arguments(tmp_path, max_steps=3, **options, **worst)
    trainer = GainTrainer(gained(), training, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    assert trainer.state.best_global_step < 3
    best = read_gains(Path(trainer.state.best_model_checkpoint) / GAIN_FILE).deltas
    assert same(deltas(trainer.model), best)
    assert not same(best, read_gains(tmp_path / "checkpoint-3" / GAIN_FILE).deltas)


def test_a_lean_checkpoint_is_refused_by_another_base(tmp_path):
    build(GainTrainer, gained(), tmp_path, max_steps=5).train()
    other = build(GainTrainer, gained(llama(seed=1)), tmp_path)
    with pytest.raises(GainFileError, match="trained on other weights"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_gain_file_is_refused(tmp_path):
    Trainer(gained(), arguments(tmp_path, max_steps=5), train_dataset=rows()).train()
    with pytest.raises(ValueError, match=r"checkpoint-5 has no gains.safetensors.*without GainTrainerMixin"):
        build(GainTrainer, gained(), tmp_path).train(resume_from_checkpoint=True)


def test_a_model_without_gains_or_with_more_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no gains: put them on with gain_ops.apply\(\)"):
        GainTrainer(llama(), arguments(tmp_path), train_dataset=rows())
    model = gained()
    model.lm_head.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"would lose them: lm_head.weight. Freeze them, or use the trainer without"):
        GainTrainer(model, arguments(tmp_path), train_dataset=rows())


def test_a_model_init_is_taken(tmp_path):
    trainer = GainTrainer(model_init=lambda: gained(), args=arguments(tmp_path, max_steps=1), train_dataset=rows())
    trainer.train()
    assert any(delta.any() for delta in deltas(trainer.model).values())


# quantised bases


def nf4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def bitsandbytes_int8():
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def quantised(folder, config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32)


@pytest.mark.parametrize(
    "config", [nf4, *(pytest.param(c, marks=pytest.mark.slow) for c in (bitsandbytes_int8, torchao_int8))]
)
def test_gains_train_and_resume_on_a_quantised_base(tmp_path, folder, config):
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(gained(quantised(folder, config)), arguments(tmp_path), train_dataset=rows())
    through, again = resumed(GainTrainer, lambda: gained(quantised(folder, config)), tmp_path)
    assert losses(again) == losses(through)
    assert all(delta.any() and delta.dtype == torch.float32 for delta in deltas(through.model).values())
    assert same(deltas(again.model), deltas(through.model))
    assert not through.model._hf_peft_config_loaded, "the mark was for the building alone"


def test_a_mark_that_was_there_stays(tmp_path, folder):
    model = gained(quantised(folder, nf4))
    model._hf_peft_config_loaded = True
    GainTrainer(model, arguments(tmp_path), train_dataset=rows())
    assert model._hf_peft_config_loaded


class FakeQuantizer:
    """What transformers leaves on a model, without the quantised weights."""

    is_trainable = False

    class quantization_config:
        quant_method = "some-method"

    def remove_quantization_config(self, model):
        del model.hf_quantizer
        model.is_quantized = False


def test_a_gguf_that_was_unpacked_counts_as_plain(tmp_path):
    model = gained()
    model.hf_quantizer, model.is_quantized = FakeQuantizer(), True
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(model, arguments(tmp_path), train_dataset=rows())
    GainTrainer(model, arguments(tmp_path), train_dataset=rows())
    assert not model.is_quantized


def test_a_quantisation_that_transformers_cannot_train_on_is_refused(tmp_path):
    model = gained()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(4, dtype=torch.uint8), requires_grad=False
    )
    model.hf_quantizer, model.is_quantized = FakeQuantizer(), True
    with pytest.raises(ValueError, match=r"quantised with some-method, and transformers cannot train on that"):
        GainTrainer(model, arguments(tmp_path), train_dataset=rows())


def test_trl_leaves_the_gains_of_a_quantised_base_in_float32(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from support.tiny_llama import save_tiny_llama

    class GainSFTTrainer(GainTrainerMixin, SFTTrainer):
        pass

    save_tiny_llama(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    texts = Dataset.from_list([{"text": "The quick brown fox."}] * 4)
    options = {
        "max_steps": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    model = gained(quantised(tmp_path / "tiny", nf4))
    for layer in gained_modules(model).values():
        layer.delta.data.fill_(0.1)  # no bfloat16
    before = deltas(model)
    config = SFTConfig(str(tmp_path / "out"), **options)
    trainer = GainSFTTrainer(model, config, train_dataset=texts, processing_class=tokenizer)
    assert same(deltas(model), before)
    trainer.add_callback(GainCallback(trainer, plot=False))
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "gains/dead" in row]
    assert row.keys() == {*gain_metrics(gain_statistics(trainer.model)), "epoch", "step"}, (
        "TRL's metrics are not repeated"
    )
    assert {delta.dtype for delta in deltas(model).values()} == {torch.float32}
    assert not same(deltas(model), before)


# gains that the model ignores, and TRL's reference


class Reads(torch.nn.Module):
    """A head whose weight is read, by code that apply() cannot see."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, torch.nn.Linear(96, 96)
        self.read = torch.compiler.disable(lambda name: getattr(self.head, name))

    def forward(self, input_ids, labels=None):
        logits = torch.nn.functional.linear(self.model(input_ids).logits, self.read("".join(["wei", "ght"])))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_the_callback_raises_where_a_gain_is_ignored(tmp_path):
    model = Reads(llama())
    gain_ops.apply(model, ["head", "o_proj"])
    trainer = Trainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=rows())
    trainer.add_callback(GainCallback(trainer, plot=False))
    with pytest.raises(ValueError, match="the gain on head is ignored"):
        trainer.train()


def test_the_callback_watches_one_forward(tmp_path):
    trainer = GainTrainer(gained(), arguments(tmp_path, max_steps=2, save_strategy="no"), train_dataset=rows())
    trainer.add_callback(GainCallback(trainer, plot=False))
    trainer.train()
    assert "compute_loss" not in vars(trainer)
    assert not any("forward" in vars(layer) for layer in gained_modules(trainer.model).values())


class Comparing(GainTrainer):
    """A trainer that takes the base as reference, as TRL's do."""

    def __init__(self, model, *args, ref_model=None, **kwargs):
        super().__init__(model, *args, **kwargs)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.ref_model = llama()


def test_a_reference_without_the_gains_is_warned_of(tmp_path, recwarn):
    model = gained()
    Comparing(model, arguments(tmp_path))
    assert not [warning for warning in recwarn if "compares with the base" in str(warning.message)], (
        "nothing is learned yet"
    )
    for layer in gained_modules(model).values():
        layer.delta.data.fill_(0.1)
    with pytest.warns(UserWarning, match=r"Comparing compares with the base .* absorb them"):
        Comparing(model, arguments(tmp_path))
