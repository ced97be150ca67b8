"""Memory by a formula: what a strategy holds on the fullest GPU at the worst moment of a step, line by line."""

from dataclasses import replace

from .hardware import GPU, usable
from .models import Model
from .strategies import Setup, Strategy

TARGETS_AT_ONCE = 512  # as in data_collator.py, which computes the loss of joined rows in chunks


def layer_activations(model: Model, strategy: Strategy, setup: Setup) -> float:
    """Bytes that one decoder layer keeps for its backward, for all tokens of a forward.

    Counted from transformers' modeling_llama.py, one line for each saved tensor; h, a, f: values of a token at the
    width of the residual stream, of attention and of the MLP; e: bytes of a number in the compute precision.
    """
    h, a, f, e = model.hidden, model.attention_width, model.intermediate, setup.compute_bytes
    autocast = strategy.kind == "pp" and e == 2 and not strategy.adapter  # float32 weights and residual stream
    joined = setup.padding_free and setup.rows > 1  # attention then goes document by document, without a mask
    masked = setup.rows > 1 and not joined  # padded rows need one; every layer saves it in the compute precision
    # With a mask, and in joined rows on a CPU, keys and values are repeated for all heads.
    kv = a if masked or (joined and setup.on_cpu) else a * model.kv_heads / model.heads
    per_token = e * (2 * a + 2 * kv)  # query, key, value and output of attention
    per_token += 4 * model.heads  # attention's log-sum-exp, float32
    per_token += e * setup.sequence_length if masked else 0
    per_token += 2 * 4 * h + 2 * 4  # each of two norms: its input in float32, and the root mean square
    per_token += 3 * e * f  # gate, its activation, up
    if not strategy.adapter:
        per_token += 2 * (4 if autocast or e == 4 else e) * h  # each norm: the normalised input, for its weight
        # The inputs of query/key/value and of gate/up; under autocast each of the five casts its own copy.
        per_token += (5 if autocast else 2) * e * h
        # The inputs of down and of the output matrix; the latter is attention's output itself, if rows are not joined.
        per_token += e * f + (e * a if joined else 0)
    elif setup.lora_dropout:
        # Each of the seven adapters: its dropout's mask (a byte; in the compute precision on a CPU) and result.
        noise = e if setup.on_cpu else 1
        per_token += (noise + e) * sum(inputs for inputs, _ in model.linears)
        per_token += 7 * e * setup.lora_rank
    else:
        per_token += 2 * e * h + e * f + (e * a if joined else 0) + 7 * e * setup.lora_rank
    if strategy.adapter and strategy.kind == "zero3" and setup.lora_dropout:
        # DeepSpeed's linear layers keep their inputs although their weights are frozen.
        per_token += e * (2 * h + a + f)
    return per_token * setup.tokens


def memory(model: Model, strategy: Strategy, setup: Setup) -> dict[str, float]:
    """Bytes on the fullest GPU at the worst moment of a step, by kind, and what host and disk need.

    P parameters, T of them trained, N processes (the pipeline has one process over `gpus` devices). e: bytes of a
    number in the compute precision, 2 for bf16.

    Returns:
        weights, gradients, optimizer, activations, logits, buffers: at the worst moment; `total` is their sum;
        `states`: weights, gradients and optimizer when all gradients are there; `host`: bytes of host memory on one
        node; `offloaded`: those of one process that are there instead of on its GPU; `disk`: bytes of one checkpoint.
    """
    trained = model.lora_params(setup.lora_rank) if strategy.adapter else model.params
    processes = 1 if strategy.kind == "pp" else setup.gpus * setup.nodes
    if strategy.kind == "pp":
        devices = [pipeline_device(model, strategy, setup, trained, d) for d in range(min(setup.gpus, model.layers))]
        parts = max(devices, key=lambda parts: parts["total"])
    else:
        parts = sharded(model, strategy, setup, trained, processes)
    return parts | host_and_disk(model, strategy, setup, trained, processes)


