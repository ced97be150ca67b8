"""Compares the speed and memory of this toolkit's plain loop with what one would train with instead, in one run.

    bash tools/install_peers.sh
    python tools/benchmark.py --data alpaca.json                         # LoRA, 20 steps, 3 rounds, all peers
    python tools/benchmark.py --data medqa.jsonl --format mcq --mode full --peers trl,trl-packing
    python tools/benchmark.py --data alpaca.json --dry_run True          # shows what would be run
    python tools/benchmark.py --data alpaca.json --table docs/strategies.md

Each system is a process of its own, started in turn, --rounds times, so that what else the machine does falls on all
alike. All have the same model in float32, the same threads, LoRA of rank 8 on all linear layers or full fine-tuning,
without dropout (the default of PEFT, LLaMA-Factory and torchtune), --batch_size rows of at most
--max_length tokens a step and no gradient checkpointing. With --checkpointing own, TRL and LLaMA-Factory recompute
activations, as they do by themselves, and the others do not; with --checkpointing on, all do. All other settings are
those that the system has by itself; tools/benchmark_peers.py shows each start.

The rows: tokenize_dataset.py makes ours, and their ids decoded, prompt and completion, are the text that the peers get;
the loss is on the completion. Systems without packing train on the same first steps x batch_size rows, each in its own
order; those with packing (--batch_size packed rows a step) pack the whole set. Ours reads a set that was tokenized
before, peers tokenize at their start; the time that tokenizing the whole set took is printed.

The measuring is the same for all: a hook after each optimizer step writes the time and the process's peak memory, and
the embedding counts the real tokens, all that are not the pad token. A copy of the model has a pad token that no row
holds. Speed: real tokens of all steps but the first, by their time. Start: from the process's start to the end of the
first step. Ratios are ours / the peer's within one round, and the median over rounds is shown: above 1 we are faster,
for memory and start below 1 is better. A packed step has more tokens than one of as many rows that are not packed, so
memory and start of those with packing are compared with ours-packing, the speed with ours. The peers' start includes
tokenizing, of the whole set where they pack.

The peak is the process's resident memory. It includes freed memory that C's allocator keeps, up to half as much again,
which depends on the order of sizes; with --return_memory True it keeps nothing, so the peak is what a system holds.
That makes every system slower: measure speed without it.

--table measures every strategy of this toolkit instead, on this machine: as one process or as one for each GPU (without
a GPU: as two), each with --batch_size rows for each of them a step, --steps steps, the first of them left out. MFU is
the share of the machine's matrix-product rate (--peak_flops, or measured in the same run) that the model's own work
makes up: 6 FLOPs for each trained weight and token, 4 for each frozen one, the output layer counted for every token and
attention left out, as is usual. HFU is what is executed: the output layer for target tokens only, which makes it less,
and the layers that gradient checkpointing computes again, which makes it more.
"""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data_collator import use_bf16  # noqa: E402

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
    lora_dropout: float = field(default=0.0, metadata={"help": "of all systems; our scripts have 0.05 by default"})
    checkpointing: str = field(
        default="off", metadata={"help": "gradient checkpointing: off | on, for all; own: as it comes"}
    )
    return_memory: bool = field(
        default=False, metadata={"help": "the allocator gives freed memory back at once: peaks are what is held"}
    )
    threads: int = field(default=os.cpu_count(), metadata={"help": "of each system"})
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder of a LLaMA"})
    json: str | None = field(default=None, metadata={"help": "file for all that was measured"})
    dry_run: bool = field(default=False, metadata={"help": "show what would be run, and run nothing"})
    table: str | None = field(default=None, metadata={"help": "measure our strategies instead; the file to write"})
    tokens: float = field(default=2.5e9, metadata={"help": "--table: tokens of the epoch whose hours are given"})
    peak_flops: float = field(default=0, metadata={"help": "--table: of a device, by its data sheet; 0: measure it"})


