"""Merges a LoRA adapter into its base: a plain model folder, and a GGUF file if asked for, that other programs run.

    python tools/merge_lora.py --peft_path outputs/finetune_pp_peft --output outputs/merged
    python tools/merge_lora.py --peft_path outputs/finetune_pp_peft --output outputs/merged --gguf f16
    python tools/merge_lora.py --model_path outputs/finetune_pp --output outputs/gguf --gguf q8_0

The folder has no trace of the adapter: safetensors, tokenizer, chat template and generation config, which transformers,
vLLM and TGI load as any LLaMA. Weights go through memory shard by shard. An adapter that was trained on a 4-bit base is
merged into the 16- or 32-bit original that adapter_config.json names. Without --peft_path a model is only written as
GGUF, the file of llama.cpp, Ollama and LM Studio (f32, f16, or q8_0: 8 bits and a scale for each 32 weights).

What was written is loaded again, and its logits are compared with those of base + adapter (--verify False leaves that
out). run.json in the folder is the training's receipt, so the prompt template travels on, with what was merged.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of the logits, relative to the largest logit, that rounding the weights explains.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2, "f32": 1e-5, "f16": 1e-2, "q8_0": 1e-1}
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
              "LICENSE", "LICENSE.txt")  # fmt: skip
# What PEFT's LoRA can do beyond two matrices beside a linear layer; each needs another formula.
BEYOND = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias", "fan_in_fan_out",
          "alora_invocation_tokens", "target_parameters")  # fmt: skip


@dataclass
class Arguments:
    peft_path: str | None = field(default=None, metadata={"help": "folder of a LoRA adapter; none: only --gguf"})
    model_path: str | None = field(
        default=None, metadata={"help": "folder or hub id of the base model; default: the one that the adapter names"}
    )
    output: str = field(default="", metadata={"help": "new folder to write"})
    dtype: str = field(default="auto", metadata={"help": "auto: the base's | float32 | bfloat16 | float16"})
    gguf: str | None = field(default=None, metadata={"help": "also write model-<this>.gguf: f32 | f16 | q8_0"})
    verify: bool = field(default=True, metadata={"help": "load what was written, and compare logits in float32"})


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before anything is written
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    base: Path  # a local folder
    config: object
    shards: list[Path]
    dtype: str
    deltas: dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # weight's name: A [r, in], B [out, r], scale


def check_arguments(args: Arguments) -> Job:
    """Raises ValueError with every mistake."""
    mistakes = []
    if args.dtype != "auto" and args.dtype not in DTYPES:
        mistakes.append(f"--dtype {args.dtype}: choose auto, {', '.join(DTYPES)}")
    if args.gguf not in (None, "f32", "f16", "q8_0"):
        mistakes.append(f"--gguf {args.gguf}: choose f32, f16 or q8_0")
    elif args.gguf:
        try:
            import gguf  # noqa: F401
        except ImportError:
            mistakes.append(f"--gguf {args.gguf}: needs the gguf package; pip install gguf==0.19.0")
    if not args.output:
        mistakes.append("--output is missing: name the folder to write, such as outputs/merged")
    elif Path(args.output).exists():
        mistakes.append(f"--output {args.output}: it exists; choose another folder")
    if not args.peft_path and not (args.model_path and args.gguf):
        mistakes.append("--peft_path is missing: name an adapter; or --model_path and --gguf to convert a whole model")
    adapter = {}
    if args.peft_path:
        try:
            adapter = check_adapter(args.peft_path)
            args.model_path = args.model_path or adapter["base_model_name_or_path"]
        except (ValueError, OSError) as problem:
            mistakes.append(f"--peft_path {args.peft_path}: {problem}")
    job = None
    if not mistakes:
        try:
            job = find_base(args)
            if args.gguf:
                check_gguf(job, args)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--model_path {args.model_path}: {problem}")
    if job and args.peft_path:
        try:
            job.deltas = read_deltas(args, adapter, job)
            check_vocabulary(args, adapter, job)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--peft_path {args.peft_path}: {problem}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return job


def check_adapter(folder: str) -> dict:
    """adapter_config.json of a LoRA that is a sum of two matrices; others cannot be, or are not, merged here."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise ValueError("no adapter_config.json in it; name the folder of an adapter")
    adapter = json.loads(path.read_text(encoding="utf-8"))
    if adapter.get("peft_type") != "LORA":
        raise ValueError(
            f"a {adapter.get('peft_type')} adapter cannot be merged: it puts virtual tokens before every prompt and "
            "changes no weight of the model; serve base + adapter, as test_sample.py does"
        )
    beyond = [name for name in BEYOND if adapter.get(name)] + (
        ["bias"] if adapter.get("bias", "none") != "none" else []
    )
    if beyond:
        raise ValueError(f"it uses {', '.join(beyond)}, which this tool does not merge; use PEFT's merge_and_unload")
    if not (path.parent / "adapter_model.safetensors").is_file():
        raise ValueError("no adapter_model.safetensors in it; save the adapter as safetensors")
    return adapter


