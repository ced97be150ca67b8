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
    benchmark.print_table(benchmark.summarize({"ours": [measured]}))
    assert f"| ours | 100% | {measured['tokens_per_second']:.0f} | 1.00 |" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(sets[False][1]).read_text().splitlines()]
    assert all(line["completion"] == line["output"] + "</s>" and line["output"] in "A thing. " * 3 for line in lines)


def test_a_missing_environment_is_an_error_with_its_command(args, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    args.peers = "trainer,torchtune-packing,nobody"
    with pytest.raises(ValueError) as mistakes:
        benchmark.check_arguments(args)
    assert "--peers trainer: no environment .venv-peers/trl; bash tools/install_peers.sh trl\n" in str(mistakes.value)
    assert ".venv-peers/torchtune; bash tools/install_peers.sh torchtune" in str(mistakes.value)
    assert "--peers nobody: choose from ours-packing, trl," in str(mistakes.value)
