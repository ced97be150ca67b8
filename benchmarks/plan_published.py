"""Compares the time and memory that tools/plan.py predicts with what others measured and published.

    python benchmarks/plan_published.py                  # by kind: the errors of this version and of commit 49add2e
    python benchmarks/plan_published.py --rows True      # and row by row
    python benchmarks/plan_published.py --write True     # writes tools/planning/errors.json, which plan.py shows

benchmarks/published_runs.csv holds the rows, each with its setting as far as the source states it. A row is `known` if
the source states the whole setting. Columns time and memory_counts say whether the row counts in the statistics: others
are runs of programs that do something else, as their note says. Constants of the plan were chosen for the known rows of
this file together, so its errors are those of a fit, not of a test.

benchmarks/published_runs_more.csv is the test: what else the same sources publish, but for models below a billion
parameters, and for fp8. Of its 155 speeds the plan of commit b497a92, which had met none of them, missed half by at
most 4.7 %, and nine of ten by at most 25 %. 28 of them then showed which constant or formula was wrong; column fitted
names them, and that they fit now is no proof. The others are as they were.

Memory is compared with what the source states: allocated is PyTorch's max_memory_allocated, reserved what its allocator
took, and nvidia-smi the rest of the process, too. Commit 49add2e printed only the first; its column here has its own
allowances added (2 GiB, and a twentieth) for the other two.
"""

import csv
import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.hardware import GPUS, HOST_LINKS, LINKS, NETWORKS, GiB, Machine, nvidia_smi_bytes, reserved_bytes
from planning.memory import memory
from planning.models import MATRICES, MODELS, Model, llama
from planning.speed import speed
from planning.strategies import STRATEGIES, Setup, Strategy

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(__file__).resolve().parent / "published_runs.csv"
MORE_RUNS = Path(__file__).resolve().parent / "published_runs_more.csv"
ERRORS = ROOT / "tools" / "planning" / "errors.json"
LARGEST_TABLE = "MosaicML llm-foundry README"  # from which most of them come: full training with FSDP
FEWEST = 4  # rows of a kind for which the plan shows a range of its own

# Shapes that users of the toolkit need not know. MPT's two matrices of 4 h each count like three of 8/3 h.
OTHER_MODELS = {
    "tiny-llama": MODELS["tinyllama-1.1b"],
    "qwen-1.8b": llama(2048, 5504, 24, 16, 16, 151936),
    "qwen-7b": llama(4096, 11008, 32, 32, 32, 151936),
    "qwen-14b": llama(5120, 13696, 40, 40, 40, 152064),
    "qwen-72b": llama(8192, 24576, 80, 64, 64, 152064),
    "mpt-1b": llama(2048, 5461, 24, 16, 16, 50432, tied=True),
    "mpt-3b": llama(2560, 6827, 32, 20, 20, 50432, tied=True),
    "mpt-7b": llama(4096, 10923, 32, 32, 32, 50432, tied=True),
    "mpt-13b": llama(5120, 13653, 40, 40, 40, 50432, tied=True),
    "mpt-30b": llama(7168, 19115, 48, 56, 56, 50432, tied=True),
    "mpt-70b": llama(8192, 21845, 80, 64, 64, 50432, tied=True),
    "codellama-34b": llama(8192, 22016, 48, 64, 8, 32000),
    "falcon-7b": llama(4544, 12117, 32, 71, 1, 65024, tied=True, head_dim=64),
}
# Strategies of others.
OTHER_STRATEGIES = {"QLoRA, ZeRO-3": Strategy("zero3", launcher="", adapter=True, four_bit=True)}


@dataclass
class Arguments:
    rows: bool = field(default=False, metadata={"help": "also print every row"})
    write: bool = field(default=False, metadata={"help": "write tools/planning/errors.json"})


