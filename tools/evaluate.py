"""Scores a model, or a model with an adapter, on a tokenized set; what is scored follows from the set.

    python tools/evaluate.py                                              # the sample model before training
    python tools/evaluate.py --peft_path outputs/finetune_pp_peft         # and with the adapter of the quickstart
    python tools/evaluate.py --model_path outputs/finetune_pp --shots 3
    python tools/evaluate.py --peft_path outputs/finetune_pp_peft --all_checkpoints True
    python tools/evaluate.py --compare models/SmolLM2-135M-Instruct outputs/finetune_pp_peft

Multiple choice (tokenize_dataset.py --format mcq): an option's score is the summed log-probability of its tokens
without the EOS; the accuracy is also given with scores divided by the option's characters (acc and acc_norm of
lm-evaluation-harness). Beside it: 95 % Wilson interval, confusion of the options, expected calibration error, what
always choosing the commonest option and choosing at random would reach, and the loss per token of the right answer
with the EOS, which is the training scripts' evaluation loss.
Instructions and conversations: loss and accuracy per target token. Documents: perplexity per token, bits per byte.

--compare says by an exact McNemar test whether two accuracies really differ. Writes evaluation.json and a Markdown
table, evaluation.md, into the run's folder, or where --output says.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import IGNORE_INDEX, DataCollator, TokenizedDataset

SAMPLE_MODEL = "models/SmolLM2-135M-Instruct"
NUM_BINS = 10  # of the calibration error


@dataclass
class Arguments:
    model_path: str | None = field(
        default=None, metadata={"help": f"folder or hub id; default: the adapter's base, or {SAMPLE_MODEL}"}
    )
    peft_path: str | None = field(default=None, metadata={"help": "folder of an adapter on that model"})
    dataset_path: str = field(
        default="data_sample/tokenized/triage_test", metadata={"help": "what tokenize_dataset.py wrote"}
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "two of: run folder, model, evaluation.json; do they differ?"}
    )
    all_checkpoints: bool = field(default=False, metadata={"help": "score every checkpoint of the run, and plot it"})
    shots: int = field(default=0, metadata={"help": "questions with their answers that stand before each question"})
    shots_path: str = field(
        default="data_sample/tokenized/triage_train", metadata={"help": "tokenized set that --shots are drawn from"}
    )
    seed: int = field(default=42, metadata={"help": "of drawing --shots"})
    window: int = field(default=1024, metadata={"help": "documents: tokens of a forward; each token sees half or more"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "questions or rows of one forward"})
    load_in_4bit: bool = field(default=False, metadata={"help": "hold the base model in 4 bit; needs bitsandbytes"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write; the table goes beside it as .md"})
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


# -------------------------------------------------------------------------------------------------------------------
# What can go wrong is found here, before weights are loaded
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class TestSet:
    kind: str  # multiple_choice | instruction | text
    rows: object  # a datasets.Dataset, or a list of the same rows
    tokenizer: object
    ledger: dict
    shots: list[int]  # ids that stand before each question


def check_arguments(args: Arguments) -> TestSet | None:
    """Completes the arguments, and reads the set (not for --compare); raises ValueError with every mistake."""
    mistakes = []
    for name, least in (("per_device_eval_batch_size", 1), ("window", 2), ("shots", 0)):
        if getattr(args, name) < least:
            mistakes.append(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.peft_path and not (Path(args.peft_path) / "adapter_config.json").is_file():
        mistakes.append(f"--peft_path {args.peft_path}: no adapter_config.json in it; train an adapter first")
    elif args.peft_path and args.model_path is None:
        adapter = json.loads((Path(args.peft_path) / "adapter_config.json").read_text(encoding="utf-8"))
        args.model_path = adapter["base_model_name_or_path"]
    args.model_path = args.model_path or SAMPLE_MODEL
    is_local = args.model_path.startswith((".", "/", "~", "models/", "outputs/"))
    if not args.compare and is_local and not Path(args.model_path).is_dir():
        mistakes.append(
            f"--model_path {args.model_path}: no such folder; bash scripts/quickstart.sh fetches the sample"
        )
    if args.all_checkpoints and not list_checkpoints(args):
        mistakes.append(f"--all_checkpoints True: {args.peft_path or args.model_path} has no complete checkpoint")
    if args.compare is not None and (len(args.compare) != 2 or args.all_checkpoints or args.peft_path):
        mistakes.append(f"--compare {' '.join(args.compare)}: name two runs, and neither --peft_path nor "
                        "--all_checkpoints")  # fmt: skip
    for path in args.compare or ():
        if not Path(path).exists():
            mistakes.append(f"--compare {path}: no such folder or file")
    data = None
    if not args.compare:
        try:
            data = TokenizedDataset(args.dataset_path, passage_length=1) if mistakes else read_set(args)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--dataset_path {args.dataset_path}: {problem}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return data


def read_set(args: Arguments) -> TestSet:
    """The rows, and what kind of a score they allow. Raises ValueError if they do not fit the model."""
    config, tokenizer = AutoConfig.from_pretrained(args.model_path), AutoTokenizer.from_pretrained(args.model_path)
    checked = TokenizedDataset(args.dataset_path, config, tokenizer, passage_length=1)
    rows, ledger = load_from_disk(args.dataset_path), checked.ledger
    if "options" in rows.column_names:
        kind = "multiple_choice"
    else:
        kind = "text" if ledger.get("format") == "text" else "instruction"
    if args.shots and kind != "multiple_choice":
        raise ValueError("--shots needs questions with options; tokenize with --format mcq and --packing False")
    shots = draw_shots(args, tokenizer) if args.shots else []
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if checked.has_documents:
        args.window = min(args.window, context)
    else:
        longest = len(shots) + max(len(ids) for ids in rows["input_ids"])
        if longest > context:
            raise ValueError(f"a row has {longest} tokens, shots included, and the model can attend to "
                             f"{context}; tokenize with a lower --max_length")  # fmt: skip
    return TestSet(kind, rows, tokenizer, ledger, shots)


def draw_shots(args: Arguments, tokenizer) -> list[int]:
    """Whole rows of --shots_path, with their right answers, one after the other."""
    TokenizedDataset(args.shots_path, tokenizer=tokenizer)
    rows = load_from_disk(args.shots_path)["input_ids"]
    chosen = np.random.default_rng(args.seed).choice(len(rows), size=min(args.shots, len(rows)), replace=False)
    shots = []
    for number in chosen:
        shots = join(shots, rows[int(number)], tokenizer)
    return shots


def join(shots: list[int], ids: list[int], tokenizer) -> list[int]:
    """`ids` behind `shots`, without the BOS that the tokenizer put before them: the first shot has it."""
    repeated = shots and ids[0] == tokenizer.bos_token_id and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return [*shots, *(ids[1:] if repeated else ids)]


def list_checkpoints(args: Arguments) -> list[Path]:
    """The complete checkpoints of the run, in the order of its steps."""
    folders = Path(args.peft_path or args.model_path).glob("checkpoint-*")
    complete = [folder for folder in folders if (folder / "complete.json").is_file()]
    return sorted(complete, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def load_model(args: Arguments):
    """Raises ValueError naming both if the adapter does not fit the model."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype, quantization = torch.bfloat16 if bf16 else torch.float32, None
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization,
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    if args.peft_path:
        from peft import PeftModel

        if not (Path(args.peft_path) / "adapter_model.safetensors").is_file():
            raise ValueError(f"--peft_path {args.peft_path}: no adapter_model.safetensors in it")
        try:
            model = PeftModel.from_pretrained(model, args.peft_path)
        except (ValueError, RuntimeError, SafetensorError) as problem:
            reason = str(problem).splitlines()[0]
            raise ValueError(f"--peft_path {args.peft_path} is damaged or does not fit --model_path "
                             f"{args.model_path}: {reason}") from None  # fmt: skip
    return model.eval()


