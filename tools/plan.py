"""Says before you rent it what a machine can train: memory, time and price of every strategy of this toolkit.

    python tools/plan.py --model llama-7b --gpus 8 --gpu a100-80g --tokens 2.5e9 --sequence_length 512 --batch 384
    python tools/plan.py --model llama-2-70b --gpus 8 --nodes 64 --batch 4096 --price_per_gpu_hour 2
    python tools/plan.py --model models/SmolLM2-135M-Instruct --gpus 1 --gpu rtx4090 --simulate True
    python tools/plan.py --published True       # the time model against measured rows that others published
    python tools/plan.py --validate quick       # the memory model against real runs on this machine (minutes)

Memory is a formula, which stands line by line in planning/memory.py. It counts what PyTorch holds at the worst moment
of a step, with the optimizer's moments there. What CUDA, NCCL and the allocator take besides is OVERHEAD. Time is a
roofline in planning/speed.py: arithmetic, memory traffic of what is no matrix product, and communication, which hides
behind the arithmetic as far as it fits. Its constants are those in planning/hardware.py, the same for all rows.

--simulate, --published and --validate start the programs in benchmarks/ that compare both with something else.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from planning.hardware import GB, GPU, HARDWARE, GiB, usable
from planning.memory import largest_rows, memory
from planning.models import MODELS, Model, load_model
from planning.speed import times
from planning.strategies import STRATEGIES, Setup, Strategy

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    model: str = field(default="llama-7b", metadata={"help": "a name such as llama-7b, or a config.json or its folder"})
    gpus: int = field(default=8, metadata={"help": "GPUs of one machine"})
    gpu: str = field(default="a100-80g", metadata={"help": f"one of {', '.join(HARDWARE)}"})
    nodes: int = field(default=1, metadata={"help": "machines"})
    tokens: float = field(default=2.5e9, metadata={"help": "tokens of one epoch"})
    sequence_length: int = field(default=512, metadata={"help": "tokens of a row"})
    batch: int = field(default=384, metadata={"help": "rows of one optimizer step, over all GPUs"})
    target_share: float = field(default=1.0, metadata={"help": "share of the tokens that are targets (ledger.json)"})
    padding_free: bool = field(default=True, metadata={"help": "as the scripts' flag: join the rows of a forward"})
    lora_rank: int = field(default=8, metadata={"help": "as the scripts' flag"})
    price_per_gpu_hour: float = field(default=0, metadata={"help": "adds the price of an epoch"})
    output_dir: str | None = field(default=None, metadata={"help": "folder for plan.png; none: no picture"})
    json: bool = field(default=False, metadata={"help": "print JSON instead of the table"})
    simulate: bool = field(default=False, metadata={"help": "check the formula by steps on fake tensors (minutes)"})
    published: bool = field(default=False, metadata={"help": "only the time model against published rows"})
    validate: str = field(default="", metadata={"help": "quick or full: the formula against real runs on this CPU"})


def check_arguments(args: Arguments) -> tuple[Model, GPU]:
    """Raises ValueError with all mistakes, one a line."""
    mistakes = []
    try:
        model = load_model(args.model)
    except ValueError as mistake:
        mistakes.append(str(mistake))
    if args.gpu not in HARDWARE:
        mistakes.append(f"--gpu {args.gpu}: choose from {', '.join(HARDWARE)}")
    for name in ("gpus", "nodes", "tokens", "sequence_length", "batch", "lora_rank"):
        if not 0 < getattr(args, name) < math.inf:
            mistakes.append(f"--{name} {getattr(args, name)}: must be > 0")
    if not 0 < args.target_share <= 1:
        mistakes.append(f"--target_share {args.target_share}: a share above 0, at most 1")
    if not 0 <= args.price_per_gpu_hour < math.inf:
        mistakes.append(f"--price_per_gpu_hour {args.price_per_gpu_hour}: must be >= 0")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        mistakes.append(f"--output_dir {args.output_dir}: it is a file; name a folder")
    if args.validate not in ("", "quick", "full"):
        mistakes.append(f"--validate {args.validate}: choose quick or full")
    if not mistakes and args.batch % (args.gpus * args.nodes):
        mistakes.append(f"--batch {args.batch}: must be a multiple of the {args.gpus * args.nodes} GPUs")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return model, HARDWARE[args.gpu]


def make_setup(args: Arguments, **changes) -> Setup:
    names = ("gpus", "nodes", "sequence_length", "padding_free", "target_share", "lora_rank")
    return Setup(**{name: getattr(args, name) for name in names} | changes)


def plan_row(args: Arguments, model: Model, gpu: GPU, name: str, checkpointing: bool) -> dict:
    """One line of the table: the largest forward that fits and divides the step, its memory, time and price."""
    strategy = STRATEGIES[name]
    is_pipeline = strategy.kind == "pp"
    rows_of_process = args.batch if is_pipeline else args.batch // (args.gpus * args.nodes)
    setup = make_setup(args, checkpointing=checkpointing, nodes=1 if is_pipeline else args.nodes)
    # The most rows are not the fastest: joined rows have one mask, and attention costs the square of their length. With
    # accumulation the gradients stay while the next forward runs, so fewer rows fit than in one forward.
    candidates = []
    for rows in (rows for rows in range(1, rows_of_process + 1) if rows_of_process % rows == 0):
        candidate = replace(setup, rows=rows, accumulation=rows_of_process // rows)
        if memory(model, strategy, candidate)["total"] <= usable(gpu):
            candidates.append((times(model, strategy, candidate, gpu)["step_seconds"], candidate))
    most = largest_rows(model, strategy, setup, gpu)
    if candidates:
        # Of those within 3 % of the fastest the one with most rows: small matrices are less efficient than assumed.
        fastest = min(seconds for seconds, _ in candidates)
        setup = max((c for seconds, c in candidates if seconds <= 1.03 * fastest), key=lambda c: c.rows)
    else:
        setup = replace(setup, accumulation=rows_of_process)
    parts, row = memory(model, strategy, setup), {"strategy": name, "checkpointing": checkpointing}
    row |= {"rows_of_forward": setup.rows, "accumulation": setup.accumulation, "largest_rows_of_forward": most}
    row |= {f"{part}_bytes": round(size) for part, size in parts.items() if part not in ("host", "offloaded")}
    row["host_bytes_per_node"] = round(parts["host"])
    if not candidates:
        return row | {"verdict": "does not fit"}
    speed = times(model, strategy, setup, gpu)
    hours = args.tokens / speed["tokens_per_second_per_gpu"] / (args.gpus * setup.nodes) / 3600
    row |= speed | {"hours": hours, "price": hours * args.gpus * setup.nodes * args.price_per_gpu_hour}
    verdict = "fits" if setup.accumulation == 1 else f"fits with {setup.accumulation} accumulation steps"
    return row | {"verdict": verdict, "command": command(args, strategy, setup)}


def command(args: Arguments, strategy: Strategy, setup: Setup) -> str:
    """What starts the strategy; MODEL is the folder of the weights, DATASET, to be set, that of the tokenized set."""
    model = f"models/{args.model}" if args.model in MODELS else args.model.removesuffix("/config.json")
    parts = [f"MODEL={model}", "DATASET=$DATASET", f"NUM_GPUS={setup.gpus}"]
    if setup.nodes > 1:
        parts += [f"NUM_NODES={setup.nodes}", "NODE_RANK=$NODE_RANK", "MASTER_ADDR=$MASTER_ADDR"]
    parts += [f"sh scripts/{strategy.launcher}", *([strategy.flags] if strategy.flags else [])]
    parts += [f"--per_device_train_batch_size {setup.rows}", f"--gradient_accumulation_steps {setup.accumulation}"]
    parts += [f"--gradient_checkpointing {setup.checkpointing}", f"--padding_free {setup.padding_free}"]
    parts += [f"--lora_rank {setup.lora_rank}"] * strategy.adapter
    return " ".join(parts)


def best_rows(rows: list[dict]) -> list[dict]:
    """The fastest row that trains all weights, and the fastest that trains an adapter, of those that fit."""
    best = []
    for adapter in (False, True):
        fitting = [row for row in rows if "hours" in row and STRATEGIES[row["strategy"]].adapter == adapter]
        best += sorted(fitting, key=lambda row: row["hours"])[:1]
    return best


def scaling(args: Arguments, model: Model, gpu: GPU) -> list[dict]:
    """FSDP over all machines against hybrid sharding, for 1, 2, 4, ... machines up to --nodes, at the same batch."""
    table = []
    for nodes in [2**i for i in range(int(math.log2(args.nodes)) + 1)]:
        rows = max(1, args.batch // (args.gpus * nodes))
        line = {"nodes": nodes, "rows_of_step": rows * args.gpus * nodes}
        options = []  # (hours, machines of a shard group)
        for group in [2**i for i in range(int(math.log2(nodes)) + 1)]:
            for checkpointing in (False, True):
                for micro in (micro for micro in range(1, rows + 1) if rows % micro == 0):
                    setup = make_setup(args, nodes=nodes, checkpointing=checkpointing)
                    setup = replace(setup, rows=micro, accumulation=rows // micro)
                    held = replace(setup, nodes=group)  # a GPU holds what it holds in one group alone
                    if memory(model, STRATEGIES["FSDP"], held)["total"] <= usable(gpu):
                        speed = times(model, STRATEGIES["FSDP"], setup, gpu, shard_nodes=group)
                        seconds = args.tokens / speed["tokens_per_second_per_gpu"] / (args.gpus * nodes)
                        options.append((seconds / 3600, group))
        line["fsdp_hours"] = min((hours for hours, group in options if group == nodes), default=None)
        line["hsdp_hours"], line["hsdp_nodes"] = min((o for o in options if o[1] < nodes), default=(None, None))
        table.append(line)
    return table


def print_plan(args: Arguments, model: Model, gpu: GPU, rows: list[dict]) -> None:
    """The text table, with bytes in GB (10^9), but memory of the GPU in GiB, as its maker counts.

    rows: of one forward, the fastest that fits; most: the most that fit.
    """
    print(f"{args.model}: {model.params / 1e9:.2f} billion parameters; {args.nodes} x {args.gpus} {args.gpu}, "
          f"{usable(gpu) / GiB:.1f} of {gpu.memory / GiB:.0f} GiB usable; {args.batch} rows of "
          f"{args.sequence_length} tokens a step")  # fmt: skip
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    header = f"{'strategy':20}{'ckpt':>5}{'rows':>6}{'most':>6}" + "".join(f"{kind[:8]:>10}" for kind in kinds)
    header += f"{'GPU GiB':>9}{'host GB':>9}{'disk GB':>9}{'sent GB':>9}{'tok/s/GPU':>11}{'MFU':>6}{'hours':>8}"
    print(header + (f"{'price':>10}" if args.price_per_gpu_hour else "") + "  verdict")
    for row in rows:
        line = f"{row['strategy']:20}{'yes' if row['checkpointing'] else 'no':>5}{row['rows_of_forward']:>6}"
        line += f"{row['largest_rows_of_forward']:>6}"
        line += "".join(f"{row[f'{kind}_bytes'] / GiB:>10.1f}" for kind in kinds)
        line += f"{row['total_bytes'] / GiB:>9.1f}{row['host_bytes_per_node'] / GB:>9.0f}{row['disk_bytes'] / GB:>9.1f}"
        if "hours" in row:
            sent = row["link_bytes"] + row["network_bytes"] + row["offload_bytes"]
            line += f"{sent / GB:>9.1f}{row['tokens_per_second_per_gpu']:>11,.0f}{row['mfu']:>6.0%}{row['hours']:>8.1f}"
            line += f"{row['price']:>10,.0f}" if args.price_per_gpu_hour else ""
        else:
            line += " " * (44 if args.price_per_gpu_hour else 34)
        print(f"{line}  {row['verdict']}")
    for row in best_rows(rows):
        what = "an adapter" if STRATEGIES[row["strategy"]].adapter else "all weights"
        print(f"\nfastest for {what}: {row['strategy']}, {row['hours']:.1f} hours an epoch\n  {row['command']}")
    if not best_rows(rows):
        print("\nnothing fits: more GPUs, GPUs with more memory, shorter rows or a smaller model")


def print_scaling(table: list[dict]) -> None:
    print("\nFSDP over all machines, and hybrid sharding (HSDP), for which the scripts have no flag:")
    print("shards over a group of machines, copies over the groups")
    print(f"{'machines':>9}{'rows a step':>13}{'FSDP hours':>12}{'HSDP hours':>12}{'machines of its group':>23}")
    for line in table:
        hours = (f"{line[name]:>12.2f}" if line[name] else f"{'-':>12}" for name in ("fsdp_hours", "hsdp_hours"))
        print(f"{line['nodes']:>9}{line['rows_of_step']:>13}{''.join(hours)}{line['hsdp_nodes'] or '-':>23}")
    paying = [line["nodes"] for line in table if line["hsdp_hours"] and line["hsdp_hours"] < 0.98 * line["fsdp_hours"]]
    if paying:
        print(f"hybrid sharding begins to pay at {paying[0]} machines")


def draw_plan(args: Arguments, gpu: GPU, rows: list[dict], path: Path) -> None:
    """A bar for each strategy, by kind of memory, against the GPU's size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 0.33 * len(rows) + 2), layout="constrained")
    names = [f"{row['strategy']}{', checkpointing' if row['checkpointing'] else ''} ({row['rows_of_forward']} rows)"
             for row in rows]  # fmt: skip
    left = [0.0] * len(rows)
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "buffers"):
        sizes = [row[f"{kind}_bytes"] / GiB for row in rows]
        axis.barh(names, sizes, left=left, label=kind)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axis.axvline(usable(gpu) / GiB, color="black", linestyle="--", label=f"usable of {args.gpu}")
    shown = min(2.2 * gpu.memory / GiB, max(1.25 * gpu.memory / GiB, 1.05 * max(left)))
    axis.set_xlim(0, shown)
    for i, size in enumerate(left):
        if size > shown:
            axis.text(0.99 * shown, i, f"{size:,.0f} GiB", ha="right", va="center", color="white")
    axis.invert_yaxis()
    axis.set_xlabel("GiB on the fullest GPU at the worst moment of a step")
    axis.set_title(f"{args.model} on {args.nodes} × {args.gpus} {args.gpu}")
    axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run_benchmark(name: str, *flags: str, stdout=None) -> int:
    """Starts a program of benchmarks/, which nothing imports; returns its exit status."""
    sys.stdout.flush()
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *flags], stdout=stdout).returncode


def main() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        model, gpu = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    if args.published:
        sys.exit(run_benchmark("plan_published.py"))
    if args.validate:
        sys.exit(run_benchmark("plan_validation.py", args.validate))
    rows = [plan_row(args, model, gpu, name, ckpt) for name in STRATEGIES for ckpt in (False, True)]
    table = scaling(args, model, gpu) if args.nodes > 1 else []
    if args.json:
        print(json.dumps({"parameters": model.params, "usable_bytes": usable(gpu), "rows": rows, "scaling": table,
                          "best": [row["command"] for row in best_rows(rows)]}, indent=2))  # fmt: skip
    else:
        print_plan(args, model, gpu, rows)
        if table:
            print_scaling(table)
    if args.output_dir:
        draw_plan(args, gpu, rows, Path(args.output_dir) / "plan.png")
    if args.simulate:
        names = ("model", "gpus", "nodes", "sequence_length", "lora_rank")
        flags = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
        sys.exit(run_benchmark("plan_simulation.py", *flags, stdout=sys.stderr if args.json else None))


if __name__ == "__main__":
    main()
