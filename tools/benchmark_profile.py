"""Shows where the time of a training step goes, and what share of the machine's matrix-product rate a loop reaches.

    python tools/benchmark_profile.py -- finetune_pp_peft.py --output_dir outputs/profile

Behind `--` stands a script of one process and its flags. It runs unchanged on the CPU in float32 and is ended after
3 x --steps + 1 optimizer steps. Behind the first one, which warms up, --steps steps are timed, and before each the
machine multiplies float32 matrices, [m, k] x [k, n] of --shape m,k,n, so a machine that is slow for a while is slow in
both. 1024,1024,1024 is what the machine can do at its best; 768,576,1536 is a product of the sample model in a step of
768 tokens. In the next --steps steps the FLOPs of a token are counted: what is really executed, attention inside
documents counted full. The share is the steps' rate over that of the products. The last --steps steps run under
torch.profiler, and the ten operators with the most time of their own are printed.
"""

import argparse
import os
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent
NUM_OPERATORS = 10


# torch's counter has formulas for attention, but does not apply them to the CPU's kernel.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **others: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **others: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


def matrix_product_rate(m: int, k: int, n: int) -> float:
    """FLOPs a second of this machine at this moment."""
    a, b = torch.rand(m, k), torch.rand(k, n)
    a @ b
    started, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        a @ b
    return repeats * 2 * m * k * n / (time.perf_counter() - started)


def kind(operator: str) -> str:
    """One of four kinds of work."""
    name = operator.removeprefix("aten::").lower()
    if name in ("mm", "bmm", "addmm", "linear", "matmul"):
        return "matrix products"
    if "scaled_dot_product" in name:
        return "attention"
    if "adamw" in name or "optimizer" in name:
        return "optimizer"
    return "everything else: element by element, copies, Python"


class Watch:
    """Follows the optimizer's steps, and prints and ends the process behind the last one."""

    def __init__(self, num_steps: int, shape: list[int]):
        self.num_steps, self.shape, self.step, self.tokens = num_steps, shape, 0, 0
        self.timed = []  # (tokens of a step, its seconds, the machine's FLOPs a second before it)
        self.counted, self.counter, self.profiler = [], None, None
        embedding = torch.nn.functional.embedding

        def counting_embedding(input_ids, *args, **kwargs):
            self.tokens += input_ids.numel() if torch.is_grad_enabled() else 0
            return embedding(input_ids, *args, **kwargs)

        torch.nn.functional.embedding = counting_embedding

    def __call__(self, *_) -> None:
        now = time.perf_counter()
        n, self.step = self.num_steps, self.step + 1
        if 1 < self.step <= n + 1:
            self.timed.append((self.tokens, now - self.started, self.machine_rate))
        if self.step == 2 * n + 1:
            self.counter.__exit__(None, None, None)
            self.flops_per_token = self.counter.get_total_flops() / self.tokens
        if self.step == 3 * n + 1:
            self.profiler.__exit__(None, None, None)
            self.print()
            sys.stdout.flush()
            os._exit(0)  # what the script saves at its end is not looked at
        if self.step <= n + 1:
            self.tokens = 0
        if self.step <= n:
            self.machine_rate = matrix_product_rate(*self.shape)
        elif self.step == n + 1:
            self.counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
            self.counter.__enter__()
        elif self.step == 2 * n + 1:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
        self.started = time.perf_counter()

    def print(self) -> None:
        rates = [tokens * self.flops_per_token / seconds for tokens, seconds, _ in self.timed]
        shares = [rate / machine_rate for rate, (_, _, machine_rate) in zip(rates, self.timed, strict=True)]
        tokens = statistics.median(tokens / seconds for tokens, seconds, _ in self.timed)
        print(f"\n{tokens:.0f} tokens/s, {statistics.median(rates) / 1e9:.1f} billion FLOPs a second: "
              f"{statistics.median(shares):.0%} of the rate of products of {self.shape} "
              f"(by step: {' '.join(f'{share:.0%}' for share in shares)})")  # fmt: skip
        times, kinds = {}, {}
        for event in self.profiler.key_averages():
            times[event.key] = event.self_cpu_time_total
            kinds[kind(event.key)] = kinds.get(kind(event.key), 0) + event.self_cpu_time_total
        total = sum(times.values())
        print(", ".join(f"{name} {kinds[name] / total:.0%}" for name in sorted(kinds, key=kinds.get, reverse=True)))
        for name in sorted(times, key=times.get, reverse=True)[:NUM_OPERATORS]:
            print(f"{times[name] / total:6.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, counted and profiled, each")
    parser.add_argument("--shape", default="1024,1024,1024", help="m,k,n of the product to compare with")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- script.py and its flags")
    args = parser.parse_args()
    command = args.script[args.script[:1] == ["--"] :]
    if not command or not (ROOT / command[0]).is_file() or args.steps < 1:
        sys.exit("error: --steps must be at least 1, and a script must stand behind --, as in -- finetune_pp_peft.py")
    shape = [int(size) for size in args.shape.split(",") if size.strip().isdecimal()]
    if len(shape) != 3 or min(shape) < 1:
        sys.exit(f"error: --shape {args.shape}: three numbers above 0, as in 1024,1024,1024")
    register_optimizer_step_post_hook(Watch(args.steps, shape))
    sys.argv = command + ["--max_steps", str(3 * args.steps + 1), "--use_cpu", "True", "--bf16", "False"]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


if __name__ == "__main__":
    main()
