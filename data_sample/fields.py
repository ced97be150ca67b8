"""What a row may hold. Every published form of a row becomes one form here, whatever kind of file it comes from.

    mcq         sent1, sent2, ending0, ending1, ... (2 to 26 of them), label (the number of the right one, from 0)
    alpaca      instruction, input, output, system, history
    chat        messages, tools, learned (for each message: is it an assistant's turn that is to be learned?)
    preference  messages before the answers (or alpaca's fields of a prompt), tools, and answers: the chosen and the
                rejected one, or a single one with a label
    text        text

A field that has a value is used, ignored on purpose, or counted as not used; a row with a field that cannot be honoured
is refused. So nothing that changes what is learned is dropped without a word. A field that is null, NaN or empty has
no value.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_OPTIONS = len(LETTERS)

# -------------------------------------------------------------------------------------------------------------------
# The table of known fields
# -------------------------------------------------------------------------------------------------------------------

# Fields that name the right option beside `question`: by its letter, its text or its number.
ANSWERS = ["answer_idx", "answer", "label", "answerKey", "answer_index"]

# What each format uses. For mcq: the form of this project and of SWAG; that of MedQA and MMLU-Pro, and with choices of
# MMLU and ARC; of MedMCQA; of C-Eval; and of PubMedQA, whose own files write QUESTION and CONTEXTS.
USED = {
    "mcq": ["sent1", "sent2", *(f"ending{number}" for number in range(MAX_OPTIONS)),
            "question", "options", "choices", *ANSWERS,
            "opa", "opb", "opc", "opd", "cop",
            *LETTERS,
            "context", "final_decision", "QUESTION", "CONTEXTS"],
    "alpaca": ["instruction", "input", "output", "system", "system_prompt", "history",
               "context", "response"],  # Dolly's names of input and output
    "chat": ["messages", "conversations", "system", "system_prompt", "tools"],
    # TRL's and UltraFeedback's pairs, with and without a prompt; LLaMA-Factory's; HH-RLHF's; TRL's unpaired rows.
    "preference": ["prompt", "chosen", "rejected", "completion", "label",
                   "conversations", "messages", "instruction", "input", "history",
                   "system", "system_prompt", "tools"],
    "text": ["text"],
}  # fmt: skip
# In all formats, 0 or false in one of these says that the row, or in `chat` also a single message, is not learned.
WEIGHTS = ["weight", "loss", "loss_weight", "train"]

# Names and sources of rows, and annotations of the data sets above that are no part of question and answer.
IGNORED = [
    "id", "idx", "index", "uuid", "guid", "qid", "question_id", "conversation_id", "prompt_id", "pubid",
    "source", "url", "license", "split", "", "Unnamed: 0", "__index_level_0__",
    "meta_info", "metamap_phrases", "choice_type", "subject_name", "topic_name",
    "LABELS", "MESHES", "YEAR", "reasoning_required_pred", "reasoning_free_pred",
]  # fmt: skip

NOT_TEXT = "the model reads text only, so the answer could not be learned from what it is about"
PREFERENCE = "chosen and rejected answers are a preference pair, which --format preference reads"
REFUSED = dict.fromkeys(["image", "images", "video", "videos", "audio", "audios"], NOT_TEXT)
REFUSED_ANSWERS = dict.fromkeys(["chosen", "rejected"], PREFERENCE)  # in all formats but preference

USED_IN_MESSAGES = ["role", "content", "from", "value", "tool_calls", "tool_call_id", "name", "function_call",
                    "reasoning_content", "reasoning", "thinking"]  # fmt: skip
IGNORED_IN_MESSAGES = ["id", "uuid"]
REFUSED_IN_MESSAGES = dict.fromkeys(["image", "images", "video", "videos", "audio", "audios"], NOT_TEXT)

# Names of the roles in ShareGPT and its relatives. Other names stay as they are.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
KNOWN_ROLES = ["system", "developer", "user", "assistant", "tool"]


@dataclass
class FieldCounts:
    """How many rows have a value in each field, by what became of it. Fields of messages are named messages.<name>."""

    used: Counter = field(default_factory=Counter)
    ignored: Counter = field(default_factory=Counter)
    not_used: Counter = field(default_factory=Counter)

    def add(self, other: "FieldCounts") -> None:
        self.used.update(other.used)
        self.ignored.update(other.ignored)
        self.not_used.update(other.not_used)

    def move_to_not_used(self, name: str) -> None:
        """Takes one use back: the chat template turned out not to write the field."""
        self.used[name] -= 1
        self.not_used[name] += 1


# -------------------------------------------------------------------------------------------------------------------
# Values
# -------------------------------------------------------------------------------------------------------------------


def has_value(value) -> bool:
    """Null, NaN, empty texts, lists and objects say nothing."""
    if value is None:
        return False
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, str | list | dict):
        return len(value) > 0
    return True


def drop_absent(row: dict) -> dict:
    """The row without its fields that are null or NaN. An empty text stays: it may be an empty answer."""
    kept = {}
    for name, value in row.items():
        is_nan = isinstance(value, float) and math.isnan(value)
        if value is not None and not is_nan:
            kept[name] = value
    return kept


def decode_json(value):
    """Lists and objects stand as JSON texts in CSV files, and often in Parquet."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def as_whole_number(value) -> int | None:
    """1 for 1, 1.0, "1" and "1.0"; None for what is no whole number. True is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is int:
        return value
    return None


def as_flag(value) -> bool | None:
    """True for true, 1, 1.0 and "1"; False for false, 0, 0.0 and "0"; None for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    number = as_whole_number(value)
    if number in (0, 1):
        return number == 1
    return None


