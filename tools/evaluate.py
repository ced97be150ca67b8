"""Scores a model, or a model with an adapter, on a tokenized set; what is scored follows from the set.

    python tools/evaluate.py                                              # the sample model before training
    python tools/evaluate.py --peft_path outputs/finetune_pp_peft         # and with the adapter of the quickstart
    python tools/evaluate.py --model_path outputs/finetune_pp --shots 3
    python tools/evaluate.py --peft_path outputs/finetune_pp_peft --all_checkpoints True
    python tools/evaluate.py --compare models/SmolLM2-135M-Instruct outputs/finetune_pp_peft
    python tools/evaluate.py --dataset_path data_sample/tokenized/preference_test --peft_path outputs/finetune_pp_dpo

Multiple choice (tokenize_dataset.py --format mcq): an option's score is the summed log-probability of its tokens
without the EOS; the accuracy is also given with scores divided by the option's characters (acc and acc_norm of
lm-evaluation-harness). Beside it: 95 % Wilson interval, confusion of the options, expected calibration error, what
always choosing the commonest option and choosing at random would reach, and the loss per token of the right answer
with the EOS, which is the training scripts' evaluation loss.
Instructions and conversations: loss and accuracy per target token. Documents: perplexity per token, bits per byte.
Pairs of answers (--format preference): how often the implicit reward of the chosen answer is above that of the rejected
one, and how often its log-probability is. A reward needs a reference: for an adapter the same model with the adapter
switched off (or the adapter that its training began with), for a whole model the one that --base_model names.

--compare says by an exact McNemar test whether two accuracies really differ. Writes evaluation.json and a Markdown
table, evaluation.md, into the run's folder, or where --output says.

The model sees what it saw in training: the attention is the model's own, with its sliding windows and soft caps, and
no token attends to another row. The result is the same for every batch size.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_collator
from data_collator import (
    IGNORE_INDEX,
    DataCollator,
    TokenizedDataset,
    find_difference,
    find_parts,
    load_parts,
    read_ledgers,
    vocabulary_hash,
)
from data_sample.rendering import LETTERS, adds_bos, find_places
from tools import loading
from tools.loading import SAMPLE_MODEL, ModelSource, collect, has_virtual_tokens
from tools.paths import expand_home

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
    base_model: str | None = field(
        default=None,
        metadata={"help": "pairs of answers: the model or adapter before training; an adapter knows its own"},
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "pairs of answers: scale of the rewards; default: that of the training, or 0.1"},
    )
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
    kind: str  # multiple_choice | preference | instruction | text
    rows: object  # a datasets.Dataset, or a list of the same rows
    tokenizer: object
    ledger: dict
    shots: list[int]  # ids that stand before each question


@dataclass
class Run:
    """A model and a set that fit each other."""

    source: ModelSource
    data: TestSet
    reference: ModelSource | None = None  # preference: the model before training, if it is in another folder


def check_arguments(args: Arguments) -> list[Run]:
    """Completes the arguments, and reads what is to be scored: one run, or one for each checkpoint or --compare.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = []
    for name, lowest in (("per_device_eval_batch_size", 1), ("window", 2), ("shots", 0)):
        if getattr(args, name) < lowest:
            mistakes.append(f"--{name} {getattr(args, name)}: must be at least {lowest}")
    if args.beta is not None and not args.beta > 0:
        mistakes.append(f"--beta {args.beta}: must be above 0")
    if args.compare is not None:
        runs = check_compare(args, mistakes)
    else:
        if args.model_path is None and args.peft_path is None:
            args.model_path = SAMPLE_MODEL
        runs = check_runs(args, mistakes)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if args.dataset_path == Arguments.dataset_path and any(was_trained_on_other_data(run) for run in runs):
        print(f"scoring {args.dataset_path}, which is not about what this model was trained on; --dataset_path names "
              "another set")  # fmt: skip
    return runs


def was_trained_on_other_data(run: Run | None) -> bool:
    """Whether the receipt of a run does not name the sample's set, to which the default test set belongs."""
    if run is None:
        return False
    trained_on = run.source.receipt.get("arguments", {}).get("dataset_path")
    return trained_on is not None and "triage_train" not in trained_on


def check_runs(args: Arguments, mistakes: list[str]) -> list[Run]:
    """The model that the flags name, or each of its checkpoints."""
    places = [(args.model_path, args.peft_path)]
    if args.all_checkpoints:
        checkpoints = list_checkpoints(args)
        if not checkpoints:
            mistakes.append(f"--all_checkpoints True: {args.peft_path or args.model_path} has no complete checkpoint")
        if args.peft_path is not None:
            places += [(args.model_path, str(folder)) for folder in checkpoints]
        else:
            places += [(str(folder), None) for folder in checkpoints]
    runs = []
    for model_path, peft_path in places:
        source = None
        with collect(mistakes):
            source = loading.open_model(model_path, peft_path)
        data = read_set(args, source, mistakes)
        if source is None or data is None:
            return []
        if args.load_in_4bit:
            with collect(mistakes, "--load_in_4bit True"):
                loading.use_4bit("True", source)
        runs.append(Run(source, data, check_reference(args, source, data, mistakes)))
    args.model_path = runs[0].source.model_path
    args.peft_path = runs[0].source.peft_path
    if args.all_checkpoints:
        return runs[1:]
    return runs


def check_compare(args: Arguments, mistakes: list[str]) -> list[Run | None]:
    """The two runs of --compare; None for one that was scored before."""
    if len(args.compare) != 2 or args.all_checkpoints or args.peft_path:
        mistakes.append(f"--compare {' '.join(args.compare)}: name two runs, and neither --peft_path nor "
                        "--all_checkpoints")  # fmt: skip
        return []
    runs = []
    for path in args.compare:
        if Path(path).is_file():
            runs.append(None)
            with collect(mistakes, f"--compare {path}"):
                read_result(Path(path))
        elif not Path(path).exists():
            mistakes.append(f"--compare {path}: no such folder or file")
        else:
            runs.append(check_folder(args, path, mistakes))
    return runs


