"""Measures this machine's CPU for plan.py: one process with as many threads as the scripts would give it."""

import os
import time
from collections.abc import Callable

import psutil
import torch

from .hardware import GPU
from .models import Model

TOKENS = 512  # of a forward
NUM_SECONDS = 0.4  # for each measurement


def seconds_of(action: Callable[[], object]) -> float:
    """The fastest of several calls; what else the machine does can only make one slower."""
    action()
    fastest = float("inf")
    end = time.perf_counter() + NUM_SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        action()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def is_bf16_fast() -> bool:
    """Whether the training scripts would compute in bf16 on this CPU; PyTorch has no public name for the question."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def num_threads(processes: int) -> int:
    """Threads of each process, as scripts/*.sh set them."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    if processes > 1:
        return 1
    return os.cpu_count()


def measure_cpu(model: Model, processes: int, bf16: bool | None = None) -> GPU:
    """What one process reaches with operations of the model's own sizes.

    Args:
        processes: that share the machine.
        bf16: whether to compute in bf16; None: as the scripts decide.
    """
    if bf16 is None:
        bf16 = is_bf16_fast()
    dtype = torch.float32
    if bf16:
        dtype = torch.bfloat16
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads(processes))
    with torch.no_grad():
        flops = product_rate(model, dtype)
        attention = attention_rate(model, dtype)
        bandwidth = elementwise_rate(model, dtype)
        launch = seconds_of(lambda: empty_operations(100)) / 100
    torch.set_num_threads(threads_before)
    return GPU(
        flops=flops,
        memory_bandwidth=bandwidth,
        memory=psutil.virtual_memory().total / processes,
        link=bandwidth / 4,  # gloo: into a socket, out of it, and into place
        product_share=1.0,
        attention_share=attention / flops,
        source="measured",
        compute_bytes=dtype.itemsize,
        bandwidth_share=1.0,
        launch=launch,
        narrow=0.0,
        short_document=0.0,
    )


def product_rate(model: Model, dtype: torch.dtype) -> float:
    """FLOPs a second of the products of a layer's forward and backward."""
    tokens = torch.randn(TOKENS, model.hidden, dtype=dtype)
    matrix = torch.randn(model.intermediate, model.hidden, dtype=dtype)
    gradient = torch.randn(TOKENS, model.intermediate, dtype=dtype)
    seconds = seconds_of(lambda: tokens @ matrix.T)
    seconds += seconds_of(lambda: gradient @ matrix)
    seconds += seconds_of(lambda: gradient.T @ tokens)
    return 3 * 2 * TOKENS * matrix.numel() / seconds


def attention_rate(model: Model, dtype: torch.dtype) -> float:
    """FLOPs a second of causal attention's forward; half of the pairs are counted, as nothing else is needed."""
    head_size = model.attention_width // model.heads
    states = torch.randn(1, model.heads, TOKENS, head_size, dtype=dtype)
    attention = torch.nn.functional.scaled_dot_product_attention
    seconds = seconds_of(lambda: attention(states, states, states, is_causal=True))
    return 4 * TOKENS * (TOKENS + 1) / 2 * model.attention_width / seconds


def elementwise_rate(model: Model, dtype: torch.dtype) -> float:
    """Bytes a second that a product element by element reads and writes."""
    values = torch.randn(TOKENS, model.intermediate, dtype=dtype)
    seconds = seconds_of(lambda: values * values)
    return 3 * values.numel() * dtype.itemsize / seconds


def empty_operations(number: int) -> None:
    one = torch.ones(1)
    for _ in range(number):
        one + one
