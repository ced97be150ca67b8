"""Memory: what a strategy holds on the fullest GPU at the worst moment of a step, line by line.

Only what PyTorch's tensors take. What nvidia-smi shows beside is in hardware.nvidia_smi_bytes. `size` below is always
the bytes of a number in the compute precision, 2 for bf16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from .hardware import GPU, usable_bytes
from .kernels import saved_bytes, uses_autocast
from .models import Model
from .strategies import Setup, Strategy, setup_of_forward

# As in data_collator.py, which computes the loss of joined rows in chunks.
TARGETS_PER_CHUNK = 512
LOGITS_PER_CHUNK_ON_GPU = 2**27
# NF4 with double quantisation (arXiv:2305.14314): 4 bits and 0.127 of constants for each weight.
NF4_BYTES = 4.127 / 8
LIVE_PARAMETERS = 1e9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True)
class Moment:
    """Bytes on one GPU at one moment of a step."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    buffers: float = 0  # what is whole for a moment, because it computes or travels; copies

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Memory:
    """What a strategy needs."""

    worst: Moment  # of the fullest GPU
    states: float  # weights, gradients and optimizer of that GPU, when all gradients are there
    host: float  # bytes of host memory on one node
    offloaded: float  # those of one process that are there instead of on its GPU
    disk: float  # bytes of one checkpoint

    @property
    def total(self) -> float:
        return self.worst.total


def memory(model: Model, strategy: Strategy, setup: Setup) -> Memory:
    """Bytes on the fullest GPU at the worst moment of a step, and what host and disk need."""
    setup = setup_of_forward(strategy, setup)
    if strategy.kind == "pp":
        worst, states = fullest(plain_device(model, strategy, setup, i) for i in range(num_blocks(model, setup)))
    elif strategy.kind == "1f1b":
        worst, states = fullest(stage(model, strategy, setup, i) for i in range(num_blocks(model, setup)))
    else:
        worst, states = sharded(model, strategy, setup)
    offloaded = offloaded_bytes(model, strategy, setup)
    return Memory(
        worst=worst,
        states=states,
        host=host_bytes(model, strategy, setup, offloaded),
        offloaded=offloaded,
        disk=disk_bytes(model, strategy, setup),
    )


def fullest(devices) -> tuple[Moment, float]:
    return max(devices, key=lambda device: device[0].total)


