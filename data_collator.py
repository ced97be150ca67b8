"""The one module that the training scripts share: what would be wrong in every strategy if it were wrong once.

It holds five things, in this order:
  1. the tokenized set: one folder, the parts of a set, several sets mixed by weight, or whole documents to draw
     passages from; rows to learn, or answers to prefer
  2. the rows in the order of training
  3. the collator, which makes a batch of rows
  4. attention inside documents
  5. the loss of the targets in chunks, and an output layer that computes it

Three words, never mixed:
  padded        rows of a batch padded to the longest one; padding has no target and nothing attends to it
  padding-free  the collator joins the rows of a batch into one long row, so no position is wasted on padding
  packed        tokenize_dataset.py --packing True joined whole documents into rows beforehand

A token attends to its own document only. Call the model with `use_cache=False`: with a cache, transformers would not
notice that a row holds several documents.
"""

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

IGNORE_INDEX = -100  # a label that contributes no loss, as in torch.nn.functional.cross_entropy
TARGETS_PER_CHUNK = 512  # their logits over 49,152 ids in float32 take 0.1 GB
LOGITS_PER_CHUNK_ON_GPU = 2**27  # 0.5 GB in float32: each chunk adds to the whole gradient of the output layer
# What a batch of preferences has for the model; the rest is for the loss.
MODEL_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "key_positions",
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------
# 1. The tokenized set
# -------------------------------------------------------------------------------------------------------------------


# What all parts of a set have in common: the input, and all that decides how a row becomes ids.
SAME_IN_ALL_PARTS = ("format", "input_sha256", "max_length", "on_long", "packing", "train_on_prompt", "val_size",
                     "seed", "template", "vocabulary_sha256", "tokenizer_fingerprint")  # fmt: skip
# Stands in for transformers' function, so that the text of a chat template does not depend on the day.
NO_DATE = "{% macro strftime_now(format) %}{{ format }}{% endmacro %}\n"


class TokenizedFolder:
    """One set that data_sample/tokenize_dataset.py wrote: rows with labels, or whole documents without.

    It is a folder, or all parts that `--shard` wrote, one behind the other. The Arrow files are memory-mapped, so
    opening a set of any size takes no memory. Arguments and errors are those of TokenizedDataset.
    """

    lowest_ids = {"input_ids": 0, "labels": IGNORE_INDEX}  # of the columns that hold ids of the vocabulary

    def __init__(self, path: str | Path, config=None, tokenizer=None):
        parts = find_parts(str(path))
        self.path = Path(parts[0])
        self.ledger = read_ledgers(parts)
        dataset = load_parts(parts)
        if dataset is None or len(dataset) == 0:
            raise ValueError("it has no rows; its ledger.json says why each input row was dropped")
        table = dataset.data
        self.num_rows = len(table)
        self.columns = self.choose_columns(table)
        self.has_labels = "input_ids" not in self.columns or "labels" in self.columns
        self.packed = "position_ids" in self.columns
        if self.has_labels and self.ledger.get("targets") == 0:
            raise ValueError("no token in it is a target, so there is nothing to learn; tokenize rows with an answer")
        self._check_vocabulary(config, tokenizer)

    def choose_columns(self, table) -> dict:
        """The columns that are read, by their names."""
        if "prompt_ids" in table.column_names:
            raise ValueError("it holds preferences, one answer against another; finetune_pp_dpo.py learns from them")
        if "input_ids" not in table.column_names:
            raise ValueError(f"no column input_ids (columns: {', '.join(table.column_names)}); make it with "
                             "python data_sample/tokenize_dataset.py")  # fmt: skip
        columns = {}
        for name in ("input_ids", "labels", "position_ids"):
            if name in table.column_names:
                columns[name] = table.column(name)
        return columns

    def check_context(self, config, passage_length: int) -> int:
        """The most tokens of a row that attend to each other; the model must have a position for each of them."""
        context = find_context(config)
        longest = pc.max(pc.list_value_length(self.columns["input_ids"])).as_py()
        remedy = f"tokenize again with --max_length {context}"
        if not self.has_labels:
            longest = min(longest, passage_length)
            remedy = f"draw passages with --passage_length {context}"
        elif self.packed and longest > context:  # a row of several documents, each of which begins at position 0
            longest = 1 + max(pc.max(chunk.flatten()).as_py() for chunk in self.columns["position_ids"].chunks)
        if longest > context:
            raise ValueError(f"a row has {longest} tokens, and the model can attend to {context}; {remedy}")
        return longest

    def _check_vocabulary(self, config, tokenizer) -> None:
        """The ids were made with this tokenizer, and all of them have a row in the model's embedding."""
        known_hash = self.ledger.get("vocabulary_sha256")
        is_same = tokenizer is not None and known_hash == vocabulary_hash(tokenizer)
        if tokenizer is not None and known_hash and not is_same:
            raise ValueError("it was made with another tokenizer; tokenize again with --tokenizer_path MODEL")
        if tokenizer is not None:
            difference = find_difference(self.ledger, tokenizer)
            if difference:
                raise ValueError(f"it was made with a tokenizer that behaves otherwise: {difference}; tokenize again "
                                 "with --tokenizer_path MODEL")  # fmt: skip
        if config is None:
            return
        if is_same and max(tokenizer.get_vocab().values()) < config.vocab_size:
            return  # no need to read the whole set
        for name, lowest in self.lowest_ids.items():
            if name not in self.columns:
                continue
            for chunk in self.columns[name].chunks:
                ids = chunk.flatten().to_numpy()
                if len(ids) and (ids.max() >= config.vocab_size or ids.min() < lowest):
                    raise ValueError(f"{name} from {ids.min()} to {ids.max()} do not fit the model's vocabulary of "
                                     f"{config.vocab_size}; tokenize again with --tokenizer_path MODEL")  # fmt: skip


class PreferenceFolder(TokenizedFolder):
    """One set that tokenize_dataset.py --format preference wrote: paired, or unpaired for KTO.

    paired:    prompt_ids, chosen_ids, chosen_labels, rejected_ids, rejected_labels
    unpaired:  prompt_ids, completion_ids, completion_labels, label (true: desirable)

    A document is the prompt and one answer behind it. The prompt has no target.
    """

    lowest_ids = {
        "prompt_ids": 0, "chosen_ids": 0, "rejected_ids": 0, "completion_ids": 0,
        "chosen_labels": IGNORE_INDEX, "rejected_labels": IGNORE_INDEX, "completion_labels": IGNORE_INDEX,
    }  # fmt: skip

    def choose_columns(self, table) -> dict:
        names = table.column_names
        answers = find_answers(names)
        expected = ["prompt_ids"]
        for answer in answers:
            expected += [f"{answer}_ids", f"{answer}_labels"]
        if answers == ("completion",):
            expected.append("label")
        missing = [name for name in expected if name not in names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)} (columns: {', '.join(names)}); make it with "
                             "python data_sample/tokenize_dataset.py --format preference")  # fmt: skip
        return {name: table.column(name) for name in expected}

    @property
    def answers(self) -> tuple[str, ...]:
        """The names of the answers that a row has."""
        return find_answers(self.columns)

    def check_context(self, config, passage_length: int) -> int:
        """The most tokens of a document; the model must have a position for each of them."""
        context = find_context(config)
        prompts = pc.list_value_length(self.columns["prompt_ids"])
        longest = 0
        for answer in self.answers:
            lengths = pc.add(prompts, pc.list_value_length(self.columns[f"{answer}_ids"]))
            longest = max(longest, pc.max(lengths).as_py())
        if longest > context:
            raise ValueError(f"a prompt and its answer have {longest} tokens, and the model can attend to {context}; "
                             f"tokenize again with --max_length {context}")  # fmt: skip
        return longest


