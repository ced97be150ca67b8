"""What Meta's real files hold that plain generated ones do not: each kind is made here and goes there and back bit for
bit, or is refused with its reason. The source stands beside each.
"""

import io
import json
import shutil
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from meta_checkpoints import (
    CODE,
    GQA,
    LLAMA1,
    LLAMA3,
    SCALED,
    SMALL,
    WIDE,
    convert,
    convert_back,
    left_in,
    make_meta,
    same_checkpoint,
)
from safetensors import safe_open

pytest_plugins = ["meta_checkpoints"]


def as_it_is(meta: Path) -> None:
    pass


def add_files(*names: str):
    def edit(meta: Path) -> None:
        for name in names:
            (meta / name).write_text("51c9bc4a8bb3de0d  consolidated.00.pth\n")

    return edit


def add_params(**entries):
    def edit(meta: Path) -> None:
        path = meta / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def remove_param(name: str):
    def edit(meta: Path) -> None:
        path = meta / "params.json"
        params = json.loads(path.read_text())
        del params[name]
        path.write_text(json.dumps(params))

    return edit


def nest_params(meta: Path) -> None:
    path = meta / "params.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text())}))


def edit_shards(change):
    def edit(meta: Path) -> None:
        for path in meta.glob("consolidated.*.pth"):
            shard = torch.load(path, weights_only=True)
            change(shard)
            torch.save(shard, path)

    return edit


def make_parameters(shard: dict) -> None:
    for name in shard:
        shard[name] = torch.nn.Parameter(shard[name])


def save_from_gpu(meta: Path) -> None:
    """The file names the device of each tensor: here a GPU, which this machine need not have."""
    path = meta / "consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(shard, path)
    assert b"cuda:0" in path.read_bytes()


def pack_again(compression: int):
    """As a program for archives would do it: PyTorch's own rule where a tensor begins no longer holds."""

    def edit(meta: Path) -> None:
        path = meta / "consolidated.00.pth"
        with zipfile.ZipFile(path) as file:
            entries = {info.filename: file.read(info) for info in file.infolist()}
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in entries.items():
                file.writestr(name, data)

    return edit


def move_tokenizer_up(meta: Path) -> None:
    (meta / "tokenizer.model").rename(meta.parent / "tokenizer.model")
    (meta.parent / "tokenizer_checklist.chk").write_text("eeec4125e9c7560836b4873b6f8e3025  tokenizer.model\n")