def find_base(args: Arguments) -> Job:
    """The files of the base model; one on the hub is downloaded."""
    base = Path(args.model_path)
    if not base.is_dir() and args.model_path.startswith((".", "/", "~", "models/", "outputs/")):
        raise ValueError("no such folder; bash scripts/quickstart.sh fetches the sample model")
    if not base.is_dir():
        from huggingface_hub import snapshot_download

        base = Path(
            snapshot_download(args.model_path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"])
        )
    config = AutoConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantised, and what is merged into them would be rounded away; name the 16- "
                         "or 32-bit original")  # fmt: skip
    index = base / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    shards = [base / name for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(f"{', '.join(missing)} is missing; name the folder of a whole model in safetensors")
    dtype = args.dtype
    if dtype == "auto":
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    return Job(base, config, shards, dtype, {})


def read_deltas(args: Arguments, adapter: dict, job: Job) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """For the name of each weight of the base that the adapter changes: A, B and the factor of B @ A.

    Raises:
        ValueError: the file is damaged, or a pair of matrices fits no weight of the base.
    """
    try:
        with safe_open(Path(args.peft_path) / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as problem:
        raise ValueError(f"adapter_model.safetensors is damaged ({problem}); copy it again") from None
    trained_on = f"it was trained on {adapter['base_model_name_or_path']}"
    shapes = {}
    for shard in job.shards:
        with safe_open(shard, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    deltas, untrained = {}, 0
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    if unknown := [name for name in tensors if not pattern.fullmatch(name)]:
        raise ValueError(f"{unknown[0]} is no LoRA matrix of a linear layer; use PEFT's merge_and_unload")
    for module in sorted({pattern.fullmatch(name)[1] for name in tensors}):
        pair = [tensors.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{module} has only one of its two matrices; the file is not whole")
        a, b = (matrix.float() for matrix in pair)
        if shapes.get(f"{module}.weight") != [len(b), a.shape[1]] or b.shape[1] != len(a):
            raise ValueError(f"{module} does not fit --model_path {args.model_path}; {trained_on}")
        alpha = of_module(adapter.get("alpha_pattern"), module, adapter["lora_alpha"])
        rank = len(a)
        deltas[f"{module}.weight"] = (a, b, alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank))
        untrained += not b.any()
    if not deltas:
        raise ValueError("its file has no matrices")
    if untrained == len(deltas):
        print(f"warning: {args.peft_path} was never trained: all its B matrices are zero, so merging changes nothing",
              file=sys.stderr)  # fmt: skip
    return deltas


def of_module(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's alpha_pattern: the value of the first key that matches the end of the module's name."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def check_vocabulary(args: Arguments, adapter: dict, job: Job) -> None:
    """An adapter that brings its tokenizer was trained with the ids of this base model."""
    if (Path(args.peft_path) / "tokenizer.json").is_file() and (job.base / "tokenizer.json").is_file():
        ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (args.peft_path, job.base))
        if ours != theirs:
            raise ValueError(f"its vocabulary is not that of --model_path {args.model_path}; it was trained on "
                             f"{adapter['base_model_name_or_path']}")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------
# Merging
# -------------------------------------------------------------------------------------------------------------------


def merge(job: Job, folder: Path) -> None:
    """Writes W + scale * B @ A for each weight that has an adapter, computed in float32, one shard at a time."""
    dtype, weight_map, total_size = DTYPES[job.dtype], {}, 0
    for shard in job.shards:
        tensors = {}
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if name in job.deltas:
                    a, b, scale = job.deltas[name]
                    tensor = torch.addmm(tensor.float(), b, a, alpha=scale)
                tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(job.shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def copy_companions(args: Arguments, job: Job, folder: Path) -> None:
    """All beside the weights; the adapter's own tokenizer and chat template come last, for training used them."""
    for source in (job.base, Path(args.peft_path)):
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copy(source / name, folder / name)
    config = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    # transformers 5 reads dtype, what was built for older ones torch_dtype.
    config |= {"dtype": job.dtype, "torch_dtype": job.dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------------
# GGUF
# -------------------------------------------------------------------------------------------------------------------


def check_gguf(job: Job, args: Arguments) -> None:
    """Raises ValueError if llama.cpp would run something else than this model."""
    if job.config.architectures != ["LlamaForCausalLM"]:
        found = ", ".join(job.config.architectures or ["none"])
        raise ValueError(f"--gguf {args.gguf}: only LlamaForCausalLM is written, and this is {found}; llama.cpp's "
                         "convert_hf_to_gguf.py knows more")  # fmt: skip
    if job.config.attention_bias or job.config.mlp_bias or job.config.hidden_act != "silu":
        raise ValueError(f"--gguf {args.gguf}: biases or another activation than silu are not written")
    if rope_of(job.config)["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"--gguf {args.gguf}: rope type {rope_of(job.config)['rope_type']} is not written")
    tokenizer_folder = (
        args.peft_path if args.peft_path and (Path(args.peft_path) / "tokenizer.json").is_file() else job.base
    )
    describe_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder), job.config.vocab_size)


def rope_of(config) -> dict:
    return {"rope_type": "default"} | dict(config.rope_parameters)


def write_gguf(folder: Path, path: Path, kind: str, name: str) -> None:
    """Writes the model in `folder` as one GGUF file, tensor by tensor."""
    import gguf

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer, folder, config)
    tensors = list(read_gguf_tensors(folder, config, kind))
    for tensor_name, shape, quantization, _ in tensors:
        num_bytes = math.prod(gguf.quant_shape_to_byte_shape(shape, quantization)) if quantization.name == "Q8_0" else (
            math.prod(shape) * (2 if quantization.name == "F16" else 4))  # fmt: skip
        writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), num_bytes, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor_name, _, quantization, read in tensors:
        with np.errstate(over="ignore"):
            array = gguf.quantize(read(), quantization)
        if array.dtype == np.float16 and not np.isfinite(array).all():
            raise ValueError(f"--gguf {kind}: {tensor_name} has values beyond float16's range; choose f32")
        writer.write_tensor_data(array)
    writer.close()


def add_shape(writer, config) -> None:
    """Sizes and rotary embedding, under llama.cpp's names."""
    import gguf

    head_dim, rope = config.head_dim or config.hidden_size // config.num_attention_heads, rope_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def read_gguf_tensors(folder: Path, config, kind: str) -> Iterator[tuple]:
    """Yields (llama.cpp's name, shape, quantization, function that reads the values) of each tensor."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    types = gguf.GGMLQuantizationType
    if rope_of(config)["rope_type"] == "llama3":
        factors = llama3_factors(config)
        yield "rope_freqs.weight", factors.shape, types.F32, lambda: factors
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                quantization = types.F32 if kind == "f32" or len(shape) == 1 else types.F16  # vectors stay float32
                if kind == "q8_0" and len(shape) > 1 and shape[-1] % 32 == 0:
                    quantization = types.Q8_0
                rotated = re.search(r"self_attn\.([qk])_proj\.weight$", name)
                num_heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
                heads = num_heads[rotated[1]] if rotated else None
                read = make_reader(shard, name, heads)
                yield names.get_name(name, try_suffixes=(".weight", ".bias")), shape, quantization, read


def make_reader(shard: Path, name: str, num_heads: int | None):
    """A function that reads one tensor as float32, with queries and keys in llama.cpp's order.

    transformers turns the first half of a head's dimensions with the second, llama.cpp (as Meta) each with its
    neighbour: the rows of each head are interleaved.
    """

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
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    plain = 1 / rope_of(config)["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def describe_tokenizer(tokenizer, vocab_size: int) -> dict:
    """The vocabulary as llama.cpp wants it: model, pre-tokenizer, tokens, types, and merges or scores.

    Raises:
        ValueError: llama.cpp does not cut text in the way of this tokenizer.
    """
    import gguf

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(f"--gguf: a tokenizer of type {model['type']} is not written, only BPE")
    vocabulary = tokenizer.get_vocab()
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # a model may have more rows than its tokenizer has tokens
    types = [gguf.TokenType.UNUSED] * vocab_size
    if max(vocabulary.values()) >= vocab_size:
        raise ValueError(f"--gguf: the tokenizer has ids beyond the model's vocabulary of {vocab_size}")
    added = {token["id"]: token["special"] for token in spec["added_tokens"]}
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
        if i in added:
            types[i] = gguf.TokenType.CONTROL if added[i] else gguf.TokenType.USER_DEFINED
        elif model["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = gguf.TokenType.BYTE
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model["byte_fallback"]:  # SentencePiece's: LLaMA 1 and 2
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
        # llama.cpp joins the pair with the highest score first, which is the order of the merges.
        rank = {}
        for number, (left, right) in enumerate(merges):
            rank.setdefault(left + right, number)
        scores = [-float(rank.get(token, 0)) for token in tokens]
        parts = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
        space = '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"prepend_scheme": "always"' in parts
        return {"model": "llama", "pre": "default", "tokens": tokens, "types": types, "scores": scores, "space": space}
    # A space within a byte-level token is written as another letter, so it can separate the two.
    joined = [f"{left} {right}" for left, right in merges]
    return {"model": "gpt2", "pre": find_pre_tokenizer(spec), "tokens": tokens, "types": types, "merges": joined}


def find_pre_tokenizer(spec: dict) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer cuts text into words."""
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if spec.get("normalizer") is None and kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if spec.get("normalizer") is None and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" in steps[0]["pattern"].get(
        "Regex", ""
    ):
        return "llama-bpe"
    raise ValueError(f"--gguf: this tokenizer cuts text by {', '.join(map(str, kinds))}, for which no name of "
                     "llama.cpp's is known here; its convert_hf_to_gguf.py knows more")  # fmt: skip


def add_tokenizer(writer, tokenizer, folder: Path, config) -> None:
    """Vocabulary, special tokens and chat template."""
    described = describe_tokenizer(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(described["model"])
    writer.add_tokenizer_pre(described["pre"])
    writer.add_token_list(described["tokens"])
    writer.add_token_types(described["types"])
    if "merges" in described:
        writer.add_token_merges(described["merges"])
    else:
        writer.add_token_scores(described["scores"])
        writer.add_add_space_prefix(described["space"])
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    generation = folder / "generation_config.json"
    stop_ids = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    others = [i for i in stop_ids if i != tokenizer.eos_token_id] if isinstance(stop_ids, list) else []
    if others:
        writer.add_eot_token_id(others[0])  # Llama 3 ends a turn with another token than a text
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS (LLaMA's do, SmolLM2's does not)."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[0] == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))
    )


# -------------------------------------------------------------------------------------------------------------------
# Verification
# -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_logits(vocab_size: int, folder: Path, peft_path: str | None = None, **options) -> torch.Tensor:
    """Logits [2, 48, vocabulary] of fixed random ids, in float32 on the CPU; no other model is in memory meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if peft_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, peft_path)
    ids = torch.randint(vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids, use_cache=False).logits


def compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits relative to the largest one. Raises OSError if rounding does not explain it."""
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCES[name]:
        raise OSError(f"the logits of what was written ({name}) are off by {difference:.1e}; nothing was kept")
    print(f"{name}: logits differ by {difference:.1e} of the largest, allowed are {TOLERANCES[name]:.0e}")
    return difference


def verify(args: Arguments, job: Job, folder: Path, gguf_path: Path | None) -> dict:
    """Compares merged with base + adapter, and GGUF with what it was made from. Returns the differences."""
    differences, vocab_size = {}, job.config.vocab_size
    merged = compute_logits(vocab_size, folder)
    if args.peft_path:
        expected = compute_logits(vocab_size, job.base, args.peft_path)
        differences[job.dtype] = compare(job.dtype, merged, expected)
    if gguf_path:
        # transformers does not read the scaling of rotary embeddings from GGUF, so it gets the configuration as well.
        options = {"gguf_file": gguf_path.name, "config": AutoConfig.from_pretrained(folder)}
        differences[args.gguf] = compare(args.gguf, compute_logits(vocab_size, gguf_path.parent, **options), merged)
    return differences


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    staging = None
    try:
        (args,) = parser.parse_args_into_dataclasses()
        job = check_arguments(args)
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        folder, gguf_path = job.base, None
        if args.peft_path:
            folder = staging
            merge(job, folder)
            copy_companions(args, job, folder)
        if args.gguf:
            gguf_path = staging / f"model-{args.gguf}.gguf"
            write_gguf(folder, gguf_path, args.gguf, output.name)
        differences = verify(args, job, folder, gguf_path) if args.verify else None
        write_receipt(args, job, staging, differences)
        staging.chmod(0o755)  # mkdtemp's folders are private
        os.replace(staging, output)
    except (ValueError, OSError) as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
    for path in sorted(output.iterdir()):
        print(f"{path.stat().st_size:>15,} bytes  {path}")


def write_receipt(args: Arguments, job: Job, folder: Path, differences: dict | None) -> None:
    """run.json: the receipt of the training, if there is one, and what was done with its result."""
    source = Path(args.peft_path or job.base)
    paths = [source / "run.json"] + [source.absolute().parent / "run.json"] * source.name.startswith("checkpoint-")
    receipt = next((json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()), {})
    trained_in_4bit = bool(args.peft_path and receipt.get("arguments", {}).get("load_in_4bit"))
    if trained_in_4bit:
        print("note: the adapter was trained on the base in 4 bit, and is merged into the unquantised one")
    receipt["merged"] = {"peft_path": args.peft_path, "model_path": args.model_path, "dtype": job.dtype,
                         "gguf": args.gguf, "trained_in_4bit": trained_in_4bit, "num_weights": len(job.deltas),
                         "relative_difference_of_logits": differences}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
