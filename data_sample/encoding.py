"""Turns a chunk of raw rows into arrays of token ids: parse, render, tokenize, decide about length, count."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa

from data_sample.chat_template import Conversation, Pieces, Rendered, chat_template_of
from data_sample.fields import FieldCounts, FirstLabelError, clean_row, count_fields, describe_broken, read_row
from data_sample.ledger import Language, Ledger, Split
from data_sample.reading import RawRow, name_place, parse_row
from data_sample.rendering import adds_bos, render_answers, render_messages, render_plain, without_eos

IGNORE_INDEX = -100

# The letters that tell a text's language; what has none of them is counted as Latin or other.
SCRIPTS = {
    "Japanese": re.compile("[\u3040-\u30ff]"),
    "Korean": re.compile("[\uac00-\ud7af\u1100-\u11ff]"),
    "Chinese": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"),
    "Arabic": re.compile("[\u0600-\u06ff\u0750-\u077f]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Cyrillic": re.compile("[\u0400-\u052f]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Indic": re.compile("[\u0900-\u0dff]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


def language_of(text: str) -> str:
    """The first script that has a fifth of the letters in a sample of at most 100 characters."""
    sample = text[:: len(text) // 100 + 1]
    num_latin = len(LATIN.findall(sample))
    if not sample.isascii():
        counts = {name: len(letters.findall(sample)) for name, letters in SCRIPTS.items()}
        num_letters = sum(counts.values()) + num_latin
        for name, count in counts.items():
            if count * 5 > num_letters:
                return name
    if num_latin:
        return "Latin"
    return "other"


# -------------------------------------------------------------------------------------------------------------------
# Texts to ids
# -------------------------------------------------------------------------------------------------------------------


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without the BOS that the tokenizer would add."""
    if not texts:
        return []
    if tokenizer.is_fast:
        # The library's own call is faster than the tokenizer's: it makes no masks, checks and offsets.
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return tokenizer(texts, add_special_tokens=False).input_ids


def encode_behind(tokenizer, pairs: list[tuple[str, str]]) -> list[list[int]]:
    """Ids of the second text of each pair where it follows the first one, which keeps the ids that it has alone.

    That is what happens at generation: the prompt is tokenized alone, so no token may span its end. And a text by
    itself may have other ids than behind another one (SentencePiece puts a space before it). So the text is tokenized
    together with the last line before it, if that line then still begins with its own ids; else behind a line end; and
    else, which is rare, alone.
    """
    contexts = []
    for before, _ in pairs:
        if before.endswith(tokenizer.eos_token):
            contexts.append(tokenizer.eos_token)
        else:
            start_of_last_line = before.rstrip().rfind("\n") + 1
            last_line = before[start_of_last_line:]
            contexts.append(last_line[-100:])
    known = list({"", "\n", *contexts})
    ids_of = dict(zip(known, encode_texts(tokenizer, known), strict=True))
    ids_of[""] = []
    joined = [context + text for context, (_, text) in zip(contexts, pairs, strict=True)]
    results = []
    for context, (_, text), ids in zip(contexts, pairs, encode_texts(tokenizer, joined), strict=True):
        for fallback in ("\n", ""):
            if ids[: len(ids_of[context])] == ids_of[context]:
                break
            context = fallback
            (ids,) = encode_texts(tokenizer, [context + text])
        results.append(ids[len(ids_of[context]) :])
    return results


def list_array(rows: list[np.ndarray]) -> pa.ListArray:
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(rows))


# -------------------------------------------------------------------------------------------------------------------
# Rows on their way
# -------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row on its way from the file to its ids."""

    raw: RawRow
    conversation: Conversation | None  # None for a document
    answer: str  # the answer or the document; if it is blank, there is nothing to learn
    said: str  # what the file says, without templates: it tells the language
    fields: FieldCounts
    num_fields: int
    is_learned: bool = True  # unless the row says that it is not
    num_stripped_eos: int = 0
    pieces: Pieces = field(default_factory=list)
    other_targets: list[str] = field(default_factory=list)  # the wrong answers, where options are kept


