"""Time: what the kernels of a step take on a machine, and what its communication adds.

A roofline: products and attention at their GPU's achievable rates, all else at the memory's bandwidth. The time in
which Python starts operations hides behind that, or that behind it, but not perfectly; so does communication behind
arithmetic. The constants stand in hardware.py, which says how they were chosen.
"""

from dataclasses import dataclass, replace

from .hardware import (
    DEEPSPEED_GATHER,
    DEEPSPEED_HOOKS,
    FSDP_GATHER,
    GPU,
    HOST_ADAM,
    LINK_HOP,
    NETWORK_HOP,
    NETWORK_SHARE,
    OVERLAP_LOSS,
    Machine,
)
from .kernels import ATTENTION_SPEED, Work, attention_kernel, head_work, layer_work, micro_step_work
from .memory import NF4_BYTES, num_blocks, num_processes, place_layers, stage_layers, trained_params
from .models import Model
from .strategies import Setup, Strategy, setup_of_forward


@dataclass(frozen=True)
class Speed:
    """One optimizer step."""

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float  # share of the data sheet's FLOPs that the model's own work makes up, without what is computed again
    flops: float  # that are executed, by all GPUs together
    link_bytes: float  # that each GPU sends to others of its machine
    network_bytes: float  # to other machines
    offload_bytes: float  # to host memory


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends, and how often it has to wait for a ring to go round."""

    link: float = 0
    network: float = 0
    rounds: float = 0


def speed(model: Model, strategy: Strategy, setup: Setup, machine: Machine) -> Speed:
    """Seconds of one optimizer step, and what follows from them."""
    setup = setup_of_forward(strategy, setup)
    if strategy.kind == "pp":
        seconds = plain_seconds(model, strategy, setup, machine)
        traffic = Traffic(link=setup.accumulation * 2 * border_bytes(model, setup))
    elif strategy.kind == "1f1b":
        seconds = pipeline_seconds(model, strategy, setup, machine)
        traffic = pipeline_traffic(model, setup)
    else:
        seconds = sharded_seconds(model, strategy, setup, machine)
        traffic = sharded_traffic(model, strategy, setup)
    offloaded = 0.0
    if strategy.offload:
        offloaded = offload_traffic(model, strategy, setup)
    processes = num_processes(strategy, setup)
    num_gpus = setup.num_gpus
    step_tokens = setup.tokens * setup.accumulation * processes
    work = step_work(model, strategy, setup)
    useful = step_work(model, strategy, replace(setup, checkpointing=False, padding_free=False))
    return Speed(
        step_seconds=seconds,
        tokens_per_second_per_gpu=step_tokens / seconds / num_gpus,
        mfu=useful.flops * processes / seconds / num_gpus / machine.gpu.flops,
        flops=work.flops * processes,
        link_bytes=traffic.link,
        network_bytes=traffic.network,
        offload_bytes=offloaded,
    )


def step_work(model: Model, strategy: Strategy, setup: Setup) -> Work:
    """What one process computes in an optimizer step; a pipeline's devices together are one process."""
    return micro_step_work(model, strategy, setup).times(setup.accumulation)


# -------------------------------------------------------------------------------------------------------------------
# Arithmetic
# -------------------------------------------------------------------------------------------------------------------


def bytes_per_second(gpu: GPU) -> float:
    return gpu.memory_bandwidth * gpu.bandwidth_share


def gpu_seconds(model: Model, setup: Setup, gpu: GPU, work: Work) -> float:
    """What the GPU takes for some work, if operations are started fast enough."""
    product_rate = gpu.flops * gpu.product_share * model.hidden / (model.hidden + gpu.narrow)
    kernel = attention_kernel(setup)
    if kernel == "eager":
        attention_rate = product_rate
    else:
        length_share = setup.sequence_length / (setup.sequence_length + gpu.short_document)
        attention_rate = gpu.flops * gpu.attention_share * ATTENTION_SPEED[kernel] * length_share
    seconds = work.product_flops / product_rate + work.attention_flops / attention_rate
    return seconds + work.moved / bytes_per_second(gpu) + work.drawn * gpu.drawing


def compute_seconds(model: Model, setup: Setup, machine: Machine, work: Work, python: float = 0) -> float:
    """What some work takes: the GPU's time, or that of Python, which starts operations and does more beside.

    On a CPU both are done by the same core, one after the other.

    Args:
        python: seconds of Python for other things than starting operations.
    """
    computing = gpu_seconds(model, setup, machine.gpu, work)
    starting = work.launches * machine.gpu.launch + python
    if machine.cores:
        return computing + starting
    return overlapped(computing, starting, OVERLAP_LOSS)  # some parts have many small operations, others few large ones


def crowded(seconds: float, machine: Machine, processes: int) -> float:
    """More processes than a CPU has cores take turns."""
    if machine.cores:
        return seconds * max(1, processes / machine.cores)
    return seconds


