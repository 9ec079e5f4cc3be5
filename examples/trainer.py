"""Adapts a language model to text with transformers' Trainer: gains are trained, kept in checkpoints, resumed, absorbed.

python examples/trainer.py --out run                      SmolLM2-135M on Python source, on any machine
python examples/trainer.py --out run --resume             goes on from the last checkpoint in run
python examples/trainer.py --model FOLDER --data TEXTS --out run --absorbed adapted-model
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import gain_ops
from gain_ops.integrations.trainer import GainCallback, GainTrainerMixin
from gain_ops.measure.marks import unmarked
from gain_ops.training.domains import cut_windows, from_path, python_source, token_stream
from gain_ops.training.loading import bundled_model, load_model


class GainTrainer(GainTrainerMixin, Trainer):
    """Trainer, with checkpoints that hold the gains instead of the model, and on a quantised base too."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example with the arguments of a command line."""
    options = _options(argv)
    loaded = load_model(options.model or bundled_model(), dtype=None, device=torch.device("cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    print(gain_ops.apply(model, options.targets))

    domain = from_path(options.data) if options.data else python_source()
    windows = options.steps * options.batch_size
    stream = token_stream(domain.train, tokenizer, limit=4 * windows * options.length)
    rows = [  # a prompt's tokens are marked, below 0: they are read, and have no label
        {"input_ids": unmarked(ids), "labels": ids.where(ids >= 0, -100)}
        for ids in cut_windows(stream, length=options.length, count=windows, seed=0)
    ]

    arguments = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=0.0,  # decay would pull the gains to 1
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 5,
        logging_steps=1,
        save_steps=options.save_steps,
        report_to=options.report_to,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # or torchrun would start trainers that know nothing of each other
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = GainTrainer(model, arguments, train_dataset=rows)
    trainer.add_callback(GainCallback(trainer))
    trainer.train(resume_from_checkpoint=options.resume)

    if options.absorbed:
        print(gain_ops.absorb(model))
        model.save_pretrained(options.absorbed)
        tokenizer.save_pretrained(options.absorbed)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints, gain file and plot go")
    parser.add_argument("--model", type=Path, help="a transformers folder or a GGUF file (SmolLM2-135M)")
    parser.add_argument(
        "--data", type=Path, help="a text or data file, or a folder of them (the standard library's source)"
    )
    parser.add_argument("--targets", default="gain-ffn", choices=("gain", "gain-ffn"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    parser.add_argument("--resume", nargs="?", const=True, help="a checkpoint, or the last one in --out")
    parser.add_argument("--absorbed", type=Path, help="where to save the model with its gains folded in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
