"""Converts Meta's LLaMA checkpoints (params.json, consolidated.*.pth, tokenizer.model) to the Hugging Face format and
back, and proves what it wrote.

Choose it when you have the weights as Meta hands them out, for LLaMA 1, Llama 2, Code Llama and Llama 3 to 3.3 (text),
or when a fine-tuned model must go back to Meta's code. It needs little memory, however large the model is: the shards
are memory-mapped and written block by block, and the check runs layer by layer.

    python convert_llama_weights_to_hf.py --input_dir Llama3.1-8B-Instruct --output_dir models/Llama-3.1-8B-Instruct
    python convert_llama_weights_to_hf.py --to_meta --num_shards 2 --input_dir outputs/finetune_pp --output_dir meta

Writes into --output_dir the model, its tokenizer and conversion_report.json: how closely an independent computation on
Meta's shards and transformers' layers on the other side agree, and the SHA-256 of every file. All of it appears at
once when it is complete; until then it lies in a folder whose name ends in .incomplete.

The formulas are those of LLaMA (arXiv 2302.13971), rotary embedding (2104.09864) and grouped-query attention
(2305.13245); the scaled frequencies and the layout of the shards are those of Meta's llama-models repository.
"""

import base64
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import mmap
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import MISSING, asdict, dataclass, field
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
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of the safetensors format
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BLOCK_BYTES = 2**22  # what is copied at once; more than the processor's cache holds takes longer
TOLERANCE = 1e-3  # both sides compute in float32 with the same numbers, and differ by the order of their sums


def flag(default, help: str, choices: str | None = None):
    return field(default=default, metadata={"help": help} | ({"metavar": choices} if choices else {}))


@dataclass
class Arguments:
    input_dir: str = flag(MISSING, "folder of Meta's download; with --to_meta: of a Hugging Face model")
    output_dir: str = flag(MISSING, "folder for the result; it must not exist, or be empty")
    dtype: str = flag("auto", "of the written weights; auto: as they are", "bfloat16|float16|float32|auto")
    max_shard_size: str = flag("5GB", "largest .safetensors file, such as 5GB or 500MB")
    verify: bool = flag(True, "compare all values and an independent computation, and hash all files")
    tokenizer_only: bool = flag(False, "convert tokenizer.model and nothing else")
    to_meta: bool = flag(False, "the other direction: from Hugging Face to Meta")
    num_shards: int | None = flag(None, "of --to_meta; default: as many as the model once had, else 1")
    rope_scaling_factor: float | None = flag(None, "of Llama 3.1 and later; default: 32 if the output is tied, else 8")
    instruct: bool | None = flag(None, "with chat template and stop ids (Llama 3); default: as the folder's name says")


# -------------------------------------------------------------------------------------------------------------------
# What params.json means, and under which name, in which shape and how divided each side keeps a weight
# -------------------------------------------------------------------------------------------------------------------

# The entries of params.json; one that is not here might change what the weights mean.
COUNTS = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"]
NUMBERS = ["norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor"]
OTHERS = ["vocab_size", "use_scaled_rope", "max_batch_size", "max_seq_len"]
# What params.json determines of a configuration.
FIELDS = (
    "model_type hidden_act attention_bias mlp_bias head_dim vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads rms_norm_eps rope_parameters tie_word_embeddings"
).split()


@dataclass(frozen=True)
class Weight:
    meta: str
    hf: str
    shape: tuple[int, ...]
    split: int | None = None  # the dimension that Meta's shards divide; None: every shard holds all of it
    rotary: bool = False  # Meta's layout pairs the rows 2i and 2i+1 of a head, Hugging Face's i and i + head_dim/2
    max_parts: int = 2**30  # key and value heads are not cut: where they are fewer than shards, neighbours hold copies

    def num_parts(self, num_shards: int) -> int:
        return 1 if self.split is None else min(num_shards, self.max_parts)

    def piece_shape(self, num_shards: int) -> list[int]:
        return [n // self.num_parts(num_shards) if i == self.split else n for i, n in enumerate(self.shape)]


def list_weights(c: LlamaConfig, vocabulary_parallel: bool) -> list[Weight]:
    """All weights in Meta's order. LLaMA 1 and 2 divide the embedding by columns, Llama 3 by its vocabulary."""
    dim, ffn, kv, table = c.hidden_size, c.intermediate_size, c.num_key_value_heads, (c.vocab_size, c.hidden_size)
    weights = [Weight("tok_embeddings.weight", "model.embed_tokens.weight", table, 0 if vocabulary_parallel else 1)]
    for i in range(c.num_hidden_layers):
        for meta, hf, *layout in (
            ("attention.wq", "self_attn.q_proj", (dim, dim), 0, True),
            ("attention.wk", "self_attn.k_proj", (kv * c.head_dim, dim), 0, True, kv),
            ("attention.wv", "self_attn.v_proj", (kv * c.head_dim, dim), 0, False, kv),
            ("attention.wo", "self_attn.o_proj", (dim, dim), 1),
            ("feed_forward.w1", "mlp.gate_proj", (ffn, dim), 0),
            ("feed_forward.w2", "mlp.down_proj", (dim, ffn), 1),
            ("feed_forward.w3", "mlp.up_proj", (ffn, dim), 0),
            ("attention_norm", "input_layernorm", (dim,)),
            ("ffn_norm", "post_attention_layernorm", (dim,)),
        ):
            weights.append(Weight(f"layers.{i}.{meta}.weight", f"model.layers.{i}.{hf}.weight", *layout))
    # A tied output, if Meta's file has it nevertheless, is read back from the embedding.
    output = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return [*weights, Weight("norm.weight", "model.norm.weight", (dim,)), Weight("output.weight", output, table, 0)]


def config_of_params(params: dict, vocab_size: int, tied: bool, factor: float | None, dtype=None) -> LlamaConfig:
    """The configuration that params.json states, with the defaults of the code that Meta published with it.

    Args:
        factor: of the scaled frequencies, if it is not the one that Meta's code has for this generation.
        dtype: of Meta's files; with theta it tells the generation, and so the context, which no file states.
    """
    dim, num_heads = params["dim"], params["n_heads"]
    rope_theta, norm_eps = float(params.get("rope_theta") or 10000), params.get("norm_eps") or 1e-5
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    if params.get("use_scaled_rope"):
        context = 131072
        rope["rope_type"] = "llama3"
        rope["factor"] = float(factor or params.get("rope_scaling_factor") or (32 if tied else 8))
        rope["low_freq_factor"], rope["high_freq_factor"] = 1.0, 4.0
        rope["original_max_position_embeddings"] = 8192
    elif rope_theta == 500000:  # Llama 3
        context = 8192
    elif rope_theta != 10000:  # Code Llama
        context = 16384
    elif dtype == torch.float16 or (dtype != torch.bfloat16 and norm_eps < 1e-5):  # LLaMA 1
        context = 2048
    else:
        context = 4096
    multiple_of = params.get("multiple_of") or 256
    intermediate_size = int((params.get("ffn_dim_multiplier") or 1) * int(8 * dim / 3))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=math.ceil(intermediate_size / multiple_of) * multiple_of,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=num_heads,
        num_key_value_heads=params.get("n_kv_heads") or num_heads,
        max_position_embeddings=context,
        rms_norm_eps=norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )


def params_of_config(c: LlamaConfig) -> dict:
    params = {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "vocab_size": c.vocab_size,
        "norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_parameters["rope_theta"],
        # Meta's formula for the feed-forward size has no inverse in round numbers; these two give exactly that size.
        "multiple_of": 1,
        "ffn_dim_multiplier": (c.intermediate_size + 0.5) / int(8 * c.hidden_size / 3),
    }
    if "factor" in c.rope_parameters:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": c.rope_parameters["factor"]}
    return params


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before anything is written
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    tokenizer: "TokenizerFile | None"
    config: LlamaConfig | None = None  # what Meta's params.json means, in both directions
    weights: list[Weight] = field(default_factory=list)  # those to write
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the result, by Meta's names
    shards: list[dict[str, torch.Tensor]] | None = None
    meta: dict = field(default_factory=dict)  # what the way back needs and no file of Hugging Face's shows

    def num_bytes(self, weight: Weight) -> int:
        return self.dtypes[weight.meta].itemsize * math.prod(weight.shape)


def check_arguments(args: Arguments) -> Plan:
    """What to convert, from the headers of the files alone.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    output, part, plan = Path(args.output_dir).resolve(), incomplete_folder(args.output_dir), None
    factor, n = args.rope_scaling_factor, args.num_shards
    mistakes = [
        f"--{name} {getattr(args, name)}: {remedy}"
        for name, wrong, remedy in (
            ("dtype", args.dtype not in (*DTYPES, "auto"), f"must be one of {', '.join(DTYPES)}, auto"),
            ("max_shard_size", parse_size(args.max_shard_size) < 1, "write a size such as 5GB or 500MB"),
            ("num_shards", n is not None and (n < 1 or not args.to_meta), "at least 1; only with --to_meta"),
            ("rope_scaling_factor", factor is not None and (factor < 1 or args.to_meta), "at least 1; no --to_meta"),
            ("instruct", args.instruct is not None and args.to_meta, "not with --to_meta"),
            ("tokenizer_only", args.tokenizer_only and args.to_meta, "not with --to_meta"),
            ("output_dir", output.is_file() or output.is_dir() and any(output.iterdir()), "not empty; name another"),
            ("output_dir", part.exists(), f"another conversion runs or was killed; if it was, delete {part}"),
            ("input_dir", not Path(args.input_dir).is_dir(), "no such folder"),
        )
        if wrong
    ]
    if not mistakes:
        try:
            plan = check_hf(args) if args.to_meta else check_meta(args)
        except (ValueError, OSError, StrictDataclassError, ZeroDivisionError) as problem:
            mistakes.append(f"--input_dir {args.input_dir}: {' '.join(str(problem).split())}")
    if plan:
        needed, free = 2**26 + sum(map(plan.num_bytes, plan.weights)), shutil.disk_usage(part.parent).free
        if free < needed:
            sizes = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free"
            mistakes.append(f"--output_dir {args.output_dir}: {sizes} on that disk; name a folder on another")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return plan


def parse_size(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)", text.strip().upper())
    return int(float(size[1]) * UNITS[size[2]]) if size else 0


def incomplete_folder(output_dir: str) -> Path:
    """Where the result grows: beside the folder that will hold it, as far as that path exists."""
    output = Path(output_dir).resolve()
    return next(parent for parent in output.parents if parent.is_dir()) / f"{output.name}.incomplete"


def check_meta(args: Arguments) -> Plan:
    """The plan for a folder of Meta's.

    Raises:
        ValueError, FileNotFoundError: a file is missing, damaged or not what params.json says.
    """
    folder = Path(args.input_dir)
    params = {} if args.tokenizer_only and not (folder / "params.json").is_file() else read_params(folder)
    places = [parent / "tokenizer.model" for parent in (folder.resolve(), folder.resolve().parent)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        raise FileNotFoundError("no tokenizer.model in it or beside it; Meta's download has one, copy it there")
    # Llama 3 and its successors have the same tokenizer.model; what its special tokens are called depends on which.
    newer = bool(params.get("use_scaled_rope")) if params else True
    tokenizer = read_tokenizer(path, newer, is_instruct(folder) if args.instruct is None else args.instruct)
    if args.instruct and tokenizer.kind != "tiktoken":
        raise ValueError("only Llama 3 and its successors have a chat template here; leave --instruct away")
    if args.tokenizer_only:
        return Plan(tokenizer)
    if args.rope_scaling_factor and not params.get("use_scaled_rope"):
        raise ValueError("params.json does not state use_scaled_rope; leave --rope_scaling_factor away")

    shards = open_shards(folder)
    embedding, n = shards[0].get("tok_embeddings.weight"), len(shards)
    if embedding is None or embedding.dim() != 2:
        raise ValueError("tok_embeddings.weight is missing in shard 0, or is no matrix; download it again")
    vocabulary_parallel = n > 1 and embedding.shape[1] == params["dim"]
    # LLaMA 1 and 2 state -1 and leave it to the tokenizer.
    vocab_size = max(params.get("vocab_size") or 0, 0) or len(embedding) * (n if vocabulary_parallel else 1)
    stored = any("output.weight" in shard for shard in shards)
    tied = not stored or all(is_tied(shard) for shard in shards)
    if tokenizer.size != vocab_size:
        raise ValueError(f"{path} has {tokenizer.size} tokens, the embedding {vocab_size}; they do not belong together")
    config = config_of_params(params, vocab_size, tied, args.rope_scaling_factor, embedding.dtype)
    weights = list_weights(config, vocabulary_parallel)[: None if stored else -1]
    check_division(config, weights, n, "a shard is missing, or params.json is of another model")
    check_shards(weights, shards, config.head_dim)
    if embedding.dtype == torch.bfloat16 and config.rms_norm_eps < 1e-5:
        remedy = "Llama 2 was trained with 1e-05, and Meta corrected an early params.json that says otherwise"
        print(f"warning: params.json states norm_eps {config.rms_norm_eps}: {remedy}", file=sys.stderr)

    dtypes = {weight.meta: DTYPES.get(args.dtype, shards[0][weight.meta].dtype) for weight in weights}
    config.dtype = name_of(dtypes["tok_embeddings.weight"])
    for name, value in tokenizer.ids().items():
        setattr(config, name, value)
    # One shard does not show how it would be divided: as Llama 3 is, if it has its tokenizer.
    meta = {"params": params, "num_shards": n, "output_stored": stored}
    meta["vocabulary_parallel"] = vocabulary_parallel or (n == 1 and tokenizer.kind == "tiktoken")
    if "rope.freqs" in shards[0]:  # a table that Meta's code computes anew
        freqs = shards[0]["rope.freqs"]
        meta["rope_freqs"] = {"dtype": name_of(freqs.dtype), "values": freqs.tolist()}
    return Plan(tokenizer, config, weights[: -1 if stored and tied else None], dtypes, shards, meta)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_instruct(folder: Path) -> bool:
    """Nothing in the files tells an Instruct model from a base model, but the name that its download has."""
    names = [*folder.absolute().parts[-2:], *folder.resolve().parts[-2:]]
    names += [part for part in folder.absolute().parts if part.startswith("models--")]  # the hub's cache
    return any("instruct" in name.lower() for name in names)


def read_params(folder: Path) -> dict:
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        stated = {name: value for name, value in params.items() if value is not None}
    except FileNotFoundError:
        raise FileNotFoundError("no params.json in it; name the folder that Meta's download made") from None
    except (ValueError, AttributeError):
        raise ValueError("params.json is no JSON object; download it again") from None
    if unknown := stated.keys() - {*COUNTS, *NUMBERS, *OTHERS}:
        raise ValueError(f"params.json has {', '.join(sorted(unknown))}: no text model, or quantized; take another")
    wrong = [name for name in COUNTS if name in stated and not (type(stated[name]) is int and stated[name] > 0)]
    wrong += [name for name in NUMBERS if name in stated and not is_positive(stated[name])]
    wrong += ["vocab_size"] if type(stated.get("vocab_size", -1)) is not int else []
    wrong += ["use_scaled_rope"] if type(stated.get("use_scaled_rope", False)) is not bool else []
    if wrong := [name for name in ("dim", "n_layers", "n_heads") if name not in stated] + wrong:
        raise ValueError(f"params.json has no number, or a wrong one, for {', '.join(wrong)}; download it again")
    return params


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def open_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Every shard's tensors, mapped and not read; nothing in the files is executed."""
    paths, shards = sorted(folder.glob("consolidated.*.pth")), []
    expected = {f"consolidated.{i:02d}.pth" for i in range(max(len(paths), 1))}
    if absent := sorted(expected - {path.name for path in paths}):
        raise FileNotFoundError(f"{absent[0]} is missing; download it again, or name the folder that has it")
    for path in paths:
        with open(path, "rb") as file:
            start = file.read(2)
        if start[:1] == b"\x80":  # a bare pickle, as PyTorch wrote before 1.6
            resave = f"import torch; torch.save(torch.load('{path}', weights_only=True), '{path}')"
            raise ValueError(f'{path.name} is in an old format that cannot be mapped; run python -c "{resave}"')
        try:
            if start != b"PK":
                raise RuntimeError("this is no PyTorch file")
            shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            shard = None
        except RuntimeError as problem:
            reason = str(problem).splitlines()[0].split(". ")[0]  # what follows may advise to execute the pickle
            raise ValueError(f"{path.name} is truncated or damaged ({reason}); download it again") from None
        if not isinstance(shard, dict) or not all(map(is_dense, shard.values())):
            raise ValueError(f"{path.name} holds other things than tensors and was not opened; get it from Meta")
        shards.append(shard)
    return shards


