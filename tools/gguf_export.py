"""Writes a LLaMA as one GGUF file, for llama.cpp and what is built on it; tools/merge_lora.py --gguf calls it.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names and order of the tensors are those of
llama.cpp's convert_hf_to_gguf.py for LlamaForCausalLM. llama.cpp refuses a file that has one tensor too many or too
few, and it cuts text into tokens with code of its own: so each tensor has to stand in a list, and each property of the
tokenizer has to be one that llama.cpp shares. Everything else is refused before the file is written.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from data_sample.rendering import adds_bos

KINDS = ("f32", "f16", "q8_0")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# transformers' name of a tensor of a layer, and llama.cpp's.
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What old programs saved along, and what can be computed: llama.cpp's converter leaves it out, too.
SKIPPED_ENDINGS = (".rotary_emb.inv_freq", ".attention.bias", ".attn.bias", ".masked_bias", ".attn.masked_bias")
# The regular expression by which Llama 3 cuts text into words; llama.cpp has it under the name llama-bpe.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# -------------------------------------------------------------------------------------------------------------------
# What llama.cpp would run as something else is refused
# -------------------------------------------------------------------------------------------------------------------


def check_model(config, tensor_names: set[str]) -> None:
    """Raises ValueError if llama.cpp would run something else than this model.

    Args:
        tensor_names: of the model's safetensors files.
    """
    if config.architectures != ["LlamaForCausalLM"]:
        found = ", ".join(config.architectures or ["none"])
        raise ValueError(f"only LlamaForCausalLM is written, and this is {found}; llama.cpp's convert_hf_to_gguf.py "
                         "knows more")  # fmt: skip
    if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
        raise ValueError("biases or another activation than silu are not written")
    rope_type = rope_of(config)["rope_type"]
    if rope_type not in ("default", "linear", "llama3"):
        raise ValueError(f"rope type {rope_type} is not written")
    expected = list_tensors(config)
    if config.tie_word_embeddings and HEAD not in tensor_names:
        expected.pop(HEAD)  # llama.cpp then takes the embedding for both, too
    for name in sorted(tensor_names):
        if name not in expected and not name.endswith(SKIPPED_ENDINGS):
            raise ValueError(f"llama.cpp's LLaMA has no tensor {name}, so its file would not load")
    for name in expected:
        if name not in tensor_names:
            raise ValueError(f"the model has no tensor {name}, without which llama.cpp's file would not load")


def list_tensors(config) -> dict[str, str]:
    """llama.cpp's name of each tensor of a LLaMA that is not tied, by transformers' name."""
    names = {EMBEDDING: "token_embd.weight"}
    for number in range(config.num_hidden_layers):
        for theirs, ours in LAYER_TENSORS.items():
            names[f"model.layers.{number}.{theirs}.weight"] = f"blk.{number}.{ours}.weight"
    names["model.norm.weight"] = "output_norm.weight"
    names[HEAD] = "output.weight"
    return names


def rope_of(config) -> dict:
    return {"rope_type": "default"} | dict(config.rope_parameters)


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp wants it."""

    model: str  # gpt2 (byte-level BPE) or llama (SentencePiece)
    pre: str  # llama.cpp's name for the way in which text is cut into words
    tokens: list[str]
    types: list  # gguf.TokenType of each token
    merges: list[str] | None = None  # gpt2
    scores: list[float] | None = None  # llama
    space_prefix: bool | None = None  # llama: a text begins with a space


