"""The shared module: reading a set, the order of rows, collation, attention inside documents, the loss in chunks."""

import copy
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn.attention.varlen
import transformers
from accelerate import dispatch_model
from accelerate.data_loader import prepare_data_loader
from conftest import make_tokenizer, random_rows, save_rows, save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import data_collator
import finetune_pp
import finetune_pp_peft
from data_collator import (
    IGNORE_INDEX,
    TARGETS_PER_CHUNK,
    DataCollator,
    LossHead,
    TokenizedDataset,
    TrainingRows,
    add_loss_head,
    attend_inside_documents,
    check_document_attention,
    computes_plain_logits,
    document_attention,
    filler_row,
    num_targets,
    summed_cross_entropy,
    summed_loss,
    vocabulary_hash,
)
from data_sample import tokenize_dataset
from data_sample.rendering import fingerprint_tokenizer

few_examples = settings(deadline=None, max_examples=60)


# -------------------------------------------------------------------------------------------------------------------
# Reading a set
# -------------------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = random_rows(5)
    dataset = TokenizedDataset(save_rows(rows, tmp_path / "set"))
    assert len(dataset) == 5 and not dataset.packed
    assert [{name: ids.tolist() for name, ids in row.items()} for row in dataset] == rows
    assert {ids.dtype for ids in dataset[0].values()} == {torch.int64}
    assert [dataset.num_tokens(i) for i in range(5)] == [len(row["input_ids"]) for row in rows]


def test_columns_of_other_programs_are_not_handed_to_the_model(tmp_path):
    rows = [row | {"options": row["input_ids"]} for row in random_rows(2)]
    assert set(TokenizedDataset(save_rows(rows, tmp_path / "set"))[0]) == {"input_ids", "labels"}


def test_a_filler_has_one_token_and_no_target(tmp_path):
    rows = TokenizedDataset(save_rows(random_rows(2), tmp_path / "rows"))
    packed = TokenizedDataset(save_rows(pack([random_rows(2)]), tmp_path / "packed"))
    assert packed.packed
    filler = filler_row(packed=False)
    assert {name: ids.tolist() for name, ids in filler.items()} == {"input_ids": [0], "labels": [IGNORE_INDEX]}
    assert filler.keys() == rows[0].keys()
    packed_filler = filler_row(packed=True)
    assert packed_filler["position_ids"].tolist() == [0]
    assert packed_filler.keys() == packed[0].keys()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; make it with .*tokenize_dataset.py"):
        TokenizedDataset(tmp_path / "none")


def test_a_set_that_was_not_finished_is_an_error(tmp_path):
    (save_rows(random_rows(2), tmp_path / "set") / "ledger.json").unlink()
    with pytest.raises(FileNotFoundError, match="no ledger.json"):
        TokenizedDataset(tmp_path / "set")


def test_a_missing_column_is_named(tmp_path):
    rows = [{"text": row["input_ids"], "labels": row["labels"]} for row in random_rows(2)]
    with pytest.raises(ValueError, match="no column input_ids .*text"):
        TokenizedDataset(save_rows(rows, tmp_path / "set"))


def test_whole_documents_are_an_error_unless_passages_are_drawn_from_them(tmp_path):
    folder = save_documents([[1, 2, 3]], tmp_path / "papers")
    with pytest.raises(ValueError, match="no column labels .* whole documents; .*--random_passage True"):
        TokenizedDataset(folder)
    rows = TokenizedDataset(save_rows(random_rows(2), tmp_path / "rows"), passage_length=8)
    with pytest.raises(ValueError, match="--random_passage True: .* whole documents, which .*--format text writes"):
        TrainingRows(rows, rows_per_step=1, num_train_epochs=1, max_steps=-1, seed=42)


def test_a_set_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        TokenizedDataset(save_rows([], tmp_path / "set"))


def test_a_set_without_targets_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no token in it is a target"):
        TokenizedDataset(save_rows(random_rows(2), tmp_path / "set", {"targets": 0}))


def test_a_row_longer_than_the_models_context_is_refused(tmp_path):
    """A packed row may be longer: each of its documents begins at position 0. Of a document a passage is drawn."""
    config = LlamaConfig(vocab_size=300, max_position_embeddings=16)
    ids = list(range(3, 23))
    rows = [{"input_ids": ids[:5], "labels": ids[:5]}, {"input_ids": ids, "labels": ids}]
    long = save_rows(rows, tmp_path / "long")
    with pytest.raises(ValueError, match="a row has 20 tokens, and the model can attend to 16; .*--max_length 16"):
        TokenizedDataset(long, config)
    with pytest.raises(ValueError, match=f"{long}: a row has 20 tokens"):
        TokenizedDataset(f"{save_rows(rows[:1], tmp_path / 'short')}:1,{long}:1", config)
    assert len(TokenizedDataset(save_rows(rows[:1], tmp_path / "again"), config)) == 1
    assert len(TokenizedDataset(long, LlamaConfig(vocab_size=300, max_position_embeddings=20))) == 2
    no_limit = transformers.BloomConfig(vocab_size=300)  # ALiBi: its configuration names none
    assert len(TokenizedDataset(long, no_limit)) == 2

    packed = {"input_ids": ids, "labels": ids, "position_ids": [*range(8), *range(12)]}
    assert len(TokenizedDataset(save_rows([packed], tmp_path / "packed"), config)) == 1
    packed["position_ids"] = [*range(3), *range(17)]
    with pytest.raises(ValueError, match="a row has 17 tokens"):
        TokenizedDataset(save_rows([packed], tmp_path / "packed-long"), config)

    documents = save_rows([{"input_ids": ids}], tmp_path / "documents")
    assert len(TokenizedDataset(documents, config, passage_length=16)) == 1
    with pytest.raises(ValueError, match="a row has 18 tokens, .*--passage_length 16"):
        TokenizedDataset(documents, config, passage_length=18)


@pytest.mark.parametrize("wrong_id", [300, 2**31 - 1, -1])
def test_an_id_outside_the_vocabulary_is_an_error(tmp_path, wrong_id):
    rows = random_rows(3)
    rows[1]["input_ids"][-1] = wrong_id
    folder = save_rows(rows, tmp_path / "set")
    with pytest.raises(ValueError, match=f"{wrong_id} .*vocabulary of 300"):
        TokenizedDataset(folder, LlamaConfig(vocab_size=300))


def test_the_last_id_of_the_vocabulary_is_accepted(tmp_path):
    rows = random_rows(3)
    rows[1]["input_ids"][:2] = [0, 299]
    assert len(TokenizedDataset(save_rows(rows, tmp_path / "set"), LlamaConfig(vocab_size=300))) == 3


def test_a_set_made_with_another_tokenizer_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    other = make_tokenizer()
    other.add_tokens(["<another>"])
    folder = save_rows(random_rows(2), tmp_path / "set", {"vocabulary_sha256": vocabulary_hash(tokenizer)})
    assert len(TokenizedDataset(folder, tokenizer=tokenizer)) == 2
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenizedDataset(folder, tokenizer=other)


def test_a_set_made_with_a_tokenizer_that_behaves_otherwise_is_an_error(tmp_path):
    """The same vocabulary, and another space before the first word: every row would begin wrongly."""
    tokenizer = make_tokenizer()
    ledger = {"vocabulary_sha256": vocabulary_hash(tokenizer), "template": {"format": "alpaca", "chat": False}}
    ledger["tokenizer_fingerprint"] = fingerprint_tokenizer(tokenizer)
    folder = save_rows(random_rows(2), tmp_path / "set", ledger)
    assert len(TokenizedDataset(folder, tokenizer=tokenizer)) == 2
    tokenizer.chat_template = "{{ messages[0].content }}"  # the set has no text of one
    assert len(TokenizedDataset(folder, tokenizer=tokenizer)) == 2
    other = make_tokenizer(adds_bos=False)
    with pytest.raises(ValueError, match="behaves otherwise: 'Hello world' is .* there and .* here; tokenize again"):
        TokenizedDataset(folder, tokenizer=other)


# -------------------------------------------------------------------------------------------------------------------
# The parts of a set
# -------------------------------------------------------------------------------------------------------------------

PART = {"format": "alpaca", "input_sha256": "a", "max_length": 512, "template": {"format": "alpaca"}, "targets": 10}


def save_parts(folder: Path, sizes: list[int], name: str = "out", ledgers: dict | None = None) -> list[dict]:
    """Folders as --shard writes them. Returns the rows of all of them in their order."""
    rows = random_rows(sum(sizes))
    start = 0
    for number, size in enumerate(sizes, 1):
        ledger = PART | {"sha256": f"hash {number}", "shard": f"{number}/{len(sizes)}"}
        if ledgers and number in ledgers:
            ledger |= ledgers[number]
        save_rows(rows[start : start + size], folder / f"{name}-{number}-of-{len(sizes)}", ledger)
        start += size
    return rows


