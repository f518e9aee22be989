"""Chat templates of the kinds that differ in what they do to a conversation, written down in their shortest form."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# SmolLM2 and Qwen2.5 speak first when the conversation brings no system turn.
CHATML_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
# Llama 2: no end of turn but the end of sequence, a space before the answer, no generation prompt of its own.
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Gemma: its own name for the assistant, no system turn, contents trimmed, an end of turn that is not the eos token.
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# DeepSeek-R1 opens a thought when it asks and leaves it out when it tells.
THINK_WHEN_ASKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Qwen3 writes an empty thought before every answer it tells, and into the question when thinking is off.
THINK_WHEN_TELLING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# transformers' own mark of what the assistant writes; here with the line break behind the end inside, as TRL's have it.
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Mistral 7B v0.3: tools stand before the last user turn, so that they move; no opening of an answer.
MISTRAL = (
    "{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{%- if tools is defined and tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{%- elif m['tool_calls'] is defined %}{{ '[TOOL_CALLS] [' }}{%- for c in m['tool_calls'] %}"
    "{%- if c['id'] | length != 9 %}{{ raise_exception('Tool call IDs should be nine letters and digits!') }}"
    "{%- endif %}{{ (c['function'] | tojson)[:-1] + ', \"id\": \"' + c['id'] + '\"}' }}"
    "{{ ', ' if not loop.last else ']' }}"
    "{%- endfor %}{{ eos_token }}{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{%- elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m['content'] | string + ', \"call_id\": \"'"
    " + m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"
)
