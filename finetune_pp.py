"""Full fine-tuning in a plain PyTorch loop, one process, the decoder layers spread over as many GPUs as they need.

Choose it to read, to debug step by step, or when the whole training state (16 bytes a parameter: float32 weights,
gradients and AdamW's two moments) fits the GPUs of one machine together: the layers lie in contiguous blocks, so one
GPU works at a time. On a machine without a GPU it runs on the CPU.

    python finetune_pp.py
    python finetune_pp.py --dataset_path data_sample/tokenized/instruct --num_train_epochs 3

Writes into --output_dir: the model in Hugging Face's format and the tokenizer, checkpoint-<step>/, trainer_state.json
(the loss curve), runs/ (TensorBoard) and last run.json (the receipt). SIGTERM or Ctrl-C saves a checkpoint and ends.
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
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
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

import data_collator
from data_collator import DataCollator, TokenizedDataset, TrainingRows

ATTENTION_KERNELS = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
PATHS = ("model_path", "dataset_path", "eval_dataset_path", "output_dir", "resume_from_checkpoint")
# What a run writes into --output_dir and others may have there, too.
OVERWRITTEN = ("README.md", "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
# Flags that a resumed run must share with the interrupted one, besides the rows and their order.
SHARED_BY_RESUMED = (
    "model_path", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
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
    output_dir: str = flag("outputs/finetune_pp", "folder for all that the run leaves")
    num_train_epochs: float = flag(1, "passes over the data", "> 0")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one forward", "> 0")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation", "> 0")
    gradient_accumulation_steps: int = flag(1, "forwards of one optimizer step", "> 0")
    learning_rate: float = flag(2e-5, "peak learning rate of AdamW", "> 0")
    lr_scheduler_type: SchedulerType = flag("cosine", "how the rate falls")
    lr_scheduler_kwargs: str = flag("{}", 'more of the schedule, as JSON: {"min_lr": 1e-6}')
    warmup_steps: float = flag(0.03, "steps of warm-up; below 1: a share of all steps", ">= 0")
    weight_decay: float = flag(0.0, "AdamW's, never on norms and biases", ">= 0")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "> 0")
    logging_steps: int = flag(1, "log every so many optimizer steps", "> 0")
    eval_steps: int = flag(100, "evaluate every so many steps, and at the end", "> 0")
    save_steps: int = flag(100, "checkpoint every so many steps, and at the end", "> 0")
    save_total_limit: int = flag(2, "checkpoints that are kept", "> 0")
    seed: int = flag(42, "of the row order and dropout", ">= 0")
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
    mistakes = check_numbers(args) + check_folders(args) + check_machine(args)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        mistakes.append("torchrun: this script is one process; finetune_pp_1f1b.py is a pipeline over several")
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
        attempt("model_path", check_quantization, config)
        attempt("attn_implementation", check_attention, config, args)
    passage_length = 0
    if args.random_passage:
        passage_length = args.passage_length
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage_length, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage_length)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
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


def check_quantization(path: str, config) -> None:
    """Quantised weights do not change in training: only an adapter on them does."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised, and full fine-tuning needs the 16- or 32-bit original; "
                         "finetune_pp_peft.py trains an adapter on them as they are")  # fmt: skip


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
        # Bytes of a weight: 4 in float32, 4 for its gradient, 8 for AdamW's two moments, 2 for a copy in bf16.
        num_bytes = 18 * make_skeleton(config).num_parameters()
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


def load_model(args: Arguments, config, checkpoint: Path | None, devices: list[torch.device]) -> torch.nn.Module:
    """The model in float32, whatever its files hold: in bf16 small steps would vanish."""
    device_map = {"": devices[0]}
    if len(devices) > 1:
        device_map = make_device_map(config, devices)
    kernel = args.attn_implementation
    if kernel == "auto":
        kernel = None  # transformers' choice
    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint or args.model_path,
        dtype=torch.float32,
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
    return model


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


def choose_loss(args: Arguments, model, rows: TrainingRows):
    """The function that computes a batch's summed loss; the model is asked, by a few tokens, what it allows.

    Raises:
        ValueError: documents of one row would see each other.
    """
    vocab_size = model.config.vocab_size
    if args.padding_free or rows.dataset.packed:
        data_collator.check_document_attention(model, vocab_size)
    output_layer = model.get_output_embeddings()
    is_product = type(output_layer) is torch.nn.Linear and output_layer.bias is None
    if args.padding_free and is_product and data_collator.computes_plain_logits(model, vocab_size, loss_in_chunks):
        return loss_in_chunks
    return loss_of_model


def loss_of_model(model, batch: dict) -> torch.Tensor:
    """The summed loss of a batch's targets, as transformers computes it: float32, from all their logits."""
    # With a cache, transformers would not notice that a row holds several documents.
    return model(**batch, num_items_in_batch=1, use_cache=False).loss


