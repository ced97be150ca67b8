"""What is trained is what is served: prompt and target of every learned turn, under templates of many shapes."""

import copy
import json
from pathlib import Path

import pytest
from chat_shapes import CALLS, TEMPLATES, WITH_CALLS, make_chat_tokenizer, write_call
from conftest import make_tokenizer
from datasets import load_from_disk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_collator import find_difference
from data_sample import rendering, tokenize_dataset
from data_sample.chat_template import ChatTemplate
from data_sample.encoding import IGNORE_INDEX

DATE = "2026-02-03"


@pytest.fixture(scope="session")
def chat_tokenizers() -> dict:
    return {name: make_chat_tokenizer(name) for name in TEMPLATES}


def tokenize(folder: Path, rows: list[dict], tokenizer, **flags) -> tuple[list[dict], dict]:
    """The rows that tokenize_dataset.py makes of raw rows, and the ledger."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    flags = {"format": "chat", "max_length": 10**6, "date": DATE, **flags}
    args = tokenize_dataset.Arguments(input=str(path), output=str(folder / "set"), **flags)
    tokenize_dataset.check_arguments(args)
    ledger = tokenize_dataset.build(args, copy.deepcopy(tokenizer))["train"]
    return list(load_from_disk(str(folder / "set"))), ledger


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def turns_of(row: dict) -> list[tuple[list[int], list[int]]]:
    """(ids before it, ids of it) for each run of targets, inside each document of a row."""
    positions = row.get("position_ids") or list(range(len(row["input_ids"])))
    starts = [number for number, position in enumerate(positions) if position == 0]
    turns = []
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        ids = row["input_ids"][start:end]
        is_target = [label != IGNORE_INDEX for label in row["labels"][start:end]]
        for number in range(1, len(ids)):
            if is_target[number] and not is_target[number - 1]:
                last = number
                while last < len(ids) and is_target[last]:
                    last += 1
                turns.append((ids[:number], ids[number:last]))
    return turns


# -------------------------------------------------------------------------------------------------------------------
# Exact texts
# -------------------------------------------------------------------------------------------------------------------

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "My ear hurts."},
        {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "Two days."},
        {"role": "assistant", "content": "See an ENT doctor.", "reasoning_content": "Ears are theirs."},
    ]
}
# For each template (prompt, target) of both turns, and whether the conversation stays one row.
EXPECTED = {
    "default system": (
        [
            ("<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\n", "Since when?</s>"),
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\nSince when?</s>\n"
                "<|user|>\nTwo days.</s>\n<|assistant|>\n",
                "See an ENT doctor.</s>",
            ),
        ],
        True,
    ),
    "calls instead of text": (
        [
            ("<|system|>Be brief.</s><|user|>My ear hurts.</s><|assistant|>", "Since when?</s>"),
            (
                "<|system|>Be brief.</s><|user|>My ear hurts.</s><|assistant|>Since when?</s><|user|>Two days.</s>"
                "<|assistant|>",
                "See an ENT doctor.</s>",
            ),
        ],
        True,
    ),
    "reads earlier content": (
        [
            ("<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\n", "Since when?</s>"),
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\nSince when?</s>\n"
                "<|user|>\nTwo days.</s>\n<|assistant|>\n",
                "See an ENT doctor.</s>",
            ),
        ],
        True,
    ),
    "joins texts": (
        [
            ("<|system|>Be brief.</s><|user|>My ear hurts.</s><|assistant|>", "Since when?</s>"),
            (
                "<|system|>Be brief.</s><|user|>My ear hurts.</s><|assistant|>Since when?</s><|user|>Two days.</s>"
                "<|assistant|>",
                "See an ENT doctor.</s>",
            ),
        ],
        True,
    ),
    "each alike": (
        [
            ("<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\n", "Since when?</s>"),
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\nSince when?</s>\n"
                "<|user|>\nTwo days.</s>\n<|assistant|>\n",
                "See an ENT doctor.</s>",
            ),
        ],
        True,
    ),
    "drops earlier reasoning": (
        [
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\n",
                "<think>\n\n</think>\n\nSince when?</s>",
            ),
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\nSince when?</s>\n"
                "<|user|>\nTwo days.</s>\n<|assistant|>\n",
                "<think>\nEars are theirs.\n</think>\n\nSee an ENT doctor.</s>",
            ),
        ],
        False,
    ),
    "ends only the last": (
        [
            (
                "<|system|>\nBe brief.<|end|>\n<|user|>\nMy ear hurts.<|end|>\n<|assistant|>\n",
                "Since when?<|end|>\n</s>",
            ),
            (
                "<|system|>\nBe brief.<|end|>\n<|user|>\nMy ear hurts.<|end|>\n<|assistant|>\nSince when?<|end|>\n"
                "<|user|>\nTwo days.<|end|>\n<|assistant|>\n",
                "See an ENT doctor.<|end|>\n</s>",
            ),
        ],
        False,
    ),
    "moves system": (
        [
            ("<s>[INST] Be brief.\n\nMy ear hurts.[/INST]", " Since when?</s>"),
            (
                "<s>[INST] My ear hurts.[/INST] Since when?</s>[INST] Be brief.\n\nTwo days.[/INST]",
                " See an ENT doctor.</s>",
            ),
        ],
        False,
    ),
    "opens think": (
        [
            ("<s><|system|>Be brief.<|user|>My ear hurts.<|assistant|><think>\n", "Since when?</s>"),
            (
                "<s><|system|>Be brief.<|user|>My ear hurts.<|assistant|>Since when?</s><|user|>Two days."
                "<|assistant|><think>\n",
                "Ears are theirs.\n</think>\n\nSee an ENT doctor.</s>",
            ),
        ],
        False,
    ),
    "always thinks": (
        [
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\n<think>\n",
                "\n</think>\n\nSince when?</s>",
            ),
            (
                "<|system|>\nBe brief.</s>\n<|user|>\nMy ear hurts.</s>\n<|assistant|>\nSince when?</s>\n"
                "<|user|>\nTwo days.</s>\n<|assistant|>\n<think>\n",
                "Ears are theirs.\n</think>\n\nSee an ENT doctor.</s>",
            ),
        ],
        False,
    ),
    "writes date": (
        [
            (
                "<s><|system|>\nToday is 03 Feb 2026.<|turn|><|system|>\nBe brief.<|turn|><|user|>\nMy ear hurts."
                "<|turn|><|assistant|>\n",
                "Since when?<|turn|>",
            ),
            (
                "<s><|system|>\nToday is 03 Feb 2026.<|turn|><|system|>\nBe brief.<|turn|><|user|>\nMy ear hurts."
                "<|turn|><|assistant|>\nSince when?<|turn|><|user|>\nTwo days.<|turn|><|assistant|>\n",
                "See an ENT doctor.<|turn|></s>",  # a row ends with EOS, whatever the template writes
            ),
        ],
        True,
    ),
    "channels": (
        [
            (
                "<|system|>Be brief.<|end|><|user|>My ear hurts.<|end|><|assistant|>",
                "final: Since when?<|return|></s>",
            ),
            (
                "<|system|>Be brief.<|end|><|user|>My ear hurts.<|end|><|assistant|>final: Since when?<|end|>"
                "<|user|>Two days.<|end|><|assistant|>",
                "analysis: Ears are theirs.<|end|><|assistant|>final: See an ENT doctor.<|return|></s>",
            ),
        ],
        False,
    ),
    "no end": (
        [
            ("SYSTEM: Be brief.\nUSER: My ear hurts.\nASSISTANT: ", "Since when?</s>"),
            (
                "SYSTEM: Be brief.\nUSER: My ear hurts.\nASSISTANT: Since when?\nUSER: Two days.\nASSISTANT: ",
                "See an ENT doctor.</s>",
            ),
        ],
        False,
    ),
}


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_and_target_of_every_turn(tmp_path, chat_tokenizers, name, packing):
    tokenizer = chat_tokenizers[name]
    expected, is_one_row = EXPECTED[name]
    rows, ledger = tokenize(tmp_path, [CONVERSATION], tokenizer, packing=packing)
    found = []
    for row in rows:
        for before, target in turns_of(row):
            found.append((text_of(tokenizer, before), text_of(tokenizer, target)))
    if not is_one_row:
        found.sort(key=lambda turn: len(turn[0]))  # packing puts the longest row first
    assert found == expected
    num_rows = 1 if is_one_row else 2
    assert ledger["conversations"] == {"in": 1, "rows": num_rows}
    assert ledger["rows"]["in"] == ledger["rows"]["kept"] == ledger["documents"] == num_rows
    assert len(rows) == (1 if packing else num_rows)


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "temp", "arguments": {"city": "Ōsaka"}}}
TOOL = {"type": "function", "function": {"name": "temp", "parameters": {"type": "object"}}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "tool_call_id": "abcdefghi", "name": "temp"},
        {"role": "assistant", "content": "4 degrees."},
    ],
    "tools": [TOOL],
}
EXPECTED_CALLS = {
    "drops earlier reasoning": ["<think>\n\n</think>\n\n" + write_call(CALL) + "</s>",
                                "<think>\n\n</think>\n\n4 degrees.</s>"],
    "moves system": ['[CALLS] [{"name": "temp", "arguments": {"city": "Ōsaka"}}]</s>', " 4 degrees.</s>"],
    "joins texts": ['<call>temp\n{"city": "Ōsaka"}</call></s>', "4 degrees.</s>"],
    "calls instead of text": ['<call>temp\n{"city": "Ōsaka"}</call></s>', "4 degrees.</s>"],
    "reads earlier content": [write_call(CALL) + "</s>", "4 degrees.</s>"],
}  # fmt: skip


def sharegpt(arguments) -> dict:
    """The same conversation with ShareGPT's names; the tools are a JSON text, and bare."""
    call = json.dumps({"name": "temp", "arguments": arguments}, ensure_ascii=False)
    turns = [("human", "How warm is it?"), ("function_call", call), ("observation", "4"), ("gpt", "4 degrees.")]
    return {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "tools": json.dumps([TOOL["function"]]),
    }


