"""On a GPU: losses, resuming, the kernel of attention, and that a forward waits for nothing. Skipped without one.

Two GPUs are used where two are visible. No model needs to be fetched: everything here is small and has random weights.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_rows, run_script
from preference_rows import random_pairs, save_preferences
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import data_collator
import finetune_pp
import finetune_pp_peft

NUM_GPUS = 0
if torch.cuda.is_available():
    NUM_GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU that PyTorch can use")
starts_programs = pytest.mark.processes  # tests/conftest.py finds only those that do it themselves
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason="fewer than two GPUs")

# Eight rows a step. The rate is high enough that four steps change the loss.
COMMON = ["--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-2, "--lr_scheduler_type", "constant",
          "--warmup_steps", 0, "--report_to", "none"]  # fmt: skip
PIPELINE = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
NO_DROPOUT = ["--lora_dropout", 0]
STRATEGIES = {
    "full": ["finetune_pp.py"],
    "LoRA": ["finetune_pp_peft.py", *NO_DROPOUT],
    "FSDP2 full": ["finetune_pp_peft_trainer.py"],
    "FSDP2 LoRA": ["finetune_pp_peft_trainer_lora.py", *NO_DROPOUT],
    "ZeRO-2 full": ["finetune_pp_peft_trainer_deepspeed.py", "--deepspeed", "ds_configs/zero2.json", *NO_DROPOUT],
    "ZeRO-3 full": ["finetune_pp_peft_trainer_deepspeed.py", "--deepspeed", "ds_configs/zero3.json", *NO_DROPOUT],
    "ZeRO-3 LoRA": ["finetune_pp_peft_trainer_deepspeed.py", "--deepspeed", "ds_configs/zero3.json", *NO_DROPOUT],
    "1F1B full": ["finetune_pp_1f1b.py", *PIPELINE],
    "1F1B LoRA": ["finetune_pp_1f1b.py", "--lora_used", "True", *NO_DROPOUT, *PIPELINE],
    "DPO": ["finetune_pp_dpo.py"],
    "FSDP2 DPO": ["finetune_pp_dpo_trainer.py"],
    "ZeRO-3 DPO": ["finetune_pp_dpo_trainer.py", "--deepspeed", "ds_configs/zero3.json"],
}
for name in STRATEGIES:
    if name.startswith("ZeRO"):
        STRATEGIES[name] += ["--lora_used", str("full" not in name)]
FLOAT32 = 1e-4  # a GPU sums in another order than a CPU
BF16 = 1e-2  # 8 bits of mantissa in every activation; on a CPU bf16 is 0.0013 from float32


def skip_without_deepspeed(strategy: str) -> None:
    if strategy.startswith("ZeRO"):
        pytest.importorskip("deepspeed")


@pytest.fixture(scope="session")
def train(tiny_model, tiny_set, tmp_path_factory):
    """train(out, command, *flags): the losses of a run in the folder `out`."""
    pairs = save_preferences(random_pairs(16), tmp_path_factory.mktemp("pairs") / "pairs")

    def run(out: Path, command: list, *flags, num_processes: int = 1, **environment) -> list[float]:
        script, *own = command
        data = tiny_set
        if "dpo" in script:
            data = pairs
        paths = ["--model_path", tiny_model, "--dataset_path", data, "--output_dir", out]
        run_script(script, *COMMON, *paths, *own, *flags, num_processes=num_processes, fresh=True, **environment)
        return read_losses(out)

    return run


def read_losses(out: Path) -> list[float]:
    return [row["loss"] for row in json.loads((out / "trainer_state.json").read_text())["log_history"]]


@pytest.fixture(scope="session")
def reference(train, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of the plain loops on the CPU in float32, which are those of all strategies."""
    losses = {}
    for kind in ("full", "LoRA", "DPO"):
        out = tmp_path_factory.mktemp("reference") / kind
        losses[kind] = train(out, STRATEGIES[kind], "--use_cpu", True, "--bf16", False)
        assert losses[kind][3] != pytest.approx(losses[kind][0], rel=0.01)  # else the steps would not matter
    return losses


