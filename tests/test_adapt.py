"""Prompts as their targets can take them, and what is undone in the answer."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from bitrouter import (
    CODECS,
    WEB_SEARCH,
    ApiProtocol,
    BadRequest,
    Choice,
    Close,
    Content,
    Delta,
    Finish,
    Finished,
    Gatherer,
    Loss,
    Losses,
    Media,
    Message,
    Native,
    Opaque,
    Open,
    OutputFormat,
    Prompt,
    Reasoning,
    Sampling,
    StreamPart,
    Text,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Traits,
    Undo,
    Undoing,
    UpstreamUnfit,
    Voice,
    adapt,
    json_in,
    parts_of,
)

CC, RE, ME, GC = ApiProtocol
OFFICIAL = {
    CC: Traits("chat:openai", official=True, custom_tools=True),
    RE: Traits("openai", official=True, custom_tools=True),
    ME: Traits("anthropic", official=True, thinking="adaptive"),
    GC: Traits("google", official=True, thinking="level"),
}
USER = Message("user", (Text("Hi"),))
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
F, G = Tool("f", "Does f.", SCHEMA), Tool("g", "Does g.", SCHEMA)


def a_prompt(*messages: Message, **fields: Any) -> Prompt:
    return Prompt("m", messages or (USER,), **fields)


def adapted(
    prompt: Prompt, protocol: ApiProtocol, traits: Traits | None = None, **more: Any
) -> tuple[Prompt, Undo, list[Loss]]:
    """A prompt as a target can take it; more: what is special about the target."""
    losses = Losses()
    traits = (traits or OFFICIAL[protocol])._replace(**more)
    return *adapt(prompt, protocol, traits, losses), losses.found


def undone(undo: Undo, parts: Iterable[StreamPart]) -> list[Choice]:
    """An answer as the caller sees it."""
    undoing, gatherer = Undoing(undo, "seed"), Gatherer()
    for part in parts:
        for seen in undoing.feed(part):
            gatherer.add(seen)
    return gatherer.choices()


def said(*pieces: str) -> list[StreamPart]:
    """A text that came in pieces, and the end of the answer."""
    grown = [Delta(1, piece) for piece in pieces]
    return [Open(1, Text()), *grown, Close(1), Finished(Finish.STOP)]


def called(name: str, *pieces: str) -> list[StreamPart]:
    """A call whose arguments came in pieces, and the end of the answer."""
    grown = [Delta(1, piece) for piece in pieces]
    return [Open(1, ToolCall("c1", name)), *grown, Close(1), Finished(Finish.TOOL_CALLS)]


def cuts(text: str) -> list[list[str]]:
    """A text cut in two everywhere, and into its characters."""
    return [[text[:n], text[n:]] for n in range(len(text) + 1)] + [list(text)]


# Fields.

# What becomes of a field in Chat, Responses, Messages and Gemini: `-` it is sent, W dropped with
# a warning, s without one.
FIELDS = [
    ("seed", {"sampling": Sampling(seed=7)}, "-WW-"),
    ("presence_penalty", {"sampling": Sampling(presence_penalty=0.5)}, "-WW-"),
    ("frequency_penalty", {"sampling": Sampling(frequency_penalty=0.5)}, "-WW-"),
    ("logit_bias", {"sampling": Sampling(logit_bias={"1": 2})}, "-WWW"),
    ("logprobs", {"sampling": Sampling(logprobs=0)}, "--W-"),
    ("top_k", {"sampling": Sampling(top_k=7)}, "WW--"),
    ("top_p", {"sampling": Sampling(top_p=0.5)}, "----"),
    ("verbosity", {"verbosity": "low"}, "--WW"),
    ("metadata", {"metadata": {"a": "b"}}, "--WW"),
    ("parallel_tool_calls", {"parallel_tools": False, "tools": (F,)}, "---W"),
    ("prompt_cache_key", {"cache_key": "k"}, "--ss"),
    ("cache_control", {"cache": "5m"}, "ss-s"),
    ("user", {"user": "u"}, "---s"),
    ("store", {"store": True}, "--ss"),
]


@pytest.mark.parametrize("protocol", ApiProtocol)
@pytest.mark.parametrize(("name", "fields", "fates"), FIELDS)
def test_a_field_is_sent_or_dropped(
    name: str, fields: dict[str, Any], fates: str, protocol: ApiProtocol
) -> None:
    wanted = fates[[*ApiProtocol].index(protocol)]
    prompt, _, losses = adapted(a_prompt(**fields), protocol)
    key, value = next(iter(fields.items()))
    cleared = Sampling() if key == "sampling" else "" if isinstance(value, str) else None
    assert getattr(prompt, key) == (value if wanted == "-" else cleared)
    assert losses == ([Loss("dropped", name)] if wanted == "W" else [])


def test_calls_at_will_are_no_loss_where_they_cannot_be_asked_for() -> None:
    assert adapted(a_prompt(parallel_tools=True, tools=(F,)), GC)[2] == []


EXTRAS = [
    # a field without a neutral form            its loss; None if it is refused
    ({"foo": {"a": 1}}, ["foo"]),
    ({"x\r\ny": 1}, ["x  y"]),
    ({"prediction": {"type": "content"}, "truncation": "auto"}, ["prediction", "truncation"]),
    ({"safetySettings": []}, []),
    ({"safety_settings": [1]}, ["safety_settings"]),
    ({"stream_options": {"include_obfuscation": False}}, []),
    ({"speechConfig": {"languageCode": "de"}}, None),
    ({"background": True}, None),
    ({"conversation": "conv_1"}, None),
    ({"prompt": {"id": "p"}}, None),
    ({"cachedContent": "cachedContents/1"}, None),
    ({"cached_content": "cachedContents/1"}, None),
    ({"container": "c"}, None),
    ({"mcp_servers": [{"name": "x"}]}, None),
]


DRAWN = {"makes": ("text", "image")}
ALOUD = {"makes": ("text", "audio"), "voice": Voice("alloy", "wav")}
KORE = {"makes": ("audio",), "voice": Voice("Kore")}
KINDS = [
    # from, what it asks for                  to   what is asked of the target       losses
    (CC, DRAWN, CC, ("text", "image"), None, []),
    (CC, DRAWN, GC, ("text", "image"), None, []),
    (GC, {"makes": ("image",)}, CC, ("text", "image"), None, []),
    (GC, DRAWN, ME, (), None, ["responseModalities"]),
    (CC, DRAWN, ME, (), None, ["modalities"]),
    (CC, {"makes": ("smell",)}, GC, (), None, ["modalities"]),
    (CC, ALOUD, CC, ("text", "audio"), Voice("alloy", "wav"), []),
    (CC, ALOUD, GC, ("audio",), Voice("", "wav"), ["audio.voice"]),
    (CC, {**ALOUD, "voice": Voice("Puck", "pcm16"), "stream": True}, GC, ("audio",),
     Voice("Puck", "pcm16"), []),
    (GC, KORE, CC, ("text", "audio"), Voice("", "pcm16"), ["speechConfig"]),
    (GC, {"makes": ("audio",)}, CC, ("text", "audio"), Voice("", "pcm16"), []),
]  # fmt: skip


@pytest.mark.parametrize(("source", "fields", "protocol", "makes", "voice", "wanted"), KINDS)
def test_pictures_and_speech_are_asked_for_in_the_target_s_way(
    source: ApiProtocol,
    fields: dict[str, Any],
    protocol: ApiProtocol,
    makes: tuple[str, ...],
    voice: Voice | None,
    wanted: list[str],
) -> None:
    prompt, _, losses = adapted(a_prompt(source=source, **fields), protocol)
    assert (prompt.makes, prompt.voice) == (makes, voice)
    assert losses == [Loss("dropped", name) for name in wanted]


def test_responses_is_asked_for_pictures_by_its_tool() -> None:
    prompt, _, losses = adapted(a_prompt(source=CC, tools=(F,), **DRAWN), RE)
    assert [tool.name for tool in prompt.tools] == ["f", "image_generation"]
    assert prompt.makes == () and losses == []


def test_the_tool_for_pictures_becomes_an_answer_of_pictures_only_where_the_model_draws() -> None:
    native = Native(RE, {"type": "image_generation"})
    tool = Tool("image_generation", kind="hosted", native=native)
    asked = a_prompt(source=RE, tools=(F, tool))
    for protocol in (CC, GC):
        prompt, _, losses = adapted(asked, protocol, Traits(draws=True))
        assert (prompt.makes, prompt.tools, losses) == (("text", "image"), (F,), [])
        prompt, _, losses = adapted(asked, protocol)
        assert (prompt.makes, prompt.tools) == ((), (F,))
        assert losses == [Loss("dropped", "tools.image_generation")]


@pytest.mark.parametrize(
    ("fields", "protocol", "field"),
    [
        (ALOUD, RE, "modalities"),
        (ALOUD, ME, "modalities"),
        ({**ALOUD, "voice": Voice("alloy", "mp3")}, GC, "audio.format"),
        ({**ALOUD, "stream": True}, GC, "audio.format"),
    ],
)
def test_speech_that_cannot_be_had_is_refused(
    fields: dict[str, Any], protocol: ApiProtocol, field: str
) -> None:
    with pytest.raises(UpstreamUnfit) as refused:
        adapted(a_prompt(source=CC, **fields), protocol)
    assert refused.value.param == field


def marks(prompt: Prompt) -> list[str]:
    found = [part for message in prompt.messages for part in message.content]
    return [getattr(part, "cache", "") for part in found]


def test_cache_marks_travel_to_openai_models_that_take_them() -> None:
    said = (
        Message("system", (Text("s", cache="1h"),)),
        Message("user", (Text("a", cache="5m"),)),
        Message("assistant", (Text("b", cache="5m"), ToolCall("c1", "f", "{}"))),
        Message("user", (ToolResult("c1", (Text("r", cache="5m"),), name="f"), Text("x"))),
    )
    asked = a_prompt(*said, tools=(F._replace(cache="5m"),), source=ME, user="u")
    for protocol in (CC, RE):
        prompt, _, losses = adapted(asked, protocol, Traits(breakpoints=True))
        assert marks(prompt) == ["1h", "5m", "", "", "5m", ""]
        assert (prompt.tools[0].cache, prompt.cache_key, losses) == ("", "u", [])
        prompt, _, losses = adapted(asked, protocol)
        assert (marks(prompt), prompt.cache_key, losses) == ([""] * 6, "", [])
    many = tuple(Message("user", (Text(str(n), cache="5m"),)) for n in range(6))
    prompt, _, losses = adapted(a_prompt(*many), CC, Traits(breakpoints=True))
    assert marks(prompt) == ["", "", "5m", "5m", "5m", "5m"]
    assert losses == [Loss("dropped", "cache_control", harmful=False)]


@pytest.mark.parametrize(("extra", "wanted"), EXTRAS)
def test_a_field_without_a_neutral_form_is_judged_by_its_name(
    extra: dict[str, Any], wanted: list[str] | None
) -> None:
    prompt = a_prompt(extra=extra, source=CC)
    if wanted is None:
        with pytest.raises(UpstreamUnfit) as refused:
            adapted(prompt, ME)
        assert refused.value.code == "unsupported_parameter"
        assert refused.value.param in extra
    else:
        assert adapted(prompt, ME)[2] == [Loss("dropped", name) for name in wanted]


@pytest.mark.parametrize("extra", [{"background": False}, {"mcp_servers": []}, {"container": {}}])
def test_a_field_that_asks_for_nothing_is_no_loss(extra: dict[str, Any]) -> None:
    assert adapted(a_prompt(extra=extra, source=RE), ME)[2] == []


def test_a_field_without_a_neutral_form_stays_in_its_own_protocol() -> None:
    extra = {"background": True, "foo": 1}
    prompt, _, losses = adapted(a_prompt(extra=extra, source=RE), RE)
    assert (prompt.extra, losses) == (extra, [])


# Sampling.

LIMITS = [
    # sampling                              where, and what is special there  what is sent, told
    (Sampling(temperature=0.5), ME, {}, Sampling(temperature=0.5), []),
    (Sampling(temperature=1.7), ME, {}, Sampling(temperature=1.0), [("clamped", "temperature")]),
    (Sampling(temperature=1.7), CC, {}, Sampling(temperature=1.7), []),
    (Sampling(temperature=1.7), GC, {}, Sampling(temperature=1.7), []),
    (Sampling(temperature=1), ME, {"sampling": False}, Sampling(), []),
    (Sampling(temperature=0), CC, {"sampling": False}, Sampling(), [("dropped", "temperature")]),
    (Sampling(temperature=1.7), ME, {"sampling": False}, Sampling(), [("dropped", "temperature")]),
    (Sampling(top_p=0.5, top_k=7), ME, {}, Sampling(top_p=0.5, top_k=7), []),
    (
        Sampling(top_p=0.5, top_k=7),
        ME,
        {"sampling": False},
        Sampling(),
        [("dropped", "top_p"), ("dropped", "top_k")],
    ),
]


@pytest.mark.parametrize(("sampling", "protocol", "traits", "wanted", "told"), LIMITS)
def test_sampling_keeps_to_what_a_model_takes(
    sampling: Sampling, protocol: ApiProtocol, traits: Any, wanted: Sampling, told: Any
) -> None:
    prompt, _, losses = adapted(a_prompt(sampling=sampling), protocol, **traits)
    assert prompt.sampling == wanted
    assert losses == [Loss(*one) for one in told]


# State and files.


def signed(vendor: str) -> Opaque:
    return Opaque(vendor, "signature", "c2ln")


STATES = [
    # what the assistant said                               what Claude gets, what is told
    (Reasoning("Hm.", signed("anthropic")), Reasoning("Hm.", signed("anthropic")), 0),
    (Reasoning("", signed("anthropic")), Reasoning("", signed("anthropic")), 0),
    (Reasoning("Hm.", signed("openai")), Reasoning("Hm."), 1),
    (Reasoning("", signed("openai")), None, 1),
    (Reasoning("Hm."), Reasoning("Hm."), 0),
    (Reasoning("Hm.", Opaque("", "none", "")), Reasoning("Hm."), 0),
    (
        ToolCall("c", "f", opaque=signed("anthropic")),
        ToolCall("c", "f", opaque=signed("anthropic")),
        0,
    ),
    (ToolCall("c", "f", opaque=signed("google")), ToolCall("c", "f"), 1),
]


@pytest.mark.parametrize(("part", "wanted", "told"), STATES)
def test_state_is_for_who_minted_it(part: Content, wanted: Content | None, told: int) -> None:
    prompt, _, losses = adapted(a_prompt(USER, Message("assistant", (part,))), ME)
    kept = [message.content for message in prompt.messages[1:]]
    assert kept == ([] if wanted is None else [(wanted,)])
    assert losses == [Loss("withheld", "reasoning", harmful=False)] * told


def a_file(vendor: str) -> Media:
    return Media("document", file_id="file-1", vendor=vendor)


FILES = [
    # whose file       for whom                   taken
    ("openai", CC, {}, True),
    ("openai", RE, {}, True),
    ("openai", CC, {"official": False, "vendor": "chat:local"}, False),
    ("openai", RE, {"official": False, "vendor": "xai"}, False),
    ("anthropic", ME, {}, True),
    ("anthropic", CC, {}, False),
    ("anthropic", GC, {}, False),
    ("google", GC, {}, True),
    ("google", RE, {}, False),
    ("openai", ME, {}, False),
    ("openai", GC, {}, False),
]


@pytest.mark.parametrize("within", [False, True], ids=["said", "in a result"])
@pytest.mark.parametrize(("vendor", "protocol", "traits", "taken"), FILES)
def test_a_file_s_id_is_for_who_has_the_file(
    vendor: str, protocol: ApiProtocol, traits: Any, taken: bool, within: bool
) -> None:
    part = ToolResult("c", (a_file(vendor),)) if within else a_file(vendor)
    prompt = a_prompt(Message("user", (part,)))
    if taken:
        assert adapted(prompt, protocol, **traits)[0].messages == prompt.messages
    else:
        with pytest.raises(UpstreamUnfit, match=f"only {vendor} has") as refused:
            adapted(prompt, protocol, **traits)
        assert refused.value.param == "file_id"


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_what_a_model_drew_goes_back_to_gemini_alone(protocol: ApiProtocol) -> None:
    drawn = Media("image", "image/png", "iVBORw==")
    prompt = a_prompt(USER, Message("assistant", (drawn,)), USER)
    told, _, losses = adapted(prompt, protocol)
    assert any(drawn in message.content for message in told.messages) == (protocol is GC)
    assert losses == ([] if protocol is GC else [Loss("dropped", "image")])
    assert all(message.content for message in told.messages)


# Tools whose input is text.

GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}
CUSTOM = Tool("patch", "Patches.", kind="custom", format=GRAMMAR)
SPOKEN = 'a "quoted" \\ line\n\tund größer\x07 {"input": "x"}'


def test_a_custom_tool_is_a_function_with_one_text_where_there_are_none() -> None:
    prompt, undo, losses = adapted(a_prompt(tools=(CUSTOM,)), ME)
    (tool,) = prompt.tools
    assert (tool.kind, tool.format) == ("function", None) and undo.custom == {"patch"}
    assert tool.schema is not None and tool.schema["required"] == ["input"]
    assert "start: /a+/" in tool.schema["properties"]["input"]["description"]
    assert losses == [Loss("grammar_not_enforced", "tools")]


def test_a_custom_tool_without_a_grammar_loses_nothing() -> None:
    assert adapted(a_prompt(tools=(CUSTOM._replace(format=None),)), ME)[2] == []


@pytest.mark.parametrize("protocol", [CC, RE])
def test_a_custom_tool_is_left_alone_where_there_are_some(protocol: ApiProtocol) -> None:
    prompt, undo, losses = adapted(a_prompt(tools=(CUSTOM,)), protocol)
    assert (prompt.tools, undo, losses) == ((CUSTOM,), Undo(), [])


def test_a_custom_call_in_the_history_is_a_function_s() -> None:
    call = ToolCall("c", "patch", SPOKEN, custom=True)
    result = ToolResult("c", (Text("ok"),), name="patch", custom=True)
    history = (USER, Message("assistant", (call,)), Message("user", (result,)))
    prompt, _, _ = adapted(a_prompt(*history, tools=(CUSTOM,)), ME)
    (there,), (back,) = prompt.messages[1].content, prompt.messages[2].content
    assert isinstance(there, ToolCall) and not there.custom
    assert json.loads(there.arguments) == {"input": SPOKEN}
    assert back == result._replace(custom=False)


SPELT = [
    json.dumps({"input": SPOKEN}),
    json.dumps({"input": SPOKEN}, ensure_ascii=False),
    '{ "input" :\n"' + json.dumps(SPOKEN)[1:-1] + '"\n}',
    json.dumps({"input": SPOKEN}) + " ",
]


@pytest.mark.parametrize("arguments", SPELT, ids=["ascii", "utf-8", "spaced", "trailing"])
def test_a_custom_call_is_text_again_wherever_its_arguments_are_cut(arguments: str) -> None:
    for pieces in cuts(arguments):
        (choice,) = undone(Undo(custom=frozenset({"patch"})), called("patch", *pieces))
        assert choice.content == (ToolCall("c1", "patch", SPOKEN, custom=True),)


def test_a_character_of_two_escapes_stays_one_wherever_it_is_cut() -> None:
    for pieces in cuts(r'{"input": "a \ud83e\udd86 b"}'):
        (choice,) = undone(Undo(custom=frozenset({"patch"})), called("patch", *pieces))
        assert choice.content == (ToolCall("c1", "patch", "a 🦆 b", custom=True),)


ODD_INPUTS = [
    # arguments that are no such object        the text that the caller gets
    ('{"text": "a"}', '{"text": "a"}'),
    ('{"why": 1, "input": "a"}', "a"),
    ('{"input": 7}', "7"),
    ("just words", "just words"),
    ('{"input": "cut o', "cut o"),
    ('{"input": ""}', ""),
    ("", ""),
]


@pytest.mark.parametrize(("arguments", "wanted"), ODD_INPUTS)
def test_odd_arguments_of_a_custom_call_are_told_as_they_are(arguments: str, wanted: str) -> None:
    for pieces in cuts(arguments):
        (choice,) = undone(Undo(custom=frozenset({"patch"})), called("patch", *pieces))
        assert [b.arguments for b in choice.content if isinstance(b, ToolCall)] == [wanted]


# Tools that a provider runs.

SEARCH = Tool(WEB_SEARCH, kind="hosted", native=Native(RE, {"type": "web_search"}))
RUNNER = Tool("code_interpreter", kind="hosted", native=Native(RE, {"type": "code_interpreter"}))
HOSTED = [
    # the tool    who is asked                                        taken
    (SEARCH, RE, {}, True),
    (SEARCH, ME, {}, True),
    (SEARCH, GC, {}, True),
    (SEARCH, CC, {}, False),
    (SEARCH, ME, {"vendor": "minimax"}, False),
    (RUNNER, RE, {}, True),
    (RUNNER, ME, {}, False),
    (RUNNER, GC, {}, False),
    (RUNNER, CC, {}, False),
]


@pytest.mark.parametrize(("tool", "protocol", "traits", "taken"), HOSTED)
def test_a_hosted_tool_is_for_who_hosts_it(
    tool: Tool, protocol: ApiProtocol, traits: Any, taken: bool
) -> None:
    prompt, _, losses = adapted(a_prompt(tools=(tool, F)), protocol, **traits)
    assert prompt.tools == ((tool, F) if taken else (F,))
    assert losses == ([] if taken else [Loss("dropped", f"tools.{tool.name}")])


def test_a_hosted_tool_that_must_be_used_is_refused_where_it_is_not() -> None:
    choice = ToolChoice("named", ("code_interpreter",))
    with pytest.raises(UpstreamUnfit, match="code_interpreter") as refused:
        adapted(a_prompt(tools=(RUNNER,), tool_choice=choice), ME)
    assert refused.value.param == "tools"


def test_a_part_that_only_its_own_protocol_can_say_stays_there() -> None:
    searched = Native(RE, {"type": "web_search_call", "id": "ws_1"})
    prompt = a_prompt(USER, Message("assistant", (searched, Text("So."))), USER)
    assert adapted(prompt, RE)[0].messages == prompt.messages
    there, _, losses = adapted(prompt, ME)
    assert there.messages[1].content == (Text("So."),)
    assert losses == [Loss("dropped", "web_search_call")]


# Names of tools.

LONG = "a_tool_with_a_name_that_says_all_there_is_to_know_about_it_and_then_some_more"
NAMED = [
    # namespace and name               where  the name that goes out, or how it begins
    ("", "weather", CC, "weather"),
    ("", "ns.tool:x", CC, "ns_tool_x"),
    ("", "ns.tool:x", GC, "ns.tool:x"),
    ("", "größe", ME, "gr__e"),
    ("", "1st", ME, "1st"),
    ("", "1st", GC, "t_1st_"),
    ("", LONG, RE, LONG[:50] + "_"),
    ("", LONG, ME, LONG),
    ("mcp", "search", RE, "mcp__search"),
    ("mcp.x", "search", ME, "mcp_x__search"),
    ("", "天気", CC, "__"),
]


@pytest.mark.parametrize(("space", "name", "protocol", "wanted"), NAMED)
def test_a_tool_goes_out_under_a_legal_name_and_comes_back_under_its_own(
    space: str, name: str, protocol: ApiProtocol, wanted: str
) -> None:
    tool = Tool(name, namespace=space)
    prompt, undo, _ = adapted(a_prompt(tools=(tool,)), protocol)
    out = prompt.tools[0].name
    assert out.startswith(wanted) and CODECS[protocol].names.fullmatch(out)
    assert prompt.tools[0].namespace == ""
    (choice,) = undone(undo, called(out, "{}"))
    assert choice.content == (ToolCall("c1", name, "{}", namespace=space),)


@pytest.mark.parametrize("protocol", ApiProtocol)
@pytest.mark.parametrize("seed", range(20))
def test_any_names_go_out_legal_and_distinct(seed: int, protocol: ApiProtocol) -> None:
    rng = random.Random(seed)
    names = {
        "".join(rng.choices("ab_.-: ä1", k=rng.choice((1, 2, 3, 64, 65, 200)))) for _ in range(30)
    }
    tools = tuple(Tool(n, namespace=rng.choice(("", "", "a", "a_"))) for n in sorted(names))
    prompt, undo, _ = adapted(a_prompt(tools=tools), protocol)
    out = [tool.name for tool in prompt.tools]
    assert len(set(out)) == len(tools)
    assert all(CODECS[protocol].names.fullmatch(name) for name in out)
    back = [undo.names.get(name, ("", name)) for name in out]
    assert back == [(tool.namespace, tool.name) for tool in tools]


def test_a_name_gives_way_to_one_that_is_legal_already() -> None:
    prompt, undo, _ = adapted(a_prompt(tools=(Tool("a.b"), Tool("a_b"))), CC)
    first, second = (tool.name for tool in prompt.tools)
    assert second == "a_b" and first.startswith("a_b_")
    assert undo.names == {first: ("", "a.b")}


def test_a_name_goes_out_the_same_in_history_choice_and_results() -> None:
    history = (
        USER,
        Message("assistant", (ToolCall("c", "a.b"),)),
        Message("user", (ToolResult("c", (Text("ok"),), name="a.b"),)),
    )
    choice = ToolChoice("named", ("a.b",))
    prompt, _, _ = adapted(a_prompt(*history, tools=(Tool("a.b"),), tool_choice=choice), CC)
    call, result = prompt.messages[1].content[0], prompt.messages[2].content[0]
    assert isinstance(call, ToolCall) and isinstance(result, ToolResult)
    assert {call.name, result.name, prompt.tools[0].name} == {"a_b"}
    assert prompt.tool_choice == ToolChoice("named", ("a_b",))


def test_a_tool_of_the_history_that_is_not_on_offer_has_a_legal_name_too() -> None:
    prompt, _, _ = adapted(a_prompt(USER, Message("assistant", (ToolCall("c", "a.b"),)), USER), CC)
    (call,) = prompt.messages[1].content
    assert isinstance(call, ToolCall) and call.name == "a_b"


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_two_tools_of_one_name_are_nobody_s(protocol: ApiProtocol) -> None:
    with pytest.raises(BadRequest, match='two tools are called "f"') as refused:
        adapted(a_prompt(tools=(F, G, F)), protocol)
    assert refused.value.param == "tools"


def test_a_function_that_is_called_like_a_hosted_tool_is_told_from_it() -> None:
    """Messages names both in one list."""
    prompt, _, _ = adapted(a_prompt(tools=(SEARCH, Tool(WEB_SEARCH))), ME)
    assert len({tool.name for tool in prompt.tools}) == 2


def test_two_tools_of_one_name_in_two_namespaces_are_two() -> None:
    tools = (Tool("f", namespace="a"), Tool("f", namespace="b"), F)
    prompt, _, _ = adapted(a_prompt(tools=tools), RE)
    assert [tool.name for tool in prompt.tools] == ["a__f", "b__f", "f"]


# What must be called.

ONLY_F = ToolChoice("allowed", ("f",))
MUST_F = ToolChoice("allowed", ("f",), must=True)
CHOICES = [
    # choice                  where, and what is special there   tools, choice, what is told
    (ToolChoice("auto"), ME, {}, "fg", ToolChoice("auto"), ""),
    (ToolChoice("required"), ME, {}, "fg", ToolChoice("required"), ""),
    (ToolChoice("none"), ME, {"forced_tools": False}, "fg", ToolChoice("none"), ""),
    (ToolChoice("required"), ME, {"forced_tools": False}, "fg", ToolChoice("auto"), "forced"),
    (ToolChoice("named", ("f",)), ME, {"forced_tools": False}, "fg", ToolChoice("auto"), "forced"),
    (ONLY_F, CC, {}, "fg", ONLY_F, ""),
    (ONLY_F, RE, {}, "fg", ONLY_F, ""),
    (ONLY_F, CC, {"official": False}, "f", ToolChoice("auto"), "filtered"),
    (ONLY_F, ME, {}, "f", ToolChoice("auto"), "filtered"),
    (MUST_F, ME, {}, "f", ToolChoice("required"), "filtered"),
    (MUST_F, ME, {"forced_tools": False}, "f", ToolChoice("auto"), "filtered forced"),
    (ONLY_F, GC, {}, "f", ToolChoice("auto"), "filtered"),
    (MUST_F, GC, {}, "fg", MUST_F, ""),
]
TOLD = {
    "forced": Loss("forced_tool_choice_unsupported", "tool_choice"),
    "filtered": Loss("tools_filtered", "tool_choice", harmful=False),
}


@pytest.mark.parametrize(("choice", "protocol", "traits", "tools", "wanted", "told"), CHOICES)
def test_a_choice_of_tools_is_one_that_the_target_has(
    choice: ToolChoice,
    protocol: ApiProtocol,
    traits: Any,
    tools: str,
    wanted: ToolChoice,
    told: str,
) -> None:
    prompt, _, losses = adapted(a_prompt(tools=(F, G), tool_choice=choice), protocol, **traits)
    assert "".join(tool.name for tool in prompt.tools) == tools
    assert prompt.tool_choice == wanted
    assert losses == [TOLD[word] for word in told.split()]


def test_a_choice_among_no_tools_is_none() -> None:
    assert adapted(a_prompt(tool_choice=ToolChoice("required")), CC)[0].tool_choice is None


def test_a_choice_among_tools_with_new_names_finds_them() -> None:
    tools, choice = (Tool("a.b"), G), ToolChoice("allowed", ("a.b",))
    prompt, _, _ = adapted(a_prompt(tools=tools, tool_choice=choice), ME)
    assert [tool.name for tool in prompt.tools] == ["a_b"]


# Structured output.

RECURSIVE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": []}
LIST = {"type": "array", "items": {"$ref": "#/$defs/item"}, "$defs": {"item": {"type": "string"}}}


def a_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"output": OutputFormat("json_schema", schema=schema)}


def test_claude_gets_a_schema_in_its_own_dialect() -> None:
    schema = {**SCHEMA, "properties": {"a": {"type": "string", "maxLength": 3}}}
    prompt, undo, losses = adapted(a_prompt(**a_format(schema)), ME)
    assert prompt.output is not None and prompt.output.schema is not None
    assert prompt.output.schema["properties"]["a"] == {
        "type": "string",
        "description": "maxLength: 3",
    }
    assert (undo, losses) == (Undo(), [])


def test_a_schema_is_left_alone_where_any_will_do() -> None:
    prompt, undo, losses = adapted(a_prompt(**a_format(RECURSIVE)), RE)
    assert prompt.output == OutputFormat("json_schema", schema=RECURSIVE)
    assert (undo, losses) == (Undo(), [])


def test_a_schema_that_claude_cannot_have_is_a_tool_that_it_must_call() -> None:
    prompt, undo, losses = adapted(a_prompt(**a_format(RECURSIVE)), ME)
    assert [(t.name, t.schema) for t in prompt.tools] == [("json_output", RECURSIVE)]
    assert prompt.tool_choice == ToolChoice("named", ("json_output",))
    assert (prompt.output, undo) == (None, Undo(answer_tool="json_output"))
    assert losses == [Loss("schema_emulated", "response_format", harmful=False)]


def test_beside_other_tools_the_answer_is_one_more_of_them() -> None:
    prompt, _, _ = adapted(a_prompt(tools=(F,), **a_format(SCHEMA)), ME, schema="tool")
    assert [tool.name for tool in prompt.tools] == ["f", "json_output"]
    assert prompt.tool_choice == ToolChoice("required")
    assert prompt.messages[0].role == "system" and "json_output" in str(prompt.messages[0])


WRAPPED = [
    # schema                           whether its value is wrapped in an object
    (SCHEMA, False),
    (LIST, True),
    ({"type": "string"}, True),
    ({"anyOf": [SCHEMA, {"type": "null"}]}, True),
    ({"type": "object", "oneOf": [SCHEMA]}, True),
    ({}, True),
]


@pytest.mark.parametrize(("schema", "wrapped"), WRAPPED)
def test_a_schema_whose_root_is_no_object_is_wrapped(schema: Any, wrapped: bool) -> None:
    before = copy.deepcopy(schema)
    prompt, undo, _ = adapted(a_prompt(**a_format(schema)), ME, schema="tool")
    given = prompt.tools[0].schema
    assert given is not None and given["type"] == "object"
    assert (undo.wrapped, "value" in given.get("properties", {})) == (wrapped, wrapped)
    assert given.get("$defs") == schema.get("$defs")
    assert schema == before


def test_the_input_of_the_answer_s_tool_is_the_answer() -> None:
    undo = Undo(answer_tool="json_output")
    for pieces in cuts('{"a": "größer"}'):
        (choice,) = undone(undo, called("json_output", *pieces))
        assert choice.content == (Text('{"a": "größer"}'),)
        assert choice.finished.finish is Finish.STOP


def test_an_answer_s_tool_that_is_called_with_nothing_answers_an_empty_object() -> None:
    (choice,) = undone(Undo(answer_tool="json_output"), called("json_output"))
    assert choice.content == (Text("{}"),)


def test_a_wrapped_answer_is_unwrapped_wherever_it_is_cut() -> None:
    undo = Undo(answer_tool="json_output", wrapped=True)
    for pieces in cuts('{"value": [1, "ü"]}'):
        (choice,) = undone(undo, called("json_output", *pieces))
        assert choice.content == (Text('[1, "ü"]'),)


ANSWERED = [
    # what the model did                               what the caller gets: texts, calls, finish
    (["json_output"], ["{}"], [], Finish.STOP),
    (["f"], [], ["f"], Finish.TOOL_CALLS),
    (["So be it.", "json_output"], ["{}"], [], Finish.STOP),
    (["So be it."], ["So be it."], [], Finish.STOP),
    (["So be it.", "f"], ["So be it."], ["f"], Finish.TOOL_CALLS),
]


@pytest.mark.parametrize(("blocks", "texts", "calls", "finish"), ANSWERED)
def test_words_around_an_answer_count_only_if_there_is_none(
    blocks: list[str], texts: list[str], calls: list[str], finish: Finish
) -> None:
    parts: list[StreamPart] = []
    for n, name in enumerate(blocks):
        block = Text(name) if " " in name else ToolCall(f"c{n}", name, "{}")
        parts += parts_of(block, n)
    end = Finished(Finish.TOOL_CALLS if len(blocks[-1]) < 12 else Finish.STOP)
    (choice,) = undone(Undo(answer_tool="json_output"), [*parts, end])
    assert sorted(b.text for b in choice.content if isinstance(b, Text)) == texts
    assert [b.name for b in choice.content if isinstance(b, ToolCall)] == calls
    assert choice.finished.finish is finish


def test_each_choice_has_an_answer_or_words_of_its_own() -> None:
    first = [*parts_of(ToolCall("c", "json_output", "{}"), 0), Finished(Finish.TOOL_CALLS)]
    second = [*parts_of(Text("No."), 1, 1), Finished(Finish.STOP, 1)]
    choices = undone(Undo(answer_tool="json_output"), [*first, *second])
    assert [choice.content for choice in choices] == [(Text("{}"),), (Text("No."),)]


def test_the_answer_s_tool_is_told_from_a_tool_of_the_caller_s() -> None:
    tools = (F._replace(name="json_output"),)
    prompt, undo, _ = adapted(a_prompt(tools=tools, **a_format(SCHEMA)), ME, schema="tool")
    assert len({tool.name for tool in prompt.tools}) == 2
    assert prompt.tools[1].name == undo.answer_tool


def test_where_nothing_else_works_a_schema_is_put_in_words() -> None:
    for traits in ({"schema": "prompt"}, {"schema": "tool", "forced_tools": False}):
        prompt, undo, losses = adapted(a_prompt(**a_format(SCHEMA)), ME, **traits)
        assert (prompt.output, prompt.tools, undo) == (None, (), Undo(json_only=True))
        system = prompt.messages[0].content[0]
        assert isinstance(system, Text) and json.dumps(SCHEMA) in system.text
        assert losses == [Loss("schema_not_enforced", "response_format")]


def test_an_instruction_of_ours_stands_behind_the_caller_s_system_prompt() -> None:
    system = Message("system", (Text("Be kind."),))
    prompt, _, _ = adapted(a_prompt(system, USER, **a_format(SCHEMA)), ME, schema="prompt")
    assert prompt.messages[0].content[0] == Text("Be kind.")
    assert [message.role for message in prompt.messages] == ["system", "user"]


def test_an_older_gemini_has_no_json_mode_beside_functions() -> None:
    asked = a_prompt(tools=(F,), **a_format(SCHEMA))
    prompt, undo, _ = adapted(asked, GC, call_ids=False)
    assert (prompt.output, undo.answer_tool) == (None, "json_output")
    assert adapted(asked, GC)[1] == Undo()
    assert adapted(a_prompt(**a_format(SCHEMA)), GC, call_ids=False)[1] == Undo()


FENCED = [
    # what the model wrote                              the JSON in it
    ('{"a": 1}', '{"a": 1}'),
    ('```json\n{"a": 1}\n```', '{"a": 1}'),
    ('Here you are:\n```\n[1, {"b": "```"}]\n```\nBye.', '[1, {"b": "```"}]'),
    ('{"a": 1} {"b": 2}', '{"a": 1}'),
    ('see [1, then {"a": 1}', '{"a": 1}'),
    ("no JSON at all", "no JSON at all"),
    ('{"a": ', '{"a": '),
    ("[" * 5000, "[" * 5000),
]


@pytest.mark.parametrize(("text", "wanted"), FENCED)
def test_json_is_found_in_what_stands_around_it(text: str, wanted: str) -> None:
    assert json_in(text) == wanted


def test_json_is_found_wherever_the_text_is_cut() -> None:
    for pieces in cuts('Sure:\n```json\n{"a": "ü"}\n```'):
        (choice,) = undone(Undo(json_only=True), said(*pieces))
        assert choice.content == (Text('{"a": "ü"}'),)


JSON_MODES = [
    # where, and what is special there       how it is seen to          what stands in the system
    (CC, {}, Undo(), "Answer with a JSON object."),
    (RE, {}, Undo(), "Answer with a JSON object."),
    (GC, {}, Undo(), ""),
    (ME, {}, Undo(json_only=True), "Answer with one JSON object"),
    (CC, {"schema": "prompt"}, Undo(json_only=True), "Answer with one JSON object"),
]


@pytest.mark.parametrize(("protocol", "traits", "wanted", "words"), JSON_MODES)
def test_json_mode_is_asked_for_in_the_target_s_way(
    protocol: ApiProtocol, traits: Any, wanted: Undo, words: str
) -> None:
    prompt, undo, losses = adapted(a_prompt(output=OutputFormat("json_object")), protocol, **traits)
    assert undo == wanted
    told = [Loss("json_emulated", "response_format", harmful=False)]
    assert losses == (told if wanted.json_only else [])
    assert words in str(prompt.messages[0].content) and (len(prompt.messages) > 1) == bool(words)


def test_who_speaks_of_json_need_not_be_told_to() -> None:
    message = Message("user", (Text("In JSON, please."),))
    prompt, _, _ = adapted(a_prompt(message, output=OutputFormat("json_object")), CC)
    assert prompt.messages == (message,)


def test_json_mode_leaves_an_answer_beside_tools_alone() -> None:
    undo = adapted(a_prompt(tools=(F,), output=OutputFormat("json_object")), ME)[1]
    assert undo == Undo()


# Conversations.


def a_talk(letters: str) -> tuple[Message, ...]:
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant"}
    return tuple(Message(roles[c], (Text(f"{c}{n}"),)) for n, c in enumerate(letters))


PLACES = [
    # who speaks   with a place in the middle   without: R is a reminder
    ("su", "su", "su"),
    ("sdu", "sdu", "sdu"),
    ("us", "us", "uR"),
    ("usa", "usa", "uRa"),
    ("usu", "uRu", "uRu"),
    ("uasu", "uaRu", "uaRu"),
    ("suasua", "suaRua", "suaRua"),
    ("ussa", "uRRa", "uRRa"),
]


SYSTEMS = [(CC, False), (RE, False), (ME, True), (ME, False), (GC, False)]


@pytest.mark.parametrize(("protocol", "inline"), SYSTEMS[2:])
@pytest.mark.parametrize(("letters", "placed", "reminded"), PLACES)
def test_a_later_system_message_stands_where_it_may_or_is_a_reminder(
    letters: str, placed: str, reminded: str, protocol: ApiProtocol, inline: bool
) -> None:
    prompt, _, losses = adapted(a_prompt(*a_talk(letters)), protocol, inline_system=inline)
    words = [part.text for m in prompt.messages for part in m.content if isinstance(part, Text)]
    found = "".join("R" if word.startswith("<system-reminder>\n") else word[0] for word in words)
    assert found == (placed if inline else reminded)
    assert bool(losses) == ("R" in found)


@pytest.mark.parametrize("protocol", [CC, RE])
def test_a_system_message_keeps_its_place_where_it_may_stand_anywhere(
    protocol: ApiProtocol,
) -> None:
    talk = a_talk("suasudua")
    assert adapted(a_prompt(*talk), protocol)[0].messages == talk


@pytest.mark.parametrize(("protocol", "inline"), SYSTEMS)
def test_what_was_said_is_sent_the_same_when_the_conversation_goes_on(
    protocol: ApiProtocol, inline: bool
) -> None:
    """Caches, and signatures of Claude's, are bound to what comes before."""
    call = Message("assistant", (ToolCall("x" * 90, "a.b", "{}"),))
    result = Message("user", (ToolResult("x" * 90, (Text("ok"),), name="a.b"),))
    talk = (*a_talk("suausausu"), call, result, *a_talk("asuasu"))
    whole = sent(talk, protocol, inline)
    for end in (n for n, message in enumerate(talk) if message.role == "assistant"):
        part = sent(talk[:end], protocol, inline)
        assert whole[: len(part)] == part


