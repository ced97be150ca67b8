"""Lets a model answer: a base model, a fine-tuned one, or a base with an adapter of any kind, also in 4 bit.

    python test_sample.py                                                # the newest adapter below outputs/
    python test_sample.py --prompt "Sudden painful red eye. Which department?"
    python test_sample.py --test_path data_sample/triage_test.jsonl --output outputs/answers.jsonl
    python test_sample.py --model_path outputs/finetune_pp --compare models/SmolLM2-135M-Instruct

To talk with a model there is tools/chat.py. How an answer comes about, in the order of this file:

  check_arguments   reads the questions and turns each into the ids that it had in training (the template travels in the
                    run's run.json); the right answer is never among them
  load_model        the base model, and the adapter on it
  make_batches      questions of similar length together, so that little is padded
  generate          pads on the left, lets transformers continue, and cuts each answer at its first stop id
  answer_rows       prints the answers or writes them, in the order of the questions

Questions are rows in the shapes that tokenize_dataset.py reads (mcq, alpaca, chat, text), a --prompt, or stdin
(`--prompt -` is one prompt, `--test_path -` are JSONL rows). --output writes one JSON object a row, while it runs;
--resume True goes on from there.
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed

from data_sample.rendering import expected_answer, messages_before_answer, read_tools
from tools import loading
from tools.loading import ModelSource, collect, has_virtual_tokens
from tools.paths import expand_home

WINDOW_BATCHES = 16  # so many batches are sorted by length together, and written together
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # as in transformers' GenerationConfig


@dataclass
class Arguments:
    model_path: str | None = field(
        default=None, metadata={"help": "folder or hub id; default: the base model that the adapter names"}
    )
    peft_path: str | None = field(
        default=None, metadata={"help": "folder of an adapter; default: the newest below outputs/, if no --model_path"}
    )
    test_path: str = field(
        default="data_sample/triage_test.jsonl",
        metadata={"help": "rows as .jsonl, .json or .csv, or - for JSONL from stdin"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "answer this text instead of rows; - reads it from stdin"}
    )
    chat: bool = field(default=False, metadata={"help": "the conversation is python tools/chat.py now"})
    system: str | None = field(default=None, metadata={"help": "system message of --prompt"})
    template_path: str | None = field(
        default=None, metadata={"help": "run.json or ledger.json with the prompt's template; default: the run's own"}
    )
    compare: str | None = field(
        default=None, metadata={"help": "folder or hub id of a model that answers the same questions, side by side"}
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "rows to answer, from the beginning; default: 5, or all with --output"}
    )
    output: str | None = field(default=None, metadata={"help": "JSONL file to write instead of printing answers"})
    resume: bool = field(default=False, metadata={"help": "go on with an --output that was interrupted"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    do_sample: bool = field(default=False, metadata={"help": "draw tokens at random instead of taking the likeliest"})
    temperature: float | None = field(default=None, metadata={"help": "with --do_sample True: below 1 is less random"})
    top_k: int | None = field(
        default=None, metadata={"help": "with --do_sample True: draw from the k likeliest tokens"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "with --do_sample True: draw from the likeliest that have this probability"}
    )
    min_p: float | None = field(
        default=None, metadata={"help": "with --do_sample True: the least share of the likeliest token's probability"}
    )
    repetition_penalty: float | None = field(default=None, metadata={"help": "above 1: tokens that occurred get rarer"})
    seed: int = field(default=42, metadata={"help": "of --do_sample True"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows of one batch"})
    load_in_4bit: str = field(
        default="auto", metadata={"help": "auto: as the adapter was trained | True | False; needs bitsandbytes"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before weights are loaded
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """What is to be answered, and by which model."""

    source: ModelSource
    rows: list[dict]
    template: dict
    prompts: list[list[int]]  # ids of each row, up to the answer
    other: ModelSource | None = None  # the model of --compare
    other_prompts: list[list[int]] = field(default_factory=list)  # the same questions by its own tokenizer


def check_arguments(args: Arguments) -> Questions:
    """Completes the arguments and reads the questions.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    if args.chat:
        raise ValueError("--chat True: the conversation is a program of its own, with the same flags: python "
                         f"tools/chat.py --peft_path {args.peft_path or 'outputs/finetune_pp_peft'}")  # fmt: skip
    mistakes = find_mistakes(args)
    if args.peft_path is None and args.model_path is None:
        args.peft_path = loading.find_newest_adapter()
        if args.peft_path is None:
            mistakes.append("--peft_path: no finished adapter below outputs/; train one with python "
                            "finetune_pp_peft.py, or name a model without an adapter with --model_path")  # fmt: skip
    questions_flag = f"--test_path {args.test_path}"
    if args.prompt is not None:
        questions_flag = f"--prompt {args.prompt}"
    rows = []
    with collect(mistakes, questions_flag):
        rows = read_rows(args)
    if args.output:
        with collect(mistakes, f"--output {args.output}"):
            check_output(args)

    source = None
    other = None
    if args.peft_path is not None or args.model_path is not None:
        with collect(mistakes):
            source = loading.open_model(args.model_path, args.peft_path)
    if args.compare is not None:
        with collect(mistakes):
            other = loading.open_model(args.compare, None, model_flag="--compare")
    if source is None or not rows:
        raise ValueError("\n".join(mistakes))
    args.model_path = source.model_path
    args.peft_path = source.peft_path
    if args.load_in_4bit in ("auto", "True", "False"):
        with collect(mistakes, f"--load_in_4bit {args.load_in_4bit}"):
            args.load_in_4bit = str(loading.use_4bit(args.load_in_4bit, source))

    questions = Questions(source, rows, {}, [], other)
    template_flag = "--template_path"
    if args.template_path is not None:
        template_flag = f"--template_path {args.template_path}"
    with collect(mistakes, template_flag):
        questions.template = loading.find_template(args.template_path, source.receipt, source.tokenizer, rows[0])
    if questions.template and args.system is not None:
        with collect(mistakes, f"--system {args.system}"):
            loading.check_system(source, args.system, questions.template)
    asks_sample = args.prompt is None and args.test_path == Arguments.test_path
    if asks_sample and questions.template and questions.template["format"] != "mcq":
        mistakes.append(f"{questions_flag}, the default: these questions have options, and this model was trained on "
                        f"--format {questions.template['format']}; name rows of that form, or ask by "
                        "--prompt")  # fmt: skip
    elif questions.template and not any(mistake.startswith("--system") for mistake in mistakes):
        with collect(mistakes, questions_flag):
            questions.prompts = encode_rows(source, questions.template, rows)
    if questions.prompts and other is not None:
        with collect(mistakes, f"--compare {args.compare}"):
            questions.other_prompts = encode_rows(other, template_of_other(questions), rows)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return questions


