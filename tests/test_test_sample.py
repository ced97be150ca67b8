"""test_sample.py: the prompt of training without the answer, the same tokens in any batch, no silent base model."""

import csv
import importlib.util
import io
import json
import os
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer, run_script, save_tiny_model
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import test_sample
from data_sample import rendering

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


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "红眼?"},
        {"role": "assistant", "content": "Ophthalmology"},
        {"role": "user", "content": "And a cough?"},
        {"role": "assistant", "content": "Pulmonology"},
    ]
}
SHAREGPT = {"system": "Be brief.", "conversations": [{"from": "human", "value": "Red eye?"},
                                                     {"from": "gpt", "value": "Ophthalmology"}]}  # fmt: skip
WITH_HISTORY = {"instruction": "And a cough?", "output": "Pulmonology", "system": "Be brief.",
                "history": [["Red eye?", "Ophthalmology"]]}  # fmt: skip
ROWS = {
    "mcq": QUESTIONS,
    "alpaca": [*json.loads((ROOT / "data_sample" / "instruct_zh_en.json").read_text())[:9], WITH_HISTORY],
    "chat": [CONVERSATION, SHAREGPT],
    "text": [{"text": "<s> in a page of HTML. 你好"}],
}


def tokenize(rows: list[dict], format: str, tokenizer, folder, monkeypatch):
    """The set that tokenize_dataset.py makes of some rows."""
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--format", format, "--input", folder / "rows.jsonl", "--tokenizer_path", folder / "tokenizer"]
    flags += ["--output", folder / "set", "--max_length", 100_000]
    monkeypatch.setattr(sys, "argv", ["tokenize_dataset.py", *map(str, flags)])
    tokenize_dataset.main()
    return load_from_disk(folder / "set")


@pytest.mark.parametrize("with_bos", [True, False, "in the template"])
@pytest.mark.parametrize(
    ("format", "chat"),
    [(format, chat) for format in ROWS for chat in (False, True) if (format, chat) != ("chat", False)],
)
def test_the_prompt_has_the_ids_of_training_and_not_the_answer(chat, format, with_bos, tmp_path, monkeypatch):
    """Compared with the very rows that tokenize_dataset.py writes. BOS once, whoever may write it."""
    tokenizer = make_tokenizer(with_bos is not False)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
        if with_bos == "in the template":
            tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    trained = tokenize(ROWS[format], format, tokenizer, tmp_path, monkeypatch)
    template = json.loads((tmp_path / "set" / "ledger.json").read_text())["template"]
    for number, row in enumerate(ROWS[format]):
        messages = rendering.messages_before_answer(row, template)
        ids = rendering.encode_prompt(tokenizer, messages, template)
        training_ids = trained["input_ids"][number]
        if format == "text":
            assert ids == [id for id in training_ids if id != tokenizer.eos_token_id]
            continue
        assert ids == training_ids[: len(ids)]
        labels = trained["labels"][number]
        target_ids = [id for id in labels[len(ids) :] if id != -100]
        answer = rendering.expected_answer(row, template)
        assert tokenizer.decode(target_ids).removesuffix("</s>").strip() == answer
        assert labels[len(ids) - 1] == -100 and labels[len(ids)] != -100
        assert ids.count(tokenizer.bos_token_id) == int(with_bos is not False)


def test_the_label_does_not_change_the_prompt():
    template = rendering.make_template("mcq", False)
    rows = [QUESTIONS[0] | {"label": label} for label in range(4)]
    assert len({str(rendering.messages_before_answer(row, template)) for row in rows}) == 1


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


