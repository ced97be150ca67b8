"""Measures this machine for plan.py: its CPU, as one process with as many threads as the scripts would give it; its
first GPU; the way between GPU and host; and a disk."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from .hardware import GB, GPU, NVLINK3, PCIE4, Link
from .models import MODELS, Model

TOKENS = 512  # of a forward
NUM_SECONDS = 1.0  # for each measurement
# Each measurement goes through so many bytes of different tensors: a step's tensors come from memory, and go to new
# memory if they are kept for the backward, which takes many times as long as within a CPU's cache.
WORKING_SET = 2**28
COPY_SHARE = 0.85  # of a link's speed on its data sheet, about, by a copy of a large tensor
FASTEST_SLOT = 64 * GB  # bytes/s: what is faster is NVLink; its bridge for two cards is not, and counts as a slot


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


@dataclass(frozen=True)
class Rates:
    """What one process reaches on a CPU."""

    products: float  # FLOPs a second
    attention: float  # FLOPs a second
    bandwidth: float  # bytes a second of operations element by element
    drawing: float  # seconds to draw a random number
    launch: float  # seconds to start an operation


def measure_cpu(model: Model, processes: int, bf16: bool | None = None) -> GPU:
    """What one process reaches with operations of the model's own sizes, while the others compute as well.

    Args:
        processes: that share the machine.
        bf16: whether to compute in bf16; None: as the scripts decide.
    """
    if bf16 is None:
        bf16 = is_bf16_fast()
    dtype = torch.float32
    if bf16:
        dtype = torch.bfloat16
    threads = num_threads(processes)
    num_at_once = min(processes, os.cpu_count())  # more would take turns, as speed.py knows
    if num_at_once == 1:
        rates = [measure_rates(model, dtype, threads)]
    else:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(num_at_once)
        with ProcessPoolExecutor(num_at_once, context, wait_for_others, (barrier,)) as pool:
            futures = [pool.submit(measure_rates, model, dtype, threads) for _ in range(num_at_once)]
            rates = [future.result() for future in futures]
    products = statistics.mean(rate.products for rate in rates)
    bandwidth = statistics.mean(rate.bandwidth for rate in rates)
    return GPU(
        flops=products,
        memory_bandwidth=bandwidth,
        memory=psutil.virtual_memory().total / processes,
        link=Link("gloo", bandwidth / 4, "into a socket, out of it, and into place"),
        product_share=1.0,
        attention_share=statistics.mean(rate.attention for rate in rates) / products,
        source="measured",
        compute_bytes=dtype.itemsize,
        bandwidth_share=1.0,
        launch=statistics.mean(rate.launch for rate in rates),
        narrow=0.0,
        short_document=0.0,
        drawing=statistics.mean(rate.drawing for rate in rates),
    )


def wait_for_others(barrier) -> None:
    """In each process of the pool: all have imported PyTorch, and start together."""
    barrier.wait()


def measure_rates(model: Model, dtype: torch.dtype, threads: int) -> Rates:
    """Measures this process."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        rates = Rates(
            products=product_rate(model, dtype),
            attention=attention_rate(model, dtype),
            bandwidth=elementwise_rate(model, dtype),
            drawing=drawing_seconds(model, dtype),
            launch=seconds_of(lambda: empty_operations(100)) / 100,
        )
    torch.set_num_threads(threads_before)
    return rates


def make_tensors(rows: int, columns: int, dtype: torch.dtype, number: int) -> list[torch.Tensor]:
    return [torch.randn(rows, columns, dtype=dtype) for _ in range(number)]