def check_text(value, name: str) -> str:
    """Returns `value`. Raises ValueError if it is no text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"field {name} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a character (a lone surrogate), which has no UTF-8") from None
    return value


def take_text(row: dict, name: str) -> str:
    """The text of a field that a row must have."""
    if name not in row:
        raise ValueError(f"field {name} is missing")
    return check_text(row[name], name)


# -------------------------------------------------------------------------------------------------------------------
# Rows
# -------------------------------------------------------------------------------------------------------------------

# Fields that may hold a list or an object as a JSON text.
MAY_BE_JSON = {
    "mcq": ["options", "choices", "context", "CONTEXTS"],
    "alpaca": ["history"],
    "chat": ["messages", "conversations", "tools"],
    "preference": ["history", "tools"],
    "text": [],
}
# Fields that may hold messages as a JSON text. Any other text that happens to be JSON is an answer as it is.
MAY_BE_MESSAGES = {"preference": ["prompt", "chosen", "rejected", "completion", "messages", "conversations"]}


def clean_row(row: dict, template: dict) -> dict:
    """The row with the names and kinds of values that read_row expects, the same for JSON, CSV and Parquet.

    Raises:
        ValueError: a column of --columns is missing.
    """
    row = drop_absent(row)
    columns = template.get("columns", {})
    for column in columns.values():
        if column not in row:
            raise ValueError(f"column {column} of --columns is missing")
    values = {name: row.pop(column) for name, column in columns.items()}
    for name, value in values.items():
        if name in row:
            row[f"{name} beside --columns"] = row.pop(name)  # the ledger counts it as not used
        row[name] = value
    for name in MAY_BE_JSON[template["format"]]:
        if name in row:
            row[name] = decode_json(row[name])
    for name in MAY_BE_MESSAGES.get(template["format"], []):
        if name in row and holds_messages(decode_json(row[name])):
            row[name] = decode_json(row[name])
    return row


def count_fields(row: dict, format: str) -> int:
    """How many values a cleaned row has, those of its messages included."""
    num_values = sum(map(has_value, row.values()))
    for turn in find_turns(row, format):
        if isinstance(turn, dict):
            num_values += sum(map(has_value, turn.values()))
    return num_values


def find_turns(row: dict, format: str) -> list:
    """All messages of a row that its format reads."""
    if format == "preference":
        turns = []
        for name in (find_prompt_field(row), "chosen", "rejected", "completion"):
            if name != "instruction" and name in row:
                turns += find_messages(row[name])
        return turns
    if format != "chat":
        return []
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list):
        return turns
    return []


def read_row(row: dict, template: dict, counts: FieldCounts, needs_answer: bool = True) -> dict:
    """The row in the one form of its format.

    Args:
        row: as clean_row returned it.
        template: as in rendering.py; its format and first_label say how the row is read.
        counts: gets the fields of the row.
        needs_answer: whether a row without an answer is an error. A program that asks a model does not need one.

    Raises:
        ValueError: a field is missing or of a wrong kind, or it cannot be honoured.
    """
    format = template["format"]
    refused = REFUSED
    if format != "preference":
        refused = REFUSED | REFUSED_ANSWERS
    for name, reason in refused.items():
        if has_value(row.get(name)):
            raise ValueError(f"field {name}: {reason}")
    if format == "mcq":
        result, used = read_question(row, template.get("first_label", 0), needs_answer)
    elif format == "alpaca":
        result, used = read_instruction(row, needs_answer)
    elif format == "chat":
        result, used = read_conversation(row, needs_answer)
    elif format == "preference":
        result, used = read_preference(row, needs_answer)
    else:
        result, used = read_document(row)
    used = {*used, *read_weight_of_row(row, result)}
    if format in ("alpaca", "chat") and has_value(row.get("label")):
        check_label_of_answer(row["label"])
    for name, value in row.items():
        if not has_value(value):
            continue
        if name in used:
            counts.used[name] += 1
        elif name in IGNORED:
            counts.ignored[name] += 1
        else:
            counts.not_used[name] += 1
    for turn in find_turns(row, format):
        count_fields_of_message(turn, counts)
    return result


def read_weight_of_row(row: dict, result: dict) -> list[str]:
    """Sets result["is_learned"] to False if the row says so. Returns the fields that said something about it."""
    used = []
    for name in WEIGHTS:
        flag = as_flag(row.get(name))
        if flag is not None:
            used.append(name)
        if flag is False:
            result["is_learned"] = False
    return used


def check_label_of_answer(label) -> None:
    if as_flag(label) is False:
        raise ValueError("field label is false: it marks an answer that is not to be learned; leave the row out")


def read_document(row: dict) -> tuple[dict, list[str]]:
    return {"text": take_text(row, "text")}, ["text"]


def read_instruction(row: dict, needs_answer: bool) -> tuple[dict, list[str]]:
    used = ["instruction"]
    result = {"instruction": take_text(row, "instruction")}
    for name, other_name in (("output", "response"), ("input", "context"), ("system", "system_prompt")):
        if name not in row and other_name in row:
            name_in_row = other_name
        elif name in row and not has_value(row[name]) and has_value(row.get(other_name)):
            name_in_row = other_name
        else:
            name_in_row = name
        if name_in_row in row or (name == "output" and needs_answer):
            result[name] = take_text(row, name_in_row)
            used.append(name_in_row)
    if has_value(row.get("history")):
        result["history"] = read_history(row["history"])
        used.append("history")
    return result, used


def read_history(history) -> list[list[str]]:
    message = "field history is not a list of pairs [instruction, output]"
    if not isinstance(history, list):
        raise ValueError(message)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(message)
        for text in pair:
            check_text(text, "history")
    return history


# -------------------------------------------------------------------------------------------------------------------
# Multiple choice
# -------------------------------------------------------------------------------------------------------------------


def read_question(row: dict, first_label: int, needs_answer: bool) -> tuple[dict, list[str]]:
    """A question in the form of this project, or as MedQA, MedMCQA, C-Eval, MMLU or PubMedQA publish it."""
    if "sent1" in row:
        names = find_endings(row)
        question = {"sent1": take_text(row, "sent1"), "sent2": take_text(row, "sent2")}
        options = {name: take_text(row, name) for name in names}
        label, labels = read_label(row, "label", len(names), first_label)
        used = ["sent1", "sent2", *names, *labels]
    elif "final_decision" in row or "QUESTION" in row:
        question, used = read_abstract(row)
        options = {"yes": "yes", "no": "no", "maybe": "maybe"}
        label, labels = read_answer(row, ["final_decision"], options, first_label)
        used += labels
    elif "opa" in row:
        names = ["opa", "opb", "opc", "opd"]
        question = {"sent1": take_text(row, "question"), "sent2": ""}
        options = {name: take_text(row, name) for name in names}
        label, labels = read_label(row, "cop", len(names), first_label)
        used = ["question", *names, *labels]
    elif "question" in row and {"options", "choices", "A"} & row.keys():
        question = {"sent1": take_text(row, "question"), "sent2": ""}
        options, used = read_options_of_row(row)
        label, labels = read_answer(row, ANSWERS, options, first_label)
        used += ["question", *labels]
    else:
        raise ValueError("field sent1 is missing")
    for number, (name, text) in enumerate(options.items()):
        if not text.strip():
            raise ValueError(f"field {name} is empty, so letters and label would not fit the options")
        question[f"ending{number}"] = text
    if label is not None:
        question["label"] = label
    elif needs_answer:
        raise ValueError("the row has no answer: field label, answer, answer_idx, cop or final_decision is missing")
    return question, used


def find_endings(row: dict) -> list[str]:
    """The names of a row's options: up to the last ending that has a value, and at least two."""
    names = [f"ending{number}" for number in range(MAX_OPTIONS)]
    while len(names) > 2 and not has_value(row.get(names[-1])):
        names.pop()
    return names


