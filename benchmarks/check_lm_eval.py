"""Checks that tools/evaluate.py and lm-evaluation-harness agree, question by question, on a tokenized set.

    python benchmarks/check_lm_eval.py --dataset_path data_sample/tokenized/triage_test
    python benchmarks/check_lm_eval.py --peft_path outputs/finetune_pp_peft

The questions are decoded and written as a local task of the harness with the same prompts and options; its accuracies
acc and acc_norm must be those of evaluate.py (accuracy and accuracy_norm), and the log-likelihoods of a question's
options must be as far apart to 1e-3. (Not the same: the harness counts white space at the end of a prompt, such as the
line end of a chat template, as the beginning of each option, which adds the same number to all of them.) Questions
whose text has other ids for the harness than in the set are counted and left out: it tokenises prompt and option
together, where a token may span the border.

The harness gets an environment of its own, outputs/environments/lm_eval, which borrows PyTorch and transformers from
this one, because it is no part of this toolkit.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_from_disk
from transformers import AutoTokenizer, HfArgumentParser

PACKAGE = "lm-eval==0.4.13"
ENVIRONMENT = Path("outputs/environments/lm_eval")
TASK = """task: local_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
# Runs in the harness's environment: python -c HARNESS folder model peft out
HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, model, peft, num_threads = sys.argv[1:5]
arguments = f"pretrained={model},dtype=float32" + (f",peft={peft}" if peft else "")
results = lm_eval.simple_evaluate(
    model="hf", model_args=arguments, tasks=["local_questions"], device="cpu", batch_size=4, log_samples=True,
    bootstrap_iters=0, task_manager=TaskManager(include_path=folder, include_defaults=False),
)
samples = sorted(results["samples"]["local_questions"], key=lambda sample: sample["doc_id"])
kept = [{"acc": s["acc"], "acc_norm": s["acc_norm"],
         "scores": [float(r[0] if isinstance(r[0], (int, float, str)) else r[0][0]) for r in s["filtered_resps"]]}
        for s in samples]
figures = {name.split(",")[0]: value for name, value in results["results"]["local_questions"].items()}
json.dump({"figures": {n: v for n, v in figures.items() if isinstance(v, float)}, "samples": kept},
          open(folder + "/harness.json", "w"))
"""


@dataclass
class Arguments:
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model"})
    peft_path: str | None = field(default=None, metadata={"help": "folder of an adapter on that model"})
    dataset_path: str = field(
        default="data_sample/tokenized/triage_test", metadata={"help": "questions that tokenize_dataset.py wrote"}
    )


def make_environment() -> Path:
    """The Python of an environment that has the harness; made at the first call."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").is_file():
        print(f"making {ENVIRONMENT} with {PACKAGE}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        # A .pth file lends this environment's packages to that one, so PyTorch is not installed twice.
        site = Path(sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)}))
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


def write_task(args: Arguments, folder: Path) -> list[int]:
    """Writes the questions as text; returns the numbers of those whose ids the harness will find again."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    same = []
    lines = []
    for number, row in enumerate(load_from_disk(args.dataset_path)):
        prompt_ids = row["input_ids"][: -len(row["options"][0])]
        prompt = tokenizer.decode(prompt_ids)
        if adds_bos:
            prompt = tokenizer.decode(prompt_ids[1:])
        choices = []
        all_same = True
        for ids in row["options"]:
            choice = tokenizer.decode(ids[:-1])  # without EOS
            choices.append(choice)
            all_same = all_same and tokenizer(prompt + choice).input_ids == prompt_ids + ids[:-1]
        if all_same:
            same.append(number)
            lines.append(json.dumps({"prompt": prompt, "choices": choices, "gold": 0}, ensure_ascii=False))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return same


def run_both(args: Arguments, folder: Path) -> tuple[dict, dict]:
    """The results of evaluate.py and of the harness."""
    evaluate = [sys.executable, "tools/evaluate.py", "--model_path", args.model_path]
    evaluate += ["--dataset_path", args.dataset_path, "--use_cpu", "True", "--output", folder / "evaluation.json"]
    if args.peft_path:
        evaluate += ["--peft_path", args.peft_path]
    subprocess.run(evaluate, check=True)
    harness = [make_environment(), "-c", HARNESS, folder, args.model_path, args.peft_path or "", "1"]
    subprocess.run(harness, check=True)
    ours = json.loads((folder / "evaluation.json").read_text())
    theirs = json.loads((folder / "harness.json").read_text())
    return ours, theirs


def compare(examples: list[dict], samples: list[dict]) -> tuple[float, float, int]:
    """How far the scores of both part.

    Returns:
        the largest difference between the distances of a question's options; the largest shift that is the same for
        all options of a question; the number of questions that are judged differently.
    """
    farthest = 0.0
    largest_shift = 0.0
    num_different = 0
    for example, sample in zip(examples, samples, strict=True):
        shifts = [theirs - ours for ours, theirs in zip(example["scores"], sample["scores"], strict=True)]
        farthest = max(farthest, max(shifts) - min(shifts))
        largest_shift = max(largest_shift, *map(abs, shifts))
        same_right = example["right"] == (sample["acc"] == 1)
        same_right_norm = example["right_norm"] == (sample["acc_norm"] == 1)
        if not (same_right and same_right_norm):
            num_different += 1
    return farthest, largest_shift, num_different


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    if not (Path(args.dataset_path) / "ledger.json").is_file():
        sys.exit(f"error: --dataset_path {args.dataset_path}: not a tokenized set; make it with tokenize_dataset.py")
    with tempfile.TemporaryDirectory() as name:
        same = write_task(args, Path(name))
        ours, theirs = run_both(args, Path(name))
    examples = [ours["examples"][number] for number in same]
    print(f"{len(same)} of {len(ours['examples'])} questions have the same ids for both")
    if not same:
        sys.exit("error: no question has the same ids for both, so nothing can be compared")
    farthest, largest_shift, num_different = compare(examples, theirs["samples"])
    for name, key in (("acc", "right"), ("acc_norm", "right_norm")):
        accuracy = sum(example[key] for example in examples) / len(examples)
        print(f"{name:9} evaluate.py {accuracy:.4f}, lm-evaluation-harness {theirs['figures'][name]:.4f}")
    print(
        f"log-likelihoods of a question's options are as far apart to {farthest:.1e} (white space at the end of the "
        f"prompt shifts all of them by at most {largest_shift:.1e}); {num_different} questions are judged differently"
    )
    if num_different or farthest > 1e-3:
        sys.exit("error: the two do not agree")
    print("the two agree, question by question")


if __name__ == "__main__":
    main()
