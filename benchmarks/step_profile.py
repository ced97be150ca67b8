"""Shows where the time of a training step goes, and what share of the machine's matrix-product rate a loop reaches.

    python benchmarks/step_profile.py -- finetune_pp_peft.py --output_dir outputs/profile

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
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

ROOT = Path(__file__).resolve().parent.parent
NUM_OPERATORS = 10


def count_attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def count_attention_backward(gradient, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter has formulas for attention, but does not apply them to the CPU's kernel.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_attention_backward,
}


def measure_matrix_product_rate(m: int, k: int, n: int) -> float:
    """FLOPs a second of this machine at this moment."""
    a = torch.rand(m, k)
    b = torch.rand(k, n)
    a @ b
    num_products = 20
    started = time.perf_counter()
    for _ in range(num_products):
        a @ b
    return num_products * 2 * m * k * n / (time.perf_counter() - started)


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
    """Follows the optimizer's steps, and prints and ends the process behind the last one.

    Steps 2 to n + 1 are timed, n + 2 to 2 n + 1 counted, and 2 n + 2 to 3 n + 1 profiled.
    """

    def __init__(self, num_steps: int, shape: list[int]):
        self.num_steps = num_steps
        self.shape = shape
        self.step = 0
        self.tokens = 0
        self.started = 0.0
        self.machine_rate = 0.0
        self.timed = []  # (tokens of a step, its seconds, the machine's FLOPs a second before it)
        self.flops_per_token = 0.0
        self.counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def count_tokens(self, module, inputs) -> None:
        """Before each module's forward: an embedding gets a batch's ids."""
        if isinstance(module, torch.nn.Embedding) and torch.is_grad_enabled():
            self.tokens += inputs[0].numel()

    def after_update(self, *_) -> None:
        now = time.perf_counter()
        n = self.num_steps
        self.step += 1
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
            self.machine_rate = measure_matrix_product_rate(*self.shape)
        elif self.step == n + 1:
            self.counter.__enter__()
        elif self.step == 2 * n + 1:
            self.profiler.__enter__()
        self.started = time.perf_counter()

    def print(self) -> None:
        speeds = []
        rates = []
        shares = []
        for tokens, seconds, machine_rate in self.timed:
            rate = tokens * self.flops_per_token / seconds
            speeds.append(tokens / seconds)
            rates.append(rate)
            shares.append(rate / machine_rate)
        print(f"\n{statistics.median(speeds):.0f} tokens/s, {statistics.median(rates) / 1e9:.1f} billion FLOPs a "
              f"second: {statistics.median(shares):.0%} of the rate of products of {self.shape} "
              f"(by step: {' '.join(f'{share:.0%}' for share in shares)})")  # fmt: skip
        self.print_operators()

    def print_operators(self) -> None:
        """The share of each kind of work, and of the operators with the most time of their own."""
        operators = sorted(self.profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        total = sum(event.self_cpu_time_total for event in operators)
        kinds = {}
        for event in operators:
            name = kind(event.key)
            kinds[name] = kinds.get(name, 0) + event.self_cpu_time_total
        by_time = sorted(kinds, key=kinds.get, reverse=True)
        print(", ".join(f"{name} {kinds[name] / total:.0%}" for name in by_time))
        for event in operators[:NUM_OPERATORS]:
            print(f"{event.self_cpu_time_total / total:6.1%}  {event.key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, counted and profiled, each")
    parser.add_argument("--shape", default="1024,1024,1024", help="m,k,n of the product to compare with")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- script.py and its flags")
    args = parser.parse_args()
    command = args.script
    if command[:1] == ["--"]:
        command = command[1:]
    if not command or not (ROOT / command[0]).is_file() or args.steps < 1:
        sys.exit("error: --steps must be at least 1, and a script must stand behind --, as in -- finetune_pp_peft.py")
    shape = [int(size) for size in args.shape.split(",") if size.strip().isdecimal()]
    if len(shape) != 3 or min(shape) < 1:
        sys.exit(f"error: --shape {args.shape}: three numbers above 0, as in 1024,1024,1024")
    watch = Watch(args.steps, shape)
    register_module_forward_pre_hook(watch.count_tokens)
    register_optimizer_step_post_hook(watch.after_update)
    sys.argv = command + ["--max_steps", str(3 * args.steps + 1), "--use_cpu", "True", "--bf16", "False"]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


if __name__ == "__main__":
    main()
