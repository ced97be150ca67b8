"""Renders conversations with a tokenizer's chat template, so that what is trained is what is served.

For each assistant's turn that is learned, the text before it is what `apply_chat_template(messages before it,
add_generation_prompt=True)` gives, and the target is what the template writes for that turn. A conversation stays one
row where the whole of it is an extension of each such prompt with its target. Many templates rewrite what was said
before: Qwen3 drops the reasoning of earlier turns, Phi-3 ends only the last turn, Mistral moves the system prompt, and
DeepSeek-R1 ends the prompt inside <think>. Then each learned turn becomes a row of its own.

What a template can do is never read off its source: it is asked, by rendering a few short conversations.
"""

import datetime
import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache

# Words that stand in no template. They are used to see what becomes of a message.
PROBE = "Xq7probe"
ANSWER_PROBE = "§Xq7answer§"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "xq7tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"xq7key": {"type": "string", "description": "A text."}}},
    },
}


@dataclass
class Conversation:
    """Messages as transformers' chat templates take them, and which of them are learned."""

    messages: list[dict]
    learned: list[bool]
    tools: list[dict] | None = None
    other_answers: list[str] = field(default_factory=list)  # wrong answers in place of the last message


# A row as texts that follow one another, each with whether it is a target.
Pieces = list[tuple[str, bool]]


@dataclass
class Rendered:
    """What a conversation became."""

    rows: list[Pieces]
    other_targets: list[str] = field(default_factory=list)  # what each wrong answer would be as a target
    not_used: list[str] = field(default_factory=list)  # fields that the template does not write, named as in the ledger
    num_in_open_think: int = 0  # turns without reasoning behind a prompt that ends inside <think>


@dataclass(frozen=True)
class CallStyle:
    """How a turn with calls has to look.

    Some templates join the arguments to a text, so they must be one, and some read the content of each turn. A content
    that is null is the same as none: transformers takes it away.
    """

    arguments_are_text: bool
    with_content: bool  # an empty one, if the turn says nothing beside its calls


@dataclass
class Turn:
    """An assistant's turn that is learned."""

    before: list[dict]
    message: dict
    prompt: str = ""
    answered: str = ""  # the conversation up to the end of this turn
    target: str = ""
    lost_reasoning: bool = False  # the message has reasoning, and the target has not


@lru_cache(maxsize=8)
def cached_chat_template(tokenizer, text: str, date: str | None) -> "ChatTemplate":
    return ChatTemplate(tokenizer, date)


def chat_template_of(tokenizer, date: str | None = None) -> "ChatTemplate":
    """The tokenizer's chat template, probed once as long as it stays the same."""
    return cached_chat_template(tokenizer, str(tokenizer.chat_template), date)


