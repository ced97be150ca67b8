"""Small chat templates of the shapes that models in use have, in our own words, with tokens of our own.

Each is named after what it does. TEMPLATES holds them; `<s>` and `</s>` are the tokenizer's BOS and EOS, and ENDS are
special tokens besides.
"""

import json

from conftest import make_tokenizer

ENDS = ["<|end|>", "<|turn|>", "<|return|>"]

# Every message the same way, as ChatML writes it.
EACH_ALIKE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# A system message of its own where the conversation brings none, as SmolLM2 and Qwen2.5 do.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>\nYou are kind.{{ eos_token }}\n{% endif %}" + EACH_ALIKE
)

TOOLS = "{% if tools %}<|tools|>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ eos_token }}\n{% endif %}"
CALLS = "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"

# The last turn always has a block of reasoning, and the turns before the last question have none, as with Qwen3.
DROPS_EARLIER_REASONING = (
    TOOLS + "{% set ns = namespace(question=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}"
    "{% endfor %}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}"
    "{% set reasoning = message.reasoning_content or '' %}{% set content = message.content or '' %}"
    "{% if '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.question and (loop.last or reasoning) %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}"
    "{{ content }}" + CALLS + "{% else %}{{ message.content }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Each turn ends with a token of its own, and the conversation with EOS, as with Phi-3.
ENDS_ONLY_THE_LAST = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)

# The system message stands in the last user message, no text opens the assistant's turn, and a space does, as with
# Mistral 7B v0.3. Calls are a list, and each needs an id of nine characters.
MOVES_SYSTEM = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' and message.tool_calls %}[CALLS] ["
    "{% for call in message.tool_calls %}{% if (call.id or '') | length != 9 %}"
    "{{ raise_exception('an id has nine characters') }}{% endif %}{{ call.function | tojson }}{% endfor %}]"
    "{{ eos_token }}"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}[RESULT] {{ message.content }}[/RESULT]{% endif %}{% endfor %}"
)

# The prompt ends inside a block of reasoning that no finished turn has, as with DeepSeek-R1's distilled LLaMA.
OPENS_THINK = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "<|assistant|>{{ (message.content or '').split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

# As before, but the last turn has the block, as with Qwen3's thinking models.
ALWAYS_THINKS = DROPS_EARLIER_REASONING.replace(
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
)

# The day on which it is used, as with Llama 3.2; turns end with a token that is not EOS.
WRITES_DATE = (
    "{{ bos_token }}<|system|>\nToday is {{ strftime_now('%d %b %Y') }}.<|turn|>"
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}<|turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Joins texts, so that arguments have to be a text and each turn needs a content, as with DeepSeek-V3.
JOINS_TEXTS = (
    TOOLS + "{% for message in messages %}{{ '<|' + message.role + '|>' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + '\n' + call.function.arguments + '</call>' }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# A call only where nothing is said beside it.
CALLS_INSTEAD_OF_TEXT = (
    TOOLS + "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content %}{{ message.content }}{% else %}{% for call in message.tool_calls %}"
    "{{ '<call>' + call.function.name + '\n' + call.function.arguments + '</call>' }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The content of earlier turns is cut at their reasoning, so that it has to be there, as with QwQ.
READS_EARLIER_CONTENT = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ message.content or '' }}{% endif %}"
    + CALLS
    + "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Reasoning in a channel of its own, only in the last turn, whose end is another token, as with gpt-oss.
CHANNELS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% if loop.last and message.thinking %}<|assistant|>analysis: {{ message.thinking }}<|end|>{% endif %}"
    "<|assistant|>final: {{ message.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Words instead of tokens, and no end, as with the templates of base models.
NO_END = (
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

TEMPLATES = {
    "each alike": EACH_ALIKE,
    "default system": DEFAULT_SYSTEM,
    "drops earlier reasoning": DROPS_EARLIER_REASONING,
    "ends only the last": ENDS_ONLY_THE_LAST,
    "moves system": MOVES_SYSTEM,
    "opens think": OPENS_THINK,
    "always thinks": ALWAYS_THINKS,
    "writes date": WRITES_DATE,
    "joins texts": JOINS_TEXTS,
    "calls instead of text": CALLS_INSTEAD_OF_TEXT,
    "reads earlier content": READS_EARLIER_CONTENT,
    "channels": CHANNELS,
    "no end": NO_END,
}
WITH_CALLS = ["drops earlier reasoning", "always thinks", "moves system", "joins texts", "calls instead of text",
              "reads earlier content"]  # fmt: skip


def make_chat_tokenizer(name: str):
    """The tests' tokenizer with a template; it adds no BOS itself, because some of the templates write it."""
    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def write_call(call: dict) -> str:
    """A call as the templates above write it."""
    return f"<call>{json.dumps(call['function'], ensure_ascii=False)}</call>"
