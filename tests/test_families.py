"""Model families beside LLaMA, by transformers' names: joined rows give what one document at a time gives (slow).

    .venv/bin/python -m pytest -m slow tests/test_families.py

Each is trained by finetune_pp.py: once with the rows of a step joined into one, once with one row per micro-batch. The
second never joins anything, so a token that saw another document, a window that was lost or a position that did not
begin at 0 shows in the loss and in the weights.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, random_rows, run_script, save_rows
from harness import history_of, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("families")]
NUM_ROWS = 6
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 8}  # rows have up to 24 tokens
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = GATED | {"head_dim": 8}
FAMILIES = {
    "llama": GATED,
    "mistral": GATED | WINDOW,
    "qwen2": GATED | WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": GATED | {"head_dim": 8},
    "gemma": GEMMA,
    "gemma2": GEMMA | WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | WINDOW | {"query_pre_attn_scalar": 8},
    "cohere2": GATED | WINDOW,
    "granite": GATED | {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "glm4": GATED | {"head_dim": 8},
    "olmo2": GATED,
    "phi": SIZES | {"intermediate_size": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": GATED | WINDOW | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 256},
    "stablelm": GATED | {"use_qkv_bias": True},
    "starcoder2": GATED | WINDOW | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "gpt2": GPT2,
    "gpt_neox": SIZES | {"intermediate_size": 64},
    "gptj": GPT2 | {"rotary_dim": 4},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": GATED | EXPERTS,
    "qwen3_moe": GATED | EXPERTS | {"moe_intermediate_size": 32, "head_dim": 8},
    "olmoe": GATED | EXPERTS,
}
# Other families that transformers saves under other names than it has in memory
OTHER_MIXTURES = {
    "qwen2_moe": GATED | EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "deepseek_v3": GATED
    | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "rope_interleave": True}
    | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "glm4_moe": GATED
    | {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "ernie4_5_moe": GATED
    | {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1},
}
# What is added to all keys alike the softmax does not see, so where positions do not turn it, the gradient is rounding,
# which AdamW makes as large as any other step. The losses see these biases.
KEY_BIASES = ("k_proj.bias", "query_key_value.bias")
FLAGS = ["--use_cpu", "True", "--bf16", "False", "--report_to", "none", "--max_steps", 2, "--learning_rate", 1e-2]


def save_model(family: str, sizes: dict, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # biases begin as zeros, which hide what they do
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return save_rows(random_rows(NUM_ROWS), tmp_path_factory.mktemp("rows") / "rows")


def train(script: str, model: Path, rows: Path, out: Path, *flags, num_processes: int = 1, check: bool = True):
    shared = ["--model_path", model, "--dataset_path", rows, "--output_dir", out, *FLAGS]
    return run_script(f"{script}.py", *shared, *flags, num_processes=num_processes, check=check)


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_rows_are_trained_like_one_document_at_a_time(family, rows, tmp_path):
    model = save_model(family, FAMILIES[family], tmp_path / "model")
    start = weights_of(model)
    train("finetune_pp", model, rows, tmp_path / "joined", "--per_device_train_batch_size", NUM_ROWS)
    one_by_one = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", NUM_ROWS]
    train("finetune_pp", model, rows, tmp_path / "alone", *one_by_one)
    joined = history_of(tmp_path / "joined")
    alone = history_of(tmp_path / "alone")
    assert [row["loss"] for row in joined] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert joined[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5)
    expected = weights_of(tmp_path / "alone")
    largest = 0
    for name, weight in weights_of(tmp_path / "joined").items():
        if name.endswith(KEY_BIASES):
            continue
        difference = torch.linalg.norm(weight - expected[name])
        distance = torch.linalg.norm(expected[name] - start[name].float())
        assert difference <= 1e-2 * distance, name
        largest = max(largest, float(difference / distance.clamp(min=1e-12)))
    print(f"{family}: weights differ by {largest:.1e} of the distance travelled")


def resume_and_reload(script: str, model: Path, rows: Path, out: Path, flags: list, num_processes: int) -> None:
    """Two steps, a third after resuming, and transformers finds every weight of the folder."""
    train(script, model, rows, out, *flags, num_processes=num_processes)
    resume = ["--max_steps", 3, "--resume_from_checkpoint", "True"]
    train(script, model, rows, out, *flags, *resume, num_processes=num_processes)
    assert [row["step"] for row in history_of(out)] == [1, 2, 3]
    if (out / "adapter_config.json").is_file():
        adapted = AutoModelForCausalLM.from_pretrained(model)
        adapted.load_adapter(out)
        return
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]


WITH_EXPERTS = {
    "plain": ("finetune_pp", [], 1),
    "plain LoRA": ("finetune_pp_peft", ["--lora_dropout", 0], 1),
    "FSDP2": ("finetune_pp_peft_trainer", [], 2),
    "FSDP2+LoRA": ("finetune_pp_peft_trainer_lora", ["--lora_dropout", 0], 2),
    "ZeRO-3": ("finetune_pp_peft_trainer_deepspeed", ["--deepspeed", "ds_configs/zero3.json"], 2),
    "1F1B": ("finetune_pp_1f1b", ["--gradient_accumulation_steps", 2], 2),
}


@pytest.mark.parametrize("strategy", WITH_EXPERTS)
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_trained_saved_resumed_and_loaded_or_refused_in_one_line(family, strategy, rows, tmp_path):
    script, flags, num_processes = WITH_EXPERTS[strategy]
    model = save_model(family, MIXTURES[family], tmp_path / "model")
    flags = ["--per_device_train_batch_size", 1, *flags]
    first = train(script, model, rows, tmp_path / "try", *flags, num_processes=num_processes, check=False)
    if first.returncode:
        assert "Traceback" not in first.stderr, first.stderr[-3000:]
        assert "error: --" in first.stderr
        assert not (tmp_path / "try").exists()
        print(strategy, family, next(line for line in first.stderr.splitlines() if line.startswith("error")))
        assert strategy == "1F1B", first.stderr
        return
    print(strategy, family, "trained")
    resume_and_reload(script, model, rows, tmp_path / "out", flags, num_processes)


@pytest.mark.parametrize("family", OTHER_MIXTURES)
def test_other_families_that_are_saved_under_other_names_are_trained_saved_and_resumed(family, rows, tmp_path):
    model = save_model(family, OTHER_MIXTURES[family], tmp_path / "model")
    resume_and_reload("finetune_pp", model, rows, tmp_path / "out", [], 1)
    shutil.rmtree(tmp_path / "out")
