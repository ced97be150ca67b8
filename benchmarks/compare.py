"""Compares the speed and memory of this toolkit's plain loop with what one would train with instead, in one run.

    bash benchmarks/install_peers.sh
    python benchmarks/compare.py --data alpaca.json                       # LoRA, 20 steps, 3 rounds, all peers
    python benchmarks/compare.py --data medqa.jsonl --format mcq --mode full --peers trl,trl-packing
    python benchmarks/compare.py --data alpaca.json --dry_run True        # shows what would be run

What every strategy of this toolkit takes on this machine is measured by benchmarks/strategies.py.

Each system is a process of its own. The systems are started in turn, --rounds times, so that whatever else the machine
does slows all of them alike. All have the same model in float32, the same threads, LoRA of rank 8 on all linear layers
or full fine-tuning, no dropout (the default of PEFT, LLaMA-Factory and torchtune), --batch_size rows of at most
--max_length tokens a step, and no gradient checkpointing. With --checkpointing own, TRL and LLaMA-Factory recompute
activations, as they do by themselves, and the others do not; with --checkpointing on, all do. All other settings are
those that the system has by itself; benchmarks/peers.py shows each start.

The rows: tokenize_dataset.py makes ours. Their ids decoded, prompt and completion, are the text that the peers get. The
loss is on the completion. Systems without packing train on the same first steps x batch_size rows, each in its own
order. Systems with packing (--batch_size packed rows a step) pack the whole set. Ours reads a set that was tokenized
before; the peers tokenize at their start. The time that tokenizing the whole set took is printed.

The measuring is the same for all: a hook after each optimizer step writes the time and the process's peak memory, and
the embedding counts the real tokens, which are all that are not the pad token. A copy of the model has a pad token that
no row holds. Speed: real tokens of all steps but the first, by their time. Start: from the process's start to the end
of the first step. Ratios are ours / the peer's within one round, and the median over rounds is shown: above 1 we are
faster; for memory and start below 1 is better. A packed step has more tokens than one of as many rows that are not
packed, so memory and start of systems with packing are compared with ours-packing, and the speed with ours. The peers'
start includes tokenizing, of the whole set where they pack.

The peak is the process's resident memory. It includes freed memory that C's allocator keeps, up to half as much again,
which depends on the order of sizes. With --return_memory True the allocator keeps nothing, so the peak is what a system
holds. That makes every system slower: measure speed without it.
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
ENVIRONMENTS = {"trainer": "trl"}  # systems whose environment has another name than they have
SYSTEMS = [
    "ours",
    "ours-packing",
    "trl",
    "trl-packing",
    "trainer",
    "llamafactory",
    "llamafactory-packing",
    "llamafactory-neat_packing",
    "torchtune",
    "torchtune-packing",
    "litgpt",
]
MEASURES = ("tokens_per_second", "filled", "memory_mb", "start_seconds")
COMPARED = ("tokens_per_second", "memory_mb", "start_seconds")  # those for which a ratio is shown


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
    lora_dropout: float = field(default=0.0, metadata={"help": "of all systems; our scripts have 0.05 by default"})
    checkpointing: str = field(
        default="off", metadata={"help": "gradient checkpointing: off | on, for all; own: as each system does"}
    )
    return_memory: bool = field(
        default=False, metadata={"help": "the allocator gives freed memory back at once: peaks are what is held"}
    )
    threads: int = field(default=os.cpu_count(), metadata={"help": "of each system"})
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder of a LLaMA"})
    json: str | None = field(default=None, metadata={"help": "file for all that was measured"})
    dry_run: bool = field(default=False, metadata={"help": "show what would be run, and run nothing"})


def check_arguments(args: Arguments) -> list[str]:
    """Returns the names of the systems to run, ours first.

    Raises:
        ValueError: all mistakes, one a line, with the remedy.
    """
    mistakes = []
    peers = list_peers(args.peers)
    for name in peers:
        if name not in SYSTEMS:
            mistakes.append(f"--peers {name}: choose from {', '.join(SYSTEMS[1:])}, or none")
        elif not find_python(name).is_file():
            environment = find_python(name).parent.parent.name
            mistakes.append(
                f"--peers {name}: no environment .venv-peers/{environment}; "
                f"bash benchmarks/install_peers.sh {environment}"
            )
    choices = {"mode": ["lora", "full"], "checkpointing": ["off", "on", "own"], "format": ["alpaca", "mcq", "chat"]}
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            mistakes.append(f"--{name} {getattr(args, name)}: choose from {', '.join(allowed)}")
    if args.checkpointing == "on" and "litgpt" in peers:
        mistakes.append("--checkpointing on: LitGPT has it for several devices only; leave litgpt out of --peers")
    if args.steps < 2:
        mistakes.append(f"--steps {args.steps}: at least 2, since the first is not measured")
    for name in ("rounds", "batch_size", "threads"):
        if getattr(args, name) < 1:
            mistakes.append(f"--{name} {getattr(args, name)}: at least 1")
    if not Path(args.data).is_file():
        mistakes.append(f"--data {args.data}: no such file; name one of --format {args.format}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        mistakes.append(f"--json {args.json}: no such folder; name a file in one that is there")
    if not (Path(args.model_path) / "model.safetensors").is_file():
        mistakes.append(
            f"--model_path {args.model_path}: no model.safetensors in it; bash scripts/quickstart.sh "
            "fetches the sample model"
        )
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return ["ours", *peers]


def list_peers(names: str) -> list[str]:
    """The systems in --peers, and ours-packing if one of them packs: memory and start need a step as large."""
    peers = []
    for name in names.split(","):
        name = name.strip()
        if name not in ("", "none", "ours"):
            peers.append(name)
    one_packs = any(name.endswith("packing") for name in peers)
    if one_packs and "ours-packing" not in peers:
        peers.insert(0, "ours-packing")
    return peers


def find_python(name: str) -> Path:
    """The interpreter of a system; ours runs in the environment of this program."""
    system = name.split("-")[0]
    if system == "ours":
        return Path(sys.executable)
    return ROOT / ".venv-peers" / ENVIRONMENTS.get(system, system) / "bin" / "python"


# -------------------------------------------------------------------------------------------------------------------
# The same model and rows for all
# -------------------------------------------------------------------------------------------------------------------


def copy_model(source: Path, folder: Path) -> Path:
    """Copies the model, with its token of id 0 as pad token; the weights are linked."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            os.symlink(path.resolve(), folder / path.name)
        else:
            shutil.copyfile(path.resolve(), folder / path.name)
    pad_token = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(PAD_ID)
    changes = {
        "config.json": {"pad_token_id": PAD_ID},
        "generation_config.json": {"pad_token_id": PAD_ID},
        "tokenizer_config.json": {"pad_token": pad_token},
    }
    for name, change in changes.items():
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings.update(change)
            path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def tokenize(args: Arguments, model: Path, output: Path, packing: bool) -> float:
    """Writes a set as our user would; returns the seconds that it took.

    Args:
        args: of this program or of benchmarks/strategies.py; data, format and max_length are used.

    Raises:
        ValueError: tokenize_dataset.py refused the data.
    """
    started = time.time()
    command = [sys.executable, ROOT / "data_sample" / "tokenize_dataset.py", "--input", args.data, "--output", output]
    command += ["--format", args.format, "--max_length", args.max_length, "--packing", packing]
    command += ["--tokenizer_path", model]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"--data {args.data}: {finished.stderr}")
    return time.time() - started


