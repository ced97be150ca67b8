"""The three Trainer scripts under stress: kills, SIGTERM, other world sizes, users' mistakes, memory, what is saved."""

import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, save_rows, save_tiny_model
from harness import (
    FSDP,
    LORA,
    NUM_STEPS,
    STRATEGIES,
    ZERO,
    Runs,
    assert_identical,
    history_of,
    kill,
    losses_of,
    newest_complete,
    steps_in,
    weights_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import is_bitsandbytes_available

import data_collator
import finetune_pp_peft_trainer
from data_collator import TokenizedDataset, TrainingRows

find_damage = finetune_pp_peft_trainer.find_damage  # the same in every script
TRAINERS = [name for name, (script, _) in STRATEGIES.items() if "trainer" in script]
SMALL = ["--num_virtual_tokens", 4, "--mapping_hidden_dim", 16]
MODES = {"full": [], "lora": ["--lora_dropout", 0], "prompt": ["--peft_mode", "prompt", *SMALL[:2]]}
MODES |= {mode: ["--peft_mode", mode, *SMALL] for mode in ("prefix", "ptuning")}
SAMPLE_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
needs_4bit = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
needs_sample = pytest.mark.skipif(not SAMPLE_MODEL.is_dir(), reason="bash scripts/quickstart.sh fetches the model")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("trainers"))


# --- Kills, signals, other world sizes ---------------------------------------------------------------------------


KILLED = ["FSDP2+LoRA", "ZeRO-3"]
KILLED += map(slow, ("FSDP2", "ZeRO-2", "ZeRO-3+LoRA", "FSDP2+LoRA DPO", "ZeRO-3 DPO"))


@pytest.mark.parametrize("strategy", KILLED)
def test_killed_while_saving_and_resumed_equals_uninterrupted_bit_for_bit(strategy, runs, tmp_path):
    """LoRA's dropout is on. The half checkpoint never gets its name; the run goes on in the middle of an epoch."""
    out, flags = tmp_path / "out", ["--max_steps", NUM_STEPS, "--save_steps", 1, "--resume_from_checkpoint", "True"]
    for _ in range(3):  # a kill that comes a millisecond late finds the checkpoint complete
        run = runs.launch(strategy, out, *flags) if strategy == "FSDP2+LoRA" else runs.start(strategy, 2, out, *flags)
        if kill(run, out, True, after_step=4):
            break
    last = newest_complete(out)
    assert 4 <= last < NUM_STEPS and steps_in(out / ".writing") == {last + 1}
    resumed = runs.train(strategy, 2, out, *flags)
    assert f"resuming from {out}/checkpoint-{last}\n" in resumed.output
    assert_identical(out, runs.whole(strategy, 2))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", TRAINERS)
