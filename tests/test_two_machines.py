"""Two machines: network namespaces joined by one cable (a veth pair), each with nothing but its own end and loopback.

The launchers run as two nodes of one process each, and train what two processes on one node train.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

FLAGS = ["--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
         "--learning_rate", "1e-2", "--bf16", "False", "--report_to", "none"]  # fmt: skip
NUM_STEPS = 6  # 22 rows, 8 a step: the third step of an epoch has 6


def ip(*words: str) -> str:
    completed = subprocess.run(["ip", *words], capture_output=True, text=True)
    if completed.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {completed.stderr.strip()}")
    return completed.stdout


def namespaces() -> set[str]:
    return {line.split()[0] for line in ip("netns", "list").splitlines()}


@contextmanager
def two_machines():
    """Names of two namespaces with the addresses 10.77.0.1 and 10.77.0.2; they and their processes end with it."""
    names = [f"machine{i}-{os.getpid()}" for i in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{i}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in namespaces().intersection(names):
            while pids := ip("netns", "pids", name).split():
                for pid in pids:
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except ProcessLookupError:
                        pass  # it has ended by itself
                time.sleep(0.05)
            ip("netns", "delete", name)  # and the cable with its end


@pytest.fixture(scope="module", autouse=True)
def namespaces_can_be_made():
    if not shutil.which("ip"):
        pytest.skip("no ip: apt install iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        with two_machines():
            pass
    except OSError as problem:
        pytest.skip(f"no network namespaces here: {problem}")


def addresses(name: str) -> dict[str, str]:
    """IPv4 address of each interface of a namespace."""
    found = json.loads(ip("-n", name, "-json", "-4", "address", "show"))
    return {interface["ifname"]: interface["addr_info"][0]["local"] for interface in found if interface["addr_info"]}


def bytes_sent(name: str) -> int:
    (interface,) = json.loads(ip("-n", name, "-json", "-statistics", "link", "show", "cable"))
    return interface["stats64"]["tx"]["bytes"]


def environment(**variables) -> dict[str, str]:
    """This environment without what a launcher reads from it, and with `variables`."""
    read = {"NUM_GPUS", "NUM_NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MODEL", "DATASET", "OUTPUT_DIR"}
    variables |= {"USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in read}
    return kept | {name: str(value) for name, value in variables.items()}


def history_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def run_on_two_machines(names: list[str], launcher: str, flags: list[str], logs: Path, **variables) -> None:
    """Starts a launcher in both namespaces; if one ends with an error, two_machines() ends the other."""
    nodes = []
    for rank, name in enumerate(names):
        settings = {"NUM_GPUS": 1, "NUM_NODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "10.77.0.1"}
        with open(logs / f"node{rank}.txt", "w") as log:
            nodes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, "sh", f"scripts/{launcher}.sh", *flags],
                    cwd=ROOT,
                    env=environment(**settings, GLOO_SOCKET_IFNAME="cable", **variables),
                    stdout=log,
                    stderr=log,
                )
            )
    deadline = time.monotonic() + 240
    while any(node.poll() is None for node in nodes):
        if any(node.poll() for node in nodes) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    output = "\n".join(path.read_text() for path in sorted(logs.glob("node*.txt")))
    assert [node.poll() for node in nodes] == [0, 0], output


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        ("finetune_pp_peft_trainer", []),
        ("finetune_pp_peft_trainer_deepspeed", ["--lora_dropout", "0", "--lora_used", "True"]),
    ],
)
@pytest.mark.slow
def test_two_machines_train_what_two_processes_train(launcher, flags, tiny_model, tiny_set, tmp_path):
    flags = [*FLAGS, *flags]
    if "deepspeed" in launcher:
        # So small tensors would stay whole on every process, and nothing but gradients would cross the cable.
        config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        flags += ["--deepspeed", str(tmp_path / "zero3.json")]
    data = {"MODEL": tiny_model, "DATASET": tiny_set}
    one = subprocess.run(
        ["sh", f"scripts/{launcher}.sh", *flags],
        cwd=ROOT,
        env=environment(NUM_GPUS=2, OUTPUT_DIR=tmp_path / "one", **data),
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stdout + one.stderr

    with two_machines() as names:
        assert [addresses(name) for name in names] == [
            {"lo": "127.0.0.1", "cable": "10.77.0.1"},
            {"lo": "127.0.0.1", "cable": "10.77.0.2"},
        ]
        inodes = {os.stat(f"/run/netns/{name}").st_ino for name in names} | {os.stat("/proc/self/ns/net").st_ino}
        assert len(inodes) == 3  # two networks that are not each other's and not this one
        run_on_two_machines(names, launcher, flags, tmp_path, OUTPUT_DIR=tmp_path / "two", **data)
        sent = [bytes_sent(name) for name in names]
    assert not namespaces().intersection(names)

    expected, found = history_of(tmp_path / "one"), history_of(tmp_path / "two")
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, NUM_STEPS + 1))
    deviations = {}
    for name, first, later in (("loss", 1e-5, 1e-5), ("grad_norm", 1e-5, 1e-4)):
        deviations[name] = [abs(b[name] / a[name] - 1) for a, b in zip(expected, found, strict=True)]
        assert deviations[name][0] <= first and max(deviations[name]) <= later
    assert expected[-1]["loss"] != expected[0]["loss"]
    # Each process held half of the weights and sent it to the other at least once a step.
    whole = sum(path.stat().st_size for path in tiny_model.glob("*.safetensors"))
    assert min(sent) > NUM_STEPS * whole / 2
    for folder in ("one", "two"):
        assert json.loads((tmp_path / folder / "run.json").read_text())["world_size"] == 2
    largest = {name: f"{max(values):.1e}" for name, values in deviations.items()}
    print(f"{launcher}: largest relative deviations {largest}, bytes sent over the cable {sent}, weights {whole} bytes")


@pytest.mark.slow
def test_the_machines_are_gone_even_after_a_failure():
    with pytest.raises(RuntimeError, match="on purpose"), two_machines() as names:
        assert namespaces().issuperset(names)
        process = subprocess.Popen(["ip", "netns", "exec", names[1], "sleep", "600"])
        while not ip("netns", "pids", names[1]):
            time.sleep(0.01)
        raise RuntimeError("on purpose")
    assert not namespaces().intersection(names)
    assert process.wait(timeout=5) == -signal.SIGKILL
    assert "cable" not in ip("link", "show")
