"""Every strategy trains the same model: real scripts, real processes, compared step by step with the plain loops.

References are finetune_pp.py, finetune_pp_peft.py and finetune_pp_dpo.py in one process. Against them: FSDP2, ZeRO and
the pipeline, full and with an adapter, in float32 with dropout 0, weight decay on, rows of unequal length, two epochs
of two full windows and a short one, and an evaluation with an odd number of rows. The tolerances are those of law 2
(ASSERTED below).

    bash scripts/test.sh tests/test_equivalence.py                # every strategy, 2 processes, accumulation 4
    .venv/bin/python tests/test_equivalence.py                    # the whole matrix; writes docs/equivalence.md
    .venv/bin/python tests/test_equivalence.py -k 1F1B            # only cells of such names; the page keeps the others
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_rows, run_script, save_rows, save_tiny_model
from preference_rows import random_pairs, save_preferences
from safetensors.torch import load_file

import data_collator

# The gradients of the two answers can cancel in a weight but for their rounding, of which Adam makes a step of a
# hundredth of the rate: at 1e-2 one such weight of the embedding moves the loss by 1e-5.
ALL_WEIGHTS = ["--lora_used", "False", "--learning_rate", "1e-3"]
FSDP, LORA, ZERO = "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora", "finetune_pp_peft_trainer_deepspeed"
PIPELINE, DPO = "finetune_pp_1f1b", "finetune_pp_dpo_trainer"
# strategy: (script, its flags, the reference it must equal); the tests write {zero2} and {zero3}
STRATEGIES = {
    "FSDP2": (FSDP, [], "full"),
    "FSDP2+LoRA": (LORA, [], "lora"),
    "ZeRO-2": (ZERO, ["--deepspeed", "{zero2}"], "full"),
    "ZeRO-2+LoRA": (ZERO, ["--deepspeed", "{zero2}", "--lora_used", "True"], "lora"),
    "ZeRO-3": (ZERO, ["--deepspeed", "{zero3}"], "full"),
    "ZeRO-3+LoRA": (ZERO, ["--deepspeed", "{zero3}", "--lora_used", "True"], "lora"),
    "1F1B": (PIPELINE, [], "full"),
    "1F1B+LoRA": (PIPELINE, ["--lora_used", "True"], "lora"),
    "FSDP2 DPO": (DPO, ALL_WEIGHTS, "dpo full"),
    "FSDP2+LoRA DPO": (DPO, [], "dpo lora"),
    "ZeRO-2+LoRA DPO": (DPO, ["--deepspeed", "{zero2}"], "dpo lora"),
    "ZeRO-3 DPO": (DPO, ["--deepspeed", "{zero3}", *ALL_WEIGHTS], "dpo full"),
    "ZeRO-3+LoRA DPO": (DPO, ["--deepspeed", "{zero3}"], "dpo lora"),
}
PLAIN_LOOPS = {  # the reference of each: its script and flags
    "full": ("finetune_pp", []),
    "lora": ("finetune_pp_peft", []),
    "dpo full": ("finetune_pp_dpo", ALL_WEIGHTS),
    "dpo lora": ("finetune_pp_dpo", []),
}
MODES = {
    "lora": ["--lora_dropout", 0],
    "prefix": ["--peft_mode", "prefix", "--num_virtual_tokens", 4, "--mapping_hidden_dim", 16],
    "ptuning": ["--peft_mode", "ptuning", "--num_virtual_tokens", 4, "--mapping_hidden_dim", 16],
    "prompt": ["--peft_mode", "prompt", "--num_virtual_tokens", 4],
}
FACTORS = {
    "processes": (1, 2),
    "accumulation": (1, 4),
    "checkpointing": (False, True),
    "rows": ("padded", "padding-free", "packed"),
    "tied": (False, True),
}
ROWS_PER_STEP = 8
CPU = torch.device("cpu")
ASSERTED = {"loss": 1e-5, "grad_norm at step 1": 1e-5, "grad_norm": 1e-4, "eval_loss": 1e-5, "weights": 1e-2}
COMMON = ["--num_train_epochs", 2, "--learning_rate", 1e-2, "--weight_decay", 0.1, "--eval_steps", 2]
COMMON += ["--report_to", "none", "--bf16", "False", "--use_cpu", "True"]


def exists(strategy: str, processes: int, accumulation: int, checkpointing: bool, rows: str, tied: bool) -> bool:
    """All but 1F1B with 2 processes and accumulation 1: it needs a micro-batch for each stage, and refuses fewer.

    Preferences are never packed.
    """
    if STRATEGIES[strategy][0] == DPO:
        return rows != "packed"
    return STRATEGIES[strategy][0] != PIPELINE or accumulation >= processes


def pairwise(strategy: str) -> list[tuple]:
    """Few cells in which every pair of values of two factors occurs: greedily the one with the most new pairs."""
    cells = [cell for cell in itertools.product(*FACTORS.values()) if exists(strategy, *cell)]

    def pairs(cell):
        return set(itertools.combinations(enumerate(cell), 2))

    missing, chosen = set().union(*map(pairs, cells)), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs(cell) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def matrix_cells():
    for strategy in STRATEGIES:
        whole = strategy in ("FSDP2+LoRA", "ZeRO-3")
        for cell in itertools.product(*FACTORS.values()) if whole else pairwise(strategy):
            yield pytest.param(strategy, "lora", *cell, marks=pytest.mark.matrix)
    for strategy, mode in itertools.product(("FSDP2+LoRA", "ZeRO-2+LoRA", "ZeRO-3+LoRA"), list(MODES)[1:]):
        for checkpointing in (False, True) if mode != "prefix" else (False,):  # PEFT refuses prefix with checkpointing
            yield pytest.param(strategy, mode, 2, 4, checkpointing, "padded", False, marks=pytest.mark.matrix)


# In the default tests: every strategy at 2 processes and accumulation 4, the other factors spread over the strategies.
# Those of the pipeline are in tests/test_1f1b.py, where its processes are forked and cost two seconds.
DEFAULT_CELLS = [
    (strategy, "lora", 2, 4, checkpointing, rows, tied)
    for strategy, checkpointing, rows, tied in (
        ("FSDP2", True, "padding-free", True),
        ("FSDP2+LoRA", False, "padded", False),
        ("ZeRO-2", False, "packed", True),
        ("ZeRO-2+LoRA", True, "padding-free", False),
        ("ZeRO-3", False, "padding-free", False),
        ("ZeRO-3+LoRA", True, "packed", True),
        ("FSDP2 DPO", False, "padding-free", True),
        ("FSDP2+LoRA DPO", True, "padding-free", False),
        ("ZeRO-2+LoRA DPO", False, "padding-free", True),
        ("ZeRO-3 DPO", False, "padding-free", True),
        ("ZeRO-3+LoRA DPO", False, "padded", False),
    )
]


def pack(rows: list[dict], documents: int = 2) -> list[dict]:
    """Joins `documents` rows into one, as tokenize_dataset.py --packing True does."""
    packed = []
    for start in range(0, len(rows), documents):
        group = rows[start : start + documents]
        row = {name: [token for document in group for token in document[name]] for name in ("input_ids", "labels")}
        packed.append(row | {"position_ids": [i for document in group for i in range(len(document["input_ids"]))]})
    return packed


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Models, sets and ZeRO configurations of the matrix."""
    folder = tmp_path_factory.mktemp("equivalence")
    parts = {"folder": folder}
    for tied in (False, True):
        parts[f"model tied={tied}"] = save_tiny_model(folder / f"model-{tied}", tied=tied)
    for name, rows in (("train", random_rows(22)), ("eval", random_rows(7, seed=3))):
        parts[name] = save_rows(rows, folder / name)
        longer = random_rows(2 * len(rows), seed=len(name), longest=14)
        parts[f"packed {name}"] = save_rows(pack(longer), folder / f"packed-{name}")
        parts[f"dpo {name}"] = save_preferences(random_pairs(len(rows), seed=len(rows)), folder / f"dpo-{name}")
    for stage in ("zero2", "zero3"):
        config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text())
        if stage == "zero3":  # else DeepSpeed would leave the tensors of a small model whole
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        parts[stage] = folder / f"{stage}.json"
        parts[stage].write_text(json.dumps(config))
    return parts