def read_abstract(row: dict) -> tuple[dict, list[str]]:
    """PubMedQA as on the hub (question, context) or in its own files (QUESTION, CONTEXTS)."""
    name = "context"
    question = "question"
    if "QUESTION" in row:
        name = "CONTEXTS"
        question = "QUESTION"
    contexts = row.get(name)
    if isinstance(contexts, dict):
        contexts = contexts.get("contexts")
    if isinstance(contexts, str):
        contexts = [contexts]
    if not isinstance(contexts, list):
        raise ValueError(f"field {name} is not a list of texts")
    text = "\n".join(check_text(context, name) for context in contexts)
    return {"sent1": text, "sent2": take_text(row, question)}, [name, question]


def read_options_of_row(row: dict) -> tuple[dict[str, str], list[str]]:
    """The options by their letters, from `options` or `choices` or from columns A, B, ..., and the fields used."""
    for name in ("options", "choices"):
        if name in row:
            return read_options_field(row[name], name), [name]
    names = [letter for letter in LETTERS if has_value(row.get(letter))]
    if len(names) < 2 or names != list(LETTERS[: len(names)]):
        raise ValueError(f"the options {', '.join(names)} are not the letters from A on")
    return {letter: take_text(row, letter) for letter in names}, names


def read_label(row: dict, name: str, num_options: int, first_label: int) -> tuple[int | None, list[str]]:
    """The number of the right option, counted from 0, and the fields used. None if the row has no label.

    Raises:
        FirstLabelError: MedMCQA's `cop` shows that the file counts from 1.
        ValueError: it is no number of an option.
    """
    if not has_value(row.get(name)):
        return None, []
    last_label = first_label + num_options - 1
    number = as_whole_number(row[name])
    if number is not None and first_label <= number <= last_label:
        return number - first_label, [name]
    if name == "cop":
        check_first_label(number, name, num_options, first_label)
    raise ValueError(
        f"field {name} is {row[name]!r}, expected a number from {first_label} to {last_label}: "
        f"labels count from {first_label} (--first_label)"
    )


