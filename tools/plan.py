"""Says before you rent it what a machine can train: memory, time and price of every strategy of this toolkit.

    python tools/plan.py --model llama-7b --gpus 8 --gpu a100-80g --tokens 2.5e9 --sequence_length 512 --batch 384
    python tools/plan.py --model llama-2-70b --gpus 8 --nodes 64 --batch 4096 --price_per_gpu_hour 2
    python tools/plan.py --model models/SmolLM2-135M-Instruct --gpus 1 --gpu rtx4090 --simulate
    python tools/plan.py --published          # the time model against measured rows that others published
    python tools/plan.py --validate quick     # the memory model against real runs on this machine (minutes)

Memory is computed twice, by two ways that share nothing: a formula, which stands line by line in `memory`, and, with
--simulate, the real training step of the real model on fake tensors. Both count what PyTorch holds at the worst moment
of a step, with the optimizer's moments there. What CUDA, NCCL and the allocator take besides is OVERHEAD.

Time is a roofline: arithmetic, memory traffic of what is no matrix product, and communication, which hides behind the
arithmetic as far as it fits. Its constants are those in HARDWARE and the few lines below it, the same for all rows.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

GB, GiB = 1e9, 2**30


# -------------------------------------------------------------------------------------------------------------------
# Constants, each with its source
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, from its maker's data sheet."""

    flops: float  # dense bf16 multiply-adds with float32 sums, in operations per second
    memory_bandwidth: float  # bytes/s
    memory: float  # bytes
    link: float  # bytes/s, one direction, to the other GPUs of the machine: NVLink, or PCIe where there is none


HARDWARE = {
    "a100-80g": GPU(312e12, 2039 * GB, 80 * GiB, 300 * GB),
    "a100-40g": GPU(312e12, 1555 * GB, 40 * GiB, 300 * GB),
    "h100-80g": GPU(989e12, 3350 * GB, 80 * GiB, 450 * GB),
    "h200": GPU(989e12, 4800 * GB, 141 * GiB, 450 * GB),
    "l40s": GPU(362e12, 864 * GB, 48 * GiB, 25 * GB),
    "rtx4090": GPU(165e12, 1008 * GB, 24 * GiB, 25 * GB),
    "rtx3090": GPU(71e12, 936 * GB, 24 * GiB, 12 * GB),
}
# The handful of constants that no data sheet states. They were chosen once, for all rows of --published together.
MATMUL_SHARE = 0.66  # of the peak, sustained over all matrix products of a step
BANDWIDTH_SHARE = 0.8  # of a data sheet's bandwidth, sustained: memory, NVLink and network
NETWORK = 25 * GB  # bytes/s for each GPU between machines: one 200 Gb/s adapter a GPU
LATENCY = 12e-6  # s for each hop of a ring between machines
HOST_LINK = 0.75 * GB  # bytes/s for each GPU that DeepSpeed's offload sustains with all GPUs at once; PCIe 4 has 25
HOST_ADAM = 15 * GB  # bytes/s of host memory for each process in DeepSpeed's CPUAdam
LAUNCH = 10e-6  # s that PyTorch needs to start one operation; a GPU that computes less waits
TARGETS_AT_ONCE = 512  # as in data_collator.py, which computes the loss of joined rows in chunks
OVERHEAD = 2 * GiB  # CUDA context, NCCL's buffers, library workspaces
FRAGMENTATION = 0.05  # share of a GPU's memory that PyTorch's allocator cannot use