def sent(talk: tuple[Message, ...], protocol: ApiProtocol, inline: bool) -> Any:
    """The conversation in a request, a message to a turn."""
    prompt, _, _ = adapted(a_prompt(*talk), protocol, inline_system=inline)
    body = CODECS[protocol].render_request(prompt, OFFICIAL[protocol], Losses())
    return body[{RE: "input", GC: "contents"}.get(protocol, "messages")]


def results_of(prompt: Prompt) -> list[ToolResult]:
    return [p for m in prompt.messages for p in m.content if isinstance(p, ToolResult)]


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_a_call_that_was_never_answered_gets_a_result_where_it_must(protocol: ApiProtocol) -> None:
    calls = Message("assistant", (ToolCall("c1", "f"), ToolCall("c2", "g")))
    answer = Message("user", (ToolResult("c2", (Text("ok"),)), Text("Go on.")))
    prompt, _, losses = adapted(a_prompt(USER, calls, answer), protocol)
    found = [(r.call_id, r.is_error) for r in results_of(prompt)]
    must = protocol in (ME, GC)
    assert found == ([("c1", True), ("c2", False)] if must else [("c2", False)])
    assert losses == ([Loss("result_missing", "messages", harmful=False)] if must else [])


def test_a_call_that_is_still_to_be_answered_is_left_alone() -> None:
    calls = Message("assistant", (ToolCall("c1", "f"),))
    prompt, _, losses = adapted(a_prompt(USER, calls), ME)
    assert results_of(prompt) == [] and losses == []


