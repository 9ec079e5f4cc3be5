"""Adapts a language model that no single device holds: FSDP2, gains, and nothing but PyTorch's own engines round them.

torchrun --nproc-per-node 8 examples/distributed/train.py examples/distributed/llama-3-70b.toml

The frozen weights are read by every process in its own part from the model's folder, and stay as they are stored; only the
gains, float32, have gradients, optimizer state and checkpoints. Started again, it goes on from the last checkpoint, on any
number of processes.
"""

import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gain_ops
from gain_ops.measure.marks import unmarked
from gain_ops.training.domains import cut_windows, from_path, token_stream

ONLY_GAINS = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True)
class Settings:
    """What a configuration file says; the files beside this one explain each."""

    model: str
    data: str
    out: str
    dtype: str
    targets: str
    memory: str
    checkpointing: bool
    windows: int
    length: int
    steps: int
    save_steps: int
    lr: float


def main(settings: Settings) -> None:
    """Train in the process group that torchrun describes."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    try:
        train(settings, mesh, device)
    finally:
        dist.destroy_process_group()


def train(settings: Settings, mesh: DeviceMesh, device: torch.device) -> None:
    """Put gains on the model, train them, and leave checkpoints and a gain file in ``out``."""
    if settings.windows % mesh.size():
        raise ValueError(f"windows = {settings.windows} cannot be shared out evenly to {mesh.size()} processes")
    batches = windows(settings).split(settings.windows)  # first: too little text shows before the weights are read
    model = build(settings, mesh, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, weight_decay=0.0)
    out = Path(settings.out)
    first = resume(out, model, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    for step in range(first, settings.steps):
        ids = batches[step].chunk(mesh.size())[mesh.get_rank()].to(device)
        loss = model(input_ids=unmarked(ids), labels=ids.where(ids >= 0, -100), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / mesh.size()
        dist.all_reduce(mean)
        if mesh.get_rank() == 0:
            print(f"step {step + 1} loss {mean.item():.9g}", flush=True)
        if (step + 1) % settings.save_steps == 0:
            dcp.save(state(model, optimizer), checkpoint_id=out / f"step-{step + 1}")
    gain_ops.save_gains(model, out / "gains.safetensors")


def build(settings: Settings, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """The model in shards, weights and all: none of it was ever whole on a device or in a process."""
    with init_empty_weights():  # parameters on the meta device; the rotary tables, which no file has, are computed
        config = AutoConfig.from_pretrained(settings.model)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    model.tie_weights()  # the empty parameters are new ones, each its own; a tied model's file has one of the two
    applied = gain_ops.apply(model, settings.targets, memory=settings.memory)
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)  # no mixed precision policy, so delta stays float32
    fully_shard(model, mesh=mesh)

    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    dcp.load(frozen, storage_reader=dcp.HuggingFaceStorageReader(settings.model))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.zeros_(parameter)
    if mesh.get_rank() == 0:
        print(f"{applied} on {mesh.size()} processes", flush=True)
    return model.train()


def windows(settings: Settings) -> Tensor:
    """All windows of the run, int64 [steps * windows, length], the same on any number of processes."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    count = settings.steps * settings.windows
    needed = count * settings.length
    # The windows are drawn out of four times their tokens. A token of English is about four bytes; of one that is eight,
    # sixteen a token are still more than is needed.
    text = from_path(Path(settings.data), limit=16 * needed)
    stream = token_stream(text.train, tokenizer, limit=4 * needed)
    found = cut_windows(stream, length=settings.length, count=count, seed=0)
    if len(found) < count:
        raise ValueError(f"{settings.data} has {len(found)} windows of {settings.length} tokens; {count} are needed")
    return found


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What a checkpoint holds: the gains, sharded as they are, and the optimizer's state of them."""
    gains, moments = get_state_dict(model, optimizer, options=ONLY_GAINS)
    return {"gains": gains, "optimizer": moments}


def resume(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint that was finished; the steps that it has behind it."""
    steps = [int(found.parent.name.removeprefix("step-")) for found in out.glob("step-*/.metadata")]
    last = [max(steps, default=0)]
    dist.broadcast_object_list(last)  # a shared folder may show one machine a file later than another
    if not last[0]:
        return 0
    loaded = state(model, optimizer)
    dcp.load(loaded, checkpoint_id=out / f"step-{last[0]}")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["gains"],
        optim_state_dict=loaded["optimizer"],
        options=ONLY_GAINS,
    )
    return last[0]


if __name__ == "__main__":
    main(Settings(**tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
