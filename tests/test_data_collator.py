"""The shared module: reading a set, row order, collation, attention inside documents, checkpoints."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import make_tokenizer, random_rows, save_rows, save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import data_collator
from data_collator import (
    FILLER,
    IGNORE_INDEX,
    DataCollator,
    RowSampler,
    TokenizedDataset,
    attend_by_document,
    batches,
    check_document_attention,
    complete_checkpoint,
    compute_loss_in_head,
    document_lengths,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    num_targets,
    set_former_run_aside,
    vocabulary_hash,
    write_receipt,
)

few_examples = settings(deadline=None, max_examples=60)
all_attentions = pytest.mark.parametrize("attention", ["documents", "sdpa", "eager"])


# -------------------------------------------------------------------------------------------------------------------
# Reading a set
# -------------------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = random_rows(5)
    dataset = TokenizedDataset(save_rows(rows, tmp_path / "set"))
    assert len(dataset) == 5 and not dataset.packed
    assert [{name: ids.tolist() for name, ids in row.items()} for row in dataset] == rows
    assert {ids.dtype for ids in dataset[0].values()} == {torch.int64}


def test_columns_of_other_programs_are_not_handed_to_the_model(tmp_path):
    rows = [row | {"options": row["input_ids"]} for row in random_rows(2)]
    assert set(TokenizedDataset(save_rows(rows, tmp_path / "set"))[0]) == {"input_ids", "labels"}


def test_a_filler_has_one_token_and_no_target(tmp_path):
    dataset = TokenizedDataset(save_rows(random_rows(2), tmp_path / "rows"))
    assert {name: ids.tolist() for name, ids in dataset[FILLER].items()} == {"input_ids": [0], "labels": [IGNORE_INDEX]}
    packed = TokenizedDataset(save_rows(pack([random_rows(2)]), tmp_path / "packed"))
    assert packed.packed
    assert packed[FILLER]["position_ids"].tolist() == [0]
    assert packed[FILLER].keys() == packed[0].keys()


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
    with pytest.raises(ValueError, match="--random_passage True: .* whole documents, which .*--format text writes"):
        RowSampler(TokenizedDataset(save_rows(random_rows(2), tmp_path / "rows"), passage_length=8), 1, 42)


def test_a_set_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        TokenizedDataset(save_rows([], tmp_path / "set"))


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
    tokenizer, other = make_tokenizer(), make_tokenizer()
    other.add_tokens(["<another>"])
    folder = save_rows(random_rows(2), tmp_path / "set", {"vocabulary_sha256": vocabulary_hash(tokenizer)})
    assert len(TokenizedDataset(folder, tokenizer=tokenizer)) == 2
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenizedDataset(folder, tokenizer=other)


# -------------------------------------------------------------------------------------------------------------------
# The order of rows
# -------------------------------------------------------------------------------------------------------------------


class Rows:
    """The rows 0, 1, ... of folders of these sizes, as much of a TokenizedDataset as the sampler needs."""

    passage_length = 0

    def __init__(self, *sizes: int, shares: list[int] | None = None):
        self.sizes, self.shares, self.ledger = list(sizes), shares or list(sizes), {}

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, draw: int) -> int:
        return draw % len(self)


def order(num_rows: int, rows_per_step: int = 1, seed: int = 42, epoch: int = 0) -> list[int]:
    sampler = RowSampler(Rows(num_rows), rows_per_step, seed)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    assert {draw // num_rows for draw in sampler if draw != FILLER} == {epoch}  # how often it was drawn before
    return [draw if draw == FILLER else draw % num_rows for draw in sampler]


def test_the_order_is_given_by_seed_and_epoch_alone():
    torch.manual_seed(1), np.random.seed(1)
    assert order(10) == [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]  # the same on every machine, or a run could not move
    assert order(10, rows_per_step=5) == order(10)
    assert len({tuple(order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}) == 25


@few_examples
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**32), st.integers(0, 1000))
def test_every_row_comes_once_an_epoch_and_fillers_only_at_the_end(num_rows, rows_per_step, seed, epoch):
    indices = order(num_rows, rows_per_step, seed, epoch)
    assert sorted(indices[:num_rows]) == list(range(num_rows))
    assert indices[num_rows:] == [FILLER] * (-num_rows % rows_per_step)
    assert len(indices) % rows_per_step == 0


@few_examples
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 9))
def test_the_rows_of_a_step_are_those_that_the_sampler_gives_it(sizes, rows_per_step, seed):
    sampler = RowSampler(Rows(*sizes), rows_per_step, seed)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for step in range(sampler.steps_per_epoch):
            window = [draw for draw in order[step * rows_per_step : (step + 1) * rows_per_step] if draw != FILLER]
            assert sampler.draws_of(epoch * sampler.steps_per_epoch + step) == window
            rows = sampler.rows_of(epoch * sampler.steps_per_epoch + step)
            assert rows == [draw % sum(sizes) for draw in window]


def test_an_epoch_of_steps_holds_every_row_once_without_fillers():
    sampler = RowSampler(Rows(7), rows_per_step=4, seed=0)
    epochs = [[sampler.rows_of(step) for step in (first, first + 1)] for first in (0, 2)]
    assert [[len(rows) for rows in epoch] for epoch in epochs] == [[4, 3], [4, 3]]
    seen = [[row for rows in epoch for row in rows] for epoch in epochs]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(7))
    assert seen[0] != seen[1]


# -------------------------------------------------------------------------------------------------------------------
# Several folders by weight
# -------------------------------------------------------------------------------------------------------------------


@few_examples
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=3), st.integers(0, 9))
def test_a_mix_draws_the_share_of_each_folder_and_none_again_before_the_rest(folders, seed):
    sizes = [size for size, _ in folders]
    shares = sizes[:1] + [share for _, share in folders[1:]]
    sampler = RowSampler(Rows(*sizes, shares=shares), rows_per_step=4, seed=seed)
    first = np.cumsum([0, *sizes])
    drawn = [[] for _ in sizes]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        draws = [draw for draw in sampler if draw != FILLER]
        for number, share in enumerate(shares):
            mine = [d for d in draws if first[number] <= d % sum(sizes) < first[number + 1]]
            assert len(mine) == share
            drawn[number] += sorted(d // sum(sizes) * sizes[number] + d % sum(sizes) - first[number] for d in mine)
    for number, size in enumerate(sizes):
        # Sorted by pass, then row: every pass but the last is whole, and no (pass, row) comes twice.
        times = np.bincount(np.array(drawn[number]) // size)
        assert len(set(drawn[number])) == len(drawn[number]) == 4 * shares[number]
        assert (times[:-1] == size).all() and 0 < times[-1] <= size


def test_a_mix_is_read_from_its_folders_and_weights(tmp_path):
    many, few = random_rows(12, seed=1), random_rows(3, seed=2)
    save_rows(many, tmp_path / "medical"), save_rows(few, tmp_path / "general")
    spec = f"{tmp_path}/medical:3,{tmp_path}/general:1"
    dataset = TokenizedDataset(spec)
    assert (dataset.sizes, dataset.shares, len(dataset)) == ([12, 3], [12, 4], 15)
    assert [dataset[i]["input_ids"].tolist() for i in range(15)] == [row["input_ids"] for row in many + few]
    assert dataset.ledger["mix"] == {f"{tmp_path}/medical": 3, f"{tmp_path}/general": 1}
    assert TokenizedDataset(f"{tmp_path}/general, {tmp_path}/medical").shares == [3, 3]
    assert TokenizedDataset(f"{tmp_path}/medical:1,{tmp_path}/general:0.001").shares == [12, 1]  # never left out

    sampler, other = RowSampler(dataset, 4, 42), RowSampler(TokenizedDataset(spec.replace(":1", ":2")), 4, 42)
    assert sampler.identity["dataset_sha256"] != other.identity["dataset_sha256"]  # no run goes on with other weights
    rows = [row["input_ids"].tolist() for step in range(sampler.steps_per_epoch) for row in sampler.rows_of(step)]
    assert sorted(r for r in rows if r in [row["input_ids"] for row in many]) == sorted(r["input_ids"] for r in many)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}/rows,{0}/none:2", "none: no such folder"),
        ("{0}/rows:0,{0}/other:1", "weight above 0"),
        ("{0}/rows,{0}/rows:2", "each folder once"),
        ("{0}/rows,,{0}/other", "each folder once"),
        ("{0}/rows:1.2.3,{0}/other", "1.2.3"),
    ],
)
def test_a_mix_that_is_wrong_is_named(tmp_path, spec, message):
    save_rows(random_rows(3), tmp_path / "rows"), save_rows(random_rows(3), tmp_path / "other")
    with pytest.raises((ValueError, OSError), match=message):
        TokenizedDataset(spec.format(tmp_path))


def test_packed_and_unpacked_rows_mix(tmp_path):
    save_rows(pack([random_rows(4)]), tmp_path / "packed"), save_rows(random_rows(2), tmp_path / "rows")
    dataset = TokenizedDataset(f"{tmp_path}/rows,{tmp_path}/packed")
    assert dataset.packed and dataset[0]["position_ids"].tolist() == list(range(len(dataset[0]["input_ids"])))
    batch = DataCollator(padding_free=True)([dataset[0], dataset[2], dataset[FILLER]])
    assert (batch["position_ids"] == 0).sum() == 1 + 4 + 1


# -------------------------------------------------------------------------------------------------------------------
# Random passages
# -------------------------------------------------------------------------------------------------------------------


def save_documents(documents: list[list[int]], folder: Path) -> Path:
    return save_rows([{"input_ids": ids} for ids in documents], folder)


def passages(dataset: TokenizedDataset, index: int, times: int) -> list[list[int]]:
    return [dataset[index + n * len(dataset)]["input_ids"].tolist() for n in range(times)]


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
    assert [dataset.num_tokens(draw) for draw in (0, 1)] == [4, min(length, 4)]


def test_passages_are_given_by_seed_draw_and_document_alone(tmp_path):
    folder = save_documents([list(range(100, 300)) for _ in range(8)], tmp_path / "papers")
    dataset, again = (TokenizedDataset(folder, passage_length=16, seed=7) for _ in range(2))
    np.random.seed(1), torch.manual_seed(1)
    expected = [dataset[draw]["input_ids"].tolist() for draw in range(24)]
    assert [again[draw]["input_ids"].tolist() for draw in reversed(range(24))] == expected[::-1]
    loader = torch.utils.data.DataLoader(dataset, None, sampler=range(24), num_workers=2)  # other processes
    assert [row["input_ids"].tolist() for row in loader] == expected
    assert len({ids[0] for ids in expected}) > 15  # documents and epochs differ
    other_seed = TokenizedDataset(folder, passage_length=16, seed=8)
    assert [other_seed[draw]["input_ids"].tolist() for draw in range(24)] != expected


@few_examples
@given(st.integers(1, 4), st.integers(0, 20))
def test_a_step_sees_the_same_passages_whatever_the_number_of_processes(papers, num_ranks, step):
    """Ranks take turns in the sampler's order, and resuming begins at a step: neither changes what is drawn."""
    sampler = RowSampler(TokenizedDataset(papers, passage_length=16, seed=42), 4, 42)
    epoch, first = divmod(step, sampler.steps_per_epoch)
    sampler.set_epoch(epoch)
    window = list(sampler)[4 * first : 4 * first + 4]
    shares = [[sampler.dataset[draw]["input_ids"].tolist() for draw in window[r::num_ranks]] for r in range(num_ranks)]
    together = [shares[i % num_ranks][i // num_ranks] for i in range(4)]
    rows = [row["input_ids"].tolist() for row in sampler.rows_of(step)]
    assert together == rows + [[0]] * (4 - len(rows))
    assert sum(map(sampler.dataset.num_tokens, sampler.draws_of(step))) == sum(map(len, rows))


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> Path:
    lengths = np.random.default_rng(0).integers(1, 60, 11)
    return save_documents([list(range(n)) for n in lengths], tmp_path_factory.mktemp("papers") / "set")


def test_documents_and_rows_with_labels_mix(tmp_path, papers):
    save_rows(random_rows(5), tmp_path / "instructions")
    dataset = TokenizedDataset(f"{papers}:2,{tmp_path}/instructions:1", passage_length=16)
    rows = RowSampler(dataset, 50, 0).rows_of(0)
    whole = [row for row in rows if torch.equal(row["input_ids"], row["labels"])]
    assert (len(rows), len(whole)) == (17, 11)  # 11 passages; 6 of 5 rows, one of them twice


# -------------------------------------------------------------------------------------------------------------------
# Collation
# -------------------------------------------------------------------------------------------------------------------


def tensors(rows: list[dict]) -> list[dict]:
    return [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]


def pack(groups: list[list[dict]]) -> list[dict]:
    """One packed row of each group of documents."""
    return [
        {name: [i for row in group for i in row[name]] for name in ("input_ids", "labels")}
        | {"position_ids": [i for row in group for i in range(len(row["input_ids"]))]}
        for group in groups
    ]


def make_documents(num_documents: int = 7, seed: int = 3) -> list[dict]:
    """Documents of unequal length; in every other one each token is labelled, as with --train_on_prompt True."""
    documents = random_rows(num_documents, seed)
    return [row | {"labels": list(row["input_ids"])} if i % 2 else row for i, row in enumerate(documents)]


def collate(form: str, documents: list[dict]) -> list[dict[str, torch.Tensor]]:
    """The batches of the documents in each form that training knows."""
    if form == "one by one":
        return [DataCollator(padding_free=False)([row]) for row in tensors(documents)]
    if form.startswith("packed"):
        documents = pack([documents[:1], documents[1:4], documents[4:]])
    return [DataCollator(padding_free=form.endswith("padding-free"))(tensors(documents))]


FORMS = ["padded", "padding-free", "packed, padded", "packed, padding-free"]


def targets_with_context(batch: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """For each target of a batch: the tokens of its document before it, as far as positions tell, and itself."""
    found = []
    for row, labels in enumerate(batch["labels"]):
        for at in torch.nonzero(labels[1:] != IGNORE_INDEX).flatten() + 1:
            first = at - 1 - batch["position_ids"][row, at - 1] if "position_ids" in batch else 0
            found.append((*batch["input_ids"][row, first:at].tolist(), int(labels[at])))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_targets_behind_the_same_tokens(form):
    documents = make_documents()
    expected = [
        (*row["input_ids"][:at], row["labels"][at])
        for row in documents
        for at in range(1, len(row["labels"]))
        if row["labels"][at] != IGNORE_INDEX
    ]
    (batch,) = collate(form, documents)
    assert targets_with_context(batch) == expected
    assert num_targets(batch) == len(expected)
    if "shift_labels" in batch:
        assert batch["shift_labels"].tolist() == [[target[-1] for target in expected]]
        assert batch["input_ids"][0, batch["logits_to_keep"]].tolist() == [target[-2] for target in expected]


@pytest.mark.parametrize("form", FORMS)
def test_the_first_token_of_a_document_is_never_a_target(form):
    documents = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(5)]
    (batch,) = collate(form, documents)
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


def test_evaluation_sees_all_rows_in_their_order():
    rows = tensors(random_rows(7))
    sizes_and_rows = [(len(batch["input_ids"]), batch) for batch in batches(rows, DataCollator(padding_free=False), 3)]
    assert [size for size, _ in sizes_and_rows] == [3, 3, 1]
    seen = [ids[mask == 1] for _, b in sizes_and_rows for ids, mask in zip(*map(b.get, NAMES), strict=True)]
    assert all(torch.equal(ids, row["input_ids"]) for ids, row in zip(seen, rows, strict=True))


NAMES = ("input_ids", "attention_mask")


# -------------------------------------------------------------------------------------------------------------------
# What the model makes of a batch
# -------------------------------------------------------------------------------------------------------------------


def load(folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32):
    is_own = attention == "documents"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=None if is_own else attention)
    return attend_by_document(model, {"attn_implementation": "auto" if is_own else attention, "torch_compile": False})


def summed_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss in the model's own precision: transformers computes it in float32."""
    logits = model(**batch, use_cache=False).logits
    if "shift_labels" in batch:
        targets = batch["shift_labels"]
    else:
        logits, targets = logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def loss_and_gradients(model, form: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = sum(summed_loss(model, batch) for batch in collate(form, make_documents()))
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


TOLERANCES = [("documents", 1e-10), ("sdpa", 1e-10), ("eager", 1e-5)]  # eager's softmax is float32


@pytest.mark.parametrize(("attention", "tolerance"), TOLERANCES)
def test_every_form_gives_the_loss_and_gradients_of_the_documents_one_by_one(tiny_model, attention, tolerance):
    model = load(tiny_model, attention, torch.float64)
    expected_loss, expected = loss_and_gradients(model, "one by one")
    for form in FORMS:
        loss, gradients = loss_and_gradients(model, form)
        assert abs(loss - expected_loss) <= tolerance * expected_loss, form
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), (form, name)
            assert gradient.norm() > 0, name


def test_the_loss_that_transformers_computes_is_the_same_in_every_form(tiny_model):
    model, documents = load(tiny_model), make_documents()
    alone = collate("one by one", documents)
    targets = sum(map(num_targets, alone))
    expected = sum(model(**batch, num_items_in_batch=targets, use_cache=False).loss.item() for batch in alone)
    for form in FORMS:
        (batch,) = collate(form, documents)
        loss = model(**batch, num_items_in_batch=targets, use_cache=False).loss.item()
        assert loss == pytest.approx(expected, rel=1e-6), form


def logits_of_documents(model, form: str, documents: list[dict]) -> list[torch.Tensor]:
    (batch,) = collate(form, documents)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    lengths = [len(row["input_ids"]) for row in documents]
    if form == "padded":
        return [row[:length] for row, length in zip(logits, lengths, strict=True)]
    if form == "packed, padded":
        rows = [lengths[:1], lengths[1:4], lengths[4:]]
        return [part for row, sizes in zip(logits, rows, strict=True) for part in row[: sum(sizes)].split(sizes)]
    return list(logits[0].split(lengths))


@all_attentions
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_do_not_see_each_other(tiny_model, form, attention):
    model, documents = load(tiny_model, attention), make_documents()
    before = logits_of_documents(model, form, documents)
    assert len(before) == 7
    for changed in range(7):
        others = copy.deepcopy(documents)
        others[changed]["input_ids"][0] = others[changed]["input_ids"][0] % 290 + 5
        after = logits_of_documents(model, form, others)
        moved = [i for i in range(7) if not torch.equal(before[i], after[i])]
        assert moved == [changed]


@all_attentions
def test_padding_tokens_are_never_attended_to(tiny_model, attention):
    model, documents = load(tiny_model, attention), tensors(make_documents(2))
    for rows in (documents, tensors(pack([make_documents(3), make_documents(1)]))):
        batch = DataCollator(padding_free=False)(rows)
        del batch["labels"]
        real = [slice(len(row["input_ids"])) for row in rows]
        logits = []
        for padding in (0, 2, 77):
            for ids, used in zip(batch["input_ids"], real, strict=True):
                ids[used.stop :] = padding
            with torch.no_grad():
                output = model(**batch, use_cache=False).logits
            logits.append(torch.cat([row[used] for row, used in zip(output, real, strict=True)]))
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@all_attentions
def test_the_attention_check_passes_for_llama(tiny_model, attention):
    model = load(tiny_model, attention).train()
    check_document_attention(model, 300)
    assert model.training


def sizes(**others) -> dict:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "eos_token_id": 1} | heads | others


