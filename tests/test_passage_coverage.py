"""The report of what random passages see: exact against a count token by token, and the expectation against it."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, random_rows, run_script, save_rows

from data_collator import TokenizedDataset, TrainingRows

sys.path.insert(0, str(ROOT / "tools"))
from passage_coverage import count_seen, coverage, expect_seen


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    lengths = np.random.default_rng(0).integers(1, 90, 300)
    rows = [{"input_ids": [n % 300 for n in range(length)]} for length in lengths]
    return save_rows(rows, tmp_path_factory.mktemp("papers") / "set")


def test_overlapping_passages_are_counted_once():
    assert count_seen([3], 5) == 5
    assert count_seen([0, 0, 2, 20], 5) == 7 + 5


@pytest.mark.parametrize(("length", "taken", "num_draws"), [(10, 10, 1), (10, 4, 1), (10, 4, 3), (7, 1, 2), (1, 1, 1)])
def test_the_expectation_is_the_mean_over_all_ways_to_draw(length, taken, num_draws):
    starts = np.stack(np.meshgrid(*[np.arange(length - taken + 1)] * num_draws)).reshape(num_draws, -1).T
    mean = np.mean([count_seen(list(way), taken) for way in starts])
    assert expect_seen(length, taken, num_draws) == pytest.approx(mean)


def test_the_share_is_that_of_the_passages_that_training_draws(papers, tmp_path):
    save_rows(random_rows(40), tmp_path / "rows")
    dataset = TokenizedDataset(f"{papers}:10,{tmp_path}/rows:1", passage_length=16, seed=3)
    reported = coverage(dataset, 3, 3)
    tokens = [[len(f.columns["input_ids"][row]) for row in range(f.num_rows)] for f in dataset.folders]
    seen = [[np.zeros(length, bool) for length in lengths] for lengths in tokens]
    rows = TrainingRows(dataset, rows_per_step=1, num_train_epochs=3, max_steps=-1, seed=3)
    for i in range(len(rows)):
        index, num_pass = rows.locate(i)
        folder, row, taken = dataset.locate(index, num_pass)
        assert torch.equal(rows[i]["input_ids"], dataset.read(index, num_pass)["input_ids"])
        seen[dataset.folders.index(folder)][row][taken] = True
        if (i + 1) % rows.rows_per_epoch == 0:
            for number, lengths in enumerate(tokens):
                share = sum(marks.sum() for marks in seen[number]) / sum(lengths)
                assert reported[i // rows.rows_per_epoch][number][0] == pytest.approx(share)
    assert all(found == pytest.approx(expected, rel=0.03) for epoch in reported for found, expected in epoch)
    assert reported[0][1][0] < 1 and reported[1][1] == (1, 1)  # 30 of the 40 rows an epoch: all by the second


def test_it_prints_a_line_an_epoch_and_one_message_for_a_mistake(papers, tmp_path):
    printed = run_script("tools/passage_coverage.py", "--dataset_path", papers, "--num_train_epochs", 2)
    assert printed.stdout.count("after epoch") == 2 and "100.00%" in printed.stdout  # papers are shorter than 512
    mistaken = run_script("tools/passage_coverage.py", "--dataset_path", tmp_path / "none", check=False)
    assert mistaken.returncode == 1 and mistaken.stderr.endswith("data_sample/tokenize_dataset.py\n")
    assert mistaken.stderr.startswith("error: --dataset_path") and "Traceback" not in mistaken.stderr
