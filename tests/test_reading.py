"""What lies in a folder or a file is read once, or named: nothing is swallowed, doubled, or ends in a traceback."""

import csv
import functools
import http.server
import io
import json
import os
import socket
import sys
import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_sample import reading

ROW = {"instruction": "Say hi.", "output": "Hi."}
LINE = json.dumps(ROW) + "\n"


def read_all(source, format: str = "alpaca") -> tuple[list[dict], reading.Files]:
    """All rows of an input as Python data, and its files."""
    files = reading.find_files(str(source), format)
    rows = []
    for chunk in reading.read_chunks(files.paths, "1/1"):
        for raw in chunk:
            rows.append(reading.parse_row(raw.content, files.paths[raw.file]))
    return rows, files


# -------------------------------------------------------------------------------------------------------------------
# Folders
# -------------------------------------------------------------------------------------------------------------------


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_a_folder_is_read_without_copies_and_metadata_and_all_of_them_are_named(tmp_path):
    write_tree(
        tmp_path,
        {
            "train.jsonl": LINE * 2,
            "deeper/more.jsonl": LINE,
            "deeper/notes.docx": "x",
            ".ipynb_checkpoints/train-checkpoint.jsonl": LINE * 2,
            "._train.jsonl": "\x00",
            ".hidden.jsonl": LINE,
            "__MACOSX/train.jsonl": LINE,
            "dataset_info.json": "{}",
            "deeper/dataset_infos.json": "{}",
            "README.md": "x",
        },
    )
    rows, files = read_all(tmp_path)
    assert rows == [ROW] * 3
    found = {}
    for text in files.not_read:
        path, _, reason = text.partition(" (")
        found[str(Path(path).relative_to(tmp_path))] = reason.rstrip(")")
    assert found == {
        ".ipynb_checkpoints": "a hidden folder",
        "__MACOSX": "a hidden folder",
        "._train.jsonl": "a hidden file",
        ".hidden.jsonl": "a hidden file",
        "README.md": "its ending",
        "dataset_info.json": "describes a data set",
        "deeper/dataset_infos.json": "describes a data set",
        "deeper/notes.docx": "its ending",
    }


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    write_tree(tmp_path, {"elsewhere/a.jsonl": LINE, "in/b.jsonl": LINE * 2})
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in" / "b.jsonl", tmp_path / "in" / "c.jsonl")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    os.symlink(tmp_path / "gone", tmp_path / "in" / "dead.jsonl")
    rows, files = read_all(tmp_path / "in")
    assert len(rows) == 3
    assert [Path(path).name for path in files.paths] == ["b.jsonl", "a.jsonl"]
    assert len(files.not_read) == 3


def test_a_glob_does_not_read_metadata_either(tmp_path):
    write_tree(tmp_path, {"a.json": json.dumps([ROW]), "dataset_info.json": "{}"})
    rows, files = read_all(tmp_path / "*.json")
    assert rows == [ROW] and len(files.not_read) == 1


def test_a_file_that_the_user_names_is_read_whatever_its_name(tmp_path):
    write_tree(tmp_path, {".train.jsonl": LINE})
    assert read_all(tmp_path / ".train.jsonl")[0] == [ROW]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """os.walk would leave it out without a word."""
    write_tree(tmp_path, {"a.jsonl": LINE, "private/b.jsonl": LINE})
    scandir = os.scandir

    def scan(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(OSError, match="Permission denied.*private"):
        reading.find_files(str(tmp_path), "alpaca")


def test_an_empty_folder_names_what_it_holds(tmp_path):
    write_tree(tmp_path, {".train.jsonl": LINE, "notes.txt": "x"})
    with pytest.raises(ValueError, match=r"no file ending in .jsonl.*not read: .*\.train.jsonl .a hidden file., "):
        reading.find_files(str(tmp_path), "alpaca")


def test_what_save_to_disk_wrote_is_read_and_its_splits_are_not_mixed(tmp_path):
    nested = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": "b"}]}
    datasets.Dataset.from_list([nested] * 3).save_to_disk(tmp_path / "one", num_shards=2)
    rows, files = read_all(tmp_path / "one", "chat")
    # The fields that a message lacks are null in a table, and are not there in the row.
    assert rows == [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": "b"}]}] * 3
    assert len(files.paths) == 2 and len(files.not_read) == 2
    both = datasets.DatasetDict(train=datasets.Dataset.from_list([ROW]), test=datasets.Dataset.from_list([ROW]))
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="both holds several splits: test, train; name one of them.*both/train"):
        reading.find_files(str(tmp_path / "both"), "alpaca")
    assert read_all(tmp_path / "both" / "test")[0] == [ROW]


# -------------------------------------------------------------------------------------------------------------------
# CSV
# -------------------------------------------------------------------------------------------------------------------

CSV = {  # what the file holds, and what the message names
    "a quote that is never closed": ('instruction,output\na,b\nc,"Hi\nd,Ho\n', ["begins in line 3", "doubled"]),
    "quotes inside a quoted field": ('instruction,output\nb,"He said "hi" to me"\n', ["begins in line 2", "doubled"]),
    "semicolons": ("instruction;output\na;b\n", ["separated by semicolons; save it with commas"]),
    "tabs": ("instruction\toutput\na\tb\n", ["separated by tabs"]),
    "a column twice": ("instruction,output,output\na,b,c\n", ["'output' stands in the header twice"]),
}


@pytest.mark.parametrize("case", CSV)
def test_a_csv_file_that_is_none_is_refused_as_a_whole(tmp_path, case):
    content, fragments = CSV[case]
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(ValueError) as raised:
        read_all(tmp_path / "in.csv")
    assert [fragment for fragment in ["in.csv", *fragments] if fragment not in str(raised.value)] == []


@pytest.mark.parametrize("content", ["instruction,output\na,b,c\n", "instruction,output\na\n"])
def test_a_csv_row_with_more_or_fewer_fields_is_named(tmp_path, content):
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(ValueError, match="more or fewer fields than the header"):
        read_all(tmp_path / "in.csv")


def test_a_csv_field_keeps_its_quotes_commas_and_line_ends(tmp_path):
    texts = ['He said "hi"', "a, b", "one\ntwo\r\nthree", "NA", "001", " x ", "'"]
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["instruction", "output"])
    writer.writerows([["q", text] for text in texts])
    (tmp_path / "in.csv").write_bytes(content.getvalue().encode())
    assert [row["output"] for row in read_all(tmp_path / "in.csv")[0]] == texts


