"""The pipeline over processes: it trains what one process trains, for any number of stages, and all ranks end together.

Runs are started by tests/harness.py: forked from a process that has imported the scripts, or by torchrun.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import test_trainers
import torch
from conftest import ROOT, make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from harness import (
    NUM_STEPS,
    STRATEGIES,
    Runs,
    assert_identical,
    environments,
    history_of,
    kill,
    losses_of,
    newest_complete,
    steps_in,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_equivalence import ASSERTED, MODES, deviations, pack, weights_before
from test_launchers import command_of, text_of
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import data_collator
import finetune_pp
import finetune_pp_1f1b
from finetune_pp_1f1b import place_on_stages

# Eight rows a step in four micro-batches, over an epoch end with a short window; every step has another length.
RUN = ["--num_train_epochs", 2, "--weight_decay", 0.1, "--eval_dataset_path", "{eval}", "--eval_steps", 2]
MICRO = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--per_device_eval_batch_size", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("pipeline"))
    for name, seed, count in (("rows", 5, 44), ("eval", 4, 14)):
        packed = pack(random_rows(count, seed=seed, longest=14))
        runs.parts[f"packed {name}"] = save_rows(packed, runs.folder / f"packed-{name}")
    for tied in (False, True):
        runs.parts[f"deep tied={tied}"] = save_tiny_model(runs.folder / f"deep-{tied}", tied=tied, num_layers=5)
    return runs


def data_flags(rows: str, tied: bool) -> list[str]:
    prefix = "packed " if rows == "packed" else ""
    flags = ["--model_path", f"{{deep tied={tied}}}", "--dataset_path", f"{{{prefix}rows}}"]
    return [*flags, "--eval_dataset_path", f"{{{prefix}eval}}", "--padding_free", rows == "padding-free"]


def reference(runs: Runs, lora: bool, rows: str, tied: bool) -> Path:
    """What one process trains: a run of the plain loop, made once."""
    key = ("reference", lora, rows == "packed", tied)
    if key not in runs.made:
        runs.made[key] = runs.folder / "-".join(map(str, key))
        flags = [*RUN, *data_flags(rows, tied), *(MODES["lora"] if lora else []), "--per_device_train_batch_size", 8]
        runs.train("plain PEFT" if lora else "plain", 1, runs.made[key], *flags)
    return runs.made[key]


def start_of(runs: Runs, lora: bool, rows: str, tied: bool) -> dict[str, torch.Tensor]:
    flags = runs.flags("plain PEFT" if lora else "plain", runs.folder / "none", *data_flags(rows, tied))
    return weights_before("lora" if lora else "full", [flags[0], runs.parts[f"deep tied={tied}"], *flags[2:]])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CELLS = [
    slow(num_ranks, lora, rows, tied)
    for num_ranks, lora, rows, tied in itertools.product(
        (1, 2, 3, 4), (False, True), ("padded", "padding-free", "packed"), (False, True)
    )
]


@pytest.mark.parametrize(
    ("num_ranks", "lora", "rows", "tied"), [(2, False, "padding-free", True), (2, True, "packed", False), *CELLS]
)
def test_any_number_of_stages_trains_what_one_process_trains(num_ranks, lora, rows, tied, runs, tmp_path):
    out, strategy = tmp_path / "run", "1F1B+LoRA" if lora else "1F1B"
    run = runs.train(strategy, num_ranks, out, *RUN, *MICRO, *data_flags(rows, tied), *(MODES["lora"] if lora else []))
    assert "Traceback" not in run.output
    receipt = json.loads((out / "run.json").read_text())
    assert receipt["world_size"] == num_ranks == len(receipt["peak_memory_bytes"])
    largest = deviations(out, reference(runs, lora, rows, tied), start_of(runs, lora, rows, tied))
    print(f"{num_ranks} stages, {'LoRA' if lora else 'full'}, {rows}, tied {tied}: {largest}")
    assert {name: value for name, value in largest.items() if not value <= ASSERTED[name]} == {}


def dump_gradients(module, folder) -> None:
    """A probe: each rank writes the gradients of the first step by name, before the optimizer has them."""
    make_optimizer, find_weights, found = module.make_optimizer, module.find_weights, []

    def remember(*args):
        found.append(find_weights(*args))
        return found[0]

    def make_dumping_optimizer(args, stage):
        optimizer = make_optimizer(args, stage)

        def dump(*_):
            path = folder / f"gradients-{stage.rank}.pt"
            if not path.exists():
                torch.save({name: weight.grad.clone() for name, weight in found[0].trained.items()}, path)

        optimizer.register_step_pre_hook(dump)
        return optimizer

    module.make_optimizer, module.find_weights = make_dumping_optimizer, remember


@pytest.mark.parametrize(("num_ranks", "tied"), [(2, True), slow(3, False), slow(3, True), slow(4, False)])
def test_the_gradients_of_the_first_step_are_those_of_one_process_tensor_by_tensor(num_ranks, tied, runs, tmp_path):
    """Not clipped. Each tensor has one owner, but for a tied head: both of its ends have the same sum."""
    flags = [*data_flags("padding-free", tied), "--max_steps", 1, "--max_grad_norm", 1e9]
    runs.train("1F1B", num_ranks, tmp_path / "run", *MICRO, *flags, probe=(dump_gradients, tmp_path))
    parts = [torch.load(tmp_path / f"gradients-{rank}.pt") for rank in range(num_ranks)]
    gradients = {name: gradient for part in parts for name, gradient in part.items()}
    assert sum(map(len, parts)) == len(gradients) + tied
    if tied:
        assert torch.equal(parts[0][finetune_pp_1f1b.EMBEDDING], parts[-1][finetune_pp_1f1b.EMBEDDING])

    given = runs.flags("plain", tmp_path / "none", *flags, "--per_device_train_batch_size", 8)
    (args,) = finetune_pp.HfArgumentParser(finetune_pp.Arguments).parse_args_into_dataclasses(given)
    config, _, rows, _, _ = finetune_pp.check_arguments(args)
    cpu = torch.device("cpu")
    model = finetune_pp.load_model(args, config, None, [cpu])
    batch = data_collator.DataCollator(True)(rows.step(0))
    loss = finetune_pp.forward(args, model, finetune_pp.choose_loss(args, model, rows), batch, cpu)
    (loss / data_collator.num_targets(batch)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def report_chunks(module, folder) -> None:
    """A probe: each rank writes how many micro-batches' activations it held at most, and the shape of each step."""
    original, forward = module.run_pipeline, module.PipelineStage.forward_one_chunk
    held, shapes = [], []

    def forward_one_chunk(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        held.append(len(self.fwd_cache) if torch.is_grad_enabled() else 0)  # evaluation keeps no activations
        return result

    def run_pipeline(args, stage, batch, num_targets):
        loss = original(args, stage, batch, num_targets)
        shapes.append(list(batch["input_ids"].shape))
        (folder / f"chunks-{stage.rank}.json").write_text(json.dumps({"held": max(held), "shapes": shapes}))
        return loss

    module.PipelineStage.forward_one_chunk, module.run_pipeline = forward_one_chunk, run_pipeline


@pytest.mark.parametrize(("schedule", "held"), [("1f1b", [3, 2, 1]), slow("gpipe", [6, 6, 6])])
def test_a_stage_holds_as_many_activations_as_stages_follow_and_steps_have_any_length(schedule, held, runs, tmp_path):
    """Padding-free, so a micro-batch is one row; its length is that of the step's longest."""
    flags = ["--pipeline_schedule", schedule, "--gradient_accumulation_steps", 6, "--per_device_train_batch_size", 1]
    flags += [*data_flags("padding-free", True), "--max_steps", 4]
    runs.train("1F1B", 3, tmp_path / "run", *flags, probe=(report_chunks, tmp_path))
    facts = [json.loads((tmp_path / f"chunks-{rank}.json").read_text()) for rank in range(3)]
    assert [rank["held"] for rank in facts] == held
    shapes = facts[0]["shapes"][:4]
    assert {rows for rows, _ in shapes} == {6} and all(rank["shapes"] == facts[0]["shapes"] for rank in facts)
    assert all(length != other for (_, length), (_, other) in itertools.pairwise(shapes))


@pytest.mark.parametrize("strategy", ["1F1B", "1F1B+LoRA"])
def test_one_rank_shows_progress_and_the_run_folder_is_that_of_one_process(strategy, runs, tmp_path):
    """The same files as the plain loop's, and each checkpoint has a file for each stage."""
    flags = [*RUN, *data_flags("padding-free", True), "--report_to", "tensorboard"]
    flags += MODES["lora"] if "LoRA" in strategy else []
    plain = "plain PEFT" if "LoRA" in strategy else "plain"
    runs.train(plain, 1, tmp_path / "plain", *flags, "--per_device_train_batch_size", 8)
    run = runs.train(strategy, 2, tmp_path / "run", *flags, *MICRO)
    assert run.output.count("0/6 [00:00<?, ?step/s]") == 1 and "training: 100%" in run.output

    names, expected = ({path.name for path in (tmp_path / name).iterdir()} for name in ("run", "plain"))
    assert names == expected and "run.json" in names
    checkpoint = tmp_path / "run" / f"checkpoint-{len(losses_of(tmp_path / 'run'))}"
    stages = {f"stage-{i:05}-of-00002.safetensors" for i in (1, 2)}
    assert {path.name for path in checkpoint.iterdir()} == stages | {"trainer_state.json", "settings.json"}
    assert finetune_pp_1f1b.find_damage(checkpoint) is None

    (events,) = (tmp_path / "run" / "runs").iterdir()  # of one rank
    curve = EventAccumulator(str(events)).Reload()
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        points = {event.step: event.value for event in curve.Scalars(f"train/{name}")}
        logged = {row["step"]: row[name] for row in history_of(tmp_path / "run") if name in row}
        assert points == pytest.approx(logged) and points

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")  # of an adapter: with its base
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits, reference = model(ids).logits, other(ids).logits
    assert (logits - reference).norm() <= 1e-3 * reference.norm()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--pipeline_schedule", "gpipe"], ["--gradient_checkpointing", "True"]])
def test_neither_the_schedule_nor_checkpointing_changes_what_is_trained(flags, runs, tmp_path):
    for strategy in ("1F1B", "1F1B+LoRA"):
        common = ["--max_steps", 4, *MICRO]
        runs.train(strategy, 2, tmp_path / strategy, *common)
        runs.train(strategy, 2, tmp_path / f"{strategy} other", *common, *flags)
        assert losses_of(tmp_path / f"{strategy} other") == pytest.approx(losses_of(tmp_path / strategy), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["1F1B", "1F1B+LoRA"])
def test_bf16_computes_what_one_process_computes_in_bf16(strategy, runs, tmp_path):
    flags = ["--bf16", "True", "--max_steps", 3, *(MODES["lora"] if "LoRA" in strategy else [])]
    plain = "plain PEFT" if "LoRA" in strategy else "plain"
    runs.train(plain, 1, tmp_path / "plain", *flags, "--per_device_train_batch_size", 8)
    runs.train(strategy, 2, tmp_path / "run", *flags, *MICRO)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-2)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "run").values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [(MistralConfig, MistralForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)],
)
def test_each_architecture_can_be_cut(config_class, model_class, runs, tmp_path):
    """Whatever its forward does beside embedding, layers, norm and head would be seen in the loss."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(
        **sizes, initializer_range=0.2, sliding_window=8, use_sliding_window=True, max_window_layers=2
    )
    assert config.model_type in finetune_pp_1f1b.MODEL_TYPES
    model_class(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--model_path", tmp_path / "model", "--max_steps", 3]
    runs.train("plain", 1, tmp_path / "plain", *flags, "--per_device_train_batch_size", 8)
    runs.train("1F1B", 2, tmp_path / "run", *flags, *MICRO)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)


# -------------------------------------------------------------------------------------------------------------------
# Which layers a rank owns
# -------------------------------------------------------------------------------------------------------------------


def test_no_other_cut_is_faster_and_equal_ones_are_preferred():
    for num_layers, num_stages, head in itertools.product(range(1, 9), range(1, 5), (0, 0.3, 1, 2.5, 20)):
        if num_stages > num_layers:
            continue
        blocks = place_on_stages(num_layers, num_stages, head)
        assert [i for block in blocks for i in block] == list(range(num_layers))
        assert len(blocks) == num_stages and all(blocks)

        def slowest(sizes, head=head):
            return max(*sizes[:-1], sizes[-1] + head)

        cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
        sizes = [[b - a for a, b in itertools.pairwise([0, *cut, num_layers])] for cut in cuts]
        if num_stages > 1:
            assert slowest([len(block) for block in blocks]) == min(map(slowest, sizes))
    assert [len(block) for block in place_on_stages(8, 4, 0)] == [2, 2, 2, 2]
    assert [len(block) for block in place_on_stages(30, 2, 8)] == [19, 11]  # a head that costs eight layers


def report_block(module, folder) -> None:
    """A probe: each rank writes the names and sizes of its parameters and what it needed to load them."""
    original = module.load_stage

    def peak() -> int:
        """Bytes: the most resident memory since clear_refs was written."""
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def load_stage(*args):
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")
        stage, weights, model = original(*args)
        own = {name: parameter.numel() for name, parameter in stage.named_parameters()}
        loaded = peak() - before
        sum(parameter.detach().sum() for parameter in stage.parameters())  # the files' pages are read when needed
        facts = {"own": own, "loaded": loaded, "read": peak() - before}
        (folder / f"block-{stage.rank}.json").write_text(json.dumps(facts))
        return stage, weights, model

    module.load_stage = load_stage


def test_a_rank_has_its_own_layers_and_nothing_else(runs, tmp_path):
    flags = [*data_flags("padded", False), "--max_steps", 1]
    runs.train("1F1B", 2, tmp_path / "run", *MICRO, *flags, probe=(report_block, tmp_path))
    blocks = [json.loads((tmp_path / f"block-{rank}.json").read_text())["own"] for rank in range(2)]
    with safe_open(runs.parts["deep tied=False"] / "model.safetensors", framework="pt") as file:
        assert sorted([*blocks[0], *blocks[1]]) == sorted(file.keys())
    assert "model.embed_tokens.weight" in blocks[0] and "lm_head.weight" in blocks[1]


@test_trainers.needs_sample
@pytest.mark.slow
def test_a_rank_reads_no_other_weights_than_its_own(runs, tmp_path):
    """Peak of resident memory above what the process had before: while loading, and until every weight was read."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom pathlib import Path\n"
        "import test_1f1b, finetune_pp_1f1b as script\n"
        f"test_1f1b.report_block(script, Path({str(tmp_path)!r}))\n"
        "script.train = lambda *args: (script.dist.barrier(), script.os._exit(0))\nscript.main()\n"
    )
    flags = [*MICRO, "--model_path", test_trainers.SAMPLE_MODEL]
    runs.launch("1F1B", tmp_path / "out", *flags, script=driver).finish(check=False)  # the other may see one end
    with safe_open(test_trainers.SAMPLE_MODEL / "model.safetensors", framework="pt") as file:
        whole = sum(file.get_tensor(name).numel() for name in file.keys()) * 4
    for rank in range(2):
        facts = json.loads((tmp_path / f"block-{rank}.json").read_text())
        own = sum(facts["own"].values()) * 4
        print(f"rank {rank}: own weights {own >> 20} MiB of {whole >> 20}, resident memory grew at most by "
              f"{facts['loaded'] >> 20} MiB when loading, by {facts['read'] >> 20} until all were read")  # fmt: skip
        assert facts["read"] < own + 150 * 2**20 and own < 0.75 * whole