def check_first_label(number: int | None, name: str, num_options: int, first_label: int) -> None:
    """Raises FirstLabelError if a number shows that the options are counted from 1, as in MedMCQA's own files.

    Its files on the hub count from 0, so that the name of a field says nothing about it.
    """
    if first_label == 0 and number == num_options:
        raise FirstLabelError(f"field {name} is {number}: this file counts the options from 1; add --first_label 1")


class FirstLabelError(ValueError):
    """All labels of the file mean another option than was thought, so that no row of it may be skipped."""


def read_options_field(value, name: str) -> dict[str, str]:
    """MedQA's {"A": ..., "B": ...}, a list of texts, a list of {"key": ..., "value": ...}, or ARC's two lists."""
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        letters = [str(letter) for letter in value["label"]]
        texts = value["text"]
    elif isinstance(value, dict):
        letters = list(value)
        texts = list(value.values())
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        letters = [str(item.get("key")) for item in value]
        texts = [item.get("value") for item in value]
    elif isinstance(value, list):
        letters = list(LETTERS[: len(value)])
        texts = value
    else:
        raise ValueError(f"field {name} is neither a list nor an object with the options")
    if not 2 <= len(texts) <= MAX_OPTIONS or len(letters) != len(texts) or len(set(letters)) < len(letters):
        raise ValueError(f"field {name} has {len(texts)} options; a question has 2 to {MAX_OPTIONS}, each with its own "
                         "letter")  # fmt: skip
    return {letter: check_text(text, f"{name} {letter}") for letter, text in zip(letters, texts, strict=True)}


def read_answer(row: dict, names: list[str], options: dict, first_label: int) -> tuple[int | None, list[str]]:
    """The number of the right option, from the fields `names`: each may hold its letter, its text or its number.

    Returns:
        it, or None if the row has none of the fields; and the fields that say it.

    Raises:
        ValueError: no option is named, or two fields or two readings of one field name different ones.
    """
    used = [name for name in names if has_value(row.get(name))]
    numbers = [find_option(row[name], name, options, first_label) for name in used]
    if len(set(numbers)) > 1:
        said = " and ".join(f"{name} {row[name]!r}" for name in used)
        raise ValueError(f"the fields {said} name different options")
    if not numbers:
        return None, []
    return numbers[0], used


def find_option(value, name: str, options: dict[str, str], first_label: int) -> int:
    letters = list(options)
    texts = list(options.values())
    meanings = set()
    if isinstance(value, str):
        if value in letters:
            meanings.add(letters.index(value))
        elif value.strip().upper() in letters:
            meanings.add(letters.index(value.strip().upper()))
        if value in texts:
            meanings.add(texts.index(value))
    number = as_whole_number(value)
    is_number = number is not None and first_label <= number < first_label + len(options)
    if is_number and str(value) not in letters:
        meanings.add(number - first_label)
    if len(meanings) == 1:
        return meanings.pop()
    if meanings:
        raise ValueError(f"field {name} is {value!r}, which names one option by its text and another by its number")
    check_first_label(number, name, len(options), first_label)
    raise ValueError(f"field {name} is {value!r}, which names none of the options {', '.join(letters)}")


# -------------------------------------------------------------------------------------------------------------------
# Conversations
# -------------------------------------------------------------------------------------------------------------------


def read_conversation(row: dict, needs_answer: bool) -> tuple[dict, list[str]]:
    """The messages of a conversation, from `messages` or from ShareGPT's `conversations`.

    Returns:
        {"messages": ..., "tools": ..., "learned": ...} and the fields that were used. A message has role and content,
        and what a chat template may read: tool_calls, tool_call_id, name, reasoning_content. An assistant's turn before
        which nothing stands is not learned, for nobody asked.

    Raises:
        ValueError: it does not have the shape of either, or the assistant has no turn.
    """
    used = []
    name = "messages"
    if name not in row:
        name = "conversations"
    if name not in row:
        raise ValueError("field messages (or conversations) is missing")
    used.append(name)
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name} is not a list of messages")
    messages = []
    learned = []
    for system in ("system", "system_prompt"):
        if has_value(row.get(system)):
            messages.append({"role": "system", "content": check_text(row[system], system)})
            learned.append(False)
            used.append(system)
    for number, turn in enumerate(turns, 1):
        place = f"{name}, turn {number}"
        turn = drop_absent(turn)
        message = read_message(turn, place)
        has_weight = message["role"] == "assistant" and read_weight(turn, place)
        says_something = "tool_calls" in message or message["content"].strip()
        if has_weight and not says_something:
            raise ValueError(f"field {place}: the assistant says nothing, so nothing could be learned")
        learned.append(has_weight and len(messages) > 0)
        messages.append(message)
    check_roles([message["role"] for message in messages], len(messages) - len(turns), name, needs_answer)
    tools = read_tools(row.get("tools"))
    if tools:
        used.append("tools")
    return {"messages": messages, "tools": tools, "learned": learned}, used


