"""Says before you rent it what a machine can train: memory, time and price of every strategy of this toolkit.

    python tools/plan.py --model llama-3-8b --gpus 8 --gpu a100-80g --tokens 2.5e9 --sequence_length 2048 --batch 128
    python tools/plan.py --model llama-3-70b --gpus 8 --nodes 4 --network 100gbe --batch 512 --all True
    python tools/plan.py --model llama-3-8b --strategy dpo --batch 64        # preferences: a row is a pair of answers

Questions:
    python tools/plan.py --ask models --gpu rtx4090 --gpus 1              # what can I train on this card
    python tools/plan.py --ask context --model qwen3-8b --gpu l40s --gpus 2                  # the largest context
    python tools/plan.py --ask gpus --model llama-3-70b --gpu h100-80g --deadline 48         # how many GPUs
    python tools/plan.py --model llama-3-8b --gpu all --gpus 1,2,4,8 --deadline 24 --budget 500     # the cheapest way

The default answer is the three best ways, each with its command. --all True shows every way in a table, --json True
all that is known, --output_dir draws a picture.

Any card: --gpu_memory 48 --gpu_flops 180 --gpu_bandwidth 960 (GiB, TFLOPS, GB/s), the CPU of this machine: --gpu cpu,
and a machine that tools/doctor.py measured: --machine machine.json. --link says what connects the cards of a machine.

One description of what a decoder layer computes (planning/kernels.py) gives memory (planning/memory.py) and time
(planning/speed.py). The figures of hardware and their sources stand in planning/hardware.py; --list True prints them.
How far published runs are from this is measured by benchmarks/plan_published.py, which --published True starts, and by
benchmarks/plan_validation.py (--validate quick) and benchmarks/plan_simulation.py (--simulate True).
"""

import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from paths import expand_home
from planning import search, show
from planning.hardware import (
    DISKS,
    GB,
    GPU,
    GPUS,
    HOST_LINKS,
    LINKS,
    NETWORKS,
    PCIE4,
    PCIE_OVERLAP_LOSS,
    TFLOPS,
    GiB,
    Link,
    Machine,
    read_gpu,
    read_prices,
)
from planning.models import MATRICES, MODELS, load_model
from planning.search import Job
from planning.strategies import ATTENTION, PREFERENCES, STRATEGIES, SUPERVISED, Setup

ROOT = Path(__file__).resolve().parent.parent
PRICES = Path(__file__).resolve().parent / "planning" / "prices.csv"
QUESTIONS = ("best", "models", "context", "gpus")


@dataclass
class Arguments:
    model: str = field(default="llama-7b", metadata={"help": "a name such as llama-3-8b, a folder, or a hub id"})
    gpu: str = field(default="a100-80g", metadata={"help": "kinds by commas, all, or cpu; --list True shows them"})
    gpus: str = field(default="8", metadata={"help": "GPUs of one machine; several numbers by commas"})
    nodes: str = field(default="1", metadata={"help": "machines; several numbers by commas"})
    tokens: float = field(default=2.5e9, metadata={"help": "tokens of the whole training"})
    sequence_length: int = field(default=512, metadata={"help": "tokens of a row, which is one document"})
    batch: int = field(default=384, metadata={"help": "rows of one optimizer step, over all GPUs"})
    target_share: float = field(default=1.0, metadata={"help": "share of the tokens that are targets (ledger.json)"})
    ask: str = field(default="best", metadata={"help": f"{' | '.join(QUESTIONS)}"})
    deadline: float = field(default=0, metadata={"help": "hours that the training may take; 0: any"})
    budget: float = field(default=0, metadata={"help": "dollars that it may cost; 0: any"})
    prices: str = field(default=str(PRICES), metadata={"help": "CSV file with gpu,dollars_per_hour"})
    price_per_gpu_hour: float = field(default=0, metadata={"help": "dollars, instead of --prices, for all kinds"})
    strategy: str = field(default="all", metadata={"help": "names by commas, such as FSDP,QLoRA; all, full, lora, dpo"})
    rows: int = field(default=0, metadata={"help": "rows of one forward; 0: the fastest that fit"})
    accumulation: int = field(default=0, metadata={"help": "forwards of an optimizer step; 0: by --batch"})
    checkpointing: str = field(default="auto", metadata={"help": "auto | True | False"})
    attention: str = field(default="auto", metadata={"help": " | ".join(ATTENTION)})
    torch_compile: bool = field(default=False, metadata={"help": "as the scripts' flag"})
    padding_free: bool = field(default=True, metadata={"help": "as the scripts' flag: join the rows of a forward"})
    lora_rank: int = field(default=8, metadata={"help": "as the scripts' flag"})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "as the scripts' flag"})
    optimizer_bytes: float = field(default=8, metadata={"help": "of the optimizer's state for a trained weight"})
    network: str = field(default="ib-200", metadata={"help": "between machines: a name, or GB/s for each GPU"})
    link: str = field(default="auto", metadata={"help": "between GPUs of a machine: a name, or GB/s; auto: --list"})
    host_link: str = field(default="pcie4", metadata={"help": "offload: a name, or GB/s for each GPU"})
    host_memory: float = field(default=0, metadata={"help": "GB of a machine; 0: 128 for each of its GPUs"})
    disk: str = field(default="nvme", metadata={"help": "for checkpoints: a name, or GB/s"})
    gpu_memory: float = field(default=0, metadata={"help": "GiB of a card of your own"})
    gpu_flops: float = field(default=0, metadata={"help": "its dense bf16 TFLOPS"})
    gpu_bandwidth: float = field(default=0, metadata={"help": "its memory's GB/s"})
    machine: str | None = field(default=None, metadata={"help": "JSON that tools/doctor.py --json wrote"})
    all: bool = field(default=False, metadata={"help": "the whole table"})
    json: bool = field(default=False, metadata={"help": "print JSON instead of text"})
    output_dir: str | None = field(default=None, metadata={"help": "folder for plan.png; none: no picture"})
    list: bool = field(default=False, metadata={"help": "only print GPUs, networks and models, with their sources"})
    simulate: bool = field(default=False, metadata={"help": "check the memory by steps on fake tensors (minutes)"})
    published: bool = field(default=False, metadata={"help": "only compare with published runs"})
    validate: str = field(default="", metadata={"help": "quick, full or sample: compare with real runs on this CPU"})


