"""Converts Meta's LLaMA checkpoints (params.json, consolidated.*.pth, tokenizer.model) to the Hugging Face format and
proves what it wrote.

Choose it when you have the weights as Meta hands them out: LLaMA 1, Llama 2, Code Llama, and Llama 3 to 3.3 (text).
It needs little memory, however large the model is: weights are copied block by block, and the check runs layer by
layer.

    python convert_llama_weights_to_hf.py --input_dir Llama3.1-8B-Instruct --output_dir models/Llama-3.1-8B-Instruct

Writes into --output_dir the model, its tokenizer and conversion_report.json: how closely an independent computation on
Meta's shards and transformers' layers on the new files agree, and the SHA-256 of every file. All of it appears at once
when it is complete; until then it lies in a folder whose name ends in .incomplete.

The way back is tools/convert_hf_to_meta.py. It imports from here what both directions must agree on: the table of
weights, the meaning of params.json, and the proof.

The formulas are those of LLaMA (arXiv 2302.13971), rotary embedding (2104.09864) and grouped-query attention
(2305.13245). The scaled frequencies and the layout of the shards are those of Meta's llama-models repository.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import math
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import regex
import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, HfArgumentParser, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
BYTES_OF_UNIT = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What is copied at once. A block that does not fit the processor's cache takes longer.
BLOCK_BYTES = 2**22
# Both sides of the proof compute in float32 with the same numbers; they differ by the order of their sums.
TOLERANCE = 1e-3
REPORT = "conversion_report.json"


@dataclass
class Arguments:
    input_dir: str = field(metadata={"help": "folder of Meta's download"})
    output_dir: str = field(metadata={"help": "folder for the result; it must not exist, or be empty"})
    dtype: str = field(
        default="auto",
        metadata={"help": "of the written weights; auto: as they are", "metavar": "bfloat16|float16|float32|auto"},
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "largest .safetensors file, such as 5GB or 500MB"})
    verify: bool = field(
        default=True, metadata={"help": "compare all values and an independent computation, and hash all files"}
    )
    tokenizer_only: bool = field(default=False, metadata={"help": "convert tokenizer.model and nothing else"})
    rope_scaling_factor: float | None = field(
        default=None, metadata={"help": "of Llama 3.1 and later; default: 32 if the output is tied, else 8"}
    )
    instruct: bool | None = field(
        default=None,
        metadata={"help": "with chat template and stop ids; default: as the folder's name says (Instruct, chat)"},
    )


# -------------------------------------------------------------------------------------------------------------------
# What params.json means
# -------------------------------------------------------------------------------------------------------------------

# The entries that are understood. One that is not here might change what the weights mean.
INTEGER_PARAMS = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"]
NUMBER_PARAMS = ["norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"]
OTHER_PARAMS = ["vocab_size", "use_scaled_rope", "max_batch_size", "max_seq_len"]
REQUIRED_PARAMS = ["dim", "n_layers", "n_heads"]
# Entries of other models of Meta's, and what they mean (llama-models: sku_list.py, llama3/args.py, llama4/args.py).
QUANTIZED = "a quantized model; take the release in bfloat16"
VISION = "a vision model; take transformers' convert_mllama_weights_to_hf.py"
LLAMA4 = "a Llama 4; take transformers' convert_llama4_weights_to_hf.py"
PRUNED = "a pruned model (Llama Guard 3 1B INT4), which is not converted"
FOREIGN_PARAMS = {
    "quantization_args": QUANTIZED,
    "lora_args": QUANTIZED,
    "vision_chunk_size": VISION,
    "vision_max_num_chunks": VISION,
    "vision_num_cross_attention_layers": VISION,
    "vision_model": VISION,
    "moe_args": LLAMA4,
    "vision_args": LLAMA4,
    "ffn_exp": LLAMA4,
    "use_qk_norm": LLAMA4,
    "nope_layer_interval": LLAMA4,
    "attention_chunk_size": LLAMA4,
    "hidden_dim": PRUNED,
}


def read_params(folder: Path) -> dict:
    """The content of params.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds an entry that is unknown or has a wrong type.
    """
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError("no params.json in it; name the folder that Meta's download made") from None
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise ValueError("params.json is not a JSON object; download it again")
    check_params(model_params(params))
    return params


def model_params(params: dict) -> dict:
    """The entries of the model, which stand under "model" in some files."""
    if list(params) == ["model"] and isinstance(params["model"], dict):
        return params["model"]
    return params


def check_params(params: dict) -> None:
    known = {*INTEGER_PARAMS, *NUMBER_PARAMS, *OTHER_PARAMS}
    # A null means that Meta's code takes its default.
    stated = {name: value for name, value in params.items() if value is not None}
    unknown = sorted(stated.keys() - known)
    for name in unknown:
        if name in FOREIGN_PARAMS:
            raise ValueError(f"params.json has {name}: it is of {FOREIGN_PARAMS[name]}")
    if unknown:
        raise ValueError(f"params.json has {', '.join(unknown)}, which is unknown here; take another model")
    wrong = []
    for name in REQUIRED_PARAMS:
        if name not in stated:
            wrong.append(name)
    for name, value in stated.items():
        if name in INTEGER_PARAMS and not (type(value) is int and value > 0):
            wrong.append(name)
        if name in NUMBER_PARAMS and not (type(value) in (int, float) and 0 < value < math.inf):
            wrong.append(name)
        if name == "vocab_size" and type(value) is not int:
            wrong.append(name)
        if name == "use_scaled_rope" and type(value) is not bool:
            wrong.append(name)
    if wrong:
        raise ValueError(f"params.json has no number, or a wrong one, for {', '.join(wrong)}; download it again")


def config_of_params(
    params: dict, vocab_size: int, tied: bool, scaling_factor: float | None, dtype: torch.dtype | None = None
) -> LlamaConfig:
    """The configuration that params.json states, with the defaults of the code that Meta published with it.

    Args:
        params: the content of params.json.
        vocab_size: tokens; LLaMA 1 and 2 do not state it.
        tied: whether the output layer is the embedding.
        scaling_factor: of the scaled frequencies, where it is not the one that Meta's code has for this generation.
        dtype: of Meta's weights. It helps to tell LLaMA 1 from Llama 2, whose contexts no file states.
    """
    rope = rope_of_params(params, tied, scaling_factor)
    num_heads = params["n_heads"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=params["dim"],
        intermediate_size=feed_forward_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=params.get("n_kv_heads") or num_heads,
        max_position_embeddings=context_of_params(params, rope, dtype),
        rms_norm_eps=norm_eps_of_params(params),
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )


def feed_forward_size(params: dict) -> int:
    """Rows of w1 and w3, rounded up to a multiple of multiple_of (llama-models, models/llama3/model.py)."""
    size = int(8 * params["dim"] / 3)
    size = int((params.get("ffn_dim_multiplier") or 1) * size)
    multiple_of = params.get("multiple_of") or 256
    return math.ceil(size / multiple_of) * multiple_of


def norm_eps_of_params(params: dict) -> float:
    return params.get("norm_eps") or 1e-5


def rope_of_params(params: dict, tied: bool, scaling_factor: float | None) -> dict:
    theta = float(params.get("rope_theta") or 10000)
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    # Meta's files do not state the factor. The small models of Llama 3.2, whose output is tied, have another one.
    factor = scaling_factor or params.get("rope_scaling_factor")
    if factor is None and tied:
        factor = 32
    elif factor is None:
        factor = 8
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def context_of_params(params: dict, rope: dict, dtype: torch.dtype | None) -> int:
    """Tokens that the generation was trained on, told by the frequencies and the dtype."""
    if rope["rope_type"] == "llama3":
        return 131072
    if rope["rope_theta"] == 500000:  # Llama 3
        return 8192
    if rope["rope_theta"] != 10000:  # Code Llama
        return 16384
    if dtype == torch.float16:  # LLaMA 1
        return 2048
    if dtype != torch.bfloat16 and norm_eps_of_params(params) < 1e-5:  # LLaMA 1 in another dtype
        return 2048
    return 4096


# -------------------------------------------------------------------------------------------------------------------
# Under which name, in which shape and how divided each side keeps a weight
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    meta_name: str
    hf_name: str
    shape: tuple[int, ...]
    # The dimension that Meta's shards divide. None: every shard holds all of it.
    split_dim: int | None = None
    # Meta's layout pairs the rows 2i and 2i + 1 of a head, Hugging Face's i and i + head_dim / 2.
    is_rotary: bool = False
    # Key and value heads are not cut: where they are fewer than the shards, neighbours hold copies of a head.
    num_kv_heads: int | None = None

    def num_parts(self, num_shards: int) -> int:
        """Into how many different pieces `num_shards` shards divide it."""
        if self.split_dim is None:
            return 1
        if self.num_kv_heads is None:
            return num_shards
        return min(num_shards, self.num_kv_heads)

    def piece_shape(self, num_shards: int) -> list[int]:
        shape = list(self.shape)
        if self.split_dim is not None:
            shape[self.split_dim] //= self.num_parts(num_shards)
        return shape


def list_weights(config: LlamaConfig, vocabulary_parallel: bool, output_stored: bool) -> list[Weight]:
    """All weights in Meta's order.

    Args:
        vocabulary_parallel: the shards divide the embedding by tokens (Llama 3), not by columns (LLaMA 1 and 2).
        output_stored: Meta's files hold the output layer. A tied one is missing in some, and is a copy in others.
    """
    dim = config.hidden_size
    table = (config.vocab_size, dim)
    embedding_split = 1
    if vocabulary_parallel:
        embedding_split = 0
    weights = [Weight("tok_embeddings.weight", "model.embed_tokens.weight", table, embedding_split)]
    for i in range(config.num_hidden_layers):
        weights += list_layer_weights(config, i)
    weights.append(Weight("norm.weight", "model.norm.weight", (dim,)))
    output_name = "lm_head.weight"
    if config.tie_word_embeddings:
        output_name = "model.embed_tokens.weight"
    if output_stored:
        weights.append(Weight("output.weight", output_name, table, 0))
    return weights


def list_layer_weights(config: LlamaConfig, layer: int) -> list[Weight]:
    dim = config.hidden_size
    ffn = config.intermediate_size
    num_kv = config.num_key_value_heads
    kv_shape = (num_kv * config.head_dim, dim)
    meta = f"layers.{layer}"
    hf = f"model.layers.{layer}"
    return [
        Weight(f"{meta}.attention.wq.weight", f"{hf}.self_attn.q_proj.weight", (dim, dim), 0, True),
        Weight(f"{meta}.attention.wk.weight", f"{hf}.self_attn.k_proj.weight", kv_shape, 0, True, num_kv),
        Weight(f"{meta}.attention.wv.weight", f"{hf}.self_attn.v_proj.weight", kv_shape, 0, False, num_kv),
        Weight(f"{meta}.attention.wo.weight", f"{hf}.self_attn.o_proj.weight", (dim, dim), 1),
        Weight(f"{meta}.feed_forward.w1.weight", f"{hf}.mlp.gate_proj.weight", (ffn, dim), 0),
        Weight(f"{meta}.feed_forward.w2.weight", f"{hf}.mlp.down_proj.weight", (dim, ffn), 1),
        Weight(f"{meta}.feed_forward.w3.weight", f"{hf}.mlp.up_proj.weight", (ffn, dim), 0),
        Weight(f"{meta}.attention_norm.weight", f"{hf}.input_layernorm.weight", (dim,)),
        Weight(f"{meta}.ffn_norm.weight", f"{hf}.post_attention_layernorm.weight", (dim,)),
    ]


def check_division(config: LlamaConfig, weights: list[Weight], num_shards: int, remedy: str) -> None:
    """Raises ValueError where heads and weights cannot be divided evenly among the shards."""
    num_heads = config.num_attention_heads
    num_kv = config.num_key_value_heads
    remainders = [
        config.hidden_size % num_heads,
        config.head_dim % 2,
        num_heads % num_kv,
        num_heads % num_shards,
        max(num_shards, num_kv) % min(num_shards, num_kv),
    ]
    for weight in weights:
        if weight.split_dim is not None:
            remainders.append(weight.shape[weight.split_dim] % weight.num_parts(num_shards))
    if any(remainders):
        raise ValueError(
            f"{num_shards} shards do not divide {num_heads} heads, {num_kv} key/value heads, "
            f"{config.hidden_size} dimensions, {config.intermediate_size} feed-forward rows and "
            f"{config.vocab_size} tokens; {remedy}"
        )


# Meta's order and Hugging Face's order of the rows of q and k, whole heads at a time.
def to_hf_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_meta_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# -------------------------------------------------------------------------------------------------------------------
# Meta's shards: headers first, rows of a tensor when they are needed
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a .pth file, of which rows are read when they are needed.

    The file is read, not mapped: pages of a mapping count as used memory until the file is closed.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_contiguous: bool
    storage_start: int  # byte of the file
    storage_bytes: int
    storage_offset: int  # elements of the storage before the tensor's first one

    def read(self) -> torch.Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows from `start` to before `stop`, (stop - start, columns); of a vector, its elements."""
        if not self.is_contiguous:
            # A view that somebody saved; Meta's own files have none. Its storage is read as a whole.
            storage = self.read_elements(0, self.storage_bytes // self.dtype.itemsize)
            return storage.as_strided(self.shape, self.strides, self.storage_offset)[start:stop]
        row_shape = self.shape[1:]
        row_size = math.prod(row_shape)
        elements = self.read_elements(self.storage_offset + start * row_size, (stop - start) * row_size)
        return elements.view(stop - start, *row_shape)

    def read_elements(self, first: int, count: int) -> torch.Tensor:
        data = torch.empty(count * self.dtype.itemsize, dtype=torch.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.storage_start + first * self.dtype.itemsize)
            num_bytes = file.readinto(data.numpy())
        if num_bytes != len(data):
            raise OSError(f"{self.path.name} became shorter while it was read")
        return data.view(self.dtype)

    def read_as_float(self, dtype: torch.dtype) -> torch.Tensor:
        """All values in float32, rounded to `dtype` before; block by block, so that no second copy is in memory."""
        values = torch.empty(self.shape)
        for start, stop in row_blocks(self.shape):
            values[start:stop] = self.read_rows(start, stop).to(dtype)
        return values


Shard = dict[str, StoredTensor]


def open_shards(folder: Path) -> list[Shard]:
    """The headers of every shard; no weights are read, and nothing in the files is executed.

    Raises:
        FileNotFoundError, ValueError: a shard is missing, damaged, in an old format, or holds more than tensors.
    """
    paths = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    present = {path.name for path in paths}
    for i in range(max(len(paths), 1)):
        name = f"consolidated.{i:02d}.pth"
        if name not in present:
            raise FileNotFoundError(f"{name} is missing; download it again, or name the folder that has it")
    return [open_shard(path) for path in paths]


def open_shard(path: Path) -> Shard:
    with open(path, "rb") as file:
        signature = file.read(2)
    load = f"torch.load('{path}', map_location='cpu', weights_only=True)"
    remedy = f"run python -c \"import torch; torch.save({load}, '{path}')\""
    if signature[:1] == b"\x80":  # a bare pickle, as PyTorch wrote before 1.6
        raise ValueError(f"{path.name} is in an old format; {remedy}")
    try:
        if signature != b"PK":
            raise RuntimeError("this is not a PyTorch file")
        # In this mode tensors have a shape and a place in the file, but no memory.
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        # PyTorch names the class that it refuses to make.
        refused = " ".join(re.findall(r"GLOBAL (\S+)", str(problem)))
        cause = f"holds other things than tensors ({refused}) and was not opened"
        raise ValueError(f"{path.name} {cause}; get it from Meta") from None
    except RuntimeError as problem:
        # What follows the first sentence may advise to execute the pickle.
        reason = str(problem).splitlines()[0].split(". ")[0]
        raise ValueError(f"{path.name} is truncated or damaged ({reason}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds other things than tensors by their names; get it from Meta")
    for name, value in content.items():
        if not is_dense(value):
            raise ValueError(f"{path.name} holds other things than tensors ({name}); get it from Meta")
    shard = {name: locate_tensor(path, tensor) for name, tensor in content.items()}
    records = find_records(path)
    for tensor in shard.values():
        if records.get(tensor.storage_start) != tensor.storage_bytes:
            raise ValueError(f"{path.name} was packed again by another program than PyTorch; {remedy}")
    return shard


def is_dense(value) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def find_records(path: Path) -> dict[int, int]:
    """First byte and size of every record of a zip file that is not compressed.

    PyTorch computes where a tensor lies from the rules by which it writes; this is where it really lies.
    """
    records = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                continue
            # A record begins with a header of 30 bytes, the last four of which are the lengths of what follows it.
            file.seek(info.header_offset + 26)
            name_length = int.from_bytes(file.read(2), "little")
            extra_length = int.from_bytes(file.read(2), "little")
            records[info.header_offset + 30 + name_length + extra_length] = info.file_size
    return records


def locate_tensor(path: Path, tensor: torch.Tensor) -> StoredTensor:
    storage = tensor.untyped_storage()
    return StoredTensor(
        path,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        is_contiguous=tensor.is_contiguous(),
        # Private, but PyTorch's notes on serialization name it for this purpose.
        storage_start=storage._checkpoint_offset,
        storage_bytes=storage.nbytes(),
        storage_offset=tensor.storage_offset(),
    )


def row_blocks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of blocks of rows that are copied at once; `multiple` rows are not torn apart."""
    num_columns = math.prod(shape[1:])
    step = BLOCK_BYTES // (4 * num_columns) // multiple * multiple
    step = max(step, multiple)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    if first.shape != second.shape:
        return False
    for start, stop in row_blocks(first.shape):
        if not torch.equal(first.read_rows(start, stop), second.read_rows(start, stop)):
            return False
    return True


# Frequencies of the rotary embedding, which Meta's code computes anew: LLaMA 1 7B has a table in each layer, 13B to 65B
# and Llama 2 have one.
ROPE_TABLE = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")


def read_rope_tables(shards: list[Shard], config: LlamaConfig) -> list[dict]:
    """The tables of frequencies: dtype, values, and the names of all tables that are equal.

    Raises:
        ValueError: a table is not that of params.json, or the shards have different ones.
    """
    names_of_table = {}
    for name, stored in shards[0].items():
        if not ROPE_TABLE.fullmatch(name):
            continue
        table = stored.read()
        for i, shard in enumerate(shards):
            if not torch.equal(table, shard[name].read()):
                raise ValueError(f"{name} must be equal in all shards and is not in shard {i}; download again")
        check_rope_table(name, table, config)
        key = (name_of_dtype(table.dtype), tuple(table.tolist()))
        names_of_table.setdefault(key, []).append(name)
    tables = []
    for (dtype, values), names in names_of_table.items():
        tables.append({"names": names, "dtype": dtype, "values": list(values)})
    return tables


def check_rope_table(name: str, table: torch.Tensor, config: LlamaConfig) -> None:
    """Compares it with the formula for params.json: a wrong rope_theta would spoil the model without a sign."""
    rope = config.rope_parameters
    theta = rope["rope_theta"]
    unscaled = {"rope_theta": theta}
    for expected in (rope, unscaled):
        if is_rounded(table, rotary_frequencies(expected, config.head_dim)):
            return
    if is_rounded(table, rotary_frequencies({"rope_theta": 10000.0}, config.head_dim)):
        # Meta's code does not read the table, so params.json counts.
        print(f"warning: {name} is the table of rope_theta 10000, params.json states {theta:g}", file=sys.stderr)
        return
    remedy = "params.json is of another model, or the shard is damaged; download both again"
    raise ValueError(f"{name} is not the table of rope_theta {theta:g}: {remedy}")


def is_rounded(table: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the table has the expected values, (head_dim / 2) in float32, as far as its dtype can hold them."""
    precision = torch.finfo(table.dtype)
    # In float32 the last digits depend on how a power is computed.
    rtol = max(precision.eps, 1e-5)
    smallest = precision.smallest_normal * precision.eps
    return torch.allclose(table.float(), expected, rtol=rtol, atol=smallest)


def is_tied(shard: Shard) -> bool:
    """Whether the output, which is stored, equals the embedding, as in Llama 3.2."""
    if "tok_embeddings.weight" not in shard or "output.weight" not in shard:
        return False
    return same_values(shard["tok_embeddings.weight"], shard["output.weight"])


def check_shards(weights: list[Weight], shards: list[Shard], head_dim: int) -> None:
    """Every shard has exactly the tensors that params.json makes; those that several shards hold are equal.

    Raises:
        ValueError: the first three findings, and their number.
    """
    num_shards = len(shards)
    shapes = {weight.meta_name: weight.piece_shape(num_shards) for weight in weights}
    for shard in shards:
        for name in shard:
            if ROPE_TABLE.fullmatch(name):
                shapes[name] = [head_dim // 2]
    findings = []
    for i, shard in enumerate(shards):
        findings += [f"{name} is unknown" for name in shard if name not in shapes]
        for name, shape in shapes.items():
            if name not in shard:
                findings.append(f"{name} is missing in shard {i}")
                continue
            tensor = shard[name]
            if list(tensor.shape) != shape:
                made = f"{shape} as params.json and {num_shards} shards make it"
                findings.append(f"{name} is {list(tensor.shape)} in shard {i}, not {made}")
            elif tensor.dtype not in SAFETENSORS_DTYPES:
                findings.append(f"{name} is {tensor.dtype} in shard {i}, of {QUANTIZED}")
            elif tensor.dtype != shards[0][name].dtype:
                findings.append(f"{name} is {tensor.dtype} in shard {i}, not {shards[0][name].dtype}")
    if findings:
        raise ValueError(
            f"{'; '.join(findings[:3])} ({len(findings)} such findings): a shard is missing, damaged "
            "or of another model, or params.json is; download again"
        )
    for weight in weights:
        check_copies(weight, shards)


def check_copies(weight: Weight, shards: list[Shard]) -> None:
    num_copies = len(shards) // weight.num_parts(len(shards))
    if num_copies == 1:
        return
    for i, shard in enumerate(shards):
        first = shards[i // num_copies * num_copies]
        if not same_values(first[weight.meta_name], shard[weight.meta_name]):
            remedy = f"must be equal in several shards and is not in shard {i}; download again"
            raise ValueError(f"{weight.meta_name} {remedy}")


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found before anything is written
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class MetaLayout:
    """What Meta's folder holds and no file of a Hugging Face folder shows. The report keeps it for the way back."""

    params: dict
    num_shards: int = 1
    output_stored: bool = True
    vocabulary_parallel: bool = False
    rope_tables: list[dict] = field(default_factory=list)  # what read_rope_tables gives


@dataclass
class Plan:
    """What will be converted, from the headers of the files alone."""

    tokenizer: "TokenizerFile | None"
    config: LlamaConfig | None = None  # what Meta's params.json means, in both directions
    weights: list[Weight] = field(default_factory=list)  # those to write
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the result, by Meta's names
    layout: MetaLayout | None = None
    shards: list[Shard] = field(default_factory=list)  # Meta's, if it is the input

    def num_bytes(self, weight: Weight) -> int:
        return self.dtypes[weight.meta_name].itemsize * math.prod(weight.shape)

    def total_bytes(self) -> int:
        return sum(self.num_bytes(weight) for weight in self.weights)


def check_arguments(args: Arguments) -> Plan:
    """Checks all flags and reads the headers of all files.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = find_folder_mistakes(args.input_dir, args.output_dir)
    if args.dtype not in (*DTYPES, "auto"):
        mistakes.append(f"--dtype {args.dtype}: must be one of {', '.join(DTYPES)}, auto")
    if parse_size(args.max_shard_size) < 1:
        mistakes.append(f"--max_shard_size {args.max_shard_size}: write a size such as 5GB or 500MB")
    if args.rope_scaling_factor is not None and args.rope_scaling_factor < 1:
        mistakes.append(f"--rope_scaling_factor {args.rope_scaling_factor}: must be at least 1")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return make_plan(read_meta_folder, args)


def find_folder_mistakes(input_dir: str, output_dir: str) -> list[str]:
    mistakes = []
    output = Path(output_dir).resolve()
    incomplete = incomplete_folder(output_dir)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        mistakes.append(f"--output_dir {output_dir}: not empty; name another")
    if incomplete.exists():
        remedy = f"another conversion runs or was killed; if it was, delete {incomplete}"
        mistakes.append(f"--output_dir {output_dir}: {remedy}")
    if not Path(input_dir).is_dir():
        mistakes.append(f"--input_dir {input_dir}: no such folder")
    return mistakes


def make_plan(read_folder: Callable, args) -> Plan:
    """The plan that `read_folder` makes from --input_dir, if its result fits the disk of --output_dir.

    Raises:
        ValueError: one line with the flag, its value and what is wrong with the folder.
    """
    try:
        plan = read_folder(args)
    except (ValueError, OSError, StrictDataclassError, ZeroDivisionError) as problem:
        reason = " ".join(str(problem).split())
        raise ValueError(f"--input_dir {args.input_dir}: {reason}") from None
    needed = plan.total_bytes() + 2**26
    free = shutil.disk_usage(incomplete_folder(args.output_dir).parent).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
        raise ValueError(f"--output_dir {args.output_dir}: {sizes} on that disk; name a folder on another")
    return plan


def parse_size(text: str) -> int:
    """Bytes; 0 if the text is not a size."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)", text.strip().upper())
    if size is None:
        return 0
    return int(float(size[1]) * BYTES_OF_UNIT[size[2]])


def incomplete_folder(output_dir: str) -> Path:
    """Where the result grows: beside the folder that will hold it, as far as that path exists."""
    output = Path(output_dir).resolve()
    parent = output.parent
    while not parent.is_dir():
        parent = parent.parent
    return parent / f"{output.name}.incomplete"


def read_meta_folder(args: Arguments) -> Plan:
    """The plan for a folder of Meta's.

    Raises:
        ValueError, FileNotFoundError: a file is missing, damaged or not what params.json says.
    """
    folder = Path(args.input_dir)
    original_params = {}
    if not args.tokenizer_only or (folder / "params.json").is_file():
        original_params = read_params(folder)
    params = model_params(original_params)
    tokenizer = find_tokenizer(folder, params, args.instruct)
    if args.tokenizer_only:
        return Plan(tokenizer)
    if args.rope_scaling_factor and not params.get("use_scaled_rope"):
        raise ValueError("params.json does not state use_scaled_rope; leave --rope_scaling_factor away")

    shards = open_shards(folder)
    layout = find_layout(original_params, shards, tokenizer)
    vocab_size = find_vocab_size(params, layout, shards, tokenizer)
    tied = not layout.output_stored or all(is_tied(shard) for shard in shards)
    dtype = shards[0]["tok_embeddings.weight"].dtype
    config = config_of_params(params, vocab_size, tied, args.rope_scaling_factor, dtype)
    weights = list_weights(config, layout.vocabulary_parallel, layout.output_stored)
    check_division(config, weights, len(shards), "a shard is missing, or params.json is of another model")
    check_shards(weights, shards, config.head_dim)
    layout.rope_tables = read_rope_tables(shards, config)
    warn_of_early_llama2(config, dtype)

    dtypes = {}
    for weight in weights:
        dtypes[weight.meta_name] = DTYPES.get(args.dtype, shards[0][weight.meta_name].dtype)
    config.dtype = name_of_dtype(dtypes["tok_embeddings.weight"])
    for name, value in tokenizer.ids().items():
        setattr(config, name, value)
    if layout.output_stored and tied:
        weights.pop()  # it is equal to the embedding, which is written
    return Plan(tokenizer, config, weights, dtypes, layout, shards)


def find_layout(original_params: dict, shards: list[Shard], tokenizer: "TokenizerFile") -> MetaLayout:
    embedding = shards[0].get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("tok_embeddings.weight is missing in shard 0, or is not a matrix; download it again")
    # One shard does not show how it would be divided: as Llama 3 is, if it has its tokenizer.
    vocabulary_parallel = tokenizer.kind == "tiktoken"
    if len(shards) > 1:
        vocabulary_parallel = embedding.shape[1] == model_params(original_params)["dim"]
    layout = MetaLayout(original_params, len(shards), vocabulary_parallel=vocabulary_parallel)
    layout.output_stored = any("output.weight" in shard for shard in shards)
    return layout


def find_vocab_size(params: dict, layout: MetaLayout, shards: list[Shard], tokenizer: "TokenizerFile") -> int:
    """Tokens of the embedding, which must be those of the tokenizer."""
    vocab_size = params.get("vocab_size") or -1
    if vocab_size < 0:  # LLaMA 1 and 2 leave it to the tokenizer
        vocab_size = shards[0]["tok_embeddings.weight"].shape[0]
        if layout.vocabulary_parallel:
            vocab_size *= len(shards)
    if tokenizer.size != vocab_size:
        sizes = f"{tokenizer.size} tokens, the embedding {vocab_size}"
        raise ValueError(f"{tokenizer.path} has {sizes}; they do not belong together")
    return vocab_size


def warn_of_early_llama2(config: LlamaConfig, dtype: torch.dtype) -> None:
    """An early download of Llama 2 7B has the epsilon of LLaMA 1 (github.com/meta-llama/llama/issues/771)."""
    if dtype == torch.bfloat16 and config.rms_norm_eps < 1e-5:
        remedy = "Llama 2 was trained with 1e-05, and Meta corrected an early params.json that says otherwise"
        print(f"warning: params.json states norm_eps {config.rms_norm_eps}: {remedy}", file=sys.stderr)


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------------------
# Weights: read and written in blocks of rows, so that no tensor is ever in memory as a whole
# -------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread():
    """Copying is bound by memory: further threads wait for one another, above all where other programs run."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def joined_rows(weight: Weight, shards: list[Shard], head_dim: int) -> Iterator[torch.Tensor]:
    """Yields the rows of Hugging Face's tensor, in order, from Meta's pieces."""
    pieces = [shard[weight.meta_name] for shard in shards]
    if weight.split_dim == 1:
        groups = [pieces]  # they lie side by side
    else:
        num_copies = len(pieces) // weight.num_parts(len(shards))
        groups = [[piece] for piece in pieces[::num_copies]]  # one below the other
    for group in groups:
        for start, stop in row_blocks(group[0].shape, head_dim):
            blocks = [piece.read_rows(start, stop) for piece in group]
            rows = blocks[0]
            if len(blocks) > 1:
                rows = torch.cat(blocks, dim=1)
            if weight.is_rotary:
                rows = to_hf_order(rows, head_dim)
            yield rows


def divided_rows(
    weight: Weight, files: dict[str, Path], head_dim: int, num_shards: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields (shard, first row in its piece, rows) of all of Meta's pieces from Hugging Face's tensor."""
    piece_shape = weight.piece_shape(num_shards)
    num_copies = num_shards // weight.num_parts(num_shards)
    # The file is opened for each tensor anew: it keeps in memory what was read until it is closed.
    with safe_open(files[weight.hf_name], framework="pt") as file:
        tensor = file.get_slice(weight.hf_name)
        for start, stop in row_blocks(piece_shape, head_dim):
            if weight.split_dim == 1:
                for i, rows in enumerate(tensor[start:stop].chunk(num_shards, dim=1)):
                    yield i, start, rows
                continue
            for i in range(num_shards):
                first_row = 0
                if weight.split_dim == 0:
                    first_row = i // num_copies * piece_shape[0]
                rows = tensor[first_row + start : first_row + stop]
                if weight.is_rotary:
                    rows = to_meta_order(rows, head_dim)
                yield i, start, rows


def as_bytes(rows: torch.Tensor, dtype: torch.dtype, name: str):
    """The bytes of the rows in `dtype`; a value that overflows there is an error, not an infinity in the result."""
    if rows.dtype != dtype:
        rows = rows.to(dtype)
        if not rows.isfinite().all():
            raise ValueError(f"{name} has values that {dtype} cannot hold; choose another --dtype")
    return rows.contiguous().flatten().view(torch.uint8).numpy()


def write_hf(plan: Plan, folder: Path, max_shard_size: int) -> None:
    """Writes weights, configuration and generation configuration."""
    files = divide_into_files(plan, max_shard_size)
    weight_map = {}
    with one_thread(), tqdm(total=plan.total_bytes(), desc="writing", unit="B", unit_scale=True) as progress:
        for number, weights in enumerate(files, start=1):
            name = "model.safetensors"
            if len(files) > 1:
                name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            write_safetensors(plan, weights, folder / name, progress)
            for weight in weights:
                weight_map[weight.hf_name] = name
    if len(files) > 1:
        index = {"metadata": {"total_size": plan.total_bytes()}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    plan.config.save_pretrained(folder)
    GenerationConfig(**plan.tokenizer.ids()).save_pretrained(folder)


def divide_into_files(plan: Plan, max_shard_size: int) -> list[list[Weight]]:
    files = [[]]
    size = 0
    for weight in plan.weights:
        if files[-1] and size + plan.num_bytes(weight) > max_shard_size:
            files.append([])
            size = 0
        files[-1].append(weight)
        size += plan.num_bytes(weight)
    return files


def write_safetensors(plan: Plan, weights: list[Weight], path: Path, progress: tqdm) -> None:
    """The safetensors format: length of the header in 8 bytes, the header in JSON, the tensors' bytes."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in weights:
        start = end
        end += plan.num_bytes(weight)
        header[weight.hf_name] = {
            "dtype": SAFETENSORS_DTYPES[plan.dtypes[weight.meta_name]],
            "shape": weight.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            dtype = plan.dtypes[weight.meta_name]
            for rows in joined_rows(weight, plan.shards, plan.config.head_dim):
                progress.update(file.write(as_bytes(rows, dtype, weight.meta_name)))


def find_hf_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the files that transformers would load.

    Raises:
        FileNotFoundError, ValueError: a file is missing, truncated or damaged.
    """
    paths = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not paths[0].is_file():
        if not index.is_file():
            raise FileNotFoundError("no model.safetensors in it; save the model in that format first")
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{index.name} is damaged; save the model again") from None
        paths = [folder / name for name in sorted(set(names))]
    files = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as problem:
            raise ValueError(f"{path.name} is truncated or damaged ({problem})") from None
    return files


# -------------------------------------------------------------------------------------------------------------------
# Tokenizer: SentencePiece's file (LLaMA 1 and 2) or one in tiktoken's format (Llama 3)
# -------------------------------------------------------------------------------------------------------------------

# How Llama 3 cuts a text into words (llama-models, models/llama3/tokenizer.py).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_LLAMA3_RANKS = 128000
NUM_SPECIAL_TOKENS = 256  # of Llama 3
# Llama 3's special tokens that have a name, by their place behind the ranks. The others are called reserved.
LLAMA3_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}
LLAMA31_NAMES = LLAMA3_NAMES | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
# Meta's ChatFormat (llama-models, models/llama3/chat_format.py), for text.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% set role = message['role'] %}"
    "{{ '<|start_header_id|>' + ('ipython' if role == 'tool' else role) + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The prompts of Llama 2 chat and Code Llama Instruct (meta-llama/llama and meta-llama/codellama, llama/generation.py):
# BOS and EOS around every question with its answer, and the system's text in front of the first question.
LLAMA2_CHAT_TEMPLATE = (
    "{% set conversation = namespace(system='', next='user') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}"
    "{% set conversation.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] != conversation.next %}"
    "{{ raise_exception('Llama 2 takes a system message, then user and assistant in turn') }}"
    "{% elif message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (conversation.system + message['content']) | trim + ' [/INST]' }}"
    "{% set conversation.system = '' %}{% set conversation.next = 'assistant' %}"
    "{% else %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% set conversation.next = 'user' %}"
    "{% endif %}"
    "{% endfor %}"
)
# Code Llama 70B Instruct has this piece, and another format of prompts, which is not written here.
STEP_PIECE = "<step>"


@dataclass
class TokenizerFile:
    """What tokenizer.model says, the fast tokenizer that equals it, and its own way to encode."""

    path: Path
    kind: str  # sentencepiece | tiktoken
    size: int
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]  # not by the fast tokenizer
    names: dict[str, str]  # bos_token, eos_token and perhaps unk_token and pad_token
    stop_tokens: list[str]  # those that end an answer
    piece_texts: list[str]  # what each piece spells, where that is a text
    overlaps: list[str] = field(default_factory=list)  # texts that can be cut in two ways
    chat_template: str | None = None

    def ids(self) -> dict:
        """As configurations have them: eos_token_id is a list where several tokens end an answer."""
        stop_ids = [self.id_of(token) for token in self.stop_tokens]
        eos_token_id = stop_ids
        if len(stop_ids) == 1:
            eos_token_id = stop_ids[0]
        return {
            "bos_token_id": self.id_of(self.names["bos_token"]),
            "eos_token_id": eos_token_id,
            "pad_token_id": self.id_of(self.names.get("pad_token", "")),
        }

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def find_tokenizer(folder: Path, params: dict, instruct: bool | None) -> TokenizerFile:
    """The tokenizer of Meta's folder; LLaMA 1 and 2 are downloaded with one file beside all models' folders."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        path = folder.resolve().parent / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError("no tokenizer.model in it or beside it; Meta's download has one, copy it there")
    # Llama 3 and its successors have the same tokenizer.model; what its special tokens are called depends on which.
    is_llama31 = not params or bool(params.get("use_scaled_rope"))
    is_instruct = instruct
    if instruct is None:
        is_instruct = is_instruct_name(folder)
    tokenizer = read_tokenizer(path, is_llama31, is_instruct, params.get("vocab_size"))
    if instruct and tokenizer.chat_template is None:
        raise ValueError("the prompts of Code Llama 70B Instruct are not known here; leave --instruct away")
    return tokenizer


def is_instruct_name(folder: Path) -> bool:
    """Nothing in the files tells an Instruct or chat model from a base model, but the name that its download has."""
    names = []
    for path in (folder.absolute(), folder.resolve()):
        names.append(path.name)
        if "llama" not in path.name.lower():  # such as original, or 7B
            names.append(path.parent.name)
    for part in folder.absolute().parts:
        if part.startswith("models--"):  # the hub's cache
            names.append(part)
    return any(re.search(r"(?<![a-z])(instruct|chat)(?![a-z])", name.lower()) for name in names)


def read_tokenizer(path: Path, is_llama31: bool, is_instruct: bool, vocab_size: int | None) -> TokenizerFile:
    """Reads either format.

    Args:
        is_llama31: special tokens are called as in Llama 3.1 and later, not as in 3.
        is_instruct: with chat template and its stop tokens.
        vocab_size: of the model, where params.json states it.

    Raises:
        ValueError: the file is damaged, or not the tokenizer of a LLaMA.
    """
    content = path.read_bytes()
    try:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            return read_tiktoken(path, content, is_llama31, is_instruct, vocab_size)
        return read_sentencepiece(path, content, is_instruct)
    except Exception as problem:  # protobuf's errors have no common class
        reason = str(problem).splitlines()[0]
        cause = f"is not the tokenizer of a LLaMA or is damaged ({reason})"
        raise ValueError(f"{path} {cause}; download it again") from None


def read_sentencepiece(path: Path, content: bytes, is_instruct: bool) -> TokenizerFile:
    """transformers' LlamaTokenizer is not used: version 5 drops one of two leading spaces, and the BOS."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(content)
    reader = sentencepiece.SentencePieceProcessor(model_proto=content)
    check_sentencepiece_rules(model)
    ids = {
        "bos_token": reader.bos_id(),
        "eos_token": reader.eos_id(),
        "unk_token": reader.unk_id(),
        "pad_token": reader.pad_id(),
    }
    names = {name: reader.id_to_piece(i) for name, i in ids.items() if i >= 0}
    vocabulary = [piece.piece for piece in model.pieces]
    chat_template = None
    if is_instruct and STEP_PIECE not in vocabulary:
        chat_template = LLAMA2_CHAT_TEMPLATE
    return TokenizerFile(
        path,
        kind="sentencepiece",
        size=len(vocabulary),
        tokenizer=make_sentencepiece_tokenizer(model, names),
        encode=reader.encode,
        names=names,
        stop_tokens=[names["eos_token"]],
        piece_texts=[piece.replace("▁", " ") for piece in vocabulary],
        overlaps=find_overlaps(model),
        chat_template=chat_template,
    )


def check_sentencepiece_rules(model: sentencepiece_model_pb2.ModelProto) -> None:
    rules = model.normalizer_spec
    changes_text = rules.precompiled_charsmap or rules.remove_extra_whitespaces
    marks_spaces = rules.add_dummy_prefix and rules.escape_whitespaces
    marks_ends = model.trainer_spec.treat_whitespace_as_suffix
    is_bpe = model.trainer_spec.model_type == model.trainer_spec.BPE
    if changes_text or not marks_spaces or marks_ends or not is_bpe or not model.trainer_spec.byte_fallback:
        raise ValueError("LLaMA's is a BPE with byte fallback that leaves the text as it is")
    if any(piece.type == model.SentencePiece.UNUSED for piece in model.pieces):
        raise ValueError("it has unused pieces, which LLaMA's has not")


def find_overlaps(model: sentencepiece_model_pb2.ModelProto) -> list[str]:
    """Texts in which two pieces of equal score, or one piece twice, claim the same letters.

    SentencePiece then takes the left one; a fast tokenizer takes the one that stands first in its list. Pieces that
    somebody appended to LLaMA's have equal scores.
    """
    pieces_of_score = {}
    for piece in model.pieces:
        if piece.type == model.SentencePiece.NORMAL:
            pieces_of_score.setdefault(piece.score, []).append(piece.piece)
    overlaps = set()
    for pieces in pieces_of_score.values():
        pieces_of_beginning = {}
        for piece in pieces:
            for i in range(1, len(piece)):
                pieces_of_beginning.setdefault(piece[:i], []).append(piece)
        for left in pieces:
            for i in range(1, len(left)):
                for right in pieces_of_beginning.get(left[i:], []):
                    overlaps.add(left[:i] + right)
    return [text.replace("▁", " ") for text in sorted(overlaps)]


def make_sentencepiece_tokenizer(model: sentencepiece_model_pb2.ModelProto, names: dict[str, str]) -> Tokenizer:
    types = model.SentencePiece
    scores = {}
    whole = []  # pieces that SentencePiece never cuts
    special = []
    for piece in model.pieces:
        if piece.type == types.NORMAL:
            scores[piece.piece] = piece.score
        elif piece.type == types.USER_DEFINED:
            whole.append(piece.piece)
        elif piece.type in (types.UNKNOWN, types.CONTROL):
            special.append(piece.piece)
    bpe = models.BPE(
        {piece.piece: i for i, piece in enumerate(model.pieces)},
        find_merges(sorted(scores, key=scores.get, reverse=True)),
        unk_token=names["unk_token"],
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=bool(whole),
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if whole:
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = "|".join(re.escape(piece) for piece in longest_first)
        # A text between two of them that is the name of a byte's piece would become that piece (ignore_merges).
        byte_name = r"\A<(?=0x[0-9A-F]{2}>\z)"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.Split(Regex(byte_name), "isolated"),
            ]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    add_special_tokens(tokenizer, special, names["bos_token"])
    return tokenizer


def read_tiktoken(
    path: Path, content: bytes, is_llama31: bool, is_instruct: bool, vocab_size: int | None
) -> TokenizerFile:
    """Each line has a token in base64 and its rank; special tokens follow that only Meta's code names."""
    ranks = {}
    for line in content.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    has_all_ranks = sorted(ranks.values()) == list(range(len(ranks)))
    has_all_bytes = all(bytes([i]) in ranks for i in range(256))
    if not has_all_ranks or not has_all_bytes:
        raise ValueError("it lacks ranks or bytes")
    # Only the number tells whose ranks they are: Llama 4 and others cut texts otherwise and have other special tokens.
    is_of_model = vocab_size == len(ranks) + NUM_SPECIAL_TOKENS
    if len(ranks) != NUM_LLAMA3_RANKS and not is_of_model:
        raise ValueError(f"it has {len(ranks)} ranks, and Llama 3's has {NUM_LLAMA3_RANKS}")

    special = name_special_tokens(LLAMA31_NAMES if is_llama31 else LLAMA3_NAMES)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    stop_tokens = ["<|end_of_text|>"]
    if is_llama31:
        names["pad_token"] = "<|finetune_right_pad_id|>"
    chat_template = None
    if is_instruct:
        chat_template = LLAMA3_CHAT_TEMPLATE
        # A turn ends with eot_id; one that calls a tool with eom_id.
        names["eos_token"] = "<|eot_id|>"
        if is_llama31:
            stop_tokens.append("<|eom_id|>")
        stop_tokens.append("<|eot_id|>")
    return TokenizerFile(
        path,
        kind="tiktoken",
        size=len(ranks) + len(special),
        tokenizer=make_tiktoken_tokenizer(ranks, special),
        encode=lambda text: encode_by_ranks(text, ranks),
        names=names,
        stop_tokens=stop_tokens,
        piece_texts=[token.decode() for token in ranks if is_utf8(token)],
        chat_template=chat_template,
    )


def is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def name_special_tokens(names: dict[int, str]) -> list[str]:
    special = []
    num_reserved = 0
    for i in range(NUM_SPECIAL_TOKENS):
        name = names.get(i)
        if name is None:
            name = f"reserved_special_token_{num_reserved}"
            num_reserved += 1
        special.append(f"<|{name}|>")
    return special


def make_tiktoken_tokenizer(ranks: dict[bytes, int], special: list[str]) -> Tokenizer:
    letters = byte_letters()
    pieces = []
    for token in sorted(ranks, key=ranks.get):
        pieces.append("".join(letters[byte] for byte in token))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # tiktoken takes a word that is a token as it is, whether merges lead to it or not.
    tokenizer = Tokenizer(models.BPE(vocabulary, find_merges(pieces), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer, special, special[0])
    return tokenizer


def byte_letters() -> dict[int, str]:
    """Byte-level tokenizers write each byte as a printable letter, after GPT-2's table."""
    letters = {}
    for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]:
        letters[byte] = chr(byte)
    num_others = 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + num_others)
            num_others += 1
    return letters


