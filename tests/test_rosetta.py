"""What the protocols call the same thing: finishes, efforts, media, and state in envelopes."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest

from bitrouter import (
    CODECS,
    EFFORTS,
    ENVELOPE,
    AnswerLabel,
    ApiProtocol,
    BadRequest,
    BitrouterError,
    Block,
    Choice,
    Content,
    ErrorFacts,
    Finish,
    Finished,
    Gatherer,
    Losses,
    Media,
    Message,
    Native,
    Opaque,
    Prompt,
    Reasoning,
    Refusal,
    Text,
    Tool,
    ToolCall,
    ToolResult,
    Translation,
    Undo,
    UpstreamGarbled,
    Usage,
    count_in,
    effort_of,
    from_base64,
    joined_text,
    media_at,
    media_of_bytes,
    nearest_effort,
    number,
    object_in,
    opaque_from,
    parts_of,
    seal,
    sealed_for,
    size_of,
    sniff,
    standard_base64,
    strings_in,
    text_in,
    turns,
    typed,
    unseal,
    words_of,
)

CC, RE, ME, GC = ApiProtocol
LABEL = AnswerLabel("abc", 1_764_000_000, "m", 5)


def test_words_are_compared_in_lower_case_and_only_text_is_a_word() -> None:
    assert words_of("Rate_Limit", None, 429, ["x"], "CODE") == {"rate_limit", "code"}


# --- why a model stopped

# fmt: off
FINISHES = [
    # canonical              Chat              Responses            Messages         Google
    (Finish.STOP,            "stop",           "completed",         "end_turn",      "STOP"),
    (Finish.STOP_SEQUENCE,   "stop",           "completed",         "stop_sequence", "STOP"),
    (Finish.TOOL_CALLS,      "tool_calls",     "completed",         "tool_use",      "STOP"),
    (Finish.LENGTH,          "length",         "max_output_tokens", "max_tokens",    "MAX_TOKENS"),
    (Finish.CONTEXT_WINDOW,  "length",         "max_output_tokens",
     "model_context_window_exceeded", "MAX_TOKENS"),
    (Finish.CONTENT_FILTER,  "content_filter", "content_filter",    "refusal",       "SAFETY"),
    (Finish.REFUSAL,         "stop",           "completed",         "refusal",       "SAFETY"),
    (Finish.PAUSE,           "length",         "max_output_tokens", "pause_turn",    "OTHER"),
]
# fmt: on
FINISH_AT = {
    CC: lambda answer: answer["choices"][0]["finish_reason"],
    RE: lambda answer: (answer["incomplete_details"] or {"reason": answer["status"]})["reason"],
    ME: lambda answer: answer["stop_reason"],
    GC: lambda answer: answer["candidates"][0]["finishReason"],
}


def rendered(protocol: ApiProtocol, blocks: tuple[Block, ...], finished: Finished) -> Any:
    render = CODECS[protocol].render_response
    answer = render(Prompt("m", ()), LABEL, [Choice(blocks, finished)], Usage(5, 2), Losses())
    return json.loads(json.dumps(answer))


def encoded(protocol: ApiProtocol, blocks: tuple[Block, ...], finished: Finished) -> list[Any]:
    """The events of a stream."""
    encoder = CODECS[protocol].encoder(Prompt("m", ()), LABEL)
    parts = [part for key, block in enumerate(blocks) for part in parts_of(block, key)]
    raw = b"".join([*map(encoder.encode, parts), encoder.encode(finished), encoder.end(Usage())])
    lines = [line[6:] for line in raw.splitlines() if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("row", FINISHES, ids=lambda row: row[0])
@pytest.mark.parametrize("protocol", ApiProtocol)
def test_a_finish_is_written_in_each_protocol_s_own_word(protocol: ApiProtocol, row: Any) -> None:
    finish, *words = row
    answer = rendered(protocol, (Text("a"),), Finished(finish))
    assert FINISH_AT[protocol](answer) == words[list(ApiProtocol).index(protocol)]


def read_finish(protocol: ApiProtocol, answer: Any) -> Finished:
    gatherer = Gatherer()
    for part in CODECS[protocol].decoder("v").whole(answer):
        gatherer.add(part)
    return gatherer.choices()[0].finished


def finished_with(protocol: ApiProtocol, word: str) -> Any:
    """A short answer that ended with a word of its provider's."""
    answer = rendered(protocol, (Text("a"),), Finished(Finish.STOP))
    match protocol:
        case ApiProtocol.CHAT_COMPLETIONS:
            answer["choices"][0]["finish_reason"] = word
        case ApiProtocol.RESPONSES:
            answer |= {"status": "incomplete", "incomplete_details": {"reason": word}}
        case ApiProtocol.MESSAGES:
            answer["stop_reason"] = word
        case ApiProtocol.GENERATE_CONTENT:
            answer["candidates"][0]["finishReason"] = word
    return answer


