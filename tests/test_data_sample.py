"""The shipped sample data: shape and balance, and that neither wording nor a near-copy in training tells answers."""

import json
import os
import re
from collections import Counter, defaultdict

import pytest
from conftest import ROOT

FIELDS = {"id": str, "sent1": str, "sent2": str} | {f"ending{i}": str for i in range(4)} | {"label": int}


def read_jsonl(name: str) -> list[dict]:
    lines = (ROOT / "data_sample" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TRAIN, TEST = read_jsonl("triage_train.jsonl"), read_jsonl("triage_test.jsonl")
INSTRUCTIONS = json.loads((ROOT / "data_sample" / "instruct_zh_en.json").read_text(encoding="utf-8"))
PAIRS = {"train": read_jsonl("preference_zh_en.jsonl"), "test": read_jsonl("preference_zh_en_test.jsonl")}
both_sets = pytest.mark.parametrize("rows", [TRAIN, TEST], ids=["train", "test"])


def options(row: dict) -> list[str]:
    return [row[f"ending{i}"] for i in range(4)]


def department(row: dict) -> str:
    return options(row)[row["label"]]


def word_grams(text: str, length: int = 5) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + length]) for start in range(max(1, len(words) - length + 1))}


def highest_overlaps(texts: list[str], others: list[str]) -> tuple[float, float]:
    """Highest Jaccard overlap of 5-grams over all pairs, and highest share of the shorter text's that both have."""
    holders = defaultdict(list)  # only pairs that share a 5-gram are ever compared
    other_grams = [word_grams(text) for text in others]
    for number, grams in enumerate(other_grams):
        for gram in grams:
            holders[gram].append(number)
    jaccard = containment = 0.0
    for grams in map(word_grams, texts):
        shared = Counter(number for gram in grams for number in holders[gram])
        for number, count in shared.items():
            jaccard = max(jaccard, count / len(grams | other_grams[number]))
            containment = max(containment, count / min(len(grams), len(other_grams[number])))
    return jaccard, containment


def test_there_are_enough_questions_departments_and_complaints():
    assert len(TRAIN) >= 300
    assert len(TEST) >= 120
    assert len({department(row) for row in TRAIN}) >= 8
    assert {department(row) for row in TEST} <= {department(row) for row in TRAIN}
    assert len({row["sent1"] for row in TRAIN + TEST}) >= 160
    assert len({row["sent1"] for row in TRAIN}) >= 160


@both_sets
def test_every_question_has_the_fields_of_the_format(rows):
    for row in rows:
        assert {name: type(value) for name, value in row.items()} == FIELDS, row["id"]
        assert row["label"] in range(4), row["id"]
        assert all(value.strip() == value != "" for value in row.values() if isinstance(value, str)), row["id"]


def test_no_id_occurs_twice():
    assert max(Counter(row["id"] for row in TRAIN + TEST).values()) == 1


@both_sets
def test_no_question_offers_an_option_twice(rows):
    assert [row["id"] for row in rows if len(set(options(row))) != 4] == []


@both_sets
def test_the_right_answer_stands_at_each_position_equally_often(rows):
    counts = Counter(row["label"] for row in rows)
    assert all(abs(counts[position] - len(rows) / 4) <= 2 for position in range(4)), counts


def test_overlap_is_measured_as_defined():
    # 6 and 5 words: 2 and 1 five-grams, of which they share one.
    assert highest_overlaps(["a b c d e f"], ["A, b c d e!"]) == (0.5, 1.0)
    assert highest_overlaps(["a b c d e f"], ["f e d c b a"]) == (0.0, 0.0)
    assert highest_overlaps(["too short"], ["too short", "other"]) == (1.0, 1.0)


def test_no_test_complaint_was_seen_in_training():
    seen, unseen = ({row["sent1"].lower() for row in rows} for rows in (TRAIN, TEST))
    assert seen & unseen == set()
    jaccard, containment = highest_overlaps(sorted(seen), sorted(unseen))
    assert jaccard <= 0.5
    assert containment <= 0.5


def test_the_wording_of_the_question_does_not_tell_the_answer():
    departments = defaultdict(set)
    for row in TRAIN:
        departments[row["sent2"]].add(department(row))
    assert min(len(names) for names in departments.values()) >= 6
    assert {row["sent2"] for row in TEST} <= departments.keys()


def test_choosing_the_usual_department_of_a_wording_fails():
    frequency = Counter((row["sent2"], department(row)) for row in TRAIN)
    guesses = [max(options(row), key=lambda name: frequency[row["sent2"], name]) for row in TEST]
    accuracy = sum(guess == department(row) for guess, row in zip(guesses, TEST, strict=True)) / len(TEST)
    assert accuracy < 0.40


