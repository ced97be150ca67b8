"""How a row becomes a prompt and its answer. This is the only place in the toolkit where that is decided.

tokenize_dataset.py, test_sample.py and tools/evaluate.py import these functions, because a model has to be asked in
exactly the words that it was trained on. A program that stands elsewhere puts the repository root on sys.path and
writes `from data_sample.rendering import ...`.

Three words that all functions use:

- A *row* is one object of the raw data, for example {"instruction": ..., "input": ..., "output": ...}.
- A *template* is a dictionary of plain data that says how rows are rendered. make_template makes it,
  tokenize_dataset.py writes it into ledger.json, and training copies it into run.json. Its keys:
    format              mcq, alpaca, chat, preference or text
    chat                True if the tokenizer's chat template is used, False if the plain texts below are used
    prompt              the text around the question or instruction, with {question} or {instruction}
                        (mcq, alpaca; preference: the text around what the user says)
    prompt_with_input   the same for rows that have an input, with {instruction} and {input}  (alpaca, preference)
    answer, option      text or letter, and how one option is written, with {letter} and {text}        (mcq)
    columns             the names that --columns gives to other columns, if it does
    first_label         the label of the first option, if it is not 0                                  (mcq)
    date                the day that the chat template writes, if it writes one
- *Messages* are a conversation as transformers' chat templates take it: [{"role": "user", "content": "..."}, ...].

fields.py says which fields a row may have; chat_template.py renders with a tokenizer's chat template.
"""

import hashlib
import json
import re
from pathlib import Path

from data_sample.chat_template import Conversation, chat_template_of
from data_sample.fields import LETTERS, FieldCounts, clean_row, read_row

PLAIN_MCQ = "{question}\n\n### Answer:\n"
PLAIN_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PLAIN_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


# -------------------------------------------------------------------------------------------------------------------
# The template
# -------------------------------------------------------------------------------------------------------------------


def make_template(
    format: str,
    chat: bool,
    answer: str = "text",
    prompt_file: str | None = None,
    columns: dict[str, str] | None = None,
    first_label: int = 0,
    date: str | None = None,
) -> dict:
    """Makes the template of a set.

    Args:
        format: mcq, alpaca, chat, preference or text.
        chat: whether the tokenizer has a chat template.
        answer: mcq only: text or letter.
        prompt_file: mcq only: a text file with {question} in it, used instead of the default prompt.
        columns: the column of the file for a field, where it has another name.
        first_label: mcq only: the label of the first option.
        date: YYYY-MM-DD, if the chat template writes a date.
    """
    template = {"format": format, "chat": chat}
    if format == "mcq":
        template["answer"] = answer
        if answer == "letter":
            template["option"] = "{letter}. {text}"
        else:
            template["option"] = "- {text}"
        if prompt_file:
            template["prompt"] = Path(prompt_file).read_text(encoding="utf-8-sig")
        elif chat:
            template["prompt"] = "{question}"
        else:
            template["prompt"] = PLAIN_MCQ
    elif format in ("alpaca", "preference"):
        if chat:
            template["prompt"] = "{instruction}"
            template["prompt_with_input"] = "{instruction}\n\n{input}"
        else:
            template["prompt"] = PLAIN_ALPACA
            template["prompt_with_input"] = PLAIN_ALPACA_WITH_INPUT
    if columns:
        template["columns"] = columns
    if first_label:
        template["first_label"] = first_label
    if date:
        template["date"] = date
    return template


# -------------------------------------------------------------------------------------------------------------------
# From a row to messages
# -------------------------------------------------------------------------------------------------------------------


def read_options(row: dict) -> list[str]:
    """The options of a multiple-choice row, as read_row returns it, in the order in which the question shows them."""
    options = []
    for number in range(len(LETTERS)):
        if row.get(f"ending{number}"):
            options.append(row[f"ending{number}"])
    return options


def render_prompt(row: dict, template: dict) -> str:
    """The prompt of a multiple-choice or Alpaca row, as read_row returns it, without its answer."""
    if template["format"] == "mcq":
        lines = [row["sent1"], row["sent2"]]
        for letter, text in zip(LETTERS, read_options(row), strict=False):
            lines.append(template["option"].format(letter=letter, text=text))
        question = "\n".join(line for line in lines if line)
        return template["prompt"].format(question=question)
    if row.get("input"):
        return template["prompt_with_input"].format(instruction=row["instruction"], input=row["input"])
    return template["prompt"].format(instruction=row["instruction"])


def render_answers(row: dict, template: dict) -> list[str]:
    """The texts that could be the answer, the right one first: an option's text or letter, or the output."""
    if template["format"] == "alpaca":
        return [row["output"]]
    answers = read_options(row)
    if template["answer"] == "letter":
        answers = list(LETTERS[: len(answers)])
    right = answers.pop(row["label"])
    return [right, *answers]