def has_virtual_tokens(model) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


# -------------------------------------------------------------------------------------------------------------------
# Multiple choice
# -------------------------------------------------------------------------------------------------------------------


def lay_out(question: dict) -> dict[str, torch.Tensor]:
    """One row in which the prompt stands once, followed by all its options.

    A token sees the prompt and its own option, nothing else, and each option's positions go on from the prompt: the
    logits are those of every prompt + option by itself, for the price of one prompt.

    Returns:
        `input_ids`, `position_ids` [T]; `seen` [T, T], True where the token of the row sees that of the column;
        `sources` [N]: where each option token is predicted; `targets` [N]: its id; `owners` [N]: its option.
    """
    prompt = question["input_ids"][: -len(question["options"][0])]
    input_ids, position_ids, owners_of_all = list(prompt), list(range(len(prompt))), [-1] * len(prompt)
    sources, targets, owners = [], [], []
    for option, ids in enumerate(question["options"]):
        sources += [len(prompt) - 1, *range(len(input_ids), len(input_ids) + len(ids) - 1)]
        targets += ids
        owners += [option] * len(ids)
        input_ids += ids
        position_ids += range(len(prompt), len(prompt) + len(ids))
        owners_of_all += [option] * len(ids)
    owner = torch.tensor(owners_of_all)
    seen = ((owner[None, :] == -1) | (owner[:, None] == owner[None, :])).tril()
    row = {"input_ids": input_ids, "position_ids": position_ids}
    row |= {"sources": sources, "targets": targets, "owners": owners}
    return {name: torch.tensor(ids) for name, ids in row.items()} | {"seen": seen}