@dataclass(frozen=True)
class Model:
    """The shape of a LLaMA-like decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int = 0  # 0: hidden / heads

    @property
    def attention_width(self) -> int:
        return self.heads * (self.head_dim or self.hidden // self.heads)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's seven matrices: query, key, value, output, gate, up, down."""
        h, f, a = self.hidden, self.intermediate, self.attention_width
        kv = a * self.kv_heads // self.heads
        return [(h, a), (h, kv), (h, kv), (a, h), (h, f), (h, f), (f, h)]

    @property
    def layer_params(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linears) + 2 * self.hidden

    @property
    def root_params(self) -> int:
        """Embedding, final norm and head: what FSDP keeps together, outside of the layers."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def params(self) -> int:
        return self.layers * self.layer_params + self.root_params

    def lora_params(self, rank: int) -> int:
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


MODELS = {
    "llama-7b": Model(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Model(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": Model(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Model(8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": Model(4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": Model(5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": Model(8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": Model(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Model(8192, 28672, 80, 64, 8, 128256),
    "llama-3.2-1b": Model(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": Model(3072, 8192, 28, 24, 8, 128256, tied=True),
}


def load_model(name: str) -> Model:
    """The shape of a named model, or of config.json, or of the folder that holds it.

    Raises:
        ValueError: the name is unknown, or the file is not the configuration of a dense LLaMA-like decoder.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"--model {name}: no such file; name a config.json, or one of {', '.join(MODELS)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if any("expert" in key for key in config):
            raise ValueError("a mixture of experts")
        return Model(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            head_dim=config.get("head_dim") or 0,
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"--model {name}: not a dense LLaMA-like configuration ({problem})") from None


@dataclass(frozen=True)
class Strategy:
    """One way of the toolkit to train, and how a user starts it."""

    kind: str  # pp, fsdp, zero2 or zero3
    adapter: bool = False
    offload: bool = False
    four_bit: bool = False
    launcher: str = ""
    flags: str = ""


ZERO, LORA = "finetune_pp_peft_trainer_deepspeed.sh", "finetune_pp_peft_trainer_lora.sh"
STRATEGIES = {
    "pp": Strategy("pp", launcher="finetune_pp.sh"),
    "pp_peft": Strategy("pp", adapter=True, launcher="finetune_pp_peft.sh"),
    "FSDP": Strategy("fsdp", launcher="finetune_pp_peft_trainer.sh"),
    "FSDP+LoRA": Strategy("fsdp", adapter=True, launcher=LORA),
    "QLoRA": Strategy("fsdp", adapter=True, four_bit=True, launcher=LORA, flags="--load_in_4bit True"),
}
for stage in ("2", "3"):
    for offload in (False, True):
        config = f"--deepspeed ds_configs/zero{stage}{'_offload' if offload else ''}.json"
        for adapter in (False, True):
            name = f"ZeRO-{stage}{' offload' if offload else ''}{'+LoRA' if adapter else ''}"
            flags = f"{config} --lora_used {adapter}"
            STRATEGIES[name] = Strategy(f"zero{stage}", adapter, offload, launcher=ZERO, flags=flags)


@dataclass(frozen=True)
class Setup:
    """What is the same for all strategies, and the size of one forward."""

    gpus: int = 8  # of one machine
    nodes: int = 1
    rows: int = 1  # rows of one forward of one process
    accumulation: int = 1
    sequence_length: int = 512  # tokens of a row
    checkpointing: bool = False
    padding_free: bool = True  # the rows of a forward joined to one
    target_share: float = 1.0  # share of the tokens that are targets; only those get logits if padding-free
    lora_rank: int = 8
    lora_dropout: bool = True
    compute_bytes: int = 2  # of a number in the forward: bf16; 4 in float32
    on_cpu: bool = False  # CPU processes, as in --validate

    @property
    def tokens(self) -> int:
        """Tokens of one forward of one process."""
        return self.rows * self.sequence_length


# -------------------------------------------------------------------------------------------------------------------
# Memory: the formula
# -------------------------------------------------------------------------------------------------------------------


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


def usable(gpu: GPU) -> float:
    """Bytes of a GPU that tensors can fill."""
    return gpu.memory * (1 - FRAGMENTATION) - OVERHEAD


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


# -------------------------------------------------------------------------------------------------------------------
# Time: the roofline
# -------------------------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------------------------
# The time model against what others measured
# -------------------------------------------------------------------------------------------------------------------

MPT_7B = Model(4096, 10923, 32, 32, 32, 50432, tied=True)  # two matrices of 4 h each count like three of 8/3 h
MPT_13B = replace(MPT_7B, hidden=5120, intermediate=13653, layers=40, heads=40, kv_heads=40)
MPT_30B = replace(MPT_7B, hidden=7168, intermediate=19115, layers=48, heads=64, kv_heads=64)


@dataclass(frozen=True)
class Published:
    """A measured row: `value` in hours for 2.5e9 tokens, in tokens/s/GPU, or in GPU-hours for `tokens`."""

    source: str
    what: str
    unit: str
    value: float
    model: Model
    strategy: str
    setup: Setup
    attention: str
    tokens: float = 2.5e9
    tensor_parallel: int = 1


