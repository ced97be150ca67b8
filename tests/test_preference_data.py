"""Pairs of answers: every published shape becomes the ids that serving sends and that --format chat would train."""

import copy
import csv
import io
import json
import random
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_shapes import TEMPLATES, WITH_CALLS, make_chat_tokenizer
from conftest import ROOT, make_tokenizer
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from data_sample import rendering, tokenize_dataset
from data_sample.encoding import IGNORE_INDEX
from data_sample.fields import FieldCounts, clean_row, count_fields, read_row

DATE = "2026-02-03"
PAIRED = ["prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels"]
UNPAIRED = ["prompt_ids", "completion_ids", "completion_labels", "label"]


@pytest.fixture(scope="session")
def tokenizers() -> dict:
    made = {name: make_chat_tokenizer(name) for name in TEMPLATES}
    made["plain"] = make_tokenizer()
    return made


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenize_file(path: Path | str, output: Path, tokenizer, **flags) -> tuple[list[dict], dict]:
    """The rows of the set, and its ledger."""
    flags = {"format": "preference", "max_length": 10**6, "date": DATE, **flags}
    args = tokenize_dataset.Arguments(input=str(path), output=str(output), **flags)
    tokenize_dataset.check_arguments(args)
    ledger = tokenize_dataset.build(args, copy.deepcopy(tokenizer))["train"]
    if not any(output.glob("*.arrow")):
        return [], ledger
    return list(load_from_disk(str(output))), ledger


def tokenize(folder: Path, rows: list[dict], tokenizer, **flags) -> tuple[list[dict], dict]:
    return tokenize_file(write_jsonl(folder / "rows.jsonl", rows), folder / "set", tokenizer, **flags)


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def targets_of(tokenizer, row: dict, name: str) -> str:
    """The text that has a loss; each label is the id in its place, or none."""
    for token, label in zip(row[f"{name}_ids"], row[f"{name}_labels"], strict=True):
        assert label in (token, IGNORE_INDEX)
    return text_of(tokenizer, [label for label in row[f"{name}_labels"] if label != IGNORE_INDEX])


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


# -------------------------------------------------------------------------------------------------------------------
# Every published shape
# -------------------------------------------------------------------------------------------------------------------