def check_roles(roles: list[str], num_system_beside: int, name: str, needs_answer: bool) -> None:
    if needs_answer and "assistant" not in roles:
        raise ValueError(f"field {name}: the assistant has no turn, so nothing could be learned")
    if num_system_beside and roles.count("system") > 1:
        raise ValueError(f"field {name} has a system turn, and system stands beside it; leave out one of the two")


def read_message(turn: dict, place: str) -> dict:
    """One message as chat templates take it.

    Two keys are for chat_template.py alone: text_of_call, and reasoning_field, the field that held the reasoning.

    Args:
        turn: a message of the row, without what is null in it.
        place: names it in errors.
    """
    role_name = "role"
    content_name = "content"
    if "from" in turn:
        role_name = "from"
    if "value" in turn or role_name == "from" and "content" not in turn:
        content_name = "value"
    role = check_text(turn.get(role_name), f"{place}: {role_name}")
    message = {"role": ROLES.get(role, role)}
    if message["role"] not in KNOWN_ROLES:
        raise ValueError(f"field {place}: {role_name} is {role!r}, expected user or assistant")
    for name, reason in REFUSED_IN_MESSAGES.items():
        if has_value(turn.get(name)):
            raise ValueError(f"field {place}: {name}: {reason}")
    content = turn.get(content_name)
    if role in ("function_call", "tool_call"):
        # ShareGPT's call is a text. It stays beside the call for templates that cannot write calls.
        message["tool_calls"] = read_calls(content, f"{place}: {content_name}")
        if not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False)
        message["text_of_call"] = content
        content = None
    for name in ("tool_calls", "function_call"):
        if has_value(turn.get(name)):
            message["tool_calls"] = read_calls(turn[name], f"{place}: {name}")
    read_content(content, message, f"{place}: {content_name}")
    read_names_and_reasoning(turn, message, place)
    return message


def read_content(content, message: dict, place: str) -> None:
    """Puts the content into the message: a text, or a list of parts; nothing is said beside a call."""
    if content is None and "tool_calls" in message:
        return
    if isinstance(content, list):
        content, reasoning = join_parts(content, place)
        if reasoning:
            message["reasoning_content"] = reasoning
            message["reasoning_field"] = None
    message["content"] = check_text(content, place)


def read_names_and_reasoning(turn: dict, message: dict, place: str) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        if has_value(turn.get(name)):
            message["reasoning_content"] = check_text(turn[name], f"{place}: {name}")
            message["reasoning_field"] = f"messages.{name}"
    for name in ("name", "tool_call_id"):
        if has_value(turn.get(name)):
            message[name] = check_text(turn[name], f"{place}: {name}")


def join_parts(parts: list, place: str) -> tuple[str, str]:
    """The text and the reasoning of a content that is a list of parts. Raises ValueError for images and the like."""
    texts = []
    reasoning = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
            reasoning.append(check_text(part.get(part["type"], part.get("text")), place))
        elif isinstance(part, dict):
            raise ValueError(f"field {place} has a part of type {part.get('type')!r}: {NOT_TEXT}")
        else:
            raise ValueError(f"field {place} has a part that is not a text")
    return "".join(texts), "".join(reasoning)


def read_weight(turn: dict, place: str) -> bool:
    """Whether an assistant's turn is to be learned: yes, unless weight, loss, loss_weight or train says 0 or false."""
    flags = set()
    for name in WEIGHTS:
        if has_value(turn.get(name)):
            flag = as_flag(turn[name])
            if flag is None:
                raise ValueError(f"field {place}: {name} is {turn[name]!r}; a turn is learned (1, true) or not "
                                 "(0, false), and nothing between")  # fmt: skip
            flags.add(flag)
    if len(flags) > 1:
        raise ValueError(f"field {place}: one of {', '.join(WEIGHTS)} says that it is learned and another that not")
    return False not in flags


def count_fields_of_message(turn: dict, counts: FieldCounts) -> None:
    role = ROLES.get(turn.get("role", turn.get("from")), turn.get("role", turn.get("from")))
    for name, value in turn.items():
        if not has_value(value):
            continue
        if name in USED_IN_MESSAGES:
            counts.used[f"messages.{name}"] += 1
        elif name in WEIGHTS and (role == "assistant" or as_flag(value) is False):
            counts.used[f"messages.{name}"] += 1
        elif name in IGNORED_IN_MESSAGES:
            counts.ignored[f"messages.{name}"] += 1
        else:
            # A weight of a turn that is not the assistant's stands here, too: only the assistant's are learned.
            counts.not_used[f"messages.{name}"] += 1