def find_answers(columns) -> tuple[str, ...]:
    """The answers of a row of preferences, by the names of its columns."""
    if "completion_ids" in columns:
        return ("completion",)
    return ("chosen", "rejected")


def find_context(config) -> float:
    """The most tokens that a model can attend to; infinite for a model that does not say it."""
    for name in ("max_position_embeddings", "max_seq_len"):  # MPT has the second; GPT-2's counts as the first
        if getattr(config, name, None):
            return getattr(config, name)
    return math.inf


def find_parts(path: str) -> list[str]:
    """The folder, or the parts out-1-of-4 to out-4-of-4 if `path` is out or out-*-of-4.

    Raises:
        FileNotFoundError: there is neither, or a part is missing.
        ValueError: there are parts of several sets.
    """
    if Path(path).is_dir():
        return [path]
    name, _, wanted = path.rstrip("/").partition("-*-of-")
    numbers = {}  # of the parts that are there, for each number of parts
    if Path(name).parent.is_dir():
        for folder in Path(name).parent.iterdir():
            match = re.fullmatch(re.escape(Path(name).name) + r"-(\d+)-of-(\d+)", folder.name)
            if match and wanted in ("", "*", match[2]):
                numbers.setdefault(int(match[2]), []).append(int(match[1]))
    if not numbers:
        raise FileNotFoundError("no such folder; make it with python data_sample/tokenize_dataset.py")
    if len(numbers) > 1:
        raise ValueError(f"there are parts of {' and of '.join(map(str, sorted(numbers)))}; name one set, such as "
                         f"{name}-*-of-{max(numbers)}")  # fmt: skip
    (num_parts,) = numbers
    for number in range(1, num_parts + 1):
        if number not in numbers[num_parts]:
            raise FileNotFoundError(f"{name}-{number}-of-{num_parts} is missing; make it with python "
                                    f"data_sample/tokenize_dataset.py --shard {number}/{num_parts}")  # fmt: skip
    return [f"{name}-{number}-of-{num_parts}" for number in range(1, num_parts + 1)]


def read_ledgers(parts: list[str]) -> dict:
    """The ledger of a folder. Of several parts: what all their ledgers say, the targets of all, and each ledger.

    Raises:
        FileNotFoundError: a ledger is missing.
        ValueError: the parts were not made in the same way.
    """
    ledgers = {}
    for part in parts:
        path = Path(part) / "ledger.json"
        if not path.is_file():
            raise FileNotFoundError("no ledger.json in it: not a tokenized set, or one that was not finished; make it "
                                    "with python data_sample/tokenize_dataset.py")  # fmt: skip
        ledgers[part] = json.loads(path.read_text(encoding="utf-8"))
    first = ledgers[parts[0]]
    if len(parts) == 1:
        return first
    common = {}
    for name, value in first.items():
        is_common = all(ledger.get(name) == value for ledger in ledgers.values())
        if is_common:
            common[name] = value
        elif name in SAME_IN_ALL_PARTS:
            raise ValueError(f"its parts differ in {name}, so they are not parts of one set; make all of them with the "
                             "same flags, and with the same --date if the chat template writes one")  # fmt: skip
    num_targets = [ledger.get("targets") for ledger in ledgers.values()]
    if None not in num_targets:
        common["targets"] = sum(num_targets)
    common["sha256"] = [ledger.get("sha256") for ledger in ledgers.values()]
    common["parts"] = ledgers
    return common


def load_parts(parts: list[str]):
    """The rows of all parts as one `datasets.Dataset`; None if there are none. By chance, a part may have no row."""
    from datasets import concatenate_datasets, load_from_disk  # slow to import, and the collator does not need them

    datasets = []
    for part in parts:
        if any(Path(part).glob("*.arrow")):  # load_from_disk fails on a set that was saved without rows
            datasets.append(load_from_disk(part))
    if not datasets:
        return None
    return concatenate_datasets(datasets)


def find_difference(ledger: dict, tokenizer) -> str | None:
    """How `tokenizer` behaves otherwise than the one that a set was made with; None if it does not.

    Two tokenizers can have the same vocabulary and still differ in BOS, in the space before the first word, or in
    the chat template. tokenize_dataset.py keeps a few texts with their ids in the ledger, and a conversation as the
    chat template writes it.
    """
    known = ledger.get("tokenizer_fingerprint")
    if known is None:
        return None  # a set of a former version
    for text, ids in known["texts"]:
        found = tokenizer(text).input_ids
        if found != ids:
            return f"{text!r} is {ids} there and {found} here"
    template = ledger.get("template", {})
    if not template.get("chat") or template.get("format") == "text":
        return None  # the set has no text of the chat template
    if tokenizer.chat_template is None:
        return "there it has a chat template, and here it has none"
    text = tokenizer.get_chat_template()
    if known["chat_template_sha256"] != hashlib.sha256(text.encode()).hexdigest():
        return "its chat template is another one"
    if known["rendered"] is not None:
        rendered = tokenizer.apply_chat_template(
            known["messages"], chat_template=NO_DATE + text, tokenize=False, add_generation_prompt=True
        )
        if rendered != known["rendered"]:
            start = max(0, len(os.path.commonprefix([rendered, known["rendered"]])) - 20)
            there = known["rendered"][start : start + 60]
            here = rendered[start : start + 60]
            return f"its chat template writes {there!r} there and {here!r} here"
    return None


def parse_mix(path: str) -> dict[str, float]:
    """Folders and weights of `medical:3,general:1`; without a weight it is 1."""
    if Path(path).is_dir():
        return {path: 1.0}
    mix = {}
    for part in path.split(","):
        match = re.fullmatch(r"(.+?)(?::([0-9.]+))?", part.strip())
        if match is None or match[1] in mix:
            raise ValueError("name each folder once, with a weight above 0, as in medical:3,general:1")
        mix[match[1]] = float(match[2] or 1)
    if min(mix.values()) <= 0:
        raise ValueError("name each folder once, with a weight above 0, as in medical:3,general:1")
    names = Counter(re.sub(r"-[\d*]+-of-[\d*]+$", "", name.rstrip("/")) for name in mix)
    for name, count in names.items():
        if count > 1:
            # Mixed by weight, small parts would be repeated until they are as long as the first one.
            raise ValueError(f"it mixes parts of one set; name the set, {name}, and all its parts are read as one")
    return mix