def test_twenty_kills_leave_the_run_as_if_uninterrupted(strategy, runs, tmp_path):
    """Ten at random moments, ten while a checkpoint is being written; each hits a run that has trained further."""
    seed, out, hits, num_starts = random.randrange(10**6), tmp_path / "out", [], 0
    print(f"{strategy}: seed {seed}")
    random.seed(seed)
    flags = ["--max_steps", 120, "--save_steps", 1]
    while len(hits) < 20:
        before, num_starts = newest_complete(out), num_starts + 1
        run = runs.start(strategy, 2, out, *flags, "--resume_from_checkpoint", "True")
        if kill(run, out, len(hits) % 2 == 1, before + 1):
            hits.append(newest_complete(out))
            assert hits[-1] > before, run.log.read_text()
        assert run.forked[0].exitcode == -signal.SIGKILL, run.log.read_text()
    runs.train(strategy, 2, out, *flags, "--resume_from_checkpoint", "True")
    print(f"{strategy}: {num_starts} starts, 20 kills that hit; the newest complete checkpoints were {hits}")
    assert_identical(out, runs.whole(strategy, 2, *flags))


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "receiver"),
    [
        ("FSDP2+LoRA", 2, "torchrun"), ("FSDP2", 2, "one rank"), ("ZeRO-3", 2, "all ranks"), ("FSDP2", 1, "all ranks"),
        slow("ZeRO-2", 2, "torchrun"), slow("ZeRO-3", 2, "one rank"), slow("ZeRO-3+LoRA", 1, "all ranks"),
    ],
)  # fmt: skip
def test_sigterm_saves_a_checkpoint_and_the_next_start_goes_on(strategy, num_ranks, receiver, runs, tmp_path):
    """In the middle of the second epoch, where no checkpoint is due."""
    out, rows = tmp_path / "out", () if num_ranks == 2 else ("--per_device_train_batch_size", 8)
    flags = ["--max_steps", NUM_STEPS, "--save_steps", 4, *rows]
    launched = receiver == "torchrun"
    run = runs.launch(strategy, out, *flags) if launched else runs.start(strategy, num_ranks, out, *flags)
    while newest_complete(out) < 4 and run.is_alive():
        time.sleep(0.002)
    for process in [run.torchrun] if launched else run.workers() if receiver == "all ranks" else run.workers()[1:]:
        process.send_signal(signal.SIGTERM)
    run.finish(check=False)
    step = newest_complete(out)
    assert 0 not in run.codes and 4 < step < NUM_STEPS, run.output
    assert find_damage(out / f"checkpoint-{step}") is None
    line = f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there"
    assert run.output.count("SIGTERM: step") == run.output.count(line) == 1
    assert launched or "Traceback" not in run.output  # torchrun prints one of its own
    assert not (out / "run.json").exists()
    resumed = runs.train(strategy, num_ranks, out, *flags, "--resume_from_checkpoint", "True")
    assert f"resuming from {out}/checkpoint-{step}\n" in resumed.output
    assert_identical(out, runs.whole(strategy, num_ranks, *rows))


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", slow("FSDP2+LoRA DPO")])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_fsdp_resumes_in_mid_epoch_under_any_number_of_processes(strategy, before, after, runs, tmp_path):
    """A step's eight rows are cut into as many forwards as it takes; the losses stay the same."""
    dropout = ("--lora_dropout", 0) if strategy == "FSDP2+LoRA" else ()
    reference = runs.whole(strategy, before, *dropout, "--per_device_train_batch_size", 8 // before)
    cut = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4 // after]
    resume = ["--resume_from_checkpoint", reference / "checkpoint-5"]
    runs.train(strategy, after, tmp_path / "out", "--max_steps", NUM_STEPS, *dropout, *cut, *resume)
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(reference), rel=1e-5)


def test_deepspeed_refuses_to_resume_under_another_number_of_processes(runs, tmp_path):
    checkpoint = runs.whole("ZeRO-3", 2) / "checkpoint-5"
    flags = ["--max_steps", NUM_STEPS, "--per_device_train_batch_size", 8, "--resume_from_checkpoint", checkpoint]
    refused = runs.train("ZeRO-3", 1, tmp_path / "out", *flags, check=False)
    assert refused.codes == [1]
    assert f"error: --resume_from_checkpoint {checkpoint}" in refused.output
    assert "{'world_size': '2'}" in refused.output and "Traceback" not in refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", "ZeRO-3"])
def test_a_run_killed_after_its_last_checkpoint_still_writes_the_model(strategy, runs, tmp_path):
    last = runs.whole(strategy, 2) / f"checkpoint-{NUM_STEPS}"
    runs.train(strategy, 2, tmp_path / "out", "--max_steps", NUM_STEPS, "--resume_from_checkpoint", last)
    assert_identical(tmp_path / "out", runs.whole(strategy, 2))


# --- What is saved -----------------------------------------------------------------------------------------------


