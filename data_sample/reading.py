"""Finds the files of an input and reads their rows, without holding more than a few hundred of them in memory.

Why not `datasets.load_dataset`, which reads the same kinds of files? It is used here for what save_to_disk wrote, and
fsspec, which is below it, for URLs. For the rest it does not keep the promises of this program: it reads CSV through
pandas, which turns the texts NA and 001 into nothing and 1; it gives all rows of a file one type, so that a field
which a row lacks comes as null; and its errors name neither the file nor the line. And a chunk of JSON lines is cheaper
to hand to a worker as bytes than as Python objects.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

CHUNK_ROWS = 512  # a worker gets at most so many rows at once,
CHUNK_BYTES = 1 << 20  # and stops adding to them at so many bytes

SECONDS_WITHOUT_ANSWER = 60  # after which a web server is given up

# What `datasets` and the hub write beside data.
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

# How a file begins that is not what its name says, and what to do about it.
WRONG_BEGINNINGS = {
    b"version https://git-lfs": "it is a Git LFS pointer and not the data; run `git lfs pull` in its repository",
    b"<!doctype html": "it is a web page and not the data; open it in a browser to see what the server answered",
    b"<html": "it is a web page and not the data; open it in a browser to see what the server answered",
    b"\xff\xfe": "it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PK\x03\x04": "it is a ZIP archive or an Excel file; unpack it, or save it as CSV in UTF-8",
}


# -------------------------------------------------------------------------------------------------------------------
# Finding files
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """The files of an input in a fixed order, and what was found beside them and is not read."""

    paths: list[str] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)  # "path (why it is not read)"


@lru_cache
def kind_of(path: str) -> str:
    """`.jsonl` for corpus/part-1.jsonl.zst, and for stdin."""
    if path == "-":
        return ".jsonl"
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def kinds_of_format(format: str) -> list[str]:
    kinds = [".jsonl", ".json", ".csv", ".parquet", ".arrow"]
    if format == "text":
        kinds.append(".txt")
    return kinds


def find_files(source: str, format: str) -> Files:
    """Finds the files of --input: a file, a folder, a glob, a URL, or - for stdin.

    Raises:
        ValueError: there is none, one of them has an ending that --format is not read from, or a URL cannot be looked
            up.
    """
    kinds = kinds_of_format(format)
    endings = ", ".join(kinds) + ", or these with .gz or .zst behind"
    if source == "-":
        return Files(["-"])
    if "://" in source:
        files = Files(find_urls(source))
    elif Path(source).is_dir():
        files = walk(source, kinds)
        if not files.paths:
            raise ValueError(f"no file ending in {endings}{name_some(files.not_read)}")
    elif Path(source).is_file():
        files = Files([source])
    else:
        files = Files()
        for path in sorted(glob.glob(source, recursive=True)):
            if Path(path).is_file():
                sort_out(path, files)
    if not files.paths:
        raise ValueError(f"no such file{name_some(files.not_read)}")
    for path in files.paths:
        if kind_of(path) not in kinds:
            raise ValueError(f"{path}: --format {format} is read from files ending in {endings}")
    return files


def name_some(not_read: list[str]) -> str:
    if not not_read:
        return ""
    return f"; not read: {', '.join(not_read[:3])}"


def find_urls(source: str) -> list[str]:
    """The URL, or the URLs that its * stand for, in alphabetical order."""
    if source.startswith(("http://", "https://")) and "*" not in source:
        return [source]
    try:
        from fsspec.core import url_to_fs

        file_system, path = url_to_fs(source)
        if "*" not in source:
            return [source]
        return [file_system.unstrip_protocol(name) for name in sorted(file_system.glob(path))]
    except Exception as problem:  # each kind of storage raises its own exceptions
        raise ValueError(explain_opening(source, problem)) from None


def walk(folder: str, kinds: list[str]) -> Files:
    """All files below a folder in alphabetical order. Links are followed, and no file is read twice.

    Raises:
        OSError: a folder cannot be read.
        ValueError: a folder holds the splits of a DatasetDict, which must not be mixed.
    """
    files = Files()
    known = {os.path.realpath(folder)}  # real paths, for a link may lead to what was already read, or back up
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse_folder):
        if "dataset_dict.json" in names:
            splits = sorted(path.parent.name for path in Path(parent).glob("*/state.json")) or ["train"]
            raise ValueError(f"{parent} holds several splits: {', '.join(splits)}; name one of them, such as "
                             f"--input {Path(parent) / splits[-1]}")  # fmt: skip
        folders.sort()
        for name in list(folders):
            path = str(Path(parent) / name)
            if is_hidden(name):
                files.not_read.append(f"{path} (a hidden folder)")
                folders.remove(name)
            elif os.path.realpath(path) in known:
                files.not_read.append(f"{path} (a link to a folder that is read already)")
                folders.remove(name)
            else:
                known.add(os.path.realpath(path))
        for name in names:
            path = str(Path(parent) / name)
            if not os.path.isfile(path):
                files.not_read.append(f"{path} (no regular file)")
            elif kind_of(path) not in kinds:
                files.not_read.append(f"{path} (its ending)")
            elif os.path.realpath(path) in known:
                files.not_read.append(f"{path} (a link to a file that is read already)")
            else:
                known.add(os.path.realpath(path))
                sort_out(path, files)
    files.paths.sort(key=Path)
    files.not_read.sort(key=Path)
    return files


def refuse_folder(problem: OSError) -> None:
    """os.walk would leave out a folder that it cannot read without a word."""
    raise problem


def sort_out(path: str, files: Files) -> None:
    """Puts a file that was found, and not named by the user, to those that are read or to those that are not."""
    name = Path(path).name
    if is_hidden(name):
        files.not_read.append(f"{path} (a hidden file)")
    elif name in METADATA_FILES:
        files.not_read.append(f"{path} (describes a data set)")
    else:
        files.paths.append(path)


def is_hidden(name: str) -> bool:
    """Jupyter's .ipynb_checkpoints and macOS's ._train.jsonl and __MACOSX hold copies of the data."""
    return name.startswith(".") or name == "__MACOSX"


# -------------------------------------------------------------------------------------------------------------------
# Opening a file
# -------------------------------------------------------------------------------------------------------------------


def open_file(path: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if it begins as gzip or zstd files do.

    Raises:
        ValueError: it begins like something that has no rows.
    """
    if path == "-":
        file = sys.stdin.buffer
    elif path.startswith(("http://", "https://")):
        file = open_web_address(path)
    elif "://" in path:
        import fsspec

        file = io.BufferedReader(fsspec.open(path, "rb").open())
    else:
        file = open(path, "rb")
    beginning = file.peek(64)[:64]
    for wrong, remedy in WRONG_BEGINNINGS.items():
        is_document = wrong.startswith(b"<") and kind_of(path) == ".txt"  # HTML is a text like any other
        if beginning.lower().startswith(wrong.lower()) and not is_document:
            raise ValueError(remedy)
    if beginning.startswith(b"PAR1") and kind_of(path) != ".parquet":
        raise ValueError("it is a Parquet file; give it a name that ends in .parquet")
    if beginning.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if beginning.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    return file


