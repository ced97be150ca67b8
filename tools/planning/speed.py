"""Time by a roofline: arithmetic, memory traffic of what is no matrix product, and communication."""

from .hardware import BANDWIDTH_SHARE, GPU, HOST_ADAM, HOST_LINK, LATENCY, LAUNCH, MATMUL_SHARE, NETWORK
from .models import Model
from .strategies import Setup, Strategy


def times(
    model: Model, strategy: Strategy, setup: Setup, gpu: GPU, shard_nodes: int = 0, attention: str = "sdpa"
) -> dict[str, float]:
    """Seconds of one optimizer step, and the bytes that each GPU sends in it over each kind of link.

    Args:
        shard_nodes: hybrid sharding (HSDP): weights are sharded over so many machines, and each such group of machines
            has a copy; 0: over all machines.
        attention: sdpa, as this toolkit; eager, as transformers in 2023; fused, one kernel for each group of
            elementwise operations.
    """
    e, h, f, a = setup.compute_bytes, model.hidden, model.intermediate, model.attention_width
    trained = model.lora_params(setup.lora_rank) if strategy.adapter else model.params
    processes = 1 if strategy.kind == "pp" else setup.gpus * setup.nodes
    tokens, micro_steps = setup.tokens, setup.accumulation

    # Arithmetic. Two operations for each matrix entry and token, forward; once more for the gradient of the input, and
    # once more for that of the weight, unless it is frozen; and the forward again if activations are recomputed.
    span = setup.tokens if setup.padding_free else setup.sequence_length  # a masked kernel computes what it masks
    matrices = sum(inputs * outputs for inputs, outputs in model.linears)
    per_layer, attention_flops = 2 * matrices, 4 * span * a  # scores, and their product with the values
    head = 2 * model.vocab * h * (setup.target_share if setup.padding_free else 1)
    passes = 2 if strategy.adapter else 3
    again = 1 if setup.checkpointing else 0
    flops = model.layers * (per_layer * (passes + again) + attention_flops * (3 + again)) + head * passes
    useful = passes * (model.layers * (2 * matrices + 4 * setup.sequence_length * a) + 2 * model.vocab * h)
    arithmetic = tokens * flops / (gpu.flops * MATMUL_SHARE)

    # Memory traffic of what is no matrix product, forward, in bytes of a token and layer; twice that in the backward.
    if attention == "fused":
        elementwise = 2 * e * 2 * h + 4 * e * f + 2 * 3 * e * h + 4 * e * a  # norms, activation, residuals, attention
    else:
        norms = 2 * 36 * h  # six separate kernels for each RMSNorm, mostly in float32
        rope = 2 * 20 * a
        mlp = 10 * f
        residuals = 12 * h
        elementwise = norms + rope + mlp + residuals + 8 * a
        if attention == "eager":  # ten passes over the scores, of which softmax has three in float32
            elementwise += 32 * setup.sequence_length * model.heads
    traffic = tokens * model.layers * elementwise * (3 + again)
    traffic += tokens * 30 * model.vocab * (setup.target_share if setup.padding_free else 1)  # cross entropy, float32
    if strategy.four_bit:  # every pass unpacks the weights to bf16
        traffic += (2 + again) * 2.5 * model.params
    memory_bandwidth = gpu.memory_bandwidth * BANDWIDTH_SHARE
    launches = model.layers * (15 if attention == "fused" else 37) * (3 + again)
    compute = micro_steps * max(arithmetic + traffic / memory_bandwidth, launches * LAUNCH)

    update = 28 * trained / processes / memory_bandwidth  # reads weight, gradient and moments, writes three of them
    link, network, host = communication(model, strategy, setup, trained, shard_nodes or setup.nodes)
    on_link = link / (gpu.link * BANDWIDTH_SHARE)
    on_network = network / (NETWORK * BANDWIDTH_SHARE) + hops(model, strategy, setup, shard_nodes or setup.nodes)
    # Communication hides behind arithmetic, but for the first layer's gathering and the last one's reduction.
    exposed = (on_link + on_network) / max(1, micro_steps * model.layers)
    seconds = max(compute, on_link + on_network) + exposed + update
    if strategy.offload:
        # Nothing of it overlaps in the reference rows: tensors of a micro-step over the host link, Adam on the CPU.
        seconds += host / HOST_LINK + 28 * trained / processes / HOST_ADAM - update
    num_gpus = setup.gpus * setup.nodes if strategy.kind != "pp" else setup.gpus
    step_tokens = tokens * micro_steps * processes
    return {
        "step_seconds": seconds,
        "tokens_per_second_per_gpu": step_tokens / seconds / num_gpus,
        "mfu": step_tokens * useful / seconds / num_gpus / gpu.flops,
        "link_bytes": link,
        "network_bytes": network,
        "offload_bytes": host,
    }


def communication(model: Model, strategy: Strategy, setup: Setup, trained: float, shard_nodes: int) -> tuple:
    """Bytes that a GPU sends in an optimizer step: to GPUs of its machine, to other machines, to host memory."""
    e, n, nodes = setup.compute_bytes, setup.gpus, setup.nodes
    processes, micro_steps = n * nodes, setup.accumulation
    if strategy.kind == "pp":
        return 2 * e * model.hidden * setup.tokens * micro_steps, 0.0, 0.0  # activations and gradients at each border
    whole = (4.127 / 8 if strategy.four_bit else e) * model.params
    if strategy.kind == "fsdp":
        moved = micro_steps * (2 * whole + (4 * trained))  # gathered twice; gradients reduced in float32
    elif strategy.kind == "zero2":
        moved = micro_steps * e * trained + e * trained  # gradients each micro-step, weights once
    else:
        moved = micro_steps * (2 * whole + e * trained)
    # A ring over a group: each GPU passes everything on; those of a machine share the way to the next one.
    group, copies = n * shard_nodes, nodes // shard_nodes
    link = moved * (group - 1) / group
    network = moved / n * (shard_nodes - 1) / shard_nodes
    network += 2 * 4 * trained / group * (copies - 1) / copies  # each shard's gradient averaged over the copies, once
    host = 0.0
    if strategy.offload:
        gradients, weights = e * trained / processes, e * model.params / processes
        if strategy.kind == "zero2":
            # Gradients go down in every micro-step, and the sum so far comes up before; weights come up once.
            host = (2 * micro_steps - 1) * gradients + e * trained / processes
        else:
            host = micro_steps * (2 * weights + gradients)
    return link, network, host


def hops(model: Model, strategy: Strategy, setup: Setup, shard_nodes: int) -> float:
    """Seconds of latency in a step: a ring of N has N - 1 hops, for each collective of each layer."""
    if setup.nodes == 1 or strategy.kind == "pp":
        return 0.0
    ring = setup.gpus * shard_nodes if shard_nodes > 1 else 1  # within a machine a hop takes next to nothing
    collectives = {"fsdp": 2 if strategy.adapter else 3, "zero2": 1, "zero3": 3}[strategy.kind] * setup.accumulation
    copies = setup.nodes // shard_nodes
    return LATENCY * model.layers * (collectives * (ring - 1) + 2 * (copies - 1))
