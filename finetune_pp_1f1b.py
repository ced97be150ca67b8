"""A true pipeline over processes: each rank owns a block of layers, and the micro-batches of a step flow through them.

Choose it where FSDP's traffic is too much, as between machines joined by ordinary Ethernet, or for a very large model:
one activation of each micro-batch crosses the border between two stages, and nothing else. A step is cut into
--gradient_accumulation_steps micro-batches of --per_device_train_batch_size rows. In the 1F1B schedule a stage
alternates between a forward and a backward, so it holds the activations of at most as many micro-batches as there are
stages; gpipe holds those of all. A stage waits for (stages - 1) / (micro-batches + stages - 1) of the time, the bubble:
choose several times as many micro-batches as stages.

    python finetune_pp_1f1b.py
    sh scripts/finetune_pp_1f1b.sh --lora_used True
    USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_1f1b.sh

Writes into --output_dir, which all machines must see: the model in Hugging Face's format, or the adapter in PEFT's, and
the tokenizer, checkpoint-<step>/ (a file for each stage), trainer_state.json (the loss curve), runs/ (TensorBoard) and
last run.json (the receipt). SIGTERM saves a checkpoint and ends.
"""

import argparse
import atexit
import contextlib
import copy
import fcntl
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
import traceback
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import peft
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
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

import data_collator
from data_collator import IGNORE_INDEX, DataCollator, TokenizedDataset, TrainingRows

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # nothing happens to their hidden states between two layers
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
ATTENTION_KERNELS = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
PATHS = ("model_path", "dataset_path", "eval_dataset_path", "output_dir", "resume_from_checkpoint")
# What a run writes into --output_dir and others may have there, too.
OVERWRITTEN = ("README.md", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
# Flags that a resumed run must share with the interrupted one, besides the rows and their order.
SHARED_BY_RESUMED = (
    "model_path", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
    "lora_used", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules",
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
    output_dir: str = flag("outputs/finetune_pp_1f1b", "folder for all that the run leaves")
    pipeline_schedule: Literal["1f1b", "gpipe"] = flag("1f1b", "order of the micro-batches' forwards and backwards")
    lora_used: bool = flag(False, "train a LoRA adapter; False: all weights")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices", "> 0")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank", "> 0")
    lora_dropout: float = flag(0.05, "dropout on an adapter's input", ">= 0")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    num_train_epochs: float = flag(1, "passes over the data", "> 0")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one micro-batch", "> 0")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation", "> 0")
    gradient_accumulation_steps: int = flag(1, "micro-batches of one optimizer step; several times the stages", "> 0")
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
    padding_free: bool = flag(True, "join the rows of a micro-batch instead of padding them")
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
    """Returns (config, tokenizer, rows in the order of training, evaluation set or None, checkpoint or None).

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    args.use_cpu = args.use_cpu or torch.cuda.device_count() == 0
    mistakes = check_numbers(args) + check_folders(args) + check_machine(args) + check_launcher()
    if args.learning_rate is None:
        args.learning_rate = 2e-5
        if args.lora_used:
            args.learning_rate = 1e-3
    num_stages = int(os.environ.get("WORLD_SIZE", 1))
    num_micro_batches = args.gradient_accumulation_steps
    if args.pipeline_schedule == "1f1b" and num_micro_batches < num_stages:
        mistakes.append(f"--gradient_accumulation_steps {num_micro_batches}: 1f1b needs a micro-batch for each of the "
                        f"{num_stages} stages; {4 * num_stages} of them keep the stages busy")  # fmt: skip

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
        attempt("model_path", check_quantization, config)
        attempt("attn_implementation", check_attention, config, args)
        attempt("model_path", check_layers, config, num_stages)
    passage_length = 0
    if args.random_passage:
        passage_length = args.passage_length
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage_length, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage_length)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.lora_used:
        attempt("lora_used", check_adapter, args, config)
    rows_per_step = args.per_device_train_batch_size * num_micro_batches
    rows = TrainingRows(dataset, rows_per_step, args.num_train_epochs, args.max_steps, args.seed)
    attempt("lr_scheduler_kwargs", json.loads)
    attempt("lr_scheduler_type", check_schedule, args, rows.num_steps)
    if not mistakes:
        attempt("warmup_steps", check_rates, args, rows)
    checkpoint = attempt("resume_from_checkpoint", find_checkpoint, args.output_dir, resume_settings(args, rows))
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


def check_launcher() -> list[str]:
    """torchrun sets all of these; with a part of them, some rows would go to processes that do not exist."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    for name in ("RANK", "WORLD_SIZE"):
        if name in os.environ and missing:
            return [f"{name} is set and {', '.join(missing)} not: start the script by torchrun, or unset {name}"]
    return []


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


