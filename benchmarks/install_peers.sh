#!/usr/bin/env bash
# Makes one virtual environment for each system that benchmarks/compare.py compares this toolkit with: .venv-peers/<peer>.
#
#   bash benchmarks/install_peers.sh                 # all four: trl llamafactory torchtune litgpt (6 GB on a CPU)
#   bash benchmarks/install_peers.sh trl             # one of them; a peer that is there already is made anew
#
# torch comes first, in the version of requirements.txt, so that no peer pulls another one. `trl` also serves the plain
# transformers Trainer. llamafactory and torchtune are installed without torchvision and torchaudio, which text does not
# need and which must fit torch's build; llamafactory also without its web pages. torchtune is of the year of its torchao.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=$(grep '^torch==' requirements.txt)
for peer in "${@:-trl llamafactory torchtune litgpt}"; do for name in $peer; do
    case $name in
        trl) bare=() with=(trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0) ;;
        llamafactory)
            bare=(llamafactory==0.9.5 torchdata==0.11.0)
            with=(transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0 tyro==0.8.14
                einops fire omegaconf protobuf scipy sentencepiece tiktoken hf-transfer matplotlib fastapi sse-starlette
                uvicorn modelscope requests) ;;
        torchtune)
            bare=(torchtune==0.6.1 torchao==0.10.0 torchdata==0.11.0)
            with=(datasets==5.2.0 safetensors huggingface_hub kagglehub sentencepiece tiktoken blobfile tokenizers
                omegaconf psutil Pillow requests) ;;
        litgpt) bare=() with=(litgpt==0.5.13) ;;
        *) echo "error: $name: choose from trl, llamafactory, torchtune and litgpt" >&2; exit 1 ;;
    esac
    rm -rf ".venv-peers/$name"
    ${PYTHON:-python3} -m venv ".venv-peers/$name"
    pip=(".venv-peers/$name/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" "$TORCH"
    [ ${#bare[@]} -eq 0 ] || "${pip[@]}" --no-deps "${bare[@]}"
    "${pip[@]}" "$TORCH" "${with[@]}"
    echo "made .venv-peers/$name"
done; done