# -------------------------------------------------------------------------------------------------------------------
# Checkpoints, and how ranks end
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "num_ranks"), [("1F1B+LoRA", 2), slow("1F1B", 2), slow("1F1B+LoRA", 3)])
def test_resumed_with_as_many_stages_it_is_the_same_run_bit_for_bit(strategy, num_ranks, runs, tmp_path):
    """In the middle of an epoch, with dropout."""
    flags = [*MICRO, "--model_path", "{deep tied=True}"]
    whole = runs.whole(strategy, num_ranks, *flags)
    resume = ["--resume_from_checkpoint", whole / "checkpoint-5"]
    runs.train(strategy, num_ranks, tmp_path / "out", "--max_steps", NUM_STEPS, *flags, *resume)
    assert_identical(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "tied"), [("1F1B", True), ("1F1B", False), ("1F1B+LoRA", False)])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (4, 2)])
def test_resumed_with_another_number_of_stages_the_losses_stay_the_same(strategy, tied, before, after, runs, tmp_path):
    flags = [*MICRO, "--model_path", f"{{deep tied={tied}}}", *(MODES["lora"] if "LoRA" in strategy else [])]
    whole = runs.whole(strategy, before, *flags)
    resume = ["--resume_from_checkpoint", whole / "checkpoint-5"]
    runs.train(strategy, after, tmp_path / "out", "--max_steps", NUM_STEPS, *flags, *resume)
    found, expected = losses_of(tmp_path / "out"), losses_of(whole)
    assert found == pytest.approx(expected, rel=1e-5)
    largest = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    print(f"{strategy}, tied {tied}, resumed with {after} stages instead of {before}: loss {largest:.1e}")
    assert weights_of(tmp_path / "out").keys() == weights_of(whole).keys()


