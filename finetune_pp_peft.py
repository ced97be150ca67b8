"""Fine-tunes an adapter (lora, prefix, ptuning or prompt) in a plain PyTorch loop, one process, layers over all GPUs.

Choose it to read, to debug step by step, or when a frozen model fits the GPUs of one machine: the decoder layers lie in
contiguous blocks on the visible devices, so one GPU works at a time. On a machine without a GPU it runs on the CPU.

    python finetune_pp_peft.py
    python finetune_pp_peft.py --peft_mode prefix --num_virtual_tokens 16 --dataset_path data_sample/tokenized/instruct

Writes into --output_dir: the adapter in PEFT's format and the tokenizer, checkpoint-<step>/ (valid only with
complete.json), trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_scheduler, set_seed

from data_collator import DataCollator, RowSampler, TokenizedDataset, check_document_attention, num_targets

PEFT_TYPES = {"lora": "LORA", "prefix": "PREFIX_TUNING", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING"}
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
CHECKPOINTED_PREFIX = (
    "PEFT refuses it for prefix, which lives in the cache that checkpointing turns off; set it to False"
)


def flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    model_path: str = flag("models/SmolLM2-135M-Instruct", "folder or hub id of a decoder-only model")
    dataset_path: str = flag("data_sample/tokenized/triage_train", "folder that tokenize_dataset.py wrote")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    output_dir: str = flag("outputs/finetune_pp_peft", "folder for all that the run leaves")
    peft_mode: str = flag("lora", "lora | prefix | ptuning | prompt")
    peft_path: str | None = flag(None, "go on from this adapter with new data")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = flag(0.05, "dropout on an adapter's input")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    num_virtual_tokens: int = flag(32, "length of the learned prompt or prefix")
    mapping_hidden_dim: int = flag(1024, "ptuning's MLP; prefix projection, 0 for none; not for prompt")
    num_train_epochs: float = flag(1, "passes over the data")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one forward")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation")
    gradient_accumulation_steps: int = flag(1, "forwards of one optimizer step")
    learning_rate: float = flag(1e-3, "peak learning rate of AdamW")
    lr_scheduler_type: str = flag("cosine", " | ".join(SCHEDULES))
    warmup_steps: float = flag(0.03, "steps of warm-up; below 1: a share of all steps")
    weight_decay: float = flag(0.0, "AdamW's, never on norms and biases")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    logging_steps: int = flag(1, "log every so many optimizer steps")
    eval_steps: int = flag(100, "evaluate every so many steps, and at the end")
    save_steps: int = flag(100, "checkpoint every so many steps, and at the end")
    save_total_limit: int = flag(2, "complete checkpoints that are kept")
    seed: int = flag(42, "of the adapter's start, the row order and dropout")
    bf16: str = flag("auto", "auto: compute in bf16 where the hardware is fast at it | True | False")
    padding_free: bool = flag(True, "join the rows of a batch instead of padding them")
    gradient_checkpointing: bool = flag(False, "recompute activations: a third more work, much less memory")
    attn_implementation: str = flag("auto", "auto | sdpa | eager | flash_attention_2")
    torch_compile: bool = flag(False, "compile the model: minutes at first, then faster steps")
    resume_from_checkpoint: str = flag("False", "True: the newest complete one in output_dir; or a checkpoint folder")
    use_cpu: bool = flag(False, "leave the GPUs alone")
    report_to: str = flag("tensorboard", "tensorboard | none")


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before weights are loaded or anything is written
# -------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> tuple[Arguments, list[str]]:
    """The arguments, and a message for each word that is no flag."""
    parser = HfArgumentParser(Arguments, description=__doc__, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    args, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    return args, [f"{word}: unknown flag; --help lists them all" for word in unknown if word.startswith("-")]


def check_arguments(args: Arguments, mistakes: list[str]):
    """Returns (config, tokenizer, training set, evaluation set or None, checkpoint to resume from or None).

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    at_least_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    at_least_1 += ("logging_steps", "eval_steps", "save_steps", "save_total_limit", "lora_rank", "num_virtual_tokens")
    above_0 = ("learning_rate", "max_grad_norm", "num_train_epochs", "lora_alpha")
    mode, no_mlp = args.peft_mode, args.mapping_hidden_dim == 0
    rules = [
        *[(getattr(args, name) >= 1, name, "must be at least 1") for name in at_least_1],
        *[(getattr(args, name) > 0, name, "must be above 0") for name in above_0],
        *[(getattr(args, name) >= 0, name, "must be 0 or above") for name in ("warmup_steps", "weight_decay")],
        (0 <= args.lora_dropout < 1, "lora_dropout", "must be at least 0 and below 1"),
        (mode in PEFT_TYPES, "peft_mode", f"choose from {', '.join(PEFT_TYPES)}"),
        (mode != "prompt" or args.mapping_hidden_dim == 1024, "mapping_hidden_dim", "prompt has no MLP; use ptuning"),
        (mode != "ptuning" or not no_mlp, "mapping_hidden_dim", "ptuning needs its MLP; use prompt"),
        (mode != "prefix" or not args.gradient_checkpointing, "gradient_checkpointing", CHECKPOINTED_PREFIX),
        (args.lr_scheduler_type in SCHEDULES, "lr_scheduler_type", f"choose from {', '.join(SCHEDULES)}"),
        (args.attn_implementation in ATTENTIONS, "attn_implementation", f"choose from {', '.join(ATTENTIONS)}"),
        (args.bf16 in ("auto", "True", "False"), "bf16", "choose from auto, True, False"),
        (args.report_to in ("tensorboard", "none"), "report_to", "choose from tensorboard, none"),
    ]
    mistakes += [f"--{name} {getattr(args, name)}: {remedy}" for is_fine, name, remedy in rules if not is_fine]

    def attempt(name: str, action, *inputs):
        try:
            return action(*inputs)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--{name} {getattr(args, name)}: {problem}")

    attempt("output_dir", check_writable, Path(args.output_dir))
    config, tokenizer = attempt("model_path", load_config, args.model_path) or (None, None)
    dataset = attempt("dataset_path", TokenizedDataset, args.dataset_path, config, tokenizer)
    eval_dataset = args.eval_dataset_path and attempt(
        "eval_dataset_path", TokenizedDataset, args.eval_dataset_path, config, tokenizer
    )
    if mode != "lora" and any(data and data.packed for data in (dataset, eval_dataset)):
        mistakes.append(f"--peft_mode {mode}: its virtual tokens stand before a row; use data without --packing True")
    if config and mode == "lora":
        attempt("lora_target_modules", split_target_modules, args.lora_target_modules, config)
    if args.peft_path:
        attempt("peft_path", check_adapter, args)
    checkpoint = dataset and attempt("resume_from_checkpoint", find_checkpoint, args, dataset)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if mode != "lora" and args.padding_free:
        print(f"--padding_free False: --peft_mode {mode} puts its virtual tokens before each row of a batch")
        args.padding_free = False
    return config, tokenizer, dataset, eval_dataset, checkpoint