MODELS = {
    "llama": (transformers.LlamaConfig, sizes(), "documents"),
    "mistral, window": (transformers.MistralConfig, sizes(sliding_window=4), "documents"),
    "qwen2": (transformers.Qwen2Config, sizes(), "documents"),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, "documents"),
    "gpt_neox": (transformers.GPTNeoXConfig, sizes(), "documents"),
    "phi": (transformers.PhiConfig, sizes(), "documents"),
    "gemma2, softcap": (transformers.Gemma2Config, sizes(head_dim=8), "eager"),
    "bloom, alibi": (transformers.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2}, "eager"),
}


@pytest.mark.parametrize("name", MODELS)
def test_attention_by_document_is_what_the_mask_gives_in_every_kind_of_model(name):
    config_class, kwargs, expected = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**kwargs, pad_token_id=0)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # else attention hardly moves the logits
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((10, 8, 6), (3, 21))])
    mask = (torch.arange(24) < torch.tensor([[24], [9]])).long()
    input_ids, outputs = torch.randint(2, 64, (2, 24)), []
    for attention in ("mask", "documents"):
        if attention == "documents":
            attend_by_document(model, {"attn_implementation": "auto", "torch_compile": False})
        for inputs in ({"position_ids": positions}, {}, {"attention_mask": mask}):
            model.zero_grad()
            logits = model(input_ids=input_ids, use_cache=False, **inputs).logits[mask == 1]
            logits.square().sum().backward()
            outputs.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert model.config._attn_implementation == expected
    for by_mask, by_document in zip(outputs[:3], outputs[3:], strict=True):
        assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(by_mask, by_document, strict=True))
    moved = (outputs[0][0] - outputs[1][0]).norm() / outputs[0][0].norm()
    assert (moved > 0.1) == ("alibi" not in name)  # where documents start does matter, but to those who ignore it


