"""Raw rows become token ids without a token lost, doubled or shifted, and mistakes end in a message."""

import copy
import csv
import gzip
import hashlib
import io
import json
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_shapes import TEMPLATES
from conftest import ROOT, make_tokenizer, run_script
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data_collator
from data_collator import IGNORE_INDEX, TokenizedDataset
from data_sample import ledger as ledgers
from data_sample import rendering, tokenize_dataset, writing

SCRIPT = "data_sample/tokenize_dataset.py"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = {
    "id": "q1",
    "sent1": "胸口疼 for two days 🫀.",
    "sent2": "Which department?",
    "ending0": "Urology",
    "ending1": "Cardiology",
    "ending2": "眼科",
    "ending3": "Dentistry",
    "label": 1,
}
TASK = {"instruction": "Translate.", "input": "你好 👋", "output": "Hello\n"}
ALPACA_START = "Below is an instruction that describes a task"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tokenizers by name: with and without BOS, without a template and with one, which may write BOS itself."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, adds_bos, chat_template in (
        ("plain", True, None),
        ("plain without BOS", False, None),
        ("chat", True, CHATML),
        ("chat without BOS", False, CHATML),
        ("chat that writes BOS", True, "{{ bos_token }}" + CHATML),
    ):
        tokenizer = make_tokenizer(adds_bos)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def tokenizers(folders) -> dict[str, PreTrainedTokenizerFast]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


NAMES = ["plain", "plain without BOS", "chat", "chat without BOS", "chat that writes BOS"]
every_tokenizer = pytest.mark.parametrize("name", NAMES)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def tokenize(path: Path, rows: list[dict], tokenizer, **arguments) -> tuple[list[dict], dict]:
    """The rows of the set that is made of `rows`, and its ledger."""
    arguments = {"input": str(write_jsonl(path, rows)), "max_length": 10**6} | arguments
    return tokenize_file(tokenizer, path.parent / f"{path.stem} set", **arguments)


def tokenize_file(tokenizer, output: Path, **arguments) -> tuple[list[dict], dict]:
    args = tokenize_dataset.Arguments(output=str(output), **arguments)
    tokenize_dataset.check_arguments(args)
    ledger = tokenize_dataset.build(args, tokenizer)["train"]
    return rows_of(output), ledger


def empty_sets_are_allowed():
    """For tests with random rows, of which none may be kept: the figures have to balance then, too."""
    return mock.patch.object(tokenize_dataset, "refuse_empty_sets", lambda args, outputs, ledger: None)


def without_eos(text: str) -> str:
    """An answer as it is learned: EOS at its end is written by the program, and is no part of it."""
    while text.endswith("</s>"):
        text = text.removesuffix("</s>")
    return text


def rows_of(folder: Path) -> list[dict]:
    return list(load_from_disk(str(folder))) if any(folder.glob("*.arrow")) else []


def all_rows(dataset: TokenizedDataset) -> list[dict]:
    return [dataset[number] for number in range(len(dataset))]


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets_of(row: dict) -> list[int]:
    return [label for label in row["labels"] if label != IGNORE_INDEX]


