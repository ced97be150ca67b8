"""Fine-tunes an adapter (lora, prefix, ptuning or prompt) in a plain PyTorch loop, one process, layers over all GPUs.

Choose it to read, to debug step by step, or when a frozen model fits the GPUs of one machine: the decoder layers lie in
contiguous blocks on the visible devices, so one GPU works at a time. On a machine without a GPU it runs on the CPU.

    python finetune_pp_peft.py
    python finetune_pp_peft.py --peft_mode prefix --num_virtual_tokens 16 --dataset_path data_sample/tokenized/instruct

Writes into --output_dir: the adapter in PEFT's format and the tokenizer, checkpoint-<step>/ (valid only with
complete.json), trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_scheduler, set_seed

import data_collator
from data_collator import DataCollator, RowSampler, TokenizedDataset

PEFT_TYPES = {"lora": "LORA", "prefix": "PREFIX_TUNING", "ptuning": "P_TUNING", "prompt": "PROMPT_TUNING"}


def flag(default, help: str, choices: str | None = None):
    return field(default=default, metadata={"help": help} | ({"metavar": choices} if choices else {}))


@dataclass
class Arguments:
    model_path: str = flag("models/SmolLM2-135M-Instruct", "folder or hub id of a decoder-only model")
    dataset_path: str = flag("data_sample/tokenized/triage_train", "tokenized folder, or name:weight,name:weight")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    random_passage: bool = flag(False, "draw a random passage of each whole document (--format text) at every epoch")
    passage_length: int = flag(512, "tokens of a passage")
    output_dir: str = flag("outputs/finetune_pp_peft", "folder for all that the run leaves")
    peft_mode: str = flag("lora", "what is trained beside the frozen model", "lora|prefix|ptuning|prompt")
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
    lr_scheduler_type: str = flag("cosine", "how the rate falls", "cosine|linear|constant_with_warmup")
    warmup_steps: float = flag(0.03, "steps of warm-up; below 1: a share of all steps")
    weight_decay: float = flag(0.0, "AdamW's, never on norms and biases")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    logging_steps: int = flag(1, "log every so many optimizer steps")
    eval_steps: int = flag(100, "evaluate every so many steps, and at the end")
    save_steps: int = flag(100, "checkpoint every so many steps, and at the end")
    save_total_limit: int = flag(2, "complete checkpoints that are kept")
    seed: int = flag(42, "of the adapter's start, the row order and dropout")
    bf16: str = flag("auto", "compute in bf16; auto: where the hardware is fast at it", "auto|True|False")
    padding_free: bool = flag(True, "join the rows of a batch instead of padding them")
    gradient_checkpointing: bool = flag(False, "recompute activations: a third more work, much less memory")
    attn_implementation: str = flag("auto", "kernel of attention; auto: document by document", data_collator.ATTENTION)
    torch_compile: bool = flag(False, "compile the model: minutes at first, then faster steps")
    resume_from_checkpoint: str = flag("False", "True: the newest complete one in output_dir; or a checkpoint folder")
    use_cpu: bool = flag(False, "leave the GPUs alone")
    report_to: str = flag("tensorboard", "where the loss curve is shown", "tensorboard|none")


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before weights are loaded or anything is written
# -------------------------------------------------------------------------------------------------------------------


def check_arguments(args: Arguments):
    """Returns (config, tokenizer, row sampler, evaluation set or None, checkpoint to resume from or None).

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = data_collator.find_mistakes(args)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        mistakes.append("torchrun: this script is one process; finetune_pp_1f1b.py is a pipeline over several")

    def attempt(name: str, action, *context):
        value = getattr(args, name)
        try:
            return None if value is None else action(value, *context)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--{name} {value}: {problem}")

    config, tokenizer = attempt("model_path", load_config) or (None, None)
    passage = args.random_passage * args.passage_length  # 0: none
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage)
    attempt("peft_path", check_adapter, args.peft_mode)
    if args.peft_mode == "prompt" and args.mapping_hidden_dim != Arguments.mapping_hidden_dim:
        mistakes.append(f"--mapping_hidden_dim {args.mapping_hidden_dim}: --peft_mode prompt has no MLP; leave it out")
    if args.peft_mode != "lora" and any(data and data.packed for data in (dataset, eval_dataset)):
        mistakes.append(f"--peft_mode {args.peft_mode}: needs one document a row; tokenize with --packing False")
    if not mistakes:
        attempt("peft_mode", lambda mode: add_adapter(args, make_skeleton(config)))  # a rehearsal without weights
        sampler = RowSampler(dataset, args.per_device_train_batch_size * args.gradient_accumulation_steps, args.seed)
        sampler.settings = asdict(args)
        checkpoint = attempt("resume_from_checkpoint", data_collator.find_checkpoint, args.output_dir, sampler)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.peft_mode != "lora" and args.padding_free:
        print(f"--padding_free False: --peft_mode {args.peft_mode} puts its virtual tokens before each row of a batch")
        args.padding_free = False
    return config, tokenizer, sampler, eval_dataset, checkpoint


