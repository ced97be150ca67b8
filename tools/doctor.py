"""Checks this machine, and rehearses a training run before it costs anything: says whether to start.

    python tools/doctor.py
    python tools/doctor.py -- finetune_pp_peft.py --dataset_path data_sample/tokenized/triage_train
    python tools/doctor.py --num_processes 8 -- finetune_pp_peft_trainer.py --model_path models/llama-7b

What stands behind `--` is the script and the flags of the run to come. It is started with them for two steps in a
temporary folder beside --output_dir, saved, and resumed for a third; then the folder is deleted. Meanwhile every
gradient and every weight is watched.

Prints a line for each check: ok, note (it will run, but), or FAIL, with the remedy. The exit status is 1 if one failed.
"""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OK, NOTE, FAIL = "ok", "note", "FAIL"
Check = tuple[str, str, str]  # level, what was found, remedy


# -------------------------------------------------------------------------------------------------------------------
# The machine
# -------------------------------------------------------------------------------------------------------------------


def check_versions() -> list[Check]:
    """Python, and the packages against requirements.txt, which names what was tested together."""
    from importlib.metadata import PackageNotFoundError, version

    python = ".".join(map(str, sys.version_info[:3]))
    checks = [(OK if sys.version_info >= (3, 11) else FAIL, f"Python {python}", "install Python 3.11 or newer")]
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, tested = line.partition("==")
        if not tested or name.startswith("#"):
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            level = NOTE if name == "deepspeed" else FAIL
            checks.append((level, f"{name} is missing", f"pip install {name}=={tested}"))
            continue
        if found.split("+")[0] != tested:
            remedy = f"if something fails: pip install {name}=={tested}, the tested version"
            checks.append((NOTE, f"{name} {found}", remedy))
    if len(checks) == 1:
        checks.append((OK, "all packages are the tested versions", ""))
    return checks


def check_gpus() -> list[Check]:
    """CUDA, driver, NCCL and free memory of each GPU, or why PyTorch sees none; bf16."""
    import torch

    import data_collator

    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines() if smi else []
    number = torch.cuda.device_count()
    bf16 = data_collator.use_bf16("auto", number == 0)
    if number == 0 and listed:
        remedy = "install a PyTorch built for CUDA, or a newer driver; look at CUDA_VISIBLE_DEVICES"
        return [(FAIL, f"nvidia-smi lists {len(listed)} GPUs, and PyTorch {torch.__version__} sees none", remedy)]
    checks = []
    if number == 0:
        checks.append((NOTE, f"no GPU: training runs on the CPU, {os.cpu_count()} cores", "fine for the sample model"))
    else:
        driver = listed[0].split(",")[0] if listed else "unknown"
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "missing"
        level = FAIL if nccl == "missing" and number > 1 else OK
        found = f"{number} GPUs, CUDA {torch.version.cuda}, driver {driver}, NCCL {nccl}"
        checks.append((level, found, "install a PyTorch built with NCCL"))
        for i in range(number):
            free, total = torch.cuda.mem_get_info(i)
            level = OK if free > 0.9 * total else NOTE
            found = f"GPU {i}, {torch.cuda.get_device_name(i)}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            checks.append((level, found, "another process uses it: nvidia-smi shows which"))
    level = OK if bf16 or number == 0 else NOTE
    checks.append((level, f"bf16 is {'fast here' if bf16 else 'not fast here: float32 is used'}", "a newer GPU"))
    return checks


def check_compilers() -> list[Check]:
    """DeepSpeed builds its kernels when they are first used."""
    missing = [name for name in ("c++", "ninja") if not shutil.which(name)]
    if not shutil.which("nvcc") and shutil.which("nvidia-smi"):
        missing.append("nvcc")
    remedy = "only for DeepSpeed's own kernels, which the files in ds_configs/ do without; apt install g++ ninja-build"
    found = f"compilers for DeepSpeed's kernels: {'missing ' + ', '.join(missing) if missing else 'all there'}"
    return [(NOTE if missing else OK, found, remedy)]


