"""Measures convert_llama_weights_to_hf.py and the way back on a generated checkpoint: speed against `cp`, and memory.

    python benchmarks/convert.py                        # 3 GB in 2 shards, in a temporary folder
    python benchmarks/convert.py --gigabytes 0.2 --num_shards 1 --folder /dev/shm

Prints one line for each direction, with and without verification, and exits with an error if the peak memory of one is
above 1.5 GB + 3 times the largest tensor, or if writing without verification is slower than 60 % of `cp`. Needs three
times the checkpoint's bytes on the disk that holds --folder. A copy that other programs disturb is no measure, so each
side runs --repeats times, in turn, and the fastest counts. Each begins after a pause: many virtual machines give memory
that is free for some seconds back to their host, and getting it again takes several times as long as the copy. `cp`,
begun at once after a large file was deleted, would be compared with a conversion whose imports alone take that long.
"""

import base64
import json
import math
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
TO_HF = [ROOT / "convert_llama_weights_to_hf.py"]
TO_META = [ROOT / "tools" / "convert_hf_to_meta.py"]
# The shape of Llama 3.2 1B, with Llama 3's tokenizer without a merge: 256 bytes and 256 special tokens.
PARAMS = {
    "dim": 2048,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 512,
    "rope_theta": 500000.0,
    "norm_eps": 1e-5,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.5,
    "use_scaled_rope": True,
}
PAUSE_SECONDS = 10
FFN = 8192
KEY_VALUE_ROWS = 512  # 8 heads with 64 rows each


@dataclass
class Arguments:
    gigabytes: float = field(default=3.0, metadata={"help": "size of the checkpoint, in bfloat16"})
    num_shards: int = field(default=2, metadata={"help": "files of the checkpoint: 1, 2, 4 or 8"})
    folder: str | None = field(default=None, metadata={"help": "where to work; default: the system's temporary folder"})
    repeats: int = field(default=3, metadata={"help": "runs of each side, of which the fastest counts"})


