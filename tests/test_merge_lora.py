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
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

    save_adapter(tiny_model, tmp_path / "dora", use_dora=True)
    assert "it uses use_dora" in stop_message(monkeypatch, *flags[2:], "--peft_path", tmp_path / "dora")
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