def check_folder(args: Arguments, path: str, mistakes: list[str]) -> Run | None:
    """The adapter or the whole model in a folder that --compare names, on --dataset_path."""
    source = None
    with collect(mistakes):
        if (Path(path) / "adapter_config.json").is_file():
            source = loading.open_model(None, path, model_flag="--compare", peft_flag="--compare")
        else:
            source = loading.open_model(path, None, model_flag="--compare")
    data = read_set(args, source, mistakes)
    if data is None:
        return None
    if data.kind not in ("multiple_choice", "preference"):
        mistakes.append(f"--dataset_path {args.dataset_path}: --compare needs questions with options or pairs; "
                        "tokenize with --format mcq and --packing False, or with --format preference")  # fmt: skip
    return Run(source, data, check_reference(args, source, data, mistakes))


def check_reference(args: Arguments, source: ModelSource, data: TestSet, mistakes: list[str]) -> ModelSource | None:
    """The model before training, which rewards are counted from; None if it is the model with its adapter off, or none.

    Beside --compare, --base_model is that of whole models only.
    """
    if data.kind != "preference":
        if args.base_model is not None:
            mistakes.append(f"--base_model {args.base_model}: only pairs of answers are scored against a reference; "
                            "leave it out")  # fmt: skip
        return None
    flag = "--base_model"
    path = args.base_model
    if source.adapter is not None and (path is None or args.compare is not None):
        flag = f"{source.peft_path} was trained from the adapter"
        path = source.receipt.get("arguments", {}).get("peft_path")
    if path is None:
        return None
    if Path(path).absolute() == Path(source.peft_path or source.model_path).absolute():
        if flag != "--base_model":  # runs of former versions could write where they had read from
            mistakes.append(f"{flag} {path}: that is its own folder, so it is gone; name a copy by --base_model")
        elif args.compare is None:
            mistakes.append(f"--base_model {path}: it is the model that is scored, and all its rewards would be 0; "
                            "leave it out")  # fmt: skip
        return None
    reference = None
    with collect(mistakes):
        if (Path(path) / "adapter_config.json").is_file():
            reference = loading.open_model(None, path, model_flag=flag, peft_flag=flag)
        else:
            reference = loading.open_model(path, None, model_flag=flag)
    if reference is not None:
        with collect(mistakes, f"{flag} {path}"):
            check_ids(data.ledger, data.rows, reference)
            check_lengths(reference, data)
    return reference


def read_set(args: Arguments, source: ModelSource | None, mistakes: list[str]) -> TestSet | None:
    """The rows, and what kind of a score they allow; None if they do not fit the model, or the set itself is wrong."""
    num_before = len(mistakes)
    if is_preference_set(args.dataset_path):
        return read_pairs(args, source, mistakes)
    checked = None
    with collect(mistakes, f"--dataset_path {args.dataset_path}"):
        checked = open_set(args.dataset_path, source)
    if checked is None or source is None:
        return None
    rows = load_parts(find_parts(args.dataset_path))
    data = TestSet("instruction", rows, source.tokenizer, checked.ledger, [])
    if "options" in data.rows.column_names:
        data.kind = "multiple_choice"
    elif data.ledger.get("format") == "text":
        data.kind = "text"
    if checked.packed and source.num_virtual_tokens:
        mistakes.append(f"--dataset_path {args.dataset_path}: its rows hold several documents, and this adapter puts "
                        "its virtual tokens before one document; tokenize with --packing False")  # fmt: skip
    if args.shots and data.kind != "multiple_choice":
        mistakes.append(f"--shots {args.shots}: needs questions with options; tokenize with --format mcq and "
                        "--packing False")  # fmt: skip
    elif args.shots:
        with collect(mistakes, f"--shots_path {args.shots_path}"):
            open_set(args.shots_path, source)
            data.shots = draw_shots(args, source.tokenizer)
    if checked.has_documents:
        args.window = min(args.window, source.context_length)
    else:
        with collect(mistakes, f"--dataset_path {args.dataset_path}"):
            check_lengths(source, data)
    if len(mistakes) > num_before:
        return None
    return data


def open_set(path: str, source: ModelSource | None) -> TokenizedDataset:
    """The set, whose ids must be those of the model. An adapter's tokenizer may have a token more than its base's."""
    if source is None:
        return TokenizedDataset(path, passage_length=1)
    try:
        return TokenizedDataset(path, source.config, source.tokenizer, passage_length=1)
    except ValueError:
        if source.adapter is None:
            raise
        return TokenizedDataset(path, source.config, loading.load_tokenizer(source.model_path), passage_length=1)


def is_preference_set(path: str) -> bool:
    """Whether the folder was made with --format preference; what is wrong with it is found later."""
    try:
        return read_ledgers(find_parts(path)).get("format") == "preference"
    except (ValueError, OSError, AttributeError):
        return False


def read_pairs(args: Arguments, source: ModelSource | None, mistakes: list[str]) -> TestSet | None:
    """The pairs of answers, each as a question with two options; None if they do not fit the model."""
    num_before = len(mistakes)
    flag = f"--dataset_path {args.dataset_path}"
    if args.shots:
        mistakes.append(f"--shots {args.shots}: needs questions with options; tokenize with --format mcq and "
                        "--packing False")  # fmt: skip
    parts = find_parts(args.dataset_path)
    ledger = read_ledgers(parts)
    rows = load_parts(parts)
    if rows is None:
        mistakes.append(f"{flag}: it has no rows; its ledger.json says why each input row was dropped")
        return None
    if "label" in rows.column_names:
        mistakes.append(f"{flag}: its rows have single answers, and accuracy needs pairs; tokenize rows with chosen "
                        "and rejected")  # fmt: skip
        return None
    if source is None:
        return None
    questions = []
    for row in rows:
        questions.append({
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "options": [row["chosen_ids"], row["rejected_ids"]],
            "labels": [row["chosen_labels"], row["rejected_labels"]],
        })  # fmt: skip
    data = TestSet("preference", questions, source.tokenizer, ledger, [])
    with collect(mistakes, flag):
        check_ids(ledger, questions, source)
        check_lengths(source, data)
    if len(mistakes) > num_before:
        return None
    return data


