"""Converts a LLaMA from the Hugging Face format back to Meta's (params.json, consolidated.*.pth, tokenizer.model), and
proves what it wrote.

Choose it when a fine-tuned model must run in Meta's own code. A model that came from Meta through
convert_llama_weights_to_hf.py and was not trained comes back bit for bit. An adapter must be merged into its model
first (tools/merge_lora.py).

    python tools/convert_hf_to_meta.py --num_shards 2 --input_dir models/Llama-3.1-8B-Instruct --output_dir meta
    python tools/convert_hf_to_meta.py --dtype bfloat16 --input_dir outputs/finetune_pp --output_dir meta

Writes into --output_dir the shards, params.json, tokenizer.model if the model's folder has it, and
conversion_report.json: the comparison of all values, of transformers' layers with an independent computation on the new
shards, and the SHA-256 of every file. All of it appears at once when it is complete.

It needs little memory, however large the model is. The number of shards is that of Meta's download where the folder
still holds the report of the conversion, else 1; Meta's code starts one process for each shard.
"""

import contextlib
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from convert_llama_weights_to_hf import (
    DTYPES,
    REPORT,
    SAFETENSORS_DTYPES,
    MetaLayout,
    Plan,
    Stopwatch,
    TokenizerFile,
    Weight,
    as_bytes,
    check_division,
    check_ids,
    check_params,
    complete_folder,
    config_of_params,
    divided_rows,
    find_folder_mistakes,
    find_hf_tensors,
    hash_both_folders,
    list_weights,
    make_plan,
    model_params,
    one_thread,
    open_shards,
    read_tokenizer,
    stop_at_signals,
    verify,
    write_report,
)


@dataclass
class Arguments:
    input_dir: str = field(metadata={"help": "folder of a whole LLaMA in the Hugging Face format"})
    output_dir: str = field(metadata={"help": "folder for the result; it must not exist, or be empty"})
    dtype: str = field(
        default="auto",
        metadata={"help": "of the written weights; auto: as they are", "metavar": "bfloat16|float16|float32|auto"},
    )
    num_shards: int | None = field(
        default=None, metadata={"help": "files to divide the weights into; default: as Meta's download had, else 1"}
    )
    verify: bool = field(
        default=True, metadata={"help": "compare all values and an independent computation, and hash all files"}
    )


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found before anything is written
# -------------------------------------------------------------------------------------------------------------------

# What params.json determines of a configuration.
CONFIG_FIELDS = [
    "model_type",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "head_dim",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
]


