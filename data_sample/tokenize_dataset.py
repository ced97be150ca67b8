"""Turns raw questions or instructions into the token ids that every training script reads.

    python data_sample/tokenize_dataset.py --format mcq --input data_sample/triage_train.jsonl \\
        --tokenizer_path models/SmolLM2-135M-Instruct --output data_sample/tokenized/triage_train

Formats: `mcq` (MedQA's JSONL: id, sent1, sent2, ending0 to ending3 or ending4, label) and `alpaca` (instruction,
input, output; a JSON list or JSONL). The prompt is rendered with the tokenizer's chat template where it has one and
with a plain template otherwise, and carries no loss unless --train_on_prompt True. Each row ends with exactly one EOS,
which is a target, and begins with exactly one BOS where the tokenizer adds one.

Writes a `datasets` folder with `input_ids`, `labels` (-100 where no loss) and, with --packing True, `position_ids`.
Rows of `mcq` that are not packed also keep `options`, every option's completion, for tools/evaluate.py. `ledger.json`
in it says: rows and tokens in = kept + lost for each reason, the template, and the tokenizer's hash.
The folder appears under its name only when it is complete.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from bisect import bisect_left, insort
from dataclasses import asdict, dataclass, field
from pathlib import Path

IGNORE_INDEX = -100

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


@dataclass
class Arguments:
    input: str = field(default="", metadata={"help": "the raw file: .jsonl, or .json with a list of rows"})
    format: str = field(default="mcq", metadata={"help": "mcq | alpaca"})
    tokenizer_path: str = field(
        default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model to be trained"}
    )
    output: str = field(default="", metadata={"help": "folder to write, below data_sample/tokenized/ for example"})
    max_length: int = field(default=512, metadata={"help": "a longer row is dropped, and counted in the ledger"})
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


def check_arguments(args: Arguments) -> None:
    """Raises ValueError with every mistake that can be seen before anything is read."""
    mistakes = []
    if not args.input:
        mistakes.append("--input is missing: name a .jsonl or .json file, such as data_sample/triage_train.jsonl")
    elif not Path(args.input).is_file():
        mistakes.append(f"--input {args.input}: no such file")
    if args.format not in ("mcq", "alpaca"):
        mistakes.append(f"--format {args.format}: choose mcq or alpaca")
    if args.answer not in ("text", "letter"):
        mistakes.append(f"--answer {args.answer}: choose text or letter")
    if args.max_length < 2:
        mistakes.append(f"--max_length {args.max_length}: a row has at least 2 tokens")
    output = Path(args.output)
    if not args.output:
        mistakes.append("--output is missing: name the folder to write, such as data_sample/tokenized/triage_train")
    elif (
        output.exists()
        and not (output / "ledger.json").is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        mistakes.append(f"--output {output}: exists and is not a tokenized set; choose another folder")
    else:
        folder = next(path for path in output.absolute().parents if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            mistakes.append(f"--output {output}: {folder} is no writable folder; choose another")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def read_rows(path: str):
    """Yields (where, row) for each row of a JSONL file or a JSON list; `where` names file and line or row."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # files from Windows begin with a BOM
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: not UTF-8 ({problem}); convert it, for example with iconv") from None
    if path.endswith(".json"):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{path}, line {problem.lineno}: not JSON ({problem})") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a JSON file holds a list of rows, this one holds a {type(rows).__name__}")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as problem:
                raise ValueError(f"{path}, line {number}: not JSON ({problem})") from None


