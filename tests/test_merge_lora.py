"""tools/merge_lora.py: the merged folder and the GGUF file are base + adapter, and nothing else is ever written."""

import json
import os
import re
import sys

import gguf
import numpy as np
import peft
import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import finetune_pp_peft
import test_sample
from tools import gguf_export, merge_lora

PROMPTS = [[1, 40, 50, 60], [1, 99], [1, 7, 8, 9, 10, 11]]


def save_adapter(model_path, folder, **options):
    """A LoRA adapter of random weights."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    options = {"target_modules": "all-linear", "init_lora_weights": False} | options
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    model.save_pretrained(folder, save_embedding_layers=False)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags)])
    merge_lora.main()


def stop_message(monkeypatch, *flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *flags)
    return str(stopped.value.code)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("mode", ["lora", "prefix", "ptuning", "prompt"])
def test_the_same_greedy_tokens_wherever_the_adapter_goes(mode, tiny_model, tmp_path, monkeypatch):
    """Training process, reloaded folder and, for LoRA, merged folder and GGUF f32; or the two best logits are a tie."""
    rows = save_rows(random_rows(16), tmp_path / "set", {"sha256": "x", "template": {"format": "text", "chat": False}})
    flags = ["--model_path", tiny_model, "--dataset_path", rows, "--output_dir", tmp_path / "run", "--peft_mode", mode]
    flags += ["--max_steps", 3, "--learning_rate", 0.05, "--lora_dropout", 0, "--report_to", "none"]
    flags += ["--use_cpu", "True", "--bf16", "False", "--num_virtual_tokens", 4]
    if mode != "prompt":
        flags += ["--mapping_hidden_dim", 16]
    trained = []
    save_model = finetune_pp_peft.save_model

    def remember(model, *context):
        trained.append(model)
        save_model(model, *context)

    monkeypatch.setattr(finetune_pp_peft, "save_model", remember)
    monkeypatch.setattr(sys, "argv", ["finetune_pp_peft.py", *map(str, flags)])
    finetune_pp_peft.main()
    model = trained[-1]
    model.get_base_model().set_attn_implementation("sdpa")  # that of training takes joined rows only
    tokenizer = make_tokenizer()

    others = {"reloaded": peft.PeftModel.from_pretrained(load(tiny_model), tmp_path / "run").eval()}
    if mode == "lora":
        run(monkeypatch, "--peft_path", tmp_path / "run", "--output", tmp_path / "merged", "--gguf", "f32")
        others |= {"merged": load(tmp_path / "merged")}
        others |= {"gguf": load(tmp_path / "merged", gguf_file="model-f32.gguf")}
        receipt = json.loads((tmp_path / "merged" / "run.json").read_text())
        assert receipt["dataset"]["template"] == {"format": "text", "chat": False}  # the template travels on
    model.eval()
    untrained = test_sample.generate(load(tiny_model), tokenizer, PROMPTS[:1], 16)
    for prompt in PROMPTS:
        (expected,) = test_sample.generate(model, tokenizer, [prompt], 16)
        assert prompt != PROMPTS[0] or expected != untrained[0]
        for name, other in others.items():
            (found,) = test_sample.generate(other, tokenizer, [prompt], 16)
            if found != expected:
                same = torch.tensor([prompt + os.path.commonprefix([expected, found])])
                best = model(input_ids=same, attention_mask=torch.ones_like(same)).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "r": 4, "lora_alpha": 7},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "up_proj": 5}},
        {"target_modules": ["lm_head", "down_proj"]},
    ],
)
def test_merged_weights_are_those_of_peft(options, tiny_model, tmp_path, monkeypatch):
    model = save_adapter(tiny_model, tmp_path / "adapter", **options)
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    expected, found = model.merge_and_unload().state_dict(), load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6), name


def test_a_merged_folder_is_a_plain_model(tmp_path, monkeypatch):
    """Sharded as its base, in the base's bf16; no trace of the adapter; the tokenizer and stop ids are there."""
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(base, max_shard_size="20KB")
    num_shards = len(list(base.glob("*.safetensors")))
    assert num_shards > 2
    save_adapter(base, tmp_path / "adapter")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    merged = tmp_path / "merged"
    names = {path.name for path in merged.iterdir()}
    assert not [name for name in names if "adapter" in name] and len(list(merged.glob("*.safetensors"))) == num_shards
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.eos_token_id == [2, 5]
    assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template
    with torch.no_grad():
        ids = torch.tensor(PROMPTS[:1])
        expected = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
        for name, weight in load(merged).state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name].bfloat16().float()), name
        assert load(merged)(ids).logits.isfinite().all()
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "wide", "--dtype", "float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


