"""Turns rows with a prompt and answers of unequal worth into arrays of token ids; encoding.py does it for all others.

A pair becomes prompt_ids, chosen_ids, chosen_labels, rejected_ids and rejected_labels, a single answer prompt_ids,
completion_ids, completion_labels and label. The prompt stands once. Its ids are those that serving sends:
apply_chat_template(messages before the answer, add_generation_prompt=True). A document is the prompt with one answer
behind it, rendered as --format chat renders that conversation.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data_sample.chat_template import Conversation, Pieces, Rendered
from data_sample.encoding import (
    IGNORE_INDEX,
    ChunkResult,
    Complaint,
    Encoded,
    Row,
    Tokenization,
    find_texts,
    list_array,
)
from data_sample.fields import FieldCounts
from data_sample.ledger import Ledger, Split
from data_sample.reading import RawRow
from data_sample.rendering import render_messages, render_plain, without_eos, wrap_user_turns

PAIR = "a pair (chosen and rejected)"
SINGLE = "a single answer (completion and label)"


@dataclass
class Answer:
    """One of the answers of a row."""

    name: str  # of its columns: chosen, rejected or completion
    kind: str  # in the ledger: chosen, rejected, wanted or unwanted
    conversation: Conversation  # the prompt with the answer; each assistant's turn of the answer is rendered as learned
    has_loss: list[bool]  # of each of these turns; the row may give it no weight
    is_rewritten: bool = False  # the template writes the first turns otherwise once the last one is there
    num_pieces: int = 0  # of the row's pieces, those behind the prompt


@dataclass
class PreferenceRow(Row):
    """A prompt with its answers. `pieces` are the prompt's, and then those of each answer.

    A row without answers holds two conversations that have no common beginning; they are counted, and not kept.
    """

    prompt: list[dict] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    label: bool | None = None
    prompt_is_repeated: bool = False  # the prompt stands in both answers of the row


class PreferenceTokenization(Tokenization):
    """As Tokenization, for --format preference. A row of the input is a row of the set."""

    def __init__(self, args, tokenizer, template: dict, paths: list[str], splits: list[str]):
        super().__init__(args, tokenizer, template, paths, splits)
        self.first_of_kind = {}  # of the chunk: where the first pair stands, and the first single answer

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        self.first_of_kind = {}
        result = super().__call__(chunk)
        result.first_of_kind = self.first_of_kind
        result.ledger.of_preferences = True
        return result

    # --- reading ---

    def make_row(self, raw: RawRow, content: dict, read: dict, counts: FieldCounts) -> PreferenceRow:
        said = "".join(find_texts(content))
        row = PreferenceRow(raw, None, "not blank", said, counts, 0)
        row.label = read["label"]
        row.prompt_is_repeated = read["prompt_is_repeated"]
        kind = PAIR
        if row.label is not None:
            kind = SINGLE
        self.first_of_kind.setdefault(kind, self.name(raw))
        if read["answers"] is None:
            row.pieces = [(text, False) for text in ("", *read["texts"])]
            return row
        if read["is_empty"]:
            row.answer = ""
        row.prompt = self.clean(row, render_messages(read, self.template))
        # Each turn of the assistant gets a piece of its own by being called learned; has_loss decides later.
        for number, messages in enumerate(read["answers"]):
            messages = self.clean(row, wrap_user_turns(messages, self.template))
            learned = [False] * len(row.prompt)
            has_loss = []
            for message, is_learned in zip(messages, read["learned"][number], strict=True):
                learned.append(message["role"] == "assistant")
                if message["role"] == "assistant":
                    has_loss.append(is_learned)
            conversation = Conversation(row.prompt + messages, learned, read["tools"])
            name, answer_kind = name_answer(row.label, number)
            row.answers.append(Answer(name, answer_kind, conversation, has_loss))
        return row

    def clean(self, row: PreferenceRow, messages: list[dict]) -> list[dict]:
        """The messages without EOS at the end of the assistant's, which are counted."""
        cleaned = without_eos(messages, self.tokenizer.eos_token)
        row.num_stripped_eos += sum(a is not b for a, b in zip(cleaned, messages, strict=True))
        return cleaned

    # --- texts ---

    def render(self, rows: list[Row], ledger: Ledger, complaints: list[Complaint]) -> list[Row]:
        """Gives the rows their texts. Returns those that could be rendered; the others become complaints."""
        rows, rendered_rows = self.render_good_rows(rows, ledger, complaints)
        self.split_where_ids_differ([rendered for of_row in rendered_rows for rendered in of_row])
        for row, of_row in zip(rows, rendered_rows, strict=True):
            for answer, rendered in zip(row.answers, of_row, strict=True):
                self.add_pieces(row, answer, rendered)
                ledger.in_open_think += rendered.num_in_open_think
            for name in self.find_not_used(row, of_row):
                row.fields.move_to_not_used(name)
            ledger.fields.add(row.fields)
            ledger.stripped_eos += row.num_stripped_eos
        return rows

    def render_conversations(self, rows: list[Row]) -> list[list[Rendered]]:
        """What each answer of each row becomes."""
        conversations = []
        for row in rows:
            for answer in row.answers:
                conversations.append(answer.conversation)
        if self.chat_template is not None:
            rendered = iter(self.chat_template.render(conversations))
        else:
            rendered = map(self.render_without_template, conversations)
        return [[next(rendered) for _ in row.answers] for row in rows]

    def render_without_template(self, conversation: Conversation) -> Rendered:
        """Raises ValueError if a part of the conversation can be written by a chat template only."""
        if conversation.tools:
            raise ValueError("tools need a chat template, and the tokenizer has none")
        not_used = []
        for message in conversation.messages:
            if message["role"] not in ("system", "user", "assistant"):
                raise ValueError(f"a message of the role {message['role']} needs a chat template, and the tokenizer "
                                 "has none")  # fmt: skip
            if "tool_calls" in message:
                raise ValueError("tool_calls need a chat template, and the tokenizer has none")
            if "reasoning_content" in message:
                not_used.append(message["reasoning_field"] or "messages.content")
            if "name" in message:
                not_used.append("messages.name")
        pieces = render_plain(self.tokenizer, conversation.messages, conversation.learned)
        return Rendered([pieces], not_used=not_used)

    def add_pieces(self, row: PreferenceRow, answer: Answer, rendered: Rendered) -> None:
        """Puts the texts of an answer behind those that the row has; the prompt comes first, once."""
        answer.is_rewritten = len(rendered.rows) > 1
        if answer.is_rewritten:
            # The turns have no prompt in common. Their texts are counted, and the row is dropped.
            pieces = [rendered.rows[0][0]]
            for turn in rendered.rows:
                pieces.append((turn[-1][0], False))
        else:
            pieces = set_loss(rendered.rows[0], answer.has_loss)
        if not row.pieces:
            row.pieces = [pieces[0]]
        row.pieces += pieces[1:]
        answer.num_pieces = len(pieces) - 1

    def find_not_used(self, row: PreferenceRow, rendered: list[Rendered]) -> list[str]:
        """The fields that the template does not write.

        Each answer is rendered with the prompt before it. What stands once in the row is counted once.
        """
        not_used = []
        for of_answer in rendered:
            not_used += of_answer.not_used
        if len(rendered) < 2 or not not_used:
            return not_used
        prompt = Conversation(row.prompt, [False] * len(row.prompt), row.answers[0].conversation.tools)
        if self.chat_template is not None:
            twice = self.chat_template.find_not_used(prompt)
            twice += self.chat_template.find_unused_reasoning(prompt, self.chat_template.prepare(row.prompt), [])
        else:
            twice = self.render_without_template(prompt).not_used
        for name in twice:
            if name == "tools" or not row.prompt_is_repeated:
                not_used.remove(name)
        return not_used

    # --- ids ---

    def find_contexts(self, row: Row) -> list[tuple[str, str]]:
        """Each text and the one before it: both answers follow the prompt."""
        prompt = row.pieces[0][0]
        pairs = [("", prompt)]
        if not row.answers:
            return pairs + [("", text) for text, _ in row.pieces[1:]]
        number = 1
        for answer in row.answers:
            before = prompt
            for text, _ in row.pieces[number : number + answer.num_pieces]:
                pairs.append((before, text))
                before = text
            number += answer.num_pieces
        return pairs

    # --- what becomes of a row ---

    def choose(self, encoded: Encoded, ledger: Ledger) -> dict[str, pa.RecordBatch]:
        """Decides about each row, counts it, and makes arrays of those that are kept."""
        labels = np.where(encoded.is_target, encoded.ids, np.int32(IGNORE_INDEX))
        columns_of = {split: {} for split in self.splits}
        start = 0
        for row, end, part_lengths in zip(encoded.rows, encoded.ends, encoded.part_lengths, strict=True):
            prompt_end = start + part_lengths[0]
            spans = find_spans(row, prompt_end, part_lengths)
            outcome = self.judge(row, encoded, start, prompt_end, spans)
            split = self.choose_split(row.raw)
            figures = ledger.splits[split]
            num_tokens = end - start
            ledger.tokens_in += num_tokens
            longest_answer = max([last - first for first, last in spans], default=num_tokens - part_lengths[0])
            ledger.lengths[part_lengths[0] + longest_answer] += 1
            figures.rows[outcome] += 1
            figures.tokens[outcome] += num_tokens
            figures.examples.setdefault(outcome, self.name(row.raw))
            if outcome == "kept":
                self.count_documents_of_row(figures, row, encoded, encoded.ids[start:prompt_end], spans)
                columns = columns_of[split]
                columns.setdefault("prompt_ids", []).append(encoded.ids[start:prompt_end])
                for answer, (first, last) in zip(row.answers, spans, strict=True):
                    columns.setdefault(f"{answer.name}_ids", []).append(encoded.ids[first:last])
                    columns.setdefault(f"{answer.name}_labels", []).append(labels[first:last])
                if row.label is not None:
                    columns.setdefault("label", []).append(row.label)
            start = end
        if len(self.first_of_kind) > 1:
            return {}  # rows of two kinds have no columns in common; the main process refuses the set
        return make_batches(columns_of)

    def judge(self, row: PreferenceRow, encoded: Encoded, start: int, prompt_end: int, spans: list[tuple]) -> str:
        """The outcome of a row: kept, or the reason why it is dropped."""
        if not row.is_learned or not row.answer.strip():
            return "no_target"
        if not row.answers:
            return "no_common_beginning"
        if any(map(self.spells_special_token, row.answers)):
            return "special_token"
        if say_the_same(row):
            return "equal_answers"
        if any(answer.is_rewritten for answer in row.answers):
            return "rewritten"
        length = prompt_end - start + max(last - first for first, last in spans)
        if length > self.args.max_length:
            if self.args.on_long == "error":
                raise ValueError(f"{self.name(row.raw)}: {length} tokens, above --max_length; raise it, or choose "
                                 "--on_long drop")  # fmt: skip
            return "too_long"
        return "kept"

    def count_documents_of_row(
        self, figures: Split, row: PreferenceRow, encoded: Encoded, prompt_ids: np.ndarray, spans: list[tuple]
    ) -> None:
        """Counts the documents of a row that is kept: their targets, and how they begin and end."""
        num_bos = 0
        for token in prompt_ids[:2]:
            if token != self.tokenizer.bos_token_id:
                break
            num_bos += 1
        for answer, (first, last) in zip(row.answers, spans, strict=True):
            figures.documents += 1
            figures.bos_at_start[num_bos] += 1
            figures.document_tokens += len(prompt_ids) + last - first
            figures.targets += int(encoded.targets_before[last] - encoded.targets_before[first])
            if encoded.eos_before[last] == encoded.eos_before[first]:
                figures.without_eos_target += 1
            figures.answers[answer.kind] += 1
            figures.answer_tokens[answer.kind] += last - first


