"""Situations that people reported publicly, rebuilt with tiny models: each is right, or one clear refusal.

The fix of each kind has tests of its own, where the code is; here the whole programs run, as those people ran them.

    .venv/bin/python -m pytest -m slow tests/test_reported_runs.py -rP        # prints what each program says at its end
"""

import importlib.util
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from harness import history_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("reported runs")]
FLAGS = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--per_device_train_batch_size", 3]
SCRIPTS = ["finetune_pp", "finetune_pp_peft", "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora",
           "finetune_pp_peft_trainer_deepspeed", "finetune_pp_1f1b"]  # fmt: skip
SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
         "eos_token_id": 2, "max_position_embeddings": 256, "pad_token_id": None}  # fmt: skip
GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=64),
    "mixtral": transformers.MixtralConfig(**SMALL, **GATED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, **GATED, **EXPERTS, head_dim=8),
    "olmoe": transformers.OlmoeConfig(**SMALL, **GATED, num_experts=4, num_experts_per_tok=2),
    "opt": transformers.OPTConfig(**SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt2": transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),  # fmt: skip
    "gemma2": transformers.Gemma2Config(**SMALL | GATED, head_dim=8, sliding_window=8),
    "mistral": transformers.MistralConfig(**SMALL, **GATED, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SMALL | GATED, head_dim=8, sliding_window=8),
}


