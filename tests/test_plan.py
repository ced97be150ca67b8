"""tools/plan.py: time and memory against what is counted, simulated, run and published; answers that a user can use."""

import json
import re
import statistics
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT, run_script, save_rows, save_tiny_model
from preference_rows import random_pairs, save_preferences
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

import data_collator

sys.path += [str(ROOT / "tools"), str(ROOT / "benchmarks")]
import plan  # noqa: E402
import plan_published  # noqa: E402
import plan_simulation  # noqa: E402
import plan_validation  # noqa: E402
from planning import measure, memory, search, show  # noqa: E402
from planning.hardware import GPUS, LINKS, NETWORKS, Machine, nvidia_smi_bytes, usable_bytes  # noqa: E402
from planning.kernels import head_work, layer_work, saved_bytes  # noqa: E402
from planning.models import MODELS, from_config, llama  # noqa: E402
from planning.search import Job  # noqa: E402
from planning.speed import speed, step_work  # noqa: E402
from planning.strategies import PREFERENCES, STRATEGIES, SUPERVISED, Setup  # noqa: E402

SMALL = llama(256, 704, 3, 4, 4, 1000)
A100 = Machine(GPUS["a100-80g"])


# -------------------------------------------------------------------------------------------------------------------
# Shapes of models
# -------------------------------------------------------------------------------------------------------------------


def skeleton(config):
    """transformers' model with this configuration, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def llama_config(model):
    return LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab,
        tie_word_embeddings=model.tied,
    )


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-70b", "llama-3-8b", "llama-3.2-1b", "llama-3.1-405b"])
def test_the_parameters_of_a_named_llama_are_those_of_transformers_model(name):
    assert skeleton(llama_config(MODELS[name])).num_parameters() == MODELS[name].params


def test_the_parameters_of_other_named_models_are_those_of_transformers_model():
    """Qwen 2 has biases, Qwen 3 heads of 128 and two more norms."""
    for name, config_class in (("qwen2.5-7b", Qwen2Config), ("qwen3-8b", Qwen3Config), ("qwen3-0.6b", Qwen3Config)):
        model = MODELS[name]
        config = config_class(**llama_config(model).to_diff_dict() | {"model_type": config_class.model_type})
        config.head_dim = model.head_dim or model.hidden // model.heads
        assert skeleton(config).num_parameters() == model.params, name


SIZES = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=500),
        Qwen2Config(**SIZES, num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True),
        Qwen3Config(**SIZES, num_key_value_heads=2, vocab_size=500, head_dim=32),
        MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=500, sliding_window=128),
        GemmaConfig(**SIZES, num_key_value_heads=1, vocab_size=500, head_dim=32),
    ],
    ids=lambda config: config.model_type,
)
def test_a_configuration_gives_the_parameters_of_its_model(config):
    """Gemma's configuration does not say that its head is tied: that is its own default."""
    model = from_config(config)
    assert model.params == pytest.approx(skeleton(config).num_parameters(), rel=1e-3)
    assert model.tied == config.tie_word_embeddings


def test_a_sliding_window_and_a_configuration_within_a_configuration():
    model = from_config(MistralConfig(**SIZES, vocab_size=500, sliding_window=128))
    assert (model.sliding_window, model.sliding_layers) == (128, 4)
    # Half of the first 128 tokens' keys on average, and 128 for each of the others.
    assert model.keys_of_a_token(1024) == pytest.approx((128 * 64.5 + 896 * 128) / 1024)
    assert model.keys_of_a_token(100) == 50.5
    gemma = Gemma3Config(text_config=SIZES | {"num_key_value_heads": 1, "vocab_size": 500, "head_dim": 32})
    model = from_config(gemma)
    assert model.hidden == 64 and 0 < model.sliding_layers <= 4


def test_a_mixture_of_experts_is_refused_in_words():
    with pytest.raises(ValueError, match="a mixture of experts .*num_local_experts 8"):
        from_config(MixtralConfig(**SIZES, vocab_size=500))


# -------------------------------------------------------------------------------------------------------------------
# One description of the kernels: the FLOPs that time is made of are those of a real step
# -------------------------------------------------------------------------------------------------------------------

COUNTED = llama(128, 352, 3, 4, 2, 2000)


@pytest.fixture(scope="module")
def counted_parts(tmp_path_factory):
    """A model of COUNTED's shape, and rows of 128 tokens, each a target."""
    folder = tmp_path_factory.mktemp("counted")
    plan_validation.save_parts(folder, COUNTED, 128)
    return folder


@pytest.mark.parametrize(
    ("strategy", "processes", "checkpointing"),
    [
        ("pp", 1, False),
        ("pp_peft", 1, True),
        ("pp+LoRA+DPO", 1, False),
        pytest.param("pp+DPO", 1, True, marks=pytest.mark.slow),
        pytest.param("pp+LoRA+DPO", 1, True, marks=pytest.mark.slow),
        pytest.param("FSDP+LoRA+DPO", 2, False, marks=pytest.mark.slow),
        pytest.param("ZeRO-3+DPO", 2, False, marks=pytest.mark.slow),
        pytest.param("pp", 1, True, marks=pytest.mark.slow),
        pytest.param("pp_peft", 1, False, marks=pytest.mark.slow),
        pytest.param("FSDP", 2, False, marks=pytest.mark.slow),
        pytest.param("FSDP", 2, True, marks=pytest.mark.slow),
        pytest.param("FSDP+LoRA", 2, False, marks=pytest.mark.slow),
        pytest.param("ZeRO-2", 2, False, marks=pytest.mark.slow),
        pytest.param("ZeRO-2+LoRA", 2, True, marks=pytest.mark.slow),
        pytest.param("ZeRO-3", 2, True, marks=pytest.mark.slow),
        pytest.param("ZeRO-3+LoRA", 2, False, marks=pytest.mark.slow),
        pytest.param("1F1B", 2, False, marks=pytest.mark.slow),
        pytest.param("1F1B+LoRA", 2, True, marks=pytest.mark.slow),
    ],
)
def test_the_flops_that_are_charged_are_those_of_a_real_step(
    strategy, processes, checkpointing, counted_parts, tmp_path
):
    """Over all processes. Not charged, and below 3 %: the first layer of a frozen model needs no gradient of its input,
    and the last token of a row is no target."""
    data = plan_validation.rows_of(strategy, counted_parts, 128)
    flags = ["--model_path", counted_parts / "model", "--dataset_path", data, "--max_steps", 3]
    flags += ["--use_cpu", True, "--bf16", False, "--report_to", "none", "--output_dir", tmp_path / "run"]
    flags += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    flags += ["--gradient_checkpointing", checkpointing, *STRATEGIES[strategy].flags.split()]
    script = plan_validation.script_of(strategy)
    run_script("tests/count_flops.py", tmp_path / "flops", script, *flags, num_processes=processes)
    counted = sum(json.loads((tmp_path / f"flops.{rank}").read_text()) for rank in range(processes))
    setup = Setup(
        gpus=processes,
        rows=2,
        accumulation=2,
        sequence_length=128,
        checkpointing=checkpointing,
        compute_bytes=4,
        on_cpu=True,
    )
    charged = speed(COUNTED, STRATEGIES[strategy], setup, replace(A100, gpus=processes)).flops
    assert charged == pytest.approx(counted, rel=0.03)