def test_the_layers_get_the_lengths_of_the_documents():
    document, places = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]), {"q_length": 5, "kv_length": 5}
    lengths = document_lengths(
        2, **places, mask_function=lambda row, head, i, j: (j <= i) & (document[row, i] == document[row, j])
    )
    assert lengths == [[3, 2], [1, 1, 3]]
    assert document_lengths(2, **places, mask_function=lambda row, head, i, j: (j <= i) & (row >= 0)) is None


@pytest.mark.parametrize("adapter", [True, False])
def test_a_step_computes_what_its_real_tokens_need_and_nothing_else(adapter):
    """Floating-point operations, counted by the operator: at most 1.05 of the floor.

    The floor, in multiplications and additions: 2 for each weight of the layers and real token forward, 2 backward for
    the gradient of what the layer got and 2 for that of the weight if it is trained; the head's for target tokens only;
    attention inside each document, counted full (not causal) as the counter does: 4 d n^2 forward, 10 d n^2 backward.
    """
    config = LlamaConfig(**sizes(vocab_size=1000, hidden_size=128, intermediate_size=384, num_hidden_layers=6))
    config.tie_word_embeddings = True
    model = base = LlamaForCausalLM(config)
    lengths, targets = [300, 40, 512, 90], 20
    rows = [{"input_ids": torch.randint(3, 1000, (n,)), "labels": torch.full((n,), IGNORE_INDEX)} for n in lengths]
    for row in rows:
        row["labels"][-targets:] = 5
    tokens, num_targets_ = sum(lengths), targets * len(lengths)
    weights = sum(p.numel() for layer in base.model.layers for p in layer.parameters() if p.ndim == 2)
    if adapter:
        model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    added = sum(p.numel() for p in model.parameters() if p.requires_grad) if adapter else 0
    head = config.vocab_size * config.hidden_size * num_targets_ * (4 if adapter else 6)
    attention = config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths) * 14
    floor = weights * tokens * (4 if adapter else 6) + added * tokens * 6 + head + attention

    def count(attention: str) -> int:
        attend_by_document(base, {"attn_implementation": attention, "torch_compile": False})
        batch = DataCollator(padding_free=True)(rows)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            model(**batch, num_items_in_batch=num_targets_, use_cache=False).loss.backward()
        return counter.get_total_flops()

    dense = count("sdpa")
    compute_loss_in_head(model, {"torch_compile": False})
    executed = count("auto")
    print(f"floor {floor / 1e9:.3f}, executed {executed / floor:.3f} of it, with a mask {dense / floor:.3f}")
    assert 0.9 < executed / floor <= 1.05
    assert dense > 1.1 * floor  # one dense mask over the joined row: the counter sees attention


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **others: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **others: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


