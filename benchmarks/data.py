"""Measures what the data costs, as ratios that mean the same on every machine.

    python benchmarks/data.py rate --num_proc 2        # against encode_batch of the tokenizers library alone
    python benchmarks/data.py memory --megabytes 100,2000

`rate`: rows a second of data_sample/tokenize_dataset.py from a file to the finished set (read, render, tokenize, mask,
pack, write), over that of a bare `encode_batch` on the same rendered texts in as many processes. Both start from a
loaded tokenizer and run in turn, in new processes.

`memory`: the most memory that tokenize_dataset.py takes, all its processes together, for generated JSONL of several
sizes, over the first size's; and above what its imports and the tokenizer take by themselves.

The rows are made of the sentences of the shipped data, with lengths like Alpaca's.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in tokenize_dataset.py: processes, not threads
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_sample import rendering, tokenize_dataset  # noqa: E402

PROGRAM = ROOT / "data_sample" / "tokenize_dataset.py"


def write_rows(path: Path, num_bytes: int, seed: int = 0) -> Path:
    """JSONL of about `num_bytes` in Alpaca's shape, of sentences in a random order; beyond 20 MB the rows repeat."""
    sentences = []
    for row in json.loads((ROOT / "data_sample" / "instruct_zh_en.json").read_text(encoding="utf-8")):
        sentences += [row["instruction"], row["output"]]
    for line in (ROOT / "data_sample" / "triage_train.jsonl").read_text(encoding="utf-8").splitlines():
        sentences.append(json.loads(line)["sent1"])
    draw = random.Random(seed)
    rows = []
    size = 0
    with open(path, "wb") as file:
        while size < min(num_bytes, 20_000_000):
            length = int(draw.lognormvariate(6.0, 0.8))  # characters of the answer
            output = ""
            while len(output) < length:
                output += draw.choice(sentences) + f" {draw.randrange(1000)}. "
            row = {"instruction": draw.choice(sentences), "input": "", "output": output[:length]}
            rows.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            size += len(rows[-1])
        for _ in range(max(1, round(num_bytes / size))):
            file.writelines(rows)
    return path


# -------------------------------------------------------------------------------------------------------------------
# rate
# -------------------------------------------------------------------------------------------------------------------


def encode_bare(tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), 512):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + 512], add_special_tokens=False)


def seconds_of(target, num_processes: int, arguments_of) -> float:
    """Wall time of `target` in new processes, from the first start to the last end."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=arguments_of(i)) for i in range(num_processes)]
    started = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            sys.exit("error: a measured process failed")
    return time.perf_counter() - started


def measure_rate(args: argparse.Namespace) -> None:
    import datasets  # noqa: F401 - as the tokenizer, before the clock starts: a fork has what its parent imported

    with tempfile.TemporaryDirectory() as folder:
        raw = write_rows(Path(folder) / "rows.jsonl", int(args.megabytes.split(",")[0]) * 1_000_000)
        flags = tokenize_dataset.Arguments(
            input=str(raw),
            format="alpaca",
            tokenizer_path=args.tokenizer_path,
            packing=True,
            max_length=2048,
            num_proc=args.num_proc,
            output=f"{folder}/set",
        )
        tokenizer = tokenize_dataset.load_tokenizer(flags)
        template = tokenize_dataset.describe_template(flags, tokenizer)
        texts = []
        for line in raw.read_bytes().splitlines():
            row = json.loads(line)
            prompt = rendering.render_prompt(row, template)
            (answer,) = rendering.render_answers(row, template)
            texts.append("".join(rendering.apply_template(tokenizer, prompt, answer, template["chat"])))
        print(f"{len(texts):,} rows, {sum(map(len, texts)) / 1e6:.0f} million characters, {args.num_proc} process(es)")
        ratios = []
        for _ in range(args.repeats):
            bare = seconds_of(encode_bare, args.num_proc, lambda i: (tokenizer, texts[i :: args.num_proc]))
            whole = seconds_of(tokenize_dataset.build, 1, lambda i: (flags, tokenizer))
            ratios.append(bare / whole)
            print(f"rate of tokenize_dataset.py over that of encode_batch alone: {ratios[-1]:.2f}", flush=True)
        print(f"median: {statistics.median(ratios):.2f}")


# -------------------------------------------------------------------------------------------------------------------
# memory
# -------------------------------------------------------------------------------------------------------------------


def family_memory(pid: int) -> int:
    """Bytes that a process and its children take now; pages that they share count once (PSS)."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it ended meanwhile
        return 0
    own = next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own + sum(map(family_memory, map(int, children)))


def peak_of(command: list[str]) -> int:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, family_memory(process.pid))
        time.sleep(0.05)
    if process.returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed")
    return peak


IMPORTS = f"""
import runpy, sys, time
import datasets, jinja2, tqdm
from transformers import AutoTokenizer, HfArgumentParser
runpy.run_path({str(PROGRAM)!r}, run_name="program")
AutoTokenizer.from_pretrained(sys.argv[1])
time.sleep(1)
"""


def measure_memory(args: argparse.Namespace) -> None:
    baseline = peak_of([sys.executable, "-c", IMPORTS, args.tokenizer_path])
    print(f"imports and the tokenizer: {baseline / 1e6:.0f} MB")
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes.split(","):
            raw = write_rows(Path(folder) / "rows.jsonl", int(megabytes) * 1_000_000)
            command = [sys.executable, str(PROGRAM), "--input", str(raw), "--format", "alpaca", "--packing", "True"]
            command += ["--max_length", "2048", "--tokenizer_path", args.tokenizer_path]
            command += ["--num_proc", str(args.num_proc), "--output", f"{folder}/set"]
            peaks.append(peak_of(command))
            print(f"{megabytes} MB of JSONL, {args.num_proc} process(es): {(peaks[-1] - baseline) / 1e6:.0f} MB above "
                  f"the imports; the peak is {peaks[-1] / peaks[0]:.2f} times the first one", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["rate", "memory"])
    parser.add_argument("--tokenizer_path", default="models/SmolLM2-135M-Instruct", help="a fast tokenizer's folder")
    parser.add_argument("--num_proc", type=int, default=1, help="worker processes")
    parser.add_argument("--megabytes", default="20", help="size of the generated input; memory: several, with commas")
    parser.add_argument("--repeats", type=int, default=3, help="rate: measurements, of which the median is given")
    args = parser.parse_args()
    {"rate": measure_rate, "memory": measure_memory}[args.measure](args)


if __name__ == "__main__":
    main()
