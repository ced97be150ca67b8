"""The ledger of a tokenized set: what came in, what was kept, and for which reason the rest was lost.

Each worker counts its own chunk in a Ledger, and the main process adds them up. `summarize` makes of it what stands in
ledger.json; it raises AssertionError if rows or tokens do not add up.
"""

import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

from data_sample.fields import FieldCounts

# Where a row or a token can go besides "kept", and what the printed table calls it.
LOST = {
    "broken": "dropped: broken row",
    "no_target": "dropped: nothing to learn (empty answer or text)",
    "special_token": "dropped: text spells a special token",
    "too_long": "dropped: longer than --max_length",
    "truncated": "cut off: beyond --max_length",
    "other_split": "in the other split (--val_size)",
}
# Where a pair of answers can go besides.
LOST_PAIRS = {
    "no_common_beginning": "dropped: conversations without a common beginning",
    "equal_answers": "dropped: both answers are equal",
    "rewritten": "dropped: template rewrites turns of an answer",
}


@dataclass
class Language:
    """Figures of the rows in one language; the words of a template count as well."""

    rows: int = 0
    characters: int = 0
    tokens: int = 0
    unknown: int = 0  # tokens that stand for what the vocabulary lacks
    fragments: int = 0  # tokens that are a part of a character

    def add(self, other: "Language") -> None:
        for figure in fields(self):
            setattr(self, figure.name, getattr(self, figure.name) + getattr(other, figure.name))


@dataclass
class Split:
    """What became of the rows that fell to one split."""

    rows: Counter = field(default_factory=Counter)  # by outcome: kept, or a reason of LOST
    tokens: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # for each outcome the place of the first such row
    documents: int = 0  # rows that were made, before packing
    targets: int = 0  # tokens that are learned
    truncated_rows: int = 0
    split_rows: int = 0
    without_eos_target: int = 0  # documents in which no EOS is learned
    bos_at_start: Counter = field(default_factory=Counter)  # documents by the number of BOS that they begin with
    document_tokens: int = 0  # of the documents of pairs, in each of which the prompt stands
    answers: Counter = field(default_factory=Counter)  # preference: answers that are kept, by what they are
    answer_tokens: Counter = field(default_factory=Counter)

    def add(self, other: "Split") -> None:
        self.rows.update(other.rows)
        self.tokens.update(other.tokens)
        self.examples = {**other.examples, **self.examples}
        self.documents += other.documents
        self.targets += other.targets
        self.truncated_rows += other.truncated_rows
        self.split_rows += other.split_rows
        self.without_eos_target += other.without_eos_target
        self.bos_at_start.update(other.bos_at_start)
        self.document_tokens += other.document_tokens
        self.answers.update(other.answers)
        self.answer_tokens.update(other.answer_tokens)


@dataclass
class Ledger:
    """All figures of a set, or of a chunk of it."""

    rows_in: int = 0  # a conversation that becomes several rows counts as several
    rows_broken: int = 0
    tokens_in: int = 0
    conversations: int = 0  # that were read, and
    conversation_rows: int = 0  # the rows that they became
    stripped_eos: int = 0  # texts that ended with EOS, which is written anyway
    in_open_think: int = 0  # targets without reasoning behind a prompt that ends inside <think>
    fields_in: int = 0  # values in all fields of all rows and messages
    fields_broken: int = 0  # those in broken rows
    fields: FieldCounts = field(default_factory=FieldCounts)
    splits: dict[str, Split] = field(default_factory=lambda: {"train": Split(), "val": Split()})
    lengths: Counter = field(default_factory=Counter)  # rows that came in, by their number of tokens
    languages: dict[str, Language] = field(default_factory=dict)
    of_preferences: bool = False

    def add(self, other: "Ledger") -> None:
        self.of_preferences = self.of_preferences or other.of_preferences
        self.rows_in += other.rows_in
        self.rows_broken += other.rows_broken
        self.tokens_in += other.tokens_in
        self.conversations += other.conversations
        self.conversation_rows += other.conversation_rows
        self.stripped_eos += other.stripped_eos
        self.in_open_think += other.in_open_think
        self.fields_in += other.fields_in
        self.fields_broken += other.fields_broken
        self.fields.add(other.fields)
        for name, split in other.splits.items():
            self.splits[name].add(split)
        self.lengths.update(other.lengths)
        for name, language in other.languages.items():
            self.languages.setdefault(name, Language()).add(language)

    @property
    def reasons(self) -> list[str]:
        if self.of_preferences:
            return [*LOST, *LOST_PAIRS]
        return list(LOST)

    def balance_rows(self, split: str) -> dict[str, int]:
        """Rows that came in, were kept in `split`, and were lost to it for each reason."""
        balance = {"in": self.rows_in, "kept": self.splits[split].rows["kept"]}
        for reason in self.reasons:
            if reason != "truncated":  # a row that lost tokens is kept, and counted in truncated_rows
                balance[reason] = sum(part.rows[reason] for part in self.splits.values())
        balance["broken"] = self.rows_broken
        balance["other_split"] = self.kept_elsewhere(split).rows["kept"]
        check_balance(balance)
        return balance

    def balance_tokens(self, split: str) -> dict[str, int]:
        """The same for tokens. A broken row has none."""
        balance = {"in": self.tokens_in, "kept": self.splits[split].tokens["kept"]}
        for reason in self.reasons:
            balance[reason] = sum(part.tokens[reason] for part in self.splits.values())
        balance["other_split"] = self.kept_elsewhere(split).tokens["kept"]
        check_balance(balance)
        return balance

    def balance_fields(self) -> dict[str, int]:
        """Values that came in, and what became of them."""
        balance = {
            "in": self.fields_in,
            "used": sum(self.fields.used.values()),
            "ignored": sum(self.fields.ignored.values()),
            "not_used": sum(self.fields.not_used.values()),
            "broken": self.fields_broken,
        }
        check_balance(balance)
        return balance

    def kept_elsewhere(self, split: str) -> Split:
        (other,) = [part for name, part in self.splits.items() if name != split]
        return other