# -------------------------------------------------------------------------------------------------------------------
# Preferences
# -------------------------------------------------------------------------------------------------------------------

# How HH-RLHF writes a conversation as one text, and what begins one.
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_preference(row: dict, needs_answer: bool) -> tuple[dict, list[str]]:
    """A prompt with a chosen and a rejected answer, or with one answer and a label that says whether it is wanted.

    Returns:
        the prompt as read_prompt returns it, with the following, and the fields that were used:
          tools     as in a conversation
          answers   [chosen, rejected] or [completion], each a list of messages; None if the two answers are whole
                    conversations that have no common beginning, and then `texts` has what they say
          learned   for each answer and each of its messages: is it an assistant's turn that is to be learned?
          is_empty  whether a turn that should be learned says nothing
          label     of a single answer; None for a pair
          prompt_is_repeated  whether the prompt stands in both answers of the row, and not in a field of its own

    Raises:
        ValueError: a field is missing or of a wrong kind.
    """
    names = find_answer_fields(row)
    if needs_answer:
        check_answer_fields(row, names)
    result = {"label": None, "tools": read_tools(row.get("tools")), "prompt_is_repeated": False}
    answers = {}
    learned = {}
    for name in names:
        answers[name], learned[name] = read_answer_of_pair(row[name], name)
    used = list(names)
    if result["tools"]:
        used.append("tools")
    if names == ["completion"] and "label" in row:
        result["label"] = as_flag(row["label"])
        used.append("label")

    num_common = 0
    if are_whole(row):
        num_common = count_common_messages(answers)
        prompt, used_in_prompt = read_common_beginning(row, answers[names[0]][:num_common])
        result["prompt_is_repeated"] = True
    else:
        prompt, used_in_prompt = read_prompt(row)
    result.update(prompt)
    used += used_in_prompt
    if are_whole(row) and num_common == 0:
        result["answers"] = None
        result["texts"] = [join_contents(answers[name]) for name in names]
    else:
        result.update(cut_answers(answers, learned, num_common))
    return result, used


def cut_answers(answers: dict[str, list[dict]], learned: dict[str, list[bool]], num_common: int) -> dict:
    """The answers without the prompt that they begin with, if they do: `answers`, `learned` and `is_empty`."""
    result = {"answers": [], "learned": [], "is_empty": False}
    for name in answers:
        messages = answers[name][num_common:]
        flags = learned[name][num_common:]
        check_answer_of_pair(messages, name)
        if not any(flags) or has_silent_turn(messages, flags):
            result["is_empty"] = True
        result["answers"].append(messages)
        result["learned"].append(flags)
    return result


def find_answer_fields(row: dict) -> list[str]:
    """chosen and rejected, or completion: those that a row has."""
    names = [name for name in ("chosen", "rejected") if name in row]
    if not names and "completion" in row:
        names = ["completion"]
    return names


def check_answer_fields(row: dict, names: list[str]) -> None:
    if not names:
        raise ValueError("fields chosen and rejected (or completion and label) are missing")
    if names == ["completion"]:
        if "label" not in row:
            raise ValueError("field label is missing: it says whether the completion is wanted")
        if as_flag(row["label"]) is None:
            raise ValueError(f"field label is {row['label']!r}, expected true or false")
    elif len(names) == 1:
        missing = {"chosen": "rejected", "rejected": "chosen"}[names[0]]
        raise ValueError(f"field {missing} is missing: a pair has a chosen and a rejected answer")


def read_prompt(row: dict) -> tuple[dict, list[str]]:
    """The prompt in a field of its own: messages, or alpaca's instruction, input, system and history."""
    name = find_prompt_field(row)
    if name is None:
        raise ValueError("field prompt is missing")
    if name == "instruction":
        without_output = {field: value for field, value in row.items() if field not in ("output", "response")}
        return read_instruction(without_output, needs_answer=False)
    messages = read_prompt_messages(row[name], name)
    used = [name, *put_system_first(row, messages)]
    return {"messages": messages}, used


def read_common_beginning(row: dict, messages: list[dict]) -> tuple[dict, list[str]]:
    """The prompt that two conversations begin with; its system message may stand beside them."""
    used = check_prompt_beside(row, messages)
    if messages:
        used += put_system_first(row, messages)
    return {"messages": messages}, used


def holds_messages(value) -> bool:
    """Whether a value is a message, or a list of messages."""
    turns = find_messages(value)
    if not turns:
        return False
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def find_messages(value) -> list:
    """The messages of a field that holds a list of them, or a single one; none of a text."""
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    return []


def is_hh_conversation(value) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def is_whole(value) -> bool:
    """Whether an answer is a conversation from its beginning, and not what follows a prompt."""
    if is_hh_conversation(value):
        return True
    turns = find_messages(value)
    if not turns or not isinstance(turns[0], dict):
        return False
    role = turns[0].get("role", turns[0].get("from"))
    return isinstance(role, str) and ROLES.get(role, role) != "assistant"


