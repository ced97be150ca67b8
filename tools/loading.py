"""What the programs that serve or judge a model share: is this folder whole, which base and adapter, which prompt.

test_sample.py, tools/chat.py, tools/evaluate.py, tools/merge_lora.py and tools/doctor.py import it; training scripts
never do. Three questions are answered before any weight is in memory:

  open_model       which base model and which adapter, and can they be used together?
  check_model      is the folder of a model whole? If not: what is wrong with it, and which command helps?
  find_template    how did the rows of the training set become prompts?

Every answer that is no is a ValueError of one line. Code that a model brings along is never run.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_collator import find_difference
from data_sample.rendering import encode_prompt, user_message

SAMPLE_MODEL = "models/SmolLM2-135M-Instruct"
SAMPLE_LEDGER = "data_sample/tokenized/triage_train/ledger.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PEFT_PREFIX = "base_model.model."  # PEFT puts it before the name of each module of the base model
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
# The values of init_lora_weights that leave the base model as it is. All others (pissa, olora, corda, loftq, lora_ga)
# change the base's weights before training, so what was trained is not an adapter for the original.
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass
class Adapter:
    """What the files of an adapter say."""

    folder: Path
    config: peft.PeftConfig
    settings: dict  # adapter_config.json as it is, with the keys that this version of PEFT does not know
    base: str | None  # the base model that it was trained on, if it names one
    shapes: dict[str, tuple[int, ...]]  # of each tensor in its file
    is_untrained: bool  # all matrices that start as zeros are still zero, so it changes nothing


@dataclass
class ModelSource:
    """A model, with or without an adapter, whose files were found to be whole and to fit each other."""

    model_path: str
    peft_path: str | None
    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    receipt: dict  # run.json of the training, or nothing
    adapter: Adapter | None
    num_embeddings: int  # rows of the embedding: every id of a prompt must be below it

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that an adapter puts before every prompt."""
        if self.adapter is None:
            return 0
        return getattr(self.adapter.config, "num_virtual_tokens", None) or 0

    @property
    def context_length(self) -> int:
        return context_length(self.config)


def open_model(
    model_path: str | None, peft_path: str | None, model_flag: str = "--model_path", peft_flag: str = "--peft_path"
) -> ModelSource:
    """Looks through the files of a model and its adapter; takes a second or so, and no memory.

    Args:
        model_path: folder or hub id; None for the base that the adapter names.
        peft_path: folder of an adapter, or None.
        model_flag, peft_flag: how the user named them, for the messages.

    Raises:
        ValueError: one line for each mistake, which begins with the flag that is to blame.
    """
    mistakes = []
    adapter = None
    skeleton = None
    if peft_path is not None:
        with collect(mistakes, f"{peft_flag} {peft_path}"):
            peft_path = str(Path(peft_path).expanduser())
            adapter = read_adapter(peft_path)
            if model_path is None:
                model_path = find_base(adapter)
    if model_path is not None:
        with collect(mistakes, f"{model_flag} {model_path}"):
            if Path(model_path).expanduser().is_dir():
                model_path = str(Path(model_path).expanduser())
            skeleton = check_model(model_path)
            tokenizer = load_tokenizer(model_path, adapter)
            receipt = read_receipt(peft_path or model_path)
            num_embeddings = skeleton.get_input_embeddings().weight.shape[0]
    if adapter is not None and skeleton is not None:
        with collect(mistakes, f"{peft_flag} {peft_path}"):
            num_embeddings = check_adapter(adapter, model_path, skeleton)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return ModelSource(model_path, peft_path, skeleton.config, tokenizer, receipt, adapter, num_embeddings)


# -------------------------------------------------------------------------------------------------------------------
# Messages
# -------------------------------------------------------------------------------------------------------------------


@contextmanager
def collect(mistakes: list[str], flag: str = "") -> Iterator[None]:
    """Keeps the message of a ValueError or an OSError in a list, so that all mistakes are told at once."""
    try:
        yield
    except (ValueError, OSError) as problem:
        if flag:
            mistakes.append(f"{flag}: {first_line(problem)}")
        else:
            mistakes.append(str(problem))


