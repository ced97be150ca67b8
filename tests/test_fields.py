"""What a row holds is used, refused or counted, the same for JSON, CSV and Parquet; data sets' own columns are read."""

import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sample import rendering, tokenize_dataset
from data_sample.encoding import IGNORE_INDEX
from data_sample.fields import FieldCounts, clean_row, count_fields, read_row


def tokenize(path: Path, **flags) -> tuple[list[str], list[str], dict]:
    """Prompts and targets of the rows of a file as texts, and the ledger."""
    tokenizer = make_tokenizer()
    output = path.parent / f"{path.stem} set"
    args = tokenize_dataset.Arguments(input=str(path), output=str(output), **{"max_length": 10**6} | flags)
    tokenize_dataset.check_arguments(args)
    ledger = tokenize_dataset.build(args, tokenizer)["train"]
    prompts = []
    targets = []
    for row in load_from_disk(str(output)):
        is_target = [label != IGNORE_INDEX for label in row["labels"]]
        start = is_target.index(True)
        prompts.append(tokenizer.decode(row["input_ids"][:start]))
        targets.append(tokenizer.decode(row["input_ids"][start:]).removesuffix("</s>"))
    return prompts, targets, ledger


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes rows in the form that the name asks for. A CSV file has texts only, and an empty one for null."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        content = io.StringIO()
        writer = csv.DictWriter(content, list(rows[0]))
        writer.writeheader()
        for row in rows:
            texts = {}
            for name, value in row.items():
                if isinstance(value, list | dict):
                    value = json.dumps(value)
                texts[name] = value
            writer.writerow(texts)
        path.write_bytes(content.getvalue().encode())
    return path


KINDS = ["a.json", "a.jsonl", "a.csv", "a.parquet"]
QUESTION = {"sent1": "Ear pain.", "sent2": "Which clinic?", "ending0": "ENT", "ending1": "Eye", "ending2": "Heart"}

# -------------------------------------------------------------------------------------------------------------------
# Values
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", " 1 "])
@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_the_same_number_in_every_kind_of_file(tmp_path, kind, label):
    _, targets, _ = tokenize(write_rows(tmp_path / kind, [QUESTION | {"label": label}]))
    assert targets == ["Eye"]


@pytest.mark.parametrize("absent", [None, float("nan"), ""])
@pytest.mark.parametrize("name", ["input", "system", "history"])
@pytest.mark.parametrize("kind", KINDS)
def test_null_nan_and_empty_say_nothing_in_every_kind_of_file(tmp_path, kind, name, absent):
    row = {"instruction": "Say hi.", "output": "Hi.", name: absent}
    if kind == "a.csv" and absent != absent:
        row[name] = ""  # pandas writes NaN so
    expected = tokenize(
        write_rows(tmp_path / "b.jsonl", [{"instruction": "Say hi.", "output": "Hi."}]), format="alpaca"
    )
    assert tokenize(write_rows(tmp_path / kind, [row]), format="alpaca")[:2] == expected[:2]


MEDQA = {"question": "Ear pain. Which clinic?", "options": {"A": "ENT", "B": "Eye"}, "answer": "Eye", "answer_idx": "B"}


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_objects_may_be_json_texts(tmp_path, kind):
    prompts, targets, _ = tokenize(write_rows(tmp_path / kind, [MEDQA]))
    assert targets == ["Eye"] and "Ear pain. Which clinic?\n- ENT\n- Eye" in prompts[0]


def test_nulls_inside_messages_of_parquet_are_absent(tmp_path):
    """In a table, each message has the fields of all messages."""
    answer = {"role": "assistant", "content": "Paris.", "weight": 1}
    rows = [{"messages": [{"role": "user", "content": "Capital?"}, answer]}]
    args = {"format": "chat", "columns": {}}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from data_sample.reading import read_rows

    ((_, row),) = read_rows(str(tmp_path / "a.parquet"))
    assert row == rows[0]
    counts = FieldCounts()
    read = read_row(clean_row(row, args), args, counts)
    assert read["learned"] == [False, True]
    assert counts.used == {"messages": 1, "messages.role": 2, "messages.content": 2, "messages.weight": 1}


