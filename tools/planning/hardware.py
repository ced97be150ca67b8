"""The GPUs that a plan can be made for, and the constants of hardware, each with its source."""

from dataclasses import dataclass

GB = 1e9
GiB = 2**30


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
OVERHEAD = 2 * GiB  # CUDA context, NCCL's buffers, library workspaces
FRAGMENTATION = 0.05  # share of a GPU's memory that PyTorch's allocator cannot use


def usable(gpu: GPU) -> float:
    """Bytes of a GPU that tensors can fill."""
    return gpu.memory * (1 - FRAGMENTATION) - OVERHEAD
