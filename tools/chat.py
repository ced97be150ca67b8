"""A conversation with a base model, a fine-tuned one, or a base with an adapter of any kind.

    python tools/chat.py                                                 # the newest adapter below outputs/
    python tools/chat.py --peft_path outputs/finetune_pp_peft --system "Answer in one sentence."
    python tools/chat.py --model_path models/SmolLM2-135M-Instruct --do_sample True --temperature 0.7
    echo "My eye is red and hurts. Which department?" | python tools/chat.py

Answers come token by token. /help lists the commands, Ctrl-C stops an answer, and Ctrl-D ends the program. What you
type is put where the question stood in the training data, and the conversation so far stands before it. The model is
loaded, and its answers are chosen, as in test_sample.py, which also answers whole files of questions.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, set_seed
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data_sample.rendering import user_message
from test_sample import check_sampling, generate, load_model, sampling
from tools import loading
from tools.loading import ModelSource, collect
from tools.paths import expand_home

COMMANDS = """/reset         forget the conversation
/system TEXT   begin anew with this system message; without TEXT: with none
/save FILE     append the conversation to a JSONL file, which tokenize_dataset.py --format chat reads
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Arguments:
    model_path: str | None = field(
        default=None, metadata={"help": "folder or hub id; default: the base model that the adapter names"}
    )
    peft_path: str | None = field(
        default=None, metadata={"help": "folder of an adapter; default: the newest below outputs/, if no --model_path"}
    )
    system: str | None = field(default=None, metadata={"help": "system message before the conversation"})
    template_path: str | None = field(
        default=None, metadata={"help": "run.json or ledger.json with the prompt's template; default: the run's own"}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer in tokens"})
    do_sample: bool = field(default=False, metadata={"help": "draw tokens at random instead of taking the likeliest"})
    temperature: float | None = field(default=None, metadata={"help": "with --do_sample True: below 1 is less random"})
    top_k: int | None = field(
        default=None, metadata={"help": "with --do_sample True: draw from the k likeliest tokens"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "with --do_sample True: draw from the likeliest that have this probability"}
    )
    min_p: float | None = field(
        default=None, metadata={"help": "with --do_sample True: the least share of the likeliest token's probability"}
    )
    repetition_penalty: float | None = field(default=None, metadata={"help": "above 1: tokens that occurred get rarer"})
    seed: int = field(default=42, metadata={"help": "of --do_sample True"})
    load_in_4bit: str = field(
        default="auto", metadata={"help": "auto: as the adapter was trained | True | False; needs bitsandbytes"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "leave the GPU alone"})


def check_arguments(args: Arguments) -> tuple[ModelSource, dict]:
    """Completes the arguments. Returns the model's files, and the template of its prompts.

    Raises:
        ValueError: all mistakes, one a line, each with the flag, its value and the remedy.
    """
    mistakes = check_sampling(args)
    if args.load_in_4bit not in ("auto", "True", "False"):
        mistakes.append(f"--load_in_4bit {args.load_in_4bit}: choose auto, True or False")
    if args.peft_path is None and args.model_path is None:
        args.peft_path = loading.find_newest_adapter()
        if args.peft_path is None:
            mistakes.append("--peft_path: no finished adapter below outputs/; train one with python "
                            "finetune_pp_peft.py, or name a model without an adapter with --model_path")  # fmt: skip
    source = None
    if args.peft_path is not None or args.model_path is not None:
        with collect(mistakes):
            source = loading.open_model(args.model_path, args.peft_path)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    with collect(mistakes, f"--load_in_4bit {args.load_in_4bit}"):
        args.load_in_4bit = str(loading.use_4bit(args.load_in_4bit, source))
    template = None
    with collect(mistakes, f"--template_path {args.template_path or ''}".rstrip()):
        template = loading.find_template(args.template_path, source.receipt, source.tokenizer, {"prompt": ""})
    if template is not None and args.system is not None:
        with collect(mistakes, f"--system {args.system}"):
            loading.check_system(source, args.system, template)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return source, template


class Printer(BaseStreamer):
    """Prints an answer token by token, and keeps it in `text`: what Ctrl-C interrupts stays in the conversation."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = []
        self.text = ""
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """transformers calls it with the prompt first, and then with each new token."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which only some bytes are there
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self) -> None:
        print(flush=True)


class Conversation:
    """The messages so far, and what each line that the user types does with them."""

    def __init__(self, args: Arguments, model, source: ModelSource, template: dict):
        self.args = args
        self.model = model
        self.source = source
        self.template = template
        self.messages = []
        if args.system:
            self.messages.append({"role": "system", "content": args.system})

    def obey(self, command: str, argument: str) -> None:
        """Does what a line that begins with / says."""
        if command == "/reset":
            self.messages = [message for message in self.messages if message["role"] == "system"]
        elif command == "/system":
            self.begin_with_system(argument)
        elif command == "/save" and argument:
            self.save(argument)
        else:
            print(COMMANDS)

    def begin_with_system(self, text: str) -> None:
        if not text:
            self.messages = []
            return
        try:
            loading.check_system(self.source, text, self.template)
        except ValueError as problem:
            print(f"no system message: {problem}")
            return
        self.messages = [{"role": "system", "content": text}]

    def save(self, path: str) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            print(f"{len(self.messages)} messages appended to {path}")
        except OSError as problem:
            print(f"not saved: {problem}")

    def answer(self, line: str) -> None:
        """Streams the answer to `line`, and keeps both; or says in one line why there is none."""
        turn = user_message(line, self.template)
        try:
            ids = loading.encode_messages(self.source, [*self.messages, turn], self.template)
        except ValueError as problem:
            print(f"no answer: {problem}; /reset begins anew")
            return
        tokenizer = self.source.tokenizer
        printer = Printer(tokenizer)
        try:
            generate(self.model, tokenizer, [ids], self.args.max_new_tokens, streamer=printer, **sampling(self.args))
        except KeyboardInterrupt:
            print(" [stopped]")
        self.messages.append(turn)
        self.messages.append({"role": "assistant", "content": printer.text})


def talk(conversation: Conversation) -> None:
    """Reads what the user types until /quit or the end of the input."""
    print(COMMANDS)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends", end="")
            continue
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command.startswith("/"):
            conversation.obey(command, argument)
        elif line:
            conversation.answer(line)


def main() -> None:
    parser = HfArgumentParser(Arguments, usage="%(prog)s [--flag value ...]", allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
        args = expand_home(args)
        source, template = check_arguments(args)
        model = load_model(source, args.load_in_4bit == "True", args.use_cpu)
    except ValueError as mistakes:
        sys.exit(f"error: {mistakes}\n--help lists every flag with its default")
    print(f"model {source.model_path}, adapter {source.peft_path or 'none'}")
    set_seed(args.seed)
    talk(Conversation(args, model, source, template))


if __name__ == "__main__":
    main()