OTHERS = [("plain", "1F1B"), ("1F1B", "plain"), slow("FSDP2", "1F1B"), slow("1F1B", "FSDP2"), slow("1F1B", "ZeRO-3")]
OTHERS += [slow("ZeRO-3", "1F1B"), slow("1F1B+LoRA", "ZeRO-3+LoRA"), slow("1F1B+LoRA", "plain PEFT")]


@pytest.mark.parametrize(("before", "after"), [*OTHERS, slow("plain PEFT", "1F1B+LoRA")])
def test_a_checkpoint_of_another_script_is_one_clear_error(before, after, runs, tmp_path):
    def train(strategy, out, *flags, check):
        num_ranks = 1 if "plain" in strategy else 2
        rows = MICRO if "1F1B" in strategy else ["--per_device_train_batch_size", 8 // num_ranks]
        return runs.train(strategy, num_ranks, out, *rows, *flags, check=check)

    train(before, tmp_path / "first", "--max_steps", 2, check=True)
    checkpoint = tmp_path / "first" / "checkpoint-2"
    found = train(after, tmp_path / "out", "--resume_from_checkpoint", checkpoint, "--max_steps", 4, check=False)
    assert 0 not in found.codes and "Traceback" not in found.output
    assert f"error: --resume_from_checkpoint {checkpoint}: " in found.output
    assert f"'script': '{STRATEGIES[before][0]}.py'" in found.output and "resume with the same" in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["1F1B", "1F1B+LoRA"])
