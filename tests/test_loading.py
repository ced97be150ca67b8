"""tools/loading.py: a model or adapter that is not whole is refused in one line, by every program that uses one."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, save_rows, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import test_sample
from tools import chat, evaluate, loading, merge_lora


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "model")


def refusal(folder) -> str:
    with pytest.raises(ValueError) as refused:
        loading.check_model(str(folder))
    message = str(refused.value)
    assert "\n" not in message
    return message


def run(program, monkeypatch, *flags) -> str:
    """What a program says when it stops; empty if it does its work."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, flags)])
    try:
        program.main()
    except SystemExit as stopped:
        return str(stopped.code)
    return ""


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **settings) -> None:
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "DELETE"}))


# -------------------------------------------------------------------------------------------------------------------
# Is the folder of a model whole?
# -------------------------------------------------------------------------------------------------------------------


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_prefix(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


WRONG_TENSORS = {
    "no head": (without("lm_head.weight"), "its files lack lm_head.weight, which the model needs"),
    "no norm": (without("model.norm.weight"), "its files lack model.norm.weight"),
    "no layer": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name},
        "its files lack model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight and 6 more",
    ),
    "torch.compile": (with_prefix("_orig_mod."), "the names of its tensors begin with '_orig_mod.'"),
    "DDP": (with_prefix("module."), "the names of its tensors begin with 'module.'"),
    "PEFT": (with_prefix("base_model.model."), "the names of its tensors begin with 'base_model.model.'"),
    "shape": (
        lambda tensors: tensors | {"model.norm.weight": torch.zeros(31)},
        "model.norm.weight has shape [31] in its files, and config.json asks for [32]",
    ),
    "8 bits": (
        lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)},
        "lm_head.weight in model.safetensors is stored as F8_E4M3, and config.json has no quantization_config",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_named(case, model):
    change, message = WRONG_TENSORS[case]
    change_tensors(model, change)
    assert message in refusal(model)


