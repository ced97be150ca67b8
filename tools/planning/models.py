"""The shapes of models: many by name, any other from its configuration."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """The shape of a LLaMA-like decoder: grouped-query attention, and an MLP of three matrices."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False  # the output layer's matrix is the embedding's
    head_dim: int = 0  # 0: hidden / heads
    sliding_window: int = 0  # a token sees so many tokens at most; 0: all before it
    sliding_layers: int = 0  # layers with the window
    # Parameters of a layer beside its matrices and two norms: biases, and norms of queries and keys.
    extra_layer_params: int = field(default=0, compare=False)

    @property
    def attention_width(self) -> int:
        """Values of a token's queries, over all heads."""
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """Values of a token's keys, and as many of its values."""
        return self.attention_width * self.kv_heads // self.heads

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's seven matrices, by transformers' names."""
        hidden = self.hidden
        intermediate = self.intermediate
        return {
            "q_proj": (hidden, self.attention_width),
            "k_proj": (hidden, self.kv_width),
            "v_proj": (hidden, self.kv_width),
            "o_proj": (self.attention_width, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
        }

    @cached_property
    def layer_matrix_params(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def layer_params(self) -> int:
        return self.layer_matrix_params + 2 * self.hidden + self.extra_layer_params

    @property
    def head_params(self) -> int:
        """The output layer's matrix, or the embedding's: they are of one size."""
        return self.vocab * self.hidden

    @property
    def root_params(self) -> int:
        """Embedding, final norm and output layer: what stands outside of the layers."""
        if self.tied:
            return self.head_params + self.hidden
        return 2 * self.head_params + self.hidden

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + self.root_params

    def lora_params(self, rank: int, targets: tuple[str, ...] = MATRICES) -> int:
        """Parameters of LoRA's pairs of matrices on these targets in all layers."""
        each_layer = 0
        for name in targets:
            inputs, outputs = self.matrices[name]
            each_layer += rank * (inputs + outputs)
        return self.layers * each_layer

    def keys_of_a_token(self, length: int) -> float:
        """The keys that a query of a document of `length` tokens attends to: on average, causal, over all layers."""
        full = (length + 1) / 2
        window = self.sliding_window
        if window == 0 or length <= window:
            return full
        # The first `window` tokens see half as many on average, all others the whole window.
        slid = (window * (window + 1) / 2 + (length - window) * window) / length
        return (slid * self.sliding_layers + full * (self.layers - self.sliding_layers)) / self.layers


def llama(hidden, intermediate, layers, heads, kv_heads, vocab, tied=False, head_dim=0, extra=0) -> Model:
    return Model(hidden, intermediate, layers, heads, kv_heads, vocab, tied, head_dim, extra_layer_params=extra)


def qwen2(hidden, intermediate, layers, heads, kv_heads, vocab, tied=False) -> Model:
    """Qwen 2 and 2.5: biases on queries, keys and values."""
    biases = hidden + 2 * hidden * kv_heads // heads
    return llama(hidden, intermediate, layers, heads, kv_heads, vocab, tied, extra=biases)


def qwen3(hidden, intermediate, layers, heads, kv_heads, tied=False) -> Model:
    """Heads of 128, and norms of queries and keys."""
    return llama(hidden, intermediate, layers, heads, kv_heads, 151936, tied, head_dim=128, extra=2 * 128)


MODELS = {
    "llama-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": llama(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": llama(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": llama(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": llama(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": llama(16384, 53248, 126, 128, 8, 128256),
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": llama(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-3.3-70b": llama(8192, 28672, 80, 64, 8, 128256),
    "smollm2-135m": llama(576, 1536, 30, 9, 3, 49152, tied=True),
    "tinyllama-1.1b": llama(2048, 5632, 22, 32, 4, 32000),
    "mistral-7b": llama(4096, 14336, 32, 32, 8, 32000),
    "mistral-7b-v0.3": llama(4096, 14336, 32, 32, 8, 32768),
    "mistral-nemo-12b": llama(5120, 14336, 40, 32, 8, 131072, head_dim=128),
    "mistral-small-24b": llama(5120, 32768, 40, 32, 8, 131072, head_dim=128),
    "mistral-large-123b": llama(12288, 28672, 88, 96, 8, 32768),
    "yi-34b": llama(7168, 20480, 60, 56, 8, 64000),
    "qwen2.5-0.5b": qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-3b": qwen2(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": qwen2(5120, 13824, 48, 40, 8, 152064),
    "qwen2.5-32b": qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": qwen3(5120, 25600, 64, 64, 8),
}


def load_model(name: str) -> Model:
    """The shape of a named model, of a folder, of a config.json, or of a model on the hub.

    Raises:
        ValueError: there is no such model, or it is not a dense LLaMA-like decoder.
    """
    if name in MODELS:
        return MODELS[name]
    from transformers import AutoConfig  # half a second, not paid for a model that is known by name

    path = Path(name)
    if path.name == "config.json":
        path = path.parent
    looks_like_a_path = name.startswith((".", "/", "~", "models/", "outputs/")) or name.count("/") != 1
    if looks_like_a_path and not path.is_dir():
        raise ValueError(f"no such folder; name a folder with config.json, a hub id, or one of {', '.join(MODELS)}")
    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, AttributeError) as problem:
        raise ValueError(f"its configuration cannot be read ({str(problem).splitlines()[0]})") from None
    return from_config(config)


def from_config(config) -> Model:
    """The shape that a configuration of transformers describes; that of the text part, where there are several.

    Raises:
        ValueError: it is a mixture of experts, or its layers have other matrices than those of LLaMA.
    """
    config = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if (getattr(config, name, None) or 0) > 1:
            raise ValueError(
                f"a mixture of experts ({name} {getattr(config, name)}): each token computes with a part of the "
                "weights, which this plan does not know; the toolkit's scripts are measured with dense models only"
            )
    sizes = {}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        sizes[name] = getattr(config, name, None)
        if not isinstance(sizes[name], int):
            raise ValueError(f"not a LLaMA-like decoder: its configuration has no {name} ({config.model_type})")
    window, sliding_layers = read_sliding_window(config)
    model = Model(
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=getattr(config, "num_key_value_heads", None) or sizes["num_attention_heads"],
        vocab=sizes["vocab_size"],
        tied=config.tie_word_embeddings,
        head_dim=getattr(config, "head_dim", None) or 0,
        sliding_window=window,
        sliding_layers=sliding_layers,
    )
    extra = (count_params(config) - model.params) / model.layers
    if abs(extra) > 0.02 * model.layer_params:
        raise ValueError(f"not a LLaMA-like decoder: a layer has {extra:+,.0f} parameters beside its seven matrices "
                         f"({config.model_type})")  # fmt: skip
    return replace(model, extra_layer_params=round(extra))


def read_sliding_window(config) -> tuple[int, int]:
    """(window, layers that have it); (0, 0) where each token sees all before it."""
    window = getattr(config, "sliding_window", None) or 0
    if window == 0 or getattr(config, "use_sliding_window", True) is False:
        return 0, 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return window, config.num_hidden_layers
    return window, layer_types.count("sliding_attention")


def count_params(config) -> int:
    """Parameters of transformers' model with this configuration, which is made without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()
