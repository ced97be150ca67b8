"""The time model of tools/plan.py against what others measured and published.

python benchmarks/plan_published.py
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.hardware import BANDWIDTH_SHARE, HARDWARE
from planning.models import MODELS, Model
from planning.speed import times
from planning.strategies import STRATEGIES, Setup

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


if __name__ == "__main__":
    print_published()
