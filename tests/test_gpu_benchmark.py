"""benchmarks/gpu.py: dry on a CPU all of it works, what fails is said, and targets are read from the right figures."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402


@pytest.mark.slow  # three minutes
def test_a_dry_run_goes_through_every_part(tmp_path):
    completed = run_script("benchmarks/gpu.py", "--dry", True, "--output_dir", tmp_path, check=False)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    endings = {line["part"]: line["problem"] for line in lines if "ended_after_seconds" in line}
    assert endings == dict.fromkeys(gpu.PARTS) and completed.returncode == 0, completed.stdout
    results = {}
    for line in lines:
        if "ended_after_seconds" not in line:
            results.setdefault(line["part"], []).append(line)

    (machine,) = results["machine"]
    assert machine["product_flops"] > 1e6 and machine["versions"]["torch"]
    assert {one["way"] for one in results["kernels"]} == {"loop", "mask over the row"}
    assert all(0 < one["error"] < 1e-2 for one in results["kernels"])  # 8 bits of mantissa

    trials = {one["name"]: one for one in results["scripts"]}
    assert trials.keys() == {"CPU LoRA", "LoRA, float32"} and all(one["good"] for one in trials.values())
    resumed = trials["LoRA, float32"]
    assert resumed["difference"] == resumed["resumed_difference"] == 0  # one machine gives the same bits twice
    losses = trials["CPU LoRA"]["losses"]
    assert len(losses) == 4 and losses[3] < losses[0] < 1.5 * math.log(512)

    (run,) = results["speed"]
    assert run["tokens_of_a_step"] == 5 + 9 + 2 + 7 + 9
    assert run["tokens_per_second"] == pytest.approx(run["tokens_of_a_step"] / run["step_seconds"])
    assert run["predicted_bytes"] > 0 and run["predicted_tokens_per_second"] > 0
    # The matrices of two layers of 64 x 64 (queries, outputs), 64 x 32 (keys, values), 64 x 128 (three), and the head.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64
    assert run["flops"] == pytest.approx(4 * weights * run["tokens_per_second"])

    (profiled,) = results["profile"]
    assert any("mm" in kernel["kernel"] for kernel in profiled["kernels"]) and profiled["num_layers"] == 2
    assert profiled["waits_of_a_forward"] == profiled["launches_of_a_forward"] == 0  # there is no GPU
    measured = [one["name"] for one in results["peers"] if "tokens_per_second" in one]
    assert measured == ["this toolkit", "Trainer + PEFT"]

    page = (tmp_path / "gpu.md").read_text()
    assert "dry run on a CPU" in page and "did not end well" not in page and "Not measured." not in page
    for title, _ in gpu.SECTIONS.values():
        assert f"\n## {title}\n" in page
    for one in (*results["kernels"], *results["scripts"], *results["speed"], *results["peers"]):
        assert one.get("way", one.get("name")) in page
    for target in gpu.TARGETS:
        assert target.text in page and target.text in completed.stdout


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NUM_GRACE_SECONDS", 0)
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", f"sleep 60 & echo $! >{tmp_path / 'child'}; wait"], start_new_session=True
    )
    problem = gpu.wait_for(process, 1)
    assert problem == "took longer than its 1 s, and was ended" and time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(number)], capture_output=True, text=True).stdout
    return not state.strip().startswith("Z") and state.strip() != ""


def test_a_part_that_fails_has_its_last_words_on_the_page(tmp_path):
    problem = gpu.run_part("no such part", tmp_path, 60, True)
    assert problem.endswith("KeyError: 'no such part'\n")
    ending = {"part": "speed", "ended_after_seconds": 1.0, "problem": problem}
    page = gpu.make_page([ending], "python benchmarks/gpu.py", is_dry=False)
    assert "**This part did not end well: " in page and "no such part" in page and "dry run" not in page


def test_targets_are_reached_missed_or_not_measured():
    def run(part: str, name: str, **figures) -> dict:
        return {"part": part, "name": name, **figures}

    results = {
        "speed": [
            run("speed", "8B LoRA r16, one row of 4096", tokens_per_second=12000.0),
            run("speed", "8B LoRA r16, one row of 4096, compiled, no dropout", tokens_per_second=12600.0),
            run("speed", "8B LoRA r16, 50 short documents in 4096", tokens_per_second=10000.0),
            run("speed", "1B full FSDP2, 8 rows of 512", tokens_per_second=1.0, share_of_products=0.4),
            run("speed", "7B LoRA, 8 rows of 512", problem="no time left"),
        ],
        "peers": [
            run("peers", "this toolkit", tokens_per_second=100.0, held_bytes=60),
            run("peers", "this toolkit, compiled", tokens_per_second=150.0, held_bytes=50),
            run("peers", "Trainer + PEFT", tokens_per_second=90.0, held_bytes=100),
            run("peers", "TRL, packing + Liger", tokens_per_second=100.0, held_bytes=80),
        ],
    }
    found = [gpu.judge(target, results)[2:] for target in gpu.TARGETS]
    assert found == [
        ["1.26e+04: reached", "8B LoRA r16, one row of 4096, compiled, no dropout"],
        ["not measured", ""],
        ["0.4: missed", "1B full FSDP2, 8 rows of 512"],
        ["not measured", ""],
        ["0.8333: missed", "tokens/s of a whole step"],
        ["0.6: reached", "memory held, neither of them compiled"],
        ["1.5: reached", "this toolkit, compiled"],
    ]
    assert [gpu.judge(target, {})[2] for target in gpu.TARGETS] == ["not measured"] * len(gpu.TARGETS)


def test_mistakes_end_with_one_message(tmp_path):
    for flags, part in (
        (["--parts", "machine,nothing"], "--parts machine,nothing: choose from machine, kernels, scripts"),
        (["--parts", "machine,speed", "--seconds", "5"], "--seconds 5: a number above 0 for each of machine,speed"),
        (["--seconds", "soon"], "--seconds soon: a number above 0"),
        (["--page", tmp_path / "no" / "gpu.md"], "no such folder"),
    ):
        completed = run_script("benchmarks/gpu.py", "--dry", True, "--output_dir", tmp_path, *flags, check=False)
        assert completed.returncode == 1 and part in completed.stderr and "Traceback" not in completed.stderr
    completed = run_script("benchmarks/gpu.py", "--output_dir", tmp_path / "out", check=False, CUDA_VISIBLE_DEVICES="")
    assert completed.returncode == 1 and "tools/doctor.py says why" in completed.stderr
    assert list(tmp_path.iterdir()) == []
