"""benchmarks/compare.py: what it counts is what the rows hold, and a missing environment has a remedy."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model
from datasets import load_from_disk

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402


@pytest.fixture
def args(tmp_path) -> compare.Arguments:
    rows = []
    for i in range(20):
        rows.append({"instruction": f"Name {i} things", "input": "", "output": "A thing. " * (i % 3 + 1)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = save_tiny_model(tmp_path / "tiny")
    return compare.Arguments(
        data=str(tmp_path / "rows.json"), model_path=str(model), max_length=256, threads=1, steps=3, peers="none"
    )


def test_the_counted_tokens_are_those_of_the_rows(tmp_path, args, capsys):
    model = compare.copy_model(Path(args.model_path), tmp_path / "model")
    sets, _ = compare.make_rows(args, model, tmp_path, packing=False)
    measured = compare.run_system(args, "ours", model, sets, tmp_path / "run")
    rows = load_from_disk(sets[False][0])
    assert len(rows) == 12 and len(measured["real_tokens"]) == 3
    assert sum(measured["real_tokens"]) == sum(map(len, rows["input_ids"]))
    assert measured["filled"] == 1 and len(measured["seconds"]) == 2
    assert measured["start_seconds"] > 1 and 100 < measured["memory_mb"] < 4000
    seconds = sum(measured["seconds"])
    assert measured["tokens_per_second"] == pytest.approx(sum(measured["real_tokens"][1:]) / seconds)
    compare.print_table(compare.summarize({"ours": [measured]}))
    assert f"| ours | 100% | {measured['tokens_per_second']:.0f} | 1.00 |" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(sets[False][1]).read_text().splitlines()]
    assert all(line["completion"] == line["output"] + "</s>" and line["output"] in "A thing. " * 3 for line in lines)


def test_a_ratio_above_one_means_that_ours_is_faster(capsys):
    """Memory and start of what packs are compared with ours-packing; another number of tokens is said."""
    row = {"tokens_per_second": 100.0, "filled": 1.0, "memory_mb": 100.0, "start_seconds": 10.0, "real_tokens": [8, 8]}
    packed = row | {"memory_mb": 300.0, "start_seconds": 20.0, "real_tokens": [20, 20]}
    results = {
        "ours": [row | {"tokens_per_second": 200.0}] * 2,
        "ours-packing": [packed | {"tokens_per_second": 190.0}] * 2,
        "trl": [row | {"memory_mb": 200.0}, row | {"memory_mb": 50.0, "real_tokens": [8, 7]}],
        "trl-packing": [packed] * 2,
    }
    summary = compare.summarize(results)
    assert summary["trl"]["tokens_per_second_ratio"] == 2 == summary["trl-packing"]["tokens_per_second_ratio"]
    assert summary["trl"]["memory_mb_ratios"] == [0.5, 2] and summary["trl"]["memory_mb_ratio"] == 1.25
    assert summary["trl-packing"]["memory_mb_ratio"] == 1 == summary["trl-packing"]["start_seconds_ratio"]
    compare.print_differences(results)
    assert capsys.readouterr().out.startswith("trl trained on 15 real tokens, ours on 16")


def test_a_missing_environment_is_an_error_with_its_command(args, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    args.peers = "trainer,torchtune-packing,nobody"
    with pytest.raises(ValueError) as mistakes:
        compare.check_arguments(args)
    remedy = "bash benchmarks/install_peers.sh"
    assert f"--peers trainer: no environment .venv-peers/trl; {remedy} trl\n" in str(mistakes.value)
    assert f".venv-peers/torchtune; {remedy} torchtune" in str(mistakes.value)
    assert "--peers nobody: choose from ours-packing, trl," in str(mistakes.value)
    args.peers = "litgpt"
    args.checkpointing = "on"
    with pytest.raises(ValueError, match="--checkpointing on: LitGPT .*leave litgpt out"):
        compare.check_arguments(args)