def reference(what: str, hours: float, model: str, strategy: str, rows: int, accumulation: int) -> Published:
    """Rows of the 8xA100 table. It states the rows of a step, not those of a forward: assumed are 16 on a GPU for 7B,
    as its smallest step has them; where 48 are one forward (FSDP at 384 rows, and 13B), activations are recomputed."""
    setup = Setup(rows=rows, accumulation=accumulation, checkpointing=rows > 16, padding_free=False)
    return Published("8xA100 table", what, "h", hours, MODELS[model], strategy, setup, "eager")


def mosaic(what: str, speed: float, model: Model, rows: int) -> Published:
    setup = Setup(rows=rows, checkpointing=True, padding_free=False)
    return Published("MosaicML", what, "tokens/s", speed, model, "FSDP", setup, "fused")


def meta(what: str, hours: float, model: str, tokens: float, tensor_parallel: int) -> Published:
    setup = Setup(gpus=1, accumulation=1953, sequence_length=2048, padding_free=False)  # 4M tokens a step, 2048 GPUs
    parallel = {"tensor_parallel": tensor_parallel, "tokens": tokens}
    return Published("LLaMA paper", what, "GPU-h", hours, MODELS[model], "FSDP", setup, "fused", **parallel)


PUBLISHED = [
    reference("7B FSDP, 384 rows", 35, "llama-7b", "FSDP", 48, 1),
    reference("7B FSDP, 128 rows", 36, "llama-7b", "FSDP", 16, 1),
    reference("7B ZeRO-2 offload, 384 rows", 90, "llama-7b", "ZeRO-2 offload", 16, 3),
    reference("7B ZeRO-3 offload, 128 rows", 100, "llama-7b", "ZeRO-3 offload", 16, 1),
    reference("7B ZeRO-3 offload, 768 rows", 100, "llama-7b", "ZeRO-3 offload", 16, 6),
    reference("13B ZeRO-3 offload, 384 rows", 122, "llama-13b", "ZeRO-3 offload", 48, 1),
    mosaic("7B, 512 tokens", 4099, MPT_7B, 128),
    mosaic("13B, 512 tokens", 2190, MPT_13B, 64),
    mosaic("30B, 512 tokens", 844, MPT_30B, 12),
    meta("7B, 1T tokens", 82432, "llama-7b", 1e12, 1),
    meta("13B, 1T tokens", 135168, "llama-13b", 1e12, 2),
    meta("33B, 1.4T tokens", 530432, "llama-33b", 1.4e12, 4),
    meta("65B, 1.4T tokens", 1022362, "llama-65b", 1.4e12, 8),
]


def predict(row: Published) -> float:
    """The row's number as the roofline has it."""
    gpu, strategy = HARDWARE["a100-80g"], STRATEGIES[row.strategy]
    if row.source != "LLaMA paper":
        speed = times(row.model, strategy, row.setup, gpu, attention=row.attention)["tokens_per_second_per_gpu"]
        return speed if row.unit == "tokens/s" else row.tokens / speed / 8 / 3600
    # Tensor and sequence parallelism over t GPUs (arXiv:2205.05198): four all-reduces of the residual stream for each
    # layer, which do not overlap; no other communication is counted, as the paper hides it.
    t = row.tensor_parallel
    alone = times(row.model, strategy, row.setup, gpu, attention=row.attention)
    sent = 4 * row.model.layers * 2 * 2 * row.model.hidden * (t - 1) / t  # bytes of one token, on each of t GPUs
    seconds = 1 / alone["tokens_per_second_per_gpu"] + sent / (gpu.link * BANDWIDTH_SHARE) * t
    return row.tokens * seconds / 3600


def published_table() -> list[dict]:
    return [{"row": row, "predicted": predict(row), "error": predict(row) / row.value - 1} for row in PUBLISHED]


def print_published() -> None:
    print(f"{'source':14}{'what':32}{'measured':>12}{'predicted':>12}  {'unit':10}{'error':>8}")
    table = published_table()
    for entry in table:
        row = entry["row"]
        print(f"{row.source:14}{row.what:32}{row.value:>12,.0f}{entry['predicted']:>12,.0f}  {row.unit:10}"
              f"{entry['error']:>+8.1%}")  # fmt: skip
    errors = sorted(abs(entry["error"]) for entry in table)
    print(f"median error {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}")


