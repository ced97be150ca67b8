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
the tokenizer, checkpoint-<step>/ (a file for each stage; valid only with complete.json), trainer_state.json (the loss
curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, get_scheduler, set_seed

import data_collator
from data_collator import FILLER, IGNORE_INDEX, DataCollator, RowSampler, TokenizedDataset

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")  # nothing happens to their hidden states between two layers
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def flag(default, help: str, choices: str | None = None):
    return field(default=default, metadata={"help": help} | ({"metavar": choices} if choices else {}))


@dataclass
class Arguments:
    model_path: str = flag("models/SmolLM2-135M-Instruct", "folder or hub id of a decoder-only model")
    dataset_path: str = flag("data_sample/tokenized/triage_train", "tokenized folder, or name:weight,name:weight")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    random_passage: bool = flag(False, "draw a random passage of each whole document (--format text) at every epoch")
    passage_length: int = flag(512, "tokens of a passage")
    output_dir: str = flag("outputs/finetune_pp_1f1b", "folder for all that the run leaves")
    pipeline_schedule: str = flag("1f1b", "order of the micro-batches' forwards and backwards", "1f1b|gpipe")
    lora_used: bool = flag(False, "train a LoRA adapter; False: all weights")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = flag(0.05, "dropout on an adapter's input")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    num_train_epochs: float = flag(1, "passes over the data")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one micro-batch")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation")
    gradient_accumulation_steps: int = flag(1, "micro-batches of one optimizer step; several times the stages")
    learning_rate: float | None = flag(None, "peak learning rate of AdamW; none: 1e-3 with an adapter, 2e-5 without")
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
    padding_free: bool = flag(True, "join the rows of a micro-batch instead of padding them")
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

    def attempt(name: str, action, *context):
        value = getattr(args, name)
        try:
            return None if value is None else action(value, *context)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--{name} {value}: {problem}")

    args.use_cpu |= torch.cuda.device_count() == 0
    args.learning_rate = args.learning_rate or (1e-3 if args.lora_used else 2e-5)
    num_micro_batches, num_stages = args.gradient_accumulation_steps, int(os.environ.get("WORLD_SIZE", 1))
    if args.pipeline_schedule == "1f1b" and num_micro_batches < num_stages:
        mistakes.append(f"--gradient_accumulation_steps {num_micro_batches}: 1f1b needs a micro-batch for each of the "
                        f"{num_stages} stages; {4 * num_stages} of them keep the stages busy")  # fmt: skip
    config, tokenizer = attempt("model_path", load_config) or (None, None)
    if config and (config.model_type not in MODEL_TYPES or config.num_hidden_layers < num_stages):
        mistakes.append(f"--model_path {args.model_path}: {config.num_hidden_layers} {config.model_type} layers cannot "
                        f"be {num_stages} stages; start fewer, or choose from {', '.join(MODEL_TYPES)}")  # fmt: skip
    passage = args.random_passage * args.passage_length  # 0: none
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage)
    if not mistakes:
        attempt("lora_used", check_adapter, args, config)
        sampler = RowSampler(dataset, args.per_device_train_batch_size * num_micro_batches, args.seed)
        sampler.settings = asdict(args)
        checkpoint = attempt("resume_from_checkpoint", data_collator.find_checkpoint, args.output_dir, sampler)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return config, tokenizer, sampler, eval_dataset, checkpoint


def load_config(path: str):
    """Configuration and tokenizer of the model in folder `path` or on the hub."""
    if not Path(path).is_dir() and path.startswith((".", "/", "~", "models/", "outputs/")):
        raise FileNotFoundError("no such folder; bash scripts/quickstart.sh fetches the sample model")
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise FileNotFoundError("no .safetensors file in it; name the folder of a whole model")
    return AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)


# -------------------------------------------------------------------------------------------------------------------
# The strategy: which layers a rank owns
# -------------------------------------------------------------------------------------------------------------------


