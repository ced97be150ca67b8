"""Measures every strategy of this toolkit on this machine, and writes the table docs/strategies_measured.md.

    python benchmarks/strategies.py --data alpaca.json --output docs/strategies_measured.md

Each strategy runs as one process, or as one process for each GPU (without a GPU: two), with --batch_size rows for each
of them a step, for --steps steps. The first step is left out.

MFU is the share of the machine's matrix-product rate (--peak_flops, or measured in the same run) that the model's own
work makes up: 6 FLOPs for each trained weight and token, 4 for each frozen one. The output layer is counted for every
token, and attention is left out, as is usual. HFU is what is executed: the output layer for target tokens only, which
makes it less, and the layers that gradient checkpointing computes again, which makes it more.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from compare import tokenize
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Strategy:
    name: str
    command: str  # script and flags
    is_one_process: bool
    sharded: str  # what is spread over the processes


DEEPSPEED = "finetune_pp_peft_trainer_deepspeed.py --deepspeed ds_configs/"
CHECKPOINTING = " --gradient_checkpointing True"
ALL_STATES = "weights, gradients, optimizer"
STRATEGIES = [
    Strategy("pp", "finetune_pp.py", True, "none"),
    Strategy("pp, checkpointing", "finetune_pp.py" + CHECKPOINTING, True, "none"),
    Strategy("pp, LoRA", "finetune_pp_peft.py", True, "none"),
    Strategy("1F1B", "finetune_pp_1f1b.py", False, "layers"),
    Strategy("1F1B, LoRA", "finetune_pp_1f1b.py --lora_used True", False, "layers"),
    Strategy("FSDP", "finetune_pp_peft_trainer.py", False, ALL_STATES),
    Strategy("FSDP, checkpointing", "finetune_pp_peft_trainer.py" + CHECKPOINTING, False, ALL_STATES),
    Strategy("FSDP, LoRA", "finetune_pp_peft_trainer_lora.py", False, ALL_STATES),
    Strategy("ZeRO-2", DEEPSPEED + "zero2.json", False, "gradients, optimizer"),
    Strategy("ZeRO-3", DEEPSPEED + "zero3.json", False, ALL_STATES),
    Strategy("ZeRO-3, LoRA", DEEPSPEED + "zero3.json --lora_used True", False, ALL_STATES),
]
# Only where there is a GPU to offload from.
STRATEGIES_ON_GPUS = [
    Strategy("ZeRO-2, offload", DEEPSPEED + "zero2_offload.json", False, "gradients, optimizer"),
    Strategy("ZeRO-3, offload", DEEPSPEED + "zero3_offload.json", False, ALL_STATES),
]
COLUMNS = [
    "model",
    "strategy",
    "hours per epoch",
    "sequence length",
    "devices",
    "MFU",
    "HFU",
    "micro-batch",
    "accumulation",
    "tokens/s",
    "tokens/s/device",
    "precision",
    "sharded",
    "checkpointing",
    "offload",
    "peak memory of each process, MB",
]
QUOTED = """
Quoted, not measured here; each figure stands at the address beside it:

