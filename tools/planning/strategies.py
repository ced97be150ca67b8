"""The strategies of this toolkit, and the size of one forward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """One way of the toolkit to train, and how a user starts it."""

    kind: str  # pp, fsdp, zero2 or zero3
    adapter: bool = False
    offload: bool = False
    four_bit: bool = False
    launcher: str = ""
    flags: str = ""


ZERO, LORA = "finetune_pp_peft_trainer_deepspeed.sh", "finetune_pp_peft_trainer_lora.sh"
STRATEGIES = {
    "pp": Strategy("pp", launcher="finetune_pp.sh"),
    "pp_peft": Strategy("pp", adapter=True, launcher="finetune_pp_peft.sh"),
    "FSDP": Strategy("fsdp", launcher="finetune_pp_peft_trainer.sh"),
    "FSDP+LoRA": Strategy("fsdp", adapter=True, launcher=LORA),
    "QLoRA": Strategy("fsdp", adapter=True, four_bit=True, launcher=LORA, flags="--load_in_4bit True"),
}
for stage in ("2", "3"):
    for offload in (False, True):
        config = f"--deepspeed ds_configs/zero{stage}{'_offload' if offload else ''}.json"
        for adapter in (False, True):
            name = f"ZeRO-{stage}{' offload' if offload else ''}{'+LoRA' if adapter else ''}"
            flags = f"{config} --lora_used {adapter}"
            STRATEGIES[name] = Strategy(f"zero{stage}", adapter, offload, launcher=ZERO, flags=flags)


@dataclass(frozen=True)
class Setup:
    """What is the same for all strategies, and the size of one forward."""

    gpus: int = 8  # of one machine
    nodes: int = 1
    rows: int = 1  # rows of one forward of one process
    accumulation: int = 1
    sequence_length: int = 512  # tokens of a row
    checkpointing: bool = False
    padding_free: bool = True  # the rows of a forward joined to one
    target_share: float = 1.0  # share of the tokens that are targets; only those get logits if padding-free
    lora_rank: int = 8
    lora_dropout: bool = True
    compute_bytes: int = 2  # of a number in the forward: bf16; 4 in float32
    on_cpu: bool = False  # CPU processes, as in --validate

    @property
    def tokens(self) -> int:
        """Tokens of one forward of one process."""
        return self.rows * self.sequence_length