def make_skeleton(config):
    """The model without weights: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def add_adapter(args: Arguments, model: torch.nn.Module) -> peft.PeftModel:
    """Freezes `model` and puts a new adapter on it."""
    targets = [name.strip() for name in args.lora_target_modules.split(",")]
    lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    lora["target_modules"] = "all-linear" if "all-linear" in targets else targets
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


def check_adapter(lora_used: bool, args: Arguments, config) -> None:
    """A rehearsal without weights: every stage must have something to train."""
    paths = add_adapter(args, make_skeleton(config)).base_model.targeted_module_names if lora_used else []
    for target in args.lora_target_modules.replace("all-linear", "q_proj").split(","):
        if paths and sum(f".{path}".endswith(f".{target.strip()}") for path in paths) < config.num_hidden_layers:
            raise ValueError(f"--lora_target_modules {target} is no part of every layer of the model")


def place_layers(num_layers: int, num_stages: int, head_cost: float) -> list[range]:
    """The layers of each stage: contiguous blocks, such that the slowest stage is as fast as possible.

    Args:
        head_cost: work of the last stage's head, in layers.
    """

    def slowest(last: int) -> float:
        return max(math.ceil((num_layers - last) / (num_stages - 1)), last + head_cost)

    last = min(range(1, num_layers - num_stages + 2), key=slowest) if num_stages > 1 else num_layers
    # The larger blocks are the later ones: the first stage has the embedding and the most micro-batches in flight.
    starts = [(num_layers - last) * i // (num_stages - 1) for i in range(num_stages - 1)] + [num_layers - last]
    return [range(*block) for block in zip(starts, [*starts[1:], num_layers], strict=True)]


class Elsewhere(torch.nn.Module):
    """Stands for a layer that another rank owns, so that every layer keeps its number and its name."""

    def forward(self, hidden_states: torch.Tensor, **_) -> torch.Tensor:
        return hidden_states


class Stage:
    """This rank's block, put before a model's own class: its layers, the embedding first, norm and head last.

    A head that is tied to the embedding is a copy on the last stage: both start equal and get the same gradient, the
    sum of what either saw, so they stay equal.
    """

    _keys_to_ignore_on_load_unexpected = [""]  # what other ranks load

    def __init__(self, config, layers: range):
        super().__init__(config)
        self.rank, self.num_stages = dist.get_rank(), dist.get_world_size()
        self.is_first, self.is_last = self.rank == 0, self.rank == self.num_stages - 1
        for i in set(range(config.num_hidden_layers)) - set(layers):
            self.model.layers[i] = Elsewhere()
        if not self.is_first:
            self.model.embed_tokens = Elsewhere()
        if not self.is_last:
            self.model.norm, self.lm_head = Elsewhere(), Elsewhere()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, **context: torch.Tensor) -> torch.Tensor:
        """One micro-batch.

        Args:
            inputs: token ids [rows, length] on the first stage, elsewhere hidden states [rows, length, hidden size].
            labels: [rows, length], used by the last stage.
            context: `attention_mask` or `position_ids` [rows, length].

        Returns:
            The hidden states for the next stage, or on the last one the summed loss of the targets.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            inputs = {"input_ids" if self.is_first else "inputs_embeds": inputs}
            # With a cache, transformers would not notice that a row holds several documents.
            hidden = self.model(**inputs, **context, use_cache=False).last_hidden_state
            if not self.is_last:
                return hidden
            has_target = labels[:, 1:] != IGNORE_INDEX  # the head, as large as several layers, sees no other position
            logits = self.lm_head(hidden[:, :-1][has_target]).float()
            return torch.nn.functional.cross_entropy(logits, labels[:, 1:][has_target], reduction="sum")


def load_stage(args: Arguments, config, sampler: RowSampler, device: torch.device):
    """Returns (stage, the model that is saved); a rank reads no other weights than its own."""
    rank, num_stages, skeleton = dist.get_rank(), dist.get_world_size(), make_skeleton(config)
    # A multiplication costs what its matrix holds, and the head sees only the positions with a target.
    head, layer = (sum(p.numel() for p in m.parameters()) for m in (skeleton.lm_head, skeleton.model.layers[0]))
    labels = make_batch(args, sampler.dataset, sampler.draws_of(0), args.per_device_train_batch_size)["labels"]
    target_share = (labels != IGNORE_INDEX).float().mean().item()
    layers = place_layers(config.num_hidden_layers, num_stages, target_share * head / layer)[rank]

    bf16 = data_collator.use_bf16(args.bf16, args.use_cpu)
    is_tied = config.tie_word_embeddings and num_stages > 1
    config.tie_word_embeddings &= not is_tied  # here: transformers would look for the other end
    loading = {"dtype": torch.bfloat16 if bf16 and args.lora_used else torch.float32}  # small steps vanish in bf16
    loading["attn_implementation"] = None if args.attn_implementation == "auto" else args.attn_implementation
    loading["key_mapping"] = {"model.embed_tokens": "lm_head"} if is_tied and rank == num_stages - 1 else None
    stage_class = type(type(skeleton).__name__, (Stage, type(skeleton)), {})
    stage = stage_class.from_pretrained(args.model_path, layers, config=config, use_safetensors=True, **loading)
    model, stage.bf16 = data_collator.attend_by_document(stage, asdict(args)), bf16
    if args.gradient_checkpointing:
        stage.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.lora_used:
        for turn in range(num_stages):  # each goes on with the random numbers where the one before stopped
            if turn == rank:
                model = add_adapter(args, stage)
            dist.broadcast(random_state := torch.get_rng_state(), turn)
            torch.set_rng_state(random_state)
    torch.manual_seed(args.seed + rank)  # every stage draws its own dropout
    stage.to(device)
    if args.torch_compile:
        stage.compile()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    stage.trained = {EMBEDDING if is_tied and name == HEAD else name: weight for name, weight in trained.items()}
    stage.owned = {name: weight for name, weight in stage.trained.items() if name in trained}  # without the copy
    stage.ends = dist.new_group([0, num_stages - 1]) if is_tied and not args.lora_used else None
    # PEFT saves nothing but what a model has: the one with all layers, without weights, stands for all stages.
    return stage, add_adapter(args, skeleton) if args.lora_used else stage


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


