"""Lets a model answer: a base model, a fine-tuned one, or a base with an adapter of any kind, also in 4 bit.

    python test_sample.py                                                # the newest adapter below outputs/
    python test_sample.py --peft_path outputs/finetune_pp_peft --chat True
    python test_sample.py --prompt "Sudden painful red eye. Which department?"
    python test_sample.py --test_path data_sample/triage_test.jsonl --output outputs/answers.jsonl
    python test_sample.py --model_path outputs/finetune_pp --compare models/SmolLM2-135M-Instruct

Questions come from rows in the shapes that tokenize_dataset.py reads (mcq, alpaca, chat, text), from --prompt, from
stdin (`--prompt -` is one prompt, `--test_path -` are JSONL rows) or from a conversation (--chat True). The prompt is
rendered as in training: the template travels in the run's run.json and in its tokenizer, and the right answer is never
in it. Rows are sorted by length and padded on the left, so that the answers do not depend on the batch.

--output writes one JSON object a row, in the order of the rows and while it runs; --resume True goes on from there.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.generation.streamers import BaseStreamer

SAMPLE_LEDGER = "data_sample/tokenized/triage_train/ledger.json"
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names; others stay as they are
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
        metadata={"help": "rows as .jsonl or .json, or - for JSONL from stdin"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "answer this text instead of rows; - reads it from stdin"}
    )
    chat: bool = field(default=False, metadata={"help": "talk with the model; /help lists the commands"})
    system: str | None = field(default=None, metadata={"help": "system message of --chat and --prompt"})
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


def check_arguments(args: Arguments):
    """Completes the arguments; returns (template, tokenizer, rows, prompts), with the prompts as token ids.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = find_mistakes(args)

    def attempt(name: str, action, *context):
        try:
            return action(*context)
        except (ValueError, OSError) as problem:
            mistakes.append(f"--{name} {getattr(args, name)}: {problem}")

    find_paths(args, mistakes)
    receipt = read_receipt(args.peft_path or args.model_path or "")
    if args.load_in_4bit == "auto":
        args.load_in_4bit = str(bool(args.peft_path and receipt.get("arguments", {}).get("load_in_4bit")))
    config, tokenizer = (not mistakes and attempt("model_path", load_config, args)) or (None, None)
    if config and args.peft_path:
        attempt("peft_path", check_adapter, args, config)
    if args.compare:
        attempt("compare", AutoConfig.from_pretrained, args.compare)
    source = "test_path" if args.prompt is None and not args.chat else "prompt"
    rows = [] if args.chat else attempt(source, read_rows, args) or []
    template = attempt("template_path", find_template, args, receipt, tokenizer, rows) if tokenizer else None
    prompts = []
    if template:
        prompts = attempt(source, encode_rows, args, config, tokenizer, template, rows)
    if args.output:
        attempt("output", check_output, args)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return template, tokenizer, rows, prompts


def find_mistakes(args: Arguments) -> list[str]:
    """What is wrong with the flags taken by themselves."""
    mistakes = []
    for name in ("num_samples", "max_new_tokens", "per_device_eval_batch_size", *SAMPLING):
        value = getattr(args, name)
        if value is not None and value <= 0:
            mistakes.append(f"--{name} {value}: must be above 0")
    for name in ("top_p", "min_p"):
        if (getattr(args, name) or 0) > 1:
            mistakes.append(f"--{name} {getattr(args, name)}: a probability, so at most 1")
    for name in SAMPLING[:4]:
        if getattr(args, name) is not None and not args.do_sample:
            mistakes.append(f"--{name} {getattr(args, name)}: without --do_sample True nothing is drawn")
    if args.chat and (args.prompt is not None or args.output or args.compare):
        mistakes.append("--chat True: leave out --prompt, --output and --compare; /save FILE keeps a conversation")
    if args.resume and not args.output:
        mistakes.append("--resume True: name the --output to go on with")
    if args.load_in_4bit not in ("auto", "True", "False"):
        mistakes.append(f"--load_in_4bit {args.load_in_4bit}: choose auto, True or False")
    return mistakes


