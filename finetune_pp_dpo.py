"""Learns from preferences (DPO and its relatives) in a plain PyTorch loop, one process on one or more GPUs.

Choose it after supervised fine-tuning, to make one kind of answer more likely than another. A row of --dataset_path is
a prompt with a chosen and a rejected answer; for --loss_type kto it is a prompt with one answer that is good or bad.
Each loss stands in a function of its own below, with the paper that it is from. The layers lie on as many GPUs as they
need, as in finetune_pp_peft.py.

    python finetune_pp_dpo.py
    python finetune_pp_dpo.py --peft_path outputs/finetune_pp_peft --loss_type ipo
    python finetune_pp_dpo.py --lora_used False --gradient_checkpointing True

The reference is what the model is at the start. No second copy of it is held: with an adapter it is the model with the
adapter switched off, or with the adapter of --peft_path as it was. With --lora_used False, or --precompute_reference
True, its log-probabilities are computed once, before training, and kept in a file in the folder of the set.

Writes into --output_dir: the adapter in PEFT's format (or the whole model) and the tokenizer, checkpoint-<step>/,
trainer_state.json (loss, rewards and log-probabilities of each step, by the names that TRL uses), runs/ (TensorBoard)
and last run.json (the receipt). SIGTERM or Ctrl-C saves a checkpoint and ends.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
import hashlib
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
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import peft
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from huggingface_hub import snapshot_download
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid, relu, sigmoid
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
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
from data_collator import IGNORE_INDEX, MODEL_INPUTS, PreferenceCollator, PreferenceDataset, TrainingRows

WITHOUT_REFERENCE = ("orpo", "simpo")
# Files of weights, of a model and of an adapter; a repository may hold the same weights in other formats, too.
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "trainable.safetensors")
ATTENTION_KERNELS = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
PATHS = ("model_path", "peft_path", "dataset_path", "eval_dataset_path", "output_dir", "resume_from_checkpoint")
# What a run writes into --output_dir and others may have there, too.
OVERWRITTEN = ("README.md", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
# Flags that a resumed run must share with the interrupted one, besides the rows and their order.
SHARED_BY_RESUMED = (
    "model_path", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "lora_used", "peft_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules",
    "loss_type", "beta", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight",
    "precompute_reference",
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
    dataset_path: str = flag("data_sample/tokenized/preference_train", "preference set, or name:weight,name:weight")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    output_dir: str = flag("outputs/finetune_pp_dpo", "folder for all that the run leaves")
    loss_type: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo", "kto"] = flag("sigmoid", "sigmoid: DPO's own loss")
    beta: float = flag(0.1, "factor of rewards: a large one holds the model to its reference; simpo: 2", "> 0")
    label_smoothing: float = flag(0.0, "share of pairs labelled the wrong way round; sigmoid and simpo only", ">= 0")
    simpo_gamma: float = flag(0.5, "simpo: the reward by which a chosen answer is to be better", ">= 0")
    desirable_weight: float = flag(1.0, "kto: weight of the loss of desirable answers", "> 0")
    undesirable_weight: float = flag(1.0, "kto: weight of the loss of undesirable answers", "> 0")
    precompute_reference: bool = flag(False, "compute the reference once, before training, as without an adapter")
    lora_used: bool = flag(True, "train a LoRA adapter; False: all weights")
    peft_path: str | None = flag(None, "go on from this LoRA adapter, which is then the reference, too")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices", "> 0")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank", "> 0")
    lora_dropout: float = flag(0.0, "dropout on an adapter's input, which the reference would not have", ">= 0")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    num_train_epochs: float = flag(1, "passes over the data", "> 0")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one forward", "> 0")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation", "> 0")
    gradient_accumulation_steps: int = flag(1, "forwards of one optimizer step", "> 0")
    learning_rate: float | None = flag(None, "peak rate of AdamW; none: 5e-5 with an adapter, 1e-6 without", "> 0")
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
    num_gpus: int = flag(0, "GPUs that hold the layers; 0: as few as weights and optimizer need", ">= 0")
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
    """Returns (config, tokenizer, rows in the order of training, evaluation set or None, checkpoint or None).

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = check_numbers(args) + check_folders(args) + check_machine(args) + check_loss(args)
    if args.learning_rate is None:
        # Below the rates of supervised fine-tuning: a preference asks for a small change. 1e-6 is the default of TRL
        # and of the DPO paper. An adapter's rate is 50 times that of full training, as in the other scripts.
        args.learning_rate = 1e-6
        if args.lora_used:
            args.learning_rate = 5e-5
    if os.environ.get("WORLD_SIZE", "1") != "1":
        mistakes.append("torchrun: this script is one process; finetune_pp_dpo_trainer.py is for several")
    if args.num_gpus > torch.cuda.device_count():
        mistakes.append(f"--num_gpus {args.num_gpus}: there are {torch.cuda.device_count()}")

    def attempt(name: str, action, *context):
        """What `action` makes of a flag's value; its error becomes a mistake of that flag."""
        value = getattr(args, name)
        if value is None:
            return None
        try:
            return action(value, *context)
        except (ValueError, OSError, ImportError) as problem:
            mistakes.append(f"--{name} {value}: {problem}")

    config = attempt("model_path", load_config)
    tokenizer = None
    if config is not None:
        tokenizer = attempt("model_path", load_tokenizer)
        attempt("model_path", check_quantization, config, args)
        attempt("attn_implementation", check_attention, config, args)
    dataset = attempt("dataset_path", PreferenceDataset, config, tokenizer)
    eval_dataset = attempt("eval_dataset_path", PreferenceDataset, config, tokenizer)
    attempt("peft_path", check_adapter)
    mistakes += check_pairing(args, dataset, eval_dataset)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.lora_used:
        skeleton = attempt("lora_used", lambda _: add_adapter(args, make_skeleton(config)))  # without weights
        if skeleton is not None:
            attempt("peft_path", compare_adapter, skeleton)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = TrainingRows(dataset, rows_per_step, args.num_train_epochs, args.max_steps, args.seed)
    attempt("lr_scheduler_kwargs", json.loads)
    attempt("lr_scheduler_type", check_schedule, args, rows.num_steps)
    if not mistakes:
        attempt("warmup_steps", check_rates, args, rows)
    checkpoint = attempt("resume_from_checkpoint", find_checkpoint, args.output_dir, resume_settings(args, rows))
    if is_precomputed(args) and not mistakes:
        attempt("dataset_path", check_reference, args, dataset, checkpoint)
        attempt("eval_dataset_path", check_reference, args, eval_dataset, checkpoint)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return config, tokenizer, rows, eval_dataset, checkpoint


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


