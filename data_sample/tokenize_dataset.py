"""Turns raw questions, instructions, conversations or documents into the token ids that every training script reads.

    python data_sample/tokenize_dataset.py --format mcq --input data_sample/triage_train.jsonl \\
        --tokenizer_path models/SmolLM2-135M-Instruct --output data_sample/tokenized/triage_train

Formats:
    mcq         sent1, sent2, ending0, ending1 and up to 24 more, label; or the columns of MedQA, MedMCQA, C-Eval, MMLU
                or PubMedQA as they are published
    alpaca      instruction, input, output, and system, history
    chat        messages with role and content, or ShareGPT's conversations with from and value; tools, calls, reasoning
    preference  prompt, chosen, rejected: texts or messages; or two whole conversations with a common beginning, also
                as HH-RLHF writes them; or prompt, completion, label. docs/preferences.md shows them
    text        text, for continued pretraining
--columns names columns that have other names. Files: .jsonl, .json with a list, .csv, .parquet, what save_to_disk of
`datasets` wrote and, for `text`, .txt with one document each; compressed with gzip or zstd or not; one file, a folder,
a glob in quotes, a URL, or `-` for JSONL from stdin.

The prompt is rendered with the tokenizer's chat template where it has one and with a plain template otherwise, and
carries no loss unless --train_on_prompt True. What is trained is what is served: the ids before each answer that is
learned are those that a model gets when it is asked. Each answer ends with EOS, which is a target, and each row begins
with exactly one BOS where the tokenizer adds one.

Writes a `datasets` folder with `input_ids`, `labels` (-100 where no loss) and, with --packing True, `position_ids`.
Rows of `mcq` that are not packed also keep `options`, every option's completion, for tools/evaluate.py. Rows of
`preference` have `prompt_ids`, `chosen_ids`, `chosen_labels`, `rejected_ids` and `rejected_labels`, or `prompt_ids`,
`completion_ids`, `completion_labels` and `label`: the prompt stands once, and no answer has its ids. Documents that
are not packed keep all their ids and have no labels: training draws passages from them (--random_passage True).
`ledger.json` in it says: rows and tokens in = kept + lost for each reason, fields in = used + ignored + not used, the
template, its date, and how the tokenizer behaves. The folder appears under its name only when it is complete.

How it works: the input is cut into chunks of some hundred rows, each worker turns chunks into arrays of ids, and the
arrays are written in the order of the input. So memory does not grow with the input, and the result does not depend on
the number of workers. The parts: reading.py (files), fields.py (what a row may hold), rendering.py and chat_template.py
(texts), encoding.py (ids), preferences.py (ids of prompts with several answers), ledger.py (figures) and writing.py
(packing, and the folder).
"""

import datetime
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

# The parts of this program are imported as data_sample.<part>, from the repository root, which Python does not search
# when this file is started by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_sample.chat_template import chat_template_of, writes_date
from data_sample.encoding import ChunkResult, Complaint, Tokenization
from data_sample.fields import USED
from data_sample.ledger import Ledger, explain_empty_split, plot_lengths, print_ledger, summarize
from data_sample.preferences import PreferenceTokenization, refuse_mixed_kinds
from data_sample.reading import Files, find_files, hash_files, read_chunks
from data_sample.rendering import fingerprint_tokenizer, make_template, vocabulary_hash
from data_sample.writing import SetWriter, publish
from tools.paths import expand_home

SHOWN_BROKEN_ROWS = 10


