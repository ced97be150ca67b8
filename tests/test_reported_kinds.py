"""Other members of the kinds of test_reported_runs.py: situations that nobody has reported yet (slow).

    .venv/bin/python -m pytest -m slow tests/test_reported_kinds.py -rP

What the programs that serve and judge say of a broken folder is in test_loading.py; the same folders are given to the
training scripts here, each to another script in turn.
"""

import json
import shutil

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from harness import history_of
from test_loading import LFS, WRONG_ADAPTERS, WRONG_FILES, WRONG_TENSORS
from test_reported_runs import (
    FLAGS,
    GATED,
    SCRIPTS,
    SMALL,
    USERS,
    Parts,
    assert_refused,
    assert_trained,
    settings,
    tensors,
)
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reported kinds")]
LORA_SCRIPTS = ["finetune_pp_peft", "finetune_pp_peft_trainer_lora", "finetune_pp_peft_trainer_deepspeed"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(autouse=True)
def clean(parts):
    yield
    shutil.rmtree(parts.out, ignore_errors=True)


def of_family(family: str, **sizes):
    """A change of a copied model: another family in the same folder."""

    def save(folder) -> None:
        torch.manual_seed(0)
        (folder / "model.safetensors").unlink()
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(folder)

    return save


def turn(cases, options) -> list:
    """Each case with the next of the options."""
    options = list(options)
    return [(case, options[i % len(options)]) for i, case in enumerate(cases)]


# --- K2: a check that refuses is right ---------------------------------------------------------------------------

WITHOUT_POSITIONS = {
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
}


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_models_whose_positions_cannot_begin_again_are_refused_in_one_line_with_a_remedy_that_works(family, parts):
    """ALiBi counts distances from the mask of the whole row."""
    model = parts.model(family, of_family(family, **WITHOUT_POSITIONS[family]))
    completed = parts.train("finetune_pp", model)
    out = parts.out / "finetune_pp"
    if completed.returncode:
        assert_refused(completed, "--padding_free False")
    else:  # this version of transformers reads the positions that it is passed: then joining is right
        assert_trained(completed, out)
        losses = [row["loss"] for row in history_of(out)]
    padded = parts.train("finetune_pp", model, "--padding_free", "False")
    assert_trained(padded, out)
    if completed.returncode == 0:
        assert losses == pytest.approx([row["loss"] for row in history_of(out)], rel=1e-5)


@pytest.mark.parametrize("script", LORA_SCRIPTS)
def test_dropout_of_an_adapter_on_experts_names_its_flag_in_each_script(script, parts):
    flags = ["--lora_used", "True"] if "deepspeed" in script else []
    assert_refused(parts.train(script, parts.model("qwen3_moe"), *flags), "--lora_dropout")
    assert not (parts.out / script).exists()


# --- K3: the embedding, and both ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "llama_tied"])
@pytest.mark.parametrize("targets", ["q_proj,embed_tokens", "embed_tokens,lm_head"])
@pytest.mark.parametrize("script", ["finetune_pp_peft", "finetune_pp_peft_trainer_lora", "zero2", "zero3"])
def test_an_adapter_on_the_embedding_is_saved_resumed_and_merged(script, targets, model, parts):
    flags = ["--lora_target_modules", targets]
    name = script
    if script.startswith("zero"):
        name = "finetune_pp_peft_trainer_deepspeed"
        flags += ["--lora_used", "True", "--deepspeed", f"ds_configs/{script}.json"]
    completed = parts.train(name, parts.model(model), *flags)
    out = parts.out / name
    assert_trained(completed, out)
    resume = ["--max_steps", 3, "--resume_from_checkpoint", "True"]
    assert_trained(parts.train(name, parts.model(model), *flags, *resume), out)
    assert [row["step"] for row in history_of(out)] == [1, 2, 3]
    merged = run_script("tools/merge_lora.py", "--peft_path", out, "--output", parts.out / "merged", check=False)
    assert merged.returncode == 0, merged.stderr
    assert not json.loads((parts.out / "merged" / "config.json").read_text())["tie_word_embeddings"]


# --- K4: a model folder is whole ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "script"), [(case, script) for case in WRONG_TENSORS for script in SCRIPTS])
def test_a_model_with_other_tensors_is_one_message_of_training(case, script, parts):
    model = parts.model(f"tensors_{case.replace(' ', '_')}", tensors(WRONG_TENSORS[case][0]))
    assert_refused(parts.train(script, model), "--model_path")
    assert not (parts.out / script).exists()


@pytest.mark.parametrize(("case", "script"), turn(WRONG_FILES, SCRIPTS))
def test_a_model_with_broken_files_is_one_message_of_training(case, script, parts):
    model = parts.model(f"files_{case.replace(' ', '_')}", WRONG_FILES[case][0])
    assert_refused(parts.train(script, model), "--model_path")
    assert not (parts.out / script).exists()


def split(folder) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def without_a_shard(folder) -> None:
    split(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def without_the_index(folder) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").unlink()


def with_a_shard_of_lfs(folder) -> None:
    split(folder)
    sorted(folder.glob("model-*.safetensors"))[-1].write_bytes(LFS)


SHARDED = {"a shard": without_a_shard, "the index": without_the_index, "lfs": with_a_shard_of_lfs}


@pytest.mark.parametrize(("case", "script"), [(case, script) for case in SHARDED for script in SCRIPTS])
def test_a_sharded_model_that_lacks_a_file_is_one_message_of_training(case, script, parts):
    model = parts.model(f"sharded_{case.replace(' ', '_')}", SHARDED[case])
    assert_refused(parts.train(script, model), "--model_path")
    assert not (parts.out / script).exists()


# --- K5: not a plain dense text model ----------------------------------------------------------------------------


def save_llava(folder) -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=SMALL | GATED | {"model_type": "llama"})
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def save_t5(folder) -> None:
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def save_bert(folder) -> None:
    config = transformers.BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def quantised_by(method: str):
    return settings("config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 32})


OTHER_MODELS = {
    "llava": save_llava,
    "t5": save_t5,
    "bert": save_bert,
    "gptq": quantised_by("gptq"),
    "awq": quantised_by("awq"),
    "compressed-tensors": quantised_by("compressed-tensors"),
    "a method of 2030": quantised_by("nobody-knows"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_models_that_cannot_be_trained_here_are_one_message(case, parts):
    model = parts.model(case.replace(" ", "_"), OTHER_MODELS[case])
    for script in SCRIPTS:
        assert_refused(parts.train(script, model), "--model_path")
        assert not (parts.out / script).exists(), script


def test_12_a_base_that_is_quantised_on_disk(parts):
    """A bitsandbytes folder, as Unsloth has many: adapters are trained on it and used; nothing else."""
    pytest.importorskip("bitsandbytes")
    quantised = parts.folder / "m" / "bnb4"
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        parts.model("llama"), quantization_config=config, device_map={"": "cpu"}
    )
    base.save_pretrained(quantised)
    make_tokenizer().save_pretrained(quantised)
    shared = ["--model_path", quantised, "--dataset_path", parts.rows, "--max_steps", 2, *FLAGS]
    losses = []
    trainers = {"peft": ("finetune_pp_peft.py", [])}
    for stage in ("zero2", "zero3"):
        flags = ["--lora_used", "True", "--deepspeed", f"ds_configs/{stage}.json"]
        trainers[stage] = ("finetune_pp_peft_trainer_deepspeed.py", flags)
    for name, (script, flags) in trainers.items():
        out = parts.out / name
        completed = run_script(script, *shared, *flags, "--lora_dropout", 0, "--output_dir", out, check=False,
                               PYTHONPATH="")  # fmt: skip
        assert_trained(completed, out)
        losses.append([row["loss"] for row in history_of(out)])
        answer = run_script(*USERS["test_sample"], "--peft_path", out, check=False, PYTHONPATH="")
        assert answer.returncode == 0, answer.stderr
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    scored = run_script("tools/evaluate.py", "--model_path", quantised, "--dataset_path", parts.rows, check=False,
                        PYTHONPATH="")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    refusing = [name for name in SCRIPTS if name != "finetune_pp_peft"]
    for script in refusing:
        refused = run_script(f"{script}.py", *shared, "--output_dir", parts.out / "x", check=False, PYTHONPATH="")
        assert_refused(refused, "--model_path", "its weights are quantised")
        assert not (parts.out / "x").exists()


def test_a_quantised_base_without_the_package_is_one_message(parts):
    """tests/without_bitsandbytes hides it."""
    model = parts.model("bnb_config", settings("config.json", quantization_config={
        "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}))  # fmt: skip
    assert_refused(parts.train("finetune_pp_peft", model), "--model_path", "its weights are quantised", "bitsandbytes")


# --- K6: half an environment of a launcher -----------------------------------------------------------------------


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "trainer" in script or "1f1b" in script])
@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "0", "MASTER_PORT": "29500"}])
def test_any_half_of_a_launchers_environment_is_one_message(environment, script, parts):
    flags = ["--model_path", parts.model("llama"), "--dataset_path", parts.rows, *FLAGS, "--output_dir", parts.out]
    assert_refused(run_script(f"{script}.py", *flags, check=False, **environment), "RANK is set and")


# --- K10: adapters to go on from ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "script"), turn(WRONG_ADAPTERS, LORA_SCRIPTS))
def test_an_adapter_that_is_not_whole_is_one_message_of_training(case, script, parts):
    adapter = parts.adapter(f"wrong_{case.replace(' ', '_')}", WRONG_ADAPTERS[case][0])
    flags = ["--lora_used", "True"] if "deepspeed" in script else []
    assert_refused(parts.train(script, parts.model("llama"), "--peft_path", adapter, *flags), "--peft_path")
    assert not (parts.out / script).exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("loha", peft.LoHaConfig(target_modules=["q_proj"], r=4)),
        ("ia3", peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        ("prompt", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ],
)
def test_an_adapter_of_another_type_to_go_on_from_is_one_message(kind, options, parts):
    folder = parts.folder / "a" / kind
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(parts.model("llama")), options).save_pretrained(folder)
    for script in LORA_SCRIPTS:
        flags = ["--lora_used", "True"] if "deepspeed" in script else []
        assert_refused(parts.train(script, parts.model("llama"), "--peft_path", folder, *flags), "--peft_path")
        assert not (parts.out / script).exists(), script


