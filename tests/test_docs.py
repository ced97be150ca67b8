"""README.md, README_zh.md and docs/: every command is run as it stands there. Figures are those that were printed.

The commands run in a copy of the repository whose sample model is tiny, one page after the other, where the quickstart
has been run. Those of docs/, and those of a minute and more, are marked `slow`. NOT_RUN names those that cannot run
here, and says why.
"""

import functools
import json
import re
import shlex
import subprocess
import time
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT, run_script
from repository_copy import copy_repository, run

pytestmark = pytest.mark.xdist_group("docs")  # one worker, so that its slow fixture is made once
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if "_zh" not in path.name)]
TRANSLATED = [page for page in PAGES if (ROOT / page.replace(".md", "_zh.md")).exists()]
PROGRAMS = "python bash sh source echo printf cp pip pytest sbatch torchrun conda uv export vllm ollama llama-cli"
PROGRAM = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS.split())}|text-generation-launcher) ")

NEEDS_EIGHT_GPUS = "8 A100; tests/test_launchers.py starts it on CPU processes"
TWO_MACHINES = "two machines; tests/test_two_machines.py has two on one"
NEEDS_NETWORK = "it downloads programs into environments of their own"
NEEDS_GPU = "a GPU"
OF_THE_SHELL = "sets a variable for the reader's own network, Python or model"
HALF_AN_HOUR = "the tests themselves, which have markers of their own"
RECORD = "the command of a record, with data that is not in the repository"
NOT_RUN = {
    "bash scripts/test.sh": "it would start these tests; .ci/run does it",
    "sh scripts/finetune_pp.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_peft.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_peft_trainer.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_peft_trainer_checkpointing.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_peft_trainer_lora.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_peft_trainer_deepspeed.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_1f1b.sh": NEEDS_EIGHT_GPUS,
    "sh scripts/finetune_pp_dpo.sh": NEEDS_EIGHT_GPUS,
    "sbatch --nodes 2 scripts/slurm.sbatch": "Slurm; tests/test_launchers.py runs it with a stand-in for srun",
    "NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 sh scripts/finetune_pp_1f1b.sh": TWO_MACHINES,
    "NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 sh scripts/finetune_pp_1f1b.sh": TWO_MACHINES,
    "python convert_llama_weights_to_hf.py --input_dir Llama3.1-8B-Instruct --output_dir models/Llama-3.1-8B-Instruct":
        "a download of Meta's; tests/test_convert_llama_weights_to_hf.py runs it on a small checkpoint",
    "python tools/convert_hf_to_meta.py --num_shards 2 --input_dir models/Llama-3.1-8B-Instruct --output_dir meta":
        "the same test runs it",
    "bash benchmarks/install_peers.sh": NEEDS_NETWORK,
    "python benchmarks/compare.py --data alpaca.json --steps 6 --rounds 2 --peers trl,trl-packing,llamafactory":
        NEEDS_NETWORK,
    "python benchmarks/preferences.py --threads 1": NEEDS_NETWORK,
    "python benchmarks/check_lm_eval.py --peft_path outputs/finetune_pp_peft": NEEDS_NETWORK,
    "python benchmarks/check_llama_cpp.py outputs/gguf/model-f16.gguf outputs/merged": NEEDS_NETWORK,
    "vllm serve outputs/merged": NEEDS_GPU,
    "text-generation-launcher --model-id outputs/merged": NEEDS_GPU,
    "llama-cli -m outputs/gguf/model-f16.gguf -cnv": "llama.cpp, and a conversation; check_llama_cpp.py reads the file",
    "ollama create mine -f Modelfile": "Ollama's server",
    "python benchmarks/gpu.py --page docs/gpu.md": "a GPU; tests/test_gpu_benchmark.py goes through it with --dry True",
    "pip install bitsandbytes": NEEDS_NETWORK,
    "pip install -e .": "of the original guide",
    "uv python install 3.12": NEEDS_NETWORK,
    "PYTHON=/path/to/python3.12 bash scripts/quickstart.sh": OF_THE_SHELL,
    "export HTTPS_PROXY=http://HOST:PORT": OF_THE_SHELL,
    "export PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple": OF_THE_SHELL,
    "export HF_ENDPOINT=https://hf-mirror.com": OF_THE_SHELL,
    "python tests/test_equivalence.py": HALF_AN_HOUR,
    "pytest -m slow": HALF_AN_HOUR,
    "pytest -m matrix": HALF_AN_HOUR,
    "pytest tests/test_gpu.py": HALF_AN_HOUR,
    "pytest tests/test_data_collator.py -s -k real_tokens_need": HALF_AN_HOUR,
    "pytest tests/test_data_collator.py -k copied": HALF_AN_HOUR,
}  # fmt: skip
SLOW = {
    "python benchmarks/passages.py",
    "python benchmarks/data.py rate",
    "python benchmarks/data.py memory",
    "python benchmarks/convert.py",
    "python benchmarks/generate.py",
    "python benchmarks/pipeline.py",
    "python benchmarks/plan_published.py",
    "python benchmarks/plan_simulation.py --model llama-2-70b --gpus 8 --nodes 8",
    "python benchmarks/plan_validation.py quick",
    "python benchmarks/strategies.py --data data_sample/instruct_zh_en.json --steps 2 --output outputs/strategies.md",
    "python benchmarks/step_profile.py -- finetune_pp_peft.py --output_dir outputs/profile",
    "python benchmarks/checkpoint.py -- finetune_pp.py --output_dir outputs/checkpoint",
    "python tools/doctor.py -- finetune_pp_peft.py --dataset_path data_sample/tokenized/triage_train",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> list[str]:
    """Every command of a page once: first those of its bash blocks, in their order, then those within the text."""
    commands = []
    for language, block in blocks_of(page):
        if language == "bash":
            commands += block.splitlines()
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", prose):
        span = " ".join(span.split())
        if PROGRAM.match(span + " ") and " " in span:
            commands.append(span)
    return list(dict.fromkeys(commands))


def is_of_a_record(command: str) -> bool:
    """Records name the data that they were made with, in capitals or as a file that is not in the repository."""
    words = command.split()
    return any(re.fullmatch(r"ALPACA|alpaca\w*\.json|medqa\.jsonl", word) for word in words)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Where the quickstart has been run."""
    copy = copy_repository(tmp_path_factory.mktemp("docs") / "repository")
    completed = run("bash scripts/quickstart.sh", copy)
    assert completed.returncode == 0, completed.stderr
    return copy


def run_here(command: str, repository: Path) -> None:
    started = time.perf_counter()
    completed = run(command, repository)
    print(f"{time.perf_counter() - started:5.1f} s  {command}")
    assert completed.returncode == 0, f"{command}\n{completed.stdout}\n{completed.stderr}"


@pytest.mark.parametrize(
    "page", [page if page == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_the_commands_of_a_page_run(page, repository):
    """As printed, one after the other, without those that other pages have run before."""
    for command in commands_of(page):
        if command not in NOT_RUN and command not in SLOW and not is_of_a_record(command):
            run_here(command, repository)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(SLOW))
def test_a_long_command_runs(command, repository):
    run_here(command, repository)


def test_no_command_is_forgotten():
    """Commands stand in bash blocks or within the text, and the lists above name no command that is not there."""
    every_command = set()
    for page in PAGES:
        every_command |= set(commands_of(page))
        for language, block in blocks_of(page):
            if language != "bash":
                assert not [line for line in block.splitlines() if PROGRAM.match(line)], page
    assert set(NOT_RUN) <= every_command and every_command >= SLOW
    assert not set(NOT_RUN) & SLOW


def test_ci_runs_what_the_readme_begins_with():
    commands = commands_of("README.md")
    ci = (ROOT / ".ci" / "run").read_text()
    assert commands[:2] == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert all(command in ci for command in commands[:2])


@pytest.mark.parametrize("page", TRANSLATED)
def test_both_languages_have_the_same_commands_flags_and_files(page):
    chinese = page.replace(".md", "_zh.md")
    picture = {command: command.replace("_zh.svg --language zh", ".svg") for command in commands_of(chinese)}
    assert commands_of(page) == list(picture.values())
    name = re.compile(r"`(--?\w[^`]*|\w+\.(?:py|sh|json))`")
    english_names, chinese_names = (
        {" ".join(found.split()) for found in name.findall(text_of(path))} for path in (page, chinese)
    )
    assert english_names == chinese_names
    assert text_of(page).count("\n## ") == text_of(chinese).count("\n## ")
    tree = re.compile(r"^ {0,2}([\w.]+\.(?:py|sh|jsonl?)|\w+/) ", re.MULTILINE)
    assert set(tree.findall(text_of(page))) == set(tree.findall(text_of(chinese)))


def test_the_pages_that_most_readers_need_are_there_in_chinese():
    for name in ("README", "docs/data", "docs/convert", "docs/plan", "docs/export"):
        assert f"{name}.md" in TRANSLATED


def test_every_link_leads_to_a_file():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
        for link in links:
            if not link.startswith("http"):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


def tracked_files() -> list[Path]:
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in found.stdout.split() if (ROOT / line).exists()]


def test_the_file_tree_of_contributing_names_every_file():
    text = text_of("docs/contributing.md")
    for path in tracked_files():
        is_named_singly = path.suffix in (".py", ".sh", ".jsonl", ".sbatch") and path.parts[0] != "tests"
        if is_named_singly and path.name != "__init__.py":
            assert re.search(rf"(?<!\w){re.escape(path.name)}(?!\w)", text), path


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_front_page_is_short_and_its_tree_is_true(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= 185
    tree = next(block for language, block in blocks_of(page) if not language and "data_collator.py" in block)
    assert len(tree.splitlines()) <= 18
    for line in tree.splitlines():
        assert all((ROOT / name).exists() for name in line.split("  ")[0].split(", ")), line


# -------------------------------------------------------------------------------------------------------------------
# Figures
# -------------------------------------------------------------------------------------------------------------------


def rows_of(page: str) -> list[list[str]]:
    """The cells of every row of a page's tables."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@functools.cache  # both pages ask the same questions
def planned_way(question: str) -> dict:
    """The one row of the planner's answer."""
    (way,) = json.loads(run_script(*shlex.split(question), "--json", "True").stdout)["rows"]
    return way


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_memory_and_hours_of_the_front_page_are_the_planner_s(page):
    """Of the command in the launcher's header: LLaMA-7B (DeepSpeed: 33B) on A100-80G, 2.5e9 tokens."""
    num_rows = 0
    for row in rows_of(page):
        launcher = re.search(r"`sh scripts/(\w+\.sh)`", " ".join(row))
        if launcher is None:
            continue
        header = (ROOT / "scripts" / launcher[1]).read_text(encoding="utf-8")
        way = planned_way(re.search(r"^#   python (tools/plan\.py .*)$", header, re.MULTILINE)[1])
        memory, hours = re.findall(r"\d+", row[-2]), re.findall(r"\d+", row[-1])
        assert int(memory[0]) == round(way["nvidia_smi_bytes"] / 1e9), launcher[1]
        assert int(memory[1]) == way["gpus"], launcher[1]
        if launcher[1] == "finetune_pp_dpo.sh":
            assert row[-1] == "-"  # the corpus has no pairs
        else:
            assert [int(number) for number in hours] == [round(way["hours"])], launcher[1]
        num_rows += 1
    assert num_rows == 8


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_speeds_of_the_front_page_are_those_of_the_record(page):
    record = {}
    for row in rows_of("docs/performance.md"):
        if len(row) == 5 and row[0] != "beside":
            record.setdefault(row[0], row[1:3])  # the first table is the summary
    shown = [row for row in rows_of(page) if row[0] in record]
    assert len(shown) >= 4
    for row in shown:
        assert row[1:3] == record[row[0]], row[0]


@pytest.mark.parametrize(("page", "picture"), [("README.md", "quickstart.svg"), ("README_zh.md", "quickstart_zh.svg")])
def test_the_gain_of_the_front_page_is_that_of_its_picture(page, picture):
    """Both come from the quickstart: the lines that it printed, and what it drew."""
    printed = re.search(
        r"held-out loss +accuracy +95 % interval\nbase +([\d.]+) +([\d.]+)% .*\ntuned +([\d.]+) +([\d.]+)% .*\n"
        r"\(132 questions with four options\)\n",
        text_of(page),
    )
    svg = ElementTree.parse(ROOT / "docs" / "images" / picture)
    drawn = ["".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{printed[2]} %" in drawn and f"{printed[4]} %" in drawn
    assert picture in text_of(page) and f"{printed[4]} %" in re.sub(
        r"^```.*?^```", "", text_of(page), flags=re.S | re.M
    )


def test_the_record_of_the_strategies_ends_with_the_quoted_figures():
    """docs/strategies_measured.md is what benchmarks/strategies.py wrote, and its addresses are the program's."""
    program = text_of("benchmarks/strategies.py")
    quoted = re.search(r'QUOTED = """(.*?)"""', program, re.DOTALL)[1]
    assert text_of("docs/strategies_measured.md").endswith(quoted)
    for row in quoted.splitlines():
        if re.match(r"\| [A-Z][\w ]+ \d", row):
            assert "](https://" in row, row


def test_the_version_stands_in_one_place_and_badges_are_true():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    newest = re.search(r"^## (\S+?)(?:,|$)", text_of("CHANGELOG.md"), re.MULTILINE)[1]
    assert newest == project["version"]
    assert "version:" not in text_of("CITATION.cff").replace("cff-version:", "")
    assert project["requires-python"] == ">=3.11" and "3.11 or newer" in text_of("docs/images/badge_python.svg")
    assert "sys.version_info < (3, 11)" in text_of("scripts/environment.sh")
    assert project["license"] in text_of("docs/images/badge_licence.svg")
    assert text_of("LICENSE").startswith(f"{project['license']} License")


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_front_page_counts_the_matrix_as_it_was_run(page):
    """The summary of docs/equivalence.md: strategy, runs, largest deviation of the losses."""
    summary = [row for row in rows_of("docs/equivalence.md") if len(row) == 7 and row[1].isdecimal()]
    num_runs = sum(int(row[1]) for row in summary)
    largest = max(float(row[2]) for row in summary)
    counts = re.search(r"(\d+) (?:strategies, |种策略，)(\d+) .*?([\d.]+e-\d+)", text_of(page), re.DOTALL)
    assert (int(counts[1]), int(counts[2])) == (len(summary), num_runs)
    assert float(counts[3]) == largest <= 1e-5