class ChatTemplate:
    """A tokenizer's chat template, and what it does with the parts of a conversation.

    Args:
        tokenizer: one with a chat template.
        date: YYYY-MM-DD; the day that the template is to write, if it writes one. Without it: today.

    Raises:
        ValueError: the template has a mistake, or cannot render a question with an answer.
    """

    def __init__(self, tokenizer, date: str | None = None):
        self.tokenizer = tokenizer
        self.date = date
        special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special_tokens.update(tokenizer.all_special_tokens)
        self.special_tokens = tuple(special_tokens)
        self.end_of_turn, self.end = self.probe_end()
        self.unwritten_roles = self.probe_roles()
        developer = [{"role": "developer", "content": PROBE}, {"role": "user", "content": "a"}]
        self.writes_developer = self.probe(developer, PROBE) is True
        self.writes_tools = self.probe([{"role": "user", "content": "a"}], "xq7tool", [PROBE_TOOL]) is not False
        self.call_style = self.probe_calls()
        self.writes_text_beside_calls = self.probe_text_beside_calls()
        self.needs_short_ids = self.probe_ids()
        reasoning = {"role": "assistant", "content": "b", "reasoning_content": PROBE, "reasoning": PROBE}
        self.writes_reasoning = self.probe([{"role": "user", "content": "a"}, reasoning], PROBE) is True
        inner = {"role": "assistant", "content": f"<think>\n{PROBE}\n</think>\n\nb"}
        self.keeps_inner_reasoning = self.probe([{"role": "user", "content": "a"}, inner], PROBE) is True
        named = {"role": "user", "content": "a", "name": PROBE}
        self.writes_names = self.probe([named], PROBE) is True

    # --- asking the template ---

    def apply(self, batch: list[list[dict]], tools: list | None, add_generation_prompt: bool) -> list[str]:
        """The text of each conversation of a batch. Raises what the template raises."""
        text = self.tokenizer.get_chat_template(tools=tools)
        if self.date and "strftime_now" in text:
            text = date_macro(self.date) + text
        return self.tokenizer.apply_chat_template(
            batch, tools=tools, chat_template=text, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def probe(self, messages: list[dict], word: str, tools: list | None = None) -> bool | None:
        """Whether the template writes `word`, which stands in the messages; None if it cannot render them."""
        prompt = messages[-1]["role"] != "assistant"
        try:
            (text,) = self.apply([messages], tools, prompt)
        except Exception:  # whatever it is, a row with such messages will meet it again and be named
            return None
        return word in text

    def probe_end(self) -> tuple[str, str]:
        """What ends a turn, such as </s>, and the white space behind it, which nobody ever has to predict."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER_PROBE}]
        try:
            self.apply([messages[:1]], None, True)
            (text,) = self.apply([messages], None, False)
        except Exception as problem:  # of jinja2, or of Python in the template's expressions
            raise ValueError(
                f"its chat template cannot render a question with an answer ({type(problem).__name__}: {problem}); "
                "mend chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from None
        if ANSWER_PROBE not in text:
            raise ValueError("its chat template does not write the assistant's answer; mend chat_template.jinja, or "
                             "chat_template in tokenizer_config.json")  # fmt: skip
        end = text.partition(ANSWER_PROBE)[2]
        words = end.split() or [""]
        return words[0], end[len(end.rstrip()) :]

    def probe_roles(self) -> list[str]:
        """The roles whose messages the template leaves out without a word."""
        question = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "b"}
        call = {"role": "assistant", "content": "b", "tool_calls": [make_call({"xq7key": "c"})]}
        unwritten = []
        if self.probe([{"role": "system", "content": PROBE}, question], PROBE) is False:
            unwritten.append("system")
        result = {"role": "tool", "content": PROBE, "name": "xq7tool", "tool_call_id": "abcdefghi"}
        found = [self.probe([question, turn, result], PROBE) for turn in (call, answer)]
        if False in found and True not in found:
            unwritten.append("tool")
        return unwritten

    def probe_calls(self) -> CallStyle | None:
        """How a turn with a call has to look for the template to write it; None if it writes none.

        transformers' own form comes first. A style should also do where the result of the call follows.
        """
        question = {"role": "user", "content": "a"}
        result = {"role": "tool", "content": "b", "name": "xq7tool", "tool_call_id": "abcdefghi"}
        styles = []
        for arguments_are_text in (False, True):
            for with_content in (False, True):
                styles.append(CallStyle(arguments_are_text, with_content))
        works_alone = []
        for style in styles:
            message = {"role": "assistant", "tool_calls": [make_call({"xq7key": PROBE})]}
            shape_calls(message, style)
            if self.writes_call([question, message]):
                works_alone.append(style)
                if self.writes_call([question, message, result]):
                    return style
        if works_alone:
            return works_alone[0]
        return None

    def writes_call(self, messages: list[dict]) -> bool:
        try:
            (text,) = self.apply([messages], None, False)
        except Exception:
            return False
        # An object that was written as Python writes it is no JSON. Keywords, as in f(key='text'), are a style.
        is_python = "'xq7key'" in text
        return "xq7tool" in text and PROBE in text and not is_python

    def probe_text_beside_calls(self) -> bool:
        """Whether both a call and the text beside it are written."""
        if self.call_style is None:
            return True
        message = {"role": "assistant", "content": "Xq7beside", "tool_calls": [make_call({"xq7key": PROBE})]}
        shape_calls(message, self.call_style)
        messages = [{"role": "user", "content": "a"}, message]
        return self.writes_call(messages) and self.probe(messages, "Xq7beside") is True

    def probe_ids(self) -> bool:
        """Whether calls need an id of nine characters, as Mistral's do."""
        if self.call_style is None:
            return False
        message = {"role": "assistant", "tool_calls": [make_call({"xq7key": "c"})]}
        message["tool_calls"][0]["id"] = "call_0123456789"
        shape_calls(message, self.call_style)
        return self.probe([{"role": "user", "content": "a"}, message], "xq7tool") is None

    # --- messages as the template wants them ---

    def prepare(self, messages: list[dict]) -> list[dict]:
        """The messages as this template reads them.

        Raises:
            ValueError: the template would leave out a message or a call.
        """
        prepared = []
        for message in messages:
            message = dict(message)
            if message["role"] == "developer" and not self.writes_developer:
                message["role"] = "system"  # its name before OpenAI changed it
            if message["role"] in self.unwritten_roles:
                raise ValueError(f"the tokenizer's chat template does not write messages of the role {message['role']}")
            text_of_call = message.pop("text_of_call", None)
            message.pop("reasoning_field", None)
            if "tool_calls" in message and self.call_style is None:
                if text_of_call is None:
                    raise ValueError("the tokenizer's chat template does not write tool_calls, so the call would be "
                                     "lost; take a model whose template knows tools")  # fmt: skip
                del message["tool_calls"]
                message["content"] = text_of_call
            elif "tool_calls" in message:
                if not self.writes_text_beside_calls:
                    message.pop("content", None)  # some templates would write it instead of the call
                shape_calls(message, self.call_style)
            if "reasoning_content" in message:
                message["reasoning"] = message["reasoning_content"]  # the other name that templates read
            prepared.append(message)
        if self.needs_short_ids:
            number_calls(prepared)
        return prepared

    def find_not_used(self, conversation: Conversation) -> list[str]:
        """The fields of a conversation that the template leaves out without a word; reasoning is looked at later."""
        not_used = []
        if conversation.tools and not self.writes_tools:
            not_used.append("tools")
        for message in conversation.messages:
            if "tool_calls" in message and message.get("content") and not self.writes_text_beside_calls:
                not_used.append("messages.content")
            if "name" in message and message["role"] != "tool" and not self.writes_names:
                not_used.append("messages.name")
        return not_used

    # --- rendering ---

    def prompt(self, messages: list[dict], tools: list | None) -> str:
        """What a model is given to answer."""
        (text,) = self.apply([self.prepare(messages)], tools, True)
        return text

    def render(self, conversations: list[Conversation]) -> list[Rendered]:
        """The rows of each conversation.

        Raises:
            ValueError: a message cannot be written, or a target cannot be told from the prompt.
            jinja2.TemplateError and others: the template refuses a conversation.
        """
        prepared = [self.prepare(conversation.messages) for conversation in conversations]
        turns_of = []
        for conversation, messages in zip(conversations, prepared, strict=True):
            turns = []
            for number, is_learned in enumerate(conversation.learned):
                if is_learned:
                    turns.append(Turn(messages[:number], messages[number]))
            for answer in conversation.other_answers:
                turns.append(Turn(messages[:-1], {"role": "assistant", "content": answer}))
            turns_of.append(turns)
        self.fill(conversations, turns_of)
        rendered = []
        for conversation, messages, turns in zip(conversations, prepared, turns_of, strict=True):
            rendered.append(self.make_rows(conversation, messages, turns))
        return rendered

    def fill(self, conversations: list[Conversation], turns_of: list[list[Turn]]) -> None:
        """Gives all turns their texts, with two calls for all conversations without tools and two for each other."""
        groups = []
        without_tools = []
        for conversation, turns in zip(conversations, turns_of, strict=True):
            if conversation.tools:
                groups.append((conversation.tools, turns))
            else:
                without_tools += turns
        groups.append((None, without_tools))
        for tools, turns in groups:
            if not turns:
                continue
            # Wrong answers stand behind the same prompt, which is rendered once.
            prompts = {id(turn.before[-1]): turn.before for turn in turns}
            texts = dict(zip(prompts, self.apply(list(prompts.values()), tools, True), strict=True))
            through = self.apply([[*turn.before, turn.message] for turn in turns], tools, False)
            for turn, answered in zip(turns, through, strict=True):
                turn.prompt = texts[id(turn.before[-1])]
                turn.answered = answered

    def make_rows(self, conversation: Conversation, messages: list[dict], turns: list[Turn]) -> Rendered:
        for turn in turns:
            turn.target = self.find_target(turn, conversation.tools)
        num_learned = sum(conversation.learned)
        others = [self.end_with_eos(turn.target) for turn in turns[num_learned:]]
        turns = turns[:num_learned]
        if turns and conversation.learned[-1]:
            whole = turns[-1].answered
        else:
            (whole,) = self.apply([messages], conversation.tools, False)
        rows = self.join_turns(whole, turns)
        if rows is None:
            rows = []
            for turn in turns:
                rows.append([(turn.prompt, False), (self.end_with_eos(turn.target), True)])
        not_used = self.find_not_used(conversation)
        not_used += self.find_unused_reasoning(conversation, messages, turns)
        num_in_open_think = 0
        for turn in turns:
            if opens_think(turn.prompt) and "</think>" not in turn.target:
                num_in_open_think += 1
        return Rendered(rows, others, not_used, num_in_open_think)

    def join_turns(self, whole: str, turns: list[Turn]) -> list[Pieces] | None:
        """One row with all turns as targets; None if the template rewrites what was said before."""
        pieces = []
        done = 0
        for turn in turns:
            start = len(turn.prompt)
            is_last = turn is turns[-1]
            if not whole.startswith(turn.prompt) or not whole.startswith(turn.target, start):
                return None
            if not is_last and not turn.target.endswith(self.special_tokens):
                return None  # nothing would tell the model to stop there
            pieces.append((whole[done:start], False))
            pieces.append((turn.target, True))
            done = start + len(turn.target)
        if pieces:
            pieces[-1] = (self.end_with_eos(pieces[-1][0]), True)
        rest = whole[done:]
        if rest.strip():
            pieces.append((rest, False))
        return [pieces]

    def end_with_eos(self, target: str) -> str:
        """The last target of a row always ends with EOS, whatever the template writes."""
        return target.removesuffix(self.tokenizer.eos_token) + self.tokenizer.eos_token

    # --- the target of a turn ---

    def find_target(self, turn: Turn, tools: list | None) -> str:
        """What the template writes for a turn, as it follows the generation prompt."""
        if turn.answered.startswith(turn.prompt):
            target = turn.answered[len(turn.prompt) :]
        else:
            target = self.cut_out_turn(turn, tools)
        target = self.strip_end(target)
        if not self.loses_reasoning(turn.message, target):
            return target
        with_reasoning = put_reasoning_back(turn, target)
        turn.lost_reasoning = with_reasoning is None
        return with_reasoning or target

    def loses_reasoning(self, message: dict, target: str) -> bool:
        """Whether a message has reasoning and what the template writes for it has not."""
        inner = inner_reasoning(message.get("content", ""))
        if inner:
            return not self.keeps_inner_reasoning or inner not in target
        reasoning = message.get("reasoning_content", "").strip()
        if reasoning:
            return not self.writes_reasoning or reasoning not in target
        return False

    def strip_end(self, target: str) -> str:
        stripped = target.rstrip()
        if stripped.endswith(self.special_tokens):
            return stripped
        return target.removesuffix(self.end)

    def cut_out_turn(self, turn: Turn, tools: list | None) -> str:
        """The text of a turn where the finished conversation does not begin with the generation prompt.

        Another answer in its place shows where the turn begins: up to there, both conversations are the same.
        """
        other = {"role": "assistant", "content": ANSWER_PROBE}
        (answered_otherwise,) = self.apply([[*turn.before, other]], tools, False)
        start = len(os.path.commonprefix([turn.answered, answered_otherwise]))
        place_of_probe = answered_otherwise.find(ANSWER_PROBE)
        if place_of_probe < 0:
            raise ValueError("the tokenizer's chat template does not write the assistant's answer")
        start = min(start, place_of_probe)
        before_answer = turn.answered[:start]
        return text_behind_prompt(turn.prompt, before_answer, self.end_of_turn) + turn.answered[start:]

    def find_unused_reasoning(self, conversation: Conversation, messages: list[dict], turns: list[Turn]) -> list[str]:
        """The fields with reasoning that is not learned, because neither the template nor its target holds it.

        The reasoning of turns that are not learned is the template's business, unless it never writes any.
        """
        turn_of = {id(turn.message): turn for turn in turns}
        not_used = []
        for message, prepared in zip(conversation.messages, messages, strict=True):
            turn = turn_of.get(id(prepared))
            has_field = "reasoning_content" in message
            if turn is None:
                is_lost = has_field and not self.writes_reasoning
            else:
                is_lost = turn.lost_reasoning
            if not is_lost:
                continue
            if has_field and message["reasoning_field"] is None:
                raise ValueError("the tokenizer's chat template does not write the parts of a message that are "
                                 "reasoning, so they would be lost")  # fmt: skip
            if has_field:
                not_used.append(message["reasoning_field"])
            else:
                not_used.append("messages.content")
        return not_used


def make_call(arguments) -> dict:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "xq7tool", "arguments": arguments}}


