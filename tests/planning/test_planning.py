"""What is planned is what happens: counts against the allocator's peaks, and the choice that is made of them."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

from benchmarks.suites.memory import allocator_peak
from gain_ops.measure import meta_models
from gain_ops.measure.language_models import decoder_layers
from gain_ops.measure.peak_bytes import peak_bytes
from gain_ops.measure.perplexity import next_token_loss
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.planning import configs
from gain_ops.planning.configs import read_config, split_config, split_weights, with_layers
from gain_ops.planning.counts import blocks_alike, count, count_pass
from gain_ops.planning.strategies import (
    GIB,
    PLANNED,
    Job,
    Row,
    Sizes,
    gathered_at_once,
    nearest,
    recommend,
    rows,
    sizes_of,
    strategies,
)

TOKENS, LENGTH, VOCABULARY = 128, 64, 96
NAMES = [name for name, method in PLANNED.items() if method.package is None or importlib.util.find_spec(method.package)]
GENERATOR = torch.get_rng_state().nbytes  # kept by checkpointing for each block, outside of torch's dispatcher
SCALARS = 256  # numbers such as LoRA's scale become tensors of 8 bytes there too


def tiny(layers: int = 2, **sizes: int):
    from transformers import LlamaConfig

    given = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    given |= {"max_position_embeddings": LENGTH}
    return LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **(given | sizes))


def adapted(config, name: str, checkpointed: bool, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = meta_models.build(config, device, dtype)
    PLANNED[name].put(model)
    if checkpointed:
        meta_models.checkpoint(model)
    return model


class TestPeak:
    def test_a_storage_counts_from_its_making_to_its_end(self) -> None:
        x = torch.empty(1000, device="meta")

        def step() -> None:
            y = x.exp()  # 4000
            z = y.exp()  # 8000
            del y  # 4000
            w = z.view(10, 100)  # no storage of its own
            del z
            w.exp_()
            w.double()  # 12000

        assert peak_bytes(step) == 12000
        assert peak_bytes(step, exclude=[x]) == 12000
        assert peak_bytes(lambda: x.add_(1)) == 4000, "what an op returns is counted once, where it is new"
        assert peak_bytes(lambda: x.add_(1), exclude=[x]) == 0

    @pytest.mark.parametrize("checkpointed", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_the_allocators(self, name: str, checkpointed: bool) -> None:
        config = tiny()
        meta = adapted(config, name, checkpointed, "meta", torch.float32)
        counted = count_pass(meta, meta_models.random_ids(TOKENS, LENGTH, VOCABULARY), eager=True).peak
        model = adapted(config, name, checkpointed, "cpu", torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids = meta_models.random_ids(TOKENS, LENGTH, VOCABULARY, "cpu")
        real = allocator_peak(lambda: next_token_loss(model, ids).backward())
        unseen = (config.num_hidden_layers + 1) * GENERATOR if checkpointed else 0
        assert 0 <= real - counted <= unseen + SCALARS

    def test_kernels_need_no_more_than_they_return(self) -> None:
        model = adapted(tiny(), "gain-ffn, fused", False, "meta", torch.float32)
        ids = meta_models.random_ids(TOKENS, LENGTH, VOCABULARY)
        kernels, eager = count_pass(model, ids), count_pass(model, ids, eager=True)
        assert dataclasses.replace(eager, peak=kernels.peak) == kernels
        assert eager.peak > kernels.peak


@pytest.mark.parametrize("name", ["gain-ffn", "gain, lean", "full fine-tuning"])
def test_a_step_peaks_at_what_is_planned_or_its_gradients_less(name: str) -> None:
    """A gradient counts from the start, as in DDP's buckets; alone, it is not there yet when the most is alive."""
    config = tiny()
    (row,) = [
        r for r in rows(Job(config, 1, GIB, TOKENS, LENGTH, torch.float32, 0), [PLANNED[name]]) if not r.checkpointed
    ]
    model = adapted(config, name, False, "cpu", torch.float32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)
    ids = meta_models.random_ids(TOKENS, LENGTH, VOCABULARY, "cpu")

    def step() -> None:
        next_token_loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    there = sum(parameter.nbytes for parameter in model.parameters()) + 2 * sum(p.nbytes for p in trained)
    real = there + allocator_peak(step)
    assert real <= row.total <= real + sum(parameter.nbytes for parameter in trained)


# whole passes of two sizes each: those that save unlike each other in seconds, the others marked slow
TOLD = ("gain-ffn", "gain-ffn, fused, lean", "LoRA r=16")