@dataclass(frozen=True)
class Run:
    """A published row and what the plan says about it."""

    row: dict[str, str]
    speed: float  # tokens/s of a GPU, predicted
    memory: float  # GiB, predicted, of the kind that the source states

    @property
    def kind(self) -> str:
        return self.row["kind"]

    @property
    def is_known(self) -> bool:
        return self.row["known"] == "yes"

    @property
    def speed_error(self) -> float | None:
        """Predicted by published, less 1; None if the row has no speed or does not count."""
        if not self.row["speed"] or self.row["time"] != "yes":
            return None
        return self.speed / float(self.row["speed"]) - 1

    @property
    def memory_error(self) -> float | None:
        if not self.row["memory"] or self.row["memory_counts"] != "yes":
            return None
        return self.memory / float(self.row["memory"]) - 1

    @property
    def is_fitted(self) -> bool:
        """Whether a constant or a formula was chosen for this row, too."""
        return self.row.get("fitted", "yes") == "yes"

    @property
    def old_speed_error(self) -> float | None:
        if self.speed_error is None:
            return None
        return float(self.row["old_speed"]) / float(self.row["speed"]) - 1

    @property
    def old_memory_error(self) -> float | None:
        if self.memory_error is None:
            return None
        old = float(self.row["old_memory"])
        if self.row["memory_kind"] != "allocated":
            old = old / 0.95 + 2
        return old / float(self.row["memory"]) - 1


def read_setup(row: dict[str, str]) -> Setup:
    targets = MATRICES
    if row["lora_targets"] != "all-linear":
        targets = tuple(row["lora_targets"].split(","))
    return Setup(
        gpus=int(row["gpus"]),
        nodes=int(row["nodes"]),
        shard_nodes=int(row["shard_nodes"]),
        rows=int(row["rows"]),
        accumulation=int(row["accumulation"]),
        sequence_length=int(row["sequence_length"]),
        checkpointing=row["checkpointing"] == "True",
        # Joined rows have logits in chunks; others have all logits, or none where a run computes its loss in chunks.
        padding_free=row["chunked_loss"] == "True",
        chunked_loss=row["chunked_loss"] == "True",
        has_mask=row["has_mask"] == "True",
        attention=row["attention"],
        compiled=row["compiled"] == "True",
        lora_rank=int(row["lora_rank"]),
        lora_targets=targets,
        weight_bytes=int(row["weight_bytes"]),
        optimizer_bytes=float(row["optimizer_bytes"]),
        reduce_bytes=int(row["reduce_bytes"]),
        zero_gradient_bytes=2,  # DeepSpeed's default in bf16
        logit_bytes=int(row["logit_bytes"]),
        kept_inputs=int(row["kept_inputs"]),
    )


def find_model(name: str) -> Model:
    if name in OTHER_MODELS:
        return OTHER_MODELS[name]
    return MODELS[name]


def find_strategy(name: str) -> Strategy:
    if name in OTHER_STRATEGIES:
        return OTHER_STRATEGIES[name]
    return STRATEGIES[name]


def predict(row: dict[str, str]) -> Run:
    model = find_model(row["model"])
    strategy = find_strategy(row["strategy"])
    setup = read_setup(row)
    gpu = GPUS[row["gpu"]]
    if row["link"] != "auto":
        gpu = replace(gpu, link=LINKS[row["link"]])
    machine = Machine(
        gpu=gpu,
        gpus=setup.gpus,
        nodes=setup.nodes,
        network=NETWORKS[row["network"]][0],
        host_link=HOST_LINKS[row["host_link"]][0],
    )
    held = memory(model, strategy, setup).total
    if row["memory_kind"] == "reserved":
        held = reserved_bytes(held)
    elif row["memory_kind"] == "nvidia-smi":
        held = nvidia_smi_bytes(held, gpu, setup.num_gpus)
    tokens_per_second = speed(model, strategy, setup, machine).tokens_per_second_per_gpu
    return Run(row, tokens_per_second, held / GiB)


def read_runs(path: Path = RUNS) -> list[Run]:
    with open(path, encoding="utf-8", newline="") as file:
        return [predict(row) for row in csv.DictReader(file)]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    values = sorted(values)
    number = max(0, min(len(values) - 1, round(share * len(values) + 0.5) - 1))
    return values[number]


def describe(errors: list[float | None]) -> str:
    """Median and 90th percentile of the errors' sizes."""
    sizes = [abs(error) for error in errors if error is not None]
    if not sizes:
        return f"{'':>8}{'':>7}"
    return f"{statistics.median(sizes):>8.1%}{percentile(sizes, 0.9):>7.0%}"