def make_batch(args: Arguments, dataset: TokenizedDataset, draws, size: int) -> dict[str, torch.Tensor]:
    """The micro-batches of a step, of `size` rows each, one below the other: stages want them all in one shape.

    Returns:
        `input_ids`, `labels` and `attention_mask` or `position_ids` [rows, length]; padding-free, a micro-batch is one
        row. Rows without target complete the last micro-batches of an epoch.
    """
    num_rows = size * args.gradient_accumulation_steps
    rows = [dataset[draw] for draw in [*draws, *[FILLER] * (num_rows - len(draws))]]
    if args.padding_free:
        joined = [DataCollator(True)(rows[first : first + size]) for first in range(0, num_rows, size)]
        rows = [{name: batch[name][0] for name in ("input_ids", "labels", "position_ids")} for batch in joined]
    return DataCollator(False)(rows)


def run_pipeline(args: Arguments, stage: Stage, batch: dict[str, torch.Tensor], num_targets: int) -> float:
    """Forward, and where gradients are enabled backward, of all micro-batches.

    The schedule is new in every step and told the shapes: one that infers them takes another length for an error.

    Returns:
        On the last stage the summed loss of all targets, divided by `num_targets`; elsewhere 0.
    """
    batch = {name: tensor.to(stage.device) for name, tensor in batch.items()}
    ids = batch["input_ids"].chunk(args.gradient_accumulation_steps)[0]
    hidden = torch.empty(*ids.shape, stage.config.hidden_size, dtype=stage.dtype, requires_grad=True, device="meta")
    loss = torch.empty((), requires_grad=True, device="meta")
    shapes = ids if stage.is_first else hidden, loss if stage.is_last else hidden
    part = PipelineStage(stage, stage.rank, stage.num_stages, stage.device, *shapes)
    kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[args.pipeline_schedule]
    # The loss is divided once by the targets of the whole step, and not again by the number of micro-batches.
    schedule = kind(part, args.gradient_accumulation_steps, lambda loss, labels: loss / num_targets, scale_grads=False)
    first, losses = [batch.pop("input_ids")] * stage.is_first, []  # the other stages get theirs from the one before
    run = schedule.step if torch.is_grad_enabled() else schedule.eval
    run(*first, **batch, target=batch["labels"], losses=losses, return_outputs=False)
    return sum(loss.item() for loss in losses)


@torch.no_grad()
def evaluate(args: Arguments, stage: Stage, dataset: TokenizedDataset) -> float:
    """Loss per target token over the whole set."""
    stage.eval()
    total, size = torch.zeros(2, dtype=torch.float64), args.per_device_eval_batch_size
    for draws in torch.arange(len(dataset)).split(size * args.gradient_accumulation_steps):
        batch = make_batch(args, dataset, draws.tolist(), size)
        total += torch.tensor([run_pipeline(args, stage, batch, 1), data_collator.num_targets(batch)])
    stage.train()
    dist.all_reduce(loss := total[:1].to(stage.device))  # the last stage knows it
    return loss.item() / total[1].item()