def data_flags(parts, trained: str, rows: str, tied: bool) -> list:
    prefix = "packed " if rows == "packed" else ""
    if trained.startswith("dpo"):
        prefix = "dpo "
    flags = ["--model_path", parts[f"model tied={tied}"], "--dataset_path", parts[f"{prefix}train"]]
    return [*flags, "--eval_dataset_path", parts[f"{prefix}eval"]]


@pytest.fixture(scope="session")
def reference(parts):
    """A function that gives (folder of the plain loop's run, weights before training), run once each."""
    made = {}

    def run(mode: str, rows: str, tied: bool) -> tuple[Path, dict[str, torch.Tensor]]:
        key = (mode, rows == "packed", tied)
        if key not in made:
            script, script_flags = PLAIN_LOOPS.get(mode, PLAIN_LOOPS["lora"])
            flags = [*data_flags(parts, mode, rows, tied), *COMMON, *script_flags, *MODES.get(mode, [])]
            folder = parts["folder"] / f"reference-{mode}-{key[1]}-{tied}"
            run_script(f"{script}.py", *flags, "--per_device_train_batch_size", ROWS_PER_STEP, "--output_dir", folder)
            for name in ("train", "eval"):  # each run computes the log-probabilities of DPO's reference anew
                for path in parts[f"dpo {name}"].glob("reference-*"):
                    path.unlink()
            made[key] = folder, weights_before(mode, flags)
        return made[key]

    return run


