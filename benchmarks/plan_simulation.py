"""The memory formula of tools/plan.py against a second way that shares nothing with it: the step on fake tensors.

    python benchmarks/plan_simulation.py --model llama-7b --gpus 8             # minutes
    python benchmarks/plan_simulation.py --model llama-2-70b --gpus 8 --nodes 8

transformers' model, PEFT's adapter, fully_shard with the scripts' policy and AdamW run on fake tensors, which have
shapes but no numbers, in a fake process group; torch's trackers add up the storages. The formula has no part in it.
Not simulated: ZeRO and QLoRA, because DeepSpeed and bitsandbytes take no fake tensors, and adapters in the plain loop,
because torch's tracker wants a gradient of every weight. benchmarks/plan_validation.py runs them for real.
"""

import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.hardware import GiB
from planning.memory import memory
from planning.models import Model, load_model
from planning.strategies import STRATEGIES, Setup, Strategy

ALLOWED = 0.1  # relative


@dataclass
class Arguments:
    model: str = field(default="llama-7b", metadata={"help": "a name such as llama-3-8b, a folder, or a hub id"})
    gpus: int = field(default=8, metadata={"help": "GPUs of one machine"})
    nodes: int = field(default=1, metadata={"help": "machines"})
    sequence_length: int = field(default=512, metadata={"help": "tokens of a row"})
    lora_rank: int = field(default=8, metadata={"help": "as the scripts' flag"})


def simulate(model: Model, strategy: Strategy, setup: Setup) -> tuple[float, float]:
    """Bytes on one process at the worst moment of the second training step, and those of the states between two steps.

    It runs on fake CPU tensors, whose kernels keep a dropout mask in the compute precision where a GPU keeps a byte.
    """
    warnings.filterwarnings("ignore")  # of fake tensors
    skeleton = make_skeleton(model, strategy, setup)
    num_processes = setup.num_gpus
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_processes)
    mesh = init_device_mesh("cpu", (num_processes,))  # outside of the fake mode: it computes with tensors
    with FakeTensorMode():
        fill(skeleton)
        if strategy.kind == "fsdp":
            shard(skeleton, model, mesh, setup.compute_bytes == 2)
        peak, between = track_steps(skeleton, strategy, setup)
    dist.destroy_process_group()
    return peak, between


def make_skeleton(model: Model, strategy: Strategy, setup: Setup) -> torch.nn.Module:
    """The model on `meta`, with the adapter and checkpointing of the strategy."""
    dtype = torch.float32
    if setup.compute_bytes == 2 and strategy.adapter:
        dtype = torch.bfloat16  # what is frozen
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
    if not strategy.adapter:
        return skeleton
    import peft

    dropout = 0.0
    if setup.lora_dropout:
        dropout = 0.05
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=setup.lora_rank, target_modules=list(setup.lora_targets), lora_dropout=dropout
    )
    return peft.get_peft_model(skeleton, lora)


def fill(skeleton: torch.nn.Module) -> None:
    """Replaces parameters and buffers on `meta` by fake ones on the CPU; tied ones stay tied."""
    filled = {}
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in filled:
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                filled[parameter] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = filled[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def shard(skeleton: torch.nn.Module, model: Model, mesh, bf16: bool) -> None:
    """As accelerate does it: each layer, the embedding, and the final norm with the head by themselves."""
    options = {"mesh": mesh}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    final_norm = None
    for name, module in skeleton.named_modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, **options)
        if name.endswith("model.norm"):
            final_norm = module
    embedding = skeleton.get_input_embeddings()
    head = skeleton.get_output_embeddings()
    if model.tied:
        fully_shard([final_norm, embedding, head], reshard_after_forward=False, **options)
    else:
        fully_shard([final_norm, head], reshard_after_forward=False, **options)
        fully_shard(embedding, **options)
    fully_shard(skeleton, **options)


def track_steps(skeleton: torch.nn.Module, strategy: Strategy, setup: Setup) -> tuple[float, float]:
    """Bytes at the peak of the second of two steps, when the optimizer's moments are there, and behind it."""
    trainable = [parameter for parameter in skeleton.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    if strategy.kind == "fsdp":
        tracker = FSDPMemTracker(skeleton, optimizer)
    else:
        tracker = MemTracker()
        tracker.track_external(skeleton, optimizer)
    skeleton.train()
    ids = torch.zeros(setup.rows, setup.sequence_length, dtype=torch.int64)
    for _ in range(2):
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.compute_bytes == 2):
                loss = skeleton(input_ids=ids, labels=ids, num_items_in_batch=ids.numel(), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")
        between = tracker.get_tracker_snapshot("current")
        tracker.reset_mod_stats()
    (peak,) = peak.values()  # of the only device
    (between,) = between.values()
    return peak["Total"], between["Total"]


def compare(args: Arguments, model: Model) -> bool:
    """Prints the formula against the simulation, for a forward of four padded rows; returns whether all are close."""
    names = ["FSDP", "FSDP+LoRA"]
    if args.gpus * args.nodes == 1:
        names.append("pp")
    all_close = True
    print(f"{'strategy':14}{'ckpt':>5}{'rows':>6}{'formula GiB':>13}{'simulated GiB':>15}{'error':>8}{'seconds':>9}")
    for name in names:
        for checkpointing, word in ((False, "no"), (True, "yes")):
            setup = Setup(
                gpus=args.gpus,
                nodes=args.nodes,
                rows=4,
                sequence_length=args.sequence_length,
                checkpointing=checkpointing,
                padding_free=False,
                lora_rank=args.lora_rank,
                on_cpu=True,
            )
            started = time.perf_counter()
            formula = memory(model, STRATEGIES[name], setup).total
            simulated, _ = simulate(model, STRATEGIES[name], setup)
            error = formula / simulated - 1
            all_close = all_close and abs(error) <= ALLOWED
            seconds = time.perf_counter() - started
            print(f"{name:14}{word:>5}{setup.rows:>6}{formula / GiB:>13.2f}{simulated / GiB:>15.2f}{error:>+8.1%}"
                  f"{seconds:>9.0f}", flush=True)  # fmt: skip
    return all_close


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        model = load_model(args.model)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    if not compare(args, model):
        sys.exit(f"error: not all within {ALLOWED:.0%}")


if __name__ == "__main__":
    main()