def describe_tokenizer(tokenizer, vocab_size: int) -> Vocabulary:
    """Raises ValueError if llama.cpp does not cut text in the way of this tokenizer."""
    import gguf

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    check_bpe(model)
    check_added_tokens(spec["added_tokens"])
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has ids beyond the model's vocabulary of {vocab_size}")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # a model may have more rows than its tokenizer has tokens
    types = [gguf.TokenType.UNUSED] * vocab_size
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    for token, i in vocabulary.items():
        tokens[i] = token
        if i not in added:
            types[i] = gguf.TokenType.NORMAL
        elif added[i]:
            types[i] = gguf.TokenType.CONTROL
        else:
            types[i] = gguf.TokenType.USER_DEFINED
        if model["byte_fallback"] and i not in added and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = gguf.TokenType.BYTE
    merges = []
    for pair in model["merges"]:
        if isinstance(pair, str):
            pair = pair.split(" ")
        merges.append(pair)
    if not model["byte_fallback"]:
        pre = find_pre_tokenizer(spec)
        # A space within a byte-level token is written as another letter, so it can separate the two.
        joined = [f"{left} {right}" for left, right in merges]
        return Vocabulary("gpt2", pre, tokens, types, merges=joined)
    space_prefix = find_space_prefix(spec)
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    # llama.cpp joins the pair with the highest score first, which is the order of the merges.
    rank = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    scores = [-float(rank.get(token, 0)) for token in tokens]
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=space_prefix)


def check_bpe(model: dict) -> None:
    """Raises ValueError for a tokenizer's model that llama.cpp does not have, or has without one of its options."""
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']} is not written, only BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its tokenizer has {name} {model[name]!r}, which llama.cpp does not do")


def check_added_tokens(added_tokens: list[dict]) -> None:
    """Raises ValueError for added tokens that are found in another way than letter by letter."""
    for token in added_tokens:
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise ValueError(f"its tokenizer's token {token['content']!r} has {name}, which llama.cpp does not do")


def pre_tokenizer_steps(spec: dict) -> list[dict]:
    steps = spec["pre_tokenizer"] or {}
    if "pretokenizers" in steps:
        return steps["pretokenizers"]
    if steps:
        return [steps]
    return []