IDS = [
    # a call's id        where, and what is special there        whether it goes out as it is
    ("call_1", CC, {}, True),
    ("x" * 64, RE, {}, True),
    ("x" * 65, RE, {}, False),
    ("functions.f:0", CC, {}, False),
    ("functions.f:0", ME, {}, False),
    ("functions.f:0", CC, {"official": False}, True),
    ("functions.f:0", GC, {}, True),
    ("größe", RE, {}, False),
]


@pytest.mark.parametrize(("ident", "protocol", "traits", "kept"), IDS)
def test_a_call_s_id_is_changed_on_both_sides_or_on_none(
    ident: str, protocol: ApiProtocol, traits: Any, kept: bool
) -> None:
    back = Message("user", (ToolResult(ident, (Text("ok"),)),))
    prompt, _, _ = adapted(
        a_prompt(USER, Message("assistant", (ToolCall(ident, "f"),)), back), protocol, **traits
    )
    (call,), (result,) = prompt.messages[1].content, prompt.messages[2].content
    assert isinstance(call, ToolCall) and isinstance(result, ToolResult)
    assert (call.id == result.call_id) and (call.id == ident) == kept
    assert len(call.id) <= 64 or kept


def test_two_long_ids_stay_two() -> None:
    calls = Message("assistant", (ToolCall("x" * 90 + "1", "f"), ToolCall("x" * 90 + "2", "f")))
    prompt, _, _ = adapted(a_prompt(USER, calls), RE)
    assert len({part.id for part in prompt.messages[1].content if isinstance(part, ToolCall)}) == 2


