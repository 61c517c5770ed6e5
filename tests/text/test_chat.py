"""Chat templates render conversations like transformers, or refuse them with an error of one line."""

from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CheckpointError, RequestError
from shoal.launch.hub import BUNDLED
from shoal.text.chat_template import ChatTemplate, check_messages
from support import tokenizers as made

# Templates similar to those of the models in their names, with the features of Jinja that these use.
TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "qwen": """
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.found and message.content is string %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" -%}
    {%- set system = messages[0]["content"] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in loop_messages -%}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) -%}
        {{- raise_exception("roles must alternate") -}}
    {%- endif -%}
    {%- if message["role"] == "user" -%}
        {%- if loop.last and system is defined -%}
            {{- "[INST] " + system + "\\n\\n" + message["content"] + "[/INST]" -}}
        {%- else -%}
            {{- "[INST] " + message["content"] + "[/INST]" -}}
        {%- endif -%}
    {%- elif message["content"] == "skip" -%}
        {%- continue -%}
    {%- else -%}
        {{- " " + message["content"] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
    "parts": """{% for message in messages %}<{{ message['role'] }}>
    {% if message['content'] is string %}
{{ message['content'] }}
    {% else %}
        {% for part in message['content'] %}
            {% if part['type'] == 'text' %}
{{ part['text'] | upper }}
            {% endif %}
        {% endfor %}
    {% endif %}
{% endfor %}
""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = {"role": "user", "content": " What is <b>1 + 1</b>? «é» \n"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\nTwo. "}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [SYSTEM, ASK, ANSWER, ASK],
    "skipped": [ASK, {"role": "assistant", "content": "skip"}, ASK],
    "nulls": [{**ASK, "name": None, "tool_calls": None}],
}
EXTRA: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & «c»", "parameters": {}}}]


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made.byte_level(), **SPECIAL)


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, EXTRA], ids=["plain", "tools", "extra"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_in_transformers(
    name: str, conversation: str, options: dict[str, Any], reference: Any
) -> None:
    messages = CONVERSATIONS[conversation]
    for prompt in (True, False):
        given = {"add_generation_prompt": prompt, **options}
        theirs = {**given, **given.get("chat_template_kwargs", {})}
        theirs.pop("chat_template_kwargs", None)
        expected = reference.apply_chat_template(messages, tokenize=False, chat_template=TEMPLATES[name], **theirs)
        assert ChatTemplate({"default": TEMPLATES[name]}, SPECIAL).render(messages, **given) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("end", ["It is ", "It is", "It is\n"])
def test_a_message_to_be_continued_is_left_open(name: str, end: str, reference: Any) -> None:
    messages = [ASK, {"role": "assistant", "content": end}]
    given: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    expected = reference.apply_chat_template(messages, tokenize=False, chat_template=TEMPLATES[name], **given)
    assert ChatTemplate({"default": TEMPLATES[name]}, SPECIAL).render(messages, **given) == expected


def test_parts_of_text_are_joined_for_a_template_that_wants_texts() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatTemplate({"default": "{{ messages[0].content }}"}).render(messages) == "one\ntwo"
    assert ChatTemplate({"default": TEMPLATES["mistral"]}, SPECIAL).render(messages) == "<s>[INST] one\ntwo[/INST]"
    assert ChatTemplate({"default": TEMPLATES["parts"]}).render(messages) == "<user>\nONE\nTWO\n"
    assert messages == [{"role": "user", "content": parts}], "the caller's messages were changed"


def test_a_text_becomes_a_part_for_a_template_that_wants_parts() -> None:
    template = (
        "{% for m in messages %}{% set c = m['content'] %}{% for part in c %}{{ part.text }};{% endfor %}{% endfor %}"
    )
    assert ChatTemplate({"default": template}).render([{"role": "user", "content": "ab"}]) == "ab;"


def test_arguments_of_tool_calls_are_objects_for_the_template() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
    messages: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = ChatTemplate({"default": TEMPLATES["llama3"]}).render(messages)
    assert '{"name": "add", "parameters": {"a": "é"}}<|eot|>' in text
    assert call["function"] == {"name": "add", "arguments": '{"a": "é"}'}


def test_arguments_of_a_tool_call_may_have_line_breaks_in_strings() -> None:
    """JSON does not allow them, but a model may have written them."""
    call = {"function": {"name": "f", "arguments": '{"a": "x\ny"}'}}
    found = ChatTemplate({"default": "{{ messages[0].tool_calls[0].function.arguments.a }}"}).render(
        [{"role": "assistant", "tool_calls": [call]}]
    )
    assert found == "x\ny"


@pytest.mark.parametrize("given", [{}, {"content": None}])
def test_a_message_with_tool_calls_only_has_an_empty_content(given: dict[str, Any]) -> None:
    template = (
        "{% for m in messages %}{% if m['content'] is none %}none{% else %}{{ '<' + m['content'] + '>' }}{% endif %}"
    )
    template += "{% for call in m.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
    message = {"role": "assistant", **given, "tool_calls": [{"function": {"name": "f", "arguments": None}}]}
    assert ChatTemplate({"default": template}).render([message]) == "<>{}"


@pytest.mark.parametrize("content", ["yes", None])
def test_an_empty_list_of_tool_calls_counts_as_none(content: str | None) -> None:
    """Servers answer with an empty list, and clients send it back."""
    messages: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": content, "tool_calls": []}, ASK]
    plain: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": content or ""}, ASK]
    template = ChatTemplate({"default": TEMPLATES["llama3"]})
    assert template.render(messages) == template.render(plain)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({"tokenizer_config.json": {"chat_template": "one {{ bos_token }}", "bos_token": "<s>"}}, "one <s>"),
        ({"tokenizer_config.json": {"chat_template": "{{ bos_token }}", "bos_token": {"content": "<b>"}}}, "<b>"),
        ({"tokenizer_config.json": {"chat_template": "{{ bos_token }}", "bos_token": None}}, ""),
        (
            {
                "tokenizer_config.json": {"chat_template": "{{ bos_token }}"},
                "special_tokens_map.json": {"bos_token": "<m>"},
            },
            "<m>",
        ),
        ({"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": "new"}, "new"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "rag", "template": "1"}, {"name": "default", "template": "2"}]
                }
            },
            "2",
        ),
    ],
)
def test_templates_are_found_in_the_files_of_a_model(
    files: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    found = ChatTemplate.open(made.write(tmp_path, files))
    assert (found and found.render([ASK])) == expected


def test_the_bundled_model_has_a_template() -> None:
    found = ChatTemplate.open(BUNDLED)
    assert found is not None
    assert found.render([{"role": "user", "content": "Hi"}]) == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_a_template_is_chosen_by_its_name(tmp_path: Path) -> None:
    made.write(tmp_path / "additional_chat_templates", {"rag.jinja": "rag"})
    made.write(tmp_path, {"chat_template.jinja": "default"})
    found = ChatTemplate.open(tmp_path)
    assert found is not None
    assert found.render([ASK]) == "default"
    assert found.render([ASK], chat_template="rag") == "rag"
    assert found.render([ASK], chat_template="mine: {{ x }}", chat_template_kwargs={"x": 1}) == "mine: 1"
    tools = ChatTemplate({"default": "no tools", "tool_use": "tools"})
    assert tools.render([ASK], tools=TOOLS) == "tools"
    assert tools.render([ASK]) == "no tools"


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 7},
        {"chat_template": [{"name": "a"}]},
        {"chat_template": {"name": "a"}},
        {"chat_template": [1]},
    ],
)
def test_malformed_files_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    made.write(tmp_path, {"tokenizer_config.json": config})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template must be"):
        ChatTemplate.open(tmp_path)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("hello", "messages must be a list of objects with role and content, got str"),
        ({"role": "user"}, "messages must be a list of objects with role and content, got dict"),
        ([], "messages is empty"),
        ([ASK, "hello"], "message 1 must be an object with role and content, got str"),
        ([{"content": "x"}], "message 0: role must be a string such as user, got None"),
        ([{"role": 7, "content": "x"}], "message 0: role must be a string such as user, got 7"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": 7}], "message 0: content must be a string or a list of parts, got int"),
        ([{"role": "user", "content": [7]}], "message 0, part 0: a part of content must be an object"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "message 0, part 0: text of a part must be a string, got NoneType",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "message 0, part 0: parts of type image_url can't be read; this engine takes text",
        ),
        ([{"role": "assistant", "tool_calls": 7}], "message 0: tool_calls must be a list of objects"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "message 0: the arguments of a tool call are not valid JSON",
        ),
        ([{"role": "user", "content": "x", "extra": b"x"}], "message 0: a value of type bytes is not a JSON value"),
    ],
)
def test_malformed_messages_are_named(messages: Any, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_messages(messages)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('no\nsystem') }}", "the chat template refuses the conversation: no system"),
        ("{% if %}", "the chat template is malformed, in line 1: "),
        ("{{ messages[0]['content'] + 1 }}", "the chat template fails: TypeError: "),
        ("{{ missing.name }}", "the chat template fails: UndefinedError: 'missing' is undefined"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "the chat template fails: SecurityError: "),
        ("{{ messages.append(1) }}", "the chat template fails: SecurityError: "),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: "),
    ],
)
def test_a_template_that_fails_gives_an_error_of_one_line(template: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate({"default": template}).render([ASK])
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([ASK], {"continue_final_message": True}, "requires add_generation_prompt=False"),
        ([ASK], {"tools": "add"}, "tools must be a list of objects, got str"),
        ([ASK], {"chat_template": 5}, "chat_template must be a string, got int"),
        ([ASK], {"chat_template": ["a"]}, "chat_template must be a string, got list"),
        ([ASK], {"chat_template_kwargs": {"x": b""}}, "chat_template_kwargs: x: a value of type bytes"),
        ([ASK], {"chat_template_kwargs": 3}, "chat_template_kwargs must be an object of names and values, got 3"),
        ([ASK], {"chat_template_kwargs": [("x", 1)]}, "chat_template_kwargs must be an object"),
        ([ASK], {"chat_template_kwargs": {3: 1}}, "chat_template_kwargs must be an object"),
        *(
            ([ASK], {"chat_template_kwargs": {name: 3}}, f"chat_template_kwargs can't set {name}: it is an argument")
            for name in ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
        ),
        (
            [{**ASK, "content": ""}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "the last message has no content that could be continued",
        ),
        (
            [ASK],
            {"continue_final_message": True, "add_generation_prompt": False, "chat_template": "nothing"},
            "the chat template leaves out the end of the last message",
        ),
    ],
)
def test_invalid_options_are_refused(messages: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        ChatTemplate({"default": TEMPLATES["qwen"]}).render(messages, **options)


def test_without_a_template_conversations_are_refused() -> None:
    with pytest.raises(RequestError, match="give chat_template; it has none"):
        ChatTemplate({}).render([ASK])


def test_a_template_can_read_the_date() -> None:
    year = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}).render([ASK])
    assert year.isdigit()
    assert len(year) == 4


def test_the_role_developer_becomes_system_for_templates_that_do_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    source = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    assert ChatTemplate({"default": source}).render(messages) == "system"
    knowing = source + "{% if messages[0]['role'] == 'developer' %}!{% endif %}"
    assert ChatTemplate({"default": knowing}).render(messages) == "developer!"


def test_a_template_whose_loops_run_too_long_is_stopped() -> None:
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="its loops have more than 2000000 iterations"):
        ChatTemplate({"default": endless}).render([{"role": "user", "content": "a"}])


def test_counting_iterations_does_not_change_the_loops_of_a_template() -> None:
    source = (
        "{% for m in messages if m.role %}{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{% for q in nothing %}{% else %}else{% endfor %}"
        "{% for x in [1, [2]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a"}] * 2
    assert ChatTemplate({"default": source}).render(messages) == "1/22/2!a1else12"