@torch.no_grad()
def score_batch(model, questions: list[dict]) -> list[list[list[float]]]:
    """Log-probabilities: for each question, for each option, for each of its tokens."""
    if has_virtual_tokens(model):
        # Virtual tokens stand before a whole row, so each option needs a row of its own.
        return [score_options_apart(model, question) for question in questions]
    rows = [lay_out(question) for question in questions]
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    # Padding sees itself, because attention over nothing would be NaN.
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[number, :length], position_ids[number, :length] = row["input_ids"], row["position_ids"]
        seen[number, :length, :length] = row["seen"]
    # The head multiplies a position with the whole vocabulary: none before the first that predicts an option's token.
    first = min(int(row["sources"][0]) for row in rows)
    logits = model(
        input_ids=input_ids.to(model.device),
        position_ids=position_ids.to(model.device),
        attention_mask=seen[:, None].to(model.device),
        logits_to_keep=longest - first,
        use_cache=False,
    ).logits
    numbers = torch.cat([torch.full_like(row["sources"], number) for number, row in enumerate(rows)])
    sources = torch.cat([row["sources"] for row in rows]) - first
    logits = logits[numbers.to(logits.device), sources.to(logits.device)].float()
    targets = torch.cat([row["targets"] for row in rows]).to(logits.device)
    log_probs = iter(logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist())
    scores = [[[] for _ in question["options"]] for question in questions]
    for number, row in enumerate(rows):
        for option in row["owners"].tolist():
            scores[number][option].append(next(log_probs))
    return scores


def score_options_apart(model, question: dict) -> list[list[float]]:
    """As score_batch for one question, with prompt + option in a row of its own, padded on the right."""
    prompt = question["input_ids"][: -len(question["options"][0])]
    rows = [torch.tensor(prompt + ids) for ids in question["options"]]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    logits = logits[:, -input_ids.shape[1] :]  # without the virtual tokens' own
    scores = []
    for row, ids in zip(logits, question["options"], strict=True):
        log_probs = row[len(prompt) - 1 : len(prompt) - 1 + len(ids)].float().log_softmax(-1)
        scores.append(log_probs[range(len(ids)), ids].tolist())
    return scores


def score_questions(model, questions: list[dict], batch_size: int) -> list[list[list[float]]]:
    """score_batch of all questions, in their order; a batch has questions of similar length."""
    lengths = [len(question["input_ids"]) + sum(map(len, question["options"])) for question in questions]
    order, scores = sorted(range(len(lengths)), key=lambda i: -lengths[i]), [None] * len(lengths)
    with tqdm(total=len(lengths), desc="evaluating", unit="question") as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            for i, score in zip(numbers, score_batch(model, [questions[i] for i in numbers]), strict=True):
                scores[i] = score
            progress.update(len(numbers))
    return scores