def check_loss(args: Arguments) -> list[str]:
    """Flags that the loss does not use, or that do not go together."""
    mistakes = []
    if args.label_smoothing > 0 and args.loss_type not in ("sigmoid", "simpo"):
        mistakes.append(f"--label_smoothing {args.label_smoothing}: not for --loss_type {args.loss_type}; leave it out")
    if args.label_smoothing >= 0.5:
        mistakes.append(f"--label_smoothing {args.label_smoothing}: from 0.5 on, rejected answers would be preferred; "
                        "choose 0.1 or less")  # fmt: skip
    uses = {"simpo_gamma": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
    for name, loss_type in uses.items():
        value = getattr(args, name)
        if value != getattr(Arguments, name) and args.loss_type != loss_type:
            mistakes.append(f"--{name} {value}: is for --loss_type {loss_type}; leave it out")
    if args.precompute_reference and args.loss_type in WITHOUT_REFERENCE:
        mistakes.append(f"--precompute_reference True: --loss_type {args.loss_type} has no reference; leave it out")
    if args.peft_path and not args.lora_used:
        mistakes.append(f"--peft_path {args.peft_path}: --lora_used False trains all weights; merge the adapter first: "
                        "python tools/merge_lora.py")  # fmt: skip
    return mistakes


def check_pairing(args: Arguments, dataset: PreferenceDataset | None, eval_dataset) -> list[str]:
    """KTO learns from single answers, the other losses from pairs."""
    if dataset and eval_dataset and dataset.is_paired != eval_dataset.is_paired:
        kinds = {True: "pairs", False: "single answers"}
        return [f"--eval_dataset_path {args.eval_dataset_path}: it has {kinds[eval_dataset.is_paired]}, and "
                f"--dataset_path has {kinds[dataset.is_paired]}; name a set of the same kind"]  # fmt: skip
    if dataset and args.loss_type == "kto" and dataset.is_paired:
        return [f"--loss_type kto: learns from single answers, and --dataset_path {args.dataset_path} has pairs; "
                "choose sigmoid, or tokenize rows with one answer and a label"]  # fmt: skip
    if dataset and args.loss_type != "kto" and not dataset.is_paired:
        return [f"--loss_type {args.loss_type}: compares two answers, and --dataset_path {args.dataset_path} has "
                "single ones; choose kto, or tokenize pairs"]  # fmt: skip
    return []


def check_adapter(folder: str) -> None:
    """An adapter to go on from is LoRA: the others cannot be switched off inside a row of several documents."""
    try:
        peft_type = peft.PeftConfig.from_pretrained(folder).peft_type
    except KeyError as unknown:
        raise ValueError(f"its adapter is of type {unknown}, which this version of PEFT does not know") from None
    if peft_type != peft.PeftType.LORA:
        raise ValueError(f"its adapter is of type {peft_type.value}; this script trains LoRA adapters only")


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


def check_reference(path: str, args: Arguments, dataset: PreferenceDataset, checkpoint: Path | None) -> None:
    """The reference's log-probabilities of a set are there, or can be computed and written."""
    file = find_reference(args, dataset)
    if file.is_file():
        return
    if checkpoint and not args.lora_used:
        raise ValueError(f"{file.name}, the log-probabilities of this reference in this precision, is not in it; if "
                         "the run began on other hardware, name its precision by --bf16; if the file was deleted, a "
                         "run of one step in another --output_dir makes it again")  # fmt: skip
    if not os.access(file.parent, os.W_OK):
        raise ValueError(f"the reference's log-probabilities are to be written into {file.parent}, which is not "
                         "writable; name a copy of that folder")  # fmt: skip


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


# -------------------------------------------------------------------------------------------------------------------
# The strategy: where each layer lies, and what is trained
# -------------------------------------------------------------------------------------------------------------------


def place_layers(num_layers: int, num_devices: int) -> list[int]:
    """Number of decoder layers on each device: contiguous blocks whose sizes differ by at most one.

    The larger blocks go to the middle, because the first device also holds the embedding and the last one the head.
    """
    sizes = [num_layers // num_devices] * num_devices
    from_the_middle = sorted(range(num_devices), key=lambda i: abs(2 * i + 1 - num_devices))
    for i in from_the_middle[: num_layers % num_devices]:
        sizes[i] += 1
    return sizes


def choose_devices(args: Arguments, config) -> list[torch.device]:
    """No more GPUs than needed: only one of them works at a time, and each border costs a copy."""
    if args.use_cpu or torch.cuda.device_count() == 0:
        return [torch.device("cpu")]
    num_gpus = args.num_gpus
    if num_gpus == 0:
        # Bytes of a weight that is trained: 4 in float32, 4 for its gradient, 8 for AdamW's two moments, 2 for a copy
        # in bf16; of a frozen one: 4 in float32 and 2 in bf16. An adapter is small beside its base.
        num_bytes = 18 * make_skeleton(config).num_parameters()
        if args.lora_used:
            num_bytes = 4 * make_skeleton(config).num_parameters()
            if computes_in_bf16(args):
                num_bytes = num_bytes // 2
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        num_gpus = math.ceil(num_bytes / (memory / 2))  # the other half of each is for activations
    num_gpus = min(num_gpus, torch.cuda.device_count(), config.num_hidden_layers)
    return [torch.device("cuda", i) for i in range(num_gpus)]


def make_device_map(config, devices: list[torch.device]) -> dict[str, torch.device]:
    """The device of each module by the model's own names; a tied head lies with the embedding."""
    skeleton = make_skeleton(config)
    modules = dict(skeleton.named_modules())
    # The attribute is accelerate's, which documents it as the classes of the blocks that must not be split.
    layers = [name for name, module in modules.items() if type(module).__name__ in skeleton._no_split_modules]
    device_map = {}
    start = 0
    for device, size in zip(devices, place_layers(len(layers), len(devices)), strict=True):
        for name in layers[start : start + size]:
            device_map[name] = device
        start += size
    for name, module in modules.items():
        if name.startswith(tuple(layers)) or list(module.children()):
            continue
        is_tied_head = module is skeleton.get_output_embeddings() and config.tie_word_embeddings
        is_embedding = module is skeleton.get_input_embeddings() or is_tied_head
        device_map[name] = devices[-1]
        if is_embedding or not list(module.parameters()):
            device_map[name] = devices[0]
    return device_map


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
    """Freezes `model` and puts a new LoRA adapter on it (arXiv:2106.09685), or one of the shape that --peft_path has.

    Raises:
        ValueError: PEFT's reason why the combination cannot work, or a LoRA target that matches no layer.
    """
    target_modules = [name.strip() for name in args.lora_target_modules.split(",")]
    if "all-linear" in target_modules:
        target_modules = "all-linear"
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_modules,
    )
    if args.peft_path:
        config = peft.PeftConfig.from_pretrained(args.peft_path)
        config.inference_mode = False
        config.lora_dropout = args.lora_dropout  # part of a run, not of the adapter
        keep_settings(args, config)
    try:
        model = peft.get_peft_model(model, config)
    except ValueError as problem:
        if "lora_dropout" in str(problem):
            raise ValueError(f"{problem}; set --lora_dropout 0") from None
        raise
    if not args.peft_path and "all-linear" not in args.lora_target_modules:
        adapted = [f".{path}" for path in model.base_model.targeted_module_names]
        for name in args.lora_target_modules.split(","):
            if not any(path.endswith(f".{name.strip()}") for path in adapted):
                raise ValueError(f"--lora_target_modules {name.strip()} matches no layer of the model")
    return model


def add_reference_adapter(model: peft.PeftModel) -> None:
    """Puts a frozen copy of the adapter beside it, under the name "reference"."""
    model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            frozen = parameters[name.replace(".default.", ".reference.")]
            frozen.requires_grad_(False)
            frozen.copy_(parameter.detach())


def load_model(args: Arguments, config, checkpoint: Path | None, devices: list[torch.device]) -> torch.nn.Module:
    """A frozen base in the compute precision with an adapter in float32, or all weights in float32.

    What is trained is never in bf16, where small steps would vanish.
    """
    device_map = {"": devices[0]}
    if len(devices) > 1:
        device_map = make_device_map(config, devices)
    kernel = args.attn_implementation
    if kernel == "auto":
        kernel = None  # transformers' choice
    folder = args.model_path
    if checkpoint and not args.lora_used:
        folder = checkpoint
    dtype = torch.float32
    if args.lora_used and computes_in_bf16(args):
        dtype = torch.bfloat16
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=kernel,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # check_loading says it
        output_loading_info=True,
    )
    check_loading(args, loading)
    if len(devices) > 1:
        move_inputs_to_layers(model, device_map)
    # On H100 and later GPUs PyTorch would prefer cuDNN, which builds a plan of half a second for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.attn_implementation == "auto" and args.padding_free:
        data_collator.attend_inside_documents(model, args.torch_compile)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.torch_compile:
        compile_layers(model)
    if args.lora_used:
        model = add_adapter(args, model)
    if args.peft_path:
        load_adapter(model, Path(args.peft_path))
        add_reference_adapter(model)
    for module in model.modules():
        # In bf16 PEFT would copy each layer's input to float32. Autocast casts the adapter's small weights instead.
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = not computes_in_bf16(args)
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