def with_text_arguments(row: dict) -> dict:
    row = copy.deepcopy(row)
    function = row["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    del row["messages"][1]["content"]
    row["messages"][1]["tool_calls"][0]["id"] = row["messages"][2]["tool_call_id"] = "call_0123456789abcdef"
    return row


@pytest.mark.parametrize("name", EXPECTED_CALLS)
@pytest.mark.parametrize(
    "row",
    [WITH_TOOLS, with_text_arguments(WITH_TOOLS), sharegpt({"city": "Ōsaka"})],
    ids=["openai", "arguments as text", "sharegpt"],
)
def test_calls_and_tools_reach_the_template(tmp_path, chat_tokenizers, name, row):
    tokenizer = chat_tokenizers[name]
    rows, ledger = tokenize(tmp_path, [row], tokenizer)
    turns = [turn for made in rows for turn in turns_of(made)]
    assert [text_of(tokenizer, target) for _, target in turns] == EXPECTED_CALLS[name]
    first_prompt = text_of(tokenizer, turns[0][0])
    if name in ("moves system", "reads earlier content"):
        assert ledger["fields_not_used"] == {"tools": 1}  # this template writes no tools, and the ledger says so
    else:
        assert json.dumps(TOOL) in first_prompt
        assert ledger["fields_not_used"] == {}


def test_a_call_in_the_style_of_a_function_is_written(tmp_path, chat_tokenizers):
    tokenizer = copy.deepcopy(chat_tokenizers["drops earlier reasoning"])
    call = "{% for call in message.tool_calls or [] %}{{ call.function.name }}({% for name, value in "
    call += "call.function.arguments.items() %}{{ name }}='{{ value }}'{% endfor %}){% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(CALLS, call)
    rows, _ = tokenize(tmp_path, [WITH_TOOLS], tokenizer)
    target = text_of(tokenizer, turns_of(rows[0])[0][1])
    assert target == "<think>\n\n</think>\n\ntemp(city='Ōsaka')</s>"


def test_of_a_call_and_a_text_beside_it_none_vanishes_without_a_word(tmp_path, chat_tokenizers):
    row = copy.deepcopy(WITH_TOOLS)
    row["messages"][1]["content"] = "Let me look."
    call = '<call>temp\n{"city": "Ōsaka"}</call>'
    for name, target, not_used in (
        ("joins texts", f"Let me look.{call}</s>", {}),
        ("calls instead of text", f"{call}</s>", {"messages.content": 1}),
    ):
        tokenizer = chat_tokenizers[name]
        rows, ledger = tokenize(tmp_path, [row], tokenizer)
        assert text_of(tokenizer, turns_of(rows[0])[0][1]) == target
        assert ledger["fields_not_used"] == not_used


def test_a_call_that_the_template_does_not_write_is_refused(tmp_path, chat_tokenizers):
    with pytest.raises(ValueError, match="line 1: .*does not write tool_calls, so the call would be lost"):
        tokenize(tmp_path, [WITH_TOOLS], chat_tokenizers["each alike"])


def test_the_call_of_sharegpt_is_text_where_the_template_writes_no_calls(tmp_path, chat_tokenizers):
    rows, _ = tokenize(tmp_path, [sharegpt({"city": "Oslo"})], chat_tokenizers["each alike"])
    targets = [text_of(chat_tokenizers["each alike"], target) for _, target in turns_of(rows[0])]
    assert targets == ['{"name": "temp", "arguments": {"city": "Oslo"}}</s>', "4 degrees.</s>"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "in the content", "a part"])
