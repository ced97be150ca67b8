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
        peak_flops=1e8,  # so small that the shares have several digits
    )


# Of the tiny model: 2 layers, h 32, MLP 64, 2 of 4 heads for keys, vocabulary 300, an untied embedding.
SHAPES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
NUM_HEAD = 300 * 32
NUM_IN_LAYERS = 2 * sum(a * b for a, b in SHAPES) + 5 * 32


@pytest.mark.slow
def test_the_table_has_a_row_for_every_strategy(tmp_path, args):
    """Run for real on a tiny model; HFU leaves out logits without a target, and has what is computed again."""
    strategies.make_table(args, tmp_path)
    lines = [line for line in Path(args.output).read_text().splitlines() if line.startswith("| tiny |")]
    rows = [dict(zip(strategies.COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines]
    assert [row["strategy"] for row in rows] == [strategy.name for strategy in strategies.STRATEGIES]
    executed = {}
    for row in rows:
        assert float(row["tokens/s"].replace(",", "")) > 10
        executed[row["strategy"]] = float(row["HFU"].rstrip("%")) / float(row["MFU"].rstrip("%"))
        assert executed[row["strategy"]] < 1 or row["checkpointing"] == "yes"
        assert row["devices"] == str(len(row["peak memory of each process, MB"].split(", ")))
    for name in ("pp", "FSDP"):  # the forward of the layers once more
        again = executed[f"{name}, checkpointing"] - executed[name]
        assert again == pytest.approx(2 * NUM_IN_LAYERS / (6 * (NUM_HEAD + NUM_IN_LAYERS)), abs=0.01)


def test_the_weights_that_a_token_is_multiplied_with(args):
    """An untied embedding is looked up."""
    num_weights, num_head, num_adapter = strategies.count_weights(args)
    assert num_head == NUM_HEAD and num_weights == NUM_HEAD + NUM_IN_LAYERS
    assert num_adapter == 2 * 8 * sum(a + b for a, b in SHAPES)


def test_mistakes_are_reported_together(args):
    args.steps = 1
    args.format = "csv"
    args.output = "none/such/table.md"
    with pytest.raises(ValueError) as mistakes:
        strategies.check_arguments(args)
    for part in ("--format csv: choose from", "--steps 1: at least 2", "--output none/such/table.md: no such folder"):
        assert part in str(mistakes.value)