@dataclass
class Arguments:
    input: str = field(
        default="",
        metadata={
            "help": "a file, a folder, a glob in quotes, a URL (with --streaming True), or - for JSONL from stdin"
        },
    )
    format: str = field(default="mcq", metadata={"help": "mcq | alpaca | chat | preference | text"})
    tokenizer_path: str = field(
        default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model to be trained"}
    )
    output: str = field(default="", metadata={"help": "folder to write, below data_sample/tokenized/ for example"})
    max_length: int = field(
        default=512, metadata={"help": "most tokens of a row; documents that are not packed may have more"}
    )
    on_long: str | None = field(
        default=None,
        metadata={
            "help": "a longer row: drop | truncate | split (into rows) | error; the ledger counts each; default: drop, "
            "or split for documents that are packed"
        },
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
    columns: str | None = field(
        default=None,
        metadata={"help": "columns with other names, as in question=Frage,answer=Antwort or instruction=q,output=a"},
    )
    first_label: int = field(default=0, metadata={"help": "mcq: the label of the first option, 0 or 1"})
    date: str | None = field(
        default=None,
        metadata={"help": "YYYY-MM-DD: the day for chat templates that write one; default: today"},
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


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before anything is read
# -------------------------------------------------------------------------------------------------------------------

CHOICES = {
    "format": ["mcq", "alpaca", "chat", "preference", "text"],
    "answer": ["text", "letter"],
    "on_long": ["drop", "truncate", "split", "error"],
    "on_bad_row": ["error", "skip"],
}


def check_arguments(args: Arguments) -> None:
    """Completes the arguments; raises ValueError with every mistake that can be seen before anything is read."""
    if args.on_long is None:
        args.on_long = "drop"
        if args.format == "text" and args.packing:
            args.on_long = "split"
    if args.date is None:
        args.date = datetime.date.today().isoformat()
    mistakes = find_input_mistakes(args)
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            mistakes.append(f"--{name} {getattr(args, name)}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if args.max_length < 2:
        mistakes.append(f"--max_length {args.max_length}: a row has at least 2 tokens")
    if args.format == "mcq" and args.on_long in ("truncate", "split"):
        mistakes.append(f"--on_long {args.on_long}: the answer, which is what is learned, stands at the end of a "
                        "question and would be cut off; choose drop or error, or raise --max_length")  # fmt: skip
    if args.format == "preference":
        mistakes += find_preference_mistakes(args)
    mistakes += find_template_mistakes(args)
    mistakes += find_column_mistakes(args)
    if args.first_label not in (0, 1):
        mistakes.append(f"--first_label {args.first_label}: labels count from 0 or from 1")
    try:
        datetime.date.fromisoformat(args.date)
    except ValueError:
        mistakes.append(f"--date {args.date}: a day as YYYY-MM-DD")
    if not 0 <= args.val_size < 1:
        mistakes.append(f"--val_size {args.val_size}: a share of the rows, at least 0 and below 1")
    if args.num_proc < 1:
        mistakes.append(f"--num_proc {args.num_proc}: must be at least 1")
    if args.plot and not args.plot.endswith(".png"):
        mistakes.append(f"--plot {args.plot}: name a .png file")
    if args.plot and find_spec("matplotlib") is None:
        mistakes.append(f"--plot {args.plot}: needs matplotlib (pip install matplotlib); the histogram is printed, too")
    mistakes += find_output_mistakes(args)
    if mistakes:
        raise ValueError("\n".join(mistakes))


def find_input_mistakes(args: Arguments) -> list[str]:
    if not args.input:
        return ["--input is missing: name a .jsonl or .json file, such as data_sample/triage_train.jsonl"]
    if "://" in args.input and not args.streaming:
        return [f"--input {args.input}: a URL is read in passing; add --streaming True"]
    try:
        find_files(args.input, args.format)
    except (ValueError, OSError) as problem:
        return [f"--input {args.input}: {problem}"]
    return []


def find_preference_mistakes(args: Arguments) -> list[str]:
    mistakes = []
    if args.packing:
        mistakes.append("--packing True: two answers are compared behind one prompt, so they cannot be joined with "
                        "others; leave it out with --format preference")  # fmt: skip
    if args.train_on_prompt:
        mistakes.append("--train_on_prompt True: the prompt is the same for both answers, so it cancels out; leave it "
                        "out with --format preference")  # fmt: skip
    if args.on_long in ("truncate", "split"):
        mistakes.append(f"--on_long {args.on_long}: the ends of answers, which are compared, would be cut off; choose "
                        "drop or error, or raise --max_length")  # fmt: skip
    return mistakes


def find_template_mistakes(args: Arguments) -> list[str]:
    if not args.template:
        return []
    if args.format != "mcq":
        return [f"--template {args.template}: only --format mcq takes one"]
    try:
        text = Path(args.template).read_text(encoding="utf-8-sig")
        if "🙂" not in text.format(question="🙂"):
            raise ValueError("it has no {question}")
    except (ValueError, OSError, LookupError, AttributeError) as problem:
        return [f"--template {args.template}: {problem!r}; write {{question}} where question and options go, and "
                "{{ }} for braces"]  # fmt: skip
    return []


def parse_columns(args: Arguments) -> dict[str, str]:
    """Fields and the columns that hold them, of `question=Frage,answer=Antwort`."""
    columns = {}
    for part in (args.columns or "").split(","):
        if part.strip():
            name, _, column = part.partition("=")
            columns[name.strip()] = column.strip()
    return columns


def find_column_mistakes(args: Arguments) -> list[str]:
    known = USED.get(args.format, [])
    mistakes = []
    if re.search(r"，\s*\w+=", args.columns or ""):
        mistakes.append(f"--columns {args.columns}: separate them by an ASCII comma, not by ，")
    for name, column in parse_columns(args).items():
        if name not in known:
            mistakes.append(f"--columns {name}={column}: --format {args.format} has no field {name}; it has "
                            f"{', '.join(known[:5])} and others")  # fmt: skip
        elif not column:
            mistakes.append(f"--columns {name}: write {name}=COLUMN")
    return mistakes


def find_output_mistakes(args: Arguments) -> list[str]:
    part = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        return [f"--shard {args.shard}: I/N with I from 1 to N, such as 1/4 to 4/4 on four machines"]
    if not args.output:
        return ["--output is missing: name the folder to write, such as data_sample/tokenized/triage_train"]
    mistakes = []
    for output in output_folders(args).values():
        is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
        folder = existing_parent(output)
        if not is_free and not (output / "ledger.json").is_file():
            mistakes.append(f"--output {output}: exists and is not a tokenized set; choose another folder")
        elif not folder.is_dir() or not os.access(folder, os.W_OK):
            mistakes.append(f"--output {output}: {folder} is no writable folder; choose another")
    part_of_former = output_folders(replace(args, val_size=0.5))["val"]
    if not args.val_size and was_split_off(part_of_former):
        mistakes.append(f"--output {args.output}: the new set would have the rows of {part_of_former}, which was split "
                        "off a former one; state --val_size again, delete that, or name another folder")  # fmt: skip
    return mistakes


def was_split_off(folder: Path) -> bool:
    """Whether the folder is the second one that --val_size made."""
    try:
        return json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["val_size"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def output_folders(args: Arguments) -> dict[str, Path]:
    """The folder of each split: `train` and, with --val_size, `val`."""
    part, num_parts = args.shard.split("/")
    suffix = ""
    if num_parts != "1":
        suffix = f"-{part}-of-{num_parts}"
    output = args.output.rstrip("/")
    folders = {"train": Path(output + suffix)}
    if args.val_size:
        folders["val"] = Path(output + "_val" + suffix)
    return folders


def existing_parent(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())


def load_tokenizer(args: Arguments):
    """Raises ValueError if there is none, or training or generation could not work with it."""
    from transformers import AutoTokenizer

    flag = f"--tokenizer_path {args.tokenizer_path}"
    folder = Path(args.tokenizer_path)
    files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (folder / name).is_file()]
    if (folder / "tokenizer.model").is_file() and not files:
        # transformers would open it, with neither BOS nor the space before the first word.
        raise ValueError(f"{flag}: tokenizer.model stands alone, as in Meta's folders; name the folder of a converted "
                         "model (convert_llama_weights_to_hf.py)")  # fmt: skip
    try:
        # Code that lies in the folder is never run, and nobody is asked whether it may.
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path, trust_remote_code=False)
    except Exception as problem:  # each kind of tokenizer raises its own
        raise ValueError(f"{flag}: no tokenizer can be loaded ({explain_tokenizer(folder, problem)})") from None
    if not tokenizer.eos_token:
        raise ValueError(
            f"{flag}: it has no EOS token, so a model trained on its ids would never stop; set eos_token in its "
            "tokenizer_config.json"
        )
    if args.format == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            f"{flag}: it has no chat template, so nothing says how a conversation is written; name the tokenizer of a "
            "chat or Instruct model, or put chat_template.jinja into the folder"
        )
    if args.format != "text" and tokenizer.chat_template is not None:
        try:
            chat_template_of(tokenizer, args.date)
        except ValueError as problem:
            raise ValueError(f"{flag}: {problem}") from None
    return tokenizer


def explain_tokenizer(folder: Path, problem: Exception) -> str:
    """What kept a tokenizer from being loaded, in words that a user can act on."""
    config = folder / "tokenizer_config.json"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        empty = [name for name in ("bos_token", "eos_token", "unk_token") if settings.get(name) == ""]
    except (ValueError, OSError, AttributeError):
        empty = []
    if empty:
        return (f"{', '.join(empty)} in {config} are empty texts; LLaMA's are <s>, </s> and <unk>")  # fmt: skip
    lines = str(problem).strip().splitlines() or ["it says no more"]
    reason = f"{type(problem).__name__}: {lines[0].rstrip('.')}"
    if not folder.exists():
        return (f"there is no such folder, and the hub's answer is {reason}; bash scripts/quickstart.sh fetches the "
                "sample model")  # fmt: skip
    return f"{reason}; name the folder of a whole model, or download its tokenizer's files again"


# -------------------------------------------------------------------------------------------------------------------
# Worker processes
# -------------------------------------------------------------------------------------------------------------------

# Set in each worker by start_worker: it would be slow to send the tokenizer with every chunk.
tokenization: Tokenization | None = None


def start_worker(made: Tokenization) -> None:
    global tokenization
    tokenization = made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when the main process was killed, which has no chance then to end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(chunk: list) -> ChunkResult:
    return tokenization(chunk)


def tokenize_chunks(made: Tokenization, num_proc: int, chunks: Iterator[list]) -> Iterator[ChunkResult]:
    """The results for all chunks in their order. Only a few chunks per worker are read ahead, so memory stays flat."""
    if num_proc == 1:
        yield from map(made, chunks)
        return
    executor = ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), start_worker, (made,))
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
# The main line of work
# -------------------------------------------------------------------------------------------------------------------