@pytest.mark.parametrize("name", ["out", "out/", "out-*-of-4", "out-*-of-*"])
def test_the_parts_of_a_set_are_read_as_one_and_each_row_once_an_epoch(tmp_path, name):
    rows = save_parts(tmp_path, [60, 3, 3, 3])
    save_parts(tmp_path, [5], name="out_val")
    dataset = TokenizedDataset(f"{tmp_path}/{name}")
    assert [{name: ids.tolist() for name, ids in row.items()} for row in dataset] == rows
    training_rows = TrainingRows(dataset, rows_per_step=3, num_train_epochs=1, max_steps=-1, seed=42)
    assert len(training_rows) == 69
    found = [training_rows[i]["input_ids"].tolist() for i in range(69)]
    assert sorted(found) == sorted(row["input_ids"] for row in rows)
    assert found != [row["input_ids"] for row in rows]
    assert dataset.ledger["sha256"] == ["hash 1", "hash 2", "hash 3", "hash 4"]
    assert dataset.ledger["targets"] == 40 and dataset.ledger["template"] == PART["template"]
    assert [Path(part).name for part in dataset.ledger["parts"]] == [f"out-{number}-of-4" for number in range(1, 5)]


def test_more_than_nine_parts_stand_in_the_order_of_their_numbers(tmp_path):
    rows = save_parts(tmp_path, [1] * 11)
    assert [row["input_ids"].tolist() for row in TokenizedDataset(tmp_path / "out")] == [r["input_ids"] for r in rows]


def test_a_part_may_have_no_rows_and_all_parts_must_not(tmp_path):
    rows = save_parts(tmp_path, [0, 4, 0])
    assert len(TokenizedDataset(tmp_path / "out")) == len(rows) == 4
    save_parts(tmp_path, [0, 0], name="none")
    with pytest.raises(ValueError, match="no rows"):
        TokenizedDataset(tmp_path / "none")


def test_a_folder_of_that_name_goes_before_parts_and_one_part_can_be_named(tmp_path):
    save_parts(tmp_path, [2, 3])
    assert len(TokenizedDataset(tmp_path / "out-2-of-2")) == 3
    save_rows(random_rows(7), tmp_path / "out")
    assert len(TokenizedDataset(tmp_path / "out")) == 7


def test_parts_are_mixed_with_other_sets_as_one_set(tmp_path):
    save_parts(tmp_path, [4, 2])
    save_rows(random_rows(10), tmp_path / "general")
    dataset = TokenizedDataset(f"{tmp_path}/out:3,{tmp_path}/general:1")
    assert dataset.rows_per_epoch == [6, 2]
    assert dataset.ledger["sha256"][0] == [["hash 1", "hash 2"], 6]


@pytest.mark.parametrize("name", ["out", "out-*-of-3"])
def test_a_missing_part_is_an_error_that_names_it(tmp_path, name):
    save_parts(tmp_path, [2, 2, 2])
    (tmp_path / "out-2-of-3").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="out-2-of-3 is missing; make it with .*--shard 2/3"):
        TokenizedDataset(tmp_path / name)


def test_parts_of_two_sets_are_not_mixed(tmp_path):
    save_parts(tmp_path, [2, 2])
    save_parts(tmp_path, [2, 2, 2])
    with pytest.raises(ValueError, match=r"parts of 2 and of 3; name one set, such as .*out-\*-of-3"):
        TokenizedDataset(tmp_path / "out")
    assert len(TokenizedDataset(tmp_path / "out-*-of-2")) == 4
    for mix in ("out-1-of-2,{}/out-2-of-2", "out-*-of-2:1,{}/out-2-of-2:3"):
        with pytest.raises(ValueError, match="mixes parts of one set; name the set, .*/out, and all its parts"):
            TokenizedDataset(f"{tmp_path}/{mix.format(tmp_path)}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("template", {"format": "alpaca", "date": "2026-01-02"}), ("max_length", 9), ("input_sha256", "b")],
)
def test_parts_that_were_made_with_other_flags_are_an_error(tmp_path, name, value):
    save_parts(tmp_path, [2, 2], ledgers={2: {name: value}})
    with pytest.raises(ValueError, match=f"its parts differ in {name}, so they are not parts of one set"):
        TokenizedDataset(tmp_path / "out")


def test_the_parts_that_the_program_writes_are_the_whole_set(tmp_path):
    tokenizer = make_tokenizer()
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"instruction": f"Say {i}.", "output": str(i)}) + "\n" for i in range(10)))
    for shard in ("1/1", "1/4", "2/4", "3/4", "4/4"):
        args = tokenize_dataset.Arguments(input=str(raw), format="alpaca", output=str(tmp_path / "set"), shard=shard)
        if shard == "1/1":
            args.output = str(tmp_path / "whole")
        tokenize_dataset.check_arguments(args)
        tokenize_dataset.build(args, copy.deepcopy(tokenizer))
    whole = TokenizedDataset(tmp_path / "whole", tokenizer=tokenizer)
    parts = TokenizedDataset(tmp_path / "set", tokenizer=tokenizer)
    assert sorted(row["input_ids"].tolist() for row in parts) == sorted(row["input_ids"].tolist() for row in whole)
    assert parts.ledger["targets"] == whole.ledger["targets"]


# -------------------------------------------------------------------------------------------------------------------
# The order of rows
# -------------------------------------------------------------------------------------------------------------------

FILLER = "filler"


class NumberedRows:
    """Folders of these sizes, as much of a TokenizedDataset as TrainingRows needs; a row is (its number, its pass)."""

    packed = False
    has_documents = False
    passage_length = 0

    def __init__(self, *sizes: int, rows_per_epoch: list[int] | None = None):
        self.folders = [SimpleNamespace(num_rows=size) for size in sizes]
        self.rows_per_epoch = rows_per_epoch or list(sizes)
        self.first_rows = [0, *np.cumsum(sizes).tolist()]

    def __len__(self) -> int:
        return self.first_rows[-1]

    def filler_row(self) -> dict:
        return data_collator.filler_row(self.packed)

    def read(self, index: int, num_pass: int) -> tuple[int, int]:
        return index, num_pass

    def num_tokens(self, index: int) -> int:
        return 100 + index


def is_filler(row) -> bool:
    return isinstance(row, dict)  # the others are (number, pass)


def order(num_rows: int, rows_per_step: int = 1, seed: int = 42, epoch: int = 0) -> list:
    """The numbers of the rows of an epoch, and FILLER for those that complete its last step."""
    rows = TrainingRows(NumberedRows(num_rows), rows_per_step, epoch + 1, max_steps=-1, seed=seed)
    num_items = rows.steps_per_epoch * rows_per_step
    assert len(rows) == (epoch + 1) * num_items
    items = []
    for i in range(epoch * num_items, (epoch + 1) * num_items):
        if is_filler(rows[i]):
            items.append(FILLER)
        else:
            number, num_pass = rows[i]
            assert num_pass == epoch
            items.append(number)
    return items


def test_the_order_is_given_by_seed_and_epoch_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    assert order(10) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]  # the same on every machine, or a run could not move
    assert order(10, rows_per_step=5) == order(10)
    assert len({tuple(order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}) == 25


@few_examples
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32), st.integers(0, 1000))
def test_every_row_comes_once_an_epoch_and_fillers_only_at_the_end(num_rows, rows_per_step, seed, epoch):
    items = order(num_rows, rows_per_step, seed, epoch)
    assert sorted(items[:num_rows]) == list(range(num_rows))
    assert items[num_rows:] == [FILLER] * (-num_rows % rows_per_step)
    assert len(items) % rows_per_step == 0


@pytest.mark.parametrize(
    ("num_train_epochs", "max_steps", "num_steps"), [(1, -1, 3), (1.5, -1, 5), (0.1, -1, 1), (3, 7, 7), (1, 7, 7)]
)
def test_a_run_has_the_steps_that_were_asked_for(num_train_epochs, max_steps, num_steps):
    rows = TrainingRows(NumberedRows(10), 4, num_train_epochs, max_steps, seed=42)
    assert rows.steps_per_epoch == 3  # of 4, 4 and 2 rows
    assert rows.num_steps == num_steps
    assert len(rows) == num_steps * 4