FILTERED = [
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
    "IMAGE_OTHER", "NO_IMAGE", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION",
    "MODEL_ARMOR", "PUP_LIMITED_DISABLED",
]  # fmt: skip
BOTCHED = [
    "MALFORMED_FUNCTION_CALL", "MALFORMED_RESPONSE", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
]  # fmt: skip
MEANINGS = [
    *((CC, word, Finish(word)) for word in ("stop", "length", "tool_calls", "content_filter")),
    (CC, "function_call", Finish.TOOL_CALLS),
    (RE, "max_output_tokens", Finish.LENGTH),
    (RE, "content_filter", Finish.CONTENT_FILTER),
    (RE, "max_messages", Finish.LENGTH),
    (RE, "steered", Finish.STOP),
    (ME, "end_turn", Finish.STOP),
    (ME, "max_tokens", Finish.LENGTH),
    (ME, "stop_sequence", Finish.STOP_SEQUENCE),
    (ME, "tool_use", Finish.TOOL_CALLS),
    (ME, "pause_turn", Finish.PAUSE),
    (ME, "refusal", Finish.CONTENT_FILTER),
    (ME, "model_context_window_exceeded", Finish.CONTEXT_WINDOW),
    (GC, "STOP", Finish.STOP),
    (GC, "FINISH_REASON_UNSPECIFIED", Finish.STOP),
    (GC, "MAX_TOKENS", Finish.LENGTH),
    (GC, "CONTINUATION", Finish.LENGTH),
    (GC, "OTHER", Finish.STOP),  # something was said
    *((GC, word, Finish.CONTENT_FILTER) for word in FILTERED),
    *((GC, word, Finish.MALFORMED) for word in BOTCHED),
    *((protocol, "reason_of_tomorrow", Finish.STOP) for protocol in ApiProtocol),
]


@pytest.mark.parametrize(("protocol", "word", "meaning"), MEANINGS)
def test_a_provider_s_word_is_understood_and_kept(
    protocol: ApiProtocol, word: str, meaning: Finish
) -> None:
    finished = read_finish(protocol, finished_with(protocol, word))
    assert (finished.finish, finished.raw) == (meaning, word)


def test_a_missing_signature_is_the_fault_of_the_request() -> None:
    def explain(_: ErrorFacts) -> BitrouterError:
        return BitrouterError("not asked for")

    answer = finished_with(GC, "MISSING_THOUGHT_SIGNATURE")
    prompt = Prompt("m", ())
    translation = Translation(CODECS[GC], CODECS[CC], prompt, Undo(), LABEL, "google", explain)
    with pytest.raises(UpstreamGarbled) as caught:
        translation.take_whole(answer)
    assert caught.value.status == 400


# --- how much to reason


# fmt: off
BUDGETS = [
    (-1, ""), (0, "none"), (1, "minimal"), (1024, "minimal"), (1025, "low"), (4096, "low"),
    (4097, "medium"), (12_288, "medium"), (12_289, "high"), (24_576, "high"), (24_577, "xhigh"),
    (32_768, "xhigh"), (32_769, "max"), (10**8, "max"),
]
NEAREST = [
    # wanted     known                        sent
    ("high",     (),                          "high"),
    ("high",     ("low", "high"),             "high"),
    ("max",      ("low", "medium", "high"),   "high"),
    ("medium",   ("low", "high"),             "low"),
    ("none",     ("minimal", "low"),          "minimal"),
    ("minimal",  ("low", "medium"),           "low"),
]
# fmt: on


@pytest.mark.parametrize(("budget", "effort"), BUDGETS)
def test_a_budget_stands_for_an_effort(budget: int, effort: str) -> None:
    assert effort_of(budget) == effort


@pytest.mark.parametrize(("wanted", "known", "sent"), NEAREST)
def test_an_effort_steps_down_to_one_that_is_known(
    wanted: str, known: tuple[str, ...], sent: str
) -> None:
    assert nearest_effort(wanted, known) == sent and wanted in EFFORTS


