"""The one module that every script shares: reading a tokenized set, the order of its rows, and collation.

It is shared because a mistake here would be wrong in every strategy at once. Three words, never mixed:
  padded        rows of a batch padded to the longest one; padding has no target and nothing attends to it
  padding-free  the collator joins the rows of a batch into one long row, so no position is wasted on padding
  packed        tokenize_dataset.py --packing True joined whole documents into rows beforehand

A token attends to its own document only. transformers finds the documents by `position_ids` that restart at 0, but only
when no `attention_mask` and no cache are passed: always call the model with `use_cache=False`. Instead of a mask over
the whole row, attend_by_document lets the layers compute one document after the other. In padding-free batches logits
exist for a few hundred targets at a time: compute_loss_in_head lets the output layer compute the loss, chunk by chunk.

What must be the same in every strategy's output folder stands here, too: what makes a checkpoint whole, whether it
belongs to the same order of rows, and the receipt of a run.
"""

import hashlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

IGNORE_INDEX = -100  # a label that contributes no loss, as in torch.nn.functional.cross_entropy
# What a resumed run must share with the interrupted one besides the order of rows, or it would be another run.
SETTINGS = ("model_path", "peft_mode", "peft_path", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules")
SETTINGS += ("num_virtual_tokens", "mapping_hidden_dim", "learning_rate", "lr_scheduler_type", "warmup_steps")
SETTINGS += ("weight_decay", "max_grad_norm", "load_in_4bit", "lora_used", "deepspeed", "world_size")
LEAST = {"warmup_steps": 0, "weight_decay": 0, "lora_dropout": 0, "mapping_hidden_dim": 0, "seed": 0, "max_steps": -1}
FILLER = -1  # the index of a row without target, which completes the last optimizer step of an epoch
FLASH = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}  # the packages
ATTENTION = "|".join(["auto", "sdpa", "eager", *FLASH, "flex_attention"])  # what --attn_implementation can be
TARGETS_AT_ONCE = 512  # their logits, float32, of 49,152 ids: 0.1 GB
# transformers' code where nothing happens to the logits between the output layer and the loss; another code gets all
# logits at once. Its versions are pinned, and a test names the models that match.
HEAD_THEN_LOSS = r"lm_head\(hidden_states\)\s+loss = None\s+if labels is not None:\s+(#.*\s+)?loss = self.loss_function"


