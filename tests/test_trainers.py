"""The three Trainer scripts under stress: kills, SIGTERM, other world sizes, users' mistakes, memory, what is saved.

Kills and signals go to real starts (`launch`: python or torchrun). Everything else runs the scripts' own main() in
processes forked from one that has imported them (`train`): a start costs a second instead of ten. What happens inside
such a run is seen by a probe, a function of this file that wraps one of the script's own before main() begins.
"""

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, make_tokenizer, random_rows, save_rows, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import is_bitsandbytes_available

import data_collator
from data_collator import RowSampler, TokenizedDataset

FSDP, LORA, ZERO = "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora", "finetune_pp_peft_trainer_deepspeed"
STRATEGIES = {
    "FSDP2": (FSDP, []),
    "FSDP2+LoRA": (LORA, []),
    "ZeRO-2": (ZERO, ["--deepspeed", "{zero2}"]),
    "ZeRO-3": (ZERO, ["--deepspeed", "{zero3}"]),
    "ZeRO-3+LoRA": (ZERO, ["--deepspeed", "{zero3}", "--lora_used", "True"]),
}
VIRTUAL = ["--num_virtual_tokens", 4]
MODES = {
    "lora": ["--lora_dropout", 0],
    "prefix": ["--peft_mode", "prefix", *VIRTUAL, "--mapping_hidden_dim", 16],
    "ptuning": ["--peft_mode", "ptuning", *VIRTUAL, "--mapping_hidden_dim", 16],
    "prompt": ["--peft_mode", "prompt", *VIRTUAL],
}
NUM_STEPS = 12
COMMON = ["--learning_rate", 1e-2, "--use_cpu", "True", "--report_to", "none", "--bf16", "False"]
SAMPLE_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
needs_4bit = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
needs_sample = pytest.mark.skipif(not SAMPLE_MODEL.is_dir(), reason="bash scripts/quickstart.sh fetches the model")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# -----------------------------------------------------------------------------------------------------------------
# Starting runs
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict:
    """Models, sets and ZeRO configurations; a flag names them as {tied}, {rows}, {zero3}."""
    folder = tmp_path_factory.mktemp("trainers")
    parts = {"folder": folder, "tied": save_tiny_model(folder / "tied", tied=True)}
    parts |= {"untied": save_tiny_model(folder / "untied"), "rows": save_rows(random_rows(22), folder / "rows")}
    parts["eval"] = save_rows(random_rows(7, seed=3), folder / "eval")
    for stage in (2, 3):
        config = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
        if stage == 3:  # else DeepSpeed would leave the tensors of a small model whole
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        parts[f"zero{stage}"] = folder / f"zero{stage}.json"
        parts[f"zero{stage}"].write_text(json.dumps(config))
    return parts


def flags_of(parts, strategy: str, *more) -> list[str]:
    """Eight rows a step under two processes; later flags win over earlier ones."""
    flags = ["--model_path", "{untied}", "--dataset_path", "{rows}", "--per_device_train_batch_size", 4]
    return [str(flag).format(**parts) for flag in [*flags, *COMMON, *STRATEGIES[strategy][1], *more]]


@pytest.fixture(scope="session")
def forks():
    """Makes processes that have already imported the three scripts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([FSDP, LORA, ZERO, "deepspeed", "finetune_pp", "finetune_pp_peft", __name__])
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        first = context.Process(target=os.getpid)  # the server starts with the first process, and keeps its environment
        first.start()
        first.join()
    return context


def run_main(script: str, flags: list[str], environment: dict, log, probe=None, *context) -> None:
    """In a forked process: what `python script.py flags` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    sys.argv = [f"{script}.py", *flags]
    module = importlib.import_module(script)
    if probe:
        probe(module, *context)
    module.main()


def start(forks, processes: int, log, script: str, flags, *probe) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {} for i in range(processes)]
    started = [forks.Process(target=run_main, args=(script, list(flags), rank, log, *probe)) for rank in ranks]
    for process in started:
        process.start()
    return started


