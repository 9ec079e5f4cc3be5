"""A training that torchrun's elastic agent can start again: it goes on from the last whole checkpoint.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 elastic_training.py FOLDER STEP

Rank 1 is killed before the checkpoint after STEP, once. losses.txt in FOLDER gets a line "restarts step loss" for each step.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import gain_ops

STEPS = 10
EVERY = 3  # steps from one checkpoint to the next
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class Block(nn.Module):
    """x + down(silu(up(x)))"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def run(folder: Path, die_after: int | None = None) -> None:
    """Train on this process's half of each batch, from the last whole checkpoint on; the gains go to FOLDER/gains."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    gain_ops.apply(model, ["down"])
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    # .metadata is written last
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done:
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=OPTIONS)

    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    for step in range(done, STEPS):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).chunk(mesh.size())[mesh.get_rank()]
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with (folder / "losses.txt").open("a") as log:
                log.write(f"{restarts} {step} {loss.item()!r}\n")
        if (step + 1) % EVERY == 0:
            if step + 1 == die_after and restarts == 0 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(step + 1))
    gain_ops.save_gains(model, folder / "gains")


if __name__ == "__main__":
    store, rank, world_size = next(dist.rendezvous("env://"))
    # the agent keeps its store: a process that is started again would find the addresses of those before it
    # (pytorch issue 135712)
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    run(Path(sys.argv[1]), int(sys.argv[2]))
    dist.destroy_process_group()
    # gloo's threads live on, as DTensor's caches hold the group, and may abort an interpreter that ends under them
    os._exit(0)
