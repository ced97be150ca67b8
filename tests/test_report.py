"""tools/report.py: what a run folder tells, finished or not; spikes survive; the page is readable in a real browser."""

import html
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, run_script
from preference_rows import random_pairs, save_preferences
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402

FAST = ["--use_cpu", "True", "--bf16", "False", "--per_device_train_batch_size", 4]


def log_row(step: int) -> dict:
    row = {
        "step": step,
        "loss": 2.0 / step + 0.1,
        "grad_norm": 1.0 + step % 3,
        "learning_rate": 1e-3 / step,
        "num_input_tokens_seen": 100 * step,
    }
    if step % 5 == 0:
        row["eval_loss"] = 1.5 / step
    return row


def save_run(folder, num_steps: int, **arguments):
    """The files that report.py reads, as the scripts write them."""
    folder.mkdir(parents=True)
    history = [log_row(step) for step in range(1, num_steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    receipt = {
        "arguments": {"seed": 42, "learning_rate": 1e-3} | arguments,
        "versions": {"torch": "2.13.0"},
        "dataset": {"sha256": "abc"},
        "devices": ["cuda:0", "cuda:1"],
        "peak_memory_bytes": [2**30, 2**31],
        "tokens_per_second": 1234.5,
        "wall_time_seconds": 60.0,
    }
    (folder / "run.json").write_text(json.dumps(receipt))
    return folder


def test_a_run_that_goes_on_is_read_from_tensorboard_and_its_newest_complete_checkpoint(tmp_path):
    """Steps that a resumed run trained again count once; full precision comes from the checkpoint's history."""
    for first, last, loss in ((1, 6, 9.0), (4, 8, 3.0)):  # killed at step 6, resumed from checkpoint-3
        writer = SummaryWriter(str(tmp_path / "runs"), filename_suffix=f".{first}", purge_step=first)
        for step in range(first, last + 1):
            writer.add_scalar("train/loss", loss + step / 3, step, walltime=1000.0 + 2 * step)
            writer.add_scalar("train/num_input_tokens_seen", 100 * step, step, walltime=1000.0 + 2 * step)
            writer.add_scalar("train/peak_memory_bytes", step * 2**30, step, walltime=1000.0 + 2 * step)
        writer.add_scalar("eval/loss", 2.5, last, walltime=1000.0 + 2 * last)  # transformers' name for it
        writer.close()
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "settings.json").write_text(json.dumps({"settings": {"seed": 42, "learning_rate": 0.1}}))
    exact = [{"step": step, "loss": 9.0 + step / 3} for step in (1, 2, 3)]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": exact}))
    (tmp_path / "checkpoint-6").mkdir()  # half of one, as a former version of the toolkit left it
    shutil.copytree(checkpoint, tmp_path / "checkpoint-best")  # a user's copy

    run = report.read_run(tmp_path)
    assert run.receipt is None and run.facts == {"arguments.seed": 42, "arguments.learning_rate": 0.1}
    assert [row["step"] for row in run.rows] == list(range(1, 9))
    losses = report.curve(run.rows, "loss")[1]
    assert losses[:3].tolist() == [9.0 + step / 3 for step in (1, 2, 3)]  # not rounded to float32
    assert losses[3:] == pytest.approx([3.0 + step / 3 for step in range(4, 9)], rel=1e-6)
    steps, speeds = report.speed(run.rows)
    assert steps.tolist() == list(range(2, 9)) and speeds == pytest.approx([50.0] * 7)
    assert report.curve(run.rows, "eval_loss")[0].tolist() == [8]  # that of step 6 was trained again
    assert [points.tolist() for points in report.memory(run)] == [list(range(1, 9))] * 2


def test_a_checkpoint_of_the_former_layout_tells_its_settings(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "complete.json").write_text(json.dumps({"identity": {"seed": 42}}))
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": [log_row(3)]}))
    run = report.read_run(tmp_path)
    assert run.facts == {"arguments.seed": 42} and run.rows == [log_row(3)]


def test_a_hundred_thousand_points_are_thinned_and_no_spike_is_lost():
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321], values[77_777] = 100, -100
    steps, thinned = report.thin(np.arange(100_000.0), values)
    assert len(thinned) <= report.MAX_POINTS
    assert thinned.max() == 100 and thinned.min() == -100
    assert (np.diff(steps) > 0).all() and steps[0] == 0 and steps[-1] == 99_999
    assert np.array_equal(values[steps.astype(int)], thinned)


def test_smoothing_has_no_bias_at_the_start():
    assert report.smooth(np.full(1000, 3.0)) == pytest.approx(np.full(1000, 3.0))
    noisy = 3 + np.random.default_rng(0).normal(size=5000)
    assert report.smooth(noisy)[500:].std() < 0.2 * noisy.std()
    assert report.smooth(np.array([7.0])).tolist() == [7.0]


def test_the_table_shows_what_differs_and_only_that(tmp_path):
    folders = [save_run(tmp_path / "a", 3, seed=1), save_run(tmp_path / "b", 3, seed=2, peft_mode="lora")]
    differing, alike = report.differences([report.read_run(folder) for folder in folders])
    assert set(differing) == {"arguments.seed", "arguments.peft_mode"}
    assert {"arguments.learning_rate", "versions.torch", "dataset.sha256"} <= set(alike)