def check_writable(folder: Path) -> None:
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise ValueError(f"cannot write into {folder} ({problem.strerror}); choose another folder") from None


def load_config(path: str):
    if not Path(path).is_dir() and path.startswith((".", "/", "~", "models/", "outputs/")):
        raise FileNotFoundError("no such folder; bash scripts/quickstart.sh fetches the sample model")
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError("no .safetensors file in it; name the folder of a whole model")
    return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def split_target_modules(names: str, config) -> str | list[str]:
    """`all-linear`, or a list of names; ValueError if one of them is no linear layer of the model."""
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config).named_modules()
    linear = {path.split(".")[-1] for path, module in modules if isinstance(module, torch.nn.Linear)}
    targets = [name.strip() for name in names.split(",")]
    if unmatched := [name for name in targets if name not in linear | {"all-linear"}]:
        raise ValueError(f"no linear layer is called {', '.join(unmatched)}; there are {', '.join(sorted(linear))}")
    return "all-linear" if "all-linear" in targets else targets


def check_adapter(args: Arguments) -> None:
    if not (Path(args.peft_path) / "adapter_config.json").is_file():
        raise FileNotFoundError("no adapter_config.json in it; name the folder of an adapter")
    peft_type = peft.PeftConfig.from_pretrained(args.peft_path).peft_type
    if peft_type != PEFT_TYPES.get(args.peft_mode):
        raise ValueError(f"its adapter is {peft_type.value}, not --peft_mode {args.peft_mode}")
    if args.peft_mode in ("prefix", "ptuning") and not (Path(args.peft_path) / "trainable.safetensors").is_file():
        raise ValueError("training cannot go on from it, since PEFT's file lacks the MLP; name a checkpoint-<step>")


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