def is_dense(value) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def is_tied(shard: dict[str, torch.Tensor]) -> bool:
    """Whether the output, which is stored, equals the embedding, as in Llama 3.2."""
    embedding, output = shard.get("tok_embeddings.weight"), shard.get("output.weight")
    if embedding is None or output is None or embedding.shape != output.shape:
        return False
    equal = torch.equal(embedding, output)
    release(embedding, output)
    return equal


def check_division(c: LlamaConfig, weights: list[Weight], n: int, remedy: str) -> None:
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    uneven = [c.hidden_size % heads, c.head_dim % 2, heads % kv, heads % n, max(n, kv) % min(n, kv)]
    uneven += [weight.shape[weight.split] % weight.num_parts(n) for weight in weights if weight.split is not None]
    if any(uneven):
        raise ValueError(f"{n} shards do not divide {heads} heads, {kv} key/value heads, {c.hidden_size} dimensions, "
                         f"{c.intermediate_size} feed-forward rows and {c.vocab_size} tokens; {remedy}")  # fmt: skip


def check_shards(weights: list[Weight], shards: list[dict[str, torch.Tensor]], head_dim: int) -> None:
    """Every shard has exactly the tensors that params.json makes; those that several shards hold are equal."""
    n, wrong = len(shards), []
    expected = {weight.meta: weight.piece_shape(n) for weight in weights}
    if any("rope.freqs" in shard for shard in shards):
        expected["rope.freqs"] = [head_dim // 2]
    for i, shard in enumerate(shards):
        wrong += [f"{name} is unknown" for name in shard if name not in expected]
        for name, shape in expected.items():
            if name not in shard:
                wrong.append(f"{name} is missing in shard {i}")
            elif list(shard[name].shape) != shape:
                made = f"{shape} as params.json and {n} shards make it"
                wrong.append(f"{name} is {list(shard[name].shape)} in shard {i}, not {made}")
            elif shard[name].dtype not in CODES or shard[name].dtype != shards[0][name].dtype:
                wrong.append(f"{name} is {shard[name].dtype} in shard {i}")
    if wrong:
        raise ValueError(f"{'; '.join(wrong[:3])} ({len(wrong)} such findings): a shard is missing, damaged "
                         "or of another model, or params.json is; download again")  # fmt: skip
    for weight in weights:
        copies = n // weight.num_parts(n)
        for i in range(n if copies > 1 else 0):
            first, other = shards[i // copies * copies][weight.meta], shards[i][weight.meta]
            if not torch.equal(first, other):
                raise ValueError(
                    f"{weight.meta} must be equal in several shards and is not in shard {i}; download again"
                )
            release(first, other)


def check_hf(args: Arguments) -> Plan:
    """The plan for a folder in Hugging Face's format, to be written as Meta's.

    Raises:
        ValueError, FileNotFoundError: it is no LLaMA, is damaged, or has what Meta's code cannot express.
    """
    folder = Path(args.input_dir)
    if (folder / "adapter_config.json").is_file():
        raise ValueError("it holds an adapter; merge the adapter into its model first")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("no config.json in it; name the folder of a whole model")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it would ask
    if config.model_type != "llama":
        raise ValueError(f"config.json is that of a {config.model_type}; Meta's format is for a llama")
    former = read_former_meta(folder)
    for params in (former.get("params"), params_of_config(config)):  # the original ones, if they still hold
        stated = config_of_params(params, config.vocab_size, config.tie_word_embeddings, None) if params else None
        differ = [name for name in FIELDS if getattr(stated, name, None) != getattr(config, name)]
        if not differ:
            break
    else:
        raise ValueError(f"Meta's code cannot compute {differ[0]} = {getattr(config, differ[0])} of config.json")
    meta = {"num_shards": 1, "output_stored": True}
    meta["vocabulary_parallel"] = config.tie_word_embeddings or stated.rope_parameters["rope_theta"] == 500000
    meta |= former | {"params": params}
    meta["num_shards"] = args.num_shards or meta["num_shards"]
    weights = list_weights(stated, meta["vocabulary_parallel"])[: None if meta["output_stored"] else -1]
    check_division(stated, weights, meta["num_shards"], "choose another --num_shards")

    tensors, names = hf_tensors(folder), {weight.hf for weight in weights}
    unknown = {name for name in tensors if name != "lm_head.weight" and "rotary_emb" not in name} - names
    if wrong := sorted(unknown | (names - tensors.keys())):
        raise ValueError(f"{wrong[0]} is missing or unknown ({len(wrong)} such weights); convert a whole LLaMA")
    dtypes = {}
    for weight in weights:
        with safe_open(tensors[weight.hf], framework="pt") as file:
            part = file.get_slice(weight.hf)
            shape, dtype = part.get_shape(), part[:1].dtype
        if tuple(shape) != weight.shape:
            raise ValueError(f"{weight.hf} is {shape}, not {list(weight.shape)} as config.json makes it")
        if dtype not in CODES:
            raise ValueError(f"{weight.hf} is {dtype}; quantized weights are not converted")
        dtypes[weight.meta] = DTYPES.get(args.dtype, dtype)
    tokenizer, path = None, folder / "tokenizer.model"
    if path.is_file():
        tokenizer = read_tokenizer(path, stated.rope_parameters["rope_type"] == "llama3", instruct=False)
        check_ids(config, tokenizer)
        if tokenizer.size != config.vocab_size:
            sizes = f"{tokenizer.size} tokens, the embedding {config.vocab_size}"
            raise ValueError(f"{path} has {sizes}: tokens that were added have no place in Meta's format")
    return Plan(tokenizer, stated, weights, dtypes, None, meta)


def read_former_meta(folder: Path) -> dict:
    """What Meta's folder had, if this one was made from it."""
    path = folder / "conversion_report.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))["meta"]
        complete = not meta or isinstance(meta["params"], dict) and type(meta["num_shards"]) is int
    except (ValueError, TypeError, KeyError):
        complete = False
    if not complete:
        raise ValueError("conversion_report.json is damaged; delete it, and state --num_shards")
    return meta


def hf_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the files that transformers would load."""
    paths, tensors, index = [folder / "model.safetensors"], {}, folder / "model.safetensors.index.json"
    if not paths[0].is_file():
        if not index.is_file():
            raise FileNotFoundError("no model.safetensors in it; save the model in that format first")
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{index.name} is damaged; save the model again") from None
        paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= dict.fromkeys(file.keys(), path)
        except SafetensorError as problem:
            raise ValueError(f"{path.name} is truncated or damaged ({problem})") from None
    return tensors


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


def row_blocks(num_rows: int, num_columns: int, multiple: int) -> list[slice]:
    step = max(BLOCK_BYTES // (4 * num_columns) // multiple, 1) * multiple
    return [slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def release(*tensors: torch.Tensor) -> None:
    """Drops the pages of tensors that torch.load mapped, else they count as used memory until the file is closed.

    Only for those: the pages of a private, unchanged mapping are read again from the file when they are needed.
    """
    for tensor in tensors:
        advise(tensor, 4)  # MADV_DONTNEED


def fetch_pages(tensor: torch.Tensor) -> None:
    """Maps all pages at once: one by one, when they are first read, takes as long as copying them."""
    advise(tensor, 22)  # MADV_POPULATE_READ; kernels before 5.14 do not know it and do nothing


def advise(tensor: torch.Tensor, advice: int) -> None:
    """Linux' madvise on the whole pages within the tensor's part of its storage."""
    storage = tensor.untyped_storage()
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)


def joined_rows(weight: Weight, shards: list[dict[str, torch.Tensor]], head_dim: int):
    """Yields the rows of Hugging Face's tensor, in order, from Meta's pieces."""
    pieces, parts = [shard[weight.meta] for shard in shards], weight.num_parts(len(shards))
    groups = [pieces] if weight.split == 1 else [[piece] for piece in pieces[:: len(pieces) // parts]]
    for group in groups:
        for rows in row_blocks(len(group[0]), math.prod(weight.shape[1:]), head_dim):
            blocks = [piece[rows] for piece in group]
            for block in blocks:
                fetch_pages(block)
            block = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
            if weight.rotary:
                block = block.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            yield block
        release(*group)


def divided_rows(weight: Weight, tensors: dict[str, Path], head_dim: int, num_shards: int):
    """Yields (shard, first row, rows) of all of Meta's pieces from Hugging Face's tensor."""
    size, copies = weight.piece_shape(num_shards)[0], num_shards // weight.num_parts(num_shards)
    # The file is opened for each tensor anew, for it keeps in memory what was read until it is closed.
    with safe_open(tensors[weight.hf], framework="pt") as file:
        whole = file.get_slice(weight.hf)
        for rows in row_blocks(size, math.prod(weight.shape[1:]), head_dim):
            columns = whole[rows].chunk(num_shards, 1) if weight.split == 1 else None
            for i in range(num_shards):
                first = i // copies * size if weight.split == 0 else 0
                block = columns[i] if columns else whole[first + rows.start : first + rows.stop]
                if weight.rotary:
                    block = block.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
                yield i, rows.start, block


def as_bytes(rows: torch.Tensor, dtype: torch.dtype, name: str):
    """The bytes of the rows in `dtype`; a value that overflows there is an error, not an infinity in the result."""
    if rows.dtype != dtype and not (rows := rows.to(dtype)).isfinite().all():
        raise ValueError(f"{name} has values that {dtype} cannot hold; choose another --dtype")
    return rows.contiguous().flatten().view(torch.uint8).numpy()


def write_hf(plan: Plan, folder: Path, max_shard_size: int, progress: tqdm) -> None:
    """The safetensors format: length of the header in 8 bytes, the header in JSON, the tensors' bytes."""
    files, size = [[]], 0
    for weight in plan.weights:
        if files[-1] and size + plan.num_bytes(weight) > max_shard_size:
            files, size = [*files, []], 0
        files[-1].append(weight)
        size += plan.num_bytes(weight)
    index = {"metadata": {"total_size": sum(map(plan.num_bytes, plan.weights))}, "weight_map": {}}
    for number, weights in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for weight in weights:
            offsets = [end, end := end + plan.num_bytes(weight)]
            header[weight.hf] = {
                "dtype": CODES[plan.dtypes[weight.meta]],
                "shape": weight.shape,
                "data_offsets": offsets,
            }
            index["weight_map"][weight.hf] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for weight in weights:
                for rows in joined_rows(weight, plan.shards, plan.config.head_dim):
                    progress.update(file.write(as_bytes(rows, plan.dtypes[weight.meta], weight.meta)))
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    plan.config.save_pretrained(folder)
    GenerationConfig(**plan.tokenizer.ids()).save_pretrained(folder)


def write_meta(plan: Plan, source: Path, folder: Path, progress: tqdm) -> None:
    """torch.save lays every shard out with tensors that have no memory; then their bytes are filled in."""
    n, tensors, freqs = plan.meta["num_shards"], hf_tensors(source), plan.meta.get("rope_freqs")
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(n)]
    with FakeTensorMode():
        shard = {w.meta: torch.empty(w.piece_shape(n), dtype=plan.dtypes[w.meta]) for w in plan.weights}
        if freqs:
            shard["rope.freqs"] = torch.empty(len(freqs["values"]), dtype=DTYPES[freqs["dtype"]])
        for path in paths:
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save(shard, path)
            except RuntimeError as problem:
                raise OSError(f"{path.name} cannot be written: {str(problem).splitlines()[0]}") from None
        loaded = torch.load(paths[0], weights_only=True)
        offsets = {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in loaded.items()}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "r+b")) for path in paths]
        for weight in plan.weights:
            dtype = plan.dtypes[weight.meta]
            row = math.prod(weight.piece_shape(n)[1:]) * dtype.itemsize
            for i, first, rows in divided_rows(weight, tensors, plan.config.head_dim, n):
                files[i].seek(offsets[weight.meta] + first * row)
                progress.update(files[i].write(as_bytes(rows, dtype, weight.hf)))
        for file in files if freqs else ():
            file.seek(offsets["rope.freqs"])
            file.write(as_bytes(torch.tensor(freqs["values"]), DTYPES[freqs["dtype"]], "rope.freqs"))
    (folder / "params.json").write_text(json.dumps(plan.meta["params"]))
    if plan.tokenizer:
        shutil.copyfile(plan.tokenizer.path, folder / "tokenizer.model")


