"""The benchmark against other systems: what it counts is what the rows hold, and a missing environment has a remedy."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model
from datasets import load_from_disk

sys.path.insert(0, str(ROOT / "tools"))
import benchmark  # noqa: E402


@pytest.fixture
def args(tmp_path) -> benchmark.Arguments:
    rows = [{"instruction": f"Name {i} things", "input": "", "output": "A thing. " * (i % 3 + 1)} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = save_tiny_model(tmp_path / "tiny")
    return benchmark.Arguments(
        data=str(tmp_path / "rows.json"), model_path=str(model), max_length=256, threads=1, steps=3, peers="none"
    )


def test_the_counted_tokens_are_those_of_the_rows(tmp_path, args, capsys):
    model = benchmark.copy_model(Path(args.model_path), tmp_path / "model")
    sets, _ = benchmark.make_rows(args, model, tmp_path, packing=False)
    measured = benchmark.run_system(args, "ours", model, sets, tmp_path / "run")
    rows = load_from_disk(sets[False][0])
    assert len(rows) == 12 and len(measured["real_tokens"]) == 3
    assert sum(measured["real_tokens"]) == sum(map(len, rows["input_ids"]))
    assert measured["filled"] == 1 and len(measured["seconds"]) == 2
    assert measured["start_seconds"] > 1 and 100 < measured["memory_mb"] < 4000
    seconds = sum(measured["seconds"])
    assert measured["tokens_per_second"] == pytest.approx(sum(measured["real_tokens"][1:]) / seconds)
    benchmark.print_table(benchmark.summarize({"ours": [measured]}))
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
    summary = benchmark.summarize(results)
    assert summary["trl"]["tokens_per_second_ratio"] == 2 == summary["trl-packing"]["tokens_per_second_ratio"]
    assert summary["trl"]["memory_mb_ratios"] == [0.5, 2] and summary["trl"]["memory_mb_ratio"] == 1.25
    assert summary["trl-packing"]["memory_mb_ratio"] == 1 == summary["trl-packing"]["start_seconds_ratio"]
    benchmark.print_differences(results)
    assert capsys.readouterr().out.startswith("trl trained on 15 real tokens, ours on 16")


def test_a_missing_environment_is_an_error_with_its_command(args, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    args.peers = "trainer,torchtune-packing,nobody"
    with pytest.raises(ValueError) as mistakes:
        benchmark.check_arguments(args)
    assert "--peers trainer: no environment .venv-peers/trl; bash tools/install_peers.sh trl\n" in str(mistakes.value)
    assert ".venv-peers/torchtune; bash tools/install_peers.sh torchtune" in str(mistakes.value)
    assert "--peers nobody: choose from ours-packing, trl," in str(mistakes.value)
    args.peers, args.checkpointing = "litgpt", "on"
    with pytest.raises(ValueError, match="--checkpointing on: LitGPT .*leave litgpt out"):
        benchmark.check_arguments(args)


@pytest.mark.slow
def test_the_table_has_a_row_for_every_strategy(tmp_path, args):
    """Run for real on a tiny model; HFU leaves out logits without a target, and has what is computed again."""
    args.table, args.peak_flops = str(tmp_path / "table.md"), 1e9
    benchmark.make_table(args, tmp_path)
    lines = [line for line in Path(args.table).read_text().splitlines() if line.startswith("| tiny |")]
    rows = [dict(zip(benchmark.COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines]
    assert [row["strategy"] for row in rows] == [name for name, *_ in benchmark.STRATEGIES]
    assert all(float(row["tokens/s"].replace(",", "")) > 10 for row in rows)
    for row in rows:
        mfu, hfu = float(row["MFU"].rstrip("%")), float(row["HFU"].rstrip("%"))
        assert hfu > mfu if row["checkpointing"] == "yes" else hfu < mfu
        assert row["devices"] == str(len(row["peak memory of each process, MB"].split(", ")))


def test_the_weights_that_a_token_is_multiplied_with(args):
    """An untied embedding is looked up; 2 layers, h 32, MLP 64, 2 of 4 heads for keys, vocabulary 300."""
    num_weights, num_head, num_adapter = benchmark.count_weights(args)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert num_head == 300 * 32 and num_weights == num_head + 2 * sum(a * b for a, b in shapes) + 5 * 32
    assert num_adapter == 2 * 8 * sum(a + b for a, b in shapes)
