"""GPUs, networks and other machinery that a plan can be made for, each with the source of its figures.

What a data sheet states is not what a training step reaches. `product_share` and `attention_share` are the shares of
a data sheet's FLOPs that large matrix products and FlashAttention-2 reach within a step. Those of A100, H100, RTX 3090
and RTX 4090, and the other constants of software below, were chosen once, for all published runs together: those of
benchmarks/published_runs.csv, and of published_runs_more.csv where its column `fitted` says so. The shares stay below
what is measured for a product alone:
    stas00/ml-engineering, compute/accelerator ("Maximum Achievable Matmul FLOPS"): A100 0.87, H100 0.80, MI300X 0.51
    FlashAttention-2 (arXiv:2307.08691) and -3 (arXiv:2407.08608), figures of forward and backward, causal, head 128
The others take the share of their nearest relative, as the comment behind them says.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
GiB = 2**30
TFLOPS = 1e12


# Shares of a data sheet's bandwidth and other constants of software.
BANDWIDTH_SHARE = 0.90  # of memory: what a copy of a large tensor reaches (nvbandwidth on A100: 0.88 to 0.91)
NVLINK_SHARE = 0.40  # of NVLink, by gathers of one layer at a time; nccl-tests reach 0.8 with far larger ones
PCIE_SHARE = 0.75  # of PCIe, which is so slow that a layer is a large message
NETWORK_SHARE = 0.90  # of the adapters between machines
OVERLAP_LOSS = 0.26  # share of the shorter of two things that go on at once that does not hide behind the longer
PCIE_OVERLAP_LOSS = 0.78  # the same where GPUs exchange through host memory (two RTX 3090, two RTX 4090)
NETWORK_HOP = 10e-6  # s from one machine to the next in a ring
LINK_HOP = 1.5e-6  # s from one GPU to the next in a machine
LAUNCH = 12e-6  # s that PyTorch needs to start one operation; a GPU that computes less waits
FSDP_GATHER = 0.5e-3  # s of Python for each gather of a layer
DEEPSPEED_HOOKS = 0.4e-3  # s of Python for each matrix in each pass of ZeRO-3, on one GPU, too: hooks, prefetcher
DEEPSPEED_GATHER = 0.25e-3  # and to start its gather, where there is something to gather
NARROW = 320  # a product of width h reaches h / (h + NARROW) of product_share
SHORT_DOCUMENT = 400  # attention in L tokens reaches L / (L + 400) of its speed (arXiv:2407.08608, 512 to 16k tokens)
HOST_ADAM = 15 * GB  # bytes/s of host memory for each process in DeepSpeed's CPUAdam


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a machine."""

    name: str
    speed: float  # bytes/s, one direction
    source: str
    share: float = NVLINK_SHARE  # of `speed`, by gathers of one layer at a time
    overlap_loss: float = OVERLAP_LOSS  # of arithmetic and communication

    @property
    def reached(self) -> float:
        """Bytes/s within a step."""
        return self.speed * self.share


def pcie(name: str, speed: float, source: str) -> Link:
    """Without NVLink, what two GPUs exchange goes through host memory, which halves the speed of their slots."""
    return Link(name, speed / 2, f"{source}; half of it, through host memory", PCIE_SHARE, PCIE_OVERLAP_LOSS)


PCIE3 = pcie("pcie3-x16", 16 * GB, "PCI Express 3.0")
PCIE4 = pcie("pcie4-x16", 32 * GB, "PCI Express 4.0")
PCIE4_X8 = pcie("pcie4-x8", 16 * GB, "PCI Express 4.0, two cards that share 16 lanes")
PCIE5 = pcie("pcie5-x16", 64 * GB, "PCI Express 5.0")
# It is about as fast as a slot, so a layer is as large a message.
BRIDGE = Link("nvlink-bridge", 56 * GB, "NVIDIA's bridge for two RTX 3090, A40 or RTX A6000", share=PCIE_SHARE)
NVLINK2 = Link("nvlink2", 150 * GB, "NVIDIA V100 data sheet, SXM2")
NVLINK3 = Link("nvlink3", 300 * GB, "NVIDIA A100 data sheet, SXM")
NVLINK4 = Link("nvlink4", 450 * GB, "NVIDIA H100 data sheet, SXM")
NVLINK5 = Link("nvlink5", 900 * GB, "NVIDIA HGX B200 data sheet")
INFINITY = Link("infinity-fabric", 448 * GB, "AMD MI300X data sheet")
ALL_LINKS = (
    pcie("pcie3-x4", 4 * GB, "PCI Express 3.0, a slot behind the chipset"),
    pcie("pcie3-x8", 8 * GB, "PCI Express 3.0, two cards that share 16 lanes"),
    PCIE3,
    pcie("pcie4-x4", 8 * GB, "PCI Express 4.0, a slot behind the chipset"),
    PCIE4_X8,
    PCIE4,
    pcie("pcie5-x8", 32 * GB, "PCI Express 5.0, two cards that share 16 lanes"),
    PCIE5,
    BRIDGE,
    NVLINK2,
    NVLINK3,
    NVLINK4,
    NVLINK5,
    INFINITY,
)
LINKS = {link.name: link for link in ALL_LINKS}