def worst_of(moments: list[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def trained_params(model: Model, strategy: Strategy, setup: Setup) -> int:
    if strategy.adapter:
        return model.lora_params(setup.lora_rank, setup.lora_targets)
    return model.params


def num_processes(strategy: Strategy, setup: Setup) -> int:
    """Processes that share the rows of a step; the pipelines' devices all see the same rows."""
    if strategy.is_pipeline:
        return 1
    return setup.num_gpus


def num_shards(strategy: Strategy, setup: Setup) -> int:
    """Processes over which weights and states are spread."""
    if strategy.is_pipeline:
        return 1
    return setup.gpus * (setup.shard_nodes or setup.nodes)


def largest_trained_tensor(model: Model, strategy: Strategy, setup: Setup) -> int:
    """Parameters of the largest trained tensor."""
    if strategy.adapter:
        return max(setup.lora_rank * max(model.matrices[name]) for name in setup.lora_targets)
    return max(model.head_params, largest_matrix(model))


def largest_matrix(model: Model) -> int:
    return max(inputs * outputs for inputs, outputs in model.matrices.values())


def trained_bytes(strategy: Strategy, setup: Setup) -> int:
    """Of one trained weight: float32, and of an adapter always."""
    if strategy.adapter:
        return 4
    return setup.weight_bytes


# -------------------------------------------------------------------------------------------------------------------
# The loss
# -------------------------------------------------------------------------------------------------------------------


def logits_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """What the loss holds besides its input, at its worst moment."""
    size = setup.compute_bytes
    if strategy.kind == "1f1b":
        # Only where there is a target: logits, and in float32 their copy, log-softmax and two gradients.
        return 12 * model.vocab * setup.tokens * setup.target_share
    if strategy.preferences:
        return logps_bytes(model, strategy, setup)
    if not (setup.padding_free and setup.chunked_loss):
        return setup.logit_bytes * model.vocab * setup.tokens
    # data_collator.summed_cross_entropy: one chunk of logits at a time, and the gradients for all targets.
    targets = setup.tokens * setup.target_share
    chunk = TARGETS_PER_CHUNK
    if not setup.on_cpu:
        chunk = max(chunk, LOGITS_PER_CHUNK_ON_GPU // model.vocab)
    chunk = min(targets, chunk)
    input_gradient = size * model.hidden * targets
    if size == 4 and strategy.adapter:
        # torch.nn.functional.linear_cross_entropy: the logits become their own gradient.
        return 4 * model.vocab * chunk + input_gradient
    logits = 8 * model.vocab * chunk  # ChunkedCrossEntropy: logits and their log-softmax in float32
    if size == 4:
        logits += 4 * model.head_params
    elif not strategy.adapter:
        # The gradient of the weight in float32, and that of a chunk in bf16, beside the chunk's gradient of the logits,
        # which are its log-softmax, overwritten, and a copy. To add one precision to another, a CPU makes a copy.
        added = size * model.head_params
        if setup.on_cpu:
            added += 4 * model.head_params
        logits = 4 * model.head_params + max(logits, (4 + size) * model.vocab * chunk + added)
    return logits + input_gradient


def logps_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """The same for data_collator.TargetLogps, by which pairs are compared, whatever their rows look like."""
    size = setup.compute_bytes
    targets = setup.tokens * setup.target_share
    chunk = TARGETS_PER_CHUNK
    if not setup.on_cpu:
        chunk = max(chunk, LOGITS_PER_CHUNK_ON_GPU // model.vocab)
    chunk = min(targets, chunk)
    logits = 8 * model.vocab * chunk  # logits and their log-softmax in float32
    if not strategy.adapter:
        # The gradient of the weight in float32, and that of a chunk, beside the chunk's gradient of the logits, which
        # are its log-softmax, overwritten, and in bf16 a copy. To add one precision to another, a CPU makes a copy.
        copied = 0
        added = size * model.head_params
        if size == 2:
            copied = 2
            if setup.on_cpu:
                added += 4 * model.head_params
        logits = 4 * model.head_params + max(logits, (4 + copied) * model.vocab * chunk + added)
    return logits + size * model.hidden * targets


# -------------------------------------------------------------------------------------------------------------------
# FSDP2 and ZeRO, on any of the equal GPUs
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """What of the states lies on one GPU between steps, and what is whole for a moment."""

    weights: float
    gradients: float
    optimizer: float
    gradient_copy: float  # DeepSpeed: of the gradients in float32, at the update
    layer: float  # weights of one decoder layer
    head: float  # weights of the output layer


def shards(model: Model, strategy: Strategy, setup: Setup) -> Shards:
    size = setup.compute_bytes
    processes = num_shards(strategy, setup)
    trained = trained_params(model, strategy, setup)
    frozen = 0
    if strategy.adapter:
        frozen = model.params
    layer = size * model.layer_params
    frozen_bytes = size * frozen
    if strategy.four_bit:  # embedding and head stay in bf16
        layer = NF4_BYTES * model.layer_params
        frozen_bytes = layer * model.layers + size * model.root_params

    gradient_copy = 0.0
    if strategy.kind == "fsdp":
        # What is trained is float32, what is frozen is not.
        weights = (frozen_bytes + trained_bytes(strategy, setup) * trained) / processes
        gradients = trained_bytes(strategy, setup) * trained / processes
        optimizer = setup.optimizer_bytes * trained / processes
    else:
        # DeepSpeed: weights in the compute precision, gradients, and at the update a float32 copy of them; a float32
        # master copy of the weights, and the optimizer's state.
        weights = frozen_bytes + size * trained
        if strategy.kind == "zero3":
            weights = weights / processes
        gradients = setup.zero_gradient_bytes * trained / processes
        optimizer = (4 + setup.optimizer_bytes) * trained / processes
        gradient_copy = 4 * trained / processes
        if strategy.offload:  # all of it is in host memory
            gradients = optimizer = gradient_copy = 0.0
            if strategy.kind == "zero3":
                weights = 0.0
    return Shards(weights, gradients, optimizer, gradient_copy, layer, head=size * model.head_params)


@dataclass(frozen=True)
class Travels:
    """What of weights and gradients is whole on a GPU for a moment."""

    at_loss: float  # beside the loss
    in_layer: float  # in the backward of a layer
    after: float  # at the end of the backward
    reduced: float  # a layer's gradient on its way
    head_reduced: float  # the output layer's
    root_reduced: float  # the embedding's
    head_gradient: float  # of the output layer, until it is reduced
    root_gradient: float  # of the embedding
    root_shard: float  # what of it stays here
    layer_gradient: float


def fsdp_travels(model: Model, strategy: Strategy, setup: Setup, states: Shards) -> Travels:
    """accelerate shards the embedding, each layer, and the final norm with the head by themselves.

    The head stays gathered until its backward; tied to the embedding it does during the whole step, and so does its
    gradient. Gradients are copied to be reduced in float32, of the head while the last layer computes.
    """
    processes = num_shards(strategy, setup)
    layer_gradient = states.layer
    head_gradient = states.head
    if strategy.adapter:
        layer_gradient = 0.0
        head_gradient = 0.0
    widened = 4 / setup.compute_bytes
    root_reduced = widened * head_gradient
    in_layer = 2 * states.layer  # one layer computes, and the next is gathered
    if model.tied:
        in_layer += states.head
        head_reduced = 0.0
    else:
        head_reduced = root_reduced
    return Travels(
        at_loss=states.head + states.layer,
        in_layer=in_layer,
        after=states.head,
        reduced=widened * layer_gradient,
        head_reduced=head_reduced,
        root_reduced=root_reduced,
        head_gradient=head_gradient * model.tied,
        root_gradient=head_gradient,
        root_shard=root_reduced / processes,
        layer_gradient=layer_gradient,
    )


def deepspeed_travels(model: Model, strategy: Strategy, setup: Setup, states: Shards) -> Travels:
    """Buckets of the "auto" size of transformers' integration, in which gradients are copied as they come.

    What is reduced is joined in a flat copy, a tensor above the bucket's size by itself; gloo copies it again.
    """
    size = setup.zero_gradient_bytes
    largest = size * largest_trained_tensor(model, strategy, setup)
    flat = 0.0
    if num_shards(strategy, setup) > 1:
        flat = largest
        if setup.on_cpu:
            flat = 2 * largest
    reduced = 2 * size * model.hidden**2 + flat
    # On its way to the host a gradient of ZeRO-2 passes through a buffer of the largest tensor's size.
    buffer = 0.0
    if strategy.offload:
        buffer = largest
    head_gradient = states.head
    if strategy.adapter:
        head_gradient = 0.0
    return Travels(
        at_loss=buffer,
        in_layer=buffer,
        after=0.0,
        reduced=reduced,
        head_reduced=reduced,
        root_reduced=reduced,
        head_gradient=head_gradient,
        root_gradient=0.0,
        root_shard=0.0,
        layer_gradient=0.0,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes for all tokens of a forward."""

    kept: float  # of all layers, until their backward
    recomputed: float  # of one layer, where it is computed again
    last: float  # the final norm: its input in float32, normalised, and the head's input
    in_mlp: float  # gradients within the MLP of the layer whose backward goes on


def activations(model: Model, strategy: Strategy, setup: Setup) -> Activations:
    size = setup.compute_bytes
    tokens = setup.tokens
    each_layer = saved_bytes(model, strategy, setup)
    kept = model.layers * each_layer
    recomputed = 0.0
    if setup.checkpointing:
        kept = model.layers * size * model.hidden * tokens
        recomputed = each_layer
    return Activations(
        kept=kept,
        recomputed=recomputed,
        last=tokens * model.hidden * (4 + 2 * size),
        in_mlp=3 * size * model.intermediate * tokens,
    )


def sharded(model: Model, strategy: Strategy, setup: Setup) -> tuple[Moment, float]:
    """The worst moment, and the states."""
    states = shards(model, strategy, setup)
    held = activations(model, strategy, setup)
    # What is there from the start: ZeRO-3 has one buffer for the gradients' shards and never frees it.
    accumulated = 0.0
    if setup.accumulation > 1 or strategy.kind == "zero3":
        accumulated = states.gradients
    start = Moment(weights=states.weights, optimizer=states.optimizer, gradients=accumulated)
    moments = []
    if strategy.kind == "fsdp":
        travels = fsdp_travels(model, strategy, setup, states)
    else:
        travels = deepspeed_travels(model, strategy, setup, states)
    if strategy.kind == "zero3":
        gathered, travels = zero3_gathers(model, strategy, setup, states, travels)
        moments += zero3_moments(strategy, setup, states, held, start, gathered)
    moments += [
        # The loss: everything is kept.
        replace(
            start,
            activations=held.kept + held.last,
            logits=logits_bytes(model, strategy, setup),
            buffers=travels.at_loss,
        ),
        # The end of the backward: the layers' gradients are shards, those of embedding and head become so.
        replace(
            start,
            gradients=states.gradients - travels.root_shard,
            buffers=travels.after + travels.root_gradient + travels.root_reduced,
        ),
        # The update.
        replace(start, gradients=states.gradients + states.gradient_copy),
    ]
    for done in (0, 1, model.layers - 1):
        moments += backward_moments(model, states, held, start, travels, done)
    whole = states.weights + states.gradients + states.gradient_copy + states.optimizer
    return worst_of(moments), whole


def backward_moments(
    model: Model, states: Shards, held: Activations, start: Moment, travels: Travels, done: int
) -> list[Moment]:
    """The backward of a layer when `done` layers behind it are through: within it, and at its end.

    Within: the head's gradient is there, what the layer kept or recomputes, the gradients within its MLP, and the
    gradient of the layer before, which is being reduced. At its end its own gradient is there, and still half of what
    was recomputed.
    """
    so_far = max(start.gradients, (states.gradients - travels.root_shard) * done / model.layers)
    reduced = travels.reduced
    if done == 0:
        reduced = travels.head_reduced
    before = held.kept * (model.layers - done) / model.layers
    behind = held.kept * (model.layers - done - 1) / model.layers
    within = replace(
        start,
        gradients=so_far,
        activations=before + held.recomputed + held.in_mlp,
        buffers=travels.in_layer + travels.head_gradient + reduced,
    )
    end = replace(
        start,
        gradients=so_far,
        activations=behind + held.recomputed / 2,
        buffers=travels.in_layer + travels.head_gradient + travels.layer_gradient + travels.reduced,
    )
    return [within, end]


# -------------------------------------------------------------------------------------------------------------------
# What ZeRO-3 gathers
# -------------------------------------------------------------------------------------------------------------------


def prefetched(model: Model, strategy: Strategy, setup: Setup) -> tuple[float, float, float]:
    """What ZeRO-3 has gathered ahead of its use, as DeepSpeed's partitioned_param_coordinator.py does it.

    At each submodule it prefetches one more bucket: h^2 parameters, or one larger matrix, in the order in which forward
    and backward use them. A layer has 13 submodules, four more for each adapter, but at most seven buckets: all layers
    are on their way when only a share has been computed and released. That share is then gathered again for its
    backward, and lies there until the backward comes to it. stage3_max_live_parameters stops it, one matrix too late.

    Without joined rows nothing is released before its backward, unless that is further than stage3_max_reuse_distance.
    With joined rows it is, because DeepSpeed's cache of what to release is filled by the forwards, without a backward,
    of check_document_attention.

    Returns:
        bytes at most, in the forward; bytes at its end; the share of the forward that is done when they are most.
    """
    size = setup.compute_bytes
    layers = model.layers * model.layer_params
    buckets = 0.0
    for inputs, outputs in model.matrices.values():
        buckets += min(1, inputs * outputs / model.hidden**2)
    submodules = 13
    if strategy.adapter:
        submodules += 4 * len(setup.lora_targets)
    share = buckets / submodules
    # The embedding comes again where its backward needs it: to train it, or to give checkpointing its start.
    embedding = 0
    if not strategy.adapter or setup.checkpointing:
        embedding = model.head_params
    if setup.padding_free:
        # While the first layers come again, `share` of as many are computed and released.
        most = (1 - share**2) * layers
        again = max(share * layers, layers - LIVE_PARAMETERS) + embedding
    else:
        most = layers
        again = layers + embedding
    most += model.head_params
    if not model.tied:
        most += embedding
    most = min(LIVE_PARAMETERS + model.head_params, most)
    again = min(LIVE_PARAMETERS, again)
    if not strategy.prefetches:  # nor is anything kept for its backward
        most = again = 0
    return size * most, size * again, share + share**2


@dataclass(frozen=True)
class Gathered:
    """Bytes of weights that ZeRO-3 holds whole."""

    ahead: float  # at most, in the forward
    again: float  # at its end
    share: float  # of the forward that is done when they are most
    layer: float
    head: float
    head_gradient: float
    head_reduced: float
    copied: float  # gloo gathers into a buffer of its own


def zero3_gathers(model: Model, strategy: Strategy, setup: Setup, states: Shards, travels: Travels):
    """(Gathered, the Travels that go with it)"""
    size = setup.compute_bytes
    ahead, again, share = prefetched(model, strategy, setup)
    matrix = size * largest_matrix(model)
    head = states.head
    layer = states.layer
    copied = 0.0
    if setup.on_cpu:
        copied = head
    is_alone = num_shards(strategy, setup) == 1
    if is_alone and (setup.on_cpu or not strategy.offload):  # it has every matrix, unless the host has it
        head = matrix = layer = ahead = again = copied = 0.0
    gathered = Gathered(ahead, again, share, layer, head, travels.head_gradient, travels.reduced, copied)
    # A layer's backward: its matrices' gradients are reduced one by one, and the head's is gone.
    layer_gradient = matrix
    if strategy.adapter:
        layer_gradient = 0.0
    reduced = 2 * size * model.hidden**2 + layer_gradient
    if setup.on_cpu:
        reduced += layer_gradient
    travels = replace(
        travels,
        at_loss=again + head,
        in_layer=again + matrix,
        head_gradient=0.0,
        layer_gradient=layer_gradient,
        reduced=reduced,
        head_reduced=reduced,
    )
    return gathered, travels


def zero3_moments(
    strategy: Strategy, setup: Setup, states: Shards, held: Activations, start: Moment, gathered: Gathered
) -> list[Moment]:
    """In the forward, with most on its way; the head before its backward, and when its gradient is reduced."""
    kept = held.kept + held.last
    at_head = gathered.again + gathered.head + gathered.head_gradient
    moments = [
        replace(start, activations=gathered.share * held.kept, buffers=gathered.ahead + gathered.copied),
        replace(start, activations=kept, buffers=at_head + gathered.copied),
        replace(start, activations=kept, buffers=at_head + gathered.head_reduced),
    ]
    if strategy.adapter and setup.checkpointing:
        # A layer's frozen weights, gathered to recompute it, are released only in its backward.
        in_layer = replace(start, activations=held.kept + held.recomputed, buffers=gathered.again + gathered.layer)
        moments.append(in_layer)
    return moments


# -------------------------------------------------------------------------------------------------------------------
# The pipelines: each device has some of the layers
# -------------------------------------------------------------------------------------------------------------------


def num_blocks(model: Model, setup: Setup) -> int:
    """Devices over which the layers are spread."""
    return min(setup.num_gpus, model.layers)


def place_layers(num_layers: int, num_devices: int) -> list[int]:
    """Layers of each device, as finetune_pp.py places them: the larger blocks in the middle."""
    sizes = [num_layers // num_devices] * num_devices
    from_the_middle = sorted(range(num_devices), key=lambda i: abs(2 * i + 1 - num_devices))
    for i in from_the_middle[: num_layers % num_devices]:
        sizes[i] += 1
    return sizes


def place_on_stages(num_layers: int, num_stages: int, head_cost: float) -> list[int]:
    """Layers of each stage, as finetune_pp_1f1b.py places them: such that the slowest stage is as fast as possible.

    Args:
        head_cost: work of the last stage's head, in layers.
    """
    if num_stages == 1:
        return [num_layers]

    def slowest(num_last: int) -> float:
        others = math.ceil((num_layers - num_last) / (num_stages - 1))
        return max(others, num_last + head_cost)

    num_last = min(range(1, num_layers - num_stages + 2), key=slowest)
    borders = [(num_layers - num_last) * i // (num_stages - 1) for i in range(num_stages)] + [num_layers]
    return [borders[i + 1] - borders[i] for i in range(num_stages)]


def stage_layers(model: Model, setup: Setup) -> list[int]:
    """Layers of each stage of 1F1B."""
    head_cost = setup.target_share * model.head_params / model.layer_params
    return place_on_stages(model.layers, num_blocks(model, setup), head_cost)


@dataclass(frozen=True)
class Block:
    """The layers of one device, and what stands before and behind them."""

    layers: int
    has_embedding: bool
    has_head: bool
    head_is_a_copy: bool  # a tied head on another device than the embedding


def block_params(model: Model, block: Block) -> int:
    """Parameters of a device's part of the model."""
    params = block.layers * model.layer_params
    if block.has_embedding:
        params += model.head_params
    if block.has_head:
        params += model.hidden
        if not model.tied or block.head_is_a_copy:
            params += model.head_params
    return params


def plain_device(model: Model, strategy: Strategy, setup: Setup, device: int) -> tuple[Moment, float]:
    """One of the devices of finetune_pp.py and finetune_pp_peft.py."""
    num_devices = num_blocks(model, setup)
    layers = place_layers(model.layers, num_devices)[device]
    # A tied head lies with the embedding, but the loss is computed where the last layer is.
    block = Block(layers, device == 0, device == num_devices - 1, head_is_a_copy=False)
    return block_memory(model, strategy, setup, block, in_flight=1)


def stage(model: Model, strategy: Strategy, setup: Setup, number: int) -> tuple[Moment, float]:
    """One of the stages of finetune_pp_1f1b.py: at most as many micro-batches are in flight as stages follow it."""
    num_stages = num_blocks(model, setup)
    is_last = number == num_stages - 1
    block = Block(stage_layers(model, setup)[number], number == 0, is_last, head_is_a_copy=num_stages > 1)
    in_flight = min(num_stages - number, setup.accumulation)
    return block_memory(model, strategy, setup, block, in_flight)


def block_memory(model: Model, strategy: Strategy, setup: Setup, block: Block, in_flight: int) -> tuple[Moment, float]:
    """The worst moment of a device with some of the layers, and its states.

    Args:
        in_flight: micro-batches whose activations are there at once.
    """
    size = setup.compute_bytes
    tokens = setup.tokens
    params = block_params(model, block)
    head = 0
    if block.has_head:
        head = model.head_params
    is_autocast = uses_autocast(strategy, setup)
    copies = 0.0
    head_copy = 0.0
    if strategy.adapter:
        trained = trained_params(model, strategy, setup) * block.layers / model.layers
        weights = size * params + 4 * trained
        if size == 2:
            copies = size * trained
    else:
        trained = params
        weights = setup.weight_bytes * params
        if is_autocast:
            # A bf16 copy of every matrix until its backward; the embedding is only looked up.
            copies = size * (block.layers * model.layer_params + head)
            head_copy = size * head
    gradients = trained_bytes(strategy, setup) * trained
    optimizer = setup.optimizer_bytes * trained

    residual = size  # bytes of a number of the residual stream
    if is_autocast:
        residual = 4
    each_layer = saved_bytes(model, strategy, setup)
    kept = block.layers * each_layer
    recomputed = 0.0
    copies_at_loss = copies
    copies_in_layer = 0.0
    if setup.checkpointing:
        kept = block.layers * residual * model.hidden * tokens
        recomputed = each_layer
        copies_at_loss = head_copy
        if is_autocast:
            copies_in_layer = size * model.layer_params
    last = 0.0
    logits = 0.0
    head_gradient = 0.0
    if block.has_head:
        last = tokens * model.hidden * (4 + residual + size)
        logits = logits_bytes(model, strategy, setup)
        if not strategy.adapter:
            head_gradient = 4 * head
    accumulated = 0.0
    if setup.accumulation > 1:
        accumulated = gradients
    others = (in_flight - 1) * kept  # of micro-batches whose backward is still to come
    if strategy.kind == "1f1b" and not block.has_head:
        others += in_flight * size_of_border(model, setup)
    start = Moment(weights=weights, optimizer=optimizer)
    in_mlp = 3 * size * model.intermediate * tokens
    moments = [
        # The loss, or the end of the forward.
        replace(
            start,
            gradients=accumulated,
            activations=others + kept + last,
            logits=logits,
            buffers=copies_at_loss,
        ),
        # The backward of the last layer: the gradients within its MLP, and if it is recomputed its copies again.
        replace(
            start,
            gradients=max(accumulated, head_gradient),
            activations=others + kept + recomputed + in_mlp,
            buffers=copies_at_loss + copies_in_layer,
        ),
        # The update.
        replace(start, gradients=gradients),
    ]
    return worst_of(moments), weights + gradients + optimizer


def size_of_border(model: Model, setup: Setup) -> float:
    """What a stage sends on for each micro-batch, and keeps until the gradient of it comes back."""
    return setup.compute_bytes * model.hidden * setup.tokens


# -------------------------------------------------------------------------------------------------------------------
# Host and disk
# -------------------------------------------------------------------------------------------------------------------


def offloaded_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """Of one process, in host memory instead of on its GPU.

    Master copy, moments and gradients in float32, gradients on their way; ZeRO-2's buffer of the largest tensor's size;
    ZeRO-3's weights. None of it is freed between steps.
    """
    if not strategy.offload:
        return 0.0
    size = setup.compute_bytes
    processes = num_shards(strategy, setup)
    trained = trained_params(model, strategy, setup)
    offloaded = (8 + setup.zero_gradient_bytes + setup.optimizer_bytes) * trained / processes
    if strategy.kind == "zero3":
        return offloaded + size * model.params / processes
    return offloaded + setup.zero_gradient_bytes * largest_trained_tensor(model, strategy, setup)


def host_bytes(model: Model, strategy: Strategy, setup: Setup, offloaded: float) -> float:
    """Bytes of host memory on one node, at its worst moment."""
    size = 4
    if strategy.adapter or strategy.kind.startswith("zero"):
        size = setup.compute_bytes
    loaded = size * model.params
    if strategy.kind == "zero2":
        loaded = loaded * setup.gpus  # each process reads the whole model
    # Else only the first process of a node reads it, ZeRO-3 splits it while reading, and a stage reads its own part.
    # The first process gathers what was trained, to write it.
    gathered = 4 * trained_params(model, strategy, setup)
    processes = setup.gpus
    if strategy.is_one_process:
        processes = 1
    return max(loaded, gathered) + offloaded * processes


def disk_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """Bytes of one checkpoint."""
    trained = trained_params(model, strategy, setup)
    disk = (4 + setup.optimizer_bytes) * trained  # weights in float32, and the optimizer's state
    if strategy.kind.startswith("zero"):
        disk += 4 * trained + setup.compute_bytes * model.params  # masters, and weights
    if strategy.adapter:
        disk += 4 * trained  # PEFT's format beside trainable.safetensors
    return disk


# -------------------------------------------------------------------------------------------------------------------
# What fits
# -------------------------------------------------------------------------------------------------------------------


def fits(model: Model, strategy: Strategy, setup: Setup, gpu: GPU) -> bool:
    return memory(model, strategy, setup).total <= usable_bytes(gpu, setup.num_gpus)


def largest_that_fits(has_room: Callable[[int], bool], limit: int = 2**24) -> int:
    """The largest number up to `limit` for which `has_room` holds, as it does for all smaller ones; 0 if for none."""
    if not has_room(1):
        return 0
    low = 1
    high = 2
    while high <= limit and has_room(high):
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if has_room(middle):
            low = middle
        else:
            high = middle
    return low


def largest_rows(model: Model, strategy: Strategy, setup: Setup, gpu: GPU) -> int:
    """The most rows of one forward that fit; 0 if not even one does."""
    return largest_that_fits(lambda rows: fits(model, strategy, replace(setup, rows=rows), gpu))


def longest_context(model: Model, strategy: Strategy, setup: Setup, gpu: GPU) -> int:
    """The most tokens of a row that fit, one row a forward; 0 if not even one does."""
    one_row = replace(setup, rows=1)
    return largest_that_fits(lambda length: fits(model, strategy, replace(one_row, sequence_length=length), gpu))
