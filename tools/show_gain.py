"""Prints the quickstart's table: held-out loss and accuracy before and after, and one question answered by both.

python tools/show_gain.py outputs/quickstart          # reads base.json, tuned.json, base.txt and tuned.txt there
"""

import json
import sys
from pathlib import Path


def read_answer(text: str) -> tuple[str, str, str]:
    """The question, the model's answer and the expected answer of the first example in what test_sample.py printed."""
    example = text.partition("--- 1\n")[2]
    question, _, rest = example.partition("answer:")
    answer, _, expected = rest.partition("expected:")
    return question, answer.strip(), expected.strip()


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "tuned.json").is_file():
        sys.exit("error: name the folder that holds base.json and tuned.json, which scripts/quickstart.sh makes")
    folder = Path(sys.argv[1])
    print(f"\n{'':12}{'held-out loss':>15}{'accuracy':>10}{'95 % interval':>20}")
    for name in ("base", "tuned"):
        result = json.loads((folder / f"{name}.json").read_text())
        low, high = result["accuracy_interval"]
        interval = f"{low:.1%} to {high:.1%}"
        print(f"{name:12}{result['loss']:>15.4f}{result['accuracy']:>10.1%}{interval:>20}")
    print(f"({result['num_questions']} questions with four options)\n")

    _, base_answer, _ = read_answer((folder / "base.txt").read_text(encoding="utf-8"))
    question, tuned_answer, expected = read_answer((folder / "tuned.txt").read_text(encoding="utf-8"))
    print(question)
    print(f"{'base':10}{base_answer}")
    print(f"{'tuned':10}{tuned_answer}")
    print(f"{'expected':10}{expected}")


if __name__ == "__main__":
    main()