def check_layers(path: str, config, num_stages: int) -> None:
    """The model is of a known kind, and each stage has a layer."""
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"stages are made of the layers of {', '.join(MODEL_TYPES)}, and this is {config.model_type}; "
                         "choose another script")  # fmt: skip
    if config.num_hidden_layers < num_stages:
        raise ValueError(f"{config.num_hidden_layers} layers cannot be {num_stages} stages; start fewer processes")


def check_adapter(lora_used: bool, args: Arguments, config) -> None:
    """A rehearsal without weights: every stage must have something to train."""
    adapted = add_adapter(args, make_skeleton(config)).base_model.targeted_module_names
    for name in args.lora_target_modules.split(","):
        name = name.strip()
        if name == "all-linear":
            name = "q_proj"  # one of all
        if sum(f".{path}".endswith(f".{name}") for path in adapted) < config.num_hidden_layers:
            raise ValueError(f"--lora_target_modules {name} is no part of every layer of the model")


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


def check_quantization(path: str, config) -> None:
    """A stage reads its layers by itself, in 16 or 32 bit."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised, and a stage reads them in 16 or 32 bit only; name the original, "
                         "or train an adapter with finetune_pp_peft.py")  # fmt: skip


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
# The strategy: which layers a rank owns
# -------------------------------------------------------------------------------------------------------------------


def add_adapter(args: Arguments, model: torch.nn.Module) -> peft.PeftModel:
    """Freezes `model` and puts a new LoRA adapter on it (arXiv:2106.09685)."""
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
    return peft.get_peft_model(model, config)


def place_on_stages(num_layers: int, num_stages: int, head_cost: float) -> list[range]:
    """The layers of each stage: contiguous blocks, such that the slowest stage is as fast as possible.

    Args:
        head_cost: work of the last stage's head, in layers.
    """
    if num_stages == 1:
        return [range(num_layers)]

    def slowest(num_last: int) -> float:
        """The work of the slowest stage, in layers, when the last stage has so many layers beside the head."""
        return max(math.ceil((num_layers - num_last) / (num_stages - 1)), num_last + head_cost)

    num_last = min(range(1, num_layers - num_stages + 2), key=slowest)
    # The larger blocks are the later ones: the first stage has the embedding and the most micro-batches in flight.
    borders = [(num_layers - num_last) * i // (num_stages - 1) for i in range(num_stages)] + [num_layers]
    return [range(borders[i], borders[i + 1]) for i in range(num_stages)]


class AbsentLayer(torch.nn.Module):
    """Stands for a layer that another rank owns, so that every layer keeps its number and its name."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return hidden_states


