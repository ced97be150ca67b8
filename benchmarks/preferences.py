"""Compares the speed and memory of finetune_pp_dpo.py with those of TRL's DPOTrainer, in one run.

    bash benchmarks/install_peers.sh trl
    python benchmarks/preferences.py --return_memory True                # LoRA, 8 steps of 4 pairs, 3 rounds
    python benchmarks/preferences.py --mode full --checkpointing on

Each is a process of its own, started in turn, --rounds times, as in benchmarks/compare.py, whose measuring this is: a
hook after each optimizer step, and the embedding counts the positions of the forwards that are trained on. Real tokens
are those of a pair's two documents, each with its prompt: TRL computes a prompt twice, and ours once, so that more than
100 % of its positions are filled. Both get the same token ids of a paired set, the same model in float32, the same
threads, and with --mode lora an adapter of rank 8 on all linear layers without dropout. TRL's reference is what its
documentation says: the model without the adapter, or with --mode full a second model. All else is as each has it by
itself; with --checkpointing own, TRL recomputes activations, which it does by itself, and ours does not.

Speed: real tokens of all steps but the first, by their time; and by their CPU time, which changes less where other
programs take the cores (with --threads 1, since threads that wait take CPU time, too). Ratios are ours / TRL's within
one round, and the median over the rounds is shown. The peak is the process's resident memory; with --return_memory True
the allocator keeps nothing that is freed, so it is what is held, and both are slower: measure the speed without it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compare import PAD_ID, copy_model, find_python, measure_steps, print_table, summarize
from datasets import load_from_disk
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_collator import PreferenceDataset, TrainingRows  # noqa: E402

SYSTEMS = {"ours": "dpo_ours", "trl": "dpo_trl"}  # by their names in benchmarks/peers.py


@dataclass
class Arguments:
    dataset_path: str = field(default="data_sample/tokenized/preference_train", metadata={"help": "a paired set"})
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder of a model"})
    mode: str = field(default="lora", metadata={"help": "lora | full"})
    steps: int = field(default=8, metadata={"help": "optimizer steps of a run; the first is the start, not the speed"})
    rounds: int = field(default=3, metadata={"help": "how often each is started"})
    batch_size: int = field(default=4, metadata={"help": "pairs a step"})
    checkpointing: str = field(default="off", metadata={"help": "gradient checkpointing: off | on; own: as each does"})
    return_memory: bool = field(default=False, metadata={"help": "the allocator gives freed memory back at once"})
    threads: int = field(default=os.cpu_count(), metadata={"help": "of each"})
    json: str | None = field(default=None, metadata={"help": "file for all that was measured"})
    dry_run: bool = field(default=False, metadata={"help": "show what would be run, and run nothing"})


def check_arguments(args: Arguments) -> None:
    """Raises ValueError with all mistakes, one a line, with the remedy."""
    mistakes = []
    choices = {"mode": ["lora", "full"], "checkpointing": ["off", "on", "own"]}
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            mistakes.append(f"--{name} {getattr(args, name)}: choose from {', '.join(allowed)}")
    if args.steps < 2:
        mistakes.append(f"--steps {args.steps}: at least 2, since the first is not measured")
    for name in ("rounds", "batch_size", "threads"):
        if getattr(args, name) < 1:
            mistakes.append(f"--{name} {getattr(args, name)}: at least 1")
    if not (Path(args.model_path) / "model.safetensors").is_file():
        mistakes.append(f"--model_path {args.model_path}: no model.safetensors in it; bash scripts/quickstart.sh "
                        "fetches the sample model")  # fmt: skip
    if not (Path(args.dataset_path) / "ledger.json").is_file():
        mistakes.append(f"--dataset_path {args.dataset_path}: not a tokenized set; make it with "
                        "python data_sample/tokenize_dataset.py --format preference")  # fmt: skip
    elif "chosen_ids" not in load_from_disk(args.dataset_path).column_names:
        mistakes.append(f"--dataset_path {args.dataset_path}: it has no pairs of answers")
    if not find_python("trl").is_file():
        mistakes.append("no environment .venv-peers/trl; bash benchmarks/install_peers.sh trl")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def make_rows(args: Arguments, folder: Path) -> tuple[str, str]:
    """(our set, TRL's rows as JSON lines) of the pairs of a run.

    Left out are pairs with the id that the copied model pads with, and with answers that carry loss in parts only,
    which TRL cannot do.

    Raises:
        ValueError: there are too few.
    """
    data = load_from_disk(args.dataset_path)
    kept = []
    for index, row in enumerate(data):
        ids = row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"]
        is_whole = row["chosen_labels"] == row["chosen_ids"] and row["rejected_labels"] == row["rejected_ids"]
        if is_whole and PAD_ID not in ids:
            kept.append(index)
    num_rows = args.steps * args.batch_size
    print(f"{len(kept)} of {len(data)} pairs can be compared, and {num_rows} are used")
    if len(kept) < num_rows:
        raise ValueError(f"--steps {args.steps}: needs {num_rows} pairs, and there are {len(kept)}; choose fewer steps")
    chosen = data.select(kept[:num_rows])
    chosen.save_to_disk(folder / "pairs")
    shutil.copy(Path(args.dataset_path) / "ledger.json", folder / "pairs" / "ledger.json")
    lines = [json.dumps(row) for row in chosen]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "pairs"), str(folder / "pairs.jsonl")


def run_system(args: Arguments, name: str, model: Path, sets: tuple[str, str], folder: Path) -> dict:
    """Starts one system and returns what it did.

    Raises:
        ValueError: it failed, or computed in another precision than float32.
    """
    folder.mkdir()
    log = folder / "steps.jsonl"
    run = {
        "system": SYSTEMS[name],
        "variant": "",
        "model": str(model),
        "tokenized": sets[0],
        "rows": sets[1],
        "output": str(folder / "output"),
        "log": str(log),
        "mode": args.mode,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "dropout": 0.0,
        "checkpointing": args.checkpointing,
    }
    (folder / "run.json").write_text(json.dumps(run))
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(args.threads)
    environment["HF_HUB_OFFLINE"] = "1"
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if args.return_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [str(find_python(name)), str(ROOT / "benchmarks" / "peers.py"), str(folder / "run.json")]
    started = time.time()
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if finished.returncode != 0 or not log.is_file():
        raise ValueError(f"{name} failed with status {finished.returncode}:\n{finished.stdout[-2000:]}\n"
                         f"{finished.stderr[-4000:]}")  # fmt: skip
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    if name == "ours":
        rows = TrainingRows(PreferenceDataset(sets[0]), args.batch_size, 1, args.steps, seed=42)  # as the script's
        for number, step in enumerate(steps):
            step["real_tokens"] = rows.num_tokens(number)
    shutil.rmtree(folder)
    measured = measure_steps(name, steps, started)
    cpu_seconds = steps[-1]["cpu_seconds"] - steps[0]["cpu_seconds"]
    measured["tokens_per_cpu_second"] = sum(measured["real_tokens"][1:]) / cpu_seconds
    return measured


def run_rounds(args: Arguments, folder: Path) -> None:
    """Runs and reports all rounds, in turn, so that whatever else the machine does slows both alike."""
    model = copy_model(Path(args.model_path), folder / "model")
    sets = make_rows(args, folder)
    results = {name: [] for name in SYSTEMS}
    for number in range(args.rounds):
        for name in SYSTEMS:
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            results[name].append(run_system(args, name, model, sets, folder / f"{name}-{number}"))
        summary = summarize(results)
        print_table(summary)  # after each round: an interrupted benchmark has told something
        ratios = []
        for ours, trl in zip(results["ours"], results["trl"], strict=True):
            ratios.append(ours["tokens_per_cpu_second"] / trl["tokens_per_cpu_second"])
        by_round = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"real tokens a second of CPU time, ours / TRL's, by round: {by_round}")
        tokens = {name: sum(rounds[-1]["real_tokens"]) for name, rounds in results.items()}
        if tokens["ours"] != tokens["trl"]:
            print(f"trl trained on {tokens['trl']} real tokens, ours on {tokens['ours']}")
        if args.json:
            report = {"arguments": asdict(args), "rounds": results, "summary": summary}
            Path(args.json).write_text(json.dumps(report, indent=2))


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        check_arguments(args)
        print(f"{args.steps} steps of {args.batch_size} pairs, {args.threads} threads, {platform.machine()}; "
              f"{args.mode}, checkpointing {args.checkpointing}, {args.rounds} rounds")  # fmt: skip
        if args.dry_run:
            return
        with tempfile.TemporaryDirectory() as folder:
            run_rounds(args, Path(folder))
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")


if __name__ == "__main__":
    main()
