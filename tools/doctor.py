"""Checks this machine, and rehearses a training run before it costs anything: says whether to start.

    python tools/doctor.py
    python tools/doctor.py -- finetune_pp_peft.py --dataset_path data_sample/tokenized/triage_train
    python tools/doctor.py --num_processes 8 -- finetune_pp_peft_trainer.py --model_path models/llama-7b
    python tools/doctor.py --json machine.json          # also measures the machine, for tools/plan.py --machine

What stands behind `--` is the script and the flags of the run to come. It is started with them for three steps in a
temporary folder beside --output_dir, saved, and resumed for a fourth; then the folder is deleted. Meanwhile
tools/watch_weights.py watches every gradient and every weight.

Prints a line for each check: ok, note (it will run, but), or FAIL, with the remedy. The exit status is 1 if one failed.
"""

import importlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OK = "ok"
NOTE = "note"
FAIL = "FAIL"
DEVICES = Path("/dev")  # the driver makes nvidia0, nvidia1 ... in it
NUM_STEPS = 3  # of the rehearsal: gradients are looked at in two steps, and weights before the third


class Check(NamedTuple):
    level: str
    found: str
    remedy: str = ""


def check(is_good: bool, found: str, remedy: str, otherwise: str = FAIL) -> Check:
    """ok, or `otherwise` with the remedy."""
    if is_good:
        return Check(OK, found)
    return Check(otherwise, found, remedy)


# -------------------------------------------------------------------------------------------------------------------
# The machine
# -------------------------------------------------------------------------------------------------------------------


def check_versions() -> list[Check]:
    """Python, and the packages against requirements.txt, which names what was tested together."""
    from importlib.metadata import PackageNotFoundError, version

    python = ".".join(str(number) for number in sys.version_info[:3])
    checks = [check(sys.version_info >= (3, 11), f"Python {python}", "install Python 3.11 or newer")]
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, tested = line.partition("==")
        if not tested or name.startswith("#"):
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            level = FAIL
            if name == "deepspeed":  # only one script needs it
                level = NOTE
            checks.append(Check(level, f"{name} is missing", f"pip install {name}=={tested}"))
            continue
        if found.split("+")[0] != tested:
            remedy = f"if something fails: pip install {name}=={tested}, the tested version"
            checks.append(Check(NOTE, f"{name} {found}", remedy))
    if len(checks) == 1:
        checks.append(Check(OK, "all packages are the tested versions"))
    return checks