def run_main(monkeypatch, *command) -> None:
    """The program in this process: starting Python and importing transformers takes seconds."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, command)])
    tokenize_dataset.main()


# -------------------------------------------------------------------------------------------------------------------
# What a row becomes
# -------------------------------------------------------------------------------------------------------------------

CASES = {
    "mcq, text": (
        QUESTION,
        {},
        "胸口疼 for two days 🫀.\nWhich department?\n- Urology\n- Cardiology\n- 眼科\n- Dentistry",
        "\n\n### Answer:\n",
        "Cardiology",
    ),
    "mcq, letter": (
        QUESTION | {"ending4": "Surgery", "label": 4},
        {"answer": "letter"},
        "胸口疼 for two days 🫀.\nWhich department?\nA. Urology\nB. Cardiology\nC. 眼科\nD. Dentistry\nE. Surgery",
        "\n\n### Answer:\n",
        "E",
    ),
    "mcq, one sentence": (
        QUESTION | {"sent2": "", "label": 2},
        {},
        "胸口疼 for two days 🫀.\n- Urology\n- Cardiology\n- 眼科\n- Dentistry",
        "\n\n### Answer:\n",
        "眼科",
    ),
    "alpaca, input": (TASK, {"format": "alpaca"}, "Translate.\n\n你好 👋", None, "Hello\n"),
    "alpaca, no input": (TASK | {"input": ""}, {"format": "alpaca"}, "Translate.", None, "Hello\n"),
}


@every_tokenizer
@pytest.mark.parametrize("case", CASES)
def test_decoding_gives_the_rendered_text_and_targets_the_answer(tmp_path, tokenizers, name, case):
    raw, arguments, question, plain_end, answer = CASES[case]
    tokenizer = tokenizers[name]
    (row,), _ = tokenize(tmp_path / "rows.jsonl", [raw], tokenizer, **arguments)
    text = text_of(tokenizer, row["input_ids"])
    if name.startswith("chat"):
        prompt = f"<|im_start|>user\n{question}</s>\n<|im_start|>assistant\n"
    elif plain_end:
        prompt = question + plain_end
    else:
        prompt = text.removesuffix(f"{answer}</s>").removeprefix("<s>")
        assert prompt.startswith(ALPACA_START) and prompt.endswith("\n\n### Response:\n")
        assert f"### Instruction:\n{raw['instruction']}\n\n### " in prompt
        assert ("### Input:\n你好 👋\n\n### " in prompt) == bool(raw["input"])
    with_bos = "without" not in name
    assert text == "<s>" * with_bos + prompt + answer + "</s>"
    assert row["input_ids"].count(tokenizer.bos_token_id) == with_bos
    assert text_of(tokenizer, targets_of(row)) == answer + "</s>"


@every_tokenizer
def test_exactly_one_eos_is_a_target_and_it_is_the_last_token(tmp_path, tokenizers, name):
    rows, _ = tokenize(tmp_path / "rows.jsonl", [QUESTION, QUESTION | {"label": 3}], tokenizers[name])
    for row in rows:
        assert targets_of(row).count(tokenizers[name].eos_token_id) == 1
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizers[name].eos_token_id


@every_tokenizer
def test_the_prompt_is_masked_and_the_rest_is_not(tmp_path, tokenizers, name):
    (row,), ledger = tokenize(tmp_path / "rows.jsonl", [TASK], tokenizers[name], format="alpaca")
    num_targets = len(targets_of(row))
    assert row["labels"] == [IGNORE_INDEX] * (len(row["input_ids"]) - num_targets) + row["input_ids"][-num_targets:]
    assert ledger["targets"] == num_targets


@every_tokenizer
def test_train_on_prompt_labels_every_token(tmp_path, tokenizers, name):
    (row,), ledger = tokenize(tmp_path / "rows.jsonl", [TASK], tokenizers[name], format="alpaca", train_on_prompt=True)
    assert row["labels"] == row["input_ids"]
    assert ledger["targets"] == len(row["input_ids"]) - 1  # nothing stands before the first token


@every_tokenizer
@pytest.mark.parametrize("answer", ["text", "letter"])
def test_options_are_the_completions_with_the_right_one_first(tmp_path, tokenizers, name, answer):
    raw = QUESTION | {"label": 2}
    (row,), _ = tokenize(tmp_path / "rows.jsonl", [raw], tokenizers[name], answer=answer)
    texts = [text_of(tokenizers[name], ids) for ids in row["options"]]
    expected = ["C", "A", "B", "D"] if answer == "letter" else ["眼科", "Urology", "Cardiology", "Dentistry"]
    assert texts == [f"{option}</s>" for option in expected]
    assert row["options"][0] == targets_of(row)


def test_no_token_spans_the_border_between_prompt_and_answer(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet, "ĊC"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "C")]))  # its one merge is a line end with a capital C
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("\nC").input_ids == [vocabulary["ĊC"]]
    (row,), _ = tokenize(tmp_path / "rows.jsonl", [QUESTION], tokenizer)
    assert text_of(tokenizer, targets_of(row)) == "Cardiology</s>"
    prompt_ids = row["input_ids"][: -len(targets_of(row))]
    assert prompt_ids == tokenizer(text_of(tokenizer, prompt_ids)).input_ids  # what generation starts from
    assert row["input_ids"].count(vocabulary["ĊC"]) == 0


@every_tokenizer
def test_vocabulary_hash_is_that_of_the_shared_module(tokenizers, name):
    tokenizer = make_tokenizer()
    assert rendering.vocabulary_hash(tokenizers[name]) == data_collator.vocabulary_hash(tokenizers[name])
    assert data_collator.vocabulary_hash(tokenizers[name]) == data_collator.vocabulary_hash(tokenizer)
    tokenizer.add_tokens(["<another>"])
    assert rendering.vocabulary_hash(tokenizer) == data_collator.vocabulary_hash(tokenizer)
    assert data_collator.vocabulary_hash(tokenizers[name]) != data_collator.vocabulary_hash(tokenizer)


# -------------------------------------------------------------------------------------------------------------------
# The ledger
# -------------------------------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(
        ["", " ", "\n\t", "\u3000", "\x00\x1f\x7f", "你好，世界。", "👩‍⚕️🩺", "\ufeff", "a\u2028b\r\nc", "  x  "]
    ),
    st.sampled_from(["<s>struck out</s>", "stop</s>", "<unk>", "{question}", "{{ eos_token }}"]),
)
tasks = st.fixed_dictionaries({"instruction": texts, "output": texts}, optional={"input": texts})


@settings(deadline=None, max_examples=120)
@given(st.lists(tasks, max_size=6), st.sampled_from(NAMES), st.integers(2, 250), st.booleans())
def test_the_ledger_balances_and_every_answer_comes_back(
    tokenizers, tmp_path_factory, raw_rows, name, max_length, train_on_prompt
):
    tokenizer, path = tokenizers[name], tmp_path_factory.getbasetemp() / "random.jsonl"
    arguments = {"format": "alpaca", "train_on_prompt": train_on_prompt}
    with empty_sets_are_allowed():
        every_length, before = tokenize(path, raw_rows, tokenizer, **arguments)
        rows, ledger = tokenize(path, raw_rows, tokenizer, max_length=max_length, **arguments)

    assert ledger["stripped_eos"] == sum(raw["output"].endswith("</s>") for raw in raw_rows)
    raw_rows = [raw | {"output": without_eos(raw["output"])} for raw in raw_rows]
    no_target = [raw for raw in raw_rows if not raw["output"].strip()]
    special = [
        raw
        for raw in raw_rows
        if raw not in no_target and any(token in text for text in raw.values() for token in ("<s>", "</s>", "<unk>"))
    ]
    complete = [raw for raw in raw_rows if raw not in no_target and raw not in special]
    assert len(every_length) == len(complete)
    fitting = [raw for raw, row in zip(complete, every_length, strict=True) if len(row["input_ids"]) <= max_length]
    assert ledger["rows"] == {
        "in": len(raw_rows),
        "kept": len(fitting),
        "broken": 0,
        "no_target": len(no_target),
        "special_token": len(special),
        "too_long": len(complete) - len(fitting),
        "other_split": 0,
    }
    assert rows == [row for row in every_length if len(row["input_ids"]) <= max_length]
    assert ledger["tokens"]["in"] == sum(ledger["tokens"].values()) - ledger["tokens"]["in"] == before["tokens"]["in"]
    assert ledger["tokens"]["kept"] == sum(len(row["input_ids"]) for row in rows)
    assert before["tokens"]["too_long"] == 0
    assert ledger["tokens"]["kept"] + ledger["tokens"]["too_long"] == before["tokens"]["kept"]
    assert ledger["targets"] == sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])

    for raw, row in zip(fitting, rows, strict=True):
        text = text_of(tokenizer, row["input_ids"])
        assert text.endswith(raw["output"] + "</s>")
        assert raw["instruction"] in text and raw.get("input", "") in text
        assert row["input_ids"].count(tokenizer.bos_token_id) == ("without" not in name)
        if train_on_prompt:
            assert row["labels"] == row["input_ids"]
        else:
            assert text_of(tokenizer, targets_of(row)) == raw["output"] + "</s>"


@pytest.mark.parametrize("empty", ["", " \n\t", "\u3000"])
def test_an_empty_answer_is_dropped_and_counted(tmp_path, tokenizers, empty):
    raw_rows = [TASK, TASK | {"output": empty}, TASK]
    rows, ledger = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizers["plain"], format="alpaca")
    assert len(rows) == 2
    assert (ledger["rows"]["in"], ledger["rows"]["kept"], ledger["rows"]["no_target"]) == (3, 2, 1)
    assert ledger["tokens"]["no_target"] > 0


def test_max_length_is_the_longest_row_that_is_kept(tmp_path, tokenizers):
    raw_rows = [QUESTION, QUESTION | {"sent1": QUESTION["sent1"] * 2}]
    whole, _ = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizers["plain"])
    length = len(whole[1]["input_ids"])
    for max_length, kept in ((length, 2), (length - 1, 1)):
        rows, ledger = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizers["plain"], max_length=max_length)
        assert rows == whole[:kept]
        assert ledger["rows"]["kept"] == kept
        assert ledger["tokens"]["too_long"] == (2 - kept) * length


EMPTY = {  # rows of which none is kept, flags, and what the message names beside the place of the first
    "no rows": ([], {}, ["the input has no rows"]),
    "too long": ([TASK] * 3, {"max_length": 5}, ["longer than --max_length: 3 of 3 rows", "raise --max_length, up to"]),
    "empty": ([TASK | {"output": " "}, TASK | {"output": ""}], {}, ["nothing to learn", "2 of 2", "not empty"]),
    "special": ([TASK | {"input": "<s>"}], {}, ["spells a special token: 1 of 1 rows", "take such texts out"]),
    "broken": ([{"instruction": "a"}], {"on_bad_row": "skip"}, ["broken row: 1 of 1 rows"]),
    "two reasons": ([TASK | {"input": "<s>"}, {}, {}], {"on_bad_row": "skip"}, ["broken row: 2 of 3 rows"]),
}


@pytest.mark.parametrize("case", EMPTY)
def test_a_set_of_nothing_is_an_error_with_its_largest_reason(tmp_path, tokenizers, case):
    raw_rows, flags, fragments = EMPTY[case]
    flags = {"format": "alpaca", "max_length": 100} | flags
    whose = "rows set: no row of it was kept"
    if case == "no rows":
        whose = "--input .*rows.jsonl: the input has no rows"
    with pytest.raises(ValueError, match=whose) as raised:
        tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizers["plain"], **flags)
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == [], str(raised.value)
    if case in ("too long", "empty", "special"):
        assert f"the first: {tmp_path / 'rows.jsonl'}, line 1" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_validation_set_of_nothing_is_an_error(tmp_path, tokenizers):
    with pytest.raises(ValueError, match="rows set_val: no row of it was kept.*choose another --val_size"):
        tokenize(tmp_path / "rows.jsonl", [TASK], tokenizers["plain"], format="alpaca", val_size=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# -------------------------------------------------------------------------------------------------------------------
# Packing
# -------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_packing_puts_every_document_once_into_rows_that_fit(case):
    max_length, lengths = case
    bins = writing.pack(lengths, max_length)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    fills = sorted(sum(lengths[index] for index in members) for members in bins)
    assert all(0 < fill <= max_length for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > max_length  # no two rows could have been one


def test_packing_takes_long_documents_first_and_then_the_tightest_room():
    assert writing.pack([3, 3, 3, 7, 7, 7], 10) == [[3, 0], [4, 1], [5, 2]]
    assert writing.pack([5, 6, 4, 8, 2, 5], 10) == [[3, 4], [1, 2], [0, 5]]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(3, 299), min_size=2, max_size=9), min_size=1, max_size=20), st.integers(9, 20))
def test_packed_documents_are_whole_and_their_positions_restart(documents, max_length):
    labels = [[IGNORE_INDEX, *ids[1:]] for ids in documents]
    lists = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.array(documents, lists), "labels": pa.array(labels, lists)})
    found = Counter()
    for row in writing.join_documents(table, max_length).to_pylist():
        assert set(map(len, row.values())) == {len(row["input_ids"])}
        assert len(row["input_ids"]) <= max_length
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start:end] == [IGNORE_INDEX, *row["input_ids"][start + 1 : end]]
            found[tuple(row["input_ids"][start:end])] += 1
    assert found == Counter(map(tuple, documents))


@pytest.mark.parametrize("seed", range(3))
def test_packing_fills_97_percent_with_lengths_like_alpacas(seed):
    lengths = np.random.default_rng(seed).lognormal(np.log(110), 0.8, size=5000).clip(16, 2048).astype(int).tolist()
    started = time.perf_counter()
    bins = writing.pack(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) >= 0.97
    assert time.perf_counter() - started < 2


# -------------------------------------------------------------------------------------------------------------------
# The program
# -------------------------------------------------------------------------------------------------------------------


def test_the_shipped_questions_become_a_set_that_training_opens(tmp_path, monkeypatch, capsys, folders, tokenizers):
    output, raw = tmp_path / "new" / "set", ROOT / "data_sample" / "triage_test.jsonl"
    run_main(monkeypatch, "--input", raw, "--tokenizer_path", folders["plain"], "--output", output)
    dataset = TokenizedDataset(output, tokenizer=tokenizers["plain"])
    questions = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    assert len(dataset) == len(questions) and not dataset.packed
    for row, question in zip(all_rows(dataset), questions, strict=True):
        targets = row["labels"][row["labels"] != IGNORE_INDEX].tolist()
        assert text_of(tokenizers["plain"], targets) == question[f"ending{question['label']}"] + "</s>"
    assert list(load_from_disk(str(output)).features) == ["input_ids", "labels", "options"]
    ledger = json.loads((output / "ledger.json").read_text(encoding="utf-8"))
    assert {reason: number for reason, number in ledger["rows"].items() if number} == {"in": 132, "kept": 132}
    assert ledger["rows_written"] == 132
    assert ledger["input_sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    tokenizer_json = folders["plain"] / "tokenizer.json"
    assert ledger["tokenizer_json_sha256"] == hashlib.sha256(tokenizer_json.read_bytes()).hexdigest()
    assert f"{ledger['targets']:,} target tokens in 132 written rows" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["set"]


def test_the_shipped_instructions_are_packed_whole(tmp_path, monkeypatch, folders, tokenizers):
    raw, command = ROOT / "data_sample" / "instruct_zh_en.json", ["--format", "alpaca", "--max_length", 1024]
    command += ["--input", raw, "--tokenizer_path", folders["chat"], "--output", tmp_path / "set"]
    run_main(monkeypatch, *command, "--packing", "True", "--train_on_prompt", "True")
    dataset = TokenizedDataset(tmp_path / "set", tokenizer=tokenizers["chat"])
    ledger, tokenizer = dataset.ledger, tokenizers["chat"]
    assert dataset.packed and set(dataset[0]) == {"input_ids", "labels", "position_ids"}
    assert ledger["rows"]["in"] == len(json.loads(raw.read_text(encoding="utf-8")))
    assert ledger["rows_written"] == len(dataset) < ledger["rows"]["kept"]
    assert max(len(row["input_ids"]) for row in all_rows(dataset)) <= 1024
    assert sum(len(row["input_ids"]) for row in all_rows(dataset)) == ledger["tokens"]["kept"]
    assert sum(int((row["position_ids"] == 0).sum()) for row in all_rows(dataset)) == ledger["rows"]["kept"]
    assert (
        sum(int((row["input_ids"] == tokenizer.bos_token_id).sum()) for row in all_rows(dataset))
        == ledger["rows"]["kept"]
    )
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in all_rows(dataset))
    assert all((row["labels"] == row["input_ids"]).all() for row in all_rows(dataset))


def test_the_same_input_gives_the_same_bytes_and_replaces_the_former_set(tmp_path, monkeypatch, folders):
    raw, hashes = write_jsonl(tmp_path / "rows.jsonl", [QUESTION, QUESTION | {"label": 3}]), []
    for rows_before in (0, 2):
        assert (len(TokenizedDataset(tmp_path / "set")) if (tmp_path / "set").exists() else 0) == rows_before
        command = ("--input", raw, "--tokenizer_path", folders["plain"], "--output", tmp_path / "set")
        run_main(monkeypatch, *command)
        hashes.append(TokenizedDataset(tmp_path / "set").ledger["sha256"])
    assert hashes[0] == hashes[1]
    run_main(monkeypatch, *command, "--answer", "letter")
    assert TokenizedDataset(tmp_path / "set").ledger["sha256"] != hashes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "set"]


def test_a_set_does_not_take_back_the_rows_that_were_split_off_it(tmp_path, monkeypatch, folders):
    """Else the rows that a model is evaluated on would be among those it is trained on."""
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION] * 8)
    command = ("--input", raw, "--tokenizer_path", folders["plain"], "--output", tmp_path / "set")
    run_main(monkeypatch, *command, "--val_size", 0.5)
    before = TokenizedDataset(tmp_path / "set").ledger["sha256"]
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *command)
    assert f"the new set would have the rows of {tmp_path / 'set_val'}, which was split off" in stopped.value.code
    assert TokenizedDataset(tmp_path / "set").ledger["sha256"] == before
    run_main(monkeypatch, *command, "--val_size", 0.25)
    shutil.rmtree(tmp_path / "set_val")
    run_main(monkeypatch, *command)
    assert TokenizedDataset(tmp_path / "set").ledger["documents"] == 8


def test_a_comma_of_a_chinese_keyboard_is_named(tmp_path, monkeypatch, folders):
    raw = write_jsonl(tmp_path / "rows.jsonl", [TASK])
    command = ("--input", raw, "--format", "alpaca", "--tokenizer_path", folders["chat"], "--output", tmp_path / "set")
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *command, "--columns", "instruction=问题，output=答案")
    assert "separate them by an ASCII comma, not by ，" in stopped.value.code


def test_windows_line_ends_and_a_byte_order_mark_go_through(tmp_path, monkeypatch, folders):
    texts = {
        "unix.jsonl": write_jsonl(tmp_path / "unix.jsonl", [TASK, TASK]).read_bytes(),
        "unix.json": json.dumps([TASK, TASK], indent=1).encode(),
    }
    texts["windows.jsonl"] = b"\xef\xbb\xbf" + texts["unix.jsonl"].replace(b"\n", b"\r\n") + b"\r\n"
    texts["windows.json"] = b"\xef\xbb\xbf" + texts["unix.json"].replace(b"\n", b"\r\n")
    hashes = set()
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        command = ("--input", tmp_path / name, "--format", "alpaca", "--tokenizer_path", folders["chat"])
        run_main(monkeypatch, *command, "--output", tmp_path / "set")
        dataset = TokenizedDataset(tmp_path / "set")
        assert len(dataset) == 2
        hashes.add(dataset.ledger["sha256"])
    assert len(hashes) == 1


@pytest.mark.parametrize("val_size", [0, 0.3])
def test_a_part_of_a_set_may_be_empty_by_chance(tmp_path, tokenizers, val_size):
    """Four machines, two rows: two of the parts have none. What lost all its rows is an error there, too."""
    raw = write_jsonl(tmp_path / "rows.jsonl", [TASK] * 2)
    num_rows = 0
    for number in range(1, 5):
        flags = {"shard": f"{number}/4", "val_size": val_size}
        rows, _ = tokenize_file(
            tokenizers["plain"], tmp_path / "set", input=str(raw), format="alpaca", max_length=400, **flags
        )
        num_rows += len(rows_of(tmp_path / f"set-{number}-of-4"))
        if val_size:
            num_rows += len(rows_of(tmp_path / f"set_val-{number}-of-4"))
    assert num_rows == 2
    with pytest.raises(ValueError, match="longer than --max_length: 1 of 1 rows"):
        tokenize_file(tokenizers["plain"], tmp_path / "new", input=str(raw), format="alpaca", max_length=5, shard="1/4")


# -------------------------------------------------------------------------------------------------------------------
# Mistakes
# -------------------------------------------------------------------------------------------------------------------


def question_without(name: str) -> dict:
    return {key: value for key, value in QUESTION.items() if key != name}


GOOD = json.dumps(QUESTION)
LONE_SURROGATE = '{"instruction": "half a smile \\ud83d", "output": "b"}'
MISTAKES = {  # what the input file holds, further flags, what the message must name
    "missing file": (None, (), ["--input", "in.jsonl", "no such file"]),
    "unknown format": (GOOD, ("--format", "medqa"), ["--format medqa", "mcq, alpaca, chat, preference or text"]),
    "unknown kind of answer": (GOOD, ("--answer", "number"), ["--answer number", "text or letter"]),
    "length of one": (GOOD, ("--max_length", "1"), ["--max_length 1", "at least 2"]),
    "length in words": (GOOD, ("--max_length", "long"), ["--max_length", "long"]),
    "unknown flag": (GOOD, ("--max_lenght", "8"), ["--max_lenght"]),
    "abbreviated flag": (GOOD, ("--max_len", "8"), ["--max_len"]),
    "label out of range": (
        f"{GOOD}\n{json.dumps(QUESTION | {'label': 4})}",
        (),
        ["in.jsonl, line 2", "label is 4", "0 to 3"],
    ),
    "negative label": (json.dumps(QUESTION | {"label": -1}), (), ["in.jsonl, line 1", "label is -1"]),
    "label a word": (json.dumps(QUESTION | {"label": "B"}), (), ["in.jsonl, line 1", "label is 'B'", "count from 0"]),
    "label between": (json.dumps(QUESTION | {"label": 1.5}), (), ["in.jsonl, line 1", "label is 1.5"]),
    "label True": (json.dumps(QUESTION | {"label": True}), (), ["in.jsonl, line 1", "label is True"]),
    "no label": (json.dumps(question_without("label")), (), ["in.jsonl, line 1", "label"]),
    "no option": (json.dumps(question_without("ending2")), (), ["in.jsonl, line 1", "ending2 is missing"]),
    "empty option": (json.dumps(QUESTION | {"ending1": " "}), (), ["in.jsonl, line 1", "ending1 is empty"]),
    "option a number": (json.dumps(QUESTION | {"ending4": 5}), (), ["in.jsonl, line 1", "ending4 is not a text"]),
    "other format": (GOOD, ("--format", "alpaca"), ["in.jsonl, line 1", "instruction is missing"]),
    "output a list": (
        json.dumps(TASK | {"output": ["a"]}),
        ("--format", "alpaca"),
        ["in.jsonl, line 1", "output is not a text"],
    ),
    "input a number": (
        json.dumps(TASK | {"input": 7}),
        ("--format", "alpaca"),
        ["in.jsonl, line 1", "input is not a text"],
    ),
    "half a character": (LONE_SURROGATE, ("--format", "alpaca"), ["in.jsonl, line 1", "instruction", "surrogate"]),
    "row no object": (f"{GOOD}\n[1]", (), ["in.jsonl, line 2", "list"]),
    "broken line": (f"{GOOD}\n\n{GOOD[:-5]}\n", (), ["in.jsonl, line 3", "not JSON"]),
    "Chinese encoding": (GOOD.encode() + "中文".encode("gbk"), (), ["in.jsonl", "not UTF-8"]),
    "no tokenizer": (GOOD, ("--tokenizer_path", "{tmp}"), ["--tokenizer_path", "no tokenizer"]),
    "folder below a file": (GOOD, ("--output", "{tmp}/in.jsonl/set"), ["--output", "no writable folder"]),
    "output is something else": (GOOD, ("--output", "{tmp}/mine"), ["--output", "mine", "not a tokenized set"]),
    "output is a file": (GOOD, ("--output", "{tmp}/in.jsonl"), ["--output", "not a tokenized set"]),
    "no output": (GOOD, ("--output", ""), ["--output is missing"]),
    "no input": (GOOD, ("--input", ""), ["--input is missing"]),
    "three mistakes at once": (
        None,
        ("--format", "medqa", "--max_length", "0"),
        ["--input", "no such file", "--format medqa", "--max_length 0"],
    ),
}


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_a_message_and_writes_nothing(tmp_path, monkeypatch, capsys, folders, mistake):
    content, flags, fragments = MISTAKES[mistake]
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    command = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "set", "--tokenizer_path", folders["plain"]]
    with pytest.raises(SystemExit) as ended:  # any other exception would be a traceback
        run_main(monkeypatch, *command, *(flag.format(tmp=tmp_path) for flag in flags))
    message = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert ended.value.code != 0
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "fragments"),
    [('{"instruction": "a", "output": "b"}', ["a list of rows", "dict"]), ("[\n{},\n{", ["line 3", "not JSON"])],
)
def test_a_json_file_that_is_no_list_is_named(tmp_path, monkeypatch, folders, content, fragments):
    (tmp_path / "in.json").write_text(content)
    command = ("--input", tmp_path / "in.json", "--format", "alpaca", "--tokenizer_path", folders["plain"])
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *command, "--output", tmp_path / "set")
    assert all(fragment in ended.value.code for fragment in [str(tmp_path / "in.json"), *fragments])
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_a_row_of_a_json_list_is_named_by_its_number(tmp_path, monkeypatch, folders):
    (tmp_path / "in.json").write_text(json.dumps([TASK, {"instruction": "a"}]))
    command = ("--input", tmp_path / "in.json", "--format", "alpaca", "--tokenizer_path", folders["plain"])
    with pytest.raises(SystemExit, match=r"in\.json, row 2: field output is missing"):
        run_main(monkeypatch, *command, "--output", tmp_path / "set")


def test_a_tokenizer_without_eos_is_refused(tmp_path, monkeypatch):
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(SystemExit, match="--tokenizer_path .*no_eos: it has no EOS token"):
        run_main(monkeypatch, "--input", raw, "--tokenizer_path", tmp_path / "no_eos", "--output", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }}", "{{ 1 + 'a' }}", "{{ nothing.at.all }}"]
)
def test_a_chat_template_that_cannot_render_ends_in_one_message(tmp_path, monkeypatch, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "broken")
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(SystemExit, match="--tokenizer_path .*broken: its chat template cannot render .*mend chat_temp"):
        run_main(monkeypatch, "--input", raw, "--tokenizer_path", tmp_path / "broken", "--output", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, tokenizers):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}" + CHATML
    )
    good = {"messages": CONVERSATION[1:3]}
    raw_rows = [good, {"messages": CONVERSATION}, good]
    with pytest.raises(ValueError, match="line 2: .*cannot render it .TemplateError: too many turns") as raised:
        tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizer, format="chat")
    assert "--on_bad_row skip" in str(raised.value)
    rows, ledger = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizer, format="chat", on_bad_row="skip")
    assert len(rows) == 2 and ledger["rows"]["broken"] == 1
    assert ledger["fields"]["broken"] == 1 + 2 * len(CONVERSATION)


@pytest.mark.parametrize("files", [["tokenizer.model"], ["tokenizer.model", "params.json"]])
def test_metas_folder_is_no_tokenizer(tmp_path, monkeypatch, sentencepiece_tokenizer, files):
    """transformers would open it, and its ids have neither BOS nor the space before the first word."""
    original = Path(sentencepiece_tokenizer.name_or_path).parent / "tokenizer.model"
    (tmp_path / "meta").mkdir()
    for name in files:
        (tmp_path / "meta" / name).write_bytes(original.read_bytes())
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(SystemExit, match="meta: tokenizer.model stands alone, as in Meta's folders"):
        run_main(monkeypatch, "--input", raw, "--tokenizer_path", tmp_path / "meta", "--output", tmp_path / "set")


def test_a_tokenizer_that_cannot_be_loaded_ends_in_one_line(tmp_path, monkeypatch):
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, remedy in (("none", "there is no such folder, .*quickstart.sh"), ("broken", "download .* files again")):
        flags = ["--input", raw, "--tokenizer_path", tmp_path / name, "--output", tmp_path / "set"]
        with pytest.raises(
            SystemExit, match=f"--tokenizer_path .*{name}: no tokenizer can be loaded .*{remedy}"
        ) as end:
            run_main(monkeypatch, *flags)
        assert "\n" not in str(end.value)


def test_special_tokens_that_are_empty_texts_end_in_one_message(tmp_path, monkeypatch, sentencepiece_tokenizer):
    original = Path(sentencepiece_tokenizer.name_or_path).parent / "tokenizer.model"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer.model").write_bytes(original.read_bytes())
    settings = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(
        SystemExit, match="bos_token, eos_token, unk_token in .* are empty texts; LLaMA's are <s>, </s>"
    ):
        run_main(monkeypatch, "--input", raw, "--tokenizer_path", tmp_path / "old", "--output", tmp_path / "set")


def test_code_in_the_tokenizers_folder_is_neither_run_nor_asked_about(tmp_path, folders):
    folder = tmp_path / "remote"
    folder.mkdir()
    for path in folders["plain"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION])
    flags = ["--input", raw, "--tokenizer_path", folder, "--output", tmp_path / "set"]
    completed = subprocess.run([sys.executable, SCRIPT, *map(str, flags)], cwd=ROOT, input="y\n", capture_output=True,
                               text=True)  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in completed.stdout + completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--input", "missing.jsonl", "--format", "medqa", "--output", "tests"), ["--input", "--format", "--output"]),
        (("--inptu", "missing.jsonl"), ["--inptu"]),
    ],
)
def test_the_program_itself_ends_without_a_traceback(flags, fragments):
    completed = run_script(SCRIPT, *flags, check=False)
    assert completed.returncode not in (0, -9)
    assert "Traceback" not in completed.stdout + completed.stderr
    assert [fragment for fragment in fragments if fragment not in completed.stderr] == []


# -------------------------------------------------------------------------------------------------------------------
# Kills
# -------------------------------------------------------------------------------------------------------------------


def assert_whole(folder: Path) -> None:
    dataset = TokenizedDataset(folder)
    assert len(dataset) == dataset.ledger["rows_written"] == dataset.ledger["rows"]["kept"]
    assert sum(len(row["input_ids"]) for row in all_rows(dataset)) == dataset.ledger["tokens"]["kept"]
    arrow = b"".join(path.read_bytes() for path in sorted(folder.glob("*.arrow")))
    assert hashlib.sha256(arrow).hexdigest() == dataset.ledger["sha256"]


def accepted_folders(root: Path) -> list[Path]:
    """Every folder below, hidden ones too, that training would open; all of them must be whole."""
    accepted = []
    for folder in filter(Path.is_dir, root.rglob("*")):
        try:
            TokenizedDataset(folder)
        except (ValueError, OSError):
            continue
        assert_whole(folder)
        accepted.append(folder)
    return accepted


@pytest.mark.parametrize("moment", [".set-*", ".set-*/set/*.arrow"])
def test_a_kill_while_writing_leaves_no_set_that_is_not_whole(tmp_path, monkeypatch, folders, moment):
    raw = write_jsonl(tmp_path / "rows.jsonl", [TASK | {"output": "an answer of some length " * 800}] * 40)
    command = ["--input", raw, "--format", "alpaca", "--tokenizer_path", folders["plain"], "--max_length", 10**6]
    command += ["--output", tmp_path / "set"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not any(tmp_path.glob(moment)):
        time.sleep(0.0005)
    process.kill()
    killed = process.wait() == -9
    accepted = accepted_folders(tmp_path)
    if moment == ".set-*":  # half a second before the end; the other moment may pass unseen on a busy machine
        assert killed and accepted == []
    run_main(monkeypatch, *command)  # what the kill left does not stand in the way
    assert len(TokenizedDataset(tmp_path / "set")) == 40


# Runs the program again and again, each time in a new folder and killed one step in the file system later, until it
# ends by itself. The runs are forks, so that the imports are paid once.
KILL_AT_EVERY_STEP = """
import os, runpy, shutil, signal, sys
import datasets, tqdm
from transformers import AutoTokenizer, HfArgumentParser

