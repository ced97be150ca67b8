"""benchmarks/strategies.py: the table has a row for every strategy, and its FLOPs are those of the weights."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import strategies  # noqa: E402


@pytest.fixture
def args(tmp_path) -> strategies.Arguments:
    rows = []
    for i in range(20):
        rows.append({"instruction": f"Name {i} things", "input": "", "output": "A thing. " * (i % 3 + 1)})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = save_tiny_model(tmp_path / "tiny")
    return strategies.Arguments(
        data=str(tmp_path / "rows.json"),
        output=str(tmp_path / "table.md"),
        model_path=str(model),
        max_length=256,
        threads=1,
        steps=3,
        peak_flops=1e9,
    )


@pytest.mark.slow
def test_the_table_has_a_row_for_every_strategy(tmp_path, args):
    """Run for real on a tiny model; HFU leaves out logits without a target, and has what is computed again."""
    strategies.make_table(args, tmp_path)
    lines = [line for line in Path(args.output).read_text().splitlines() if line.startswith("| tiny |")]
    rows = [dict(zip(strategies.COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines]
    assert [row["strategy"] for row in rows] == [strategy.name for strategy in strategies.STRATEGIES]
    for row in rows:
        assert float(row["tokens/s"].replace(",", "")) > 10
        mfu = float(row["MFU"].rstrip("%"))
        hfu = float(row["HFU"].rstrip("%"))
        is_checkpointed = row["checkpointing"] == "yes"
        assert (hfu > mfu, hfu < mfu) == (is_checkpointed, not is_checkpointed)
        assert row["devices"] == str(len(row["peak memory of each process, MB"].split(", ")))


def test_the_weights_that_a_token_is_multiplied_with(args):
    """An untied embedding is looked up; 2 layers, h 32, MLP 64, 2 of 4 heads for keys, vocabulary 300."""
    num_weights, num_head, num_adapter = strategies.count_weights(args)
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert num_head == 300 * 32 and num_weights == num_head + 2 * sum(a * b for a, b in shapes) + 5 * 32
    assert num_adapter == 2 * 8 * sum(a + b for a, b in shapes)


def test_mistakes_are_reported_together(args):
    args.steps = 1
    args.format = "csv"
    args.output = "none/such/table.md"
    with pytest.raises(ValueError) as mistakes:
        strategies.check_arguments(args)
    for part in ("--format csv: choose from", "--steps 1: at least 2", "--output none/such/table.md: no such folder"):
        assert part in str(mistakes.value)