# -------------------------------------------------------------------------------------------------------------------
# What can be wrong with flags
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """What the flags come down to."""

    job: Job
    machines: list[tuple[str, Machine]]
    prices: dict[str, float]


def check_arguments(args: Arguments) -> Question:
    """Raises ValueError with all mistakes, one a line."""
    mistakes = check_numbers(args) + check_choices(args)

    def attempt(name: str, action):
        try:
            return action(args)
        except ValueError as problem:
            mistakes.append(f"--{name} {getattr(args, name)}: {problem}")

    model = attempt("model", lambda args: load_model(args.model))
    custom = attempt("gpu_memory", read_card)
    counts = attempt("gpus", lambda args: read_numbers(args.gpus))
    nodes = attempt("nodes", lambda args: read_numbers(args.nodes))
    link = attempt("link", lambda args: read_link(args.link))
    network = attempt("network", lambda args: read_speed(args.network, NETWORKS))
    host_link = attempt("host_link", lambda args: read_speed(args.host_link, HOST_LINKS))
    disk = attempt("disk", lambda args: read_speed(args.disk, DISKS))
    strategies = attempt("strategy", lambda args: read_strategies(args.strategy))
    targets = attempt("lora_target_modules", lambda args: read_targets(args.lora_target_modules))
    prices = attempt("prices", lambda args: read_prices(args.prices))
    measured = attempt("machine", lambda args: read_machine(args.machine))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    base = Machine(GPUS["a100-80g"], network=network, host_link=host_link, disk=disk, host_memory=args.host_memory * GB)
    custom.update(measured.gpus)
    for name, speed in measured.speeds.items():
        if getattr(args, name, None) == getattr(Arguments, name, None):  # what the user says counts more
            base = replace(base, **{name: speed})
    gpus = attempt("gpu", lambda args: read_gpus(args.gpu, custom))
    if gpus:
        mistakes += find_contradictions(args, gpus, counts, nodes, link)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if gpus == ["cpu"] and "cpu" not in custom:
        custom["cpu"] = measure_this_cpu(model, max(counts))
        base = replace(base, cores=os.cpu_count())
    machines = search.list_machines(gpus, counts, nodes, base, custom)
    if link:
        machines = [(name, replace(machine, gpu=replace(machine.gpu, link=link))) for name, machine in machines]
    machines = [(name, machine) for name, machine in machines if args.batch % machine.num_gpus == 0]
    if not machines:
        raise ValueError(f"--batch {args.batch}: must be a multiple of the number of GPUs, {args.gpus} x {args.nodes}")
    if args.price_per_gpu_hour:
        prices = dict.fromkeys(gpus, args.price_per_gpu_hour)
    return Question(make_job(args, model, strategies, targets, gpus == ["cpu"]), machines, prices)


