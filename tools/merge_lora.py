"""Merges a LoRA adapter into its base: a plain model folder, and a GGUF file if asked for, that other programs run.

    python tools/merge_lora.py --peft_path outputs/finetune_pp_peft --output outputs/merged
    python tools/merge_lora.py --peft_path outputs/finetune_pp_peft --output outputs/merged --gguf f16
    python tools/merge_lora.py --model_path outputs/finetune_pp --output outputs/gguf --gguf q8_0

The folder has no trace of the adapter: safetensors, tokenizer, chat template and generation config, which transformers,
vLLM and TGI load as any model. Weights go through memory shard by shard. An adapter that was trained on a 4-bit base is
merged into the 16- or 32-bit original that adapter_config.json names. Weights that the adapter brings whole (biases,
modules_to_save, a larger vocabulary) replace the base's. If embedding and head of the base are one weight and the
adapter changes only one of them, the merged model has two. Without --peft_path a model is only written as GGUF, the
file of llama.cpp, Ollama and LM Studio (f32, f16, or q8_0: 8 bits and a scale for each 32 weights).

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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, HfArgumentParser
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import gguf_export, loading
from tools.loading import PEFT_PREFIX, Adapter, ModelSource, collect
from tools.paths import expand_home, let_others_read

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference of the logits, relative to the largest logit, that rounding the weights explains.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2, "f32": 1e-5, "f16": 1e-2, "q8_0": 1e-1}
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
              "LICENSE", "LICENSE.txt")  # fmt: skip
# The settings of a LoRA that are either in its matrices already, or that LoraMerge understands. Whatever else
# adapter_config.json switches on (DoRA, for example) needs another formula.
MERGED_SETTINGS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size",
}  # fmt: skip


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
class LoraDelta:
    """What LoRA adds to a weight: scale * B @ A."""

    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]
    scale: float
    is_transposed: bool  # the weight is [in, out]: of an embedding, and of GPT-2's layers

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight, computed in float32."""
        if self.is_transposed:
            return torch.addmm(weight.float(), self.a.T, self.b.T, alpha=self.scale)
        return torch.addmm(weight.float(), self.b, self.a, alpha=self.scale)


@dataclass
class Job:
    source: ModelSource
    base: Path  # a local folder
    shards: list[Path]
    dtype: str
    deltas: dict[str, LoraDelta] = field(default_factory=dict)  # by the name of the weight in the base's files
    whole: dict[str, str] = field(default_factory=dict)  # a weight that the adapter replaces: its name in its file
    tied: "TiedWeight | None" = None


@dataclass
class TiedWeight:
    """Embedding and head of a base that has one weight for both."""

    name: str  # in the base's files
    other: str | None  # the one of the two that the files do not have, if they do not have both
    copy: str | None  # the base's own weight, perhaps with more rows, in the adapter's file: its name there
    becomes_two: bool  # the adapter changes only one of the two, or each in its way


def check_arguments(args: Arguments) -> Job:
    """Raises ValueError with every mistake."""
    mistakes = find_mistakes(args)
    source = None
    if args.peft_path is not None or args.model_path is not None:
        with collect(mistakes):
            source = loading.open_model(args.model_path, args.peft_path)
    if source is None or mistakes:
        raise ValueError("\n".join(mistakes))
    args.model_path = source.model_path
    args.peft_path = source.peft_path
    job = None
    with collect(mistakes, f"--model_path {args.model_path}"):
        job = find_base(source, args.dtype)
    if job is not None and source.adapter is not None:
        with collect(mistakes, f"--peft_path {args.peft_path}"):
            check_settings(source.adapter)
            read_changes(job)
    if args.gguf and not mistakes:
        with collect(mistakes, f"--gguf {args.gguf}"):
            check_gguf(job)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return job


def find_mistakes(args: Arguments) -> list[str]:
    """What is wrong with the flags taken by themselves."""
    mistakes = []
    if args.dtype != "auto" and args.dtype not in DTYPES:
        mistakes.append(f"--dtype {args.dtype}: choose auto, {', '.join(DTYPES)}")
    if args.gguf is not None and args.gguf not in gguf_export.KINDS:
        mistakes.append(f"--gguf {args.gguf}: choose f32, f16 or q8_0")
    elif args.gguf is not None:
        try:
            import gguf  # noqa: F401
        except ImportError:
            mistakes.append(f"--gguf {args.gguf}: needs the gguf package; pip install gguf==0.19.0")
    if not args.output:
        mistakes.append("--output is missing: name the folder to write, such as outputs/merged")
    elif Path(args.output).exists():
        mistakes.append(f"--output {args.output}: it exists; choose another folder")
    if args.peft_path is None and not (args.model_path and args.gguf):
        mistakes.append("--peft_path is missing: name an adapter; or --model_path and --gguf to convert a whole model")
    return mistakes