class Parts:
    """Models, adapters and sets by name, made when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.out = folder / "out"
        self.rows = save_rows(random_rows(12), folder / "rows", {"sha256": "rows", "targets": 100})

    def model(self, name: str, change=None, base: str = "llama") -> Path:
        """A model; with `change`, a copy of another whose folder was changed."""
        folder = self.folder / "m" / name
        if folder.exists():
            return folder
        if change:
            shutil.copytree(self.model(base), folder)
            change(folder)
        elif name in CONFIGS:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
        else:
            save_tiny_model(folder, tied=name.endswith("tied"))
        return folder

    def adapter(self, name: str, change=None, **options) -> Path:
        folder = self.folder / "a" / name
        if not folder.exists():
            settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
            model = AutoModelForCausalLM.from_pretrained(self.model("llama"))
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
            adapted.save_pretrained(folder)
            if change:
                change(folder)
        return folder

    def train(self, script: str, model: Path, *flags, out: Path | None = None, check: bool = False):
        flags = ["--model_path", model, "--dataset_path", self.rows, "--max_steps", 2, *FLAGS, *flags]
        out = out or self.out / script
        return run_script(f"{script}.py", *flags, "--output_dir", out, check=check)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts(tmp_path_factory.mktemp("reported"))


@pytest.fixture(autouse=True)
def clean(parts):
    yield
    shutil.rmtree(parts.out, ignore_errors=True)


def tensors(change):
    """A change of a model's tensors."""

    def apply(folder: Path) -> None:
        changed = change(load_file(folder / "model.safetensors"))
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def settings(name: str, **changes):
    """A change of a JSON file; None deletes."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value != "DELETE"}))

    return apply


def assert_trained(completed, out: Path) -> None:
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert (out / "run.json").is_file() and weights_of_any(out)
    print("trained", completed.stdout.splitlines()[-1])


def weights_of_any(out: Path) -> dict:
    found = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_refused(completed, *words: str) -> None:
    """One message, no traceback, and all of the words in it."""
    text = completed.stderr
    assert completed.returncode == 1, completed.stdout + text
    assert "Traceback" not in text, text[-3000:]
    for word in words:
        assert word in text, text[-3000:]
    print(next((line for line in text.splitlines() if line.startswith("error")), text.splitlines()[-1])[:300])


# --- K1, K2: what is trained can be saved; a check that refuses is right -----------------------------------------


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("script", ["finetune_pp", "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_deepspeed"])
def test_1_2_families_that_are_saved_under_other_names(name, script, parts):
    """Trained, saved, resumed and loaded again, with default flags; experts are fused in memory and not on disk."""
    flags = ["--deepspeed", "ds_configs/zero2.json"] if "deepspeed" in script else []
    out = parts.out / script
    assert_trained(parts.train(script, parts.model(name), *flags), out)
    again = parts.train(script, parts.model(name), *flags, "--max_steps", 3, "--resume_from_checkpoint", "True")
    assert_trained(again, out)
    assert [row["step"] for row in history_of(out)] == [1, 2, 3]
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]


def test_3_dropout_of_an_adapter_on_experts(parts):
    completed = parts.train("finetune_pp_peft", parts.model("mixtral"))
    assert_refused(completed, "--lora_dropout")
    assert_trained(parts.train("finetune_pp_peft", parts.model("mixtral"), "--lora_dropout", 0),
                   parts.out / "finetune_pp_peft")  # fmt: skip


def test_4_a_model_that_finds_positions_by_itself(parts):
    """transformers 5.23 gives OPT the positions that it is passed, so its rows can be joined."""
    out = parts.out / "finetune_pp"
    joined = parts.train("finetune_pp", parts.model("opt"))
    assert_trained(joined, out)
    losses = [row["loss"] for row in history_of(out)]
    assert_trained(parts.train("finetune_pp", parts.model("opt"), "--padding_free", "False"), out)
    assert losses == pytest.approx([row["loss"] for row in history_of(out)], rel=1e-5)


# --- K3: embedding and head as targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    "script", ["finetune_pp_peft", "finetune_pp_peft_trainer_lora", "zero2", "zero3", "finetune_pp_1f1b"]
)
def test_5_6_an_adapter_on_the_head(script, model, parts):
    flags = ["--lora_target_modules", "q_proj,lm_head"]
    name = script
    if script.startswith("zero"):
        name = "finetune_pp_peft_trainer_deepspeed"
        flags += ["--lora_used", "True", "--deepspeed", f"ds_configs/{script}.json"]
    if script == "finetune_pp_1f1b":
        flags += ["--lora_used", "True"]
    completed = parts.train(name, parts.model(model), *flags)
    out = parts.out / name
    if script == "finetune_pp_1f1b":  # the head is on one stage only
        assert_refused(completed, "--lora_target_modules", "lm_head is no part of every layer")
        return
    assert_trained(completed, out)
    merged = run_script("tools/merge_lora.py", "--peft_path", out, "--output", parts.out / "merged", check=False)
    assert merged.returncode == 0, merged.stderr
    config = json.loads((parts.out / "merged" / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    print(merged.stdout.splitlines()[-1])


# --- K4, K5: a model folder is whole, and can be used, or is refused ---------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NOT_WHOLE = {
    "8 no head": (tensors(lambda all: {k: v for k, v in all.items() if k != "lm_head.weight"}), "lm_head.weight"),
    "8 prefix": (tensors(lambda all: {f"_orig_mod.{k}": v for k, v in all.items()}), "lm_head.weight"),
    "9 lfs": (lambda folder: (folder / "model.safetensors").write_bytes(LFS), "model.safetensors"),
    "9 cut off": (cut, "model.safetensors"),
    "11 pickle": (to_pickle, "pytorch_model.bin"),
    "15 own code": (
        settings("config.json", auto_map={"AutoConfig": "conf.C", "AutoModelForCausalLM": "mod.M"}, model_type="mine"),
        "its model is code of its own",
    ),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_8_to_15_a_folder_that_is_not_a_whole_model(case, parts):
    change, word = NOT_WHOLE[case]
    model = parts.model(case.replace(" ", "_"), change)
    for script in SCRIPTS:
        assert_refused(parts.train(script, model), "--model_path", word)
        assert not (parts.out / script).exists(), script
    programs = {
        "test_sample.py": ["--prompt", "Hi"],
        "tools/evaluate.py": ["--dataset_path", parts.rows],
        "tools/merge_lora.py": ["--gguf", "f16", "--output", parts.out / "x"],
    }
    for program, flags in programs.items():
        assert_refused(run_script(program, "--model_path", model, *flags, check=False), "--model_path", word)
    doctor = run_script("tools/doctor.py", "--", "finetune_pp_peft.py", "--model_path", model, "--dataset_path",
                        parts.rows, *FLAGS, "--output_dir", parts.out / "d", check=False)  # fmt: skip
    assert doctor.returncode != 0 and "all is well" not in doctor.stdout


def test_13_a_multimodal_model(parts):
    def save(folder):
        text = {**SMALL, **GATED, "head_dim": 8}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)

    model = parts.model("gemma3mm", save)
    for script in SCRIPTS:
        assert_refused(parts.train(script, model), "--model_path", "gemma3 is no model of text alone")


# --- K6, K7: nothing is skipped or trained in silence ------------------------------------------------------------


@pytest.mark.parametrize("script", ["finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora", "finetune_pp_1f1b"])
def test_16_half_an_environment_of_a_launcher(script, parts):
    flags = [
        "--model_path",
        parts.model("llama"),
        "--dataset_path",
        parts.rows,
        *FLAGS,
        "--output_dir",
        parts.out / "w",
    ]
    assert_refused(run_script(f"{script}.py", *flags, check=False, WORLD_SIZE="4"), "WORLD_SIZE")


def test_18_19_20_steps_that_train_nothing(parts):
    """More in test_schedule.py."""
    few = parts.train("finetune_pp", parts.model("llama"), "--max_steps", -1, "--gradient_accumulation_steps", 16)
    assert_trained(few, parts.out / "finetune_pp")
    assert "1 optimizer steps of 48 rows, 0 of them at rate 0" in few.stdout and "there are 12 rows" in few.stdout
    assert history_of(parts.out / "finetune_pp")[0]["learning_rate"] == 2e-5
    late = parts.train("finetune_pp_peft", parts.model("llama"), "--warmup_steps", 100)
    assert "warning: that is below --learning_rate" in late.stdout


# --- K8: evaluation sees what training saw -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "llama"])
def test_22_23_windows_and_caps(name, parts):
    """The loss of a set does not depend on the rows of a forward."""
    losses = []
    for batch_size in (1, 5):
        flags = ["--model_path", parts.model(name), "--dataset_path", parts.rows, "--use_cpu", "True"]
        flags += ["--per_device_eval_batch_size", batch_size]
        scored = run_script("tools/evaluate.py", *flags, check=False)
        assert scored.returncode == 0, scored.stderr
        losses.append(scored.stdout)
    assert losses[0] == losses[1], losses
    print(losses[0].splitlines()[-1])


# --- K10: adapters made by other tools ---------------------------------------------------------------------------

USERS = {
    "test_sample": ["test_sample.py", "--prompt", "Hi", "--max_new_tokens", 2],
    "evaluate": ["tools/evaluate.py"],
    "merge_lora": ["tools/merge_lora.py"],
}


@pytest.mark.parametrize(
    ("case", "base", "words"),
    [
        ("36 null", None, ("--model_path",)),
        ("36 no key", "DELETE", ("--model_path",)),
        ("37 missing", "/home/me/models/llama", ("/home/me/models/llama", "--model_path")),
        ("37 hub", "somebody/llama-7b", ("somebody/llama-7b", "--model_path")),
        ("37 empty", "", ("--model_path",)),
    ],
)
def test_36_37_an_adapter_whose_base_is_not_here(case, base, words, parts):
    adapter = parts.adapter(case.replace(" ", "_"), settings("adapter_config.json", base_model_name_or_path=base))
    for name, command in USERS.items():
        flags = ["--peft_path", adapter]
        flags += {"evaluate": ["--dataset_path", parts.rows], "merge_lora": ["--output", parts.out / "x"]}.get(name, [])
        assert_refused(run_script(*command, *flags, check=False), *words)


def test_31_a_tokenizer_with_a_pad_token_of_its_own(parts):
    def add_pad(folder):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)

    adapter = parts.adapter("padtok", add_pad)
    answered = run_script(*USERS["test_sample"], "--peft_path", adapter, check=False)
    assert answered.returncode == 0, answered.stderr
    merged = run_script("tools/merge_lora.py", "--peft_path", adapter, "--output", parts.out / "x", check=False)
    assert merged.returncode == 0, merged.stderr


def test_34_pissa(parts):
    adapter = parts.adapter("pissa", init_lora_weights="pissa")
    for flags in ([], ["--verify", "False"]):
        merged = run_script("tools/merge_lora.py", "--peft_path", adapter, "--output", parts.out / "x", *flags,
                            check=False)  # fmt: skip
        assert_refused(merged, "pissa")
    assert_refused(run_script(*USERS["test_sample"], "--peft_path", adapter, check=False), "pissa")


def test_38_39_training_goes_on_from_an_adapter(parts):
    def widen(folder):
        wide = {name: torch.zeros(2 * tensor.shape[0], tensor.shape[1])
                for name, tensor in load_file(folder / "adapter_model.safetensors").items()}  # fmt: skip
        save_file(wide, folder / "adapter_model.safetensors")

    other = parts.train("finetune_pp_peft", parts.model("llama"), "--peft_path", parts.adapter("wide", widen))
    assert_refused(other, "--peft_path")
    flags = ["--lora_rank", 64, "--lora_alpha", 128, "--lora_dropout", 0.5]
    said = parts.train("finetune_pp_peft", parts.model("llama"), "--peft_path", parts.adapter("plain"), *flags)
    out = parts.out / "finetune_pp_peft"
    assert_trained(said, out)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    receipt = json.loads((out / "run.json").read_text())["arguments"]
    assert (receipt["lora_rank"], receipt["lora_alpha"]) == (4, 8), receipt
    assert "--lora_rank" in said.stdout + said.stderr


# --- K11 to K13 --------------------------------------------------------------------------------------------------


def test_41_an_adapter_as_the_model(parts):
    adapter = parts.adapter("plain")
    scored = run_script("tools/evaluate.py", "--model_path", adapter, "--dataset_path", parts.rows, check=False)
    assert_refused(scored, "--model_path", "--peft_path")


def test_42_a_template_without_a_system_role(parts):
    def add_template(folder):
        (folder / "chat_template.jinja").write_text(
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for message in messages %}{{ message.content }}\n{% endfor %}"
        )

    model = parts.model("t_gemma", add_template)
    refused = run_script("test_sample.py", "--model_path", model, "--prompt", "Hi", "--system", "Be brief", check=False)
    assert_refused(refused, "System role not supported")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_46_rows_beyond_the_context(name, parts):
    longest = 300 if name == "llama" else 100
    rows = save_rows(random_rows(6, shortest=longest, longest=longest), parts.folder / f"long-{name}")
    for script in SCRIPTS:
        if name == "gpt2" and script == "finetune_pp_1f1b":
            continue  # a pipeline takes LLaMA-like models only
        completed = parts.train(script, parts.model(name), "--dataset_path", rows)
        assert_refused(completed, "--dataset_path", f"a row has {longest} tokens, and the model can attend to")
    doctor = run_script("tools/doctor.py", "--", "finetune_pp_peft.py", "--model_path", parts.model(name),
                        "--dataset_path", rows, *FLAGS, "--output_dir", parts.out / "d", check=False)  # fmt: skip
    assert doctor.returncode != 0 and "all is well" not in doctor.stdout


def test_47_48_what_llama_cpp_does_not_know(parts):
    def add_frequencies(all):
        return all | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}

    plain = run_script("tools/merge_lora.py", "--model_path", parts.model("llama"), "--gguf", "f16", "--output",
                       parts.out / "plain", check=False)  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    model = parts.model("w_invfreq", tensors(add_frequencies))
    exported = run_script("tools/merge_lora.py", "--model_path", model, "--gguf", "f16", "--output", parts.out / "inv",
                          check=False)  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    sizes = [next((parts.out / name).glob("*.gguf")).stat().st_size for name in ("plain", "inv")]
    assert abs(sizes[0] - sizes[1]) < 512  # the names of the folders, and no tensor more

    def add_templates(folder):
        templates = [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "tool_use", "template": "x"},
        ]
        settings("tokenizer_config.json", chat_template=templates)(folder)

    several = run_script("tools/merge_lora.py", "--model_path", parts.model("g_templates", add_templates), "--gguf",
                         "f16", "--output", parts.out / "several", check=False)  # fmt: skip
    assert several.returncode == 0, several.stderr


def test_52_deepspeed_is_not_installed(parts, monkeypatch, capsys):
    script = importlib.import_module("finetune_pp_peft_trainer_deepspeed")
    find_spec = importlib.util.find_spec

    def find_all_but_deepspeed(name, *rest):
        if name == "deepspeed":
            return None
        return find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_deepspeed)
    args = script.Arguments(model_path=str(parts.model("llama")), dataset_path=str(parts.rows), use_cpu=True)
    with pytest.raises(ValueError, match="DeepSpeed is missing; DS_BUILD_OPS=0 pip install") as refused:
        script.check_arguments(args)
    print(refused.value)