def check_ids(ledger: dict, questions: list[dict], source: ModelSource) -> None:
    """Raises ValueError if the ids are not those of the model, or of its base if an adapter brings a token more."""
    tokenizers = [source.tokenizer]
    if source.adapter is not None:
        tokenizers.append(loading.load_tokenizer(source.model_path))
    problems = []
    for tokenizer in tokenizers:
        difference = find_difference(ledger, tokenizer)
        if ledger.get("vocabulary_sha256") not in (None, vocabulary_hash(tokenizer)):
            problems.append("it was made with another tokenizer; tokenize again with --tokenizer_path MODEL")
        elif difference:
            problems.append(f"it was made with a tokenizer that behaves otherwise: {difference}; tokenize again with "
                            "--tokenizer_path MODEL")  # fmt: skip
        else:
            problems = []
            break
    if problems:
        raise ValueError(problems[0])
    largest = max(max(question["input_ids"] + question["options"][1]) for question in questions)
    if largest >= source.num_embeddings:
        raise ValueError(f"ids up to {largest} do not fit the model's vocabulary of {source.num_embeddings}; tokenize "
                         "again with --tokenizer_path MODEL")  # fmt: skip


def check_lengths(source: ModelSource, data: TestSet) -> None:
    """Raises ValueError if the longest row does not fit into what the model can attend to."""
    longest = 0
    for row in data.rows:
        num_tokens = len(row["input_ids"])
        if "options" in row:
            num_prompt = num_tokens - len(row["options"][0])
            num_tokens = num_prompt + max(len(ids) for ids in row["options"])
        longest = max(longest, num_tokens)
    longest += len(data.shots) + source.num_virtual_tokens
    if longest > source.context_length:
        raise ValueError(f"a row has {longest} tokens, shots and virtual tokens included, and the model can attend to "
                         f"{source.context_length}; tokenize with a lower --max_length")  # fmt: skip


def draw_shots(args: Arguments, tokenizer) -> list[int]:
    """Whole rows of --shots_path, with their right answers, one after the other."""
    rows = load_parts(find_parts(args.shots_path))["input_ids"]
    chosen = np.random.default_rng(args.seed).choice(len(rows), size=min(args.shots, len(rows)), replace=False)
    shots = []
    for number in chosen:
        shots = join(shots, rows[int(number)], tokenizer)
    return shots


def join(shots: list[int], ids: list[int], tokenizer) -> list[int]:
    """`ids` behind `shots`, without the BOS that the tokenizer put before them: the first shot has it."""
    if shots and ids[0] == tokenizer.bos_token_id and adds_bos(tokenizer):
        return [*shots, *ids[1:]]
    return [*shots, *ids]


