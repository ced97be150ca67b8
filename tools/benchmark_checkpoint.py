"""Measures what a checkpoint costs, as a ratio to writing the same bytes: plain writes of its files and a sync.

    python tools/benchmark_checkpoint.py -- finetune_pp.py --use_cpu True --bf16 False --output_dir outputs/checkpoint

Behind `--` stands a training script of one process and its flags. It saves after each of --steps + 1 optimizer steps,
as it does in any run: tensors and optimizer are serialised, written, read back and compared, hashed, and synced to the
disk. Right behind each checkpoint its bytes are written once more into the same folder, without any of that: both in
one run, because a disk that others use is not the same a minute later. Older checkpoints are not deleted meanwhile.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data_collator  # noqa: E402


def write_again(checkpoint: Path, folder: Path) -> tuple[float, int]:
    """Seconds of writing a checkpoint's files anew until they are on the disk, and their bytes."""
    contents = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    os.sync()
    started = time.perf_counter()
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    os.sync()
    return time.perf_counter() - started, sum(map(len, contents.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="checkpoints that are measured, behind a first one")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- script.py and its flags")
    args = parser.parse_args()
    command = args.script[args.script[:1] == ["--"] :]
    if not command or not (ROOT / command[0]).is_file() or args.steps < 1:
        sys.exit("error: --steps must be at least 1, and a script must stand behind --, as in -- finetune_pp.py")
    specification = importlib.util.spec_from_file_location("script", ROOT / command[0])
    script = sys.modules["script"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    owner, name = (script, "save_checkpoint")
    if not hasattr(script, name):
        owner, name = data_collator.RowTrainer, "_save_checkpoint"
    save, ratios = getattr(owner, name), []

    def timed_save(*arguments):
        os.sync()  # what was written before is not the checkpoint's to wait for
        started = time.perf_counter()
        result = save(*arguments)
        seconds = time.perf_counter() - started
        output_dir = Path(getattr(arguments[0], "args", arguments[0]).output_dir)  # the loops' arguments, or a Trainer
        scratch = output_dir / "written-again"
        plain, num_bytes = write_again(data_collator.list_checkpoints(output_dir)[0], scratch)
        shutil.rmtree(scratch)
        ratios.append(seconds / plain)
        print(f"{num_bytes / 1e6:,.0f} MB: checkpoint {seconds:.2f} s, the same bytes {plain:.2f} s: "
              f"{ratios[-1]:.2f}", flush=True)  # fmt: skip
        return result

    setattr(owner, name, timed_save)
    sys.argv = command + ["--max_steps", str(args.steps + 1), "--save_steps", "1"]
    sys.argv += ["--save_total_limit", str(args.steps + 1)]
    script.main()
    print(f"median without the first: {statistics.median(ratios[1:]):.2f}")


if __name__ == "__main__":
    main()