def make_device_map(config, devices: list[torch.device]) -> dict[str, torch.device]:
    """The device of each module, by the model's own names: layers in blocks, the rest with the nearest layer."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    is_layer = {name: type(module).__name__ in skeleton._no_split_modules for name, module in skeleton.named_modules()}
    layers = [name for name in is_layer if is_layer[name]]
    blocks = zip(devices, place_layers(len(layers), len(devices)), strict=True)
    device_map = dict(zip(layers, [device for device, size in blocks for _ in range(size)], strict=True))
    last = device_map[layers[-1]]
    for name, module in skeleton.named_modules():
        if not name.startswith(tuple(layers)) and not any(module.children()) and any(module.parameters()):
            is_head = module is skeleton.get_output_embeddings()
            is_first = module is skeleton.get_input_embeddings() or (is_head and config.tie_word_embeddings)
            device_map[name] = devices[0] if is_first else last
        elif "rotary" in name:  # no weights, but every layer reads its tables
            device_map[name] = devices[0]
    return device_map


def use_bf16(choice: str, device: torch.device) -> bool:
    """bf16 where the hardware multiplies it fast; elsewhere it is tens of times slower than float32."""
    if choice != "auto":
        return choice == "True"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_model(args: Arguments, config, devices: list[torch.device], bf16: bool) -> peft.PeftModel:
    """The frozen base in the compute precision, with a float32 adapter to be trained."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device_map=make_device_map(config, devices) if len(devices) > 1 else {"": devices[0]},
        attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
        use_safetensors=True,
    )
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": args.model_path}
    virtual = common | {"num_virtual_tokens": args.num_virtual_tokens}
    size = args.mapping_hidden_dim or None
    if args.peft_path:
        model = peft.PeftModel.from_pretrained(model, args.peft_path, is_trainable=True)
        if (Path(args.peft_path) / "trainable.safetensors").is_file():
            load_trainable(model, Path(args.peft_path))
    elif args.peft_mode == "lora":
        lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
        targets = split_target_modules(args.lora_target_modules, config)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **lora, **common))
    elif args.peft_mode == "prefix":
        prefix = peft.PrefixTuningConfig(prefix_projection=size is not None, encoder_hidden_size=size, **virtual)
        model = peft.get_peft_model(model, prefix)
    elif args.peft_mode == "ptuning":
        model = peft.get_peft_model(model, peft.PromptEncoderConfig(encoder_hidden_size=size, **virtual))
    else:
        model = peft.get_peft_model(model, peft.PromptTuningConfig(**virtual))
    for parameter in model.parameters():
        if parameter.requires_grad:  # a small step would vanish in a bf16 weight
            parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.torch_compile:
        model.compile()
    return model


def load_trainable(model: peft.PeftModel, folder: Path) -> None:
    """Loads all that is trained: PEFT's own file lacks ptuning's MLP and a projected prefix."""
    keys = model.load_state_dict(load_file(folder / "trainable.safetensors"), strict=False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not keys.unexpected_keys and trainable.isdisjoint(keys.missing_keys), "it belongs to another adapter"


# -------------------------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------------------------


def make_optimizer(args: Arguments, model: torch.nn.Module, num_steps: int):
    """AdamW in one fused kernel; warm-up, then the schedule. Vectors (norms and biases) are never decayed."""
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2]["params"].append(parameter)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate, fused=True)
    warmup_steps = math.ceil(args.warmup_steps * (num_steps if args.warmup_steps < 1 else 1))
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps)


