"""Chat templates: what they are given, what they must not do, and how long they may take."""

import time
from datetime import datetime

import pytest

from deployments.chat_template import ASIDE, AT_ONCE, ChatTemplate, Effort, TooMuchEffort
from deployments.errors import RequestError
from tests.deployments.fakes import TEMPLATE


def render(source, messages=(), **options):
    return ChatTemplate(source, {"eos_token": "</s>"}).render(list(messages), options)


def test_blocks_leave_no_blank_lines():
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_options_reach_the_template():
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"


def test_what_templates_expect_is_there():
    assert render("{{ eos_token }}{{ strftime_now('%Y') }}") == f"</s>{datetime.now().year}"
    assert render('{{ {"a": "<é>"} | tojson }}') == '{"a": "<é>"}'
    assert (
        render("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )
    assert render("{% generation %}x{% endgeneration %}") == "x"
    assert render("{{ tools is none }}{{ add_generation_prompt }}") == "TrueTrue"


def test_a_template_may_refuse_in_its_own_words():
    with pytest.raises(RequestError, match="refused the messages: roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(10000000) | list }}",
        "{{ 1 / 0 }}",
        "{{ missing.field.field }}",
        "{% include 'other' %}",
        "{{ 'a' + 1 }}",
        "{{ 'a' * 10**18 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_must_not_do_is_refused(source):
    with pytest.raises(RequestError, match="cannot render these messages"):
        render(source)


def test_what_a_template_may_write_is_bounded():
    template = ChatTemplate("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", {})
    with pytest.raises(RequestError, match="more than 5000 characters"):
        template.render([], {}, Effort(1.0, 5000))


def test_content_is_data_and_not_template():
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}]
    assert "{{ 7 * 7 }}{% raw %}" in render(TEMPLATE, messages)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if range(99999) | list | length < 0 %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}"
    "{% endfor %}",
    "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% macro f(n) %}{% if n %}"
    "{% call twice() %}{{ f(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block b %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endblock %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_ends_when_its_time_is_over(source):
    template = ChatTemplate(source, {})
    for effort in (AT_ONCE, Effort(0.1, ASIDE.num_chars)):
        began = time.thread_time()
        with pytest.raises(TooMuchEffort, match=f"takes more than {effort.cpu_s:g} s") as caught:
            template.render([], {}, effort)
        assert effort.cpu_s <= time.thread_time() - began < effort.cpu_s + 0.5
        assert (caught.value.status, caught.value.code) == (400, "template_timeout")


def test_no_name_in_a_template_stops_the_clock():
    loops = ENDLESS[0]
    for name in ("context", "environment", "look", "clock", "the_clock", "self"):
        with pytest.raises(TooMuchEffort):
            ChatTemplate(f"{{% set {name} = 1 %}}{loops}", {}).render([], {}, AT_ONCE)


def test_a_long_chat_is_no_endless_one():
    messages = [{"role": "user", "content": "x"}] * 2048
    assert render(TEMPLATE, messages).count("user: x") == 2048


def test_loops_are_what_they_were():
    source = (
        "{% for m in messages if m != 2 %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}"
        "{{ loop.last }}{{ m }} {% else %}none{% endfor %}"
    )
    assert render(source, [1, 2, 3]) == "1/2TrueFalse1 2/2FalseTrue3 "
    assert render(source) == "none"
