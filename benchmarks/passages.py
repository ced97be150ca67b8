"""What reading the data costs training: drawing passages, opening a large set, and the share of a training step.

    python benchmarks/passages.py                    # generates its sets in a temporary folder and deletes them

Prints the tokens a second that one core draws and collates, the time from a set's path to the rows of the first
optimizer step for 5 million rows, and, in one run of the plain loop's own calls on the sample model, the time that
reading took against the whole step. An 8xA100 node that trains a 7B model takes about 33 thousand tokens a second.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import DataCollator, TokenizedDataset, TrainingRows

SAMPLE_MODEL = "models/SmolLM2-135M-Instruct"


def save_documents(folder: Path, lengths: np.ndarray) -> Path:
    """A set of whole documents with these numbers of tokens, of the sample model's vocabulary."""
    vocab_size = AutoConfig.from_pretrained(SAMPLE_MODEL).vocab_size
    ids = pa.array(np.random.default_rng(0).integers(0, vocab_size, lengths.sum(), np.int32))
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)})
    Dataset(table).save_to_disk(folder)
    (folder / "ledger.json").write_text(json.dumps({"sha256": "generated"}))
    return folder


def open_rows(folder: Path, rows_per_step: int, num_steps: int) -> TrainingRows:
    dataset = TokenizedDataset(folder, passage_length=512)
    return TrainingRows(dataset, rows_per_step, num_train_epochs=1, max_steps=num_steps, seed=42)


def measure_drawing(folder: Path, num_steps: int = 200) -> None:
    papers = save_documents(folder / "papers", np.random.default_rng(1).integers(2000, 12000, 5000))
    rows = open_rows(papers, 8, num_steps)
    for name, padding_free in (("padding-free", True), ("padded", False)):
        collate = DataCollator(padding_free)
        num_tokens = 0
        started = time.perf_counter()
        for step in range(num_steps):
            num_tokens += collate(rows.step(step))["input_ids"].numel()
        rate = num_tokens / (time.perf_counter() - started)
        print(f"drawing and collating, {name}: {rate / 1e6:.1f} million tokens/s")


def measure_start(folder: Path, num_rows: int = 5_000_000) -> None:
    documents = save_documents(folder / "rows", np.full(num_rows, 40))
    started = time.perf_counter()
    rows = open_rows(documents, 384, 1)
    opened = time.perf_counter()
    DataCollator(padding_free=True)(rows.step(0))
    drawn = time.perf_counter()
    print(f"{num_rows:,} rows: opened in {opened - started:.2f} s, first step's rows {drawn - opened:.2f} s")


def measure_share(folder: Path, num_steps: int = 5) -> None:
    model = AutoModelForCausalLM.from_pretrained(SAMPLE_MODEL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = open_rows(folder / "papers", 4, num_steps)
    collate = DataCollator(padding_free=True)
    reading = 0.0
    started = time.perf_counter()
    for step in range(num_steps):
        step_started = time.perf_counter()
        batch = collate(rows.step(step))
        reading += time.perf_counter() - step_started
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    share = reading / (time.perf_counter() - started)
    print(f"reading: {share:.3%} of {num_steps} training steps of the sample model")


def main() -> None:
    if not Path(SAMPLE_MODEL).is_dir():
        sys.exit(f"error: {SAMPLE_MODEL}: no such folder; bash scripts/quickstart.sh fetches the sample model")
    disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure_drawing(Path(folder))
        measure_start(Path(folder))
        measure_share(Path(folder))


if __name__ == "__main__":
    main()
