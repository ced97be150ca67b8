"""What a decoder layer computes for one token: the one description from which both time and memory follow.

Each entry of the list is what PyTorch starts for transformers' modeling_llama.py, in the order of the forward. An
operation has FLOPs, moves bytes, keeps bytes for its backward, and has to be started; how long that takes on a GPU is
not said here. A backward multiplies each product twice, for the gradients of the input and of the matrix.
"""

from dataclasses import dataclass
from functools import lru_cache

from .models import Model
from .strategies import Setup, Strategy

# Of FlashAttention-2's speed on the same GPU. flash_attention_1 also stands for its Triton port; masked: PyTorch's
# memory-efficient kernel with a dense mask. From the figures of arXiv:2307.08691 (FlashAttention-1 and xformers beside
# 2) and arXiv:2407.08608 (3 beside 2, forward 1.84, backward 1.74); flex: PyTorch's blog of 2024-08-07 (0.90, 0.85).
ATTENTION_SPEED = {
    "flash_attention_1": 0.62,
    "flash_attention_2": 1.0,
    "flash_attention_3": 1.77,
    "flex_attention": 0.87,
    "masked": 0.6,
}
FLASH_BACKWARD = 2.5  # products of the backward by those of the forward: five, since the scores are computed again
EAGER_BACKWARD = 2.0


@dataclass(frozen=True)
class Kernel:
    """One operation on one token, in the forward."""

    name: str
    matrix: int = 0  # entries of a product's matrix: two operations each
    is_trained: bool = False  # the matrix gets a gradient
    keys: float = 0  # attention: the keys of a token
    width: int = 0  # attention: values of a query over all heads
    moved: float = 0  # bytes that are read and written, of what is no product; twice as many in the backward
    moved_backward: float | None = None  # where it is not twice as many
    saved: float = 0  # bytes that stay until the backward
    launches: int = 1
    drawn: float = 0  # random numbers, in the forward

    @property
    def flops(self) -> float:
        """Forward: products with a matrix, or scores and their product with the values."""
        return 2 * self.matrix + 4 * self.keys * self.width

    @property
    def bytes_of_backward(self) -> float:
        if self.moved_backward is None:
            return 2 * self.moved
        return self.moved_backward


def attention_kernel(setup: Setup) -> str:
    """What computes attention: a name in ATTENTION_SPEED, or eager."""
    if setup.attention in ("auto", "sdpa"):
        if setup.is_masked:
            return "masked"
        return "flash_attention_2"
    return setup.attention


def uses_autocast(strategy: Strategy, setup: Setup) -> bool:
    """Float32 weights and residual stream, and bf16 copies for the products: full training without FSDP or ZeRO."""
    return strategy.is_pipeline and setup.compute_bytes == 2 and not strategy.adapter


def layer_kernels(model: Model, strategy: Strategy, setup: Setup) -> list[Kernel]:
    """The operations of one decoder layer on one token, in the order of the forward."""
    norm = norm_kernel(model, strategy, setup)
    residual = Kernel("residual", moved=3 * setup.compute_bytes * model.hidden)
    kernels = [norm]
    for name in ("q_proj", "k_proj", "v_proj"):
        kernels += product_kernels(name, model, strategy, setup)
    kernels += attention_kernels(model, setup)
    kernels += product_kernels("o_proj", model, strategy, setup)
    kernels += [residual, norm]
    for name in ("gate_proj", "up_proj"):
        kernels += product_kernels(name, model, strategy, setup)
    kernels += mlp_kernels(model, setup)
    kernels += product_kernels("down_proj", model, strategy, setup)
    kernels.append(residual)
    return kernels


def norm_kernel(model: Model, strategy: Strategy, setup: Setup) -> Kernel:
    """RMSNorm: in float32, and its weight behind it."""
    hidden = model.hidden
    size = setup.compute_bytes
    if uses_autocast(strategy, setup):
        size = 4
    if setup.compiled:
        # One kernel; it keeps its input, which is the residual stream, and the root mean square.
        return Kernel("norm", moved=2 * size * hidden, saved=size * hidden + 4, launches=1)
    # Square, mean, product with the inverse root, product with the weight; in bf16 two casts around them.
    moved = 28 * hidden
    launches = 6
    if size == 2:
        moved = 36 * hidden
    saved = 4 * hidden + 4  # the input in float32, and the root mean square
    if not strategy.adapter:
        saved += size * hidden  # the normalised input, for the weight's gradient
    return Kernel("norm", moved=moved, saved=saved, launches=launches)


