"""Fine-tunes an adapter with transformers' Trainer and FSDP2: the frozen model is sharded over all GPUs.

Choose it for an adapter on a model that one GPU does not hold. A GPU holds 2 bytes a parameter of the frozen model
(bf16) / number of GPUs, and next to nothing for the adapter's gradients and optimizer; it gathers every layer before
it computes, twice a step, but sends no gradients of the base. --load_in_4bit True (QLoRA) needs bitsandbytes.

    python finetune_pp_peft_trainer_lora.py
    sh scripts/finetune_pp_peft_trainer_lora.sh --peft_mode ptuning
    USE_CPU=1 NUM_GPUS=2 sh scripts/finetune_pp_peft_trainer_lora.sh

Writes into --output_dir: the adapter in PEFT's format and the tokenizer, checkpoint-<step>/ (valid only with
complete.json), trainer_state.json (the loss curve), runs/ (TensorBoard) and last run.json (the receipt).
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, set_seed

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
    output_dir: str = flag("outputs/finetune_pp_peft_trainer_lora", "folder for all that the run leaves")
    peft_mode: str = flag("lora", "what is trained beside the frozen model", "lora|prefix|ptuning|prompt")
    peft_path: str | None = flag(None, "go on from this adapter with new data")
    lora_rank: int = flag(8, "inner size of an adapter's two matrices")
    lora_alpha: float = flag(16, "an adapter's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = flag(0.05, "dropout on an adapter's input")
    lora_target_modules: str = flag("all-linear", "all-linear (without the head), or names such as q_proj,v_proj")
    load_in_4bit: bool = flag(False, "hold the frozen model in 4 bit (nf4 with double quantisation): QLoRA")
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
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        mistakes.append("ACCELERATE_USE_DEEPSPEED is true, and this script uses FSDP: unset it")
    if args.load_in_4bit and not transformers.utils.is_bitsandbytes_available():
        mistakes.append("--load_in_4bit True: bitsandbytes is missing; pip install bitsandbytes")
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
        skeleton = attempt("peft_mode", lambda mode: add_adapter(args, make_skeleton(config)))
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sampler = RowSampler(dataset, rows * int(os.environ.get("WORLD_SIZE", 1)), args.seed)
        sampler.settings = asdict(args)
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


# -------------------------------------------------------------------------------------------------------------------
# The strategy: an adapter on a model that FSDP2 shards
# -------------------------------------------------------------------------------------------------------------------


def make_skeleton(config):
    """The model without weights: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


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
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
    )
    if args.use_cpu:
        # accelerate's list of types that may use FSDP lacks MULTI_CPU, and it would fall back to DDP without a word.
        # Told that the type is another, it shards over gloo as it does over NCCL.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
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


def load_model(args: Arguments, checkpoint: Path | None, bf16: bool) -> peft.PeftModel:
    """The frozen base in the compute precision or 4 bit, with an adapter in float32: in bf16 small steps would vanish.

    Only the first process of a node reads the base; FSDP then sends each process its shards.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    nf4["bnb_4bit_quant_storage"] = dtype  # FSDP shards floating point storage only
    base = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **nf4) if args.load_in_4bit else None,
        attn_implementation=None if args.attn_implementation == "auto" else args.attn_implementation,
        use_safetensors=True,
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes would repack the frozen weights at the first evaluation, rounded to bf16 and for good.
            module.support_avx512bf16_for_cpu = False
    model = add_adapter(args, base)
    if checkpoint or args.peft_path:
        load_adapter(model, checkpoint or Path(args.peft_path))
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
        """The first process writes the adapter in PEFT's format and the tokenizer, and reads every tensor back."""
        model, folder, trained = self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir), {}
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, tensor in model.state_dict().items():
            if name in names:
                trained[name] = tensor.full_tensor().cpu()  # gathered by all processes
        if self.args.should_save:
            # The prompt modes compute what PEFT's format holds, which sharded weights cannot do in one process.
            self.adapter.load_state_dict(trained, strict=False, assign=True)
            self.adapter.save_pretrained(folder, save_embedding_layers=False)
            self.processing_class.save_pretrained(folder)
            save_file(trained, folder / "trainable.safetensors")
            data_collator.verify(folder, trained | peft.get_peft_model_state_dict(self.adapter))

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
        config, tokenizer, sampler, eval_dataset, checkpoint, skeleton = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default" if is_first else 1)
    training_args = make_training_arguments(args, sampler)
    set_seed(args.seed)
    if is_first:
        data_collator.set_former_run_aside(Path(args.output_dir), checkpoint)
    trainer = FSDPTrainer(
        load_model(args, checkpoint, training_args.bf16),
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