def list_checkpoints(args: Arguments) -> list[Path]:
    """The complete checkpoints of the run, in the order of its steps.

    A folder with the name of a checkpoint is complete. Runs of a former version marked those that were by a file.
    """
    weights = "config.json"
    if args.peft_path is not None:
        weights = "adapter_config.json"
    folders = []
    for folder in Path(args.peft_path or args.model_path).glob("checkpoint-*"):
        if folder.name.removeprefix("checkpoint-").isdecimal() and (folder / weights).is_file():
            folders.append(folder)
    marked = [folder for folder in folders if (folder / "complete.json").is_file()]
    return sorted(marked or folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# -------------------------------------------------------------------------------------------------------------------
# The model
# -------------------------------------------------------------------------------------------------------------------


def use_4bit(args: Arguments, source: ModelSource) -> bool:
    return args.load_in_4bit and not loading.is_quantised(source.config)


def load_model(source: ModelSource, load_in_4bit: bool, use_cpu: bool):
    """The model on one device, with the attention that it has by itself; in bf16 on a GPU that has it."""
    device = "cpu"
    if torch.cuda.is_available() and not use_cpu:
        device = "cuda"
    # On H100 and later GPUs PyTorch would prefer cuDNN, which builds a plan of half a second for each new length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = loading.compute_dtype(use_cpu)
    options = {}
    if load_in_4bit:
        options["quantization_config"] = loading.four_bit(dtype)
    with loading.ask_library(f"{source.model_path} cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.model_path,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    loading.check_report(report)
    if source.adapter is not None:
        loading.fit_vocabulary(source.adapter, source.model_path, model)
        model = PeftModel.from_pretrained(model, source.peft_path)
    return model.eval()


# -------------------------------------------------------------------------------------------------------------------
# Multiple choice
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class SharedPrompt:
    """One row in which a prompt stands once, followed by all its options.

    A token sees the prompt and its own option, nothing else, and each option's positions go on from the prompt: the
    logits are those of every prompt + option by itself, for the price of one prompt.
    """

    input_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]
    seen: torch.Tensor  # [T, T], True where the token of the row sees that of the column
    sources: list[int]  # where each option token is predicted
    targets: list[int]  # its id
    owners: list[int]  # its option


def lay_out(question: dict) -> SharedPrompt:
    prompt = question["input_ids"][: -len(question["options"][0])]
    input_ids = list(prompt)
    position_ids = list(range(len(prompt)))
    option_of_token = [-1] * len(prompt)
    sources = []
    targets = []
    owners = []
    for option, ids in enumerate(question["options"]):
        sources.append(len(prompt) - 1)  # the last token of the prompt predicts the first of each option
        sources.extend(range(len(input_ids), len(input_ids) + len(ids) - 1))
        targets.extend(ids)
        owners.extend([option] * len(ids))
        input_ids.extend(ids)
        position_ids.extend(range(len(prompt), len(prompt) + len(ids)))
        option_of_token.extend([option] * len(ids))
    owner = torch.tensor(option_of_token)
    is_prompt = owner[None, :] == -1
    is_own_option = owner[:, None] == owner[None, :]
    seen = (is_prompt | is_own_option).tril()
    return SharedPrompt(torch.tensor(input_ids), torch.tensor(position_ids), seen, sources, targets, owners)


@torch.no_grad()
def score_together(model, questions: list[dict]) -> list[list[list[float]]]:
    """Log-probabilities: for each question, for each option, for each of its tokens."""
    rows = [lay_out(question) for question in questions]
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    # Padding sees itself, because attention over nothing would be NaN.
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[number, :length] = row.input_ids
        position_ids[number, :length] = row.position_ids
        seen[number, :length, :length] = row.seen
    # The head multiplies a position with the whole vocabulary: none before the first that predicts an option's token.
    first = min(row.sources[0] for row in rows)
    logits = model(
        input_ids=input_ids.to(model.device),
        position_ids=position_ids.to(model.device),
        attention_mask=make_mask(model, seen[:, None]),
        logits_to_keep=longest - first,
        use_cache=False,
    ).logits
    scores = []
    for number, row in enumerate(rows):
        places = [source - first for source in row.sources]
        log_probs = logits[number, places].float().log_softmax(-1)
        targets = torch.tensor(row.targets, device=log_probs.device)
        of_targets = log_probs.gather(-1, targets[:, None])[:, 0].tolist()
        of_options = [[] for _ in questions[number]["options"]]
        for option, log_prob in zip(row.owners, of_targets, strict=True):
            of_options[option].append(log_prob)
        scores.append(of_options)
    return scores


def make_mask(model, seen: torch.Tensor) -> torch.Tensor:
    """`seen` [rows, 1, T, T] as the model's attention takes it: sdpa a truth value, eager a number that is added."""
    if model.config._attn_implementation == "sdpa":
        return seen.to(model.device)
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    return mask.masked_fill(~seen.to(model.device), torch.finfo(model.dtype).min)


@torch.no_grad()
def score_apart(model, question: dict) -> list[list[float]]:
    """The same for one question, with prompt + option in a row of its own, padded on the right."""
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


def can_share_prompt(model, questions: list[dict]) -> bool:
    """Whether the options of a question can be scored in one row; else each gets a row of its own.

    Virtual tokens stand before a whole row. A mask of ours would replace a sliding window. For all else (positions
    that are not those that were passed, states that are handed on from token to token) the longest question is scored
    in both ways, and must get the same scores.
    """
    if has_virtual_tokens(model):
        return False
    longest = max(questions, key=num_tokens_of)
    window = shortest_window(model.config)
    if num_tokens_of(longest) > window:
        return False
    try:
        together = score_together(model, [longest])[0]
    except (ValueError, TypeError, RuntimeError):  # a model that takes no mask for each pair of tokens
        return False
    apart = score_apart(model, longest)
    for option, expected in zip(together, apart, strict=True):
        difference = (torch.tensor(option) - torch.tensor(expected)).abs().max()
        if not difference <= tolerance_of(model) * torch.tensor(expected).abs().max():
            return False
    return True


def tolerance_of(model) -> float:
    """How far two ways to compute the same score may be apart, relative to it."""
    if model.dtype in (torch.bfloat16, torch.float16):
        return 2e-2
    return 1e-4


def num_tokens_of(question: dict) -> int:
    """Tokens of a question with all its options."""
    return len(question["input_ids"]) + sum(len(ids) for ids in question["options"])


def shortest_window(config) -> float:
    """The fewest tokens that a layer attends to, where layers do not see the whole row."""
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=math.inf)


def score_questions(model, questions: list[dict], batch_size: int) -> list[list[list[float]]]:
    """Log-probabilities of all questions, in their order; a batch has questions of similar length."""
    share_prompt = can_share_prompt(model, questions)
    order = sorted(range(len(questions)), key=lambda i: -num_tokens_of(questions[i]))
    scores = [None] * len(questions)
    with tqdm(total=len(questions), desc="evaluating", unit="question") as progress:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [questions[i] for i in numbers]
            if share_prompt:
                batch_scores = score_together(model, batch)
            else:
                batch_scores = [score_apart(model, question) for question in batch]
            for i, score in zip(numbers, batch_scores, strict=True):
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
    gaps = [0.0] * NUM_BINS  # of each bin: sum of confidence - right
    for confidence, is_right in zip(confidences, right, strict=True):
        number = min(int(confidence * NUM_BINS), NUM_BINS - 1)
        gaps[number] += confidence - is_right
    return sum(abs(gap) for gap in gaps) / len(right)


def read_options(question: dict, tokenizer, template: dict) -> tuple[list[str], list[int]]:
    """The texts of the options, and the place that each has in the question: 0 for the first, A."""
    texts = []
    for ids in question["options"]:
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    prompt = tokenizer.decode(question["input_ids"][: -len(question["options"][0])])
    return texts, find_places(texts, prompt, template)