def are_whole(row: dict) -> bool:
    """Whether the answers of a pair are conversations with the prompt inside."""
    return is_whole(row.get("chosen")) or is_whole(row.get("rejected"))


def find_prompt_field(row: dict) -> str | None:
    """The field that holds the prompt; None if there is none, as where it is the common beginning of both answers."""
    if has_value(row.get("prompt")):
        return "prompt"
    if are_whole(row):
        return None
    for name in ("conversations", "messages", "instruction"):
        if has_value(row.get(name)):
            return name
    return None


def read_answer_of_pair(value, name: str) -> tuple[list[dict], list[bool]]:
    """The messages of an answer, or of a whole conversation, and which of them are to be learned."""
    if is_hh_conversation(value):
        messages = split_hh_conversation(check_text(value, name))
        return messages, [message["role"] == "assistant" for message in messages]
    if isinstance(value, str) or value == []:
        text = ""
        if value:
            text = check_text(value, name)
        return [{"role": "assistant", "content": text}], [True]
    messages = []
    learned = []
    for number, turn in enumerate(find_turns_of_field(value, name), 1):
        place = f"{name}, turn {number}"
        turn = drop_absent(turn)
        message = read_message(turn, place)
        messages.append(message)
        learned.append(message["role"] == "assistant" and read_weight(turn, place))
    return messages, learned


def find_turns_of_field(value, name: str) -> list[dict]:
    turns = find_messages(value)
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name} is neither a text nor a list of messages")
    return turns


def split_hh_conversation(text: str) -> list[dict]:
    """The messages of a text such as "\\n\\nHuman: Hi\\n\\nAssistant: Hello"."""
    parts = HH_TURN.split("\n\n" + text.lstrip())
    messages = []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        messages.append({"role": HH_ROLES[name], "content": content.strip()})
    return messages


def read_prompt_messages(value, name: str) -> list[dict]:
    """The messages of a prompt: a text is what the user says, or a conversation as HH-RLHF writes it."""
    if isinstance(value, str):
        text = check_text(value, name)
        if is_hh_conversation(text) and text.rstrip().endswith("\n\nAssistant:"):
            return split_hh_conversation(text)[:-1]
        return [{"role": "user", "content": text}]
    messages = []
    for number, turn in enumerate(find_turns_of_field(value, name), 1):
        place = f"{name}, turn {number}"
        turn = drop_absent(turn)
        read_weight(turn, place)
        messages.append(read_message(turn, place))
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"field {name} ends with a turn of the assistant, and both answers would go on with another")
    return messages


def put_system_first(row: dict, messages: list[dict]) -> list[str]:
    """Puts the system message that stands beside a prompt before it. Returns the fields that were used."""
    used = []
    for name in ("system", "system_prompt"):
        if has_value(row.get(name)):
            if used or messages[0]["role"] == "system":
                raise ValueError(f"field {name} stands beside another system message; leave out one of the two")
            messages.insert(0, {"role": "system", "content": check_text(row[name], name)})
            used.append(name)
    return used


def count_common_messages(answers: dict[str, list[dict]]) -> int:
    """How many messages at the beginning of two conversations are their prompt: all up to where the answers part.

    The prompt ends where both go on with a turn of the assistant, so the answers may begin with equal turns.
    """
    if len(answers) < 2:
        return 0
    chosen = answers["chosen"]
    rejected = answers["rejected"]
    num_equal = 0
    for message, other in zip(chosen, rejected, strict=False):
        if message != other:
            break
        num_equal += 1
    for number in range(num_equal, 0, -1):
        if is_turn_of_assistant(chosen, number) and is_turn_of_assistant(rejected, number):
            return number
    return 0


def is_turn_of_assistant(messages: list[dict], number: int) -> bool:
    return number < len(messages) and messages[number]["role"] == "assistant"


def check_prompt_beside(row: dict, messages: list[dict]) -> list[str]:
    """Compares a prompt that stands beside two conversations with their common beginning.

    Returns:
        ["prompt"] if it says the same. A text that does not is not used, because the conversations are complete.

    Raises:
        ValueError: it is a list of messages, and the conversations begin otherwise.
    """
    prompt = row.get("prompt")
    if not has_value(prompt):
        return []
    if isinstance(prompt, str):
        if prompt.strip() in [message.get("content", "").strip() for message in messages]:
            return ["prompt"]
        return []
    beginning = read_prompt_messages(prompt, "prompt")
    if messages and messages[: len(beginning)] != beginning:
        raise ValueError("field prompt has other messages than chosen and rejected begin with")
    return ["prompt"]


def join_contents(messages: list[dict]) -> str:
    return "\n\n".join(message.get("content", "") for message in messages)


def check_answer_of_pair(messages: list[dict], name: str) -> None:
    """Raises ValueError if an answer does not begin with a turn of the assistant."""
    if messages and messages[0]["role"] != "assistant":
        raise ValueError(f"field {name} begins with a turn of the {messages[0]['role']}; an answer begins with the "
                         "assistant's, and a whole conversation stands in both chosen and rejected")  # fmt: skip