@pytest.mark.parametrize("name", [n if n in TOLD else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_two_layers_and_three_say_what_seven_take(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        few, whole = (count(tiny(7), PLANNED[name], TOKENS, LENGTH, dtype, alike=alike) for alike in (True, False))
        assert few == whole


@pytest.mark.parametrize("name", NAMES)
def test_the_passes_of_one_model_count_as_those_of_two(name: str) -> None:
    """Nothing of the first pass, nor what is counted in it, is in the way of the second."""
    ids = meta_models.random_ids(TOKENS, LENGTH, VOCABULARY)
    counted = count(tiny(), PLANNED[name], TOKENS, LENGTH, torch.bfloat16, alike=True)
    for checkpointed in (False, True):
        model = adapted(tiny(), name, checkpointed, "meta", torch.bfloat16)
        saved = saved_bytes(lambda m=model: next_token_loss(m, ids), exclude=model, inputs=[ids]).new
        fresh = dataclasses.replace(count_pass(model, ids), saved=saved, added=counted[checkpointed].added)
        assert counted[checkpointed] == fresh


def test_blocks_that_differ_are_told() -> None:
    model = meta_models.build(tiny())
    assert blocks_alike(tiny(), model)
    model.model.layers[1].mlp.down_proj = nn.Linear(3, 4, device="meta")
    assert not blocks_alike(tiny(), model)


class TestLayers:
    def test_those_of_two_kinds_are_counted_in_full(self) -> None:
        from transformers import Gemma3TextConfig

        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
        for kinds, alike in ((["full_attention"], True), (["full_attention", "sliding_attention"], False)):
            config = Gemma3TextConfig(num_hidden_layers=6, layer_types=[*kinds * 6][:6], **sizes)
            assert blocks_alike(config, meta_models.build(config)) == alike

    def test_weights_that_follow_the_layers_are_seen(self) -> None:
        """Of two and of three layers the model is another: the counts of all cannot be told from these."""
        from transformers import Gemma4TextConfig

        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
        config = Gemma4TextConfig(
            num_hidden_layers=6, layer_types=["full_attention"] * 6, num_kv_shared_layers=2, **sizes
        )
        model = meta_models.build(config)
        whole = sum(parameter.nbytes for parameter in model.parameters())
        for row in rows(Job(config, 1, GIB, 64, 64, reserve=0), [PLANNED["full fine-tuning"]]):
            assert row.weights == whole

    def test_they_are_those_of_the_language_model(self) -> None:
        from transformers import CLIPVisionConfig, LlavaConfig

        vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=9, num_attention_heads=2, intermediate_size=4096)
        model = meta_models.build(LlavaConfig(vision_config=vision, text_config=tiny()))
        name, layers = decoder_layers(model)
        assert name == "model.language_model.layers"
        assert [type(layer).__name__ for layer in layers] == ["LlamaDecoderLayer"] * 2
        assert meta_models.blocks(model) == layers

    def test_attention_that_a_model_calls_itself_is_a_kernels(self) -> None:
        """As that which transformers calls: no [tokens, tokens] matrix is saved, also where a block is recomputed."""
        q, k = (torch.empty(1, heads, 512, 16, device="meta", requires_grad=True) for heads in (4, 2))

        def attend() -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

        with meta_models.kernel_attention():
            assert saved_bytes(attend, inputs=[q, k]).new < 2 * q.nbytes
            peak = peak_bytes(lambda: torch.utils.checkpoint.checkpoint(attend, use_reentrant=False).sum().backward())
        assert peak < 10 * q.nbytes < 4 * 512 * 512 * 4
        assert saved_bytes(attend, inputs=[q, k]).new > 4 * 512 * 512

    def test_values_of_another_size_attend_in_the_efficient_kernel(self) -> None:
        q, v = (torch.empty(1, 4, 512, size, device="meta", requires_grad=True) for size in (24, 16))
        with meta_models.kernel_attention():
            out = nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
            assert out.shape == v.shape
            out.sum().backward()
        assert (q.grad.shape, v.grad.shape) == (q.shape, v.shape)


class TestParts:
    """Of tensor parallelism."""

    def test_a_rank_holds_its_share_of_what_is_split(self) -> None:
        config = tiny()
        model = meta_models.build(config)
        part = meta_models.build(split_config(config, model, 2))
        held = split_weights(model, 2)
        local = {name: parameter.nbytes for name, parameter in part.named_parameters()}
        assert held.keys() == local.keys()
        outside = {"model.embed_tokens.weight", "lm_head.weight"}  # split as well, though their outputs are whole
        assert {name for name in held if held[name] != local[name]} == outside
        assert all(2 * held[name] == local[name] for name in outside)
        assert part.model.layers[0].self_attn.head_dim == model.model.layers[0].self_attn.head_dim

    def test_one_rank_holds_all(self) -> None:
        model = meta_models.build(tiny())
        assert split_weights(model, 1) == {name: p.nbytes for name, p in model.named_parameters()}

    def test_what_cannot_be_split_is_refused(self) -> None:
        from transformers import GPT2Config

        config = tiny()
        with pytest.raises(ValueError, match="num_key_value_heads=2 of LlamaForCausalLM is no multiple of 4"):
            split_config(config, meta_models.build(config), 4)
        config = GPT2Config(n_layer=1, n_embd=64, n_head=4)
        with pytest.raises(ValueError, match="no plan of tensor parallelism for GPT2LMHeadModel"):
            split_config(config, meta_models.build(config), 2)


class TestChoice:
    def test_strategies_come_simplest_first(self) -> None:
        config = tiny(num_attention_heads=8, num_key_value_heads=4)
        model = meta_models.build(config)
        assert [s.name for s in strategies(config, model, 1)] == ["one GPU"]
        assert [s.name for s in strategies(config, model, 4)] == ["replicated x 4", "FSDP 4", "TP 4", "TP 2 x FSDP 2"]
        eight = strategies(config, model, 8)
        assert [s.name for s in eight] == ["replicated x 8", "FSDP 8", "TP 8", "TP 4 x FSDP 2"]
        assert "num_key_value_heads=4" in eight[2].obstacle
        assert [s.name for s in strategies(config, model, 16)] == ["replicated x 16", "FSDP 16", "TP 4 x FSDP 4"]

    def test_the_first_that_fits_changes_least(self) -> None:
        def row(strategy: str, method: str, checkpointed: bool, headroom: int) -> Row:
            return Row(strategy, method, checkpointed, headroom=headroom)

        found = [
            row("replicated x 2", "gain-ffn", False, -1),
            row("replicated x 2", "gain-ffn", True, 0),
            row("replicated x 2", "gain-ffn, lean", False, 3),
            row("replicated x 2", "full fine-tuning", False, 9),
            row("FSDP 2", "gain-ffn", False, 9),
            row("FSDP 2", "gain", False, 9),
        ]
        assert recommend(found, "gain-ffn") == found[2]
        assert recommend(found[:2] + found[4:], "gain-ffn") == found[1]
        assert recommend(found, "gain") == found[5]
        assert recommend(found[:1], "gain-ffn") is None
        assert recommend([dataclasses.replace(found[2], obstacle="why")], "gain-ffn") is None

    @pytest.mark.parametrize(("tokens", "length"), [(512, 64), (256, 256), (1024, 512)])
    def test_the_nearest_that_fits_has_the_most_tokens(self, tokens: int, length: int) -> None:
        methods = [PLANNED["gain-ffn"], PLANNED["gain-ffn, lean"]]
        config = tiny(max_position_embeddings=512)
        asked = Job(config, 1, GIB, tokens, length, reserve=0)
        able = list(rows(dataclasses.replace(asked, tokens=128, length=min(length, 128)), methods))
        job = dataclasses.replace(asked, memory=min(row.total for row in able))
        found = list(rows(job, methods))
        assert recommend(found, "gain-ffn") is None
        assert nearest(job, found, "gain") is None, "none of it was counted"
        other, row = nearest(job, found, "gain-ffn")
        assert (other.gpus, row.fits) == (1, True)
        assert other.tokens >= 64
        if (more := 2 * other.tokens) < tokens:
            more = dataclasses.replace(job, tokens=more, length=min(length, more))
            assert recommend(list(rows(more, methods)), "gain-ffn") is None

    @pytest.mark.slow
    def test_more_gpus_are_the_nearest_where_the_weights_do_not_fit(self) -> None:
        methods = [PLANNED["gain-ffn"]]
        config = tiny(layers=24)
        asked = Job(config, 1, GIB, LENGTH, LENGTH, reserve=0)
        four = next(row for row in rows(dataclasses.replace(asked, gpus=4), methods) if row.strategy == "FSDP 4")
        job = dataclasses.replace(asked, memory=four.total)
        other, row = nearest(job, list(rows(job, methods)), "gain-ffn")
        assert 1 < other.gpus <= 4
        assert other.tokens == job.tokens
        assert row.fits
        job = dataclasses.replace(asked, memory=20_000)
        assert nearest(job, list(rows(job, methods)), "gain-ffn") is None

    def test_the_parts_add_up(self) -> None:
        config, ffn = tiny(), PLANNED["gain-ffn"]
        job = Job(config, 2, GIB, TOKENS, LENGTH, torch.bfloat16, 7)
        found = {(row.strategy, row.checkpointed): row for row in rows(job, [ffn])}
        assert len(found) == 2 * len({strategy for strategy, _ in found}) == 6
        for row in found.values():
            assert row.headroom == GIB - 7 - row.total
            assert row.total == row.weights + row.gathered + row.saved + row.transient + row.states
            assert row.fits
        sizes, trained = sizes_of(meta_models.build(config)), 2 * 2 * 64 * 4
        plain, sharded, split = (found[name, False] for name in ("replicated x 2", "FSDP 2", "TP 2"))
        assert (plain.weights, plain.states, plain.sent) == (sizes.weights + trained, 3 * trained, trained)
        assert (sharded.weights, sharded.states) == ((sizes.weights + trained) // 2, 3 * trained // 2)
        assert sharded.saved == plain.saved > split.saved
        assert (plain.step_tokens, sharded.step_tokens, split.step_tokens) == (2 * TOKENS, 2 * TOKENS, TOKENS)
        assert split.gathered == plain.gathered == 0 < sharded.gathered
        a, v = TOKENS * 64 * 2, TOKENS * VOCABULARY * 2  # a test of two processes counts them
        assert split.sent == a * (2 * 7 + 2) + v // 2 + trained
        assert found["TP 2", True].sent == split.sent + a * 2

    @pytest.mark.parametrize(
        ("name", "summed"),
        [("gain-ffn", 2 * 2 * 64 * 4), ("gain-ffn, fused", 0), ("full fine-tuning", 2 * 2 * 16 * 2)],
    )
    def test_tensor_parallelism_sums_the_gradients_of_what_is_whole(self, name: str, summed: int) -> None:
        from transformers import Qwen3Config

        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=2, head_dim=16, **sizes)
        job = Job(config, 2, GIB, TOKENS, LENGTH, torch.bfloat16, 0)
        (row,) = [row for row in rows(job, [PLANNED[name]]) if row.strategy == "TP 2" and not row.checkpointed]
        sums = 2 * (6 if PLANNED[name].fused else 7) + 2
        assert row.sent - TOKENS * 64 * 2 * sums - TOKENS * VOCABULARY == summed, "full: the norms of q and k"

    def test_a_large_root_is_there_twice_when_it_is_gathered(self) -> None:
        sizes = Sizes(weights=1000, root=700, block=100, layers=3)
        assert gathered_at_once(sizes, 30, 0) == 2 * 700 + 100
        assert gathered_at_once(sizes, 30, 50) == 2 * 700 + 100 - 50
        assert gathered_at_once(sizes, 30, 500) == 700 + 3 * 100 + 4 * 10
        config = tiny()
        config.vocab_size = 10_000
        large = sizes_of(meta_models.build(config))
        found = [
            row for row in rows(Job(config, 2, GIB, 8, 8, reserve=0), [PLANNED["gain"]]) if row.strategy == "FSDP 2"
        ]
        for row in found:
            gains = 64 * 4  # of a block
            assert row.gathered + row.saved + row.transient == 2 * large.root + large.block + gains

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"gpus": 0}, "gpus=0"), ({"tokens": 0}, "tokens=0"), ({"reserve": GIB}, "leaves nothing")],
    )
    def test_what_is_not_a_job_is_refused(self, change: dict[str, int], message: str) -> None:
        given = {"gpus": 1, "memory": GIB, "tokens": 64, "length": 64, "reserve": 0}
        with pytest.raises(ValueError, match=message):
            Job(tiny(), **(given | change))

    def test_tokens_that_are_no_whole_windows_are_refused(self) -> None:
        with pytest.raises(ValueError, match="100 tokens are no whole number of windows of 64"):
            Job(tiny(), 1, GIB, 100, 64, reserve=0)


PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_404_352,  # without the layer that predicts a second token, which transformers leaves out
}


class TestModels:
    @pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
    def test_the_bundled_have_their_published_parameters(self, name: str, published: int) -> None:
        assert set(configs.BUNDLED) == set(PUBLISHED)
        model = meta_models.build(read_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == published
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    def test_what_is_no_model_is_refused(self, tmp_path) -> None:
        with pytest.raises(FileNotFoundError, match="llama-3-8b"):
            read_config(str(tmp_path))

    def test_layers_of_kinds_stay_as_many(self) -> None:
        from transformers import Gemma3TextConfig

        whole = Gemma3TextConfig(num_hidden_layers=4, hidden_size=64, vocab_size=96)
        config = with_layers(whole, 3)
        assert len(config.layer_types) == len(meta_models.blocks(meta_models.build(config))) == 3
        assert whole.num_hidden_layers == len(whole.layer_types) == 4, "the caller's config is left as it was"
