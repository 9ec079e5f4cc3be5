"""Studies that were never run: every figure follows from a few numbers a method, plus noise a seed."""

import math
import random
from dataclasses import replace

from gain_study.engine.records import Base, Curve, Header, Rate, Stage, Study

METHODS = {  # what a stage takes off its domain's loss, and what it adds to that of every other domain
    "gain-ffn": (0.30, -0.02),
    "lora": (0.35, 0.05),
    "full": (0.50, 0.20),
    "gain": (0.12, -0.01),
    "gain-ffn-input": (0.31, -0.03),
    "ia3": (0.20, 0.00),
    "lora-same-layers": (0.40, 0.08),
    "dora": (0.36, 0.06),
    "lora-replay": (0.33, -0.01),
    "lora-ewc": (0.25, 0.02),
}
DOMAINS = ("python", "bible", "licences", "foldoc", "jargon", "debian-policy", "manual pages", "fortunes")
HELD_OUT = "english"
STEPS = (0, 4, 8, 16, 24)


def make_study(
    methods: int = 3,
    domains: int = 2,
    seeds: int = 1,
    orders: int = 1,
    *,
    held_out: bool = True,
    tasks: tuple[str, ...] = ("boolq", "arc-easy"),
    noise: float = 0.01,
) -> Study:
    """A whole study of the first methods and domains; the second order is the first one backwards."""
    names = list(METHODS)[:methods]
    learned = list(DOMAINS[:domains])
    every = [*learned, *([HELD_OUT] if held_out else [])]
    all_orders = [learned, learned[::-1], learned[1:] + learned[:1]][:orders]
    base = Base({d: 10.0 + 3 * i for i, d in enumerate(every)}, dict.fromkeys(tasks, 0.5))
    header = Header(
        settings={
            "methods": names,
            "seeds": list(range(seeds)),
            "steps": STEPS[-1],
            "batch_tokens": 1024,
            "keep_adapters": False,
            "dtype": "float32",
        },
        model="some-model",
        model_parameters=134_515_008,
        device="some processor, 2 threads",
        environment={"gain_ops": "1", "python": "2", "torch": "3", "transformers": "4"},
        date="2026-01-02",
        orders=all_orders,
        domains={
            d: {
                "source": f"package {d}",
                "sha256": f"{i:064x}",
                "train_windows": 96 * (d != HELD_OUT),
                "validation_windows": 12,
                "window_tokens": 256,
            }
            for i, d in enumerate(every)
        },
        tasks={task: {"items": 200, "choices": 2, "source": f"package {task}"} for task in tasks},
    )
    stages = [
        stage
        for method in names
        for seed in range(seeds)
        for order, sequence in enumerate(all_orders)
        for stage in _run(method, seed, order, sequence, base, noise)
    ]
    return Study(header, base, [rate for method in names for rate in _rates(method, learned[0])], stages)


def killed(study: Study, stages: int) -> Study:
    """The study when so many stages were done."""
    return replace(study, stages=study.stages[:stages])


def renamed(study: Study, method: str, name: str) -> Study:
    """The study with another name for a method."""

    def change(record):
        return replace(record, method=name) if record.method == method else record

    names = [name if one == method else one for one in study.header.settings["methods"]]
    header = replace(study.header, settings=study.header.settings | {"methods": names})
    return replace(
        study, header=header, rates=[change(r) for r in study.rates], stages=[change(s) for s in study.stages]
    )


def _run(method, seed, order, sequence, base, noise):
    gain, drift = METHODS[method]
    chance = random.Random(f"{method} {seed} {order}")
    losses = {d: math.log(value) for d, value in base.perplexity.items()}
    for number, domain in enumerate(sequence, 1):
        before = dict(losses)
        for d in losses:
            losses[d] += (-gain if d == domain else drift) + noise * chance.gauss(0, 1)
        curve = []
        for step in STEPS:
            share = 1 - math.exp(-6 * step / STEPS[-1])
            curve.append(Curve(step, {d: math.exp(before[d] + share * (losses[d] - before[d])) for d in losses}))
        yield Stage(
            method=method,
            lr=0.01,
            seed=seed,
            order=order,
            number=number,
            domain=domain,
            perplexity={d: math.exp(loss) for d, loss in losses.items()},
            accuracy={task: value - drift / 10 * number for task, value in base.accuracy.items()},
            curve=curve,
            losses=[2.5 - gain * step / STEPS[-1] for step in range(STEPS[-1])],
            trained=34_560,
            seconds=120.0,
            tokens_per_second=204.8,
            saved_bytes=2**30,
            peak_bytes=3 * 2**30,
        )


def _rates(method, domain):
    for lr, loss in ((0.001, 2.2), (0.003, 2.1), (0.01, 2.0), (0.03, 2.15), (0.1, None)):
        yield Rate(method, lr, domain, None if loss is None else math.exp(loss - METHODS[method][0]))