def expected_of(strategy: str, reference: dict) -> list[float]:
    return reference[strategy.split()[-1]]


# -------------------------------------------------------------------------------------------------------------------
# Losses and resuming
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_losses_are_those_of_the_cpu_and_a_resumed_run_has_the_same(strategy, train, reference, tmp_path):
    """In bf16, as users run it; DeepSpeed knows no other here."""
    skip_without_deepspeed(strategy)
    losses = train(tmp_path / "out", STRATEGIES[strategy])
    assert losses == pytest.approx(expected_of(strategy, reference), rel=BF16)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "run.json").unlink()
    resumed = train(tmp_path / "out", STRATEGIES[strategy], "--resume_from_checkpoint", True)
    # Not bit for bit: the kernel's backward adds in any order.
    assert resumed[:2] == losses[:2] and resumed[2:] == pytest.approx(losses[2:], rel=5e-3)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not name.startswith("ZeRO")])
def test_in_float32_only_the_order_of_sums_differs(strategy, train, reference, tmp_path):
    losses = train(tmp_path / "out", STRATEGIES[strategy], "--bf16", False)
    assert losses == pytest.approx(expected_of(strategy, reference), rel=FLOAT32)


@pytest.mark.parametrize("flag", ["--gradient_checkpointing", "--torch_compile"])
@pytest.mark.parametrize("strategy", ["full", "LoRA", "FSDP2 full", "FSDP2 LoRA"])
def test_checkpointing_and_compiled_layers_change_no_loss(strategy, flag, train, reference, tmp_path):
    losses = train(tmp_path / "out", STRATEGIES[strategy], flag, True)
    assert losses == pytest.approx(expected_of(strategy, reference), rel=BF16)


@starts_programs
@pytest.mark.parametrize("mode", ["prefix", "ptuning", "prompt"])
def test_virtual_tokens_have_the_losses_of_the_cpu(mode, train, tmp_path):
    command = ["finetune_pp_peft.py", "--peft_mode", mode, "--num_virtual_tokens", 4]
    expected = train(tmp_path / "cpu", command, "--use_cpu", True, "--bf16", False)
    # The rate is high for a prefix, which acts in every layer: on a CPU bf16 is 0.011 from float32.
    assert train(tmp_path / "gpu", command) == pytest.approx(expected, rel=3 * BF16)


@starts_programs
def test_a_model_in_4_bit_learns(train, tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = ["--load_in_4bit", True]
    losses = train(tmp_path / "out", STRATEGIES["FSDP2 LoRA"], *flags, PYTHONPATH="")  # tests/ hides bitsandbytes
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)


@starts_programs
def test_use_cpu_leaves_the_gpus_alone(train, tmp_path):
    train(tmp_path / "out", STRATEGIES["full"], "--use_cpu", True)
    receipt = json.loads((tmp_path / "out" / "run.json").read_text())
    assert receipt["devices"] == ["cpu"]


# -------------------------------------------------------------------------------------------------------------------
# The kernel of attention, and waits for the GPU
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch() -> dict:
    rows = [{name: torch.tensor(ids) for name, ids in row.items()} for row in random_rows(8)]
    batch = data_collator.DataCollator(padding_free=True)(rows)
    return data_collator.move_to_device(batch, torch.device("cuda"))


def load(tiny_model, dtype: torch.dtype) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype, device_map={"": 0})
    data_collator.attend_inside_documents(model)
    return model.train()


def kernels_of(action) -> str:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        action()
        torch.cuda.synchronize()
    return " ".join(event.key for event in recorded.key_averages())


