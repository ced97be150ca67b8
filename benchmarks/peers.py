"""Starts one system of benchmarks/compare.py under the measuring that all systems share. Not started by hand.

    .venv-peers/trl/bin/python benchmarks/peers.py run.json   # which compare.py or benchmarks/preferences.py wrote

Each function below does what the system's own documentation tells its user to do; what is set besides the settings that
are the same for all stands there with its reason. Loaded in each peer's environment, so it imports only torch here.
"""

import importlib.machinery
import json
import os
import re
import runpy
import sys
import time
import types
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
PAD_ID = 0  # the copied model's pad token; torchtune and LitGPT pad with this id whatever the tokenizer says


# -------------------------------------------------------------------------------------------------------------------
# Measuring, the same for all
# -------------------------------------------------------------------------------------------------------------------


def measure(log: str, num_steps: int) -> None:
    """Writes one JSON line for each optimizer step into `log`, and ends the process after the last one.

    A line has the time by the clock and that of the CPU, the real tokens that were embedded for it (what is not
    padding), all positions, the precision of the computation and the most memory that the process has held until then,
    in bytes.
    """
    seen = {"real_tokens": 0, "positions": 0}
    embed = torch.nn.Embedding.forward
    steps = []

    def counting_embed(module, input_ids):
        if torch.is_grad_enabled():  # else it is a check or an evaluation
            seen["real_tokens"] += int((input_ids != PAD_ID).sum())
            seen["positions"] += input_ids.numel()
            seen["dtype"] = str(module.weight.dtype)
            if torch.is_autocast_enabled("cpu"):
                seen["dtype"] = str(torch.get_autocast_dtype("cpu"))
        return embed(module, input_ids)

    def write_step(*_) -> None:
        memory = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        steps.append({"time": time.time(), "cpu_seconds": time.process_time(), "memory": memory} | seen)
        seen.update(real_tokens=0, positions=0)
        if len(steps) == num_steps:
            Path(log).write_text("".join(json.dumps(step) + "\n" for step in steps))
            sys.stdout.flush()
            os._exit(0)  # what a system saves at its end is not measured

    torch.nn.Embedding.forward = counting_embed
    register_optimizer_step_post_hook(write_step)


def stub(*names: str) -> None:
    """Modules that a system imports for pictures and sound, and that no text needs."""
    for name in names:
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def run_script(path: Path, *arguments) -> None:
    """As `python path arguments` would."""
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def read_rows(run: dict) -> list[dict]:
    return [json.loads(line) for line in Path(run["rows"]).read_text(encoding="utf-8").splitlines()]


# -------------------------------------------------------------------------------------------------------------------
# The systems
# -------------------------------------------------------------------------------------------------------------------


def start_ours(run: dict) -> None:
    """Unchanged, on the set that tokenize_dataset.py wrote, with --packing True for ours-packing."""
    # Only our tests install it; a user's environment lacks it, as the peers' do, and PEFT would import it at the start.
    sys.modules["bitsandbytes"] = None
    flags = ["--model_path", run["model"], "--dataset_path", run["tokenized"], "--output_dir", run["output"]]
    flags += ["--per_device_train_batch_size", run["batch_size"], "--max_steps", run["steps"], "--use_cpu", "True"]
    flags += ["--bf16", "False", "--gradient_checkpointing", run["checkpointing"] == "on"]
    script = "finetune_pp.py"
    if run["mode"] == "lora":
        script = "finetune_pp_peft.py"
        flags += ["--lora_rank", 8, "--lora_alpha", 16, "--lora_dropout", run["dropout"]]
    run_script(ROOT / script, *flags)


def start_dpo_ours(run: dict) -> None:
    """finetune_pp_dpo.py unchanged, on a paired set, at the loss that TRL has by itself."""
    sys.modules["bitsandbytes"] = None
    flags = ["--model_path", run["model"], "--dataset_path", run["tokenized"], "--output_dir", run["output"]]
    flags += ["--per_device_train_batch_size", run["batch_size"], "--max_steps", run["steps"], "--use_cpu", "True"]
    flags += ["--bf16", "False", "--gradient_checkpointing", run["checkpointing"] == "on"]
    flags += ["--lora_used", run["mode"] == "lora", "--lora_rank", 8, "--lora_alpha", 16]
    run_script(ROOT / "finetune_pp_dpo.py", *flags)


