"""The converter back to Meta: every generation bit for bit, other numbers of shards, and what is refused."""

import json
import resource
import shutil

import pytest
import torch
from meta_checkpoints import (
    GENERATIONS,
    SCALED_ROPE,
    convert,
    convert_back,
    left_in,
    piece_of,
    report_of,
    same_checkpoint,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

pytest_plugins = ["meta_checkpoints"]


@pytest.mark.parametrize("name", GENERATIONS)
def test_there_and_back_is_the_same_bits(name, converted, tmp_path):
    """1, 2, 4 and 8 shards, with all that Hugging Face's format does not show: division, tables, a stored output."""
    meta, hf, _ = converted(name)
    convert_back("--input_dir", hf, "--output_dir", tmp_path / "back")
    same_checkpoint(meta, tmp_path / "back")
    assert report_of(tmp_path / "back")["verified"] is True


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_a_model_without_a_report_gets_the_shards_asked_for(num_shards, converted, tmp_path):
    """As after fine-tuning: only what transformers saved is there."""
    meta, hf, weights = converted("llama31_8b")
    model = AutoModelForCausalLM.from_pretrained(hf)
    model.save_pretrained(tmp_path / "tuned")
    shutil.copyfile(hf / "tokenizer.model", tmp_path / "tuned" / "tokenizer.model")
    convert_back("--input_dir", tmp_path / "tuned", "--output_dir", tmp_path / "m", "--num_shards", num_shards)
    shards = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "m").glob("*.pth"))]
    assert len(shards) == num_shards
    for i, shard in enumerate(shards):
        for key, weight in weights.items():
            assert torch.equal(shard[key], piece_of(key, weight, i, num_shards, True, 4)), key
    convert("--input_dir", tmp_path / "m", "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.parametrize("num_shards", [2, 8])
def test_another_number_of_shards_computes_the_same(num_shards, converted, tmp_path):
    """More shards than key/value heads: neighbours hold copies, as Meta stored its model of 405B for 16 processes."""
    meta, hf, weights = converted("llama2_7b" if num_shards == 2 else "llama2_70b")
    convert_back("--input_dir", hf, "--output_dir", tmp_path / "m", "--num_shards", num_shards)
    num_kv = 8 if num_shards == 2 else 4
    for i, path in enumerate(sorted((tmp_path / "m").glob("*.pth"))):
        shard = torch.load(path, weights_only=True)
        assert all(torch.equal(shard[k], piece_of(k, w, i, num_shards, False, num_kv)) for k, w in weights.items())


def test_only_the_files_that_transformers_would_load_are_read(converted, tmp_path, capsys):
    """A folder may hold other tensors with the same names, and has no tokenizer.model after fine-tuning."""
    meta, hf, weights = converted("llama1_13b")
    shutil.copytree(hf, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").unlink()
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "hf" / "trainable.safetensors")
    convert_back("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    shard = torch.load(tmp_path / "back" / "consolidated.01.pth", weights_only=True)
    assert torch.equal(shard["norm.weight"], weights["norm.weight"])
    assert "no tokenizer.model" in capsys.readouterr().out
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    flags = ("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "two")
    assert "merge the adapter" in convert_back(*flags, error=True)


def test_the_way_back_reads_several_files_and_damaged_ones_are_refused(converted, tmp_path):
    meta, _, _ = converted("llama1_13b")
    hf, flags = tmp_path / "hf", ("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    convert("--input_dir", meta, "--output_dir", hf, "--max_shard_size", "0.1MB")
    convert_back(*flags)
    same_checkpoint(meta, tmp_path / "back")
    shutil.rmtree(tmp_path / "back")
    for name, text in (
        ("conversion_report.json", "[]"),
        ("conversion_report.json", '{"meta": {"params": {"dim": 64}, "num_shards": "two"}}'),
        ("config.json", "{"),
        ("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'),  # code that must not run
        (
            "config.json",
            (hf / "config.json").read_text().replace('"num_attention_heads": 8', '"num_attention_heads": 0'),
        ),
        ("model.safetensors.index.json", "{}"),
        ("tokenizer.model", "no tokenizer"),
    ):
        former = (hf / name).read_bytes()
        (hf / name).write_text(text)
        message = convert_back(*flags, error=True)
        assert message.startswith("error: --input_dir ") and not (tmp_path / "back").exists(), message
        (hf / name).write_bytes(former)
    sorted(hf.glob("model-*.safetensors"))[1].unlink()
    assert "model-00002-of-" in convert_back(*flags, error=True)


def test_a_model_that_meta_cannot_express_is_refused(converted, tmp_path):
    meta, hf, _ = converted("llama31_8b")
    config = json.loads((hf / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 8192}
    wrong = [({"attention_bias": True}, "attention_bias"), ({"rope_parameters": yarn}, "rope_parameters")]
    wrong += [({"rope_parameters": SCALED_ROPE | {"low_freq_factor": 2.0}}, "rope_parameters")]
    wrong += [
        ({"head_dim": 8}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "mistral"),
    ]
    wrong += [
        ({"intermediate_size": 100}, "mlp.gate_proj"),
        ({"bos_token_id": 5}, "BOS 5"),
        ({"eos_token_id": 5}, "EOS 5"),
    ]
    wrong += [({"vocab_size": 700}, "embed_tokens")]
    for i, (change, found) in enumerate(wrong):
        folder = tmp_path / str(i)
        shutil.copytree(hf, folder)
        (folder / "config.json").write_text(json.dumps(config | change))
        message = convert_back("--input_dir", folder, "--output_dir", tmp_path / "out", error=True)
        assert message.startswith("error: --input_dir ") and found in message
        assert not (tmp_path / "out").exists()
    message = convert_back("--input_dir", hf, "--output_dir", tmp_path / "out", "--num_shards", 3, error=True)
    assert "3 shards do not divide" in message
    (tmp_path / "empty").mkdir()
    assert "config.json" in convert_back(
        "--input_dir", tmp_path / "empty", "--output_dir", tmp_path / "out", error=True
    )
    shutil.copytree(hf, tmp_path / "cut")
    data = (hf / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-100])
    assert "truncated" in convert_back("--input_dir", tmp_path / "cut", "--output_dir", tmp_path / "out", error=True)


def test_a_write_that_fails_leaves_nothing(tmp_path, converted):
    """The operating system refuses files above 100 kB, as it would on a full disk."""
    _, hf, _ = converted("llama1_7b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = convert_back("--input_dir", hf, "--output_dir", tmp_path / "deep" / "out", error=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith("error: ") and "nothing was written" in message
    assert left_in(tmp_path) == []


def test_all_mistakes_in_flags_are_named_at_once(tmp_path):
    flags = ("--input_dir", tmp_path / "no", "--output_dir", tmp_path / "out", "--dtype", "int8", "--num_shards", 0)
    message = convert_back(*flags, error=True)
    for name in ("input_dir", "dtype int8", "num_shards 0"):
        assert f"--{name}" in message
    assert left_in(tmp_path) == []


def test_a_report_of_the_former_converter_is_read(converted, tmp_path):
    """It knew one table of frequencies, under another name."""
    meta, hf, _ = converted("llama1_13b")
    shutil.copytree(hf, tmp_path / "hf")
    report = report_of(hf)
    (table,) = report["meta"].pop("rope_tables")
    report["meta"]["rope_freqs"] = {"dtype": table["dtype"], "values": table["values"]}
    (tmp_path / "hf" / "conversion_report.json").write_text(json.dumps(report))
    convert_back("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    same_checkpoint(meta, tmp_path / "back")