def check_arguments(args: Arguments) -> list[str]:
    """The systems to run, ours first.

    Raises:
        ValueError: all mistakes, one a line, with the remedy.
    """
    mistakes = []
    peers = [name.strip() for name in args.peers.split(",") if name.strip() not in ("", "none", "ours")]
    if args.json and not Path(args.json).absolute().parent.is_dir():
        mistakes.append(f"--json {args.json}: no such folder; name a file in one that is there")
    if args.table:
        peers = []
        if not Path(args.table).absolute().parent.is_dir():
            mistakes.append(f"--table {args.table}: no such folder; name a file in one that is there")
    if any(name.endswith("packing") for name in peers) and "ours-packing" not in peers:
        peers.insert(0, "ours-packing")  # memory and start are compared at the same rows a step
    for name in peers:
        if name not in SYSTEMS:
            mistakes.append(f"--peers {name}: choose from {', '.join(SYSTEMS[1:])}, or none")
        elif not python_of(name).is_file():
            peer = python_of(name).parent.parent.name
            mistakes.append(f"--peers {name}: no environment .venv-peers/{peer}; bash tools/install_peers.sh {peer}")
    for name, choices in {
        "mode": ["lora", "full"],
        "checkpointing": ["off", "on", "own"],
        "format": ["alpaca", "mcq", "chat"],
    }.items():
        if getattr(args, name) not in choices:
            mistakes.append(f"--{name} {getattr(args, name)}: choose from {', '.join(choices)}")
    if args.checkpointing == "on" and "litgpt" in peers:
        mistakes.append("--checkpointing on: LitGPT has it for several devices only; leave litgpt out of --peers")
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
        if PAD_ID in ids or again != parts or IGNORE_INDEX in row["labels"][num_prompt:]:
            continue  # a peer would tokenize the text to other ids, or learn other positions
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
    run |= {"dropout": args.lora_dropout, "checkpointing": args.checkpointing}
    (folder / "run.json").write_text(json.dumps(run))
    # A cache of its own: each start tokenizes anew, as the first one of a user does.
    settings = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    settings |= {"CUDA_VISIBLE_DEVICES": ""}
    if args.return_memory:
        settings |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
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
    """For each system the medians over its rounds, and of the ratios to ours in the same round.

    Memory and start of a system that packs are compared with those of ours-packing, whose step is as large.
    """
    summary = {}
    for name, rounds in results.items():
        summary[name] = {key: statistics.median(r[key] for r in rounds)
                         for key in ("tokens_per_second", "filled", "memory_mb", "start_seconds")}  # fmt: skip
        for key in ("tokens_per_second", "memory_mb", "start_seconds"):
            packs = name.endswith("packing") and key != "tokens_per_second"
            base = results.get("ours-packing" if packs else "ours", results["ours"])
            ratios = [ours[key] / peer[key] for ours, peer in zip(base, rounds, strict=True)]
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


def print_differences(results: dict[str, list[dict]]) -> None:
    """Says which systems without packing did not train on just the tokens that ours did."""
    ours = sum(results["ours"][-1]["real_tokens"])
    for name, rounds in results.items():
        tokens = sum(rounds[-1]["real_tokens"])
        if not name.endswith("packing") and tokens != ours:
            print(f"{name} trained on {tokens} real tokens, ours on {ours}: it reads the rows in another way")


# -------------------------------------------------------------------------------------------------------------------
# --table: what each strategy of this toolkit takes on this machine
# -------------------------------------------------------------------------------------------------------------------

DEEPSPEED = "finetune_pp_peft_trainer_deepspeed.py --deepspeed ds_configs/"
CHECKPOINTING = " --gradient_checkpointing True"
# Name, script and flags, whether it is one process, and what is sharded.
STRATEGIES = [
    ("pp", "finetune_pp.py", True, "none"),
    ("pp, checkpointing", "finetune_pp.py" + CHECKPOINTING, True, "none"),
    ("pp, LoRA", "finetune_pp_peft.py", True, "none"),
    ("1F1B", "finetune_pp_1f1b.py", False, "layers"),
    ("1F1B, LoRA", "finetune_pp_1f1b.py --lora_used True", False, "layers"),
    ("FSDP", "finetune_pp_peft_trainer.py", False, "weights, gradients, optimizer"),
    ("FSDP, checkpointing", "finetune_pp_peft_trainer.py" + CHECKPOINTING, False, "weights, gradients, optimizer"),
    ("FSDP, LoRA", "finetune_pp_peft_trainer_lora.py", False, "weights, gradients, optimizer"),
    ("ZeRO-2", DEEPSPEED + "zero2.json", False, "gradients, optimizer"),
    ("ZeRO-3", DEEPSPEED + "zero3.json", False, "weights, gradients, optimizer"),
    ("ZeRO-3, LoRA", DEEPSPEED + "zero3.json --lora_used True", False, "weights, gradients, optimizer"),
]
# Only where there is a GPU to offload from.
STRATEGIES_ON_GPUS = [
    ("ZeRO-2, offload", DEEPSPEED + "zero2_offload.json", False, "gradients, optimizer"),
    ("ZeRO-3, offload", DEEPSPEED + "zero3_offload.json", False, "weights, gradients, optimizer"),
]
COLUMNS = ["model", "strategy", "hours per epoch", "sequence length", "devices", "MFU", "HFU", "micro-batch"]
COLUMNS += ["accumulation", "tokens/s", "tokens/s/device", "precision", "sharded", "checkpointing", "offload"]
COLUMNS += ["peak memory of each process, MB"]
QUOTED = """
Quoted, not measured here:

| model | strategy | devices | tokens/s/device | MFU | hours for 2.5e9 tokens | source |
|---|---|---|---|---|---|---|
| LLaMA 7B | FSDP, 384 rows of 512 tokens a step | 8 A100-80G | about 2,400 | about 32 % | 35 | the table of the guide that this toolkit continues |
| MPT 7B | FSDP, 512 tokens | A100-80G | 4,099 | 53.5 % | | MosaicML, llm-foundry, scripts/train/benchmarking |
| LLaMA 2 7B | FSDP, 4,096 tokens | 128 A100-80G | 3,700 | 57 % | | IBM and Meta, "Maximizing training throughput using PyTorch FSDP" |
"""  # noqa: E501 - Markdown's rows cannot be broken