@dataclass
class Encoded:
    """The ids of all rows of a chunk, one behind the other, and where each row lies in them."""

    rows: list[Row]
    ids: np.ndarray  # int32 [T]
    is_target: np.ndarray  # bool [T]
    targets_before: np.ndarray  # int64 [T + 1]
    eos_before: np.ndarray  # int64 [T + 1], EOS that are targets
    ends: list[int]  # of each row; it starts where the row before it ends
    part_lengths: list[list[int]]  # of each row the tokens of each piece
    options: list[list[list[int]]]  # of each row the ids of its options, the right one first


@dataclass
class Complaint:
    """Why a row is broken."""

    place: str
    problem: str
    hint: str  # what the row looks like, for a file of which no row could be read
    forbids_skipping: bool = False  # other rows would be read wrongly, too


@dataclass
class ChunkResult:
    batches: dict[str, pa.RecordBatch]  # of each split that got rows
    ledger: Ledger  # the chunk's share of every figure
    complaints: list[Complaint]  # one for each broken row
    first_of_kind: dict[str, str] = field(default_factory=dict)  # preference: where the first pair stands, and so on


class Tokenization:
    """All that turns a chunk of raw rows into arrays. Call it with what read_chunks yields.

    Args:
        args: the arguments of tokenize_dataset.py.
        tokenizer: its backend is set up for this work, so it must not be used for anything else.
        template: what make_template returned.
        paths: the input's files.
        splits: train, or train and val.

    Raises:
        ValueError: a row is too long, and that is to be an error.
    """

    def __init__(self, args, tokenizer, template: dict, paths: list[str], splits: list[str]):
        self.args = args
        self.tokenizer = tokenizer
        self.template = template
        self.paths = paths
        self.splits = splits
        self.with_bos = adds_bos(tokenizer)
        self.chat_template = None
        if template["chat"] and args.format != "text":
            self.chat_template = chat_template_of(tokenizer, template.get("date"))
        self.keeps_whole_documents = args.format == "text" and not args.packing
        self.keeps_options = args.format == "mcq" and not args.packing
        special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special_tokens.update(tokenizer.all_special_tokens)
        self.special_token = re.compile("|".join(map(re.escape, special_tokens)))
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            # A document has no template, so what spells a special token in it, as <s> in HTML does, is text.
            backend.encode_special_tokens = args.format == "text"
        # A token that is not text by itself is a byte or so of a character that the vocabulary lacks.
        ids = [[number] for number in range(max(tokenizer.get_vocab().values()) + 1)]
        if tokenizer.is_fast:
            texts = tokenizer.backend_tokenizer.decode_batch(ids)
        else:
            texts = tokenizer.batch_decode(ids)
        self.is_fragment = np.array(["\ufffd" in text for text in texts])

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        ledger = Ledger()
        complaints = []
        rows = []
        for raw in chunk:
            row = self.read(raw, ledger, complaints)
            if row is not None:
                rows.append(row)
        rows = self.render(rows, ledger, complaints)
        ledger.rows_in = len(rows) + len(complaints)
        ledger.rows_broken = len(complaints)
        encoded = self.encode(rows)
        self.count_languages(encoded, ledger)
        return ChunkResult(self.choose(encoded, ledger), ledger, complaints)

    def name(self, raw: RawRow) -> str:
        return name_place(self.paths[raw.file], raw.number)

    # --- reading ---

    def read(self, raw: RawRow, ledger: Ledger, complaints: list[Complaint]) -> Row | None:
        """The row; None if it is broken, which is one more complaint."""
        content = None
        num_fields = 0
        try:
            content = parse_row(raw.content, self.paths[raw.file])
            content = clean_row(content, self.template)
            num_fields = count_fields(content, self.args.format)
            counts = FieldCounts()
            read = read_row(content, self.template, counts)
        except ValueError as problem:
            ledger.fields_in += num_fields
            ledger.fields_broken += num_fields
            hint = ""
            if not complaints:
                hint = describe_broken(raw.content, content, self.args.format)
            is_about_all_rows = isinstance(problem, FirstLabelError)
            complaints.append(Complaint(self.name(raw), str(problem), hint, is_about_all_rows))
            return None
        ledger.fields_in += num_fields
        row = self.make_row(raw, content, read, counts)
        row.num_fields = num_fields
        row.is_learned = read.get("is_learned", True)
        return row

    def make_row(self, raw: RawRow, content: dict, read: dict, counts: FieldCounts) -> Row:
        """A row without its texts.

        Args:
            content: all that the file says.
            read: the same in the one form of the format.
        """
        if self.args.format == "text":
            return Row(raw, None, read["text"], read["text"], counts, 0)
        if self.args.format == "chat":
            conversation = Conversation(read["messages"], read["learned"], read["tools"])
            said = "".join(message.get("content", "") for message in conversation.messages)
            answer = "not blank"  # read_row has looked at each turn
        else:
            messages = render_messages(read, self.template)
            answer, *others = render_answers(read, self.template)
            if not self.keeps_options:
                others = []
            messages.append({"role": "assistant", "content": answer})
            learned = [False] * len(messages)
            learned[-1] = True
            conversation = Conversation(messages, learned, None, others)
            said = "".join(text for text in content.values() if isinstance(text, str))
        row = Row(raw, conversation, answer, said, counts, 0)
        cleaned = without_eos(conversation.messages, self.tokenizer.eos_token)
        row.num_stripped_eos = sum(a is not b for a, b in zip(cleaned, conversation.messages, strict=True))
        conversation.messages = cleaned
        if self.args.format != "chat":
            row.answer = cleaned[-1]["content"]
        return row

    # --- texts ---

    def render(self, rows: list[Row], ledger: Ledger, complaints: list[Complaint]) -> list[Row]:
        """Gives the rows their texts. Where the chat template rewrites earlier turns, a row becomes several.

        Returns:
            the rows that could be rendered. The others become complaints.
        """
        rows, rendered = self.render_good_rows(rows, ledger, complaints)
        self.split_where_ids_differ(rendered)
        result = []
        for row, conversation in zip(rows, rendered, strict=True):
            for name in conversation.not_used:
                row.fields.move_to_not_used(name)
            ledger.fields.add(row.fields)
            ledger.stripped_eos += row.num_stripped_eos
            ledger.in_open_think += conversation.num_in_open_think
            row.other_targets = conversation.other_targets
            for pieces in conversation.rows:
                result.append(replace(row, pieces=pieces))
        if self.args.format == "chat":
            ledger.conversations += len(rows)
            ledger.conversation_rows += len(result)
        return result

    def render_good_rows(self, rows: list[Row], ledger: Ledger, complaints: list[Complaint]) -> tuple[list[Row], list]:
        """The rows that can be rendered, and what render_conversations makes of them."""
        try:
            return rows, self.render_conversations(rows)
        except Exception:
            # One of the rows is to blame, and templates raise all kinds of exceptions. One by one the rows tell which.
            rendered = []
            good_rows = []
            for row in rows:
                try:
                    rendered += self.render_conversations([row])
                    good_rows.append(row)
                except Exception as problem:
                    complaints.append(Complaint(self.name(row.raw), explain_rendering(problem), ""))
                    ledger.fields_broken += row.num_fields
            return good_rows, rendered

    def render_conversations(self, rows: list[Row]) -> list[Rendered]:
        if self.args.format == "text":
            return [Rendered([[(row.answer, True)]]) for row in rows]
        if self.chat_template is not None:
            return self.chat_template.render([row.conversation for row in rows])
        rendered = []
        for row in rows:
            messages = row.conversation.messages
            pieces = render_plain(self.tokenizer, messages)
            others = [answer + self.tokenizer.eos_token for answer in row.conversation.other_answers]
            rendered.append(Rendered([pieces], others))
        return rendered

    def split_where_ids_differ(self, rendered: list[Rendered]) -> None:
        """Makes a row of each target where one row with several targets would have other ids than serving sends.

        Such a row is tokenized piece by piece, so that no token spans the end of a prompt. Serving tokenizes the text
        before a later turn as a whole, and may join the end of a prompt with the answer behind it.
        """
        several = []
        before_last_target = []  # texts of the pieces before the last target
        for conversation in rendered:
            if len(conversation.rows) == 1 and sum(is_target for _, is_target in conversation.rows[0]) > 1:
                (pieces,) = conversation.rows
                last = max(number for number, (_, is_target) in enumerate(pieces) if is_target)
                several.append(conversation)
                before_last_target.append([text for text, _ in pieces[:last]])
        pairs = []
        for texts in before_last_target:
            pairs += pairwise(["", *texts])
        parts = iter(encode_behind(self.tokenizer, pairs))
        wholes = encode_texts(self.tokenizer, ["".join(texts) for texts in before_last_target])
        for conversation, texts, whole in zip(several, before_last_target, wholes, strict=True):
            ids = []
            for _ in texts:
                ids += next(parts)
            if ids != whole:
                conversation.rows = separate_targets(conversation.rows[0])

    # --- ids ---

    def encode(self, rows: list[Row]) -> Encoded:
        bos = self.tokenizer.bos_token_id
        pairs = []
        for row in rows:
            pairs += self.find_contexts(row)
        encoded = iter(encode_behind(self.tokenizer, pairs))

        parts = []
        is_target = []
        lengths_of_rows = []
        options = []
        for row in rows:
            row_parts = [next(encoded) for _ in row.pieces]
            row_options = [next(encoded) for _ in row.other_targets]
            if self.args.format == "text":
                row_parts[0] = [*row_parts[0], self.tokenizer.eos_token_id]
            if self.with_bos and row_parts[0][:1] != [bos]:  # a chat template may have written it
                row_parts[0] = [bos, *row_parts[0]]
            options.append([row_parts[-1], *row_options])
            parts += row_parts
            is_target += [target or self.args.train_on_prompt for _, target in row.pieces]
            lengths_of_rows.append([len(part) for part in row_parts])
        part_lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(chain.from_iterable(parts), np.int32, int(part_lengths.sum()))
        is_target = np.repeat(np.array(is_target, bool), part_lengths)
        is_eos_target = is_target & (ids == self.tokenizer.eos_token_id)
        return Encoded(
            rows=rows,
            ids=ids,
            is_target=is_target,
            targets_before=count_before(is_target),
            eos_before=count_before(is_eos_target),
            ends=np.cumsum([sum(lengths) for lengths in lengths_of_rows], dtype=np.int64).tolist(),
            part_lengths=lengths_of_rows,
            options=options,
        )

    def find_contexts(self, row: Row) -> list[tuple[str, str]]:
        """Each text of a row that is tokenized, and the text that it follows."""
        texts = ["", *(text for text, _ in row.pieces)]
        pairs = list(pairwise(texts))
        pairs += [(texts[1], target) for target in row.other_targets]
        return pairs

    def count_languages(self, encoded: Encoded, ledger: Ledger) -> None:
        """Characters, tokens, and what the vocabulary could not say, for each language; templates count as well."""
        unknown_before = count_before(encoded.ids == self.tokenizer.unk_token_id)
        fragments_before = count_before(self.is_fragment[encoded.ids])
        start = 0
        for row, end in zip(encoded.rows, encoded.ends, strict=True):
            language = ledger.languages.setdefault(language_of(row.said), Language())
            language.rows += 1
            language.characters += sum(len(text) for text, _ in row.pieces)
            language.tokens += end - start
            language.unknown += int(unknown_before[end] - unknown_before[start])
            language.fragments += int(fragments_before[end] - fragments_before[start])
            start = end

    # --- what becomes of a row ---

    def choose(self, encoded: Encoded, ledger: Ledger) -> dict[str, pa.RecordBatch]:
        """Decides about each row, counts it, and makes arrays of those that are kept."""
        cuts_of = {split: [] for split in self.splits}  # start and end of each row that is written
        options_of = {split: [] for split in self.splits}
        start = 0
        for row, end, options in zip(encoded.rows, encoded.ends, encoded.options, strict=True):
            split = self.choose_split(row.raw)
            outcome, cuts = self.cut(row, start, end)
            learned = []
            for first, last in cuts:
                # The first token of a row is never predicted, whatever its label.
                num_targets = encoded.targets_before[last] - encoded.targets_before[first + 1]
                if num_targets > 0 or self.keeps_whole_documents:
                    learned.append((first, last))
            if cuts and not learned:
                outcome = "no_target"
            ledger.tokens_in += end - start
            ledger.lengths[end - start] += 1
            figures = ledger.splits[split]
            count_outcome(figures, outcome, end - start, cuts, learned)
            figures.examples.setdefault(outcome, self.name(row.raw))
            self.count_documents(figures, encoded, learned)
            cuts_of[split] += learned
            options_of[split] += [options] * len(learned)
            start = end
        return self.make_batches(encoded, cuts_of, options_of)

    def count_documents(self, figures: Split, encoded: Encoded, cuts: list[tuple[int, int]]) -> None:
        """Counts the rows that are written of one row: their targets, and how they begin and end."""
        bos = self.tokenizer.bos_token_id
        ids = encoded.ids
        for first, last in cuts:
            figures.documents += 1
            figures.targets += int(encoded.targets_before[last] - encoded.targets_before[first + 1])
            if encoded.eos_before[last] == encoded.eos_before[first + 1]:
                figures.without_eos_target += 1
            num_bos = 0
            if ids[first] == bos:
                num_bos = 1
                if last > first + 1 and ids[first + 1] == bos:
                    num_bos = 2
            figures.bos_at_start[num_bos] += 1

    def choose_split(self, raw: RawRow) -> str:
        """Drawn by the row's place in the input, so the same for every number of workers and machines."""
        place = (raw.file, raw.number)
        digest = hashlib.blake2b(f"{self.args.seed} {place}".encode(), digest_size=8).digest()
        if int.from_bytes(digest) < self.args.val_size * 2**64:
            return "val"
        return "train"

    def cut(self, row: Row, start: int, end: int) -> tuple[str, list[tuple[int, int]]]:
        """What happens to a row of ids from `start` to `end`: its outcome, and the borders of the rows made of it."""
        length = end - start
        max_length = self.args.max_length
        if not row.is_learned or not row.answer.strip():
            return "no_target", []
        if self.args.format != "text" and self.spells_special_token(row):
            return "special_token", []
        if length <= max_length or self.keeps_whole_documents:
            return "kept", [(start, end)]
        if self.args.on_long == "error":
            raise ValueError(f"{self.name(row.raw)}: {length} tokens, above --max_length; raise it, or choose "
                             "--on_long drop, truncate or split")  # fmt: skip
        if self.args.on_long == "drop":
            return "too_long", []
        if self.args.on_long == "truncate":
            return "kept", [(start, start + max_length)]
        return "kept", [(first, min(first + max_length, end)) for first in range(start, end, max_length)]

    def spells_special_token(self, row: Row) -> bool:
        conversation = row.conversation
        texts = list(find_texts(conversation.messages))
        texts += conversation.other_answers
        texts += find_texts(conversation.tools)
        return any(map(self.special_token.search, texts))

    def make_batches(self, encoded: Encoded, cuts_of: dict, options_of: dict) -> dict[str, pa.RecordBatch]:
        labels = np.where(encoded.is_target, encoded.ids, np.int32(IGNORE_INDEX))
        batches = {}
        for split, cuts in cuts_of.items():
            if not cuts:
                continue
            columns = {"input_ids": list_array([encoded.ids[a:b] for a, b in cuts])}
            if not self.keeps_whole_documents:
                columns["labels"] = list_array([labels[a:b] for a, b in cuts])
            if self.keeps_options:
                columns["options"] = pa.array(options_of[split], pa.list_(pa.list_(pa.int32())))
            batches[split] = pa.RecordBatch.from_pydict(columns)
        return batches


