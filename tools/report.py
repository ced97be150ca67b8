"""Shows runs: their curves over the steps as one picture and one page, and what differs between their receipts.

    python tools/report.py outputs/finetune_pp_peft
    python tools/report.py outputs/lora outputs/ptuning --output_dir outputs/comparison
    python tools/report.py outputs/finetune_pp_peft --watch 10

Writes report.png and report.html into --output_dir. The page needs no network: the picture stands in it as SVG. It
works on the folder of any training script, also while the run goes on: then the curves come from runs/ (TensorBoard,
unless --report_to none) or from the newest complete checkpoint, and --watch writes both files again every so many
seconds until all runs have ended.

Where the curves come from: trainer_state.json holds loss, evaluation loss, gradient norm, learning rate and tokens.
Tokens/s need the time of each step, which only runs/ has, and there alone memory is logged by step: the most that the
first process has held since it was started or resumed. The peak of every process stands in run.json.
"""

import html
import io
import json
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: the picture goes to files
import matplotlib.font_manager
import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from transformers import HfArgumentParser

MAX_POINTS = 2000  # drawn of each curve; beyond that a bucket's least and greatest value stand for it
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
# transformers' TensorBoard callback writes evaluation under another name than log_history.
NAMES_IN_EVENTS = {"eval/loss": "eval_loss"}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/report", metadata={"help": "folder for report.png and report.html"})
    watch: float = field(default=0, metadata={"help": "write both again every so many seconds, until all runs ended"})


@dataclass
class Run:
    """One run as its folder tells it: `rows` are log rows by step; `receipt` is None until run.json is there."""

    name: str
    rows: list[dict]
    receipt: dict | None
    facts: dict  # the receipt flattened; of a run that goes on, the settings in its newest complete checkpoint


# -------------------------------------------------------------------------------------------------------------------
# Reading a run folder, finished or not
# -------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict | None:
    """None if the file is missing or half-written: a run that goes on may be writing it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_events(folder: Path) -> dict[int, dict]:
    """Log rows by step from TensorBoard's files, with the time of each as `time` (seconds since 1970).

    A resumed run starts a new file: what the former file has from that step on was trained again.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    rows: dict[int, dict] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name):
        new: dict[int, dict] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value if event.HasField("summary") else ():
                name = NAMES_IN_EVENTS.get(value.tag, value.tag.removeprefix("train/"))
                if "/" not in name and value.HasField("tensor") and make_ndarray(value.tensor).shape == ():
                    row = new.setdefault(event.step, {"step": event.step, "time": event.wall_time})
                    row[name] = float(make_ndarray(value.tensor))
        first = min(new, default=math.inf)
        rows = {step: row for step, row in rows.items() if step < first} | new
    return rows


def read_run(folder: Path) -> Run:
    """Everything the folder tells about its run so far."""
    receipt = read_json(folder / "run.json")
    checkpoints = [
        path.parent for path in folder.glob("checkpoint-*/complete.json") if path.parent.name[11:].isdecimal()
    ]
    newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    state = read_json(folder / "trainer_state.json") or (newest and read_json(newest / "trainer_state.json")) or {}
    rows = read_events(folder / "runs")
    for row in state.get("log_history", ()):  # in full precision, where TensorBoard has single
        if "step" in row:
            rows[row["step"]] = rows.get(row["step"], {}) | row
    facts = flatten(receipt or {})
    if receipt is None and newest:
        identity = (read_json(newest / "complete.json") or {}).get("identity", {})
        facts = {f"arguments.{name}": value for name, value in flatten(identity).items()}
    return Run(str(folder), [rows[step] for step in sorted(rows)], receipt, facts)