def evaluate_choices(model, questions: list[dict], tokenizer, template: dict, batch_size: int) -> dict:
    """All figures of a multiple-choice set, and `examples` with what each question got."""
    scores = score_questions(model, questions, batch_size)
    examples = []
    confusion = {}  # for each letter of a right option: how often each letter was chosen
    confidences = []
    right_log_prob = 0.0
    right_tokens = 0
    for question, options in zip(questions, scores, strict=True):
        texts, places = read_options(question, tokenizer, template)
        sums = [sum(option[:-1]) for option in options]  # without the EOS, which says how long an answer should be
        means = [score / max(1, len(text)) for score, text in zip(sums, texts, strict=True)]
        examples.append({
            "right": is_best(sums),
            "right_norm": is_best(means),
            "places": places,
            "scores": sums,
            "norm": means,
        })  # fmt: skip
        right_log_prob += sum(options[0])
        right_tokens += len(options[0])
        best = max(sums)
        confidences.append(1 / sum(math.exp(score - best) for score in sums))
        right_letter = LETTERS[places[0]]
        chosen_letter = LETTERS[places[sums.index(best)]]
        confusion.setdefault(right_letter, Counter())[chosen_letter] += 1
    num_questions = len(examples)
    result = {"num_questions": num_questions}
    for name, key in (("accuracy", "right"), ("accuracy_norm", "right_norm")):
        num_right = sum(example[key] for example in examples)
        result[name] = num_right / num_questions
        result[f"{name}_interval"] = list(wilson_interval(num_right, num_questions))
    result["loss"] = -right_log_prob / right_tokens
    result["calibration_error"] = calibration_error(confidences, [example["right"] for example in examples])
    result["baseline_random"] = sum(1 / len(question["options"]) for question in questions) / num_questions
    result["baseline_majority"] = max(sum(row.values()) for row in confusion.values()) / num_questions
    result["confusion"] = {name: dict(sorted(row.items())) for name, row in sorted(confusion.items())}
    result["examples"] = examples
    return result


def is_best(scores: list[float]) -> bool:
    """Whether the right option, which is listed first, won. A tie must not count for it."""
    return all(scores[0] > other for other in scores[1:])


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
# Pairs of answers
# -------------------------------------------------------------------------------------------------------------------


def score_pairs(model, pairs: list[dict], batch_size: int) -> list[list[float]]:
    """Log-probabilities of the chosen and the rejected answer of each pair: sums over the tokens that have a label."""
    sums = []
    for pair, scores in zip(pairs, score_questions(model, pairs, batch_size), strict=True):
        of_answers = []
        for labels, log_probs in zip(pair["labels"], scores, strict=True):
            learned = [score for label, score in zip(labels, log_probs, strict=True) if label != IGNORE_INDEX]
            of_answers.append(sum(learned))
        sums.append(of_answers)
    return sums


def count_targets(pairs: list[dict]) -> list[list[int]]:
    """How many tokens have a label, of the chosen and the rejected answer of each pair."""
    return [[sum(label != IGNORE_INDEX for label in labels) for labels in pair["labels"]] for pair in pairs]


def evaluate_preference(args: Arguments, run: Run) -> dict:
    """Scores the model, and then the model before training, if there is one: with the adapter off, or another."""
    batch_size = args.per_device_eval_batch_size
    model = load_model(run.source, use_4bit(args, run.source), args.use_cpu)
    scores = score_pairs(model, run.data.rows, batch_size)
    reference = None
    name = None
    if run.reference is not None:
        model = None  # makes room for the other one
        model = load_model(run.reference, use_4bit(args, run.reference), args.use_cpu)
        reference = score_pairs(model, run.data.rows, batch_size)
        name = run.reference.peft_path or run.reference.model_path
    elif run.source.adapter is not None:
        with model.disable_adapter():
            reference = score_pairs(model, run.data.rows, batch_size)
        name = run.source.model_path
    numbers = count_targets(run.data.rows)
    return {"reference": name} | evaluate_pairs(scores, numbers, reference, find_beta(args, run.source))


def evaluate_pairs(
    scores: list[list[float]], numbers: list[list[int]], reference: list[list[float]] | None, beta: float
) -> dict:
    """All figures of a set of pairs, and `examples` with what each pair got.

    Args:
        scores: the log-probability of the chosen and the rejected answer of each pair.
        numbers: their tokens, by which `accuracy_norm` divides: ORPO and SimPO train these averages.
        reference: the same as `scores` of the model before training, or None.
        beta: the factor of rewards.

    The implicit reward of an answer is beta * (its log-probability - that of the reference), and the loss is the mean
    of -log sigmoid(reward of the chosen answer - reward of the rejected one) (Rafailov et al. 2023, section 4). A tie
    does not count for the chosen answer.
    """
    examples = []
    for number, (chosen, rejected) in enumerate(scores):
        example = {"chosen": chosen, "rejected": rejected, "right_log_prob": chosen > rejected}
        example["right_norm"] = chosen / max(1, numbers[number][0]) > rejected / max(1, numbers[number][1])
        example["right"] = example["right_log_prob"]
        if reference is not None:
            example["reference_chosen"], example["reference_rejected"] = reference[number]
            example["reward_chosen"] = beta * (chosen - example["reference_chosen"])
            example["reward_rejected"] = beta * (rejected - example["reference_rejected"])
            example["right"] = example["reward_chosen"] > example["reward_rejected"]
        examples.append(example)
    result = {"num_pairs": len(examples), "beta": beta}
    keys = {"accuracy": "right", "accuracy_log_prob": "right_log_prob", "accuracy_norm": "right_norm"}
    for name, key in keys.items():
        num_right = sum(example[key] for example in examples)
        result[name] = num_right / len(examples)
        result[f"{name}_interval"] = list(wilson_interval(num_right, len(examples)))
    for name in ("reward_chosen", "reward_rejected", "reward_margin", "loss"):
        result[name] = None
    result["num_ties"] = 0
    if reference is not None:
        rewards = {}
        for name in ("reward_chosen", "reward_rejected"):
            rewards[name] = [example[name] for example in examples]
            result[name] = sum(rewards[name]) / len(examples)
        margins = np.subtract(rewards["reward_chosen"], rewards["reward_rejected"])
        result["num_ties"] = int((margins == 0).sum())
        result["reward_margin"] = margins.mean().item()
        result["loss"] = np.logaddexp(0, -margins).mean().item()
    result["examples"] = examples
    return result