# -------------------------------------------------------------------------------------------------------------------
# Memory, the second way: the real step on fake tensors
# -------------------------------------------------------------------------------------------------------------------


def simulate(model: Model, strategy: Strategy, setup: Setup) -> dict[str, float]:
    """Bytes on one of `setup.gpus * setup.nodes` processes at the worst moment of the second training step.

    transformers' model, PEFT's adapter, fully_shard with the scripts' policy and AdamW run on fake tensors, which have
    shapes but no numbers, in a fake process group; torch's trackers add up the storages. The formula has no part in it.
    It runs on fake CPU tensors, whose kernels keep a dropout mask in the compute precision where a GPU keeps a byte.

    Returns:
        total: the worst moment; states: weights and optimizer between two steps.
    """
    import warnings

    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM, LlamaConfig

    warnings.filterwarnings("ignore")  # of fake tensors
    bf16 = setup.compute_bytes == 2
    dtype = torch.bfloat16 if bf16 and strategy.adapter else torch.float32
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim or model.hidden // model.heads,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
        max_position_embeddings=max(2048, setup.sequence_length),
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if setup.checkpointing:
        skeleton.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if strategy.adapter:
        import peft

        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=setup.lora_rank, target_modules="all-linear",
                               lora_dropout=0.05 * setup.lora_dropout)  # fmt: skip
        skeleton = peft.get_peft_model(skeleton, lora)
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setup.gpus * setup.nodes)
    mesh = init_device_mesh("cpu", (setup.gpus * setup.nodes,))  # outside of the fake mode: it computes with tensors
    with FakeTensorMode():
        fill(skeleton)
        if strategy.kind == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            policy = {"mesh": mesh} | ({"mp_policy": policy} if bf16 else {})
            for module in skeleton.modules():
                if type(module).__name__ == "LlamaDecoderLayer":
                    fully_shard(module, **policy)
            # As accelerate does it.
            embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
            norm = next(module for name, module in skeleton.named_modules() if name.endswith("model.norm"))
            fully_shard([norm, embedding, head] if model.tied else [norm, head], reshard_after_forward=False, **policy)
            if not model.tied:
                fully_shard(embedding, **policy)
            fully_shard(skeleton, **policy)
        trainable = [parameter for parameter in skeleton.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
        if strategy.kind == "fsdp":
            tracker = FSDPMemTracker(skeleton, optimizer)
        else:
            tracker = MemTracker()
            tracker.track_external(skeleton, optimizer)
        skeleton.train()
        ids = torch.zeros(setup.rows, setup.sequence_length, dtype=torch.int64)
        for _ in range(2):  # the optimizer's moments are there from the second step on
            with tracker:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = skeleton(input_ids=ids, labels=ids, num_items_in_batch=ids.numel(), use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            peak, between = (tracker.get_tracker_snapshot(moment) for moment in ("peak", "current"))
            tracker.reset_mod_stats()
    dist.destroy_process_group()
    total, states = (next(iter(snapshot.values()))["Total"] for snapshot in (peak, between))
    return {"total": total, "states": states}


def fill(module) -> None:
    """Replaces parameters and buffers on `meta` by fake ones on the CPU; tied ones stay tied."""
    import torch

    filled = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in filled:
                    filled[parameter] = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype),
                                                           requires_grad=parameter.requires_grad)  # fmt: skip
                part._parameters[name] = filled[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


# -------------------------------------------------------------------------------------------------------------------
# The formula against real runs of the scripts on this machine
# -------------------------------------------------------------------------------------------------------------------

SIZES = (Model(640, 1728, 6, 8, 8, 8000), Model(768, 2048, 8, 8, 4, 8000), Model(1024, 2816, 6, 16, 16, 8000))
LENGTHS = (128, 256)
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"finetune_pp.sh": "finetune_pp.py", "finetune_pp_peft.sh": "finetune_pp_peft.py", ZERO: ZERO[:-3] + ".py"}
SCRIPTS |= {"finetune_pp_peft_trainer.sh": "finetune_pp_peft_trainer.py", LORA: LORA[:-3] + ".py"}