def product_rate(model: Model, dtype: torch.dtype) -> float:
    """FLOPs a second of the products of a layer's forward and backward."""
    # The matrix and its gradient are what is large in a large model: of those one set has to do.
    size_of_set = (TOKENS + model.hidden) * model.intermediate * dtype.itemsize
    number = max(1, WORKING_SET // 2 // size_of_set)
    tokens = make_tensors(TOKENS, model.hidden, dtype, number)
    matrices = make_tensors(model.intermediate, model.hidden, dtype, number)
    gradients = make_tensors(TOKENS, model.intermediate, dtype, number)

    def multiply() -> list:
        results = []
        for inputs, matrix, gradient in zip(tokens, matrices, gradients, strict=True):
            results.append((inputs @ matrix.T, gradient @ matrix, gradient.T @ inputs))
        return results

    return number * 3 * 2 * TOKENS * model.intermediate * model.hidden / seconds_of(multiply)


def attention_rate(model: Model, dtype: torch.dtype) -> float:
    """FLOPs a second of causal attention's forward; half of the pairs are counted, as nothing else is needed."""
    head_size = model.attention_width // model.heads
    states = torch.randn(1, model.heads, TOKENS, head_size, dtype=dtype)
    attention = torch.nn.functional.scaled_dot_product_attention
    seconds = seconds_of(lambda: attention(states, states, states, is_causal=True))
    return 4 * TOKENS * (TOKENS + 1) / 2 * model.attention_width / seconds


def elementwise_rate(model: Model, dtype: torch.dtype) -> float:
    """Bytes a second that operations element by element read and write.

    One result of three is kept: of what the operations in kernels.py write, a quarter (LoRA) to two fifths (all
    weights) stays until the backward.
    """
    number = max(1, WORKING_SET // 2 // (TOKENS * model.intermediate * dtype.itemsize))
    values = make_tensors(TOKENS, model.intermediate, dtype, number)

    def multiply() -> None:
        # One large block is new memory in every call; small ones may have been used before.
        kept = torch.empty(number, TOKENS, model.intermediate, dtype=dtype)
        for value, result in zip(values, kept, strict=True):
            torch.mul(value, value, out=result)
            value * value
            value * value

    return number * 9 * values[0].numel() * dtype.itemsize / seconds_of(multiply)


def drawing_seconds(model: Model, dtype: torch.dtype) -> float:
    """For one random number, as torch.nn.functional.dropout draws them."""
    mask = torch.empty(TOKENS, model.hidden, dtype=dtype)
    return seconds_of(lambda: mask.bernoulli_(0.95)) / mask.numel()


def empty_operations(number: int) -> None:
    one = torch.ones(1)
    for _ in range(number):
        one + one


# -------------------------------------------------------------------------------------------------------------------
# What tools/doctor.py --json writes
# -------------------------------------------------------------------------------------------------------------------


def measure_machine(folder: Path) -> dict:
    """The CPU, the first GPU if there is one, and the speeds of host link and disk in bytes/s.

    Args:
        folder: on the disk that is to be measured.
    """
    measured = {
        "cpu": asdict(measure_cpu(MODELS["smollm2-135m"], processes=1)),
        "gpu": None,
        "speeds": {"disk": disk_speed(folder), "host_memory": psutil.virtual_memory().total},
    }
    if torch.cuda.is_available():
        measured["gpu"] = asdict(measure_gpu())
        measured["speeds"]["host_link"] = host_link_speed()
    else:
        measured["speeds"]["cores"] = os.cpu_count()
    return measured


def gpu_seconds_of(action: Callable[[], object]) -> float:
    """The fastest of several calls on the GPU, by its own clock."""
    action()
    fastest = float("inf")
    for _ in range(10):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        fastest = min(fastest, start.elapsed_time(end) / 1000)
    return fastest


def measure_gpu() -> GPU:
    """The first GPU by large products, attention in documents of 4,096 tokens, and copies.

    Products of random numbers alone are faster than those within a step; hardware.GPUS have four fifths to nine tenths
    of what ml-engineering measured so, and this takes 0.85.
    """
    compute_bytes = 4
    dtype = torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        compute_bytes = 2
        dtype = torch.bfloat16
    size = 8192
    matrix = torch.randn(size, size, device="cuda", dtype=dtype)
    flops = 2 * size**3 / gpu_seconds_of(lambda: matrix @ matrix)
    bandwidth = 2 * matrix.numel() * compute_bytes / gpu_seconds_of(matrix.clone)
    states = torch.randn(1, 32, 4096, 128, device="cuda", dtype=dtype, requires_grad=True)

    def attend() -> None:
        attention = torch.nn.functional.scaled_dot_product_attention
        attention(states, states, states, is_causal=True).backward(states)

    attention_flops = 3.5 * 4 * 32 * 128 * 4096 * 4097 / 2
    return GPU(
        flops=flops,
        memory_bandwidth=bandwidth,
        memory=torch.cuda.get_device_properties(0).total_memory,
        link=measure_link(),
        product_share=0.85,
        attention_share=attention_flops / gpu_seconds_of(attend) / flops,
        source=f"measured: {torch.cuda.get_device_name(0)}",
        compute_bytes=compute_bytes,
        bandwidth_share=1.0,
    )


def measure_link() -> Link:
    """Between the first two GPUs, by copies; a single GPU is taken to have PCI Express 4.0."""
    if torch.cuda.device_count() == 1:
        return PCIE4
    values = torch.empty(2**28, dtype=torch.uint8, device="cuda:0")
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda:1")
    speed = values.numel() / gpu_seconds_of(lambda: other.copy_(values))
    alike = PCIE4
    if speed > FASTEST_SLOT:
        alike = NVLINK3
    return replace(alike, name="measured", speed=speed / COPY_SHARE, source="copies between two GPUs")


def host_link_speed() -> float:
    """Bytes a second from the GPU into pinned host memory. DeepSpeed's offload sustains a tenth, tensor by tensor."""
    values = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    return 0.1 * values.numel() / gpu_seconds_of(lambda: pinned.copy_(values))


def disk_speed(folder: Path) -> float:
    """Bytes a second of 128 MB that really reach the disk."""
    block = os.urandom(2**20)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(128):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return max(0.001 * GB, 128 * 2**20 / (time.perf_counter() - started))