def flatten(tree, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = [flatten(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items()]
    return {name: value for part in parts for name, value in part.items()}


# -------------------------------------------------------------------------------------------------------------------
# Curves
# -------------------------------------------------------------------------------------------------------------------


def curve(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `name` as a number."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def speed(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and tokens per second between a logged step and the one before; only rows with a time count.

    A pause (the run was interrupted, or it evaluated and saved) lies within such an interval and shows as a dip.
    """
    timed = [row for row in rows if "time" in row and "num_input_tokens_seen" in row]
    steps, speeds = [], []
    for before, row in zip(timed, timed[1:], strict=False):
        seconds, tokens = row["time"] - before["time"], row["num_input_tokens_seen"] - before["num_input_tokens_seen"]
        if seconds > 0 and tokens > 0:
            steps.append(row["step"])
            speeds.append(tokens / seconds)
    return np.array(steps, dtype=float), np.array(speeds, dtype=float)


def memory(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the first process's peak since its start, in GiB; of a run without runs/, the last step's alone."""
    steps, values = curve(run.rows, "peak_memory_bytes")
    peaks = (run.receipt or {}).get("peak_memory_bytes")
    if len(steps) == 0 and run.rows and peaks:
        steps, values = np.array([run.rows[-1]["step"]]), np.array(peaks[:1])
    return steps, values / 2**30


def points_of(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one panel's curve."""
    if name == "memory":
        return memory(run)
    return speed(run.rows) if name == "speed" else curve(run.rows, name)


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a fiftieth of the curve, without bias at its start (as Adam corrects its own)."""
    decay = 1 - 1 / max(1, len(values) / 50)
    smoothed, average = np.empty_like(values), 0.0
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        smoothed[i] = average / (1 - decay ** (i + 1))
    return smoothed


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points of a curve; each bucket keeps its least and greatest value, so no spike is lost."""
    if len(values) <= MAX_POINTS:
        return steps, values
    kept = {0, len(values) - 1}
    for bucket in np.array_split(np.arange(len(values)), MAX_POINTS // 2 - 1):
        kept |= {int(bucket[np.argmin(values[bucket])]), int(bucket[np.argmax(values[bucket])])}
    kept = sorted(kept)
    return steps[kept], values[kept]


def draw(runs: list[Run]) -> plt.Figure:
    """Six panels: loss, evaluation loss, gradient norm, learning rate, tokens/s, memory."""
    available = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in available)]
    plt.rcParams["svg.fonttype"] = "none"  # text stays text, so that the page's own fonts show any language
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.2), layout="constrained")
    panels = {
        "loss": "Loss (faint: each step; strong: smoothed)",
        "eval_loss": "Evaluation loss",
        "grad_norm": "Gradient norm",
        "learning_rate": "Learning rate",
        "speed": "Tokens per second",
        "memory": "Peak memory of process 0, GiB (dotted: of all)",
    }
    for (name, title), axis in zip(panels.items(), axes.flat, strict=False):
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        num_curves = 0
        for number, run in enumerate(runs):
            steps, values = points_of(run, name)
            finite = np.isfinite(values)
            steps, values = steps[finite], values[finite]
            if len(values) == 0:
                continue
            num_curves += 1
            peaks = (run.receipt or {}).get("peak_memory_bytes", []) if name == "memory" else []
            if peaks:
                ends, marker = steps[[0, -1]], "_" if len(steps) == 1 else None
                axis.plot(ends, [max(peaks) / 2**30] * 2, ":", color=color(number), linewidth=1.5, marker=marker)
            # A curve of a few points is shown by its points: a line through one of them would be invisible.
            style = {"color": color(number), "marker": "o" if len(values) <= 50 else None, "markersize": 4}
            smoothed = name in ("loss", "grad_norm", "speed") and len(values) > 50
            axis.plot(*thin(steps, values), alpha=0.25 if smoothed else 1, linewidth=0.6 if smoothed else 1.6, **style)
            if smoothed:
                axis.plot(*thin(steps, smooth(values)), linewidth=2, color=color(number), zorder=3)
        if num_curves == 0:
            leave_empty(axis, "not logged")
            continue
        if name == "memory":
            axis.set_ylim(bottom=0)
        if name == "learning_rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        heights = np.concatenate([line.get_ydata() for line in axis.lines])
        if name == "grad_norm" and heights.min() > 0 and heights.max() > 100 * heights.min():
            axis.set_yscale("log")
        steps = np.concatenate([line.get_xdata() for line in axis.lines])
        if steps.min() == steps.max():
            axis.set_xlim(steps[0] - 1, steps[0] + 1)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    lines = [plt.Line2D([], [], color=color(number), linewidth=3) for number in range(len(runs))]
    labels = [run.name if len(run.name) <= 60 else f"…{run.name[-59:]}" for run in runs]
    figure.legend(lines, labels, loc="outside upper left", ncols=2, frameon=False)
    return figure


def leave_empty(axis, reason: str) -> None:
    axis.text(0.5, 0.5, reason, ha="center", va="center", transform=axis.transAxes, color="gray")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("")


def color(number: int):
    return plt.get_cmap("tab10")(number % 10)


# -------------------------------------------------------------------------------------------------------------------
# The page
# -------------------------------------------------------------------------------------------------------------------


def differences(runs: list[Run]) -> tuple[list[str], list[str]]:
    """Names of the receipts' entries that differ between the runs, and of those that are alike."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    differing = [name for name in names if len({json.dumps(run.facts.get(name), sort_keys=True) for run in runs}) > 1]
    return differing, [name for name in names if name not in differing]


def show(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summarize(run: Run) -> dict[str, str]:
    """The columns of the page's first table."""
    receipt = run.receipt or {}
    losses, eval_losses = curve(run.rows, "loss")[1], curve(run.rows, "eval_loss")[1]
    tokens = curve(run.rows, "num_input_tokens_seen")[1]
    devices, peaks = receipt.get("devices"), receipt.get("peak_memory_bytes")
    return {
        "run": run.name,
        "state": "ended" if run.receipt else "no run.json yet",
        "steps": show(run.rows[-1]["step"] if run.rows else None),
        "first loss": show(float(losses[0]) if len(losses) else None),
        "last loss": show(float(losses[-1]) if len(losses) else None),
        "least evaluation loss": show(float(eval_losses.min()) if len(eval_losses) else None),
        "tokens": f"{int(tokens[-1]):,}" if len(tokens) else "–",
        "tokens/s": f"{receipt['tokens_per_second']:,.0f}" if "tokens_per_second" in receipt else "–",
        "seconds": f"{receipt['wall_time_seconds']:,.0f}" if "wall_time_seconds" in receipt else "–",
        "peak GiB": f"{max(peaks) / 2**30:.2f}" if peaks else "–",
        "devices": f"{len(devices)} × {devices[0].split(':')[0]}" if devices else "–",
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, "Noto Sans CJK SC", sans-serif; margin: 1.5rem auto }}
body {{ max-width: 1400px; padding: 0 1rem }}
svg {{ width: 100%; height: auto }} .wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: .5rem 0 }} th {{ text-align: left; background: #f2f2f2 }}
th, td {{ border: 1px solid #ddd; padding: .3rem .6rem; vertical-align: top }}
td {{ max-width: 40rem }} .receipts td, td:first-child {{ overflow-wrap: anywhere; min-width: 6rem }}
td:first-child {{ font-weight: 600 }} summary {{ cursor: pointer; margin: 1rem 0 }}
</style></head><body><h1>{title}</h1>{summary}{picture}<div class="receipts">{receipts}</div>
<p>Written {time}.</p></body></html>
"""


def write_report(runs: list[Run], output_dir: Path, refresh_seconds: float) -> None:
    """Writes report.png and report.html; each appears whole, since a browser may read it at any moment."""
    figure = draw(runs)
    picture = io.StringIO()
    with warnings.catch_warnings():
        # A name in Chinese without one of CHINESE_FONTS: boxes in the PNG, but the page uses the reader's own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(output_dir / "report.tmp", format="png", dpi=110)
        figure.savefig(picture, format="svg", metadata={"Date": None})
    plt.close(figure)
    os.replace(output_dir / "report.tmp", output_dir / "report.png")

    header = ["entry", *(run.name for run in runs)]
    differing, alike = differences(runs)
    receipts = ""
    if len(runs) > 1:
        rows = [[name, *(show(run.facts.get(name)) for run in runs)] for name in differing]
        receipts = f"<h2>What differs between the receipts ({len(differing)})</h2>{table(header, rows)}"
    rows = [[name, show(runs[0].facts.get(name))] for name in alike]
    receipts += f"<details><summary>The same in all ({len(alike)})</summary>{table(['entry', 'value'], rows)}</details>"
    summaries = [summarize(run) for run in runs]
    page = PAGE.format(
        refresh=f'<meta http-equiv="refresh" content="{refresh_seconds:g}">' if refresh_seconds else "",
        title=html.escape("Run " + runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        summary=table(list(summaries[0]), [list(summary.values()) for summary in summaries]),
        picture=picture.getvalue()[picture.getvalue().index("<svg") :],
        receipts=receipts,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    (output_dir / "report.tmp").write_text(page, encoding="utf-8")
    os.replace(output_dir / "report.tmp", output_dir / "report.html")


def check_arguments(args: Arguments, folders: list[Path]) -> None:
    """Raises ValueError with all mistakes, one a line."""
    mistakes = []
    for folder in folders:
        if not folder.is_dir():
            mistakes.append(f"{folder}: no such folder; name the --output_dir of a training script")
        elif not any(any(folder.glob(name)) for name in ("run.json", "trainer_state.json", "runs", "checkpoint-*")):
            mistakes.append(f"{folder}: holds no run; name the --output_dir of a training script")
    if not 0 <= args.watch < math.inf:
        mistakes.append(f"--watch {args.watch}: must be 0, for once, or a number of seconds")
    output_dir = Path(args.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        mistakes.append(f"--output_dir {args.output_dir}: {existing} is no writable folder; choose another")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s RUN [RUN ...] [--flag value ...]", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that a training script wrote")
    try:
        args, positional = parser.parse_args_into_dataclasses()
        check_arguments(args, positional.runs)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    while True:
        runs = [read_run(folder) for folder in positional.runs]
        all_ended = all(run.receipt for run in runs)
        write_report(runs, output_dir, 0 if all_ended else args.watch)
        if args.watch == 0 or all_ended:
            break
        time.sleep(args.watch)
    differing, _ = differences(runs)
    for run in runs:
        print(", ".join(f"{name} {value}" for name, value in summarize(run).items() if value != "–"))
    if len(runs) > 1:
        print(f"{len(differing)} entries of the receipts differ, among them: {', '.join(differing[:8])}")
    print(f"wrote {output_dir / 'report.png'} and {output_dir / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the usual end of --watch