def check_limits() -> list[Check]:
    """Open files, shared memory (NCCL and data loaders use it), host memory."""
    import psutil

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    memory = psutil.virtual_memory()
    return [
        (OK if files >= 1024 else FAIL, f"{files} open files allowed", "ulimit -n 65536"),
        (OK if shared >= 2**30 else NOTE, f"{shared / 2**30:.1f} GiB of shared memory",
         "in a container: docker run --shm-size 8g"),
        (OK if memory.available > 2**31 else FAIL,
         f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of host memory free", "end other programs"),
    ]  # fmt: skip


def existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def check_disk(output_dir: Path) -> list[Check]:
    """Space, and the speed of 128 MB that really reach the disk."""
    folder = existing_parent(output_dir)
    free = shutil.disk_usage(folder).free
    block, started = os.urandom(2**20), time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(128):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:  # no space, a quota, no permission, /proc
        return [(FAIL, f"nothing can be written into {folder}: {problem}", "choose another --output_dir")]
    speed = 128 / (time.perf_counter() - started)
    return [
        (OK if free > 5e9 else FAIL, f"{free / 1e9:,.0f} GB free in {folder}", "delete old checkpoints"),
        (OK if speed > 100 else NOTE, f"{speed:,.0f} MB/s written", "checkpoints will be slow: choose a local disk"),
    ]


# -------------------------------------------------------------------------------------------------------------------
# The rehearsal: inside the script's own process
# -------------------------------------------------------------------------------------------------------------------


def watch(output: str, script: str, flags: list[str]) -> None:
    """Runs a training script in this process, and writes what its weights and gradients did as JSON, for each rank.

    gradients: for each step, the largest absolute gradient of every trained tensor, by name; with sharding, of this
    rank's shard. before, after: a checksum of every tensor's local data, before the first step and at the end.
    """
    import runpy

    import torch
    import torch.distributed as dist
    import transformers

    found = {"gradients": [], "before": {}, "after": {}, "frozen": []}
    models = []

    def local(parameter):
        for name in ("_local_tensor", "ds_tensor"):  # FSDP2's and ZeRO-3's shard
            parameter = getattr(parameter, name, parameter)
        return parameter.detach()

    def checksum(parameter) -> float:
        data = local(parameter).flatten()
        data = data.view(torch.uint8) if not data.is_floating_point() else data
        return float(data.double().sum()) + float(data.double().square().sum())

    def checksums() -> dict[str, float]:
        return {name: checksum(parameter) for name, parameter in models[-1].named_parameters()}

    def note(name: str, gradient) -> None:
        step = found["gradients"][-1]
        step[name] = max(step.get(name, 0.0), float(local(gradient).abs().max()) if gradient.numel() else 0.0)

    # Under all ways to load and to go back: AutoModelForCausalLM and the pipeline's stages, losses and their schedule.
    backward, from_pretrained = torch.autograd.backward, transformers.PreTrainedModel.from_pretrained.__func__
    step_scheduler = torch.optim.lr_scheduler.LRScheduler.step

    def remember(model_class, *args, **kwargs):
        models.append(from_pretrained(model_class, *args, **kwargs))
        return models[-1]

    def first_backward(*args, **kwargs):
        torch.autograd.backward = backward
        found["gradients"] = [{}]
        for name, parameter in models[-1].named_parameters():
            if not parameter.requires_grad:
                found["frozen"].append(name)
            elif not hasattr(parameter, "_local_tensor"):
                parameter.register_hook(lambda gradient, name=name: note(name, gradient))
        return backward(*args, **kwargs)

    def before_update(*_) -> None:
        if not found["before"]:  # not earlier: FSDP2 held some parameters whole since the forward
            found["before"] = checksums()
        for name, parameter in models[-1].named_parameters():
            if hasattr(parameter, "_local_tensor") and parameter.grad is not None:
                note(name, parameter.grad)

    def after_update(self, *args, **kwargs):
        if found["gradients"]:  # else it is a scheduler's first call, when it is made
            found["gradients"].append({})
            found["after"] = checksums()
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(f"{output}.{rank}").write_text(json.dumps(found))
        return step_scheduler(self, *args, **kwargs)

    transformers.PreTrainedModel.from_pretrained = classmethod(remember)
    torch.autograd.backward = first_backward
    torch.optim.lr_scheduler.LRScheduler.step = after_update
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(before_update)
    if any(flag.removeprefix("--peft_mode=") in ("prefix", "ptuning", "prompt") for flag in flags):
        import peft

        get_peft_model = peft.get_peft_model

        def remember_adapter(model, *args, **kwargs):  # virtual tokens stand beside the base model
            adapted = get_peft_model(model, *args, **kwargs)
            if next(model.parameters()).device.type != "meta":
                models.append(adapted)
            return adapted

        peft.get_peft_model = remember_adapter
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


# -------------------------------------------------------------------------------------------------------------------
# The rehearsal: around the script
# -------------------------------------------------------------------------------------------------------------------


def run(script: str, flags: list[str], num_processes: int, watched: Path | None) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(launch if num_processes > 1 else [])]
    command += [__file__, "--watch", str(watched), script] if watched else [script]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