# -------------------------------------------------------------------------------------------------------------------
# Files that are not what their names say
# -------------------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WRONG = {
    "train.jsonl": (POINTER, "a Git LFS pointer and not the data; run `git lfs pull`"),
    "train.parquet": (POINTER, "a Git LFS pointer"),
    "train.csv": (POINTER, "a Git LFS pointer"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "a web page and not the data"),
    "wide.jsonl": (LINE.encode("utf-16"), "UTF-16; convert it with `iconv"),
    "sheet.csv": (b"PK\x03\x04rest", "a ZIP archive or an Excel file"),
    "rows.jsonl": (b"PAR1rest", "a Parquet file; give it a name that ends in .parquet"),
    "half.json": (b'[{"a": 1},', "half.json, line 1: not JSON"),
    "lines.json": ((LINE * 2).encode(), "if each line is a row, name the file .jsonl"),
    "one.json": (LINE.encode(), "a list of rows, this one holds a dict with the keys instruction, output"),
    "bytes.arrow": (b"not arrow", "bytes.arrow: cannot be read"),
    "bytes.parquet": (b"not parquet, and long enough to be looked at", "bytes.parquet: cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_something_else_says_so(tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_all(tmp_path / name)
    assert message in str(raised.value) and name in str(raised.value)


def test_a_web_page_is_a_document_like_any_other(tmp_path):
    (tmp_path / "page.txt").write_text("<!DOCTYPE html>\n<html>text</html>")
    assert read_all(tmp_path / "page.txt", "text")[0] == [{"text": "<!DOCTYPE html>\n<html>text</html>"}]


def test_pubmedqas_own_file_is_an_object_of_rows(tmp_path):
    row = {"QUESTION": "Does it help?", "CONTEXTS": ["a"], "final_decision": "yes"}
    (tmp_path / "ori_pqal.json").write_text(json.dumps({"1": row, "2": row}))
    assert read_all(tmp_path / "ori_pqal.json", "mcq")[0] == [row, row]


# -------------------------------------------------------------------------------------------------------------------
# URLs
# -------------------------------------------------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path, request):
    """The address of a web server on this machine that serves some files."""
    write_tree(tmp_path / "web", {"a.jsonl": LINE * 2, "b.jsonl": LINE})
    pq.write_table(pa.Table.from_pylist([ROW] * 3), tmp_path / "web" / "c.parquet")
    with pa.CompressedOutputStream(str(tmp_path / "web" / "d.jsonl.gz"), "gzip") as file:
        file.write(LINE.encode() * 5)
    handler = functools.partial(getattr(request, "param", QuietHandler), directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


@pytest.mark.parametrize(("name", "num_rows"), [("a.jsonl", 2), ("c.parquet", 3), ("d.jsonl.gz", 5)])
def test_a_url_is_read_in_passing(server, name, num_rows):
    assert read_all(f"{server}/{name}")[0] == [ROW] * num_rows


def test_a_glob_of_urls_is_read_where_aiohttp_is_installed(server):
    pytest.importorskip("aiohttp")  # which fsspec needs to list what a web server has
    assert read_all(f"{server}/*.jsonl")[0] == [ROW] * 3


def test_a_missing_url_ends_in_one_message(server):
    with pytest.raises(ValueError, match="none.jsonl: cannot be read .*404.*check the address, or download the file"):
        read_all(f"{server}/none.jsonl")


def test_a_server_that_does_not_answer_ends_in_one_message(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.jsonl"
    with pytest.raises(ValueError, match="a.jsonl: cannot be read .*refused.*check the address"):
        read_all(url)


class BreakingHandler(QuietHandler):
    """Announces more bytes than it sends, as a connection that breaks does."""

    def send_header(self, name: str, value: str) -> None:
        if name == "Content-Length":
            value = str(int(value) + 100)
        super().send_header(name, value)


@pytest.mark.parametrize("server", [BreakingHandler], indirect=True)
@pytest.mark.parametrize("name", ["a.jsonl", "c.parquet", "d.jsonl.gz"])
def test_a_connection_that_breaks_is_not_the_end_of_the_file(server, name):
    with pytest.raises(ValueError, match=f"{name}: cannot be read .the connection broke 100 bytes before the end"):
        read_all(f"{server}/{name}")


@pytest.mark.parametrize(("url", "module", "package"), [
    ("https://example.org/*.jsonl", "fsspec.implementations.http", "aiohttp"),
    ("s3://bucket/a.jsonl", "s3fs", "s3fs"),
    ("gs://bucket/a.jsonl", "gcsfs", "gcsfs"),
])  # fmt: skip
def test_a_missing_package_is_named(monkeypatch, url, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"needs a package that is not installed .*pip install {package}"):
        read_all(url)