def load_config(path: str):
    """Configuration and tokenizer of the model in folder `path` or on the hub."""
    if not Path(path).is_dir() and path.startswith((".", "/", "~", "models/", "outputs/")):
        raise FileNotFoundError("no such folder; bash scripts/quickstart.sh fetches the sample model")
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError("no .safetensors file in it; name the folder of a whole model")
    return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def check_adapter(folder: str, peft_mode: str) -> None:
    """An adapter to go on from is of the mode that was asked for, and has all its trained weights."""
    peft_type = peft.PeftConfig.from_pretrained(folder).peft_type
    if peft_type != PEFT_TYPES.get(peft_mode):
        raise ValueError(f"its adapter is of type {peft_type.value}; choose the --peft_mode that made it")
    if peft_mode in ("prefix", "ptuning") and not (Path(folder) / "trainable.safetensors").is_file():
        raise ValueError("it has no trainable.safetensors, and PEFT's own file lacks the MLP; name a run's folder")


# -------------------------------------------------------------------------------------------------------------------
# The strategy: where each layer lies, and what is trained
# -------------------------------------------------------------------------------------------------------------------


def make_skeleton(config):
    """The model without weights: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def place_layers(num_layers: int, num_devices: int) -> list[int]:
    """Number of decoder layers on each device: contiguous blocks whose sizes differ by at most one.

    The larger blocks go to the middle, because the first device also holds the embedding and the last one the head.
    """
    sizes = [num_layers // num_devices] * num_devices
    for i in sorted(range(num_devices), key=lambda i: abs(2 * i + 1 - num_devices))[: num_layers % num_devices]:
        sizes[i] += 1
    return sizes


def make_device_map(config, devices: list[torch.device]) -> dict[str, torch.device]:
    """The device of each module by the model's own names; a tied head lies with the embedding."""
    skeleton = make_skeleton(config)
    modules = dict(skeleton.named_modules())
    layers = [name for name, module in modules.items() if type(module).__name__ in skeleton._no_split_modules]
    blocks = zip(devices, place_layers(len(layers), len(devices)), strict=True)
    device_map = dict(zip(layers, [device for device, size in blocks for _ in range(size)], strict=True))
    for name, module in modules.items():
        if not name.startswith(tuple(layers)) and not list(module.children()):
            tied_head = module is skeleton.get_output_embeddings() and config.tie_word_embeddings
            on_first = module is skeleton.get_input_embeddings() or tied_head or not list(module.parameters())
            device_map[name] = devices[0] if on_first else devices[-1]
    return device_map


def add_adapter(args: Arguments, model) -> peft.PeftModel:
    """Freezes `model` and puts a new adapter on it, or one of the shape that --peft_path has.

    Raises:
        ValueError: PEFT's reason why the combination cannot work, or a LoRA target that matches no layer.
    """
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = [name.strip() for name in args.lora_target_modules.split(",")]
    lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    lora["target_modules"] = "all-linear" if "all-linear" in targets else targets
    prompt = {"num_virtual_tokens": args.num_virtual_tokens}
    ptuning = prompt | {"encoder_hidden_size": args.mapping_hidden_dim or None}
    prefix = ptuning | {"prefix_projection": args.mapping_hidden_dim > 0}
    shape = {"lora": lora, "prefix": prefix, "ptuning": ptuning, "prompt": prompt}[args.peft_mode]
    config = peft.get_peft_config({"peft_type": PEFT_TYPES[args.peft_mode], "task_type": "CAUSAL_LM", **shape})
    if args.peft_path:
        config = peft.PeftConfig.from_pretrained(args.peft_path)
        config.inference_mode = False
    model = peft.get_peft_model(model, config)
    matched = [f".{path}" for path in getattr(model.base_model, "targeted_module_names", ())]
    unmatched = [name for name in targets if not any(path.endswith(f".{name}") for path in matched)]
    if args.peft_mode == "lora" and "all-linear" not in targets and unmatched:
        raise ValueError(f"--lora_target_modules {', '.join(unmatched)} matches no layer of the model")
    return model


