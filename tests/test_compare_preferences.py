"""benchmarks/preferences.py: it counts the tokens that the pairs hold, for ours and TRL, and mistakes have remedies."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, save_tiny_model
from preference_rows import random_answers, random_pairs, save_preferences

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare  # noqa: E402
import preferences  # noqa: E402


@pytest.fixture
def args(tmp_path) -> preferences.Arguments:
    rows = random_pairs(20)
    for row in rows[1:]:
        row["chosen_labels"] = row["chosen_ids"]
    rows[19]["prompt_ids"][0] = compare.PAD_ID
    data = save_preferences(rows, tmp_path / "all")
    model = save_tiny_model(tmp_path / "tiny")
    return preferences.Arguments(dataset_path=str(data), model_path=str(model), threads=1, steps=3)


SYSTEMS = [
    "ours",
    pytest.param(
        "trl", marks=pytest.mark.skipif(not compare.find_python("trl").is_file(), reason="install_peers.sh trl")
    ),
]


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_counted_tokens_are_those_of_both_documents_of_the_pairs(name, args, tmp_path, capsys):
    """The reference's forward, which nothing is learned from, is not counted."""
    model = compare.copy_model(Path(args.model_path), tmp_path / "model")
    sets = preferences.make_rows(args, tmp_path)
    assert "18 of 20 pairs can be compared, and 12 are used" in capsys.readouterr().out
    measured = preferences.run_system(args, name, model, sets, tmp_path / "run")
    rows = [json.loads(line) for line in Path(sets[1]).read_text().splitlines()]
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    assert len(rows) == 12 and len(measured["real_tokens"]) == 3
    assert sum(measured["real_tokens"]) == sum(lengths)
    if name == "ours":
        num_positions = sum(lengths) - sum(len(row["prompt_ids"]) for row in rows)  # each prompt once, no padding
        assert measured["filled"] == pytest.approx(sum(lengths) / num_positions)
    else:
        assert measured["filled"] < 1


def test_mistakes_are_reported_together(args, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    args.mode = "half"
    args.steps = 1
    args.dataset_path = str(save_preferences(random_answers(4), tmp_path / "answers"))
    with pytest.raises(ValueError) as mistakes:
        preferences.check_arguments(args)
    for part in ("--mode half: choose from", "--steps 1: at least 2", "no pairs of answers", "install_peers.sh trl"):
        assert part in str(mistakes.value)