def product_kernels(name: str, model: Model, strategy: Strategy, setup: Setup) -> list[Kernel]:
    """The product with one of the seven matrices, and its adapter, if it has one."""
    inputs, outputs = model.matrices[name]
    size = setup.compute_bytes
    is_adapted = strategy.adapter and name in setup.lora_targets
    # q, k and v have one input, and gate and up; the first of them keeps it. Under autocast each makes a copy.
    shares_input = name in ("k_proj", "v_proj", "up_proj") and not uses_autocast(strategy, setup)
    saved = 0
    moved = 0
    launches = 1
    if not strategy.adapter and not shares_input:
        saved = size * inputs
        if name == "o_proj" and not setup.is_joined:
            saved = 0  # attention's output itself, which attention keeps
    if strategy.adapter and strategy.kind == "zero3" and setup.lora_dropout and not (shares_input or strategy.four_bit):
        saved = size * inputs  # DeepSpeed's linear layers keep their inputs although their weights are frozen
    if strategy.four_bit:
        # Each pass unpacks the matrix to bf16: half a byte is read and two are written, for all tokens together.
        moved = 2.5 * inputs * outputs / setup.tokens
        launches = 3
        if not shares_input:
            saved = setup.kept_inputs * size * inputs
    if uses_autocast(strategy, setup):
        moved += 6 * inputs * outputs / setup.tokens  # the matrix is cast, for all tokens together
        launches = 2
    kernels = [
        Kernel(
            name,
            matrix=inputs * outputs,
            is_trained=not strategy.adapter,
            moved=moved,
            moved_backward=moved,
            saved=saved,
            launches=launches,
        )
    ]
    if is_adapted:
        kernels.append(adapter_kernel(name, inputs, outputs, setup))
    return kernels


def adapter_kernel(name: str, inputs: int, outputs: int, setup: Setup) -> Kernel:
    """LoRA's path: dropout, two products with narrow matrices, a scaling, and a sum with the frozen product."""
    size = setup.compute_bytes
    moved = size * (3 * inputs + 6 * outputs) + inputs
    launches = 8
    if setup.compiled:
        moved = moved / 2
        launches = 4
    saved = size * setup.lora_rank
    drawn = 0
    if setup.lora_dropout:
        drawn = inputs
        mask = 1
        if setup.on_cpu:
            mask = size  # a CPU keeps it in the compute precision
        saved += (mask + size) * inputs
    elif name in ("q_proj", "gate_proj", "down_proj") or (name == "o_proj" and setup.is_joined):
        saved += size * inputs  # without dropout those with the same input keep it once
    return Kernel(
        f"{name} LoRA",
        matrix=setup.lora_rank * (inputs + outputs),
        is_trained=True,
        moved=moved,
        saved=saved,
        launches=launches,
        drawn=drawn,
    )


def attention_kernels(model: Model, setup: Setup) -> list[Kernel]:
    """Rotary embedding of queries and keys, and attention."""
    size = setup.compute_bytes
    width = model.attention_width
    kv_width = model.kv_width
    kernel = attention_kernel(setup)
    # With a mask, and in joined rows on a CPU, keys and values are repeated for all heads.
    if setup.is_masked or (setup.is_joined and setup.on_cpu):
        kept_kv_width = width
    else:
        kept_kv_width = kv_width
    rotary = Kernel(
        "rotary embedding",
        moved=10 * size * (width + kv_width),
        saved=size * (width + kept_kv_width),  # queries and keys, which attention keeps
        launches=10,
    )
    if setup.compiled:
        rotary = Kernel("rotary embedding", moved=2 * size * (width + kv_width), saved=rotary.saved, launches=2)
    saved = size * (width + kept_kv_width) + 4 * model.heads  # output and values; the log-sum-exp in float32
    moved = 4 * size * width  # tensors are laid out anew on the way in and out
    moved_backward = None
    keys = model.keys_of_a_token(setup.sequence_length)
    launches = 5
    if setup.is_masked:
        saved += size * setup.sequence_length  # every layer saves the mask in the compute precision
    if kernel in ("masked", "eager"):
        keys = setup.sequence_length  # it computes what the mask hides
    if kernel == "eager":
        # Scores, scaled, masked, cast to float32, softmax, cast back: read and written, for each head and key.
        scores = model.heads * setup.sequence_length
        moved += 16 * size * scores
        moved_backward = moved
        saved += (size + 4 + size) * scores
        launches = 10
    if setup.compiled:
        launches = 1
    attention = Kernel(
        "attention",
        keys=keys,
        width=width,
        moved=moved,
        moved_backward=moved_backward,
        saved=saved,
        launches=launches,
    )
    return [rotary, attention]