def render_messages(row: dict, template: dict) -> list[dict]:
    """The messages before the answer of a multiple-choice or Alpaca row, or before the answers of a preference row.

    Alpaca's `system` and `history` come first. They carry no loss.
    """
    if "messages" in row:
        return wrap_user_turns(row["messages"], template)
    messages = []
    if template["format"] in ("alpaca", "preference"):
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
        for instruction, output in row.get("history") or []:
            prompt = render_prompt({"instruction": instruction}, template)
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": output})
    messages.append({"role": "user", "content": render_prompt(row, template)})
    return messages


def wrap_user_turns(messages: list[dict], template: dict) -> list[dict]:
    """The messages with the template's text around what the user says; a chat template needs none."""
    wrapped = []
    for message in messages:
        if message["role"] == "user":
            message = {**message, "content": render_prompt({"instruction": message["content"]}, template)}
        wrapped.append(message)
    return wrapped


def read_raw_row(row: dict, template: dict) -> dict:
    """A raw row in the one form of its format. It may lack an answer.

    Raises:
        ValueError: naming the field that is missing or of a wrong kind.
    """
    return read_row(clean_row(row, template), template, FieldCounts(), needs_answer=False)


def read_tools(row: dict, template: dict) -> list | None:
    """The tools that a raw row offers to the model; None if it offers none."""
    if template["format"] == "preference":
        return read_raw_row(row, template)["tools"]
    if template["format"] != "chat" or "prompt" in row:
        return None
    return read_raw_row(row, template)["tools"]


def without_eos(messages: list[dict], eos: str) -> list[dict]:
    """The messages without EOS at the end of the assistant's: rendering writes it there, and it is no part of a text.

    Many data sets have it, because programs before this one did not write it.
    """
    cleaned = []
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" and content and content.endswith(eos):
            while content.endswith(eos):
                content = content.removesuffix(eos)
            message = {**message, "content": content}
        cleaned.append(message)
    return cleaned


# -------------------------------------------------------------------------------------------------------------------
# For programs that ask a model
# -------------------------------------------------------------------------------------------------------------------


def messages_before_answer(row: dict, template: dict) -> list[dict]:
    """What a model has to answer: the messages of a raw row up to, and without, its answer.

    A row may also be {"prompt": ..., "system": ...}, in any format. The answer of a conversation is its last message,
    if that is the assistant's; a preference row says itself where the answers begin. The document of a row of text is
    one message, which prompt_text writes as it is.

    Raises:
        ValueError: the row does not have the shape of the template's format.
    """
    if "prompt" in row and template["format"] != "preference":
        messages = []
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
        messages.append(user_message(row["prompt"], template))
        return messages
    row = read_raw_row(row, template)
    if template["format"] == "preference" and row.get("messages") == []:
        raise ValueError("chosen and rejected have no common beginning, so the row has no prompt")
    if template["format"] == "text":
        return [{"role": "user", "content": row["text"]}]
    if template["format"] != "chat":
        return render_messages(row, template)
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def user_message(text: str, template: dict) -> dict:
    """What a user types, put where the question or the instruction of the training data stood."""
    if template["format"] in ("mcq", "alpaca", "preference"):
        text = template["prompt"].format(question=text, instruction=text)
    return {"role": "user", "content": text}


def expected_answer(row: dict, template: dict) -> str | None:
    """The right answer of a raw row; None if the row has none. Of a pair it is the chosen one."""
    if template["format"] == "preference":
        return wanted_answer(read_raw_row(row, template))
    if "prompt" in row:
        return row.get("output")
    row = read_raw_row(row, template)
    if template["format"] == "mcq" and "label" in row:
        return render_answers(row, template)[0]
    if template["format"] == "chat":
        last = row["messages"][-1]
        if last["role"] == "assistant":
            return last.get("content", last.get("text_of_call"))
    return row.get("output")


def wanted_answer(row: dict) -> str | None:
    """The last message of the chosen answer of a preference row, or of a single one that is wanted."""
    if not row["answers"] or row["label"] is False:
        return None
    last = row["answers"][0][-1]
    return last.get("content", last.get("text_of_call"))


def prompt_text(tokenizer, messages: list[dict], template: dict, tools: list | None = None) -> str:
    """The text before the answer, as training saw it. A document is its own text."""
    messages = without_eos(messages, tokenizer.eos_token)
    if template["format"] != "text" and template["chat"]:
        return chat_template_of(tokenizer, template.get("date")).prompt(messages, tools)
    return "".join(plain_texts(tokenizer, messages))


def encode_prompt(tokenizer, messages: list[dict], template: dict, tools: list | None = None) -> list[int]:
    """The ids before the answer, as training saw them: BOS stands once where the tokenizer adds one."""
    text = prompt_text(tokenizer, messages, template, tools)
    # A document has no template, so what spells a special token in it, as <s> in HTML does, is text.
    is_document = template["format"] == "text"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=is_document).input_ids
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:  # a chat template may have written it
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def adds_bos(tokenizer) -> bool:
    """Whether `tokenizer` begins a text with BOS. LLaMA's tokenizers do, SmolLM2's does not."""
    if tokenizer.bos_token_id is None:
        return False
    first_id = tokenizer("a").input_ids[0]
    return first_id == tokenizer.bos_token_id or bool(getattr(tokenizer, "add_bos_token", False))