def strategies_here() -> list[tuple]:
    return STRATEGIES + STRATEGIES_ON_GPUS * (torch.cuda.device_count() > 0)


def measured_flops(threads: int, bf16: bool) -> float:
    """FLOPs a second of one device at its best: products of 1024 x 1024 on CPU cores, 8192 x 8192 on a GPU."""
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(threads)
    size, repeats = 8192 if on_gpu else 1024, 20
    a = torch.rand(size, size, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if bf16 else torch.float32)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = []
    for _ in range(10):  # the clock and what else the machine does vary; the first one also warms up
        started = time.perf_counter()
        for _ in range(repeats):
            a @ a
        wait()
        seconds.append(time.perf_counter() - started)
    del a
    torch.cuda.empty_cache()  # the strategies need the memory
    return repeats * 2 * size**3 / min(seconds)


def run_strategy(args: Arguments, script: str, processes: int, threads: int, bf16: bool, folder: Path) -> dict:
    """Trains --steps steps on folder/set; returns tokens/s, micro-batch, accumulation and each process's memory.

    Raises:
        ValueError: the script failed.
    """
    others = torch.cuda.device_count() or 2  # processes of the strategies that split the rows among them
    micro_batch, accumulation = args.batch_size, others if processes == 1 else 1
    if script.startswith("finetune_pp_1f1b.py"):  # each process sees all rows, in small micro-batches
        micro_batch = max(1, args.batch_size // 4)
        accumulation = others * args.batch_size // micro_batch
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [*script.split(), "--model_path", args.model_path, "--dataset_path", str(folder / "set"), "--output_dir"]
    output = folder / "run"
    command += [str(output), "--max_steps", str(args.steps), "--per_device_train_batch_size", str(micro_batch)]
    command += ["--gradient_accumulation_steps", str(accumulation), "--num_train_epochs", "1"]
    if not script.startswith("finetune_pp.py") and not script.startswith("finetune_pp_peft_trainer.py"):
        command += ["--lora_dropout", str(args.lora_dropout)]
    command += ["--bf16", str(bf16), "--use_cpu", str(not torch.cuda.is_available())]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
    )
    if finished.returncode != 0:
        raise ValueError(f"{script} failed with status {finished.returncode}:\n{finished.stderr[-4000:]}")
    events = EventAccumulator(str(output / "runs")).Reload().Scalars("train/num_input_tokens_seen")
    receipt = json.loads((output / "run.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    seconds = events[-1].wall_time - events[0].wall_time
    return {"tokens_per_second": (events[-1].value - events[0].value) / seconds, "micro_batch": micro_batch,
            "accumulation": accumulation, "memory": receipt["peak_memory_bytes"]}  # fmt: skip


def count_weights(args: Arguments) -> tuple[int, int, int]:
    """Weights that a token is multiplied with, those of the output layer among them, and those of the adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model_path))
        num_weights = sum(p.numel() for p in model.parameters())
        num_head = model.get_output_embeddings().weight.numel()
        if not model.config.tie_word_embeddings:
            num_weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
        lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return num_weights, num_head, sum(p.numel() for p in lora.parameters() if p.requires_grad)


def make_row(args: Arguments, strategy: tuple, folder: Path, weights: tuple[int, int, int]) -> list[str]:
    """Measures one strategy; the cells of its row, in the order of COLUMNS.

    Raises:
        ValueError: the script failed.
    """
    name, script, is_one_process, sharded = strategy
    num_gpus, is_lora, is_checkpointed = torch.cuda.device_count(), "LoRA" in name, "checkpointing" in name
    processes = 1 if is_one_process else num_gpus or 2
    threads = max(1, args.threads // processes)
    bf16 = use_bf16("auto", num_gpus == 0)
    peak = args.peak_flops or measured_flops(threads, bf16)
    measured = run_strategy(args, script, processes, threads, bf16, folder)
    devices = (num_gpus or 1) if is_one_process else processes
    num_weights, num_head, num_adapter = weights
    each = 4 if is_lora else 6
    per_token = each * num_weights + 6 * num_adapter * is_lora
    ledger = json.loads((folder / "set" / "ledger.json").read_text(encoding="utf-8"))
    executed = per_token - each * num_head * (1 - ledger["targets"] / ledger["tokens"]["kept"])
    executed += 2 * (num_weights - num_head) * is_checkpointed
    speed = measured["tokens_per_second"]
    return [
        Path(args.model_path).name,
        name,
        f"{args.tokens / speed / 3600:,.0f}",
        f"up to {args.max_length}",
        str(devices),
        f"{speed * per_token / devices / peak:.0%}",
        f"{speed * executed / devices / peak:.0%}",
        str(measured["micro_batch"]),
        str(measured["accumulation"]),
        f"{speed:,.0f}",
        f"{speed / devices:,.0f}",
        "bf16" if bf16 else "float32",
        sharded,
        "yes" if is_checkpointed else "no",
        "yes" if "offload" in name else "no",
        ", ".join(f"{peak / 1e6:,.0f}" for peak in measured["memory"]),
    ]


def make_table(args: Arguments, folder: Path) -> None:
    """Runs every strategy and writes the Markdown table, anew after each row, so that nothing measured is lost."""
    tokenize(args, Path(args.model_path), folder / "set", packing=False)
    weights, num_gpus = count_weights(args), torch.cuda.device_count()
    machine = f"{num_gpus} x {torch.cuda.get_device_name()}" if num_gpus else f"{args.threads} CPU cores"
    peak = f"{args.peak_flops:g} FLOPs a second of a device" if args.peak_flops else "measured before each run"
    words = [Path(word).name if word == args.data else word for word in sys.argv]  # no folders of this machine
    head = (
        f"# What each strategy costs\n\n`python {shlex.join(words)}` wrote this.\nMachine: {machine}, the peak "
        f"{peak}; torch {torch.__version__}. Each strategy was run once, {args.steps} steps of\n"
        f"{(num_gpus or 2) * args.batch_size} rows, the first left out; padding-free, so all tokens are real ones. An "
        f"epoch has {args.tokens:g} tokens.\n\n"
        f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    )
    rows, failed = [], []
    for strategy in strategies_here():
        print(strategy[0], file=sys.stderr, flush=True)
        try:
            cells = make_row(args, strategy, folder, weights)
        except ValueError as problem:
            print(f"error: {problem}", file=sys.stderr, flush=True)
            failed.append(strategy[0])
            cells = [Path(args.model_path).name, strategy[0], "failed", *[""] * (len(COLUMNS) - 3)]
        rows.append(f"| {' | '.join(cells)} |\n")
        Path(args.table).write_text(head + "".join(rows) + QUOTED, encoding="utf-8")
    print(Path(args.table).read_text(encoding="utf-8"))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
        systems = check_arguments(args)
        task = f"{args.mode}, {args.rounds} rounds of {', '.join(systems)}"
        if args.table:
            task = f"once each: {'; '.join(name for name, *_ in strategies_here())}"
        size = f"{args.steps} steps of {args.batch_size} rows of at most {args.max_length} tokens"
        print(f"{size}, {args.threads} threads, {platform.machine()}; {task}")
        if args.dry_run:
            return
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            disable_progress_bar()
            if args.table:
                return make_table(args, folder)
            # LitGPT decides by the folder's name whether a text begins with BOS.
            model = copy_model(Path(args.model_path), folder / Path(args.model_path).resolve().name)
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
                print_table(summarize(results))  # after each round: an interrupted benchmark has told something
                print_differences(results)
                if args.json:
                    report = {"arguments": asdict(args), "tokenize_seconds": seconds, "rounds": results}
                    Path(args.json).write_text(json.dumps(report | {"summary": summarize(results)}, indent=2))
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}")
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