def move_inputs_to_layers(model: torch.nn.Module, device_map: dict[str, torch.device]) -> None:
    """The inputs of a layer follow it to its device.

    accelerate has put a hook on every module that has weights, a dozen in a layer, each of which takes the host longer
    than a small product takes the GPU. One for each layer is enough.
    """
    remove_hook_from_submodules(model)
    for name, device in device_map.items():
        model.get_submodule(name).register_forward_pre_hook(partial(move_inputs, device), with_kwargs=True)


def move_inputs(device: torch.device, layer, inputs: tuple, named_inputs: dict) -> tuple[tuple, dict]:
    """Keys and values of a prefix are on the device of their layer already."""
    return send_to_device(inputs, device), send_to_device(named_inputs, device, skip_keys="past_key_values")


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
# Log-probabilities of answers, by the policy and by the reference
# -------------------------------------------------------------------------------------------------------------------


def choose_logps(args: Arguments, model):
    """The function that computes the log-probabilities of a batch's targets; the model is asked what it allows.

    Raises:
        ValueError: documents of one row would see each other.
    """
    vocab_size = model.config.vocab_size
    output_layer = model.get_output_embeddings()  # with an adapter on it, of another class
    is_product = type(output_layer) is torch.nn.Linear and output_layer.bias is None
    with torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(args)):
        if args.padding_free:
            data_collator.check_document_attention(model, vocab_size)
        if is_product and data_collator.computes_plain_logits(model, vocab_size, negative_sum_in_chunks):
            return logps_in_chunks
    return logps_of_model