# --- media

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0 jpeg").decode()
STARTS = [
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff\xe0", "image/jpeg"),
    (b"GIF89a", "image/gif"),
    (b"RIFF\0\0\0\0WEBPVP8", "image/webp"),
    (b"RIFF\0\0\0\0WAVE", ""),
    (b"%PDF-1.7", "application/pdf"),
    (b"", ""),
]


@pytest.mark.parametrize(("start", "mime"), STARTS)
def test_a_file_is_known_by_its_first_bytes(start: bytes, mime: str) -> None:
    assert sniff(start) == mime


URLS = {
    "data": (f"data:image/png;base64,{PNG}", Media("image", "image/png", PNG)),
    "a wrong type": (f"data:image/png;base64,{JPEG}", Media("image", "image/jpeg", JPEG)),
    "no type": (f"data:;base64,{JPEG}", Media("image", "image/jpeg", JPEG)),
    "percent signs": ("data:text/plain,a%20b", Media("image", "text/plain", "YSBi")),
    "a charset": (
        "data:text/plain;charset=utf-8;base64,YQ==",
        Media("image", "text/plain", "YQ=="),
    ),
    "a suffix": (
        "https://x.example/a.PNG?b=1",
        Media("image", "image/png", url="https://x.example/a.PNG?b=1"),
    ),
    "no suffix": ("https://x.example/", Media("image", url="https://x.example/")),
}


@pytest.mark.parametrize(("url", "media"), URLS.values(), ids=URLS)
def test_media_are_read_from_a_url(url: str, media: Media) -> None:
    assert media_at("image", url, "where") == media


def test_the_type_in_a_data_url_counts_more_than_one_beside_it() -> None:
    media = media_at("document", "data:text/csv,a", "where", mime="text/html", name="n")
    assert media == Media("document", "text/csv", "YQ==", name="n")
    assert media_at("image", "https://x.example/a.png", "where", mime="image/x").mime == "image/x"