def check_balance(balance: dict[str, int]) -> None:
    found = sum(balance.values()) - balance["in"]
    assert balance["in"] == found, f"the ledger does not balance: {balance}"


def summarize(ledger: Ledger, split: str, num_rows: int, longest_row: int, row_length: int | None) -> dict:
    """What ledger.json says about one split.

    Args:
        num_rows: rows that were written.
        longest_row: tokens of the longest one.
        row_length: the length that all written rows should have, if they are packed.
    """
    part = ledger.splits[split]
    if ledger.of_preferences:
        filled = part.document_tokens / max(1, part.documents * longest_row)
    else:
        filled = part.tokens["kept"] / max(1, num_rows * (row_length or longest_row))
    figures = {
        "rows": ledger.balance_rows(split),
        "tokens": ledger.balance_tokens(split),
        "fields": ledger.balance_fields(),
        "fields_not_used": sorted_counts(ledger.fields.not_used),
        "fields_ignored": sorted_counts(ledger.fields.ignored),
        "conversations": {"in": ledger.conversations, "rows": ledger.conversation_rows},
        "stripped_eos": ledger.stripped_eos,
        "answers_in_open_think": ledger.in_open_think,
        "targets": part.targets,
        "rows_written": num_rows,
        "longest_row_written": longest_row,
        # Of the positions that rows of one length would have: --max_length if packed, else the longest row's.
        "filled": filled,
        "truncated_rows": part.truncated_rows,
        "split_rows": part.split_rows,
        "documents": part.documents,  # as many as rows_written, unless rows are packed; two for each pair
        "share_without_eos_target": part.without_eos_target / max(1, part.documents),
        "bos_at_start": {str(number): part.bos_at_start[number] for number in (0, 1, 2)},
        "length_histogram": length_histogram(ledger.lengths),  # of all rows that came in, cut or not
        "languages": {name: vars(language) for name, language in sorted(ledger.languages.items())},
    }
    if ledger.of_preferences:
        figures["answers"] = {}
        for name in sorted(part.answers):
            figures["answers"][name] = {"rows": part.answers[name], "tokens": part.answer_tokens[name]}
    return figures


def sorted_counts(counts: Counter) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def explain_empty_split(ledger: Ledger, split: str) -> str:
    """Why no row of a split was kept: the largest reason, an example and what to do."""
    labels = LOST | LOST_PAIRS
    lost = {reason: number for reason, number in ledger.balance_rows(split).items() if reason in labels}
    reason = max(lost, key=lost.get)
    remedies = {
        "broken": "mend the rows that are named above",
        "no_target": "each row needs an answer, or a text, that is not empty, and a turn that is learned",
        "special_token": "take such texts out of the rows, or train another model whose special tokens are others",
        "too_long": f"raise --max_length, up to {max(ledger.lengths, default=0)} for the longest row, or choose "
        "--on_long truncate or split",
        "other_split": "choose another --val_size",
        "no_common_beginning": "both conversations begin with the same prompt; or put it into a field prompt",
        "equal_answers": "a pair needs two answers that differ",
        "rewritten": "give pairs whose answers have one turn, with the turns before in the prompt",
    }
    if ledger.of_preferences:
        remedies["too_long"] = f"raise --max_length, up to {max(ledger.lengths, default=0)} for the longest row"
    example = ""
    for part in ledger.splits.values():
        if reason in part.examples:
            example = f" (the first: {part.examples[reason]})"
    return f"{labels[reason]}: {lost[reason]:,} of {ledger.rows_in:,} rows{example}; {remedies[reason]}"


def length_histogram(lengths: Counter) -> dict[str, int]:
    histogram = {}
    for length in sorted(lengths):
        name = length_bin(length)
        histogram[name] = histogram.get(name, 0) + lengths[length]
    return histogram