class TokenizedDataset(Dataset):
    """Rows of one tokenized set, or of several mixed by weight.

    A set is a folder, or the parts that tokenize_dataset.py --shard 1/4 to 4/4 wrote: `out` stands for the folders
    out-1-of-4 to out-4-of-4.

    An epoch is one pass over the first folder. With `medical:3,general:1` every three rows of medical come with one of
    general: too few rows begin anew within the epoch, too many go on in the next, and each row of general is drawn once
    before any is drawn again.

    A row of a folder without labels is a whole document. From it a passage of `passage_length` tokens is drawn, a new
    one in each pass: its start is given by (seed, pass, row) alone, so it is the same in any process, and no start is
    left out. Each token of a passage is a target. A shorter document is used whole.

    Args:
        path: the set, or `name:weight,name:weight`; `ledger.json`, written last, shows that a folder is complete.
        config: if given, the model's configuration; a token id at or above its vocab_size is an error.
        tokenizer: if given, ids that were made with a tokenizer that behaves otherwise are an error.
        passage_length: tokens of a passage; 0 if whole documents are an error.
        seed: of the passages.

    Raises:
        FileNotFoundError: a folder, its ledger or a part of a set is missing.
        ValueError: a column is missing, there is no row, an id lies outside the vocabulary, a row is longer than the
            model's context, or the set was made with another tokenizer.
    """

    folder_class = TokenizedFolder

    def __init__(self, path: str | Path, config=None, tokenizer=None, passage_length: int = 0, seed: int = 0):
        mix = parse_mix(str(path))
        self.passage_length = passage_length
        self.seed = seed
        self.folders = []
        self.longest = 0  # tokens of a row that attend to each other
        for name in mix:
            try:
                folder = self.folder_class(name, config, tokenizer)
                if not folder.has_labels and not passage_length:
                    raise ValueError("no column labels beside input_ids, so it holds whole documents; draw from them "
                                     "with --random_passage True, or tokenize_dataset.py answers")  # fmt: skip
                self.longest = max(self.longest, folder.check_context(config, passage_length))
            except (ValueError, OSError) as problem:
                if len(mix) == 1:
                    raise
                raise type(problem)(f"{name}: {problem}") from None
            self.folders.append(folder)
        self.packed = any(folder.packed for folder in self.folders)
        self.has_documents = not all(folder.has_labels for folder in self.folders)
        # Rows that an epoch takes of each folder.
        weights = list(mix.values())
        self.rows_per_epoch = [
            max(1, round(self.folders[0].num_rows * weight / weights[0])) for weight in weights
        ]  # fmt: skip
        # Rows of all folders before each one, and of all.
        self.first_rows = [0]
        for folder in self.folders:
            self.first_rows.append(self.first_rows[-1] + folder.num_rows)
        self.ledger = self.folders[0].ledger
        if len(mix) > 1:
            ledgers = {name: folder.ledger for name, folder in zip(mix, self.folders, strict=True)}
            hashes = [folder.ledger.get("sha256") for folder in self.folders]
            shares = [list(pair) for pair in zip(hashes, self.rows_per_epoch, strict=True)]
            self.ledger = {"sha256": shares, "mix": mix, "sets": ledgers}

    def __len__(self) -> int:
        return self.first_rows[-1]

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.read(index)

    def read(self, index: int, num_pass: int = 0) -> dict[str, torch.Tensor]:
        """A row of length T: int64 `input_ids` [T], `labels` [T] and, if any row is packed, `position_ids` [T].

        Args:
            index: counted over all folders.
            num_pass: how often the row was drawn before; it matters for passages only.
        """
        folder, row, taken = self.locate(index, num_pass)
        tensors = {}
        for name, column in folder.columns.items():
            tensors[name] = torch.from_numpy(column[row].values[taken].to_numpy().astype(np.int64))
        if not folder.has_labels:
            tensors["labels"] = tensors["input_ids"]
        if self.packed and not folder.packed:
            tensors["position_ids"] = torch.arange(len(tensors["input_ids"]))
        return tensors

    def filler_row(self) -> dict[str, torch.Tensor]:
        """A row without a target, which completes a step."""
        return filler_row(self.packed)

    def num_tokens(self, index: int) -> int:
        """Tokens of a row or passage, which has the same length in each pass."""
        folder, row, taken = self.locate(index, 0)
        return len(folder.columns["input_ids"][row].values[taken])

    def locate(self, index: int, num_pass: int) -> tuple[TokenizedFolder, int, slice]:
        """The folder of a row, the row's number in it, and what is taken of the row."""
        folder_number = bisect_right(self.first_rows, index) - 1
        folder = self.folders[folder_number]
        row = index - self.first_rows[folder_number]
        if folder.has_labels:
            return folder, row, slice(None)
        last_start = max(0, len(folder.columns["input_ids"][row]) - self.passage_length)
        start = int(np.random.default_rng([self.seed, num_pass, index]).integers(last_start, endpoint=True))
        return folder, row, slice(start, start + self.passage_length)


class PreferenceDataset(TokenizedDataset):
    """Rows of preference sets: a prompt with a chosen and a rejected answer, or with one that is desirable or not.

    Folders, parts, mixes, arguments and errors are those of TokenizedDataset. A row has int64 tensors of ids and
    labels by the names of its columns, and
      label            of an unpaired row: 1 if its answer is desirable, else 0
      mismatched_ids, mismatched_labels   of an unpaired row: an answer to another prompt, for KTO's estimate, cut
                       where the model would have no position for it
      reference_logps  what keep_reference was given, if it was
    """

    folder_class = PreferenceFolder

    def __init__(self, path: str | Path, config=None, tokenizer=None):
        super().__init__(path, config, tokenizer)
        kinds = {folder.answers for folder in self.folders}
        if len(kinds) > 1:
            raise ValueError("it mixes paired and unpaired sets; choose sets of one kind")
        (self.answers,) = kinds
        self.is_paired = self.answers == ("chosen", "rejected")
        self.context = find_context(config)
        self.reference_logps = None

    def keep_reference(self, logps: torch.Tensor) -> None:
        """Gives each row the reference's log-probabilities of its two documents: float32 [rows, 2].

        They are those of the chosen and the rejected answer, or of the answer and the mismatched one.
        """
        assert logps.shape == (len(self), 2)
        self.reference_logps = logps

    def read(self, index: int, num_pass: int = 0) -> dict[str, torch.Tensor]:
        row = {"prompt_ids": self.read_column(index, "prompt_ids")}
        for answer in self.answers:
            row[f"{answer}_ids"] = self.read_column(index, f"{answer}_ids")
            row[f"{answer}_labels"] = self.read_column(index, f"{answer}_labels")
        if not self.is_paired:
            folder, place, _ = self.locate(index, 0)
            row["label"] = torch.tensor(int(folder.columns["label"][place].as_py()))
            other = self.find_mismatched(index)
            answer = self.read_column(other, "completion_ids")
            length = int(min(len(answer), self.context - len(row["prompt_ids"])))
            row["mismatched_ids"] = answer[:length]
            row["mismatched_labels"] = self.read_column(other, "completion_labels")[:length]
        if self.reference_logps is not None:
            row["reference_logps"] = self.reference_logps[index]
        return row

    def read_column(self, index: int, name: str) -> torch.Tensor:
        folder, place, _ = self.locate(index, 0)
        return torch.from_numpy(folder.columns[name][place].values.to_numpy().astype(np.int64))

    def find_mismatched(self, index: int) -> int:
        """The nearest row before this one, in a circle, that has another prompt; if none has, the one before it.

        The order of the set decides and not that of training, so a row has the same mismatched answer in every epoch.
        """
        prompt = self.read_column(index, "prompt_ids")
        for distance in range(1, len(self)):
            other = (index - distance) % len(self)
            if not torch.equal(self.read_column(other, "prompt_ids"), prompt):
                return other
        return (index - 1) % len(self)

    def num_tokens(self, index: int) -> int:
        """Tokens of a row's documents; the prompt is counted for each of them."""
        folder, place, _ = self.locate(index, 0)
        total = 0
        for answer in self.answers:
            total += len(folder.columns["prompt_ids"][place]) + len(folder.columns[f"{answer}_ids"][place])
        return total

    def filler_row(self) -> dict[str, torch.Tensor]:
        """A row whose answers have one token and no target."""
        row = {"prompt_ids": torch.zeros(1, dtype=torch.int64), "label": torch.tensor(IGNORE_INDEX)}
        for answer in (*self.answers, "mismatched"):
            row[f"{answer}_ids"] = torch.zeros(1, dtype=torch.int64)
            row[f"{answer}_labels"] = torch.full((1,), IGNORE_INDEX)
        if self.reference_logps is not None:
            row["reference_logps"] = torch.zeros(2)
        return row


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------------
# 2. The rows in the order of training
# -------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def permutation(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


