"""test_sample.py: the prompt of training without the answer, the same tokens in any batch, no silent base model."""

import importlib
import importlib.util
import json
import os
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer, run_script, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import test_sample

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QUESTIONS = [json.loads(line) for line in (ROOT / "data_sample" / "triage_test.jsonl").read_text().splitlines()[:6]]


def load_program(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


tokenize_dataset = load_program(ROOT / "data_sample" / "tokenize_dataset.py")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("format", ["mcq", "alpaca"])
def test_the_prompt_has_the_ids_of_training_and_not_the_answer(chat, format, tmp_path):
    """With BOS once, though the tokenizer, the template or nobody may write it."""
    rows = QUESTIONS if format == "mcq" else json.loads((ROOT / "data_sample" / "instruct_zh_en.json").read_text())[:9]
    for with_bos, template_text in ((True, CHAT_TEMPLATE), (False, CHAT_TEMPLATE), (True, "<s>" + CHAT_TEMPLATE)):
        tokenizer = make_tokenizer(with_bos)
        tokenizer.chat_template = template_text if chat else None
        args = tokenize_dataset.Arguments(format=format)
        template = tokenize_dataset.make_template(args, chat)
        for row in rows:
            answer = tokenize_dataset.render_answers(row, template)[0]
            rendered = tokenize_dataset.render_prompt(row, template)
            texts = tokenize_dataset.apply_template(tokenizer, rendered, answer, chat)
            trained, _ = tokenize_dataset.encode(tokenizer, *texts, with_bos)
            ids = test_sample.encode_prompt(tokenizer, test_sample.render_prompt(row, template), chat)
            assert ids == trained
            assert ids.count(tokenizer.bos_token_id) == (1 if with_bos or (chat and "<s>" in template_text) else 0)
            if format == "alpaca":
                assert answer not in tokenizer.decode(ids)


def test_the_label_does_not_change_the_prompt():
    template = tokenize_dataset.make_template(tokenize_dataset.Arguments(), False)
    prompts = {test_sample.render_prompt(QUESTIONS[0] | {"label": label}, template) for label in range(4)}
    assert len(prompts) == 1


def test_the_same_tokens_in_any_batch_size(tmp_path):
    """Left padding with a LLaMA tokenizer that has no pad token; identical, or the two best logits are within 1e-4."""
    folder = save_tiny_model(tmp_path / "model", num_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id is None
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (3, 30, 11, 1, 19, 7)]
    alone = [test_sample.generate(model, tokenizer, [ids], 24)[0] for ids in prompts]
    for size in (2, 3, 6):
        together = []
        for start in range(0, len(prompts), size):
            together += test_sample.generate(model, tokenizer, prompts[start : start + size], 24)
        for prompt, expected, found in zip(prompts, alone, together, strict=True):
            if expected != found:
                same = os.path.commonprefix([expected, found])
                best = model(torch.tensor([prompt + same])).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4


def test_generation_stops_at_every_stop_token_of_the_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    free = test_sample.generate(model, tokenizer, [[5, 6, 7]], 16)[0]
    model.generation_config.eos_token_id = [2, free[4]]
    assert test_sample.generate(model, tokenizer, [[5, 6, 7]], 16)[0] == free[: free.index(free[4])]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty place with the sample questions, so that nothing below the real outputs/ is found."""
    (tmp_path / "data_sample" / "tokenized" / "triage_train").mkdir(parents=True)
    questions = (ROOT / "data_sample" / "triage_test.jsonl").read_text()
    (tmp_path / "data_sample" / "triage_test.jsonl").write_text(questions)
    template = tokenize_dataset.make_template(tokenize_dataset.Arguments(), False)
    ledger = {"template": template}
    (tmp_path / "data_sample" / "tokenized" / "triage_train" / "ledger.json").write_text(json.dumps(ledger))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_message(monkeypatch, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["test_sample.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        test_sample.main()
    return str(stopped.value.code)


def test_a_missing_adapter_is_an_error_and_never_a_base_model(workplace, monkeypatch):
    save_tiny_model(workplace / "models" / "SmolLM2-135M-Instruct")
    message = stop_message(monkeypatch)
    assert "no finished adapter below outputs/" in message and "python finetune_pp_peft.py" in message
    unfinished = workplace / "outputs" / "run"
    unfinished.mkdir(parents=True)
    (unfinished / "adapter_config.json").write_text("{}")  # no run.json: the run was interrupted
    assert "no finished adapter" in stop_message(monkeypatch)
    assert "no adapter_config.json" in stop_message(monkeypatch, "--peft_path", "outputs/none")


def test_the_adapter_that_finished_last_is_the_newest(workplace):
    for number, name in enumerate(("first", "last", "full", "interrupted")):
        folder = workplace / "outputs" / name
        folder.mkdir(parents=True)
        if name != "full":
            (folder / "adapter_config.json").write_text("{}")
        if name != "interrupted":
            (folder / "run.json").write_text("{}")
            os.utime(folder / "run.json", (1000 + number, 1000 + number))
    assert test_sample.find_newest_adapter() == "outputs/last"


def test_mistakes_are_reported_together(workplace, monkeypatch):
    (workplace / "empty.jsonl").write_text("")
    (workplace / "other.jsonl").write_text('{"sent1": "no options"}\n')
    save_tiny_model(workplace / "models" / "tiny")
    message = stop_message(
        monkeypatch, "--model_path", "models/none", "--num_samples", 0, "--test_path", "nowhere.jsonl"
    )
    for part in ("--model_path models/none", "--num_samples 0", "--test_path nowhere.jsonl"):
        assert part in message
    assert "no rows" in stop_message(monkeypatch, "--model_path", "models/tiny", "--test_path", "empty.jsonl")
    assert "lacks 'sent2'" in stop_message(monkeypatch, "--model_path", "models/tiny", "--test_path", "other.jsonl")
    assert "no template" in stop_message(monkeypatch, "--model_path", "models/tiny", "--template_path", "empty.jsonl")
    assert "--nonsense" in stop_message(monkeypatch, "--nonsense", 1)


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_the_newest_adapter_answers_with_the_template_of_its_run(mode, tmp_path):
    """From raw rows to an answer, every step a program that a user starts; the run's own template is used."""
    model = save_tiny_model(tmp_path / "model")
    rows = ROOT / "data_sample" / "triage_train.jsonl"
    (tmp_path / "few.jsonl").write_text("\n".join(rows.read_text().splitlines()[:8]))
    data = tmp_path / "set"
    run_script("data_sample/tokenize_dataset.py", "--input", tmp_path / "few.jsonl", "--tokenizer_path", model,
               "--output", data, "--answer", "letter")  # fmt: skip
    flags = ["--model_path", model, "--dataset_path", data, "--peft_mode", mode, "--max_steps", 1]
    run_script("finetune_pp_peft.py", *flags, "--output_dir", tmp_path / "out")
    completed = run_script(
        "test_sample.py", "--peft_path", tmp_path / "out", "--num_samples", 3, "--max_new_tokens", 4,
        "--per_device_eval_batch_size", 2,
    )  # fmt: skip
    assert f"model {model}, adapter {tmp_path / 'out'}" in completed.stdout
    assert completed.stdout.count("answer:") == 3
    assert f"A. {QUESTIONS[0]['ending0']}" in completed.stdout  # the letters of --answer letter, from run.json