# -------------------------------------------------------------------------------------------------------------------
# Multiple choice
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_options", [2, 3, 6, 10, 26])
@pytest.mark.parametrize("answer", ["text", "letter"])
def test_a_question_has_as_many_options_as_its_row(tmp_path, num_options, answer):
    row = {"sent1": "Which one?", "sent2": ""}
    for number in range(num_options):
        row[f"ending{number}"] = f"option {number}"
    row["label"] = num_options - 1
    prompts, targets, _ = tokenize(write_rows(tmp_path / "a.jsonl", [row]), answer=answer)
    letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[num_options - 1]
    if answer == "letter":
        assert targets == [letter] and f"\n{letter}. option {num_options - 1}\n" in prompts[0]
    else:
        assert targets == [f"option {num_options - 1}"] and f"- option {num_options - 1}\n" in prompts[0]
    options = load_from_disk(str(tmp_path / "a set"))[0]["options"]
    assert len(options) == num_options


PUBLISHED = {  # a row as it is published, the question as it is asked, the right answer, fields that are not used
    "MedQA": (
        MEDQA | {"meta_info": "step1", "metamap_phrases": ["ear"]},
        "Ear pain. Which clinic?\n- ENT\n- Eye",
        "Eye",
        {},
    ),
    "MedQA with a list": (
        {"question": "Which?", "answer": "ENT",
         "options": [{"key": "A", "value": "ENT"}, {"key": "B", "value": "Eye"}]},
        "Which?\n- ENT\n- Eye",
        "ENT",
        {},
    ),
    "MedMCQA": (
        {"id": "x", "question": "Which?", "opa": "ENT", "opb": "Eye", "opc": "Heart", "opd": "Skin", "cop": 2,
         "choice_type": "single", "exp": "It beats.", "subject_name": "Medicine", "topic_name": None},
        "Which?\n- ENT\n- Eye\n- Heart\n- Skin",
        "Heart",
        {"exp": 1},
    ),
    "C-Eval": (
        {"id": 3, "question": "哪个？", "A": "耳", "B": "眼", "C": "心", "D": "皮", "answer": "D",
         "explanation": "因为"},
        "哪个？\n- 耳\n- 眼\n- 心\n- 皮",
        "皮",
        {"explanation": 1},
    ),
    "PubMedQA on the hub": (
        {"pubid": 7, "question": "Does it help?",
         "context": {"contexts": ["It was tried.", "On 9."], "labels": ["A", "B"]},
         "long_answer": "It may.", "final_decision": "maybe"},
        "It was tried.\nOn 9.\nDoes it help?\n- yes\n- no\n- maybe",
        "maybe",
        {"long_answer": 1},
    ),
    "PubMedQA": (
        {"QUESTION": "Does it help?", "CONTEXTS": ["It was tried."], "LABELS": ["A"], "MESHES": ["x"], "YEAR": "2011",
         "reasoning_required_pred": "yes", "reasoning_free_pred": "no", "final_decision": "no", "LONG_ANSWER": "No."},
        "It was tried.\nDoes it help?\n- yes\n- no\n- maybe",
        "no",
        {"LONG_ANSWER": 1},
    ),
    "MMLU-Pro": (
        {"question_id": 70, "question": "Which?", "options": ["ENT", "Eye", "Heart"], "answer": "C", "answer_index": 2,
         "cot_content": "", "category": "health", "src": "x"},
        "Which?\n- ENT\n- Eye\n- Heart",
        "Heart",
        {"category": 1, "src": 1},
    ),
    "ARC": (
        {"id": "a", "question": "Which?", "choices": {"text": ["ENT", "Eye"], "label": ["1", "2"]}, "answerKey": "2"},
        "Which?\n- ENT\n- Eye",
        "Eye",
        {},
    ),
    "MMLU": (
        {"question": "Which?", "subject": "anatomy", "choices": ["ENT", "Eye", "Heart", "Skin"], "answer": 3},
        "Which?\n- ENT\n- Eye\n- Heart\n- Skin",
        "Skin",
        {"subject": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_columns_are_read_as_they_are(tmp_path, name):
    row, question, answer, not_used = PUBLISHED[name]
    prompts, targets, ledger = tokenize(write_rows(tmp_path / "a.jsonl", [row]))
    assert prompts == [f"<s>{question}\n\n### Answer:\n"]
    assert targets == [answer]
    assert ledger["fields_not_used"] == not_used
    # What serves reads the same row, with and without its answer.
    template = ledger["template"]
    (message,) = rendering.messages_before_answer(row, template)
    assert message["content"] == f"{question}\n\n### Answer:\n"
    assert rendering.expected_answer(row, template) == answer
    for field in ("answer", "answer_idx", "answer_index", "answerKey", "label", "cop"):
        row = {name: value for name, value in row.items() if name != field}
    assert rendering.messages_before_answer(row, template) == [message]


def test_other_columns_are_named_by_a_flag_and_by_the_ledger(tmp_path):
    row = {"Frage": "Welche?", "Liste": ["HNO", "Auge"], "Loesung": "B", "note": "x"}
    columns = "question=Frage,options=Liste,answer=Loesung"
    prompts, targets, ledger = tokenize(write_rows(tmp_path / "a.jsonl", [row]), columns=columns)
    assert prompts == ["<s>Welche?\n- HNO\n- Auge\n\n### Answer:\n"] and targets == ["Auge"]
    assert ledger["fields_not_used"] == {"note": 1}
    assert rendering.expected_answer(row, ledger["template"]) == "Auge"
    row = {"q": "Say hi.", "a": "Hi."}
    _, targets, _ = tokenize(write_rows(tmp_path / "b.jsonl", [row]), format="alpaca", columns="instruction=q,output=a")
    assert targets == ["Hi."]


def test_a_column_whose_name_another_one_takes_is_counted(tmp_path):
    row = {"instruction": "Say hi.", "output": "Hi.", "better": "Hello."}
    flags = {"format": "alpaca", "columns": "output=better"}
    _, targets, ledger = tokenize(write_rows(tmp_path / "a.jsonl", [row]), **flags)
    assert targets == ["Hello."]
    assert ledger["fields_not_used"] == {"output beside --columns": 1}
    flags["columns"] = "instruction=output,output=instruction"
    prompts, targets, ledger = tokenize(write_rows(tmp_path / "b.jsonl", [row]), **flags)
    assert "### Instruction:\nHi.\n" in prompts[0] and targets == ["Say hi."]
    assert ledger["fields_not_used"] == {"better": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [("frage=x", "--columns frage=x: --format mcq has no field frage"), ("question=", "write question=COLUMN")],
)
def test_a_wrong_columns_flag_is_a_mistake(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        tokenize(write_rows(tmp_path / "a.jsonl", [MEDQA]), columns=columns)


def test_a_column_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: column Frage of --columns is missing"):
        tokenize(write_rows(tmp_path / "a.jsonl", [MEDQA]), columns="question=Frage")


MEDMCQA = {"question": "Which?", "opa": "ENT", "opb": "Eye", "opc": "Heart", "opd": "Skin"}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_labels_that_count_from_1_are_never_read_as_if_they_counted_from_0(tmp_path, on_bad_row):
    """MedMCQA's own files count from 1, those on the hub from 0: a wrong guess would move every label."""
    path = write_rows(tmp_path / "a.jsonl", [MEDMCQA | {"cop": cop} for cop in (1, 2, 4)])
    with pytest.raises(
        ValueError, match="line 3: field cop is 4: this file counts the options from 1.*--first_label 1"
    ):
        tokenize(path, on_bad_row=on_bad_row)
    _, targets, _ = tokenize(path, first_label=1)
    assert targets == ["ENT", "Eye", "Skin"]
    rows = [{"question": "Which?", "options": ["ENT", "Eye", "Heart"], "answer": answer} for answer in ("1", 3)]
    path = write_rows(tmp_path / "b.jsonl", rows)
    with pytest.raises(ValueError, match="line 2: field answer is 3: this file counts the options from 1"):
        tokenize(path, on_bad_row=on_bad_row)
    assert tokenize(path, first_label=1)[1] == ["ENT", "Heart"]


WRONG_ANSWERS = {
    "names none": (MEDQA | {"answer": "Skin", "answer_idx": None}, "answer is 'Skin', which names none of the options"),
    "two answers": (MEDQA | {"answer_idx": "A"}, "answer_idx 'A' and answer 'Eye' name different options"),
    "text or number": (
        {"question": "1+1?", "options": ["1", "2", "0"], "answer": "2"},
        "names one option by its text and another by its number",
    ),
    "one option": ({"question": "Which?", "options": ["ENT"], "answer": 0}, "a question has 2 to 26"),
    "no answer": ({"question": "Which?", "options": ["ENT", "Eye"]}, "the row has no answer"),
    "a gap": (QUESTION | {"ending4": "x", "label": 0}, "field ending3 is missing"),
    "label counts from 1": (QUESTION | {"label": 3}, "label is 3, expected a number from 0 to 2: labels count from 0"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_an_answer_that_is_not_clear_is_refused(tmp_path, case):
    row, message = WRONG_ANSWERS[case]
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        tokenize(write_rows(tmp_path / "a.jsonl", [row]))


# -------------------------------------------------------------------------------------------------------------------
# Fields that are not used, and rows that are refused
# -------------------------------------------------------------------------------------------------------------------


def test_fields_that_are_not_used_are_counted_and_named(tmp_path, capsys):
    rows = [{"instruction": "a", "output": "b", "id": 1, "category": "x", "score": 0.5}] * 2
    rows.append({"instruction": "a", "output": "b", "category": None, "source": "web"})
    _, _, ledger = tokenize(write_rows(tmp_path / "a.jsonl", rows), format="alpaca")
    assert ledger["fields_not_used"] == {"category": 2, "score": 2}
    assert ledger["fields_ignored"] == {"id": 2, "source": 1}
    assert ledger["fields"] == {"in": 13, "used": 6, "ignored": 3, "not_used": 4, "broken": 0}
    tokenize_dataset.print_ledger(ledger, tmp_path)
    assert "not used: category in 2, score in 2 rows or messages" in capsys.readouterr().out


def test_dollys_names_are_read(tmp_path):
    row = {"instruction": "When?", "context": "It began on 3 May.", "response": "3 May", "category": "closed_qa"}
    prompts, targets, ledger = tokenize(write_rows(tmp_path / "a.jsonl", [row]), format="alpaca")
    assert "### Input:\nIt began on 3 May.\n" in prompts[0] and targets == ["3 May"]
    assert ledger["fields_not_used"] == {"category": 1}
    row = {"instruction": "When?", "input": "In May.", "context": "It began on 3 May.", "output": "3 May"}
    prompts, _, ledger = tokenize(write_rows(tmp_path / "a.jsonl", [row]), format="alpaca")
    assert "In May." in prompts[0] and ledger["fields_not_used"] == {"context": 1}


REFUSED = {
    "images": ("chat", {"images": ["a.png"]}, "field images: the model reads text only"),
    "audio of a message": ("chat", {}, "turn 2: audio: the model reads text only"),
    "a pair": ("alpaca", {"chosen": "b", "rejected": "c"}, "a preference pair, which --format preference reads"),
    "label false": ("alpaca", {"label": False}, "label is false: it marks an answer that is not to be learned"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_refuses_the_row_with_the_reason(tmp_path, case):
    format, fields, message = REFUSED[case]
    row = {"instruction": "a", "output": "b"} | fields
    if format == "chat":
        answer = {"role": "assistant", "content": "b"}
        if case == "audio of a message":
            answer["audio"] = {"id": "x"}
        row = {"messages": [{"role": "user", "content": "a"}, answer]} | fields
    template = {"format": format}
    with pytest.raises(ValueError, match=message):
        read_row(clean_row(row, template), template, FieldCounts())


@pytest.mark.parametrize("name", ["weight", "loss", "train"])
def test_a_row_without_weight_is_not_learned(tmp_path, name):
    rows = [{"instruction": "a", "output": "b", name: 0}, {"instruction": "c", "output": "d", name: 1}]
    _, targets, ledger = tokenize(write_rows(tmp_path / "a.jsonl", rows), format="alpaca")
    assert targets == ["d"] and ledger["rows"]["no_target"] == 1 and ledger["fields_not_used"] == {}


HINTS = {  # format, what the file holds, and what the message says
    "list on one line": ("alpaca", '[{"instruction": "a", "output": "b"}]', "if the file is one list, name it .json"),
    "printed list": (
        "alpaca",
        '[\n {"instruction": "a",\n "output": "b"}\n]',
        "if the file is one list, name it .json",
    ),
    "printed object": ("alpaca", '{\n "instruction": "a",\n "output": "b"\n}', "write it anew with `jq -c . FILE`"),
    "csv": ("alpaca", "instruction,output\na,b\n", "looks like CSV: name the file .csv"),
    "other format": ("alpaca", '{"messages": []}', "the row has the fields messages; they look like --format chat"),
    "MedQA as alpaca": ("alpaca", json.dumps(MEDQA), "they look like --format mcq"),
    "unknown names": ("alpaca", '{"q": "a", "a": "b"}', "the row has the fields q, a; .*--columns instruction="),
    "unknown question": ("mcq", '{"q": "a", "a": "b"}', "the columns of MedQA, MedMCQA, C-Eval or PubMedQA"),
    "unknown documents": ("text", '{"content": "a"}', "--columns text=content"),
    "unknown conversations": ("chat", '{"dialog": []}', "--columns messages=dialog"),
}


@pytest.mark.parametrize("case", HINTS)
def test_the_first_broken_row_is_answered_with_what_the_file_looks_like(tmp_path, case):
    format, content, message = HINTS[case]
    (tmp_path / "a.jsonl").write_text(content)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    args = tokenize_dataset.Arguments(input=str(tmp_path / "a.jsonl"), output=str(tmp_path / "set"), format=format)
    tokenize_dataset.check_arguments(args)
    with pytest.raises(ValueError, match=f"(?s)a.jsonl, line 1: .*{message}") as raised:
        tokenize_dataset.build(args, tokenizer)
    assert "--on_bad_row skip" not in str(raised.value)  # it would skip every row


def test_skipping_is_offered_when_a_good_row_was_seen(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a"}]
    with pytest.raises(ValueError, match="(?s)line 2: field output is missing.*--on_bad_row skip goes on without"):
        tokenize(write_rows(tmp_path / "a.jsonl", rows), format="alpaca")


# -------------------------------------------------------------------------------------------------------------------
# The balance of fields
# -------------------------------------------------------------------------------------------------------------------

values = st.one_of(st.none(), st.just(""), st.text(max_size=5), st.integers(), st.floats(), st.booleans(),
                   st.lists(st.text(max_size=3), max_size=2))  # fmt: skip
names = st.sampled_from(["instruction", "output", "input", "context", "response", "system", "history", "id", "x",
                         "weight", "label", "images", "chosen", "messages", "conversations", "tools", "text", "sent1",
                         "question", "options", "answer", "A", "B"])  # fmt: skip
turns = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "weight", "name", "tool_calls", "reasoning", "id", "x"]),
    st.one_of(values, st.sampled_from(["user", "assistant", "human", "gpt", "system", "function_call"])),
    max_size=5,
)


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(names, st.one_of(values, st.lists(turns, max_size=3)), max_size=8),
       st.sampled_from(["mcq", "alpaca", "chat", "preference", "text"]))  # fmt: skip
def test_every_value_of_a_row_is_used_ignored_or_counted(row, format):
    """Whatever a row holds, it is read or refused with a message; of a row that is read no value is forgotten."""
    template = {"format": format}
    counts = FieldCounts()
    cleaned = clean_row(row, template)
    try:
        read_row(cleaned, template, counts)
    except ValueError as problem:
        assert str(problem)
        return
    counted = counts.used + counts.ignored + counts.not_used
    assert sum(counted.values()) == count_fields(cleaned, format)