def update_seconds(model: Model, strategy: Strategy, setup: Setup, machine: Machine, trained: float) -> float:
    """The optimizer's step on `trained` weights: gradient, weight and state are read, weight and state written."""
    size = setup.weight_bytes
    if strategy.adapter:
        size = 4
    moved = trained * (3 * size + 2 * setup.optimizer_bytes)
    # None of it is in a cache.
    return moved / min(machine.gpu.memory_bandwidth, bytes_per_second(machine.gpu))


def overlapped(first: float, second: float, loss: float) -> float:
    """Two things that go on at once, and hinder each other: `loss` of the shorter one does not hide."""
    return max(first, second) + loss * min(first, second)


# -------------------------------------------------------------------------------------------------------------------
# FSDP2 and ZeRO
# -------------------------------------------------------------------------------------------------------------------


def sharded_seconds(model: Model, strategy: Strategy, setup: Setup, machine: Machine) -> float:
    work = micro_step_work(model, strategy, setup)
    arithmetic = compute_seconds(model, setup, machine, work, sharding_seconds(model, strategy, setup))
    arithmetic = crowded(arithmetic, machine, setup.num_gpus)
    each_micro_step, at_update = communication(model, strategy, setup)
    sending = traffic_seconds(setup, machine, each_micro_step)
    if strategy.prefetches:
        seconds = setup.accumulation * overlapped(arithmetic, sending, machine.gpu.link.overlap_loss)
    else:
        seconds = setup.accumulation * (arithmetic + sending)
    seconds += traffic_seconds(setup, machine, at_update)
    trained = trained_params(model, strategy, setup)
    shards = setup.gpus * (setup.shard_nodes or setup.nodes)
    if strategy.offload:
        # Nothing of it overlaps in the published rows: tensors over the host link, then Adam on the CPU.
        seconds += offload_traffic(model, strategy, setup) / machine.host_link
        seconds += trained / shards * (12 + 2 * setup.optimizer_bytes) / HOST_ADAM
    else:
        seconds += update_seconds(model, strategy, setup, machine, trained / shards)
    return seconds


def sharding_seconds(model: Model, strategy: Strategy, setup: Setup) -> float:
    """Python's time in a micro-step, in s: FSDP2 gathers layers; ZeRO-3 matrices, and its hooks run on one GPU, too."""
    num_passes = 2
    if setup.checkpointing:
        num_passes = 3
    if strategy.computes_reference:
        num_passes += 1
    each_layer = 0.0
    if strategy.kind == "fsdp" and setup.num_gpus > 1:
        each_layer = FSDP_GATHER
    if strategy.kind == "zero3":
        each_layer = len(model.matrices) * DEEPSPEED_HOOKS
        if setup.num_gpus > 1:
            each_layer += len(model.matrices) * DEEPSPEED_GATHER
    return num_passes * model.layers * each_layer


def communication(model: Model, strategy: Strategy, setup: Setup) -> tuple[Traffic, Traffic]:
    """What a GPU sends in each micro-step, and at the update.

    A ring over a group: each GPU passes everything on; those of a machine share the way to the next one.
    """
    size = setup.compute_bytes
    trained = trained_params(model, strategy, setup)
    weights = size * model.params
    if strategy.four_bit:
        weights = NF4_BYTES * model.layers * model.layer_params + size * model.root_params
    at_update = 0.0
    if strategy.kind == "fsdp":
        moved = 2 * weights + setup.reduce_bytes * trained  # gathered for forward and backward; gradients reduced
        rounds = 3
        if strategy.adapter:
            rounds = 2
    elif strategy.kind == "zero2":
        moved = setup.zero_gradient_bytes * trained
        at_update = size * trained  # the new weights, gathered once
        rounds = 1
    else:
        moved = 2 * weights + setup.zero_gradient_bytes * trained
        rounds = 3
    if strategy.computes_reference and strategy.kind != "zero2":  # gathered for one more forward
        moved += weights
        rounds += 1
    shard_nodes = setup.shard_nodes or setup.nodes
    each_micro_step = ring(setup, moved, shard_nodes, rounds * model.layers)
    num_copies = setup.nodes // shard_nodes
    if num_copies > 1:
        # Hybrid sharding: each shard's gradient is summed over the copies, there and back, as the backward goes on.
        shard = setup.reduce_bytes * trained / (setup.gpus * shard_nodes)
        over_copies = Traffic(network=2 * shard * (num_copies - 1) / num_copies, rounds=2 * model.layers)
        each_micro_step = Traffic(
            each_micro_step.link,
            each_micro_step.network + over_copies.network,
            each_micro_step.rounds + over_copies.rounds * num_copies / max(1, shard_nodes),
        )
    return each_micro_step, ring(setup, at_update, shard_nodes, 0)


def ring(setup: Setup, moved: float, shard_nodes: int, rounds: float) -> Traffic:
    """What one GPU sends when `moved` bytes go round all GPUs of `shard_nodes` machines, in so many rounds."""
    group = setup.gpus * shard_nodes
    return Traffic(
        link=moved * (group - 1) / group,
        network=moved / setup.gpus * (shard_nodes - 1) / shard_nodes,
        rounds=rounds,
    )