def find_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Both formats rank merged pieces, not merges: every way to make a piece out of two has the piece's rank."""
    known = set(pieces)
    merges = []
    for piece in pieces:
        for i in range(1, len(piece)):
            left = piece[:i]
            right = piece[i:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def add_special_tokens(tokenizer: Tokenizer, tokens: list[str], bos: str) -> None:
    """Adds them, and the BOS in front of every text."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def encode_by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: of all neighbours in a word, join those whose union has the lowest rank, until none has."""
    # Python's \s also has the separators \x1c to \x1f, which tiktoken's has not.
    pattern = SPLIT_PATTERN.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    ids = []
    for word in regex.findall(pattern, text):
        word = word.encode()
        if word in ranks:
            ids.append(ranks[word])
            continue
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 1:
            candidates = []
            for i, (left, right) in enumerate(itertools.pairwise(parts)):
                candidates.append((ranks.get(left + right, math.inf), i))
            rank, i = min(candidates)
            if rank == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def write_tokenizer(plan: Plan, folder: Path) -> dict:
    """Writes the tokenizer for AutoTokenizer, loads it as a user would and compares it with Meta's file.

    Raises:
        ValueError: a text has other ids, or the ids of BOS, EOS and PAD are not the same everywhere.
    """
    source = plan.tokenizer
    source.tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(source.path, folder / "tokenizer.model")  # for the way back
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **source.names,
    }
    if source.chat_template:
        settings["chat_template"] = source.chat_template
    if plan.config:
        settings["model_max_length"] = plan.config.max_position_embeddings
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    num_texts = compare_tokenizer(source, folder)
    if plan.config:
        check_ids(AutoConfig.from_pretrained(folder), source)
        check_ids(GenerationConfig.from_pretrained(folder), source)
    return {"kind": source.kind, "size": source.size, **source.ids(), "texts_with_equal_ids": num_texts}