@contextmanager
def ask_library(what: str) -> Iterator[None]:
    """Makes one line of whatever a library raises while it reads what the user named."""
    try:
        yield
    except Exception as problem:  # tokenizers, for example, raises Exception itself
        raise ValueError(f"{what}: {first_line(problem)}") from problem


def first_line(problem: Exception) -> str:
    """The first line of a message that says something."""
    for line in str(problem).splitlines():
        if line.strip():
            return line.strip()
    return type(problem).__name__


def list_names(names, most: int = 3) -> str:
    """Names in a message: the first few, and how many more there are."""
    names = sorted(names)
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


# -------------------------------------------------------------------------------------------------------------------
# The folder of a model
# -------------------------------------------------------------------------------------------------------------------


def check_model(path: str) -> transformers.PreTrainedModel:
    """Whether a model can be used: its configuration, and in a local folder every file and every tensor.

    Args:
        path: a folder, or an id on the hub, whose files transformers downloads when it loads them.

    Returns:
        the model without weights (its parameters lie on the meta device), for names and shapes.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        check_hub_id(path)
        with quiet_transformers():
            return make_skeleton(load_config(path))
    check_folder(folder)
    config = load_config(str(folder))
    check_quantization(config)
    headers = {shard.name: read_header(shard) for shard in find_shards(folder)}
    if is_quantised(config):
        # Quantised tensors cannot be rehearsed. Their names are checked by check_report when they are loaded.
        with quiet_transformers():
            return make_skeleton(config)
    check_stored_dtypes(headers)
    return rehearse_loading(folder)


def check_hub_id(path: str) -> None:
    """Raises ValueError if `path` is meant to be a folder, which is not there, or is a file."""
    if Path(path).expanduser().is_file():
        raise ValueError("it is a file; name the folder that holds it")
    if path.startswith((".", "/", "~", "models/", "outputs/")) or path.count("/") > 1:
        if path.rstrip("/") == SAMPLE_MODEL:
            raise ValueError("no such folder; bash scripts/quickstart.sh fetches the sample model")
        raise ValueError("no such folder; name the folder of a whole model")


def check_folder(folder: Path) -> None:
    """Whether the folder holds a model in Hugging Face's format. Raises ValueError with what it holds instead."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            check_lfs_pointer(path)
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"it holds an adapter and no whole model; name it with --peft_path {folder}")
    if (folder / "params.json").is_file():
        raise ValueError("it holds a model in Meta's format; convert it: python convert_llama_weights_to_hf.py "
                         f"--input_dir {folder} --output_dir {folder}-hf")  # fmt: skip
    for other in sorted(folder.glob("*.gguf")):
        raise ValueError(f"it holds {other.name}, a file for llama.cpp; name the folder of a model in safetensors")
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        raise ValueError(f"no config.json in it; its run was not finished, so name a checkpoint such as {checkpoint}")
    raise ValueError("no config.json in it; name the folder of a whole model")


def check_lfs_pointer(path: Path) -> None:
    """Raises ValueError if a file is what `git clone` leaves in place of a large file when git-lfs is missing."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path.name} is a Git LFS pointer instead of the file; run in {path.parent}: "
                             "git lfs install && git lfs pull")  # fmt: skip


def load_config(path: str) -> transformers.PretrainedConfig:
    """The configuration of a language model that reads and writes text only, and is built into transformers.

    Raises:
        ValueError: it is something else, or its model is code of its own.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        with ask_library("config.json is damaged"):
            settings = json.loads(file.read_text(encoding="utf-8"))
        if "auto_map" in settings and settings.get("model_type") not in transformers.CONFIG_MAPPING:
            raise ValueError("its model is code of its own (auto_map in config.json), which is never run here; choose "
                             "a model that is built into transformers")  # fmt: skip
    with ask_library("its configuration cannot be read"), quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} has an encoder and a decoder; name a decoder-only model")
    if config.get_text_config() is not config:
        raise ValueError(f"{config.model_type} is a multimodal model, and only models of text alone are used here; "
                         "name a text-only one of its family")  # fmt: skip
    return config


def is_quantised(config: transformers.PretrainedConfig) -> bool:
    """Whether the weights on disk are quantised; transformers then loads them as they are."""
    return getattr(config, "quantization_config", None) is not None