# --- K12: the context --------------------------------------------------------------------------------------------


def test_rows_beyond_a_context_that_has_another_name(parts):
    """MPT's is max_seq_len, GPT-J's n_positions."""
    rows = save_rows(random_rows(4, shortest=80, longest=80), parts.folder / "rows of 80")
    sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    models = {"gptj": sizes, "mpt": WITHOUT_POSITIONS["mpt"] | {"max_seq_len": 64}}
    for family, sizes in models.items():
        model = parts.model(f"short_{family}", of_family(family, **sizes))
        completed = parts.train(
            "finetune_pp_peft", model, "--dataset_path", rows, "--lora_target_modules", "all-linear"
        )
        assert_refused(completed, "--dataset_path", "a row has 80 tokens, and the model can attend to")


def test_a_context_that_is_scaled_is_the_scaled_one(parts):
    """YaRN and its like: max_position_embeddings is already the extended length."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    rows = save_rows(random_rows(4, shortest=80, longest=80), parts.folder / "rows of 80 again")
    model = parts.folder / "m" / "yarn"
    save_tiny_model(model)
    settings("config.json", rope_parameters=rope, max_position_embeddings=256)(model)
    assert_trained(parts.train("finetune_pp_peft", model, "--dataset_path", rows), parts.out / "finetune_pp_peft")