class TrainingRows(Dataset):
    """All rows of a run in the order of training: item i is the i-th row, for any number of processes.

    Consecutive items, `rows_per_step` at a time, form one optimizer step, whatever the split into processes and
    micro-batches. The order of an epoch is a permutation given by (seed, epoch) alone. The last step of an epoch is
    completed with rows that have no target: a row repeated would weigh twice, and a row left out would be lost.

    Any loop that reads the items in sequence trains the same model: the plain loops, and transformers' Trainer with
    `train_sampling_strategy="sequential"`.

    Args:
        dataset: the rows.
        rows_per_step: rows of one optimizer step = processes x batch size x accumulation steps.
        num_train_epochs: passes over the data.
        max_steps: optimizer steps; above 0 it overrides num_train_epochs.
        seed: of the order.

    Raises:
        ValueError: passages are asked for, and there is no document to draw them from.
    """

    def __init__(
        self, dataset: TokenizedDataset, rows_per_step: int, num_train_epochs: float, max_steps: int, seed: int
    ):
        if dataset.passage_length and not dataset.has_documents:
            raise ValueError("--random_passage True: --dataset_path holds rows with labels; passages are drawn from "
                             "whole documents, which tokenize_dataset.py --format text writes")  # fmt: skip
        self.dataset = dataset
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.rows_per_epoch = sum(dataset.rows_per_epoch)
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / rows_per_step)
        self.num_steps = max_steps
        if max_steps <= 0:
            self.num_steps = math.ceil(num_train_epochs * self.steps_per_epoch)

    def __len__(self) -> int:
        return self.num_steps * self.rows_per_step

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        place = self.locate(i)
        if place is None:
            return self.dataset.filler_row()
        index, num_pass = place
        return self.dataset.read(index, num_pass)

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The rows of an optimizer step, counted from 0."""
        return [self[i] for i in range(step * self.rows_per_step, (step + 1) * self.rows_per_step)]

    def num_tokens(self, step: int) -> int:
        """The tokens of an optimizer step, counted from 0, without those that complete it."""
        total = 0
        for i in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            place = self.locate(i)
            if place is not None:
                total += self.dataset.num_tokens(place[0])
        return total

    def locate(self, i: int) -> tuple[int, int] | None:
        """(index in the dataset, how often that row was drawn before), or None for a row that completes a step."""
        epoch, place = divmod(i, self.steps_per_epoch * self.rows_per_step)
        if place >= self.rows_per_epoch:
            return None
        place = int(permutation(self.rows_per_epoch, self.seed, epoch)[place])
        # An epoch takes rows_per_epoch[n] rows of folder n; `place` counts over all of them.
        folder_number = 0
        while place >= self.dataset.rows_per_epoch[folder_number]:
            place -= self.dataset.rows_per_epoch[folder_number]
            folder_number += 1
        num_drawn = epoch * self.dataset.rows_per_epoch[folder_number] + place  # of this folder, since the start
        num_pass, row = divmod(num_drawn, self.dataset.folders[folder_number].num_rows)
        if folder_number > 0:
            # A pass over the first folder is an epoch, which is in order already; the others' passes are not.
            row = int(
                permutation(self.dataset.folders[folder_number].num_rows, self.seed, num_pass, folder_number)[row]
            )
        return self.dataset.first_rows[folder_number] + row, num_pass


def filler_row(packed: bool) -> dict[str, torch.Tensor]:
    """A row of one token without a target: it gives loss 0, and its gradients are 0."""
    row = {"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.full((1,), IGNORE_INDEX)}
    if packed:
        row["position_ids"] = torch.zeros(1, dtype=torch.int64)
    return row


# -------------------------------------------------------------------------------------------------------------------
# 3. The collator
# -------------------------------------------------------------------------------------------------------------------


class DataCollator:
    """Makes one batch of rows. Masks come from lengths, never from token ids (the pad token is often also EOS).

    padded: `input_ids`, `labels`, `attention_mask` [rows, longest]; packed rows get `position_ids` instead of the
    mask, and their padding is a document of its own, because a 2-D mask would let documents attend to each other.

    padding-free: `input_ids`, `labels`, `position_ids` [1, tokens], and under transformers' own names
      logits_to_keep  [targets], the positions whose next token is a target: only there are logits needed
      shift_labels    [1, targets], those targets
      cu_seq_lens_q, cu_seq_lens_k  [documents + 1] int32, where each document begins, and the end of the last one
      max_length_q, max_length_k    the length of the longest document, an int

    The first token of a document is never a target: the position before it belongs to another document.
    """

    def __init__(self, padding_free: bool):
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | int]:
        input_ids = [row["input_ids"] for row in rows]
        packed = "position_ids" in rows[0]
        if packed:
            positions = [row["position_ids"] for row in rows]
        else:
            positions = [torch.arange(len(ids)) for ids in input_ids]
        labels = []
        for row, position in zip(rows, positions, strict=True):
            labels.append(row["labels"].masked_fill(position == 0, IGNORE_INDEX))
        if self.padding_free:
            return join(input_ids, labels, positions)
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if packed:
            longest = batch["input_ids"].shape[1]
            padded = [torch.cat([position, torch.arange(longest - len(position))]) for position in positions]
            batch["position_ids"] = torch.stack(padded)
        else:
            masks = [torch.ones_like(ids) for ids in input_ids]
            batch["attention_mask"] = pad_sequence(masks, batch_first=True)
        return batch


class PreferenceCollator:
    """Makes one batch of preferences: the documents of all rows, padding-free or padded, as DataCollator makes it.

    The documents of a paired batch are those with a chosen answer, then those with a rejected one, in the same order.
    Besides what the model gets, a batch has
      logits_to_keep   [targets], the positions whose next token is a target, counted over all positions of the batch
      shift_labels     [1, targets], those targets
      documents        [targets], the number of each target's document
      lengths          [documents], the targets of each document
      labels           [rows], 1 for a pair; of an unpaired row 1 if it is desirable, else 0; -100 for a filler row
      reference_logps  [documents], if the rows have them
      mismatched       a batch of the mismatched answers, of unpaired rows only

    Args:
        padding_free: as of DataCollator.
        shares_prompts: a pair is [prompt, chosen answer, rejected answer] in a padding-free row, so that the prompt is
            computed once; only where can_share_prompts says that the model gives the same numbers.
    """

    def __init__(self, padding_free: bool, shares_prompts: bool = False):
        self.padding_free = padding_free
        self.shares_prompts = shares_prompts

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | int | dict]:
        is_paired = "chosen_ids" in rows[0]
        answers = ["completion"]
        if is_paired:
            answers = ["chosen", "rejected"]
        if is_paired and self.shares_prompts:
            batch = join_pairs(rows)
        else:
            batch = self.collate_answers(rows, answers)
        labels = [row.get("label", torch.tensor(1)) for row in rows]
        batch["labels"] = torch.stack(labels)
        if not is_paired:
            batch["mismatched"] = self.collate_answers(rows, ["mismatched"])
        if "reference_logps" in rows[0]:
            first, second = torch.stack([row["reference_logps"] for row in rows]).T
            if is_paired:
                batch["reference_logps"] = torch.cat([first, second])
            else:
                batch["reference_logps"] = first
                batch["mismatched"]["reference_logps"] = second
        return batch

    def collate_answers(self, rows: list[dict[str, torch.Tensor]], answers: list[str]) -> dict:
        """A batch of all rows with the first answer, then of all with the second."""
        documents = []
        for answer in answers:
            for row in rows:
                prompt = row["prompt_ids"]
                labels = torch.cat([torch.full_like(prompt, IGNORE_INDEX), row[f"{answer}_labels"]])
                documents.append({"input_ids": torch.cat([prompt, row[f"{answer}_ids"]]), "labels": labels})
        batch = DataCollator(self.padding_free)(documents)
        labels = batch.pop("labels")
        if self.padding_free:
            starts = batch["cu_seq_lens_q"][:-1]
            batch["documents"] = torch.bucketize(batch["logits_to_keep"], starts, right=True) - 1
        else:
            batch["documents"], column = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
            batch["logits_to_keep"] = batch["documents"] * labels.shape[1] + column - 1
            batch["shift_labels"] = labels[batch["documents"], column][None]
        batch["lengths"] = torch.bincount(batch["documents"], minlength=len(documents))
        return batch


def join(
    input_ids: list[torch.Tensor], labels: list[torch.Tensor], positions: list[torch.Tensor]
) -> dict[str, torch.Tensor | int]:
    """A padding-free batch of rows of any length."""
    labels = torch.cat(labels)
    positions = torch.cat(positions)
    target_positions = torch.nonzero(labels != IGNORE_INDEX).flatten()
    starts = torch.nonzero(positions == 0).flatten()
    borders = torch.cat([starts, torch.tensor([len(positions)])])
    longest = int(borders.diff().max())
    borders = borders.to(torch.int32)
    return {
        "input_ids": torch.cat(input_ids)[None],
        "labels": labels[None],
        "position_ids": positions[None],
        "logits_to_keep": target_positions - 1,  # the logits at position p predict the token at p + 1
        "shift_labels": labels[target_positions][None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def join_pairs(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor | int]:
    """A padding-free batch of pairs with each prompt once: [prompt, chosen answer], [rejected answer] for each row.

    Both answers have the positions behind the prompt. A rejected answer attends to the prompt and to itself, so keys
    have other borders than queries:
      cu_seq_lens_q, max_length_q  of [prompt, chosen], [rejected]
      cu_seq_lens_k, max_length_k  of [prompt, chosen], [prompt, rejected]
      key_positions                where in the row these keys are
    The first tokens of both answers are predicted at one position, the prompt's last.
    """
    input_ids = []
    position_ids = []
    key_positions = []
    lengths_q = []
    lengths_k = []
    predicting = []
    targets = []
    documents = []
    start = 0
    for number, row in enumerate(rows):
        parts = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        lengths = [len(part) for part in parts]
        prompt, chosen, rejected = torch.arange(start, start + sum(lengths)).split(lengths)
        start += sum(lengths)
        input_ids += parts
        position_ids += [torch.arange(len(prompt) + len(chosen)), len(prompt) + torch.arange(len(rejected))]
        key_positions += [prompt, chosen, prompt, rejected]
        lengths_q += [len(prompt) + len(chosen), len(rejected)]
        lengths_k += [len(prompt) + len(chosen), len(prompt) + len(rejected)]
        for answer, name, document in ((chosen, "chosen", number), (rejected, "rejected", len(rows) + number)):
            before = torch.cat([prompt[-1:], answer[:-1]])  # without a prompt nothing predicts the first token
            labels = row[f"{name}_labels"][len(answer) - len(before) :]
            is_target = labels != IGNORE_INDEX
            predicting.append(before[is_target])
            targets.append(labels[is_target])
            documents.append(torch.full((int(is_target.sum()),), document))
    documents = torch.cat(documents)
    return {
        "input_ids": torch.cat(input_ids)[None],
        "position_ids": torch.cat(position_ids)[None],
        "logits_to_keep": torch.cat(predicting),
        "shift_labels": torch.cat(targets)[None],
        "documents": documents,
        "lengths": torch.bincount(documents, minlength=2 * len(rows)),
        "cu_seq_lens_q": torch.tensor([0, *lengths_q]).cumsum(0).to(torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *lengths_k]).cumsum(0).to(torch.int32),
        "max_length_q": max(lengths_q),
        "max_length_k": max(lengths_k),
        "key_positions": torch.cat(key_positions),
    }


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    """Target tokens of a batch, or preferences: what its summed loss is to be divided by."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