def find_mistakes(args: Arguments) -> list[str]:
    """What is wrong with the flags taken by themselves."""
    mistakes = check_sampling(args)
    for name in ("num_samples", "per_device_eval_batch_size"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            mistakes.append(f"--{name} {value}: must be above 0")
    if args.system is not None and args.prompt is None:
        mistakes.append(f"--system {args.system}: it goes with --prompt; rows bring their own system message")
    if args.resume and not args.output:
        mistakes.append("--resume True: name the --output to go on with")
    if args.load_in_4bit not in ("auto", "True", "False"):
        mistakes.append(f"--load_in_4bit {args.load_in_4bit}: choose auto, True or False")
    return mistakes


def check_sampling(args) -> list[str]:
    """What is wrong with the flags that say how tokens are chosen; tools/chat.py has the same ones."""
    mistakes = []
    for name in ("max_new_tokens", *SAMPLING):
        value = getattr(args, name)
        if value is not None and value <= 0:
            mistakes.append(f"--{name} {value}: must be above 0")
    for name in ("top_p", "min_p"):
        value = getattr(args, name)
        if value is not None and value > 1:
            mistakes.append(f"--{name} {value}: a probability, so at most 1")
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = getattr(args, name)
        if value is not None and not args.do_sample:
            mistakes.append(f"--{name} {value}: without --do_sample True nothing is drawn")
    return mistakes


def read_rows(args: Arguments) -> list[dict]:
    """The rows that are to be answered; --prompt becomes a row of its own."""
    if args.prompt is not None:
        text = args.prompt
        if args.prompt == "-":
            text = sys.stdin.read()
        if not text.strip():
            raise ValueError("it is empty")
        return [{"prompt": text, "system": args.system}]
    if args.test_path == "-":
        text = sys.stdin.read()
    elif Path(args.test_path).is_dir():
        raise ValueError("it is a folder; name the file with the rows, or score a tokenized set by tools/evaluate.py")
    else:
        text = Path(args.test_path).read_text(encoding="utf-8-sig")
    if args.test_path.endswith(".json"):
        rows = json.loads(text)
    elif args.test_path.endswith(".csv"):
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except ValueError as problem:
                raise ValueError(f"line {number}: {problem}") from None
    if not rows:
        raise ValueError("it has no rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects")
    if args.num_samples:
        return rows[: args.num_samples]
    if args.output:
        return rows
    return rows[:5]


def check_output(args: Arguments) -> None:
    """--output can be written, and is not there yet or is to be resumed; what a kill cut off is removed later."""
    path = Path(args.output)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise ValueError(f"{folder} is not a writable folder; choose another")
    if path.is_file() and not args.resume:
        raise ValueError("it exists; --resume True goes on with it, or choose another file")


def encode_rows(source: ModelSource, template: dict, rows: list[dict]) -> list[list[int]]:
    """The prompt of each row as ids. Raises ValueError for a row without its fields, or too long for the model."""
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            messages = messages_before_answer(row, template)
            tools = read_tools(row, template)
            prompts.append(loading.encode_messages(source, messages, template, tools))
        except ValueError as problem:
            raise ValueError(f"row {number}: {problem}") from None
    return prompts


def template_of_other(questions: Questions) -> dict:
    """The template for the model of --compare, which may have no chat template."""
    has_chat_template = questions.other.tokenizer.chat_template is not None
    return questions.template | {"chat": questions.template["chat"] and has_chat_template}


# -------------------------------------------------------------------------------------------------------------------
# Model and generation
# -------------------------------------------------------------------------------------------------------------------


def load_model(source: ModelSource, load_in_4bit: bool, use_cpu: bool):
    """The model for inference: bf16 on a GPU that has it, float32 elsewhere; over all GPUs if there are several."""
    # On H100 and later GPUs PyTorch would prefer cuDNN, which builds a plan of half a second for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = loading.compute_dtype(use_cpu)
    if use_cpu or not torch.cuda.is_available():
        device_map = {"": "cpu"}
    elif torch.cuda.device_count() == 1:
        device_map = {"": "cuda"}
    else:
        device_map = "auto"
    options = {}
    if load_in_4bit:
        options["quantization_config"] = loading.four_bit(dtype)
    with loading.ask_library(f"{source.model_path} cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.model_path,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    loading.check_report(report)
    loading.keep_4bit_exact(model)
    if source.adapter is not None:
        loading.fit_vocabulary(source.adapter, source.model_path, model)
        model = PeftModel.from_pretrained(model, source.peft_path)
    return model.eval()


def find_stop_ids(model, tokenizer) -> list[int]:
    """Every id after which the model is done: Llama 3 has several, and a model without an EOS has none."""
    stop_ids = {tokenizer.eos_token_id}
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id):
        if isinstance(ids, list):
            stop_ids.update(ids)
        else:
            stop_ids.add(ids)
    return sorted(stop_ids - {None})


def find_room(model, prompt: list[int]) -> int:
    """The tokens that the model's context leaves for an answer."""
    room = loading.context_length(model.config) - len(prompt)
    if has_virtual_tokens(model):
        room -= model.active_peft_config.num_virtual_tokens
    return room


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """Continues each prompt; greedy unless `options`, which go to transformers' generate, say otherwise.

    Returns:
        the new ids of each prompt, up to and without the first stop id, or until its context is full.
    """
    rooms = [min(max_new_tokens, find_room(model, ids)) for ids in prompts]
    stop_ids = find_stop_ids(model, tokenizer)
    pad_token_id = 0  # what follows a finished answer
    if stop_ids:
        options["eos_token_id"] = stop_ids
        pad_token_id = stop_ids[0]
    # Padding stands on the left, because the new tokens go to the right. LLaMA tokenizers have no pad token; any id
    # does, because the mask comes from the lengths.
    longest = max(len(ids) for ids in prompts)
    padded = []
    mask = []
    for ids in prompts:
        num_padding = longest - len(ids)
        padded.append([0] * num_padding + ids)
        mask.append([0] * num_padding + [1] * len(ids))
    options.setdefault("do_sample", False)
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max(rooms),
        pad_token_id=pad_token_id,
        **options,
    )
    answers = []
    for ids, room in zip(output[:, longest:].tolist(), rooms, strict=True):
        end = 0
        while end < min(len(ids), room) and ids[end] not in stop_ids:
            end += 1
        answers.append(ids[:end])
    return answers


