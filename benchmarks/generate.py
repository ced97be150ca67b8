"""Measures how much faster test_sample.py and tools/evaluate.py are than plain loops that do the same, as ratios.

    python benchmarks/generate.py
    python benchmarks/generate.py --peft_path outputs/finetune_pp_peft --use_cpu True --num_rows 32

Generation: tokens a second of test_sample.py's sorted, left-padded batches, against one `generate` call for each
prompt. Evaluation: questions a second of evaluate.py, where the options share their prompt, against one forward for
each option. Both ways take turns row by row, so what else the machine does slows both; both must give the same tokens
and scores, or the benchmark fails.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_sample
from tools import evaluate, loading


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


@dataclass
class Clock:
    """Adds up the time of several calls: seconds on the wall, and seconds of this process on all cores."""

    wall: float = 0.0
    processor: float = 0.0

    def time(self, action, *arguments):
        """Calls `action`, adds its time, and returns its result."""
        wall = time.perf_counter()
        processor = time.process_time()
        result = action(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return result


@torch.no_grad()
def generate_one_by_one(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What a plain loop does."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        answer = output[0, len(prompt) :].tolist()
        answers.append([token for token in answer if token != tokenizer.eos_token_id])
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


def report(what: str, unit: str, num: int, plain: Clock, ours: Clock) -> None:
    """Prints both rates and their ratio."""
    print(f"{what}: {num / plain.wall:.1f} {unit}/s in a plain loop, {num / ours.wall:.1f} here: "
          f"{plain.wall / ours.wall:.2f} times as fast (processor time: {plain.processor / ours.processor:.2f})"
          )  # fmt: skip


def measure_generation(args: Arguments, model, tokenizer, prompts: list[list[int]]) -> None:
    size = args.per_device_eval_batch_size
    settings = test_sample.Arguments(per_device_eval_batch_size=size, max_new_tokens=args.max_new_tokens)

    def generate_in_batches(prompts: list[list[int]]) -> list[list[int]]:
        answers = []
        for window in test_sample.generate_all(settings, model, tokenizer, prompts):
            answers += window
        return answers

    generate_one_by_one(model, tokenizer, prompts[:1], 2)  # the first call of everything is slower
    plain = Clock()
    ours = Clock()
    num_tokens = 0
    num_other = 0
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        expected = plain.time(generate_one_by_one, model, tokenizer, part, args.max_new_tokens)
        found = ours.time(generate_in_batches, part)
        for answer, our_answer in zip(expected, found, strict=True):
            num_tokens += len(answer) + 1  # with EOS
            if answer != our_answer:
                num_other += 1
    if num_other:
        print(f"{num_other} of {len(prompts)} answers have other tokens; ties within rounding explain a few")
    if num_other > len(prompts) / 10:
        sys.exit(f"error: {num_other} of {len(prompts)} answers have other tokens, so the speeds cannot be compared")
    report(f"generation at batch {size}", "tokens", num_tokens, plain, ours)


def measure_evaluation(args: Arguments, model, questions: list[dict]) -> None:
    size = args.per_device_eval_batch_size
    plain = Clock()
    ours = Clock()
    farthest = 0.0
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        expected = plain.time(score_one_by_one, model, part)
        found = ours.time(evaluate.score_questions, model, part, size)
        for options, scores in zip(found, expected, strict=True):
            for option, score in zip(options, scores, strict=True):
                farthest = max(farthest, abs(sum(option[:-1]) - score))
    allowed = 1.0
    if model.dtype == torch.float32:
        allowed = 1e-3
    if farthest > allowed:
        sys.exit(f"error: scores differ by {farthest:.1e}")
    report(f"evaluation at batch {size}", "questions", len(questions), plain, ours)


def main() -> None:
    try:
        (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    if not (Path(args.dataset_path) / "ledger.json").is_file():
        sys.exit(f"error: --dataset_path {args.dataset_path}: not a tokenized set; make it with tokenize_dataset.py")
    os.environ["TQDM_DISABLE"] = "1"
    source = loading.open_model(args.model_path, args.peft_path)
    tokenizer = source.tokenizer
    model = evaluate.load_model(source, load_in_4bit=False, use_cpu=args.use_cpu)
    questions = load_from_disk(args.dataset_path).select_columns(["input_ids", "options"])
    questions = questions.select(range(min(args.num_rows, len(questions)))).to_list()
    prompts = [question["input_ids"][: -len(question["options"][0])] for question in questions]
    measure_generation(args, model, tokenizer, prompts)
    measure_evaluation(args, model, questions)


if __name__ == "__main__":
    main()