def check_numbers(args: Arguments) -> list[str]:
    mistakes = []
    for name in ("tokens", "sequence_length", "batch", "lora_rank", "optimizer_bytes"):
        if not 0 < getattr(args, name) < math.inf:
            mistakes.append(f"--{name} {getattr(args, name)}: must be > 0")
    for name in ("deadline", "budget", "rows", "accumulation", "price_per_gpu_hour", "host_memory"):
        if not 0 <= getattr(args, name) < math.inf:
            mistakes.append(f"--{name} {getattr(args, name)}: must be >= 0")
    if not 0 < args.target_share <= 1:
        mistakes.append(f"--target_share {args.target_share}: a share above 0, at most 1")
    return mistakes


def check_choices(args: Arguments) -> list[str]:
    mistakes = []
    choices = {
        "ask": QUESTIONS,
        "attention": ATTENTION,
        "checkpointing": ("auto", "True", "False"),
        "validate": ("", "quick", "full", "sample"),
    }
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            mistakes.append(f"--{name} {getattr(args, name)}: choose from {', '.join(filter(None, allowed))}")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        mistakes.append(f"--output_dir {args.output_dir}: it is a file; name a folder")
    return mistakes


def find_contradictions(
    args: Arguments, gpus: list[str], counts: list[int], nodes: list[int], link: Link | None
) -> list[str]:
    """Flags that are right by themselves and make no sense together."""
    mistakes = []
    if "cpu" in gpus and len(gpus) > 1:
        mistakes.append(f"--gpu {args.gpu}: ask about the CPU by itself")
    if link and "cpu" in gpus:
        mistakes.append(f"--link {link.name}: processes on a CPU exchange through its memory")
    if link and link.name == "nvlink-bridge" and max(counts) > 2:
        mistakes.append(f"--link {link.name}: it joins two GPUs, not {max(counts)}")
    if args.ask != "best" and len(gpus) * len(counts) * len(nodes) > 1:
        mistakes.append(f"--ask {args.ask}: name one kind of GPU, and one number for --gpus and --nodes")
    return mistakes


def read_numbers(text: str) -> list[int]:
    numbers = []
    for part in str(text).split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise ValueError("a number above 0, or several by commas")
        numbers.append(int(part))
    return numbers


def read_speed(text: str, presets: dict[str, tuple[float, str]]) -> float:
    """Bytes/s of a preset's name, or of a number in GB/s."""
    if text in presets:
        return presets[text][0]
    try:
        speed = float(text) * GB
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise ValueError(f"a number of GB/s above 0, or one of {', '.join(presets)}")
    return speed


def read_link(text: str) -> Link | None:
    """A link by its name, or by what two GPUs exchange, one way; None for that of the card."""
    if text == "auto":
        return None
    if text in LINKS:
        return LINKS[text]
    speed = read_speed(text, {name: (link.speed, link.source) for name, link in LINKS.items()})
    return Link(f"{text} GB/s", speed, "the command line", share=1.0, overlap_loss=PCIE_OVERLAP_LOSS)


def read_strategies(text: str) -> tuple[str, ...]:
    if text == "all":  # of supervised fine-tuning
        return SUPERVISED
    if text == "dpo":
        return PREFERENCES
    if text in ("full", "lora"):
        return tuple(name for name in SUPERVISED if STRATEGIES[name].adapter == (text == "lora"))
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in STRATEGIES:
            known = ["all", "full", "lora", "dpo", *STRATEGIES]
            raise ValueError(f"{suggest(name, known)}choose from {', '.join(known)}")
    return names


def read_targets(text: str) -> tuple[str, ...]:
    if text == "all-linear":
        return MATRICES
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in MATRICES:
            raise ValueError(f"choose all-linear, or from {', '.join(MATRICES)}")
    return names


def read_card(args: Arguments) -> dict[str, GPU]:
    """A card that the user describes, under the name custom; nothing if it is not described."""
    given = (args.gpu_memory, args.gpu_flops, args.gpu_bandwidth)
    if not any(given):
        return {}
    if not all(0 < number < math.inf for number in given):
        raise ValueError(
            "a card of your own needs all three: --gpu_memory GiB, --gpu_flops TFLOPS, --gpu_bandwidth GB/s"
        )
    # The shares are those of cards with GDDR memory.
    card = GPU(
        flops=args.gpu_flops * TFLOPS,
        memory_bandwidth=args.gpu_bandwidth * GB,
        memory=args.gpu_memory * GiB,
        link=PCIE4,
        product_share=0.75,
        attention_share=0.5,
        source="the command line",
    )
    return {"custom": card}