def test_the_counter_sees_the_attention_of_512_tokens():
    states = torch.randn(1, 4, 512, 32, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        torch.nn.functional.scaled_dot_product_attention(states, states, states, is_causal=True).sum().backward()
    assert counter.get_total_flops() == 14 * 512 * 512 * 4 * 32


def row_tensors(num_rows: int, vocab_size: int = 300) -> list[dict[str, torch.Tensor]]:
    rows = random_rows(num_rows, vocab_size=vocab_size)
    return [{name: torch.tensor(ids) for name, ids in row.items()} for row in rows]


class LargestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor as wide as the vocabulary."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == self.vocab_size:
            self.rows = max(self.rows, result.numel() // self.vocab_size)
        return result


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_chunks_is_the_loss_and_never_holds_all_logits(tmp_path, adapter, tied, monkeypatch):
    """71 targets in chunks of 40: the same loss and gradients as from all logits at once, of which none are held."""
    torch.manual_seed(0)
    model = base = load(save_tiny_model(tmp_path / "model", tied))
    if adapter:
        lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(base, lora)
    batch = DataCollator(padding_free=True)(row_tensors(8))
    assert num_targets(batch) == 71
    monkeypatch.setattr(data_collator, "TARGETS_AT_ONCE", 40)
    results = []
    for is_chunked in (False, True):
        if is_chunked:
            compute_loss_in_head(model, {"torch_compile": False})
        model.zero_grad()
        with LargestLogits(vocab_size=300) as largest:
            loss = model(**batch, num_items_in_batch=7, use_cache=False).loss
            loss.backward()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            evaluated = model(**batch, num_items_in_batch=7, use_cache=False).loss
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, evaluated, gradients, largest.rows, counter.get_total_flops()))
    (loss, _, gradients, rows, flops), (chunked, evaluated, chunked_gradients, chunked_rows, chunked_flops) = results
    assert (rows, chunked_rows) == (71, 40)
    assert chunked_flops == flops  # an evaluation computes no gradient
    assert torch.equal(chunked, evaluated)
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)
    assert chunked_gradients.keys() == gradients.keys()
    assert all((chunked_gradients[n] - g).norm() <= 2e-6 * g.norm() for n, g in gradients.items())


