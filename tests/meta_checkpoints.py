"""Small checkpoints and tokenizers in Meta's formats, for the tests of both converters; and what a checkpoint computes.

A test module takes the fixtures from here with `pytest_plugins = ["meta_checkpoints"]`. It also imports from here
before pytest does, hence PYTEST_DONT_REWRITE: pytest would warn that it cannot rewrite the asserts.
"""

import base64
import json
import math
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import regex
import sentencepiece
import torch
from conftest import ROOT

import convert_llama_weights_to_hf as to_hf

sys.path.insert(0, str(ROOT / "tools"))
import convert_hf_to_meta as to_meta  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------
# Tokenizers in both formats
# ------------------------------------------------------------------------------------------------------------------

SPM_SIZE = 448
TIKTOKEN_SIZE = 384 + 256  # ranks and special tokens
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = """A patient of 45 years has had a headache since 3 days, and the light hurts her eyes. What is to be done?
The tokenizer reads the text, and the model reads the tokens; neither of them knows what the other has seen.
def train(model, tokens):\n    for step in range(1000):\n        loss = model(tokens).loss\n        loss.backward()
训练模型之前先准备数据，数据的质量决定模型的质量。模型读的是词元，不是文字。
ababa aba abab aaaa aaa aa    ====    ==== 1234567890 1.5e-6 I'll they're don't it's"""


def corpus() -> list[str]:
    """Lines of this file's own words in many orders: other files of the project change."""
    dice = random.Random(1)
    words = TEXT.split(" ")
    lines = TEXT.splitlines() * 5
    for _ in range(500):
        lines.append(" ".join(dice.choices(words, k=dice.randint(3, 12))))
    return lines


def train_sentencepiece(folder: Path, **options) -> Path:
    """A BPE of SPM_SIZE pieces with byte fallback; returns its file, folder/tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SPM_SIZE,
        model_type="bpe",
        byte_fallback=True,
        max_sentence_length=100000,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def spm_file(tmp_path_factory) -> Path:
    """As LLaMA 1 and 2 have it: single digits, and the text untouched."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("spm"),
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def words_of(text: str) -> list[str]:
    """tiktoken's cut; Rust's \\s is Unicode's White_Space, Python's has four separators more."""
    pattern = SPLIT.replace(r"[^\s", r"[^\p{White_Space}").replace(r"\s", r"\p{White_Space}")
    return regex.findall(pattern.replace(r"\S", r"\P{White_Space}"), text)


def encode_bytes(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pair encoding as tiktoken's reference does it."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        best = None
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and (best is None or rank < best[0]):
                best = (rank, i)
        if best is None:
            return [ranks[part] for part in parts]
        i = best[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]


def encode_text(text: str, ranks: dict[bytes, int]) -> list[int]:
    ids = []
    for word in words_of(text):
        ids += encode_bytes(word.encode(), ranks)
    return ids


def learn_ranks(num_ranks: int) -> dict[bytes, int]:
    ranks = {bytes([i]): i for i in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in words_of("\n".join(corpus())[:20000])]
    while len(ranks) < num_ranks:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=counts.get)
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [left + right]
                i += 1
    return ranks


def write_ranks(ranks: dict[bytes, int], path: Path) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory) -> Path:
    return write_ranks(learn_ranks(TIKTOKEN_SIZE - 256), tmp_path_factory.mktemp("tiktoken") / "tokenizer.model")


# fmt: off
FIXED_TEXTS = [
    "", " ", "  ", " a", "  a", "a ", " a  b   c ", "\n", "\na", "123456789", "1 2 3", "中 文", "🙂🙂", "\x00", "s>",
]
PARTS = [
    "a", "b", "ab", "aba", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "1", "23", "4567", "=", "====",
    "the", " of", "'s", "'LL", "'\u017f", "中文", "你好，", "的", "😀", "👩\u200d👧", "\x00", "\x01", "\x1c", "\x1f",
    "\x7f", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\u2581", "é", "e\u0301", "²", "Ⅷ", "٣", "ß", "ไทย",
    "\ufeff", "\ufffd", "\U00010348", "training", "def f(x):", "#", "!?", "<0x0A>", "\\n",
]
# fmt: on