def wilson_interval(num_right: int, num_questions: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927, as in Brown, Cai and DasGupta 2001, formula 4)."""
    share = num_right / num_questions
    center = share + z * z / (2 * num_questions)
    half = z * math.sqrt(share * (1 - share) / num_questions + z * z / (4 * num_questions**2))
    scale = 1 + z * z / num_questions
    return (center - half) / scale, (center + half) / scale


def calibration_error(confidences: list[float], right: list[bool]) -> float:
    """Expected calibration error (Guo et al. 2017, formula 3): how far confidence and accuracy are apart, on average.

    A confidence is the probability that the chosen option has among the options.
    """
    bins = np.minimum((np.array(confidences) * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(sum(c - r for c, r, b in zip(confidences, right, bins, strict=True) if b == number))
            for number in range(NUM_BINS)]  # fmt: skip
    return sum(gaps) / len(right)


def read_options(question: dict, tokenizer, template: dict) -> tuple[list[str], list[int]]:
    """The texts of the options, and the place that each has in the question: 0 for the first, A.

    A tokenized set lists the right option first. Its place is found again where the prompt shows the options; letters
    tell it themselves.
    """
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in question["options"]]
    if template.get("answer") == "letter":
        return texts, ["ABCDE".index(text) for text in texts]
    prompt = tokenizer.decode(question["input_ids"][: -len(question["options"][0])])
    lines = [re.escape(template.get("option", "{text}").format(text=text, letter="")) for text in texts]
    found = [[match.start() for match in re.finditer(f"^{line}\\s*$", prompt, re.MULTILINE)] or [-1] for line in lines]
    starts = [positions[-1] for positions in found]
    return texts, [sorted(starts).index(start) for start in starts]


def evaluate_choices(model, questions: list[dict], tokenizer, template: dict, batch_size: int) -> dict:
    """All figures of a multiple-choice set, and `examples` with what each question got."""
    scores = score_questions(model, questions, batch_size)
    examples, confusion, confidences = [], {}, []
    right_log_prob, right_tokens = 0.0, 0
    for question, options in zip(questions, scores, strict=True):
        texts, places = read_options(question, tokenizer, template)
        sums = [sum(option[:-1]) for option in options]  # without the EOS, which says how long an answer should be
        means = [score / max(1, len(text)) for score, text in zip(sums, texts, strict=True)]
        right_log_prob += sum(options[0])
        right_tokens += len(options[0])
        chosen = sums.index(max(sums))
        confidences.append(1 / sum(math.exp(score - max(sums)) for score in sums))
        # The right option is listed first, so a tie must not count for it.
        right, right_norm = (all(values[0] > other for other in values[1:]) for values in (sums, means))
        row = confusion.setdefault("ABCDE"[places[0]], Counter())
        row["ABCDE"[places[chosen]]] += 1
        examples.append({"right": right, "right_norm": right_norm, "places": places, "scores": sums, "norm": means})
    num = len(examples)
    result = {"num_questions": num}
    for name, key in (("accuracy", "right"), ("accuracy_norm", "right_norm")):
        num_right = sum(example[key] for example in examples)
        result |= {name: num_right / num, f"{name}_interval": list(wilson_interval(num_right, num))}
    return result | {
        "loss": -right_log_prob / right_tokens,
        "calibration_error": calibration_error(confidences, [example["right"] for example in examples]),
        "baseline_random": sum(1 / len(question["options"]) for question in questions) / num,
        "baseline_majority": max(sum(row.values()) for row in confusion.values()) / num,
        "confusion": {name: dict(sorted(confusion[name].items())) for name in sorted(confusion)},
        "examples": examples,
    }


def mcnemar(right_a: list[bool], right_b: list[bool]) -> dict:
    """Exact McNemar test (McNemar 1947): if A and B were equally good, how likely is a difference at least as large?

    Only questions that one of them answers and the other does not say anything; under the hypothesis each of these
    falls to A or B like a coin.
    """
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    num = only_a + only_b
    tail = sum(math.comb(num, k) for k in range(min(only_a, only_b) + 1)) / 2**num
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail)}


# -------------------------------------------------------------------------------------------------------------------
# Instructions, conversations and documents
# -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_targets(model, rows: list[dict[str, torch.Tensor]]) -> tuple[float, int, int]:
    """(summed negative log-likelihood in nats, tokens that the model finds likeliest, tokens) of the rows' targets."""
    joined = not has_virtual_tokens(model)
    batch = {name: tensor.to(model.device) for name, tensor in DataCollator(joined)(rows).items()}
    labels = batch.pop("labels")
    if joined:
        targets = batch.pop("shift_labels")[0]
        logits = model(**batch, use_cache=False).logits[0].float()
    else:
        logits = model(**batch, use_cache=False).logits[:, -labels.shape[1] :][:, :-1]
        is_target = labels[:, 1:] != IGNORE_INDEX
        logits, targets = logits[is_target].float(), labels[:, 1:][is_target]
    nll = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum").item()
    return nll, int((logits.argmax(-1) == targets.to(logits.device)).sum()), len(targets)


def cut_document(ids: list[int], window: int) -> list[dict[str, torch.Tensor]]:
    """Windows that overlap by half: each token but the first is a target once, with half a window or all before it."""
    rows, done = [], 1
    for start in range(0, max(1, len(ids) - window + window // 2), max(1, window // 2)):
        end = min(start + window, len(ids))
        labels = torch.full((end - start,), IGNORE_INDEX)
        labels[done - start :] = torch.tensor(ids[done:end])
        rows.append({"input_ids": torch.tensor(ids[start:end]), "labels": labels})
        done = end
    return rows


def count_bytes(ids: list[int], tokenizer) -> int:
    """UTF-8 bytes of the text that the model had to predict: all but the first token's."""
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:1])]
    return len(texts[0].encode()) - len(texts[1].encode())


