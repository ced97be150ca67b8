"""Checks that llama.cpp continues prompts from a GGUF file with the same tokens as transformers from the merged folder.

    python tools/check_llama_cpp.py outputs/gguf/model-f16.gguf outputs/merged

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


def main() -> None:
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_file():
        sys.exit("error: name a file that tools/merge_lora.py --gguf wrote, such as outputs/gguf/model-f16.gguf, "
                 "and the folder of the model that it was made from")  # fmt: skip
    gguf = Path(sys.argv[1])
    folder = Path(sys.argv[2]) if len(sys.argv) == 3 else gguf.parent
    if not (folder / "config.json").is_file():
        sys.exit(f"error: {folder} holds no model; name the one that {gguf} was made from behind it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        message = {"role": "user", "content": PROMPTS[0]}
        texts.append(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    results = run_llama_cpp(gguf, texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    allowed = 1e-3 if "f32" in gguf.name else 1e-2
    num_wrong = 0
    for text, result in zip(texts, results, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        same_ids = result["ids"] == ids and result["prompt"] == tokenizer(text).input_ids
        prompt = torch.tensor([result["prompt"]])
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
        ours = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        ours = ours[0, prompt.shape[1] :].tolist()
        common = len(os.path.commonprefix([ours, result["continued"]]))
        verdict = f"the same {common} tokens"
        if common < min(len(ours), len(result["continued"])):
            with torch.no_grad():
                logits = model(torch.tensor([result["prompt"] + ours[:common]])).logits[0, -1]
            best = logits.topk(2).values
            gap = ((best[0] - best[1]) / logits.abs().max()).item()
            verdict = f"tokens part after {common}, where the two best logits are {gap:.1e} of the largest apart"
            num_wrong += gap > allowed
        num_wrong += not same_ids
        print(f"{'same ids' if same_ids else 'OTHER IDS'}, {verdict}: {text!r} -> {tokenizer.decode(ours)!r}")
    if num_wrong:
        sys.exit(f"error: llama.cpp and transformers differ in {num_wrong} places")
    print(f"llama.cpp and transformers agree on {len(texts)} prompts: {gguf}")


if __name__ == "__main__":
    main()