def find_paths(args: Arguments, mistakes: list[str]) -> None:
    """Completes --peft_path and --model_path: no adapter that is missing is ever replaced by a base model."""
    if args.peft_path is None and args.model_path is None:
        args.peft_path = find_newest_adapter()
        if args.peft_path is None:
            mistakes.append("--peft_path: no finished adapter below outputs/; train one with python "
                            "finetune_pp_peft.py, or name a model without an adapter with --model_path")  # fmt: skip
    if args.peft_path and not (Path(args.peft_path) / "adapter_config.json").is_file():
        mistakes.append(f"--peft_path {args.peft_path}: no adapter_config.json in it; name the folder of an adapter")
    elif args.peft_path and args.model_path is None:
        adapter = json.loads((Path(args.peft_path) / "adapter_config.json").read_text(encoding="utf-8"))
        args.model_path = adapter["base_model_name_or_path"]
    for name in ("model_path", "compare"):
        path = getattr(args, name) or ""
        local = Path(path).is_dir() or path.startswith((".", "/", "~", "models/", "outputs/"))
        if path and local and not (Path(path) / "config.json").is_file():
            mistakes.append(f"--{name} {path}: no config.json in it; name the folder of a whole model")


def find_newest_adapter() -> str | None:
    """The adapter of the run below outputs/ that finished last; run.json shows that a run was finished."""
    receipts = [path for path in Path("outputs").glob("*/run.json") if (path.parent / "adapter_config.json").is_file()]
    return str(max(receipts, key=lambda path: path.stat().st_mtime).parent) if receipts else None