def find_beta(args: Arguments, source: ModelSource) -> float:
    """--beta, or what the model was trained with, or TRL's default; that of ORPO and SimPO is no factor of rewards."""
    if args.beta is not None:
        return args.beta
    arguments = source.receipt.get("arguments", {})
    if arguments.get("loss_type") in ("orpo", "simpo"):
        return 0.1
    return arguments.get("beta") or 0.1


# -------------------------------------------------------------------------------------------------------------------
# Instructions, conversations and documents
# -------------------------------------------------------------------------------------------------------------------


@contextmanager
def attention_of_training(model, rows: list[dict[str, torch.Tensor]], vocab_size: int) -> Iterator[bool]:
    """Gives the model the attention that it has in training, for as long as the block runs.

    Yields whether the rows of a batch are joined into one, as in training; else they are padded. The two longest rows,
    joined, must have the loss that their documents have alone.

    Raises:
        ValueError: the set is packed, so a row holds several documents, and this model would let them leak.
    """
    if has_virtual_tokens(model):
        yield False
        return
    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
    own_attention = base.config._attn_implementation
    reason = why_rows_cannot_be_joined(model, base, rows, vocab_size)
    if reason is not None:
        base.set_attn_implementation(own_attention)
        if "position_ids" in rows[0]:
            raise ValueError(f"its rows hold several documents, and {reason}; tokenize with --packing False")
    try:
        yield reason is None
    finally:
        base.set_attn_implementation(own_attention)


def why_rows_cannot_be_joined(model, base, rows: list[dict[str, torch.Tensor]], vocab_size: int) -> str | None:
    """None if they can; leaves the attention of training in the model."""
    longest = sorted(rows, key=lambda row: len(row["input_ids"]))[-2:]
    documents = []
    for row in longest:
        documents += split_documents(row)
    expected = sum(score_targets(model, [document], joined=False)[0] for document in documents)
    data_collator.attend_inside_documents(base)
    try:
        data_collator.check_document_attention(model, vocab_size)
        found = score_targets(model, longest, joined=True)[0]
    except (ValueError, TypeError, RuntimeError) as problem:  # a model that takes no joined rows at all
        return loading.first_line(problem)
    if not math.isclose(found, expected, rel_tol=tolerance_of(model)):
        return "this model computes something else for documents in one row"
    return None