def train(args: Arguments, stage: Stage, sampler, eval_dataset, checkpoint) -> tuple[int, Path, str]:
    """Trains from the checkpoint, if any.

    Returns:
        The number of tokens that this took, the last checkpoint, and what ended the training early.
    """
    num_steps = sampler.num_steps(args)
    optimizer, lr_scheduler = make_optimizer(args, stage, num_steps)
    fresh = {"global_step": 0, "num_input_tokens_seen": 0, "log_history": []}
    state = load_checkpoint(checkpoint, stage, optimizer, lr_scheduler) if checkpoint else fresh
    step, message = state["global_step"], ""
    tokens = tokens_before = state["num_input_tokens_seen"]
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())  # by which a cluster preempts a job
    is_shown = stage.is_first and args.report_to == "tensorboard"
    writer = SummaryWriter(f"{args.output_dir}/runs", purge_step=step + 1) if is_shown else None
    progress = tqdm(total=num_steps, initial=step, desc="training", unit="step", disable=not stage.is_first)
    stage.train()
    while step < num_steps and not message:
        draws = sampler.draws_of(step)
        batch = make_batch(args, sampler.dataset, draws, args.per_device_train_batch_size)
        num_tokens = sum(map(sampler.dataset.num_tokens, draws))
        loss = run_pipeline(args, stage, batch, data_collator.num_targets(batch))
        if stage.ends and EMBEDDING in stage.trained:
            dist.all_reduce(stage.trained[EMBEDDING].grad, group=stage.ends)
        squared_norm = torch.nn.utils.get_total_norm([weight.grad for weight in stage.owned.values()]).item() ** 2
        # The last stage knows the loss, each its own gradients, and a signal may reach them in different steps.
        totals = torch.tensor([loss, squared_norm, terminated.is_set()], dtype=torch.float64, device=stage.device)
        dist.all_reduce(totals)
        loss, grad_norm = totals[0].item(), math.sqrt(totals[1].item())
        if not math.isfinite(loss + grad_norm):
            message = f"error: step {step + 1} has loss {loss} and gradient norm {grad_norm}; the weights were not "
            return 0, checkpoint, message + "updated, and checkpoints saved before are good; lower --learning_rate"
        torch.nn.utils.clip_grads_with_norm_(stage.parameters(), args.max_grad_norm, torch.tensor(grad_norm))
        step, tokens = step + 1, tokens + num_tokens
        log = {"step": step, "epoch": step / sampler.steps_per_epoch, "loss": loss, "grad_norm": grad_norm}
        log |= {"learning_rate": optimizer.param_groups[0]["lr"], "num_input_tokens_seen": tokens}
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        state |= {"global_step": step, "num_input_tokens_seen": tokens}

        progress.set_postfix_str(f"loss {loss:.4f}")
        progress.update()
        if totals[2] > 0:
            message = f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there"
        if eval_dataset and (step % args.eval_steps == 0 or step == num_steps):
            log["eval_loss"] = evaluate(args, stage, eval_dataset)
        if step % args.logging_steps == 0 or step == num_steps or "eval_loss" in log or message:
            state["log_history"].append(log)
            # Memory is for TensorBoard alone: a resumed run's history stays that of an uninterrupted one.
            for name, value in (log | {"peak_memory_bytes": data_collator.peak_memory()}).items() if writer else ():
                writer.add_scalar(f"train/{name}", value, step)
        if step % args.save_steps == 0 or step == num_steps or message:
            checkpoint = save_checkpoint(args, stage, optimizer, sampler, state)
    if writer:
        writer.close()
    return tokens - tokens_before, checkpoint, message


# -------------------------------------------------------------------------------------------------------------------
# Saving and resuming: a checkpoint is valid only with complete.json, which is written last
# -------------------------------------------------------------------------------------------------------------------


def save_checkpoint(args: Arguments, stage: Stage, optimizer, sampler: RowSampler, state: dict) -> Path:
    """Every rank writes what is trained on its stage, and reads it back."""
    folder = Path(args.output_dir) / f"checkpoint-{state['global_step']}"
    if stage.is_first:
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
        folder.mkdir(parents=True)
    dist.barrier()
    parts = {f"random.{stage.rank}": (torch if args.use_cpu else torch.cuda).get_rng_state()}
    for name, weight in stage.owned.items():
        values = {"weight": weight.detach()} | optimizer.state[weight]
        parts |= {f"{key}.{name}": value.cpu().contiguous() for key, value in values.items()}
    save_file(parts, folder / f"stage-{stage.rank + 1:05}-of-{stage.num_stages:05}.safetensors")
    dist.barrier()
    data_collator.verify(folder, parts)
    dist.barrier()
    if stage.is_first:
        assert len(list(folder.glob("stage-*"))) == stage.num_stages, "all machines must see the same --output_dir"
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
        data_collator.complete_checkpoint(folder, sampler)
    dist.barrier()  # nobody leaves before it is complete
    return folder