def read_receipt(folder: str) -> dict:
    """run.json of a run's folder, or of the run that a checkpoint belongs to; empty if there is none."""
    for path in (Path(folder) / "run.json", Path(folder).absolute().parent / "run.json"):
        if path.is_file() and (path.parent == Path(folder) or Path(folder).name.startswith("checkpoint-")):
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def load_config(args: Arguments):
    """Configuration of the model, and the tokenizer: the adapter's own, for it may bring the chat template."""
    own = args.peft_path and (Path(args.peft_path) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(args.peft_path if own else args.model_path)
    return AutoConfig.from_pretrained(args.model_path), tokenizer


def check_adapter(args: Arguments, config) -> None:
    """The adapter file is whole, and made for this base model: every name and shape, and the vocabulary.

    Raises:
        ValueError: naming both the base model and the adapter.
    """
    import peft

    file, adapter = Path(args.peft_path) / "adapter_model.safetensors", peft.PeftConfig.from_pretrained(args.peft_path)
    trained_on, adapter.base_model_name_or_path = adapter.base_model_name_or_path, args.model_path
    try:
        with safe_open(file, "pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            untrained = [name for name in found if "lora_B" in name and not tensors.get_tensor(name).any()]
    except FileNotFoundError:
        raise ValueError("no adapter_model.safetensors in it; save the adapter as safetensors") from None
    except SafetensorError as problem:
        raise ValueError(f"{file.name} is damaged ({problem}); copy it again, or use a checkpoint of the run") from None
    for name in {"token_dim", "num_layers", "num_attention_heads"} & vars(adapter).keys():
        setattr(adapter, name, None)  # the sizes of the model that it was trained on; now they are read from this one
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        state = peft.get_peft_model_state_dict(peft.get_peft_model(model, adapter), save_embedding_layers=False)
        fits = found == {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"its tensors do not fit --model_path {args.model_path}; it was trained on {trained_on}")
    try:
        vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (args.model_path, args.peft_path)]
    except (ValueError, OSError):
        vocabularies = [None]  # one of the folders has no tokenizer
    if vocabularies[0] != vocabularies[-1]:
        raise ValueError(
            f"its vocabulary is not that of --model_path {args.model_path}; it was trained on {trained_on}"
        )
    if trained_on != args.model_path:
        print(f"note: {args.peft_path} was trained on {trained_on}; it fits {args.model_path}", file=sys.stderr)
    if untrained and len(untrained) == sum("lora_B" in name for name in found):
        print(f"warning: {args.peft_path} was never trained: all its B matrices are zero, so it changes nothing",
              file=sys.stderr)  # fmt: skip


def read_rows(args: Arguments) -> list[dict]:
    """The rows that are to be answered; --prompt becomes a row of its own."""
    if args.prompt is not None:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        if not text.strip():
            raise ValueError("it is empty")
        return [{"prompt": text, "system": args.system}]
    text = sys.stdin.read() if args.test_path == "-" else Path(args.test_path).read_text(encoding="utf-8-sig")
    if args.test_path.endswith(".json"):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as problem:
                raise ValueError(f"line {number}: {problem}") from None
    if not rows:
        raise ValueError("it has no rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is not a list of objects")
    return rows[: args.num_samples or (len(rows) if args.output else 5)]


def find_template(args: Arguments, receipt: dict, tokenizer, rows: list[dict]) -> dict:
    """How the training data became prompts, as tokenize_dataset.py wrote it down; a base model has no such data.

    Raises:
        ValueError: there is none, several data sets of a run have different ones, or the tokenizer lacks its part.
    """
    if args.template_path:
        try:
            receipt = json.loads(Path(args.template_path).read_text(encoding="utf-8"))
        except ValueError:
            receipt = {}
    dataset = receipt.get("dataset", receipt if args.template_path else {})
    sets = dataset.get("sets", {"": dataset})  # a mix of several
    templates = [ledger["template"] for ledger in sets.values() if "template" in ledger]
    templates = [template for template in templates if template["format"] != "text"] or templates
    first = rows[0] if rows else {"prompt": ""}
    if len({json.dumps(template) for template in templates}) > 1:
        raise ValueError(f"the run's data have several templates; choose the ledger.json of one of {', '.join(sets)}")
    if templates:
        template = templates[0]
    elif args.template_path:
        raise ValueError("no template in it; data_sample/tokenize_dataset.py writes one into ledger.json, "
                         "training into run.json")  # fmt: skip
    elif "text" in first:
        template = {"format": "text", "chat": False}
    elif first.keys() & {"prompt", "messages", "conversations"}:
        template = {"format": "chat", "chat": True}
        if tokenizer.chat_template is None and "prompt" in first:
            template = {"format": "text", "chat": False}
    elif Path(SAMPLE_LEDGER).is_file():
        template = json.loads(Path(SAMPLE_LEDGER).read_text(encoding="utf-8"))["template"]
    else:
        raise ValueError("the model brings no template for such rows; name a run.json or ledger.json that has one")
    if template["chat"] and tokenizer.chat_template is None and (templates or template["format"] == "chat"):
        raise ValueError("training used a chat template, and the tokenizer has none; put chat_template.jinja beside it")
    return template | {"chat": template["chat"] and tokenizer.chat_template is not None}


def encode_rows(args: Arguments, config, tokenizer, template: dict, rows: list[dict]) -> list[list[int]]:
    """The prompts of all rows. Raises ValueError for a row without its fields, or longer than the model's context."""
    prompts, virtual = [], 0
    if args.peft_path:
        adapter = json.loads((Path(args.peft_path) / "adapter_config.json").read_text(encoding="utf-8"))
        virtual = adapter.get("num_virtual_tokens") or 0
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(encode_prompt(tokenizer, read_messages(row, template), template))
        except (KeyError, TypeError, IndexError) as problem:
            raise ValueError(f"row {number} lacks {problem}, which {template['format']} rows have") from None
        num_tokens = virtual + len(prompts[-1])
        if num_tokens >= context_length(config):
            raise ValueError(f"row {number} has {num_tokens} tokens, which leaves no room for an answer: the model can "
                             f"attend to {context_length(config)}; shorten or leave out the row")  # fmt: skip
    return prompts


def context_length(config) -> int:
    """The most tokens that the model can attend to; a configuration that does not say so sets no limit."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_output(args: Arguments) -> None:
    """--output can be written, and is not there yet or is to be resumed; what a kill cut off is removed later."""
    path = Path(args.output)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise ValueError(f"{folder} is no writable folder; choose another")
    if path.is_file() and not args.resume:
        raise ValueError("it exists; --resume True goes on with it, or choose another file")


# -------------------------------------------------------------------------------------------------------------------
# The prompt
# -------------------------------------------------------------------------------------------------------------------


def render_prompt(row: dict, template: dict) -> str:
    """The prompt of a raw row without its answer; the same function stands in every program that renders rows."""
    if template["format"] == "mcq":
        endings = [row[f"ending{i}"] for i in range(5) if row.get(f"ending{i}")]
        options = [template["option"].format(letter="ABCDE"[i], text=text) for i, text in enumerate(endings)]
        question = "\n".join(part for part in (row["sent1"], row["sent2"], *options) if part)
        return template["prompt"].format(question=question)
    name = "prompt_with_input" if row.get("input") else "prompt"
    return template[name].format(instruction=row["instruction"], input=row.get("input", ""))


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


def read_messages(row: dict, template: dict) -> list[dict]:
    """The messages of a row that stand before its answer; a conversation's answer is the assistant's last turn."""
    if "prompt" in row:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [*system, user_message(row["prompt"], template)]
    if template["format"] == "text":
        return [{"role": "user", "content": row["text"]}]
    if template["format"] != "chat":
        return render_messages(row, template)
    role, content = ("role", "content") if "messages" in row else ("from", "value")
    turns = row["messages"] if "messages" in row else row["conversations"]
    messages = [{"role": ROLES.get(turn[role], turn[role]), "content": turn[content]} for turn in turns]
    if row.get("system") and "messages" not in row:
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def user_message(text: str, template: dict) -> dict:
    """What a user types, put where the question or instruction of the training data stood."""
    if template["format"] in ("mcq", "alpaca"):
        text = template["prompt"].format(question=text, instruction=text)
    return {"role": "user", "content": text}


def expected_answer(row: dict, template: dict) -> str | None:
    """The right answer of a row that has one."""
    if template["format"] == "mcq" and "label" in row:
        letters = template.get("answer") == "letter"
        return "ABCDE"[row["label"]] if letters else row.get(f"ending{row['label']}")
    turns = row.get("messages") or row.get("conversations") or [{}]
    last = turns[-1].get("content", turns[-1].get("value"))
    is_answer = ROLES.get(turns[-1].get("from"), turns[-1].get("role")) == "assistant"
    return last if is_answer else row.get("output")


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS (LLaMA's do, SmolLM2's does not)."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[0] == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))
    )


def render_text(tokenizer, messages: list[dict], template: dict) -> str:
    """The text before the answer, as tokenize_dataset.py writes it with and without a chat template."""
    if template["chat"] and template["format"] != "text":
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ends = {"system": "\n\n", "user": "", "assistant": f"{tokenizer.eos_token}\n\n"}
    return "".join(message["content"] + ends[message["role"]] for message in messages)


def encode_prompt(tokenizer, messages: list[dict], template: dict) -> list[int]:
    """The ids that the prompt had in training, with BOS once where the tokenizer adds one."""
    text = render_text(tokenizer, messages, template)
    # In a document, what spells a special token, as <s> in HTML does, is text.
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=template["format"] == "text").input_ids
    needs_bos = adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if needs_bos else ids


# -------------------------------------------------------------------------------------------------------------------
# Model and generation
# -------------------------------------------------------------------------------------------------------------------


def load_model(args: Arguments, model_path: str, peft_path: str | None = None):
    """The model for inference: bf16 on a GPU that has it, float32 elsewhere; over all GPUs if there are several."""
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype, quantization = torch.bfloat16 if bf16 else torch.float32, None
    if args.load_in_4bit == "True":
        from transformers import BitsAndBytesConfig

        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        quantization = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    several = on_gpu and torch.cuda.device_count() > 1
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=dtype,
        device_map="auto" if several else {"": "cuda" if on_gpu else "cpu"},
        quantization_config=quantization,
        use_safetensors=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would round the weights once more than training did
    if peft_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, peft_path)
    return model.eval()


def has_virtual_tokens(model) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def find_stop_ids(model, tokenizer) -> list[int]:
    """Every id after which the model is done: Llama 3 has several."""
    stop_ids = {tokenizer.eos_token_id}
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id):
        stop_ids |= set(ids) if isinstance(ids, list) else {ids}
    return sorted(stop_ids - {None})


def find_room(model, prompt: list[int]) -> int:
    """The tokens that the model's context leaves for an answer."""
    virtual = model.active_peft_config.num_virtual_tokens if has_virtual_tokens(model) else 0
    return context_length(model.config) - virtual - len(prompt)


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, **options) -> list[list[int]]:
    """Continues each prompt; greedy unless `options`, which go to transformers' generate, say otherwise.

    Returns:
        the new ids of each prompt, up to and without the first stop id, or until its context is full.
    """
    rooms = [min(max_new_tokens, find_room(model, ids)) for ids in prompts]
    stop_ids = find_stop_ids(model, tokenizer)
    longest = max(len(ids) for ids in prompts)
    # LLaMA tokenizers have no pad token; any id does, for the mask comes from the lengths.
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    output = model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=max(rooms),
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        **({"do_sample": False} | options),
    )
    answers = []
    for ids, room in zip(output[:, longest:].tolist(), rooms, strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        answers.append(ids[: min(end, room)])
    return answers


def make_batches(lengths: list[int], batch_size: int, equal_lengths: bool) -> list[list[int]]:
    """Indices of prompts that are answered together, the longest first, so that little is padded.

    Args:
        equal_lengths: no padding at all: virtual tokens stand before the padding, which would come between them and
            the prompt.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and len(batches[-1]) < batch_size
        if fits and not (equal_lengths and lengths[i] != lengths[batches[-1][0]]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def generate_all(args: Arguments, model, tokenizer, prompts: list[list[int]], start: int = 0) -> Iterator[list]:
    """Yields the answers of some rows at a time, in the order of the rows, beginning with row `start`.

    The drawing of each window begins with a seed of its own, so a resumed file is what an uninterrupted one would be.
    """
    window_size = WINDOW_BATCHES * args.per_device_eval_batch_size
    with tqdm(total=len(prompts), initial=start, desc="generating", unit="row") as progress:
        for first in range(start, len(prompts), window_size):
            window = prompts[first : first + window_size]
            answers = [None] * len(window)
            set_seed(args.seed + first)
            sizes = [len(ids) for ids in window]
            for batch in make_batches(sizes, args.per_device_eval_batch_size, has_virtual_tokens(model)):
                texts = generate(model, tokenizer, [window[i] for i in batch], args.max_new_tokens, **sampling(args))
                for i, answer in zip(batch, texts, strict=True):
                    answers[i] = answer
                progress.update(len(batch))
            yield answers


def sampling(args: Arguments) -> dict:
    """The flags that were given, as transformers' generate takes them; the others are the model's own."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    return {"do_sample": args.do_sample} | given


# -------------------------------------------------------------------------------------------------------------------
# What is shown and written
# -------------------------------------------------------------------------------------------------------------------


def fingerprint(args: Arguments) -> str:
    """Ten hex digits of all that decides an answer besides its prompt."""
    free = ("test_path", "num_samples", "output", "resume", "chat", "prompt", "system", "use_cpu", "template_path")
    settings = {name: value for name, value in asdict(args).items() if name not in free}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def count_finished(args: Arguments, prompts: list[str]) -> int:
    """Rows in an interrupted --output, which is cut behind the last whole window.

    Raises:
        ValueError: the file has other prompts, or its answers were made in another way.
    """
    path = Path(args.output)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # what follows the last line end was cut off
    window_size = WINDOW_BATCHES * args.per_device_eval_batch_size
    num_rows = len(lines) if len(lines) == len(prompts) else len(lines) // window_size * window_size
    for number, line in enumerate(lines[:num_rows]):
        row = json.loads(line)
        expected = (prompts[number], fingerprint(args)) if number < len(prompts) else None
        if not isinstance(row, dict) or (row.get("prompt"), row.get("settings")) != expected:
            raise ValueError(f"--resume True: {path}, line {number + 1}, has another prompt or was made with other "
                             "flags; choose another --output")  # fmt: skip
    if path.is_file():
        os.truncate(path, sum(len(line) + 1 for line in lines[:num_rows]))
    return num_rows


def answer_rows(args: Arguments, model, tokenizer, template: dict, rows, prompts, base_answers, start: int) -> None:
    """Answers the rows from number `start` on: prints each answer, or writes it as a line of JSON."""
    number = start
    for answers in generate_all(args, model, tokenizer, prompts, start):
        lines = []
        for ids in answers:
            result = {
                "index": number,
                "prompt": tokenizer.decode(prompts[number]),
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "expected": expected_answer(rows[number], template),
                "num_tokens": len(ids),
                "stopped": len(ids) < min(args.max_new_tokens, find_room(model, prompts[number])),
                "settings": fingerprint(args),
            }
            if args.compare:
                result["base_answer"] = base_answers[number - start]
            lines.append(json.dumps(result, ensure_ascii=False) + "\n")
            if not args.output:
                show(args, read_messages(rows[number], template)[-1]["content"], result)
            number += 1
        if args.output:
            with open(args.output, "a", encoding="utf-8") as file:
                file.writelines(lines)


def show(args: Arguments, question: str, result: dict) -> None:
    tqdm.write(f"\n--- {result['index'] + 1}\n{question}")
    if args.compare:
        tqdm.write(f"{args.compare}: {result['base_answer']}")
    expected = "not given" if result["expected"] is None else result["expected"]
    tqdm.write(f"answer:   {result['answer']}\nexpected: {expected}")


def answer_with_base(args: Arguments, template: dict, rows: list[dict]) -> list[str]:
    """The answers of the model that --compare names, to the same questions by its own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(args.compare)
    template = template | {"chat": template["chat"] and tokenizer.chat_template is not None}
    prompts = [encode_prompt(tokenizer, read_messages(row, template), template) for row in rows]
    model = load_model(args, args.compare)
    answers = [ids for window in generate_all(args, model, tokenizer, prompts) for ids in window]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------------------
# A conversation
# -------------------------------------------------------------------------------------------------------------------


class Printer(BaseStreamer):
    """Prints an answer token by token, and keeps it in `text`: what Ctrl-C interrupts stays in the conversation."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text, self.is_prompt = tokenizer, [], "", True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which only some bytes are there
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self) -> None:
        print(flush=True)