def test_killed_while_saving_and_resumed_equals_uninterrupted_bit_for_bit(strategy, runs, tmp_path):
    out = tmp_path / "out"
    flags = ["--max_steps", NUM_STEPS, "--save_steps", 1, "--resume_from_checkpoint", "True", *MICRO]
    for _ in range(3):  # a kill that comes a millisecond late finds the checkpoint complete
        if kill(runs.launch(strategy, out, *flags), out, True, after_step=4):
            break
    last = newest_complete(out)
    assert 4 <= last < NUM_STEPS and steps_in(out / ".writing") == {last + 1}
    resumed = runs.train(strategy, 2, out, *flags)
    assert f"resuming from {out}/checkpoint-{last}\n" in resumed.output
    assert_identical(out, runs.whole(strategy, 2, *MICRO))


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["torchrun", "one rank", "all ranks"])
def test_sigterm_saves_a_checkpoint_and_the_next_start_goes_on(receiver, runs, tmp_path):
    out, flags = tmp_path / "out", ["--max_steps", NUM_STEPS, "--save_steps", 4, *MICRO]
    launched = receiver == "torchrun"
    run = runs.launch("1F1B", out, *flags) if launched else runs.start("1F1B", 2, out, *flags)
    while newest_complete(out) < 4 and run.is_alive():
        time.sleep(0.002)
    for process in [run.torchrun] if launched else run.workers()[receiver == "one rank" :]:
        process.send_signal(signal.SIGTERM)
    run.finish(check=False)
    step = newest_complete(out)
    assert 0 not in run.codes and 4 < step < NUM_STEPS, run.output
    line = f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there"
    assert run.output.count("SIGTERM: step") == run.output.count(line) == 1
    assert not (out / "run.json").exists()
    runs.train("1F1B", 2, out, *flags, "--resume_from_checkpoint", "True")
    assert_identical(out, runs.whole("1F1B", 2, *MICRO))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_one_rank_killed_ends_all_ranks_with_a_message_that_names_it(victim, runs, tmp_path):
    """Without torchrun, so nobody tells the others, as on another machine."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    flags = runs.flags("1F1B", out, *MICRO, "--model_path", "{deep tied=True}", "--max_steps", 5000, "--save_steps", 5)
    with open(log, "w") as file:
        processes = [
            subprocess.Popen(
                [sys.executable, "finetune_pp_1f1b.py", *flags],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | rank,
                stdout=file,
                stderr=file,
            )
            for rank in environments(3)
        ]
    try:
        while newest_complete(out) < 5 and all(process.poll() is None for process in processes):
            time.sleep(0.05)
        assert all(process.poll() is None for process in processes), log.read_text()
        processes[victim].kill()
        killed = time.monotonic()
        for process in processes:
            process.wait(timeout=killed + 60 - time.monotonic())
        print(f"rank {victim} of 3 killed: all ranks have ended after {time.monotonic() - killed:.1f} s")
    finally:
        for process in processes:
            process.kill()
    assert f"error: rank {(victim - 1) % 3} ends because rank {victim} has ended" in log.read_text()
    assert all(process.returncode for process in processes) and not (out / "run.json").exists()
    checkpoints = finetune_pp_1f1b.list_checkpoints(out)
    assert checkpoints and all(finetune_pp_1f1b.find_damage(path) is None for path in checkpoints)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks(runs, tmp_path):
    flags = ["--learning_rate", 1e30, "--warmup_steps", 0, "--max_steps", 50, "--save_steps", 1]
    stopped = runs.train("1F1B", 2, tmp_path / "out", *MICRO, *flags, check=False)
    assert 0 not in stopped.codes and "Traceback" not in stopped.output
    assert stopped.output.count("lower --learning_rate") == 1
    assert newest_complete(tmp_path / "out") >= 1 and not (tmp_path / "out" / "run.json").exists()


# -------------------------------------------------------------------------------------------------------------------
# Users' mistakes, the launcher, two machines
# -------------------------------------------------------------------------------------------------------------------

THREE = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
MISTAKES = [
    ("--gradient_accumulation_steps 2", THREE, "--gradient_accumulation_steps 2: | each of the 3 stages | 12 of them"),
    (
        "--gradient_accumulation_steps 8",
        THREE,
        "--model_path {untied}: 2 layers cannot be 3 stages; start fewer",
    ),
    (
        "--model_path {gpt2}",
        {},
        "--model_path {gpt2}: stages are made of the layers of llama, mistral | and this is gpt2; choose another",
    ),
    ("--pipeline_schedule zigzag", {}, "--pipeline_schedule | 'zigzag' | 1f1b | gpipe"),
    (
        "--lora_used True --lora_target_modules q_proj,query",
        {},
        "--lora_target_modules query is no part of every layer",
    ),
    ("--lora_used True --lora_target_modules layers.0.mlp.up_proj", {}, "layers.0.mlp.up_proj is no part of every"),
    ("--lora_used True --lora_target_modules lm_head", {}, "lm_head is no part of every layer"),
    ("--lora_used True --lora_rank 0", {}, "--lora_rank 0: | > 0"),
    ("--peft_mode prefix", {}, "--peft_mode | prefix | --help"),
    ("--model_path {none}", {}, "--model_path {none}: | no such folder | quickstart.sh"),
    ("--resume_from_checkpoint {none}", {}, "--resume_from_checkpoint {none}: | no settings.json"),
    ("--seed -1 --save_steps 0", {}, "--seed -1: | --save_steps 0:"),
]


@pytest.mark.parametrize(("flags", "environment", "named"), MISTAKES)
def test_a_mistake_ends_before_weights_are_loaded(flags, environment, named, tmp_path_factory, tmp_path, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "mistakes"
    places = {"untied": folder / "model", "gpt2": folder / "gpt2", "none": folder / "none"}
    if not folder.exists():
        save_rows(random_rows(4), folder / "rows")
        save_file({"none": torch.zeros(1)}, save_tiny_model(folder / "model") / "model.safetensors")
        make_tokenizer().save_pretrained(folder / "gpt2")
        (folder / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2, "vocab_size": 300}')
        save_file({"none": torch.zeros(1)}, folder / "gpt2" / "model.safetensors")
    given = flags.format(**places).split()
    defaults = {"--model_path": places["untied"], "--dataset_path": folder / "rows", "--output_dir": tmp_path / "out"}
    given += [str(word) for name, value in defaults.items() if name not in given for word in (name, value)]
    monkeypatch.setattr(sys, "argv", ["finetune_pp_1f1b.py", *given, "--use_cpu", "True"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        finetune_pp_1f1b.main()
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    for part in named.split(" | "):
        assert part.format(**places) in message
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_passes_flags_of_the_script_and_says_what_the_bubble_costs():
    words = command_of("finetune_pp_1f1b")
    passed = words[words.index("finetune_pp_1f1b.py") + 1 : -1]
    parser = finetune_pp_1f1b.HfArgumentParser(finetune_pp_1f1b.Arguments, allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses([*passed, "--use_cpu", "True"])
    rows, micro_batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    header = text_of("finetune_pp_1f1b.sh")
    assert f"{rows} rows x {micro_batches} micro-batches = {rows * micro_batches} rows" in header
    stages = 8
    bubble = (stages - 1) / (micro_batches + stages - 1)
    assert f"= {stages - 1} / {micro_batches + stages - 1} = {bubble:.0%}".replace("%", " %") in header


@pytest.mark.slow
def test_the_launcher_trains(runs, tmp_path):
    places = {"MODEL": runs.parts["untied"], "DATASET": runs.parts["rows"], "OUTPUT_DIR": tmp_path / "out put"}
    environment = os.environ | {name: str(path) for name, path in places.items()} | {"USE_CPU": "1", "NUM_GPUS": "2"}
    command = ["sh", "scripts/finetune_pp_1f1b.sh", "--bf16", "False", "--max_steps", "2", "--lora_used", "True"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    receipt = json.loads((tmp_path / "out put" / "run.json").read_text())
    assert receipt["world_size"] == 2 and receipt["identity"]["rows_per_step"] == 128
    assert len(losses_of(tmp_path / "out put")) == 2 and any((tmp_path / "out put" / "runs").iterdir())
    run_script("test_sample.py", "--help")


@pytest.mark.slow
def test_two_machines_train_what_two_processes_train(runs, tmp_path):
    import test_two_machines as machines

    try:
        with machines.two_machines():
            pass
    except OSError as problem:
        pytest.skip(f"no network namespaces here: {problem}")
    flags = [*map(str, ("--bf16", "False", "--report_to", "none", "--max_steps", 6, "--learning_rate", 1e-2)), *MICRO]
    data = {"MODEL": runs.parts["tied"], "DATASET": runs.parts["rows"]}
    with machines.two_machines() as names:
        variables = data | {"OUTPUT_DIR": tmp_path / "two"}
        machines.run_on_two_machines(names, "finetune_pp_1f1b", list(map(str, flags)), tmp_path, **variables)
        sent = [machines.bytes_sent(name) for name in names]
    runs.train("1F1B", 2, tmp_path / "one", *flags, "--model_path", "{tied}")
    found, expected = losses_of(tmp_path / "two"), losses_of(tmp_path / "one")
    assert found == pytest.approx(expected, rel=1e-5)
    largest = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    assert len(history_of(tmp_path / "two")) == 6 and min(sent) > 0
    print(f"two machines: loss {largest:.1e}, bytes sent over the cable {sent}")
