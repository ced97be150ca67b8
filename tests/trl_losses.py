"""Trains with TRL's own trainers what tests/test_dpo.py trains with finetune_pp_dpo.py, and writes loss and margin.

    .venv-peers/trl/bin/python tests/trl_losses.py run.json

Loaded in TRL's environment, so it imports nothing of the project. The rows are token ids in the order of training. A
trainer gets them in place of the rows that it has tokenized itself, so that both train on the same ids.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def choose_trainer(loss_type: str):
    """(the class of the trainer, the class of its configuration, its own settings) of a loss."""
    if loss_type in ("sigmoid", "ipo", "hinge"):
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig, {"loss_type": loss_type}
    if loss_type == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "max_length": 512}
    if loss_type == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig, {"max_length": 512}
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer, KTOConfig, {}


def raw_rows(loss_type: str) -> Dataset:
    """Rows of text, only because the trainers ask for some."""
    row = {"prompt": "a b", "chosen": " c d", "rejected": " e f"}
    if loss_type == "kto":
        row = {"prompt": "a b", "completion": " c d", "label": True}
    return Dataset.from_list([row, row | {"label": False} if loss_type == "kto" else row])


def columns(loss_type: str, row: dict) -> dict:
    """A row in the columns that the trainer's collator reads."""
    if loss_type in ("sigmoid", "ipo", "hinge", "kto"):
        return row
    result = {}
    for answer in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{answer}_ids"]
        result[f"{answer}_input_ids"] = ids
        result[f"{answer}_attention_mask"] = [1] * len(ids)
        result[f"{answer}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{answer}_ids"]
    return result


def main() -> None:
    run = json.loads(Path(sys.argv[1]).read_text())
    loss_type = run["loss_type"]
    trainer_class, config_class, settings = choose_trainer(loss_type)
    log = []

    class Recorder(trainer_class):
        def compute_loss(self, *arguments, **named):
            loss = super().compute_loss(*arguments, **named)
            measures = getattr(self, "_metrics", None) or self._stored_metrics
            margins = measures["train"]["rewards/margins"]
            log.append({"loss": loss.item(), "margin": margins[-1] if margins else None})
            return loss

    config = config_class(
        output_dir=run["output"],
        beta=run["beta"],
        per_device_train_batch_size=run["rows_per_step"],
        max_steps=run["steps"],
        learning_rate=run["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=10**6,  # the recorder reads what is collected until then
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
    reference = {}
    if run["adapter"]:
        model = PeftModel.from_pretrained(model, run["adapter"], is_trainable=True)
    elif loss_type in ("sigmoid", "ipo", "hinge", "kto"):
        reference["ref_model"] = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
    trainer = Recorder(model, args=config, train_dataset=raw_rows(loss_type), processing_class=tokenizer, **reference)
    trainer.train_dataset = Dataset.from_list([columns(loss_type, row) for row in run["rows"]])
    trainer.train()
    Path(run["log"]).write_text(json.dumps(log))


if __name__ == "__main__":
    main()