def forward(model, batch: dict[str, torch.Tensor], device: torch.device, bf16: bool, num_items: int) -> torch.Tensor:
    """The summed loss of a batch's targets, divided by `num_items`."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        # With a cache, transformers would not notice that a row holds several documents.
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return model(**batch, num_items_in_batch=num_items, use_cache=False).loss


@torch.no_grad()
def evaluate(args: Arguments, model, dataset: TokenizedDataset, device: torch.device, bf16: bool) -> float:
    """Loss per target token over the whole set."""
    model.eval()
    collate, size = DataCollator(args.padding_free), args.per_device_eval_batch_size
    total, targets = 0.0, 0
    for start in tqdm(range(0, len(dataset), size), desc="evaluating", leave=False):
        batch = collate([dataset[i] for i in range(start, min(start + size, len(dataset)))])
        total += forward(model, batch, device, bf16, 1).item()
        targets += num_targets(batch)
    model.train()
    return total / targets


def train(args: Arguments, model, tokenizer, dataset, eval_dataset, checkpoint, device, bf16) -> dict:
    """Trains until the last step; returns the state, which every checkpoint holds as trainer_state.json."""
    collate, size = DataCollator(args.padding_free), args.per_device_train_batch_size
    sampler = RowSampler(len(dataset), size * args.gradient_accumulation_steps, args.seed)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * sampler.steps_per_epoch)
    optimizer, lr_scheduler = make_optimizer(args, model, num_steps)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizer, lr_scheduler)
    state |= {"max_steps": num_steps, "arguments": asdict(args), "dataset_sha256": dataset.ledger.get("sha256")}
    step = state["global_step"]
    writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1) if args.report_to == "tensorboard" else None
    progress = tqdm(total=num_steps, initial=step, desc="training", unit="step")
    windows = sampler.windows(step)
    model.train()
    while step < num_steps:
        started = time.perf_counter()
        indices = next(windows)
        rows = [dataset[i] for i in indices]
        micro_batches = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
        # One division by the targets of the whole optimizer step: every target token weighs the same, however the
        # step is cut into micro-batches.
        targets = sum(num_targets(batch) for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            micro_loss = forward(model, batch, device, bf16, targets)
            micro_loss.backward()
            loss += micro_loss.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm).item()
        if not math.isfinite(loss + grad_norm):
            raise FloatingPointError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. Nothing was updated and the last good "
                f"checkpoint is kept; lower --learning_rate, or look at rows {indices} of --dataset_path"
            )
        learning_rate = lr_scheduler.get_last_lr()[0]
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()

        step = state["global_step"] = step + 1
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        state["num_input_tokens_seen"] += num_tokens
        speed = num_tokens / (time.perf_counter() - started)
        progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s, {peak_memory() / 2**30:.1f} GiB")
        progress.update()
        log = {"step": step, "epoch": step / sampler.steps_per_epoch}
        if step % args.logging_steps == 0 or step == num_steps:
            log |= {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
            log |= {"num_input_tokens_seen": state["num_input_tokens_seen"]}
        if eval_dataset and (step % args.eval_steps == 0 or step == num_steps):
            log["eval_loss"] = evaluate(args, model, eval_dataset, device, bf16)
        state["log_history"] += [log] if len(log) > 2 else []
        for name in log if writer else ():
            writer.add_scalar(f"train/{name}", log[name], step)
        if step % args.save_steps == 0 or step == num_steps:
            save_checkpoint(args, model, tokenizer, optimizer, lr_scheduler, state)
    progress.close()
    return state


# -------------------------------------------------------------------------------------------------------------------
# Saving and resuming: a checkpoint is valid only with complete.json, which is written last
# -------------------------------------------------------------------------------------------------------------------


def save_model(model: peft.PeftModel, tokenizer, folder: Path) -> None:
    """Writes the adapter in PEFT's format and the tokenizer; every tensor is read back and compared."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if saved.keys() != trained.keys() or not all(torch.equal(saved[name], trained[name].cpu()) for name in saved):
        raise OSError(f"{folder}: adapter_model.safetensors is not what was trained")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(args: Arguments, model, tokenizer, optimizer, lr_scheduler, state: dict) -> None:
    folder = Path(args.output_dir) / f"checkpoint-{state['global_step']}"
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.mkdir(parents=True)
    save_model(model, tokenizer, folder)
    trainable = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trainable, folder / "trainable.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(lr_scheduler.state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, folder / "rng_state.pt")
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    os.sync()  # a power cut must not leave complete.json beside files that never reached the disk
    (folder / "complete.tmp").write_text(json.dumps({"files": files}, indent=2))
    os.replace(folder / "complete.tmp", folder / "complete.json")
    complete = [path for path in list_checkpoints(args.output_dir) if (path / "complete.json").is_file()]
    for outdated in complete[args.save_total_limit :]:
        (outdated / "complete.json").unlink()  # first: a half-deleted checkpoint is not complete
        shutil.rmtree(outdated)