def length_bin(length: int) -> str:
    """Names the range of a length, such as 65-96 or 97-128: two to each doubling."""
    low = 0
    high = 1
    while length > high:
        low = high
        is_power_of_two = high & (high - 1) == 0
        if is_power_of_two:
            high = max(high + 1, high * 3 // 2)
        else:
            high = high * 4 // 3
    if high == low + 1:
        return str(high)
    return f"{low + 1}-{high}"


# -------------------------------------------------------------------------------------------------------------------
# What is printed
# -------------------------------------------------------------------------------------------------------------------


def print_ledger(ledger: dict, output: Path) -> None:
    """The tables at the end of a run. What is zero and would say nothing is left out.

    Args:
        ledger: what stands in ledger.json.
    """
    not_read = ledger["files_not_read"]
    if not_read:
        print(f"not read: {len(not_read)} files, such as {not_read[0]}")
    print_balance(ledger)
    print_fields(ledger)
    print_lengths(ledger["length_histogram"])
    print_languages(ledger["languages"])
    if ledger["documents"]:
        print_ends(ledger)
    for name, figures in ledger.get("answers", {}).items():
        print(f"{name} answers: {figures['rows']:,}, on average {figures['tokens'] / figures['rows']:.1f} tokens")
    print(f"{ledger['targets']:,} target tokens in {ledger['rows_written']:,} written rows: {output}")


def print_balance(ledger: dict) -> None:
    print(f"\n{'':54}{'rows':>12}{'tokens':>16}")
    for reason, label in {"in": "came in", "kept": "kept", **LOST, **LOST_PAIRS}.items():
        num_rows = ledger["rows"].get(reason, 0)
        num_tokens = ledger["tokens"].get(reason, 0)
        if num_rows or num_tokens or reason in ("in", "kept"):
            print(f"{label:54}{num_rows:>12,}{num_tokens:>16,}")
    num_truncated = ledger["truncated_rows"]
    num_split = ledger["split_rows"]
    if num_truncated or num_split:
        print(f"kept rows that were cut: {num_truncated:,} at the end, {num_split:,} into several")


def print_fields(ledger: dict) -> None:
    """What the rows hold beside question and answer, and what became of it."""
    not_used = [f"{name} in {number:,}" for name, number in ledger["fields_not_used"].items()]
    if not_used:
        print(f"not used: {', '.join(not_used)} rows or messages")
    ignored = [f"{name} in {number:,}" for name, number in ledger["fields_ignored"].items()]
    if ignored:
        print(f"names and sources, ignored on purpose: {', '.join(ignored)}")
    conversations = ledger["conversations"]
    if conversations["rows"] > conversations["in"]:
        print(f"{conversations['in']:,} conversations became {conversations['rows']:,} rows, because the chat template "
              "rewrites earlier turns: a row for each learned turn, as serving sends it")  # fmt: skip
    if ledger["stripped_eos"]:
        print(f"texts that ended with EOS, which is written once: {ledger['stripped_eos']:,}")
    if ledger["answers_in_open_think"]:
        print(f"{ledger['answers_in_open_think']:,} answers have no reasoning, and the chat template's generation "
              "prompt ends inside <think>: the model learns to answer without closing it")  # fmt: skip


def print_lengths(histogram: dict[str, int]) -> None:
    print("\ntokens in a row that came in")
    highest = max(histogram.values(), default=1)
    for name, count in histogram.items():
        print(f"{name:>15} {count:>10,} {'#' * round(50 * count / highest)}")


def print_languages(languages: dict[str, dict]) -> None:
    print(f"\n{'language':12}{'rows':>10}{'tokens for 100 characters':>28}{'unknown':>10}{'parts of characters':>22}")
    for name, figures in languages.items():
        tokens_per_100 = 100 * figures["tokens"] / max(1, figures["characters"])
        unknown = 100 * figures["unknown"] / max(1, figures["tokens"])
        fragments = 100 * figures["fragments"] / max(1, figures["tokens"])
        print(f"{name:12}{figures['rows']:>10,}{tokens_per_100:>28.1f}{unknown:>8.2f} %{fragments:>20.2f} %")
        if unknown + fragments > 10:
            print(f"  This tokenizer was hardly made for {name}: look for a model that was.")


def print_ends(ledger: dict) -> None:
    bos = ledger["bos_at_start"]
    print(f"\nBOS at the start: none in {bos['0']:,} rows, one in {bos['1']:,}, two (wrong) in {bos['2']:,}; "
          f"rows without EOS as a target: {ledger['share_without_eos_target']:.1%}")  # fmt: skip
    width = "if padded to the longest of all"
    if ledger["packing"]:
        width = f"of --max_length {ledger['max_length']}"
    print(f"longest written row: {ledger['longest_row_written']:,} tokens; filled {width}: {ledger['filled']:.1%}")


def plot_lengths(ledger: dict, path: Path) -> None:
    """The printed histogram as a PNG file."""
    import matplotlib

    matplotlib.use("agg")  # no window
    from matplotlib import pyplot

    histogram = ledger["length_histogram"]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.bar(list(histogram), list(histogram.values()))
    axes.set(xlabel="tokens in a row that came in", ylabel="rows", title=Path(ledger["input"]).name)
    axes.tick_params(axis="x", rotation=60)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".tmp"), format="png")
    os.replace(path.with_suffix(".tmp"), path)