def start_dpo_trl(run: dict) -> None:
    """DPOTrainer with its defaults, but for bf16 and, unless asked for, gradient checkpointing: it switches both on.

    It tokenizes texts by itself; here it gets the ids of our set in their place, so that both train on the same ones.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=run["output"],
        per_device_train_batch_size=run["batch_size"],
        max_steps=run["steps"],
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=run["checkpointing"] != "off",  # True is its default
    )
    peft_config = None
    if run["mode"] == "lora":
        peft_config = lora_config(run)
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2)
    trainer = DPOTrainer(run["model"], args=config, train_dataset=text, peft_config=peft_config)
    trainer.train_dataset = Dataset.from_list(read_rows(run))
    trainer.train()


def lora_config(run: dict):
    from peft import LoraConfig

    dropout = run["dropout"]
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def start_trl(run: dict) -> None:
    """SFTTrainer with its defaults, but for bf16 and, unless asked for, gradient checkpointing: it switches both on."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=run["output"],
        per_device_train_batch_size=run["batch_size"],
        max_steps=run["steps"],
        max_length=run["max_length"],
        packing=run["variant"] == "packing",
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=run["checkpointing"] != "off",  # True is its default
    )
    rows = []
    for row in read_rows(run):
        rows.append({"prompt": row["prompt"], "completion": row["completion"]})
    peft_config = None
    if run["mode"] == "lora":
        peft_config = lora_config(run)
    trainer = SFTTrainer(run["model"], args=config, train_dataset=Dataset.from_list(rows), peft_config=peft_config)
    trainer.train()


def start_trainer(run: dict) -> None:
    """transformers' Trainer with PEFT, and Alpaca's collation: the rows of a batch padded to the longest."""
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
    rows = []
    for row in read_rows(run):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    args = TrainingArguments(
        output_dir=run["output"],
        per_device_train_batch_size=run["batch_size"],
        max_steps=run["steps"],
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=run["checkpointing"] == "on",
    )
    if run["mode"] == "lora":
        model = get_peft_model(model, lora_config(run))
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()


