"""finetune_pp.py and finetune_pp_peft.py: the same numbers however a step is cut, exact resume, clear errors."""

import contextlib
import importlib
import json
import os
import random
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, random_rows, run_script, save_rows, save_tiny_model
from harness import history_of, newest_complete, start_script, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import data_collator
from data_collator import DataCollator, TokenizedDataset, TrainingRows

MODES = ("lora", "prefix", "ptuning", "prompt")
# Every way to train in a plain loop: (script, its mode flags).
STRATEGIES = {"full": ("finetune_pp", [])} | {mode: ("finetune_pp_peft", ["--peft_mode", mode]) for mode in MODES}
CPU = torch.device("cpu")
FAST = ["--report_to", "none", "--bf16", "False", "--use_cpu", "True"]


def parse(module, *flags):
    parser = module.HfArgumentParser(module.Arguments)
    return parser.parse_args_into_dataclasses([str(flag) for flag in flags])[0]


def prepare(strategy, model_path, dataset_path, *flags):
    """(module, arguments, rows in the order of training, loaded model) of a script, in this process."""
    name, mode_flags = STRATEGIES[strategy]
    module = importlib.import_module(name)
    args = parse(module, "--model_path", model_path, "--dataset_path", dataset_path, *mode_flags, *FAST, *flags)
    config, tokenizer, rows, _, _ = module.check_arguments(args)
    module.set_seed(args.seed)
    if name == "finetune_pp":
        return module, args, rows, module.load_model(args, config, None, [CPU])
    return module, args, rows, module.load_model(args, config, [CPU])


def summed_loss(module, args, model, rows, indices):
    """What a training step computes for these rows of the set."""
    batch = DataCollator(args.padding_free)([rows.dataset[i] for i in indices])
    return module.forward(args, model, module.choose_loss(args, model, rows), batch, CPU), batch


def train(module, args, model, tokenizer, rows):
    module.train(args, model, module.choose_loss(args, model, rows), tokenizer, rows, None, None, [CPU])


def gradients_of_one_batch(module, args, rows, model, num_rows=8):
    """Gradients of the trained weights for the first rows of the set, divided by their target tokens."""
    model.train()
    model.zero_grad()
    loss, batch = summed_loss(module, args, model, rows, range(num_rows))
    (loss / data_collator.num_targets(batch)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_run(folder, reference, start):
    """The same losses, gradient norms and final weights in float32; `start` holds the weights before training."""
    expected, found = history_of(reference), history_of(folder)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5 if row["step"] == 1 else 1e-4)
        assert other["num_input_tokens_seen"] == row["num_input_tokens_seen"]
    weights = weights_of(reference)
    for name, tensor in weights_of(folder).items():
        travelled = (weights[name] - start[name]).norm()
        assert travelled > 0
        assert (tensor - weights[name]).norm() <= 1e-2 * travelled, name


@pytest.mark.parametrize("strategy", ["full", "lora", pytest.param("prompt", marks=pytest.mark.slow)])
def test_a_step_gives_the_same_numbers_however_it_is_cut(strategy, tiny_model, tiny_set, tmp_path):
    """8x1 = 1x8 = 2x4 and padded = padding-free, over an epoch end whose last window has 6 rows instead of 8."""
    name, mode_flags = STRATEGIES[strategy]
    common = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--num_train_epochs", 2, *FAST, *mode_flags]
    common += ["--learning_rate", 1e-2] + (["--lora_dropout", 0] if strategy == "lora" else [])
    for rows, accumulation, padding_free in ((8, 1, True), (1, 8, True), (2, 4, True), (2, 4, False)):
        run_script(
            f"{name}.py", *common, "--output_dir", tmp_path / f"{rows}x{accumulation}-{padding_free}",
            "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulation,
            "--padding_free", padding_free,
        )  # fmt: skip
    assert len(history_of(tmp_path / "8x1-True")) == 6
    _, _, _, model = prepare(strategy, tiny_model, tiny_set)  # seeded as in main()
    start = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    for cut in ("1x8-True", "2x4-True", "2x4-False"):
        assert_same_run(tmp_path / cut, tmp_path / "8x1-True", start)


NUM_STEPS = 40