def choose_collator(args: Arguments, model) -> PreferenceCollator:
    """The collator of this model's batches: a prompt is computed once for both answers, if the model allows it."""
    shares_prompts = False
    if args.padding_free:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(args)):
            shares_prompts = data_collator.can_share_prompts(model, model.config.vocab_size)
    return PreferenceCollator(args.padding_free, shares_prompts)


def negative_sum_in_chunks(model, batch: dict) -> torch.Tensor:
    """The summed cross-entropy of the targets, by which the model is asked whether the chunks compute it rightly."""
    return -logps_in_chunks(model, batch).sum()


def logps_of_model(model, batch: dict) -> torch.Tensor:
    """The log-probability of each target, float32 [targets], from the logits of all positions."""
    return data_collator.batch_logps(model, batch, None)


def logps_in_chunks(model, batch: dict) -> torch.Tensor:
    """The same, but logits exist for some hundred targets at a time."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    base = model
    if isinstance(model, peft.PeftModel):
        base = model.get_base_model()  # with the adapter in its layers
    hidden_states = base.get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # [positions, size]
    # The output layer, as large as several others, sees no position without a target.
    predicting = hidden_states[batch["logits_to_keep"].to(hidden_states.device)]
    weight = base.get_output_embeddings().weight
    return data_collator.target_logps(predicting.to(weight.device), weight, batch["shift_labels"][0])


def policy_logps(args: Arguments, model, compute_logps, batch: dict) -> torch.Tensor:
    """The log-probability of each document's answer, float32 [documents], in the precision that was asked for."""
    device = batch["lengths"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(args)):
        logps = compute_logps(model, batch)
    return data_collator.sum_over_documents(logps, batch).to(device)


@torch.no_grad()
def reference_logps(args: Arguments, model, compute_logps, batch: dict) -> torch.Tensor:
    """The same by the reference, without dropout: kept in the batch, or computed; zeros for a loss without one."""
    if args.loss_type in WITHOUT_REFERENCE:
        return torch.zeros(len(batch["lengths"]), device=batch["lengths"].device)
    if "reference_logps" in batch:
        return batch["reference_logps"]
    was_training = model.training
    model.eval()
    if not args.lora_used:
        logps = policy_logps(args, model, compute_logps, batch)  # before training: the model is the reference
    elif args.peft_path:
        model.set_adapter("reference", inference_mode=True)
        logps = policy_logps(args, model, compute_logps, batch)
        model.set_adapter("default")
    else:
        with model.disable_adapter():
            logps = policy_logps(args, model, compute_logps, batch)
    model.train(was_training)
    return logps


# -------------------------------------------------------------------------------------------------------------------
# Reference log-probabilities that are computed once
# -------------------------------------------------------------------------------------------------------------------


def is_precomputed(args: Arguments) -> bool:
    """Without an adapter, the reference is gone after the first step."""
    has_reference = args.loss_type not in WITHOUT_REFERENCE
    return has_reference and (args.precompute_reference or not args.lora_used)


@lru_cache
def hash_weights(folder: Path) -> str:
    """SHA-256 of a model's or an adapter's weights and configuration."""
    known = hashlib.sha256()
    for pattern in ("config.json", "adapter_config.json", *WEIGHTS):
        for path in sorted(folder.glob(pattern)):
            with open(path, "rb") as file:
                known.update(hashlib.file_digest(file, "sha256").digest())
    return known.hexdigest()


