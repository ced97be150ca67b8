"""The converter to Hugging Face: every generation, both tokenizers, the proof and that it can fail, users' mistakes.

Checkpoints and tokenizers are made here in Meta's formats, and the logits are compared with a computation of the test's
own, on whole matrices in float64. Only a kill, docs/convert.md and the measurement start a process; the rest is main().
"""

import hashlib
import importlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import meta_checkpoints
import pytest
import sentencepiece
import torch
from conftest import ROOT, run_script
from meta_checkpoints import (
    CODE,
    EXPECTED,
    GENERATIONS,
    GQA,
    LLAMA1,
    LLAMA3,
    PLAIN_ROPE,
    SCALED,
    SCALED_ROPE,
    SMALL,
    SPLIT,
    SPM_SIZE,
    TIKTOKEN_SIZE,
    WIDE,
    convert,
    convert_back,
    encode_text,
    expected_logits,
    ffn_rows,
    left_in,
    make_meta,
    random_texts,
    read_ranks,
    report_of,
    to_meta,
    train_sentencepiece,
    write_ranks,
)
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convert_llama_weights_to_hf as converter

pytest_plugins = ["meta_checkpoints"]
SCRIPT = "convert_llama_weights_to_hf.py"


def add_infill_pieces(spm_file: Path, path: Path, kind: int) -> Path:
    """Code Llama's tokenizer has more pieces: four for filling in the middle, and those they are made of."""
    model, tokens = sentencepiece_model_pb2.ModelProto.FromString(spm_file.read_bytes()), "▁<PRE> ▁<SUF> ▁<MID> ▁<EOT>"
    known, lowest = {piece.piece for piece in model.pieces}, min(piece.score for piece in model.pieces)
    prefixes = [token[:i] for token in tokens.split() for i in range(2, len(token) + 1)]
    for i, name in enumerate(dict.fromkeys([*"<>PRESUFMIDOT", *prefixes])):
        if name not in known:
            model.pieces.add(piece=name, score=lowest - 1 - i, type=kind if name.endswith(">") and len(name) > 1 else 1)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_configuration_is_that_of_the_generation(name, converted):
    meta, hf, weights = converted(name)
    params = GENERATIONS[name][0]
    config, (context, rope, tied) = AutoConfig.from_pretrained(hf), EXPECTED[name]
    assert config.model_type == "llama" and config.architectures == ["LlamaForCausalLM"]
    assert config.max_position_embeddings == context
    assert config.rope_parameters == rope
    assert config.tie_word_embeddings is tied
    assert config.rms_norm_eps == params["norm_eps"]
    assert config.num_key_value_heads == params.get("n_kv_heads", params["n_heads"])
    assert config.intermediate_size == ffn_rows(params)
    assert config.vocab_size == len(weights["tok_embeddings.weight"])
    assert config.dtype == GENERATIONS[name][3].get("dtype", torch.bfloat16)


def params_of(dim: int, n_layers: int, n_heads: int, **others) -> dict:
    return {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "multiple_of": 256, "norm_eps": 1e-5, **others}


# What Meta's params.json state, the feed-forward size and number of parameters that are published, and the shards.
OLD, NEW = {"vocab_size": 32000}, {"vocab_size": 128256, "n_kv_heads": 8, "rope_theta": 500000.0}