root, former, *sys.argv = sys.argv[1:]
for number in range(100):
    folder, steps = f"{root}/{number}", []
    os.mkdir(folder)
    if former:
        shutil.copytree(former, folder + "/set")
    if os.fork() == 0:
        def kill(event, arguments):
            if event in ("open", "os.mkdir", "os.rename", "shutil.rmtree") and str(arguments[0]).startswith(folder):
                steps.append(event)
                if len(steps) > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        sys.argv += ["--output", folder + "/set"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status != -9:
        sys.exit(f"{number} kills, then status {status}")
"""


@pytest.mark.parametrize("with_former_set", [False, True])
def test_a_kill_at_any_step_of_writing_leaves_the_old_set_or_the_new_one(
    tmp_path, monkeypatch, folders, with_former_set
):
    raw = write_jsonl(tmp_path / "rows.jsonl", [QUESTION] * 3)
    flags, former = ["--input", raw, "--tokenizer_path", folders["plain"]], ""
    if with_former_set:
        former = tmp_path / "former"
        run_main(monkeypatch, *flags, "--answer", "letter", "--output", former)
    (tmp_path / "runs").mkdir()
    completed = run_script("-c", KILL_AT_EVERY_STEP, tmp_path / "runs", former, SCRIPT, *flags, check=False, fresh=True)
    num_kills = len(list((tmp_path / "runs").iterdir())) - 1
    assert completed.stderr.splitlines()[-1] == f"{num_kills} kills, then status 0"
    assert num_kills >= 6  # two folders made, three files of datasets, the ledger, the rename
    found = Counter()
    for run in (tmp_path / "runs").iterdir():
        accepted = accepted_folders(run)
        assert ((run / "set") in accepted) == (run / "set").exists()  # what bears the name is whole
        assert accepted or not with_former_set  # a set that was there is never lost
        found[TokenizedDataset(run / "set").ledger["answer"] if (run / "set").exists() else None] += 1
    assert found["text"] >= 1
    assert found["letter" if with_former_set else None] >= 5


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_worker_outlives_a_program_that_was_killed(tmp_path, folders):
    write_jsonl(tmp_path / "rows.jsonl", [TASK | {"output": "an answer of some length " * 800}] * 2000)
    command = ["--input", tmp_path / "rows.jsonl", "--format", "alpaca", "--tokenizer_path", folders["plain"]]
    command += ["--max_length", 10**6, "--num_proc", 3, "--output", tmp_path / "set"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    workers = []
    while process.poll() is None and len(workers) < 3:
        workers = children_of(process.pid)
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -9 and len(workers) == 3
    ends = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


@pytest.mark.parametrize("packing", [False, True])
def test_a_disk_that_is_full_ends_in_a_message_and_leaves_nothing(tmp_path, monkeypatch, folders, packing):
    raw = write_jsonl(tmp_path / "rows.jsonl", [TASK] * 500)
    command = ["--input", raw, "--format", "alpaca", "--tokenizer_path", folders["plain"], "--packing", packing]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file may grow further, as on a full disk
    try:
        with pytest.raises(SystemExit, match="--output .*set: cannot be written .*nothing of it was left"):
            run_main(monkeypatch, *command, "--output", tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# -------------------------------------------------------------------------------------------------------------------
# Conversations, documents, and every kind of file
# -------------------------------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No 👋\n"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], "system"), "value": turn["content"]}
    for turn in CONVERSATION
]


@pytest.mark.parametrize("name", ["chat", "chat without BOS", "chat that writes BOS"])
@pytest.mark.parametrize("raw", [{"messages": CONVERSATION}, {"conversations": SHAREGPT}], ids=["chat", "sharegpt"])
def test_every_turn_of_the_assistant_is_a_target_and_nothing_else(tmp_path, tokenizers, name, raw):
    (row,), ledger = tokenize(tmp_path / "rows.jsonl", [raw], tokenizers[name], format="chat")
    text = tokenizers[name].apply_chat_template(CONVERSATION, tokenize=False).rstrip().removeprefix("<s>")
    assert text_of(tokenizers[name], row["input_ids"]) == "<s>" * ("without" not in name) + text
    assert text_of(tokenizers[name], targets_of(row)) == "Hello</s>No 👋\n</s>"
    assert ledger["targets"] == len(targets_of(row))


def test_alpacas_system_and_history_stand_in_the_prompt(tmp_path, tokenizers):
    raw = TASK | {"system": "Be brief.", "history": [["Hi", "Hello"]]}
    for name in ("plain", "chat"):
        (row,), _ = tokenize(tmp_path / "rows.jsonl", [raw], tokenizers[name], format="alpaca")
        text = text_of(tokenizers[name], row["input_ids"])
        places = [text.index(part) for part in ("Be brief.", "Hi", "Hello</s>", "Translate.", "Hello\n</s>")]
        assert places == sorted(places)
        assert text_of(tokenizers[name], targets_of(row)) == "Hello\n</s>"


def test_a_document_keeps_all_its_ids_and_its_special_tokens_are_text(tmp_path, tokenizers):
    text = "a <s>struck out</s> word \x00 你好 👩‍⚕️ שלום\u200b\n" * 40
    (row,), ledger = tokenize(
        tmp_path / "rows.jsonl", [{"text": text}], tokenizers["plain"], format="text", max_length=9
    )
    assert list(row) == ["input_ids"]
    assert text_of(tokenizers["plain"], row["input_ids"]) == f"<s>{text}</s>"
    assert row["input_ids"].count(1) == row["input_ids"].count(2) == 1
    assert ledger["tokens"]["kept"] == len(row["input_ids"]) == ledger["targets"] + 1
    assert len(TokenizedDataset(tmp_path / "rows set", tokenizer=tokenizers["plain"], passage_length=8)) == 1


def test_a_template_file_is_the_prompt(tmp_path, tokenizers):
    (tmp_path / "prompt.txt").write_text("{{case}} {question}\nAnswer: ")
    (row,), ledger = tokenize(
        tmp_path / "rows.jsonl", [QUESTION], tokenizers["plain"], template=str(tmp_path / "prompt.txt")
    )
    text = text_of(tokenizers["plain"], row["input_ids"])
    assert text.startswith("<s>{case} 胸口疼") and text.endswith("\nAnswer: Cardiology</s>")
    assert ledger["template"]["prompt"] == "{{case}} {question}\nAnswer: "


def write_file(path: Path, rows: list[dict]) -> None:
    """Writes Alpaca rows in the form that the name asks for."""
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if plain.suffix == ".csv":
        content = io.StringIO()
        writer = csv.DictWriter(content, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        data = content.getvalue().encode()
    elif plain.suffix == ".json":
        data = json.dumps(rows).encode()
    else:
        data = write_jsonl(path, rows).read_bytes()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
        return
    path.write_bytes(data)


TASKS = [TASK | {"output": f"answer {i}, {'很' * i}\n"} for i in range(40)]
KINDS = ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.json.zst"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_set(tmp_path, tokenizers, name):
    write_file(tmp_path / name, TASKS)
    rows, ledger = tokenize_file(
        tokenizers["plain"], tmp_path / "set", input=str(tmp_path / name), format="alpaca", max_length=10**6
    )
    expected, _ = tokenize(tmp_path / "expected.jsonl", TASKS, tokenizers["plain"], format="alpaca")
    assert rows == expected
    assert ledger["input_sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_a_folder_a_glob_a_url_and_stdin(tmp_path, monkeypatch, capsys, tokenizers):
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    write_file(tmp_path / "in" / "a.jsonl.gz", TASKS[:10])
    write_file(folder / "b.parquet", TASKS[10:])
    (folder / "notes.docx").write_text("not data")
    content = b"".join(json.dumps(row).encode() + b"\n" for row in TASKS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    expected, _ = tokenize(tmp_path / "expected.jsonl", TASKS, tokenizers["plain"], format="alpaca")
    write_file(tmp_path / "rows.jsonl", TASKS)
    for name in (f"{tmp_path}/in", f"{tmp_path}/in/**/*.[jp]*", f"file://{tmp_path}/rows.jsonl", "-"):
        rows, ledger = tokenize_file(
            tokenizers["plain"],
            tmp_path / "set",
            input=name,
            format="alpaca",
            max_length=10**6,
            streaming="://" in name,
        )
        assert rows == expected, name
        assert len(ledger["files_not_read"]) == (name == f"{tmp_path}/in")


def test_text_files_are_one_document_each(tmp_path, tokenizers):
    (tmp_path / "in").mkdir()
    for name, content in (("a", b"\xef\xbb\xbfone\r\nline"), ("b", b""), ("c", "二".encode())):
        (tmp_path / "in" / f"{name}.txt").write_bytes(content)
    rows, ledger = tokenize_file(tokenizers["plain"], tmp_path / "set", input=str(tmp_path / "in"), format="text")
    assert [text_of(tokenizers["plain"], row["input_ids"]) for row in rows] == ["<s>one\nline</s>", "<s>二</s>"]
    assert ledger["rows"]["no_target"] == 1


# -------------------------------------------------------------------------------------------------------------------
# Odd rows
# -------------------------------------------------------------------------------------------------------------------

TURN = {"role": "assistant", "content": "a"}
ODD = {  # format, what the file holds, and either how many rows are kept or what the message says
    "Chinese": ("alpaca", {"instruction": "翻译", "output": "你好，世界。"}, 1),
    "emoji": ("alpaca", {"instruction": "🫀", "output": "👩‍⚕️🩺"}, 1),
    "right to left": ("alpaca", {"instruction": "שלום", "output": "مرحبا \u202babc\u202c"}, 1),
    "zero width": ("alpaca", {"instruction": "a\u200bb", "output": "\ufeff\u200d\u2060"}, 1),
    "NUL": ("alpaca", {"instruction": "a\x00", "output": "\x00\x1f"}, 1),
    "one line of 1 MB": ("alpaca", {"instruction": "a", "output": "很长 text " * 80_000}, 1),
    "empty file": ("alpaca", b"", 0),
    "empty lines": ("alpaca", b"\n \r\n\n", 0),
    "empty output": ("alpaca", {"instruction": "a", "output": ""}, 0),
    "empty instruction": ("alpaca", {"instruction": "", "output": "b"}, 1),
    "missing field": ("alpaca", {"instruction": "a"}, "in.jsonl, line 1: field output is missing"),
    "wrong type": ("alpaca", {"instruction": 7, "output": "b"}, "in.jsonl, line 1: field instruction is not a text"),
    "history of wrong shape": ("alpaca", TASK | {"history": ["a"]}, "line 1: field history is not a list of pairs"),
    "label out of range": ("mcq", QUESTION | {"label": 4}, "in.jsonl, line 1: field label is 4, expected .* 0 to 3"),
    "duplicate ids": ("mcq", (json.dumps(QUESTION) + "\n").encode() * 2, 2),
    "Windows line ends": ("mcq", json.dumps(QUESTION).encode() + b"\r\n", 1),
    "BOM": ("mcq", b"\xef\xbb\xbf" + json.dumps(QUESTION).encode(), 1),
    "not UTF-8": ("mcq", json.dumps(QUESTION).encode() + b"\n\xff", "in.jsonl, line 2: not UTF-8"),
    "nested too deeply": ("mcq", b"[" * 100_000, "in.jsonl, line 1: not JSON"),
    "no messages": ("chat", TASK, "line 1: field messages .* is missing"),
    "no turn of the assistant": ("chat", {"messages": CONVERSATION[:2]}, "the assistant has no turn"),
    "empty turn": ("chat", {"messages": [TURN | {"content": " "}]}, "line 1: .*turn 1: the assistant says nothing"),
    "content missing": ("chat", {"messages": [{"role": "user"}, TURN]}, "turn 1: content is not a text"),
    "unknown role": ("chat", {"messages": [TURN | {"role": "doctor"}]}, "turn 1: role is 'doctor'"),
    "special token in a turn": ("chat", {"messages": [TURN | {"content": "a</s>b"}]}, 0),
    "text missing": ("text", {"document": "a"}, "line 1: field text is missing"),
    "empty text": ("text", {"text": " \n"}, 0),
}


GOOD_ROWS = {"mcq": QUESTION, "alpaca": TASK, "chat": {"messages": CONVERSATION}, "text": {"text": "One paper."}}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_row_is_kept_counted_or_named(tmp_path, tokenizers, case):
    format, content, outcome = ODD[case]
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    (tmp_path / "in.jsonl").write_bytes(content)
    arguments = {"input": str(tmp_path / "in.jsonl"), "format": format, "max_length": 10**7}
    if isinstance(outcome, str) or outcome == 0:
        message = outcome or "no row of it was kept|the input has no rows"
        with pytest.raises(ValueError, match=message):
            tokenize_file(tokenizers["chat"], tmp_path / "set", **arguments)
        assert not (tmp_path / "set").exists()
        # Beside a good row, it is counted.
        (tmp_path / "in.jsonl").write_bytes(content + b"\n" + json.dumps(GOOD_ROWS[format]).encode())
        rows, ledger = tokenize_file(tokenizers["chat"], tmp_path / "set", on_bad_row="skip", **arguments)
        num_good = 2 if case == "not UTF-8" else 1
        assert len(rows) == ledger["rows"]["kept"] == num_good
        assert ledger["rows"]["broken"] == isinstance(outcome, str)
        return
    rows, ledger = tokenize_file(tokenizers["chat"], tmp_path / "set", **arguments)
    assert len(rows) == ledger["rows"]["kept"] == outcome and ledger["rows"]["broken"] == 0
    for row, raw in zip(rows, content.removeprefix(b"\xef\xbb\xbf").splitlines(), strict=True):
        raw = json.loads(raw)
        answer = raw["output"] if format == "alpaca" else raw[f"ending{raw['label']}"]
        assert text_of(tokenizers["chat"], targets_of(row)) == answer + "</s>"


def test_a_damaged_archive_is_named(tmp_path, tokenizers):
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        write_file(tmp_path / name, [task | {"output": str(hash(str(task)))} for task in TASKS])
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            tokenize_file(tokenizers["plain"], tmp_path / "set", input=str(tmp_path / name), format="alpaca")


# -------------------------------------------------------------------------------------------------------------------
# Long rows, splits, workers and machines
# -------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(tasks, max_size=6),
    st.integers(2, 120),
    st.sampled_from(["drop", "truncate", "split"]),
    st.booleans(),
    st.sampled_from([0.0, 0.5]),
)
def test_every_policy_for_long_rows_balances(
    tokenizers, tmp_path_factory, raw_rows, max_length, on_long, packing, val_size
):
    path, tokenizer = tmp_path_factory.getbasetemp() / "long.jsonl", tokenizers["chat"]
    output = path.parent / "long set"
    arguments = {"format": "alpaca", "max_length": max_length, "on_long": on_long}
    shutil.rmtree(output.with_name("long set_val"), ignore_errors=True)  # of the last example
    with empty_sets_are_allowed():
        whole, before = tokenize(path, raw_rows, tokenizer, format="alpaca")
        _, ledger = tokenize(path, raw_rows, tokenizer, packing=packing, val_size=val_size, **arguments)
    ledgers = {output: ledger}
    if val_size:
        val = output.with_name("long set_val")
        ledgers[val] = json.loads((val / "ledger.json").read_text())
    num_kept = 0
    for folder, ledger in ledgers.items():
        rows = rows_of(folder)
        assert ledger["tokens"]["in"] == before["tokens"]["in"]
        assert ledger["rows"]["in"] == len(raw_rows) == sum(ledger["rows"].values()) - len(raw_rows)
        assert sum(ledger["tokens"].values()) == 2 * ledger["tokens"]["in"]
        assert sum(len(row["input_ids"]) for row in rows) == ledger["tokens"]["kept"]
        assert all(len(row["input_ids"]) <= max_length for row in rows)
        assert len(rows) == ledger["rows_written"]
        firsts = [[0] if not packing else np.flatnonzero(np.array(row["position_ids"]) == 0) for row in rows]
        labels = [np.delete(row["labels"], first) for row, first in zip(rows, firsts, strict=True)]
        assert ledger["targets"] == sum(int((label != IGNORE_INDEX).sum()) for label in labels)
        num_kept += ledger["tokens"]["kept"]
    if on_long == "split":
        assert ledger["tokens"]["truncated"] == ledger["rows"]["too_long"] == 0
    lost = before["tokens"]["kept"] - num_kept
    assert (
        lost
        == sum(ledger["tokens"][name] for name in ("truncated", "too_long", "no_target"))
        - before["tokens"]["no_target"]
    )


def test_a_long_row_can_be_an_error(tmp_path, tokenizers):
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: \d+ tokens, above --max_length"):
        tokenize(tmp_path / "rows.jsonl", [QUESTION], tokenizers["plain"], max_length=9, on_long="error")
    assert not (tmp_path / "rows set").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_bytes_are_the_same_for_every_number_of_workers(tmp_path, tokenizers):
    raw = write_jsonl(tmp_path / "rows.jsonl", TASKS * 40 + [{"instruction": "broken"}] + TASKS)
    results = []
    for num_proc in (1, 3):
        arguments = {"input": str(raw), "format": "alpaca", "packing": True, "on_bad_row": "skip", "val_size": 0.2}
        _, ledger = tokenize_file(tokenizers["plain"], tmp_path / "set", num_proc=num_proc, **arguments)
        assert 0.15 < ledger["rows"]["other_split"] / ledger["rows"]["in"] < 0.25
        assert ledger["rows"]["broken"] == 1
        results.append([contents(tmp_path / "set"), contents(tmp_path / "set_val")])
    assert results[0] == results[1]
    _, ledger = tokenize_file(tokenizers["plain"], tmp_path / "set", seed=1, **arguments)
    assert contents(tmp_path / "set_val") != results[0][1]


@pytest.mark.parametrize("num_files", [1, 3])
def test_the_parts_of_all_machines_are_the_whole(tmp_path, tokenizers, num_files):
    (tmp_path / "in").mkdir()
    for number in range(num_files):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", TASKS[number::num_files])
    arguments = {"input": str(tmp_path / "in"), "format": "alpaca", "val_size": 0.3}
    whole, _ = tokenize_file(tokenizers["plain"], tmp_path / "set", **arguments)
    found = []
    for part in ("1/2", "2/2"):
        args = tokenize_dataset.Arguments(output=str(tmp_path / "part"), shard=part, **arguments)
        tokenize_dataset.build(args, tokenizers["plain"])
        found += rows_of(tmp_path / f"part-{part.replace('/', '-of-')}")
    assert sorted(map(str, found)) == sorted(map(str, whole))


def test_the_ledger_shows_a_tokenizer_that_knows_no_chinese(tmp_path, tokenizers, capsys):
    rows = [{"instruction": "天气", "output": "今天天气很好，适合散步。"}] * 3 + [
        {"instruction": "Weather", "output": "fine"}
    ]
    _, ledger = tokenize(tmp_path / "rows.jsonl", rows, tokenizers["plain"], format="alpaca")
    ledgers.print_ledger(ledger, tmp_path)
    languages, printed = ledger["languages"], capsys.readouterr().out
    assert list(languages) == ["Chinese", "Latin"] and languages["Latin"]["fragments"] == 0
    assert languages["Chinese"]["fragments"] == 3 * 3 * len("天气" + "今天天气很好，适合散步。")  # three bytes each
    assert "hardly made for Chinese" in printed and "hardly made for Latin" not in printed
    assert ledger["bos_at_start"] == {"0": 0, "1": 4, "2": 0} and ledger["share_without_eos_target"] == 0
    assert sum(ledger["length_histogram"].values()) == 4


def test_lengths_fall_into_bins_without_gaps():
    names = list(dict.fromkeys(map(ledgers.length_bin, range(1, 200))))
    assert names == "1 2 3 4 5-6 7-8 9-12 13-16 17-24 25-32 33-48 49-64 65-96 97-128 129-192 193-256".split()


# -------------------------------------------------------------------------------------------------------------------
# Tokenizers like LLaMA's
# -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    """LLaMA 1's kind: SentencePiece BPE with byte fallback and BOS, trained here."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "data_sample" / "triage_train.jsonl"), model_prefix=str(folder / "tokenizer"),
        vocab_size=600, model_type="bpe", byte_fallback=True, minloglevel=2, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder / "hf")
    return AutoTokenizer.from_pretrained(folder / "hf")


