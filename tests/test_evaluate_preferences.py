"""tools/evaluate.py on pairs of answers: log-probabilities and rewards by hand, with and without a reference."""

import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_tokenizer, run_script, save_tiny_model
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from data_sample import tokenize_dataset
from tools import evaluate

IGNORE_INDEX = -100


def make_raw_pairs(number: int) -> list[dict]:
    """Prompts and answers of unequal length; in some of the rejected ones a turn has no loss."""
    draw = random.Random(3)
    words = ["pain", "rest", "ear", "很疼", "See", "a", "doctor", "12"]
    rows = []
    for index in range(number):
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(3)]
        row = {"prompt": f"{index} {texts[0]}", "chosen": f"{texts[1]}.", "rejected": f"{texts[2]}!"}
        if index % 3 == 0:
            answer = {"role": "assistant", "content": "Not learned.", "weight": 0}
            last = {"role": "assistant", "content": row["rejected"]}
            row["rejected"] = [answer, {"role": "user", "content": "And?"}, last]
        rows.append(row)
    return rows


def save_pairs(folder: Path, rows: list[dict], tokenizer_path: Path) -> Path:
    """The set that tokenize_dataset.py makes of raw rows."""
    folder.parent.mkdir(exist_ok=True)
    path = folder.parent / f"{folder.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = tokenize_dataset.Arguments(
        input=str(path), output=str(folder), format="preference", tokenizer_path=str(tokenizer_path), max_length=1000
    )
    tokenize_dataset.check_arguments(args)
    tokenize_dataset.build(args, make_tokenizer())
    return folder


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """A tiny model with room for the prompts of --format preference."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


@pytest.fixture(scope="module")
def pairs(model_path, tmp_path_factory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("sets") / "pairs", make_raw_pairs(11), model_path)


@torch.no_grad()
def log_probs_by_hand(model, dataset_path: Path, num_virtual: int = 0) -> list[list[float]]:
    """A plain forward for each answer, and the sum over the tokens that have a label."""
    sums = []
    for row in load_from_disk(str(dataset_path)):
        sums.append([])
        for name in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, num_virtual:]
            total = 0.0
            for place, label in enumerate(row[f"{name}_labels"], len(row["prompt_ids"])):
                if label != IGNORE_INDEX:
                    total += logits[place - 1].double().log_softmax(-1)[label].item()
            sums[-1].append(total)
    return sums


def run(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--use_cpu", "True", *map(str, flags)])
    evaluate.main()
    return capsys.readouterr().out


def stop_message(monkeypatch, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    return str(stopped.value.code)


def save_adapter(folder: Path, model_path: Path, mode: str = "lora", seed: int = 1) -> Path:
    """An adapter with random weights, as if it had been trained."""
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if mode == "lora":
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    elif mode == "prefix":
        config = peft.PrefixTuningConfig(**virtual)
    elif mode == "ptuning":
        config = peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual)
    else:
        config = peft.PromptTuningConfig(**virtual)
    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_rewards_of_an_adapter_are_those_of_plain_forwards(
    tmp_path, monkeypatch, capsys, model_path, pairs, mode, batch_size
):
    """The reference is the model with the adapter off: the base model itself."""
    adapter = save_adapter(tmp_path / "adapter", model_path, mode)
    printed = run(monkeypatch, capsys, "--peft_path", adapter, "--dataset_path", pairs, "--beta", 0.2,
                  "--per_device_eval_batch_size", batch_size, "--output", tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    reference = log_probs_by_hand(base, pairs)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    expected = log_probs_by_hand(model, pairs, num_virtual=4 if mode in ("prompt", "ptuning") else 0)

    margins = []
    for example, ours, theirs in zip(result["examples"], expected, reference, strict=True):
        found = [example["chosen"], example["rejected"]]
        assert found == pytest.approx(ours, rel=1e-5)
        assert [example["reference_chosen"], example["reference_rejected"]] == pytest.approx(theirs, rel=1e-5)
        margins.append(0.2 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1])))
        assert example["right"] == (margins[-1] > 0)
        assert example["right_log_prob"] == (ours[0] > ours[1])
    num_right = sum(margin > 0 for margin in margins)
    assert 0 < num_right < 11  # else the test would say little
    assert result["accuracy"] == num_right / 11
    assert result["accuracy_interval"] == list(evaluate.wilson_interval(num_right, 11))
    assert result["accuracy_log_prob"] == sum(chosen > rejected for chosen, rejected in expected) / 11
    assert result["reward_margin"] == pytest.approx(sum(margins) / 11, rel=1e-4)
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / 11
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["num_pairs"] == 11 and result["beta"] == 0.2 and result["num_ties"] == 0
    assert f"accuracy of the implicit reward {num_right / 11:.1%} (95 % interval " in printed
    assert "the same model with the adapter switched off" in printed
    assert f"| {num_right / 11:.1%} |" in (tmp_path / "result.md").read_text()


@pytest.fixture(scope="module")
def trained_path(model_path, tmp_path_factory) -> Path:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    shutil.copytree(model_path, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_a_whole_model_is_scored_against_the_one_that_base_model_names(
    tmp_path, monkeypatch, capsys, model_path, trained_path, pairs
):
    printed = run(monkeypatch, capsys, "--model_path", trained_path, "--base_model", model_path, "--dataset_path",
                  pairs, "--output", tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    ours = log_probs_by_hand(AutoModelForCausalLM.from_pretrained(trained_path).eval(), pairs)
    theirs = log_probs_by_hand(AutoModelForCausalLM.from_pretrained(model_path).eval(), pairs)
    right = []
    for a, b in zip(ours, theirs, strict=True):
        right.append(a[0] - b[0] > a[1] - b[1])
    assert [example["right"] for example in result["examples"]] == right
    assert result["accuracy"] == sum(right) / 11 != result["accuracy_log_prob"]
    assert result["reference"] == str(model_path) and result["beta"] == 0.1
    assert f"reference: {model_path}\n" in printed


def test_without_a_reference_log_probabilities_are_compared_and_it_says_so(
    tmp_path, monkeypatch, capsys, model_path, pairs
):
    printed = run(monkeypatch, capsys, "--model_path", model_path, "--dataset_path", pairs, "--output",
                  tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    expected = log_probs_by_hand(AutoModelForCausalLM.from_pretrained(model_path).eval(), pairs)
    num_right = sum(chosen > rejected for chosen, rejected in expected)
    assert result["accuracy"] == result["accuracy_log_prob"] == num_right / 11
    assert [result[name] for name in ("reference", "loss", "reward_margin", "reward_chosen")] == [None] * 4
    assert f"accuracy of the log-probability {num_right / 11:.1%}" in printed
    assert "no reference: the log-probabilities of the two answers were compared, and no rewards" in printed


def test_by_the_average_of_a_token_a_long_answer_can_win_that_a_sum_lets_lose():
    """What ORPO and SimPO train: 40 tokens at -1.0 against 20 at -1.5."""
    result = evaluate.evaluate_pairs([[-40.0, -30.0], [-10.0, -30.0]], [[40, 20], [10, 40]], None, 0.1)
    assert result["accuracy"] == result["accuracy_log_prob"] == 0.5 and result["accuracy_norm"] == 0.5
    assert [example["right_norm"] for example in result["examples"]] == [True, False]


def test_it_is_said_when_the_default_set_is_not_of_the_run(tmp_path, monkeypatch, capsys, model_path, pairs):
    """Runs on one's own data are not scored on the sample's questions without a word."""
    adapter = save_adapter(tmp_path / "adapter", model_path, seed=1)
    monkeypatch.setattr(evaluate.Arguments, "dataset_path", str(pairs))  # in place of the sample
    for trained_on, expected in (("data/mine", True), ("data/triage_train", False), ("triage_train:1,mine:2", False)):
        (adapter / "run.json").write_text(json.dumps({"arguments": {"dataset_path": trained_on}}))
        printed = run(monkeypatch, capsys, "--peft_path", adapter, "--dataset_path", pairs)
        assert ("--dataset_path names another set" in printed) == expected


def test_an_untrained_adapter_has_no_reward_and_no_right_answer(tmp_path, monkeypatch, capsys, model_path, pairs):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    printed = run(monkeypatch, capsys, "--peft_path", tmp_path / "adapter", "--dataset_path", pairs, "--output",
                  tmp_path / "result.json")  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["accuracy"], result["reward_margin"], result["num_ties"]) == (0, 0, 11)
    assert result["loss"] == pytest.approx(math.log(2))
    assert "equal rewards in 11 pairs" in printed


def test_an_adapter_that_went_on_from_another_is_scored_against_that(tmp_path, monkeypatch, capsys, model_path, pairs):
    """The receipt names the adapter of --peft_path, and beta."""
    first = save_adapter(tmp_path / "first", model_path, seed=1)
    second = save_adapter(tmp_path / "second", model_path, seed=2)
    arguments = {"peft_path": str(first), "beta": 0.5}
    (second / "run.json").write_text(json.dumps({"arguments": arguments}))
    run(monkeypatch, capsys, "--peft_path", second, "--dataset_path", pairs)
    result = json.loads((second / "evaluation.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(model_path)
    expected = log_probs_by_hand(peft.PeftModel.from_pretrained(base, first).eval(), pairs)
    for example, (chosen, rejected) in zip(result["examples"], expected, strict=True):
        assert example["reference_chosen"] == pytest.approx(chosen, rel=1e-5)
        assert example["reference_rejected"] == pytest.approx(rejected, rel=1e-5)
    assert result["reference"] == str(first) and result["beta"] == 0.5

    # Beside a run with another zero, rewards say nothing.
    printed = run(monkeypatch, capsys, "--compare", first, second, "--dataset_path", pairs, "--output",
                  tmp_path / "compared.json")  # fmt: skip
    compared = json.loads((tmp_path / "compared.json").read_text())
    right = [[example["right_log_prob"] for example in compared[name]["examples"]] for name in ("a", "b")]
    assert compared["mcnemar"]["only_a"] == sum(a and not b for a, b in zip(*right, strict=True))
    assert f"their references differ, {model_path} and {first}, so the log-probabilities are compared" in printed

    arguments["loss_type"] = "simpo"  # whose beta is another number
    (second / "run.json").write_text(json.dumps({"arguments": arguments}))
    run(monkeypatch, capsys, "--peft_path", second, "--dataset_path", pairs)
    assert json.loads((second / "evaluation.json").read_text())["beta"] == 0.1

    arguments["peft_path"] = str(second)  # as runs of former versions could have it
    (second / "run.json").write_text(json.dumps({"arguments": arguments}))
    message = stop_message(monkeypatch, "--peft_path", second, "--dataset_path", pairs)
    assert f"{second}: that is its own folder, so it is gone; name a copy by --base_model" in message
    arguments["peft_path"] = str(first)
    (second / "run.json").write_text(json.dumps({"arguments": arguments}))
    shutil.rmtree(first)
    message = stop_message(monkeypatch, "--peft_path", second, "--dataset_path", pairs)
    assert f"{second} was trained from the adapter {first}: no such folder" in message


def test_two_runs_are_compared_pair_by_pair(tmp_path, monkeypatch, capsys, model_path, trained_path, pairs):
    adapters = [save_adapter(tmp_path / f"adapter-{seed}", model_path, seed=seed) for seed in (1, 2)]
    printed = run(monkeypatch, capsys, "--compare", *adapters, "--dataset_path", pairs, "--output",
                  tmp_path / "compared.json")  # fmt: skip
    compared = json.loads((tmp_path / "compared.json").read_text())
    right = [[example["right"] for example in compared[name]["examples"]] for name in ("a", "b")]
    assert compared["mcnemar"]["only_a"] == sum(a and not b for a, b in zip(*right, strict=True)) > 0
    assert printed.count("accuracy of the implicit reward") == 2
    assert "exact McNemar p = " in printed

    # A base model has no reference, so both are compared by their log-probabilities.
    printed = run(monkeypatch, capsys, "--compare", model_path, adapters[0], "--dataset_path", pairs, "--output",
                  tmp_path / "compared.json")  # fmt: skip
    compared = json.loads((tmp_path / "compared.json").read_text())
    right = [[example["right_log_prob"] for example in compared[name]["examples"]] for name in ("a", "b")]
    assert compared["mcnemar"]["only_a"] == sum(a and not b for a, b in zip(*right, strict=True))
    assert "one of them has no reference, so the log-probabilities are compared, of both" in printed

    # --base_model is that of the whole model; what was scored before is read from its file.
    run(monkeypatch, capsys, "--peft_path", adapters[0], "--dataset_path", pairs, "--output", tmp_path / "one.json")
    printed = run(monkeypatch, capsys, "--compare", tmp_path / "one.json", trained_path, "--base_model", model_path,
                  "--dataset_path", pairs)  # fmt: skip
    assert printed.count("accuracy of the implicit reward") == 2


def test_every_checkpoint_is_scored(tmp_path, monkeypatch, capsys, model_path, pairs):
    for step in (2, 4):
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", model_path, seed=step)
    save_adapter(tmp_path / "run", model_path, seed=4)
    run(monkeypatch, capsys, "--peft_path", tmp_path / "run", "--all_checkpoints", "True", "--dataset_path", pairs,
        "--output", tmp_path / "all.json")  # fmt: skip
    results = json.loads((tmp_path / "all.json").read_text())["checkpoints"]
    assert [result["step"] for result in results] == [2, 4]
    assert results[0]["examples"] != results[1]["examples"]


def test_the_program_itself_scores_pairs(tmp_path, model_path, pairs):
    flags = ["--model_path", model_path, "--dataset_path", pairs, "--use_cpu", "True"]
    completed = run_script("tools/evaluate.py", *flags, "--output", tmp_path / "result.json")
    assert re.search(r"accuracy of the log-probability [\d.]+% .95 % interval", completed.stdout)
    assert json.loads((tmp_path / "result.json").read_text())["kind"] == "preference"


def test_the_flag_that_is_to_blame_is_named(tmp_path, monkeypatch, model_path, trained_path, tiny_set, pairs):
    single = [{"prompt": "a", "completion": "b", "label": True}]
    unpaired = save_pairs(tmp_path / "unpaired", single, model_path)
    long_rows = save_pairs(tmp_path / "long", make_raw_pairs(1) + [
        {"prompt": "a", "chosen": "x" * 600, "rejected": "y" * 900}], model_path)  # fmt: skip
    short_model = save_tiny_model(tmp_path / "short")
    other_tokenizer = save_tiny_model(tmp_path / "other")
    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.save_pretrained(other_tokenizer)
    right = {"--model_path": model_path, "--dataset_path": pairs}
    cases = {
        f"--dataset_path {unpaired}: its rows have single answers": {"--dataset_path": unpaired},
        f"--dataset_path {long_rows}: a row has ": {"--dataset_path": long_rows, "--model_path": short_model},
        f"--dataset_path {pairs}: it was made with a tokenizer that behaves otherwise": {
            "--model_path": other_tokenizer
        },
        f"--base_model {other_tokenizer}: it was made with a tokenizer": {"--base_model": other_tokenizer},
        "--base_model models/none: no such folder": {"--base_model": "models/none"},
        f"--base_model {model_path}: it is the model that is scored": {"--base_model": model_path},
        f"--base_model {trained_path}: only pairs of answers": {
            "--base_model": trained_path,
            "--dataset_path": tiny_set,
        },
        "--beta 0.0: must be above 0": {"--beta": 0},
        "--shots 2: needs questions with options": {"--shots": 2},
    }
    for expected, changed in cases.items():
        flags = []
        for name, value in (right | changed).items():
            flags += [name, value]
        message = stop_message(monkeypatch, *flags)
        assert message.startswith(f"error: {expected}"), message