def sharded(model: Model, strategy: Strategy, setup: Setup, trained: float, processes: int) -> dict[str, float]:
    """FSDP2 and ZeRO, on any of the equal GPUs."""
    e, tokens = setup.compute_bytes, setup.tokens
    frozen = model.params if strategy.adapter else 0
    layer, root = e * model.layer_params, e * model.root_params
    if strategy.four_bit:
        # NF4 with double quantisation (arXiv:2305.14314): 4 bits and 0.127 of constants; embedding and head stay bf16.
        layer = 4.127 / 8 * model.layer_params
        weights = (layer * model.layers + root) / processes + 4 * trained / processes
    elif strategy.kind == "fsdp":
        weights = (e * frozen + 4 * trained) / processes  # what is trained is float32, what is frozen is not
    elif strategy.kind == "zero2":
        weights = e * (frozen + trained)  # whole on each GPU
    else:
        weights = 0 if strategy.offload else e * (frozen + trained) / processes

    if strategy.kind == "fsdp":
        gradients, optimizer = 4 * trained / processes, 8 * trained / processes
    else:
        # DeepSpeed: gradients in the compute precision, and at the update a float32 copy of them; a float32 master copy
        # of the weights and AdamW's two moments.
        gradients, optimizer = e * trained / processes, 12 * trained / processes
        if strategy.offload:
            gradients = optimizer = 0  # in host memory
    gradient_copy = 0 if strategy.kind == "fsdp" or strategy.offload else 4 * trained / processes

    # What is whole for a moment, because it computes or travels.
    head = e * model.vocab * model.hidden
    layer_gradient, head_gradient = (0, 0) if strategy.adapter else (layer, head)
    if strategy.kind == "fsdp":
        # accelerate shards the embedding, each layer, and the final norm with the head by themselves. The head stays
        # gathered until its backward; tied to the embedding it does during the whole step, and so does its gradient.
        at_loss, in_layer, after = head + layer, 2 * layer + model.tied * head, head
        # Gradients are copied to be reduced in float32, of the head while the last layer computes.
        reduced, head_reduced, root_gradient = 4 / e * layer_gradient, 4 / e * head_gradient, head_gradient
        root_reduced, root_shard = head_reduced, head_reduced / processes
        if model.tied:
            head_reduced = 0
        else:
            head_gradient = 0
    else:
        bucket = e * model.hidden**2  # the "auto" size of transformers' DeepSpeed integration
        # What is reduced is joined in a flat copy, a tensor above the bucket's size by itself; gloo copies it again.
        flat = (1 + setup.on_cpu) * e * largest_tensor(model, strategy, setup) if processes > 1 else 0
        reduced, root_reduced, head_reduced = 2 * bucket + flat, 2 * bucket + flat, 2 * bucket + flat
        root_gradient, root_shard, after = 0, 0, 0
        layer_gradient = 0  # copied into the bucket as it comes
        # On its way to the host a gradient of ZeRO-2 passes through a buffer of the largest tensor's size.
        at_loss = in_layer = e * largest_tensor(model, strategy, setup) if strategy.offload else 0

    per_layer = layer_activations(model, strategy, setup)
    kept = model.layers * (e * model.hidden * tokens if setup.checkpointing else per_layer)
    recomputed = per_layer if setup.checkpointing else 0
    last = tokens * model.hidden * (4 + 2 * e)  # the final norm: its input in float32, normalised, the head's input
    # What is there from the start: ZeRO-3 has one buffer for the gradients' shards and never frees it.
    accumulated = gradients if setup.accumulation > 1 or strategy.kind == "zero3" else 0
    states = {"weights": weights, "optimizer": optimizer}
    moments = []
    if strategy.kind == "zero3":
        matrix = e * max(inputs * outputs for inputs, outputs in model.linears)
        ahead, again, share = prefetched(model, strategy, setup)
        copied = setup.on_cpu * head  # gloo gathers into a buffer of its own
        if processes == 1 and (setup.on_cpu or not strategy.offload):
            head = matrix = layer = ahead = again = copied = 0  # alone it has every matrix, unless the host has it
        at_loss, in_layer = again + head, again + matrix
        moments = [
            # In the forward, with most on its way; the head before its backward, and when its gradient is reduced.
            {"activations": share * kept, "buffers": ahead + copied},
            {"activations": kept + last, "buffers": again + head + copied + head_gradient},
            {"activations": kept + last, "buffers": again + head + head_gradient + reduced},
        ]
        if strategy.adapter and setup.checkpointing:
            # A layer's frozen weights, gathered to recompute it, are released only in its backward.
            moments.append({"activations": kept + recomputed, "buffers": again + layer})
        moments = [states | {"gradients": accumulated, "logits": 0} | moment for moment in moments]
        # A layer's backward: its matrices' gradients are reduced one by one, and the head's is gone.
        head_gradient, layer_gradient = 0, 0 if strategy.adapter else matrix
        reduced = head_reduced = 2 * bucket + (1 + setup.on_cpu) * layer_gradient
    moments += [
        # The loss: everything is kept.
        states | {"gradients": accumulated, "activations": kept + last, "logits": logits_bytes(model, strategy, setup),
                  "buffers": at_loss},
        # The end of the backward: the layers' gradients are shards, those of embedding and head become so.
        states | {"gradients": gradients - root_shard, "activations": 0, "logits": 0,
                  "buffers": after + root_gradient + root_reduced},
        states | {"gradients": gradients + gradient_copy, "activations": 0, "logits": 0, "buffers": 0},
    ]  # fmt: skip
    # The backward of a layer when `done` layers behind it are through: the head's gradient is there, what the layer
    # kept or recomputes, the gradients within its MLP, and the gradient of the layer before, which is being reduced.
    transient = 3 * e * model.intermediate * tokens
    for done in (0, 1, model.layers - 1):
        left = kept * (model.layers - done) / model.layers
        so_far = max(accumulated, (gradients - root_shard) * done / model.layers)
        within = {
            "activations": left + recomputed + transient,
            "buffers": in_layer + head_gradient + (reduced if done else head_reduced),
        }
        # Its end: its own gradient is there, and still half of what was recomputed.
        left = kept * (model.layers - done - 1) / model.layers
        end = {"activations": left + recomputed / 2, "buffers": in_layer + head_gradient + layer_gradient + reduced}
        moments += [states | {"gradients": so_far, "logits": 0} | moment for moment in (within, end)]
    parts = max(moments, key=lambda moment: sum(moment.values()))
    return parts | {"total": sum(parts.values()), "states": weights + gradients + gradient_copy + optimizer}


