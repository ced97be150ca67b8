"""Turns raw questions, instructions, conversations or documents into the token ids that every training script reads.

    python data_sample/tokenize_dataset.py --format mcq --input data_sample/triage_train.jsonl \\
        --tokenizer_path models/SmolLM2-135M-Instruct --output data_sample/tokenized/triage_train

Formats: `mcq` (MedQA's: id, sent1, sent2, ending0 to ending3 or ending4, label), `alpaca` (instruction, input, output,
and system, history), `chat` (messages with role and content, or ShareGPT's conversations with from and value) and
`text` (documents, for continued pretraining). Files: .jsonl, .json with a list, .csv, .parquet and, for `text`, .txt
with one document each; compressed with gzip or zstd or not; one file, a folder, a glob, a URL, or `-` for JSONL from
stdin.

The prompt is rendered with the tokenizer's chat template where it has one and with a plain template otherwise, and
carries no loss unless --train_on_prompt True. Each answer ends with EOS, which is a target, and each row begins with
exactly one BOS where the tokenizer adds one.

Writes a `datasets` folder with `input_ids`, `labels` (-100 where no loss) and, with --packing True, `position_ids`.
Rows of `mcq` that are not packed also keep `options`, every option's completion, for tools/evaluate.py. Documents that
are not packed keep all their ids and have no labels: training draws passages from them (--random_passage True).
`ledger.json` in it says: rows and tokens in = kept + lost for each reason, the template, and the tokenizer's hash.
The folder appears under its name only when it is complete.

How it works: the input is cut into chunks of some hundred rows, each worker turns chunks into arrays of ids, and the
arrays are written in the order of the input. So memory does not grow with the input, and the result does not depend on
the number of workers.
"""

import csv
import ctypes
import gc
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import zlib
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute

IGNORE_INDEX = -100
CHUNK_ROWS, CHUNK_BYTES = 512, 1 << 20  # what a worker gets at once
WRITE_TOKENS = 4_000_000  # what is gathered before it is packed and written
SHOWN_BROKEN_ROWS = 10

PLAIN_MCQ = "{question}\n\n### Answer:\n"
PLAIN_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PLAIN_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names; others stay as they are

