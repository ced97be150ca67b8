"""tools/evaluate.py: joined questions score like each option by itself, and ties do not count."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from data_sample.rendering import fingerprint_tokenizer
from tools import evaluate


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
def score_one_by_one(model, questions, num_virtual: int = 0):
    """A forward for each option; the logits of `num_virtual` tokens stand before the row's own."""
    scores = []
    for question in questions:
        prompt = question["input_ids"][: -len(question["options"][0])]
        scores.append([])
        for ids in question["options"]:
            row = torch.tensor([prompt + ids])
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
            log_probs = logits[num_virtual:].log_softmax(-1)
            scores[-1].append([log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)])
    return scores


def test_joined_questions_score_like_each_option_by_itself(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa").eval()
    questions = random_questions(7)
    alone = score_one_by_one(model, questions)
    for batch_size in (1, 3, 7):
        together = evaluate.score_questions(model, questions, batch_size)
        for mine, theirs in zip(together, alone, strict=True):
            for option, expected in zip(mine, theirs, strict=True):
                assert option == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_adapters_of_every_mode_are_scored(mode, tiny_model):
    """Padded together, options score as one by one; an untrained LoRA (B = 0) leaves the base model's scores."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa")
    base = evaluate.score_questions(model.eval(), random_questions(3), 3)
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "ptuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
    }[mode]()
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval().double()
    scores = evaluate.score_questions(model, random_questions(3), 3)
    assert (scores == base) == (mode == "lora")
    alone = score_one_by_one(model, random_questions(3), num_virtual=0 if mode in ("lora", "prefix") else 4)
    for mine, theirs in zip(scores, alone, strict=True):
        for option, expected in zip(mine, theirs, strict=True):
            assert option == pytest.approx(expected, rel=1e-5)


def test_a_tie_is_not_a_right_answer(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="sdpa").eval()
    tied = [{"input_ids": [5, 6, 7, 2], "options": [[7, 2], [7, 2]]}]
    assert evaluate.evaluate_choices(model, tied, make_tokenizer(), {}, 1)["accuracy"] == 0


def test_the_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 and 15 of 148, score method without continuity correction.
    assert evaluate.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert evaluate.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert evaluate.wilson_interval(0, 20)[0] == pytest.approx(0)


def test_the_calibration_error_is_guos():
    """Two bins, by hand: 0.85 confident and right in 1 of 2, 0.25 confident and never right."""
    confidences, right = [0.82, 0.88, 0.25], [True, False, False]
    assert evaluate.calibration_error(confidences, right) == pytest.approx((2 * abs(0.85 - 0.5) + 0.25) / 3)
    assert evaluate.calibration_error([1.0, 1.0], [True, True]) == 0


def test_the_comparison_is_mcnemars_exact_test():
    """Against scipy's binomtest(1, 11, 0.5) = 0.01171875 and binomtest(3, 7, 0.5) = 1."""
    right_a = [True] * 10 + [False] * 1 + [True] * 20
    right_b = [False] * 10 + [True] * 1 + [True] * 20
    assert evaluate.mcnemar(right_a, right_b) == {"only_a": 10, "only_b": 1, "p": pytest.approx(0.01171875)}
    assert evaluate.mcnemar([True] * 3 + [False] * 4, [False] * 3 + [True] * 4)["p"] == 1
    assert evaluate.mcnemar([True], [True])["p"] == 1


def test_the_place_of_an_option_is_found_in_its_prompt():
    tokenizer = make_tokenizer()
    prompt = tokenizer("Which?\n- Iron deficiency\n- Iron\n- 贫血 (a)\n- None\n\n### Answer:\n").input_ids
    options = [[*tokenizer(text, add_special_tokens=False).input_ids, 2]
               for text in ("贫血 (a)", "Iron deficiency", "Iron", "None")]  # fmt: skip
    question = {"input_ids": prompt + options[0], "options": options}
    assert evaluate.read_options(question, tokenizer, {"option": "- {text}", "answer": "text"})[1] == [2, 0, 1, 3]
    options = [[*tokenizer(letter, add_special_tokens=False).input_ids, 2] for letter in "CABD"]
    question = {"input_ids": prompt + options[0], "options": options}
    assert evaluate.read_options(question, tokenizer, {"answer": "letter"})[1] == [2, 0, 1, 3]


def test_figures_of_a_small_set_by_hand(tiny_model):
    """Sums, length-normalised sums, confusion and baselines, from scores computed one option at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attn_implementation="sdpa").eval()
    tokenizer = make_tokenizer()
    questions = []
    for right in (0, 1, 1, 3, 2, 1):
        texts = [f"{'word ' * (i + 1)}{right}{i}" for i in range(4)]
        prompt = tokenizer("Which?\n" + "\n".join(f"- {text}" for text in texts) + "\n\n### Answer:\n").input_ids
        options = [[*tokenizer(text, add_special_tokens=False).input_ids, 2] for text in texts]
        options.insert(0, options.pop(right))
        questions.append({"input_ids": prompt + options[0], "options": options})
    result = evaluate.evaluate_choices(model, questions, tokenizer, {"option": "- {text}"}, 4)
    alone = score_one_by_one(model, questions)
    sums = [[sum(option[:-1]) for option in options] for options in alone]
    lengths = [[len(tokenizer.decode(ids[:-1])) for ids in question["options"]] for question in questions]
    norms = [[score / n for score, n in zip(*pair, strict=True)] for pair in zip(sums, lengths, strict=True)]
    assert result["accuracy"] == sum(scores.index(max(scores)) == 0 for scores in sums) / 6
    assert result["accuracy_norm"] == sum(scores.index(max(scores)) == 0 for scores in norms) / 6
    assert result["baseline_random"] == 0.25 and result["baseline_majority"] == 0.5
    assert {name: sum(row.values()) for name, row in result["confusion"].items()} == {"A": 1, "B": 3, "C": 1, "D": 1}
    assert [example["right"] for example in result["examples"]] == [s.index(max(s)) == 0 for s in sums]


def test_shots_stand_before_each_question_and_have_the_only_bos(tiny_set, tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"input_ids": [1, 10 + i, 11, 2], "labels": [-100, -100, 11, 2]} for i in range(5)]
    args = evaluate.Arguments(shots=3, shots_path=str(save_rows(rows, tmp_path / "shots")))
    shots = evaluate.draw_shots(args, tokenizer)
    assert len(shots) == 3 * 4 - 2 and shots.count(1) == 1 and shots[0] == 1
    assert evaluate.draw_shots(args, tokenizer) == shots  # drawn by --seed
    assert evaluate.join(shots, [1, 30, 31], tokenizer) == [*shots, 30, 31]
    assert evaluate.join([], [1, 30, 31], tokenizer) == [1, 30, 31]


@pytest.mark.parametrize("window", [8, 64])
def test_documents_have_each_token_scored_once(window, tiny_model):
    """Within one window: the plain loss of the model over the whole document. The bytes are those of the text."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    tokenizer = make_tokenizer()
    texts = ["贫血 is common. " * 2, "x", "Fever and cough"]
    rows = [{"input_ids": tokenizer(text).input_ids} for text in texts]
    num_targets = sum(len(row["input_ids"]) - 1 for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    data = evaluate.TestSet("text", rows, tokenizer, {}, [])
    result = evaluate.evaluate_targets(model, data, evaluate.Arguments(window=window))
    assert result["num_targets"] == num_targets
    if window == 64:
        assert result["loss"] == pytest.approx(total / num_targets, rel=1e-6)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert result["bits_per_byte"] == pytest.approx(total / 0.6931471805599453 / num_bytes, rel=1e-6)
    for row in rows:
        windows = evaluate.cut_document(row["input_ids"], window)
        scored = [id for cut in windows for id in cut["labels"].tolist() if id != -100]
        assert scored == row["input_ids"][1:]


@torch.no_grad()
def sum_over_targets(model, rows: list[dict]) -> tuple[float, int, int]:
    """A plain forward for each row: summed loss, targets that are the likeliest token, targets."""
    total, right, num = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        for position, label in enumerate(row["labels"]):
            if position and label != -100:
                total -= logits[position - 1].log_softmax(-1)[label].item()
                right += int(logits[position - 1].argmax()) == label
                num += 1
    return total, right, num


@pytest.mark.parametrize("mode", ["base", "prompt"])
def test_instructions_have_the_loss_and_accuracy_of_a_plain_forward(mode, tiny_model):
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    if mode == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, config).eval().double()
    rows = [{name: list(ids) for name, ids in row.items()} for row in random_rows(7)]
    total, right, num = sum_over_targets(model, rows)
    data = evaluate.TestSet("instruction", rows, make_tokenizer(), {}, [])
    result = evaluate.evaluate_targets(model, data, evaluate.Arguments(per_device_eval_batch_size=3))
    assert result["loss"] == pytest.approx(total / num, rel=1e-6)
    assert result["token_accuracy"] == right / num and result["num_targets"] == num


def test_from_raw_questions_to_a_score(tmp_path):
    """The loss is the training scripts' evaluation loss; the accuracy counts what a plain argmax counts."""
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


def test_every_checkpoint_and_a_comparison(tiny_model, tmp_path, monkeypatch, capsys):
    """In one process: adapters as checkpoints, evaluation.json in the run's folder, then the run against its base."""
    import peft

    lines = (ROOT / "data_sample" / "triage_test.jsonl").read_text().splitlines()[:6]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    run_script("data_sample/tokenize_dataset.py", "--input", tmp_path / "few.jsonl", "--tokenizer_path", tiny_model,
               "--output", tmp_path / "set")  # fmt: skip
    run_folder = tmp_path / "run"
    for step in (5, 10):
        torch.manual_seed(step)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = peft.get_peft_model(base, config)
        model.save_pretrained(run_folder / f"checkpoint-{step}", save_embedding_layers=False)
    model.save_pretrained(run_folder, save_embedding_layers=False)
    (run_folder / "checkpoint-15").mkdir()  # interrupted
    (run_folder / "run.json").write_text("{}")

    def run(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset_path", str(tmp_path / "set"), *map(str, flags)])
        evaluate.main()
        return capsys.readouterr().out

    run("--peft_path", run_folder)
    last = json.loads((run_folder / "evaluation.json").read_text())
    assert len(last["examples"]) == 6
    assert "| 6 |" in (run_folder / "evaluation.md").read_text()
    run("--peft_path", run_folder, "--all_checkpoints", "True", "--output", tmp_path / "all.json")
    results = json.loads((tmp_path / "all.json").read_text())["checkpoints"]
    assert [result["step"] for result in results] == [5, 10]
    assert results[1]["examples"] == last["examples"] != results[0]["examples"]
    assert len((tmp_path / "all.md").read_text().splitlines()) == 4
    assert (tmp_path / "all.png").is_file() == (importlib.util.find_spec("matplotlib") is not None)
    printed = run("--compare", run_folder / "evaluation.json", tiny_model, "--output", tmp_path / "compared.json")
    assert "exact McNemar p = " in printed
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared["a"]["examples"] == last["examples"] and 0 < compared["mcnemar"]["p"] <= 1
    (tmp_path / "other.json").write_text(json.dumps(last | {"dataset_input_sha256": "another"}))
    with pytest.raises(SystemExit) as stopped:
        run("--compare", run_folder / "evaluation.json", tmp_path / "other.json")
    assert "other questions" in str(stopped.value.code)


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
WIDE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Rows are longer than the window of all that have one. The last ones know no position_ids, hand states on, or attend
# to chunks.
FAMILIES = {
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": 8},
    "starcoder2": WIDE | {"sliding_window": 8},
    "qwen2": WIDE | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": WIDE | {"sliding_window": 8, "query_pre_attn_scalar": 8},  # soft caps, and no sdpa
    "gemma3_text": WIDE | {"sliding_window": 8},
    "cohere2": WIDE | {"sliding_window": 8},
    "phi3": WIDE | {"sliding_window": 8},
    "qwen3": WIDE,
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "mixtral": WIDE | EXPERTS,
    "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "gptj": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "initializer_range": 0.2},
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "init_std": 0.2},
    "mamba": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
    "llama4_text": WIDE | {"attention_chunk_size": 8, "intermediate_size_mlp": 64, "num_local_experts": 2},
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
}


def make_model(family: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            parameter.data.normal_(std=0.1)  # biases begin as zeros
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored_as_by_plain_forwards_whatever_the_batch_size(family):
    """Multiple choice and instructions. The model sees what it sees alone: its windows, its soft caps, its states."""
    model = make_model(family)
    questions = random_questions(5)
    assert max(map(evaluate.num_tokens_of, questions)) > 16
    alone = score_one_by_one(model, questions)
    for batch_size in (1, 3, 5):
        scores = evaluate.score_questions(model, questions, batch_size)
        for found, expected in zip(scores, alone, strict=True):
            for option, log_probs in zip(found, expected, strict=True):
                assert option == pytest.approx(log_probs, rel=1e-4, abs=1e-5)
    rows = [{name: list(ids) for name, ids in row.items()} for row in random_rows(7)]
    total, _, num = sum_over_targets(model, rows)
    data = evaluate.TestSet("instruction", rows, make_tokenizer(), {}, [])
    for batch_size in (1, 3, 7):
        result = evaluate.evaluate_targets(model, data, evaluate.Arguments(per_device_eval_batch_size=batch_size))
        assert result["loss"] == pytest.approx(total / num, rel=1e-5)


def test_packed_rows_are_refused_where_documents_would_see_each_other(tiny_model, tmp_path, monkeypatch):
    """A model without positions of its own, and an adapter whose virtual tokens stand before one document."""
    rows = []
    for row in random_rows(4):
        half = len(row["input_ids"]) // 2
        positions = [*range(half), *range(len(row["input_ids"]) - half)]
        rows.append(row | {"position_ids": positions})
    data = save_rows(rows, tmp_path / "set")
    make_model("bloom").save_pretrained(tmp_path / "bloom")
    make_tokenizer().save_pretrained(tmp_path / "bloom")
    message = stop_message(monkeypatch, "--model_path", tmp_path / "bloom", "--dataset_path", data)
    assert f"error: --dataset_path {data}: its rows hold several documents, and" in message
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    message = stop_message(monkeypatch, "--peft_path", tmp_path / "adapter", "--dataset_path", data)
    assert f"error: --dataset_path {data}: its rows hold several documents, and this adapter" in message


def stop_message(monkeypatch, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    return str(stopped.value.code)


def test_an_adapter_that_does_not_fit_is_refused_by_both_names(tiny_model, tiny_set, tmp_path, monkeypatch):
    import peft

    other = save_tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config | {"hidden_size": 64, "head_dim": 8}))
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    flags = ["--model_path", tiny_model, "--peft_path", tmp_path / "adapter", "--dataset_path", tiny_set]
    message = stop_message(monkeypatch, *flags)
    assert f"--peft_path {tmp_path / 'adapter'}: its tensor base_model.model.model.layers." in message
    assert f"and --model_path {tiny_model} needs [" in message
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "adapter_model.safetensors is cut off" in stop_message(monkeypatch, *flags)


def test_a_tokenizer_that_is_not_that_of_the_set_is_refused(tiny_model, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    fingerprint = fingerprint_tokenizer(tokenizer)
    fingerprint["texts"][0][1] = [7]
    folder = save_rows(random_rows(2), tmp_path / "set", {"tokenizer_fingerprint": fingerprint})
    message = stop_message(monkeypatch, "--model_path", tiny_model, "--dataset_path", folder)
    assert f"--dataset_path {folder}: it was made with a tokenizer that behaves otherwise" in message
    assert "'Hello world' is [7] there and [" in message


def test_the_parts_of_a_set_are_scored_as_one(tiny_model, tmp_path):
    rows = random_rows(6)
    save_rows(rows, tmp_path / "whole")
    for number in (1, 2):
        save_rows(rows[3 * number - 3 : 3 * number], tmp_path / f"out-{number}-of-2")
    for name in ("whole", "out"):
        args = evaluate.Arguments(model_path=str(tiny_model), dataset_path=str(tmp_path / name), use_cpu=True)
        (run,) = evaluate.check_arguments(args)
        assert list(run.data.rows) == rows


def test_mistakes_are_reported_together(tmp_path, monkeypatch):
    flags = ["--model_path", "models/none", "--peft_path", tmp_path, "--per_device_eval_batch_size", 0]
    message = stop_message(monkeypatch, *flags, "--dataset_path", tmp_path / "none")
    for part in ("--model_path models/none", "--peft_path", "--per_device_eval_batch_size 0", "--dataset_path"):
        assert part in message


def test_the_flag_that_is_to_blame_is_named(tiny_model, tiny_set, tmp_path, monkeypatch):
    """Each alone, with all others right."""
    right = {"--model_path": tiny_model, "--dataset_path": tiny_set}
    long_rows = save_rows(random_rows(3, shortest=300, longest=310), tmp_path / "long")
    cases = {
        "--model_path somebody/llama": {"--model_path": "somebody/llama"},
        "--dataset_path nowhere: no such folder": {"--dataset_path": "nowhere"},
        f"--dataset_path {long_rows}: a row has 3": {"--dataset_path": long_rows},
        "--shots 2: needs questions with options": {"--shots": 2},
        "--all_checkpoints True:": {"--all_checkpoints": "True"},
        "--compare nowhere: no such folder or file": {"--compare": "nowhere"},
        f"--dataset_path {tiny_set}: --compare needs questions": {"--compare": tiny_model},
    }
    for expected, changed in cases.items():
        flags = []
        for name, value in (right | changed).items():
            flags += [name, value]
        if "--compare" in changed:
            flags.append(tiny_model)
        message = stop_message(monkeypatch, *flags)
        assert message.startswith(f"error: {expected}"), message


@pytest.mark.parametrize("of_checkpoints", [False, True])
def test_the_result_on_another_set_is_kept_beside(of_checkpoints, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    former = {"dataset_path": "sets/kf val", "loss": 1}
    if of_checkpoints:
        former = {"checkpoints": [former]}
    output.write_text(json.dumps(former))
    output.with_suffix(".md").write_text("table")
    evaluate.keep_result_of_another_set(output, "sets/kf val")
    assert output.is_file()  # the same set again takes its place
    evaluate.keep_result_of_another_set(output, "sets/triage")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.kf_val.json", "evaluation.kf_val.md"]
    assert json.loads((tmp_path / "evaluation.kf_val.json").read_text()) == former
    assert "is now" in capsys.readouterr().out


def test_a_damaged_result_is_overwritten(tmp_path):
    output = tmp_path / "evaluation.json"
    for text in ("", "[]", '{"checkpoints": []}'):
        output.write_text(text)
        evaluate.keep_result_of_another_set(output, "sets/triage")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
