"""tools/chat.py: the prompt of training with the conversation before it, and an error never ends the conversation."""

import functools
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

import test_sample
from tools import chat

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def run_main(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags)])
    chat.main()
    return capsys.readouterr().out


def save_model_with_template(folder, template: str):
    save_tiny_model(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_is_rendered_as_in_training(tmp_path, monkeypatch, capsys):
    """Commands, the history in the prompt, and a saved file that tokenize_dataset.py reads."""
    folder = save_tiny_model(tmp_path / "models" / "tiny")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    typed = ["/system Be brief.", "Red eye?", "/reset", "/save kept.jsonl", "Cough?", "And?", "/save kept.jsonl",
             "/nonsense", "x" * 400, "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    monkeypatch.chdir(tmp_path)
    printed = run_main(monkeypatch, capsys, "--model_path", "models/tiny", "--max_new_tokens", 8)
    assert "/reset begins anew" in printed and printed.count("/reset         forget") == 2
    first, last = [json.loads(line)["messages"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert first == [{"role": "system", "content": "Be brief."}]
    assert [message["role"] for message in last] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in last[1::2]] == ["Cough?", "And?"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(tokenizer.apply_chat_template(last[:4], tokenize=False, add_generation_prompt=True)).input_ids
    answer = tokenizer.decode(test_sample.generate(model, tokenizer, [ids], 8)[0], skip_special_tokens=True)
    assert last[4]["content"] == answer.rstrip("\ufffd") and answer.rstrip("\ufffd") in printed


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    command = [sys.executable, "tools/chat.py", "--model_path", folder, "--max_new_tokens", "8000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # Tests that run in the background ignore Ctrl-C, and so would what they start.
    answer_to_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=answer_to_ctrl_c, **pipes)
    process.stdin.write("endless\n")
    process.stdin.flush()
    while not process.stdout.readline().startswith("/quit"):
        assert process.poll() is None
    assert process.stdout.read(5)  # it answers
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(f"/save {tmp_path}/kept.jsonl\n")
    assert "[stopped]" in rest and "2 messages appended" in rest and process.returncode == 0
    (messages,) = [json.loads(line)["messages"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert messages[0] == {"role": "user", "content": "endless"} and messages[1]["content"]


# As Gemma's: no system message. And one that only fails inside, on the second answer.
REFUSING = {
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE: "System role not supported",
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + 1 }}{% endif %}" + CHAT_TEMPLATE: "can only",
}


@pytest.mark.parametrize(("template", "reason"), REFUSING.items())
def test_a_template_that_refuses_the_system_message_is_one_line_and_the_chat_goes_on(
    template, reason, tmp_path, monkeypatch, capsys
):
    folder = save_model_with_template(tmp_path / "model", template)
    monkeypatch.chdir(tmp_path)
    typed = ["Red eye?", "/system You are nice", "Cough?", "/save kept.jsonl"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    printed = run_main(monkeypatch, capsys, "--model_path", folder, "--max_new_tokens", 4)
    (line,) = [line for line in printed.splitlines() if "no system message" in line]
    assert reason in line
    kept = json.loads((tmp_path / "kept.jsonl").read_text())["messages"]
    assert [message["content"] for message in kept[::2]] == ["Red eye?", "Cough?"]  # nothing was forgotten

    monkeypatch.setattr(sys, "argv", ["chat.py", "--model_path", str(folder), "--system", "Be brief"])
    with pytest.raises(SystemExit) as stopped:
        chat.main()
    assert "--system Be brief: the template refuses it" in str(stopped.value.code) and reason in str(stopped.value.code)


def test_roles_that_must_alternate_are_one_line_and_the_chat_goes_on(tmp_path, monkeypatch, capsys):
    """A template that refuses the third message, as one for single questions does."""
    template = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + CHAT_TEMPLATE
    folder = save_model_with_template(tmp_path / "model", template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Red eye?\nCough?\n/reset\nFever?\n"))
    printed = run_main(monkeypatch, capsys, "--model_path", folder, "--max_new_tokens", 4)
    assert printed.count("no answer: the template refuses it: one question only; /reset begins anew") == 1


def test_mistakes_are_reported_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_path", "models/none", "--max_new_tokens", "0", "--top_p", "0.5", "--load_in_4bit", "maybe"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        chat.main()
    for part in ("--model_path models/none", "--max_new_tokens 0", "--top_p 0.5", "--load_in_4bit maybe: choose auto"):
        assert part in str(stopped.value.code)


def test_a_model_without_any_stop_id_answers(tmp_path, monkeypatch, capsys):
    folder = save_tiny_model(tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = None
        (folder / name).write_text(json.dumps(settings))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "")
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Red eye?\n"))
    run_main(monkeypatch, capsys, "--model_path", folder, "--max_new_tokens", 8)