def has_silent_turn(messages: list[dict], learned: list[bool]) -> bool:
    """Whether the assistant says nothing in a turn that is to be learned."""
    for message, is_learned in zip(messages, learned, strict=True):
        if is_learned and "tool_calls" not in message and not message["content"].strip():
            return True
    return False


# -------------------------------------------------------------------------------------------------------------------
# Tools and calls
# -------------------------------------------------------------------------------------------------------------------


def read_tools(tools) -> list[dict] | None:
    """The tools that a row offers to the model, as transformers takes them: {"type": "function", "function": ...}.

    Raises:
        ValueError: it is not a list of objects.
    """
    if not has_value(tools):
        return None
    if not isinstance(tools, list):
        raise ValueError("field tools is not a list of tools")
    result = []
    for tool in tools:
        tool = decode_json(tool)
        if not isinstance(tool, dict):
            raise ValueError("field tools is not a list of tools")
        if "name" in tool and "function" not in tool:
            tool = {"type": "function", "function": tool}
        result.append(tool)
    return result


def read_calls(calls, place: str) -> list[dict]:
    """The calls of a turn, each as {"type": "function", "function": {"name": ..., "arguments": ...}}.

    Raises:
        ValueError: it is no call, or no JSON of calls.
    """
    calls = decode_json(calls)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"field {place} is not a call with a name and arguments")
    result = []
    for call in calls:
        call = decode_json(call)
        if isinstance(call, dict) and "name" in call and "function" not in call:
            call = {"function": call, "id": call.get("id")}
        function = None
        if isinstance(call, dict):
            function = decode_json(call.get("function"))
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"field {place} is not a call with a name and arguments")
        # OpenAI writes the arguments as a JSON text. Templates take an object; those that want a text get one later.
        arguments = decode_json(function.get("arguments"))
        if not has_value(arguments):
            arguments = {}
        clean_call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if has_value(call.get("id")):
            clean_call["id"] = call["id"]
        result.append(clean_call)
    return result


# -------------------------------------------------------------------------------------------------------------------
# What a broken row looks like
# -------------------------------------------------------------------------------------------------------------------


def guess_format(row: dict) -> str | None:
    """The format that a row with such fields seems to have."""
    if "chosen" in row or "rejected" in row or {"completion", "label"} <= row.keys():
        return "preference"
    if "messages" in row or "conversations" in row:
        return "chat"
    if "instruction" in row:
        return "alpaca"
    if {"sent1", "opa", "final_decision", "QUESTION"} & row.keys():
        return "mcq"
    if "question" in row and {"options", "choices", "A"} & row.keys():
        return "mcq"
    if "text" in row:
        return "text"
    return None


def describe_broken(content: bytes | dict, row: dict | None, format: str) -> str:
    """What the first row of a file looks like when it is broken, and what to do.

    Args:
        content: the row as it stands in the file.
        row: the same as Python data, if it could be parsed.
    """
    if row is not None:
        return describe_row(row, format)
    if not isinstance(content, bytes):
        return ""
    line = content.strip()
    if line.startswith(b"["):
        return "the line begins with a bracket: if the file is one list, name it .json"
    if line.startswith(b"{") and not line.endswith(b"}"):
        return ("the line ends inside an object: a .jsonl file has a whole object on each line; if the file is a list, "
                "name it .json, else write it anew with `jq -c . FILE`")  # fmt: skip
    if b"," in line and b'"' not in line[:1] and not line.startswith(b"{"):
        return "the line looks like CSV: name the file .csv"
    return "a .jsonl file has one JSON object on each line"


def describe_row(row: dict, format: str) -> str:
    """A hint for a file whose first row is broken: what the row has, and what it looks like.

    A row that looks like its format, or that is refused for what it holds, needs none.
    """
    guess = guess_format(row)
    is_refused = any(has_value(row.get(name)) for name in (*REFUSED, *REFUSED_ANSWERS))
    if guess == format == "preference" and find_prompt_field(row) is None:
        guess = None  # the prompt has another name
    elif guess == format or is_refused:
        return ""
    names = ", ".join(str(name) for name in list(row)[:20])
    hint = f"the row has the fields {names}"
    if guess:
        return f"{hint}; they look like --format {guess}"
    if format == "mcq":
        return (
            f"{hint}; a question has sent1, sent2, ending0, ending1 and so on, and label, or the columns of MedQA, "
            "MedMCQA, C-Eval or PubMedQA; name others, such as --columns question=Q,options=List,answer=Key"
        )
    wanted = {
        "alpaca": ("instruction", "output"),
        "chat": ("messages",),
        "preference": ("prompt", "chosen", "rejected"),
        "text": ("text",),
    }[format]
    if len(row) < len(wanted):
        return f"{hint}; needed are {', '.join(wanted)}, or columns that --columns names"
    example = ",".join(f"{name}={own}" for name, own in zip(wanted, row, strict=False))
    return f"{hint}; if they have other names, say so, such as --columns {example}"