class Stage:
    """This rank's block, put before a model's own class: its layers, the embedding first, norm and head last.

    A head that is tied to the embedding is a copy on the last stage: both start equal and get the same gradient, the
    sum of what either saw, so they stay equal.
    """

    def __init__(self, config, layers: range, bf16: bool):
        super().__init__(config)
        self.bf16 = bf16
        self.rank = dist.get_rank()
        self.num_stages = dist.get_world_size()
        self.is_first = self.rank == 0
        self.is_last = self.rank == self.num_stages - 1
        # What the files hold for other stages; whatever else is not expected is reported. The name is transformers'.
        others = set()
        for i in range(config.num_hidden_layers):
            if i not in layers:
                self.model.layers[i] = AbsentLayer()
                others.add(rf"^model\.layers\.{i}\.")
        if not self.is_first:
            self.model.embed_tokens = AbsentLayer()
            others.add(r"^model\.embed_tokens\.")
        if not self.is_last:
            self.model.norm = AbsentLayer()
            self.lm_head = AbsentLayer()
            others.update([r"^model\.norm\.", r"^lm_head\."])
        self._keys_to_ignore_on_load_unexpected = others

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, **context) -> torch.Tensor:
        """One micro-batch.

        Args:
            inputs: token ids [rows, length] on the first stage, elsewhere hidden states [rows, length, hidden size].
            labels: [rows, length], used by the last stage.
            context: `attention_mask` or `position_ids` [rows, length], and the borders of documents.

        Returns:
            The hidden states for the next stage, or on the last one the summed loss of the targets.
        """
        input_name = "inputs_embeds"
        if self.is_first:
            input_name = "input_ids"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            # With a cache, transformers would not notice that a row holds several documents.
            hidden = self.model(**{input_name: inputs}, **context, use_cache=False).last_hidden_state
            if not self.is_last:
                return hidden
            has_target = labels[:, 1:] != IGNORE_INDEX  # the head, as large as several layers, sees no other position
            logits = self.lm_head(hidden[:, :-1][has_target]).float()
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:][has_target], reduction="sum")


@dataclass
class StageWeights:
    """What this rank trains."""

    trained: dict[str, torch.nn.Parameter]  # by their names in the whole model
    owned: dict[str, torch.nn.Parameter]  # the same without the copy that a tied head is
    ends: dist.ProcessGroup | None  # the first and the last stage, which sum the gradients of a tied embedding


def balance_layers(args: Arguments, config, rows: TrainingRows) -> range:
    """The layers of this rank. A product costs what its matrix holds; the head sees only positions with a target."""
    skeleton = make_skeleton(config)
    head_size = sum(parameter.numel() for parameter in skeleton.lm_head.parameters())
    layer_size = sum(parameter.numel() for parameter in skeleton.model.layers[0].parameters())
    labels = make_batch(args, rows.step(0), args.per_device_train_batch_size)["labels"]
    target_share = (labels != IGNORE_INDEX).float().mean().item()
    head_cost = target_share * head_size / layer_size
    return place_on_stages(config.num_hidden_layers, dist.get_world_size(), head_cost)[dist.get_rank()]


def load_stage(args: Arguments, config, rows: TrainingRows, device: torch.device):
    """Returns (stage, its StageWeights, the model that is saved); a rank reads no other weights than its own."""
    rank = dist.get_rank()
    num_stages = dist.get_world_size()
    skeleton = make_skeleton(config)
    layers = balance_layers(args, config, rows)
    dtype = torch.float32  # of what is trained: in bf16 small steps would vanish
    if args.lora_used and computes_in_bf16(args):
        dtype = torch.bfloat16
    kernel = args.attn_implementation
    if kernel == "auto":
        kernel = None  # transformers' choice
    is_tied = config.tie_word_embeddings and num_stages > 1
    key_mapping = None
    if is_tied:
        config.tie_word_embeddings = False  # on this rank: transformers would look for the other end
        if rank == num_stages - 1:
            key_mapping = {"model.embed_tokens": "lm_head"}
    stage_class = type(type(skeleton).__name__, (Stage, type(skeleton)), {})
    stage, loading = stage_class.from_pretrained(
        args.model_path,
        layers,
        computes_in_bf16(args),
        config=config,
        dtype=dtype,
        attn_implementation=kernel,
        key_mapping=key_mapping,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # check_loading says it
        output_loading_info=True,
    )
    check_loading(args, loading)
    # On H100 and later GPUs PyTorch would prefer cuDNN, which builds a plan of half a second for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if args.attn_implementation == "auto" and args.padding_free:
        data_collator.attend_inside_documents(stage, args.torch_compile)
    if args.gradient_checkpointing:
        stage.activation_checkpointing_enable({"use_reentrant": False})
    if args.torch_compile:
        compile_layers(stage)
    model = stage
    saved_model = stage
    if args.lora_used:
        for turn in range(num_stages):  # each goes on with the random numbers where the one before stopped
            if turn == rank:
                model = add_adapter(args, stage)
            random_state = torch.get_rng_state()
            dist.broadcast(random_state, turn)
            torch.set_rng_state(random_state)
        # PEFT saves nothing but what a model has: the one with all layers, without weights, stands for all stages.
        saved_model = add_adapter(args, skeleton)
    torch.manual_seed(args.seed + rank)  # every stage draws its own dropout
    stage.to(device)
    return stage, find_weights(args, model, is_tied), saved_model