def largest_tensor(model: Model, strategy: Strategy, setup: Setup) -> int:
    """Parameters of the largest trained tensor."""
    if strategy.adapter:
        return setup.lora_rank * max(max(shape) for shape in model.linears)
    return max(model.vocab * model.hidden, *(inputs * outputs for inputs, outputs in model.linears))


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
    e, live = setup.compute_bytes, 1e9  # of both settings
    layers, matrix = model.layers * model.layer_params, model.vocab * model.hidden
    share = sum(min(1, inputs * outputs / model.hidden**2) for inputs, outputs in model.linears)
    share /= 13 + 4 * len(model.linears) * strategy.adapter
    # The embedding comes again where its backward needs it: to train it, or to give checkpointing its start.
    embedding = matrix * (not strategy.adapter or setup.checkpointing)
    # While the first layers come again, `share` of as many are computed and released.
    most, again = (1 - share**2) * layers, max(share * layers, layers - live) + embedding
    if not setup.padding_free:
        most, again = layers, layers + embedding
    most += matrix + (0 if model.tied else embedding)
    return e * min(live + matrix, most), e * min(live, again), share + share**2


def logits_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """What the loss holds besides its input."""
    if not setup.padding_free:
        # Log-softmax, its gradient and that of the loss, all float32: the worst moment of the cross entropy.
        return 3 * 4 * model.vocab * setup.tokens
    # ChunkedCrossEntropy: a chunk's logits and their log-softmax in float32; the gradient of the input for all targets.
    e, targets = setup.compute_bytes, setup.tokens * setup.target_share
    chunk, copied = min(targets, TARGETS_AT_ONCE), e * (e < 4)
    logits = 8 * model.vocab * chunk
    if not strategy.adapter:
        # The gradient of the weight, float32, and that of a chunk in the compute precision, if that is another one:
        # beside the chunk's gradient of the logits, which are its log-softmax, overwritten, and a copy. To add one
        # precision to another, a CPU makes a copy.
        head = model.vocab * model.hidden
        added = (copied + 4 * setup.on_cpu * (e < 4)) * head
        logits = 4 * head + max(logits, (4 + copied) * model.vocab * chunk + added)
    return logits + e * model.hidden * targets


