"""Small real parts that keep tests fast: a 2-layer LLaMA (grouped-query attention), its tokenizer, rows of text."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are no package: tests import them as a reader runs them, from the root
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network would hang elsewhere

import torch  # noqa: E402
from datasets import Dataset, Features, Sequence, Value  # noqa: E402
from harness import WITHOUT_BITSANDBYTES, run_script  # noqa: E402, F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from torch.utils.cpp_extension import get_default_build_root  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

IGNORE_INDEX = -100
# The same examples in every run, so that a test that has passed passes again; new ones: --hypothesis-profile new
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("new", derandomize=False)
hypothesis.settings.load_profile("same")


def make_tokenizer(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 ids like LLaMA's: BOS added, EOS, no pad token, no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = (ROOT / "data_sample" / "triage_train.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny_model(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32, num_layers: int = 2) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large enough that a leak between documents or a lost row shows in the loss
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def random_rows(
    num_rows: int, seed: int = 0, shortest: int = 4, longest: int = 24, vocab_size: int = 300
) -> list[dict]:
    """Rows of unequal length; the first part of each, of unequal length too, carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return rows


def save_rows(rows: list[dict], folder: Path, ledger: dict | None = None) -> Path:
    """Writes rows the way tokenize_dataset.py does: a `datasets` folder with a ledger."""
    names = list(rows[0]) if rows else ["input_ids", "labels"]
    features = Features({name: Sequence(Value("int32")) for name in names})
    Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=features).save_to_disk(folder)
    (folder / "ledger.json").write_text(json.dumps(ledger if ledger is not None else {"sha256": str(hash(str(rows)))}))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """22 rows: two whole optimizer steps of 8 rows an epoch, and a short last one of 6."""
    return save_rows(random_rows(22), tmp_path_factory.mktemp("sets") / "rows")


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The real model, fetched if the quickstart has not been run. Its tests are of the xdist_group "sample model"."""
    run_script("tools/get_sample_model.py", HF_HUB_OFFLINE="0")
    return ROOT / "models" / "SmolLM2-135M-Instruct"


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C works in what tests start, and no test waits for a compilation that was killed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's doing, in the background; programs inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # once, not in each worker of xdist
        for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
            if time.time() - lock.stat().st_mtime > 600:
                lock.unlink()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that start programs, which scripts/test.sh runs last: they use one of these names."""
    starters = {"run_script", "Runs", "runs", "sample_model", "subprocess", "start_script", "reference", "run_dpo"}
    for item in items:
        used = {*item.function.__code__.co_names, *item.fixturenames}
        names = ("test_quickstart.py", "test_docs.py", "test_doctor.py", "test_launchers.py")
        if used & starters or item.path.name in names:
            item.add_marker("processes")
