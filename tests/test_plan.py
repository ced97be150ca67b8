"""tools/plan.py: the formula against fake tensors and real runs, the clock against published rows, usable commands."""

import importlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, LlamaConfig

import data_collator

sys.path += [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import plan  # noqa: E402
import plan_published  # noqa: E402
import plan_simulation  # noqa: E402
import plan_validation  # noqa: E402
from planning import memory, speed  # noqa: E402
from planning.hardware import HARDWARE, usable  # noqa: E402
from planning.models import MODELS, Model  # noqa: E402
from planning.strategies import STRATEGIES, Setup  # noqa: E402

SMALL = Model(hidden=256, intermediate=704, layers=3, heads=4, kv_heads=4, vocab=1000)
A100 = HARDWARE["a100-80g"]


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-70b", "llama-3-8b", "llama-3.2-1b"])
def test_the_parameters_are_those_of_transformers_model(name):
    model = MODELS[name]
    assert skeleton(model).num_parameters() == model.params


def skeleton(model):
    """transformers' model of this shape, without weights."""
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("FSDP", {"rows": 2, "checkpointing": True, "gpus": 2}),
        pytest.param("FSDP+LoRA", {"rows": 2}, marks=pytest.mark.slow),
        ("pp", {"rows": 2, "gpus": 1}),
        pytest.param("FSDP", {"rows": 2}, marks=pytest.mark.slow),
        # Few tokens: the gradients are the worst moment.
        pytest.param("FSDP", {"rows": 1, "sequence_length": 64}, marks=pytest.mark.slow),
        pytest.param("FSDP+LoRA", {"rows": 2, "checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("pp", {"rows": 2, "gpus": 1, "compute_bytes": 4}, marks=pytest.mark.slow),
        pytest.param("pp", {"rows": 2, "gpus": 1, "checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_formula_agrees_with_the_step_on_fake_tensors(strategy, changes):
    setup = replace(Setup(sequence_length=512, padding_free=False, on_cpu=True), **changes)
    formula = memory.memory(SMALL, STRATEGIES[strategy], setup)["total"]
    assert formula == pytest.approx(plan_simulation.simulate(SMALL, STRATEGIES[strategy], setup)["total"], rel=0.1)


@pytest.mark.slow
def test_the_formula_agrees_with_real_runs():
    """Each strategy with one and two processes: states within 10 %, the peak of the resident memory within 15 %."""
    print(run_script("tools/plan.py", "--validate", "quick").stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-33b", "llama-2-70b"])
@pytest.mark.parametrize("strategy", ["FSDP", "FSDP+LoRA"])
def test_the_formula_agrees_with_the_step_of_large_models(strategy, name):
    for checkpointing in (False, True):
        setup = Setup(rows=4, padding_free=False, on_cpu=True, checkpointing=checkpointing)
        formula = memory.memory(MODELS[name], STRATEGIES[strategy], setup)["total"]
        simulated = plan_simulation.simulate(MODELS[name], STRATEGIES[strategy], setup)["total"]
        assert formula == pytest.approx(simulated, rel=0.1)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("strategy", ["ZeRO-3", "ZeRO-3+LoRA"])
def test_zero3_gathers_ahead_what_deepspeeds_own_prefetcher_does(strategy, padding_free, monkeypatch):
    """DeepSpeed's coordinator, driven in the order of a step of a model without weights, counts what it gathers."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as deepspeed

    model, status = plan_validation.SIZES[0], deepspeed.ZeroParamStatus
    setup = Setup(compute_bytes=4, checkpointing=True, padding_free=padding_free)
    module = skeleton(model)
    if STRATEGIES[strategy].adapter:
        module = peft.get_peft_model(
            module, peft.LoraConfig("CAUSAL_LM", target_modules="all-linear", lora_dropout=0.05)
        )
    parameters, calls = list(module.parameters()), []

    def set_status(group, value):
        for parameter in group:
            parameter.ds_status = value

    def gather(group, quantize):
        set_status(group, status.INFLIGHT)
        return SimpleNamespace(wait=lambda handle_dependency: set_status(group, status.AVAILABLE))

    for i, parameter in enumerate(parameters):
        parameter.ds_id, parameter.ds_numel, parameter.ds_shape = i, parameter.numel(), parameter.shape
        parameter.ds_persist = parameter.numel() <= 10 * model.hidden  # transformers' "auto"
        parameter.ds_active_sub_modules, parameter.is_external_param = set(), False
        parameter.ds_tensor, parameter.ds_secondary_tensor = SimpleNamespace(final_location=None), None
        parameter.nvme_swapper, parameter.partition_numel = None, parameter.numel
        parameter.all_gather_coalesced, parameter.ds_summary = gather, str
        parameter.partition = lambda free_data, alone=(parameter,): set_status(alone, status.NOT_AVAILABLE)
    set_status(parameters, status.NOT_AVAILABLE)
    for i, submodule in enumerate(module.modules()):
        submodule.ds_id, submodule.ds_recompute_parameters, submodule.ds_external_parameters = i, set(), tuple
        submodule.register_forward_pre_hook(lambda submodule, *_: calls.append((submodule, True)))
        submodule.register_forward_hook(lambda submodule, *_: calls.append((submodule, False)))
    ids, mask = torch.zeros(1, 8, dtype=torch.int64, device="meta"), torch.zeros(1, 1, 8, 8, device="meta")
    module(input_ids=ids, attention_mask=mask, use_cache=False)

    for name in ("print_rank_0", "assert_ints_same_as_other_ranks"):
        monkeypatch.setattr(deepspeed, name, lambda *_, **__: None)
    limits, registry = (int(0.9 * model.hidden**2), 10**9, 10**9), deepspeed.InflightParamRegistry()
    coordinator = deepspeed.PartitionedParameterCoordinator(*limits, None, registry)
    gathered = []
    for with_backward in [False] * 2 * padding_free + [True] * 3:  # check_document_attention has two forwards
        coordinator.reset_step()
        gathered.clear()
        backward = [(submodule, not enters) for submodule, enters in reversed(calls)] if with_backward else []
        for i, (submodule, enters) in enumerate(calls + backward):
            if enters:
                coordinator.trace_prologue(submodule)
                if coordinator.is_record_trace():
                    coordinator.record_module(submodule)
                coordinator.fetch_sub_module(submodule, forward=i < len(calls))
            else:
                coordinator.release_sub_module(submodule, forward=i < len(calls))
            whole = (p.ds_numel for p in parameters if p.ds_status != status.NOT_AVAILABLE and not p.ds_persist)
            gathered.append(4 * sum(whole))
    most, again, _ = memory.prefetched(model, STRATEGIES[strategy], setup)
    assert most == pytest.approx(max(gathered[: len(calls)]), rel=0.1)
    head = 0 if padding_free else 4 * model.vocab * model.hidden  # released behind its use, or not
    assert again + head == pytest.approx(gathered[len(calls) - 1], rel=0.1)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_of_joined_rows_holds_what_the_formula_says(dtype, trained):
    """Of 1,000 targets in chunks, counted by torch's profiler; 10,000 ids, so that the logits outweigh the rest."""
    model, strategy = replace(SMALL, vocab=10000), STRATEGIES["FSDP" if trained else "FSDP+LoRA"]
    hidden = torch.randn(1000, model.hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(model.vocab, model.hidden, dtype=dtype, requires_grad=trained)
    ids = torch.zeros(1000, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        data_collator.ChunkedCrossEntropy.apply(hidden, weight, ids)
    held, most = 0, 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    setup = Setup(sequence_length=1000, compute_bytes=dtype.itemsize, on_cpu=True)
    assert data_collator.TARGETS_AT_ONCE == memory.TARGETS_AT_ONCE
    assert memory.logits_bytes(model, strategy, setup) == pytest.approx(most, rel=0.05)


def test_the_clock_agrees_with_the_published_rows():
    """The median error is below 15 %, and slower strategies and larger models come out slower, row by row."""
    table = plan_published.published_table()
    errors = sorted(abs(entry["error"]) for entry in table)
    assert errors[len(errors) // 2] < 0.15
    for source in {entry["row"].source for entry in table}:
        pairs = [(e["row"].value, e["predicted"]) for e in table if e["row"].source == source]
        for value, predicted in pairs:
            for other_value, other_predicted in pairs:
                if value < 0.95 * other_value:  # rows that are further apart than their own rounding
                    assert predicted < other_predicted


def test_what_is_saved_and_what_it_costs():
    """Directions that anyone who trained knows; a formula that lost a term would break one of them."""
    model, setup = MODELS["llama-7b"], Setup(rows=8)

    def total(strategy, **changes):
        return memory.memory(model, STRATEGIES[strategy], replace(setup, **changes))["total"]

    def seconds(strategy, **changes):
        return speed.times(model, STRATEGIES[strategy], replace(setup, **changes), A100)["step_seconds"]

    assert total("FSDP", checkpointing=True) < total("FSDP") / 2
    assert seconds("FSDP", checkpointing=True) > 1.2 * seconds("FSDP")
    assert total("QLoRA") < total("FSDP+LoRA") < total("FSDP")
    assert total("ZeRO-3 offload") < total("ZeRO-3") < total("ZeRO-2")
    assert seconds("ZeRO-2 offload") > seconds("ZeRO-2")
    assert total("FSDP", nodes=8) < total("FSDP")
    assert memory.memory(model, STRATEGIES["FSDP"], setup)["states"] == 16 * model.params / 8
    assert total("FSDP", rows=16, target_share=0.1) < total("FSDP", rows=16)


def test_the_largest_forward_is_the_largest():
    model, setup = MODELS["llama-13b"], Setup(checkpointing=True)
    most = memory.largest_rows(model, STRATEGIES["FSDP"], setup, A100)
    fits = [
        memory.memory(model, STRATEGIES["FSDP"], replace(setup, rows=rows))["total"] <= usable(A100)
        for rows in (most, most + 1)
    ]
    assert most > 1 and fits == [True, False]


def test_disk_and_traffic_of_full_fine_tuning_under_fsdp():
    """A checkpoint: weights and two moments in float32. A step: weights gathered twice, gradients reduced once."""
    model, strategy, setup = MODELS["llama-7b"], STRATEGIES["FSDP"], Setup(gpus=8)
    assert memory.memory(model, strategy, setup)["disk"] == 12 * model.params
    step = speed.times(model, strategy, setup, A100)
    assert step["network_bytes"] == 0 and step["offload_bytes"] == 0
    assert step["link_bytes"] == pytest.approx((2 + 2 + 4) * model.params * 7 / 8, rel=0.01)


def test_sharding_over_a_whole_cluster_stops_scaling_and_hybrid_sharding_goes_on():
    args = plan.Arguments(nodes=1024, batch=16384)
    table = plan.scaling(args, MODELS["llama-7b"], A100)
    assert [line["nodes"] for line in table] == [2**i for i in range(11)]
    hours = [line["fsdp_hours"] for line in table]
    assert hours[7] < hours[0] / 64 and hours[-1] > hours[-2] > min(hours)
    assert table[-1]["hsdp_hours"] < hours[-1] / 4


def test_every_command_names_a_launcher_and_flags_that_exist():
    args = plan.Arguments(model="llama-7b", lora_rank=64)
    for strategy in STRATEGIES:
        row = plan.plan_row(args, MODELS["llama-7b"], A100, strategy, True)
        words = row["command"].split()
        launcher = next(word for word in words if word.startswith("scripts/"))
        script = (ROOT / launcher).read_text()
        name = next(word for word in script.split() if word.startswith("finetune_") and word.endswith(".py"))
        flags = [word.removeprefix("--") for word in words if word.startswith("--")]
        known = importlib.import_module(name.removesuffix(".py")).Arguments.__dataclass_fields__
        assert set(flags) <= set(known), name
        assert "DATASET=$DATASET" in words and ("--lora_rank 64" in row["command"]) == STRATEGIES[strategy].adapter
        assert row["rows_of_forward"] * row["accumulation"] * (1 if "_pp.sh" in launcher or
                "pp_peft.sh" in launcher else 8) == 384  # fmt: skip
        for word in words:
            assert not word.startswith("ds_configs/") or (ROOT / word).is_file()


def call(monkeypatch, *words) -> None:
    """The program in this process: a new one would import torch again."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
    plan.main()


def test_json_and_picture_of_a_plan_for_a_configuration_file(tiny_model, tmp_path, monkeypatch, capsys):
    flags = ["--model", tiny_model, "--gpus", 2, "--batch", 8, "--price_per_gpu_hour", 2]
    call(monkeypatch, *flags, "--output_dir", tmp_path / "plan", "--json", "True")
    result = json.loads(capsys.readouterr().out)
    assert len(result["rows"]) == 2 * len(STRATEGIES) and len(result["best"]) == 2
    row = result["rows"][0]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    assert sum(row[f"{part}_bytes"] for part in parts) == pytest.approx(row["total_bytes"], abs=6)
    assert row["price"] == pytest.approx(row["hours"] * 2 * 2)
    assert (tmp_path / "plan" / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_reported_together(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_experts": 4}))
    flags = ["--model", tmp_path, "--gpu", "v100", "--batch", 0, "--target_share", 2]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *flags)
    for part in ("mixture of experts", "--gpu v100: choose from", "--batch 0", "--target_share 2.0"):
        assert part in stopped.value.code
