"""finetune_pp_dpo.py: its losses are those of their papers and of TRL, and nothing but the rows decides them."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_rows, run_script, save_rows, save_tiny_model
from harness import history_of, newest_complete, start_script, weights_of
from preference_rows import random_answers, random_pairs, save_preferences
from safetensors.torch import load_file, save_file
from test_plain_loops import FAST, kill_at_random, kill_while_saving, parse
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import data_collator
import finetune_pp_dpo as dpo
import finetune_pp_dpo_trainer as dpo_trainer
from data_collator import PreferenceCollator, PreferenceDataset, TrainingRows

CPU = torch.device("cpu")
PEERS = ROOT / ".venv-peers" / "trl" / "bin" / "python"
LOSSES = ("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("preferences")
    model = save_tiny_model(folder / "model")
    parts = {"folder": folder, "model": model}
    parts["pairs"] = save_preferences(random_pairs(22), folder / "pairs")
    parts["answers"] = save_preferences(random_answers(22), folder / "answers")
    parts["eval pairs"] = save_preferences(random_pairs(7, seed=3), folder / "eval-pairs")
    parts["eval answers"] = save_preferences(random_answers(7, seed=3), folder / "eval-answers")
    return parts


def data_of(loss_type: str) -> str:
    return "answers" if loss_type == "kto" else "pairs"


def flags_of(parts, loss_type: str, *flags) -> list:
    data = parts[data_of(loss_type)]
    return ["--model_path", parts["model"], "--dataset_path", data, "--loss_type", loss_type, *FAST, *flags]


def prepare(parts, loss_type: str, *flags, moved: bool = True):
    """(arguments, rows, model) of the script in this process; `moved`: the adapter is not where it started."""
    args = parse(dpo, *flags_of(parts, loss_type, *flags))
    config, _, rows, _, checkpoint = dpo.check_arguments(args)
    dpo.set_seed(args.seed)
    model = dpo.load_model(args, config, checkpoint, [CPU])
    if moved:
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return args, rows, model


def compute(args, model, rows: list[dict], collate: PreferenceCollator | None = None):
    """(loss per row, measures, gradients) of one optimizer step in one micro-batch."""
    model.train()
    model.zero_grad()
    compute_logps = dpo.choose_logps(args, model)
    collate = collate or dpo.choose_collator(args, model)
    batch = collate(rows)
    kl = dpo.estimate_kl(args, model, compute_logps, [batch], CPU)
    reference = dpo.reference_logps(args, model, compute_logps, batch)
    logps = dpo.policy_logps(args, model, compute_logps, batch)
    loss, sums = dpo.compare(args, batch, logps, reference, kl)
    loss = loss / data_collator.num_targets(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), dpo.average(args, sums, kl), gradients


# --- The losses, computed anew from all logits, one document at a time ---------------------------------------------


def answer_logps(model, prompt: list[int], answer: list[int], labels: list[int]) -> tuple[torch.Tensor, int]:
    """(summed log-probability, number of targets) of an answer, from the model's logits of that document alone."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    log_softmax = logits.log_softmax(-1)
    total = torch.zeros(())
    number = 0
    for place, label in enumerate(labels):
        if label != -100:
            total = total + log_softmax[len(prompt) + place - 1, label]
            number += 1
    return total, number


def expected_loss(args, model, rows: list[dict], mismatched: list[list[int]]) -> tuple[torch.Tensor, dict]:
    """(loss, rewards) by the papers' formulas, with exp and log where the script has stable functions."""
    beta = args.beta
    losses, chosen_rewards, rejected_rewards = [], [], []

    def both(prompt, answer, labels):
        policy, number = answer_logps(model, prompt, answer, labels)
        with torch.no_grad(), model.disable_adapter():
            reference, _ = answer_logps(model, prompt, answer, labels)
        return policy, reference, number

    if args.loss_type == "kto":
        differences = []
        for row, answer in zip(rows, mismatched, strict=True):
            policy, reference, _ = both(row["prompt_ids"], answer, answer)
            differences.append((policy - reference).detach())
        z0 = max(0.0, (sum(differences) / len(differences)).item())
        for row in rows:
            policy, reference, _ = both(row["prompt_ids"], row["completion_ids"], row["completion_labels"])
            reward = beta * (policy - reference)
            if row["label"]:
                losses.append(args.desirable_weight * (1 - 1 / (1 + torch.exp(beta * z0 - reward))))
                chosen_rewards.append(reward.item())
            else:
                losses.append(args.undesirable_weight * (1 - 1 / (1 + torch.exp(reward - beta * z0))))
                rejected_rewards.append(reward.item())
    else:
        for row in rows:
            policy, reference, numbers = [], [], []
            for answer in ("chosen", "rejected"):
                found = both(row["prompt_ids"], row[f"{answer}_ids"], row[f"{answer}_labels"])
                policy.append(found[0])
                reference.append(found[1])
                numbers.append(found[2])
            means = [policy[i] / numbers[i] for i in (0, 1)]
            ratios = [policy[i] - reference[i] for i in (0, 1)]
            smoothing = args.label_smoothing
            if args.loss_type == "sigmoid":
                p = 1 / (1 + torch.exp(-beta * (ratios[0] - ratios[1])))
                losses.append(-(1 - smoothing) * torch.log(p) - smoothing * torch.log(1 - p))
            elif args.loss_type == "ipo":
                losses.append((ratios[0] / numbers[0] - ratios[1] / numbers[1] - 0.5 / beta) ** 2)
            elif args.loss_type == "hinge":
                losses.append(torch.clamp(1 - beta * (ratios[0] - ratios[1]), min=0))
            elif args.loss_type == "simpo":
                p = 1 / (1 + torch.exp(args.simpo_gamma - beta * (means[0] - means[1])))
                losses.append(-(1 - smoothing) * torch.log(p) - smoothing * torch.log(1 - p))
            elif args.loss_type == "orpo":
                odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in means]
                losses.append(-means[0] - beta * logsigmoid(torch.log(odds[0] / odds[1])))
            rewards = ratios if args.loss_type not in ("simpo", "orpo") else means
            chosen_rewards.append(beta * rewards[0].item())
            rejected_rewards.append(beta * rewards[1].item())
    margins = sum(chosen_rewards) / len(chosen_rewards) - sum(rejected_rewards) / len(rejected_rewards)
    return sum(losses) / len(rows), margins