@few_examples
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 9))
def test_a_step_is_made_of_consecutive_rows_and_its_tokens_are_theirs(sizes, rows_per_step, seed):
    dataset = NumberedRows(*sizes)
    rows = TrainingRows(dataset, rows_per_step, num_train_epochs=3, max_steps=-1, seed=seed)
    for step in range(rows.num_steps):
        items = [rows[i] for i in range(step * rows_per_step, (step + 1) * rows_per_step)]
        assert list(map(str, rows.step(step))) == list(map(str, items))
        real = [row for row in items if not is_filler(row)]
        assert rows.num_tokens(step) == sum(dataset.num_tokens(number) for number, _ in real)
        assert len(real) == rows_per_step or (step + 1) % rows.steps_per_epoch == 0


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 4), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_any_number_of_processes_trains_the_same_rows_in_the_same_step(num_ranks, batch_size):
    """As accelerate shards the rows when they are read in sequence, which is what the Trainer scripts do."""
    rows = TrainingRows(NumberedRows(29), rows_per_step=12, num_train_epochs=2, max_steps=-1, seed=7)
    ranks = []
    for rank in range(num_ranks):
        loader = DataLoader(rows, batch_size, shuffle=False, collate_fn=list)
        sharded = prepare_data_loader(loader, num_processes=num_ranks, process_index=rank, put_on_device=False)
        ranks.append(list(sharded))
    batches_per_step = 12 // (num_ranks * batch_size)
    assert {len(batches) for batches in ranks} == {rows.num_steps * batches_per_step}
    for step in range(rows.num_steps):
        trained = []
        for batches in ranks:
            for batch in batches[step * batches_per_step : (step + 1) * batches_per_step]:
                trained.extend(batch)
        assert sorted(map(str, trained)) == sorted(map(str, rows.step(step)))


# -------------------------------------------------------------------------------------------------------------------
# Several folders by weight
# -------------------------------------------------------------------------------------------------------------------


@few_examples
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=3), st.integers(0, 9))
def test_a_mix_draws_the_share_of_each_folder_and_none_again_before_the_rest(folders, seed):
    sizes = [size for size, _ in folders]
    shares = sizes[:1] + [share for _, share in folders[1:]]
    dataset = NumberedRows(*sizes, rows_per_epoch=shares)
    rows = TrainingRows(dataset, rows_per_step=4, num_train_epochs=4, max_steps=-1, seed=seed)
    drawn = [[] for _ in sizes]
    for epoch in range(4):
        first_step = epoch * rows.steps_per_epoch
        items = [row for step in range(rows.steps_per_epoch) for row in rows.step(first_step + step)]
        items = [row for row in items if not is_filler(row)]
        for folder, share in enumerate(shares):
            numbers = range(dataset.first_rows[folder], dataset.first_rows[folder + 1])
            of_folder = [row for row in items if row[0] in numbers]
            assert len(of_folder) == share
            drawn[folder].extend(of_folder)
    for folder, size in enumerate(sizes):
        assert len(set(drawn[folder])) == len(drawn[folder]) == 4 * shares[folder]  # no row twice in a pass
        rows_of_pass = np.bincount([num_pass for _, num_pass in drawn[folder]])
        assert (rows_of_pass[:-1] == size).all()  # every pass but the last is whole
        assert 0 < rows_of_pass[-1] <= size


def test_a_mix_is_read_from_its_folders_and_weights(tmp_path):
    many = random_rows(12, seed=1)
    few = random_rows(3, seed=2)
    save_rows(many, tmp_path / "medical")
    save_rows(few, tmp_path / "general")
    mix = f"{tmp_path}/medical:3,{tmp_path}/general:1"
    dataset = TokenizedDataset(mix)
    assert [folder.num_rows for folder in dataset.folders] == [12, 3]
    assert dataset.rows_per_epoch == [12, 4]
    assert [row["input_ids"].tolist() for row in dataset] == [row["input_ids"] for row in many + few]
    assert dataset.ledger["mix"] == {f"{tmp_path}/medical": 3, f"{tmp_path}/general": 1}
    assert TokenizedDataset(f"{tmp_path}/general, {tmp_path}/medical").rows_per_epoch == [3, 3]
    assert TokenizedDataset(f"{tmp_path}/medical:1,{tmp_path}/general:0.001").rows_per_epoch == [12, 1]
    other = TokenizedDataset(mix.replace(":1", ":2"))
    assert dataset.ledger["sha256"] != other.ledger["sha256"]  # no run goes on with other weights

    rows = TrainingRows(dataset, 4, num_train_epochs=1, max_steps=-1, seed=42)
    trained = [rows[i]["input_ids"].tolist() for i in range(len(rows))]
    expected = [row["input_ids"] for row in many]
    assert sorted(ids for ids in trained if ids in expected) == sorted(expected)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("{0}/rows,{0}/none:2", "none: no such folder"),
        ("{0}/rows:0,{0}/other:1", "weight above 0"),
        ("{0}/rows,{0}/rows:2", "each folder once"),
        ("{0}/rows,,{0}/other", "each folder once"),
        ("{0}/rows:1.2.3,{0}/other", "1.2.3"),
    ],
)
def test_a_mix_that_is_wrong_is_named(tmp_path, mix, message):
    save_rows(random_rows(3), tmp_path / "rows")
    save_rows(random_rows(3), tmp_path / "other")
    with pytest.raises((ValueError, OSError), match=message):
        TokenizedDataset(mix.format(tmp_path))


def test_packed_and_unpacked_rows_mix(tmp_path):
    save_rows(pack([random_rows(4)]), tmp_path / "packed")
    save_rows(random_rows(2), tmp_path / "rows")
    dataset = TokenizedDataset(f"{tmp_path}/rows,{tmp_path}/packed")
    assert dataset.packed
    assert dataset[0]["position_ids"].tolist() == list(range(len(dataset[0]["input_ids"])))
    batch = DataCollator(padding_free=True)([dataset[0], dataset[2], filler_row(packed=True)])
    assert (batch["position_ids"] == 0).sum() == 1 + 4 + 1


# -------------------------------------------------------------------------------------------------------------------
# Random passages
# -------------------------------------------------------------------------------------------------------------------


def save_documents(documents: list[list[int]], folder: Path) -> Path:
    return save_rows([{"input_ids": ids} for ids in documents], folder)


def passages(dataset: TokenizedDataset, index: int, num_passes: int) -> list[list[int]]:
    return [dataset.read(index, num_pass)["input_ids"].tolist() for num_pass in range(num_passes)]


def test_every_start_is_drawn_and_none_beyond_the_last(tmp_path):
    dataset = TokenizedDataset(save_documents([list(range(10))], tmp_path / "papers"), passage_length=4)
    drawn = passages(dataset, 0, 700)
    starts = np.bincount([ids[0] for ids in drawn], minlength=7)
    assert all(ids == list(range(ids[0], ids[0] + 4)) for ids in drawn)
    assert len(starts) == 7  # 0 to 6, where the passage ends with the document
    assert ((starts - 100) ** 2 / 100).sum() < 22.5  # chi-squared with 6 degrees of freedom: p = 0.001


@pytest.mark.parametrize("length", [1, 3, 4, 5])
def test_a_document_about_as_long_as_the_passage_is_used_whole(tmp_path, length):
    folder = save_documents([list(range(10)), list(range(length))], tmp_path / "papers")
    dataset = TokenizedDataset(folder, passage_length=4)
    assert {len(ids) for ids in passages(dataset, 1, 20)} == {min(length, 4)}
    batch = DataCollator(padding_free=False)([dataset[0], dataset[1]])
    assert num_targets(batch) == 3 + min(length, 4) - 1  # every token but the first, and none of the padding
    assert [dataset.num_tokens(index) for index in (0, 1)] == [4, min(length, 4)]


def test_passages_are_given_by_seed_pass_and_document_alone(tmp_path):
    folder = save_documents([list(range(100, 300)) for _ in range(8)], tmp_path / "papers")
    dataset = TokenizedDataset(folder, passage_length=16, seed=7)
    again = TokenizedDataset(folder, passage_length=16, seed=7)
    other_seed = TokenizedDataset(folder, passage_length=16, seed=8)
    np.random.seed(1)
    torch.manual_seed(1)
    draws = [(index, num_pass) for num_pass in range(3) for index in range(8)]
    expected = [dataset.read(*draw)["input_ids"].tolist() for draw in draws]
    assert [again.read(*draw)["input_ids"].tolist() for draw in reversed(draws)] == expected[::-1]
    assert [other_seed.read(*draw)["input_ids"].tolist() for draw in draws] != expected
    assert len({ids[0] for ids in expected}) > 15  # documents and passes differ


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> Path:
    lengths = np.random.default_rng(0).integers(1, 60, 11)
    return save_documents([list(range(n)) for n in lengths], tmp_path_factory.mktemp("papers") / "set")


def test_other_processes_and_resumed_runs_read_the_same_passages(papers):
    def start_run() -> TrainingRows:
        dataset = TokenizedDataset(papers, passage_length=16, seed=42)
        return TrainingRows(dataset, rows_per_step=4, num_train_epochs=3, max_steps=-1, seed=42)

    rows = start_run()
    expected = [row["input_ids"].tolist() for step in range(rows.num_steps) for row in rows.step(step)]
    loader = DataLoader(start_run(), batch_size=None, num_workers=2)  # other processes
    assert [row["input_ids"].tolist() for row in loader] == expected
    resumed = [row["input_ids"].tolist() for row in start_run().step(7)]
    assert resumed == expected[4 * 7 : 4 * 8]
    num_tokens = [rows.num_tokens(step) for step in range(rows.num_steps)]
    num_fillers = 3 * 1  # 11 rows in three steps of 4
    assert sum(num_tokens) == sum(map(len, expected)) - num_fillers