def test_choosing_the_option_that_is_most_often_right_fails():
    frequency = Counter(map(department, TRAIN))
    right = sum(max(options(row), key=frequency.get) == department(row) for row in TEST)
    assert right / len(TEST) < 0.40


def test_the_instructions_are_in_both_languages_and_all_different():
    chinese = [row for row in INSTRUCTIONS if re.search(r"[\u4e00-\u9fff]", row["instruction"])]
    assert len(INSTRUCTIONS) >= 60
    assert len(chinese) >= 25
    assert len(INSTRUCTIONS) - len(chinese) >= 25
    assert len({(row["instruction"].lower(), row["input"].lower()) for row in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert len({row["output"] for row in INSTRUCTIONS}) == len(INSTRUCTIONS)


def test_every_instruction_has_the_fields_of_the_format():
    for row in INSTRUCTIONS:
        assert list(row) == ["instruction", "input", "output"]
        assert all(isinstance(text, str) for text in row.values())
        assert row["instruction"].strip() and row["output"].strip()


# -------------------------------------------------------------------------------------------------------------------
# Pairs of answers
# -------------------------------------------------------------------------------------------------------------------

both_halves = pytest.mark.parametrize("half", PAIRS)
# When to see a doctor, in words that the answers use for it.
WARNING = re.compile(
    r"ambulance|emergency|hospital|doctor|dentist|midwife|surgeon|podiatrist|clinic|practice|crisis line|appointment|"
    r"examin|X-ray|assess|treated|infection that|checked|tested|be seen|investigated|a look|looked at|review|"
    r"dealt with|medical help|endoscopy|professional|"
    r"急诊|急救|120|救护车|就医|就诊|医院|医生|检查|复诊|科|门诊|查|求助|拍片|胃镜|看", re.IGNORECASE
)  # fmt: skip


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


@both_halves
def test_pairs_are_enough_and_half_chinese(half):
    rows = PAIRS[half]
    assert len(rows) >= {"train": 80, "test": 40}[half]
    assert sum(is_chinese(row["prompt"]) for row in rows) * 2 == len(rows)
    for row in rows:
        assert list(row) == ["id", "prompt", "chosen", "rejected"]
        assert len({is_chinese(row[name]) for name in ("prompt", "chosen", "rejected")}) == 1, row["id"]
        assert all(text.strip() == text != "" for text in row.values()), row["id"]


def test_no_condition_and_no_text_stands_in_both_halves():
    conditions = {}
    texts = {}
    for half, rows in PAIRS.items():
        conditions[half] = {row["id"].split("-", 2)[2] for row in rows}
        texts[half] = [row[name].lower() for row in rows for name in ("prompt", "chosen", "rejected")]
        assert len(set(texts[half])) == len(texts[half])
        assert len({row["id"] for row in rows}) == len(rows)
    assert conditions["train"] & conditions["test"] == set()
    jaccard, containment = highest_overlaps(texts["train"], texts["test"])
    assert jaccard <= 0.3 and containment <= 0.5


@both_halves
@pytest.mark.parametrize("chinese", [False, True], ids=["English", "Chinese"])
def test_the_length_of_an_answer_does_not_tell_whether_it_is_chosen(half, chinese):
    rows = [row for row in PAIRS[half] if is_chinese(row["prompt"]) == chinese]
    num_longer = 0
    for row in rows:
        assert 0.75 < len(row["chosen"]) / len(row["rejected"]) < 1.34, row["id"]
        num_longer += len(row["chosen"]) > len(row["rejected"])
    assert 0.25 < num_longer / len(rows) < 0.7
    mean = sum(len(row["chosen"]) - len(row["rejected"]) for row in rows) / len(rows)
    assert abs(mean) < 0.02 * sum(len(row["chosen"]) for row in rows) / len(rows)


@both_halves
def test_the_chosen_answer_alone_says_when_to_see_a_doctor(half):
    num_in_rejected = 0
    for row in PAIRS[half]:
        # What only one of the two answers says: they may give the same advice.
        start = len(os.path.commonprefix([row["chosen"], row["rejected"]]))
        assert WARNING.search(row["chosen"][start:]), row["id"]
        num_in_rejected += WARNING.search(row["rejected"][start:]) is not None
    assert num_in_rejected / len(PAIRS[half]) < 0.15


@both_halves
def test_no_phrase_tells_the_chosen_answers(half):
    """No run of five words (or of eight characters of Chinese) stands in many of them."""
    found = Counter()
    for row in PAIRS[half]:
        if is_chinese(row["chosen"]):
            grams = {row["chosen"][start : start + 8] for start in range(len(row["chosen"]) - 7)}
        else:
            grams = {" ".join(gram) for gram in word_grams(row["chosen"])}
        found.update(grams)
    assert max(found.values()) <= 0.08 * len(PAIRS[half]), found.most_common(3)