def name_answer(label: bool | None, number: int) -> tuple[str, str]:
    """The name of an answer in the columns, and what the ledger calls its kind."""
    if label is None:
        name = ("chosen", "rejected")[number]
        return name, name
    if label:
        return "completion", "wanted"
    return "completion", "unwanted"


def say_the_same(row: PreferenceRow) -> bool:
    """Whether the two answers of a pair differ in nothing but the white space around their turns."""
    if len(row.answers) < 2:
        return False
    stripped = []
    for answer in row.answers:
        turns = answer.conversation.messages[len(row.prompt) :]
        stripped.append([{**turn, "content": turn.get("content", "").strip()} for turn in turns])
    return stripped[0] == stripped[1]


def set_loss(pieces: Pieces, has_loss: list[bool]) -> Pieces:
    """The pieces with a loss on those turns only that have a weight."""
    flags = iter(has_loss)
    result = []
    for text, is_target in pieces:
        result.append((text, is_target and next(flags)))
    return result


def find_spans(row: PreferenceRow, start: int, part_lengths: list[int]) -> list[tuple[int, int]]:
    """Where the ids of each answer begin and end; the first answer begins at `start`."""
    spans = []
    number = 1
    for answer in row.answers:
        end = start + sum(part_lengths[number : number + answer.num_pieces])
        spans.append((start, end))
        start = end
        number += answer.num_pieces
    return spans


def make_batches(columns_of: dict[str, dict[str, list]]) -> dict[str, pa.RecordBatch]:
    batches = {}
    for split, columns in columns_of.items():
        arrays = {}
        for name, values in columns.items():
            if name == "label":
                arrays[name] = pa.array(values, pa.bool_())
            else:
                arrays[name] = list_array(values)
        if arrays:
            batches[split] = pa.RecordBatch.from_pydict(arrays)
    return batches


def refuse_mixed_kinds(first_of_kind: dict[str, str]) -> None:
    """Raises ValueError if some rows are pairs and others single answers.

    Args:
        first_of_kind: where the first row of each kind stands, in the order of the input.
    """
    if len(first_of_kind) < 2:
        return
    (first_kind, first_place), (other_kind, other_place) = first_of_kind.items()
    raise ValueError(f"{other_place}: it is {other_kind}, and the rows before it, from {first_place} on, are not: the "
                     f"first is {first_kind}; put pairs and single answers into two sets")  # fmt: skip
