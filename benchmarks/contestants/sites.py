"""Where we measure: the projections of real models that take a gain, and the models' own sizes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Site:
    """A frozen linear map y [T, out] = x [T, in] @ W.T."""

    name: str
    in_features: int
    out_features: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder, as in its transformers config."""

    name: str
    model_type: str  # llama | qwen2 | gpt2
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def o_proj(self) -> Site:
        """The attention's output projection."""
        return Site(f"{self.name} o_proj", self.hidden, self.hidden)

    @property
    def up_proj(self) -> Site:
        """The FFN's first projection."""
        return Site(f"{self.name} up_proj", self.hidden, self.intermediate)

    @property
    def down_proj(self) -> Site:
        """The FFN's second projection."""
        return Site(f"{self.name} down_proj", self.intermediate, self.hidden)


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("GPT-2 Large", "gpt2", 1280, 5120, 36, 20, 20, 50257),
        Architecture("Llama-3-8B", "llama", 4096, 14336, 32, 32, 8, 128256),
        Architecture("Qwen2.5-7B", "qwen2", 3584, 18944, 28, 28, 4, 152064),
        Architecture("Llama-3-70B", "llama", 8192, 28672, 80, 64, 8, 128256),
    )
}
SITES = [site for a in ARCHITECTURES.values() for site in (a.o_proj, a.down_proj)]
SHAPES = [site for a in ARCHITECTURES.values() for site in (a.o_proj, a.up_proj, a.down_proj)]
TOKENS = [512, 2048, 8192, 32768]

# shapes that a CPU measures in seconds: those of SmolLM2-135M
SMALL = Architecture("SmolLM2-135M", "llama", 576, 1536, 30, 9, 3, 49152)
SMALL_SITES = [SMALL.o_proj, SMALL.down_proj]
SMALL_TOKENS = [256, 1024]
