"""How a row becomes a prompt and its answer. This is the only place in the toolkit where that is decided.

tokenize_dataset.py, test_sample.py and tools/evaluate.py import these functions, because a model has to be asked in
exactly the words that it was trained on. A program that stands elsewhere puts the repository root on sys.path and
writes `from data_sample.rendering import ...`.

Three words that all functions use:

- A *row* is one object of the raw data, for example {"instruction": ..., "input": ..., "output": ...}.
- A *template* is a dictionary of plain data that says how rows are rendered. make_template makes it,
  tokenize_dataset.py writes it into ledger.json, and training copies it into run.json. Its keys:
    format              mcq, alpaca, chat or text
    chat                True if the tokenizer's chat template is used, False if the plain texts below are used
    prompt              the text around the question or instruction, with {question} or {instruction}  (mcq, alpaca)
    prompt_with_input   the same for rows that have an input, with {instruction} and {input}           (alpaca)
    answer, option      text or letter, and how one option is written, with {letter} and {text}        (mcq)
- *Messages* are a conversation as transformers' chat templates take it: [{"role": "user", "content": "..."}, ...].
"""

import hashlib
import json
import re
from pathlib import Path

LETTERS = "ABCDE"

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
# ShareGPT's names of the roles. Other names stay as they are.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


# -------------------------------------------------------------------------------------------------------------------
# The template
# -------------------------------------------------------------------------------------------------------------------