# The letters that tell a text's language; what has none of them is counted as Latin or other.
SCRIPTS = {
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Korean": re.compile("[\uac00-\ud7af\u1100-\u11ff]"),
    "Chinese": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Cyrillic": re.compile("[\u0400-\u052f]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Indic": re.compile("[\u0900-\u0dff]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
LANGUAGES = [*SCRIPTS, "Latin", "other"]

# Where a row or a token can go besides "kept", and what the printed table calls it.
LOST = {
    "broken": "dropped: broken row",
    "no_target": "dropped: nothing to learn (empty answer or text)",
    "special_token": "dropped: text spells a special token",
    "too_long": "dropped: longer than --max_length",
    "truncated": "cut off: beyond --max_length",
    "other_split": "in the other split (--val_size)",
}


@dataclass
class Arguments:
    input: str = field(
        default="",
        metadata={
            "help": "a file, a folder, a glob in quotes, a URL (with --streaming True), or - for JSONL from stdin"
        },
    )
    format: str = field(default="mcq", metadata={"help": "mcq | alpaca | chat | text"})
    tokenizer_path: str = field(
        default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model to be trained"}
    )
    output: str = field(default="", metadata={"help": "folder to write, below data_sample/tokenized/ for example"})
    max_length: int = field(
        default=512, metadata={"help": "most tokens of a row; documents that are not packed may have more"}
    )
    on_long: str = field(
        default="drop",
        metadata={"help": "a longer row: drop | truncate | split (into rows) | error; the ledger counts each"},
    )
    packing: bool = field(
        default=False, metadata={"help": "join whole documents into rows of at most --max_length tokens"}
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "give the prompt's tokens a loss, too"})
    answer: str = field(
        default="text",
        metadata={
            "help": "mcq: complete with the option's text | letter (small models do not bind letters to options)"
        },
    )
    template: str | None = field(
        default=None, metadata={"help": "mcq: text file with {question} where question and options go"}
    )
    on_bad_row: str = field(
        default="error", metadata={"help": "a row that is broken or lacks a field: error | skip; both name it"}
    )
    val_size: float = field(
        default=0.0, metadata={"help": "share of the rows for a second folder, <output>_val; drawn by --seed"}
    )
    seed: int = field(default=42, metadata={"help": "seed of the validation rows"})
    num_proc: int = field(default=1, metadata={"help": "worker processes; the output is the same for any number"})
    shard: str = field(
        default="1/1",
        metadata={"help": "I/N: the I-th of N parts, one for each machine; written to <output>-I-of-N"},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read the input once, in passing, and store no hash of it: for what no disk can hold"},
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file to write with the histogram of lengths"})


def check_arguments(args: Arguments) -> None:
    """Raises ValueError with every mistake that can be seen before anything is read."""
    mistakes = []
    if not args.input:
        mistakes.append("--input is missing: name a .jsonl or .json file, such as data_sample/triage_train.jsonl")
    elif "://" in args.input and not args.streaming:
        mistakes.append(f"--input {args.input}: a URL is read in passing; add --streaming True")
    else:
        try:
            list_files(args)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--input {args.input}: {problem}")
    for name, choices in (
        ("format", "mcq, alpaca, chat or text"),
        ("answer", "text or letter"),
        ("on_long", "drop, truncate, split or error"),
        ("on_bad_row", "error or skip"),
    ):
        if getattr(args, name) not in re.findall(r"\w+", choices.replace(" or ", " ")):
            mistakes.append(f"--{name} {getattr(args, name)}: choose {choices}")
    if args.max_length < 2:
        mistakes.append(f"--max_length {args.max_length}: a row has at least 2 tokens")
    if args.format == "mcq" and args.on_long in ("truncate", "split"):
        mistakes.append(f"--on_long {args.on_long}: the answer, which is what is learned, stands at the end of a "
                        "question and would be cut off; choose drop or error, or raise --max_length")  # fmt: skip
    if args.template and args.format != "mcq":
        mistakes.append(f"--template {args.template}: only --format mcq takes one")
    elif args.template:
        try:
            if "🙂" not in Path(args.template).read_text(encoding="utf-8-sig").format(question="🙂"):
                raise ValueError("it has no {question}")
        except (ValueError, OSError, LookupError, AttributeError) as problem:
            mistakes.append(f"--template {args.template}: {problem!r}; write {{question}} where question and options "
                            "go, and {{ }} for braces")  # fmt: skip
    if not 0 <= args.val_size < 1:
        mistakes.append(f"--val_size {args.val_size}: a share of the rows, at least 0 and below 1")
    if args.num_proc < 1:
        mistakes.append(f"--num_proc {args.num_proc}: must be at least 1")
    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        mistakes.append(f"--shard {args.shard}: I/N with I from 1 to N, such as 1/4 to 4/4 on four machines")
    if args.plot and not args.plot.endswith(".png"):
        mistakes.append(f"--plot {args.plot}: name a .png file")
    if args.plot and find_spec("matplotlib") is None:
        mistakes.append(f"--plot {args.plot}: needs matplotlib (pip install matplotlib); the histogram is printed, too")
    if not args.output:
        mistakes.append("--output is missing: name the folder to write, such as data_sample/tokenized/triage_train")
    for output in output_folders(args).values() if args.output and part else ():
        is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        folder = existing_parent(output)
        if not is_free and not (output / "ledger.json").is_file():
            mistakes.append(f"--output {output}: exists and is not a tokenized set; choose another folder")
        elif not folder.is_dir() or not os.access(folder, os.W_OK):
            mistakes.append(f"--output {output}: {folder} is no writable folder; choose another")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def output_folders(args: Arguments) -> dict[str, Path]:
    """The folder of each split: `train` and, with --val_size, `val`."""
    part, num_parts = args.shard.split("/")
    names = {"train": args.output.rstrip("/")} | ({"val": args.output.rstrip("/") + "_val"} if args.val_size else {})
    suffix = "" if num_parts == "1" else f"-{part}-of-{num_parts}"
    return {split: Path(name + suffix) for split, name in names.items()}


def existing_parent(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())


# -------------------------------------------------------------------------------------------------------------------
# Reading: raw rows in chunks, without parsing more than must be
# -------------------------------------------------------------------------------------------------------------------


@lru_cache
def kind(path: str) -> str:
    """`.jsonl` for corpus/part-1.jsonl.zst, and for stdin."""
    return ".jsonl" if path == "-" else Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def list_files(args: Arguments) -> tuple[list[str], list[str]]:
    """The input's files in a fixed order, and the files of a folder that are not read because of their ending.

    Raises:
        ValueError: there is none, or one of them has an ending that --format is not read from.
    """
    kinds = [".jsonl", ".json", ".csv", ".parquet"] + [".txt"] * (args.format == "text")
    others = []
    if args.input == "-":
        files = ["-"]
    elif "://" in args.input:
        from fsspec.core import url_to_fs

        file_system, path = url_to_fs(args.input)
        found = sorted(file_system.glob(path)) if "*" in path else [path]
        files = [file_system.unstrip_protocol(name) for name in found]
    elif Path(args.input).is_dir():
        inside = [path for path in sorted(Path(args.input).rglob("*")) if path.is_file()]
        files = [str(path) for path in inside if kind(str(path)) in kinds]
        others = [str(path) for path in inside if kind(str(path)) not in kinds]
    elif Path(args.input).is_file():
        files = [args.input]
    else:
        files = sorted(path for path in glob.glob(args.input, recursive=True) if Path(path).is_file())
    endings = ", ".join(kinds) + ", or these with .gz or .zst behind"
    if not files:
        raise ValueError(f"no file ending in {endings}" if Path(args.input).is_dir() else "no such file")
    for path in files:
        if kind(path) not in kinds:
            raise ValueError(f"{path}: --format {args.format} is read from files ending in {endings}")
    return files, others


def open_file(path: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed if it begins as gzip or zstd files do."""
    if "://" in path:
        import fsspec

        file = io.BufferedReader(fsspec.open(path, "rb").open())
    else:
        file = sys.stdin.buffer if path == "-" else open(path, "rb")
    beginning = file.peek(4)[:4]
    if beginning[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if beginning == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    return file


def read_rows(path: str) -> Iterator[tuple[int, bytes | dict]]:
    """Yields (number of line or row, row) of one file. Lines and .txt files stay bytes, which a worker will parse.

    Raises:
        ValueError: the file as a whole cannot be read, so that no row of it can be named.
    """
    with open_file(path) as file:
        if kind(path) == ".jsonl":
            for number, line in enumerate(file, 1):
                line = (
                    line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                )  # files from Windows begin with a BOM
                if line.strip():
                    yield number, line
        elif kind(path) == ".txt":
            yield 1, file.read()
        elif kind(path) == ".csv":
            csv.field_size_limit(2**31 - 1)
            reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
            for row in reader:
                if (row.get("label") or "").strip().isdecimal():
                    row["label"] = int(row["label"])  # a CSV file holds nothing but texts
                yield reader.line_num, row
        elif kind(path) == ".parquet":
            import pyarrow.parquet

            number = 0
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(CHUNK_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
        else:
            rows = json.loads(file.read().decode("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError(f"a JSON file holds a list of rows, this one holds a {type(rows).__name__}")
            yield from enumerate(rows, 1)


def read_chunks(args: Arguments, files: list[str]) -> Iterator[list[tuple[int, int, bytes | dict]]]:
    """Yields lists of (index of the file, number of line or row, row): those of this machine's --shard.

    Machines share the files if there is one for each, and the rows otherwise, which each then reads all.
    """
    part, num_parts = map(int, args.shard.split("/"))
    by_file = len(files) >= num_parts
    chunk, size, num_rows = [], 0, 0
    for index, path in enumerate(files):
        if by_file and index % num_parts != part - 1:
            continue
        try:
            for number, row in read_rows(path):
                num_rows += 1
                if not by_file and (num_rows - 1) % num_parts != part - 1:
                    continue
                chunk.append((index, number, row))
                size += len(row) if isinstance(row, bytes) else sum(map(len, map(str, row))) if row else 0
                if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
        except json.JSONDecodeError as problem:
            hint = "; if each line is a row, name the file .jsonl" if problem.msg == "Extra data" else ""
            raise ValueError(f"{path}, line {problem.lineno}: not JSON ({problem}){hint}") from None
        except UnicodeDecodeError as problem:
            raise ValueError(f"{path}: not UTF-8 ({problem}); convert it, for example with iconv") from None
        except (EOFError, zlib.error, pa.ArrowException, csv.Error, ValueError, OSError) as problem:
            raise ValueError(f"{path}: cannot be read ({problem})") from None
    if chunk:
        yield chunk


def hash_files(files: list[str]) -> str:
    """SHA-256 of the files' bytes, one behind the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------------
# Rows: their shape, and the text that they become
# -------------------------------------------------------------------------------------------------------------------


def parse(raw: bytes | dict, path: str) -> dict:
    """A row as Python data.

    Raises:
        ValueError: it is not UTF-8, or not a JSON object.
    """
    row = raw
    if isinstance(raw, bytes):
        try:
            text = raw.decode("utf-8-sig" if kind(path) == ".txt" else "utf-8")
            row = {"text": text.replace("\r\n", "\n")} if kind(path) == ".txt" else json.loads(text)
        except UnicodeDecodeError as problem:
            raise ValueError(f"not UTF-8 ({problem}); convert it, for example with iconv") from None
        except (json.JSONDecodeError, RecursionError) as problem:
            raise ValueError(f"not JSON ({problem})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, this is a {type(row).__name__}")
    if None in row or None in row.values() and kind(path) == ".csv":
        raise ValueError("it has more or fewer fields than the header")
    return row


def check_text(text, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"field {name} is not a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a character (a lone surrogate), which has no UTF-8") from None


def check_row(row: dict, format: str) -> None:
    """Raises ValueError naming the field of a row that does not have its format's shape."""
    num_options = 5 if row.get("ending4") else 4
    options = [f"ending{i}" for i in range(num_options)]
    required = {"mcq": ["sent1", "sent2", *options], "alpaca": ["instruction", "output"], "text": ["text"], "chat": []}
    for name in required[format] + [name for name in ("input", "system") if name in row and format == "alpaca"]:
        if name not in row:
            raise ValueError(f"field {name} is missing")
        check_text(row[name], name)
        if name in options and not row[name].strip():
            raise ValueError(f"field {name} is empty, so letters and label would not fit the options")
    if format == "mcq" and not (type(row.get("label")) is int and 0 <= row["label"] < num_options):
        raise ValueError(f"field label is {row.get('label')!r}, expected a number from 0 to {num_options - 1}")
    if format == "alpaca":
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError("field history is not a list of pairs [instruction, output]")
        for text in (text for pair in history for text in pair):
            check_text(text, "history")


def read_messages(row: dict) -> list[dict]:
    """The messages of a conversation, from `messages` or ShareGPT's `conversations`.

    Raises:
        ValueError: it does not have the shape of either, or nothing could be learned from an assistant's turn.
    """
    name, role, content = ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
    if name not in row:
        raise ValueError("field messages (or conversations) is missing")
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name} is not a list of messages")
    messages = []
    if row.get("system") and name == "conversations":
        check_text(row["system"], "system")
        messages.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(turns, 1):
        check_text(turn.get(role), f"{name}, turn {number}: {role}")
        check_text(turn.get(content), f"{name}, turn {number}: {content}")
        messages.append({"role": ROLES.get(turn[role], turn[role]), "content": turn[content]})
        if messages[-1]["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"field {name}, turn {number}: {role} is {turn[role]!r}, expected user or assistant")
        if messages[-1]["role"] == "assistant" and not turn[content].strip():
            raise ValueError(f"field {name}, turn {number}: the assistant says nothing, so nothing could be learned")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"field {name}: the assistant has no turn, so nothing could be learned")
    return messages


def make_template(args: Arguments, chat: bool) -> dict:
    """How a row becomes a prompt: plain data, kept in the ledger so that generation renders what training saw."""
    template = {"format": args.format, "chat": chat}
    if args.format == "mcq":
        template["answer"] = args.answer
        template["option"] = "{letter}. {text}" if args.answer == "letter" else "- {text}"
        template["prompt"] = "{question}" if chat else PLAIN_MCQ
        if args.template:
            template["prompt"] = Path(args.template).read_text(encoding="utf-8-sig")
    elif args.format == "alpaca":
        template["prompt"] = "{instruction}" if chat else PLAIN_ALPACA
        template["prompt_with_input"] = "{instruction}\n\n{input}" if chat else PLAIN_ALPACA_WITH_INPUT
    return template


def render_prompt(row: dict, template: dict) -> str:
    """The prompt of a raw row without its answer; the same function stands in every program that renders rows."""
    if template["format"] == "mcq":
        endings = [row[f"ending{i}"] for i in range(5) if row.get(f"ending{i}")]
        options = [template["option"].format(letter="ABCDE"[i], text=text) for i, text in enumerate(endings)]
        question = "\n".join(part for part in (row["sent1"], row["sent2"], *options) if part)
        return template["prompt"].format(question=question)
    name = "prompt_with_input" if row.get("input") else "prompt"
    return template[name].format(instruction=row["instruction"], input=row.get("input", ""))


def render_answers(row: dict, template: dict) -> list[str]:
    """The texts that could be the answer, the right one first: an option's text or letter, or the output."""
    if template["format"] == "alpaca":
        return [row["output"]]
    endings = [row[f"ending{i}"] for i in range(5) if row.get(f"ending{i}")]
    answers = list("ABCDE"[: len(endings)]) if template["answer"] == "letter" else endings
    return [answers.pop(row["label"]), *answers]


def render_messages(row: dict, template: dict) -> list[dict]:
    """The messages before the answer: the prompt, behind Alpaca's `system` and `history`, which carry no loss."""
    messages = []
    if template["format"] == "alpaca":
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
        for instruction, output in row.get("history") or []:
            question = render_prompt({"instruction": instruction}, template)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return [*messages, {"role": "user", "content": render_prompt(row, template)}]


def render_plain(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    """A conversation for a tokenizer without a chat template; as in render_chat, but its last turn is the target."""
    *before, answer = messages
    eos = tokenizer.eos_token
    ends = {"system": "\n\n", "user": "", "assistant": f"{eos}\n\n"}
    prompt = "".join(message["content"] + ends[message["role"]] for message in before)
    return [(prompt, False), (answer["content"] + eos, True)]


def render_chat(tokenizer, conversations: list[list[dict]], every_turn: bool) -> list[list[tuple[str, bool]]]:
    """Each conversation by the chat template: texts that follow one another, and whether they are a target.

    Targets are the assistant's turns, all or only the last, each with the EOS that the template writes behind it; the
    last target always ends with EOS.

    Raises:
        ValueError: the chat template does not render a conversation as its prompt followed by the answer.
    """
    turns_of = []
    for messages in conversations:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        turns_of.append(turns if every_turn else turns[-1:])
    until = [messages[:turn] for messages, turns in zip(conversations, turns_of, strict=True) for turn in turns]
    through = [messages[: turn + 1] for messages, turns in zip(conversations, turns_of, strict=True) for turn in turns]
    prompts = iter(tokenizer.apply_chat_template(until, tokenize=False, add_generation_prompt=True))
    answered = iter(tokenizer.apply_chat_template(through, tokenize=False))
    rendered = []
    for messages, turns in zip(conversations, turns_of, strict=True):
        borders = [(next(prompts), next(answered)) for _ in turns]
        text = borders[-1][1]
        if turns[-1] + 1 < len(messages):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        pieces, done = [], 0
        for prompt, answer in borders:
            # Templates write a line end behind the last EOS, which nobody ever has to predict.
            answer = answer[: len(prompt)] + answer[len(prompt) :].rstrip()
            if not (text.startswith(answer) and answer.startswith(prompt) and done <= len(prompt)):
                raise ValueError("the tokenizer's chat template does not put the answer behind its generation prompt")
            pieces += [(text[done : len(prompt)], False), (text[len(prompt) : len(answer)], True)]
            done = len(answer)
        pieces[-1] = (pieces[-1][0].removesuffix(tokenizer.eos_token) + tokenizer.eos_token, True)
        rendered.append(pieces + ([(text[done:], False)] if text[done:].strip() else []))
    return rendered


def apply_template(tokenizer, prompt: str, answer: str, chat: bool) -> tuple[str, str]:
    """(prompt, completion) as the texts to be tokenised; the completion ends with the EOS token's text."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    pieces = render_chat(tokenizer, [messages], False)[0] if chat else render_plain(tokenizer, messages)
    return pieces[0][0], pieces[1][0]


# -------------------------------------------------------------------------------------------------------------------
# Tokens
# -------------------------------------------------------------------------------------------------------------------


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS (LLaMA's do, SmolLM2's does not)."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[0] == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))
    )


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    if tokenizer.is_fast:  # without masks, checks and offsets, which take longer than the ids
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def encode_behind(tokenizer, pairs: list[tuple[str, str]]) -> list[list[int]]:
    """Ids of the second text of each pair where it follows the first one, which keeps the ids that it has alone.

    That is what happens at generation: the prompt is tokenised alone, so no token may span its end. And a text by
    itself may have other ids than behind another (SentencePiece puts a space before it). So the text is tokenised
    together with the last line before it, if that line then still begins with its own ids; else behind a line end; and
    else, which is rare, alone.
    """
    contexts = []
    for before, _ in pairs:
        last_line = before[before.rstrip().rfind("\n") + 1 :][-100:]
        contexts.append(tokenizer.eos_token if before.endswith(tokenizer.eos_token) else last_line)
    known = list({"", "\n", *contexts})
    ids_of = dict(zip(known, encode_texts(tokenizer, known), strict=True)) | {"": []}
    results = encode_texts(tokenizer, [context + text for context, (_, text) in zip(contexts, pairs, strict=True)])
    for number, (context, (_, text)) in enumerate(zip(contexts, pairs, strict=True)):
        ids = results[number]
        for fallback in ("\n", ""):
            if ids[: len(ids_of[context])] == ids_of[context]:
                break
            context = fallback
            (ids,) = encode_texts(tokenizer, [context + text])
        results[number] = ids[len(ids_of[context]) :]
    return results


def encode(tokenizer, prompt: str, completion: str, with_bos: bool) -> tuple[list[int], list[int]]:
    """Ids of prompt and completion. The prompt's are those it has alone, as at generation, so no border shifts."""
    prompt_ids, completion_ids = encode_behind(tokenizer, [("", prompt), (prompt, completion)])
    if with_bos and prompt_ids[:1] != [tokenizer.bos_token_id]:  # a chat template may have written it
        prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
    return prompt_ids, completion_ids


def language(text: str) -> str:
    """The first script that has a fifth of the letters in a sample of at most 100 characters."""
    sample = text[:: len(text) // 100 + 1]
    num_latin = len(LATIN.findall(sample))
    if not sample.isascii():
        counts = {name: len(letters.findall(sample)) for name, letters in SCRIPTS.items()}
        for name, count in counts.items():
            if count * 5 > sum(counts.values()) + num_latin:
                return name
    return "Latin" if num_latin else "other"


@dataclass
class Row:
    """A row on its way from the file to its ids."""

    place: tuple[int, int]  # index of the file, and number of the line or row in it
    conversations: list[list[dict]]  # with the right answer; then with each wrong one, where options are kept
    answer: str
    said: str  # what the file says, without templates: it tells the language
    pieces: list[tuple[str, bool]] = field(default_factory=list)  # texts that follow one another; is it a target?
    options: list[str] = field(default_factory=list)  # the completions of the wrong answers


class Tokenization:
    """All that turns a chunk of raw rows into arrays. Call it with what read_chunks yields.

    Returns:
        for each split that got rows a record batch: `input_ids`, `labels` (not for documents that stay whole) and, for
        questions that are not packed, `options`; the chunk's share of every figure of the ledger; and a message for
        each broken row.

    Raises:
        ValueError: a row is broken or too long, and that is to be an error.
    """

    def __init__(self, args: Arguments, tokenizer, template: dict, files: list[str]):
        self.args, self.tokenizer, self.template, self.files = args, tokenizer, template, files
        self.with_bos = adds_bos(tokenizer)
        self.whole_documents = args.format == "text" and not args.packing
        self.with_options = args.format == "mcq" and not args.packing
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_token = re.compile("|".join(map(re.escape, special | set(tokenizer.all_special_tokens))))
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            # A document has no template, so what spells a special token in it, as <s> in HTML does, is text.
            backend.encode_special_tokens = args.format == "text"
        # A token that is not text by itself is a byte or so of a character that the vocabulary lacks.
        ids = [[number] for number in range(max(tokenizer.get_vocab().values()) + 1)]
        decode = tokenizer.backend_tokenizer.decode_batch if tokenizer.is_fast else tokenizer.batch_decode
        self.is_fragment = np.array(["\ufffd" in text for text in decode(ids)])

    def __call__(self, chunk: list) -> tuple[dict[str, pa.RecordBatch], Counter, list[str]]:
        figures, complaints, rows = Counter(), [], []
        for file, number, raw in chunk:
            try:
                row = parse(raw, self.files[file])
                check_row(row, self.args.format)
                rows.append(self.make_row(row, (file, number)))
            except ValueError as problem:
                complaints.append(f"{self.where((file, number))}: {problem}")
        rows = self.render(rows, complaints)
        if complaints and self.args.on_bad_row == "error":
            raise ValueError(f"{complaints[0]}\n--on_bad_row skip goes on without such rows, and counts them")
        figures["rows", "in"] += len(chunk)
        figures["rows", "broken"] += len(complaints)
        return self.tokenize(rows, figures), figures, complaints

    def where(self, place: tuple[int, int]) -> str:
        file, number = place
        path = "stdin" if self.files[file] == "-" else self.files[file]
        if kind(path) == ".txt":
            return path
        return f"{path}, {'row' if kind(path) in ('.json', '.parquet') else 'line'} {number}"

    def make_row(self, raw: dict, place: tuple[int, int]) -> Row:
        if self.args.format == "text":
            return Row(place, [[{"role": "document", "content": raw["text"]}]], raw["text"], raw["text"])
        if self.args.format == "chat":
            messages = read_messages(raw)
            said = "".join(message["content"] for message in messages)
            return Row(place, [messages], messages[-1]["content"], said)
        prompt, answers = render_messages(raw, self.template), render_answers(raw, self.template)
        answers = answers if self.with_options else answers[:1]
        conversations = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
        return Row(place, conversations, answers[0], "".join(text for text in raw.values() if isinstance(text, str)))

    def render(self, rows: list[Row], complaints: list[str]) -> list[Row]:
        """Gives the rows their texts. Returns those that the chat template could render; others become complaints."""
        from jinja2 import TemplateError

        try:
            rendered = self.render_conversations(rows)
        except (ValueError, TemplateError):  # of one of them, and one by one they tell of which
            good_rows = []
            for row in rows:
                try:
                    self.render_conversations([row])
                    good_rows.append(row)
                except (ValueError, TemplateError) as problem:
                    complaints.append(f"{self.where(row.place)}: {problem}")
            rows, rendered = good_rows, self.render_conversations(good_rows)
        rendered = iter(rendered)
        for row in rows:
            row.pieces, *others = [next(rendered) for _ in row.conversations]
            row.options = [pieces[1][0] for pieces in others]
        return rows

    def render_conversations(self, rows: list[Row]) -> list[list[tuple[str, bool]]]:
        conversations = [messages for row in rows for messages in row.conversations]
        if self.args.format == "text":
            return [[(messages[0]["content"], True)] for messages in conversations]
        if not self.template["chat"]:
            return [render_plain(self.tokenizer, messages) for messages in conversations]
        return render_chat(self.tokenizer, conversations, self.args.format == "chat") if conversations else []

    def tokenize(self, rows: list[Row], figures: Counter) -> dict[str, pa.RecordBatch]:
        args, bos, eos = self.args, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pairs = []
        for row in rows:
            texts = ["", *(text for text, _ in row.pieces)]
            pairs += pairwise(texts)
            pairs += [(texts[1], option) for option in row.options]
        encoded = iter(encode_behind(self.tokenizer, pairs))

        # The ids of all rows, one behind the other; a row is where it starts and ends in them.
        parts, part_is_target, lengths, options_of = [], [], [], []
        for row in rows:
            row_parts = [next(encoded) for _ in row.pieces]
            options_of.append([row_parts[-1], *(next(encoded) for _ in row.options)] if self.with_options else [])
            if args.format == "text":
                row_parts[0] = [*row_parts[0], eos]
            if self.with_bos and row_parts[0][:1] != [bos]:  # a chat template may have written it
                row_parts[0] = [bos, *row_parts[0]]
            parts += row_parts
            part_is_target += [is_target or args.train_on_prompt for _, is_target in row.pieces]
            lengths.append(sum(map(len, row_parts)))
        part_lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(chain.from_iterable(parts), np.int32, int(part_lengths.sum()))
        is_target = np.repeat(np.array(part_is_target, bool), part_lengths)
        targets_before = np.concatenate([[0], np.cumsum(is_target)])
        eos_before = np.concatenate([[0], np.cumsum(is_target & (ids == eos))])
        ends = np.cumsum(lengths, dtype=np.int64)
        self.count_languages(rows, ids, ends, figures)

        taken: dict[str, list] = {split: [] for split in output_folders(args)}  # start and end of each written row
        options: dict[str, list] = {split: [] for split in taken}
        for row, length, end, row_options in zip(rows, lengths, ends.tolist(), options_of, strict=True):
            split = "val" if self.is_validation(row) else "train"
            fate, cuts = self.cut(row, end - length, end)
            # The first token of a row is never predicted, whatever its label.
            learned = [(a, b) for a, b in cuts if self.whole_documents or targets_before[b] > targets_before[a + 1]]
            num_cut, num_learned = (sum(b - a for a, b in pieces) for pieces in (cuts, learned))
            figures["rows", "no_target" if cuts and not learned else fate, split] += 1
            figures["tokens", "in"] += length
            figures["tokens", "truncated" if cuts else fate, split] += length - num_cut
            figures["tokens", "no_target", split] += num_cut - num_learned
            figures["tokens", "kept", split] += num_learned
            figures["truncated_rows", split] += bool(cuts) and num_cut < length
            figures["split_rows", split] += len(cuts) > 1
            figures["length", length] += 1
            for a, b in learned:
                figures["documents", split] += 1
                figures["targets", split] += int(targets_before[b] - targets_before[a + 1])
                figures["without_eos_target", split] += bool(eos_before[b] == eos_before[a + 1])
                figures["bos", int(ids[a] == bos) + int(b > a + 1 and ids[a] == bos == ids[a + 1]), split] += 1
            taken[split] += learned
            options[split] += [row_options] * len(learned)

        labels = np.where(is_target, ids, np.int32(IGNORE_INDEX))
        batches = {}
        for split, cuts in taken.items():
            if cuts:
                columns = {"input_ids": list_array([ids[a:b] for a, b in cuts])}
                if not self.whole_documents:
                    columns["labels"] = list_array([labels[a:b] for a, b in cuts])
                if self.with_options:
                    columns["options"] = pa.array(options[split], pa.list_(pa.list_(pa.int32())))
                batches[split] = pa.RecordBatch.from_pydict(columns)
        return batches

    def is_validation(self, row: Row) -> bool:
        """Drawn by the row's place in the input, so the same for every number of workers and machines."""
        digest = hashlib.blake2b(f"{self.args.seed} {row.place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.args.val_size * 2**64

    def cut(self, row: Row, start: int, end: int) -> tuple[str, list[tuple[int, int]]]:
        """What happens to a row of ids from `start` to `end`: its fate, and where the rows made of it start and end."""
        args, length = self.args, end - start
        said = (message["content"] for messages in row.conversations for message in messages)
        if not row.answer.strip() and args.format != "chat":
            return "no_target", []
        if args.format != "text" and any(map(self.special_token.search, said)):
            return "special_token", []
        if length <= args.max_length or self.whole_documents:
            return "kept", [(start, end)]
        if args.on_long == "error":
            raise ValueError(f"{self.where(row.place)}: {length} tokens, above --max_length; raise it, or choose "
                             "--on_long drop, truncate or split")  # fmt: skip
        if args.on_long == "drop":
            return "too_long", []
        if args.on_long == "truncate":
            return "kept", [(start, start + args.max_length)]
        return "kept", [(a, min(a + args.max_length, end)) for a in range(start, end, args.max_length)]

    def count_languages(self, rows: list[Row], ids: np.ndarray, ends: np.ndarray, figures: Counter) -> None:
        """Characters, tokens, and what the vocabulary could not say, for each language; templates count as well."""
        unknown = np.concatenate([[0], np.cumsum(ids == self.tokenizer.unk_token_id)])
        fragments = np.concatenate([[0], np.cumsum(self.is_fragment[ids])])
        start = 0
        for row, end in zip(rows, ends.tolist(), strict=True):
            name = language(row.said)
            figures["language", name, "rows"] += 1
            figures["language", name, "characters"] += sum(len(text) for text, _ in row.pieces)
            figures["language", name, "tokens"] += end - start
            figures["language", name, "unknown"] += int(unknown[end] - unknown[start])
            figures["language", name, "fragments"] += int(fragments[end] - fragments[start])
            start = end


def list_array(rows: list[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(rows))


# Set in each worker by start_worker: it would be slow to send the tokenizer with every chunk.
tokenization: Tokenization | None = None


def start_worker(made: Tokenization) -> None:
    global tokenization
    tokenization = made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: if that is killed, nobody stays behind


def work(chunk: list) -> tuple[dict[str, pa.RecordBatch], Counter, list[str]]:
    return tokenization(chunk)


def tokenize_chunks(made: Tokenization, num_proc: int, chunks: Iterator[list]) -> Iterator[tuple]:
    """The results for all chunks in their order. Only a few chunks per worker are read ahead, so memory stays flat."""
    if num_proc == 1:
        yield from map(made, chunks)
        return
    executor = ProcessPoolExecutor(num_proc, get_context("fork"), start_worker, (made,))
    try:
        ahead = deque()
        for chunk in chunks:
            ahead.append(executor.submit(work, chunk))
            if len(ahead) > 3 * num_proc:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"--num_proc {num_proc}: a worker was killed, perhaps because memory ran out; use fewer"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------------------------
# Packing
# -------------------------------------------------------------------------------------------------------------------


def pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: lists of document indices whose lengths add up to at most `max_length`."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_bins, (lengths[index], 0))
        if at == len(open_bins):
            room, number = max_length, len(bins)
            bins.append([])
        else:
            room, number = open_bins.pop(at)
        bins[number].append(index)
        insort(open_bins, (room - lengths[index], number))
    return bins


def join_documents(table: pa.Table, max_length: int) -> pa.Table:
    """Packs rows: documents one behind the other, with positions that restart at each."""
    lengths = pa.compute.list_value_length(table["input_ids"]).to_numpy()
    bins = pack(lengths.tolist(), max_length)
    order = np.concatenate(bins)
    ends = np.cumsum([0, *(lengths[members].sum() for members in bins)]).astype(np.int32)
    lengths = lengths[order]
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    taken = table.take(order).combine_chunks()
    columns = {name: taken[name].chunk(0).values for name in ("input_ids", "labels")} | {"position_ids": positions}
    return pa.table({name: pa.ListArray.from_arrays(ends, values) for name, values in columns.items()})


# -------------------------------------------------------------------------------------------------------------------
# Writing
# -------------------------------------------------------------------------------------------------------------------


class HashedFile(io.RawIOBase):
    """A file to write whose SHA-256 is known at its end without reading it again."""

    def __init__(self, path: Path):
        self.file, self.sha256 = open(path, "wb"), hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.file.flush()
            os.fsync(self.file.fileno())  # a power cut must not leave a ledger beside rows that never reached the disk
            self.file.close()


class SetWriter:
    """Writes a `datasets` folder while rows come in, some million tokens at a time, and packs what it has gathered.

    Best-fit leaves no more room in so many tokens than it would in all of them.
    """

    def __init__(self, folder: Path, args: Arguments):
        from datasets import Features, Sequence, Value

        ids = Sequence(Value("int32"))
        features = {"input_ids": ids}
        if args.packing or args.format != "text":
            features["labels"] = ids
        if args.packing:
            features["position_ids"] = ids
        elif args.format == "mcq":
            features["options"] = Sequence(ids)  # the right one first
        self.folder, self.args, self.features = folder, args, Features(features)
        self.gathered, self.num_gathered, self.num_rows, self.longest = [], 0, 0, 0
        self.file = self.stream = None
        folder.mkdir()

    def add(self, batch: pa.RecordBatch) -> None:
        self.gathered.append(batch)
        self.num_gathered += len(batch["input_ids"].values)
        if self.num_gathered >= WRITE_TOKENS:
            self.write_gathered()

    def write_gathered(self) -> None:
        table = pa.Table.from_batches(self.gathered).combine_chunks()
        table = join_documents(table, self.args.max_length) if self.args.packing else table
        if self.stream is None:
            self.file = HashedFile(self.folder / "data-00000-of-00001.arrow")
            self.stream = pa.ipc.new_stream(self.file, self.features.arrow_schema)
        self.stream.write_table(table.cast(self.features.arrow_schema))
        self.num_rows += len(table)
        self.longest = max(self.longest, int(np.diff(table["input_ids"].chunk(0).offsets).max()))
        self.gathered, self.num_gathered = [], 0

    def finish(self) -> str:
        """Writes the rest and what `datasets` wants to know. Returns the SHA-256 of the rows."""
        from datasets import DatasetInfo

        if self.gathered:
            self.write_gathered()
        if self.stream:
            self.stream.close()
            self.file.close()
        sha256 = self.file.sha256.hexdigest() if self.file else hashlib.sha256().hexdigest()
        DatasetInfo(features=self.features).write_to_directory(str(self.folder))
        state = dict.fromkeys(["_format_columns", "_format_type", "_split"]) | {"_format_kwargs": {}}
        state |= {"_data_files": [{"filename": "data-00000-of-00001.arrow"}] if self.file else []}
        state |= {"_fingerprint": sha256[:16], "_output_all_columns": False}
        (self.folder / "state.json").write_text(json.dumps(state, indent=2))
        return sha256


def publish(writers: dict[str, SetWriter], ledgers: dict[str, dict], outputs: dict[str, Path], staging: Path) -> None:
    """Writes each ledger, which makes a folder complete, and renames the folders into their places."""
    for split, writer in writers.items():
        with open(writer.folder / "ledger.json", "w", encoding="utf-8") as file:
            json.dump(ledgers[split], file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
    for split, output in outputs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            os.replace(output, staging / f"former-{split}")
        os.replace(writers[split].folder, output)


# -------------------------------------------------------------------------------------------------------------------
# The ledger
# -------------------------------------------------------------------------------------------------------------------


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def describe_input(args: Arguments, tokenizer, template: dict, files: list[str], others: list[str]) -> dict:
    """What the ledger says before anything is tokenised; only what decides the output, so no --num_proc."""
    tokenizer_json = Path(args.tokenizer_path) / "tokenizer.json"
    is_stored = not args.streaming and files != ["-"]
    return {
        **{name: value for name, value in asdict(args).items() if name not in ("output", "num_proc", "plot")},
        "num_files": len(files),
        "files_not_read": others,
        "input_sha256": hash_files(files) if is_stored else None,
        "tokenizer_json_sha256": hash_files([str(tokenizer_json)]) if tokenizer_json.is_file() else None,
        "vocabulary_sha256": vocabulary_hash(tokenizer),
        "template": template,
    }


def make_ledger(figures: Counter, split: str, writer: SetWriter) -> dict:
    """The figures of one split's folder: in = kept + what is lost for each reason, in rows and in tokens."""
    splits, num_documents = ("train", "val"), figures["documents", split]
    balances = {}
    for name in ("rows", "tokens"):
        lost = {reason: sum(figures[name, reason, s] for s in splits) for reason in LOST}
        lost["other_split"] = sum(figures[name, "kept", s] for s in splits if s != split)
        lost["broken"] = figures[name, "broken"]
        balances[name] = {"in": figures[name, "in"], "kept": figures[name, "kept", split], **lost}
        assert 2 * figures[name, "in"] == sum(balances[name].values()), balances
    del balances["rows"]["truncated"]  # a row that lost tokens is kept, and counted in truncated_rows
    lengths, languages = {}, {}
    for key in sorted(key for key in figures if key[0] == "length"):
        name = length_bin(key[1])
        lengths[name] = lengths.get(name, 0) + figures[key]
    for name in LANGUAGES:
        if figures["language", name, "rows"]:
            names = ("rows", "characters", "tokens", "unknown", "fragments")
            languages[name] = {figure: figures["language", name, figure] for figure in names}
    return {
        **balances,
        "targets": figures["targets", split],
        "rows_written": writer.num_rows,
        "longest_row_written": writer.longest,
        # Of the positions that rows of one length would have: --max_length if packed, else the longest row's.
        "filled": figures["tokens", "kept", split]
        / max(1, writer.num_rows * (writer.args.max_length if writer.args.packing else writer.longest)),
        "truncated_rows": figures["truncated_rows", split],
        "split_rows": figures["split_rows", split],
        "documents": num_documents,  # as many as rows_written, unless rows are packed
        "share_without_eos_target": figures["without_eos_target", split] / max(1, num_documents),
        "bos_at_start": {str(number): figures["bos", number, split] for number in (0, 1, 2)},
        "length_histogram": lengths,  # of all rows that came in, cut or not
        "languages": languages,
    }


def length_bin(length: int) -> str:
    """Names the range of a length, such as 65-96 or 97-128: two to each doubling."""
    low, high = 0, 1
    while length > high:
        low, high = high, max(high + 1, high * 3 // 2 if high & (high - 1) == 0 else high * 4 // 3)
    return f"{low + 1}-{high}" if high > low + 1 else str(high)


def print_ledger(ledger: dict, output: Path) -> None:
    """The table that stands at the end of a run; what is zero and would say nothing is left out."""
    if others := ledger["files_not_read"]:
        print(f"not read because of their ending: {len(others)} files, such as {others[0]}")
    print(f"\n{'':54}{'rows':>12}{'tokens':>16}")
    for reason, label in {"in": "came in", "kept": "kept", **LOST}.items():
        num_rows, num_tokens = ledger["rows"].get(reason, 0), ledger["tokens"][reason]
        if num_rows or num_tokens or reason in ("in", "kept"):
            print(f"{label:54}{num_rows:>12,}{num_tokens:>16,}")
    if ledger["truncated_rows"] or ledger["split_rows"]:
        print(
            f"kept rows that were cut: {ledger['truncated_rows']:,} at the end, {ledger['split_rows']:,} into several"
        )

    print("\ntokens in a row that came in")
    highest = max(ledger["length_histogram"].values(), default=1)
    for name, count in ledger["length_histogram"].items():
        print(f"{name:>15} {count:>10,} {'#' * round(50 * count / highest)}")

    print(f"\n{'language':12}{'rows':>10}{'tokens for 100 characters':>28}{'unknown':>10}{'parts of characters':>22}")
    for name, figures in ledger["languages"].items():
        num_tokens = figures["tokens"]
        density, *shares = (100 * figures[part] / max(1, whole) for part, whole in (
            ("tokens", figures["characters"]), ("unknown", num_tokens), ("fragments", num_tokens)))  # fmt: skip
        print(f"{name:12}{figures['rows']:>10,}{density:>28.1f}{shares[0]:>8.2f} %{shares[1]:>20.2f} %")
        if shares[0] + shares[1] > 10:
            print(f"  This tokenizer was hardly made for {name}: look for a model that was.")

    if ledger["documents"]:
        bos = ledger["bos_at_start"]
        print(f"\nBOS at the start: none in {bos['0']:,} rows, one in {bos['1']:,}, two (wrong) in {bos['2']:,}; "
              f"rows without EOS as a target: {ledger['share_without_eos_target']:.1%}")  # fmt: skip
        width = f"of --max_length {ledger['max_length']}" if ledger["packing"] else "if padded to the longest of all"
        print(f"longest written row: {ledger['longest_row_written']:,} tokens; filled {width}: {ledger['filled']:.1%}")
    print(f"{ledger['targets']:,} target tokens in {ledger['rows_written']:,} written rows: {output}")


def plot_lengths(ledger: dict, path: Path) -> None:
    """The printed histogram as a PNG file."""
    import matplotlib

    matplotlib.use("agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.bar(list(ledger["length_histogram"]), list(ledger["length_histogram"].values()))
    axes.set(xlabel="tokens in a row that came in", ylabel="rows", title=Path(ledger["input"]).name)
    axes.tick_params(axis="x", rotation=60)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".tmp"), format="png")
    os.replace(path.with_suffix(".tmp"), path)


# -------------------------------------------------------------------------------------------------------------------
# The program
# -------------------------------------------------------------------------------------------------------------------


def load_tokenizer(args: Arguments):
    """Raises ValueError if there is none, or training or generation could not work with it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path)
    except (ValueError, OSError) as problem:
        raise ValueError(f"--tokenizer_path {args.tokenizer_path}: no tokenizer can be loaded ({problem})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--tokenizer_path {args.tokenizer_path}: it has no EOS token, so a model trained on its "
            "ids would never stop; set eos_token in its tokenizer_config.json"
        )
    if args.format == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            f"--tokenizer_path {args.tokenizer_path}: it has no chat template, so nothing says how a conversation is "
            "written; name the tokenizer of a chat or Instruct model, or put chat_template.jinja into the folder"
        )
    if args.format != "text":
        apply_template(tokenizer, "question", "answer", tokenizer.chat_template is not None)
    return tokenizer


def tokenize(made: Tokenization, writers: dict[str, SetWriter]) -> Counter:
    """Writes all rows of the input, and returns the figures of the ledger."""
    from tqdm import tqdm

    figures, num_broken = Counter(), 0
    chunks = read_chunks(made.args, made.files)
    with tqdm(desc="tokenizing", unit=" rows", mininterval=1) as progress:
        for batches, chunk_figures, complaints in tokenize_chunks(made, made.args.num_proc, chunks):
            figures.update(chunk_figures)
            for split, batch in batches.items():
                writers[split].add(batch)
            for complaint in complaints[: max(0, SHOWN_BROKEN_ROWS - num_broken)]:
                progress.write(f"skipped {complaint}", file=sys.stderr)
            num_broken += len(complaints)
            progress.update(chunk_figures["rows", "in"])
    if num_broken > SHOWN_BROKEN_ROWS:
        print(f"skipped {num_broken - SHOWN_BROKEN_ROWS:,} more broken rows", file=sys.stderr)
    return figures


def build(args: Arguments, tokenizer) -> dict[str, dict]:
    """Makes the folder of each split, or nothing at all, and returns their ledgers."""
    template = make_template(args, chat=tokenizer.chat_template is not None)
    files, others = list_files(args)
    gc.freeze()  # what the imports made is not searched for garbage again and again
    gc.set_threshold(100_000)  # nor are a chunk's lists, which die without a search
    facts = describe_input(args, tokenizer, template, files, others)
    outputs, ledgers = output_folders(args), {}
    parent = existing_parent(outputs["train"])  # on the same disk, so that renaming is one step
    staging = Path(tempfile.mkdtemp(prefix=f".{outputs['train'].name}-", dir=parent))
    try:
        writers = {split: SetWriter(staging / output.name, args) for split, output in outputs.items()}
        figures = tokenize(Tokenization(args, tokenizer, template, files), writers)
        for split, writer in writers.items():
            sha256 = writer.finish()
            ledgers[split] = {**facts, **make_ledger(figures, split, writer), "sha256": sha256}
        publish(writers, ledgers, outputs, staging)
    except OSError as problem:
        raise ValueError(f"--output {args.output}: cannot be written ({problem}); nothing of it was left") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ledgers


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --num_proc says how many cores are used
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        check_arguments(args)
        ledgers = build(args, load_tokenizer(args))
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    for split, output in output_folders(args).items():
        print_ledger(ledgers[split], output)
    if args.plot:
        plot_lengths(ledgers["train"], Path(args.plot))


if __name__ == "__main__":
    main()