def rehearse(script: str, flags: list[str], num_processes: int) -> list[Check]:
    """Two steps, saved; a third, resumed."""
    args = parse(script, flags)
    parent = existing_parent(Path(args.output_dir).absolute().parent)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=parent) as folder:
        output, watched = Path(folder) / "run", Path(folder) / "watched"
        # A rate of zero in the first step, as warm-up has it, would leave lora_A without a gradient in the second.
        changed = {"output_dir": output, "max_steps": 2, "save_steps": 1, "logging_steps": 1, "warmup_steps": 0}
        changed |= {"lr_scheduler_type": "constant_with_warmup", "report_to": "none", "resume_from_checkpoint": "False"}
        changed |= {"eval_steps": 2, "save_total_limit": 1}
        short = [*flags, *(word for name, value in changed.items() for word in (f"--{name}", str(value)))]
        completed = run(script, short, num_processes, watched)
        if completed.returncode != 0:
            return [(FAIL, f"{script} ended with {completed.returncode}", last_lines(completed))]
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("watched.*"))]
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        checks = check_data(args) + check_loss(args, history) + check_weights(ranks) + check_saved(args, output)
        resumed = run(script, [*short, "--max_steps", "3", "--resume_from_checkpoint", "True"], num_processes, None)
        state = output / "trainer_state.json"
        steps = [row["step"] for row in json.loads(state.read_text())["log_history"]] if state.is_file() else []
        level = OK if resumed.returncode == 0 and steps == [1, 2, 3] else FAIL
        remedy = last_lines(resumed) if level == FAIL else ""
        checks.append((level, "what was saved is read again, and training goes on from it", remedy))
    return checks


def last_lines(completed: subprocess.CompletedProcess) -> str:
    text = completed.stderr.strip() or completed.stdout.strip()
    # What torchrun says after the script's own words only tells that a process ended.
    text = re.split(r"^[EW]\d{4} .*torch/distributed/elastic", text, maxsplit=1, flags=re.MULTILINE)[0].strip() or text
    mistakes = text[text.index("error:") :] if "error:" in text else text
    return "\n      ".join(mistakes.splitlines()[-8:])


def parse(script: str, flags: list[str]):
    """The script's own arguments; a mistake ends this program with the script's message."""
    import importlib

    from transformers import HfArgumentParser

    module = importlib.import_module(script.removesuffix(".py"))
    try:
        return HfArgumentParser(module.Arguments, allow_abbrev=False).parse_args_into_dataclasses(flags)[0]
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")