def test_who_must_not_begin_for_the_model_asks_it_to_go_on() -> None:
    talk = a_talk("ua")
    prompt, _, losses = adapted(a_prompt(*talk), ME, prefill=False)
    assert prompt.messages == (*talk, Message("user", (Text("Continue."),)))
    assert losses == [Loss("prefill_unsupported", "messages")]
    assert adapted(a_prompt(*talk), ME)[0].messages == talk


def test_the_last_four_cache_marks_count() -> None:
    marked = tuple(Message("user", (Text(f"t{n}", cache="5m"),)) for n in range(4))
    prompt, _, losses = adapted(a_prompt(*marked, tools=(F._replace(cache="5m"),)), ME)
    kept = [
        part.text
        for m in prompt.messages
        for part in m.content
        if isinstance(part, Text) and part.cache
    ]
    assert kept == ["t1", "t2", "t3"] and prompt.tools[0].cache == "5m"
    assert losses == [Loss("dropped", "cache_control", harmful=False)]


# Stop sequences.

STOPS = ("a", "b", "c", "d", "e", "f")
MOST = [
    (CC, {}, 4),
    (RE, {}, 0),
    (ME, {}, 6),
    (GC, {}, 5),
    (CC, {"stops": False}, 0),
]


@pytest.mark.parametrize(("protocol", "traits", "most"), MOST)
def test_what_a_target_takes_no_more_of_is_looked_for_by_us(
    protocol: ApiProtocol, traits: Any, most: int
) -> None:
    prompt, undo, losses = adapted(a_prompt(sampling=Sampling(stop=STOPS)), protocol, **traits)
    assert (prompt.sampling.stop, undo.stops, losses) == (STOPS[:most], STOPS[most:], [])


