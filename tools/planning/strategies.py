"""The strategies of this toolkit, and the size of one forward."""

from dataclasses import dataclass, field, replace

from .models import MATRICES


@dataclass(frozen=True)
class Strategy:
    """One way of the toolkit to train, and how a user starts it."""

    kind: str  # pp, 1f1b, fsdp, zero2 or zero3
    launcher: str
    adapter: bool = False
    offload: bool = False
    four_bit: bool = False
    preferences: bool = False  # it learns from pairs: a row is two documents, with a chosen and a rejected answer
    flags: str = ""

    @property
    def is_one_process(self) -> bool:
        """The plain loops, which spread the layers over the devices of one machine."""
        return self.kind == "pp"

    @property
    def is_pipeline(self) -> bool:
        """Each GPU has some of the layers, and sees all rows."""
        return self.kind in ("pp", "1f1b")

    @property
    def computes_reference(self) -> bool:
        """A forward of the model without its adapter in every micro-step; without adapters it is done before."""
        return self.preferences and self.adapter

    @property
    def prefetches(self) -> bool:
        """Weights are on their way before they are used.

        ZeRO-3 does so where it knows the order of the modules, from the forward before. With the reference's forward
        in between, which has no adapters, that is always another order.
        """
        return not (self.kind == "zero3" and self.computes_reference)


TRAINER = "finetune_pp_peft_trainer.sh"
TRAINER_LORA = "finetune_pp_peft_trainer_lora.sh"
DEEPSPEED = "finetune_pp_peft_trainer_deepspeed.sh"
DPO = "finetune_pp_dpo.sh"
DPO_TRAINER = "finetune_pp_dpo_trainer.sh"
ZERO2 = "--deepspeed ds_configs/zero2.json"
ZERO3 = "--deepspeed ds_configs/zero3.json"
ZERO2_OFFLOAD = "--deepspeed ds_configs/zero2_offload.json"
ZERO3_OFFLOAD = "--deepspeed ds_configs/zero3_offload.json"
FULL = " --lora_used False"
LORA = " --lora_used True"

STRATEGIES = {
    "pp": Strategy("pp", "finetune_pp.sh"),
    "pp_peft": Strategy("pp", "finetune_pp_peft.sh", adapter=True),
    "1F1B": Strategy("1f1b", "finetune_pp_1f1b.sh", flags=FULL.strip()),
    "1F1B+LoRA": Strategy("1f1b", "finetune_pp_1f1b.sh", adapter=True, flags=LORA.strip()),
    "FSDP": Strategy("fsdp", TRAINER),
    "FSDP+LoRA": Strategy("fsdp", TRAINER_LORA, adapter=True),
    "QLoRA": Strategy("fsdp", TRAINER_LORA, adapter=True, four_bit=True, flags="--load_in_4bit True"),
    "ZeRO-2": Strategy("zero2", DEEPSPEED, flags=ZERO2 + FULL),
    "ZeRO-2+LoRA": Strategy("zero2", DEEPSPEED, adapter=True, flags=ZERO2 + LORA),
    "ZeRO-2 offload": Strategy("zero2", DEEPSPEED, offload=True, flags=ZERO2_OFFLOAD + FULL),
    "ZeRO-2 offload+LoRA": Strategy("zero2", DEEPSPEED, adapter=True, offload=True, flags=ZERO2_OFFLOAD + LORA),
    "ZeRO-3": Strategy("zero3", DEEPSPEED, flags=ZERO3 + FULL),
    "ZeRO-3+LoRA": Strategy("zero3", DEEPSPEED, adapter=True, flags=ZERO3 + LORA),
    "ZeRO-3 offload": Strategy("zero3", DEEPSPEED, offload=True, flags=ZERO3_OFFLOAD + FULL),
    "ZeRO-3 offload+LoRA": Strategy("zero3", DEEPSPEED, adapter=True, offload=True, flags=ZERO3_OFFLOAD + LORA),
    "pp+DPO": Strategy("pp", DPO, preferences=True, flags=FULL.strip()),
    "pp+LoRA+DPO": Strategy("pp", DPO, adapter=True, preferences=True, flags=LORA.strip()),
    "FSDP+DPO": Strategy("fsdp", DPO_TRAINER, preferences=True, flags=FULL.strip()),
    "FSDP+LoRA+DPO": Strategy("fsdp", DPO_TRAINER, adapter=True, preferences=True, flags=LORA.strip()),
    "ZeRO-2+LoRA+DPO": Strategy("zero2", DPO_TRAINER, adapter=True, preferences=True, flags=ZERO2 + LORA),
    "ZeRO-3+DPO": Strategy("zero3", DPO_TRAINER, preferences=True, flags=ZERO3 + FULL),
    "ZeRO-3+LoRA+DPO": Strategy("zero3", DPO_TRAINER, adapter=True, preferences=True, flags=ZERO3 + LORA),
}
SUPERVISED = tuple(name for name, strategy in STRATEGIES.items() if not strategy.preferences)
PREFERENCES = tuple(name for name, strategy in STRATEGIES.items() if strategy.preferences)