def check_data(args) -> list[Check]:
    """EOS is learned, and no document begins with two BOS, in the first 200 rows."""
    from transformers import AutoTokenizer

    from data_collator import TokenizedDataset

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    dataset = TokenizedDataset(args.dataset_path, passage_length=args.passage_length if args.random_passage else 0)
    documents = []  # (ids, labels)
    for i in range(min(200, len(dataset))):
        row = dataset[i]
        starts = [j for j, p in enumerate(row["position_ids"].tolist()) if p == 0] if "position_ids" in row else [0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            documents.append((row["input_ids"][start:end].tolist(), row["labels"][start:end].tolist()))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    taught = sum(eos in labels for _, labels in documents)
    doubled = sum(bos is not None and ids[:2] == [bos, bos] for ids, _ in documents)
    level = OK if taught == len(documents) or args.random_passage else NOTE if taught else FAIL
    remedy = "the model will not learn to stop: tokenize again with data_sample/tokenize_dataset.py"
    checks = [(level, f"EOS is a target in {taught} of {len(documents)} documents", remedy)]
    remedy = "the template writes BOS and the tokenizer adds another: tokenize with data_sample/tokenize_dataset.py"
    checks.append((FAIL if doubled else OK, f"{doubled} of {len(documents)} documents begin with two BOS", remedy))
    return checks


def check_loss(args, history: list[dict]) -> list[Check]:
    from transformers import AutoConfig

    guessing, loss = math.log(AutoConfig.from_pretrained(args.model_path).vocab_size), history[0]["loss"]
    level = OK if loss < 0.9 * guessing else NOTE if loss < 1.5 * guessing else FAIL
    remedy = "as if the model knew nothing: is it a trained model, with this tokenizer and template?"
    return [(level, f"first loss {loss:.3f}; guessing among all tokens would give {guessing:.2f}", remedy)]


def check_weights(ranks: list[dict]) -> list[Check]:
    """Gradients where they must be, frozen weights where they were, trained ones elsewhere."""

    def without_gradient(step: int, names: list[str]) -> list[str]:
        return [name for name in names if not any(rank["gradients"][step].get(name, 0) > 0 for rank in ranks)]

    def moved(name: str) -> bool:
        return any(rank["before"][name] != rank["after"][name] for rank in ranks if name in rank["before"])

    # Of all ranks: in the pipeline each has other tensors.
    frozen = dict.fromkeys(name for rank in ranks for name in rank["frozen"])
    trained = [name for name in dict.fromkeys(n for rank in ranks for n in rank["before"]) if name not in frozen]
    first = [name for name in trained if "lora_A" not in name]  # zero in step 1, because lora_B begins as zero
    checks = []
    for number, names in ((1, first), (2, trained)):
        missing = without_gradient(number - 1, names)
        found = f"step {number}: {len(names) - len(missing)} of {len(names)} trained tensors have a gradient"
        remedy = f"nothing reaches {', '.join(missing[:3])}: is it used in the forward?"
        checks.append((FAIL if missing or not names else OK, found, remedy))
    still = [name for name in trained if not moved(name)]
    strayed = [name for name in frozen if moved(name)]
    remedy = f"{', '.join(still[:3])}: raise --learning_rate, or train in float32"
    checks.append(
        (FAIL if still else OK, f"{len(trained) - len(still)} of {len(trained)} trained tensors moved", remedy)
    )
    found = f"{len(frozen) - len(strayed)} of {len(frozen)} frozen tensors stayed as they were"
    checks.append((FAIL if strayed else OK, found, f"{', '.join(strayed[:3])} changed: a fault of the script"))
    return checks


def check_saved(args, output: Path) -> list[Check]:
    """The checkpoint is whole, holds what the final folder holds, and enough of its size fit on the disk."""
    import torch
    from safetensors.torch import load_file

    from data_collator import find_damage

    checkpoint = output / "checkpoint-2"
    damage = find_damage(checkpoint)
    name = "trainable.safetensors" if (output / "trainable.safetensors").is_file() else "model*.safetensors"

    def read(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
        return {name: tensor for path in folder.glob(pattern) for name, tensor in load_file(path).items()}

    same = damage is None
    if same:
        final, parts = read(output, name), read(checkpoint, "stage-*.safetensors")
        weights = {key.removeprefix("weight."): parts[key] for key in parts if key.startswith("weight.")}
        saved = weights or read(checkpoint, name)
        same = bool(final) and saved.keys() == final.keys() and all(torch.equal(saved[n], final[n]) for n in saved)
        same &= all(bool(torch.isfinite(tensor).all()) for tensor in final.values())
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    needed, free = (args.save_total_limit + 2) * size, shutil.disk_usage(output).free
    return [
        (OK if same else FAIL, "the checkpoint is whole and equals the final weights, all finite", damage or ""),
        (OK if needed < free else FAIL, f"a checkpoint is {size / 1e6:,.1f} MB; {needed / 1e9:,.2f} of "
         f"{free / 1e9:,.0f} free GB are needed", "lower --save_total_limit, or choose another --output_dir"),
    ]  # fmt: skip


def report(title: str, checks: list[Check]) -> bool:
    """Prints the checks; whether none failed."""
    print(f"\n{title}")
    for level, found, remedy in checks:
        print(f"  {level:5}{found}" + (f"\n      -> {remedy}" if level != OK and remedy else ""), flush=True)
    return all(level != FAIL for level, _, _ in checks)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--watch"]:  # the script's process in a rehearsal
        return watch(words[1], words[2], words[3:])
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    if own in (["-h"], ["--help"]):
        return print(__doc__)
    num_processes = own[1] if own[:1] == ["--num_processes"] and len(own) == 2 else "1"
    scripts = sorted(path.name for path in ROOT.glob("finetune_*.py"))
    if own and own[0] != "--num_processes" or len(own) == 1 or not num_processes.isdecimal() or num_processes == "0":
        sys.exit(f"error: {' '.join(own)}: usage: tools/doctor.py [--num_processes N] [-- SCRIPT --flag value ...]")
    if command and command[0] not in scripts:
        sys.exit(f"error: {command[0]}: behind -- stands one of {', '.join(scripts)}, and its flags")
    if int(num_processes) > 1 and command and command[0] in ("finetune_pp.py", "finetune_pp_peft.py"):
        sys.exit(f"error: --num_processes {num_processes}: {command[0]} is one process; it takes all visible GPUs")
    os.chdir(ROOT)  # where the rehearsal runs: relative paths mean the same to all
    output_dir = Path(parse(command[0], command[1:]).output_dir) if command else Path("outputs")
    machine = check_versions() + check_gpus() + check_compilers() + check_limits() + check_disk(output_dir)
    good = report("machine", machine)
    if command and good:
        good &= report(f"rehearsal of {command[0]}", rehearse(command[0], command[1:], int(num_processes)))
    print("\nall is well: start" if good else "\ndo not start before FAIL is mended")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
