"""How much of each corpus training on random passages sees: the share of its tokens after each epoch.

    python tools/passage_coverage.py --dataset_path data_sample/tokenized/papers --num_train_epochs 3
    python tools/passage_coverage.py --dataset_path medical:3,general:1 --num_train_epochs 10 --passage_length 512

Draws the very passages that a training script with the same --seed would draw, and prints beside their share what is
to be expected: a token that c of a document's n starts cover is seen after k draws with probability 1 - (1 - c/n)^k.
Tokens near both ends of a document are covered by fewer starts, so the last tenth of a corpus takes many epochs.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import RowSampler, TokenizedDataset


@dataclass
class Arguments:
    dataset_path: str = field(metadata={"help": "folder with whole documents (--format text), or name:weight,..."})
    num_train_epochs: int = field(default=3, metadata={"help": "epochs to draw"})
    passage_length: int = field(default=512, metadata={"help": "tokens of a passage"})
    seed: int = field(default=42, metadata={"help": "of the training run"})


def count_seen(starts: list[int], taken: int) -> int:
    """Tokens in the union of the passages [start, start + taken)."""
    starts = np.unique(starts)
    return int(np.minimum(np.diff(starts), taken).sum()) + taken


def expect_seen(length: int, taken: int, num_draws: int) -> float:
    """The expected number of a document's tokens that `num_draws` uniform passages of `taken` tokens cover."""
    token, num_starts = np.arange(length), length - taken + 1
    covering = np.minimum(token, num_starts - 1) - np.maximum(0, token - taken + 1) + 1
    return float((1 - (1 - covering / num_starts) ** num_draws).sum())


def coverage(dataset: TokenizedDataset, num_epochs: int, seed: int) -> list[list[tuple[float, float]]]:
    """For each epoch and folder: the share of its tokens that was seen so far, and the expected one."""
    sampler = RowSampler(dataset, rows_per_step=1, seed=seed)
    lengths = [pc.list_value_length(folder.columns["input_ids"]) for folder in dataset.folders]
    num_tokens = np.array([pc.sum(numbers).as_py() for numbers in lengths])
    starts: dict[int, list[int]] = {}
    seen_by_epoch = []
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for draw in sampler:
            starts.setdefault(draw % len(dataset), []).append(dataset.locate(draw)[2].start or 0)
        seen, documents = np.zeros(len(dataset.folders)), Counter()
        for index, drawn in starts.items():
            folder, row, _ = dataset.locate(index)
            number = dataset.folders.index(folder)
            length = len(folder.columns["input_ids"][row])
            taken = length if folder.has_labels else min(length, dataset.passage_length)
            seen[number] += count_seen(drawn, taken)
            documents[number, length, taken, len(drawn)] += 1
        expected = np.zeros(len(dataset.folders))
        for (number, length, taken, num_draws), count in documents.items():
            expected[number] += count * expect_seen(length, taken, num_draws)
        seen_by_epoch.append(list(zip(seen / num_tokens, expected / num_tokens, strict=True)))
    return seen_by_epoch


def main() -> None:
    (args,) = HfArgumentParser(Arguments, usage="%(prog)s --dataset_path FOLDER").parse_args_into_dataclasses()
    try:
        if min(args.num_train_epochs, args.passage_length) < 1:
            raise ValueError("--num_train_epochs and --passage_length must be at least 1")
        dataset = TokenizedDataset(args.dataset_path, passage_length=args.passage_length, seed=args.seed)
        seen_by_epoch = coverage(dataset, args.num_train_epochs, args.seed)
    except (ValueError, OSError) as problem:
        sys.exit(f"error: --dataset_path {args.dataset_path}: {problem}")
    names = list(dataset.ledger.get("mix", [args.dataset_path]))
    print(f"passages of {args.passage_length} tokens, share of the tokens seen (expected)")
    for epoch, shares in enumerate(seen_by_epoch, 1):
        columns = [f"{name} {seen:.2%} ({expected:.2%})" for name, (seen, expected) in zip(names, shares, strict=True)]
        print(f"after epoch {epoch}: {', '.join(columns)}")


if __name__ == "__main__":
    main()