def find_reference(args: Arguments, dataset: PreferenceDataset) -> Path:
    """The file of the reference's log-probabilities of a set, whether it is there or not; it lies in the set's folder.

    Its name is a hash of all that they depend on: the base model, an adapter to go on from, the precision, and the
    set's ledger, which has the hash of the rows and all settings of their rendering.
    """
    folder = Path(args.model_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(args.model_path, allow_patterns=["config.json", *WEIGHTS]))
    parts = [hash_weights(folder), computes_in_bf16(args), dataset.ledger]
    if args.peft_path:
        parts.append(hash_weights(Path(args.peft_path)))
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return dataset.folders[0].path / f"reference-{digest[:16]}.safetensors"


def save_reference(logps: torch.Tensor, path: Path) -> None:
    """Writes beside and renames: a file of this name is complete."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"logps": logps}, beside)
    beside.rename(path)


def prepare_reference(args: Arguments, model, compute_logps, collate, dataset, device: torch.device) -> None:
    """Gives each row of the set the reference's log-probabilities, from their file or computed now."""
    path = find_reference(args, dataset)
    if not path.is_file():
        save_reference(compute_reference(args, model, compute_logps, collate, dataset, device), path)
    print(f"the reference's log-probabilities of {len(dataset)} rows are in {path}")
    dataset.keep_reference(load_file(path)["logps"])


def compute_reference(args: Arguments, model, compute_logps, collate, dataset, device: torch.device) -> torch.Tensor:
    """The reference's log-probabilities of a set, float32 [rows, 2], as PreferenceDataset.keep_reference takes them."""
    logps = []
    num_batches = math.ceil(len(dataset) / args.per_device_eval_batch_size)
    for batch in tqdm(list_batches(args, collate, dataset), total=num_batches, desc="reference", unit="batch"):
        batch = data_collator.move_to_device(batch, device)
        first = reference_logps(args, model, compute_logps, batch)
        if dataset.is_paired:
            first, second = first.chunk(2)
        else:
            second = reference_logps(args, model, compute_logps, batch["mismatched"])
        logps.append(torch.stack([first, second], dim=1).cpu())
    return torch.cat(logps)


# -------------------------------------------------------------------------------------------------------------------
# The losses. `chosen` and `rejected` [pairs] are scores of the answers: by default log(policy / reference) of an answer
# -------------------------------------------------------------------------------------------------------------------


