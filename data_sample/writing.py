"""Packing, and writing a tokenized set so that it appears under its name only when it is complete."""

import json
import os
from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute

from data_sample.reading import hash_files

WRITE_TOKENS = 4_000_000  # so many tokens are gathered before they are packed and written


# -------------------------------------------------------------------------------------------------------------------
# Packing
# -------------------------------------------------------------------------------------------------------------------


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: long documents first, each into the fullest row that still has room for it.

    Args:
        lengths: the length of each document, at most `max_length`.
        max_length: the length of a row.

    Returns:
        for each row the indices of its documents.
    """
    rows = []
    with_room = []  # (room left, number of the row), sorted
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for index in longest_first:
        length = lengths[index]
        place = bisect_left(with_room, (length, 0))
        if place < len(with_room):
            room, number = with_room.pop(place)
        else:
            room = max_length
            number = len(rows)
            rows.append([])
        rows[number].append(index)
        insort(with_room, (room - length, number))
    return rows


def join_documents(table: pa.Table, max_length: int) -> pa.Table:
    """Packs documents into rows, one behind the other, with positions that restart at each document.

    Args:
        table: `input_ids` and `labels`, a document in each row, none longer than `max_length`.

    Returns:
        a table with `input_ids`, `labels` and `position_ids`.
    """
    lengths = pa.compute.list_value_length(table["input_ids"]).to_numpy()
    rows = pack(lengths.tolist(), max_length)
    row_ends = [0]
    for members in rows:
        row_ends.append(row_ends[-1] + lengths[members].sum())
    row_ends = np.array(row_ends, np.int32)

    order = np.concatenate(rows)
    lengths = lengths[order]
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(row_ends[-1], dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    documents = table.take(order).combine_chunks()
    columns = {}
    for name in ("input_ids", "labels"):
        ids = documents[name].chunk(0).values
        columns[name] = pa.ListArray.from_arrays(row_ends, ids)
    columns["position_ids"] = pa.ListArray.from_arrays(row_ends, positions)
    return pa.table(columns)


# -------------------------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------------------------


class SetWriter:
    """Writes the folder of one split while rows come in, and packs what it has gathered, if that is asked for.

    Some million tokens are gathered and written together. Best-fit packing leaves no more room in so many tokens than
    it would leave in the whole set.

    Args:
        folder: the folder to make. load_from_disk of `datasets` opens it after `finish`.
        packing: whether documents are joined into rows of at most `max_length` tokens.
    """

    def __init__(self, folder: Path, packing: bool, max_length: int):
        folder.mkdir()
        self.folder = folder
        self.packing = packing
        self.max_length = max_length
        self.rows_file = folder / "rows.arrow"
        self.features = None
        self.writer = None  # made with the first rows, which say what the columns are
        self.gathered = []
        self.num_gathered_tokens = 0
        self.num_rows = 0
        self.longest_row = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.gathered.append(batch)
        self.num_gathered_tokens += count_tokens(batch)
        if self.num_gathered_tokens >= WRITE_TOKENS:
            self.write_gathered()

    def write_gathered(self) -> None:
        table = pa.Table.from_batches(self.gathered).combine_chunks()
        if self.packing:
            table = join_documents(table, self.max_length)
        if self.writer is None:
            self.open_writer(table.column_names)
        self.writer.write_table(table)
        self.num_rows += len(table)
        self.longest_row = max(self.longest_row, longest_document(table))
        self.gathered = []
        self.num_gathered_tokens = 0

    def open_writer(self, columns: list[str]) -> None:
        from datasets import Features, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        ids = Sequence(Value("int32"))
        types = dict.fromkeys(columns, ids)
        if "options" in columns:
            types["options"] = Sequence(ids)
        if "label" in columns:
            types["label"] = Value("bool")
        self.features = Features(types)
        self.writer = ArrowWriter(path=str(self.rows_file), features=self.features)

    def finish(self) -> str:
        """Writes the rest and what `datasets` wants to know about the folder.

        Returns:
            the SHA-256 of the file with the rows; of no bytes, if there are no rows.
        """
        import datasets

        if self.gathered:
            self.write_gathered()
        if self.writer is None:
            return hash_files([])
        self.writer.finalize()
        self.writer.close()
        sha256 = hash_files([str(self.rows_file)])
        # save_to_disk would read all rows again to copy them. So it saves one row, with all that `datasets` keeps
        # beside it, and the file with that row is replaced by the file with all rows.
        first_row = next(datasets.Dataset.from_file(str(self.rows_file)).iter(batch_size=1))
        one_row = datasets.Dataset.from_dict(first_row, features=self.features)
        datasets.disable_progress_bars()  # it would tell of one row
        datasets.Dataset(one_row.data, fingerprint=sha256[:16]).save_to_disk(self.folder)
        (file_of_one_row,) = datasets.load_from_disk(self.folder).cache_files
        os.replace(self.rows_file, file_of_one_row["filename"])
        for path in self.folder.iterdir():
            sync(path)
        return sha256


# The columns whose tokens follow one another in a document, for each kind of row; a pair is two documents.
DOCUMENTS = (["input_ids"], ["prompt_ids", "chosen_ids"], ["prompt_ids", "rejected_ids"],
             ["prompt_ids", "completion_ids"])  # fmt: skip


def count_tokens(batch: pa.RecordBatch) -> int:
    num_tokens = 0
    for name in batch.schema.names:
        if name.endswith("_ids"):
            num_tokens += len(batch[name].values)
    return num_tokens


def longest_document(table: pa.Table) -> int:
    """Tokens of the longest document in a table of one chunk."""
    longest = 0
    for names in DOCUMENTS:
        if names[-1] in table.column_names:
            lengths = sum(np.diff(table[name].chunk(0).offsets) for name in names)
            longest = max(longest, int(lengths.max()))
    return longest


def sync(path: Path) -> None:
    """Waits until a file is on the disk: a power cut must not leave a ledger beside rows that never got there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def publish(folders: dict[str, Path], ledgers: dict[str, dict], outputs: dict[str, Path], staging: Path) -> None:
    """Writes each split's ledger, which makes its folder complete, and renames the folders into their places.

    Args:
        folders: the written folder of each split.
        ledgers: what is to be ledger.json in it.
        outputs: the place of each split.
        staging: a folder on the same disk. Former sets are moved into it.
    """
    for split, folder in folders.items():
        path = folder / "ledger.json"
        path.write_text(json.dumps(ledgers[split], indent=2, ensure_ascii=False), encoding="utf-8")
        sync(path)
    for split, output in outputs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            os.replace(output, staging / f"former-{split}")
        os.replace(folders[split], output)