HALF = {"dtype": torch.float16}
FREQS = {"freqs": "one"}
LAYER_FREQS = {"freqs": "in each layer"}
# source, (params.json, shards, tokenizer, options of make_meta), what is done to the checkpoint
ACCEPTED = {
    "LLaMA 1 7B: frequencies in each layer": (
        "ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py: layers.N.attention.inner_attention.rope.freqs",
        (LLAMA1, 1, "spm", HALF | LAYER_FREQS),
        as_it_is,
    ),
    "the same in float32": (
        "as above",
        (LLAMA1, 1, "spm", HALF | LAYER_FREQS | {"freqs_dtype": torch.float32}),
        as_it_is,
    ),
    "LLaMA 1 13B and larger: one table": (
        "meta-llama/llama, v1: the model has one table where it is divided",
        (LLAMA1, 2, "spm", HALF | FREQS),
        as_it_is,
    ),
    "Llama 2 7B: one table": ("karpathy/llama2.c#266, meta-pytorch/gpt-fast#42", (SMALL, 1, "spm", FREQS), as_it_is),
    "Llama 2 70B: one table, in every shard": (
        "datascience.stackexchange.com/questions/126942: the names and shapes of all tensors of llama-2-70b-chat",
        (GQA, 4, "spm", FREQS),
        as_it_is,
    ),
    "the same in float16": ("as above", (GQA, 4, "spm", FREQS | {"freqs_dtype": torch.float16}), as_it_is),
    "Code Llama: frequencies too small for float16": (
        "as above, with the rope_theta of Code Llama",
        (CODE | {"dim": 128}, 2, "spm", FREQS | {"freqs_dtype": torch.float16}),
        as_it_is,
    ),
    "Code Llama: no vocab_size in params.json": (
        "karpathy/llama2.c#355",
        (CODE, 1, "spm", {}),
        remove_param("vocab_size"),
    ),
    "Llama 3: use_scaled_rope is stated, and is false": (
        "meta-llama/llama-models, sku_list.py",
        (LLAMA3, 1, "tiktoken", {}),
        add_params(use_scaled_rope=False),
    ),
    "params.json with the entries under model": (
        "huggingface/transformers, models/llama/convert_llama_weights_to_hf.py: params.get('model', params)",
        (SCALED | WIDE, 2, "tiktoken", {}),
        nest_params,
    ),
    "null where Meta's code takes its default": (
        "meta-llama/llama-models, llama3/args.py: n_kv_heads, ffn_dim_multiplier",
        (SMALL, 1, "spm", {}),
        add_params(n_kv_heads=None, ffn_dim_multiplier=None),
    ),
    "LLaMA 1: checksums, and one tokenizer beside all models": (
        "Lightning-AI/lit-llama, howto/download_weights.md",
        (LLAMA1, 1, "spm", HALF),
        lambda meta: (add_files("checklist.chk")(meta), move_tokenizer_up(meta)),
    ),
    "Llama 2: checksums and the licence": (
        "meta-llama/llama, download.sh",
        (SMALL, 1, "spm", {}),
        add_files("checklist.chk", "tokenizer_checklist.chk", "LICENSE", "USE_POLICY.md"),
    ),
    "Llama 3.1 on the hub: original/ with a second params file": (
        "huggingface.co/meta-llama: original/params.json beside original/orig_params.json",
        (SCALED, 1, "tiktoken", {}),
        add_files("orig_params.json", "checklist.chk"),
    ),
    "saved from a GPU": (
        "meta-llama/llama, llama/generation.py: map_location='cpu'",
        (SMALL, 1, "spm", FREQS),
        save_from_gpu,
    ),
    "parameters, not plain tensors": (
        "torch.save(dict(model.named_parameters()))",
        (SMALL, 2, "spm", {}),
        edit_shards(make_parameters),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_real_files_hold_goes_there_and_back(name, tmp_path, spm_file, tiktoken_file):
    _, (params, num_shards, kind, options), edit = ACCEPTED[name]
    tokenizer = {"spm": spm_file, "tiktoken": tiktoken_file}[kind]
    meta = tmp_path / "llama" / "meta"
    make_meta(meta, tokenizer, params, num_shards, **options)
    edit(meta)
    convert("--input_dir", meta, "--output_dir", tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "freq" in key]
    convert_back("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    if not (meta / "tokenizer.model").is_file():
        shutil.copyfile(meta.parent / "tokenizer.model", meta / "tokenizer.model")
    same_checkpoint(meta, tmp_path / "back")


def drop_all(shard: dict) -> None:
    for name in list(shard):
        del shard[name]


def quantize(dtype: torch.dtype):
    def change(shard: dict) -> None:
        for name in list(shard):
            if "feed_forward" in name:
                shard[name] = shard[name].to(dtype)

    return edit_shards(change)


def quantize_with_scales(shard: dict) -> None:
    """As in the int4 releases of Llama 3.2: group-wise scales beside each matrix, and an adapter."""
    shard["layers.0.attention.wq.scales"] = torch.ones(64, 2)
    shard["layers.0.attention.wq.adaptor.A.weight"] = torch.ones(16, 64)


def one_wrong_frequency(shard: dict) -> None:
    shard["rope.freqs"][2] *= 1.1


def one_wrong_layer(shard: dict) -> None:
    shard["layers.1.attention.inner_attention.rope.freqs"].mul_(2)


def wrong_in_second_shard(meta: Path) -> None:
    path = meta / "consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    shard["rope.freqs"][0] = 0.9995117
    torch.save(shard, path)


VISION_PARAMS = {"vision_chunk_size": 560, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8}
LLAMA4_PARAMS = {"ffn_exp": 4.0, "nope_layer_interval": 4, "use_qk_norm": True, "moe_args": {"num_experts": 16}}
SKU_LIST = "meta-llama/llama-models, sku_list.py"
SMALL_ONE = (SMALL, 1, "spm", FREQS)
# source, checkpoint, what is done to it, what the one error must name
REFUSED = {
    "Llama 3.2 1B QLoRA": (
        SKU_LIST,
        (SCALED, 1, "tiktoken", {}),
        add_params(quantization_args={"group_size": 256}, lora_args={"rank": 16, "scale": 2.0}),
        ["lora_args", "quantized", "bfloat16"],
    ),
    "Llama 3.2 1B SpinQuant": (
        SKU_LIST,
        (SCALED, 1, "tiktoken", {}),
        add_params(quantization_args={"group_size": 256}),
        ["quantization_args", "quantized", "bfloat16"],
    ),
    "its weights with another params.json": (
        "meta-llama/llama-models, llama3/quantization/loader.py: scales, adaptor",
        (SCALED, 1, "tiktoken", {}),
        edit_shards(quantize_with_scales),
        ["layers.0.attention.wq.scales is unknown"],
    ),
    "Llama 3.1 405B FP8": (
        SKU_LIST + ": fp8_scales_N.pt beside consolidated.N.pth",
        (SCALED, 2, "tiktoken", {}),
        lambda meta: (quantize(torch.float8_e4m3fn)(meta), add_files("fp8_scales_0.pt", "fp8_scales_1.pt")(meta)),
        ["float8_e4m3fn", "quantized", "bfloat16"],
    ),
    "int8 weights": (
        "meta-llama/llama-models, llama3/quantization/loader.py: Int8WeightLinear",
        SMALL_ONE,
        quantize(torch.int8),
        ["torch.int8", "quantized"],
    ),
    "Llama 3.2 11B Vision": (
        SKU_LIST,
        (SCALED, 1, "tiktoken", {}),
        add_params(**VISION_PARAMS),
        ["vision model", "mllama"],
    ),
    "Llama 4": (
        "meta-llama/llama-models, llama4/args.py",
        (SCALED, 1, "tiktoken", {}),
        add_params(**LLAMA4_PARAMS),
        ["a Llama 4", "convert_llama4_weights_to_hf.py"],
    ),
    "Llama Guard 3 1B INT4": (
        SKU_LIST,
        (SCALED, 1, "tiktoken", {}),
        add_params(hidden_dim=6400),
        ["hidden_dim", "pruned"],
    ),
    "TransformerEngine's extra states": (
        "transformers, models/llama4/convert_llama4_weights_to_hf.py; NVIDIA/TransformerEngine#458: io.BytesIO",
        SMALL_ONE,
        edit_shards(lambda shard: shard.update({"layers.0.attention.wo._extra_state": io.BytesIO()})),
        ["consolidated.00.pth", "BytesIO", "was not opened"],
    ),
    "the same, empty": (
        "NVIDIA/Megatron-LM#6509: an empty byte tensor",
        SMALL_ONE,
        edit_shards(
            lambda shard: shard.update({"layers.0.attention.wo._extra_state": torch.empty(0, dtype=torch.uint8)})
        ),
        ["layers.0.attention.wo._extra_state is unknown"],
    ),
    "a checkpoint of a training": (
        "torch.save({'model': ..., 'optimizer': ...})",
        SMALL_ONE,
        edit_shards(lambda shard: shard.update(model=dict(shard), step=3)),
        ["holds other things than tensors (model)"],
    ),
    "packed again by another program": (
        "-",
        SMALL_ONE,
        pack_again(zipfile.ZIP_STORED),
        ["consolidated.00.pth was packed again", "python -c"],
    ),
    "compressed": (
        "-",
        SMALL_ONE,
        pack_again(zipfile.ZIP_DEFLATED),
        ["consolidated.00.pth was packed again", "python -c"],
    ),
    "an entry that nobody knows": ("-", SMALL_ONE, add_params(sliding_window=4096), ["sliding_window", "unknown"]),
    "a damaged table": (
        "-",
        SMALL_ONE,
        edit_shards(one_wrong_frequency),
        ["rope.freqs is not the table of rope_theta 10000"],
    ),
    "a damaged table in one layer": (
        "-",
        (LLAMA1, 1, "spm", HALF | LAYER_FREQS),
        edit_shards(one_wrong_layer),
        ["layers.1.attention.inner_attention.rope.freqs is not the table of rope_theta 10000"],
    ),
    "shards with different tables": (
        "-",
        (LLAMA1, 2, "spm", HALF | FREQS),
        wrong_in_second_shard,
        ["rope.freqs must be equal in all shards and is not in shard 1"],
    ),
    "Code Llama with the params.json of Llama 2": (
        "codellama and llama, params.json: the same sizes with and without rope_theta",
        (SMALL, 1, "spm", FREQS | {"freqs_theta": 1e6}),
        as_it_is,
        ["rope.freqs is not the table of rope_theta 10000", "params.json is of another model"],
    ),
    "a table of another size": (
        "-",
        SMALL_ONE,
        edit_shards(lambda shard: shard.update({"rope.freqs": torch.ones(5)})),
        ["rope.freqs is [5] in shard 0, not [4]"],
    ),
    "a table of a layer that is not there": (
        "-",
        SMALL_ONE,
        edit_shards(lambda shard: shard.update({"layers.x.attention.inner_attention.rope.freqs": torch.ones(4)})),
        ["layers.x.attention.inner_attention.rope.freqs is unknown"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_converted_is_one_error_with_its_reason(name, tmp_path, spm_file, tiktoken_file):
    _, (params, num_shards, kind, options), edit, words = REFUSED[name]
    tokenizer = {"spm": spm_file, "tiktoken": tiktoken_file}[kind]
    make_meta(tmp_path / "meta", tokenizer, params, num_shards, **options)
    edit(tmp_path / "meta")
    before = left_in(tmp_path)
    message = convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "out", error=True)
    assert message.startswith("error: --input_dir ") and all(word in message for word in words), message
    assert len(message.splitlines()) == 2  # the second names --help
    assert left_in(tmp_path) == before


def test_a_table_of_the_default_theta_is_said_and_restored(tmp_path, spm_file, capsys):
    """Meta's code never reads it, so that params.json counts; no source says which one Code Llama's files hold."""
    make_meta(tmp_path / "meta", spm_file, CODE, 1, freqs="one", freqs_theta=10000.0)
    convert("--input_dir", tmp_path / "meta", "--output_dir", tmp_path / "hf")
    assert "rope.freqs is the table of rope_theta 10000, params.json states 1e+06" in capsys.readouterr().err
    convert_back("--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back")
    same_checkpoint(tmp_path / "meta", tmp_path / "back")