def check_arguments(args: Arguments) -> Plan:
    """Checks all flags and reads the headers of all files.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = find_folder_mistakes(args.input_dir, args.output_dir)
    if args.dtype not in (*DTYPES, "auto"):
        mistakes.append(f"--dtype {args.dtype}: must be one of {', '.join(DTYPES)}, auto")
    if args.num_shards is not None and args.num_shards < 1:
        mistakes.append(f"--num_shards {args.num_shards}: must be at least 1")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return make_plan(read_hf_folder, args)


def read_hf_folder(args: Arguments) -> Plan:
    """The plan for a folder in Hugging Face's format.

    Raises:
        ValueError, FileNotFoundError: it is not a LLaMA, is damaged, or has what Meta's code cannot express.
    """
    folder = Path(args.input_dir)
    config = read_config(folder)
    former = read_former_layout(folder)
    former_params = None
    if former is not None:
        former_params = former.params
    params, stated = find_params(config, former_params)
    layout = former
    if layout is None:
        is_llama3 = config.tie_word_embeddings or stated.rope_parameters["rope_theta"] == 500000
        layout = MetaLayout(params, vocabulary_parallel=is_llama3)
    layout.params = params
    if args.num_shards is not None:
        layout.num_shards = args.num_shards

    weights = list_weights(stated, layout.vocabulary_parallel, layout.output_stored)
    check_division(stated, weights, layout.num_shards, "choose another --num_shards")
    dtypes = check_hf_tensors(folder, weights)
    if args.dtype != "auto":
        dtypes = dict.fromkeys(dtypes, DTYPES[args.dtype])
    tokenizer = find_former_tokenizer(folder, config, stated)
    return Plan(tokenizer, stated, weights, dtypes, layout)


def read_config(folder: Path) -> LlamaConfig:
    if (folder / "adapter_config.json").is_file():
        raise ValueError("it holds an adapter; merge the adapter into its model first")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError("no config.json in it; name the folder of a whole model")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it would ask
    if config.model_type != "llama":
        raise ValueError(f"config.json is that of a {config.model_type}; Meta's format is for a llama")
    return config


def read_former_layout(folder: Path) -> MetaLayout | None:
    """What Meta's folder had, if this one was made from it.

    Raises:
        ValueError: the report of that conversion is damaged.
    """
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["meta"]
        if not entries:  # only the tokenizer was converted
            return None
        freqs = entries.pop("rope_freqs", None)  # so it was called when there could be one table only
        if freqs is not None:
            entries["rope_tables"] = [{"names": ["rope.freqs"], **freqs}]
        layout = MetaLayout(**entries)
        check_params(model_params(layout.params))
        rope_tables(layout)
        if type(layout.num_shards) is not int:
            raise TypeError("the number of shards is not a number")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{REPORT} is damaged; delete it, and state --num_shards") from None
    return layout


def find_params(config: LlamaConfig, former: dict | None) -> tuple[dict, LlamaConfig]:
    """The content for params.json, and the configuration that it states.

    Meta's own entries are taken where they still describe the model, else entries that are computed from config.json.

    Raises:
        ValueError: no params.json can state this configuration.
    """
    candidates = [params_of_config(config)]
    if former is not None:
        candidates.insert(0, former)
    for params in candidates:
        entries = model_params(params)
        stated = config_of_params(entries, config.vocab_size, config.tie_word_embeddings, None)
        different = [name for name in CONFIG_FIELDS if getattr(stated, name, None) != getattr(config, name)]
        if not different:
            return params, stated
    name = different[0]
    raise ValueError(f"Meta's code cannot compute {name} = {getattr(config, name)} of config.json")


def params_of_config(config: LlamaConfig) -> dict:
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        # Meta's formula for the feed-forward size has no inverse in round numbers; these two give exactly that size.
        "multiple_of": 1,
        "ffn_dim_multiplier": (config.intermediate_size + 0.5) / int(8 * config.hidden_size / 3),
    }
    if "factor" in config.rope_parameters:
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = config.rope_parameters["factor"]
    return params


def check_hf_tensors(folder: Path, weights: list[Weight]) -> dict[str, torch.dtype]:
    """The dtype of each weight as it is stored, by Meta's names.

    Raises:
        ValueError: a weight is missing, unknown, quantized or of another shape.
    """
    files = find_hf_tensors(folder)
    expected = {weight.hf_name for weight in weights}
    # A tied output may be stored, and old versions of transformers stored frequencies.
    found = {name for name in files if name != "lm_head.weight" and "rotary_emb" not in name}
    wrong = sorted((found - expected) | (expected - files.keys()))
    if wrong:
        raise ValueError(f"{wrong[0]} is missing or unknown ({len(wrong)} such weights); convert a whole LLaMA")
    dtypes = {}
    for weight in weights:
        name = weight.hf_name
        with safe_open(files[name], framework="pt") as file:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            dtype = tensor[:1].dtype
        if tuple(shape) != weight.shape:
            raise ValueError(f"{name} is {shape}, not {list(weight.shape)} as config.json makes it")
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is {dtype}; quantized weights are not converted")
        dtypes[weight.meta_name] = dtype
    return dtypes


def find_former_tokenizer(folder: Path, config: LlamaConfig, stated: LlamaConfig) -> TokenizerFile | None:
    """Meta's tokenizer.model, if the folder still has it."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    is_llama31 = stated.rope_parameters["rope_type"] == "llama3"
    tokenizer = read_tokenizer(path, is_llama31, is_instruct=False, vocab_size=config.vocab_size)
    check_ids(config, tokenizer)
    if tokenizer.size != config.vocab_size:
        sizes = f"{tokenizer.size} tokens, the embedding {config.vocab_size}"
        raise ValueError(f"{path} has {sizes}: tokens that were added have no place in Meta's format")
    return tokenizer