def make_batches(lengths: list[int], batch_size: int, equal_lengths: bool) -> list[list[int]]:
    """Indices of prompts that are answered together, the longest first, so that little is padded.

    Args:
        equal_lengths: no padding at all: virtual tokens stand before the padding, which would come between them and
            the prompt.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = len(batches) > 0 and len(batches[-1]) < batch_size
        if fits and equal_lengths:
            fits = lengths[i] == lengths[batches[-1][0]]
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def generate_all(args: Arguments, model, tokenizer, prompts: list[list[int]], start: int = 0) -> Iterator[list]:
    """Yields the answers of some rows at a time, in the order of the rows, beginning with row `start`.

    The drawing of each window begins with a seed of its own, so a resumed file is what an uninterrupted one would be.
    """
    batch_size = args.per_device_eval_batch_size
    window_size = WINDOW_BATCHES * batch_size
    with tqdm(total=len(prompts), initial=start, desc="generating", unit="row") as progress:
        for first in range(start, len(prompts), window_size):
            window = prompts[first : first + window_size]
            answers = [None] * len(window)
            set_seed(args.seed + first)
            lengths = [len(ids) for ids in window]
            for batch in make_batches(lengths, batch_size, has_virtual_tokens(model)):
                batch_prompts = [window[i] for i in batch]
                new_ids = generate(model, tokenizer, batch_prompts, args.max_new_tokens, **sampling(args))
                for i, answer in zip(batch, new_ids, strict=True):
                    answers[i] = answer
                progress.update(len(batch))
            yield answers


def sampling(args) -> dict:
    """The flags that were given, as transformers' generate takes them; the others are the model's own."""
    options = {"do_sample": args.do_sample}
    for name in SAMPLING:
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


# -------------------------------------------------------------------------------------------------------------------
# What is shown and written
# -------------------------------------------------------------------------------------------------------------------


def fingerprint(args: Arguments) -> str:
    """Ten hex digits of all that decides an answer besides its prompt."""
    settings = asdict(args)
    for name in ("test_path", "num_samples", "output", "resume", "chat", "prompt", "system", "use_cpu"):
        del settings[name]
    del settings["template_path"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def count_finished(args: Arguments, prompts: list[str]) -> int:
    """Rows in an interrupted --output, which is cut behind the last whole window.

    Raises:
        ValueError: the file has other prompts, or its answers were made in another way.
    """
    path = Path(args.output)
    if not path.is_file():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut off
    num_rows = len(lines)
    if num_rows != len(prompts):
        window_size = WINDOW_BATCHES * args.per_device_eval_batch_size
        num_rows = num_rows // window_size * window_size
    for number, line in enumerate(lines[:num_rows]):
        row = json.loads(line)
        is_same = isinstance(row, dict) and number < len(prompts)
        if is_same:
            is_same = row.get("prompt") == prompts[number] and row.get("settings") == fingerprint(args)
        if not is_same:
            raise ValueError(f"--resume True: {path}, line {number + 1}, has another prompt or was made with other "
                             "flags; choose another --output")  # fmt: skip
    os.truncate(path, sum(len(line) + 1 for line in lines[:num_rows]))
    return num_rows


def answer_with_other(args: Arguments, questions: Questions, start: int) -> list[str]:
    """The answers of the model that --compare names, to the questions from number `start` on."""
    in_4bit = args.load_in_4bit == "True" and not loading.is_quantised(questions.other.config)
    model = load_model(questions.other, in_4bit, args.use_cpu)
    tokenizer = questions.other.tokenizer
    answers = []
    for window in generate_all(args, model, tokenizer, questions.other_prompts[start:]):
        answers += tokenizer.batch_decode(window, skip_special_tokens=True)
    return answers


def answer_rows(args: Arguments, model, questions: Questions, other_answers: list[str], start: int) -> None:
    """Answers the rows from number `start` on: prints each answer, or writes it as a line of JSON."""
    tokenizer = questions.source.tokenizer
    number = start
    for answers in generate_all(args, model, tokenizer, questions.prompts, start):
        lines = []
        for ids in answers:
            prompt = questions.prompts[number]
            result = {
                "index": number,
                "prompt": tokenizer.decode(prompt),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "expected": expected_answer(questions.rows[number], questions.template),
                "num_tokens": len(ids),
                "stopped": len(ids) < min(args.max_new_tokens, find_room(model, prompt)),
                "settings": fingerprint(args),
            }
            if args.compare:
                result["base_answer"] = other_answers[number - start]
            lines.append(json.dumps(result, ensure_ascii=False) + "\n")
            if not args.output:
                messages = messages_before_answer(questions.rows[number], questions.template)
                show(args, messages[-1]["content"], result)
            number += 1
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.writelines(lines)


def show(args: Arguments, question: str, result: dict) -> None:
    tqdm.write(f"\n--- {result['index'] + 1}\n{question}")
    if args.compare:
        tqdm.write(f"{args.compare}: {result['base_answer']}")
    expected = result["expected"]
    if expected is None:
        expected = "not given"
    tqdm.write(f"answer:   {result['answer']}\nexpected: {expected}")


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    start = 0
    other_answers = []
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        questions = check_arguments(args)
        if args.output:
            start = count_finished(args, questions.source.tokenizer.batch_decode(questions.prompts))
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        if args.compare and start < len(questions.rows):
            other_answers = answer_with_other(args, questions, start)
        model = load_model(questions.source, args.load_in_4bit == "True", args.use_cpu)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    print(f"model {args.model_path}, adapter {args.peft_path or 'none'}")
    answer_rows(args, model, questions, other_answers, start)
    if args.output:
        print(f"{len(questions.rows)} answers: {args.output}")


if __name__ == "__main__":
    main()
