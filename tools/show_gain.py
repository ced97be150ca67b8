"""Prints the quickstart's table: held-out loss and accuracy before and after, and one question answered by both.

    python tools/show_gain.py outputs/quickstart          # reads base.json, tuned.json, base.txt and tuned.txt there
    python tools/show_gain.py outputs/quickstart --picture docs/images/quickstart.svg
    python tools/show_gain.py outputs/quickstart --picture docs/images/quickstart_zh.svg --language zh

The picture shows the same, and the loss of every training step. It has a background of its own, so it can be read on a
dark page, too; its text stays text, so the reader's own fonts show every language.
"""

import argparse
import json
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

WORDS = {
    "en": {
        "loss": "Loss of each training step",
        "step": "optimizer step",
        "accuracy": "Right answers to {num_questions} questions that training never saw",
        "chance": "guessing",
        "base": "before",
        "tuned": "after",
        "question": "One of them:",
        "expected": "right",
    },
    "zh": {
        "loss": "每一步的训练损失",
        "step": "优化器步数",
        "accuracy": "{num_questions} 道训练时从未见过的题，答对的比例",
        "chance": "瞎猜",
        "base": "训练前",
        "tuned": "训练后",
        "question": "其中一题：",
        "expected": "正确答案",
    },
}
COLORS = {"base": "#8a8f98", "tuned": "#1f77b4"}
COLUMNS_OF_TEXT = 105


@dataclass
class Gain:
    """What the quickstart's files tell; `results` and `answers` are by name, base and tuned."""

    results: dict[str, dict]
    answers: dict[str, str]
    question: str
    expected: str


def read_answer(text: str) -> tuple[str, str, str]:
    """The question, the model's answer and the expected answer of the first example in what test_sample.py printed."""
    example = text.partition("--- 1\n")[2]
    question, _, rest = example.partition("answer:")
    answer, _, expected = rest.partition("expected:")
    return question, answer.strip(), expected.strip()


def read_gain(folder: Path) -> Gain:
    results = {}
    answers = {}
    for name in ("base", "tuned"):
        results[name] = json.loads((folder / f"{name}.json").read_text())
        question, answers[name], expected = read_answer((folder / f"{name}.txt").read_text(encoding="utf-8"))
    return Gain(results, answers, question, expected)


def print_gain(gain: Gain) -> None:
    print(f"\n{'':12}{'held-out loss':>15}{'accuracy':>10}{'95 % interval':>20}")
    for name, result in gain.results.items():
        low, high = result["accuracy_interval"]
        interval = f"{low:.1%} to {high:.1%}"
        print(f"{name:12}{result['loss']:>15.4f}{result['accuracy']:>10.1%}{interval:>20}")
    print(f"({gain.results['tuned']['num_questions']} questions with four options)\n")
    print(gain.question)
    print(f"{'base':10}{gain.answers['base']}")
    print(f"{'tuned':10}{gain.answers['tuned']}")
    print(f"{'expected':10}{gain.expected}")


# -------------------------------------------------------------------------------------------------------------------
# The picture
# -------------------------------------------------------------------------------------------------------------------


def draw(gain: Gain, history: list[dict], language: str, path: Path) -> None:
    """Writes the picture to `path`, in the format of its name; `history` is the log_history of trainer_state.json."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"  # text stays text, and a browser has fonts for every language
    plt.rcParams["svg.hashsalt"] = "quickstart"  # the same figures give the same file
    words = WORDS[language]
    figure = plt.figure(figsize=(10, 4.9))
    figure.set_facecolor("#ffffff")
    draw_loss(figure.add_axes([0.07, 0.49, 0.36, 0.41]), history, words)
    draw_accuracy(figure.add_axes([0.55, 0.49, 0.41, 0.41]), gain, words)
    draw_answers(figure, gain, words)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {}
    if path.suffix == ".svg":
        metadata["Date"] = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a PNG they would be boxes
        figure.savefig(path, metadata=metadata, dpi=110)
    plt.close(figure)


def draw_loss(axis, history: list[dict], words: dict) -> None:
    rows = [row for row in history if "loss" in row]
    axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=COLORS["tuned"], linewidth=2)
    axis.set_ylim(bottom=0)
    axis.set_title(words["loss"], fontsize=11, loc="left")
    axis.set_xlabel(words["step"], fontsize=9)
    clean(axis)


def draw_accuracy(axis, gain: Gain, words: dict) -> None:
    """Two bars with their 95 % intervals, and a line where guessing among four options would be."""
    for position, (name, result) in enumerate(gain.results.items()):
        accuracy = 100 * result["accuracy"]
        low, high = result["accuracy_interval"]
        axis.barh(position, accuracy, height=0.55, color=COLORS[name])
        axis.plot([100 * low, 100 * high], [position, position], color="#222222", linewidth=1.2)
        axis.text(100 * high + 2, position, f"{accuracy:.1f} %", va="center", fontsize=13, fontweight="bold")
    axis.axvline(25, color="#222222", linestyle=":", linewidth=1)
    axis.text(26, 1.62, words["chance"], fontsize=8, va="center", color="#444444")
    axis.set_yticks([0, 1], [words["base"], words["tuned"]], fontsize=11)
    axis.set_ylim(1.8, -0.5)  # the first on top
    axis.set_xlim(0, 118)
    axis.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    title = words["accuracy"].format(num_questions=gain.results["tuned"]["num_questions"])
    axis.set_title(title, fontsize=11, loc="left", x=-0.12)
    clean(axis)


def clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def draw_answers(figure, gain: Gain, words: dict) -> None:
    """Below the panels: the question and what the base model says in at most two lines, the others in one."""
    question = " ".join(gain.question.removeprefix("prompt:").split())
    height = 0.355
    parts = [(words["question"], question, "#222222", 2)]
    parts.append((words["base"], gain.answers["base"], COLORS["base"], 2))
    parts.append((words["tuned"], gain.answers["tuned"], COLORS["tuned"], 1))
    parts.append((words["expected"], gain.expected, "#222222", 1))
    for name, text, color, most_lines in parts:
        figure.text(0.04, height, name, fontsize=10, color=color, va="top", fontweight="bold")
        wrapped = textwrap.wrap(" ".join(text.split()), COLUMNS_OF_TEXT, max_lines=most_lines, placeholder=" …")
        for line in wrapped:
            figure.text(0.16, height, line, fontsize=10, color="#222222", va="top")
            height -= 0.05
        height -= 0.012


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with base.json, tuned.json, base.txt and tuned.txt")
    parser.add_argument("--run", type=Path, default=Path("outputs/finetune_pp_peft"), help="whose loss is drawn")
    parser.add_argument("--picture", type=Path, help="a file to draw, .svg or .png; none: only print")
    parser.add_argument("--language", choices=WORDS, default="en", help="of the picture")
    args = parser.parse_args()
    if not (args.folder / "tuned.json").is_file():
        sys.exit(f"error: {args.folder} holds no tuned.json; scripts/quickstart.sh makes outputs/quickstart")
    if args.picture and args.picture.suffix not in (".svg", ".png"):
        sys.exit(f"error: --picture {args.picture}: its name must end with .svg or .png")
    if args.picture and not (args.run / "trainer_state.json").is_file():
        sys.exit(f"error: --run {args.run} holds no trainer_state.json; name the folder of a finished run")
    gain = read_gain(args.folder)
    print_gain(gain)
    if args.picture:
        state = json.loads((args.run / "trainer_state.json").read_text())
        draw(gain, state["log_history"], args.language, args.picture)
        print(f"\npicture: {args.picture}")


if __name__ == "__main__":
    main()
