"""Chat templates in the styles of well-known models, which mark what the assistant writes.

Without its marks, a template is what a model usually comes with; with them, transformers knows what
is to be trained. Written for the tests; the models' own differ in details.
"""

_CALLS = (
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson) + '\n</tool_call>' }}{% endfor %}"
)
_CHATML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{% generation %}{{- m.content or '' }}" + _CALLS + "{{- '<|im_end|>' }}{% endgeneration %}"
    "{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
)
_MISTRAL = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{%- set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{%- for m in rest %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' }}"
    "{%- if system is defined and SYSTEM_AT %}{{- system + '\n\n' }}{% endif %}"
    "{{- m.content + ' [/INST]' }}"
    "{%- else %}{% generation %}{{- ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}"
    "{%- endfor %}"
)
_LLAMA_3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}"
    "{{- m.content | default('', true) | trim }}{{- '<|eot_id|>' }}{% endgeneration %}"
    "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{%- set rest = messages[1:] %}"
    "{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{%- for m in rest %}"
    "{%- if m.role == 'assistant' %}{{- '<start_of_turn>model\n' }}"
    "{% generation %}{{- m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<start_of_turn>' + m.role + '\n' + (first if loop.first else '')"
    " + m.content | trim + '<end_of_turn>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"
)
_PHI_3 = (
    "{%- for m in messages %}"
    "{{- '<|' + m.role + '|>\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|end|>' }}"
    "{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- m.content + '<|end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}"
)
_IF_THINKING = "{%- if loop.index0 > ns.asked and (loop.last or thought) %}"
# Reasoning is written after the last question only, and always there.
_QWEN_3 = (
    "{%- set ns = namespace(asked=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- set content = m.content or '' %}{% set thought = '' %}"
    "{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n') %}"
    "{%- set thought = thought.split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% generation %}"
    + _IF_THINKING
    + "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{% endif %}" + _CALLS + "{{- '<|im_end|>' }}{% endgeneration %}"
    "{{- '\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{%- endfor %}" + _CHATML_END
)
_GLM = (
    "{{- '[gMASK]<sop>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|assistant|>' }}"
    "{% generation %}{{- '\n' + (m.content or '').strip() }}" + _CALLS + "{% endgeneration %}"
    "{%- elif m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
)
_GPT_OSS = (
    "{{- '<|start|>system<|message|>You are a model.<|end|>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- '<|start|>assistant' }}{% generation %}"
    "{%- if m.tool_calls %}"
    "{%- if m.content %}{{- '<|channel|>analysis<|message|>' + m.content"
    " + '<|end|><|start|>assistant' }}{% endif %}"
    "{{- ' to=functions.' + m.tool_calls[0].function.name"
    " + '<|channel|>commentary json<|message|>'"
    " + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{%- else %}"
    "{%- if loop.last and m.thinking %}{{- '<|channel|>analysis<|message|>' + m.thinking"
    " + '<|end|><|start|>assistant' }}{% endif %}"
    "{{- '<|channel|>final<|message|>' + m.content"
    " + ('<|return|>' if loop.last and not add_generation_prompt else '<|end|>') }}{% endif %}"
    "{% endgeneration %}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|start|>functions<|channel|>commentary<|message|>' + m.content + '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"
)

TEMPLATES = {
    "chatml": _CHATML + _CHATML_END,
    # Ends the conversation with another token.
    "chatml, closed": _CHATML
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    + _CHATML_END,
    # Without a generation prompt, as templates of 2023 are.
    "chatml, unprompted": _CHATML,
    "llama 3": _LLAMA_3,
    "mistral": _MISTRAL.replace("SYSTEM_AT", "loop.first"),
    # Writes the system message before the last question, so that earlier text changes.
    "mistral, late system": _MISTRAL.replace("SYSTEM_AT", "loop.index0 >= rest | length - 2"),
    "gemma": _GEMMA,
    "phi 3": _PHI_3,
    "qwen 3": _QWEN_3,
    # The prompt opens the reasoning.
    "qwen 3, opened": _QWEN_3.replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
    ).replace(
        "{% generation %}" + _IF_THINKING + "{{- '<think>\n' + ",
        _IF_THINKING + "{{- '<think>\n' }}{% endif %}{% generation %}" + _IF_THINKING + "{{- ",
    ),
    "glm": _GLM,
    "gpt-oss": _GPT_OSS,
    # Writes nothing after a turn but blanks.
    "plain": (
        "{%- for m in messages %}"
        "{%- if m.role == 'assistant' %}{{- '### assistant:\n' }}"
        "{% generation %}{{- m.content }}{% endgeneration %}{{- '\n\n' }}"
        "{%- else %}{{- '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### assistant:\n' }}{% endif %}"
    ),
}
SPECIAL_TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|system|>", "[gMASK]", "<sop>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
    *("<|call|>", "<s>", "<|endoftext|>"),
]


def unmarked(template: str) -> str:
    """The template without its marks."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