class WebFile(io.RawIOBase):
    """The answer of a web server. urllib takes a connection that breaks for the end of the file; here it is an error.

    fsspec, which reads other addresses, needs the package aiohttp for those of the web.
    """

    def __init__(self, address: str):
        self.response = urllib.request.urlopen(address, timeout=SECONDS_WITHOUT_ANSWER)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        num_bytes = self.response.readinto(buffer)
        if num_bytes == 0 and self.response.length:  # what the server announced and did not send
            raise OSError(f"the connection broke {self.response.length:,} bytes before the end")
        return num_bytes

    def close(self) -> None:
        self.response.close()
        super().close()


def open_web_address(address: str) -> io.BufferedIOBase:
    file = io.BufferedReader(WebFile(address))
    if kind_of(address) not in (".parquet", ".arrow"):
        return file
    # The end of such a file says where its rows are, so it has to be here as a whole; on a disk it takes no memory.
    with file:
        copy = tempfile.TemporaryFile()
        shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


def explain_opening(path: str, problem: Exception) -> str:
    """What happened when a file was opened or read, and what to do; the caller names the file."""
    protocol = path.partition("://")[0]
    if isinstance(problem, ImportError):
        packages = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
        package = packages.get(protocol, "the package that it names")
        return f"reading {protocol}:// needs a package that is not installed ({problem}); pip install {package}"
    reason = str(problem) or type(problem).__name__
    if "://" in path:
        return f"cannot be read ({reason}); check the address, or download the file and name that"
    return f"cannot be read ({reason})"