def load_model(args: Arguments, config, devices: list[torch.device], bf16: bool) -> peft.PeftModel:
    """The frozen base in the compute precision, with an adapter in float32: in bf16 small steps would vanish."""
    base = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device_map=make_device_map(config, devices) if len(devices) > 1 else {"": devices[0]},
        attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
        use_safetensors=True,
    )
    data_collator.attend_by_document(base, asdict(args))
    model = add_adapter(args, base)
    data_collator.compute_loss_in_head(model, asdict(args))
    if args.peft_path:
        load_adapter(model, Path(args.peft_path))
    if args.torch_compile:
        model.compile()
    return model


def load_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Loads all that is trained: PEFT's own file lacks ptuning's MLP and a projected prefix, ours does not."""
    if (folder / "trainable.safetensors").is_file():
        keys = model.load_state_dict(load_file(folder / "trainable.safetensors"), strict=False)
        assert not keys.unexpected_keys, f"{folder} holds another adapter"
    else:
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


# -------------------------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------------------------


def make_optimizer(args: Arguments, model: torch.nn.Module, num_steps: int):
    """AdamW in one fused kernel; warm-up, then the schedule. Vectors (norms and biases) are never decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=args.learning_rate, fused=True)
    warmup_steps = math.ceil(args.warmup_steps * (num_steps if args.warmup_steps < 1 else 1))
    return optimizer, get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, num_steps)


def forward(model, batch: dict[str, torch.Tensor], device: torch.device, bf16: bool, num_items: int) -> torch.Tensor:
    """The summed loss of a batch's targets, divided by `num_items`."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        # A list selects on any device: the last layer may lie on another one than the indices would be moved to.
        spread = len(getattr(model, "hf_device_map", ())) > 1
        batch = {name: t.tolist() if spread and name == "logits_to_keep" else t.to(device) for name, t in batch.items()}
        # With a cache, transformers would not notice that a row holds several documents.
        return model(**batch, num_items_in_batch=num_items, use_cache=False).loss


@torch.no_grad()
def evaluate(args: Arguments, model, dataset: TokenizedDataset, device: torch.device, bf16: bool) -> float:
    """Loss per target token over the whole set."""
    model.eval()
    total, targets = 0.0, 0
    for batch in data_collator.batches(dataset, DataCollator(args.padding_free), args.per_device_eval_batch_size):
        total += forward(model, batch, device, bf16, 1).item()
        targets += data_collator.num_targets(batch)
    model.train()
    return total / targets


def train(args: Arguments, model, tokenizer, sampler, eval_dataset, checkpoint, device, bf16) -> int:
    """Trains from the checkpoint, if any, until the last step; returns the number of tokens that this took."""
    num_steps = sampler.num_steps(args)
    optimizer, lr_scheduler = make_optimizer(args, model, num_steps)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizer, lr_scheduler)
    step = state["global_step"]
    tokens = tokens_before = state["num_input_tokens_seen"]
    writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1) if args.report_to == "tensorboard" else None
    progress = tqdm(total=num_steps, initial=step, desc="training", unit="step")
    collate, size = DataCollator(args.padding_free), args.per_device_train_batch_size
    model.train()
    while step < num_steps:
        started = time.perf_counter()
        rows = sampler.rows_of(step)
        micro_batches = [collate(rows[first : first + size]) for first in range(0, len(rows), size)]
        num_tokens = sum(len(row["input_ids"]) for row in rows)
        # One division by the targets of the whole optimizer step: every target token weighs the same, however the
        # step is cut into micro-batches.
        targets = sum(data_collator.num_targets(batch) for batch in micro_batches)
        losses = []
        for batch in micro_batches:
            micro_loss = forward(model, batch, device, bf16, targets)
            micro_loss.backward()
            losses.append(micro_loss.detach())
        loss = sum(micro_loss.item() for micro_loss in losses)  # once a step: it waits for the device
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm).item()
        if not math.isfinite(loss + grad_norm):
            sys.exit(f"error: step {step + 1} has loss {loss} and gradient norm {grad_norm}; the weights were not "
                     "updated, and checkpoints saved before are good; lower --learning_rate")  # fmt: skip
        step, tokens = step + 1, tokens + num_tokens
        log = {"step": step, "epoch": step / sampler.steps_per_epoch, "loss": loss, "grad_norm": grad_norm}
        log |= {"learning_rate": optimizer.param_groups[0]["lr"], "num_input_tokens_seen": tokens}
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        state |= {"global_step": step, "num_input_tokens_seen": tokens}

        speed, memory = num_tokens / (time.perf_counter() - started), data_collator.peak_memory() / 2**30
        progress.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} tokens/s, {memory:.1f} GiB")
        progress.update()
        if eval_dataset and (step % args.eval_steps == 0 or step == num_steps):
            log["eval_loss"] = evaluate(args, model, eval_dataset, device, bf16)
        if step % args.logging_steps == 0 or step == num_steps or "eval_loss" in log:
            state["log_history"].append(log)
            # Memory is for TensorBoard alone: a resumed run's history stays that of an uninterrupted one.
            for name, value in (log | {"peak_memory_bytes": data_collator.peak_memory()}).items() if writer else ():
                writer.add_scalar(f"train/{name}", value, step)
        if step % args.save_steps == 0 or step == num_steps:
            save_checkpoint(args, model, tokenizer, optimizer, lr_scheduler, sampler, state)
    (Path(args.output_dir) / "trainer_state.json").write_text(json.dumps(state, indent=2))
    if writer:
        writer.close()
    return tokens - tokens_before


# -------------------------------------------------------------------------------------------------------------------
# Saving and resuming: a checkpoint is valid only with complete.json, which is written last
# -------------------------------------------------------------------------------------------------------------------


def save_model(model: peft.PeftModel, tokenizer, folder: Path) -> None:
    """Writes the adapter in PEFT's format and the tokenizer; every tensor is read back and compared."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    trainable = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trainable, folder / "trainable.safetensors")
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    for file, trained in {"adapter_model.safetensors": adapter, "trainable.safetensors": trainable}.items():
        saved = load_file(folder / file)
        if saved.keys() != trained.keys() or not all(torch.equal(saved[name], trained[name].cpu()) for name in saved):
            raise OSError(f"{folder}: {file} is not what was trained")