def decode_row(tokenizer: Tokenizer, row: dict) -> dict | None:
    """The text of a tokenized row; None if a peer would make other ids of it, or learn other positions."""
    ids = row["input_ids"]
    num_prompt = row["labels"].count(IGNORE_INDEX)
    prompt = tokenizer.decode(ids[:num_prompt], skip_special_tokens=False)
    completion = tokenizer.decode(ids[num_prompt:], skip_special_tokens=False)
    if PAD_ID in ids or IGNORE_INDEX in row["labels"][num_prompt:]:
        return None
    if tokenizer.encode(prompt, add_special_tokens=False).ids != ids[:num_prompt]:
        return None
    if tokenizer.encode(completion, add_special_tokens=False).ids != ids[num_prompt:]:
        return None
    # Without EOS, for the systems that add it.
    output = tokenizer.decode(ids[num_prompt:-1], skip_special_tokens=False)
    return {"prompt": prompt, "completion": completion, "output": output}


def make_rows(args: Arguments, model: Path, folder: Path, packing: bool) -> tuple[dict, float]:
    """Writes the rows; returns ({False: (our set, the peers' rows), True: the same for packing}, tokenizing seconds).

    Args:
        packing: whether a system packs; otherwise the second pair is left out.

    Raises:
        ValueError: there are too few rows for the steps of a run.
    """
    seconds = tokenize(args, model, folder / "all", packing=False)
    data = load_from_disk(str(folder / "all"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lines = []
    kept = []
    for index, row in enumerate(data):
        text = decode_row(tokenizer, row)
        if text is not None:
            lines.append(json.dumps(text))
            kept.append(index)
    print(f"{len(kept)} of {len(data)} rows decode to text that gives the same ids")

    num_rows = args.steps * args.batch_size
    num_available = len(kept)
    sets = {False: (str(folder / "first"), str(folder / "first.jsonl"))}
    (folder / "first.jsonl").write_text("\n".join(lines[:num_rows]), encoding="utf-8")
    what = "rows"
    if packing:
        tokenize(args, model, folder / "packed", packing=True)
        (folder / "packed.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sets[True] = (str(folder / "packed"), str(folder / "packed.jsonl"))
        num_available = min(num_available, len(load_from_disk(sets[True][0])))
        what = "rows, packed"
    if num_available < num_rows:
        raise ValueError(
            f"--steps {args.steps}: needs {num_rows} {what}, and --data has {num_available}; choose fewer steps"
        )
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
    log = folder / "steps.jsonl"
    run = {
        "system": system,
        "variant": variant,
        "model": str(model),
        "tokenized": tokenized,
        "rows": rows,
        "output": str(folder / "output"),
        "log": str(log),
        "mode": args.mode,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "dropout": args.lora_dropout,
        "checkpointing": args.checkpointing,
    }
    (folder / "run.json").write_text(json.dumps(run))
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(args.threads)
    environment["HF_HUB_OFFLINE"] = "1"
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")  # its own: each start tokenizes anew, as a first one does
    environment["CUDA_VISIBLE_DEVICES"] = ""
    if args.return_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [str(find_python(name)), str(ROOT / "benchmarks" / "peers.py"), str(folder / "run.json")]
    started = time.time()
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if finished.returncode != 0 or not log.is_file():
        raise ValueError(
            f"{name} failed with status {finished.returncode}:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"
        )
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    shutil.rmtree(folder)
    return measure_steps(name, steps, started)


def measure_steps(name: str, steps: list[dict], started: float) -> dict:
    """Speed, memory and start from the lines that benchmarks/peers.py wrote.

    Args:
        started: seconds since 1970 when the process was started.

    Raises:
        ValueError: a step has no tokens, or was not computed in float32.
    """
    for step in steps:
        if step.get("dtype") != "torch.float32" or step["real_tokens"] == 0:
            raise ValueError(f"{name}: a step without tokens, or not in float32, so it cannot be compared: {step}")
    tokens = [step["real_tokens"] for step in steps]
    times = [step["time"] for step in steps]
    seconds = []
    for number in range(1, len(times)):
        seconds.append(times[number] - times[number - 1])
    return {
        "tokens_per_second": sum(tokens[1:]) / (times[-1] - times[0]),
        "filled": sum(tokens) / sum(step["positions"] for step in steps),
        "memory_mb": steps[-1]["memory"] / 1e6,
        "start_seconds": times[0] - started,
        "real_tokens": tokens,
        "seconds": seconds,
    }


def summarize(results: dict[str, list[dict]]) -> dict[str, dict]:
    """For each system the medians over its rounds, and of the ratios to ours in the same round.

    Memory and start of a system that packs are compared with those of ours-packing, whose step is as large.
    """
    summary = {}
    for name, rounds in results.items():
        row = {}
        for measure in MEASURES:
            row[measure] = statistics.median(one[measure] for one in rounds)
        for measure in COMPARED:
            ours = results["ours"]
            if name.endswith("packing") and measure != "tokens_per_second" and "ours-packing" in results:
                ours = results["ours-packing"]
            ratios = []
            for our_round, round_of_it in zip(ours, rounds, strict=True):
                ratios.append(our_round[measure] / round_of_it[measure])
            row[f"{measure}_ratios"] = ratios
            row[f"{measure}_ratio"] = statistics.median(ratios)
        summary[name] = row
    return summary


def print_table(summary: dict[str, dict]) -> None:
    print("| system | filled | real tokens/s | ours / it, by round | median | peak, MB | ratio | start, s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in summary.items():
        cells = [
            name,
            f"{row['filled']:.0%}",
            f"{row['tokens_per_second']:.0f}",
            " ".join(f"{ratio:.2f}" for ratio in row["tokens_per_second_ratios"]),
            f"{row['tokens_per_second_ratio']:.2f}",
            f"{row['memory_mb']:.0f}",
            f"{row['memory_mb_ratio']:.2f}",
            f"{row['start_seconds']:.1f}",
            f"{row['start_seconds_ratio']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_differences(results: dict[str, list[dict]]) -> None:
    """Says which systems without packing did not train on just the tokens that ours did."""
    ours = sum(results["ours"][-1]["real_tokens"])
    for name, rounds in results.items():
        tokens = sum(rounds[-1]["real_tokens"])
        if not name.endswith("packing") and tokens != ours:
            print(f"{name} trained on {tokens} real tokens, ours on {ours}: it reads the rows in another way")


def convert_for_litgpt(model: Path, folder: Path) -> None:
    """LitGPT trains on its own format; the copied model gets it beside its own, before anything is measured."""
    run = {"system": "litgpt", "variant": "convert", "model": str(model), "log": "", "steps": 0}
    (folder / "convert.json").write_text(json.dumps(run))
    command = [str(find_python("litgpt")), str(ROOT / "benchmarks" / "peers.py"), str(folder / "convert.json")]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode != 0:
        raise ValueError(f"litgpt could not convert the model:\n{finished.stderr[-4000:]}")


def run_rounds(args: Arguments, systems: list[str], folder: Path) -> list[str]:
    """Runs and reports all rounds; returns the systems that failed and were left out.

    Raises:
        ValueError: ours failed, or the data cannot be used.
    """
    packing = any("packing" in name for name in systems)
    # LitGPT decides by the folder's name whether a text begins with BOS.
    model = copy_model(Path(args.model_path), folder / Path(args.model_path).resolve().name)
    sets, seconds = make_rows(args, model, folder, packing)
    print(f"ours was tokenized before, in {seconds:.1f} s; the peers do it within their start")
    if "litgpt" in systems:
        convert_for_litgpt(model, folder)

    results = {name: [] for name in systems}
    failed = []
    for number in range(args.rounds):
        for name in list(results):
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            try:
                results[name].append(run_system(args, name, model, sets, folder / f"{name}-{number}"))
            except ValueError as problem:
                if name == "ours":
                    raise
                print(f"error: {problem}", file=sys.stderr, flush=True)
                failed.append(name)  # the hours that the others took are not lost
                del results[name]
        summary = summarize(results)
        print_table(summary)  # after each round: an interrupted benchmark has told something
        print_differences(results)
        if args.json:
            report = {"arguments": asdict(args), "tokenize_seconds": seconds, "rounds": results, "summary": summary}
            Path(args.json).write_text(json.dumps(report, indent=2))
    return failed


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        systems = check_arguments(args)
        print(f"{args.steps} steps of {args.batch_size} rows of at most {args.max_length} tokens, {args.threads} "
              f"threads, {platform.machine()}; {args.mode}, {args.rounds} rounds of {', '.join(systems)}")  # fmt: skip
        if args.dry_run:
            return
        disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            failed = run_rounds(args, systems, Path(folder))
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")
    if failed:
        sys.exit(f"error: failed and left out: {', '.join(failed)}")


if __name__ == "__main__":
    main()