QUESTION = "My ear hurts, 很疼."
GOOD = "See an ENT doctor 👂."
BAD = "Wait a month."
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
SECOND_QUESTION = [user("Hi"), assistant("Hello."), user(QUESTION)]
HH = f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {QUESTION}\n\nAssistant:"
# The row, the messages before the answers, and the fields that are not used.
SHAPES = {
    "texts": ({"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}, [user(QUESTION)], {}),
    "texts and system": (
        {"system": "Be brief.", "prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        WITH_SYSTEM,
        {},
    ),
    "TRL, explicit prompt": (
        {"prompt": WITH_SYSTEM, "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
        WITH_SYSTEM,
        {},
    ),
    "TRL, implicit prompt": (
        {"chosen": [*SECOND_QUESTION, assistant(GOOD)], "rejected": [*SECOND_QUESTION, assistant(BAD)]},
        SECOND_QUESTION,
        {},
    ),
    "UltraFeedback": (
        {
            "prompt": QUESTION,
            "prompt_id": "0a1b",
            "chosen": [user(QUESTION), assistant(GOOD)],
            "rejected": [user(QUESTION), assistant(BAD)],
            "messages": [user(QUESTION), assistant(GOOD)],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        [user(QUESTION)],
        {"messages": 1, "score_chosen": 1, "score_rejected": 1},
    ),
    "prompt as messages before whole conversations": (
        {"prompt": [user(QUESTION)], "chosen": [user(QUESTION), assistant(GOOD)],
         "rejected": [user(QUESTION), assistant(BAD)], "margin": 1.5},
        [user(QUESTION)],
        {"margin": 1},
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
                              {"from": "human", "value": QUESTION}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        SECOND_QUESTION,
        {},
    ),
    "LLaMA-Factory, messages": (
        {"messages": [user(QUESTION)], "chosen": assistant(GOOD), "rejected": assistant(BAD)},
        [user(QUESTION)],
        {},
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "My ear hurts,", "input": "很疼.", "system": "Be brief.", "history": [["Hi", "Hello."]],
         "chosen": GOOD, "rejected": BAD},
        [WITH_SYSTEM[0], user("Hi"), assistant("Hello."), user("My ear hurts,\n\n很疼.")],
        {},
    ),
    "HH-RLHF": ({"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, SECOND_QUESTION, {}),
    "HH-RLHF with the prompt apart": ({"prompt": HH, "chosen": f" {GOOD}", "rejected": f" {BAD}"}, SECOND_QUESTION, {}),
}  # fmt: skip
PLAIN_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
PLAIN_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)


def plain_prompt(messages: list[dict]) -> str:
    """What a base model is asked, with the texts of --format alpaca around what the user says."""
    text = "<s>"
    for message in messages:
        if message["role"] == "user" and "\n\n" in message["content"]:
            text += PLAIN_WITH_INPUT.format(*message["content"].split("\n\n"))
        elif message["role"] == "user":
            text += PLAIN_INSTRUCTION.format(message["content"])
        elif message["role"] == "system":
            text += message["content"] + "\n\n"
        else:
            text += message["content"] + "</s>\n\n"
    return text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["plain", "each alike", "default system", "moves system"])
def test_every_shape_has_the_prompt_of_serving_and_both_answers(tmp_path, tokenizers, name, shape):
    raw, messages, not_used = SHAPES[shape]
    tokenizer = tokenizers[name]
    (row,), ledger = tokenize(tmp_path, [raw], tokenizer)
    assert list(row) == PAIRED
    if name == "plain":
        prompt = plain_prompt(messages)
        ids = tokenizer(prompt.removeprefix("<s>")).input_ids
    else:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert text_of(tokenizer, row["prompt_ids"]) == prompt
    assert row["prompt_ids"] == ids
    space = ""
    if name == "moves system" or shape == "HH-RLHF with the prompt apart" and name != "moves system":
        space = " "
    assert targets_of(tokenizer, row, "chosen") == text_of(tokenizer, row["chosen_ids"]) == f"{space}{GOOD}</s>"
    assert targets_of(tokenizer, row, "rejected") == text_of(tokenizer, row["rejected_ids"]) == f"{space}{BAD}</s>"
    assert ledger["format"] == ledger["template"]["format"] == "preference"
    assert ledger["fields_not_used"] == not_used
    assert ledger["rows"]["kept"] == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["plain", "each alike", "writes date"])
def test_programs_that_ask_a_model_read_the_same_rows(tmp_path, tokenizers, name, shape):
    raw, _, _ = SHAPES[shape]
    tokenizer = tokenizers[name]
    (row,), ledger = tokenize(tmp_path, [raw], tokenizer)
    template = ledger["template"]
    messages = rendering.messages_before_answer(raw, template)
    assert rendering.encode_prompt(tokenizer, messages, template) == row["prompt_ids"]
    assert rendering.expected_answer(raw, template).strip() == GOOD


def test_a_question_without_answers_is_asked_as_it_was_trained(tmp_path, tokenizers):
    for name in ("plain", "each alike"):
        tokenizer = tokenizers[name]
        raw = {"prompt": QUESTION, "system": "Be brief.", "chosen": GOOD, "rejected": BAD}
        (row,), ledger = tokenize(tmp_path, [raw], tokenizer)
        template = ledger["template"]
        asked = {"prompt": QUESTION, "system": "Be brief."}
        messages = rendering.messages_before_answer(asked, template)
        assert rendering.encode_prompt(tokenizer, messages, template) == row["prompt_ids"]
        assert rendering.expected_answer(asked, template) is None
        typed = [{"role": "system", "content": "Be brief."}, rendering.user_message(QUESTION, template)]
        assert rendering.encode_prompt(tokenizer, typed, template) == row["prompt_ids"]


SINGLE_ANSWERS = {
    "texts": ({"prompt": QUESTION, "completion": GOOD}, [user(QUESTION)]),
    "messages": ({"prompt": WITH_SYSTEM, "completion": [assistant(GOOD)]}, WITH_SYSTEM),
    "HH-RLHF": ({"prompt": HH, "completion": GOOD}, SECOND_QUESTION),
}


@pytest.mark.parametrize("shape", SINGLE_ANSWERS)
@pytest.mark.parametrize(("label", "is_wanted"), [(True, True), (1, True), ("1", True), (False, False), (0, False)])
def test_a_single_answer_has_a_label(tmp_path, tokenizers, shape, label, is_wanted):
    raw, messages = SINGLE_ANSWERS[shape]
    tokenizer = tokenizers["each alike"]
    (row,), ledger = tokenize(tmp_path, [raw | {"label": label}], tokenizer)
    assert list(row) == UNPAIRED
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row["prompt_ids"] == tokenizer(prompt).input_ids
    assert targets_of(tokenizer, row, "completion") == text_of(tokenizer, row["completion_ids"]) == f"{GOOD}</s>"
    assert row["label"] is is_wanted
    kind = "wanted" if is_wanted else "unwanted"
    assert ledger["answers"] == {kind: {"rows": 1, "tokens": len(row["completion_ids"])}}
    expected = rendering.expected_answer(raw | {"label": label}, ledger["template"])
    assert expected == (GOOD if is_wanted else None)


# -------------------------------------------------------------------------------------------------------------------
# The same ids as --format chat
# -------------------------------------------------------------------------------------------------------------------


def chat_rows(folder: Path, prompt: list[dict], answer: list[dict], tokenizer, **more) -> list[dict]:
    """What --format chat makes of a conversation in which only the answer is learned."""
    before = []
    for message in prompt:
        if message["role"] == "assistant":
            message = message | {"weight": 0}
        before.append(message)
    folder.mkdir(exist_ok=True)
    return tokenize(folder, [{"messages": before + answer, **more}], tokenizer, format="chat")[0]


def assert_same_as_chat(folder: Path, row: dict, name: str, prompt: list[dict], answer: list[dict], tokenizer, **more):
    (expected,) = chat_rows(folder / "chat", prompt, answer, tokenizer, **more)
    assert row["prompt_ids"] + row[f"{name}_ids"] == expected["input_ids"]
    assert [IGNORE_INDEX] * len(row["prompt_ids"]) + row[f"{name}_labels"] == expected["labels"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_under_every_template_an_answer_is_what_chat_trains(tmp_path, tokenizers, name):
    tokenizer = tokenizers[name]
    prompt = [WITH_SYSTEM[0], user("Hi"), assistant("Hello."), user(QUESTION)]
    chosen = [assistant(GOOD, reasoning_content="Ears are theirs.")]
    raw = {"prompt": prompt, "chosen": chosen, "rejected": [assistant(BAD)]}
    (row,), ledger = tokenize(tmp_path, [raw], tokenizer)
    assert_same_as_chat(tmp_path, row, "chosen", prompt, chosen, tokenizer)
    assert_same_as_chat(tmp_path, row, "rejected", prompt, [assistant(BAD)], tokenizer)
    served = rendering.encode_prompt(tokenizer, prompt, ledger["template"])
    assert row["prompt_ids"] == served
    assert GOOD in targets_of(tokenizer, row, "chosen") and BAD in targets_of(tokenizer, row, "rejected")
    # The reasoning stands once in the row: it is learned, or counted once.
    is_written = "Ears are theirs." in targets_of(tokenizer, row, "chosen")
    assert ledger["fields_not_used"] == ({} if is_written else {"messages.reasoning_content": 1})


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "temp", "arguments": {"city": "Ōsaka"}}}
TOOL = {"type": "function", "function": {"name": "temp", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", WITH_CALLS)
def test_tools_and_calls_reach_the_template(tmp_path, tokenizers, name):
    tokenizer = tokenizers[name]
    prompt = [user("How warm is it?")]
    chosen = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rejected = [assistant("I do not know.")]
    raw = {"prompt": prompt, "tools": [TOOL], "chosen": chosen, "rejected": rejected}
    (row,), ledger = tokenize(tmp_path, [raw], tokenizer)
    assert_same_as_chat(tmp_path, row, "chosen", prompt, chosen, tokenizer, tools=[TOOL])
    assert_same_as_chat(tmp_path, row, "rejected", prompt, rejected, tokenizer, tools=[TOOL])
    assert "temp" in targets_of(tokenizer, row, "chosen")
    not_used = {"tools": 1} if name in ("moves system", "reads earlier content") else {}
    assert ledger["fields_not_used"] == not_used
    assert rendering.read_tools(raw, ledger["template"]) == [TOOL]


@pytest.mark.parametrize("is_whole", [False, True], ids=["explicit prompt", "whole conversations"])
def test_what_the_template_does_not_write_is_counted_as_often_as_it_stands_in_the_row(tmp_path, tokenizers, is_whole):
    prompt = [user(QUESTION) | {"name": "Ann"}]
    chosen = [assistant(GOOD, name="Bot")]
    raw = {"prompt": prompt, "chosen": chosen, "rejected": [assistant(BAD)], "tools": [TOOL]}
    if is_whole:
        del raw["prompt"]
        raw["chosen"] = prompt + chosen
        raw["rejected"] = [*prompt, assistant(BAD)]
    _, ledger = tokenize(tmp_path, [raw], tokenizers["each alike"])
    assert ledger["fields_not_used"] == {"messages.name": 3 if is_whole else 2, "tools": 1}
    assert 2 * ledger["fields"]["in"] == sum(ledger["fields"].values())


words = st.sampled_from(["Ja", "no 👋", "你好。", "a\nb", "x ", " y", "<think>\nw\n</think>\n\nz", "12"])


@st.composite
def conversations(draw) -> tuple[list[dict], list[dict], list[dict]]:
    """A prompt, which may have earlier turns, and two answers, which may have several."""
    prompt = []
    if draw(st.booleans()):
        prompt.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(0, 2))):
        prompt += [user(draw(words)), assistant(draw(words))]
    prompt.append(user(draw(words)))
    answers = []
    for _ in range(2):
        answer = [assistant(draw(words))]
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
            answer += [user(draw(words)), assistant(draw(words))]
        for turn in answer[:-1]:
            if turn["role"] == "assistant" and draw(st.integers(0, 2)) == 0:
                turn["weight"] = 0
        answers.append(answer)
    return prompt, *answers


def strip(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


@settings(deadline=None, max_examples=60)
@given(conversations(), st.sampled_from(list(TEMPLATES)), st.booleans())
def test_prompt_and_answer_are_what_chat_gives_for_the_same_conversation(
    tokenizers, tmp_path_factory, conversation, name, is_whole
):
    """Or the pair is dropped, and the reason is one that the rows of --format chat show."""
    prompt, chosen, rejected = conversation
    tokenizer = tokenizers[name]
    folder = tmp_path_factory.getbasetemp() / "random pairs"
    folder.mkdir(exist_ok=True)
    raw = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if is_whole:
        raw = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        # The common beginning goes as far as both answers say the same.
        while chosen[:2] == rejected[:2] and min(len(chosen), len(rejected)) > 2:
            prompt = prompt + chosen[:2]
            chosen = chosen[2:]
            rejected = rejected[2:]
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows, ledger = tokenize(folder, [raw, good], tokenizer)
    lost = {reason for reason, number in ledger["rows"].items() if number and reason not in ("in", "kept")}
    if strip(chosen) == strip(rejected):
        assert lost == {"equal_answers"}
        return
    with_weights = [[turn | {"weight": 1} if "weight" in turn else turn for turn in a] for a in (chosen, rejected)]
    num_rows = [len(chat_rows(folder / "chat", prompt, answer, tokenizer)) for answer in with_weights]
    if max(num_rows) > 1:
        assert lost == {"rewritten"}
        return
    assert lost == set()
    assert_same_as_chat(folder, rows[0], "chosen", prompt, chosen, tokenizer)
    assert_same_as_chat(folder, rows[0], "rejected", prompt, rejected, tokenizer)


def test_a_base_model_is_asked_as_by_format_alpaca(tmp_path, tokenizers):
    raw = {"instruction": "Translate.", "input": "你好", "system": "Be brief.", "chosen": "Hello", "rejected": "Bye"}
    (row,), _ = tokenize(tmp_path, [raw], tokenizers["plain"])
    for name in ("chosen", "rejected"):
        alpaca = raw | {"output": raw[name]}
        del alpaca["chosen"], alpaca["rejected"]
        (expected,), _ = tokenize(tmp_path, [alpaca], tokenizers["plain"], format="alpaca")
        assert row["prompt_ids"] + row[f"{name}_ids"] == expected["input_ids"]
        assert [IGNORE_INDEX] * len(row["prompt_ids"]) + row[f"{name}_labels"] == expected["labels"]


# -------------------------------------------------------------------------------------------------------------------
# Which turns of an answer are learned
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "each alike", "joins texts", "writes date"])
def test_a_users_turn_and_one_without_weight_have_no_loss(tmp_path, tokenizers, name):
    tokenizer = tokenizers[name]
    chosen = [assistant("Since when?"), user("Now."), assistant("Go now.")]
    rejected = [assistant("Well."), user("Hm?"), assistant("No.", weight=0), user("So?"), assistant("Later.")]
    (row,), ledger = tokenize(tmp_path, [{"prompt": QUESTION, "chosen": chosen, "rejected": rejected}], tokenizer)
    end = "<|turn|>" if name == "writes date" else "</s>"
    last = "<|turn|></s>" if name == "writes date" else "</s>"
    assert targets_of(tokenizer, row, "chosen") == f"Since when?{end}Go now.{last}"
    assert targets_of(tokenizer, row, "rejected") == f"Well.{end}Later.{last}"
    whole = text_of(tokenizer, row["rejected_ids"])
    assert [part in whole for part in ("Hm?", "No.", "So?")] == [True] * 3
    labels = row["chosen_labels"] + row["rejected_labels"]
    assert ledger["targets"] == sum(label != IGNORE_INDEX for label in labels)


def test_whole_conversations_part_where_the_assistant_speaks(tmp_path, tokenizers):
    """The user's second question differs, so the answers begin with the assistant's turn before it."""
    tokenizer = tokenizers["each alike"]
    beginning = [user("Hi"), assistant("Hello.")]
    raw = {
        "chosen": [*beginning, user("My ear"), assistant(GOOD)],
        "rejected": [*beginning, user("My eye"), assistant(BAD)],
    }
    (row,), _ = tokenize(tmp_path, [raw], tokenizer)
    assert text_of(tokenizer, row["prompt_ids"]) == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert targets_of(tokenizer, row, "chosen") == f"Hello.</s>{GOOD}</s>"
    assert targets_of(tokenizer, row, "rejected") == f"Hello.</s>{BAD}</s>"


def test_eos_at_the_end_of_an_answer_is_written_once(tmp_path, tokenizers):
    for name in ("plain", "each alike"):
        raw = {"prompt": QUESTION, "chosen": f"{GOOD}</s>", "rejected": f"{BAD}</s></s>"}
        (row,), ledger = tokenize(tmp_path, [raw], tokenizers[name])
        assert text_of(tokenizers[name], row["chosen_ids"]) == f"{GOOD}</s>"
        assert text_of(tokenizers[name], row["rejected_ids"]) == f"{BAD}</s>"
        assert ledger["stripped_eos"] == 2


def test_an_answer_that_is_json_stays_a_text(tmp_path, tokenizers):
    raw = {"prompt": '["a", 1]', "chosen": '{"b": [2]}', "rejected": "[3]"}
    (row,), _ = tokenize(tmp_path, [raw], tokenizers["each alike"])
    assert text_of(tokenizers["each alike"], row["prompt_ids"]) == '<|user|>\n["a", 1]</s>\n<|assistant|>\n'
    assert text_of(tokenizers["each alike"], row["chosen_ids"]) == '{"b": [2]}</s>'
    assert text_of(tokenizers["each alike"], row["rejected_ids"]) == "[3]</s>"


# -------------------------------------------------------------------------------------------------------------------
# The ledger
# -------------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}
LOST = {  # the reason in the ledger, the row, and how the printed table says it
    "equal": ("equal_answers", PAIR | {"rejected": f"{GOOD}\n"}, "both answers are equal"),
    "empty": ("no_target", PAIR | {"rejected": " "}, "nothing to learn"),
    "no weight": ("no_target", PAIR | {"chosen": [assistant(GOOD, weight=0)]}, "nothing to learn"),
    "long": ("too_long", PAIR | {"rejected": "long " * 300}, "longer than --max_length"),
    "special token": ("special_token", PAIR | {"chosen": "stop <s> here"}, "text spells a special token"),
    "other beginnings": (
        "no_common_beginning",
        {"chosen": f"\n\nHuman: a\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: b\n\nAssistant: {BAD}"},
        "conversations without a common beginning",
    ),
    "one conversation and one answer": (
        "no_common_beginning",
        {"chosen": [user("a"), assistant(GOOD)], "rejected": BAD},
        "conversations without a common beginning",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_pair_that_is_lost_is_counted_and_named(tmp_path, tokenizers, capsys, case):
    reason, raw, label = LOST[case]
    rows, ledger = tokenize(tmp_path, [raw, PAIR], tokenizers["each alike"], max_length=300)
    assert len(rows) == ledger["rows"]["kept"] == ledger["rows"][reason] == 1
    for balance in ("rows", "tokens", "fields"):
        assert 2 * ledger[balance]["in"] == sum(ledger[balance].values())
    kept = sum(len(rows[0][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    assert ledger["tokens"]["kept"] == kept
    assert ledger["tokens"][reason] == ledger["tokens"]["in"] - kept > 0
    tokenize_dataset.print_ledger(ledger, tmp_path)
    printed = capsys.readouterr().out
    assert f"dropped: {label}" in printed and "chosen answers: 1, on average" in printed
    with pytest.raises(ValueError, match=f"{label}.*: 1 of 1 rows .the first: .*rows.jsonl, line 1"):
        tokenize(tmp_path, [raw], tokenizers["each alike"], max_length=300)


def test_answers_that_the_template_rewrites_are_counted_and_named(tmp_path, tokenizers):
    """Qwen3's template drops the reasoning of earlier turns, so no single row is what serving would send."""
    chosen = [assistant("Since when?"), user("Now."), assistant("Go.")]
    raw = PAIR | {"chosen": chosen}
    rows, ledger = tokenize(tmp_path, [raw, PAIR], tokenizers["drops earlier reasoning"])
    assert len(rows) == ledger["rows"]["kept"] == ledger["rows"]["rewritten"] == 1
    assert ledger["tokens"]["rewritten"] > 0
    with pytest.raises(ValueError, match="template rewrites turns of an answer: 1 of 1"):
        tokenize(tmp_path, [raw], tokenizers["drops earlier reasoning"])


def test_max_length_is_that_of_the_longer_document(tmp_path, tokenizers):
    (row,), ledger = tokenize(tmp_path, [PAIR], tokenizers["each alike"])
    length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    assert ledger["longest_row_written"] == length
    rows, _ = tokenize(tmp_path, [PAIR], tokenizers["each alike"], max_length=length)
    assert rows == [row]
    with pytest.raises(ValueError, match=f"raise --max_length, up to {length} for the longest row$"):
        tokenize(tmp_path, [PAIR], tokenizers["each alike"], max_length=length - 1)
    with pytest.raises(ValueError, match=f"line 1: {length} tokens, above --max_length; raise it, or choose --on_long"):
        tokenize(tmp_path, [PAIR], tokenizers["each alike"], max_length=length - 1, on_long="error")


def test_a_row_without_weight_is_not_learned(tmp_path, tokenizers):
    rows, ledger = tokenize(tmp_path, [PAIR, PAIR | {"weight": 0}], tokenizers["plain"])
    assert len(rows) == ledger["rows"]["no_target"] == 1


contents = st.one_of(st.sampled_from(["", " ", "a", "b </s>", "<s>", "[1]", HH, f"{HH} c", "\n\nHuman: q"]),
                     st.text(max_size=6))  # fmt: skip
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": st.one_of(contents, st.none())},
    optional={"weight": st.sampled_from([0, 1, 0.5]), "name": contents, "reasoning": contents},
)
values = st.one_of(contents, messages, st.lists(messages, max_size=4), st.none(), st.integers(), st.lists(st.integers(),
                   max_size=2))  # fmt: skip
rows_of_any_kind = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "completion", "label", "conversations", "messages", "instruction",
                     "input", "output", "history", "system", "tools", "weight", "margin", "id"]),
    values,
    max_size=7,
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(rows_of_any_kind)
def test_every_value_of_a_row_is_used_ignored_or_counted(row):
    template = rendering.make_template("preference", True)
    cleaned = clean_row(row, template)
    counts = FieldCounts()
    num_fields = count_fields(cleaned, "preference")
    try:
        read_row(cleaned, template, counts)
    except ValueError as problem:
        assert str(problem)
        return
    assert sum((counts.used + counts.ignored + counts.not_used).values()) == num_fields


pairs = st.fixed_dictionaries(
    {"chosen": values, "rejected": values}, optional={"prompt": values, "system": contents, "margin": contents}
)


@settings(deadline=None, max_examples=60)
@given(st.lists(pairs, max_size=6), st.sampled_from(["plain", "each alike", "moves system", "opens think"]),
       st.integers(2, 80))  # fmt: skip
def test_the_ledger_balances_whatever_the_rows_hold(tokenizers, tmp_path_factory, raw_rows, name, max_length):
    folder = tmp_path_factory.getbasetemp() / "random rows"
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers[name]
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (shortest,), _ = tokenize(folder, [good], tokenizer)
    max_length += len(shortest["prompt_ids"]) + max(len(shortest["chosen_ids"]), len(shortest["rejected_ids"]))
    rows, ledger = tokenize(folder, [*raw_rows, good], tokenizer, max_length=max_length, on_bad_row="skip")
    for balance in ("rows", "tokens", "fields"):
        assert 2 * ledger[balance]["in"] == sum(ledger[balance].values())
    assert ledger["rows"]["in"] == len(raw_rows) + 1
    assert ledger["rows"]["kept"] == len(rows)
    num_tokens = 0
    num_targets = 0
    for row in rows:
        num_tokens += len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
        for answer in ("chosen", "rejected"):
            assert targets_of(tokenizer, row, answer).endswith("</s>")
            num_targets += sum(label != IGNORE_INDEX for label in row[f"{answer}_labels"])
    assert (ledger["tokens"]["kept"], ledger["targets"]) == (num_tokens, num_targets)
    assert ledger["documents"] == 2 * len(rows)
    assert sum(ledger["bos_at_start"].values()) == 2 * len(rows)


# -------------------------------------------------------------------------------------------------------------------
# Files, workers, parts
# -------------------------------------------------------------------------------------------------------------------


def write_file(path: Path, rows: list[dict]) -> None:
    """Writes rows in the form that the name asks for; in CSV lists and objects are JSON texts."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        content = io.StringIO()
        writer = csv.DictWriter(content, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
            )
        path.write_bytes(content.getvalue().encode())
    else:
        write_jsonl(path, rows)


FILE_SHAPES = ["texts", "TRL, explicit prompt", "TRL, implicit prompt", "LLaMA-Factory, ShareGPT", "HH-RLHF"]


@pytest.mark.parametrize("shape", FILE_SHAPES)
def test_every_kind_of_file_gives_the_same_set(tmp_path, tokenizers, shape):
    tokenizer = tokenizers["each alike"]
    rows = [SHAPES[shape][0]] * 3
    expected, _ = tokenize(tmp_path, rows, tokenizer)
    for name in ("a.json", "a.csv", "a.parquet"):
        write_file(tmp_path / name, rows)
        assert tokenize_file(tmp_path / name, tmp_path / "other", tokenizer)[0] == expected, name
    write_file(tmp_path / "b.parquet", rows)
    assert tokenize_file(f"{tmp_path}/*.parquet", tmp_path / "other", tokenizer)[0] == expected * 2


@pytest.mark.parametrize("label", [True, 1, "true"])
def test_a_label_is_the_same_in_every_kind_of_file(tmp_path, tokenizers, label):
    rows = [{"prompt": QUESTION, "completion": GOOD, "label": label}]
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet"):
        write_file(tmp_path / name, rows)
        (row,), _ = tokenize_file(tmp_path / name, tmp_path / "set", tokenizers["plain"])
        assert row["label"] is True, name


def many_pairs(number: int) -> list[dict]:
    draw = random.Random(0)
    rows = []
    for index in range(number):
        rows.append(
            {"prompt": f"Question {index}", "chosen": f"yes {'很' * draw.randrange(9)}", "rejected": f"no {index}"}
        )
    return rows


def test_workers_parts_and_a_validation_share_give_the_same_rows(tmp_path, tokenizers):
    rows = many_pairs(700)
    path = write_jsonl(tmp_path / "many.jsonl", rows)
    tokenizer = tokenizers["each alike"]
    expected, ledger = tokenize_file(path, tmp_path / "one", tokenizer)
    found, other_ledger = tokenize_file(path, tmp_path / "two", tokenizer, num_proc=2)
    assert found == expected and ledger == other_ledger
    found = []
    for number in (1, 2):
        tokenize_file(path, tmp_path / "parts", tokenizer, shard=f"{number}/2")
        found += list(load_from_disk(str(tmp_path / f"parts-{number}-of-2")))
    assert sorted(found, key=str) == sorted(expected, key=str)
    train, ledger = tokenize_file(path, tmp_path / "split", tokenizer, val_size=0.2)
    held_out = list(load_from_disk(str(tmp_path / "split_val")))
    assert sorted(train + held_out, key=str) == sorted(expected, key=str)
    assert ledger["rows"]["other_split"] == len(held_out) > 100


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("place", [1, 600])
def test_pairs_and_single_answers_in_one_set_are_refused(tmp_path, tokenizers, num_proc, place):
    """In one chunk of rows, and in chunks that different workers read."""
    rows = many_pairs(700)
    rows[place] = {"prompt": QUESTION, "completion": GOOD, "label": True}
    message = (
        rf"rows.jsonl, line {place + 1}: it is a single answer \(completion and label\), and the rows before it, from "
        rf"\S*rows.jsonl, line 1 on, are not: .*put pairs and single answers into two sets$"
    )
    with pytest.raises(ValueError, match=message):
        tokenize(tmp_path, rows, tokenizers["each alike"], num_proc=num_proc, on_bad_row="skip")
    assert not (tmp_path / "set").exists()


# -------------------------------------------------------------------------------------------------------------------
# Mistakes
# -------------------------------------------------------------------------------------------------------------------

MISTAKES = {  # the rows of the file, further flags, what the message must name
    "packing": ([PAIR], ("--packing", "True"), ["--packing True", "cannot be joined", "--format preference"]),
    "a loss on the prompt": ([PAIR], ("--train_on_prompt", "True"), ["--train_on_prompt True", "cancels out"]),
    "cutting answers": ([PAIR], ("--on_long", "truncate"), ["--on_long truncate", "would be cut off"]),
    "no rejected answer": ([{"prompt": "a", "chosen": "b"}], (), ["line 1", "field rejected is missing"]),
    "no chosen answer": ([{"prompt": "a", "rejected": "b"}], (), ["line 1", "field chosen is missing"]),
    "no answers": ([{"prompt": "a"}], (), ["line 1", "chosen and rejected (or completion and label) are missing"]),
    "another name of the prompt": (
        [{"question": "a", "chosen": "b", "rejected": "c"}],
        (),
        ["line 1", "field prompt is missing", "the row has the fields question, chosen, rejected",
         "--columns prompt=question"],
    ),
    "no label": ([{"prompt": "a", "completion": "b"}], (), ["line 1", "field label is missing"]),
    "a label between": (
        [{"prompt": "a", "completion": "b", "label": 0.5}],
        (),
        ["line 1", "field label is 0.5, expected true or false"],
    ),
    "an answer that is a number": ([PAIR | {"chosen": 5}], (), ["line 1", "field chosen is neither a text nor a list"]),
    "a prompt that ends with an answer": (
        [PAIR | {"prompt": [user("a"), assistant("b")]}],
        (),
        ["line 1", "field prompt ends with a turn of the assistant"],
    ),
    "another prompt beside conversations": (
        [{"prompt": [user("x")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}],
        (),
        ["line 1", "field prompt has other messages than chosen and rejected begin with"],
    ),
    "two system messages": (
        [PAIR | {"prompt": WITH_SYSTEM, "system": "Be long."}],
        (),
        ["line 1", "field system stands beside another system message"],
    ),
    "an image": ([PAIR | {"images": ["a.png"]}], (), ["line 1", "field images", "text only"]),
    "a tool for a base model": ([PAIR | {"tools": [TOOL]}], (), ["line 1", "tools need a chat template"]),
    "pairs and single answers": (
        [PAIR, {"prompt": "a", "completion": "b", "label": 1}],
        (),
        ["line 2: it is a single answer", "from", "line 1 on, are not", "two sets"],
    ),
    "all lost": ([PAIR | {"rejected": GOOD}], (), ["both answers are equal: 1 of 1 rows", "line 1"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_writes_nothing(tmp_path, monkeypatch, capsys, tokenizers, mistake):
    rows, flags, fragments = MISTAKES[mistake]
    write_jsonl(tmp_path / "in.jsonl", rows)
    tokenizers["plain"].save_pretrained(tmp_path / "tokenizer")
    before = sorted(tmp_path.rglob("*"))
    command = ["tokenize_dataset.py", "--format", "preference", "--input", tmp_path / "in.jsonl"]
    command += ["--output", tmp_path / "set", "--tokenizer_path", tmp_path / "tokenizer", *flags]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as ended:
        tokenize_dataset.main()
    message = str(ended.value.code)
    assert message.startswith("error: ")
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format", ["mcq", "alpaca", "chat", "text"])
def test_other_formats_point_to_this_one(tmp_path, tokenizers, format):
    raw = {"instruction": "a", "output": "b", "text": "c", "messages": [user("a"), assistant("b")], "sent1": "a"} | PAIR
    with pytest.raises(
        ValueError, match="field chosen: chosen and rejected answers are a preference pair, which --for"
    ):
        tokenize(tmp_path, [raw], tokenizers["each alike"], format=format)
    del raw["chosen"], raw["rejected"]
    single = {"prompt": QUESTION, "completion": GOOD, "label": True}
    with pytest.raises(ValueError, match="they look like --format preference"):
        tokenize(tmp_path, [single], tokenizers["each alike"], format=format)


def test_the_shipped_pairs_become_sets(tmp_path, monkeypatch, capsys, tokenizers):
    """By the command that the documentation shows, with the tests' tokenizer."""
    tokenizers["each alike"].save_pretrained(tmp_path / "tokenizer")
    for name, least in (("preference_zh_en", 80), ("preference_zh_en_test", 40)):
        command = ["tokenize_dataset.py", "--format", "preference", "--input", ROOT / "data_sample" / f"{name}.jsonl"]
        command += ["--output", tmp_path / name, "--tokenizer_path", tmp_path / "tokenizer", "--max_length", 2000]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        tokenize_dataset.main()
        ledger = json.loads((tmp_path / name / "ledger.json").read_text(encoding="utf-8"))
        assert ledger["rows"]["kept"] == ledger["rows"]["in"] == len(load_from_disk(str(tmp_path / name))) >= least
        assert ledger["fields_not_used"] == {}
        chosen, rejected = (ledger["answers"][kind]["tokens"] for kind in ("chosen", "rejected"))
        assert 0.95 < chosen / rejected < 1.05
    assert "chosen answers: 40, on average" in capsys.readouterr().out


def test_both_pages_about_preferences_show_the_same_commands():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("preferences.md", "preferences_zh.md")]
    commands = [re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for page in pages]
    assert commands[0] == commands[1]
    assert [len(page.splitlines()) < 80 for page in pages] == [True, True]
    flags = [set(re.findall(r"`(--?\w[^`]*|\w+)`", page)) for page in pages]
    assert flags[0] == flags[1]
