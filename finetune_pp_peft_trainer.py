"""Full fine-tuning with transformers' Trainer and FSDP2: weights, gradients and optimizer state sharded over all GPUs.

Choose it for full fine-tuning on several GPUs or nodes. A GPU holds 16 bytes a parameter / number of GPUs (float32
weights, gradients, AdamW's two moments) and sends about three times the weights for each forward and backward: every
layer is gathered before it computes, twice, and its gradient is reduced to the shards. --gradient_checkpointing True
saves activations for a third more work. One process is a world of one, so it runs on a laptop, too.

    python finetune_pp_peft_trainer.py
    sh scripts/finetune_pp_peft_trainer.sh
    USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_peft_trainer.sh

Writes into --output_dir: the model in Hugging Face's format and the tokenizer, checkpoint-<step>/ (valid only with
complete.json), trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.utils import save_fsdp_optimizer
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import data_collator
from data_collator import DataCollator, RowSampler, TokenizedDataset, use_bf16


def flag(default, help: str, choices: str | None = None):
    return field(default=default, metadata={"help": help} | ({"metavar": choices} if choices else {}))


@dataclass
class Arguments:
    model_path: str = flag("models/SmolLM2-135M-Instruct", "folder or hub id of a decoder-only model")
    dataset_path: str = flag("data_sample/tokenized/triage_train", "tokenized folder, or name:weight,name:weight")
    eval_dataset_path: str | None = flag(None, "another such folder, for the evaluation loss")
    random_passage: bool = flag(False, "draw a random passage of each whole document (--format text) at every epoch")
    passage_length: int = flag(512, "tokens of a passage")
    output_dir: str = flag("outputs/finetune_pp_peft_trainer", "folder for all that the run leaves")
    num_train_epochs: float = flag(1, "passes over the data")
    max_steps: int = flag(-1, "optimizer steps; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag(8, "rows of one forward")
    per_device_eval_batch_size: int = flag(8, "rows of one forward in evaluation")
    gradient_accumulation_steps: int = flag(1, "forwards of one optimizer step")
    learning_rate: float = flag(2e-5, "peak learning rate of AdamW")
    lr_scheduler_type: str = flag("cosine", "how the rate falls", "cosine|linear|constant_with_warmup")
    warmup_steps: float = flag(0.03, "steps of warm-up; below 1: a share of all steps")
    weight_decay: float = flag(0.0, "AdamW's, never on norms and biases")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    logging_steps: int = flag(1, "log every so many optimizer steps")
    eval_steps: int = flag(100, "evaluate every so many steps, and at the end")
    save_steps: int = flag(100, "checkpoint every so many steps, and at the end")
    save_total_limit: int = flag(2, "complete checkpoints that are kept")
    seed: int = flag(42, "of the row order and dropout")
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

    def attempt(name: str, action, *context):
        value = getattr(args, name)
        try:
            return None if value is None else action(value, *context)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--{name} {value}: {problem}")

    args.use_cpu |= torch.cuda.device_count() == 0
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        mistakes.append("ACCELERATE_USE_DEEPSPEED is true, and this script uses FSDP: unset it")
    config, tokenizer = attempt("model_path", load_config) or (None, None)
    passage = args.random_passage * args.passage_length  # 0: none
    dataset = attempt("dataset_path", TokenizedDataset, config, tokenizer, passage, args.seed)
    eval_dataset = attempt("eval_dataset_path", TokenizedDataset, config, tokenizer, passage)
    if not mistakes:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sampler = RowSampler(dataset, rows * int(os.environ.get("WORLD_SIZE", 1)), args.seed)
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
# The strategy: FSDP2
# -------------------------------------------------------------------------------------------------------------------


def make_training_arguments(args: Arguments, sampler: RowSampler) -> transformers.TrainingArguments:
    """Joins the other processes, and says what transformers' loop is to do."""
    flags = asdict(args) | {"max_steps": sampler.num_steps(args), "bf16": use_bf16(args.bf16, args.use_cpu)}
    flags |= {"save_total_limit": None, "gradient_checkpointing": None}  # what they ask for is done elsewhere
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"TENSORBOARD_LOGGING_DIR": f"{args.output_dir}/runs", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {} if "RANK" in os.environ else alone  # without torchrun: a world of one process
    training_args = transformers.TrainingArguments(
        **{name: value for name, value in flags.items() if name in transformers.TrainingArguments.__dataclass_fields__},
        fsdp=True,
        fsdp_config={"version": 2, "cpu_ram_efficient_loading": True},
        # Else each process would sum the gradients of an optimizer step in a whole copy, not in its shard.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )
    if args.use_cpu:
        # accelerate's list of types that may use FSDP lacks MULTI_CPU, and it would fall back to DDP without a word.
        # Told that the type is another, it shards over gloo as it does over NCCL.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return training_args


def load_model(args: Arguments, checkpoint: Path | None) -> torch.nn.Module:
    """The model in float32, whatever its files hold: in bf16 small steps would vanish.

    Only the first process of a node reads the weights; FSDP then sends each process its shards.
    """
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint or args.model_path,
        dtype=torch.float32,
        attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
        use_safetensors=True,
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# -------------------------------------------------------------------------------------------------------------------
# Training: transformers' loop, with the toolkit's order of rows and its run folder
# -------------------------------------------------------------------------------------------------------------------


class FSDPTrainer(data_collator.RowTrainer, transformers.Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.bf16:
            # accelerate's policy would sum gradients in bf16, and round the loss to bf16, too.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def is_sharded(self, parameter: torch.nn.Parameter) -> bool:
        return isinstance(parameter, DTensor)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The first process writes model and tokenizer in Hugging Face's format, and reads every tensor back."""
        model, folder, trained = self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir), {}
        names = {name for name, _ in model.named_parameters()}  # a tied head once
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if name in names else None  # all gather it; the first process keeps it
            if self.args.should_save and name in names:
                trained[name] = whole.cpu()
        if self.args.should_save:
            model.save_pretrained(folder, state_dict=trained)
            self.processing_class.save_pretrained(folder)
            data_collator.verify(folder, trained)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # transformers' own would write the weights a second time.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        """Nothing: load_model has loaded the weights."""


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    is_first = os.environ.get("RANK", "0") == "0"
    sys.stdout = sys.stdout if is_first else open(os.devnull, "w")
    try:
        (args,) = parser.parse_args_into_dataclasses()
        config, tokenizer, sampler, eval_dataset, checkpoint = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default" if is_first else 1)
    training_args = make_training_arguments(args, sampler)
    set_seed(args.seed)
    if is_first:
        data_collator.set_former_run_aside(Path(args.output_dir), checkpoint)
    trainer = FSDPTrainer(
        load_model(args, checkpoint),
        training_args,
        data_collator=DataCollator(args.padding_free),
        train_dataset=sampler.dataset,
        processing_class=tokenizer,
    )
    facts = trainer.train_rows(sampler, eval_dataset, checkpoint)
    data_collator.write_receipt(args.output_dir, asdict(args), sampler, [str(training_args.device)], facts)


if __name__ == "__main__":
    main()
    data_collator.leave()