def test_an_answer_ends_where_the_context_is_full_whatever_the_batch(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = 299  # which random weights hardly ever choose
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [[1] + [7] * 249, [1, 8, 9]]
    together = test_sample.generate(model, tokenizer, prompts, 20)
    assert [len(ids) for ids in together] == [6, 20]
    assert together == [test_sample.generate(model, tokenizer, [ids], 20)[0] for ids in prompts]


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
    template = rendering.make_template("mcq", False)
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


def test_mistakes_are_reported_together(workplace, monkeypatch):
    (workplace / "empty.jsonl").write_text("")
    (workplace / "other.jsonl").write_text('{"sent1": "no options"}\n')
    save_tiny_model(workplace / "models" / "tiny")
    message = stop_message(
        monkeypatch, "--model_path", "models/none", "--num_samples", 0, "--test_path", "nowhere.jsonl"
    )
    for part in ("--model_path models/none", "--num_samples 0", "--test_path nowhere.jsonl"):
        assert part in message
    folder = stop_message(monkeypatch, "--model_path", "models/tiny", "--test_path", "models")
    assert "--test_path models: it is a folder; name the file with the rows, or score a tokenized set by" in folder
    assert "no rows" in stop_message(monkeypatch, "--model_path", "models/tiny", "--test_path", "empty.jsonl")
    message = stop_message(monkeypatch, "--model_path", "models/tiny", "--test_path", "other.jsonl")
    assert "--test_path other.jsonl: row 1: field sent2 is missing" in message
    assert "no template" in stop_message(monkeypatch, "--model_path", "models/tiny", "--template_path", "empty.jsonl")
    assert "--nonsense" in stop_message(monkeypatch, "--nonsense", 1)


def save_adapter(mode: str, model_path, folder, seed: int = 0):
    """An adapter of random weights with its tokenizer, as a run leaves it."""
    import peft

    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    config = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "ptuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual),
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
    }[mode]()
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def run_main(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["test_sample.py", *map(str, flags)])
    test_sample.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_adapters_answer_the_same_in_any_batch_size(mode, tiny_model, tmp_path):
    model = save_adapter(mode, tiny_model, tmp_path / "adapter")
    tokenizer = make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (4, 9, 4, 6, 9, 4)]
    answers = []
    for size in (1, 4):
        args = test_sample.Arguments(per_device_eval_batch_size=size, max_new_tokens=12)
        answers.append([ids for window in test_sample.generate_all(args, model, tokenizer, prompts) for ids in window])
    assert answers[0] == answers[1]
    sizes = [len(batch) for batch in test_sample.make_batches([4, 9, 4, 6, 9, 4], 2, True)]
    assert sizes == [2, 1, 2, 1]  # nothing is padded


def test_a_file_of_answers_is_in_order_and_goes_on_after_a_kill(workplace, monkeypatch, capsys):
    """Cut within a line and within a window: the resumed file is byte for byte the uninterrupted one, drawn or not."""
    monkeypatch.setattr(test_sample, "WINDOW_BATCHES", 1)
    save_tiny_model(workplace / "models" / "tiny")
    flags = ["--model_path", "models/tiny", "--num_samples", 11, "--per_device_eval_batch_size", 3]
    flags += ["--max_new_tokens", 6, "--output", "out/answers.jsonl"]
    for sampling in ([], ["--do_sample", "True", "--temperature", 1.5, "--top_k", 50]):
        run_main(monkeypatch, capsys, *flags, *sampling)
        whole = (workplace / "out" / "answers.jsonl").read_bytes()
        rows = [json.loads(line) for line in whole.splitlines()]
        assert [row["index"] for row in rows] == list(range(11))
        assert rows[3]["expected"] == QUESTIONS[3][f"ending{QUESTIONS[3]['label']}"]
        assert all(QUESTIONS[i]["sent1"] in rows[i]["prompt"] for i in range(6))
        assert "it exists" in stop_message(monkeypatch, *flags, *sampling)
        for kept in (len(whole) * 5 // 8, len(whole), 0):
            (workplace / "out" / "answers.jsonl").write_bytes(whole[:kept])
            run_main(monkeypatch, capsys, *flags, *sampling, "--resume", "True")
            assert (workplace / "out" / "answers.jsonl").read_bytes() == whole
        message = stop_message(monkeypatch, *flags, *sampling, "--resume", "True", "--max_new_tokens", 7)
        assert "other flags" in message
        (workplace / "out" / "answers.jsonl").unlink()


def test_a_prompt_stdin_and_two_models_side_by_side(workplace, monkeypatch, capsys, tmp_path):
    save_tiny_model(workplace / "models" / "tiny")
    save_adapter("lora", workplace / "models" / "tiny", workplace / "adapter")
    flags = ["--peft_path", "adapter", "--max_new_tokens", 8]
    printed = run_main(monkeypatch, capsys, *flags, "--prompt", "Red eye?")
    assert "--- 1\nRed eye?" in printed and "expected: not given" in printed
    monkeypatch.setattr(sys, "stdin", io.StringIO("Red eye?"))
    assert run_main(monkeypatch, capsys, *flags, "--prompt", "-") == printed
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in QUESTIONS[:2])))
    printed = run_main(monkeypatch, capsys, *flags, "--test_path", "-", "--compare", "models/tiny")
    alone = run_main(monkeypatch, capsys, "--model_path", "models/tiny", "--max_new_tokens", 8, "--num_samples", 2)
    answers = [part.split("\nexpected:")[0] for part in alone.split("answer:   ")[1:]]
    assert len(answers) == 2
    for answer in answers:
        assert f"models/tiny: {answer}\nanswer:" in printed
        assert f"answer:   {answer}\n" not in printed  # the adapter changes it


