"""Full fine-tuning or an adapter with transformers' Trainer and DeepSpeed ZeRO, stage 2 or 3, with or without offload.

Choose it where DeepSpeed is the house standard, or to offload to host memory what the GPUs cannot hold. Bytes on each
of N GPUs for P parameters of which T are trained, in bf16: ZeRO-2 2 P + 16 T / N, and a step sends the gradients once
to the shards and the weights once back; ZeRO-3 (2 P + 16 T) / N, and it gathers every layer twice a forward and
backward, as FSDP does. zero2_offload keeps the optimizer in host memory and zero3_offload the weights, too: every step
then waits for the PCIe bus.

    python finetune_pp_peft_trainer_deepspeed.py --deepspeed ds_configs/zero2.json
    sh scripts/finetune_pp_peft_trainer_deepspeed.sh --lora_used True
    USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_peft_trainer_deepspeed.sh --lora_used False

Writes into --output_dir: the whole model, or the adapter in PEFT's format, and the tokenizer, checkpoint-<step>/,
trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt). SIGTERM saves a checkpoint
and ends.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import peft
import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.cpp_extension import get_default_build_root
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    SchedulerType,
    get_scheduler,
    set_seed,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers import AutoHfQuantizer

import data_collator
from data_collator import DataCollator, LossHead, TokenizedDataset, TrainingRows

PEFT_TYPES = {"lora": "LORA", "prefix": "PREFIX_TUNING", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING"}
ATTENTION_KERNELS = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
PATHS = (
    "model_path", "peft_path", "dataset_path", "eval_dataset_path", "output_dir", "resume_from_checkpoint", "deepspeed",
)  # fmt: skip
# What a run writes into --output_dir and others may have there, too.
OVERWRITTEN = ("README.md", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
# Flags that a resumed run must share with the interrupted one, besides the rows and their order.
SHARED_BY_RESUMED = (
    "model_path", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "peft_mode", "peft_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "num_virtual_tokens",
    "mapping_hidden_dim", "lora_used", "deepspeed",
)  # fmt: skip


# The headings of --help, each over the flag that it is named for here.
HELP_GROUPS = {
    "model_path": "Model, data and output",
    "deepspeed": "Strategy",
    "pipeline_schedule": "Strategy",
    "loss_type": "Preferences",
    "lora_used": "Adapter",
    "peft_mode": "Adapter",
    "num_train_epochs": "Steps",
    "learning_rate": "Optimizer",
    "logging_steps": "Logs, evaluation and checkpoints",
    "seed": "Computation",
    "resume_from_checkpoint": "The run",
}


def flag(default, help: str, limit: str | None = None):
    """A flag with its help; `limit` is what a number must be: "> 0" or ">= 0"."""
    metadata = {"help": help}
    if limit is not None:
        metadata["metavar"] = limit
    return field(default=default, metadata=metadata)


@dataclass
class Arguments:
    model_path: str = flag("models/SmolLM2-135M-Instruct", "folder or hub id of a decoder-only model")
    dataset_path: str = flag("data_sample/tokenized/triage_train", "tokenized folder, or name:weight,name:weight")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    random_passage: bool = flag(False, "draw a random passage of each whole document (--format text) at every epoch")
    passage_length: int = flag(512, "tokens of a passage", "> 0")
    output_dir: str = flag("outputs/finetune_pp_peft_trainer_deepspeed", "folder for all that the run leaves")
    deepspeed: str = flag("ds_configs/zero3.json", "what is sharded and offloaded: a file of ds_configs/, or your own")
    lora_used: bool = flag(False, "train an adapter; False: all weights")
    peft_mode: Literal["lora", "prefix", "ptuning", "prompt"] = flag("lora", "what is trained beside the frozen model")
    peft_path: str | None = flag(None, "go on from this adapter with new data")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices", "> 0")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank", "> 0")
    lora_dropout: float = flag(0.05, "dropout on an adapter's input", ">= 0")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    num_virtual_tokens: int = flag(32, "length of the learned prompt or prefix", "> 0")
    mapping_hidden_dim: int = flag(1024, "ptuning's MLP; prefix projection, 0 for none; not for prompt", ">= 0")
    num_train_epochs: float = flag(1, "passes over the data", "> 0")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one forward", "> 0")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation", "> 0")
    gradient_accumulation_steps: int = flag(1, "forwards of one optimizer step", "> 0")
    learning_rate: float | None = flag(None, "peak rate of AdamW; none: 1e-3 with an adapter, 2e-5 without", "> 0")
    lr_scheduler_type: SchedulerType = flag("cosine", "how the rate falls")
    lr_scheduler_kwargs: str = flag("{}", 'more of the schedule, as JSON: {"min_lr": 1e-6}')
    warmup_steps: float = flag(0.03, "steps of warm-up; below 1: a share of all steps", ">= 0")
    weight_decay: float = flag(0.0, "AdamW's, never on norms and biases", ">= 0")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "> 0")
    logging_steps: int = flag(1, "log every so many optimizer steps", "> 0")
    eval_steps: int = flag(100, "evaluate every so many steps, and at the end", "> 0")
    save_steps: int = flag(100, "checkpoint every so many steps, and at the end", "> 0")
    save_total_limit: int = flag(2, "checkpoints that are kept", "> 0")
    seed: int = flag(42, "of the adapter's start, the row order and dropout", ">= 0")
    bf16: Literal["auto", "True", "False"] = flag("auto", "compute in bf16; auto: where the hardware is fast at it")
    padding_free: bool = flag(True, "join the rows of a batch instead of padding them")
    gradient_checkpointing: bool = flag(False, "recompute activations: a third more work, much less memory")
    attn_implementation: ATTENTION_KERNELS = flag("auto", "kernel of attention; auto: inside each document")
    torch_compile: bool = flag(False, "compile the decoder layers: minutes at first, then faster steps")
    resume_from_checkpoint: str = flag("False", "True: the newest complete one in output_dir; or a checkpoint folder")
    use_cpu: bool = flag(False, "leave the GPUs alone")
    report_to: Literal["tensorboard", "none"] = flag("tensorboard", "where the loss curve is shown")


class Parser(HfArgumentParser):
    """Its --help has a line for each flag, with the default, in groups."""

    def format_help(self) -> str:
        lines = [f"usage: python {self.prog} [--flag value ...]"]
        group = None
        for flag in fields(Arguments):
            if HELP_GROUPS.get(flag.name, group) != group:
                group = HELP_GROUPS[flag.name]
                lines += ["", group]
            lines.append(describe_flag(flag))
        return "\n".join(lines) + "\n"


def describe_flag(flag) -> str:
    """Its name and default, then what it does, its choices and the limit of a number."""
    default = getattr(flag.default, "value", flag.default)
    if default is None:
        default = "none"
    text = flag.metadata["help"]
    if get_origin(flag.type) is Literal:
        text += f" ({', '.join(get_args(flag.type))})"
    if "metavar" in flag.metadata:
        text += f" ({flag.metadata['metavar']})"
    return textwrap.fill(f"  {f'--{flag.name} {default}':40}  {text}", width=120, subsequent_indent=" " * 44)


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before weights are loaded or anything is written
# -------------------------------------------------------------------------------------------------------------------


def check_arguments(args: Arguments):
    """Returns (config, tokenizer, rows in the order of training, evaluation set or None, checkpoint or None, skeleton).

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    args.use_cpu = args.use_cpu or torch.cuda.device_count() == 0
    mistakes = check_numbers(args) + check_folders(args) + check_machine(args) + check_locks() + check_launcher()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        mistakes.append("ACCELERATE_USE_FSDP is true, and this script uses DeepSpeed: unset it")
    if args.learning_rate is None:
        args.learning_rate = 2e-5
        if args.lora_used:
            args.learning_rate = 1e-3
    if not args.lora_used and (args.peft_path or args.peft_mode != "lora"):
        mistakes.append("--lora_used False: trains all weights, without --peft_path and --peft_mode")

    def attempt(name: str, action, *context):
        """What `action` makes of a flag's value; its error becomes a mistake of that flag."""
        value = getattr(args, name)
        if value is None:
            return None
        try:
            return action(value, *context)
        except (ValueError, OSError, ImportError) as problem:
            mistakes.append(f"--{name} {value}: {problem}")

    attempt("deepspeed", check_deepspeed)
    config = attempt("model_path", load_config)
    tokenizer = None
    if config is not None:
        tokenizer = attempt("model_path", load_tokenizer)
        attempt("model_path", check_quantization, config, args)
        attempt("attn_implementation", check_attention, config, args)
    passage_length = 0
    if args.random_passage:
        passage_length = args.passage_length
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage_length, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage_length)
    attempt("peft_path", check_adapter, args.peft_mode)
    mistakes += check_virtual_tokens(args, config, dataset, eval_dataset)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    # A rehearsal without weights; save_model will put what was trained on it.
    skeleton = None
    if args.lora_used:
        skeleton = attempt("peft_mode", lambda mode: add_adapter(args, make_skeleton(config)))
        if skeleton is not None:
            attempt("peft_path", compare_adapter, skeleton)
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    rows_per_step = num_processes * args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = TrainingRows(dataset, rows_per_step, args.num_train_epochs, args.max_steps, args.seed)
    attempt("lr_scheduler_kwargs", json.loads)
    attempt("lr_scheduler_type", check_schedule, args, rows.num_steps)
    if not mistakes:
        attempt("warmup_steps", check_rates, args, rows)
    checkpoint = attempt("resume_from_checkpoint", find_checkpoint, args.output_dir, resume_settings(args, rows))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.peft_mode != "lora" and args.padding_free:
        print(f"--padding_free False: --peft_mode {args.peft_mode} puts its virtual tokens before each row of a batch")
        args.padding_free = False
    return config, tokenizer, rows, eval_dataset, checkpoint, skeleton