def test_documents_and_rows_with_labels_mix(tmp_path, papers):
    save_rows(random_rows(5), tmp_path / "instructions")
    dataset = TokenizedDataset(f"{papers}:2,{tmp_path}/instructions:1", passage_length=16)
    rows = TrainingRows(dataset, rows_per_step=17, num_train_epochs=1, max_steps=-1, seed=0).step(0)
    whole = [row for row in rows if torch.equal(row["input_ids"], row["labels"])]
    assert len(rows) == 17
    assert len(whole) == 11  # 11 passages; 6 of 5 rows, one of them twice


# -------------------------------------------------------------------------------------------------------------------
# Collation
# -------------------------------------------------------------------------------------------------------------------


def tensors(rows: list[dict]) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]


def pack(groups: list[list[dict]]) -> list[dict]:
    """One packed row of each group of documents."""
    packed = []
    for group in groups:
        row = {"input_ids": [], "labels": [], "position_ids": []}
        for document in group:
            row["input_ids"].extend(document["input_ids"])
            row["labels"].extend(document["labels"])
            row["position_ids"].extend(range(len(document["input_ids"])))
        packed.append(row)
    return packed


def make_documents(num_documents: int = 7, seed: int = 3, vocab_size: int = 300) -> list[dict]:
    """Documents of unequal length; in every other one each token is labelled, as with --train_on_prompt True."""
    documents = random_rows(num_documents, seed, vocab_size=vocab_size)
    for document in documents[1::2]:
        document["labels"] = list(document["input_ids"])
    return documents


PADDED_FORMS = ["padded", "packed, padded"]
PADDING_FREE_FORMS = ["padding-free", "packed, padding-free"]
FORMS = PADDED_FORMS + PADDING_FREE_FORMS


def collate(form: str, documents: list[dict]) -> dict[str, torch.Tensor | int]:
    """The batch of the documents in a form that training knows."""
    if form.startswith("packed"):
        documents = pack([documents[:1], documents[1:4], documents[4:]])
    return DataCollator(padding_free=form in PADDING_FREE_FORMS)(tensors(documents))


def one_by_one(documents: list[dict]) -> list[dict[str, torch.Tensor]]:
    return [DataCollator(padding_free=False)([row]) for row in tensors(documents)]


def targets_with_context(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """For each target of a batch: the tokens of its document before it, as far as positions tell, and itself."""
    found = []
    for row, labels in enumerate(batch["labels"]):
        for place in torch.nonzero(labels[1:] != IGNORE_INDEX).flatten() + 1:
            first = 0
            if "position_ids" in batch:
                first = place - 1 - batch["position_ids"][row, place - 1]
            found.append((*batch["input_ids"][row, first:place].tolist(), int(labels[place])))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_targets_behind_the_same_tokens(form):
    documents = make_documents()
    expected = []
    for row in documents:
        for place in range(1, len(row["labels"])):
            if row["labels"][place] != IGNORE_INDEX:
                expected.append((*row["input_ids"][:place], row["labels"][place]))
    batch = collate(form, documents)
    assert targets_with_context(batch) == expected
    assert num_targets(batch) == len(expected)
    if form in PADDING_FREE_FORMS:
        assert batch["shift_labels"].tolist() == [[target[-1] for target in expected]]
        assert batch["input_ids"][0, batch["logits_to_keep"]].tolist() == [target[-2] for target in expected]


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_of_a_document_is_never_a_target(form):
    documents = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(5)]
    batch = collate(form, documents)
    assert num_targets(batch) == 5 * 2
    assert (batch["labels"] != 5).all()


def test_padding_free_wastes_no_position_and_restarts_positions():
    documents = tensors([{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 1, 4)])
    batch = DataCollator(padding_free=True)(documents)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 1, 2, -100, -100, 1, 2, 3]]
    assert batch["logits_to_keep"].tolist() == [0, 1, 4, 5, 6]
    assert batch["shift_labels"].tolist() == [[1, 2, 1, 2, 3]]
    assert "attention_mask" not in batch  # with one, transformers would not look for joined documents


@few_examples
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 3),
    st.booleans(),
)
def test_the_borders_of_a_padding_free_batch_are_those_of_its_documents(rows, num_fillers, is_packed):
    """`rows` are the lengths of the documents of each row; a filler is a document of one token."""
    groups = []
    for lengths in rows:
        groups.append([{"input_ids": list(range(n)), "labels": [IGNORE_INDEX] * n} for n in lengths])
    if is_packed:
        batch_rows = tensors(pack(groups))
    else:
        batch_rows = tensors([document for group in groups for document in group])
    batch_rows += [filler_row(is_packed)] * num_fillers
    lengths = [n for row in rows for n in row] + [1] * num_fillers
    batch = DataCollator(padding_free=True)(batch_rows)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, *np.cumsum(lengths)]
        assert batch[name].dtype == torch.int32  # the kernels take no other
    for name in ("max_length_q", "max_length_k"):
        assert batch[name] == max(lengths)
        assert type(batch[name]) is int  # a tensor would have the GPU waited for


def test_masks_come_from_lengths_even_where_tokens_look_like_padding():
    rows = tensors([{"input_ids": [0, 2, 0, 2], "labels": [0, 2, 0, 2]}, {"input_ids": [0, 2], "labels": [-100, 2]}])
    batch = DataCollator(padding_free=False)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 0, 2], [-100, 2, -100, -100]]
    assert batch["input_ids"].tolist() == [[0, 2, 0, 2], [0, 2, 0, 0]]
    batch = DataCollator(padding_free=True)(rows)
    assert batch["shift_labels"].tolist() == [[2, 0, 2, 2]]


def test_padding_of_a_packed_row_is_a_document_of_its_own():
    documents = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3], [4, 5], [6, 7])]
    batch = DataCollator(padding_free=False)(tensors(pack([documents[:2], documents[2:]])))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]
    assert "attention_mask" not in batch


# -------------------------------------------------------------------------------------------------------------------
# What the model makes of a batch
# -------------------------------------------------------------------------------------------------------------------


def load(folder: Path, attention: str = "documents", dtype: torch.dtype = torch.float32):
    """A model whose attention is "documents", this toolkit's for padding-free batches, or one of transformers'."""
    kernel = attention
    if attention == "documents":
        kernel = None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=kernel)
    if attention == "documents":
        attend_inside_documents(model)
    assert model.config._attn_implementation == attention
    return model


def loss_of_logits(model, batch: dict) -> torch.Tensor:
    """The summed loss in the model's own precision: transformers computes it in float32."""
    logits = model(**batch, use_cache=False).logits
    targets = batch.get("shift_labels")
    if targets is None:
        logits = logits[:, :-1]
        targets = batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def loss_and_gradients(model, batches: list[dict], compute_loss=loss_of_logits) -> tuple[float, dict]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = compute_loss(model, batch)
        loss.backward()
        total += loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return total, gradients


def assert_same(found: tuple[float, dict], expected: tuple[float, dict], tolerance: float) -> None:
    """Losses and gradients; each gradient relative to its norm, one that is all but zero to the largest."""
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    assert largest > 0
    for name, gradient in expected_gradients.items():
        scale = max(gradient.norm(), 1e-3 * largest)
        assert (gradients[name] - gradient).norm() <= tolerance * scale, name


ATTENTIONS = [(attention, form) for attention in ("sdpa", "eager") for form in FORMS]
ATTENTIONS += [("documents", form) for form in PADDING_FREE_FORMS]
all_attentions = pytest.mark.parametrize(("attention", "form"), ATTENTIONS)


@all_attentions
def test_every_form_gives_the_loss_and_gradients_of_the_documents_one_by_one(tiny_model, attention, form):
    alone = load(tiny_model, "sdpa", torch.float64)
    expected = loss_and_gradients(alone, one_by_one(make_documents()))
    assert all(gradient.norm() > 0 for gradient in expected[1].values())
    model = load(tiny_model, attention, torch.float64)
    tolerance = 1e-10
    if attention == "eager":
        tolerance = 1e-5  # its softmax is float32
    assert_same(loss_and_gradients(model, [collate(form, make_documents())]), expected, tolerance)


@all_attentions
def test_the_loss_that_transformers_computes_is_the_same_in_every_form(tiny_model, attention, form):
    model = load(tiny_model, attention)
    batches = one_by_one(make_documents())
    expected = sum(finetune_pp.loss_of_model(load(tiny_model, "sdpa"), batch).item() for batch in batches)
    loss = finetune_pp.loss_of_model(model, collate(form, make_documents())).item()
    assert loss == pytest.approx(expected, rel=1e-6)