def find_weights(args: Arguments, model: torch.nn.Module, is_tied: bool) -> StageWeights:
    trained = {}
    owned = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if is_tied and name == HEAD:
            trained[EMBEDDING] = weight  # the copy
        else:
            trained[name] = weight
            owned[name] = weight
    ends = None
    if is_tied and not args.lora_used:
        ends = dist.new_group([0, dist.get_world_size() - 1])
    return StageWeights(trained, owned, ends)


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


def make_batch(args: Arguments, rows: list[dict], micro_batch_size: int) -> dict:
    """The micro-batches of a step one below the other: stages want them all in one shape.

    Returns:
        `input_ids`, `labels` and `attention_mask` or `position_ids` [rows, length]; padding-free, a micro-batch is one
        row, and the borders of its documents are `cu_seq_lens_q`, `cu_seq_lens_k` [micro-batches, documents + 1], with
        `max_length_q` and `max_length_k` for all of them.
    """
    if not args.padding_free:
        return DataCollator(padding_free=False)(rows)
    joined = []
    starts = []
    for first in range(0, len(rows), micro_batch_size):
        batch = DataCollator(padding_free=True)(rows[first : first + micro_batch_size])
        joined.append({name: batch[name][0] for name in ("input_ids", "labels", "position_ids")})
        starts.append(batch["cu_seq_lens_q"])
    batch = DataCollator(padding_free=False)(joined)  # the padding of a row is one more document
    length = batch["input_ids"].shape[1]
    borders = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True, padding_value=length)
    borders = torch.nn.functional.pad(borders, (0, 1), value=length)
    batch["cu_seq_lens_q"] = borders
    batch["cu_seq_lens_k"] = borders
    batch["max_length_q"] = int(borders.diff().max())
    batch["max_length_k"] = batch["max_length_q"]
    return batch


def run_pipeline(args: Arguments, stage: Stage, batch: dict, num_targets: int) -> float:
    """Forward, and where gradients are enabled backward, of all micro-batches.

    The schedule is new in every step and told the shapes: one that infers them takes another length for an error.

    Returns:
        On the last stage the summed loss of all targets, divided by `num_targets`; elsewhere 0.
    """
    batch = data_collator.move_to_device(batch, stage.device)
    input_ids = batch.pop("input_ids")
    ids = input_ids.chunk(args.gradient_accumulation_steps)[0]
    hidden = torch.empty(*ids.shape, stage.config.hidden_size, dtype=stage.dtype, requires_grad=True, device="meta")
    loss = torch.empty((), requires_grad=True, device="meta")
    input_shape = hidden
    inputs = []  # the other stages get theirs from the one before
    if stage.is_first:
        input_shape = ids
        inputs = [input_ids]
    output_shape = hidden
    if stage.is_last:
        output_shape = loss
    part = PipelineStage(stage, stage.rank, stage.num_stages, stage.device, input_shape, output_shape)
    schedule_class = Schedule1F1B
    if args.pipeline_schedule == "gpipe":
        schedule_class = ScheduleGPipe
    # The loss is divided once by the targets of the whole step, and not again by the number of micro-batches.
    schedule = schedule_class(
        part, args.gradient_accumulation_steps, lambda loss, labels: loss / num_targets, scale_grads=False
    )
    losses = []
    run = schedule.eval
    if torch.is_grad_enabled():
        run = schedule.step
    run(*inputs, **batch, target=batch["labels"], losses=losses, return_outputs=False)
    return sum(loss.item() for loss in losses)