def find_base(source: ModelSource, dtype: str) -> Job:
    """The files of the base model; one on the hub is downloaded."""
    base = Path(source.model_path)
    if not base.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        with loading.ask_library("it cannot be downloaded"):
            base = Path(snapshot_download(source.model_path, allow_patterns=patterns))
        loading.check_model(str(base))
    if loading.is_quantised(source.config):
        raise ValueError("its weights are quantised, and what is merged into them would be rounded away; name the 16- "
                         "or 32-bit original")  # fmt: skip
    if dtype == "auto":
        dtype = str(source.config.dtype or torch.float32).removeprefix("torch.")
    return Job(source, base, loading.find_shards(base), dtype)


def check_settings(adapter: Adapter) -> None:
    """Raises ValueError if an adapter is more than two matrices beside a weight."""
    peft_type = adapter.settings["peft_type"]
    if adapter.config.is_prompt_learning:
        raise ValueError(f"a {peft_type} adapter cannot be merged: it puts virtual tokens before every prompt and "
                         "changes no weight of the model; serve base + adapter, as test_sample.py does")  # fmt: skip
    if peft_type != "LORA":
        raise ValueError(f"a {peft_type} adapter is not merged by this tool, only LORA; use PEFT's merge_and_unload")
    others = [name for name, value in adapter.settings.items() if value and name not in MERGED_SETTINGS]
    if others:
        raise ValueError(f"it uses {', '.join(others)}, which this tool does not merge; use PEFT's merge_and_unload")


def read_changes(job: Job) -> None:
    """Finds out what the adapter does to each weight of the base; fills in deltas, whole and tied of the job.

    loading.check_adapter has compared all names and shapes already.

    Raises:
        ValueError: a weight has another name in the base's files than in memory, so it cannot be changed there.
    """
    adapter = job.source.adapter
    skeleton = loading.make_skeleton(job.source.config)
    file_names = read_names(job.shards)
    with safe_open(adapter.folder / "adapter_model.safetensors", "pt") as file:
        for key in adapter.shapes:
            name = key.removeprefix(PEFT_PREFIX)
            if name.endswith((".lora_B.weight", ".lora_embedding_B")):
                continue  # read with its A
            if ".modules_to_save." in name or ".original_module." in name:
                continue  # PEFT's second copy of a trained layer, and what it was before
            if name.endswith((".lora_A.weight", ".lora_embedding_A")):
                module = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", name)
                weight = f"{module}.weight"
                other_key = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
                job.deltas[weight] = make_delta(
                    adapter, module, skeleton, file.get_tensor(key), file.get_tensor(other_key)
                )
            else:
                job.whole[name.replace(".base_layer.", ".")] = key
    job.tied = find_tied_weight(job, skeleton, file_names)
    job.deltas = {name_in_files(name, job, skeleton, file_names): delta for name, delta in job.deltas.items()}
    job.whole = {name_in_files(name, job, skeleton, file_names): key for name, key in job.whole.items()}


def make_delta(adapter: Adapter, module: str, skeleton, a: torch.Tensor, b: torch.Tensor) -> LoraDelta:
    """The change of one module's weight, with PEFT's scale: lora_alpha / rank, or / sqrt(rank) for rsLoRA."""
    alpha = alpha_of(adapter, module)
    rank = len(a)
    if adapter.config.use_rslora:
        scale = alpha / math.sqrt(rank)
    else:
        scale = alpha / rank
    layer = skeleton.get_submodule(module)
    is_transposed = isinstance(layer, (torch.nn.Embedding, Conv1D))
    return LoraDelta(a.float(), b.float(), scale, is_transposed)