@dataclass(frozen=True)
class GPU:
    """A kind of GPU, or the cores of a CPU."""

    flops: float  # dense operations per second in the precision that the scripts compute in: bf16 with float32 sums
    memory_bandwidth: float  # bytes/s
    memory: float  # bytes, as nvidia-smi shows them
    link: Link  # to the other GPUs of the machine
    product_share: float  # of `flops`, by large products within a training step
    attention_share: float  # of `flops`, by FlashAttention-2 on long documents, forward and backward
    source: str
    compute_bytes: int = 2  # of a number in the forward; 4 where bf16 is slow or missing, as the scripts' --bf16 auto
    bandwidth_share: float = BANDWIDTH_SHARE
    launch: float = LAUNCH
    narrow: float = NARROW
    short_document: float = SHORT_DOCUMENT
    drawing: float = 0.0  # s to draw a random number for dropout; a GPU does it while it waits for its memory


GPUS = {
    "a100-80g": GPU(312 * TFLOPS, 2039 * GB, 80.0 * GiB, NVLINK3, 0.78, 0.58, "NVIDIA A100 data sheet, SXM"),
    "a100-40g": GPU(312 * TFLOPS, 1555 * GB, 40.0 * GiB, NVLINK3, 0.78, 0.58, "NVIDIA A100 data sheet, SXM"),
    "h100-80g": GPU(989 * TFLOPS, 3350 * GB, 79.6 * GiB, NVLINK4, 0.64, 0.31, "NVIDIA H100 data sheet, SXM"),
    "h200": GPU(989 * TFLOPS, 4800 * GB, 140.4 * GiB, NVLINK4, 0.64, 0.31, "NVIDIA H200 data sheet, SXM; as H100"),
    # Attention by FlashAttention-2, which was not written for it: 330 TFLOPS (Dao-AILab/flash-attention#1589).
    "b200": GPU(2250 * TFLOPS, 8000 * GB, 179.1 * GiB, NVLINK5, 0.60, 0.15, "NVIDIA HGX B200 data sheet"),
    # Products alone 0.51 to 0.60 of the peak (ml-engineering), four fifths of that within a step, as H100.
    "mi300x": GPU(1307 * TFLOPS, 5300 * GB, 192.0 * GiB, INFINITY, 0.44, 0.20, "AMD MI300X data sheet"),
    # Cards with GDDR memory and less power: as RTX 4090 and RTX 3090, less what the power limit takes (L4: 72 W).
    "l40s": GPU(362 * TFLOPS, 864 * GB, 45.0 * GiB, PCIE4, 0.70, 0.50, "NVIDIA L40S data sheet"),
    "l4": GPU(121 * TFLOPS, 300 * GB, 22.5 * GiB, PCIE4, 0.55, 0.45, "NVIDIA L4 data sheet"),
    "a10g": GPU(70 * TFLOPS, 600 * GB, 22.5 * GiB, PCIE4, 0.85, 0.70, "NVIDIA A10G data sheet (AWS)"),
    "a40": GPU(150 * TFLOPS, 696 * GB, 45.0 * GiB, PCIE4, 0.75, 0.60, "NVIDIA A40 data sheet"),
    "a6000": GPU(155 * TFLOPS, 768 * GB, 48.0 * GiB, PCIE4, 0.75, 0.60, "NVIDIA RTX A6000 data sheet"),
    # Boards for two of them split the lanes of the first slot.
    "rtx3090": GPU(71 * TFLOPS, 936 * GB, 24.0 * GiB, PCIE4_X8, 1.00, 0.80, "NVIDIA GA102 white paper"),
    # Its clock is above the data sheet's, and so is what it computes; its cache of 72 MB keeps what is read again soon.
    # All three figures were chosen for the four rows of two programs that state it, on boards with full slots.
    "rtx4090": GPU(
        165 * TFLOPS, 1008 * GB, 24.0 * GiB, PCIE4, 1.05, 0.80, "NVIDIA Ada white paper", bandwidth_share=1.1
    ),
    "rtx5090": GPU(209 * TFLOPS, 1792 * GB, 31.8 * GiB, PCIE5, 1.00, 0.70, "NVIDIA Blackwell white paper"),
    # Without bf16 the scripts compute in float32, by the ordinary cores.
    "v100": GPU(15.7 * TFLOPS, 900 * GB, 31.7 * GiB, NVLINK2, 0.85, 0.40, "NVIDIA V100 data sheet, SXM2, 32 GB", 4),
    "t4": GPU(8.1 * TFLOPS, 320 * GB, 15.0 * GiB, PCIE3, 0.60, 0.35, "NVIDIA T4 data sheet", compute_bytes=4),
}