def build(args: Arguments, tokenizer) -> dict[str, dict]:
    """Makes the folder of each split, or nothing at all.

    Returns:
        the ledger of each split.

    Raises:
        ValueError: a row or a file is broken, or the folder cannot be written.
    """
    gc.freeze()  # what the imports made is not searched for garbage again and again
    gc.set_threshold(100_000)  # nor are a chunk's lists, which die without a search
    template = describe_template(args, tokenizer)
    files = find_files(args.input, args.format)
    facts = describe_input(args, tokenizer, template, files)
    outputs = output_folders(args)
    staging = Path(tempfile.mkdtemp(
        prefix=f".{outputs['train'].name}-",
        dir=existing_parent(outputs["train"]),  # on the same disk, so that renaming is one step
    ))  # fmt: skip
    try:
        kind = Tokenization
        if args.format == "preference":
            kind = PreferenceTokenization
        made = kind(args, tokenizer, template, files.paths, list(outputs))
        folders = {split: staging / output.name for split, output in outputs.items()}
        writers = {}
        for split, folder in folders.items():
            writers[split] = SetWriter(folder, args.packing, args.max_length)
        ledger = tokenize(made, writers, read_chunks(files.paths, args.shard))
        refuse_empty_sets(args, outputs, ledger)
        ledgers = {}
        for split, writer in writers.items():
            ledgers[split] = finish_split(args, split, writer, ledger, facts)
        publish(folders, ledgers, outputs, staging)
    except OSError as problem:
        raise ValueError(f"--output {args.output}: cannot be written ({problem}); nothing of it was left") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ledgers


