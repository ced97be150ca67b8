"""The pipeline over processes: it trains what one process trains, for any number of stages, and all ranks end together.

Runs are started as in test_trainers.py: forked from a process that has imported the scripts, or by torchrun.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import random_rows, save_rows, save_tiny_model
from test_equivalence import ASSERTED, MODES, deviations, pack, weights_before
from test_trainers import STRATEGIES, Runs

STRATEGIES["1F1B"] = ("finetune_pp_1f1b", [])
STRATEGIES["1F1B+LoRA"] = ("finetune_pp_1f1b", ["--lora_used", "True"])
# Eight rows a step in four micro-batches, over an epoch end with a short window; every step has another length.
RUN = ["--num_train_epochs", 2, "--weight_decay", 0.1, "--eval_dataset_path", "{eval}", "--eval_steps", 2]
MICRO = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--per_device_eval_batch_size", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("pipeline"))
    for name, seed, count in (("rows", 5, 44), ("eval", 4, 14)):
        packed = pack(random_rows(count, seed=seed, longest=14))
        runs.parts[f"packed {name}"] = save_rows(packed, runs.folder / f"packed-{name}")
    for tied in (False, True):
        runs.parts[f"deep tied={tied}"] = save_tiny_model(runs.folder / f"deep-{tied}", tied=tied, num_layers=5)
    return runs


def data_flags(rows: str, tied: bool) -> list[str]:
    prefix = "packed " if rows == "packed" else ""
    flags = ["--model_path", f"{{deep tied={tied}}}", "--dataset_path", f"{{{prefix}rows}}"]
    return [*flags, "--eval_dataset_path", f"{{{prefix}eval}}", "--padding_free", rows == "padding-free"]


def reference(runs: Runs, lora: bool, rows: str, tied: bool) -> Path:
    """What one process trains: a run of the plain loop, made once."""
    key = ("reference", lora, rows == "packed", tied)
    if key not in runs.made:
        runs.made[key] = runs.folder / "-".join(map(str, key))
        flags = [*RUN, *data_flags(rows, tied), *(MODES["lora"] if lora else []), "--per_device_train_batch_size", 8]
        runs.train("plain PEFT" if lora else "plain", 1, runs.made[key], *flags)
    return runs.made[key]


def start_of(runs: Runs, lora: bool, rows: str, tied: bool) -> dict[str, torch.Tensor]:
    flags = runs.flags("plain PEFT" if lora else "plain", runs.folder / "none", *data_flags(rows, tied))
    return weights_before("lora" if lora else "full", [flags[0], runs.parts[f"deep tied={tied}"], *flags[2:]])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CELLS = [
    slow(num_ranks, lora, rows, tied)
    for num_ranks, lora, rows, tied in itertools.product(
        (1, 2, 3, 4), (False, True), ("padded", "padding-free", "packed"), (False, True)
    )
]


@pytest.mark.parametrize(
    ("num_ranks", "lora", "rows", "tied"), [(2, False, "padding-free", True), (2, True, "packed", False), *CELLS]
)
def test_any_number_of_stages_trains_what_one_process_trains(num_ranks, lora, rows, tied, runs, tmp_path):
    out, strategy = tmp_path / "run", "1F1B+LoRA" if lora else "1F1B"
    run = runs.train(strategy, num_ranks, out, *RUN, *MICRO, *data_flags(rows, tied), *(MODES["lora"] if lora else []))
    assert "Traceback" not in run.output
    receipt = json.loads((out / "run.json").read_text())
    assert receipt["world_size"] == num_ranks == len(receipt["peak_memory_bytes"])
    largest = deviations(out, reference(runs, lora, rows, tied), start_of(runs, lora, rows, tied))
    print(f"{num_ranks} stages, {'LoRA' if lora else 'full'}, {rows}, tied {tied}: {largest}")
    assert {name: value for name, value in largest.items() if not value <= ASSERTED[name]} == {}