@torch.no_grad()
def evaluate(args: Arguments, stage: Stage, dataset: TokenizedDataset) -> float:
    """Loss per target token over the whole set."""
    stage.eval()
    total = torch.zeros(2, dtype=torch.float64)
    micro_batch_size = args.per_device_eval_batch_size
    num_rows = micro_batch_size * args.gradient_accumulation_steps
    for start in range(0, len(dataset), num_rows):
        rows = [dataset[i] for i in range(start, min(start + num_rows, len(dataset)))]
        while len(rows) < num_rows:
            rows.append(data_collator.filler_row(dataset.packed))
        batch = make_batch(args, rows, micro_batch_size)
        loss = run_pipeline(args, stage, batch, 1)
        total += torch.tensor([loss, data_collator.num_targets(batch)])
    stage.train()
    loss = total[:1].to(stage.device)
    dist.all_reduce(loss)  # the last stage knows it
    return loss.item() / total[1].item()


def train(args: Arguments, stage: Stage, weights: StageWeights, rows, eval_dataset, checkpoint):
    """Trains from the checkpoint, if any, until the last step or SIGTERM; returns (state, last checkpoint)."""
    optimizer = make_optimizer(args, stage)
    lr_scheduler = make_schedule(args, optimizer, rows.num_steps)
    state = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, stage, weights, optimizer, lr_scheduler)
    step = state["global_step"]
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())  # by which a cluster preempts a job
    writer = None
    if stage.is_first and args.report_to == "tensorboard":
        writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1)
    progress = tqdm(total=rows.num_steps, initial=step, desc="training", unit="step", disable=not stage.is_first)
    is_stopped = False
    stage.train()
    while step < rows.num_steps and not is_stopped:
        batch = make_batch(args, rows.step(step), args.per_device_train_batch_size)
        loss = run_pipeline(args, stage, batch, data_collator.num_targets(batch))
        if weights.ends and EMBEDDING in weights.trained:
            dist.all_reduce(weights.trained[EMBEDDING].grad, group=weights.ends)
        own_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights.owned.values()]).item()
        # The last stage knows the loss, each its own gradients, and a signal may reach them in different steps.
        totals = torch.tensor([loss, own_norm**2, terminated.is_set()], dtype=torch.float64, device=stage.device)
        dist.all_reduce(totals)
        loss = totals[0].item()
        grad_norm = math.sqrt(totals[1].item())
        is_stopped = totals[2].item() > 0
        if not math.isfinite(loss + grad_norm):
            stop(f"error: step {step + 1} has loss {loss} and gradient norm {grad_norm}; the weights were not updated, "
                 "and checkpoints saved before are good; lower --learning_rate")  # fmt: skip
        torch.nn.utils.clip_grads_with_norm_(stage.parameters(), args.max_grad_norm, torch.tensor(grad_norm))
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

        state["num_input_tokens_seen"] += rows.num_tokens(step)
        step += 1
        state["global_step"] = step
        is_last = step == rows.num_steps or is_stopped
        log = {
            "step": step,
            "epoch": step / rows.steps_per_epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_input_tokens_seen": state["num_input_tokens_seen"],
        }
        progress.set_postfix_str(f"loss {loss:.4f}")
        progress.update()
        if eval_dataset and (step % args.eval_steps == 0 or step == rows.num_steps):
            log["eval_loss"] = evaluate(args, stage, eval_dataset)
            progress.write(f"step {step}: eval_loss {log['eval_loss']:.4f}")
        if step % args.logging_steps == 0 or is_last or "eval_loss" in log:
            state["log_history"].append(log)
            write_curve(writer, log)
        if step % args.save_steps == 0 or is_last:
            checkpoint = save_checkpoint(args, stage, weights, optimizer, rows, state)
    if writer:
        writer.close()
    return state, checkpoint


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