@dataclass
class Measured:
    """What tools/doctor.py measured."""

    gpus: dict[str, GPU]
    speeds: dict[str, float]  # fields of Machine


def read_machine(path: str | None) -> Measured:
    """Raises ValueError if the file is not what tools/doctor.py --json writes."""
    if path is None:
        return Measured({}, {})
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
        name = "measured"
        gpu = measured["gpu"]
        if not gpu:
            name = "cpu"
            gpu = measured["cpu"]
        if not isinstance(gpu["link"], dict):
            raise ValueError("an older version wrote it; measure again")
        gpu = read_gpu(gpu)
        replace(Machine(gpu), **measured["speeds"])  # it takes them all
        return Measured({name: gpu}, measured["speeds"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"not a file that tools/doctor.py --json writes ({problem})") from None


def read_gpus(text: str, custom: dict[str, GPU]) -> list[str]:
    """Names of kinds; a described or a measured card takes the default's place."""
    if text == "a100-80g" and custom:
        return list(custom)
    if text == "all":
        return [name for name in (*custom, *GPUS) if name != "cpu"]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in GPUS and name not in custom and name != "cpu":
            known = ["all", "cpu", *custom, *GPUS]
            question = suggest(name, known)
            raise ValueError(f"{question}choose from {', '.join(known)}; or describe a card by --gpu_memory")
    return names


def suggest(name: str, known: list[str]) -> str:
    """The known names that have the letters of this one in them or are close to it."""
    close = [other for other in known if name.lower() in other.lower()]
    close = close or get_close_matches(name.lower(), known, n=2)
    if not close:
        return ""
    return f"is it {' or '.join(close)}? else "


def measure_this_cpu(model, processes: int) -> GPU:
    from planning.measure import measure_cpu  # imports torch, which the rest does not need

    print("measuring this machine's CPU", file=sys.stderr, flush=True)
    return measure_cpu(model, processes)


def make_job(args: Arguments, model, strategies, targets, on_cpu: bool) -> Job:
    checkpointing = None
    if args.checkpointing != "auto":
        checkpointing = args.checkpointing == "True"
    setup = Setup(
        sequence_length=args.sequence_length,
        padding_free=args.padding_free,
        target_share=args.target_share,
        attention=args.attention,
        compiled=args.torch_compile,
        lora_rank=args.lora_rank,
        lora_targets=targets,
        optimizer_bytes=args.optimizer_bytes,
        on_cpu=on_cpu,
    )
    return Job(
        name=args.model,
        model=model,
        setup=setup,
        batch=args.batch,
        tokens=args.tokens,
        strategies=strategies,
        rows=args.rows,
        accumulation=args.accumulation,
        checkpointing=checkpointing,
    )


# -------------------------------------------------------------------------------------------------------------------
# Answers
# -------------------------------------------------------------------------------------------------------------------


def answer_best(args: Arguments, question: Question) -> None:
    """The best ways, or the cheapest of those within --deadline and --budget."""
    job = question.job
    ways = search.all_ways(job, question.machines, question.prices)
    has_limits = args.deadline > 0 or args.budget > 0
    good = search.within(ways, args.deadline, args.budget)
    best = search.three_best(good, by_price=has_limits)
    table = []
    last = question.machines[-1]
    if last[1].nodes > 1:
        table = search.scaling(job, *last)
    if args.output_dir:
        show.draw(job, ways, Path(args.output_dir) / "plan.png")
    if args.json:
        print_json(job, ways, best, table)
        return
    print(show.headline(job))
    if args.all:
        show.print_all(ways)
    if best:
        show.print_best(job, best)
    elif has_limits and search.within(ways, 0, 0):
        print_missed(job, ways, args)
    else:
        print("\nnothing fits: more GPUs, GPUs with more memory, shorter rows or a smaller model")
    if table and args.all:
        show.print_scaling(table)


def print_missed(job: Job, ways: list[search.Way], args: Arguments) -> None:
    """Nothing keeps the limits: what comes nearest to each."""
    ranked = search.best_of_each(ways)
    print(f"\nnothing ends within --deadline {args.deadline:g} hours and --budget {args.budget:g} dollars; the fastest "
          "way, and the cheapest:")  # fmt: skip
    cheapest = min(ranked, key=lambda way: way.price)
    show.print_best(job, [ranked[0], cheapest])


def print_json(job: Job, ways: list[search.Way], best: list[search.Way], table: list[dict]) -> None:
    result = {
        "model": job.name,
        "parameters": job.model.params,
        "rows": [search.to_json(way, show.command(job, way)) for way in ways],
        "best": [search.to_json(way, show.command(job, way)) for way in best],
        "scaling": table,
    }
    print(json.dumps(result, indent=2))


def answer_models(args: Arguments, question: Question) -> None:
    gpu, machine = question.machines[0]
    models = MODELS
    if args.model != "llama-7b":  # not the default
        models = {args.model: question.job.model}
    table = search.trainable(question.job, models, gpu, machine)
    if args.json:
        print(json.dumps({name: best for name, _, best in table}, indent=2))
        return
    print(f"what {machine.nodes} x {machine.gpus} {gpu} can train")
    show.print_trainable(table)


def answer_context(args: Arguments, question: Question) -> None:
    gpu, machine = question.machines[0]
    found = search.contexts(question.job, gpu, machine)
    if args.json:
        rows = [{"strategy": name, "checkpointing": ckpt, "tokens": length} for name, ckpt, length in found]
        print(json.dumps(rows, indent=2))
        return
    print(f"{args.model} on {machine.nodes} x {machine.gpus} {gpu}")
    show.print_contexts(found)


def answer_gpus(args: Arguments, question: Question) -> None:
    gpu, machine = question.machines[0]
    price = question.prices.get(gpu, 0.0)
    table = search.how_many_gpus(question.job, gpu, machine, price, args.deadline)
    if args.json:
        rows = []
        for name, fewest, in_time in table:
            row = {"strategy": name, "fewest_gpus": None, "gpus_for_deadline": None}
            if fewest:
                row["fewest_gpus"] = fewest.machine.num_gpus
            if in_time:
                row["gpus_for_deadline"] = in_time.machine.num_gpus
            rows.append(row)
        print(json.dumps(rows, indent=2))
        return
    print(f"{show.headline(question.job)}; machines of {machine.gpus} {gpu}")
    show.print_gpu_counts(table, args.deadline)


def print_lists() -> None:
    """Everything that has a name, with its source."""
    print(f"{'GPU':12}{'TFLOPS':>8}{'GB/s':>7}{'GiB':>7}{'link':>17}{'products':>10}{'attention':>11}  source")
    for name, gpu in GPUS.items():
        line = f"{name:12}{gpu.flops / TFLOPS:>8.0f}{gpu.memory_bandwidth / GB:>7.0f}{gpu.memory / GiB:>7.1f}"
        line += f"{gpu.link.name:>17}{gpu.product_share:>10.0%}{gpu.attention_share:>11.0%}  {gpu.source}"
        print(line)
    print(f"\n{'--link':16}{'GB/s':>4}")
    for name, link in LINKS.items():
        print(f"{name:16}{link.speed / GB:>4.0f}  {link.source}")
    for title, presets in (("--network", NETWORKS), ("--host_link", HOST_LINKS), ("--disk", DISKS)):
        print(f"\n{title:12}{'GB/s':>8}")
        for name, (speed, source) in presets.items():
            print(f"{name:12}{speed / GB:>8.2f}  {source}")
    print()
    print("\n".join(textwrap.wrap("models: " + ", ".join(MODELS), width=118, subsequent_indent="  ")))


def run_benchmark(name: str, *flags: str, is_json: bool = False) -> int:
    """Starts a program of benchmarks/, which nothing imports; returns its exit status."""
    sys.stdout.flush()
    stdout = None
    if is_json:  # JSON stays alone in its stream
        stdout = sys.stderr
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / name), *flags], stdout=stdout).returncode


def main() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        if args.list:
            return print_lists()
        if args.published:
            sys.exit(run_benchmark("plan_published.py"))
        question = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    if args.validate:
        sys.exit(run_benchmark("plan_validation.py", args.validate))
    answers = {"best": answer_best, "models": answer_models, "context": answer_context, "gpus": answer_gpus}
    answers[args.ask](args, question)
    if args.simulate:
        _, machine = question.machines[0]
        flags = ["--model", args.model, "--gpus", str(machine.gpus), "--nodes", str(machine.nodes)]
        flags += ["--sequence_length", str(args.sequence_length), "--lora_rank", str(args.lora_rank)]
        sys.exit(run_benchmark("plan_simulation.py", *flags, is_json=args.json))


if __name__ == "__main__":
    main()