def pipeline_device(model: Model, strategy: Strategy, setup: Setup, trained: float, device: int) -> dict[str, float]:
    """One of the devices over which finetune_pp.py and finetune_pp_peft.py spread the layers in contiguous blocks."""
    e, tokens, num_devices = setup.compute_bytes, setup.tokens, min(setup.gpus, model.layers)
    sizes = [model.layers // num_devices] * num_devices  # as place_layers in the scripts: larger blocks in the middle
    for i in sorted(range(num_devices), key=lambda i: abs(2 * i + 1 - num_devices))[: model.layers % num_devices]:
        sizes[i] += 1
    layers, is_last = sizes[device], device == num_devices - 1
    head = model.vocab * model.hidden
    params = layers * model.layer_params + (head if device == 0 else 0)
    params += is_last * (model.hidden + (0 if model.tied else head))
    if strategy.adapter:
        trained = trained * layers / model.layers
        weights, copies = e * params + 4 * trained, e * trained if e == 2 else 0
    else:
        trained, weights = params, 4 * params
        # Autocast keeps a bf16 copy of every matrix until its backward; the embedding is only looked up.
        copies = e * (layers * model.layer_params + is_last * head) if e == 2 else 0
    gradients, optimizer = 4 * trained, 8 * trained
    residual = e if strategy.adapter or e == 4 else 4  # bytes of a number of the residual stream
    per_layer = layer_activations(model, strategy, setup)
    kept = layers * (residual * model.hidden * tokens if setup.checkpointing else per_layer)
    recomputed = per_layer if setup.checkpointing else 0
    last = is_last * tokens * model.hidden * (4 + residual + e)
    accumulated = gradients if setup.accumulation > 1 else 0
    states = {"weights": weights, "optimizer": optimizer}
    copies_at_loss = is_last * e * head * (e == 2) if setup.checkpointing else copies
    # In the backward of the last layer: the gradients within its MLP and, if it is recomputed, autocast's copies again.
    transient = 3 * e * model.intermediate * tokens
    copies_in_layer = e * model.layer_params * (e == 2 and setup.checkpointing and not strategy.adapter)
    logits = is_last * logits_bytes(model, strategy, setup)
    moments = [
        states | {"gradients": accumulated, "activations": kept + last, "logits": logits, "buffers": copies_at_loss},
        states | {"gradients": max(accumulated, is_last * 4 * head * (not strategy.adapter)), "logits": 0,
                  "activations": kept + recomputed + transient, "buffers": copies_at_loss + copies_in_layer},
        states | {"gradients": gradients, "activations": 0, "logits": 0, "buffers": 0},
    ]  # fmt: skip
    parts = max(moments, key=lambda moment: sum(moment.values()))
    return parts | {"total": sum(parts.values()), "states": weights + gradients + optimizer}


def host_and_disk(model: Model, strategy: Strategy, setup: Setup, trained: float, processes: int) -> dict[str, float]:
    """Bytes of host memory on one node, at its worst moment, and of one checkpoint on disk."""
    e, on_node = setup.compute_bytes, 1 if strategy.kind == "pp" else setup.gpus
    loaded = (e if strategy.adapter or strategy.kind.startswith("zero") else 4) * model.params
    host = 4 * trained  # the first process gathers what was trained, to write it
    if strategy.kind == "zero2":
        host = max(host, loaded * on_node)  # each process reads the whole model
    else:
        host = max(host, loaded)  # only the first process of a node reads it; ZeRO-3 splits it while reading
    offloaded = 0.0
    if strategy.offload:
        # Master copy, moments, gradients in float32 and, for the way, in the compute precision; ZeRO-2's buffer of the
        # largest tensor's size; ZeRO-3's weights. None of it is freed between steps.
        offloaded = (16 + e) * trained / processes
        offloaded += e * (
            model.params / processes if strategy.kind == "zero3" else largest_tensor(model, strategy, setup)
        )
        host += offloaded * on_node
    disk = (4 + 8) * trained  # weights and two moments, float32
    if strategy.kind.startswith("zero"):
        disk += 4 * trained + e * model.params  # masters, and weights
    if strategy.adapter:
        disk += 4 * trained  # PEFT's format beside trainable.safetensors
    return {"host": host, "disk": disk, "offloaded": offloaded}


def largest_rows(model: Model, strategy: Strategy, setup: Setup, gpu: GPU) -> int:
    """The most rows of one forward that fit; 0 if not even one does."""
    fits = lambda rows: memory(model, strategy, replace(setup, rows=rows))["total"] <= usable(gpu)  # noqa: E731
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
