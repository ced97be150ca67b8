"""Checks that llama.cpp continues prompts from a GGUF file with the same tokens as transformers from the merged folder.

    python benchmarks/check_llama_cpp.py outputs/gguf/model-f16.gguf outputs/merged

The second path is the folder that the file was made from; without it, the folder in which the file lies. llama.cpp gets
an environment of its own, outputs/environments/llama_cpp, because it is no part of this toolkit: llama-cpp-python from
PyPI, which is compiled for some minutes (CMake and a C++ compiler are needed) and then kept.

Each prompt is tokenised by both programs, with BOS and special tokens, and the ids are compared; then both continue it
greedily. Where the tokens part, the two best logits of transformers must be closer than rounding explains: 1e-3 of
the largest logit for f32, and 1e-2 for f16 and q8_0.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.36"
ENVIRONMENT = Path("outputs/environments/llama_cpp")
PROMPTS = [
    "Sudden painful red eye with halos around lights. Which department?",
    "The patient is a 45-year-old man with 3 days of fever,",
    "  Numbers 12345 and 3.14, don't we'll\n\n\ttabs",
    "发热、咳嗽三天, 应该看哪个科?",
]
NUM_TOKENS = 24

# Runs in llama.cpp's environment: one JSON object a line, from which the other side reads ids.
LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), verbose=False)
for text in json.load(sys.stdin):
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    prompt = model.tokenize(text.encode(), add_bos=True, special=True)
    model.reset()
    continued = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        continued.append(int(token))
        if len(continued) == NUM_TOKENS or token == model.token_eos():
            break
    print("RESULT " + json.dumps({"ids": ids, "prompt": prompt, "continued": continued}))
""".replace("NUM_TOKENS", str(NUM_TOKENS))


def make_environment() -> Path:
    """The Python of an environment that has llama-cpp-python; made at the first call."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").is_file():
        print(f"making {ENVIRONMENT} with {PACKAGE}: compiled for some minutes")
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
        (ENVIRONMENT / "complete").touch()
    return python


def run_llama_cpp(gguf: Path, texts: list[str]) -> list[dict]:
    command = [make_environment(), "-c", LLAMA_CPP, gguf, str(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))]
    completed = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    if completed.returncode != 0:
        sys.exit(f"error: llama.cpp failed on {gguf}\n{completed.stderr[-2000:]}")
    return [json.loads(line[7:]) for line in completed.stdout.splitlines() if line.startswith("RESULT ")]


def make_texts(tokenizer) -> list[str]:
    """The prompts, and the first of them in the model's chat template, if it has one."""
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        message = {"role": "user", "content": PROMPTS[0]}
        texts.append(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    return texts


def check_prompt(model, tokenizer, text: str, result: dict, allowed: float) -> bool:
    """Prints how transformers and llama.cpp continue one prompt; returns whether they agree.

    Args:
        result: llama.cpp's ids, prompt and continuation.
        allowed: the largest distance of two logits, as a share of the largest logit, that rounding explains.
    """
    import torch

    has_same_ids = result["ids"] == tokenizer(text, add_special_tokens=False).input_ids
    has_same_ids = has_same_ids and result["prompt"] == tokenizer(text).input_ids
    prompt = torch.tensor([result["prompt"]])
    continued = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    ours = continued[0, prompt.shape[1] :].tolist()
    num_common = len(os.path.commonprefix([ours, result["continued"]]))
    verdict = f"the same {num_common} tokens"
    agrees = has_same_ids
    if num_common < min(len(ours), len(result["continued"])):
        with torch.no_grad():
            logits = model(torch.tensor([result["prompt"] + ours[:num_common]])).logits[0, -1]
        best = logits.topk(2).values
        gap = ((best[0] - best[1]) / logits.abs().max()).item()
        verdict = f"tokens part after {num_common}, where the two best logits are {gap:.1e} of the largest apart"
        agrees = agrees and gap <= allowed
    ids = "OTHER IDS"
    if has_same_ids:
        ids = "same ids"
    print(f"{ids}, {verdict}: {text!r} -> {tokenizer.decode(ours)!r}")
    return agrees


def main() -> None:
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_file():
        sys.exit("error: name a file that tools/merge_lora.py --gguf wrote, such as outputs/gguf/model-f16.gguf, "
                 "and the folder of the model that it was made from")  # fmt: skip
    gguf = Path(sys.argv[1])
    folder = gguf.parent
    if len(sys.argv) == 3:
        folder = Path(sys.argv[2])
    if not (folder / "config.json").is_file():
        sys.exit(f"error: {folder} holds no model; name the one that {gguf} was made from behind it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = make_texts(tokenizer)
    results = run_llama_cpp(gguf, texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    allowed = 1e-2
    if "f32" in gguf.name:
        allowed = 1e-3
    num_wrong = 0
    for text, result in zip(texts, results, strict=True):
        if not check_prompt(model, tokenizer, text, result, allowed):
            num_wrong += 1
    if num_wrong:
        sys.exit(f"error: llama.cpp and transformers differ on {num_wrong} of {len(texts)} prompts")
    print(f"llama.cpp and transformers agree on {len(texts)} prompts: {gguf}")


if __name__ == "__main__":
    main()