EMBEDDING_AND_HEAD = {
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "a whole embedding and LoRA on the head": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", EMBEDDING_AND_HEAD)
def test_adapters_on_embedding_and_head_are_merged_by_untying(case, tied, copies, tmp_path, monkeypatch):
    """Against the model that PEFT trained. A tied base has one weight for both; the merged model has two.

    copies: PEFT saved the base's own embedding and head along, as it does by itself.
    """
    base = save_tiny_model(tmp_path / "base", tied=tied)
    torch.manual_seed(3)
    model = load(base)
    options = {"init_lora_weights": False} | EMBEDDING_AND_HEAD[case]
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers="auto" if copies else False)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        for verify in ("True", "False"):
            output = tmp_path / f"merged{verify}"
            run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", output, "--verify", verify)
            merged = load(output)
            assert not merged.config.tie_word_embeddings
            assert torch.allclose(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_base_whose_files_have_the_weight_twice_is_untied_too(tmp_path, monkeypatch):
    """As older programs saved it; a program that believes the configuration would tie the two again."""
    base = save_tiny_model(tmp_path / "base", tied=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert not load(tmp_path / "merged").config.tie_word_embeddings
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "merged")(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_other_layers_leaves_a_tied_base_tied(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base", tied=True)
    save_adapter(base, tmp_path / "adapter")
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert load(tmp_path / "merged").config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
WIDE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
OTHER_FAMILIES = {
    "qwen2": (WIDE, {"bias": "all"}),
    "gemma": (WIDE | {"head_dim": 8}, {"target_modules": ["lm_head", "q_proj"]}),  # tied by default
    "mistral": (WIDE, {"bias": "lora_only", "target_modules": "all-linear"}),
    "phi3": (WIDE, {"target_modules": "all-linear"}),
    "mixtral": (WIDE | {"num_local_experts": 4}, {"target_modules": ["q_proj", "o_proj"]}),
    "gpt2": ({"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt_neox": (SIZES | {"intermediate_size": 64}, {"target_modules": ["query_key_value"], "bias": "all"}),
}


def test_others_can_read_what_was_merged(tiny_model, tmp_path, monkeypatch):
    """safetensors makes 0600; a server that runs as another user would find no model."""
    save_adapter(tiny_model, tmp_path / "adapter")
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_are_merged_like_llama(family, tmp_path, monkeypatch):
    """Biases that were trained, weights that lie the other way round, files with other names than in memory."""
    sizes, options = OTHER_FAMILIES[family]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    base.save_pretrained(tmp_path / "base")
    options = {"init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(load(tmp_path / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "base")
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.allclose(load(tmp_path / "merged")(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_has_another_name_in_the_files_is_refused_with_that_reason(tmp_path, monkeypatch):
    """GPT-NeoX's head is lm_head in memory and embed_out on disk."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **SIZES | {"intermediate_size": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in load_file(tmp_path / "base" / "model.safetensors")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    peft.get_peft_model(load(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    message = stop_message(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "out")
    assert "keeps lm_head.weight under another name in the files of gpt_neox models" in message


UNMERGED_SETTINGS = {
    "use_dora": {"use_dora": True},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("name", UNMERGED_SETTINGS)
def test_what_needs_another_formula_is_refused_by_its_name(name, tiny_model, tmp_path, monkeypatch):
    save_adapter(tiny_model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **UNMERGED_SETTINGS[name])
    flags = ["--peft_path", tmp_path / "adapter", "--output", tmp_path / "out", "--verify", "False"]
    message = stop_message(monkeypatch, *flags)
    assert f"it uses {name}, which this tool does not merge; use PEFT's merge_and_unload" in message


def test_a_setting_of_a_newer_peft_is_never_overlooked(tiny_model, tmp_path, monkeypatch):
    save_adapter(tiny_model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_lora_of_2030": True}))
    message = stop_message(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "out")
    assert "it uses use_lora_of_2030, which this tool does not merge" in message


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_others_may_read_what_the_umask_lets_them(umask, tiny_model, tmp_path, monkeypatch):
    """safetensors writes for the owner alone."""
    save_adapter(tiny_model, tmp_path / "adapter")
    before = os.umask(umask)
    try:
        run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "out", "--gguf", "f32")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask} and (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_adapter_that_rounding_drowns_is_said(tmp_path, monkeypatch, capsys):
    """In bf16 a weight moves by steps of 2^-8 of itself; a small change gets lost between two of them."""
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor *= 1e-4
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    flags = ["--peft_path", tmp_path / "adapter", "--output"]
    run(monkeypatch, *flags, tmp_path / "bf16")
    assert "--dtype float32 keeps what it learned" in capsys.readouterr().out
    run(monkeypatch, *flags, tmp_path / "float32", "--dtype", "float32")
    assert "keeps what it learned" not in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_has_the_weights_to_rounding(tied, tmp_path, monkeypatch):
    """f32 exactly, f16 to the nearest half, q8_0 within half a step of its block of 32; read back by transformers."""
    model_path = save_tiny_model(tmp_path / "model", tied=tied)
    original = load(model_path).state_dict()
    for kind in ("f32", "f16", "q8_0"):
        run(monkeypatch, "--model_path", model_path, "--output", tmp_path / kind, "--gguf", kind)
        assert [path.name for path in sorted((tmp_path / kind).iterdir())] == [f"model-{kind}.gguf", "run.json"]
        found = load(tmp_path / kind, gguf_file=f"model-{kind}.gguf").state_dict()
        assert found.keys() == original.keys()
        for name, weight in original.items():
            if kind == "f32" or weight.ndim == 1:
                assert torch.equal(found[name], weight), name
            elif kind == "f16":
                assert torch.equal(found[name], weight.half().float()), name
            else:
                blocks = weight.reshape(-1, 32)
                step = (blocks.abs().amax(1, keepdim=True) / 127).repeat(1, 32).reshape(weight.shape)
                error = (found[name] - weight).abs()
                # Half a step, and the step itself is a half-precision number: 127 steps of 2^-11.
                assert (error <= step * (0.5 + 127 / 2**11) + 1e-9).all(), name
                assert error.max() > 0


def read_fields(path) -> dict:
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}


def test_gguf_has_the_tokenizer_and_the_chat_template(tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ eos_token }}"
    tokenizer.save_pretrained(model_path)
    run(monkeypatch, "--model_path", model_path, "--output", tmp_path / "out", "--gguf", "f32", "--verify", "False")
    fields = read_fields(tmp_path / "out" / "model-f32.gguf")
    assert fields["general.architecture"] == "llama" and fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(300))
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.pre"] == "gpt-2"
    read_back = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf")
    for text in ("Red eye?", "贫血 and 3 tabs\t\n", " leading"):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert read_back(text, add_special_tokens=False).input_ids == expected


def test_a_sentencepiece_tokenizer_gets_scores_in_the_order_of_its_merges():
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    model = models.BPE({token: i for i, token in enumerate(vocab)}, [("a", "b"), ("▁", "ab")], byte_fallback=True,
                       unk_token="<unk>", fuse_unk=True)  # fmt: skip
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    described = gguf_export.describe_tokenizer(tokenizer, len(vocab) + 2)
    assert described.model == "llama" and described.space_prefix is True
    assert described.scores[vocab.index("ab")] > described.scores[vocab.index("▁ab")]
    kinds = [described.types[vocab.index(token)].name for token in ("<unk>", "</s>", "<0x0A>", "ab")]
    assert kinds == ["UNKNOWN", "CONTROL", "BYTE", "NORMAL"]
    assert described.tokens[-1].startswith("[PAD") and described.types[-1].name == "UNUSED"


def test_the_rotary_scaling_of_llama_3_is_written(tmp_path, monkeypatch):
    """rope_freqs by llama.cpp's own formula (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors)."""
    model_path = save_tiny_model(tmp_path / "model")
    config = json.loads((model_path / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    (model_path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    run(monkeypatch, "--model_path", model_path, "--output", tmp_path / "out", "--gguf", "f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    expected = []
    for exponent in range(0, 8, 2):
        frequency = 1 / 500000.0 ** (exponent / 8)
        wavelength = 2 * np.pi / frequency
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        middle = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 64 / 4 else 8.0 if wavelength > 64 / 1 else middle)
    assert tensors["rope_freqs.weight"] == pytest.approx(np.array(expected), rel=1e-5)
    assert len(set(expected)) > 1


def test_tensors_that_llama_cpp_has_no_use_for_stay_out_of_the_file(tmp_path, monkeypatch):
    """Old programs saved rotary tables and masks along; llama.cpp counts its tensors, and does not load one more."""
    model_path = save_tiny_model(tmp_path / "model")
    tensors = load_file(model_path / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    extra |= {f"model.layers.{i}.self_attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(tensors | extra, model_path / "model.safetensors", metadata={"format": "pt"})
    run(monkeypatch, "--model_path", model_path, "--gguf", "f16", "--output", tmp_path / "out")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf").tensors}
    layer = {"attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm"}
    expected = {f"blk.{i}.{name}.weight" for i in range(2) for name in layer}
    assert names == expected | {"token_embd.weight", "output.weight", "output_norm.weight"}


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "value_head.weight", "model.layers.2.mlp.up"]
)
def test_a_tensor_that_is_not_in_the_list_is_refused_by_name(name, tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    tensors = load_file(model_path / "model.safetensors")
    save_file(tensors | {name: torch.ones(8)}, model_path / "model.safetensors", metadata={"format": "pt"})
    message = stop_message(monkeypatch, "--model_path", model_path, "--gguf", "f16", "--output", tmp_path / "out")
    assert f"--gguf f16: llama.cpp's LLaMA has no tensor {name}, so its file would not load" in message


@pytest.mark.parametrize("with_default", [True, False])
def test_of_several_chat_templates_the_default_one_is_written(with_default, tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    names = ["tool_use", "rag"] + ["default"] * with_default
    tokenizer.chat_template = {name: "{{ messages[0]['content'] }} " + name for name in names}
    tokenizer.save_pretrained(model_path)
    run(monkeypatch, "--model_path", model_path, "--gguf", "f16", "--output", tmp_path / "out")
    fields = read_fields(tmp_path / "out" / "model-f16.gguf")
    if with_default:
        assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }} default"
    else:
        assert "tokenizer.chat_template" not in fields
    save_adapter(model_path, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    run(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def byte_level(spec, **options):
    spec["pre_tokenizer"] |= options


def wrap(spec, *steps):
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, spec["pre_tokenizer"]]}


LLAMA_3 = {
    "type": "Split",
    "pattern": {"Regex": gguf_export.LLAMA_3_WORDS},
    "behavior": "Isolated",
    "invert": False,
}
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"type": "NFC"}
TOKENIZERS = {
    "add_prefix_space": (lambda spec: byte_level(spec, add_prefix_space=True), "add_prefix_space"),
    "add_prefix_space behind digits": (
        lambda spec: (byte_level(spec, add_prefix_space=True), wrap(spec, DIGITS)),
        "add_prefix_space",
    ),
    "add_prefix_space behind Llama 3's words": (
        lambda spec: (byte_level(spec, add_prefix_space=True, use_regex=False), wrap(spec, LLAMA_3)),
        "add_prefix_space",
    ),
    "normalizer": (lambda spec: spec.update(normalizer=NFC), "changes text by NFC first"),
    "normalizer before digits": (lambda spec: (wrap(spec, DIGITS), spec.update(normalizer=NFC)), "by NFC first"),
    "normalizer before Llama 3's words": (
        lambda spec: (byte_level(spec, use_regex=False), wrap(spec, LLAMA_3), spec.update(normalizer=NFC)),
        "by NFC first",
    ),
    "no regex": (lambda spec: byte_level(spec, use_regex=False), "cuts text by ByteLevel"),
    "digits by three": (lambda spec: wrap(spec, DIGITS | {"individual_digits": False}), "cuts text by Digits"),
    "almost Llama 3's words": (
        lambda spec: (
            byte_level(spec, use_regex=False),
            wrap(spec, LLAMA_3 | {"pattern": {"Regex": gguf_export.LLAMA_3_WORDS.replace("{1,3}", "{1,4}")}}),
            spec["model"].update(ignore_merges=True),
        ),
        "cuts text by Split, ByteLevel",
    ),
    "Llama 3's words with merges": (
        lambda spec: (byte_level(spec, use_regex=False), wrap(spec, LLAMA_3)),
        "cuts text by Split, ByteLevel",
    ),
    "a token that strips": (
        lambda spec: spec["added_tokens"][2].update(lstrip=True),
        "token '</s>' has lstrip, which llama.cpp does not do",
    ),
    "dropout": (lambda spec: spec["model"].update(dropout=0.1), "has dropout 0.1, which llama.cpp does not do"),
    "end of word": (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "has end_of_word_suffix '</w>'"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused_by_what_it_does(case, tmp_path, monkeypatch):
    change, expected = TOKENIZERS[case]
    model_path = save_tiny_model(tmp_path / "model")
    spec = json.loads((model_path / "tokenizer.json").read_text())
    change(spec)
    (model_path / "tokenizer.json").write_text(json.dumps(spec))
    message = stop_message(monkeypatch, "--model_path", model_path, "--gguf", "f16", "--output", tmp_path / "out")
    assert message.startswith("error: --gguf f16: its tokenizer") and expected in message
    assert not (tmp_path / "out").exists()


def make_sentencepiece(normalizer, pre_tokenizer=None):
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab"]
    model = models.BPE({token: i for i, token in enumerate(vocab)}, [("a", "b")], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPACES = normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "expected"),
    [
        (normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), None, True),
        (SPACES, None, False),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (normalizers.Sequence([normalizers.NFKC(), SPACES]), None, "by Sequence|by NFKC, Replace"),
        (normalizers.Sequence([normalizers.Lowercase(), normalizers.Prepend("▁"), SPACES]), None, "by Lowercase"),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True), "by Metaspace"),
        (None, None, "by nothing"),
    ],
)
def test_what_sentencepiece_does_to_spaces_is_known_or_refused(normalizer, pre_tokenizer, expected):
    tokenizer = make_sentencepiece(normalizer, pre_tokenizer)
    if isinstance(expected, bool):
        assert gguf_export.describe_tokenizer(tokenizer, 300).space_prefix is expected
        return
    with pytest.raises(ValueError, match=expected):
        gguf_export.describe_tokenizer(tokenizer, 300)


def test_what_cannot_be_merged_is_refused_with_the_reason(tiny_model, tmp_path, monkeypatch, capsys):
    """One message each, and nothing is written."""
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    for number, config in enumerate((peft.PrefixTuningConfig(**virtual), peft.PromptTuningConfig(**virtual),
                                     peft.PromptEncoderConfig(encoder_hidden_size=16, **virtual))):  # fmt: skip
        peft.get_peft_model(load(tiny_model), config).save_pretrained(tmp_path / f"virtual{number}")
        message = stop_message(monkeypatch, "--peft_path", tmp_path / f"virtual{number}", "--output", tmp_path / "out")
        assert "cannot be merged: it puts virtual tokens before every prompt" in message

    save_adapter(tiny_model, tmp_path / "adapter")
    flags = ["--peft_path", tmp_path / "adapter", "--output", tmp_path / "out"]
    other = save_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = stop_message(monkeypatch, *flags, "--model_path", other)
    assert "its vocabulary is not that of" in message and str(tiny_model) in message and str(other) in message
    config = json.loads((other / "config.json").read_text())
    wide = LlamaConfig(**config | {"intermediate_size": 72})
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    message = stop_message(monkeypatch, *flags, "--model_path", tmp_path / "wide")
    assert "layers.0.mlp.down_proj.lora_A.weight has shape [8, 64], and --model_path" in message
    assert "needs [8, 72]" in message and str(tiny_model) in message

    make_tokenizer().save_pretrained(other)
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes",
                                                                                  "load_in_4bit": True}}))  # fmt: skip
    assert "its weights are quantised" in stop_message(monkeypatch, *flags, "--model_path", other)
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    message = stop_message(monkeypatch, "--model_path", other, "--gguf", "f16", "--output", tmp_path / "out")
    assert "only LlamaForCausalLM is written, and this is MistralForCausalLM" in message

    save_adapter(tiny_model, tmp_path / "untrained", init_lora_weights=True)
    run(monkeypatch, "--peft_path", tmp_path / "untrained", "--output", tmp_path / "same")
    assert "was never trained: all its B matrices are zero" in capsys.readouterr().err

    message = stop_message(monkeypatch, "--gguf", "q4", "--dtype", "int8", "--output", tmp_path / "same")
    for part in ("--gguf q4: choose", "--dtype int8: choose", "it exists", "--peft_path is missing"):
        assert part in message
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "adapter_model.safetensors is cut off" in stop_message(monkeypatch, *flags)
    file.rename(file.with_name("adapter_model.bin"))
    assert "only safetensors are read here" in stop_message(monkeypatch, *flags)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_logits_that_differ_leave_no_folder(tiny_model, tmp_path, monkeypatch):
    """The check is real: a merge with a wrong factor is found and thrown away."""
    save_adapter(tiny_model, tmp_path / "adapter")
    alpha_of = merge_lora.alpha_of
    monkeypatch.setattr(merge_lora, "alpha_of", lambda *context: alpha_of(*context) * 1.001)
    message = stop_message(monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "out")
    assert "are off by" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_an_adapter_trained_on_a_4_bit_base_is_merged_into_the_unquantised_one(tmp_path, monkeypatch, capsys):
    """Trained by the script as a user does. In no place are the merged weights those of the 4-bit base."""
    pytest.importorskip("bitsandbytes")
    model, rows = save_tiny_model(tmp_path / "model"), save_rows(random_rows(16), tmp_path / "set")
    flags = ["--model_path", model, "--dataset_path", rows, "--output_dir", tmp_path / "run", "--max_steps", 2]
    flags += ["--load_in_4bit", "True", "--use_cpu", "True", "--bf16", "False", "--learning_rate", 0.05]
    run_script("finetune_pp_peft_trainer_lora.py", *flags, PYTHONPATH="")
    run(monkeypatch, "--peft_path", tmp_path / "run", "--output", tmp_path / "merged")
    assert "trained on the base in 4 bit, and is merged into the unquantised one" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "run.json").read_text())["merged"]["trained_in_4bit"] is True
    expected = peft.PeftModel.from_pretrained(load(model), tmp_path / "run").merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    base = load_file(model / "model.safetensors")
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6), name
    assert any(not torch.equal(found[name], base[name]) for name in found)


PEAK = """
import re, runpy, sys, threading, time
peak, sys.argv = 0, sys.argv[1:]
def watch():
    global peak
    while True:  # anonymous memory: what is read from a mapped file is the kernel's to take back
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("gguf_type", [None, "q8_0"])
def test_weights_go_through_memory_by_shards_and_are_never_there_twice(gguf_type, tmp_path):
    """Four shards of 64 MB: merging holds about one of them, and verifying the one model that it computes with."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 18}
    config = LlamaConfig(vocab_size=4096, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, **shape)
    model = LlamaForCausalLM(config)
    copy = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model", max_shard_size="64MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    make_tokenizer().save_pretrained(tmp_path / "model")
    save_adapter(tmp_path / "model", tmp_path / "adapter")
    tiny = save_tiny_model(tmp_path / "tiny")
    save_adapter(tiny, tmp_path / "tiny_adapter")

    def peak(adapter: str, verify: bool) -> int:
        flags = ["--peft_path", tmp_path / adapter, "--output", tmp_path / f"{adapter} {verify}", "--verify", verify]
        flags += ["--gguf", gguf_type] * (gguf_type is not None)
        # Freed memory is given back at once, so that only what is held counts.
        finished = run_script("-c", PEAK, ROOT / "tools" / "merge_lora.py", *flags, MALLOC_MMAP_THRESHOLD_="65536")
        return int(re.search(r"peak (\d+)", finished.stdout)[1])

    held = {verify: peak("adapter", verify) - peak("tiny_adapter", verify) for verify in (False, True)}
    print(f"one copy {copy / 2**20:.0f} MB; held {held[False] / 2**20:.0f} MB, verified {held[True] / 2**20:.0f} MB")
    assert held[False] < copy / 2 and held[True] < copy * 1.25  # reading a GGUF, transformers holds a tensor twice
