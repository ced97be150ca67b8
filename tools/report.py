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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.paths import expand_home

MAX_POINTS = 2000  # drawn of each curve; beyond that a bucket's least and greatest value stand for it
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
# transformers' TensorBoard callback writes evaluation under another name than log_history.
NAMES_IN_EVENTS = {"eval/loss": "eval_loss"}
PANELS = {
    "loss": "Loss (faint: each step; strong: smoothed)",
    "eval_loss": "Evaluation loss",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "speed": "Tokens per second",
    "memory": "Peak memory of process 0, GiB (dotted: of all)",
}
MISSING = "–"


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


def read_event_file(path: Path) -> dict[int, dict]:
    """Log rows by step from one of TensorBoard's files, with the time of each as `time` (seconds since 1970)."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    rows = {}
    for event in EventFileLoader(str(path)).Load():
        if not event.HasField("summary"):
            continue
        for value in event.summary.value:
            name = NAMES_IN_EVENTS.get(value.tag, value.tag.removeprefix("train/"))
            if "/" in name or not value.HasField("tensor"):
                continue
            number = make_ndarray(value.tensor)
            if number.shape == ():
                row = rows.setdefault(event.step, {"step": event.step, "time": event.wall_time})
                row[name] = float(number)
    return rows


def read_events(folder: Path) -> dict[int, dict]:
    """Log rows by step from all of TensorBoard's files in a folder.

    A resumed run starts a new file: what the former file has from that step on was trained again.
    """
    rows = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name):
        new_rows = read_event_file(path)
        first = min(new_rows, default=math.inf)
        for step in list(rows):
            if step >= first:
                del rows[step]
        rows.update(new_rows)
    return rows


def find_newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint-<step> of the largest step; one with this name is complete, but for that of a former version."""
    checkpoints = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and read_settings(path) is not None:
            checkpoints[int(step)] = path
    if not checkpoints:
        return None
    return checkpoints[max(checkpoints)]


def read_settings(checkpoint: Path) -> dict | None:
    """The run's settings in a checkpoint; None if it holds none, and so is not complete."""
    settings = read_json(checkpoint / "settings.json")
    if settings is not None:
        return settings.get("settings")
    former = read_json(checkpoint / "complete.json")
    if former is not None:
        return former.get("identity", {})
    return None


def read_run(folder: Path) -> Run:
    """Everything the folder tells about its run so far."""
    receipt = read_json(folder / "run.json")
    checkpoint = find_newest_checkpoint(folder)
    state = read_json(folder / "trainer_state.json")
    if state is None and checkpoint is not None:
        state = read_json(checkpoint / "trainer_state.json")
    rows = read_events(folder / "runs")
    if state is not None:
        for row in state.get("log_history", []):  # in full precision, where TensorBoard has single
            if "step" in row:
                rows[row["step"]] = rows.get(row["step"], {}) | row
    facts = {}
    if receipt is not None:
        facts = flatten(receipt)
    elif checkpoint is not None:
        facts = flatten({"arguments": read_settings(checkpoint)})
    return Run(str(folder), [rows[step] for step in sorted(rows)], receipt, facts)


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one, with dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# -------------------------------------------------------------------------------------------------------------------
# Curves
# -------------------------------------------------------------------------------------------------------------------