def test_a_pair_is_two_documents_and_its_reference_one_more_forward():
    """Two thirds of the work of a frozen model's step are forward and gradients of inputs; a third of that is added."""
    model = MODELS["llama-7b"]
    setup = Setup(rows=2, lora_rank=1, gpus=1)
    supervised = replace(setup, rows=4, lora_dropout=False)
    machine = replace(A100, gpus=1)
    dpo, lora = STRATEGIES["pp+LoRA+DPO"], STRATEGIES["pp_peft"]
    assert memory.memory(model, dpo, setup).worst.activations == (
        memory.memory(model, lora, supervised).worst.activations
    )
    ratio = speed(model, dpo, setup, machine).flops / speed(model, lora, supervised, machine).flops
    assert ratio == pytest.approx(1.5, rel=0.01)
    full = speed(model, STRATEGIES["pp+DPO"], setup, machine).flops
    head = 2 * model.head_params * 4 * 512  # the logits once more
    assert full == pytest.approx(speed(model, STRATEGIES["pp"], supervised, machine).flops + head, rel=1e-6)
    assert set(PREFERENCES) | set(SUPERVISED) == set(STRATEGIES)
    assert plan.read_strategies("dpo") == PREFERENCES


def test_joined_rows_cost_what_the_same_rows_cost_one_by_one():
    """Attention goes document by document: four joined rows are four times the work of one, and no more."""
    for strategy in STRATEGIES.values():
        setup = Setup(rows=1, sequence_length=512, padding_free=True)
        one = step_work(SMALL, strategy, setup).flops
        assert step_work(SMALL, strategy, replace(setup, rows=4)).flops == pytest.approx(4 * one)


def test_a_model_of_seven_billion_computes_six_flops_a_weight_and_token():
    """arXiv:2001.08361: twice the parameters forward, twice that backward; attention comes on top."""
    model = MODELS["llama-7b"]
    setup = Setup(sequence_length=1)
    flops = step_work(model, STRATEGIES["FSDP"], setup).flops
    assert flops == pytest.approx(6 * (model.params - model.head_params), rel=0.01)  # the embedding is looked up
    frozen = step_work(model, STRATEGIES["FSDP+LoRA"], replace(setup, lora_rank=1)).flops
    assert frozen == pytest.approx(4 * (model.params - model.head_params), rel=0.01)