def test_reasoning_under_each_of_its_names_is_learned(tmp_path, chat_tokenizers, field):
    answer = {"role": "assistant", "content": "Hi."}
    if field == "in the content":
        answer["content"] = "<think>\nWhy\n</think>\n\nHi."
    elif field == "a part":
        answer["content"] = [{"type": "thinking", "thinking": "Why"}, {"type": "text", "text": "Hi."}]
    else:
        answer[field] = "Why"
    row = {"messages": [{"role": "user", "content": "Hello?"}, answer]}
    for name in ("drops earlier reasoning", "opens think", "always thinks"):
        tokenizer = chat_tokenizers[name]
        rows, ledger = tokenize(tmp_path, [row], tokenizer)
        ((before, target),) = turns_of(rows[0])
        written = text_of(tokenizer, before + target)
        assert written.endswith("<think>\nWhy\n</think>\n\nHi.</s>"), name
        assert ledger["fields_not_used"] == {}


def test_reasoning_that_cannot_be_written_is_named_in_the_ledger(tmp_path, chat_tokenizers, capsys):
    answer = {"role": "assistant", "content": "Hi.", "reasoning": "Why"}
    row = {"messages": [{"role": "user", "content": "Hello?"}, answer]}
    _, ledger = tokenize(tmp_path, [row] * 3, chat_tokenizers["each alike"])
    assert ledger["fields_not_used"] == {"messages.reasoning": 3}
    assert ledger["fields"]["in"] == sum(ledger["fields"].values()) - ledger["fields"]["in"]