def test_claude_takes_no_blank_stop_sequence() -> None:
    prompt, undo, _ = adapted(a_prompt(sampling=Sampling(stop=("\n", "END", " "))), ME)
    assert (prompt.sampling.stop, undo.stops) == (("END",), ("\n", " "))


STOPPED = [
    # stop sequences      what the model says      what the caller gets, and what stopped it
    (("END",), "abcENDdef", "abc", "END"),
    (("END",), "END", "", "END"),
    (("END",), "ENEND", "EN", "END"),
    (("END",), "abcEN", "abcEN", None),
    (("aab",), "aaab!", "a", "aab"),
    (("cd", "bcde"), "abcdef", "ab", "cd"),
    (("bc", "b"), "abc", "a", "b"),
    (("🦆",), "eine 🦆 und", "eine ", "🦆"),
    (("\n\n",), "a\n b\n\nc", "a\n b", "\n\n"),
]


@pytest.mark.parametrize(("stops", "text", "wanted", "stop"), STOPPED)
def test_a_stop_sequence_ends_a_text_wherever_it_is_cut(
    stops: tuple[str, ...], text: str, wanted: str, stop: str | None
) -> None:
    for pieces in cuts(text):
        (choice,) = undone(Undo(stops=stops), said(*pieces))
        assert "".join(b.text for b in choice.content if isinstance(b, Text)) == wanted
        finish = Finish.STOP_SEQUENCE if stop else Finish.STOP
        assert (choice.finished.finish, choice.finished.stop_sequence) == (finish, stop)