def loss_in_chunks(model, batch: dict) -> torch.Tensor:
    """The same for a padding-free batch, whose logits exist for some hundred targets at a time."""
    decoder_inputs = dict(batch)
    del decoder_inputs["labels"]
    targets = decoder_inputs.pop("shift_labels")[0]
    places_of_targets = decoder_inputs.pop("logits_to_keep")
    hidden_states = model.get_decoder()(**decoder_inputs, use_cache=False).last_hidden_state  # [1, tokens, size]
    # The output layer, as large as several others, sees no position without a target.
    predicting = hidden_states[0, places_of_targets.to(hidden_states.device)]
    weight = model.get_output_embeddings().weight
    return data_collator.summed_cross_entropy(predicting.to(weight.device), weight, targets)


def forward(args: Arguments, model, compute_loss, batch: dict, device: torch.device) -> torch.Tensor:
    """The summed loss of a batch's targets on the device, in the precision that was asked for."""
    batch = data_collator.move_to_device(batch, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(args)):
        return compute_loss(model, batch)


@torch.no_grad()
def evaluate(args: Arguments, model, compute_loss, dataset: TokenizedDataset, device: torch.device) -> float:
    """Loss per target token over the whole set."""
    model.eval()
    total = 0.0
    num_targets = 0
    collate = DataCollator(args.padding_free)
    for start in range(0, len(dataset), args.per_device_eval_batch_size):
        indices = range(start, min(start + args.per_device_eval_batch_size, len(dataset)))
        batch = collate([dataset[i] for i in indices])
        total += forward(args, model, compute_loss, batch, device).item()
        num_targets += data_collator.num_targets(batch)
    model.train()
    return total / num_targets


def train(args: Arguments, model, compute_loss, tokenizer, rows, eval_dataset, checkpoint, devices) -> int:
    """Trains from the checkpoint, if any, until the last step or a signal; returns the tokens that this took."""
    optimizer = make_optimizer(args, model)
    lr_scheduler = make_schedule(args, optimizer, rows.num_steps)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, optimizer, lr_scheduler, devices)
    step = state["global_step"]
    tokens_before = state["num_input_tokens_seen"]
    terminated = stop_at_signals()
    writer = None
    if args.report_to == "tensorboard":
        writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1)
    progress = tqdm(total=rows.num_steps, initial=step, desc="training", unit="step")
    steps_ahead = read_ahead(args, rows, step, devices[0])
    model.train()
    while step < rows.num_steps:
        started = time.perf_counter()
        micro_batches = next(steps_ahead)
        # One division by the targets of the whole optimizer step: every target token weighs the same, however the
        # step is cut into micro-batches.
        num_targets = sum(data_collator.num_targets(batch) for batch in micro_batches)
        losses = []
        for batch in micro_batches:
            micro_loss = forward(args, model, compute_loss, batch, devices[0]) / num_targets
            micro_loss.backward()
            losses.append(micro_loss.detach())
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
        speed = num_tokens / (time.perf_counter() - started)
        progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s, {peak_memory() / 2**30:.1f} GiB")
        progress.update()
        if eval_dataset and (step % args.eval_steps == 0 or step == rows.num_steps):
            log["eval_loss"] = evaluate(args, model, compute_loss, eval_dataset, devices[0])
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


def read_ahead(args: Arguments, rows: TrainingRows, first_step: int, device: torch.device):
    """Yields the micro-batches of each optimizer step. A thread makes them while the step before is computed."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = reader.submit(make_micro_batches, args, rows, first_step, device)
        for step in range(first_step, rows.num_steps):
            micro_batches = ahead.result()
            if step + 1 < rows.num_steps:
                ahead = reader.submit(make_micro_batches, args, rows, step + 1, device)
            yield micro_batches


def make_micro_batches(args: Arguments, rows: TrainingRows, step: int, device: torch.device) -> list[dict]:
    """The batches of one optimizer step, in memory from which a GPU copies while it computes."""
    collate = DataCollator(args.padding_free)
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
    """Writes model and tokenizer in Hugging Face's format; every tensor is read back, one at a time, and compared."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_others_read(folder)
    trained = model.state_dict()
    for name in model.all_tied_weights_keys:
        trained.pop(name, None)
    unsaved = revert_weight_conversion(model, trained)  # the names in the files: experts are fused in memory only
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                if name in unsaved and torch.equal(file.get_tensor(name), unsaved[name].cpu()):
                    del unsaved[name]
    if unsaved:
        raise OSError(f"{folder}: {', '.join(unsaved)} was not saved as it was trained")


def let_others_read(folder: Path) -> None:
    """safetensors makes files that only their owner can read; they get the rights of the others, as the umask says."""
    mode = next(folder.glob("*.json")).stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


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


def load_checkpoint(folder: Path, optimizer, lr_scheduler, devices) -> dict:
    """Puts optimizer, schedule and random numbers back; returns the state. The weights are loaded by then."""
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
        compute_loss = choose_loss(args, model, rows)
    except ValueError as problem:
        sys.exit(f"error: --attn_implementation {args.attn_implementation}: {problem}")

    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    set_former_run_aside(output_dir, checkpoint)
    try:
        num_tokens = train(args, model, compute_loss, tokenizer, rows, eval_dataset, checkpoint, devices)
        save_model(model, tokenizer, output_dir)
        shutil.rmtree(output_dir / ".writing", ignore_errors=True)
        write_receipt(args, rows, devices, num_tokens, time.perf_counter() - started)
    except Exception as problem:
        stop_if_disk_is_full(output_dir, problem)
        raise


if __name__ == "__main__":
    main()