def sigmoid_loss(args: Arguments, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """DPO, equation 7 of arXiv:2305.18290: -log sigmoid(beta (chosen - rejected)).

    With --label_smoothing e, the two answers are swapped with probability e (conservative DPO,
    https://ericmitchell.ai/cdpo.pdf). TRL's DPOTrainer has left that out since; its CPOTrainer has it.
    """
    margins = args.beta * (chosen - rejected)
    return -(1 - args.label_smoothing) * logsigmoid(margins) - args.label_smoothing * logsigmoid(-margins)


def ipo_loss(args: Arguments, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """IPO, equation 17 of arXiv:2310.12036, with beta for its tau: (chosen - rejected - 1 / (2 beta)) ^ 2.

    The scores are averages over the tokens of an answer. The paper does not say so; TRL has it from its authors.
    """
    return (chosen - rejected - 1 / (2 * args.beta)) ** 2


def hinge_loss(args: Arguments, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The hinge of SLiC (arXiv:2305.10425) on DPO's scores, as in arXiv:2309.06657.

    max(0, 1 - beta (chosen - rejected))
    """
    return relu(1 - args.beta * (chosen - rejected))


def simpo_loss(args: Arguments, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """SimPO, arXiv:2405.14734: -log sigmoid(beta (chosen - rejected) - gamma).

    There is no reference: the scores are the average log-probabilities of an answer's tokens. The paper's beta is 2 to
    2.5. --label_smoothing as in sigmoid_loss.
    """
    margins = args.beta * (chosen - rejected) - args.simpo_gamma
    return -(1 - args.label_smoothing) * logsigmoid(margins) - args.label_smoothing * logsigmoid(-margins)


def orpo_loss(args: Arguments, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """ORPO, equations 6 and 7 of arXiv:2403.07691, with beta for its lambda.

    -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), where odds(p) = p / (1 - p). There is no
    reference: the scores are the average log-probabilities log p of an answer's tokens, and -chosen is the loss of
    supervised fine-tuning. TRL takes that loss over the tokens of the prompt, too, and over all tokens of a batch.
    """
    # A certain answer's log p is rounded to 0, where the odds are infinite.
    likely = chosen.clamp(max=-1e-7)
    unlikely = rejected.clamp(max=-1e-7)
    chosen_log_odds = likely - torch.log(-torch.expm1(likely))
    rejected_log_odds = unlikely - torch.log(-torch.expm1(unlikely))
    return -chosen - args.beta * logsigmoid(chosen_log_odds - rejected_log_odds)


def kto_loss(args: Arguments, scores: torch.Tensor, is_desirable: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """KTO, section 4.1 of arXiv:2402.01306: w (1 - sigmoid(beta (score - kl))), with the other sign if undesirable.

    `kl` is what estimate_kl gives; no gradient goes through it.
    """
    desirable = args.desirable_weight * (1 - sigmoid(args.beta * (scores - kl)))
    undesirable = args.undesirable_weight * (1 - sigmoid(args.beta * (kl - scores)))
    return torch.where(is_desirable, desirable, undesirable)


PAIR_LOSSES = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
# Sums over a batch, from which averages are logged. An accurate pair has the higher reward at the chosen answer.
SUMS = (
    "number/chosen", "number/rejected", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
    "accurate",
)  # fmt: skip


def compare(args: Arguments, batch: dict, logps: torch.Tensor, reference: torch.Tensor, kl: torch.Tensor | None):
    """The summed loss of a batch's rows, and the sums [len(SUMS)] of what is logged; fillers count for nothing.

    Args:
        logps, reference: of the answers by the policy and by the reference [documents].
        kl: KTO's estimate.
    """
    is_real = batch["labels"] != IGNORE_INDEX
    lengths = batch["lengths"].clamp(min=1)
    if args.loss_type in WITHOUT_REFERENCE:
        logps = logps / lengths
    scores = logps - reference
    rewards = args.beta * scores.detach()
    if args.loss_type == "ipo":
        scores = scores / lengths
    num_accurate = torch.zeros((), device=rewards.device)
    if args.loss_type == "kto":
        is_chosen = batch["labels"] == 1
        is_rejected = batch["labels"] == 0
        losses = kto_loss(args, scores[is_real], is_chosen[is_real], kl)
    else:  # first all chosen answers, then all rejected ones
        is_chosen = torch.cat([is_real, torch.zeros_like(is_real)])
        is_rejected = torch.cat([torch.zeros_like(is_real), is_real])
        losses = PAIR_LOSSES[args.loss_type](args, scores[is_chosen], scores[is_rejected])
        num_accurate = (rewards[is_chosen] > rewards[is_rejected]).sum()
    logps = logps.detach()
    sums = [
        is_chosen.sum(),
        is_rejected.sum(),
        rewards[is_chosen].sum(),
        rewards[is_rejected].sum(),
        logps[is_chosen].sum(),
        logps[is_rejected].sum(),
        num_accurate,
    ]
    return losses.sum(), torch.stack([value.float() for value in sums])


def average(args: Arguments, sums: torch.Tensor, kl: torch.Tensor | None) -> dict[str, float]:
    """What is logged of a step or an evaluation, by TRL's names; without rows of a kind their names are missing."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    measures = {}
    for kind in ("chosen", "rejected"):
        if total[f"number/{kind}"] > 0:
            for name in ("rewards", "logps"):
                measures[f"{name}/{kind}"] = total[f"{name}/{kind}"] / total[f"number/{kind}"]
    if "rewards/chosen" in measures and "rewards/rejected" in measures:
        measures["rewards/margins"] = measures["rewards/chosen"] - measures["rewards/rejected"]
    if args.loss_type == "kto":
        measures["kl"] = kl.item()
    else:
        measures["rewards/accuracies"] = total["accurate"] / total["number/chosen"]
    return measures


@torch.no_grad()
def estimate_kl(args: Arguments, model, compute_logps, batches, device: torch.device) -> torch.Tensor | None:
    """KTO's distance between policy and reference, from the mismatched answers of all `batches`; None for other losses.

    The average of log(policy / reference) over answers that belong to another prompt, at least 0 (section 4.1 of
    arXiv:2402.01306). As in TRL's KTOTrainer a row has one such answer, that of another row of the set. TRL averages
    over a micro-batch, and here it is over the whole optimizer step, so that its cut changes nothing.
    """
    if args.loss_type != "kto":
        return None
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=device)
    num_rows = 0
    for batch in batches:
        is_real = (batch["labels"] != IGNORE_INDEX).to(device)
        mismatched = data_collator.move_to_device(batch["mismatched"], device)
        reference = reference_logps(args, model, compute_logps, mismatched)
        log_ratios = policy_logps(args, model, compute_logps, mismatched) - reference
        total += log_ratios[is_real].sum()
        num_rows += data_collator.num_targets(batch)
    model.train(was_training)
    return (total / num_rows).clamp(min=0)


# -------------------------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------------------------


def make_optimizer(args: Arguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in one fused kernel. Vectors (norms and biases) are never decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)


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


@torch.no_grad()
def evaluate(args: Arguments, model, compute_logps, collate, dataset, device: torch.device) -> dict:
    """Loss per row over the whole set, and the averages of the other measures."""
    model.eval()
    total = 0.0
    sums = torch.zeros(len(SUMS), device=device)
    kl = estimate_kl(args, model, compute_logps, list_batches(args, collate, dataset), device)
    for batch in list_batches(args, collate, dataset):
        batch = data_collator.move_to_device(batch, device)
        reference = reference_logps(args, model, compute_logps, batch)
        logps = policy_logps(args, model, compute_logps, batch)
        loss, batch_sums = compare(args, batch, logps, reference, kl)
        total += loss.item()
        sums += batch_sums
    model.train()
    measures = {"eval_loss": total / len(dataset)}
    for name, value in average(args, sums, kl).items():
        measures[f"eval_{name}"] = value
    return measures


def list_batches(args: Arguments, collate: PreferenceCollator, dataset: PreferenceDataset):
    """Yields all rows of a set in their order, as batches for evaluation."""
    for start in range(0, len(dataset), args.per_device_eval_batch_size):
        indices = range(start, min(start + args.per_device_eval_batch_size, len(dataset)))
        yield collate([dataset[i] for i in indices])


def train(args: Arguments, model, compute_logps, collate, tokenizer, rows, eval_dataset, checkpoint, devices) -> int:
    """Trains from the checkpoint, if any, until the last step or a signal; returns the tokens that this took."""
    optimizer = make_optimizer(args, model)
    lr_scheduler = make_schedule(args, optimizer, rows.num_steps)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizer, lr_scheduler, devices)
    step = state["global_step"]
    tokens_before = state["num_input_tokens_seen"]
    terminated = stop_at_signals()
    writer = None
    if args.report_to == "tensorboard":
        writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1)
    progress = tqdm(total=rows.num_steps, initial=step, desc="training", unit="step")
    steps_ahead = read_ahead(args, collate, rows, step, devices[0])
    model.train()
    while step < rows.num_steps:
        started = time.perf_counter()
        micro_batches = next(steps_ahead)
        # One division by the rows of the whole optimizer step: every row weighs the same, however the step is cut
        # into micro-batches.
        num_rows = sum(data_collator.num_targets(batch) for batch in micro_batches)
        kl = estimate_kl(args, model, compute_logps, micro_batches, devices[0])
        losses = []
        sums = torch.zeros(len(SUMS), device=devices[0])
        for batch in micro_batches:
            batch = data_collator.move_to_device(batch, devices[0])
            reference = reference_logps(args, model, compute_logps, batch)
            logps = policy_logps(args, model, compute_logps, batch)
            micro_loss, micro_sums = compare(args, batch, logps, reference, kl)
            (micro_loss / num_rows).backward()
            losses.append(micro_loss.detach() / num_rows)
            sums += micro_sums
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm).item()
        loss = torch.stack(losses).sum().item()
        if not math.isfinite(loss + grad_norm):
            sys.exit(f"error: step {step + 1} has loss {loss} and gradient norm {grad_norm}; the weights were not "
                     "updated, and checkpoints saved before are good; lower --learning_rate")  # fmt: skip
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

        num_tokens = rows.num_tokens(step)
        step += 1
        is_stopped = terminated.is_set()  # asked once: a signal may come at any time, and the step must be saved
        is_last = step == rows.num_steps or is_stopped
        state["global_step"] = step
        state["num_input_tokens_seen"] += num_tokens
        log = {
            "step": step,
            "epoch": step / rows.steps_per_epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_input_tokens_seen": state["num_input_tokens_seen"],
        }
        log.update(average(args, sums, kl))
        speed = num_tokens / (time.perf_counter() - started)
        shown = f"loss {loss:.4f}"
        if "rewards/margins" in log:  # a step of KTO may have answers of one kind only
            shown += f", margin {log['rewards/margins']:.4f}"
        progress.set_postfix_str(f"{shown}, {speed:.0f} tokens/s, {peak_memory() / 2**30:.1f} GiB")
        progress.update()
        if eval_dataset and (step % args.eval_steps == 0 or step == rows.num_steps):
            log.update(evaluate(args, model, compute_logps, collate, eval_dataset, devices[0]))
            progress.write(f"step {step}: eval_loss {log['eval_loss']:.4f}")
        if step % args.logging_steps == 0 or is_last or "eval_loss" in log:
            state["log_history"].append(log)
            write_curve(writer, log)
        if step % args.save_steps == 0 or is_last:
            save_checkpoint(args, model, tokenizer, optimizer, lr_scheduler, rows, state, devices)
        if is_stopped and step < rows.num_steps:
            sys.exit(f"stopped: step {step} is saved; --resume_from_checkpoint True goes on from there")
    if writer:
        writer.close()
    (Path(args.output_dir) / "trainer_state.json").write_text(json.dumps(state, indent=2))
    return state["num_input_tokens_seen"] - tokens_before


