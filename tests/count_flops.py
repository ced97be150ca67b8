"""Runs a training script and writes the FLOPs of its third optimizer step, as torch counts them, for test_plan.py.

python tests/count_flops.py OUTPUT SCRIPT --flag value ...
"""

import json
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent


def causal_products(query_shape, key_shape, value_shape) -> int:
    """Operations of one product of queries and keys, where a query sees the keys before it and itself.

    There can be more keys than queries: those of a prompt that two answers share.
    """
    rows, heads, num_queries, size = query_shape
    num_before = key_shape[2] - num_queries
    assert key_shape[2] == value_shape[2] and num_before >= 0
    return 2 * rows * heads * size * (num_before * num_queries + num_queries * (num_queries + 1) // 2)


def count_attention(query, key, value, *_, **__) -> int:
    return 2 * causal_products(query, key, value)


def count_attention_backward(gradient, query, key, value, *_, **__) -> int:
    return 5 * causal_products(query, key, value)


def count_loss(hidden_shape, weight_shape, *arguments, **_) -> int:
    """The output layer and its gradients; what is computed are the last arguments but one of PyTorch's operation."""
    compute_input_grad, compute_weight_grad = arguments[10:12]
    num_products = 1 + compute_input_grad + compute_weight_grad
    return num_products * 2 * hidden_shape[0] * weight_shape[0] * weight_shape[1]


def define_loss() -> None:
    """PyTorch defines the operation when its function is called first."""
    torch.nn.functional.linear_cross_entropy(
        torch.zeros(2, 2),
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.int64),
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1),
    )


# torch's counter has formulas for attention, but does not apply them to the CPU's kernel, and counts what a mask hides.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: count_attention_backward,
}


class Watch:
    def __init__(self, output: str):
        self.output = output
        self.step = 1
        self.was_updated = False
        define_loss()
        formulas = ATTENTION | {torch.ops.torch_nn._linear_cross_entropy_batch_chunked: count_loss}
        self.counter = FlopCounterMode(display=False, custom_mapping=formulas)

    def before_forward(self, module, inputs) -> None:
        if not self.was_updated:  # checks of the model come before the first update, and a reference's forward after
            return
        self.was_updated = False
        self.step += 1
        if self.step == 3:
            self.counter.__enter__()

    def before_update(self, *_) -> None:
        if self.step == 3 and not self.was_updated:
            self.counter.__exit__(None, None, None)
            rank = 0
            if dist.is_initialized():
                rank = dist.get_rank()
            Path(f"{self.output}.{rank}").write_text(json.dumps(self.counter.get_total_flops()))
        self.was_updated = True


def main() -> None:
    watch = Watch(sys.argv[1])
    register_module_forward_pre_hook(watch.before_forward)
    register_optimizer_step_pre_hook(watch.before_update)
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