def split_documents(row: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The documents of a packed row as rows of their own, without position_ids."""
    if "position_ids" not in row:
        return [row]
    starts = torch.nonzero(row["position_ids"] == 0).flatten()
    lengths = starts.diff(append=torch.tensor([len(row["input_ids"])])).tolist()
    pairs = zip(row["input_ids"].split(lengths), row["labels"].split(lengths), strict=True)
    return [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pairs]


@torch.no_grad()
def score_targets(model, rows: list[dict[str, torch.Tensor]], joined: bool) -> tuple[float, int, int]:
    """(summed negative log-likelihood in nats, tokens that the model finds likeliest, tokens) of the rows' targets."""
    batch = data_collator.move_to_device(DataCollator(joined)(rows), model.device)
    labels = batch.pop("labels")
    if joined:
        targets = batch.pop("shift_labels")[0]
        logits = model(**batch, use_cache=False).logits[0]
    else:
        logits = model(**batch, use_cache=False).logits
        logits = logits[:, -labels.shape[1] :]  # without the virtual tokens' own
        is_target = labels[:, 1:] != IGNORE_INDEX
        logits = logits[:, :-1][is_target]
        targets = labels[:, 1:][is_target]
    logits = logits.float()
    targets = targets.to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    num_likeliest = int((logits.argmax(-1) == targets).sum())
    return losses.double().sum().item(), num_likeliest, len(targets)


def cut_document(ids: list[int], window: int) -> list[dict[str, torch.Tensor]]:
    """Windows that overlap by half: each token but the first is a target once, with half a window or all before it."""
    rows = []
    num_done = 1  # tokens that were a target, or the first one
    step = max(1, window // 2)
    start = 0
    while start == 0 or num_done < len(ids):
        end = min(start + window, len(ids))
        labels = torch.full((end - start,), IGNORE_INDEX)
        labels[num_done - start :] = torch.tensor(ids[num_done:end])
        rows.append({"input_ids": torch.tensor(ids[start:end]), "labels": labels})
        num_done = end
        start += step
    return rows


def count_bytes(ids: list[int], tokenizer) -> int:
    """UTF-8 bytes of the text that the model had to predict: all but the first token's."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    first = tokenizer.decode(ids[:1], skip_special_tokens=True)
    return len(whole.encode()) - len(first.encode())


def evaluate_targets(model, data: TestSet, args: Arguments) -> dict:
    """Loss and accuracy per target token; of documents also perplexity and bits per byte."""
    rows = []
    num_bytes = 0
    for row in data.rows:
        if "labels" not in row:
            rows += cut_document(row["input_ids"], args.window)
            num_bytes += count_bytes(row["input_ids"], data.tokenizer)
            continue
        row = {name: torch.tensor(ids) for name, ids in row.items()}
        rows.append(row)
        if data.kind == "text":
            for document in split_documents(row):
                num_bytes += count_bytes(document["input_ids"].tolist(), data.tokenizer)
    total_loss = 0.0
    num_likeliest = 0
    num_targets = 0
    batch_size = args.per_device_eval_batch_size
    with attention_of_training(model, rows, model.config.vocab_size) as joined:
        for start in tqdm(range(0, len(rows), batch_size), desc="evaluating", unit="batch"):
            loss, likeliest, targets = score_targets(model, rows[start : start + batch_size], joined)
            total_loss += loss
            num_likeliest += likeliest
            num_targets += targets
    result = {
        "num_rows": len(data.rows),
        "num_targets": num_targets,
        "loss": total_loss / num_targets,
        "token_accuracy": num_likeliest / num_targets,
    }
    if data.kind == "text":
        result["perplexity"] = math.exp(total_loss / num_targets)
        result["bits_per_byte"] = total_loss / math.log(2) / num_bytes
    return result


# -------------------------------------------------------------------------------------------------------------------
# What is printed and written
# -------------------------------------------------------------------------------------------------------------------


def evaluate(args: Arguments, run: Run) -> dict:
    """Loads the model and scores it; the result also says what was scored."""
    data = run.data
    if data.kind == "preference":
        result = evaluate_preference(args, run)
    elif data.kind == "multiple_choice":
        model = load_model(run.source, use_4bit(args, run.source), args.use_cpu)
        questions = []
        for row in data.rows:
            ids = join(data.shots, row["input_ids"], data.tokenizer)
            questions.append({"input_ids": ids, "options": row["options"]})
        template = data.ledger.get("template", {})
        result = evaluate_choices(model, questions, data.tokenizer, template, args.per_device_eval_batch_size)
    else:
        model = load_model(run.source, use_4bit(args, run.source), args.use_cpu)
        try:
            result = evaluate_targets(model, data, args)
        except ValueError as problem:
            raise ValueError(f"--dataset_path {args.dataset_path}: {problem}") from None
    facts = {"kind": data.kind, "dataset_input_sha256": data.ledger.get("input_sha256")}
    settings = asdict(replace(args, model_path=run.source.model_path, peft_path=run.source.peft_path))
    del settings["compare"]
    return facts | settings | result


def describe(result: dict) -> str:
    """One line for the terminal."""
    path = result["peft_path"] or result["model_path"]
    if result["kind"] == "multiple_choice":
        low, high = result["accuracy_interval"]
        return (f"accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
                f"loss {result['loss']:.4f}, {result['num_questions']} questions: {path}")  # fmt: skip
    if result["kind"] == "preference":
        low, high = result["accuracy_interval"]
        line = f"accuracy of {name_measure(result)} {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        if result["loss"] is not None:
            line += f", DPO's loss {result['loss']:.4f}"
        return f"{line}, {result['num_pairs']} pairs: {path}"
    line = f"loss {result['loss']:.4f}, token accuracy {result['token_accuracy']:.1%}"
    line += f", {result['num_targets']:,} targets"
    if result["kind"] == "text":
        line += f", perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits per byte"
    return f"{line}: {path}"


def name_measure(result: dict) -> str:
    """What the accuracy on pairs compares."""
    if result["reference"] is None:
        return "the log-probability"
    return "the implicit reward"


def print_rewards(result: dict) -> None:
    """The rest of the result on pairs of answers."""
    low, high = result["accuracy_norm_interval"]
    print(f"by the average log-probability of a token, which ORPO and SimPO train, {result['accuracy_norm']:.1%} "
          f"({low:.1%} to {high:.1%})")  # fmt: skip
    if result["reference"] is None:
        print("no reference: the log-probabilities of the two answers were compared, and no rewards; --base_model "
              "names the model before training")  # fmt: skip
        return
    low, high = result["accuracy_log_prob_interval"]
    reference = result["reference"]
    if reference == result["model_path"]:
        reference += ", the same model with the adapter switched off"
    print(f"reference: {reference}\nreward of the chosen answers {result['reward_chosen']:.4f}, of the "
          f"rejected ones {result['reward_rejected']:.4f}, margin {result['reward_margin']:.4f} (beta "
          f"{result['beta']}); without the reference, by log-probability, {result['accuracy_log_prob']:.1%} ({low:.1%} "
          f"to {high:.1%})")  # fmt: skip
    if result["num_ties"]:
        print(f"equal rewards in {result['num_ties']} pairs, as before any training; they count as wrong")


def print_details(result: dict) -> None:
    """The rest of a multiple-choice result."""
    low, high = result["accuracy_norm_interval"]
    print(f"length-normalised {result['accuracy_norm']:.1%} ({low:.1%} to {high:.1%}); calibration error "
          f"{result['calibration_error']:.3f}; always the commonest option {result['baseline_majority']:.1%}, random "
          f"{result['baseline_random']:.1%}")  # fmt: skip
    names = set(result["confusion"])
    for row in result["confusion"].values():
        names.update(row)
    names = sorted(names)
    print("right option by row, chosen by column\n   " + "".join(f"{name:>6}" for name in names))
    for name, row in result["confusion"].items():
        print(f"{name:3}" + "".join(f"{row.get(other, 0):>6}" for other in names))


COLUMNS = {  # of the Markdown table, for each kind of set
    "multiple_choice": ["accuracy", "accuracy_interval", "accuracy_norm", "loss", "calibration_error",
                        "baseline_majority", "baseline_random", "num_questions"],
    "preference": ["accuracy", "accuracy_interval", "accuracy_log_prob", "accuracy_norm", "reward_margin", "loss",
                   "num_pairs"],
    "instruction": ["loss", "token_accuracy", "num_targets"],
    "text": ["perplexity", "bits_per_byte", "loss", "token_accuracy", "num_targets"],
}  # fmt: skip


def make_table(results: list[dict]) -> str:
    """A Markdown table with one row for each result."""
    columns = COLUMNS[results[0]["kind"]]
    titles = ["model", "set", "shots"]
    titles += [column.replace("_", " ") for column in columns]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in results:
        cells = [result["peft_path"] or result["model_path"], Path(result["dataset_path"]).name, str(result["shots"])]
        cells += [format_cell(column, result[column]) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_cell(column: str, value) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return f"{value[0]:.1%} to {value[1]:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    if "accuracy" in column or "baseline" in column:
        return f"{value:.1%}"
    return f"{value:.4f}"


def find_output(args: Arguments) -> Path:
    """--output, or evaluation.json in the run's folder; a model that no script trained gets a file in outputs/."""
    if args.output:
        return Path(args.output)
    run = Path(args.peft_path or args.model_path)
    if (run / "run.json").is_file():
        return run / "evaluation.json"
    return Path("outputs") / run.name / "evaluation.json"


def keep_result_of_another_set(output: Path, dataset_path: str) -> None:
    """Renames evaluation.json, its table and its plot if they are of another set than the one that was scored now."""
    try:
        former = json.loads(output.read_text(encoding="utf-8"))
        former_set = former.get("checkpoints", [former])[0]["dataset_path"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return
    if former_set == dataset_path:
        return
    name = re.sub(r"\W+", "_", Path(former_set).name)
    for suffix in (".json", ".md", ".png"):
        path = output.with_suffix(suffix)
        if path.exists():
            path.rename(output.with_name(f"{output.stem}.{name}{suffix}"))
    print(f"the result on {former_set} is now {output.with_name(f'{output.stem}.{name}.json')}")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def evaluate_checkpoints(args: Arguments, runs: list[Run]) -> list[dict]:
    """One result for each checkpoint, with its `step`."""
    results = []
    for run in runs:
        result = evaluate(args, run)
        results.append({"step": step_of(Path(result["peft_path"] or result["model_path"]))} | result)
        print(describe(result))
    return results


def plot(results: list[dict], path: Path) -> None:
    """Accuracy with its interval, or the loss, over the steps, as a PNG file."""
    import matplotlib

    matplotlib.use("agg")  # no window
    from matplotlib import pyplot

    name = "loss"
    if "accuracy" in results[0]:
        name = "accuracy"
    steps = [result["step"] for result in results]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, [result[name] for result in results], marker="o")
    if name == "accuracy":
        lows = [result["accuracy_interval"][0] for result in results]
        highs = [result["accuracy_interval"][1] for result in results]
        axes.fill_between(steps, lows, highs, alpha=0.2, label="95 % interval")
        baseline = results[0].get("baseline_majority", 0.5)
        label = "commonest option"
        if results[0]["kind"] == "preference":
            label = "by chance"
        axes.axhline(baseline, linestyle="--", color="grey", label=label)
        axes.legend()
    axes.set(xlabel="optimizer steps", ylabel=name, title=Path(results[0]["dataset_path"]).name)
    figure.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)


def read_result(path: Path) -> dict:
    """What a former evaluation wrote. Raises ValueError if it is no evaluation of questions or pairs of answers."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict) or "examples" not in result:
        raise ValueError("it has no examples; compare evaluations of questions with options or of pairs of answers")
    return result


def compare(args: Arguments, runs: list[Run | None]) -> dict:
    """Scores both runs, or reads what a former evaluation wrote, and tests whether they differ.

    Raises:
        ValueError: the two have other questions.
    """
    results = []
    for path, run in zip(args.compare, runs, strict=True):
        if run is None:
            result = read_result(Path(path))
        else:
            result = evaluate(args, run)
        results.append(result)
        print(describe(result))
    a, b = results
    for name in ("kind", "num_questions", "num_pairs", "dataset_input_sha256", "shots"):
        if a.get(name) != b.get(name):
            raise ValueError("--compare: the two were scored on other questions or with other shots")
    key = "right"
    if a.get("kind") == "preference" and (a["reference"] is None or a["reference"] != b["reference"]):
        key = "right_log_prob"
        reason = "one of them has no reference"
        if a["reference"] and b["reference"]:
            reason = f"their references differ, {a['reference']} and {b['reference']}"
        print(f"{reason}, so the log-probabilities are compared, of both")
        print(f"accuracy of the log-probability: {a['accuracy_log_prob']:.1%} and {b['accuracy_log_prob']:.1%}")
    test = mcnemar([example[key] for example in a["examples"]], [example[key] for example in b["examples"]])
    test["verdict"] = "the difference may be chance"
    if test["p"] < 0.05:
        test["verdict"] = "the difference is real"
    print(f"only the first is right: {test['only_a']}, only the second: {test['only_b']}; exact McNemar p = "
          f"{test['p']:.2g}: {test['verdict']}")  # fmt: skip
    return {"mcnemar": test, "a": a, "b": b}


def report(args: Arguments, results: list[dict], output: Path) -> None:
    """Prints the rest of the results, and writes evaluation.json, the table and the plot."""
    if results[0]["kind"] == "multiple_choice":
        print_details(results[-1])
    elif results[0]["kind"] == "preference":
        print_rewards(results[-1])
    table = make_table(results)
    print(table, end="")
    if not args.output:
        keep_result_of_another_set(output, args.dataset_path)
    if args.all_checkpoints:
        write(output, json.dumps({"checkpoints": results}))
    else:
        write(output, json.dumps(results[0]))
    write(output.with_suffix(".md"), table)
    if args.all_checkpoints and find_spec("matplotlib") is None:
        print("no PNG: pip install matplotlib")
    elif args.all_checkpoints:
        plot(results, output.with_suffix(".png"))
    print(f"written: {output}")


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        runs = check_arguments(args)
        if args.compare:
            comparison = compare(args, runs)
            if args.output:
                write(Path(args.output), json.dumps(comparison))
            return
        if args.all_checkpoints:
            results = evaluate_checkpoints(args, runs)
        else:
            results = [evaluate(args, runs[0])]
            print(describe(results[0]))
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    report(args, results, find_output(args))


if __name__ == "__main__":
    main()
