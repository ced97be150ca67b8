"""How plan.py shows what it found: texts of at most 120 columns, and a picture."""

import shlex
from pathlib import Path

from .hardware import GB, GiB, usable_bytes
from .models import MODELS
from .search import Job, Way, find_range
from .strategies import MATRICES, STRATEGIES

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
BAR = 40  # characters
# Behind a text, so that no line runs through it.
PAPER = {"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 1}
LEGEND = """
ckpt: gradient checkpointing. rows x acc: rows of one forward of one GPU, and forwards of an optimizer step; the fastest
  that fits, and of those within 3 % the one with most rows. most: the most rows of one forward that fit.
tensors: GiB that PyTorch's tensors take on the fullest GPU at the worst moment of a step. smi: GiB that nvidia-smi will
  show there, as long as memory is not short. host: GB of host memory on one machine. disk: GB of one checkpoint.
  (GiB = 2^30 bytes, as GPUs are sold; GB = 10^9 bytes.)
tok/s/GPU: tokens a second for each GPU. MFU: the model's own work as a share of the data sheet's FLOPs."""

BEST_LEGEND = """
memory: W weights, G gradients, O optimizer, A activations, L logits, B buffers; + what PyTorch's allocator, CUDA and
  NCCL take besides. In brackets: from the 10th to the 90th percentile of published runs of the same kind, and at least
  that of all kinds together; by its middle the ways are ordered."""


def headline(job: Job) -> str:
    setup = job.setup
    return (
        f"{job.name}: {job.model.params / 1e9:.2f} billion parameters; {job.tokens:.3g} tokens, "
        f"{job.batch} rows of {setup.sequence_length} tokens a step"
    )


def machine_name(way: Way) -> str:
    if way.machine.nodes > 1:
        return f"{way.machine.nodes} x {way.machine.gpus} {way.gpu}"
    return f"{way.machine.gpus} {way.gpu}"


def yes_or_no(value: bool) -> str:
    if value:
        return "yes"
    return "no"


# -------------------------------------------------------------------------------------------------------------------
# The command that starts a way
# -------------------------------------------------------------------------------------------------------------------


def command(job: Job, way: Way) -> str:
    """What starts a way; DATASET, to be set, is the folder of the tokenized set."""
    return " ".join(command_words(job, way))


def command_words(job: Job, way: Way) -> list[str]:
    strategy = STRATEGIES[way.strategy]
    setup = way.setup
    model = job.name.removesuffix("/config.json")
    if job.name in MODELS:
        model = f"models/{job.name}"
    words = [f"MODEL={shlex.quote(model)}", "DATASET=$DATASET", f"NUM_GPUS={way.machine.gpus}"]
    if setup.nodes > 1:
        words += [f"NUM_NODES={setup.nodes}", "NODE_RANK=$NODE_RANK", "MASTER_ADDR=$MASTER_ADDR"]
    if setup.on_cpu:
        words.append("USE_CPU=1")
    words += ["sh", f"scripts/{strategy.launcher}"]
    words += strategy.flags.split()
    words += ["--per_device_train_batch_size", str(setup.rows), "--gradient_accumulation_steps"]
    words += [str(setup.accumulation), "--gradient_checkpointing", str(setup.checkpointing)]
    words += ["--padding_free", str(setup.padding_free)]
    if setup.attention != "auto":
        words += ["--attn_implementation", setup.attention]
    if setup.compiled:
        words += ["--torch_compile", "True"]
    if strategy.adapter:
        words += ["--lora_rank", str(setup.lora_rank)]
        if setup.lora_targets != MATRICES:
            words += ["--lora_target_modules", ",".join(setup.lora_targets)]
    return words


def wrap(words: list[str], indent: str, width: int = 118) -> list[str]:
    """A command over several lines, which a shell reads as one."""
    groups = []
    for word in words:
        # A flag's value stays beside its flag.
        if groups and groups[-1].startswith("--") and " " not in groups[-1] and not word.startswith("--"):
            groups[-1] += f" {word}"
        else:
            groups.append(word)
    lines = []
    line = indent
    for group in groups:
        if len(line) + len(group) + 1 > width and line.strip():
            lines.append(line + "\\")
            line = indent + "  "
        line += group + " "
    lines.append(line.rstrip())
    return lines


# -------------------------------------------------------------------------------------------------------------------
# The three best
# -------------------------------------------------------------------------------------------------------------------


def memory_bar(way: Way) -> str:
    """Letters for the kinds of memory, a dot for what the GPU has besides; one character is a fortieth of it."""
    letters = dict(zip(KINDS, "WGOALB", strict=True))
    each = way.machine.gpu.memory / BAR
    bar = ""
    held = 0.0
    for kind in KINDS:
        held += getattr(way.memory.worst, kind)
        bar += letters[kind] * (round(held / each) - len(bar))
    bar += "+" * (round(way.shown_bytes / each) - len(bar))
    return bar + "." * (BAR - len(bar))


def print_best(job: Job, ways: list[Way]) -> None:
    """The best ways, each with its memory, time, price and command."""
    for number, way in enumerate(ways, start=1):
        setup = way.setup
        what = "all weights"
        if way.trains_adapter:
            what = f"LoRA, rank {setup.lora_rank}"
        checkpointing = "no checkpointing"
        if setup.checkpointing:
            checkpointing = "checkpointing"
        where = machine_name(way)
        if way.machine.gpus > 1:
            where += f" ({way.machine.gpu.link.name})"
        print(
            f"\n{number}. {way.strategy} on {where}: {what}, {setup.rows} rows x {setup.accumulation}, {checkpointing}"
        )
        low, high = find_range(way, "memory")
        shown = way.shown_bytes / GiB
        text = f"{low * shown:.0f} to {high * shown:.0f}"
        if way.may_not_fit:
            text += ": it may not fit"
        print(f"   memory  [{memory_bar(way)}] {shown:.1f} of {way.machine.gpu.memory / GiB:.1f} GiB in nvidia-smi "
              f"({text})")  # fmt: skip
        low, high = find_range(way, "time")
        line = f"   time    {way.hours:,.1f} hours ({low * way.hours:,.1f} to {high * way.hours:,.1f}), "
        line += f"{way.speed.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {way.speed.mfu:.0%}"
        if way.price:
            line += f"; {way.price:,.0f} dollars ({low * way.price:,.0f} to {high * way.price:,.0f})"
        print(line)
        print("\n".join(wrap(command_words(job, way), "   ")))
    print(BEST_LEGEND)


# -------------------------------------------------------------------------------------------------------------------
# Tables
# -------------------------------------------------------------------------------------------------------------------


def print_all(ways: list[Way]) -> None:
    """Every way in one line; what fits comes first, the fastest first."""
    fitting = sorted((way for way in ways if way.fits), key=lambda way: way.hours)
    others = [way for way in ways if not way.fits]
    has_price = any(way.price for way in ways)
    several = len({(way.gpu, way.machine) for way in ways}) > 1
    machine = None
    for way in fitting + others:
        if several or machine is None:
            if machine != machine_name(way):
                machine = machine_name(way)
                print_machine(way)
                print_columns(has_price)
        print_way(way, has_price)
    print(LEGEND)


def print_machine(way: Way) -> None:
    gpu = way.machine.gpu
    usable = usable_bytes(gpu, way.machine.num_gpus)
    print(f"\n{machine_name(way)}: {usable / GiB:.1f} of {gpu.memory / GiB:.1f} GiB for tensors")


def print_columns(has_price: bool) -> None:
    line = f"{'strategy':20}{'ckpt':>5}{'rows x acc':>12}{'most':>6}{'tensors':>9}{'smi':>7}{'host':>7}{'disk':>8}"
    line += f"{'tok/s/GPU':>11}{'MFU':>6}{'hours':>10}"
    if has_price:
        line += f"{'dollars':>10}"
    print(line)


def print_way(way: Way, has_price: bool) -> None:
    setup = way.setup
    rows = f"{setup.rows} x {setup.accumulation}"
    line = f"{way.strategy:20}{yes_or_no(setup.checkpointing):>5}{rows:>12}{way.most_rows:>6,}"
    line += f"{way.memory.total / GiB:>9.1f}"
    if not way.fits:
        print(f"{line}  {way.problem}")
        return
    line += f"{way.shown_bytes / GiB:>7.1f}{way.memory.host / GB:>7.0f}{way.memory.disk / GB:>8.1f}"
    line += f"{way.speed.tokens_per_second_per_gpu:>11,.0f}{way.speed.mfu:>6.0%}{way.hours:>10,.1f}"
    if has_price:
        line += f"{way.price:>10,.0f}"
    print(line)


def print_contexts(contexts: list[tuple[str, bool, int]]) -> None:
    print(f"\nlongest row, one row a forward\n{'strategy':22}{'without checkpointing':>22}{'with':>12}")
    lengths = {}
    for strategy, checkpointing, length in contexts:
        lengths.setdefault(strategy, {})[checkpointing] = length
    for strategy, found in sorted(lengths.items(), key=lambda item: -max(item[1].values())):
        print(f"{strategy:22}{length_text(found[False]):>22}{length_text(found[True]):>12}")


def length_text(length: int) -> str:
    if length == 0:
        return "-"
    return f"{length:,}"


def print_trainable(table: list[tuple]) -> None:
    print(f"\n{'model':22}{'billions':>9}   {'all weights':29}{'LoRA':29}LoRA on 4 bits")
    for name, model, best in table:
        line = f"{name:22}{model.params / 1e9:>9.2f}   "
        for group in ("full", "LoRA", "QLoRA"):
            text = "-"
            if group in best:
                strategy, length = best[group]
                text = f"{strategy} {length:,}"
            line += f"{text:29}"
        print(line.rstrip())
    print("\nof each the strategy with the longest row of tokens that fits, one row a forward")


def print_gpu_counts(table: list[tuple], deadline: float) -> None:
    line = f"\n{'strategy':22}{'fewest that fit':>18}{'hours':>10}"
    if deadline:
        line += f"{f'fewest for {deadline:g} hours':>28}{'hours':>10}"
    print(line)
    for name, fewest, in_time in table:
        if fewest is None:
            print(f"{name:22}{'none':>18}")
            continue
        line = f"{name:22}{machine_name(fewest):>18}{fewest.hours:>10,.1f}"
        if deadline and in_time is not None:
            line += f"{machine_name(in_time):>28}{in_time.hours:>10,.1f}"
        elif deadline:
            line += f"{'none':>28}"
        print(line)


def print_scaling(table: list[dict]) -> None:
    print("\nFSDP over all machines, and hybrid sharding (HSDP), for which the scripts have no flag:")
    print("shards over a group of machines, copies over the groups")
    print(f"{'machines':>9}{'rows a step':>13}{'FSDP hours':>12}{'HSDP hours':>12}{'machines of its group':>23}")
    for line in table:
        cells = ""
        for name in ("fsdp_hours", "hsdp_hours"):
            if line[name] is None:
                cells += f"{'-':>12}"
            else:
                cells += f"{line[name]:>12.2f}"
        print(f"{line['nodes']:>9}{line['rows_of_step']:>13}{cells}{line['hsdp_nodes'] or '-':>23}")


# -------------------------------------------------------------------------------------------------------------------
# The picture
# -------------------------------------------------------------------------------------------------------------------


def draw(job: Job, ways: list[Way], path: Path) -> None:
    """A bar for each way, by kind of memory, against its GPU's size: the fastest on top, what does not fit below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fitting = sorted((way for way in ways if way.fits), key=lambda way: way.hours)
    others = sorted((way for way in ways if not way.fits), key=lambda way: way.memory.total)
    ways = fitting + others
    gpu = max(way.machine.gpu.memory for way in ways) / GiB
    largest = max(way.memory.total for way in ways) / GiB
    shown = min(1.9 * gpu, max(1.3 * gpu, 1.1 * largest))
    figure, axis = plt.subplots(figsize=(12, 0.36 * len(ways) + 1.8), layout="constrained")
    left = [0.0] * len(ways)
    positions = range(len(ways))
    for kind in KINDS:
        sizes = [getattr(way.memory.worst, kind) / GiB for way in ways]
        axis.barh(positions, sizes, left=left, label=kind)
        for number, size in enumerate(sizes):
            left[number] += size
    beside = [max(0.0, way.shown_bytes / GiB - total) for way, total in zip(ways, left, strict=True)]
    axis.barh(positions, beside, left=left, label="allocator, CUDA, NCCL", color="lightgray")
    labels = []
    for number, way in enumerate(ways):
        labels.append(bar_label(way))
        text = way.problem
        if way.fits:
            text = f"{way.hours:,.1f} h"
        end = left[number] + beside[number]
        if end < 0.85 * shown:
            axis.text(end + 0.01 * shown, number, text, va="center", fontsize=9, bbox=PAPER)
        else:
            text = f"{left[number]:,.0f} GiB, {text}"
            axis.text(0.99 * shown, number, text, va="center", ha="right", fontsize=9, bbox=PAPER)
    for name, size in dict.fromkeys((way.gpu, way.machine.gpu.memory / GiB) for way in ways):
        axis.axvline(size, color="black", linestyle="--", linewidth=1)
        axis.text(size, -0.9, f"{name}: {size:.0f} GiB", ha="center", fontsize=9, bbox=PAPER)
    axis.set_yticks(positions, labels)
    axis.set_xlim(0, shown)
    axis.set_ylim(len(ways) - 0.5, -1.4)  # the first at the top
    axis.set_xlabel("GiB on the fullest GPU at the worst moment of a step")
    figure.suptitle(headline(job))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bar_label(way: Way) -> str:
    label = f"{way.strategy}, {machine_name(way)}, {way.setup.rows} x {way.setup.accumulation}"
    if way.setup.checkpointing:
        label += ", checkpointing"
    return label
