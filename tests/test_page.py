"""The Activity page, as far as it can be checked without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from bitrouter import ACTIVITY_PAGE

PAGE = ACTIVITY_PAGE

STYLE = re.findall(r"<style>(.*?)</style>", PAGE, re.DOTALL)
SCRIPT = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)


class _Markup(HTMLParser):
    """Every start tag with its attributes, and the text of every label."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    markup = _Markup()
    markup.feed(PAGE)
    return markup.tags


def ids(tags: list[tuple[str, dict[str, str | None]]]) -> list[str]:
    return [ident for _, attributes in tags if (ident := attributes.get("id"))]


# What a strict Content-Security-Policy and a Python string ask for.


def test_there_is_one_style_and_one_script_to_hash() -> None:
    assert (len(STYLE), len(SCRIPT)) == (1, 1)
    assert PAGE.count("<script") == PAGE.count("<style") == 1


def test_nothing_is_loaded_from_anywhere(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    assert not re.findall(r"(?i)\b(?:https?|wss?):|[\"'(]//", PAGE)
    assert "@import" not in PAGE
    assert "url(" not in PAGE
    loaded = [a.get("src") or a.get("href") for _, a in tags if "src" in a or "href" in a]
    assert loaded == ["data:,"]


def test_no_markup_carries_code_or_style(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    names = {name for _, attributes in tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name == "style"]


@pytest.mark.parametrize(
    "word",
    [
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(",
        "setTimeout(\"", "srcdoc", "createContextualFragment", "DOMParser", ".style", "cssText",
        "javascript:", "import(", "document.cookie",
    ],
)  # fmt: skip
def test_the_script_never_makes_code_or_markup_of_text(word: str) -> None:
    assert word not in SCRIPT[0]


def test_attributes_are_never_set_by_names_from_the_server() -> None:
    """Only makers set attributes, and they get their names from literals in this page."""
    assert SCRIPT[0].count("setAttribute(") == len(
        re.findall(r'setAttribute\("(?:aria-[a-z]+|viewBox)"', SCRIPT[0])
    ) + SCRIPT[0].count("node.setAttribute(attribute, value)")


def test_it_stands_in_a_python_file_as_it_is() -> None:
    assert PAGE.isascii()
    assert "\\" not in PAGE
    assert '"""' not in PAGE
    assert [line for line in PAGE.splitlines() if len(line) > 100 or line != line.rstrip()] == []


def test_it_is_small() -> None:
    assert len(PAGE.encode()) < 42 * 1024


# How the page, its script and its style fit together.


def test_ids_are_unique(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    known = ids(tags)
    assert len(known) == len(set(known))


def test_every_id_that_the_script_uses_is_there(
    tags: list[tuple[str, dict[str, str | None]]],
) -> None:
    calls = r'(?<!butt)(?:\$|fill|on|choices|failed)\("([\w-]+)"'
    used = set(re.findall(calls, SCRIPT[0])) | {"by-model", "by-provider", "by-key", "by-status"}
    assert used <= set(ids(tags))


def test_every_id_is_used_by_script_style_or_markup(
    tags: list[tuple[str, dict[str, str | None]]],
) -> None:
    rest = PAGE.replace('id="', "")
    unused = [
        ident for ident in ids(tags)
        if not re.search(rf'["#]{ident}\b(?!" (?:class|type|aria))', rest) and ident[:3] != "by-"
    ]  # fmt: skip
    assert unused == []


def test_every_class_that_the_script_gives_has_a_style() -> None:
    given = set(re.findall(r'(?:make|draw)\("\w+\.([\w-]+)"', SCRIPT[0]))
    assert given
    assert {name for name in given if f".{name}" not in STYLE[0]} == set()


def test_every_colour_is_defined_for_light_and_dark() -> None:
    defined = set(re.findall(r"(--\w+): light-dark\(", STYLE[0])) | {"--s"}
    assert set(re.findall(r"var\((--\w+)\)", STYLE[0])) == defined
    assert "color-scheme: light dark" in STYLE[0]
    assert 'data-theme="light"' in STYLE[0]
    assert 'data-theme="dark"' in STYLE[0]


def _luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ink", ["ink", "soft", "accent", "bad", "warn"])
@pytest.mark.parametrize("ground", ["page", "card", "tint"])
def test_all_text_has_a_contrast_of_at_least_4_5(ink: str, ground: str, scheme: int) -> None:
    colours = {
        name: _luminance(pair.split(",")[scheme].strip())
        for name, pair in re.findall(r"--(\w+): light-dark\(([^)]*)\)", STYLE[0])
    }
    low, high = sorted((colours[ink], colours[ground]))
    assert (high + 0.05) / (low + 0.05) >= 4.5


# Who reads it.


def test_every_field_has_a_name(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    fields = [attributes for tag, attributes in tags if tag in ("input", "select", "textarea")]
    assert len(fields) > 5
    assert [a for a in fields if not (a.get("aria-label") or a.get("id") in labelled)] == []


def test_there_are_landmarks_and_a_heading_of_each_part(
    tags: list[tuple[str, dict[str, str | None]]],
) -> None:
    names = [tag for tag, _ in tags]
    assert [names.count(tag) for tag in ("header", "main", "h1", "dialog", "noscript")] == [1] * 5
    assert dict(tags)["html"] == {"lang": "en"}
    sections = re.findall(r"<section[^>]*>(.*?)</section>", PAGE, re.DOTALL)
    assert len(sections) == 7
    assert all("<h2" in part or "totals" in part for part in sections)


def test_the_log_speaks_politely_and_nothing_moves() -> None:
    assert '<p id="heard" aria-live="polite">' in PAGE
    assert not re.search(r"animation|transition|@keyframes|assertive", PAGE)
    assert ":focus-visible" in STYLE[0]
    assert STYLE[0].index(".plain {") < STYLE[0].index(":focus-visible")


def test_without_javascript_the_page_says_where_the_json_is() -> None:
    [text] = re.findall(r"<noscript>(.*?)</noscript>", PAGE, re.DOTALL)
    for path in ("v1/usage", "v1/requests", "v1/models", "api/status", "metrics"):
        assert path in text


# What it asks of the server.


def test_it_only_reads_and_only_these_addresses() -> None:
    asked = set(re.findall(r"""ask(?:Json)?\(["`]([\w/]+)""", SCRIPT[0]))
    assert asked == {"v1/usage", "v1/requests", "v1/models", "api/status", "api/events"}
    assert SCRIPT[0].count("fetch(") == 1
    assert not re.search(r"method:|XMLHttpRequest|EventSource\(|WebSocket|sendBeacon", SCRIPT[0])


def test_addresses_are_relative_to_the_page() -> None:
    assert not re.search(r"""["`]/(?:v1|api|metrics)""", SCRIPT[0])
    assert "new URL(path, home)" in SCRIPT[0]


def test_the_key_goes_into_a_header_and_into_this_tab_only() -> None:
    assert "authorization: `Bearer ${used}`" in SCRIPT[0]
    assert re.findall(r'kept\("(\w+)"\)\.bitrouterKey', SCRIPT[0]) == ["sessionStorage"] * 2
    assert re.search(r'<input id="gate-key" type="password" autocomplete="off"', PAGE)
    assert '$("gate-key").value = ""' in SCRIPT[0]


def test_an_unknown_cost_is_never_zero() -> None:
    assert 'if (lacks(usd)) return "unknown";' in SCRIPT[0]
    assert not re.search(r"money\([^)]*(?:\|\||\?\?) ?0", SCRIPT[0])


def test_the_log_in_the_page_is_bounded() -> None:
    assert "MOST_ROWS = 200" in SCRIPT[0]
    assert "splice(MOST_ROWS)" in SCRIPT[0]


def test_a_hidden_page_asks_for_nothing() -> None:
    assert "document.hidden ? sleep() : wake()" in SCRIPT[0]


@pytest.mark.parametrize(
    "name",
    [
        *(f"{family} {way}" for family in ("OpenAI", "Anthropic", "Google")
          for way in ("Python", "Node", "curl")),
        "Claude Code", "Codex", "Gemini CLI", "opencode",
    ],
)  # fmt: skip
def test_there_is_a_snippet_for(name: str) -> None:
    snippets = SCRIPT[0][SCRIPT[0].index("const SNIPPETS") :]
    parts = re.split(r'\["([A-Z][\w ]+|opencode)",\s*`', snippets)
    text = parts[parts.index(name) + 1].partition("`")[0]
    assert "BASE" in text
    assert "YOUR_KEY" in text
    assert re.search("MODEL|PATH", text)