# -------------------------------------------------------------------------------------------------------------------
# Which turns are learned
# -------------------------------------------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "Capital?"}


@pytest.mark.parametrize("name", ["weight", "loss", "loss_weight", "train"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0"])
def test_a_turn_without_weight_carries_no_loss_and_stays_in_the_prompt(tmp_path, chat_tokenizers, name, value):
    messages = [QUESTION, {"role": "assistant", "content": "Lyon.", name: value}]
    messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Paris.", name: 1}]
    rows, _ = tokenize(tmp_path, [{"messages": messages}], chat_tokenizers["each alike"])
    ((before, target),) = turns_of(rows[0])
    assert text_of(chat_tokenizers["each alike"], target) == "Paris.</s>"
    assert "Lyon.</s>" in text_of(chat_tokenizers["each alike"], before)


def test_a_weight_between_is_refused(tmp_path, chat_tokenizers):
    messages = [QUESTION, {"role": "assistant", "content": "Lyon.", "weight": 0.5}]
    with pytest.raises(ValueError, match="turn 2: weight is 0.5; a turn is learned"):
        tokenize(tmp_path, [{"messages": messages}], chat_tokenizers["each alike"])


def test_a_conversation_in_which_nothing_is_learned_is_dropped_and_counted(tmp_path, chat_tokenizers):
    answer = {"role": "assistant", "content": "Lyon.", "weight": 0}
    good = {"messages": [QUESTION, {"role": "assistant", "content": "Paris."}]}
    rows, ledger = tokenize(tmp_path, [{"messages": [QUESTION, answer]}, good], chat_tokenizers["each alike"])
    assert len(rows) == 1
    assert ledger["rows"]["no_target"] == 1


@pytest.mark.parametrize("name", ["each alike", "default system", "drops earlier reasoning", "writes date"])
def test_a_greeting_is_not_learned_and_the_rest_is(tmp_path, chat_tokenizers, name):
    messages = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Ear pain"}]
    messages.append({"role": "assistant", "content": "ENT"})
    rows, _ = tokenize(tmp_path, [{"messages": messages}], chat_tokenizers[name])
    ((before, target),) = turns_of(rows[0])
    assert "Hello!" in text_of(chat_tokenizers[name], before)
    assert "ENT" in text_of(chat_tokenizers[name], target) and "Hello!" not in text_of(chat_tokenizers[name], target)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_a_system_prompt_beside_the_messages_comes_first(tmp_path, chat_tokenizers, name, shape):
    row = {name: "You are a pirate.", "messages": [QUESTION, {"role": "assistant", "content": "Arr!"}]}
    if shape == "conversations":
        row = {name: "You are a pirate.", "conversations": [{"from": "human", "value": "Capital?"},
                                                            {"from": "gpt", "value": "Arr!"}]}  # fmt: skip
    rows, _ = tokenize(tmp_path, [row], chat_tokenizers["default system"])
    ((before, target),) = turns_of(rows[0])
    assert text_of(chat_tokenizers["default system"], before) == (
        "<|system|>\nYou are a pirate.</s>\n<|user|>\nCapital?</s>\n<|assistant|>\n"
    )
    assert text_of(chat_tokenizers["default system"], target) == "Arr!</s>"


def test_two_system_prompts_are_refused(tmp_path, chat_tokenizers):
    messages = [{"role": "system", "content": "a"}, QUESTION, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="a system turn, and system stands beside it"):
        tokenize(tmp_path, [{"system": "c", "messages": messages}], chat_tokenizers["each alike"])


def test_a_role_that_the_template_leaves_out_is_refused(tmp_path, chat_tokenizers):
    tokenizer = copy.deepcopy(chat_tokenizers["each alike"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.raises(ValueError, match="does not write messages of the role system"):
        tokenize(tmp_path, [CONVERSATION], tokenizer)


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Paris"}, {"type": "text", "text": "."}], ["Paris."]])
def test_text_parts_are_joined(tmp_path, chat_tokenizers, content):
    row = {"messages": [QUESTION, {"role": "assistant", "content": content}]}
    rows, _ = tokenize(tmp_path, [row], chat_tokenizers["each alike"])
    assert text_of(chat_tokenizers["each alike"], turns_of(rows[0])[0][1]) == "Paris.</s>"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "input_audio"}])
def test_parts_that_are_not_text_are_refused_with_the_reason(tmp_path, chat_tokenizers, part):
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    row = {"messages": [question, {"role": "assistant", "content": "A cat."}]}
    with pytest.raises(ValueError, match=f"turn 1: content has a part of type '{part['type']}': the model reads text"):
        tokenize(tmp_path, [row], chat_tokenizers["each alike"])


def test_a_trailing_eos_is_written_once(tmp_path, chat_tokenizers):
    row = {"messages": [QUESTION, {"role": "assistant", "content": "Paris.</s>"}]}
    rows, ledger = tokenize(tmp_path, [row], chat_tokenizers["each alike"])
    assert text_of(chat_tokenizers["each alike"], turns_of(rows[0])[0][1]) == "Paris.</s>"
    assert ledger["stripped_eos"] == 1


# -------------------------------------------------------------------------------------------------------------------
# Dates and fingerprints
# -------------------------------------------------------------------------------------------------------------------


def test_a_set_has_one_date_and_serving_writes_it_again(tmp_path, chat_tokenizers):
    tokenizer = chat_tokenizers["writes date"]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]
    hashes = []
    for date in (DATE, DATE, "2031-12-24"):
        rows, ledger = tokenize(tmp_path, [{"messages": messages}], tokenizer, date=date)
        hashes.append(ledger["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
    assert ledger["date"] == ledger["template"]["date"] == "2031-12-24"
    prompt = rendering.encode_prompt(tokenizer, messages[:1], ledger["template"])
    assert "Today is 24 Dec 2031." in text_of(tokenizer, prompt)
    assert rows[0]["input_ids"][: len(prompt)] == prompt


def test_a_template_without_a_date_does_not_depend_on_it(tmp_path, chat_tokenizers):
    hashes = set()
    for date in (DATE, "2031-12-24"):
        _, ledger = tokenize(tmp_path, [CONVERSATION], chat_tokenizers["each alike"], date=date)
        hashes.add(ledger["sha256"])
        assert "date" not in ledger["template"]
    assert len(hashes) == 1


@pytest.mark.parametrize("format", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A", "%-d.%-m.%y", "%H:%M"])
def test_a_date_is_written_in_any_format(chat_tokenizers, format):
    tokenizer = copy.deepcopy(chat_tokenizers["each alike"])
    tokenizer.chat_template = "{{ strftime_now('" + format + "') }}" + tokenizer.chat_template
    text = ChatTemplate(tokenizer, "2024-03-09").prompt([QUESTION], None)
    written = {"%d %b %Y": "09 Mar 2024", "%Y-%m-%d": "2024-03-09", "%B %d, %Y": "March 09, 2024", "%A": "Saturday",
               "%-d.%-m.%y": "9.3.24", "%H:%M": "00:00"}  # fmt: skip
    assert text.startswith(written[format] + "<|user|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_behaves_like_itself(tmp_path, chat_tokenizers, name):
    """The one that training loads from a folder is the one that the set was made with, on any day."""
    _, ledger = tokenize(tmp_path, [CONVERSATION], chat_tokenizers[name])
    ledger = json.loads(json.dumps(ledger))
    assert ledger["tokenizer_fingerprint"]["rendered"] is not None
    chat_tokenizers[name].save_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert find_difference(ledger, loaded) is None
    loaded.pad_token = loaded.eos_token  # other programs set one, and it changes no text
    assert find_difference(ledger, loaded) is None


def test_a_fingerprint_tells_tokenizers_apart_that_have_the_same_vocabulary(tmp_path):
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = TEMPLATES["each alike"]
    _, ledger = tokenize(tmp_path, [CONVERSATION], tokenizer)
    other = make_tokenizer(adds_bos=False)
    other.chat_template = TEMPLATES["each alike"]
    assert rendering.vocabulary_hash(other) == rendering.vocabulary_hash(tokenizer)
    assert "'Hello world' is [1, " in find_difference(ledger, other)

    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES["default system"]
    assert find_difference(ledger, other) == "its chat template is another one"
    other.chat_template = None
    assert find_difference(ledger, other) == "there it has a chat template, and here it has none"
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<s>"
    assert "writes 'user|>\\nHow are you?</s>" in find_difference(ledger, other)

    # Documents have no text of a chat template, so another one does no harm.
    _, ledger = tokenize(tmp_path, [{"text": "One paper."}], tokenizer, format="text")
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES["default system"]
    assert find_difference(ledger, other) is None


# -------------------------------------------------------------------------------------------------------------------
# Any conversation under any template
# -------------------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="<>|[]§", exclude_categories=["Cs", "Cc"]), max_size=12),
    st.sampled_from(
        ["Hello", "\nline", "two  spaces ", "你好 👋", "a\n\n", " x", "1. 2.", "\n\n\nC", "'quoted' \"too\""]
    ),
)
speech = words.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw, name: str) -> list[dict]:
    """Messages of all roles: questions, answers with and without reasoning and weight, and calls with their results.

    They may begin with the assistant, and a role may speak twice. Where no text of the template opens the assistant's
    turn, it may not: its two turns would follow one another, and no test could tell them apart.

    Args:
        name: of the template.
    """
    with_calls = name in WITH_CALLS
    num_questions = [1, 1, 1, 0, 2]
    if name == "moves system":
        num_questions.remove(0)
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    if draw(st.integers(0, 5)) == 0:
        messages.append({"role": "assistant", "content": draw(speech)})
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.sampled_from(num_questions))):
            messages.append({"role": "user", "content": draw(words)})
        if with_calls and draw(st.booleans()):
            function = {"name": draw(st.sampled_from(["temp", "find"])), "arguments": {"city": draw(words)}}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            messages.append({"role": "assistant", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(words), "tool_call_id": "abcdefghi"})
        answer = {"role": "assistant", "content": draw(speech)}
        if draw(st.booleans()):
            answer["reasoning_content"] = draw(speech).strip()
        if draw(st.integers(0, 4)) == 0:
            answer["weight"] = 0
        messages.append(answer)
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(words)})
    return messages