def logits_of_documents(model, form: str, documents: list[dict]) -> list[torch.Tensor]:
    """The logits [length, vocabulary] of each document."""
    inputs = collate(form, documents)
    for name in ("labels", "shift_labels", "logits_to_keep"):
        inputs.pop(name, None)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    lengths = [len(row["input_ids"]) for row in documents]
    if form in PADDING_FREE_FORMS:
        return list(logits[0].split(lengths))
    if form == "padded":
        return [row[:length] for row, length in zip(logits, lengths, strict=True)]
    parts = []
    for row, sizes_ in zip(logits, [lengths[:1], lengths[1:4], lengths[4:]], strict=True):
        parts.extend(row[: sum(sizes_)].split(sizes_))
    return parts


@all_attentions
def test_packed_documents_do_not_see_each_other(tiny_model, attention, form):
    model = load(tiny_model, attention)
    documents = make_documents()
    before = logits_of_documents(model, form, documents)
    assert len(before) == 7
    for changed in range(7):
        others = copy.deepcopy(documents)
        others[changed]["input_ids"][0] = others[changed]["input_ids"][0] % 290 + 5
        after = logits_of_documents(model, form, others)
        moved = [i for i in range(7) if not torch.equal(before[i], after[i])]
        assert moved == [changed]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_tokens_are_never_attended_to(tiny_model, attention):
    model = load(tiny_model, attention)
    for rows in (tensors(make_documents(2)), tensors(pack([make_documents(3), make_documents(1)]))):
        batch = DataCollator(padding_free=False)(rows)
        del batch["labels"]
        lengths = [len(row["input_ids"]) for row in rows]
        logits = []
        for padding in (0, 2, 77):
            for ids, length in zip(batch["input_ids"], lengths, strict=True):
                ids[length:] = padding
            with torch.no_grad():
                output = model(**batch, use_cache=False).logits
            logits.append(torch.cat([row[:length] for row, length in zip(output, lengths, strict=True)]))
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])


# -------------------------------------------------------------------------------------------------------------------
# Attention inside documents
# -------------------------------------------------------------------------------------------------------------------


def sizes(**others) -> dict:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 1} | heads | others


MODELS = {
    "llama": (transformers.LlamaConfig, sizes(), "documents"),
    "mistral, window": (transformers.MistralConfig, sizes(sliding_window=4), "documents"),
    "qwen2": (transformers.Qwen2Config, sizes(), "documents"),
    "qwen3": (transformers.Qwen3Config, sizes(head_dim=8), "documents"),
    "gemma3, every other layer a window": (
        transformers.Gemma3TextConfig,
        sizes(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        "documents",
    ),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "documents"),
    "gpt_neox": (transformers.GPTNeoXConfig, sizes(), "documents"),
    "phi": (transformers.PhiConfig, sizes(), "documents"),
    "cohere2, window": (transformers.Cohere2Config, sizes(sliding_window=4), "documents"),
    "mixtral": (transformers.MixtralConfig, sizes(num_local_experts=4), "documents"),
    "qwen3 moe": (
        transformers.Qwen3MoeConfig,
        sizes(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "documents",
    ),
    "llama4, every other layer in chunks": (
        transformers.Llama4TextConfig,
        sizes(
            head_dim=8,
            attention_chunk_size=4,
            layer_types=["chunked_attention", "full_attention"],
            num_local_experts=2,
            intermediate_size_mlp=32,
        ),
        "sdpa",  # the chunks stand in transformers' mask alone
    ),
    "gemma2, softcap": (transformers.Gemma2Config, sizes(head_dim=8), "eager"),
    "bloom, alibi": (transformers.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2}, "eager"),
}
EXPERTS = ("mixtral", "qwen3 moe", "llama4, every other layer in chunks")  # their products know no float64


def make_model(name: str, std: float = 0.3):
    config_class, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**arguments, pad_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)  # else attention hardly moves the logits
    if name not in EXPERTS:
        model.double()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_borders_matter_to_every_model_that_knows_positions(name):
    """Else a test that compares two ways to keep documents apart would compare nothing."""
    model = make_model(name)
    batch = collate("padding-free", make_documents(vocab_size=64))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        of_one_document = model(input_ids=batch["input_ids"], use_cache=False).logits
    moved = (of_one_document - logits).norm() / logits.norm()
    assert (moved > 0.01) == (name != "bloom, alibi")


@pytest.mark.parametrize("name", MODELS)
def test_attention_inside_documents_is_what_the_mask_gives_in_every_kind_of_model(name):
    model = make_model(name)
    batch = collate("padding-free", make_documents(vocab_size=64))
    expected = loss_and_gradients(model, [batch])
    attend_inside_documents(model)
    assert model.config._attn_implementation == MODELS[name][2]
    tolerance = 1e-10
    if name in EXPERTS:
        tolerance = 1e-5
    assert_same(loss_and_gradients(model, [batch]), expected, tolerance)


def test_a_model_that_does_not_pass_the_borders_on_goes_back_to_transformers_own_attention(capsys):
    """Nemotron's layers call their attention without what the model was called with."""
    torch.manual_seed(0)
    config = transformers.NemotronConfig(**sizes(), pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    batch = collate("padding-free", make_documents(vocab_size=64))
    expected = loss_and_gradients(model, [batch])
    attend_inside_documents(model)
    with pytest.raises(ValueError, match="needs padding-free batches with cu_seq_lens_q"):
        loss_and_gradients(model, [batch])
    check_document_attention(model, 64)
    assert "do not pass the borders of documents on" in capsys.readouterr().out
    assert model.config._attn_implementation == "sdpa"
    assert_same(loss_and_gradients(model, [batch]), expected, 1e-10)


@pytest.mark.parametrize("form", PADDED_FORMS)
def test_a_batch_without_borders_is_an_error(tiny_model, form):
    with pytest.raises(ValueError, match="needs padding-free batches"):
        load(tiny_model)(**collate(form, make_documents()), use_cache=False)


def attend(borders: list[int], attention_mask=None, **options) -> torch.Tensor:
    """Random queries, keys and values through the attention; `borders` are the starts of documents and the end."""
    states = torch.randn(1, 4, borders[-1], 8, generator=torch.Generator().manual_seed(0))
    output, _ = document_attention(
        None,
        states,
        states,
        states,
        attention_mask,
        cu_seq_lens_q=torch.tensor(borders, dtype=torch.int32),
        max_length_q=borders[-1],
        **options,
    )
    return output


def test_borders_beside_a_mask_are_an_error():
    with pytest.raises(ValueError, match="without attention_mask"):
        attend([0, 2, 6], attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize("more", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(4)}])
def test_attention_that_is_more_than_a_softmax_is_an_error(more):
    with pytest.raises(ValueError, match="more than a softmax; choose --attn_implementation eager"):
        attend([0, 2, 6], **more)


def test_documents_of_length_zero_and_borders_with_a_first_dimension_are_allowed():
    """The pipeline passes [1, documents + 1], filled up with the end of the row."""
    expected = attend([0, 2, 6])
    assert torch.equal(attend([0, 2, 6, 6, 6]), expected)
    assert torch.equal(attend([0, 2, 2, 6]), expected)