def logits_of(folder: Path, base: Path | None) -> torch.Tensor:
    """Of a model, or of an adapter on `base`, that plain from_pretrained loads in this process."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base or folder)
    model = peft.PeftModel.from_pretrained(model, folder) if base not in (None, folder) else model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    prompt = torch.tensor([[1, 40, 50, 60, 70, 80]])
    with torch.no_grad():
        return model.eval()(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[:, -6:]


def plain_run(runs: Runs, mode: str, model: str, *flags) -> Path:
    """The plain loop's run in one process, of three steps with the same settings."""
    data = ("--model_path", f"{{{model}}}", "--per_device_train_batch_size", 8, "--max_steps", 3)
    return runs.whole("plain" if mode == "full" else "plain PEFT", 1, *data, *MODES[mode], *flags)


@pytest.mark.parametrize(
    ("strategy", "mode", "model"),
    [("FSDP2", "full", "tied"), *(("FSDP2+LoRA", mode, "untied") for mode in list(MODES)[1:]),
     ("ZeRO-3", "full", "tied"), ("ZeRO-3+LoRA", "ptuning", "untied"), slow("FSDP2", "full", "untied"),
     slow("ZeRO-2", "full", "tied"), slow("ZeRO-2", "full", "untied"), slow("ZeRO-3", "full", "untied"),
     *(slow("ZeRO-3+LoRA", mode, "tied") for mode in list(MODES)[1:]), slow("FSDP2+LoRA", "prefix", "tied")],
)  # fmt: skip
def test_the_saved_folder_reloads_with_the_trained_weights(strategy, mode, model, runs, tmp_path):
    out, start, reference = tmp_path / "out", runs.parts[model], plain_run(runs, mode, model)
    base = None if mode == "full" else start
    runs.train(strategy, 2, out, "--model_path", start, "--max_steps", 3, *MODES[mode])
    for folder in (out, out / "checkpoint-3"):
        found, expected = logits_of(folder, base), logits_of(reference, base)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (found - logits_of(start, base)).abs().max() > 1e-2
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            assert tensors and all(t.numel() > 0 and t.dtype == torch.float32 for t in tensors.values()), path
            assert model == "untied" or not any("lm_head.weight" in name for name in tensors)
        shapes = [{name: tensor.shape for name, tensor in weights_of(f).items()} for f in (folder, reference)]
        assert shapes[0] == shapes[1]
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
    assert not [path.name for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not list(out.rglob("training_args.bin"))


def test_a_weight_that_was_not_written_as_trained_is_noticed(tmp_path):
    trained = {name: torch.randn(8, 8) for name in ("a", "b", "c")}
    save_file(trained, tmp_path / "model.safetensors")
    finetune_pp_peft_trainer.check_saved(tmp_path, trained)
    for damage in ({"b": trained["b"] + 1e-6}, {"b": trained["b"].bfloat16()}, {"b": torch.empty(0)}):
        save_file(trained | damage, tmp_path / "model.safetensors")
        with pytest.raises(OSError, match="b was not saved as it was trained"):
            finetune_pp_peft_trainer.check_saved(tmp_path, trained)
    save_file({"a": trained["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="b, c was not saved"):
        finetune_pp_peft_trainer.check_saved(tmp_path, trained)


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", *map(slow, ("FSDP2", "ZeRO-2", "ZeRO-3", "ZeRO-3+LoRA"))])
def test_passages_and_a_mix_are_drawn_alike_by_every_strategy_and_after_resuming(strategy, runs, tmp_path):
    """Papers and instructions, two of them for one; the second epoch's passages are others than the first's."""
    papers = [{"input_ids": [(7 * i + j) % 297 + 3 for j in range(20 + 9 * i)]} for i in range(12)]
    mix = f"{save_rows(papers, tmp_path / 'papers')}:2,{runs.parts['rows']}:1"
    flags = ["--dataset_path", mix, "--random_passage", "True", "--passage_length", 24, "--max_steps", 6]
    flags += ["--save_steps", 4, *(MODES["lora"] if "LoRA" in strategy else [])]
    plain = "plain PEFT" if "LoRA" in strategy else "plain"
    runs.train(plain, 1, tmp_path / "plain", *flags, "--per_device_train_batch_size", 8)
    runs.train(strategy, 2, tmp_path / "out", *flags)  # three steps an epoch, whose last one is short
    expected, found = history_of(tmp_path / "plain"), history_of(tmp_path / "out")
    assert losses_of(tmp_path / "out") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    seen = [[row["num_input_tokens_seen"] for row in history] for history in (expected, found)]
    assert seen[0] == seen[1] and seen[0][-1] < 12 * 24 * 2 + 12 * 60
    shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    runs.train(strategy, 2, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "True")
    assert_identical(tmp_path / "resumed", tmp_path / "out")
    other = [*flags, "--passage_length", 25, "--resume_from_checkpoint", "True"]
    refused = runs.train(strategy, 2, tmp_path / "resumed", *other, check=False)
    assert "belongs to a run with {'passage_length': 24}" in refused.output and set(refused.codes) == {1}


# --- Inside a run: sharding, memory, precision --------------------------------------------------------------------


def report(folder, **facts) -> None:
    """A probe's findings, one file for each process."""
    (folder / f"facts-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))


def facts_of(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]


def probe_sharding(module, folder) -> None:
    """Reports, after the first step, what a process holds of the model."""
    from torch.distributed.fsdp import FSDPModule

    original = module.RunCallback.on_step_end

    def look(self, *args, **kwargs):
        model = self.trainer.model
        parameters = list(model.parameters())
        if module.__name__ == ZERO:
            shards = [p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters]
            sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        else:
            shards, sizes = [p.to_local().numel() for p in parameters], [p.numel() for p in parameters]
        layers = [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]
        report(
            folder, shards=shards, sizes=sizes, types=sorted({type(p.data).__name__ for p in parameters}),
            layers=[isinstance(layer, FSDPModule) for layer in layers],
            dtypes=sorted({f"{p.requires_grad} {p.dtype}" for p in parameters}),
        )  # fmt: skip
        return original(self, *args, **kwargs)

    module.RunCallback.on_step_end = look


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", "ZeRO-3"])
def test_parameters_are_sharded_for_real(strategy, runs, tmp_path):
    runs.train(strategy, 2, tmp_path / "out", "--max_steps", 1, probe=(probe_sharding, tmp_path))
    first, second = facts_of(tmp_path)
    assert first["sizes"] == second["sizes"]
    for facts in (first, second):
        assert 0.45 < sum(facts["shards"]) / sum(facts["sizes"]) < 0.55
        if strategy == "ZeRO-3":
            assert all(shard < size for shard, size in zip(facts["shards"], facts["sizes"], strict=True))
        else:
            assert facts["types"] == ["DTensor"] and facts["layers"] == [True, True]


def probe_loss(module, folder) -> None:
    """Reports the shapes of what the output layer returned in training."""
    shapes = []

    def note(layer, inputs, output) -> None:
        if isinstance(layer, torch.nn.Linear) and layer.out_features == 300 and layer.training:
            shapes.append(list(output.shape))
            report(folder, shapes=shapes)

    report(folder, shapes=shapes)
    torch.nn.modules.module.register_module_forward_hook(note)


@pytest.mark.parametrize("strategy", [*TRAINERS, "plain", "plain PEFT"])
def test_logits_never_exist_all_at_once_in_any_strategy(strategy, runs, tmp_path):
    """The output layer returns the loss, a scalar, where its weight is whole only while it runs, or a number for each
    target of a pair; in the plain loops it is not called at all."""
    num_ranks, flags = 1 if "plain" in strategy else 2, ["--max_steps", 2, "--gradient_accumulation_steps", 2]
    runs.train(strategy, num_ranks, tmp_path / "out", *flags, probe=(probe_loss, tmp_path))
    expected = [] if "plain" in strategy else [0] * 4
    if "DPO" in strategy:
        expected = [1] * 4
    dimensions = [[len(shape) for shape in facts["shapes"]] for facts in facts_of(tmp_path)]
    assert dimensions == [expected] * num_ranks


def probe_fallback(module) -> None:
    """Makes accelerate do what it does on a CPU by itself: DDP instead of FSDP."""
    original = module.make_training_arguments

    def fall_back(*args):
        made = original(*args)
        made.distributed_state.distributed_type = module.DistributedType.MULTI_CPU
        return made

    module.make_training_arguments = fall_back


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA"])
def test_a_run_that_did_not_get_its_sharding_stops(strategy, runs, tmp_path):
    stopped = runs.train(strategy, 2, tmp_path / "out", "--max_steps", 1, probe=(probe_fallback,), check=False)
    assert stopped.codes == [1, 1]
    assert "error: the parameters are not sharded" in stopped.output
    assert not (tmp_path / "out" / "model.safetensors").exists() and not list(tmp_path.glob("out/checkpoint-*"))


def probe_memory(module, folder) -> None:
    """Reports the peaks of memory above what the process had before load_model, there and in sharding, and ends.

    `own` is memory that nobody but the process can have (RssAnon, sampled every millisecond); `resident` counts the
    pages of mapped files, too, which the kernel shares between processes and takes back when it needs them. The first
    forward is left out: glibc keeps what it freed, which has nothing to do with loading.
    """
    load, seen, own = module.load_model, {}, [0]

    def megabytes(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) // 1024 for line in status if line.startswith(field))

    def watch():
        while True:
            own[0] = max(own[0], megabytes("RssAnon"))
            time.sleep(0.001)

    def load_model(*args):
        before = {"own": megabytes("RssAnon"), "resident": megabytes("VmRSS")}
        threading.Thread(target=watch, daemon=True).start()
        model = load(*args)
        seen.update(before=before, loaded={"own": own[0], "resident": megabytes("VmHWM")})
        return model

    def stop(*args):
        report(folder, **seen, sharded={"own": own[0], "resident": megabytes("VmHWM")})
        sys.exit(0)

    module.load_model, data_collator.check_document_attention = load_model, stop


@needs_sample
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", "ZeRO-3"])
def test_no_process_holds_more_than_one_copy_of_the_weights_while_loading(strategy, runs, tmp_path, monkeypatch):
    """Two fresh processes (a fork would share pages): the first reads the weights, the second only gets its shards.

    What loading takes without weights (code, threads, buffers) is what a model of a few kilobytes takes. Freed memory
    is given back to the system at once, so that only what is held counts.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")

    def measure(name: str, *model) -> list[dict]:
        folder, driver = tmp_path / name, tmp_path / f"{name}.py"
        folder.mkdir()
        driver.write_text(
            f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom pathlib import Path\n"
            f"import test_trainers, {STRATEGIES[strategy][0]} as script\n"
            f"test_trainers.probe_memory(script, Path({str(folder)!r}))\nscript.main()\n"
        )
        runs.launch(strategy, tmp_path / "out", *model, script=driver).finish()
        return facts_of(folder)

    tensors = load_file(SAMPLE_MODEL / "model.safetensors").values()
    copy = sum(tensor.numel() * 4 for tensor in tensors) // 2**20
    print(f"{strategy}: one float32 copy {copy} MB; peaks above the memory before load_model, in MB:")
    pairs = zip(measure("sample", "--model_path", SAMPLE_MODEL), measure("tiny"), strict=True)
    for rank, (facts, tiny) in enumerate(pairs):
        for stage in ("loaded", "sharded"):
            own, resident = (facts[stage][kind] - facts["before"][kind] for kind in ("own", "resident"))
            without = tiny[stage]["own"] - tiny["before"]["own"]
            print(f"  rank {rank} {stage}: {own} of its own, {without} of it without weights, "
                  f"{resident} with the pages of mapped files")  # fmt: skip
            # When it shards, ZeRO makes its optimizer's float32 masters and their averages, too.
            assert own - without < copy * 1.05 or (strategy == "ZeRO-3" and stage == "sharded")


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA"])
def test_bf16_computes_in_bf16_and_keeps_trained_weights_and_losses_in_float32(strategy, runs, tmp_path):
    mode, out = "full" if strategy == "FSDP2" else "lora", tmp_path / "out"
    runs.train(strategy, 2, out, "--bf16", "True", "--max_steps", 3, *MODES[mode], probe=(probe_sharding, tmp_path))
    losses = losses_of(out)
    assert losses == pytest.approx(losses_of(plain_run(runs, mode, "untied", "--bf16", "True")), rel=1e-2)
    assert losses != losses_of(plain_run(runs, mode, "untied"))  # it was not float32
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in losses)  # nor is the loss rounded to bf16
    frozen = [] if mode == "full" else ["False torch.bfloat16"]
    assert facts_of(tmp_path)[1]["dtypes"] == [*frozen, "True torch.float32"]
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}


def probe_frozen(module, folder) -> None:
    """Reports before and after each evaluation a hash of the frozen weights, and at first if all is sharded."""
    original, hashes = module.FSDPTrainer.evaluate, []

    def digest(model) -> str:
        frozen = [p.detach() for p in model.parameters() if not p.requires_grad]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in frozen]
        # A clone: memory that NumPy has seen cannot be resized any more, which FSDP does.
        return hashlib.sha256(b"".join(p.clone().numpy().tobytes() for p in whole)).hexdigest()

    def evaluate(self, *args, **kwargs):
        sharded = all(self.is_sharded(p) for p in self.model.parameters())
        packed = [p.numel() for name, p in self.model.named_parameters() if "q_proj.base_layer" in name]
        before = digest(self.model)
        loss = original(self, *args, **kwargs)
        hashes.extend([before, digest(self.model)])
        report(folder, hashes=hashes, sharded=sharded, packed=packed)
        return loss

    module.FSDPTrainer.evaluate = evaluate


@needs_4bit
def test_qlora_is_sharded_and_the_same_under_two_processes_and_survives_evaluation(runs, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--model_path", tmp_path / "model", "--load_in_4bit", "True", "--lora_dropout", 0, "--max_steps", 6]
    flags += ["--eval_dataset_path", runs.parts["eval"], "--eval_steps", 2]
    flags += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps"]
    for num_ranks in (1, 2):
        out, probe = tmp_path / f"{num_ranks}", (probe_frozen, tmp_path)
        runs.train("FSDP2+LoRA", num_ranks, out, *flags, 2 // num_ranks, probe=probe)
    assert losses_of(tmp_path / "2") == pytest.approx(losses_of(tmp_path / "1"), rel=1e-5)
    evaluations = [[row["eval_loss"] for row in history_of(tmp_path / f) if "eval_loss" in row] for f in ("1", "2")]
    assert len(evaluations[0]) == 3 and evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)
    for facts in facts_of(tmp_path):
        assert facts["sharded"] and len(facts["hashes"]) == 6 and len(set(facts["hashes"])) == 1
        assert facts["packed"] == [64 * 64 // 8] * 2  # eight weights of 4 bit in one float32 of the storage


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", slow("ZeRO-3+LoRA")])
def test_with_gradient_checkpointing_every_adapter_matrix_is_trained(strategy, runs, tmp_path):
    out = tmp_path / "out"
    flags = ["--gradient_checkpointing", "True", "--warmup_steps", 0, "--max_steps", 3, "--save_steps", 1]
    runs.train(strategy, 2, out, *flags, "--save_total_limit", 9)
    one, two, three = (weights_of(out / f"checkpoint-{step}") for step in (1, 2, 3))
    assert len(one) == 2 * 7 * 2  # A and B of seven linear layers in two decoder layers
    for name in one:
        if "lora_B" in name:
            assert one[name].abs().sum() > 0, name
        else:  # its gradient at step 1 is zero, because lora_B begins as zero
            assert not torch.equal(one[name], two[name]), name
        assert not torch.equal(two[name], three[name]), name


@pytest.mark.parametrize(
    ("strategy", "logging_steps"), [("FSDP2+LoRA", 1), ("ZeRO-3", 5), slow("FSDP2", 5), slow("ZeRO-2", 1)]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_checkpoints(strategy, logging_steps, runs, tmp_path):
    """At the third step the loss of one of two processes is not a number: a row's token has an infinite embedding."""
    model = save_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][299] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = random_rows(24, vocab_size=299)
    in_order = TrainingRows(TokenizedDataset(save_rows(rows, tmp_path / "all")), 8, 1, -1, 42)
    (number,) = [i for i, row in enumerate(rows) if row["input_ids"] == in_order[17]["input_ids"].tolist()]
    rows[number]["input_ids"][0] = 299
    data, out = save_rows(rows, tmp_path / "rows"), tmp_path / "out"
    flags = ["--model_path", model, "--dataset_path", data, "--save_steps", 1, "--logging_steps", logging_steps]
    stopped = runs.train(strategy, 2, out, *flags, "--max_steps", 6, check=False)
    assert stopped.codes == [1, 1]
    assert stopped.output.count("error: step 3 has loss nan") == 1 and "Traceback" not in stopped.output
    assert find_damage(out / "checkpoint-2") is None
    assert not (out / "checkpoint-3").exists() and not (out / "run.json").exists()
    assert all(math.isfinite(row["loss"]) for row in history_of(out / "checkpoint-2"))


# --- Users' mistakes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory, runs) -> dict:
    """A model whose weights cannot be loaded: a mistake that is found before them never touches the file."""
    folder = tmp_path_factory.mktemp("broken")
    model = save_tiny_model(folder / "model")
    save_file({"none": torch.zeros(1)}, model / "model.safetensors")
    texts = {"stage1": '{"zero_optimization": {"stage": 1}}', "no_stage": "{}", "list": "[]", "torn": '{"zero_opt'}
    texts["spelled"] = '{"zero_optimization": {"stage": "3"}}'
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    packed_row = {"input_ids": [5, 6, 5, 6], "labels": [5, 6, 5, 6], "position_ids": [0, 1, 0, 1]}
    parts = {"model": model, "rows": runs.parts["rows"], "packed": save_rows([packed_row], folder / "packed")}
    return parts | {"missing": folder / "none", "f": folder} | {name: folder / f"{name}.json" for name in texts}


PREFIX = "--peft_mode prefix --gradient_checkpointing True"
TWO, ALL = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, (FSDP, LORA, ZERO)
IN_DS, IN_FSDP = {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_FSDP": "true"}
# scripts; flags, {x} being a path of the fixture above; environment; what the message must name.
MISTAKES = [
    ([ZERO], "--deepspeed {missing}", {}, "--deepspeed {missing}: | No such file"),
    ([ZERO], "--deepspeed {f}", {}, "--deepspeed {f}: | directory"),
    ([ZERO], "--deepspeed {stage1}", {}, "--deepspeed {stage1}: | stage is 1 | 2 and 3 | ds_configs/"),
    ([ZERO], "--deepspeed {no_stage}", {}, "--deepspeed {no_stage}: | stage is None | ds_configs/"),
    ([ZERO], "--deepspeed {spelled}", {}, "--deepspeed {spelled}: | ds_configs/"),
    ([ZERO], "--deepspeed {torn}", {}, "--deepspeed {torn}: | line 1 column"),
    ([ZERO], "--deepspeed {list}", {}, "--deepspeed {list}:"),
    ([ZERO], "", IN_FSDP, "ACCELERATE_USE_FSDP is true | unset it"),
    ([FSDP, LORA], "", IN_DS, "ACCELERATE_USE_DEEPSPEED is true | unset it"),
    ([FSDP, LORA], "--deepspeed ds_configs/zero3.json", {}, "--deepspeed | --help"),
    (ALL, "--fsdp full_shard", {}, "--fsdp | full_shard | --help"),
    ([FSDP, ZERO], "--load_in_4bit True", {}, "--load_in_4bit | --help"),
    ([FSDP], "--lora_rank 4", {}, "--lora_rank | --help"),
    ([ZERO], "--lora_used False --peft_mode prefix", {}, "--lora_used False: | --peft_mode"),
    ([ZERO], "--lora_used False --peft_path {missing}", {}, "--lora_used False: | --peft_path"),
    ([LORA], "--peft_path {missing}", {}, "--peft_path {missing}:"),
    ([ZERO], "--lora_used True --peft_path {missing}", {}, "--peft_path {missing}:"),
    ([ZERO], "--lora_used True --lora_rank 0", {}, "--lora_rank 0: | > 0"),
    ([LORA], "--peft_mode adapter", {}, "--peft_mode | 'adapter' | prefix"),
    ([LORA], "--lora_alpha 0 --lora_rank -4", {}, "--lora_alpha 0.0: | --lora_rank -4:"),
    ([LORA], "--lora_target_modules q_proj,query", {}, "--lora_target_modules query | matches no layer"),
    ([LORA], "--peft_mode prompt --mapping_hidden_dim 64", {}, "--mapping_hidden_dim 64: | no MLP"),
    ([LORA], PREFIX, {}, "--peft_mode prefix: | PREFIX_TUNING does not work with gradient checkpointing"),
    ([ZERO], f"--lora_used True {PREFIX}", {}, "--peft_mode prefix: | does not work with gradient checkpointing"),
    ([LORA], "--peft_mode prefix --dataset_path {packed}", {}, "--peft_mode prefix: | --packing False"),
    ([LORA], "--peft_mode ptuning --eval_dataset_path {packed}", {}, "--peft_mode ptuning: | --packing False"),
    ([ZERO], "--lora_used True --peft_mode prompt --dataset_path {packed}", {}, "--peft_mode prompt: | --packing"),
    (ALL, "--model_path {missing}", {}, "--model_path {missing}: | no such folder | quickstart.sh"),
    (ALL, "", TWO, "--use_cpu False: | 2 processes need as many GPUs"),
    (ALL, "--resume_from_checkpoint {missing}", {}, "--resume_from_checkpoint {missing}: | no settings.json"),
    (ALL, "--bf16 yes", {}, "--bf16 | 'yes' | auto"),
    (ALL, "--seed -1 --save_steps 0", TWO, "--seed -1: | --save_steps 0: | 2 processes need"),
    (ALL, "", {"WORLD_SIZE": "4"}, "WORLD_SIZE is set and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not | torchrun"),
    ([ZERO], "--deepspeed {stage1} --peft_mode prefix --dataset_path {missing} --seed -1", TWO,
     "stage is 1 | --lora_used False: | --dataset_path {missing}: | --seed -1: | 2 processes need"),
]  # fmt: skip
MISTAKES = [(script, *mistake) for scripts, *mistake in MISTAKES for script in scripts]


@pytest.mark.parametrize(("script", "flags", "environment", "named"), MISTAKES)
def test_a_mistake_ends_before_weights_are_loaded(script, flags, environment, named, broken, tmp_path, monkeypatch):
    defaults = {"--model_path": broken["model"], "--dataset_path": broken["rows"], "--output_dir": tmp_path / "out"}
    given = flags.format(**broken).split()
    command = [script] + given + [str(x) for key, value in defaults.items() if key not in given for x in (key, value)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    for part in named.split(" | "):
        assert part.format(**broken) in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["FSDP2", "ZeRO-2"])
def test_a_mistake_under_two_processes_is_one_message_without_a_traceback(strategy, broken, runs, tmp_path):
    flags = ["--model_path", broken["model"], "--save_steps", 0, "--resume_from_checkpoint", broken["missing"]]
    flags += ["--seed", -1]
    stopped = runs.train(strategy, 2, tmp_path / "out", *flags, check=False)
    assert stopped.codes == [1, 1] and "Traceback" not in stopped.output
    assert stopped.output.count("error: ") == 1
    assert "--save_steps 0" in stopped.output and "--seed -1" in stopped.output
    assert not (tmp_path / "out").exists()
