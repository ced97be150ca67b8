"""What plan.py's questions come down to: all ways to train a model on some machines, and which of them are good."""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from .hardware import GB, GPUS, Machine, nvidia_smi_bytes
from .memory import Memory, fits, largest_rows, longest_context, memory, num_processes
from .models import Model
from .speed import Speed, speed
from .strategies import STRATEGIES, SUPERVISED, Setup

ERRORS = Path(__file__).resolve().parent / "errors.json"
# Of ways whose times differ by less the one with more rows a forward is taken: small products are slower than assumed.
EQUALLY_FAST = 1.03
MOST_GPUS = 4096


@dataclass(frozen=True)
class Job:
    """What is to be trained, whatever the machine and the strategy."""

    name: str  # of the model
    model: Model
    setup: Setup  # all that does not depend on machine and strategy
    batch: int = 384  # rows of one optimizer step, over all GPUs
    tokens: float = 2.5e9
    strategies: tuple[str, ...] = SUPERVISED
    rows: int = 0  # of one forward; 0: what is fastest
    accumulation: int = 0  # 0: what the batch asks for
    checkpointing: bool | None = None  # None: with and without


@dataclass(frozen=True)
class Way:
    """One strategy on one machine, with its best rows of a forward."""

    gpu: str
    machine: Machine
    model: Model
    strategy: str
    setup: Setup
    memory: Memory
    speed: Speed | None  # None if it does not fit
    problem: str = ""  # why it does not fit
    hours: float = math.inf
    price: float = 0.0

    @property
    def fits(self) -> bool:
        return not self.problem

    @property
    def trains_adapter(self) -> bool:
        return STRATEGIES[self.strategy].adapter

    @property
    def most_rows(self) -> int:
        """The most rows of one forward that fit."""
        return largest_rows(self.model, STRATEGIES[self.strategy], self.setup, self.machine.gpu)

    @property
    def shown_bytes(self) -> float:
        """What nvidia-smi will show."""
        return nvidia_smi_bytes(self.memory.total, self.machine.gpu, self.machine.num_gpus)

    @property
    def may_not_fit(self) -> bool:
        """Whether published runs of its kind have taken so much more than predicted that the GPU would be too small."""
        return self.shown_bytes * find_range(self, "memory")[1] > self.machine.gpu.memory

    @property
    def kind(self) -> str:
        """Its kind in errors.json."""
        strategy = STRATEGIES[self.strategy]
        if strategy.is_pipeline and self.machine.num_gpus > 1:
            return "pipeline"  # of which no rows are published
        if strategy.offload:
            return "offload"
        if strategy.four_bit:
            return "QLoRA"
        if strategy.kind == "zero2":
            return "ZeRO-2"
        if strategy.kind == "zero3":
            return "ZeRO-3"
        if strategy.adapter and self.machine.num_gpus == 1:
            return "LoRA, one GPU"
        if strategy.adapter:
            return "LoRA, FSDP"
        if self.machine.num_gpus == 1:
            return "full, one GPU"
        return "full FSDP"


@lru_cache
def read_ranges() -> dict:
    """By time and memory, and by kind: measured by predicted, the 10th and the 90th percentile of published rows."""
    return json.loads(ERRORS.read_text(encoding="utf-8"))


def find_range(way: Way, what: str) -> tuple[float, float]:
    """(low, high) of what was measured by what is predicted, for rows of this kind, or all where there are too few.

    A kind never gets a narrower range than all rows together: no published row is of this very model and machine.
    """
    ranges = read_ranges()[what]
    everything = ranges["all"]
    own = ranges.get(way.kind, everything)
    return min(own["low"], everything["low"]), max(own["high"], everything["high"])


# -------------------------------------------------------------------------------------------------------------------
# One strategy on one machine
# -------------------------------------------------------------------------------------------------------------------