def traffic_seconds(setup: Setup, machine: Machine, traffic: Traffic) -> float:
    """Both ways one behind the other, and what a message takes to go round the ring, whatever its size."""
    seconds = traffic.link / machine.gpu.link.reached + traffic.network / (machine.network * NETWORK_SHARE)
    if setup.num_gpus == 1:
        return 0.0
    shard_nodes = setup.shard_nodes or setup.nodes
    hops = setup.gpus * shard_nodes * LINK_HOP
    if setup.nodes > 1:
        hops += shard_nodes * NETWORK_HOP
    return seconds + traffic.rounds * hops


def sharded_traffic(model: Model, strategy: Strategy, setup: Setup) -> Traffic:
    """Bytes of a whole optimizer step."""
    each_micro_step, at_update = communication(model, strategy, setup)
    return Traffic(
        link=setup.accumulation * each_micro_step.link + at_update.link,
        network=setup.accumulation * each_micro_step.network + at_update.network,
    )


def offload_traffic(model: Model, strategy: Strategy, setup: Setup) -> float:
    """Bytes between a GPU and host memory in an optimizer step."""
    size = setup.compute_bytes
    processes = setup.num_gpus
    gradients = size * trained_params(model, strategy, setup) / processes
    weights = size * model.params / processes
    if strategy.kind == "zero2":
        # Gradients go down in every micro-step, and the sum so far comes up before; weights come up once.
        return (2 * setup.accumulation - 1) * gradients + gradients
    return setup.accumulation * (2 * weights + gradients)


# -------------------------------------------------------------------------------------------------------------------
# Pipelines
# -------------------------------------------------------------------------------------------------------------------


def border_bytes(model: Model, setup: Setup) -> float:
    """What crosses from one device to the next in each micro-batch, one way."""
    return setup.compute_bytes * model.hidden * setup.tokens


def plain_seconds(model: Model, strategy: Strategy, setup: Setup, machine: Machine) -> float:
    """The plain loops: the devices compute one after the other."""
    arithmetic = compute_seconds(model, setup, machine, micro_step_work(model, strategy, setup))
    num_borders = num_blocks(model, setup) - 1
    num_crossings = 2  # there and back
    if strategy.computes_reference:
        num_crossings = 3
    crossing = num_borders * num_crossings * border_bytes(model, setup) / machine.gpu.link.reached
    seconds = setup.accumulation * (arithmetic + crossing)
    # Each device updates its own weights, all at once; the largest part counts.
    largest = max(place_layers(model.layers, num_blocks(model, setup))) / model.layers
    trained = trained_params(model, strategy, setup)
    return seconds + update_seconds(model, strategy, setup, machine, trained * largest)


def pipeline_seconds(model: Model, strategy: Strategy, setup: Setup, machine: Machine) -> float:
    """1F1B: the slowest stage works on every micro-batch, and the others' first and last ones come on top."""
    stages = stage_layers(model, setup)
    layer = layer_work(model, strategy, setup)
    head = head_work(model, strategy, replace(setup, padding_free=True))  # only positions with a target
    times = []
    for number, num_layers in enumerate(stages):
        work = layer.times(num_layers)
        if number == len(stages) - 1:
            work = work + head
        times.append(compute_seconds(model, setup, machine, work))
    crossing = 0.0
    if len(stages) > 1:
        crossing = border_bytes(model, setup) / slowest_border(setup, machine)
    # A stage waits for what it gets where nothing else is to be done: while the pipeline fills and drains.
    fill = sum(times) - max(times) + 2 * (len(stages) - 1) * crossing
    seconds = setup.accumulation * overlapped(max(times), 2 * crossing, machine.gpu.link.overlap_loss) + fill
    if machine.cores and len(stages) > machine.cores:
        # Stages take turns, and no scheduler knows whose turn matters. It needs at least what all work takes on all
        # cores, or the longest chain, and at most the one and that part of the other in which the other cores may be
        # idle (Graham, 1969). Nothing is known between these, so it is their middle.
        shared = setup.accumulation * sum(times) / machine.cores
        at_least = max(shared, seconds)
        at_most = shared + (1 - 1 / machine.cores) * seconds
        seconds = (at_least + at_most) / 2
    trained = trained_params(model, strategy, setup) * max(stages) / model.layers
    update = update_seconds(model, strategy, setup, machine, trained)
    return seconds + crowded(update, machine, len(stages))


def slowest_border(setup: Setup, machine: Machine) -> float:
    """Bytes/s between two stages that follow each other, where it is slowest."""
    link = machine.gpu.link.reached
    if setup.nodes == 1:
        return link
    # One GPU of a machine sends to the next machine, and has all of its adapters: eight shares.
    return min(link, machine.network * setup.gpus * NETWORK_SHARE)


def pipeline_traffic(model: Model, setup: Setup) -> Traffic:
    sent = setup.accumulation * border_bytes(model, setup)  # a stage in the middle sends as much back
    if setup.nodes > 1:
        return Traffic(link=2 * sent, network=2 * sent)
    return Traffic(link=2 * sent)