def shape_calls(message: dict, style: CallStyle) -> None:
    """Gives a message with calls the form that the chat template writes. A text beside the calls stays."""
    if style.with_content:
        message.setdefault("content", "")
    if style.arguments_are_text:
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        message["tool_calls"] = calls


def number_calls(messages: list[dict]) -> None:
    """Gives calls and their results ids of nine characters: 000000001, 000000002 and so on."""
    new_ids = {}
    unanswered = []
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                new_id = f"{len(new_ids) + 1:09d}"
                new_ids[call.get("id", new_id)] = new_id
                unanswered.append(new_id)
                calls.append({**call, "id": new_id})
            message["tool_calls"] = calls
        elif message["role"] == "tool":
            # A result without an id belongs to the first call that has none yet.
            new_id = new_ids.get(message.get("tool_call_id"))
            if new_id is None and unanswered:
                new_id = unanswered[0]
            if new_id in unanswered:
                unanswered.remove(new_id)
            if new_id is not None:
                message["tool_call_id"] = new_id


def opens_think(prompt: str) -> bool:
    return prompt.rstrip().endswith("<think>")


def inner_reasoning(content: str) -> str:
    """What stands between <think> and </think> in a content; an empty text if nothing does."""
    if "</think>" not in content:
        return ""
    return re.sub(r"^\s*<think>", "", content.partition("</think>")[0]).strip()


