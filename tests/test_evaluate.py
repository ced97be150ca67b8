"""tools/evaluate.py: joined questions score like each option by itself, and ties do not count."""

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT, run_script, save_tiny_model
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
evaluate = importlib.util.module_from_spec(spec)
sys.modules["evaluate_tool"] = evaluate
spec.loader.exec_module(evaluate)


def random_questions(num_questions: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    questions = []
    for _ in range(num_questions):
        lengths = torch.randint(1, 6, (4,), generator=generator).tolist()
        options = [[*torch.randint(3, 300, (n,), generator=generator).tolist(), 2] for n in lengths]
        prompt = torch.randint(3, 300, (int(torch.randint(2, 20, (1,), generator=generator)),), generator=generator)
        questions.append({"input_ids": prompt.tolist() + options[0], "options": options})
    return questions


@torch.no_grad()
def score_one_by_one(model, questions):
    scores = []
    for question in questions:
        prompt = question["input_ids"][: -len(question["options"][0])]
        scores.append([])
        for ids in question["options"]:
            log_probs = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            scores[-1].append([log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)])
    return scores


def test_joined_questions_score_like_each_option_by_itself(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa").eval()
    questions = random_questions(7)
    joined = [score for start in (0, 3, 6) for score in evaluate.score_batch(model, questions[start : start + 3])]
    alone = score_one_by_one(model, questions)
    for mine, theirs in zip(joined, alone, strict=True):
        for option, expected in zip(mine, theirs, strict=True):
            assert option == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_adapters_of_every_mode_are_scored(mode, tiny_model):
    """With an untrained LoRA (B = 0) the scores are the base model's; virtual tokens change them, each option alone."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    base = evaluate.score_batch(model.eval(), random_questions(3))
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "ptuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
    }[mode]()
    model = peft.get_peft_model(model, config).eval()
    scores = evaluate.score_batch(model, random_questions(3))
    if mode == "lora":
        assert scores == base
    else:
        assert scores != base
        assert [[len(option) for option in q] for q in scores] == [[len(option) for option in q] for q in base]


def test_a_tie_is_not_a_right_answer(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()
    tied = [{"input_ids": [5, 6, 7, 2], "options": [[7, 2], [7, 2]]}]
    assert evaluate.evaluate(model, tied, 1)["accuracy"] == 0


def test_the_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148, score method without continuity correction.
    assert evaluate.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert evaluate.wilson_interval(0, 20)[0] == pytest.approx(0)


def test_from_raw_questions_to_a_score(tmp_path):
    """The loss is the training scripts' evaluation loss; the accuracy counts what a plain argmax counts."""
    import json

    model_path = save_tiny_model(tmp_path / "model")
    lines = (ROOT / "data_sample" / "triage_test.jsonl").read_text().splitlines()[:11]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    data = tmp_path / "set"
    run_script("data_sample/tokenize_dataset.py", "--input", tmp_path / "few.jsonl", "--tokenizer_path", model_path,
               "--output", data)  # fmt: skip
    run_script("tools/evaluate.py", "--model_path", model_path, "--dataset_path", data, "--use_cpu", "True",
               "--output", tmp_path / "result.json", "--per_device_eval_batch_size", 3)  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    scores = score_one_by_one(model, load_from_disk(data))
    best = [max(range(4), key=lambda i, options=options: sum(options[i][:-1])) for options in scores]
    assert result["num_questions"] == 11
    assert result["accuracy"] == best.count(0) / 11
    right = [log_prob for options in scores for log_prob in options[0]]
    assert result["loss"] == pytest.approx(-sum(right) / len(right), rel=1e-5)

    run_script("finetune_pp.py", "--model_path", model_path, "--dataset_path", data, "--eval_dataset_path", data,
               "--max_steps", 1, "--learning_rate", 1e-30, "--output_dir", tmp_path / "out", "--bf16", "False",
               "--use_cpu", "True")  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["eval_loss"] == pytest.approx(result["loss"], rel=1e-5)


def test_mistakes_are_reported_together(tmp_path):
    flags = ["--model_path", "models/none", "--peft_path", tmp_path, "--per_device_eval_batch_size", 0]
    completed = run_script("tools/evaluate.py", *flags, "--dataset_path", tmp_path / "none", check=False)
    assert completed.returncode == 1 and "Traceback" not in completed.stderr
    for part in ("--model_path models/none", "--peft_path", "--per_device_eval_batch_size 0", "--dataset_path"):
        assert part in completed.stderr