def check_row(row: dict, format: str, where: str) -> None:
    """Raises ValueError naming file, line and field of a row that does not have its format's shape."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a JSON object, this is a {type(row).__name__}")
    num_options = 5 if row.get("ending4") else 4
    options = [f"ending{i}" for i in range(num_options)]
    for name in ["sent1", "sent2", *options] if format == "mcq" else ["instruction", "output", "input"]:
        text = row.get(name, "" if name == "input" else None)
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {name} is {'missing' if name not in row else 'not a text'}")
        if name in options and not text.strip():
            raise ValueError(f"{where}: field {name} is empty, so letters and label would not fit the options")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{where}: field {name} holds half a character (a lone surrogate), which has no UTF-8")
    if format == "mcq" and not (type(row.get("label")) is int and 0 <= row["label"] < num_options):
        raise ValueError(f"{where}: field label is {row.get('label')!r}, expected a number from 0 to {num_options - 1}")


def make_template(args: Arguments, chat: bool) -> dict:
    """How a row becomes a prompt: plain data, kept in the ledger so that generation renders what training saw."""
    template = {"format": args.format, "chat": chat}
    if args.format == "mcq":
        template["answer"] = args.answer
        template["option"] = "{letter}. {text}" if args.answer == "letter" else "- {text}"
        template["prompt"] = "{question}" if chat else PLAIN_MCQ
    else:
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


def apply_template(tokenizer, prompt: str, answer: str, chat: bool) -> tuple[str, str]:
    """(prompt, completion) as the texts to be tokenised; the completion ends with the EOS token's text.

    Raises:
        ValueError: the chat template does not render a conversation as its prompt followed by the answer.
    """
    completion = answer
    if chat:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        conversation = tokenizer.apply_chat_template(messages, tokenize=False)
        if not conversation.startswith(prompt):
            raise ValueError("the tokenizer's chat template does not put the answer behind its generation prompt")
        # Templates write a line end behind the last EOS, which nobody ever has to predict.
        completion = conversation[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)
    return prompt, completion + tokenizer.eos_token


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS (LLaMA's do, SmolLM2's does not)."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[0] == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))
    )


def encode(tokenizer, prompt: str, completion: str, with_bos: bool) -> tuple[list[int], list[int]]:
    """Ids of prompt and completion. The prompt's are those it has alone, as at generation, so no border shifts.

    Both are tokenised as one text; only where a token would span the border is the completion tokenised alone.
    """
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(prompt + completion, add_special_tokens=False).input_ids
    if ids[: len(prompt_ids)] == prompt_ids:
        completion_ids = ids[len(prompt_ids) :]
    else:
        completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
    if with_bos and prompt_ids[:1] != [tokenizer.bos_token_id]:  # a chat template may have written it
        prompt_ids = [tokenizer.bos_token_id, *prompt_ids]
    return prompt_ids, completion_ids


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


def tokenize(args: Arguments, tokenizer, template: dict) -> tuple[list[dict], dict]:
    """Rows of `input_ids` and `labels`, and the ledger of what came in, was kept and was lost."""
    from tqdm import tqdm

    with_bos = adds_bos(tokenizer)
    reasons = ("kept", "no_target", "special_token", "too_long")
    rows_of, tokens_of = dict.fromkeys(reasons, 0), dict.fromkeys(reasons, 0)
    rows = []
    for where, raw in tqdm(list(read_rows(args.input)), desc="tokenizing", unit="row"):
        check_row(raw, args.format, where)
        question, answers = render_prompt(raw, template), render_answers(raw, template)
        texts = [apply_template(tokenizer, question, text, template["chat"]) for text in answers]
        encoded = [encode(tokenizer, prompt, completion, with_bos) for prompt, completion in texts]
        prompt_ids, options = encoded[0][0], [completion_ids for _, completion_ids in encoded]
        input_ids = prompt_ids + options[0]
        if not answers[0].strip():
            reason = "no_target"
        elif any(token in text for token in tokenizer.all_special_tokens for text in (question, *answers)):
            reason = "special_token"  # as in HTML's <s>struck out</s>, which would become BOS and EOS
        elif len(input_ids) > args.max_length:
            reason = "too_long"
        else:
            reason = "kept"
            masked = [] if args.train_on_prompt else [IGNORE_INDEX] * len(prompt_ids)
            rows.append({"input_ids": input_ids, "labels": masked + input_ids[len(masked) :], "options": options})
        rows_of[reason] += 1
        tokens_of[reason] += len(input_ids)
    ledger = {
        "rows": {"in": sum(rows_of.values()), **rows_of},
        "tokens": {"in": sum(tokens_of.values()), **tokens_of},
        # The first token of a document is never predicted, whatever its label.
        "targets": sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]),
    }
    return rows, ledger


def join_documents(rows: list[dict], max_length: int) -> list[dict]:
    """Packs rows: documents one behind the other, with positions that restart at each."""
    packed = []
    for members in pack([len(row["input_ids"]) for row in rows], max_length):
        joined = {name: [i for m in members for i in rows[m][name]] for name in ("input_ids", "labels")}
        joined["position_ids"] = [i for m in members for i in range(len(rows[m]["input_ids"]))]
        packed.append(joined)
    return packed


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def write(rows: list[dict], ledger: dict, output: Path) -> None:
    """Writes the set beside `output` and renames it into place, so that a kill leaves nothing half-written."""
    from datasets import Dataset, Features, Sequence, Value

    features = {"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))}
    if ledger["packing"]:
        features["position_ids"] = Sequence(Value("int32"))
    elif ledger["format"] == "mcq":
        features["options"] = Sequence(Sequence(Value("int32")))  # the right one first
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        columns = {name: [row[name] for row in rows] for name in features}
        Dataset.from_dict(columns, features=Features(features)).save_to_disk(staging / "set")
        digest = hashlib.sha256()
        for file in sorted((staging / "set").glob("*.arrow")):
            digest.update(file.read_bytes())
        ledger["sha256"] = digest.hexdigest()
        (staging / "set" / "ledger.json").write_text(json.dumps(ledger, indent=2, ensure_ascii=False), encoding="utf-8")
        if output.exists():
            os.replace(output, staging / "former")
        os.replace(staging / "set", output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def print_ledger(ledger: dict, output: Path) -> None:
    print(f"{'':14}{'rows':>10}{'tokens':>12}")
    for reason in ledger["rows"]:
        print(f"{reason:14}{ledger['rows'][reason]:>10,}{ledger['tokens'][reason]:>12,}")
    print(f"{ledger['targets']:,} target tokens in {ledger['rows_written']:,} written rows: {output}")


def main() -> None:
    from transformers import AutoTokenizer, HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        check_arguments(args)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path)
        except (ValueError, OSError) as problem:
            raise ValueError(
                f"--tokenizer_path {args.tokenizer_path}: no tokenizer can be loaded ({problem})"
            ) from None
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"--tokenizer_path {args.tokenizer_path}: it has no EOS token, so a model trained on its "
                "ids would never stop; set eos_token in its tokenizer_config.json"
            )
        template = make_template(args, chat=tokenizer.chat_template is not None)
        rows, ledger = tokenize(args, tokenizer, template)
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
    if args.packing:
        rows = join_documents(rows, args.max_length)
    tokenizer_json = Path(args.tokenizer_path) / "tokenizer.json"
    ledger = {
        **asdict(args),
        "input_sha256": hashlib.sha256(Path(args.input).read_bytes()).hexdigest(),
        "tokenizer_json_sha256": hashlib.sha256(tokenizer_json.read_bytes()).hexdigest()
        if tokenizer_json.is_file()
        else None,
        "vocabulary_sha256": vocabulary_hash(tokenizer),
        "template": template,
        **ledger,
        "rows_written": len(rows),
    }
    write(rows, ledger, Path(args.output))
    print_ledger(ledger, Path(args.output))


if __name__ == "__main__":
    main()