# -------------------------------------------------------------------------------------------------------------------
# Tokenizer: SentencePiece's file (LLaMA 1 and 2) or one in tiktoken's format (Llama 3)
# -------------------------------------------------------------------------------------------------------------------

# How Llama 3 cuts a text into words.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
SPLIT += r"|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (  # Meta's ChatFormat of llama-models, for text
    "{{ bos_token }}{% for message in messages %}{% set role = message['role'] %}"
    "{{ '<|start_header_id|>' + ('ipython' if role == 'tool' else role) + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass
class TokenizerFile:
    """What tokenizer.model says, the fast tokenizer that equals it, and its own way to encode."""

    path: Path
    kind: str
    size: int
    tokenizer: Tokenizer
    encode: object
    names: dict[str, str]  # bos_token, eos_token and perhaps unk_token and pad_token
    stops: list[str]  # tokens that end an answer
    whole: list[str] = field(default_factory=list)  # pieces that SentencePiece never cuts
    chat_template: str | None = None

    def ids(self) -> dict:
        """As configurations have them: eos_token_id is a list where several tokens end an answer."""
        stops = [self.id_of(token) for token in self.stops]
        return {
            "bos_token_id": self.id_of(self.names["bos_token"]),
            "eos_token_id": stops if len(stops) > 1 else stops[0],
            "pad_token_id": self.id_of(self.names.get("pad_token", "")),
        }

    def id_of(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)