def count_outcome(figures: Split, outcome: str, length: int, cuts: list[tuple], learned: list[tuple]) -> None:
    """Counts what became of a row of `length` tokens, of which `cuts` were taken and `learned` are kept."""
    num_cut = sum(last - first for first, last in cuts)
    num_learned = sum(last - first for first, last in learned)
    figures.rows[outcome] += 1
    figures.tokens["kept"] += num_learned
    if cuts:
        figures.tokens["no_target"] += num_cut - num_learned
        figures.tokens["truncated"] += length - num_cut
    else:
        figures.tokens[outcome] += length
    if cuts and num_cut < length:
        figures.truncated_rows += 1
    if len(cuts) > 1:
        figures.split_rows += 1


def count_before(flags: np.ndarray) -> np.ndarray:
    """How many flags are True before each place: int64 [T + 1]."""
    return np.concatenate([[0], np.cumsum(flags)])


def separate_targets(pieces: Pieces) -> list[Pieces]:
    """A row for each target, with all text before it as its prompt."""
    rows = []
    before = ""
    for text, is_target in pieces:
        if is_target:
            rows.append([(before, False), (text, True)])
        before += text
    return rows


def find_texts(value) -> Iterator[str]:
    """All texts in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from find_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from find_texts(item)


def explain_rendering(problem: Exception) -> str:
    if isinstance(problem, ValueError):
        return str(problem)
    return f"the tokenizer's chat template cannot render it ({type(problem).__name__}: {problem})"