def evaluate_targets(model, data: TestSet, args: Arguments) -> dict:
    """Loss and accuracy per target token; of documents also perplexity and bits per byte."""
    rows, num_bytes = [], 0
    for row in data.rows:
        starts = [i for i, position in enumerate(row.get("position_ids", [0])) if position == 0]
        if data.kind == "text":
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                num_bytes += count_bytes(row["input_ids"][start:end], data.tokenizer)
        if "labels" in row:
            rows.append({name: torch.tensor(ids) for name, ids in row.items()})
        else:
            rows += cut_document(row["input_ids"], args.window)
    total, right, num = 0.0, 0, 0
    size = args.per_device_eval_batch_size
    for start in tqdm(range(0, len(rows), size), desc="evaluating", unit="batch"):
        figures = score_targets(model, rows[start : start + size])
        total, right, num = total + figures[0], right + figures[1], num + figures[2]
    result = {"num_rows": len(data.rows), "num_targets": num, "loss": total / num, "token_accuracy": right / num}
    if data.kind == "text":
        result |= {"perplexity": math.exp(total / num), "bits_per_byte": total / math.log(2) / num_bytes}
    return result


# -------------------------------------------------------------------------------------------------------------------
# What is printed and written
# -------------------------------------------------------------------------------------------------------------------


def evaluate(args: Arguments, data: TestSet) -> dict:
    """Loads the model and scores it; the result also says what was scored."""
    model = load_model(args)
    if data.kind == "multiple_choice":
        questions = [{"input_ids": join(data.shots, row["input_ids"], data.tokenizer), "options": row["options"]}
                     for row in data.rows]  # fmt: skip
        template = data.ledger.get("template", {})
        result = evaluate_choices(model, questions, data.tokenizer, template, args.per_device_eval_batch_size)
    else:
        result = evaluate_targets(model, data, args)
    facts = {"kind": data.kind, "dataset_input_sha256": data.ledger.get("input_sha256")}
    return facts | result | {name: value for name, value in asdict(args).items() if name != "compare"}


def describe(result: dict) -> str:
    """One line for the terminal."""
    path = result["peft_path"] or result["model_path"]
    if result["kind"] == "multiple_choice":
        low, high = result["accuracy_interval"]
        return (f"accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
                f"loss {result['loss']:.4f}, {result['num_questions']} questions: {path}")  # fmt: skip
    line = (
        f"loss {result['loss']:.4f}, token accuracy {result['token_accuracy']:.1%}, {result['num_targets']:,} targets"
    )
    if result["kind"] == "text":
        line += f", perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits per byte"
    return f"{line}: {path}"


def print_details(result: dict) -> None:
    """The rest of a multiple-choice result."""
    low, high = result["accuracy_norm_interval"]
    print(f"length-normalised {result['accuracy_norm']:.1%} ({low:.1%} to {high:.1%}); calibration error "
          f"{result['calibration_error']:.3f}; always the commonest option {result['baseline_majority']:.1%}, random "
          f"{result['baseline_random']:.1%}")  # fmt: skip
    names = sorted({name for row in result["confusion"].values() for name in row} | result["confusion"].keys())
    print("right option by row, chosen by column\n   " + "".join(f"{name:>6}" for name in names))
    for name, row in result["confusion"].items():
        print(f"{name:3}" + "".join(f"{row.get(other, 0):>6}" for other in names))


COLUMNS = {  # of the Markdown table, for each kind of set
    "multiple_choice": ["accuracy", "accuracy_interval", "accuracy_norm", "loss", "calibration_error",
                        "baseline_majority", "baseline_random", "num_questions"],
    "instruction": ["loss", "token_accuracy", "num_targets"],
    "text": ["perplexity", "bits_per_byte", "loss", "token_accuracy", "num_targets"],
}  # fmt: skip


