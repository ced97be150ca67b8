"""Compares the memory and the time of tools/plan.py with real runs of the scripts on this machine's CPU.

    python benchmarks/plan_validation.py quick     # memory of each strategy, 15 minutes
    python benchmarks/plan_validation.py full      # of each strategy, size and length, more than an hour
    python benchmarks/plan_validation.py sample    # the sample model in a plain loop and in 1F1B: time, and memory

In `quick` and `full` each strategy trains random models of three sizes, on rows of two lengths, as one and as two
processes (the pipeline as two and four). Measured is a whole step that is not the first:

states: bytes of all tensors that Python can reach when the optimizer is about to update. These are weights, gradients
and moments, because what autograd keeps is out of Python's reach. Within 10 %.
peak: the process's resident memory at its highest, less what it holds besides tensors (libraries, Python's objects,
the buffers of MKL's matrix products), which is its resident memory less the states' at that update. Within 15 %.

The sample model's must be within 10 % both, and the time of its step within 15 %.
"""

import gc
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from planning.hardware import Machine
from planning.measure import measure_cpu
from planning.memory import largest_trained_tensor, memory
from planning.models import MODELS, Model, llama
from planning.speed import speed
from planning.strategies import STRATEGIES, Setup

ROOT = Path(__file__).resolve().parent.parent
SIZES = (
    llama(640, 1728, 6, 8, 8, 8000),
    llama(768, 2048, 8, 8, 4, 8000),
    llama(1024, 2816, 6, 16, 16, 8000),
)
LENGTHS = (128, 256)
ROWS = 4  # of a forward; of the pipeline one, in as many micro-batches as two stages keep busy
MICRO_BATCHES = 4  # of the pipeline
MOST_AT_ONCE = 4  # processes: each takes up to 2 GB
ALLOWED_STATES = 0.10
ALLOWED_PEAK = 0.15
ALLOWED_PEAK_OF_SAMPLE = 0.10
ALLOWED_TIME = 0.15


# -------------------------------------------------------------------------------------------------------------------
# Inside the script's own process
# -------------------------------------------------------------------------------------------------------------------


def resident_bytes(name: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def live_bytes() -> int:
    """Bytes of all tensors' storages that Python can reach."""
    import torch

    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):
            continue
        tensors = [thing]
        if thing.is_leaf and thing.grad is not None:
            tensors.append(thing.grad)
        for tensor in tensors:
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Watch:
    """Measures the third optimizer step; when the fourth one is about to update, writes what it found and ends the run.

    What would follow is saving weights and checkpoints, gigabytes for all cases together.
    """

    def __init__(self, output: str):
        self.output = output
        self.step = 1
        self.was_updated = False
        self.live = 0
        self.besides = 0

    def before_forward(self, module, inputs) -> None:
        import torch

        if not torch.is_grad_enabled() or not self.was_updated:
            return
        self.was_updated = False
        self.step += 1
        if self.step == 3:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here

    def before_update(self, *_) -> None:
        self.was_updated = True
        if self.step == 3:
            live = live_bytes()
            if live > self.live:  # DeepSpeed updates each group of parameters by a call of its own
                self.live = live
                self.besides = resident_bytes("VmRSS") - live
        if self.step == 4:
            self.write()
            os._exit(0)

    def write(self) -> None:
        import torch.distributed as dist

        rank = 0
        if dist.is_initialized():
            rank = dist.get_rank()
        found = {"states": self.live, "peak": resident_bytes("VmHWM") - self.besides}
        Path(f"{self.output}.{rank}").write_text(json.dumps(found))
        if dist.is_initialized():
            dist.barrier()  # a process that ends takes the others with it, which have not written yet


def measure(output: str, script: str, flags: list[str]) -> None:
    """Runs a script of the toolkit in this process, and writes what it held as JSON, for each rank."""
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    watch = Watch(output)
    register_module_forward_pre_hook(watch.before_forward)
    register_optimizer_step_pre_hook(watch.before_update)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / script), run_name="__main__")