def mlp_kernels(model: Model, setup: Setup) -> list[Kernel]:
    """SwiGLU between the products of the MLP."""
    size = setup.compute_bytes
    width = model.intermediate
    if setup.compiled:
        return [Kernel("silu and product", moved=3 * size * width, saved=2 * size * width)]
    return [
        Kernel("silu", moved=2 * size * width, saved=size * width),  # gate
        Kernel("product", moved=3 * size * width, saved=2 * size * width),  # its activation, and up
    ]


@lru_cache(maxsize=10_000)
def saved_bytes(model: Model, strategy: Strategy, setup: Setup) -> float:
    """What one decoder layer keeps for its backward, for all tokens of a forward."""
    return setup.tokens * sum(kernel.saved for kernel in layer_kernels(model, strategy, setup))


@dataclass(frozen=True)
class Work:
    """What a forward and its backward take, for all tokens of one forward of one process."""

    product_flops: float = 0
    attention_flops: float = 0
    moved: float = 0  # bytes, of what is no product
    launches: float = 0
    drawn: float = 0  # random numbers

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.product_flops + other.product_flops,
            self.attention_flops + other.attention_flops,
            self.moved + other.moved,
            self.launches + other.launches,
            self.drawn + other.drawn,
        )

    def times(self, number: float) -> "Work":
        return Work(
            number * self.product_flops,
            number * self.attention_flops,
            number * self.moved,
            number * self.launches,
            number * self.drawn,
        )

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_flops


@lru_cache(maxsize=10_000)
def layer_work(model: Model, strategy: Strategy, setup: Setup) -> Work:
    """One decoder layer: forward, backward, and the forward again if activations are recomputed.

    PyTorch stops recomputing at the last input that the backward needs, which is that of down_proj or of its adapter;
    DeepSpeed's products under ZeRO-3 keep their input when they are done, so that one is computed, too.
    """
    attention_backward = FLASH_BACKWARD
    if attention_kernel(setup) == "eager":
        attention_backward = EAGER_BACKWARD
    products = 0.0
    attention = 0.0
    moved = 0.0
    launches = 0
    drawn = 0.0
    kernels = layer_kernels(model, strategy, setup)
    num_repeated = max(number for number, kernel in enumerate(kernels) if kernel.saved)
    if strategy.kind == "zero3":
        num_repeated += 1
    for number, kernel in enumerate(kernels):
        num_forwards = 1
        if setup.checkpointing and number < num_repeated:
            num_forwards = 2
        num_products = num_forwards + 1  # the gradient of the input
        if kernel.is_trained:
            num_products += 1  # and that of the matrix
        products += num_products * 2 * kernel.matrix
        attention += (num_forwards + attention_backward) * 4 * kernel.keys * kernel.width
        moved += num_forwards * kernel.moved + kernel.bytes_of_backward
        launches += (num_forwards + 2) * kernel.launches
        drawn += num_forwards * kernel.drawn
    tokens = setup.tokens
    return Work(tokens * products, tokens * attention, tokens * moved, launches, tokens * drawn)


def head_work(model: Model, strategy: Strategy, setup: Setup) -> Work:
    """Final norm, output layer and loss; with joined rows only for the tokens that have a target."""
    targets = setup.tokens
    if setup.padding_free:
        targets = setup.tokens * setup.target_share
    num_products = 2
    if not strategy.adapter:
        num_products = 3
        if strategy.preferences:
            num_products = 4  # the gradient of its weight waits for the loss of the pairs, and needs the logits again
    # Logits in bf16 (2 bytes written), cast to float32 (6), log-softmax (8), and the way back (14).
    moved = 30 * model.vocab * targets
    return Work(num_products * 2 * model.head_params * targets, 0, moved, 30)


def reference_work(model: Model, strategy: Strategy, setup: Setup) -> Work:
    """A forward by the reference: the frozen model alone, and nothing is kept for a backward."""
    products = 0.0
    attention = 0.0
    moved = 0.0
    launches = 0
    for kernel in layer_kernels(model, strategy, setup):
        if kernel.name.endswith("LoRA"):
            continue
        products += 2 * kernel.matrix
        attention += 4 * kernel.keys * kernel.width
        moved += kernel.moved
        launches += kernel.launches
    tokens = setup.tokens
    layers = Work(tokens * products, tokens * attention, tokens * moved, launches).times(model.layers)
    targets = tokens * setup.target_share
    # Logits in bf16 (2 bytes written), cast to float32 (6), log-softmax (8).
    return layers + Work(2 * model.head_params * targets, 0, 16 * model.vocab * targets, 10)


def micro_step_work(model: Model, strategy: Strategy, setup: Setup) -> Work:
    """All that a forward and its backward take in one process, or in a pipeline's devices together."""
    work = layer_work(model, strategy, setup).times(model.layers) + head_work(model, strategy, setup)
    if strategy.computes_reference:
        work = work + reference_work(model, strategy, setup)
    return work