def finish(started: list, log, check: bool = True) -> SimpleNamespace:
    """Waits for the processes of a run, which never outlive this call."""
    deadline = time.monotonic() + 240
    try:
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        codes, output = [process.exitcode for process in started], log.read_text()
    finally:
        for process in started:
            process.kill()
            process.join()
    assert None not in codes, f"hangs:\n{output}"
    assert not check or set(codes) == {0}, output
    return SimpleNamespace(codes=codes, output=output)


@pytest.fixture
def train(forks, parts, tmp_path):
    """Runs a strategy in forked processes: train("ZeRO-3", 2, folder, flags ...) -> exit codes and output."""

    def train(strategy, processes, out, *flags, probe=(), check=True):
        script, log = STRATEGIES[strategy][0], tmp_path / f"{out.name}-{time.monotonic_ns()}.log"
        flags = flags_of(parts, strategy, *flags, "--output_dir", out)
        return finish(start(forks, processes, log, script, flags, *probe), log, check)

    return train


@pytest.fixture(scope="module")
def whole(forks, parts):
    """A function that gives the folder of an uninterrupted run with every checkpoint, run once per set of flags."""
    made = {}

    def run(strategy, processes=2, *flags):
        key = (strategy, processes, *flags)
        if key not in made:
            made[key] = parts["folder"] / f"whole-{len(made)}"
            more = ["--max_steps", NUM_STEPS, "--save_steps", 1, "--save_total_limit", 99, *flags]
            command = flags_of(parts, strategy, *more, "--output_dir", made[key])
            log = made[key].with_suffix(".log")
            finish(start(forks, processes, log, STRATEGIES[strategy][0], command), log)
        return made[key]

    return run


def launch(processes: int, log, script: str, flags) -> psutil.Popen:
    """Starts a script as a user does, in the background."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), f"{script}.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "ab") as file:
        return psutil.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def kill_all(process: psutil.Popen) -> None:
    """SIGKILL for a run's processes at once; torchrun's workers have process groups of their own."""
    processes = [process, *process.children(recursive=True)] if process.is_running() else [process]
    for one in processes:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    assert not psutil.wait_procs(processes[1:], timeout=30)[1]


def steps_with(out, pattern: str) -> set[int]:
    return {int(path.parent.name[11:]) for path in out.glob(f"checkpoint-*/{pattern}") if path.parent.name[11:]}


def newest_complete(out) -> int:
    return max(steps_with(out, "complete.json"), default=0)


def kill_while_saving(process, out, after_step: int) -> int:
    """SIGKILL as soon as files of a checkpoint beyond `after_step` exist without complete.json; its step."""
    try:
        while process.poll() is None:
            saving = steps_with(out, "*") - steps_with(out, "complete.json")
            if saving and max(saving) > after_step:
                kill_all(process)
                if max(saving) not in steps_with(out, "complete.json"):
                    return max(saving)
                pytest.fail("the checkpoint was completed before the kill")
        pytest.fail(f"the run ended with {process.returncode} before it could be killed")
    finally:
        kill_all(process)


def kill_at_random(process, out, longest: float = 1.0) -> bool:
    """SIGKILL at a random moment after the run has saved a checkpoint of its own; whether it was still training."""
    before = newest_complete(out)
    try:
        while newest_complete(out) <= before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, longest))
        return process.poll() is None and newest_complete(out) > before
    finally:
        kill_all(process)


def history_of(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def weights_of(folder) -> dict[str, torch.Tensor]:
    """All that was trained, from a run's folder or a checkpoint."""
    trainable = folder / "trainable.safetensors"
    return load_file(trainable if trainable.is_file() else folder / "model.safetensors")