def list_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoint folders, complete or not, newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was when complete.json was written."""
    if not (folder / "complete.json").is_file():
        return "it has no complete.json, so it was never finished"
    files = json.loads((folder / "complete.json").read_text())["files"]
    damaged = [
        name for name in files if not (folder / name).is_file() or sha256(folder / name) != files[name]["sha256"]
    ]
    return f"missing or damaged: {', '.join(damaged)}" if damaged else None


def find_checkpoint(args: Arguments, dataset: TokenizedDataset) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Raises:
        ValueError: it is damaged, or belongs to a run with other data or settings, which it could not continue.
    """
    if args.resume_from_checkpoint == "False":
        return None
    newest = args.resume_from_checkpoint == "True"
    for folder in list_checkpoints(args.output_dir) if newest else [Path(args.resume_from_checkpoint)]:
        damage = find_damage(folder)
        if damage is None:
            break
        if not newest:
            raise ValueError(f"{damage}; name a complete checkpoint, or True for the newest")
        print(f"ignoring {folder}: {damage}")
    else:
        print(f"no complete checkpoint in {args.output_dir}: starting from the beginning")
        return None
    state = json.loads((folder / "trainer_state.json").read_text())
    same = ("peft_mode", "seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
    changed = [
        f"--{name} {state['arguments'][name]}" for name in same if state["arguments"][name] != getattr(args, name)
    ]
    if state["dataset_sha256"] != dataset.ledger.get("sha256"):
        changed.append(f"--dataset_path {state['arguments']['dataset_path']} as it was")
    if changed:
        raise ValueError(f"{folder} belongs to a run with {', '.join(changed)}; resume with the same")
    return folder


def load_checkpoint(folder: Path, model, optimizer, lr_scheduler) -> dict:
    """Puts weights, optimizer, schedule and random numbers back; returns the state."""
    load_trainable(model, folder)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    rng_state = torch.load(folder / "rng_state.pt", weights_only=True)
    torch.set_rng_state(rng_state["cpu"])
    torch.cuda.set_rng_state_all(rng_state["cuda"])
    return json.loads((folder / "trainer_state.json").read_text())


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPUs, or in host memory without one."""
    on_gpus = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    return sum(on_gpus) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_receipt(args: Arguments, dataset: TokenizedDataset, devices: list, state: dict, seconds: float) -> None:
    """trainer_state.json, and last run.json: a folder that has it holds a finished run."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    receipt = {
        "script": Path(__file__).name,
        "command": sys.argv,
        "arguments": asdict(args),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")},
        "git_commit": git.stdout.strip() or None,
        "dataset": dataset.ledger,
        "devices": [str(d) if d.type == "cpu" else torch.cuda.get_device_name(d) for d in devices],
        "world_size": 1,
        "seed": args.seed,
        "global_step": state["global_step"],
        "tokens_per_second": state["num_input_tokens_seen"] / seconds,
        "peak_memory_bytes": [peak_memory()],
        "wall_time_seconds": seconds,
    }
    (Path(args.output_dir) / "trainer_state.json").write_text(json.dumps(state, indent=2))
    (Path(args.output_dir) / "run.json").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), "utf-8")


def main() -> None:
    args, unknown = parse_arguments()
    try:
        config, tokenizer, dataset, eval_dataset, checkpoint = check_arguments(args, unknown)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")
    num_gpus = 0 if args.use_cpu else min(torch.cuda.device_count(), config.num_hidden_layers)
    devices = [torch.device("cuda", i) for i in range(num_gpus)] or [torch.device("cpu")]
    bf16 = use_bf16(args.bf16, devices[0])
    set_seed(args.seed)
    model = load_model(args, config, devices, bf16)
    model.print_trainable_parameters()
    if args.padding_free or dataset.packed:
        check_document_attention(model, config.vocab_size)
    output_dir, started = Path(args.output_dir), time.perf_counter()
    if not checkpoint and (list_checkpoints(args.output_dir) or (output_dir / "run.json").exists()):
        former = f"{args.output_dir}.{time.strftime('%Y%m%d-%H%M%S')}"
        print(f"{args.output_dir} holds a former run, which is now {output_dir.rename(former)}")
    try:
        state = train(args, model, tokenizer, dataset, eval_dataset, checkpoint, devices[0], bf16)
    except FloatingPointError as problem:
        sys.exit(f"error: {problem}")
    save_model(model, tokenizer, output_dir)
    write_receipt(args, dataset, devices, state, time.perf_counter() - started)
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