def expand_home(args: Arguments) -> Arguments:
    """A shell expands `~` at the beginning of a word only, and not in --output_dir=~/run."""
    paths = {}
    for name in PATHS:
        value = getattr(args, name)
        if value is not None:
            paths[name] = re.sub(r"(^|,)~(?=/)", rf"\1{Path.home()}", value)
    return replace(args, **paths)


def check_numbers(args: Arguments) -> list[str]:
    """The numbers that are not what their flag's limit says."""
    mistakes = []
    for argument in fields(args):
        value = getattr(args, argument.name)
        limit = argument.metadata.get("metavar")
        if limit is None or value is None:
            continue
        is_allowed = value > 0 or (limit == ">= 0" and value == 0)
        if not is_allowed or math.isinf(value):
            mistakes.append(f"--{argument.name} {value}: must be {limit}")
    return mistakes


def check_folders(args: Arguments) -> list[str]:
    """What the run reads does not lie in its own folder: a new run moves a former one's contents away."""
    output_dir = Path(args.output_dir).resolve()
    moves_contents = args.resume_from_checkpoint == "False" and holds_a_run(output_dir)
    mistakes = []
    for name in PATHS:
        value = getattr(args, name)
        if value is None or name in ("output_dir", "resume_from_checkpoint"):
            continue
        for part in value.split(","):  # a mix of sets
            path = Path(part.partition(":")[0]).resolve()
            if path == output_dir or (moves_contents and output_dir in path.parents):
                mistakes.append(f"--output_dir {args.output_dir}: --{name} {value} lies in it, and would be moved "
                                "away; name another folder")  # fmt: skip
    return mistakes


def check_machine(args: Arguments) -> list[str]:
    """The output folder can be written, and each process has a GPU or was told to use the CPU."""
    mistakes = []
    output_dir = Path(args.output_dir).absolute()
    folder = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        mistakes.append(f"--output_dir {args.output_dir}: {folder} is not a writable folder; choose another")
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_gpus = torch.cuda.device_count()
    if num_processes > max(1, num_gpus) and not args.use_cpu:
        mistakes.append(f"--use_cpu False: {num_processes} processes need as many GPUs, and there are {num_gpus}")
    if num_gpus > 0 and not args.use_cpu and not torch.cuda.is_available():
        mistakes.append("--use_cpu False: PyTorch cannot use the GPUs that are there; python tools/doctor.py says why")
    return mistakes