def test_the_rows_of_a_csv_file_are_asked_as_those_of_jsonl(workplace, monkeypatch, capsys):
    save_tiny_model(workplace / "models" / "tiny")
    rows = [{name: value for name, value in row.items() if name != "label"} for row in QUESTIONS[:2]]
    (workplace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(workplace / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--model_path", "models/tiny", "--max_new_tokens", 4]
    asked = [run_main(monkeypatch, capsys, *flags, "--test_path", name) for name in ("rows.csv", "rows.jsonl")]
    assert asked[0] == asked[1] and "--- 2\n" in asked[0]


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_an_adapter_that_does_not_fit_is_refused_by_both_names(mode, workplace, monkeypatch, capsys):
    """Another size, another vocabulary, a truncated file, a pickle: one message each, before weights are loaded."""
    tiny = save_tiny_model(workplace / "models" / "tiny")
    save_adapter(mode, tiny, workplace / "adapter")
    assert "adapter adapter" in run_main(monkeypatch, capsys, "--peft_path", "adapter", "--num_samples", 1,
                                         "--max_new_tokens", 2)  # fmt: skip
    other = save_tiny_model(workplace / "models" / "other")
    config = json.loads((other / "config.json").read_text())
    wider = LlamaConfig(**config | {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 8})
    LlamaForCausalLM(wider).save_pretrained(other)
    message = stop_message(monkeypatch, "--peft_path", "adapter", "--model_path", "models/other")
    assert "--peft_path adapter: its tensor " in message and "and --model_path models/other needs [" in message
    assert str(tiny) in message
    other = save_tiny_model(workplace / "models" / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = stop_message(monkeypatch, "--peft_path", "adapter", "--model_path", "models/other")
    assert "its vocabulary is not that of --model_path models/other" in message and str(tiny) in message

    file = workplace / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "adapter_model.safetensors is cut off" in stop_message(monkeypatch, "--peft_path", "adapter")
    file.rename(file.with_name("adapter_model.bin"))
    message = stop_message(monkeypatch, "--peft_path", "adapter")
    assert "only safetensors are read here; convert it: python -c" in message


def test_the_conversation_is_another_program_and_its_command_is_named(workplace, monkeypatch):
    message = stop_message(monkeypatch, "--peft_path", "outputs/mine", "--chat", "True")
    assert "python tools/chat.py --peft_path outputs/mine" in message.splitlines()[0]


def test_an_adapter_that_was_never_trained_is_said_so(workplace, monkeypatch, capsys):
    import peft

    tiny = save_tiny_model(workplace / "models" / "tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(workplace / "adapter")
    monkeypatch.setattr(sys, "argv", ["x", "--peft_path", "adapter", "--num_samples", "1", "--max_new_tokens", "1"])
    test_sample.main()
    assert "was never trained: all its B matrices are zero" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_an_error(workplace, monkeypatch):
    save_tiny_model(workplace / "models" / "tiny")
    message = stop_message(monkeypatch, "--model_path", "models/tiny", "--prompt", "a b " * 200)
    assert "--prompt" in message and "leaves no room for an answer: the model can attend to 256" in message
    assert "without --do_sample True" in stop_message(monkeypatch, "--model_path", "models/tiny", "--top_p", 0.5)


def test_a_mix_with_several_templates_asks_which(workplace, monkeypatch):
    save_tiny_model(workplace / "models" / "tiny")
    template = {"format": "mcq", "chat": False, "prompt": "{question}"}
    templates = {f"set{i}": {"template": template | {"option": f"{i}. {{text}}"}} for i in range(2)}
    receipt = {"dataset": {"mix": {}, "sets": templates}}
    (workplace / "models" / "tiny" / "run.json").write_text(json.dumps(receipt))
    assert "ledger.json of one of set0, set1" in stop_message(monkeypatch, "--model_path", "models/tiny")


def run_of(workplace, template: dict):
    """A model of a run, whose set was made with its tokenizer. Returns the model's folder and the tokenizer."""
    folder = save_tiny_model(workplace / "models" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ledger = {"template": template, "tokenizer_fingerprint": rendering.fingerprint_tokenizer(tokenizer)}
    (workplace / "ledger.json").write_text(json.dumps(ledger))
    (folder / "run.json").write_text(json.dumps({"dataset": ledger}))
    return folder, tokenizer


@pytest.mark.parametrize("format", ["alpaca", "preference", "chat"])
def test_the_sample_s_questions_are_not_asked_of_a_model_of_another_kind(format, workplace, monkeypatch):
    """Without flags the newest run answers, and it may have been trained on other rows."""
    run_of(workplace, {"format": format, "chat": False, "prompt": "{instruction}", "prompt_with_input": "{input}"})
    message = stop_message(monkeypatch, "--model_path", workplace / "models" / "tiny")
    assert f"this model was trained on --format {format}; name rows of that form, or ask by --prompt" in message


def prompts_of(*flags) -> list[list[int]]:
    (args,) = test_sample.HfArgumentParser(test_sample.Arguments).parse_args_into_dataclasses(list(map(str, flags)))
    return test_sample.check_arguments(args).prompts


def test_a_tokenizer_that_is_not_that_of_the_training_is_refused(workplace, monkeypatch):
    """Same vocabulary, another chat template: the model would be asked in words that it never saw."""
    folder, tokenizer = run_of(workplace, {"format": "chat", "chat": True})
    rows = workplace / "rows.jsonl"
    rows.write_text('{"prompt": "Hi"}\n')
    flags = ["--model_path", folder, "--test_path", rows]
    assert tokenizer.decode(prompts_of(*flags)[0]) == "<s><|user|>\nHi</s>\n<|assistant|>\n"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant", "helper")
    tokenizer.save_pretrained(folder)
    message = stop_message(monkeypatch, *flags)
    assert "the tokenizer is not the one of the training: its chat template is another one" in message
    # With a template that the user names, another tokenizer is no mistake.
    prompts = prompts_of(*flags, "--template_path", workplace / "ledger.json")
    assert tokenizer.decode(prompts[0]).endswith("<|helper|>\n")


def test_the_date_and_the_tools_of_the_training_are_served(workplace):
    template = "{{ strftime_now('%d %b %Y') }}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    folder, tokenizer = run_of(workplace, {"format": "chat", "chat": True, "date": "2031-12-24"})
    tokenizer.chat_template = template + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ledger = {"template": {"format": "chat", "chat": True, "date": "2031-12-24"}}
    (folder / "run.json").write_text(json.dumps({"dataset": ledger}))
    row = {"messages": CONVERSATION["messages"][1:], "tools": [{"name": "look_up", "parameters": {}}]}
    (workplace / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = prompts_of("--model_path", folder, "--test_path", workplace / "rows.jsonl")
    assert tokenizer.decode(prompt).startswith("<s>24 Dec 2031look_up<|user|>\n")


OTHER_MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("prefix", "ptuning", "prompt")]


@pytest.mark.parametrize("mode", ["lora", *OTHER_MODES])
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


@pytest.mark.slow
def test_an_adapter_on_a_4_bit_base_answers_as_it_was_trained(tmp_path, monkeypatch, capsys):
    """run.json says that the base was in 4 bit: then it is here, too, and its answers are not those of 32 bit."""
    pytest.importorskip("bitsandbytes")
    tiny = save_tiny_model(tmp_path / "model", num_layers=2)
    save_adapter("lora", tiny, tmp_path / "adapter")
    template = rendering.make_template("mcq", False)
    receipt = {"arguments": {"load_in_4bit": True}, "dataset": {"template": template}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(receipt))
    flags = ["--peft_path", tmp_path / "adapter", "--num_samples", 4, "--max_new_tokens", 12]
    flags += ["--test_path", ROOT / "data_sample" / "triage_test.jsonl"]
    answers = [run_main(monkeypatch, capsys, *flags, "--load_in_4bit", choice).partition("--- 1")[2]
               for choice in ("auto", "True", "False")]  # fmt: skip
    assert answers[0] == answers[1] != answers[2]