def refuse_empty_sets(args: Arguments, outputs: dict[str, Path], ledger: Ledger) -> None:
    """Raises ValueError with the largest reason if no row of a split was kept: training could do nothing with it.

    A part of a set may be empty by chance, if it has lost nothing: the other parts have rows.
    """
    for split, output in outputs.items():
        if ledger.splits[split].documents > 0:
            continue
        balance = ledger.balance_rows(split)
        is_part = args.shard != "1/1"
        if not is_part and balance["in"] == 0:
            raise ValueError(f"--input {args.input}: the input has no rows, so nothing was written")
        if not is_part or balance["in"] > balance["other_split"]:
            raise ValueError(f"--output {output}: no row of it was kept, so nothing was written; "
                             f"{explain_empty_split(ledger, split)}")  # fmt: skip


def describe_template(args: Arguments, tokenizer) -> dict:
    """The template of the set, which the ledger keeps for the programs that will ask the model."""
    has_chat_template = tokenizer.chat_template is not None
    date = None
    if has_chat_template and args.format != "text" and writes_date(tokenizer):
        date = args.date
    columns = parse_columns(args)
    return make_template(args.format, has_chat_template, args.answer, args.template, columns, args.first_label, date)


def tokenize(made: Tokenization, writers: dict[str, SetWriter], chunks: Iterator[list]) -> Ledger:
    """Writes all rows of the input."""
    from tqdm import tqdm

    ledger = Ledger()
    first_of_kind = {}
    with tqdm(desc="tokenizing", unit=" rows", mininterval=1) as progress:
        for result in tokenize_chunks(made, made.args.num_proc, chunks):
            num_shown = max(0, SHOWN_BROKEN_ROWS - ledger.rows_broken)
            ledger.add(result.ledger)
            refuse_broken_rows(made.args, result.complaints, ledger)
            for kind, place in result.first_of_kind.items():
                first_of_kind.setdefault(kind, place)
            refuse_mixed_kinds(first_of_kind)
            for complaint in result.complaints[:num_shown]:
                progress.write(f"skipped {complaint.place}: {complaint.problem}", file=sys.stderr)
            for split, batch in result.batches.items():
                writers[split].add(batch)
            progress.update(result.ledger.rows_in)
    if ledger.rows_broken > SHOWN_BROKEN_ROWS:
        print(f"skipped {ledger.rows_broken - SHOWN_BROKEN_ROWS:,} more broken rows", file=sys.stderr)
    return ledger