def compare_tokenizer(source: TokenizerFile, folder: Path) -> int:
    """Compares the tokenizer in `folder` with Meta's file; returns the number of texts."""
    written = AutoTokenizer.from_pretrained(folder)
    ids = source.ids()
    texts = probe_texts(source)
    batch_size = 1000
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        for text, found in zip(batch, written(batch).input_ids, strict=True):
            expected = [ids["bos_token_id"], *source.encode(text)]
            if found != expected:
                difference = f"it gives {text!r} the ids {expected}, and the tokenizer in the new format {found}"
                remedy = "take a Hugging Face release of this model, if there is one"
                raise ValueError(f"{source.path} cannot be converted exactly: {difference}; {remedy}")
    found = {"bos": written.bos_token_id, "eos": written.eos_token_id, "pad": written.pad_token_id}
    expected = {
        "bos": ids["bos_token_id"],
        "eos": source.id_of(source.names["eos_token"]),
        "pad": ids["pad_token_id"],
    }
    if found != expected:
        raise ValueError(f"the tokenizer as written has the ids {found}, and {source.path} {expected}")
    return len(texts)


# Whatever the file's own pieces are: languages, code, numbers, symbols and white space of every kind.
PROBE_TEXTS = [
    "",
    " ",
    " a",
    "  a",
    "a  b ",
    "\n\n a\t",
    "\r\n\r\n\tx \u3000\xa0\u2028y",
    "The quick brown fox doesn't jump; it's LAZY, they'LL say. I'd've known!",
    "A 45-year-old man has had chest pain since 3.5 hours (BP 130/85 mmHg, SpO2 97 %).",
    "患者男，45岁，发热3天，体温38.5℃，咳嗽、胸痛。请问应先做哪项检查？",
    "训练模型之前，先准备好数据；数据的质量决定模型的质量。",
    "繁體中文與日本語のテキスト、한국어 문장도 있습니다。",
    "Der Größe nach: Äpfel, naïve café, e\u0301. Привет, мир! مرحبا بالعالم. नमस्ते ไทย",
    "0 1 12 123 1234 12345 1234567890 3.14159 1e-6 0x1F ٣ Ⅷ ²",
    "def f(x):\n    return {'a': [x ** 2, x // 3]}  # comment\n\n\nif __name__ == '__main__':\n\tf(1)\n",
    '<div class="a">&nbsp;</div> $E = mc^2$ \\frac{1}{2} https://example.org/a?b=c&d=%20',
    "🙂🙂 👩\u200d👧 🇨🇳 ✓ → ≤ ∑ ==== ---- ____ ....",
    "<0x0A> [INST] <<SYS>> <PRE> ▁a ▁▁",
    "\x00\x01\x1c\x1f\x7f\x85\ufeff\ufffd\U00010348",
]