def find_mistakes(args) -> list[str]:
    """What is wrong with a script's flags taken by themselves: one message each, with the flag and the remedy.

    Args:
        args: a dataclass; the choices of a field stand in its metadata, as "a|b|c". A number must be above 0, or at
            least what LEAST says.
    """
    mistakes = []
    for flag in fields(args):
        name, value, choices = flag.name, getattr(args, flag.name), flag.metadata.get("metavar")
        if choices and value not in choices.split("|"):
            mistakes.append(f"--{name} {value}: choose from {choices}")
        elif type(value) in (int, float) and not (LEAST.get(name, 1e-99) <= value < math.inf):
            mistakes.append(f"--{name} {value}: must be {'>=' if name in LEAST else '>'} {LEAST.get(name, 0)}")
    folder = next(path for path in (Path(args.output_dir), *Path(args.output_dir).absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        mistakes.append(f"--output_dir {args.output_dir}: {folder} is no writable folder; choose another")
    num_processes, num_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if num_processes > max(1, num_gpus) and not args.use_cpu:
        mistakes.append(f"--use_cpu False: {num_processes} processes need as many GPUs, and there are {num_gpus}")
    attention, on_gpu = args.attn_implementation, num_gpus > 0 and not args.use_cpu
    if attention == "flex_attention" and not (on_gpu and num_gpus <= num_processes):
        # Its mask cannot follow the layers from one GPU to another.
        mistakes.append(f"--attn_implementation {attention}: needs a GPU, and of several a process for each")
    if attention in FLASH:
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        is_there = on_gpu and (is_flash_attn_2_available() if attention[-1] == "2" else is_flash_attn_3_available())
        # It computes in no other precision, and transformers finds documents for it in a single row only.
        if not (is_there and use_bf16(args.bf16, False) and args.padding_free):
            mistakes.append(f"--attn_implementation {attention}: needs a GPU, the package {FLASH[attention]}, bf16 and "
                            "--padding_free True; auto runs anywhere")  # fmt: skip
    return mistakes


def use_bf16(choice: str, use_cpu: bool) -> bool:
    """bf16 where the hardware multiplies it fast; elsewhere it is tens of times slower than float32."""
    cpu_is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_fast = cpu_is_fast if use_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    return choice == "True" or (choice == "auto" and is_fast)


class TokenizedFolder:
    """One folder that data_sample/tokenize_dataset.py wrote, of rows with labels or of whole documents without.

    The Arrow files are memory-mapped, so opening a set of any size takes no memory. Arguments and errors are those of
    TokenizedDataset.
    """

    def __init__(self, path: str | Path, config=None, tokenizer=None):
        from datasets import load_from_disk  # one second, not paid by those who want only the collator

        if not Path(path).is_dir():
            raise FileNotFoundError("no such folder; make it with python data_sample/tokenize_dataset.py")
        ledger = Path(path) / "ledger.json"
        if not ledger.is_file():
            raise FileNotFoundError("no ledger.json in it: not a tokenized set, or one that was not finished; make it "
                                    "with python data_sample/tokenize_dataset.py")  # fmt: skip
        self.ledger = json.loads(ledger.read_text(encoding="utf-8"))
        # load_from_disk fails on a set that was saved without rows.
        table = load_from_disk(str(path)).data if any(Path(path).glob("*.arrow")) else []
        self.num_rows = len(table)
        if self.num_rows == 0:
            raise ValueError("it has no rows; its ledger.json says why each input row was dropped")
        names = table.column_names
        self.has_labels, self.packed = "labels" in names, "position_ids" in names
        if "input_ids" not in names:
            raise ValueError(f"no column input_ids (columns: {', '.join(names)}); make it with "
                             "python data_sample/tokenize_dataset.py")  # fmt: skip
        if self.has_labels and self.ledger.get("targets") == 0:
            raise ValueError("no token in it is a target, so there is nothing to learn; tokenize rows with an answer")
        columns = ["input_ids"] + ["labels"] * self.has_labels + ["position_ids"] * self.packed
        self.columns = {name: table.column(name) for name in columns}
        known = self.ledger.get("vocabulary_sha256")
        if tokenizer and known and known != vocabulary_hash(tokenizer):
            raise ValueError("it was made with another tokenizer; tokenize again with --tokenizer_path MODEL")
        if config and not (tokenizer and known and max(tokenizer.get_vocab().values()) < config.vocab_size):
            self._check_ids(config.vocab_size)  # reads the whole set

    def _check_ids(self, vocab_size: int) -> None:
        for name, least in (("input_ids", 0), ("labels", IGNORE_INDEX)):
            for chunk in self.columns[name].chunks if name in self.columns else ():
                ids = chunk.flatten().to_numpy()
                if len(ids) and (ids.max() >= vocab_size or ids.min() < least):
                    raise ValueError(f"{name} from {ids.min()} to {ids.max()} do not fit the model's vocabulary "
                                     f"of {vocab_size}; tokenize again with --tokenizer_path MODEL")  # fmt: skip


def parse_mix(path: str) -> dict[str, float]:
    """Folders and weights of `medical:3,general:1`; without a weight it is 1."""
    if Path(path).is_dir():
        return {path: 1.0}
    parts = [re.fullmatch(r"(.+?)(?::([0-9.]+))?", part.strip()) for part in path.split(",")]
    mix = {part[1]: float(part[2] or 1) for part in parts if part}
    if len(mix) < len(parts) or min(mix.values()) <= 0:
        raise ValueError("name each folder once, with a weight above 0, as in medical:3,general:1")
    return mix


class TokenizedDataset(Dataset):
    """Rows of one tokenized folder, or of several mixed by weight.

    An epoch is one pass over the first folder. With `medical:3,general:1` every three rows of medical come with one of
    general: too few rows begin anew within the epoch, too many go on in the next, and each row of general is drawn once
    before any is drawn again.

    A row of a folder without labels is a whole document. From it one passage of `passage_length` tokens is drawn, a
    new one each time: its start is given by (seed, how often the document was drawn before, its index) alone, so it is
    the same in any process, and no start is left out. Each token of a passage is a target. A shorter document is used
    whole.

    Args:
        path: the folder, or `name:weight,name:weight`; `ledger.json`, written last, shows that a folder is complete.
        config: if given, the model's configuration; a token id at or above its vocab_size is an error.
        tokenizer: if given, ids that were made with another vocabulary are an error.
        passage_length: tokens of a passage; 0 if whole documents are an error.
        seed: of the passages.

    Raises:
        FileNotFoundError: a folder or its ledger is missing.
        ValueError: a column is missing, there is no row, or an id lies outside the vocabulary.
    """

    def __init__(self, path: str | Path, config=None, tokenizer=None, passage_length: int = 0, seed: int = 0):
        mix = parse_mix(str(path))
        self.passage_length, self.seed, self.folders = passage_length, seed, []
        for name in mix:
            try:
                self.folders.append(TokenizedFolder(name, config, tokenizer))
                if not self.folders[-1].has_labels and not passage_length:
                    raise ValueError("no column labels beside input_ids, so it holds whole documents; draw from them "
                                     "with --random_passage True, or tokenize_dataset.py answers")  # fmt: skip
            except (ValueError, OSError) as problem:
                raise type(problem)(f"{name}: {problem}" if len(mix) > 1 else problem) from None
        self.packed = any(folder.packed for folder in self.folders)
        self.has_documents = not all(folder.has_labels for folder in self.folders)
        self.sizes = [folder.num_rows for folder in self.folders]
        weights = np.array(list(mix.values()))
        self.shares = np.maximum(1, np.rint(self.sizes[0] * weights / weights[0])).astype(int).tolist()
        self.first_rows = np.cumsum([0] + self.sizes).tolist()
        ledgers = dict(zip(mix, (folder.ledger for folder in self.folders), strict=True))
        hashes = [[ledger.get("sha256"), share] for ledger, share in zip(ledgers.values(), self.shares, strict=True)]
        self.ledger = self.folders[0].ledger if len(mix) == 1 else {"sha256": hashes, "mix": mix, "sets": ledgers}

    def __len__(self) -> int:
        return self.first_rows[-1]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def locate(self, draw: int) -> tuple[TokenizedFolder, int, slice]:
        """The folder and row of a draw, and what is taken of the row."""
        times, index = divmod(draw, len(self))
        number = bisect_right(self.first_rows, index) - 1
        folder, row = self.folders[number], index - self.first_rows[number]
        if folder.has_labels:
            return folder, row, slice(None)
        latest = max(0, len(folder.columns["input_ids"][row]) - self.passage_length)
        start = int(np.random.default_rng([self.seed, times, index]).integers(latest, endpoint=True))
        return folder, row, slice(start, start + self.passage_length)

    def num_tokens(self, draw: int) -> int:
        folder, row, taken = self.locate(draw)
        return len(folder.columns["input_ids"][row].values[taken])

    def __getitem__(self, draw: int) -> dict[str, torch.Tensor]:
        """A row of length T: int64 `input_ids` [T], `labels` [T] and, if any row is packed, `position_ids` [T].

        Args:
            draw: the row's index + len(dataset) * how often it was drawn before, or FILLER.
        """
        if draw == FILLER:
            row = {"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.full((1,), IGNORE_INDEX)}
        else:
            folder, row, taken = self.locate(int(draw))
            columns = folder.columns.items()
            row = {n: torch.from_numpy(ids[row].values[taken].to_numpy().astype(np.int64)) for n, ids in columns}
            row.setdefault("labels", row["input_ids"])
        if self.packed:
            row.setdefault("position_ids", torch.arange(len(row["input_ids"])))
        return row


@lru_cache(maxsize=8)
def permutation(size: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size)


class RowSampler(Sampler):
    """The order of rows in an epoch: given by (seed, epoch) alone, the same for every strategy.

    Consecutive runs of `rows_per_step` draws form one optimizer step, whatever the number of processes and the
    split into micro-batches. The last run of an epoch is completed with FILLER, never with rows repeated: a repeated
    row would weigh twice, and dropping the rest would lose data.

    Args:
        dataset: the rows.
        rows_per_step: rows in one optimizer step = processes x batch size x accumulation steps.
        seed: seed of the whole run.

    Raises:
        ValueError: passages are asked for, and there is no document to draw them from.
    """

    def __init__(self, dataset: TokenizedDataset, rows_per_step: int, seed: int):
        if dataset.passage_length and not dataset.has_documents:
            raise ValueError("--random_passage True: --dataset_path holds rows with labels; passages are drawn from "
                             "whole documents, which tokenize_dataset.py --format text writes")  # fmt: skip
        self.dataset, self.rows_per_step, self.seed, self.epoch = dataset, rows_per_step, seed, 0
        self.rows_per_epoch = sum(dataset.shares)
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / rows_per_step)
        self.settings: dict = {}  # a script puts its arguments here, so that no resumed run goes on with others

    @property
    def identity(self) -> dict:
        """All that decides which rows an optimizer step sees, and the settings that a resumed run must share."""
        rows = {"dataset_sha256": self.dataset.ledger.get("sha256"), "num_rows": len(self.dataset)}
        rows |= {"passage_length": self.dataset.passage_length} if self.dataset.passage_length else {}
        rows |= {"rows_per_step": self.rows_per_step, "seed": self.seed, "script": Path(sys.argv[0]).name}
        return rows | {name: value for name, value in self.settings.items() if name in SETTINGS}

    def num_steps(self, args) -> int:
        """Optimizer steps of a run: `args.max_steps` if above 0, else those of `args.num_train_epochs`."""
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.rows_per_step

    def __iter__(self):
        for step in range(self.steps_per_epoch):
            yield from self.draws_of(self.epoch * self.steps_per_epoch + step)
        yield from [FILLER] * (len(self) - self.rows_per_epoch)

    def draws_of(self, step: int) -> list[int]:
        """The draws of optimizer step `step`, counted from 0 over all epochs; an epoch's last step may have fewer.

        An epoch draws `shares[i]` rows of the i-th folder, in an order over all of them. The k-th draw of a folder
        since the start of training lies in its pass k // size; the first folder's pass is the epoch, and each pass of
        the others has an order of its own.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        places = permutation(self.rows_per_epoch, self.seed, epoch)[step * self.rows_per_step :][: self.rows_per_step]
        draws, before, data = [], np.cumsum([0] + self.dataset.shares), self.dataset
        for place in places.tolist():
            number = int(np.searchsorted(before, place, side="right")) - 1
            k = epoch * data.shares[number] + place - int(before[number])
            times, row = divmod(k, data.sizes[number])
            row = int(permutation(data.sizes[number], self.seed, times, number)[row]) if number else row
            draws.append(times * len(data) + sum(data.sizes[:number]) + row)
        return draws

    def rows_of(self, step: int) -> list[dict[str, torch.Tensor]]:
        return [self.dataset[draw] for draw in self.draws_of(step)]


class DataCollator:
    """Makes one batch of rows. Masks come from lengths, never from token ids (the pad token is often also EOS).

    padded: `input_ids`, `labels`, `attention_mask` [rows, longest]; packed rows get `position_ids` instead of the
    mask, and their padding is a document of its own, because a 2-D mask would let documents attend to each other.

    padding-free: `input_ids`, `labels`, `position_ids` [1, tokens], and what saves work in the model's last layer,
    which multiplies every position with the whole vocabulary: `logits_to_keep` [targets], the positions that have a
    target, and `shift_labels` [1, targets], those targets. transformers' forward and loss understand both.

    The first token of a document is never a target: the position before it belongs to another document.
    """

    def __init__(self, padding_free: bool):
        self.padding_free = padding_free

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in rows[0]
        input_ids = [row["input_ids"] for row in rows]
        positions = [row["position_ids"] if packed else torch.arange(len(row["input_ids"])) for row in rows]
        pairs = zip(rows, positions, strict=True)
        labels = [row["labels"].masked_fill(position == 0, IGNORE_INDEX) for row, position in pairs]
        if self.padding_free:
            labels = torch.cat(labels)
            positions_with_target = torch.nonzero(labels != IGNORE_INDEX).flatten()
            return {
                "input_ids": torch.cat(input_ids)[None],
                "labels": labels[None],
                "position_ids": torch.cat(positions)[None],
                "logits_to_keep": positions_with_target - 1,  # the logits at position p predict the token at p + 1
                "shift_labels": labels[positions_with_target][None],
            }
        batch = {"input_ids": pad_sequence(input_ids, True), "labels": pad_sequence(labels, True, IGNORE_INDEX)}
        if packed:
            longest = batch["input_ids"].shape[1]
            padding = [torch.arange(longest - len(position)) for position in positions]
            batch["position_ids"] = torch.stack([torch.cat(pair) for pair in zip(positions, padding, strict=True)])
        else:
            batch["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in input_ids], True)
        return batch


def batches(dataset: TokenizedDataset, collate: DataCollator, batch_size: int, rank: int = 0, num_ranks: int = 1):
    """All rows in their order, for evaluation: a rank's share, in as many batches as every other rank gets."""
    for start in range(rank * batch_size, len(dataset) + rank * batch_size, num_ranks * batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        yield collate([dataset[index] for index in rows or [FILLER]])


def num_targets(batch: dict[str, torch.Tensor]) -> int:
    """Target tokens of a batch: what its summed loss is to be divided by."""
    return int((batch["labels"] != IGNORE_INDEX).sum())


def vocabulary_hash(tokenizer) -> str:
    """SHA-256 of the token-to-id table: two tokenizers with the same hash give ids the same meaning."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class RowTrainer:
    """What the three Trainer scripts do alike, as a mixin before transformers.Trainer.

    The rows come in RowSampler's order. Tokens are counted once a step and without communication, from that order. The
    evaluation loss stands in its step's own log row, a step is logged before it is saved, and the last one is always
    evaluated and saved. A loss that is not finite ends the run before it is saved. SIGTERM, by which a cluster preempts
    a job, asks for a checkpoint and the end.

    A script adds `is_sharded(parameter)` and `save_model`.
    """

    def train_rows(self, sampler: RowSampler, eval_dataset: TokenizedDataset | None, checkpoint: Path | None) -> dict:
        """Trains from the checkpoint, if any, to the last step, saves the model, and returns facts for the receipt."""
        started = time.perf_counter()
        self.sampler, self.eval_rows, self.terminated = sampler, eval_dataset, False
        self.last_step = self.num_tokens = 0  # of this start, resumed or not
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        torch.manual_seed(self.args.seed + self.args.process_index)  # every process draws its own dropout
        self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if self.terminated:
            self.stop(f"SIGTERM: step {self.last_step} is saved; --resume_from_checkpoint True goes on from there")
        self.save_model()
        self.save_state()
        seconds = time.perf_counter() - started
        return {"wall_time_seconds": seconds, "tokens_per_second": self.num_tokens / seconds}

    def stop(self, message: str) -> None:
        sys.exit(message if self.is_world_process_zero() else 1)

    def _run_epoch(self, *args, epoch: int, **kwargs) -> None:
        self.sampler.set_epoch(epoch)  # the data loader of a run resumed within an epoch would not pass it on
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> RowSampler:
        return self.sampler

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        attend_by_document(self.model, self.sampler.settings)
        compute_loss_in_head(self.model, self.sampler.settings)
        if not all(self.is_sharded(parameter) for parameter in self.model.parameters()):
            self.stop("error: the parameters are not sharded, although this script asked for it")
        if self.data_collator.padding_free or self.sampler.dataset.packed:
            check_document_attention(self.model, self.model.config.vocab_size)
        return prepared

    def compute_loss(self, model, inputs, *args, **kwargs):
        # With a cache, transformers would not notice that a row holds several documents.
        return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        step, control = self.state.global_step, self.control
        if step > self.last_step:  # else it is called once more, at the end of an epoch
            self.last_step = step
            num_tokens = sum(map(self.sampler.dataset.num_tokens, self.sampler.draws_of(step - 1)))
            self.num_tokens += num_tokens
            self.state.num_input_tokens_seen += num_tokens
            terminated = torch.tensor(float(self.terminated), device=self.args.device)
            dist.all_reduce(terminated)  # the signal may reach the processes in different steps
            self.terminated = terminated.item() > 0
            is_last = step == self.state.max_steps
            self.is_evaluated = self.eval_rows is not None and (is_last or step % self.args.eval_steps == 0)
            control.should_training_stop |= self.terminated
            control.should_save |= is_last or self.terminated
            control.should_log |= control.should_save or self.is_evaluated
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" not in logs:
            return  # transformers' summary at the end, which run.json has
        if not math.isfinite(logs["loss"] + logs["grad_norm"]):
            self.stop(f"error: step {self.last_step} has loss {logs['loss']} and gradient norm {logs['grad_norm']}; "
                      "checkpoints saved before are good; lower --learning_rate")  # fmt: skip
        logs |= {"num_input_tokens_seen": self.state.num_input_tokens_seen, "peak_memory_bytes": peak_memory()}
        super().log(logs | ({"eval_loss": self.evaluate()} if self.is_evaluated else {}), *args, **kwargs)
        del self.state.log_history[-1]["peak_memory_bytes"]  # for TensorBoard: a resumed run's history stays the same

    @torch.no_grad()
    def evaluate(self, *args, **kwargs) -> float:
        """Loss per target token over the whole set."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        size, rank, num_ranks = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        for batch in batches(self.eval_rows, self.data_collator, size, rank, num_ranks):
            # compute_loss multiplies by the number of processes, since their gradients will be averaged.
            loss = self.compute_loss(self.model_wrapped, self._prepare_inputs(batch), num_items_in_batch=num_ranks)
            total += torch.tensor([loss.item(), num_targets(batch)])
        total = total.to(self.args.device)
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def _save_checkpoint(self, *args) -> None:
        super()._save_checkpoint(*args)
        dist.barrier()
        if self.is_world_process_zero():
            complete_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.sampler)
        dist.barrier()  # after SIGTERM nobody leaves before it is complete


def document_lengths(batch_size: int, q_length: int, kv_length: int, mask_function, attention_mask=None, **kwargs):
    """What the layers get as `attention_mask`: the lengths of each row's documents, one list a row, instead of a mask.

    transformers calls it once a forward, with `mask_function(row, head, query, key)`, which says who attends to whom: a
    document starts where a token does not attend to the one before. What is no whole document (padding, a cache, a
    sliding window shorter than a document) gets the mask that transformers makes for sdpa.
    """
    from transformers.masking_utils import sdpa_mask

    device = kwargs.get("device")
    if attention_mask is None and q_length == kv_length and not kwargs.get("use_vmap"):
        rows, places = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)[None]
        starts = ~mask_function(rows, 0, places, places - 1).expand(batch_size, q_length)
        starts[:, 0] = True
        first_places = torch.where(starts, places, 0).cummax(1).values
        if mask_function(rows, 0, places, first_places).all():
            if not starts[:, 1:].any():
                return None  # one document a row: attention is just causal
            ends = torch.tensor([q_length], device=device)
            return [row.nonzero().flatten().diff(append=ends).tolist() for row in starts]
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    return sdpa_mask(**sizes, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def document_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention inside each document: a dense mask over a joined row would have most of the work thrown away.

    Args:
        query, key, value: [rows, heads or key-value heads, T, size of a head].
        attention_mask: what document_lengths gave.

    Returns:
        [rows, T, heads, size of a head], and None for the weights.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if not isinstance(attention_mask, list):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise ValueError("this model's attention is more than a softmax; choose --attn_implementation eager")
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu":  # where sdpa is slow at groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    for row, lengths in enumerate(attention_mask):
        # split, and not slices: their gradients would each be as long as the whole row.
        documents = zip(*(states[row : row + 1].split(lengths, dim=2) for states in (query, key, value)), strict=True)
        settings = {"dropout_p": dropout, "scale": scaling, "is_causal": True}
        settings["enable_gqa"] = key.shape[1] < query.shape[1]
        outputs.append([scaled_dot_product_attention(*states, **settings).transpose(1, 2) for states in documents])
    return torch.cat([torch.cat(row, 1) for row in outputs]), None


def attend_by_document(model: torch.nn.Module, args: dict) -> torch.nn.Module:
    """Lets `model` compute attention document by document, unless --attn_implementation asks for something else."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # With documents of other lengths in each batch, torch.compile would compile again and again.
    is_asked_for = args["attn_implementation"] == "auto" and not args["torch_compile"]
    if is_asked_for and model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        AttentionInterface.register("documents", document_attention)
        AttentionMaskInterface.register("documents", document_lengths)
        model.set_attn_implementation("documents")
    return model


class ChunkedCrossEntropy(torch.autograd.Function):
    """The loss of an output layer without the logits of all targets: they exist for one chunk of targets at a time.

    The gradients are computed along with the loss, so no logits are kept for the backward or computed again. Liger
    Kernel (arXiv:2410.10989) does the same.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss, float32, of the logits `hidden @ weight.T`.

        Args:
            hidden: [targets, size]; weight: [vocabulary, size], of the same precision; targets: ids [targets].
        """
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), TARGETS_AT_ONCE):
            taken = slice(start, start + TARGETS_AT_ONCE)
            chunk, ids = hidden[taken], targets[taken, None]
            log_softmax = (chunk @ weight.T).float().log_softmax(1)
            loss -= log_softmax.gather(1, ids).sum()
            if not any(ctx.needs_input_grad):
                continue  # an evaluation
            grad_logits = log_softmax.exp_()
            grad_logits = grad_logits.scatter_add_(1, ids, grad_logits.new_full(ids.shape, -1.0)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[taken])
            if grad_weight is not None and grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, chunk)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ chunk
            del log_softmax, grad_logits  # else they would lie beside the next chunk's
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor):
        gradients = ctx.gradients
        del ctx.gradients  # they are scaled in place, which can be done once
        return *(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients), None


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """ChunkedCrossEntropy in autocast's precision where that is on, and without gradients where none are recorded."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (part.to(torch.get_autocast_dtype(device)) for part in (hidden, weight))
    if not torch.is_grad_enabled():  # needs_input_grad only says what may have a gradient
        hidden, weight = hidden.detach(), weight.detach()
    assert len(hidden) == len(targets)  # gather would pair them silently
    with torch.autocast(device, enabled=False):  # its float32 parts stay float32
        return ChunkedCrossEntropy.apply(hidden, weight, targets.to(hidden.device))


def compute_loss_in_head(model: torch.nn.Module, args: dict) -> None:
    """Lets the output layer of `model` return the summed loss of `shift_labels`; `logits` of the output are that, too.

    It has to be the layer itself: FSDP2 and ZeRO-3 do not have its weight whole at other times. A model that does more
    with logits is left as it is, with all logits at once, and so are batches without `shift_labels`, and torch.compile.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = model.get_output_embeddings()
    # Not by its type: FSDP2 makes a class of its own of the layer. An adapter's or a 4-bit layer has another forward.
    is_plain = type(head).forward is torch.nn.Linear.forward and head.bias is None
    if args["torch_compile"] or not is_plain or not re.search(HEAD_THEN_LOSS, inspect.getsource(type(model).forward)):
        return
    # accelerate's hook, which moves inputs to the layer's device, keeps the layer's own forward under another name.
    name = "_old_forward" if hasattr(head, "_old_forward") else "forward"
    plain_forward, plain_loss = getattr(head, name), model.loss_function
    targets = None  # of the forward that is going on: the layer is called with hidden states only

    def remember_targets(module, inputs, kwargs):
        nonlocal targets
        targets = kwargs.get("shift_labels")

    def forward(hidden):
        return plain_forward(hidden) if targets is None else summed_loss(hidden[0], head.weight, targets[0])

    def loss_function(logits, *args, num_items_in_batch=None, shift_labels=None, **kwargs):
        if shift_labels is None:
            return plain_loss(logits, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        return logits / (shift_labels.numel() if num_items_in_batch is None else num_items_in_batch)

    model.register_forward_pre_hook(remember_targets, with_kwargs=True)
    model.loss_function = loss_function
    setattr(head, name, forward)


@torch.no_grad()
def check_document_attention(model: torch.nn.Module, vocab_size: int) -> None:
    """Runs two joined documents through `model` and changes the first: the second's logits may not move at all.

    A backend that ignores `position_ids` trains on leaked text without any other sign; this costs two forwards of
    eight tokens.

    Raises:
        ValueError: the model's attention crosses the border between two documents.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = []
    for first_document in ([0, 1, 2, 3], [1, 2, 3, 4]):
        input_ids = torch.tensor([first_document + [4, 5, 6, 7]], device=device) % vocab_size
        positions = torch.tensor([[0, 1, 2, 3] * 2], device=device)
        # FlashAttention refuses float32, which training does not give it either.
        with torch.autocast(device.type, torch.bfloat16, enabled="flash" in model.config._attn_implementation):
            logits += [model(input_ids=input_ids, position_ids=positions, use_cache=False).logits]
    model.train(was_training)
    if torch.equal(logits[0][:, :4], logits[1][:, :4]) or not torch.equal(logits[0][:, 4:], logits[1][:, 4:]):
        raise ValueError("the attention of this model crosses documents in one row; choose another "
                         "--attn_implementation, or --padding_free False with a set that is not packed")  # fmt: skip


def verify(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """Reads back every tensor of the safetensors files in `folder`, one at a time, and compares it with `trained`.

    Raises:
        OSError: a tensor is missing or differs.
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            trained = {
                n: t for n, t in trained.items() if n not in file.keys() or not torch.equal(file.get_tensor(n), t)
            }
    if trained:
        raise OSError(f"{folder}: {', '.join(trained)} was not saved as it was trained")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-<step>, complete or not, newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[11:]), reverse=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_checkpoint(folder: Path, sampler: RowSampler) -> None:
    """Writes complete.json, which makes a checkpoint valid, and deletes what is older than the newest complete ones."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with ThreadPoolExecutor() as pool:  # large files hashed at once
        hashes = dict(zip(paths, pool.map(sha256, paths.values()), strict=True))
    files = {name: {"bytes": path.stat().st_size, "sha256": hashes[name]} for name, path in paths.items()}
    os.sync()  # a power cut must not leave complete.json beside files that never reached the disk
    (folder / "complete.tmp").write_text(json.dumps({"identity": sampler.identity, "files": files}, indent=2))
    os.replace(folder / "complete.tmp", folder / "complete.json")
    os.sync()  # nor delete the older checkpoints before this one is there
    checkpoints = list_checkpoints(folder.parent)
    kept = [path for path in checkpoints if (path / "complete.json").is_file()][: sampler.settings["save_total_limit"]]
    for outdated in checkpoints[checkpoints.index(kept[-1]) + 1 :]:
        (outdated / "complete.json").unlink(missing_ok=True)  # first: a half-deleted checkpoint is not complete
        shutil.rmtree(outdated)


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was when complete.json was written."""
    if not (folder / "complete.json").is_file():
        return "it has no complete.json, so it was never finished"
    try:
        complete = json.loads((folder / "complete.json").read_text())
        hashes = {name: file["sha256"] for name, file in complete["files"].items()}
        assert complete["identity"]["num_rows"] > 0
    except (ValueError, TypeError, KeyError, AssertionError):
        return "its complete.json is damaged"
    damaged = [name for name in hashes if not (folder / name).is_file() or sha256(folder / name) != hashes[name]]
    return f"missing or damaged: {', '.join(damaged)}" if damaged else None


def find_checkpoint(choice: str, output_dir: str, sampler: RowSampler) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    Args:
        choice: `True` for the newest complete one in `output_dir`, `False` for none, or a folder.

    Raises:
        ValueError: the folder is not complete, its run had other rows or settings, or output_dir holds a newer one.
    """
    for folder in {"False": [], "True": list_checkpoints(output_dir)}.get(choice, [Path(choice)]):
        damage = find_damage(folder)
        if damage is None:
            before = json.loads((folder / "complete.json").read_text())["identity"]
            if changed := {name: value for name, value in before.items() if value != sampler.identity.get(name)}:
                raise ValueError(f"{folder} belongs to a run with {changed}; resume with the same")
            newest = [path for path in list_checkpoints(output_dir) if (path / "complete.json").is_file()][:1]
            if choice != "True" and newest and newest[0].resolve() != folder.resolve():
                raise ValueError(f"the run would mix with {newest[0]}; choose another --output_dir")
            print(f"resuming from {folder}")
            return folder
        if choice != "True":
            raise ValueError(f"{damage}; name a complete checkpoint, or True for the newest in --output_dir")
        print(f"ignoring {folder}: {damage}")
    if choice == "True":
        print(f"no complete checkpoint in {output_dir}: starting from the beginning")
    return None


def set_former_run_aside(output_dir: Path, checkpoint: Path | None = None) -> None:
    """Renames a folder that holds a run, unless that run is resumed from `checkpoint`: a new run would overwrite it."""
    if checkpoint is not None:
        (output_dir / "run.json").unlink(missing_ok=True)  # it is written again when the resumed run has finished
        return
    if list_checkpoints(output_dir) or (output_dir / "run.json").is_file():
        former = output_dir.rename(f"{output_dir}.{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{output_dir} held a former run, which is now {former}")


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPUs, or in host memory without one."""
    on_gpus = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
    return sum(on_gpus) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_receipt(output_dir: str | Path, arguments: dict, sampler: RowSampler, devices: list, facts: dict) -> None:
    """Writes run.json, the last file of a run: what was run, on what, with which versions and data, and `facts`.

    All processes of a run call it, each with its own `devices`; the first one writes.
    """
    ranks = [(devices, peak_memory())]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (devices, peak_memory()))
        if dist.get_rank() > 0:
            return
    command = [shutil.which("git") or "false", "rev-parse", "--verify", "HEAD"]  # a slim image may lack git
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    packages = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "deepspeed", "bitsandbytes"}
    receipt = {
        "command": sys.argv,
        "arguments": arguments,
        "versions": {name: version(name) for name in sorted(packages) if sys.modules.get(name)},
        "git_commit": git or None,
        "dataset": sampler.dataset.ledger,
        "identity": sampler.identity,
        "world_size": len(ranks),
        "devices": [device for devices, _ in ranks for device in devices],
        "peak_memory_bytes": [memory for _, memory in ranks],
        **facts,
    }
    (Path(output_dir) / "run.tmp").write_text(json.dumps(receipt, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(Path(output_dir) / "run.tmp", Path(output_dir) / "run.json")
    print(f"saved {output_dir}")


def leave() -> None:
    """Ends a process of a distributed run with success, when all of them have written what they had to.

    Python does not end in its own way: gloo's threads, which outlive their process group, may still be freeing tensors
    of the last collective, and without an interpreter that aborts a process whose work is done.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