def save_checkpoint(args: Arguments, model, tokenizer, optimizer, lr_scheduler, sampler, state: dict) -> None:
    folder = Path(args.output_dir) / f"checkpoint-{state['global_step']}"
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    save_model(model, tokenizer, folder)
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    parts = {"optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict(), "rng": rng}
    torch.save(parts, folder / "training_state.pt")
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    data_collator.complete_checkpoint(folder, sampler)


def load_checkpoint(folder: Path, model, optimizer, lr_scheduler) -> dict:
    """Puts weights, optimizer, schedule and random numbers back; returns the state."""
    load_adapter(model, folder)
    parts = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(parts["optimizer"])
    lr_scheduler.load_state_dict(parts["lr_scheduler"])
    torch.set_rng_state(parts["rng"]["cpu"])
    torch.cuda.set_rng_state_all(parts["rng"]["cuda"])
    return json.loads((folder / "trainer_state.json").read_text())


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        config, tokenizer, sampler, eval_dataset, checkpoint = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    num_gpus = 0 if args.use_cpu else min(torch.cuda.device_count(), config.num_hidden_layers)
    devices = [torch.device("cuda", i) for i in range(num_gpus)] or [torch.device("cpu")]
    bf16 = data_collator.use_bf16(args.bf16, num_gpus == 0)
    set_seed(args.seed)
    model = load_model(args, config, devices, bf16)
    if args.padding_free or sampler.dataset.packed:
        data_collator.check_document_attention(model, config.vocab_size)
    started, output_dir = time.perf_counter(), Path(args.output_dir)
    data_collator.set_former_run_aside(output_dir, checkpoint)
    num_tokens = train(args, model, tokenizer, sampler, eval_dataset, checkpoint, devices[0], bf16)
    save_model(model, tokenizer, output_dir)
    seconds = time.perf_counter() - started
    facts = {"wall_time_seconds": seconds, "tokens_per_second": num_tokens / seconds}
    data_collator.write_receipt(output_dir, asdict(args), sampler, [str(device) for device in devices], facts)


if __name__ == "__main__":
    main()