def check_locks() -> list[str]:
    """DeepSpeed compiles at its start; a run that was killed then leaves a lock, and all later ones wait for ever."""
    mistakes = []
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            mistakes.append(f"{lock} was left by a compilation that was killed: delete it, if nothing compiles now")
    return mistakes


def check_launcher() -> list[str]:
    """torchrun sets all of these; with a part of them, some rows would go to processes that do not exist."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    for name in ("RANK", "WORLD_SIZE"):
        if name in os.environ and missing:
            return [f"{name} is set and {', '.join(missing)} not: start the script by torchrun, or unset {name}"]
    return []


def check_deepspeed(path: str) -> None:
    """DeepSpeed is there, and its configuration file asks for ZeRO stage 2 or 3."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is missing; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    config = json.loads(Path(path).read_text())
    stage = None
    if isinstance(config, dict):
        stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (2, 3):
        raise ValueError(f"its zero_optimization.stage is {stage}; this script knows 2 and 3: ds_configs/")


def load_config(path: str):
    """The configuration of the model in folder `path` or on the hub; the files of a folder are whole."""
    folder = Path(path)
    if not folder.is_dir() and path.startswith((".", "/", "~", "models/", "outputs/")):
        raise FileNotFoundError("no such folder; bash scripts/quickstart.sh fetches the sample model")
    if folder.is_dir():
        check_files(folder)
    settings, _ = PreTrainedConfig.get_config_dict(path)
    if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        raise ValueError("its model is code of its own, which is never run here; choose one that transformers has")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    fills_gaps = any(name.endswith("ForMaskedLM") for name in config.architectures or [])
    if config.is_encoder_decoder or fills_gaps or not hasattr(config, "vocab_size"):
        raise ValueError(f"{config.model_type} is no decoder of text alone; name a model that is")
    return config


def check_adapter(folder: str, peft_mode: str) -> None:
    """An adapter to go on from is of the mode that was asked for."""
    try:
        peft_type = peft.PeftConfig.from_pretrained(folder).peft_type
    except KeyError as unknown:
        raise ValueError(f"its adapter is of type {unknown}, which this version of PEFT does not know") from None
    if peft_type != PEFT_TYPES[peft_mode]:
        raise ValueError(f"its adapter is of type {peft_type.value}; choose the --peft_mode that made it")
    if peft_mode in ("prefix", "ptuning") and not (Path(folder) / "trainable.safetensors").is_file():
        raise ValueError("it has no trainable.safetensors, and PEFT's own file lacks the MLP; name a run's folder")


def compare_adapter(folder: str, skeleton: peft.PeftModel) -> None:
    """An adapter to go on from has all weights that will be trained: PEFT leaves others as they are."""
    file = Path(folder) / "trainable.safetensors"
    if file.is_file():
        expected = {name: parameter for name, parameter in skeleton.named_parameters() if parameter.requires_grad}
    else:
        file = Path(folder) / "adapter_model.safetensors"
        expected = peft.get_peft_model_state_dict(skeleton, save_embedding_layers=False)
    found = read_header(file)
    for name, parameter in expected.items():
        if name not in found:
            raise ValueError(f"{file.name} lacks {name}, which its adapter_config.json asks for on this model")
        shape = found[name][1]
        if shape != list(parameter.shape):
            raise ValueError(f"its adapter does not fit the model of --model_path: {name} has shape {shape}, and "
                             f"{list(parameter.shape)} on this model")  # fmt: skip


def check_virtual_tokens(args: Arguments, config, *datasets: TokenizedDataset | None) -> list[str]:
    """What the modes that put virtual tokens before each row cannot do."""
    mistakes = []
    if args.peft_mode == "prompt" and args.mapping_hidden_dim != Arguments.mapping_hidden_dim:
        mistakes.append(f"--mapping_hidden_dim {args.mapping_hidden_dim}: --peft_mode prompt has no MLP; leave it out")
    if args.peft_mode != "lora" and any(dataset and dataset.packed for dataset in datasets):
        mistakes.append(f"--peft_mode {args.peft_mode}: needs one document a row; tokenize with --packing False")
    context = data_collator.find_context(config)
    longest = max((dataset.longest for dataset in datasets if dataset), default=0)
    if args.peft_mode != "lora" and args.num_virtual_tokens + longest > context:
        mistakes.append(f"--num_virtual_tokens {args.num_virtual_tokens}: with a row of {longest} tokens they are "
                        f"more than the {context} that the model can attend to")  # fmt: skip
    return mistakes


def check_files(folder: Path) -> None:
    """The files that transformers will read the weights from are there and whole.

    Raises:
        ValueError, OSError: the first that is not.
    """
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if names == ["model.safetensors"] and not (folder / "model.safetensors").is_file():
        others = [file.name for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
        raise FileNotFoundError(f"no model.safetensors in it but {', '.join(sorted(others)) or 'no weights'}; name the "
                                f"folder of a whole model; for more: python tools/doctor.py -- {Path(__file__).name} "
                                f"--model_path {folder}")  # fmt: skip
    for name in names:
        for tensor, (dtype, _) in read_header(folder / name).items():
            if dtype.startswith("F8") and "quantization_config" not in (folder / "config.json").read_text():
                raise ValueError(f"{tensor} has 8 bits, and config.json has no quantization_config that says how to "
                                 "read it; name the 16- or 32-bit original")  # fmt: skip


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """The precision and shape of each tensor in a safetensors file, whose length is compared with its header."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.name} is missing; download it again")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                tensor = opened.get_slice(name)
                tensors[name] = (tensor.get_dtype(), tensor.get_shape())
    except SafetensorError as problem:
        raise ValueError(f"{file.name} is cut off, or a Git LFS pointer instead of the file ({problem}); download it "
                         "again: hf download MODEL, or git lfs pull") from None  # fmt: skip
    return tensors


def load_tokenizer(path: str):
    """Code that lies beside a tokenizer is not run, and nobody is asked whether it may."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def check_quantization(path: str, config, args: Arguments) -> None:
    """Quantised weights are read as they are on disk, if the package that reads them is here."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    if not args.lora_used:
        raise ValueError("its weights are quantised, and full fine-tuning needs the 16- or 32-bit original; "
                         "--lora_used True trains an adapter on them as they are")  # fmt: skip
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except Exception as problem:  # each method has its own
        raise ValueError(f"its weights are quantised and cannot be read here ({problem}); "
                         "name the 16- or 32-bit original") from None  # fmt: skip
    if not quantizer.is_trainable:
        raise ValueError("its weights are quantised in a way that no adapter can be trained on; "
                         "name the 16- or 32-bit original")  # fmt: skip


def check_attention(kernel: str, config, args: Arguments) -> None:
    """The machine has the kernel: transformers is asked, by a model without weights."""
    num_gpus = torch.cuda.device_count()
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = num_gpus > 0 and not args.use_cpu
    if kernel == "flex_attention" and not (on_gpu and num_gpus <= num_processes):
        raise ValueError("it needs a GPU, and of several a process for each: its mask cannot follow layers to another")
    if kernel.startswith("flash"):
        if not on_gpu or not computes_in_bf16(args) or not args.padding_free:
            raise ValueError("it needs a GPU, bf16 and --padding_free True; auto runs anywhere")
        make_skeleton(config, kernel)  # raises what else it needs, such as a package


def make_skeleton(config, kernel: str | None = None) -> torch.nn.Module:
    """The model without weights: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=kernel)  # it writes into it