def make_checkpoint(folder: Path, gigabytes: float, num_shards: int) -> int:
    """Writes Meta's files shard by shard; returns the bytes of the largest tensor of the whole model."""
    dim = PARAMS["dim"]
    vocab_size = PARAMS["vocab_size"]
    layer = {
        "attention.wq": (dim // num_shards, dim),
        "attention.wk": (KEY_VALUE_ROWS // num_shards, dim),
        "attention.wv": (KEY_VALUE_ROWS // num_shards, dim),
        "attention.wo": (dim, dim // num_shards),
        "feed_forward.w1": (FFN // num_shards, dim),
        "feed_forward.w2": (dim, FFN // num_shards),
        "feed_forward.w3": (FFN // num_shards, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    layer_bytes = 2 * num_shards * sum(math.prod(shape) for shape in layer.values())
    num_layers = math.ceil(gigabytes * 1e9 / layer_bytes)
    shapes = {
        "tok_embeddings.weight": (vocab_size // num_shards, dim),
        "norm.weight": (dim,),
        "output.weight": (vocab_size // num_shards, dim),
    }
    for number in range(num_layers):
        for name, shape in layer.items():
            shapes[f"layers.{number}.{name}.weight"] = shape

    folder.mkdir()
    # One random block serves all matrices: what the values are changes neither time nor memory.
    block = torch.randn(FFN * dim, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    norm = torch.ones(dim, dtype=torch.bfloat16)
    for number in range(num_shards):
        shard = {}
        for name, shape in shapes.items():
            # A clone for each: tensors that share memory would be written once.
            if len(shape) == 1:
                shard[name] = norm.clone()
            else:
                shard[name] = block.roll(number)[: math.prod(shape)].view(shape).clone()
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
        del shard
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_layers": num_layers}))
    ranks = [base64.b64encode(bytes([number])) + b" %d\n" % number for number in range(256)]
    (folder / "tokenizer.model").write_bytes(b"".join(ranks))
    return 2 * FFN * dim


def read_peak_memory(pid: int) -> int:
    """The most resident bytes of a running process so far, mapped pages included; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def convert(program: list, *flags) -> tuple[float, int, dict]:
    """Seconds, peak resident bytes and the report of one conversion in a process of its own."""
    command = [sys.executable, *map(str, program), *map(str, flags)]
    errors = []
    peak = 0
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # a full pipe would stop the process
    reader.start()
    while process.poll() is None:
        peak = max(peak, read_peak_memory(process.pid))
        time.sleep(0.01)
    process.wait()
    reader.join()
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)}\n{errors[0]}")
    seconds = time.perf_counter() - started
    output = Path(flags[flags.index("--output_dir") + 1])
    return seconds, peak, json.loads((output / "conversion_report.json").read_text(encoding="utf-8"))


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp` takes."""
    time.sleep(PAUSE_SECONDS)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def measure_writing(meta: Path, folder: Path, repeats: int) -> tuple[float, int]:
    """Prints the fastest of `repeats` copies and conversions without verifying; returns the speed as a share of cp's,
    and the peak memory."""
    size = sum(path.stat().st_size for path in meta.glob("*.pth"))
    copies = []
    writes = []
    peaks = []
    for _ in range(repeats):
        copies.append(copy(meta, folder / "copy"))
        flags = ("--input_dir", meta, "--output_dir", folder / "hf", "--verify", "False")
        time.sleep(PAUSE_SECONDS)
        seconds, peak, report = convert(TO_HF, *flags)
        writes.append((report["seconds"]["writing"], seconds))
        peaks.append(peak)
        shutil.rmtree(folder / "hf")
    copied = min(copies)
    written, seconds = min(writes)
    print(f"cp                     {copied:6.1f} s  {size / copied / 1e9:5.2f} GB/s")
    print(f"writing the weights    {written:6.1f} s  {size / written / 1e9:5.2f} GB/s  {copied / written:.0%} of cp")
    print(f"the whole command      {seconds:6.1f} s  peak {max(peaks) / 1e9:.2f} GB  (without verifying and hashing)")
    return copied / written, max(peaks)


def measure_conversion(name: str, program: list, source: Path, target: Path) -> int:
    """Prints what a whole conversion takes, verified and hashed; returns the peak memory."""
    seconds, peak, report = convert(program, "--input_dir", source, "--output_dir", target)
    steps = ", ".join(f"{step} {taken:.1f}" for step, taken in report["seconds"].items())
    print(f"{name:22} {seconds:6.1f} s  peak {peak / 1e9:.2f} GB  ({steps})")
    return peak


def compare_files(before: Path, after: Path) -> None:
    """Ends the program if a tensor of `before` is another one in `after`."""
    for path in sorted(before.glob("*.pth")):
        old = torch.load(path, mmap=True, weights_only=True)
        new = torch.load(after / path.name, mmap=True, weights_only=True)
        if old.keys() != new.keys() or any(not torch.equal(old[name], new[name]) for name in old):
            sys.exit(f"error: {path.name} came back with other values")
    print("there and back: the same bits")


def measure(folder: Path, args: Arguments) -> bool:
    """Prints the table; returns whether both limits were kept."""
    meta = folder / "meta"
    largest = make_checkpoint(meta, args.gigabytes, args.num_shards)
    size = sum(path.stat().st_size for path in meta.glob("*.pth"))
    limit = 1.5e9 + 3 * largest
    print(f"{size / 1e9:.2f} GB in {args.num_shards} shards, largest tensor {largest / 1e6:.0f} MB, "
          f"allowed memory {limit / 1e9:.2f} GB")  # fmt: skip
    share_of_cp, peak = measure_writing(meta, folder, args.repeats)
    peak = max(peak, measure_conversion("verified and hashed", TO_HF, meta, folder / "hf"))
    peak = max(peak, measure_conversion("back, verified, hashed", TO_META, folder / "hf", folder / "back"))
    compare_files(meta, folder / "back")
    return peak <= limit and share_of_cp >= 0.6


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    if args.num_shards not in (1, 2, 4, 8) or args.gigabytes <= 0 or args.repeats < 1:
        sys.exit("error: --num_shards must be 1, 2, 4 or 8, --gigabytes and --repeats positive")
    place = Path(args.folder or tempfile.gettempdir())
    if not place.is_dir():
        sys.exit(f"error: --folder {place}: no such folder")
    if shutil.disk_usage(place).free < 3.2e9 * args.gigabytes:
        sys.exit(f"error: --folder {place}: less than {3.2 * args.gigabytes:.1f} GB are free; name another")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        if not measure(Path(folder), args):
            sys.exit("error: a limit was not kept")


if __name__ == "__main__":
    main()