def test_nothing_is_seen_after_a_stop_sequence() -> None:
    more = [*parts_of(Text("more"), 2), *parts_of(ToolCall("c", "f", "{}"), 3)]
    parts = [*said("abEND")[:-1], *more, Finished(Finish.TOOL_CALLS)]
    (choice,) = undone(Undo(stops=("END",)), parts)
    assert choice.content == (Text("ab"),)


def test_a_stop_sequence_ends_its_own_choice_alone() -> None:
    parts: list[StreamPart] = [Open(1, Text()), Open(2, Text(), 1), Delta(1, "aXb"), Delta(2, "cd")]
    parts += [Close(1), Close(2), Finished(Finish.STOP), Finished(Finish.STOP, 1)]
    first, second = undone(Undo(stops=("X",)), parts)
    assert (first.content, second.content) == ((Text("a"),), (Text("cd"),))
    assert second.finished.finish is Finish.STOP


def test_what_is_no_text_holds_no_stop_sequence() -> None:
    parts = [*parts_of(Reasoning("aXb"), 1), *parts_of(ToolCall("c", "f", '{"a":"X"}'), 2)]
    (choice,) = undone(Undo(stops=("X",)), [*parts, Finished(Finish.TOOL_CALLS)])
    assert choice.content == (Reasoning("aXb"), ToolCall("c", "f", '{"a":"X"}'))