def check_quantization(config: transformers.PretrainedConfig) -> None:
    """Raises ValueError if the weights are quantised in a way that this machine cannot load."""
    if not is_quantised(config):
        return
    from transformers.quantizers import AutoHfQuantizer

    remedy = "name the 16- or 32-bit original, or install what transformers asks for"
    with ask_library(f"its weights are quantised and cannot be loaded here; {remedy}"):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quantizer.validate_environment(device_map={"": device})


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a folder: model.safetensors, or those of the index.

    Raises:
        ValueError: there are none, or one is missing.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with ask_library(f"{index.name} is damaged"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{list_names(missing)} is missing, of {len(names)} files; download it again")
        return [folder / name for name in names]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        target = f"{folder}-safetensors"
        command = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{target}'); "
            f"T.from_pretrained('{folder}').save_pretrained('{target}')"
        )
        raise ValueError(f"its weights are in {pickles[0].name}, and only safetensors are read here; convert them: "
                         f'python -c "{command}"')  # fmt: skip
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ValueError(f"no model.safetensors in it, and {list_names(others)} has another name; name the folder of "
                         "a whole model")  # fmt: skip
    raise ValueError("no model.safetensors in it; name the folder of a whole model")


def read_header(path: Path) -> dict[str, dict]:
    """`dtype` and `shape` of each tensor of a safetensors file, which must be as long as its header says.

    The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the header as JSON,
    and the tensors one behind the other.

    Raises:
        ValueError: the file is a Git LFS pointer, cut off, or something else.
    """
    check_lfs_pointer(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_length = int.from_bytes(start, "little")
        if size < 9 or header_length > LARGEST_HEADER:
            raise ValueError(f"{path.name} is not a safetensors file ({size:,} bytes); download it again")
        header = file.read(header_length)
    if not header.startswith(b"{"):
        raise ValueError(f"{path.name} is not a safetensors file ({size:,} bytes); download it again")
    if len(header) < header_length:
        raise ValueError(f"{path.name} is cut off within its header, after {size:,} bytes; download it again")
    with ask_library(f"the header of {path.name} is damaged; download it again"):
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
    expected_size = 8 + header_length + max(ends, default=0)
    if size < expected_size:
        raise ValueError(f"{path.name} is cut off: {size:,} of {expected_size:,} bytes; download it again")
    if size > expected_size:
        raise ValueError(f"{path.name} is damaged: {size:,} bytes instead of {expected_size:,}; download it again")
    return tensors


def check_stored_dtypes(headers: dict[str, dict[str, dict]]) -> None:
    """Raises ValueError for weights in 8 bits or less, which mean nothing without the scales of their quantisation."""
    for file, tensors in headers.items():
        for name, tensor in tensors.items():
            is_matrix = name.endswith(".weight") and len(tensor["shape"]) > 1
            if is_matrix and tensor["dtype"] not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{name} in {file} is stored as {tensor['dtype']}, and config.json has no "
                                 "quantization_config that says how to read it; name the original")  # fmt: skip


def rehearse_loading(folder: Path) -> transformers.PreTrainedModel:
    """Lets transformers load the folder onto the meta device, which takes no memory, and looks at its report.

    So the names are compared behind the conversion that transformers makes while it loads, for every architecture.

    Raises:
        ValueError: a tensor that the model needs is missing or has another shape.
    """
    with ask_library("transformers cannot load it"), quiet_transformers():
        skeleton, report = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # then they are reported instead of raised
            output_loading_info=True,
        )
    check_report(report)
    unused = report["unexpected_keys"]
    if unused:
        print(f"note: {folder} holds tensors that its config.json has no use for: {list_names(unused)}",
              file=sys.stderr)  # fmt: skip
    return skeleton


def check_report(report: dict) -> None:
    """Raises ValueError if transformers had to make up a weight: it would be random.

    Args:
        report: what from_pretrained returns with output_loading_info=True.
    """
    missing = report["missing_keys"]
    for key in sorted(report["unexpected_keys"]):
        for name in missing:
            prefix = key.removesuffix(name)
            if key.endswith(f".{name}") and len(missing) > 1:
                raise ValueError(f"the names of its tensors begin with {prefix!r}, which another program put there; "
                                 f"save them without it: {key} is to be {name}")  # fmt: skip
    if missing:
        raise ValueError(f"its files lack {list_names(missing)}, which the model needs; download or save it again")
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ValueError(f"{name} has shape {list(found)} in its files, and config.json asks for {list(expected)}; "
                         f"wrong in {len(report['mismatched_keys'])} tensors")  # fmt: skip