def alpha_of(adapter: Adapter, module: str) -> float:
    """PEFT's alpha_pattern: the value of the first key that matches the end of the module's name."""
    for key, value in (adapter.config.alpha_pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return adapter.config.lora_alpha


def read_names(shards: list[Path]) -> set[str]:
    """The names of all tensors in the base's files."""
    names = set()
    for shard in shards:
        names.update(loading.read_header(shard))
    return names


def find_tied_weight(job: Job, skeleton, file_names: set[str]) -> TiedWeight | None:
    """Finds out what the adapter does to a weight that is both embedding and head; None if the base has two.

    An adapter on one of them leaves the other as it was. A copy of the base's weight that PEFT saved along is for both.
    """
    if not job.source.config.tie_word_embeddings:
        return None
    names = {module: f"{name}.weight" for name, module in skeleton.named_modules()}
    embedding = names[skeleton.get_input_embeddings()]
    head = names[skeleton.get_output_embeddings()]
    name = embedding
    other = head
    if find_in_files(embedding, skeleton, file_names) is None:
        name = head
        other = embedding
    has_both = find_in_files(other, skeleton, file_names) is not None
    tied = TiedWeight(find_in_files(name, skeleton, file_names), other, None, False)
    if has_both:
        tied.other = None
    trained = tuple(job.source.adapter.config.modules_to_save or ())
    for weight in (embedding, head):
        is_trained = bool(trained) and weight.removesuffix(".weight").endswith(trained)
        if weight in job.deltas or (weight in job.whole and is_trained):
            tied.becomes_two = True
        if weight in job.whole and not is_trained and not has_both:
            tied.copy = job.whole.pop(weight)
    return tied


def find_in_files(name: str, skeleton, file_names: set[str]) -> str | None:
    """The name that a weight has in the base's files: mostly the same, or without the prefix of the base class."""
    short_name = name.removeprefix(f"{skeleton.base_model_prefix}.")
    for candidate in (name, short_name):
        if candidate in file_names:
            return candidate
    return None


def name_in_files(name: str, job: Job, skeleton, file_names: set[str]) -> str:
    """As find_in_files; the weight that untying adds keeps its own name. Raises ValueError if there is none."""
    if job.tied is not None and name == job.tied.other:
        return name
    found = find_in_files(name, skeleton, file_names)
    if found is None:
        raise ValueError(f"transformers keeps {name} under another name in the files of {job.source.config.model_type} "
                         "models, or joined with others; use PEFT's merge_and_unload")  # fmt: skip
    return found


def check_gguf(job: Job) -> None:
    """Raises ValueError if llama.cpp would run something else than the merged model."""
    config = job.source.config
    names = read_names(job.shards)
    if job.tied is not None and job.tied.becomes_two and job.tied.other is not None:
        names.add(job.tied.other)
    gguf_export.check_model(config, names)
    gguf_export.describe_tokenizer(job.source.tokenizer, config.vocab_size)


# -------------------------------------------------------------------------------------------------------------------
# Merging
# -------------------------------------------------------------------------------------------------------------------


def merge(job: Job, folder: Path) -> None:
    """Writes the merged weights, computed in float32, one shard at a time."""
    dtype = DTYPES[job.dtype]
    weight_map = {}
    total_size = 0
    with safe_open(job.source.adapter.folder / "adapter_model.safetensors", "pt") as adapter_file:
        for shard in job.shards:
            tensors = {}
            with safe_open(shard, "pt") as file:
                for name in file.keys():
                    tensors.update(merge_tensor(job, name, file.get_tensor(name), adapter_file))
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    tensors[name] = tensor.to(dtype).contiguous()
                weight_map[name] = shard.name
                total_size += tensors[name].nbytes
            save_file(tensors, folder / shard.name, metadata={"format": "pt"})
            let_others_read(folder / shard.name)
    if len(job.shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def merge_tensor(job: Job, name: str, tensor: torch.Tensor, adapter_file) -> dict[str, torch.Tensor]:
    """What becomes of one tensor of the base: the same or another one under its name, or two of a tied weight."""
    names = [name]
    if job.tied is not None and name == job.tied.name:
        if job.tied.copy is not None:
            tensor = adapter_file.get_tensor(job.tied.copy)
        if job.tied.becomes_two and job.tied.other is not None:
            names.append(job.tied.other)
    merged = {}
    for merged_name in names:
        merged[merged_name] = tensor
        if merged_name in job.whole:
            merged[merged_name] = adapter_file.get_tensor(job.whole[merged_name])
        if merged_name in job.deltas:
            merged[merged_name] = job.deltas[merged_name].add_to(merged[merged_name])
    return merged


def copy_companions(job: Job, folder: Path) -> None:
    """All beside the weights; the adapter's own tokenizer and chat template come last, for training used them."""
    for source in (job.base, job.source.adapter.folder):
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / "additional_chat_templates").is_dir():
            shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates",
                            dirs_exist_ok=True)  # fmt: skip
    config = json.loads((job.base / "config.json").read_text(encoding="utf-8"))
    # transformers 5 reads dtype, what was built for older ones torch_dtype.
    config["dtype"] = job.dtype
    config["torch_dtype"] = job.dtype
    config["vocab_size"] = job.source.num_embeddings
    if job.tied is not None and job.tied.becomes_two:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------------