# Answers.

FINISHES = [
    # whether a tool was called, what the provider says, what the caller gets
    (True, Finish.STOP, Finish.TOOL_CALLS),
    (True, Finish.STOP_SEQUENCE, Finish.TOOL_CALLS),
    (True, Finish.LENGTH, Finish.LENGTH),
    (True, Finish.CONTENT_FILTER, Finish.CONTENT_FILTER),
    (False, Finish.TOOL_CALLS, Finish.STOP),
    (False, Finish.LENGTH, Finish.LENGTH),
]


@pytest.mark.parametrize(("is_call", "finish", "wanted"), FINISHES)
def test_who_called_a_tool_stopped_for_it(is_call: bool, finish: Finish, wanted: Finish) -> None:
    parts = parts_of(ToolCall("c", "f", "{}") if is_call else Text("Hi"), 1)
    (choice,) = undone(Undo(), [*parts, Finished(finish, raw="raw")])
    assert choice.finished == Finished(wanted, raw="raw")


def test_calls_without_ids_get_some_of_their_own() -> None:
    calls = [part for n in (1, 2) for part in parts_of(ToolCall("", "f"), n)]
    (choice,) = undone(Undo(), [*calls, Finished(Finish.STOP)])
    ids = [block.id for block in choice.content if isinstance(block, ToolCall)]
    assert len(set(ids)) == 2 and all(ident.startswith("call_seed") for ident in ids)


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_a_prompt_is_adapted_without_being_changed(protocol: ApiProtocol) -> None:
    """Another target may be asked next, with the same prompt."""
    schema = {**LIST, "examples": [["a"]]}
    prompt = a_prompt(
        *a_talk("sus"),
        Message("assistant", (Reasoning("Hm.", signed("x")), ToolCall("é", "a.b", "{}"))),
        tools=(Tool("a.b", schema=schema), CUSTOM, SEARCH),
        tool_choice=ToolChoice("allowed", ("a.b",)),
        sampling=Sampling(stop=STOPS, temperature=1.5),
        extra={"foo": 1},
        **a_format(schema),
    )
    before = copy.deepcopy(prompt)
    first = adapted(prompt, protocol, schema="tool", prefill=False)
    assert prompt == before
    assert adapted(prompt, protocol, schema="tool", prefill=False) == first
