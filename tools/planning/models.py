"""The shapes of models: a few by name, others from their config.json."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """The shape of a LLaMA-like decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 0  # 0: hidden / heads

    @property
    def attention_width(self) -> int:
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's seven matrices: query, key, value, output, gate, up, down."""
        h, f, a = self.hidden, self.intermediate, self.attention_width
        kv = a * self.kv_heads // self.heads
        return [(h, a), (h, kv), (h, kv), (a, h), (h, f), (h, f), (f, h)]

    @property
    def layer_params(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    @property
    def root_params(self) -> int:
        """Embedding, final norm and head: what FSDP keeps together, outside of the layers."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + self.root_params

    def lora_params(self, rank: int) -> int:
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


MODELS = {
    "llama-7b": Model(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Model(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": Model(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Model(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": Model(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Model(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": Model(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": Model(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Model(8192, 28672, 80, 64, 8, 128256),
    "llama-3.2-1b": Model(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": Model(3072, 8192, 28, 24, 8, 128256, tied=True),
}


def load_model(name: str) -> Model:
    """The shape of a named model, or of config.json, or of the folder that holds it.

    Raises:
        ValueError: the name is unknown, or the file is not the configuration of a dense LLaMA-like decoder.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"--model {name}: no such file; name a config.json, or one of {', '.join(MODELS)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if any("expert" in key for key in config):
            raise ValueError("a mixture of experts")
        return Model(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            head_dim=config.get("head_dim") or 0,
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"--model {name}: not a dense LLaMA-like configuration ({problem})") from None
