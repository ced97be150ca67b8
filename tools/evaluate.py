"""Scores a model, or a model with an adapter, on multiple-choice questions by the likelihood of each option.

    python tools/evaluate.py                                              # the sample model before training
    python tools/evaluate.py --peft_path outputs/finetune_pp_peft         # and with the adapter of the quickstart
    python tools/evaluate.py --model_path outputs/finetune_pp             # a fully fine-tuned model

Reads what data_sample/tokenize_dataset.py --format mcq wrote, so a question has exactly the tokens that training would
have seen. Prints the accuracy with its 95 % Wilson interval, where an option's score is the summed log-probability of
its tokens without the EOS; and the loss per token of the right answer with the EOS, which is the training scripts'
evaluation loss. --output writes the same as JSON.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import TokenizedDataset


@dataclass
class Arguments:
    model_path: str = field(default="models/SmolLM2-135M-Instruct", metadata={"help": "folder or hub id of the model"})
    peft_path: str | None = field(default=None, metadata={"help": "folder of an adapter on that model"})
    dataset_path: str = field(
        default="data_sample/tokenized/triage_test", metadata={"help": "questions that tokenize_dataset.py wrote"}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "questions of one forward"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


def check_arguments(args: Arguments):
    """Returns the questions; raises ValueError with every mistake, before weights are loaded."""
    mistakes, questions = [], None
    if args.peft_path and not (Path(args.peft_path) / "adapter_config.json").is_file():
        mistakes.append(f"--peft_path {args.peft_path}: no adapter_config.json in it; train an adapter first")
    if not Path(args.model_path).is_dir() and args.model_path.startswith((".", "/", "~", "models/", "outputs/")):
        mistakes.append(
            f"--model_path {args.model_path}: no such folder; bash scripts/quickstart.sh fetches the sample"
        )
    if args.per_device_eval_batch_size < 1:
        mistakes.append(f"--per_device_eval_batch_size {args.per_device_eval_batch_size}: must be at least 1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_path) if not mistakes else None
        TokenizedDataset(args.dataset_path, tokenizer=tokenizer)
        questions = load_from_disk(args.dataset_path)
        if "options" not in questions.column_names:
            raise ValueError("it has no options; tokenize with --format mcq and --packing False")
    except (ValueError, OSError) as problem:
        mistakes.append(f"--dataset_path {args.dataset_path}: {problem}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return questions


def load_model(args: Arguments, device: torch.device):
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device_map={"": device},
        attn_implementation="sdpa",
        use_safetensors=True,
    )
    if args.peft_path:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.peft_path)
    return model.eval()


def lay_out(questions: list[dict]) -> dict[str, torch.Tensor]:
    """Joins questions into one row in which every prompt stands once, followed by all its options.

    A token sees the prompt of its own question and its own option, nothing else, and each option's positions go on from
    the prompt: the logits are those of every prompt + option by itself, for the price of one prompt.

    Returns:
        `input_ids`, `position_ids` [1, T]; `attention_mask` [1, 1, T, T], True where a token is seen;
        `sources` [N]: where each option token is predicted; `targets` [N]: its id; `owners` [N, 2]: question, option.
    """
    input_ids, position_ids, segments, sources, targets, owners = [], [], [], [], [], []
    for number, question in enumerate(questions):
        right_answer = question["options"][0]
        prompt = question["input_ids"][: -len(right_answer)]
        input_ids += prompt
        position_ids += range(len(prompt))
        segments += [(number, -1)] * len(prompt)
        end_of_prompt = len(input_ids) - 1
        for option, ids in enumerate(question["options"]):
            sources += [end_of_prompt, *range(len(input_ids), len(input_ids) + len(ids) - 1)]
            targets += ids
            owners += [(number, option)] * len(ids)
            input_ids += ids
            position_ids += range(len(prompt), len(prompt) + len(ids))
            segments += [(number, option)] * len(ids)
    question_of, option_of = torch.tensor(segments).T
    seen = question_of[:, None] == question_of[None, :]
    seen &= (option_of[None, :] == -1) | (option_of[:, None] == option_of[None, :])
    return {
        "input_ids": torch.tensor(input_ids)[None],
        "position_ids": torch.tensor(position_ids)[None],
        "attention_mask": seen.tril()[None, None],
        "sources": torch.tensor(sources),
        "targets": torch.tensor(targets),
        "owners": torch.tensor(owners),
    }


@torch.no_grad()
def score_batch(model, questions: list[dict]) -> list[list[list[float]]]:
    """Log-probabilities: for each question, for each option, for each of its tokens."""
    scores = [[[] for _ in question["options"]] for question in questions]
    prompt_learning = getattr(model, "active_peft_config", None)
    if prompt_learning is not None and prompt_learning.is_prompt_learning:
        # Virtual tokens stand before a whole row, so each option needs a row of its own here.
        for number, question in enumerate(questions):
            prompt = question["input_ids"][: -len(question["options"][0])]
            for option, ids in enumerate(question["options"]):
                row = torch.tensor([prompt + ids], device=model.device)
                logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
                log_probs = logits[0, -len(ids) - 1 : -1].float().log_softmax(-1)
                scores[number][option] = log_probs[range(len(ids)), ids].tolist()
        return scores
    row = {name: tensor.to(model.device) for name, tensor in lay_out(questions).items()}
    sources, targets, owners = row.pop("sources"), row.pop("targets"), row.pop("owners")
    logits = model(**row, logits_to_keep=sources, use_cache=False).logits[0].float()
    log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for (number, option), log_prob in zip(owners.tolist(), log_probs.tolist(), strict=True):
        scores[number][option].append(log_prob)
    return scores


def wilson_interval(num_right: int, num_questions: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927, as in Brown, Cai and DasGupta 2001, formula 4)."""
    share = num_right / num_questions
    center = share + z * z / (2 * num_questions)
    half = z * math.sqrt(share * (1 - share) / num_questions + z * z / (4 * num_questions**2))
    scale = 1 + z * z / num_questions
    return (center - half) / scale, (center + half) / scale


def evaluate(model, questions, batch_size: int) -> dict:
    """Accuracy with its interval and the loss of the right answers."""
    num_right, right_log_prob, right_tokens = 0, 0.0, 0
    for start in tqdm(range(0, len(questions), batch_size), desc="evaluating", unit="batch"):
        batch = [questions[i] for i in range(start, min(start + batch_size, len(questions)))]
        for right, *wrong in score_batch(model, batch):
            # The right option is listed first, so a tie must not count for it.
            num_right += all(sum(right[:-1]) > sum(option[:-1]) for option in wrong)
            right_log_prob += sum(right)
            right_tokens += len(right)
    low, high = wilson_interval(num_right, len(questions))
    return {
        "num_questions": len(questions),
        "accuracy": num_right / len(questions),
        "accuracy_interval": [low, high],
        "loss": -right_log_prob / right_tokens,
    }


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        questions = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    result = evaluate(load_model(args, device), questions, args.per_device_eval_batch_size) | asdict(args)
    low, high = result["accuracy_interval"]
    print(f"accuracy {result['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), loss {result['loss']:.4f}, "
          f"{result['num_questions']} questions: {args.peft_path or args.model_path}")  # fmt: skip
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.output}.tmp").write_text(json.dumps(result, indent=2))
        os.replace(f"{args.output}.tmp", args.output)


if __name__ == "__main__":
    main()