def as_served(tokenizer, messages: list[dict], tools: list | None, name: str) -> str:
    """The prompt as any server renders it with transformers, apart from the date."""
    prepared = copy.deepcopy(messages)
    for message in prepared:
        message.pop("weight", None)
        if "tool_calls" not in message:
            continue
        if name in ("joins texts", "reads earlier content"):
            message["content"] = ""
        if name in ("joins texts", "calls instead of text"):
            for call in message["tool_calls"]:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'03 Feb 2026'")
    return tokenizer.apply_chat_template(
        prepared, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def as_learned(message: dict, name: str) -> str:
    """The target of a turn, in the words of each template, without what follows the end of the turn."""
    content = message.get("content", "")
    reasoning = message.get("reasoning_content", "")
    call = ""
    for one in message.get("tool_calls", []):
        call += write_call(one)
        if name == "moves system":
            return f"[CALLS] [{json.dumps(one['function'], ensure_ascii=False)}]</s>"
        if name in ("joins texts", "calls instead of text"):
            arguments = json.dumps(one["function"]["arguments"], ensure_ascii=False)
            return f"<call>{one['function']['name']}\n{arguments}</call></s>"
    if name == "drops earlier reasoning":
        return f"<think>\n{reasoning}\n</think>\n\n{content}{call}</s>"
    if name == "always thinks":
        return f"{reasoning}\n</think>\n\n{content}{call}</s>"
    if name == "ends only the last":
        return f"{content}<|end|>\n</s>"
    if name == "moves system":
        return f" {content.strip()}</s>"
    if name == "opens think" and reasoning:
        return f"{reasoning}\n</think>\n\n{content.lstrip()}</s>"
    if name == "writes date":
        return f"{content.strip()}<|turn|>"
    if name == "channels" and reasoning:
        return f"analysis: {reasoning}<|end|><|assistant|>final: {content}<|return|>"
    if name == "channels":
        return f"final: {content}<|return|>"
    return f"{content}{call}</s>"


def test_a_turn_begins_behind_the_nearest_prompt_where_the_conversation_repeats_itself(tmp_path, chat_tokenizers):
    """The template strips an earlier turn, so the prompt is not a part of the conversation; its texts are the same."""
    tokenizer = chat_tokenizers["reads earlier content"]
    messages = [{"role": role, "content": "\nline"} for role in ("system", "assistant")]
    messages.append({"role": "assistant", "content": "0"})
    rows, _ = tokenize(tmp_path, [{"messages": messages}], tokenizer)
    learned = [text_of(tokenizer, ids) for row in rows for _, ids in turns_of(row)]
    assert learned == ["\nline</s>", "0</s>"]


def test_a_turn_never_begins_within_the_turn_before(tmp_path, chat_tokenizers):
    """The system prompt moves to the last question, which then ends as an earlier one does in the conversation."""
    tokenizer = chat_tokenizers["moves system"]
    messages = [{"role": "system", "content": "0"}, {"role": "user", "content": "a\n\n"}]
    for _ in range(2):
        messages.append({"role": "assistant", "content": "0", "weight": 0})
        messages.append({"role": "user", "content": ""})
    messages.append({"role": "assistant", "content": "1"})
    rows, _ = tokenize(tmp_path, [{"messages": messages}], tokenizer)
    assert [text_of(tokenizer, ids) for row in rows for _, ids in turns_of(row)] == [" 1</s>"]


@settings(deadline=None, max_examples=250)
@given(st.data(), st.sampled_from(sorted(TEMPLATES)), st.booleans())
def test_any_conversation_is_trained_as_it_is_served(tmp_path_factory, chat_tokenizers, data, name, packing):
    """Decoded targets are exactly the assistant's turns; the ids before each are exactly those that serving sends."""
    tokenizer = chat_tokenizers[name]
    messages = data.draw(conversations(name))
    tools = [TOOL] if name in WITH_CALLS and data.draw(st.booleans()) else None
    expected = []
    for number, message in enumerate(messages):
        # Before the first message nobody has asked anything.
        if message["role"] == "assistant" and message.get("weight") != 0 and number > 0:
            prompt = as_served(tokenizer, messages[:number], tools, name)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            expected.append((ids, prompt, as_learned(message, name)))
    good = {"messages": [QUESTION, {"role": "assistant", "content": "Paris."}]}  # so that no set is empty
    folder = tmp_path_factory.getbasetemp()
    rows, ledger = tokenize(folder, [{"messages": messages, "tools": tools}, good], tokenizer, packing=packing)
    found = [turn for row in rows for turn in turns_of(row)]
    targets = [text_of(tokenizer, ids).removesuffix("</s>") for _, ids in found]
    prompts = [ids for ids, _ in found]
    for ids, prompt, target in expected:
        number = prompts.index(ids)
        assert text_of(tokenizer, prompts.pop(number)) == prompt
        assert targets.pop(number) == target.removesuffix("</s>")
    assert len(prompts) == 1 and "Capital?" in text_of(tokenizer, prompts[0])  # no other turn is learned
    for balance in ("rows", "tokens", "fields"):
        assert 2 * ledger[balance]["in"] == sum(ledger[balance].values())
    assert ledger["tokens"]["kept"] == sum(len(row["input_ids"]) for row in rows)
    assert ledger["conversations"]["rows"] == ledger["rows"]["in"] >= ledger["conversations"]["in"] == 2


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(sorted(TEMPLATES)))
def test_what_serves_renders_the_prompt_of_training(tmp_path_factory, chat_tokenizers, data, name):
    """encode_prompt, which test_sample.py uses, gives the ids before the last turn of a row."""
    tokenizer = chat_tokenizers[name]
    row = {"messages": data.draw(conversations(name))}
    while row["messages"][-1]["role"] != "assistant":
        row["messages"].pop()
    row["messages"][-1].pop("weight", None)
    assume(len(row["messages"]) > 1)
    rows, ledger = tokenize(tmp_path_factory.getbasetemp(), [row], tokenizer)
    last_turn = [turn for made in rows for turn in turns_of(made)][-1]
    messages = rendering.messages_before_answer(row, ledger["template"])
    tools = rendering.read_tools(row, ledger["template"])
    assert rendering.encode_prompt(tokenizer, messages, ledger["template"], tools) == last_turn[0]