def find_way(job: Job, gpu: str, machine: Machine, name: str, checkpointing: bool, price: float) -> Way:
    """The best rows of a forward for a strategy on a machine, with what they need and take."""
    strategy = STRATEGIES[name]
    setup = replace(
        job.setup,
        gpus=machine.gpus,
        nodes=machine.nodes,
        checkpointing=checkpointing,
        compute_bytes=machine.gpu.compute_bytes,
    )
    if strategy.is_one_process:  # it runs on one machine, whatever the others do
        setup = replace(setup, nodes=1)
    candidates = list_rows(job, strategy, setup)
    smallest = memory(job.model, strategy, candidates[0])
    choices = []
    problem = "does not fit"
    if smallest.host > machine.host_bytes:
        problem = f"needs {smallest.host / GB:,.0f} GB of host memory"
        candidates = candidates[:1]
    else:
        for candidate in candidates:
            if fits(job.model, strategy, candidate, machine.gpu):
                choices.append((speed(job.model, strategy, candidate, machine), candidate))
    if not choices:
        return Way(gpu, machine, job.model, name, candidates[0], smallest, None, problem)
    safe = []
    for choice in choices:
        held = memory(job.model, strategy, choice[1])
        if not Way(gpu, machine, job.model, name, choice[1], held, choice[0]).may_not_fit:
            safe.append(choice)
    choices = safe or choices
    fastest = min(choice.step_seconds for choice, _ in choices)
    near = [choice for choice in choices if choice[0].step_seconds <= EQUALLY_FAST * fastest]
    best, setup = max(near, key=lambda choice: choice[1].rows)
    hours = job.tokens / best.tokens_per_second_per_gpu / setup.num_gpus / 3600
    return Way(
        gpu=gpu,
        machine=machine,
        model=job.model,
        strategy=name,
        setup=setup,
        memory=memory(job.model, strategy, setup),
        speed=best,
        hours=hours,
        price=hours * setup.num_gpus * price,
    )


