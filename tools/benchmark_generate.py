"""Measures how much faster test_sample.py and tools/evaluate.py are than plain loops that do the same, as ratios.

    python tools/benchmark_generate.py
    python tools/benchmark_generate.py --peft_path outputs/finetune_pp_peft --use_cpu True --num_rows 32

Generation: tokens a second of test_sample.py's sorted, left-padded batches, against one `generate` call for each
prompt. Evaluation: questions a second of evaluate.py, where the options share their prompt, against one forward for
each option. Both ways take turns row by row, so what else the machine does slows both; both must give the same tokens
and scores, or the benchmark fails.
"""

import importlib.util
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoTokenizer, HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model"})
    peft_path: str | None = field(default=None, metadata={"help": "folder of an adapter on that model"})
    dataset_path: str = field(
        default="data_sample/tokenized/triage_test", metadata={"help": "questions that tokenize_dataset.py wrote"}
    )
    num_rows: int = field(default=16, metadata={"help": "questions to measure with"})
    max_new_tokens: int = field(default=32, metadata={"help": "tokens of each answer"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "rows of one batch"})
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


def load_program(name: str):
    """A program of this repository as a module: what is measured is its own code."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(name).stem] = module
    spec.loader.exec_module(module)
    return module


def clock(action, *context):
    """(result, seconds on the wall, seconds of this process on all cores)"""
    started, used = time.perf_counter(), time.process_time()
    result = action(*context)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started, time.process_time() - used


@torch.no_grad()
def generate_one_by_one(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What a plain loop does."""
    answers = []
    for ids in prompts:
        ids = torch.tensor([ids], device=model.device)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        answers.append([token for token in output.tolist() if token != tokenizer.eos_token_id])
    return answers


@torch.no_grad()
def score_one_by_one(model, questions: list[dict]) -> list[list[float]]:
    """What a plain loop does: a forward of prompt + option for each option, without the EOS."""
    scores = []
    for question in questions:
        prompt = question["input_ids"][: -len(question["options"][0])]
        scores.append([])
        for ids in question["options"]:
            row = torch.tensor([prompt + ids[:-1]], device=model.device)
            log_probs = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            scores[-1].append(log_probs.gather(-1, row[0, len(prompt) :, None]).sum().item())
    return scores


def report(what: str, unit: str, num: int, plain: list[float], ours: list[float]) -> None:
    """Both rates and their ratio; [wall, processor] seconds."""
    print(f"{what}: {num / plain[0]:.1f} {unit}/s in a plain loop, {num / ours[0]:.1f} here: {plain[0] / ours[0]:.2f} "
          f"times as fast (processor time: {plain[1] / ours[1]:.2f})")  # fmt: skip


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    if not (Path(args.dataset_path) / "ledger.json").is_file():
        sys.exit(f"error: --dataset_path {args.dataset_path}: not a tokenized set; make it with tokenize_dataset.py")
    os.environ["TQDM_DISABLE"] = "1"
    test_sample, evaluate = load_program("test_sample.py"), load_program("tools/evaluate.py")
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    model = evaluate.load_model(evaluate.Arguments(args.model_path, args.peft_path, use_cpu=args.use_cpu))
    questions = load_from_disk(args.dataset_path).select_columns(["input_ids", "options"])
    questions = [questions[i] for i in range(min(args.num_rows, len(questions)))]
    prompts = [question["input_ids"][: -len(question["options"][0])] for question in questions]
    size = args.per_device_eval_batch_size
    settings = test_sample.Arguments(per_device_eval_batch_size=size, max_new_tokens=args.max_new_tokens)

    def batched(prompts):
        return [ids for window in test_sample.generate_all(settings, model, tokenizer, prompts) for ids in window]

    generate_one_by_one(model, tokenizer, prompts[:1], 2)  # the first call of everything is slower
    plain, ours, num_tokens, num_other = [0.0, 0.0], [0.0, 0.0], 0, 0
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        expected, *seconds = clock(generate_one_by_one, model, tokenizer, part, args.max_new_tokens)
        plain = [a + b for a, b in zip(plain, seconds, strict=True)]
        found, *seconds = clock(batched, part)
        ours = [a + b for a, b in zip(ours, seconds, strict=True)]
        num_tokens += sum(len(ids) + 1 for ids in expected)
        num_other += sum(a != b for a, b in zip(expected, found, strict=True))
    if num_other:
        print(f"{num_other} of {len(prompts)} answers have other tokens; ties within rounding explain a few")
    if num_other > len(prompts) / 10:
        sys.exit(f"error: {num_other} of {len(prompts)} answers have other tokens, so the speeds cannot be compared")
    report(f"generation at batch {size}", "tokens", num_tokens, plain, ours)

    plain, ours, farthest = [0.0, 0.0], [0.0, 0.0], 0.0
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        expected, *seconds = clock(score_one_by_one, model, part)
        plain = [a + b for a, b in zip(plain, seconds, strict=True)]
        found, *seconds = clock(evaluate.score_questions, model, part, size)
        ours = [a + b for a, b in zip(ours, seconds, strict=True)]
        for options, scores in zip(found, expected, strict=True):
            gaps = [abs(sum(option[:-1]) - score) for option, score in zip(options, scores, strict=True)]
            farthest = max(farthest, *gaps)
    if farthest > (1e-3 if model.dtype == torch.float32 else 1):
        sys.exit(f"error: scores differ by {farthest:.1e}")
    report(f"evaluation at batch {size}", "questions", len(questions), plain, ours)


if __name__ == "__main__":
    main()
