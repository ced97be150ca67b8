"""The schedule is computed before training: what it will do is said, and no run trains nothing without a word.

The functions stand alike in every training script (test_scripts.py); here they are taken from finetune_pp.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import random_rows, save_rows
from harness import STRATEGIES, Runs, history_of, weights_of
from preference_rows import random_pairs, save_preferences

from finetune_pp import Arguments, check_rates, make_schedule


def plan(num_steps: int, num_rows: int = 100) -> SimpleNamespace:
    """What check_rates reads of TrainingRows."""
    return SimpleNamespace(num_steps=num_steps, rows_per_step=8, dataset=range(num_rows))


def rates(args: Arguments, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=args.learning_rate)
    schedule = make_schedule(args, optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("num_steps", [1, 2, 33, 34, 100])
def test_what_is_said_of_the_schedule_is_what_happens(name, num_steps, capsys):
    args = Arguments(lr_scheduler_type=name, learning_rate=1e-3)
    check_rates(args.warmup_steps, args, plan(num_steps))
    said = capsys.readouterr().out
    happens = rates(args, num_steps)
    assert said.startswith(f"{num_steps} optimizer steps of 8 rows, {happens.count(0)} of them at rate 0; ")
    assert f"the highest rate is 0.001 at step {happens.index(max(happens)) + 1}\n" in said
    assert "warning" not in said and max(happens) == 1e-3


def test_a_run_of_one_step_trains(capsys):
    """A share of one step is no step of warm-up; an explicit number of steps is what the user asked for."""
    assert rates(Arguments(warmup_steps=0.9), 1) == [2e-5]
    with pytest.raises(ValueError, match="the rate is 0 in all optimizer steps .1.; lower it"):
        check_rates(1, Arguments(warmup_steps=1), plan(1))


def test_a_peak_that_is_never_reached_is_a_warning(capsys):
    check_rates(100, Arguments(warmup_steps=100, learning_rate=1e-3), plan(4))
    said = capsys.readouterr().out
    assert "the highest rate is 3e-05 at step 4\n" in said
    assert "warning: that is below --learning_rate 0.001; lower --warmup_steps 100\n" in said


def test_fewer_rows_than_a_step_takes_are_a_warning(capsys):
    check_rates(0, Arguments(warmup_steps=0), plan(1, num_rows=7))
    assert "warning: there are 7 rows, fewer than one step takes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("schedules"))
    runs.parts["one row"] = save_rows(random_rows(1), runs.folder / "one-row")
    return runs


@pytest.mark.parametrize("strategy", ["plain", "plain PEFT", "FSDP2", "FSDP2+LoRA", "ZeRO-2", "ZeRO-3+LoRA", "1F1B"])
def test_a_run_that_is_extended_goes_on_at_the_rate_of_its_new_schedule(strategy, runs, tmp_path):
    """Four steps, then eight: from step 5 on every rate is that of eight steps, in every strategy alike."""
    flags = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1, "--lr_scheduler_type", "linear"]
    if strategy == "1F1B":
        flags[1:4] = [1, "--gradient_accumulation_steps", 8]
    out = tmp_path / "out"
    runs.train(strategy, 1, out, *flags, "--max_steps", 4)
    extended = runs.train(strategy, 1, out, *flags, "--max_steps", 8, "--resume_from_checkpoint", "True")
    found = [row["learning_rate"] for row in history_of(out)]
    args = Arguments(learning_rate=1e-2, lr_scheduler_type="linear")
    assert found == pytest.approx(rates(args, 4) + rates(args, 8)[4:])
    assert "8 optimizer steps" in extended.output


@pytest.mark.parametrize("strategy", ["plain", "plain PEFT", "FSDP2", "ZeRO-2", "1F1B"])
def test_a_single_row_is_trained(strategy, runs, tmp_path):
    """Fewer rows than a step takes: one step, and it moves the weights."""
    runs.train(strategy, 1, tmp_path / "out", "--dataset_path", "{one row}")
    (row,) = history_of(tmp_path / "out")
    assert row["learning_rate"] == 1e-2
    trained = weights_of(tmp_path / "out")
    if strategy == "plain PEFT":
        assert any(weight.any() for name, weight in trained.items() if "lora_B" in name)
    else:
        before = weights_of(runs.parts["untied"])
        assert any(not torch.equal(before[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize("name", sorted({script for script, _ in STRATEGIES.values()}))
def test_a_rate_that_stays_zero_ends_every_script_before_it_begins(name, tiny_model, tiny_set, tmp_path):
    script = importlib.import_module(name)
    rows = tiny_set
    if hasattr(script.Arguments, "loss_type"):
        rows = save_preferences(random_pairs(8), tmp_path / "pairs")
    args = script.Arguments(model_path=str(tiny_model), dataset_path=str(rows), output_dir=str(tmp_path / "out"))
    args.use_cpu, args.max_steps, args.warmup_steps = True, 1, 5
    with pytest.raises(ValueError, match="--warmup_steps 5: the rate is 0 in all optimizer steps"):
        script.check_arguments(args)
    assert not (tmp_path / "out").exists()