def find_pre_tokenizer(spec: dict) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer cuts text into words.

    Raises:
        ValueError: it has none.
    """
    if spec.get("normalizer") is not None:
        raise ValueError(f"its tokenizer changes text by {spec['normalizer']['type']} first, which llama.cpp does not "
                         "do")  # fmt: skip
    steps = pre_tokenizer_steps(spec)
    for step in steps:
        if step.get("add_prefix_space"):
            raise ValueError("its tokenizer has add_prefix_space, which llama.cpp does not do")
    kinds = [step["type"] for step in steps]
    ignores_merges = bool(spec["model"].get("ignore_merges"))
    name = None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not ignores_merges:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and not ignores_merges:
        if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and ignores_merges:
        cut = steps[0]
        is_llama_3 = cut["pattern"].get("Regex") == LLAMA_3_WORDS and cut["behavior"] == "Isolated"
        if is_llama_3 and not cut["invert"] and not steps[1]["use_regex"]:
            name = "llama-bpe"
    if name is None:
        raise ValueError(f"its tokenizer cuts text by {', '.join(kinds) or 'nothing'}, for which no name of "
                         "llama.cpp's is known here; its convert_hf_to_gguf.py knows more")  # fmt: skip
    return name


def find_space_prefix(spec: dict) -> bool:
    """Whether SentencePiece's tokenizer puts a space before a text.

    Raises:
        ValueError: it changes text in another way than by writing spaces as U+2581.
    """
    replace_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend_space = {"type": "Prepend", "prepend": "\u2581"}
    normalizer = spec.get("normalizer")
    changes = []
    if normalizer is not None:
        changes = normalizer.get("normalizers", [normalizer])
    steps = pre_tokenizer_steps(spec)
    if changes and not steps:
        if changes == [prepend_space, replace_spaces]:
            return True
        if changes == [replace_spaces]:
            return False
    if len(steps) == 1 and not changes:
        step = steps[0]
        is_plain = step["type"] == "Metaspace" and step["replacement"] == "\u2581" and not step.get("split", True)
        if is_plain:
            return step["prepend_scheme"] != "never"
    names = [part["type"] for part in [*changes, *steps]]
    raise ValueError(f"its tokenizer changes text by {', '.join(names) or 'nothing'}, which llama.cpp does not do in "
                     "the same way; its convert_hf_to_gguf.py knows more")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Tensor:
    name: str  # llama.cpp's
    shape: tuple[int, ...]
    quantization: object  # gguf.GGMLQuantizationType
    read: Callable[[], np.ndarray]  # the values, as float32

    @property
    def num_bytes(self) -> int:
        import gguf

        if self.quantization.name == "Q8_0":
            return math.prod(gguf.quant_shape_to_byte_shape(self.shape, self.quantization))
        bytes_of_number = {"F16": 2, "F32": 4}[self.quantization.name]
        return math.prod(self.shape) * bytes_of_number


def write(folder: Path, path: Path, kind: str, name: str) -> None:
    """Writes the model in `folder` as one GGUF file, tensor by tensor.

    Args:
        kind: f32, f16, or q8_0, which has 8 bits and a scale for each 32 weights.
        name: of the model, for those who look into the file.
    """
    import gguf

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer, folder, config)
    tensors = list(read_tensors(folder, config, kind))
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=tensor.quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        with np.errstate(over="ignore"):
            array = gguf.quantize(tensor.read(), tensor.quantization)
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"--gguf {kind}: {tensor.name} has values beyond float16's range; choose f32")
        writer.write_tensor_data(array)
    writer.close()


def add_shape(writer, config) -> None:
    """Sizes and rotary embedding, under llama.cpp's names."""
    import gguf

    rope = rope_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size_of_head(config))
    writer.add_value_length(size_of_head(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size_of_head(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def size_of_head(config) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def read_tensors(folder: Path, config, kind: str) -> Iterator[Tensor]:
    """Yields every tensor of the file; nothing is read before its `read` is called."""
    import gguf

    types = gguf.GGMLQuantizationType
    if rope_of(config)["rope_type"] == "llama3":
        factors = llama3_factors(config)
        yield Tensor("rope_freqs.weight", factors.shape, types.F32, lambda: factors)
    names = list_tensors(config)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                if name not in names:
                    continue
                shape = tuple(file.get_slice(name).get_shape())
                quantization = types.F16
                if kind == "f32" or len(shape) == 1:  # vectors stay float32
                    quantization = types.F32
                elif kind == "q8_0" and shape[-1] % 32 == 0:
                    quantization = types.Q8_0
                yield Tensor(names[name], shape, quantization, make_reader(shard, name, config))


def make_reader(shard: Path, name: str, config) -> Callable[[], np.ndarray]:
    """A function that reads one tensor as float32, with queries and keys in llama.cpp's order.

    transformers turns the first half of a head's dimensions with the second, llama.cpp (as Meta) each with its
    neighbour: the rows of each head are interleaved.
    """
    num_heads = None
    if name.endswith("self_attn.q_proj.weight"):
        num_heads = config.num_attention_heads
    elif name.endswith("self_attn.k_proj.weight"):
        num_heads = config.num_key_value_heads

    def read() -> np.ndarray:
        with safe_open(shard, "pt") as file:
            values = file.get_tensor(name).float().numpy()
        if num_heads is None:
            return values
        halves = values.reshape(num_heads, 2, len(values) // num_heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    return read


def llama3_factors(config) -> np.ndarray:
    """By how much llama.cpp divides each rotary frequency of Llama 3.1 and later; transformers does it by a formula."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = size_of_head(config)
    plain = 1 / rope_of(config)["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def add_tokenizer(writer, tokenizer, folder: Path, config) -> None:
    """Vocabulary, special tokens and chat template."""
    vocabulary = describe_tokenizer(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            add_token_id = getattr(writer, f"add_{kind}_token_id")
            add_token_id(token_id)
    for stop_id in other_stop_ids(tokenizer, folder):
        writer.add_eot_token_id(stop_id)  # Llama 3 ends a turn with another token than a text
        break
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    template = default_chat_template(tokenizer)
    if template:
        writer.add_chat_template(template)


def other_stop_ids(tokenizer, folder: Path) -> list[int]:
    """The stop ids of generation_config.json besides the tokenizer's EOS."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    stop_ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    if not isinstance(stop_ids, list):
        return []
    return [stop_id for stop_id in stop_ids if stop_id != tokenizer.eos_token_id]


def default_chat_template(tokenizer) -> str | None:
    """The chat template; of several, the one that transformers uses when none is asked for."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default")
    return template