def find_places(texts: list[str], prompt: str, template: dict) -> list[int]:
    """The place of each option in the question: 0 for the first one, which is A.

    A tokenized set lists the right option first. Letters tell their place themselves. A text's place is found again in
    the prompt, where each option is a line; the last such line counts, because other questions may stand before.

    Args:
        texts: the options of one question, in any order.
        prompt: the text before the answer.
    """
    if template.get("answer") == "letter":
        return [LETTERS.index(text) for text in texts]
    starts = []
    for text in texts:
        line = re.escape(template.get("option", "{text}").format(text=text, letter=""))
        found = [match.start() for match in re.finditer(f"^{line}\\s*$", prompt, re.MULTILINE)]
        starts.append(found[-1] if found else -1)
    in_order = sorted(starts)
    return [in_order.index(start) for start in starts]


# -------------------------------------------------------------------------------------------------------------------
# From messages to texts
# -------------------------------------------------------------------------------------------------------------------


def plain_texts(tokenizer, messages: list[dict]) -> list[str]:
    """What each message becomes where the tokenizer has no chat template."""
    ends = {"system": "\n\n", "user": "", "assistant": f"{tokenizer.eos_token}\n\n"}
    return [message["content"] + ends[message["role"]] for message in messages]


def render_plain(tokenizer, messages: list[dict], learned: list[bool] | None = None) -> list[tuple[str, bool]]:
    """A conversation for a tokenizer without a chat template: texts, and which of them are targets.

    Args:
        learned: which messages are targets; without it only the last one.
    """
    if learned is None:
        learned = [False] * (len(messages) - 1) + [True]
    pieces = []
    before = ""
    texts = plain_texts(tokenizer, messages)
    for message, text, is_learned in zip(messages, texts, learned, strict=True):
        if is_learned:
            target = message["content"] + tokenizer.eos_token
            pieces.append((before, False))
            pieces.append((target, True))
            before = text.removeprefix(target)
        else:
            before += text
    if before.strip():
        pieces.append((before, False))
    return pieces


def apply_template(tokenizer, prompt: str, answer: str, chat: bool) -> tuple[str, str]:
    """(prompt, completion) as the texts to be tokenized. The completion ends with the EOS token's text."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if chat:
        (rendered,) = chat_template_of(tokenizer).render([Conversation(messages, [False, True])])
        pieces = rendered.rows[0]
    else:
        pieces = render_plain(tokenizer, messages)
    return pieces[0][0], pieces[1][0]


# -------------------------------------------------------------------------------------------------------------------
# The tokenizer itself
# -------------------------------------------------------------------------------------------------------------------


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


# Words, numbers, spaces, line ends and scripts that tokenizers treat differently.
PROBE_TEXTS = ["Hello world", " two  spaces", "\n\nline\tend ", "2024 don't", "naïve café", "你好，世界 👩‍⚕️", "شكرا"]
PROBE_CONVERSATION = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "And now?"},
]
# Stands in for transformers' function, so that the text of a chat template does not depend on the day.
# data_collator.py compares with the same one.
NO_DATE = "{% macro strftime_now(format) %}{{ format }}{% endmacro %}\n"


def fingerprint_tokenizer(tokenizer) -> dict:
    """How a tokenizer behaves. It is kept in ledger.json, and find_difference in data_collator.py compares it.

    texts                  [text, its ids] for some texts, with BOS where the tokenizer adds it, and with the special
                           tokens that it writes inside a text
    chat_template_sha256   of the chat template's text; None if there is none
    messages, rendered     a conversation, and the prompt that the chat template makes of it; None if it cannot

    A tokenizer with the same vocabulary can behave otherwise: a folder with Meta's tokenizer.model alone gives neither
    BOS nor the space before the first word.
    """
    texts = list(PROBE_TEXTS)
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        if token and f"a{token}b" not in texts:
            texts.append(f"a{token}b")
    fingerprint = {
        "texts": [[text, tokenizer(text).input_ids] for text in texts],
        "chat_template_sha256": None,
        "messages": PROBE_CONVERSATION,
        "rendered": None,
    }
    if tokenizer.chat_template is not None:
        template = tokenizer.get_chat_template()
        fingerprint["chat_template_sha256"] = hashlib.sha256(template.encode()).hexdigest()
        try:
            fingerprint["rendered"] = tokenizer.apply_chat_template(
                PROBE_CONVERSATION, chat_template=NO_DATE + template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template may refuse a conversation in its own ways
            pass
    return fingerprint