# Between machines, bytes/s for each GPU, one direction.
NETWORKS = {
    "none": (1e-9 * GB, "machines that cannot reach each other"),
    "1gbe": (0.125 * GB / 8, "one 1 Gb/s port for 8 GPUs"),
    "10gbe": (1.25 * GB / 8, "one 10 Gb/s port for 8 GPUs"),
    "25gbe": (3.125 * GB / 8, "one 25 Gb/s port for 8 GPUs"),
    "100gbe": (12.5 * GB / 8, "one 100 Gb/s port for 8 GPUs"),
    "efa-400": (50 * GB / 8, "AWS p4d: 400 Gb/s for 8 GPUs; IBM's and InternEvo's A100 clusters alike"),
    "efa-800": (100 * GB / 8, "IBM's H100 cluster: 800 Gb/s for 8 GPUs"),
    "ib-200": (25 * GB, "InfiniBand HDR, one 200 Gb/s adapter for each GPU (DGX A100)"),
    "ib-400": (50 * GB, "InfiniBand NDR, one 400 Gb/s adapter for each GPU (DGX H100); AWS p5 alike"),
}
# What DeepSpeed's offload sustains for each GPU with all GPUs at once. It is far below PCIe's own speed, since tensors
# travel one by one and the CPU adds them up.
HOST_LINKS = {
    "slow": (0.75 * GB, "8 A100 of the guide that this toolkit continues (2023): 4 rows"),
    "pcie4": (1.5 * GB, "8 A800 (gist chenyaofo/d4cd6a20), Open-Llama on A100"),
    "pcie5": (3.0 * GB, "twice that; not measured"),
}
DISKS = {
    "nfs": (0.2 * GB, "a shared file system under load"),
    "ssd": (0.5 * GB, "SATA"),
    "nvme": (2.0 * GB, "one NVMe drive, written until it is synced"),
}

# From what tensors take to what nvidia-smi shows: rows of published_runs.csv that state one of both.
RESERVED_SHARE = 1.09  # PyTorch's allocator reserves so much of what tensors take at most, because sizes do not fit
RESERVED = 1.2 * GiB  # and so much beside: blocks of 2 and 20 MiB, cuBLAS' workspaces
FRAGMENTATION = 0.05  # where memory is short it gives back what is free; such a share of the GPU stays unusable
CONTEXT = 0.5 * GiB  # CUDA context and kernels (nvidia-smi of a process that holds one number: 0.4 to 0.6 GiB)
COMMUNICATORS = 1.0 * GiB  # NCCL's buffers, with more than one GPU


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind and what connects them."""

    gpu: GPU  # or one process on a CPU
    gpus: int = 8  # of one machine
    nodes: int = 1
    network: float = NETWORKS["ib-200"][0]  # bytes/s
    host_link: float = HOST_LINKS["pcie4"][0]
    disk: float = DISKS["nvme"][0]
    host_memory: float = 0  # bytes of a machine; 0: 128 GB for each GPU, as rented machines have
    cores: int = 0  # of a CPU, which its processes share; 0: each GPU computes for itself

    @property
    def host_bytes(self) -> float:
        return self.host_memory or 128 * GB * self.gpus

    @property
    def num_gpus(self) -> int:
        return self.gpus * self.nodes


def reserved_bytes(allocated: float) -> float:
    """What PyTorch's allocator reserves when tensors take `allocated` bytes at most, and memory is not short."""
    return RESERVED_SHARE * allocated + RESERVED


def nvidia_smi_bytes(allocated: float, gpu: GPU, num_gpus: int) -> float:
    """What nvidia-smi shows when PyTorch's tensors take `allocated` bytes of a GPU at most."""
    shown = reserved_bytes(allocated) + CONTEXT
    if num_gpus > 1:
        shown += COMMUNICATORS
    if allocated <= usable_bytes(gpu, num_gpus):  # it fits, so the allocator gives back what it cannot have
        shown = min(shown, gpu.memory)
    return shown


def usable_bytes(gpu: GPU, num_gpus: int) -> float:
    """Bytes of a GPU that tensors can fill."""
    free = gpu.memory - CONTEXT
    if num_gpus > 1:
        free -= COMMUNICATORS
    return free * (1 - FRAGMENTATION)


def read_gpu(entries: dict) -> GPU:
    """A GPU from what dataclasses.asdict makes of it.

    Raises:
        TypeError, KeyError: it is something else.
    """
    return GPU(**{**entries, "link": Link(**entries["link"])})


def read_prices(path: str | Path) -> dict[str, float]:
    """Dollars for an hour of one GPU, by its kind, from a CSV file with the columns gpu and dollars_per_hour.

    Raises:
        ValueError: the file is missing, or a column or a number in it.
    """
    prices = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                prices[row["gpu"]] = float(row["dollars_per_hour"])
    except (OSError, KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{path}: not a CSV file with the columns gpu and dollars_per_hour ({problem})") from None
    return prices
