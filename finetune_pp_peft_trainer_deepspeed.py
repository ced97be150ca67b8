"""Full fine-tuning or an adapter with transformers' Trainer and DeepSpeed ZeRO, stage 2 or 3, with or without offload.

Choose it where DeepSpeed is the house standard, or to offload to host memory what the GPUs cannot hold. Bytes on each
of N GPUs for P parameters of which T are trained, in bf16: ZeRO-2 2 P + 14 T / N, and a step sends the gradients once
to the shards and the weights once back; ZeRO-3 (2 P + 14 T) / N, and it gathers every layer twice a forward and
backward, as FSDP does. zero2_offload keeps the optimizer in host memory and zero3_offload the weights, too: every step
then waits for the PCIe bus.

    python finetune_pp_peft_trainer_deepspeed.py --deepspeed ds_configs/zero2.json
    sh scripts/finetune_pp_peft_trainer_deepspeed.sh --lora_used True
    USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_peft_trainer_deepspeed.sh --lora_used False

Writes into --output_dir: the whole model, or the adapter in PEFT's format, and the tokenizer, checkpoint-<step>/ (valid
only with complete.json), trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import data_collator
from data_collator import DataCollator, RowSampler, TokenizedDataset, use_bf16

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
    output_dir: str = flag("outputs/finetune_pp_peft_trainer_deepspeed", "folder for all that the run leaves")
    deepspeed: str = flag("ds_configs/zero3.json", "what is sharded and offloaded: a file of ds_configs/, or your own")
    lora_used: bool = flag(False, "train an adapter, see peft_mode; False: all weights")
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
    """Returns (config, tokenizer, row sampler, evaluation set or None, checkpoint to resume from or None, skeleton).

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
    if not args.lora_used and (args.peft_path or args.peft_mode != "lora"):
        mistakes.append("--lora_used False: trains all weights, without --peft_path and --peft_mode")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        mistakes.append("ACCELERATE_USE_FSDP is true, and this script uses DeepSpeed: unset it")
    attempt("deepspeed", check_deepspeed)
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
        # A rehearsal without weights; save_model will put what was trained on it.
        skeleton = attempt("peft_mode", lambda mode: args.lora_used and add_adapter(args, make_skeleton(config)))
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sampler = RowSampler(dataset, rows * int(os.environ.get("WORLD_SIZE", 1)), args.seed)
        sampler.settings = asdict(args) | {"world_size": os.environ.get("WORLD_SIZE", "1")}  # DeepSpeed cannot reshard
        checkpoint = attempt("resume_from_checkpoint", data_collator.find_checkpoint, args.output_dir, sampler)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.peft_mode != "lora" and args.padding_free:
        print(f"--padding_free False: --peft_mode {args.peft_mode} puts its virtual tokens before each row of a batch")
        args.padding_free = False
    return config, tokenizer, sampler, eval_dataset, checkpoint, skeleton


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


def check_deepspeed(path: str) -> None:
    """A configuration file with ZeRO stage 2 or 3."""
    config = json.loads(Path(path).read_text())
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    if stage not in (2, 3):
        raise ValueError(f"its zero_optimization.stage is {stage}; this script knows 2 and 3: ds_configs/")


# -------------------------------------------------------------------------------------------------------------------
# The strategy: ZeRO
# -------------------------------------------------------------------------------------------------------------------


def make_skeleton(config):
    """The model without weights: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def make_training_arguments(args: Arguments, sampler: RowSampler) -> transformers.TrainingArguments:
    """Joins the other processes, and says what transformers' loop is to do."""
    import deepspeed  # a slow import, not paid by --help

    flags = asdict(args) | {"max_steps": sampler.num_steps(args), "bf16": use_bf16(args.bf16, args.use_cpu)}
    flags |= {"save_total_limit": None, "gradient_checkpointing": None}  # what they ask for is done elsewhere
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # Without torchrun: a world of one process.
    os.environ |= {"TENSORBOARD_LOGGING_DIR": f"{args.output_dir}/runs"} | ({} if "RANK" in os.environ else alone)
    os.environ |= {"DS_ACCELERATOR": "cpu"} if args.use_cpu else {}
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's, at every collective
    training_args = transformers.TrainingArguments(
        **{name: value for name, value in flags.items() if name in transformers.TrainingArguments.__dataclass_fields__},
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )
    if args.use_cpu:
        # accelerate leaves DeepSpeed out on a CPU, although it shards over gloo as it does over NCCL.
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    return training_args


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


def load_model(args: Arguments, bf16: bool) -> torch.nn.Module:
    """The model in the compute precision; what is trained has float32 masters in DeepSpeed's optimizer."""
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
        use_safetensors=True,
    )
    if args.lora_used:
        model = add_adapter(args, model)
        if args.peft_path:
            load_adapter(model, Path(args.peft_path))
    elif args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Loads all that is trained: PEFT's own file lacks ptuning's MLP and a projected prefix, ours does not."""
    if (folder / "trainable.safetensors").is_file():
        keys = model.load_state_dict(load_file(folder / "trainable.safetensors"), strict=False)
        assert not keys.unexpected_keys, f"{folder} holds another adapter"
    else:
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


# -------------------------------------------------------------------------------------------------------------------
# Training: transformers' loop, with the toolkit's order of rows and its run folder
# -------------------------------------------------------------------------------------------------------------------


class ZeROTrainer(data_collator.RowTrainer, transformers.Trainer):
    def is_sharded(self, parameter: torch.nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or self.deepspeed.zero_optimization_stage() == 2

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The first process writes the model or the adapter, and the tokenizer, and reads every tensor back."""
        from deepspeed.utils import safe_get_full_fp32_param

        folder, trained = Path(output_dir or self.args.output_dir), {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = safe_get_full_fp32_param(parameter)  # gathered by all; the first process keeps it
                if self.args.should_save:
                    trained[name] = whole.cpu()
        if not self.args.should_save:
            return
        if isinstance(self.model, peft.PeftModel):
            self.adapter.load_state_dict(trained, strict=False, assign=True)
            self.adapter.save_pretrained(folder, save_embedding_layers=False)
            save_file(trained, folder / "trainable.safetensors")
            trained |= peft.get_peft_model_state_dict(self.adapter)
        else:
            self.model.save_pretrained(folder, state_dict=trained)
        self.processing_class.save_pretrained(folder)
        data_collator.verify(folder, trained)


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    is_first = os.environ.get("RANK", "0") == "0"
    sys.stdout = sys.stdout if is_first else open(os.devnull, "w")
    try:
        (args,) = parser.parse_args_into_dataclasses()
        config, tokenizer, sampler, eval_dataset, checkpoint, skeleton = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default" if is_first else 1)
    training_args = make_training_arguments(args, sampler)
    set_seed(args.seed)
    if is_first:
        data_collator.set_former_run_aside(Path(args.output_dir), checkpoint)
    trainer = ZeROTrainer(
        load_model(args, training_args.bf16),
        training_args,
        data_collator=DataCollator(args.padding_free),
        train_dataset=sampler.dataset,
        processing_class=tokenizer,
    )
    trainer.adapter = skeleton
    facts = trainer.train_rows(sampler, eval_dataset, checkpoint)
    data_collator.write_receipt(args.output_dir, asdict(args), sampler, [str(training_args.device)], facts)


if __name__ == "__main__":
    main()
    data_collator.leave()
