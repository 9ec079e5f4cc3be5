"""Fine-tunes a chat model with TRL's SFTTrainer: gains are trained, kept in checkpoints, resumed, absorbed.

python examples/sft.py --out run                      SmolLM2-135M on questions about Python, on any machine
python examples/sft.py --out run --resume             goes on from the last checkpoint in run
python examples/sft.py --model FOLDER --data CHATS.jsonl --out run --absorbed adapted-model

A line of CHATS.jsonl is {"prompt": [{"role": "user", "content": ...}], "completion": [{"role": "assistant", ...}]}, or
another of the forms that SFTTrainer takes.
"""

import argparse
import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import gain_ops
from gain_ops.integrations.trainer import GainCallback, GainTrainerMixin
from gain_ops.training.loading import bundled_model, load_model

MODULES = (
    "bisect",
    "functools",
    "glob",
    "heapq",
    "inspect",
    "itertools",
    "json",
    "math",
    "os",
    "random",
    "re",
    "shutil",
)


class GainSFTTrainer(GainTrainerMixin, SFTTrainer):
    """SFTTrainer, with checkpoints that hold the gains instead of the model, and on a quantised base too."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example with the arguments of a command line."""
    options = _options(argv)
    loaded = load_model(options.model or bundled_model(), dtype=None, device=torch.device("cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    print(gain_ops.apply(model, options.targets))

    chats = [json.loads(line) for line in options.data.read_text().splitlines()] if options.data else _chats()
    arguments = SFTConfig(
        str(options.out),
        max_steps=options.steps,
        max_length=options.length,
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
    trainer = GainSFTTrainer(model, arguments, train_dataset=Dataset.from_list(chats), processing_class=tokenizer)
    trainer.add_callback(GainCallback(trainer))
    trainer.train(resume_from_checkpoint=options.resume)

    if options.absorbed:
        print(gain_ops.absorb(model))
        model.save_pretrained(options.absorbed)
        tokenizer.save_pretrained(options.absorbed)


def _chats() -> list[dict[str, list[dict[str, str]]]]:
    """Questions about the standard library, answered by the first paragraph of its docstrings."""
    chats = []
    for module in map(importlib.import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            answer = (inspect.getdoc(value) or "").partition("\n\n")[0]
            if inspect.isroutine(value) and answer and not name.startswith("_"):
                question = f"What does {module.__name__}.{name} do in Python?"
                chats.append(
                    {
                        "prompt": [{"role": "user", "content": question}],
                        "completion": [{"role": "assistant", "content": answer}],
                    }
                )
    return chats


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where checkpoints, gain file and plot go")
    parser.add_argument("--model", type=Path, help="a transformers folder or a GGUF file (SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="a JSON lines file of chats (made of Python's docstrings)")
    parser.add_argument("--targets", default="gain-ffn", choices=("gain", "gain-ffn"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="chats in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a chat, the rest is cut off")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    parser.add_argument("--resume", nargs="?", const=True, help="a checkpoint, or the last one in --out")
    parser.add_argument("--absorbed", type=Path, help="where to save the model with its gains folded in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