def list_rows(job: Job, strategy, setup: Setup) -> list[Setup]:
    """The setups that make up the batch, by rows of a forward; a single one where rows and accumulation are pinned.

    A pipeline over processes wants a micro-batch for each stage at least.
    """
    processes = num_processes(strategy, setup)
    rows_of_process = max(1, job.batch // processes)
    setups = []
    for rows in range(1, rows_of_process + 1):
        accumulation = max(1, rows_of_process // rows)
        if job.rows and rows != job.rows:
            continue
        if job.accumulation:
            accumulation = job.accumulation
        elif rows_of_process % rows and not job.rows:
            continue
        if strategy.kind == "1f1b" and accumulation < min(setup.num_gpus, rows_of_process):
            continue
        setups.append(replace(setup, rows=rows, accumulation=accumulation))
    if not setups:  # more rows are pinned than a step has
        setups.append(replace(setup, rows=max(1, job.rows), accumulation=max(1, job.accumulation)))
    return setups


def all_ways(job: Job, machines: list[tuple[str, Machine]], prices: dict[str, float]) -> list[Way]:
    """Every strategy on every machine, with and without checkpointing."""
    choices = [False, True]
    if job.checkpointing is not None:
        choices = [job.checkpointing]
    ways = []
    for gpu, machine in machines:
        for name in job.strategies:
            if STRATEGIES[name].kind == "1f1b" and machine.num_gpus > job.model.layers:
                continue  # a stage has at least one layer
            for checkpointing in choices:
                ways.append(find_way(job, gpu, machine, name, checkpointing, prices.get(gpu, 0.0)))
    return ways


def expected_hours(way: Way) -> float:
    """The middle of the range in which published runs of the kind lie: some kinds are slower than they should be."""
    low, high = find_range(way, "time")
    return way.hours * (low + high) / 2


def expected_price(way: Way) -> float:
    return way.price * expected_hours(way) / way.hours


def best_of_each(ways: list[Way]) -> list[Way]:
    """Of each strategy on each machine the faster one, with or without checkpointing, that surely fits, or just fits.

    Offload is left out where the same strategy does without it. The fastest comes first, by its expected hours.
    """
    best = {}
    for way in ways:
        key = (way.gpu, way.machine, way.strategy)
        if not way.fits:
            continue
        if key not in best or (way.may_not_fit, way.hours) < (best[key].may_not_fit, best[key].hours):
            best[key] = way
    needed = []
    for (gpu, machine, strategy), way in best.items():
        without_offload = (gpu, machine, strategy.replace(" offload", ""))
        if not STRATEGIES[strategy].offload or without_offload not in best:
            needed.append(way)
    return sorted(needed, key=expected_hours)


def three_best(ways: list[Way], by_price: bool = False) -> list[Way]:
    """Three ways, the fastest or the cheapest first, of which at least one trains all weights, if one can."""
    ranked = best_of_each(ways)
    if by_price:
        ranked = sorted(ranked, key=lambda way: (expected_price(way), expected_hours(way)))
    chosen = []
    for way in ranked:
        if not any(does_the_same(way, other) for other in chosen):
            chosen.append(way)
    chosen = chosen[:3]
    full = [way for way in ranked if not way.trains_adapter]
    if len(chosen) == 3 and full and all(way.trains_adapter for way in chosen):
        chosen[2] = full[0]
    return chosen


def does_the_same(way: Way, other: Way) -> bool:
    """On a single GPU nothing is sharded and there is one stage, so that strategies differ in name only.

    What is offloaded differs: ZeRO-2 keeps the weights on the GPU.
    """
    first = STRATEGIES[way.strategy]
    second = STRATEGIES[other.strategy]
    if first.offload or second.offload:
        return False
    return (
        way.machine.num_gpus == 1
        and (way.gpu, way.machine) == (other.gpu, other.machine)
        and (first.adapter, first.four_bit) == (second.adapter, second.four_bit)
    )


# -------------------------------------------------------------------------------------------------------------------
# Questions
# -------------------------------------------------------------------------------------------------------------------


def within(ways: list[Way], deadline: float, budget: float) -> list[Way]:
    """Those that end in time and cost no more; 0 means no limit."""
    kept = []
    for way in ways:
        is_in_time = deadline == 0 or way.hours <= deadline
        is_affordable = budget == 0 or way.price <= budget
        if way.fits and is_in_time and is_affordable:
            kept.append(way)
    return kept


def contexts(job: Job, gpu: str, machine: Machine) -> list[tuple[str, bool, int]]:
    """(strategy, checkpointing, longest row in tokens) for one row a forward."""
    found = []
    for name in job.strategies:
        for checkpointing in (False, True):
            setup = replace(
                job.setup,
                gpus=machine.gpus,
                nodes=machine.nodes,
                checkpointing=checkpointing,
                compute_bytes=machine.gpu.compute_bytes,
            )
            if STRATEGIES[name].is_one_process:
                setup = replace(setup, nodes=1)
            length = 0
            if memory(job.model, STRATEGIES[name], setup).host <= machine.host_bytes:
                length = longest_context(job.model, STRATEGIES[name], setup, machine.gpu)
            found.append((name, checkpointing, length))
    return found


def trainable(job: Job, models: dict[str, Model], gpu: str, machine: Machine) -> list[tuple[str, Model, dict]]:
    """For each model: what fits for all weights, an adapter, and an adapter on 4-bit weights.

    Returns:
        (name, model, {"full": (strategy, longest row), "LoRA": ..., "QLoRA": ...}), models by size; a missing entry
        does not fit.
    """
    table = []
    for name, model in sorted(models.items(), key=lambda item: item[1].params):
        best = {}
        for strategy, _, length in contexts(replace(job, model=model), gpu, machine):
            group = "full"
            if STRATEGIES[strategy].four_bit:
                group = "QLoRA"
            elif STRATEGIES[strategy].adapter:
                group = "LoRA"
            if length > best.get(group, ("", 0))[1]:
                best[group] = (strategy, length)
        table.append((name, model, best))
    return table


def gpu_counts(per_machine: int) -> list[tuple[int, int]]:
    """(GPUs of a machine, machines): 1, 2, 4, ... on one machine, then whole machines."""
    counts = []
    gpus = 1
    while gpus < per_machine:
        counts.append((gpus, 1))
        gpus *= 2
    nodes = 1
    while nodes * per_machine <= MOST_GPUS:
        counts.append((per_machine, nodes))
        nodes *= 2
    return counts


def how_many_gpus(
    job: Job, gpu: str, machine: Machine, price: float, deadline: float
) -> list[tuple[str, Way | None, Way | None]]:
    """(strategy, the way with the fewest GPUs that fits, the one with the fewest that ends before the deadline)"""
    table = []
    for name in job.strategies:
        fewest = None
        in_time = None
        for gpus, nodes in gpu_counts(machine.gpus):
            if STRATEGIES[name].is_one_process and nodes > 1:
                break
            if STRATEGIES[name].kind == "1f1b" and gpus * nodes > job.model.layers:
                break
            if job.batch % (gpus * nodes):
                break
            candidate = replace(machine, gpus=gpus, nodes=nodes)
            ways = all_ways(replace(job, strategies=(name,)), [(gpu, candidate)], {gpu: price})
            for way in best_of_each(ways):
                if fewest is None:
                    fewest = way
                if in_time is None and deadline and way.hours <= deadline:
                    in_time = way
            if fewest and (in_time or not deadline):
                break
        table.append((name, fewest, in_time))
    return table


def scaling(job: Job, gpu: str, machine: Machine) -> list[dict]:
    """FSDP over all machines against hybrid sharding, for 1, 2, 4, ... machines and the number asked for."""
    numbers = [2**i for i in range(int(math.log2(machine.nodes)) + 1)]
    if machine.nodes not in numbers:
        numbers.append(machine.nodes)
    table = []
    for nodes in numbers:
        rows = max(1, job.batch // (machine.gpus * nodes))
        line = {"nodes": nodes, "rows_of_step": rows * machine.gpus * nodes}
        line.update(fsdp_hours=None, hsdp_hours=None, hsdp_nodes=None)
        for group in [2**i for i in range(int(math.log2(nodes)) + 1)] + [nodes]:
            if nodes % group:
                continue
            hours = fastest_fsdp(job, replace(machine, nodes=nodes), rows, group)
            if group == nodes:
                line["fsdp_hours"] = hours
            elif hours is not None and (line["hsdp_hours"] is None or hours < line["hsdp_hours"]):
                line["hsdp_hours"] = hours
                line["hsdp_nodes"] = group
        table.append(line)
    return table


def fastest_fsdp(job: Job, machine: Machine, rows: int, shard_nodes: int) -> float | None:
    """Hours of full fine-tuning under FSDP, weights sharded over so many machines; None if it does not fit."""
    strategy = STRATEGIES["FSDP"]
    best = None
    for checkpointing in (False, True):
        for micro in range(1, rows + 1):
            if rows % micro:
                continue
            setup = replace(
                job.setup,
                gpus=machine.gpus,
                nodes=machine.nodes,
                shard_nodes=shard_nodes,
                rows=micro,
                accumulation=rows // micro,
                checkpointing=checkpointing,
                compute_bytes=machine.gpu.compute_bytes,
            )
            if not fits(job.model, strategy, setup, machine.gpu):
                continue
            rate = speed(job.model, strategy, setup, machine).tokens_per_second_per_gpu
            hours = job.tokens / rate / machine.num_gpus / 3600
            if best is None or hours < best:
                best = hours
    return best


def list_machines(
    gpus: list[str], counts: list[int], nodes: list[int], base: Machine, custom: dict
) -> list[tuple[str, Machine]]:
    """Every kind of GPU in every number.

    Args:
        base: network, host link and disk of all of them.
        custom: kinds of GPU beside those of hardware.GPUS.
    """
    machines = []
    for name in gpus:
        gpu = custom.get(name) or GPUS[name]
        cores = 0
        if name == "cpu":
            cores = base.cores
        for count in counts:
            for number in nodes:
                machines.append((name, replace(base, gpu=gpu, gpus=count, nodes=number, cores=cores)))
    return machines


def to_json(way: Way, command: str) -> dict:
    """All that is known about a way, with bytes and seconds as they are."""
    worst = way.memory.worst
    result = {
        "strategy": way.strategy,
        "gpu": way.gpu,
        "gpus": way.machine.gpus,
        "nodes": way.machine.nodes,
        "link": way.machine.gpu.link.name,
        "checkpointing": way.setup.checkpointing,
        "rows_of_forward": way.setup.rows,
        "accumulation": way.setup.accumulation,
        "largest_rows_of_forward": way.most_rows,
        "weights_bytes": round(worst.weights),
        "gradients_bytes": round(worst.gradients),
        "optimizer_bytes": round(worst.optimizer),
        "activations_bytes": round(worst.activations),
        "logits_bytes": round(worst.logits),
        "buffers_bytes": round(worst.buffers),
        "total_bytes": round(worst.total),
        "nvidia_smi_bytes": round(way.shown_bytes),
        "gpu_bytes": round(way.machine.gpu.memory),
        "host_bytes_per_node": round(way.memory.host),
        "disk_bytes": round(way.memory.disk),
        "fits": way.fits,
        "problem": way.problem,
    }
    if way.fits:
        low, high = find_range(way, "memory")
        result["nvidia_smi_range"] = [way.shown_bytes * low, way.shown_bytes * high]
        low, high = find_range(way, "time")
        result["hours_range"] = [way.hours * low, way.hours * high]
        result["hours"] = way.hours
        result["price"] = way.price
        result["checkpoint_seconds"] = way.memory.disk / way.machine.disk
        result["command"] = command
        result.update(way.speed.__dict__)
    return result
