"""Compares the speed and memory of this toolkit's plain loop with what one would train with instead, in one run.

    bash tools/install_peers.sh
    python tools/benchmark.py --data alpaca.json                         # LoRA, 20 steps, 3 rounds, all peers
    python tools/benchmark.py --data medqa.jsonl --format mcq --mode full --peers trl,trl-packing
    python tools/benchmark.py --data alpaca.json --dry_run True          # shows what would be run

Each system is a process of its own, started in turn, --rounds times, so that what else the machine does falls on all
alike. All have the same model in float32, the same threads, LoRA of rank 8 on all linear layers or full fine-tuning,
--batch_size rows of at most --max_length tokens a step and no gradient checkpointing. All other settings are those that
the system has by itself; tools/benchmark_peers.py shows each start.

The rows: tokenize_dataset.py makes ours, and their ids decoded, prompt and completion, are the text that the peers get;
the loss is on the completion. Systems without packing train on the same first steps x batch_size rows, each in its own
order; those with packing (--batch_size packed rows a step) pack the whole set. Ours reads a set that was tokenized
before, peers tokenize at their start; the time that tokenizing the whole set took is printed.

The measuring is the same for all: a hook after each optimizer step writes the time and the process's peak memory, and
the embedding counts the real tokens, all that are not the pad token. A copy of the model has a pad token that no row
holds. Speed: real tokens of all steps but the first, by their time. Start: from the process's start to the end of the
first step. Ratios are ours / the peer's within one round, and the median over rounds is shown: above 1 we are faster,
for memory and start below 1 is better. A packed step is longer than one of the same number of rows, and its start, too.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import load_from_disk
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
IGNORE_INDEX = -100
PAD_ID = 0
ENVIRONMENTS = {"trainer": "trl"}  # where a system's environment has another name
SYSTEMS = ["ours", "ours-packing", "trl", "trl-packing", "trainer", "llamafactory", "llamafactory-packing"]
SYSTEMS += ["llamafactory-neat_packing", "torchtune", "torchtune-packing", "litgpt"]


@dataclass
class Arguments:
    data: str = field(metadata={"help": "file with the raw rows, as tokenize_dataset.py reads them"})
    format: str = field(default="alpaca", metadata={"help": "alpaca | mcq | chat"})
    mode: str = field(default="lora", metadata={"help": "lora | full"})
    peers: str = field(default=",".join(SYSTEMS[1:]), metadata={"help": "names by commas; none: only ours"})
    steps: int = field(default=20, metadata={"help": "optimizer steps of a run; the first is the start, not the speed"})
    rounds: int = field(default=3, metadata={"help": "how often each system is started"})
    batch_size: int = field(default=4, metadata={"help": "rows a step"})
    max_length: int = field(default=512, metadata={"help": "most tokens of a row; longer ones are left out for all"})
    lora_dropout: float = field(default=0.05, metadata={"help": "of all systems"})
    threads: int = field(default=os.cpu_count(), metadata={"help": "of each system"})
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder of a LLaMA"})
    json: str | None = field(default=None, metadata={"help": "file for all that was measured"})
    dry_run: bool = field(default=False, metadata={"help": "show what would be run, and run nothing"})


def check_arguments(args: Arguments) -> list[str]:
    """The systems to run, ours first.

    Raises:
        ValueError: all mistakes, one a line, with the remedy.
    """
    mistakes = []
    peers = [name.strip() for name in args.peers.split(",") if name.strip() not in ("", "none", "ours")]
    for name in peers:
        if name not in SYSTEMS:
            mistakes.append(f"--peers {name}: choose from {', '.join(SYSTEMS[1:])}, or none")
        elif not python_of(name).is_file():
            peer = python_of(name).parent.parent.name
            mistakes.append(f"--peers {name}: no environment .venv-peers/{peer}; bash tools/install_peers.sh {peer}")
    for name, choices in {"mode": ["lora", "full"], "format": ["alpaca", "mcq", "chat"]}.items():
        if getattr(args, name) not in choices:
            mistakes.append(f"--{name} {getattr(args, name)}: choose from {', '.join(choices)}")
    if args.steps < 2:
        mistakes.append(f"--steps {args.steps}: at least 2, since the first is not measured")
    for name in ("rounds", "batch_size", "threads"):
        if getattr(args, name) < 1:
            mistakes.append(f"--{name} {getattr(args, name)}: at least 1")
    if not Path(args.data).is_file():
        mistakes.append(f"--data {args.data}: no such file; name one of --format {args.format}")
    if not (Path(args.model_path) / "model.safetensors").is_file():
        mistakes.append(f"--model_path {args.model_path}: no model.safetensors in it; bash scripts/quickstart.sh "
                        "fetches the sample model")  # fmt: skip
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return ["ours", *peers]


def python_of(name: str) -> Path:
    """The interpreter of a system; ours runs in the environment of this program."""
    peer = name.split("-")[0]
    if peer == "ours":
        return Path(sys.executable)
    return ROOT / ".venv-peers" / ENVIRONMENTS.get(peer, peer) / "bin" / "python"


# -------------------------------------------------------------------------------------------------------------------
# The same model and rows for all
# -------------------------------------------------------------------------------------------------------------------


def copy_model(source: Path, folder: Path) -> Path:
    """The model with its token of id 0 as pad token; the weights are linked."""
    folder.mkdir()
    for path in source.iterdir():
        (os.symlink if path.suffix == ".safetensors" else shutil.copyfile)(path.resolve(), folder / path.name)
    pad_token = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(PAD_ID)
    changes = {"config.json": {"pad_token_id": PAD_ID}, "tokenizer_config.json": {"pad_token": pad_token}}
    changes["generation_config.json"] = {"pad_token_id": PAD_ID}
    for name, change in changes.items():
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps(settings | change, indent=2), encoding="utf-8")
    return folder


def tokenize(args: Arguments, model: Path, output: Path, packing: bool) -> float:
    """Writes a set as our user would; returns the seconds that it took."""
    started = time.time()
    command = [sys.executable, ROOT / "data_sample" / "tokenize_dataset.py", "--input", args.data, "--output", output]
    command += ["--format", args.format, "--max_length", args.max_length, "--packing", packing]
    command += ["--tokenizer_path", model]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"--data {args.data}: {finished.stderr}")
    return time.time() - started


def make_rows(args: Arguments, model: Path, folder: Path, packing: bool) -> tuple[dict, float]:
    """Returns ({False: (our set, the peers' rows), True: the same for packing}, seconds of tokenizing).

    Args:
        packing: whether a system packs; else the second pair is left out.

    Raises:
        ValueError: there are too few rows for the steps of a run.
    """
    seconds = tokenize(args, model, folder / "all", packing=False)
    data = load_from_disk(str(folder / "all"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows, kept = [], []
    for index, row in enumerate(data):
        ids, num_prompt = row["input_ids"], sum(label == IGNORE_INDEX for label in row["labels"])
        parts = ids[:num_prompt], ids[num_prompt:]
        prompt, completion = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
        again = tuple(tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, completion))
        if PAD_ID in ids or again != parts:
            continue  # a text that a peer would tokenize to other ids
        output = tokenizer.decode(ids[num_prompt:-1], skip_special_tokens=False)  # without EOS, for those who add it
        rows.append(json.dumps({"prompt": prompt, "completion": completion, "output": output}))
        kept.append(index)
    print(f"{len(kept)} of {len(data)} rows decode to text that gives the same ids")
    num_rows = args.steps * args.batch_size
    sets = {False: (str(folder / "first"), str(folder / "first.jsonl"))}
    (folder / "first.jsonl").write_text("\n".join(rows[:num_rows]), encoding="utf-8")
    if packing:
        tokenize(args, model, folder / "packed", packing=True)
        (folder / "packed.jsonl").write_text("\n".join(rows), encoding="utf-8")
        sets[True] = (str(folder / "packed"), str(folder / "packed.jsonl"))
    num_least = min(len(kept), len(load_from_disk(sets[True][0])) if packing else len(kept))
    if num_least < num_rows:
        raise ValueError(f"--steps {args.steps}: needs {num_rows} rows{', packed' * packing}, and --data has "
                         f"{num_least}; choose fewer steps")  # fmt: skip
    data.select(kept[:num_rows]).save_to_disk(sets[False][0])
    shutil.copy(folder / "all" / "ledger.json", folder / "first" / "ledger.json")
    return sets, seconds


# -------------------------------------------------------------------------------------------------------------------
# Runs and their results
# -------------------------------------------------------------------------------------------------------------------


def run_system(args: Arguments, name: str, model: Path, sets: dict, folder: Path) -> dict:
    """Starts one system and returns what it did: speed, memory, start and the steps themselves.

    Raises:
        ValueError: it failed, or computed in another precision than float32.
    """
    folder.mkdir()
    system, _, variant = name.partition("-")
    tokenized, rows = sets["packing" in variant]
    run = {"system": system, "variant": variant, "model": str(model), "tokenized": tokenized, "rows": rows}
    run |= {"output": str(folder / "output"), "log": str(folder / "steps.jsonl"), "mode": args.mode}
    run |= {"steps": args.steps, "batch_size": args.batch_size, "max_length": args.max_length}
    run |= {"dropout": args.lora_dropout}
    (folder / "run.json").write_text(json.dumps(run))
    # A cache of its own: each start tokenizes anew, as the first one of a user does.
    settings = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    settings |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [str(python_of(name)), str(ROOT / "tools" / "benchmark_peers.py"), str(folder / "run.json")]
    started = time.time()
    finished = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    if finished.returncode != 0 or not Path(run["log"]).is_file():
        raise ValueError(
            f"{name} failed with status {finished.returncode}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
        )
    steps = [json.loads(line) for line in Path(run["log"]).read_text().splitlines()]
    if odd := [step for step in steps if step.get("dtype") != "torch.float32" or step["real_tokens"] == 0]:
        raise ValueError(f"{name}: a step without tokens, or not in float32, so it cannot be compared: {odd[0]}")
    shutil.rmtree(folder)
    measured = sum(step["real_tokens"] for step in steps[1:])
    return {
        "tokens_per_second": measured / (steps[-1]["time"] - steps[0]["time"]),
        "filled": sum(step["real_tokens"] for step in steps) / sum(step["positions"] for step in steps),
        "memory_mb": steps[-1]["memory"] / 1e6,
        "start_seconds": steps[0]["time"] - started,
        "real_tokens": [step["real_tokens"] for step in steps],
        "seconds": [after["time"] - before["time"] for before, after in zip(steps, steps[1:], strict=False)],
    }


def summarize(results: dict[str, list[dict]]) -> dict[str, dict]:
    """For each system the medians over its rounds, and of the ratios to ours in the same round."""
    summary = {}
    for name, rounds in results.items():
        summary[name] = {key: statistics.median(r[key] for r in rounds)
                         for key in ("tokens_per_second", "filled", "memory_mb", "start_seconds")}  # fmt: skip
        for key in ("tokens_per_second", "memory_mb", "start_seconds"):
            ratios = [ours[key] / peer[key] for ours, peer in zip(results["ours"], rounds, strict=True)]
            summary[name] |= {f"{key}_ratios": ratios, f"{key}_ratio": statistics.median(ratios)}
    return summary


def print_table(summary: dict[str, dict]) -> None:
    print("| system | filled | real tokens/s | ours / it, by round | median | peak, MB | ratio | start, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in summary.items():
        ratios = " ".join(f"{ratio:.2f}" for ratio in row["tokens_per_second_ratios"])
        print(f"| {name} | {row['filled']:.0%} | {row['tokens_per_second']:.0f} | {ratios} "
              f"| {row['tokens_per_second_ratio']:.2f} | {row['memory_mb']:.0f} | {row['memory_mb_ratio']:.2f} "
              f"| {row['start_seconds']:.1f} | {row['start_seconds_ratio']:.2f} |")  # fmt: skip


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    try:
        systems = check_arguments(args)
        print(f"{args.rounds} rounds of {', '.join(systems)}: {args.mode}, {args.steps} steps of {args.batch_size} "
              f"rows of at most {args.max_length} tokens, {args.threads} threads, {platform.machine()}")  # fmt: skip
        if args.dry_run:
            return
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            disable_progress_bar()
            model = copy_model(Path(args.model_path), folder / "model")
            sets, seconds = make_rows(args, model, folder, any("packing" in name for name in systems))
            print(f"ours was tokenized before, in {seconds:.1f} s; the peers do it within their start")
            if "litgpt" in systems:
                convert_for_litgpt(model, folder)
            results, failed = {name: [] for name in systems}, []
            for i in range(args.rounds):
                for name in list(results):
                    print(f"round {i + 1}: {name}", file=sys.stderr, flush=True)
                    try:
                        results[name].append(run_system(args, name, model, sets, folder / f"{name}-{i}"))
                    except ValueError as problem:
                        if name == "ours":
                            raise
                        print(f"error: {problem}", file=sys.stderr, flush=True)
                        failed.append(name)  # the hours that the others took are not lost
                        del results[name]
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")
    summary = summarize(results)
    print_table(summary)
    if args.json:
        report = {"arguments": asdict(args), "tokenize_seconds": seconds, "summary": summary, "rounds": results}
        Path(args.json).write_text(json.dumps(report, indent=2))
    if failed:
        sys.exit(f"error: failed and left out: {', '.join(failed)}")


def convert_for_litgpt(model: Path, folder: Path) -> None:
    """LitGPT trains on its own format; the copied model gets it beside its own, before anything is measured."""
    run = {"system": "litgpt", "variant": "convert", "model": str(model), "log": "", "steps": 0}
    (folder / "convert.json").write_text(json.dumps(run))
    command = [str(python_of("litgpt")), str(ROOT / "tools" / "benchmark_peers.py"), str(folder / "convert.json")]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"litgpt could not convert the model:\n{finished.stderr[-4000:]}")


if __name__ == "__main__":
    main()
