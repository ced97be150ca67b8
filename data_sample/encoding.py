"""Turns a chunk of raw rows into arrays of token ids: parse, render, tokenize, decide about length, count."""

import hashlib
import re
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa

from data_sample.fields import check_row, read_messages
from data_sample.ledger import Language, Ledger
from data_sample.reading import RawRow, name_place, parse_row
from data_sample.rendering import adds_bos, render_answers, render_chat, render_messages, render_plain

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
    conversations: list[list[dict]]  # with the right answer; then with each wrong one, where options are kept
    answer: str
    said: str  # what the file says, without templates: it tells the language
    pieces: list[tuple[str, bool]] = field(default_factory=list)  # texts that follow one another; is it a target?
    options: list[str] = field(default_factory=list)  # the completions of the wrong answers


@dataclass
class Encoded:
    """The ids of all rows of a chunk, one behind the other, and where each row lies in them."""

    rows: list[Row]
    ids: np.ndarray  # int32 [T]
    is_target: np.ndarray  # bool [T]
    ends: list[int]  # of each row; it starts where the row before it ends
    options: list[list[list[int]]]  # of each row the ids of its options, the right one first


@dataclass
class ChunkResult:
    batches: dict[str, pa.RecordBatch]  # of each split that got rows
    ledger: Ledger  # the chunk's share of every figure
    complaints: list[str]  # one for each broken row