def weights_before(mode: str, flags: list) -> dict[str, torch.Tensor]:
    """What the plain loop starts from: the model's file, or an adapter that its own functions make."""
    if mode in ("full", "dpo full"):
        return load_file(flags[1] / "model.safetensors")
    model = load_plain(mode if mode in PLAIN_LOOPS else "lora", flags)[2]
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_plain(trained: str, flags: list) -> tuple:
    """(the plain loop's module, its arguments, the model before training, the rows)."""
    script, script_flags = PLAIN_LOOPS[trained]
    plain = importlib.import_module(script)
    flags = [*flags, *script_flags]
    (args,) = plain.HfArgumentParser(plain.Arguments).parse_args_into_dataclasses(list(map(str, flags)))
    config, _, rows, _, _ = plain.check_arguments(args)
    plain.set_seed(args.seed)
    if trained == "lora":
        return plain, args, plain.load_model(args, config, [CPU]), rows
    return plain, args, plain.load_model(args, config, None, [CPU]), rows


def launch(processes: int, script: str, *flags) -> None:
    """Runs a script in as many processes."""
    run_script(f"{script}.py", *flags, num_processes=processes)


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def deviations(folder: Path, reference: Path, start: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest relative deviation of a run from its reference, for each thing that is asserted."""
    found, expected = (json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (folder, reference))
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["num_input_tokens_seen"] == other["num_input_tokens_seen"]
        assert row["epoch"] == pytest.approx(other["epoch"])
        assert row["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-12)
    pairs = list(zip(found, expected, strict=True))
    largest = {name: max(relative(a[name], b[name]) for a, b in pairs if name in b) for name in ("loss", "eval_loss")}
    norms = [relative(a["grad_norm"], b["grad_norm"]) for a, b in pairs]
    largest |= {"grad_norm at step 1": norms[0], "grad_norm": max(norms)}
    for row, other in pairs:  # of preferences, whose rewards are differences of log-probabilities in the hundreds
        for name in row.keys() & other.keys():
            at_the_start = name == "rewards/accuracies" and abs(other["rewards/margins"]) < 1e-5  # rounding decides
            if ("rewards/" in name or "logps/" in name) and not at_the_start:
                assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name

    name = "trainable.safetensors" if (reference / "trainable.safetensors").is_file() else "model.safetensors"
    weights, trained = load_file(folder / name), load_file(reference / name)
    assert weights.keys() == trained.keys()
    travelled = {name: (trained[name] - start[name]).norm() for name in trained}
    assert all(distance > 1e-3 * start[name].norm() for name, distance in travelled.items())  # the weights did move
    largest["weights"] = max(((weights[n] - trained[n]).norm() / travelled[n]).item() for n in trained)
    return largest


@pytest.mark.parametrize(
    ("strategy", "mode", "processes", "accumulation", "checkpointing", "rows", "tied"),
    [*DEFAULT_CELLS, *matrix_cells()],
)
def test_every_strategy_trains_the_same_model(
    strategy, mode, processes, accumulation, checkpointing, rows, tied, parts, reference, tmp_path
):
    script, flags, trained = STRATEGIES[strategy]
    expected, start = reference(mode if trained == "lora" else trained, rows, tied)
    num_shares = accumulation if script == PIPELINE else processes * accumulation  # its stages all see the same rows
    launch(
        processes,
        script,
        *data_flags(parts, trained, rows, tied),
        *COMMON,
        *(str(flag).format(**parts) for flag in flags),
        *(MODES[mode] if trained == "lora" else []),
        *("--per_device_train_batch_size", ROWS_PER_STEP // num_shares),
        *("--gradient_accumulation_steps", accumulation, "--per_device_eval_batch_size", 2),
        *("--gradient_checkpointing", checkpointing, "--padding_free", rows == "padding-free"),
        *("--output_dir", tmp_path / "run"),
    )
    receipt = json.loads((tmp_path / "run" / "run.json").read_text())
    assert receipt["world_size"] == processes == len(receipt["peak_memory_bytes"])
    largest = deviations(tmp_path / "run", expected, start)
    for path in parts["dpo train"].glob("reference-*"):
        path.unlink()  # the next run computes its own
    if os.environ.get("EQUIVALENCE_RESULTS"):
        cell = dict(zip(FACTORS, (processes, accumulation, checkpointing, rows, tied), strict=True))
        result = {"strategy": strategy if mode == "lora" else f"{strategy[:-4]}{mode}"} | cell | largest
        with open(os.environ["EQUIVALENCE_RESULTS"], "a") as file:
            file.write(json.dumps(result) + "\n")
    assert {name: value for name, value in largest.items() if not value <= ASSERTED[name]} == {}


# Run in two processes: a script's own functions, with the gradients of the first optimizer step written down.
GRADIENTS = (
    f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
"""
    + """
import importlib
import torch, transformers
name, output = sys.argv[1:3]
sys.argv = sys.argv[2:]
is_zero = "--deepspeed" in sys.argv
script = importlib.import_module(name)
trainer_class = next(c for c in vars(script).values() if isinstance(c, type) and issubclass(c, transformers.Trainer))

def write(model):
    from torch.distributed.tensor import DTensor
    gradients = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and is_zero:
            from deepspeed.utils import safe_get_full_grad
            gradients[key] = safe_get_full_grad(parameter)
        elif parameter.requires_grad:
            assert isinstance(parameter.grad, DTensor)
            gradients[key] = parameter.grad.full_tensor()
    if torch.distributed.get_rank() == 0:
        torch.save({key: gradient.cpu().clone() for key, gradient in gradients.items()}, output)

def before(original, *names):
    def wrapped(self, *args, **kwargs):
        if not wrapped.done:
            wrapped.done = True
            write(self.module if is_zero else self.model)
        return original(self, *args, **kwargs)
    wrapped.done = False
    return wrapped

if is_zero:
    import deepspeed
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    engine._take_model_step = before(engine._take_model_step)
else:
    trainer_class._clip_grad_norm = before(trainer_class._clip_grad_norm)
script.main()
script.leave()
"""
)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(name, marks=[] if name in ("FSDP2", "ZeRO-3", "FSDP2+LoRA DPO") else pytest.mark.matrix)
        for name, (script, _, _) in STRATEGIES.items()
        if script != PIPELINE  # no Trainer: tests/test_1f1b.py has this test for it
    ],
)
def test_the_gradients_of_the_first_step_are_the_same_tensor_by_tensor(strategy, parts, tmp_path):
    script, flags, trained = STRATEGIES[strategy]
    (tmp_path / "driver.py").write_text(GRADIENTS)
    data = [*data_flags(parts, trained, "padding-free", False), *COMMON, *(MODES["lora"] if trained == "lora" else [])]
    run_script(
        *(tmp_path / "driver.py", script, tmp_path / "gradients.pt", *data, "--max_steps", 1),
        *(str(flag).format(**parts) for flag in flags),
        *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "run"),
        num_processes=2,
    )
    gradients = torch.load(tmp_path / "gradients.pt")

    plain, args, model, rows = load_plain(trained, data)
    model.train()
    if trained.startswith("dpo"):
        compute_logps = plain.choose_logps(args, model)
        batch = data_collator.PreferenceCollator(True)(rows.step(0))
        reference = plain.reference_logps(args, model, compute_logps, batch)
        logps = plain.policy_logps(args, model, compute_logps, batch)
        loss, _ = plain.compare(args, batch, logps, reference, None)
    else:
        compute_loss = plain.choose_loss(args, model, rows)
        batch = data_collator.DataCollator(True)(rows.step(0))
        loss = plain.forward(args, model, compute_loss, batch, CPU)
    (loss / data_collator.num_targets(batch)).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