@pytest.mark.parametrize("num_steps", [1, 3000])
def test_picture_and_page_are_whole_and_need_no_network(num_steps, tmp_path):
    runs = [report.read_run(save_run(tmp_path / f"run <{n}>", num_steps, seed=n)) for n in range(2)]
    report.write_report(runs, tmp_path, 0)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and page.rstrip().endswith("</html>") and "http-equiv" not in page
    outside = re.findall(r"""(?:src|href)=["']?(?!#)([^"' >]+)|url\((?!#)([^)]+)\)|@import|<script""", page)
    assert outside == []
    assert page.count("not logged") == (2 if num_steps == 1 else 1)
    assert "arguments.seed" in page.split("The same in all")[0]
    assert html.escape(runs[0].name) in page and runs[0].name not in page  # a folder's name is no markup
    assert not (tmp_path / "report.tmp").exists()


def test_mistakes_are_reported_together_and_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    words = ["report.py", tmp_path / "none", tmp_path / "empty", "--output_dir", tmp_path / "out", "--watch", "-1"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    for part in (f"{tmp_path}/none: no such folder", f"{tmp_path}/empty: holds no run", "--watch -1"):
        assert part in stopped.value.code
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------------
# Slow: real runs of all scripts, a run watched while it goes on, a real browser
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_of_all_scripts_are_shown_together(tiny_model, tiny_set, tmp_path):
    pairs = save_preferences(random_pairs(22), tmp_path / "pairs")
    scripts = ["finetune_pp", "finetune_pp_peft", "finetune_pp_peft_trainer", "finetune_pp_peft_trainer_lora"]
    scripts += ["finetune_pp_peft_trainer_deepspeed", "finetune_pp_1f1b", "finetune_pp_dpo", "finetune_pp_dpo_trainer"]
    for script in scripts:
        rows = tiny_set
        if "dpo" in script:
            rows = pairs
        run_script(f"{script}.py", "--model_path", tiny_model, "--dataset_path", rows, "--eval_dataset_path",
                   rows, "--eval_steps", 2, "--output_dir", tmp_path / script, *FAST)  # fmt: skip
    run_script("tools/report.py", *(tmp_path / script for script in scripts), "--output_dir", tmp_path / "report")
    for script in scripts:
        run = report.read_run(tmp_path / script)
        for name in ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen"):
            assert report.curve(run.rows, name)[0].tolist() == [1, 2, 3, 4, 5, 6], (script, name)
        assert report.curve(run.rows, "eval_loss")[0].tolist() == [2, 4, 6], script
        assert report.speed(run.rows)[0].tolist() == [2, 3, 4, 5, 6], script
        steps, gib = report.memory(run)
        assert steps.tolist() == [1, 2, 3, 4, 5, 6] and (np.diff(gib) >= 0).all() and 0.1 < gib[0] < 4, script
        assert not any("peak_memory_bytes" in row for row in json.loads(
            (tmp_path / script / "trainer_state.json").read_text())["log_history"]), script  # fmt: skip
        assert report.summarize(run)["peak GiB"] != "–"


@pytest.mark.slow
def test_a_run_is_watched_until_it_has_ended(tiny_model, tiny_set, tmp_path):
    flags = ["--model_path", tiny_model, "--dataset_path", tiny_set, "--output_dir", tmp_path / "run", *FAST]
    command = [sys.executable, "finetune_pp.py", *map(str, flags), "--max_steps", "300", "--save_steps", "50"]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "run").glob("runs/events*")):
        assert training.poll() is None
        time.sleep(0.05)
    watching = subprocess.Popen([sys.executable, "tools/report.py", tmp_path / "run", "--output_dir", tmp_path / "page",
                                 "--watch", "0.2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # fmt: skip
    pages = []
    while watching.poll() is None:
        if (tmp_path / "page" / "report.html").is_file():
            pages.append((tmp_path / "page" / "report.html").read_text())
        time.sleep(0.1)
    assert training.wait() == 0 and watching.returncode == 0
    assert 'http-equiv="refresh"' in pages[0] and "no run.json yet" in pages[0]
    assert "steps 300" in watching.stdout.read()
    assert 'http-equiv="refresh"' not in (tmp_path / "page" / "report.html").read_text()


MEASURE = """<script>
const picture = document.querySelector('svg').getBoundingClientRect(), texts = [], clipped = [], overlapping = [];
for (const node of document.querySelectorAll('svg text')) {
  const box = node.getBoundingClientRect(), text = node.textContent.trim();
  if (!text || !box.width) continue;
  if (box.left < picture.left || box.right > picture.right || box.top < picture.top || box.bottom > picture.bottom)
    clipped.push(text);
  for (const [other, name] of texts)
    if (box.left < other.right - 1 && other.left < box.right - 1 && box.top < other.bottom - 3 &&
        other.top < box.bottom - 3) overlapping.push(name + ' / ' + text);
  texts.push([box, text]);
}
const smallest = Math.min(...texts.map(([box]) => box.height));
document.documentElement.dataset.found = JSON.stringify({number: texts.length, clipped, overlapping, smallest,
  sideways: document.documentElement.scrollWidth > document.documentElement.clientWidth});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize("num_steps", [1, 10, 100_000])
def test_in_a_real_browser_every_label_is_whole_and_none_covers_another(num_steps, tmp_path):
    runs = [report.read_run(save_run(tmp_path / name, num_steps)) for name in ("lora", "ptuning")]
    report.write_report(runs, tmp_path, 0)
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "measured.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser += ["--window-size=1300,1300", "--dump-dom", f"file://{tmp_path / 'measured.html'}"]
    dom = subprocess.run(browser, capture_output=True, text=True, check=True).stdout
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found["number"] > 30
    assert found["clipped"] == [] and found["overlapping"] == [] and not found["sideways"]
    assert found["smallest"] >= 9  # pixels