@pytest.mark.parametrize("name", ["each alike", "moves system", "no end", "drops earlier reasoning"])
def test_a_sentencepiece_tokenizer_sees_each_prompt_as_it_is_served(tmp_path, sentencepiece_tokenizer, name):
    """Its ids depend on what stands before a text, so that a joined row could have other ones than a prompt alone."""
    tokenizer = copy.deepcopy(sentencepiece_tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    messages = [
        {"role": "user", "content": " My ear hurts. "},
        {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "Two\n\ndays"},
        {"role": "assistant", "content": " See an ENT doctor."},
    ]
    rows, ledger = tokenize(tmp_path / "rows.jsonl", [{"messages": messages}], tokenizer, format="chat")
    found = []
    for row in rows:
        for number in range(1, len(row["labels"])):
            if row["labels"][number] != IGNORE_INDEX and row["labels"][number - 1] == IGNORE_INDEX:
                found.append(row["input_ids"][:number])
    prompts = [rendering.encode_prompt(tokenizer, messages[:end], ledger["template"]) for end in (1, 3)]
    assert found == prompts


def test_a_sentencepiece_tokenizer_gives_back_every_text(tmp_path, sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    assert tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    answers = ["Hello", " two spaces  inside", "\nline", "你好 👋", "tab\t.", "  x"]
    raw_rows = [TASK | {"output": answer} for answer in answers]
    rows, ledger = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizer, format="alpaca")
    template = rendering.make_template("alpaca", chat=False)
    for answer, raw, row in zip(answers, raw_rows, rows, strict=True):
        prompt = rendering.render_prompt(raw, template)
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        # SentencePiece puts a space before every text, and its decoder takes it away only without <s>.
        assert text_of(tokenizer, row["input_ids"]) == f"<s> {prompt}{answer}</s>"
        assert text_of(tokenizer, targets_of(row)).strip() == f"{answer}</s>".strip()
    assert ledger["languages"]["Latin"]["fragments"] > 0  # the Chinese input


@pytest.mark.xdist_group("sample model")
def test_the_sample_models_tokenizer_gives_back_every_text(tmp_path, sample_model):
    tokenizer = AutoTokenizer.from_pretrained(sample_model)
    answers = [
        "Hello",
        " two spaces  inside",
        "\nline",
        "你好 👩‍⚕️",
        "tab\t.",
        "  x",
        "naïve \u202bשלום\u202c",
        "a\x00b",
        "2024",
    ]
    raw_rows = [TASK | {"output": answer} for answer in answers]
    rows, ledger = tokenize(tmp_path / "rows.jsonl", raw_rows, tokenizer, format="alpaca")
    for answer, row in zip(answers, rows, strict=True):
        messages = [{"role": "user", "content": "Translate.\n\n你好 👋"}, {"role": "assistant", "content": answer}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text_of(tokenizer, row["input_ids"]) == rendered.rstrip()  # nobody predicts the last line end
        assert text_of(tokenizer, targets_of(row)) == f"{answer}<|im_end|>"
        prompt = row["input_ids"][: -len(targets_of(row))]
        assert prompt == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ledger["bos_at_start"] == {"0": 0, "1": len(answers), "2": 0}  # <|im_start|>, written by the template

    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}] * 2
    (row,), _ = tokenize(tmp_path / "chat.jsonl", [{"messages": conversation}], tokenizer, format="chat")
    assert text_of(tokenizer, row["input_ids"]) == tokenizer.apply_chat_template(conversation, tokenize=False).rstrip()
    assert text_of(tokenizer, targets_of(row)) == "你好<|im_end|>" * 2

    (row,), _ = tokenize(tmp_path / "question.jsonl", [QUESTION], tokenizer)
    assert [text_of(tokenizer, ids) for ids in row["options"]] == [
        f"{option}<|im_end|>" for option in ("Cardiology", "Urology", "眼科", "Dentistry")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["medqa_dev.jsonl", "alpaca_en_demo.json"])
def test_real_rows_go_through(tmp_path, tokenizers, name):
    path = ROOT.parent / "shared" / "data" / name
    if not path.is_file():
        pytest.skip("the real rows are not part of the repository")
    rows, ledger = tokenize_file(tokenizers["plain"], tmp_path / "set", input=str(path), max_length=4096,
                                 format="mcq" if "medqa" in name else "alpaca")  # fmt: skip
    assert len(rows) == ledger["rows"]["kept"] == ledger["rows"]["in"] >= 999
    assert sum(len(row["input_ids"]) for row in rows) == ledger["tokens"]["in"]
