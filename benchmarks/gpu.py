"""Measures this toolkit on the GPU of this machine: kernels, every script, speed, memory, a profile, and peers.

    python benchmarks/gpu.py                                         # about seven minutes on one H100
    python benchmarks/gpu.py --page docs/gpu.md                      # the record that the repository keeps
    python benchmarks/gpu.py --parts speed,peers --seconds 300,150   # some parts, with seconds of your own
    python benchmarks/gpu.py --dry True                              # all of it on a CPU with tiny shapes

Each part is a process of its own and has its own seconds: one that takes longer or fails is ended, the page says so,
and the next one starts. Needed is what requirements.txt has, PyTorch 2.11 or newer; DeepSpeed, bitsandbytes, TRL and
Liger are tried where they are installed. No model and no data are needed: weights are random.

Writes results.jsonl, one line for each result, and the page gpu.md into --output_dir, or where --page says.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Parts in their order, and seconds for each on an H100: 430 together.
PARTS = {"machine": 15, "kernels": 35, "scripts": 100, "speed": 175, "profile": 30, "peers": 75}
DRY_SECONDS = 90  # for each part
NUM_GRACE_SECONDS = 5  # a part ends by itself when its seconds are over; then it is ended


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/gpu", metadata={"help": "folder for results.jsonl and the page"})
    page: str | None = field(default=None, metadata={"help": "Markdown file; none: gpu.md in output_dir"})
    parts: str = field(default=",".join(PARTS), metadata={"help": "which parts, by commas"})
    seconds: str | None = field(default=None, metadata={"help": "of each of these parts, by commas"})
    dry: bool = field(default=False, metadata={"help": "on the CPU with tiny shapes, to find mistakes of this program"})


def check_arguments(args: Arguments) -> dict[str, float]:
    """The seconds of each part that is to run; raises ValueError with all mistakes, one a line."""
    mistakes = []
    names = [name.strip() for name in args.parts.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        mistakes.append(f"--parts {args.parts}: choose from {', '.join(PARTS)}")
        raise ValueError("\n".join(mistakes))
    seconds = [PARTS[name] for name in names]
    if args.dry:
        seconds = [DRY_SECONDS for name in names]
    if args.seconds is not None:
        try:
            seconds = [float(word) for word in args.seconds.split(",")]
        except ValueError:
            seconds = []
        if len(seconds) != len(names) or min(seconds) <= 0:
            mistakes.append(f"--seconds {args.seconds}: a number above 0 for each of {args.parts}, by commas")
    if args.page and not Path(args.page).absolute().parent.is_dir():
        mistakes.append(f"--page {args.page}: no such folder; name a file in one that is there")
    if not args.dry:
        mistakes += check_machine()
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return dict(zip(names, seconds, strict=True))


def check_machine() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return []
    return ["--dry False: PyTorch cannot use a GPU here; python tools/doctor.py says why, --dry True runs on the CPU"]


# -------------------------------------------------------------------------------------------------------------------
# Running the parts
# -------------------------------------------------------------------------------------------------------------------


def run_part(name: str, folder: Path, seconds: float, is_dry: bool) -> str | None:
    """None, or what went wrong: it took too long, or its last words."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), name, str(folder), str(seconds), str(is_dry)]
    environment = dict(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one of several
    log = folder / f"{name}.log"
    shutil.rmtree(folder / "work", ignore_errors=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        problem = wait_for(process, seconds)
    shutil.rmtree(folder / "work", ignore_errors=True)  # models and runs of the part
    if problem is None and process.returncode != 0:
        problem = log.read_text(encoding="utf-8")[-800:]
    return problem


def wait_for(process: subprocess.Popen, seconds: float) -> str | None:
    """Ends the process, and all that it has started, when it takes longer."""
    try:
        process.wait(timeout=seconds + NUM_GRACE_SECONDS)
        return None
    except subprocess.TimeoutExpired:
        return f"took longer than its {seconds:g} s, and was ended"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def run_parts(args: Arguments, parts: dict[str, float]) -> list[dict]:
    """All results, also those of parts that were not asked for now and are in the file of a run of the same kind."""
    folder = Path(args.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    before = read_results(path)
    kept = []
    if all(result.get("dry", args.dry) == args.dry for result in before):
        kept = [result for result in before if result["part"] not in parts]
    path.write_text("".join(json.dumps(result) + "\n" for result in kept), encoding="utf-8")
    for name, seconds in parts.items():
        print(f"{name}: {seconds:g} s", flush=True)
        started = time.perf_counter()
        problem = run_part(name, folder, seconds, args.dry)
        seconds_taken = time.perf_counter() - started
        ending = {"part": name, "ended_after_seconds": seconds_taken, "problem": problem, "dry": args.dry}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(ending) + "\n")
        if problem:
            print(f"{name}: {problem}", flush=True)
    return read_results(path)


def read_results(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------------------------
# What was aimed at
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """What is aimed at on one H100, and how it is read from the results.

    `measure` gets the results by part and returns the figure and where it is from, or None.
    """

    text: str
    wanted: float
    is_least: bool  # else it is the most
    measure: Callable[[dict[str, list[dict]]], tuple[float, str] | None]


def best_run(results: dict, part: str, name: str, figure: str) -> tuple[float, str] | None:
    """The largest figure among the runs of a part whose name begins like this."""
    best = None
    for run in results.get(part, []):
        if run.get("name", "").startswith(name) and figure in run:
            if best is None or run[figure] > best[0]:
                best = (run[figure], run["name"])
    return best


def find_run(results: dict, part: str, name: str) -> dict | None:
    for run in results.get(part, []):
        if run.get("name") == name and "tokens_per_second" in run:
            return run
    return None


def short_against_long(results: dict) -> tuple[float, str] | None:
    short = find_run(results, "speed", "8B LoRA r16, 50 short documents in 4096")
    long = find_run(results, "speed", "8B LoRA r16, one row of 4096")
    if short is None or long is None:
        return None
    return short["tokens_per_second"] / long["tokens_per_second"], "tokens/s of a whole step"


def memory_against_trainer(results: dict) -> tuple[float, str] | None:
    ours = find_run(results, "peers", "this toolkit")
    trainer = find_run(results, "peers", "Trainer + PEFT")
    if ours is None or trainer is None or "held_bytes" not in ours:
        return None
    return ours["held_bytes"] / trainer["held_bytes"], "memory held, neither of them compiled"


def speed_against_trl(results: dict) -> tuple[float, str] | None:
    ours = best_run(results, "peers", "this toolkit", "tokens_per_second")
    trl = find_run(results, "peers", "TRL, packing + Liger")
    if ours is None or trl is None:
        return None
    return ours[0] / trl["tokens_per_second"], ours[1]


TARGETS = [
    Target("LLaMA-8B LoRA r16, 4,096 tokens: tokens/s", 12500, True,
           lambda results: best_run(results, "speed", "8B LoRA r16, one row of 4096", "tokens_per_second")),
    Target("7B LoRA, rows of 512: tokens/s", 15000, True,
           lambda results: best_run(results, "speed", "7B LoRA, 8 rows of 512", "tokens_per_second")),
    Target("1B full, FSDP2 in a world of one: share of the measured product rate", 0.5, True,
           lambda results: best_run(results, "speed", "1B full FSDP2", "share_of_products")),
    Target("7B full, FSDP2 in a world of one: share of the measured product rate", 0.5, True,
           lambda results: best_run(results, "speed", "7B full FSDP2", "share_of_products")),
    Target("50 short documents in a row / one long row of as many tokens: speed", 0.9, True, short_against_long),
    Target("memory / Trainer + PEFT at equal settings", 0.8, False, memory_against_trainer),
    Target("speed / TRL with packing and Liger", 1.5, True, speed_against_trl),
]  # fmt: skip


def judge(target: Target, results: dict) -> list[str]:
    """The row of a target in the page's table."""
    sign = "at most"
    if target.is_least:
        sign = "at least"
    wanted = f"{sign} {target.wanted:g}"
    found = target.measure(results)
    if found is None:
        return [target.text, wanted, "not measured", ""]
    figure, source = found
    is_reached = figure <= target.wanted
    if target.is_least:
        is_reached = figure >= target.wanted
    verdict = "missed"
    if is_reached:
        verdict = "reached"
    return [target.text, wanted, f"{figure:.4g}: {verdict}", source]


# -------------------------------------------------------------------------------------------------------------------
# The page
# -------------------------------------------------------------------------------------------------------------------


def make_table(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    texts = []
    for line in lines:
        cells = [str(cell).replace("|", "/").replace("\n", " ") for cell in line]
        texts.append(f"| {' | '.join(cells)} |")
    return [*texts, ""]


def show(facts: dict, name: str, factor: float = 1, form: str = ".1f") -> str:
    """A figure times a factor, or nothing where it was not measured."""
    if facts.get(name) is None:
        return ""
    return format(facts[name] * factor, form)


def describe_machine(results: list[dict]) -> list[str]:
    lines = []
    for one in results:
        versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
        lines.append(f"{one['name']}, {one['memory_bytes'] / 2**30:.0f} GiB, driver {one['driver']}, "
                     f"power limit {one.get('power_limit', 'unknown')}, CUDA {one.get('cuda')}, "
                     f"{one['cores']} CPU cores, Python {one['python']}.")  # fmt: skip
        lines += ["", f"Versions: {versions}.", ""]
        lines.append(f"Products of {one['product_size']} x {one['product_size']} matrices in bf16: "
                     f"{one['product_flops'] / 1e12:.0f} TFLOPS. "
                     f"Copies: {one['copy_bytes_per_second'] / 1e12:.2f} TB/s read and written.")  # fmt: skip
    return [*lines, ""]


def describe_kernels(results: list[dict]) -> list[str]:
    titles = ["shape", "kernel", "first call, ms", "same lengths, ms", "other lengths, ms", "error beside float32"]
    rows = []
    for one in results:
        figures = [show(one, "first_ms"), show(one, "same_ms", form=".2f"), show(one, "fresh_ms", form=".2f")]
        rows.append([one["shape"], one["way"], *figures, show(one, "error", form=".1e") or one["problem"]])
    text = "Forward and backward of one layer's attention. Training has other lengths in each batch."
    return [text, "", *make_table(titles, rows)]


def describe_scripts(results: list[dict]) -> list[str]:
    titles = ["script", "losses", "largest difference", "allowed", "after resuming", "seconds", ""]
    rows = []
    for one in results:
        losses = " ".join(f"{loss:.4f}" for loss in one.get("losses", []))
        verdict = {True: "ok", False: "FAIL", None: "not run"}[one["good"]]
        rows.append([
            one["name"],
            losses or one["problem"][-300:],
            show(one, "difference", form=".1e"),
            show(one, "tolerance", form=".0e"),
            show(one, "resumed_difference", form=".1e"),
            show(one, "seconds", form=".0f"),
            verdict,
        ])  # fmt: skip
    text = ("Four steps of a small model; beside the plain loop on the CPU in float32 (relative, over all steps), and "
            "beside the run that was not interrupted for one that goes on from its second step.")  # fmt: skip
    return [text, "", *make_table(titles, rows)]


def describe_runs(results: list[dict]) -> list[str]:
    titles = ["run", "tokens/s", "plan.py", "share of products", "held, GiB", "plan.py", "reserved, GiB",
              "first step, s"]  # fmt: skip
    rows = []
    for one in results:
        if "tokens_per_second" not in one:
            rows.append([f"{one['name']}: {one['problem'][-300:]}", "", "", "", "", "", "", ""])
            continue
        rows.append([
            one["name"],
            show(one, "tokens_per_second", form=",.0f"),
            show(one, "predicted_tokens_per_second", form=",.0f") or one.get("prediction_problem", ""),
            show(one, "share_of_products", form=".0%"),
            show(one, "held_bytes", 2**-30),
            show(one, "predicted_bytes", 2**-30),
            show(one, "reserved_bytes", 2**-30),
            show(one, "first_step_seconds"),
        ])  # fmt: skip
    return make_table(titles, rows)


def describe_profile(results: list[dict]) -> list[str]:
    lines = []
    for one in results:
        if "kernels" not in one:
            lines.append(f"{one['name']}: {one['problem'][-300:]}")
            continue
        lines.append(f"{one['name']}: the GPU is busy for {one['busy_share']:.0%} of the time. One forward of the "
                     f"{one['num_layers']} layers: {one['launches_of_a_forward']} launches, "
                     f"{one['casts_of_a_forward']} casts, {one['waits_of_a_forward']} waits for the GPU.")  # fmt: skip
        rows = []
        for kernel in one["kernels"]:
            name = f"`{kernel['kernel']}`"
            rows.append([name, f"{kernel['ms']:.2f}", f"{kernel['share']:.0%}", f"{kernel['calls']:.0f}"])
        lines += ["", *make_table(["kernel", "ms a step", "share", "calls a step"], rows)]
    return lines


SECTIONS = {
    "machine": ("The machine", describe_machine),
    "kernels": ("Kernels of attention", describe_kernels),
    "scripts": ("Every script", describe_scripts),
    "speed": ("Speed and memory", describe_runs),
    "profile": ("A profile", describe_profile),
    "peers": ("Beside others", describe_runs),
}


def make_page(all_results: list[dict], command: str, is_dry: bool) -> str:
    """Markdown."""
    results = {}
    endings = []
    for result in all_results:
        if "ended_after_seconds" in result:
            endings.append(result)
        else:
            results.setdefault(result["part"], []).append(result)
    lines = ["# On a GPU", "", f"Written by `{command}`. Models have random weights: speed and memory do not depend on "
             "them. Memory held is the most that PyTorch had allocated while steps were measured."]  # fmt: skip
    if is_dry:
        lines.append("")
        lines.append("**A dry run on a CPU with tiny shapes: it shows that the program works, and no figure counts.**")
    lines += ["", "## Targets", "", "For one H100.", ""]
    lines += make_table(["what", "wanted", "measured", "by"], [judge(target, results) for target in TARGETS])
    for name, (title, describe) in SECTIONS.items():
        lines += [f"## {title}", ""]
        for ending in endings:
            if ending["part"] == name and ending["problem"]:
                lines += [f"**This part did not end well: {ending['problem']}**", ""]
        if name in results:
            lines += describe(results[name])
        else:
            lines += ["Not measured.", ""]
    seconds = ", ".join(f"{ending['part']} {ending['ended_after_seconds']:.0f}" for ending in endings)
    return "\n".join([*lines, f"Seconds: {seconds}.", ""])


def main() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        parts = check_arguments(args)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    results = run_parts(args, parts)
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    page = Path(args.page or Path(args.output_dir) / "gpu.md")
    page.write_text(make_page(results, command, args.dry), encoding="utf-8")
    for target in TARGETS:
        by_part = {}
        for result in results:
            by_part.setdefault(result["part"], []).append(result)
        print(": ".join(cell for cell in judge(target, by_part) if cell))
    print(f"wrote {page}")
    if any(result.get("problem") and "ended_after_seconds" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