@pytest.mark.parametrize("adapter", [True, False])
def test_the_loss_in_chunks_stays_float32_where_the_model_computes_in_bf16(tiny_model, adapter, monkeypatch):
    """The loss is not rounded to bf16's three digits, and chunks are not added up in bf16."""
    monkeypatch.setattr(data_collator, "TARGETS_AT_ONCE", 4)
    batch, results = DataCollator(padding_free=True)(row_tensors(8)), []
    for is_chunked, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        model = load(tiny_model)
        if adapter:
            lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            torch.manual_seed(0)
            model = peft.get_peft_model(model, lora)
        if is_chunked:
            compute_loss_in_head(model, {"torch_compile": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch, num_items_in_batch=1, use_cache=False).loss
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (exact, gradient), (plain, plain_gradient), (chunked, chunked_gradient) = results
    assert chunked.dtype == torch.float32
    assert abs(chunked - exact) <= 1.01 * abs(plain - exact) + 1e-5 * exact
    assert (chunked_gradient - gradient).norm() <= 1.05 * (plain_gradient - gradient).norm()


CHUNKED = {"llama": True, "mistral": True, "qwen2": True, "gpt2": True, "gpt_neox": True, "gemma": True}
CHUNKED |= {"phi": False, "gemma2": False, "granite": False, "cohere": False}  # a bias, or more is done to the logits


@pytest.mark.parametrize("name", CHUNKED)
def test_only_models_whose_logits_go_straight_into_the_loss_compute_it_in_the_head(name, monkeypatch):
    config = transformers.AutoConfig.for_model(name, **sizes(), pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()  # gpt2 has dropout
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # logits so large that scaling or capping them would show
    batch, losses = DataCollator(padding_free=True)(row_tensors(4, vocab_size=64)), []
    calls, apply = [], data_collator.ChunkedCrossEntropy.apply
    monkeypatch.setattr(data_collator.ChunkedCrossEntropy, "apply", lambda *args: calls.append(1) or apply(*args))
    for is_chunked in (False, True):
        if is_chunked:
            compute_loss_in_head(model, {"torch_compile": False})
        losses.append(model(**batch, num_items_in_batch=3, use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert bool(calls) == CHUNKED[name]


def test_an_adapter_on_the_output_layer_takes_part_in_the_loss(tiny_model):
    """Such a layer computes all logits."""
    model = load(tiny_model)
    lora = peft.LoraConfig(r=8, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    batch, losses = DataCollator(padding_free=True)(row_tensors(4)), []
    for is_chunked in (False, True):
        if is_chunked:
            compute_loss_in_head(model, {"torch_compile": False})
        losses.append(model(**batch, num_items_in_batch=1, use_cache=False).loss)
    assert torch.equal(*losses)


def test_the_loss_in_chunks_works_behind_the_hook_that_moves_inputs_between_devices(tiny_model):
    """accelerate puts it on every layer of a model that is spread over devices."""
    model, losses = load(tiny_model), []
    batch = DataCollator(padding_free=True)(row_tensors(4))
    for is_chunked in (False, True):
        if is_chunked:
            add_hook_to_module(model.lm_head, AlignDevicesHook("cpu"))
            compute_loss_in_head(model, {"torch_compile": False})
        output = model(**batch, num_items_in_batch=1, use_cache=False)
        losses.append(output.loss.item())
    assert output.logits.ndim == 0  # it is the loss
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


class IgnoresPositions(LlamaForCausalLM):
    """Drops `position_ids`, as a model that was written without packed rows in mind does."""

    def forward(self, input_ids, position_ids=None, **inputs):
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
    assert model.training


def test_flash_attention_gets_the_documents_in_its_own_precision(tiny_model, monkeypatch):
    """transformers' whole way to FlashAttention, with its kernel alone replaced, which needs a GPU.

    The replacement takes what the kernel takes, [tokens, heads, size] and the borders of the documents, and refuses
    float32 as it does.
    """
    flash, borders = transformers.modeling_flash_attention_utils, []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == cu_seqlens_q.diff().max()
        if q.dtype != torch.bfloat16:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        borders.append(cu_seqlens_q.tolist())
        lengths = cu_seqlens_q.diff().tolist()
        documents = zip(*(states.transpose(0, 1)[None].split(lengths, 2) for states in (q, k, v)), strict=True)
        settings = {"is_causal": True, "enable_gqa": True, "scale": softmax_scale}
        outputs = [torch.nn.functional.scaled_dot_product_attention(*states, **settings) for states in documents]
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    functions = (None, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    process = (flash._lazy_define_process_function(flash_attn_varlen_func), None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, process))
    rows, results = [{n: torch.tensor(ids) for n, ids in row.items()} for row in random_rows(3)], []
    batch = DataCollator(padding_free=True)(rows)
    for kernel in ("auto", "flash_attention_2"):
        model = load(tiny_model, "documents" if kernel == "auto" else "sdpa")
        if kernel != "auto":
            model.config._attn_implementation_internal = kernel  # setting it in the usual way wants the package
        check_document_attention(model, 300)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, num_items_in_batch=5, use_cache=False).loss
        loss.backward()
        results.append([loss.detach()] + [parameter.grad for parameter in model.parameters()])
    assert borders[-1] == [0, *np.cumsum([len(row["input_ids"]) for row in rows])]
    assert all((a - b).norm() <= 0.03 * a.norm() for a, b in zip(*results, strict=True))
    with pytest.raises(RuntimeError, match="FlashAttention only"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_fillers_alone_give_loss_zero_and_a_valid_backward(tiny_model, tmp_path, padding_free, packed):
    rows = pack([random_rows(2)]) if packed else random_rows(2)
    dataset = TokenizedDataset(save_rows(rows, tmp_path / "set"))
    model = load(tiny_model)
    batch = DataCollator(padding_free)([dataset[FILLER]] * 3)
    loss = model(**batch, num_items_in_batch=5, use_cache=False).loss
    loss.backward()
    assert num_targets(batch) == 0
    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


@pytest.mark.parametrize("padding_free", [False, True])
def test_fillers_beside_rows_change_neither_loss_nor_gradients(tiny_model, tmp_path, padding_free):
    dataset = TokenizedDataset(save_rows(random_rows(2), tmp_path / "set"))
    model, results = load(tiny_model, dtype=torch.float64), []
    for indices in ([0, 1], [0, 1, FILLER], [0, FILLER, 1]):
        model.zero_grad()
        loss = summed_loss(model, DataCollator(padding_free)([dataset[i] for i in indices]))
        loss.backward()
        results.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())]))
    for result in results[1:]:
        assert (result - results[0]).norm() <= 1e-12 * results[0].norm()


# -------------------------------------------------------------------------------------------------------------------
# Checkpoints and receipts
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampler(tiny_set):
    return RowSampler(TokenizedDataset(tiny_set), rows_per_step=8, seed=42)


def save_checkpoint(output_dir: Path, step: int, sampler: RowSampler | None, save_total_limit: int = 9) -> Path:
    """A checkpoint; without sampler one that was killed before complete.json."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * step)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sampler:
        sampler.settings["save_total_limit"] = save_total_limit
        complete_checkpoint(folder, sampler)
    return folder


def test_a_complete_checkpoint_has_no_damage_and_lists_every_file(tmp_path, sampler):
    folder = save_checkpoint(tmp_path, 3, sampler)
    assert find_damage(folder) is None
    complete = json.loads((folder / "complete.json").read_text())
    assert {name: entry["bytes"] for name, entry in complete["files"].items()} == {
        "trainer_state.json": len('{"global_step": 3}'),
        "weights.safetensors": 3 * 256,
    }
    assert complete["identity"] == sampler.identity
    assert sorted(path.name for path in folder.iterdir()) == sorted(["complete.json", *complete["files"]])


def test_the_newest_checkpoint_is_chosen_by_number(tmp_path, sampler):
    for step in (20, 100, 3):
        save_checkpoint(tmp_path, step, sampler)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-3"]
    assert find_checkpoint("True", str(tmp_path), sampler) == tmp_path / "checkpoint-100"


def test_a_checkpoint_without_its_mark_is_named_and_ignored(tmp_path, sampler, capsys):
    save_checkpoint(tmp_path, 20, sampler)
    unfinished = save_checkpoint(tmp_path, 100, None)
    assert find_checkpoint("True", str(tmp_path), sampler) == tmp_path / "checkpoint-20"
    assert f"ignoring {unfinished}: it has no complete.json" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no complete.json.*name a complete checkpoint"):
        find_checkpoint(str(unfinished), str(tmp_path), sampler)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_found_and_the_checkpoint_before_it_is_used(tmp_path, sampler, capsys, damage):
    save_checkpoint(tmp_path, 20, sampler)
    folder = save_checkpoint(tmp_path, 100, sampler)
    damage(folder / "weights.safetensors")
    assert find_damage(folder) == "missing or damaged: weights.safetensors"
    assert find_checkpoint("True", str(tmp_path), sampler) == tmp_path / "checkpoint-20"
    assert f"ignoring {folder}: missing or damaged: weights.safetensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match="weights.safetensors"):
        find_checkpoint(str(folder), str(tmp_path), sampler)


@pytest.mark.parametrize("content", ["", '{"identity": {}, "fi', "[]", "{}"])
def test_a_damaged_mark_is_damage_and_not_a_crash(tmp_path, sampler, content):
    save_checkpoint(tmp_path, 20, sampler)
    folder = save_checkpoint(tmp_path, 100, sampler)
    (folder / "complete.json").write_text(content)
    assert find_damage(folder) == "its complete.json is damaged"
    assert find_checkpoint("True", str(tmp_path), sampler) == tmp_path / "checkpoint-20"


def test_no_flipped_byte_of_the_mark_makes_a_crash(tmp_path, sampler):
    folder = save_checkpoint(tmp_path, 2, sampler)
    mark = (folder / "complete.json").read_bytes()
    outcomes = set()
    for at in range(len(mark)):
        (folder / "complete.json").write_bytes(mark[:at] + bytes([mark[at] ^ 1]) + mark[at + 1 :])
        try:
            outcomes.add(find_checkpoint(str(folder), str(tmp_path), sampler))
        except ValueError as refused:
            outcomes.add(next(word for word in ("damaged", "belongs to") if word in str(refused)))
    assert outcomes == {"damaged", "belongs to", folder}  # the size in bytes and white space decide nothing


def test_a_file_that_cannot_be_read_back_leaves_the_checkpoint_incomplete(tmp_path, sampler, monkeypatch):
    older, newer = save_checkpoint(tmp_path, 1, sampler), save_checkpoint(tmp_path, 2, None)

    def sha256(path: Path) -> str:
        if path.suffix == ".safetensors":
            raise OSError("input/output error")
        return "0"

    monkeypatch.setattr(data_collator, "sha256", sha256)
    with pytest.raises(OSError, match="input/output"):
        complete_checkpoint(newer, sampler)
    assert not (newer / "complete.json").exists() and (older / "complete.json").is_file()


def test_only_complete_checkpoints_count_for_the_limit_and_all_older_ones_go(tmp_path, sampler):
    for step in (10, 90, 105, 115):
        save_checkpoint(tmp_path, step, None)
    for step in (20, 30, 100):
        save_checkpoint(tmp_path, step, sampler)
    save_checkpoint(tmp_path, 110, sampler, save_total_limit=2)
    assert [int(path.name[11:]) for path in list_checkpoints(tmp_path)] == [115, 110, 105, 100]


@pytest.mark.parametrize("change", [{"seed": 43}, {"rows_per_step": 4}, {"dataset": 23}])
def test_a_checkpoint_of_another_row_order_is_refused(tmp_path, sampler, change):
    folder = save_checkpoint(tmp_path / "run", 20, sampler)
    arguments = {"dataset": sampler.dataset, "rows_per_step": 8, "seed": 42} | change
    if "dataset" in change:
        arguments["dataset"] = TokenizedDataset(save_rows(random_rows(22, seed=1), tmp_path / "other"))
    other = RowSampler(**arguments)
    for choice in ("True", str(folder)):
        with pytest.raises(ValueError, match="checkpoint-20 belongs to a run with"):
            find_checkpoint(choice, str(tmp_path / "run"), other)
    assert find_checkpoint(str(folder), str(tmp_path / "run"), sampler) == folder


def test_without_a_checkpoint_training_starts_from_the_beginning(tmp_path, sampler, capsys):
    assert find_checkpoint("True", str(tmp_path / "none"), sampler) is None
    assert "starting from the beginning" in capsys.readouterr().out
    save_checkpoint(tmp_path, 20, sampler)
    assert find_checkpoint("False", str(tmp_path), sampler) is None


def test_a_former_run_is_set_aside_whole(tmp_path, sampler):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / "notes.txt").write_text("mine")
    set_former_run_aside(output_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # holds no run
    save_checkpoint(output_dir, 20, sampler)
    set_former_run_aside(output_dir)
    (former,) = tmp_path.iterdir()
    assert former.name.startswith("run.2")
    assert find_damage(former / "checkpoint-20") is None
    assert (former / "notes.txt").read_text() == "mine"


def test_the_receipt_names_arguments_versions_data_and_row_order(tmp_path, sampler):
    write_receipt(tmp_path, {"learning_rate": 1e-3}, sampler, ["cpu"], {"tokens_per_second": 7.0})
    receipt = json.loads((tmp_path / "run.json").read_text())
    assert receipt["arguments"] == {"learning_rate": 1e-3}
    assert receipt["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert receipt["dataset"] == sampler.dataset.ledger
    assert receipt["identity"] == {
        "dataset_sha256": sampler.dataset.ledger["sha256"],
        "num_rows": 22,
        "rows_per_step": 8,
        "seed": 42,
        "script": Path(sys.argv[0]).name,
    }
    assert receipt["world_size"] == len(receipt["peak_memory_bytes"]) == 1
    assert receipt["devices"] == ["cpu"] and receipt["tokens_per_second"] == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