def make_table(results: list[dict]) -> str:
    """A Markdown table with one row for each result."""
    columns = COLUMNS[results[0]["kind"]]
    lines = [f"| model | set | shots | {' | '.join(column.replace('_', ' ') for column in columns)} |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for result in results:
        cells = [result["peft_path"] or result["model_path"], Path(result["dataset_path"]).name, str(result["shots"])]
        for column in columns:
            value = result[column]
            if isinstance(value, list):
                cells.append(f"{value[0]:.1%} to {value[1]:.1%}")
            elif isinstance(value, int):
                cells.append(f"{value:,}")
            else:
                cells.append(f"{value:.1%}" if "accuracy" in column or "baseline" in column else f"{value:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def find_output(args: Arguments) -> Path:
    """--output, or evaluation.json in the run's folder; a model that no script trained gets a file in outputs/."""
    run = Path(args.peft_path or args.model_path)
    if args.output:
        return Path(args.output)
    return (run if (run / "run.json").is_file() else Path("outputs") / run.name) / "evaluation.json"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def evaluate_checkpoints(args: Arguments, data: TestSet) -> list[dict]:
    """One result for each checkpoint, with its `step`."""
    results, name = [], "peft_path" if args.peft_path else "model_path"
    for folder in list_checkpoints(args):
        result = evaluate(replace(args, **{name: str(folder)}), data)
        results.append({"step": int(folder.name.removeprefix("checkpoint-"))} | result)
        print(describe(results[-1]))
    return results


def plot(results: list[dict], path: Path) -> None:
    """Accuracy with its interval, or the loss, over the steps, as a PNG file."""
    import matplotlib

    matplotlib.use("agg")  # no window
    from matplotlib import pyplot

    name = "accuracy" if "accuracy" in results[0] else "loss"
    steps, values = [result["step"] for result in results], [result[name] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, values, marker="o")
    if name == "accuracy":
        lows, highs = zip(*(result["accuracy_interval"] for result in results), strict=True)
        axes.fill_between(steps, lows, highs, alpha=0.2, label="95 % interval")
        axes.axhline(results[0]["baseline_majority"], linestyle="--", color="grey", label="commonest option")
        axes.legend()
    axes.set(xlabel="optimizer steps", ylabel=name, title=Path(results[0]["dataset_path"]).name)
    figure.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)


def read_result(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def evaluate_run(args: Arguments, folder: str) -> dict:
    """The result of an adapter's or a whole model's folder."""
    adapter = Path(folder) / "adapter_config.json"
    run = replace(args, model_path=folder, peft_path=None)
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        run = replace(args, model_path=base, peft_path=folder)
    try:
        data = read_set(run)
    except (ValueError, OSError) as problem:
        raise ValueError(f"--compare {folder}, --dataset_path {args.dataset_path}: {problem}") from None
    return evaluate(run, data)


def compare(args: Arguments) -> dict:
    """Scores both runs, or reads what a former evaluation wrote, and tests whether they differ.

    Raises:
        ValueError: a file is no evaluation of a multiple-choice set, or the two have other questions.
    """
    results = []
    for path in args.compare:
        result = read_result(Path(path)) if Path(path).is_file() else evaluate_run(args, path)
        if not isinstance(result, dict) or "examples" not in result:
            raise ValueError(f"--compare {path}: it has no examples; compare evaluations of questions with options")
        results.append(result)
        print(describe(result))
    a, b = results
    if any(a[name] != b[name] for name in ("num_questions", "dataset_input_sha256", "shots")):
        raise ValueError("--compare: the two were scored on other questions or with other shots")
    test = mcnemar(*([example["right"] for example in result["examples"]] for result in results))
    verdict = "the difference is real" if test["p"] < 0.05 else "the difference may be chance"
    print(f"only the first is right: {test['only_a']}, only the second: {test['only_b']}; exact McNemar p = "
          f"{test['p']:.2g}: {verdict}")  # fmt: skip
    return {"mcnemar": test | {"verdict": verdict}, "a": a, "b": b}


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        data = check_arguments(args)
        output = find_output(args)
        if args.compare:
            comparison = compare(args)
            if args.output:
                write(output, json.dumps(comparison))
            return
        results = evaluate_checkpoints(args, data) if args.all_checkpoints else [evaluate(args, data)]
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    table = make_table(results)
    if not args.all_checkpoints:
        print(describe(results[0]))
    if data.kind == "multiple_choice":
        print_details(results[-1])
    print(table, end="")
    write(output, json.dumps({"checkpoints": results} if args.all_checkpoints else results[0]))
    write(output.with_suffix(".md"), table)
    if args.all_checkpoints and find_spec("matplotlib") is None:
        print("no PNG: pip install matplotlib")
    elif args.all_checkpoints:
        plot(results, output.with_suffix(".png"))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