def random_texts(count: int) -> list[str]:
    dice = random.Random(7)
    texts = list(FIXED_TEXTS)
    ranges = [(0, 0x7F), (0x80, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    for _ in range(count // 2):
        texts.append("".join(dice.choices(PARTS, k=dice.randint(1, 24))))
        num_letters = dice.randint(1, 16)
        texts.append("".join(chr(dice.randint(*dice.choice(ranges))) for _ in range(num_letters)))
    return texts


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints in Meta's format, and what they compute
# ------------------------------------------------------------------------------------------------------------------

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA1 = SMALL | {"norm_eps": 1e-6}
GQA = SMALL | {"n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "multiple_of": 64}
CODE = SMALL | {"rope_theta": 1000000, "ffn_dim_multiplier": 1.0}
LLAMA3 = SMALL | {"n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "vocab_size": TIKTOKEN_SIZE}
SCALED = LLAMA3 | {"use_scaled_rope": True}
WIDE = {"dim": 128}  # 16 features a head, so that some frequencies are scaled and some lie between

GENERATIONS = {  # params.json, number of shards, tokenizer, options of make_meta
    "llama1_7b": (LLAMA1, 1, "spm", {"dtype": torch.float16, "freqs": "in each layer"}),
    "llama1_13b": (LLAMA1, 2, "spm", {"dtype": torch.float16, "freqs": "one"}),
    "llama1_30b": (LLAMA1, 4, "spm", {"dtype": torch.float16, "freqs": "one"}),
    "llama1_65b": (LLAMA1 | {"norm_eps": 1e-5}, 8, "spm", {"dtype": torch.float16, "freqs": "one"}),
    "llama2_7b": (SMALL, 1, "spm", {"freqs": "one"}),
    "llama2_70b": (GQA, 4, "spm", {"freqs": "one"}),
    "llama2_70b_copies": (GQA, 8, "spm", {}),
    "code_llama": (CODE, 2, "spm", {}),
    "llama3_8b": (LLAMA3, 1, "tiktoken", {}),
    "llama3_70b": (LLAMA3, 4, "tiktoken", {}),
    "llama31_8b": (SCALED | WIDE, 1, "tiktoken", {}),
    "llama31_405b": (SCALED | WIDE, 8, "tiktoken", {}),
    "llama31_405b_mp16": (SCALED | {"dim": 256, "n_heads": 16, "n_kv_heads": 8}, 16, "tiktoken", {}),
    "llama32_1b": (SCALED | WIDE, 1, "tiktoken", {"tied": "stored"}),
    "llama32_3b": (SCALED | WIDE, 1, "tiktoken", {"tied": "absent"}),
    "llama33_70b": (SCALED | WIDE, 2, "tiktoken", {}),
}

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CODE_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPECTED = {  # context, rope, tied
    "llama1_7b": (2048, PLAIN_ROPE, False),
    "llama1_13b": (2048, PLAIN_ROPE, False),
    "llama1_30b": (2048, PLAIN_ROPE, False),
    "llama1_65b": (2048, PLAIN_ROPE, False),
    "llama2_7b": (4096, PLAIN_ROPE, False),
    "llama2_70b": (4096, PLAIN_ROPE, False),
    "llama2_70b_copies": (4096, PLAIN_ROPE, False),
    "code_llama": (16384, CODE_ROPE, False),
    "llama3_8b": (8192, LLAMA3_ROPE, False),
    "llama3_70b": (8192, LLAMA3_ROPE, False),
    "llama31_8b": (131072, SCALED_ROPE, False),
    "llama31_405b": (131072, SCALED_ROPE, False),
    "llama31_405b_mp16": (131072, SCALED_ROPE, False),
    "llama32_1b": (131072, SCALED_ROPE | {"factor": 32.0}, True),
    "llama32_3b": (131072, SCALED_ROPE | {"factor": 32.0}, True),
    "llama33_70b": (131072, SCALED_ROPE, False),
}


def ffn_rows(params: dict) -> int:
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    return math.ceil(hidden / params["multiple_of"]) * params["multiple_of"]


def whole_weights(params: dict, vocab_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights by Meta's names, before they are divided into shards."""
    generator = torch.Generator().manual_seed(0)
    dim = params["dim"]
    ffn = ffn_rows(params)
    kv = params.get("n_kv_heads", params["n_heads"]) * dim // params["n_heads"]

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=generator) * 2 / math.sqrt(columns)).to(dtype)

    def vector():
        return (1 + torch.randn(dim, generator=generator) / 4).to(dtype)

    weights = {
        "tok_embeddings.weight": matrix(vocab_size, dim),
        "norm.weight": vector(),
        "output.weight": matrix(vocab_size, dim),
    }
    for i in range(params["n_layers"]):
        weights[f"layers.{i}.attention.wq.weight"] = matrix(dim, dim)
        weights[f"layers.{i}.attention.wk.weight"] = matrix(kv, dim)
        weights[f"layers.{i}.attention.wv.weight"] = matrix(kv, dim)
        weights[f"layers.{i}.attention.wo.weight"] = matrix(dim, dim)
        weights[f"layers.{i}.feed_forward.w1.weight"] = matrix(ffn, dim)
        weights[f"layers.{i}.feed_forward.w2.weight"] = matrix(dim, ffn)
        weights[f"layers.{i}.feed_forward.w3.weight"] = matrix(ffn, dim)
        weights[f"layers.{i}.attention_norm.weight"] = vector()
        weights[f"layers.{i}.ffn_norm.weight"] = vector()
    return weights


def piece_of(name: str, tensor: torch.Tensor, i: int, num_shards: int, vocabulary_parallel: bool, num_kv: int):
    """What Meta's process `i` of `num_shards` holds of a weight."""
    if "norm" in name or name.endswith("rope.freqs"):
        return tensor.clone()
    if ".wk." in name or ".wv." in name:
        parts = min(num_shards, num_kv)
        return tensor.chunk(parts, 0)[i * parts // num_shards].clone()
    if ".wo." in name or ".w2." in name or (name == "tok_embeddings.weight" and not vocabulary_parallel):
        return tensor.chunk(num_shards, 1)[i].clone()
    return tensor.chunk(num_shards, 0)[i].clone()


def make_meta(folder: Path, tokenizer: Path, params: dict, num_shards: int = 1, **options) -> dict[str, torch.Tensor]:
    """Writes a checkpoint as Meta hands it out; returns its whole weights.

    Options: dtype; vocab_size (of LLaMA 1 and 2); tied ("stored": the output is a copy, "absent": there is none);
    freqs ("one", "in each layer": tables of frequencies), freqs_dtype, freqs_theta.
    """
    folder.mkdir(parents=True)
    is_llama3 = params["vocab_size"] > 0
    vocab_size = options.get("vocab_size", SPM_SIZE)
    if is_llama3:
        vocab_size = params["vocab_size"]
    weights = whole_weights(params, vocab_size, options.get("dtype", torch.bfloat16))
    if options.get("tied"):
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    weights |= rope_tables(params, weights["norm.weight"].dtype, options)
    num_kv = params.get("n_kv_heads", params["n_heads"])
    for i in range(num_shards):
        shard = {}
        for name, weight in weights.items():
            shard[name] = piece_of(name, weight, i, num_shards, is_llama3, num_kv)
        if options.get("tied") == "absent":
            del shard["output.weight"]
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return weights


def rope_tables(params: dict, dtype: torch.dtype, options: dict) -> dict[str, torch.Tensor]:
    head_dim = params["dim"] // params["n_heads"]
    theta = options.get("freqs_theta", params.get("rope_theta", 10000.0))
    freqs = 1 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    freqs = freqs.to(options.get("freqs_dtype", dtype))
    names = []
    if options.get("freqs") == "one":
        names.append("rope.freqs")
    if options.get("freqs") == "in each layer":
        for i in range(params["n_layers"]):
            names.append(f"layers.{i}.attention.inner_attention.rope.freqs")
    return {name: freqs for name in names}


def expected_logits(weights: dict, params: dict, ids: list[int], factor: float | None, positions=None) -> torch.Tensor:
    """The model after the papers, on whole matrices in float64, rotating each pair of features by sines and cosines."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    num_heads = params["n_heads"]
    num_kv = params.get("n_kv_heads", num_heads)
    size = params["dim"] // num_heads
    if positions is None:
        positions = list(range(len(ids)))
    angles = expected_angles(size, params.get("rope_theta", 10000.0), factor, positions)
    cos = angles.cos()
    sin = angles.sin()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * w[name]

    def rotate(t):
        even = t[:, 0::2]
        odd = t[:, 1::2]
        rotated = torch.empty_like(t)
        rotated[:, 0::2] = even * cos - odd * sin
        rotated[:, 1::2] = even * sin + odd * cos
        return rotated

    x = w["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        h = norm(x, p + "attention_norm.weight")
        q = h @ w[p + "attention.wq.weight"].T
        k = h @ w[p + "attention.wk.weight"].T
        v = h @ w[p + "attention.wv.weight"].T
        mixed = []
        for head in range(num_heads):
            group = head * num_kv // num_heads
            of_head = slice(head * size, (head + 1) * size)
            of_group = slice(group * size, (group + 1) * size)
            scores = rotate(q[:, of_head]) @ rotate(k[:, of_group]).T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            mixed.append(scores.softmax(-1) @ v[:, of_group])
        x = x + torch.cat(mixed, 1) @ w[p + "attention.wo.weight"].T
        h = norm(x, p + "ffn_norm.weight")
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = h @ w[p + "feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


def expected_angles(size: int, theta: float, factor: float | None, positions: list[int]) -> torch.Tensor:
    """(tokens, pairs)"""
    columns = []
    for j in range(size // 2):
        frequency = theta ** (-2 * j / size)
        wavelength = 2 * math.pi / frequency
        if factor and wavelength > 8192:
            frequency /= factor
        elif factor and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        columns.append([position * frequency for position in positions])
    return torch.tensor(columns, dtype=torch.float64).T


# ------------------------------------------------------------------------------------------------------------------
# Running the programs
# ------------------------------------------------------------------------------------------------------------------


def convert(*flags, error: bool = False) -> str | None:
    """Runs convert_llama_weights_to_hf.py in this process; returns the error message if one is expected."""
    return run_main(to_hf, flags, error)


def convert_back(*flags, error: bool = False) -> str | None:
    """The same for tools/convert_hf_to_meta.py."""
    return run_main(to_meta, flags, error)


def run_main(program, flags: tuple, error: bool) -> str | None:
    argv = sys.argv
    sys.argv = [program.__name__, *map(str, flags)]
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        program.main()
    except SystemExit as stop:
        if not error:
            pytest.fail(str(stop.code))
        return str(stop.code)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not error, "the command succeeded"


def same_checkpoint(one: Path, two: Path) -> None:
    """Asserts that two folders of Meta's hold the same bits."""
    names = sorted(path.name for path in one.glob("*.pth"))
    assert names == sorted(path.name for path in two.glob("*.pth"))
    for name in names:
        a = torch.load(one / name, map_location="cpu", weights_only=True)
        b = torch.load(two / name, map_location="cpu", weights_only=True)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
            assert torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)), key
    assert (one / "tokenizer.model").read_bytes() == (two / "tokenizer.model").read_bytes()
    assert json.loads((one / "params.json").read_text()) == json.loads((two / "params.json").read_text())


def report_of(folder: Path) -> dict:
    return json.loads((folder / "conversion_report.json").read_text(encoding="utf-8"))


def left_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory, spm_file, tiktoken_file):
    """Converts a generation once; gives (Meta's folder, Hugging Face's folder, whole weights)."""
    made = {}
    tokenizers = {"spm": spm_file, "tiktoken": tiktoken_file}

    def convert_once(name: str):
        if name not in made:
            params, num_shards, kind, options = GENERATIONS[name]
            root = tmp_path_factory.mktemp(name)
            weights = make_meta(root / "meta", tokenizers[kind], params, num_shards, **options)
            convert("--input_dir", root / "meta", "--output_dir", root / "hf")
            made[name] = (root / "meta", root / "hf", weights)
        return made[name]

    return convert_once