def read_tokenizer(path: Path, newer: bool, instruct: bool) -> TokenizerFile:
    """Args: newer: special tokens of Llama 3.1 and later, not 3; instruct: with chat template and its stop tokens."""
    content, model = path.read_bytes(), sentencepiece_model_pb2.ModelProto()
    try:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
            return read_tiktoken(path, content, newer, instruct)
        model.ParseFromString(content)
        return read_sentencepiece(path, model, sentencepiece.SentencePieceProcessor(model_proto=content))
    except Exception as problem:  # protobuf's errors have no common class
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{path} is no tokenizer of a LLaMA or is damaged ({reason}); download it again") from None


def read_sentencepiece(path: Path, model, reader) -> TokenizerFile:
    """transformers' LlamaTokenizer is not used: version 5 drops one of two leading spaces, and the BOS."""
    rules, kinds = model.normalizer_spec, model.SentencePiece
    changed = rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.add_dummy_prefix
    if changed or model.trainer_spec.model_type != model.trainer_spec.BPE or not model.trainer_spec.byte_fallback:
        raise ValueError("LLaMA's is a BPE with byte fallback that leaves the text as it is")
    ids = {"bos_token": reader.bos_id(), "eos_token": reader.eos_id()}
    ids |= {"unk_token": reader.unk_id(), "pad_token": reader.pad_id()}
    names = {name: reader.id_to_piece(i) for name, i in ids.items() if i >= 0}
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL}
    whole = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    special = [piece.piece for piece in model.pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]

    bpe = models.BPE(
        vocabulary,
        find_merges(sorted(scores, key=lambda piece: -scores[piece])),
        unk_token=names["unk_token"],
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=bool(whole),
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if whole:
        longest_first = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    add_special_tokens(tokenizer, special, names["bos_token"])
    stops = [names["eos_token"]]
    return TokenizerFile(path, "sentencepiece", len(vocabulary), tokenizer, reader.encode, names, stops, whole)


def read_tiktoken(path: Path, content: bytes, newer: bool, instruct: bool) -> TokenizerFile:
    """Each line has a token in base64 and its rank; 256 special tokens follow that only Meta's code names."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError("it lacks ranks or bytes")
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"} if newer else {}
    reserved = itertools.count()
    special = [f"<|{named[i] if i in named else f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]
    # Byte-level tokenizers write each byte as a printable letter, after GPT-2's table.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted({*range(256)} - {*printable})
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    pieces = ["".join(letters[byte] for byte in token) for token in sorted(ranks, key=ranks.get)]
    # tiktoken takes a word that is a token as it is, whether merges lead to it or not.
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, find_merges(pieces), ignore_merges=True)
    tokenizer, bytewise = Tokenizer(bpe), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    add_special_tokens(tokenizer, special, special[0])
    # A turn ends with eot_id; one that calls a tool with eom_id.
    names = {"bos_token": special[0], "eos_token": "<|eot_id|>" if instruct else special[1]}
    names |= {"pad_token": "<|finetune_right_pad_id|>"} if newer else {}
    stops = [special[1], *(["<|eom_id|>"] if newer else []), "<|eot_id|>"] if instruct else [special[1]]
    encode, template = lambda text: encode_by_ranks(text, ranks), CHAT_TEMPLATE if instruct else None
    return TokenizerFile(path, "tiktoken", len(ranks) + 256, tokenizer, encode, names, stops, [], template)


def find_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Both formats rank merged pieces, not merges: every way to make a piece out of two has the piece's rank."""
    known, merges = set(pieces), []
    for piece in pieces:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(left, right) for left, right in cuts if left in known and right in known]
    return merges