def list_drivers() -> list[str]:
    """The driver's version for each GPU that nvidia-smi lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    completed = subprocess.run(query, capture_output=True, text=True)
    if completed.returncode != 0:  # it prints why, and no version
        return []
    return completed.stdout.split()


def explain_driver(drivers: list[str]) -> str:
    """Why PyTorch cannot use GPUs that are there, as far as the driver tells, and what to do.

    CUDA 13 needs driver 580, CUDA 12 driver 525: https://docs.nvidia.com/deploy/cuda-compatibility
    """
    import torch

    release = torch.__version__.split("+")[0]
    older_build = f"pip install --force-reinstall torch=={release} --index-url https://download.pytorch.org/whl/cu126"
    if not drivers:
        return "nvidia-smi does not answer: install the NVIDIA driver; in a container: docker run --gpus all"
    number = int(drivers[0].split(".")[0])
    if number < 525:
        return f"driver {drivers[0]} is too old for CUDA 12: update it to 580 or newer"
    if torch.version.cuda is None:
        build = f"pip install --force-reinstall torch=={release}"
        if number < 580:
            build = older_build
        return f"this is PyTorch's build without CUDA: {build}"
    if torch.version.cuda.startswith("13") and number < 580:
        return f"driver {drivers[0]} is too old for CUDA 13: update it to 580 or newer, or {older_build}"
    return "look at CUDA_VISIBLE_DEVICES, and whether nvidia-smi shows an error or another process in exclusive mode"


def check_gpus() -> list[Check]:
    """CUDA, driver, NCCL and free memory of each GPU, or why PyTorch cannot use those that are there; bf16."""
    import torch

    drivers = list_drivers()
    num_gpus = torch.cuda.device_count()  # by the driver's own list, whether PyTorch can use them or not
    num_there = max(num_gpus, len(drivers), len(list(DEVICES.glob("nvidia[0-9]*"))))
    if num_there > 0 and not torch.cuda.is_available():
        driver = "unknown"
        if drivers:
            driver = drivers[0]
        found = f"{num_there} GPUs, driver {driver}, and PyTorch {torch.__version__} can use none"
        return [Check(FAIL, found, explain_driver(drivers))]
    if num_gpus == 0:
        found = f"no GPU: training runs on the CPU, {os.cpu_count()} cores"
        checks = [Check(NOTE, found, "fine for the sample model")]
        # The training scripts decide by the same questions, which have no public name in PyTorch.
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        checks = check_cuda(num_gpus, drivers)
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if is_fast:
        checks.append(Check(OK, "bf16 is fast here"))
    else:
        is_expected = num_gpus == 0
        checks.append(check(is_expected, "bf16 is not fast here: float32 is used", "a newer GPU", otherwise=NOTE))
    return checks


def check_cuda(num_gpus: int, drivers: list[str]) -> list[Check]:
    import torch

    driver = "unknown"
    if drivers:
        driver = drivers[0]
    nccl = "missing"
    if torch.distributed.is_nccl_available():
        nccl = ".".join(str(number) for number in torch.cuda.nccl.version())
    found = f"{num_gpus} GPUs, CUDA {torch.version.cuda}, driver {driver}, NCCL {nccl}"
    checks = [check(nccl != "missing" or num_gpus == 1, found, "install a PyTorch built with NCCL")]
    for number in range(num_gpus):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found = f"GPU {number}, {name}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        checks.append(check(free > 0.9 * total, found, "another process uses it: nvidia-smi shows which", NOTE))
    return checks


def check_compilers() -> list[Check]:
    """DeepSpeed builds its kernels when they are first used."""
    missing = []
    for name in ("c++", "ninja"):
        if not shutil.which(name):
            missing.append(name)
    if not shutil.which("nvcc") and shutil.which("nvidia-smi"):
        missing.append("nvcc")
    if not missing:
        return [Check(OK, "compilers for DeepSpeed's kernels: all there")]
    found = f"compilers for DeepSpeed's kernels: missing {', '.join(missing)}"
    remedy = "only for DeepSpeed's own kernels, which the files in ds_configs/ do without; apt install g++ ninja-build"
    return [Check(NOTE, found, remedy)]


def check_locks() -> list[Check]:
    """A program that was killed while PyTorch compiled for it leaves a lock, for which all later ones wait for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    checks = []
    for lock in folder.glob("**/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        found = f"{lock} is {minutes:.0f} minutes old: programs with DeepSpeed wait until it is gone"
        checks.append(check(minutes < 10, found, "delete it, if nothing compiles now"))
    return checks


def check_limits() -> list[Check]:
    """Open files, shared memory (NCCL and data loaders use it), host memory."""
    import psutil

    num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = 0
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total
    memory = psutil.virtual_memory()
    found_memory = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of host memory free"
    found_shared = f"{shared / 2**30:.1f} GiB of shared memory"
    return [
        check(num_files >= 1024, f"{num_files} open files allowed", "ulimit -n 65536"),
        check(shared >= 2**30, found_shared, "in a container: docker run --shm-size 8g", otherwise=NOTE),
        check(memory.available > 2**31, found_memory, "end other programs"),
    ]


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there, or `path` itself."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(path)


def check_disk(output_dir: Path) -> list[Check]:
    """Space, and the speed of 128 MB that really reach the disk."""
    folder = existing_parent(output_dir)
    free = shutil.disk_usage(folder).free
    block = os.urandom(2**20)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(128):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:  # no space, a quota, no permission, /proc
        return [Check(FAIL, f"nothing can be written into {folder}: {problem}", "choose another --output_dir")]
    speed = 128 / (time.perf_counter() - started)
    remedy = "checkpoints will be slow: choose a local disk"
    return [
        check(free > 5e9, f"{free / 1e9:,.0f} GB free in {folder}", "delete old checkpoints"),
        check(speed > 100, f"{speed:,.0f} MB/s written", remedy, otherwise=NOTE),
    ]


# -------------------------------------------------------------------------------------------------------------------
# The rehearsal
# -------------------------------------------------------------------------------------------------------------------


def run(script: str, flags: list[str], num_processes: int, watched: Path | None) -> subprocess.CompletedProcess:
    """Runs a training script, watched if `watched` names the file to write."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    if watched:
        command += [str(ROOT / "tools" / "watch_weights.py"), str(watched)]
    return subprocess.run([*command, script, *flags], cwd=ROOT, capture_output=True, text=True)


def rehearse(script: str, flags: list[str], num_processes: int) -> list[Check]:
    """Three steps, saved; a fourth, resumed."""
    args = parse(script, flags)
    parent = existing_parent(Path(args.output_dir).absolute().parent)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=parent) as name:
        folder = Path(name)
        output = folder / "run"
        short = [*flags, "--output_dir", str(output), "--max_steps", str(NUM_STEPS)]
        short += ["--save_steps", "1", "--save_total_limit", "1", "--logging_steps", "1", "--eval_steps", "3"]
        # A rate of zero in the first step, as warm-up has it, would leave lora_A without a gradient in the second.
        short += ["--warmup_steps", "0", "--lr_scheduler_type", "constant_with_warmup"]
        short += ["--report_to", "none", "--resume_from_checkpoint", "False"]
        completed = run(script, short, num_processes, folder / "watched")
        if completed.returncode != 0:
            return [Check(FAIL, f"{script} ended with {completed.returncode}", last_lines(completed))]
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("watched.*"))]
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        checks = check_data(args) + check_loss(args, history) + check_weights(ranks) + check_saved(args, output)
        longer = [*short, "--max_steps", str(NUM_STEPS + 1), "--resume_from_checkpoint", "True"]
        resumed = run(script, longer, num_processes, None)
        checks.append(check_resumed(resumed, output))
    return checks


def check_resumed(resumed: subprocess.CompletedProcess, output: Path) -> Check:
    found = "what was saved is read again, and training goes on from it"
    state = output / "trainer_state.json"
    if resumed.returncode != 0 or not state.is_file():
        return Check(FAIL, found, last_lines(resumed))
    steps = [row["step"] for row in json.loads(state.read_text())["log_history"]]
    expected = list(range(1, NUM_STEPS + 2))
    return check(steps == expected, found, f"the log has steps {steps}, and not {expected}: a fault of the script")


def last_lines(completed: subprocess.CompletedProcess) -> str:
    """The end of what a script printed, from its own error message on."""
    text = completed.stderr.strip() or completed.stdout.strip()
    # What torchrun says after the script's own words only tells that a process ended.
    own_words = re.split(r"^[EW]\d{4} .*torch/distributed/elastic", text, maxsplit=1, flags=re.MULTILINE)[0].strip()
    text = own_words or text
    if "error:" in text:
        text = text[text.index("error:") :]
    return "\n      ".join(text.splitlines()[-8:])


def parse(script: str, flags: list[str]):
    """The script's own arguments; a mistake ends this program with the script's message."""
    from transformers import HfArgumentParser

    module = importlib.import_module(script.removesuffix(".py"))
    try:
        (args,) = HfArgumentParser(module.Arguments, allow_abbrev=False).parse_args_into_dataclasses(flags)
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
    return args


def split_documents(row: dict) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a row; a packed row has several, and a row of preferences one an answer."""
    if "prompt_ids" in row:
        prompt = row["prompt_ids"].tolist()
        documents = []
        for answer in ("chosen", "rejected", "completion"):
            if f"{answer}_ids" in row:
                documents.append((prompt + row[f"{answer}_ids"].tolist(), row[f"{answer}_labels"].tolist()))
        return documents
    ids = row["input_ids"].tolist()
    labels = row["labels"].tolist()
    starts = [0]
    if "position_ids" in row:  # they begin again at 0 with each document
        starts = [number for number, position in enumerate(row["position_ids"].tolist()) if position == 0]
    documents = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        documents.append((ids[start:end], labels[start:end]))
    return documents


def check_data(args) -> list[Check]:
    """EOS is learned, and no document begins with two BOS, in the first 200 rows."""
    from transformers import AutoTokenizer

    from data_collator import PreferenceDataset, TokenizedDataset

    tokenizer = AutoTokenizer.from_pretrained(args.model_path, trust_remote_code=False)
    draws_passages = getattr(args, "random_passage", False)
    if hasattr(args, "loss_type"):
        dataset = PreferenceDataset(args.dataset_path)
    elif draws_passages:
        dataset = TokenizedDataset(args.dataset_path, passage_length=args.passage_length)
    else:
        dataset = TokenizedDataset(args.dataset_path)
    documents = []
    for number in range(min(200, len(dataset))):
        documents += split_documents(dataset[number])
    num_taught = 0
    num_doubled = 0
    for ids, labels in documents:
        if tokenizer.eos_token_id in labels:
            num_taught += 1
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            num_doubled += 1

    if num_taught == len(documents) or draws_passages:
        level = OK
    elif num_taught > 0:
        level = NOTE
    else:
        level = FAIL
    found_eos = f"EOS is a target in {num_taught} of {len(documents)} documents"
    remedy_eos = "the model will not learn to stop: tokenize again with data_sample/tokenize_dataset.py"
    found_bos = f"{num_doubled} of {len(documents)} documents begin with two BOS"
    remedy_bos = "the template writes BOS and the tokenizer adds another: tokenize with data_sample/tokenize_dataset.py"
    return [Check(level, found_eos, remedy_eos), check(num_doubled == 0, found_bos, remedy_bos)]


def check_loss(args, history: list[dict]) -> list[Check]:
    """The first loss is that of a model that knows something."""
    from transformers import AutoConfig

    if hasattr(args, "loss_type"):
        return []  # a loss from preferences says nothing about that
    guessing = math.log(AutoConfig.from_pretrained(args.model_path, trust_remote_code=False).vocab_size)
    loss = history[0]["loss"]
    if loss < 0.9 * guessing:
        level = OK
    elif loss < 1.5 * guessing:
        level = NOTE
    else:  # NaN, too
        level = FAIL
    found = f"first loss {loss:.3f}; guessing among all tokens would give {guessing:.2f}"
    return [
        Check(level, found, "as if the model knew nothing: is it a trained model, with this tokenizer and template?")
    ]


def check_weights(ranks: list[dict]) -> list[Check]:
    """Gradients where they must be, frozen weights where they were, trained ones elsewhere.

    Args:
        ranks: what tools/watch_weights.py wrote for each rank. In the pipeline each rank has other tensors; with
            sharding it is enough that one rank has a gradient in its shard.
    """
    frozen = []
    trained = []
    for rank in ranks:
        for name in rank["frozen"]:
            if name not in frozen:
                frozen.append(name)
    for rank in ranks:
        for name in rank["before"]:
            if name not in frozen and name not in trained:
                trained.append(name)

    checks = []
    for step in (1, 2):
        names = trained
        if step == 1:
            names = [name for name in trained if "lora_A" not in name]  # zero, because lora_B begins as zero
        missing = [name for name in names if not has_gradient(ranks, step, name)]
        found = f"step {step}: {len(names) - len(missing)} of {len(names)} trained tensors have a gradient"
        remedy = f"nothing reaches {', '.join(missing[:3])}: is it used in the forward?"
        checks.append(check(bool(names) and not missing, found, remedy))
    still = [name for name in trained if not has_moved(ranks, name)]
    found = f"{len(trained) - len(still)} of {len(trained)} trained tensors moved"
    checks.append(check(not still, found, f"{', '.join(still[:3])}: raise --learning_rate, or train in float32"))
    strayed = [name for name in frozen if has_moved(ranks, name)]
    found = f"{len(frozen) - len(strayed)} of {len(frozen)} frozen tensors stayed as they were"
    checks.append(check(not strayed, found, f"{', '.join(strayed[:3])} changed: a fault of the script"))
    return checks


def has_gradient(ranks: list[dict], step: int, name: str) -> bool:
    return any(rank["gradients"][step - 1].get(name, 0) > 0 for rank in ranks)


def has_moved(ranks: list[dict], name: str) -> bool:
    return any(name in rank["before"] and rank["before"][name] != rank["after"][name] for rank in ranks)


def read_weights(folder: Path, pattern: str) -> dict:
    """The tensors of all safetensors files in `folder` that match."""
    from safetensors.torch import load_file

    weights = {}
    for path in folder.glob(pattern):
        weights.update(load_file(path))
    return weights


def check_saved(args, output: Path) -> list[Check]:
    """The checkpoint holds what the final folder holds, and enough of its size fit on the disk."""
    import torch

    checkpoint = output / f"checkpoint-{NUM_STEPS}"
    pattern = "model*.safetensors"
    if (output / "trainable.safetensors").is_file():
        pattern = "trainable.safetensors"
    problem = ""
    try:
        final = read_weights(output, pattern)
        saved = read_weights(checkpoint, pattern)
        for name, tensor in read_weights(checkpoint, "stage-*.safetensors").items():  # the pipeline's
            if name.startswith("weight."):
                saved[name.removeprefix("weight.")] = tensor
    except Exception as damage:  # safetensors has an error class of its own
        problem = f"a file cannot be read: {damage}"
    if not problem:
        if not final or saved.keys() != final.keys():
            problem = f"{len(saved)} tensors in checkpoint-{NUM_STEPS}, {len(final)} in the final folder"
        for name in final:
            if name in saved and not torch.equal(saved[name], final[name]):
                problem = f"{name} differs"
            if not torch.isfinite(final[name]).all():
                problem = f"{name} is not finite"

    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    needed = (args.save_total_limit + 2) * size
    free = shutil.disk_usage(output).free
    found = f"a checkpoint is {size / 1e6:,.1f} MB; {needed / 1e9:,.2f} of {free / 1e9:,.0f} free GB are needed"
    return [
        check(not problem, "the checkpoint is whole and equals the final weights, all finite", problem),
        check(needed < free, found, "lower --save_total_limit, or choose another --output_dir"),
    ]


def report(title: str, checks: list[Check]) -> bool:
    """Prints the checks; returns whether none failed."""
    print(f"\n{title}")
    is_good = True
    for one in checks:
        print(f"  {one.level:5}{one.found}", flush=True)
        if one.level != OK and one.remedy:
            print(f"      -> {one.remedy}", flush=True)
        if one.level == FAIL:
            is_good = False
    return is_good


ONE_PROCESS = ("finetune_pp.py", "finetune_pp_peft.py", "finetune_pp_dpo.py")
USAGE = "tools/doctor.py [--num_processes N] [--json FILE] [-- SCRIPT --flag value ...]"


def read_command(words: list[str]) -> tuple[int, str | None, list[str]]:
    """The number of processes, the file to write, and the script with its flags; a mistake ends the program."""
    own = words
    command = []
    if "--" in words:
        own = words[: words.index("--")]
        command = words[words.index("--") + 1 :]
    flags = {"--num_processes": "1", "--json": None}
    if len(own) % 2:
        sys.exit(f"error: {' '.join(own)}: usage: {USAGE}")
    for i in range(0, len(own), 2):
        if own[i] not in flags:
            sys.exit(f"error: {' '.join(own)}: usage: {USAGE}")
        flags[own[i]] = own[i + 1]
    num_processes = flags["--num_processes"]
    if not num_processes.isdecimal() or num_processes == "0":
        sys.exit(f"error: --num_processes {num_processes}: must be a number above 0")
    if flags["--json"] and not Path(flags["--json"]).absolute().parent.is_dir():
        sys.exit(f"error: --json {flags['--json']}: no such folder; name a file in one that is there")
    scripts = sorted(path.name for path in ROOT.glob("finetune_*.py"))
    if command and command[0] not in scripts:
        sys.exit(f"error: {command[0]}: behind -- stands one of {', '.join(scripts)}, and its flags")
    if int(num_processes) > 1 and command and command[0] in ONE_PROCESS:
        sys.exit(f"error: --num_processes {num_processes}: {command[0]} is one process, on as many GPUs as it needs")
    return int(num_processes), flags["--json"], command


def write_machine(path: str) -> None:
    """Measures what tools/plan.py --machine reads."""
    from planning.measure import measure_machine

    machine = measure_machine(Path(path).parent)
    Path(path).write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote {path}: python tools/plan.py --machine {path}")


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    num_processes, json_path, command = read_command(sys.argv[1:])
    if json_path:
        json_path = str(Path(json_path).absolute())
    os.chdir(ROOT)  # where the rehearsal runs: relative paths mean the same to all
    output_dir = Path("outputs")
    if command:
        output_dir = Path(parse(command[0], command[1:]).output_dir)
    machine = check_versions() + check_gpus() + check_compilers() + check_locks()
    machine += check_limits() + check_disk(output_dir)
    is_good = report("machine", machine)
    if json_path:
        write_machine(json_path)
    if command and is_good:
        is_good = report(f"rehearsal of {command[0]}", rehearse(command[0], command[1:], num_processes))
    if not is_good:
        print("\ndo not start before FAIL is mended")
        sys.exit(1)
    print("\nall is well: start")


if __name__ == "__main__":
    main()
