"""temporary"""

from data_sample.rendering import ROLES


def check_text(text, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"field {name} is not a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name} holds half a character (a lone surrogate), which has no UTF-8") from None


def check_row(row: dict, format: str) -> None:
    """Raises ValueError naming the field of a row that does not have its format's shape."""
    num_options = 5 if row.get("ending4") else 4
    options = [f"ending{i}" for i in range(num_options)]
    required = {"mcq": ["sent1", "sent2", *options], "alpaca": ["instruction", "output"], "text": ["text"], "chat": []}
    for name in required[format] + [name for name in ("input", "system") if name in row and format == "alpaca"]:
        if name not in row:
            raise ValueError(f"field {name} is missing")
        check_text(row[name], name)
        if name in options and not row[name].strip():
            raise ValueError(f"field {name} is empty, so letters and label would not fit the options")
    if format == "mcq" and not (type(row.get("label")) is int and 0 <= row["label"] < num_options):
        raise ValueError(f"field label is {row.get('label')!r}, expected a number from 0 to {num_options - 1}")
    if format == "alpaca":
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise ValueError("field history is not a list of pairs [instruction, output]")
        for text in (text for pair in history for text in pair):
            check_text(text, "history")


def read_messages(row: dict) -> list[dict]:
    """The messages of a conversation, from `messages` or ShareGPT's `conversations`.

    Raises:
        ValueError: it does not have the shape of either, or nothing could be learned from an assistant's turn.
    """
    name, role, content = ("messages", "role", "content") if "messages" in row else ("conversations", "from", "value")
    if name not in row:
        raise ValueError("field messages (or conversations) is missing")
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name} is not a list of messages")
    messages = []
    if row.get("system") and name == "conversations":
        check_text(row["system"], "system")
        messages.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(turns, 1):
        check_text(turn.get(role), f"{name}, turn {number}: {role}")
        check_text(turn.get(content), f"{name}, turn {number}: {content}")
        messages.append({"role": ROLES.get(turn[role], turn[role]), "content": turn[content]})
        if messages[-1]["role"] not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"field {name}, turn {number}: {role} is {turn[role]!r}, expected user or assistant")
        if messages[-1]["role"] == "assistant" and not turn[content].strip():
            raise ValueError(f"field {name}, turn {number}: the assistant says nothing, so nothing could be learned")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"field {name}: the assistant has no turn, so nothing could be learned")
    return messages