def computes_in_bf16(args: Arguments) -> bool:
    """Whether to compute in bf16: where the hardware is slow at it, it is tens of times slower than float32."""
    if args.bf16 != "auto":
        return args.bf16 == "True"
    if torch.cuda.device_count() > 0 and not args.use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in PyTorch, which has no public name for the same questions.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_schedule(name: str, args: Arguments, num_steps: int) -> None:
    """A rehearsal of the schedule on one weight."""
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError("it follows an evaluation, and the rate of this script follows the step alone")
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=args.learning_rate)
    try:
        make_schedule(args, optimizer, num_steps)
    except (TypeError, KeyError, AttributeError) as problem:
        raise ValueError(f"{problem}; --lr_scheduler_kwargs {args.lr_scheduler_kwargs} takes more settings") from None


def check_rates(warmup_steps: float, args: Arguments, rows: TrainingRows) -> None:
    """Says what the schedule will do: a run in which nothing is trained must not look like any other."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=args.learning_rate)
    (factor,) = make_schedule(args, optimizer, rows.num_steps).lr_lambdas
    rates = [args.learning_rate * factor(step) for step in range(rows.num_steps)]
    highest = max(rates)
    if highest <= 0:
        raise ValueError(f"the rate is 0 in all optimizer steps ({rows.num_steps}); lower it")
    print(f"{rows.num_steps} optimizer steps of {rows.rows_per_step} rows, {rates.count(0)} of them at rate 0; "
          f"the highest rate is {highest:.3g} at step {rates.index(highest) + 1}")  # fmt: skip
    if highest < 0.99 * args.learning_rate:
        print(f"warning: that is below --learning_rate {args.learning_rate}; lower --warmup_steps {warmup_steps}")
    if len(rows.dataset) < rows.rows_per_step:
        print(f"warning: there are {len(rows.dataset)} rows, fewer than one step takes; a smaller "
              "--gradient_accumulation_steps makes more steps of them")  # fmt: skip


def count_warmup_steps(args: Arguments, num_steps: int) -> int:
    """Steps until the peak. Warm-up begins at rate 0, so a run of one step has none if only a share was asked for."""
    if args.warmup_steps >= 1:
        return math.ceil(args.warmup_steps)
    return min(math.ceil(args.warmup_steps * num_steps), num_steps - 1)


def make_schedule(args: Arguments, optimizer: torch.optim.Optimizer, num_steps: int):
    """Warm-up, then the schedule."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=count_warmup_steps(args, num_steps),
        num_training_steps=num_steps,
        scheduler_specific_kwargs=json.loads(args.lr_scheduler_kwargs),
    )


# -------------------------------------------------------------------------------------------------------------------
# The strategy: ZeRO
# -------------------------------------------------------------------------------------------------------------------


def join_processes() -> None:
    """Without torchrun, a world of one process."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)


def make_training_arguments(args: Arguments, config, rows: TrainingRows) -> transformers.TrainingArguments:
    """Joins the other processes, and says what transformers' loop is to do."""
    import deepspeed  # slow, and --help does without

    join_processes()
    os.environ["TENSORBOARD_LOGGING_DIR"] = f"{args.output_dir}/runs"
    if args.use_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's, at every collective
    training_args = transformers.TrainingArguments(
        output_dir=f"{args.output_dir}/.writing",  # from where a checkpoint is moved when it is complete
        max_steps=rows.num_steps,
        train_sampling_strategy="sequential",  # rows is in the order of training
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        optim="adamw_torch_fused",
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        lr_scheduler_kwargs=json.loads(args.lr_scheduler_kwargs),
        warmup_steps=count_warmup_steps(args, rows.num_steps),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        seed=args.seed,
        bf16=computes_in_bf16(args),
        use_cpu=args.use_cpu,
        use_cache=config.use_cache,  # it would write False into the model's configuration
        report_to=args.report_to,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        remove_unused_columns=False,  # the collator needs all of them
        accelerator_config={"non_blocking": True},  # batches are copied to the GPU while it computes
        ddp_timeout=24 * 3600,  # others wait while the first process writes a large checkpoint
        deepspeed=args.deepspeed,
    )
    if args.use_cpu:
        # accelerate leaves DeepSpeed out on a CPU, although it shards over gloo as it does over NCCL.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        training_args.distributed_state.distributed_type = DistributedType.DEEPSPEED
    return training_args