def hash_files(paths: list[str]) -> str:
    """SHA-256 of the files' bytes, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------------
# Reading rows
# -------------------------------------------------------------------------------------------------------------------


class RawRow(NamedTuple):
    """A row as it stands in a file. Lines and .txt files stay bytes, which a worker parses."""

    file: int  # index of the file
    number: int  # of the line, or of the row where a file has no lines
    content: bytes | dict


def read_chunks(paths: list[str], shard: str) -> Iterator[list[RawRow]]:
    """Yields some hundred rows at a time, in the order of the files: those of this machine's --shard I/N.

    Machines share the files if there is one for each. Otherwise each of them reads all files and takes every N-th row.

    Raises:
        ValueError: a file cannot be read.
    """
    part, num_parts = map(int, shard.split("/"))
    share_files = len(paths) >= num_parts
    chunk = []
    num_bytes = 0
    num_rows = 0
    for index, path in enumerate(paths):
        if share_files and index % num_parts != part - 1:
            continue
        for number, content in read_rows(path):
            num_rows += 1
            if not share_files and (num_rows - 1) % num_parts != part - 1:
                continue
            chunk.append(RawRow(index, number, content))
            num_bytes += approximate_size(content)
            if len(chunk) == CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
                yield chunk
                chunk = []
                num_bytes = 0
    if chunk:
        yield chunk


def approximate_size(content: bytes | dict) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(len(value) for value in content.values() if isinstance(value, str | list))


def read_rows(path: str) -> Iterator[tuple[int, bytes | dict]]:
    """Yields (number of the line or row, row) of one file.

    Raises:
        ValueError: the file as a whole cannot be read, so that no row of it can be named.
    """
    readers = {".jsonl": read_lines, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet, ".txt": read_text}
    try:
        if kind_of(path) == ".arrow":
            yield from read_arrow(path)
        else:
            with open_file(path) as file:
                yield from readers[kind_of(path)](file)
    except json.JSONDecodeError as problem:
        hint = ""
        if problem.msg == "Extra data":
            hint = "; if each line is a row, name the file .jsonl"
        raise ValueError(f"{path}, line {problem.lineno}: not JSON ({problem}){hint}") from None
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not UTF-8 ({problem}); convert it, for example with iconv") from None
    except Exception as problem:  # each kind of file and of storage raises its own exceptions
        raise ValueError(f"{path}: {explain_opening(path, problem)}") from None


def read_lines(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # files from Windows begin with a byte order mark
        if line.strip():
            yield number, line


def read_text(file: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    yield 1, file.read()


def read_json(file: io.BufferedIOBase) -> Iterator[tuple[int, dict]]:
    rows = json.loads(file.read().decode("utf-8-sig"))
    if isinstance(rows, dict) and is_pubmedqa(rows):
        rows = list(rows.values())
    if isinstance(rows, dict):
        raise ValueError(f"a JSON file holds a list of rows, this one holds a dict with the keys {name_keys(rows)}; "
                         "put its rows into [ ], or write each on a line of a .jsonl file")  # fmt: skip
    if not isinstance(rows, list):
        raise ValueError(f"a JSON file holds a list of rows, this one holds a {type(rows).__name__}")
    yield from enumerate(rows, 1)


def is_pubmedqa(rows: dict) -> bool:
    """PubMedQA's own files are one object: {"21645374": {"QUESTION": ...}, ...}."""
    return all(isinstance(row, dict) and "QUESTION" in row for row in rows.values())


def name_keys(row: dict) -> str:
    names = [str(name) for name in row]
    if len(names) > 12:
        names = [*names[:12], "..."]
    return ", ".join(names)


def read_csv(file: io.BufferedIOBase) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)
    # strict: without it, a quote that is never closed swallows all rows behind it without a word.
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    start = 1
    try:
        names = reader.fieldnames or []
        check_header(names)
        start = reader.line_num + 1
        for row in reader:
            yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as problem:
        raise ValueError(f"the row that begins in line {start} is not CSV: {problem}; a text with quotes, commas or "
                         'line ends stands in quotes, and each quote in it is doubled ("")') from None  # fmt: skip


def check_header(names: list[str]) -> None:
    """Raises ValueError if the first line is not that of a CSV file with commas."""
    if len(names) == 1:
        for separator, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if separator in names[0]:
                raise ValueError(f"its columns are separated by {word}; save it with commas")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the column {twice!r} stands in the header twice; rename one of them")


def read_parquet(file: io.BufferedIOBase) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(CHUNK_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield number, drop_nulls(row)


def read_arrow(path: str) -> Iterator[tuple[int, dict]]:
    """A file that save_to_disk of `datasets` wrote."""
    from datasets import Dataset

    for number, row in enumerate(Dataset.from_file(path), 1):
        yield number, drop_nulls(row)


def drop_nulls(value):
    """`value` without the fields that are null: in a table all rows have the fields of any row, also inside lists."""
    if isinstance(value, dict):
        return {name: drop_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


# -------------------------------------------------------------------------------------------------------------------
# One row
# -------------------------------------------------------------------------------------------------------------------


def parse_row(content: bytes | dict, path: str) -> dict:
    """A row as Python data.

    Raises:
        ValueError: it is not UTF-8, or not a JSON object.
    """
    if kind_of(path) == ".txt":
        return {"text": decode(content, "utf-8-sig").replace("\r\n", "\n")}
    row = content
    if isinstance(content, bytes):
        try:
            row = json.loads(decode(content, "utf-8"))
        except (json.JSONDecodeError, RecursionError) as problem:
            raise ValueError(f"not JSON ({problem})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, this is a {type(row).__name__}")
    if kind_of(path) == ".csv" and (None in row or None in row.values()):
        raise ValueError("it has more or fewer fields than the header")
    return row


def decode(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as problem:
        raise ValueError(f"not UTF-8 ({problem}); convert it, for example with iconv") from None


def name_place(path: str, number: int) -> str:
    """Where a row stands, as a user would look for it."""
    if path == "-":
        return f"stdin, line {number}"
    if kind_of(path) == ".txt":
        return path
    if kind_of(path) in (".json", ".parquet", ".arrow"):
        return f"{path}, row {number}"
    return f"{path}, line {number}"