def start_llamafactory(run: dict) -> None:
    """`llamafactory-cli train` with its defaults, but, unless asked for, gradient checkpointing: it switches it on.

    Its examples set bf16, which this leaves out: a CPU without bf16 units takes minutes a step.
    """
    stub("torchaudio")
    from llamafactory.train.tuner import run_exp

    folder = Path(run["output"]) / "data"
    folder.mkdir(parents=True)
    columns = {"prompt": "prompt", "response": "completion"}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", "columns": columns}}))
    (folder / "rows.json").write_text(json.dumps(read_rows(run)))
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": run["model"],
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",  # the rows have the chat template's text already
        "cutoff_len": run["max_length"],
        "packing": run["variant"] in ("packing", "neat_packing"),
        "neat_packing": run["variant"] == "neat_packing",
        "finetuning_type": run["mode"],
        "per_device_train_batch_size": run["batch_size"],
        "max_steps": run["steps"],
        "output_dir": str(Path(run["output"]) / "run"),
        "disable_gradient_checkpointing": run["checkpointing"] == "off",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    if run["mode"] == "lora":
        settings |= {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": run["dropout"], "lora_target": "all"}
    run_exp(settings)


class TorchtuneTokenizer:
    """torchtune 0.6 has no tokenizer for any model of Hugging Face's, only this base, which its user wraps."""

    pad_id = PAD_ID

    def __init__(self, path: str):
        from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

        files = {name: f"{path}/{name}.json" for name in ("tokenizer", "tokenizer_config")}
        self.base = HuggingFaceBaseTokenizer(files["tokenizer"], tokenizer_config_json_path=files["tokenizer_config"])

    def __call__(self, row: dict) -> dict:
        prompt = self.base.encode(row["prompt"], add_bos=False, add_eos=False)
        completion = self.base.encode(row["completion"], add_bos=False, add_eos=False)
        return {"tokens": prompt + completion, "mask": [True] * len(prompt) + [False] * len(completion)}


def torchtune_rows(tokenizer, path: str, packed: bool, max_length: int):
    from torchtune.datasets import PackedDataset, SFTDataset

    data = SFTDataset(source="json", data_files=path, split="train", message_transform=None, model_transform=tokenizer)
    if packed:
        return PackedDataset(data, max_seq_len=max_length, padding_idx=PAD_ID)
    return data


def start_torchtune(run: dict) -> None:
    """Its recipe for one device, with the settings of its llama3_2/1B config where none is given here."""
    stub("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")
    import torchtune

    shape = json.loads((Path(run["model"]) / "config.json").read_text())
    is_lora = run["mode"] == "lora"
    model = {
        "_component_": f"torchtune.models.llama3_2.{'lora_' * is_lora}llama3_2",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "max_seq_len": shape["max_position_embeddings"],
        "intermediate_dim": shape["intermediate_size"],
        "rope_base": int(shape["rope_parameters"]["rope_theta"]),
        "scale_factor": 1,  # LLaMA 3.2's longer context, which this model has not
    }
    if is_lora:
        model |= {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
        model |= {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": run["dropout"]}
    config = {
        "output_dir": run["output"],
        "model": model,
        "tokenizer": {"_component_": "peers.TorchtuneTokenizer", "path": run["model"]},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": run["model"],
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": run["output"],
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "save_adapter_weights_only": True,
        "dataset": {
            "_component_": "peers.torchtune_rows",
            "path": run["rows"],
            "packed": run["variant"] == "packing",
            "max_length": run["max_length"],
        },
        "seed": None,
        "shuffle": True,
        "batch_size": run["batch_size"],
        "gradient_accumulation_steps": 1,
        "epochs": 1,
        "max_steps_per_epoch": run["steps"],
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 2e-5, "weight_decay": 0.01},
        # Its config for full fine-tuning has bitsandbytes' 8-bit AdamW and updates within the backward, both for GPUs
        # that are too small: less memory than here. All others keep AdamW's state in float32, too.
        "optimizer_in_bwd": False,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 100,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": None,
        "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": run["output"]},
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": run["checkpointing"] == "on",
        "enable_activation_offloading": False,
    }
    if not is_lora:
        del config["lr_scheduler"]  # its config for full fine-tuning has none
    path = Path(run["output"]) / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config))  # any JSON is YAML
    recipes = Path(torchtune.__file__).parent.parent / "recipes"
    recipe = "full_finetune_single_device.py"
    if is_lora:
        recipe = "lora_finetune_single_device.py"
    run_script(recipes / recipe, "--config", path)


def start_litgpt(run: dict) -> None:
    """`litgpt finetune_lora` and `litgpt finetune_full`; the model was converted beforehand."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.finetune import full, lora
    from litgpt.prompts import Default
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    model = Path(run["model"])
    if not (model / "lit_model.pth").is_file():
        convert_hf_checkpoint(model, model_name="SmolLM2-135M-Instruct")
    if run["variant"] == "convert":
        sys.exit()
    rows = [{"instruction": row["prompt"], "output": row["output"]} for row in read_rows(run)]
    folder = Path(run["output"]) / "data"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps(rows[:1]))  # it wants one
    settings = {
        "checkpoint_dir": model,
        "out_dir": Path(run["output"]) / "run",
        "precision": "32-true",
        "data": JSON(folder, mask_prompt=True, prompt_style=Default()),
        "train": TrainArgs(
            global_batch_size=run["batch_size"],
            micro_batch_size=run["batch_size"],
            max_steps=run["steps"],
            epochs=5,
            lr_warmup_steps=1,
            save_interval=None,
            max_seq_length=run["max_length"],
        ),
        "eval": EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, initial_validation=False),
    }
    if run["mode"] == "full":
        full.setup(**settings)
    else:
        parts = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
        lora.setup(**settings, **parts, lora_r=8, lora_alpha=16, lora_dropout=run["dropout"])


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    measure(run["log"], run["steps"])
    {
        "ours": start_ours,
        "trl": start_trl,
        "trainer": start_trainer,
        "llamafactory": start_llamafactory,
        "torchtune": start_torchtune,
        "litgpt": start_litgpt,
        "dpo_ours": start_dpo_ours,
        "dpo_trl": start_dpo_trl,
    }[run["system"]](run)


if __name__ == "__main__":
    main()