def probe_texts(source: TokenizerFile) -> list[str]:
    """Fixed texts, every piece of the file alone and among others, and letters at random; the same ones every time."""
    dice = random.Random(0)
    texts = PROBE_TEXTS + source.piece_texts + source.overlaps
    pieces = list(source.piece_texts)
    for num_pieces in (2, 8):
        dice.shuffle(pieces)
        for start in range(0, len(pieces), num_pieces):
            texts.append("".join(pieces[start : start + num_pieces]))
    letters = [*"abcdefgh ETAOIN 0123456789 .,'!?\n\t中的é🙂\x1c\u3000", "  ", " the", "ing", "'ll"]
    for _ in range(500):
        texts.append("".join(dice.choices(letters, k=dice.randint(1, 40))))
    for _ in range(100):
        num_letters = dice.randint(1, 10)
        texts.append("".join(chr(dice.randint(1, 0xD7FF)) for _ in range(num_letters)))
    # Where a text spells a special token, Meta's code reads letters and Hugging Face's the token.
    special = [re.escape(token.content) for token in source.tokenizer.get_added_tokens_decoder().values()]
    spells_special = re.compile("|".join(special))
    return [text for text in texts if not spells_special.search(text)]


def check_ids(config, source: TokenizerFile) -> None:
    """Compares the ids of a configuration with those of tokenizer.model; fine-tuning may have chosen a pad token."""
    stop_ids = config.eos_token_id
    if not isinstance(stop_ids, list):
        stop_ids = [stop_ids]
    stop_tokens = {source.tokenizer.id_to_token(i) for i in stop_ids}
    known = {source.names["eos_token"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    ids = source.ids()
    if not stop_tokens <= known or config.bos_token_id != ids["bos_token_id"]:
        found = f"BOS {config.bos_token_id} and EOS {config.eos_token_id}"
        raise ValueError(f"the configuration has {found}, {source.path} {ids}; they do not belong together")


# -------------------------------------------------------------------------------------------------------------------
# The proof: Meta's side computed after the papers, the other by transformers, both in float32 and layer by layer
# -------------------------------------------------------------------------------------------------------------------


def verify(plan: Plan, shards: list[Shard], folder: Path) -> dict:
    """Compares Meta's `shards` with the Hugging Face model in `folder`: every value, and the states of a forward.

    Raises:
        ValueError: they disagree; the first weight or layer that does is named.
    """
    compare_values(plan, shards, folder)
    return {"tensors_with_equal_values": len(plan.weights)} | compare_states(plan, shards, folder)


def compare_values(plan: Plan, shards: list[Shard], folder: Path) -> None:
    files = find_hf_tensors(folder)
    with one_thread():
        for weight in tqdm(plan.weights, desc="comparing values", unit="tensor"):
            name = weight.meta_name
            dtype = plan.dtypes[name]
            for i, start, rows in divided_rows(weight, files, plan.config.head_dim, len(shards)):
                stored = shards[i][name].read_rows(start, start + len(rows))
                if not torch.equal(stored.to(dtype), rows.to(dtype)):
                    raise ValueError(f"verification: {weight.hf_name} has not the values of {name} in shard {i}")


@torch.no_grad()
def compare_states(plan: Plan, shards: list[Shard], folder: Path) -> dict:
    """Compares the states after each layer, and the logits, of 32 tokens."""
    config = AutoConfig.from_pretrained(folder)
    # Ids from the whole vocabulary; positions from the whole context, for scaled frequencies show far away only.
    ids = torch.tensor([config.bos_token_id, *(i * config.vocab_size // 31 for i in range(31))])
    near = torch.arange(16)
    far = torch.linspace(16, config.max_position_embeddings - 1, 16).long()
    positions = torch.cat([near, far])
    reference_states = MetaModel(plan, shards).states(ids, positions)
    converted_states = HuggingFaceModel(plan, config, folder).states(ids, positions)
    facts = {
        "prompt_ids": ids.tolist(),
        "position_ids": positions.tolist(),
        "tolerance": TOLERANCE,
        "max_difference": {},
        "relative_difference": {},
    }
    names = [f"layer {i}" for i in range(config.num_hidden_layers)] + ["logits"]
    for name in tqdm(names, desc="comparing layers", unit="layer"):
        reference = next(reference_states)
        difference = reference - next(converted_states)
        relative = (difference.norm(dim=-1) / reference.norm(dim=-1)).max().item()  # of the worst token
        facts["max_difference"][name] = difference.abs().max().item()
        facts["relative_difference"][name] = relative
        if not relative <= TOLERANCE:  # also where it is not a number
            found = f"{name} of the converted model differs by {relative:.2g} (allowed: {TOLERANCE:g})"
            raise ValueError(f"verification: {found} from the computation on Meta's shards")
    return facts


class MetaModel:
    """Meta's model after the papers, computed from the shards as Meta's processes would do it.

    Each shard is a process with some of the heads and some rows of the feed-forward network; their results are summed.
    So nothing here depends on how pieces are joined, nor on the order of a head's rows in transformers.
    """

    def __init__(self, plan: Plan, shards: list[Shard]):
        self.config = plan.config
        self.dtypes = plan.dtypes
        self.shards = shards

    def states(self, ids: torch.Tensor, positions: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the states after each layer, (tokens, dim), and then the logits, (tokens, vocabulary)."""
        frequencies = rotary_frequencies(self.config.rope_parameters, self.config.head_dim)
        angles = torch.outer(positions.float(), frequencies)
        rotation = torch.polar(torch.ones_like(angles), angles)
        x = self.embed(ids)
        for i in range(self.config.num_hidden_layers):
            x = x + self.attention(x, f"layers.{i}", rotation)
            x = x + self.feed_forward(x, f"layers.{i}")
            yield x
        h = self.norm(x, "norm.weight")
        output = "output.weight"
        if output not in self.shards[0]:
            output = "tok_embeddings.weight"
        yield torch.cat([F.linear(h, self.load(shard, output)) for shard in self.shards], dim=-1)

    def load(self, shard: Shard, name: str) -> torch.Tensor:
        return shard[name].read_as_float(self.dtypes[name])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        name = "tok_embeddings.weight"
        pieces = [shard[name] for shard in self.shards]
        num_rows, num_columns = pieces[0].shape
        rows = []
        for i in ids.tolist():
            if num_columns == self.config.hidden_size:  # a shard holds some tokens
                piece = pieces[i // num_rows]
                rows.append(piece.read_rows(i % num_rows, i % num_rows + 1))
            else:  # a shard holds some features of every token
                rows.append(torch.cat([piece.read_rows(i, i + 1) for piece in pieces], dim=-1))
        return torch.cat(rows).to(self.dtypes[name]).float()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.config.rms_norm_eps) * self.load(self.shards[0], name)

    def attention(self, x: torch.Tensor, layer: str, rotation: torch.Tensor) -> torch.Tensor:
        h = self.norm(x, f"{layer}.attention_norm.weight")
        mask = torch.full((len(x), len(x)), -math.inf).triu(1)
        total = 0
        for shard in self.shards:
            q = self.heads(h, self.load(shard, f"{layer}.attention.wq.weight"))
            k = self.heads(h, self.load(shard, f"{layer}.attention.wk.weight"))
            v = self.heads(h, self.load(shard, f"{layer}.attention.wv.weight"))
            q = rotate(q, rotation)
            k = rotate(k, rotation)
            # Grouped queries: several heads of q share one of k and v.
            k = k.repeat_interleave(len(q) // len(k), dim=0)
            v = v.repeat_interleave(len(q) // len(v), dim=0)
            scores = q @ k.transpose(1, 2) / math.sqrt(self.config.head_dim) + mask
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            total = total + F.linear(mixed, self.load(shard, f"{layer}.attention.wo.weight"))
        return total

    def heads(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(heads, tokens, head_dim)"""
        return F.linear(x, weight).unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)

    def feed_forward(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        h = self.norm(x, f"{layer}.ffn_norm.weight")
        total = 0
        for shard in self.shards:
            gate = F.silu(F.linear(h, self.load(shard, f"{layer}.feed_forward.w1.weight")))
            up = F.linear(h, self.load(shard, f"{layer}.feed_forward.w3.weight"))
            total = total + F.linear(gate * up, self.load(shard, f"{layer}.feed_forward.w2.weight"))
        return total


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Neighbouring features are one complex number, turned by position times frequency."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


def rotary_frequencies(rope: dict, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of features, (head_dim / 2).

    Llama 3.1 slows those down that turn less than four times in 8192 tokens (llama-models, models/llama3/model.py).
    """
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    if "factor" not in rope:
        return frequencies
    turns = 8192 * frequencies / (2 * math.pi)
    kept = ((turns - 1) / (4 - 1)).clamp(0, 1)  # nothing of those that turn less than once
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


class HuggingFaceModel:
    """transformers' own layer, which gets each weight from the files just before it is used, and drops it after."""

    def __init__(self, plan: Plan, config: LlamaConfig, folder: Path):
        self.config = config
        self.files = find_hf_tensors(folder)
        self.dtype = plan.dtypes["tok_embeddings.weight"]
        self.layer_number = 0
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.layer = LlamaDecoderLayer(config, 0)
        self.names = {}
        for name, module in self.layer.named_modules():
            if "weight" in module._parameters:
                self.names[module] = name
                module.register_forward_pre_hook(self.fetch_weight)
                module.register_forward_hook(self.drop_weight)

    def fetch_weight(self, module, inputs) -> None:
        module.weight = self.load(f"model.layers.{self.layer_number}.{self.names[module]}.weight")

    def drop_weight(self, module, inputs, outputs) -> None:
        module.weight = None

    def load(self, name: str) -> torch.nn.Parameter:
        with safe_open(self.files[name], framework="pt") as file:
            weight = file.get_tensor(name).to(self.dtype).float()
        return torch.nn.Parameter(weight, requires_grad=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        name = "model.embed_tokens.weight"
        with safe_open(self.files[name], framework="pt") as file:
            table = file.get_slice(name)
            rows = [table[i : i + 1] for i in ids.tolist()]
        return torch.cat(rows).to(self.dtype).float()

    def states(self, ids: torch.Tensor, positions: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields what MetaModel.states yields."""
        x = self.embed(ids)[None]
        rotary = LlamaRotaryEmbedding(self.config)(x, positions[None])
        mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)[None, None]
        for i in range(self.config.num_hidden_layers):
            self.layer_number = i
            x = self.layer(x, attention_mask=mask, position_embeddings=rotary)
            yield x[0]
        norm = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = self.load("model.norm.weight")
        output = "lm_head.weight"
        if self.config.tie_word_embeddings:
            output = "model.embed_tokens.weight"
        yield F.linear(norm(x)[0], self.load(output))


# -------------------------------------------------------------------------------------------------------------------
# The conversion as a whole
# -------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of each step."""

    def __init__(self):
        self.started = time.perf_counter()
        self.seconds = {}

    def note(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = now - self.started
        self.started = now


def convert(args: Arguments, plan: Plan, folder: Path) -> None:
    """Writes all files into `folder`, the report last."""
    stopwatch = Stopwatch()
    report = {"arguments": asdict(args), "verified": False, "meta": {}}
    if plan.weights:
        report["meta"] = asdict(plan.layout)
        write_hf(plan, folder, parse_size(args.max_shard_size))
        stopwatch.note("writing")
    report["tokenizer"] = write_tokenizer(plan, folder)
    stopwatch.note("tokenizer")
    if args.verify and plan.weights:
        report["verification"] = verify(plan, plan.shards, folder)
        report["verified"] = True
        stopwatch.note("verifying")
        report["sha256"] = hash_both_folders(Path(args.input_dir), folder, plan.tokenizer)
        stopwatch.note("hashing")
    write_report(report, stopwatch, folder)


def hash_both_folders(source: Path, folder: Path, tokenizer: TokenizerFile | None) -> dict:
    inputs = list(source.iterdir())
    if tokenizer is not None:
        inputs.append(tokenizer.path)  # which may lie beside the folder
    return {"inputs": hash_files(inputs), "outputs": hash_files(folder.iterdir())}


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the files that hold a model or a tokenizer, by name."""
    suffixes = (".pth", ".safetensors", ".json", ".model")
    digests = {}
    for path in tqdm(sorted({path for path in paths if path.suffix in suffixes}), desc="hashing", unit="file"):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_report(report: dict, stopwatch: Stopwatch, folder: Path) -> None:
    report["seconds"] = stopwatch.seconds
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


def stop_at_signals() -> None:
    """A stopped conversion ends by an exception, so that what it has written is deleted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("error: stopped; nothing was written"))


@contextlib.contextmanager
def complete_folder(output_dir: str) -> Iterator[Path]:
    """Gives a folder to write into. It gets its real name at the end, and is deleted if there was an error."""
    output = Path(output_dir).resolve()
    folder = incomplete_folder(output_dir)
    folder.mkdir()
    try:
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after the renaming there is none


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    stop_at_signals()
    if any(word.split("=")[0] == "--to_meta" for word in sys.argv):
        sys.exit("error: --to_meta: python tools/convert_hf_to_meta.py does this now, with the same other flags")
    try:
        (args,) = parser.parse_args_into_dataclasses()
        # A shell expands `~` at the beginning of a word only, and not in --output_dir=~/models.
        args.input_dir = str(Path(args.input_dir).expanduser())
        args.output_dir = str(Path(args.output_dir).expanduser())
        plan = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    try:
        with complete_folder(args.output_dir) as folder:
            convert(args, plan, folder)
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}; nothing was written")
    print(f"{args.output_dir}: complete; {REPORT} says how it was verified")
    if plan.tokenizer.chat_template:
        print("the tokenizer has the chat template of Instruct and chat models; --instruct False for a base model")
    else:
        print("the tokenizer has no chat template, as for a base model; --instruct True for an Instruct or chat model")


if __name__ == "__main__":
    main()