# -------------------------------------------------------------------------------------------------------------------
# 4. Attention inside documents
# -------------------------------------------------------------------------------------------------------------------


def attend_inside_documents(model: torch.nn.Module, is_compiled: bool = False) -> None:
    """Lets `model` compute attention inside the documents of padding-free batches, without a mask over the joined row.

    A dense mask over a joined row would have most of the work thrown away. A model whose attention is not to be
    replaced, or does more than a softmax, keeps transformers' own, which finds documents by `position_ids`.
    """
    from transformers import AttentionInterface

    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        return  # Llama 4's chunks inside a document stand in the mask alone
    # Private in transformers, which has no public question for it: whether layers call the AttentionInterface.
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        # No mask function is registered under this name, so transformers makes no mask.
        attention = document_attention
        if is_compiled and not torch.cuda.is_available():
            # torch.compile is to leave the loop over documents alone: it would compile again for each set of lengths.
            attention = torch.compiler.disable(document_attention)
        AttentionInterface.register("documents", attention)
        model.set_attn_implementation("documents")


def document_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, max_length_q=None,
    cu_seq_lens_k=None, max_length_k=None, key_positions=None, sliding_window=None, **kwargs
):  # fmt: skip
    """Causal attention inside each document of a padding-free batch.

    Args:
        query, key, value: [1, heads or key-value heads, tokens, size of a head].
        attention_mask: none; the borders say what a mask would.
        cu_seq_lens_q, max_length_q: as DataCollator gives them; a document of length 0 is allowed.
        cu_seq_lens_k, max_length_k, key_positions: as join_pairs gives them; without the last, a document's keys are
            at the positions of its queries. The last query of a document sees its last key.
        sliding_window: a token sees that many tokens, itself included.

    Returns:
        [1, tokens, heads, size of a head], and None for the weights.

    Raises:
        ValueError: a batch that is not padding-free, or a model whose attention is more than a softmax.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ValueError("this attention needs padding-free batches with cu_seq_lens_q and without attention_mask")
    if any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise ValueError("this model's attention is more than a softmax; choose --attn_implementation eager")
    # Under autocast rotary embeddings leave float32 behind; cast here once, and not for each document.
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    cu_seq_lens_q = cu_seq_lens_q.flatten()  # the pipeline passes [1, documents + 1]
    if key_positions is None:
        cu_seq_lens_k = cu_seq_lens_q
        max_length_k = max_length_q
    else:
        key = key.index_select(2, key_positions.to(key.device))
        value = value.index_select(2, key_positions.to(value.device))
    borders = (cu_seq_lens_q, cu_seq_lens_k)
    if has_varlen_kernel(query, value, dropout):
        longest = (max_length_q, max_length_k)
        return varlen_attention(query, key, value, scaling, borders, longest, sliding_window), None
    return one_document_after_the_other(query, key, value, scaling, dropout, borders, sliding_window), None


def has_varlen_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether PyTorch's variable-length kernel can compute this: 16 bit, an Ampere GPU or a newer one, no dropout."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or dropout > 0:
        return False
    head_size = query.shape[-1]
    if value.shape[-1] != head_size:  # DeepSeek's latent attention
        return False
    return head_size % 8 == 0 and head_size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(query, key, value, scaling, borders, longest, sliding_window) -> torch.Tensor:
    """One kernel for all documents; nothing waits for the GPU. `borders` and `longest` are of queries and of keys."""
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    # PyTorch 2.11 has no such argument, and its kernel takes fewer key-value heads without being told.
    options = {}
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    window = (-1, 0)  # causal: every token before, none behind
    if sliding_window is not None:
        window = (sliding_window - 1, 0)
    joined = [states[0].transpose(0, 1) for states in (query, key, value)]  # [tokens, heads, size of a head]
    return varlen_attn(*joined, *borders, *longest, scale=scaling, window_size=window, **options)[None]


def one_document_after_the_other(query, key, value, scaling, dropout, borders, sliding_window) -> torch.Tensor:
    """The same on a CPU, in float32, or on older GPUs, by scaled_dot_product_attention for each document."""
    num_groups = query.shape[1] // key.shape[1]
    repeats_keys = query.device.type == "cpu" or query.dtype == torch.float32  # where sdpa is slow at groups
    if repeats_keys and num_groups > 1:
        key = key.repeat_interleave(num_groups, dim=1)
        value = value.repeat_interleave(num_groups, dim=1)
    query_lengths = []
    key_lengths = []
    for num_queries, num_keys in zip(borders[0].diff().tolist(), borders[1].diff().tolist(), strict=True):
        if num_queries or num_keys:  # documents of length 0 fill up the borders of the pipeline's micro-batches
            query_lengths.append(num_queries)
            key_lengths.append(num_keys)
    if len(query_lengths) == 1:
        documents = [(query, key, value)]  # split, and its gradient, would copy them
    else:
        # split, and not slices: the gradient of a slice is as long as the whole row.
        splits = (query.split(query_lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2))
        documents = zip(*splits, strict=True)
    outputs = []
    for queries, keys, values in documents:
        num_before = keys.shape[2] - queries.shape[2]  # keys before the first query's own
        mask = None
        if num_before > 0 or (sliding_window is not None and keys.shape[2] > sliding_window):
            mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(num_before)
            if sliding_window is not None:
                mask &= ~mask.tril(num_before - sliding_window)
        output = scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=num_groups > 1 and not repeats_keys,
        )
        outputs.append(output.transpose(1, 2))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def check_document_attention(model: torch.nn.Module, vocab_size: int) -> None:
    """Makes sure that a token sees its own document only, and not what is behind it, by two forwards of eight tokens.

    A model whose layers do not pass the borders on to their attention goes back to transformers' own attention, which
    finds documents by `position_ids`.

    Raises:
        ValueError: the model's attention crosses the border between two documents, or looks ahead.
    """
    moved = None
    if model.config._attn_implementation == "documents":
        try:
            moved = move_logits(model, vocab_size)
        except ValueError:  # document_attention's: it got no borders
            pass
        if moved is None or moved[4:].max() > 1e-3:
            print("this model's layers do not pass the borders of documents on: "
                  "attention is transformers' own, with a mask")  # fmt: skip
            model.set_attn_implementation("sdpa")
            moved = None
    if moved is None:
        moved = move_logits(model, vocab_size)
    if not moved[4:].max() <= 1e-3:
        raise ValueError("the attention of this model crosses documents in one row; choose another "
                         "--attn_implementation, or --padding_free False with a set that is not packed")  # fmt: skip
    if moved[:3].max() > 1e-3:
        raise ValueError("the attention of this model looks ahead, so it cannot learn to write; --model_path must be a "
                         "decoder")  # fmt: skip


@torch.no_grad()
def can_share_prompts(model: torch.nn.Module, vocab_size: int) -> bool:
    """Whether two answers behind one prompt get the logits that they get behind a prompt each: asked by three forwards.

    They need attention inside documents, and layers that mix tokens by attention alone: a recurrence would carry the
    chosen answer into the rejected one. Call it behind check_document_attention.
    """
    if model.config._attn_implementation != "documents":
        return False
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    prompt, chosen, rejected = (torch.arange(1, 14) % vocab_size).split([5, 3, 5])
    row = {"chosen_ids": chosen, "chosen_labels": chosen, "rejected_ids": rejected, "rejected_labels": rejected}
    logits = []
    for prompt_ids, shares_prompts in ((prompt, True), (prompt, False), (prompt + 1, False)):
        batch = PreferenceCollator(True, shares_prompts)([row | {"prompt_ids": prompt_ids % vocab_size}])
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        found = model(**move_to_device(inputs, device), use_cache=False).logits[0]
        logits.append(found[batch["logits_to_keep"].to(found.device)].float())
    model.train(was_training)
    shared, apart, other = logits
    # Beside what another prompt changes; bf16 rounds to a hundredth of that.
    return bool((shared - apart).abs().max() <= 0.05 * (other - apart).abs().max())


def move_logits(model: torch.nn.Module, vocab_size: int) -> torch.Tensor:
    """Runs two joined documents of four tokens, changes the last token of the first, and compares the logits.

    Returns:
        How far the logits of each of the eight tokens moved, beside those of the changed one: float32 [8]. Where none
        may move it is not quite zero for all models: the experts of a mixture round by what else is in the batch.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    second_document = [4, 5, 6, 7]
    logits = []
    for first_document in ([0, 1, 2, 3], [0, 1, 2, 4]):
        ids = torch.tensor(first_document + second_document) % vocab_size
        row = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([0, 1, 2, 3] * 2)}
        batch = DataCollator(padding_free=True)([row])
        for name in ("labels", "logits_to_keep", "shift_labels"):
            del batch[name]
        # FlashAttention refuses float32, which training does not give it either.
        is_autocast = torch.is_autocast_enabled(device.type) or "flash" in model.config._attn_implementation
        with torch.autocast(device.type, torch.bfloat16, enabled=is_autocast):
            logits.append(model(**move_to_device(batch, device), use_cache=False).logits.float())
    model.train(was_training)
    moved = (logits[1] - logits[0]).abs().amax(dim=2)[0]
    return moved / moved[3]