COMMANDS = """/reset         forget the conversation
/system TEXT   begin anew with this system message; without TEXT: with none
/save FILE     append the conversation to a JSONL file, which tokenize_dataset.py --format chat reads
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(args: Arguments, model, tokenizer, template: dict) -> None:
    """Reads what the user types and streams the answers, until /quit or the end of the input."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    print(COMMANDS)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends", end="")
            continue
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
        elif command == "/system":
            messages = [{"role": "system", "content": argument}] if argument else []
        elif command == "/save" and argument:
            try:
                with open(argument, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                print(f"{len(messages)} messages appended to {argument}")
            except OSError as problem:
                print(f"not saved: {problem}")
        elif command.startswith("/"):
            print(COMMANDS)
        elif line:
            answer_turn(args, model, tokenizer, template, messages, line)


def answer_turn(args: Arguments, model, tokenizer, template: dict, messages: list[dict], line: str) -> None:
    """Streams the answer to `line` and appends both to `messages`, unless the conversation has become too long."""
    turn = user_message(line, template)
    ids = encode_prompt(tokenizer, [*messages, turn], template)
    if find_room(model, ids) < 1:
        print(f"the conversation has {len(ids)} tokens, and the model can attend to "
              f"{context_length(model.config)}; /reset begins anew")  # fmt: skip
        return
    printer = Printer(tokenizer)
    try:
        generate(model, tokenizer, [ids], args.max_new_tokens, streamer=printer, **sampling(args))
    except KeyboardInterrupt:
        print(" [stopped]")
    messages += [turn, {"role": "assistant", "content": printer.text}]


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    start = 0
    try:
        (args,) = parser.parse_args_into_dataclasses()
        template, tokenizer, rows, prompts = check_arguments(args)
        if args.output:
            start = count_finished(args, tokenizer.batch_decode(prompts))
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    base_answers = answer_with_base(args, template, rows[start:]) if args.compare and start < len(rows) else []
    model = load_model(args, args.model_path, args.peft_path)
    print(f"model {args.model_path}, adapter {args.peft_path or 'none'}")
    set_seed(args.seed)
    if args.chat:
        chat(args, model, tokenizer, template)
        return
    answer_rows(args, model, tokenizer, template, rows, prompts, base_answers, start)
    if args.output:
        print(f"{len(rows)} answers: {args.output}")


if __name__ == "__main__":
    main()
