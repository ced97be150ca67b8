"""Trains one system with random weights on a GPU, measures its steps, and ends. Not started by hand.

    python benchmarks/gpu_training.py job.json            # job.json is what benchmarks/gpu_parts.py wrote

It imports what it needs, and then waits for a line on its standard input: so the next job can be started while the GPU
still belongs to the one before. The scripts of the toolkit run unchanged; only their weights are drawn on the GPU, and
not read from a file, because 16 GB would take longer to read than to measure. Each peer is started as its documentation
tells its user.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are imported as a user runs them, from the root
PAD_ID = 0  # no row has it
MAX_STEPS = 40  # that are measured
NUM_KERNELS = 15  # that a profile names
NUM_PROFILED_STEPS = 2


# -------------------------------------------------------------------------------------------------------------------
# Measuring, the same for all
# -------------------------------------------------------------------------------------------------------------------


class Watch:
    """Follows the optimizer's steps of a training, and ends the process behind the last one.

    Args:
        job: what gpu_parts.py wrote: `seconds` to measure, `warmup` steps before, `log`, the file for the results,
            `is_profiled`, and `is_dry`, on a CPU.
    """

    def __init__(self, job: dict):
        self.job = job
        self.on_gpu = not job["is_dry"]
        self.tokens = 0  # a tensor on the GPU from the first forward on, so that counting waits for nothing
        self.next_forward = None  # what is done in the next forward: "profile", "count waits" or nothing
        self.forward_profiler = None
        self.warnings_catcher = None
        self.caught = []
        self.results = {}
        self.phases = self.run_phases()
        self.began = time.perf_counter()

    def follow(self, model: torch.nn.Module) -> None:
        """Called with the model as soon as it is there, before anything wraps it."""
        model.get_input_embeddings().register_forward_pre_hook(self.count_tokens)
        if self.job["is_profiled"]:
            decoder = model.get_decoder()
            decoder.register_forward_pre_hook(self.before_forward)
            decoder.register_forward_hook(self.after_forward)
            self.results["num_layers"] = model.config.num_hidden_layers

    def count_tokens(self, module, inputs) -> None:
        if torch.is_grad_enabled():  # else it is a check or an evaluation
            self.tokens = self.tokens + (inputs[0] != PAD_ID).sum()

    def after_update(self, *_) -> None:
        """Behind each optimizer step."""
        next(self.phases)

    def run_phases(self):
        """What is done between the steps: each `yield` lets the training go on for one step."""
        self.wait()
        self.results["first_step_seconds"] = time.perf_counter() - self.began
        for _ in range(self.job["warmup"] - 1):
            yield
        self.wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.tokens = 0
        started = time.perf_counter()
        num_steps = 0
        while num_steps < 3 or (time.perf_counter() - started < self.job["seconds"] and num_steps < MAX_STEPS):
            yield
            num_steps += 1
        self.wait()
        seconds = time.perf_counter() - started
        self.results["steps"] = num_steps
        self.results["tokens_of_a_step"] = int(self.tokens) / num_steps
        self.results["step_seconds"] = seconds / num_steps
        self.results["tokens_per_second"] = int(self.tokens) / seconds
        if self.on_gpu:
            self.results["held_bytes"] = torch.cuda.max_memory_allocated()
            self.results["reserved_bytes"] = torch.cuda.max_memory_reserved()
        if self.job["is_profiled"]:
            yield from self.profile_steps()
        Path(self.job["log"]).write_text(json.dumps(self.results))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what a system saves at its end is not measured

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    # What a profile adds

    def profile_steps(self):
        """Whole steps by kernel, then one forward by launches and casts, then one forward by waits for the GPU."""
        started = time.perf_counter()
        with profile(activities=self.activities()) as recorded:
            for _ in range(NUM_PROFILED_STEPS):
                yield
            self.wait()
        seconds = time.perf_counter() - started
        self.results["kernels"] = self.name_kernels(recorded, seconds)
        self.next_forward = "profile"
        yield
        self.next_forward = "count waits"
        yield

    def activities(self) -> list[ProfilerActivity]:
        if self.on_gpu:
            return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        return [ProfilerActivity.CPU]

    def name_kernels(self, recorded: profile, seconds: float) -> list[dict]:
        """The kernels with the most time of their own in a step; on a CPU, the operators."""
        kernels = []
        total = 0.0
        for event in recorded.key_averages():
            microseconds = event.self_cpu_time_total
            if self.on_gpu:
                # An operator has the time of the kernels that it launched, which are in the list, too.
                if event.device_type != DeviceType.CUDA or event.is_user_annotation:
                    continue
                microseconds = event.self_device_time_total
            total += microseconds
            milliseconds = microseconds / 1e3 / NUM_PROFILED_STEPS
            kernels.append({"kernel": event.key[:90], "ms": milliseconds, "calls": event.count / NUM_PROFILED_STEPS})
        kernels.sort(key=lambda kernel: kernel["ms"], reverse=True)
        self.results["busy_share"] = total / 1e6 / seconds
        for kernel in kernels:
            kernel["share"] = kernel["ms"] * NUM_PROFILED_STEPS * 1e3 / total
        return kernels[:NUM_KERNELS]

    def before_forward(self, module, inputs) -> None:
        if self.next_forward == "profile":
            self.wait()
            self.forward_profiler = profile(activities=self.activities())
            self.forward_profiler.__enter__()
        elif self.next_forward == "count waits":
            self.wait()
            self.warnings_catcher = warnings.catch_warnings(record=True)
            self.caught = self.warnings_catcher.__enter__()
            warnings.simplefilter("always")
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")

    def after_forward(self, module, inputs, output) -> None:
        if self.next_forward == "profile":
            self.wait()
            self.forward_profiler.__exit__(None, None, None)
            counts = {event.key: event.count for event in self.forward_profiler.key_averages()}
            launches = [count for name, count in counts.items() if "LaunchKernel" in name]
            self.results["launches_of_a_forward"] = sum(launches)
            self.results["casts_of_a_forward"] = counts.get("aten::_to_copy", 0)
        elif self.next_forward == "count waits":
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            self.warnings_catcher.__exit__(None, None, None)
            waits = [one for one in self.caught if "synchronizing CUDA operation" in str(one.message)]
            self.results["waits_of_a_forward"] = len(waits)
        self.next_forward = None


# -------------------------------------------------------------------------------------------------------------------
# Random weights
# -------------------------------------------------------------------------------------------------------------------


def draw_model(folder: str, dtype: torch.dtype, drawn_on: str, target: str, kernel: str | None = None):
    """A model of the shape in `folder`, drawn on one device and moved to another."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {}
    if kernel is not None:
        options["attn_implementation"] = kernel
    with torch.device(drawn_on):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype, **options)
    model.to(target)
    model.tie_weights()
    if drawn_on == "cuda":
        torch.cuda.empty_cache()
    return model