def measure(output: str, script: str, flags: list[str]) -> None:
    """Runs a script of the toolkit in this process, and writes what it held in its steady third step as JSON.

    live: bytes of all tensors that Python can reach when the optimizer is about to update; these are weights, gradients
    and moments, because what autograd keeps is out of Python's reach.
    rise: the process's resident memory at its highest, less what it holds besides tensors (libraries, Python's objects,
    the buffers of MKL's matrix products), which is its resident memory less `live` at that update.
    """
    import gc
    import runpy

    import torch
    import torch.distributed as dist
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found = {"live": 0, "besides": 0, "rise": 0, "backwards": 0}

    def resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(name + ":")[1].split()[0]) * 1024

    def live_bytes() -> int:
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
                    if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def before_update(*_) -> None:
        if found["backwards"] == 3 and (live := live_bytes()) > found["live"]:
            found["live"], found["besides"] = live, resident("VmRSS") - live

    backward = torch.Tensor.backward

    def counted_backward(*args, **kwargs):
        found["backwards"] += 1
        if found["backwards"] == 3:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        if found["backwards"] == 4:
            found["rise"] = resident("VmHWM") - found["besides"]
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(f"{output}.{rank}").write_text(json.dumps(found))
            if dist.is_initialized():
                dist.barrier()  # nobody leaves while another still waits for a collective
            os._exit(0)
        return backward(*args, **kwargs)

    torch.Tensor.backward = counted_backward
    register_optimizer_step_pre_hook(before_update)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(script, run_name="__main__")


def save_parts(folder: Path, model: Model, sequence_length: int) -> None:
    """A random model of this shape, a tokenizer for it, and rows of equal length in which each token is a target."""
    import torch
    from datasets import Dataset, Features, Sequence, Value
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab,
    )
    if not (folder / "model").is_dir():
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.vocab)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / "model")
    rows = torch.randint(3, model.vocab, (64, sequence_length)).tolist()
    features = Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")})
    path = folder / f"rows-{sequence_length}"
    Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features).save_to_disk(path)
    (path / "ledger.json").write_text(json.dumps({"sha256": str(sequence_length)}))


def validation_cases(extent: str) -> list[tuple[str, int, int, int, bool]]:
    """(strategy, processes, index of the size, index of the length, checkpointing).

    full: each strategy with 1 and 2 processes, every size and every length, checkpointing taking turns; quick: sizes
    and lengths take turns, too.
    """
    names = [name for name in STRATEGIES if name != "QLoRA"]
    pairs = [(name, n) for name in names for n in ((1,) if STRATEGIES[name].kind == "pp" else (1, 2))]
    if extent == "quick":
        return [(name, n, i % 3, i % 2, i % 4 == 3) for i, (name, n) in enumerate(pairs)]
    combinations = [(size, length, (size + length) % 2 == 1) for size in range(3) for length in range(2)]
    return [(name, n, *rest) for name, n in pairs for rest in combinations]


def run_case(folder: Path, name: str, processes: int, size: int, length: int, checkpointing: bool) -> dict:
    """One real run and its prediction, in bytes: `live` and `rise` as `measure` says, of the process that has most."""
    model, strategy, parts = SIZES[size], STRATEGIES[name], folder / str(size)
    if not (parts / f"rows-{LENGTHS[length]}").is_dir():
        save_parts(parts, model, LENGTHS[length])
    output = folder / f"{name}-{processes}-{size}-{length}-{checkpointing}"
    flags = ["--model_path", parts / "model", "--dataset_path", parts / f"rows-{LENGTHS[length]}", "--max_steps", 6]
    flags += ["--per_device_train_batch_size", 4, "--use_cpu", True, "--bf16", False, "--report_to", "none"]
    flags += ["--gradient_checkpointing", checkpointing, "--output_dir", f"{output}.run", *strategy.flags.split()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = [sys.executable, *launch, __file__, "--measure", output, SCRIPTS[strategy.launcher], *flags]
    # Freed memory goes back to the system at once, so that the resident memory is what is held.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    completed = subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | environment,
                               capture_output=True, text=True)  # fmt: skip
    found = [json.loads(path.read_text()) for path in folder.glob(f"{output.name}.[0-9]")]
    if len(found) < processes:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{completed.stdout[-2000:]}{completed.stderr[-4000:]}")
    setup = Setup(gpus=processes, rows=4, sequence_length=LENGTHS[length], checkpointing=checkpointing,
                  compute_bytes=4, on_cpu=True)  # fmt: skip
    predicted = memory(model, strategy, setup)
    buffer = setup.compute_bytes * largest_tensor(model, strategy, setup) if strategy.kind == "zero2" else 0
    return {
        "live": max(one["live"] for one in found),
        "rise": max(one["rise"] for one in found),
        # A CPU process has in itself what it offloads, and the buffer on the GPU's side.
        "predicted_live": predicted["states"] + predicted["offloaded"] + strategy.offload * buffer,
        "predicted_rise": predicted["total"] + predicted["offloaded"],
    }


def validate(extent: str) -> bool:
    """Prints every case with its errors; whether all are within 10 % (states) and 15 % (peak)."""
    print(f"{'strategy':20}{'processes':>10}{'parameters':>12}{'tokens':>8}{'ckpt':>6}{'states MiB':>12}{'formula':>9}"
          f"{'error':>8}{'peak MiB':>10}{'formula':>9}{'error':>8}")  # fmt: skip
    all_within = True
    with tempfile.TemporaryDirectory() as folder:
        for name, processes, size, length, checkpointing in validation_cases(extent):
            case = run_case(Path(folder), name, processes, size, length, checkpointing)
            errors = [case[f"predicted_{kind}"] / case[kind] - 1 for kind in ("live", "rise")]
            within = abs(errors[0]) <= 0.1 and abs(errors[1]) <= 0.15
            all_within &= within
            print(f"{name:20}{processes:>10}{SIZES[size].params / 1e6:>11.1f}M{4 * LENGTHS[length]:>8}"
                  f"{'yes' if checkpointing else 'no':>6}{case['live'] / 2**20:>12.0f}"
                  f"{case['predicted_live'] / 2**20:>9.0f}{errors[0]:>+8.1%}{case['rise'] / 2**20:>10.0f}"
                  f"{case['predicted_rise'] / 2**20:>9.0f}{errors[1]:>+8.1%}{'' if within else '  <'}",
                  flush=True)  # fmt: skip
    print("states: weights, gradients, optimizer (within 10 %); peak: resident memory without what is no tensor (15 %)")
    return all_within


# -------------------------------------------------------------------------------------------------------------------
# The plan
# -------------------------------------------------------------------------------------------------------------------


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


def print_simulation(args: Arguments, model: Model) -> None:
    """The formula against steps on fake tensors, for a forward of four padded rows."""
    print(f"\n{'strategy':14}{'ckpt':>5}{'rows':>6}{'formula GiB':>13}{'simulated GiB':>15}{'error':>8}{'seconds':>9}")
    for name in ("FSDP", "FSDP+LoRA") + (("pp",) if args.gpus * args.nodes == 1 else ()):
        for checkpointing in (False, True):
            strategy, started = STRATEGIES[name], time.perf_counter()
            setup = make_setup(args, checkpointing=checkpointing, rows=4, padding_free=False, on_cpu=True)
            formula, simulated = memory(model, strategy, setup)["total"], simulate(model, strategy, setup)["total"]
            seconds = time.perf_counter() - started
            print(f"{name:14}{'yes' if checkpointing else 'no':>5}{setup.rows:>6}{formula / GiB:>13.2f}"
                  f"{simulated / GiB:>15.2f}{formula / simulated - 1:>+8.1%}{seconds:>9.0f}", flush=True)  # fmt: skip
    print(
        "not simulated: ZeRO and QLoRA, as DeepSpeed and bitsandbytes take no fake tensors, and adapters in the plain"
    )
    print("loop, as torch's tracker wants a gradient of every weight; --validate runs them for real")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:  # a process of --validate
        return measure(sys.argv[2], sys.argv[3], sys.argv[4:])
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        model, gpu = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    if args.published:
        return print_published()
    if args.validate:
        sys.exit(0 if validate(args.validate) else "error: not all within their limits")
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
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # JSON stays alone in its stream
            print_simulation(args, model)


if __name__ == "__main__":
    main()