def kill_while_saving(process, output_dir, after_step):
    """SIGKILL as soon as a checkpoint beyond `after_step` is being written."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it comes and goes
            for name in os.listdir(output_dir / ".writing"):
                if int(name.removeprefix("checkpoint-")) > after_step:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return
    pytest.fail(f"the run ended with {process.returncode} before it could be killed")


def kill_at_random(process, output_dir):
    """SIGKILL at a random moment after the run has completed a checkpoint of its own."""
    before = newest_complete(output_dir)
    while newest_complete(output_dir) <= before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still training
    assert newest_complete(output_dir) > before


# Prefix and prompt save and resume by the same lines as ptuning.
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[pytest.mark.slow] * (s in ("prefix", "prompt"))) for s in STRATEGIES]
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(strategy, tmp_path):
    """Dropout on, killed while a checkpoint was being written and again at a random moment."""
    model = save_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))  # the modes but lora have none
    data = save_rows(random_rows(22), tmp_path / "rows")
    name, mode_flags = STRATEGIES[strategy]
    flags = ["--model_path", model, "--dataset_path", data, "--max_steps", NUM_STEPS, "--save_steps", 1, *FAST]
    flags += ["--learning_rate", 1e-2, *mode_flags]
    run_script(f"{name}.py", *flags, "--output_dir", tmp_path / "whole")

    torn = tmp_path / "torn"
    resume = [*flags, "--output_dir", torn, "--resume_from_checkpoint", "True"]
    kill_while_saving(start_script(f"{name}.py", *resume)[0], torn, after_step=3)
    assert newest_complete(torn) >= 2
    kill_at_random(start_script(f"{name}.py", *resume)[0], torn)
    last = newest_complete(torn)
    assert 3 <= last < NUM_STEPS
    assert f"resuming from {torn}/checkpoint-{last}\n" in run_script(f"{name}.py", *resume).stdout

    assert history_of(torn) == history_of(tmp_path / "whole")
    assert len(history_of(torn)) == NUM_STEPS
    expected, found = weights_of(tmp_path / "whole"), weights_of(torn)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    states = [
        torch.load(folder / f"checkpoint-{NUM_STEPS}" / "training_state.pt") for folder in (tmp_path / "whole", torn)
    ]
    assert torch.equal(states[0]["rng"]["cpu"], states[1]["rng"]["cpu"])
    for mine, theirs in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == torch.float32 for key in mine)


def test_dropout_is_on_in_training_and_off_in_evaluation(tiny_model, tiny_set):
    module, args, rows, model = prepare("lora", tiny_model, tiny_set, "--lora_dropout", 0.5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    compute_loss = module.choose_loss(args, model, rows)
    assert len({module.evaluate(args, model, compute_loss, rows.dataset, CPU) for _ in range(3)}) == 1
    model.train()
    assert len({summed_loss(module, args, model, rows, [0])[0].item() for _ in range(3)}) == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(strategy, tiny_model, tiny_set):
    if strategy == "prefix":
        module = importlib.import_module("finetune_pp_peft")
        flags = ["--peft_mode", "prefix", "--gradient_checkpointing", "True"]
        args = parse(module, "--model_path", tiny_model, "--dataset_path", tiny_set, *flags, *FAST)
        with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
            module.check_arguments(args)
        return
    plain = gradients_of_one_batch(*prepare(strategy, tiny_model, tiny_set))
    module, args, rows, model = prepare(strategy, tiny_model, tiny_set, "--gradient_checkpointing", "True")
    forwards = []
    layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    # In training: the checks before it run the model in evaluation.
    layers[0].self_attn.register_forward_hook(lambda layer, *_: forwards.append(1) if layer.training else None)
    checkpointed = gradients_of_one_batch(module, args, rows, model)
    assert len(forwards) == 2  # once forward, once again in the backward
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("checkpointing", ["False", "True"])
@pytest.mark.parametrize("mode", MODES)
def test_every_trained_weight_gets_a_gradient_and_frozen_ones_do_not_move(mode, checkpointing, tiny_model, tiny_set):
    if (mode, checkpointing) == ("prefix", "True"):
        pytest.skip("PEFT refuses prefix tuning with gradient checkpointing; the test above sees to that")
    flags = ["--gradient_checkpointing", checkpointing, "--lora_dropout", "0"]
    module, args, rows, model = prepare(mode, tiny_model, tiny_set, *flags)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    gradients = gradients_of_one_batch(module, args, rows, model)
    # lora_A has no gradient at step 1, because lora_B begins as zero; everything else must have one.
    zero = [name for name, gradient in gradients.items() if gradient.abs().sum() == 0]
    assert zero == [name for name in gradients if "lora_A" in name]
    if mode == "lora":
        assert len(gradients) == 2 * 7 * 2  # A and B of seven linear layers in two decoder layers
    optimizer = module.make_optimizer(args, model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    second = gradients_of_one_batch(module, args, rows, model)
    assert all(gradient.abs().sum() > 0 for gradient in second.values())
    optimizer.step()
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[name], before) for name, before in frozen.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bfloat16_folder_is_trained_in_float32(strategy, tiny_set, tmp_path):
    model_path = save_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    assert load_file(model_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    module, args, rows, model = prepare(strategy, model_path, tiny_set)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    gradients_of_one_batch(module, args, rows, model)
    args.learning_rate = 1e-6  # an update far below bfloat16's resolution
    optimizer = module.make_optimizer(args, model)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-6
    optimizer.step()
    moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before]
    assert all(moved) or (strategy == "lora" and sum(moved) == len(moved) // 2)  # lora_A waits for lora_B
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    module.save_model(model, tokenizer, tmp_path / "saved")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "saved").values()} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_with_bf16_the_base_is_bf16_and_the_adapter_float32(mode, tiny_model, tiny_set):
    module = importlib.import_module("finetune_pp_peft")
    flags = ["--peft_mode", mode, "--model_path", tiny_model, "--dataset_path", tiny_set, "--bf16", "True"]
    flags += ["--use_cpu", "True"]
    args = parse(module, *flags)
    config, _, rows, _, _ = module.check_arguments(args)
    model = module.load_model(args, config, [CPU])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.get_base_model().parameters() if not p.requires_grad} == {torch.bfloat16}
    model.train()
    loss, _ = summed_loss(module, args, model, rows, range(4))
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_saved_folder_generates_what_the_trained_model_generates(strategy, tied, tiny_set, tmp_path):
    model_path = save_tiny_model(tmp_path / "model", tied=tied)
    module, args, rows, model = prepare(
        strategy, model_path, tiny_set, "--max_steps", 3, "--learning_rate", 0.1, "--output_dir", tmp_path / "out"
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    train(module, args, model, tokenizer, rows)
    module.save_model(model, tokenizer, tmp_path / "out")

    if strategy == "full":
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        peft = importlib.import_module("peft")
        fresh = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    prompt = {"input_ids": torch.tensor([[1, 40, 50, 60]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    (model if strategy == "full" else model.get_base_model()).set_attn_implementation("sdpa")  # as who loads it
    tokens = [
        m.eval().generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()
        for m in (model, reloaded, base)
    ]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]  # the training did change the answer
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_documents_in_one_row_do_not_see_each_other_in_the_loaded_model(strategy, tiny_model, tiny_set):
    module, args, rows, model = prepare(strategy, tiny_model, tiny_set)
    data_collator.check_document_attention(model, 300)
    documents = [rows.dataset[i] for i in range(3)]
    batch = DataCollator(True)(documents)
    del batch["labels"], batch["shift_labels"]
    model.eval()
    logits = model(**batch, use_cache=False).logits
    first = len(documents[0]["input_ids"])
    batch["input_ids"][0, :first] = 5  # the first document changes, the others must not notice
    others = batch["logits_to_keep"] >= first
    changed = model(**batch, use_cache=False).logits
    assert torch.equal(logits[:, others], changed[:, others])
    assert not torch.equal(logits[:, ~others], changed[:, ~others])


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_evaluation_weighs_every_target_token_the_same(strategy, tiny_model, tiny_set, tmp_path):
    """An odd number of rows, three batch sizes: the loss is the sum over all targets divided once."""
    held_out = save_rows(random_rows(7, seed=3), tmp_path / "eval")
    losses = []
    for size in (1, 4, 7):
        module, args, rows, model = prepare(strategy, tiny_model, tiny_set, "--per_device_eval_batch_size", size)
        compute_loss = module.choose_loss(args, model, rows)
        losses.append(module.evaluate(args, model, compute_loss, TokenizedDataset(held_out), CPU))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for row in random_rows(7, seed=3):
        log_probs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= log_probs[position, label].item()
                targets += 1
    assert losses == pytest.approx([total / targets] * 3, rel=1e-5)


def test_what_a_run_leaves(tiny_model, tiny_set, tmp_path):
    out = tmp_path / "out"
    flags = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--bf16", "False", "--use_cpu", "True"]
    flags += ["--eval_dataset_path", tiny_set, "--eval_steps", 2, "--save_steps", 1, "--num_train_epochs", 2]
    run_script("finetune_pp_peft.py", *flags, "--output_dir", out)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    settings = json.loads((out / "checkpoint-6" / "settings.json").read_text())
    present = {path.name for path in (out / "checkpoint-6").iterdir()} - {"settings.json"}
    assert settings["file_sizes"].keys() == present
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert {"trainable.safetensors", "adapter_model.safetensors", "training_state.pt", "tokenizer.json"} <= present

    history = history_of(out)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in history] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    expected = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_input_tokens_seen"}
    assert all(row.keys() - {"eval_loss"} == expected for row in history)
    assert [row["step"] for row in history if "eval_loss" in row] == [2, 4, 6]
    assert history[2]["num_input_tokens_seen"] == sum(len(row["input_ids"]) for row in random_rows(22))
    # One step of warm-up (3 % of 6 steps, rounded up), then half a cosine.
    cosine = [1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 5)).item()) for i in range(5)]
    assert [row["learning_rate"] for row in history] == pytest.approx([0, *cosine])

    receipt = json.loads((out / "run.json").read_text())
    assert receipt["arguments"]["learning_rate"] == 1e-3
    assert receipt["versions"]["torch"] == torch.__version__
    assert receipt["world_size"] == 1 and receipt["devices"] == ["cpu"]
    rows = {"dataset_sha256": receipt["dataset"]["sha256"], "num_rows": 22, "rows_per_step": 8, "seed": 42}
    assert rows.items() <= receipt["identity"].items()
    assert receipt["tokens_per_second"] > 0 and receipt["peak_memory_bytes"][0] > 1e8
    assert list((out / "runs").glob("events.out.tfevents.*"))

    # A second run must neither overwrite the first nor mix with its checkpoints.
    completed = run_script("finetune_pp_peft.py", *flags, "--output_dir", out, "--max_steps", 1)
    former = re.search(r"which is now (\S+)", completed.stdout)[1]
    assert (tmp_path / former / "checkpoint-6" / "settings.json").is_file()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]


def test_tensorboard_holds_the_curves(tiny_model, tiny_set, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--use_cpu", "True", "--bf16", "False"]
    run_script("finetune_pp.py", *flags, "--output_dir", tmp_path / "out", "--max_steps", 3)
    events = EventAccumulator(str(tmp_path / "out" / "runs")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in history_of(tmp_path / "out")], rel=1e-6)


def test_training_goes_on_from_an_adapter_with_new_data(tiny_model, tiny_set, tmp_path):
    """--peft_path begins where the adapter ended, with ptuning's MLP, which PEFT's own file does not hold."""
    for mode in MODES:
        flags = ["--learning_rate", 0.05, "--max_steps", 2, "--output_dir", tmp_path / mode]
        module, args, rows, model = prepare(mode, tiny_model, tiny_set, *flags)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        train(module, args, model, tokenizer, rows)
        module.save_model(model, tokenizer, tmp_path / mode)
        _, _, _, again = prepare(mode, tiny_model, tiny_set, "--peft_path", tmp_path / mode)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loaded = {name: p for name, p in again.named_parameters() if p.requires_grad}
        assert trained.keys() == loaded.keys()
        assert all(torch.equal(trained[name], loaded[name]) for name in trained)


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(strategy, tmp_path):
    """At the third step the loss is not a number: a row has a token whose embedding is infinite."""
    model_path = save_tiny_model(tmp_path / "model")
    weights = load_file(model_path / "model.safetensors")
    weights["model.embed_tokens.weight"][299] = float("inf")
    from safetensors.torch import save_file

    save_file(weights, model_path / "model.safetensors", metadata={"format": "pt"})
    rows = random_rows(24, vocab_size=299)
    in_order = TrainingRows(TokenizedDataset(save_rows(rows, tmp_path / "all")), 8, 1, -1, 42)
    (number,) = [i for i, row in enumerate(rows) if row["input_ids"] == in_order[17]["input_ids"].tolist()]
    rows[number]["input_ids"][0] = 299
    data = save_rows(rows, tmp_path / "rows")
    name, mode_flags = STRATEGIES[strategy]
    completed = run_script(
        f"{name}.py", "--model_path", model_path, "--dataset_path", data, "--output_dir", tmp_path / "out",
        "--save_steps", 1, *FAST, *mode_flags, check=False,
    )  # fmt: skip
    assert completed.returncode == 1
    assert "error: step 3 has loss nan" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert importlib.import_module(name).find_damage(tmp_path / "out" / "checkpoint-2") is None
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("name", ["finetune_pp", "finetune_pp_peft"])
def test_layers_are_placed_in_balanced_contiguous_blocks(name):
    module = importlib.import_module(name)
    for num_devices in range(1, 9):
        for num_layers in range(1, 81):
            sizes = module.place_layers(num_layers, num_devices)
            assert len(sizes) == num_devices and sum(sizes) == num_layers
            assert max(sizes) - min(sizes) <= 1
            if num_devices > 2 and num_layers % num_devices:
                assert sizes[0] <= max(sizes[1:-1]) and sizes[-1] <= max(sizes[1:-1])


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize("num_devices", [2, 3])
def test_every_weight_has_one_device_in_any_family(family, tied, num_devices):
    """Each parameter lies on exactly one device, layers in order, the embedding first, the head last unless tied."""
    module = importlib.import_module("finetune_pp")
    small = {"n_embd": 16, "n_layer": 5, "n_head": 2, "vocab_size": 64} if family == "gpt2" else dict(SMALL)
    if family in ("llama", "mistral", "qwen2"):
        small["num_key_value_heads"] = 1
    config = AutoConfig.for_model(family, **small, tie_word_embeddings=tied)
    devices = [torch.device("cuda", i) for i in range(num_devices)]
    device_map = module.make_device_map(config, devices)
    skeleton = module.make_skeleton(config)
    for name, _ in [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers()]:
        assert sum(name == key or name.startswith(f"{key}.") for key in device_map) == 1, name
    blocks = [device_map[key].index for key in device_map if re.search(r"\.\d+$", key)]
    assert blocks == sorted(blocks) and len(blocks) == 5 and set(blocks) == set(range(num_devices))
    names = {module: name for name, module in skeleton.named_modules()}
    assert device_map[names[skeleton.get_input_embeddings()]] == devices[0]
    assert device_map[names[skeleton.get_output_embeddings()]] == devices[0 if tied else -1]


@pytest.mark.parametrize("strategy", ["full", "lora", "ptuning", "prompt"])  # a prefix's cache must follow real devices
def test_a_model_that_is_spread_with_hooks_gives_the_same_gradients(strategy, tiny_model, tiny_set):
    """The hooks that move tensors between devices, here all on one: what forward() passes survives them unchanged."""
    from accelerate import dispatch_model

    no_dropout = ["--lora_dropout", 0] if strategy == "lora" else []
    plain = gradients_of_one_batch(*prepare(strategy, tiny_model, tiny_set, *no_dropout))
    module, args, rows, model = prepare(strategy, tiny_model, tiny_set, *no_dropout)
    base = model if strategy == "full" else model.get_base_model()
    places = module.make_device_map(base.config, [torch.device("cpu")] * 2)
    if strategy == "lora":  # PEFT has wrapped the linear layers, whose block stays one place
        assert all(".self_attn" not in name for name in places)
    dispatch_model(base, {name: "cpu" for name in places}, force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in base.modules())
    module.move_inputs_to_layers(base, places)
    assert not any(hasattr(module, "_hf_hook") for module in base.modules())
    hooked = gradients_of_one_batch(module, args, rows, model)
    assert all(torch.equal(gradient, hooked[name]) for name, gradient in plain.items())


@pytest.mark.parametrize(("name", "mode"), [("finetune_pp", "full"), ("finetune_pp_peft", "lora")])
def test_a_forward_and_an_update_over_four_fake_devices(name, mode):
    """No operand lies on another device than its partner; without the moves, one does."""
    found = run_script("tests/fake_devices.py", name, mode).stdout
    assert "loss on gpu:3, norm on gpu:0, weights on gpu:0, gpu:1, gpu:2, gpu:3\n" in found
    failed = run_script("tests/fake_devices.py", name, mode, "unmoved", check=False)
    assert "found at least two devices" in failed.stderr


@pytest.mark.parametrize("name", ["finetune_pp", "finetune_pp_peft"])
def test_the_inputs_of_each_layer_are_moved_once(name, tiny_model, monkeypatch):
    """Positions and borders of documents, too: the first device has made them."""
    module = importlib.import_module(name)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    places = module.make_device_map(model.config, [torch.device("cpu")] * 2)
    moved = []

    def note(inputs, device, skip_keys=None):
        moved.extend(inputs)
        return inputs

    monkeypatch.setattr(module, "send_to_device", note)
    module.move_inputs_to_layers(model, places)
    batch = DataCollator(True)([{"input_ids": torch.arange(5, 9), "labels": torch.arange(5, 9)}])
    model(**batch, use_cache=False)
    for expected in ("position_embeddings", "cu_seq_lens_q"):
        assert moved.count(expected) == model.config.num_hidden_layers
    assert len(places) == model.config.num_hidden_layers + 4  # embedding, rotary embedding, norm and head


@pytest.mark.parametrize(
    ("name", "num_billions", "gigabytes", "expected"),
    [
        ("finetune_pp", 7, 80, 4),
        ("finetune_pp", 1, 80, 1),
        ("finetune_pp", 70, 80, 8),
        ("finetune_pp_peft", 7, 80, 1),
        ("finetune_pp_peft", 7, 24, 2),
        ("finetune_pp_peft", 13, 12, 5),
        ("finetune_pp_peft", 70, 80, 4),
    ],
)
def test_a_model_lies_on_no_more_gpus_than_it_needs(name, num_billions, gigabytes, expected, monkeypatch):
    """Of eight: half of each is for the weights and what belongs to them, half for activations."""
    module = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    properties = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    hidden_size = 4096
    layers = round(num_billions * 1e9 / (12 * hidden_size**2))
    sizes = {"hidden_size": hidden_size, "intermediate_size": 8 * hidden_size // 3, "vocab_size": 99}
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=layers)
    devices = module.choose_devices(module.Arguments(), config)
    assert devices == [torch.device("cuda", i) for i in range(expected)]
    assert len(module.choose_devices(module.Arguments(num_gpus=3), config)) == 3
    assert len(module.choose_devices(module.Arguments(num_gpus=99), config)) == min(8, layers)
    assert module.choose_devices(module.Arguments(use_cpu=True), config) == [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert module.choose_devices(module.Arguments(), config) == [torch.device("cpu")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tied", [False, True])
def test_two_devices_give_the_gradients_of_one(strategy, tied, tiny_set, tmp_path):
    name, mode_flags = STRATEGIES[strategy]
    module = importlib.import_module(name)
    model_path = save_tiny_model(tmp_path / "model", tied=tied, num_layers=5)
    flags = ["--model_path", model_path, "--dataset_path", tiny_set, "--bf16", "False", *mode_flags]
    args = parse(module, *flags)
    config, _, rows, _, _ = module.check_arguments(args)
    gradients = []
    for devices in ([torch.device("cuda", 0)], [torch.device("cuda", 0), torch.device("cuda", 1)]):
        torch.manual_seed(0)
        extra = [devices] if name == "finetune_pp_peft" else [None, devices]
        model = module.load_model(args, config, *extra).eval()
        batch = DataCollator(args.padding_free)([rows.dataset[i] for i in range(8)])
        module.forward(args, model, module.choose_loss(args, model, rows), batch, devices[0]).backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        assert (gradient - gradients[1][key]).norm() <= 1e-5 * gradient.norm() + 1e-12


def test_the_compute_precision_follows_the_hardware():
    module = importlib.import_module("finetune_pp")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    for choice, expected in (("auto", fast), ("True", True), ("False", False)):
        assert module.computes_in_bf16(module.Arguments(bf16=choice, use_cpu=True)) == expected


@pytest.mark.parametrize("strategy", ["full", "lora"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_next_start_goes_on(strategy, number, tiny_model, tiny_set, tmp_path):
    name, mode_flags = STRATEGIES[strategy]
    flags = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--max_steps", 400, "--save_steps", 1000, *FAST]
    resume = [*flags, *mode_flags, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "True"]
    error = tmp_path / "error"
    (process,) = start_script(f"{name}.py", *resume, "--logging_steps", "1", error=error)
    while process.poll() is None and not (error.exists() and "1/400" in error.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    seen = error.read_text()
    step = newest_complete(tmp_path / "out")
    assert process.returncode == 1 and 0 < step < 400, seen
    assert f"step {step} is saved; --resume_from_checkpoint True goes on from there" in seen
    assert "Traceback" not in seen
    completed = run_script(f"{name}.py", *resume[:-2], "--resume_from_checkpoint", "True", "--max_steps", step + 1)
    assert f"resuming from {tmp_path}/out/checkpoint-{step}\n" in completed.stdout
    assert [row["step"] for row in history_of(tmp_path / "out")] == list(range(1, step + 2))


def test_a_base_that_lacks_weights_is_an_error_and_no_random_start(tiny_set, tmp_path):
    from safetensors.torch import save_file

    model_path = save_tiny_model(tmp_path / "model")
    weights = load_file(model_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("finetune_pp", "finetune_pp_peft"):
        flags = ["--model_path", model_path, "--dataset_path", tiny_set, "--output_dir", tmp_path / "out", *FAST]
        completed = run_script(f"{name}.py", *flags, check=False)
        assert completed.returncode == 1 and "Traceback" not in completed.stderr
        assert "lack 1 tensors that the model needs" in completed.stderr and "lm_head.weight" in completed.stderr
        assert not (tmp_path / "out").exists()


SCHEDULES = {
    "linear": "{}", "cosine": "{}", "cosine_with_restarts": "{}", "polynomial": "{}", "constant": "{}",
    "constant_with_warmup": "{}", "inverse_sqrt": "{}", "cosine_with_min_lr": '{"min_lr": 1e-6}',
    "cosine_warmup_with_min_lr": '{"min_lr": 1e-6}', "warmup_stable_decay": '{"num_decay_steps": 3}',
}  # fmt: skip


def test_the_schedule_takes_every_name_that_transformers_takes(tiny_model, tiny_set):
    from transformers import SchedulerType

    assert {str(kind.value) for kind in SchedulerType} - SCHEDULES.keys() == {"reduce_lr_on_plateau", "greedy"}
    module = importlib.import_module("finetune_pp")
    common = ["--model_path", tiny_model, "--dataset_path", tiny_set, *FAST]
    for name, settings in SCHEDULES.items():
        args = parse(module, *common, "--lr_scheduler_type", name, "--lr_scheduler_kwargs", settings)
        module.check_arguments(args)
    for name in ("reduce_lr_on_plateau", "greedy", "cosine_with_min_lr"):
        with pytest.raises(ValueError, match=f"--lr_scheduler_type {name}: "):
            module.check_arguments(parse(module, *common, "--lr_scheduler_type", name))


# -----------------------------------------------------------------------------------------------------------------
# Users' mistakes
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose weights cannot be loaded: a mistake that is found before them never touches the file."""
    folder = tmp_path_factory.mktemp("broken")
    model = save_tiny_model(folder / "model")
    save_file({"none": torch.zeros(1)}, model / "model.safetensors")
    good = save_rows(random_rows(9), folder / "rows")
    no_labels = save_rows([{"input_ids": [1, 2, 3]}], folder / "no_labels")
    empty = save_rows([], folder / "empty")
    no_target = save_rows([{"input_ids": [5, 6], "labels": [-100, -100]}], folder / "no_target", {"targets": 0})
    beyond = save_rows([{"input_ids": [5, 300], "labels": [-100, 300]}], folder / "beyond")
    packed_rows = [{"input_ids": [5, 6, 5, 6], "labels": [5, 6, 5, 6], "position_ids": [0, 1, 0, 1]}]
    packed = save_rows(packed_rows, folder / "packed")
    other = save_rows(random_rows(3), folder / "other", {"vocabulary_sha256": "of another tokenizer"})
    unfinished = save_rows(random_rows(3), folder / "unfinished")
    (unfinished / "ledger.json").unlink()
    file = folder / "file"
    file.write_text("a file")
    no_weights = folder / "no_weights"
    no_weights.mkdir()
    make_tokenizer().save_pretrained(no_weights)
    return {
        "model": model, "rows": good, "no_labels": no_labels, "empty": empty, "beyond": beyond,
        "no_target": no_target, "packed": packed,
        "other": other, "unfinished": unfinished, "file": file, "no_weights": no_weights, "missing": folder / "none",
    }  # fmt: skip