# -------------------------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------------------------


def write_meta(plan: Plan, source: Path, folder: Path) -> None:
    """Writes params.json, the shards and tokenizer.model."""
    layout = plan.layout
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(layout.num_shards)]
    offsets = write_empty_shards(plan, paths)
    files = find_hf_tensors(source)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(open(path, "r+b")) for path in paths]
        stack.enter_context(one_thread())
        progress = stack.enter_context(tqdm(total=plan.total_bytes(), desc="writing", unit="B", unit_scale=True))
        for weight in plan.weights:
            dtype = plan.dtypes[weight.meta_name]
            row_bytes = math.prod(weight.piece_shape(layout.num_shards)[1:]) * dtype.itemsize
            for i, start, rows in divided_rows(weight, files, plan.config.head_dim, layout.num_shards):
                shards[i].seek(offsets[weight.meta_name] + start * row_bytes)
                progress.update(shards[i].write(as_bytes(rows, dtype, weight.hf_name)))
        for name, table in rope_tables(layout).items():
            for shard in shards:
                shard.seek(offsets[name])
                shard.write(as_bytes(table, table.dtype, name))
    (folder / "params.json").write_text(json.dumps(layout.params))
    if plan.tokenizer is not None:
        shutil.copyfile(plan.tokenizer.path, folder / "tokenizer.model")


def rope_tables(layout: MetaLayout) -> dict[str, torch.Tensor]:
    """The tables of frequencies that Meta's files had, by their names."""
    tables = {}
    for entry in layout.rope_tables:
        for name in entry["names"]:
            tables[name] = torch.tensor(entry["values"], dtype=DTYPES[entry["dtype"]])
    return tables


def write_empty_shards(plan: Plan, paths: list[Path]) -> dict[str, int]:
    """Writes the files with all that belongs to them but the weights' values.

    torch.save lays each file out with tensors that have no memory, so that memory does not grow with the model.

    Returns:
        The byte of a file where each tensor begins; it is the same in all shards.
    """
    layout = plan.layout
    tables = rope_tables(layout)
    with FakeTensorMode():
        shard = {}
        for weight in plan.weights:
            shape = weight.piece_shape(layout.num_shards)
            shard[weight.meta_name] = torch.empty(shape, dtype=plan.dtypes[weight.meta_name])
        for name, table in tables.items():
            shard[name] = torch.empty(len(table), dtype=table.dtype)
        for path in paths:
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save(shard, path)
            except RuntimeError as problem:
                raise OSError(f"{path.name} cannot be written: {str(problem).splitlines()[0]}") from None
    first_shard = open_shards(paths[0].parent)[0]
    return {name: tensor.storage_start for name, tensor in first_shard.items()}


def convert(args: Arguments, plan: Plan, folder: Path) -> None:
    """Writes all files into `folder`, the report last."""
    source = Path(args.input_dir)
    stopwatch = Stopwatch()
    report = {"arguments": asdict(args), "verified": False, "meta": asdict(plan.layout)}
    write_meta(plan, source, folder)
    stopwatch.note("writing")
    if args.verify:
        report["verification"] = verify(plan, open_shards(folder), source)
        report["verified"] = True
        stopwatch.note("verifying")
        report["sha256"] = hash_both_folders(source, folder, plan.tokenizer)
        stopwatch.note("hashing")
    write_report(report, stopwatch, folder)


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    stop_at_signals()
    try:
        (args,) = parser.parse_args_into_dataclasses()
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
    if plan.tokenizer is None:
        print("--input_dir has no tokenizer.model, so the result has none; Meta's code needs it, copy it there")


if __name__ == "__main__":
    main()
