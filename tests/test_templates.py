"""Templates: text with places to fill in, as prompts of TensorZero use them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from bitrouter import TemplateError, is_static, parse_template, render_template

PEOPLE = {"people": [{"name": "Al", "age": 3}, {"name": "Bo"}], "n": 2, "on": True, "none": None}

# fmt: off
RENDERED = [
    # template                                                  what comes of it
    ("plain",                                                   "plain"),
    ("one newline goes\n",                                      "one newline goes"),
    ("one\n\n",                                                 "one\n"),
    ("{{ n }}",                                                 "2"),
    ("{{ on }} {{ none }} {{ [1, 'a'] }}",                      'true none [1, "a"]'),
    ("{{ [none, on] }} {{ people[0] }}",              '[none, true] {"age": 3, "name": "Al"}'),
    ("{{ people[0].name }}{{ people[1]['name'] }}",             "AlBo"),
    ("{{ people | length }} {{ 'x' | upper }}",                 "2 X"),
    ("{{ 'a' ~ n ~ 'b' }}",                                     "a2b"),
    ("{{ missing | default('d') }}",                            "d"),
    ("{{ people[0] | tojson }}",                                '{"age":3,"name":"Al"}'),
    ("{{ ['a', 'b'] | join(', ') }}",                           "a, b"),
    ("{% for p in people %}{{ loop.index }}{{ p.name }}{{ loop.last }} {% endfor %}",
     "1Alfalse 2Botrue "),
    ("{% for p in [] %}x{% else %}none{% endfor %}",            "none"),
    ("{% for k in people[0] %}{{ k }} {% endfor %}",            "age name "),
    ("{% if n == 2 and on %}yes{% else %}no{% endif %}",        "yes"),
    ("{% if n > 2 %}a{% elif n >= 2 %}b{% else %}c{% endif %}", "b"),
    ("{% if missing is defined %}a{% endif %}b",                "b"),
    ("{% if missing is not defined %}a{% endif %}b",            "ab"),
    ("{% if people[1].age is undefined %}a{% endif %}",         "a"),
    ("{% if 'l' in people[0].name %}a{% endif %}",              "a"),
    ("{% if not (on or none) %}a{% endif %}b",                  "b"),
    ("a {#- gone -#} b",                                        "ab"),
    ("a\n  {%- if on %} b {%- endif %}",                        "a b"),
    ("{{- n -}}  x",                                            "2x"),
    ('{% include "other" %}!',                                  "<2>!"),
    ("{{ '{{' }} $${x}",                                        "{{ $${x}"),
]
BROKEN = [
    ("{{ missing }}",                  "`missing` is not defined"),
    ("{{ people[0].height }}",         "`height` is not defined"),
    ("{{ missing.name }}",             "`missing` is not defined"),
    ("{% if missing %}a{% endif %}",   "`missing` is not defined"),
    ("{% for x in missing %}{% endfor %}", "`missing` is not defined"),
    ("{% for x in n %}{% endfor %}",   "cannot loop over 2"),
    ("{% if on %}",                    "endif is missing"),
    ("{% for p in people %}",          "endfor is missing"),
    ("{% endif %}",                    "the tag `endif` is not known here"),
    ("{% macro x() %}{% endmacro %}",  "the tag `macro` is not known here"),
    ("{{ n | rot13 }}",                "the filter `rot13` is not known here"),
    ("{% if n is prime %}{% endif %}", "the test `is prime` is not known here"),
    ('{% include "nobody" %}',         "there is no template 'nobody' to include"),
    ('{% include "loop" %}',           "nested too deeply"),
    ("{{ }}",                          "ends too early"),
    ("{{ n n }}",                      "cannot read `n` here"),
    ("{{ (n }}",                       "`)` is missing"),
    ("{{ n ? }}",                      "cannot read"),
    ("{{ 'a' < 1 }}",                  "cannot be filled in"),
    ("{% for in x %}{% endfor %}",     "cannot read `for in x`"),
]
# fmt: on
OTHERS = {"other": "<{{ n }}>\n", "loop": '{% include "loop" %}'}


@pytest.mark.parametrize(("template", "wanted"), RENDERED)
def test_a_template_is_filled_in(template: str, wanted: str) -> None:
    assert render_template(template, PEOPLE, OTHERS) == wanted


@pytest.mark.parametrize(("template", "said"), BROKEN)
def test_what_cannot_be_filled_in_says_why(template: str, said: str) -> None:
    with pytest.raises(TemplateError) as broken:
        render_template(template, PEOPLE, OTHERS)
    assert said in str(broken.value)


def test_arguments_are_text_and_never_templates() -> None:
    assert render_template("{{ x }}", {"x": "{{ y }}{% if %}"}) == "{{ y }}{% if %}"


def test_a_text_without_tags_is_static() -> None:
    assert is_static("a { b } {x") and not is_static("{{x}}") and not is_static("{# c #}")


def test_too_much_text_is_refused() -> None:
    many = "{% for a in x %}{% for b in x %}{{ b }}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="too long"):
        render_template(many, {"x": ["y" * 100] * 200})


def test_any_text_is_a_template_or_a_clear_error() -> None:
    rng = random.Random(4)
    pieces: list[Any] = [
        "{{", "}}", "{%", "%}", "{#", "#}", " if ", " for x in ", "n", "|", "(", "'", "endif",
        "endfor", "-", ".", "[0]", " else ", "~", "\n", "é",
    ]  # fmt: skip
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        try:
            parse_template(text)
            told = render_template(text, PEOPLE)
        except TemplateError as error:
            told = str(error) + "!"
        assert isinstance(told, str)
