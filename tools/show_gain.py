"""Prints the quickstart's table: held-out loss and accuracy before and after, and one question answered by both.

python tools/show_gain.py outputs/quickstart          # reads base.json, tuned.json, base.txt and tuned.txt there
"""

import json
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "tuned.json").is_file():
        sys.exit("error: name the folder that holds base.json and tuned.json, which scripts/quickstart.sh makes")
    folder = Path(sys.argv[1])
    print(f"\n{'':12}{'held-out loss':>15}{'accuracy':>10}{'95 % interval':>20}")
    for name in ("base", "tuned"):
        result = json.loads((folder / f"{name}.json").read_text())
        low, high = result["accuracy_interval"]
        print(f"{name:12}{result['loss']:>15.4f}{result['accuracy']:>10.1%}{f'{low:.1%} to {high:.1%}':>20}")
    print(f"({result['num_questions']} questions with four options)\n")

    texts = {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("base", "tuned")}
    question, _, rest = texts["tuned"].partition("--- 1\n")[2].partition("answer:")
    print(question)
    for name, text in texts.items():
        print(f"{name:10}{text.partition('answer:')[2].partition('expected:')[0].strip()}")
    print(f"{'expected':10}{rest.partition('expected:')[2].strip()}")


if __name__ == "__main__":
    main()
