"""The parts of benchmarks/gpu.py, each in a process of its own, which may be ended at any time. Not started by hand.

    python benchmarks/gpu_parts.py kernels outputs/gpu 45 False       # part, folder, seconds, whether it is a dry run

Each result is one JSON line at the end of <folder>/results.jsonl, written as soon as it is known.
"""

import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WARMUP = 3  # optimizer steps before those that are measured
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "trl", "liger-kernel")


class Part:
    """What a part works with: its folder, its time, and where its results go."""

    def __init__(self, name: str, folder: Path, seconds: float, is_dry: bool):
        self.name = name
        self.folder = folder
        self.is_dry = is_dry
        self.seconds = seconds
        self.began = time.perf_counter()
        self.device = "cuda"
        if is_dry:
            self.device = "cpu"

    def seconds_left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def write(self, **facts) -> None:
        line = {"part": self.name, **facts}
        with open(self.folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self.name}: {short(facts)}", flush=True)

    def make_work_folder(self) -> Path:
        """For models and runs; gpu.py deletes it, also when this process was ended."""
        folder = self.folder / "work"
        folder.mkdir()
        return folder

    def read_machine(self) -> dict:
        """What the first part has written; nothing if it was not run."""
        for line in (self.folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if "product_flops" in result:
                return result
        return {}

    def wait(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()

    def seconds_of(self, action, repeats: int = 1) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            action()
        self.wait()
        return (time.perf_counter() - started) / repeats


def short(facts: dict) -> str:
    words = []
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        words.append(f"{name}={str(value)[:200]}")
    return " ".join(words)


# -------------------------------------------------------------------------------------------------------------------
# The machine
# -------------------------------------------------------------------------------------------------------------------


def machine(part: Part) -> None:
    """Rates of products and copies, the driver, and the versions."""
    size = 8192
    num_numbers = 2**30
    if part.is_dry:
        size = 256
        num_numbers = 2**20
    matrix = torch.randn(size, size, device=part.device, dtype=torch.bfloat16)
    source = torch.zeros(num_numbers, device=part.device)
    target = torch.empty_like(source)
    for _ in range(3):  # the first product chooses a kernel, and the clock rises
        matrix @ matrix
        target.copy_(source)
    product_seconds = part.seconds_of(lambda: matrix @ matrix, 20)
    copy_seconds = part.seconds_of(lambda: target.copy_(source), 5)
    facts = {"name": "CPU", "memory_bytes": 0, "driver": "none"}
    if not part.is_dry:
        properties = torch.cuda.get_device_properties(0)
        capability = ".".join(str(number) for number in torch.cuda.get_device_capability())
        facts = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "driver": ask_nvidia_smi("driver_version"),
            "power_limit": ask_nvidia_smi("power.limit"),
            "capability": capability,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    part.write(
        **facts,
        product_size=size,
        product_flops=2 * size**3 / product_seconds,
        copy_bytes_per_second=2 * source.nbytes / copy_seconds,
        python=".".join(str(number) for number in sys.version_info[:3]),
        cores=os.cpu_count(),
        versions=installed_versions(),
    )


def ask_nvidia_smi(field: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return (lines or ["unknown"])[0]


def installed_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# -------------------------------------------------------------------------------------------------------------------
# Kernels of attention
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class AttentionShape:
    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_documents: int
    shortest: int
    longest: int
    num_tokens: int = 0  # of all documents together, above 0

    def draw_lengths(self) -> list[int]:
        return draw_lengths(self.num_documents, self.shortest, self.longest, self.num_tokens)

    def draw_states(self, lengths: list[int], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """Query, key and value, each [1, heads, tokens, size of a head]."""
        states = []
        for num_heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads):
            shape = (1, num_heads, sum(lengths), self.head_size)
            states.append(torch.randn(shape, device=device, dtype=dtype, requires_grad=True))
        return states


ATTENTION_SHAPES = [
    AttentionShape("8B, 50 short documents in 4096 tokens", 32, 8, 128, 50, 40, 124, 4096),
    AttentionShape("8B, one document of 4096 tokens", 32, 8, 128, 1, 4096, 4096, 4096),
    AttentionShape("7B, 8 documents of 300 to 512 tokens", 32, 32, 128, 8, 300, 512),
    AttentionShape("7B, 2 documents of 300 to 512 tokens", 32, 32, 128, 2, 300, 512),
]
CUDNN_SHAPE = ATTENTION_SHAPES[-1]
DRY_ATTENTION_SHAPE = AttentionShape("dry, 5 documents", 4, 2, 16, 5, 4, 20)


def draw_lengths(number: int, shortest: int, longest: int, total: int = 0) -> list[int]:
    """Lengths of documents; with a total the last ones give or take what is missing."""
    lengths = [random.randint(shortest, longest) for _ in range(number)]
    place = 0
    while total and sum(lengths) != total:
        step = 1
        if sum(lengths) > total:
            step = -1
        if shortest <= lengths[place] + step <= longest:
            lengths[place] += step
        place = (place + 1) % number
    return lengths


def by_varlen(query, key, value, lengths: list[int]) -> torch.Tensor:
    """The toolkit's way on a GPU."""
    import data_collator

    borders = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    scale = query.shape[-1] ** -0.5
    longest = max(lengths)
    return data_collator.varlen_attention(query, key, value, scale, (borders, borders), (longest, longest), None)


def by_loop(query, key, value, lengths: list[int]) -> torch.Tensor:
    """The toolkit's way on a CPU, in float32 and on older GPUs."""
    import data_collator

    borders = torch.tensor([0, *lengths]).cumsum(0).to(query.device, torch.int32)
    scale = query.shape[-1] ** -0.5
    return data_collator.one_document_after_the_other(query, key, value, scale, 0.0, (borders, borders), None)


def by_mask(query, key, value, lengths: list[int]) -> torch.Tensor:
    """transformers' way with sdpa: one call, and a mask over the whole row."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    mask = (number[None] == number[:, None]).tril()
    num_groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(num_groups, 1)
    value = value.repeat_interleave(num_groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.transpose(1, 2)


def kernels(part: Part) -> None:
    """Forward and backward of one layer's attention: which kernel is how fast, and how far from float32."""
    if not part.is_dry:
        torch.backends.cuda.enable_cudnn_sdp(False)
    ways = [("varlen", by_varlen), ("loop", by_loop), ("mask over the row", by_mask)]
    shapes = ATTENTION_SHAPES
    if part.is_dry:
        ways.pop(0)  # it needs a GPU
        shapes = [DRY_ATTENTION_SHAPE]
    for shape in shapes:
        compare_attention(part, shape, ways)
    # What the scripts switch off; last, because a plan for each length may take all the time.
    if not part.is_dry:
        torch.backends.cuda.enable_cudnn_sdp(True)
        compare_attention(part, CUDNN_SHAPE, [("loop, cuDNN allowed", by_loop)])


def compare_attention(part: Part, shape: AttentionShape, ways: list) -> None:
    """The ways, (name, function), on the same documents; a way that fails does not keep the others from being run."""
    fixed = shape.draw_lengths()
    exact = shape.draw_states(fixed, part.device, torch.float32)
    expected = run_attention(by_loop, fixed, exact)
    for name, way in ways:
        facts = {"problem": "no time left"}
        if part.seconds_left() > 2:
            try:
                facts = measure_attention(part, shape, way, fixed, exact, expected)
            except Exception as problem:
                facts = {"problem": repr(problem)[:300]}
        part.write(shape=shape.name, way=name, **facts)


def run_attention(way, lengths: list[int], states: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    output = way(*states, lengths)
    gradients = torch.autograd.grad(output, states, torch.ones_like(output))
    return [output.detach(), *gradients]


def measure_attention(part: Part, shape: AttentionShape, way, fixed: list[int], exact, expected) -> dict:
    """Milliseconds of the first call, of the same lengths again, and of other lengths, as training has them."""
    states = [state.detach().bfloat16().requires_grad_() for state in exact]
    first = part.seconds_of(lambda: run_attention(way, fixed, states))
    same = part.seconds_of(lambda: run_attention(way, fixed, states), 10)
    fresh = []
    for _ in range(4):
        lengths = shape.draw_lengths()
        others = shape.draw_states(lengths, part.device, torch.bfloat16)
        fresh.append(part.seconds_of(lambda lengths=lengths, others=others: run_attention(way, lengths, others)))
        if sum(fresh) > 4:  # a plan for each length takes seconds
            break
    errors = []
    for found, wanted in zip(run_attention(way, fixed, states), expected, strict=True):
        errors.append(((found.float() - wanted).norm() / wanted.norm()).item())
    return {
        "tokens": sum(fixed),
        "first_ms": first * 1e3,
        "same_ms": same * 1e3,
        "fresh_ms": statistics.median(fresh) * 1e3,
        "error": max(errors),
    }


# -------------------------------------------------------------------------------------------------------------------
# Models and rows
# -------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False},
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "small": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "dry": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
}  # fmt: skip


def save_shape(folder: Path, shape: str) -> Path:
    """A model folder without weights: the configuration, a tokenizer of words, and a file of the weights' kind."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    if folder.is_dir():
        return folder
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder)
    save_file({}, folder / "model.safetensors")  # a name for the scripts' checks; the weights are made at random
    return folder


def save_weights(folder: Path) -> None:
    """Random weights in float32, large enough that a lost row or a leak between documents shows in the loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.05
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def save_rows(folder: Path, rows: list[list[int]], vocab_size: int) -> Path:
    """A tokenized set as data_sample/tokenize_dataset.py writes one; a row is a list of its documents' lengths.

    Small ids are more frequent, so that there is something to learn. With several documents a row is a packed one.
    """
    from datasets import Dataset, Features, Sequence, Value

    if folder.is_dir():
        return folder
    generator = random.Random(0)
    columns = {"input_ids": [], "labels": [], "position_ids": []}
    is_packed = max(len(lengths) for lengths in rows) > 1
    for lengths in rows:
        ids = [3 + int((vocab_size - 3) * generator.random() ** 4) for _ in range(sum(lengths))]
        columns["input_ids"].append(ids)
        columns["labels"].append(ids)
        positions = []
        for length in lengths:
            positions += range(length)
        columns["position_ids"].append(positions)
    if not is_packed:
        del columns["position_ids"]
    features = Features({name: Sequence(Value("int32")) for name in columns})
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    (folder / "ledger.json").write_text(json.dumps({"sha256": folder.name}))
    return folder


# -------------------------------------------------------------------------------------------------------------------
# Every script, four steps
# -------------------------------------------------------------------------------------------------------------------

FULL = "finetune_pp.py"
LORA = "finetune_pp_peft.py --lora_dropout 0"
FSDP = "finetune_pp_peft_trainer.py"
FSDP_LORA = "finetune_pp_peft_trainer_lora.py --lora_dropout 0"
ZERO = "finetune_pp_peft_trainer_deepspeed.py --lora_dropout 0 --deepspeed ds_configs/"
PIPELINE = "finetune_pp_1f1b.py --lora_dropout 0 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
PROMPTS = ("prefix", "ptuning", "prompt")
# Four steps of eight rows. The rate is high enough that four steps change the loss.
COMMON = (
    "--per_device_train_batch_size 8 --max_steps 4 --save_steps 2 --report_to none --learning_rate 1e-3 "
    "--lr_scheduler_type constant --warmup_steps 0"
)
FLOAT32_TOLERANCE = 1e-4
BF16_TOLERANCE = 1e-2  # 8 bits of mantissa in every activation
NUM_AT_ONCE = 8  # scripts, on so many pairs of cores


@dataclass
class Trial:
    """A script and what its losses are to agree with."""

    name: str
    command: str
    reference: str  # the name of the trial on the CPU
    tolerance: float | None = None  # None: it is that trial, or its losses are another run's
    is_resumed: bool = False


def list_trials(is_dry: bool) -> list[Trial]:
    """First the references, on the CPU in float32; the rest in the order of interest."""
    on_cpu = " --use_cpu True --bf16 False"
    if is_dry:
        return [
            Trial("CPU LoRA", LORA + on_cpu, "CPU LoRA"),
            Trial("LoRA, float32", LORA + on_cpu, "CPU LoRA", FLOAT32_TOLERANCE, True),
        ]
    trials = [Trial("CPU full", FULL + on_cpu, "CPU full"), Trial("CPU LoRA", LORA + on_cpu, "CPU LoRA")]
    loops = [("full", FULL), ("LoRA", LORA)]
    sharded = [("FSDP2 full", FSDP), ("FSDP2 LoRA", FSDP_LORA)]
    more = [
        ("ZeRO-2 full", f"{ZERO}zero2.json --lora_used False"),
        ("ZeRO-3 full", f"{ZERO}zero3.json --lora_used False"),
        ("ZeRO-3 LoRA", f"{ZERO}zero3.json --lora_used True"),
        ("1F1B full", f"{PIPELINE} --lora_used False"),
        ("1F1B LoRA", f"{PIPELINE} --lora_used True"),
    ]
    for name, command in loops + sharded + more:
        trials.append(Trial(f"{name}, bf16", command, reference_of(name), BF16_TOLERANCE, True))
    for name, command in loops + sharded:
        trials.append(Trial(f"{name}, float32", f"{command} --bf16 False", reference_of(name), FLOAT32_TOLERANCE))
    for name, command in loops + sharded:
        command += " --torch_compile True"
        trials.append(Trial(f"{name}, bf16, compiled", command, reference_of(name), BF16_TOLERANCE))
    if importlib.util.find_spec("bitsandbytes"):  # 4 bits are another model
        trials.append(Trial("QLoRA", f"{FSDP_LORA} --load_in_4bit True", "CPU LoRA", None, True))
    for name, command in loops + sharded:
        command += " --gradient_checkpointing True"
        trials.append(Trial(f"{name}, bf16, checkpointing", command, reference_of(name), BF16_TOLERANCE))
    for name, command in loops:
        command += " --padding_free False"
        trials.append(Trial(f"{name}, bf16, padded", command, reference_of(name), BF16_TOLERANCE))
    for mode in PROMPTS:
        command = f"finetune_pp_peft.py --peft_mode {mode}"
        trials.append(Trial(f"CPU {mode}", command + on_cpu, f"CPU {mode}"))
        trials.append(Trial(f"{mode}, bf16", command, f"CPU {mode}", BF16_TOLERANCE, True))
    return trials


def reference_of(name: str) -> str:
    if "LoRA" in name:
        return "CPU LoRA"
    return "CPU full"


def scripts(part: Part) -> None:
    """Each script trains four steps; what it shares with another strategy must give that one's losses."""
    shape = "small"
    longest = 200
    if part.is_dry:
        shape = "dry"
        longest = 24
    folder = part.make_work_folder()
    model = save_shape(folder / "model", shape)
    save_weights(model)
    lengths = [[length] for length in draw_lengths(32, longest // 8, longest)]
    data = save_rows(folder / "rows", lengths, SHAPES[shape]["vocab_size"])
    flags = [*COMMON.split(), "--model_path", str(model), "--dataset_path", str(data)]
    references = {}
    waiting = []
    num_pairs = max(2, os.cpu_count() // 2)
    with ThreadPoolExecutor(min(NUM_AT_ONCE, num_pairs)) as pool:
        trials = {pool.submit(try_script, part, trial, flags, folder): trial for trial in list_trials(part.is_dry)}
        for future in as_completed(trials):
            trial = trials[future]
            result = future.result()
            if trial.name == trial.reference:
                references[trial.name] = result.get("losses")
            waiting.append((trial, result))
            waiting = write_judged(part, waiting, references)


def write_judged(part: Part, waiting: list, references: dict) -> list:
    """Writes the results whose reference is known; returns those that wait for it."""
    still_waiting = []
    for trial, result in waiting:
        if trial.reference in references:
            part.write(name=trial.name, **judge(trial, result, references[trial.reference]))
        else:
            still_waiting.append((trial, result))
    return still_waiting


def try_script(part: Part, trial: Trial, flags: list[str], folder: Path) -> dict:
    """Its losses; with `is_resumed` also those of a run that goes on from its second step."""
    if part.seconds_left() < 15:
        return {"problem": "no time left"}
    started = time.perf_counter()
    script, *own = trial.command.split()
    output = folder / "".join(letter for letter in trial.name if letter.isalnum())
    command = [sys.executable, script, *flags, *own, "--output_dir", str(output)]  # own flags win: they come last
    problem = run_to_the_end(part, command)
    if problem:
        return {"problem": problem}
    result = {"losses": read_losses(output)}
    if trial.is_resumed and part.seconds_left() > 15:
        shutil.rmtree(output / "checkpoint-4")
        (output / "run.json").unlink()
        problem = run_to_the_end(part, [*command, "--resume_from_checkpoint", "True"])
        if problem:
            return {"problem": f"resuming: {problem}"}
        result["resumed_losses"] = read_losses(output)
    shutil.rmtree(output)
    result["seconds"] = time.perf_counter() - started
    return result


def run_to_the_end(part: Part, command: list[str]) -> str | None:
    """None, or what went wrong."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        completed = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(5, part.seconds_left()),
        )
    except subprocess.TimeoutExpired:
        return "no time left"
    if completed.returncode != 0:
        return (completed.stdout + completed.stderr)[-800:]
    return None


def read_losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history]


def largest_difference(losses: list[float], wanted: list[float]) -> float:
    """Relative, over all steps."""
    if len(losses) != len(wanted):
        return float("inf")
    return max(abs(loss - other) / abs(other) for loss, other in zip(losses, wanted, strict=True))


def judge(trial: Trial, result: dict, reference: list[float] | None) -> dict:
    """What is written about a trial: its losses, how far they are from the reference's, and whether that is good."""
    facts = dict(result)
    resumed = facts.pop("resumed_losses", None)
    if facts.get("problem") == "no time left":
        return facts | {"good": None}
    if "problem" in facts:
        return facts | {"good": False}
    is_good = True
    if trial.name != trial.reference:
        facts["difference"] = float("inf")
        if reference is not None:
            facts["difference"] = largest_difference(facts["losses"], reference)
        facts["tolerance"] = trial.tolerance
        is_good = trial.tolerance is None or facts["difference"] <= trial.tolerance
    if resumed is not None:
        facts["resumed_difference"] = largest_difference(resumed, facts["losses"])
        is_good = is_good and facts["resumed_difference"] <= BF16_TOLERANCE
    return facts | {"good": is_good}


# -------------------------------------------------------------------------------------------------------------------
# Speed and memory
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training to measure: rows of one forward, which is an optimizer step."""

    name: str
    shape: str
    strategy: str  # by the name that tools/plan.py has for it
    rows: list[list[int]]  # lengths of the documents of each row
    flags: str = ""
    system: str = "ours"
    has_liger: bool = False
    seconds: float = 3.0
    is_profiled: bool = False


SCRIPTS = {
    "pp": "finetune_pp.py",
    "pp_peft": "finetune_pp_peft.py",
    "FSDP": "finetune_pp_peft_trainer.py",
    "QLoRA": "finetune_pp_peft_trainer_lora.py",
}


def list_runs(is_dry: bool, memory_bytes: int) -> list[Run]:
    """In the order of interest: a part that has no time left leaves out the last ones."""
    random.seed(0)
    short = draw_lengths(50, 40, 124, 4096)
    rank16 = "--lora_rank 16 --lora_alpha 32"
    if is_dry:
        return [Run("dry LoRA, short documents in 2 rows", "dry", "pp_peft", [[5, 9, 2], [7, 9]])]
    runs = [
        Run("7B LoRA, 8 rows of 512", "7B", "pp_peft", [[512]] * 8),
        Run("8B LoRA r16, one row of 4096", "8B", "pp_peft", [[4096]], rank16),
        Run("8B LoRA r16, 50 short documents in 4096", "8B", "pp_peft", [short], rank16),
        Run("1B full FSDP2, 8 rows of 512", "1B", "FSDP", [[512]] * 8),
        Run("8B LoRA r16, one row of 4096, compiled, no dropout", "8B", "pp_peft", [[4096]],
            f"{rank16} --torch_compile True --lora_dropout 0"),
        Run("7B LoRA, 8 rows of 512, compiled, no dropout", "7B", "pp_peft", [[512]] * 8,
            "--torch_compile True --lora_dropout 0"),
        Run("1B full FSDP2, 8 rows of 512, compiled", "1B", "FSDP", [[512]] * 8, "--torch_compile True"),
        Run("7B LoRA, 16 rows of 512, checkpointing", "7B", "pp_peft", [[512]] * 16, "--gradient_checkpointing True"),
        Run("7B QLoRA, 8 rows of 512", "7B", "QLoRA", [[512]] * 8, "--load_in_4bit True"),
        Run("8B LoRA r16, 2 rows of 2048", "8B", "pp_peft", [[2048]] * 2, rank16),
        Run("1B full, plain loop, 8 rows of 512", "1B", "pp", [[512]] * 8),
        Run("7B LoRA, 8 rows of 512, no dropout", "7B", "pp_peft", [[512]] * 8, "--lora_dropout 0"),
        Run("1B LoRA, 8 rows of 512", "1B", "pp_peft", [[512]] * 8),
    ]  # fmt: skip
    if memory_bytes > 125e9:  # 16 bytes a parameter, and the activations
        runs.insert(6, Run("7B full FSDP2, 4 rows of 512", "7B", "FSDP", [[512]] * 4))
    if not importlib.util.find_spec("bitsandbytes"):
        runs = [run for run in runs if run.strategy != "QLoRA"]
    return runs


class Training:
    """A process of gpu_training.py that has imported what it needs, and waits for the GPU."""

    def __init__(self, part: Part, run: Run, folder: Path):
        self.run = run
        self.log = folder / f"{time.monotonic_ns()}.json"
        job = make_job(part, run, folder) | {"log": str(self.log)}
        path = self.log.with_suffix(".job")
        path.write_text(json.dumps(job))
        environment = {"OMP_NUM_THREADS": "4", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as in scripts/*.sh
        if part.is_dry:
            environment["OMP_NUM_THREADS"] = "1"
        self.output = open(self.log.with_suffix(".txt"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "gpu_training.py"), str(path)],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, seconds: float) -> dict:
        """Lets it go on; its results, or the problem."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            self.process.wait(timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            return {"problem": "no time left"}
        except BrokenPipeError:  # it has failed while it imported
            self.process.wait()
        if self.log.is_file():
            return json.loads(self.log.read_text())
        self.output.seek(0)
        return {"problem": self.output.read()[-800:] or f"ended with {self.process.returncode}"}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def make_job(part: Part, run: Run, folder: Path) -> dict:
    """What gpu_training.py reads."""
    model = folder / run.shape
    num_rows = len(run.rows)
    # The same lengths again and again: what is measured is a step, and not the luck of its rows.
    lengths = run.rows * (64 // num_rows)
    words = "".join(letter for letter in str(run.rows) if letter.isdecimal())[:60]
    vocab_size = SHAPES[run.shape]["vocab_size"]
    data = save_rows(folder / f"rows-{vocab_size}-{num_rows}-{words}", lengths, vocab_size)
    output = folder / f"output-{time.monotonic_ns()}"
    flags = ["--model_path", str(model), "--dataset_path", str(data), "--output_dir", str(output)]
    flags += ["--per_device_train_batch_size", str(num_rows), "--max_steps", "1000", "--save_steps", "1000"]
    flags += ["--report_to", "none", *run.flags.split()]
    if part.is_dry:
        flags += ["--use_cpu", "True", "--bf16", "False"]
    return {
        "system": run.system,
        "script": SCRIPTS[run.strategy],
        "flags": flags,
        "model": str(model),
        "data": str(data),
        "output_dir": str(output),
        "batch_size": num_rows,
        "packed_length": sum(sum(lengths) for lengths in run.rows),
        "has_liger": run.has_liger,
        "warmup": WARMUP,
        "seconds": run.seconds,
        "is_profiled": run.is_profiled,
        "is_dry": part.is_dry,
    }


def measure_runs(part: Part, runs: list[Run]) -> None:
    """One after the other; the next one imports its libraries meanwhile."""
    folder = part.make_work_folder()
    for run in runs:
        save_shape(folder / run.shape, run.shape)
    with ThreadPoolExecutor(4) as pool:
        predictions = {run.name: pool.submit(predict, part, run, folder) for run in runs if run.system == "ours"}
        trainings = [Training(part, runs[0], folder)]
        for number, run in enumerate(runs):
            if number + 1 < len(runs):
                trainings.append(Training(part, runs[number + 1], folder))
            facts = {"problem": "no time left"}
            if part.seconds_left() > 5:
                facts = trainings[number].finish(part.seconds_left() - 2)
            if "step_seconds" in facts:
                facts |= rate_of(part, run, facts)
                if run.name in predictions:
                    facts |= predictions[run.name].result()
            part.write(name=run.name, system=run.system, shape=run.shape, **facts)
    for training in trainings:
        training.end()


def num_product_weights(shape: str) -> int:
    """Weights that every token is multiplied with: all matrices of the layers, and the output layer."""
    sizes = SHAPES[shape]
    hidden = sizes["hidden_size"]
    kv_width = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    of_a_layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * of_a_layer + sizes["vocab_size"] * hidden


def rate_of(part: Part, run: Run, facts: dict) -> dict:
    """The share of the measured product rate: 6 FLOPs a weight and token, 4 where the weights are frozen.

    Two FLOPs for the forward, two for the gradient of the input, two for that of the weight (arXiv:2001.08361, section
    2.1). Recomputed activations, attention and the adapter are not counted.
    """
    flops_per_weight = 6
    if run.strategy in ("pp_peft", "QLoRA"):
        flops_per_weight = 4
    flops = facts["tokens_per_second"] * flops_per_weight * num_product_weights(run.shape)
    result = {"flops": flops}
    measured = part.read_machine()
    if measured:
        result["share_of_products"] = flops / measured["product_flops"]
    return result


def predict(part: Part, run: Run, folder: Path) -> dict:
    """What tools/plan.py says about the run on this card."""
    lengths = [length for row in run.rows for length in row]
    command = [sys.executable, "tools/plan.py", "--json", "True", "--gpus", "1", "--batch", str(len(lengths))]
    command += ["--model", str(folder / run.shape), "--strategy", run.strategy]
    command += ["--sequence_length", str(round(statistics.mean(lengths))), "--rows", str(len(lengths))]
    command += ["--accumulation", "1", *card_flags(part)]
    words = run.flags.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    command += ["--checkpointing", options.get("--gradient_checkpointing", "False")]
    for name in ("--torch_compile", "--lora_rank"):
        if name in options:
            command += [name, options[name]]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if completed.returncode != 0:
        return {"prediction_problem": (completed.stdout + completed.stderr)[-300:]}
    way = json.loads(completed.stdout)["rows"][0]
    if "step_seconds" not in way:
        return {"prediction_problem": way["problem"]}
    return {
        "predicted_bytes": way["total_bytes"],
        "predicted_tokens_per_second": sum(lengths) / way["step_seconds"],
    }


def card_flags(part: Part) -> list[str]:
    """The card by plan.py's own name, or by what was measured."""
    measured = part.read_machine()
    name = measured.get("name", "H100")
    for word, gpu in (("H100", "h100-80g"), ("H200", "h200"), ("A100", "a100-80g"), ("CPU", "h100-80g")):
        if word in name:
            return ["--gpu", gpu]
    memory = measured["memory_bytes"] / 2**30
    flops = measured["product_flops"] / 0.75 / 1e12  # plan.py takes a described card's products at 0.75 of its peak
    bandwidth = measured["copy_bytes_per_second"] / 1e9
    return ["--gpu_memory", str(memory), "--gpu_flops", str(flops), "--gpu_bandwidth", str(bandwidth)]


def speed(part: Part) -> None:
    measure_runs(part, list_runs(part.is_dry, part.read_machine().get("memory_bytes", 0)))


def profile(part: Part) -> None:
    """Where the time of a step goes."""
    run = Run("7B LoRA, 8 rows of 512", "7B", "pp_peft", [[512]] * 8, seconds=1.0, is_profiled=True)
    if part.is_dry:
        run = Run("dry full", "dry", "pp", [[16]] * 4, seconds=0.1, is_profiled=True)
    measure_runs(part, [run])


def peers(part: Part) -> None:
    """The same rows for all: unequal lengths, as instructions have them."""
    random.seed(1)
    shape = "7B"
    rows = [[length] for length in draw_lengths(8, 128, 512)]
    if part.is_dry:
        shape = "dry"
        rows = [[5], [9], [12], [3]]
    runs = [
        Run("this toolkit", shape, "pp_peft", rows),
        Run("Trainer + PEFT", shape, "pp_peft", rows, system="trainer"),
    ]
    has_liger = importlib.util.find_spec("liger_kernel") is not None and not part.is_dry
    if has_liger:
        runs.append(Run("Trainer + PEFT + Liger", shape, "pp_peft", rows, system="trainer", has_liger=True))
    if has_liger and importlib.util.find_spec("trl"):
        runs.append(Run("TRL, packing + Liger", shape, "pp_peft", rows, system="trl", has_liger=True))
    if not part.is_dry:
        runs.append(Run("this toolkit, compiled", shape, "pp_peft", rows, "--torch_compile True"))
    for name in ("liger_kernel", "trl"):
        if not importlib.util.find_spec(name):
            part.write(name=name, problem=f"{name} is not installed, so it was not compared")
    measure_runs(part, runs)


def main() -> None:
    name, folder, seconds, is_dry = sys.argv[1:]
    part = Part(name, Path(folder), float(seconds), is_dry == "True")
    parts = {
        "machine": machine,
        "kernels": kernels,
        "scripts": scripts,
        "speed": speed,
        "profile": profile,
        "peers": peers,
    }
    random.seed(0)
    torch.manual_seed(0)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    parts[name](part)


if __name__ == "__main__":
    main()