def refuse_broken_rows(args: Arguments, complaints: list[Complaint], ledger: Ledger) -> None:
    """Raises ValueError for the first broken row, unless --on_bad_row skip allows it.

    As long as no good row was seen, skipping is no remedy, and the row is described instead.
    """
    for complaint in complaints:
        if complaint.forbids_skipping:
            raise ValueError(f"{complaint.place}: {complaint.problem}")
    if not complaints or args.on_bad_row == "skip":
        return
    first = complaints[0]
    message = f"{first.place}: {first.problem}"
    if ledger.rows_in > ledger.rows_broken:
        message += "\n--on_bad_row skip goes on without such rows, and counts them"
    elif first.hint:
        message += f"\n{first.hint}"
    raise ValueError(message)


def finish_split(args: Arguments, split: str, writer: SetWriter, ledger: Ledger, facts: dict) -> dict:
    """Completes the folder of a split. Returns what is to be its ledger.json."""
    sha256 = writer.finish()
    row_length = None
    if args.packing:
        row_length = args.max_length
    figures = summarize(ledger, split, writer.num_rows, writer.longest_row, row_length)
    return {**facts, **figures, "sha256": sha256}


def describe_input(args: Arguments, tokenizer, template: dict, files: Files) -> dict:
    """What the ledger says before anything is tokenized: only what decides the output, so no --num_proc."""
    facts = asdict(args)
    for name in ("output", "num_proc", "plot"):
        del facts[name]
    facts["num_files"] = len(files.paths)
    facts["files_not_read"] = files.not_read
    facts["input_sha256"] = None
    if not args.streaming and files.paths != ["-"]:
        facts["input_sha256"] = hash_files(files.paths)
    facts["tokenizer_json_sha256"] = None
    tokenizer_json = Path(args.tokenizer_path) / "tokenizer.json"
    if tokenizer_json.is_file():
        facts["tokenizer_json_sha256"] = hash_files([str(tokenizer_json)])
    facts["vocabulary_sha256"] = vocabulary_hash(tokenizer)
    facts["tokenizer_fingerprint"] = fingerprint_tokenizer(tokenizer)
    facts["template"] = template
    return facts


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --num_proc says how many cores are used
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        check_arguments(args)
        ledgers = build(args, load_tokenizer(args))
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {explain_unknown_flags(str(mistake))}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    for split, output in output_folders(args).items():
        print_ledger(ledgers[split], output)
    if args.plot:
        plot_lengths(ledgers["train"], Path(args.plot))


def explain_unknown_flags(message: str) -> str:
    """Adds a remedy where the shell has turned a glob into several files."""
    if "not used by the HfArgumentParser" in message and any(Path(name).is_file() for name in sys.argv[1:]):
        message += "\nput a glob in quotes, as in --input 'data/*.jsonl', so that the shell does not replace it"
    return message


if __name__ == "__main__":
    main()