def make_adapter_config(args: Arguments) -> peft.PeftConfig:
    """What is trained beside the frozen model."""
    if args.peft_mode == "lora":  # arXiv:2106.09685: two small matrices beside each linear layer
        target_modules = [name.strip() for name in args.lora_target_modules.split(",")]
        if "all-linear" in target_modules:
            target_modules = "all-linear"
        return peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=target_modules,
        )
    if args.peft_mode == "prefix":  # arXiv:2101.00190: keys and values before the first token of each layer
        return peft.PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            prefix_projection=args.mapping_hidden_dim > 0,
            encoder_hidden_size=args.mapping_hidden_dim or None,
        )
    if args.peft_mode == "ptuning":  # arXiv:2103.10385: embeddings before the first token, made by an MLP
        return peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.num_virtual_tokens,
            encoder_hidden_size=args.mapping_hidden_dim or None,
        )
    # arXiv:2104.08691: embeddings before the first token
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.num_virtual_tokens)


def keep_settings(args: Arguments, config: peft.PeftConfig) -> None:
    """An adapter to go on from has settings of its own; the receipt then says what was trained."""
    if config.peft_type != peft.PeftType.LORA:
        return
    found = {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    for name, value in found.items():
        if getattr(args, name) != value:
            print(f"--{name} {getattr(args, name)} is not used: the adapter in --peft_path has {value}")
    args.lora_rank, args.lora_alpha, args.lora_dropout = config.r, config.lora_alpha, config.lora_dropout
    if not isinstance(config.target_modules, str):
        args.lora_target_modules = ",".join(sorted(config.target_modules))


def add_adapter(args: Arguments, model) -> peft.PeftModel:
    """Freezes `model` and puts a new adapter on it, or one of the shape that --peft_path has.

    Raises:
        ValueError: PEFT's reason why the combination cannot work, or a LoRA target that matches no layer.
    """
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = make_adapter_config(args)
    if args.peft_path:
        config = peft.PeftConfig.from_pretrained(args.peft_path)
        config.inference_mode = False
        keep_settings(args, config)
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as problem:
        if "lora_dropout" in str(problem):
            raise ValueError(f"{problem}; set --lora_dropout 0") from None
        raise
    if args.peft_mode == "lora" and not args.peft_path and "all-linear" not in args.lora_target_modules:
        adapted = [f".{path}" for path in model.base_model.targeted_module_names]
        for name in args.lora_target_modules.split(","):
            if not any(path.endswith(f".{name.strip()}") for path in adapted):
                raise ValueError(f"--lora_target_modules {name.strip()} matches no layer of the model")
    return model


def load_model(args: Arguments) -> torch.nn.Module:
    """The model in the compute precision; what is trained has float32 masters in DeepSpeed's optimizer."""
    kernel = args.attn_implementation
    if kernel == "auto":
        kernel = None  # transformers' choice
    dtype = torch.float32
    if computes_in_bf16(args):
        dtype = torch.bfloat16
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            args.model_path,
            dtype=dtype,
            attn_implementation=kernel,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # check_loading says it
            output_loading_info=True,
        )
    except RuntimeError as problem:
        if "size mismatch" not in str(problem):  # ZeRO-3's loading raises it, whatever it is told to ignore
            raise
        mismatch = str(problem).splitlines()[1].strip()
        sys.exit(f"error: --model_path {args.model_path}: {mismatch}")
    check_loading(args, loading)
    # On H100 and later GPUs PyTorch would prefer cuDNN, which builds a plan of half a second for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.attn_implementation == "auto" and args.padding_free:
        data_collator.attend_inside_documents(model, args.torch_compile)
    if args.torch_compile:
        compile_layers(model)
    if args.lora_used:
        model = add_adapter(args, model)
        if args.peft_path:
            load_adapter(model, Path(args.peft_path))
        # DeepSpeed does so itself, but in ZeRO-3 not for what was added after it had split the base: an adapter in
        # float32 would make a float32 copy of each layer's input.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    elif args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def load_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Loads all that is trained: PEFT's own file lacks ptuning's MLP and a projected prefix, ours does not."""
    try:
        if (folder / "trainable.safetensors").is_file():
            keys = model.load_state_dict(load_file(folder / "trainable.safetensors"), strict=False)
            assert not keys.unexpected_keys, f"{folder} holds another adapter"
        else:
            peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    except RuntimeError as problem:
        mismatch = str(problem).splitlines()[-1].strip()
        sys.exit(f"error: --peft_path {folder}: its adapter does not fit the model of --model_path: {mismatch}")


def check_loading(args: Arguments, loading: dict) -> None:
    """transformers draws weights that the files lack at random, and only prints a report."""
    lacking = sorted(loading["missing_keys"]) + sorted(str(key[0]) for key in loading["mismatched_keys"])
    if lacking:
        sys.exit(f"error: --model_path {args.model_path}: its files lack {len(lacking)} tensors that the model needs, "
                 f"or hold them in another shape: {', '.join(lacking[:3])}; download it again")  # fmt: skip


def compile_layers(model: torch.nn.Module) -> None:
    """Compiles the decoder layers, which are alike: one graph for all of them, and for rows of any length."""
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            module.compile(dynamic=True)


# -------------------------------------------------------------------------------------------------------------------
# Training: transformers' loop, with the rows in their order and the toolkit's run folder
# -------------------------------------------------------------------------------------------------------------------