# -------------------------------------------------------------------------------------------------------------------
# Around it
# -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run: a strategy, its processes, and the numbers of the model's size and of the rows' length."""

    strategy: str
    processes: int
    size: int
    length: int
    checkpointing: bool

    @property
    def setup(self) -> Setup:
        rows = ROWS
        if STRATEGIES[self.strategy].preferences:
            rows = ROWS // 2  # of two documents each
        accumulation = 1
        if STRATEGIES[self.strategy].kind == "1f1b":
            rows = 1
            accumulation = MICRO_BATCHES
        return Setup(
            gpus=self.processes,
            rows=rows,
            accumulation=accumulation,
            sequence_length=LENGTHS[self.length],
            checkpointing=self.checkpointing,
            compute_bytes=4,
            on_cpu=True,
        )


def list_cases(extent: str) -> list[Case]:
    """full: every size and every length, checkpointing taking turns; quick: one size and one length of each strategy.

    In `quick`, runs over several processes checkpoint: what they gather would hide behind a step's activations.
    """
    pairs = []
    for name, strategy in STRATEGIES.items():
        if strategy.kind == "pp":
            pairs.append((name, 1))
        elif strategy.kind == "1f1b":
            pairs += [(name, 2), (name, 4)]
        elif not strategy.four_bit:
            pairs += [(name, 1), (name, 2)]
    cases = []
    for number, (name, processes) in enumerate(pairs):
        if extent == "quick":
            length = number // 2 % 2  # of two neighbours one has one process, the other several
            cases.append(Case(name, processes, number % 3, length, checkpointing=processes > 1))
            continue
        for size in range(len(SIZES)):
            for length in range(len(LENGTHS)):
                cases.append(Case(name, processes, size, length, (size + length) % 2 == 1))
    return cases


