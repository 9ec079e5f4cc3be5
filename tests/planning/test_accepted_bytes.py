"""What a block saves for backward, and the peak of its pass, by method and model: committed, and it may not grow."""

from pathlib import Path

import torch
import transformers

from benchmarks.contestants import models
from benchmarks.contestants.sites import ARCHITECTURES
from gain_ops.measure import meta_models
from gain_ops.planning.counts import count_pass
from gain_ops.planning.strategies import PLANNED

from support.accepted import hold

TOKENS = 1024
VERSIONS = "-".join(
    f"{package.__name__}-{'.'.join(package.__version__.split('.')[:2])}" for package in (torch, transformers)
)


def test_neither_saved_bytes_nor_peaks_grow() -> None:
    found = {}
    for architecture in (ARCHITECTURES["Llama-3-8B"], ARCHITECTURES["GPT-2 Large"]):
        for name, method in PLANNED.items():
            if method.fused and architecture.model_type not in models.GATED:
                continue
            for checkpointed in (False, True):
                model = models.build(architecture, layers=1, vocabulary=1024)
                method.put(model)
                if checkpointed:
                    meta_models.checkpoint(model)
                counts = count_pass(model, models.tokens_of(architecture, TOKENS, 1024, "meta"))
                way = "recomputed" if checkpointed else "saved"
                found[f"{architecture.name}, {name}, block {way}"] = [counts.saved, counts.peak]
    hold(Path(__file__).with_name(f"bytes-{VERSIONS}.json"), "bytes saved for backward, bytes at the peak", found)