# flags -> what the message must name; {x} is a path of the fixture above.
MISTAKES = [
    ("--model_path {missing}", ["--model_path", "{missing}", "no such folder", "quickstart.sh"]),
    ("--model_path models/none", ["--model_path models/none", "no such folder", "quickstart.sh"]),
    ("--model_path {no_weights}", ["--model_path", "{no_weights}", "no model.safetensors"]),
    ("--dataset_path {missing}", ["--dataset_path", "{missing}", "no such folder", "tokenize_dataset.py"]),
    ("--dataset_path {unfinished}", ["--dataset_path", "no ledger.json", "tokenize_dataset.py"]),
    ("--dataset_path {no_labels}", ["--dataset_path", "no column labels", "input_ids", "tokenize_dataset.py"]),
    ("--dataset_path {empty}", ["--dataset_path", "no rows", "ledger.json"]),
    ("--dataset_path {no_target}", ["--dataset_path", "no token in it is a target"]),
    ("--dataset_path {beyond}", ["--dataset_path", "input_ids from 5 to 300", "vocabulary of 300", "--tokenizer_path"]),
    ("--dataset_path {other}", ["--dataset_path", "another tokenizer", "--tokenizer_path"]),
    ("--eval_dataset_path {missing}", ["--eval_dataset_path", "no such folder"]),
    ("--output_dir {file}/out", ["--output_dir", "is not a writable folder", "choose another"]),
    ("--learnin_rate 1", ["--learnin_rate", "--help"]),
    ("--learning_rate nan", ["--learning_rate nan", "> 0"]),
    ("--num_train_epochs inf", ["--num_train_epochs inf", "> 0"]),
    ("--learning_rate 0", ["--learning_rate 0", "> 0"]),
    ("--weight_decay -1", ["--weight_decay -1", ">= 0"]),
    ("--per_device_train_batch_size 0", ["--per_device_train_batch_size 0", "> 0"]),
    ("--lr_scheduler_type step", ["--lr_scheduler_type", "'step'", "cosine", "linear"]),
    ("--bf16 yes", ["--bf16", "'yes'", "auto", "True", "False"]),
    ("--num_gpus -1", ["--num_gpus -1", ">= 0"]),
    ("--num_gpus 99", ["--num_gpus 99: there are"]),
    ("--resume_from_checkpoint {missing}", ["--resume_from_checkpoint", "{missing}", "no settings.json"]),
    ("--gradient_accumulation_steps 0 --dataset_path {missing}",
     ["--gradient_accumulation_steps 0", "> 0", "--dataset_path", "no such folder"]),
]  # fmt: skip
PEFT_MISTAKES = [
    ("--lora_rank 0", ["--lora_rank 0", "> 0"]),
    ("--peft_mode adapter", ["--peft_mode", "'adapter'", "lora", "prefix", "ptuning", "prompt"]),
    ("--lora_dropout -1 --lora_rank -4", ["--lora_dropout -1.0", ">= 0", "--lora_rank -4"]),
    ("--lora_target_modules q_proj,query", ["--lora_target_modules query", "matches no layer"]),
    ("--lora_target_modules nothing", ["nothing"]),
    ("--peft_mode prompt --mapping_hidden_dim 64", ["--mapping_hidden_dim 64", "no MLP"]),
    ("--peft_mode prefix --dataset_path {packed}", ["--peft_mode prefix", "--packing False"]),
    ("--peft_mode prompt --num_virtual_tokens 250", ["--num_virtual_tokens 250", "more than the 256"]),
    ("--peft_mode prefix --gradient_checkpointing True", ["--peft_mode prefix", "gradient checkpointing"]),
    ("--peft_path {missing}", ["--peft_path"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "flags", "parts"),
    [("finetune_pp", *case) for case in MISTAKES] + [("finetune_pp_peft", *case) for case in MISTAKES + PEFT_MISTAKES],
)
def test_a_mistake_ends_before_weights_are_loaded(name, flags, parts, broken, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    defaults = {"--model_path": broken["model"], "--dataset_path": broken["rows"], "--output_dir": tmp_path / "out"}
    given = flags.format(**broken).split()
    command = [name] + given + [str(x) for key, value in defaults.items() if key not in given for x in (key, value)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    for part in parts:
        assert part.format(**broken) in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["finetune_pp", "finetune_pp_peft"])
def test_several_processes_are_sent_to_the_pipeline(name, broken, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--model_path", broken["model"], "--dataset_path", broken["rows"], "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    with pytest.raises(SystemExit, match=r"error: torchrun: .* one process; finetune_pp_1f1b\.py"):
        importlib.import_module(name).main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["finetune_pp", "finetune_pp_peft"])
def test_a_mistake_is_one_message_without_a_traceback(name, broken, tmp_path):
    flags = ["--model_path", broken["model"], "--dataset_path", broken["empty"], "--save_steps", 0]
    completed = run_script(f"{name}.py", *flags, "--output_dir", tmp_path / "out", check=False)
    assert completed.returncode == 1
    assert "Traceback" not in completed.stderr
    lines = completed.stderr[completed.stderr.index("error: ") :].strip().splitlines()
    assert len(lines) == 3  # two mistakes, and where to look flags up
    assert "--save_steps 0" in lines[0] and "--dataset_path" in lines[1] and "--help" in lines[2]
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_rows_is_refused(tiny_model, tiny_set, tmp_path):
    flags = ["--model_path", tiny_model, "--output_dir", tmp_path / "out", *FAST]
    run_script("finetune_pp.py", *flags, "--dataset_path", tiny_set, "--max_steps", 1)
    module = importlib.import_module("finetune_pp")
    args = parse(module, *flags, "--dataset_path", tiny_set, "--learning_rate", 1, "--resume_from_checkpoint", "True")
    with pytest.raises(ValueError, match="belongs to a run with .*learning_rate.: 2e-05"):
        module.check_arguments(args)
    others = save_rows(random_rows(22, seed=5), tmp_path / "others")
    for change in (["--seed", 7], ["--per_device_train_batch_size", 4], ["--dataset_path", others]):
        rows = [] if change[0] == "--dataset_path" else ["--dataset_path", tiny_set]
        args = parse(module, *flags, *rows, *change, "--resume_from_checkpoint", "True")
        with pytest.raises(ValueError, match="belongs to a run with"):
            module.check_arguments(args)