class ZeROTrainer(transformers.Trainer):
    """transformers' loop, with the loss, the evaluation and the saving of this toolkit."""

    loss_is_scaled_for_ga = True  # transformers is not to divide the loss by the number of micro-batches

    def __init__(
        self, script_args: Arguments, skeleton: peft.PeftModel | None, loss_head: LossHead | None, **arguments
    ):
        super().__init__(**arguments)
        self.script_args = script_args
        self.loss_head = loss_head
        self.skeleton = skeleton  # of an adapter
        self.add_callback(RunCallback(self))

    def summed_loss(self, model, batch: dict) -> torch.Tensor:
        """The summed loss of a batch's targets, float32."""
        return data_collator.summed_loss(model, batch, self.loss_head)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """The summed loss, divided once by the targets of the whole optimizer step, of all processes."""
        # Gradients are averaged over the processes, and here they are to be summed.
        return self.summed_loss(model, inputs) * (self.args.world_size / num_items_in_batch)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss per target token over the whole set."""
        self.model.eval()
        dataset = eval_dataset or self.eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(dataset), batch_size * self.args.world_size):
            start = first + self.args.process_index * batch_size
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            if not rows:  # every process takes part in every forward
                rows = [data_collator.filler_row(dataset.packed)]
            batch = self.data_collator(rows)
            inputs = data_collator.move_to_device(batch, self.args.device)
            loss = self.summed_loss(self.model_wrapped, inputs)
            total += torch.tensor([loss.item(), data_collator.num_targets(batch)])
        total = total.to(self.args.device)
        dist.all_reduce(total)
        return {f"{metric_key_prefix}_loss": (total[0] / total[1]).item()}

    def is_evaluated_at(self, step: int) -> bool:
        is_due = step % self.script_args.eval_steps == 0 or step == self.state.max_steps
        return self.eval_dataset is not None and is_due

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Stops at a loss that is not finite; the evaluation loss stands in its step's own row."""
        if "loss" not in logs:
            return  # transformers' summary at the end, which run.json has
        if not math.isfinite(logs["loss"] + logs["grad_norm"]):
            stop(f"error: step {self.state.global_step} has loss {logs['loss']} and gradient norm "
                 f"{logs['grad_norm']}; checkpoints saved before are good; lower --learning_rate")  # fmt: skip
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        logs["peak_memory_bytes"] = peak_memory()
        if self.is_evaluated_at(self.state.global_step):
            logs.update(self.evaluate())
        super().log(logs)
        # Memory is for TensorBoard alone: a resumed run's history stays that of an uninterrupted one.
        del self.state.log_history[-1]["peak_memory_bytes"]

    def is_sharded(self, parameter: torch.nn.Parameter) -> bool:
        """ZeRO-3 shards every parameter; ZeRO-2 shards gradients and optimizer state, and says so itself."""
        return hasattr(parameter, "ds_id") or self.deepspeed.zero_optimization_stage() == 2

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The first process writes the model or the adapter, and the tokenizer, and reads every tensor back."""
        from deepspeed.utils import safe_get_full_fp32_param

        folder = Path(output_dir or self.args.output_dir)
        trained = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)  # gathered by all; the first process keeps it
                if self.args.should_save:
                    trained[name] = whole.cpu()
        if not self.args.should_save:
            return
        if self.skeleton is not None:
            save_adapter(self.skeleton, trained, folder)
        else:
            self.model.save_pretrained(folder, state_dict=trained)
            # By the names in the files: experts are fused in memory only.
            check_saved(folder, revert_weight_conversion(self.model, trained))
        self.processing_class.save_pretrained(folder)
        let_others_read(folder)


class RunCallback(transformers.TrainerCallback):
    """What the toolkit adds to transformers' loop, at the places where transformers calls it.

    Tokens are counted once a step and without communication, from the order of the rows. A step is logged before it
    is saved; the last one is always evaluated and saved. SIGTERM, by which a cluster preempts a job, asks for a
    checkpoint and the end.
    """

    def __init__(self, trainer: ZeROTrainer):
        self.trainer = trainer
        self.terminated = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.terminated.set())

    def on_train_begin(self, args, state, control, model, optimizer, lr_scheduler, **kwargs) -> None:
        """The model is wrapped now: is it sharded, do documents stay apart, and which loss does it allow?"""
        trainer = self.trainer
        if not all(trainer.is_sharded(parameter) for parameter in model.parameters()):
            stop("error: the parameters are not sharded, although this script asked for it")
        vocab_size = model.config.vocab_size
        if trainer.script_args.padding_free or trainer.train_dataset.dataset.packed:
            try:
                data_collator.check_document_attention(model, vocab_size)
            except ValueError as problem:
                stop(f"error: --attn_implementation {trainer.script_args.attn_implementation}: {problem}")
        if trainer.loss_head and not data_collator.computes_plain_logits(model, vocab_size, trainer.summed_loss):
            trainer.loss_head = None
        # The rate of this schedule: that of a run that is extended is another one than it was saved with.
        rates = []
        for group, rate, factor in zip(
            optimizer.param_groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True
        ):  # fmt: skip
            group["lr"] = rate * factor(state.global_step)
            rates.append(group["lr"])
        lr_scheduler.load_state_dict(lr_scheduler.state_dict() | {"_last_lr": rates})  # what the log shows

    def on_step_end(self, args, state, control, **kwargs) -> None:
        rows = self.trainer.train_dataset
        step = state.global_step
        state.epoch = step / rows.steps_per_epoch  # to transformers the whole run is one epoch
        state.num_input_tokens_seen += rows.num_tokens(step - 1)
        terminated = torch.tensor(float(self.terminated.is_set()), device=args.device)
        dist.all_reduce(terminated)  # the signal may reach the processes in different steps
        if terminated.item() > 0:
            control.should_training_stop = True
            control.should_save = True
        if control.should_save or self.trainer.is_evaluated_at(step):
            control.should_log = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """transformers has written a checkpoint into .writing."""
        dist.barrier()
        if args.should_save:
            script_args = self.trainer.script_args
            settings = resume_settings(script_args, self.trainer.train_dataset)
            publish_checkpoint(script_args, Path(args.output_dir) / f"checkpoint-{state.global_step}", settings)
        dist.barrier()  # after SIGTERM no process leaves before it is in its place


def stop(message: str) -> None:
    """Ends all processes with one message."""
    if dist.get_rank() == 0:
        sys.exit(message)
    sys.exit(1)


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPUs, or in host memory without one."""
    on_gpus = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return on_gpus or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------------------------
# Saving: a checkpoint is moved to its place when all of it is on the disk, so that one with its name is complete
# -------------------------------------------------------------------------------------------------------------------