| model | strategy | devices | tokens/s/device | MFU | source |
|---|---|---|---|---|---|
| LLaMA 7B | FSDP, 384 rows of 512 tokens a step: 35 hours for 2.5e9 tokens | 8 A100-80G | about 2,480 | about 32 % | [the guide that this toolkit continues](https://github.com/chaoyi-wu/Finetune_LLAMA) gives the hours |
| MPT 7B | FSDP with checkpointing, 512 tokens | 8 A100-80G | 4,099 | 53.5 % | [mosaicml/examples v0.0.4](https://github.com/mosaicml/examples/blob/v0.0.4/examples/llm/throughput/README.md) |
| MPT 7B | FSDP, 2,048 tokens | 8 A100-80G | 4,641 | 64.2 % | [mosaicml/llm-foundry](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md) |
| MPT 7B | FSDP, 2,048 tokens | 8 H100-80G | 10,643 | 46.4 % | [the same](https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md) |
| LLaMA 2 7B | FSDP, 4,096 tokens | 128 A100-80G | 3,700 | 57 % | [IBM and Meta, "Maximizing training throughput using PyTorch FSDP"](https://pytorch.org/blog/maximizing-training/) |
| LLaMA 2 7B | FSDP, 4,096 tokens | 96 H100-80G | 7,500 | 37 % | [the same](https://pytorch.org/blog/maximizing-training/) |
| LLaMA 2 7B | FSDP, torch.compile | 128 A100-80G | | 68 % | [their second part](https://pytorch.org/blog/maximizing-training-throughput/) |
| LLaMA 2 7B | HSDP, 2 rows | 128 A100 | 3,760 | | [fms-fsdp](https://github.com/foundation-model-stack/fms-fsdp/blob/0d319983c4b3b7f7b3b5e2c5e7f746746b6f73a9/README.md) |
| LLaMA 2 70B | FSDP with checkpointing, 6 rows | 128 A100 | 380 | | [the same](https://github.com/foundation-model-stack/fms-fsdp/blob/0d319983c4b3b7f7b3b5e2c5e7f746746b6f73a9/README.md) |
| LLaMA 3.1 8B | FSDP2, selective checkpointing, torch.compile, 2 rows | 8 H100-96G | 6,667 | | [torchtitan, end of 2024](https://github.com/pytorch/torchtitan/blob/31a17bfdb70bab6f62a13d21816a5339b911d6e3/benchmarks/llama3_h100_202412_torchtitan.md) |
| LLaMA 3 70B | LoRA, 2 tensor-parallel x 4 stages, 4,096 tokens | 8 H100-80G | 608 | 17.8 %: 176 of 989 TFLOPS | [NeMo AutoModel](https://github.com/NVIDIA-NeMo/Automodel/blob/01926a5c443b7979463c73341bf64adf79de638e/docs/performance-summary.md) |
"""  # noqa: E501 - Markdown's rows cannot be broken


@dataclass
class Arguments:
    data: str = field(metadata={"help": "file with the raw rows, as tokenize_dataset.py reads them"})
    output: str = field(default="outputs/strategies.md", metadata={"help": "the Markdown file to write"})
    format: str = field(default="alpaca", metadata={"help": "alpaca | mcq | chat"})
    steps: int = field(default=20, metadata={"help": "optimizer steps of a run; the first is left out"})
    batch_size: int = field(default=4, metadata={"help": "rows a step, of each process"})
    max_length: int = field(default=512, metadata={"help": "most tokens of a row; longer ones are left out"})
    lora_dropout: float = field(default=0.0, metadata={"help": "our scripts have 0.05 by default"})
    threads: int = field(default=os.cpu_count(), metadata={"help": "of all processes together"})
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder of a model"})
    tokens: float = field(default=2.5e9, metadata={"help": "tokens of the epoch whose hours are given"})
    peak_flops: float = field(default=0, metadata={"help": "of a device, by its data sheet; 0: measure it"})


def check_arguments(args: Arguments) -> None:
    """Raises ValueError with all mistakes, one a line, with the remedy."""
    mistakes = []
    if args.format not in ("alpaca", "mcq", "chat"):
        mistakes.append(f"--format {args.format}: choose from alpaca, mcq, chat")
    if args.steps < 2:
        mistakes.append(f"--steps {args.steps}: at least 2, since the first is not measured")
    for name in ("batch_size", "threads"):
        if getattr(args, name) < 1:
            mistakes.append(f"--{name} {getattr(args, name)}: at least 1")
    if not Path(args.data).is_file():
        mistakes.append(f"--data {args.data}: no such file; name one of --format {args.format}")
    if not Path(args.output).absolute().parent.is_dir():
        mistakes.append(f"--output {args.output}: no such folder; name a file in one that is there")
    if not (Path(args.model_path) / "config.json").is_file():
        mistakes.append(
            f"--model_path {args.model_path}: no config.json in it; bash scripts/quickstart.sh fetches the sample model"
        )
    if mistakes:
        raise ValueError("\n".join(mistakes))


def list_strategies() -> list[Strategy]:
    if torch.cuda.is_available():
        return STRATEGIES + STRATEGIES_ON_GPUS
    return STRATEGIES


def is_bf16_fast() -> bool:
    """Whether this machine multiplies bf16 faster than float32; the training scripts decide by the same test."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def measure_peak_flops(threads: int, bf16: bool) -> float:
    """FLOPs a second of one device at its best: products of 1024 x 1024 on CPU cores, 8192 x 8192 on a GPU."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        device = "cuda"
        size = 8192
    else:
        device = "cpu"
        size = 1024
    dtype = torch.float32
    if bf16:
        dtype = torch.bfloat16
    matrix = torch.rand(size, size, device=device, dtype=dtype)
    num_products = 20
    seconds = []
    for _ in range(10):  # the clock and what else the machine does vary; the first one also warms up
        started = time.perf_counter()
        for _ in range(num_products):
            matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    del matrix
    torch.cuda.empty_cache()  # the strategies need the memory
    return num_products * 2 * size**3 / min(seconds)


def run_strategy(args: Arguments, strategy: Strategy, processes: int, threads: int, bf16: bool, folder: Path) -> dict:
    """Trains --steps steps on folder/set; returns tokens/s, micro-batch, accumulation and each process's memory.

    Raises:
        ValueError: the script failed.
    """
    num_splits = torch.cuda.device_count() or 2  # processes of the strategies that split the rows among them
    micro_batch = args.batch_size
    accumulation = 1
    if processes == 1:
        accumulation = num_splits
    if strategy.command.startswith("finetune_pp_1f1b.py"):  # each process sees all rows, in small micro-batches
        micro_batch = max(1, args.batch_size // 4)
        accumulation = num_splits * args.batch_size // micro_batch

    output = folder / "run"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += strategy.command.split()
    command += ["--model_path", args.model_path, "--dataset_path", folder / "set", "--output_dir", output]
    command += ["--max_steps", args.steps, "--num_train_epochs", 1]
    command += ["--per_device_train_batch_size", micro_batch, "--gradient_accumulation_steps", accumulation]
    command += ["--bf16", bf16, "--use_cpu", not torch.cuda.is_available()]
    if "LoRA" in strategy.name:
        command += ["--lora_dropout", args.lora_dropout]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(threads)
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"{strategy.name} failed with status {finished.returncode}:\n{finished.stderr[-4000:]}")

    events = EventAccumulator(str(output / "runs")).Reload().Scalars("train/num_input_tokens_seen")
    receipt = json.loads((output / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    seconds = events[-1].wall_time - events[0].wall_time
    return {
        "tokens_per_second": (events[-1].value - events[0].value) / seconds,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "memory": receipt["peak_memory_bytes"],
    }


def count_weights(args: Arguments) -> tuple[int, int, int]:
    """Weights that a token is multiplied with, those of the output layer among them, and those of the adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model_path))
        num_weights = sum(parameter.numel() for parameter in model.parameters())
        num_head = model.get_output_embeddings().weight.numel()
        if not model.config.tie_word_embeddings:
            num_weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
        lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        num_adapter = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
    return num_weights, num_head, num_adapter


def count_flops(strategy: Strategy, weights: tuple[int, int, int], target_share: float) -> tuple[float, float]:
    """FLOPs of a token: the model's own, for MFU, and those that are executed, for HFU."""
    num_weights, num_head, num_adapter = weights
    if "LoRA" in strategy.name:
        per_weight = 4
        model_flops = per_weight * num_weights + 6 * num_adapter
    else:
        per_weight = 6
        model_flops = per_weight * num_weights
    executed_flops = model_flops - per_weight * num_head * (1 - target_share)
    if "checkpointing" in strategy.name:
        executed_flops += 2 * (num_weights - num_head)
    return model_flops, executed_flops


def yes_or_no(value: bool) -> str:
    if value:
        return "yes"
    return "no"


def make_row(args: Arguments, strategy: Strategy, folder: Path, weights: tuple[int, int, int]) -> list[str]:
    """Measures one strategy; returns the cells of its row, in the order of COLUMNS.

    Raises:
        ValueError: the script failed.
    """
    num_gpus = torch.cuda.device_count()
    if strategy.is_one_process:
        processes = 1
        devices = num_gpus or 1
    else:
        processes = num_gpus or 2
        devices = processes
    threads = max(1, args.threads // processes)
    bf16 = is_bf16_fast()
    peak = args.peak_flops or measure_peak_flops(threads, bf16)
    measured = run_strategy(args, strategy, processes, threads, bf16, folder)

    ledger = json.loads((folder / "set" / "ledger.json").read_text(encoding="utf-8"))
    target_share = ledger["targets"] / ledger["tokens"]["kept"]
    model_flops, executed_flops = count_flops(strategy, weights, target_share)
    speed = measured["tokens_per_second"]
    precision = "float32"
    if bf16:
        precision = "bf16"
    return [
        Path(args.model_path).name,
        strategy.name,
        f"{args.tokens / speed / 3600:,.0f}",
        f"up to {args.max_length}",
        str(devices),
        f"{speed * model_flops / devices / peak:.0%}",
        f"{speed * executed_flops / devices / peak:.0%}",
        str(measured["micro_batch"]),
        str(measured["accumulation"]),
        f"{speed:,.0f}",
        f"{speed / devices:,.0f}",
        precision,
        strategy.sharded,
        yes_or_no("checkpointing" in strategy.name),
        yes_or_no("offload" in strategy.name),
        ", ".join(f"{peak_memory / 1e6:,.0f}" for peak_memory in measured["memory"]),
    ]


def make_head(args: Arguments) -> str:
    """What stands above the rows: how they were measured, and the names of the columns."""
    num_gpus = torch.cuda.device_count()
    if num_gpus:
        machine = f"{num_gpus} x {torch.cuda.get_device_name()}"
    else:
        machine = f"{args.threads} CPU cores"
    peak = "measured before each run"
    if args.peak_flops:
        peak = f"{args.peak_flops:g} FLOPs a second of a device"
    words = list(sys.argv)
    if args.data in words:
        words[words.index(args.data)] = Path(args.data).name  # no folders of this machine
    return (
        f"# What each strategy costs, measured\n\n`python {shlex.join(words)}` wrote this.\nMachine: {machine}, the "
        f"peak {peak}; torch {torch.__version__}. Each strategy was run once, {args.steps} steps of\n"
        f"{(num_gpus or 2) * args.batch_size} rows, the first left out; padding-free, so all tokens are real ones. An "
        f"epoch has {args.tokens:g} tokens.\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    )


def make_table(args: Arguments, folder: Path) -> None:
    """Runs every strategy and writes the Markdown table, anew after each row, so that nothing measured is lost."""
    tokenize(args, Path(args.model_path), folder / "set", packing=False)
    weights = count_weights(args)
    head = make_head(args)
    rows = []
    failed = []
    for strategy in list_strategies():
        print(strategy.name, file=sys.stderr, flush=True)
        try:
            cells = make_row(args, strategy, folder, weights)
        except ValueError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            failed.append(strategy.name)
            cells = [Path(args.model_path).name, strategy.name, "failed"]
            cells += [""] * (len(COLUMNS) - len(cells))
        rows.append(f"| {' | '.join(cells)} |\n")
        Path(args.output).write_text(head + "".join(rows) + QUOTED, encoding="utf-8")
    print(Path(args.output).read_text(encoding="utf-8"))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        check_arguments(args)
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            make_table(args, Path(folder))
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")


if __name__ == "__main__":
    main()