PUBLISHED = {
    "LLaMA 7B": (params_of(4096, 32, 32, **OLD), 11008, 6738415616, 1),
    "LLaMA 13B": (params_of(5120, 40, 40, **OLD), 13824, 13015864320, 2),
    "LLaMA 30B": (params_of(6656, 60, 52, **OLD), 17920, 32528943616, 4),
    "LLaMA 65B": (params_of(8192, 80, 64, **OLD), 22016, 65285660672, 8),
    "Llama 2 70B": (
        params_of(8192, 80, 64, **OLD, n_kv_heads=8, ffn_dim_multiplier=1.3) | {"multiple_of": 4096},
        28672,
        68976648192,
        8,
    ),
    "Code Llama 34B": (params_of(8192, 48, 64, **OLD, n_kv_heads=8, ffn_dim_multiplier=1.0), 22016, 33743970304, 4),
    "Llama 3 8B": (
        params_of(4096, 32, 32, **NEW, ffn_dim_multiplier=1.3) | {"multiple_of": 1024},
        14336,
        8030261248,
        1,
    ),
    "Llama 3.1 70B": (
        params_of(8192, 80, 64, **NEW, ffn_dim_multiplier=1.3) | {"multiple_of": 4096},
        28672,
        70553706496,
        8,
    ),
    "Llama 3.1 405B": (
        params_of(16384, 126, 128, **NEW, ffn_dim_multiplier=1.2) | {"multiple_of": 4096},
        53248,
        405853388800,
        16,
    ),
    "Llama 3.2 1B": (params_of(2048, 16, 32, **NEW, ffn_dim_multiplier=1.5), 8192, 1235814400, 1),
    "Llama 3.2 3B": (params_of(3072, 28, 24, **NEW, ffn_dim_multiplier=1.0), 8192, 3212749824, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_are_those_of_the_published_model(name):
    """From params.json alone, and again from the params.json that is written for the way back."""
    params, intermediate_size, num_parameters, num_shards = PUBLISHED[name]
    tied = "3.2" in name
    config = converter.config_of_params(params, params["vocab_size"], tied, None)
    assert config.intermediate_size == intermediate_size
    weights = converter.list_weights(config, "Llama 3" in name, output_stored=not tied)
    converter.check_division(config, weights, num_shards, "")
    assert sum(math.prod(weight.shape) for weight in weights) == num_parameters
    again = converter.config_of_params(to_meta.params_of_config(config), config.vocab_size, tied, None)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_logits_are_those_of_the_papers(name, converted):
    """Near and far positions: with near ones only, the scaled frequencies would hardly show."""
    meta, hf, weights = converted(name)
    params = GENERATIONS[name][0]
    ids = [1, 5, 77, 300, SPM_SIZE - 1, 12, 90, 200, 201, 3]
    positions = [0, 1, 2, 3, 100, 101, 1000, 1500, 2000, 2047]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        # One row of known positions is one document only if transformers is told so by a mask.
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -1e30)
        found = model(torch.tensor([ids]), attention_mask=mask, position_ids=torch.tensor([positions])).logits[0]
    expected = expected_logits(weights, params, ids, EXPECTED[name][1].get("factor"), positions)
    assert (found - expected).abs().max() < 5e-4 * expected.abs().max()


def test_the_scaling_factor_shows_in_the_logits(converted):
    """Else the comparison above would prove nothing about it."""
    meta, hf, weights = converted("llama31_8b")
    params, positions = GENERATIONS["llama31_8b"][0], [0, 1, 2, 3, 100, 101, 1000, 1500, 2000, 2047]
    ids = [1, 5, 77, 300, SPM_SIZE - 1, 12, 90, 200, 201, 3]
    eight, other = (expected_logits(weights, params, ids, factor, positions) for factor in (8, 32))
    assert (eight - other).abs().max() > 5e-3 * eight.abs().max()


def test_the_scaling_factor_can_be_given(tmp_path, tiktoken_file):
    make_meta(tmp_path / "meta", tiktoken_file, SCALED)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--rope_scaling_factor", 16)
    assert AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters["factor"] == 16
    # Back and forth: Meta's own files do not state it, so ours does.
    convert_back("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    convert("--input_dir", tmp_path / "back", "--output_dir", tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").rope_parameters["factor"] == 16


def test_the_context_of_a_llama2_whose_params_state_the_epsilon_of_llama1(tmp_path, spm_file, capsys):
    """An early download of Llama 2 7B does (github.com/meta-llama/llama/issues/771): it works badly, so it is said."""
    make_meta(tmp_path / "meta", spm_file, LLAMA1)  # in bfloat16
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings == 4096
    assert "warning: params.json states norm_eps 1e-06" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama1_13b", "llama2_70b", "llama3_70b", "llama32_1b"])
def test_every_number_of_the_shards_is_in_the_files(name, converted):
    """Bit for bit, with the rows of q and k in the order that transformers documents: first halves of pairs first."""
    meta, hf, weights = converted(name)
    written, params = load_file(hf / "model.safetensors"), GENERATIONS[name][0]
    names = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj"}
    names |= {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    names |= {"feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    size, expected = params["dim"] // params["n_heads"], {}
    for key, weight in weights.items():
        if key.startswith("layers"):
            _, i, part = key.removesuffix(".weight").split(".", 2)
            if part in ("attention.wq", "attention.wk"):
                rows = [
                    h * size + r for h in range(len(weight) // size) for r in (*range(0, size, 2), *range(1, size, 2))
                ]
                weight = weight[rows]
            expected[f"model.layers.{i}.{names[part]}.weight"] = weight
    expected["model.embed_tokens.weight"], expected["model.norm.weight"] = (
        weights["tok_embeddings.weight"],
        weights["norm.weight"],
    )
    if not EXPECTED[name][2]:
        expected["lm_head.weight"] = weights["output.weight"]
    assert written.keys() == expected.keys()
    assert all(
        written[key].dtype == expected[key].dtype and torch.equal(written[key], expected[key]) for key in expected
    )


def test_shards_of_the_size_asked_for(tmp_path, spm_file):
    weights = make_meta(tmp_path / "meta", spm_file, SMALL)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--max_shard_size", "0.1MB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2 and {path.name for path in files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 0.1e6 + 5000 for path in files)
    assert index["metadata"]["total_size"] == sum(weight.numel() * 2 for weight in weights.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([[1, 2, 3]])).logits[0]
    assert torch.allclose(found.double(), expected_logits(weights, SMALL, [1, 2, 3], None), atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_asked_for(dtype, tmp_path, spm_file):
    weights = make_meta(tmp_path / "meta", spm_file, SMALL, 2, dtype=torch.float32)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--dtype", dtype)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{dtype}"}
    assert AutoConfig.from_pretrained(tmp_path / "hf").dtype == getattr(torch, dtype)
    assert torch.equal(written["lm_head.weight"], weights["output.weight"].to(getattr(torch, dtype)))


def test_a_value_that_the_dtype_cannot_hold_is_an_error(tmp_path, spm_file):
    make_meta(tmp_path / "meta", spm_file, SMALL)
    path = tmp_path / "meta" / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    shard["layers.1.feed_forward.w2.weight"][3, 5] = 1e6
    torch.save(shard, path)
    for verify in (True, False):
        message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--dtype", "float16",
                          "--verify", verify, error=True)  # fmt: skip
        assert "layers.1.feed_forward.w2.weight" in message and "--dtype" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["meta"]


# ------------------------------------------------------------------------------------------------------------------
# The proof can fail
# ------------------------------------------------------------------------------------------------------------------


def test_the_report_holds_what_was_compared(converted):
    meta, hf, weights = converted("llama3_70b")
    report, layers = report_of(hf), GENERATIONS["llama3_70b"][0]["n_layers"]
    proof = report["verification"]
    assert report["verified"] is True
    assert list(proof["max_difference"]) == [*(f"layer {i}" for i in range(layers)), "logits"]
    assert list(proof["relative_difference"]) == list(proof["max_difference"])
    assert all(0 <= value < 1e-4 for value in proof["relative_difference"].values())
    assert len(proof["prompt_ids"]) == len(proof["position_ids"]) == 32
    assert proof["tensors_with_equal_values"] == 9 * layers + 3
    for side, folder in (("inputs", meta), ("outputs", hf)):
        names = {path.name for path in folder.iterdir()} - {"conversion_report.json"}
        assert report["sha256"][side].keys() == names
        for name, digest in report["sha256"][side].items():
            assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert list(report["seconds"]) == ["writing", "tokenizer", "verifying", "hashing"]
    assert all(seconds > 0 for seconds in report["seconds"].values()) and report["peak_memory_bytes"] > 1e8
    assert report["tokenizer"]["texts_with_equal_ids"] > 600


def test_without_verify_nothing_is_compared_or_hashed(tmp_path, spm_file):
    make_meta(tmp_path / "meta", spm_file, SMALL)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--verify", "False")
    report = report_of(tmp_path / "hf")
    assert report["verified"] is False and "sha256" not in report and "verification" not in report


def plan_of(folder: Path):
    args = converter.Arguments(input_dir=str(folder), output_dir=str(folder.parent / "unused"))
    return converter.check_arguments(args)


def rewrite(hf: Path, change) -> None:
    """Changes tensors of a written model without touching anything else."""
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        hf / "model.safetensors",
        {"format": "pt"},
    )


def swap_rotary_order(tensors, name="q_proj"):
    for key, tensor in tensors.items():
        if name in key:  # as if Meta's order had been kept
            tensors[key] = tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)


BREAKS = {
    "q_order": lambda t: swap_rotary_order(t, "q_proj"),
    "k_order": lambda t: swap_rotary_order(t, "k_proj"),
    "kv_heads": lambda t: t.update({k: v.roll(8, 0) for k, v in t.items() if "v_proj" in k}),
    "gate_up": lambda t: t.update({k: t[k.replace("gate", "up")] for k in t if "gate_proj" in k}),
    "norms": lambda t: t.update({k: t[k.replace("input", "post_attention")] for k in t if "input_layernorm" in k}),
    "one_value": lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[77].add_(1),
    "not_a_number": lambda t: t["model.norm.weight"].view(-1)[3].fill_(float("nan")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_weight_is_found_by_value_and_by_computation(name, converted, tmp_path):
    meta, hf, _ = converted("llama2_70b")
    shutil.copytree(hf, tmp_path / "hf")
    rewrite(tmp_path / "hf", BREAKS[name])
    plan = plan_of(meta)
    with pytest.raises(ValueError, match="verification: .*has not the values of"):
        converter.verify(plan, plan.shards, tmp_path / "hf")
    if name != "one_value":  # the computation alone finds it as well
        with pytest.raises(ValueError, match="verification: (layer|logits).*differs"):
            converter.compare_states(plan, plan.shards, tmp_path / "hf")


WRONG_CONFIGS = {
    "rope_theta": ("code_llama", {"rope_parameters": PLAIN_ROPE}),
    "rope_factor": ("llama31_8b", {"rope_parameters": SCALED_ROPE | {"factor": 32.0}}),
    "no_scaling": ("llama32_1b", {"rope_parameters": PLAIN_ROPE | {"rope_theta": 500000.0}}),
    "kv_heads": ("llama2_70b", {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2}),
    "epsilon": ("llama2_7b", {"rms_norm_eps": 1e-1}),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_configuration_is_found(name, converted, tmp_path):
    generation, wrong = WRONG_CONFIGS[name]
    meta, hf, _ = converted(generation)
    shutil.copytree(hf, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | wrong))
    plan = plan_of(meta)
    with pytest.raises(ValueError, match="verification: layer 0 .*differs"):
        converter.verify(plan, plan.shards, tmp_path / "hf")


def convert_with(old: str, new: str, count: int, root: Path, monkeypatch) -> str:
    """Converts root/meta with a copy of the script in which a piece of the source is another; returns the error."""
    source = (ROOT / SCRIPT).read_text(encoding="utf-8")
    assert source.count(old) == count
    (root / "broken_converter.py").write_text(source.replace(old, new), encoding="utf-8")
    monkeypatch.syspath_prepend(root)
    broken = importlib.import_module("broken_converter")
    try:
        monkeypatch.setattr(meta_checkpoints, "to_hf", broken)
        message = convert("--input_dir", root / "meta", "--output_dir", root / "hf", error=True)
    finally:
        del sys.modules["broken_converter"]
    assert not (root / "hf").exists() and not (root / "hf.incomplete").exists()
    return message


def test_a_permutation_broken_in_the_converter_fails_the_whole_command(tmp_path, spm_file, monkeypatch):
    make_meta(tmp_path / "meta", spm_file, GQA, 2)
    right = "rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)"
    assert "error: verification: " in convert_with(right, "rows", 1, tmp_path, monkeypatch)


def test_both_directions_broken_alike_are_caught_by_the_computation(tmp_path, spm_file, monkeypatch):
    """A permutation left out there and back again passes the comparison of values, not that of states."""
    make_meta(tmp_path / "meta", spm_file, GQA, 2)
    message = convert_with("if weight.is_rotary:", "if False:", 2, tmp_path, monkeypatch)
    assert "error: verification: layer 0 of the converted model differs" in message


def test_a_scaling_factor_written_wrong_is_caught(tmp_path, tiktoken_file, monkeypatch):
    make_meta(tmp_path / "meta", tiktoken_file, SCALED | WIDE)
    wrong = "plan.config.rope_parameters['factor'] *= 4; plan.config.save_pretrained(folder)"
    wrong += "; plan.config.rope_parameters['factor'] /= 4"
    message = convert_with("plan.config.save_pretrained(folder)", wrong, 1, tmp_path, monkeypatch)
    assert "error: verification: layer 0 of the converted model differs" in message


# ------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------------


def test_sentencepiece_ids_are_the_same(converted, spm_file):
    """Also after the tokenizer was saved once more, as fine-tuning does."""
    _, hf, _ = converted("llama2_7b")
    reader, tokenizer = sentencepiece.SentencePieceProcessor(str(spm_file)), AutoTokenizer.from_pretrained(hf)
    texts = random_texts(6000)
    assert len(texts) > 5000
    found = tokenizer(texts).input_ids
    differing = [text for text, ids in zip(texts, found, strict=True) if ids != [1, *reader.encode(text)]]
    assert differing == []
    for _, ids in zip(texts[::10], found[::10], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == reader.decode(ids[1:])


def test_text_that_spells_a_special_token_can_be_read_as_letters(converted, spm_file):
    """By default it becomes that token, as with every tokenizer of Hugging Face's; Meta's code reads letters."""
    tokenizer = AutoTokenizer.from_pretrained(converted("llama2_7b")[1])
    reader = sentencepiece.SentencePieceProcessor(str(spm_file))
    assert tokenizer("a</s>b").input_ids.count(2) == 1
    for text in ("</s>", "a</s>b", "<s> x", "<unk>"):
        assert tokenizer(text, split_special_tokens=True).input_ids == [1, *reader.encode(text)]


@pytest.mark.parametrize("kind", ["NORMAL", "USER_DEFINED"])
def test_code_llama_has_more_pieces(kind, tmp_path, spm_file):
    """For filling in the middle: ids as SentencePiece gives them, whether it merges these pieces or never cuts them."""
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.Value(kind)
    path = add_infill_pieces(spm_file, tmp_path / "tokenizer.model", kind)
    reader = sentencepiece.SentencePieceProcessor(str(path))
    size = reader.vocab_size()
    make_meta(tmp_path / "old", path, CODE, 2)
    message = convert("--input_dir", tmp_path / "old", "--output_dir", tmp_path / "hf", error=True)
    assert f"{size} tokens, the embedding {SPM_SIZE}" in message
    make_meta(tmp_path / "meta", path, CODE, 1, vocab_size=size)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "hf").vocab_size == size
    tokenizer, dice = AutoTokenizer.from_pretrained(tmp_path / "hf"), random.Random(3)
    texts = ["<PRE> def f(): <SUF>return 1 <MID>", "a<PRE>b", " <PRE>", "▁<PRE>x", "x <EOT>", "<PRE> <SUF>"]
    parts = [*"ab <>\n中", "<PRE>", " <SUF>", "<MID>", "the", "▁", "  "]
    texts += ["".join(dice.choices(parts, k=dice.randint(1, 12))) for _ in range(1000)]
    assert [text for text in texts if tokenizer(text).input_ids != [1, *reader.encode(text)]] == []
    assert {reader.piece_to_id(piece) for piece in ("▁<PRE>", "▁<SUF>", "▁<MID>")} < {*tokenizer(texts[0]).input_ids}


def test_tiktoken_ids_are_the_same(converted, tiktoken_file):
    _, hf, _ = converted("llama3_8b")
    tokenizer, ranks = AutoTokenizer.from_pretrained(hf), read_ranks(tiktoken_file)
    texts = random_texts(6000)
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert ids == [len(ranks), *encode_text(text, ranks)], repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiktoken_itself_agrees(converted, tiktoken_file):
    """Where the package is installed; it is no requirement."""
    tiktoken = pytest.importorskip("tiktoken")
    _, hf, _ = converted("llama3_8b")
    ranks = read_ranks(tiktoken_file)
    encoding = tiktoken.Encoding("test", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    texts = random_texts(6000)
    for text, ids in zip(texts, AutoTokenizer.from_pretrained(hf)(texts).input_ids, strict=True):
        assert ids[1:] == encoding.encode(text, disallowed_special=())


@pytest.mark.parametrize("name", ["llama2_7b", "llama3_8b", "llama31_8b"])
def test_a_tokenizer_saved_again_is_the_same(name, converted, tmp_path):
    _, hf, _ = converted(name)
    first = AutoTokenizer.from_pretrained(hf)
    first.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((hf / "config.json").read_text())
    second, texts = AutoTokenizer.from_pretrained(tmp_path), random_texts(300)
    assert first(texts).input_ids == second(texts).input_ids
    assert first(texts[20], texts[21]).input_ids == second(texts[20], texts[21]).input_ids
    assert (first.bos_token_id, first.eos_token_id, first.pad_token_id) == (
        second.bos_token_id,
        second.eos_token_id,
        second.pad_token_id,
    )


def ids_everywhere(hf: Path):
    tokenizer, config, generation = (c.from_pretrained(hf) for c in (AutoTokenizer, AutoConfig, GenerationConfig))
    assert tokenizer.bos_token_id == config.bos_token_id == generation.bos_token_id
    assert config.eos_token_id == generation.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id == generation.pad_token_id
    return tokenizer, config


def test_ids_are_consistent_everywhere(converted):
    tokenizer, config = ids_everywhere(converted("llama2_7b")[1])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, config.eos_token_id) == (
        1,
        2,
        None,
        2,
    )
    base = TIKTOKEN_SIZE - 256
    tokenizer, config = ids_everywhere(converted("llama3_8b")[1])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (base, base + 1, None)
    assert config.eos_token_id == base + 1
    tokenizer, config = ids_everywhere(converted("llama31_8b")[1])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (base, base + 1, base + 4)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(("params", "stops"), [(LLAMA3, [1, 9]), (SCALED, [1, 8, 9])])
def test_instruct_has_template_and_stop_ids(params, stops, tmp_path, tiktoken_file):
    """Special tokens at the places that Meta's code gives them; a chat as Meta's ChatFormat renders it."""
    make_meta(tmp_path / "Llama3-8B-Instruct", tiktoken_file, params)
    convert("--input_dir", tmp_path / "Llama3-8B-Instruct", "--output_dir", tmp_path / "hf")
    tokenizer, config = ids_everywhere(tmp_path / "hf")
    base = TIKTOKEN_SIZE - 256
    assert config.eos_token_id == [base + i for i in stops] and tokenizer.eos_token_id == base + 9
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    if params is SCALED:
        names += [
            "<|finetune_right_pad_id|>",
            "<|reserved_special_token_2|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
        ]
        names += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>"]
    else:
        names += ["<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>"]
        names += ["<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [base + i for i in range(len(names))]
    last = "<|reserved_special_token_247|>" if params is SCALED else "<|reserved_special_token_250|>"
    assert tokenizer.convert_tokens_to_ids(last) == base + 255 and len(tokenizer) == TIKTOKEN_SIZE
    chat = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " 1+1?\n"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    expected = f"<|begin_of_text|>{head('system')}Be brief.<|eot_id|>{head('user')}1+1?<|eot_id|>{head('assistant')}"
    assert text == expected
    ids, ranks = tokenizer(text, add_special_tokens=False).input_ids, read_ranks(tiktoken_file)
    assert ids[:3] == [base, base + 6, encode_text("system", ranks)[0]] and ids.count(base) == 1
    generation_prompt = [base + 6, *encode_text("assistant", ranks), base + 7, *encode_text("\n\n", ranks)]
    assert ids[-len(generation_prompt) :] == generation_prompt


@pytest.mark.parametrize(
    ("folder", "flags", "instruct"),
    [
        ("Llama3.1-8B", (), False),
        ("Meta-Llama-3-8B-Instruct/original", (), True),
        ("models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f249a1/original", (), True),
        ("instruct-experiments/mine/Llama3.1-8B", (), False),
        ("renamed", ("--instruct", "True"), True),
        ("Llama3.1-8B-Instruct", ("--instruct", "False"), False),
    ],
)
def test_a_chat_model_is_told_by_the_name_or_the_flag(folder, flags, instruct, tmp_path, tiktoken_file, capsys):
    (tmp_path / folder).mkdir(parents=True)
    shutil.copyfile(tiktoken_file, tmp_path / folder / "tokenizer.model")
    (tmp_path / folder / "params.json").write_text(json.dumps(SCALED))
    convert("--input_dir", tmp_path / folder, "--output_dir", tmp_path / "hf", "--tokenizer_only", *flags)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert bool(tokenizer.chat_template) is instruct
    assert tokenizer.eos_token == ("<|eot_id|>" if instruct else "<|end_of_text|>")
    assert f"has {'the' if instruct else 'no'} chat template" in capsys.readouterr().out


def llama2_prompt_ids(reader, chat: list[dict]) -> list[int]:
    """The ids that Meta's chat_completion makes (meta-llama/llama, llama/generation.py): each part is encoded alone."""
    chat = list(chat)
    if chat[0]["role"] == "system":
        system = f"<<SYS>>\n{chat[0]['content']}\n<</SYS>>\n\n"
        chat[:2] = [{"role": "user", "content": system + chat[1]["content"]}]
    ids = []
    for question, answer in zip(chat[::2], chat[1::2], strict=False):
        text = f"[INST] {question['content'].strip()} [/INST] {answer['content'].strip()} "
        ids += [reader.bos_id(), *reader.encode(text), reader.eos_id()]
    if len(chat) % 2:
        ids += [reader.bos_id(), *reader.encode(f"[INST] {chat[-1]['content'].strip()} [/INST]")]
    return ids


LLAMA2_CHAT = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": " Ear pain?\n"},
    {"role": "assistant", "content": " 耳科。 "},
    {"role": "user", "content": "  Since 2 days."},
    {"role": "assistant", "content": "I see."},
    {"role": "user", "content": "[INST] ok"},
]


@pytest.mark.parametrize("folder", ["llama-2-7b-chat", "Llama-2-13b-chat/original", "CodeLlama-7b-Instruct"])
def test_llama2_chat_writes_the_prompts_of_metas_code(folder, tmp_path, spm_file, capsys):
    make_meta(tmp_path / folder, spm_file, SMALL)
    convert("--input_dir", tmp_path / folder, "--output_dir", tmp_path / "hf")
    assert "has the chat template" in capsys.readouterr().out
    tokenizer, config = ids_everywhere(tmp_path / "hf")
    assert config.eos_token_id == 2
    reader = sentencepiece.SentencePieceProcessor(str(spm_file))
    for first in (0, 1):  # with and without a system message
        for last in range(first + 1 + (first == 0), len(LLAMA2_CHAT) + 1):
            chat = LLAMA2_CHAT[first:last]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
            assert ids == llama2_prompt_ids(reader, chat), chat
    for wrong in (LLAMA2_CHAT[2:4], [LLAMA2_CHAT[1]] * 2, [LLAMA2_CHAT[1], LLAMA2_CHAT[0]]):
        with pytest.raises(Exception, match="user and assistant in turn"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


@pytest.mark.parametrize(
    ("folder", "chat"), [("llama-2-7b", False), ("chat/llama-2-7b", False), ("wechat-llama", False), ("chat/7B", True)]
)
def test_a_llama2_chat_model_is_told_by_a_word_of_its_name(folder, chat, tmp_path, spm_file):
    (tmp_path / folder).mkdir(parents=True)
    shutil.copyfile(spm_file, tmp_path / folder / "tokenizer.model")
    convert("--input_dir", tmp_path / folder, "--output_dir", tmp_path / "hf", "--tokenizer_only")
    assert bool(AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template) is chat


def append_pieces(spm_file: Path, folder: Path, pieces: dict[str, float], kind: str = "NORMAL") -> Path:
    """Writes folder/tokenizer.model with more pieces, as scripts that extend LLaMA's vocabulary do."""
    folder.mkdir(parents=True)
    model = sentencepiece_model_pb2.ModelProto.FromString(spm_file.read_bytes())
    for piece, score in pieces.items():
        model.pieces.add(piece=piece, score=score, type=model.SentencePiece.Type.Value(kind))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder / "tokenizer.model"


def test_code_llama_70b_instruct_has_prompts_that_are_not_known(tmp_path, spm_file):
    append_pieces(spm_file, tmp_path / "CodeLlama-70b-Instruct", {"<step>": 0.0}, "USER_DEFINED")
    flags = ("--input_dir", tmp_path / "CodeLlama-70b-Instruct", "--tokenizer_only", "--output_dir", tmp_path / "hf")
    assert "Code Llama 70B Instruct" in convert(*flags, "--instruct", "True", error=True)
    convert(*flags)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is None


# Vocabularies that were extended, as that of Chinese-LLaMA-Alpaca (scripts/merge_tokenizer/merge_tokenizers.py):
# pieces with score 0 behind LLaMA's own. Those of the first table are joined as by SentencePiece, the others cannot be.
EXTENDED = {
    "letters only": {"血": 0.0, "压": 0.0, "耳": 0.0},
    "letters and a word": {"血": 0.0, "压": 0.0, "血压": 0.0},
    "own scores": {"血": -9001.0, "压": -9002.0, "测": -9003.0, "血压": -9004.0, "测血": -9005.0},
}
NOT_CONVERTED = {
    "letters that are no pieces": {"血压": 0.0},
    "eight such words": dict.fromkeys(["血压", "心脏", "头痛", "发烧", "咳嗽", "胸痛", "眼科", "耳科"], 0.0),
    "equal scores that claim the same letters": dict.fromkeys(["血", "压", "测", "血压", "压测", "测血"], 0.0),
}


@pytest.mark.parametrize("name", EXTENDED)
def test_an_extended_vocabulary_is_converted_exactly(name, tmp_path, spm_file):
    path = append_pieces(spm_file, tmp_path / "meta", EXTENDED[name])
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--tokenizer_only")
    reader = sentencepiece.SentencePieceProcessor(str(path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    dice = random.Random(5)
    parts = [*EXTENDED[name], "血压", "测血", " ", "a", "1", "的", "the"]
    texts = ["".join(dice.choices(parts, k=dice.randint(1, 12))) for _ in range(500)]
    assert [text for text in texts if tokenizer(text).input_ids != [1, *reader.encode(text)]] == []


@pytest.mark.parametrize("name", NOT_CONVERTED)
def test_an_extended_vocabulary_that_would_differ_is_refused(name, tmp_path, spm_file):
    append_pieces(spm_file, tmp_path / "meta", NOT_CONVERTED[name])
    before = left_in(tmp_path)
    flags = ("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--tokenizer_only")
    assert "cannot be converted exactly" in convert(*flags, error=True)
    assert left_in(tmp_path) == before


@pytest.mark.parametrize("num_ranks", [300, 100256, 151643, 200000])
def test_ranks_that_are_not_llama3s_are_refused(num_ranks, tmp_path):
    """Llama 4's 200,000, and those of cl100k and Qwen: their own cut of words, and other special tokens."""
    (tmp_path / "meta").mkdir()
    ranks = {bytes([i]): i for i in range(256)}
    for i in range(256, num_ranks):
        ranks[i.to_bytes(4, "big")] = i
    write_ranks(ranks, tmp_path / "meta" / "tokenizer.model")
    flags = ("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--tokenizer_only")
    message = convert(*flags, error=True)
    assert f"{num_ranks} ranks" in message and "128000" in message and not (tmp_path / "hf").exists()


def test_tokenizer_only_needs_no_weights(tmp_path, spm_file, converted):
    (tmp_path / "meta").mkdir()
    shutil.copyfile(spm_file, tmp_path / "meta" / "tokenizer.model")
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--tokenizer_only")
    names = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "conversion_report.json"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    texts = random_texts(100)
    whole = AutoTokenizer.from_pretrained(converted("llama2_7b")[1])
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(texts).input_ids == whole(texts).input_ids


def test_the_tokenizer_may_lie_beside_the_folder(tmp_path, spm_file):
    make_meta(tmp_path / "7B", spm_file, LLAMA1)
    (tmp_path / "7B" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    convert("--input_dir", tmp_path / "7B", "--output_dir", tmp_path / "hf")
    assert "tokenizer.model" in report_of(tmp_path / "hf")["sha256"]["inputs"]


def test_a_tokenizer_that_would_differ_is_refused(tmp_path, spm_file, monkeypatch):
    """A model that changes the text, and a conversion with a wrong merge list."""
    train_sentencepiece(tmp_path / "meta")
    flags = ("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf", "--tokenizer_only")
    assert "leaves the text as it is" in convert(*flags, error=True)
    shutil.copyfile(spm_file, tmp_path / "meta" / "tokenizer.model")
    right = converter.find_merges
    monkeypatch.setattr(converter, "find_merges", lambda pieces: right(pieces)[::-1])
    assert "cannot be converted exactly" in convert(*flags, error=True)
    assert not (tmp_path / "hf").exists()


# ------------------------------------------------------------------------------------------------------------------
# Users' mistakes: one error, nothing left behind
# ------------------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def edit_params(change):
    def edit(meta: Path, root: Path):
        path = meta / "params.json"
        path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items() if v != "gone"}))

    return edit


def edit_shard(change, number: int = 1):
    def edit(meta: Path, root: Path):
        path = meta / f"consolidated.{number:02d}.pth"
        shard = torch.load(path, weights_only=True)
        change(shard)
        torch.save(shard, path)

    return edit


def cut(name: str, size: float):
    def edit(meta: Path, root: Path):
        data = (meta / name).read_bytes()
        (meta / name).write_bytes(data[: int(len(data) * size)])

    return edit


def replace(name: str, data: bytes):
    return lambda meta, root: (meta / name).write_bytes(data)


def run_evil(meta: Path, root: Path):
    shard = torch.load(meta / "consolidated.01.pth", weights_only=True)
    torch.save(shard | {"evil": Evil(str(root / "executed"))}, meta / "consolidated.01.pth")


def old_format(meta: Path, root: Path):
    path = meta / "consolidated.01.pth"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def evil_old_format(meta: Path, root: Path):
    (meta / "consolidated.01.pth").write_bytes(pickle.dumps(Evil(str(root / "executed"))))


def torchscript(meta: Path, root: Path):
    """Torch's own message for it advises weights_only=False, which would execute the pickle."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(meta / "consolidated.01.pth"))


def another_zip(meta: Path, root: Path):
    with zipfile.ZipFile(meta / "consolidated.01.pth", "w") as file:
        file.writestr("a", "b")


def fill_output(meta: Path, root: Path):
    (root / "out").mkdir()
    (root / "out" / "mine.txt").write_text("keep")


MISTAKES = {  # what is done to a good checkpoint of 2 shards, and what the message must name
    "truncated shard": (cut("consolidated.01.pth", 0.9), ["consolidated.01.pth", "truncated", "download it again"]),
    "hardly anything": (cut("consolidated.00.pth", 0.001), ["consolidated.00.pth", "truncated"]),
    "empty shard": (cut("consolidated.01.pth", 0), ["consolidated.01.pth", "truncated"]),
    "a web page": (
        replace("consolidated.01.pth", b"<html>expired</html>"),
        ["consolidated.01.pth", "download it again"],
    ),
    "first shard missing": (lambda m, r: (m / "consolidated.00.pth").unlink(), ["consolidated.00.pth is missing"]),
    "last shard missing": (lambda m, r: (m / "consolidated.01.pth").unlink(), ["a shard is missing", "1 shards"]),
    "no shards": (lambda m, r: [p.unlink() for p in m.glob("*.pth")], ["consolidated.00.pth is missing"]),
    "more heads": (edit_params({"n_kv_heads": 4}), ["attention.wk.weight", "params.json"]),
    "other width": (edit_params({"dim": 128}), ["params.json"]),
    "fewer layers": (edit_params({"n_layers": 1}), ["layers.1.", "unknown"]),
    "more layers": (edit_params({"n_layers": 3}), ["layers.2.attention.wq.weight is missing"]),
    "heads that do not divide": (edit_params({"n_heads": 7}), ["64", "7"]),
    "other feed-forward": (edit_params({"multiple_of": 256}), ["feed_forward.w1.weight"]),
    "no dim": (edit_params({"dim": "gone"}), ["params.json", "dim"]),
    "dim in words": (edit_params({"dim": "many"}), ["params.json", "dim"]),
    "epsilon in words": (edit_params({"norm_eps": "1e-5"}), ["params.json", "norm_eps"]),
    "no epsilon": (edit_params({"norm_eps": float("nan")}), ["params.json", "norm_eps"]),
    "negative theta": (edit_params({"rope_theta": -1}), ["params.json", "rope_theta"]),
    "vocabulary in words": (edit_params({"vocab_size": "448"}), ["params.json", "vocab_size"]),
    "scaling in words": (edit_params({"use_scaled_rope": "no"}), ["params.json", "use_scaled_rope"]),
    "other vocabulary": (edit_params({"vocab_size": 447}), ["448 tokens, the embedding 447"]),
    "quantized": (edit_params({"quantization_args": {"group_size": 32}}), ["quantization_args"]),
    "damaged params": (replace("params.json", b"{"), ["params.json", "download it again"]),
    "no params": (lambda m, r: (m / "params.json").unlink(), ["no params.json"]),
    "missing key": (edit_shard(lambda s: s.pop("norm.weight")), ["norm.weight is missing in shard 1"]),
    "no embedding": (edit_shard(lambda s: s.pop("tok_embeddings.weight"), 0), ["tok_embeddings.weight is missing"]),
    "a number": (edit_shard(lambda s: s.update({"tok_embeddings.weight": torch.ones(())}), 0), ["is not a matrix"]),
    "other embedding": (
        edit_shard(lambda s: s.update({"tok_embeddings.weight": torch.ones(SPM_SIZE, 16)}), 1),
        ["tok_embeddings.weight is [448, 16] in shard 1, not [448, 32]"],
    ),
    "sparse": (
        edit_shard(lambda s: s.update({"norm.weight": torch.ones(64).to_sparse()})),
        ["other things than tensors"],
    ),
    "no memory": (
        edit_shard(lambda s: s.update({"norm.weight": torch.ones(64, device="meta")})),
        ["other things than tensors"],
    ),
    "not all have the table": (edit_shard(lambda s: s.pop("rope.freqs")), ["rope.freqs is missing in shard 1"]),
    "unknown key": (edit_shard(lambda s: s.update(extra=torch.ones(2))), ["extra is unknown"]),
    "integers": (edit_shard(lambda s: s.update({"norm.weight": torch.ones(64, dtype=torch.int8)})), ["torch.int8"]),
    "norms differ": (edit_shard(lambda s: s["norm.weight"].add_(1)), ["norm.weight must be equal", "shard 1"]),
    "code in the pickle": (run_evil, ["consolidated.01.pth", "was not opened"]),
    "old format": (old_format, ["consolidated.01.pth", "old format", "python -c"]),
    "code in the old format": (evil_old_format, ["consolidated.01.pth", "old format"]),
    "torchscript": (torchscript, ["consolidated.01.pth", "download it again"]),
    "another zip file": (another_zip, ["consolidated.01.pth", "download it again"]),
    "no tokenizer": (lambda m, r: (m / "tokenizer.model").unlink(), ["no tokenizer.model", "copy it there"]),
    "damaged tokenizer": (cut("tokenizer.model", 0.7), ["tokenizer.model"]),
    "no tokenizer at all": (replace("tokenizer.model", b"\x00" * 100), ["tokenizer.model"]),
    "full output": (fill_output, ["--output_dir", "not empty"]),
}


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file:UserWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error_and_leaves_nothing(name, tmp_path, converted):
    meta, _, _ = converted("llama1_13b")
    edit, words = MISTAKES[name]
    shutil.copytree(meta, tmp_path / "meta")
    edit(tmp_path / "meta", tmp_path)
    before = left_in(tmp_path)
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out", error=True)
    assert message.startswith("error: --") and all(word in message for word in words), message
    assert "False" not in message
    assert left_in(tmp_path) == before and not (tmp_path / "executed").exists()


def test_the_remedy_for_the_old_format_works(tmp_path, converted):
    meta, _, _ = converted("llama1_13b")
    shutil.copytree(meta, tmp_path / "meta")
    old_format(tmp_path / "meta", tmp_path)
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out", error=True)
    remedy = message[message.index("import torch") : message.rindex('"')]
    exec(remedy)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, spm_file, tiktoken_file):
    make_meta(tmp_path / "meta", tiktoken_file, LLAMA3)
    shutil.copyfile(spm_file, tmp_path / "meta" / "tokenizer.model")
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out", error=True)
    assert f"{SPM_SIZE} tokens" in message and f"{TIKTOKEN_SIZE}" in message and not (tmp_path / "out").exists()


def test_copies_of_a_key_value_head_must_be_equal(tmp_path, spm_file):
    make_meta(tmp_path / "meta", spm_file, GQA, 8)
    edit_shard(lambda shard: shard["layers.1.attention.wv.weight"].add_(1), 3)(tmp_path / "meta", tmp_path)
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out", error=True)
    assert "layers.1.attention.wv.weight must be equal" in message and "shard 3" in message


def test_all_mistakes_in_flags_are_named_at_once(tmp_path):
    message = convert("--input_dir", tmp_path / "no", "--output_dir", tmp_path / "out", "--dtype", "int8",
                      "--max_shard_size", "big", "--rope_scaling_factor", 0, error=True)  # fmt: skip
    for name in ("input_dir", "dtype int8", "max_shard_size big", "rope_scaling_factor 0.0"):
        assert f"--{name}" in message
    assert left_in(tmp_path) == []


def test_a_scaling_factor_without_scaling_is_refused(tmp_path, converted):
    meta, _, _ = converted("llama3_8b")
    flags = ("--input_dir", meta, "--output_dir", tmp_path / "out", "--rope_scaling_factor", 8)
    assert "use_scaled_rope" in convert(*flags, error=True)


def test_too_small_a_disk_is_noticed_before_starting(tmp_path, spm_file):
    """A checkpoint of 6.6 TB: each feed-forward matrix is one number seen many times, so that its file is small."""
    make_meta(tmp_path / "meta", spm_file, SMALL)
    rows, one = 2**33, torch.ones(1, dtype=torch.bfloat16)

    def grow(shard):
        for i in range(2):
            shard |= {f"layers.{i}.feed_forward.{w}.weight": one.expand(rows, 64) for w in ("w1", "w3")}
            shard[f"layers.{i}.feed_forward.w2.weight"] = one.expand(64, rows)

    edit_shard(grow, 0)(tmp_path / "meta", tmp_path)
    edit_params({"multiple_of": rows})(tmp_path / "meta", tmp_path)
    assert (tmp_path / "meta" / "consolidated.00.pth").stat().st_size < 1e6
    before = left_in(tmp_path)
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "deep" / "out", error=True)
    assert message.startswith("error: --output_dir") and "6597.1 GB are needed" in message
    assert left_in(tmp_path) == before


def test_a_write_that_fails_leaves_nothing(tmp_path, converted):
    """The operating system refuses files above 100 kB, as it would on a full disk."""
    meta, _, _ = converted("llama1_7b")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = convert("--input_dir", meta, "--output_dir", tmp_path / "deep" / "out", error=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith("error: ") and "nothing was written" in message
    assert left_in(tmp_path) == []


@pytest.fixture(scope="session")
def deep_meta(tmp_path_factory, spm_file) -> Path:
    """Many small layers: the conversion takes seconds, time enough to kill it."""
    folder = tmp_path_factory.mktemp("deep") / "meta"
    make_meta(folder, spm_file, SMALL | {"n_layers": 150})
    return folder


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def test_a_killed_conversion_is_never_taken_for_a_complete_one(tmp_path, deep_meta, converted):
    flags = ["--input_dir", str(deep_meta), "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, ROOT / SCRIPT, *flags], stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out.incomplete" / "model.safetensors")
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    meta, _, _ = converted("llama1_7b")
    flags = ("--input_dir", meta, "--output_dir", tmp_path / "out")
    assert "out.incomplete" in convert(*flags, error=True)  # it may also be a conversion that is still running
    shutil.rmtree(tmp_path / "out.incomplete")
    (tmp_path / "out").mkdir()  # an empty folder is fine
    convert(*flags)
    assert report_of(tmp_path / "out")["verified"] is True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_conversion_leaves_nothing(number, tmp_path, deep_meta):
    def stop():
        wait_for(tmp_path / "out.incomplete" / "model.safetensors")
        os.kill(os.getpid(), number)

    former = signal.signal(number, lambda *_: pytest.fail("the conversion was over before it was stopped"))
    try:
        threading.Thread(target=stop, daemon=True).start()
        message = convert("--input_dir", deep_meta, "--output_dir", tmp_path / "out", error=True)
    finally:
        signal.signal(number, former)
    assert message == "error: stopped; nothing was written" and left_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------------
# The commands of docs/convert.md, as a user types them
# ------------------------------------------------------------------------------------------------------------------


def commands_of(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_page_run(tmp_path, tiktoken_file):
    """They need a download of Meta's: here its place is taken by a small checkpoint."""
    commands = commands_of("docs/convert.md")
    assert commands == commands_of("docs/convert_zh.md")
    assert len(commands) == 2
    assert commands[0].startswith(f"python {SCRIPT} ") and commands[1].startswith("python tools/convert_hf_to_meta.py ")
    make_meta(tmp_path / "Llama3.1-8B-Instruct", tiktoken_file, SCALED)
    (tmp_path / "tools").mkdir()
    for program in (SCRIPT, "tools/convert_hf_to_meta.py"):  # they need no other file of the project
        shutil.copyfile(ROOT / program, tmp_path / program)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "complete" in done.stdout, done.stderr
    hf = tmp_path / "models" / "Llama-3.1-8B-Instruct"
    assert report_of(hf)["verified"] is True and AutoTokenizer.from_pretrained(hf).chat_template
    convert("--input_dir", tmp_path / commands[1].split()[-1], "--output_dir", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_the_former_flag_of_the_way_back_leads_to_its_program(tmp_path):
    flags = ("--to_meta", "--num_shards", 2, "--input_dir", tmp_path, "--output_dir", tmp_path / "out")
    message = convert(*flags, error=True)
    assert "tools/convert_hf_to_meta.py" in message and "same other flags" in message
    assert left_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------------
# Memory and speed
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 2])
def test_memory_and_speed_on_three_gigabytes(num_shards):
    """In memory where that is possible: on a disk, what others write decides how long a copy takes."""
    shared = Path("/dev/shm")
    place = ["--folder", shared] if shared.is_dir() and shutil.disk_usage(shared).free > 10e9 else []
    done = run_script("benchmarks/convert.py", "--num_shards", num_shards, *place)
    print(done.stdout)
    assert "there and back: the same bits" in done.stdout  # and both limits, else its status would be another
