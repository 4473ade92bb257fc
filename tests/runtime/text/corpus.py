# ruff: noqa: E501 - a template is easier to read in one line
"""Chat templates of every style that families use, written for these tests, and conversations for them."""

from __future__ import annotations

CHATML = """
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

# Tools in a system turn, calls in XML, answers of tools grouped in one user turn, thoughts of older turns dropped.
THINKING_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not
           (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}
            {{- '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# A date, tools as indented JSON in the first user turn, arguments one by one, errors that the template raises.
DATED_TOOLS = """
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- tool_call.name + "(" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' + arg_val|string + '"' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
        {{- ")<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# Alternating roles, parts that are trimmed one by one, the system's text before the first user's.
PARTS_TRIMMED = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

# Parts through a macro, numbers of images, thoughts as parts of the content.
PARTS_IN_MACRO = """
{%- set counter = namespace(images=0) %}
{%- macro shown(content, role='user') %}
    {%- if content is string %}{{ content }}
    {%- else %}
        {%- for part in content %}
            {%- if part.type == 'text' %}{{ part.text }}
            {%- elif part.type == 'thinking' %}{{ '[THINK]' + part.thinking + '[/THINK]' }}
            {%- elif part.type in ['image', 'image_url'] %}
                {%- set counter.images = counter.images + 1 %}{{ 'Image %d: <img>' % counter.images }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- for m in messages %}{{ '[' ~ m.role|upper ~ ']' ~ shown(m.content, role=m.role) ~ '[/' ~ m.role|upper ~ ']' }}
{%- endfor %}
"""

GENERATION_LOOPS = """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
{%- if loop.index0 > 20 -%}{%- break -%}{%- endif -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}{{ message.content }}{{ eos_token }}{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>
{% endif %}
"""

# Types of parameters written out by macros that call themselves; filters that sort and group.
SCHEMA_MACROS = """
{%- macro kind(p) -%}
    {%- if p.type == "array" -%}{{ kind(p['items']) ~ '[]' }}
    {%- elif p.type == "object" -%}
        {{- '{' }}{%- for k, v in p.properties|dictsort %}{{ k ~ ': ' ~ kind(v) ~ (', ' if not loop.last else '') }}
        {%- endfor %}{{ '}' }}
    {%- elif p.type is sequence and p.type is not string -%}{{ p.type | join(' | ') }}
    {%- elif p.enum is defined -%}{{ p.enum | map('tojson') | join(' | ') }}
    {%- else -%}{{ {'string': 'str', 'integer': 'int'}.get(p.type, p.type or 'any') }}{%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] -%}
{{ 'def ' ~ tool.function.name ~ '(' }}
{%- for name, p in tool.function.parameters.properties.items() -%}
{{ name ~ ': ' ~ kind(p) }}{% if name not in tool.function.parameters.required|default([]) %}{{ ' = None' }}{% endif %}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}
{{ '):\\n' ~ ('"' ~ tool.function.description|default('none', true) ~ '"')|indent(4, first=true) ~ '\\n' }}
{%- endfor -%}
{% for message in messages | rejectattr('role', 'equalto', 'system') -%}
{{ message.role | capitalize | replace('Assistant', 'AI') }}: {{ message.content | default('', true) | string | trim | e }}
{% endfor -%}
{{ messages | map(attribute='role') | list | unique | sort | join(',') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages | groupby('role') | map('first') | join('/') }}
{{- '%s has %03d' % ('it', messages|length) }}{{ '{:>6}|{!r}'.format(messages|length, 'é') }}
"""

DOCUMENTS = """
{%- for document in documents or [] %}<doc id={{ loop.index }} of={{ loop.length }}>{{ document.title }}: {{ document['text'] }}
{% endfor %}
{%- for message in messages recursive %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% endif -%}
{% if message.tool_calls %}{{ message.tool_calls|tojson(indent=2, sort_keys=true) }}{% endif %}{% endfor %}
{%- set parts = [] %}{% set joined %}{% for i in range(3) %}{{ i }}{{ cycler('a', 'b').next() }}{% endfor %}{% endset %}
{{- joined ~ (joined | length) ~ ([1, 2] + [3])[-1] ~ 7 // 2 ~ 2 ** 5 ~ 7 % 3 ~ -(1.5) ~ {'a': [1, (2,)]} }}
{%- filter upper %}end{% endfilter %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "thinking tools": THINKING_TOOLS,
    "dated tools": DATED_TOOLS,
    "parts trimmed": PARTS_TRIMMED,
    "parts in macro": PARTS_IN_MACRO,
    "generation loops": GENERATION_LOOPS,
    "schema macros": SCHEMA_MACROS,
    "documents": DOCUMENTS,
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather, today's <b>.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"enum": ["C", "F"]},
                    "at": {"type": "object", "properties": {"x": {"type": ["number", "null"]}, "a": {}}},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 3}},
}

TALKS = {
    "one": [{"role": "user", "content": "Hi <b>\U0001f600</b> {{ x }} {% y %}"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Hi \n"}],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": ""},
    ],
    "tool calls": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 3}', "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "3 degrees"},
        {"role": "user", "content": "thanks"},
    ],
    "calls with text": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ],
    "reasoning": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "reasoning_content": "\nbecause\n", "content": "so"},
        {"role": "user", "content": "really?"},
        {"role": "assistant", "reasoning_content": "hm", "content": "yes"},
    ],
    "reasoning by other names": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "reasoning": "because", "content": "so"},
        {"role": "assistant", "thinking": "hm", "content": "yes", "reasoning": None},
        {"role": "assistant", "thinking": "b", "content": "yes", "reasoning": "a"},
    ],
    "thoughts in text": [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nso"},
        {"role": "user", "content": "go on"},
    ],
    "unicode": [
        {
            "role": "user",
            "content": "日本語 \u2028 ü \x00 \U0001f468\u200d\U0001f469\u200d\U0001f467 'q' \"d\" \\n",
        }
    ],
    "many": [{"role": role, "content": f"{role} {i}"} for i in range(15) for role in ("user", "assistant")],
}
PART_TALKS = {
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "\nb "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
    ],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
    "system parts": [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
    ],
}