# --- In bf16 -----------------------------------------------------------------------------------------------------
# bf16 has 8 bits: a number of targets, a loss or a sum of gradients that is kept in it is off by up to 0.4 %, another
# error in each step. Products are in bf16; these three are float32 in every strategy.


@pytest.fixture(scope="session")
def bf16_rows(parts) -> Path:
    """Eight rows, whose number of targets is odd and is rounded far when it is made a bf16 number."""
    rows = random_rows(8, seed=3, shortest=60, longest=120)
    num_targets = sum(label != data_collator.IGNORE_INDEX for row in rows for label in row["labels"][1:])
    rounded = torch.tensor(float(num_targets)).bfloat16().item()
    assert num_targets % 2 == 1 and relative(rounded, num_targets) > 2e-3
    return save_rows(rows, parts["folder"] / "bf16-rows")


def first_step_with_float32_sums(trained: str, flags: list, precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of eight micro-batches of one row each, computed one after the other and summed in float32.

    Args:
        precision: "bf16" for a model in bf16, as FSDP2 and ZeRO have it inside a layer; "autocast" and "float32" for
            the plain loop's own forward.
    """
    plain, args, model, rows = load_plain(trained, [*flags, "--bf16", precision != "float32"])
    compute_loss = plain.choose_loss(args, model, rows)
    if precision == "bf16":
        args.bf16 = "False"  # no autocast: all weights are in bf16 already
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    model.train()
    collate = data_collator.DataCollator(True)
    batches = [collate([row]) for row in rows.step(0)]
    num_targets = sum(map(data_collator.num_targets, batches))
    loss = 0.0
    gradients = {}
    for batch in batches:
        micro_loss = plain.forward(args, model, compute_loss, batch, CPU) / num_targets
        micro_loss.backward()
        loss += micro_loss.item()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradients[name] = gradients.get(name, 0) + parameter.grad.float()
                parameter.grad = None
    return loss, gradients


@pytest.mark.parametrize(
    "strategy",
    [
        "FSDP2",
        "ZeRO-2",
        pytest.param("FSDP2+LoRA", marks=pytest.mark.matrix),
        pytest.param("ZeRO-2+LoRA", marks=pytest.mark.matrix),
        pytest.param("ZeRO-3", marks=pytest.mark.matrix),
        pytest.param("ZeRO-3+LoRA", marks=pytest.mark.matrix),
    ],
)
def test_in_bf16_the_loss_its_divisor_and_the_sums_of_gradients_are_float32(strategy, parts, bf16_rows, tmp_path):
    """Two processes of four micro-batches give what one gives that sums in float32, tensor by tensor to 1e-5."""
    script, flags, trained = STRATEGIES[strategy]
    (tmp_path / "driver.py").write_text(GRADIENTS)
    data = ["--model_path", parts["model tied=False"], "--dataset_path", bf16_rows, "--max_steps", 1]
    data += ["--learning_rate", 1e-2, "--report_to", "none", "--use_cpu", "True"]
    data += MODES["lora"] if trained == "lora" else []
    run_script(
        *(tmp_path / "driver.py", script, tmp_path / "gradients.pt", *data, "--bf16", "True"),
        *(str(flag).format(**parts) for flag in flags),
        *("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "run"),
        num_processes=2,
    )
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][0]
    gradients = torch.load(tmp_path / "gradients.pt")
    loss, expected = first_step_with_float32_sums(trained, data, "bf16")
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert relative(log["loss"], loss) <= 1e-5
    # Autocast leaves some of the activations in float32; both are as far from float32 as bf16's 8 bits make it.
    of_plain_loop, _ = first_step_with_float32_sums(trained, data, "autocast")
    in_float32, _ = first_step_with_float32_sums(trained, data, "float32")
    print(f"{strategy}: {relative(log['loss'], of_plain_loop):.1e} {relative(log['loss'], in_float32):.1e}")
    assert relative(log["loss"], of_plain_loop) <= 1e-3
    assert relative(log["loss"], in_float32) <= 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_pairwise_cells_hold_every_pair(strategy):
    without_cell = {(0, 1): {(2, 1)}} if "1F1B" in strategy else {}
    if "DPO" in strategy:
        for i, values in enumerate(FACTORS.values()):
            without_cell[(i, 3)] = {(value, "packed") for value in values}
            without_cell[(3, i)] = {("packed", value) for value in values}
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS.values()), 2):
        pairs = set(itertools.product(first, second)) - without_cell.get((i, j), set())
        assert {(cell[i], cell[j]) for cell in pairwise(strategy)} == pairs


def test_cells_that_are_run_again_replace_those_of_the_page_and_no_others(tmp_path):
    def result(strategy, accumulation, figure):
        factors = dict(zip(FACTORS, ("2", accumulation, "False", "padding-free", "True"), strict=True))
        return {"strategy": strategy} | factors | dict.fromkeys(ASSERTED, figure)

    page = tmp_path / "docs" / "page.md"
    before = [result("FSDP2", "1", 1.234e-7), result("FSDP2", "4", 0.0), result("ZeRO-3+LoRA", "4", 5e-6)]
    write_page(before, page)
    written = page.read_text()
    write_page(merge(read_page(page), []), page)
    assert page.read_text() == written
    write_page(merge(read_page(page), [result("FSDP2", "4", 2e-7), result("1F1B", "4", 3e-7)]), page)
    cells = [(cell["strategy"], cell["accumulation"], cell["loss"]) for cell in read_page(page)]
    expected = [("1F1B", "4", 3e-7), ("FSDP2", "1", 1.2e-7), ("FSDP2", "4", 2e-7), ("ZeRO-3+LoRA", "4", 5e-6)]
    assert cells == expected


def read_page(page: Path) -> list[dict]:
    """The cells of a page that write_page wrote, with figures as exact as they are printed."""
    cells = page.read_text().partition("## All cells")[2].strip().splitlines()
    names, _, *rows = [line.strip("| ").split(" | ") for line in cells]
    results = [dict(zip(names, row, strict=True)) for row in rows]
    return [result | {name: float(result[name]) for name in ASSERTED} for result in results]


def merge(before: list[dict], results: list[dict]) -> list[dict]:
    """All cells in the order of their names; one that is in both lists is taken from `results`."""
    cells = {tuple(str(result[name]) for name in ("strategy", *FACTORS)): result for result in [*before, *results]}
    return [cells[key] for key in sorted(cells)]


def write_page(results: list[dict], page: Path) -> None:
    names = list(ASSERTED)
    lines = [
        "# Every strategy trains the same model",
        "",
        "Written by `python tests/test_equivalence.py`: the scripts started as a user starts them, on CPU processes,",
        "a 2-layer LLaMA with grouped-query attention in float32, rows of unequal length, 6 optimizer steps over an",
        "epoch end with a short window, weight decay on. Figures are the largest relative deviation from the plain",
        "loop (`finetune_pp.py`, `finetune_pp_peft.py` or `finetune_pp_dpo.py`, one process) over all steps; for",
        "weights, the largest over all tensors of the distance between both results, divided by the distance that",
        "training moved the tensor. 1F1B has no cells of 2 processes and accumulation 1: it needs a micro-batch for",
        "each process. Preferences (DPO) are never packed.",
        "",
        "| strategy | cells | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
        "| *allowed* | | " + " | ".join(f"*{ASSERTED[name]:.0e}*" for name in names) + " |",
    ]
    for strategy in dict.fromkeys(result["strategy"] for result in results):
        cells = [result for result in results if result["strategy"] == strategy]
        largest = " | ".join(f"{max(cell[name] for cell in cells):.1e}" for name in names)
        lines.append(f"| {strategy} | {len(cells)} | {largest} |")
    lines += ["", "## All cells", "", "| strategy | " + " | ".join([*FACTORS, *names]) + " |"]
    lines += ["|---|" + "---|" * (len(FACTORS) + len(names))]
    for result in results:
        values = [str(result[name]) for name in FACTORS] + [f"{result[name]:.1e}" for name in names]
        lines.append(f"| {result['strategy']} | " + " | ".join(values) + " |")
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    results = ROOT / "outputs" / "equivalence.jsonl"
    results.parent.mkdir(exist_ok=True)
    results.write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "matrix", __file__, *sys.argv[1:]]
    environment = os.environ | {"EQUIVALENCE_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status == 0:
        page = ROOT / "docs" / "equivalence.md"
        before = read_page(page) if sys.argv[1:] else []
        write_page(merge(before, [json.loads(line) for line in results.read_text().splitlines()]), page)
        print("wrote docs/equivalence.md")
    sys.exit(status)


if __name__ == "__main__":
    main()