def read_stages(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of all stages by name, as views of the files: only what is used is read."""
    return {name: tensor for path in checkpoint.glob("stage-*") for name, tensor in load_file(path).items()}


def load_checkpoint(checkpoint: Path, stage: Stage, optimizer, lr_scheduler) -> dict:
    """Puts weights, optimizer, schedule and random numbers back; returns the state.

    A run may go on with another number of stages; only its dropout is then another.
    """
    parts = read_stages(checkpoint)
    for name, weight in stage.trained.items():
        weight.data.copy_(parts[f"weight.{name}"])
        saved = {key: parts[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {key: tensor.to(weight.device, copy=True) for key, tensor in saved.items()}
    if len(list(checkpoint.glob("stage-*"))) == stage.num_stages:
        (torch.cuda if stage.device.type == "cuda" else torch).set_rng_state(parts[f"random.{stage.rank}"])
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    lr_scheduler.last_epoch = state["global_step"]
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(state["global_step"])
    return state


def save_model(args: Arguments, model, tokenizer, checkpoint: Path, folder: Path) -> None:
    """Joins the stages' files in Hugging Face's or PEFT's format; every tensor is read back and compared."""
    trained = {n.removeprefix("weight."): t for n, t in read_stages(checkpoint).items() if n.startswith("weight.")}
    model.config.tie_word_embeddings = HEAD not in trained
    model.save_pretrained(folder, state_dict=dict(trained), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    shutil.copy(checkpoint / "trainer_state.json", folder)
    if args.lora_used:
        save_file(trained, folder / "trainable.safetensors")
        trained |= {name.replace(".default.", "."): weight for name, weight in trained.items()}  # PEFT's names
    data_collator.verify(folder, trained)


# -------------------------------------------------------------------------------------------------------------------
# Processes, which end together
# -------------------------------------------------------------------------------------------------------------------


def watch_neighbour(group: dist.ProcessGroup, done: threading.Event) -> None:
    """Ends this process when the next rank has died: in a ring, so that all end, whatever they wait for."""
    rank, neighbour = dist.get_rank(), (dist.get_rank() + 1) % dist.get_world_size()
    try:
        dist.recv(torch.zeros(1), neighbour, group)  # nothing is ever sent; it fails when the connection ends
    except RuntimeError:
        if not done.is_set():
            os.write(2, f"\nerror: rank {rank} ends because rank {neighbour} has ended\n".encode())
            os._exit(1)


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    is_first = os.environ.get("RANK", "0") == "0"
    sys.stdout = sys.stdout if is_first else open(os.devnull, "w")
    try:
        (args,) = parser.parse_args_into_dataclasses()
        config, tokenizer, sampler, eval_dataset, checkpoint = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default" if is_first else 1)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {} if "RANK" in os.environ else alone  # without torchrun: a world of one process
    torch.cuda.set_device(-1 if args.use_cpu else int(os.environ["LOCAL_RANK"]))  # below 0 nothing happens
    dist.init_process_group("gloo" if args.use_cpu else "cpu:gloo,cuda:nccl")
    device = torch.device("cpu" if args.use_cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    done, group = threading.Event(), dist.new_group(backend="gloo", timeout=timedelta(days=365))
    if dist.get_world_size() > 1:
        threading.Thread(target=watch_neighbour, args=(group, done), daemon=True).start()
    # A neighbour's death may be the reason, and then its watch ends this process with a message.
    sys.excepthook = lambda *problem: (time.sleep(5), sys.__excepthook__(*problem), os._exit(1))
    set_seed(args.seed)
    stage, model = load_stage(args, config, sampler, device)
    started, output_dir = time.perf_counter(), Path(args.output_dir)
    if is_first:
        data_collator.set_former_run_aside(output_dir, checkpoint)
    num_tokens, checkpoint, message = train(args, stage, sampler, eval_dataset, checkpoint)
    if not message:
        if is_first:
            save_model(args, model, tokenizer, checkpoint, output_dir)
        seconds = time.perf_counter() - started
        facts = {"wall_time_seconds": seconds, "tokens_per_second": num_tokens / seconds}
        data_collator.write_receipt(output_dir, asdict(args), sampler, [str(device)], facts)
    done.set()
    dist.barrier()
    if message:
        print(message * is_first, file=sys.stderr, flush=True)
        os._exit(1)  # as in data_collator.leave


if __name__ == "__main__":
    main()
    data_collator.leave()