@pytest.mark.parametrize("url", ["", None, 5, "data:image/png;base64"])
def test_what_is_no_url_is_refused_with_its_place(url: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        media_at("image", url, "here")
    assert caught.value.param == "here"


def test_either_alphabet_of_base64_holds_the_same_bytes() -> None:
    raw = bytes(range(251, 256)) * 5
    for text in (
        base64.b64encode(raw),
        base64.urlsafe_b64encode(raw),
        base64.urlsafe_b64encode(raw).rstrip(b"="),
    ):
        assert from_base64(text.decode()) == raw
        assert standard_base64(text.decode()) == base64.b64encode(raw).decode()
    assert media_of_bytes("image", "image/heic;x=1", "-_8", "where") == Media(
        "image", "image/heic", "+/8="
    )


@pytest.mark.parametrize("data", ["", None, 5])
def test_no_data_is_no_media(data: Any) -> None:
    with pytest.raises(BadRequest, match=r"^where: "):
        media_of_bytes("image", "image/png", data, "where")


TEXTS_IN = [
    (Media("document", "text/csv", "YSxi"), "a,b"),
    (Media("document", "application/json", "e30="), "{}"),
    (Media("document", "application/pdf", "e30="), None),
    (Media("document", "text/plain", url="https://x.example/"), None),
]


@pytest.mark.parametrize(("media", "text"), TEXTS_IN)
def test_a_plain_document_can_be_said_in_words(media: Media, text: str | None) -> None:
    assert text_in(media) == text


# --- reading requests

# fmt: off
READINGS: list[tuple[Any, Any]] = [
    # reads                                         gives, or the field that is at fault
    (lambda: number({"a": 1.5}, "a"),               1.5),
    (lambda: number({}, "a"),                       None),
    (lambda: number({"a": True}, "a"),              BadRequest("", param="a")),
    (lambda: number({"a": "1"}, "a"),               BadRequest("", param="a")),
    (lambda: count_in({"a": 7.0}, "a"),             7),
    (lambda: count_in({"a": None}, "a"),            None),
    (lambda: count_in({"a": -1}, "a"),              BadRequest("", param="a")),
    (lambda: count_in({"a": 1.5}, "a"),             BadRequest("", param="a")),
    (lambda: count_in({"a": 1e300}, "a"),           BadRequest("", param="a")),
    (lambda: strings_in("x", "w"),                  ("x",)),
    (lambda: strings_in(["x", "y"], "w"),           ("x", "y")),
    (lambda: strings_in(None, "w"),                 ()),
    (lambda: strings_in(["x", 5], "w"),             BadRequest("", param="w[1]")),
    (lambda: strings_in(5, "w"),                    BadRequest("", param="w")),
    (lambda: typed({}, list, "w"),                  BadRequest("", param="w")),
    (lambda: object_in('{"a":1}'),                  {"a": 1}),
    (lambda: object_in(" "),                        {}),
    (lambda: object_in("[1]"),                      {"input": [1]}),
    (lambda: object_in('{"a":'),                    None),
    (lambda: object_in("[" * 100_000),              None),
]
# fmt: on


@pytest.mark.parametrize(("read", "wanted"), READINGS, ids=range(len(READINGS)))
def test_a_value_is_read_or_refused_by_name(read: Any, wanted: Any) -> None:
    if not isinstance(wanted, BadRequest):
        assert read() == wanted
        return
    with pytest.raises(BadRequest) as caught:
        read()
    assert caught.value.param == wanted.param


def test_a_number_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(BadRequest):
        number(json.loads('{"a":1e999}'), "a")


JOINED: list[tuple[list[Content], str]] = [
    ([Text("a"), Media("image"), Text("b")], "a\nb"),
    ([Refusal("no"), Text("c")], "c"),
    ([], ""),
]


@pytest.mark.parametrize(("content", "wanted"), JOINED)
def test_the_text_of_a_message_is_found(content: list[Content], wanted: str) -> None:
    assert joined_text(content, "\n") == wanted


def test_turns_of_one_role_are_one_and_results_come_first() -> None:
    result = ToolResult("c1", (Text("r"),))
    given = [
        Message("user", (Text("a"),)),
        Message("user", (Text("b"), result)),
        Message("assistant", (Text("c"),)),
        Message("user", ()),
    ]
    merged = [Message("user", (result, Text("a"), Text("b"))), Message("assistant", (Text("c"),))]
    assert turns(given) == merged


def test_a_conversation_is_measured_in_characters() -> None:
    result = ToolResult("c", (Text("12345"), Media("image")))
    native = Native(CC, {"type": "x"})
    content = (Text("123"), Reasoning("12"), ToolCall("c", "ab", "{}"), result, native)
    tools = (Tool("f", "1234", {}), Tool("g", "", {"a": 1}))
    prompt = Prompt("m", (Message("user", content),), tools=tools)
    assert size_of(prompt) == 3 + 2 + 4 + 5 + 4096 + 4 + len("{'a': 1}")


# --- opaque state

SIGNED = Opaque("anthropic", "signature", "c2ln/+==", "claude")
REDACTED = Opaque("anthropic", "redacted", "cmVk")
SECRET = Opaque("openai", "encrypted", "ZW5j", id="rs_1")
THOUGHT = Opaque("google", "thought", "dGhv")


@pytest.mark.parametrize("opaque", [SIGNED, REDACTED, SECRET, THOUGHT, Opaque("a", "b", "é 🦆")])
def test_state_comes_out_of_its_envelope_as_it_went_in(opaque: Opaque) -> None:
    sealed = seal(opaque)
    assert sealed.startswith(ENVELOPE) and sealed.isascii() and "=" not in sealed
    assert unseal(sealed) == opaque == opaque_from(sealed, "other", "kind")


def envelope(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return ENVELOPE + base64.urlsafe_b64encode(raw).decode()


FACTS = {"v": "anthropic", "m": "", "k": "signature", "id": "", "d": "c2ln"}
TAMPERED: dict[str, str] = {
    "nothing": ENVELOPE,
    "no base64": ENVELOPE + "!!!",
    "cut": seal(SIGNED)[:-3],
    "no JSON": envelope(b"{"),
    "no UTF-8": envelope(b"\xff\xfe"),
    "a list": envelope([1]),
    "a field missing": envelope({k: v for k, v in FACTS.items() if k != "d"}),
    "a field that is no text": envelope({**FACTS, "d": {"a": 1}}),
    "nested without end": envelope(b"[" * 100_000),
    "too large": envelope({**FACTS, "d": "x" * (1 << 20)}),
}


@pytest.mark.parametrize("text", [*TAMPERED.values(), "", None, 5, "c2ln"], ids=range(14))
def test_an_envelope_that_was_tampered_with_is_empty(text: Any) -> None:
    assert unseal(text) is None


def test_a_vendor_s_own_state_is_bare_in_its_own_protocol_alone() -> None:
    assert sealed_for(SIGNED, "anthropic", "signature") == SIGNED.data
    for other in (("openai", "signature"), ("anthropic", "redacted")):
        assert sealed_for(SIGNED, *other) == seal(SIGNED)
    assert opaque_from("bare", "openai", "encrypted", "rs") == Opaque(
        "openai", "encrypted", "bare", id="rs"
    )
    assert (
        opaque_from("", "openai", "encrypted") is opaque_from(None, "openai", "encrypted") is None
    )


CALL, NEXT = ToolCall("c1", "tide", '{"port":"Brest"}'), ToolCall("c2", "tide", "{}")
STATED: dict[str, tuple[Block, ...]] = {
    "signed thinking": (Reasoning("hm hm", SIGNED), Text("a"), CALL),
    "thinking not shown": (Reasoning("", SIGNED), Text("a")),
    "redacted thinking": (Reasoning("hm", SIGNED), Reasoning("", REDACTED), CALL),
    "encrypted reasoning": (Reasoning("hm", SECRET), CALL),
    "reasoning between calls": (Reasoning("hm", SECRET), CALL, Reasoning("", REDACTED), NEXT),
    "a signed call": (Reasoning("hm"), CALL._replace(opaque=THOUGHT), NEXT),
    "a signed text": (Text("a"), Reasoning("", THOUGHT)),
    "unknown state": (Reasoning("hm", Opaque("chat:x", "reasoning.text|y", "eHh4")), Text("a")),
}
# Chat has no place between calls or after a text, and does not say whose its servers' state is;
# Responses gives items ids of its own; state after the last words is left out of Messages.
HOMELESS = {
    (CC, "reasoning between calls"), (CC, "a signed text"), (CC, "unknown state"),
    (RE, "encrypted reasoning"), (RE, "reasoning between calls"), (ME, "a signed text"),
}  # fmt: skip
KEPT = [
    (protocol, name)
    for protocol in ApiProtocol
    for name in STATED
    if (protocol, name) not in HOMELESS
]


def added(old: dict[str, Any], new: dict[str, Any]) -> None:
    """As SDKs add deltas up."""
    for key, value in new.items():
        same = type(old.get(key)) is type(value) and isinstance(value, str | list)
        old[key] = old[key] + value if same else value


def kept_of_stream(protocol: ApiProtocol, events: list[Any]) -> Any:
    """What a caller keeps of a stream, for the next request."""
    if protocol is RE:
        return events[-1]["response"]["output"]
    if protocol is GC:
        return [event["candidates"][0]["content"] for event in events]
    kept: list[dict[str, Any]] = []
    message: dict[str, Any] = {}
    for event in events:
        delta = event.get("delta") or (event.get("choices") or [{}])[0].get("delta", {})
        if "content_block" in event:
            kept.append(event["content_block"])
        elif "partial_json" in delta:
            kept[-1]["input"] = json.loads(kept[-1].pop("text", "") + delta["partial_json"])
        elif event.get("type") == "content_block_delta":
            added(kept[-1], {k: v for k, v in delta.items() if k != "type"})
        elif "choices" in event:
            for call in delta.pop("tool_calls", ()):
                kept += [{"function": {}}] if call["index"] == len(kept) else []
                added(kept[call["index"]]["function"], call.pop("function"))
                added(kept[call["index"]], call)
            added(message, delta)
    return {**message, "tool_calls": kept} if protocol is CC else kept


def kept_of_answer(protocol: ApiProtocol, answer: Any) -> Any:
    match protocol:
        case ApiProtocol.CHAT_COMPLETIONS:
            return answer["choices"][0]["message"]
        case ApiProtocol.RESPONSES:
            return answer["output"]
        case ApiProtocol.MESSAGES:
            return answer["content"]
    return [answer["candidates"][0]["content"]]


def history(protocol: ApiProtocol, kept: Any) -> dict[str, Any]:
    """The caller's next request."""
    match protocol:
        case ApiProtocol.CHAT_COMPLETIONS:
            return {"messages": [{"role": "user", "content": "?"}, kept]}
        case ApiProtocol.RESPONSES:
            return {"input": [{"role": "user", "content": "?"}, *kept]}
        case ApiProtocol.MESSAGES:
            said = {"role": "assistant", "content": kept}
            return {"messages": [{"role": "user", "content": "?"}, said]}
    return {"contents": [{"role": "user", "parts": [{"text": "?"}]}, *kept]}


def stated(content: tuple[Content, ...]) -> list[Content]:
    """Content with the state of calls before them, no state where there was none, no models."""
    found: list[Content] = []
    for part in content:
        opaque = part.opaque if isinstance(part, ToolCall | Reasoning) else None
        bare = opaque._replace(model="") if opaque and opaque.vendor else None
        if isinstance(part, Reasoning):
            part = Reasoning(part.text, bare)
        elif isinstance(part, ToolCall):
            found += [Reasoning("", bare)] if bare else []
            part = part._replace(opaque=None)
        found.append(part)
    return found


@pytest.mark.parametrize(("protocol", "name"), KEPT)
def test_state_survives_a_caller_of_any_protocol(protocol: ApiProtocol, name: str) -> None:
    blocks = STATED[name]
    finished = Finished(Finish.STOP)
    answers = (
        kept_of_answer(protocol, rendered(protocol, blocks, finished)),
        kept_of_stream(protocol, encoded(protocol, blocks, finished)),
    )
    for kept in answers:
        body = history(protocol, kept)
        _, *said = CODECS[protocol].parse_request(body).messages
        assert stated(tuple(p for m in said for p in m.content)) == stated(blocks)


def sealed_history(protocol: ApiProtocol, state: str) -> dict[str, Any]:
    """A conversation with some state in it, where the protocol keeps its own."""
    kept: Any
    match protocol:
        case ApiProtocol.CHAT_COMPLETIONS:
            detail = {"type": "reasoning.encrypted", "data": state, "index": 0}
            kept = {"role": "assistant", "content": "a", "reasoning_details": [detail]}
        case ApiProtocol.RESPONSES:
            item = {
                "type": "reasoning",
                "id": "rs_abc_0",
                "summary": [],
                "encrypted_content": state,
            }
            kept = [item, {"role": "assistant", "content": "a"}]
        case ApiProtocol.MESSAGES:
            thinking = {"type": "thinking", "thinking": "hm", "signature": state}
            kept = [thinking, {"type": "text", "text": "a"}]
        case _:
            signature = base64.urlsafe_b64encode(state.encode()).decode()
            kept = [{"role": "model", "parts": [{"text": "a", "thoughtSignature": signature}]}]
    return history(protocol, kept)


# whose state a provider of the protocol itself would want back, and where it then stands
OWNED = {
    CC: Opaque("chat:v", "reasoning.encrypted|x", "b3du"),
    RE: Opaque("openai", "encrypted", "b3du", id="rs_9"),
    ME: Opaque("anthropic", "signature", "b3du"),
    GC: Opaque("google", "thought", "b3du"),
}


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_state_is_opened_for_the_vendor_who_minted_it(protocol: ApiProtocol) -> None:
    own, body = OWNED[protocol], sealed_history(protocol, seal(OWNED[protocol]))
    assert CODECS[protocol].sealed(body) and CODECS[protocol].unseal(body, own.vendor)
    text = json.dumps(body)
    assert f'"{own.data}"' in text and ENVELOPE not in text and own.id in text


FOREIGN = {"of others": seal(SIGNED), "none at all": seal(Opaque("", "none", "")), **TAMPERED}


@pytest.mark.parametrize("sealed", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("protocol", ApiProtocol)
def test_state_of_others_and_what_was_tampered_with_is_withheld(
    protocol: ApiProtocol, sealed: str
) -> None:
    body = sealed_history(protocol, sealed)
    assert CODECS[protocol].unseal(body, "somebody")
    text = json.dumps(body)
    assert "br1" not in text and "YnIx" not in text and SIGNED.data not in text
    prompt = CODECS[protocol].parse_request(body)
    texts = [part.text for m in prompt.messages for part in m.content if isinstance(part, Text)]
    assert texts == ["?", "a"]


@pytest.mark.parametrize("protocol", ApiProtocol)
def test_what_is_not_ours_is_left_as_it_is(protocol: ApiProtocol) -> None:
    body = sealed_history(protocol, "c2ln/+==")
    before = copy.deepcopy(body)
    assert not CODECS[protocol].unseal(body, "somebody") and body == before


@pytest.mark.parametrize("protocol", ApiProtocol)
@pytest.mark.parametrize("state", TAMPERED.values(), ids=TAMPERED)
def test_a_request_with_a_tampered_envelope_is_read_without_it(
    protocol: ApiProtocol, state: str
) -> None:
    prompt = CODECS[protocol].parse_request(sealed_history(protocol, state))
    assert not [
        p.opaque
        for m in prompt.messages
        for p in m.content
        if isinstance(p, Reasoning) and p.opaque
    ]
