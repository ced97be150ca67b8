"""Small random preference sets, in the columns that tokenize_dataset.py --format preference writes."""

import json
from pathlib import Path

import torch
from datasets import Dataset, Features, Sequence, Value

IGNORE_INDEX = -100


def random_ids(generator: torch.Generator, shortest: int, longest: int) -> list[int]:
    length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def random_pairs(num_rows: int, seed: int = 0, longest: int = 12) -> list[dict]:
    """Prompts and answers of unequal length; the last token of every third chosen answer carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        chosen = random_ids(generator, 2, longest)
        rejected = random_ids(generator, 2, longest)
        chosen_labels = list(chosen)
        if number % 3 == 0:
            chosen_labels[-1] = IGNORE_INDEX
        rows.append(
            {
                "prompt_ids": random_ids(generator, 1, longest),
                "chosen_ids": chosen,
                "chosen_labels": chosen_labels,
                "rejected_ids": rejected,
                "rejected_labels": list(rejected),
            }
        )
    return rows


def random_answers(num_rows: int, seed: int = 0, longest: int = 12) -> list[dict]:
    """Unpaired rows: three of five answers are desirable."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        answer = random_ids(generator, 2, longest)
        prompt = random_ids(generator, 1, longest)
        label = number % 5 < 3
        rows.append({"prompt_ids": prompt, "completion_ids": answer, "completion_labels": list(answer), "label": label})
    return rows


def save_preferences(rows: list[dict], folder: Path, ledger: dict | None = None) -> Path:
    """Writes a `datasets` folder with a ledger."""
    features = {}
    for name in rows[0]:
        features[name] = Sequence(Value("int32"))
        if name == "label":
            features[name] = Value("bool")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(folder)
    if ledger is None:
        ledger = {"format": "preference", "sha256": str(hash(str(rows)))}
    (folder / "ledger.json").write_text(json.dumps(ledger))
    return folder
