"""Measures convert_llama_weights_to_hf.py on a generated checkpoint: speed against `cp`, and peak memory.

    python tools/benchmark_convert.py                        # 3 GB in 2 shards, in a temporary folder
    python tools/benchmark_convert.py --gigabytes 0.2 --num_shards 1 --folder /dev/shm

Prints one line for each direction, with and without verification, and exits with an error if the peak memory of one is
above 1.5 GB + 3 times the largest tensor, or if writing without verification is slower than 60 % of `cp`. Needs three
times the checkpoint's bytes on the disk that holds --folder. A copy that other programs disturb is no measure, so each
side runs --repeats times, in turn, and the fastest counts.
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

SCRIPT = Path(__file__).resolve().parent.parent / "convert_llama_weights_to_hf.py"
# Llama 3's tokenizer without a merge: 256 bytes and 256 special tokens.
PARAMS = {"dim": 2048, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 512, "rope_theta": 500000.0, "norm_eps": 1e-5}
PARAMS |= {"multiple_of": 1024, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True}  # those of Llama 3.2 1B
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
    dim, vocab_size = PARAMS["dim"], PARAMS["vocab_size"]
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
    num_layers = math.ceil(gigabytes * 1e9 / (2 * num_shards * sum(map(math.prod, layer.values()))))
    shapes = {"tok_embeddings.weight": (vocab_size // num_shards, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (vocab_size // num_shards, dim)
    shapes |= {f"layers.{i}.{name}.weight": shape for i in range(num_layers) for name, shape in layer.items()}

    folder.mkdir()
    # One random block serves all matrices: what the values are changes neither time nor memory.
    block = torch.randn(FFN * dim, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    norm = torch.ones(dim, dtype=torch.bfloat16)
    for i in range(num_shards):
        shard = {
            # A clone for each: tensors that share memory would be written once.
            name: norm.clone() if len(shape) == 1 else block.roll(i)[: math.prod(shape)].view(shape).clone()
            for name, shape in shapes.items()
        }
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
        del shard
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_layers": num_layers}))
    ranks = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (folder / "tokenizer.model").write_bytes(b"".join(ranks))
    return 2 * FFN * dim


def convert(*flags) -> tuple[float, int, dict]:
    """Seconds, peak resident bytes (mapped pages included) and the report of one conversion in a process of its own."""
    started, peak, errors = time.perf_counter(), 0, []
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # a full pipe would stop the process
    reader.start()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        highest = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max([peak, *highest])
        time.sleep(0.01)
    process.wait()
    reader.join()
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)}\n{errors[0]}")
    seconds = time.perf_counter() - started
    output = Path(flags[flags.index("--output_dir") + 1])
    return seconds, peak, json.loads((output / "conversion_report.json").read_text(encoding="utf-8"))


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def measure(folder: Path, args: Arguments) -> bool:
    """Prints the table; returns whether both limits were kept."""
    meta, hf, back = folder / "meta", folder / "hf", folder / "back"
    largest = make_checkpoint(meta, args.gigabytes, args.num_shards)
    size, limit = sum(path.stat().st_size for path in meta.glob("*.pth")), 1.5e9 + 3 * largest
    print(f"{size / 1e9:.2f} GB in {args.num_shards} shards, largest tensor {largest / 1e6:.0f} MB, "
          f"allowed memory {limit / 1e9:.2f} GB")  # fmt: skip

    copies, writes, peaks = [], [], []
    for _ in range(args.repeats):
        copies.append(copy(meta, folder / "copy"))
        seconds, peak, report = convert("--input_dir", meta, "--output_dir", hf, "--verify", "False")
        writes.append((report["seconds"]["writing"], seconds))
        peaks.append(peak)
        shutil.rmtree(hf)
    (written, seconds), copied = min(writes), min(copies)
    print(f"cp                     {copied:6.1f} s  {size / copied / 1e9:5.2f} GB/s")
    print(f"writing the weights    {written:6.1f} s  {size / written / 1e9:5.2f} GB/s  {copied / written:.0%} of cp")
    print(f"the whole command      {seconds:6.1f} s  peak {max(peaks) / 1e9:.2f} GB  (without verifying and hashing)")
    for name, flags in (
        ("verified and hashed", ("--input_dir", meta, "--output_dir", hf)),
        ("back, verified, hashed", ("--to_meta", "--input_dir", hf, "--output_dir", back)),
    ):
        seconds, peak, report = convert(*flags)
        peaks.append(peak)
        steps = ", ".join(f"{step} {taken:.1f}" for step, taken in report["seconds"].items())
        print(f"{name:22} {seconds:6.1f} s  peak {peak / 1e9:.2f} GB  ({steps})")
    for path in sorted(meta.glob("*.pth")):
        before, after = (torch.load(root / path.name, mmap=True, weights_only=True) for root in (meta, back))
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        if not same:
            sys.exit(f"error: {path.name} came back with other values")
    print("there and back: the same bits")
    return max(peaks) <= limit and copied / written >= 0.6


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