def make_template(format: str, chat: bool, answer: str = "text", prompt_file: str | None = None) -> dict:
    """Makes the template of a set.

    Args:
        format: mcq, alpaca, chat or text.
        chat: whether the tokenizer has a chat template.
        answer: mcq only: text or letter.
        prompt_file: mcq only: a text file with {question} in it, used instead of the default prompt.
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
    elif format == "alpaca":
        if chat:
            template["prompt"] = "{instruction}"
            template["prompt_with_input"] = "{instruction}\n\n{input}"
        else:
            template["prompt"] = PLAIN_ALPACA
            template["prompt_with_input"] = PLAIN_ALPACA_WITH_INPUT
    return template


# -------------------------------------------------------------------------------------------------------------------
# From a row to messages
# -------------------------------------------------------------------------------------------------------------------


def read_options(row: dict) -> list[str]:
    """The options of a multiple-choice row in the order in which the question shows them."""
    options = []
    for number in range(len(LETTERS)):
        if row.get(f"ending{number}"):
            options.append(row[f"ending{number}"])
    return options


def render_prompt(row: dict, template: dict) -> str:
    """The prompt of a multiple-choice or Alpaca row, without its answer.

    Raises:
        KeyError: the row lacks a field.
    """
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
    """The messages before the answer of a multiple-choice or Alpaca row.

    Alpaca's `system` and `history` come first. They carry no loss.
    """
    messages = []
    if template["format"] == "alpaca":
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
        for instruction, output in row.get("history") or []:
            prompt = render_prompt({"instruction": instruction}, template)
            messages.append({"role": "user", "content": prompt})
            messages.append({"role": "assistant", "content": output})
    messages.append({"role": "user", "content": render_prompt(row, template)})
    return messages


def read_turns(row: dict) -> list[dict]:
    """The messages of a conversation, from `messages` or from ShareGPT's `conversations`."""
    messages = []
    if "messages" in row:
        for turn in row["messages"]:
            messages.append({"role": ROLES.get(turn["role"], turn["role"]), "content": turn["content"]})
        return messages
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for turn in row["conversations"]:
        messages.append({"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]})
    return messages


def read_tools(row: dict) -> list | None:
    """The tools that a conversation's row offers to the model; None if it offers none."""
    return None


# -------------------------------------------------------------------------------------------------------------------
# For programs that ask a model
# -------------------------------------------------------------------------------------------------------------------


def messages_before_answer(row: dict, template: dict) -> list[dict]:
    """What a model has to answer: the messages of a row up to, and without, its answer.

    A row may also be {"prompt": ..., "system": ...}, in any format. The answer of a conversation is its last message,
    if that is the assistant's. The document of a row of text is one message, which prompt_text writes as it is.

    Raises:
        KeyError, TypeError: the row does not have the shape of the template's format.
    """
    if "prompt" in row:
        messages = []
        if row.get("system"):
            messages.append({"role": "system", "content": row["system"]})
        messages.append(user_message(row["prompt"], template))
        return messages
    if template["format"] == "text":
        return [{"role": "user", "content": row["text"]}]
    if template["format"] != "chat":
        return render_messages(row, template)
    messages = read_turns(row)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def user_message(text: str, template: dict) -> dict:
    """What a user types, put where the question or the instruction of the training data stood."""
    if template["format"] in ("mcq", "alpaca"):
        text = template["prompt"].format(question=text, instruction=text)
    return {"role": "user", "content": text}


def expected_answer(row: dict, template: dict) -> str | None:
    """The right answer of a row; None if the row has none."""
    if template["format"] == "mcq" and "label" in row:
        if template.get("answer") == "letter":
            return LETTERS[row["label"]]
        return row.get(f"ending{row['label']}")
    if row.get("messages") or row.get("conversations"):
        last = read_turns(row)[-1]
        if last["role"] == "assistant":
            return last["content"]
    return row.get("output")


def prompt_text(tokenizer, messages: list[dict], template: dict, tools: list | None = None) -> str:
    """The text before the answer, as training saw it. A document is its own text."""
    if template["format"] != "text" and template["chat"]:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
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


def render_plain(tokenizer, messages: list[dict]) -> list[tuple[str, bool]]:
    """A conversation for a tokenizer without a chat template, as render_chat; only its last message is a target."""
    prompt = "".join(plain_texts(tokenizer, messages[:-1]))
    answer = messages[-1]["content"] + tokenizer.eos_token
    return [(prompt, False), (answer, True)]


def render_chat(tokenizer, conversations: list[list[dict]], every_turn: bool) -> list[list[tuple[str, bool]]]:
    """Each conversation by the chat template: texts that follow one another, and whether each of them is a target.

    Targets are the assistant's turns, each with the EOS that the template writes behind it. The last target always
    ends with EOS.

    Args:
        conversations: the messages of each conversation.
        every_turn: whether all of the assistant's turns are targets, or only the last one.

    Raises:
        ValueError: the chat template does not render a conversation as its prompt followed by the answer.
    """
    turns_of = []
    until = []
    through = []
    for messages in conversations:
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not every_turn:
            turns = turns[-1:]
        turns_of.append(turns)
        until += [messages[:turn] for turn in turns]
        through += [messages[: turn + 1] for turn in turns]
    # Two calls for all turns of all conversations, because each call costs more than a turn.
    prompts = iter(tokenizer.apply_chat_template(until, tokenize=False, add_generation_prompt=True))
    answered = iter(tokenizer.apply_chat_template(through, tokenize=False))
    rendered = []
    for messages, turns in zip(conversations, turns_of, strict=True):
        borders = [(next(prompts), next(answered)) for _ in turns]
        text = borders[-1][1]
        if turns[-1] + 1 < len(messages):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        rendered.append(cut_at_borders(tokenizer, text, borders))
    return rendered


def cut_at_borders(tokenizer, text: str, borders: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Cuts the text of a conversation into prompts and targets.

    Args:
        borders: for each learned turn the text before it, and the text up to its end.
    """
    pieces = []
    done = 0
    for prompt, answered in borders:
        # Templates write a line end behind the last EOS, which nobody ever has to predict.
        end = len(prompt) + len(answered[len(prompt) :].rstrip())
        answered = answered[:end]
        is_extension = text.startswith(answered) and answered.startswith(prompt) and done <= len(prompt)
        if not is_extension:
            raise ValueError("the tokenizer's chat template does not put the answer behind its generation prompt")
        pieces.append((text[done : len(prompt)], False))
        pieces.append((text[len(prompt) : end], True))
        done = end
    last_answer = pieces[-1][0].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    pieces[-1] = (last_answer, True)
    rest = text[done:]
    if rest.strip():
        pieces.append((rest, False))
    return pieces


def apply_template(tokenizer, prompt: str, answer: str, chat: bool) -> tuple[str, str]:
    """(prompt, completion) as the texts to be tokenized. The completion ends with the EOS token's text."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if chat:
        pieces = render_chat(tokenizer, [messages], every_turn=False)[0]
    else:
        pieces = render_plain(tokenizer, messages)
    return pieces[0][0], pieces[1][0]


# -------------------------------------------------------------------------------------------------------------------
# The tokenizer itself
# -------------------------------------------------------------------------------------------------------------------


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