def move_to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on `device`; its ints stay as they are. Nothing waits for a copy of pinned memory."""
    moved = {}
    for name, value in batch.items():
        moved[name] = value
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(device, non_blocking=True)
        elif isinstance(value, dict):  # the mismatched answers
            moved[name] = move_to_device(value, device)
    return moved


def pin_memory(batch: dict) -> dict:
    """The batch with its tensors in memory that is never swapped, from which a GPU copies by itself."""
    pinned = {}
    for name, value in batch.items():
        pinned[name] = value
        if isinstance(value, torch.Tensor):
            pinned[name] = value.pin_memory()
        elif isinstance(value, dict):
            pinned[name] = pin_memory(value)
    return pinned


# -------------------------------------------------------------------------------------------------------------------
# 5. The loss of the targets in chunks
# -------------------------------------------------------------------------------------------------------------------


def summed_cross_entropy(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed loss of the logits `hidden_states @ weight.T`, which exist for one chunk of targets at a time.

    The gradients are computed along with the loss, so no logits are kept for the backward or computed again.

    Args:
        hidden_states: [targets, hidden size].
        weight: [vocabulary, hidden size], of the output layer.
        targets: ids [targets].

    Returns:
        A float32 scalar, whatever the precision of the products.
    """
    assert len(hidden_states) == len(targets)  # else they would be paired wrongly without a word
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):  # PyTorch's function and ours both do not look at it
        dtype = torch.get_autocast_dtype(device)
        hidden_states = hidden_states.to(dtype)
        weight = weight.to(dtype)
    is_weight_trained = weight.requires_grad  # asked before: an evaluation has the loss of training, bit for bit
    if not torch.is_grad_enabled():  # an evaluation: no gradient is computed along
        hidden_states = hidden_states.detach()
        weight = weight.detach()
    targets = targets.to(hidden_states.device)
    with torch.autocast(device, enabled=False):  # what is float32 inside stays float32
        is_exact = hidden_states.dtype in (torch.float32, torch.float64)
        if is_exact and not is_weight_trained and has_linear_cross_entropy():
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=targets_per_chunk(weight))
            return torch.nn.functional.linear_cross_entropy(
                hidden_states, weight, targets, reduction="sum", options=options
            )
        # In bf16 PyTorch's function rounds the sum to bf16 (0.3 % off at 300 targets), or with reduction="none" each
        # target's loss (0.01 % off) and multiplies by the whole vocabulary once more. Ours is 0.0003 % off. And where
        # the weight is trained, autograd makes zeros of its size for it in every backward (PyTorch 2.13): its gradient
        # is an output of that function, whose own gradient is asked for.
        return ChunkedCrossEntropy.apply(hidden_states, weight, targets)