def draw_instead_of_reading(job: dict, watch: Watch) -> None:
    """Gives `from_pretrained` models with random weights; one that is quantised while it is read is really read."""
    from transformers import AutoModelForCausalLM

    device = device_of(job)
    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder, **options):
        if "quantization_config" in options:
            draw_model(folder, torch.bfloat16, device, device).save_pretrained(folder)
            result = read(folder, **options)
            watch.follow(result[0])
            return result
        target = "cpu"  # where the Trainer scripts load
        if options.get("device_map"):
            target = options["device_map"][""]
        model = draw_model(folder, options["dtype"], device, target, options.get("attn_implementation"))
        watch.follow(model)
        return model, {"missing_keys": [], "mismatched_keys": []}

    AutoModelForCausalLM.from_pretrained = from_pretrained


def device_of(job: dict) -> str:
    if job["is_dry"]:
        return "cpu"
    return "cuda"


# -------------------------------------------------------------------------------------------------------------------
# The systems
# -------------------------------------------------------------------------------------------------------------------


def start_ours(job: dict, watch: Watch) -> None:
    """A script of the toolkit, unchanged."""
    draw_instead_of_reading(job, watch)
    script = importlib.import_module(job["script"].removesuffix(".py"))
    sys.argv = [job["script"], *job["flags"]]
    script.main()


def read_rows(job: dict):
    from datasets import load_from_disk

    return load_from_disk(job["data"])


def peer_model(job: dict, watch: Watch):
    """The base in bf16, as QLoRA's authors and TRL's examples load it; on a CPU in float32."""
    dtype = torch.bfloat16
    if job["is_dry"]:
        dtype = torch.float32
    model = draw_model(job["model"], dtype, device_of(job), device_of(job))
    watch.follow(model)
    return model


def peer_settings(job: dict) -> dict:
    """What both peers are told alike."""
    return {
        "output_dir": job["output_dir"],
        "max_steps": 1000,  # the watch ends it before
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "bf16": not job["is_dry"],
        "use_cpu": job["is_dry"],
        "gradient_checkpointing": False,  # TRL's default is True; the toolkit's is not
        "use_liger_kernel": job["has_liger"],
        "save_strategy": "no",
        "report_to": "none",
    }


def lora_config():
    """The defaults of finetune_pp_peft.py."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


def start_trainer(job: dict, watch: Watch) -> None:
    """transformers' Trainer with PEFT: the rows of a batch padded to the longest."""
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = get_peft_model(peer_model(job, watch), lora_config())
    settings = TrainingArguments(**peer_settings(job), per_device_train_batch_size=job["batch_size"])
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job["model"]))
    Trainer(model, settings, train_dataset=read_rows(job), data_collator=collator).train()


def start_trl(job: dict, watch: Watch) -> None:
    """TRL's SFTTrainer with packing; a packed row has as many tokens as our rows of a batch have together."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        **peer_settings(job), per_device_train_batch_size=1, packing=True, max_length=job["packed_length"]
    )
    SFTTrainer(
        peer_model(job, watch),
        args=settings,
        train_dataset=read_rows(job).select_columns(["input_ids"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=lora_config(),
    ).train()


def import_what_is_needed(job: dict) -> None:
    for name in ("transformers", "peft", "datasets", "accelerate"):
        importlib.import_module(name)
    if job["system"] == "trl":
        importlib.import_module("trl")
    if job["has_liger"]:
        importlib.import_module("liger_kernel")
    if job["system"] == "ours":
        importlib.import_module(job["script"].removesuffix(".py"))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import_what_is_needed(job)
    if not sys.stdin.readline():  # gpu_parts.py says when the GPU is free; or it has ended
        return
    watch = Watch(job)
    register_optimizer_step_post_hook(watch.after_update)
    starters = {"ours": start_ours, "trainer": start_trainer, "trl": start_trl}
    starters[job["system"]](job, watch)


if __name__ == "__main__":
    main()