def read_ahead(args: Arguments, collate, rows: TrainingRows, first_step: int, device: torch.device):
    """Yields the micro-batches of each optimizer step. A thread makes them while the step before is computed."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(make_micro_batches, args, collate, rows, first_step, device)
        for step in range(first_step, rows.num_steps):
            micro_batches = ahead.result()
            if step + 1 < rows.num_steps:
                ahead = reader.submit(make_micro_batches, args, collate, rows, step + 1, device)
            yield micro_batches


def make_micro_batches(args: Arguments, collate, rows: TrainingRows, step: int, device: torch.device) -> list[dict]:
    """The batches of one optimizer step, in memory from which a GPU copies while it computes."""
    step_rows = rows.step(step)
    micro_batches = []
    for start in range(0, len(step_rows), args.per_device_train_batch_size):
        batch = collate(step_rows[start : start + args.per_device_train_batch_size])
        if device.type == "cuda":
            batch = data_collator.pin_memory(batch)
        micro_batches.append(batch)
    return micro_batches


def stop_at_signals() -> threading.Event:
    """An event that SIGTERM, by which a cluster preempts a job, and Ctrl-C set; a second signal ends at once."""
    terminated = threading.Event()

    def stop(number: int, frame) -> None:
        terminated.set()
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return terminated


def write_curve(writer: SummaryWriter | None, log: dict) -> None:
    """Memory is for TensorBoard alone: a resumed run's history stays that of an uninterrupted one."""
    if writer is None:
        return
    for name, value in log.items():
        writer.add_scalar(f"train/{name}", value, log["step"])
    writer.add_scalar("train/peak_memory_bytes", peak_memory(), log["step"])


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPUs, or in host memory without one."""
    on_gpus = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return on_gpus or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------------------------
# Saving: a checkpoint is written beside, synced, and then renamed, so that one with its name is complete
# -------------------------------------------------------------------------------------------------------------------


def save_model(model, tokenizer, folder: Path) -> None:
    """Writes an adapter in PEFT's format or a model in Hugging Face's, and the tokenizer; every tensor is read back."""
    if isinstance(model, peft.PeftModel):
        # Without the frozen adapter that is the reference.
        model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
        trainable = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                trainable[name] = parameter.detach().cpu().contiguous()
        save_file(trainable, folder / "trainable.safetensors")
        trained = trainable | peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
        weights = model.state_dict()
        for name in model.all_tied_weights_keys:
            weights.pop(name, None)
        trained = revert_weight_conversion(model, weights)  # the names in the files: experts are fused in memory only
    tokenizer.save_pretrained(folder)
    let_others_read(folder)
    check_saved(folder, trained)


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
                if name in unsaved and torch.equal(file.get_tensor(name), unsaved[name].cpu()):
                    del unsaved[name]
    if unsaved:
        raise OSError(f"{folder}: {', '.join(unsaved)} was not saved as it was trained")


def save_checkpoint(args: Arguments, model, tokenizer, optimizer, lr_scheduler, rows, state: dict, devices) -> None:
    folder = start_checkpoint(args, state["global_step"])
    save_model(model, tokenizer, folder)
    random_states = {"cpu": torch.get_rng_state(), "cuda": []}
    for device in devices:
        if device.type == "cuda":
            random_states["cuda"].append(torch.cuda.get_rng_state(device))
    training_state = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "rng": random_states,
    }
    torch.save(training_state, folder / "training_state.pt")
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    publish_checkpoint(args, folder, resume_settings(args, rows))


def start_checkpoint(args: Arguments, step: int) -> Path:
    """An empty folder to write a checkpoint in; whatever an interrupted run left there goes."""
    folder = Path(args.output_dir) / ".writing" / f"checkpoint-{step}"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


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
        sys.exit(f"error: {output_dir} could not be written: its disk is full ({disk.free / 1e6:,.1f} MB of "
                 f"{disk.total / 1e9:,.1f} GB are free); make room, and --resume_from_checkpoint True goes on from "
                 "the newest whole checkpoint, or begins anew")  # fmt: skip


def write_receipt(args: Arguments, rows: TrainingRows, devices: list, num_tokens: int, seconds: float) -> None:
    """Writes run.json, the last file of a run: what was run, on what, with which versions and data."""
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
        "world_size": 1,
        "devices": [str(device) for device in devices],
        "peak_memory_bytes": [peak_memory()],
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
    for name in SHARED_BY_RESUMED:
        settings[name] = getattr(args, name)
    if args.peft_path and args.loss_type not in WITHOUT_REFERENCE:
        settings["peft_sha256"] = hash_weights(Path(args.peft_path))  # the adapter is the reference, too
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


def load_checkpoint(folder: Path, model, optimizer, lr_scheduler, devices) -> dict:
    """Puts optimizer, schedule, random numbers and an adapter back (whole models are loaded); returns the state."""
    if isinstance(model, peft.PeftModel):
        load_adapter(model, folder)
    parts = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(parts["optimizer"])
    lr_scheduler.load_state_dict(parts["lr_scheduler"])
    # The rate of this schedule: that of a run that is extended is another one than it was saved with.
    step = lr_scheduler.last_epoch
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(step)
    torch.set_rng_state(parts["rng"]["cpu"])
    gpus = [device for device in devices if device.type == "cuda"]
    for device, random_state in zip(gpus, parts["rng"]["cuda"], strict=False):  # a run may go on with fewer GPUs
        torch.cuda.set_rng_state(random_state, device)
    return json.loads((folder / "trainer_state.json").read_text())


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
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        config, tokenizer, rows, eval_dataset, checkpoint = check_arguments(args)
        if is_finished(checkpoint, args.output_dir, rows.num_steps):
            print(f"{args.output_dir}: all {rows.num_steps} steps are trained and saved; nothing to do")
            sys.exit()
        claim_folder(Path(args.output_dir), checkpoint)
    except (ValueError, OSError, argparse.ArgumentError) as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    devices = choose_devices(args, config)
    set_seed(args.seed)
    model = load_model(args, config, checkpoint, devices)
    try:
        compute_logps = choose_logps(args, model)
    except ValueError as problem:
        sys.exit(f"error: --attn_implementation {args.attn_implementation}: {problem}")
    collate = choose_collator(args, model)
    if is_precomputed(args):
        for dataset in (rows.dataset, eval_dataset):
            if dataset is not None:
                prepare_reference(args, model, compute_logps, collate, dataset, devices[0])

    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    set_former_run_aside(output_dir, checkpoint)
    try:
        num_tokens = train(args, model, compute_logps, collate, tokenizer, rows, eval_dataset, checkpoint, devices)
        save_model(model, tokenizer, output_dir)
        shutil.rmtree(output_dir / ".writing", ignore_errors=True)
        write_receipt(args, rows, devices, num_tokens, time.perf_counter() - started)
    except Exception as problem:
        stop_if_disk_is_full(output_dir, problem)
        raise


if __name__ == "__main__":
    main()