def save_checkpoint(args: Arguments, stage: Stage, weights: StageWeights, optimizer, rows, state: dict) -> Path:
    """Every rank writes what is trained on its stage, and reads it back."""
    folder = Path(args.output_dir) / ".writing" / f"checkpoint-{state['global_step']}"
    if stage.is_first:
        start_checkpoint(args, state["global_step"])
    dist.barrier()
    parts = {f"random.{stage.rank}": torch.get_rng_state()}
    if stage.device.type == "cuda":
        parts = {f"random.{stage.rank}": torch.cuda.get_rng_state()}
    for name, weight in weights.owned.items():
        parts[f"weight.{name}"] = weight.detach().cpu().contiguous()
        for key, value in optimizer.state[weight].items():
            parts[f"{key}.{name}"] = value.cpu().contiguous()
    path = folder / f"stage-{stage.rank + 1:05}-of-{stage.num_stages:05}.safetensors"
    save_file(parts, path)
    check_saved([path], parts)
    dist.barrier()
    if stage.is_first:
        assert len(list(folder.glob("stage-*"))) == stage.num_stages, "all machines must see the same --output_dir"
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
        let_others_read(folder)
        publish_checkpoint(args, folder, resume_settings(args, rows))
    dist.barrier()  # no process leaves before it is in its place
    return Path(args.output_dir) / folder.name


def check_saved(paths: list[Path], trained: dict[str, torch.Tensor]) -> None:
    """Reads back every tensor of the safetensors files, one at a time, and compares it with `trained`.

    Raises:
        OSError: a tensor is missing or differs.
    """
    unsaved = dict(trained)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name in unsaved and torch.equal(file.get_tensor(name), unsaved[name]):
                    del unsaved[name]
    if unsaved:
        raise OSError(f"{paths[0].parent}: {', '.join(unsaved)} was not saved as it was trained")


