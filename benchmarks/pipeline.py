"""What a pipeline gains and holds: 1F1B against one busy stage at a time, and against GPipe, on CPU processes.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --num_stages 4 --num_micro_batches 16

Starts finetune_pp_1f1b.py by torchrun with one thread a process, on a random LLaMA without a heavy head, so its stages
weigh the same. All runs of a table train an adapter on the same rows. Time: the median over all steps, by the clock
that TensorBoard's file has for each; with one micro-batch on its way (GPipe with one a step) only one stage is busy,
and as many steps as there are micro-batches do the same work. The runs are made in turn, --num_rounds times, so that
what else the machine does falls on all alike. Memory: the peak of each process, where freed memory is given back.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, Features, Sequence, Value
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    num_stages: int = field(default=2, metadata={"help": "processes"})
    num_micro_batches: int = field(default=8, metadata={"help": "of an optimizer step"})
    num_steps: int = field(default=4, metadata={"help": "optimizer steps of a run"})
    num_rounds: int = field(default=3, metadata={"help": "how often each run is made"})
    num_layers: int = field(default=8, metadata={"help": "of the model"})
    hidden_size: int = field(default=256, metadata={"help": "of the model"})
    num_tokens: int = field(default=512, metadata={"help": "of a micro-batch, which is one row"})
    tokenizer_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "any; rows are random"})


def make_parts(args: Arguments, folder: Path) -> None:
    """A random model and enough rows of one length, each token of which but the first is a target."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
        max_position_embeddings=args.num_tokens,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / args.tokenizer_path).save_pretrained(folder / "model")
    rows = torch.randint(3, 1000, (2 * args.num_micro_batches, args.num_tokens)).tolist()
    features = Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")})
    Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features).save_to_disk(folder / "rows")
    (folder / "rows" / "ledger.json").write_text(json.dumps({"sha256": "random"}))


def run(args: Arguments, folder: Path, name: str, schedule: str, num_micro_batches: int, num_steps: int) -> dict:
    """Returns the times of the steps in seconds, and the peak memory of each process in bytes."""
    output_dir = folder / name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.num_stages]
    command += ["finetune_pp_1f1b.py", "--model_path", folder / "model", "--dataset_path", folder / "rows"]
    command += ["--output_dir", output_dir, "--pipeline_schedule", schedule, "--lora_used", "True", "--lora_rank", 1]
    command += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", num_micro_batches]
    command += ["--max_steps", num_steps, "--save_steps", 10**6, "--use_cpu", "True", "--bf16", "False"]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    # Otherwise the C library keeps what was freed, and a peak shows where it came from rather than what was held.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}\n{finished.stderr}")
    events = EventAccumulator(str(output_dir / "runs")).Reload().Scalars("train/loss")
    seconds = []
    for number in range(1, len(events)):
        seconds.append(events[number].wall_time - events[number - 1].wall_time)
    receipt = json.loads((output_dir / "run.json").read_text())
    return {"seconds": seconds, "memory": receipt["peak_memory_bytes"]}


def measure_speed(args: Arguments, folder: Path) -> None:
    """Prints the median of a step of 1F1B, and of as much work with one micro-batch on its way."""
    stages = args.num_stages
    micro_batches = args.num_micro_batches
    overlapped = []
    one_at_a_time = []
    for number in range(args.num_rounds):
        overlapped += run(args, folder, f"1f1b-{number}", "1f1b", micro_batches, args.num_steps)["seconds"]
        # One step more than the last epoch's worth, and the first step is not measured.
        num_steps = (args.num_steps - 1) * micro_batches + 1
        alone = run(args, folder, f"alone-{number}", "gpipe", 1, num_steps)["seconds"]
        for first in range(0, len(alone), micro_batches):
            one_at_a_time.append(sum(alone[first : first + micro_batches]))
    slow = statistics.median(one_at_a_time)
    fast = statistics.median(overlapped)
    ideal = stages * micro_batches / (micro_batches + stages - 1)
    print(f"{stages} stages, {micro_batches} micro-batches of {args.num_tokens} tokens, {os.cpu_count()} cores\n")
    print("| micro-batches on their way | median of a step, s | speed |\n|---|---|---|")
    print(f"| one at a time | {slow:.2f} | 1.00 |")
    print(f"| 1f1b | {fast:.2f} | {slow / fast:.2f} |")
    print(f"| ideal 1f1b: {stages} x {micro_batches} / {micro_batches + stages - 1} | | {ideal:.2f} |\n")


def measure_memory(args: Arguments, folder: Path) -> None:
    """Prints the peak of each stage, for both schedules and two numbers of micro-batches."""
    heads = [f"peak of stage {number + 1}, MiB" for number in range(args.num_stages)]
    print(f"| schedule | micro-batches | {' | '.join(heads)} |")
    print("|---|---|" + "---|" * args.num_stages)
    for schedule in ("1f1b", "gpipe"):
        for count in (args.num_micro_batches, 2 * args.num_micro_batches):
            memory = run(args, folder, f"memory-{schedule}-{count}", schedule, count, 2)["memory"]
            cells = [f"{held / 2**20:.0f}" for held in memory]
            print(f"| {schedule} | {count} | {' | '.join(cells)} |")


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    if args.num_steps < 2 or args.num_rounds < 1:
        sys.exit("error: --num_steps must be at least 2, as the first is not measured, and --num_rounds at least 1")
    with tempfile.TemporaryDirectory() as folder:
        make_parts(args, Path(folder))
        measure_speed(args, Path(folder))
        measure_memory(args, Path(folder))


if __name__ == "__main__":
    main()