def save_adapter(skeleton: peft.PeftModel, trained: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes an adapter in PEFT's format, and all that was trained as it is; every tensor is read back.

    The prompt modes compute what PEFT's format holds, which sharded weights cannot do in one process: so the trained
    weights are put on a model without any others.
    """
    skeleton.load_state_dict(trained, strict=False, assign=True)
    skeleton.save_pretrained(folder, save_embedding_layers=False)
    save_file(trained, folder / "trainable.safetensors")
    check_saved(folder, trained | peft.get_peft_model_state_dict(skeleton, save_embedding_layers=False))


def let_others_read(folder: Path) -> None:
    """safetensors makes files that only their owner can read; they get the rights of the others, as the umask says."""
    mode = next(folder.glob("*.json")).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def check_saved(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Reads back every tensor of the safetensors files in `folder`, one at a time, and compares it with `trained`.

    Raises:
        OSError: a tensor is missing or differs.
    """
    unsaved = dict(trained)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name in unsaved and torch.equal(file.get_tensor(name), unsaved[name]):
                    del unsaved[name]
    if unsaved:
        raise OSError(f"{folder}: {', '.join(unsaved)} was not saved as it was trained")


def publish_checkpoint(args: Arguments, written: Path, settings: dict) -> None:
    """Moves a written checkpoint to its place when all of it is on the disk, and deletes those beyond the limit."""
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    (written / "settings.json").write_text(json.dumps({"settings": settings, "file_sizes": sizes}, indent=2))
    for path in (*written.rglob("*"), written):
        sync_to_disk(path)
    checkpoint = Path(args.output_dir) / written.name
    if checkpoint.exists():  # of a run that went on from an older one
        delete_checkpoint(checkpoint)
    written.rename(checkpoint)
    sync_to_disk(checkpoint.parent)
    checkpoints = list_checkpoints(args.output_dir)
    usable = [path for path in checkpoints if find_damage(path) is None]
    oldest_kept = usable[: args.save_total_limit][-1]
    for outdated in checkpoints[checkpoints.index(oldest_kept) + 1 :]:
        delete_checkpoint(outdated)


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_checkpoint(folder: Path) -> None:
    """Renames it first: a half-deleted folder must not look like a checkpoint."""
    doomed = folder.parent / ".deleting"
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def stop_if_disk_is_full(output_dir: Path, problem: Exception) -> None:
    """Libraries raise many errors at a full disk, and none of them names the disk or what to do."""
    disk = shutil.disk_usage(output_dir)
    if "No space left" in str(problem) or "quota exceeded" in str(problem) or disk.free < 2**20:
        if dist.get_rank() > 0:
            os._exit(1)  # one message is enough
        sys.exit(f"error: {output_dir} could not be written: its disk is full ({disk.free / 1e6:,.1f} MB of "
                 f"{disk.total / 1e9:,.1f} GB are free); make room, and --resume_from_checkpoint True goes on from "
                 "the newest whole checkpoint, or begins anew")  # fmt: skip


def write_receipt(args: Arguments, rows: TrainingRows, device: torch.device, num_tokens: int, seconds: float) -> None:
    """Writes run.json, the last file of a run: what was run, on what, with which versions and data.

    All processes call it, each with its own device; the first one writes.
    """
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (str(device), peak_memory()))
    if dist.get_rank() > 0:
        return
    # A slim image may lack git.
    command = [shutil.which("git") or "false", "rev-parse", "--verify", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    packages = ("accelerate", "bitsandbytes", "datasets", "deepspeed", "peft", "safetensors", "torch", "transformers")
    receipt = {
        "command": sys.argv,
        "arguments": asdict(args),
        "versions": {name: version(name) for name in packages if name in sys.modules},
        "git_commit": commit or None,
        "dataset": rows.dataset.ledger,
        "identity": resume_settings(args, rows),
        "world_size": len(ranks),
        "devices": [device for device, _ in ranks],
        "peak_memory_bytes": [memory for _, memory in ranks],
        "wall_time_seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
    }
    path = Path(args.output_dir) / "run.json"
    path.with_suffix(".tmp").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)
    print(f"saved {args.output_dir}")


# -------------------------------------------------------------------------------------------------------------------
# Resuming
# -------------------------------------------------------------------------------------------------------------------


def resume_settings(args: Arguments, rows: TrainingRows) -> dict:
    """What a resumed run must share with the interrupted one, or it would be another run."""
    settings = {
        "script": Path(__file__).name,
        "dataset_sha256": rows.dataset.ledger.get("sha256"),
        "num_rows": len(rows.dataset),
        "rows_per_step": rows.rows_per_step,
    }
    if args.random_passage:
        settings["passage_length"] = args.passage_length
    settings["world_size"] = os.environ.get("WORLD_SIZE", "1")  # DeepSpeed's files hold the shards of so many processes
    for name in SHARED_BY_RESUMED:
        settings[name] = getattr(args, name)
    return settings


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<step>, newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def find_checkpoint(choice: str, output_dir: str, settings: dict) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Args:
        choice: `True` for the newest usable one in `output_dir`, `False` for none, or a folder.
        settings: of this run, as resume_settings gives them.

    Raises:
        ValueError: the folder is damaged, its run had other rows or settings, or output_dir holds a newer one.
    """
    if choice == "False":
        return None
    checkpoints = list_checkpoints(output_dir)
    if choice != "True":
        checkpoint = Path(choice)
        damage = find_damage(checkpoint)
        if damage:
            raise ValueError(f"{damage}; name a complete checkpoint, or True for the newest in --output_dir")
        newest = next((path for path in checkpoints if find_damage(path) is None), None)
        if newest and newest.resolve() != checkpoint.resolve():
            raise ValueError(f"the run would mix with {newest}; choose another --output_dir")
        checkpoints = [checkpoint]
    for checkpoint in checkpoints:
        damage = find_damage(checkpoint)
        if damage:
            print(f"ignoring {checkpoint}: {damage}")
            continue
        before = read_settings(checkpoint)["settings"]
        changed = {name: value for name, value in before.items() if value != settings.get(name)}
        if changed:
            raise ValueError(f"{checkpoint} belongs to a run with {changed}; resume with the same")
        print(f"resuming from {checkpoint}")
        return checkpoint
    print(f"no complete checkpoint in {output_dir}: starting from the beginning")
    return None


def is_finished(checkpoint: Path | None, output_dir: str, num_steps: int) -> bool:
    """Whether the run that is to be resumed has taken all its steps and saved its result.

    Raises:
        ValueError: it has taken more steps than are asked for now.
    """
    if checkpoint is None:
        return False
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    if step > num_steps:
        raise ValueError(f"{checkpoint} has taken {step} steps, and these flags ask for {num_steps}; resume with more "
                         "--num_train_epochs or --max_steps")  # fmt: skip
    return step == num_steps and (Path(output_dir) / "run.json").is_file()


def read_settings(checkpoint: Path) -> dict:
    """`settings` of the run and `file_sizes` of a checkpoint; those of the toolkit's former layout alike."""
    former = checkpoint / "complete.json"
    if former.is_file():
        complete = json.loads(former.read_text())
        sizes = {name: file["bytes"] for name, file in complete["files"].items()}
        return {"settings": complete["identity"], "file_sizes": sizes}
    return json.loads((checkpoint / "settings.json").read_text())


