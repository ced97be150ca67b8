"""Generates answers for sample questions with a fine-tuned adapter, a fine-tuned model or a base model.

    python test_sample.py                                                # the newest adapter below outputs/
    python test_sample.py --peft_path outputs/finetune_pp_peft --num_samples 20
    python test_sample.py --model_path outputs/finetune_pp               # a fully fine-tuned model
    python test_sample.py --model_path models/SmolLM2-135M-Instruct      # the base model, only when asked for

The prompt is rendered as in training: the template travels in the run's run.json, or comes from --template_path; the
right answer is never in it. Rows are padded on the left, so the answers do not depend on the batch.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


@dataclass
class Arguments:
    model_path: str | None = field(
        default=None, metadata={"help": "folder or hub id; default: the base model that the adapter names"}
    )
    peft_path: str | None = field(
        default=None, metadata={"help": "folder of an adapter; default: the newest below outputs/, if no --model_path"}
    )
    test_path: str = field(
        default="data_sample/triage_test.jsonl", metadata={"help": "raw rows in the format of the training data"}
    )
    template_path: str | None = field(
        default=None, metadata={"help": "run.json or ledger.json with the prompt's template; default: the run's own"}
    )
    num_samples: int = field(default=5, metadata={"help": "rows to answer, from the beginning of the file"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows of one batch"})
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


SAMPLE_LEDGER = "data_sample/tokenized/triage_train/ledger.json"


def find_newest_adapter() -> str | None:
    """The adapter of the run below outputs/ that finished last; run.json shows that a run was finished."""
    receipts = [path for path in Path("outputs").glob("*/run.json") if (path.parent / "adapter_config.json").is_file()]
    return str(max(receipts, key=lambda path: path.stat().st_mtime).parent) if receipts else None


def check_arguments(args: Arguments) -> tuple[list[dict], dict]:
    """Completes the paths; returns the raw rows and the template.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes, rows, template = [], [], None
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
    local = (args.model_path or "").startswith((".", "/", "~", "models/", "outputs/"))
    if local and not (Path(args.model_path) / "config.json").is_file():
        mistakes.append(f"--model_path {args.model_path}: no config.json in it; name the folder of a whole model")
    for name in ("num_samples", "max_new_tokens", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            mistakes.append(f"--{name} {getattr(args, name)}: must be at least 1")
    receipt = Path(args.peft_path or args.model_path or ".") / "run.json"
    args.template_path = args.template_path or str(receipt if receipt.is_file() else SAMPLE_LEDGER)
    try:
        ledger = json.loads(Path(args.template_path).read_text(encoding="utf-8"))
        template = ledger.get("dataset", ledger)["template"]
    except (OSError, ValueError, KeyError):
        mistakes.append(f"--template_path {args.template_path}: no template in it; data_sample/tokenize_dataset.py "
                        "writes one into ledger.json, training into run.json")  # fmt: skip
    try:
        text = Path(args.test_path).read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if args.test_path.endswith(".json")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
        for row in rows[: args.num_samples] if template else []:
            render_prompt(row, template)
    except KeyError as missing:
        mistakes.append(
            f"--test_path {args.test_path}: a row lacks {missing}, which its {template['format']} rows have"
        )
    except (OSError, ValueError) as problem:
        mistakes.append(f"--test_path {args.test_path}: {problem}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    if not rows:
        raise ValueError(f"--test_path {args.test_path}: it has no rows")
    return rows[: args.num_samples], template


def load_model(args: Arguments, device: torch.device):
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device_map={"": device},
        use_safetensors=True,
    )
    if args.peft_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.peft_path)
    return model.eval()


def render_prompt(row: dict, template: dict) -> str:
    """The prompt of a raw row without its answer; the same function stands in every program that renders rows."""
    if template["format"] == "mcq":
        endings = [row[f"ending{i}"] for i in range(5) if row.get(f"ending{i}")]
        options = [template["option"].format(letter="ABCDE"[i], text=text) for i, text in enumerate(endings)]
        question = "\n".join(part for part in (row["sent1"], row["sent2"], *options) if part)
        return template["prompt"].format(question=question)
    name = "prompt_with_input" if row.get("input") else "prompt"
    return template[name].format(instruction=row["instruction"], input=row.get("input", ""))


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS (LLaMA's do, SmolLM2's does not)."""
    return tokenizer.bos_token_id is not None and (
        tokenizer("a").input_ids[0] == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))
    )


def encode_prompt(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The ids that the prompt had in training: chat template if it was used, BOS once where the tokenizer adds one."""
    if chat:
        message = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    needs_bos = adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if needs_bos else ids


@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuation of each prompt, without the prompt, up to and without the first stop token."""
    stop_ids = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(stop_ids if isinstance(stop_ids, list) else [stop_ids])} - {None}
    longest = max(len(ids) for ids in prompts)
    # LLaMA tokenizers have no pad token; any id does, for the mask comes from the lengths.
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    output = model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=min(stop_ids),
    )
    answers = []
    for ids in output[:, longest:].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        answers.append(ids[:end])
    return answers


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        rows, template = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = load_model(args, device)
    print(f"model {args.model_path}, adapter {args.peft_path or 'none'}")
    chat = template["chat"] and tokenizer.chat_template is not None
    prompts = [encode_prompt(tokenizer, render_prompt(row, template), chat) for row in rows]
    batch_size = args.per_device_eval_batch_size
    if args.peft_path and model.active_peft_config.is_prompt_learning:
        batch_size = 1  # virtual tokens stand before the padding, so padding would move them away from the prompt
    for start in tqdm(range(0, len(rows), batch_size), desc="generating", unit="batch"):
        batch = range(start, min(start + batch_size, len(rows)))
        answers = generate(model, tokenizer, [prompts[i] for i in batch], args.max_new_tokens)
        for i, answer in zip(batch, answers, strict=True):
            expected = rows[i].get("output", rows[i].get(f"ending{rows[i].get('label')}", "not given"))
            tqdm.write(f"\n--- {i + 1}\n{render_prompt(rows[i], template)}")
            tqdm.write(f"answer:   {tokenizer.decode(answer, skip_special_tokens=True)}\nexpected: {expected}")


if __name__ == "__main__":
    main()