def make_skeleton(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The model without weights: its names and shapes."""
    with ask_library(f"{config.model_type} cannot be used"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no progress bars: what is wrong is said in one line by us."""
    logging = transformers.logging
    verbosity = logging.get_verbosity()
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()


# -------------------------------------------------------------------------------------------------------------------
# The folder of an adapter
# -------------------------------------------------------------------------------------------------------------------


def find_newest_adapter() -> str | None:
    """The adapter of the run below outputs/ that finished last; run.json shows that a run was finished."""
    receipts = []
    for path in Path("outputs").glob("*/run.json"):
        if (path.parent / "adapter_config.json").is_file():
            receipts.append(path)
    if not receipts:
        return None
    newest = max(receipts, key=lambda path: path.stat().st_mtime)
    return str(newest.parent)


def read_adapter(folder: str) -> Adapter:
    """Reads the files of an adapter, whichever program wrote them.

    Raises:
        ValueError: a file is missing or damaged, or the adapter does not belong to the original base model.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file():
        if (path / "config.json").is_file():
            raise ValueError("no adapter_config.json in it, but a whole model; name it with --model_path")
        raise ValueError("no adapter_config.json in it; name the folder of an adapter")
    for file in path.iterdir():
        if file.is_file():
            check_lfs_pointer(file)
    with ask_library("adapter_config.json is damaged"):
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    init = settings.get("init_lora_weights", True)
    if init not in INITS_THAT_KEEP_THE_BASE:
        raise ValueError(f"it was made with init_lora_weights {init}, which changes the weights of the base, so it "
                         "does not belong to the original; save it as a plain LoRA with PEFT's "
                         "save_pretrained(..., path_initial_model_for_weight_conversion=...)")  # fmt: skip
    with ask_library("adapter_config.json is damaged or of a newer PEFT"):
        config = peft.PeftConfig.from_pretrained(folder)
        if config.peft_type is None:
            raise ValueError("it does not name a peft_type")
    shapes, is_untrained = read_adapter_tensors(path)
    return Adapter(path, config, settings, settings.get("base_model_name_or_path") or None, shapes, is_untrained)


def read_adapter_tensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shape of each tensor, and whether the adapter is still as it was made, so that it changes nothing."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        command = (
            "import torch; from safetensors.torch import save_file; "
            f"tensors = torch.load('{folder}/adapter_model.bin', weights_only=True); "
            f"save_file({{name: tensor.contiguous() for name, tensor in tensors.items()}}, '{path}')"
        )
        raise ValueError("no adapter_model.safetensors in it but adapter_model.bin, and only safetensors are read "
                         f'here; convert it: python -c "{command}"')  # fmt: skip
    if not path.is_file():
        raise ValueError("no adapter_model.safetensors in it; name the folder of an adapter that was saved")
    shapes = {name: tuple(tensor["shape"]) for name, tensor in read_header(path).items()}
    if not shapes:
        raise ValueError("its adapter_model.safetensors holds no tensor; save the adapter again")
    return shapes, changes_nothing(path, shapes)


def changes_nothing(path: Path, names) -> bool:
    """Whether a LoRA is still as it was made: B starts as zeros, and of an embedding's two matrices A does."""
    zero_at_first = []
    for name in names:
        if re.search(r"\.(lora_B\.weight|lora_embedding_A)$", name):
            zero_at_first.append(name)
        elif not re.search(r"\.(lora_A\.weight|lora_embedding_B|base_layer\.weight)$", name):
            return False  # something else was trained, too
    with safe_open(path, "pt") as tensors:
        return not any(tensors.get_tensor(name).any() for name in zero_at_first)


def find_base(adapter: Adapter) -> str:
    """The base model that an adapter names. Raises ValueError if it names none, or one that is not here."""
    if adapter.base is None:
        raise ValueError("it names no base model; add --model_path")
    folder = Path(adapter.base).expanduser()
    if folder.is_dir():
        return adapter.base
    try:
        check_hub_id(adapter.base)
        load_config(adapter.base)
    except ValueError as problem:
        raise ValueError(f"its base model {adapter.base} is not here ({first_line(problem)}); name it with "
                         "--model_path") from None  # fmt: skip
    return adapter.base


def check_adapter(adapter: Adapter, model_path: str, skeleton: transformers.PreTrainedModel) -> int:
    """Whether an adapter fits a base model: every name and every shape, and the ids of the tokens.

    Args:
        skeleton: the base model without weights. The adapter is put on it.

    Returns:
        rows of the embedding: those of the base, or more if the adapter brings an embedding of its own.

    Raises:
        ValueError: the first tensor that does not fit, and why.
    """
    trained_on = f"it was trained on {adapter.base or 'a model that it does not name'}"
    num_embeddings = fit_vocabulary(adapter, model_path, skeleton)
    expected = adapter_shapes(adapter, skeleton)
    copies = base_copies(skeleton)
    for name, shape in adapter.shapes.items():
        needed = expected.get(name) or copies.get(name)
        if needed is None:
            raise ValueError(f"its tensor {name} has no place on --model_path {model_path}; {trained_on}")
        if shape != needed:
            raise ValueError(f"its tensor {name} has shape {list(shape)}, and --model_path {model_path} needs "
                             f"{list(needed)}; {trained_on}")  # fmt: skip
    missing = expected.keys() - adapter.shapes.keys()
    if missing:
        raise ValueError(f"it lacks {list_names(missing)} for --model_path {model_path}; {trained_on}")
    check_vocabulary(adapter, model_path, trained_on)
    if adapter.base is not None and Path(adapter.base).absolute() != Path(model_path).absolute():
        print(f"note: {adapter.folder} was trained on {adapter.base}; it fits {model_path}", file=sys.stderr)
    if adapter.is_untrained:
        print(f"warning: {adapter.folder} was never trained: all its B matrices are zero, so it changes nothing",
              file=sys.stderr)  # fmt: skip
    return num_embeddings


def fit_vocabulary(adapter: Adapter, model_path: str, model: transformers.PreTrainedModel) -> int:
    """Gives `model` as many tokens as the adapter was trained with; works on a skeleton and on the loaded model.

    Programs add tokens before training, and save the new rows with the adapter. Returns the rows of the embedding.

    Raises:
        ValueError: the adapter was trained with more tokens, and does not bring their weights.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    trained_rows = {}  # of embedding and head, where the adapter's file says so
    has_whole_weight = set()
    names = {}
    for name, module in model.named_modules():
        if module is model.get_input_embeddings() or module is model.get_output_embeddings():
            names[name] = module
    for name, module in names.items():
        start = f"{PEFT_PREFIX}{name}"
        for ending in (".weight", ".base_layer.weight"):
            if f"{start}{ending}" in adapter.shapes:
                trained_rows[name] = adapter.shapes[f"{start}{ending}"][0]
                has_whole_weight.add(name)
        if f"{start}.lora_embedding_A" in adapter.shapes:
            trained_rows[name] = adapter.shapes[f"{start}.lora_embedding_A"][1]
        elif f"{start}.lora_B.weight" in adapter.shapes and module is model.get_output_embeddings():
            trained_rows[name] = adapter.shapes[f"{start}.lora_B.weight"][0]
    new_num_rows = max(trained_rows.values(), default=num_rows)
    if new_num_rows == num_rows:
        return num_rows
    is_tied = model.config.tie_word_embeddings and bool(has_whole_weight)
    for name in names:
        if name not in has_whole_weight and not is_tied:
            raise ValueError(f"it was trained with {new_num_rows} tokens, --model_path {model_path} has {num_rows}, "
                             f"and the new weights of {name} are not in its file")  # fmt: skip
    with quiet_transformers():
        model.resize_token_embeddings(new_num_rows, mean_resizing=False)
    return new_num_rows


def adapter_shapes(adapter: Adapter, skeleton: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the adapter must have on this base, as PEFT writes them."""
    config = adapter.config
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others look at weights, which a skeleton does not have
    for name in ("token_dim", "num_layers", "num_attention_heads"):
        if hasattr(config, name):
            setattr(config, name, None)  # those of the model that it was trained on; now they are read from this one
    with ask_library("it cannot be put on this model"):
        model = peft.get_peft_model(skeleton, config)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def base_copies(adapted: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """What else PEFT may write: the base's own weights of layers that had an adapter or more tokens.

    Args:
        adapted: the skeleton with the adapter on it. PEFT puts a layer that it changes into one of its own, and the
            file may have the layer under its name with and without that.
    """
    wrappers = ("", ".base_layer", ".original_module", ".modules_to_save")
    copies = {}
    for module_name, module in adapted.named_modules():
        plain = module_name.removesuffix(".default")
        for wrapper in wrappers:
            plain = plain.removesuffix(wrapper)
        for name, parameter in module.named_parameters(recurse=False):
            for wrapper in wrappers:
                copies[f"{PEFT_PREFIX}{plain}{wrapper}.{name}"] = tuple(parameter.shape)
    return copies


def check_vocabulary(adapter: Adapter, model_path: str, trained_on: str) -> None:
    """Raises ValueError if a token has another id for the adapter's tokenizer than for the base's.

    Tokens that only one of them has are harmless: a tokenizer often got a pad token, which no prompt contains.
    """
    if not (adapter.folder / "tokenizer_config.json").is_file():
        return
    try:
        ours = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False).get_vocab()
        theirs = AutoTokenizer.from_pretrained(adapter.folder, trust_remote_code=False).get_vocab()
    except (ValueError, OSError):
        return  # one of the folders has no tokenizer to compare with
    for token, token_id in theirs.items():
        if ours.get(token, token_id) != token_id:
            raise ValueError(f"its vocabulary is not that of --model_path {model_path}: {token!r} is {token_id} there "
                             f"and {ours[token]} here; {trained_on}")  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------
# The prompt
# -------------------------------------------------------------------------------------------------------------------


def load_tokenizer(model_path: str, adapter: Adapter | None = None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of the adapter, if it brings one, because that may have another chat template; else the base's."""
    folder = model_path
    if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
        folder = str(adapter.folder)
    with ask_library(f"the tokenizer of {folder} cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_receipt(folder: str) -> dict:
    """run.json of a run's folder, or of the run that a checkpoint belongs to; empty if there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file() and Path(folder).name.startswith("checkpoint-"):
        path = Path(folder).absolute().parent / "run.json"
    if not path.is_file():
        return {}
    with ask_library(f"{path} is damaged"):
        return json.loads(path.read_text(encoding="utf-8"))


def find_template(template_path: str | None, receipt: dict, tokenizer, first_row: dict) -> dict:
    """How the training data became prompts, as tokenize_dataset.py wrote it down; a base model has no such data.

    Args:
        template_path: a run.json or ledger.json that has the template, instead of the run's own.
        receipt: the run's own run.json.
        first_row: a row to be answered. Its fields choose a template where no file has one.

    Raises:
        ValueError: there is none, several data sets of a run have different ones, or the tokenizer lacks its part or is
            not the one of the training.
    """
    dataset = receipt.get("dataset", {})
    if template_path:
        dataset = read_template_file(template_path)
    else:
        check_tokenizer(dataset, tokenizer)
    template = choose_template(dataset)
    if template is not None:
        needs_chat_template = template["chat"]
    elif template_path:
        raise ValueError("no template in it; data_sample/tokenize_dataset.py writes one into ledger.json, "
                         "training into run.json")  # fmt: skip
    else:
        template = template_for(first_row, tokenizer)
        needs_chat_template = template["format"] == "chat"
    if needs_chat_template and tokenizer.chat_template is None:
        raise ValueError("training used a chat template, and the tokenizer has none; put chat_template.jinja beside it")
    template["chat"] = template["chat"] and tokenizer.chat_template is not None
    return template


def check_tokenizer(dataset: dict, tokenizer) -> None:
    """Raises ValueError if the model was trained on the ids of a tokenizer that behaves otherwise.

    Args:
        dataset: what run.json says about the training set.
    """
    for ledger in dataset.get("sets", {"": dataset}).values():
        difference = find_difference(ledger, tokenizer)
        if difference:
            raise ValueError(f"the tokenizer is not the one of the training: {difference}; put the tokenizer's files "
                             "of the training back, or name a ledger.json to use another one")  # fmt: skip


def read_template_file(path: str) -> dict:
    """What a run.json or a ledger.json says about the training set; nothing if the file is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if not isinstance(content, dict):
        return {}
    return content.get("dataset", content)


def choose_template(dataset: dict) -> dict | None:
    """The template of a set or of a mix of several, which must agree; documents do not count beside questions."""
    sets = dataset.get("sets", {"": dataset})
    templates = [ledger["template"] for ledger in sets.values() if "template" in ledger]
    if not templates:
        return None
    with_questions = [template for template in templates if template["format"] != "text"]
    candidates = with_questions or templates
    if any(template != candidates[0] for template in candidates):
        raise ValueError(f"the run's data have several templates; choose the ledger.json of one of {', '.join(sets)}")
    return dict(candidates[0])


def template_for(row: dict, tokenizer) -> dict:
    """The template for a model that was not trained here, chosen by the fields of a row."""
    if "text" in row:
        return {"format": "text", "chat": False}
    if "prompt" in row and tokenizer.chat_template is None:
        return {"format": "text", "chat": False}
    if row.keys() & {"prompt", "messages", "conversations"}:
        return {"format": "chat", "chat": True}
    if Path(SAMPLE_LEDGER).is_file():
        return json.loads(Path(SAMPLE_LEDGER).read_text(encoding="utf-8"))["template"]
    raise ValueError("the model brings no template for such rows; name a run.json or ledger.json that has one")


def check_system(source: ModelSource, system: str, template: dict) -> None:
    """Raises ValueError if a conversation cannot begin with a system message: some chat templates take none."""
    encode_messages(source, [{"role": "system", "content": system}, user_message("a", template)], template)


def encode_messages(
    source: ModelSource, messages: list[dict], template: dict, tools: list[dict] | None = None
) -> list[int]:
    """The ids of a prompt, as they were in training.

    Raises:
        ValueError: the chat template refuses the messages, or the model has no room or no embedding for the ids.
    """
    with ask_library("the template refuses it"):  # a chat template is a program, and can fail in any way
        ids = encode_prompt(source.tokenizer, messages, template, tools)
    num_tokens = source.num_virtual_tokens + len(ids)
    if num_tokens >= source.context_length:
        raise ValueError(f"it has {num_tokens} tokens, which leaves no room for an answer: the model can attend to "
                         f"{source.context_length}")  # fmt: skip
    largest = max(ids, default=0)
    if largest >= source.num_embeddings:
        token = source.tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"{token!r} has id {largest}, and the model has embeddings for {source.num_embeddings} ids "
                         "only; use the tokenizer that belongs to it")  # fmt: skip
    return ids


# -------------------------------------------------------------------------------------------------------------------
# The model in memory
# -------------------------------------------------------------------------------------------------------------------


def compute_dtype(use_cpu: bool) -> torch.dtype:
    """bf16 on a GPU that multiplies it fast, float32 elsewhere."""
    on_gpu = torch.cuda.is_available() and not use_cpu
    if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def use_4bit(choice: str, source: ModelSource) -> bool:
    """Whether to hold the base in 4 bit.

    Args:
        choice: True, False, or auto for what the adapter was trained with.

    Raises:
        ValueError: the base cannot be held in 4 bit.
    """
    if choice == "auto":
        trained_in_4bit = source.receipt.get("arguments", {}).get("load_in_4bit", False)
        return bool(source.adapter is not None and trained_in_4bit and not is_quantised(source.config))
    if choice == "False":
        return False
    if is_quantised(source.config):
        raise ValueError(f"{source.model_path} is quantised already, and is used as it is; leave the flag out")
    if find_spec("bitsandbytes") is None:
        raise ValueError("needs bitsandbytes; pip install bitsandbytes")
    return True


def four_bit(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """QLoRA's way to hold a frozen base (arXiv:2305.14314): NF4, with the scales quantised, too."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_4bit_exact(model: torch.nn.Module) -> None:
    """Switches a CPU kernel of bitsandbytes off that would round the weights once more than training did."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def has_virtual_tokens(model: torch.nn.Module) -> bool:
    """Whether the model's adapter puts tokens before each row of a batch (prefix, ptuning, prompt)."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def context_length(config: transformers.PretrainedConfig) -> int:
    """The most tokens that the model can attend to; a configuration that does not say so sets no limit."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize
