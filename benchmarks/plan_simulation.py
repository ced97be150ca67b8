"""The memory formula of tools/plan.py against a second way that shares nothing with it: the step on fake tensors.

python benchmarks/plan_simulation.py --model llama-7b --gpus 8             # minutes
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.hardware import GiB
from planning.memory import memory
from planning.models import Model, load_model
from planning.strategies import STRATEGIES, Setup, Strategy


@dataclass
class Arguments:
    model: str = field(default="llama-7b", metadata={"help": "a name such as llama-7b, or a config.json or its folder"})
    gpus: int = field(default=8, metadata={"help": "GPUs of one machine"})
    nodes: int = field(default=1, metadata={"help": "machines"})
    sequence_length: int = field(default=512, metadata={"help": "tokens of a row"})
    lora_rank: int = field(default=8, metadata={"help": "as the scripts' flag"})


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


def print_simulation(args: Arguments, model: Model) -> None:
    """The formula against steps on fake tensors, for a forward of four padded rows."""
    print(f"\n{'strategy':14}{'ckpt':>5}{'rows':>6}{'formula GiB':>13}{'simulated GiB':>15}{'error':>8}{'seconds':>9}")
    for name in ("FSDP", "FSDP+LoRA") + (("pp",) if args.gpus * args.nodes == 1 else ()):
        for checkpointing in (False, True):
            strategy, started = STRATEGIES[name], time.perf_counter()
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
            formula, simulated = memory(model, strategy, setup)["total"], simulate(model, strategy, setup)["total"]
            seconds = time.perf_counter() - started
            print(f"{name:14}{'yes' if checkpointing else 'no':>5}{setup.rows:>6}{formula / GiB:>13.2f}"
                  f"{simulated / GiB:>15.2f}{formula / simulated - 1:>+8.1%}{seconds:>9.0f}", flush=True)  # fmt: skip
    print(
        "not simulated: ZeRO and QLoRA, as DeepSpeed and bitsandbytes take no fake tensors, and adapters in the plain"
    )
    print("loop, as torch's tracker wants a gradient of every weight; --validate runs them for real")


def main() -> None:
    from transformers import HfArgumentParser

    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        model = load_model(args.model)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    print_simulation(args, model)


if __name__ == "__main__":
    main()
