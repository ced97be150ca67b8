"""How much of each corpus training on random passages sees: the share of its tokens after each epoch.

    python tools/passage_coverage.py --dataset_path data_sample/tokenized/papers --num_train_epochs 3
    python tools/passage_coverage.py --dataset_path medical:3,general:1 --num_train_epochs 10 --passage_length 512

Draws the very passages that a training script with the same --seed would draw, and prints beside their share what is
to be expected: a token that c of a document's n starts cover is seen after k draws with probability 1 - (1 - c/n)^k.
Tokens near both ends of a document are covered by fewer starts, so the last tenth of a corpus takes many epochs.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import TokenizedDataset, TrainingRows
from tools.paths import expand_home


@dataclass
class Arguments:
    dataset_path: str = field(metadata={"help": "folder with whole documents (--format text), or name:weight,..."})
    num_train_epochs: int = field(default=3, metadata={"help": "epochs to draw"})
    passage_length: int = field(default=512, metadata={"help": "tokens of a passage"})
    seed: int = field(default=42, metadata={"help": "of the training run"})


def count_seen(starts: list[int], length: int) -> int:
    """Tokens in the union of the passages [start, start + length)."""
    starts = np.unique(starts)
    return int(np.minimum(np.diff(starts), length).sum()) + length


def expect_seen(document_length: int, length: int, num_draws: int) -> float:
    """The expected number of a document's tokens that `num_draws` uniform passages of `length` tokens cover."""
    token = np.arange(document_length)
    num_starts = document_length - length + 1
    num_covering = np.minimum(token, num_starts - 1) - np.maximum(0, token - length + 1) + 1
    return float((1 - (1 - num_covering / num_starts) ** num_draws).sum())


def draw_epoch(rows: TrainingRows, epoch: int, starts: dict[int, list[int]]) -> None:
    """Adds to `starts` where each passage of an epoch begins, by the number of its row in the dataset."""
    first = epoch * rows.rows_per_epoch
    for i in range(first, first + rows.rows_per_epoch):  # one row a step, so that no row completes an epoch
        index, num_pass = rows.locate(i)
        _, _, taken = rows.dataset.locate(index, num_pass)
        starts.setdefault(index, []).append(taken.start or 0)


def count_tokens(dataset: TokenizedDataset, starts: dict[int, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """For each folder: its tokens that these passages hold, and as many as are to be expected."""
    seen = np.zeros(len(dataset.folders))
    expected = np.zeros(len(dataset.folders))
    for index, drawn in starts.items():
        folder, row, _ = dataset.locate(index, 0)
        number = dataset.folders.index(folder)
        document_length = len(folder.columns["input_ids"][row])
        length = document_length
        if not folder.has_labels:
            length = min(document_length, dataset.passage_length)
        seen[number] += count_seen(drawn, length)
        expected[number] += expect_seen(document_length, length, len(drawn))
    return seen, expected


def coverage(dataset: TokenizedDataset, num_epochs: int, seed: int) -> list[list[tuple[float, float]]]:
    """For each epoch and folder: the share of its tokens that was seen so far, and the expected one."""
    rows = TrainingRows(dataset, rows_per_step=1, num_train_epochs=num_epochs, max_steps=-1, seed=seed)
    num_tokens = []
    for folder in dataset.folders:
        lengths = pc.list_value_length(folder.columns["input_ids"])
        num_tokens.append(pc.sum(lengths).as_py())
    starts = {}
    seen_by_epoch = []
    for epoch in range(num_epochs):
        draw_epoch(rows, epoch, starts)
        seen, expected = count_tokens(dataset, starts)
        seen_by_epoch.append(list(zip(seen / num_tokens, expected / num_tokens, strict=True)))
    return seen_by_epoch


def main() -> None:
    (args,) = HfArgumentParser(Arguments, usage="%(prog)s --dataset_path FOLDER").parse_args_into_dataclasses()
    args = expand_home(args)
    try:
        if min(args.num_train_epochs, args.passage_length) < 1:
            raise ValueError("--num_train_epochs and --passage_length must be at least 1")
        dataset = TokenizedDataset(args.dataset_path, passage_length=args.passage_length, seed=args.seed)
        seen_by_epoch = coverage(dataset, args.num_train_epochs, args.seed)
    except (ValueError, OSError) as problem:
        sys.exit(f"error: --dataset_path {args.dataset_path}: {problem}")
    names = list(dataset.ledger.get("mix", [args.dataset_path]))
    print(f"passages of {args.passage_length} tokens, share of the tokens seen (expected)")
    for epoch, shares in enumerate(seen_by_epoch, start=1):
        columns = []
        for name, (seen, expected) in zip(names, shares, strict=True):
            columns.append(f"{name} {seen:.2%} ({expected:.2%})")
        print(f"after epoch {epoch}: {', '.join(columns)}")


if __name__ == "__main__":
    main()