CASES = [
    ("sigmoid", ["--beta", 0.3]),
    ("sigmoid", ["--label_smoothing", 0.2]),
    ("ipo", []),
    ("hinge", ["--beta", 0.02]),
    ("simpo", ["--beta", 2.0, "--simpo_gamma", 0.8]),
    ("simpo", ["--label_smoothing", 0.1]),
    ("orpo", ["--beta", 0.4]),
    ("kto", []),
    ("kto", ["--desirable_weight", 1.5, "--undesirable_weight", 0.7]),
]


@pytest.mark.parametrize(("loss_type", "flags"), CASES)
@pytest.mark.parametrize("layout", ["padded", "each answer with its prompt", "as the script chooses"])
def test_loss_rewards_and_gradients_are_those_of_the_paper(loss_type, flags, layout, parts):
    args, rows, model = prepare(parts, loss_type, *flags, "--padding_free", layout != "padded")
    collate = None
    if layout == "each answer with its prompt":
        collate = PreferenceCollator(True)
    indices = [3, 0, 14, 8, 21]
    loss, measures, gradients = compute(args, model, [rows.dataset[i] for i in indices], collate)
    raw = random_answers(22) if loss_type == "kto" else random_pairs(22)
    mismatched = []
    if loss_type == "kto":
        mismatched = [raw[i - 1]["completion_ids"] for i in indices]  # no two rows have the same prompt
    model.get_base_model().set_attn_implementation("eager")
    model.zero_grad()
    expected, margin = expected_loss(args, model, [raw[i] for i in indices], mismatched)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert measures["rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert abs(margin) > 1e-2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.norm() > 0
            assert (gradients[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


@pytest.mark.parametrize("lora_used", [True, False])
def test_at_the_start_the_loss_is_ln_2_and_there_is_no_margin(lora_used, parts):
    args, rows, model = prepare(parts, "sigmoid", "--lora_used", lora_used, moved=False)
    compute_logps = dpo.choose_logps(args, model)
    if not lora_used:
        dpo.prepare_reference(args, model, compute_logps, dpo.choose_collator(args, model), rows.dataset, CPU)
    loss, measures, _ = compute(args, model, rows.step(0))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert measures["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_order_of_the_rows_of_a_step_changes_nothing(loss_type, parts):
    args, rows, model = prepare(parts, loss_type)
    step = rows.step(0)
    loss, measures, gradients = compute(args, model, step)
    other_loss, other_measures, other_gradients = compute(args, model, step[::-1])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert other_measures == pytest.approx(measures, rel=1e-5, abs=1e-6)
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("padding_free", [True, False])
def test_rows_that_complete_a_step_count_for_nothing(loss_type, padding_free, parts):
    """The third step of an epoch has six rows and two fillers."""
    args, rows, model = prepare(parts, loss_type, "--padding_free", padding_free)
    step = rows.step(2)
    real = [row for i, row in enumerate(step) if rows.locate(16 + i) is not None]
    assert len(real) == 6
    loss, measures, gradients = compute(args, model, step)
    assert math.isfinite(loss)
    expected, expected_measures, expected_gradients = compute(args, model, real)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert measures == pytest.approx(expected_measures, rel=1e-5, abs=1e-6)
    for name, gradient in expected_gradients.items():
        assert (gradient - gradients[name]).norm() <= 1e-5 * gradient.norm()


def test_a_micro_batch_of_fillers_alone_has_loss_0_and_a_backward(parts):
    for loss_type in LOSSES:
        args, rows, model = prepare(parts, loss_type)
        compute_logps = dpo.choose_logps(args, model)
        batch = dpo.choose_collator(args, model)([rows.dataset.filler_row()] * 2)
        kl = torch.zeros(())
        reference = dpo.reference_logps(args, model, compute_logps, batch)
        loss, sums = dpo.compare(args, batch, dpo.policy_logps(args, model, compute_logps, batch), reference, kl)
        loss.backward()
        assert loss.item() == 0 and sums.tolist() == [0] * len(dpo.SUMS)
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_an_answer_without_any_doubt_has_a_gradient_in_orpo():
    """Its log-probability is rounded to 0 in float32, and its odds are infinite."""
    chosen = torch.tensor([0.0, -1e-9, -0.5], requires_grad=True)
    rejected = torch.tensor([-0.5, 0.0, 0.0], requires_grad=True)
    dpo.orpo_loss(dpo.Arguments(beta=0.3), chosen, rejected).sum().backward()
    assert torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()


def test_ktos_mismatched_documents_end_where_the_model_ends(tmp_path):
    rows = []
    for prompt, answer in ((60, 3), (3, 60)):
        rows.append({"prompt_ids": [5 + prompt] * prompt, "completion_ids": [7] * answer,
                     "completion_labels": [7] * answer, "label": True})  # fmt: skip
    config = AutoConfig.for_model("llama", vocab_size=300, max_position_embeddings=64)
    dataset = PreferenceDataset(save_preferences(rows, tmp_path / "set"), config)
    for row, expected in ((dataset[0], 4), (dataset[1], 3)):
        assert len(row["mismatched_ids"]) == len(row["mismatched_labels"]) == expected


# --- The prompt of a pair is computed once --------------------------------------------------------------------------


def random_model(model_type: str, **settings) -> torch.nn.Module:
    """Two layers of 32, with attention inside documents where that is possible."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    data_collator.attend_inside_documents(model)
    return model


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_both_answers_behind_one_prompt_give_the_numbers_of_two_documents(model_type, settings):
    model = random_model(model_type, **settings)
    data_collator.check_document_attention(model, 300)
    assert data_collator.can_share_prompts(model, 300)
    rows = []
    for row in random_pairs(6, longest=20):
        rows.append({name: torch.tensor(ids) for name, ids in row.items()})
    rows[1]["chosen_labels"][:2] = -100
    rows[4]["prompt_ids"] = rows[4]["prompt_ids"][:0]  # nothing predicts the first tokens of its answers
    found = []
    for shares_prompts in (True, False):
        model.zero_grad()
        batch = PreferenceCollator(True, shares_prompts)(rows)
        logps = data_collator.sum_over_documents(dpo.logps_in_chunks(model, batch), batch)
        (logps * torch.arange(1, 13)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found.append((batch, logps.detach(), gradients))
    (shared, logps, gradients), (apart, expected, expected_gradients) = found
    assert shared["lengths"].tolist() == apart["lengths"].tolist()
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    saved = sum(len(row["prompt_ids"]) for row in rows)
    assert shared["input_ids"].numel() == apart["input_ids"].numel() - saved


def test_a_prompt_is_not_shared_where_the_numbers_would_be_others(parts, monkeypatch):
    """A layer that carries the chosen answer on, transformers' own attention, and a kernel with another order."""
    model = random_model("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3)
    assert model.config._attn_implementation == "documents" and not data_collator.can_share_prompts(model, 300)
    model = random_model("llama")
    model.set_attn_implementation("sdpa")
    assert not data_collator.can_share_prompts(model, 300)
    model = random_model("llama")
    assert data_collator.can_share_prompts(model.bfloat16(), 300)

    def begin_at_the_first_key(query, key, value, scaling, dropout, borders, sliding_window):
        outputs = []
        documents = zip(*(states.split(border.diff().tolist(), 2) for states, border in
                          ((query, borders[0]), (key, borders[1]), (value, borders[1]))), strict=True)  # fmt: skip
        for states in documents:
            output = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
            outputs.append(output.transpose(1, 2))
        return torch.cat(outputs, dim=1)

    monkeypatch.setattr(data_collator, "one_document_after_the_other", begin_at_the_first_key)
    assert not data_collator.can_share_prompts(random_model("llama"), 300)


# --- Log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_probabilities_and_gradients_are_those_of_a_whole_softmax(trains_weight, dtype, monkeypatch):
    monkeypatch.setattr(data_collator, "TARGETS_PER_CHUNK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(40, 16).to(dtype)
    weight = torch.randn(90, 16).to(dtype)
    targets = torch.randint(90, (40,))
    factors = torch.randn(40)
    found = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains_weight)]
    logps = data_collator.target_logps(*found, targets)
    assert logps.dtype == torch.float32
    (logps * factors).sum().backward()
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (expected * factors).sum().backward()
    tolerance = 1e-6 if dtype == torch.float64 else 5e-3
    assert (logps - expected).norm() <= tolerance * expected.norm()
    assert (found[0].grad - exact[0].grad).norm() <= tolerance * exact[0].grad.norm()
    if trains_weight:
        assert (found[1].grad - exact[1].grad).norm() <= tolerance * exact[1].grad.norm()


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("lora_used", [True, False])
def test_logits_of_all_targets_never_exist(lora_used, parts, monkeypatch):
    monkeypatch.setattr(data_collator, "TARGETS_PER_CHUNK", 8)
    args, rows, model = prepare(parts, "sigmoid", "--lora_used", lora_used)
    rows.dataset.keep_reference(torch.zeros(len(rows.dataset), 2))
    batch = PreferenceCollator(True)([rows.dataset[i] for i in range(22)])
    assert len(batch["documents"]) > 250
    with LargestTensor() as largest:
        logps = dpo.policy_logps(args, model, dpo.logps_in_chunks, batch)
        logps.sum().backward()
    weight = model.get_output_embeddings().weight
    assert largest.num_elements <= max(weight.numel(), 64 * int(batch["input_ids"].numel()))
    assert largest.num_elements < len(batch["documents"]) * len(weight)


# --- Whole runs ----------------------------------------------------------------------------------------------------

MEASURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def run_dpo(parts, out: Path, loss_type: str, *flags, script: str = "finetune_pp_dpo.py", **options):
    common = [*flags_of(parts, loss_type), "--num_train_epochs", 2, "--learning_rate", 1e-2]
    common += ["--eval_dataset_path", parts[f"eval {data_of(loss_type)}"], "--eval_steps", 3]
    return run_script(script, *common, *flags, "--output_dir", out, **options)


def assert_same_run(folder: Path, reference: Path) -> None:
    expected, found = history_of(reference), history_of(folder)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5 if row["step"] == 1 else 1e-4)
        assert other["num_input_tokens_seen"] == row["num_input_tokens_seen"]
        for name in row.keys() - {"grad_norm"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
    start = weights_of(reference / "checkpoint-1")  # step 1 has rate 0
    weights = weights_of(reference)
    for name, tensor in weights_of(folder).items():
        travelled = (weights[name] - start[name]).norm()
        assert travelled > 0
        assert (tensor - weights[name]).norm() <= 1e-2 * travelled, name


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_a_step_gives_the_same_numbers_however_it_is_cut(loss_type, parts, tmp_path):
    """Accumulation, padding, checkpointing and a reference computed before, over an epoch end with six rows."""
    whole = tmp_path / "whole"
    save = ["--save_steps", 1, "--save_total_limit", 99]
    run_dpo(parts, whole, loss_type, *save)
    assert len(history_of(whole)) == 6
    data = tmp_path / "data"
    os.symlink(parts[data_of(loss_type)], data)
    for name, flags in {
        "accumulation": ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4],
        "padded": ["--padding_free", "False", "--per_device_eval_batch_size", 3],
        "checkpointing": ["--gradient_checkpointing", "True"],
        "precomputed": ["--precompute_reference", "True"],
        "single": ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8],
    }.items():
        run_dpo(parts, tmp_path / name, loss_type, *flags)
        assert_same_run(tmp_path / name, whole)


def test_evaluation_weighs_every_row_the_same(parts):
    """An odd number of rows and three batch sizes; KTO's estimate is over the whole set."""
    for loss_type in LOSSES:
        found = []
        for size in (1, 4, 7):
            args, _, model = prepare(parts, loss_type, "--per_device_eval_batch_size", size)
            dataset = PreferenceDataset(parts[f"eval {data_of(loss_type)}"])
            compute_logps = dpo.choose_logps(args, model)
            collate = dpo.choose_collator(args, model)
            found.append(dpo.evaluate(args, model, compute_logps, collate, dataset, CPU))
        assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
        assert found[2] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
        assert found[0]["eval_loss"] == pytest.approx(compute(args, model, list(dataset))[0], rel=1e-5)


@pytest.fixture(scope="module")
def adapter(parts) -> Path:
    """An adapter that has been trained, with a dropout of its own."""
    _, _, model = prepare(parts, "sigmoid", "--lora_alpha", 32)
    model.peft_config["default"].lora_dropout = 0.05
    model.save_pretrained(parts["folder"] / "adapter")
    return parts["folder"] / "adapter"


ZERO2, ZERO3 = (["--deepspeed", f"ds_configs/zero{stage}.json"] for stage in (2, 3))
IN_SEVERAL_PROCESSES = [
    ("kto", [], []),
    pytest.param("sigmoid", ["--peft_path", "{adapter}"], [], marks=pytest.mark.slow),
    pytest.param("sigmoid", ["--peft_path", "{adapter}"], ZERO3, marks=pytest.mark.slow),
    pytest.param("kto", ["--lora_used", "False"], [], marks=pytest.mark.slow),
    pytest.param("kto", ["--peft_path", "{adapter}"], ZERO2, marks=pytest.mark.slow),
    pytest.param("ipo", ["--precompute_reference", "True", "--peft_path", "{adapter}"], [], marks=pytest.mark.slow),
    pytest.param("orpo", ["--lora_used", "False"], ZERO3, marks=pytest.mark.slow),
    pytest.param("simpo", [], ZERO2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("loss_type", "flags", "sharding"), IN_SEVERAL_PROCESSES)
def test_two_processes_give_the_numbers_of_one(loss_type, flags, sharding, parts, adapter, tmp_path):
    """Losses and kinds of reference that tests/test_equivalence.py leaves out; each computes its own reference."""
    flags = [flag.format(adapter=adapter) for flag in flags]
    whole = tmp_path / "whole"
    run_dpo(parts, whole, loss_type, *flags, "--save_steps", 1, "--save_total_limit", 99)
    for name in ("", "eval "):
        for path in reference_files(parts[name + data_of(loss_type)]):
            path.unlink()
    cut = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--per_device_eval_batch_size", 2]
    trainer = {"script": "finetune_pp_dpo_trainer.py", "num_processes": 2}
    run_dpo(parts, tmp_path / "two", loss_type, *flags, *sharding, *cut, **trainer)
    assert_same_run(tmp_path / "two", whole)
    assert history_of(whole)[0]["loss"] != history_of(whole)[-1]["loss"]


@pytest.mark.parametrize("lora_used", [True, False])
@pytest.mark.parametrize("sharding", [None, [], pytest.param(ZERO3, marks=pytest.mark.slow)])
def test_in_bf16_losses_are_float32_and_near_those_of_float32(lora_used, sharding, parts, tmp_path):
    """Log-probabilities of documents are sums of hundreds, of which bf16 would keep two digits."""
    flags = ["--lora_used", lora_used, "--max_steps", 3, "--learning_rate", 1e-3]
    script = "finetune_pp_dpo.py"
    if sharding is not None:
        script = "finetune_pp_dpo_trainer.py"
        flags += sharding
    run_dpo(parts, tmp_path / "bf16", "sigmoid", *flags, "--bf16", "True", script=script)
    run_dpo(parts, tmp_path / "float32", "sigmoid", *flags, script=script)
    found, expected = history_of(tmp_path / "bf16"), history_of(tmp_path / "float32")
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=2e-2)
        assert row["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-2)
    # The reference begins as the policy, and both are computed alike.
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6 if lora_used else 1e-2)


NUM_STEPS = 30


@pytest.mark.parametrize(
    ("loss_type", "flags"),
    [
        ("sigmoid", ["--lora_dropout", 0.1]),
        ("sigmoid", ["--lora_used", "False"]),
        pytest.param("kto", ["--lora_dropout", 0.1, "--precompute_reference", "True"], marks=pytest.mark.slow),
        pytest.param("orpo", ["--lora_used", "False"], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(loss_type, flags, parts, tmp_path):
    """Killed while a checkpoint was being written and again at a random moment."""
    flags = [*flags_of(parts, loss_type, *flags), "--max_steps", NUM_STEPS, "--save_steps", 1, "--learning_rate", 1e-2]
    run_script("finetune_pp_dpo.py", *flags, "--output_dir", tmp_path / "whole")
    torn = tmp_path / "torn"
    resume = [*flags, "--output_dir", torn, "--resume_from_checkpoint", "True"]
    kill_while_saving(start_script("finetune_pp_dpo.py", *resume)[0], torn, after_step=3)
    kill_at_random(start_script("finetune_pp_dpo.py", *resume)[0], torn)
    last = newest_complete(torn)
    assert 3 <= last < NUM_STEPS
    assert f"resuming from {torn}/checkpoint-{last}\n" in run_script("finetune_pp_dpo.py", *resume).stdout
    assert history_of(torn) == history_of(tmp_path / "whole")
    assert len(history_of(torn)) == NUM_STEPS
    expected, found = weights_of(tmp_path / "whole"), weights_of(torn)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# --- The reference -------------------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_to_go_on_from_is_the_adapter_as_it_was(parts, tmp_path):
    """And not the base: the loss begins at ln 2, and the run equals one on the merged model."""
    peft = dpo.peft
    args, rows, model = prepare(parts, "sigmoid", "--lora_alpha", 32)  # an adapter that has been trained
    model.save_pretrained(tmp_path / "sft")
    merged = model.merge_and_unload()
    merged.set_attn_implementation("sdpa")
    merged.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "tokenizer.json").write_bytes((parts["model"] / "tokenizer.json").read_bytes())
    (tmp_path / "merged" / "tokenizer_config.json").write_bytes((parts["model"] / "tokenizer_config.json").read_bytes())

    args, rows, model = prepare(parts, "sigmoid", "--peft_path", tmp_path / "sft", moved=False)
    assert args.lora_alpha == 32  # the adapter's
    assert args.lora_dropout == 0
    loss, measures, _ = compute(args, model, rows.step(0))
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any(".reference." in name for name in frozen)
    optimizer = dpo.make_optimizer(args, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    loss, measures, _ = compute(args, model, rows.step(0))
    assert loss < math.log(2)
    # The reference of the merged model is its base.
    compute_logps = dpo.choose_logps(args, model)
    batch = PreferenceCollator(True)(rows.step(0))
    reference = dpo.reference_logps(args, model, compute_logps, batch)
    args_of_merged = parse(dpo, *flags_of(parts | {"model": tmp_path / "merged"}, "sigmoid"))
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    base = dpo.load_model(args_of_merged, config, None, [CPU])
    expected = dpo.reference_logps(args_of_merged, base, dpo.choose_logps(args_of_merged, base), batch)
    assert reference.tolist() == pytest.approx(expected.tolist(), rel=1e-4)

    dpo.save_model(model, dpo.AutoTokenizer.from_pretrained(parts["model"]), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("reference" in name for name in saved)
    assert not (tmp_path / "out" / "reference").exists()
    fresh = AutoModelForCausalLM.from_pretrained(parts["model"], dtype=torch.float32)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    ids = torch.tensor([[1, 40, 50, 60]])
    model.get_base_model().set_attn_implementation("sdpa")
    assert torch.allclose(model.eval()(input_ids=ids).logits, reloaded(input_ids=ids).logits, atol=1e-5)


def reference_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference-*"))


def test_a_reference_that_was_computed_is_used_again_and_only_if_it_fits(parts, tmp_path):
    data = save_preferences(random_pairs(22), tmp_path / "data", {"sha256": "1"})
    parts = parts | {"pairs": data}
    flags = ["--lora_used", "False", "--max_steps", 1, "--warmup_steps", 0]
    run_dpo(parts, tmp_path / "a", "sigmoid", *flags, "--max_steps", 1)
    (path,) = reference_files(data)
    # A file that fits is used: with other values in it, the loss of the first step is another one.
    run_dpo(parts, tmp_path / "b", "sigmoid", *flags, "--max_steps", 1)
    assert history_of(tmp_path / "b")[0] == history_of(tmp_path / "a")[0]
    logps = load_file(path)["logps"]
    save_file({"logps": logps + torch.tensor([1.0, 0.0])}, path)
    run_dpo(parts, tmp_path / "c", "sigmoid", *flags, "--max_steps", 1)
    assert history_of(tmp_path / "c")[0]["loss"] == pytest.approx(math.log1p(math.exp(0.1)), rel=1e-5)
    # Another base, other rows and another precision have files of their own.
    other = save_tiny_model(tmp_path / "model", tied=True)
    for change in ([], ["--bf16", "True"]):
        run_dpo(parts | {"model": other}, tmp_path / "d", "sigmoid", *flags, *change, "--max_steps", 1)
        loss = history_of(tmp_path / "d")[0]["loss"]
        assert loss == pytest.approx(math.log(2), abs=2e-2 if change else 1e-6)
    (data / "ledger.json").write_text(json.dumps({"sha256": "2"}))
    run_dpo(parts, tmp_path / "e", "sigmoid", *flags, "--max_steps", 1)
    assert history_of(tmp_path / "e")[0] == history_of(tmp_path / "a")[0]
    assert len(reference_files(data)) == 4


def test_all_weights_are_not_trained_on_without_the_reference_that_they_began_with(parts, tmp_path):
    data = save_preferences(random_pairs(22), tmp_path / "data")
    parts = parts | {"pairs": data}
    flags = ["--lora_used", "False", "--max_steps", 2]
    run_dpo(parts, tmp_path / "out", "sigmoid", *flags)
    (path,) = reference_files(data)
    path.unlink()
    resumed = run_dpo(
        parts, tmp_path / "out", "sigmoid", *flags, "--max_steps", 4, "--resume_from_checkpoint", "True", check=False
    )
    assert resumed.returncode == 1
    assert path.name in resumed.stderr and "a run of one step in another --output_dir makes it again" in resumed.stderr
    assert not reference_files(data)
    # As it says:
    run_dpo(parts, tmp_path / "other", "sigmoid", *flags, "--max_steps", 1)
    run_dpo(parts, tmp_path / "out", "sigmoid", *flags, "--max_steps", 4, "--resume_from_checkpoint", "True")


def test_a_run_is_not_resumed_with_another_reference_in_the_same_place(parts, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    flags = ["--peft_path", folder, "--max_steps", 2]
    run_dpo(parts, tmp_path / "out", "sigmoid", *flags)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    again = ["--max_steps", 4, "--resume_from_checkpoint", "True"]
    resumed = run_dpo(parts, tmp_path / "out", "sigmoid", *flags, *again, check=False)
    assert resumed.returncode == 1 and "peft_sha256" in resumed.stderr and "Traceback" not in resumed.stderr
    shutil.copy(adapter / "adapter_model.safetensors", folder)
    run_dpo(parts, tmp_path / "out", "sigmoid", *flags, *again)
    assert len(history_of(tmp_path / "out")) == 4


# --- Sets ----------------------------------------------------------------------------------------------------------


def test_a_mismatched_answer_is_one_of_another_prompt(tmp_path):
    """Answers to one prompt usually stand one behind the other."""
    rows = random_answers(6)
    for i in (0, 1, 2):
        rows[i]["prompt_ids"] = [5, 6]
    dataset = PreferenceDataset(save_preferences(rows, tmp_path / "rows"))
    expected = [5, 5, 5, 2, 3, 4]
    for i in range(6):
        row = dataset[i]
        assert row["mismatched_ids"].tolist() == rows[expected[i]]["completion_ids"]
        assert row["label"].item() == int(rows[i]["label"])
    for row in rows:
        row["prompt_ids"] = [5, 6]
    dataset = PreferenceDataset(save_preferences(rows, tmp_path / "one prompt"))
    assert dataset[0]["mismatched_ids"].tolist() == rows[5]["completion_ids"]


def test_a_collated_batch_holds_every_document_and_target(parts):
    dataset = PreferenceDataset(parts["pairs"])
    raw = random_pairs(22)
    for padding_free in (True, False):
        batch = PreferenceCollator(padding_free)([dataset[i] for i in range(22)])
        ids = batch["input_ids"].flatten()
        found = [[] for _ in range(44)]
        for place, target, document in zip(
            batch["logits_to_keep"], batch["shift_labels"][0], batch["documents"], strict=True
        ):
            assert ids[place + 1] == target
            found[document].append(target.item())
        expected = []
        for answer in ("chosen", "rejected"):
            for row in raw:
                expected.append([label for label in row[f"{answer}_labels"] if label != -100])
        assert found == expected
        assert batch["lengths"].tolist() == [len(targets) for targets in expected]
    num_tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) + 2 * len(row["prompt_ids"]) for row in raw)
    assert sum(dataset.num_tokens(i) for i in range(22)) == num_tokens


def test_sets_are_mixed_by_weight_and_not_by_kind(parts, tmp_path):
    other = save_preferences(random_pairs(5, seed=7), tmp_path / "other")
    mixed = PreferenceDataset(f"{parts['pairs']}:2,{other}:1")
    rows = TrainingRows(mixed, 8, 1, -1, 42)
    assert rows.rows_per_epoch == 33 and len(mixed) == 27
    assert "chosen_ids" in mixed[26]
    with pytest.raises(ValueError, match="paired and unpaired"):
        PreferenceDataset(f"{parts['pairs']},{parts['answers']}")


# --- Mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = {
    "a set of supervised rows": (["--dataset_path", "{rows}"], "no column prompt_ids", "--format preference"),
    "single answers for pairs": (["--dataset_path", "{answers}"], "{answers} has single ones", "choose kto"),
    "pairs for kto": (["--loss_type", "kto"], "--loss_type kto", "{pairs} has pairs"),
    "an evaluation of the other kind": (
        ["--loss_type", "kto", "--dataset_path", "{answers}", "--eval_dataset_path", "{pairs}"],
        "--eval_dataset_path {pairs}: it has pairs",
        "name a set of the same kind",
    ),
    "beta 0": (["--beta", 0], "--beta 0.0", "must be > 0"),
    "smoothing of the hinge": (["--loss_type", "hinge", "--label_smoothing", 0.1], "not for --loss_type hinge", ""),
    "too much smoothing": (["--label_smoothing", 0.5], "--label_smoothing 0.5", "choose 0.1 or less"),
    "a margin without simpo": (["--simpo_gamma", 1.0], "--simpo_gamma 1.0", "is for --loss_type simpo"),
    "a weight without kto": (["--desirable_weight", 2.0], "--desirable_weight 2.0", "is for --loss_type kto"),
    "a reference that orpo has not": (
        ["--loss_type", "orpo", "--precompute_reference", "True"],
        "--precompute_reference True",
        "has no reference",
    ),
    "an adapter without adapters": (["--lora_used", "False", "--peft_path", "{prompt}"], "--peft_path", "merge_lora"),
    "an adapter of virtual tokens": (["--peft_path", "{prompt}"], "PROMPT_TUNING", "LoRA adapters only"),
    "a mode that is not there": (["--peft_mode", "prompt"], "--peft_mode", "--help"),
    "too long answers": (["--dataset_path", "{long}"], "300 tokens", "--max_length 256"),
    "an id that the model lacks": (["--dataset_path", "{ids}"], "chosen_ids", "vocabulary of 300"),
    "paired and unpaired rows": (["--dataset_path", "{pairs},{answers}"], "paired and unpaired", "one kind"),
    "a column that is missing": (["--dataset_path", "{half}"], "rejected_labels", "--format preference"),
}


@pytest.fixture(scope="module")
def bad(parts, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    prompt = dpo.peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompt.save_pretrained(folder / "prompt")
    long = random_pairs(2)
    long[1]["chosen_ids"] = [5] * (300 - len(long[1]["prompt_ids"]))
    long[1]["chosen_labels"] = long[1]["chosen_ids"]
    ids = random_pairs(2)
    ids[0]["chosen_ids"][0] = 300
    half = [{name: ids for name, ids in row.items() if name != "rejected_labels"} for row in random_pairs(2)]
    return {
        "pairs": parts["pairs"],
        "answers": parts["answers"],
        "rows": save_rows(random_rows(4), folder / "rows"),
        "prompt": folder / "prompt",
        "long": save_preferences(long, folder / "long"),
        "ids": save_preferences(ids, folder / "ids"),
        "half": save_preferences(half, folder / "half"),
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_before_weights_are_loaded(name, parts, bad, tmp_path):
    flags, *expected = MISTAKES[name]
    flags = [str(flag).format(**bad) for flag in flags]
    out = tmp_path / "out"
    common = flags_of(parts, "sigmoid", "--output_dir", out)
    completed = run_script("finetune_pp_dpo.py", *common, *flags, check=False)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    assert completed.stderr.count("error:") == 1
    for text in expected:
        assert text.format(**bad) in completed.stderr
    assert "Loading weights" not in completed.stderr
    assert not out.exists()


def test_the_trainer_refuses_an_adapter_that_it_cannot_switch_off(parts, tmp_path):
    config = dpo.peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True)
    config.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="its adapter is DoRA.*finetune_pp_dpo.py trains it"):
        dpo_trainer.check_adapter(tmp_path / "dora")
    dpo.check_adapter(tmp_path / "dora")


@pytest.mark.parametrize("script", ["finetune_pp_peft.py", "finetune_pp.py"])
def test_a_preference_set_is_no_set_of_supervised_rows(script, parts, tmp_path):
    flags = ["--model_path", parts["model"], "--dataset_path", parts["pairs"], *FAST, "--output_dir", tmp_path / "out"]
    completed = run_script(script, *flags, check=False)
    assert completed.returncode == 1
    assert "finetune_pp_dpo.py learns from them" in completed.stderr
    assert "Traceback" not in completed.stderr


# --- TRL -----------------------------------------------------------------------------------------------------------


def rows_in_order(rows: TrainingRows, num_steps: int, loss_type: str) -> list[dict]:
    ordered = []
    for step in range(num_steps):
        for row in rows.step(step):
            plain = {name: tensor.tolist() for name, tensor in row.items()}
            if loss_type == "kto":
                plain["KL_completion_ids"] = plain["mismatched_ids"]
                plain["label"] = bool(plain["label"])
            ordered.append(plain)
    return ordered


@pytest.mark.skipif(not PEERS.is_file(), reason="bash benchmarks/install_peers.sh trl")
@pytest.mark.parametrize(
    ("loss_type", "lora_used"), [(loss_type, True) for loss_type in LOSSES] + [("sigmoid", False), ("kto", False)]
)
def test_ten_steps_are_those_of_trl(loss_type, lora_used, parts, tmp_path):
    """Loss and margin of each step to 1e-5, on the same ids, from the same adapter, at a rate that moves both."""
    rows_per_step, num_steps = 4, 10
    if loss_type == "kto":
        raw = random_answers(40)
    else:
        raw = random_pairs(40)
        for row in raw:
            row["chosen_labels"] = row["chosen_ids"]  # TRL learns every token of an answer
            if loss_type == "orpo":
                # TRL's loss of supervised fine-tuning is that of the prompt, too, and of all tokens of a batch.
                row["prompt_ids"] = row["prompt_ids"][:1]
                row["chosen_ids"] = (row["chosen_ids"] * 6)[:10]
                row["chosen_labels"] = row["chosen_ids"]
    data = save_preferences(raw, tmp_path / "rows")
    # At SimPO's own beta the margin is 25 times as steep, and so is what rounding does to a step.
    learning_rate = 1e-3
    flags = ["--dataset_path", data, "--lora_used", lora_used, "--learning_rate", learning_rate, "--warmup_steps", 0]
    flags += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", rows_per_step]
    args, rows, model = prepare(parts, loss_type, *flags, moved=False)
    assert rows.num_steps == num_steps
    adapter = None
    if lora_used:
        adapter = str(tmp_path / "adapter")
        model.save_pretrained(adapter)
    run = {
        "loss_type": loss_type,
        "beta": args.beta,
        "model": str(parts["model"]),
        "adapter": adapter,
        "rows": rows_in_order(rows, num_steps, loss_type),
        "rows_per_step": rows_per_step,
        "steps": num_steps,
        "learning_rate": learning_rate,
        "output": str(tmp_path / "trl"),
        "log": str(tmp_path / "trl.json"),
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    command = [PEERS, ROOT / "tests" / "trl_losses.py", tmp_path / "run.json"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1"}
    completed = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    expected = json.loads((tmp_path / "trl.json").read_text())
    run_script("finetune_pp_dpo.py", *flags_of(parts, loss_type, *flags, "--output_dir", tmp_path / "out"))
    found = history_of(tmp_path / "out")
    assert len(found) == len(expected) == num_steps
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        if "rewards/margins" in row:
            assert row["rewards/margins"] == pytest.approx(other["margin"], rel=1e-5, abs=1e-5)
    moved = [abs(row["rewards/margins"] - found[0]["rewards/margins"]) for row in found if "rewards/margins" in row]
    assert max(moved) > 1e-2
