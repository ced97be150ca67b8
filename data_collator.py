"""The one module that every script shares: reading a tokenized set, the order of its rows, and collation.

It is shared because a mistake here would be wrong in every strategy at once. Three words, never mixed:
  padded        rows of a batch padded to the longest one; padding has no target and nothing attends to it
  padding-free  the collator joins the rows of a batch into one long row, so no position is wasted on padding
  packed        tokenize_dataset.py --packing True joined whole documents into rows beforehand

A token attends to its own document only. transformers builds that block mask from `position_ids` that restart at 0,
but only when no `attention_mask` and no cache are passed: always call the model with `use_cache=False`.

What must be the same in every strategy's output folder stands here, too: what makes a checkpoint whole, whether it
belongs to the same order of rows, and the receipt of a run.
"""

import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

IGNORE_INDEX = -100  # a label that contributes no loss, as in torch.nn.functional.cross_entropy
# What a resumed run must share with the interrupted one besides the order of rows, or it would be another run.
SETTINGS = ("model_path", "peft_mode", "peft_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
SETTINGS += ("num_virtual_tokens", "mapping_hidden_dim", "learning_rate", "lr_scheduler_type", "warmup_steps")
SETTINGS += ("weight_decay", "max_grad_norm")
FILLER = -1  # the index of a row without target, which completes the last optimizer step of an epoch


class TokenizedDataset(Dataset):
    """Rows that data_sample/tokenize_dataset.py wrote: `input_ids`, `labels` and, if packed, `position_ids`.

    The Arrow files are memory-mapped, so opening a set of any size takes no memory.

    Args:
        path: the folder; `ledger.json`, written last, shows that it is complete.
        config: if given, the model's configuration; a token id at or above its vocab_size is an error.
        tokenizer: if given, ids that were made with another vocabulary are an error.

    Raises:
        FileNotFoundError: the folder or its ledger is missing.
        ValueError: a column is missing, there is no row, or an id lies outside the vocabulary.
    """

    def __init__(self, path: str | Path, config=None, tokenizer=None):
        from datasets import load_from_disk  # one second, not paid by those who want only the collator

        if not Path(path).is_dir():
            raise FileNotFoundError("no such folder; make it with python data_sample/tokenize_dataset.py")
        if not (Path(path) / "ledger.json").is_file():
            raise FileNotFoundError(
                "no ledger.json in it: not a tokenized set, or one that was not finished; "
                "make it with python data_sample/tokenize_dataset.py"
            )
        self.path = Path(path)
        self.ledger = json.loads((self.path / "ledger.json").read_text(encoding="utf-8"))
        # load_from_disk fails on a set that was saved without rows.
        self.table = load_from_disk(str(path)) if any(self.path.glob("*.arrow")) else []
        if len(self.table) == 0:
            raise ValueError("it has no rows; its ledger.json says why each input row was dropped")
        missing = [name for name in ("input_ids", "labels") if name not in self.table.column_names]
        if missing:
            raise ValueError(
                f"no column {' and '.join(missing)} (columns: {', '.join(self.table.column_names)}); "
                "make it with python data_sample/tokenize_dataset.py"
            )
        if self.ledger.get("targets") == 0:
            raise ValueError("no token in it is a target, so there is nothing to learn; tokenize rows with an answer")
        self.packed = "position_ids" in self.table.column_names
        columns = ["input_ids", "labels"] + ["position_ids"] * self.packed
        self.table = self.table.select_columns(columns).with_format("numpy")
        if config:
            self._check_ids(config.vocab_size)
        if tokenizer and self.ledger.get("vocabulary_sha256", vocabulary_hash(tokenizer)) != vocabulary_hash(tokenizer):
            raise ValueError("it was made with another tokenizer; tokenize again with --tokenizer_path MODEL")

    def _check_ids(self, vocab_size: int) -> None:
        import pyarrow.compute as pc

        for name, least in (("input_ids", 0), ("labels", IGNORE_INDEX)):
            for chunk in self.table.data.column(name).chunks:
                found = pc.min_max(chunk.flatten()).as_py()
                if found["max"] is not None and (found["max"] >= vocab_size or found["min"] < least):
                    raise ValueError(f"{name} from {found['min']} to {found['max']} do not fit the model's vocabulary "
                                     f"of {vocab_size}; tokenize again with --tokenizer_path MODEL")  # fmt: skip

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row of length T: int64 `input_ids` [T], `labels` [T] and, if packed, `position_ids` [T]."""
        if index == FILLER:
            row = {"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.full((1,), IGNORE_INDEX)}
            return row | ({"position_ids": torch.zeros(1, dtype=torch.int64)} if self.packed else {})
        return {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in self.table[int(index)].items()}


class RowSampler(Sampler):
    """The order of rows in an epoch: a permutation given by (seed, epoch) alone, the same for every strategy.

    Consecutive runs of `rows_per_step` indices form one optimizer step, whatever the number of processes and the
    split into micro-batches. The last run of an epoch is completed with FILLER, never with rows repeated: a repeated
    row would weigh twice, and dropping the rest would lose data.

    Args:
        dataset: the rows.
        rows_per_step: rows in one optimizer step = processes x batch size x accumulation steps.
        seed: seed of the whole run.
    """

    def __init__(self, dataset: TokenizedDataset, rows_per_step: int, seed: int):
        self.dataset, self.rows_per_step, self.seed, self.epoch = dataset, rows_per_step, seed, 0
        self.steps_per_epoch = math.ceil(len(dataset) / rows_per_step)
        self.settings: dict = {}  # a script puts its arguments here, so that no resumed run goes on with others

    @property
    def identity(self) -> dict:
        """All that decides which rows an optimizer step sees, and the settings that a resumed run must share."""
        rows = {"dataset_sha256": self.dataset.ledger.get("sha256"), "num_rows": len(self.dataset)}
        rows |= {"rows_per_step": self.rows_per_step, "seed": self.seed}
        return rows | {name: value for name, value in self.settings.items() if name in SETTINGS}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.rows_per_step

    def __iter__(self):
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset)).tolist()
        yield from [FILLER] * (len(self) - len(self.dataset))

    def steps(self, collate: "DataCollator", batch_size: int, global_step: int = 0):
        """Yields without end, from optimizer step `global_step` on, the micro-batches of a step and its token count.

        For a loop in one process, which can leave out fillers: the last step of an epoch may have fewer micro-batches.
        """
        while True:
            epoch, step = divmod(global_step, self.steps_per_epoch)
            self.set_epoch(epoch)
            order = [index for index in self if index != FILLER]
            for start in range(step * self.rows_per_step, len(order), self.rows_per_step):
                rows = [self.dataset[index] for index in order[start : start + self.rows_per_step]]
                batches = [collate(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
                yield batches, sum(len(row["input_ids"]) for row in rows)
                global_step += 1


class DataCollator:
    """Makes one batch of rows. Masks come from lengths, never from token ids (the pad token is often also EOS).

    padded: `input_ids`, `labels`, `attention_mask` [rows, longest]; packed rows get `position_ids` instead of the
    mask, and their padding is a document of its own, because a 2-D mask would let documents attend to each other.

    padding-free: `input_ids`, `labels`, `position_ids` [1, tokens], and what saves work in the model's last layer,
    which multiplies every position with the whole vocabulary: `logits_to_keep` [targets], the positions that have a
    target, and `shift_labels` [1, targets], those targets. transformers' forward and loss understand both.

    The first token of a document is never a target: the position before it belongs to another document.
    """

    def __init__(self, padding_free: bool):
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in rows[0]
        input_ids = [row["input_ids"] for row in rows]
        positions = [row["position_ids"] if packed else torch.arange(len(row["input_ids"])) for row in rows]
        labels = [
            row["labels"].masked_fill(position == 0, IGNORE_INDEX)
            for row, position in zip(rows, positions, strict=True)
        ]
        if self.padding_free:
            labels = torch.cat(labels)
            positions_with_target = torch.nonzero(labels != IGNORE_INDEX).flatten()
            return {
                "input_ids": torch.cat(input_ids)[None],
                "labels": labels[None],
                "position_ids": torch.cat(positions)[None],
                "logits_to_keep": positions_with_target - 1,  # the logits at position p predict the token at p + 1
                "shift_labels": labels[positions_with_target][None],
            }
        longest = max(len(ids) for ids in input_ids)
        batch = {"input_ids": pad(input_ids, longest, 0), "labels": pad(labels, longest, IGNORE_INDEX)}
        if packed:
            batch["position_ids"] = torch.stack(
                [torch.cat([position, torch.arange(longest - len(position))]) for position in positions]
            )
        else:
            batch["attention_mask"] = pad([torch.ones_like(ids) for ids in input_ids], longest, 0)
        return batch


def pad(sequences: list[torch.Tensor], length: int, value: int) -> torch.Tensor:
    """Right-pads 1-D tensors to `length` and stacks them: [len(sequences), length]."""
    return torch.stack([torch.nn.functional.pad(ids, (0, length - len(ids)), value=value) for ids in sequences])


def batches(dataset: TokenizedDataset, collate: DataCollator, batch_size: int):
    """All rows in their order, for evaluation."""
    for start in range(0, len(dataset), batch_size):
        yield collate([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    """Target tokens of a batch: what its summed loss is to be divided by."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@torch.no_grad()
def check_document_attention(model: torch.nn.Module, vocab_size: int) -> None:
    """Runs two joined documents through `model` and changes the first: the second's logits may not move at all.

    A backend that ignores `position_ids` trains on leaked text without any other sign; this costs two forwards of
    eight tokens.

    Raises:
        ValueError: the model's attention crosses the border between two documents.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    logits = []
    for shift in (0, 1):
        input_ids = torch.arange(8, device=device)[None] % vocab_size
        input_ids[:, :4] = (input_ids[:, :4] + shift) % vocab_size
        logits.append(model(input_ids=input_ids, position_ids=positions, use_cache=False).logits)
    model.train(was_training)
    if torch.equal(logits[0][:, :4], logits[1][:, :4]) or not torch.equal(logits[0][:, 4:], logits[1][:, 4:]):
        raise ValueError(
            "the attention of this model crosses documents in one row; choose another "
            "--attn_implementation, or --padding_free False with a set that is not packed"
        )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<step>, complete or not, newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoint(folder: Path, sampler: RowSampler, save_total_limit: int) -> None:
    """Writes complete.json, which makes a checkpoint valid, and deletes the oldest complete ones beyond the limit."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    os.sync()  # a power cut must not leave complete.json beside files that never reached the disk
    complete = {"identity": sampler.identity, "files": files}
    (folder / "complete.tmp").write_text(json.dumps(complete, indent=2))
    os.replace(folder / "complete.tmp", folder / "complete.json")
    whole = [path for path in list_checkpoints(folder.parent) if (path / "complete.json").is_file()]
    for outdated in whole[save_total_limit:]:
        (outdated / "complete.json").unlink()  # first: a half-deleted checkpoint is not complete
        shutil.rmtree(outdated)


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was when complete.json was written."""
    if not (folder / "complete.json").is_file():
        return "it has no complete.json, so it was never finished"
    try:
        complete = json.loads((folder / "complete.json").read_text())
        hashes = {name: file["sha256"] for name, file in complete["files"].items()}
        assert complete["identity"]["num_rows"] > 0
    except (ValueError, TypeError, KeyError, AssertionError):
        return "its complete.json is damaged"
    damaged = [name for name in hashes if not (folder / name).is_file() or sha256(folder / name) != hashes[name]]
    return f"missing or damaged: {', '.join(damaged)}" if damaged else None


def find_checkpoint(choice: str, output_dir: str, sampler: RowSampler) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Args:
        choice: `True` for the newest complete one in `output_dir`, `False` for none, or a folder.

    Raises:
        ValueError: the folder is not complete, its run had other rows or settings, or output_dir holds a newer one.
    """
    for folder in {"False": [], "True": list_checkpoints(output_dir)}.get(choice, [Path(choice)]):
        damage = find_damage(folder)
        if damage is None:
            before = json.loads((folder / "complete.json").read_text())["identity"]
            if changed := {name: value for name, value in before.items() if value != sampler.identity.get(name)}:
                raise ValueError(f"{folder} belongs to a run with {changed}; resume with the same")
            newest = [path for path in list_checkpoints(output_dir) if (path / "complete.json").is_file()][:1]
            if choice != "True" and newest and newest[0].resolve() != folder.resolve():
                raise ValueError(f"the run would mix with {newest[0]}; choose another --output_dir")
            print(f"resuming from {folder}")
            return folder
        if choice != "True":
            raise ValueError(f"{damage}; name a complete checkpoint, or True for the newest in --output_dir")
        print(f"ignoring {folder}: {damage}")
    if choice == "True":
        print(f"no complete checkpoint in {output_dir}: starting from the beginning")
    return None


def set_former_run_aside(output_dir: Path, checkpoint: Path | None = None) -> None:
    """Renames a folder that holds a run, unless that run is resumed from `checkpoint`: a new run would overwrite it."""
    if checkpoint is not None:
        (output_dir / "run.json").unlink(missing_ok=True)  # it is written again when the resumed run has finished
        return
    if list_checkpoints(output_dir) or (output_dir / "run.json").is_file():
        former = output_dir.rename(f"{output_dir}.{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{output_dir} held a former run, which is now {former}")


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPUs, or in host memory without one."""
    on_gpus = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    return sum(on_gpus) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_receipt(output_dir: str | Path, arguments: dict, sampler: RowSampler, facts: dict) -> None:
    """Writes run.json, the last file of a run: what was run, on what, with which versions and data, and `facts`."""
    command = [shutil.which("git") or "false", "rev-parse", "--verify", "HEAD"]  # a slim image may lack git
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    receipt = {
        "command": sys.argv,
        "arguments": arguments,
        "versions": {name: version(name) for name in packages},
        "git_commit": git or None,
        "dataset": sampler.dataset.ledger,
        "identity": sampler.identity,
        "world_size": 1,
        "peak_memory_bytes": [peak_memory()],
        **facts,
    }
    (Path(output_dir) / "run.tmp").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(Path(output_dir) / "run.tmp", Path(output_dir) / "run.json")
    print(f"saved {output_dir}")