def assert_identical(found, expected, num_steps=NUM_STEPS) -> None:
    assert history_of(found) == history_of(expected)
    assert [row["step"] for row in history_of(found)] == list(range(1, num_steps + 1))
    mine, theirs = weights_of(found), weights_of(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (found / "run.json").is_file()


def assert_same_curve(found, expected) -> None:
    assert len(history_of(found)) == len(history_of(expected)) == NUM_STEPS
    for row, other in zip(history_of(found), history_of(expected), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), row["step"]


# -----------------------------------------------------------------------------------------------------------------
# Kills, signals, other world sizes
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", "ZeRO-3", *map(slow, ("FSDP2", "ZeRO-2", "ZeRO-3+LoRA"))])
def test_killed_while_saving_and_resumed_equals_uninterrupted_bit_for_bit(strategy, parts, train, whole, tmp_path):
    """LoRA's dropout is on. The half checkpoint is passed over, whatever it holds."""
    resume = ["--max_steps", NUM_STEPS, "--save_steps", 1, "--resume_from_checkpoint", "True"]
    torn = tmp_path / "torn"
    command = flags_of(parts, strategy, *resume, "--output_dir", torn)
    half = kill_while_saving(launch(2, tmp_path / "log", STRATEGIES[strategy][0], command), torn, 3)
    assert 3 <= newest_complete(torn) == half - 1 < NUM_STEPS - 1
    resumed = train(strategy, 2, torn, *resume)
    assert f"ignoring {torn}/checkpoint-{half}: it has no complete.json" in resumed.output
    assert f"resuming from {torn}/checkpoint-{half - 1}\n" in resumed.output
    assert_identical(torn, whole(strategy))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_twenty_kills_at_random_moments_leave_the_run_as_if_uninterrupted(strategy, parts, whole, tmp_path):
    """Every second kill hits a checkpoint that is being written. Adapters and full weights, three scripts."""
    num_steps, num_kills, seed = 400, 0, random.randrange(10**6)
    wanted = 20 if strategy in ("FSDP2", "FSDP2+LoRA", "ZeRO-3") else 5
    random.seed(seed)
    print(f"{strategy}: seed {seed}")
    flags = ["--max_steps", num_steps, "--save_steps", 1, "--resume_from_checkpoint", "True"]
    torn, log, halves, moments = tmp_path / "torn", tmp_path / "log", 0, []
    command = flags_of(parts, strategy, *flags, "--output_dir", torn)
    while num_kills < wanted:
        process = launch(2, log, STRATEGIES[strategy][0], command)
        if num_kills % 2:
            kill_while_saving(process, torn, newest_complete(torn))
        else:
            assert kill_at_random(process, torn), f"kill {num_kills} missed:\n{log.read_text()[-3000:]}"
        halves += len(steps_with(torn, "*") - steps_with(torn, "complete.json"))
        num_kills += 1
        moments.append(newest_complete(torn))
    assert moments[-1] < num_steps
    assert launch(2, log, STRATEGIES[strategy][0], command).wait(900) == 0, log.read_text()[-3000:]
    print(f"{strategy}: {num_kills} kills in training, {halves} left a half checkpoint; complete were {moments}")
    assert_identical(torn, whole(strategy, 2, "--max_steps", num_steps, "--save_total_limit", 2), num_steps)


@pytest.mark.parametrize(
    ("strategy", "processes", "receivers"),
    [
        ("FSDP2+LoRA", 2, "torchrun"), ("FSDP2", 2, "one rank"), ("ZeRO-3", 2, "all ranks"), ("FSDP2", 1, "one rank"),
        slow("ZeRO-2", 2, "torchrun"), slow("ZeRO-3", 2, "one rank"), slow("ZeRO-3+LoRA", 1, "one rank"),
        slow("FSDP2+LoRA", 2, "all ranks"),
    ],
)  # fmt: skip
def test_sigterm_saves_a_checkpoint_and_the_next_start_goes_on(
    strategy, processes, receivers, forks, parts, train, whole, tmp_path
):
    out, log, script = tmp_path / "out", tmp_path / "log", STRATEGIES[strategy][0]
    flags = ["--max_steps", NUM_STEPS, "--per_device_train_batch_size", 8 // processes]
    command = flags_of(parts, strategy, *flags, "--output_dir", out, "--save_steps", 2)  # the third is nobody's turn
    if receivers == "torchrun":
        process = launch(processes, log, script, command)
        try:
            while not newest_complete(out) and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) != 0
            assert not psutil.wait_procs(process.children(recursive=True) if process.is_running() else [], 30)[1]
        finally:
            kill_all(process)
        output = log.read_text()
    else:
        started = start(forks, processes, log, script, command)
        while not newest_complete(out) and started[0].is_alive():
            time.sleep(0.005)
        for process in started if receivers == "all ranks" else started[-1:]:
            os.kill(process.pid, signal.SIGTERM)
        stopped = finish(started, log, check=False)
        output = stopped.output
        assert set(stopped.codes) == {1}, output
    step = newest_complete(out)
    assert 2 <= step < NUM_STEPS
    assert data_collator.find_damage(out / f"checkpoint-{step}") is None
    line = f"SIGTERM: step {step} is saved; --resume_from_checkpoint True goes on from there"
    assert output.count("SIGTERM: step") == output.count(line) == 1
    assert "Traceback" not in output.replace("Traceback", "", output.count("SignalException"))  # torchrun's own
    assert not (out / "run.json").exists()
    resumed = train(strategy, processes, out, *flags, "--save_steps", 2, "--resume_from_checkpoint", "True")
    assert f"resuming from {out}/checkpoint-{step}\n" in resumed.output
    assert_identical(out, whole(strategy, processes, "--per_device_train_batch_size", 8 // processes))


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA"])
def test_fsdp_resumes_under_another_number_of_processes_with_the_same_losses(strategy, train, whole, tmp_path):
    """From 2 to 1 and from 1 to 2 (4 forwards of one row a step), in the middle of an epoch."""
    dropout = ["--lora_dropout", 0] if strategy == "FSDP2+LoRA" else []
    shapes = {1: ["--per_device_train_batch_size", 8], 2: ["--per_device_train_batch_size", 4]}
    accumulated = {1: [2, 4], 2: [1, 4]}  # (rows a forward, forwards a step) of the resumed run
    for before, after in ((2, 1), (1, 2)):
        reference = whole(strategy, before, *shapes[before], *dropout)
        rows, forwards = accumulated[after]
        train(
            strategy, after, tmp_path / f"{before}-{after}", *dropout, "--max_steps", NUM_STEPS,
            "--per_device_train_batch_size", rows, "--gradient_accumulation_steps", forwards,
            "--resume_from_checkpoint", reference / "checkpoint-5",
        )  # fmt: skip
        assert_same_curve(tmp_path / f"{before}-{after}", reference)


def test_deepspeed_refuses_to_resume_under_another_number_of_processes(train, whole, tmp_path):
    checkpoint = whole("ZeRO-3") / "checkpoint-5"
    flags = ["--max_steps", NUM_STEPS, "--per_device_train_batch_size", 8, "--resume_from_checkpoint", checkpoint]
    refused = train("ZeRO-3", 1, tmp_path / "out", *flags, check=False)
    assert refused.codes == [1]
    assert f"error: --resume_from_checkpoint {checkpoint}" in refused.output
    assert "{'world_size': '2'}" in refused.output and "Traceback" not in refused.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", "ZeRO-3"])
def test_a_run_killed_after_its_last_checkpoint_still_writes_the_model(strategy, train, whole, tmp_path):
    last = whole(strategy) / f"checkpoint-{NUM_STEPS}"
    train(strategy, 2, tmp_path / "out", "--max_steps", NUM_STEPS, "--resume_from_checkpoint", last)
    assert_identical(tmp_path / "out", whole(strategy))


# -----------------------------------------------------------------------------------------------------------------
# What is saved
# -----------------------------------------------------------------------------------------------------------------


def logits_of(folder, base=None) -> torch.Tensor:
    """Of a folder that is loaded by plain from_pretrained, in this process."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base or folder)
    if base and base != folder:
        model = peft.PeftModel.from_pretrained(model, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    prompt = torch.tensor([[1, 40, 50, 60, 70, 80]])
    with torch.no_grad():
        return model.eval()(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[:, -6:]


@pytest.fixture(scope="module")
def plain(forks, parts):
    """A function that gives the folder of the plain loop's run in one process, run once for each set of flags."""
    made = {}

    def run(mode, model, *flags):
        key = (mode, model, *flags)
        if key not in made:
            made[key] = parts["folder"] / f"plain-{len(made)}"
            more = [*MODES.get(mode, []), "--per_device_train_batch_size", 8, "--max_steps", 3, *flags]
            command = flags_of(parts, "FSDP2", "--model_path", parts[model], *more, "--output_dir", made[key])
            log = made[key].with_suffix(".log")
            script = "finetune_pp" if mode == "full" else "finetune_pp_peft"
            finish(start(forks, 1, log, script, command), log)
        return made[key]

    return run


@pytest.mark.parametrize(
    ("strategy", "mode", "model"),
    [("FSDP2", "full", "tied"), *(("FSDP2+LoRA", mode, "untied") for mode in MODES), ("ZeRO-3", "full", "tied"),
     ("ZeRO-3+LoRA", "ptuning", "untied"), slow("FSDP2", "full", "untied"), slow("ZeRO-2", "full", "tied"),
     slow("ZeRO-2", "full", "untied"), slow("ZeRO-3", "full", "untied"),
     *(slow("ZeRO-3+LoRA", mode, "tied") for mode in MODES), slow("FSDP2+LoRA", "prefix", "tied")],
)  # fmt: skip
def test_the_saved_folder_reloads_with_the_trained_weights(strategy, mode, model, parts, train, plain, tmp_path):
    out, base = tmp_path / "out", None if mode == "full" else parts[model]
    train(strategy, 2, out, "--model_path", parts[model], "--max_steps", 3, *MODES.get(mode, []))
    for folder in (out, out / "checkpoint-3"):
        found, reference, untrained = logits_of(folder, base), logits_of(plain(mode, model), base), parts[model]
        assert (found - reference).abs().max() <= 1e-4 * reference.abs().max()
        assert (found - logits_of(untrained, base)).abs().max() > 1e-2
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            assert tensors and all(t.numel() > 0 and t.dtype == torch.float32 for t in tensors.values()), path
            assert model == "untied" or not any("lm_head.weight" in name for name in tensors)
        expected, found = weights_of(plain(mode, model)), weights_of(folder)
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()
        assert (folder / "model.safetensors").is_file() == (base is None)
    pickles = [path.name for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert pickles == []
    assert not list(out.rglob("training_args.bin"))


def test_a_weight_that_was_not_written_as_trained_is_noticed(tmp_path):
    trained = {name: torch.randn(8, 8) for name in ("a", "b", "c")}
    save_file(trained, tmp_path / "model.safetensors")
    data_collator.verify(tmp_path, trained)
    for damage in ({"b": trained["b"] + 1e-6}, {"b": trained["b"].bfloat16()}, {"b": torch.empty(0)}):
        save_file(trained | damage, tmp_path / "model.safetensors")
        with pytest.raises(OSError, match="b was not saved as it was trained"):
            data_collator.verify(tmp_path, trained)
    save_file({"a": trained["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="b, c was not saved"):
        data_collator.verify(tmp_path, trained)


# -----------------------------------------------------------------------------------------------------------------
# Inside a run: sharding, memory, precision
# -----------------------------------------------------------------------------------------------------------------


def report(folder, **facts) -> None:
    """A probe's findings, one file for each process."""
    (folder / f"facts-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(facts))


def facts_of(folder) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]


def probe_sharding(module, folder) -> None:
    """Reports, after the first step, what a process holds of the model."""
    from torch.distributed.fsdp import FSDPModule

    original = data_collator.RowTrainer._maybe_log_save_evaluate

    def look(self, *args, **kwargs):
        parameters = list(self.model.parameters())
        if module.__name__ == ZERO:
            shards = [p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters]
            sizes = [getattr(p, "ds_numel", p.numel()) for p in parameters]
        else:
            shards, sizes = [p.to_local().numel() for p in parameters], [p.numel() for p in parameters]
        layers = [m for m in self.model.modules() if isinstance(m, LlamaDecoderLayer)]
        report(
            folder, shards=shards, sizes=sizes, types=sorted({type(p.data).__name__ for p in parameters}),
            layers=[isinstance(layer, FSDPModule) for layer in layers],
            dtypes=sorted({f"{p.requires_grad} {p.dtype}" for p in parameters}),
        )  # fmt: skip
        return original(self, *args, **kwargs)

    data_collator.RowTrainer._maybe_log_save_evaluate = look


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", "ZeRO-3"])
def test_parameters_are_sharded_for_real(strategy, train, tmp_path):
    train(strategy, 2, tmp_path / "out", "--max_steps", 1, probe=(probe_sharding, tmp_path))
    first, second = facts_of(tmp_path)
    assert first["sizes"] == second["sizes"]
    for facts in (first, second):
        assert 0.45 < sum(facts["shards"]) / sum(facts["sizes"]) < 0.55
        if strategy == "ZeRO-3":
            assert all(shard < size for shard, size in zip(facts["shards"], facts["sizes"], strict=True))
        else:
            assert facts["types"] == ["DTensor"] and facts["layers"] == [True, True]


def probe_fallback(module) -> None:
    """Makes accelerate do what it does on a CPU by itself: DDP instead of FSDP."""
    original = module.make_training_arguments

    def fall_back(*args):
        made = original(*args)
        module.PartialState._shared_state["distributed_type"] = module.DistributedType.MULTI_CPU
        return made

    module.make_training_arguments = fall_back


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA"])
def test_a_run_that_did_not_get_its_sharding_stops(strategy, train, tmp_path):
    stopped = train(strategy, 2, tmp_path / "out", "--max_steps", 1, probe=(probe_fallback,), check=False)
    assert stopped.codes == [1, 1]
    assert "error: the parameters are not sharded" in stopped.output
    assert not (tmp_path / "out" / "model.safetensors").exists() and not list(tmp_path.glob("out/checkpoint-*"))


def probe_memory(module, folder) -> None:
    """Reports the resident memory before the model, its peak after load_model and after sharding, and ends there."""
    load, prepare = module.load_model, data_collator.RowTrainer._prepare_for_training

    def megabytes(field: str) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) // 1024 for line in status if line.startswith(field))

    seen = {}

    def load_model(*args):
        seen["before"] = megabytes("VmRSS")
        model = load(*args)
        seen["loaded"] = megabytes("VmHWM")
        return model

    def prepare_and_stop(self, *args):
        prepare(self, *args)
        report(folder, **seen, prepared=megabytes("VmHWM"))
        sys.exit(0)

    module.load_model, data_collator.RowTrainer._prepare_for_training = load_model, prepare_and_stop


@needs_sample
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA", "ZeRO-3"])
def test_no_process_holds_more_than_one_copy_of_the_weights_while_loading(strategy, parts, tmp_path):
    """Two fresh processes (a fork would share pages): the first reads the weights, the second only gets its shards."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nfrom pathlib import Path\n"
        f"import test_trainers, {STRATEGIES[strategy][0]} as script\n"
        f"test_trainers.probe_memory(script, Path({str(tmp_path)!r}))\nscript.main()\n"
    )
    rows = save_rows(random_rows(22), tmp_path / "rows")
    flags = ["--model_path", SAMPLE_MODEL, "--dataset_path", rows, "--output_dir", tmp_path / "out"]
    process = launch(2, tmp_path / "log", str(driver.with_suffix("")), flags_of(parts, strategy, *flags))
    try:
        assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        kill_all(process)
    files = [load_file(path) for path in SAMPLE_MODEL.glob("*.safetensors")]
    copy = sum(tensor.numel() * 4 for file in files for tensor in file.values()) // 2**20
    grown = [(facts["loaded"] - facts["before"], facts["prepared"] - facts["before"]) for facts in facts_of(tmp_path)]
    print(f"{strategy}: one float32 copy {copy} MB; resident above the start, after load_model and after sharding:")
    for rank, (loaded, prepared) in enumerate(grown):
        print(f"  rank {rank}: {loaded} MB, {prepared} MB ({facts_of(tmp_path)[rank]})")
    assert grown[0][0] < 1.25 * copy + 100 and grown[0][1] < 1.75 * copy + 200
    assert grown[1][0] < 0.5 * copy and grown[1][1] < 1.0 * copy


@pytest.mark.parametrize("strategy", ["FSDP2", "FSDP2+LoRA"])
def test_bf16_computes_in_bf16_and_keeps_trained_weights_and_losses_in_float32(strategy, train, plain, tmp_path):
    mode, flags = ("full", []) if strategy == "FSDP2" else ("lora", MODES["lora"])
    out = tmp_path / "out"
    train(strategy, 2, out, "--bf16", "True", "--max_steps", 3, *flags, probe=(probe_sharding, tmp_path))
    losses = [row["loss"] for row in history_of(out)]
    assert losses == pytest.approx(
        [row["loss"] for row in history_of(plain(mode, "untied", "--bf16", "True"))], rel=1e-2
    )
    assert losses != [row["loss"] for row in history_of(plain(mode, "untied"))]  # it was not float32
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in losses)  # nor is the loss rounded to bf16
    frozen = [] if mode == "full" else ["False torch.bfloat16"]
    assert facts_of(tmp_path)[1]["dtypes"] == [*frozen, "True torch.float32"]
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.float32}


def probe_frozen(module, folder) -> None:
    """Reports a hash of this process's frozen weights before and after every evaluation, and whether all is sharded."""
    original, hashes = module.FSDPTrainer.evaluate, []

    def digest(model) -> str:
        frozen = [p.to_local().contiguous() for p in model.parameters() if not p.requires_grad]
        return hashlib.sha256(b"".join(p.view(torch.uint8).numpy().tobytes() for p in frozen)).hexdigest()

    def evaluate(self, *args, **kwargs):
        hashes.append(digest(self.model))
        loss = original(self, *args, **kwargs)
        hashes.append(digest(self.model))
        sharded = all(self.is_sharded(p) for p in self.model.parameters())
        packed = [p.numel() for n, p in self.model.named_parameters() if "q_proj.base_layer" in n]
        report(folder, hashes=hashes, sharded=sharded, packed=packed)
        return loss

    module.FSDPTrainer.evaluate = evaluate


@needs_4bit
def test_qlora_is_sharded_and_the_same_under_two_processes_and_survives_evaluation(parts, train, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--model_path", tmp_path / "model", "--load_in_4bit", "True", "--lora_dropout", 0, "--max_steps", 6]
    flags += ["--eval_dataset_path", parts["eval"], "--eval_steps", 2]
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        probe = (probe_frozen, tmp_path)
        train("FSDP2+LoRA", processes, out, *flags, "--per_device_train_batch_size", 8 // processes, probe=probe)
    for row, other in zip(history_of(tmp_path / "1"), history_of(tmp_path / "2"), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other.get("eval_loss") == (pytest.approx(row["eval_loss"], rel=1e-5) if "eval_loss" in row else None)
    for facts in facts_of(tmp_path):
        assert facts["sharded"] and len(facts["hashes"]) == 6 and len(set(facts["hashes"])) == 1
        assert facts["packed"] == [64 * 64 // 8] * 2  # 8 weights of 4 bit in one float32 of the storage
    assert facts_of(tmp_path)[0]["hashes"] != facts_of(tmp_path)[1]["hashes"]  # each process has its own shards


@pytest.mark.parametrize("strategy", ["FSDP2+LoRA", slow("ZeRO-3+LoRA")])
def test_with_gradient_checkpointing_every_adapter_matrix_is_trained(strategy, train, tmp_path):
    out = tmp_path / "out"
    flags = ["--gradient_checkpointing", "True", "--warmup_steps", 0, "--max_steps", 3, "--save_steps", 1]
    train(strategy, 2, out, *flags, "--save_total_limit", 9)
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
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    strategy, logging_steps, parts, train, tmp_path
):
    """At the third step the loss of one of two processes is not a number: a row's token has an infinite embedding."""
    model = save_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][299] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = random_rows(24, vocab_size=299)
    rows[list(RowSampler(TokenizedDataset(save_rows(rows, tmp_path / "all")), 8, 42))[17]]["input_ids"][0] = 299
    data, out = save_rows(rows, tmp_path / "rows"), tmp_path / "out"
    flags = ["--model_path", model, "--dataset_path", data, "--save_steps", 1, "--logging_steps", logging_steps]
    stopped = train(strategy, 2, out, *flags, "--max_steps", 6, check=False)
    assert stopped.codes == [1, 1]
    assert stopped.output.count("error: step 3 has loss nan") == 1 and "Traceback" not in stopped.output
    assert data_collator.find_damage(out / "checkpoint-2") is None
    assert not (out / "checkpoint-3").exists() and not (out / "run.json").exists()
    assert all(math.isfinite(row["loss"]) for row in history_of(out / "checkpoint-2"))


# -----------------------------------------------------------------------------------------------------------------
# Users' mistakes
# -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory, parts) -> dict:
    """A model whose weights cannot be loaded: a mistake that is found before them never touches the file."""
    folder = tmp_path_factory.mktemp("broken")
    model = save_tiny_model(folder / "model")
    (model / "model.safetensors").write_bytes(b"not weights")
    texts = {"stage1": '{"zero_optimization": {"stage": 1}}', "no_stage": "{}", "list": "[]", "torn": '{"zero_opt'}
    texts["spelled"] = '{"zero_optimization": {"stage": "3"}}'
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    packed_row = {"input_ids": [5, 6, 5, 6], "labels": [5, 6, 5, 6], "position_ids": [0, 1, 0, 1]}
    packed = save_rows([packed_row], folder / "packed")
    configs = {name: folder / f"{name}.json" for name in texts}
    return {"model": model, "rows": parts["rows"], "packed": packed, "missing": folder / "none", "f": folder} | configs


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
    ([LORA], "--peft_mode adapter --lora_rank -4", {}, "--peft_mode adapter: | --lora_rank -4:"),
    ([LORA], "--lora_target_modules q_proj,query", {}, "--lora_target_modules query | matches no layer"),
    ([LORA], "--peft_mode prompt --mapping_hidden_dim 64", {}, "--mapping_hidden_dim 64: | no MLP"),
    ([LORA], PREFIX, {}, "--peft_mode prefix: | PREFIX_TUNING does not work with gradient checkpointing"),
    ([ZERO], f"--lora_used True {PREFIX}", {}, "--peft_mode prefix: | does not work with gradient checkpointing"),
    ([LORA], "--peft_mode prefix --dataset_path {packed}", {}, "--peft_mode prefix: | --packing False"),
    ([LORA], "--peft_mode ptuning --eval_dataset_path {packed}", {}, "--peft_mode ptuning: | --packing False"),
    ([ZERO], "--lora_used True --peft_mode prompt --dataset_path {packed}", {}, "--peft_mode prompt: | --packing"),
    (ALL, "--model_path {missing}", {}, "--model_path {missing}: | no such folder | quickstart.sh"),
    (ALL, "", TWO, "--use_cpu False: | 2 processes need as many GPUs"),
    (ALL, "--resume_from_checkpoint {missing}", {}, "--resume_from_checkpoint {missing}: | no complete.json"),
    (ALL, "--bf16 yes --save_steps 0", TWO, "--bf16 yes: | --save_steps 0: | 2 processes need"),
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if not environment else 1)
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
def test_a_mistake_under_two_processes_is_one_message_without_a_traceback(strategy, broken, train, tmp_path):
    flags = ["--model_path", broken["model"], "--save_steps", 0, "--resume_from_checkpoint", broken["missing"]]
    flags += ["--seed", -1]
    stopped = train(strategy, 2, tmp_path / "out", *flags, check=False)
    assert stopped.codes == [1, 1] and "Traceback" not in stopped.output
    assert stopped.output.count("error: ") == 1
    assert "--save_steps 0" in stopped.output and "--seed -1" in stopped.output
    assert not (tmp_path / "out").exists()