def print_kinds(title: str, runs: list[Run], has_old: bool = True) -> None:
    """One line a kind: how many rows, and the errors of time and memory, before (if they are known) and now."""
    width = 17
    heads = f"{'median':>11}{'p90':>6}"
    if has_old:
        width = 34
        heads = f"{'old median':>11}{'p90':>6}{'new median':>11}{'p90':>6}"
    print(f"\n{title}")
    print(f"{'':26}{'--- time ' + '-' * (width - 4):{width + 10}}{'--- memory ' + '-' * (width - 6)}")
    print(f"{'kind':26}{'rows':>5}{heads}{'rows':>9}{heads}")
    kinds = dict.fromkeys(run.kind for run in runs)
    groups = [("all", runs)]
    for kind in kinds:
        groups.append((kind, [run for run in runs if run.kind == kind]))
    for name, group in groups:
        num_speeds = sum(run.speed_error is not None for run in group)
        num_memories = sum(run.memory_error is not None for run in group)
        if num_speeds + num_memories == 0:
            continue
        line = f"{name:26}{num_speeds or '':>5}"
        if has_old:
            line += f"{describe([run.old_speed_error for run in group]):>17}"
        line += f"{describe([run.speed_error for run in group]):>17}"
        line += f"{num_memories or '':>9}"
        if has_old:
            line += f"{describe([run.old_memory_error for run in group]):>17}"
        line += f"{describe([run.memory_error for run in group]):>17}"
        print(line.rstrip())


def print_rows(runs: list[Run]) -> None:
    print(f"\n{'row':6}{'setting':66}{'tokens/s/GPU':>13}{'plan':>8}{'error':>7}{'GiB':>7}{'plan':>7}{'error':>7}")
    for run in runs:
        row = run.row
        line = f"{row['id']:6}{row['setting'][:64]:66}"
        if row["speed"]:
            line += f"{float(row['speed']):>13,.0f}{run.speed:>8,.0f}{run.speed / float(row['speed']) - 1:>+7.0%}"
        else:
            line += " " * 28
        if row["memory"]:
            line += f"{float(row['memory']):>7.1f}{run.memory:>7.1f}{run.memory / float(row['memory']) - 1:>+7.0%}"
        remark = ""
        if not run.is_known:
            remark = "  setting not fully known"
        if run.speed_error is None and run.memory_error is None:
            remark = "  not counted"
        print(line.rstrip() + remark)


def make_ranges(runs: list[Run], more_runs: list[Run]) -> dict:
    """For each kind with enough rows, and for all: what was measured by what is predicted, 10th to 90th percentile.

    Of all counted rows, whether their setting is fully known or not: a user does not know all of it beforehand either.
    `all` leaves out more_runs, since most of them are of one kind and one source.
    """
    ranges = {"time": {}, "memory": {}}
    kinds = ["all", *dict.fromkeys(run.kind for run in runs + more_runs)]
    for kind in kinds:
        group = runs
        if kind != "all":
            group = [run for run in runs + more_runs if run.kind == kind]
        times = [1 + run.speed_error for run in group if run.speed_error is not None]  # seconds: measured / predicted
        memories = [1 / (1 + run.memory_error) for run in group if run.memory_error is not None]
        for name, ratios in (("time", times), ("memory", memories)):
            if len(ratios) >= FEWEST:
                ranges[name][kind] = {
                    "rows": len(ratios),
                    "low": round(percentile(ratios, 0.1), 3),
                    "high": round(percentile(ratios, 0.9), 3),
                }
    return ranges


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    runs = read_runs()
    more_runs = read_runs(MORE_RUNS)
    if args.rows:
        print_rows(runs + more_runs)
    print_kinds("rows whose setting is fully known", [run for run in runs if run.is_known])
    print_kinds("all rows that count", runs)
    unseen = [run for run in more_runs if not run.is_fitted]
    print_kinds("other rows, for which no constant or formula was chosen", unseen, has_old=False)
    rest = [run for run in unseen if run.row["source"] != LARGEST_TABLE]
    print_kinds(f"those of them that are not of the {LARGEST_TABLE}", rest, has_old=False)
    seen = [run for run in more_runs if run.is_fitted]
    print_kinds("other rows, by which one was corrected", seen, has_old=False)
    if args.write:
        ERRORS.write_text(json.dumps(make_ranges(runs, more_runs), indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {ERRORS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