# Kernels of attention, by the scripts' --attn_implementation; flash_attention_1 is for runs of others.
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", "flash_attention_1")


@dataclass(frozen=True)
class Setup:
    """How a strategy runs: what is the same for all strategies, and the size of one forward."""

    gpus: int = 8  # of one machine
    nodes: int = 1
    shard_nodes: int = 0  # hybrid sharding: weights are sharded over so many machines; 0: over all of them
    rows: int = 1  # rows of one forward of one process
    accumulation: int = 1
    sequence_length: int = 512  # tokens of a row, which is one document
    checkpointing: bool = False
    padding_free: bool = True  # the rows of a forward joined to one
    target_share: float = 1.0  # share of the tokens that are targets; only those get logits if padding-free
    has_mask: bool = True  # padded rows come with a mask; some programs leave it out, as padding has no target
    attention: str = "auto"
    compiled: bool = False  # the scripts' --torch_compile: elementwise operations in few kernels
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = field(default=MATRICES)
    lora_dropout: bool = True
    compute_bytes: int = 2  # of a number in the forward: bf16; 4 in float32
    weight_bytes: int = 4  # of a trained weight
    optimizer_bytes: float = 8  # of the optimizer's state, for each trained weight: AdamW's two moments in float32
    reduce_bytes: int = 4  # of a gradient that FSDP reduces
    zero_gradient_bytes: int = 4  # of one that DeepSpeed keeps and reduces: ds_configs/ ask for float32
    chunked_loss: bool = True  # with joined rows logits exist for a chunk of targets at a time, as in data_collator.py
    logit_bytes: int = 12  # else, of each logit: log-softmax and two gradients in float32; more where others keep it
    kept_inputs: int = 0  # QLoRA: copies of a quantised product's input that stay; old bitsandbytes kept it
    on_cpu: bool = False  # CPU processes

    @property
    def tokens(self) -> int:
        """Tokens of one forward of one process."""
        return self.rows * self.sequence_length

    @property
    def num_gpus(self) -> int:
        return self.gpus * self.nodes

    @property
    def is_joined(self) -> bool:
        """Several rows in one: attention goes document by document, without a mask."""
        return self.padding_free and self.rows > 1

    @property
    def is_masked(self) -> bool:
        """Several padded rows need a mask."""
        return self.rows > 1 and not self.padding_free and self.has_mask


def setup_of_forward(strategy: Strategy, setup: Setup) -> Setup:
    """The setup by documents: a pair is two of them, and an adapter that learns from pairs has no dropout."""
    if not strategy.preferences:
        return setup
    return replace(setup, rows=2 * setup.rows, lora_dropout=False)