def save_model(args: Arguments, model, tokenizer, checkpoint: Path, folder: Path) -> None:
    """Joins the stages' files in Hugging Face's or PEFT's format; every tensor is read back and compared."""
    trained = {}
    for name, tensor in read_stages(checkpoint).items():
        if name.startswith("weight."):
            trained[name.removeprefix("weight.")] = tensor
    model.config.tie_word_embeddings = HEAD not in trained
    model.save_pretrained(folder, state_dict=dict(trained), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    shutil.copy(checkpoint / "trainer_state.json", folder)
    if args.lora_used:
        save_file(trained, folder / "trainable.safetensors")
        for name in list(trained):
            trained[name.replace(".default.", ".")] = trained[name]  # PEFT's name
    let_others_read(folder)
    check_saved(list(folder.glob("*.safetensors")), trained)


def let_others_read(folder: Path) -> None:
    """safetensors makes files that only their owner can read; they get the rights of the others, as the umask says."""
    mode = next(folder.glob("*.json")).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def read_stages(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of all stages by name, as views of the files: only what is used is read."""
    parts = {}
    for path in checkpoint.glob("stage-*"):
        parts.update(load_file(path))
    return parts


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
        if dist.get_rank() > 0:
            time.sleep(5)  # the first rank mostly sees it, too, and one message is enough
        print(f"error: {output_dir} could not be written: its disk is full ({disk.free / 1e6:,.1f} MB of "
              f"{disk.total / 1e9:,.1f} GB are free); make room, and --resume_from_checkpoint True goes on from "
              "the newest whole checkpoint, or begins anew", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # as in leave


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


def load_checkpoint(checkpoint: Path, stage: Stage, weights: StageWeights, optimizer, lr_scheduler) -> dict:
    """Puts weights, optimizer, schedule and random numbers back; returns the state.

    A run may go on with another number of stages; only its dropout is then another.
    """
    parts = read_stages(checkpoint)
    for name, weight in weights.trained.items():
        weight.data.copy_(parts[f"weight.{name}"])
        optimizer.state[weight] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            optimizer.state[weight][key] = parts[f"{key}.{name}"].to(weight.device, copy=True)
    if len(list(checkpoint.glob("stage-*"))) == stage.num_stages:
        random_state = parts[f"random.{stage.rank}"]
        if stage.device.type == "cuda":
            torch.cuda.set_rng_state(random_state)
        else:
            torch.set_rng_state(random_state)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    lr_scheduler.last_epoch = state["global_step"]
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(state["global_step"])
    return state


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
# Processes, which end together
# -------------------------------------------------------------------------------------------------------------------


def join_processes() -> None:
    """Without torchrun, a world of one process."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)


def watch_neighbour(group: dist.ProcessGroup, done: threading.Event) -> None:
    """Ends this process when the next rank has died: in a ring, so that all end, whatever they wait for."""
    rank = dist.get_rank()
    neighbour = (rank + 1) % dist.get_world_size()
    try:
        dist.recv(torch.zeros(1), neighbour, group)  # nothing is ever sent; it fails when the connection ends
    except RuntimeError:
        if not done.is_set():
            os.write(2, f"\nerror: rank {rank} ends because rank {neighbour} has ended\n".encode())
            os._exit(1)


def end_at_an_error(kind, error, trace) -> None:
    """A neighbour's death may be the reason of an error, and then its watch ends this process with a message."""
    if kind is not SystemExit:
        time.sleep(5)
    traceback.print_exception(kind, error, trace)
    os._exit(1)


def join_stages(args: Arguments) -> tuple[torch.device, threading.Event]:
    """Returns (this rank's device, an event that says that its neighbours may leave)."""
    join_processes()
    device = torch.device("cpu")
    backend = "gloo"
    if not args.use_cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # others wait while one writes a large checkpoint
    done = threading.Event()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    if dist.get_world_size() > 1:
        threading.Thread(target=watch_neighbour, args=(group, done), daemon=True).start()
    sys.excepthook = end_at_an_error
    return device, done


def stop(message: str) -> None:
    """Ends all processes with one message."""
    if dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
    dist.barrier()
    os._exit(1)  # as in leave


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
        config, tokenizer, rows, eval_dataset, checkpoint = check_arguments(args)
        if is_finished(checkpoint, args.output_dir, rows.num_steps):
            print(f"{args.output_dir}: all {rows.num_steps} steps are trained and saved; nothing to do")
            sys.exit()
        if is_first:
            lock = claim_folder(Path(args.output_dir), checkpoint)
    except (ValueError, OSError, argparse.ArgumentError) as mistakes:
        if not is_first:
            sys.exit(1)
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    device, done = join_stages(args)
    set_seed(args.seed)
    stage, weights, model = load_stage(args, config, rows, device)
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    if is_first:
        set_former_run_aside(output_dir, checkpoint)
    tokens_before = 0
    if checkpoint:
        tokens_before = json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"]
    try:
        state, checkpoint = train(args, stage, weights, rows, eval_dataset, checkpoint)
        step = state["global_step"]
        if step < rows.num_steps:
            done.set()
            stop(f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there")
        if is_first:
            save_model(args, model, tokenizer, checkpoint, output_dir)
            shutil.rmtree(output_dir / ".writing", ignore_errors=True)
        num_tokens = state["num_input_tokens_seen"] - tokens_before
        write_receipt(args, rows, device, num_tokens, time.perf_counter() - started)
    except Exception as problem:
        stop_if_disk_is_full(output_dir, problem)
        raise
    if is_first:
        free_folder(lock)
    done.set()


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