def add_special_tokens(tokenizer: Tokenizer, tokens: list[str], bos: str) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    single, special = f"{bos}:0 $A:0", [(bos, tokenizer.token_to_id(bos))]
    pair = f"{single} {bos}:1 $B:1"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def encode_by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: of all neighbours in a word, join those whose union has the lowest rank, until none has."""
    # Python's \s also has the separators \x1c to \x1f, which tiktoken's has not.
    split, ids = SPLIT.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}"), []
    for word in regex.findall(split, text):
        parts = [word.encode()] if word.encode() in ranks else [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
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
    source, ids = plan.tokenizer, plan.tokenizer.ids()
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
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")

    written, texts = AutoTokenizer.from_pretrained(folder), sample_texts(source.whole)
    for text in texts:
        found, expected = written(text).input_ids, [ids["bos_token_id"], *source.encode(text)]
        if found != expected:
            raise ValueError(f"the tokenizer gives {text!r} the ids {found}, and {source.path} {expected}")
    expected = {"bos": ids["bos_token_id"], "eos": source.id_of(source.names["eos_token"]), "pad": ids["pad_token_id"]}
    found = {"bos": written.bos_token_id, "eos": written.eos_token_id, "pad": written.pad_token_id}
    if found != expected:
        raise ValueError(f"the tokenizer as written has the ids {found}, and {source.path} {expected}")
    if plan.config:
        check_ids(AutoConfig.from_pretrained(folder), source)
        check_ids(GenerationConfig.from_pretrained(folder), source)
    return {"kind": source.kind, "size": source.size, **ids, "texts_with_equal_ids": len(texts)}


def sample_texts(pieces: list[str]) -> list[str]:
    """Texts that tokenizers differ on: spaces, digits, control characters, other scripts; the same ones every time."""
    dice = random.Random(0)
    texts = ["", " a", "  a", "a  b ", "\n\n a\t", "3.14159 x10", "\x00\x1c\x7f", "def f():\n    return"]
    letters = [*"abcdefgh ETAOIN 0123456789 .,'!?\n\t中的é🙂\x1c\u3000", "  ", " the", "ing", "'ll"]
    letters += [piece.replace("▁", " ") for piece in pieces]
    for _ in range(500):
        texts.append("".join(dice.choices(letters, k=dice.randint(1, 40))))
    for _ in range(100):
        texts.append("".join(chr(dice.randint(1, 0xD7FF)) for _ in range(dice.randint(1, 10))))
    return texts


def check_ids(config, source: TokenizerFile) -> None:
    """Compares the ids of a configuration with those of tokenizer.model; fine-tuning may have chosen a pad token."""
    ids = source.ids()
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [source.names["eos_token"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    if not {source.tokenizer.id_to_token(i) for i in stops} <= {*known} or config.bos_token_id != ids["bos_token_id"]:
        found = f"BOS {config.bos_token_id} and EOS {config.eos_token_id}"
        raise ValueError(f"the configuration has {found}, {source.path} {ids}; they do not belong together")


# -------------------------------------------------------------------------------------------------------------------
# The proof: Meta's side computed after the papers, the other by transformers, both in float32 and layer by layer
# -------------------------------------------------------------------------------------------------------------------


def verify(plan: Plan, shards: list[dict[str, torch.Tensor]], folder: Path) -> dict:
    """Compares Meta's `shards` with the Hugging Face model in `folder`: every value, and the states of a forward.

    Raises:
        ValueError: they disagree; the first weight or layer that does is named.
    """
    tensors, config, dtypes = hf_tensors(folder), AutoConfig.from_pretrained(folder), plan.dtypes
    with one_thread():
        for weight in tqdm(plan.weights, desc="comparing values", unit="tensor"):
            compare_values(weight, shards, divided_rows(weight, tensors, plan.config.head_dim, len(shards)), dtypes)
    # Ids from the whole vocabulary; positions from the whole context, for scaled frequencies show far away only.
    ids = torch.tensor([config.bos_token_id, *(i * config.vocab_size // 31 for i in range(31))])
    positions = torch.cat([torch.arange(16), torch.linspace(16, config.max_position_embeddings - 1, 16).long()])
    states = [reference_states(plan.config, shards, ids, positions, dtypes)]
    states += [converted_states(config, tensors, ids, positions, dtypes["tok_embeddings.weight"])]
    names = [*(f"layer {i}" for i in range(config.num_hidden_layers)), "logits"]
    facts = {"prompt_ids": ids.tolist(), "position_ids": positions.tolist(), "tolerance": TOLERANCE}
    facts |= {"tensors_with_equal_values": len(plan.weights), "max_difference": {}, "relative_difference": {}}
    for name in tqdm(names, desc="comparing layers", unit="layer"):
        reference, converted = map(next, states)
        relative = ((reference - converted).norm(dim=-1) / reference.norm(dim=-1)).max().item()  # worst token
        facts["max_difference"][name] = (reference - converted).abs().max().item()
        facts["relative_difference"][name] = relative
        if not relative <= TOLERANCE:  # also where it is not a number
            found = f"{name} of the converted model differs by {relative:.2g} (allowed: {TOLERANCE:g})"
            raise ValueError(f"verification: {found} from the computation on Meta's shards")
    return facts


def compare_values(weight: Weight, shards: list[dict[str, torch.Tensor]], pieces, dtypes: dict) -> None:
    dtype = dtypes[weight.meta]
    for i, first, rows in pieces:
        stored = shards[i][weight.meta]
        if not torch.equal(stored[first : first + len(rows)].to(dtype), rows.to(dtype)):
            raise ValueError(f"verification: {weight.hf} has not the values of {weight.meta} in shard {i}")
        release(stored)


@torch.no_grad()
def reference_states(c: LlamaConfig, shards: list[dict[str, torch.Tensor]], ids, positions, dtypes: dict):
    """Yields the states after each layer, (tokens, dim), and then the logits, as Meta's processes would compute them.

    Each shard is a process with some of the heads and some rows of the feed-forward network; their results are summed.
    So nothing here depends on how pieces are joined, nor on the order of a head's rows in transformers.
    """

    def load(shard: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        rounded = shard[name].to(dtypes[name])
        if rounded is not shard[name]:
            release(shard[name])
        weight = rounded.to(torch.float32, copy=True)
        release(shard[name])
        return weight

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.rms_norm_eps) * load(shards[0], name)

    def heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Neighbouring features are one complex number, turned by position times frequency."""
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation).flatten(-2)

    angles = torch.outer(positions.float(), rotary_frequencies(c.rope_parameters, c.head_dim))
    rotation, mask = torch.polar(torch.ones_like(angles), angles), torch.full((len(ids), len(ids)), -math.inf).triu(1)
    pieces, dtype = [shard["tok_embeddings.weight"] for shard in shards], dtypes["tok_embeddings.weight"]
    if pieces[0].shape[1] == c.hidden_size:  # a shard holds some tokens
        x = torch.stack([pieces[i // len(pieces[0])][i % len(pieces[0])] for i in ids.tolist()]).to(dtype).float()
    else:  # a shard holds some features of every token
        x = torch.cat([piece[ids] for piece in pieces], -1).to(dtype).float()
    for i in range(c.num_hidden_layers):
        attention, network = f"layers.{i}.attention.w{{}}.weight", f"layers.{i}.feed_forward.w{{}}.weight"
        h, total = norm(x, f"layers.{i}.attention_norm.weight"), 0
        for shard in shards:
            q, k, v = (heads(h, load(shard, attention.format(part))) for part in "qkv")
            k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (rotate(k), v))
            weights = (rotate(q) @ k.transpose(1, 2) / math.sqrt(c.head_dim) + mask).softmax(-1)
            total += F.linear((weights @ v).transpose(0, 1).flatten(1), load(shard, attention.format("o")))
        x = x + total
        h, total = norm(x, f"layers.{i}.ffn_norm.weight"), 0
        for shard in shards:
            gate = F.silu(F.linear(h, load(shard, network.format(1))))
            total += F.linear(gate * F.linear(h, load(shard, network.format(3))), load(shard, network.format(2)))
        x = x + total
        yield x
    output = "output.weight" if "output.weight" in shards[0] else "tok_embeddings.weight"
    h = norm(x, "norm.weight")
    yield torch.cat([F.linear(h, load(shard, output)) for shard in shards], -1)


def rotary_frequencies(rope: dict, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair; Llama 3.1 slows those down that turn less than four times in 8192."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if "factor" not in rope:
        return frequencies
    kept = ((8192 * frequencies / (2 * math.pi) - 1) / (4 - 1)).clamp(0, 1)  # nothing of those below one turn
    return (1 - kept) * frequencies / rope["factor"] + kept * frequencies


@torch.no_grad()
def converted_states(config, tensors: dict[str, Path], ids, positions, dtype: torch.dtype):
    """Yields the same from transformers' own layer, which gets each weight from the files just before it is used."""

    def load(name: str) -> torch.nn.Parameter:
        with safe_open(tensors[name], framework="pt") as file:
            return torch.nn.Parameter(file.get_tensor(name).to(dtype).float(), requires_grad=False)

    def fetch(module, inputs) -> None:
        module.weight = load(f"model.layers.{i}.{names[module]}.weight")

    def drop(module, inputs, outputs) -> None:
        module.weight = None

    config._attn_implementation = "eager"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    names = {module: name for name, module in layer.named_modules() if "weight" in module._parameters}
    for module in names:
        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(drop)
    with safe_open(tensors["model.embed_tokens.weight"], framework="pt") as file:
        table = file.get_slice("model.embed_tokens.weight")
        x = torch.cat([table[i : i + 1] for i in ids.tolist()])[None].to(dtype).float()
    rotary = LlamaRotaryEmbedding(config)(x, positions[None])
    mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)[None, None]
    for i in range(config.num_hidden_layers):  # noqa: B007 - fetch reads it
        x = layer(x, attention_mask=mask, position_embeddings=rotary)
        yield x[0]
    norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = load("model.norm.weight")
    yield F.linear(norm(x)[0], load("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"))


# -------------------------------------------------------------------------------------------------------------------
# The conversion as a whole
# -------------------------------------------------------------------------------------------------------------------


def convert(args: Arguments, plan: Plan, folder: Path) -> None:
    """Writes all files into `folder`, the report last."""
    started, seconds, source = time.perf_counter(), {}, Path(args.input_dir)

    def note_seconds(step: str) -> None:
        seconds[step] = time.perf_counter() - started - sum(seconds.values())

    verified = args.verify and bool(plan.weights)
    report = {"arguments": asdict(args), "verified": verified, "meta": plan.meta}
    if plan.weights:
        total = sum(map(plan.num_bytes, plan.weights))
        with one_thread(), tqdm(total=total, desc="writing", unit="B", unit_scale=True) as progress:
            if args.to_meta:
                write_meta(plan, source, folder, progress)
            else:
                write_hf(plan, folder, parse_size(args.max_shard_size), progress)
        note_seconds("writing")
    if not args.to_meta:
        report["tokenizer"] = write_tokenizer(plan, folder)
        note_seconds("tokenizer")
    if verified:
        shards = open_shards(folder) if args.to_meta else plan.shards
        report["verification"] = verify(plan, shards, source if args.to_meta else folder)
        note_seconds("verifying")
        inputs = [*source.iterdir(), *([plan.tokenizer.path] if plan.tokenizer else [])]
        report["sha256"] = {"inputs": hash_files(inputs), "outputs": hash_files(folder.iterdir())}
        note_seconds("hashing")
    report["seconds"] = seconds
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "conversion_report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


def hash_files(paths) -> dict[str, str]:
    digests, kinds = {}, (".pth", ".safetensors", ".json", ".model")
    for path in tqdm(sorted({path for path in paths if path.suffix in kinds}), desc="hashing", unit="file"):
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("error: stopped; nothing was written"))
    try:
        (args,) = parser.parse_args_into_dataclasses()
        plan = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    output, folder = Path(args.output_dir).resolve(), incomplete_folder(args.output_dir)
    try:
        folder.mkdir()
        try:
            convert(args, plan, folder)
            output.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # there is none after the renaming
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}; nothing was written")
    print(f"{args.output_dir}: complete; conversion_report.json says how it was verified")
    if plan.tokenizer is None:
        print("--input_dir has no tokenizer.model, so the result has none; Meta's code needs it, copy it there")
    elif plan.tokenizer.kind == "tiktoken" and not args.to_meta:
        if plan.tokenizer.chat_template:
            print(
                "the tokenizer has the chat template and stop ids of Instruct models; --instruct False for a base model"
            )
        else:
            print("the tokenizer has no chat template, as for a base model; --instruct True for an Instruct model")


if __name__ == "__main__":
    main()
