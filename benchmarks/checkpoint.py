"""Measures what a checkpoint costs, as a ratio to writing the same bytes: plain writes of its files and a sync.

    python benchmarks/checkpoint.py -- finetune_pp.py --use_cpu True --bf16 False --output_dir outputs/checkpoint

Behind `--` stands a training script of one process and its flags. It saves after each of --steps + 2 optimizer steps,
as it does in any run. A checkpoint takes what passes between the end of the optimizer's step and the beginning of the
next forward: serialising, writing, reading back and comparing, syncing to the disk, and a few milliseconds of logging.
Right behind each checkpoint its bytes are written once more into the same folder, without any of that. Both are in one
run, because a disk that others use is not the same a minute later. Older checkpoints are not deleted meanwhile.

The first checkpoint is not counted, because it makes what later ones find. The last one has no next forward.
"""

import argparse
import os
import runpy
import shutil
import statistics
import sys
import time
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent


def find_newest_checkpoint(output_dir: Path) -> Path:
    """The folder checkpoint-<step> of the largest step.

    Raises:
        ValueError: there is none.
    """
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdecimal()]
    if not checkpoints:
        raise ValueError(f"{output_dir} holds no checkpoint-<step>")
    return max(checkpoints, key=lambda path: int(path.name[11:]))


def write_again(checkpoint: Path, folder: Path) -> tuple[float, int]:
    """Seconds of writing a checkpoint's files anew until they are on the disk, and their bytes."""
    contents = {}
    for path in checkpoint.rglob("*"):
        if path.is_file():
            contents[path.relative_to(checkpoint)] = path.read_bytes()
    os.sync()
    started = time.perf_counter()
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.sync()
    seconds = time.perf_counter() - started
    return seconds, sum(len(content) for content in contents.values())


class Watch:
    """Measures the time between the optimizer's step and the next forward, in which the script saves."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.ratios = []
        self.updated_at = None  # when the optimizer's step ended; None while a forward or backward runs

    def after_update(self, *_) -> None:
        os.sync()  # what was written before is not the checkpoint's to wait for
        self.updated_at = time.perf_counter()

    def before_forward(self, *_) -> None:
        if self.updated_at is None:
            return
        seconds = time.perf_counter() - self.updated_at
        self.updated_at = None
        scratch = self.output_dir / "written-again"
        plain, num_bytes = write_again(find_newest_checkpoint(self.output_dir), scratch)
        shutil.rmtree(scratch)
        self.ratios.append(seconds / plain)
        line = f"{num_bytes / 1e6:,.0f} MB: checkpoint {seconds:.2f} s, the same bytes {plain:.2f} s: "
        line += f"{self.ratios[-1]:.2f}"
        if len(self.ratios) > 1:  # here and not at the end: some scripts end their process themselves
            line += f"; median without the first: {statistics.median(self.ratios[1:]):.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="checkpoints that are measured, behind a first one")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- script.py and its flags")
    args = parser.parse_args()
    command = args.script
    if command[:1] == ["--"]:
        command = command[1:]
    if not command or not (ROOT / command[0]).is_file() or args.steps < 1:
        sys.exit("error: --steps must be at least 1, and a script must stand behind --, as in -- finetune_pp.py")
    output_dir = Path("outputs") / command[0].removesuffix(".py")  # the scripts' default
    if "--output_dir" in command[:-1]:
        output_dir = Path(command[command.index("--output_dir") + 1])

    watch = Watch(output_dir)
    register_optimizer_step_post_hook(watch.after_update)
    register_module_forward_pre_hook(watch.before_forward)
    num_steps = str(args.steps + 2)
    sys.argv = [*command, "--max_steps", num_steps, "--save_steps", "1", "--save_total_limit", num_steps]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


if __name__ == "__main__":
    main()