# Verification
# -------------------------------------------------------------------------------------------------------------------


def load_float32(folder: Path, **options):
    with loading.quiet_transformers():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    loading.check_report(report)
    return model.eval()


@torch.no_grad()
def compute_logits(model, vocab_size: int) -> torch.Tensor:
    """Logits [2, 48, vocabulary] of fixed random ids, in float32 on the CPU."""
    ids = torch.randint(vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits relative to the largest one."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits. Raises OSError if rounding to `name` does not explain it."""
    difference = largest_difference(found, expected)
    if not difference <= TOLERANCES[name]:
        raise OSError(f"the logits of what was written ({name}) are off by {difference:.1e}; nothing was kept")
    print(f"{name}: logits differ by {difference:.1e} of the largest, allowed are {TOLERANCES[name]:.0e}")
    return difference


def verify(args: Arguments, job: Job, folder: Path, gguf_path: Path | None) -> dict[str, float]:
    """Compares merged with base + adapter, and GGUF with what it was made from. Returns the differences.

    One model is in memory at a time.
    """
    differences = {}
    vocab_size = job.source.num_embeddings
    merged = compute_logits(load_float32(folder), vocab_size)
    if job.source.adapter is not None:
        model = load_float32(job.base)
        loading.fit_vocabulary(job.source.adapter, args.model_path, model)
        model = PeftModel.from_pretrained(model, args.peft_path).eval()
        expected = compute_logits(model, vocab_size)
        with model.disable_adapter():
            change = largest_difference(compute_logits(model, vocab_size), expected)
        del model
        differences[job.dtype] = compare(job.dtype, merged, expected)
        if change < 2 * differences[job.dtype]:
            print(f"note: rounding to {job.dtype} moves the logits by {differences[job.dtype]:.1e}, and the adapter by "
                  f"{change:.1e} only; --dtype float32 keeps what it learned")  # fmt: skip
    if gguf_path is not None:
        # transformers does not read the scaling of rotary embeddings from GGUF, so it gets the configuration as well.
        config = loading.load_config(str(folder))
        written = load_float32(gguf_path.parent, gguf_file=gguf_path.name, config=config)
        differences[args.gguf] = compare(args.gguf, compute_logits(written, vocab_size), merged)
    return differences


# -------------------------------------------------------------------------------------------------------------------
# The main line of work
# -------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        job = check_arguments(args)
        output = Path(args.output)
        write_output(args, job, output)
    except (ValueError, OSError, SafetensorError) as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    for path in sorted(output.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>15,} bytes  {path}")


def write_output(args: Arguments, job: Job, output: Path) -> None:
    """Writes everything into a hidden folder beside --output, which gets its name when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = job.base
        if job.source.adapter is not None:
            folder = staging
            merge(job, folder)
            copy_companions(job, folder)
        gguf_path = None
        if args.gguf:
            gguf_path = staging / f"model-{args.gguf}.gguf"
            gguf_export.write(folder, gguf_path, args.gguf, output.name)
        differences = None
        if args.verify:
            differences = verify(args, job, folder, gguf_path)
        write_receipt(args, job, staging, differences)
        set_modes(staging)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_receipt(args: Arguments, job: Job, folder: Path, differences: dict[str, float] | None) -> None:
    """run.json: the receipt of the training, if there is one, and what was done with its result."""
    receipt = dict(job.source.receipt)
    trained_in_4bit = False
    if args.peft_path is not None:
        trained_in_4bit = bool(receipt.get("arguments", {}).get("load_in_4bit"))
    if trained_in_4bit:
        print("note: the adapter was trained on the base in 4 bit, and is merged into the unquantised one")
    receipt["merged"] = {
        "peft_path": args.peft_path,
        "model_path": args.model_path,
        "dtype": job.dtype,
        "gguf": args.gguf,
        "trained_in_4bit": trained_in_4bit,
        "num_weights": len(job.deltas),
        "relative_difference_of_logits": differences,
    }
    (folder / "run.json").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), encoding="utf-8")


def set_modes(folder: Path) -> None:
    """Lets others read what they may read of other files: safetensors and mkdtemp write for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


if __name__ == "__main__":
    main()