class Tokenization:
    """All that turns a chunk of raw rows into arrays. Call it with what read_chunks yields.

    Args:
        args: the arguments of tokenize_dataset.py.
        tokenizer: its backend is set up for this work, so it must not be used for anything else.
        template: what make_template returned.
        paths: the input's files.
        splits: train, or train and val.

    Raises:
        ValueError: a row is broken or too long, and that is to be an error.
    """

    def __init__(self, args, tokenizer, template: dict, paths: list[str], splits: list[str]):
        self.args = args
        self.tokenizer = tokenizer
        self.template = template
        self.paths = paths
        self.splits = splits
        self.with_bos = adds_bos(tokenizer)
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

    @property
    def columns(self) -> list[str]:
        """The columns of the rows that are written, after packing."""
        columns = ["input_ids"]
        if not self.keeps_whole_documents:
            columns.append("labels")
        if self.args.packing:
            columns.append("position_ids")
        if self.keeps_options:
            columns.append("options")
        return columns

    def __call__(self, chunk: list[RawRow]) -> ChunkResult:
        ledger = Ledger()
        complaints = []
        rows = []
        for raw in chunk:
            try:
                content = parse_row(raw.content, self.paths[raw.file])
                check_row(content, self.args.format)
                rows.append(self.make_row(content, raw))
            except ValueError as problem:
                complaints.append(f"{self.name(raw)}: {problem}")
        rows = self.render(rows, complaints)
        if complaints and self.args.on_bad_row == "error":
            raise ValueError(f"{complaints[0]}\n--on_bad_row skip goes on without such rows, and counts them")
        ledger.rows_in = len(chunk)
        ledger.rows_broken = len(complaints)
        encoded = self.encode(rows)
        self.count_languages(encoded, ledger)
        return ChunkResult(self.choose(encoded, ledger), ledger, complaints)

    def name(self, raw: RawRow) -> str:
        return name_place(self.paths[raw.file], raw.number)

    def make_row(self, content: dict, raw: RawRow) -> Row:
        if self.args.format == "text":
            text = content["text"]
            return Row(raw, [[{"role": "document", "content": text}]], text, text)
        if self.args.format == "chat":
            messages = read_messages(content)
            said = "".join(message["content"] for message in messages)
            return Row(raw, [messages], messages[-1]["content"], said)
        prompt = render_messages(content, self.template)
        answers = render_answers(content, self.template)
        if not self.keeps_options:
            answers = answers[:1]
        conversations = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
        said = "".join(text for text in content.values() if isinstance(text, str))
        return Row(raw, conversations, answers[0], said)

    # --- texts ---

    def render(self, rows: list[Row], complaints: list[str]) -> list[Row]:
        """Gives the rows their texts.

        Returns:
            the rows that the chat template could render. The others become complaints.
        """
        from jinja2 import TemplateError

        try:
            rendered = self.render_conversations(rows)
        except (ValueError, TemplateError):
            # One of the rows is to blame. Rendered one by one they tell which.
            good_rows = []
            for row in rows:
                try:
                    self.render_conversations([row])
                    good_rows.append(row)
                except (ValueError, TemplateError) as problem:
                    complaints.append(f"{self.name(row.raw)}: {problem}")
            rows = good_rows
            rendered = self.render_conversations(rows)
        rendered = iter(rendered)
        for row in rows:
            row.pieces, *others = [next(rendered) for _ in row.conversations]
            row.options = [pieces[1][0] for pieces in others]
        return rows

    def render_conversations(self, rows: list[Row]) -> list[list[tuple[str, bool]]]:
        conversations = list(chain.from_iterable(row.conversations for row in rows))
        if self.args.format == "text":
            return [[(messages[0]["content"], True)] for messages in conversations]
        if not self.template["chat"]:
            return [render_plain(self.tokenizer, messages) for messages in conversations]
        if not conversations:
            return []
        return render_chat(self.tokenizer, conversations, every_turn=self.args.format == "chat")

    # --- ids ---

    def encode(self, rows: list[Row]) -> Encoded:
        bos = self.tokenizer.bos_token_id
        pairs = []
        for row in rows:
            texts = ["", *(text for text, _ in row.pieces)]
            pairs += pairwise(texts)
            pairs += [(texts[1], option) for option in row.options]
        encoded = iter(encode_behind(self.tokenizer, pairs))

        parts = []
        is_target = []
        lengths = []
        options = []
        for row in rows:
            row_parts = [next(encoded) for _ in row.pieces]
            row_options = [next(encoded) for _ in row.options]
            if self.args.format == "text":
                row_parts[0] = [*row_parts[0], self.tokenizer.eos_token_id]
            if self.with_bos and row_parts[0][:1] != [bos]:  # a chat template may have written it
                row_parts[0] = [bos, *row_parts[0]]
            options.append([row_parts[-1], *row_options])
            parts += row_parts
            is_target += [target or self.args.train_on_prompt for _, target in row.pieces]
            lengths.append(sum(map(len, row_parts)))
        part_lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.fromiter(chain.from_iterable(parts), np.int32, int(part_lengths.sum()))
        is_target = np.repeat(np.array(is_target, bool), part_lengths)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        return Encoded(rows, ids, is_target, ends, options)

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
        eos = self.tokenizer.eos_token_id
        bos = self.tokenizer.bos_token_id
        ids = encoded.ids
        targets_before = count_before(encoded.is_target)
        eos_before = count_before(encoded.is_target & (ids == eos))
        cuts_of = {split: [] for split in self.splits}  # start and end of each row that is written
        options_of = {split: [] for split in self.splits}
        start = 0
        for row, end, options in zip(encoded.rows, encoded.ends, encoded.options, strict=True):
            split = self.draw_split(row.raw)
            figures = ledger.splits[split]
            fate, cuts = self.cut(row, start, end)
            learned = []
            for a, b in cuts:
                # The first token of a row is never predicted, whatever its label.
                if self.keeps_whole_documents or targets_before[b] > targets_before[a + 1]:
                    learned.append((a, b))
            num_cut = sum(b - a for a, b in cuts)
            num_learned = sum(b - a for a, b in learned)
            ledger.tokens_in += end - start
            ledger.lengths[end - start] += 1
            figures.tokens["kept"] += num_learned
            if cuts:
                figures.tokens["no_target"] += num_cut - num_learned
                figures.tokens["truncated"] += end - start - num_cut
            else:
                figures.tokens[fate] += end - start
            if cuts and not learned:
                fate = "no_target"
            figures.rows[fate] += 1
            if cuts and num_cut < end - start:
                figures.truncated_rows += 1
            if len(cuts) > 1:
                figures.split_rows += 1
            for a, b in learned:
                figures.documents += 1
                figures.targets += int(targets_before[b] - targets_before[a + 1])
                if eos_before[b] == eos_before[a + 1]:
                    figures.without_eos_target += 1
                num_bos = 0
                if ids[a] == bos:
                    num_bos = 1
                    if b > a + 1 and ids[a + 1] == bos:
                        num_bos = 2
                figures.bos_at_start[num_bos] += 1
            cuts_of[split] += learned
            options_of[split] += [options] * len(learned)
            start = end
        return self.make_batches(encoded, cuts_of, options_of)

    def draw_split(self, raw: RawRow) -> str:
        """Drawn by the row's place in the input, so the same for every number of workers and machines."""
        place = (raw.file, raw.number)
        digest = hashlib.blake2b(f"{self.args.seed} {place}".encode(), digest_size=8).digest()
        if int.from_bytes(digest) < self.args.val_size * 2**64:
            return "val"
        return "train"

    def cut(self, row: Row, start: int, end: int) -> tuple[str, list[tuple[int, int]]]:
        """What happens to a row of ids from `start` to `end`: its fate, and where the rows made of it start and end."""
        length = end - start
        max_length = self.args.max_length
        if not row.answer.strip() and self.args.format != "chat":
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
        for messages in row.conversations:
            for message in messages:
                if self.special_token.search(message["content"]):
                    return True
        return False

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


def count_before(flags: np.ndarray) -> np.ndarray:
    """How many flags are True before each place: int64 [T + 1]."""
    return np.concatenate([[0], np.cumsum(flags)])