def curve(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `name` as a number."""
    steps = []
    values = []
    for row in rows:
        if isinstance(row.get(name), int | float):
            steps.append(row["step"])
            values.append(row[name])
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def speed(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and tokens per second between a logged step and the one before; only rows with a time count.

    A pause (the run was interrupted, or it evaluated and saved) lies within such an interval and shows as a dip.
    """
    steps = []
    speeds = []
    before = None
    for row in rows:
        if "time" not in row or "num_input_tokens_seen" not in row:
            continue
        if before is not None:
            seconds = row["time"] - before["time"]
            tokens = row["num_input_tokens_seen"] - before["num_input_tokens_seen"]
            if seconds > 0 and tokens > 0:
                steps.append(row["step"])
                speeds.append(tokens / seconds)
        before = row
    return np.array(steps, dtype=float), np.array(speeds, dtype=float)


def peaks_of(run: Run) -> list[int]:
    """Peak memory of every process in bytes, from the receipt; empty while the run goes on."""
    if run.receipt is None:
        return []
    return run.receipt.get("peak_memory_bytes", [])


def memory(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the first process's peak since its start, in GiB; of a run without runs/, the last step's alone."""
    steps, values = curve(run.rows, "peak_memory_bytes")
    peaks = peaks_of(run)
    if len(steps) == 0 and run.rows and peaks:
        steps = np.array([run.rows[-1]["step"]])
        values = np.array(peaks[:1])
    return steps, values / 2**30


def points_of(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one panel's curve, without what is not finite."""
    if name == "memory":
        steps, values = memory(run)
    elif name == "speed":
        steps, values = speed(run.rows)
    else:
        steps, values = curve(run.rows, name)
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a fiftieth of the curve, without bias at its start (as Adam corrects its own)."""
    decay = 1 - 1 / max(1, len(values) / 50)
    smoothed = np.empty_like(values)
    average = 0.0
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
        kept.add(int(bucket[np.argmin(values[bucket])]))
        kept.add(int(bucket[np.argmax(values[bucket])]))
    kept = sorted(kept)
    return steps[kept], values[kept]


def draw(runs: list[Run]) -> plt.Figure:
    """Six panels: loss, evaluation loss, gradient norm, learning rate, tokens/s, memory."""
    available = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    plt.rcParams["font.family"] = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in available)]
    plt.rcParams["svg.fonttype"] = "none"  # text stays text, so that the page's own fonts show any language
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.2), layout="constrained")
    for (name, title), axis in zip(PANELS.items(), axes.flat, strict=True):
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        for number, run in enumerate(runs):
            draw_curve(axis, run, name, color(number))
        if axis.lines:
            set_scales(axis, name)
        else:
            leave_empty(axis, "not logged")
    lines = []
    labels = []
    for number, run in enumerate(runs):
        lines.append(plt.Line2D([], [], color=color(number), linewidth=3))
        if len(run.name) <= 60:
            labels.append(run.name)
        else:
            labels.append(f"…{run.name[-59:]}")
    figure.legend(lines, labels, loc="outside upper left", ncols=2, frameon=False)
    return figure


def draw_curve(axis, run: Run, name: str, its_color) -> None:
    """Draws one run into one panel; nothing if it has no such value."""
    steps, values = points_of(run, name)
    if len(values) == 0:
        return
    if name == "memory" and peaks_of(run):
        marker = None
        if len(steps) == 1:
            marker = "_"
        highest = max(peaks_of(run)) / 2**30
        axis.plot(steps[[0, -1]], [highest, highest], ":", color=its_color, linewidth=1.5, marker=marker)
    # A curve of a few points is shown by its points: a line through one of them would be invisible.
    if len(values) <= 50:
        axis.plot(steps, values, linewidth=1.6, color=its_color, marker="o", markersize=4)
    elif name in ("loss", "grad_norm", "speed"):
        axis.plot(*thin(steps, values), alpha=0.25, linewidth=0.6, color=its_color)
        axis.plot(*thin(steps, smooth(values)), linewidth=2, color=its_color, zorder=3)
    else:
        axis.plot(*thin(steps, values), linewidth=1.6, color=its_color)


def set_scales(axis, name: str) -> None:
    """Axes that fit what was drawn."""
    heights = np.concatenate([line.get_ydata() for line in axis.lines])
    steps = np.concatenate([line.get_xdata() for line in axis.lines])
    if name == "memory":
        axis.set_ylim(bottom=0)
    if name == "learning_rate":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    if name == "grad_norm" and heights.min() > 0 and heights.max() > 100 * heights.min():
        axis.set_yscale("log")
    if steps.min() == steps.max():
        axis.set_xlim(steps[0] - 1, steps[0] + 1)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))


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
    differing = []
    alike = []
    for run in runs:
        for name in run.facts:
            if name in differing or name in alike:
                continue
            values = {json.dumps(other.facts.get(name), sort_keys=True) for other in runs}
            if len(values) > 1:
                differing.append(name)
            else:
                alike.append(name)
    return differing, alike


def show(value) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def summarize(run: Run) -> dict[str, str]:
    """The columns of the page's first table."""
    names = ["run", "state", "steps", "first loss", "last loss", "least evaluation loss", "tokens", "tokens/s"]
    names += ["seconds", "peak GiB", "devices"]
    summary = dict.fromkeys(names, MISSING)
    summary["run"] = run.name
    summary["state"] = "no run.json yet"
    if run.rows:
        summary["steps"] = show(run.rows[-1]["step"])
    _, losses = curve(run.rows, "loss")
    if len(losses):
        summary["first loss"] = show(float(losses[0]))
        summary["last loss"] = show(float(losses[-1]))
    _, eval_losses = curve(run.rows, "eval_loss")
    if len(eval_losses):
        summary["least evaluation loss"] = show(float(eval_losses.min()))
    _, tokens = curve(run.rows, "num_input_tokens_seen")
    if len(tokens):
        summary["tokens"] = f"{int(tokens[-1]):,}"
    if run.receipt is None:
        return summary
    summary["state"] = "ended"
    if "tokens_per_second" in run.receipt:
        summary["tokens/s"] = f"{run.receipt['tokens_per_second']:,.0f}"
    if "wall_time_seconds" in run.receipt:
        summary["seconds"] = f"{run.receipt['wall_time_seconds']:,.0f}"
    if peaks_of(run):
        summary["peak GiB"] = f"{max(peaks_of(run)) / 2**30:.2f}"
    devices = run.receipt.get("devices")
    if devices:
        summary["devices"] = f"{len(devices)} × {devices[0].split(':')[0]}"
    return summary


def table(header: list[str], rows: list[list[str]]) -> str:
    """An HTML table of texts."""
    lines = ['<div class="wide"><table><thead><tr>']
    lines += [f"<th>{html.escape(name)}</th>" for name in header]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>")
        lines += [f"<td>{html.escape(cell)}</td>" for cell in row]
        lines.append("</tr>")
    lines.append("</tbody></table></div>")
    return "".join(lines)


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

    title = f"{len(runs)} runs"
    if len(runs) == 1:
        title = "Run " + runs[0].name
    refresh = ""
    if refresh_seconds:
        refresh = f'<meta http-equiv="refresh" content="{refresh_seconds:g}">'
    summaries = [summarize(run) for run in runs]
    svg = picture.getvalue()
    page = PAGE.format(
        refresh=refresh,
        title=html.escape(title),
        summary=table(list(summaries[0]), [list(summary.values()) for summary in summaries]),
        picture=svg[svg.index("<svg") :],
        receipts=make_receipts(runs),
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    (output_dir / "report.tmp").write_text(page, encoding="utf-8")
    os.replace(output_dir / "report.tmp", output_dir / "report.html")


def make_receipts(runs: list[Run]) -> str:
    """HTML: what differs between the receipts, and, folded up, what is the same in all."""
    differing, alike = differences(runs)
    page = ""
    if len(runs) > 1:
        header = ["entry", *(run.name for run in runs)]
        rows = []
        for name in differing:
            rows.append([name, *(show(run.facts.get(name)) for run in runs)])
        page += f"<h2>What differs between the receipts ({len(differing)})</h2>{table(header, rows)}"
    rows = [[name, show(runs[0].facts.get(name))] for name in alike]
    page += f"<details><summary>The same in all ({len(alike)})</summary>{table(['entry', 'value'], rows)}</details>"
    return page


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
        mistakes.append(f"--output_dir {args.output_dir}: {existing} is not a writable folder; choose another")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s RUN [RUN ...] [--flag value ...]", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that a training script wrote")
    try:
        args, positional = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        check_arguments(args, positional.runs)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    while True:
        runs = [read_run(folder) for folder in positional.runs]
        all_ended = all(run.receipt for run in runs)
        if args.watch == 0 or all_ended:
            write_report(runs, output_dir, 0)
            break
        write_report(runs, output_dir, args.watch)
        time.sleep(args.watch)
    for run in runs:
        parts = [f"{name} {value}" for name, value in summarize(run).items() if value != MISSING]
        print(", ".join(parts))
    if len(runs) > 1:
        differing, _ = differences(runs)
        print(f"{len(differing)} entries of the receipts differ, among them: {', '.join(differing[:8])}")
    print(f"wrote {output_dir / 'report.png'} and {output_dir / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # the usual end of --watch