def find_damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: a file is missing, has another size or cannot be opened."""
    if not (checkpoint / "settings.json").is_file() and not (checkpoint / "complete.json").is_file():
        return "it has no settings.json, so it is not a checkpoint of this toolkit, or was never finished"
    try:
        recorded = read_settings(checkpoint)
        sizes = dict(recorded["file_sizes"])
        assert recorded["settings"]["num_rows"] > 0
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return "its settings.json is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"missing or damaged: {name}"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the header with the file's size
                    pass
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix in (".pt", ".bin", ".pth") and not zipfile.is_zipfile(path):  # what torch.save writes
                return f"missing or damaged: {name}"
        except (SafetensorError, ValueError):
            return f"missing or damaged: {name}"
    return None


def claim_folder(output_dir: Path, checkpoint: Path | None):
    """Makes the folder of the run and locks it; returns the lock file, which the system frees when the process ends.

    Raises:
        ValueError: another run is going on in it, or it holds files that a run would overwrite and cannot move away.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    others = [name for name in OVERWRITTEN if (output_dir / name).exists()]
    if others and checkpoint is None and not holds_a_run(output_dir):
        raise ValueError(f"--output_dir {output_dir}: it holds {others[0]}, which is not of a run; name another folder")
    is_above = output_dir.resolve() in (Path.cwd(), *Path.cwd().parents)
    if is_above and checkpoint is None and holds_a_run(output_dir):
        raise ValueError(f"--output_dir {output_dir}: it holds a former run, and you are in it; name another folder")
    lock = open(output_dir / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(f"--output_dir {output_dir}: a run is going on in it ({lock.read()}); name another") from None
    except OSError as problem:  # a file system that has no locks
        print(f"{output_dir} cannot be locked ({problem}): start no other run in it")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}")
    lock.flush()
    atexit.register(free_folder, lock)
    return lock


def free_folder(lock) -> None:
    """Deletes the lock, and the folder if nothing was written into it."""
    Path(lock.name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(lock.name).parent.rmdir()


def holds_a_run(output_dir: Path) -> bool:
    return bool(list_checkpoints(output_dir)) or (output_dir / "run.json").is_file()


def set_former_run_aside(output_dir: Path, checkpoint: Path | None) -> None:
    """Moves a former run out of the folder, unless it is resumed from `checkpoint`: a new one would overwrite it."""
    if checkpoint is not None:
        shutil.rmtree(output_dir / ".deleting", ignore_errors=True)  # what a kill left of an older checkpoint
        (output_dir / "run.json").unlink(missing_ok=True)  # it is written again when the resumed run has finished
        return
    if not holds_a_run(output_dir):
        return
    # The folder itself stays: it may be a link, or a disk that is mounted there.
    folder = output_dir.resolve()
    suffix = f".{time.strftime('%Y%m%d-%H%M%S')}"
    contents = [path for path in folder.iterdir() if path.name != ".lock" and not path.name.startswith("former.")]
    former = folder.with_name(folder.name + suffix)
    try:
        former.mkdir()
        contents[0].rename(former / contents[0].name)
    except OSError:  # nothing can be moved out of a mounted disk, or made beside the folder
        if former.is_dir():
            former.rmdir()
        former = folder / f"former{suffix}"
        former.mkdir()
        contents[0].rename(former / contents[0].name)
    for path in contents[1:]:
        path.rename(former / path.name)
    print(f"{output_dir} held a former run, which is now {former}")


# -------------------------------------------------------------------------------------------------------------------
# From the command line to the saved model
# -------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(
        Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False, exit_on_error=False
    )  # fmt: skip
    is_first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    if not is_first:
        sys.stdout = open(os.devnull, "w")
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        config, tokenizer, rows, eval_dataset, checkpoint, skeleton = check_arguments(args)
        if is_finished(checkpoint, args.output_dir, rows.num_steps):
            print(f"{args.output_dir}: all {rows.num_steps} steps are trained and saved; nothing to do")
            sys.exit()
        if is_first:
            lock = claim_folder(Path(args.output_dir), checkpoint)
    except (ValueError, OSError, argparse.ArgumentError) as mistakes:
        if not is_first:
            sys.exit(1)
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    training_args = make_training_arguments(args, config, rows)
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    if is_first:
        set_former_run_aside(output_dir, checkpoint)
        shutil.rmtree(output_dir / ".writing", ignore_errors=True)  # what an interrupted run left
    model = load_model(args)
    trainer = ZeROTrainer(
        script_args=args,
        loss_head=data_collator.add_loss_head(model),
        skeleton=skeleton,
        model=model,
        args=training_args,
        data_collator=DataCollator(args.padding_free),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    torch.manual_seed(args.seed + training_args.process_index)  # every process draws its own dropout
    tokens_before = 0
    if checkpoint:
        tokens_before = json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"]
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        step = trainer.state.global_step
        if step < rows.num_steps:
            stop(f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there")
        trainer.save_model(args.output_dir)
        if is_first:
            trainer.state.save_to_json(output_dir / "trainer_state.json")
            shutil.rmtree(output_dir / ".writing")
        seconds = time.perf_counter() - started
        num_tokens = trainer.state.num_input_tokens_seen - tokens_before
        write_receipt(args, rows, training_args.device, num_tokens, seconds)
    except Exception as problem:
        stop_if_disk_is_full(output_dir, problem)
        raise
    if is_first:
        free_folder(lock)


def leave() -> None:
    """Ends a process of a distributed run with success, when all of them have written what they had to.

    Python does not end in its own way: gloo's threads, which outlive their process group, may still be freeing tensors
    of the last collective, and without an interpreter that aborts a process whose work is done.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    leave()