# -------------------------------------------------------------------------------------------------------------------
# Memory against fake tensors, real runs and DeepSpeed's own prefetcher
# -------------------------------------------------------------------------------------------------------------------


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
        pytest.param("FSDP+LoRA", {"rows": 4, "lora_targets": ("q_proj", "v_proj")}, marks=pytest.mark.slow),
        pytest.param("pp", {"rows": 2, "gpus": 1, "compute_bytes": 4}, marks=pytest.mark.slow),
        pytest.param("pp", {"rows": 2, "gpus": 1, "checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_formula_agrees_with_the_step_on_fake_tensors(strategy, changes):
    setup = replace(Setup(sequence_length=512, padding_free=False, on_cpu=True), **changes)
    simulated, _ = plan_simulation.simulate(SMALL, STRATEGIES[strategy], setup)
    assert memory.memory(SMALL, STRATEGIES[strategy], setup).total == pytest.approx(simulated, rel=0.1)


def test_a_product_in_4_bit_keeps_no_input():
    """As Setup.kept_inputs has it for the installed bitsandbytes; that of 2023 and 2024 kept it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    product = bitsandbytes.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    product.weight.requires_grad_(False)
    source = torch.randn(8, 64, requires_grad=True)
    inputs = source * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = product(inputs)
    reference = weakref.ref(inputs)
    del inputs
    assert not saved and reference() is None and Setup().kept_inputs == 0
    output.sum().backward()
    assert source.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("adapter", "compiled"),
    [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.slow)],
)
def test_a_layer_keeps_for_its_backward_what_the_description_says(adapter, compiled):
    """Byte by byte, as autograd asks for it: storages that are neither weights nor the rotary tables."""
    model = llama(256, 704, 2, 4, 4, 500)
    length = 128
    network = AutoModelForCausalLM.from_config(llama_config(model))
    if adapter:
        lora = peft.LoraConfig("CAUSAL_LM", r=8, target_modules="all-linear", lora_dropout=0.05)
        network = peft.get_peft_model(network, lora).get_base_model()
    layer = network.model.layers[1]
    if compiled:
        layer.compile(dynamic=True)
    hidden = torch.randn(1, length, model.hidden, requires_grad=True)
    positions = torch.arange(length)[None]
    tables = network.model.rotary_emb(hidden, positions)
    known = [*layer.parameters(), *tables]
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(2):  # the first one compiles
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(hidden, position_embeddings=tables, position_ids=positions)
        for tensor in [*known, output]:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        output.sum().backward()
    strategy = STRATEGIES["FSDP"]
    if adapter:
        strategy = STRATEGIES["FSDP+LoRA"]
    setup = Setup(rows=1, sequence_length=length, compute_bytes=4, on_cpu=True, compiled=compiled)
    assert saved_bytes(model, strategy, setup) == pytest.approx(sum(kept.values()), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-7b", "llama-13b", "llama-33b", "llama-2-70b"])
@pytest.mark.parametrize("strategy", ["FSDP", "FSDP+LoRA"])
def test_the_formula_agrees_with_the_step_of_large_models(strategy, name):
    for checkpointing in (False, True):
        setup = Setup(rows=4, padding_free=False, on_cpu=True, checkpointing=checkpointing)
        simulated, _ = plan_simulation.simulate(MODELS[name], STRATEGIES[strategy], setup)
        assert memory.memory(MODELS[name], STRATEGIES[strategy], setup).total == pytest.approx(simulated, rel=0.1)


@pytest.mark.slow
def test_the_formula_agrees_with_real_runs():
    """Each strategy with one and two processes: states within 10 %, the peak of the resident memory within 15 %."""
    print(run_script("tools/plan.py", "--validate", "quick").stdout)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("strategy", ["ZeRO-3", "ZeRO-3+LoRA", "ZeRO-3+LoRA+DPO"])
def test_zero3_gathers_ahead_what_deepspeeds_own_prefetcher_does(strategy, padding_free, monkeypatch):
    """DeepSpeed's coordinator, driven in the order of a step of a model without weights, counts what it gathers."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as deepspeed

    model = plan_validation.SIZES[0]
    status = deepspeed.ZeroParamStatus
    setup = Setup(compute_bytes=4, checkpointing=True, padding_free=padding_free)
    module = skeleton(llama_config(model))
    if STRATEGIES[strategy].adapter:
        lora = peft.LoraConfig("CAUSAL_LM", target_modules="all-linear", lora_dropout=0.05)
        module = peft.get_peft_model(module, lora)
    parameters = list(module.parameters())
    calls = []

    def set_status(group, value):
        for parameter in group:
            parameter.ds_status = value

    def gather(group, quantize):
        set_status(group, status.INFLIGHT)
        return SimpleNamespace(wait=lambda handle_dependency=True: set_status(group, status.AVAILABLE))

    for number, parameter in enumerate(parameters):
        parameter.ds_id = number
        parameter.ds_numel = parameter.numel()
        parameter.ds_shape = parameter.shape
        parameter.ds_persist = parameter.numel() <= 10 * model.hidden  # transformers' "auto"
        parameter.ds_active_sub_modules = set()
        parameter.is_external_param = False
        parameter.ds_tensor = SimpleNamespace(final_location=None)
        parameter.ds_secondary_tensor = None
        parameter.nvme_swapper = None
        parameter.partition_numel = parameter.numel
        parameter.all_gather_coalesced = gather
        parameter.ds_summary = str
        parameter.partition = lambda free_data, alone=(parameter,): set_status(alone, status.NOT_AVAILABLE)
    set_status(parameters, status.NOT_AVAILABLE)
    for number, submodule in enumerate(module.modules()):
        submodule.ds_id = number
        submodule.ds_recompute_parameters = set()
        submodule.ds_external_parameters = tuple
        submodule.register_forward_pre_hook(lambda submodule, *_: calls.append((submodule, True)))
        submodule.register_forward_hook(lambda submodule, *_: calls.append((submodule, False)))
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    mask = torch.zeros(1, 1, 8, 8, device="meta")
    module(input_ids=ids, attention_mask=mask, use_cache=False)
    forward = list(calls)
    passes = [(forward, False)] * 2 * padding_free  # check_document_attention has two forwards
    for _ in range(3):
        if STRATEGIES[strategy].computes_reference:
            calls.clear()
            with module.disable_adapter():
                module(input_ids=ids, attention_mask=mask, use_cache=False)
            passes.append((list(calls), False))
        passes.append((forward, True))

    for name in ("print_rank_0", "assert_ints_same_as_other_ranks"):
        monkeypatch.setattr(deepspeed, name, lambda *_, **__: None)
    limits = (int(0.9 * model.hidden**2), 10**9, 10**9)
    registry = deepspeed.InflightParamRegistry()
    coordinator = deepspeed.PartitionedParameterCoordinator(*limits, None, registry)
    gathered = []
    for calls, with_backward in passes:
        coordinator.reset_step()
        gathered.clear()
        backward = []
        if with_backward:
            backward = [(submodule, not enters) for submodule, enters in reversed(calls)]
        for number, (submodule, enters) in enumerate(calls + backward):
            if enters:
                coordinator.trace_prologue(submodule)
                if coordinator.is_record_trace():
                    coordinator.record_module(submodule)
                coordinator.fetch_sub_module(submodule, forward=number < len(calls))
            else:
                coordinator.release_sub_module(submodule, forward=number < len(calls))
            whole = 0
            for parameter in parameters:
                if parameter.ds_status != status.NOT_AVAILABLE and not parameter.ds_persist:
                    whole += parameter.ds_numel
            gathered.append(4 * whole)
    most, again, _ = memory.prefetched(model, STRATEGIES[strategy], setup)
    if STRATEGIES[strategy].computes_reference:
        assert most == again == 0
        # Beside the module that computes: the known order is followed until it turns out to be another, in layer one.
        assert max(gathered) < 4 * (model.head_params + model.layer_params)
        assert gathered[len(forward) - 1] < 4 * model.layer_params
        return
    assert most == pytest.approx(max(gathered[: len(forward)]), rel=0.1)
    head = 4 * model.head_params * (not padding_free)  # released behind its use, or not
    assert again + head == pytest.approx(gathered[len(forward) - 1], rel=0.1)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_of_joined_rows_holds_what_the_formula_says(dtype, trained):
    """Of 600 targets in chunks, counted by torch's profiler; 5,000 ids, so that the logits outweigh the rest."""
    model = llama(64, 176, 3, 4, 4, 5000)
    strategy = STRATEGIES["FSDP+LoRA"]
    if trained:
        strategy = STRATEGIES["FSDP"]
    hidden = torch.randn(600, model.hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(model.vocab, model.hidden, dtype=dtype, requires_grad=trained)
    ids = torch.zeros(600, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        data_collator.summed_cross_entropy(hidden, weight, ids)
    held = 0
    most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    setup = Setup(sequence_length=600, compute_bytes=dtype.itemsize, on_cpu=True)
    assert memory.logits_bytes(model, strategy, setup) == pytest.approx(most, rel=0.05)


# -------------------------------------------------------------------------------------------------------------------
# Against what others published
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    return plan_published.read_runs()


def sizes_by_kind(runs, name: str) -> dict[str, list[float]]:
    """The sizes of the errors of known rows, by kind, and of all."""
    sizes = {"all": []}
    for run in runs:
        error = getattr(run, name)
        if run.is_known and error is not None:
            sizes["all"].append(abs(error))
            sizes.setdefault(run.kind, []).append(abs(error))
    return sizes


def test_times_of_published_runs(runs):
    """Median below 10 %, nine of ten below 25 %, in every kind that has at least four known rows."""
    for kind, sizes in sizes_by_kind(runs, "speed_error").items():
        if len(sizes) >= 4:
            assert plan_published.percentile(sizes, 0.5) < 0.10, kind
            assert plan_published.percentile(sizes, 0.9) < 0.25, kind


def test_memory_of_published_runs(runs):
    """Median below 8 %, nine of ten below 15 %, each compared with what its source states."""
    for kind, sizes in sizes_by_kind(runs, "memory_error").items():
        if len(sizes) >= 4:
            assert plan_published.percentile(sizes, 0.5) < 0.08, kind
            assert plan_published.percentile(sizes, 0.9) < 0.15, kind


@pytest.fixture(scope="module")
def more_runs():
    return plan_published.read_runs(plan_published.MORE_RUNS)


def test_published_runs_that_the_plan_had_never_met(more_runs):
    """The same limits for those whose setting is fully known, and there are enough of them."""
    unseen = [run for run in more_runs if not run.is_fitted]
    times = sizes_by_kind(unseen, "speed_error")
    assert len(times["all"]) > 90
    for kind, sizes in times.items():
        if len(sizes) >= 4:
            assert plan_published.percentile(sizes, 0.5) < 0.10, kind
            assert plan_published.percentile(sizes, 0.9) < 0.25, kind
    sizes = [abs(run.memory_error) for run in unseen if run.memory_error is not None]
    assert plan_published.percentile(sizes, 0.5) < 0.08
    assert plan_published.percentile(sizes, 0.9) < 0.15


@pytest.mark.parametrize("page", ["plan.md", "plan_zh.md"])
def test_what_the_page_says_of_them(page, more_runs):
    unseen = [run for run in more_runs if not run.is_fitted and run.speed_error is not None]
    rest = [run for run in unseen if run.row["source"] != plan_published.LARGEST_TABLE]
    zero2 = [100 * run.speed_error for run in rest if run.kind == "ZeRO-2"]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (paragraph,) = [part for part in text.split("\n\n") if "127" in part]
    sizes = [abs(run.speed_error) for run in unseen]
    expected = [
        len(unseen),
        f"{100 * statistics.median(sizes):.1f}",
        round(100 * plan_published.percentile(sizes, 0.9)),
        len(unseen) - len(rest),
        len(rest),
        f"{100 * statistics.median(abs(run.speed_error) for run in rest):.1f}",
        round(min(zero2)),
        round(max(zero2)),
    ]
    numbers = re.findall(r"(?<![\w-])\d+(?:\.\d+)?", paragraph)
    assert numbers == [str(number) for number in expected]


def test_published_runs_that_showed_a_mistake(more_runs):
    """Small forwards, where Python is slow; two cards over PCIe; ZeRO-3 on one GPU; inputs that bitsandbytes kept."""
    seen = [run for run in more_runs if run.is_fitted]
    times = [abs(run.speed_error) for run in seen if run.speed_error is not None]
    memories = [abs(run.memory_error) for run in seen if run.memory_error is not None]
    assert max(times) < 0.25
    assert plan_published.percentile(memories, 0.5) < 0.08
    assert plan_published.percentile(memories, 0.9) < 0.15


def test_no_published_run_counts_twice(runs, more_runs):
    names = ("source", "model", "strategy", "gpu", "gpus", "nodes", "rows", "accumulation", "sequence_length")
    names += ("checkpointing", "compiled", "lora_targets", "speed", "memory")
    rows = [tuple(run.row[name].removesuffix(".0") for name in names) for run in runs + more_runs]
    assert len(set(rows)) == len(rows)


def test_the_ranges_that_the_plan_shows_are_those_of_the_published_runs(runs, more_runs):
    assert json.loads(plan_published.ERRORS.read_text()) == plan_published.make_ranges(runs, more_runs)


def test_the_former_version_is_shown_beside_the_new_one(runs, capsys):
    plan_published.print_kinds("rows", runs)
    out = capsys.readouterr().out
    assert "old median" in out and "full FSDP" in out
    assert max(map(len, out.splitlines())) <= 120


# -------------------------------------------------------------------------------------------------------------------
# Directions that anyone who trained knows; a formula that lost a term would break one of them
# -------------------------------------------------------------------------------------------------------------------


def total(strategy, setup, model="llama-7b"):
    return memory.memory(MODELS[model], STRATEGIES[strategy], setup).total


def seconds(strategy, setup, machine=A100, model="llama-7b"):
    return speed(MODELS[model], STRATEGIES[strategy], setup, machine).step_seconds


def test_what_saves_memory_and_what_it_costs():
    setup = Setup(rows=8)
    checkpointed = replace(setup, checkpointing=True)
    assert total("FSDP", checkpointed) < total("FSDP", setup) / 2
    assert seconds("FSDP", checkpointed) > 1.2 * seconds("FSDP", setup)
    assert total("QLoRA", setup) < total("FSDP+LoRA", setup) < total("FSDP", setup)
    assert total("ZeRO-3 offload", setup) < total("ZeRO-3", setup) < total("ZeRO-2", setup)
    assert seconds("ZeRO-2 offload", setup) > seconds("ZeRO-2", setup)
    assert total("FSDP", replace(setup, nodes=8)) < total("FSDP", setup)
    states = memory.memory(MODELS["llama-7b"], STRATEGIES["FSDP"], setup).states
    assert states == 16 * MODELS["llama-7b"].params / 8
    few_targets = replace(setup, rows=16, target_share=0.1)
    assert total("FSDP", few_targets) < total("FSDP", replace(setup, rows=16))
    assert total("FSDP+LoRA", replace(setup, lora_targets=("q_proj", "v_proj"))) < 0.9 * total("FSDP+LoRA", setup)
    assert total("FSDP", replace(setup, optimizer_bytes=2)) < total("FSDP", setup)
    assert total("FSDP", replace(setup, compiled=True)) < total("FSDP", setup)


def test_what_takes_time():
    setup = Setup(rows=8, padding_free=False, sequence_length=4096)
    assert seconds("FSDP", replace(setup, attention="eager")) > 1.2 * seconds("FSDP", setup)
    assert seconds("FSDP", replace(setup, compiled=True)) < seconds("FSDP", setup)
    h100 = replace(A100, gpu=GPUS["h100-80g"])
    assert 1.5 < seconds("FSDP", setup) / seconds("FSDP", setup, h100) < 3
    flash3 = replace(setup, padding_free=True, attention="flash_attention_3")
    assert seconds("FSDP", flash3, h100) < seconds("FSDP", replace(setup, padding_free=True), h100)
    # An adapter's many small operations: a forward of few tokens takes what starting them takes.
    few = Setup(gpus=1, sequence_length=64)
    one = replace(A100, gpus=1)
    assert seconds("pp_peft", few, one) > seconds("pp_peft", replace(few, lora_targets=("q_proj", "v_proj")), one)
    assert seconds("pp_peft", replace(few, sequence_length=128), one) < 1.1 * seconds("pp_peft", few, one)
    # DeepSpeed gathers matrix by matrix, in every micro-step.
    short = Setup(gpus=2, sequence_length=256, rows=1, accumulation=8, checkpointing=True)
    two = replace(A100, gpus=2)
    assert seconds("ZeRO-3", short, two) > 2 * seconds("ZeRO-2", short, two)


def test_a_link_decides_whether_a_second_card_helps():
    """Of a 7B model with an adapter, weights sharded: hardly over a slow slot, nearly twice over a bridge."""
    setup = Setup(gpus=2, rows=1, sequence_length=2048, checkpointing=True)
    alone = replace(setup, gpus=1)
    card = GPUS["rtx3090"]
    gains = {}
    for name in ("pcie3-x4", "pcie3-x8", "pcie4-x16", "nvlink-bridge"):
        machine = Machine(replace(card, link=LINKS[name]), gpus=2)
        one = seconds("FSDP+LoRA", alone, replace(machine, gpus=1))
        gains[name] = 2 * one / seconds("FSDP+LoRA", setup, machine)
    assert list(gains.values()) == sorted(gains.values())
    assert gains["pcie3-x4"] < 1 and gains["nvlink-bridge"] > 1.7


def test_zero3_costs_python_s_time_on_a_single_gpu_too():
    short = Setup(gpus=1, sequence_length=256, rows=1, accumulation=8, checkpointing=True)
    one = replace(A100, gpus=1)
    assert seconds("ZeRO-3", short, one) > 1.5 * seconds("ZeRO-2", short, one)


def test_the_network_decides_between_sharding_and_a_pipeline():
    """docs/pipeline.md: the pipeline where the network is slow."""
    setup = Setup(gpus=8, nodes=2, rows=4, accumulation=4, sequence_length=512)
    pipeline = replace(setup, accumulation=64)  # each GPU sees all rows
    for network, sharding_is_faster in (("ib-200", True), ("10gbe", False)):
        machine = Machine(GPUS["a100-80g"], gpus=8, nodes=2, network=NETWORKS[network][0])
        assert (seconds("FSDP", setup, machine) < seconds("1F1B", pipeline, machine)) == sharding_is_faster


def test_a_pipeline_s_bubble_and_its_micro_batches_in_flight():
    """arXiv:2104.04473: (stages - 1) / micro-batches of the time; the first stage holds one micro-batch a stage."""
    few = Setup(gpus=8, rows=1, accumulation=8, sequence_length=2048)
    many = replace(few, accumulation=64)
    ratio = 8 * seconds("1F1B", few) / seconds("1F1B", many)
    assert ratio == pytest.approx((8 + 7) / 8 / ((64 + 7) / 64), rel=0.1)
    held = memory.memory(MODELS["llama-7b"], STRATEGIES["1F1B"], many)
    one = memory.memory(MODELS["llama-7b"], STRATEGIES["1F1B"], replace(few, accumulation=1))
    assert held.worst.activations > 4 * one.worst.activations


def test_stages_that_share_cores_take_what_a_greedy_scheduler_needs():
    """Four stages on two cores: not less than all work on both, not more than all of it on one, nor than four cores."""
    setup = Setup(gpus=4, rows=1, accumulation=8, sequence_length=256, compute_bytes=4, on_cpu=True)
    cpu = replace(GPUS["t4"], launch=0.0)
    step = {}
    for cores in (1, 2, 4):
        step[cores] = seconds("1F1B", setup, Machine(cpu, gpus=4, cores=cores), "smollm2-135m")
    assert step[1] / 2 < step[2] < step[1]
    assert step[4] < step[2]
    alone = seconds("pp", replace(setup, gpus=1), Machine(cpu, cores=2), "smollm2-135m")
    assert step[1] == pytest.approx(alone, rel=0.15)  # on one core the same work takes as long as without a pipeline


@pytest.mark.slow
def test_the_measured_bandwidth_of_a_cpu_is_that_of_its_memory_and_not_of_its_cache():
    """A small tensor that is multiplied again and again never leaves the cache, as no step's tensors do."""
    values = torch.randn(64, 64)

    def multiply() -> None:
        for _ in range(1000):
            torch.mul(values, values, out=values)

    in_cache = 1000 * 3 * values.numel() * 4 / measure.seconds_of(multiply)
    for processes in (1, 2):
        cpu = measure.measure_cpu(MODELS["smollm2-135m"], processes, bf16=False)
        assert 0 < cpu.memory_bandwidth < 0.7 * in_cache
        assert 0 < cpu.attention_share and 0 < cpu.launch < 1e-3


def test_nvidia_smi_shows_more_than_tensors_take_and_never_more_than_there_is():
    gpu = GPUS["a100-80g"]
    for held in (1e9, 2e10, 7e10):
        assert held < nvidia_smi_bytes(held, gpu, 1) < nvidia_smi_bytes(held, gpu, 8)
    assert nvidia_smi_bytes(usable_bytes(gpu, 8), gpu, 8) == gpu.memory


def test_the_largest_forward_is_the_largest():
    model = MODELS["llama-13b"]
    setup = Setup(checkpointing=True)
    most = memory.largest_rows(model, STRATEGIES["FSDP"], setup, A100.gpu)
    assert most > 1
    assert memory.fits(model, STRATEGIES["FSDP"], replace(setup, rows=most), A100.gpu)
    assert not memory.fits(model, STRATEGIES["FSDP"], replace(setup, rows=most + 1), A100.gpu)


def test_disk_and_traffic_of_full_fine_tuning_under_fsdp():
    """A checkpoint: weights and two moments in float32. A step: weights gathered twice, gradients reduced once."""
    model = MODELS["llama-7b"]
    setup = Setup(gpus=8)
    assert memory.memory(model, STRATEGIES["FSDP"], setup).disk == 12 * model.params
    step = speed(model, STRATEGIES["FSDP"], setup, A100)
    assert step.network_bytes == 0 and step.offload_bytes == 0
    assert step.link_bytes == pytest.approx((2 + 2 + 4) * model.params * 7 / 8, rel=0.01)


def test_sharding_over_a_whole_cluster_stops_scaling_and_hybrid_sharding_goes_on():
    job = Job("llama-7b", MODELS["llama-7b"], Setup(), batch=16384)
    table = search.scaling(job, "a100-80g", replace(A100, nodes=1024))
    assert [line["nodes"] for line in table] == [2**i for i in range(11)]
    hours = [line["fsdp_hours"] for line in table]
    assert hours[7] < hours[0] / 64 and hours[-1] > hours[-2] > min(hours)
    assert table[-1]["hsdp_hours"] < hours[-1] / 3
    twelve = search.scaling(job, "a100-80g", replace(A100, nodes=12))
    assert [line["nodes"] for line in twelve] == [1, 2, 4, 8, 12]


def test_work_of_a_layer_and_of_the_head_make_up_the_step():
    setup = Setup(rows=2, accumulation=3)
    whole = step_work(SMALL, STRATEGIES["FSDP"], setup)
    layer = layer_work(SMALL, STRATEGIES["FSDP"], setup)
    head = head_work(SMALL, STRATEGIES["FSDP"], setup)
    assert whole.flops == pytest.approx(3 * (3 * layer.flops + head.flops))


# -------------------------------------------------------------------------------------------------------------------
# What a user gets
# -------------------------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, *words) -> str:
    """What the program prints; it runs in this process, since a new one would import torch again."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
    plan.main()
    return capsys.readouterr().out


def test_the_default_answer_is_three_ways_with_command_memory_time_and_price(monkeypatch, capsys):
    out = call(monkeypatch, capsys, "--model", "llama-3-8b", "--sequence_length", 2048, "--batch", 128)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    for number in (1, 2, 3):
        (start,) = [i for i, line in enumerate(lines) if line.startswith(f"{number}. ")]
        assert "GiB in nvidia-smi (" in lines[start + 1] and "[" in lines[start + 1]
        assert "hours (" in lines[start + 2] and "dollars (" in lines[start + 2]
        assert "sh scripts/" in "".join(lines[start + 3 : start + 6])
    assert "all weights" in out and "LoRA, rank 8" in out
    assert "90th percentile" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--all", True],
        ["--model", "llama-3-70b", "--nodes", 12, "--batch", 768, "--all", True],
        ["--ask", "models", "--gpu", "rtx4090", "--gpus", 1],
        ["--ask", "context", "--model", "qwen3-8b", "--gpu", "l40s", "--gpus", 2],
        ["--ask", "gpus", "--model", "llama-3-70b", "--gpu", "h100-80g", "--deadline", 48, "--batch", 512],
        ["--model", "llama-3-8b", "--gpu", "l4,h100-80g,b200", "--gpus", "1,8", "--deadline", 24, "--budget", 300],
        ["--deadline", 0.001],
        ["--list", True],
    ],
)
def test_every_answer_fits_in_120_columns(words, monkeypatch, capsys):
    out = call(monkeypatch, capsys, *words)
    assert out and max(map(len, out.splitlines())) <= 120


def test_json_and_picture_of_a_plan_for_a_folder(tiny_model, tmp_path, monkeypatch, capsys):
    flags = ["--model", tiny_model, "--gpus", 2, "--batch", 8, "--price_per_gpu_hour", 2]
    out = call(monkeypatch, capsys, *flags, "--output_dir", tmp_path / "plan", "--json", "True")
    result = json.loads(out)
    strategies = {row["strategy"] for row in result["rows"]}
    assert strategies == set(SUPERVISED) and len(result["best"]) == 3
    row = result["rows"][0]
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
    assert sum(row[f"{part}_bytes"] for part in parts) == pytest.approx(row["total_bytes"], abs=6)
    assert row["price"] == pytest.approx(row["hours"] * 2 * 2)
    assert row["hours_range"][0] <= row["hours"] <= row["hours_range"][1]
    assert (tmp_path / "plan" / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_the_cheapest_way_keeps_deadline_and_budget(monkeypatch, capsys):
    """Of several kinds and numbers of GPUs; without limits there are cheaper and faster ones."""
    flags = ["--model", "llama-3-8b", "--gpu", "a100-80g,h100-80g,l4", "--gpus", "1,2,4,8", "--tokens", 5e8]
    flags += ["--batch", 128, "--sequence_length", 2048, "--json", True]
    limited = json.loads(call(monkeypatch, capsys, *flags, "--deadline", 10, "--budget", 200))
    for way in limited["best"]:
        assert way["hours"] <= 10 and way["price"] <= 200
    free = json.loads(call(monkeypatch, capsys, *flags))
    slowest = max(way["hours"] for way in free["rows"] if way["fits"])
    assert slowest > 10
    prices = [way["price"] for way in limited["best"]]
    possible = [way["price"] for way in limited["rows"] if way["fits"] and way["hours"] <= 10]
    assert min(prices) == pytest.approx(min(possible), rel=0.2)  # ordered by the middle of their ranges


def test_pinned_rows_accumulation_and_strategy(monkeypatch, capsys):
    flags = ["--strategy", "FSDP", "--rows", 4, "--accumulation", 2, "--checkpointing", True, "--json", True]
    rows = json.loads(call(monkeypatch, capsys, *flags))["rows"]
    assert [(row["strategy"], row["rows_of_forward"], row["accumulation"]) for row in rows] == [("FSDP", 4, 2)]


def test_a_card_of_one_s_own_is_planned_for_as_a_known_one(monkeypatch, capsys):
    """The data sheet of an RTX A6000."""
    flags = ["--gpus", 1, "--batch", 8, "--strategy", "QLoRA", "--json", True]
    own = ["--gpu_memory", 48, "--gpu_flops", 155, "--gpu_bandwidth", 768]
    described = json.loads(call(monkeypatch, capsys, *flags, *own))["rows"][0]
    known = json.loads(call(monkeypatch, capsys, *flags, "--gpu", "a6000"))["rows"][0]
    assert described["gpu"] == "custom"
    assert described["hours"] == pytest.approx(known["hours"], rel=0.1)
    assert described["total_bytes"] == known["total_bytes"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--gpu", "cpu", "--gpus", 2, "--link", "nvlink4"], "--link nvlink4: processes on a CPU exchange"),
        (
            ["--gpu", "rtx3090", "--gpus", 4, "--link", "nvlink-bridge"],
            "--link nvlink-bridge: it joins two GPUs",
        ),
        (["--gpu", "cpu,a100-80g", "--gpus", 1], "--gpu cpu,a100-80g: ask about the CPU by itself"),
        (["--ask", "context", "--gpu", "rtx3090,rtx4090", "--gpus", 1], "--ask context: name one kind of GPU"),
        (["--ask", "models", "--gpus", "1,2"], "--ask models: name one kind of GPU"),
    ],
)
def test_a_question_that_makes_no_sense_is_answered_in_words(flags, part, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(plan, "measure_this_cpu", lambda *inputs: measured.append(inputs))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, "--batch", 8, *flags)
    assert part in stopped.value.code and not measured


def save_machine(folder, **speeds) -> str:
    """What tools/doctor.py --json writes of a machine without a GPU."""
    path = folder / "machine.json"
    measured = {"cpu": asdict(GPUS["t4"]), "gpu": None, "speeds": {"cores": 2, "disk": 1e8, **speeds}}
    path.write_text(json.dumps(measured))
    return str(path)


def test_what_was_measured_of_a_cpu_says_nothing_of_rented_gpus(tmp_path, monkeypatch, capsys):
    flags = ["--gpu", "h100-80g", "--strategy", "FSDP", "--model", "llama-3.2-1b", "--json", True]
    alone = json.loads(call(monkeypatch, capsys, *flags))["rows"][0]
    beside = json.loads(call(monkeypatch, capsys, *flags, "--machine", save_machine(tmp_path)))["rows"][0]
    assert beside["hours"] == alone["hours"]


def test_what_the_user_says_counts_more_than_what_was_measured(tmp_path, monkeypatch, capsys):
    flags = ["--gpus", 1, "--batch", 8, "--strategy", "pp_peft", "--model", "smollm2-135m", "--json", True]
    flags += ["--machine", save_machine(tmp_path)]
    measured = json.loads(call(monkeypatch, capsys, *flags))["rows"][0]
    stated = json.loads(call(monkeypatch, capsys, *flags, "--disk", 2))["rows"][0]
    assert measured["checkpoint_seconds"] == pytest.approx(20 * stated["checkpoint_seconds"])


@pytest.mark.parametrize("what", ["an older version", "an unknown speed"])
def test_a_measurement_that_does_not_fit_is_explained(what, tmp_path, monkeypatch, capsys):
    path = Path(save_machine(tmp_path, warp=9))
    if what == "an older version":
        measured = json.loads(path.read_text())
        measured["cpu"]["link"] = 1e9
        path.write_text(json.dumps(measured))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, "--machine", path)
    part = {"an older version": "an older version wrote it; measure again", "an unknown speed": "warp"}[what]
    assert "machine.json: not a file that tools/doctor.py --json writes" in stopped.value.code
    assert part in stopped.value.code


def test_one_gpu_is_not_told_three_names_of_one_way(monkeypatch, capsys):
    flags = ["--gpu", "rtx4090", "--gpus", 1, "--model", "llama-3-8b", "--batch", 64, "--json", True]
    names = [way["strategy"] for way in json.loads(call(monkeypatch, capsys, *flags))["best"]]
    assert names == ["QLoRA", "pp_peft"]


def test_two_ways_to_offload_are_two_ways_on_one_gpu(monkeypatch, capsys):
    flags = ["--gpu", "rtx4090", "--gpus", 1, "--model", "llama-3.2-3b", "--batch", 64, "--json", True]
    flags += ["--strategy", "ZeRO-2 offload,ZeRO-3 offload"]
    names = {way["strategy"] for way in json.loads(call(monkeypatch, capsys, *flags))["best"]}
    assert names == {"ZeRO-2 offload", "ZeRO-3 offload"}


def test_a_way_that_may_not_fit_is_chosen_only_where_nothing_else_fits(monkeypatch, capsys):
    flags = ["--gpu", "rtx4090", "--gpus", 1, "--model", "llama-3-8b", "--batch", 64, "--strategy", "pp_peft"]
    assert "may not fit" not in call(monkeypatch, capsys, *flags)
    assert "it may not fit" in call(monkeypatch, capsys, *flags, "--checkpointing", False)
    (way,) = json.loads(call(monkeypatch, capsys, *flags, "--json", True))["best"]
    assert way["checkpointing"] and way["nvidia_smi_range"][1] < way["gpu_bytes"]


def test_the_link_is_shown_where_there_are_several_gpus(monkeypatch, capsys):
    flags = ["--gpu", "rtx3090", "--gpus", 2, "--model", "llama-3.2-1b", "--batch", 8]
    assert "on 2 rtx3090 (pcie4-x8)" in call(monkeypatch, capsys, *flags)
    assert "on 2 rtx3090 (11 GB/s)" in call(monkeypatch, capsys, *flags, "--link", 11)


def test_cards_without_bf16_are_planned_for_in_float32(monkeypatch, capsys):
    flags = ["--gpus", 1, "--batch", 8, "--strategy", "pp_peft", "--checkpointing", True, "--json", True]
    t4 = json.loads(call(monkeypatch, capsys, *flags, "--gpu", "t4", "--model", "llama-3.2-1b"))["rows"][0]
    a10g = json.loads(call(monkeypatch, capsys, *flags, "--gpu", "a10g", "--model", "llama-3.2-1b"))["rows"][0]
    assert t4["weights_bytes"] > 1.9 * a10g["weights_bytes"]
    assert t4["hours"] > 5 * a10g["hours"]


def test_mistakes_are_reported_together(tmp_path, monkeypatch, capsys):
    MixtralConfig(**SIZES, vocab_size=500).save_pretrained(tmp_path)
    flags = ["--model", tmp_path, "--batch", 0, "--target_share", 2, "--network", "fast", "--strategy", "DDP"]
    flags += ["--gpu_memory", 48, "--ask", "price", "--prices", tmp_path / "none.csv", "--link", "usb"]
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, *flags)
    for part in (
        "a mixture of experts",
        "--batch 0",
        "--target_share 2.0",
        "--network fast: a number of GB/s above 0, or one of none, 1gbe",
        "choose from all, full, lora, dpo, pp",
        "--gpu_memory 48.0: a card of your own needs all three",
        "--ask price: choose from best, models, context, gpus",
        "none.csv: not a CSV file",
        "--link usb: a number of GB/s above 0, or one of pcie3-x4",
    ):
        assert part in stopped.value.code
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, capsys, "--gpu", "v200")
    assert "choose from all, cpu, a100-80g" in stopped.value.code
    names = {"4090": "rtx4090", "H100": "h100-80g", "a10": "a100-80g", "qlora": "QLoRA", "fsdp": "FSDP or FSDP+LoRA"}
    for value, close in names.items():
        flag = "--strategy" if value in ("qlora", "fsdp") else "--gpu"
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, capsys, flag, value)
        assert f"{flag} {value}: is it {close}" in stopped.value.code


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory):
    """A tiny model of four layers, 16 rows and 16 pairs."""
    folder = tmp_path_factory.mktemp("commands")
    model = save_tiny_model(folder / "model", num_layers=4)
    rows = save_rows([{"input_ids": [1, 5, 6, 7, 2], "labels": [-100, 5, 6, 7, 2]}] * 16, folder / "rows")
    pairs = save_preferences(random_pairs(16), folder / "pairs")
    return model, rows, pairs


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=() if name == "pp_peft" else pytest.mark.slow) for name in STRATEGIES]
)
def test_the_command_that_is_printed_runs(strategy, tiny_parts, tmp_path, monkeypatch):
    """As it stands in the answer, with the number of steps behind it, on CPU processes."""
    if STRATEGIES[strategy].four_bit:
        pytest.importorskip("bitsandbytes")
    model, rows, pairs = tiny_parts
    if STRATEGIES[strategy].preferences:
        rows = pairs
    setup = Setup(on_cpu=True, lora_targets=("q_proj", "v_proj"), lora_rank=4)
    job = Job(str(model), plan.load_model(str(model)), setup, batch=8, strategies=(strategy,))
    machine = replace(A100, gpus=2)
    if STRATEGIES[strategy].is_one_process:
        machine = replace(A100, gpus=1)
    way = search.all_ways(job, [("a100-80g", machine)], {})[1]
    command = "\n".join(show.wrap(show.command_words(job, way), "   "))
    environment = {"DATASET": str(rows), "OUTPUT_DIR": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        ["bash", "-c", f"{command} --max_steps 1"],
        cwd=ROOT,
        env=plan.os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    receipt = json.loads((tmp_path / "out" / "run.json").read_text())
    assert receipt["arguments"]["per_device_train_batch_size"] == way.setup.rows
    assert receipt["arguments"]["gradient_accumulation_steps"] == way.setup.accumulation
    assert receipt["arguments"]["gradient_checkpointing"] is True
