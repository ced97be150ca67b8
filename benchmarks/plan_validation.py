"""The memory formula of tools/plan.py against real runs of the scripts on this machine's CPU.

python benchmarks/plan_validation.py quick     # each strategy, minutes
python benchmarks/plan_validation.py full      # each strategy, size and length, an hour
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.memory import largest_tensor, memory
from planning.models import Model
from planning.strategies import LORA, STRATEGIES, ZERO, Setup

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


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:  # a process of a run
        return measure(sys.argv[2], sys.argv[3], sys.argv[4:])
    if sys.argv[1:] not in (["quick"], ["full"]):
        sys.exit("error: say quick or full")
    sys.exit(0 if validate(sys.argv[1]) else "error: not all within their limits")


if __name__ == "__main__":
    main()