def test_bf16_takes_the_variable_length_kernel_and_float32_does_not(tiny_model, batch):
    """One kernel for all documents, where the GPU has it: Ampere or newer."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("an older GPU")
    for dtype, is_flash in ((torch.bfloat16, True), (torch.float32, False)):
        model = load(tiny_model, dtype)
        names = kernels_of(lambda model=model: finetune_pp.loss_in_chunks(model, batch).backward())
        assert ("flash_attention" in names.lower() or "flash_fwd" in names) == is_flash, names
        assert "cudnn_attention" not in names


def test_documents_do_not_see_each_other(tiny_model):
    model = load(tiny_model, torch.bfloat16)
    data_collator.check_document_attention(model, 300)  # raises ValueError
    assert model.config._attn_implementation == "documents"


def test_both_answers_can_have_one_prompt(tiny_model):
    """Keys have other borders than queries then, and the kernel has to end both alike."""
    with torch.autocast("cuda", torch.bfloat16):
        assert data_collator.can_share_prompts(load(tiny_model, torch.bfloat16), 300)


def prepare(strategy: str, tiny_model):
    """(model, its function of a batch that computes the loss), as the scripts make them."""
    if strategy == "full":
        return load(tiny_model, torch.float32), finetune_pp.loss_in_chunks
    if strategy == "LoRA":
        args = finetune_pp_peft.Arguments()
        return finetune_pp_peft.add_adapter(args, load(tiny_model, torch.bfloat16)), finetune_pp_peft.loss_in_chunks
    model = load(tiny_model, torch.float32)  # the Trainer scripts
    head = data_collator.add_loss_head(model)
    return model, lambda model, batch: data_collator.summed_loss(model, batch, head)


@pytest.mark.parametrize("strategy", ["full", "LoRA", "Trainer"])
def test_a_forward_waits_for_nothing(strategy, tiny_model, batch):
    """The host runs ahead of the GPU: a synchronisation, also a hidden one, is an error here."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("an older GPU")
    model, compute_loss = prepare(strategy, tiny_model)
    with torch.autocast("cuda", torch.bfloat16):
        compute_loss(model, batch).backward()  # the first call allocates, and chooses kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = compute_loss(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


# -------------------------------------------------------------------------------------------------------------------
# Two GPUs
# -------------------------------------------------------------------------------------------------------------------

FOUR_ROWS = ["--per_device_train_batch_size", 4]


@needs_two
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if " " in name])
def test_two_gpus_have_the_losses_of_the_cpu(strategy, train, reference, tmp_path):
    """FSDP2 and ZeRO with four rows a process, the pipeline with two stages: eight rows a step, over NCCL."""
    skip_without_deepspeed(strategy)
    flags = []
    if not strategy.startswith("1F1B"):
        flags = FOUR_ROWS
    tolerance = BF16
    if not strategy.startswith("ZeRO"):
        flags = [*flags, "--bf16", False]
        tolerance = FLOAT32
    losses = train(tmp_path / "out", STRATEGIES[strategy], *flags, num_processes=2)
    assert losses == pytest.approx(expected_of(strategy, reference), rel=tolerance)
    receipt = json.loads((tmp_path / "out" / "run.json").read_text())
    assert receipt["world_size"] == 2 and sorted(receipt["devices"]) == ["cuda:0", "cuda:1"]


@needs_two
@pytest.mark.parametrize("strategy", ["full", "LoRA"])
def test_layers_over_two_gpus_have_the_losses_of_one(strategy, train, reference, tmp_path):
    losses = train(tmp_path / "out", STRATEGIES[strategy], "--bf16", False, "--num_gpus", 2)
    assert losses == pytest.approx(expected_of(strategy, reference), rel=FLOAT32)
    receipt = json.loads((tmp_path / "out" / "run.json").read_text())
    assert receipt["devices"] == ["cuda:0", "cuda:1"]


def test_the_loss_in_chunks_adds_its_gradients_in_float32(monkeypatch):
    """Six chunks whose products are added as they are computed, beside one product in float32."""
    monkeypatch.setattr(data_collator, "LOGITS_PER_CHUNK_ON_GPU", 0)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_states = torch.randn(3000, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 500, (3000,), device="cuda", generator=generator)
    loss = data_collator.summed_cross_entropy(hidden_states, weight, targets)
    loss.backward()
    exact_states = hidden_states.detach().float().requires_grad_()
    exact_weight = weight.detach().float().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_states @ exact_weight.T, targets, reduction="sum")
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for found, expected in ((hidden_states.grad, exact_states.grad), (weight.grad, exact_weight.grad)):
        assert (found.float() - expected).norm() <= 1e-2 * expected.norm()