def replace_bytes(name, change):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(change(whole))

    return damage


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WRONG_FILES = {
    "git clone without git-lfs": (
        replace_bytes("model.safetensors", lambda whole: LFS),
        "model.safetensors is a Git LFS pointer instead of the file",
    ),
    "tokenizer without git-lfs": (
        replace_bytes("tokenizer.json", lambda whole: LFS),
        "tokenizer.json is a Git LFS pointer instead of the file",
    ),
    "interrupted download": (
        replace_bytes("model.safetensors", lambda whole: whole[:40_000]),
        "model.safetensors is cut off: 40,000 of ",
    ),
    "interrupted early": (
        replace_bytes("model.safetensors", lambda whole: whole[:100]),
        "model.safetensors is cut off within its header, after 100 bytes",
    ),
    "empty": (replace_bytes("model.safetensors", lambda whole: b""), "model.safetensors is not a safetensors file (0"),
    "a page of a web server": (
        replace_bytes("model.safetensors", lambda whole: b"<!DOCTYPE html><html>Not Found</html>"),
        "model.safetensors is not a safetensors file",
    ),
    "written twice": (replace_bytes("model.safetensors", lambda whole: whole + b"123"), "model.safetensors is damaged"),
    "header": (
        replace_bytes("model.safetensors", lambda whole: whole[:9] + b"!" + whole[10:]),
        "the header of model.safetensors is damaged",
    ),
    "config": (replace_bytes("config.json", lambda whole: whole[:50]), "config.json is damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in it"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in it"),
    "another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        "consolidated.safetensors has another name",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_are_not_whole_are_named(case, model):
    damage, message = WRONG_FILES[case]
    damage(model)
    assert message in refusal(model)


def test_a_sharded_model_needs_each_shard_and_its_index(model):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model / "sharded", max_shard_size="20KB")
    folder = model / "sharded"
    loading.check_model(str(folder))
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    assert f"{shards[1].name} is cut off" in refusal(folder)
    shards[1].unlink()
    assert f"{shards[1].name} is missing, of {len(shards)} files" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is damaged" in refusal(folder)


def test_what_else_a_folder_may_hold_is_said_with_the_command(model, tmp_path):
    (model / "config.json").rename(model / "params.json")
    assert "python convert_llama_weights_to_hf.py --input_dir" in refusal(model)
    (model / "params.json").rename(model / "adapter_config.json")
    assert f"name it with --peft_path {model}" in refusal(model)
    (model / "adapter_config.json").rename(model / "model.gguf")
    assert "it holds model.gguf, a file for llama.cpp" in refusal(model)
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    assert "name a checkpoint such as" in refusal(tmp_path / "run")
    assert "it is a file; name the folder that holds it" in refusal(model / "model.safetensors")
    assert "no such folder; name the folder of a whole model" in refusal("models/none")
    assert "bash scripts/quickstart.sh" in refusal_of_missing_sample(tmp_path)


def refusal_of_missing_sample(tmp_path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        return refusal("models/SmolLM2-135M-Instruct")


def test_a_folder_of_pickles_is_refused_with_a_command_that_converts_it(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    expected = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    message = refusal(model)
    assert "its weights are in pytorch_model.bin" in message
    command = shlex.split(message.partition("convert them: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    found = load_file(Path(f"{model}-safetensors") / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    loading.check_model(f"{model}-safetensors")
    AutoTokenizer.from_pretrained(f"{model}-safetensors")


def test_tensors_without_a_use_are_said_and_a_tied_head_is_no_lack(model, tmp_path, capsys):
    change_json(model / "config.json", num_hidden_layers=1)
    loading.check_model(str(model))
    assert "has no use for: model.layers.1.input_layernorm.weight" in capsys.readouterr().err
    tied = save_tiny_model(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    capsys.readouterr()
    loading.check_model(str(tied))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("program", [test_sample, chat, evaluate, merge_lora])
def test_every_program_refuses_in_one_line_before_weights_are_loaded(program, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_tensors(model, without("lm_head.weight"))
    flags = ["--model_path", model]
    if program is test_sample:
        flags += ["--prompt", "Red eye?"]
    if program is evaluate:
        flags += ["--dataset_path", save_rows(random_rows(4), tmp_path / "set")]
    if program is merge_lora:
        flags += ["--gguf", "f16", "--output", tmp_path / "out"]
    message = run(program, monkeypatch, *flags)
    assert message.splitlines()[0] == (
        f"error: --model_path {model}: its files lack lm_head.weight, which the model needs; download or save it again"
    )
    assert len(message.splitlines()) == 2


# -------------------------------------------------------------------------------------------------------------------
# Configurations that are not a plain model of text
# -------------------------------------------------------------------------------------------------------------------


def test_models_that_are_not_of_text_alone_are_refused_with_what_they_are(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 300, "num_key_value_heads": 1, "head_dim": 8}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    gemma = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    gemma.save_pretrained(tmp_path / "gemma")
    assert "gemma3 is a multimodal model, and only models of text alone" in refusal(tmp_path / "gemma")
    T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_ff=64, num_layers=1)).save_pretrained(
        tmp_path / "t5"
    )
    assert "t5 has an encoder and a decoder" in refusal(tmp_path / "t5")
    (tmp_path / "qwen_vl").mkdir()
    (tmp_path / "qwen_vl" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    assert "qwen2_vl is a multimodal model" in refusal(tmp_path / "qwen_vl")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "no model.safetensors" in refusal(tmp_path / "vit")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps({"model_type": "llama9"}))
    assert "its configuration cannot be read" in refusal(tmp_path / "new")


CODE = "open('it_ran', 'w').close()\nraise SystemExit('own code was run')\n"


@pytest.mark.parametrize("place", ["model", "tokenizer"])
def test_own_code_is_never_run_and_never_asked_about(place, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / "own.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    if place == "model":
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        change_json(model / "config.json", model_type="own", auto_map=names)
    else:
        names = {"AutoTokenizer": ["own.OwnTokenizer", None]}
        change_json(model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=names)
    message = run(test_sample, monkeypatch, "--model_path", model, "--prompt", "Red eye?")
    assert f"error: --model_path {model}: " in message and len(message.splitlines()) == 2
    assert "own code" in message or "code of its own" in message or "custom code" in message
    assert not (tmp_path / "it_ran").exists()


def test_code_beside_a_model_that_is_built_in_is_left_alone(model, monkeypatch):
    (model / "own.py").write_text(CODE)
    change_json(model / "config.json", auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    assert run(test_sample, monkeypatch, "--model_path", model, "--prompt", "Red eye?", "--max_new_tokens", 2) == ""


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "nobody-knows"])
def test_quantised_weights_that_cannot_be_loaded_here_are_refused_with_the_way_out(method, model):
    change_json(model / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 32})
    message = refusal(model)
    assert "its weights are quantised and cannot be loaded here; name the 16- or 32-bit original" in message


@pytest.mark.slow
def test_a_base_that_is_quantised_on_disk_is_used_as_it_is(model, tmp_path, monkeypatch, capsys):
    """A bitsandbytes folder, as Unsloth has many: answered with, scored and chatted with, with an adapter on it."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = tmp_path / "quantised"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map={"": "cpu"})
    base.save_pretrained(quantised)
    make_tokenizer().save_pretrained(quantised)
    adapter = save_adapter(quantised, tmp_path / "adapter", base)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(quantised))
    for flags in (["--model_path", quantised], ["--peft_path", adapter]):
        monkeypatch.chdir(ROOT)
        assert run(test_sample, monkeypatch, *flags, "--prompt", "Red eye?", "--max_new_tokens", 3) == ""
        assert "answer:" in capsys.readouterr().out
        rows = save_rows(random_rows(4), tmp_path / f"set{len(list(tmp_path.iterdir()))}")
        flags = [*flags, "--dataset_path", rows, "--output", tmp_path / "result.json"]
        assert run(evaluate, monkeypatch, *flags) == ""
    message = run(test_sample, monkeypatch, "--model_path", quantised, "--prompt", "a", "--load_in_4bit", "True")
    assert "--load_in_4bit True" in message and "is quantised already" in message
    message = run(merge_lora, monkeypatch, "--peft_path", adapter, "--output", tmp_path / "out")
    assert "its weights are quantised" in message and "name the 16- or 32-bit original" in message
    # The adapter is for the original, too, as everybody merges what Unsloth trained.
    flags = ["--peft_path", adapter, "--model_path", model, "--output", tmp_path / "out"]
    assert run(merge_lora, monkeypatch, *flags) == ""


# -------------------------------------------------------------------------------------------------------------------
# Adapters, whoever made them
# -------------------------------------------------------------------------------------------------------------------


def save_adapter(model_path, folder: Path, base=None, **options) -> Path:
    """A LoRA of random weights, without a tokenizer."""
    torch.manual_seed(0)
    if base is None:
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 4} | options
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(folder)
    return folder


def answer_flags(program, tmp_path) -> list:
    """The flags of a program beside the model's and the adapter's."""
    if program is merge_lora:
        return ["--output", tmp_path / "out"]
    if program is evaluate:
        rows = tmp_path / "rows"
        if not rows.exists():
            save_rows(random_rows(4), rows)
        return ["--dataset_path", rows, "--output", tmp_path / "result.json"]
    return ["--prompt", "Red eye?", "--max_new_tokens", 2]


BASES = {
    "null": (None, "it names no base model; add --model_path"),
    "no key": ("DELETE", "it names no base model; add --model_path"),
    "empty": ("", "it names no base model; add --model_path"),
    "gone": ("../elsewhere/llama", "its base model ../elsewhere/llama is not here"),
    "absolute and gone": ("/home/me/models/llama", "its base model /home/me/models/llama is not here"),
    "on the hub": ("somebody/llama-7b", "its base model somebody/llama-7b is not here"),
}


@pytest.mark.parametrize("program", [test_sample, evaluate, merge_lora])
@pytest.mark.parametrize("case", BASES)
def test_an_adapter_whose_base_is_not_here_says_so(case, program, model, tmp_path, monkeypatch):
    base, expected = BASES[case]
    adapter = save_adapter(model, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    message = run(program, monkeypatch, "--peft_path", adapter, *answer_flags(program, tmp_path))
    assert message.startswith(f"error: --peft_path {adapter}: {expected}") and "--model_path" in message
    assert len(message.splitlines()) == 2
    flags = ["--peft_path", adapter, "--model_path", model, *answer_flags(program, tmp_path)]
    assert run(program, monkeypatch, *flags) == ""


@pytest.mark.parametrize("program", [test_sample, evaluate, merge_lora])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_that_changed_its_base_is_refused_by_the_way_it_was_made(
    init, program, model, tmp_path, monkeypatch
):
    """Also with --verify False: no check of logits is needed to see it."""
    adapter = save_adapter(model, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", init_lora_weights=init)
    flags = ["--peft_path", adapter, *answer_flags(program, tmp_path)]
    if program is merge_lora:
        flags += ["--verify", "False"]
    message = run(program, monkeypatch, *flags)
    assert f"--peft_path {adapter}: it was made with init_lora_weights {init}" in message
    assert "path_initial_model_for_weight_conversion" in message
    assert not (tmp_path / "out").exists()


def test_pissa_that_was_converted_is_merged(model, tmp_path, monkeypatch):
    """Made, trained and converted by PEFT, against the trained model itself."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "start")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
    assert run(merge_lora, monkeypatch, "--peft_path", tmp_path / "adapter", "--output", tmp_path / "out") == ""
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def save_tokenizer_with(folder: Path, *tokens) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.add_special_tokens({"pad_token": tokens[0], "additional_special_tokens": list(tokens[1:])})
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("program", [test_sample, evaluate, merge_lora])
@pytest.mark.parametrize("tokens", [("[PAD]",), ("<pad>", "<|im_start|>", "<|im_end|>")])
def test_a_tokenizer_that_got_tokens_which_the_model_did_not_get_is_no_obstacle(
    tokens, program, model, tmp_path, monkeypatch, capsys
):
    """Axolotl, Unsloth and llama-recipes add a pad token; the base's ids are the same."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    adapter = save_adapter(model, tmp_path / "adapter")
    plain = run(program, monkeypatch, "--peft_path", adapter, *answer_flags(program, tmp_path))
    printed = capsys.readouterr().out.partition("\n")[2]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    save_tokenizer_with(adapter, *tokens)
    assert run(program, monkeypatch, "--peft_path", adapter, *answer_flags(program, tmp_path)) == plain == ""
    assert program is merge_lora or capsys.readouterr().out.partition("\n")[2] == printed
    message = run(test_sample, monkeypatch, "--peft_path", adapter, "--prompt", f"Hi {tokens[-1]}")
    assert f"{tokens[-1]!r} has id {299 + len(tokens)}, and the model has embeddings for 300 ids only" in message


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_with_a_larger_vocabulary_of_its_own_is_used_and_merged(
    modules_to_save, tied, tmp_path, monkeypatch, capsys
):
    """Three new tokens, trained rows saved with the adapter: the model gets them when it is loaded."""
    model = save_tiny_model(tmp_path / "model", tied=tied)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(303, mean_resizing=False)
    base.get_input_embeddings().weight.data[300:] = torch.randn(3, 32)
    adapter = save_adapter(model, tmp_path / "adapter", base, modules_to_save=modules_to_save)
    save_tokenizer_with(adapter, "[PAD]", "<|a|>", "<|b|>")
    expected = base.eval()
    flags = ["--prompt", "Red <|a|> eye <|b|>?", "--max_new_tokens", 12]
    assert run(test_sample, monkeypatch, "--peft_path", adapter, *flags) == ""
    answer = capsys.readouterr().out.partition("answer:   ")[2]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("Red <|a|> eye <|b|>?\n").input_ids
    assert ids.count(301) == ids.count(302) == 1
    (own_answer,) = test_sample.generate(expected, tokenizer, [ids], 12)
    assert answer.startswith(tokenizer.decode(own_answer, skip_special_tokens=True))
    assert run(merge_lora, monkeypatch, "--peft_path", adapter, "--output", tmp_path / "out") == ""
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.config.vocab_size == 303
    with torch.no_grad():
        found = merged(torch.tensor([ids])).logits
        assert torch.allclose(found, expected(torch.tensor([ids])).logits, rtol=1e-3, atol=1e-4)


def test_new_tokens_without_their_weights_are_refused(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    base.resize_token_embeddings(303, mean_resizing=False)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    message = run(test_sample, monkeypatch, "--peft_path", tmp_path / "adapter", "--prompt", "a")
    assert "it was trained with 303 tokens" in message and "not in its file" in message


OTHER_TYPES = {
    "IA3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "LOHA": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=8),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_adapters_of_other_types_answer_and_are_not_merged_for_the_true_reason(kind, model, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, OTHER_TYPES[kind]).save_pretrained(tmp_path / "adapter")
    flags = ["--peft_path", tmp_path / "adapter", "--model_path", model]
    assert run(test_sample, monkeypatch, *flags, "--prompt", "Red eye?", "--max_new_tokens", 2) == ""
    message = run(merge_lora, monkeypatch, *flags, "--output", tmp_path / "out")
    assert f"a {kind} adapter is not merged by this tool, only LORA; use PEFT's merge_and_unload" in message


WRONG_ADAPTERS = {
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "no adapter_config.json in it; name the folder of an adapter",
    ),
    "broken config": (replace_bytes("adapter_config.json", lambda whole: whole[:30]), "adapter_config.json is damaged"),
    "unknown type": (
        lambda folder: change_json(folder / "adapter_config.json", peft_type="LORA_OF_2030"),
        "adapter_config.json is damaged or of a newer PEFT",
    ),
    "lfs": (replace_bytes("adapter_model.safetensors", lambda whole: LFS), "adapter_model.safetensors is a Git LFS"),
    "cut off": (
        replace_bytes("adapter_model.safetensors", lambda whole: whole[:-8]),
        "adapter_model.safetensors is cut off",
    ),
    "empty": (
        lambda folder: save_file({}, folder / "adapter_model.safetensors"),
        "its adapter_model.safetensors holds no tensor",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors in it; name",
    ),
    "one half": (
        lambda folder: save_file(
            {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "layers.1" not in n},
            folder / "adapter_model.safetensors",
        ),
        "it lacks base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "names of another program": (
        lambda folder: save_file(
            {f"module.{n}": t for n, t in load_file(folder / "adapter_model.safetensors").items()},
            folder / "adapter_model.safetensors",
        ),
        "its tensor module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has no place on --model_path",
    ),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_an_adapter_that_is_not_whole_is_refused_by_name_and_reason(case, model, tmp_path, monkeypatch):
    damage, expected = WRONG_ADAPTERS[case]
    adapter = save_adapter(model, tmp_path / "adapter")
    damage(adapter)
    message = run(test_sample, monkeypatch, "--peft_path", adapter, "--prompt", "a")
    assert message.startswith(f"error: --peft_path {adapter}: {expected}")
    assert len(message.splitlines()) == 2


def test_a_pickled_adapter_is_refused_with_a_command_that_converts_it(model, tmp_path, monkeypatch):
    adapter = save_adapter(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    message = run(test_sample, monkeypatch, "--peft_path", adapter, "--prompt", "a")
    command = shlex.split(message.splitlines()[0].partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    found = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_model_and_adapter_that_were_mixed_up_are_told_the_right_flag(model, tmp_path, monkeypatch):
    adapter = save_adapter(model, tmp_path / "adapter")
    message = run(evaluate, monkeypatch, "--model_path", adapter, *answer_flags(evaluate, tmp_path))
    assert message.startswith(f"error: --model_path {adapter}: it holds an adapter")
    assert f"--peft_path {adapter}" in message
    message = run(test_sample, monkeypatch, "--peft_path", model, "--prompt", "a")
    assert f"--peft_path {model}: no adapter_config.json in it, but a whole model; name it with --model_path" in message


def test_the_adapter_that_finished_last_is_the_newest(tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    assert loading.find_newest_adapter() is None
    for number, name in enumerate(("first", "last", "full", "interrupted")):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        if name != "full":
            (folder / "adapter_config.json").write_text("{}")
        if name != "interrupted":
            (folder / "run.json").write_text("{}")
            os.utime(folder / "run.json", (1000 + number, 1000 + number))
    assert loading.find_newest_adapter() == "outputs/last"


def test_a_path_with_a_tilde_is_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_adapter(model, tmp_path / "adapter")
    assert loading.open_model("~/model", "~/adapter").peft_path == str(tmp_path / "adapter")
    assert f"--model_path {tmp_path}/none: no such folder" in run(test_sample, monkeypatch, "--model_path", "~/none")