def save_parts(folder: Path, model: Model, sequence_length: int) -> None:
    """A random model of this shape, a tokenizer for it, and rows of equal length in which each token is a target.

    And pairs, whose documents have the same length and a prompt of one token.
    """
    import torch
    from datasets import Dataset, Features, Sequence, Value
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not (folder / "model").is_dir():
        config = LlamaConfig(
            hidden_size=model.hidden,
            intermediate_size=model.intermediate,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            vocab_size=model.vocab,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        vocabulary = {f"w{number}": number for number in range(model.vocab)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / "model")
    rows = torch.randint(3, model.vocab, (64, sequence_length)).tolist()
    features = Features({name: Sequence(Value("int32")) for name in ("input_ids", "labels")})
    path = folder / f"rows-{sequence_length}"
    Dataset.from_dict({"input_ids": rows, "labels": rows}, features=features).save_to_disk(path)
    (path / "ledger.json").write_text(json.dumps({"sha256": str(sequence_length)}))
    answers = [ids[1:] for ids in rows]
    pairs = {
        "prompt_ids": [ids[:1] for ids in rows],
        "chosen_ids": answers,
        "chosen_labels": answers,
        "rejected_ids": answers[::-1],
        "rejected_labels": answers[::-1],
    }
    features = Features({name: Sequence(Value("int32")) for name in pairs})
    path = folder / f"pairs-{sequence_length}"
    Dataset.from_dict(pairs, features=features).save_to_disk(path)
    (path / "ledger.json").write_text(json.dumps({"sha256": str(sequence_length)}))


def rows_of(strategy: str, folder: Path, sequence_length: int) -> Path:
    """The rows that save_parts has written for a strategy."""
    kind = "rows"
    if STRATEGIES[strategy].preferences:
        kind = "pairs"
    return folder / f"{kind}-{sequence_length}"


def script_of(strategy: str) -> str:
    return STRATEGIES[strategy].launcher.removesuffix(".sh") + ".py"


def run_script(output: Path, case: Case, flags: list, watched: bool) -> None:
    """Runs the strategy's script.

    Raises:
        RuntimeError: it failed.
    """
    setup = case.setup
    command = [sys.executable]
    if case.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", case.processes]
    if watched:
        command += [__file__, "--measure", output]
    command += [script_of(case.strategy), *STRATEGIES[case.strategy].flags.split()]
    command += ["--per_device_train_batch_size", setup.rows, "--gradient_accumulation_steps", setup.accumulation]
    command += ["--gradient_checkpointing", setup.checkpointing, "--output_dir", f"{output}.run"]
    command += ["--use_cpu", True, "--bf16", False, *flags]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    # Freed memory goes back to the system at once, so that the resident memory is what is held.
    if watched:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    words = [str(word) for word in command]
    completed = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if completed.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{completed.stdout[-2000:]}{completed.stderr[-4000:]}")


def run_case(folder: Path, case: Case) -> tuple[dict, dict]:
    """(measured, predicted) bytes of states and peak, of the process that has most."""
    parts = folder / str(case.size)
    rows = rows_of(case.strategy, parts, LENGTHS[case.length])
    return compare_memory(folder, case, SIZES[case.size], parts / "model", rows)


def compare_memory(folder: Path, case: Case, model: Model, model_path: Path, rows: Path) -> tuple[dict, dict]:
    """The same for any model."""
    strategy = STRATEGIES[case.strategy]
    output = folder / f"{case.strategy}-{case.processes}-{case.size}-{case.length}-{case.checkpointing}"
    flags = ["--model_path", model_path, "--dataset_path", rows, "--max_steps", 4, "--report_to", "none"]
    run_script(output, case, flags, watched=True)
    shutil.rmtree(f"{output}.run")
    found = []
    for rank in range(case.processes):
        found.append(json.loads(Path(f"{output}.{rank}").read_text()))
    measured = {name: max(one[name] for one in found) for name in ("states", "peak")}
    formula = memory(model, strategy, case.setup)
    predicted = {"states": formula.states + formula.offloaded, "peak": formula.total + formula.offloaded}
    if strategy.offload and strategy.kind == "zero2":
        # A CPU process has in itself what it offloads, and the buffer on the GPU's side.
        predicted["states"] += case.setup.compute_bytes * largest_trained_tensor(model, strategy, case.setup)
    return measured, predicted


def run_cases(folder: Path, cases: list[Case]) -> Iterator[tuple[Case, dict, dict]]:
    """Yields each case with what run_case returns; those of one process run side by side."""
    cores = min(os.cpu_count(), MOST_AT_ONCE)
    for size in range(len(SIZES)):
        for sequence_length in LENGTHS:
            save_parts(folder / str(size), SIZES[size], sequence_length)
    for processes in (1, 2, 4):
        chosen = [case for case in cases if case.processes == processes]
        with ThreadPoolExecutor(max(1, cores // processes)) as pool:
            results = pool.map(lambda case: run_case(folder, case), chosen)
            for case, (measured, predicted) in zip(chosen, results, strict=True):
                yield case, measured, predicted


def validate(extent: str) -> bool:
    """Prints every case with its errors; returns whether all are within their limits."""
    print(f"{'strategy':20}{'processes':>10}{'parameters':>12}{'tokens':>8}{'ckpt':>6}{'states MiB':>12}{'formula':>9}"
          f"{'error':>8}{'peak MiB':>10}{'formula':>9}{'error':>8}")  # fmt: skip
    all_within = True
    with tempfile.TemporaryDirectory() as folder:
        for case, measured, predicted in run_cases(Path(folder), list_cases(extent)):
            states_error = predicted["states"] / measured["states"] - 1
            peak_error = predicted["peak"] / measured["peak"] - 1
            is_within = abs(states_error) <= ALLOWED_STATES and abs(peak_error) <= ALLOWED_PEAK
            all_within = all_within and is_within
            checkpointing = "no"
            if case.checkpointing:
                checkpointing = "yes"
            line = f"{case.strategy:20}{case.processes:>10}{SIZES[case.size].params / 1e6:>11.1f}M"
            line += f"{case.setup.tokens:>8}{checkpointing:>6}"
            line += f"{measured['states'] / 2**20:>12.0f}{predicted['states'] / 2**20:>9.0f}{states_error:>+8.1%}"
            line += f"{measured['peak'] / 2**20:>10.0f}{predicted['peak'] / 2**20:>9.0f}{peak_error:>+8.1%}"
            if not is_within:
                line += "  <"
            print(line, flush=True)
    print("states: weights, gradients, optimizer (within 10 %); peak: resident memory without what is no tensor (15 %)")
    return all_within


# -------------------------------------------------------------------------------------------------------------------
# The sample model
# -------------------------------------------------------------------------------------------------------------------


def step_seconds(folder: Path, case: Case, model_path: Path, rows: Path) -> float:
    """The median of the steps behind the first two, by the clock of TensorBoard's file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = folder / f"time-{case.strategy}-{case.processes}"
    flags = ["--model_path", model_path, "--dataset_path", rows, "--max_steps", 8, "--save_steps", 1000]
    run_script(output, case, flags, watched=False)
    events = EventAccumulator(f"{output}.run/runs").Reload().Scalars("train/loss")
    times = [event.wall_time for event in events]
    return statistics.median(times[number] - times[number - 1] for number in range(2, len(times)))


def compare_time(folder: Path, case: Case, model: Model, model_path: Path, rows: Path) -> tuple[float, float]:
    """(measured, predicted) seconds of a step."""
    before = measure_cpu(model, case.processes, bf16=False)
    measured = step_seconds(folder, case, model_path, rows)
    after = measure_cpu(model, case.processes, bf16=False)
    predicted = 0.0
    for cpu in (before, after):  # the machine may do other things at one of both times
        machine = Machine(cpu, gpus=case.processes, cores=os.cpu_count())
        predicted += speed(model, STRATEGIES[case.strategy], case.setup, machine).step_seconds / 2
    return measured, predicted


def validate_sample() -> bool:
    """Prints time and memory of a plain loop, and of 1F1B over two and four stages; returns whether all are right."""
    model = MODELS["smollm2-135m"]
    model_path = ROOT / "models" / "SmolLM2-135M-Instruct"
    all_within = True
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'strategy':12}{'processes':>10}{'s a step':>10}{'plan':>8}{'error':>8}"
          f"{'states MiB':>12}{'formula':>9}{'error':>8}{'peak MiB':>10}{'formula':>9}{'error':>8}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_parts(folder / "parts", SIZES[0], LENGTHS[1])
        for strategy, processes in (("pp", 1), ("pp_peft", 1), ("1F1B", 2), ("1F1B", 4), ("1F1B+LoRA", 2)):
            case = Case(strategy, processes, 0, 1, False)
            rows = rows_of(strategy, folder / "parts", LENGTHS[1])
            seconds, planned = compare_time(folder, case, model, model_path, rows)
            measured, predicted = compare_memory(folder, case, model, model_path, rows)
            time_error = planned / seconds - 1
            states_error = predicted["states"] / measured["states"] - 1
            peak_error = predicted["peak"] / measured["peak"] - 1
            print(f"{strategy:12}{processes:>10}{seconds:>10.2f}{planned:>8.2f}{time_error:>+8.1%}"
                  f"{measured['states'] / 2**20:>12.0f}{predicted['states'] / 2**20:>9.0f}{states_error:>+8.1%}"
                  f"{measured['peak'] / 2**20:>10.0f}{predicted['peak'] / 2**20:>9.0f}{peak_error:>+8.1%}",
                  flush=True)  # fmt: skip
            all_within = all_within and abs(time_error) <= ALLOWED_TIME
            all_within = all_within and max(abs(states_error), abs(peak_error)) <= ALLOWED_PEAK_OF_SAMPLE
    return all_within


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:  # a process of a run
        return measure(sys.argv[2], sys.argv[3], sys.argv[4:])
    if sys.argv[1:] == ["sample"]:
        is_good = validate_sample()
    elif sys.argv[1:] in (["quick"], ["full"]):
        is_good = validate(sys.argv[1])
    else:
        sys.exit("error: say quick, full or sample")
    if not is_good:
        sys.exit("error: not all within their limits")


if __name__ == "__main__":
    main()