class Copies(TorchDispatchMode):
    """Counts what joins or copies tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("cat", "copy_", "clone"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "borders, expected",
    [([0, 60], 0), ([0, 60, 60, 60], 0), ([0, 20, 60], 4)],
    ids=["one document", "one, as the pipeline passes it", "two"],
)
def test_the_only_document_of_a_row_is_not_copied(borders, expected):
    """With two, the outputs are joined, and the gradients of queries, keys and values."""
    states = [torch.randn(1, 2, 60, 8, requires_grad=True) for _ in range(3)]
    with Copies() as copies:
        output, _ = document_attention(None, *states, None, cu_seq_lens_q=torch.tensor(borders), max_length_q=60)
        torch.autograd.grad(output, states, torch.ones_like(output))
    assert len(copies.names) == expected, copies.names


def test_dropout_of_attention_is_what_the_model_asks_for():
    exact = attend([0, 20, 60])
    assert torch.equal(attend([0, 20, 60], dropout=0.0), exact)
    with_dropout = [attend([0, 20, 60], dropout=0.5) for _ in range(1000)]
    assert not torch.equal(with_dropout[0], with_dropout[1])
    average = torch.stack(with_dropout).mean(0)
    assert (average - exact).norm() < 0.1 * exact.norm()  # what is left is scaled up


# --- The variable-length kernel, which needs a GPU: here a reference takes its place -----------------------------


def attend_by_mask(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size) -> torch.Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes, with its demands on what it gets."""
    assert query.ndim == key.ndim == value.ndim == 3  # [tokens, heads, size of a head]
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q.is_contiguous()
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
    assert type(max_q) is int and max_q == max_k == cu_seq_q.diff().max()
    places = torch.arange(len(query))
    document = torch.searchsorted(cu_seq_q[1:].long(), places, right=True)
    is_visible = (document[:, None] == document[None]) & (places[None] <= places[:, None])
    behind, ahead = window_size
    assert ahead == 0
    if behind >= 0:
        is_visible &= places[None] >= places[:, None] - behind
    states = [part.transpose(0, 1)[None] for part in (query, key, value)]
    output = scaled_dot_product_attention(*states, attn_mask=is_visible, scale=scale, enable_gqa=True)
    return output[0].transpose(0, 1)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa  # PyTorch 2.13 refuses fewer key-value heads without it
    return attend_by_mask(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_attn_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):  # fmt: skip
    return attend_by_mask(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


@pytest.fixture
def has_varlen_kernel(monkeypatch):
    monkeypatch.setattr(data_collator, "has_varlen_kernel", lambda query, value, dropout: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)


WITH_DOCUMENTS = [name for name, (_, _, attention) in MODELS.items() if attention == "documents"]


@pytest.mark.parametrize("kernel", [varlen_attn, varlen_attn_of_torch_2_11])
@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_one_kernel_for_all_documents_gives_what_one_after_the_other_gives(name, kernel, monkeypatch):
    model = make_model(name)
    attend_inside_documents(model)
    batch = collate("packed, padding-free", make_documents(vocab_size=64))
    expected = loss_and_gradients(model, [batch])
    kernels = []

    def counted(*arguments, **options):
        kernels.append(options["window_size"])
        return kernel(*arguments, **options)

    counted.__signature__ = inspect.signature(kernel)  # which is asked for enable_gqa
    monkeypatch.setattr(data_collator, "has_varlen_kernel", lambda query, value, dropout: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", counted)
    tolerance = 1e-10
    if name in EXPERTS:
        tolerance = 1e-5
    assert_same(loss_and_gradients(model, [batch]), expected, tolerance)
    assert len(kernels) == 2  # one a layer
    if "window" in name:
        assert (3, 0) in kernels  # four tokens with itself


def test_the_kernel_gets_one_precision_under_autocast(tiny_model, has_varlen_kernel):
    """Rotary embeddings leave queries and keys in float32, which the kernel refuses beside values in bf16."""
    batch = collate("padding-free", make_documents())
    with torch.autocast("cpu", torch.bfloat16):
        loss = finetune_pp.loss_of_model(load(tiny_model), batch)
    loss.backward()
    exact = finetune_pp.loss_of_model(load(tiny_model, "sdpa"), batch)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


class Synchronisations(TorchDispatchMode):
    """Counts the operators for which a CPU would wait for its GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["plain loop", "loss head"])
def test_nothing_in_the_model_waits_for_the_gpu(tiny_model, loss, monkeypatch):
    monkeypatch.setattr(data_collator, "has_varlen_kernel", lambda query, value, dropout: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, *_, **__: query.clone())
    model = load(tiny_model)
    compute_loss = finetune_pp.loss_in_chunks
    if loss == "loss head":
        head = add_loss_head(model)

        def compute_loss(model, batch):
            return summed_loss(model, batch, head)

    batch = collate("padding-free", make_documents())
    with Synchronisations() as synchronisations:
        compute_loss(model, batch).backward()
    assert synchronisations.count == 0
    with Synchronisations() as synchronisations:
        batch["input_ids"].sum().item()
    assert synchronisations.count == 1  # it can count


def test_attention_never_looks_at_a_value(tiny_model, monkeypatch):
    """On the meta device tensors have no values."""
    model = load(tiny_model).to("meta")
    batch = data_collator.move_to_device(collate("padding-free", make_documents()), torch.device("meta"))
    assert batch["cu_seq_lens_q"].device.type == "meta"
    for name in ("labels", "shift_labels", "logits_to_keep"):
        del batch[name]
    with pytest.raises((RuntimeError, NotImplementedError)):  # one document after the other needs the lengths
        model.get_decoder()(**batch, use_cache=False)
    monkeypatch.setattr(data_collator, "has_varlen_kernel", lambda query, value, dropout: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, *_, **__: query.clone())
    model.get_decoder()(**batch, use_cache=False).last_hidden_state.sum().backward()


# --- Compiled layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_attend_inside_documents_and_are_compiled_once(tiny_model, backend):
    """Batches of other lengths need no other graph, and no mask over the joined row is computed."""
    torch.compiler.reset()
    counters.clear()
    plain = load(tiny_model)
    model = load(tiny_model, "sdpa")
    attend_inside_documents(model, is_compiled=True)
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend=backend)
    num_graphs = []
    for seed in range(5):
        batch = collate("padding-free", make_documents(3 + seed, seed))
        expected = loss_and_gradients(plain, [batch], finetune_pp.loss_in_chunks)
        found = loss_and_gradients(model, [batch], finetune_pp.loss_in_chunks)
        assert_same(found, expected, 1e-5)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[1:] == num_graphs[:1] * 4

    def count(model) -> int:
        return count_operations(record(loss_and_gradients, model, [batch], finetune_pp.loss_in_chunks))

    assert count(model) == count(plain)
    assert count(load(tiny_model, "sdpa")) > 1.1 * count(plain)  # a mask would be seen


@torch.library.custom_op("tests::varlen_attention", mutates_args=())
def opaque_attention(query: torch.Tensor, borders: torch.Tensor, longest: int) -> torch.Tensor:
    """Stands for a GPU's kernel, into which torch.compile does not look either."""
    assert longest == borders.diff().max()
    return query.clone()


opaque_attention.register_fake(lambda query, borders, longest: torch.empty_like(query))
opaque_attention.register_autograd(lambda context, gradient: (gradient, None, None))


def test_on_a_gpu_one_graph_serves_all_layers_and_batches_of_all_lengths(tiny_model, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        return opaque_attention(query, cu_seq_q, max_q)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(data_collator, "has_varlen_kernel", lambda query, value, dropout: True)
    torch.compiler.reset()
    counters.clear()
    model = load(tiny_model, "sdpa")
    with pytest.MonkeyPatch.context() as on_gpu:
        on_gpu.setattr(torch.cuda, "is_available", lambda: True)
        attend_inside_documents(model, is_compiled=True)
    for layer in model.model.layers:
        layer.compile(dynamic=True, backend="eager")
    for seed in range(4):
        finetune_pp.loss_in_chunks(model, collate("padding-free", make_documents(3 + seed, seed))).backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# -------------------------------------------------------------------------------------------------------------------
# What is computed: counted in the operators that ran, PyTorch's own cross entropy included
# -------------------------------------------------------------------------------------------------------------------


def record(function, *arguments) -> list:
    """The operators that ran in `function`, with the shapes of their inputs."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function(*arguments)
    return list(profiler.events())


def count_operations(events: list) -> int:
    """Floating-point operations of products and of attention, which is counted full and not causal."""
    total = 0
    for event in events:
        shapes = [shape for shape in event.input_shapes if shape]
        if event.name == "aten::mm":
            (rows, inner), (_, columns) = shapes[:2]
            total += 2 * rows * inner * columns
        elif event.name in ("aten::addmm", "aten::addmm_"):
            (rows, inner), (_, columns) = shapes[1:3]
            total += 2 * rows * inner * columns
        elif event.name == "aten::bmm":
            (batch, rows, inner), (_, _, columns) = shapes[:2]
            total += 2 * batch * rows * inner * columns
        elif event.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
            batch, heads, length, size = shapes[0]
            total += 4 * batch * heads * size * length * length
        elif event.name == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            batch, heads, length, size = shapes[1]
            total += 10 * batch * heads * size * length * length
    return total


def most_rows(events: list, width: int) -> int:
    """The most rows of any matrix of `width` columns that an operator got."""
    rows = [shape[0] for event in events for shape in event.input_shapes if len(shape) == 2 and shape[1] == width]
    return max(rows, default=0)


def test_the_counter_sees_the_attention_of_512_tokens_and_a_product():
    states = torch.randn(1, 4, 512, 32, requires_grad=True)
    weight = torch.randn(70, 32, requires_grad=True)

    def compute():
        output = scaled_dot_product_attention(states, states, states, is_causal=True)
        (output[0, 0] @ weight.T).sum().backward()

    events = record(compute)
    assert count_operations(events) == 14 * 512 * 512 * 4 * 32 + 6 * 512 * 32 * 70
    assert most_rows(events, 70) == 512


@pytest.fixture
def has_pytorchs_own(request, monkeypatch) -> bool:
    """Whether PyTorch has its own linear_cross_entropy, as 2.13 has and 2.11 has not."""
    if request.param and not data_collator.has_linear_cross_entropy():
        pytest.skip("this PyTorch has no linear_cross_entropy")
    monkeypatch.setattr(data_collator, "has_linear_cross_entropy", lambda: request.param)
    return request.param


both_implementations = pytest.mark.parametrize(
    "has_pytorchs_own", [True, False], indirect=True, ids=["PyTorch's own", "ours"]
)


@both_implementations
@pytest.mark.parametrize("adapter", [True, False])
def test_a_step_computes_what_its_real_tokens_need_and_nothing_else(adapter, has_pytorchs_own):
    """Floating-point operations of the plain loops, counted by the operator: at most 1.05 of the floor.

    The floor, in multiplications and additions: 2 for each weight of the layers and real token forward, 2 backward for
    the gradient of what the layer got and 2 for that of the weight if it is trained; the head's for target tokens only;
    attention inside each document, counted full (not causal) as the counter does: 4 d n^2 forward, 10 d n^2 backward.
    """
    config = LlamaConfig(**sizes(vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=6))
    config.tie_word_embeddings = True
    base = LlamaForCausalLM(config)
    model = base
    script = finetune_pp
    lengths = [300, 40, 512, 90]
    num_labels = 20
    rows = []
    for length in lengths:
        labels = torch.full((length,), IGNORE_INDEX)
        labels[-num_labels:] = 5
        rows.append({"input_ids": torch.randint(3, 1000, (length,)), "labels": labels})
    num_tokens = sum(lengths)
    num_weights = sum(p.numel() for layer in base.model.layers for p in layer.parameters() if p.ndim == 2)
    num_added = 0
    products = 6  # forward, and two backward
    if adapter:
        script = finetune_pp_peft
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        num_added = sum(p.numel() for p in model.parameters() if p.requires_grad)
        products = 4
    head = config.vocab_size * config.hidden_size * num_labels * len(lengths) * products
    attention = config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths) * 14
    floor = num_weights * num_tokens * products + num_added * num_tokens * 6 + head + attention
    batch = DataCollator(padding_free=True)(rows)

    def compute():
        script.loss_in_chunks(model, batch).backward()

    dense = count_operations(record(compute))
    attend_inside_documents(base)
    executed = count_operations(record(compute))
    print(f"floor {floor / 1e9:.3f}, executed {executed / floor:.3f} of it, with a mask {dense / floor:.3f}")
    assert 0.9 < executed / floor <= 1.05
    assert dense > 1.1 * floor  # one dense mask over the joined row: the counter sees attention


# -------------------------------------------------------------------------------------------------------------------
# The loss in chunks
# -------------------------------------------------------------------------------------------------------------------


def make_logits_inputs(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, the weight of an output layer and targets, for logits of about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(num_rows, 40, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(310, 40, generator=generator).div(2).to(dtype).requires_grad_()
    targets = torch.randint(310, (num_rows,), generator=generator)
    return hidden_states, weight, targets


def plain_loss(hidden_states, weight, targets) -> torch.Tensor:
    return cross_entropy((hidden_states @ weight.T).float(), targets, reduction="sum")


@both_implementations
@pytest.mark.parametrize("num_rows", [1, TARGETS_PER_CHUNK - 1, TARGETS_PER_CHUNK, 3 * TARGETS_PER_CHUNK + 70])
@pytest.mark.parametrize("needs_gradient", ["both", "hidden states", "weight"])
def test_the_loss_in_chunks_is_the_cross_entropy(num_rows, needs_gradient, has_pytorchs_own):
    hidden_states, weight, targets = make_logits_inputs(num_rows)
    hidden_states.requires_grad_(needs_gradient != "weight")  # a frozen embedding below, or a frozen head
    weight.requires_grad_(needs_gradient != "hidden states")
    results = []
    for compute in (plain_loss, summed_cross_entropy):
        hidden_states.grad = None
        weight.grad = None
        loss = compute(hidden_states, weight, targets)
        (loss / 7).backward()  # the gradients of a loss that is divided
        results.append((loss.detach(), hidden_states.grad, weight.grad))
    expected, found = results
    assert found[0].dtype == torch.float32 and found[0].ndim == 0
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for gradient, expected_gradient in zip(found[1:], expected[1:], strict=True):
        if expected_gradient is None:
            assert gradient is None
        else:
            assert gradient.dtype == expected_gradient.dtype
            assert (gradient - expected_gradient).norm() <= 2e-6 * expected_gradient.norm()


@both_implementations
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [16, 512])
def test_in_bf16_the_loss_and_the_gradients_of_chunks_are_summed_in_float32(
    chunk, autocast, has_pytorchs_own, monkeypatch
):
    """A sum in bf16 would have three digits, and the weight's gradient over 94 chunks would be several times worse."""
    monkeypatch.setattr(data_collator, "TARGETS_PER_CHUNK", chunk)
    hidden_states, weight, targets = make_logits_inputs(1500, torch.bfloat16)
    results = []
    for dtype, compute in (
        (torch.float32, plain_loss),
        (torch.bfloat16, plain_loss),
        (torch.bfloat16, summed_cross_entropy),
    ):
        if autocast:
            inputs = [part.detach().float().requires_grad_() for part in (hidden_states, weight)]
        else:
            inputs = [part.detach().to(dtype).requires_grad_() for part in (hidden_states, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            loss = compute(*inputs, targets)
        loss.backward()
        results.append((loss.detach(), *(part.grad.float() for part in inputs)))
    exact, plain, chunked = results
    assert chunked[0].dtype == torch.float32
    assert abs(chunked[0] - exact[0]) < 1e-4 * exact[0]
    for i in (1, 2):
        # The sum is rounded once more than one product over all targets: by the square root of 2 at most.
        assert (chunked[i] - exact[i]).norm() <= 1.45 * (plain[i] - exact[i]).norm()


def test_targets_that_do_not_belong_to_the_hidden_states_are_an_error():
    hidden_states, weight, targets = make_logits_inputs(8)
    with pytest.raises(AssertionError):
        summed_cross_entropy(hidden_states, weight, targets[:7])


@both_implementations
def test_an_evaluation_computes_no_gradient(has_pytorchs_own):
    hidden_states, weight, targets = make_logits_inputs(1300)
    forward = 2 * 1300 * 40 * 310
    assert count_operations(record(lambda: summed_cross_entropy(hidden_states, weight, targets))) == 3 * forward

    @torch.no_grad()
    def evaluate():
        losses.append(summed_cross_entropy(hidden_states, weight, targets))

    losses = []
    assert count_operations(record(evaluate)) == forward
    assert torch.equal(losses[0], summed_cross_entropy(hidden_states, weight, targets).detach())


@both_implementations
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("place", ["plain loop", "loss head"])
def test_the_loss_in_chunks_is_the_models_loss_and_never_holds_all_logits(
    tmp_path, place, tied, adapter, has_pytorchs_own, monkeypatch
):
    """71 targets in chunks of 40: where the plain loops compute it, and in the output layer, where FSDP2 does."""
    monkeypatch.setattr(data_collator, "TARGETS_PER_CHUNK", 40)
    torch.manual_seed(0)
    model = load(save_tiny_model(tmp_path / "model", tied))
    script = finetune_pp
    if adapter:
        script = finetune_pp_peft
        lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    batch = collate("padding-free", random_rows(8))
    all_logits = record(loss_and_gradients, model, [batch], script.loss_of_model)
    assert most_rows(all_logits, 300) == num_targets(batch) == 71
    expected = loss_and_gradients(model, [batch], script.loss_of_model)

    compute_loss = script.loss_in_chunks
    if place == "loss head":
        names = list(model.state_dict())
        head = add_loss_head(model)
        assert list(model.state_dict()) == names  # what is saved is as it was

        def compute_loss(model, batch):
            return summed_loss(model, batch, head)

    in_chunks = record(loss_and_gradients, model, [batch], compute_loss)
    assert most_rows(in_chunks, 300) == 40
    assert_same(loss_and_gradients(model, [batch], compute_loss), expected, 2e-6)


def test_a_loss_head_gives_logits_where_no_targets_are_set(tiny_model):
    model = load(tiny_model)
    batch = collate("padding-free", make_documents())
    expected = model(**batch, use_cache=False).logits
    weight = model.lm_head.weight
    head = add_loss_head(model)
    assert isinstance(model.lm_head, LossHead) and model.lm_head is head
    assert head.weight is weight  # the optimizer's own, and a tied embedding's
    assert torch.equal(model(**batch, use_cache=False).logits, expected)
    assert summed_loss(model, batch, head).ndim == 0
    with pytest.raises(ValueError, match="input_ids"):
        summed_loss(model, batch | {"input_ids": None}, head)
    assert torch.equal(model(**batch, use_cache=False).logits, expected)  # after an error, too
    padded = collate("padded", make_documents())
    model.set_attn_implementation("sdpa")
    assert torch.equal(summed_loss(model, padded, head), summed_loss(model, padded, None))


# Whether the hidden states times the output layer's weight are what the loss compares: not with a bias, or where more
# is done to the logits.
PLAIN_LOGITS = {
    "llama": True, "mistral": True, "qwen2": True, "gpt2": True, "gpt_neox": True, "gemma": True, "phi": False,
    "gemma2": False, "granite": False, "cohere": False,
}  # fmt: skip


def make_model_of_type(model_type: str, std: float):
    config = transformers.AutoConfig.for_model(model_type, **sizes(), pad_token_id=0)
    if model_type == "granite":
        config.logits_scaling = 8.0  # as the published models have it; the default of 1 does nothing
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()  # gpt2 has dropout
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


@pytest.mark.parametrize("model_type", PLAIN_LOGITS)
def test_only_models_whose_logits_go_straight_into_the_loss_compute_it_in_chunks(model_type, capsys):
    """Logits are so large that scaling or capping them shows."""
    model = make_model_of_type(model_type, std=0.5)
    batch = collate("padding-free", random_rows(4, vocab_size=64))
    expected = loss_and_gradients(model, [batch], finetune_pp.loss_of_model)
    rows = SimpleNamespace(dataset=SimpleNamespace(packed=False))
    compute_loss = finetune_pp.choose_loss(finetune_pp.Arguments(), model, rows)
    assert (compute_loss is finetune_pp.loss_in_chunks) == PLAIN_LOGITS[model_type]
    assert_same(loss_and_gradients(model, [batch], compute_loss), expected, 1e-5)

    head = add_loss_head(model)
    if model_type == "phi":
        assert head is None  # its output layer has a bias
    else:
        capsys.readouterr()
        is_plain = computes_plain_logits(model, 64, lambda model, batch: summed_loss(model, batch, head))
        assert is_plain == PLAIN_LOGITS[model_type]
        assert ("the loss is transformers' own" in capsys.readouterr().out) == (not is_plain)
        if not is_plain:
            head = None
    found = loss_and_gradients(model, [batch], lambda model, batch: summed_loss(model, batch, head))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("model_type", [name for name, is_plain in PLAIN_LOGITS.items() if not is_plain])
@pytest.mark.parametrize("std", [0.002, 0.02])
def test_logits_so_small_that_a_cap_hardly_moves_them_are_not_taken_for_plain(model_type, std):
    """A model that starts from nothing has such logits, and training makes them larger."""
    model = make_model_of_type(model_type, std)
    rows = SimpleNamespace(dataset=SimpleNamespace(packed=False))
    assert finetune_pp.choose_loss(finetune_pp.Arguments(), model, rows) is finetune_pp.loss_of_model


def test_asking_a_model_leaves_it_as_it_was(tiny_model):
    model = load(tiny_model).train()
    check_document_attention(model, 300)
    computes_plain_logits(model, 300, finetune_pp.loss_in_chunks)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_on_the_output_layer_takes_part_in_the_loss(tiny_model):
    """Such a layer computes all logits."""
    lora = peft.LoraConfig(r=8, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(load(tiny_model), lora)
    rows = SimpleNamespace(dataset=SimpleNamespace(packed=False))
    assert finetune_pp_peft.choose_loss(finetune_pp_peft.Arguments(), model, rows) is finetune_pp_peft.loss_of_model
    assert add_loss_head(model) is None


def test_the_plain_loop_computes_its_loss_behind_the_hooks_that_move_inputs_between_devices(tiny_model):
    """accelerate puts them on every layer of a model that is spread over devices."""
    batch = collate("padding-free", make_documents())
    expected = loss_and_gradients(load(tiny_model), [batch], finetune_pp.loss_in_chunks)
    model = load(tiny_model)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "cpu"}
    model = dispatch_model(model, device_map, force_hooks=True)
    assert hasattr(model.lm_head, "_hf_hook")
    assert_same(loss_and_gradients(model, [batch], finetune_pp.loss_in_chunks), expected, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["in chunks", "of the model"])
def test_fillers_alone_give_loss_zero_and_a_valid_backward(tiny_model, form, loss):
    attention = "sdpa"
    compute_loss = finetune_pp.loss_of_model
    if form in PADDING_FREE_FORMS:
        attention = "documents"
    if loss == "in chunks":
        if form in PADDED_FORMS:
            pytest.skip("padded batches have no loss in chunks")
        compute_loss = finetune_pp.loss_in_chunks
    model = load(tiny_model, attention)
    fillers = [filler_row(packed=form.startswith("packed"))] * 3
    batch = DataCollator(padding_free=form in PADDING_FREE_FORMS)(fillers)
    loss, gradients = loss_and_gradients(model, [batch], compute_loss)
    assert num_targets(batch) == 0
    assert loss == 0
    assert len(gradients) == len(list(model.parameters()))
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("form", ["padded", "padding-free"])
def test_fillers_beside_rows_change_neither_loss_nor_gradients(tiny_model, form):
    attention = "sdpa"
    if form == "padding-free":
        attention = "documents"
    model = load(tiny_model, attention, torch.float64)
    first, second = tensors(random_rows(2))
    filler = filler_row(packed=False)
    collate_rows = DataCollator(padding_free=form == "padding-free")
    expected = loss_and_gradients(model, [collate_rows([first, second])])
    for rows in ([first, second, filler], [first, filler, second]):
        assert_same(loss_and_gradients(model, [collate_rows(rows)]), expected, 1e-12)


# -------------------------------------------------------------------------------------------------------------------
# The check that documents do not see each other
# -------------------------------------------------------------------------------------------------------------------


class IgnoresPositions(LlamaForCausalLM):
    """Drops all that says where documents begin, as a model that was written without packed rows in mind does."""

    def forward(self, input_ids, position_ids=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **inputs):
        return super().forward(input_ids, **inputs)


class SeesNothing(LlamaForCausalLM):
    """Gives the same logits whatever it reads: such a model cannot show that it keeps documents apart."""

    def forward(self, input_ids, **inputs):
        return super().forward(torch.zeros_like(input_ids), **inputs)


@pytest.mark.parametrize("defect", [IgnoresPositions, SeesNothing])
def test_the_attention_check_finds_a_model_that_ignores_its_input(tiny_model, defect):
    model = defect.from_pretrained(tiny_model).train()
    with pytest.raises(ValueError, match="crosses documents.*--attn_implementation"):
        check_document_attention(model, 300)


@pytest.mark.parametrize("attention", ["documents", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_check_passes_for_llama(tiny_model, attention, dtype):
    check_document_attention(load(tiny_model, attention, dtype), 300)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_the_attention_check_passes_for_experts_which_round_by_what_else_is_in_the_batch(name, dtype, std):
    model = make_model(name, std).to(dtype)
    check_document_attention(model, 64)
    attend_inside_documents(model)
    check_document_attention(model, 64)


def test_the_attention_check_refuses_a_model_that_does_not_know_positions():
    with pytest.raises(ValueError, match="crosses documents"):
        check_document_attention(make_model("bloom, alibi"), 64)


@pytest.mark.parametrize(
    "config_class", [transformers.BertConfig, transformers.RobertaConfig, transformers.ElectraConfig]
)
def test_the_attention_check_refuses_encoders_which_transformers_loads_as_decoders(config_class):
    """Their tokens see their targets: the loss falls to nothing and nothing is learned."""
    config = config_class(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                          intermediate_size=64, pad_token_id=0)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="crosses documents|looks ahead"):
        check_document_attention(model, 64)


def test_flash_attention_gets_the_documents_in_its_own_precision(tiny_model, monkeypatch):
    """transformers' whole way to FlashAttention, with its kernel alone replaced, which needs a GPU.

    The replacement takes what the kernel takes, [tokens, heads, size] and the borders of the documents, and refuses
    float32 as it does.
    """
    flash = transformers.modeling_flash_attention_utils
    borders = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal
        if q.dtype != torch.bfloat16:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        borders.append(cu_seqlens_q.tolist())
        return attend_by_mask(
            q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), softmax_scale, (-1, 0)
        )

    functions = (None, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    process = (flash._lazy_define_process_function(flash_attn_varlen_func), None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, process))
    rows = random_rows(3)
    batch = collate("padding-free", rows)
    results = []
    for kernel in ("auto", "flash_attention_2"):
        if kernel == "auto":
            model = load(tiny_model)
        else:
            model = load(tiny_model, "sdpa")
            model.config._attn_implementation_internal = kernel  # setting it in the usual way wants the package
        check_document_attention(model, 300)

        def compute_loss(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return finetune_pp.loss_in_chunks(model, batch)

        results.append(loss_and_gradients(model, [batch], compute_loss))
    assert borders[-1] == [0, *np.cumsum([len(row["input_ids"]) for row in rows])]
    assert_same(results[1], results[0], 0.03)
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(**batch, use_cache=False)