def targets_per_chunk(weight: torch.Tensor) -> int:
    """By bytes on a GPU, where larger products are faster; the CPU's caches hold few logits."""
    if weight.device.type == "cpu":
        return TARGETS_PER_CHUNK
    return max(TARGETS_PER_CHUNK, LOGITS_PER_CHUNK_ON_GPU // len(weight))


def has_linear_cross_entropy() -> bool:
    """PyTorch 2.13 has it; 2.11, which some GPU machines hold, does not."""
    return hasattr(torch.nn.functional, "linear_cross_entropy")


class ChunkedCrossEntropy(torch.autograd.Function):
    """What torch.nn.functional.linear_cross_entropy does with `reduction="sum"` and chunks, with a float32 sum.

    The method is that of Liger Kernel (arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), device=hidden_states.device)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden_states)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # chunks are not added up in bf16
        chunk_size = targets_per_chunk(weight)
        for start in range(0, len(hidden_states), chunk_size):
            chunk = hidden_states[start : start + chunk_size]
            ids = targets[start : start + chunk_size, None]
            log_softmax = (chunk @ weight.T).float().log_softmax(1)
            loss -= log_softmax.gather(1, ids).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one_hot(target)
            grad_logits = log_softmax.exp_()
            grad_logits.scatter_add_(1, ids, grad_logits.new_full(ids.shape, -1.0))
            grad_logits = grad_logits.to(hidden_states.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk_size] = grad_logits @ weight
            if grad_weight is not None and chunk.dtype == grad_weight.dtype:
                torch.addmm(grad_weight, grad_logits.T, chunk, out=grad_weight)
            elif grad_weight is not None and chunk.is_cuda:
                # The product is added in float32 as it is computed; a CPU cannot, and rounds each chunk's to 16 bits.
                torch.addmm(grad_weight, grad_logits.T, chunk, out_dtype=torch.float32, out=grad_weight)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
            del log_softmax, grad_logits  # else they would lie beside the next chunk's
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.gradients = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        scaled = []
        for gradient in ctx.gradients:
            if gradient is not None:
                gradient = gradient.mul_(grad_loss)
            scaled.append(gradient)
        del ctx.gradients  # they were scaled in place, which can be done once
        return (*scaled, None)


class TargetLogps(torch.autograd.Function):
    """The log-probability of each target, float32 [targets], from logits that exist for one chunk at a time.

    The gradient of the hidden states is computed along, up to the factor of each target that the backward brings:
    PyTorch's linear_cross_entropy with `reduction="none"` would compute the logits once more for it. That of the
    weight needs the factors first, so an output layer that is trained does compute them again.
    """

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logps = torch.empty(len(targets), device=hidden_states.device)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden_states)
        chunk_size = targets_per_chunk(weight)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            ids = targets[chunk, None]
            log_softmax = (hidden_states[chunk] @ weight.T).float().log_softmax(1)
            logps[chunk] = log_softmax.gather(1, ids)[:, 0]
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_of_logits(log_softmax, ids).to(weight.dtype) @ weight
            del log_softmax  # else it would lie beside the next chunk's
        ctx.grad_hidden = grad_hidden
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(hidden_states, weight, targets)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps: torch.Tensor):
        grad_hidden = grad_weight = None
        if ctx.grad_hidden is not None:
            grad_hidden = ctx.grad_hidden.mul_(grad_logps[:, None])
        del ctx.grad_hidden  # it was scaled in place, which can be done once
        if ctx.needs_input_grad[1]:
            hidden_states, weight, targets = ctx.saved_tensors
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # chunks are not added up in bf16
            chunk_size = targets_per_chunk(weight)
            for start in range(0, len(targets), chunk_size):
                chunk = slice(start, start + chunk_size)
                log_softmax = (hidden_states[chunk] @ weight.T).float().log_softmax(1)
                grad_logits = grad_of_logits(log_softmax, targets[chunk, None]).mul_(grad_logps[chunk, None])
                grad_weight += grad_logits.to(weight.dtype).T @ hidden_states[chunk]
                del log_softmax, grad_logits
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None


def grad_of_logits(log_softmax: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """d log-probability / d logits = one_hot(target) - softmax; it overwrites `log_softmax`."""
    gradient = log_softmax.exp_().neg_()
    return gradient.scatter_add_(1, ids, gradient.new_ones(ids.shape))


def target_logps(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the targets by the logits `hidden_states @ weight.T`, as in summed_cross_entropy.

    Returns:
        float32 [targets], whatever the precision of the products.
    """
    assert len(hidden_states) == len(targets)
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states = hidden_states.to(dtype)
        weight = weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return TargetLogps.apply(hidden_states, weight, targets.to(hidden_states.device))


def sum_over_documents(logps: torch.Tensor, batch: dict) -> torch.Tensor:
    """The log-probability of each document's answer, float32 [documents], from those of its targets [targets]."""
    total = torch.zeros(len(batch["lengths"]), device=logps.device)
    return total.index_add(0, batch["documents"].to(logps.device), logps)


class LossHead(torch.nn.Linear):
    """An output layer that returns the summed loss of `targets` [targets] while these are set, and logits otherwise.

    It has to be the layer itself: FSDP2 and ZeRO-3 have its weight whole inside its forward only.
    """

    targets: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return super().forward(hidden_states)
        return summed_cross_entropy(hidden_states[0], self.weight, self.targets)


class LogpsHead(torch.nn.Linear):
    """The same for log-probabilities: while `targets` are set, it returns theirs, float32 [targets].

    `positions` [targets] are the positions whose next token is a target, counted over all positions of the batch.
    """

    positions: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.targets is None:
            return super().forward(hidden_states)
        return target_logps(hidden_states.flatten(0, 1)[self.positions], self.weight, self.targets)


def add_loss_head(model: torch.nn.Module, head_class: type = LossHead) -> LossHead | LogpsHead | None:
    """Makes the output layer of `model` a LossHead with the same weight, or returns None if it is more than a product.

    Call it before the model is wrapped, and computes_plain_logits afterwards.
    """
    base = model
    if hasattr(model, "get_base_model"):  # PEFT's
        base = model.get_base_model()
    layer = base.get_output_embeddings()
    if type(layer) is not torch.nn.Linear or layer.bias is not None:  # an adapter's or a 4-bit layer is another type
        return None
    head = head_class(layer.in_features, layer.out_features, bias=False, device="meta")
    head.weight = layer.weight
    base.set_output_embeddings(head)
    return head


def summed_loss(model: torch.nn.Module, batch: dict, head: LossHead | None) -> torch.Tensor:
    """The summed loss of a batch's targets, by the loss head if there is one, else as transformers computes it."""
    if head is None or "shift_labels" not in batch:
        return model(**batch, num_items_in_batch=1, use_cache=False).loss
    inputs = dict(batch)
    del inputs["labels"]
    head.targets = inputs.pop("shift_labels")[0]
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        head.targets = None


def batch_logps(model: torch.nn.Module, batch: dict, head: LogpsHead | None, **options) -> torch.Tensor:
    """The log-probability of each target of a batch, float32 [targets]: by the head, or from all logits without one.

    Args:
        options: more arguments of the model.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    # With a cache, transformers would not notice that a row holds several documents.
    inputs.update(options, use_cache=False)
    positions = batch["logits_to_keep"]
    targets = batch["shift_labels"][0]
    if head is None:
        logits = model(**inputs).logits.flatten(0, 1)
        predicting = logits[positions.to(logits.device)].float()
        return predicting.log_softmax(1).gather(1, targets[:, None].to(logits.device))[:, 0]
    head.positions = positions
    head.targets = targets
    try:
        return model(**inputs).logits
    finally:
        head.positions = None
        head.targets = None


@torch.no_grad()
def computes_plain_logits(model: torch.nn.Module, vocab_size: int, loss_function) -> bool:
    """Whether nothing happens to logits between the output layer and the loss: asked by two forwards of eight tokens.

    Some models scale or cap their logits, and then a loss that is computed from hidden states is another one.

    Args:
        loss_function: of (model, batch), the summed loss of a padding-free batch that is to be trusted.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.arange(3, 11) % vocab_size
    batch = move_to_device(DataCollator(padding_free=True)([{"input_ids": ids, "labels": ids}]), device)
    loss = loss_function(model, batch)
    base = model
    if hasattr(model, "get_base_model"):  # PEFT's
        base = model.get_base_model()
    returned = []

    def plant(layer, inputs, output: torch.Tensor) -> torch.Tensor:
        returned.append(output)
        return large_logits(output)

    hook = base.get_output_embeddings().register_forward_hook(plant)
    inputs = {name: value for name, value in batch.items() if "label" not in name}
    logits = model(**inputs, use_cache=False).logits
    hook.remove()
    is_same = torch.equal(logits, large_logits(logits))
    targets = batch["shift_labels"][0].to(returned[0].device)
    expected = cross_entropy(returned[0][0].float(), targets, reduction="sum")
    model.train(was_training)
    agree = is_same and bool(torch.isclose(loss.float().to(expected.device), expected, rtol=1e-3))
    if not agree:
        print("this model does more with its logits than to compare them: the loss is transformers' own, of all logits")
    return agree


def large_logits(like: torch.Tensor) -> torch.Tensor:
    """Integers, exact in bf16, which a cap or a factor must move; it would hardly move the logits of a fresh model."""
    numbers = torch.arange(like.shape[-1], device=like.device) % 251 - 125
    return numbers.to(like.dtype).expand_as(like)