def put_reasoning_back(turn: Turn, target: str) -> str | None:
    """The target with the reasoning of its turn, where the template drops it although it has to be learned.

    Reasoning inside the content belongs to the answer. Reasoning in a field of its own is written only where the
    generation prompt ends inside <think>, for there a model has to begin with it.

    Returns:
        None if there is no place for it.
    """
    content = turn.message.get("content", "")
    if turn.prompt.rstrip().endswith("</think>"):
        return None  # the prompt says that the model shall not reason
    if inner_reasoning(content):
        head, _, rest = content.partition("</think>")
        space = rest[: len(rest) - len(rest.lstrip())]
    elif opens_think(turn.prompt):
        head = f"<think>\n{turn.message['reasoning_content'].strip()}\n"
        space = "\n\n"
    else:
        return None
    if opens_think(turn.prompt):
        head = re.sub(r"^\s*<think>", "", head)
        if turn.prompt.endswith("\n"):
            head = head.removeprefix("\n")
    return f"{head}</think>{space}{target.lstrip()}"


def text_behind_prompt(prompt: str, before_answer: str, end_of_turn: str) -> str:
    """What a finished turn writes between the end of the generation prompt and the answer, such as a space.

    Args:
        prompt: ends with the generation prompt.
        before_answer: all that the finished conversation has before the answer. Text further back may differ.
        end_of_turn: what is looked for has none in it, or it would reach back into the turn before.
    """
    if prompt.startswith(before_answer):
        return ""  # the generation prompt says more than the finished turn: the answer goes behind it
    prompt_backwards = prompt[::-1][:300]
    before_backwards = before_answer[::-1][:400]
    longest = 2  # fewer characters may be the same by chance
    best = 0
    for num_behind in range(100):
        behind = before_answer[max(0, len(before_answer) - num_behind) :]
        if end_of_turn and end_of_turn in behind:
            break
        same = len(os.path.commonprefix([prompt_backwards, before_backwards[num_behind:]]))
        if same > longest:
            longest = same
            best = num_behind
        if longest >= 12:  # further back the conversation may repeat itself: the nearest place is the right one
            break
    return before_answer[len(before_answer) - best :]


def writes_date(tokenizer) -> bool:
    """Whether the chat template writes the date of the day on which it is used."""
    messages = [{"role": "user", "content": "a"}]
    texts = set()
    for date in ("2001-02-03", "2012-11-10"):
        texts.add(chat_template_of(tokenizer, date).prompt(messages, None))
    return len(texts) > 1


@lru_cache(maxsize=8)
def date_macro(date: str) -> str:
    """A macro that stands in for the function strftime_now of transformers, which would write today's date.

    It is put before the template's text. A value of that name cannot be passed: transformers hands plain data to
    templates, and no functions.
    """
    midnight = datetime.datetime.fromisoformat(date)
    replacements = []
    for directive in ["-d", "-m", "-j", "-H", "-I", "-M", *"aAbBcdDeFHIjmMpSTuUwWxXyYzZ"]:
        text = midnight.strftime(f"%{directive}")
        replacements.append(f" | replace({json.dumps('%' + directive)}, {json.dumps(text)})")
    # The line end belongs to the macro: jinja2 drops the first one behind a block, as transformers sets it up.
    return f"{{% macro strftime_now(format) %}}{{{{ format{''.join(replacements)} }}}}{{% endmacro %}}\n"
